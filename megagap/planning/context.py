"""What attention keeps, and needs besides, under context parallelism (docs/context_parallelism.md derives it)."""

from dataclasses import dataclass, replace
from math import gcd

from megagap.parallel.layout import ContextMode
from megagap.planning.layer_memory import AttentionMemory


@dataclass(frozen=True)
class ContextMemory:
    """One layer's attention for one microbatch on one rank; in bytes."""

    mode: ContextMode
    cp: int
    key_heads: int
    """Key/value heads of a tp rank."""
    queries: int
    """Of this rank's tokens, all heads of a tp rank."""
    keys: int
    """Likewise; values are as large."""
    log_sums: int
    """A number per token and head."""
    widened: float
    """Bytes of an element of sums over bytes of an activation's."""

    @property
    def sees_whole_sequences(self) -> bool:
        """Whether the kernel is that of one process, for some of the heads."""
        return self.mode == "alltoall"

    @property
    def repeated_keys(self) -> int:
        """Keys that the kernel sees: each head as often as is needed for the heads to divide among the ranks."""
        return self.keys * (self.cp // gcd(self.cp, self.key_heads) if self.mode == "alltoall" else 1)

    def around(self, kernel: AttentionMemory) -> AttentionMemory:
        """With ``alltoall``: a kernel of whole sequences, and the exchanges before and after it. Its result is not what
        the output projection reads. What is sent is made in the order in which it is sent, received into another
        tensor, and put in order in a third."""
        exchanged = self.queries + 2 * self.repeated_keys
        return replace(
            kernel,
            statistics=kernel.statistics + (self.queries if kernel.keeps_result else 0),
            keeps_result=False,
            arriving=4 * self.queries,
            leaving=4 * exchanged,
        )

    @property
    def in_parts(self) -> AttentionMemory:
        """With ``ring`` and ``allgather``."""
        return AttentionMemory(self.queries + 2 * self.keys, self.log_sums, keeps_result=True, backward=self._backward)

    @property
    def _backward(self) -> int:
        wide_queries, wide_keys = int(self.queries * self.widened), int(2 * self.keys * self.widened)
        result = self.queries + wide_queries  # the result's gradient, and the sum of the queries'
        if self.mode == "allgather":
            whole = self.cp * 2 * self.keys
            # Whole keys and values, the sums of their gradients, those of one piece's queries.
            part = self.queries // 2 + whole * (2 * self.cp - 1) // (2 * self.cp)
            return result + whole + self.cp * wide_keys + part
        here = 2 * self.keys
        # Keys and values that are here and that are coming; the gradients that are sent and that are coming; and what
        # this rank adds to them, at most for half of its queries and all of these keys.
        first = here + here + self.queries + here
        later = 2 * here + 2 * wide_keys + max(self.queries // 2 + here, self.queries + here // 2)
        last = here + 2 * wide_keys + max(self.queries // 2 + here, self.queries + here // 2)
        return result + max(first, later if self.cp > 2 else last)
