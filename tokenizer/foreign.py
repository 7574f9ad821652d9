"""A vocabulary that was trained elsewhere, brought to what `transformers` makes of it.

`DebertaV2Tokenizer` takes pieces and scores from a SentencePiece model and nothing else: it applies no normaliser but
NFC, prepends a space, and knows neither byte fallback nor symbols that are found before all others. So the model is
published as it reads it: identity normaliser, ordinary pieces, rounded scores (`tokenizer.scores`). What cannot be read
so is refused. That ids agree in fact is then checked on the corpus.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.errors import UserError
from tokenizer import pieces, wire
from tokenizer.scores import round_scores
from tokenizer.special import MASK_TOKEN, SPECIAL_PIECES
from tokenizer.unigram import NORMALIZER_SPEC, TRAINER_SPEC

# Numbers of the fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec, and values of enumerations.
_PIECES, _TYPE = 1, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK = 3, 24, 35
_NORMALIZER, _CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 1, 2, 3, 4, 5
_MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}
_UNIGRAM = 1
_NORMALIZERS = ("identity", "nfkc", "nmt_nfkc")

_TRAIN = "train a vocabulary instead (vocab.from: null)"


def adopted(model: bytes, name: str) -> bytes:
    """A SentencePiece model as `transformers` reads it.

    Args:
        model: the file's bytes.
        name: the file's name, for messages.

    Raises:
        UserError: it is no SentencePiece model, or none that gives the same ids in `transformers`.
    """
    scored = _scored(model, name)
    trainer, normalizer = wire.submessage(model, TRAINER_SPEC), wire.submessage(model, NORMALIZER_SPEC)
    _require_settings(trainer, normalizer, name)
    _require_pieces(scored, name)
    plain = {_NORMALIZER: b"identity", _CHARSMAP: None, _ADD_DUMMY_PREFIX: 1, _REMOVE_SPACES: 1, _ESCAPE_SPACES: 1}
    ordinary = _ordinary(model)
    return round_scores(wire.replaced(ordinary, {NORMALIZER_SPEC: wire.replaced(normalizer, plain)}))


def require_agreement(processor: pieces.Processor, tokenizer: Any, texts: dict[str, list[bytes]], name: str) -> None:
    """Check that SentencePiece and the `tokenizers` library give the same ids on texts of every language.

    Raises:
        UserError: they do not; the first language and text are named.
    """
    for language, found in texts.items():
        lines = [line for text in found for line in text.decode().split("\n")]
        theirs = tokenizer.encode_batch(lines, add_special_tokens=False)
        for line, own, other in zip(lines, processor.encode(lines), theirs, strict=True):
            if own != other.ids:
                raise UserError(
                    f"vocab.from: {name} gives other ids in transformers than in SentencePiece, first in language "
                    f"{language} for {line[:60]!r}; {_TRAIN}"
                )


def _scored(model: bytes, name: str) -> list[tuple[str, float]]:
    try:
        intact = wire.replaced(model, {})  # SentencePiece takes no bytes at all for a model without pieces
        scored = pieces.scored_pieces(pieces.load(intact)) if intact else []
    except (RuntimeError, ValueError):
        scored = []
    if not scored:
        raise UserError(f"vocab.from: {name} is not a SentencePiece model; name an spm.model file")
    return scored


def _require_settings(trainer: bytes, normalizer: bytes, name: str) -> None:
    kind = wire.integer(trainer, _MODEL_TYPE, _UNIGRAM)
    rule = wire.submessage(normalizer, _NORMALIZER).decode() or "identity"
    faults = {
        f"it is a {_MODEL_TYPES.get(kind, kind)} model and only unigram models are read": kind != _UNIGRAM,
        "it falls back to bytes, which transformers' DebertaV2Tokenizer does not": wire.integer(
            trainer, _BYTE_FALLBACK, 0
        ),
        "it marks spaces behind words, and DebertaV2Tokenizer before them": wire.integer(
            trainer, _WHITESPACE_AS_SUFFIX, 0
        ),
        "it begins a text without a space, and DebertaV2Tokenizer with one": not wire.integer(
            normalizer, _ADD_DUMMY_PREFIX, 1
        ),
        f"its normaliser {rule} changes text more than DebertaV2Tokenizer does; those read are "
        f"{', '.join(_NORMALIZERS)}": rule not in _NORMALIZERS,
    }
    for fault, present in faults.items():
        if present:
            raise UserError(f"vocab.from: {name}: {fault}; {_TRAIN}")


def _require_pieces(scored: list[tuple[str, float]], name: str) -> None:
    first = tuple(piece for piece, _ in scored[: len(SPECIAL_PIECES)])
    if first != SPECIAL_PIECES:
        raise UserError(
            f"vocab.from: {name} begins with the pieces {' '.join(first)}, and a DeBERTa vocabulary with "
            f"{' '.join(SPECIAL_PIECES)} (ids 0 to 3); {_TRAIN}"
        )
    if any(piece == MASK_TOKEN for piece, _ in scored):
        raise UserError(
            f"vocab.from: {name} has {MASK_TOKEN} as a piece, and transformers appends it after the pieces; {_TRAIN}"
        )
    if not all(math.isfinite(score) for _, score in scored):
        raise UserError(f"vocab.from: {name} has pieces whose score is not a finite number; {_TRAIN}")


def _ordinary(model: bytes) -> bytes:
    """The model with all pieces but the special ones of the ordinary type, which is also the default."""
    parts, seen = [], 0
    for field in wire.fields(model):
        if field.number == _PIECES and isinstance(field.value, bytes):
            seen += 1
            if seen > len(SPECIAL_PIECES):
                parts.append(wire.encoded_field(_PIECES, wire.replaced(field.value, {_TYPE: None})))
                continue
        parts.append(model[field.start : field.stop])
    return b"".join(parts)
