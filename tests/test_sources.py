"""Input files as streams of documents: names, compression, splitting, byte ranges, and every bad file of this layer."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import TypeVar

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import sources
from pipeline.errors import UserError
from pipeline.sources import compression_of, decompress, language_of, read_documents, read_range, split_documents
from pipeline.text import Rejected

DATA = Path(__file__).parents[2] / "shared" / "data"

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "xz": lzma.compress,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}
Item = TypeVar("Item")
LARGEST_BLOCK = {"xz": 1 << 20, "gz": 1 << 20, "bz2": 1 << 20, "zst": 9 << 20}
every_compression = pytest.mark.parametrize("compression", COMPRESS)


def comparable(documents: Iterable[sources.Document]) -> list[tuple[int, bytes | str]]:
    return [(offset, raw.reason if isinstance(raw, Rejected) else raw) for offset, raw in documents]


def until_fault(items: Iterator[Item]) -> tuple[list[Item], str | None]:
    """What comes before the fault, and its reason."""
    got: list[Item] = []
    try:
        for item in items:
            got.append(item)
    except Rejected as rejected:
        return got, rejected.reason
    return got, None


class Dribble(io.BytesIO):
    """A stream that gives at most three bytes at a time, as a slow connection may."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 3) if size and size > 0 else size)


@contextmanager
def limits(**values: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(sources, name, value)
        yield


# ---------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("language", ["en", "zh-Hans", "zh_rom", "bn_rom", "my_zaw", "sr-Latn", "ckb"])
def test_language_and_compression_of_a_name(language: str) -> None:
    assert language_of(f"{language}.txt") == language
    assert language_of(f"{language}.2019.part-1.txt.zst") == language
    assert [compression_of(f"{language}.txt{end}") for end in ("", ".xz", ".gz", ".bz2", ".zst")] == [
        "", "xz", "gz", "bz2", "zst",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "", ".txt", "../en.txt", "../../etc/passwd", "/en.txt", "a/en.txt", "C:en.txt", "C:\\en.txt", "%2e%2e%2fen.txt",
        "en\n.txt", "en\0.txt", "e\u0301n.txt", "\u0430b.txt", "\udcff\udcfe.txt", "EN.txt", "e.txt", "english.txt",
        "en-.txt", "en--us.txt", "-en.txt", "en us.txt", "\uff45\uff4e.txt", "en" + "-abc" * 1000 + ".txt",
    ],
)  # fmt: skip
def test_a_name_without_a_language_is_refused(name: str) -> None:
    with pytest.raises(UserError) as refused:
        language_of(name)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("name", ["en", "en.xz", "en.txt.lzma", "en.txt.xz.part", "en.TXT", "en.txt.XZ", "en.txt.7z\n"])
def test_an_unknown_ending_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(".txt, .txt.xz, .txt.gz, .txt.bz2, .txt.zst")):
        compression_of(name)


# -------------------------------------------------------------------------------------------------------- decompression


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
    assert written <= sources.RATIO_FREE_BYTES + sources.MAX_RATIO * len(file)
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
def test_real_files_of_other_writers(name: str, library: Callable[[Path], io.BufferedIOBase]) -> None:
    path = DATA / "messy" / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    with path.open("rb") as stream, library(path) as expected:
        assert b"".join(decompress(stream, name.rpartition(".")[2])) == expected.read()


# ------------------------------------------------------------------------------------------------------------ documents

