"""Entries of matrices picked by distance, within Triton kernels: other ones from each row or column, [T, T] in all.

Picking goes through shared memory: a store of each entry and a load of each picked one. (`tl.gather` along an axis
takes a dozen instructions an entry, in shuffles.) A warp holds products of matrix units in blocks of 8 x 8; entries are
stored block by block, in an order in which neither the threads that store one meet in a bank nor those that load along
a diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _position(row_block, row, column_block, column, C: tl.constexpr):
    """Where `_pick` has an entry of a matrix with C columns: in which block of 8 x 8, and where in it."""
    return (row_block * (C // 8) + column_block) * 64 + (column % 2) * 32 + row * 4 + column // 2


@triton.jit
def _pick(matrix, positions, step: tl.constexpr, R: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """[T, T] entries of an [R, C] matrix, at `positions` [T, 1, 8] for the first eight columns, `step` on for the next.

    The steps end up in the instructions, so that a thread needs few addresses.
    """
    parts = tl.reshape(matrix, (R // 8, 8, C // 8, 4, 2))
    flat = tl.reshape(tl.permute(parts, (0, 2, 4, 1, 3)), (R * C,))
    positions += tl.arange(0, T // 8)[None, :, None] * step
    return tl.reshape(tl.gather(flat, tl.reshape(positions, (T * T,)), 0), (T, T))


@triton.jit
def held_as(values, like, always):
    """`values`, each held by the thread that holds that entry of `like`, a product; `always` is true.

    A choice between the two, whose outcome the compiler cannot know, has to be made by one thread. Left to itself it
    spreads what is picked over threads row by row, who then meet in banks and cannot hand it to matrix units.
    """
    return tl.where(always, values, like)


@triton.jit
def _rows_and_columns(T: tl.constexpr):
    """[T, 1, 1] and [1, 1, 8]."""
    return tl.arange(0, T)[:, None, None], tl.arange(0, 8)[None, None, :]


@triton.jit
def pick_in_rows(left, right, T: tl.constexpr):
    """[i, j] of two matrices side by side: T + i - j of each row i.

    Of products with chunks c - 1 and c this makes [i, j] of the tile. Of gradients of the tile before (to the left in
    its row) and this one it makes those of the products of queries with chunk c: j and place in the chunk change roles.
    """
    both = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (T, 2 * T))
    i, j = _rows_and_columns(T)
    place = T + i - j
    return _pick(both, _position(i // 8, i % 8, place // 8, place % 8, 2 * T), -64, T, 2 * T, T)


@triton.jit
def _above(upper, lower, T: tl.constexpr):
    """Two [T, T] matrices, one above the other."""
    return tl.reshape(tl.permute(tl.join(upper, lower), (2, 0, 1)), (2 * T, T))


@triton.jit
def pick_in_columns(upper, lower, T: tl.constexpr):
    """[i, j] of two matrices, one above the other: T + i - j of each column j.

    Of products of chunks c - 1 and c with keys this makes [i, j] of the tile.
    """
    i, j = _rows_and_columns(T)
    place = T + i - j
    return _pick(_above(upper, lower, T), _position(place // 8, place % 8, 0, j, T), 64 - 8 * T, 2 * T, T, T)


@triton.jit
def put_back_in_columns(upper, lower, T: tl.constexpr):
    """[place, j] of two matrices, one above the other: place + j of each column j.

    Of gradients of the tile before (above) and this one it makes those of the products of chunk c - 1 with keys.
    """
    place, j = _rows_and_columns(T)
    i = place + j
    return _pick(_above(upper, lower, T), _position(i // 8, i % 8, 0, j, T), 64 + 8 * T, 2 * T, T, T)
