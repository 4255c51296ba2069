"""A ``tokenizer.json`` and the files beside it, as one tokenizer: the one that ``transformers`` makes from them.

``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` name special tokens and add others;
they and ``config.json`` name a class, which may split texts differently from the ``tokenizer.json``
(:mod:`megagap.tokenizer.classes`). What is not supported is refused.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megagap.errors import DataError, library_errors
from megagap.files import is_there, read_regular
from megagap.tokenizer import BEGIN_OF_TEXT, END_OF_TEXT
from megagap.tokenizer.classes import PLAIN, Pipeline, class_of, pipeline_of

CONFIG, SPECIAL_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""In the order in which they are added if the ``tokenizer.json`` lacks them."""
LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Keys of further special tokens. Transformers 5 reads the first as the second, which may also be an object."""
AS_IT_IS = f'set tokenizer_class to "{PLAIN}" in {CONFIG} for the ids that the tokenizer.json alone gives.'

Token = str | AddedToken


@dataclass(frozen=True)
class FolderTokenizer:
    """The tokenizer that the files of a folder define."""

    backend: Backend
    """Without truncation or padding."""
    bos: int | None
    eod: int | None
    special: tuple[str, ...]
    """All special tokens, as they are written."""
    named: dict[str, str]
    """Special tokens by what they are for: ``bos_token``, ``pad_token``, ``image_token`` and so on."""
    splits_special_tokens: bool
    """Whether special tokens written out in a text are text to ``transformers`` by default."""


@dataclass(frozen=True)
class _Settings:
    """What the files beside a ``tokenizer.json`` say, merged as ``transformers`` merges them."""

    file: Path
    """The ``tokenizer.json``."""
    values: dict[str, Any]
    named: dict[str, Token]
    extra: list[Token]
    added: dict[int, AddedToken]
    """Added tokens by the ids that they should have."""
    from_map: frozenset[str]
    """The keys that ``special_tokens_map.json`` gave."""
    exist: bool
    """Whether there are any such files."""

    def place_of(self, key: str) -> Path:
        """The file to name in an error."""
        return self.file.with_name(SPECIAL_MAP if key in self.from_map else CONFIG)


def load_folder(file: Path) -> FolderTokenizer:
    """Raises :class:`DataError` naming file and key for what cannot be read or is not supported."""
    content = read_regular(file)
    state = _object(content, f"{file} is not a Hugging Face tokenizer.json")
    config = _optional(file.with_name(CONFIG))
    model = _optional(file.with_name("config.json"))
    _refuse_other_code(file.with_name(CONFIG), config)
    name = class_of(config, model, is_byte_level=b'"ByteLevel"' in content)
    special_map = {} if "added_tokens_decoder" in config else _optional(file.with_name(SPECIAL_MAP))
    pipeline = None if name == PLAIN else _pipeline(file, name, config | special_map, state)
    settings = _settings(file, state, config, pipeline)
    if pipeline:
        state = _rebuilt(file, name, state, pipeline)
    _refuse_dropout(file, state)
    backend = _backend(file, state)
    _require_named(settings, backend, pipeline)
    _add_tokens(settings, backend, pipeline)
    bos, eod = (_id_of(backend, settings, key) for key in ("bos_token", "eos_token"))
    if not settings.exist and not pipeline:
        bos, eod = (_first_of(backend, usual) for usual in (BEGIN_OF_TEXT, END_OF_TEXT))
    flagged = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    named = {key: str(token) for key, token in settings.named.items()}
    special = {*flagged, *named.values(), *map(str, settings.extra)}
    return FolderTokenizer(backend, bos, eod, tuple(sorted(special)), named, _splits_special_tokens(settings))


def _object(content: bytes, fault: str) -> dict[str, Any]:
    """A JSON object. Raises :class:`DataError` that begins with ``fault``."""
    with library_errors(fault):
        value = json.loads(content.decode("utf-8"))
    if not isinstance(value, dict):
        raise DataError(f"{fault}: it should contain a JSON object, not {type(value).__name__}")
    return value


def _optional(path: Path) -> dict[str, Any]:
    """An empty object if there is no such file; a broken link is an error."""
    return _object(read_regular(path), f"{path} is not valid JSON") if is_there(path) else {}


def _refuse_other_code(path: Path, config: Mapping[str, Any]) -> None:
    """What makes ``transformers`` run code or read files that are not read here."""
    auto_map = config.get("auto_map")
    code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    versions = config.get("fast_tokenizer_files")
    others = [name for name in versions if name != "tokenizer.json"] if isinstance(versions, list) else versions
    for key, value, what in (
        ("auto_map", code, "the tokenizer needs code of its own, which is not run here"),
        ("fast_tokenizer_files", others, "transformers reads a different file from tokenizer.json"),
        ("init_inputs", config.get("init_inputs"), "only transformers knows what they mean to its class"),
        ("fix_mistral_regex", config.get("fix_mistral_regex"), "transformers replaces the words of tokenizer.json"),
    ):
        if value:
            raise DataError(
                f"{path}: {key} = {value!r}: {what}\n"
                f"  remove {key} for the ids that the tokenizer.json alone gives, or save the tokenizer again with "
                "save_pretrained of transformers."
            )


def _pipeline(file: Path, name: str, config: Mapping[str, Any], state: Mapping[str, Any]) -> Pipeline:
    path = file.with_name(CONFIG)
    try:
        pipeline = pipeline_of(name, config, _charsmap(state))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if pipeline is None:
        raise DataError(
            f"{path}: tokenizer_class (or model_type in config.json) makes transformers use its {name}, which may give "
            f"other ids than the tokenizer.json, and is not known here\n  {AS_IT_IS}"
        )
    return pipeline


def _charsmap(state: Mapping[str, Any]) -> str | None:
    normalizer = state.get("normalizer")
    parts = (normalizer.get("normalizers") or [normalizer]) if isinstance(normalizer, dict) else []
    found = (part.get("precompiled_charsmap") for part in parts if part.get("type") == "Precompiled")
    return next((charsmap for charsmap in found if charsmap), None)


def _rebuilt(file: Path, name: str, state: Mapping[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    """The ``tokenizer.json`` that describes what the class makes from the vocabulary, without added tokens."""
    model = state.get("model")
    model = model if isinstance(model, dict) else {}
    wanted = pipeline.model["type"]
    if (model.get("type") or wanted) != wanted:
        raise DataError(
            f"{file} contains a {model['type']} model, but transformers' {name} needs a {wanted} model\n  {AS_IT_IS}"
        )
    vocabulary = {key: model[key] for key in ("vocab", "merges") if key in model}
    return {**state, "added_tokens": [], "model": {**pipeline.model, **vocabulary},
            "normalizer": pipeline.normalizer, "pre_tokenizer": pipeline.pre_tokenizer}  # fmt: skip


def _refuse_dropout(file: Path, state: Mapping[str, Any]) -> None:
    model = state.get("model")
    dropout = model.get("dropout") if isinstance(model, dict) else None
    if dropout:
        raise DataError(
            f"{file}: model.dropout = {dropout}: the same text would get other ids each time\n"
            "  set model.dropout to null: dropout is for training with texts that are tokenised again in each epoch."
        )


def _backend(file: Path, state: Mapping[str, Any]) -> Backend:
    with library_errors(f"{file} is not a Hugging Face tokenizer.json"):
        backend = Backend.from_str(json.dumps(state))
    # A file may enable either, which would truncate or pad documents.
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    if not vocabulary:
        raise DataError(f"{file} contains a tokenizer without a vocabulary")
    if (highest := max(vocabulary.values())) >= 2**31 - 1:
        raise DataError(f"{file} has a token of id {highest:,}: ids above 2,147,483,646 cannot be written")
    if len({*vocabulary.values()}) < len(vocabulary):
        first: dict[int, str] = {}
        token, other = next(
            (first[i], token) for token, i in sorted(vocabulary.items()) if first.setdefault(i, token) != token
        )
        raise DataError(f"{file} is damaged: the tokens {token!r} and {other!r} have the same id {vocabulary[token]}")
    return backend


def _settings(file: Path, state: Mapping[str, Any], config: dict[str, Any], pipeline: Pipeline | None) -> _Settings:
    """Merged as by ``PreTrainedTokenizerBase._from_pretrained`` of transformers 5."""
    path, special_path, added_path = (file.with_name(name) for name in (CONFIG, SPECIAL_MAP, ADDED))
    special_map = _optional(special_path)
    values = dict(config)
    for key in LISTS:
        if not isinstance(config.get(key), dict):
            _list_of(path, key, config.get(key))
    if not values.get("extra_special_tokens") and "additional_special_tokens" in values:
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    objects = _pop_object(values)
    by_content: dict[str, AddedToken] = {}
    from_map: dict[str, Any] = {}
    if "added_tokens_decoder" in config:
        added = _added_tokens_decoder(path, config["added_tokens_decoder"])
    else:
        from_map = _special_map(special_path, special_map, values)
        values |= from_map
        objects |= _pop_object(values)
        added = _added_tokens_json(added_path, values)
        by_content = {token.content: token for token in added.values()}  # some may lose their ids to others below
        for i, token in enumerate(_list_of(file, "added_tokens", state.get("added_tokens"))):
            if not isinstance(token, dict) or not isinstance(token.get("id"), int):
                raise DataError(f"{file}: added_tokens.{i} is {token!r}; it should be a token with an id")
            fields = {key: value for key, value in token.items() if key != "id"}
            added[token["id"]] = _added_token(file, f"added_tokens.{i}", fields)
    for key, value in (pipeline.special if pipeline else {}).items():
        values.setdefault(key, value)
    padding = state.get("padding")
    if isinstance(padding, dict) and "pad_token" not in values:
        values["pad_token"] = _token(file, "padding.pad_token", padding.get("pad_token"))
    by_content |= {token.content: token for token in added.values()}
    place = {key: special_path if key in from_map else path for key in values}
    named = {key: _token(place[key], key, values[key]) for key in NAMED if values.get(key) is not None}
    named = {key: by_content.get(str(token), token) for key, token in named.items()}
    own = {key: value for key, value in values.items() if key.endswith("_token") and key not in NAMED}
    own |= {key: config[key] for key in own if isinstance(config.get(key), str)}  # the map does not replace these
    others = {key: value for key, value in own.items() if _is_token(value)} | objects
    extra = values.get("extra_special_tokens" if "extra_special_tokens" in values else "additional_special_tokens")
    named |= {key: _token(place.get(key, path), key, value) for key, value in others.items()}
    tokens = [_token(path, "extra_special_tokens", value) for value in _list_of(path, "extra_special_tokens", extra)]
    exist = path.is_file() or special_path.is_file()
    return _Settings(file, values, named, tokens, added, frozenset(from_map), exist)


def _pop_object(values: dict[str, Any]) -> dict[str, Any]:
    """Remove ``extra_special_tokens`` that are an object of names and tokens; there may be a list besides."""
    return values.pop("extra_special_tokens") if isinstance(values.get("extra_special_tokens"), dict) else {}


def _added_tokens_decoder(path: Path, value: Any) -> dict[int, AddedToken]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: added_tokens_decoder should be an object of ids and tokens, not {value!r}")
    try:
        ids = {int(i): token for i, token in value.items()}
    except ValueError:
        raise DataError(f"{path}: the keys of added_tokens_decoder should be ids") from None
    return {i: _added_token(path, f"added_tokens_decoder.{i}", token) for i, token in sorted(ids.items())}


def _special_map(path: Path, special_map: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What it adds to the settings. Its tokens are all special."""
    found: dict[str, Any] = {}
    for key, value in special_map.items():
        if key in LISTS and not isinstance(value, dict):
            _list_of(path, key, value)
        if key in LISTS and isinstance(value, list):
            tokens = [_token(path, key, token) for token in value]
            known = (values.get(key) or []) if key == "extra_special_tokens" else []
            found[key] = known + [token for token in tokens if token not in known]
        elif isinstance(value, dict) and key != "extra_special_tokens":
            found[key] = _added_token(path, key, {**value, "special": True})
        else:
            found[key] = value
    return found


