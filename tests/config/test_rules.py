"""Settings that do not fit together are refused; what one leaves open follows from the others."""

import pytest

from megagap.config import load_recipe
from tests.config.good import faults_of


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
