"""The tables of docs/scaling.md: what the paper's run needs on 8, 64 and 512 GPUs, by arithmetic.

    python benchmarks/scaling.py

Parameters, and what a forward pass keeps for the backward pass, are counted on the project's own networks without any
memory ("meta" tensors). Bytes a parameter are those of DeepSpeed's optimisers, found by counting the tensors of small
engines. Everything in capitals below is an assumption, not a measurement: no GPU has been measured yet.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from model.flops import flops_per_token
from model.rtd import Discriminator, Generator, discriminate
from pipeline import configfile

GPUS = (8, 64, 512)
GPUS_A_NODE = 8
GPU_GB = {"H100": 80, "H200": 141}
WIDE_IN_PASSING = 3
"""Matrices as wide as a feed-forward's middle that a backward pass holds beside what was kept for it."""
RESERVE_GB = 10
"""Left alone on every GPU: CUDA itself, NCCL, fragments."""
PEAK_TFLOPS = 790
"""What large dense bf16 products reach on H100 and H200, of 989."""
UTILISATIONS = (0.2, 0.3, 0.4)
NVLINK_GB_S = 450
NODE_NETWORK_GB_S = {"8 x 400 Gbit/s": 360, "1 x 100 Gbit/s": 11}
"""Nine tenths of what the cards of a node carry."""
DOLLARS_A_GPU_HOUR = 2.5
FAILURES, FAILURE_GPU_HOURS = 419, 16_384 * 54 * 24
"""Unexpected interruptions of Llama 3's pretraining (arXiv 2407.21783, section 3.3.4)."""
STALL_SECONDS = 0.5
"""That a checkpoint holds the training up."""
RESTART_SECONDS = 300
"""From a failure to the next step: the others notice, processes start, weights are read."""
STORE_GB_S = 2
"""At which all processes together write a checkpoint."""
BUCKET = 50_000_000
"""Elements of DeepSpeed's reduction buckets."""
TEXT_BYTES = 2.5e12
"""Of CC100."""
TEXT_BYTES_A_TOKEN = 5.2
"""Of multilingual text under a vocabulary of 185,778 pieces."""
BYTES_A_TOKEN = 4
TOKENS_A_CORE = 5e6
"""A second, that one core reads and masks."""

CONFIG = configfile.load("mdeberta_v3_base", ["corpus.inputs=[cc100]"])
TRAINING = CONFIG.pretrain
LENGTH = CONFIG.tokens.max_seq_len
ROWS = TRAINING.model.vocab_size or 0
STEP_TOKENS = TRAINING.global_batch * LENGTH
FLOPS = flops_per_token(TRAINING, LENGTH, ROWS)


class Networks(NamedTuple):
    """Both networks without memory, in the precision they compute in."""

    generator: Generator
    discriminator: Discriminator


@functools.cache
def networks() -> Networks:
    """The paper's."""
    with torch.device("meta"):
        generator = Generator(TRAINING.model, ROWS, ROWS - 1)
        discriminator = Discriminator(TRAINING.model, ROWS, TRAINING.embedding_sharing)
    for network in (generator, discriminator):
        network.bfloat16().deberta.encoder.attention = "fused"
    return Networks(generator, discriminator)


