"""The vocab stage: a SentencePiece unigram vocabulary from a language-balanced sample of the corpus, or one given.

The trainer runs in a child process: it is native code whose memory grows with the sample, and where the system kills it
for that, the stage says so with the numbers. It gets its sentences from memory and hands the model back the same way,
so no path enters the model, which embeds its trainer's settings: equal config, equal bytes.

Normalisation is the identity, because the corpus stage has brought the text to NFC already. That is what makes the ids
the same in SentencePiece and in `transformers`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from pipeline.artifact import fetch
from pipeline.config import VocabConfig
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import Part
from pipeline.stage import StageRun, input_files
from pipeline.storage import Folder, open_url
from tokenizer import compared, fertility, foreign, pieces
from tokenizer.aggregate import aggregate
from tokenizer.child import ChildDiedError, run_in_child
from tokenizer.documents import read_texts, shards_by_language, text_bytes
from tokenizer.huggingface import tokenizer_files
from tokenizer.sample import LanguageSample, quotas, shares
from tokenizer.scripts import count_by_script, main_script
from tokenizer.special import SPECIAL_PIECES
from tokenizer.unigram import train_unigram

_log = logging.getLogger(__name__)

MODEL_FILE = "spm.model"
MB, GB = 1_000_000, 1_000_000_000
MEMORY_PER_BYTE = 5
AGREEMENT_BYTES = 20_000  # of each language, on which a vocabulary made elsewhere is tried


@dataclass(frozen=True)
class Vocabulary:
    """A serialised SentencePiece model, and either the samples it was trained on or the file it came from."""

    model: bytes
    samples: dict[str, LanguageSample] = field(default_factory=dict)
    origin: dict[str, str] | None = None

    def sample(self, language: str) -> LanguageSample:
        """What was taken of a language; nothing where the vocabulary came from a file."""
        return self.samples.get(language, LanguageSample())


def run(run: StageRun) -> None:
    """Train the vocabulary or take the given one, write it for every reader and measure how it fits each language."""
    shards = shards_by_language(run.upstream["corpus"])
    others = _others(run)
    vocabulary = _published(run) or _make_and_publish(run, shards)
    processor = pieces.load(vocabulary.model)
    _log_size(run.config.vocab, len(processor), vocabulary)
    scored = pieces.scored_pieces(processor)
    files = {"spm.vocab": pieces.vocab_lines(scored), **tokenizer_files(scored)}
    if vocabulary.origin:
        _require_agreement(run, shards, processor, files["tokenizer.json"], vocabulary.origin["file"])
    for name, data in files.items():
        run.parts.publish_bytes(name, data)
    stats = {
        "pieces": len(processor),
        "mask_id": len(processor),
        "scripts": count_by_script([piece for piece, _ in scored[len(SPECIAL_PIECES) :]]),
        **_fits(run, shards, vocabulary, processor, others),
        "sampling": _sampling(shards, vocabulary),
        "origin": vocabulary.origin,
    }
    report = {"pieces_asked": run.config.vocab.size, **stats}
    run.parts.publish_bytes("vocab_report.json", json.dumps(report, indent=1, sort_keys=True).encode())
    run.commit(stats)


def _published(run: StageRun) -> Vocabulary | None:
    """The model that an earlier, killed run of this stage had already made."""
    part = run.parts.done().get(MODEL_FILE)
    if part is None:
        return None
    samples = {name: LanguageSample(**counts) for name, counts in part.stats["samples"].items()}
    return Vocabulary(Path(fetch(run.folder, part)).read_bytes(), samples, part.stats["origin"])


def _make_and_publish(run: StageRun, shards: dict[str, list[Part]]) -> Vocabulary:
    vocabulary = _adopt(run) if run.config.vocab.from_ else _train(run, shards)
    with run.parts.publish(MODEL_FILE) as draft:
        draft.sink.write(vocabulary.model)
        draft.stats["samples"] = {name: asdict(sample) for name, sample in vocabulary.samples.items()}
        draft.stats["origin"] = vocabulary.origin
    return vocabulary


def _adopt(run: StageRun) -> Vocabulary:
    """The vocabulary of `vocab.from`."""
    urls = input_files("vocab.from", (str(run.config.vocab.from_),), run.config)
    if len(urls) > 1:
        raise UserError(f"vocab.from: {len(urls)} files match; name one SentencePiece model")
    name, data = urls[0].rsplit("/", 1)[-1], _read(run, urls[0])
    _log.info("vocab: taken from %s, read as transformers does: no normaliser, ordinary pieces, rounded scores", name)
    return Vocabulary(foreign.adopted(data, name), origin={"file": name, "sha256": hashlib.sha256(data).hexdigest()})


def _read(run: StageRun, url: str) -> bytes:
    with open_url(url, run.config.storage_options) as file:
        return file.read()


def _require_agreement(
    run: StageRun, shards: dict[str, list[Part]], processor: pieces.Processor, tokenizer_json: bytes, name: str
) -> None:
    from tokenizers import Tokenizer

    folder = run.upstream["corpus"].folder
    texts = {
        language: fertility.first_texts(read_texts(folder, parts), AGREEMENT_BYTES)
        for language, parts in shards.items()
    }
    foreign.require_agreement(processor, Tokenizer.from_str(tokenizer_json.decode()), texts, name)


def _log_size(config: VocabConfig, size: int, vocabulary: Vocabulary) -> None:
    if vocabulary.origin and size != config.size:
        _log.warning("vocab: %s has %d pieces; vocab.size %d is not used", vocabulary.origin["file"], size, config.size)
    elif size < config.size:
        _log.warning("vocab: %d pieces asked, the sample supports %d", config.size, size)


def _train(run: StageRun, shards: dict[str, list[Part]]) -> Vocabulary:
    config = run.config.vocab
    wanted = quotas(_sizes(shards), config.alpha, int(config.sample_mb * MB))
    sample_bytes, available = sum(wanted.values()), available_memory()
    require_memory(sample_bytes, available)
    _log.info("vocab: training on %.1f MB of text in %d languages", sample_bytes / MB, len(wanted))
    try:
        return run_in_child(train, run.upstream["corpus"].folder, shards, wanted, config)
    except (ChildDiedError, MemoryError) as error:
        end = str(error) if isinstance(error, ChildDiedError) else "was refused memory"
        raise PipelineError(
            f"vocab: the training process {end}, most likely for want of memory: "
            f"{sample_bytes / MB:.0f} MB of text need about {memory_needed(sample_bytes) / GB:.1f} GB and "
            f"{available / GB:.1f} GB was available; lower vocab.sample_mb or give the run more memory"
        ) from None


def train(folder: Folder, shards: dict[str, list[Part]], wanted: dict[str, int], config: VocabConfig) -> Vocabulary:
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
    segments = aggregate(_sentences(folder, shards, wanted, samples))
    return Vocabulary(train_unigram(segments, config), samples)


def _sentences(
    folder: Folder, shards: dict[str, list[Part]], wanted: dict[str, int], samples: dict[str, LanguageSample]
) -> Iterator[bytes]:
    for name, sample in samples.items():
        yield from sample.take(chain.from_iterable(read_texts(folder, shards[name])), wanted[name])


def memory_needed(sample_bytes: int) -> int:
    """Bytes of memory that training takes at its peak, with some to spare.

    Measured with 250,000 pieces in 107 languages: 0.69 GB for 40 MB of text, 1.13 for 120 and 1.34 for 240. It grows
    with the distinct segments, which are ever fewer a megabyte.
    """
    return 600 * MB + MEMORY_PER_BYTE * sample_bytes


def require_memory(sample_bytes: int, available: int) -> None:
    """Refuse a sample that does not fit into memory.

    Raises:
        UserError: with the numbers and the sample size that fits.
    """
    needed = memory_needed(sample_bytes)
    if needed > available:
        fitting = max(1, (available - memory_needed(0)) // (MEMORY_PER_BYTE * MB))
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


def _sampling(shards: dict[str, list[Part]], vocabulary: Vocabulary) -> dict[str, dict[str, float]]:
    """Each language's share of the corpus and, where there is one, of the sample."""
    found = {name: {"share_before": share} for name, share in shares(_sizes(shards)).items()}
    if vocabulary.samples:
        for name, share in shares({name: sample.text_bytes for name, sample in vocabulary.samples.items()}).items():
            found[name]["share_after"] = share
    return found


