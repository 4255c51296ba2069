"""What a path that is not a checkpoint of ours holds, and how to get from there to one that is."""

import difflib
import json
import os
import re
import shlex
from pathlib import Path

from megagap.checkpoint.index import INDEX_NAME
from megagap.checkpoint.save import CHECKPOINTS, LATEST, STEP_FOLDER, UNFINISHED
from megagap.errors import CheckpointError, system_reason
from megagap.run_files import STATUS
from megagap.terminal.programs import typed
from megagap.token_formats import is_of_a_pair

CONFIG = "config.json"
_RANK_FILE = re.compile(r"rank_[0-9]{5,9}\.safetensors")
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp")
_MEGATRON = re.compile(r"iter_[0-9]{7}|mp_rank_[0-9]+.*")


def no_checkpoint(path: Path) -> CheckpointError:
    """Why ``path`` is neither a checkpoint nor a run that has one, and what to do instead."""
    try:
        return CheckpointError(_describe(path))
    except OSError as error:
        return CheckpointError(f"cannot read {path}: {system_reason(error, path)}")


def unfit_for_a_run(path: Path) -> str:
    """Why no run is to be made in this folder, and how to go on from what it holds; empty where it is fit."""
    run = None  # os.path.exists says no where a folder may not be looked into, which others report
    if os.path.exists(path / INDEX_NAME):
        run = path.parent.parent if path.parent.name == CHECKPOINTS else None
        what, start = "is a checkpoint", f"--checkpoint.load {path}"
    elif path.name == CHECKPOINTS and os.path.exists(path / LATEST):
        run, what, start = path.parent, "holds a run's checkpoints", f"--checkpoint.load {path.parent}"
    elif os.path.exists(path / CONFIG) and any(path.glob("*.safetensors")):
        what, start = "is a Hugging Face model", f"{import_command(path, 'DIR')}, then --checkpoint.load DIR"
    else:
        return ""
    go_on = f"go on with the run: --run.dir {run}; or " if run else ""
    return f"{path} {what}\n  {go_on}start a new run from it, in a folder of its own: {start}"


def require_path(path: Path) -> None:
    """Raises :class:`CheckpointError` if no file can have this name."""
    if "\0" in str(path):
        raise CheckpointError(f"{str(path)!r} cannot be the name of a folder: it has a NUL character")


def _describe(path: Path) -> str:
    require_path(path)
    if not path.exists():
        return _missing(path)
    if not path.is_dir():
        return _file(path)
    names = sorted(child.name for child in path.iterdir())
    if not names:
        return f"{path} is an empty folder, not a checkpoint\n  {_GIVE}"
    found = (_unfinished, _run, _hugging_face, _of_others, _runs_within, _token_files)
    text = next(filter(None, (kind(path, names) for kind in found)), f"{path} is not a checkpoint")
    return text if "\n" in text else f"{text}\n  {_GIVE}"


_GIVE = "give a run, or a folder such as RUN/checkpoints/step_00000100."
_INSPECT = f"what a token file contains is shown by {typed('inspect')}"


def _missing(path: Path) -> str:
    text = f"{path} does not exist" + ("" if path.is_absolute() else f" in {Path.cwd()}")
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    there = sorted(c.name for c in parent.iterdir() if c.is_dir() and not c.name.startswith((".", UNFINISHED)))
    near = difflib.get_close_matches(path.name, there, n=3) if parent == path.absolute().parent else []
    if near or STEP_FOLDER.fullmatch(path.name):
        text += f"; {parent} has {', '.join(near or there[-3:]) or 'no checkpoint'}"
    text += f"\n  {_GIVE}"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.is_dir():
        text += (
            f"\n  If it is a model on the Hugging Face hub: hf download {path} --local-dir {path.name}, then\n"
            f"  {_import_advice(Path(path.name))}"
        )
    return text


def _file(path: Path) -> str:
    if path.name == LATEST:
        return f"{path} is the file that names a run's latest checkpoint\n  give its folder: {path.parent}"
    if path.name == INDEX_NAME or _RANK_FILE.fullmatch(path.name):
        return f"{path} is one file of a checkpoint\n  give its folder: {path.parent}"
    if path.suffix == ".safetensors" or path.name in (CONFIG, "model.safetensors.index.json"):
        return f"{path} is one file of a Hugging Face model\n  {_import_advice(path.parent)}"
    if is_of_a_pair(path):
        return f"{path} is a token file, not a checkpoint\n  {_INSPECT} {path.with_suffix('')}"
    if path.suffix in _PICKLES:
        return f"{path} was written by torch.save: a pickle\n  {_NO_PICKLES}"
    return f"{path} is not a folder\n  {_GIVE}"


