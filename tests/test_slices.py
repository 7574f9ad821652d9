"""Parts that are read by slice: the right rows, only the bytes they need, and no damaged byte goes unnoticed."""

from __future__ import annotations

import base64
import io
import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from cleaned import clean_files, make_shards
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifact import fetch
from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.shards import CORPUS_SCHEMA, open_shard, write_stream
from pipeline.slices import LAST_KEY, keys_of, publish_sorted, read_slice, span
from pipeline.stage import PartStore
from pipeline.storage import Folder
from pipeline.text import content_hash

NUMBERS = pa.schema([("key", pa.uint64()), ("value", pa.uint32())])


def documents(texts: list[str]) -> pa.Table:
    rows = sorted((content_hash(text).hex(), text, "en.txt", place) for place, text in enumerate(texts))
    return pa.table([pa.array(column) for column in zip(*rows, strict=True)], schema=CORPUS_SCHEMA)


def published(folder: Folder, table: pa.Table, path: str = "_work/part.arrow") -> Part:
    publish_sorted(PartStore(folder), path, table, {"told": 1})
    part = PartStore(folder).get(path)
    assert part is not None
    return part


def long_texts(number: int, words: int) -> list[str]:
    dice = random.Random(0)
    return [" ".join(str(dice.random()) for _ in range(words)) for _ in range(number)]


def batches_of(part: Part) -> np.ndarray:
    """The part's index: first key, place and checksum of every batch."""
    return np.frombuffer(base64.b64decode(part.stats["slices"]), "<u8").reshape(-1, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 9), st.integers(0, LAST_KEY)), max_size=40),
    st.one_of(st.integers(0, 9), st.integers(0, LAST_KEY)),
    st.one_of(st.integers(0, 9), st.integers(0, LAST_KEY)),
)
def test_a_slice_has_exactly_the_rows_between_its_keys(keys: list[int], first: int, last: int) -> None:
    table = pa.table([sorted(keys), range(len(keys))], schema=NUMBERS)
    folder = Folder("memory://slices")
    found = read_slice(folder, published(folder, table), NUMBERS, first, last)
    assert found.to_pylist() == [row for row in table.to_pylist() if first <= row["key"] <= last]


@pytest.mark.parametrize("count", [1, 3, 7, 1000])
def test_the_slices_of_many_batches_are_together_the_part(tmp_path: Path, count: int) -> None:
    table = documents(long_texts(2000, 20))
    folder = Folder(str(tmp_path))
    part = published(folder, table)
    assert len(batches_of(part)) > 10
    found = [read_slice(folder, part, CORPUS_SCHEMA, *span(index, count)) for index in range(count)]
    assert pa.concat_tables(found).equals(table)


