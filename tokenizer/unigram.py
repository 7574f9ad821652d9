"""Trains a unigram model on counted segments with SentencePiece, from seeds of our own.

SentencePiece reads the counts as `segment TAB count`; its expectation maximisation and pruning, the characters it
requires and the normaliser are those of a training on the sentences themselves. What differs is where it starts:
few well-chosen seeds (`tokenizer.seeds`) need two to four rounds of pruning instead of four to seven, and one step of
maximisation a round does what two did.

The model embeds its trainer's settings. Those that only say how the text was handed over are taken out again, so the
bytes depend on config and sample alone, and the model reads raw text.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import sentencepiece

from pipeline.config import VocabConfig
from pipeline.errors import PipelineError, UserError
from tokenizer import wire
from tokenizer.aggregate import Segments
from tokenizer.sample import MAX_SENTENCE_BYTES
from tokenizer.scores import round_scores
from tokenizer.seeds import LONGEST, seed_pieces
from tokenizer.special import CLS_ID, PAD_ID, SEP_ID, SPECIAL_PIECES, UNK_ID

SEEDS_PER_PIECE = (2, 4)  # at least and at most
_MOST_SEEDS = 2**31 - 1
_TOO_FEW_PIECES = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")

# Numbers of the fields of ModelProto, TrainerSpec and NormalizerSpec.
TRAINER_SPEC, NORMALIZER_SPEC = 2, 3
_INPUT_FORMAT, _SEEDS_FILE = 7, 54
_ADD_DUMMY_PREFIX = 3


def train_unigram(segments: Segments, config: VocabConfig) -> bytes:
    """The serialised model of a vocabulary for these segments, its scores rounded.

    Raises:
        UserError: `vocab.size` is too small for the characters of the sample.
        PipelineError: the trainer failed in another way.
    """
    model = io.BytesIO()
    with _seeds_file(segments, config.size) as seeds_file:
        pa.default_memory_pool().release_unused()
        handed_over: dict[str, Any] = {"input_format": "tsv", "add_dummy_prefix": False}
        handed_over["seed_sentencepieces_file"] = seeds_file
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=segments.lines(), model_writer=model, **trainer_options(config), **handed_over
            )
        except RuntimeError as error:
            raise _explain(str(error), config) from None
    return round_scores(_for_raw_text(model.getvalue()))


def trainer_options(config: VocabConfig) -> dict[str, Any]:
    """SentencePiece's options; every one of them is embedded in the model."""
    pad, cls, sep, unk = SPECIAL_PIECES
    return {
        "model_type": "unigram",
        "vocab_size": config.size,
        "hard_vocab_limit": False,  # a small sample gives the pieces it supports instead of an error
        "seed_sentencepiece_size": _MOST_SEEDS,
        "num_sub_iterations": 1,
        "max_sentencepiece_length": LONGEST,
        "character_coverage": config.character_coverage,
        "max_sentence_length": MAX_SENTENCE_BYTES,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": True,
        "byte_fallback": False,  # transformers' DebertaV2Tokenizer knows none
        "num_threads": config.num_threads,
        "minloglevel": 2,
        **{"pad_id": PAD_ID, "bos_id": CLS_ID, "eos_id": SEP_ID, "unk_id": UNK_ID},
        **{"pad_piece": pad, "bos_piece": cls, "eos_piece": sep, "unk_piece": unk},
    }


@contextmanager
def _seeds_file(segments: Segments, size: int) -> Iterator[str]:
    """A file of seeds without a name of its own, so that a killed run leaves nothing behind."""
    least, most = (number * size for number in SEEDS_PER_PIECE)
    with tempfile.TemporaryFile() as file:
        file.writelines(f"{piece}\t{count}\n".encode() for piece, count in seed_pieces(segments, least, most))
        file.seek(0)
        yield f"/dev/fd/{file.fileno()}"


def _for_raw_text(model: bytes) -> bytes:
    """A model that was trained on segments, as if it had read the sentences."""
    trainer = wire.replaced(wire.submessage(model, TRAINER_SPEC), {_INPUT_FORMAT: None, _SEEDS_FILE: None})
    normalizer = wire.replaced(wire.submessage(model, NORMALIZER_SPEC), {_ADD_DUMMY_PREFIX: 1})
    return wire.replaced(model, {TRAINER_SPEC: trainer, NORMALIZER_SPEC: normalizer})


def _explain(message: str, config: VocabConfig) -> PipelineError:
    if found := _TOO_FEW_PIECES.search(message):
        return UserError(
            f"vocab.size {config.size} is too small: the characters of the sample and the special pieces alone are "
            f"{found[1]}; raise vocab.size well above that or lower vocab.character_coverage"
        )
    return PipelineError(f"vocab: SentencePiece could not train: {message}")
