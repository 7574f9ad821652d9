"""A run over a trillion tokens begins anywhere at once: nothing but the manifest is read before the first batch."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.manifest import Identity, Manifest, Part
from pipeline.shards import shard_name, token_schema, write_stream
from pipeline.stage import PartStore
from pipeline.storage import Folder

LANGUAGES, SHARDS, ROWS, SEQ_LEN = 100, 16_000, 1 << 17, 512
TOKENIZER = "ab" * 32
FIRST_BATCH = """
import sys, time
import numpy, pyarrow, torch
import model.data, pipeline.config, pipeline.stage, pipeline.storage
began = time.perf_counter()
folder = pipeline.storage.Folder(sys.argv[1])
tokens = pipeline.artifact.Artifact(folder, pipeline.stage.read_manifest(folder))
data = model.data.TrainingData(tokens, pipeline.config.PretrainConfig(), vocab_rows=250112)
rows = data.read(400_000 * 8192, 8192)
print(time.perf_counter() - began, rows.input_ids.shape[0], len(set(rows.languages.tolist())))
"""


def write_index(folder: Path) -> int:
    """A tokens stage of 16,000 shards in 100 languages that are all one file; returns its number of tokens."""
    schema = token_schema(SEQ_LEN, TOKENIZER)
    ids = pa.FixedSizeListArray.from_arrays(pa.array(np.full(ROWS * SEQ_LEN, 9, np.int32)), type=schema.field(0).type)
    lengths = pa.ListArray.from_arrays(
        pa.array(np.arange(ROWS + 1, dtype=np.int32)),
        pa.array(np.full(ROWS, SEQ_LEN, np.uint16)),
        type=schema.field(1).type,
    )
    with PartStore(Folder(str(folder))).publish("one.arrow") as draft:
        draft.rows = write_stream(draft.sink, schema, pa.Table.from_arrays([ids, lengths], schema=schema))
    receipt = draft.sink.receipt
    # A few languages have most of them.
    counts = np.diff(np.geomspace(1, SHARDS + 1, LANGUAGES + 1).astype(int)).clip(1)
    counts[-1] += SHARDS - counts.sum()
    parts, stats = [], {}
    for number, count in enumerate(counts.tolist()):
        language = f"l{number:02d}"
        (folder / language).mkdir()
        for path in (f"{language}/{shard_name(shard, count, 'train')}" for shard in range(count)):
            os.link(folder / "one.arrow", folder / path)
            found = {"tokens": ROWS * SEQ_LEN, "documents": ROWS, "segments": ROWS, "unknown": 0}
            parts.append(Part(path, receipt.bytes, receipt.sha256, ROWS, found))
        stats[language] = {"train": {"rows": count * ROWS, "tokens": count * ROWS * SEQ_LEN}, "validation": {"rows": 0}}
    manifest = Manifest(
        Identity("tokens", 1, {}, {}, {}, {}),
        {},
        {part.path: part for part in parts},
        {"languages": stats, "max_seq_len": SEQ_LEN, "tokenizer_sha256": TOKENIZER},
    )
    (folder / "MANIFEST.json").write_bytes(manifest.to_json())
    return sum(language["train"]["tokens"] for language in stats.values())


def test_the_first_batch_after_a_resume_takes_less_than_two_seconds() -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert write_index(Path(folder)) > 10**12
        done = subprocess.run([sys.executable, "-c", FIRST_BATCH, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seconds, rows, languages = done.stdout.split()
    assert (int(rows), int(languages)) == (8192, LANGUAGES)
    assert float(seconds) < 2, f"{seconds} s"
