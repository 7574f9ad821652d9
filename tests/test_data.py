"""Training rows out of token shards: as they were written, the same for any split, and nothing damaged unnoticed."""

from __future__ import annotations

import atexit
import dataclasses
import errno
import functools
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data import TrainingData, read_ahead
from model.token_shards import TokenShards
from pipeline.artifact import Artifact
from pipeline.config import PretrainConfig
from pipeline.errors import PipelineError, UserError
from pipeline.manifest import Identity, Manifest
from pipeline.shards import open_shard, shard_name, token_schema, write_stream
from pipeline.stage import PartStore
from pipeline.storage import Folder

TOKENIZER = "ab" * 32
SEQ_LEN = 12
VOCAB_ROWS = 5000


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
    for place, (language, sizes) in enumerate(rows.items()):
        first = 100 + 1000 * place
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


def copied_to_memory(folder: Folder) -> Folder:
    """The same stage on a store that is not the local disk."""
    there = Folder(f"memory://{Path(folder.url).name}")
    for name in folder.files():
        there.write(name, folder.read(name))
    return there


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    """Replace the first occurrence of some bytes of a file."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


@functools.cache
def damaged_project() -> tuple[Artifact, Path, bytes]:
    """Tokens of one shard, the shard's path and its bytes as they should be."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    tokens = make_tokens(folder, {"en": [40]})
    path = folder / "en" / shard_name(0, 1, "train")
    return tokens, path, path.read_bytes()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 8, 12, 24])
def test_a_step_reads_the_same_rows_with_any_number_of_processes(tmp_path: Path, processes: int) -> None:
    config = PretrainConfig(global_batch=24, micro_batch=1)
    data = TrainingData(make_tokens(tmp_path, {"en": [40, 30], "de": [20], "sw": [7]}), config, VOCAB_ROWS)
    for step in (0, 1, 7):  # crosses epochs of all three
        whole = data.read(step * 24, 24)
        share = 24 // processes
        parts = [data.read(step * 24 + rank * share, share) for rank in range(processes)]
        assert np.array_equal(np.concatenate([part.slots for part in parts]), whole.slots)
        assert np.array_equal(np.concatenate([part.input_ids for part in parts]), whole.input_ids)
        assert np.array_equal(np.concatenate([part.segment_ids for part in parts]), whole.segment_ids)


def test_rows_come_as_they_were_written(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [1500, 700]})
    shards = TokenShards(tokens, VOCAB_ROWS)
    stored = pa.concat_tables(
        pa.ipc.open_stream(tokens.fetch(f"en/{shard_name(number, 2, 'train')}")).read_all() for number in range(2)
    )
    wanted = np.random.default_rng(1).permutation(2200)[:300]
    input_ids, segment_ids = shards.read([shards.rows("en", "train")], np.zeros_like(wanted), wanted)
    for place, row in enumerate(wanted.tolist()):
        lengths = stored["segment_lengths"][row].as_py()
        numbers = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
        assert segment_ids[place].tolist() == numbers + [0] * (SEQ_LEN - len(numbers))
        assert input_ids[place].tolist() == stored["input_ids"][row].as_py()


def test_reading_no_rows_gives_none(tmp_path: Path) -> None:
    rows = TrainingData(make_tokens(tmp_path, {"en": [30]}), PretrainConfig(), VOCAB_ROWS).read(0, 0)
    assert rows.input_ids.shape == rows.segment_ids.shape == (0, SEQ_LEN)
    assert len(rows.slots) == len(rows.languages) == 0


def test_all_training_rows_are_read_in_an_epoch(tmp_path: Path) -> None:
    data = TrainingData(
        make_tokens(tmp_path, {"en": [50, 14]}), PretrainConfig(global_batch=16, micro_batch=1), VOCAB_ROWS
    )
    read = np.concatenate([data.read(step * 16, 16).input_ids[:, 0] for step in range(4)])
    assert sorted(read.tolist()) == list(range(100, 164))


def test_every_row_says_which_language_it_is_of(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"de": [40], "en": [30], "sw": [20]})
    data = TrainingData(tokens, PretrainConfig(), VOCAB_ROWS)
    assert data.languages == ("de", "en", "sw")
    rows = data.read(5, 60)
    assert np.array_equal(rows.languages, rows.input_ids[:, 0] // 1000)
    assert set(rows.languages.tolist()) == {0, 1, 2}
    assert np.array_equal(rows.narrow(10, 7).languages, rows.languages[10:17])
    assert data.held_out(6).languages.tolist() == [0, 0, 1, 1, 2, 2]


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [30]}, tokenizer="cd" * 32)
    data = TrainingData(tokens, PretrainConfig(), VOCAB_ROWS)
    with pytest.raises(PipelineError, match=r"train-00000-of-00001\.arrow: encoded with tokenizer cdcdcdcdcdcd"):
        data.read(0, 8)


def test_an_altered_shard_is_found_beside_the_reading_and_before_anything_is_kept(tmp_path: Path) -> None:
    data = TrainingData(make_tokens(tmp_path, {"de": [30], "en": [30]}), PretrainConfig(), VOCAB_ROWS)
    rewrite(tmp_path / "en" / shard_name(0, 1, "train"), np.int32([1110] * 3).tobytes(), np.int32([1111] * 3).tobytes())
    data.read(0, 8)  # no digest is waited for
    for again in (data.require_verified, data.require_verified, lambda: data.read(8, 8)):
        with pytest.raises(PipelineError, match=r"en/train-00000-of-00001\.arrow: its bytes are not the ones"):
            again()


