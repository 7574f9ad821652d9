"""The files from which `transformers` rebuilds a tokenizer whose ids are SentencePiece's.

`DebertaV2Tokenizer` knows one behaviour only: white space to single spaces, NFC, words marked by "▁", unigram pieces
without byte fallback. The vocabulary is trained to need just that, so these files hold nothing but pieces and
constants. They are written as plain JSON: their bytes do not change with the library's version.

`tokenizer.json` and `tokenizer_config.json` are what `transformers` 5 reads; `added_tokens.json` and
`special_tokens_map.json` tell version 4, which starts from `spm.model`, the same.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizer.special import CLS_ID, MASK_TOKEN, SEP_ID, SPECIAL_PIECES, UNK_ID

MODEL_MAX_LENGTH = 512  # of the published models; the relative positions work beyond it

_PAD, _CLS, _SEP, _UNK = SPECIAL_PIECES
_SPECIAL_TOKENS = {
    "bos_token": _CLS,
    "cls_token": _CLS,
    "eos_token": _SEP,
    "mask_token": MASK_TOKEN,
    "pad_token": _PAD,
    "sep_token": _SEP,
    "unk_token": _UNK,
}


def tokenizer_files(pieces: list[tuple[str, float]]) -> dict[str, bytes]:
    """The four files of a vocabulary, by name.

    Args:
        pieces: pieces with scores in order of id; `[MASK]` is not among them and gets the next id.
    """
    trees = {
        "tokenizer.json": _tokenizer(pieces),
        "tokenizer_config.json": {
            **_SPECIAL_TOKENS,
            "tokenizer_class": "DebertaV2Tokenizer",
            "vocab_type": "spm",
            "model_max_length": MODEL_MAX_LENGTH,
            "do_lower_case": False,
            "split_by_punct": False,
            "add_prefix_space": True,
            "unk_id": UNK_ID,
        },
        "special_tokens_map.json": _SPECIAL_TOKENS,
        "added_tokens.json": {MASK_TOKEN: len(pieces)},
    }
    return {name: json.dumps(tree, ensure_ascii=False, indent=1).encode() for name, tree in trees.items()}


def _tokenizer(pieces: list[tuple[str, float]]) -> dict[str, Any]:
    """The `tokenizers` library's own description of a tokenizer."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    special = [*enumerate(SPECIAL_PIECES), (len(pieces), MASK_TOKEN)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token_id, token) for token_id, token in special],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Replace", "pattern": {"Regex": r"\s{2,}|[\n\r\t]"}, "content": " "},
                {"type": "NFC"},
                {"type": "Strip", "strip_left": False, "strip_right": True},
            ],
        },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(_CLS, 0), _sequence("A", 0), _special(_SEP, 0)],
            "pair": [_special(_CLS, 0), _sequence("A", 0), _special(_SEP, 0), _sequence("B", 1), _special(_SEP, 1)],
            "special_tokens": {
                token: {"id": token, "ids": [token_id], "tokens": [token]}
                for token, token_id in ((_CLS, CLS_ID), (_SEP, SEP_ID))
            },
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": UNK_ID, "vocab": pieces, "byte_fallback": False},
    }


def _added_token(token_id: int, token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": token_id, "content": token, **flags}


def _special(token: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}
