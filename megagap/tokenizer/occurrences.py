"""How often special tokens are written out in texts."""

import re
from collections.abc import Sequence
from itertools import groupby


class Occurrences:
    """Counts ``tokens`` in texts; where several begin at one place, the longest."""

    def __init__(self, tokens: Sequence[str]) -> None:
        ordered = sorted({*tokens} - {""})
        # Nearly all texts contain none: looking for their beginnings is much faster than finding that nothing matches.
        groups = (list(group) for _, group in groupby(ordered, key=lambda token: token[0]))
        self._beginnings = [_common_beginning(group[0], group[-1]) for group in groups]  # the two least alike
        longest_first = sorted(ordered, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))

    def __call__(self, text: str) -> int:
        if not any(beginning in text for beginning in self._beginnings):
            return 0
        return sum(1 for _ in self._pattern.finditer(text))


def _common_beginning(one: str, other: str) -> str:
    differences = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differences, min(len(one), len(other)))]
