"""Compressed files as blocks: members, limits, and every kind of damage."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from streams import COMPRESS, Dribble, limits, until_fault

from pipeline.decompress import MAX_RATIO, RATIO_FREE_BYTES, decompress
from pipeline.text import Rejected

LARGEST_BLOCK = {"xz": 1 << 20, "gz": 1 << 20, "bz2": 1 << 20, "zst": 9 << 20}
every_compression = pytest.mark.parametrize("compression", COMPRESS)


@every_compression
@given(members=st.lists(st.binary(max_size=2000), min_size=1, max_size=4), repeats=st.integers(1, 50))
def test_concatenated_members_are_one_content(compression: str, members: list[bytes], repeats: int) -> None:
    members = [member * repeats for member in members]
    file = b"".join(map(COMPRESS[compression], members))
    for stream in (io.BytesIO(file), Dribble(file)):
        assert b"".join(decompress(stream, compression)) == b"".join(members)


@every_compression
def test_members_and_blocks_larger_than_a_read(compression: str) -> None:
    member = b"".join(zlib.crc32(b"%d" % i).to_bytes(4) for i in range(60_000)) + b"a" * 5_000_000
    file = COMPRESS[compression](member) * 3
    blocks = list(decompress(io.BytesIO(file), compression))
    assert b"".join(blocks) == member * 3
    assert max(map(len, blocks)) <= LARGEST_BLOCK[compression]
    assert list(decompress(Dribble(file), compression)) == blocks


@pytest.mark.parametrize("padding", [0, 4, 8, 100_000])
def test_xz_stream_padding_is_valid(padding: int) -> None:
    file = lzma.compress(b"one ") + b"\0" * padding + lzma.compress(b"two") + b"\0" * padding
    assert b"".join(decompress(Dribble(file), "xz")) == b"one two"


def test_zstd_skippable_frames_are_skipped() -> None:
    skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc"
    file = skippable + COMPRESS["zst"](b"one ") + skippable + COMPRESS["zst"](b"two") + skippable
    assert b"".join(decompress(io.BytesIO(file), "zst")) == b"one two"


@every_compression
def test_every_truncation_is_noticed_after_the_content_before_it(compression: str) -> None:
    content = b"".join(b"%d " % (i * i) for i in range(2000))
    file = COMPRESS[compression](content) + COMPRESS[compression](b"the second member")
    border = len(COMPRESS[compression](content))
    for length in [0, *range(16, border, 97), border - 1, border + 17, len(file) - 1]:
        blocks, reason = until_fault(decompress(io.BytesIO(file[:length]), compression))
        assert reason == f"truncated_{compression}", length
        assert (content + b"the second member").startswith(b"".join(blocks))
        assert until_fault(decompress(Dribble(file[:length]), compression)) == (blocks, reason)


@every_compression
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: file[:-6] + bytes([file[-6] ^ 1]) + file[-5:], id="flipped bit"),
        pytest.param(lambda file: file[: len(file) // 2] + b"junk" * 4 + file[len(file) // 2 :], id="inserted bytes"),
        pytest.param(lambda file: file + b"trailing", id="trailing bytes"),
        pytest.param(lambda file: file + b"\0\0\0x", id="trailing bytes after zeros"),
    ],
)
def test_damage_is_noticed(compression: str, damage: Callable[[bytes], bytes]) -> None:
    file = damage(COMPRESS[compression](b"".join(b"%d " % (i * i) for i in range(2000))))
    _, reason = until_fault(decompress(io.BytesIO(file), compression))
    assert reason in {f"corrupt_{compression}", f"truncated_{compression}"}


def test_misaligned_xz_padding_is_corrupt() -> None:
    assert until_fault(decompress(io.BytesIO(lzma.compress(b"one") + b"\0\0\0"), "xz")) == ([b"one"], "corrupt_xz")


@every_compression
def test_a_file_of_another_kind_is_named(compression: str) -> None:
    for other, compress in COMPRESS.items():
        if other != compression:
            with pytest.raises(Rejected, match=f"^not_{compression}: the content is {other}$"):
                list(decompress(io.BytesIO(compress(b"text")), compression))
    assert until_fault(decompress(io.BytesIO(b"plain text"), compression)) == ([], f"not_{compression}")


@every_compression
def test_a_bomb_ends_as_a_reject(compression: str) -> None:
    file = COMPRESS[compression](b"\0" * (128 << 20)) * 80  # 10 GiB
    largest = written = 0
    with pytest.raises(Rejected) as rejected:
        for block in decompress(io.BytesIO(file), compression):
            written += len(block)
            largest = max(largest, len(block))
    assert rejected.value.reason == "decompression_bomb"
    assert written <= RATIO_FREE_BYTES + MAX_RATIO * len(file)
    assert written < 1 << 30 and largest <= LARGEST_BLOCK[compression]


def test_the_densest_zstd_frame_comes_in_bounded_blocks() -> None:
    repeated_byte = (128 << 10 << 3 | 1 << 1).to_bytes(3, "little") + b"a"  # a block of 4 bytes for 128 KiB
    frame = b"\x28\xb5\x2f\xfd\x00\x38" + repeated_byte * 20_000
    blocks, reason = until_fault(decompress(io.BytesIO(frame), "zst", max_ratio=1e9, max_bytes=100 << 20))
    assert reason == "decompression_bomb"
    assert blocks and max(map(len, blocks)) <= LARGEST_BLOCK["zst"]


def test_a_large_plain_file_is_no_bomb() -> None:
    with limits(RATIO_FREE_BYTES=0):
        assert sum(map(len, decompress(io.BytesIO(bytes(5_000_000)), "", max_ratio=1))) == 5_000_000


def test_max_bytes_bounds_every_kind_of_file() -> None:
    for compression in ("", *COMPRESS):
        file = COMPRESS.get(compression, bytes)(b"text" * 1000)
        assert until_fault(decompress(io.BytesIO(file), compression, max_bytes=4000))[1] is None
        assert until_fault(decompress(io.BytesIO(file), compression, max_bytes=3999))[1] == "decompression_bomb"


def test_a_file_that_asks_for_gigabytes_of_window_is_refused() -> None:
    xz = bytearray(lzma.compress(b"text", preset=0))
    xz[16] = 40  # dictionary size: 4 GiB
    xz[20:24] = zlib.crc32(xz[12:20]).to_bytes(4, "little")
    zst = b"\x28\xb5\x2f\xfd\x00" + bytes([21 << 3]) + b"\x01\0\0"  # window: 2 GiB, and an empty last block
    for compression, file in {"xz": bytes(xz), "zst": zst}.items():
        assert until_fault(decompress(io.BytesIO(file), compression)) == ([], "window_too_large")


@pytest.mark.parametrize(
    ("name", "library"), [("enwiki-shortened.xml.bz2", bz2.open), ("whirlwind-whirlwind.warc.gz", gzip.open)]
)
def test_real_files_of_other_writers(
    shared_data: Path, name: str, library: Callable[[Path], io.BufferedIOBase]
) -> None:
    path = shared_data / "messy" / name
    with path.open("rb") as stream, library(path) as expected:
        assert b"".join(decompress(stream, name.rpartition(".")[2])) == expected.read()
