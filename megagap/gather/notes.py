"""Notes of what is skipped, beside progress bars."""

import sys

from tqdm import tqdm


def note(message: str) -> None:
    tqdm.write(message, file=sys.stderr)
