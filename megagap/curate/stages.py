"""The stages of a curation: for each, its datatrove pipeline and its number of tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datatrove.pipeline.decont import NGramsDecontFilter
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

from megagap.curate.contamination import BenchmarkIndexer, benchmark_files, decontamination_config
from megagap.curate.counts import CpuTime
from megagap.curate.filters import FILTERS, quality_filter
from megagap.curate.language import language_filter
from megagap.curate.pii import PiiMasker
from megagap.curate.reader import CorpusReader
from megagap.curate.settings import Curation
from megagap.curate.urls import url_filter
from megagap.curate.words import HASHES, word_tokenizer
from megagap.preprocess.datatrove import TokenFileWriter


@dataclass(frozen=True)
class Stage:
    name: str
    tasks: int
    pipeline: list[Any]


@dataclass(frozen=True)
class Folders:
    """Where a curation keeps what it makes, in its output folder."""

    output: Path

    def work(self, name: str) -> str:
        return str(self.output / "work" / name)

    def dropped(self, name: str) -> Any:
        """Of a filter: what it drops, with the reason as ``filter_reason``."""
        return JsonlWriter(str(self.output / "dropped" / name))

    @property
    def curated(self) -> Path:
        """JSON lines, one folder per language."""
        return self.output / "curated"

    def logs(self, stage: str) -> str:
        return str(self.output / "logs" / stage)

    def tokens(self, language: str) -> Path:
        """Prefix of a task's token files."""
        return self.output / "work" / "tokens" / language


def stages(settings: Curation, files: Sequence[Path], finish: Callable[[], Any]) -> list[Stage]:
    """Of the input ``files``, in the order in which they run, each after the one before; ``finish`` makes the last
    block.

    Raises :class:`ConfigError` and :class:`DataError` where a block cannot be made.
    """
    folders = Folders(Path(settings.output.folder))
    tasks = settings.tasks
    source = folders.work("filtered")
    reader = CorpusReader(settings.input, files, folders.dropped("read"))
    found = [Stage("filter", tasks, [reader, *_filters(settings, folders), JsonlWriter(source)])]
    if settings.deduplicate:
        found += _deduplication(settings, folders)
    blocks: list[Any] = [JsonlReader(source)]
    if settings.deduplicate:
        blocks.append(
            MinhashDedupFilter(folders.work("clusters"), folders.dropped("deduplicate"), load_cluster_ids=True)
        )
    if settings.mask:
        blocks.append(PiiMasker(settings.mask.kinds))
    if settings.decontaminate:
        benchmarks = [str(path) for path in benchmark_files(settings.decontaminate.benchmarks)]
        index = BenchmarkIndexer(benchmarks, folders.work("benchmarks"), settings.decontaminate.ngrams)
        found.append(Stage("benchmarks", 1, [index]))
        config = decontamination_config(settings.decontaminate.ngrams)
        words = word_tokenizer("plain", "")  # as the index
        blocks.append(
            NGramsDecontFilter(folders.work("benchmarks"), config, folders.dropped("decontaminate"), language=words)
        )
    if settings.classifier:
        from megagap.curate.quality.filter import QualityFilter

        chosen = settings.classifier
        blocks.append(QualityFilter(chosen.model, chosen.drop, chosen.batch_size, folders.dropped("classifier")))
    blocks.append(JsonlWriter(str(folders.curated), "${language}/${rank}.jsonl.gz"))
    found.append(Stage("select", tasks, blocks))
    if settings.output.tokenizer:
        for language in settings.language.keep:
            found.append(Stage(f"tokens-{language}", tasks, [
                CuratedReader(str(folders.curated / language)),
                TokenFileWriter(str(folders.tokens(language)), settings.output.tokenizer),
            ]))  # fmt: skip
    found = [_timed(stage) for stage in found]
    return [*found, Stage("finish", 1, [finish()])]


def _timed(stage: Stage) -> Stage:
    timer = CpuTime()
    return Stage(stage.name, stage.tasks, [timer.start, *stage.pipeline, timer])


class CuratedReader(JsonlReader):  # type: ignore[misc,unused-ignore]
    """Reads nothing, rather than fail, where no document of a language is left."""

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        if Path(self.data_folder.path).is_dir():
            yield from super().run(data, rank, world_size)


def _filters(settings: Curation, folders: Folders) -> list[Any]:
    blocks = []
    if settings.urls:
        blocks.append(url_filter(settings.urls.lists, settings.urls.blocked_domains, folders.dropped("urls")))
    chosen = settings.language
    blocks.append(language_filter(chosen.model, chosen.keep, chosen.threshold, folders.dropped("language")))
    for name in FILTERS:
        by_language = {language: given[name] for language, given in settings.quality.items() if name in given}
        if by_language:
            blocks.append(quality_filter(name, by_language, settings.words, folders.dropped(name)))
    return blocks


def _deduplication(settings: Curation, folders: Folders) -> list[Stage]:
    given = settings.deduplicate
    assert given
    config = MinhashConfig(given.ngrams, given.buckets, given.hashes_per_bucket, hash_config=HASHES)
    signatures, pairs, clusters = (folders.work(name) for name in ("signatures", "pairs", "clusters"))
    words = word_tokenizer("plain", "")  # one for all languages
    reader = JsonlReader(folders.work("filtered"))
    return [
        Stage("signatures", settings.tasks, [reader, MinhashDedupSignature(signatures, config, language=words)]),
        Stage("pairs", given.buckets, [MinhashDedupBuckets(signatures, pairs, config=config)]),
        Stage("clusters", 1, [MinhashDedupCluster(pairs, clusters, config, save_cluster_id=True)]),
    ]
