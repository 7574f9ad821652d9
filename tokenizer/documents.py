"""Reads the corpus stage's documents: the shards of each language, and their texts in hash order, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from pipeline.artifact import Artifact, fetch
from pipeline.manifest import Part
from pipeline.shards import CORPUS_SCHEMA, open_shard
from pipeline.storage import Folder


def shards_by_language(corpus: Artifact) -> dict[str, list[Part]]:
    """The shards of every language in order, languages sorted."""
    found: dict[str, list[Part]] = {}
    for part in corpus.select(suffix=".arrow"):
        language, _, name = part.path.partition("/")
        if name.startswith("data-"):
            found.setdefault(language, []).append(part)
    return found


def text_bytes(shards: list[Part]) -> int:
    """UTF-8 bytes of all documents in these shards, as the corpus stage counted them."""
    return sum(int(part.stats["text_bytes"]) for part in shards)


def read_texts(folder: Folder, shards: list[Part], first: int = 0) -> Iterator[list[bytes]]:
    """UTF-8 texts of a language's documents from number `first` on, a record batch at a time.

    Only the shards that are reached are opened and checked, so whoever stops early reads a prefix.
    """
    for part in shards:
        if first < part.rows:
            yield from text_batches(open_shard(fetch(folder, part), CORPUS_SCHEMA)["text"].slice(first))
        first = max(0, first - part.rows)


def text_batches(texts: pa.ChunkedArray) -> Iterator[list[bytes]]:
    """A column of strings as UTF-8, one record batch after the other."""
    for batch in texts.chunks:
        yield batch.cast(pa.binary()).to_pylist()
