"""A wrong value is told with an example that is right: for every setting, in a recipe and on a command line."""

import json
import re
import shlex
import tomllib

import pytest
import tomli_w

from megagap.config import load_recipe, parse_overrides
from megagap.config.describe import annotation_of, as_argument, as_toml, describe, example
from megagap.config.settings import SECTIONS, PhaseSettings, RopeScaling, SourceSettings
from megagap.errors import ConfigError
from tests.config.good import GOOD

SETTINGS = [(section, key) for section, kind in SECTIONS.items() for key in kind.model_fields]
WRONG = ["[[[]]]", "{a = {}}", "[{}]", "1979-05-27", "[1, 'x', true]", "[0.9", "a b", "", "-1.5", "true", "[{x = 1}]"]
IN_TOML = [[[[]]], {"a": {}}, [{}], [1, "x", True], "a b", -1.5, True, [{"x": 1}], 7]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(GOOD))
    return path


def complaint(recipe, overrides) -> str:
    try:
        load_recipe(recipe, overrides)
    except ConfigError as error:
        return str(error)
    return ""


def kind_faults(message: str, setting: str) -> list[str]:
    """Those on the type of the value, not on its size or on what else is set."""
    kinds = r"  must be (a (whole )?number, such|a list|a table|true|one of|text|[0-9]+ values|1|adamw|\"adamw\")"
    return [line for line in message.splitlines() if line.startswith(f"  {setting}") and re.search(kinds, line)]


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_the_example_of_a_setting_is_accepted_as_it_is_typed(recipe, section, key):
    annotation = annotation_of(SECTIONS[section].model_fields[key])
    (typed,) = shlex.split(as_argument(example(annotation)))
    assert not kind_faults(complaint(recipe, parse_overrides([f"--{section}.{key}", typed])), f"{section}.{key}")
    assert tomllib.loads(f"x = {as_toml(example(annotation))}")["x"] == example(annotation)


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_wrong_value_on_the_command_line_is_told_how_to_type_a_right_one(recipe, section, key):
    setting = f"{section}.{key}"
    for wrong in WRONG:
        message = complaint(recipe, [f"{setting}={wrong}"])
        for line in kind_faults(message, setting):
            assert re.search(r"such as|one of|true or false|must be (1|adamw)\b", line), line
            if "such as '" in line:  # a list, table or range: quoted for a shell
                shown = re.search(r"such as ('.*?'(?= |;|$))", line)[1]
                (typed,) = shlex.split(shown)
                assert not kind_faults(complaint(recipe, [f"{setting}={typed}"]), setting), line
            elif re.match(rf"  {re.escape(setting)}[\[.]", line):  # within a list or table
                typed = shlex.split(line.partition(f"type it as --{setting} ")[2])
                assert len(typed) == 1 and not kind_faults(complaint(recipe, [f"{setting}={typed[0]}"]), setting), line


@pytest.mark.parametrize(("section", "key"), SETTINGS)
def test_a_wrong_value_in_a_recipe_is_told_how_toml_writes_a_right_one(recipe, section, key):
    setting = f"{section}.{key}"
    for wrong in IN_TOML:
        tree = {name: dict(values) for name, values in GOOD.items()}
        tree.setdefault(section, {})[key] = wrong
        recipe.write_text(tomli_w.dumps(tree))
        for line in kind_faults(complaint(recipe, []), setting):
            assert re.search(r'such as|one of|true or false|must be (1|"adamw")', line) and "such as '" not in line, (
                line
            )
            assert "type it as" not in line


@pytest.mark.parametrize(
    ("annotation", "in_toml", "typed"),
    [
        (int, "a whole number, such as 10", "a whole number, such as 10"),
        (float, "a number, such as 0.001 or 3e-4", "a number, such as 0.001 or 3e-4"),
        (bool, "true or false", "true or false"),
        (str, 'text in quotes, such as "name"', "text, such as name"),
        (list[int] | None, "a list in brackets, such as [2, 2]", "a list in brackets, such as '[2, 2]'"),
        (
            tuple[float, float],
            "2 values in brackets, such as [0.9, 0.95]",
            "2 values in brackets, such as '[0.9, 0.95]'",
        ),
        (
            list[SourceSettings],
            'a list of tables, such as [{path = "prefix_text_document", weight = 1.0}]',
            """a list of tables, such as '[{path = "prefix_text_document", weight = 1.0}]'""",
        ),
    ],
)
def test_each_kind_of_setting_is_described_with_an_example(annotation, in_toml, typed):
    assert describe(annotation) == in_toml
    assert describe(annotation, typed=True) == typed


@pytest.mark.parametrize("table", [SourceSettings, PhaseSettings, RopeScaling])
def test_the_example_of_a_table_is_one(table):
    table.model_validate(tomllib.loads(f"x = {as_toml(example(table))}")["x"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--optim.betas", "[0.9,", "0.95]"], "quote a list as one, --optim.betas '[0.9, 0.95]'"),
        (["--optim.betas", "0.9", "0.95"], "quote a list as one, --optim.betas '[0.9, 0.95]'"),
        (["--parallel.layers_per_stage", "[2,", "2]"], "quote a list as one, --parallel.layers_per_stage '[2, 2]'"),
        (["--data.sources", "[{path", "=", "x}]"], "quote a list as one, --data.sources '[{path = "),
    ],
)
def test_a_list_that_the_shell_cut_apart_is_told_to_be_quoted(arguments, told):
    with pytest.raises(ConfigError) as error:
        parse_overrides(arguments)
    assert told in str(error.value) and repr(arguments[2]) in str(error.value)


def test_a_list_whose_quotes_the_shell_took_is_told_to_be_quoted(recipe):
    message = complaint(recipe, ["data.sources=[{path=a}]"])
    assert "in single quotes: without them, the shell takes the inner ones away" in message


def test_values_are_written_as_toml_reads_them():
    values = {"text": 'a"b\\c\n\té\x7f', "on": True, "n": 3, "x": 1e-5, "list": [1.5, "a"], "table": {"k": [{"a": 1}]}}
    for value in values.values():
        assert tomllib.loads(f"x = {as_toml(value)}")["x"] == value
    assert as_argument("plain") == "plain" and as_argument(["a b"]) == shlex.quote(json.dumps(["a b"]))
