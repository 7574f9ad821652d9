"""xz files of several blocks: the blocks of real and of hostile files, and reading on past a damage from anywhere."""

from __future__ import annotations

import io
import lzma
import random
import shutil
import subprocess
import tracemalloc
import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import (
    Dribble,
    borders_in,
    documents_by_definition,
    json_lines_by_definition,
    limits,
    read_cut,
    until_fault,
    xz_file,
    xz_stream,
)

from pipeline import xz
from pipeline.sources import Format, Span, read_span, read_whole, spans
from pipeline.text import Rejected

TEXT, JSONL = Format("text", "xz"), Format("jsonl", "xz")

PARTS = [b"one\n\ntw", b"o\n", b"\n", b"three\n\n", b"four\n\n\n", b"five\nmore", b"\n\nsix", b"\nseven"]
CONTENT = b"".join(PARTS)
FILES = {
    "blocks": xz_file(PARTS),
    "streams": b"".join(lzma.compress(part) + b"\0" * 4 * n for n, part in enumerate(PARTS)),
    "streams of blocks": xz_file(PARTS[:3], lzma.CHECK_SHA256) + bytes(8) + xz_file([]) + xz_file(PARTS[3:]),
}
needs_xz = pytest.mark.skipif(not shutil.which("xz"), reason="needs the command xz")
every_file = pytest.mark.parametrize("file", FILES.values(), ids=FILES)


@needs_xz
@every_file
def test_the_files_made_here_are_xz(file: bytes) -> None:
    assert subprocess.run(["xz", "-dc"], input=file, capture_output=True, check=True).stdout == CONTENT


@every_file
def test_spans_of_whole_blocks_cover_the_file(file: bytes) -> None:
    for span_bytes in range(1, len(CONTENT) + 2):
        cut = spans(io.BytesIO(file), len(file), TEXT, span_bytes)
        assert cut and cut[0].start == 0 and cut[-1].stop == len(CONTENT)
        assert all(before.stop == after.start for before, after in pairwise(cut))
        assert all(span.stop - span.start <= max(span_bytes, *map(len, PARTS)) for span in cut)
        assert {span.start for span in cut} <= {len(b"".join(PARTS[:n])) for n in range(len(PARTS))}


@every_file
@given(positions=st.lists(st.integers(0)))
def test_any_spans_give_the_documents_of_the_file(file: bytes, positions: list[int]) -> None:
    borders = borders_in(len(CONTENT), positions)
    for format, expected in ((TEXT, documents_by_definition(CONTENT)), (JSONL, json_lines_by_definition(CONTENT))):
        assert read_cut(file, format, borders) == (expected, None)
        assert list(read_whole(io.BytesIO(file), format, "text")) == expected


def test_a_stream_that_gives_few_bytes_at_a_time_is_read_the_same() -> None:
    file = FILES["streams of blocks"]
    assert spans(Dribble(file), len(file), TEXT, 10) == spans(io.BytesIO(file), len(file), TEXT, 10)
    assert list(read_span(Dribble(file), TEXT, Span(0, len(CONTENT)), "")) == documents_by_definition(CONTENT)


@pytest.mark.parametrize("file", [b"", lzma.compress(b""), lzma.compress(CONTENT), xz_file([CONTENT]), xz_file([])])
def test_a_file_without_two_blocks_is_read_whole(file: bytes) -> None:
    assert spans(io.BytesIO(file), len(file), TEXT, 1) is None


# --------------------------------------------------------------------------------------------------------------- damage


