"""Parquet files to documents: rows, ranges of rows, and files that are damaged or hostile."""

from __future__ import annotations

import io
import random
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import COMPRESS, Dribble, Outcomes, borders_in, comparable, limits, read_cut, until_fault

from pipeline.sources import Format, Span, read_span, read_whole, spans

PARQUET = Format("parquet", "")


def parquet(texts: list[Any], type: pa.DataType | None = None, **options: Any) -> bytes:
    sink = io.BytesIO()
    columns = {"id": pa.array(range(len(texts))), "text": pa.array(texts, type or pa.string())}
    pq.write_table(pa.table(columns), sink, **{"write_page_checksum": True, **options})
    return sink.getvalue()


def rows(texts: list[str | None]) -> Outcomes:
    return [(n, "no_text" if text is None else text.encode()) for n, text in enumerate(texts)]


TEXTS: list[str | None] = [f"text {n**5}" * (n % 9) if n % 11 else None for n in range(100)]
FILE = parquet(TEXTS, row_group_size=30)


@settings(max_examples=50)
@given(
    st.lists(st.one_of(st.none(), st.text(max_size=20)), max_size=60),
    st.integers(1, 40),
    st.lists(st.integers(0)),
    st.sampled_from(["none", "snappy", "zstd", "gzip"]),
    st.sampled_from(["1.0", "2.0"]),
)
def test_each_row_is_a_document_of_one_range(
    texts: list[str | None], group_rows: int, positions: list[int], compression: str, page_version: str
) -> None:
    file = parquet(texts, row_group_size=group_rows, compression=compression, data_page_version=page_version)
    assert read_cut(file, PARQUET, borders_in(len(texts), positions)) == (rows(texts), None)
    assert comparable(read_whole(io.BytesIO(file), PARQUET, "text")) == rows(texts)
    for span_bytes in (1, 200, 10**9):
        cut = spans(io.BytesIO(file), len(file), PARQUET, span_bytes)
        assert cut and cut[0].start == 0 and cut[-1].stop == len(texts)
        assert all(before.stop == after.start and after.stop > after.start for before, after in pairwise(cut))


def test_row_groups_are_gathered_and_a_large_one_is_cut() -> None:
    texts = [f"x{n:05d}" + "y" * 994 for n in range(1000)]
    file = parquet(texts, row_group_size=100, compression="none", use_dictionary=False)
    borders = [
        [span.start for span in spans(io.BytesIO(file), len(file), PARQUET, size) or []] for size in (320_000, 51_000)
    ]
    assert borders[0] == [0, 300, 600, 900]
    assert len(borders[1]) == pytest.approx(20, abs=10) and {*range(0, 1000, 100)} <= {*borders[1]}


@pytest.mark.parametrize(
    "type", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()]
)
def test_every_type_of_text(type: pa.DataType) -> None:
    texts = ["caf\xe9", "", None, "\0"]
    values = texts if "string" in str(type) else [text and text.encode() for text in texts]
    assert comparable(read_whole(io.BytesIO(parquet(values, type)), PARQUET, "text")) == rows(texts)


def test_bytes_that_are_no_utf8_are_the_text_layers_matter() -> None:
    assert read_cut(parquet([b"\xff"], pa.binary()), PARQUET, [0, 1]) == ([(0, b"\xff")], None)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
def test_every_encoding_of_text(encoding: str) -> None:
    file = parquet(TEXTS, use_dictionary=False, column_encoding={"text": encoding})
    assert read_cut(file, PARQUET, [0, 50, 100]) == (rows(TEXTS), None)


def test_a_stream_that_gives_few_bytes_at_a_time_is_read_the_same() -> None:
    assert comparable(read_whole(Dribble(FILE), PARQUET, "text")) == rows(TEXTS)


def test_the_stream_stays_open() -> None:
    stream = io.BytesIO(FILE)
    spans(stream, len(FILE), PARQUET, 100)
    list(read_span(stream, PARQUET, Span(0, 100), "text"))
    assert not stream.closed


def test_a_document_too_large_is_a_reject() -> None:
    with limits(MAX_DOCUMENT_BYTES=5):
        assert read_cut(parquet(["12345", "123456"]), PARQUET, [0, 2]) == (
            [(0, b"12345"), (1, "document_too_large")],
            None,
        )


@pytest.mark.parametrize(
    ("column", "detail"),
    [("txt", "no single column 'txt'"), ("id", "not of text"), ("twice", "no single"), ("s.t", "no s")],
)
def test_a_file_without_the_column_is_rejected_once(column: str, detail: str) -> None:
    sink = io.BytesIO()
    names = ["id", "twice", "twice", "s"]
    pq.write_table(pa.table([[1, 2], ["a", "b"], ["c", "d"], [{"t": "e"}, {"t": "f"}]], names=names), sink)
    assert read_cut(sink.getvalue(), PARQUET, [0, 1, 2], column) == ([], "no_text")
    with pytest.raises(Exception, match=detail):
        list(read_whole(sink, PARQUET, column))


