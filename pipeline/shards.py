"""Arrow shards: the schemas, the IPC stream they are written in, and the two small files `datasets` needs beside them.

The stream format (not the file format) is what `datasets.load_from_disk`, `Dataset.from_file` and
`load_dataset("arrow")` all read. Reading maps the file into memory: opening a shard costs no more than its record-
batch headers.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import PipelineError

ROWS_PER_BATCH = 1024  # about 4 MB of web documents, 2 MB of token rows

CORPUS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),  # xxh3_128 of the text in hex: the order of the rows
        pa.field("text", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # name of the input file
        pa.field("offset", pa.int64(), nullable=False),  # of the document in it, in decompressed bytes
    ]
)

REJECT_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("outcome", pa.string(), nullable=False),  # dropped | rejected
        pa.field("reason", pa.string(), nullable=False),
        pa.field("excerpt", pa.binary(), nullable=False),  # the first bytes, raw
    ]
)


def token_schema(max_seq_len: int, tokenizer_sha256: str) -> pa.Schema:
    """Rows of exactly `max_seq_len` ids, the lengths of the segments in them, and the tokenizer they belong to."""
    fields = [
        pa.field("input_ids", pa.list_(pa.field("item", pa.int32(), nullable=False), max_seq_len), nullable=False),
        pa.field("segment_lengths", pa.list_(pa.field("item", pa.uint16(), nullable=False)), nullable=False),
    ]
    return pa.schema(fields, metadata={"tokenizer_sha256": tokenizer_sha256})


def shard_name(index: int, count: int, stem: str = "data") -> str:
    """`data-00000-of-00004.arrow`."""
    return f"{stem}-{index:05d}-of-{count:05d}.arrow"


def table_of(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    """Rows as a table."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )


def text_size(table: pa.Table) -> int:
    """UTF-8 bytes in a table's column `text`."""
    return int(pc.sum(pc.binary_length(table["text"])).as_py() or 0)


def write_stream(sink: Any, schema: pa.Schema, table: pa.Table) -> int:
    """Write a table to a sink as one IPC stream, in record batches of a fixed number of rows.

    The bytes depend on the rows alone, not on how the table's memory is chunked. Returns the number of rows.
    """
    whole = table.cast(schema).combine_chunks()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_table(whole, max_chunksize=ROWS_PER_BATCH)
    return int(whole.num_rows)


def write_batches(sink: Any, schema: pa.Schema, tables: Iterable[pa.Table]) -> int:
    """Like `write_stream` for one table after the other, of which it holds one and a batch; the bytes are the same."""
    rows = 0
    rest = schema.empty_table()
    with pa.ipc.new_stream(sink, schema) as writer:
        for table in tables:
            rest = pa.concat_tables([rest, table])
            whole = len(rest) - len(rest) % ROWS_PER_BATCH
            for start in range(0, whole, ROWS_PER_BATCH):
                writer.write_table(rest.slice(start, ROWS_PER_BATCH).combine_chunks())
            rows += whole
            rest = rest.slice(whole).combine_chunks()
        if len(rest):
            writer.write_table(rest)
    return rows + len(rest)


def open_shard(path: str, schema: pa.Schema | None = None) -> pa.Table:
    """Memory-map a shard and return its rows without copying them.

    Raises:
        PipelineError: the file is no whole Arrow stream, or its columns are not those of `schema`.
    """
    try:
        with pa.memory_map(path) as source:
            return _read_table(source, path, schema)
    except OSError as error:
        raise PipelineError(f"{path}: not a readable Arrow shard ({error}); run `mdeberta verify`") from None


def parse_shard(data: bytes | mmap.mmap, name: str, schema: pa.Schema) -> pa.Table:
    """The rows of a shard that is in memory, or mapped into it.

    Raises:
        PipelineError: as `open_shard`.
    """
    return _read_table(pa.BufferReader(data), name, schema)


def _read_table(source: Any, path: str, schema: pa.Schema | None) -> pa.Table:
    try:
        with pa.ipc.open_stream(source) as reader:
            table = reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise PipelineError(f"{path}: not a readable Arrow shard ({error}); run `mdeberta verify`") from None
    if schema is not None and not table.schema.equals(schema):
        raise PipelineError(f"{path}: its columns are not {schema.names} of the types they should have")
    return table


def dataset_files(schema: pa.Schema, shards: list[str], fingerprint: str) -> dict[str, bytes]:
    """`dataset_info.json` and `state.json`: with them `datasets.load_from_disk` opens the directory of these shards."""
    kinds = {pa.string(): "string", pa.int64(): "int64", pa.binary(): "binary"}
    info = {
        "citation": "",
        "description": "",
        "features": {field.name: {"dtype": kinds[field.type], "_type": "Value"} for field in schema},
        "homepage": "",
        "license": "",
    }
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    return {
        "dataset_info.json": json.dumps(info, indent=1, sort_keys=True).encode(),
        "state.json": json.dumps(state, indent=1, sort_keys=True).encode(),
    }
