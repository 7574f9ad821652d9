"""Files that can only be read from their beginning: one worker cuts them into raw runs, the others clean what is there.

A raw run is a work part with whole documents as they stand in the file. Whoever has nothing else to do follows the
streams: it claims runs as they are published and cleans them, so one huge file keeps more than one worker busy. A claim
only saves double work; what no follower took, or left undone when it was killed, is cleaned once the file is cut up.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline.chunks import RAW_SCHEMA, CorpusJob, Source, Unit, clean_unit, with_fault
from pipeline.documents import Document
from pipeline.shards import table_of, write_stream
from pipeline.sources import read_whole, spans
from pipeline.stage import RECORDS
from pipeline.storage import open_url
from pipeline.text import Rejected

IDLE_SECONDS = 30.0  # a follower gives up where nothing new has come for so long: its runner may have no more workers
CLUSTER_FOLLOWERS = 32  # where the number of workers is the runner's matter; one decompressor feeds three
SIGN_SECONDS = 30.0
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Follower:
    """A worker's turn at cleaning what others decompress, once all files are being read."""

    number: int


def split(job: CorpusJob, sources: tuple[Source, ...], piece: Source | Follower) -> Iterator[Unit]:
    """Beam step: cut a source up into units, those that are still to clean; or follow the streams."""
    if isinstance(piece, Follower):
        _follow(job, sources)
        return
    with open_url(piece.url, job.folder.options) as stream:
        found = spans(stream, piece.size, piece.format, job.chunk_bytes)
    if found is None:
        units = [Unit(piece, number) for number in range(_runs_of(job, piece))]
    else:
        units = [Unit(piece, number, span, len(found)) for number, span in enumerate(found)]
        if piece.streamed:
            _publish_end(job, piece, len(units))
    cleaned = job.parts.done(job.work("chunks", piece))
    yield from (unit for unit in units if job.chunk_path(unit) not in cleaned)


def _runs_of(job: CorpusJob, source: Source) -> int:
    """Publish the raw runs that are not there yet, and return how many there are."""
    done = {*job.parts.done(job.work("raw", source)), *job.parts.done(job.work("chunks", source))}

    def is_done(number: int) -> bool:
        # a run that was cleaned before is gone already; its chunk stands for it
        return not done.isdisjoint((job.raw_path(source, number), job.chunk_path(Unit(source, number))))

    end = job.parts.get(job.end_path(source))
    if end and all(map(is_done, range(end.rows))):
        return end.rows
    count = 0
    last_sign = time.monotonic()
    with open_url(source.url, job.folder.options) as stream:
        for run in _runs(with_fault(read_whole(stream, source.format, job.config.text_key)), job.chunk_bytes):
            if not is_done(count):
                _publish_run(job, job.raw_path(source, count), run)
            elif time.monotonic() - last_sign > SIGN_SECONDS:
                # passing over what is there publishes nothing, for an hour perhaps; a run without news would be ended
                job.folder.write(f"{RECORDS}/{job.work('alive', source)}/{secrets.token_hex(8)}", b"alive")
                last_sign = time.monotonic()
            count += 1
    _publish_end(job, source, count)
    return count


def _publish_end(job: CorpusJob, source: Source, units: int) -> None:
    if not job.parts.get(job.end_path(source)):
        job.parts.publish_bytes(job.end_path(source), b"", rows=units)


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
    rows = [
        (offset, content.detail.encode(), content.reason) if isinstance(content, Rejected) else (offset, content, None)
        for offset, content in run
    ]
    with job.parts.publish(path) as draft:
        draft.rows = write_stream(draft.sink, RAW_SCHEMA, table_of(rows, RAW_SCHEMA))


def _follow(job: CorpusJob, sources: tuple[Source, ...]) -> None:
    """Clean runs as they appear, until every source has its end or nothing has come for `IDLE_SECONDS`."""
    last_news = time.monotonic()
    while True:
        there = job.folder.files(f"{RECORDS}/{job.work_folder('raw')}")
        unit = next((unit for unit in _published_runs(job, sources, there) if _claim(job, unit)), None)
        if unit:
            clean_unit(job, unit)
            last_news = time.monotonic()
            continue
        ended = all(_record(job.end_path(source)) in there for source in sources if source.streamed)
        if ended or time.monotonic() - last_news > IDLE_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def _published_runs(job: CorpusJob, sources: Iterable[Source], there: Iterable[str]) -> Iterator[Unit]:
    """The raw runs whose records are there; the record of a run goes when it is cleaned."""
    by_folder = {job.work("raw", source): source for source in sources}
    for record in there:
        folder, _, name = record.removeprefix(f"{RECORDS}/").rpartition("/")
        number = name.partition(".")[0]
        if folder in by_folder and number.isdigit():
            yield Unit(by_folder[folder], int(number))


def _record(path: str) -> str:
    return f"{RECORDS}/{path}.json"


def _claim(job: CorpusJob, unit: Unit) -> bool:
    return job.folder.create_exclusively(f"{job.work('claims', unit.source)}/{unit.number}", b"claimed")
