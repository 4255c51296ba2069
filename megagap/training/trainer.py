"""The training loop: data, step, metrics, evaluation, checkpoints, stopping."""

import logging

import torch

from megagap.config import Settings
from megagap.data.loader import MicrobatchLoader
from megagap.model.init import initialise
from megagap.model.llama import build_stage
from megagap.model.shapes import parameter_count
from megagap.observe.run_directory import RunDirectory
from megagap.optim.distributed import DistributedOptimizer
from megagap.optim.precision import COMPUTE_DTYPES
from megagap.parallel.mesh import Mesh
from megagap.training.datasets import training_data, validation_data
from megagap.training.evaluate import evaluate
from megagap.training.persistence import resume, save
from megagap.training.recorder import Recorder, due
from megagap.training.requests import Requests
from megagap.training.step import StepResult, TrainState, build_program, train_step

log = logging.getLogger(__name__)


def train(settings: Settings, mesh: Mesh, run: RunDirectory) -> None:
    """Train to the last step or until stopped, leaving metrics and checkpoints in the run directory."""
    data, held_out = training_data(settings), validation_data(settings)
    loader = MicrobatchLoader(
        data, settings.train.global_batch_size, settings.train.micro_batch_size, mesh.dp.rank, mesh.dp.size
    )
    state = build_state(settings, mesh)
    resume(state, run)
    steps = settings.train.steps
    if state.step >= steps:
        log.info("run %s is finished: step %d of %d", run.path, state.step, steps)
        run.status("finished")
        return

    run.begin(settings, mesh)
    run.event("start", processes=mesh.world.size)
    describe(settings, mesh, state)
    recorder = Recorder(settings, mesh, run, state.step)
    requests = Requests.of_run(settings, run)  # from here on a signal asks to stop; before, it ends the process
    previous: StepResult | None = None
    stopping = False

    while state.step < steps and not stopping:
        batch = loader.step(state.consumed_samples).to(mesh.device)
        result = train_step(state, batch, requests.poll)
        run.step = state.step
        # On a GPU the host reads a step's numbers when the next one is under way, so that it never drains the device.
        recorder.step_done(state.step, result)
        known = result if mesh.device.type == "cpu" else previous
        stopping, saving = (bool(asked) for asked in known.requests) if known is not None else (False, False)
        previous = result

        last = state.step == steps
        if due(settings.train.evaluate_every, state.step, last) and held_out.windows:
            with recorder.pause():
                recorder.add_validation(evaluate(state, held_out))
        if due(settings.checkpoint.every, state.step, last) or last or stopping or saving:
            with recorder.pause():
                recorder.sync()
                save(state, run)
                run.status("running")
                requests.saved()

    recorder.close()
    if state.step < steps:
        reason = requests.reason or "another rank"
        run.event("stop", reason=reason)
        run.status("preempted", f"stopped by {reason}; start the same command again to go on")
        log.info("stopped by %s after step %d; start the same command again to go on", reason, state.step)
    else:
        run.event("finish")
        run.status("finished")


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
    log.info(
        "%s parameters on %s %s (%s), %s steps of %s tokens, %s",
        f"{parameter_count(settings.model):,}",
        mesh.world.size,
        processes,
        axes,
        f"{settings.train.steps:,}",
        f"{settings.train.global_batch_size * settings.train.sequence_length:,}",
        start,
    )
