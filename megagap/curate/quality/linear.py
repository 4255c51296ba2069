"""The baseline: a linear classifier over hashed words and pairs of words (Joulin et al. 2016, fastText)."""

import re
import zlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from megagap.curate.quality.labels import HEADS, LEVELS

_WORD = re.compile(r"\w+['’]?|[^\w\s]")
READ = 6000
"""Characters of a text that are looked at."""


class LinearModel(nn.Module):
    """The mean of ``width`` learned numbers for each word and pair of words, then one linear layer.

    Words that fall into the same of ``buckets`` share their numbers.
    """

    def __init__(self, buckets: int = 1 << 17, width: int = 32) -> None:
        super().__init__()
        self.buckets = buckets
        self.features = nn.EmbeddingBag(buckets, width, mode="mean", sparse=True)  # a batch has few of the words
        nn.init.uniform_(self.features.weight, -1 / width, 1 / width)
        self.output = nn.Linear(width, len(HEADS) * len(LEVELS))
        nn.init.zeros_(self.output.weight)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """``ids``: of all texts end to end; ``offsets``: where each begins. Logits [texts, heads, levels]."""
        return self.output(self.features(ids, offsets)).unflatten(-1, (len(HEADS), len(LEVELS)))

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Arguments of :meth:`forward`."""
        ids: list[int] = []
        offsets = []
        for text in texts:
            offsets.append(len(ids))
            words = [word.encode() for word in _WORD.findall(text[:READ])] or [b""]
            ids += [zlib.crc32(word) % self.buckets for word in words]
            ids += [zlib.crc32(a + b" " + b) % self.buckets for a, b in pairwise(words)]
        return torch.tensor(ids), torch.tensor(offsets)

    def logits(self, texts: Sequence[str]) -> Tensor:
        """[texts, heads, levels]"""
        return self(*self.encode(texts))
