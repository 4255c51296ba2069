import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from megagap.checkpoint import Index, save_checkpoint
from megagap.checkpoint.huggingface import export, plan_shards
from megagap.config import Model
from megagap.errors import CheckpointError, DataError
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from megagap.tokenizer import load_tokenizer
from tests.huggingface import OLMO2, reference_model
from tests.models import SCALING, tiny_model

LLAMA3_SCALING = SCALING.model_dump()
MODEL = tiny_model(hidden_size=16, intermediate_size=24, vocab_size=300, rope_theta=10000.0).model_dump(mode="json")


def reference(**changes: Any) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A random model of ``transformers``, and the settings of the same model."""
    settings = MODEL | changes
    shape = {key: value for key, value in settings.items() if key not in ("preset", "rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", **(settings["rope_scaling"] or {}), "rope_theta": settings["rope_theta"]}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model, settings


def save_model(
    folder: Path, model: LlamaForCausalLM, settings: dict[str, Any], precision: str = "fp32", tokenizer: str = ""
) -> Path:
    """Its weights as a checkpoint, in uneven flat slices."""
    parts = [
        Slice("weight", whole(name, tuple(tensor.shape)), start, stop, tensor.detach().reshape(-1)[start:stop])
        for name, tensor in model.named_parameters()
        for start, stop in ((0, tensor.numel() // 3), (tensor.numel() // 3, tensor.numel()))
    ]
    state = {"model": settings, "data": {"tokenizer": tokenizer}, "train": {"precision": precision}}
    save_checkpoint(folder, parts, state)
    return folder


VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3_scaling": {"rope_scaling": LLAMA3_SCALING},
}


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_scaled_norm_gains_are_exported_as_the_run_computed_with_them(
    tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    model, settings = reference(norm_gain_scale=20.0)
    export(save_model(tmp_path / "checkpoint", model, settings, precision), tmp_path / "hf")
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    for name, master in model.state_dict().items():
        computed_with = master.to(dtype)
        is_gain = "norm" in name
        assert torch.equal(exported[name], (20 * computed_with.float()).to(dtype) if is_gain else computed_with), name


@pytest.mark.parametrize("max_shard_size", [10**9, 10_000])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_transformers_loads_an_exported_model_bit_for_bit(
    tmp_path: Path, changes: dict[str, Any], max_shard_size: int
) -> None:
    model, settings = reference(**changes)
    checkpoint = save_model(tmp_path / "step_1", model, settings)
    result = export(checkpoint, tmp_path / "hf", max_shard_size=max_shard_size)
    loaded: Any
    report: Any
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)  # type: ignore[misc]
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert next(loaded.parameters()).dtype == torch.float32
    assert (len(result.files) > 1) == (max_shard_size == 10_000)
    tokens = torch.randint(0, settings["vocab_size"], (2, 48))
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_tied_model_has_no_lm_head(tmp_path: Path) -> None:
    model, settings = reference(tie_word_embeddings=True)
    export(save_model(tmp_path / "c", model, settings), tmp_path / "hf")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("precision", "asked", "written"),
    [
        ("fp32", None, "float32"),
        ("bf16-mixed", None, "bfloat16"),
        ("bf16-mixed", "float32", "float32"),
        ("fp32", "float16", "float16"),
    ],
)
def test_the_dtype_is_the_one_the_run_computed_with_unless_asked(
    tmp_path: Path, precision: str, asked: str | None, written: str
) -> None:
    model, settings = reference()
    checkpoint = save_model(tmp_path / "c", model, settings, precision)
    assert export(checkpoint, tmp_path / "hf", dtype=asked).dtype == written
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.to(getattr(torch, written)))


def test_both_forms_of_the_rotary_settings_are_written(tmp_path: Path) -> None:
    model, settings = reference(rope_scaling=LLAMA3_SCALING)
    export(save_model(tmp_path / "c", model, settings), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0
    assert config["rope_scaling"] == LLAMA3_SCALING
    assert config["rope_parameters"] == LLAMA3_SCALING | {"rope_theta": 10000.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"


@pytest.mark.parametrize("whole_folder", [True, False])
def test_the_tokenizer_is_exported_and_encodes_the_same(tmp_path: Path, bpe: Path, whole_folder: bool) -> None:
    model, settings = reference()
    source = bpe if whole_folder else tmp_path / "mine.json"
    if not whole_folder:
        source.write_bytes((bpe / "tokenizer.json").read_bytes())
    checkpoint = save_model(tmp_path / "c", model, settings, tokenizer=str(source))
    assert export(checkpoint, tmp_path / "hf").tokenizer == str(source)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    expected = AutoTokenizer.from_pretrained(bpe)
    text = "the fox, le renard"
    assert loaded(text)["input_ids"] == expected(text)["input_ids"]
    assert loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) == text
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == loaded.eos_token_id is not None
    assert config["bos_token_id"] == generation["bos_token_id"] == loaded.bos_token_id is not None


def test_no_token_of_an_exported_olmo2_is_padding(tmp_path: Path) -> None:
    settings = Model.model_validate(MODEL | OLMO2)
    model: Any = reference_model(settings)
    export(save_model(tmp_path / "checkpoint", model, settings.model_dump(mode="json")), tmp_path / "hf")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.pad_token_id is None
    loaded(torch.arange(8)[None]).logits.square().sum().backward()
    assert loaded.get_input_embeddings().weight.grad[:8].abs().sum(-1).min() > 0


def test_without_a_tokenizer_the_special_ids_of_llama_2_are_not_implied(tmp_path: Path) -> None:
    model, settings = reference()
    checkpoint = save_model(tmp_path / "c", model, settings, tokenizer=str(tmp_path / "gone"))
    assert export(checkpoint, tmp_path / "hf").tokenizer is None
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert loaded.config.bos_token_id is None
    assert loaded.config.eos_token_id is None
    assert loaded.generation_config.eos_token_id is None


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path, bpe: Path) -> None:
    model, settings = reference(vocab_size=100)
    checkpoint = save_model(tmp_path / "c", model, settings)
    with pytest.raises(DataError, match=r"but model\.vocab_size is 100"):
        export(checkpoint, tmp_path / "hf", tokenizer=str(bpe))
    assert not (tmp_path / "hf").exists()


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    model, settings = reference()
    checkpoint = save_model(tmp_path / "c", model, settings)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        export(checkpoint, tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]


def test_an_empty_output_is_filled(tmp_path: Path) -> None:
    model, settings = reference()
    (tmp_path / "hf").mkdir()
    export(save_model(tmp_path / "c", model, settings), tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_damaged_checkpoint_leaves_no_output(tmp_path: Path) -> None:
    model, settings = reference()
    checkpoint = save_model(tmp_path / "c", model, settings)
    file = checkpoint / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        export(checkpoint, tmp_path / "hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "does not contain weight of model.layers.2"),
        ({"num_hidden_layers": 1}, "holds model.layers.1"),
        ({"intermediate_size": 25}, "shape"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_experts": 4}, "num_experts"),
    ],
)
def test_weights_that_contradict_the_model_settings_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    model, settings = reference()
    checkpoint = save_model(tmp_path / "c", model, settings | changes)
    with pytest.raises(CheckpointError, match=message):
        export(checkpoint, tmp_path / "hf")


@pytest.mark.parametrize("state", [{}, {"model": None}, {"model": "llama"}, {"model": {"hidden_size": "x"}}])
def test_a_checkpoint_without_model_settings_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    save_checkpoint(tmp_path / "c", [Slice("weight", whole("w", (2,)), 0, 2, torch.zeros(2))], state)
    assert Index.read(tmp_path / "c").state == state
    with pytest.raises(CheckpointError, match=r"state\.model"):
        export(tmp_path / "c", tmp_path / "hf")


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model, settings = reference()
    with torch.no_grad():
        model.model.norm.weight[3] = 1e6
    checkpoint = save_model(tmp_path / "c", model, settings)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*float16"):
        export(checkpoint, tmp_path / "hf", dtype="float16")


def test_shards_are_filled_in_order_and_only_a_single_tensor_exceeds_the_limit() -> None:
    tensors: dict[str, tuple[int, ...]] = {"a": (10,), "b": (10,), "c": (100,), "d": (1,)}
    assert plan_shards(tensors, 4, 80) == {
        "model-00001-of-00003.safetensors": ["a", "b"],
        "model-00002-of-00003.safetensors": ["c"],
        "model-00003-of-00003.safetensors": ["d"],
    }


WRITTEN = "the fox <|end_of_text|> le renard  [x] \n\n isn't 12345"
SETTINGS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None, dict[str, Any] | None]] = {
    # tokenizer_config.json, special_tokens_map.json and config.json of the source
    "no settings": (None, None, None),
    "no class": ({"eos_token": "<|end_of_text|>"}, None, None),
    "a map alone": (None, {"eos_token": "<|end_of_text|>", "pad_token": {"content": "[x]", "lstrip": True}}, None),
    "the class of another model": ({"eos_token": "<|end_of_text|>"}, None, {"model_type": "qwen2"}),
    "a class that the other model overrules": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}, None, {"model_type": "qwen2"}
    ),
    "GPT-2's class by config.json": ({"eos_token": "<|end_of_text|>"}, None, {"tokenizer_class": "GPT2Tokenizer"}),
    "GPT-2's class": ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "chat_template": "c"}, None, None),
    "Llama's class": ({"tokenizer_class": "LlamaTokenizer", "bos_token": "<|begin_of_text|>"}, None, None),
    "added tokens": (
        {"added_tokens_decoder": {"300": {"content": "[x]", "lstrip": True, "special": False}}}, None,
        {"model_type": "gpt_neox"},
    ),
    "split special tokens": (
        {"split_special_tokens": True, "eos_token": "<|end_of_text|>"}, None, {"model_type": "olmo2"}
    ),
    "image token": ({"extra_special_tokens": {"image_token": "[x]"}, "eos_token": "isn"}, None, {"model_type": "gpt2"}),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_transformers_makes_the_same_tokenizer_from_the_export_as_from_the_source(
    tmp_path: Path, bpe: Path, case: str
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    state = json.loads((bpe / "tokenizer.json").read_text())
    if case == "image token":
        state["added_tokens"].append({**state["added_tokens"][-1], "id": 298, "content": "isn"})
    (source / "tokenizer.json").write_text(json.dumps(state))
    for name, content in zip(("tokenizer_config", "special_tokens_map", "config"), SETTINGS[case], strict=True):
        if content is not None:
            (source / f"{name}.json").write_text(json.dumps(content))
    model, settings = reference(vocab_size=310)
    export(save_model(tmp_path / "c", model, settings, tokenizer=str(source)), tmp_path / "hf")
    # With a tokenizer.json alone, the usual names are taken as begin- and end-of-text.
    expected, found = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for options in ({"add_special_tokens": False}, {}):
        assert found(WRITTEN, **options)["input_ids"] == expected(WRITTEN, **options)["input_ids"]
    if case != "no settings":
        assert (found.bos_token_id, found.eos_token_id) == (expected.bos_token_id, expected.eos_token_id)
        assert {*found.all_special_tokens} >= {*expected.all_special_tokens}
        assert found.chat_template == expected.chat_template
    ours, theirs = load_tokenizer(tmp_path / "hf"), load_tokenizer(source)
    assert ours.encode(WRITTEN) == theirs.encode(WRITTEN) == expected(WRITTEN, add_special_tokens=False)["input_ids"]
    assert (ours.bos, ours.eod) == (theirs.bos, theirs.eod)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_position": "post"}, 'norm_position = "post" with model.qk_norm = false'),
        ({"qk_norm": True}, 'norm_position = "pre" with model.qk_norm = true'),
        ({"norm_position": "post", "qk_norm": True, "mlp_bias": True}, "model.mlp_bias = true"),
    ],
)
def test_a_model_that_no_class_of_transformers_computes_is_refused(tmp_path: Path, changes: Any, said: str) -> None:
    settings = MODEL | changes
    tensors = model_tensors(Model.model_validate(settings))
    parts = [
        Slice("weight", whole(name, shape), 0, prod(shape), torch.ones(prod(shape))) for name, shape in tensors.items()
    ]
    save_checkpoint(
        tmp_path / "c", parts, {"model": settings, "data": {"tokenizer": ""}, "train": {"precision": "fp32"}}
    )
    with pytest.raises(CheckpointError, match="transformers has no class for this model") as refused:
        export(tmp_path / "c", tmp_path / "hf")
    assert said in str(refused.value) and not (tmp_path / "hf").exists(), str(refused.value)
