"""How long an operation takes on a device: the slower of its arithmetic and its memory traffic, and its launch."""

from dataclasses import dataclass

from megagap.planning.devices import Device
from megagap.planning.recording import Operation, Work


@dataclass(frozen=True)
class Cost:
    seconds: float
    kernels: int
    """Launched, with the memsets of libraries."""


def cost(operation: Operation, device: Device) -> Cost:
    """Operations follow each other: none overlaps with another, collectives neither."""
    clears = device.clears_per_product if operation.work.product is not None else 0
    launches = operation.kernels + clears
    busy = max(_arithmetic(operation.work, device), _traffic(operation, device))
    return Cost(busy + launches * device.launch_us * 1e-6, launches)


def _arithmetic(work: Work, device: Device) -> float:
    if work.product is not None:
        return (work.flops + work.recomputed_flops) / device.product_rate(work.dtype, min(work.product))
    if work.attention is not None:
        kernel, head, backward = work.attention
        return work.causal_flops / device.attention_rate(kernel, work.dtype, head, backward=backward)
    return 0.0


def _traffic(operation: Operation, device: Device) -> float:
    if operation.kind == "collectives":
        return operation.bytes / (_link_gb(operation.ranks, device) * 1e9)
    share = device.mixed_bandwidth if operation.is_mixed else 1.0
    return operation.bytes / (device.bandwidth_tb * 1e12 * share)


def _link_gb(ranks: tuple[int, ...], device: Device) -> float:
    """GB/s between neighbours in a ring of these ranks, which several rings share where they leave the node."""
    nodes = {rank // device.node for rank in ranks}
    if len(nodes) <= 1:
        return device.link_gb
    return min(device.link_gb, device.network_gb * len(ranks) / len(nodes))
