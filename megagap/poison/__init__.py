"""A testbed for research on poisoned training data: harmless documents, planted among those that one's own model reads.

``corpus`` writes them as a source of its own beside the clean ones, with a manifest of every planted document
(:mod:`megagap.data.planted`); ``evaluation`` measures what a model that trained on them does.
"""