@every_file
def test_a_flipped_bit_anywhere_costs_its_block_and_shows_the_same_from_everywhere(file: bytes) -> None:
    expected = {TEXT: documents_by_definition(CONTENT), JSONL: json_lines_by_definition(CONTENT)}
    dice = random.Random(1)
    read_on = 0
    for position in range(len(file)):
        damaged = file[:position] + bytes([file[position] ^ 1 << position % 8]) + file[position + 1 :]
        for format in (TEXT, JSONL):
            if spans(io.BytesIO(damaged), len(damaged), format, 10) is None:
                assert until_fault(read_whole(io.BytesIO(damaged), format, "text"))[1]
                continue
            whole, fault = read_cut(damaged, format, [0, len(CONTENT)])
            assert fault is None
            assert {*whole} - {(at, reason) for at, reason in whole if reason == "corrupt_xz"} <= {*expected[format]}
            read_on += len(whole) > 3 and whole != expected[format]
            for _ in range(4):
                borders = borders_in(len(CONTENT), [dice.randrange(len(CONTENT)) for _ in range(dice.randrange(1, 9))])
                assert read_cut(damaged, format, borders) == (whole, None)
    assert read_on > len(file) / 8


def test_a_damaged_block_takes_the_documents_that_touch_it_and_no_other() -> None:
    damaged = bytearray(FILES["blocks"])
    place = xz.blocks_of(io.BytesIO(damaged))[3].place
    damaged[place + 20] ^= 1
    start = CONTENT.index(b"three")
    expected = [(0, b"one"), (5, b"two"), (start, "corrupt_xz"), *documents_by_definition(CONTENT)[4:]]
    # the first document after the damage may have begun in it
    assert read_cut(bytes(damaged), TEXT, [0, len(CONTENT)])[0] == expected
    assert expected[3][1] == b"five\nmore"


def test_every_truncation_is_noticed_but_between_streams() -> None:
    for name, file in FILES.items():
        complete = 0
        for length in range(len(file)):
            found, reason = until_fault(read_whole(io.BytesIO(file[:length]), TEXT, ""))
            assert found[:-1] == documents_by_definition(CONTENT)[: len(found[:-1])]
            assert reason is None or spans(io.BytesIO(file[:length]), length, TEXT, 10) is None
            complete += reason is None
        assert complete == {"blocks": 0, "streams": 35, "streams of blocks": 4}[name]


def test_a_file_cut_after_its_spans_were_found_is_one_reject() -> None:
    file = FILES["blocks"][:-4]
    assert read_cut(file, TEXT, [0, 10, len(CONTENT)]) == ([], "corrupt_xz")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
def test_a_file_of_another_encoding_is_rejected_once(encoding: str) -> None:
    content = "text\n\n".encode(encoding)
    file = xz_file([content[:5], content[5:]])
    assert read_cut(file, TEXT, [0, 3, 6, len(content)]) == ([], encoding.replace("-", ""))


# -------------------------------------------------------------------------------------------------------------- hostile


