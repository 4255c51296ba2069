"""A grid of tokenizer folders: every setting of ``tokenizer.json`` and of the files beside it that may change ids."""

import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megagap.tokenizer.words import LLAMA3_WORDS, O200K_WORDS, QWEN2_WORDS, QWEN3_5_WORDS

BEGIN, END, SPARE = "<|begin_of_text|>", "<|end_of_text|>", "<|im_end|>"
SENTENCES = (
    "the value of the Gaul is 12345, isn't it? The end of the line, and a list of names.",
    "Déjà vu à Noël: l'été, où l'œuvre naïve… 你好 🙂 ça va ?",
    "def f(x):\n    return [x ** 2 for _ in range(1024)]\n\n\tpass",
)
TEXTS = (
    "", " ", "  ", "\n", "\t\n ", "\u00a0", "\u3000x", "\x00", *SENTENCES,
    "the value <|end_of_text|> of <|im_end|> data", "<|end_of_text|>", "a<|end_of_text|>b", " <|begin_of_text|>  x",
    "<s>a</s>", "[CLS] the [SEP]", "<unk> [UNK]", "<|endoftext|>the", "<pad>", "a <extra> b<extra>", "<0x41>",
    "Gaul", "Gaulish", "PreGaul", "PreGaulish", "the Gaul, Gaul", " Gaul ", "  Gaul  ", "GaulGaul", "_Gaul_", "Gaul's",
    "gaul GAUL", "éGaulé", "Gaul\u0301", "-Gaul-", "x§y §", "e\u0301 é", "\ufb01 \uff11", "\u1100\u1161\u11a8", "İıſK;",
    "ok.ok", "foo_bar 1,234.5", "\u2581a\u2581b", "a\u200bb\ufeffc", "x" * 120, "ab" * 40, "<|end_of_text|>\u0338",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """The contents of a folder; None: no such file."""

    name: str
    tokenizer: dict[str, Any]
    config: dict[str, Any] | None
    special_map: dict[str, Any] | None = None
    added: dict[str, Any] | None = None
    model: dict[str, Any] | None = None
    refused: str | None = field(default=None)
    """What the refusal says, if it may be refused."""

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        for name, content in (
            ("tokenizer.json", self.tokenizer),
            ("tokenizer_config.json", self.config),
            ("special_tokens_map.json", self.special_map),
            ("added_tokens.json", self.added),
            ("config.json", self.model),
        ):
            if content is not None:
                (folder / name).write_text(json.dumps(content))
        return folder


def token(content: str, i: int | None = None, **flags: bool) -> dict[str, Any]:
    unset = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    return ({} if i is None else {"id": i}) | {"content": content} | unset | flags


def byte_level_bpe() -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


def space_bpe() -> dict[str, Any]:
    """As sentencepiece's of Llama 2: words with their spaces, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator([word for text in SENTENCES * 5 for word in text.split()], trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return state


def unigram() -> dict[str, Any]:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 5, trainer)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


def words(kind: str) -> dict[str, Any]:
    """A WordPiece or WordLevel."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model, trainer = (
        (models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer)
        if kind == "WordPiece"
        else (models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer)
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = trainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([text.lower() for text in SENTENCES * 5], made)
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    return state


def changed(state: dict[str, Any], **parts: Any) -> dict[str, Any]:
    return deepcopy(state) | parts


def with_model(state: dict[str, Any], **options: Any) -> dict[str, Any]:
    return changed(state, model=state["model"] | options)


def with_added(state: dict[str, Any], *tokens: dict[str, Any]) -> dict[str, Any]:
    return changed(state, added_tokens=[*state["added_tokens"], *tokens])


PADDING = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
           "pad_token": "<pad>"}  # fmt: skip
PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BEGIN, "eos_token": END}


def folders() -> list[Folder]:
    bases = {"bpe": byte_level_bpe(), "space": space_bpe(), "unigram": unigram()}
    made = [*_of_bpe(bases["bpe"]), *_of_settings(bases["bpe"]), *_of_other_models(bases), *_of_classes(bases)]
    assert len({folder.name for folder in made}) == len(made)
    return made


