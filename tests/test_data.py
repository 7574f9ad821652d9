"""The order of training rows: a permutation an epoch, fair shares of languages, the same samples for any split."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import flip_bit

from model.data import HeldOut, LanguageRows, TrainingData, read_ahead
from model.order import CYCLE, TrainingOrder, apportion, permute
from model.training import micro_batches_of
from model.world import World
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import Identity, Manifest
from pipeline.shards import shard_name, token_schema, write_stream
from pipeline.stage import Artifact, PartStore
from pipeline.storage import Folder

TOKENIZER = "ab" * 32
SEQ_LEN = 12


def write_shard(parts: PartStore, path: str, segments: list[list[int]], first: int, tokenizer: str = TOKENIZER) -> None:
    """Rows of segments of the given lengths; every token of row r is first + r, so a row says which one it is."""
    schema = token_schema(SEQ_LEN, tokenizer)
    ids = [[first + row] * sum(lengths) + [0] * (SEQ_LEN - sum(lengths)) for row, lengths in enumerate(segments)]
    columns = [pa.array(ids, schema.field(0).type), pa.array(segments, schema.field(1).type)]
    with parts.publish(path) as draft:
        draft.rows = write_stream(draft.sink, schema, pa.Table.from_arrays(columns, schema=schema))


def make_tokens(folder: Path, rows: dict[str, list[int]], tokenizer: str = TOKENIZER) -> Artifact:
    """A committed tokens stage with shards of the given numbers of rows for each language, and 5 held-out rows each."""
    parts = PartStore(Folder(str(folder)))
    rng = np.random.default_rng(0)
    stats = {}
    for language, sizes in rows.items():
        first = 100
        for number, size in enumerate(sizes):
            segments = [rng.integers(3, 7, size=rng.integers(1, 3)).tolist() for _ in range(size)]
            write_shard(parts, f"{language}/{shard_name(number, len(sizes), 'train')}", segments, first, tokenizer)
            first += size
        write_shard(parts, f"{language}/{shard_name(0, 1, 'validation')}", [[SEQ_LEN]] * 5, 50)
        stats[language] = {"train": {"rows": sum(sizes), "tokens": sum(sizes) * 8}, "validation": {"rows": 5}}
    manifest = Manifest(
        Identity("tokens", 1, {}, {}, {}, {}),
        {},
        parts.done(),
        {"languages": stats, "max_seq_len": SEQ_LEN, "tokenizer_sha256": TOKENIZER},
    )
    return Artifact(parts.folder, manifest)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 3000),
    block_rows=st.integers(1, 200),
    seed=st.integers(-(2**40), 2**40),
    epoch=st.integers(0, 10**9),
)
def test_every_epoch_reads_every_row_once(rows: int, block_rows: int, seed: int, epoch: int) -> None:
    order = TrainingOrder([rows], [1.0], seed, block_rows)
    read = order.samples(np.arange(epoch * rows, (epoch + 1) * rows)).row
    assert np.array_equal(np.sort(read), np.arange(rows))


@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.floats(0.001, 100), min_size=1, max_size=40))
def test_languages_keep_their_shares_at_every_moment(weights: list[float]) -> None:
    order = TrainingOrder([1000] * len(weights), weights, seed=1)
    language = order.samples(np.arange(CYCLE, 2 * CYCLE)).language
    slots = np.arange(1, CYCLE + 1)
    for number, quota in enumerate(order.quota):
        ahead = np.cumsum(language == number) - slots * (quota / CYCLE)
        assert np.abs(ahead).max() <= 1  # at every slot, so no stretch of slots is off by more than 2
    assert order.quota.sum() == CYCLE
    assert np.all(np.abs(order.quota - np.array(weights) / sum(weights) * CYCLE) <= len(weights))


def test_a_language_runs_through_its_rows_in_turn_with_others() -> None:
    rows = [700, 90, 5]
    order = TrainingOrder(rows, [5.0, 2.0, 1.0], seed=3, block_rows=64)
    samples = order.samples(np.arange(4000))
    for number, count in enumerate(rows):
        read = samples.row[samples.language == number]
        epochs = [read[start : start + count] for start in range(0, len(read) - count + 1, count)]
        assert len(epochs) >= 3
        assert all(np.array_equal(np.sort(epoch), np.arange(count)) for epoch in epochs)
        assert len({epoch.tobytes() for epoch in epochs}) > 1  # another order in another epoch


def test_neighbours_are_read_together() -> None:
    order = TrainingOrder([100_000], [1.0], seed=0, block_rows=1000)
    read = order.samples(np.arange(50_000)).row.reshape(50, 1000)
    assert all(len(np.unique(block // 1000)) <= 2 for block in read)


def test_any_sample_is_found_at_once_and_by_itself() -> None:
    order = TrainingOrder([10**10, 10**7, 31], [3.0, 2.0, 1.0], seed=9)
    far = np.arange(10**15, 10**15 + 1000)
    began = time.perf_counter()
    together = order.samples(far)
    assert time.perf_counter() - began < 0.5
    shuffled = np.random.default_rng(0).permutation(1000)
    alone = order.samples(far[shuffled])
    assert np.array_equal(alone.row, together.row[shuffled])
    assert np.array_equal(alone.language, together.language[shuffled])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.integers(60, 5000))
def test_apportion_gives_away_every_seat_and_leaves_nobody_out(weights: list[float], seats: int) -> None:
    given_away = apportion(weights, seats)
    assert given_away.sum() == seats
    assert given_away.min() >= 1


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 5000), key=st.integers(-(2**63), 2**63 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    values = np.arange(size)
    permuted = permute(values, np.full(size, size), np.full(size, key))
    assert np.array_equal(np.sort(permuted), values)


def test_permute_sends_a_value_anywhere() -> None:
    keys = np.random.default_rng(0).integers(-(2**62), 2**62, 20_000)
    places = permute(np.zeros(20_000, dtype=np.int64), np.full(20_000, 37), keys)
    counts = np.bincount(places, minlength=37)
    chi_square = ((counts - 20_000 / 37) ** 2 / (20_000 / 37)).sum()
    assert chi_square < 36 + 5 * np.sqrt(2 * 36)


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8, 12, 24])
def test_a_step_reads_the_same_rows_with_any_number_of_processes(tmp_path: Path, processes: int) -> None:
    config = PretrainConfig(global_batch=24, micro_batch=1)
    data = TrainingData(make_tokens(tmp_path, {"en": [40, 30], "de": [20], "sw": [7]}), config)
    for step in (0, 1, 7):  # crosses epochs of all three
        whole = data.read(step, 0, 24)
        parts = []
        for rank in range(processes):
            mine = micro_batches_of(config, World(rank, processes, device=None, host_group=None))  # type: ignore[arg-type]
            parts.append(data.read(step, mine.start, len(mine)))
        assert np.array_equal(np.concatenate([part.slots for part in parts]), whole.slots)
        assert np.array_equal(np.concatenate([part.input_ids for part in parts]), whole.input_ids)
        assert np.array_equal(np.concatenate([part.segment_ids for part in parts]), whole.segment_ids)


def test_processes_that_do_not_divide_the_batch_are_refused_with_those_that_do() -> None:
    world = World(0, 5, device=None, host_group=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"use 1, 2, 3, 4, 6, 12 processes"):
        micro_batches_of(PretrainConfig(global_batch=24, micro_batch=2), world)


def test_rows_come_as_they_were_written(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [1500, 700]})
    table = LanguageRows(tokens, "en", "train")
    stored = pa.concat_tables(
        pa.ipc.open_stream(tokens.fetch(f"en/{shard_name(number, 2, 'train')}")).read_all() for number in range(2)
    )
    wanted = np.random.default_rng(1).permutation(2200)[:300]
    input_ids, segment_ids = table.read(wanted)
    for place, row in enumerate(wanted.tolist()):
        lengths = stored["segment_lengths"][row].as_py()
        numbers = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
        assert segment_ids[place].tolist() == numbers + [0] * (SEQ_LEN - len(numbers))
        assert input_ids[place].tolist() == stored["input_ids"][row].as_py()


def test_all_training_rows_are_read_in_an_epoch(tmp_path: Path) -> None:
    data = TrainingData(make_tokens(tmp_path, {"en": [50, 14]}), PretrainConfig(global_batch=16, micro_batch=1))
    read = np.concatenate([data.read(step, 0, 16).input_ids[:, 0] for step in range(4)])
    assert sorted(read.tolist()) == list(range(100, 164))


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    data = TrainingData(make_tokens(tmp_path, {"en": [30]}, tokenizer="cd" * 32), PretrainConfig(global_batch=8))
    with pytest.raises(PipelineError, match=r"train-00000-of-00001\.arrow: encoded with tokenizer cdcdcdcdcdcd"):
        data.read(0, 0, 8)


def test_altered_shards_are_refused(tmp_path: Path) -> None:
    data = TrainingData(make_tokens(tmp_path, {"en": [30]}), PretrainConfig(global_batch=8))
    flip_bit(tmp_path / "en" / shard_name(0, 1, "train"))
    with pytest.raises(PipelineError, match=r"train-00000-of-00001\.arrow: its bytes are not the ones"):
        data.read(0, 0, 8)


def test_no_training_rows_is_said_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training rows"):
        TrainingData(make_tokens(tmp_path, {"en": [0]}), PretrainConfig())


def test_held_out_rows_are_spread_over_languages_and_numbered_apart_from_training(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [900], "de": [90], "sw": [9]})
    data = TrainingData(tokens, PretrainConfig(global_batch=8))
    rows = HeldOut(tokens, data.weights, 9).rows
    assert len(set(rows.slots.tolist())) == 9
    assert rows.slots.max() < 0
    assert rows.input_ids.min() == 50  # the held-out rows, not the training rows
    assert len(HeldOut(tokens, data.weights, 1000).rows.slots) == 15  # all there are


def test_reading_ahead_keeps_the_order_and_passes_errors_on() -> None:
    assert list(read_ahead(lambda step: step * step, range(3, 8))) == [9, 16, 25, 36, 49]
    assert list(read_ahead(lambda step: step, range(0))) == []

    def failing(step: int) -> int:
        if step == 2:
            raise PipelineError("step 2 is bad")
        return step

    steps = read_ahead(failing, range(5))
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(PipelineError, match="step 2"):
        next(steps)
