"""How fast a recipe trains on this machine: its own steps, timed (``step.py``), in one layout or several (``sweep.py``)."""
