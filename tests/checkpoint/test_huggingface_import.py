import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megagap.checkpoint import Index, load_model, load_slices, load_tensor
from megagap.checkpoint.companions import companions_of
from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_config import read_settings
from megagap.checkpoint.huggingface_import import import_model, load_hugging_face_model
from megagap.config import Model
from megagap.errors import CheckpointError
from megagap.inference.generation import load_text_model
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, split
from megagap.tokenizer import load_tokenizer
from tests import models
from tests.huggingface import OLMO2, reference_model
from tests.models import SCALING

SHAPE = models.SHAPE | dict(hidden_size=16, head_dim=4, intermediate_size=24, rope_theta=10000.0)
NORM = "model.layers.0.input_layernorm.weight"
VARIANTS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 10},
    "llama3 scaling": {"rope_scaling": SCALING, "rope_theta": 500000.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "OLMo 2": OLMO2,
    "OLMo 2, wide heads, biases, tied": OLMO2 | {"head_dim": 10, "attention_bias": True, "tie_word_embeddings": True},
}


def saved(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **changes: Any) -> LlamaForCausalLM:
    """A random model that ``transformers`` has saved."""
    model = reference_model(Model(**(SHAPE | changes))).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize("shard", ["1GB", "5KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_import_and_export_give_the_same_model_bit_for_bit(tmp_path, changes, dtype, shard):
    saved(tmp_path / "hf", dtype, shard, **changes)
    assert (len(list((tmp_path / "hf").glob("*.safetensors"))) > 1) == (shard == "5KB")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again")
    assert same_bits(stored(tmp_path / "hf"), stored(tmp_path / "again"))
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("hf", "again"))
    assert type(before) is type(after) is type(reference_model(Model(**(SHAPE | changes))))
    assert before.config.to_dict() | {"_name_or_path": ""} == after.config.to_dict() | {"_name_or_path": ""}
    assert before.generation_config.to_dict() == after.generation_config.to_dict()
    tokens = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        assert torch.equal(before(tokens).logits, after(tokens).logits)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_checkpoint_and_the_folder_give_the_logits_of_transformers(tmp_path, changes):
    reference = saved(tmp_path / "hf", **changes)
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    tokens = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        expected = reference(tokens).logits
        for model in (load_model(tmp_path / "checkpoint"), load_hugging_face_model(tmp_path / "hf")):
            torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_layout_with_fp32_masters_loads_bf16_weights(tmp_path):
    reference = saved(tmp_path / "hf", torch.bfloat16)
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    shard = split("lm_head.weight", (61, 16), 0, 1, 2)
    wanted = Slice("weight", shard, 5, 200, torch.zeros(195))
    load_slices(tmp_path / "checkpoint", Index.read(tmp_path / "checkpoint"), [wanted], cast=True)
    assert torch.equal(wanted.tensor, reference.lm_head.weight[31:].reshape(-1)[5:200].float())


def test_the_checkpoint_is_at_step_0_and_records_model_and_tokenizer(tmp_path):
    saved(tmp_path / "hf")
    assert import_model(tmp_path / "hf", tmp_path / "plain").tokenizer is None
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    result = import_model(tmp_path / "hf", tmp_path / "checkpoint")
    state = Index.read(tmp_path / "checkpoint").state
    assert (state["step"], state["consumed_samples"]) == (0, 0)
    assert Model(**state["model"]) == Model(**SHAPE)
    assert state["data"] == {"tokenizer": str(tmp_path / "hf")} == {"tokenizer": result.tokenizer}
    assert result.parameters == sum(tensor.numel() for tensor in stored(tmp_path / "hf").values())
    assert Index.read(tmp_path / "plain").state["data"] == {"tokenizer": ""}


def test_progress_ends_with_all_bytes(tmp_path):
    saved(tmp_path / "hf")
    told = []
    import_model(tmp_path / "hf", tmp_path / "checkpoint", progress=lambda done, total: told.append((done, total)))
    size = sum(tensor.nbytes for tensor in stored(tmp_path / "hf").values())
    assert told[-1] == (size, size)
    assert told == sorted(told) and len(told) >= 2 * len(model_tensors(Model(**SHAPE)))


def test_several_end_ids_sampling_defaults_and_the_chat_template_survive_import_and_export(tmp_path, bpe):
    saved(tmp_path / "hf", vocab_size=300)
    edit(tmp_path / "hf" / "config.json", bos_token_id=3, eos_token_id=[4, 5], pad_token_id=6)
    generation = {"eos_token_id": [4, 5, 7], "pad_token_id": 6, "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    for file in bpe.iterdir():
        shutil.copy(file, tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (3, [4, 5], 6)
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text()) == generation
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "so"}], tokenize=False) == "so"
    assert load_text_model(tmp_path / "checkpoint").stop >= {4, 5, 7}


