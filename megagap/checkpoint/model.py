"""A checkpoint as a model in one process."""

from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megagap.checkpoint.index import Index
from megagap.checkpoint.load import load_slices, resolve_checkpoint
from megagap.config import Model
from megagap.errors import CheckpointError
from megagap.model.llama import LlamaStage, build_stage
from megagap.parallel.mesh import Mesh
from megagap.parallel.shard import Slice


class SingleProcessModel(nn.Module):
    """``model(tokens [b, s]) -> logits [b, s, vocab]``; ``model.settings`` tells its shape."""

    def __init__(self, stage: LlamaStage) -> None:
        super().__init__()
        self.stage, self.settings = stage, stage.model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.stage(tokens, tokens.shape[1])
        return logits


def load_model(path: str | Path, device: torch.device | None = None) -> SingleProcessModel:
    """The model of a checkpoint written in any layout, in eval mode and in the dtype stored.

    ``path``: a checkpoint folder, or a run directory (its latest). Raises :class:`CheckpointError` if it is damaged.
    """
    folder = resolve_checkpoint(Path(path))
    index = Index.read(folder)
    settings = read_model(folder, index)
    mesh = Mesh.single(device)
    dtype = index.tensor(folder, "weight", "model.embed_tokens.weight").torch_dtype
    stage = build_stage(settings, [settings.num_hidden_layers], mesh, sequence_parallel=False, dtype=dtype)
    wanted = [
        Slice("weight", parameter.shard, 0, parameter.numel(), parameter.detach().view(-1))
        for parameter in stage.sharded_parameters()
    ]
    load_slices(folder, index, wanted)
    return SingleProcessModel(stage).eval()


def read_model(checkpoint: Path, index: Index) -> Model:
    """The model's settings. Raises :class:`CheckpointError` if the index states none."""
    try:
        model = Model.model_validate(index.state["model"])
    except (KeyError, TypeError, ValueError) as error:
        reason = error.errors()[0] if isinstance(error, ValidationError) else None
        what = f"{reason['loc'][0] if reason['loc'] else 'model'}: {reason['msg']}" if reason else "they are missing"
        raise CheckpointError(
            f"{checkpoint}: state.model does not hold the settings of a model: {what}\n"
            "  it was written by another version of megagap, or is no checkpoint of a training run."
        ) from None
    return model.model_copy(update={"head_dim": model.head_dim or model.hidden_size // model.num_attention_heads})