CONTENT = st.lists(
    st.sampled_from(
        [b"a", b"bc d", b" ", b"\t", b"   ", b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n", b"\x0b", b"\xc2\x85"]
    )
).map(b"".join)


def documents_by_definition(content: bytes) -> list[tuple[int, bytes]]:
    """Line after line, as the layout is described."""
    documents: list[tuple[int, bytes]] = []
    open_document = False
    for line in re.finditer(rb"([^\r\n]*)(?:\r\n|\r|\n|\Z)", content):
        text = line[1].strip(b" \t")
        if not text:
            open_document = False
            continue
        begin, end = line.start() + line[1].index(text), line.start() + len(line[1].rstrip(b" \t"))
        if open_document:
            begin = documents.pop()[0]
        documents.append((begin, content[begin:end]))
        open_document = True
    return documents


def with_cap(documents: list[tuple[int, bytes]], cap: int) -> list[tuple[int, bytes | str]]:
    return [(offset, raw if len(raw) <= cap else "document_too_large") for offset, raw in documents]


def cut(content: bytes, positions: Iterable[int]) -> list[bytes]:
    borders = [0, *sorted(position % (len(content) + 1) for position in positions), len(content)]
    return [content[start:stop] for start, stop in pairwise(borders)]


@given(CONTENT, st.integers(0, 1000), st.sampled_from([1, 3, 1000]))
@example(b"a\r\n \r\nb", 0, 1000)
@example(b" \n a\n\tb \n\n", 7, 1000)
def test_split_gives_the_documents_of_the_definition(content: bytes, start: int, cap: int) -> None:
    expected = [(start + offset, raw) for offset, raw in with_cap(documents_by_definition(content), cap)]
    with limits(MAX_DOCUMENT_BYTES=cap):
        assert comparable(split_documents([content], start)) == expected


@given(CONTENT, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]))
@example(b"a\r\n\r\nb", [2, 3, 4], 1000)
@example(b"a\r       \nb", [2, 3, 4, 5, 6, 7], 3)
@example(b"a      \r\nb", [2, 3, 4, 5, 6, 7, 8], 3)
@example(b"a\r      \nb", [2, 8], 3)
def test_block_borders_do_not_show(content: bytes, positions: list[int], cap: int) -> None:
    expected = with_cap(documents_by_definition(content), cap)
    with limits(MAX_DOCUMENT_BYTES=cap):
        assert comparable(split_documents(cut(content, positions))) == expected
        assert comparable(split_documents(bytes([byte]) for byte in content)) == expected


@given(CONTENT, st.lists(st.integers(0)), st.sampled_from([1, 3, 1000]), st.sampled_from([1, 4, 1000]))
def test_ranges_give_each_document_once(content: bytes, positions: list[int], cap: int, block_bytes: int) -> None:
    expected = with_cap(documents_by_definition(content), cap)
    borders = [0, *sorted(position % (len(content) + 1) for position in positions), len(content)]
    with limits(MAX_DOCUMENT_BYTES=cap, BLOCK_BYTES=block_bytes):
        ranges = [comparable(read_range(io.BytesIO(content), start, stop)) for start, stop in pairwise(borders)]
    assert [document for documents in ranges for document in documents] == expected


def test_every_file_of_up_to_six_bytes_cut_anywhere() -> None:
    for content in (bytes(letters) for size in range(7) for letters in product(b"a \r\n", repeat=size)):
        expected = documents_by_definition(content)
        assert list(split_documents([content])) == expected
        for middle in range(len(content) + 1):
            assert list(split_documents([content[:middle], content[middle:]])) == expected
            stream = io.BytesIO(content)
            assert [*read_range(stream, 0, middle), *read_range(stream, middle, len(content))] == expected


def test_a_file_without_blank_lines_is_not_read_by_every_range() -> None:
    content = b"one sentence a line\n" * 1000

    class Counting(io.BytesIO):
        given = 0

        def read(self, size: int | None = -1) -> bytes:
            block = super().read(size)
            self.given += len(block)
            return block

    with limits(MAX_DOCUMENT_BYTES=500, BLOCK_BYTES=100):
        streams = [Counting(content) for _ in range(20)]
        found = [comparable(read_range(stream, i * 1000, i * 1000 + 1000)) for i, stream in enumerate(streams)]
    assert found == [[(0, "document_too_large")], *[[]] * 19]
    assert max(stream.given for stream in streams) < 2000


