"""The training loop: data, step, metrics, evaluation, checkpoints, stopping."""

import logging
from contextlib import closing, nullcontext
from pathlib import Path

from megagap.checkpoint.agreement import raised_by_all
from megagap.checkpoint.background import BackgroundSaver
from megagap.checkpoint.local import LocalTier
from megagap.config import Settings, timeline_of
from megagap.data.loader import MicrobatchLoader
from megagap.data.samples import TrainingData
from megagap.data.validation import ValidationData
from megagap.errors import DivergedError, counted
from megagap.inference.run_tasks import TaskRows, open_run_tasks
from megagap.model.compiled import compile_layers
from megagap.model.init import initialise
from megagap.model.llama import sharded_parameters, stages_of_recipe
from megagap.model.shapes import parameter_count
from megagap.observe.evidence import Evidence
from megagap.observe.listeners import observed
from megagap.observe.run_directory import RunDirectory
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.precision import PRECISIONS
from megagap.parallel.communicator import DistributedCommunicator
from megagap.parallel.mesh import Mesh
from megagap.resume.next_start import next_start
from megagap.resume.passing_over import from_intact
from megagap.resume.persistence import background_saver, load, open_local_tier, require_loadable
from megagap.resume.start import Start, record_changes, warn_of_rising_rate
from megagap.timeline import Timeline, due
from megagap.training.datasets import training_data, validation_data, validation_texts
from megagap.training.divergence import SkippedSteps, diverged
from megagap.training.evaluations import Evaluations
from megagap.training.guard import require_repeatable
from megagap.training.keeper import CheckpointKeeper
from megagap.training.recorder import Recorder
from megagap.training.step import StepResult, TrainState, train_step
from megagap.training.stop_requests import Requests

log = logging.getLogger(__name__)


def train(settings: Settings, mesh: Mesh, run: RunDirectory) -> None:
    """Train to the last step or until stopped, leaving metrics and checkpoints in the run directory."""
    require_repeatable(settings, mesh.device)
    held_out, tasks = validation_data(settings), open_run_tasks(settings, mesh)
    tier = open_local_tier(settings, run, mesh)
    state, data, start = from_intact(settings, run, mesh, lambda source: begin(settings, mesh, run, source, tier), tier)
    steps = settings.train.steps
    if state.step >= steps:
        log.info("run %s is finished: step %d of %d", run.path, state.step, steps)
        run.status("finished")
        return

    with (
        make_loader(settings, mesh, data) as loader,
        observed(settings, run, mesh, state.step + 1) as state.pace,
        closing(background_saver(state)) if settings.checkpoint.in_background else nullcontext() as background,
    ):
        train_from(start, state, loader, held_out, tasks, run, background, tier)


def begin(
    settings: Settings, mesh: Mesh, run: RunDirectory, source: Path | None, tier: LocalTier | None
) -> tuple[TrainState, TrainingData, Start]:
    """The state that a start begins with, loaded from ``source`` or initial, and the data it goes on with."""
    with raised_by_all(DistributedCommunicator(mesh)):
        timeline = timeline_of(settings, require_loadable(settings, run, source))
        data = training_data(settings, timeline)
    state = build_state(settings, mesh, timeline)
    return state, data, load(state, run, data, source, tier)


def train_from(
    start: Start,
    state: TrainState,
    loader: MicrobatchLoader,
    held_out: ValidationData,
    tasks: TaskRows,
    run: RunDirectory,
    background: BackgroundSaver | None,
    tier: LocalTier | None,
) -> None:
    """Run the remaining steps. ``background``: writes checkpoints meanwhile; None: each step waits for its own.
    ``tier``: of checkpoints on the nodes' disks, if the run has such."""
    settings, mesh, steps = state.settings, state.mesh, state.settings.train.steps
    spans = mesh.spans
    # From here on a signal asks to stop, and a notice that came before is taken; other signals ended the process.
    requests = Requests.of_run(settings, run, state.step)
    record_changes(start, settings, mesh, run)
    run.begin(settings, mesh)
    run.event("start", processes=mesh.world.size)
    log_start(start, state)
    warn_of_rising_rate(start, state.timeline, run)
    skipped = SkippedSteps.of_run(run, state.step, mesh)
    evidence = Evidence(run, loader.data, state.guard.layers)
    texts = validation_texts(settings, held_out) if run.is_writer else {}
    recorder = Recorder(settings, state.timeline, mesh, run, state.step, skipped, evidence, texts)
    evaluations = Evaluations(state, held_out, tasks, recorder, requests)
    previous: StepResult | None = None
    keeper = CheckpointKeeper(state, run, loader.data, skipped, background, tier)

    stopping = evaluations.at_start()
    while state.step < steps and not stopping:
        spans.begin_step(state.step + 1)
        with spans.span("step"):
            with spans.span("loader"):
                batch = loader.step(state.step + 1).to(mesh.device)
            log_phase_start(state, run)
            result = train_step(state, batch, lambda: (*requests.poll(), keeper.has_failed))
        run.step = state.step
        # On a GPU the host reads a step's numbers when the next one is under way, so that it never drains the device.
        recorder.step_done(state.step, result)
        keeper.step_done(recorder.seconds)
        known = result if mesh.device.type == "cpu" else previous
        stopping, saving, failed = map(bool, known.host.read()["requests"] if known is not None else (0, 0, 0))
        previous = result
        if failed:
            keeper.settle()

        last = state.step == steps
        losses, is_stopped = evaluations.after_step()
        stopping = stopping or is_stopped
        # After the evaluation, which a stop would cut short: this one was known beforehand and can wait for it.
        stopping = requests.ends_at(state.step) or stopping
        if due(settings.checkpoint.every, state.step, last) or last or stopping or saving or keeper.withheld:
            with recorder.pause(), spans.span("checkpoint"):
                recorder.sync()
                if keeper.save_if_fit(batch, losses, recorder.seconds, is_final=last or stopping):
                    requests.saved()
                    # This step's requests came before the checkpoint, which answers them. Later polls repeat a stop.
                    previous = None
                run.status("running")
        elif due(settings.checkpoint.local_every, state.step):
            with recorder.pause(), spans.span("checkpoint"):
                recorder.sync()
                keeper.save_locally_if_fit(batch)

    recorder.close()
    if state.step == steps and keeper.withheld:
        raise diverged_at_end(recorder, keeper.withheld, state.step)
    if state.step < steps:
        record_stop(run, requests.reason or "a request to another rank", state, keeper.withheld)
        requests.await_own()
    else:
        keeper.drop_old()
        keeper.await_removal()
        run.event("finish")
        run.status("finished")


