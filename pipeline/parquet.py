"""Parquet files to documents: one row is one document, its text in a column of strings or of bytes.

A row group is read in small batches from its first row on, always the same ones: where a row group cannot be read shows
at the same row whichever rows are asked for. That row carries the fault for all that is left of its row group, and the
next row group is read again. Cost: linear in the column's bytes, but a range that begins inside a row group decodes the
rows before it too. Memory: a batch of `BATCH_ROWS` rows, and a page of the column as Arrow decodes it, which a hostile
file can make 2 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import decompress
from pipeline.documents import Document, bounded
from pipeline.text import Rejected

BATCH_ROWS = 16  # few, because a page may repeat one large value in every row
BUFFER_BYTES = 1 << 20

_TEXT_TYPES = (
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view(),
)  # fmt: skip
_CORRUPTION = (pa.ArrowException, OSError, OverflowError, ValueError)


def row_ranges(stream: BinaryIO, range_bytes: int) -> list[tuple[int, int]]:
    """Consecutive ranges of rows [start, stop) of about so many bytes by the metadata; at least one.

    A range is made of whole row groups, or is a part of a larger row group.

    Raises:
        Rejected: `corrupt_parquet`; or `decompression_bomb`, if the stated sizes are beyond what `decompress` allows.
    """
    file = _File(stream)
    groups = file.row_groups()
    stated = sum(size for _, size in groups)
    if stated > decompress.RATIO_FREE_BYTES + decompress.MAX_RATIO * file.size:
        raise Rejected("decompression_bomb", f"row groups of {stated} bytes in a file of {file.size}")
    borders = {0}
    row = gathered = 0
    for rows, size in groups:
        if gathered + size > range_bytes:
            borders.update(range(row, row + rows, max(1, rows * range_bytes // size)))
            gathered = 0
        gathered += min(size, range_bytes)
        row += rows
    return list(pairwise(sorted({*borders, row}))) or [(0, 0)]


def read_rows(stream: BinaryIO, column: str, start: int, stop: int) -> Iterator[Document]:
    """The rows [start, stop) as documents, with their numbers.

    In place of a row without text stands a `Rejected` (`no_text`), and so in place of the first row of a row group that
    cannot be read (`corrupt_parquet`, `decompression_bomb`); the rows of its row group after that one are not given.

    Raises:
        Rejected: `corrupt_parquet`, `no_text` (no such column, or not of text): no row can be read. It is raised for
            the range that begins at 0 alone; other ones are then empty.
    """
    try:
        file = _File(stream)
        file.check_column(column)
        groups = file.row_groups()
    except Rejected:
        if start == 0:
            raise
        return
    allowed_bytes = decompress.RATIO_FREE_BYTES + decompress.MAX_RATIO * file.size
    stated_bytes = sum(size for _, size in groups) or 1
    end = 0
    for group, (rows, size) in enumerate(groups):
        begin, end = end, end + rows
        if start < end and begin < stop:
            batches = file.batches(group, column, rows, allowed_bytes * size // stated_bytes)
            yield from _wanted(batches, begin, range(start, min(stop, end)))


def _wanted(batches: Iterator[list[bytes | None]], row: int, wanted: range) -> Iterator[Document]:
    """The wanted ones of the rows that come in batches from `row` on, and their fault if it comes at a wanted row."""
    while row < wanted.stop:
        try:
            values = next(batches)
        except Rejected as fault:
            if row in wanted:
                yield row, fault
            return
        for number, value in enumerate(values, row):
            if number in wanted:
                yield number, Rejected("no_text", "null") if value is None else bounded(value)
        row += len(values)


class _File:
    """An open file, whose faults are `Rejected`."""

    def __init__(self, stream: BinaryIO) -> None:
        self.size = stream.seek(0, os.SEEK_END)
        self._stream = _Stream(stream)
        with self._faults("the file"):
            source = pa.PythonFile(self._stream, mode="r")
            self._file = pq.ParquetFile(
                source, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
            )

    def row_groups(self) -> list[tuple[int, int]]:
        """(rows, uncompressed bytes) of each row group, as the file states them."""
        metadata = self._file.metadata
        with self._faults("the row groups"):
            # not of their columns: Arrow aborts the whole process on some damaged ones
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            stated = [(group.num_rows, group.total_byte_size) for group in groups]
        if any(rows < 0 or size < 0 for rows, size in stated):
            raise Rejected("corrupt_parquet", "a row group has a negative size")
        return stated

    def check_column(self, column: str) -> None:
        """Raise a `Rejected` unless there is one such column, of text."""
        with self._faults("the schema"):
            schema = self._file.schema_arrow
            index = schema.get_field_index(column)
            if index < 0:
                raise Rejected("no_text", f"no single column {column!r}")
            if schema.field(index).type not in _TEXT_TYPES:
                raise Rejected("no_text", f"the column {column!r} is not of text")

    def batches(self, group: int, column: str, rows: int, allowed_bytes: int) -> Iterator[list[bytes | None]]:
        """The texts of a row group's rows, as many as it states."""
        name = f"row group {group}"
        with self._faults(name):
            batches = self._file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[column], use_threads=False)
        given = read = 0
        while given < rows:
            with self._faults(name):
                batch = next(batches, None)
                values = batch.column(0).cast(pa.large_binary()).to_pylist() if batch else []
            if not values:
                raise Rejected("corrupt_parquet", f"{name} has {given} of {rows} rows")
            read += sum(len(value) for value in values if value is not None)
            if read > allowed_bytes:
                raise Rejected("decompression_bomb", f"{name} has more than {allowed_bytes} bytes of text")
            given += len(values)
            yield values

    @contextmanager
    def _faults(self, name: str) -> Iterator[None]:
        """What Arrow raises of a corrupt file, as `Rejected`; what the stream itself raises, as it is."""
        try:
            yield
        except _CORRUPTION as error:
            if self._stream.failure:
                raise self._stream.failure from None
            raise Rejected("corrupt_parquet", f"{name}: {type(error).__name__}") from None


class _Stream:
    """A stream for Arrow to read, never to close, that remembers the error of a read that failed."""

    closed = False

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.failure: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """As of any stream, but in full however few bytes the stream gives at a time."""
        try:
            return decompress.read_fully(self._stream, size)
        except Exception as error:
            self.failure = error
            raise

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of any stream."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """As of any stream."""
        return self._stream.tell()

    def close(self) -> None:
        """Leave the stream to the one who opened it."""
