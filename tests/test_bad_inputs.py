"""Bad inputs, one by one: what the corpus stage keeps, drops or rejects for a reason, or refuses to run on."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import zstandard
from faults import watched
from support import write_corpus

from pipeline import configfile
from pipeline.config import Config
from pipeline.errors import PipelineError, UserError
from pipeline.execute import run_stages
from pipeline.shards import CORPUS_SCHEMA, open_shard, write_stream
from pipeline.stage import identities, open_artifact


@dataclass(frozen=True)
class Case:
    """One input file and what becomes of it: the texts that are kept, and the other documents by their reason."""

    title: str
    name: str
    content: bytes
    kept: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)


def bomb(compress: Callable[[bytes], bytes]) -> bytes:
    """Ten gigabytes of zeros."""
    return compress(bytes(32 << 20)) * 320


ZALGO = "z" + "\u0301" * 100
CASES = [
    Case("an empty file", "en.01.txt", b""),
    Case("one newline", "en.02.txt", b"\n"),
    Case("no newline at the end", "en.03.txt", b"The end has no newline", ["The end has no newline"]),
    Case(
        "CRLF and lone CR",
        "en.04.txt",
        b"A line\r\nand another.\r\n\r\nOld line ends\rare lone.\r\rNext one.",
        ["A line\nand another.", "Old line ends\nare lone.", "Next one."],
    ),
    Case("a byte order mark of UTF-8", "en.05.txt", b"\xef\xbb\xbfMarked text.", ["Marked text."]),
    Case("UTF-16", "en.06.txt", "Wide text.".encode("utf-16"), rejected={"utf16": 1}),
    Case(
        "invalid UTF-8 in a line",
        "en.07.txt",
        b"Good before.\n\nB\xffd.\n\nGood after.",
        ["Good before.", "Good after."],
        rejected={"invalid_utf8": 1},
    ),
    Case("a character cut at the end", "en.08.txt", "Cut é".encode()[:-1], rejected={"invalid_utf8": 1}),
    Case(
        "overlong forms and surrogates",
        "en.09.txt",
        b"Over\xc0\xaflong.\n\nSurrogates: \xed\xa0\xbd\xed\xb8\x80.",
        rejected={"invalid_utf8": 2},
    ),
    Case(
        "NUL bytes",
        "en.10.txt",
        b"A stray\0 NUL in a long enough text goes.\n\n" + bytes(100),
        ["A stray NUL in a long enough text goes."],
        rejected={"control_bytes": 1},
    ),
    Case("one line of 50 MB", "en.11.txt", b"x" * 50_000_000, dropped={"too_long": 1}),
    Case("a million blank lines", "en.12.txt", b"Before.\n" + b"\n" * 10**6 + b"After.", ["Before.", "After."]),
    Case("nothing but white space", "en.13.spaces.txt", b" \t\r\n  \n\t"),
    Case("nothing visible", "en.13.zero-width.txt", "\u200b\u202e\n\n\u3000\u2060".encode(), dropped={"empty": 2}),
    Case(
        "line ends of Unicode separate lines and no documents",
        "en.14.txt",
        "One\u2028two\u2029three\x85four.".encode(),
        ["One\ntwo\nthree\nfour."],
    ),
    Case(
        "unassigned and private code points",
        "en.15.txt",
        "Private \ue000 and unassigned\u0378.".encode(),
        ["Private and unassigned."],
    ),
    Case("a hundred marks on a letter", "en.16.txt", ZALGO.encode(), [unicodedata.normalize("NFC", ZALGO[:31])]),
    Case(
        "mixed scripts",
        "en.18.txt",
        "Latin and кириллица and 中文 mixed.".encode(),
        ["Latin and кириллица and 中文 mixed."],
    ),
    Case(
        "words that look like special pieces",
        "en.20.txt",
        "A [MASK] is plain text here, and so are <s> and ▁ and a\ttab.".encode(),
        ["A [MASK] is plain text here, and so are <s> and ▁ and a tab."],
    ),
    Case("a document twice in a file", "en.21.a.txt", b"Said.\n\nSaid.", ["Said."], dropped={"duplicate": 1}),
    Case("once more in another file", "en.21.b.txt", b"Said.", dropped={"duplicate": 1}),
    Case("and in another language", "de.21.txt", b"Said.", ["Said."]),
    Case("an xz file without its end", "en.22.txt.xz", lzma.compress(b"Cut.")[:-8], rejected={"truncated_xz": 1}),
    Case(
        "two xz streams in a file",
        "en.23.txt.xz",
        lzma.compress(b"First stream.\n\n") + lzma.compress(b"Second stream."),
        ["First stream.", "Second stream."],
    ),
    Case("an xz bomb", "en.24.txt.xz", bomb(lzma.compress), rejected={"decompression_bomb": 1}),
    Case("a gzip bomb", "en.24.txt.gz", bomb(gzip.compress), rejected={"decompression_bomb": 1}),
    Case("a bzip2 bomb", "en.24.txt.bz2", bomb(bz2.compress), rejected={"decompression_bomb": 1}),
    Case("a zstd bomb", "en.24.txt.zst", bomb(zstandard.compress), rejected={"decompression_bomb": 1}),
    Case("xz by name and gzip inside", "en.25.txt.xz", gzip.compress(b"Text."), rejected={"not_xz": 1}),
    Case("text by name and gzip inside", "en.26.txt", gzip.compress(b"Text."), rejected={"not_text": 1}),
    Case("a language in two scripts", "zh-Hans.32.txt", "中文。".encode(), ["中文。"]),
    Case("and the same romanised", "zh_rom.32.txt", b"Zhongwen.", ["Zhongwen."]),
    Case("mojibake", "de.17.txt", "SchÃ¶ner Text, gut geprÃ¼ft.".encode(), ["Schöner Text, gut geprüft."]),
    Case(
        "another language than the file's name says",
        "sw.19.txt",
        b"This is a long sentence in plain English, which nobody would take for anything else.",
        dropped={"other_language": 1},
    ),
]

# Short lines of one language say little: only Swahili, whose file holds English, may be vetoed here.
LANGUAGE_ID = "corpus.language_id={enabled: true, min_probability: 1.0, thresholds: {sw: 0.5}}"


def conf(work: Path, inputs: Path | str, *overrides: str) -> Config:
    """Of a run on some files, by one worker."""
    return configfile.load("demo", [f"work_dir={work}", f"corpus.inputs=['{inputs}']", "corpus.workers=1", *overrides])


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Case]:
    """One run on all the files; says what became of one."""
    root = tmp_path_factory.mktemp("bad")
    (root / "in").mkdir()
    for case in CASES:
        (root / "in" / case.name).write_bytes(case.content)
    config = conf(root / "work", f"{root}/in/*", LANGUAGE_ID)
    run_stages(config, ["corpus"])
    corpus = open_artifact(config, identities(config, "corpus")["corpus"], "a test")
    texts: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for part in corpus.select(suffix=".arrow"):
        if not part.path.startswith("rejects/"):
            for row in open_shard(corpus.fetch(part.path)).to_pylist():
                texts[row["source"]].append((row["offset"], row["text"]))
    counts = corpus.manifest.stats["inputs"]

    def found(case: Case) -> Case:
        kept = [text for _, text in sorted(texts[case.name])]
        return Case(
            case.title, case.name, case.content, kept, counts[case.name]["dropped"], counts[case.name]["rejected"]
        )

    return found


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name} {case.title}" for case in CASES])
def test_what_becomes_of_it(outcome: Callable[[Case], Case], case: Case) -> None:
    assert outcome(case) == case


def refused(config: Config, words: str) -> None:
    with pytest.raises(UserError, match=words):
        run_stages(config, ["corpus"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("en.26.pdf", "must end with one of", id="another extension"),
        pytest.param("C:\\en.28.txt", "must begin with a language code", id="a drive letter"),
        pytest.param("EN!.32.txt", "must begin with a language code", id="no language code"),
        pytest.param("..en.28.txt", "must begin with a language code", id="a hidden name"),
        pytest.param("en.29\n.txt", "rename it", id="a newline in the name"),
        pytest.param(os.fsdecode(b"en.29.\xff.txt"), "rename it", id="a name that is no UTF-8"),
    ],
)
def test_a_name_that_is_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_text("Text.")
    refused(conf(tmp_path / "work", f"{tmp_path}/in/*"), words)


def test_a_name_with_an_encoded_path_stays_in_the_work_dir(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", {"en.%2e%2e%2f%2e%2e%2fx": ["Text."]})
    refused(conf(tmp_path / "work", f"{tmp_path}/in/*"), "not a safe file name")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "work"}


@pytest.mark.parametrize("pattern", ["../../etc/en.txt", "/nowhere/en.txt"])
def test_a_path_without_files(tmp_path: Path, pattern: str) -> None:
    refused(conf(tmp_path / "work", tmp_path / pattern), "nothing matches")


@pytest.mark.parametrize("languages", ["['../en']", "[xx]"])
def test_a_language_that_no_file_has(tmp_path: Path, languages: str) -> None:
    write_corpus(tmp_path / "in", {"en": ["Text."]})
    refused(conf(tmp_path / "work", f"{tmp_path}/in/*", f"corpus.languages={languages}"), "no input file is called")


def test_no_language_at_all(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", {"en": ["Text."]})
    refused(conf(tmp_path / "work", f"{tmp_path}/in/*", "corpus.languages=[]"), "not one document was kept")


def test_a_link_out_of_the_folder_is_read_and_a_loop_is_refused(tmp_path: Path) -> None:
    write_corpus(tmp_path / "elsewhere", {"en": ["Linked text."]})
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "en.27.txt").symlink_to(tmp_path / "elsewhere" / "en.txt")
    config = conf(tmp_path / "work", f"{tmp_path}/in/*")
    run_stages(config, ["corpus"])
    assert open_artifact(config, identities(config, "corpus")["corpus"], "a test").manifest.stats["totals"]["kept"] == 1
    (tmp_path / "in" / "en.loop.txt").symlink_to(tmp_path / "in" / "en.loop.txt")
    refused(config, r"en\.loop\.txt: cannot be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (write_corpus(tmp_path / "in", {"en": ["Text."]}) / "en.txt").chmod(0)
    refused(conf(tmp_path / "work", f"{tmp_path}/in/*"), r"en\.txt: cannot be read .* permissions")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_corpus(tmp_path / "in", {"en": ["Text."]}) / "en.txt"
    config = conf(tmp_path / "work", path)
    with watched() as passed:
        run_stages(config, ["corpus"])
    first_part = next(n for n, passage in enumerate(passed) if passage.file == "a work part")
    again = conf(tmp_path / "again", path)
    with watched(first_part, lambda: path.write_text("Tex2.\n\n") and None), pytest.raises(PipelineError) as told:
        run_stages(again, ["corpus"])
    assert "an input file changed during the run" in str(told.value)
    assert not list((tmp_path / "again").rglob("MANIFEST.json"))


def arrow(schema: pa.Schema, columns: dict[str, list[object]]) -> bytes:
    sink = pa.BufferOutputStream()
    write_stream(sink, schema, pa.table(columns, schema=schema))
    return bytes(sink.getvalue())


ROW: dict[str, list[object]] = {"id": ["0"], "text": ["x" * 5000], "source": ["en.txt"], "offset": [0]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(arrow(CORPUS_SCHEMA, ROW)[:-3000], id="cut"),
        pytest.param(arrow(pa.schema([("id", pa.int64())]), {"id": [1]}), id="another schema"),
        pytest.param(
            arrow(CORPUS_SCHEMA, ROW).replace(struct.pack("<q", 5000), struct.pack("<q", 1 << 62)), id="a huge buffer"
        ),
        pytest.param(struct.pack("<Ii", 0xFFFFFFFF, 2**31 - 1), id="a huge header"),
    ],
)
def test_an_arrow_file_that_is_no_shard(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.arrow"
    path.write_bytes(content)
    with pytest.raises(PipelineError, match=r"data\.arrow"):
        open_shard(str(path), CORPUS_SCHEMA)
