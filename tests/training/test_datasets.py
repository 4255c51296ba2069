"""The data that a recipe names."""

import logging

from megagap.config import load_recipe
from megagap.training.datasets import validation_data
from tests.recipes import write_recipe


def test_held_out_data_that_is_never_evaluated_is_warned_of(tmp_path, caplog):
    held_out = dict(validation=[{"path": "en_text_document"}])
    with caplog.at_level(logging.WARNING, "megagap"):
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out, train=dict(evaluate_every=5))))
        assert not caplog.records
        validation_data(load_recipe(write_recipe(tmp_path, data=held_out)))
    (record,) = caplog.records
    assert "data.validation" in record.getMessage() and "train.evaluate_every = 0" in record.getMessage()
