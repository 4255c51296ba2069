"""What a layer keeps of a microbatch from its forward to its backward pass, and what its backward pass makes meanwhile.

:meth:`LayerMemory.backward` follows the layer of ``model/llama.py`` from its end, as autograd does. A tensor is there
until the operation that reads it last has ended; what deferred weight gradients read stays longer.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Held:
    """Bytes of one layer at a moment of its backward pass."""

    kept: int
    """By the forward pass for the backward pass, and for weight gradients that are deferred."""
    made: int
    """By the backward pass, from the gradient of the layer's output on."""


@dataclass(frozen=True)
class AttentionMemory:
    """What a kernel of attention keeps and needs; in bytes."""

    inputs: int
    """Queries, keys and values that it keeps."""
    statistics: int
    """What else it keeps: a number per token and head, the probabilities, or a result of its own."""
    keeps_result: bool
    """Whether it reads its result in the backward pass, which is the input of the output projection, too."""
    backward: int
    """The most that its backward pass makes, with the result's gradient, which comes in."""
    arriving: int = 0
    """The most before, while the result's gradient is exchanged."""
    leaving: int = 0
    """The most afterwards, while the gradients of queries, keys and values are: what it kept is gone by then."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer on one rank; in bytes, by the legend of ``memory.py``."""

    R: int
    A: int
    Q: int
    K: int
    F: int
    norm: int
    """A norm's statistics: an fp32 number per token of the residual stream."""
    attention: AttentionMemory
    keeps_inputs: bool
    """Whether normalised inputs of matrix products and the product of gate and up, are kept; not with ``selective``."""
    splits_sequence: bool
    """Sequence parallelism: what enters a region is gathered, what leaves it is scattered."""
    is_compiled: bool = False
    """Whether deferred weight gradients keep copies of what they read, since a graph reuses its memory."""
    inner_copy: int = 0
    """A weight's gradient of feed-forward, where it is computed before it is added to the sum."""
    query_copy: int = 0
    """Likewise of attention's projections."""
    is_post_norm: bool = False
    """Whether norms are behind the blocks: they keep the blocks' outputs, and the stream is what enters the blocks."""
    projection_norms: int = 0
    """What norms of queries and keys keep: these as they were before, and statistics; 0 without."""
    projection_norms_backward: int = 0
    """The most that the backward pass of these norms makes."""

    @property
    def saved(self) -> int:
        """All that is kept from the forward pass on."""
        return sum(self._kept().values())

    @property
    def forward(self) -> int:
        """The most that a forward pass makes without keeping it: before the last product is summed."""
        return self.R + (self.A if self.splits_sequence else 0) + (0 if self.keeps_inputs else self.F)

    @property
    def deferred(self) -> int:
        """What deferred weight gradients keep until they are computed: inputs and output gradients of all matrices."""
        *_, last = self.backward(deferring=True)
        return last.kept

    @property
    def weight_gradients(self) -> int:
        """The most that they make then: the first of them, of the down projection."""
        return (self.A if self.splits_sequence else 0) + (0 if self.keeps_inputs else self.F) + self.inner_copy

    def _kept(self) -> dict[str, int]:
        inputs = int(self.keeps_inputs)
        normalised = self.R * int(self.keeps_inputs or self.is_post_norm)
        return {
            "input of attention's norm": self.R,  # the stream before it; with post-norm, its output
            "attention's norm": self.norm,
            "attention's input": normalised,
            "before the norms of queries and keys": self.projection_norms,
            "queries, keys, values": self.attention.inputs,
            "attention's statistics": self.attention.statistics,
            "attention's result": self.Q,
            "input of feed-forward's norm": self.R,
            "feed-forward's norm": self.norm,
            "feed-forward's input": normalised,
            "gate and up": 2 * self.F,
            "product": self.F * inputs,
        }

    def backward(self, deferring: bool, *, keeps_output_gradient: bool = False) -> list[Held]:
        """The moments in which most is there, in order; at the last one, what is left of the layer afterwards, which is
        nothing unless weight gradients are ``deferring``. ``keeps_output_gradient``: whether others need it, too."""
        kept, made = self._kept(), {"output": self.R}
        moments: list[Held] = []
        gathered, summed = (self.A, self.R) if self.splits_sequence else (0, 0)
        again = int(not self.keeps_inputs)
        norms_again = again * (not self.is_post_norm)
        copies = deferring and self.is_compiled
        stays = deferring and not copies  # what deferred weight gradients read

        def moment(*temporary: int, with_weights: int = 0) -> None:
            """``with_weights``: what is there only where weight gradients are computed now."""
            weights = 0 if deferring else with_weights
            moments.append(Held(sum(kept.values()), sum(made.values()) + sum(temporary) + weights))

        def copied(matrix: str, *read: int) -> None:
            """What the gradients of a matrix's weights read, where they keep copies."""
            if copies:
                kept[f"copies for {matrix}"] = sum(read)

        def read_by_weights(gradient: str, *inputs: str) -> None:
            """A matrix's backward pass has ended, but for its weights' gradients where these are deferred."""
            if stays:
                kept[f"gradient of {gradient}"] = made.pop(gradient)
            else:
                drop(*inputs)

        def drop(*names: str) -> None:
            for name in names:
                (kept if name in kept else made).pop(name, None)

        def sum_of_gradients(of_input: str) -> None:
            """Post-norm: the stream's gradient is what came in and that of the block's input."""
            moment(self.R)
            drop(of_input)
            made.pop("stream", None)
            made["stream"] = self.R

        output = "output"
        if self.is_post_norm:
            if not keeps_output_gradient:
                made["stream"] = made.pop("output")
            output = "of feed-forward's output"
            moment(self.R)
            made[output] = self.R
            drop("input of feed-forward's norm", "feed-forward's norm")
        # The down projection. Pre-norm, the gradient of its output is the stream's, too, and read until the norm.
        copied("down", self.F, self.R)
        moment(gathered, self.F, with_weights=again * self.F + self.inner_copy)
        read_by_weights(output, "product", *([output] if self.is_post_norm else []))
        made["of product"] = self.F
        # SwiGLU. With selective, gate and up make the product again.
        moment(2 * self.F)
        drop("of product", *([] if stays and again else ["gate and up"]))
        made["gates"] = 2 * self.F
        copied("gate and up", self.R, 2 * self.F)
        moment(self.A, summed, with_weights=norms_again * self.R + gathered + self.inner_copy)
        read_by_weights("gates", "gates", "feed-forward's input")
        made["of feed-forward's input"] = self.R
        if self.is_post_norm:
            sum_of_gradients("of feed-forward's input")
            moment(self.R)
            drop("input of attention's norm", "attention's norm")
        else:  # The norm. With selective, the stream makes its output again.
            moment(self.R)
            drop("of feed-forward's input", "feed-forward's norm", *([] if keeps_output_gradient else ["output"]))
            if not (stays and again):
                drop("input of feed-forward's norm")
        made["attention's output"] = self.R
        # The output projection, likewise.
        copied("output", self.Q, self.R)
        moment(gathered, self.Q, with_weights=self.query_copy)
        read = [] if self.attention.keeps_result else ["attention's result"]
        read_by_weights("attention's output", *read, *(["attention's output"] if self.is_post_norm else []))
        # Attention.
        moment(self.attention.arriving)
        moment(self.attention.backward)
        drop("queries, keys, values", "attention's statistics", *([] if stays else ["attention's result"]))
        moment(self.attention.leaving)
        made["rotated"] = self.Q + 2 * self.K
        moment(self.Q + self.K)
        made["projections"] = made.pop("rotated")
        if self.projection_norms:
            moment(self.projection_norms_backward)
            drop("before the norms of queries and keys")
        copied("queries, keys and values", self.R, made["projections"])
        moment(self.A, summed, with_weights=norms_again * self.R + gathered + self.query_copy)
        read_by_weights("projections", "projections", "attention's input")
        made["of attention's input"] = self.R
        if self.is_post_norm:
            sum_of_gradients("of attention's input")
        else:
            moment(self.R)
            drop("attention's norm", "of attention's input")
            if not (stays and again):
                drop("input of attention's norm")
        moment()
        return moments