def test_a_document_too_large_is_never_held() -> None:
    def blocks() -> Iterator[bytes]:
        yield from (b"%d" % (i % 10) * 1_000_000 for i in range(100))
        yield b"\n\nnext\n"
        yield from (b" " * 1_000_000 for _ in range(20))
        yield b"\nlast"

    with limits(MAX_DOCUMENT_BYTES=4_000_000):
        tracemalloc.start()
        found = comparable(split_documents(blocks()))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert found == [(0, "document_too_large"), (100_000_002, b"next"), (120_000_008, b"last")]
    assert peak < 12_000_000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b"", [], id="empty file"),
        pytest.param(b"\n", [], id="one newline"),
        pytest.param(b" \t\r\n \n", [], id="only blanks"),
        pytest.param(b"one\n\ntwo", [b"one", b"two"], id="no trailing newline"),
        pytest.param(b"one\r\nmore\r\n\r\ntwo\r\n", [b"one\r\nmore", b"two"], id="CRLF"),
        pytest.param(b"one\rmore\r\rtwo\r", [b"one\rmore", b"two"], id="lone CR"),
        pytest.param(b"one\n \t\n\n\n  two", [b"one", b"two"], id="blank lines with spaces"),
        pytest.param(
            b"\xef\xbb\xbfone\n\ntwo", [b"\xef\xbb\xbfone", b"two"], id="UTF-8 BOM is the text layer's matter"
        ),
        pytest.param(
            "a\u2028\u2028b\x85\x85c\x0c\x0cd".encode(), ["a\u2028\u2028b\x85\x85c\x0c\x0cd".encode()], id="NEL"
        ),
        pytest.param(b"good\n\nb\xffd\n\ngood", [b"good", b"b\xffd", b"good"], id="a bad document ends with itself"),
        pytest.param(b"same\n\nsame", [b"same", b"same"], id="duplicates are the shards' matter"),
        pytest.param(b"x" * 50_000_000 + b"\n\ny", [b"x" * 50_000_000, b"y"], id="a line of 50 MB"),
        pytest.param(b"x" + b"\n" * 1_000_000 + b"y", [b"x", b"y"], id="a million blank lines"),
        pytest.param(b"x" + b"\r\n \t" * 1_000_000 + b"y", [b"x", b"y"], id="a million CRLF blank lines"),
        pytest.param(b"x" + b" " * 10_000_000 + b"\ny", [b"x" + b" " * 10_000_000 + b"\ny"], id="10 MB of spaces"),
    ],
)
def test_documents_of_a_file(content: bytes, expected: list[bytes]) -> None:
    assert [raw for _, raw in read_documents(io.BytesIO(content), "")] == expected
    assert [raw for _, raw in read_range(io.BytesIO(content), 0, len(content))] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *[
            pytest.param("text\n\n".encode(name), name[:6].replace("-", "")[:5], id=name)
            for name in ("utf-16", "utf-32")
        ],
        pytest.param(b"\xfe\xff\0t", "utf16", id="utf-16-be"),
        pytest.param(b"\0\0\xfe\xff\0\0\0t", "utf32", id="utf-32-be"),
        *[pytest.param(compress(b"text"), "not_text", id=name) for name, compress in COMPRESS.items()],
    ],
)
def test_a_file_of_another_encoding_is_rejected_once(content: bytes, reason: str) -> None:
    for compression in ("", *COMPRESS):
        file = COMPRESS.get(compression, bytes)(content)
        assert until_fault(read_documents(Dribble(file), compression)) == ([], reason)
    ranges = [until_fault(read_range(Dribble(content), i, i + 1)) for i in range(len(content))]
    assert ranges == [([], reason), *[([], None)] * (len(content) - 1)]


@every_compression
def test_the_documents_before_a_fault_are_given(compression: str) -> None:
    content = b"\n\n".join(b"%d" % (i**7) for i in range(40_000))
    file = COMPRESS[compression](content)
    documents, reason = until_fault(read_documents(io.BytesIO(file[: len(file) * 3 // 4]), compression))
    expected = documents_by_definition(content)
    assert reason == f"truncated_{compression}"
    assert 1000 < len(documents) < len(expected) and documents == expected[: len(documents)]


@pytest.mark.parametrize("language", ["af", "am", "as", "eo", "he", "ht", "hy", "sw", "zh-Hant", "zu"])
def test_real_files_have_the_documents_they_are_listed_with(language: str) -> None:
    path = DATA / "cc100-sample" / f"{language}.txt.xz"
    if not path.exists():
        pytest.skip(f"{path} is missing")
    listed = re.search(rf"^\| {language} \| ([0-9,]+) \|", (path.parent / "SOURCES.md").read_text(), re.MULTILINE)
    assert listed
    with path.open("rb") as stream:
        documents = list(read_documents(stream, compression_of(path.name)))
    assert len(documents) == int(listed[1].replace(",", ""))
    content = lzma.decompress(path.read_bytes())
    assert documents == documents_by_definition(content)
    step = len(content) // 7 + 1
    ranges = [read_range(io.BytesIO(content), start, start + step) for start in range(0, len(content), step)]
    assert [document for documents in ranges for document in documents] == documents
