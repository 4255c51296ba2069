"""The table of dry runs in docs/parallelism.md: ``python -m tests.planning.dry_run_table`` measures and writes it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

from megagap.planning.memory import GIB

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/parallelism.md"
START, END = "<!-- dry runs: python -m tests.planning.dry_run_table -->", "<!-- end of the dry runs -->"

RECIPES = {"gaperon-1b-256": 256, "llama3-8b-256": 256, "llama3-70b-1024": 1024, "llama3-8b-4096": 4096}
"""Of examples/recipes, with the number of processes."""

SENT_OVER = ("tp",), ("pp",), ("data", "shard", "replicate")
"""Axes of the columns, of which dp's go by what is done over them."""

HEAD = "| NAME, N | layout | role | parameters per rank | static GiB | activations GiB | total GiB | "
HEAD += "sent by tp, pp, dp in a step, GiB | examined | s (of CPU), GiB taken |"


def dry_run(name: str, ranks: int) -> tuple[dict[str, Any], str]:
    """The certificate; and the seconds that it took, those of a processor, and the GiB of memory."""
    recipe = f"examples/recipes/{name}.toml"
    command = [sys.executable, "-m", "megagap.train", recipe, "--dry-run", "--device", "h100", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--world-size", str(ranks)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{name} does not hold: {printed.decode()}"
    wall, busy = time.perf_counter() - start, usage.ru_utime + usage.ru_stime
    return json.loads(printed), f"{wall:.0f} ({busy:.0f}), {usage.ru_maxrss * 1024 / GIB:.1f}"


def rows(name: str, ranks: int) -> Iterator[list[str]]:
    """One per role; what they share is in the first."""
    found, taken = dry_run(name, ranks)
    sizes = " · ".join(f"{axis} {found['layout'][axis]}" for axis in ("pp", "dp", "tp"))
    examined = {proof["name"]: proof["examined"] for proof in found["proofs"]}
    looked_at = re.search(r"[\d,]+ ranks?", examined["gradients"]), re.search(r"[\d,]+ calls?", examined["collectives"])
    shared = [f"{name}, {ranks:,}", sizes]
    last = [", ".join(match[0] for match in looked_at if match), taken]
    for role in found["roles"]:
        kinds, axes = role["memory"], role["communication"]
        static = sum(kinds[kind] for kind in ("parameters", "masters", "moments", "gradients"))
        gib = [f"{size / GIB:.2f}" for size in (static, kinds["activations"], kinds["total"])]
        sizes = [sum(axes[axis]["sent"] for axis in names if axis in axes) for names in SENT_OVER]
        sent = ", ".join(f"{size / GIB:,.2f}" if size else "–" for size in sizes)
        yield [*shared, role["role"], f"{role['parameters']:,}", *gib, sent, *last]
        shared, last = ["", ""], ["", ""]


def main() -> None:
    lines = [HEAD, "|" + " --- |" * 10]
    for name, ranks in RECIPES.items():
        for row in rows(name, ranks):
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    dated = f"Measured on {date.today():%Y-%m-%d}. All hold."
    PAGE.write_text(f"{before}{START}\n{dated}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
