"""Recipes: every fault is found at once and named; presets have the published shapes."""

from pathlib import Path

import pytest
import tomli_w
import torch
from transformers import AutoModelForCausalLM

from megagap.config import describe_settings, load_recipe, parse_overrides, timeline_of
from megagap.config.describe import describe
from megagap.config.presets import presets
from megagap.config.settings import SECTIONS
from megagap.errors import ConfigError
from megagap.model.flops import flops_per_token
from megagap.model.shapes import model_tensors, parameter_count
from tests.huggingface import reference_config

GOOD = {
    "model": {"preset": "tiny"},
    "data": {"sources": [{"path": "fr_text_document"}]},
    "train": {"steps": 10, "global_batch_size": 8, "sequence_length": 64},
}


@pytest.fixture
def recipe(tmp_path):
    def write(**changes) -> Path:
        tree = {section: dict(settings) for section, settings in GOOD.items()}
        for name, value in changes.items():
            section, key = name.split("__")
            tree.setdefault(section, {})[key] = value
        path = tmp_path / "recipe.toml"
        path.write_text(tomli_w.dumps(tree))
        return path

    return write


def faults_of(path, overrides=(), world_size=None) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe(path, overrides, world_size)
    return str(error.value)


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


@pytest.mark.parametrize(
    ("changes", "rounding", "moments"),
    [
        ({}, None, "fp32"),
        ({"train__precision": "bf16-pure"}, "stochastic", "bf16"),
        ({"train__precision": "bf16-pure", "optim__name": "muon"}, "kahan", "bf16"),
        ({"train__precision": "bf16-pure", "optim__moments_dtype": "fp32"}, "stochastic", "fp32"),
    ],
    ids=str,
)
def test_what_bf16_pure_keeps_and_how_it_rounds_by_default(recipe, changes, rounding, moments):
    optim = load_recipe(recipe(**changes)).optim
    assert (optim.rounding, optim.moments_dtype) == (rounding, moments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__rounding": "stochastic"}, 'applies only to train.precision = "bf16-pure"'),
        ({"train__precision": "bf16-mixed", "optim__rounding": "nearest"}, "applies only to train.precision"),
        (
            {"train__precision": "bf16-pure", "optim__name": "muon", "optim__rounding": "stochastic"},
            'must be "kahan" with optim.name = "muon"',
        ),
    ],
    ids=str,
)
def test_a_rounding_that_would_not_be_made_is_refused(recipe, changes, message):
    assert (
        f"optim.rounding = {changes['optim__rounding']!r}  " in (text := faults_of(recipe(**changes)))
        and message in text
    )


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
    from megagap.config.settings import PLANNED, SECTIONS

    for section, keys in PLANNED.items():
        assert not keys.keys() & SECTIONS[section].model_fields.keys()


def test_a_tokenizer_that_is_nowhere_is_a_fault_with_the_place_looked_at(recipe, tmp_path):
    for given in ("bpe/tokenizer.json", "hf:bpe", "bpe" + "x" * 5000):
        message = faults_of(recipe(data__tokenizer=given))
        assert f"{tmp_path}/bpe" in message and "does not exist" in message
    (tmp_path / "bpe").mkdir()
    assert load_recipe(recipe(data__tokenizer="hf:bpe")).data.tokenizer == f"hf:{tmp_path / 'bpe'}"
    assert load_recipe(recipe(data__tokenizer="none"), needs_data=False).data.tokenizer == f"{tmp_path / 'none'}"