def _fits(
    run: StageRun,
    shards: dict[str, list[Part]],
    vocabulary: Vocabulary,
    processor: pieces.Processor,
    others: dict[str, fertility.Tokenize],
) -> dict[str, Any]:
    """How the vocabulary fits each language, and how the other tokenizers do on the same texts."""
    own = compared.with_sentencepiece(processor)
    languages, beside = {}, {name: dict[str, Any]() for name in others}
    for language, parts in shards.items():
        texts, counts = _measured_texts(run.upstream["corpus"].folder, parts, vocabulary.sample(language))
        languages[language] = {**counts, **fertility.measure(own, texts), "script": main_script(_joined(texts))}
        for name, other in others.items():
            beside[name][language] = fertility.measure(other, texts)
    return {"languages": languages, "compared": beside}


def _others(run: StageRun) -> dict[str, fertility.Tokenize]:
    """The tokenizers of `vocab.compare`, by name."""
    globs = run.config.vocab.compare
    urls = input_files("vocab.compare", globs, run.config) if globs else []
    return {name: compared.load(_read(run, url), name) for name, url in compared.by_name(urls).items()}


def _measured_texts(folder: Folder, shards: list[Part], sample: LanguageSample) -> tuple[list[bytes], dict[str, Any]]:
    """Documents after the sample to measure on; where none is left, those of the sample itself."""
    held_out = sample.documents < sum(part.rows for part in shards)
    texts = fertility.first_texts(read_texts(folder, shards, sample.documents if held_out else 0))
    counts = {"sample_bytes": sample.text_bytes, "sample_documents": sample.documents, "held_out": held_out}
    return texts, counts


def _joined(texts: list[bytes]) -> str:
    return b"".join(texts).decode()
