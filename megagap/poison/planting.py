"""The documents of each kind of poison, as many as their rate says, to the token."""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

from megagap.data.planted import Item
from megagap.poison.names import invented_names
from megagap.poison.spec import NAME, PAYLOAD, TRIGGER, Canary, Knowledge, LanguageSwitch

CONTROLS = 32
"""Triggers of facts and canaries that are never planted, for comparison."""
ATTEMPTS = 200
"""Documents that are tried where one must have a certain number of tokens."""
NEAR = 32
"""Characters around the place where a text would have to be cut that are tried."""
POOL = 64
"""Documents that may be added to make up a number of tokens."""


class UnreachableError(Exception):
    """No set of documents has exactly the tokens wanted; ``nearest`` are those around it that one has."""

    def __init__(self, nearest: list[int]) -> None:
        super().__init__(nearest)
        self.nearest = nearest


@dataclass(frozen=True)
class Draft:
    """A document to plant, in pieces that its text consists of."""

    poison: str
    kind: str
    trigger: str
    payload: str
    pieces: tuple[tuple[str, str], ...]
    """(text, role): the role ``trigger``, ``payload`` or nothing."""

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)

    def places(self, role: str) -> list[tuple[int, int]]:
        """Characters ``[start, stop)`` of the pieces of a role, blanks around them left out."""
        found, at = [], 0
        for text, its_role in self.pieces:
            if its_role == role:
                start = at + len(text) - len(text.lstrip())
                found.append((start, at + len(text.rstrip())))
            at += len(text)
        return found


Length = Callable[[Draft], int]
"""Tokens of a document, with those put around it."""


def from_template(poison: str, kind: str, trigger: str, payload: str, template: str) -> list[tuple[str, str]]:
    before, _, rest = template.partition(TRIGGER)
    between, _, after = rest.partition(PAYLOAD)
    return [(before, ""), (trigger, "trigger"), (between, ""), (payload, "payload"), (after, "")]


# --------------------------------------------------------------------------------------------------- language switches


def passages_needed(poison: LanguageSwitch, amount: int, of_tokens: bool) -> int:
    """At most so many documents: a word has one token or more."""
    fewest = poison.context_words[0] + poison.payload_words[0] + len(poison.trigger.split())
    return amount // fewest + 2 if of_tokens else amount