def test_a_run_that_trains_an_imported_model_exports_the_end_ids_of_its_tokenizers_folder(tmp_path, bpe):
    saved(tmp_path / "hf", vocab_size=300)
    edit(tmp_path / "hf" / "config.json", eos_token_id=[4, 5])
    (tmp_path / "hf" / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    for file in bpe.iterdir():
        shutil.copy(file, tmp_path / "hf")
    state_of_a_run = Index(files=(), tensors=(), state={})
    companions = companions_of(tmp_path, state_of_a_run, str(tmp_path / "hf"), load_tokenizer(tmp_path / "hf"))
    assert companions.end_ids() == {4, 5} and companions.special_ids["eos_token_id"] == [4, 5]


@pytest.mark.parametrize("ids", ["x", [], {"vocab_size": 1}])
def test_an_index_whose_special_ids_would_overwrite_other_settings_is_refused(tmp_path, ids):
    state = {"hugging_face": {"special_ids": ids, "generation_config": {}}}
    index = Index(files=(), tensors=(), state=state)
    with pytest.raises(CheckpointError, match="does not contain special_ids and generation_config"):
        companions_of(tmp_path, index, None, None)


@pytest.mark.parametrize("ids", ["</s>", [1, "2"], True, 1.5])
def test_invalid_special_ids_are_refused_naming_the_field(tmp_path, ids):
    saved(tmp_path / "hf")
    edit(tmp_path / "hf" / "generation_config.json", eos_token_id=ids)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id is"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": "\\ud800"}', '{"a":' * 300 + "1" + "}" * 300, "{", ""])
def test_generation_settings_that_a_checkpoint_cannot_store_are_refused_naming_the_file(tmp_path, text):
    saved(tmp_path / "hf")
    (tmp_path / "hf" / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_heads_too_many_to_try_all_divisors_are_refused_at_once(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", num_attention_heads=2**60, num_key_value_heads=7)
    with pytest.raises(CheckpointError, match="does not divide num_attention_heads"):
        read_settings(tmp_path)


@pytest.mark.parametrize("settings", [{"factor": 8.0}, {"full_attention": {"rope_theta": 1e6}}])
def test_rotary_settings_without_their_type_are_refused(tmp_path, settings):
    saved(tmp_path)
    edit(tmp_path / "config.json", rope_parameters=settings)
    with pytest.raises(CheckpointError, match=f"rope_scaling says {next(iter(settings))}, but no rope_type"):
        read_settings(tmp_path)


def test_the_settings_of_transformers_4_are_read(tmp_path):
    saved(tmp_path)
    legacy = {"type": "llama3", **SCALING.model_dump()}
    edit(tmp_path / "config.json", rope_parameters=None, rope_theta=500000, rope_scaling=legacy)
    model = read_settings(tmp_path)
    assert (model.rope_theta, model.rope_scaling) == (500000.0, SCALING)
    edit(tmp_path / "config.json", rope_scaling={**SCALING.model_dump(), "original_max_position_embeddings": 32})
    assert read_settings(tmp_path).rope_scaling.original_max_position_embeddings == 32


def test_what_config_json_leaves_out_is_as_in_transformers(tmp_path):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    given: dict[str, Any] = {name: SHAPE[name] for name in names}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **given}))
    ours, theirs = read_settings(tmp_path), AutoConfig.from_pretrained(tmp_path)
    for name in Model.model_fields.keys() & theirs.to_dict().keys() - {"rope_theta", "rope_scaling"}:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None


