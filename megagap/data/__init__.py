"""Text to tokens to training samples.

``preprocess`` turns files (``inputs``, ``units``, ``documents``) into ``.bin``/``.idx`` pairs (``indexed``, while being
written ``partial``) with a ``tokenizer``, and records it in a ``manifest``; ``merge`` joins pairs. ``order`` and
``mixture`` say which window of which source sample number n is; ``loader`` reads it. Nothing here knows of other
processes: the loader is given its data-parallel rank.
"""
