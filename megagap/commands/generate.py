"""Let a model continue a prompt, greedily or by sampling."""

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from megagap.commands.parser import make_parser
from megagap.errors import DataError, counted
from megagap.inference.generation import Sampling, TextStream, encode_prompt, generate, load_text_model
from megagap.ops.arithmetic import sum_half_precision_in_fp32
from megagap.terminal.arguments import positive
from megagap.terminal.programs import CalledAs

EXAMPLES = """
examples:
  megagap generate --checkpoint runs/quickstart --prompt "def main("
      the run's latest checkpoint
  megagap generate --checkpoint Llama-3.2-1B --prompt "Once upon a time" --temperature 0.8 --top-p 0.95
      a Hugging Face model
  megagap generate --checkpoint runs/quickstart/checkpoints/step_00000100 --prompt - < prompt.txt

The prompt and its continuation go to standard output, everything else to standard error.
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("generate", called_as, __doc__, EXAMPLES)
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        metavar="DIR",
        help="a checkpoint of any layout, a run (its latest), or a Hugging Face model",
    )
    parser.add_argument(
        "--prompt",
        required=True,
        metavar="TEXT",
        help="text to continue; -: standard input; '': start from the begin-of-text token",
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=64, metavar="N", help="most tokens to generate (default: 64)"
    )
    parser.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0: greedy (default); 1: the model's own probabilities",
    )
    parser.add_argument(
        "--top-p",
        type=share,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens whose probabilities add up to P (default: 1, from all)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="seed of the sampling (default: 0)")
    parser.add_argument("--tokenizer", metavar="SPEC", help="tokenizer folder or file (default: the model's own)")
    given = parser.parse_args(arguments)
    if given.top_p < 1 and given.temperature == 0:
        parser.error("--top-p applies only to sampling: give a --temperature above 0 too")
    write_text(given)


def write_text(given: argparse.Namespace) -> None:
    prompt = read_prompt(given.prompt)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sum_half_precision_in_fp32()
    loaded = load_text_model(given.checkpoint, given.tokenizer, device)
    ids = encode_prompt(loaded.tokenizer, prompt, loaded.begin)
    sampling = Sampling(given.temperature, given.top_p, given.seed)
    stream = TextStream(loaded.tokenizer, ids)
    tokens = generate(loaded.model, ids, given.max_new_tokens, sampling=sampling, stop=loaded.stop)
    count, start = 0, time.perf_counter()
    for count, token in enumerate(tokens, start=1):
        if count == 1:
            show(prompt)  # not before the model has accepted it
        show(stream.add(token))
    show(stream.finish() + "\n" if count else prompt + "\n")
    seconds = time.perf_counter() - start
    positions = loaded.model.settings.max_position_embeddings
    if count == given.max_new_tokens:
        reason = f"--max-new-tokens {count}"
    elif len(ids) + count > positions:
        reason = f"the model's {positions} positions are used up"
    else:
        reason = "end of text"
    speed = f" in {seconds:.1f} s ({count / seconds:,.1f} tokens/s)" if count else ""
    print(f"{counted(count, 'token')}{speed}; stopped: {reason}", file=sys.stderr)


def read_prompt(argument: str) -> str:
    """``argument``, or for ``-`` standard input without the line break at its end."""
    try:
        if argument == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
        argument.encode("utf-8")
    except UnicodeError:
        raise DataError("the prompt is not valid UTF-8") from None
    return argument


def show(text: str) -> None:
    """Write at once, in UTF-8 whatever the terminal's settings."""
    sys.stdout.buffer.write(text.encode("utf-8"))
    sys.stdout.buffer.flush()


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2**63 - 1, not {text}")
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value
