"""Stage corpus: raw text files to clean, deduplicated, hash-ordered Arrow shards, in map-only Beam pipelines.

1. split + clean (`streams`, `chunks`): spans and runs of documents become chunks sorted by content hash.
2. passes over the chunks, as configured: repeated paragraphs, near-duplicates, copies across languages (`passes`).
3. assemble (`assemble`): with all chunks of a language there, shard b of n merges the b-th n-th of the hash space.

Content decides every row's place, so the shards are the same bytes on any runner, with any number of workers, chunk
size and kills; a shard is a uniform shuffle of its language and any prefix of it a uniform sample. Nothing is lost
uncounted: for every input file documents in = kept + dropped + rejected, or the stage fails.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from functools import partial
from typing import Any

from pipeline import progress
from pipeline.assemble import ShardTask, assemble, companions, phases
from pipeline.beam import local_pool, local_workers, run_map
from pipeline.chunks import CorpusJob, Source, Unit, clean_unit, list_work_parts
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.exclusion import EvaluationFiles, load_exclusion
from pipeline.manifest import Part, canonical
from pipeline.passes import documents_kind
from pipeline.sources import format_of, language_of
from pipeline.stage import WORK, StageRun, input_files, input_identity
from pipeline.storage import check_relative
from pipeline.streams import CLUSTER_FOLLOWERS, Follower, split

_log = logging.getLogger(__name__)

MB = 1_000_000


def run(run: StageRun) -> None:
    """Make the missing chunks, then the missing shards, then commit."""
    config = run.config.corpus
    sources = find_sources(run.config)
    job = CorpusJob(run.folder, int(config.chunk_mb * MB), config, _evaluation_files(run), run.identity.fingerprint)
    workers = local_workers(config.workers, sum(source.size for source in sources))
    with local_pool(workers, run.runner_args) as pool:
        run_steps = partial(
            run_map,
            workers=pool or workers,
            args=run.runner_args,
            stall_minutes=config.stall_minutes,
            progress=partial(progress.published, run.folder),
        )
        job.folder.remove(job.work_folder("claims"))  # of workers that were killed
        split_up, clean = partial(split, job, tuple(sources)), partial(clean_unit, job)
        pieces = _pieces(job, sources, workers, run.runner_args)
        expected = progress.expected(sources, job.chunk_bytes)
        with progress.live("corpus", run.folder, job.work_folder("chunks"), expected):
            run_steps("corpus", [("split", split_up), ("clean", clean)], pieces, size=partial(_cost, job))
        if lost := _unfinished(job, sources):
            raise PipelineError(f"{lost[0].name}: not all of its chunks are there; run the same command again")
        list_work_parts.cache_clear()  # of an earlier run in this process
        languages = sorted({source.language for source in sources})
        for phase in phases(config):
            run_steps(phase.label, [(phase.label, partial(phase.step, job))], phase.tasks(job, languages))
        documents = [part for language in languages for part in job.work_parts(documents_kind(job), language)]
        tasks = _shard_tasks(job, documents, languages)
        done = job.parts.done()
        todo = [task for task in tasks if task.path not in done]
        run_steps("shards", [("assemble", partial(assemble, job))], todo, size=lambda task: task.bytes)
    _finish(run, job, sources, documents, tasks)


def _evaluation_files(run: StageRun) -> EvaluationFiles | None:
    """The files of `corpus.exclude`, read once here: a bad one is told before any work is done."""
    if not run.config.corpus.exclude:
        return None
    urls = input_files("corpus.exclude", run.config.corpus.exclude, run.config)
    digests = [file.sample_sha256 for file in run.identity.inputs["corpus.exclude"]]
    files = EvaluationFiles(tuple(urls), run.config.storage_options, tuple(digests))
    found = load_exclusion(files)
    _log.info("corpus: excluding %d evaluation sentences; %d are too short to tell", found.sentences, found.ignored)
    return files


def _unfinished(job: CorpusJob, sources: list[Source]) -> list[Source]:
    """The sources that are not cut up, or that have a unit without a chunk."""
    done = job.parts.done(WORK)
    cleaned = Counter(path.rpartition("/")[0] for path in done)

    def units(source: Source) -> float:
        if end := done.get(job.end_path(source)):
            return end.rows
        first = done.get(job.chunk_path(Unit(source, 0)))
        return (first and first.stats.get("units")) or math.inf  # not known yet

    return [source for source in sources if cleaned[job.work("chunks", source)] < units(source)]


def find_sources(config: Config) -> list[Source]:
    """The input files in name order; names that occur twice are told apart by their content.

    Raises:
        UserError: no file has one of `corpus.languages`, one is given twice under different paths, or has a name that
            says no language and format or that no part could have.
    """
    urls = input_files("corpus.inputs", config.corpus.inputs, config)
    found = [(url, input_identity(url, config)) for url in urls]
    names = Counter(identity.name for _, identity in found)
    sources: dict[str, Source] = {}
    for url, (file, size, sample) in ((url, dataclasses.astuple(identity)) for url, identity in found):
        name = file if names[file] == 1 else f"{file}+{sample[:8]}"
        if name in sources:
            raise UserError(f"corpus.inputs: {file} is given twice with the same content; leave one out")
        sources[name] = Source(name, language_of(file), format_of(file), url, size)
        try:
            check_relative(name)  # parts are named after it
        except PipelineError as error:
            raise UserError(f"corpus.inputs: {error}; rename the file") from None
    wanted = config.corpus.languages
    missing = set(wanted or ()) - {source.language for source in sources.values()}
    if missing:
        raise UserError(f"corpus.languages: no input file is called {sorted(missing)[0]}.*; check corpus.inputs")
    return [sources[name] for name in sorted(sources) if wanted is None or sources[name].language in wanted]


def _pieces(
    job: CorpusJob, sources: list[Source], workers: int, runner_args: tuple[str, ...]
) -> list[Source | Follower]:
    """The sources that have units to clean, and behind them the workers' turns at following those that are streams."""
    unfinished = _unfinished(job, sources)
    followers = CLUSTER_FOLLOWERS if runner_args else workers if workers > 1 else 0
    streamed = any(source.streamed for source in unfinished)
    return [*unfinished, *(Follower(number) for number in range(followers if streamed else 0))]


