"""Types of command-line options that several tools have. Imports nothing heavy: ``--help`` should be quick."""

import argparse


def positive(text: str) -> int:
    """The type of an option that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def count(text: str) -> int:
    """The type of an option that must be a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value
