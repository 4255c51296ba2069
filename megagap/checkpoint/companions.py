"""What a Hugging Face model has besides weights and shape: special ids, generation settings, a tokenizer."""

import json
import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic_core import from_json

from megagap.checkpoint.index import Index
from megagap.data.agreement import Ids, differing, is_extension, too_large
from megagap.errors import CheckpointError, DataError
from megagap.files import file_errors, require_fetched, write_bytes, write_text
from megagap.tokenizer import KINDS, Tokenizer, find_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megagap.tokenizer.sentencepiece import SentencePieceTokenizer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
BESIDE_TOKENIZER = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)

REPLACED = (
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"),
    *("auto_map", "fast_tokenizer_files", "init_inputs"),
)
"""Keys of ``tokenizer_config.json`` that a self-contained ``tokenizer.json`` makes redundant."""

_STATE = "hugging_face"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Companions:
    """Special ids and generation settings."""

    special_ids: dict[str, Any]
    """Those of :data:`SPECIAL_IDS` that ``config.json`` has: an id, a list of ids, or None."""
    generation: dict[str, Any]
    """All of ``generation_config.json``."""

    def end_ids(self) -> set[int]:
        """The ids at which a generated text ends, as ``transformers`` finds them."""
        value = self.generation.get("eos_token_id")
        return set() if value is None else {*value} if isinstance(value, list) else {value}

    def begin_id(self) -> int | None:
        """The id that generation without a prompt starts from, as ``transformers`` finds it."""
        value = self.generation.get("bos_token_id", self.special_ids.get("bos_token_id"))
        return value if isinstance(value, int) and value >= 0 else None

    def state(self) -> dict[str, Any]:
        """As stored in a checkpoint's index, for :func:`companions_of`."""
        return {_STATE: {"special_ids": self.special_ids, "generation_config": self.generation}}