def _of_bpe(bpe: dict[str, Any]) -> Iterator[Folder]:
    size = max(bpe["model"]["vocab"].values()) + 1
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    for values in product((False, True), repeat=5):
        flags = dict(zip(names, values, strict=True))
        label = "+".join(name for name, value in flags.items() if value) or "no flags"
        yield Folder(f"added: {label}", with_added(bpe, token("Gaul", size, **flags)), PLAIN)
    for values in product((False, True), repeat=2):
        flags = dict(zip(("lstrip", "rstrip"), values, strict=True))
        ended = deepcopy(bpe)
        ended["added_tokens"][1] |= flags
        yield Folder(f"end of text: {flags}", ended, PLAIN)
    for one, other in product((False, True), repeat=2):
        tokens = token("Gaul", size, normalized=one), token("Gaulish", size + 1, normalized=other)
        yield Folder(f"added: Gaul {one}, Gaulish {other}", with_added(bpe, *tokens), PLAIN)
    for content in ("x Gaul", "  ", "é", "the", "\n", "§"):
        yield Folder(f"added: {content!r}", with_added(bpe, token(content, size)), PLAIN)
    yield Folder("added: an id that is not the next", with_added(bpe, token("Gaul", size + 5)), PLAIN)
    replace = {"type": "Replace", "pattern": {"String": "G"}, "content": "g"}
    nfc = {"type": "NFC"}
    normalizers: list[dict[str, Any]] = [
        nfc, {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "StripAccents"},
        {"type": "Strip", "strip_left": True, "strip_right": True}, replace, {"type": "Prepend", "prepend": "x"},
        {"type": "Nmt"}, {"type": "Sequence", "normalizers": [nfc]},
        {"type": "Sequence", "normalizers": [nfc, replace]},
        {"type": "Sequence", "normalizers": []}, {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "},
        {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
         "lowercase": True},
    ]  # fmt: skip
    for normalizer in normalizers:
        normalised = changed(bpe, normalizer=normalizer)
        yield Folder(f"normalizer: {normalizer}", normalised, PLAIN)
        yield Folder(f"normalizer, added: {normalizer}", with_added(normalised, token("Gaul", size)), PLAIN)
        both = with_added(normalised, token("Gaul", size, normalized=True))
        yield Folder(f"normalizer, added normalized: {normalizer}", both, PLAIN)
    for label, pre_tokenizer in _pre_tokenizers():
        yield Folder(f"words: {label}", changed(bpe, pre_tokenizer=pre_tokenizer), PLAIN)
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": BEGIN, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {BEGIN: {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}},
    }  # fmt: skip
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for post_processor in (template, byte_level, {"type": "Sequence", "processors": [byte_level, template]},
                           {"type": "BertProcessing", "sep": [END, 1], "cls": [BEGIN, 0]}):  # fmt: skip
        yield Folder(f"post-processor: {post_processor['type']}", changed(bpe, post_processor=post_processor), PLAIN)
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    yield Folder("truncation", changed(bpe, truncation=cut), PLAIN)
    for pad, i in (("[PAD]", 5), (END, 1)):
        filled = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": i,
                  "pad_type_id": 0, "pad_token": pad}  # fmt: skip
        yield Folder(f"padding: {pad}", changed(bpe, padding=filled), PLAIN)
    for options in ({"dropout": 0.0}, {"ignore_merges": True}, {"fuse_unk": True}, {"unk_token": END},
                    {"continuing_subword_prefix": ""}, {"end_of_word_suffix": ""}, {"end_of_word_suffix": "</w>"},
                    {"byte_fallback": True}):  # fmt: skip
        yield Folder(f"model: {options}", with_model(bpe, **options), PLAIN)
    for dropout in (0.1, 1.0):
        yield Folder(f"model: dropout {dropout}", with_model(bpe, dropout=dropout), PLAIN, refused="model.dropout")
    yield Folder(
        "merges as texts", with_model(bpe, merges=[" ".join(merge) for merge in bpe["model"]["merges"]]), PLAIN
    )
    yield Folder("fewer merges", with_model(bpe, merges=bpe["model"]["merges"][:-9], ignore_merges=True), PLAIN)
    spread = {token: i + 7 * (i > 300) for token, i in bpe["model"]["vocab"].items()}
    yield Folder("ids with gaps", with_model(bpe, vocab=spread), PLAIN)


