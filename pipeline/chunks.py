"""First half of the corpus stage: input files to chunks, Arrow files of cleaned documents sorted by content hash.

A plain file is read in byte ranges, each by its own worker. A compressed file is one stream: one worker decompresses it
into numbered raw runs of whole documents (work parts themselves), which then are cleaned by any number of workers.
Neither the size of a range nor that of a run shows in what `assemble` makes of the chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.config import CorpusConfig
from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.shards import CORPUS_SCHEMA, REJECT_SCHEMA, open_shard, write_stream
from pipeline.sources import Document, read_documents, read_range
from pipeline.stage import WORK, PartStore, fetch
from pipeline.storage import Folder, open_url
from pipeline.text import Rejected, clean, content_hash, decode, keep

EXCERPT_BYTES = 200
_RAW_SCHEMA = pa.schema(
    [pa.field("offset", pa.int64()), pa.field("raw", pa.large_binary()), pa.field("fault", pa.string())]
)


@dataclass(frozen=True)
class Source:
    """One input file: a name unique among the inputs, its language, how it is compressed and where it is."""

    name: str
    language: str
    compression: str
    url: str = field(repr=False)
    size: int = 0


@dataclass(frozen=True)
class Unit:
    """One unit of cleaning: the byte range [start, stop) of a plain file, or raw run `number` of a compressed one."""

    source: Source
    number: int
    start: int = 0
    stop: int = 0


@dataclass(frozen=True)
class Stream:
    """A compressed file that has yet to be decompressed into raw runs."""

    source: Source


@dataclass(frozen=True)
class CorpusJob:
    """What every worker of the corpus stage needs: where parts go and the keys that shape them."""

    folder: Folder
    chunk_bytes: int
    config: CorpusConfig = field(compare=False)

    @property
    def parts(self) -> PartStore:
        """The stage's parts."""
        return PartStore(self.folder)

    def work_folder(self, kind: str, language: str) -> str:
        """Directory of one kind of a language's work parts; it carries the chunk size: runs of two sizes never mix."""
        return f"{WORK}/{kind}-{self.chunk_bytes}/{language}"

    def work(self, kind: str, source: Source) -> str:
        """Directory of one source's work parts."""
        return f"{self.work_folder(kind, source.language)}/{source.name}"

    def work_parts(self, kind: str, language: str) -> list[Part]:
        """The published work parts of a kind in one language, in path order; listed once a process."""
        return _listed(self, kind, language)

    def chunk_path(self, unit: Unit) -> str:
        """Name of a unit's chunk."""
        return f"{self.work('chunks', unit.source)}/{unit.number:05d}.arrow"

    def raw_path(self, source: Source, number: int) -> str:
        """Name of a raw run of a compressed source."""
        return f"{self.work('raw', source)}/{number:05d}.arrow"

    def end_path(self, source: Source) -> str:
        """Name of the part that says a compressed source is decompressed completely, and into how many runs."""
        return f"{self.work('raw', source)}/END"


@lru_cache(maxsize=1024)
def _listed(job: CorpusJob, kind: str, language: str) -> list[Part]:
    found = job.parts.done(job.work_folder(kind, language))
    return [found[path] for path in sorted(found)]


def units(job: CorpusJob, source: Source) -> list[Unit | Stream]:
    """The byte ranges of a plain file; a compressed one as a whole."""
    if source.compression:
        return [Stream(source)]
    starts = range(0, max(source.size, 1), job.chunk_bytes)
    return [Unit(source, n, start, min(start + job.chunk_bytes, source.size)) for n, start in enumerate(starts)]


def split(job: CorpusJob, piece: Unit | Stream) -> Iterator[Unit]:
    """Beam step: pass units on; decompress a stream into raw runs and emit a unit for each that is still to clean."""
    if isinstance(piece, Unit):
        yield piece
        return
    end = job.parts.get(job.end_path(piece.source))
    count = end.rows if end else _decompress_into_runs(job, piece.source)
    cleaned = job.parts.done(job.work("chunks", piece.source))
    runs = (Unit(piece.source, number) for number in range(count))
    yield from (run for run in runs if job.chunk_path(run) not in cleaned)


def _decompress_into_runs(job: CorpusJob, source: Source) -> int:
    done = {*job.parts.done(job.work("raw", source)), *job.parts.done(job.work("chunks", source))}
    count = 0
    with open_url(source.url, job.folder.options) as stream:
        for run in _runs(_with_fault(read_documents(stream, source.compression)), job.chunk_bytes):
            path = job.raw_path(source, count)
            # a run that was cleaned before is gone already; its chunk stands for it
            if done.isdisjoint((path, job.chunk_path(Unit(source, count)))):
                _publish_run(job, path, run)
            count += 1
    with job.parts.publish(job.end_path(source)) as draft:
        draft.rows = count
    return count