def test_altered_held_out_rows_are_found_too(tmp_path: Path) -> None:
    data = TrainingData(make_tokens(tmp_path, {"en": [30]}), PretrainConfig(), VOCAB_ROWS)
    rewrite(
        tmp_path / "en" / shard_name(0, 1, "validation"), np.int32([50] * 3).tobytes(), np.int32([51] * 3).tobytes()
    )
    data.read(0, 8)
    data.require_verified()
    data.held_out(1)
    with pytest.raises(PipelineError, match=r"validation-00000-of-00001\.arrow: its bytes are not the ones"):
        data.require_verified()


def test_whole_shards_are_verified_also_where_they_have_to_be_fetched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokens = make_tokens(tmp_path, {"en": [30, 30]})
    for folder in (tokens.folder, copied_to_memory(tokens.folder)):
        data = TrainingData(Artifact(folder, tokens.manifest), PretrainConfig(), VOCAB_ROWS)
        data.read(0, 60)
        data.require_verified()


def test_shards_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [30]})
    path = tmp_path / "en" / shard_name(0, 1, "train")
    whole = path.read_bytes()
    for content, complaint in ((None, "is missing"), (b"", "cannot be mapped"), (whole[:-500], "not a readable")):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PipelineError, match=rf"en/train-00000-of-00001\.arrow: .*{complaint}"):
            TrainingData(tokens, PretrainConfig(), VOCAB_ROWS).read(0, 8)
        path.touch()


MANY_SHARDS = """
import resource, sys
from pathlib import Path
from test_data import PretrainConfig, TrainingData, VOCAB_ROWS, make_tokens
tokens = make_tokens(Path(sys.argv[1]), {"en": [1] * 100})
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 80))
data = TrainingData(tokens, PretrainConfig(), VOCAB_ROWS)
print(resource.getrlimit(resource.RLIMIT_NOFILE))
for slot in range(100):
    data.read(slot, 1)
data.require_verified()
"""


def test_more_shards_are_read_than_files_may_be_open(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY_SHARDS, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.returncode) == ("(80, 80)\n", 0), done.stderr


@pytest.mark.parametrize(
    ("code", "way_out"), [(errno.EMFILE, r"let processes open more files"), (errno.EIO, "repair what failed, then")]
)
def test_a_shard_that_cannot_be_opened_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, way_out: str
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    tokens = make_tokens(tmp_path, {"en": [30]})
    monkeypatch.setattr(mmap, "mmap", failing)
    with pytest.raises(PipelineError, match=rf"{os.strerror(code)}\); {way_out}") as told:
        TrainingData(tokens, PretrainConfig(), VOCAB_ROWS).read(0, 8)
    assert "delete" not in str(told.value)


def test_rows_that_the_networks_cannot_take_are_refused_at_once(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"de": [30], "en": [30]})
    with pytest.raises(PipelineError, match=r"en/train-00000-of-00001\.arrow: ids beyond the 1125 rows"):
        TrainingData(tokens, PretrainConfig(), vocab_rows=1125).read(0, 60)
    path = tmp_path / "de" / shard_name(0, 1, "train")
    rewrite(path, np.int32([100] * 3).tobytes(), np.int32([-100] * 3).tobytes())
    with pytest.raises(PipelineError, match=r"de/train-00000-of-00001\.arrow: ids beyond"):
        TrainingData(tokens, PretrainConfig(), VOCAB_ROWS).read(0, 60)
    rewrite(path, np.int32([-100] * 3).tobytes(), np.int32([100] * 3).tobytes())
    lengths = open_shard(str(path))["segment_lengths"].chunk(0).values.to_numpy()
    rewrite(path, lengths.tobytes(), (lengths + 60_000).tobytes())
    with pytest.raises(PipelineError, match=r"de/train-00000-of-00001\.arrow: segments longer than a row"):
        TrainingData(tokens, PretrainConfig(), VOCAB_ROWS).read(0, 60)


def test_shards_with_other_rows_than_recorded_are_refused(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [30]})
    path = f"en/{shard_name(0, 1, 'train')}"
    part = dataclasses.replace(tokens.manifest.parts[path], rows=31)
    other = dataclasses.replace(tokens.manifest, parts={**tokens.manifest.parts, path: part})
    with pytest.raises(PipelineError, match=r"en/train-00000-of-00001\.arrow: holds 30 rows .* says 31"):
        TrainingData(Artifact(tokens.folder, other), PretrainConfig(), VOCAB_ROWS).read(0, 8)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_no_damage_of_a_shard_gives_anything_but_rows_that_fit_or_a_named_error(seed: int, bits: int) -> None:
    tokens, path, whole = damaged_project()
    rng = np.random.default_rng(seed)
    data = bytearray(whole)
    for position in rng.integers(0, len(data), bits):
        data[position] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    training = TrainingData(tokens, PretrainConfig(), VOCAB_ROWS)
    try:
        rows = training.read(0, 40)
    except PipelineError as error:
        assert path.name in str(error), error
    else:
        assert rows.input_ids.min() >= 0
        assert rows.input_ids.max() < VOCAB_ROWS
        assert rows.segment_ids.min() >= 0
        with pytest.raises(PipelineError, match=path.name):
            training.require_verified()


def test_no_training_rows_is_said_with_a_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training rows"):
        TrainingData(make_tokens(tmp_path, {"en": [0]}), PretrainConfig(), VOCAB_ROWS)


def test_held_out_rows_are_spread_over_languages_and_numbered_apart_from_training(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path, {"en": [900], "de": [90], "sw": [9]})
    data = TrainingData(tokens, PretrainConfig(global_batch=8), VOCAB_ROWS)
    rows = data.held_out(9)
    assert len(set(rows.slots.tolist())) == 9
    assert rows.slots.max() < 0
    assert rows.input_ids.min() == 50  # the held-out rows, not the training rows
    assert len(data.held_out(1000).slots) == 15  # all there are


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
