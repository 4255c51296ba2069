"""The recipe that continues training from an imported model."""

import shlex
from pathlib import Path

from megagap.checkpoint.huggingface_import import Imported
from megagap.config.describe import as_toml
from megagap.errors import counted, printable
from megagap.terminal.programs import typed

SEQUENCE_LENGTH = 4096
"""Where the model is meant for as much: longer sequences are rarely worth their memory."""


def recipe_for(imported: Imported, source: Path, checkpoint: Path, path: Path | None = None) -> str:
    """A complete recipe that continues from ``checkpoint``, which ``source`` was imported as; only the paths of the
    data are left to fill in. ``path``: where it is going to be written; None: it is printed.
    """
    tokenizer = f"tokenizer = {_text(imported.tokenizer or '…')}"
    if not imported.is_tokenizer_readable:
        tokenizer = f"# {tokenizer}"
    spec = one_line(shlex.quote(imported.tokenizer)) if imported.tokenizer else "SPEC"
    name = one_line(shlex.quote(str(path or "recipe.toml")))
    first = "Before the first start," if path else f"Save this as {name},"
    length = min(SEQUENCE_LENGTH, imported.model.max_position_embeddings)
    return printable(f"""\
# Continues training {one_line(str(source))}, {counted(imported.parameters, "parameter")}.
# {first} fill in data.sources, then:
#   python -m megagap.train {name}
#   torchrun --nproc-per-node 8 -m megagap.train {name} --parallel.tp 2
# `python -m megagap.train --help` lists all settings. [model] is left out: it comes from the checkpoint.

[data]
{tokenizer}
# The prefixes that {typed("preprocess")} --tokenizer {spec} --append-eod wrote:
sources = [{{ path = "PREFIX_text_document", weight = 1.0 }}]

[train]
steps = 1000
global_batch_size = 64
micro_batch_size = 1
sequence_length = {length}  # of at most {imported.model.max_position_embeddings}
precision = "bf16-mixed"

[optim]
lr = 2e-5  # small, as the model is trained already
min_lr = 2e-6
schedule = "cosine"
warmup_steps = 100

[checkpoint]
load = {_text(str(checkpoint.resolve()))}
load_mode = "model"
every = 100

[run]
dir = {_text(str(Path("runs") / (checkpoint.resolve().name + "-continued")))}
""")


def one_line(text: str) -> str:
    """``text`` as a comment of TOML may hold it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _text(text: str) -> str:
    return as_toml(printable(text))
