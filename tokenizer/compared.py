"""Tokenizers made elsewhere, to measure beside the run's own: SentencePiece models and `tokenizer.json` files."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import sentencepiece

from pipeline.errors import UserError
from tokenizer import pieces
from tokenizer.fertility import Counts, Tokenize


def by_name(urls: list[str]) -> dict[str, str]:
    """The files under the names that a report calls them: the file's own, with its folder's where it is not alone.

    Raises:
        UserError: two files have the same folder and file name.
    """
    often = Counter(_tail(url, 1) for url in urls)
    names = [_tail(url, 1 if often[_tail(url, 1)] == 1 else 2) for url in urls]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(f"vocab.compare: two files are called {twice[0]}; rename one or its folder")
    return dict(zip(names, urls, strict=True))


def load(data: bytes, name: str) -> Tokenize:
    """The tokenizer in a file.

    Raises:
        UserError: it is neither a SentencePiece model nor a `tokenizer.json`.
    """
    try:
        return _from_json(data) if data.lstrip()[:1] == b"{" else with_sentencepiece(pieces.load(data))
    except Exception as error:  # the libraries raise bare exceptions for what they cannot read
        raise UserError(
            f"vocab.compare: {name} is neither a SentencePiece model nor a tokenizer.json that can be read ({error})"
        ) from None


def with_sentencepiece(processor: sentencepiece.SentencePieceProcessor) -> Tokenize:
    """Tokenizes with a SentencePiece model, whichever id its unknown piece has."""

    def tokenize(texts: list[bytes]) -> Counts:
        ids, _ = pieces.encode(processor, [texts])
        return Counts(len(ids), int(np.count_nonzero(ids == processor.unk_id())))

    return tokenize


def _from_json(data: bytes) -> Tokenize:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown = _unknown_id(tokenizer, json.loads(data)["model"])

    def tokenize(texts: list[bytes]) -> Counts:
        rows = [row.ids for row in tokenizer.encode_batch([text.decode() for text in texts], add_special_tokens=False)]
        return Counts(sum(map(len, rows)), sum(row.count(unknown) for row in rows))

    return tokenize


def _unknown_id(tokenizer: Any, model: dict[str, Any]) -> int:
    """The id of the unknown piece, -1 where a tokenizer has none."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    found = tokenizer.token_to_id(model["unk_token"]) if model.get("unk_token") else None
    return -1 if found is None else int(found)


def _tail(url: str, parts: int) -> str:
    return "/".join(url.rstrip("/").split("/")[-parts:])
