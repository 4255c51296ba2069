"""Token files to training samples.

``indexed`` reads a ``.bin``/``.idx`` pair (``partial`` while it is being written), which a ``manifest`` describes;
``sources`` are a recipe's. ``order``, ``shuffled`` and ``mixture`` say which tokens sample number n has; ``loader``
reads them. Nothing here knows of other processes: the loader is given its data-parallel rank.
"""
