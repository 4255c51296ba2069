"""Recipes and command lines: what wins, what is no TOML, no setting and no recipe, and every fault at once."""

import pytest
import tomli_w

from megagap.config import load_recipe, parse_overrides
from megagap.config.settings import PLANNED, SECTIONS
from megagap.errors import ConfigError
from tests.config.good import faults_of


def test_command_line_beats_recipe_beats_preset_beats_defaults(recipe):
    settings = load_recipe(recipe(model__num_hidden_layers=6, optim__lr=1e-3), ["optim.lr=2e-3"])
    assert (settings.model.hidden_size, settings.model.num_hidden_layers) == (64, 6)
    assert (settings.optim.lr, settings.optim.eps) == (2e-3, 1e-8)


def test_all_faults_are_reported_at_once_with_rules_between_settings(recipe):
    message = faults_of(recipe(parallel__tp=3, train__steps=-3, optim__learning_rate=1))
    assert message.startswith("config error: ")
    assert "parallel.tp = 3" in message and "possible: 1, 2, 4" in message
    assert "train.steps = -3" in message and "must be at least 0" in message
    assert "optim.learning_rate" in message and "unknown" in message


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("train.stesp=3", "train.steps"),
        ("train.lr=3", "optim.lr"),
        ("modle.preset=tiny", "model.preset"),
        ("optim.learning_rat=3", "optim.lr"),
    ],
)
def test_an_unknown_setting_names_the_nearest_real_one(recipe, given, nearest):
    assert f"did you mean {nearest}?" in faults_of(recipe(), [given])


@pytest.mark.parametrize(
    ("changes", "setting", "hint"),
    [
        ({"data__sources": [{"path": "a"}, {"pth": "x"}]}, "data.sources[1].pth", "did you mean data.sources[1].path?"),
        (
            {"data__phases": [{"name": "x", "tokens": 1, "sources": [{"path": "a", "weigth": 2.0}]}]},
            "data.phases[0].sources[0].weigth",
            "did you mean data.phases[0].sources[0].weight?",
        ),
        ({"data__validation": [{"path": "a", "q": 1}]}, "data.validation[0].q", "possible: path, weight, name"),
        ({"model__rope_scaling": {"factr": 2.0}}, "model.rope_scaling.factr", "did you mean model.rope_scaling.factor"),
    ],
)
def test_an_unknown_key_of_a_table_within_a_setting_names_its_neighbours(recipe, changes, setting, hint):
    (line,) = [line for line in faults_of(recipe(**changes)).splitlines() if f"  {setting} = " in line]
    assert "unknown" in line and hint in line


PLANNED_VALUES = {
    "run.wandb": ("false", "true"),
}


@pytest.mark.parametrize(("setting", "values"), PLANNED_VALUES.items())
def test_a_setting_to_come_can_be_given_its_default_only_and_is_not_called_unknown(recipe, setting, values):
    default, other = values
    assert load_recipe(recipe(), [f"{setting}={default}"]) == load_recipe(recipe())
    message = faults_of(recipe(), [f"{setting}={other}"])
    assert f"{setting} = " in message and "not yet supported" in message and "unknown" not in message


def test_no_setting_is_both_there_and_to_come():
    for section, keys in PLANNED.items():
        assert not keys.keys() & SECTIONS[section].model_fields.keys()


def test_numbers_beyond_any_use_are_faults(recipe):
    assert "must be at most" in faults_of(recipe(), [f"train.steps={2**61}"])
    assert "must be at most 256" in faults_of(recipe(), ["data.workers=100000"])
    assert "train.steps" in faults_of(recipe(), ["train.steps=1" + "0" * 5000])


def test_a_resolved_recipe_loads_to_the_same_settings(recipe, tmp_path):
    settings = load_recipe(recipe(parallel__tp=2))
    (tmp_path / "again.toml").write_text(tomli_w.dumps(settings.model_dump(exclude_none=True)))
    assert load_recipe(tmp_path / "again.toml") == settings


