"""The vocab stage: a SentencePiece unigram vocabulary from a language-balanced sample of the corpus.

The trainer runs in a child process: it is native code whose memory grows with the sample, and where the system kills it
for that, the stage says so with the numbers. It gets its sentences from memory and hands the model back the same way,
so no path enters the model, which embeds its trainer's settings: equal config, equal bytes.

Normalisation is the identity, because the corpus stage has brought the text to NFC already. That is what makes the ids
the same in SentencePiece and in `transformers`.
"""

from __future__ import annotations

import io
import json
import logging
import re
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import sentencepiece

from pipeline.config import VocabConfig
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import Part
from pipeline.stage import StageRun, fetch
from pipeline.storage import Folder
from tokenizer import fertility, pieces
from tokenizer.child import ChildDiedError, run_in_child
from tokenizer.documents import read_texts, shards_by_language, text_bytes
from tokenizer.huggingface import tokenizer_files
from tokenizer.sample import MAX_SENTENCE_BYTES, LanguageSample, quotas, shares
from tokenizer.scores import round_scores
from tokenizer.special import CLS_ID, PAD_ID, SEP_ID, SPECIAL_PIECES, UNK_ID

_log = logging.getLogger(__name__)

MODEL_FILE = "spm.model"
MB, GB = 1_000_000, 1_000_000_000
_TOO_FEW_PIECES = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


@dataclass(frozen=True)
class Trained:
    """A serialised SentencePiece model and what it was trained on, by language."""

    model: bytes
    samples: dict[str, LanguageSample]


def run(run: StageRun) -> None:
    """Train the vocabulary, write it for every reader and measure how it fits each language."""
    corpus, asked = run.upstream["corpus"], run.config.vocab.size
    shards = shards_by_language(corpus)
    trained = _published(run) or _train_and_publish(run, shards)
    processor = pieces.load(trained.model)
    if len(processor) < asked:
        _log.warning("vocab: %d pieces asked, the sample supports %d", asked, len(processor))
    scored = pieces.scored_pieces(processor)
    for name, data in {"spm.vocab": pieces.vocab_lines(scored), **tokenizer_files(scored)}.items():
        run.parts.publish_bytes(name, data)
    stats = {
        "pieces": len(processor),
        "mask_id": len(processor),
        "languages": {name: _fit(corpus.folder, shards[name], trained.samples[name], processor) for name in shards},
        "sampling": _sampling(shards, trained.samples),
    }
    report = {"pieces_asked": asked, **stats}
    run.parts.publish_bytes("vocab_report.json", json.dumps(report, indent=1, sort_keys=True).encode())
    run.commit(stats)


def _published(run: StageRun) -> Trained | None:
    """The model that an earlier, killed run of this stage had already trained."""
    part = run.parts.done().get(MODEL_FILE)
    if part is None:
        return None
    samples = {name: LanguageSample(**counts) for name, counts in part.stats["samples"].items()}
    return Trained(Path(fetch(run.folder, part)).read_bytes(), samples)


def _train_and_publish(run: StageRun, shards: dict[str, list[Part]]) -> Trained:
    config = run.config.vocab
    wanted = quotas(_sizes(shards), config.alpha, int(config.sample_mb * MB))
    sample_bytes, available = sum(wanted.values()), available_memory()
    require_memory(sample_bytes, available)
    _log.info("vocab: training on %.1f MB of text in %d languages", sample_bytes / MB, len(wanted))
    try:
        trained = run_in_child(train, run.upstream["corpus"].folder, shards, wanted, config)
    except (ChildDiedError, MemoryError) as error:
        end = str(error) if isinstance(error, ChildDiedError) else "was refused memory"
        raise PipelineError(
            f"vocab: the training process {end}, most likely for want of memory: "
            f"{sample_bytes / MB:.0f} MB of text need about {memory_needed(sample_bytes) / GB:.1f} GB and "
            f"{available / GB:.1f} GB was available; lower vocab.sample_mb or give the run more memory"
        ) from None
    with run.parts.publish(MODEL_FILE) as draft:
        draft.sink.write(trained.model)
        draft.stats["samples"] = {name: asdict(sample) for name, sample in trained.samples.items()}
    return trained


