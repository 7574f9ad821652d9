"""Rounds a model's scores, so that every reader of the model finds the same pieces.

A unigram tokenizer takes the segmentation with the highest sum of scores. SentencePiece adds in float32 along the whole
text; `transformers` adds in float64 and begins anew at every word. Where two segmentations are nearly equal, or exactly
as "..." is by ".." + "." and by "." + "..", the rounding of those sums decides: with the trainer's own scores a quarter
of the documents of 30,000 pieces get other ids in the one than in the other, and a word others early than late in them.

Multiples of 2**-8 add up without any rounding while a sum is below 2**24 such steps, about 7000 pieces. The order of
adding is then of no effect, and equal sums are equal everywhere: both libraries keep the one found first. A step is
0.4 % in a piece's probability.
"""

from __future__ import annotations

import struct

from tokenizer.wire import varint

STEPS_PER_UNIT = 256

# The wire format of the two protocol buffer messages that matter: ModelProto { repeated SentencePiece pieces = 1 } and
# SentencePiece { string piece = 1; float score = 2 }. A float has a fixed size, so it can be changed in place.
_BYTES_FIELD_1, _FLOAT_FIELD_2 = 0x0A, 0x15


def round_scores(model: bytes) -> bytes:
    """A serialised SentencePiece model with its scores as multiples of 1 / STEPS_PER_UNIT."""
    data, place = bytearray(model), 0
    while place < len(data) and data[place] == _BYTES_FIELD_1:
        size, message = varint(data, place + 1)
        text_size, text = varint(data, message + 1)
        score = text + text_size
        if data[score] == _FLOAT_FIELD_2:
            (value,) = struct.unpack_from("<f", data, score + 1)
            struct.pack_into("<f", data, score + 1, round(value * STEPS_PER_UNIT) / STEPS_PER_UNIT)
        place = message + size
    return bytes(data)
