"""Stage tokens beside bare SentencePiece and `tokenizers.encode_batch` of the same documents, on equal threads.

python benchmarks/tokens.py [WORK_DIR] [GLOB] [PIECES] [THREADS]      default: the packaged text, 8000 pieces, 1 thread

One thread is compared by CPU time, which other work on the machine does not change; more are compared by the clock.
The peers get lists of str that are in memory already, a thousand documents a call, and their results are thrown away.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer
from turns import compare

from pipeline import configfile
from pipeline.artifact import fetch
from pipeline.execute import run_stages
from pipeline.shards import open_shard
from pipeline.stage import identities, open_artifact, stage_folder
from tokenizer.documents import shards_by_language
from tokenizer.encode import SPLITS

BATCH = 1000


def main(work: str = "runs/bench", inputs: str = "", pieces: str = "8000", threads: str = "1") -> None:
    """Compare on the corpus of a work directory; its corpus and vocabulary are made where they are missing."""
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.update(RAYON_NUM_THREADS=threads, TOKENIZERS_PARALLELISM="true")
    given = [f"corpus.inputs=['{inputs}']", "corpus.shard_mb=128", "vocab.sample_mb=120"] if inputs else []
    config = configfile.load("demo", [f"work_dir={work}", f"vocab.size={pieces}", f"tokens.workers={threads}", *given])
    run_stages(config, ["corpus", "vocab"])
    found = identities(config, "tokens")
    corpus = open_artifact(config, found["corpus"], "the benchmark")
    vocab = open_artifact(config, found["vocab"], "the benchmark")
    parts = [part for shards in shards_by_language(corpus).values() for part in shards]
    texts = [text for part in parts for text in open_shard(corpus.fetch(part.path))["text"].to_pylist()]
    processor = sentencepiece.SentencePieceProcessor(model_file=vocab.fetch("spm.model"), num_threads=int(threads))
    fast = Tokenizer.from_file(vocab.fetch("tokenizer.json"))

    def stage() -> None:
        shutil.rmtree(Path(stage_folder(config, found["tokens"]).url), ignore_errors=True)
        fetch.cache_clear()  # a run of its own would check the digests of what it reads
        run_stages(config, ["tokens"])

    ours = "ours, the whole stage"
    ways: dict[str, Callable[[], object]] = {
        ours: stage,
        "SentencePiece encode(list)": lambda: _in_batches(texts, processor.encode),
        "the same, numpy arrays": lambda: _in_batches(texts, lambda batch: processor.encode(batch, out_type="numpy")),
        "tokenizers encode_batch": lambda: _in_batches(texts, fast.encode_batch),
    }
    clock = time.process_time if threads == "1" else time.perf_counter
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    compare(f"tokens, {len(processor)} pieces, {threads} thread(s)", ours, ways, megabytes, rounds=3, clock=clock)
    _print_fill(open_artifact(config, found["tokens"], "the benchmark").manifest.stats)


def _in_batches(texts: list[str], encode: Callable[[list[str]], Any]) -> None:
    for first in range(0, len(texts), BATCH):
        encode(texts[first : first + BATCH])


def _print_fill(stats: dict[str, Any]) -> None:
    """How full the rows are: over all languages, and for those below 98 %."""
    splits = [language[split] for language in stats["languages"].values() for split in SPLITS]
    filled, rows = (sum(split[key] for split in splits) for key in ("tokens", "rows"))
    print(f"rows of {stats['max_seq_len']} tokens: {filled / rows / stats['max_seq_len']:.2%} full")
    for name, language in stats["languages"].items():
        if language["fill"] < 0.98:
            print(f"  {name:8} {language['fill']:.2%} full, {language['documents']:,} documents")


if __name__ == "__main__":
    main(*sys.argv[1:])
