"""The special tokens and their ids, fixed for every vocabulary.

The order is the one of the published mDeBERTaV3 tokenizer. The first four are pieces of the SentencePiece model;
`[MASK]` is none of them: `transformers` appends it, so its id is the number of pieces.
"""

from __future__ import annotations

PAD_ID, CLS_ID, SEP_ID, UNK_ID = range(4)
SPECIAL_PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
MASK_TOKEN = "[MASK]"  # noqa: S105 - no secret
