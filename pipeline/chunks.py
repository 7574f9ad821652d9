"""First half of the corpus stage: input files to chunks, Arrow files of cleaned documents sorted by content hash.

What can be read in parts (plain files, multi-block xz, Parquet) is read in spans, each by its own worker. Any other
file is one stream: one worker cuts it into numbered raw runs of whole documents (`pipeline.streams`), which any worker
cleans. Neither the size of a span nor that of a run shows in what `assemble` makes of the chunks.

Every document ends in one of three ways: kept in the chunk, dropped for what it says or rejected as unreadable; of the
last two a row with place, reason and first bytes goes into the unit's rejects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow as pa

from pipeline.artifact import read
from pipeline.config import CorpusConfig
from pipeline.counters import count
from pipeline.documents import Document
from pipeline.errors import PipelineError
from pipeline.exclusion import EvaluationFiles, load_exclusion
from pipeline.language_id import other_language
from pipeline.manifest import Part
from pipeline.quality import drop_reason
from pipeline.shards import CORPUS_SCHEMA, REJECT_SCHEMA, parse_shard, table_of, text_size, write_stream
from pipeline.slices import publish_chunk
from pipeline.sources import Format, Span, read_span, text_of
from pipeline.stage import WORK, PartStore
from pipeline.storage import Folder, open_url
from pipeline.text import Rejected, clean, content_hash, decode, shows_mojibake

EXCERPT_BYTES = 200
RAW_SCHEMA = pa.schema(
    [pa.field("offset", pa.int64()), pa.field("raw", pa.large_binary()), pa.field("fault", pa.string())]
)


@dataclass(frozen=True)
class Source:
    """One input file: a name unique among the inputs, its language, what its name says of the format, where it is."""

    name: str
    language: str
    format: Format
    url: str = field(repr=False)
    size: int = 0

    @property
    def compression(self) -> str:
        """How the file is compressed, "" if it is not."""
        return self.format.compression

    @property
    def streamed(self) -> bool:
        """Whether the file may have to be read as one stream."""
        return bool(self.compression) or self.format.layout == "wet"


@dataclass(frozen=True)
class Unit:
    """One unit of cleaning: of `count` spans of a source the one of this number, or without a span its raw run."""

    source: Source
    number: int
    span: Span | None = None
    count: int = 0


@dataclass(frozen=True)
class CorpusJob:
    """What every worker of the corpus stage needs: where parts go, the keys that shape them, the texts to exclude."""

    folder: Folder
    chunk_bytes: int
    config: CorpusConfig = field(compare=False)
    evaluation: EvaluationFiles | None = None  # whose sentences no document may hold
    fingerprint: str = ""  # of the stage: `datasets` tells its caches apart by it

    @property
    def parts(self) -> PartStore:
        """The stage's parts."""
        return PartStore(self.folder)

    def work_folder(self, kind: str, language: str = "") -> str:
        """Directory of one kind of a language's work parts; it carries the chunk size: runs of two sizes never mix."""
        return f"{WORK}/{kind}-{self.chunk_bytes}/{language}".rstrip("/")

    def work(self, kind: str, source: Source) -> str:
        """Directory of one source's work parts."""
        return f"{self.work_folder(kind, source.language)}/{source.name}"

    def work_parts(self, kind: str, language: str) -> list[Part]:
        """The published work parts of a kind in one language, in path order; listed once a process and run."""
        return list_work_parts(self, kind, language)

    def chunk_path(self, unit: Unit) -> str:
        """Name of a unit's chunk."""
        return f"{self.work('chunks', unit.source)}/{unit.number:05d}.arrow"

    def raw_path(self, source: Source, number: int) -> str:
        """Name of a raw run of a stream."""
        return f"{self.work('raw', source)}/{number:05d}.arrow"

    def end_path(self, source: Source) -> str:
        """Name of the part that says that a stream is cut up completely; its rows are the number of its units.

        Of other sources the record of every chunk says it. All ends are in one directory, for thousands of small inputs
        make thousands of them.
        """
        return f"{self.work_folder('raw')}/ends/{source.name}"


@lru_cache(maxsize=1024)
def list_work_parts(job: CorpusJob, kind: str, language: str) -> list[Part]:
    """What `CorpusJob.work_parts` remembers."""
    found = job.parts.done(job.work_folder(kind, language))
    return [found[path] for path in sorted(found)]


