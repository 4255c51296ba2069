"""Show what a checkpoint holds, or which checkpoints a run has, and verify them."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from megagap.checkpoint import Index, resolve_checkpoint
from megagap.checkpoint.index import INDEX_NAME, DamagedCheckpointError
from megagap.checkpoint.inspect import Listed, describe, is_part, list_checkpoints
from megagap.checkpoint.save import CHECKPOINTS, UNFINISHED, step_folders
from megagap.checkpoint.verify import Damage, find_damage
from megagap.commands.parser import make_parser
from megagap.errors import CheckpointError, counted
from megagap.files import file_errors
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs
from megagap.terminal.progress import ProgressBar

EXAMPLES = """
examples:
  megagap inspect-checkpoint runs/r/checkpoints/step_00001000
      step, model, layout that wrote it, precision, files, tensors by kind, settings
  megagap inspect-checkpoint runs/r
      all checkpoints of a run, each with its state: whole, damaged, incomplete
  megagap inspect-checkpoint runs/r --verify
      reads every byte of all of them and says what is damaged: file, tensor, range of bytes

Without --verify, the index, the sizes of the files and, of a run, their headers are checked. The exit code is 2 if
something is damaged.

--json prints one line and nothing else on standard output. Of a checkpoint it is an object: {"checkpoint": ..., "step":
..., "precision": ..., "parameters": ..., "parallel": {...}, "bytes": ..., "files": {"rank_00000.safetensors": ...},
"tensors": {"weight": {"tensors": ..., "elements": ..., "bytes": ..., "chunks": ..., "dtypes": ["F32"]}, ...},
"settings": {...}, "verified": true, "damage": [{"file": ..., "begin": ..., "end": ..., "tensor": ..., "reason": ...}]}.
Of a run: {"checkpoints": [{"checkpoint": "step_00001000", "step": 1000, "bytes": ..., "is_latest": true, "state":
"whole", "reason": "", "damage": [...]}, ...]}.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("inspect-checkpoint", called_as, __doc__, EXAMPLES)
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint, a run, or a run's checkpoints folder")
    parser.add_argument("--verify", action="store_true", help="read every byte and compare it with its checksum")
    parser.add_argument("--json", action="store_true", help="print one line of JSON, see below")
    given = parser.parse_args(arguments)
    checkpoints = folder_of_checkpoints(given.path)
    if checkpoints is None:
        inspect_one(resolve_checkpoint(given.path), given)
    else:
        inspect_run(checkpoints, given)


def folder_of_checkpoints(path: Path) -> Path | None:
    """``path`` or the ``checkpoints`` in it, if it is a run's; None for what can only be a checkpoint."""
    with file_errors(f"cannot read {path}", path, CheckpointError):
        if "\0" in str(path) or (path / INDEX_NAME).is_file():
            return None
        for folder in (path / CHECKPOINTS, path):
            if folder.is_dir() and (step_folders(folder) or any(folder.glob(f"{UNFINISHED}*"))):
                return folder
    return None


def inspect_one(folder: Path, given: argparse.Namespace) -> None:
    if is_part(folder):
        raise CheckpointError(
            f"{folder} is one node's part of a checkpoint; other nodes have the rest of its files\n"
            "  a start of the run with checkpoint.local_dir finds and verifies all of them."
        )
    index = Index.read(folder)
    about = describe(folder, index)
    damage: tuple[Damage, ...] = ()
    if given.verify:
        with verifying(about["bytes"]) as progress:
            damage = find_damage(folder, index, progress)
    if given.json:
        print(json.dumps(about | {"verified": given.verify, "damage": [vars(each) for each in damage]}))
    else:
        show(about)
        if given.verify and not damage:
            print(f"verified: all {about['bytes']:,} bytes are as they were written")
    if damage:
        lines = [f"  {each.reason}" for each in damage]
        raise DamagedCheckpointError(f"{folder} is damaged: {places(len(damage))}\n" + "\n".join(lines))


def inspect_run(checkpoints: Path, given: argparse.Namespace) -> None:
    total = bytes_in(checkpoints) if given.verify else 0
    with verifying(total, given.verify) as progress:
        listed = list_checkpoints(checkpoints, given.verify, progress)
    if given.json:
        print(json.dumps({"checkpoints": [each.as_dict() for each in listed]}))
    else:
        show_list(checkpoints, listed, given.verify)
    if bad := [each for each in listed if each.state in ("damaged", "unusable")]:
        lines = [f"  {each.checkpoint}: {fault}" for each in bad for fault in faults_of(each)]
        raise DamagedCheckpointError(
            f"{checkpoints} is damaged: {counted(len(bad), 'checkpoint')} of {len(listed)}\n" + "\n".join(lines)
        )


def bytes_in(checkpoints: Path) -> int:
    """Of all ranks' files, without those that a run removes just now."""
    total = 0
    for file in checkpoints.glob("step_*/rank_*.safetensors"):
        with suppress(FileNotFoundError):
            total += file.stat().st_size
    return total


def faults_of(listed: Listed) -> list[str]:
    return [damage.reason for damage in listed.damage] or [listed.reason]


def places(count: int) -> str:
    return counted(count, "place")


@contextmanager
def verifying(total: int, shown: bool = True) -> Iterator[Callable[[int], object]]:
    with ProgressBar(desc="verify", total=total, unit="B", unit_scale=True, disable=not shown, file=sys.stderr) as bar:
        yield bar.update


def show(about: dict[str, Any]) -> None:
    table = Table(title=about["checkpoint"], show_header=False)
    for name in ("step", "consumed_tokens", "validation_loss", "precision", "parameters", "bytes"):
        if about[name] is not None:
            value = about[name]
            table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) else _plain(value))
    table.add_row("layout", ", ".join(flat("", about["parallel"])) or "not known")
    console = Console()
    console.print(table)

    tensors = Table("kind", "tensors", "elements", "bytes", "chunks", "dtypes", title="tensors")
    for kind, has in about["tensors"].items():
        numbers = (f"{has[name]:,}" for name in ("tensors", "elements", "bytes", "chunks"))
        tensors.add_row(kind, *numbers, ", ".join(has["dtypes"]))
    console.print(tensors)
    files = Table("file", "bytes", title=counted(len(about["files"]), "file"))
    for name, size in about["files"].items():
        files.add_row(name, f"{size:,}")
    console.print(files)
    print("\n".join(flat("", about["settings"])))


def flat(prefix: str, value: Any) -> Iterator[str]:
    """``name = value`` of everything in nested objects, the values as JSON: they are another's, and may hold anything
    that a terminal would obey."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(f"{prefix}.{name}" if prefix else str(name), inner)
    elif prefix:
        yield f"{_plain(prefix)} = {json.dumps(value)}"


def _plain(value: object) -> str:
    text = str(value)
    return text if text.isprintable() else repr(text)


def show_list(checkpoints: Path, listed: list[Listed], verified: bool) -> None:
    table = Table("checkpoint", "step", "bytes", "validation loss", "state", "", title=str(checkpoints))
    for each in listed:
        table.add_row(
            each.checkpoint,
            "" if each.step is None else f"{each.step:,}",
            "" if each.bytes is None else f"{each.bytes:,}",
            "" if each.validation_loss is None else f"{each.validation_loss:.4f}",
            each.state + (", verified" if verified and each.state == "whole" else ""),
            "latest" if each.is_latest else _plain(each.reason),
        )
    Console().print(table)
