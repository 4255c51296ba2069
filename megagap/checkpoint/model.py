"""A checkpoint as a model in one process."""

from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from megagap.checkpoint.index import Index
from megagap.checkpoint.load import load_slices, resolve_checkpoint
from megagap.checkpoint.state import read_model
from megagap.config import Model
from megagap.errors import CheckpointError
from megagap.model.attention import KeyValueCache
from megagap.model.llama import LlamaStage, build_whole
from megagap.parallel.shard import Slice


class SingleProcessModel(nn.Module):
    """``model(tokens [b, s]) -> logits [b, s, vocab]``; ``model.settings`` has its shape."""

    def __init__(self, stage: LlamaStage) -> None:
        super().__init__()
        self.stage, self.settings = stage, stage.model

    def forward(self, tokens: Tensor, caches: list[KeyValueCache] | None = None) -> Tensor:
        """With ``caches`` of earlier tokens, ``tokens`` [b, s] are added to them and the logits are the last token's
        only, [b, 1, vocab]. Once the caches are not empty, tokens must come one at a time: s = 1."""
        before = caches[0].length if caches else 0
        return self.stage.logits(self.stage(tokens, before + tokens.shape[1], caches))

    def empty_caches(self, positions: int, batch: int = 1) -> list[KeyValueCache]:
        """One per layer, with room for ``positions`` tokens of each of ``batch`` sequences."""
        self.stage.rotary_tables(positions)  # once, instead of growing them token by token
        shape = (batch, positions, self.settings.num_key_value_heads, self.settings.head_dim)
        like = self.stage.output
        return [
            KeyValueCache(like.new_empty(shape), like.new_empty(shape)) for _ in range(self.settings.num_hidden_layers)
        ]


def load_model(path: str | Path, device: torch.device | None = None) -> SingleProcessModel:
    """The model of a checkpoint written in any layout, in eval mode and in the dtype stored.

    ``path``: a checkpoint folder, or a run directory (its latest). Raises :class:`CheckpointError` if it is damaged, or
    its model has no output projection.
    """
    folder = resolve_checkpoint(Path(path))
    index = Index.read(folder)
    settings = read_model(folder, index)
    require_output_projection(folder, settings)
    model = build_model(settings, stored_dtype(folder, index), device)
    wanted = [
        Slice("weight", parameter.shard, 0, parameter.numel(), parameter.detach().view(-1))
        for parameter in model.stage.sharded_parameters()
    ]
    load_slices(folder, index, wanted, cast=True)
    return model


def require_output_projection(folder: Path, model: Model) -> None:
    """Raises :class:`CheckpointError` for a headless model, which gives tokens no probabilities."""
    if model.headless:
        raise CheckpointError(
            f"{folder} is a headless model: without an output projection it gives tokens no probabilities\n"
            "  train it on as a model that predicts tokens with its embedding: --checkpoint.load_mode model "
            "--model.headless false; or export it for its hidden states."
        )


def build_model(settings: Model, dtype: torch.dtype, device: torch.device | None = None) -> SingleProcessModel:
    """A model in eval mode whose weights are not set yet."""
    return SingleProcessModel(build_whole(settings, dtype, device)).eval()


def stored_dtype(folder: Path, index: Index) -> torch.dtype:
    """The dtype of the weights; if they have several, the one that can represent all values.

    Raises :class:`CheckpointError` if there are none.
    """
    dtypes = {tensor.torch_dtype for tensor in index.tensors if tensor.kind == "weight"}
    if not dtypes:
        raise CheckpointError(f"{folder} contains no weights\n  is it a checkpoint of a training run?")
    return widest(dtypes)


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The narrowest dtype that can represent the values of all ``dtypes``, of which there is at least one."""
    return reduce(torch.promote_types, dtypes)
