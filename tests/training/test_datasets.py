"""The data that a recipe names."""

import json
import logging
import shutil
from pathlib import Path

import pytest

from megagap.checkpoint import find_latest
from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_import import import_model
from megagap.config import load_recipe
from megagap.errors import DataError
from megagap.inference.generation import encode_prompt, load_text_model
from megagap.preprocess import preprocess
from megagap.preprocess.bpe import train_tokenizer
from megagap.training.datasets import training_data, validation_data
from tests.recipes import write_recipe, write_tokens
from tests.training_run import train_recipe


def test_held_out_data_that_is_never_evaluated_is_warned_of(tmp_path, caplog):
    held_out = dict(validation=[{"path": "held_text_document"}])
    write_tokens(tmp_path / "held_text_document", 5)
    with caplog.at_level(logging.WARNING, "megagap"):
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out, train=dict(evaluate_every=5))))
        assert not caplog.records
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out)))
    (record,) = caplog.records
    assert "data.validation" in record.getMessage() and "train.evaluate_every = 0" in record.getMessage()


@pytest.mark.parametrize("in_phases", [False, True])
@pytest.mark.parametrize("again", ["fr_text_document.bin", "./fr_text_document", "linked_text_document", "fr_*"])
def test_the_same_files_under_two_names_are_warned_of(tmp_path, caplog, again, in_phases):
    sources = [{"path": "fr_text_document"}, {"path": again, "name": "more"}]
    if in_phases:
        phases = [{"name": f"part {i}", "tokens": 2560, "sources": [source]} for i, source in enumerate(sources)]
        recipe = write_recipe(tmp_path, data=dict(sources=[], phases=phases), train=dict(steps=0))
    else:
        recipe = write_recipe(tmp_path, data=dict(sources=sources))
    for ending in (".bin", ".idx"):
        (tmp_path / f"linked_text_document{ending}").symlink_to(tmp_path / f"fr_text_document{ending}")
    with caplog.at_level(logging.WARNING, "megagap"):
        training_data(load_recipe(recipe))
    (record,) = caplog.records
    assert "sources fr and more read the same files" in record.getMessage()


def test_sources_of_other_files_are_not_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "megagap"):
        training_data(load_recipe(write_recipe(tmp_path)))
    assert not caplog.records


def test_data_made_with_another_tokenizer_than_the_recipes_is_refused(tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "un deux trois, one two three"}\n' * 40)
    for name, size in (("first", 275), ("second", 265)):
        train_tokenizer([tmp_path / "text.jsonl"], tmp_path / name, size)
    preprocess([tmp_path / "text.jsonl"], str(tmp_path / "made"), str(tmp_path / "first"))
    sources = [{"path": "made_text_document"}]
    for name in ("first", "second", ""):
        settings = load_recipe(write_recipe(tmp_path, data=dict(sources=sources, tokenizer=name, split="100,0,0")))
        if name == "second":
            with pytest.raises(DataError, match=r"made_text_document was made with another tokenizer: .*first"):
                training_data(settings)
        else:
            training_data(settings)


