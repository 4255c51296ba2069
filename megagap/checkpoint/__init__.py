"""Checkpoints that any layout writes and any other reads: a safetensors file a rank and a JSON index of chunks.

``index`` says what lies where, ``state`` what run it is of; ``save`` writes and commits, ``load`` intersects and
verifies; ``huggingface`` turns a checkpoint into a model that ``transformers`` loads.
"""

from megagap.checkpoint.index import Chunk, Index, StoredFile, StoredTensor, rectangles
from megagap.checkpoint.load import find_latest, load_slices, load_tensor, resolve_checkpoint
from megagap.checkpoint.model import SingleProcessModel, load_model
from megagap.checkpoint.retention import Retention
from megagap.checkpoint.save import save_checkpoint
from megagap.checkpoint.starting_point import find_model
from megagap.parallel.communicator import Communicator, SingleProcess

__all__ = [
    "Chunk",
    "Communicator",
    "Index",
    "Retention",
    "SingleProcess",
    "SingleProcessModel",
    "StoredFile",
    "StoredTensor",
    "find_latest",
    "find_model",
    "load_model",
    "load_slices",
    "load_tensor",
    "rectangles",
    "resolve_checkpoint",
    "save_checkpoint",
]
