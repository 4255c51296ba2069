"""Text to tokens to training samples.

``preprocess`` turns files (``inputs``, ``units``, ``documents``) into ``.bin``/``.idx`` pairs (``indexed``, while being
written ``partial``) with a ``tokenizer``, and accounts for it in a ``manifest``; ``merge`` joins pairs. ``order`` and
``mixture`` say which window of which source sample number n is; ``loader`` reads it. Nothing here knows of processes
that talk to each other: the loader is handed its data-parallel rank.
"""