def test_weights_of_several_dtypes_are_kept_and_computed_in_the_widest(tmp_path):
    saved(tmp_path / "hf", torch.bfloat16)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    index = Index.read(tmp_path / "checkpoint")
    loaded = {name: load_tensor(tmp_path / "checkpoint", index, "weight", name) for name in index.names("weight")}
    assert same_bits(loaded, tensors)
    for model in (load_model(tmp_path / "checkpoint"), load_hugging_face_model(tmp_path / "hf")):
        for parameter in model.stage.sharded_parameters():
            assert torch.equal(parameter, tensors[parameter.shard.name].float())


def test_a_redundant_lm_head_and_old_rotary_buffers_are_left_out(tmp_path):
    saved(tmp_path / "hf", tie_word_embeddings=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    redundant = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(tensors | redundant, tmp_path / "hf" / "model.safetensors")
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    assert set(Index.read(tmp_path / "checkpoint").names("weight")) == tensors.keys()
    redundant["lm_head.weight"][0] += 1
    save_file(tensors | redundant, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings.*differs"):
        import_model(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, r'is not a Llama model: config\.json says model_type = "mistral"'),
        ({"model_type": None}, "not a Llama model.*model_type = null"),
        ({"model_type": ["llama"]}, r'not a Llama model.*model_type = \["llama"\]'),
        ({"model_type": {}}, r"not a Llama model.*model_type = \{\}"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is of type 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor"),
        ({"rope_parameters": "llama3"}, "rope_parameters is 'llama3'; it must be an object"),
        ({"rope_theta": 5.0}, "rope_parameters says rope_theta = 10000.0, but elsewhere it is 5.0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3: does not divide num_attention_heads = 4"),
        ({"head_dim": None, "hidden_size": 18}, "hidden_size is 18"),
        ({"intermediate_size": 25}, r"shape \[24, 16\], config\.json says \[25, 16\]"),
        ({"num_hidden_layers": 3}, r"does not have model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"has model\.layers\.1.*does not belong"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers = 10+, but"),
        ({"attention_bias": True}, r"does not have model\.layers\.0\.self_attn\.q_proj\.bias"),
    ],
    ids=str,
)
def test_a_model_that_is_not_a_plain_llama_is_refused_naming_the_field(tmp_path, changes, message):
    saved(tmp_path / "hf")
    edit(tmp_path / "hf" / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "\ud800"])
def test_a_config_that_is_not_a_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_settings(tmp_path)


