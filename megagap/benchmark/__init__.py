"""How fast a recipe trains on this machine: its own steps, timed (``step.py``), in several layouts (``sweep.py``)."""
