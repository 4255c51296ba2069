"""A trained classifier in a folder: ``quality.json``, and the weights as safetensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from megagap.curate.quality.encoder import EncoderModel, load_encoder
from megagap.curate.quality.labels import HEADS, LEVELS
from megagap.curate.quality.linear import LinearModel
from megagap.errors import DataError, library_errors
from megagap.files import make_folder, read_regular, write_text, written_by_library

RECORD = "quality.json"


class Record(BaseModel):
    """What ``quality.json`` says."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1] = 1
    kind: Literal["linear", "encoder"]
    heads: list[str] = list(HEADS)
    levels: list[str] = list(LEVELS)
    buckets: int = 0
    width: int = 0
    max_length: int = 0
    temperatures: list[float] = [1.0] * len(HEADS)
    """That logits are divided by, for each head (Guo et al. 2017); 1 before calibration."""
    trained_on: int = 0
    report: dict[str, Any] = {}
    """What training measured on the held-out texts."""


@dataclass
class QualityModel:
    record: Record
    network: LinearModel | EncoderModel

    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """[texts, heads, levels]; texts of similar length are computed together."""
        self.network.eval()
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        result = np.zeros((len(texts), len(HEADS), len(LEVELS)), np.float32)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = self.network.logits([texts[i] for i in chosen]).float().numpy()
        return result

    def probabilities(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """[texts, heads, levels], calibrated."""
        logits = self.logits(texts, batch_size)
        return softmax(logits / np.array(self.record.temperatures, np.float32)[:, None])


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    result: NDArray[np.float32] = powers / powers.sum(-1, keepdims=True)
    return result


def save_quality_model(model: QualityModel, folder: Path) -> None:
    """The record is written last: a folder without it is no classifier yet. Raises :class:`DataError`."""
    make_folder(folder)
    (folder / RECORD).unlink(missing_ok=True)
    network = model.network
    if isinstance(network, EncoderModel):
        with library_errors(f"cannot write the encoder to {folder}"):
            network.network.save_pretrained(folder)
            network.tokenizer.save_pretrained(folder)
    else:
        with written_by_library(folder / "model.safetensors") as partial:
            save_file(network.state_dict(), str(partial))
    write_record(model.record, folder)


def write_record(record: Record, folder: Path) -> None:
    write_text(folder / RECORD, record.model_dump_json(indent=2) + "\n")


def read_record(folder: Path) -> Record:
    """Raises :class:`DataError` for a folder that is no classifier."""
    try:
        content = read_regular(folder / RECORD)
    except FileNotFoundError:
        raise DataError(
            f"{folder} is no quality classifier: it has no {RECORD}\n  train one: megagap curate train-quality"
        ) from None
    try:
        record = Record.model_validate_json(content)
    except ValidationError as error:
        raise DataError(f"{folder / RECORD} is damaged: {error.errors()[0]['msg']}\n  train it again.") from None
    if record.heads != list(HEADS) or record.levels != list(LEVELS) or len(record.temperatures) != len(HEADS):
        raise DataError(f"{folder} was trained by another version of megagap, for {record.heads}\n  train it again.")
    return record


def load_quality_model(folder: Path) -> QualityModel:
    """Raises :class:`DataError` for a folder that is no classifier, or a damaged one."""
    record = read_record(folder)
    if record.kind == "encoder":
        return QualityModel(record, load_encoder(folder, record.max_length))
    network = LinearModel(record.buckets, record.width)
    with library_errors(f"cannot load {folder / 'model.safetensors'}"):
        network.load_state_dict(load_file(folder / "model.safetensors"))
    return QualityModel(record, network)
