"""Runs a curation's stages with one of datatrove's executors."""

import hashlib
import inspect
import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datatrove.pipeline.base import PipelineStep

from megagap.curate.contamination import benchmark_files, items, require_clean
from megagap.curate.counts import as_json, count_stages, require_balance, stage_seconds
from megagap.curate.reader import has_documents
from megagap.curate.report import write_report
from megagap.curate.settings import Curation
from megagap.curate.slurm_queue import record_jobs, require_ended
from megagap.curate.stages import Folders, Stage, stages
from megagap.errors import ConfigError, DataError, counted, library_errors
from megagap.files import Lock, LockedError, make_folder, read_regular, write_text
from megagap.preprocess.listing import list_inputs

log = logging.getLogger(__name__)

ExecutorKind = Literal["local", "slurm", "ray"]
RECORD = "curation.json"
"""In the output folder: the settings and input that what is there was made of."""


@dataclass(frozen=True)
class Executor:
    kind: ExecutorKind = "local"
    workers: int = 1
    """Tasks that run at a time."""
    options: dict[str, Any] = field(default_factory=dict)
    """For datatrove's executor: partition, time and others of SlurmPipelineExecutor and RayPipelineExecutor."""


class Finish(PipelineStep):
    """The last stage: merges each language's token files, and writes ``counts.json`` and ``report.html``."""

    name = "megagap curation: finish"
    type = "🏁 - FINISH"

    def __init__(self, settings: Curation) -> None:
        super().__init__()
        self.settings = settings

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        yield from data or ()
        output = Path(self.settings.output.folder)
        if self.settings.output.tokenizer:
            from megagap.preprocess.merge import merge_datasets

            for language in self.settings.language.keep:
                prefix = Folders(output).tokens(language)
                tasks = self.settings.tasks
                shards = [f"{prefix}-{task:05}-of-{tasks:05}_text_document" for task in range(tasks)]
                merge_datasets(shards, str(output / f"{language}_text_document"))
        counts = count_stages(output)
        require_balance(output, counts)
        record = {
            "documents": counts[0].total,
            "stages": as_json(counts),
            "cpu_seconds": stage_seconds(output),
        }
        write_text(output / "counts.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_report(output)


def run_curation(settings: Curation, executor: Executor) -> bool:
    """Run every stage that is not complete yet; returns whether all are (on Slurm they are only submitted).

    Raises :class:`ConfigError` and :class:`DataError` for what can be told beforehand before anything is started, and
    :class:`DataError` where a stage fails or leaves no document.
    """
    files = input_files(settings)
    check_beforehand(settings)
    prepared = stages(settings, files, lambda: Finish(settings))
    output = Path(settings.output.folder)
    make_folder(output)
    try:
        lock = Lock(output / ".lock")
    except LockedError as error:
        raise DataError(
            f"{output} is being written by {error.holder}\n  wait for it, or choose another output.folder."
        ) from None
    try:
        _require_same(settings, files, output)
        require_ended(output)
        if executor.kind == "slurm":
            _submit(prepared, executor, Folders(output))
            return False
        for stage in prepared:
            _run_stage(stage, executor, Folders(output))
        return True
    finally:
        lock.release()


def check_beforehand(settings: Curation) -> None:
    """What a stage would find out late. Raises :class:`DataError`."""
    if settings.classifier:
        from megagap.curate.quality.model import load_quality_model

        load_quality_model(Path(settings.classifier.model))
    if settings.output.tokenizer:
        from megagap.tokenizer import load_tokenizer

        if load_tokenizer(settings.output.tokenizer).eod is None:
            raise DataError(f"the tokenizer {settings.output.tokenizer} lacks an end-of-text token")
    if settings.decontaminate:
        benchmarks = benchmark_files(settings.decontaminate.benchmarks)
        validation = [Path(path) for path in settings.decontaminate.validation]
        texts = ((f"{path}, item {i}", text) for path in validation for i, text in enumerate(items(path), 1))
        require_clean(texts, benchmarks, settings.decontaminate.ngrams)


def input_files(settings: Curation) -> list[Path]:
    """The files that are curated, by path. Links are followed; what is not read is logged with its reason.

    Raises :class:`DataError` if there are none, or one cannot be read, and :class:`ConfigError` for an output folder
    among them.
    """
    folder, output = Path(settings.input.folder), Path(settings.output.folder)
    if not folder.is_dir():
        raise DataError(f"input.folder: there is no folder {folder}\n  give one of JSON-lines files.")
    if output.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"output.folder = {output} is in input.folder, and would be read\n  choose another.")
    pattern = settings.input.pattern
    listing = list_inputs([folder], [settings.input.text_key])
    found = [Path(one.path) for one in listing.inputs]
    files = sorted(path for path in found if fnmatchcase(path.name, pattern))
    if not files:
        raise DataError(f"input.folder: no file in {folder} matches {pattern}")
    for note in listing.notes:
        log.warning("%s", note)
    if len(files) < len(found):
        others = counted(len(found) - len(files), "file of text is", "files of text are")
        log.warning('%s left out: input.pattern = "%s" does not match', others, pattern)
    empty = [path for path in files if not has_documents(path, settings.input.text_key)]
    if empty == files:
        raise DataError(f"input.folder: {folder} has no document: {counted(len(files), 'file is', 'files are')} empty")
    return files


