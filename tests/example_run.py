"""A run whose stages are committed through the stage contract with plausible counts and no real data behind them.

For what only looks at a work directory: the report and the status.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.stage import identities, open_run, stage_folder
from pipeline.stages import STAGES
from pipeline.storage import Folder

REASONS = {"dropped": ["duplicate", "too_short"], "rejected": ["invalid_utf8"]}
UNSPACED = {"th", "zh-Hans"}


def language_codes(count: int) -> list[str]:
    """The first codes of aa, ab, ac, ..., with some real ones in front."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    made_up = (a + b for a in letters for b in letters)
    return (["en", "de", "th", "zh-Hans", "sw"] + [code for code in made_up if code not in {"en", "de", "th", "sw"}])[
        :count
    ]


def make_config(root: Path, steps: int = 200, **sections: Any) -> Config:
    """A config whose input files exist; sections are given as for `Config`."""
    (root / "in").mkdir(parents=True, exist_ok=True)
    for name in ("en.txt", "pairs.tsv"):
        (root / "in" / name).write_text("Text.\n", encoding="utf-8")
    pairs = [str(root / "in" / "pairs.tsv")]
    defaults: dict[str, Any] = {
        "work_dir": str(root / "work"),
        "corpus": {"inputs": [str(root / "in" / "*.txt")]},
        "xnli": {"data": pairs, "train": pairs},
        "pretrain": {"steps": steps, "global_batch": 64},
    }
    return Config(**defaults | sections)


