"""The model of the checkpoint that a run starts from, for recipes that leave it out."""

from pathlib import Path

from megagap.checkpoint.index import Index
from megagap.checkpoint.load import find_intact, resolve_checkpoint
from megagap.checkpoint.save import CHECKPOINTS
from megagap.checkpoint.state import read_model, read_recipe_model
from megagap.config import StoredModel
from megagap.errors import CheckpointError
from megagap.files import file_errors


def find_model(run: Path, load: str, load_mode: str) -> StoredModel | None:
    """The model that a run in the directory ``run`` starts from: its own newest checkpoint's, else that of the folder
    ``checkpoint.load``; None for a run that starts from scratch.

    Raises :class:`CheckpointError` if the checkpoint is missing, damaged, or of another version.
    """
    if not load:
        return None
    with file_errors(f"cannot read {run}", run, CheckpointError):
        own = find_intact(run / CHECKPOINTS, {}, headers=False)
    if own is None and load == "latest":
        return None
    folder = own[0] if own else resolve_checkpoint(Path(load))
    index = own[1] if own else Index.read(folder)
    # New runs start from the weights as they were last trained; a run that continues has its phases before it still.
    read = read_recipe_model if own or load_mode != "model" else read_model
    return StoredModel(folder, read(folder, index))
