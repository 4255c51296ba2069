"""Turn checkpoints into Hugging Face models and back."""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megagap.checkpoint import resolve_checkpoint
from megagap.checkpoint.huggingface import DEFAULT_SHARD_SIZE, DTYPES, export
from megagap.checkpoint.huggingface_import import import_model
from megagap.checkpoint.import_recipe import one_line, recipe_for
from megagap.commands.parser import make_parser
from megagap.errors import DataError, counted
from megagap.files import is_there, require_writable, write_text, writing
from megagap.terminal.programs import CalledAs
from megagap.terminal.progress import ProgressBar

EXAMPLES = """
examples:
  megagap convert to-hf --checkpoint runs/quickstart --output runs/quickstart/hf --dtype bfloat16
      the run's latest checkpoint; for another, --checkpoint runs/quickstart/checkpoints/step_00000100
  megagap convert from-hf --input Llama-3.2-1B --output runs/llama-1b --recipe llama-1b.toml
      a checkpoint, and the recipe that continues training from it: fill in its data, then
      megagap train llama-1b.toml

After to-hf, with transformers: AutoModelForCausalLM.from_pretrained("runs/quickstart/hf")
"""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("convert", called_as, __doc__, EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf",
        help="write a model that transformers loads",
        description="Write the weights of a checkpoint of any layout as a model that transformers loads.",
        epilog=called_as.spell(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    to_hf.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a checkpoint, or a run: its latest"
    )
    to_hf.add_argument("--output", required=True, type=Path, metavar="DIR", help="new or empty folder")
    to_hf.add_argument(
        "--dtype", choices=list(DTYPES), help="default: float32 for a run in fp32, bfloat16 for the others"
    )
    to_hf.add_argument("--tokenizer", metavar="SPEC", help="folder or file (default: the run's data.tokenizer)")
    to_hf.add_argument(
        "--max-shard-size",
        type=byte_size,
        default=DEFAULT_SHARD_SIZE,
        metavar="SIZE",
        help="maximum size of a safetensors file, such as 5GB (the default) or 500MB",
    )
    to_hf.set_defaults(convert=convert_to_hugging_face)
    from_hf = commands.add_parser(
        "from-hf",
        help="write a checkpoint from a Hugging Face model",
        description="Write a Hugging Face Llama 2 or 3 in safetensors as a checkpoint, its weights bit for bit.",
        epilog=called_as.spell(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from_hf.add_argument("--input", required=True, type=Path, metavar="DIR", help="config.json and safetensors")
    from_hf.add_argument("--output", required=True, type=Path, metavar="CHECKPOINT", help="new or empty folder")
    from_hf.add_argument(
        "--recipe",
        type=Path,
        metavar="FILE.toml",
        help="write the recipe that continues from the checkpoint there; default: print it",
    )
    from_hf.set_defaults(convert=convert_from_hugging_face)
    given = parser.parse_args(arguments)
    given.convert(given)


def convert_to_hugging_face(given: argparse.Namespace) -> None:
    checkpoint = resolve_checkpoint(given.checkpoint)
    with progress_bar(checkpoint.name) as progress:
        result = export(
            checkpoint,
            given.output,
            dtype=given.dtype,
            tokenizer=given.tokenizer,
            max_shard_size=given.max_shard_size,
            progress=progress,
        )
    if result.tokenizer is None:
        print(
            "warning: no tokenizer was exported: the run names none that still exists; give one with --tokenizer",
            file=sys.stderr,
        )
    print(
        f"{given.output}: {counted(result.parameters, 'parameter')} of {checkpoint} as {result.dtype}, "
        f"{result.size / 1e6:,.1f} MB in {counted(len(result.files), 'file')}"
    )


def convert_from_hugging_face(given: argparse.Namespace) -> None:
    if given.recipe:
        require_free(given.recipe)
    with progress_bar(given.input.name) as progress:
        result = import_model(given.input, given.output, progress=progress)
    if result.tokenizer is None:
        print(f"warning: {given.input} has no tokenizer; to-hf and generate will need --tokenizer", file=sys.stderr)
    summary = (
        f"{given.output}: {counted(result.parameters, 'parameter')} of {given.input} as {' and '.join(result.dtypes)}, "
        f"{result.size / 1e6:,.1f} MB"
    )
    if given.recipe:
        with writing(given.recipe):
            write_text(given.recipe, recipe_for(result, given.input, given.output, given.recipe))
        print(f"{summary}\nsaved {given.recipe}, the recipe that continues from it: fill in its data.sources")
        return
    # A comment, so that the output as a whole is a recipe too.
    print(f"# {one_line(summary)}\n")
    print(recipe_for(result, given.input, given.output), end="")


def require_free(recipe: Path) -> None:
    """Before the weights are written. Raises :class:`DataError` if there is such a file, or none can be written."""
    if is_there(recipe):
        raise DataError(f"{recipe} exists already\n  name another file with --recipe, or remove this one.")
    require_writable(recipe)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes, and the function that moves it to (done, total)."""
    with ProgressBar(desc=title, unit="B", unit_scale=True) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def byte_size(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB`` or plain bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 5GB, 500MB or 2GiB")
    return size
