"""The parts of examples/quickstart.sh that are longer than a line of shell. Not meant to be run by hand."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from processes import kill_tree

from megagap.checkpoint import find_model, load_model
from megagap.config import Settings, load_recipe, parse_overrides
from megagap.data.validation import ValidationData
from megagap.errors import DataError, MegagapError, run_tool
from megagap.observe.metrics import read_metrics
from megagap.run_files import METRICS
from megagap.training.datasets import validation_data

LARGEST_DIFFERENCE = 1e-5
"""Of logits between megagap and transformers in fp32, relative to the largest: they add up in different orders."""

WEIGHTS = {"en": 0.4, "fr": 0.4, "code": 0.2}
PROMPTS = {"en": "The function returns", "fr": "Cette fonction renvoie", "code": "def __init__(self,"}
OTHER_PROMPT = "The"
"""For the user's own sources."""


class StepFailed(MegagapError):
    """A step of the quickstart did not give the expected result."""

    kind = "quickstart"


def main(argv: list[str] | None = None) -> None:
    given = sys.argv[1:] if argv is None else argv
    at = given.index("--") if "--" in given else len(given)
    own, rest = given[:at], given[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s STEP [ARGUMENT ...] [-- MORE ...]")
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("layout", help="print PROCESSES TP PP for this machine")
    steps.add_parser("sources", help="print data.sources for a folder of token files").add_argument("data", type=Path)
    steps.add_parser("run-and-kill", help="run MORE, SIGKILL it after a checkpoint").add_argument("run", type=Path)
    steps.add_parser("entropy", help="print each source's unigram entropy; MORE: settings").add_argument(
        "recipe", type=Path
    )
    report_step = steps.add_parser("report", help="compare with transformers and unigrams; MORE: settings")
    report_step.add_argument("recipe", type=Path)
    arguments = parser.parse_args(own)
    match arguments.step:
        case "layout":
            print(*layout(_gpus()))
        case "sources":
            print(sources_as_toml(arguments.data))
        case "run-and-kill":
            run_and_kill(arguments.run, rest)
        case "entropy":
            print_entropies(load_recipe(arguments.recipe, parse_overrides(rest), find_model=find_model))
        case "report":
            report(load_recipe(arguments.recipe, parse_overrides(rest), find_model=find_model))


# --------------------------------------------------------------------------------------------------- before training


def layout(gpus: int) -> tuple[int, int, int]:
    """Processes, tp and pp: eight processes on a CPU, else the largest power of two of GPUs, one process each."""
    processes = 8 if gpus == 0 else min(8, 2 ** (gpus.bit_length() - 1))
    return processes, 2 if processes >= 2 else 1, 2 if processes >= 4 else 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def sources_as_toml(data: Path) -> str:
    """The setting ``data.sources`` for every token file in a folder, with the quickstart's weights."""
    prefixes = sorted(path.with_suffix("").resolve() for path in data.glob("*_text_document.idx"))
    if not prefixes:
        raise DataError(f"{data} contains no token files (*_text_document.idx)")
    entries = [
        f'{{path = "{prefix}", weight = {WEIGHTS.get(prefix.name.removesuffix("_text_document"), 1.0)}}}'
        for prefix in prefixes
    ]
    return f"[{', '.join(entries)}]"


def unigram_entropies(data: ValidationData) -> dict[str, float]:
    """Entropy in nats of the distribution of each source's held-out tokens.

    A model that knew how often each token occurs in them, and nothing else, would have this loss.
    """
    entropies = {}
    for name, source in data.sources.items():
        tokens = source.read(1, source.window_count(data.sequence_length) * data.sequence_length + 1)
        shares = np.unique(tokens, return_counts=True)[1] / len(tokens)
        entropies[name] = float(-(shares * np.log(shares)).sum())
    return entropies


def print_entropies(settings: Settings) -> None:
    print("unigram entropy of the held-out tokens, a loss that training must beat:")
    for name, entropy in unigram_entropies(validation_data(settings)).items():
        print(f"  {name:<12} {entropy:.3f} nats per token")


# --------------------------------------------------------------------------------------------------------- training


def run_and_kill(run: Path, command: list[str]) -> None:
    """Run a training command until it has a checkpoint and is a few steps further, then SIGKILL all its processes.

    A run that already has a checkpoint was interrupted before, or is finished: nothing is done.
    """
    if _checkpointed_step(run):
        return
    process = subprocess.Popen(command)
    try:
        while process.poll() is None:
            step = _checkpointed_step(run)
            if step and _last_step(run) > step + 5:
                break
            time.sleep(0.2)
    finally:
        ended = process.poll()
        kill_tree(process.pid)
        process.wait()
    if ended:
        raise StepFailed(f"training failed with exit status {ended}; its logs are in {run}/logs")
    if ended is None:
        print(f"\n>>> killed all processes with SIGKILL after step {_last_step(run)}, checkpoint at step {step} <<<\n")


def _checkpointed_step(run: Path) -> int:
    """The step of the checkpoint that ``latest`` names; 0 without one."""
    latest = run / "checkpoints" / "latest"
    return int(latest.read_text(encoding="utf-8").strip().removeprefix("step_")) if latest.exists() else 0


def _last_step(run: Path) -> int:
    path = run / METRICS
    records = read_metrics(path) if path.exists() else []
    return int(records[-1]["step"]) if records else 0


# --------------------------------------------------------------------------------------------------- after training


def report(settings: Settings) -> None:
    """Check the exported model against ``transformers``, generate with it, compare its losses with unigram entropy.

    Raises :class:`StepFailed` where logits differ, or a held-out loss is not below the entropy.
    """
    run = Path(settings.run.dir)
    data = validation_data(settings)
    check_logits(run, data)
    write_continuations(run / "hf", list(data.windows))
    compare_losses(run, unigram_entropies(data))


def check_logits(run: Path, data: ValidationData) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.from_numpy(np.concatenate([data.batch(name, 0, 2) for name in data.windows]))[:, :-1]
    with torch.no_grad():
        ours = load_model(run)(tokens)
        theirs = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32).eval()(tokens).logits
    difference = float((ours - theirs).abs().max())
    print(f"logits of megagap and of transformers differ by at most {difference:.1e} (largest: {ours.abs().max():.0f})")
    if not difference < LARGEST_DIFFERENCE * float(ours.abs().max()):
        raise StepFailed(f"the logits of {run / 'hf'} should agree within {LARGEST_DIFFERENCE} of the largest")