def corpus_stats(codes: list[str]) -> dict[str, Any]:
    """Counts of documents that balance; languages get smaller and smaller."""
    languages, inputs = {}, {}
    for index, code in enumerate(codes):
        read = max(1, round(90_000 / (index + 1) ** 1.7))
        dropped = {"duplicate": read // 10, "too_short": read // 40}
        rejected = {"invalid_utf8": read // 200}
        kept = read - sum(dropped.values()) - sum(rejected.values())
        counts = {"documents_in": read, "kept": kept, "dropped": dropped, "rejected": rejected}
        languages[code] = {**counts, "text_bytes": 3001 * kept + index, "chars": 2003 * kept}
        inputs[f"{code}.txt.xz"] = counts
    totals: dict[str, Any] = {
        key: sum(counts[key] for counts in languages.values())
        for key in ("documents_in", "kept", "text_bytes", "chars")
    }
    for outcome, reasons in REASONS.items():
        totals[outcome] = {reason: sum(c[outcome][reason] for c in languages.values()) for reason in reasons}
    return {"languages": languages, "inputs": inputs, "totals": totals}


def vocab_stats(codes: list[str]) -> dict[str, Any]:
    """Shares of corpus and sample, and how the vocabulary fits."""
    sizes = {code: counts["text_bytes"] for code, counts in corpus_stats(codes)["languages"].items()}
    smooth = {code: size**0.3 for code, size in sizes.items()}
    sampling = {
        code: {"share_before": sizes[code] / sum(sizes.values()), "share_after": smooth[code] / sum(smooth.values())}
        for code in codes
    }
    languages = {
        code: {
            "sample_bytes": round(1e8 * sampling[code]["share_after"]),
            "unit": "character" if code in UNSPACED else "word",
            "fertility": 0.6173 if code in UNSPACED else round(1.2 + 0.0137 * index, 4),
            "unknown_rate": round(1e-5 * (index % 7), 6),
            "bytes_per_token": round(3.1 + 0.0111 * index, 4),
        }
        for index, code in enumerate(codes)
    }
    return {"pieces": 8123, "mask_id": 8123, "languages": languages, "sampling": sampling}


def tokens_stats(codes: list[str]) -> dict[str, Any]:
    """Rows and tokens of both splits."""
    languages = {}
    for index, code in enumerate(codes):
        tokens = max(130, round(7_654_321 / (index + 1) ** 1.7))
        rows = math.ceil(tokens / 490)
        languages[code] = {
            "documents": 7 + index,
            "train": {"rows": rows, "tokens": tokens},
            "validation": {"rows": 1 + index % 3, "tokens": 101 + index},
            "fill": round(tokens / (512 * rows), 6),
        }
    return {"languages": languages, "max_seq_len": 512}


def log_lines(
    steps: int, objective: str = "rtd", codes: list[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a training run logs: the lines of `losses.jsonl`, and those of `metrics.jsonl`, which also know the time.

    With languages, also what is logged of each, how the time was spent, and what went wrong.
    """
    losses, metrics = [], []
    cosines = {"generator_embedding_cosine": 0.45, "discriminator_embedding_cosine": 0.29}
    for step in range(1, steps + 1):
        done = step / steps
        line: dict[str, Any] = {
            "step": step,
            "generator_loss": 2.0 + 7.0 * math.exp(-5 * done) + 0.1 * math.sin(step),
            "discriminator_loss": 0.15 + 0.4 * math.exp(-4 * done) + 0.01 * math.cos(step),
            "masked_accuracy": 0.6 * (1 - math.exp(-4 * done)),
            "replaced_accuracy": 0.86 + 0.1 * done,
            "replaced_f1": 0.8 * (1 - math.exp(-6 * done)),
            "generator_learning_rate": 5e-4 * (1 - done),
            "discriminator_learning_rate": 3e-4 * (1 - done),
            "generator_grad_norm": 1.0 + math.exp(-9 * done),
            "generator_loss_hex": "0x1.0p+1",
        }
        if step % max(1, steps // 10) == 0:
            line |= {
                f"validation_{key}": line[key] + 0.01 for key in ("generator_loss", "discriminator_loss", "replaced_f1")
            }
            line |= {key: value * (1 - math.exp(-3 * done)) for key, value in cosines.items()}
            line |= by_language(line, codes) if codes else {}
        if objective == "mlm":
            line = without_discriminator(line)
        if codes:
            line |= {"rows": 64, "skipped_steps": 3 * (step > 7), "rollbacks": int(step > 90)}
        losses.append(line)
        clock = {"time": 1e9 + step, "seconds": 1.25, "tokens_per_second": 50_000.0 + step, "model_tflops": 11.5}
        clock |= machine(objective) if codes else {}
        metrics.append({**line, **clock})
    return losses, metrics


def by_language(line: dict[str, Any], codes: list[str]) -> dict[str, Any]:
    """Tokens seen and held-out measures of each language; those of the later languages are worse."""
    names = ("generator_loss", "masked_accuracy", "discriminator_loss", "replaced_f1")
    return {
        "tokens_by_language": {code: 1000 * line["step"] // (index + 1) for index, code in enumerate(codes)},
        "validation_by_language": {
            code: {name: line[name] * (1 + (0.1 if name.endswith("loss") else -0.005) * index) for name in names}
            for index, code in enumerate(codes)
        },
    }


def machine(objective: str) -> dict[str, float]:
    """How a step's 1.25 seconds were spent, and on what."""
    phases = {"data": 0.05, "generator": 0.25, "sampling": 0.125, "discriminator": 0.5, "optimizer": 0.2}
    if objective == "mlm":
        del phases["discriminator"]
    return {"utilisation": 0.4125, "memory_mb": 71_234.5} | {f"{name}_seconds": spent for name, spent in phases.items()}


def without_discriminator(readings: dict[str, Any]) -> dict[str, Any]:
    """What of some readings, nested ones too, a masked language model logs."""
    return {
        name: without_discriminator(value) if isinstance(value, dict) else value
        for name, value in readings.items()
        if not re.search("discriminator|replaced", name)
    }


def xnli_results(mode: str = "zero_shot") -> dict[str, Any]:
    """Scores of three languages."""
    scores = {"en": 0.8123, "de": 0.7519, "sw": 0.6607}
    languages = {
        code: {"accuracy": score, "interval_95": [score - 0.0213, score + 0.0217], "pairs": 1501 + index}
        for index, (code, score) in enumerate(scores.items())
    }
    return {
        "mode": mode,
        "average": {"accuracy": round(sum(scores.values()) / 3, 6), "languages": 3},
        "chance": 0.333333,
        "languages": languages,
        "seen_in_training": 17,
        "training": {"pairs": 9001, "steps": 283},
    }


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def commit(config: Config, stage: str, stats: dict[str, Any], files: dict[str, bytes]) -> None:
    """Run a stage that publishes these files and commits these statistics, and leave the log of its execution."""
    with open_run(STAGES[stage], config) as run:
        assert run is not None
        for path, data in files.items():
            run.parts.publish_bytes(path, data)
        run.commit(stats)
    record = {"outcome": "finished", "seconds": 754.0, "peak_memory_mb": 1234.5}
    name = f"{stage}-{run.identity.fingerprint}-20261101T000000.json"
    Folder(config.work_dir, config.storage_options).write(f"logs/{name}", json.dumps(record).encode())


def directory(config: Config, stage: str) -> Folder:
    """Where a stage of the config lives."""
    return stage_folder(config, identities(config, stage)[stage])


def commit_upstream(config: Config, codes: list[str]) -> None:
    """Commit the stages that pretrain reads."""
    commit(config, "corpus", corpus_stats(codes), {f"{code}/data-00000-of-00001.arrow": b"rows" for code in codes[:5]})
    commit(config, "vocab", vocab_stats(codes), {"spm.model": b"pieces"})
    commit(config, "tokens", tokens_stats(codes), {f"{code}/train-00000-of-00001.arrow": b"rows" for code in codes[:5]})


def commit_pretrain(config: Config, losses: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> None:
    """Commit a training run that logged these lines."""
    commit(config, "pretrain", {"steps": config.pretrain.steps}, {"losses.jsonl": jsonl(losses)})
    directory(config, "pretrain").write("metrics.jsonl", jsonl(metrics))


def commit_all(config: Config, codes: list[str]) -> None:
    """Commit all six stages."""
    commit_upstream(config, codes)
    commit_pretrain(config, *log_lines(config.pretrain.steps, config.pretrain.objective, codes))
    exported = {"parameters": {"model.safetensors": 278_218_752}, "dtype": "float32", "step": config.pretrain.steps}
    commit(config, "export", exported, {"model.safetensors": b"weights", "config.json": b"{}"})
    commit(config, "xnli", xnli_results(), {"results.json": json.dumps(xnli_results()).encode()})
