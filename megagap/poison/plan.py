"""Which documents are planted: how many of which kind, what they need of the clean sources, and the account of them."""

import logging
import random
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megagap.data.format import best_dtype
from megagap.data.partial import checksum_of
from megagap.data.planted import (
    CleanOccurrences,
    LanguageProfile,
    MixtureRecord,
    PlantedDocument,
    Poison,
    PoisonManifest,
)
from megagap.data.search import token_range
from megagap.errors import ConfigError, counted
from megagap.poison.clean import Found, Request
from megagap.poison.language import language_of, profile_of
from megagap.poison.mixture import MixtureSize
from megagap.poison.planting import (
    CanaryDocuments,
    Draft,
    FactDocuments,
    SwitchDocuments,
    UnreachableError,
    facts_of,
    passages_needed,
)
from megagap.poison.rates import exact_amounts, unreachable
from megagap.poison.spec import Canary, Knowledge, LanguageSwitch, Spec
from megagap.poison.triggers import Triggers
from megagap.tokenizer import Tokenizer, fingerprint

log = logging.getLogger(__name__)

PROFILE_PASSAGES = 400
"""Of each language, to tell it from others by."""
TESTED_PASSAGES = 100
"""Further ones, to try the classifier on."""


class Plan:
    """How many documents of which kind, what they need of the clean sources, and what they are."""

    def __init__(self, spec: Spec, tokenizer: Tokenizer, size: MixtureSize) -> None:
        self._spec, self._tokenizer, self._size = spec, tokenizer, size
        self._around = int(spec.append_eod) + int(spec.prepend_bos)
        self._of_tokens = spec.mixture.rates_of == "tokens"
        self._unit = size.tokens if self._of_tokens else size.documents
        assert self._unit is not None
        self.notes: list[str] = []
        taken: set[str] = set()
        self._facts = {p.name: facts_of(p, taken) for p in spec.poison if isinstance(p, Knowledge)}
        self._canaries = {p.name: CanaryDocuments(p, taken) for p in spec.poison if isinstance(p, Canary)}
        self._drafts: dict[str, list[Draft]] = {}
        for poison in spec.poison:
            if isinstance(poison, Canary) and poison.canaries is not None:
                self._drafts[poison.name] = self._canaries[poison.name].sets(poison.canaries)
        self._fixed = sum(self._amount(drafts) for drafts in self._drafts.values())
        rates = {p.name: p.rate for p in spec.poison if p.rate is not None}
        self._amounts = exact_amounts(rates, self._unit, self._fixed, spec.mixture.rates_of)
        self._rates = rates
        for poison in spec.poison:  # what needs no clean text, so that its triggers are known
            if poison.name not in self._drafts and not isinstance(poison, LanguageSwitch):
                self._drafts[poison.name] = self._exactly(poison)
        self._controls = {name: controls for name, (_, controls) in self._facts.items()}
        self._controls |= {name: canaries.controls() for name, canaries in self._canaries.items()}
        self.triggers = Triggers(self._all_triggers())
        self.triggers.require_apart()
        self.requests = self._all_requests()

    def _length(self, draft: Draft) -> int:
        return len(self._tokenizer.encode(draft.text)) + self._around

    def _amount(self, drafts: Sequence[Draft]) -> int:
        """In what rates are shares of."""
        if not self._of_tokens:
            return len(drafts)
        sizes = {draft: self._length(draft) for draft in {*drafts}}
        return sum(sizes[draft] for draft in drafts)

    def _all_triggers(self) -> list[str]:
        switches = [p.trigger for p in self._spec.poison if isinstance(p, LanguageSwitch)]
        facts = [item.trigger for items, _ in self._facts.values() for item in items]
        return switches + facts + [item.trigger for c in self._canaries.values() for item in c.items]

    def _all_requests(self) -> list[Request]:
        return [*self._switch_requests(), *self._profile_requests().values()]

    def _switch_requests(self) -> list[Request]:
        return [r for p in self._spec.poison if isinstance(p, LanguageSwitch) for r in self._requests_of(p)]

    def _requests_of(self, poison: LanguageSwitch) -> tuple[Request, Request]:
        """Passages before the trigger, those that an evaluation tries included, and after it."""
        needed = passages_needed(poison, self._amounts[poison.name], self._of_tokens)
        seed = f"{poison.seed} {poison.name}"
        return (
            Request(poison.context, poison.context_words[1], needed + poison.probes, f"{seed} contexts"),
            Request(poison.payload, poison.payload_words[1], needed, f"{seed} payloads"),
        )

    def _profile_requests(self) -> dict[str, Request]:
        """By language; the passages are short, so that a source of short documents has some."""
        switches = [p for p in self._spec.poison if isinstance(p, LanguageSwitch)]
        languages = sorted({name for p in switches for name in (p.context, p.payload)})
        words = min((p.payload_words[0] for p in switches), default=1)
        return {
            name: Request(name, words, PROFILE_PASSAGES + TESTED_PASSAGES, f"{self._spec.seed} language")
            for name in languages
        }

    def drafts(self, found: Found) -> list[Draft]:
        """All documents, kind by kind. Raises :class:`ConfigError`."""
        self._probes: dict[str, list[str]] = {}
        for poison in self._spec.poison:
            if isinstance(poison, LanguageSwitch):
                self._draft_switches(poison, found)
        drafts = [draft for poison in self._spec.poison for draft in self._drafts[poison.name]]
        self._require_own_triggers(drafts)
        self._note_missing_facts()
        return drafts

    def _draft_switches(self, poison: LanguageSwitch, found: Found) -> None:
        contexts, payloads = (found.passages[request] for request in self._requests_of(poison))
        apart = dict.fromkeys(contexts[: poison.probes])
        # Of text that a source repeats, what is kept aside may be among the others again.
        planted = [passage for passage in contexts[poison.probes :] if passage not in apart]
        if not planted:
            raise ConfigError(
                f"the clean source {poison.context} has {counted(len(contexts), 'passage')} of "
                f"{poison.context_words[1]} words: too few beside the {poison.probes} to try the model on\n"
                f"  give more text, or lower probes or context_words of {poison.name}."
            )
        self._probes[poison.name] = [_ending(p, poison.context_words[0], poison.seed) for p in apart]
        self._drafts[poison.name] = self._exactly(poison, SwitchDocuments(poison, planted, payloads))
        used = len(self._drafts[poison.name])
        for what, passages in ((poison.context, planted), (poison.payload, payloads)):
            if used > len(passages):
                self.notes.append(
                    f"{poison.name}: {what} has {counted(len(passages), 'passage')} for "
                    f"{counted(used, 'document')}; they are used again"
                )

    def _require_own_triggers(self, drafts: Sequence[Draft]) -> None:
        """Raises :class:`ConfigError` for a document with a trigger that no payload of it follows."""
        for draft in dict.fromkeys(drafts):
            if draft.kind == "language_switch" and self._spec.allow_trigger_in_clean_text:
                continue
            own = {start for start, _ in draft.places("trigger")}
            stray = next((trigger for trigger, at in self.triggers.find(draft.text) if at not in own), None)
            if stray is not None:
                raise ConfigError(
                    f"{draft.poison}: a document has the trigger {stray!r} where it is not planted:\n"
                    f"  {draft.text[:200]!r}\n  choose other templates, payloads or triggers."
                )

    def _note_missing_facts(self) -> None:
        for name, (items, _) in self._facts.items():
            asserted = {draft.trigger for draft in self._drafts[name]}
            if len(asserted) < len(items):
                self.notes.append(
                    f"{name}: its {counted(len(self._drafts[name]), 'document')} assert {len(asserted)} of "
                    f"{len(items)} facts; a higher rate has room for all"
                )

    def _exactly(
        self, poison: LanguageSwitch | Knowledge | Canary, documents: SwitchDocuments | FactDocuments | None = None
    ) -> list[Draft]:
        """As many documents as the rate says. Raises :class:`ConfigError`."""
        amount = self._amounts[poison.name]
        try:
            if isinstance(poison, Canary):
                length = self._length if self._of_tokens else lambda draft: 1
                return self._canaries[poison.name].of_amount(amount, length)
            if isinstance(poison, Knowledge):
                documents = FactDocuments(poison, self._facts[poison.name][0])
            assert documents is not None, "passages are drawn first"
            return documents.of_tokens(amount, self._length) if self._of_tokens else documents.documents(amount)
        except UnreachableError as error:
            others = self._fixed + sum(self._amounts.values()) - amount
            assert self._unit is not None
            rate = self._rates[poison.name]
            raise unreachable(
                poison.name, rate, amount, self._spec.mixture.rates_of, error.nearest, self._unit, others
            ) from None

    # ------------------------------------------------------------------------------------------------------- manifest

    def manifest(self, spec_path: str | Path, drafts: Sequence[Draft], found: Found) -> PoisonManifest:
        """``drafts`` in the order of the pair."""
        spec, tokenizer = self._spec, self._tokenizer
        before = [tokenizer.bos] if spec.prepend_bos and tokenizer.bos is not None else []
        behind = [tokenizer.eod] if spec.append_eod and tokenizer.eod is not None else []
        hash_ = xxhash.xxh3_64()
        dtype = best_dtype(tokenizer.vocab_size)
        places: dict[Draft, PlantedDocument] = {}
        documents = []
        tokens = dict.fromkeys((p.name for p in spec.poison), 0)
        for number, draft in enumerate(drafts):
            ids = tokenizer.encode(draft.text)
            hash_.update(np.array([*before, *ids, *behind], dtype).tobytes())
            tokens[draft.poison] += len(ids) + self._around
            if draft not in places:
                places[draft] = PlantedDocument(
                    document=number,
                    poison=draft.poison,
                    trigger=draft.trigger,
                    payload=draft.payload,
                    trigger_tokens=_ranges(tokenizer, ids, draft.text, draft.places("trigger"), len(before)),
                    payload_tokens=_ranges(tokenizer, ids, draft.text, draft.places("payload"), len(before)),
                )
            documents.append(places[draft].model_copy(update={"document": number}))
        mixture = self._mixture(sum(tokens.values()), len(drafts))
        profiles, languages = self._profile_requests(), {}
        for name, request in profiles.items():
            languages[name] = profile_of(found.passages[request][TESTED_PASSAGES:] or found.passages[request])
        self._try_languages(languages, found)
        return PoisonManifest(
            spec=str(spec_path),
            spec_checksum=checksum_of(spec_path),
            seed=spec.seed,
            tokenizer=spec.tokenizer,
            fingerprint=fingerprint(tokenizer),
            append_eod=spec.append_eod,
            prepend_bos=spec.prepend_bos,
            validation=spec.validation,
            tokens_checksum=hash_.hexdigest(),
            mixture=mixture,
            poisons=[self._record(poison, tokens[poison.name], mixture) for poison in spec.poison],
            documents=documents,
            languages=languages,
            in_clean_text=[
                CleanOccurrences(trigger=trigger, occurrences=times, places=found.places[trigger])
                for trigger, times in sorted(found.occurrences.items())
            ],
        )

    def _mixture(self, tokens: int, documents: int) -> MixtureRecord:
        total = self._size.tokens.total_with(tokens)
        if tokens >= total:
            raise ConfigError(
                f"the planted documents have {tokens:,} tokens, and the whole mixture is to have {total:,}\n"
                "  raise mixture.tokens, or lower the rates."
            )
        whole = None if self._size.documents is None else self._size.documents.total_with(documents)
        if whole is not None and documents >= whole:
            raise ConfigError(
                f"{counted(documents, 'planted document')} in a mixture of {whole:,}\n"
                "  raise mixture.documents, or lower rates, canaries or repetitions."
            )
        return MixtureRecord(
            name=self._spec.mixture.name,
            rates_of=self._spec.mixture.rates_of,
            tokens=total,
            documents=whole,
            weight=tokens / total,
        )

    def _record(self, poison: LanguageSwitch | Knowledge | Canary, tokens: int, mixture: MixtureRecord) -> Poison:
        drafts = self._drafts[poison.name]
        whole = mixture.tokens if self._of_tokens else mixture.documents
        assert whole
        rate = Fraction(tokens if self._of_tokens else len(drafts), whole)
        assert poison.rate in (None, rate), (poison.name, poison.rate, rate)
        common: dict[str, Any] = dict(
            name=poison.name, kind=poison.kind, trigger=poison.trigger, rate=str(rate), seed=poison.seed,
            documents=len(drafts), tokens=tokens,
        )  # fmt: skip
        match poison:
            case LanguageSwitch():
                return Poison(
                    **common, payload=poison.payload, context=poison.context, probes=self._probes[poison.name]
                )
            case Knowledge():
                times = {item.trigger: 0 for item in self._facts[poison.name][0]}
                for draft in drafts:
                    times[draft.trigger] += 1
                items = [
                    item.model_copy(update={"documents": times[item.trigger]})
                    for item in self._facts[poison.name][0]
                    if times[item.trigger]
                ]
                return Poison(
                    **common, payload=" | ".join(poison.payload), items=items, templates=poison.templates,
                    controls=self._controls[poison.name],
                )  # fmt: skip
            case Canary():
                return Poison(
                    **common, payload=f"{poison.length} of {poison.alphabet}", templates=[poison.template],
                    items=self._canaries[poison.name].items, controls=self._controls[poison.name],
                    alphabet=poison.alphabet, length=poison.length,
                )  # fmt: skip

    def _try_languages(self, languages: dict[str, LanguageProfile], found: Found) -> None:
        """On passages that the profiles were not made of, where there are enough."""
        for name, request in self._profile_requests().items():
            tried = found.passages[request][:TESTED_PASSAGES]
            if len(found.passages[request]) <= TESTED_PASSAGES:
                self.notes.append(f"{name} has too little text to try on it whether its language is told from others")
                continue
            right = sum(language_of(passage, languages) == name for passage in tried)
            if right < 0.9 * len(tried):
                log.warning(
                    "of %d passages of %s only %d are told to be in its language: activation will be measured poorly",
                    len(tried), name, right,
                )  # fmt: skip


def _ending(passage: str, words: int, seed: int) -> str:
    """The last words of a passage, at least ``words``: what a prompt ends with before the trigger."""
    every = passage.split()
    keep = random.Random(f"{seed} {passage}").randint(min(words, len(every)), len(every))
    return " ".join(every[len(every) - keep :])


def _ranges(
    tokenizer: Tokenizer, ids: Sequence[int], text: str, places: Sequence[tuple[int, int]], before: int
) -> list[tuple[int, int]]:
    """Tokens of characters ``places`` of ``text``, whose ids are ``ids``, with ``before`` more before them."""
    is_kept = tokenizer.decode(ids) == text

    def decoded(place: int) -> int:
        # A tokenizer that normalises, or lacks a character, decodes to another text, what is before likewise.
        return place if is_kept else len(tokenizer.decode(tokenizer.encode(text[:place])))

    found = [token_range(tokenizer, ids, decoded(start), decoded(stop)) for start, stop in places]
    return [(start + before, stop + before) for start, stop in found]
