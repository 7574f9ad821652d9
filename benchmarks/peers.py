"""What one would build for the corpus stage with Beam's own transforms and with datatrove, with the same cleaning.

Both peers clean with the steps below, one function a step, as their users do. Mojibake is repaired by ftfy where its
own quick test asks for it, and what to drop is decided by the filter of the project, so the rules are the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import ftfy
import ftfy.badness
import pyarrow as pa
from apache_beam.options.pipeline_options import PipelineOptions
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import ExactDedupConfig, ExactDedupFilter, ExactDedupSignature, ExactFindDedups
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.formatters.base import BaseFormatter
from datatrove.pipeline.readers import ParquetReader
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.pipeline.writers import ParquetWriter

from pipeline.config import CorpusConfig
from pipeline.quality import drop_reason
from pipeline.text import content_hash

_BLANKS = re.compile(r"[^\S\n]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
_CONFIG = CorpusConfig()


def mojibake(text: str) -> str:
    """Repaired if it looks broken."""
    return ftfy.fix_encoding(text) if ftfy.badness.is_bad(text) else text


def nfc(text: str) -> str:
    """Composed."""
    return unicodedata.normalize("NFC", text)


def control(text: str) -> str:
    """Without control characters."""
    return _CONTROL.sub("", text)


def blanks(text: str) -> str:
    """With single spaces."""
    return _BLANKS.sub(" ", text).strip()


def good(text: str) -> bool:
    """Whether no filter drops it."""
    return drop_reason(text, _CONFIG) is None


Cleaning = tuple[Callable[[str], str], ...]
CLEANING: Cleaning = (mojibake, nfc, control, blanks)


def natural_beam(folder: Path, work: Path, cleaning: Cleaning = CLEANING) -> None:
    """An element is a line, a step is a Map, equal texts meet in a GroupByKey."""
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with beam.Pipeline(options=PipelineOptions(["--runner=FnApiRunner"])) as pipeline:
        texts = pipeline | beam.io.ReadFromText(f"{folder}/*.txt")
        for step in cleaning:
            texts = texts | step.__name__ >> beam.Map(step)
        (
            texts
            | "good" >> beam.Filter(good)
            | "hash" >> beam.Map(lambda text: (content_hash(text).hex(), text))
            | "same text" >> beam.GroupByKey()
            | "first" >> beam.MapTuple(lambda key, texts: {"id": key, "text": next(iter(texts))})
            | beam.io.WriteToParquet(f"{work}/data", schema, num_shards=4)
        )


class ParagraphReader(BaseDiskReader):
    """CC100's layout: documents between blank lines."""

    name = "CC100"

    def read_file(self, filepath: str) -> Iterator[Document]:
        """Read line by line."""
        with self.data_folder.open(filepath, "r") as file:
            lines: list[str] = []
            for number, line in enumerate(file):
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield self.get_document_from_dict({"text": "".join(lines)}, filepath, number)
                    lines = []
            if lines:
                yield self.get_document_from_dict({"text": "".join(lines)}, filepath, number)


class Step(BaseFormatter):
    """One cleaning function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.name = function.__name__
        self._function = function

    def format(self, text: str) -> str:
        """Apply it."""
        return self._function(text)


def text_of(document: Document) -> bytes:
    """What is compared."""
    return document.text.encode()


def datatrove(folder: Path, work: Path, cleaning: Cleaning = CLEANING) -> None:
    """Its readers, formatters and filters, then its exact deduplication in three passes."""
    dedup = ExactDedupConfig(content_getter=text_of)
    clean, signatures, duplicates = (str(work / name) for name in ("clean", "signatures", "duplicates"))
    for pipeline in (
        [
            ParagraphReader(str(folder), glob_pattern="*.txt"),
            *map(Step, cleaning),
            LambdaFilter(lambda document: good(document.text)),
            ParquetWriter(clean),
        ],
        [ParquetReader(clean), ExactDedupSignature(signatures, dedup)],
        [ExactFindDedups(signatures, duplicates, dedup)],
        [ParquetReader(clean), ExactDedupFilter(duplicates, dedup), ParquetWriter(str(work / "data"))],
    ):
        LocalPipelineExecutor(pipeline, tasks=1, workers=1, logging_dir=str(work / "logs" / str(id(pipeline)))).run()
