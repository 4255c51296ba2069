"""What a setting must be is said in our words, in the help and where it is not."""

import pytest

from megagap.config import describe_settings, load_recipe
from megagap.config.describe import describe
from megagap.config.settings import SECTIONS
from megagap.errors import ConfigError
from tests.config.good import faults_of


def test_help_describes_every_setting():
    text = describe_settings()
    for section, kind in SECTIONS.items():
        for key, field in kind.model_fields.items():
            assert f"--{section}.{key} " in text and field.description, (section, key)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_setting_says_in_our_words_what_it_must_be(recipe, section):
    for key, field in SECTIONS[section].model_fields.items():
        for value in ("[[[]]]", "{a = {}}", "[{}]", "1979-05-27", "[1, 'x', true]", "nan", str(2**70), "true"):
            try:
                load_recipe(recipe(), [f"{section}.{key}={value}"])
            except ConfigError as error:
                assert "nput should" not in str(error) and "alid" not in str(error).replace("validation", ""), error
        assert describe(field.annotation)


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("optim.lr", ".001", "must be a number, such as 0.001 or 3e-4; write 0.001"),
        ("optim.lr", "3e-4.0", "must be a number"),
        ("optim.lr", "0,001", "write 0.001"),
        ("optim.lr", "True", "must be a number"),
        ("optim.lr", "None", "leave the setting out for its default"),
        ("optim.lr", "", "leave the setting out for its default"),
        ("optim.lr", "[1,2", "a bracket is not closed"),
        ("optim.lr", "'0.1'", "write 0.1"),
        ("optim.lr", "nan", "must be a finite number"),
        ("optim.lr", "-inf", "must be a finite number"),
        ("optim.lr", "1e400", "must be a finite number"),
        ("optim.lr", "-0.0", "must be above 0"),
        ("optim.lr", "1" + "0" * 400, "too many digits"),
        ("optim.lr", "0x" + "f" * 5000, "too many digits"),
        ("optim.lr", "[" * 200 + "]" * 200, "must be a number"),
        ("train.steps", "010", "must be a whole number, such as 10; write 10"),
        ("train.steps", "10.0", "write 10"),
        ("train.steps", "1e1", "write 10"),
        ("train.steps", "1,000", "write 1000"),
        ("train.steps", "ten", "must be a whole number"),
        ("train.steps", "9" * 5000, "too many digits"),
        ("train.steps", "2024-01-01", "must be a whole number"),
        ("train.steps", "{a = 1}", "must be a whole number"),
        ("model.head_dim", "3", "must be a multiple of 2"),
        ("optim.betas", "0.9,0.95", "write '[0.9, 0.95]'"),
        ("optim.betas", ".9 .95", "write '[0.9, 0.95]'"),
        ("optim.betas", "[0.9]", "must be 2 values in brackets, such as '[0.9, 0.95]'"),
        ("optim.betas", "[0.9, 0.95, 1]", "must be 2 values in brackets"),
        ("optim.betas", "[0.9, 'x']", "must be a number"),
        ("optim.betas", "['0.9', 0.95]", "must be a number"),
        ("data.sources", "path", """write '[{path = "path"}]'"""),
        ("data.sources", "['a']", "must be a table, such as {path = "),
        ("data.sources", "[{path = 3}]", "must be text in quotes"),
        ("data.sources", "[{weight = 1}]", "is required: text in quotes"),
        ("data.sources", "[{path = 'a', weight = 'x'}]", "must be a number"),
        ("data.sources", '[{path = "a\\u0000"}]', "has a NUL character"),
        ("data.document_mask", "True", "must be true or false; write true"),
        ("data.document_mask", "1", "write true"),
        ("parallel.sequence_parallel", "no", "write false"),
        ("parallel.layers_per_stage", "2,2", "write '[2, 2]'"),
        ("train.skip_samples", "1:2", """write '["1:2"]'"""),
        ("model.rope_scaling", "llama3", """must be a table, such as '{rope_type = "llama3", factor = 8.0, """),
        ("train.precision", "bf16", "must be one of fp32, bf16-mixed, bf16-pure, fp16-mixed; did you mean bf16-mixed?"),
        ("data.split", "[98, 2, 0]", "three shares"),
        ("run.dir", "a\0b", "has a NUL character"),
        ("run.dir", "a\udcff", "is not valid UTF-8"),
    ],
)
def test_a_value_that_is_none_is_told_what_TOML_wants(recipe, setting, value, wanted):
    message = faults_of(recipe(), [f"{setting}={value}"])
    (line,) = [line for line in message.splitlines() if line.startswith(f"  {setting}")]
    assert wanted in line
    assert "input should be" not in message.lower() and "pydantic" not in message