def train(folder: Folder, shards: dict[str, list[Part]], wanted: dict[str, int], config: VocabConfig) -> Trained:
    """Draw the sample and train on it.

    Args:
        folder: the corpus.
        shards: the shards of each language.
        wanted: bytes to take of each language.

    Raises:
        UserError: `vocab.size` is too small for the characters of the sample.
        PipelineError: the trainer failed in another way.
    """
    samples = {name: LanguageSample() for name in wanted}
    sentences = [
        sentence
        for name, sample in samples.items()
        for sentence in sample.take(chain.from_iterable(read_texts(folder, shards[name])), wanted[name])
    ]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, **_trainer_options(config)
        )
    except RuntimeError as error:
        raise _explain(str(error), config) from None
    return Trained(round_scores(model.getvalue()), samples)


def _trainer_options(config: VocabConfig) -> dict[str, Any]:
    """SentencePiece's options; every one of them is embedded in the model."""
    pad, cls, sep, unk = SPECIAL_PIECES
    return {
        "model_type": "unigram",
        "vocab_size": config.size,
        "hard_vocab_limit": False,  # a small sample gives the pieces it supports instead of an error
        "seed_sentencepiece_size": max(1_000_000, 4 * config.size),
        "character_coverage": config.character_coverage,
        "max_sentence_length": MAX_SENTENCE_BYTES,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "byte_fallback": False,  # transformers' DebertaV2Tokenizer knows none
        "num_threads": config.num_threads,
        "minloglevel": 2,
        **{"pad_id": PAD_ID, "bos_id": CLS_ID, "eos_id": SEP_ID, "unk_id": UNK_ID},
        **{"pad_piece": pad, "bos_piece": cls, "eos_piece": sep, "unk_piece": unk},
    }


def _explain(message: str, config: VocabConfig) -> PipelineError:
    if found := _TOO_FEW_PIECES.search(message):
        return UserError(
            f"vocab.size {config.size} is too small: the characters of the sample and the special pieces alone are "
            f"{found[1]}; raise vocab.size well above that or lower vocab.character_coverage"
        )
    return PipelineError(f"vocab: SentencePiece could not train: {message}")


def memory_needed(sample_bytes: int) -> int:
    """Bytes of memory that training takes at its peak, as measured on up to 100 MB of text in 107 languages."""
    return 300 * MB + 20 * sample_bytes


def require_memory(sample_bytes: int, available: int) -> None:
    """Refuse a sample that does not fit into memory.

    Raises:
        UserError: with the numbers and the sample size that fits.
    """
    needed = memory_needed(sample_bytes)
    if needed > available:
        fitting = max(1, (available - memory_needed(0)) // (20 * MB))
        raise UserError(
            f"vocab: training on {sample_bytes / MB:.0f} MB of text needs about {needed / GB:.1f} GB of memory and "
            f"{available / GB:.1f} GB is available; lower vocab.sample_mb to {fitting} or give the run more memory"
        )


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free, or less where a container's limit is lower."""
    free = psutil.virtual_memory().available
    for limit_file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit_file)
        if path.exists() and (limit := path.read_text().strip()).isdigit():
            free = min(free, int(limit) - psutil.Process().memory_info().rss)
    return int(free)


def _sizes(shards: dict[str, list[Part]]) -> dict[str, int]:
    return {name: text_bytes(parts) for name, parts in shards.items()}


def _sampling(shards: dict[str, list[Part]], samples: dict[str, LanguageSample]) -> dict[str, dict[str, float]]:
    """Each language's share of the corpus and of the sample."""
    before = shares(_sizes(shards))
    after = shares({name: sample.text_bytes for name, sample in samples.items()})
    return {name: {"share_before": before[name], "share_after": after[name]} for name in shards}


def _fit(folder: Folder, shards: list[Part], sample: LanguageSample, processor: pieces.Processor) -> dict[str, Any]:
    """How the vocabulary fits a language, on documents after the sample; where none is left, on the sample itself."""
    held_out = sample.documents < sum(part.rows for part in shards)
    texts = read_texts(folder, shards, sample.documents if held_out else 0)
    measured = fertility.measure(processor, texts)
    return {"sample_bytes": sample.text_bytes, "sample_documents": sample.documents, "held_out": held_out, **measured}
