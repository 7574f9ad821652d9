"""Reading training rows beside MosaicML streaming and LitData: the same rows, the same batches, one process each.

python benchmarks/loader.py [PEERS_PYTHON] [FOLDER] [ROWS]      default: .venv/peers, runs/bench/loader, 110,000 rows

Rows of 512 random tokens in one to six segments, in 107 languages of very different size. Ours mixes the languages as
a training does; the peers shuffle all rows as one data set, which is less work. Everybody gives input ids and segment
numbers [256, 512] int32 as tensors, without worker processes, from files in the system's cache; our shards' digests
have been checked before. The peers' requirements (numpy below 2.2, transformers below 5, torchvision) do not go with
ours, so they have an environment of their own. At last ours with what a training makes of the rows: micro-batches with
masks.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from turns import compare

from model.data import Rows, TrainingData
from model.masking import Masking
from pipeline.artifact import Artifact
from pipeline.config import PretrainConfig
from pipeline.manifest import Identity, Manifest
from pipeline.shards import shard_name, token_schema, write_stream
from pipeline.stage import PartStore, read_manifest
from pipeline.storage import Folder

SEQ_LEN, BATCH, BATCHES, MICRO_BATCH = 512, 256, 400, 8
LANGUAGES, SEGMENTS, PIECES, TABLE_ROWS = 107, 6, 250_000, 250_112
TOKENIZER = "00" * 32
PEERS = ("streaming", "litdata")
spent = {"processor": 0.0, "clock": 0.0}
"""Seconds of all work so far, by the two clocks: what `compare` reads."""


def main(python: str = ".venv/peers/bin/python", work: str = "runs/bench/loader", count: str = "110000") -> None:
    """Compare by either clock, then measure ourselves with masks."""
    torch.set_num_threads(1)
    folder = Path(work)
    data = TrainingData(tokens_stage(folder, int(count)), PretrainConfig(), TABLE_ROWS)
    ways: dict[str, Callable[[], object]] = {"ours": OurReader(data, to_tensors)}
    ways |= {name: peer for name in PEERS if (peer := start_peer(python, name, folder))}
    amount = BATCH * BATCHES * SEQ_LEN / 1e6
    for kind in spent:
        compare(f"rows of 512, by the {kind}", "ours", ways, amount, "M tokens", clock=lambda kind=kind: spent[kind])
    for masking in ({}, {"masking": "windowed"}, {"objective": "mlm"}):
        config = PretrainConfig(**masking)
        ours = OurReader(data, Masked(config))
        title = f"with masks, {config.objective} {config.masking}, by the processor"
        compare(title, "ours", {"ours": ours}, amount, "M tokens", clock=lambda: spent["processor"])


class OurReader:
    """Reads the next so many batches of a run and makes something of each, on the clocks."""

    def __init__(self, data: TrainingData, use: Callable[[Rows], object]) -> None:
        self._data, self._use = data, use
        self._step = 0
        self()
        data.require_verified()

    def __call__(self) -> None:
        used, began = time.process_time(), time.perf_counter()
        for _ in range(BATCHES):
            self._use(self._data.read(self._step * BATCH, BATCH))
            self._step += 1
        spend(time.process_time() - used, time.perf_counter() - began)


def to_tensors(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """What the peers give."""
    return torch.from_numpy(rows.input_ids), torch.from_numpy(rows.segment_ids)


class Masked:
    """Micro-batches with their masks and the number of masked tokens, as a training step wants them."""

    def __init__(self, config: PretrainConfig) -> None:
        begins_word = np.random.default_rng(1).random(PIECES) < 0.5
        self._masking = Masking(config, PIECES, begins_word.tolist())

    def __call__(self, rows: Rows) -> None:
        for first in range(0, BATCH, MICRO_BATCH):
            few = rows.narrow(first, MICRO_BATCH)
            input_ids = torch.from_numpy(few.input_ids).long()
            int(self._masking.count(input_ids).sum())
            self._masking(input_ids, torch.from_numpy(few.slots))


def spend(processor: float, clock: float) -> None:
    """Add to the seconds spent."""
    spent["processor"] += processor
    spent["clock"] += clock


def start_peer(python: str, name: str, folder: Path) -> Callable[[], None] | None:
    """A peer that has read an epoch, ready to read more; None, with a sentence, where it does not run."""
    script = Path(__file__).with_name("loader_peer.py")
    log = folder / f"{name}.log"
    command = [python, str(script), name, str(folder), str(BATCH), str(BATCHES)]
    if not Path(python).exists():
        print(f"{name} is not compared: there is no {python}; `make bench` installs it")
        return None
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    asked, answers = process.stdin, process.stdout
    assert asked and answers
    if answers.readline() != "ready\n":
        reason = (log.read_text().splitlines() or ["no reason given"])[-1]
        print(f"{name} is not compared, it does not run under {python}: {reason}")
        return None

    def read() -> None:
        asked.write("\n")
        asked.flush()
        spend(*map(float, answers.readline().split()))

    return read


def tokens_stage(folder: Path, count: int) -> Artifact:
    """Rows as a committed tokens stage, and for the peers as numpy arrays beside it; made where they are missing."""
    stage = Folder(str(folder / "tokens"))
    if (manifest := read_manifest(stage)) is None:
        rng = np.random.default_rng(0)
        ids = rng.integers(4, PIECES, (count, SEQ_LEN), dtype=np.int32)
        cuts = np.sort(rng.integers(1, SEQ_LEN, (count, SEGMENTS - 1)), axis=1)
        cuts[np.arange(SEGMENTS - 1) >= rng.integers(0, SEGMENTS, (count, 1))] = SEQ_LEN
        lengths = np.diff(cuts, axis=1, prepend=0, append=SEQ_LEN).astype(np.int32)
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "input_ids.npy", ids)
        np.save(folder / "segment_lengths.npy", lengths)
        manifest = commit(PartStore(stage), ids, lengths)
    return Artifact(stage, manifest)


def commit(parts: PartStore, ids: np.ndarray, lengths: np.ndarray) -> Manifest:
    """Write the rows as shards of 107 languages, the largest a thousand times the smallest, and the manifest."""
    schema = token_schema(SEQ_LEN, TOKENIZER)
    shares = np.geomspace(1, 1000, LANGUAGES)
    ends = np.round(np.cumsum(shares) / shares.sum() * len(ids)).astype(int)
    stats = {}
    for number, (first, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        here = lengths[first:end]
        flat, offsets = here[here > 0], np.cumsum([0, *(here > 0).sum(axis=1)])
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(ids[first:end].ravel()), type=schema.field(0).type),
            pa.ListArray.from_arrays(
                pa.array(offsets, pa.int32()), pa.array(flat.astype(np.uint16)), type=schema.field(1).type
            ),
        ]
        with parts.publish(f"l{number:03d}/{shard_name(0, 1, 'train')}") as draft:
            draft.rows = write_stream(draft.sink, schema, pa.Table.from_arrays(columns, schema=schema))
        stats[f"l{number:03d}"] = {"train": {"rows": draft.rows, "tokens": draft.rows * SEQ_LEN}}
    totals = {"languages": stats, "max_seq_len": SEQ_LEN, "tokenizer_sha256": TOKENIZER}
    manifest = Manifest(Identity("tokens", 1, {}, {}, {}, {}), {}, parts.done(), totals)
    parts.folder.write("MANIFEST.json", manifest.to_json())
    return manifest


if __name__ == "__main__":
    main(*sys.argv[1:])
