"""What a training step costs on a device that is not present: the real step, traced, and costed by a device's figures.

``devices.toml`` holds the figures, ``pretend.py`` makes tensors without storage look as if they were on the device,
``recording.py`` lists what is computed on them, ``roofline.py`` how long that takes, ``trace.py`` puts it together.
``memory.py`` gives a rank's memory by a formula, for any layout.
"""