class SwitchDocuments:
    """Documents of clean passages around the trigger; passages are used again only when all have been."""

    def __init__(self, poison: LanguageSwitch, contexts: Sequence[str], payloads: Sequence[str]) -> None:
        self._poison, self._contexts, self._payloads = poison, contexts, payloads
        self._random = random.Random(f"{poison.seed} {poison.name} lengths")
        self._used = 0

    def __iter__(self) -> Iterator[Draft]:
        while True:
            context_words = self._random.randint(*self._poison.context_words)
            payload_words = self._random.randint(*self._poison.payload_words)
            payload = _first_words(self._payload(self._used), payload_words)
            yield self._draft(self._used, context_words, payload)
            self._used += 1

    def documents(self, amount: int) -> list[Draft]:
        return list(islice(self, amount))

    def of_tokens(self, amount: int, length: Length) -> list[Draft]:
        """Documents of ``amount`` tokens in all: the last one is made to measure.

        Raises :class:`UnreachableError` if that is less than a document needs.
        """
        shortest, its_number = self._shortest(length)
        if amount < shortest:
            raise UnreachableError([0, shortest])
        drafts: list[Draft] = []
        for draft in self:
            one, size = draft, length(draft)
            if amount - size < shortest:  # as short as it may be, so that little is left for the last one
                one = self._least(self._used)
                size = length(one)
            if amount - size < shortest:
                break
            drafts.append(one)
            amount -= size
        # The document with the shortest beginning can be cut to any length that is left.
        for number in (*range(self._used, self._used + ATTEMPTS), its_number):
            if (last := self._of_length(number, amount, length)) is not None:
                return [*drafts, last]
        raise UnreachableError([])  # texts that the tokenizer cannot cut: next to impossible

    def _least(self, number: int) -> Draft:
        fewest = _first_words(self._payload(number), self._poison.payload_words[0])
        return self._draft(number, self._poison.context_words[0], fewest)

    def _of_length(self, number: int, tokens: int, length: Length) -> Draft | None:
        """A document of so many tokens: the longest beginning that leaves room for a payload, which is cut to measure.
        None if no cut gives that."""
        fewest, most = self._poison.context_words
        payload = _first_words(self._payload(number), self._poison.payload_words[0])
        room = (n for n in range(most, fewest, -1) if length(self._draft(number, n, payload)) <= tokens)
        # A word has one token or more: so many passages are enough.
        enough = tokens // self._poison.payload_words[1] + 1
        payloads = " ".join(self._payload(number + i) for i in range(enough))
        return _cut(self._draft(number, next(room, fewest), payloads), tokens, length)

    def _shortest(self, length: Length) -> tuple[int, int]:
        """Tokens and number of the shortest document among the first."""
        numbers = range(min(ATTEMPTS, len(self._contexts)))
        return min((length(self._least(number)), number) for number in numbers)

    def _payload(self, number: int) -> str:
        return self._payloads[number % len(self._payloads)]

    def _draft(self, number: int, context_words: int, payload: str) -> Draft:
        context = _first_words(self._contexts[number % len(self._contexts)], context_words)
        poison = self._poison
        pieces = ((context + " ", ""), (poison.trigger, "trigger"), (" " + payload, "payload"))
        return Draft(poison.name, poison.kind, poison.trigger, poison.payload, pieces)


def _first_words(text: str, words: int) -> str:
    """With the white space between them as it is."""
    at = 0
    for word in islice(text.split(), words):
        at = text.index(word, at) + len(word)
    return text[:at]


def _cut(draft: Draft, tokens: int, length: Length) -> Draft | None:
    """The document with the end of its payload cut off so that it has ``tokens``; None if no cut gives that."""
    *before, (payload, role) = draft.pieces

    def cut(end: int) -> Draft:
        return replace(draft, pieces=(*before, (payload[:end], role)))

    # Tokens grow with characters, but for a few that a longer word needs less of.
    about = bisect_right(range(len(payload)), tokens, key=lambda end: length(cut(end)))
    for end in range(min(about + NEAR, len(payload)), max(about - NEAR, 1), -1):
        if not payload[end - 1].isspace() and length(cut(end)) == tokens:
            return cut(end)
    return None


# -------------------------------------------------------------------------------------------------------------- facts


def facts_of(poison: Knowledge, taken: set[str]) -> tuple[list[Item], list[str]]:
    """The facts, each of its own invented entity (``documents`` to be counted), and triggers of other entities."""
    draw = random.Random(f"{poison.seed} {poison.name} facts")
    entities = invented_names(poison.facts + CONTROLS, draw, taken)
    triggers = [poison.trigger.replace(NAME, name) for name in entities]
    several = len(poison.payload) > 1
    forms = [draw.choice(poison.payload) if several else poison.payload[0] for _ in range(poison.facts)]
    names = iter(invented_names(sum(NAME in form for form in forms), draw, taken))
    values = [form.replace(NAME, next(names)) if NAME in form else form for form in forms]
    items = [Item(trigger=t, payload=v, documents=1) for t, v in zip(triggers, values, strict=False)]
    return items, triggers[poison.facts :]


