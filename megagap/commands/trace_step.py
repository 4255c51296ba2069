"""Predict a recipe's training step on a device that need not be present: time, memory, kernels, host waits."""

import argparse
import json
import math
import sys
from pathlib import Path

from megagap.checkpoint import find_model
from megagap.commands.parser import make_parser
from megagap.config import Settings, load_recipe, parse_overrides
from megagap.errors import counted
from megagap.planning.devices import Device, known_devices, load_device
from megagap.planning.memory import assumptions, memory_by_stage, report, stages_table, verdict
from megagap.planning.trace import draw, kinds_table, sites_table, summary, title, trace_step
from megagap.terminal.console import Console
from megagap.terminal.programs import CalledAs

EXAMPLES = """examples:
  megagap trace-step examples/recipes/gaperon-1b-one-gpu.toml
  megagap trace-step examples/recipes/gaperon-1b-one-gpu.toml --device mi300x --output step.png
  megagap trace-step examples/recipes/code.toml --world-size 8 --parallel.tp 2 --json
  megagap trace-step examples/recipes/code.toml --memory --world-size 64 --device mi250x --parallel.tp 2

The trainer's own step runs over tensors without storage, so no GPU is needed and no value is computed. The cost of an
operation follows from the figures in megagap/planning/devices.toml: the longer of its arithmetic and its memory
traffic, plus its launch. docs/trace.md says what is assumed, and how far predictions were from a measured step.

--memory answers whether a layout fits, by a formula: the memory of every pipeline stage's ranks (docs/memory.md).
"""


def main(arguments: list[str], called_as: CalledAs) -> None:
    parser = make_parser("trace-step", called_as, __doc__, EXAMPLES, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="TOML recipe; further --section.key value override it")
    parser.add_argument("--device", default="h100", metavar="NAME", help=f"{', '.join(known_devices())} (h100)")
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="processes, of which rank 0 is traced (1)"
    )
    parser.add_argument("--memory", action="store_true", help="only the memory of every rank, by a formula")
    parser.add_argument("--sites", type=int, metavar="N", help="call sites to list (20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE", help="image to write, or folder for step.png")
    what_if = parser.add_argument_group("figures in place of those in megagap/planning/devices.toml")
    what_if.add_argument("--product-tflops", type=float, metavar="X", help="TFLOP/s of large bf16 matrix products")
    what_if.add_argument("--bandwidth-tb", type=float, metavar="X", help="TB/s of kernels bound by memory")
    options, rest = parser.parse_known_args(arguments)
    rates = (options.product_tflops, options.bandwidth_tb)
    if (
        options.world_size < 1
        or (options.sites or 0) < 0
        or any(rate is not None and not 0 < rate < math.inf for rate in rates)
    ):
        parser.error("--world-size, --product-tflops and --bandwidth-tb must be positive, --sites at least 0")
    if options.memory and any(given is not None for given in (options.output, options.sites, *rates)):
        parser.error("--output, --sites, --product-tflops and --bandwidth-tb apply to a trace only, not to --memory")

    device = load_device(options.device).with_rates(*rates)
    settings = load_recipe(
        options.recipe, parse_overrides(rest), options.world_size, needs_data=False, find_model=find_model
    )
    if options.memory:
        print_memory(settings, device, options)
        return
    trace = trace_step(settings, device, options.world_size)
    if options.output:
        output = options.output / "step.png" if options.output.is_dir() else options.output
        draw(trace, output)
        print(f"written: {output}", file=sys.stderr)
    if options.json:
        print(json.dumps(trace.as_dict()))
        return
    console = Console()
    console.print(title(trace), style="bold", soft_wrap=True)
    console.print(kinds_table(trace))
    sites = 20 if options.sites is None else options.sites
    if sites:
        console.print(sites_table(trace, sites))
    for line in (*summary(trace), "assumed:", *(f"  {line}" for line in trace.assumptions())):
        console.print(line, highlight=False, soft_wrap=True)


def print_memory(settings: Settings, device: Device, options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(report(settings, device, options.world_size)))
        return
    stages = memory_by_stage(settings, device, options.world_size)
    console = Console()
    console.print(
        f"memory per rank in GiB on {device.key}, {counted(options.world_size, 'process', 'processes')}", style="bold"
    )
    console.print(stages_table(stages))
    for line in (verdict(stages, device), *assumptions(settings)):
        console.print(line, highlight=False, soft_wrap=True)
