"""Invented names: pronounceable, capitalised, and all different."""

import random

ONSETS = ("b", "br", "d", "dr", "f", "g", "gr", "k", "kl", "l", "m", "n", "p", "r", "s", "sk", "t", "tr", "v", "z")
VOWELS = ("a", "e", "i", "o", "u", "ae", "ou")
CODAS = ("", "", "l", "m", "n", "r", "s", "th", "x")


def invented_names(count: int, draw: random.Random, taken: set[str]) -> list[str]:
    """``count`` names of three syllables (some two million) that are not among ``taken``, to which they are added."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(3)) + draw.choice(CODAS)
        name = name.capitalize()
        if name not in taken:
            taken.add(name)
            names.append(name)
    return names
