"""One update of the networks, decoupled, joint or of a masked LM alone, and what is measured on the way.

Decoupled (the paper's): two engines. The generator steps first; the discriminator then looks up the E_G which that step
has just produced. Joint: one engine over both and one clipped gradient, as `es` needs it. Under `objective: mlm` there
is no discriminator, and the generator is as deep as the discriminator would be.

A loss is a sum over tokens divided by the number of tokens of the *whole* step, over all processes and micro-batches,
so every token weighs alike however the batch is split. Masks are seeded by sample, all other random numbers by each
micro-batch's place in the global batch, so they do not depend on the number of processes either.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.batch import SUMS, MicroBatch, Totals, tally
from model.engine import Engine, schedule
from model.hf_checkpoint import HFCheckpoint
from model.masked_lm import FIRST_PIECE, MaskedLM, MaskedLMOutput
from model.masking import Masking
from model.rng import derive
from model.rtd import Discriminator, DiscriminatorOutput, Generator, JointRTD, discriminate
from model.similarity import mean_cosine
from model.vocabulary import Vocabulary
from model.warm_start import warm_start_mlm, warm_start_rtd
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError

_ROWS_AT_ONCE = 1 << 15


class Outcome(NamedTuple):
    """What an update tells."""

    sums: Tensor
    """Of this process, as `tally` counts them."""
    readings: dict[str, float]
    """Gradient norms and learning rates, the same on every process."""


class Update(ABC):
    """The networks, and how one step changes them.

    Args:
        config: of the stage.
        vocabulary: that the rows are made of.
        masking: of the run.
        world: the processes.
        checkpoint: weights to start from; None = random ones.
    """

    engines: tuple[Engine, ...]
    networks: dict[str, nn.Module]
    """By name."""

    def __init__(
        self,
        config: PretrainConfig,
        vocabulary: Vocabulary,
        masking: Masking,
        world: World,
        checkpoint: HFCheckpoint | None = None,
    ) -> None:
        self.config, self.vocabulary, self.masking, self.world = config, vocabulary, masking, world
        self._build(checkpoint)

    @abstractmethod
    def _build(self, checkpoint: HFCheckpoint | None) -> None:
        """Make networks and engines; the engines come last, because they cast and partition the weights."""

    def _one_engine_each(self) -> tuple[Engine, ...]:
        return tuple(
            Engine(name, network, {"": self.peaks[name]}, self.config, self.world)
            for name, network in self.networks.items()
        )

    @property
    def peaks(self) -> dict[str, float]:
        """Peak learning rate of each network."""
        rate = self.config.learning_rate
        peaks = {"generator": rate, "discriminator": self.config.discriminator.learning_rate or rate}
        return {name: peaks[name] for name in self.networks}

    def take(self, step: int, batches: list[MicroBatch], totals: Totals) -> Outcome:
        """Update the networks by one step.

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
        for network in self.networks.values():
            network.train()
        sums = self._accumulate([batch.to(self.world.device) for batch in batches], totals)
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
        """Send every micro-batch, on the device, through networks and engines; the sums of `tally`."""

    @torch.no_grad()
    def measure(self, batches: Iterable[MicroBatch]) -> Tensor:
        """The sums of `tally` over micro-batches, without dropout and without learning."""
        for network in self.networks.values():
            network.eval()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.world.device)
        for batch in batches:
            sums += self._measured(batch.to(self.world.device))
        return sums

    @abstractmethod
    def _measured(self, batch: MicroBatch) -> Tensor:
        """The `tally` of one micro-batch on the device."""

    @abstractmethod
    def embedding_cosines(self) -> dict[str, float]:
        """Mean cosine of the pieces' embeddings in each network (`model.similarity`). Every process has to call it."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Each network's state dict in fp32, on rank 0. Every process has to call it."""
        return {engine.name: engine.full_state() for engine in self.engines}

    def _noise(self, batch: MicroBatch, masked_positions: Tensor) -> Tensor:
        """Seed all randomness of the generator's pass; the first draws are the noise of its samples."""
        self._seed(batch, "generator")
        return torch.rand(*masked_positions.shape, 2, device=self.world.device)

    def _seed(self, batch: MicroBatch, network: str) -> None:
        torch.manual_seed(derive(self.config.seed, *batch.purpose, network))

    def _weights_rng(self, network: str) -> torch.Generator:
        return torch.Generator().manual_seed(derive(self.config.seed, "weights", network))

    def _pieces(self) -> Iterator[Tensor]:
        """The ids of all pieces in rows [1, n]."""
        ids = torch.arange(FIRST_PIECE, self.vocabulary.mask_id, device=self.world.device)
        return (part[None] for part in ids.split(_ROWS_AT_ONCE))


