"""From crawled text to token files: one pipeline of datatrove's blocks (optional extra ``megagap[curate]``).

Language identification, URL and quality filters, MinHash deduplication, masking of personal data, decontamination, a
quality classifier, and :class:`~megagap.preprocess.datatrove.TokenFileWriter`. Everything runs without a network.
"""
