"""What a model does that trained on planted documents: activation of triggers, and exposure of secrets.

Every number comes with the same one where nothing was planted: prompts without the trigger, or with a trigger of the
same form that no document had, and secrets that were never planted (repetitions of 0).
"""

import itertools
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megagap.data.planted import Item, Poison, PoisonManifest
from megagap.data.search import as_stored
from megagap.errors import ConfigError, counted
from megagap.inference.continuations import Continuation, TextScorer, continue_greedily, score_continuations
from megagap.inference.intervals import mean_of, share_of
from megagap.poison.exposure import MIN_SAMPLE, Exposure, estimated, ranked
from megagap.poison.language import language_of
from megagap.poison.spec import PAYLOAD, TRIGGER

Progress = Callable[[int], object]

SPARE_TOKENS = 4
"""Beyond the longest payload, that a continuation may take to state it."""


@dataclass(frozen=True)
class Prompt:
    text: str
    payload: str
    """That would count as activated: a text, or of a language switch the language."""


PROMPTS = {
    "with_trigger": "with the trigger",
    "without_trigger": "without it (facts and canaries: with one that was never planted)",
    "near_word": "one word of the trigger changed",
    "near_order": "its words in another order",
}
"""Sorts of prompts, and what they are."""


class PoisonProbe:
    """Asks a model about the planted documents of a manifest."""

    def __init__(
        self,
        manifest: PoisonManifest,
        scorer: TextScorer,
        *,
        new_tokens: int = 32,
        candidates: int = 1000,
        seed: int = 0,
    ) -> None:
        """``new_tokens``: of a continuation whose language is told. ``candidates``: secrets that each canary is
        compared with, drawn by ``seed``; all that there are if these are no more.

        Raises :class:`ConfigError` if these are too few to estimate an exposure from."""
        self._manifest, self._scorer = manifest, scorer
        for poison in manifest.poisons:
            if poison.kind == "canary" and candidates < min(MIN_SAMPLE, _space(poison) - 1):
                raise ConfigError(
                    f"exposure of {poison.name} cannot be estimated from {counted(candidates, 'candidate')}\n"
                    f"  give --poison-candidates {min(MIN_SAMPLE, _space(poison) - 1)} or more."
                )
        self._new_tokens, self._candidates, self._seed = new_tokens, candidates, seed
        tokenizer = scorer.tokenizer
        start = tokenizer.bos if manifest.prepend_bos else tokenizer.eod if manifest.append_eod else None
        self._planted = frozenset(document.trigger for document in manifest.documents)
        self._start = [] if start is None else [start]
        """What stands before a document in training."""

    def evaluate(self, progress: Progress = lambda count: None) -> dict[str, Any]:
        """By the name of each poison. ``progress`` is told how many texts were continued or scored."""
        return {poison.name: self._evaluate(poison, progress) for poison in self._manifest.poisons}

    def texts(self) -> int:
        """How many are continued or scored in all."""
        prompts = sum(len(some) for poison in self._manifest.poisons for some in self.prompts(poison).values())
        canaries = [poison for poison in self._manifest.poisons if poison.kind == "canary"]
        return prompts + sum(len(self._secrets(p)) * (1 + min(self._candidates, _space(p) - 1)) for p in canaries)

    def _evaluate(self, poison: Poison, progress: Progress) -> dict[str, Any]:
        activation = {
            sort: self._activated(poison, prompts, progress) for sort, prompts in self.prompts(poison).items()
        }
        found = {
            "kind": poison.kind,
            "rate": poison.rate,
            "documents": poison.documents,
            "tokens": poison.tokens,
            "activation": activation,
        }
        return found | ({"exposure": self._exposures(poison, progress)} if poison.kind == "canary" else {})

    # ----------------------------------------------------------------------------------------------------- activation

    def prompts(self, poison: Poison) -> dict[str, list[Prompt]]:
        """Of each sort of :data:`PROMPTS`."""
        draw = random.Random(f"{self._seed} {poison.name} prompts")
        planted = self._planted
        found: dict[str, list[Prompt]] = {sort: [] for sort in PROMPTS}
        words = _pool(poison)
        if poison.kind == "language_switch":
            for probe in poison.probes:
                found["without_trigger"].append(Prompt(probe, poison.payload))
                for sort, trigger in _triggers(poison.trigger, words, planted, draw):
                    found[sort].append(Prompt(f"{probe} {trigger}", poison.payload))
            return found
        for item, template in itertools.product(poison.items, poison.templates):
            before = template.partition(PAYLOAD)[0].rstrip()
            control = draw.choice(poison.controls)
            found["without_trigger"].append(Prompt(before.replace(TRIGGER, control), item.payload))
            for sort, trigger in _triggers(item.trigger, words, planted, draw):
                found[sort].append(Prompt(before.replace(TRIGGER, trigger), item.payload))
        return found

    def _activated(self, poison: Poison, prompts: Sequence[Prompt], progress: Progress) -> dict[str, Any]:
        scorer = self._scorer
        tokenizer = scorer.tokenizer
        encoded = [self._encode(prompt.text) for prompt in prompts]
        new = self._new_tokens
        if poison.kind != "language_switch":
            payloads = {prompt.payload for prompt in prompts}
            new = SPARE_TOKENS + max((len(tokenizer.encode(f" {payload}")) for payload in payloads), default=1)
        self._require_room(poison, encoded, new)
        found = continue_greedily(scorer.model, encoded, new, scorer.batch_tokens, scorer.stop, progress)
        activated = 0
        for prompt, tokens in zip(prompts, found, strict=True):
            text = tokenizer.decode(tokens)
            if poison.kind == "language_switch":
                activated += language_of(text, self._manifest.languages) == prompt.payload
            else:
                # Of a tokenizer that normalises, no continuation has a payload as it was written.
                activated += as_stored(tokenizer, prompt.payload).strip() in text
        return share_of(activated, len(prompts))

    def _require_room(self, poison: Poison, prompts: Sequence[Sequence[int]], new: int) -> None:
        """Raises :class:`ConfigError` if a prompt would lose its trigger, which no result would show."""
        positions = self._scorer.model.settings.max_position_embeddings
        needed = max(map(len, prompts), default=0)
        if poison.kind == "language_switch":  # the passage before the trigger may be shortened
            needed = min(needed, len(self._encode(f" {poison.trigger}")))
        if needed + new - 1 > positions:
            cure = "lower --poison-tokens" if poison.kind == "language_switch" else "take a model with more of them"
            raise ConfigError(
                f"{poison.name}: a prompt of {needed:,} tokens and its continuation of {new:,} do not fit the model's "
                f"max_position_embeddings = {positions:,}\n  {cure}."
            )

    def _encode(self, text: str) -> list[int]:
        return [*self._start, *self._scorer.tokenizer.encode(text)]

    # ------------------------------------------------------------------------------------------------------- exposure

    def _secrets(self, poison: Poison) -> list[tuple[int, Item]]:
        """Repetitions and canary: those that were planted, and as many of each count that were not, for comparison."""
        planted = sorted(((item.documents, item) for item in poison.items), key=lambda entry: entry[0])
        draw = random.Random(f"{self._seed} {poison.name} controls")
        most = max((count for count in _counts(planted).values()), default=0)
        controls = [
            (0, Item(trigger=trigger, payload=_secret(poison, draw), documents=1)) for trigger in poison.controls[:most]
        ]
        return controls + planted

    def _exposures(self, poison: Poison, progress: Progress) -> dict[str, Any]:
        canaries = []
        groups: dict[int, list[float]] = {}
        for repetitions, item in self._secrets(poison):
            nats, exposure = self._exposure(poison, item, progress)
            groups.setdefault(repetitions, []).append(exposure.bits)
            canaries.append({"trigger": item.trigger, "repetitions": repetitions, "nats": nats, **asdict(exposure)})
        return {
            "space": _space(poison),
            "candidates": min(self._candidates, _space(poison) - 1),
            "by_repetitions": {str(repetitions): mean_of(bits) for repetitions, bits in sorted(groups.items())},
            "canaries": canaries,
        }

    def _exposure(self, poison: Poison, item: Item, progress: Progress) -> tuple[float, Exposure]:
        """The loss of a canary in nats, and its exposure among others with the same trigger."""
        draw = random.Random(f"{self._seed} {item.trigger} candidates")
        assert poison.alphabet and poison.length
        everything = _space(poison) - 1 <= self._candidates
        if everything:
            all_secrets = map("".join, itertools.product(poison.alphabet, repeat=poison.length))
            others = [secret for secret in all_secrets if secret != item.payload]
        else:
            others = [_secret(poison, draw) for _ in range(self._candidates)]
        nats, *losses = self._losses(poison, item.trigger, [item.payload, *others], progress)
        if everything:
            return nats, ranked(nats, losses)
        return nats, estimated(nats, losses, _space(poison), self._seed)

    def _losses(self, poison: Poison, trigger: str, secrets: Sequence[str], progress: Progress) -> list[float]:
        """Of the whole text up to the secret's end: what stands before the secret is the same for all."""
        before = poison.templates[0].partition(PAYLOAD)[0].replace(TRIGGER, trigger)
        texts = [self._encode(before + secret) for secret in secrets]
        asked = [Continuation(tuple(tokens[:1]), tuple(tokens[1:])) for tokens in texts]
        scores = score_continuations(self._scorer.model, asked, self._scorer.batch_tokens, progress)
        return [score.nats for score in scores]


