"""Vocabulary training beside SentencePiece's own trainer on the sentences of the same sample.

python benchmarks/vocab.py [WORK_DIR [GLOB [SIZE [SAMPLE_MB [ROUNDS]]]]]      default: 8000 pieces of the packaged text

Every training runs in a process of its own, in turn, and tells its seconds, its processor seconds and its peak memory.
Then both vocabularies encode what follows the sample in each language with at least 20 kB of that.
"""

from __future__ import annotations

import io
import logging
import resource
import statistics
import sys
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import sentencepiece

from pipeline import configfile
from pipeline.config import VocabConfig
from pipeline.execute import run_stages
from pipeline.manifest import Part
from pipeline.stage import identities, open_artifact
from pipeline.storage import Folder
from tokenizer import pieces
from tokenizer.child import run_in_child
from tokenizer.documents import read_texts, shards_by_language, text_bytes
from tokenizer.fertility import first_texts
from tokenizer.sample import LanguageSample, quotas
from tokenizer.scores import round_scores
from tokenizer.train import Vocabulary, train
from tokenizer.unigram import trainer_options

LEAST_HELD_OUT = 20_000  # bytes

Shards = dict[str, list[Part]]


def plain(folder: Folder, shards: Shards, wanted: dict[str, int], config: VocabConfig) -> Vocabulary:
    """SentencePiece's trainer with its own seeds and defaults on the sentences themselves."""
    samples = {name: LanguageSample() for name in wanted}
    sentences = [
        sentence
        for name, sample in samples.items()
        for sentence in sample.take(chain.from_iterable(read_texts(folder, shards[name])), wanted[name])
    ]
    model = io.BytesIO()
    own = {"seed_sentencepiece_size": max(1_000_000, 4 * config.size), "num_sub_iterations": 2}
    options: dict[str, Any] = trainer_options(config) | own
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **options)
    return Vocabulary(round_scores(model.getvalue()), samples)


def measured(way: Callable[..., Vocabulary], *args: Any) -> tuple[Vocabulary, float, float, float]:
    """A vocabulary, the seconds it took, the processor seconds and the peak memory in MB."""
    began = time.perf_counter()
    made = way(*args)
    seconds, usage = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return made, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000


def held_out_tokens(processor: pieces.Processor, folder: Folder, shards: Shards, made: Vocabulary) -> dict[str, int]:
    """Pieces of the text after the sample, by language."""
    found = {}
    for language, parts in shards.items():
        texts = first_texts(read_texts(folder, parts, made.samples[language].documents))
        if sum(map(len, texts)) >= LEAST_HELD_OUT:
            found[language] = len(pieces.encode(processor, [texts])[0])
    return found


def main() -> None:
    """Compare on the corpus of a work directory."""
    logging.getLogger().setLevel(logging.ERROR)
    given = [*sys.argv[1:], *["runs/bench", "", "8000", "0.8", "1"][len(sys.argv) - 1 :]]
    work, inputs, size, sample_mb, rounds = given
    chosen = [f"corpus.inputs=['{inputs}']", "corpus.shard_mb=16"] if inputs else []
    settings = [f"vocab.size={size}", f"vocab.sample_mb={sample_mb}", "vocab.num_threads=2"]
    config = configfile.load("demo", [f"work_dir={work}", *chosen, *settings])
    run_stages(config, ["corpus"])
    corpus = open_artifact(config, identities(config, "vocab")["corpus"], "the benchmark")
    shards = shards_by_language(corpus)
    sizes = {name: text_bytes(parts) for name, parts in shards.items()}
    wanted = quotas(sizes, config.vocab.alpha, int(config.vocab.sample_mb * 1e6))
    ways = {"ours": train, "SentencePiece's trainer": plain}
    runs: dict[str, list[tuple[Vocabulary, float, float, float]]] = {name: [] for name in ways}
    for _ in range(int(rounds)):
        for name, way in ways.items():
            runs[name].append(run_in_child(measured, way, corpus.folder, shards, wanted, config.vocab))
            print(f"  {name}: {runs[name][-1][1]:.1f} s", file=sys.stderr)
    print(f"{size} pieces wanted, {sum(wanted.values()) / 1e6:.1f} MB in {len(wanted)} languages, {rounds} rounds")
    middle = {
        name: [statistics.median(column) for column in list(zip(*found, strict=True))[1:]]
        for name, found in runs.items()
    }
    processors = {name: pieces.load(found[0][0].model) for name, found in runs.items()}
    for name, (seconds, cpu, peak) in middle.items():
        print(f"{name:24} {seconds:8.1f} s {cpu:8.1f} s of processor {peak:8.0f} MB  {len(processors[name])} pieces")
    ratios = [ours / theirs for ours, theirs in zip(*middle.values(), strict=True)]
    print(
        f"ours / theirs: {ratios[0]:.2f} of the time, {ratios[1]:.2f} of the processor, {ratios[2]:.2f} of the memory"
    )
    ours, theirs = (
        held_out_tokens(processor, corpus.folder, shards, runs["ours"][0][0]) for processor in processors.values()
    )
    change = {language: ours[language] / theirs[language] - 1 for language in ours}
    order = sorted(change, key=lambda language: -change[language])
    print(f"tokens of held-out text against theirs, {len(order)} of {len(shards)} languages have enough of it:")
    print(", ".join(f"{language} {change[language]:+.2%}" for language in order))
    print(f"all: {sum(ours.values()) / sum(theirs.values()) - 1:+.2%}")


if __name__ == "__main__":
    main()
