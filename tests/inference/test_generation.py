import json
from base64 import b64encode
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from megagap.checkpoint.huggingface_import import load_hugging_face_model
from megagap.errors import CheckpointError, DataError
from megagap.inference.generation import Sampling, TextStream, choose, encode_prompt, generate, load_text_model
from megagap.preprocess.bpe import train_tokenizer
from megagap.tokenizer import load_tokenizer
from tests.huggingface import reference_model
from tests.models import tiny_model

MODEL = tiny_model(vocab_size=300, max_position_embeddings=12)


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """Hardly more than single bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.jsonl").write_text('{"text": "the the that"}\n')
    train_tokenizer([folder / "text.jsonl"], folder / "bpe", 300)
    return folder / "bpe"


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory):
    """With byte fallback, as Llama 2's."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def hugging_face(tmp_path):
    reference_model(MODEL).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


TEXTS = ["naïve café – 100 €", "日本語のテキスト 🙂🙃 end", "the  that\n\n the", "", "🙂"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bpe", "sentencepiece_model"])
@pytest.mark.parametrize("before", ["", "the fox é"])
def test_the_pieces_put_together_are_the_text_and_none_has_half_a_character(request, text, kind, before):
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    start = tokenizer.encode(before)
    ids = tokenizer.encode(before + text)[len(start) :]
    assert tokenizer.encode(before + text)[: len(start)] == start
    stream = TextStream(tokenizer, start)
    pieces = [stream.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.finish() == ""
    assert tokenizer.decode(start) + "".join(pieces) == tokenizer.decode(start + ids)


def test_text_appears_with_the_last_byte_of_a_character(bpe):
    tokenizer = load_tokenizer(bpe)
    stream = TextStream(tokenizer, [])
    assert [stream.add(token) for token in tokenizer.encode("x€y")] == ["x", "", "", "€", "y"]


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_ids_streams_to_what_it_decodes_to(bpe, seed):
    tokenizer = load_tokenizer(bpe)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(seed)).tolist()
    stream = TextStream(tokenizer, ids[:7])
    text = "".join(stream.add(token) for token in ids[7:]) + stream.finish()
    # The ids before may end within a character, which then is shown broken.
    assert text.lstrip("\ufffd") == tokenizer.decode(ids)[len(tokenizer.decode(ids[:7])) :].lstrip("\ufffd")


def test_the_same_seed_samples_the_same_and_another_something_else(hugging_face):
    model = load_hugging_face_model(hugging_face)
    texts = [list(generate(model, [5, 6], 10, sampling=Sampling(temperature=1.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def frequencies(logits, sampling, draws=4000):
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([choose(logits, sampling, generator) for _ in range(draws)])
    return torch.bincount(chosen, minlength=len(logits)) / draws


def test_sampling_follows_the_softmax_at_its_temperature():
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0])
    expected = torch.tensor([1.0, 3.0, 2.0, 0.0]).div(2).exp()
    torch.testing.assert_close(frequencies(logits, Sampling(2.0)), expected / expected.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-310, 1e-40, 1e-6])
def test_a_temperature_next_to_0_takes_the_likeliest_token(temperature):
    assert frequencies(torch.tensor([-5.0, 30.0, 20.0]), Sampling(temperature), draws=20).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, [2]), (0.51, [2, 0]), (0.8, [2, 0]), (0.81, [2, 0, 3]), (1e-9, [2])])
