"""What is not a checkpoint of ours is called what it is, with the way to one that is."""

import json
from pathlib import Path

import pytest
import torch

from megagap.checkpoint import load_model, resolve_checkpoint, save_checkpoint
from megagap.checkpoint.huggingface_import import import_model
from megagap.errors import CheckpointError
from megagap.inference.generation import load_text_model
from megagap.model.shapes import model_tensors
from megagap.parallel.shard import Slice, whole
from tests.models import tiny_model


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def save(folder: Path) -> Path:
    model = tiny_model()
    parts = []
    for name, shape in model_tensors(model).items():
        shard = whole(name, shape)
        parts.append(Slice("weight", shard, 0, shard.numel, torch.zeros(shard.numel)))
    save_checkpoint(folder, parts, {"model": model.model_dump(mode="json")})
    return folder


def run_without_checkpoints(folder: Path) -> Path:
    touch(folder, "config.toml", "checkpoints/x").joinpath("checkpoints/x").unlink()
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 7}))
    return folder


FROM_HF = "python tools/convert_checkpoint.py from-hf --input"
LOAD = "--checkpoint.load_mode model"

GRID = {
    "nothing": (lambda f: f / "x", ["does not exist"]),
    "a near name": (lambda f: touch(f, "runs/tinny/x") / "runs/tiny", ["runs has tinny"]),
    "a name of the hub": (lambda f: Path("meta-llama/Llama-3.2-1B"), ["hf download meta-llama/Llama-3.2-1B", FROM_HF]),
    "an empty folder": (lambda f: f, ["is an empty folder"]),
    "Hugging Face": (
        lambda f: touch(f, "config.json", "model.safetensors"),
        ["{path} is a Hugging Face", LOAD],
    ),
    "its config": (lambda f: touch(f / "m", "config.json") / "config.json", ["one file of a Hugging Face", LOAD]),
    "its weights": (lambda f: touch(f / "m", "model.safetensors") / "model.safetensors", [f"{FROM_HF} {{parent}}"]),
    "weights without config": (lambda f: touch(f, "model.safetensors"), ["neither the index.json"]),
    "a hub cache": (lambda f: touch(f, "refs/main", "snapshots/abc/config.json"), ["snapshots/abc", FROM_HF]),
    "an adapter": (lambda f: touch(f, "adapter_config.json", "adapter_model.safetensors"), ["LoRA", "merge"]),
    "torch.save": (lambda f: touch(f / "m", "model.pt") / "model.pt", ["a pickle", "safetensors", FROM_HF]),
    "a .bin": (lambda f: touch(f, "pytorch_model.bin"), ["pytorch_model.bin", "a pickle", FROM_HF]),
    "token files": (lambda f: touch(f, "fr.bin", "fr.idx"), ["has token files", "inspect_data.py {path}/fr"]),
    "a token file": (
        lambda f: touch(f, "fr.bin", "fr.idx") / "fr.bin",
        ["is a token file", "inspect_data.py {parent}/fr"],
    ),
    "a config that is a folder": (lambda f: touch(f, "config.json/x"), ["{path}/config.json is not a file"]),
    "torch's DCP": (lambda f: touch(f, ".metadata", "__0_0.distcp"), ["torch.distributed.checkpoint", FROM_HF]),
    "Meta's form": (lambda f: touch(f, "params.json", "consolidated.00.pth"), ["Meta's own format", FROM_HF]),
    "Megatron": (lambda f: touch(f, "latest_checkpointed_iteration.txt", "iter_0000010/x"), ["Megatron-LM", FROM_HF]),
    "its iteration": (lambda f: touch(f / "iter_0000010", "mp_rank_00/model_optim_rng.pt"), ["Megatron-LM", FROM_HF]),
    "DeepSpeed": (lambda f: touch(f, "latest", "global_step10/mp_rank_00_model_states.pt"), ["DeepSpeed", FROM_HF]),
    "a run": (run_without_checkpoints, ["is a run without a checkpoint: it is running, at step 7", "SAVE"]),
    "its checkpoints": (lambda f: run_without_checkpoints(f) / "checkpoints", ["is an empty folder"]),
    "an unfinished one": (lambda f: touch(f / "partial_step_00000001", "rank_00000.safetensors"), ["never completed"]),
    "one without index": (
        lambda f: touch(f / "step_00000001", "rank_00000.safetensors"),
        ["not a complete"],
    ),
    "latest": (
        lambda f: save(f / "r/checkpoints/step_00000001").parent / "latest",
        ["names a run's latest checkpoint", "give its folder: {parent}"],
    ),
    "an index": (lambda f: save(f / "x") / "index.json", ["is one file of a checkpoint", "give its folder: {parent}"]),
    "a rank's file": (lambda f: save(f / "x") / "rank_00000.safetensors", ["give its folder: {parent}"]),
    "runs": (lambda f: save(f / "a/checkpoints/step_00000001").parents[2], ["is a folder of runs: a"]),
    "another step": (lambda f: save(f / "step_00000001").with_name("step_00000002"), ["has step_00000001"]),
    "a NUL": (lambda f: Path("a\0b"), ["has a NUL character"]),
    "bytes": (lambda f: Path(str(f) + "/\udcff"), ["does not exist"]),
    "a text": (lambda f: touch(f, "notes.txt") / "notes.txt", ["is not a folder"]),
    "a folder of texts": (lambda f: touch(f, "notes.txt"), ["is not a checkpoint"]),
}


@pytest.mark.parametrize("kind", GRID)
def test_what_is_not_a_checkpoint_is_named_for_what_it_is(tmp_path, kind):
    make, wanted = GRID[kind]
    path = make(tmp_path)
    messages = []
    for load in (resolve_checkpoint, load_model, load_text_model):
        if kind == "Hugging Face" and load is load_text_model:
            continue  # accepts such a folder as it is
        with pytest.raises(CheckpointError) as error:
            load(path)
        messages.append(str(error.value))
    assert len(set(messages)) == 1 and messages[0].count("\n") >= (kind != "a NUL")
    for part in wanted:
        assert part.format(path=path, parent=path.parent) in messages[0]


def test_from_hf_of_a_checkpoint_points_the_other_way(tmp_path):
    for given in (save(tmp_path / "r/checkpoints/step_00000001"), tmp_path / "r"):
        with pytest.raises(CheckpointError) as error:
            import_model(given, tmp_path / "out")
        assert "is not a Hugging Face model but already a checkpoint of megagap" in str(error.value)
        assert f"to-hf --checkpoint {tmp_path / 'r/checkpoints/step_00000001'}" in str(error.value)


@pytest.mark.parametrize("kind", sorted(GRID.keys() - {"Hugging Face", "bytes"}))
def test_from_hf_of_anything_else_asks_for_the_folder_of_a_model(tmp_path, kind):
    make, _ = GRID[kind]
    with pytest.raises(CheckpointError):
        import_model(make(tmp_path), tmp_path / "out")


def test_an_unreadable_folder_is_reported(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    touch(tmp_path, "notes.txt")
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"cannot read .*: Permission denied"):
        resolve_checkpoint(tmp_path)