def _added_tokens_json(path: Path, values: Mapping[str, Any]) -> dict[int, AddedToken]:
    special = {str(values[key]) for key in NAMED if values.get(key)}
    extra = values.get("extra_special_tokens")
    special |= {*map(str, extra)} if isinstance(extra, list) else set()
    added = {}
    for content, i in _optional(path).items():
        if not isinstance(i, int):
            raise DataError(f"{path}: the id of {content!r} is {i!r}; it should be a number")
        is_special = content in special
        fields = {"content": content, "normalized": not is_special, "special": is_special}
        added[i] = _added_token(path, content, fields)
    return added


def _list_of(path: Path, key: str, value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise DataError(f"{path}: {key} should be a list of tokens, not {value!r}")
    return value or []


def _is_token(value: Any) -> bool:
    """Whether it is a token's name, a token with its flags, or an object that is marked as one."""
    if isinstance(value, dict):
        return value.get("__type") == "AddedToken"
    return isinstance(value, str | AddedToken) and bool(str(value))


def _token(path: Path, key: str, value: Any) -> Token:
    """A token by its name or with its flags."""
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, dict):
        return _added_token(path, key, {name: field for name, field in value.items() if name != "__type"})
    if not isinstance(value, str) or not value:
        raise DataError(f'{path}: {key} is {value!r}; it should be a token, such as "</s>"')
    _require_unicode(path, key, value)
    return value


