"""Pretraining from the first step, or the newest checkpoint, to the committed stage: the loop of one process.

A step's rows, masks and random numbers are arithmetic on (seed, step). The only state is therefore the step, the
weights and the optimisers', and a run that was stopped anywhere goes on as if it had not been.
"""

from __future__ import annotations

import json
import logging
import signal
import time
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from model.batch import MicroBatch, Totals, readings
from model.checkpoint import Checkpoints
from model.data import HeldOut, Rows, TrainingData, read_ahead, require_tokenizer
from model.flops import flops_per_token
from model.hf_checkpoint import read_checkpoint
from model.masking import Masking
from model.metrics import MetricsLog, Speed
from model.update import Outcome, way_of_updating
from model.vocabulary import read_vocabulary
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import UserError
from pipeline.stage import StageRun
from tokenizer.words import begins_word

_log = logging.getLogger(__name__)


class Work(NamedTuple):
    """What this process does in one step."""

    batches: list[MicroBatch]
    totals: Totals
    """Of these micro-batches alone."""


class StopSignals:
    """Remembers SIGTERM or SIGINT until the step is over."""

    def __init__(self) -> None:
        self.seen = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.seen = number


class Pretraining:
    """One execution of the stage on one process.

    Args:
        run: the opened stage.
        world: the processes.

    Raises:
        UserError: the batch does not fit the processes, or the model the vocabulary or the weights to start from, or
            there is nothing to train on.
    """

    def __init__(self, run: StageRun, world: World) -> None:
        self.run, self.world, self.config = run, world, run.config.pretrain
        self.mine = micro_batches_of(self.config, world)
        tokens = run.upstream["tokens"]
        require_tokenizer(tokens, run.upstream["vocab"])
        self.data = TrainingData(tokens, self.config)
        self.held_out = HeldOut(tokens, self.data.weights, self.config.validation_rows).rows
        self.seq_len: int = tokens.manifest.stats["max_seq_len"]
        self.vocabulary = read_vocabulary(run.upstream["vocab"], self.config.model)
        self.masking = Masking(self.config, self.vocabulary.mask_id, begins_word(self.vocabulary.pieces))
        source = self.config.init.checkpoint
        checkpoint = read_checkpoint(source, run.config.storage_options) if source else None
        self.update = way_of_updating(self.config)(self.config, self.vocabulary, self.masking, world, checkpoint)
        self.checkpoints = Checkpoints(run.folder, world, self.config.keep_checkpoints)
        self.metrics = MetricsLog(run.folder, self.config) if world.is_first else None

    def execute(self) -> None:
        """Train what is left of the run, then publish and commit.

        Raises:
            SystemExit: a signal asked for the end; there is a checkpoint (143 after SIGTERM, 130 after SIGINT).
        """
        try:
            first = self._resume()
            with StopSignals() as stop:
                self._train(first, stop)
            self._publish()
        finally:
            if self.metrics:
                self.metrics.close()

    def _resume(self) -> int:
        """Continue from the newest checkpoint; the step to do next, counted from 0."""
        length = self.world.share(self.metrics.available() if self.metrics else 0)
        record = self.checkpoints.restore(self.update.engines, length)
        step = record.step if record else 0
        if self.metrics:
            self.metrics.begin(step, record.metrics_bytes if record else 0)
            described = {engine.name: engine.config for engine in self.update.engines}
            self.run.folder.write("ds_config.json", json.dumps(described, indent=1).encode())
            if record:
                _log.info("pretrain: continuing after step %d of %d", step, self.config.steps)
        return step

    def _train(self, first: int, stop: StopSignals) -> None:
        speed = Speed()
        for step, work in enumerate(read_ahead(self._work, range(first, self.config.steps)), start=first):
            totals = self._agree(step, work.totals, stop)
            outcome = self.update.take(step, work.batches, totals)
            speed.add(totals.tokens)
            self._record(step + 1, outcome, speed)
            if self._due(step + 1, self.config.checkpoint_every):
                self._checkpoint(step + 1)
            speed.skip()

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.steps

    def _work(self, step: int) -> Work:
        """Read this process's rows of a step; runs in the background, one step ahead."""
        size = self.config.micro_batch
        rows = self.data.read(step, self.mine.start * size, len(self.mine) * size)
        batches = [
            _micro_batch(rows.narrow(place * size, size), "train", step, number)
            for place, number in enumerate(self.mine)
        ]
        masked = sum(int(self.masking.count(batch.input_ids).sum()) for batch in batches)
        return Work(batches, Totals(masked, sum(int((batch.segment_ids > 0).sum()) for batch in batches)))

    def _agree(self, step: int, mine: Totals, stop: StopSignals) -> Totals:
        """The step's totals over all processes; ends the run where any of them was asked to stop."""
        asked = [int(stop.seen == number) for number in (signal.SIGTERM, signal.SIGINT)]
        masked, tokens, terminated, interrupted = self.world.sum(torch.tensor([*mine, *asked])).tolist()
        if terminated or interrupted:
            self._checkpoint(step)
            if self.world.is_first:
                _log.warning("pretrain: stopped after step %d; run the same command again to continue", step)
            raise SystemExit(128 + (signal.SIGTERM if terminated else signal.SIGINT))
        return Totals(max(1, masked), max(1, tokens))

    def _record(self, done: int, outcome: Outcome, speed: Speed) -> None:
        """Write the step's line, where one is due."""
        values: dict[str, float] = {}
        if self._due(done, self.config.log_every):
            values = readings(self.world.sum(outcome.sums)) | outcome.readings | self._timed(*speed.take())
        if self._due(done, self.config.validate_every):
            values |= self._validate()
        if self.metrics and values:
            self.metrics.write(done, values)

    def _timed(self, tokens: int, seconds: float) -> dict[str, float]:
        """What the clock says of the steps since the last line: so many tokens over all processes in so long."""
        tokens_per_second = tokens / max(seconds, 1e-9)
        flops = flops_per_token(self.config, self.seq_len, self.vocabulary.rows)
        return {
            "time": round(time.time(), 3),
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens_per_second, 1),
            "model_tflops": round(tokens_per_second * flops / self.world.size / 1e12, 3),
        }

    def _validate(self) -> dict[str, float]:
        """Measure the held-out rows, spread over the processes; always the same rows, masks and draws."""
        size, count = self.config.micro_batch, len(self.held_out.slots)
        cosines = self.update.embedding_cosines()
        if not count:
            return cosines
        numbers = range(self.world.rank, -(-count // size), self.world.size)
        batches = [_micro_batch(self.held_out.narrow(number * size, size), "validation", number) for number in numbers]
        if len(batches) < -(-count // (size * self.world.size)):
            # Under ZeRO stage 3 a forward pass needs every process, so all make as many; padding counts for nothing.
            batches.append(_padding(size, self.seq_len))
        sums = self.world.sum(self.update.measure(batches))
        return {f"validation_{key}": value for key, value in readings(sums).items()} | cosines

    def _checkpoint(self, step: int) -> None:
        length = self.world.share(self.metrics.sync() if self.metrics else 0)
        self.checkpoints.save(step, self.update.engines, length)

    def _publish(self) -> None:
        """Write the stage's parts from the weights as they are, and commit."""
        state = self.update.state()
        if self.metrics:
            parts = self.run.parts
            for network, tensors in state.items():
                with parts.publish_file(f"{network}.safetensors") as draft:
                    save_file(tensors, draft.path, metadata={"format": "pt"})
            parts.publish_bytes("model.json", json.dumps(self._description(), indent=1, sort_keys=True).encode())
            with parts.publish("losses.jsonl") as losses:
                for line in self.metrics.deterministic():
                    losses.sink.write(line)
                    losses.rows += 1
            self.run.commit({"steps": self.config.steps, "global_batch": self.config.global_batch})
        self.world.wait()

    def _description(self) -> dict[str, object]:
        return {
            "model": self.config.model.model_dump(),
            "vocab_rows": self.vocabulary.rows,
            "mask_id": self.vocabulary.mask_id,
            "objective": self.config.objective,
            "embedding_sharing": self.config.embedding_sharing,
            "max_seq_len": self.seq_len,
            "step": self.config.steps,
        }


def _micro_batch(rows: Rows, *purpose: str | int) -> MicroBatch:
    arrays = (rows.input_ids, rows.segment_ids, rows.slots)
    input_ids, segment_ids, slots = (torch.from_numpy(array) for array in arrays)
    return MicroBatch(input_ids.long(), segment_ids, slots, purpose)


def _padding(rows: int, seq_len: int) -> MicroBatch:
    ids = torch.zeros(rows, seq_len, dtype=torch.long)
    return MicroBatch(ids, ids, torch.zeros(rows, dtype=torch.long), ("padding",))


def micro_batches_of(config: PretrainConfig, world: World) -> range:
    """The numbers of this process's micro-batches within the global batch.

    Raises:
        UserError: the global batch cannot be split evenly over the processes.
    """
    whole = config.global_batch // config.micro_batch
    if whole % world.size:
        fitting = [str(size) for size in range(1, whole + 1) if whole % size == 0]
        raise UserError(
            f"pretrain.global_batch {config.global_batch} in micro-batches of {config.micro_batch} makes {whole}, "
            f"which {world.size} processes cannot share evenly; use {', '.join(fitting)} processes or another "
            "pretrain.micro_batch"
        )
    each = whole // world.size
    return range(world.rank * each, (world.rank + 1) * each)
