"""Every setting with its type, default and meaning.

A setting explains itself in the docstring below it: ``--help`` and error messages come from that text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, create_model

from megagap.parallel.layout import ContextMode
from megagap.parallel.placement import Placement, balance_layers, spread_layers
from megagap.parallel.schedule import SCHEDULES, Schedule, choose
from megagap.token_formats import pair_prefix

Positive = Annotated[int, Field(ge=1, le=2**60)]
Count = Annotated[int, Field(ge=0, le=2**60)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SampleRange = Annotated[str, Field(pattern=r"^[0-9]+:[0-9]+$")]
Fraction = Annotated[float, Field(ge=0, lt=1)]
if TYPE_CHECKING:  # which cannot know a table's keys
    ScheduleName = str
else:
    ScheduleName = Literal[tuple(SCHEDULES)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, strict=True)


class RopeScaling(Section):
    """Llama 3.1's scaling of the rotary frequencies to longer contexts."""

    rope_type: Literal["llama3"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    low_freq_factor: AboveZero
    high_freq_factor: AboveZero
    original_max_position_embeddings: Positive


class Model(Section):
    preset: str = ""
    """A published shape to start from, in place of the required settings; others of [model] override it."""
    hidden_size: Positive
    """Width of the residual stream."""
    num_hidden_layers: Positive
    """Transformer layers."""
    num_attention_heads: Positive
    """Query heads."""
    num_key_value_heads: Positive
    """Key/value heads; must divide num_attention_heads (grouped-query attention)."""
    head_dim: Annotated[int, Field(ge=0, le=2**60, multiple_of=2)] = 0
    """Width of a head, even; 0 means hidden_size / num_attention_heads."""
    intermediate_size: Positive
    """Width of the SwiGLU feed-forward."""
    vocab_size: Positive
    """Token ids, without padding."""
    max_position_embeddings: Positive
    """Longest sequence that the model is meant for."""
    rope_theta: AboveZero = 500000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1's long-context scaling, `{rope_type = "llama3", factor = …, …}`."""
    rms_norm_eps: AboveZero = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the token embedding as the output projection too."""
    headless: bool = False
    """No output projection: outputs are to resemble the embedding of the next token more than those of others in the
    sequence (contrastive weight tying). Needs tie_word_embeddings."""
    attention_bias: bool = False
    """Biases on the q, k, v and o projections."""
    mlp_bias: bool = False
    """Biases on the gate, up and down projections."""
    norm_position: Literal["pre", "post"] = "pre"
    """Whether each block's RMSNorm is before it, x + block(norm(x)), or after it, x + norm(block(x)) (OLMo 2)."""
    qk_norm: bool = False
    """RMSNorm over all queries and over all keys of a token, before the rotary embedding (OLMo 2)."""
    norm_gain_scale: AboveZero = 1.0
    """RMSNorm multiplies its gains by this and stores them as much smaller: with 20, gains in bf16 move (Gaperon)."""
    initializer_range: AboveZero = 0.02
    """Standard deviation of initial weights; projections back into the residual stream get it / sqrt(2 layers), unless
    a norm follows them."""


class Parallel(Section):
    tp: Positive = 1
    """Tensor-parallel ranks: each layer's matrices are split over them. Keep within a node; must divide the heads."""
    pp: Positive = 1
    """Pipeline-parallel ranks: the layers are split over them, in order."""
    vpp: Positive | None = None
    """Virtual stages of each pipeline rank. Default: 1; 2 with interleaved and zb-v."""
    dp_replicate: Positive = 1
    """Groups of data-parallel ranks that each hold everything `optim.zero` shards; it is sharded within a group."""
    cp: Positive = 1
    """Context-parallel ranks: each sequence is split over them, for long ones."""
    context_mode: ContextMode = "ring"
    """How attention reaches the tokens of other ranks: keys travel around, heads for tokens, or all keys gathered."""
    sequence_parallel: bool | None = None
    """Split the residual stream over tp along the sequence; saves activation memory. Default: true where tp > 1."""
    schedule: ScheduleName | None = None
    """Order of forwards and backwards in the pipeline. Default: 1f1b; interleaved where vpp > 1."""
    layers_per_stage: list[Count] | Literal["balanced"] | None = None
    """Layers of each of the pp × vpp virtual stages, in the order of the model; `balanced`: as even as possible in
    FLOPs, the output projection's included. By default spread evenly, earlier stages first."""


class SourceSettings(Section):
    path: str | list[str]
    """Prefix of a .bin/.idx pair, without the ending; a glob or a list stands for shards of one source."""
    weight: AboveZero = 1.0
    """Share of the samples, relative to the other sources."""
    name: str = ""
    """Name in logs; by default from the path."""
    role: str = ""
    """What it is, in a line; told where its files are missing."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path


class PhaseSettings(Section):
    name: str
    """Name in logs."""
    tokens: Positive
    """Tokens to train on, rounded up to a whole step."""
    sources: Annotated[list[SourceSettings], Field(min_length=1)]
    """Its mixture, as in `data.sources`."""
    sequence_length: Count = 0
    """Tokens per sequence; 0 means train.sequence_length."""
    rope_theta: NonNegative = 0.0
    """Base of the rotary wavelengths; 0 means model.rope_theta."""


class Data(Section):
    tokenizer: str = ""
    """Tokenizer of the sources (file or folder), exported with the model; optional for training."""
    sources: list[SourceSettings] = []
    """What to train on, `[{path = "…", weight = …}, …]`."""
    phases: list[PhaseSettings] = []
    """Instead of `sources`: consecutive mixtures, `[[data.phases]]` with `name`, `tokens` and `sources`."""
    validation: list[SourceSettings] = []
    """Held-out sources; by default the second part of `split`."""
    tasks: list[str] = []
    """Multiple choice and completion tasks to evaluate (`train.evaluate_tasks_every`): files of JSON lines."""
    split: str = "100,0,0"
    """Shares of each source's documents for training, validation and test."""
    order: Literal["shuffled", "megatron"] = "shuffled"
    """Order of the samples; `shuffled` depends only on the seed and the sample number, `megatron` also on the steps."""
    workers: Annotated[int, Field(ge=0, le=256)] = 1
    """Threads of each process that read batches ahead; 0: each is read when it is needed."""
    document_mask: bool = False
    """Attend within documents only, count positions from their start, predict nothing across their boundaries."""


class Train(Section):
    steps: Count = 0
    """Updates to make; or give `tokens`."""
    tokens: Count = 0
    """Tokens to train on, rounded up to a whole step; or give `steps`."""
    global_batch_size: Positive
    """Sequences per update, over all ranks."""
    batch_ramp: list[Annotated[tuple[Positive, Positive], Field(strict=False)]] = []
    """Other batch sizes later, `[[tokens, sequences], …]`: from the first step that begins after so many tokens on."""
    micro_batch_size: Positive = 1
    """Sequences that one rank computes at a time."""
    sequence_length: Positive
    """Tokens per sequence."""
    precision: Literal["fp32", "bf16-mixed", "bf16-pure", "fp16-mixed"] = "fp32"
    """Arithmetic of the model; `bf16-mixed` keeps fp32 masters, sums gradients and updates in fp32; `bf16-pure` keeps
    parameters, gradients and moments in bf16 alone, and rounds updates as `optim.rounding` says; `fp16-mixed` scales
    the loss, for devices without bf16."""
    z_loss: NonNegative = 0.0
    """Times logsumexp(logits)², this is added to each token's loss, so that logits do not drift (PaLM: 1e-4)."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What backward passes compute again instead of keeping it; `selective`: the cheap parts, `full`: whole layers."""
    skip_samples: list[SampleRange] = []
    """Global sample numbers to skip, `["lo:hi", …]` without hi: the usual remedy for a loss spike."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Determines the initial weights and the order of samples, whatever the layout."""
    deterministic: bool = False
    """Use only kernels that repeat bit for bit; slower attention on GPUs (AMD's: not tried); CPUs always do so."""
    compile: bool = False
    """Compile each layer with torch.compile, in the first step, which then takes longer; CPUs need a C++ compiler."""
    evaluate_every: Count = 0
    """Steps between evaluations on the held-out set; the last step is evaluated too. 0: never."""
    evaluate_first: bool = False
    """Evaluate, also `data.tasks`, before the first update, as step 0 of the metrics; a run that resumes does not."""
    evaluate_samples: Positive = 64
    """Sequences of each validation source in an evaluation, always the same ones."""
    evaluate_tasks_every: Count = 0
    """Steps between evaluations of `data.tasks`; the last step is evaluated too. 0: never."""


class Optim(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer; `muon` orthogonalises the updates of the layers' matrices, and leaves all else to AdamW."""
    lr: AboveZero = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of a decay."""
    warmup_steps: Count = 0
    """Steps of linear warmup; step 1 uses lr / warmup_steps."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """Learning rate after the warmup; `wsd` stays constant until a cooldown at the end."""
    cooldown_steps: Count = 0
    """Last steps of `wsd`, in which the rate decays to min_lr."""
    cooldown_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    """Shape of that decay; `sqrt` is 1 - sqrt(progress)."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay."""
    decay_embeddings: bool = False
    """Apply weight decay to the token embedding too."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    eps: AboveZero = 1e-8
    """AdamW's epsilon."""
    momentum: Fraction = 0.95
    """Muon's decay rate of the momentum."""
    moments_dtype: Literal["fp32", "bf16"] | None = None
    """What moments are kept in; `bf16`, rounded stochastically, saves half: with AdamW 4 bytes per parameter. By
    default fp32, with `bf16-pure` bf16."""
    rounding: Literal["nearest", "stochastic", "kahan"] | None = None
    """How `bf16-pure` rounds: `stochastic`, the default, is exact on average; `kahan`, Muon's, keeps what an update
    loses, in 2 bytes more per parameter; `nearest`, in moments too, loses small updates, as Gaperon did."""
    clip_grad: NonNegative = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    zero: Literal[0, 1, 2, 3] = 1
    """What is sharded over data-parallel ranks; 0: nothing, 1: optimizer state and masters, 2: gradients too, 3:
    parameters too."""


class Checkpoint(Section):
    every: Count = 0
    """Steps between checkpoints; one is always written at the end."""
    keep: Count = 0
    """Newest checkpoints to keep; 0: all."""
    local_every: Count = 0
    """Steps between checkpoints on the nodes' own disks, with a copy of each node's part on another node; 0: none."""
    local_dir: str = ""
    """Where they are, a folder on each node's own disk; `$NAME` stands for a variable of the node's environment. A
    start looks here, too, for the newest checkpoint. "": nowhere."""
    keep_every: Count = 0
    """Steps whose multiples are kept for ever, beside the newest `keep`; 0: none. A multiple of `every`."""
    keep_best: Count = 0
    """Checkpoints of the lowest validation loss to keep, beside the newest `keep`: of those whose step was evaluated,
    by the mean over the sources."""
    load: str = "latest"
    """`latest`: continue from this run's newest checkpoint; a folder: start a new run from it; "": from scratch."""
    load_mode: Literal["continue", "model", "model+data", "model+optimizer+data", "cooldown"] = "continue"
    """What to take from that folder; `continue`: everything, `model`: the weights, from step 0. `model+data`: weights
    and step, so data go on; `model+optimizer+data`: moments, too; both with a learning-rate schedule that starts anew.
    `cooldown`: the same for a decay without warmup. `train.steps` then counts the steps before, too."""

    @property
    def in_background(self) -> bool:
        """``async``, which is a keyword of Python."""
        return bool(getattr(self, "async"))


if not TYPE_CHECKING:
    _ASYNC = (
        "Copy what is saved to host memory and write it while training goes on. The copy takes as much memory as what "
        "each process saves, 12 bytes per parameter over all of them."
    )
    Checkpoint = create_model(
        "Checkpoint", __base__=Checkpoint, **{"async": (bool, Field(default=False, description=_ASYNC))}
    )


class Guard(Section):
    spikes: Literal["off", "report", "skip"] = "off"
    """What to do about a step whose loss or gradient norm is far above those of the steps before: `report` records it
    with its samples, `skip` leaves out its update, too. Steps that are not finite are always skipped."""
    window: Annotated[int, Field(ge=4, le=65_536)] = 128
    """Steps that a step is compared with: the last so many of its phase whose update was made. Until there are so many
    no step is a spike."""
    zscore: AboveZero = 8.0
    """Distance above their median from which on a step is a spike, in median absolute deviations scaled to a normal
    distribution's standard deviation."""
    max_skipped: Count = 20
    """Steps in a row that may be skipped; one more ends the run as failed, with its last good checkpoint intact."""
    hash_every: Count = 0
    """Steps between those whose gradients are hashed, for replay-step; 0: never. A hash reads each gradient once."""
    replay_every: Count = 0
    """Steps between those computed twice and compared bit for bit, to find ranks that compute wrongly; 0: never. Such
    a step takes twice as long; it is hashed, and skipped where the two differ."""

    replicas_every: Annotated[int, Field(ge=-1)] = 0
    """Steps between comparisons, bit for bit, of the parameters that several ranks hold alike, to find damaged ones;
    the run then ends without saving. 0: before each checkpoint only; -1: never."""


class Run(Section):
    dir: str = ""
    """The run directory, relative to the working directory, not to the recipe; by default runs/ and its name."""
    tensorboard: bool = True
    """Write TensorBoard files into the run directory."""
    tensorboard_every: Positive = 1
    """Steps between TensorBoard records; evaluations and the last step are always written."""
    max_minutes: NonNegative = 0
    """Save and stop, as after SIGTERM, once this start has run for so many minutes; 0: no limit."""
    stop_after: Count = 0
    """Save and stop after so many steps of this start (a restart counts anew); the schedule stays as it is. 0: off."""
    log_every: Positive = 10
    """Steps between console lines; metrics.jsonl has every step."""
    spans: bool = False
    """Record when each rank computes what in the pipeline, in spans/ of the run directory, for draw-schedule."""
    hang_seconds: NonNegative = 600
    """Seconds in which no rank moves on before the run ends, with logs/hang_report.txt; 0: never. Starting, the first
    step and evaluations have twice the time."""
    slow_ranks_every: Count = 10
    """Steps between those in which each rank's own time, without its waiting for others, is measured and compared;
    0: never. A rank that is 25 % slower than others of its stage three times in a row is named."""
    insight_every: Count = 0
    """Steps between records of each layer's norms of weights, gradients and updates, largest activation, and share of
    weights that changed. 0: never."""


class Settings(Section):
    model: Model
    parallel: Parallel = Parallel()
    data: Data = Data()
    train: Train
    optim: Optim = Optim()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    run: Run = Run()
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth a line in the log: settings that were found elsewhere than in the recipe, say."""
        return self._notes

    @property
    def schedule(self) -> Schedule:
        """What the pipeline ranks compute, in order."""
        return SCHEDULES[choose(self.parallel.schedule, self.parallel.vpp)[0]]

    @property
    def placement(self) -> Placement:
        """Which pipeline rank computes which layers."""
        parallel, layers = self.parallel, self.model.num_hidden_layers
        _, chunks = choose(parallel.schedule, parallel.vpp)
        match parallel.layers_per_stage:
            case "balanced":
                counts = balance_layers(layers, parallel.pp * chunks, self._head_in_layers())
            case None:
                counts = spread_layers(layers, parallel.pp * chunks)
            case counts:
                pass
        return self.schedule.place(counts, chunks)

    def _head_in_layers(self) -> float:
        """What the output projection, or a headless model's loss, costs per token, in FLOPs of a layer."""
        part, length = FlopParts.of(self.model), self.train.sequence_length
        return part.head(length) / (6 * part.layer_weights + part.layer_square(length))

    def with_notes(self, notes: Sequence[str]) -> Self:
        noted = self.model_copy()
        noted._notes = tuple(notes)
        return noted


@dataclass(frozen=True)
class FlopParts:
    """What a model's floating-point operations are counted from (``model/flops.py``)."""

    layer_weights: int
    """Elements of the matrices of a layer."""
    hidden_size: int
    head_columns: int | None
    """Of the output projection; None where a model is headless."""
    query_width: int
    """Query heads times their width."""

    @classmethod
    def of(cls, model: Model) -> Self:
        width = model.head_dim or model.hidden_size // model.num_attention_heads
        query, key_value = model.num_attention_heads * width, model.num_key_value_heads * width
        attention = model.hidden_size * (query + 2 * key_value) + query * model.hidden_size
        feed_forward = 3 * model.hidden_size * model.intermediate_size
        columns = None if model.headless else model.vocab_size
        return cls(attention + feed_forward, model.hidden_size, columns, query)

    def head(self, sequence_length: int) -> int:
        """Operations per token, forward and backward: the output projection's, or the scores' with all targets of a
        sequence."""
        return 6 * self.hidden_size * (sequence_length if self.head_columns is None else self.head_columns)

    def layer_square(self, sequence_length: int) -> int:
        """Operations per token and layer on the whole attention matrix (Narayanan et al. 2021, appendix)."""
        return 12 * self.query_width * sequence_length


SECTIONS = {name: cast(type[Section], field.annotation) for name, field in Settings.model_fields.items()}

PLANNED: dict[str, dict[str, Any]] = {
    "run": {"wandb": False, "profile": False},
}
"""Planned settings, each with the one value that it can be given today: what is done without it."""


def source_name(source: SourceSettings) -> str:
    """The given name, or the file's name without folder and Megatron's ``_text_document``."""
    prefix = pair_prefix(Path(source.paths[0]).name)
    return source.name or prefix.removesuffix("_document").removesuffix("_text")
