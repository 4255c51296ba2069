"""Processes that share one GPU and talk over gloo: in every layout, the gradients are those of one process on the CPU.

NCCL refuses two ranks on one device, so its own transport is not tested; streams, kernels and hooks are.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megagap.parallel import pipeline
from tests.parity.gradients import assembled, gradients, largest_difference
from tests.recipes import write_recipe

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "one": (1, {}),
    "dp2": (2, {}),
    "tp2": (2, dict(tp=2)),
    "tp2 without sequence parallelism": (2, dict(tp=2, sequence_parallel=False)),
    "tp4, more ranks than key/value heads": (4, dict(tp=4)),
    "pp2": (2, dict(pp=2)),
    "tp2 pp2 dp2": (8, dict(tp=2, pp=2)),
}

MODEL: dict[str, Any] = dict(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512
)


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "documents"])
def reference(request, workers, tmp_path_factory):
    recipe = write_recipe(tmp_path_factory.mktemp("layouts"), model=MODEL, data=dict(document_mask=request.param))
    ((parts, _),) = workers.run(1, gradients, recipe, [])
    return recipe, assembled(parts)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)], ids=["fp32", "bf16"])
def test_every_gradient_equals_that_of_one_process_on_the_cpu(layout, dtype, tolerance, reference, workers, gpu):
    recipe, expected = reference
    ranks, parallel = LAYOUTS[layout]
    overrides = [f"parallel.{name}={str(value).lower()}" for name, value in parallel.items()]
    difference = largest_difference(workers.run(ranks, gradients_on, recipe, overrides, str(gpu), dtype), expected)
    print(f"{layout}, {dtype}: {difference:.1e}")
    assert difference < tolerance


def gradients_on(rank: int, ranks: int, recipe: Path, overrides: list[str], device: str, dtype: torch.dtype) -> Any:
    torch.cuda.set_device(device)
    original, pipeline.dist.batch_isend_irecv = pipeline.dist.batch_isend_irecv, send_through_host
    try:
        return gradients(rank, ranks, recipe, overrides, None, device, dtype)
    finally:
        pipeline.dist.batch_isend_irecv = original


def send_through_host(operations: list[dist.P2POp]) -> list["Copied"]:
    """``dist.batch_isend_irecv`` over gloo, which sends from the host's memory only."""
    return [Copied(operation) for operation in operations]


class Copied:
    """One transfer under way, as ``dist.Work``."""

    def __init__(self, operation: dist.P2POp) -> None:
        self.operation = operation
        self.host = operation.tensor.cpu()
        self.work = operation.op(self.host, operation.peer, operation.group)

    def wait(self) -> None:
        self.work.wait()
        if self.operation.op is dist.irecv:
            self.operation.tensor.copy_(self.host)