def write_continuations(model_folder: Path, sources: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    print("\ngreedy continuations of prompts (transformers):")
    for name in sources:
        prompt = tokenizer(PROMPTS.get(name, OTHER_PROMPT), return_tensors="pt", add_special_tokens=False)
        written = model.generate(**prompt, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"  {name:<12} {json.dumps(tokenizer.decode(written[0]), ensure_ascii=False)}")


def compare_losses(run: Path, entropies: dict[str, float]) -> None:
    evaluated = [record for record in read_metrics(run / METRICS) if "validation_loss" in record]
    if not evaluated:
        raise StepFailed(f"{run / METRICS} has no validation loss")
    first, last = evaluated[0], evaluated[-1]
    print(
        f"\n{'held-out loss':<14} {'step ' + str(first['step']):>10} {'step ' + str(last['step']):>10} {'unigram':>10}"
    )
    too_high = []
    for name, entropy in entropies.items():
        losses = [record[f"validation_loss/{name}"] for record in (first, last)]
        print(f"  {name:<12} {losses[0]:>10.3f} {losses[1]:>10.3f} {entropy:>10.3f}")
        if not losses[1] < entropy:
            too_high.append(name)
    print("  nats per token")
    if too_high:
        raise StepFailed(f"the loss on {', '.join(too_high)} should end below its unigram entropy; train longer")


if __name__ == "__main__":
    run_tool(main)