@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"\n",
        b"PAR1",
        b"PAR1PAR1",
        b"plain text\n",
        FILE[:-1],
        b"x" * 5000,
        *[pytest.param(c(b"text"), id=ending) for ending, c in COMPRESS.items()],
    ],
)
def test_what_is_no_parquet_is_one_span_that_is_rejected(file: bytes) -> None:
    cut = spans(io.BytesIO(file), len(file), PARQUET, 10)
    assert cut and len(cut) == 1 and cut[0].start == 0 and cut[0].stop > len(TEXTS)
    assert read_cut(file, PARQUET, [0, 1, cut[0].stop]) == ([], "corrupt_parquet")


# --------------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_row_group_is_read_up_to_its_damage_and_the_next_one_after_it() -> None:
    texts = [f"{n:03d} " * 100 for n in range(300)]
    pages = {"use_dictionary": False, "write_statistics": False, "data_page_size": 4000, "write_batch_size": 10}
    file = bytearray(parquet(texts, row_group_size=100, compression="none", **pages))
    file[file.index(b"150 150")] ^= 1
    whole, fault = read_cut(bytes(file), PARQUET, [0, 300])
    damages = [(offset, raw) for offset, raw in whole if raw == "corrupt_parquet"]
    assert fault is None and len(damages) == 1 and 100 < damages[0][0] <= 150
    expected = rows(texts)
    assert whole == [*expected[: damages[0][0]], *damages, *expected[200:]]
    for borders in ([0, 120, 150, 180, 300], [*range(301)]):
        assert read_cut(bytes(file), PARQUET, borders) == (whole, None)


def test_every_truncation_is_a_reject() -> None:
    for length in range(0, len(FILE), 3):
        assert until_fault(read_whole(io.BytesIO(FILE[:length]), PARQUET, "text")) == ([], "corrupt_parquet")


def test_a_flipped_bit_anywhere_shows_the_same_from_everywhere() -> None:
    dice = random.Random(1)
    rejected = 0
    file = parquet(TEXTS[:20], row_group_size=8, write_statistics=False)
    for position in range(len(file)):
        damaged = file[:position] + bytes([file[position] ^ 1 << dice.randrange(8)]) + file[position + 1 :]
        cut = spans(io.BytesIO(damaged), len(damaged), PARQUET, 100)
        assert cut and cut[0].start == 0
        whole, fault = read_cut(damaged, PARQUET, [0, cut[-1].stop])
        assert fault in {None, "corrupt_parquet", "no_text"}
        borders = [*(span.start for span in cut), cut[-1].stop]
        assert read_cut(damaged, PARQUET, borders) == (whole, fault)
        rejected += bool(fault) or any(raw == "corrupt_parquet" for _, raw in whole)
    assert rejected > len(file) / 2


def test_an_error_of_the_stream_is_no_damage_of_the_file() -> None:
    class Unreliable(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            if self.reads == 4:
                raise ConnectionResetError("the connection was reset")
            return super().read(size)

    with pytest.raises(ConnectionResetError, match="was reset"):
        list(read_whole(Unreliable(FILE), PARQUET, "text"))


# -------------------------------------------------------------------------------------------------------------- hostile


def test_one_text_repeated_in_every_row_is_a_bomb() -> None:
    file = parquet(["x" * 10_000] * 10_000, compression="zstd")
    with limits(RATIO_FREE_BYTES=1 << 20):
        whole, fault = read_cut(file, PARQUET, [0, 10_000])
        assert fault is None and whole[-1][1] == "decompression_bomb"
        assert 100 < len(whole) < 105 + 200 * len(file) / 10_000 < 5000
        assert read_cut(file, PARQUET, [0, 100, len(whole) - 1, len(whole), 10_000]) == (whole, None)


def zigzag(value: int) -> bytes:
    value = value << 1 ^ value >> 63
    groups = [value >> shift & 0x7F for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def with_footer(file: bytes, old: bytes, new: bytes) -> bytes:
    """The file with every occurrence of some bytes of its footer replaced."""
    length = int.from_bytes(file[-8:-4], "little")
    footer = file[-8 - length : -8]
    assert old in footer
    footer = footer.replace(old, new)
    return file[: -8 - length] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("stated", [-1, -(2**63), 0, 1, 76, 78, 10**6, 2**31, 2**62, 2**63 - 1])
def test_a_footer_that_states_another_number_of_rows_or_bytes(stated: int) -> None:
    texts = [f"text {n}" for n in range(77)]
    for number in (77, pq.ParquetFile(io.BytesIO(parquet(texts))).metadata.row_group(0).total_byte_size):
        file = with_footer(parquet(texts), zigzag(number), zigzag(stated))
        cut = spans(io.BytesIO(file), len(file), PARQUET, 100)
        assert cut and cut[0].start == 0 and len(cut) < 100
        for span in cut:
            found, fault = until_fault(read_span(io.BytesIO(file), PARQUET, span, "text"))
            assert len(found) <= 78 and fault in {None, "corrupt_parquet"}


def test_a_footer_with_endless_rows_and_bytes_is_one_span() -> None:
    texts = [f"text {n}" for n in range(77)]
    file = parquet(texts)
    size = pq.ParquetFile(io.BytesIO(file)).metadata.row_group(0).total_byte_size
    for number in (77, size):
        file = with_footer(file, zigzag(number), zigzag(2**62))
    cut = spans(io.BytesIO(file), len(file), PARQUET, 100)
    assert cut and len(cut) == 1
    found, _ = read_cut(file, PARQUET, [0, cut[0].stop])
    assert found == [*rows(texts), (77, "corrupt_parquet")]