def _cost(job: CorpusJob, piece: Source | Follower | Unit) -> int:
    """Bytes that a piece of work reads: followers come last."""
    if isinstance(piece, Follower):
        return 0
    if isinstance(piece, Source):
        return 1 + piece.size
    return job.chunk_bytes if piece.span is None else piece.span.stop - piece.span.start


def _shard_tasks(job: CorpusJob, documents: list[Part], languages: list[str]) -> list[ShardTask]:
    text_bytes: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    for part in documents:
        language = part.path.split("/")[2]
        text_bytes[language] += part.stats["text_bytes"]
        rows[language] += part.rows
    tasks = [ShardTask(language, 0, 0) for language in languages if job.work_parts("rejects", language)]
    for language in (language for language in languages if rows[language]):
        count = max(1, math.ceil(text_bytes[language] / (job.config.shard_mb * MB)))
        tasks += [ShardTask(language, index, count, text_bytes[language] // count) for index in range(count)]
    if not rows.total():
        raise UserError(
            "corpus.inputs: not one document was kept; see the reasons under _work in the stage's directory"
        )
    return tasks


def _finish(
    run: StageRun, job: CorpusJob, sources: list[Source], documents: list[Part], tasks: list[ShardTask]
) -> None:
    """Check that every document is accounted for, publish the counts, commit."""
    done = job.parts.done()
    shards = {task.path: done[task.path] for task in tasks if task.count}
    stats = _stats(sources, documents, shards)
    job.parts.publish_bytes("stats.json", canonical(stats))
    small = {path: data for task in tasks for path, data in companions(job, task).items()}
    run.commit(stats, keep_work=run.config.corpus.keep_chunks, companions=small)


_COUNTS = ("documents_in", "kept", "dropped", "rejected", "paragraphs_removed", "paragraph_bytes_removed")


def _stats(sources: list[Source], documents: list[Part], shards: dict[str, Part]) -> dict[str, Any]:
    language_of_source = {source.name: source.language for source in sources}
    inputs = {source.name: _empty() for source in sources}
    for part in documents:
        _sum(inputs[part.stats["source"]], {key: part.stats[key] for key in _COUNTS if key in part.stats})
    for shard in shards.values():
        for name, dropped in shard.stats["dropped"].items():
            inputs[name]["kept"] -= sum(dropped.values())
            _add(inputs[name]["dropped"], dropped)
    languages: dict[str, dict[str, Any]] = {}
    for name, counts in inputs.items():
        _check_balance(name, counts)
        total = languages.setdefault(language_of_source[name], {**_empty(), "text_bytes": 0, "chars": 0})
        _sum(total, counts)
    for path, shard in shards.items():
        for key in ("text_bytes", "chars"):
            languages[path.split("/")[0]][key] += shard.stats[key]
    totals = {**_empty(), "text_bytes": 0, "chars": 0}
    for counts in languages.values():
        _sum(totals, counts)
    if totals["kept"] != sum(shard.rows for shard in shards.values()):
        raise PipelineError(f"corpus: {totals['kept']} documents should be in the shards, which hold another number")
    return {"languages": languages, "inputs": inputs, "totals": totals, "notes": _notes(inputs)}


def _empty() -> dict[str, Any]:
    return {"documents_in": 0, "kept": 0, "dropped": {}, "rejected": {}}


def _add(counts: dict[str, int], more: dict[str, int]) -> None:
    for reason, number in more.items():
        counts[reason] = counts.get(reason, 0) + number


def _sum(total: dict[str, Any], counts: dict[str, Any]) -> None:
    for key, value in counts.items():
        if isinstance(value, dict):
            _add(total[key], value)
        else:
            total[key] = total.get(key, 0) + value


def _check_balance(name: str, counts: dict[str, Any]) -> None:
    out = counts["kept"] + sum(counts["dropped"].values()) + sum(counts["rejected"].values())
    if counts["documents_in"] != out:
        raise PipelineError(f"{name}: {counts['documents_in']} documents went in and {out} are accounted for")


def _notes(inputs: dict[str, dict[str, Any]]) -> list[str]:
    """One phrase for each input with rejected text, for the last line of a run."""
    return [
        f"{name} has rejected text ({', '.join(f'{reason}: {n}' for reason, n in sorted(counts['rejected'].items()))} "
        f"of {counts['documents_in']} documents)"
        for name, counts in sorted(inputs.items())
        if counts["rejected"]
    ]
