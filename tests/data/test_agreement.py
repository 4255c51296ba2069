"""What data, tokenizer and model declare about the ids is compared, and mismatches are reported with the remedy."""

import json
from pathlib import Path

import pytest

from megagap.data.agreement import Ids, differing, is_extension, require_agreement, require_ids_of_model
from megagap.data.indexed import IndexedDatasetWriter
from megagap.errors import DataError
from megagap.preprocess import preprocess
from megagap.preprocess.bpe import train_tokenizer
from megagap.tokenizer import load_tokenizer

IM_END, SPECIAL = "<|im_end|>", "<|eot_id|>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Folders of tokenizers by name; ``base`` has 270 ids, end-of-text 1 and begin-of-text 0."""
    folder = tmp_path_factory.mktemp("tokenizers")
    text = folder / "text.jsonl"
    text.write_text('{"text": "the quick brown fox, le vif renard brun"}\n' * 20)
    train_tokenizer([text], folder / "base", 270)
    train_tokenizer([text], folder / "other", 265)
    base = json.loads((folder / "base/tokenizer.json").read_text())

    def variant(name, added, eos, bos="<|begin_of_text|>", special=True):
        (folder / name).mkdir()
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)
        tokens = base["added_tokens"] + [{"id": 270 + i, "content": t} | flags for i, t in enumerate(added)]
        (folder / name / "tokenizer.json").write_text(json.dumps(base | {"added_tokens": tokens}))
        config = {"eos_token": eos, "bos_token": bos}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))

    variant("chat", [SPECIAL], SPECIAL)
    variant("more", [IM_END], "<|end_of_text|>", special=False)
    variant("began", [SPECIAL], "<|end_of_text|>", bos=SPECIAL)
    stripped = json.loads(json.dumps(base))
    for token in stripped["added_tokens"]:
        token["content"] = token["content"].replace("end_of_text", "fin").replace("begin_of_text", "debut")
    stripped["model"]["vocab"] = {
        k.replace("end_of_text", "fin").replace("begin_of_text", "debut"): v for k, v in base["model"]["vocab"].items()
    }
    (folder / "nameless").mkdir()
    (folder / "nameless/tokenizer.json").write_text(json.dumps(stripped))
    return folder


@pytest.fixture(scope="module")
def made(tokenizers):
    """Prefixes by tokenizer and options."""
    found = {}

    def make(tokenizer, **options):
        key = (tokenizer, *sorted(options))
        if key not in found:
            prefix = str(tokenizers / "-".join(("data", *key)))
            text = tokenizers / "text.jsonl"
            found[key] = preprocess([text], prefix, str(tokenizers / tokenizer), **options).pairs[0].prefix
        return found[key]

    return make


EOD = {"append_eod": True}
BOS = {"prepend_bos": True}

