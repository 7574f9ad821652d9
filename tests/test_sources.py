"""Input files: names, formats, spans, and whole files of every kind."""

from __future__ import annotations

import io
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from streams import COMPRESS, Dribble, documents_by_definition, read_cut, until_fault, xz_file

from pipeline.errors import UserError
from pipeline.sources import Format, Span, format_of, language_of, read_span, read_whole, spans, text_of

every_compression = pytest.mark.parametrize("compression", COMPRESS)


@pytest.mark.parametrize("language", ["en", "zh-Hans", "zh_rom", "bn_rom", "my_zaw", "sr-Latn", "ckb"])
def test_language_and_format_of_a_name(language: str) -> None:
    assert language_of(f"{language}.txt") == language
    assert language_of(f"{language}.2019.part-1.jsonl.zst") == language
    for ending in ("txt", "jsonl"):
        layout = {"txt": "text"}.get(ending, ending)
        found = [format_of(f"{language}.{ending}{end}") for end in ("", ".xz", ".gz", ".bz2", ".zst")]
        assert found == [Format(layout, compression) for compression in ("", "xz", "gz", "bz2", "zst")]
    assert format_of(f"{language}.part-1.parquet") == Format("parquet", "")
    assert format_of(f"{language}.CC-MAIN-2024.warc.wet") == Format("wet", "")
    assert format_of(f"{language}.CC-MAIN-2024.warc.wet.gz") == Format("wet", "gz")


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


@pytest.mark.parametrize(
    "name",
    ["en", "en.xz", "en.txt.lzma", "en.txt.xz.part", "en.TXT", "en.txt.XZ", "en.txt.7z\n", "en.json", "en.warc.gz",
     "en.parquet.gz", "en.warc.wat.gz", "en.wet"],
)  # fmt: skip
def test_an_unknown_ending_is_refused_with_the_known_ones(name: str) -> None:
    known = ".txt, .txt.xz, .txt.gz, .txt.bz2, .txt.zst, .jsonl, .jsonl.xz, .jsonl.gz, .jsonl.bz2, .jsonl.zst, "
    with pytest.raises(UserError, match=re.escape(known + ".parquet, .warc.wet, .warc.wet.gz")):
        format_of(name)


# ---------------------------------------------------------------------------------------------------------------- spans


def test_a_plain_file_is_cut_into_spans_that_cover_it() -> None:
    for layout in ("text", "jsonl"):
        cut = spans(io.BytesIO(), 25, Format(layout, ""), 10)
        assert cut == [Span(0, 10), Span(10, 20), Span(20, 25)]
        assert spans(io.BytesIO(), 0, Format(layout, ""), 10) == [Span(0, 0)]


def test_what_can_only_be_read_from_its_beginning_has_no_spans() -> None:
    content = b"text\n\n" * 100
    for compression in ("gz", "bz2", "zst", "xz"):
        file = COMPRESS[compression](content)
        for layout in ("text", "jsonl"):
            assert spans(io.BytesIO(file), len(file), Format(layout, compression), 10) is None
    for compression in ("", "gz"):
        assert spans(io.BytesIO(content), len(content), Format("wet", compression), 10) is None


# ---------------------------------------------------------------------------------------------------------- whole files


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
        for layout in ("text", "jsonl", "wet"):
            assert until_fault(read_whole(Dribble(file), Format(layout, compression), "text")) == ([], reason)
    for layout in ("text", "jsonl"):
        assert read_cut(content, Format(layout, ""), range(len(content) + 1)) == ([], reason)


@every_compression
def test_the_documents_before_a_fault_are_given(compression: str) -> None:
    content = b"\n\n".join(b"%d" % (i**7) for i in range(40_000))
    file = COMPRESS[compression](content)
    documents, reason = until_fault(read_whole(io.BytesIO(file[: len(file) * 3 // 4]), Format("text", compression), ""))
    expected = documents_by_definition(content)
    assert reason == f"truncated_{compression}"
    assert 1000 < len(documents) < len(expected) and documents == expected[: len(documents)]


@pytest.mark.parametrize("language", ["af", "am", "as", "eo", "he", "ht", "hy", "sw", "zh-Hant", "zu"])
def test_real_files_have_the_documents_they_are_listed_with(shared_data: Path, language: str) -> None:
    path = shared_data / "cc100-sample" / f"{language}.txt.xz"
    listed = re.search(rf"^\| {language} \| ([0-9,]+) \|", (path.parent / "SOURCES.md").read_text(), re.MULTILINE)
    assert listed
    with path.open("rb") as stream:
        documents = list(read_whole(stream, format_of(path.name), ""))
    assert len(documents) == int(listed[1].replace(",", ""))
    content = lzma.decompress(path.read_bytes())
    assert documents == documents_by_definition(content)
    step = len(content) // 7 + 1
    borders = [*range(0, len(content), step), len(content)]
    assert read_cut(content, Format("text", ""), borders) == (documents, None)


def test_text_is_taken_as_it_is_from_all_but_json_lines() -> None:
    raw = b'{"text": "caf\\u00e9"}'
    assert text_of(Format("text", ""), raw, "text") == text_of(Format("wet", "gz"), raw, "text") == raw
    assert text_of(Format("jsonl", "xz"), raw, "text") == "caf\xe9".encode()


def test_files_on_a_remote_store_are_read_in_spans(s3_options: dict[str, dict[str, Any]]) -> None:
    texts = [f"text {n}" * 50 for n in range(1000)]
    lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), sink, row_group_size=300)
    store = s3fs.S3FileSystem(**s3_options["s3"])
    files = {"en.jsonl": lines, "en.jsonl.xz": xz_file([lines[:5000], lines[5000:]]), "en.parquet": sink.getvalue()}
    for name, file in files.items():
        format = format_of(name)
        with store.open(f"bucket/{name}", "wb") as stream:
            stream.write(file)
        with store.open(f"bucket/{name}", "rb") as stream:
            cut = spans(stream, len(file), format, 20_000)
            assert cut and len(cut) > 1
            found = [raw for span in cut for _, raw in read_span(stream, format, span, "text")]
        assert [text_of(format, raw, "text").decode() for raw in found if isinstance(raw, bytes)] == texts