def _unfinished(path: Path, names: list[str]) -> str | None:
    if path.name.startswith(UNFINISHED):
        return f"{path} is a checkpoint that was never completed\n  give one named step_… in {path.parent}"
    if STEP_FOLDER.fullmatch(path.name) and any(map(_RANK_FILE.fullmatch, names)):
        return (
            f"{path} is not a complete checkpoint: it has no {INDEX_NAME}\n"
            "  copy it again with all its files, or give another."
        )
    return None


def _run(path: Path, names: list[str]) -> str | None:
    run = path.parent if path.name == CHECKPOINTS else path
    if not (run / STATUS).is_file():
        return None
    try:
        status = json.loads((run / STATUS).read_bytes())
        state = f": it is {status['state']}, at step {status['step']}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        state = ""
    return (
        f"{run} is a run without a checkpoint{state}\n"
        "  give another run, or wait: it writes one at its end, every checkpoint.every steps, and when you make a file "
        f"{run / 'SAVE'}."
    )


def _hugging_face(path: Path, names: list[str]) -> str | None:
    if "adapter_config.json" in names:
        return (
            f"{path} is a LoRA adapter, not a whole model\n"
            "  merge it into its model: with peft, model.merge_and_unload().save_pretrained(DIR); then\n"
            f"  {_import_advice()}"
        )
    if CONFIG in names and not (path / CONFIG).is_file():
        return (
            f"{path / CONFIG} is not a file, or a link to none\n  copy or download the model again with all its files."
        )
    if CONFIG in names:
        return f"{path} is a Hugging Face model, not yet a checkpoint\n  {_import_advice(path)}"
    if any(name.endswith(".safetensors") for name in names):
        return (
            f"{path} has safetensors, but neither the {INDEX_NAME} of a checkpoint nor the {CONFIG} of a Hugging Face "
            "model\n  copy or download it again with all its files."
        )
    snapshots = path / "snapshots"
    if snapshots.is_dir() and (revisions := sorted(snapshots.iterdir())):
        return f"{path} is a cache of the Hugging Face hub\n  {_import_advice(revisions[-1])}"
    return None


def _of_others(path: Path, names: list[str]) -> str | None:
    """Checkpoints of other programs."""
    if any(name == ".metadata" or name.endswith(".distcp") for name in names):
        return f"{path} was written by torch.distributed.checkpoint, whose metadata is a pickle\n  {_NO_PICKLES}"
    if "params.json" in names and any(name.startswith("consolidated.") for name in names):
        return (
            f"{path} is a Llama in Meta's own format\n"
            "  get its Hugging Face format, or convert it with transformers' convert_llama_weights_to_hf.py\n"
            f"  then {_import_advice()}"
        )
    if "latest_checkpointed_iteration.txt" in names or any(map(_MEGATRON.fullmatch, [path.name, *names])):
        return (
            f"{path} is a Megatron-LM checkpoint\n  export it as a Hugging Face model with Megatron Bridge or "
            f"Megatron's tools/checkpoint/convert.py; then\n  {_import_advice()}"
        )
    if "zero_to_fp32.py" in names or any(name.startswith("global_step") for name in names):
        return (
            f"{path} is a DeepSpeed checkpoint\n"
            "  save it as a Hugging Face model with the program that wrote it; then\n"
            f"  {_import_advice()}"
        )
    pickles = [name for name in names if name.endswith(_PICKLES) and not is_of_a_pair(path / name)]
    return f"{path} has {pickles[0]}, which torch.save wrote: a pickle\n  {_NO_PICKLES}" if pickles else None


def _token_files(path: Path, names: list[str]) -> str | None:
    found = [name for name in names if is_of_a_pair(path / name)]
    if not found:
        return None
    return f"{path} has token files, not a checkpoint\n  {_INSPECT} {(path / found[0]).with_suffix('')}"


def _runs_within(path: Path, names: list[str]) -> str | None:
    runs = [name for name in names if any((path / name).glob(f"{CHECKPOINTS}/step_*/{INDEX_NAME}"))]
    return f"{path} is a folder of runs: {', '.join(runs[:5])}\n  give one of them." if runs else None


def export_command(checkpoint: Path) -> str:
    """The command that makes a checkpoint a Hugging Face model."""
    return f"{typed('convert')} to-hf --checkpoint {checkpoint} --output DIR"


def import_command(folder: Path, output: str) -> str:
    """The command that makes a Hugging Face model the checkpoint ``output``."""
    return f"{typed('convert')} from-hf --input {shlex.quote(str(folder))} --output {output}"


def _import_advice(folder: Path = Path("DIR")) -> str:
    output = f"runs/{shlex.quote(folder.absolute().name)}"
    return (
        f"make it a checkpoint: {import_command(folder, output)}\n"
        f"  and start from that: --checkpoint.load {output} --checkpoint.load_mode model"
    )


_NO_PICKLES = (
    "pickles can run code when opened and are not read. Save the model as safetensors with the program that wrote it: "
    f"with transformers, model.save_pretrained(DIR); then\n  {_import_advice()}"
)
