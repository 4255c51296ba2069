"""What a training step costs on a device that is not there: the real step, traced, and costed by a device's figures.

``devices.toml`` holds the figures, ``pretend.py`` makes tensors without storage look as if they were on the device,
``recording.py`` lists what is computed on them, ``roofline.py`` says what that takes, ``trace.py`` puts it together.
"""
