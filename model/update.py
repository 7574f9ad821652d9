"""One update of generator and discriminator, decoupled or joint, and what is measured on the way.

Decoupled (the paper's): two engines. The generator steps first; the discriminator then looks up the E_G which that step
has just produced. Joint: one engine over both and one clipped gradient, as `es` needs it.

A loss is a sum over tokens divided by the number of tokens of the *whole* step, over all processes and micro-batches,
so every token weighs alike however the batch is split. Random numbers are seeded for each micro-batch by its place in
the global batch, so they do not depend on the number of processes either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from model.engine import Engine, schedule
from model.rng import derive
from model.rtd import Discriminator, DiscriminatorOutput, Generator, GeneratorOutput, JointRTD, corrupt, discriminate
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError

SUMS = ("mlm_loss", "masked", "kept", "rtd_loss", "tokens", "right", "replaced", "called", "found")
"""What `tally` counts, in its order."""


class MicroBatch(NamedTuple):
    """What a process computes at once."""

    input_ids: Tensor
    """[B, L] int64"""
    segment_ids: Tensor
    """[B, L] integers, 0 where padded"""
    masked_positions: Tensor
    """[B, K] int64, -1 where a row has fewer"""
    purpose: tuple[str | int, ...]
    """Names its random numbers: ("train", step, place in the global batch)."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        input_ids, segment_ids, masked = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return MicroBatch(input_ids, segment_ids, masked, self.purpose)

    @property
    def totals(self) -> Totals:
        """Its share of what a step's losses are divided by."""
        return Totals(int((self.masked_positions >= 0).sum()), int((self.segment_ids > 0).sum()))


class Totals(NamedTuple):
    """What the losses of a step are divided by: tokens that are masked, and all that are not padding."""

    masked: int
    tokens: int


class Outcome(NamedTuple):
    """What an update tells."""

    sums: Tensor
    """Of this process, as `tally` counts them."""
    readings: dict[str, float]
    """Gradient norms and learning rates, the same on every process."""


