"""Token shards: memory-mapped Arrow files of rows, opened when a row of theirs is wanted, digested in the background.

Opening checks what is cheap: the schema, the tokenizer and the number of rows. The digest of a whole shard takes a
second, and the first batch of a run wants a row of every language; a thread of its own takes the digests one after the
other, once a process, while rows are read. `require_verified` waits for it: whoever saves what was computed from the
rows asks first. Until then a damaged shard can give wrong rows, but no ids or segments that the networks cannot take.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import queue
import resource
import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import pyarrow as pa

from model.order import Ints
from pipeline.artifact import Artifact, locate, verify
from pipeline.errors import PipelineError
from pipeline.manifest import Part
from pipeline.shards import ROWS_PER_BATCH, parse_shard, token_schema
from pipeline.storage import redact

_MOST_OPEN = 1024
_FILES_EACH = 4  # of so many files that a process may have open, one is a shard
_DAMAGED = "delete the tokens stage's directory and run it again"


class TokenShards:
    """The shards of a tokens stage.

    Args:
        tokens: the committed stage.
        vocab_rows: of the embedding tables; ids are less.
    """

    def __init__(self, tokens: Artifact, vocab_rows: int) -> None:
        stats = tokens.manifest.stats
        self._folder, self._vocab_rows = tokens.folder, vocab_rows
        self.seq_len: int = stats["max_seq_len"]
        self._schema = token_schema(self.seq_len, stats["tokenizer_sha256"])
        self._parts: dict[str, list[Part]] = {}
        for part in tokens.select(suffix=".arrow"):
            self._parts.setdefault(part.path.rsplit("-", 3)[0], []).append(part)
        self._open: OrderedDict[str, Shard] = OrderedDict()
        self._most_open = max(1, min(_MOST_OPEN, _open_files() // _FILES_EACH))
        self._seen: set[str] = set()
        self._checks = BackgroundChecks()

    def rows(self, language: str, split: str) -> LanguageRows:
        """The rows of one language and split, numbered through its shards."""
        return LanguageRows(self, self._parts.get(f"{language}/{split}", []))

    def require_verified(self) -> None:
        """Wait until the digest of every shard opened so far has been checked.

        Raises:
            PipelineError: a shard's bytes are not the ones that were committed.
        """
        self._checks.wait()

    def read(self, tables: list[LanguageRows], numbers: Ints, rows: Ints) -> tuple[Ints, Ints]:
        """Rows of several tables: the i-th is row `rows`[i] of table `numbers`[i].

        Returns:
            Ids and segments, both [n, L] int32.

        Raises:
            PipelineError: a shard is missing or damaged, as far as is known by now.
        """
        self._checks.raise_failure()
        input_ids = np.empty((len(rows), self.seq_len), dtype=np.int32)
        lengths = []
        places = list(zip(numbers.tolist(), rows.tolist(), strict=True))
        for place, (number, row) in enumerate(places):
            input_ids[place], found = tables[number].row(row)
            lengths.append(found)
        beyond = input_ids.view(np.uint32).max(axis=1) >= self._vocab_rows
        if beyond.any():
            number, row = places[int(np.argmax(beyond))]
            raise PipelineError(
                f"{tables[number].where(row)}: ids beyond the {self._vocab_rows} rows of the vocabulary; {_DAMAGED}"
            )
        return input_ids, number_segments(lengths, self.seq_len)

    def open(self, part: Part) -> Shard:
        """A shard, mapped into memory; its digest is checked in the background if that has not been done."""
        if (shard := self._open.get(part.path)) is None:
            shard = Shard(locate(self._folder, part), self.url(part), part.rows, self._schema)
            self._open[part.path] = shard
            if part.path not in self._seen:
                self._seen.add(part.path)
                self._checks.add(lambda: verify(self._folder, part))
            if len(self._open) > self._most_open:
                self._open.popitem(last=False)
        self._open.move_to_end(part.path)
        return shard

    def url(self, part: Part) -> str:
        """Where a shard lies, for messages."""
        return f"{redact(self._folder.url)}/{part.path}"


class LanguageRows:
    """The rows of one language and split, numbered through its shards."""

    def __init__(self, shards: TokenShards, parts: list[Part]) -> None:
        self._shards, self._parts = shards, parts
        self._starts = list(accumulate((part.rows for part in parts), initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, number: int) -> tuple[Ints, Ints]:
        """Ids [L] int32 and segment lengths of one row, where they lie in the file."""
        shard = bisect_right(self._starts, number) - 1
        return self._shards.open(self._parts[shard]).row(number - self._starts[shard])

    def where(self, number: int) -> str:
        """The shard that holds a row, for messages."""
        return self._shards.url(self._parts[bisect_right(self._starts, number) - 1])


class Shard:
    """One memory-mapped file of rows, as the record batches it consists of.

    Raises:
        PipelineError: it holds other columns or rows than it should, or was encoded with another tokenizer.
    """

    def __init__(self, path: str, where: str, rows: int, schema: pa.Schema) -> None:
        self._where = where
        table = parse_shard(_map(path, where), where, schema)
        made_with, wanted = (
            (found.metadata or {}).get(b"tokenizer_sha256", b"none").decode(errors="replace")[:12]
            for found in (table.schema, schema)
        )
        if made_with != wanted:
            raise PipelineError(f"{where}: encoded with tokenizer {made_with}, the stage says {wanted}; {_DAMAGED}")
        self._batches = table.to_batches()
        sizes = [batch.num_rows for batch in self._batches]
        if sum(sizes) != rows or any(size != ROWS_PER_BATCH for size in sizes[:-1]):
            raise PipelineError(
                f"{where}: holds {sum(sizes)} rows in batches of {max(sizes, default=0)}, the stage says {rows} in "
                f"batches of {ROWS_PER_BATCH}; {_DAMAGED}"
            )
        self._arrays: list[tuple[Ints, list[int], Ints] | None] = [None] * len(sizes)

    def row(self, number: int) -> tuple[Ints, Ints]:
        """Ids [L] int32 and segment lengths of one row, where they lie in the file."""
        batch, inside = divmod(number, ROWS_PER_BATCH)
        ids, offsets, lengths = self._arrays[batch] or self._open_batch(batch)
        return ids[inside], lengths[offsets[inside] : offsets[inside + 1]]

    def _open_batch(self, number: int) -> tuple[Ints, list[int], Ints]:
        """Of a record batch: ids [n, L], where each row's segment lengths begin, and the lengths.

        Raises:
            PipelineError: it has nulls, is larger than the file, or the segments of a row are longer than the row.
        """
        batch = self._batches[number]
        ids, segments = batch.columns
        try:
            batch.validate()
            # Unlike `to_numpy`, this does not import pandas.
            flat, offsets, lengths = map(np.from_dlpack, (ids.flatten(), segments.offsets, segments.values))
        except pa.ArrowException as error:
            raise PipelineError(f"{self._where}: record batch {number} is damaged ({error}); {_DAMAGED}") from None
        offsets = offsets.clip(0, len(lengths))
        filled = np.diff(np.append(0, lengths.cumsum(dtype=np.int64))[offsets])
        if filled.max() > ids.type.list_size:
            raise PipelineError(f"{self._where}: segments longer than a row; {_DAMAGED}")
        self._arrays[number] = arrays = flat.reshape(len(ids), -1), offsets.tolist(), lengths
        return arrays


def _map(path: str, where: str) -> mmap.mmap:
    """Map a file into memory. Arrow's own mapping asks the system for all of a file on opening it; rows want little."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # it is empty
        raise PipelineError(f"{where}: cannot be mapped into memory ({error}); {_DAMAGED}") from None
    except OSError as error:
        too_many = error.errno in (errno.EMFILE, errno.ENFILE)
        way_out = "let processes open more files (ulimit -n)" if too_many else "repair what failed"
        raise PipelineError(
            f"{where}: cannot be mapped into memory ({error.strerror or error}); {way_out}, then run the same command "
            "again"
        ) from None


