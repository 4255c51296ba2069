"""The data that a recipe names."""

import logging

import pytest

from megagap.config import load_recipe
from megagap.data.bpe import train_tokenizer
from megagap.data.preprocess import preprocess
from megagap.errors import DataError
from megagap.training.datasets import training_data, validation_data
from tests.recipes import write_recipe


def test_held_out_data_that_is_never_evaluated_is_warned_of(tmp_path, caplog):
    held_out = dict(validation=[{"path": "en_text_document"}])
    with caplog.at_level(logging.WARNING, "megagap"):
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out, train=dict(evaluate_every=5))))
        assert not caplog.records
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out)))
    (record,) = caplog.records
    assert "data.validation" in record.getMessage() and "train.evaluate_every = 0" in record.getMessage()


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