def size(module: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


GENERATOR, DISCRIMINATOR = (size(network) for network in networks())
PARAMETERS = GENERATOR + DISCRIMINATOR


def kept(rows: int, checkpoint_activations: bool = False) -> tuple[float, float]:
    """GB that generator and discriminator keep for their backward passes over a micro-batch of so many rows.

    The relative tables are kept once, all else by row: two counts tell.
    """
    one, two = (kept_by(count, checkpoint_activations) for count in (1, 2))
    generator, discriminator = (first + (rows - 1) * (second - first) for first, second in zip(one, two, strict=True))
    return generator, discriminator


@functools.cache
def kept_by(rows: int, checkpoint_activations: bool) -> tuple[float, float]:
    """The same, counted."""
    generator, discriminator = networks()
    for network in networks():
        network.deberta.encoder.checkpoint_activations = checkpoint_activations
    masked = math.ceil(TRAINING.mask_fraction * LENGTH)
    ids = torch.zeros(rows, LENGTH, dtype=torch.long, device="meta")
    positions = torch.zeros(rows, masked, dtype=torch.long, device="meta")
    noise = torch.zeros(rows, masked, 2, device="meta")
    sampled = positions
    first = kept_bytes(lambda: generator(ids, ids, positions, noise))
    second = kept_bytes(lambda: discriminate(generator, discriminator, ids, ids, positions, sampled))
    return first / 1e9, second / 1e9


class DropoutOfGPUs(TorchFunctionMode):
    """Dropout as GPUs compute it, whose mask takes a byte an element; without memory torch would take another way."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """`func` as it is, but for dropout."""
        named = kwargs or {}
        if func is functional.dropout:
            return torch.native_dropout(args[0], named["p"], named["training"])[0]
        return func(*args, **named)


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes of the distinct tensors that a forward pass saves, without parameters."""
    weights = {p.untyped_storage()._cdata for network in networks() for p in network.parameters()}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with DropoutOfGPUs(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    del graph
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


class States(NamedTuple):
    """GB on a GPU before any activation, and in the memory of its host."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    host: float = 0.0

    @property
    def on_gpu(self) -> float:
        """Sum over what is not on the host."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def states(gpus: int, stage: int, offload: bool = False) -> States:
    """What DeepSpeed keeps for both engines; buffers are those of one engine at work, the discriminator's."""
    whole, share, bucket = PARAMETERS / 1e9, PARAMETERS / 1e9 / gpus, 2 * BUCKET / 1e9
    if offload:
        return States(2 * whole, 0.0, 0.0, 2 * bucket, 16 * share)
    if stage == 1:  # gradients of bf16, and the fp32 copy that is reduced in one piece
        return States(2 * whole, 4 * whole, 12 * share, 2 * DISCRIMINATOR / 1e9)
    if stage == 2:
        return States(2 * whole, 4 * share, 12 * share, 2 * bucket)
    table = 2 * ROWS * TRAINING.model.hidden_size / 1e9
    return States(2 * share + table, 4 * share, 12 * share, 2 * bucket)


def peak(gpus: int, rows: int, checkpoint_activations: bool = False) -> float:
    """GB on a GPU under stage 1, in a backward pass or at the reduction after it, whichever is more."""
    wide = 2 * TRAINING.model.intermediate_size * rows * LENGTH / 1e9
    reduction = 4 * DISCRIMINATOR / 1e9
    layer = kept(rows)[1] / TRAINING.model.num_hidden_layers if checkpoint_activations else 0.0
    activations = max(kept(rows, checkpoint_activations)) + layer + WIDE_IN_PASSING * wide
    return states(gpus, 1).on_gpu + max(activations, reduction)


def largest_micro_batch(gpus: int, memory: int) -> int:
    """The largest power of two that fits and that the GPUs can share."""
    fitting = [rows for rows in powers(TRAINING.global_batch // gpus) if peak(gpus, rows) <= memory - RESERVE_GB]
    return max(fitting)


def powers(limit: int) -> list[int]:
    """1, 2, 4, ... up to 256 or a lower limit."""
    return [2**n for n in range(9) if 2**n <= limit]


def traffic(gpus: int, stage: int) -> float:
    """GB that a node (or, of one node, a GPU) sends in a step, by rings or trees that fill all links."""
    peers = gpus // GPUS_A_NODE if gpus > GPUS_A_NODE else gpus
    low = 2 * PARAMETERS / 1e9 * (peers - 1) / peers
    micro_steps = TRAINING.global_batch // gpus // largest_micro_batch(gpus, GPU_GB["H100"])
    # Gradients travel as fp32, twice the bytes of weights; an all-reduce is two passes, scattering or gathering one.
    return {1: 4 * low + low, 2: micro_steps * 2 * low + low, 3: micro_steps * 4 * low}[stage]


def talk_seconds(gpus: int, network: str, stage: int = 1) -> float:
    """Seconds a step for that traffic."""
    return traffic(gpus, stage) / (NODE_NETWORK_GB_S[network] if gpus > GPUS_A_NODE else NVLINK_GB_S)


def tokens_a_second(utilisation: float) -> float:
    """On one GPU, without communication."""
    return utilisation * PEAK_TFLOPS * 1e12 / FLOPS


def step_seconds(gpus: int, utilisation: float, network: str = "8 x 400 Gbit/s") -> float:
    """Computing and then communicating: under stage 1 nothing of the reduction is hidden behind the backward pass."""
    return STEP_TOKENS / gpus / tokens_a_second(utilisation) + talk_seconds(gpus, network)


def table(header: str, rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; columns after the first are numbers."""
    columns = header.split(" | ")
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def parameters() -> str:
    """Who has how many."""
    words = ROWS * TRAINING.model.hidden_size
    counts = [("generator", GENERATOR, words), ("discriminator", DISCRIMINATOR, words), ("both", PARAMETERS, 2 * words)]
    rows = [(name, f"{all_of_it:,}", f"{part:,}", f"{all_of_it - part:,}") for name, all_of_it, part in counts]
    return table("network | parameters | of these in its word table | rest", rows)


def work() -> str:
    """What the run computes."""
    total = STEP_TOKENS * TRAINING.steps
    row = (f"{STEP_TOKENS / 1e6:.2f}", f"{total / 1e9:,.0f}", f"{FLOPS / 1e9:.2f}", f"{FLOPS * total / 1e21:.2f}")
    return table("million tokens a step | billion tokens | GFLOP a token | ZFLOP (1e21)", [row])


def memory() -> str:
    """GB a GPU by stage."""
    rows = []
    for gpus in GPUS:
        for name, stage, offload in (("1", 1, False), ("2", 2, False), ("3", 3, False), ("2, offload", 2, True)):
            found = states(gpus, stage, offload)
            rows.append((gpus, name, *(f"{gb:.2f}" for gb in (*found[:4], found.on_gpu, found.host))))
    return table(
        "GPUs | zero_stage | weights | gradients | masters and moments | buffers | together | on the host, a GPU", rows
    )


def activations() -> str:
    """GB a GPU by micro-batch."""
    rows = []
    for count in powers(256):
        most = peak(GPUS_A_NODE, count)
        fits = [name for name, gigabytes in GPU_GB.items() if most <= gigabytes - RESERVE_GB]
        again = peak(GPUS_A_NODE, count, checkpoint_activations=True)
        networks_keep = (f"{gb:.2f}" for gb in kept(count))
        rows.append((count, *networks_keep, f"{most:.1f}", ", ".join(fits) or "none", f"{again:.1f}"))
    return table(
        "micro_batch | generator | discriminator | peak, 8 GPUs, stage 1 | fits | peak with checkpoint_activations",
        rows,
    )


def split() -> str:
    """How 8192 rows are shared."""
    rows = []
    for gpus in GPUS:
        each = TRAINING.global_batch // gpus
        best = [largest_micro_batch(gpus, gigabytes) for gigabytes in GPU_GB.values()]
        rows.append((gpus, each, *(f"{count} x {each // count}" for count in best)))
    return table("GPUs | rows a GPU | " + " | ".join(f"{name}: micro_batch x accumulation" for name in GPU_GB), rows)


def communication() -> str:
    """GB and milliseconds a step."""
    rows = []
    for gpus in GPUS:
        volume = (f"{traffic(gpus, stage):.1f}" for stage in (1, 2, 3))
        rows.append((gpus, *volume, *(f"{1e3 * talk_seconds(gpus, name):.0f}" for name in NODE_NETWORK_GB_S)))
    return table(
        "GPUs | GB, stage 1 | GB, stage 2 | GB, stage 3 | "
        + " | ".join(f"ms, stage 1, {name}" for name in NODE_NETWORK_GB_S),
        rows,
    )


def duration() -> str:
    """Days and dollars."""
    rows = []
    for gpus in GPUS:
        for share in UTILISATIONS:
            seconds = step_seconds(gpus, share)
            days = seconds * TRAINING.steps / 86_400
            speed = STEP_TOKENS / seconds / gpus
            cost = days * 24 * gpus * DOLLARS_A_GPU_HOUR
            rows.append((gpus, f"{share:.0%}", f"{speed:,.0f}", f"{seconds:.3f}", f"{days:.1f}", f"{cost:,.0f}"))
    return table("GPUs | utilisation | tokens/s a GPU | seconds a step | days | dollars", rows)


def checkpoints() -> str:
    """How often, by Young's formula, and which share of the time failures and checkpoints then cost."""
    rows = []
    gigabytes = 12 * PARAMETERS / 1e9
    for gpus in GPUS:
        step = step_seconds(gpus, 0.3)
        between = FAILURE_GPU_HOURS / FAILURES / gpus * 3600
        best = math.sqrt(2 * STALL_SECONDS * between)
        lost = [
            STALL_SECONDS / interval + (interval / 2 + RESTART_SECONDS) / between
            for interval in (TRAINING.checkpoint_every * step, best)
        ]
        sizes = (f"{gigabytes:.1f}", f"{gigabytes / gpus:.2f}", f"{gigabytes / STORE_GB_S:.0f}")
        pace = (f"{between / 3600:,.0f}", f"{best / 60:.0f}", f"{best / step:,.0f}")
        rows.append((gpus, *sizes, *pace, *(f"{share:.2%}" for share in lost)))
    return table(
        "GPUs | GB | GB a GPU | seconds to write | hours between failures | best minutes | best steps | "
        f"lost at {TRAINING.checkpoint_every:,} steps | lost at best",
        rows,
    )


def storage() -> str:
    """Sizes of text and tokens, and how much of them the run reads."""
    tokens, wanted = TEXT_BYTES / TEXT_BYTES_A_TOKEN, STEP_TOKENS * TRAINING.steps
    have, read = (f"{number * BYTES_A_TOKEN / 1e12:.1f}" for number in (tokens, wanted))
    row = (f"{TEXT_BYTES / 1e12:.1f}", f"{tokens / 1e9:,.0f}", have, f"{wanted / 1e9:,.0f}", read)
    header = "TB of text | billion tokens | TB of token shards | billion tokens that the run reads | TB that it reads"
    return table(header, [row])


def reading() -> str:
    """What loading asks of disks, network and cores at the highest utilisation."""
    rows = []
    for gpus in GPUS:
        speed = STEP_TOKENS / step_seconds(gpus, UTILISATIONS[-1])
        node = speed / (gpus // GPUS_A_NODE)
        megabytes = (f"{share * BYTES_A_TOKEN / 1e6:.0f}" for share in (node, speed))
        rows.append((gpus, f"{speed / 1e6:.1f}", *megabytes, f"{node / TOKENS_A_CORE:.2f}"))
    return table("GPUs | million tokens/s | MB/s a node | MB/s all nodes | busy cores a node", rows)


if __name__ == "__main__":
    tables = (parameters, memory, activations, split, communication, work, duration, checkpoints, storage, reading)
    print("\n\n".join(make() for make in tables))
