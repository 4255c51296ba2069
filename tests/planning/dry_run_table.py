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

HEAD = "| NAME, N | layout | role | parameters per rank | static GiB | activations GiB | total GiB | "
HEAD += "sent by tp, pp, dp in a step, GiB | examined | s, GiB taken |"


def dry_run(name: str, ranks: int) -> tuple[dict[str, Any], float, int]:
    """The certificate, and the seconds and bytes of memory that it took."""
    recipe = f"examples/recipes/{name}.toml"
    command = [sys.executable, "-m", "megagap.train", recipe, "--dry-run", "--device", "h100", "--json"]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--world-size", str(ranks)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{name} does not hold: {printed.decode()}"
    return json.loads(printed), time.perf_counter() - start, usage.ru_maxrss * 1024


def rows(name: str, ranks: int) -> Iterator[list[str]]:
    """One per role; what they share is in the first."""
    found, seconds, memory = dry_run(name, ranks)
    sizes = " · ".join(f"{axis} {found['layout'][axis]}" for axis in ("pp", "dp", "tp"))
    examined = {proof["name"]: proof["examined"] for proof in found["proofs"]}
    looked_at = re.search(r"[\d,]+ ranks?", examined["gradients"]), re.search(r"[\d,]+ calls?", examined["collectives"])
    shared = [f"{name}, {ranks:,}", sizes]
    last = [", ".join(match[0] for match in looked_at if match), f"{seconds:.0f}, {memory / GIB:.1f}"]
    for role in found["roles"]:
        kinds, axes = role["memory"], role["communication"]
        static = sum(kinds[kind] for kind in ("parameters", "masters", "moments", "gradients"))
        gib = [f"{size / GIB:.2f}" for size in (static, kinds["activations"], kinds["total"])]
        sent = ", ".join(f"{axes[axis]['sent'] / GIB:,.2f}" if axis in axes else "–" for axis in ("tp", "pp", "dp"))
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
    dated = f"Written on {date.today():%Y-%m-%d}. All hold."
    PAGE.write_text(f"{before}{START}\n{dated}\n\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
