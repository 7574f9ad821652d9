"""Pretraining from the first step, or the newest checkpoint, to the committed stage: the loop of one process.

A step's rows, masks and random numbers are arithmetic on (seed, step). The only state is therefore the step, the
weights and the optimisers', and a handful of counts (`model.runstate`): a run that was stopped anywhere goes on as if
it had not been, also with other processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from safetensors.torch import save_file

from model.batch import Totals, readings
from model.checkpoint import Checkpoints, Record
from model.data import TrainingData, read_ahead, require_tokenizer
from model.ds_config import read_user_config
from model.engine import LossScaleError
from model.failure import CommonError
from model.feed import Feed, Work
from model.flops import flops_per_token
from model.hardware import memory_mb, peak_tflops
from model.heartbeat import Heartbeats
from model.hf_checkpoint import read_checkpoint
from model.masking import Masking
from model.metrics import MetricsLog, Speed
from model.phases import Phases
from model.runstate import RunState
from model.update import Outcome, way_of_updating
from model.vocabulary import read_vocabulary
from model.world import World
from pipeline.stage import StageRun
from tokenizer.words import begins_word

NOT_FINITE = "not_finite.json"
_BY_LANGUAGE = ("generator_loss", "masked_accuracy", "discriminator_loss", "replaced_f1")
_log = logging.getLogger(__name__)


class _Agreed(NamedTuple):
    """What all processes know of a step."""

    totals: Totals
    tokens_by_language: list[int]
    written: bool
    """Whether every process is through with its files of the pending checkpoint."""


class StopSignals:
    """Remembers a signal that asks for the end until the step is over, and what to exit with then."""

    EXIT_CODES: ClassVar = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}

    def __init__(self) -> None:
        self.seen = 0

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._note) for number in self.EXIT_CODES}
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
        watch: told what this process is at.

    Raises:
        UserError: the batch does not fit the processes, or the model the vocabulary or the weights to start from, or
            there is nothing to train on.
    """

    def __init__(self, run: StageRun, world: World, watch: Heartbeats) -> None:
        self.run, self.world, self.watch, self.config = run, world, watch, run.config.pretrain
        tokens, options = run.upstream["tokens"], run.config.storage_options
        require_tokenizer(tokens, run.upstream["vocab"])
        self.vocabulary = read_vocabulary(run.upstream["vocab"], self.config.model)
        self.data = TrainingData(tokens, self.config, self.vocabulary.rows)
        self.masking = Masking(self.config, self.vocabulary.mask_id, begins_word(self.vocabulary.pieces))
        self.feed = Feed(self.data, self.masking, self.config, world)
        self.held_out = self.feed.held_out()
        self.seq_len: int = tokens.manifest.stats["max_seq_len"]
        self.metrics = MetricsLog(run.folder, self.config, run.label) if world.is_first else None
        source, deepspeed = self.config.init.checkpoint, self.config.deepspeed
        checkpoint = read_checkpoint(source, options) if source else None
        self.phases = Phases(world.device)
        self.update = way_of_updating(self.config)(
            self.config,
            self.vocabulary,
            self.masking,
            world,
            self.phases,
            checkpoint,
            read_user_config(deepspeed, options) if deepspeed else {},
        )
        self.checkpoints = Checkpoints(run.folder, world, self.update.engines, self.config)
        self.state = RunState()
        self.busy_seconds = 0.0
        """What this process needed for itself in the last step."""
        self.stalled_seconds = 0.0
        """How long checkpoints have held training up since the last line of metrics."""

    def execute(self) -> None:
        """Train what is left of the run, then publish and commit.

        Raises:
            PipelineError: steps were not finite again and again, or the loss jumped too often.
            SystemExit: a signal asked for the end; there is a checkpoint (143 after SIGTERM, 130 after SIGINT, 0 after
                SIGUSR1).
        """
        try:
            step = self._resume()
            with StopSignals() as stop:
                while step < self.config.steps:
                    step = self._train(step, stop)
            self._save(step)
            self._commit_checkpoint()
            self._publish()
        except BaseException as error:
            self.watch.tell(error)  # first: closing the metrics may take its time
            raise
        finally:
            if self.metrics:
                self.metrics.close()

    def _resume(self) -> int:
        """Continue from the newest checkpoint; the step to do next, counted from 0."""
        self.watch.beat(0, "resume", 0.0)
        step = self._go_on_from(self.checkpoints.restore())
        if self.metrics:
            described = {engine.name: engine.config for engine in self.update.engines}
            self.run.folder.write("ds_config.json", json.dumps(described, indent=1).encode())
            if step:
                _log.info("pretrain: continuing after step %d of %d", step, self.config.steps)
        return step

    def _go_on_from(self, record: Record | None) -> int:
        """Take over what a checkpoint, of which the engines have the weights, knows besides them; its step."""
        self.state = record.state if record else RunState()
        step = record.step if record else 0
        if self.metrics:
            self.metrics.begin(step, record.metrics_bytes if record else 0)
        return step

    def _train(self, first: int, stop: StopSignals) -> int:
        """Train to the end of the run, or until a spike; the step to do next."""
        left_out, speed = self.state.slots_left_out, Speed()
        ahead = read_ahead(lambda step: self.feed.work(step, left_out), range(first, self.config.steps))
        with contextlib.closing(ahead):
            self.phases.begin("data")
            for step, work in enumerate(ahead, start=first):
                agreed = self._agree(step, work, stop)
                self.checkpoints.raise_failure()
                if agreed.written:
                    self._commit_checkpoint()
                outcome = self._take(step, work, agreed)
                speed.add(agreed.totals.tokens)
                self.busy_seconds = self.phases.settle()
                self.watch.beat(step + 1, "step", self.busy_seconds)
                self._note(step, agreed, outcome)
                if self._record(step + 1, outcome, speed):
                    return self._roll_back(step + 1)
                if self._due(step + 1, self.config.checkpoint_every):
                    self._save(step + 1)
                speed.skip()
                self.phases.begin("data")
        return self.config.steps

    def _take(self, step: int, work: Work, agreed: _Agreed) -> Outcome:
        """Update the networks.

        Raises:
            PipelineError: fp16 cannot go on.
        """
        try:
            return self.update.take(step, work.batches, agreed.totals)
        except LossScaleError:
            self.state.note_skip(True)
            self._give_up(step)

    def _due(self, done: int, every: int) -> bool:
        return done % every == 0 or done == self.config.steps

    def _agree(self, step: int, work: Work, stop: StopSignals) -> _Agreed:
        """Sums over all processes; ends the run where any of them was asked to stop."""
        asked = [int(stop.seen == number) for number in stop.EXIT_CODES]
        mine = [*work.totals, int(self.checkpoints.has_written()), *asked, *work.tokens_by_language.tolist()]
        masked, tokens, written, *rest = self.world.sum(torch.tensor(mine)).tolist()
        for code, came in zip(stop.EXIT_CODES.values(), rest, strict=False):
            if came:
                self._save(step)
                self._commit_checkpoint()
                if self.world.is_first:
                    _log.warning("pretrain: stopped after step %d; run the same command again to continue", step)
                raise SystemExit(code)
        totals = Totals(max(1, masked), max(1, tokens))
        return _Agreed(totals, rest[len(asked) :], written == self.world.size)

    def _note(self, step: int, agreed: _Agreed, outcome: Outcome) -> None:
        """Take a finished step into the run's counts.

        Raises:
            PipelineError: it was one skipped step too many.
        """
        state = self.state
        state.note_skip(outcome.skipped)
        if not outcome.skipped:
            seen = state.tokens_by_language
            for language, tokens in zip(self.data.languages, agreed.tokens_by_language, strict=True):
                seen[language] = seen.get(language, 0) + tokens
        elif state.skipped_in_a_row >= self.config.max_skipped_steps:
            self._give_up(step)

    def _give_up(self, step: int) -> NoReturn:
        """End a run whose gradients stay not finite; what was read in those steps is written down."""
        first = step + 1 - self.state.skipped_in_a_row
        if self.world.is_first:
            found = {f"step {number + 1}": self._named_samples(number) for number in range(first, step + 1)}
            self.run.folder.write(NOT_FINITE, json.dumps(found).encode())
        self.world.wait()  # whoever leaves first ends the others
        raise CommonError(
            f"the gradient was not finite in steps {first + 1} to {step + 1}; {NOT_FINITE} in the stage's directory "
            "names their samples. Start a new run with a lower pretrain.learning_rate, more pretrain.warmup_steps or "
            "pretrain.precision fp32"
        )

    def _named_samples(self, step: int) -> dict[str, list[int]]:
        """Rows of the tokens stage that a step reads, by language."""
        samples = self.feed.samples(step, self.state.slots_left_out)
        names = self.data.languages
        found = {names[number]: samples.row[samples.language == number].tolist() for number in range(len(names))}
        return {name: rows for name, rows in found.items() if rows}

    def _record(self, done: int, outcome: Outcome, speed: Speed) -> bool:
        """Write the step's line, where one is due; whether the loss has jumped."""
        values: dict[str, Any] = {"rows": self.feed.sizes.rows(done - 1), "skipped_steps": self.state.skipped_steps}
        spikes, logged = self.config.spikes, self._due(done, self.config.log_every)
        if spikes.factor:
            values["rollbacks"] = self.state.rollbacks
        if not outcome.skipped and (logged or spikes.factor):
            measured = readings(self.world.sum(outcome.sums))
            losses = {name: value for name, value in measured.items() if name.endswith("_loss")}
            if self.state.spikes(losses, spikes):
                return True
            values |= measured | outcome.readings
        if logged:
            values |= self._timed(*speed.take()) | self.phases.take()
        validates = self._due(done, self.config.validate_every)
        if validates:
            values |= self._validate(done)
        if self.metrics and (logged or validates):
            self.metrics.write(done, values)
        return False

    def _timed(self, tokens: int, seconds: float) -> dict[str, float]:
        """What the clock says of the steps since the last line: so many tokens over all processes in so long."""
        tokens_per_second = tokens / max(seconds, 1e-9)
        flops = flops_per_token(self.config, self.seq_len, self.vocabulary.rows)
        tflops = tokens_per_second * flops / self.world.size / 1e12
        peak = peak_tflops(self.world.device, self.config.precision)
        stalled, self.stalled_seconds = self.stalled_seconds, 0.0
        return {
            "time": round(time.time(), 3),
            "seconds": round(seconds, 6),
            "tokens_per_second": round(tokens_per_second, 1),
            "model_tflops": round(tflops, 3),
            "memory_mb": memory_mb(self.world.device),
            "checkpoint_seconds": round(stalled, 6),
        } | ({"utilisation": round(tflops / peak, 4)} if peak else {})

    def _validate(self, done: int) -> dict[str, Any]:
        """Measure the held-out rows, spread over the processes; always the same rows, masks and draws."""
        self.watch.beat(done, "validation", self.busy_seconds)
        values: dict[str, Any] = {"tokens_by_language": dict(self.state.tokens_by_language)}
        values |= self.update.embedding_cosines()
        if not self.held_out:
            return values
        languages = self.data.languages
        sums = self.world.sum(self.update.measure(self.held_out, len(languages)))
        values |= {f"validation_{key}": value for key, value in readings(sums.sum(0)).items()}
        measured = {name: readings(own) for name, own in zip(languages, sums, strict=True) if own.any()}
        values["validation_by_language"] = {
            name: {key: found[key] for key in _BY_LANGUAGE if key in found} for name, found in measured.items()
        }
        self.phases.discard()
        return values

    def _save(self, step: int) -> None:
        """Begin a checkpoint; the one before is committed first."""
        if step == self.checkpoints.newest:
            return
        began = time.monotonic()
        self._commit_checkpoint()
        self.watch.beat(step, "checkpoint", self.busy_seconds)
        self.checkpoints.begin(step, self.state, self.world.share(self.metrics.length if self.metrics else 0))
        self.stalled_seconds += time.monotonic() - began

    def _commit_checkpoint(self) -> None:
        """Make the pending checkpoint count, if there is one: after what it was made from is known to be sound."""
        if self.checkpoints.is_pending:
            self.data.require_verified()
            if self.metrics:
                self.metrics.sync()
            self.checkpoints.commit()

    def _roll_back(self, done: int) -> int:
        """Go back before a spike and leave out the samples that were read since; the step to do next.

        Raises:
            PipelineError: there is nothing to go back to, or the run has done so too often.
        """
        every, state = self.config.spikes.rollback_every, self.state
        target = (done - 1) // every * every
        where = f"the loss jumped at step {done}"
        if state.rollbacks == self.config.spikes.max_rollbacks:
            raise CommonError(f"{where}, after {state.rollbacks} rollbacks; start a run with a lower learning rate")
        if not target:
            raise CommonError(f"{where}, before the first checkpoint that pretrain.spikes could go back to")
        self._commit_checkpoint()
        record = self.checkpoints.restore(at_most=target)
        if record is None:
            raise CommonError(f"{where}, and no checkpoint up to step {target} can be used to go back to")
        self.checkpoints.forget_after(target)
        step = self._go_on_from(record)
        passed = self.feed.sizes.rows_before(done) - self.feed.sizes.rows_before(step)
        self.state.rollbacks, self.state.slots_left_out = state.rollbacks + 1, state.slots_left_out + passed
        if self.world.is_first:
            _log.warning("pretrain: %s; going on from step %d with other samples", where, step)
        return step

    def _publish(self) -> None:
        """Write the stage's parts from the weights as they are, and commit."""
        self.watch.beat(self.config.steps, "publish", self.busy_seconds)
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