@pytest.mark.parametrize(
    ("changes", "world_size", "complaint"),
    [
        ({"parallel__tp": 3}, None, "does not divide model.num_attention_heads"),
        ({"model__num_key_value_heads": 3}, None, "does not divide model.num_attention_heads"),
        ({"parallel__pp": 5}, None, "a stage would have no layers"),
        (
            {"parallel__pp": 2, "parallel__layers_per_stage": [1, 1]},
            None,
            "one layer count per stage (2), summing to 4",
        ),
        ({"parallel__vpp": 2, "parallel__schedule": "1f1b"}, None, "must be 1 with parallel.schedule = 1f1b"),
        ({"parallel__vpp": 2, "parallel__schedule": "zb-h1"}, None, "schedules for 2: gpipe, interleaved, zb-v"),
        ({"parallel__vpp": 1, "parallel__schedule": "zb-v"}, None, "must be 2 with parallel.schedule = zb-v"),
        ({"parallel__pp": 3, "parallel__vpp": 2}, None, "parallel.pp × parallel.vpp = 6  exceeds model.num_hidden"),
        ({"parallel__pp": 2, "parallel__vpp": 2**50}, None, "must be at most 65,536 stages"),
        (
            {"parallel__pp": 4, "parallel__vpp": 2, "parallel__layers_per_stage": "balanced"},
            None,
            "exceeds model.num_hidden_layers = 4 by more than the first and the last stage",
        ),
        (
            {"parallel__pp": 2, "parallel__vpp": 2, "parallel__layers_per_stage": [2, 2]},
            None,
            "one layer count per stage (4 = pp 2 × vpp 2), summing to 4",
        ),
        (
            {"parallel__pp": 2, "parallel__vpp": 2, "parallel__layers_per_stage": [2, 0, 1, 1]},
            None,
            "each middle stage at least 1 layer",
        ),
        ({"parallel__layers_per_stage": "balance"}, None, 'such as [2, 2] or "balanced"; did you mean "balanced"?'),
        ({"train__sequence_length": 4096}, None, "exceeds model.max_position_embeddings = 2048"),
        ({"parallel__tp": 2, "train__sequence_length": 63}, None, "must be a multiple of parallel.tp = 2"),
        ({"parallel__sequence_parallel": True}, None, "needs parallel.tp > 1"),
        ({"train__micro_batch_size": 3}, None, "does not divide train.global_batch_size"),
        ({"model__vocab_size": 2**57}, None, "model.vocab_size = 144115188075855872"),
        ({"model__intermediate_size": 2**57}, None, "makes a matrix of more than 2^58 elements"),
        ({"model__num_attention_heads": 2**57, "model__head_dim": 8}, None, "makes a matrix of more than 2^58"),
        ({"parallel__tp": 2}, 3, "the 3 processes of this run; numbers of processes that fit: 2, 4, 8"),
        ({"train__micro_batch_size": 4}, 4, "4 data-parallel ranks × train.micro_batch_size = 4; numbers of processes"),
        ({"train__batch_ramp": [[200, 16], [100, 32]]}, None, "by ascending numbers of tokens"),
        ({"train__batch_ramp": [[100, 16], [100, 32]]}, None, "by ascending numbers of tokens"),
        ({"train__batch_ramp": [[0, 16]]}, None, "train.batch_ramp[0][0]"),
        ({"train__batch_ramp": [[100, 15]], "train__micro_batch_size": 2}, None, "train.batch_ramp[0] = 15"),
        ({"train__batch_ramp": [[100, 10]]}, 4, "train.batch_ramp[0] = 10"),
        ({"train__batch_ramp": [[100]]}, None, "train.batch_ramp[0]"),
        ({"train__compile": True, "train__recompute": "selective"}, None, "cannot be combined with train.compile"),
        (
            {"checkpoint__load_mode": "cooldown", "checkpoint__load": "x", "optim__schedule": "constant"},
            None,
            'must decay with checkpoint.load_mode = "cooldown"',
        ),
        (
            {"checkpoint__load_mode": "cooldown", "checkpoint__load": "x", "optim__warmup_steps": 2},
            None,
            'must be 0 with checkpoint.load_mode = "cooldown"',
        ),
        ({"parallel__dp_replicate": 3}, 4, "parallel.dp_replicate = 3  does not divide the 4 data-parallel ranks"),
        ({"parallel__dp_replicate": 2, "parallel__tp": 2}, 2, "does not divide the 1 data-parallel rank of this run"),
        ({"parallel__dp_replicate": 0}, None, "parallel.dp_replicate = 0"),
        ({"optim__zero": 4}, None, "optim.zero = 4"),
        ({"train__steps": 0}, None, "either train.steps or train.tokens"),
        ({"train__tokens": 100}, None, "not both"),
        ({"optim__schedule": "wsd"}, None, "must be at least 1"),
        ({"optim__cooldown_steps": 3}, None, 'applies only to optim.schedule = "wsd"'),
        ({"optim__warmup_steps": 11}, None, "exceeds the run's 10 steps"),
        ({"train__steps": 0, "train__tokens": 512, "optim__warmup_steps": 2}, None, "exceeds the run's 1 step"),
        ({"data__split": "98, 0.0,2", "train__evaluate_every": 5}, None, "needs a held-out set"),
        ({"model__preset": ["tiny"]}, None, "model.preset"),
        ({"optim__min_lr": 1.0}, None, "must not exceed optim.lr"),
        ({"data__split": "98,2"}, None, "three shares"),
        ({"data__sources": []}, None, "is required"),
        ({"data__sources": [{"path": "a/x"}, {"path": "b/x"}]}, None, "is the name of two sources"),
        ({"train__evaluate_every": 5}, None, "needs a held-out set"),
        ({"model__preset": "llama4"}, None, "possible: tiny, llama3-8b"),
        ({"train__steps": "10"}, None, "train.steps = '10'"),
        ({"train__precision": "fp8"}, None, 'must be one of "fp32", "bf16-mixed"'),
        ({"optim__lr": float("nan")}, None, "optim.lr"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(recipe, changes, world_size, complaint):
    assert complaint in faults_of(recipe(**changes), world_size=world_size)


def test_a_headless_model_has_no_use_for_an_output_projection_or_a_z_loss(recipe):
    message = faults_of(recipe(model__headless=True, train__z_loss=1e-4))
    assert "model.tie_word_embeddings = False" in message and "must be true with model.headless" in message
    assert "train.z_loss = 0.0001" in message and "must be 0 with model.headless" in message


def test_broken_toml_and_a_missing_recipe_are_config_errors(tmp_path):
    (tmp_path / "bad.toml").write_text("[model\n")
    assert "not valid TOML" in faults_of(tmp_path / "bad.toml")
    assert "cannot read the recipe" in faults_of(tmp_path / "none.toml")
    for text in (b"x = 1" + b"0" * 5000, b"x = " + b"[" * 100_000, b"\xff"):
        (tmp_path / "odd.toml").write_bytes(text)
        assert "not valid TOML" in faults_of(tmp_path / "odd.toml")


def test_numbers_beyond_any_use_are_faults(recipe):
    assert "must be at most" in faults_of(recipe(), [f"train.steps={2**61}"])
    assert "must be at most 256" in faults_of(recipe(), ["data.workers=100000"])
    assert "train.steps" in faults_of(recipe(), ["train.steps=1" + "0" * 5000])


def test_tokens_become_whole_steps(recipe):
    settings = load_recipe(recipe(train__steps=0, train__tokens=8 * 64 * 3 + 1))
    assert settings.train.steps == 4


def test_source_paths_are_relative_to_the_recipe_and_globs_expand(recipe, tmp_path):
    for shard in ("b", "a"):
        (tmp_path / f"web_{shard}_text_document.idx").touch()
    settings = load_recipe(
        recipe(data__sources=[{"path": "web_*"}, {"path": "x/fr_text_document", "name": "français"}])
    )
    web, french = settings.data.sources
    assert web.paths == [str(tmp_path / f"web_{shard}_text_document") for shard in "ab"]
    assert french.paths == [str(tmp_path / "x/fr_text_document")] and french.name == "français"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_source_may_be_named_by_one_of_its_files(recipe, tmp_path, ending):
    for shard in ("b", "a"):
        (tmp_path / f"web_{shard}_text_document.idx").touch()
    settings = load_recipe(recipe(data__sources=[{"path": f"web_*{ending}"}, {"path": f"fr_text_document{ending}"}]))
    web, french = settings.data.sources
    assert web.paths == [str(tmp_path / f"web_{shard}_text_document") for shard in "ab"]
    assert french.paths == [str(tmp_path / "fr_text_document")] and french.name == "fr"


def test_a_source_named_by_a_file_is_noted_so_that_the_ending_is_left_out(recipe, tmp_path):
    sources = [{"path": "fr_text_document.bin"}, {"path": ["en_text_document.idx", "de_text_document"]}]
    for settings in (load_recipe(recipe(data__sources=sources)), load_recipe(recipe(data__validation=sources))):
        assert settings.notes == (
            "the source fr_text_document.bin is named by one of its files: leave .bin out, the prefix names the pair",
            "the source en_text_document.idx is named by one of its files: leave .idx out, the prefix names the pair",
        )
    (tmp_path / "odd.bin.idx").touch()  # a pair whose prefix ends so
    assert load_recipe(recipe(data__sources=[{"path": "odd.bin"}])).notes == ()


def test_a_folder_with_brackets_in_its_name_is_no_pattern(recipe, tmp_path):
    for folder in ("e1", "e[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "fr_text_document.idx").touch()
    path = recipe().rename(tmp_path / "e[1]" / "recipe.toml")
    assert load_recipe(path).data.sources[0].paths == [str(tmp_path / "e[1]" / "fr_text_document")]


def test_a_resolved_recipe_loads_to_the_same_settings(recipe, tmp_path):
    settings = load_recipe(recipe(parallel__tp=2))
    (tmp_path / "again.toml").write_text(tomli_w.dumps(settings.model_dump(exclude_none=True)))
    assert load_recipe(tmp_path / "again.toml") == settings


def test_overrides_are_read_with_and_without_equals_sign():
    assert parse_overrides(["--train.steps", "3", "--run.dir=x=y"]) == ["train.steps=3", "run.dir=x=y"]
    for wrong in (["--train.steps"], ["train.steps", "3"], ["--steps", "3"]):
        with pytest.raises(ConfigError):
            parse_overrides(wrong)


@pytest.mark.parametrize(
    ("preset", "overrides", "parameters"),
    [
        ("gaperon-1b", [], 1_498_482_688),
        ("gaperon-1b", ["model.tie_word_embeddings=true"], 1_235_814_400),
        ("llama3.2-1b", [], 1_235_814_400),
        ("llama3-8b", [], 8_030_261_248),
        ("llama3.1-8b", [], 8_030_261_248),
        ("llama3.1-70b", [], 70_553_706_496),
        ("llama3.2-3b", [], 3_212_749_824),
        ("gaperon-8b", [], 8_030_261_248),
        ("gaperon-24b", [], 23_543_772_160),
    ],
)
def test_presets_have_the_published_parameter_counts(recipe, preset, overrides, parameters):
    model = load_recipe(recipe(model__preset=preset), overrides).model
    assert parameter_count(model) == parameters


@pytest.mark.parametrize("preset", [name for name in presets() if name.startswith("llama")])
def test_presets_have_the_shapes_that_transformers_builds(recipe, preset):
    model = load_recipe(recipe(model__preset=preset)).model
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(reference_config(model))
    tied = {"lm_head.weight"} if model.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items() if name not in tied}
    assert shapes == model_tensors(model)


SCALED = {"llama3.1-8b": 8.0, "llama3.1-70b": 8.0, "llama3.2-1b": 32.0, "llama3.2-3b": 32.0}


@pytest.mark.parametrize("preset", presets())
def test_presets_have_the_published_wavelengths_lengths_and_ties(recipe, preset):
    model = load_recipe(recipe(model__preset=preset)).model
    assert (model.rope_scaling.factor if model.rope_scaling else None) == SCALED.get(preset)
    assert model.tie_word_embeddings == preset.startswith("llama3.2")
    if model.rope_scaling:
        bands = (model.rope_scaling.low_freq_factor, model.rope_scaling.high_freq_factor)
        assert (*bands, model.rope_scaling.original_max_position_embeddings) == (1.0, 4.0, 8192)
        assert (model.max_position_embeddings, model.rope_theta) == (131072, 500000.0)


def test_help_and_errors_name_every_preset(recipe):
    told = [describe_settings(200), faults_of(recipe(model__preset="llama9"))]
    assert all(preset in text for preset in presets() for text in told)


def test_flops_per_token_follow_the_formula_by_hand(recipe):
    """hidden 64, 4 layers, q 64, kv 32, ffn 176, vocabulary 512, 64 tokens."""
    flops = flops_per_token(load_recipe(recipe()).model, 64)
    matrices = 6 * (4 * (64 * (64 + 64) + 64 * 64 + 3 * 64 * 176) + 64 * 512)
    assert flops.full == matrices + 12 * 4 * 64 * 64
    assert flops.causal == matrices + 6 * 4 * 64 * 64


def test_a_headless_model_computes_a_score_for_each_token_of_the_sequence_and_no_logits(recipe):
    overrides = ["model.tie_word_embeddings=true", "model.headless=true"]
    whole, headless = (flops_per_token(load_recipe(recipe(), given).model, 48) for given in ([], overrides))
    assert whole.full - headless.full == whole.causal - headless.causal == 6 * 64 * (512 - 48)


def test_help_describes_every_setting():
    text = describe_settings()
    for section, kind in SECTIONS.items():
        for key, field in kind.model_fields.items():
            assert f"--{section}.{key} " in text and field.description, (section, key)


WEB, CODE = {"path": "web_text_document", "weight": 0.7}, {"path": "code_text_document", "weight": 0.3}


def in_phases(*phases, **more):
    return {"data__sources": [], "data__phases": list(phases), "train__steps": 0} | more


def phase(name, steps, **more):
    """Of so many steps of the good recipe."""
    return {"name": name, "tokens": steps * 8 * 64, "sources": [WEB, CODE]} | more


def test_phases_make_the_length_of_the_run_and_end_at_whole_steps(recipe):
    phases = [phase("a", 3, tokens=2 * 512 + 1), phase("b", 4, sequence_length=128, rope_theta=5e4)]
    settings = load_recipe(recipe(**in_phases(*phases)))
    assert settings.train.steps == 3 + 2
    assert [(p.sequence_length, p.rope_theta) for p in settings.data.phases] == [(64, 10000.0), (128, 50000.0)]
    assert settings.data.phases[0].sources[0].name == "web"
    timeline = timeline_of(settings)
    assert [timeline.at(step).phase.name for step in (1, 3, 4, 5, 6)] == ["a", "a", "b", "b", "b"]
    assert [timeline.last_step(phase) for phase in timeline.phases] == [3, 5]
    assert [timeline.at(step).consumed_tokens for step in (0, 1, 3, 4, 5)] == [0, 512, 1536, 2560, 3584]


@pytest.mark.parametrize(("tokens", "steps"), [(1, 1), (1536, 3), (1537, 4), (2561, 5)])
def test_tokens_of_a_run_in_phases_become_steps_of_their_lengths(recipe, tokens, steps):
    phases = [phase("a", 3), phase("b", 4, sequence_length=128)]
    assert load_recipe(recipe(**in_phases(*phases, train__tokens=tokens))).train.steps == steps


@pytest.mark.parametrize(
    ("phases", "more", "complaint"),
    [
        ([phase("a", 3)], {"train__steps": 4}, "end after 3 steps, but the run has 4"),
        ([phase("a", 3)], {"train__tokens": 3 * 512 + 1}, "end after 3 steps, but the run has 4"),
        ([phase("a", 3)], {"data__sources": [WEB]}, "set either data.sources or data.phases, not both"),
        ([phase("a", 3)], {"data__order": "megatron"}, "does not support data.phases"),
        ([phase("a", 3), phase("a", 3)], {}, "is the name of two phases"),
        ([phase("a", 3, sources=[])], {}, "data.phases[0].sources"),
        ([phase("a", 3, sources=[WEB, WEB])], {}, "data.phases[0].sources = 'web'  is the name of two sources"),
        ([phase("a", 3, sources=[{"path": []}])], {}, "has a source whose path is an empty list"),
        ([phase("a", 3), phase("b", 3, sources=[{"path": "x/web"}, WEB])], {}, "is the name of two sources"),
        ([phase("a", 3), phase("b", 3, sources=[{"path": "x/web"}])], {}, "names other data than in an earlier phase"),
        ([phase("a", 3, sequence_length=4096)], {}, "data.phases[0].sequence_length = 4096"),
        ([phase("a", 3, sequence_length=63)], {"parallel__tp": 2}, "data.phases[0].sequence_length = 63"),
        ([phase("a", 0)], {}, "data.phases[0].tokens = 0"),
        ([phase("a", 3, tokes=1)], {}, "did you mean data.phases[0].tokens?"),
        ([phase("a", 3)], {"optim__warmup_steps": 4}, "exceeds the run's 3 steps"),
    ],
)
def test_phases_that_are_no_plan_are_refused(recipe, phases, more, complaint):
    assert complaint in faults_of(recipe(**in_phases(*phases, **more)))


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


def test_paths_that_cannot_be_made_absolute_are_faults(recipe, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = recipe()
    assert "run.dir" in faults_of(path, [f"run.dir={tmp_path}/loop/x"])
    odd = tmp_path / "\udcff"
    odd.mkdir()
    path.rename(odd / "recipe.toml")
    assert "is not valid UTF-8" in faults_of(odd / "recipe.toml")
    (odd / "recipe.toml").rename(path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory was removed" in faults_of(path)


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


@pytest.mark.parametrize(
    ("changes", "schedule", "vpp", "layers", "places"),
    [
        ({}, "1f1b", 1, [2, 2], [0, 1]),
        ({"parallel__vpp": 2}, "interleaved", 2, [1, 1, 1, 1], [0, 1, 0, 1]),
        ({"parallel__schedule": "interleaved"}, "interleaved", 2, [1, 1, 1, 1], [0, 1, 0, 1]),
        ({"parallel__schedule": "interleaved", "parallel__vpp": 1}, "interleaved", 1, [2, 2], [0, 1]),
        ({"parallel__schedule": "zb-v"}, "zb-v", 2, [1, 1, 1, 1], [0, 1, 1, 0]),
        ({"parallel__schedule": "gpipe", "parallel__vpp": 2}, "gpipe", 2, [1, 1, 1, 1], [0, 1, 0, 1]),
        ({"parallel__schedule": "zb-h1", "parallel__layers_per_stage": "balanced"}, "zb-h1", 1, [2, 2], [0, 1]),
        (
            {"parallel__vpp": 2, "parallel__layers_per_stage": "balanced", "model__vocab_size": 100_000},
            *("interleaved", 2, [2, 1, 1, 0], [0, 1, 0, 1]),
        ),
    ],
)
def test_schedule_virtual_stages_and_layers_follow_from_each_other(recipe, changes, schedule, vpp, layers, places):
    settings = load_recipe(recipe(parallel__pp=2, **changes))
    parallel = settings.parallel
    assert (parallel.schedule, parallel.vpp, parallel.layers_per_stage) == (schedule, vpp, layers)
    assert [place.rank for place in settings.placement.places] == places
