"""Sorted work parts that are read by slice: an Arrow stream and, in its record, an index of its record batches.

The first column orders the rows: the ids of documents, or 64-bit hashes. The index holds three numbers for each batch:
its first key, its place in the file and the xxh3_64 of its bytes, so that a slice of the key space costs one range
read, and the batches that overlap it are all that is read and checked. A batch is about 1/64 of its part. What a slice
takes is copied, which frees the rest of what was read for it: with many parts that is the larger half.

The key of an id is its first 64 bits. Two of n documents have the same with probability n^2 / 2^65: for a billion
documents 0.03.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.shards import CORPUS_SCHEMA, ROWS_PER_BATCH
from pipeline.stage import PartStore
from pipeline.storage import Folder, redact

Keys = npt.NDArray[np.uint64]

KEY_BITS = 64
LAST_KEY = (1 << KEY_BITS) - 1
_BATCHES = 64
_MIN_BATCH_BYTES = 1 << 16
_INDEX = "slices"  # its key in a part's stats
_ENTRY = np.dtype([("first", "<u8"), ("place", "<u8"), ("checksum", "<u8")])
_HASH = np.dtype([("high", ">u8"), ("low", ">u8")])
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def publish_chunk(parts: PartStore, path: str, documents: pa.Table, stats: dict[str, Any]) -> None:
    """Publish documents that are sorted by id, with their counts, as a part to read by slice."""
    publish_sorted(parts, path, documents.cast(CORPUS_SCHEMA), stats)


def publish_sorted(parts: PartStore, path: str, table: pa.Table, stats: dict[str, Any]) -> None:
    """Publish a table that is sorted by its first column; the index joins `stats` in the part's record."""
    entries: list[tuple[int, int, int]] = []
    with parts.publish(path) as draft:
        place = draft.sink.write(table.schema.serialize())
        for batch in _batches(table):
            message = batch.serialize()
            entries.append((int(keys_of(batch.column(0)[:1])[0]), place, xxhash.xxh3_64_intdigest(message)))
            place += draft.sink.write(message)
        draft.sink.write(_END_OF_STREAM)
        draft.rows = table.num_rows
        draft.stats = {**stats, _INDEX: base64.b64encode(np.array(entries, _ENTRY).tobytes()).decode()}


def read_slice(folder: Folder, part: Part, schema: pa.Schema, first: int = 0, last: int = LAST_KEY) -> pa.Table:
    """The rows of a part whose keys are in [first, last].

    Raises:
        PipelineError: the part is missing, or bytes that were read for it are not the ones that were published.
    """
    index = np.frombuffer(base64.b64decode(part.stats[_INDEX]), _ENTRY)
    # keys that equal a batch's first may begin in the batch before it
    start = max(0, int(np.searchsorted(index["first"], np.uint64(first), "left")) - 1)
    stop = int(np.searchsorted(index["first"], np.uint64(last), "right"))
    places = [int(place) for place in index["place"]] + [part.bytes - len(_END_OF_STREAM)]
    batches: list[pa.RecordBatch] = []
    if start < stop:
        data = memoryview(_read(folder, part, places[start], places[stop]))
        for number in range(start, stop):
            message = data[places[number] - places[start] : places[number + 1] - places[start]]
            if xxhash.xxh3_64_intdigest(message) != index["checksum"][number]:
                raise _damaged(folder, part, "its bytes are not the ones that were published")
            batches.append(_between(pa.ipc.read_record_batch(pa.py_buffer(message), schema), first, last))
    return pa.Table.from_batches(batches, schema)


def read_slices(
    folder: Folder, parts: Sequence[Part], schema: pa.Schema, first: int = 0, last: int = LAST_KEY
) -> tuple[pa.Table, npt.NDArray[np.uint32]]:
    """The same slice of several parts, one behind the other, and for each row the index of the part it is from."""
    tables = [read_slice(folder, part, schema, first, last) for part in parts]
    rows = [table.num_rows for table in tables]
    return pa.concat_tables([schema.empty_table(), *tables]), np.repeat(np.arange(len(parts), dtype=np.uint32), rows)


def span(index: int, count: int) -> tuple[int, int]:
    """First and last key of the index-th of `count` equal parts of the key space."""
    low, high = ((end << KEY_BITS) // count for end in (index, index + 1))
    return low, high - 1


def keys_of(column: pa.Array | pa.ChunkedArray) -> Keys:
    """The keys of a column of 64-bit hashes (they are their own) or of ids."""
    if pa.types.is_integer(column.type):
        return column.to_numpy()
    return hashes_of(column)["high"].astype(np.uint64)


def hashes_of(ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.void]:
    """Ids as pairs of big-endian numbers, `high` and `low`, which sort as the ids do."""
    return np.frombuffer(bytes.fromhex("".join(ids.to_pylist())), _HASH)


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Cut a table into batches of about 1/64 of its bytes each and at most ROWS_PER_BATCH rows."""
    whole = table.combine_chunks()
    weights = sum(_sizes(column) for column in whole.columns)
    if not whole.num_rows:
        return
    limit = max(_MIN_BATCH_BYTES, int(np.sum(weights)) // _BATCHES)
    ends = np.cumsum(weights + limit / ROWS_PER_BATCH)
    cuts = [0, *(np.flatnonzero(np.diff(ends // limit)) + 1).tolist(), whole.num_rows]
    for start, stop in pairwise(cuts):
        yield from whole.slice(start, stop - start).to_batches()


def _sizes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Bytes of each value."""
    if pa.types.is_string(column.type):
        return pc.binary_length(column).to_numpy().astype(np.int64)
    return np.full(len(column), column.type.bit_width // 8, np.int64)


def _between(batch: pa.RecordBatch, first: int, last: int) -> pa.RecordBatch:
    """A copy of the rows of a batch in the slice."""
    keys = keys_of(batch.column(0))
    start = int(np.searchsorted(keys, np.uint64(first), "left"))
    stop = int(np.searchsorted(keys, np.uint64(last), "right"))
    return batch.take(pa.array(np.arange(start, stop)))


def _read(folder: Folder, part: Part, start: int, stop: int) -> bytes:
    try:
        return folder.read_range(part.path, start, stop)
    except FileNotFoundError:
        raise _damaged(folder, part, "the file is missing") from None


def _damaged(folder: Folder, part: Part, what: str) -> PipelineError:
    where = f"{redact(folder.url)}/{part.path}"
    return PipelineError(f"{where}: {what}; delete its stage's directory and run it again")
