"""What tools write for others: whole or not at all, and readable as the umask says."""

import os
import resource
import runpy
import stat
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import save_file

from megagap.checkpoint import find_latest, load_model, save_checkpoint
from megagap.checkpoint.huggingface import export
from megagap.checkpoint.huggingface_import import import_model
from megagap.errors import CheckpointError, MegagapError
from megagap.parallel.shard import Slice, whole
from tests.launching import SECONDS
from tests.recipes import write_recipe
from tests.training_run import train_recipe
from tests.warm_start import python

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def trained(workers, tmp_path_factory, bpe_folder):
    """A folder with a run whose tokenizer is known, and its model as Hugging Face's."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = write_recipe(folder, train={"steps": 2}, data={"tokenizer": str(bpe_folder)})
    workers.run(1, train_recipe, recipe, [])
    export(find_latest(folder / "run/checkpoints"), folder / "hf")
    (folder / "text.jsonl").write_text('{"text": "the quick brown fox, le vif renard brun"}\n' * 9)
    return folder


@pytest.fixture(scope="module")
def bpe_folder(tmp_path_factory):
    from megagap.preprocess.bpe import train_tokenizer

    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.jsonl").write_text('{"text": "the quick brown fox, le vif renard brun"}\n' * 5)
    train_tokenizer([folder / "text.jsonl"], folder / "bpe", 300)
    return folder / "bpe"


COMMANDS = {
    "to-hf": ["convert_checkpoint.py", "to-hf", "--checkpoint", "{trained}/run", "--output", "{out}/new"],
    "to-hf in shards": [
        *["convert_checkpoint.py", "to-hf", "--checkpoint", "{trained}/run", "--output", "{out}/new"],
        *["--max-shard-size", "100KB"],
    ],
    "from-hf": ["convert_checkpoint.py", "from-hf", "--input", "{trained}/hf", "--output", "{out}/new"],
    "tokenizer": [
        *["train_tokenizer.py", "--input", "{trained}/text.jsonl", "--output", "{out}/new", "--vocab-size", "280"],
    ],
    "plot": ["plot_run.py", "{trained}/run", "--output", "{out}/new/loss.png"],
}


def run_here(name, trained, out):
    """One of COMMANDS, writing into ``out``, in this process."""
    script, *arguments = [part.format(trained=trained, out=out) for part in COMMANDS[name]]
    runpy.run_path(str(TOOLS / script))["main"](arguments)


def run_limited(name, trained, out, limit):
    """One of COMMANDS in a process of its own, with a limit on the bytes of a file."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    script, *arguments = [part.format(trained=trained, out=out) for part in COMMANDS[name]]
    command = [python(), str(TOOLS / script), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, env=environment, timeout=SECONDS)


def files_of(folder):
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
@pytest.mark.parametrize("name", COMMANDS)
def test_all_that_is_written_has_the_mode_that_the_umask_gives(tmp_path, trained, name, umask):
    former = os.umask(umask)
    try:
        run_here(name, trained, tmp_path)
    finally:
        os.umask(former)
    assert files_of(tmp_path)
    for path in files_of(tmp_path).values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    for folder in (path for path in tmp_path.rglob("*") if path.is_dir()):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask, folder


@pytest.mark.parametrize("limit", [100, 40_000])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_cannot_be_written_ends_in_a_message_and_nothing_is_left(tmp_path, trained, name, limit):
    done = run_limited(name, trained, tmp_path, limit)
    if name == "tokenizer" and limit == 40_000 and done.returncode == 0:
        return  # its files are smaller
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "File too large" in done.stderr and str(tmp_path) in done.stderr
    assert files_of(tmp_path) == {}


def test_a_failed_write_replaces_nothing(tmp_path, trained):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "loss.png").write_text("old")
    done = run_limited("plot", trained, tmp_path, 3_000)
    assert done.returncode == 2, done.stderr
    assert [path.read_text() for path in files_of(tmp_path).values()] == ["old"]


@pytest.mark.parametrize("name", ["to-hf", "from-hf", "tokenizer", "plot"])
@pytest.mark.parametrize("place", ["a file", "a link to nowhere", "below a file", "a name too long"])
def test_an_output_that_cannot_be_made_is_refused(tmp_path, trained, name, place):
    out = {"below a file": tmp_path / "file", "a name too long": tmp_path / ("x" * 300)}.get(place, tmp_path)
    (tmp_path / "file").write_text("old")
    if place == "a file":
        (tmp_path / "new").write_text("old")
    if place == "a link to nowhere":
        (tmp_path / "new").symlink_to(tmp_path / "missing/folder/x")
        if name in ("tokenizer", "plot"):
            (tmp_path / "missing").write_text("old")
    before = files_of(tmp_path)
    with pytest.raises((MegagapError, OSError), match=r"cannot|exists|too long"):
        run_here(name, trained, out)
    assert files_of(tmp_path) == before and all(path.read_text() == "old" for path in before.values())


def test_a_training_run_writes_all_files_by_the_umask(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 2}, model={"num_hidden_layers": 1}, run={"tensorboard": True})
    command = [python(), "-m", "megagap.train", str(recipe)]
    done = subprocess.run(command, umask=0o027, capture_output=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in files_of(tmp_path / "run").values()}
    assert "rank_00000.safetensors" in modes and set(modes.values()) == {0o640}, modes


def test_a_checkpoint_with_a_value_that_is_not_finite_is_not_exported(tmp_path, trained):
    model = load_model(trained / "run")
    tensors = {p.shard.name: p.detach().clone() for p in model.stage.sharded_parameters()}
    tensors["model.norm.weight"][3] = float("nan")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text((trained / "hf/config.json").read_text())
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight has values that are not finite"):
        import_model(folder, tmp_path / "x")

    slices = [Slice("weight", whole(n, tuple(t.shape)), 0, t.numel(), t.view(-1)) for n, t in tensors.items()]
    save_checkpoint(tmp_path / "diverged", slices, {"model": model.settings.model_dump(mode="json")})
    with pytest.raises(CheckpointError, match=r"model.norm.weight has values that are not finite: .* diverged"):
        export(tmp_path / "diverged", tmp_path / "out")
    assert not (tmp_path / "out").exists()
