"""What attention keeps, and needs besides, under context parallelism (docs/context_parallelism.md derives it)."""

from dataclasses import dataclass
from math import gcd

from megagap.parallel.layout import ContextMode


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
    widened: float
    """Bytes of an element of sums over bytes of an activation's."""

    @property
    def sees_whole_sequences(self) -> bool:
        """Whether the kernel is that of one process, for some of the heads."""
        return self.mode == "alltoall"

    @property
    def saved_keys(self) -> int:
        """Keys and values kept until the backward pass, besides the queries and the result."""
        return 2 * self.keys * self._repeats

    @property
    def saved_result(self) -> int:
        """What is kept of the result besides the output projection's input, which ring and allgather share with it."""
        return self.queries if self.mode == "alltoall" else 0

    @property
    def backward_workspace(self) -> int:
        """The most that is live in the backward pass besides what is kept."""
        if self.mode == "alltoall":
            # The result's gradient, then those of queries, keys and values, of whole sequences; each is made a copy of
            # in the order in which it is sent, and received into another.
            return 3 * self.queries + 6 * self.keys * self._repeats
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

    @property
    def _repeats(self) -> int:
        """How often each key/value head is repeated so that the heads divide among the ranks."""
        return self.cp // gcd(self.cp, self.key_heads) if self.mode == "alltoall" else 1