class Update(ABC):
    """Both networks, and how one step changes them.

    Args:
        config: of the stage.
        vocab_rows: rows of the embedding tables.
        mask_id: id of [MASK].
        world: the processes.
    """

    engines: tuple[Engine, ...]
    """Made by the subclass."""

    def __init__(self, config: PretrainConfig, vocab_rows: int, mask_id: int, world: World) -> None:
        self.config, self.world = config, world
        self.generator = Generator(config.model, vocab_rows, mask_id, _weights_rng(config, "generator"))
        self.discriminator = Discriminator(
            config.model, vocab_rows, config.embedding_sharing, _weights_rng(config, "discriminator")
        )
        self.peaks = {
            "generator": config.learning_rate,
            "discriminator": config.discriminator_learning_rate or config.learning_rate,
        }

    def take(self, step: int, batches: list[MicroBatch], totals: Totals) -> Outcome:
        """Update both networks by one step.

        Args:
            step: from 0.
            batches: this process's micro-batches, on the host.
            totals: over all processes and micro-batches.

        Raises:
            PipelineError: a gradient is not finite.
        """
        factor = schedule(step, self.config.warmup_steps, self.config.steps)
        for engine in self.engines:
            engine.set_learning_rate(factor)
        self.generator.train()
        self.discriminator.train()
        sums = self._accumulate(batches, totals)
        norms = {f"{engine.name}_grad_norm": engine.gradient_norm() for engine in self.engines}
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise PipelineError(
                    f"step {step + 1}: {name} is {norm}; start a new run with a lower pretrain.learning_rate, more "
                    "pretrain.warmup_steps or pretrain.precision fp32"
                )
        rates = {f"{name}_learning_rate": peak * factor for name, peak in self.peaks.items()}
        return Outcome(sums, norms | rates)

    @abstractmethod
    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        """Send every micro-batch through both networks and their engines; the sums of `tally`."""

    @torch.no_grad()
    def measure(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The sums of `tally` over micro-batches, without dropout and without learning."""
        self.generator.eval()
        self.discriminator.eval()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            here = batch.to(self.world.device)
            mlm = self.generator(*here[:3], self._noise(here), self.config.temperature)
            rtd = discriminate(self.generator, self.discriminator, *here[:3], mlm.sampled)
            sums += tally(here, mlm, rtd)
        return sums

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """The state dicts of `generator` and `discriminator` in fp32, on rank 0. Every process has to call it."""

    def _noise(self, batch: MicroBatch) -> Tensor:
        """Seed all randomness of the generator's pass; the first draws are the noise of its samples."""
        self._seed(batch, "generator")
        return torch.rand(*batch.masked_positions.shape, 2, device=self.world.device)

    def _seed(self, batch: MicroBatch, network: str) -> None:
        torch.manual_seed(derive(self.config.seed, *batch.purpose, network))


class Decoupled(Update):
    """An engine for each network: the generator's step, then the discriminator's."""

    def __init__(self, config: PretrainConfig, vocab_rows: int, mask_id: int, world: World) -> None:
        super().__init__(config, vocab_rows, mask_id, world)
        networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.engines = tuple(
            Engine(name, network, {"": self.peaks[name]}, config, world) for name, network in networks.items()
        )

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        generator, discriminator = self.engines
        here = [batch.to(self.world.device) for batch in batches]
        drawn: list[GeneratorOutput] = []
        for batch in here:
            mlm: GeneratorOutput = generator(*batch[:3], self._noise(batch), self.config.temperature)
            generator.learn(mlm.loss_sum / totals.masked)
            drawn.append(mlm._replace(loss_sum=mlm.loss_sum.detach()))
        sums = []
        for batch, mlm in zip(here, drawn, strict=True):
            self._seed(batch, "discriminator")
            rtd: DiscriminatorOutput = discriminate(self.generator, discriminator, *batch[:3], mlm.sampled)
            discriminator.learn(rtd.loss_sum * (self.config.discriminator_weight / totals.tokens))
            sums.append(tally(batch, mlm, rtd))
        return torch.stack(sums).sum(0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Update.state`."""
        return {engine.name: engine.full_state() for engine in self.engines}


class Joint(Update):
    """One engine over both networks."""

    def __init__(self, config: PretrainConfig, vocab_rows: int, mask_id: int, world: World) -> None:
        super().__init__(config, vocab_rows, mask_id, world)
        both = JointRTD(self.generator, self.discriminator)
        peaks = {f"{name}.": peak for name, peak in self.peaks.items()}
        self.engines = (Engine("joint", both, peaks, config, world),)

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        (engine,) = self.engines
        sums = []
        for batch in batches:
            here = batch.to(self.world.device)
            mlm, rtd = engine(*here[:3], self._noise(here), self.config.temperature)
            weight = self.config.discriminator_weight / totals.tokens
            engine.learn(mlm.loss_sum / totals.masked + weight * rtd.loss_sum)
            sums.append(tally(here, mlm, rtd))
        return torch.stack(sums).sum(0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Update.state`."""
        both = self.engines[0].full_state()
        return {
            name: {key.removeprefix(f"{name}."): value for key, value in both.items() if key.startswith(f"{name}.")}
            for name in self.peaks
        }


def build(config: PretrainConfig, vocab_rows: int, mask_id: int, world: World) -> Update:
    """The networks with freshly drawn weights, and the way of updating that the config asks for."""
    return (Joint if config.joint else Decoupled)(config, vocab_rows, mask_id, world)


@torch.no_grad()
def tally(batch: MicroBatch, mlm: GeneratorOutput, rtd: DiscriminatorOutput) -> Tensor:
    """Losses and counts of a micro-batch, float64 in the order of `SUMS`; nothing here waits for the device."""
    _, replaced = corrupt(batch.input_ids, batch.masked_positions, mlm.sampled)
    called = (rtd.logits > 0) & (batch.segment_ids > 0)
    right = (called == replaced) & (batch.segment_ids > 0)
    counts = [mlm.loss_sum, mlm.tokens, mlm.tokens - replaced.sum(), rtd.loss_sum, rtd.tokens]
    counts += [part.sum() for part in (right, replaced, called, called & replaced)]
    return torch.stack([count.detach().double() for count in counts])


def readings(sums: Tensor) -> dict[str, float]:
    """Means and rates from summed `tally`s: what a line of metrics says of the two networks."""
    total = dict(zip(SUMS, sums.tolist(), strict=True))
    precision = _ratio(total["found"], total["called"])
    recall = _ratio(total["found"], total["replaced"])
    return {
        "generator_loss": _ratio(total["mlm_loss"], total["masked"]),
        "discriminator_loss": _ratio(total["rtd_loss"], total["tokens"]),
        "masked_accuracy": _ratio(total["kept"], total["masked"]),
        "replaced_accuracy": _ratio(total["right"], total["tokens"]),
        "replaced_precision": precision,
        "replaced_recall": recall,
        "replaced_f1": _ratio(2 * precision * recall, precision + recall),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _weights_rng(config: PretrainConfig, network: str) -> torch.Generator:
    return torch.Generator().manual_seed(derive(config.seed, "weights", network))