def _added_token(path: Path, key: str, fields: Any) -> AddedToken:
    if not isinstance(fields, dict) or not isinstance(fields.get("content"), str) or not fields["content"]:
        raise DataError(f'{path}: {key} is {fields!r}; it should be a token such as {{"content": "</s>"}}')
    _require_unicode(path, key, fields["content"])
    with library_errors(f"{path}: {key} is not a token"):
        return AddedToken(**fields)


def _require_unicode(path: Path, key: str, content: str) -> None:
    with library_errors(f"{path}: {key} is not valid text"):
        content.encode()


def _require_named(settings: _Settings, backend: Backend, pipeline: Pipeline | None) -> None:
    """The begin- and end-of-text tokens must be defined by some file, else a misspelt one would become a new id."""
    defined = {token.content for token in settings.added.values()}
    for key in ("bos_token", "eos_token"):
        token = str(settings.named[key]) if key in settings.named else None
        given_by_class = pipeline is not None and pipeline.special.get(key) == token
        if token is None or given_by_class or token in defined or backend.token_to_id(token) is not None:
            continue
        raise DataError(
            f"{settings.place_of(key)} names {key} = {token!r}, which the tokenizer.json beside it does not have\n"
            "  name a token that it has, or add this one to added_tokens in the tokenizer.json."
        )


