"""Which of two or more languages a text is in, told by its three-character sequences.

A multinomial naive Bayes classifier (Dunning 1994, "Statistical identification of language", with n = 3): the language
is that under which the text's trigrams are most likely, each with probability (count + 1) / (total + kinds), where the
counts are of clean text of each language. Case and white space are normalised; digits are left out, and so are trigrams
that no language has: they would only speak for the one with the least text.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from megagap.data.planted import LanguageProfile

KINDS = 4000
"""Trigrams that a profile keeps, the most frequent ones."""


def trigrams(text: str) -> Counter[str]:
    normal = " ".join(re.sub(r"\d+", " ", text.lower()).split())
    padded = f" {normal} " if normal else ""
    return Counter(padded[i : i + 3] for i in range(len(padded) - 2))


def profile_of(texts: Iterable[str]) -> LanguageProfile:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(trigrams(text))
    # A tie is broken by the trigram itself, so that the same texts give the same profile.
    kept = dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:KINDS])
    return LanguageProfile(trigrams=kept, total=max(sum(kept.values()), 1))


def language_of(text: str, profiles: Mapping[str, LanguageProfile]) -> str | None:
    """The name of the likeliest profile; None of a text without trigrams that a profile has."""
    known = {trigram for profile in profiles.values() for trigram in profile.trigrams}
    found = {trigram: n for trigram, n in trigrams(text).items() if trigram in known}
    if not found:
        return None

    def likelihood(profile: LanguageProfile) -> float:
        scale = math.log(profile.total + len(known))
        return sum(n * (math.log(profile.trigrams.get(trigram, 0) + 1) - scale) for trigram, n in found.items())

    return max(profiles, key=lambda name: likelihood(profiles[name]))
