"""Stage tokens beside a bare `SentencePieceProcessor.encode` and `tokenizers.encode_batch` of the same documents.

python benchmarks/tokens.py [WORK_DIR] [GLOB]      the text to encode; default: the packaged one
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer
from turns import compare

from pipeline import configfile
from pipeline.execute import run_stages
from pipeline.shards import open_shard
from pipeline.stage import identities, open_artifact, stage_folder


def main() -> None:
    """Compare on the corpus of a work directory."""
    logging.getLogger().setLevel(logging.ERROR)
    work = sys.argv[1] if len(sys.argv) > 1 else "runs/bench"
    inputs = [f"corpus.inputs=['{sys.argv[2]}']", "corpus.shard_mb=16"] if len(sys.argv) > 2 else []
    config = configfile.load("demo", [f"work_dir={work}", "tokens.workers=1", *inputs])
    run_stages(config, ["corpus", "vocab"])
    found = identities(config, "tokens")
    corpus = open_artifact(config, found["corpus"], "the benchmark")
    vocab = open_artifact(config, found["vocab"], "the benchmark")
    texts: list[str] = []
    for part in corpus.select(suffix=".arrow"):
        if not part.path.startswith("rejects/"):
            texts += open_shard(corpus.fetch(part.path))["text"].to_pylist()
    processor = sentencepiece.SentencePieceProcessor(model_file=vocab.fetch("spm.model"))
    fast = Tokenizer.from_file(vocab.fetch("tokenizer.json"))

    def stage() -> None:
        shutil.rmtree(Path(stage_folder(config, found["tokens"]).url), ignore_errors=True)
        run_stages(config, ["tokens"])

    ways = {
        "ours, the whole stage": stage,
        "SentencePiece encode(list)": lambda: processor.encode(texts, num_threads=1),
        "tokenizers encode_batch": lambda: fast.encode_batch(texts),
    }
    compare("tokens", "ours, the whole stage", ways, sum(len(text.encode()) for text in texts) / 1e6)


if __name__ == "__main__":
    main()
