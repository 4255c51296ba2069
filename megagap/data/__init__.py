"""Text to tokens to training samples.

``preprocess`` writes ``.bin``/``.idx`` pairs (``indexed``) with a ``tokenizer``; ``order`` and ``mixture`` say which
window of which source sample number n is; ``loader`` reads it. Nothing here knows of processes that talk to each
other: the loader is handed its data-parallel rank.
"""
