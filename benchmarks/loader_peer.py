"""One peer of `loader.py`, in a process and with packages of its own: it keeps the same rows its way and reads batches.

python benchmarks/loader_peer.py streaming|litdata FOLDER ROWS_A_BATCH BATCHES

FOLDER holds the rows as numpy arrays (`tokens_stage` of `loader.py`); the peer's own copy is made beside them once.
Every line on standard input asks for so many batches; the answer is the processor's and the clock's seconds for them.
The first batch of an epoch, before which the peers prepare it, is not counted.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def streaming(folder: Path, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """MosaicML streaming as its guide has it: MDS shards of numpy arrays, its data loader, default shuffling."""
    from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

    target = folder / "streaming"
    if not (target / "index.json").exists():
        ids, lengths = stored(folder)
        columns = {"input_ids": f"ndarray:int32:{ids.shape[1]}", "segment_lengths": f"ndarray:int32:{lengths.shape[1]}"}
        with MDSWriter(out=str(target), columns=columns) as out:
            for row in range(len(ids)):
                out.write({"input_ids": ids[row], "segment_lengths": lengths[row]})
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=batch)

    def collate(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        ids, lengths = (np.stack([row[key] for row in rows]) for key in ("input_ids", "segment_lengths"))
        return torch.from_numpy(ids), segments(lengths, ids.shape[1])

    while True:
        yield from StreamingDataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True, collate_fn=collate)


def litdata(folder: Path, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """LitData as its guide has it for pretraining: token chunks, a block a row, its data loader, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    target = folder / "litdata"
    ids, lengths = stored(folder)
    width, block = ids.shape[1], ids.shape[1] + lengths.shape[1]
    if not (target / "index.json").exists():
        starts = list(range(0, len(ids), 4096))
        optimize(
            fn=partial(blocks, folder),
            inputs=starts,
            output_dir=str(target),
            chunk_bytes="64MB",
            num_workers=1,
            item_loader=TokensLoader(),
        )
    dataset = StreamingDataset(str(target), item_loader=TokensLoader(block_size=block), shuffle=True, drop_last=True)

    def collate(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        found = torch.stack(rows)
        return found[:, :width], segments(found[:, width:].numpy(), width)

    while True:
        yield from StreamingDataLoader(dataset, batch_size=batch, num_workers=0, drop_last=True, collate_fn=collate)


def blocks(folder: Path, first: int) -> Iterator[Tensor]:
    """Ids and segment lengths of 4,096 rows, one after the other in a tensor each."""
    ids, lengths = stored(folder)
    for row in range(first, min(first + 4096, len(ids))):
        yield torch.from_numpy(np.concatenate([ids[row], lengths[row]]))


def stored(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The ids [N, L] and the segment lengths [N, S], 0 where a row has fewer, both int32."""
    return np.load(folder / "input_ids.npy", mmap_mode="r"), np.load(folder / "segment_lengths.npy", mmap_mode="r")


def segments(lengths: np.ndarray, width: int) -> Tensor:
    """The segment of every token, from the lengths [B, S] of the segments of full rows."""
    numbers = np.broadcast_to(np.arange(1, lengths.shape[1] + 1, dtype=np.int32), lengths.shape)
    return torch.from_numpy(np.repeat(numbers.ravel(), lengths.ravel()).reshape(len(lengths), width))


def main(peer: str, folder: str, rows: str, count: str) -> None:
    """Read one epoch, say so, then read another for every line on standard input and answer with its seconds."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the libraries' own messages do not go between the answers
    torch.set_num_threads(1)
    batches = {"streaming": streaming, "litdata": litdata}[peer](Path(folder), int(rows))
    per_epoch = len(stored(Path(folder))[0]) // int(rows)
    read_epoch(batches, per_epoch, int(count))
    print("ready", file=answers)
    for _ in sys.stdin:
        print(*read_epoch(batches, per_epoch, int(count)), file=answers)


def read_epoch(batches: Iterator[tuple[Tensor, Tensor]], per_epoch: int, count: int) -> tuple[float, float]:
    """The processor's and the clock's seconds for `count` batches in the middle of an epoch."""
    next(batches)
    used, began = time.process_time(), time.perf_counter()
    for _ in range(count):
        input_ids, segment_ids = next(batches)
    seconds = time.process_time() - used, time.perf_counter() - began
    assert input_ids.shape == segment_ids.shape
    for _ in range(per_epoch - count - 1):
        next(batches)
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
