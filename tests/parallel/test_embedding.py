"""Tables split over tp."""

import torch

from megagap.parallel import embedding
from megagap.parallel.embedding import VocabParallelEmbedding, vocab_shard
from megagap.parallel.layout import Layout
from megagap.parallel.mesh import Mesh
from megagap.parallel.tensor import TensorParallel


def test_tokens_of_other_ranks_do_not_all_add_to_one_row(monkeypatch):
    """Their gradient is zero, but on a GPU additions to one row wait for each other."""
    mesh = Mesh.without_groups(Layout(4, tp=4), 1, torch.device("cpu"))
    table = VocabParallelEmbedding(vocab_shard("t", 1000, 8, mesh.tp), TensorParallel(mesh, False, torch.float32))
    looked_up = []
    lookup = embedding.lookup
    monkeypatch.setattr(embedding, "lookup", lambda ids, weight: (looked_up.append(ids), lookup(ids, weight))[1])
    tokens = torch.arange(1000).repeat(1, 4)
    rows = table(tokens)
    (ids,) = looked_up
    assert torch.bincount(ids.flatten(), minlength=250).max() == 16
    mine = (tokens >= 250) & (tokens < 500)
    assert torch.equal(rows[mine], table.weight[tokens[mine] - 250]) and not rows[~mine].any()