def _open_files() -> int:
    """How many files this process may have open, after asking for as many as it may ask for: a map keeps its file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def number_segments(lengths: list[Ints], seq_len: int) -> Ints:
    """The segment of every token, [len(lengths), seq_len] int32: 1, 2, ... for the lengths of a row, then 0."""
    counts = np.array([len(found) for found in lengths], dtype=np.int64)
    ends = np.cumsum(counts)
    times = np.concatenate([np.empty(0, dtype=np.int64), *lengths])
    numbers = np.arange(1, len(times) + 1, dtype=np.int32) - np.repeat(ends - counts, counts).astype(np.int32)
    total = np.append(0, np.cumsum(times))
    padding = seq_len - (total[ends] - total[ends - counts])
    return np.repeat(np.insert(numbers, ends, 0), np.insert(times, ends, padding)).reshape(len(lengths), seq_len)


class BackgroundChecks:
    """Checks that a thread makes one after the other until one fails; whoever asks from then on gets its error."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[Callable[[], None]] = queue.Queue()
        self._failure: Exception | None = None
        # A daemon: a process that ends for another reason does not finish the checks first.
        threading.Thread(target=self._run, name="checks", daemon=True).start()

    def add(self, check: Callable[[], None]) -> None:
        """Make this check when those before it are done."""
        self._waiting.put(check)

    def raise_failure(self) -> None:
        """Raise the error of the check that has failed, if one has by now."""
        if self._failure:
            raise self._failure

    def wait(self) -> None:
        """Wait for the checks added so far; raise as `raise_failure`."""
        self._waiting.join()
        self.raise_failure()

    def _run(self) -> None:
        while True:
            check = self._waiting.get()
            try:
                if not self._failure:
                    check()
            except Exception as error:
                self._failure = self._failure or error
            finally:
                self._waiting.task_done()