def _with_fault(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, and behind them as one more the fault that ends an unreadable file."""
    offset = 0
    try:
        for offset, content in documents:
            yield offset, content
    except Rejected as fault:
        yield offset, fault


def _runs(documents: Iterable[Document], run_bytes: int) -> Iterator[list[Document]]:
    run: list[Document] = []
    size = 0
    for document in documents:
        run.append(document)
        size += len(document[1]) if isinstance(document[1], bytes) else 0
        if size >= run_bytes:
            yield run
            run, size = [], 0
    if run:
        yield run


def _publish_run(job: CorpusJob, path: str, run: list[Document]) -> None:
    columns = [
        [offset for offset, _ in run],
        [content if isinstance(content, bytes) else content.detail.encode() for _, content in run],
        [content.reason if isinstance(content, Rejected) else None for _, content in run],
    ]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _RAW_SCHEMA, strict=True)], schema=_RAW_SCHEMA)
    with job.parts.publish(path) as draft:
        draft.rows = write_stream(draft.sink, _RAW_SCHEMA, table)


def clean_unit(job: CorpusJob, unit: Unit) -> list[Any]:
    """Beam step: clean one unit's documents and publish its chunk and, before it, its rejects."""
    path = job.chunk_path(unit)
    if job.parts.get(path):  # a runner may run a step again
        return []
    chunk = _Chunk(unit.source.name)
    for offset, content in _documents(job, unit):
        chunk.add(job, offset, content)
    if chunk.rejects:
        with job.parts.publish(path.replace("/chunks-", "/rejects-", 1)) as draft:
            draft.rows = write_stream(draft.sink, REJECT_SCHEMA, _table(chunk.rejects, REJECT_SCHEMA))
    with job.parts.publish(path) as draft:
        draft.rows = write_stream(draft.sink, CORPUS_SCHEMA, _table(sorted(chunk.kept), CORPUS_SCHEMA))
        draft.stats = chunk.stats()
    if unit.source.compression:
        job.parts.forget(job.raw_path(unit.source, unit.number))
    return []


def _documents(job: CorpusJob, unit: Unit) -> Iterator[Document]:
    if not unit.source.compression:
        with open_url(unit.source.url, job.folder.options) as stream:
            yield from _with_fault(read_range(stream, unit.start, unit.stop))
        return
    path = job.raw_path(unit.source, unit.number)
    part = job.parts.get(path)
    if part is None:
        raise PipelineError(f"{path}: the raw run is missing; run the same command again")
    table = open_shard(fetch(job.folder, part), _RAW_SCHEMA)
    for batch in table.to_batches():
        for offset, raw, fault in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield offset, raw if fault is None else Rejected(fault, raw.decode())


@dataclass
class _Chunk:
    """Rows and counts of one chunk while it is being filled."""

    source: str
    kept: list[tuple[str, str, str, int]] = field(default_factory=list)
    rejects: list[tuple[str, int, str, str, bytes]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0

    def add(self, job: CorpusJob, offset: int, content: bytes | Rejected) -> None:
        try:
            if isinstance(content, Rejected):
                raise content
            text = clean(decode(content))
        except Rejected as fault:
            excerpt = content[:EXCERPT_BYTES] if isinstance(content, bytes) else fault.detail.encode()
            self.rejects.append((self.source, offset, "rejected", fault.reason, excerpt))
            self.rejected[fault.reason] += 1
            return
        reason = keep(text, job.config.min_chars, job.config.max_chars)
        if reason:
            self.rejects.append((self.source, offset, "dropped", reason, content[:EXCERPT_BYTES]))
            self.dropped[reason] += 1
            return
        self.kept.append((content_hash(text).hex(), text, self.source, offset))
        self.text_bytes += len(text.encode())

    def stats(self) -> dict[str, Any]:
        documents = len(self.kept) + sum(self.dropped.values()) + sum(self.rejected.values())
        return {
            "source": self.source,
            "documents_in": documents,
            "kept": len(self.kept),
            "dropped": dict(self.dropped),
            "rejected": dict(self.rejected),
            "text_bytes": self.text_bytes,
        }


def _table(rows: list[Any], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.table(arrays, schema=schema)
