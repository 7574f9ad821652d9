"""The stage's Beam counters are what its stats say, so that a cluster's own pages show them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import apache_beam
import pytest
from apache_beam.metrics import MetricsFilter

from pipeline import configfile
from pipeline.beam import COUNTERS
from pipeline.execute import run_stages


@pytest.mark.parametrize("workers", [1, 2])
def test_the_counters_of_the_corpus_are_its_stats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """On a cluster they are what its own pages show."""
    results: list[Any] = []
    run = apache_beam.Pipeline.run

    def remember(pipeline: Any) -> Any:
        results.append(run(pipeline))
        return results[-1]

    monkeypatch.setattr(apache_beam.Pipeline, "run", remember)
    (tmp_path / "en.txt").write_bytes(
        b"Same text twice.\n\nSame text twice.\n\nAnother.\n\n\xff\xfe\n\nThe last one of them all.\n\n"
    )
    config = configfile.load(
        "demo",
        [
            f"work_dir={tmp_path}/work",
            f"corpus.inputs=['{tmp_path}/en.txt', 'package://demo/corpus/sw.txt.xz']",
            f"corpus.workers={workers}",
            "corpus.chunk_mb=0.02",
            "corpus.min_chars=12",
        ],
    )
    run_stages(config, ["corpus"])
    (stats,) = (tmp_path / "work" / "corpus").glob("*/stats.json")
    totals = json.loads(stats.read_text())["totals"]
    counted: Counter[str] = Counter()
    for result in results:
        for counter in result.metrics().query(MetricsFilter().with_namespace(COUNTERS))["counters"]:
            counted[counter.key.metric.name] += counter.committed
    reasons = {f"{outcome}/{reason}": n for outcome in ("dropped", "rejected") for reason, n in totals[outcome].items()}
    assert +counted == {"documents_in": totals["documents_in"], "kept": totals["kept"], **reasons}
