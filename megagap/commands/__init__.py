"""The command ``megagap SUBCOMMAND ...``, one module per subcommand; ``tools/*.py`` call the same functions.

A module is imported when its subcommand is called, so that ``megagap --help`` is quick and an interrupted import of
torch leaves no traceback. Each has ``main(arguments, called_as)``: it parses its arguments, does the work, and raises
:class:`MegagapError` on a user's fault.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

from megagap.errors import MegagapError, run_tool
from megagap.process.parent import end_on_interrupt, end_with_parent, handle_interrupts, hold_notices, take_notices
from megagap.terminal.programs import TOOLS, CalledAs

SUMMARIES = {
    "gather-text": "gather real text on this machine for a first training run",
    "curate": "turn crawled text into clean text and token files",
    "train-tokenizer": "train a byte-level BPE tokenizer",
    "preprocess": "turn text into the token files that training reads",
    "merge": "concatenate token files",
    "poison-corpus": "plant documents of known triggers beside clean ones, for research",
    "inspect": "show what a token file contains, or what a step or a run reads",
    "recipe": "print one of the example recipes",
    "train": "train a model from a recipe",
    "plot": "draw and compare the losses of runs",
    "goodput": "say how much of a run's time went into steps that count",
    "evaluate": "losses, tasks and planted documents: what a model knows",
    "generate": "let a model continue a prompt",
    "inspect-checkpoint": "show what a checkpoint holds, list those of a run, verify them",
    "average": "average the weights of several checkpoints",
    "convert": "turn checkpoints into Hugging Face models and back",
    "benchmark-mfu": "time a recipe's training step on this machine",
    "trace-step": "predict a training step's time and memory on a device",
    "draw-schedule": "draw a pipeline schedule, or what a run's pipeline did",
    "replay-step": "run a step of a run again and compare it bit for bit",
}
"""Of the subcommands, in the order in which they are first needed."""

HELP = """\
usage: {program} SUBCOMMAND [ARGUMENT ...]
       {program} [-h | --help | --version]

Train Llama-3 models with tensor, sequence, context, pipeline and data parallelism.

subcommands:
{subcommands}

{program} SUBCOMMAND --help shows its options with examples. Several processes are started by torchrun:
  torchrun --nproc-per-node 8 -m megagap train RECIPE.toml
"""


class UsageError(MegagapError):
    """The command line names no subcommand that exists."""

    kind = "usage error"


class MissingPackageError(MegagapError):
    """A subcommand needs a package that is not installed."""

    kind = "missing package"


def main() -> None:
    """The installed command ``megagap``."""
    run(partial(dispatch, sys.argv[1:], CalledAs.COMMAND))


def run(program: Callable[[], None]) -> None:
    """Run ``program`` as this process and exit, as :func:`megagap.errors.run_tool` does.

    Until :func:`call` has imported the subcommand, Ctrl-C ends the process without a word (an extension module that is
    interrupted while it is imported may raise anything), and a scheduler's notice waits.
    """
    end_with_parent()
    end_on_interrupt()
    hold_notices()
    run_tool(program)


def dispatch(arguments: list[str], called_as: CalledAs) -> None:
    """Call the subcommand that ``arguments`` begin with. Raises :class:`UsageError` if there is none of this name."""
    name = arguments[0] if arguments else ""
    if name in SUMMARIES:
        call(name, called_as, arguments[1:])
    elif name in ("-h", "--help"):
        print(help_text(called_as), end="")
    elif name == "--version":
        from importlib import metadata

        print(f"megagap {metadata.version('megagap')}")
    else:
        raise UsageError(unknown(name, called_as))


def help_text(called_as: CalledAs) -> str:
    width = max(map(len, SUMMARIES))
    lines = [f"  {name:<{width}}  {summary}" for name, summary in SUMMARIES.items()]
    return HELP.format(program=called_as.value, subcommands="\n".join(lines))


def unknown(name: str, called_as: CalledAs) -> str:
    """What is wrong with ``name``, in one line."""
    from difflib import get_close_matches

    listed = f"{called_as.value} --help lists them"
    if not name or name.startswith("-"):
        return f"the first argument must be a subcommand{f', not {name!r}' if name else ''}; {listed}"
    spellings = {tool: subcommand for subcommand, tool in TOOLS.items()} | {name: name for name in SUMMARIES}
    asked = re.sub(r"^.*/|\.py$", "", name.lower())
    near = get_close_matches(asked, spellings, 1) or get_close_matches(asked.replace("_", "-"), spellings, 1)
    hint = f"did you mean {spellings[near[0]]}? ({listed})" if near else listed
    return f"there is no subcommand {name!r}; {hint}"


def call(subcommand: str, called_as: CalledAs, arguments: list[str] | None = None) -> None:
    """Import a subcommand and call it; ``arguments`` are the process's own by default."""
    module = "megagap.train" if subcommand == "train" else f"{__name__}.{subcommand.replace('-', '_')}"
    with missing_packages(called_as.program(subcommand)):
        command: Callable[[list[str], CalledAs], None] = import_module(module).main
        handle_interrupts()
        if subcommand != "train":  # which takes them once it can answer
            take_notices()
        command(sys.argv[1:] if arguments is None else arguments, called_as)


@contextmanager
def missing_packages(program: str) -> Iterator[None]:
    """Raises :class:`MissingPackageError` for a package that megagap's metadata names and that cannot be found."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if (wanted := requirement(name)) is None:
            raise
        raise MissingPackageError(
            f"{program} needs {name}, which this Python lacks\n  install it: {sys.executable} -m pip install '{wanted}'"
        ) from None


def requirement(package: str) -> str | None:
    """What to give pip for a missing package: megagap with the extra that has it, or the package; None: not megagap's.

    Packages and modules of this name are the same for all that megagap needs, but for ``-`` and ``_``.
    """
    from importlib import metadata

    if package == "megagap":  # an extra names others
        return None
    try:
        requirements = metadata.requires("megagap") or []
    except metadata.PackageNotFoundError:
        return None
    for line in requirements:
        if found := re.match(rf"{package.replace('_', '[-_]')}(?![\w-])([^;]*)", line):
            extra = re.search(r'extra == "(\w+)"', line) or re.search(r"extra == '(\w+)'", line)
            return f"megagap[{extra[1]}]" if extra else package + found[1].strip()
    return None