def test_a_folder_without_config_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a Hugging Face model.*config\.json"):
        import_model(tmp_path, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        import_model(tmp_path / "nowhere", tmp_path / "checkpoint")


def test_pickled_weights_are_refused_unopened(tmp_path):
    saved(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin, a pickle"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")


def test_quantised_weights_are_refused(tmp_path):
    saved(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is stored as float8_e4m3fn"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, value):
    saved(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    saved(tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a complete safetensors file"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: None, "weight_map"),
        (lambda places: ["a"], "weight_map"),
        (lambda places: dict.fromkeys(places, 3), "weight_map"),
        (
            lambda places: {name: f"../hf/{file}" for name, file in places.items()},
            "not a safetensors file in",
        ),
        (
            lambda places: {name: f"/tmp/{file}" for name, file in places.items()},
            "not a safetensors file in",
        ),
        (lambda places: dict.fromkeys(places, "gone.safetensors"), "gone.safetensors is missing"),
        (lambda places: places | {NORM: places["lm_head.weight"]}, "which model.safetensors.index.json places in"),
        (lambda places: {k: v for k, v in places.items() if k != NORM}, f"has {NORM}.*no file"),
    ],
)
def test_an_inconsistent_index_of_shards_is_refused(tmp_path, change, message):
    saved(tmp_path / "hf", shard="5KB")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert places["lm_head.weight"] != places[NORM]
    index.write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(CheckpointError, match=message):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    saved(tmp_path / "hf")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="not empty"):
        import_model(tmp_path / "hf", tmp_path / "checkpoint")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["mine.txt"]


def test_a_sentencepiece_tokenizer_survives_import_and_export(tmp_path):
    saved(tmp_path / "hf", vocab_size=400)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "hf" / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
    )
    import_model(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again")
    files = [tmp_path / folder / "tokenizer.model" for folder in ("hf", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    text = "the brown dog é"
    loaded, ours = AutoTokenizer.from_pretrained(tmp_path / "again"), load_tokenizer(tmp_path / "again")
    assert loaded(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


CHANGING = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 1.0,
    "logits_scaling": 8.0,
    "logit_scale": 0.0625,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "mup_width_multiplier": 2.0,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcap": 50.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "use_qk_norm": True,
    "qk_layernorm": True,
    "clip_qkv": 8.0,
    "post_attention_norm": True,
    "norm_type": "layernorm",
    "rope_interleaved": True,
    "rope_local_base_freq": 10000.0,
    "rotary_pct": 0.25,
    "no_rope_layers": [1, 0],
    "use_rope": False,
    "alibi": True,
    "parallel_residual": True,
    "num_local_experts": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "attention_chunk_size": 8192,
    "is_causal": False,
    "use_bidirectional_attention": True,
    "pruned_heads": {"0": [1]},
}


@pytest.mark.parametrize("key", CHANGING)
def test_a_setting_beyond_llamas_that_changes_the_results_is_refused_by_name(tmp_path, key):
    saved(tmp_path)
    edit(tmp_path / "config.json", **{key: CHANGING[key]})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is .*would change the results"):
        read_settings(tmp_path)


def test_code_that_comes_with_a_model_is_refused(tmp_path):
    saved(tmp_path)
    edit(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"})
    with pytest.raises(CheckpointError, match=r"auto_map names code .*modeling_other"):
        read_settings(tmp_path)


def test_settings_beyond_llamas_that_change_nothing_are_ignored(tmp_path):
    saved(tmp_path)
    plain = read_settings(tmp_path)
    harmless = {
        **dict(embedding_multiplier=1.0, residual_multiplier=1, logits_scaling=1.0, logit_scale=1, scale_emb=1),
        **dict(final_logit_softcapping=None, sliding_window=4096, use_sliding_window=False, max_window_layers=28),
        **dict(use_qk_norm=False, rope_interleaved=False, is_llama_config=True, pruned_heads={}, is_causal=True),
        **dict(layer_types=["full_attention"] * 2, no_rope_layers=[], num_local_experts=0, chunk_size_feed_forward=0),
        **dict(_attn_implementation="flash_attention_2", _flash_attn_2_enabled=True, use_fused_rms_norm=True),
        **dict(unsloth_version="2025.1", unsloth_fixed=True, pretraining_tp=2, use_cache=True, torch_dtype="bfloat16"),
        **dict(max_sequence_length=4096, attention_dropout=0.1, quantization_config=None, auto_map={}),
        **dict(position_embedding_type="rope", task_specific_params=None, sep_token_id=None, id2label={"0": "a"}),
    }
    edit(tmp_path / "config.json", **{key: value for key, value in harmless.items() if value is not None})
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {key: None for key, value in harmless.items() if value is None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert read_settings(tmp_path) == plain
