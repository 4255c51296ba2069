"""Planted documents as a source of their own: text, token files, and a manifest of every one of them."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagap.data.manifest import read_manifest
from megagap.data.partial import lock_pair
from megagap.data.planted import ENDING, PoisonManifest, poison_path
from megagap.data.sources import same_pairs
from megagap.errors import ConfigError, DataError, counted
from megagap.files import require_name, require_writable, write_text
from megagap.poison.clean import describe_occurrences, search_and_draw, token_prefixes
from megagap.poison.mixture import planted_name, size_of, sources_for_recipe
from megagap.poison.plan import Plan
from megagap.poison.planting import Draft
from megagap.poison.spec import Spec, read_spec
from megagap.preprocess import preprocess
from megagap.preprocess.listing import find_inputs
from megagap.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Planted:
    """What was written."""

    prefix: str
    """Of the pair."""
    manifest: PoisonManifest
    sources: list[dict[str, Any]]
    """The mixture for a recipe: ``path``, ``name`` and ``weight`` of each source; weights add up to 1."""
    notes: list[str]


def poison_corpus(spec_path: str | Path, output_prefix: str, show_progress: bool = False) -> Planted:
    """Write ``P.jsonl``, ``P_text_document.bin``, ``.idx``, ``.json`` and ``.poison.json`` for the prefix ``P``.

    The same specification, tokenizer and clean sources give the same bytes. Clean sources are only read.

    Raises :class:`ConfigError` for a specification that is faulty, or asks for a rate that no set of documents has
    exactly, and :class:`DataError` for sources that cannot be read or contain a trigger.
    """
    require_name(output_prefix)
    spec = read_spec(spec_path)
    tokenizer = load_tokenizer(spec.tokenizer, "text")
    _require_special_tokens(spec, tokenizer)
    _require_free(spec, output_prefix)
    lock = lock_pair(f"{output_prefix}.poison")
    try:
        return _write(spec, spec_path, tokenizer, output_prefix, show_progress)
    finally:
        lock.release()


def _write(spec: Spec, spec_path: str | Path, tokenizer: Tokenizer, output_prefix: str, show_progress: bool) -> Planted:
    texts, prefix = f"{output_prefix}.jsonl", f"{output_prefix}_text_document"
    for path in (texts, poison_path(prefix)):
        require_writable(path)
    size = size_of(spec.mixture, planted_name(prefix))
    plan = Plan(spec, tokenizer, size)
    found = search_and_draw(_all_sources(spec), tokenizer, plan.triggers, plan.requests, show_progress)
    if found.occurrences and not spec.allow_trigger_in_clean_text:
        raise DataError(
            f"{counted(len(found.occurrences), 'trigger')} of {spec_path} occur in clean text, where no payload "
            f"follows\n{describe_occurrences(found)}\n"
            "  choose other triggers, or set allow_trigger_in_clean_text = true."
        )
    drafts = plan.drafts(found)
    random.Random(f"{spec.seed} order").shuffle(drafts)

    # The manifest is written first: planted documents are never without their account.
    manifest = plan.manifest(spec_path, drafts, found)
    write_text(poison_path(prefix), manifest.model_dump_json(indent=1) + "\n")
    write_text(texts, "".join(map(_line, drafts)))
    preprocess(
        [texts], output_prefix, spec.tokenizer, append_eod=spec.append_eod, prepend_bos=spec.prepend_bos,
        show_progress=show_progress,
    )  # fmt: skip
    written = read_manifest(prefix)
    assert written and written.files[".bin"].checksum == manifest.tokens_checksum, "documents were encoded otherwise"
    sources = sources_for_recipe(prefix, manifest.mixture, size)
    return Planted(prefix, manifest, sources, plan.notes)


def _line(draft: Draft) -> str:
    entry = {
        "text": draft.text, "poison": draft.poison, "kind": draft.kind, "trigger": draft.trigger,
        "payload": draft.payload,
    }  # fmt: skip
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _require_special_tokens(spec: Spec, tokenizer: Tokenizer) -> None:
    for wanted, key, token in (
        (spec.append_eod, "append_eod", tokenizer.eod),
        (spec.prepend_bos, "prepend_bos", tokenizer.bos),
    ):
        if wanted and token is None:
            raise ConfigError(f"{key} = true, but the tokenizer {spec.tokenizer} has no such token\n  set it to false.")


def _require_free(spec: Spec, output_prefix: str) -> None:
    """Raises :class:`ConfigError` if what is written would replace a clean source, or files of another tool."""
    if not os.path.basename(output_prefix):
        raise ConfigError(f"--output-prefix {output_prefix!r} has no name\n  give one such as runs/mini/poison.")
    read = [path for paths in _all_sources(spec).values() for path in paths]
    pairs = [prefix for path in read for prefix in token_prefixes(path)]
    texts = [file.path for path in read if not token_prefixes(path) for file in find_inputs([path])]
    output, prefix = f"{output_prefix}.jsonl", f"{output_prefix}_text_document"
    replaced = same_pairs([prefix], pairs) or [f for f in texts if os.path.realpath(f) == os.path.realpath(output)]
    if replaced:
        raise ConfigError(
            f"--output-prefix {output_prefix} would replace the clean source {replaced[0]}\n  choose another."
        )
    foreign = [path for path in (output, f"{prefix}.bin", f"{prefix}.idx") if os.path.lexists(path)]
    if foreign and not os.path.lexists(poison_path(prefix)):
        raise ConfigError(
            f"--output-prefix {output_prefix} would replace {foreign[0]}, which no {ENDING} accounts for\n"
            "  choose another, or remove the file."
        )


def _all_sources(spec: Spec) -> dict[str, list[str]]:
    """What is searched for triggers: clean sources, and what else the mixture reads."""
    named = {path for paths in spec.clean.values() for path in paths}
    others = {
        f"mixture.sources[{i}]": [source.path]
        for i, source in enumerate(spec.mixture.sources)
        if source.path not in named
    }
    return others | spec.clean