@pytest.fixture
def with_tokenizers(tmp_path):
    """A recipe on data made with the tokenizer ``base``; ``chat`` ends texts otherwise, ``more`` has a token added, as
    ``other`` has other tokens."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "un deux trois, one two three, le vif renard brun"}\n' * 90)
    for name, size in (("base", 275), ("other", 265)):
        train_tokenizer([text], tmp_path / name, size)
    base = json.loads((tmp_path / "base/tokenizer.json").read_text())
    for name, special, end in (("chat", True, "<|x|>"), ("more", False, "<|end_of_text|>")):
        (tmp_path / name).mkdir()
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=special)
        added = [*base["added_tokens"], {"id": 275, "content": "<|x|>"} | flags]
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(base | {"added_tokens": added}))
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    for name in ("base", "chat", "other"):
        preprocess([text], str(tmp_path / name), str(tmp_path / name), append_eod=True)
    data = {"sources": [{"path": "base_text_document"}], "tokenizer": "base", "split": "100,0,0"}
    return write_recipe(tmp_path, data=data, train={"steps": 2}, model={"vocab_size": 275, "num_hidden_layers": 1})


def other_data(name):
    return [f'data.sources=[{{path="{name}_text_document", name="base"}}]', f"data.tokenizer={name}"]


def test_a_run_may_go_on_with_tokens_added_to_its_tokenizer(workers, tmp_path, with_tokenizers):
    workers.run(1, train_recipe, with_tokenizers, [])
    more = ["train.steps=3", "data.tokenizer=more"]
    with pytest.raises(AssertionError, match=r"more has ids up to 275, but model.vocab_size is 275"):
        workers.run(1, train_recipe, with_tokenizers, more)
    workers.run(1, train_recipe, with_tokenizers, [*more, "model.vocab_size=276"])
    log = (tmp_path / "run/logs/rank_00000.log").read_text()
    assert "has added tokens to" in log and "275, is 276: 1 new row of" in log


@pytest.mark.parametrize("mode", ["continue", "model"])
def test_weights_and_data_of_other_tokenizers_are_told(workers, tmp_path, with_tokenizers, mode):
    workers.run(1, train_recipe, with_tokenizers, [])
    phases = '{name="a", tokens=512, sources=[{path="base_text_document"}]}'
    later = '{name="b", tokens=512, sources=[{path="other_text_document"}]}'
    run = tmp_path / mode
    loading = [f"checkpoint.load={tmp_path / 'run'}", f"checkpoint.load_mode={mode}", f"run.dir={run}"]
    if mode == "continue":
        mixed = ["data.sources=[]", f"data.phases=[{phases}, {later}]", "data.tokenizer=other", "train.steps=0"]
        with pytest.raises(AssertionError, match="was made with another tokenizer"):
            workers.run(1, train_recipe, with_tokenizers, [*loading, *mixed])
        return
    workers.run(1, train_recipe, with_tokenizers, [*loading, *other_data("other")])
    assert "mean different tokens from those of the tokenizer" in (run / "logs/rank_00000.log").read_text()
    workers.run(
        1, train_recipe, with_tokenizers, [*loading, *other_data("chat"), "model.vocab_size=276", f"run.dir={run}2"]
    )
    assert "the end-of-text id of the checkpoint" in Path(f"{run}2/logs/rank_00000.log").read_text()
    assert "is 1, that of the tokenizer" in Path(f"{run}2/logs/rank_00000.log").read_text()


def test_to_hf_and_from_hf_and_generation_tell_of_another_tokenizer(workers, tmp_path, with_tokenizers, caplog):
    workers.run(1, train_recipe, with_tokenizers, ["model.vocab_size=276"])
    folder = find_latest(tmp_path / "run/checkpoints")
    with caplog.at_level(logging.WARNING, "megagap"):
        export(folder, tmp_path / "hf")
        import_model(tmp_path / "hf", tmp_path / "imported")
        load_text_model(tmp_path / "imported")
        assert not caplog.records
        export(folder, tmp_path / "hf_chat", tokenizer=str(tmp_path / "chat"))
        load_text_model(folder, str(tmp_path / "other"))
    told = [record.getMessage() for record in caplog.records]
    wanted = ["the end-of-text id of the checkpoint", "the begin-of-text id of the checkpoint", "mean different tokens"]
    assert len(told) == 3 and all(part in text for part, text in zip(wanted, told, strict=True))
    caplog.clear()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": 999}))
    (tmp_path / "hf/generation_config.json").unlink()
    with caplog.at_level(logging.WARNING, "megagap"):
        import_model(tmp_path / "hf", tmp_path / "again")
    told = [record.getMessage() for record in caplog.records]
    assert any("ends a text with id 999" in text for text in told)
    assert any("eos_token_id = 999 is not an id of the model" in text for text in told)


def test_paths_that_are_not_utf8_go_through_checkpoints_and_exports(workers, tmp_path, with_tokenizers):
    place = tmp_path / "caf\udce9"
    place.mkdir()
    shutil.copytree(tmp_path / "base", place / "tok")
    workers.run(1, train_recipe, with_tokenizers, [f"data.tokenizer={tmp_path / 'base'}"])
    shutil.copytree(tmp_path / "run", place / "run")
    folder = find_latest(place / "run/checkpoints")
    assert export(folder, place / "hf", tokenizer=str(place / "tok")).tokenizer == str(place / "tok")
    import_model(place / "hf", place / "imported")
    loaded = load_text_model(place / "imported")
    assert loaded.tokenizer.eod == 1 and encode_prompt(loaded.tokenizer, "un")