def test_broken_toml_and_a_missing_recipe_are_config_errors(tmp_path):
    (tmp_path / "bad.toml").write_text("[model\n")
    assert "not valid TOML" in faults_of(tmp_path / "bad.toml")
    assert "cannot read the recipe" in faults_of(tmp_path / "none.toml")
    for text in (b"x = 1" + b"0" * 5000, b"x = " + b"[" * 100_000, b"\xff"):
        (tmp_path / "odd.toml").write_bytes(text)
        assert "not valid TOML" in faults_of(tmp_path / "odd.toml")


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("[train]\nlr = .001\n", 2, "write lr = 0.001"),
        ("[train]\nx = True\n", 2, "write x = true"),
        ("[train]\n\nx = None\n", 3, "leave the line out for the default"),
        ("[train]\npath = some/path here\n", 2, 'write path = "some/path here"'),
        ("[train]\nlr = 0,1\n", 2, "write lr = 0.1"),
        ("[train]\nsteps = 010\n", 2, "write steps = 10"),
        ("[train]\nlr = 1e-3.0\n", 2, "lr = 1e-3.0"),
        ("[train\n", 1, "expected ']'"),
        ("[train]\nsteps = 1\nsteps = 2\n", 3, "this key is given twice"),
        ("[train]\nx = [1, 2\n", 3, "unclosed array"),
        ("steps 10", 1, "expected '='"),
        ("a = 1\r\nb = 2\rc", 2, "expected newline"),
    ],
)
def test_broken_toml_is_told_with_its_line_and_what_to_write(tmp_path, text, line, told):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode())
    message = faults_of(path)
    assert message.startswith(f"config error: {path}:{line}") and "is not valid TOML" in message
    assert told in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"train": {"steps": 3}}', "looks like JSON"),
        (b"[1, 2]", "looks like JSON"),
        ("[train]".encode("utf-16"), "it is UTF-16"),
        (b"a = 1\nb = '\xff'", ":2 is not valid TOML: it is not UTF-8 text (byte 0xff)"),
        (b"PK\3\4" + bytes(100), "NUL characters"),
        (b"x = 1" + b"0" * 5000, "too many digits"),
        (b"x = " + b"[" * 100_000, "nested too deeply"),
        (b"a." * 3000 + b"b = 1", "unknown"),
        (b"[train]\nsteps" + b".a" * 3000 + b" = 1", "train.steps"),
        (b"[data]\nsources" + b".a" * 3000 + b" = 1", "data.sources"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_recipe_is_told_what_it_looks_like(tmp_path, content, told):
    (tmp_path / "odd.toml").write_bytes(content)
    assert told in faults_of(tmp_path / "odd.toml")


def test_a_recipe_saved_with_a_byte_order_mark_is_read(recipe):
    path = recipe()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_recipe(path).train.steps == 10


def test_a_folder_an_endless_device_and_a_circle_of_links_are_no_recipes(tmp_path):
    assert "it is a folder" in faults_of(tmp_path)
    (tmp_path / "config.toml").touch()
    assert f"the recipe of that run is {tmp_path}/config.toml" in faults_of(tmp_path)
    assert "larger than 16 MiB" in faults_of("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in (tmp_path / "loop", "x" * 5000, tmp_path / "config.toml" / "x"):
        assert "cannot read the recipe" in faults_of(place)


def test_overrides_are_read_with_and_without_equals_sign():
    assert parse_overrides(["--train.steps", "3", "--run.dir=x=y"]) == ["train.steps=3", "run.dir=x=y"]
    for wrong in (["--train.steps"], ["train.steps", "3"], ["--steps", "3"]):
        with pytest.raises(ConfigError):
            parse_overrides(wrong)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--train.steps"], "--train.steps needs a value"),
        (["--train.steps", "--train.seed", "3"], "--train.steps needs a value"),
        (["--train.steps", "3", "--train.steps=4"], "--train.steps is given twice, 3 and 4"),
        (["train.steps=10"], "did you mean --train.steps?"),
        (["-train.steps", "3"], "did you mean --train.steps?"),
        (["--steps", "10"], "did you mean --train.steps?"),
        (["x"], "settings are given as --section.key value"),
    ],
)
def test_arguments_that_are_no_settings_are_told_how_to_write_them(arguments, told):
    with pytest.raises(ConfigError) as error:
        parse_overrides(arguments)
    assert told in str(error.value)


def test_values_of_a_command_line_may_repeat_be_negative_or_in_quotes(recipe):
    assert parse_overrides(["--a.b", "-5", "--a.b=-5", "--c.d="]) == ["a.b=-5", "c.d="]
    assert load_recipe(recipe(), ['checkpoint.load="latest"', "run.dir=2026"]).checkpoint.load == "latest"
    assert load_recipe(recipe(), ["run.dir=2026"]).run.dir.endswith("/2026")
    assert load_recipe(recipe(), ['checkpoint.load=""']).checkpoint.load == ""