def _pre_tokenizers() -> Iterator[tuple[str, dict[str, Any] | None]]:
    def as_bytes(use_regex: bool = True, add_prefix_space: bool = False, trim_offsets: bool = True) -> dict[str, Any]:
        return {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": trim_offsets,
                "use_regex": use_regex}  # fmt: skip

    def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}

    def sequence(*parts: Any) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": list(parts)}

    yield "none", None
    for flags in product((False, True), repeat=3):
        yield f"bytes {flags}", as_bytes(*flags)
    for name, pattern in (("Qwen 2", QWEN2_WORDS), ("Qwen 3.5", QWEN3_5_WORDS), ("o200k", O200K_WORDS), ("d", "\\d")):
        yield name, sequence(split(pattern), as_bytes(False))
    yield "Llama 3, prefix", sequence(split(LLAMA3_WORDS), as_bytes(False, True))
    yield "Llama 3, bytes with words", sequence(split(LLAMA3_WORDS), as_bytes(True))
    yield "Llama 3, no bytes", split(LLAMA3_WORDS)
    for behavior in ("Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        yield f"Llama 3, {behavior}", sequence(split(LLAMA3_WORDS, behavior), as_bytes(False))
    yield "Llama 3, inverted", sequence(split(LLAMA3_WORDS, "Isolated", True), as_bytes(False))
    for part in (
        {"type": "CharDelimiterSplit", "delimiter": "§"}, {"type": "Digits", "individual_digits": True},
        {"type": "Digits", "individual_digits": False}, {"type": "Punctuation", "behavior": "Isolated"},
        {"type": "Whitespace"}, {"type": "WhitespaceSplit"}, {"type": "BertPreTokenizer"}, {"type": "UnicodeScripts"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    ):  # fmt: skip
        yield f"{part} before", sequence(part, split(LLAMA3_WORDS), as_bytes(False))
        yield f"{part} with GPT-2's", sequence(part, as_bytes())


def _of_settings(bpe: dict[str, Any]) -> Iterator[Folder]:
    size = max(bpe["model"]["vocab"].values()) + 1
    spare = token(SPARE, size, special=True)
    bare = {"tokenizer_class": "PreTrainedTokenizerFast"}
    with_spare = with_added(bpe, spare)
    unset = token(SPARE, special=True)
    yield Folder("map: end of text", with_spare, bare, {"eos_token": SPARE})
    yield Folder("map: end of text with flags", with_spare, bare, {"eos_token": token(SPARE, lstrip=True)})
    yield Folder("map against config", with_spare, PLAIN, {"eos_token": SPARE})
    yield Folder("map without config", with_spare, None, {"eos_token": SPARE}, model={"model_type": "llama"})
    yield Folder("map: pad not in the vocabulary", bpe, PLAIN, {"pad_token": "<pad>"})
    yield Folder("map: additional", bpe, PLAIN, {"additional_special_tokens": ["<extra>", "Gaul"]})
    yield Folder("map: extra", bpe, PLAIN | {"extra_special_tokens": ["Gaul"]}, {"extra_special_tokens": ["<extra>"]})
    yield Folder("map: list of ends", bpe, bare, {"eos_token": [END]}, refused="eos_token is")
    yield Folder("map: unknown end", bpe, bare, {"eos_token": "<none>"}, refused="names eos_token = '<none>'")
    image = token("Gaul", lstrip=True)
    yield Folder("map: a token of its own name", bpe, PLAIN, {"image_token": image})
    yield Folder("config: a token of its own name, not marked as one", bpe, PLAIN | {"image_token": image})
    marked = {"image_token": {"__type": "AddedToken", **image}}
    yield Folder("config: a token of its own name, marked as one", bpe, PLAIN | marked)
    for value in ("<extra>", image, {"__type": "AddedToken", **image}, {}):
        either = PLAIN | {"image_token": value}
        yield Folder(f"config: own name {value}, map: another", bpe, either, {"image_token": "Gaulish"})
    lost = with_added(bpe, token("the Gaul", size))
    flagged = {"unk_token": {"__type": "AddedToken", "content": "Gaul", "lstrip": True}}
    yield Folder("added: an id that another has", lost, PLAIN | flagged, added={"Gaul": size})
    with_list = {"image_token": image, "additional_special_tokens": ["<extra>"]}
    yield Folder("map: own name, added and list", bpe, PLAIN, with_list, {"Gaulish": size})
    named = {"extra_special_tokens": {"image_token": "<extra>"}}
    yield Folder("config: named extra beside a list", bpe, PLAIN | named | {"additional_special_tokens": ["Gaul"]})
    yield Folder("config: named extra, map: list", bpe, PLAIN | named, {"additional_special_tokens": ["Gaul"]})
    yield Folder("config: named extra, map: extra", bpe, PLAIN | named, {"extra_special_tokens": ["Gaul"]})
    for key, value in product(("additional_special_tokens", "extra_special_tokens"), ([], None)):
        hidden = PLAIN | {key: value}
        yield Folder(f"config: {key} {value}, map: list", bpe, hidden, {"additional_special_tokens": ["Gaul"]})
        yield Folder(f"config: {key} {value}, map: extra", bpe, hidden, {"extra_special_tokens": ["Gaul"]})
    splitting = {"split_special_tokens": True}
    plain_begin = deepcopy(bpe)
    plain_begin["added_tokens"][0] |= {"special": False, "normalized": True}
    yield Folder("split, a named token that is not special", plain_begin, PLAIN | splitting)
    yield Folder("split, an ordinary token named", bpe, PLAIN | splitting | {"pad_token": "the"})
    yield Folder("split, tokens that overlap", with_added(bpe, token(" Gaul", size, special=True, rstrip=True),
                                                         token("Gaulish", size + 1)), PLAIN | splitting)  # fmt: skip
    blanks = token("  ", size, lstrip=True, special=True), token("Gaul", size + 1, lstrip=True)
    yield Folder("added: blanks beside one that takes them", with_added(bpe, *blanks), PLAIN)
    prefixed = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True} | named
    yield Folder("added: the prefix and a word", with_added(bpe, token(" the", size)), prefixed)
    decoder = {str(size): unset}
    yield Folder("decoder: adds", bpe, PLAIN | {"added_tokens_decoder": decoder})
    yield Folder("decoder hides the map", bpe, PLAIN | {"added_tokens_decoder": decoder}, {"eos_token": SPARE})
    yield Folder("decoder: end of text", bpe, PLAIN | {"added_tokens_decoder": decoder, "eos_token": SPARE})
    yield Folder("decoder: as the file", with_spare, PLAIN | {"added_tokens_decoder": decoder})
    yield Folder("decoder: empty", bpe, PLAIN | {"added_tokens_decoder": {}})
    yield Folder("decoder: an id beyond the next", bpe, PLAIN | {"added_tokens_decoder": {"900": unset}})
    for values in product((False, True), repeat=5):
        flags = dict(zip(("single_word", "lstrip", "rstrip", "normalized", "special"), values, strict=True))
        label = "+".join(name for name, value in flags.items() if value) or "no flags"
        gaul = {str(size): token("Gaul", **flags)}
        yield Folder(f"decoder: {label}", bpe, PLAIN | {"added_tokens_decoder": gaul})
    other_flags = {"1": token(END, special=True, rstrip=True)}
    yield Folder("decoder: other flags than the file", bpe, PLAIN | {"added_tokens_decoder": other_flags})
    yield Folder("decoder: of the vocabulary", bpe, PLAIN | {"added_tokens_decoder": {"99": token("the")}})
    broken = {"added_tokens_decoder": {"7": "Gaul"}}
    yield Folder("decoder: no token", bpe, PLAIN | broken, refused="added_tokens_decoder.7")
    yield Folder("added_tokens.json", bpe, PLAIN, added={"Gaul": size, "<extra>": size + 1})
    yield Folder("added_tokens.json: special", bpe, PLAIN | {"pad_token": "<pad>"}, added={"<pad>": size})
    for value in (True, False):
        yield Folder(f"split_special_tokens {value}", bpe, PLAIN | {"split_special_tokens": value})
    yield Folder(
        "split_special_tokens null", bpe, PLAIN | {"split_special_tokens": None}, refused="split_special_tokens is None"
    )
    for value in (True, False, None):
        yield Folder(f"add_prefix_space {value}", bpe, PLAIN | {"add_prefix_space": value})
    for key in ("additional_special_tokens", "extra_special_tokens"):
        yield Folder(f"config: {key}", bpe, PLAIN | {key: ["<extra>", "Gaul"]})
        marked = {"__type": "AddedToken"} | token("<extra>", lstrip=True)
        yield Folder(f"config: {key} with flags", bpe, PLAIN | {key: [marked]})
    yield Folder("config: both lists", bpe, PLAIN | {"additional_special_tokens": ["Gaul"],
                                                     "extra_special_tokens": ["<extra>"]})  # fmt: skip
    yield Folder("config: named extra", bpe, PLAIN | {"extra_special_tokens": {"image_token": "<extra>"}})
    yield Folder("config: a token of its own name", bpe, PLAIN | {"image_token": "<extra>"})
    for key in ("pad_token", "unk_token", "mask_token", "cls_token", "sep_token"):
        yield Folder(f"config: {key}", bpe, PLAIN | {key: "<extra>"})
    yield Folder("config: no end of text", bpe, bare)
    yield Folder("config: end of text null", bpe, bare | {"eos_token": None})
    yield Folder("config: end of text marked", bpe, bare | {"eos_token": {"__type": "AddedToken"} | token(END)})
    yield Folder("config: the other end", bpe, bare | {"eos_token": BEGIN})
    yield Folder("config: an ordinary token", bpe, bare | {"eos_token": "the"})
    yield Folder("config: unknown end", bpe, bare | {"eos_token": "<none>"}, refused="names eos_token = '<none>'")
    yield Folder("config: adds begin and end", bpe, PLAIN | {"add_bos_token": True, "add_eos_token": True})
    yield Folder("config: cleans up", bpe, PLAIN | {"clean_up_tokenization_spaces": True, "model_max_length": 4})
    code = {"auto_map": {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}}
    yield Folder("config: code", bpe, PLAIN | code, refused="auto_map")
    names = {"fast_tokenizer_files": ["tokenizer.json", "tokenizer.4.0.json"]}
    yield Folder("config: other files", bpe, PLAIN | names, refused="fast_tokenizer_files")


def _of_other_models(bases: dict[str, dict[str, Any]]) -> Iterator[Folder]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    for scheme, split in product(("first", "always", "never"), (False, True)):
        metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
        for name in ("space", "unigram"):
            yield Folder(f"{name}: {scheme} {split}", changed(bases[name], pre_tokenizer=metaspace), config)
    for name, normalizer in product(("space", "unigram"), (prefix, spaces, {"type": "NFKC"})):
        label = f"{name}: {normalizer['type']}"
        yield Folder(label, changed(bases[name], normalizer=normalizer, pre_tokenizer=None), config)
    for flags in ({}, {"lstrip": True}, {"rstrip": True}, {"normalized": True}, {"single_word": True}):
        for name in ("space", "unigram"):
            vocabulary = bases[name]["model"]["vocab"]
            made = with_added(bases[name], token("Gaul", len(vocabulary), **flags))
            yield Folder(f"{name}: added {flags}", made, config)
    yield Folder("space: no fallback", with_model(bases["space"], byte_fallback=False), config)
    yield Folder("space: unknown tokens apart", with_model(bases["space"], fuse_unk=False), config)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    for kind, pre_tokenizer in product(
        ("WordPiece", "WordLevel"), ("Whitespace", "WhitespaceSplit", "BertPreTokenizer")
    ):
        made = changed(words(kind), pre_tokenizer={"type": pre_tokenizer})
        yield Folder(f"{kind}: {pre_tokenizer}", made, config)
        size = len(made["model"]["vocab"])
        yield Folder(f"{kind}: {pre_tokenizer}, added", with_added(made, token("Gaul", size, lstrip=True)), config)


def _of_classes(bases: dict[str, dict[str, Any]]) -> Iterator[Folder]:
    bpe, space, unigrams = bases["bpe"], bases["space"], bases["unigram"]
    names = {"bos_token": BEGIN, "eos_token": END}
    dropped = with_model(bpe, dropout=0.5)
    of_class: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
        (bpe, name, settings | rest)
        for name in ("GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "Qwen3_5Tokenizer", "GPTNeoXTokenizer",
                     "RobertaTokenizer", "BartTokenizer", "CohereTokenizer", "LlamaTokenizer", "NoSuchTokenizer",
                     "ParakeetTokenizer")
        for settings in ({}, names)
        for rest in ({}, {"add_prefix_space": True}, {"add_prefix_space": False})
    ]  # fmt: skip
    of_class += [
        (space, name, settings)
        for name in ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer")
        for settings in ({}, {"legacy": True}, {"legacy": False, "add_prefix_space": False}, {"unk_token": "<unk>"})
    ]
    of_class += [
        (unigrams, "XLMRobertaTokenizer", settings)
        for settings in ({}, {"add_prefix_space": False}, {"add_prefix_space": None})
    ]
    padded = changed(with_added(bpe, token("Gaul", max(bpe["model"]["vocab"].values()) + 1)), padding=PADDING)
    again = {"extra_special_tokens": [{"__type": "AddedToken", **token("Gaul", single_word=True, special=True)}]}
    by_flags = {"mask_token": {"__type": "AddedToken", **token("Gaul", rstrip=True)}}
    of_class += [
        (padded, name, names | settings)
        for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "Qwen3_5Tokenizer",
                     "GPTNeoXTokenizer", "RobertaTokenizer", "CohereTokenizer", "LlamaTokenizer")
        for settings in ({}, again, by_flags, {"extra_special_tokens": ["Gaul"]}, {"pad_token": END})
    ]  # fmt: skip
    named_so = {"type": "Sequence", "processors": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                                                    "use_regex": True}]}  # fmt: skip
    of_class += [
        (changed(space, **part), "LlamaTokenizer", {})
        for part in ({"post_processor": named_so}, {"normalizer": {"type": "ByteLevel"}},
                     {"added_tokens": [token("ByteLevel", max(space["model"]["vocab"].values()) + 1)]})
    ]  # fmt: skip
    of_class += [
        (words("WordPiece"), "BertTokenizer", settings)
        for settings in ({}, {"do_lower_case": False}, {"strip_accents": False}, {"strip_accents": True},
                         {"tokenize_chinese_chars": False}, {"unk_token": "[UNK]", "do_lower_case": True})
    ]  # fmt: skip
    of_class += [(dropped, "GPT2Tokenizer", names), (with_model(bpe, ignore_merges=True), "GPT2Tokenizer", names)]
    decoder = {"added_tokens_decoder": {"360": token(SPARE, special=True)}}
    of_class += [(bpe, "GPT2Tokenizer", names | decoder), (bpe, "Qwen2Tokenizer", names | decoder)]
    yield Folder("class: unknown token of the map", space, {"tokenizer_class": "GemmaTokenizer"}, {"unk_token": "</s>"})
    for name, kind in (("WordPiece", "BertTokenizer"), ("WordLevel", "PreTrainedTokenizerFast")):
        yield Folder(f"split: {name}", words(name), {"tokenizer_class": kind, "split_special_tokens": True})
    splitting = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    yield Folder("split: Unigram", unigrams, splitting)
    yield Folder("split: ignore_merges", with_model(space, ignore_merges=True), splitting)
    for i, (state, name, settings) in enumerate(of_class):
        yield Folder(f"class {i}: {name} {settings}", state, {"tokenizer_class": name} | settings)
    for name in ("T5Tokenizer", "CamembertTokenizer", "CodeLlamaTokenizer", "ByT5Tokenizer", "WhisperTokenizer"):
        yield Folder(f"class: {name}", bpe, {"tokenizer_class": name} | names, refused=f"use its {name}")
    of_unigram, of_bpe = "contains a Unigram model, but", "contains a BPE model, but"
    yield Folder("class: of a Unigram", unigrams, {"tokenizer_class": "GPT2Tokenizer"}, refused=of_unigram)
    yield Folder("class: of a BPE", bpe, {"tokenizer_class": "BertTokenizer"}, refused=of_bpe)
    for model_type in ("gpt2", "qwen2", "mistral", "llama", "phi3", "phi", "olmo2", "gpt_neox"):
        yield Folder(f"model type {model_type}", bpe, PLAIN, model={"model_type": model_type})
        declared = {"tokenizer_class": "GPT2Tokenizer"} | names
        yield Folder(f"model type {model_type}, GPT2Tokenizer", bpe, declared, model={"model_type": model_type})
        llama = {"tokenizer_class": "LlamaTokenizerFast"} | names
        yield Folder(f"model type {model_type}, LlamaTokenizer", bpe, llama, model={"model_type": model_type})
    for model_type in ("gpt2", "qwen2", "gpt_neox"):
        yield Folder(f"model type {model_type} alone", bpe, names, model={"model_type": model_type})