def _require_same(settings: Curation, files: list[Path], output: Path) -> None:
    """Go on only with what was begun: datatrove skips complete tasks whatever they were made of."""
    made_of = {
        "settings": settings.model_dump(mode="json"),
        "input files": _digest(files),
        "benchmarks, lists or models": _digest(_other_files(settings)),
    }
    record = json.dumps(made_of, indent=2) + "\n"
    try:
        before = read_regular(output / RECORD).decode()
    except FileNotFoundError:
        if stray := [path.name for path in output.iterdir() if path.name != ".lock"]:
            raise DataError(f"{output} is not empty ({stray[0]}, …)\n  choose a new output.folder.") from None
        write_text(output / RECORD, record)
        return
    if before != record:
        with library_errors(f"{output / RECORD} is damaged"):
            earlier = json.loads(before)
            what = next((key for key, value in made_of.items() if earlier.get(key) != value), "settings")
        raise ConfigError(
            f"{output} was begun with other {what}, kept in {RECORD}\n  choose another output.folder, or remove it."
        )


def _digest(files: Iterable[Path]) -> str:
    """Of names, sizes and times."""
    listed = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return hashlib.blake2b(json.dumps(listed).encode(), digest_size=16).hexdigest()


def _other_files(settings: Curation) -> list[Path]:
    """What the stages read besides the input."""
    found: list[Path] = [Path(settings.language.model)] if settings.language.model else []
    folders: list[Path] = []
    if settings.urls and settings.urls.lists:
        folders.append(Path(settings.urls.lists))
    if settings.decontaminate:
        found += benchmark_files(settings.decontaminate.benchmarks)
    if settings.classifier:
        folders.append(Path(settings.classifier.model))
    if settings.output.tokenizer:
        from megagap.tokenizer import find_tokenizer

        found.append(find_tokenizer(settings.output.tokenizer)[1])
    return found + sorted(path for folder in folders for path in folder.iterdir() if path.is_file())


def _run_stage(stage: Stage, executor: Executor, folders: Folders) -> None:
    logs = folders.logs(stage.name)
    made = _local(stage, executor, logs) if executor.kind == "local" else _ray(stage, executor, logs)
    made.run()
    if missing := made.get_incomplete_ranks(skip_completed=True):
        raise DataError(
            f"the stage {stage.name} failed in {len(missing)} of its {stage.tasks} tasks\n"
            f"  its logs are in {logs}; the same command goes on with these tasks."
        )
    if stage.name in ("filter", "select") and count_stages(folders.output)[-1].kept == 0:
        last = count_stages(folders.output)
        told = ", ".join(f"{count.stage} {count.dropped:,}" for count in last if count.dropped)
        raise DataError(f"no document is left after the stage {stage.name}; dropped: {told}\n  soften the settings.")


_OURS = ("pipeline", "tasks", "workers", "logging_dir", "depends", "job_name")
"""Arguments of datatrove's executors that are not options."""


def _with_options(kind: Any, options: dict[str, Any]) -> Any:
    """``kind`` with ``options``. Raises :class:`ConfigError` for one that it does not take."""
    known = [name for name in inspect.signature(kind).parameters if name not in _OURS]
    if unknown := [name for name in options if name not in known]:
        raise ConfigError(f"--option {unknown[0]} is unknown\n  {kind.__name__} of datatrove has {', '.join(known)}.")
    return partial(kind, **options)


def _local(stage: Stage, executor: Executor, logs: str) -> Any:
    from datatrove.executor import LocalPipelineExecutor

    make = _with_options(LocalPipelineExecutor, executor.options)
    return make(stage.pipeline, tasks=stage.tasks, workers=min(executor.workers, stage.tasks), logging_dir=logs)


def _ray(stage: Stage, executor: Executor, logs: str) -> Any:
    try:
        import ray  # noqa: F401
        from datatrove.executor.ray import RayPipelineExecutor
    except ImportError:
        raise ConfigError("--executor ray needs the package ray, which this Python lacks\n  pip install ray") from None
    make = _with_options(RayPipelineExecutor, executor.options)
    return make(stage.pipeline, tasks=stage.tasks, workers=min(executor.workers, stage.tasks), logging_dir=logs)


def _submit(prepared: list[Stage], executor: Executor, folders: Folders) -> None:
    """Each stage as a job array that waits for the one before."""
    from datatrove.executor.slurm import SlurmPipelineExecutor

    if shutil.which("sbatch") is None:
        raise ConfigError(
            "--executor slurm needs sbatch, which is not on PATH\n  run it on a login node of the cluster."
        )
    if lacking := [name for name in ("time", "partition") if name not in executor.options]:
        raise ConfigError(f"--executor slurm needs --option {lacking[0]}=…")
    make = _with_options(SlurmPipelineExecutor, executor.options)
    submitted: list[Any] = []
    for stage in prepared:
        array = make(
            stage.pipeline,
            tasks=stage.tasks,
            workers=min(executor.workers, stage.tasks),
            logging_dir=folders.logs(stage.name),
            job_name=f"curate-{stage.name}",
            depends=submitted[-1] if submitted else None,
        )
        submitted.append(array)
    try:
        with library_errors("sbatch did not take the jobs", ConfigError):
            submitted[-1].run()
    finally:  # also those before one that was not taken
        record_jobs(folders.output, [str(array.job_id) for array in submitted if array.job_id not in (None, -1)])