def clean_unit(job: CorpusJob, unit: Unit) -> list[Any]:
    """Beam step: clean one unit's documents and publish its chunk and, before it, its rejects."""
    path = job.chunk_path(unit)
    if job.parts.get(path):  # a runner may run a step again, and another worker may have been faster
        return []
    chunk = _Chunk(job, unit.source)
    try:
        for offset, content in _documents(job, unit):
            chunk.add(offset, content)
    except PipelineError:
        if job.parts.get(path):  # a raw run goes as soon as another worker has cleaned it
            return []
        raise
    if chunk.rejects:
        with job.parts.publish(path.replace("/chunks-", "/rejects-", 1)) as draft:
            draft.rows = write_stream(draft.sink, REJECT_SCHEMA, table_of(chunk.rejects, REJECT_SCHEMA))
    documents = table_of(sorted(chunk.kept), CORPUS_SCHEMA)
    stats = chunk.stats() | {"text_bytes": text_size(documents), "units": unit.count}
    publish_chunk(job.parts, path, documents, stats)
    for name in ("documents_in", "dropped", "rejected"):  # what is kept in the end, the shards tell
        count(name, stats[name])
    if unit.span is None:
        job.parts.forget(job.raw_path(unit.source, unit.number))
    return []


def _documents(job: CorpusJob, unit: Unit) -> Iterator[Document]:
    if unit.span is not None:
        with open_url(unit.source.url, job.folder.options) as stream:
            yield from with_fault(read_span(stream, unit.source.format, unit.span, job.config.text_key))
        return
    path = job.raw_path(unit.source, unit.number)
    part = job.parts.get(path)
    if part is None:
        raise PipelineError(f"{path}: the raw run is missing; run the same command again")
    for batch in parse_shard(read(job.folder, part), path, RAW_SCHEMA).to_batches():
        for offset, raw, fault in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield offset, raw if fault is None else Rejected(fault, raw.decode())


def with_fault(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents, and behind them as one more the fault that ends an unreadable file."""
    offset = 0
    try:
        for offset, content in documents:
            yield offset, content
    except Rejected as fault:
        yield offset, fault


class _Chunk:
    """Rows and counts of one chunk while it is being filled."""

    def __init__(self, job: CorpusJob, source: Source) -> None:
        self._config = job.config
        self._source = source
        self._exclusion = load_exclusion(job.evaluation) if job.evaluation else None
        self.kept: list[tuple[str, str, str, int]] = []
        self.rejects: list[tuple[str, int, str, str, bytes]] = []
        self._counts = {"dropped": Counter[str](), "rejected": Counter[str]()}

    def add(self, offset: int, content: bytes | Rejected) -> None:
        """Take one document in."""
        try:
            if isinstance(content, Rejected):
                raise content
            raw = text_of(self._source.format, content, self._config.text_key)
            text = clean(decode(raw), fix_mojibake=self._config.fix_mojibake and shows_mojibake(raw))
        except Rejected as fault:
            excerpt = content[:EXCERPT_BYTES] if isinstance(content, bytes) else fault.detail.encode()
            self._refuse(offset, "rejected", fault.reason, excerpt)
            return
        if reason := self._reason(text):
            self._refuse(offset, "dropped", reason, content[:EXCERPT_BYTES])
            return
        self.kept.append((content_hash(text).hex(), text, self._source.name, offset))

    def _reason(self, text: str) -> str | None:
        """Why a clean text is dropped, the cheapest question first."""
        if reason := drop_reason(text, self._config):
            return reason
        veto = self._config.language_id
        if veto.enabled and other_language(text, self._source.language, veto):
            return "other_language"
        return "excluded" if self._exclusion and self._exclusion.holds_sentence(text) else None

    def _refuse(self, offset: int, outcome: str, reason: str, excerpt: bytes) -> None:
        self.rejects.append((self._source.name, offset, outcome, reason, excerpt))
        self._counts[outcome][reason] += 1

    def stats(self) -> dict[str, Any]:
        """What went in and what became of it."""
        return {
            "source": self._source.name,
            "documents_in": len(self.kept) + len(self.rejects),
            "kept": len(self.kept),
            **{outcome: dict(counts) for outcome, counts in self._counts.items()},
        }
