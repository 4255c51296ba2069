"""Example labels without a judge: real passages, and the same made worse in known ways.

A stand-in for the labels of people or of a large model, for tests and to try the tools with. What a change does to
each criterion is stated in :data:`DEGRADATIONS`; nothing is learnt from it about real texts of low quality.
"""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from megagap.curate.quality.labels import CRITERIA

PASSAGE = 450
"""Characters of a passage, about; it ends with a sentence."""

BOILERPLATE = (
    "Accept all cookies", "Sign in", "Share on Facebook", "Read more", "Subscribe to our newsletter!", "Home > News",
    "Click here to download", "Terms of use | Privacy", "Accepter les cookies", "Se connecter", "Partager sur Facebook",
    "Lire la suite", "Abonnez-vous à notre lettre !", "Accueil > Actualités", "Cliquez ici", "Mentions légales",
    "Advertisement", "Publicité", "0 comments", "0 commentaire", "404", "Next »", "« Précédent",
)  # fmt: skip


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?…:;])\s+", text.strip()) if part]


def shuffled_words(text: str, chance: random.Random) -> str:
    parts = []
    for sentence in sentences(text):
        words = sentence.split()
        chance.shuffle(words)
        parts.append(" ".join(words))
    return " ".join(parts)


def shuffled_sentences(text: str, chance: random.Random) -> str:
    parts = sentences(text)
    chance.shuffle(parts)
    return " ".join(parts)


def typing_errors(text: str, chance: random.Random) -> str:
    """Neighbouring letters swapped or one lost in every fourth word, capitals and half of the punctuation gone."""
    words = []
    for word in text.lower().split(" "):
        if len(word) > 3 and chance.random() < 0.25:
            at = chance.randrange(1, len(word) - 1)
            word = word[:at] + (word[at + 1] + word[at] + word[at + 2 :] if chance.random() < 0.5 else word[at + 1 :])
        if chance.random() < 0.5:
            word = word.rstrip(".,;:!?")
        words.append(word)
    return " ".join(words)


def truncated(text: str, chance: random.Random) -> str:
    """The first fifth to two fifths, which breaks off within a word."""
    return text[: int(len(text) * chance.uniform(0.2, 0.4))].rstrip() + " ..."


def repeated(text: str, chance: random.Random) -> str:
    """A few sentences of it again and again, to the same length."""
    parts = sentences(text)
    chosen = parts[: max(1, len(parts) // chance.choice((3, 4, 5)))]
    result: list[str] = []
    while sum(map(len, result)) < len(text):
        result += chosen
    return " ".join(result)


def boilerplate(text: str, chance: random.Random) -> str:
    """Scraps of a page's navigation between its sentences, most of which are lost."""
    parts = []
    for sentence in sentences(text):
        if chance.random() < 0.4:
            parts.append(sentence)
        parts += chance.sample(BOILERPLATE, chance.choice((1, 2)))
    return "\n".join(parts)


@dataclass(frozen=True)
class Degradation:
    make: Callable[[str, random.Random], str]
    levels: str
    """One letter per criterion, in their order: l, m or h."""
    overall: str


DEGRADATIONS = {
    "as it is": Degradation(lambda text, _: text, "hhhhh", "high"),
    "shuffled words": Degradation(shuffled_words, "lllml", "low"),
    "shuffled sentences": Degradation(shuffled_sentences, "mhlmm", "medium"),
    "typing errors": Degradation(typing_errors, "hlmhm", "medium"),
    "truncated": Degradation(truncated, "hhmll", "medium"),
    "repeated": Degradation(repeated, "hmmll", "low"),
    "boilerplate": Degradation(boilerplate, "mmlll", "low"),
}

_LEVELS = {"l": "low", "m": "medium", "h": "high"}


def passages(text: str, length: int = PASSAGE) -> Iterator[str]:
    """Runs of whole sentences of about ``length`` characters that read like prose."""
    current: list[str] = []
    for sentence in sentences(" ".join(text.split())):
        current.append(sentence)
        if sum(map(len, current)) >= length:
            passage = " ".join(current)
            letters = sum(char.isalpha() or char.isspace() for char in passage)
            if letters > 0.88 * len(passage) and len(current) > 2 and len(passage) < 2 * length:
                yield passage
            current = []


def example_labels(
    documents: Iterable[tuple[str, str, str]], seed: int, per_document: int = 2
) -> Iterator[dict[str, object]]:
    """Lines for :func:`~megagap.curate.quality.labels.read_labels` from (text, name, source) of documents.

    Every passage is used once, as it is or made worse; half as often as it is as all else together.
    """
    chance = random.Random(seed)
    names = [name for name in DEGRADATIONS if name != "as it is"]
    for text, document, source in documents:
        for passage in list(passages(text))[:per_document]:
            name = "as it is" if chance.random() < 1 / 3 else chance.choice(names)
            made = DEGRADATIONS[name]
            labels = {key: _LEVELS[letter] for key, letter in zip(CRITERIA, made.levels, strict=True)}
            yield {
                "text": made.make(passage, chance),
                "labels": {**labels, "overall": made.overall},
                "document": document,
                "source": source,
                "made_by": name,
            }
