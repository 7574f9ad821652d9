"""Stage xnli: fine-tune the exported discriminator on NLI pairs and score every language of the evaluation files.

    predictions/<lang>.tsv   every scored pair: file, line, gold label, predicted label, probabilities
    results.json             accuracy with its interval for each language, their average, and all that it rests on
    results.md               the same as a table

`zero_shot` trains on English pairs alone and measures what carries over to the other languages; `translate_train_all`
trains on the pairs of every language. Finished languages and the newest checkpoint outlive a kill.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedModel

from model.finetune import Plan, deterministic, fine_tune, load_classifier, predict
from model.nli_data import LABELS, NO_LABEL, EncodedPairs, Pair, encode, is_english, read_pairs
from pipeline.artifact import Artifact
from pipeline.config import fingerprint_slice
from pipeline.errors import UserError
from pipeline.manifest import Part
from pipeline.stage import StageRun, input_files, input_identity

_Z = 1.959964  # standard normal quantile of a two-sided 95 % interval
_log = logging.getLogger(__name__)


def run(run: StageRun) -> None:
    """Train and score what is missing, write the results, commit."""
    config = run.config.xnli
    train_files, eval_files = NliFiles(run, "xnli.train"), NliFiles(run, "xnli.data")
    by_language = group_by_language(eval_files, config.max_eval_pairs)
    with deterministic(), verified_directory(run.upstream["export"]) as directory:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        found = encode(training_pairs(train_files, config.mode), tokenizer, config.max_seq_len, config.seed)
        _check_training(found, train_files, config.mode)
        training = found.shuffled(config.max_train_pairs)
        plan = Plan(config, training.lengths)
        done = run.parts.done("predictions/")
        if missing := {name: by_language[name] for name in sorted(by_language) if _path(name) not in done}:
            model = load_classifier(directory, config.seed)
            fine_tune(model, training, plan, run.parts)
            score(run, model, tokenizer, missing, training)
    results = collect_results(run, train_files, eval_files, training, plan)
    run.parts.publish_bytes("results.json", (json.dumps(results, indent=1, sort_keys=True) + "\n").encode())
    run.parts.publish_bytes("results.md", results_table(run.config.export.model_name, results).encode())
    run.commit(results)


def score(
    run: StageRun, model: PreTrainedModel, tokenizer: Any, by_language: dict[str, list[Pair]], training: EncodedPairs
) -> None:
    """Publish the predictions of each language as soon as it is done."""
    config = run.config.xnli
    for language, pairs in by_language.items():
        encoded = encode(pairs, tokenizer, config.max_seq_len, config.seed)
        probabilities = predict(model, encoded, config.precision, f"scoring {language}")
        publish_predictions(run, language, pairs, probabilities, np.isin(encoded.keys, training.keys))


# ---------------------------------------------------------------------------------------------------------------- input


class NliFiles:
    """The files of one config key in an order that depends on their names and contents alone, and what is in them."""

    def __init__(self, run: StageRun, key: str) -> None:
        urls = input_files(key, run.spec.inputs(run.config)[key], run.config)
        identities = {url: input_identity(url, run.config) for url in urls}
        self._urls = sorted(urls, key=lambda url: (identities[url].name, identities[url].sample_sha256))
        self._options = run.config.storage_options
        self.key = key
        self.contents: list[dict[str, Any]] = []

    def labelled_pairs(self) -> Iterator[Pair]:
        """Every pair with a gold label; `contents` is complete when they have all been taken."""
        self.contents = []
        for url in self._urls:
            languages, unlabelled = Counter[str](), 0
            for pair in read_pairs(url, self._options):
                if pair.label == NO_LABEL:
                    unlabelled += 1
                else:
                    languages[pair.language] += 1
                    yield pair
            name = url.rsplit("/", 1)[-1]
            self.contents.append({"name": name, "languages": dict(languages), "unlabelled": unlabelled})
            counts = ", ".join(f"{language} {count}" for language, count in sorted(languages.items()))
            _log.info("%s: %s: %s (without gold label: %d)", self.key, name, counts or "no pair", unlabelled)

    @property
    def languages(self) -> dict[str, int]:
        """Labelled pairs of each language over all files."""
        total = Counter[str]()
        for content in self.contents:
            total.update(content["languages"])
        return dict(sorted(total.items()))


def training_pairs(files: NliFiles, mode: str) -> Iterator[Pair]:
    """The pairs that the mode trains on."""
    return (pair for pair in files.labelled_pairs() if mode == "translate_train_all" or is_english(pair.language))


def _check_training(pairs: EncodedPairs, files: NliFiles, mode: str) -> None:
    if len(pairs) == 0:
        wanted = "English pair, and zero_shot trains on no other" if mode == "zero_shot" else "pair"
        found = ", ".join(files.languages) or "none"
        raise UserError(f"{files.key} holds no labelled {wanted} (languages there: {found}); add a file that does")


def group_by_language(files: NliFiles, most: int | None) -> dict[str, list[Pair]]:
    """The first `most` labelled pairs of each language.

    Raises:
        UserError: there is none.
    """
    groups: dict[str, list[Pair]] = {}
    for pair in files.labelled_pairs():
        group = groups.setdefault(pair.language, [])
        if most is None or len(group) < most:
            group.append(pair)
    if not groups:
        raise UserError(f"{files.key} holds no pair with a gold label; name files that do")
    return groups


@contextmanager
def verified_directory(artifact: Artifact) -> Iterator[str]:
    """A directory of links to the files at the root of a committed stage, each checked against its digest."""
    with tempfile.TemporaryDirectory(prefix="mdeberta-") as directory:
        for part in artifact.select():
            if "/" not in part.path:
                os.symlink(artifact.fetch(part.path), Path(directory) / part.path)
        yield directory


# --------------------------------------------------------------------------------------------------------------- output


def _path(language: str) -> str:
    return f"predictions/{language}.tsv"


def publish_predictions(
    run: StageRun, language: str, pairs: list[Pair], probabilities: np.ndarray, in_training: np.ndarray
) -> None:
    """Publish one language's predictions; the part's counts are what the results are made of.

    Args:
        probabilities: [pairs, 3].
        in_training: [pairs] bool, whether the same two sentences were trained on.
    """
    predicted = probabilities.argmax(axis=1)
    rows = ["\t".join(["file", "line", "gold", "predicted", *LABELS])]
    for pair, label, row in zip(pairs, predicted, probabilities, strict=True):
        shares = [f"{share:.4f}" for share in row]
        rows.append("\t".join([pair.file, str(pair.line), LABELS[pair.label], LABELS[label], *shares]))
    gold = np.array([pair.label for pair in pairs])
    correct = int((predicted == gold).sum())
    with run.parts.publish(_path(language)) as draft:
        draft.sink.write(("\n".join(rows) + "\n").encode())
        draft.rows = len(pairs)
        draft.stats |= {
            "correct": correct,
            "gold": _label_counts(gold),
            "predicted": _label_counts(predicted),
            "seen_in_training": int(in_training.sum()),
        }
    _log.info("xnli: %s: %d of %d pairs right", language, correct, len(pairs))


def _label_counts(labels: np.ndarray) -> dict[str, int]:
    return {name: int((labels == label).sum()) for label, name in enumerate(LABELS)}


def collect_results(
    run: StageRun, train_files: NliFiles, eval_files: NliFiles, training: EncodedPairs, plan: Plan
) -> dict[str, Any]:
    """The content of `results.json`, from the parts that are published."""
    scored = run.parts.done("predictions/")
    languages = {Path(path).stem: _language_result(part) for path, part in sorted(scored.items())}
    accuracies = [result["accuracy"] for result in languages.values()]
    seen = sum(result["seen_in_training"] for result in languages.values())
    if seen:
        _log.warning("xnli: %d scored pairs were also trained on; the results say so", seen)
    return {
        "mode": run.config.xnli.mode,
        "average": {"accuracy": round(sum(accuracies) / len(accuracies), 6), "languages": len(accuracies)},
        "chance": round(1 / len(LABELS), 6),
        "languages": languages,
        "seen_in_training": seen,
        "training": {
            "files": train_files.contents,
            "pairs": len(training),
            "labels": _label_counts(training.labels),
            "steps": plan.steps,
        },
        "evaluation": {"files": eval_files.contents, "pairs": sum(part.rows for part in scored.values())},
        "settings": fingerprint_slice(run.config.xnli),
        "model": {"name": run.config.export.model_name, "export": run.upstream["export"].manifest.identity.fingerprint},
    }


def _language_result(part: Part) -> dict[str, Any]:
    interval = [round(bound, 6) for bound in wilson_interval(part.stats["correct"], part.rows)]
    accuracy = round(part.stats["correct"] / part.rows, 6)
    return {"accuracy": accuracy, "interval_95": interval, "pairs": part.rows, **part.stats}


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a share (Wilson 1927): sound also for few pairs and near 0 or 1."""
    share, weight = correct / total, _Z**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def results_table(model_name: str, results: dict[str, Any]) -> str:
    """`results.md`."""
    training, settings = results["training"], results["settings"]
    which = "English" if results["mode"] == "zero_shot" else "labelled"
    lines = [
        f"# XNLI accuracy of {model_name}",
        "",
        f"Mode {results['mode']}: fine-tuned on {training['pairs']:,} {which} pairs in {training['steps']:,} steps of "
        f"{settings['batch_size']}, seed {settings['seed']}. Per cent correct with the 95 % Wilson interval; "
        f"chance is {results['chance']:.1%}.",
        "",
        "| language | pairs | accuracy | 95 % interval |",
        "|---|---:|---:|---:|",
    ]
    for language, result in results["languages"].items():
        low, high = (f"{100 * bound:.1f}" for bound in result["interval_95"])
        lines.append(f"| {language} | {result['pairs']:,} | {100 * result['accuracy']:.1f} | {low} to {high} |")
    lines.append(f"| **average** | | **{100 * results['average']['accuracy']:.1f}** | |")
    if results["seen_in_training"]:
        lines += ["", f"{results['seen_in_training']:,} of the scored pairs were also trained on."]
    return "\n".join(lines) + "\n"
