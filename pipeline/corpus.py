"""Stage corpus: raw text files to clean, deduplicated, hash-ordered Arrow shards, in two map-only Beam pipelines.

1. split + clean (`chunks`): byte ranges and runs of documents become chunks sorted by content hash.
2. assemble (`assemble`): with all chunks of a language there, shard b of n merges the b-th n-th of the hash space.

Content decides every row's place, so the shards are the same bytes on any runner, with any number of workers, chunk
size and kills; a shard is a uniform shuffle of its language and any prefix of it a uniform sample. Nothing is lost
uncounted: for every input file documents in = kept + dropped + rejected, or the stage fails.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from functools import partial
from typing import Any

from pipeline.assemble import ShardTask, assemble
from pipeline.beam import Step, local_workers, run_map
from pipeline.chunks import CorpusJob, Source, Stream, Unit, clean_unit, split, units
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import Part, canonical
from pipeline.shards import CORPUS_SCHEMA, dataset_files
from pipeline.sources import compression_of, language_of
from pipeline.stage import WORK, StageRun, input_files, input_identity

MB = 1_000_000


def run(run: StageRun) -> None:
    """Make the missing chunks, then the missing shards, then commit."""
    config = run.config.corpus
    sources = find_sources(run.config)
    job = CorpusJob(run.folder, int(config.chunk_mb * MB), config)
    workers = local_workers(config.workers, sum(source.size for source in sources))
    steps: list[tuple[str, Step]] = [("split", partial(split, job)), ("clean", partial(clean_unit, job))]
    run_map("corpus", steps, _missing(job, sources), workers, run.runner_args)
    chunks = list(job.parts.done(f"{WORK}/chunks-{job.chunk_bytes}").values())
    tasks = _shard_tasks(job, chunks, config.shard_mb)
    done = job.parts.done()
    todo = [task for task in tasks if task.path not in done]
    run_map("shards", [("assemble", partial(assemble, job))], todo, workers, run.runner_args)
    _finish(run, job, sources, chunks, tasks)


def find_sources(config: Config) -> list[Source]:
    """The input files in name order; names that occur twice are told apart by their content.

    Raises:
        UserError: no file has one of `corpus.languages`, or one file is given twice under different paths.
    """
    urls = input_files("corpus.inputs", config.corpus.inputs, config)
    found = [(url, input_identity(url, config)) for url in urls]
    names = Counter(identity.name for _, identity in found)
    sources: dict[str, Source] = {}
    for url, (file, size, sample) in ((url, dataclasses.astuple(identity)) for url, identity in found):
        name = file if names[file] == 1 else f"{file}+{sample[:8]}"
        if name in sources:
            raise UserError(f"corpus.inputs: {file} is given twice with the same content; leave one out")
        sources[name] = Source(name, language_of(file), compression_of(file), url, size)
    wanted = config.corpus.languages
    missing = set(wanted or ()) - {source.language for source in sources.values()}
    if missing:
        raise UserError(f"corpus.languages: no input file is called {sorted(missing)[0]}.*; check corpus.inputs")
    return [sources[name] for name in sorted(sources) if wanted is None or sources[name].language in wanted]


def _missing(job: CorpusJob, sources: list[Source]) -> list[Unit | Stream]:
    done = job.parts.done(WORK)
    missing: list[Unit | Stream] = []
    for source in sources:
        end = done.get(job.end_path(source))
        pieces = [Unit(source, number) for number in range(end.rows)] if end else units(job, source)
        missing += [piece for piece in pieces if isinstance(piece, Stream) or job.chunk_path(piece) not in done]
    return missing


def _shard_tasks(job: CorpusJob, chunks: list[Part], shard_mb: float) -> list[ShardTask]:
    text_bytes: Counter[str] = Counter()
    documents: Counter[str] = Counter()
    refused: set[str] = set()
    for chunk in chunks:
        language = chunk.path.split("/")[2]
        text_bytes[language] += chunk.stats["text_bytes"]
        documents[language] += chunk.rows
        if chunk.stats["documents_in"] > chunk.rows:
            refused.add(language)
    tasks = [ShardTask(language, 0, 0) for language in sorted(refused)]
    for language in sorted(language for language, rows in documents.items() if rows):
        count = max(1, math.ceil(text_bytes[language] / (shard_mb * MB)))
        tasks += [ShardTask(language, index, count) for index in range(count)]
    if not any(task.count for task in tasks):
        raise UserError(
            "corpus.inputs: not one document was kept; see the reasons under _work in the stage's directory"
        )
    return tasks


def _finish(run: StageRun, job: CorpusJob, sources: list[Source], chunks: list[Part], tasks: list[ShardTask]) -> None:
    """Publish the small files, check that every document is accounted for, commit."""
    done = job.parts.done()
    shards = {task.path: done[task.path] for task in tasks if task.count}
    stats = _stats(sources, chunks, shards)
    names: dict[str, list[str]] = {}
    for path in sorted(shards):
        language, name = path.split("/")
        names.setdefault(language, []).append(name)
    for language, files in names.items():
        for name, data in dataset_files(CORPUS_SCHEMA, files, run.identity.fingerprint).items():
            job.parts.publish_bytes(f"{language}/{name}", data)
    job.parts.publish_bytes("stats.json", canonical(stats))
    run.commit(stats, keep_work=run.config.corpus.keep_chunks)


def _stats(sources: list[Source], chunks: list[Part], shards: dict[str, Part]) -> dict[str, Any]:
    language_of_source = {source.name: source.language for source in sources}
    inputs = {source.name: _empty() for source in sources}
    for chunk in chunks:
        counts = inputs[chunk.stats["source"]]
        for key in ("documents_in", "kept"):
            counts[key] += chunk.stats[key]
        for outcome in ("dropped", "rejected"):
            _add(counts[outcome], chunk.stats[outcome])
    for shard in shards.values():
        for name, duplicates in shard.stats["duplicates"].items():
            inputs[name]["kept"] -= duplicates
            _add(inputs[name]["dropped"], {"duplicate": duplicates})
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
            total[key] += value


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