def diverged_at_end(recorder: Recorder, reason: str, last: int) -> DivergedError:
    """The error that ends a run after its last step, if the weights are not fit to be kept."""
    if recorder.skipped.total:
        return recorder.too_many_skipped(last)
    problem = f"after step {last}, the last one, {reason}"
    return diverged(problem, recorder.settings, recorder.timeline, recorder.run, last, last, recorder.start)


def record_stop(run: RunDirectory, asked_by: str, state: TrainState, withheld: str | None) -> None:
    """Record a stop before the last step, and from where the next start resumes."""
    after = f"after step {state.step}" if state.step else "before the first step"
    unsaved = f"no checkpoint was written there ({withheld}); " if withheld else ""
    message = f"stopped by {asked_by} {after}; {unsaved}{next_start(run, state.settings.checkpoint.load)}"
    run.event("stop", reason=asked_by)
    run.status("preempted", message)
    log.info("%s", message)


def make_loader(settings: Settings, mesh: Mesh, data: TrainingData) -> MicrobatchLoader:
    """This data rank's part of the run's batches."""
    return MicrobatchLoader(
        data,
        settings.train.micro_batch_size,
        mesh.dp.rank,
        mesh.dp.size,
        workers=settings.data.workers,
        document_mask=settings.data.document_mask,
    )


def log_phase_start(state: TrainState, run: RunDirectory) -> None:
    """Log when the next step is the first of a phase."""
    step, timeline = state.step + 1, state.timeline
    phase = timeline.at(step).phase
    if state.settings.data.phases and timeline.first_step(phase) == step:
        run.event("phase", phase=phase.name, first_step=step, sequence_length=phase.sequence_length)
        log.info("phase %s: steps %d to %d", phase.name, step, timeline.last_step(phase))


def build_state(settings: Settings, mesh: Mesh, timeline: Timeline | None = None) -> TrainState:
    """This rank's stages with their initial weights, and their optimizer. ``timeline``: by default the settings'."""
    stages = stages_of_recipe(settings, mesh)
    timeline = timeline or timeline_of(settings)
    if settings.train.compile:
        compile_layers(stages, len({phase.sequence_length for phase in timeline.phases}))
    parameters = sharded_parameters(stages)
    initialise(parameters, settings.model, settings.train.seed)
    optimizer = DistributedOptimizer(
        parameters,
        settings.optim,
        mesh,
        PRECISIONS[settings.train.precision].compute,
        blocks=[stage.blocks() for stage in stages],
        seed=settings.train.seed,
        gradient_dtype=PRECISIONS[settings.train.precision].gradients,
    )
    return TrainState(settings, mesh, settings.placement, stages, optimizer, timeline)


def log_start(start: Start, state: TrainState) -> None:
    """Log the run's size, its layout, and where its weights come from."""
    settings, mesh = state.settings, state.mesh
    size = mesh.world.size
    processes = counted(size, "GPU") if mesh.device.type == "cuda" else counted(size, "process", "processes")
    axes = " · ".join(f"{axis} {mesh.axis(axis).size}" for axis in ("pp", "dp", "cp", "tp"))
    steps = settings.train.steps
    log.info(
        "%s on %s (%s), %s on %s, %s",
        counted(parameter_count(settings.model), "parameter"),
        processes,
        axes,
        counted(steps, "step"),
        counted(state.timeline.at(steps).consumed_tokens, "token"),
        start,
    )
