"""What a process computes in a step: its micro-batches of the step's rows, and of the rows that a run is measured on.

The rows of a step are cut into micro-batches in the order of their slots, and these are shared out in equal stretches.
Where there are fewer than the processes need to be equally busy, as under a batch warm-up, the rest are padding: rows
without a token count for nothing, and every process makes as many passes, which ZeRO's stage 3 needs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from model.batch import MicroBatch, Totals
from model.data import Rows, TrainingData
from model.masking import Masking
from model.order import Ints, Samples
from model.schedule import BatchSizes
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import UserError


class Work(NamedTuple):
    """What this process does in one step."""

    batches: list[MicroBatch]
    totals: Totals
    """Of these micro-batches alone."""
    tokens_by_language: Ints
    """Likewise, in the order of `TrainingData.languages`."""


class Feed:
    """Deals out the work of one process.

    Args:
        data: all rows.
        masking: says how many tokens of a row are masked.
        config: of the stage.
        world: the processes.

    Raises:
        UserError: the global batch cannot be split evenly over the processes.
    """

    def __init__(self, data: TrainingData, masking: Masking, config: PretrainConfig, world: World) -> None:
        require_fitting(config, world.size)
        self.sizes = BatchSizes(config)
        self.data, self.masking, self._config, self._world = data, masking, config, world

    def work(self, step: int, slots_left_out: int) -> Work:
        """This process's share of a step, from 0, of a run that left so many slots out."""
        size = self._config.micro_batch
        rows = self.sizes.rows(step)
        each = -(-rows // (size * self._world.size))
        first = self._world.rank * each * size
        found = self._read(step, slots_left_out, first, min(each * size, max(0, rows - first)))
        numbers = range(self._world.rank * each, (self._world.rank + 1) * each)
        batches = [
            _micro_batch(found.narrow(place * size, size), size, "train", step, number)
            for place, number in enumerate(numbers)
        ]
        masked = sum(int(self.masking.count(batch.input_ids).sum()) for batch in batches)
        tokens = np.bincount(
            found.languages, (found.segment_ids > 0).sum(1), minlength=len(self.data.languages)
        ).astype(np.int64)
        return Work(batches, Totals(masked, int(tokens.sum())), tokens)

    def samples(self, step: int, slots_left_out: int) -> Samples:
        """All samples of a step, over all processes."""
        return self.data.samples(self.sizes.rows_before(step) + slots_left_out, self.sizes.rows(step))

    def held_out(self) -> list[tuple[int, MicroBatch]]:
        """This process's share of the held-out rows: (language, micro-batch of it alone); as many for every process."""
        size, world = self._config.micro_batch, self._world
        rows = self.data.held_out(self._config.validation_rows)
        cut: list[tuple[int, MicroBatch]] = []
        for language in np.unique(rows.languages).tolist():
            mine = Rows(*(array[rows.languages == language] for array in rows))
            for first in range(0, len(mine.slots), size):
                batch = _micro_batch(mine.narrow(first, size), size, "validation", len(cut))
                cut.append((language, batch))
        while len(cut) % world.size:
            cut.append((0, _micro_batch(rows.narrow(0, 0), size, "padding")))
        return cut[world.rank :: world.size]

    def _read(self, step: int, slots_left_out: int, first: int, count: int) -> Rows:
        return self.data.read(self.sizes.rows_before(step) + slots_left_out + first, count)


def _micro_batch(rows: Rows, size: int, *purpose: str | int) -> MicroBatch:
    """Rows, filled up with padding to `size` of them: shapes never change."""
    missing = size - len(rows.slots)
    arrays = [rows.input_ids, rows.segment_ids, rows.slots]
    if missing:
        arrays = [np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for array in arrays]
    input_ids, segment_ids, slots = map(torch.from_numpy, arrays)
    return MicroBatch(input_ids.long(), segment_ids, slots, purpose)


def require_fitting(config: PretrainConfig, processes: int) -> None:
    """Refuse a number of processes that cannot share the global batch evenly.

    Raises:
        UserError: naming the numbers that can.
    """
    whole = config.global_batch // config.micro_batch
    if whole % processes:
        fitting = [str(size) for size in range(1, whole + 1) if whole % size == 0]
        raise UserError(
            f"pretrain.global_batch {config.global_batch} in micro-batches of {config.micro_batch} makes {whole}, "
            f"which {processes} processes cannot share evenly; use {', '.join(fitting)} processes or another "
            "pretrain.micro_batch"
        )
