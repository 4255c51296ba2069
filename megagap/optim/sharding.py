"""What each data-parallel rank has all of, and what only its slice of: the stages of ZeRO (Rajbhandari et al. 2020)."""

from dataclasses import dataclass

from megagap.parallel.mesh import Axis, Mesh


@dataclass(frozen=True)
class Sharding:
    """``optim.zero`` and ``parallel.dp_replicate`` on a mesh. Where the axis has one member nothing is sharded."""

    shard: Axis
    """Each of its members owns an equal slice of every bucket. One member at stage 0."""
    replicate: Axis
    """The ranks that own the same slice: they sum its gradient, and make the same update. Its first counts and saves
    it."""
    gradients: bool
    """Whether only the slice of a gradient is kept (from stage 2 on)."""
    parameters: bool
    """Whether only the slice of the parameters is kept (stage 3)."""

    @classmethod
    def of(cls, zero: int, mesh: Mesh) -> "Sharding":
        if zero == 0:
            rank = mesh.world.rank
            return cls(Axis("unsharded", (rank,), 0), mesh.data, False, False)
        several = mesh.shard.size > 1
        return cls(mesh.shard, mesh.replicate, several and zero >= 2, several and zero == 3)
