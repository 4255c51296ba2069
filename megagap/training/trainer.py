"""The training loop: data, step, metrics, evaluation, checkpoints, stopping."""

import logging

import torch

from megagap.config import Settings, span_of, tokens_after
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.data.validation import ValidationData
from megagap.errors import DivergedError
from megagap.model.init import initialise
from megagap.model.llama import build_stage
from megagap.model.shapes import parameter_count
from megagap.observe.run_directory import RunDirectory
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.precision import COMPUTE_DTYPES
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data, validation_data
from megagap.training.divergence import SkippedSteps, diverged, last_good
from megagap.training.evaluate import evaluate
from megagap.training.keeper import CheckpointKeeper
from megagap.training.persistence import find_source, resume
from megagap.training.recorder import Recorder, due
from megagap.training.requests import Requests
from megagap.training.step import StepResult, TrainState, build_program, train_step

log = logging.getLogger(__name__)


def train(settings: Settings, mesh: Mesh, run: RunDirectory) -> None:
    """Train to the last step or until stopped, leaving metrics and checkpoints in the run directory."""
    source = find_source(settings, run, mesh)
    data, held_out = training_data(settings), validation_data(settings)
    state = build_state(settings, mesh)
    resume(state, run, data, source)
    steps = settings.train.steps
    if state.step >= steps:
        log.info("run %s is finished: step %d of %d", run.path, state.step, steps)
        run.status("finished")
        return

    with make_loader(settings, mesh, data) as loader:
        train_from(state, loader, held_out, run)


def train_from(state: TrainState, loader: MicrobatchLoader, held_out: ValidationData, run: RunDirectory) -> None:
    """Make the steps that are left."""
    settings, mesh, steps = state.settings, state.mesh, state.settings.train.steps
    run.begin(settings, mesh)
    run.event("start", processes=mesh.world.size)
    describe(settings, mesh, state)
    skipped = SkippedSteps.of_run(run, state.step, mesh)
    recorder = Recorder(settings, mesh, run, state.step, skipped)
    requests = Requests.of_run(settings, run)  # from here on a signal asks to stop; before, it ends the process
    previous: StepResult | None = None
    stopping = False
    keeper = CheckpointKeeper(state, run, loader.data, skipped)

    while state.step < steps and not stopping:
        batch = loader.step(state.consumed_samples).to(mesh.device)
        tell_phase(state, run)
        result = train_step(state, batch, requests.poll)
        run.step = state.step
        # On a GPU the host reads a step's numbers when the next one is under way, so that it never drains the device.
        recorder.step_done(state.step, result)
        keeper.step_done()
        known = result if mesh.device.type == "cpu" else previous
        stopping, saving = map(bool, known.host.read()["requests"]) if known is not None else (False, False)
        previous = result

        last = state.step == steps
        losses: dict[str, float] = {}
        if due(settings.train.evaluate_every, state.step, last) and held_out.windows:
            with recorder.pause():
                losses = evaluate(state, held_out)
                recorder.add_validation(losses)
        if due(settings.checkpoint.every, state.step, last) or last or stopping or saving or keeper.withheld:
            with recorder.pause():
                recorder.sync()
                if keeper.save_if_fit(batch, losses):
                    requests.saved()
                    # This step's requests came before the checkpoint, which answers them. Later polls repeat a stop.
                    previous = None
                run.status("running")

    recorder.close()
    if state.step == steps and keeper.withheld:
        raise end_of_diverged(recorder, keeper.withheld, state.step)
    if state.step < steps:
        tell_stop(run, requests.reason or "another rank", state.step, keeper.withheld)
    else:
        keeper.drop_old()
        run.event("finish")
        run.status("finished")


def end_of_diverged(recorder: Recorder, reason: str, last: int) -> DivergedError:
    """A run that has made its last step, after which the weights are not fit to be kept."""
    if recorder.skipped.total:
        return recorder.too_many_skipped(last)
    problem = f"after step {last}, the last one, {reason}"
    return diverged(problem, recorder.settings, recorder.run, last, last, recorder.start)


def tell_stop(run: RunDirectory, asked_by: str, step: int, withheld: str | None) -> None:
    """Leave word of a stop before the last step, and from where the run goes on."""
    again = "start the same command again to go on"
    if withheld:
        again = f"without a checkpoint there: {withheld}; {again} from {last_good(run) or 'the start'}"
    run.event("stop", reason=asked_by)
    run.status("preempted", f"stopped by {asked_by} after step {step}; {again}")
    log.info("stopped by %s after step %d; %s", asked_by, step, again)


def make_loader(settings: Settings, mesh: Mesh, data: TrainingData) -> MicrobatchLoader:
    """This data rank's part of the run's batches."""
    train = settings.train
    return MicrobatchLoader(
        data,
        train.global_batch_size,
        train.micro_batch_size,
        mesh.dp.rank,
        mesh.dp.size,
        workers=settings.data.workers,
        end=train.steps * train.global_batch_size,
        document_mask=settings.data.document_mask,
    )


def tell_phase(state: TrainState, run: RunDirectory) -> None:
    """Leave word where the step to come is the first of a phase."""
    phase = span_of(state.phases, state.step + 1)
    if state.settings.data.phases and phase.first == state.step:
        run.event("phase", phase=phase.name, first_step=phase.first + 1, sequence_length=phase.sequence_length)
        log.info("phase %s: steps %d to %d", phase.name, phase.first + 1, phase.first + phase.steps)


def build_state(settings: Settings, mesh: Mesh) -> TrainState:
    """This rank's stage with its initial weights, and its optimizer."""
    stage = build_stage(
        settings.model,
        settings.parallel.layers_per_stage or [settings.model.num_hidden_layers],
        mesh,
        sequence_parallel=bool(settings.parallel.sequence_parallel),
        dtype=torch.float32,
    )
    parameters = stage.sharded_parameters()
    initialise(parameters, settings.model, settings.train.seed)
    optimizer = DistributedOptimizer(parameters, settings.optim, mesh, COMPUTE_DTYPES[settings.train.precision])
    return TrainState(settings, mesh, stage, optimizer, build_program(settings, mesh))


def describe(settings: Settings, mesh: Mesh, state: TrainState) -> None:
    processes = "GPU" if mesh.device.type == "cuda" else "process" if mesh.world.size == 1 else "processes"
    axes = " · ".join(f"{axis} {mesh.axis(axis).size}" for axis in ("pp", "dp", "cp", "tp"))
    start = f"from step {state.step}" if state.step else "from scratch"
    tokens = tokens_after(state.phases, settings.train.global_batch_size, settings.train.steps)
    log.info(
        "%s parameters on %s %s (%s), %s steps on %s tokens, %s",
        f"{parameter_count(settings.model):,}",
        mesh.world.size,
        processes,
        axes,
        f"{settings.train.steps:,}",
        f"{tokens:,}",
        start,
    )
