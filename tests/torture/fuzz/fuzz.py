"""Fuzzes what reads bytes from outside: python fuzz.py TARGET FOLDER [libFuzzer options]; the seeds go into FOLDER.

A target fails on any exception but the one it may raise, on a broken promise, and on the limits of time and memory that
the options set. Coverage of `pipeline` guides the search.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import atheris
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

with atheris.instrument_imports(include=["pipeline"]):
    from pipeline import configfile, sources, text
    from pipeline.errors import PipelineError, UserError
    from pipeline.manifest import Identity, InputIdentity, Manifest, Part
    from pipeline.shards import CORPUS_SCHEMA, open_shard, write_stream
    from pipeline.storage import check_relative
    from pipeline.text import Rejected

_NAMES = (
    *("en.txt", "en.txt.xz", "en.txt.gz", "en.txt.bz2", "en.txt.zst", "en.jsonl", "en.jsonl.xz", "en.jsonl.gz"),
    *("en.parquet", "en.warc.wet", "en.warc.wet.gz"),
)
_FORMATS = [sources.format_of(name) for name in _NAMES]
_SPAN_BYTES = 64
_file = Path(f"/proc/self/fd/{os.memfd_create('input')}")  # a file in memory, gone with the process


def clean(data: bytes) -> None:
    """Decoding and cleaning reject or give clean text, and cleaning that again changes nothing."""
    for fix_mojibake in (False, True):
        with suppress(Rejected):
            cleaned = text.clean(text.decode(data), fix_mojibake=fix_mojibake)
            assert text.clean(cleaned, fix_mojibake=fix_mojibake) == cleaned
            assert "\t" not in cleaned and "\n\n" not in cleaned and "  " not in cleaned and cleaned.strip() == cleaned
            text.content_hash(cleaned)


def documents(data: bytes) -> None:
    """Every format, chosen by the first byte: documents or rejects, read whole and in spans."""
    format, content = _FORMATS[(data or b"\0")[0] % len(_FORMATS)], data[1:]
    whole: list[sources.Document] = []
    with suppress(Rejected):
        for document in sources.read_whole(io.BytesIO(content), format, "text"):
            whole.append(document)
    for _, raw in whole:
        if isinstance(raw, bytes):
            with suppress(Rejected):
                text.decode(sources.text_of(format, raw, "text"))
    parts: list[sources.Document] = []
    spans = sources.spans(io.BytesIO(content), len(content), format, _SPAN_BYTES)
    for span in spans or []:
        with suppress(Rejected):
            parts += sources.read_span(io.BytesIO(content), format, span, "text")
    if spans is not None and format.layout != "parquet" and not format.compression:
        assert [(offset, str(raw)) for offset, raw in parts] == [(offset, str(raw)) for offset, raw in whole]


def shard(data: bytes) -> None:
    """A shard is a whole Arrow stream of its schema, or a `PipelineError`."""
    _file.write_bytes(data)
    with suppress(PipelineError):
        assert open_shard(str(_file), CORPUS_SCHEMA).schema.equals(CORPUS_SCHEMA)


def manifest(data: bytes) -> None:
    """Manifests, identities and records are read, and written again as they were read, or a `PipelineError`."""
    for kind in (Manifest, Identity, Part):
        with suppress(PipelineError):
            found = kind.from_json(data, "input")
            assert kind.from_json(found.to_json(), "output") == found


def config(data: bytes) -> None:
    """A config file loads, or a `UserError`."""
    _file.write_bytes(data)
    with suppress(UserError):
        configfile.load(str(_file))


def name(data: bytes) -> None:
    """A name that passes stays inside its folder and is no hidden file."""
    candidate = os.fsdecode(data)
    with suppress(PipelineError):
        check_relative(candidate)
        path = os.path.normpath(f"/folder/{candidate}")
        assert path == f"/folder/{candidate}" and all(not step.startswith(".") for step in candidate.split("/"))
        assert candidate.isascii() and candidate.isprintable()


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (clean, documents, shard, manifest, config, name)
}


def seeds(target: str) -> list[bytes]:
    """Small real inputs of a target."""
    lines = "One.\nTwo.\r\n\r\nSchöner Text. Ã¤ e\u0301\u200b\u00a0क्\u200dष\n".encode()
    table = pa.table({"id": ["0" * 32], "text": ["x"], "source": ["en.txt"], "offset": [0]}).cast(CORPUS_SCHEMA)
    stream, parquet = io.BytesIO(), io.BytesIO()
    write_stream(stream, CORPUS_SCHEMA, table)
    pq.write_table(table, parquet)
    identity = Identity("corpus", 1, {"a": [1]}, {"pyarrow": "20"}, {"k": [InputIdentity("en.txt", 1, "ff")]}, {})
    part = Part("en/a.arrow", 3, "0" * 64, 1, {"text_bytes": 1})
    whole = Manifest(identity, {}, {part.path: part}, {"notes": []})
    records = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n"
    json_lines = b'{"text": "One."}\n{"text": 1}\n'
    return {
        "clean": [lines],
        "documents": [
            bytes([number]) + content
            for number, content in enumerate(
                (
                    *(lines, lzma.compress(lines) * 2, gzip.compress(lines), bz2.compress(lines)),
                    *(zstandard.compress(lines), json_lines, lzma.compress(json_lines), gzip.compress(json_lines)),
                    *(parquet.getvalue(), records, gzip.compress(records)),
                )
            )
        ],
        "shard": [stream.getvalue()],
        "manifest": [whole.to_json(), identity.to_json(), part.to_json()],
        "config": [b"work_dir: w\ncorpus: {inputs: [a.txt], shard_mb: 1e2}\n", b"preset: demo\nvocab:\n  size: 100\n"],
        "name": [b"en/data-00000-of-00001.arrow", b"../x", b"/etc/x", b"C:\\x"],
    }[target]


def main() -> None:
    """Write the seeds and fuzz."""
    target, folder = sys.argv[1:3]
    for number, seed in enumerate(seeds(target)):
        (Path(folder) / f"seed-{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], folder, *sys.argv[3:]], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
