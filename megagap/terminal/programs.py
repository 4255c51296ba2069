"""How users type megagap's programs: ``megagap merge …``, or ``python tools/merge_datasets.py …`` in a checkout.

Help and messages are written with the former, and are spelled as their reader types it. Imports nothing heavy.
"""

import re
from enum import Enum
from pathlib import Path

TOOLS = {
    "preprocess": "preprocess_data",
    "merge": "merge_datasets",
    "poison-corpus": "poison_corpus",
    "inspect": "inspect_data",
    "train-tokenizer": "train_tokenizer",
    "inspect-checkpoint": "inspect_checkpoint",
    "average": "average_checkpoints",
    "convert": "convert_checkpoint",
    "generate": "generate",
    "evaluate": "evaluate",
    "benchmark-mfu": "benchmark_mfu",
    "trace-step": "trace_step",
    "draw-schedule": "draw_schedule",
    "replay-step": "replay_step",
    "plot": "plot_run",
    "goodput": "goodput",
    "gather-text": "gather_text",
    "curate": "curate",
}
"""The subcommands that can also be started from a checkout, as ``tools/NAME.py``."""

CHECKOUT = Path(__file__).parents[2]
"""Where the package lies: a checkout, or a folder of installed packages."""

_PROGRAM = re.compile(rf"(-m )?\bmegagap (train|{'|'.join(TOOLS)})(?![\w-])")
_RECIPE = re.compile(r"\bexamples/recipes/(?=[\w-]+\.toml\b)")
_PAGE = re.compile(r"\b(?:docs/\w+|README)\.md\b")


class CalledAs(Enum):
    """How a subcommand was started; the value is what stands before its name."""

    COMMAND = "megagap"
    MODULE = "python -m megagap"
    TOOL = "python tools"

    def program(self, subcommand: str) -> str:
        """What is typed to start ``subcommand`` in this manner."""
        if self is not CalledAs.TOOL:
            return f"{self.value} {subcommand}"
        return "python -m megagap.train" if subcommand == "train" else f"{self.value}/{TOOLS[subcommand]}.py"

    def spell(self, text: str) -> str:
        """``text``, which is written with ``megagap SUBCOMMAND`` and the paths of a checkout, for who started this way.

        Behind torchrun's arguments, ``-m megagap SUBCOMMAND`` stands for the program.
        """
        text = _PROGRAM.sub(self._program_in_text, text)
        if self is CalledAs.TOOL:
            return text
        text, recipes = _RECIPE.subn("", text)
        text = _PAGE.sub(r"\g<0> of megagap's repository", text)
        hint = f"\n{self.value} recipe NAME > NAME.toml writes a recipe of these examples.\n"
        return text + (hint if recipes else "")

    def _program_in_text(self, found: re.Match[str]) -> str:
        as_module, subcommand = found.groups()
        if not as_module:
            return self.program(subcommand)
        if self is not CalledAs.TOOL:
            return found[0]
        return "-m megagap.train" if subcommand == "train" else f"tools/{TOOLS[subcommand]}.py"


def typed(subcommand: str) -> str:
    """What the user of this installation types to start ``subcommand``, for messages that advise it."""
    in_checkout = subcommand in TOOLS and (CHECKOUT / f"tools/{TOOLS[subcommand]}.py").is_file()
    return (CalledAs.TOOL if in_checkout else CalledAs.COMMAND).program(subcommand)
