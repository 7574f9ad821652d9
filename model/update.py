"""One update of the networks, decoupled, joint or of a masked LM alone, and what is measured on the way.

Decoupled (the paper's): two engines. The generator steps first; the discriminator then looks up the E_G which that step
has just produced. Joint: one engine over both and one clipped gradient, as `es` needs it. Under `objective: mlm` there
is no discriminator, and the generator is as deep as the discriminator would be.

A loss is a sum over tokens divided by the number of tokens of the *whole* step, over all processes and micro-batches,
so every token weighs alike however the batch is split. Masks are seeded by sample, all other random numbers by each
micro-batch's place in the global batch, so they do not depend on the number of processes either.

A step whose gradient is not finite changes nothing. Where it is the generator's, the discriminator is not asked: what
it would learn from was drawn from numbers that are none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.batch import SUMS, MicroBatch, Totals, tally
from model.engine import Engine
from model.hf_checkpoint import HFCheckpoint
from model.masked_lm import FIRST_PIECE, MaskedLM, MaskedLMOutput
from model.masking import Masking
from model.phases import Phases
from model.rng import derive
from model.rtd import Discriminator, DiscriminatorOutput, Generator, JointRTD, discriminate
from model.schedule import schedules
from model.similarity import mean_cosine
from model.vocabulary import Vocabulary
from model.warm_start import warm_start_mlm, warm_start_rtd
from model.world import World
from pipeline.config import PretrainConfig

_ROWS_AT_ONCE = 1 << 15


class Outcome(NamedTuple):
    """What an update tells."""

    sums: Tensor
    """Of this process, as `tally` counts them; without meaning where the step was skipped."""
    readings: dict[str, float]
    """Gradient norms, learning rates and loss scale, the same on every process; all are finite."""
    skipped: bool
    """Whether a gradient was not finite, so that nothing was changed."""


class Update(ABC):
    """The networks, and how one step changes them.

    Args:
        config: of the stage.
        vocabulary: that the rows are made of.
        masking: of the run.
        world: the processes.
        phases: the clock of this process.
        checkpoint: weights to start from; None = random ones.
        deepspeed: a user's DeepSpeed configuration.
    """

    engines: tuple[Engine, ...]
    networks: dict[str, MaskedLM | Discriminator]
    """By name."""

    def __init__(
        self,
        config: PretrainConfig,
        vocabulary: Vocabulary,
        masking: Masking,
        world: World,
        phases: Phases,
        checkpoint: HFCheckpoint | None,
        deepspeed: dict[str, Any],
    ) -> None:
        self.config, self.vocabulary, self.masking, self.world = config, vocabulary, masking, world
        self.phases, self._deepspeed = phases, deepspeed
        self._schedules = schedules(config)
        self._build(checkpoint)
        for network in self.networks.values():
            network.deberta.encoder.set_up(config.attention, self._compiles, config.checkpoint_activations)

    @property
    def _compiles(self) -> bool:
        if self.config.compile is None:
            return self.world.device.type == "cuda" and self.config.zero_stage < 3
        return self.config.compile

    @abstractmethod
    def _build(self, checkpoint: HFCheckpoint | None) -> None:
        """Make networks and engines; the engines come last, because they cast and partition the weights."""

    def _engine(self, name: str, module: nn.Module, prefixes: dict[str, str], max_grad_norm: float) -> Engine:
        """An engine whose parameters learn at the rates of networks: name prefix -> network."""
        rates = {prefix: self._schedules[network] for prefix, network in prefixes.items()}
        return Engine(name, module, rates, max_grad_norm, self.config, self.world, self.phases, self._deepspeed)

    def take(self, step: int, batches: list[MicroBatch], totals: Totals) -> Outcome:
        """Update the networks by one step.

        Args:
            step: from 0.
            batches: this process's micro-batches, on the host.
            totals: over all processes and micro-batches.
        """
        for engine in self.engines:
            engine.set_learning_rates(step)
        for network in self.networks.values():
            network.train()
        sums = self._accumulate([batch.to(self.world.device) for batch in batches], totals)
        readings = {f"{engine.name}_grad_norm": engine.gradient_norm() for engine in self.engines}
        skipped = not all(map(math.isfinite, readings.values()))
        readings |= {f"{name}_learning_rate": self._schedules[name].rate(step) for name in self.networks}
        if (scale := self.engines[0].loss_scale) is not None:
            readings["loss_scale"] = scale
        return Outcome(sums, {name: value for name, value in readings.items() if math.isfinite(value)}, skipped)

    @abstractmethod
    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        """Send every micro-batch, on the device, through networks and engines; the sums of `tally`."""

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[int, MicroBatch]], groups: int) -> Tensor:
        """The sums of `tally` [groups, ...] over (group, micro-batch), without dropout and without learning."""
        for network in self.networks.values():
            network.eval()
        sums = torch.zeros(groups, len(SUMS), dtype=torch.float64, device=self.world.device)
        for group, batch in batches:
            sums[group] += self._measured(batch.to(self.world.device))
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

    def _time_head(self, generator: MaskedLM) -> None:
        """Count the masked-LM head as a phase of its own: from its first layer to the end of the forward pass."""
        generator.lm_predictions.lm_head.register_forward_pre_hook(lambda *_: self.phases.begin("sampling"))
        generator.register_forward_hook(lambda *_: self.phases.begin("generator backward"))


class MaskedLMUpdate(Update):
    """`objective: mlm`: one engine over one masked language model."""

    def _build(self, checkpoint: HFCheckpoint | None) -> None:
        model, (rows, mask_id) = self.config.model, (self.vocabulary.rows, self.vocabulary.mask_id)
        self.generator = MaskedLM(model, model.num_hidden_layers, rows, mask_id, self._weights_rng("generator"))
        if checkpoint:
            warm_start_mlm(self.generator, checkpoint, self.config, self.vocabulary.pieces)
        self.networks = {"generator": self.generator}
        self._time_head(self.generator)
        self.engines = (self._engine("generator", self.generator, {"": "generator"}, self.config.max_grad_norm),)

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        (engine,) = self.engines
        sums = []
        for batch in batches:
            self.phases.begin("generator forward")
            masked = self.masking(batch.input_ids, batch.slots)
            mlm: MaskedLMOutput = engine(
                *batch[:2], *masked, self._noise(batch, masked.positions), self.config.temperature
            )
            engine.learn(mlm.loss_sum / totals.masked, last=batch is batches[-1])
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
        self._time_head(self.generator)
        self.discriminator.register_forward_pre_hook(lambda *_: self.phases.begin("discriminator forward"))
        self.discriminator.register_forward_hook(lambda *_: self.phases.begin("discriminator backward"))
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
        norm = self.config.max_grad_norm
        return (
            self._engine("generator", self.generator, {"": "generator"}, norm),
            self._engine(
                "discriminator",
                self.discriminator,
                {"": "discriminator"},
                self.config.discriminator.max_grad_norm or norm,
            ),
        )

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        generator, discriminator = self.engines
        drawn: list[tuple[Tensor, MaskedLMOutput]] = []
        for batch in batches:
            self.phases.begin("generator forward")
            positions = self.masking(batch.input_ids, batch.slots).positions
            noise = self._noise(batch, positions)
            mlm: MaskedLMOutput = generator(*batch[:2], positions, noise, self.config.temperature)
            generator.learn(mlm.loss_sum / totals.masked, last=batch is batches[-1])
            drawn.append((positions, mlm._replace(loss_sum=mlm.loss_sum.detach())))
        if not math.isfinite(generator.gradient_norm()):
            return torch.zeros(len(SUMS), dtype=torch.float64)
        sums = []
        for batch, (positions, mlm) in zip(batches, drawn, strict=True):
            self._seed(batch, "discriminator")
            rtd: DiscriminatorOutput = discriminate(self.generator, discriminator, *batch[:2], positions, mlm.sampled)
            weight = self.config.discriminator_weight / totals.tokens
            discriminator.learn(rtd.loss_sum * weight, last=batch is batches[-1])
            sums.append(tally(batch, positions, mlm, rtd))
        return torch.stack(sums).sum(0)


class Joint(RTDUpdate):
    """One engine over both networks."""

    def _make_engines(self) -> tuple[Engine, ...]:
        both = JointRTD(self.generator, self.discriminator)
        prefixes = {f"{name}.": name for name in self.networks}
        return (self._engine("joint", both, prefixes, self.config.max_grad_norm),)

    def _accumulate(self, batches: list[MicroBatch], totals: Totals) -> Tensor:
        (engine,) = self.engines
        weight = self.config.discriminator_weight / totals.tokens
        sums = []
        for batch in batches:
            self.phases.begin("generator forward")
            positions = self.masking(batch.input_ids, batch.slots).positions
            mlm, rtd = engine(*batch[:2], positions, self._noise(batch, positions), self.config.temperature)
            engine.learn(mlm.loss_sum / totals.masked + weight * rtd.loss_sum, last=batch is batches[-1])
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