class MaskedLMUpdate(Update):
    """`objective: mlm`: one engine over one masked language model."""

    def _build(self, checkpoint: HFCheckpoint | None) -> None:
        model, (rows, mask_id) = self.config.model, (self.vocabulary.rows, self.vocabulary.mask_id)
        self.generator = MaskedLM(model, model.num_hidden_layers, rows, mask_id, self._weights_rng("generator"))
        if checkpoint:
            warm_start_mlm(self.generator, checkpoint, self.config, self.vocabulary.pieces)
        self.networks = {"generator": self.generator}
        self.engines = self._one_engine_each()

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        (engine,) = self.engines
        sums = []
        for batch in batches:
            masked = self.masking(batch.input_ids, batch.slots)
            mlm: MaskedLMOutput = engine(
                *batch[:2], *masked, self._noise(batch, masked.positions), self.config.temperature
            )
            engine.learn(mlm.loss_sum / totals.masked)
            sums.append(tally(batch, masked.positions, mlm))
        return torch.stack(sums).sum(0)

    def _measured(self, batch: MicroBatch) -> Tensor:
        masked = self.masking(batch.input_ids, batch.slots)
        mlm = self.generator(*batch[:2], *masked, self._noise(batch, masked.positions), self.config.temperature)
        return tally(batch, masked.positions, mlm)

    @torch.no_grad()
    def embedding_cosines(self) -> dict[str, float]:
        """See `Update.embedding_cosines`."""
        words = self.generator.deberta.embeddings.word_embeddings
        return {"generator_embedding_cosine": mean_cosine(words(ids)[0] for ids in self._pieces())}


class RTDUpdate(Update):
    """`objective: rtd`: generator and discriminator; how they step is the subclasses' business."""

    def _build(self, checkpoint: HFCheckpoint | None) -> None:
        model, (rows, mask_id) = self.config.model, (self.vocabulary.rows, self.vocabulary.mask_id)
        self.generator = Generator(model, rows, mask_id, self._weights_rng("generator"))
        self.discriminator = Discriminator(
            model, rows, self.config.embedding_sharing, self._weights_rng("discriminator")
        )
        if checkpoint:
            warm_start_rtd(self.generator, self.discriminator, checkpoint, self.config, self.vocabulary.pieces)
        self.networks = {"generator": self.generator, "discriminator": self.discriminator}
        self.engines = self._make_engines()

    @abstractmethod
    def _make_engines(self) -> tuple[Engine, ...]:
        """The engines around the two networks, whose weights are those to start from."""

    def _measured(self, batch: MicroBatch) -> Tensor:
        positions = self.masking(batch.input_ids, batch.slots).positions
        mlm = self.generator(*batch[:2], positions, self._noise(batch, positions), self.config.temperature)
        rtd = discriminate(self.generator, self.discriminator, *batch[:2], positions, mlm.sampled)
        return tally(batch, positions, mlm, rtd)

    @torch.no_grad()
    def embedding_cosines(self) -> dict[str, float]:
        """See `Update.embedding_cosines`."""
        lookup, sharing = self.generator.word_rows, self.discriminator.deberta.embeddings.word_embeddings
        return {
            "generator_embedding_cosine": mean_cosine(lookup(ids)[0] for ids in self._pieces()),
            "discriminator_embedding_cosine": mean_cosine(sharing(ids, lookup(ids))[0] for ids in self._pieces()),
        }


class Decoupled(RTDUpdate):
    """An engine for each network: the generator's step, then the discriminator's."""

    def _make_engines(self) -> tuple[Engine, ...]:
        return self._one_engine_each()

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        generator, discriminator = self.engines
        drawn: list[tuple[Tensor, MaskedLMOutput]] = []
        for batch in batches:
            positions = self.masking(batch.input_ids, batch.slots).positions
            noise = self._noise(batch, positions)
            mlm: MaskedLMOutput = generator(*batch[:2], positions, noise, self.config.temperature)
            generator.learn(mlm.loss_sum / totals.masked)
            drawn.append((positions, mlm._replace(loss_sum=mlm.loss_sum.detach())))
        sums = []
        for batch, (positions, mlm) in zip(batches, drawn, strict=True):
            self._seed(batch, "discriminator")
            rtd: DiscriminatorOutput = discriminate(self.generator, discriminator, *batch[:2], positions, mlm.sampled)
            discriminator.learn(rtd.loss_sum * (self.config.discriminator_weight / totals.tokens))
            sums.append(tally(batch, positions, mlm, rtd))
        return torch.stack(sums).sum(0)


class Joint(RTDUpdate):
    """One engine over both networks."""

    def _make_engines(self) -> tuple[Engine, ...]:
        both = JointRTD(self.generator, self.discriminator)
        peaks = {f"{name}.": peak for name, peak in self.peaks.items()}
        return (Engine("joint", both, peaks, self.config, self.world),)

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        (engine,) = self.engines
        weight = self.config.discriminator_weight / totals.tokens
        sums = []
        for batch in batches:
            positions = self.masking(batch.input_ids, batch.slots).positions
            mlm, rtd = engine(*batch[:2], positions, self._noise(batch, positions), self.config.temperature)
            engine.learn(mlm.loss_sum / totals.masked + weight * rtd.loss_sum)
            sums.append(tally(batch, positions, mlm, rtd))
        return torch.stack(sums).sum(0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See `Update.state`."""
        both = self.engines[0].full_state()
        return {
            name: {key.removeprefix(f"{name}."): value for key, value in both.items() if key.startswith(f"{name}.")}
            for name in self.networks
        }


def way_of_updating(config: PretrainConfig) -> type[Update]:
    """The class for what the config asks for."""
    if config.objective == "mlm":
        return MaskedLMUpdate
    return Joint if config.joint else Decoupled
