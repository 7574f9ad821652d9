"""How long a checkpoint holds training up, beside `torch.save` of the same state and DeepSpeed's own checkpoint.

    python benchmarks/checkpoint.py [FOLDER] [--hidden 512 --layers 12 --vocab 64000]      default: a temporary folder

The state is that of both engines: fp32 weights and both moments, 12 bytes a parameter. Ours holds training up while it
is copied; it is written, digested and committed behind the back of the next steps, and that time is printed too.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.checkpoint import Checkpoints
from model.masking import Masking
from model.phases import Phases
from model.place import settle
from model.runstate import RunState
from model.update import Decoupled
from model.vocabulary import Vocabulary
from model.world import join
from pipeline.config import PretrainConfig
from pipeline.storage import Folder

ROUNDS = 5


def networks(options: argparse.Namespace) -> tuple[Decoupled, PretrainConfig]:
    """Both engines with their optimisers' states."""
    shape = {
        "hidden_size": options.hidden,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 64,
        "intermediate_size": 4 * options.hidden,
        "generator_num_hidden_layers": options.layers // 2,
        "vocab_size": options.vocab,
    }
    config = PretrainConfig.model_validate({"model": shape, "precision": "fp32", "global_batch": 8, "micro_batch": 8})
    mask_id = options.vocab - 100
    masking = Masking(config, mask_id, np.ones(mask_id, dtype=bool))
    world = join(settle(), stall_seconds=600)
    made = Decoupled(
        config, Vocabulary(["piece"] * mask_id, options.vocab), masking, world, Phases(world.device), None, {}
    )
    return made, config


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Compare in turn, each way with the files of its round before removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    for name, default in {"layers": 12, "hidden": 512, "vocab": 64_000}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    update, config = networks(options)
    world, engines = update.world, update.engines
    state = {
        f"{engine.name}/{fragment.name}/{kind}": tensor.clone()
        for engine in engines
        for fragment in engine.fragments()
        for kind, tensor in fragment.tensors()
    }
    size = sum(tensor.nbytes for tensor in state.values()) / 1e6
    names = ("ours, stall", "ours, until committed", "torch.save", "DeepSpeed")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        place = Path(scratch)
        checkpoints = Checkpoints(Folder(scratch), world, engines, config)
        for number in range(1, ROUNDS + 2):
            began = time.perf_counter()
            stall = timed(lambda step=number: checkpoints.begin(step, RunState(), 0))
            checkpoints.commit()
            whole = time.perf_counter() - began
            plain = timed(lambda: torch.save(state, place / "state.pt"))
            theirs = timed(
                lambda: [engine._engine.save_checkpoint(str(place / "theirs"), tag=engine.name) for engine in engines]
            )
            if number > 1:  # the first one allocates
                for name, value in zip(seconds, (stall, whole, plain, theirs), strict=True):
                    seconds[name].append(value)
            else:
                print(f"first checkpoint of the run, which allocates its buffers: stall {stall:.3f} s")
            (place / "state.pt").unlink()
            shutil.rmtree(place / "theirs")
    print(f"checkpoint of {size:,.0f} MB, {ROUNDS} rounds in turn")
    for name, found in seconds.items():
        ratios = sorted(own / peer for own, peer in zip(seconds["ours, stall"], found, strict=True))
        print(
            f"{name:24} {statistics.median(found):8.3f} s ({min(found):.3f}-{max(found):.3f})   our stall is "
            f"{statistics.median(ratios):.3f} of it ({ratios[0]:.3f}-{ratios[-1]:.3f})"
        )


if __name__ == "__main__":
    main()