def test_top_p_samples_from_the_smallest_set_of_likeliest_tokens_that_reaches_it(top_p, kept):
    probabilities = torch.tensor([0.3, 0.05, 0.5, 0.15], dtype=torch.float64)
    expected = torch.zeros(4, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    drawn = frequencies(probabilities.log(), Sampling(1.0, top_p)).double()
    assert ((drawn > 0) == (expected > 0)).all()
    torch.testing.assert_close(drawn, expected, atol=0.03, rtol=0)


def test_generation_ends_before_a_stop_id(hugging_face):
    model = load_hugging_face_model(hugging_face)
    whole = list(generate(model, [5, 6], 8))
    assert list(generate(model, [5, 6], 8, stop={whole[3]})) == whole[: whole.index(whole[3])]


def test_generation_ends_where_the_positions_are_used_up(hugging_face):
    model = load_hugging_face_model(hugging_face)
    # 12 positions hold all but the last token.
    assert len(list(generate(model, [5] * 10, 100))) == 3
    assert len(list(generate(model, [5] * 12, 100))) == 1


def test_a_prompt_longer_than_the_model_is_refused_with_both_lengths(hugging_face):
    with pytest.raises(DataError, match=r"13 tokens.*max_position_embeddings = 12"):
        next(generate(load_hugging_face_model(hugging_face), [5] * 13, 1))


def test_a_prompt_with_ids_the_model_lacks_is_refused(hugging_face):
    with pytest.raises(DataError, match="id 300"):
        next(generate(load_hugging_face_model(hugging_face), [300], 1))


def test_outputs_that_are_not_finite_are_refused():
    with pytest.raises(CheckpointError, match="not finite"):
        choose(torch.tensor([0.0, float("nan")]), Sampling(), torch.Generator())


def test_without_a_tokenizer_the_option_is_named(hugging_face):
    with pytest.raises(DataError, match="--tokenizer"):
        load_text_model(hugging_face)


def test_generation_ends_at_the_ids_of_the_model_and_of_the_tokenizer(hugging_face, bpe):
    (hugging_face / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    loaded = load_text_model(hugging_face, str(bpe))
    assert loaded.stop == {7, 9, load_tokenizer(bpe).eod}
    (hugging_face / "generation_config.json").unlink()
    config = json.loads((hugging_face / "config.json").read_text())
    (hugging_face / "config.json").write_text(json.dumps(config | {"eos_token_id": 11}))
    assert load_text_model(hugging_face, str(bpe)).stop == {11, load_tokenizer(bpe).eod}


def test_a_prompt_begins_as_transformers_begins_it(bpe, tmp_path: Path):
    assert encode_prompt(load_tokenizer(bpe), "the") == AutoTokenizer.from_pretrained(bpe)("the")["input_ids"]
    backend = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes((bpe / "tokenizer_config.json").read_bytes())
    ids = encode_prompt(load_tokenizer(tmp_path), "the")
    assert ids == AutoTokenizer.from_pretrained(tmp_path)("the")["input_ids"]
    assert ids[0] == bos
    assert encode_prompt(load_tokenizer(tmp_path), "") == [bos]


def test_the_padding_that_a_tokenizer_json_asks_for_is_no_part_of_a_prompt(bpe, tmp_path: Path):
    backend = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    backend.enable_padding(direction="left", length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    plain = load_tokenizer(bpe)
    assert encode_prompt(load_tokenizer(tmp_path), "the") == encode_prompt(plain, "the")


def test_sentencepiece_prompts_begin_with_their_begin_of_text(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert encode_prompt(tokenizer, "the") == [tokenizer.bos, *tokenizer.encode("the")]


def declared_by_config(bpe: Path, folder: Path) -> Path:
    """As ``train_tokenizer`` writes it: declared, and without a template that would put it before a text."""
    return bpe


def known_by_its_name(bpe: Path, folder: Path) -> Path:
    (folder / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    return folder / "tokenizer.json"


def of_a_rank_file(bpe: Path, folder: Path) -> Path:
    tokens = [b64encode(bytes([byte])).decode() for byte in range(256)]
    (folder / "tokenizer.model").write_text("".join(f"{token} {i}\n" for i, token in enumerate(tokens)))
    return folder / "tokenizer.model"


@pytest.mark.parametrize("make", [declared_by_config, known_by_its_name, of_a_rank_file])
def test_an_empty_prompt_is_the_begin_of_text_of_every_kind_of_tokenizer(bpe, tmp_path: Path, make):
    tokenizer = load_tokenizer(make(bpe, tmp_path))
    (only,) = encode_prompt(tokenizer, "")
    assert tokenizer.decode([only]) == "<|begin_of_text|>"


def test_an_empty_sentencepiece_prompt_is_its_begin_of_text(sentencepiece_model):
    tokenizer = load_tokenizer(sentencepiece_model)
    assert tokenizer.decode(encode_prompt(tokenizer, "")) == "<s>"


def without_begin(bpe: Path, folder: Path) -> Path:
    state = json.loads((bpe / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end_of_text|>"}')
    return folder


def test_an_empty_prompt_starts_from_the_models_begin_of_text_where_the_tokenizer_declares_none(
    hugging_face, bpe, tmp_path: Path
):
    tokenizer = str(without_begin(bpe, tmp_path))
    (hugging_face / "generation_config.json").write_text('{"bos_token_id": 9}')
    loaded = load_text_model(hugging_face, tokenizer)
    assert encode_prompt(loaded.tokenizer, "", loaded.begin) == [9]
    assert load_text_model(hugging_face, str(bpe)).begin == load_tokenizer(bpe).bos


def test_an_empty_prompt_without_begin_of_text_is_refused_naming_the_tokenizer(bpe, tmp_path: Path):
    with pytest.raises(DataError, match=f"prompt is empty, and {tmp_path} declares no begin-of-text"):
        encode_prompt(load_tokenizer(without_begin(bpe, tmp_path)), "")