@pytest.mark.parametrize("count", [1, 40])
def test_a_slice_keeps_nothing_in_memory_but_its_rows(tmp_path: Path, count: int) -> None:
    """Or a shard of a language in a thousand chunks would take several times the memory of one in two."""
    folder = Folder(str(tmp_path))
    part = published(folder, documents(long_texts(2000, 400)))
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    found = read_slice(folder, part, CORPUS_SCHEMA, *span(count // 2, count))
    kept = pa.total_allocated_bytes() - before + tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1.2 * found.nbytes + 100_000


def test_equal_keys_that_fill_many_batches_are_all_found(tmp_path: Path) -> None:
    keys = [1] * 5000 + [2] * 5000 + [3] * 5000
    folder = Folder(str(tmp_path))
    part = published(folder, pa.table([keys, range(len(keys))], schema=NUMBERS))
    assert len(batches_of(part)) > 10
    assert read_slice(folder, part, NUMBERS, 2, 2)["value"].to_pylist() == list(range(5000, 10_000))


def test_spans_cover_the_key_space_without_gap_or_overlap() -> None:
    for count in (1, 2, 3, 10, 10_000):
        spans = [span(index, count) for index in range(count)]
        assert spans[0][0] == 0 and spans[-1][1] == LAST_KEY
        assert all(end + 1 == begin for (_, end), (begin, _) in pairwise(spans))


def test_the_key_of_an_id_is_its_first_64_bits() -> None:
    ids = [content_hash(str(number)).hex() for number in range(100)]
    assert keys_of(pa.array(ids)).tolist() == [int(each[:16], 16) for each in ids]
    assert keys_of(pa.array(ids)[7:9]).tolist() == [int(each[:16], 16) for each in ids[7:9]]


def test_a_part_is_a_plain_arrow_stream_and_keeps_its_counts(tmp_path: Path) -> None:
    table = documents(long_texts(3000, 5))
    folder = Folder(str(tmp_path))
    part = published(folder, table)
    assert open_shard(fetch(folder, part), CORPUS_SCHEMA).equals(table)
    assert part.rows == 3000 and part.stats["told"] == 1


def test_batches_are_small_in_bytes_and_rows(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for table in (documents(long_texts(4000, 100)), documents([str(number) for number in range(9000)])):
        part = published(folder, table)
        batches = open_shard(fetch(folder, part)).to_batches()
        assert max(batch.num_rows for batch in batches) <= 1024
        sizes = np.diff(np.append(batches_of(part)[:, 1], np.uint64(part.bytes)))
        assert max(sizes) < 1.2 * max(part.bytes / 64, 80_000)
        assert len(part.stats["slices"]) < 6000


def bytes_read() -> int:
    """Bytes that this process has read from files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_slice_reads_only_its_batches(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    part = published(folder, documents(long_texts(4000, 100)))
    before = bytes_read()
    found = read_slice(folder, part, CORPUS_SCHEMA, *span(500, 1000))
    read = bytes_read() - before
    assert 0 < found.num_rows < 20
    assert read < 3.5 * part.bytes / 64


def test_a_slice_keeps_no_more_memory_than_it_needs(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    part = published(folder, documents(long_texts(4000, 100)))
    found = read_slice(folder, part, CORPUS_SCHEMA, *span(500, 1000))
    assert found.get_total_buffer_size() < 100_000 < part.bytes / 64


@pytest.mark.parametrize("where", ["memory://damage", "local"])
def test_a_flipped_bit_is_refused_where_it_is_read_and_only_there(tmp_path: Path, where: str) -> None:
    folder = Folder(str(tmp_path) if where == "local" else where)
    table = documents(long_texts(4000, 100))
    part = published(folder, table)
    index = batches_of(part)
    whole = folder.read(part.path)
    for number in (0, 30, len(index) - 1):
        first, place, _ = (int(value) for value in index[number])
        for offset in (0, 200, 20_000):
            damaged = bytearray(whole)
            damaged[place + offset] ^= 16
            folder.write(part.path, bytes(damaged))
            with pytest.raises(PipelineError, match=r"part\.arrow: its bytes are not.*delete its stage's directory"):
                read_slice(folder, part, CORPUS_SCHEMA, first, first)
            far = span(9 if number < 20 else 1, 10)
            expected = [row for row in table["id"].to_pylist() if far[0] <= int(row[:16], 16) <= far[1]]
            assert read_slice(folder, part, CORPUS_SCHEMA, *far)["id"].to_pylist() == expected


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_part_that_is_missing_or_cut_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    folder = Folder(str(tmp_path))
    part = published(folder, documents(long_texts(100, 10)))
    if damage == "missing":
        folder.remove(part.path)
    else:
        folder.write(part.path, folder.read(part.path)[: part.bytes // 2])
    with pytest.raises(PipelineError, match=r"part\.arrow: .*delete its stage's directory and run it again"):
        read_slice(folder, part, CORPUS_SCHEMA)


@pytest.mark.parametrize("chunk_bytes", [3_000, 100_000, 10_000_000])
def test_shards_have_the_bytes_of_a_plain_sort_of_all_documents(tmp_path: Path, chunk_bytes: int) -> None:
    texts = long_texts(600, 30)
    files = {"en.txt": texts[:400] + texts[:50], "en.more.txt": texts[300:]}
    job = clean_files(tmp_path, files, chunk_bytes)
    shards = make_shards(job, "en", 3)
    first: dict[str, tuple[str, str, str, int]] = {}
    for name in sorted(files):
        offset = 0
        for text in files[name]:
            first.setdefault(text, (content_hash(text).hex(), text, name, offset))
            offset += len(text.encode()) + 2
    rows = sorted(first.values())
    bounds = [f"{(index << 128) // 3:032x}" for index in range(3)] + ["g"]
    for index, part in enumerate(shards):
        own = [row for row in rows if bounds[index] <= row[0] < bounds[index + 1]]
        expected = io.BytesIO()
        columns = [pa.array(column) for column in zip(*own, strict=True)]
        write_stream(expected, CORPUS_SCHEMA, pa.table(columns, schema=CORPUS_SCHEMA))
        assert Path(fetch(job.folder, part)).read_bytes() == expected.getvalue()
    dropped = [part.stats["dropped"] for part in shards]
    assert sum(counts.get("en.txt", {}).get("duplicate", 0) for counts in dropped) == 450 - 400 + 100
    assert {name for counts in dropped for name in counts} == {"en.txt"}