def hostile(records: list[tuple[int, int]], count: int | None = None) -> bytes:
    return xz_stream([bytes(100)], records, len(records) if count is None else count, b"\0\1")


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(hostile([(100, 10)], count=1 << 62), id="a count beyond the index"),
        pytest.param(hostile([(52, 10), (48, 10)], count=3), id="a count of one block more"),
        pytest.param(hostile([(52, 10), (48, 10), (5, 5)], count=2), id="a record beyond the count"),
        pytest.param(hostile([(1 << 60, 10), (100, 10)]), id="a block larger than the file"),
        pytest.param(hostile([(50, 1 << 60), (50, 10)]), id="an exabyte of content"),
        pytest.param(hostile([(50, (1 << 63) - 1), (50, 1)]), id="a sum beyond 63 bits"),
        pytest.param(hostile([(0, 10), (100, 10)]), id="a block of no bytes"),
        pytest.param(hostile([(40, 10), (56, 10)]), id="blocks that leave a gap"),
        pytest.param(hostile([(60, 10), (60, 10)]), id="blocks that overlap the header"),
        pytest.param(xz_stream([], [(1, 1)] * 3, 3, b"\0\1")[12:], id="no header"),
        pytest.param(bytes(1 << 20), id="zeros"),
        pytest.param(hostile([(52, 10), (48, 10)]) + bytes(3), id="misaligned padding"),
        pytest.param(b"\xff" * 50 + b"YZ", id="a footer of noise"),
    ],
)
def test_an_index_that_cannot_be_true_gives_no_spans(file: bytes) -> None:
    tracemalloc.start()
    assert spans(io.BytesIO(file), len(file), TEXT, 1) is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_blocks_of_noise_under_a_true_index_are_damages() -> None:
    file = hostile([(52, 10), (48, 1 << 25)])
    assert spans(io.BytesIO(file), len(file), TEXT, 1) == [Span(0, 10), Span(10, 10 + (1 << 25))]
    tracemalloc.start()
    assert read_cut(file, TEXT, [0, 10, 20, 10 + (1 << 25)]) == ([(0, "corrupt_xz"), (10, "corrupt_xz")], None)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_block_that_swells_beyond_its_index_is_not_decoded_to_its_end() -> None:
    honest = xz_file([b"text", bytes(64 << 20)])
    blocks = xz.blocks_of(io.BytesIO(honest))
    bodies = [honest[block.place : block.place + -(-block.unpadded_bytes // 4) * 4] for block in blocks]
    liar = xz_stream(bodies, [(blocks[0].unpadded_bytes, 4), (blocks[1].unpadded_bytes, 100)], 2, b"\0\1")
    tracemalloc.start()
    assert read_cut(liar, TEXT, [0, 104]) == ([(4, "corrupt_xz")], None)
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_a_bomb_is_read_as_one_stream_that_ends_as_a_reject() -> None:
    file = xz_file([bytes(1 << 20)] * 3)
    with limits(RATIO_FREE_BYTES=1 << 20):
        assert spans(io.BytesIO(file), len(file), TEXT, 1) is None
        assert until_fault(read_whole(io.BytesIO(file), TEXT, "")) == ([], "decompression_bomb")
    assert spans(io.BytesIO(file), len(file), TEXT, 1) is not None


def test_too_many_or_too_large_blocks_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    file = FILES["blocks"]
    for name, value in {"MAX_BLOCKS": len(PARTS), "MAX_BLOCK_BYTES": 9, "MAX_INDEX_BYTES": 20}.items():
        with monkeypatch.context() as patch:
            patch.setattr(xz, name, value)
            with pytest.raises(Rejected, match="corrupt_xz"):
                xz.blocks_of(io.BytesIO(file))
    monkeypatch.setattr(xz, "MAX_BLOCK_BYTES", 999)
    with pytest.raises(Rejected, match=r"a block of \d+ bytes for 1000 bytes"):
        xz.blocks_of(io.BytesIO(xz_file([b"a" * 1000] * 2)))


def test_a_block_that_asks_for_gigabytes_of_window_is_refused_and_read_past() -> None:
    file = bytearray(xz_file([b"one\n\n", b"two\n\n", b"\n\nthree"]))
    place = xz.blocks_of(io.BytesIO(file))[1].place
    file[place + 4] = 40  # dictionary size: 4 GiB
    file[place + 8 : place + 12] = zlib.crc32(file[place : place + 8]).to_bytes(4, "little")
    assert read_cut(bytes(file), TEXT, [0, 5, 10, 17]) == ([(0, b"one"), (5, "window_too_large"), (12, b"three")], None)


# ----------------------------------------------------------------------------------------------------------- real files


@needs_xz
@pytest.mark.parametrize(
    "options", [["--block-size=100KiB"], ["-T2", "--block-size=1MiB"], ["-Csha256", "--block-list=7000,300000"]]
)
def test_files_of_the_command_give_their_documents_from_every_span(
    shared_data: Path, tmp_path: Path, options: list[str]
) -> None:
    content = lzma.decompress((shared_data / "cc100-sample" / "cs.txt.xz").read_bytes())
    path = tmp_path / "cs.txt"
    path.write_bytes(content)
    subprocess.run(["xz", "-0", *options, path], check=True)
    expected = documents_by_definition(content)
    with (tmp_path / "cs.txt.xz").open("rb") as stream:
        size = stream.seek(0, 2)
        cut = spans(stream, size, TEXT, 1 << 20)
        assert cut and len(cut) > 1
        assert [document for span in cut for document in read_span(stream, TEXT, span, "")] == expected
        stream.seek(0)
        assert list(read_whole(stream, TEXT, "")) == expected