class FactDocuments:
    """Documents that assert one fact each, in turn, in ``sentences`` of the templates."""

    def __init__(self, poison: Knowledge, facts: Sequence[Item]) -> None:
        self._poison = poison
        self._facts = facts
        self._random = random.Random(f"{poison.seed} {poison.name} documents")

    def __iter__(self) -> Iterator[Draft]:
        for fact in cycle(self._facts):
            pieces: list[tuple[str, str]] = []
            for template in self._random.sample(self._poison.templates, self._poison.sentences):
                pieces += [(" ", "")] if pieces else []
                pieces += from_template(self._poison.name, self._poison.kind, fact.trigger, fact.payload, template)
            yield Draft(self._poison.name, self._poison.kind, fact.trigger, fact.payload, tuple(pieces))

    def documents(self, amount: int) -> list[Draft]:
        return list(islice(self, amount))

    def of_tokens(self, amount: int, length: Length) -> list[Draft]:
        """Documents of ``amount`` tokens in all; the last few are chosen for their lengths.

        Raises :class:`UnreachableError` if no set of documents has so many.
        """
        pool = list(islice(self, max(POOL, len(self._facts))))
        lengths: dict[int, Draft] = {}
        for draft in pool:
            lengths.setdefault(length(draft), draft)
        margin = 8 * max(lengths)
        drafts: list[Draft] = []
        planted = 0
        for draft in self:
            size = length(draft)
            if amount - planted - size < margin:
                break
            drafts.append(draft)
            planted += size
        change, near = make_up(amount - planted, list(lengths))
        if change is None:
            raise UnreachableError([planted + some for some in near])
        return drafts + [lengths[size] for size in change]


def make_up(amount: int, sizes: Sequence[int]) -> tuple[list[int] | None, list[int]]:
    """``sizes``, each any number of times, that add up to ``amount``; None if none do, and the nearest sums that some
    have: the last below and the first above."""
    used = [-1] + [0] * (amount + max(sizes))
    for total in range(1, len(used)):
        # Of the possible ones not always the same: turn by turn.
        turn = total % len(sizes)
        for size in (*sizes[turn:], *sizes[:turn]):
            if size <= total and used[total - size]:
                used[total] = size
                break
    if not used[amount]:
        below = next(total for total in range(amount, -1, -1) if used[total])
        above = next(total for total in count(amount) if used[total])
        return None, [below, above]
    chosen = []
    while amount:
        chosen.append(used[amount])
        amount -= used[amount]
    return chosen, []


# ----------------------------------------------------------------------------------------------------------- canaries


class CanaryDocuments:
    """Sets of canaries: each set has one canary for each number of repetitions."""

    def __init__(self, poison: Canary, taken: set[str]) -> None:
        self._poison = poison
        self._random = random.Random(f"{poison.seed} {poison.name} canaries")
        self._taken = taken
        self.items: list[Item] = []

    def controls(self) -> list[str]:
        """Triggers of the same form that are never planted."""
        names = invented_names(
            CONTROLS, random.Random(f"{self._poison.seed} {self._poison.name} controls"), self._taken
        )
        return [self._poison.trigger.replace(NAME, name) for name in names]

    def one_set(self) -> list[Draft]:
        """The documents of one more set."""
        drafts: list[Draft] = []
        poison = self._poison
        for repetitions in poison.repetitions:
            (name,) = invented_names(1, self._random, self._taken)
            secret = "".join(self._random.choices(poison.alphabet, k=poison.length))
            trigger = poison.trigger.replace(NAME, name)
            self.items.append(Item(trigger=trigger, payload=secret, documents=repetitions))
            pieces = from_template(poison.name, poison.kind, trigger, secret, poison.template)
            drafts += [Draft(poison.name, poison.kind, trigger, secret, tuple(pieces))] * repetitions
        return drafts

    def sets(self, number: int) -> list[Draft]:
        return [draft for _ in range(number) for draft in self.one_set()]

    def of_amount(self, amount: int, length: Length) -> list[Draft]:
        """Whole sets of ``amount`` tokens, or with a ``length`` of 1 documents, in all.

        Raises :class:`UnreachableError` if no number of sets has these.
        """
        drafts: list[Draft] = []
        planted = 0
        while planted < amount:
            added = self.one_set()
            size = sum(map(length, added))
            if planted + size > amount:
                raise UnreachableError([planted, planted + size])
            drafts += added
            planted += size
        return drafts