REFUSED = {
    "a larger tokenizer": ([("base", EOD)], "base", 269, ["has ids up to 269", "model.vocab_size = 270 (or 320,"]),
    "without tokenizer": ([("base", EOD)], "", 269, ["has ids up to 269, but model.vocab_size is 269"]),
    "added tokens": ([("base", EOD)], "more", 270, ["more has ids up to 270", "model.vocab_size = 271"]),
    "another vocabulary": ([("base", EOD)], "other", 300, ["was made with another tokenizer: ", "base"]),
    "fewer tokens": ([("more", EOD)], "base", 300, ["was made with another tokenizer: "]),
    "sources of two": ([("base", EOD), ("other", EOD)], "", 300, ["was made with another tokenizer: "]),
    "another end": (
        [("base", EOD)],
        "chat",
        300,
        ["end-of-text id 1 of", "end-of-text id of the tokenizer", "is 270"],
    ),
    "another end of a source": ([("chat", EOD), ("base", EOD)], "chat", 300, ["end-of-text id 1 of", "is 270"]),
    "ends of sources": ([("base", EOD), ("chat", EOD)], "", 300, ["end-of-text id 270 of", "is 1"]),
    "no end": ([("base", EOD)], "nameless", 300, ["end-of-text id 1 of", "is none"]),
    "another beginning": ([("base", BOS)], "began", 300, ["begin-of-text id 0 of", "is 270"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mismatches_are_refused_with_both_numbers(made, tokenizers, case):
    data, spec, vocab_size, wanted = REFUSED[case]
    sources = {f"s{i}": [made(name, **options)] for i, (name, options) in enumerate(data)}
    with pytest.raises(DataError) as error:
        require_agreement(sources, spec and str(tokenizers / spec), vocab_size)
    for part in wanted:
        assert part in str(error.value)


WARNED = {
    "nothing to report": ([("base", EOD), ("base", EOD)], "base", False, []),
    "special tokens added": ([("base", EOD)], "began", False, ["begin-of-text id 0, the tokenizer"]),
    "ordinary tokens added": ([("base", EOD)], "more", False, ["has added tokens to"]),
    "an end that is not used": ([("base", {})], "chat", False, ["end-of-text id 1, the tokenizer"]),
    "ends in a part": ([("base", EOD), ("base", {})], "base", False, ["do not (--append-eod"]),
    "beginnings in a part": ([("base", BOS), ("base", {})], "base", False, ["do not (--prepend-bos"]),
    "a mask without ends": ([("base", {})], "base", True, ["data.document_mask"]),
    "a mask with ends": ([("base", EOD)], "base", True, []),
}


@pytest.mark.parametrize("case", WARNED)
def test_what_may_be_intended_is_a_warning(made, tokenizers, case):
    data, spec, document_mask, wanted = WARNED[case]
    sources = {f"s{i}": [made(name, **options)] for i, (name, options) in enumerate(data)}
    ids, warnings = require_agreement(sources, str(tokenizers / spec), 300, document_mask)
    warnings = [text for text in warnings if "contain the same text" not in text]  # as all of them do
    assert len(warnings) == len(wanted) and all(part in text for part, text in zip(wanted, warnings, strict=True))
    assert ids is not None and ids.who == f"the tokenizer {tokenizers / spec}"


def write(prefix: Path, documents, dtype="uint16"):
    with IndexedDatasetWriter(str(prefix), dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def test_files_without_manifest_are_sampled(tmp_path, tokenizers):
    ends = write(tmp_path / "ends", [[5, 6, 270]] * 40)
    _, warnings = require_agreement({"a": [ends]}, str(tokenizers / "base"), 300)
    (warning,) = warnings
    assert "ends with the id 270; the end-of-text id of" in warning and "is 1" in warning
    assert require_agreement({"a": [ends]}, str(tokenizers / "chat"), 300)[1] == []
    mixed = write(tmp_path / "mixed", [[5, i] for i in range(40)])
    assert require_agreement({"a": [mixed]}, str(tokenizers / "base"), 300)[1] == []
    assert require_agreement({"a": [mixed]}, "", 300) == (None, [])


def test_ids_outside_the_vocabulary_are_found_at_the_start(tmp_path):
    prefix = write(tmp_path / "a", [[1, 2, 3]] * 2000 + [[1, 2, 300]] + [[1, 2, 3]] * 400)
    with pytest.raises(DataError, match=r"token id 300 in source web .*outside the vocabulary of 300"):
        require_agreement({"web": [prefix]}, "", 300)
    require_agreement({"web": [prefix]}, "", 301)


def test_a_dtype_that_cannot_hold_the_vocabulary_is_reported(tmp_path):
    narrow = write(tmp_path / "a", [[1, 2, 3]] * 40)
    _, (warning,) = require_agreement({"a": [narrow]}, "", 128_256)
    assert "uint16" in warning and "65,535" in warning and "128,256" in warning
    assert require_agreement({"a": [write(tmp_path / "b", [[1, 2, 3]] * 40, "int32")]}, "", 128_256)[1] == []


def test_all_faults_are_reported_at_once(made, tokenizers):
    sources = {"a": [made("other", **EOD)], "b": [made("base", **EOD)]}
    with pytest.raises(DataError) as error:
        require_agreement(sources, str(tokenizers / "chat"), 268)
    assert str(error.value).count("has ids up to") == 2 and "was made with another tokenizer" in str(error.value)
    assert "end-of-text id 1" in str(error.value)


def test_a_tokenizer_with_tokens_added_after_the_others_is_an_extension(tokenizers):
    base, more, other = (load_tokenizer(tokenizers / name) for name in ("base", "more", "other"))
    assert is_extension(Ids.of_tokenizer(base), more) and is_extension(Ids.of_tokenizer(base), base)
    assert not is_extension(Ids.of_tokenizer(more), base) and not is_extension(Ids.of_tokenizer(base), other)
    assert differing(Ids.of_tokenizer(base), Ids.of_tokenizer(base)) == []


def test_a_model_reads_data_of_its_tokenizer_or_of_one_that_its_tokenizer_extends(made, tokenizers):
    base, more = (load_tokenizer(tokenizers / name) for name in ("base", "more"))
    sources = {"fr": [made("base", **EOD)]}
    assert require_ids_of_model(Ids.of_tokenizer(base), None, 270, sources) == []
    assert require_ids_of_model(Ids.of_tokenizer(base), more, 300, sources) == []
    with pytest.raises(DataError, match=r"mean different tokens from those of the tokenizer .*base"):
        require_ids_of_model(Ids.of_tokenizer(base), None, 300, {"fr": [made("more", **EOD)]})
    with pytest.raises(DataError, match="name the tokenizer that the model was trained with"):
        require_ids_of_model(Ids.of_tokenizer(base), load_tokenizer(tokenizers / "other"), 300, {})


def test_another_end_of_the_documents_that_a_model_reads_is_a_warning(made, tokenizers):
    chat = load_tokenizer(tokenizers / "chat")
    (warning,) = require_ids_of_model(None, chat, 300, {"fr": [made("base", **EOD)]})
    assert "have the end-of-text id 1" in warning
    assert require_ids_of_model(None, chat, 300, {"fr": [made("base")]}) == []


def test_data_and_models_that_say_nothing_of_their_ids_are_warned_of(made, tokenizers, tmp_path):
    with IndexedDatasetWriter(tmp_path / "bare", "uint16") as writer:
        writer.add_document([5, 6])
    base = load_tokenizer(tokenizers / "base")
    (warning,) = require_ids_of_model(None, base, 300, {"bare": [str(tmp_path / "bare")]})
    assert "there is no" in warning and "bare.json" in warning
    (warning,) = require_ids_of_model(None, None, 300, {"fr": [made("base", **EOD)]})
    assert "the tokenizer of the model is not known" in warning