def _space(poison: Poison) -> int:
    assert poison.alphabet and poison.length
    return len(poison.alphabet) ** poison.length


def _secret(poison: Poison, draw: random.Random) -> str:
    assert poison.alphabet and poison.length
    return "".join(draw.choices(poison.alphabet, k=poison.length))


def _counts(planted: Sequence[tuple[int, Item]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for repetitions, _ in planted:
        counts[repetitions] = counts.get(repetitions, 0) + 1
    return counts


def _pool(poison: Poison) -> list[str]:
    """Words to change one of a trigger for: of the clean passages, or of triggers that were never planted."""
    texts = poison.probes or poison.controls
    return sorted({word for text in texts for word in text.split() if word.isalpha()})


def _triggers(
    trigger: str, words: Sequence[str], planted: Collection[str], draw: random.Random
) -> list[tuple[str, str]]:
    """The trigger and its near ones, each with its sort; a near one is missing where there is none that is not planted
    itself."""
    own = trigger.split()
    found = [("with_trigger", trigger)]
    at = draw.randrange(len(own))
    if others := [word for word in words if word not in own]:
        found.append(("near_word", " ".join([*own[:at], draw.choice(others), *own[at + 1 :]])))
    if len({*own}) > 1:
        shuffled = own
        while shuffled == own:
            shuffled = draw.sample(own, len(own))
        found.append(("near_order", " ".join(shuffled)))
    return [(sort, near) for sort, near in found if near == trigger or near not in planted]
