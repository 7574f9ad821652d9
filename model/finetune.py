"""Fine-tunes and applies a classifier of sentence pairs, in a compact loop that a kill at any moment does not change.

Whatever is random is arithmetic: the head's first weights come from the seed, an epoch's batches from (seed, epoch)
and the dropout of a step from (seed, step). A run that goes on from a checkpoint therefore computes what the
uninterrupted run computes, bit for bit on the same machine.

    plan = Plan(config, data.lengths)
    model = load_classifier(directory, config.seed)
    fine_tune(model, data, plan, parts)
    probabilities = predict(model, data, config.precision)
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from model.nli_data import LABELS, EncodedPairs
from model.rng import derive
from pipeline.artifact import fetch
from pipeline.config import XnliConfig
from pipeline.errors import PipelineError
from pipeline.stage import WORK, PartStore

CHECKPOINTS = 10
"""Checkpoints in a whole run: a kill costs at most a tenth of it."""

TOKENS_AT_ONCE = 16_384
"""Tokens scored together, padding included."""

_BATCHES_SORTED_TOGETHER = 50
_MAX_GRAD_NORM = 1.0
_NEW_PARAMETERS = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
_PROGRESS_SECONDS = 10.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Plan:
    """Which pairs each step takes and how far it moves: a function of the config and the pairs' lengths."""

    config: XnliConfig
    lengths: np.ndarray  # [pairs]

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the pairs."""
        return math.ceil(len(self.lengths) / self.config.batch_size)

    @property
    def steps(self) -> int:
        """Batches of the whole run."""
        return math.ceil(self.config.epochs * self.steps_per_epoch)

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints."""
        return math.ceil(self.steps / CHECKPOINTS)

    def batches(self, start: int) -> Iterator[tuple[int, np.ndarray]]:
        """Steps from `start` on, each with the rows of its batch."""
        for epoch in range(start // self.steps_per_epoch, math.ceil(self.config.epochs)):
            order = grouped_batches(self.lengths, self.config.batch_size, derive(self.config.seed, "order", epoch))
            for step, rows in enumerate(order, epoch * self.steps_per_epoch):
                if start <= step < self.steps:
                    yield step, rows

    def learning_rate(self, step: int) -> float:
        """Linear warm-up to `learning_rate`, then linear decay that reaches zero one step after the last."""
        warmup = math.ceil(self.config.warmup_fraction * self.steps)
        rise = (step + 1) / (warmup + 1)
        fall = (self.steps - step) / max(1, self.steps - warmup)
        return self.config.learning_rate * min(rise, fall)


def grouped_batches(lengths: np.ndarray, batch_size: int, seed: int) -> list[np.ndarray]:
    """Every row once, in random batches of similar lengths: rows are shuffled, then sorted 50 batches at a time."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=rng).numpy()
    batches: list[np.ndarray] = []
    for first in range(0, len(order), batch_size * _BATCHES_SORTED_TOGETHER):
        block = order[first : first + batch_size * _BATCHES_SORTED_TOGETHER]
        block = block[np.argsort(lengths[block], kind="stable")]
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=rng).tolist()]


@contextmanager
def deterministic() -> Iterator[None]:
    """Let torch use reproducible kernels wherever it has them; on a GPU a few operations have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def load_classifier(directory: str, seed: int) -> PreTrainedModel:
    """The exported encoder with a new three-way head, in fp32, on the GPU if there is one.

    Raises:
        PipelineError: weights of the encoder are missing in the directory, or it holds others.
    """
    torch.manual_seed(derive(seed, "head"))
    with _quiet_transformers():  # what is new in the model is checked below, not reported
        model, report = AutoModelForSequenceClassification.from_pretrained(
            directory,
            num_labels=len(LABELS),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    wrong = {*report["missing_keys"]} ^ _NEW_PARAMETERS | {*report["unexpected_keys"]} | {*report["mismatched_keys"]}
    if wrong:
        raise PipelineError(f"the exported model does not fit its config.json: {min(map(str, wrong))}; export it again")
    return model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    messages = transformers.logging
    level, bar = messages.get_verbosity(), messages.is_progress_bar_enabled()
    messages.set_verbosity_error()
    messages.disable_progress_bar()
    try:
        yield
    finally:
        messages.set_verbosity(level)
        if bar:
            messages.enable_progress_bar()


def fine_tune(model: PreTrainedModel, data: EncodedPairs, plan: Plan, parts: PartStore) -> None:
    """Train the model in place, from the newest checkpoint among the parts or from the start.

    Raises:
        PipelineError: the weights are no numbers any more.
    """
    optimizer = _optimizer(model, plan.config.weight_decay)
    start = _restore(parts, model, optimizer)
    progress = Progress("fine-tuning", "steps", plan.steps, start)
    model.train()
    for step, rows in plan.batches(start):
        loss = _train_step(model, optimizer, data, rows, plan, step)
        progress.at(step + 1, loss)
        if (step + 1) % plan.checkpoint_every == 0 or step + 1 == plan.steps:
            if not torch.isfinite(loss):
                raise PipelineError(
                    f"fine-tuning: the loss is {loss.item()} at step {step + 1}; lower xnli.learning_rate"
                )
            _save(parts, model, optimizer, step + 1)


def _train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    data: EncodedPairs,
    rows: np.ndarray,
    plan: Plan,
    step: int,
) -> Tensor:
    torch.manual_seed(derive(plan.config.seed, "dropout", step))
    ids, mask = collate(data, rows, model.device)
    labels = torch.from_numpy(data.labels[rows]).to(model.device)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=plan.config.precision == "bf16"):
        logits = model(input_ids=ids, attention_mask=mask).logits
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate(step)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def collate(data: EncodedPairs, rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, L] padded with 0 to the longest row, and their mask [B, L]."""
    lengths = data.lengths[rows]
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int64)
    ids[mask] = np.concatenate([data.ids[data.starts[row] : data.starts[row + 1]] for row in rows])
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask.astype(np.int64)).to(device)


@torch.inference_mode()
def predict(model: PreTrainedModel, data: EncodedPairs, precision: str, what: str = "scoring") -> np.ndarray:
    """Probabilities [pairs, 3] of the labels, in the order of the pairs; batches hold pairs of similar length."""
    model.eval()
    probabilities = np.zeros((len(data), len(LABELS)), np.float32)
    progress = Progress(what, "pairs", len(data))
    done = 0
    for rows in _batches_of_tokens(data.lengths):
        ids, mask = collate(data, rows, model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=ids, attention_mask=mask).logits
        probabilities[rows] = logits.float().softmax(-1).cpu().numpy()
        done += len(rows)
        progress.at(done)
    return probabilities


def _batches_of_tokens(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Rows from the longest to the shortest, as many at once as `TOKENS_AT_ONCE` allows."""
    order = np.argsort(-lengths, kind="stable")
    first = 0
    while first < len(order):
        size = max(1, TOKENS_AT_ONCE // int(lengths[order[first]]))
        yield order[first : first + size]
        first += size


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _optimizer(model: PreTrainedModel, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW that decays matrices and leaves biases and LayerNorms alone."""
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    )


def _save(parts: PartStore, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Publish weights and moments after `step` steps, then remove the checkpoints before."""
    old = list(parts.done(f"{WORK}/checkpoint-"))
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {name: parameter.detach(), f"m/{name}": state["exp_avg"], f"v/{name}": state["exp_avg_sq"]}
    path = f"{WORK}/checkpoint-{step:08d}.safetensors"
    with parts.publish_file(path) as draft:
        save_file(tensors, draft.path)
        draft.rows = step
    parts.forget(*(name for name in old if name != path))


def _restore(parts: PartStore, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint into model and optimiser; returns the steps it stands for, 0 where there is none."""
    found = parts.done(f"{WORK}/checkpoint-")
    if not found:
        return 0
    newest = found[max(found)]
    tensors = load_file(fetch(parts.folder, newest), device=str(model.device))
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[name])
        moments = {"exp_avg": tensors[f"m/{name}"], "exp_avg_sq": tensors[f"v/{name}"]}
        optimizer.state[parameter] = {"step": torch.tensor(float(newest.rows)), **moments}
    return newest.rows


class Progress:
    """A line in the log every ten seconds: how much is done, how fast, how long it will still take."""

    def __init__(self, what: str, unit: str, total: int, start: int = 0) -> None:
        self._what, self._unit, self._total, self._start = what, unit, total, start
        self._began = self._last = time.monotonic()

    def at(self, done: int, loss: Tensor | None = None) -> None:
        """Write the line if the last one is old enough."""
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        rate = (done - self._start) / (now - self._began)
        detail = "" if loss is None else f", loss {loss.item():.3f}"
        left = (self._total - done) / rate / 60
        count = f"{done} of {self._total} {self._unit}"
        _log.info("%s: %s%s, %.1f a second, %.0f min left", self._what, count, detail, rate, left)
