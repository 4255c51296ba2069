"""Turn checkpoints into Hugging Face models."""

import argparse
import re
import sys
from pathlib import Path

from tqdm import tqdm

from megagap.checkpoint import resolve_checkpoint
from megagap.checkpoint.huggingface import DEFAULT_SHARD_SIZE, DTYPES, export
from megagap.errors import run_tool

EXAMPLES = """
examples:
  python tools/convert_checkpoint.py to-hf --checkpoint runs/tiny/checkpoints/step_00000100 --output runs/tiny/hf
  python tools/convert_checkpoint.py to-hf --checkpoint runs/tiny --output runs/tiny/hf --dtype bfloat16
      the run's latest checkpoint

Then, with transformers: AutoModelForCausalLM.from_pretrained("runs/tiny/hf")
"""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    to_hf = commands.add_parser(
        "to-hf",
        help="write a model that transformers loads",
        description="Write the weights of a checkpoint of any layout as a model that transformers loads.",
        epilog=EXAMPLES,
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
        help="of a safetensors file, such as 5GB (the default) or 500MB",
    )
    given = parser.parse_args(argv)
    convert_to_hugging_face(given)


def convert_to_hugging_face(given: argparse.Namespace) -> None:
    checkpoint = resolve_checkpoint(given.checkpoint)
    with tqdm(desc=checkpoint.name, unit="B", unit_scale=True, file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

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
            "warning: no tokenizer was exported: the run names none that is still there; give one with --tokenizer",
            file=sys.stderr,
        )
    print(
        f"{given.output}: {result.parameters:,} parameters of {checkpoint} as {result.dtype}, "
        f"{result.size / 1e6:,.1f} MB in {len(result.files)} file{'s' if len(result.files) > 1 else ''}"
    )


def byte_size(text: str) -> int:
    """``5GB``, ``500MB``, ``2GiB`` or plain bytes."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    unit = _UNITS.get(match[2].upper()) if match else None
    size = int(float(match[1]) * unit) if match and unit else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 5GB, 500MB or 2GiB")
    return size


if __name__ == "__main__":
    run_tool(main)