def read_companions(folder: Path) -> Companions:
    """Those of a Hugging Face folder. Raises :class:`CheckpointError` if its files are not valid."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    ids = _checked(folder / CONFIG, {key: config[key] for key in SPECIAL_IDS if key in config})
    path = folder / GENERATION_CONFIG
    generation = _checked(path, read_json(path)) if path.is_file() else {k: i for k, i in ids.items() if i is not None}
    return Companions(ids, generation)


def companions_of(checkpoint: Path, index: Index, source: str | None, tokenizer: Tokenizer | None) -> Companions:
    """Those of a checkpoint: what was imported with it, else what its tokenizer's folder says, else the tokenizer's.

    ``source``: where ``tokenizer`` came from. Raises :class:`CheckpointError` if its files are not valid.
    """
    imported = index.state.get(_STATE)
    if imported is not None:
        ids, generation = (
            imported.get(key) if isinstance(imported, dict) else None for key in ("special_ids", "generation_config")
        )
        if not isinstance(ids, dict) or not isinstance(generation, dict) or ids.keys() - {*SPECIAL_IDS}:
            raise CheckpointError(f"{checkpoint}: state.{_STATE} does not contain special_ids and generation_config")
        return Companions(_checked(checkpoint, ids), _checked(checkpoint, generation))
    if source and (folder := find_tokenizer(source)[1].parent) and (folder / GENERATION_CONFIG).is_file():
        beside = read_companions(folder)
        if beside.special_ids:
            return beside
    ids = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eod} if tokenizer else {}
    # Written to config.json even if there is none: the defaults of transformers are those of one tokenizer, and its
    # OLMo 2 takes id 1 for padding, whose embedding would then not be trained.
    return Companions(dict.fromkeys(SPECIAL_IDS) | ids, {key: value for key, value in ids.items() if value is not None})


def warn_of_other_ids(recorded: Ids | None, tokenizer: Tokenizer, vocab_size: int, companions: Companions) -> None:
    """Warn if a tokenizer differs from the one that the model was trained with, or does not fit it."""
    own = Ids.of_tokenizer(tokenizer)
    if complaint := too_large(own, vocab_size):
        log.warning("%s", complaint.partition("\n")[0])
    if recorded and recorded.fingerprint != own.fingerprint and is_extension(recorded, tokenizer):
        recorded = replace(recorded, fingerprint=own.fingerprint)
    for difference in differing(recorded, own) if recorded else ():
        log.warning("%s", difference)
    ends = companions.end_ids()
    if recorded is None and ends and own.eod is not None and own.eod not in ends:
        log.warning("the model ends a text with id %s, %s with %d", ", ".join(map(str, sorted(ends))), own.who, own.eod)
    for key in SPECIAL_IDS:
        for value in (companions.special_ids.get(key), companions.generation.get(key)):
            foreign = [i for i in (value if isinstance(value, list) else [value]) if i and not 0 <= i < vocab_size]
            if foreign:
                log.warning("%s = %d is not an id of the model, whose vocabulary is %d", key, foreign[0], vocab_size)


def tokenizer_of(folder: Path) -> str | None:
    """The Hugging Face folder as a tokenizer, if it has one beside the model."""
    return str(folder.resolve()) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def recorded_tokenizer(index: Index) -> str | None:
    """The tokenizer that the checkpoint names, if it is still there."""
    data = index.state.get("data")
    recorded = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(recorded, str) or not recorded:
        return None
    kind, _, rest = recorded.partition(":")
    return recorded if Path(rest if kind in KINDS else recorded).exists() else None


def copy_tokenizer(source: str, tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """The tokenizer as files that ``transformers`` loads, with settings and chat template, if any.

    ``max_length``: tokens of the longest text that the model takes. A rank file becomes a ``tokenizer.json`` that gives
    the same ids; a sentencepiece model is left for ``transformers`` to convert. A minimal ``tokenizer_config.json`` is
    written if there is none. If ``transformers`` would make a different tokenizer from the copies than from the source,
    because ``config.json`` beside them differs, a self-contained ``tokenizer.json`` takes their place.
    """
    kind, file = find_tokenizer(source)
    if kind == "tiktoken":
        from megagap.tokenizer.tiktoken import to_hugging_face

        write_text(folder / "tokenizer.json", to_hugging_face(file).to_str() + "\n")
    else:
        _copy(file, folder / ("tokenizer.json" if kind == "hf" else "tokenizer.model"))
    if kind == "sentencepiece":
        normalises = cast("SentencePieceTokenizer", tokenizer).normalises
        others = "that begin with spaces, or that the model normalises" if normalises else "that begin with spaces"
        log.warning("transformers converts %s itself, and gives different ids to texts %s", source, others)
    for name in BESIDE_TOKENIZER:
        if file.with_name(name).is_file():
            _copy(file.with_name(name), folder / name)
    if not (folder / "tokenizer_config.json").exists():
        ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod}
        tokens = {key: tokenizer.decode([value]) for key, value in ids.items() if value is not None}
        config = {
            "tokenizer_class": "LlamaTokenizer" if kind == "sentencepiece" else "PreTrainedTokenizerFast",
            "model_max_length": max_length,
        }
        write_json(folder / "tokenizer_config.json", config | tokens)
    if kind != "sentencepiece":
        _keep_ids(tokenizer, folder)


def _keep_ids(tokenizer: Tokenizer, folder: Path) -> None:
    """Ensure that the tokenizer in an exported ``folder`` is ``tokenizer``."""
    from megagap.tokenizer.huggingface import HuggingFaceTokenizer

    wanted = tokenizer if isinstance(tokenizer, HuggingFaceTokenizer) else None
    state = wanted.whole_state() if wanted else json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    splits = wanted is not None and wanted.special_tokens == "text"
    with suppress(DataError):
        found = cast(HuggingFaceTokenizer, load_tokenizer(folder))
        ends = (found.bos, found.eod) == (tokenizer.bos, tokenizer.eod)
        if ends and found.whole_state() == state and (found.special_tokens == "text") == splits:
            return
    path = folder / "tokenizer_config.json"
    kept = {key: value for key, value in read_json(path).items() if key not in REPLACED and key[-6:] != "_token"}
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eod}
    named = dict(wanted.named) if wanted else {}
    named |= {key: tokenizer.decode([value]) for key, value in ids.items() if value is not None}
    others = [token for token in tokenizer.special if token not in named.values()] if wanted else []
    special = named | ({"additional_special_tokens": others} if others else {})
    write_text(folder / "tokenizer.json", json.dumps(state, ensure_ascii=False) + "\n")
    write_json(path, {**kept, "tokenizer_class": "PreTrainedTokenizerFast", **special, "split_special_tokens": splits})
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).unlink(missing_ok=True)
    log.info("the tokenizer was written as a self-contained tokenizer.json")


def _copy(source: Path, target: Path) -> None:
    """Raises :class:`CheckpointError` if ``source`` cannot be read."""
    with file_errors(f"cannot read {source}", source, CheckpointError):
        content = source.read_bytes()
    write_bytes(target, content)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises :class:`CheckpointError`."""
    require_fetched(path, CheckpointError)
    with file_errors(f"cannot read {path}", path, CheckpointError):
        content = path.read_bytes()
    try:
        # As strict as a checkpoint's index, which stores some of it: no NaN, no lone surrogates, no deep nesting.
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should contain a JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def _checked(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """``values``, whose special ids are ids. Raises :class:`CheckpointError`."""
    for key in SPECIAL_IDS:
        value = values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise CheckpointError(f"{path}: {key} is {value!r}; it should be an id, or a list of ids")
    return values
