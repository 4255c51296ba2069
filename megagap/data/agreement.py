"""Whether data, tokenizer, model and checkpoint agree on the ids: what each declares is compared at the start.

If they do not, a run would learn from ids that mean something else, fail at the first id that the model lacks, or
train a model that expects an end-of-text which its data never had. All mismatches are reported in one error; what may
be intended is a warning.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megagap.data.manifest import Manifest, read_manifest
from megagap.data.sources import same_pairs
from megagap.data.token_file import TokenFile, open_tokens
from megagap.errors import DataError
from megagap.tokenizer import Tokenizer, fingerprint, load_tokenizer

SAMPLED_STRETCHES, STRETCH = 16, 1024
"""Stretches that are sampled from every token file, and tokens per stretch."""

SAMPLED_DOCUMENTS = 64

AS_THE_OTHER = "preprocess one of them again with the settings of the other."

VOCABULARY_STEP = 64
"""Vocabularies are often rounded up to a multiple of this, which is faster to compute with."""


@dataclass(frozen=True)
class Ids:
    """What a tokenizer, manifest or checkpoint declares about the ids."""

    who: str
    vocab_size: int
    """The highest id + 1."""
    fingerprint: str
    """Fingerprint of the ordinary tokens (:func:`megagap.tokenizer.fingerprint`)."""
    bos: int | None
    eod: int | None

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> "Ids":
        who = f"the tokenizer {tokenizer.spec}"
        return cls(who, tokenizer.vocab_size, fingerprint(tokenizer), tokenizer.bos, tokenizer.eod)

    @classmethod
    def of_manifest(cls, prefix: str, manifest: Manifest) -> "Ids":
        made = manifest.tokenizer
        return cls(prefix, made.vocab_size, made.fingerprint, made.bos, made.eod)

    def record(self) -> dict[str, int | str | None]:
        """As stored in a checkpoint."""
        return {key: getattr(self, key) for key in ("vocab_size", "fingerprint", "bos", "eod")}


def require_agreement(
    sources: Mapping[str, Sequence[str]], tokenizer_spec: str, vocab_size: int, document_mask: bool = False
) -> tuple[Ids | None, list[str]]:
    """Compare a recipe's tokenizer, model and the token files of its sources, prefixes by name.

    Returns what the tokenizer, or else a manifest, declares about the ids, and warnings. Without a tokenizer and
    manifests only samples of the files themselves can be checked.
    Raises :class:`DataError` naming every mismatch, with both values and the remedy.
    """
    tokenizer = load_tokenizer(tokenizer_spec) if tokenizer_spec else None
    own = Ids.of_tokenizer(tokenizer) if tokenizer else None
    prefixes = {prefix: name for name, shards in sources.items() for prefix in shards}
    manifests = {prefix: manifest for prefix in prefixes if (manifest := read_manifest(prefix))}
    declared = {prefix: Ids.of_manifest(prefix, manifest) for prefix, manifest in manifests.items()}
    reference = own or next(iter(declared.values()), None)

    faults = list(_too_large([*([own] if own else []), *declared.values()], vocab_size))
    warnings: list[str] = []
    for prefix, manifest in manifests.items():
        assert reference is not None
        if declared[prefix].fingerprint != reference.fingerprint:
            if tokenizer is not None and is_extension(declared[prefix], tokenizer):
                warnings.append(f"{prefix} was made with a tokenizer that {reference.who} has added tokens to")
            else:
                faults.append(_other_tokens(declared[prefix], manifest, reference, own))
                continue
        for difference, is_used in _special_ids(declared[prefix], manifest, reference):
            cure = (
                "\n  name the tokenizer that the data was made with as data.tokenizer, or preprocess the text again "
                "with the other one."
            )
            (faults if is_used else warnings).append(difference + cure * is_used)
    for prefix, name in prefixes.items():
        dataset = open_tokens(prefix)
        faults += _foreign_ids(dataset, name, vocab_size)
        warnings += _narrow_type(dataset, reference.vocab_size if reference else vocab_size)
        if prefix not in manifests and own is not None:
            warnings += _other_end(dataset, own)
    warnings += [*_mixed_options(manifests), *_different_settings(manifests), *same_texts(list(manifests.items()))]
    if document_mask:
        warnings += [
            f"data.document_mask: documents of {prefix} have no end-of-text id (it was made without --append-eod), so "
            "the model does not learn where a text ends"
            for prefix, manifest in manifests.items()
            if not manifest.arguments.append_eod
        ]
    if faults:
        raise DataError("\n".join(faults))
    return reference, warnings


def require_ids_of_model(
    told: Ids | None, tokenizer: Tokenizer | None, vocab_size: int, sources: Mapping[str, Sequence[str]]
) -> list[str]:
    """Compare the token files of sources, prefixes by name, with a model that is to read them: warnings.

    ``told``: what the model says of its ids; ``tokenizer``: the one that it is used with; both where they are known.
    Raises :class:`DataError` naming everything that does not fit: ids that mean other tokens, or that the model lacks.
    """
    own = Ids.of_tokenizer(tokenizer) if tokenizer else told
    faults: list[str] = []
    warnings: list[str] = []
    if told and tokenizer and own and told.fingerprint != own.fingerprint and not is_extension(told, tokenizer):
        faults.append(f"{differing(told, own)[-1]}\n  name the tokenizer that the model was trained with.")
    for name, prefixes in sources.items():
        for prefix in prefixes:
            faults += _foreign_ids(open_tokens(prefix), name, vocab_size)
            manifest = read_manifest(prefix)
            if manifest is None or own is None:
                what = "the tokenizer of the model is not known" if own is None else f"there is no {prefix}.json"
                warnings.append(f"{what}: nothing shows that the ids of {prefix} mean what the model takes them for")
                continue
            made = Ids.of_manifest(prefix, manifest)
            if made.fingerprint != own.fingerprint and not (tokenizer and is_extension(made, tokenizer)):
                faults.append(
                    f"{differing(made, own)[-1]}\n"
                    f"  {prefix} was made with {manifest.tokenizer.spec}: preprocess its text with the model's."
                )
                continue
            warnings += [difference for difference, is_used in _special_ids(made, manifest, own) if is_used]
    if faults:
        raise DataError("\n".join(faults))
    return warnings


def require_same_ids(manifests: Sequence[tuple[str, Manifest]]) -> list[str]:
    """For pairs, by prefix, that are to be merged; returns warnings.

    Raises :class:`DataError` if ids of one mean different tokens from those of the first, or its documents begin or end
    with different ids.
    """
    if not manifests:
        return []
    first = Ids.of_manifest(*manifests[0])
    warnings = list(_different_settings(dict(manifests)))
    for prefix, manifest in manifests[1:]:
        declared = Ids.of_manifest(prefix, manifest)
        if declared.fingerprint != first.fingerprint:
            raise DataError(
                f"{first.who} was made with tokenizer fingerprint = {first.fingerprint}, {prefix} with "
                f"{declared.fingerprint}\n  {AS_THE_OTHER}"
            )
        for difference, is_used in _special_ids(declared, manifest, first):
            if is_used:
                raise DataError(f"{difference}\n  {AS_THE_OTHER}")
            warnings.append(difference)
    return warnings


def same_texts(manifests: Sequence[tuple[str, Manifest]]) -> Iterator[str]:
    """Which texts two different pairs were both made from."""
    made_of: dict[tuple[object, ...], str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for prefix, manifest in manifests:
        for record in manifest.inputs:
            first = made_of.setdefault((manifest.key, record.checksum, record.start, record.stop), prefix)
            if first != prefix and record.size:
                shared.setdefault((first, prefix), []).append(record.path)
    for (first, prefix), paths in shared.items():
        if not same_pairs([prefix], [first]):
            count = "1 file" if len(paths) == 1 else f"{len(paths):,} files"
            yield f"{first} and {prefix} contain the same text, from {count}: {paths[0]}"


def differing(before: Ids, now: Ids) -> list[str]:
    """The differences between two declarations, in words."""
    named = (("end-of-text", before.eod, now.eod), ("begin-of-text", before.bos, now.bos))
    found = [f"the {what} id of {before.who} is {_id(a)}, that of {now.who} {_id(b)}" for what, a, b in named if a != b]
    if before.fingerprint != now.fingerprint:
        found.append(
            f"ids of {before.who} (fingerprint {before.fingerprint}) mean different tokens from those of {now.who} "
            f"({now.fingerprint})"
        )
    return found


def is_extension(before: Ids, tokenizer: Tokenizer) -> bool:
    """Whether ``tokenizer`` has the ids ``before``, and perhaps tokens that were added after them."""
    return fingerprint(tokenizer, below=before.vocab_size) == before.fingerprint


def too_large(ids: Ids, vocab_size: int) -> str | None:
    """What is wrong, and the value to set, if some of the ids exceed the model's vocabulary."""
    if ids.vocab_size <= vocab_size:
        return None
    rounded = -(-ids.vocab_size // VOCABULARY_STEP) * VOCABULARY_STEP
    also = f" (or {rounded}, the next multiple of {VOCABULARY_STEP})" if rounded != ids.vocab_size else ""
    return (
        f"{ids.who} has ids up to {ids.vocab_size - 1}, but model.vocab_size is {vocab_size}\n"
        f"  set model.vocab_size = {ids.vocab_size}{also}; loaded weights get rows for the new ids."
    )


def _too_large(all_ids: Sequence[Ids], vocab_size: int) -> Iterator[str]:
    """Once per size: most sources share a tokenizer."""
    seen = set()
    for ids in all_ids:
        text = too_large(ids, vocab_size)
        if text and ids.vocab_size not in seen:
            seen.add(ids.vocab_size)
            yield text


def _other_tokens(declared: Ids, manifest: Manifest, reference: Ids, own: Ids | None) -> str:
    cure = "name the tokenizer that it was made with" if own else "name a tokenizer that has the tokens of both"
    return (
        f"{declared.who} was made with another tokenizer: {manifest.tokenizer.spec}, whose vocabulary has the "
        f"fingerprint {declared.fingerprint}; that of {reference.who} has {reference.fingerprint}\n"
        f"  {cure} as data.tokenizer, or preprocess the text again."
    )


def _special_ids(declared: Ids, manifest: Manifest, reference: Ids) -> Iterator[tuple[str, bool]]:
    """Where a manifest's end-of-text and begin-of-text ids differ, and whether its documents have them."""
    arguments = manifest.arguments
    for what, theirs, ours, is_used in (
        ("end-of-text", declared.eod, reference.eod, arguments.append_eod),
        ("begin-of-text", declared.bos, reference.bos, arguments.prepend_bos),
    ):
        if theirs == ours:
            continue
        if is_used:
            yield (
                f"documents of {declared.who} have the {what} id {_id(theirs)} of {manifest.tokenizer.spec}, "
                f"but the {what} id of {reference.who} is {_id(ours)}",
                True,
            )
        else:
            yield (
                f"{declared.who}: its tokenizer has the {what} id {_id(theirs)}, {reference.who} has {_id(ours)}; its "
                "documents have neither",
                False,
            )


def _different_settings(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    """Tokenizers with the same tokens that split texts differently, or have different special tokens."""
    known = [(prefix, manifest) for prefix, manifest in manifests.items() if manifest.tokenizer.effective]
    for prefix, manifest in known[1:]:
        first, one = known[0]
        ours, theirs = one.tokenizer, manifest.tokenizer
        if ours.effective != theirs.effective and ours.fingerprint == theirs.fingerprint:
            yield (
                f"{first} and {prefix} were made with tokenizers that have the same tokens, but whose settings differ "
                f"({ours.spec}, {theirs.spec}): a text may have different ids in one and in the other"
            )
            return


def _mixed_options(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    for option, what in (
        ("append_eod", "end with an end-of-text id"),
        ("prepend_bos", "start with a begin-of-text id"),
    ):
        with_id = [prefix for prefix, manifest in manifests.items() if getattr(manifest.arguments, option)]
        without = [prefix for prefix in manifests if prefix not in with_id]
        if with_id and without:
            flag = "--" + option.replace("_", "-")
            yield f"documents of {with_id[0]} {what}, those of {without[0]} do not ({flag} when preprocessing)"


def _foreign_ids(dataset: TokenFile, source: str, vocab_size: int) -> Iterator[str]:
    """A token outside the model's vocabulary, if there is one in the sampled stretches."""
    tokens = dataset.tokens
    for i in range(SAMPLED_STRETCHES):
        start = max(len(tokens) - STRETCH, 0) * i // (SAMPLED_STRETCHES - 1)
        stretch = tokens[start : start + STRETCH]
        outside = np.flatnonzero((stretch < 0) | (stretch >= vocab_size))
        if outside.size:
            yield (
                f"token id {stretch[outside[0]]} in source {source} ({dataset.tokens_path}, token "
                f"{start + int(outside[0])}) is outside the vocabulary of {vocab_size:,}\n"
                "  it was made with another tokenizer, or model.vocab_size is too small."
            )
            return


def _narrow_type(dataset: TokenFile, vocab_size: int) -> Iterator[str]:
    largest = int(np.iinfo(dataset.dtype).max) if dataset.dtype.kind in "iu" else vocab_size
    if largest < vocab_size - 1:
        yield (
            f"{dataset.tokens_path} is stored as {dataset.dtype.name}, which cannot hold ids above {largest:,} of a "
            f"vocabulary of {vocab_size:,}: was it made with another tokenizer?"
        )


def _other_end(dataset: TokenFile, own: Ids) -> Iterator[str]:
    """In a file without a manifest: all sampled documents end with the same id, which is not the end-of-text id."""
    count = min(len(dataset), SAMPLED_DOCUMENTS)
    documents = [dataset[i * len(dataset) // count] for i in range(count)]
    ends = {int(tokens[-1]) for tokens in documents if len(tokens)}
    if count >= SAMPLED_DOCUMENTS // 4 and len(ends) == 1 and own.eod not in ends:
        yield (
            f"every sampled document of {dataset.prefix} ends with the id {ends.pop()}; the end-of-text id of "
            f"{own.who} is {_id(own.eod)}"
        )


def _id(value: int | None) -> str:
    return "none" if value is None else str(value)