def _add_tokens(settings: _Settings, backend: Backend, pipeline: Pipeline | None) -> None:
    """Those that the ``tokenizer.json`` lacks or has with other flags; as by ``TokenizersBackend.__init__``.

    They get the next ids, in the order of the ids that they should have. Adding existing ones again makes the named
    ones special.
    """
    tokens: list[Token] = [token for _, token in sorted(settings.added.items())]
    known = {token.content for token in backend.get_added_tokens_decoder().values()} | {*map(str, tokens)}
    names = {*map(str, settings.named.values())}
    tokens += [token for token in (*settings.named.values(), *settings.extra) if str(token) not in known]
    with library_errors(f"the added tokens of {settings.file.parent} cannot be added"):
        backend.add_tokens([_as_special(token, names) for token in tokens])
        every = (*settings.named.values(), *settings.extra)
        if pipeline and pipeline.adds_again == "names":
            backend.add_tokens([AddedToken(token, special=True) for token in dict.fromkeys(map(str, every))])
        elif pipeline and pipeline.adds_again == "tokens":
            backend.add_special_tokens(
                [AddedToken(token, normalized=False) if isinstance(token, str) else token for token in every]
            )


def _as_special(token: Token, named: set[str]) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not token.special and token.content in named:
        token.special = True
    return token


def _id_of(backend: Backend, settings: _Settings, key: str) -> int | None:
    token = settings.named.get(key)
    identifier: int | None = None if token is None else backend.token_to_id(str(token))
    return identifier


def _first_of(backend: Backend, usual: Sequence[str]) -> int | None:
    return next((i for i in map(backend.token_to_id, usual) if i is not None), None)


def _splits_special_tokens(settings: _Settings) -> bool:
    value = settings.values.get("split_special_tokens", False)
    if not isinstance(value, bool):
        path = settings.file.with_name(CONFIG)
        raise DataError(f"{path}: split_special_tokens is {value!r}; it should be true or false")
    return value
