"""Triton kernels of disentangled attention: forward, and backward for queries and for keys, without any L x L matrix.

    score(i, j) = scale * ( q_i . k_j  +  q_i . Rk[i - j]  +  Rq[i - j] . k_j )

Rk and Rq hold a row for every distance. Rows and keys are taken in tiles of T x T, tables in chunks of T distances. The
distances of tile (I, J) lie in two chunks, c = I - J ("near its diagonal and above") and c - 1:

    i >= j:  i - j + T (I - J) = T c + (i - j)                 i < j:  ... = T (c - 1) + (i - j + T)

so with the products with chunks c - 1 and c side by side, [i, 2 T], those of entry (i, j) are at T + i - j of row i. A
tile therefore multiplies its queries with both chunks (tensor cores) and picks T products from each row, through shared
memory (`pick_in_rows`). The same for keys and columns (`pick_in_columns`).

The backward pass needs, for a chunk, the gradients of all products with it. They lie in two tiles that are neighbours
in a row, the entries on and below one's diagonal and those above the other's, and again every row picks T of 2 T
places: nothing is scattered, and each tile has one matrix for the chunk that it completes.

Where both chunks lie beyond the largest distance that differs from others ("far"), their rows are all the same: there
the terms of positions are one number a query and one a key, and gradients are sums of rows or columns of the tile.

Products a tile, in units of 2 T T D operations: 5 forward, 8 for queries, 9 for keys; far, or without positions, 2, 3
and 4. Of four products with chunks one is the neighbour's. What limits is the path to shared memory and the first
cache: `benchmarks/compiled_kernels.py`. Memory: inputs, outputs, two numbers a query, and the gradients of Rk and Rq as
one slice for each program: only that program adds to it, so the same input gives the same bits.

Dropout keeps the weight of query i for key j where the product of two random numbers, one of the query and one of the
key, both odd, is large enough modulo 2^32: two instructions an element, and 8 bytes a token and head to store. Within a
row or a column, and for any three corners of a rectangle, the products are independent.

Shapes: B rows of L tokens; Q query slots a row; H heads of size D; n = ceil(L / T) blocks; C chunks each side of 0.
Matrices are [rows, H * D] with a stride from row to row: keys and values have one, Rk and Rq have one, gradients of
queries, keys and values lie as these do. Scores and sums are fp32; `scale` takes scores to exponents of 2. The
gradients of Rk and Rq still have to be multiplied by scale * ln 2 * keep_scale.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from model.attention_picking import held_as, pick_in_columns, pick_in_rows, put_back_in_columns

LN_2 = tl.constexpr(math.log(2))
_ANY_NUMBER = ("batch", "length", "queries", "heads", "chunks", "threshold")
"""No variant of a kernel is compiled for special values of these; strides are multiples of 16 and are told so."""


@triton.jit
def _rows(matrix, rows, stride, inside, D: tl.constexpr):
    """[T, D] rows of a matrix, zeros where not inside."""
    pointers = matrix + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(pointers, mask=inside[:, None], other=0.0)


@triton.jit
def _set_rows(matrix, rows, stride, inside, values, D: tl.constexpr):
    pointers = matrix + rows.to(tl.int64)[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(pointers, values.to(matrix.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _first_of(chunk, chunks, T: tl.constexpr):
    """The first row of a table that a chunk takes up; the outermost ones stand for all beyond."""
    return (tl.minimum(tl.maximum(chunk, -chunks), chunks - 1) + chunks) * T


@triton.jit
def _chunk(table, chunk, chunks, stride, T: tl.constexpr, D: tl.constexpr):
    """[T, D] of a table."""
    rows = _first_of(chunk, chunks, T) + tl.arange(0, T)
    return tl.load(table + rows[:, None] * stride + tl.arange(0, D)[None, :])


@triton.jit
def _add_to_chunk(table, chunk, chunks, stride, values, T: tl.constexpr, D: tl.constexpr):
    """Add [T, D] to a table that is this program's own, without waiting for what is there."""
    rows = _first_of(chunk, chunks, T) + tl.arange(0, T)
    tl.atomic_add(table + rows[:, None] * stride + tl.arange(0, D)[None, :], values, sem="relaxed")


@triton.jit
def _product(left, right):
    """Of two matrices, accumulated in fp32; fp32 operands are not rounded."""
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _add_far(d_states, states, far, relative, mine, chunk, chunks, stride, width, T: tl.constexpr, D: tl.constexpr):
    """Gradients [T, D] of states with those from far tiles on one side, whose scores' gradients sum up to `far` [T].

    Also that of the row of the table which all these tiles read.
    """
    row, place = _first_of(chunk, chunks, T), tl.arange(0, D)
    tl.atomic_add(mine + row * width + place, tl.sum(far[:, None] * states.to(tl.float32), 0), sem="relaxed")
    return d_states + far[:, None] * tl.load(relative + row * stride + place).to(tl.float32)[None, :]


@triton.jit
def _beyond(chunk, chunks):
    """Whether chunks c and c - 1 both lie beyond the table or are its outermost one, whose rows are all the same."""
    return (chunk >= chunks) | (chunk <= -chunks)


@triton.jit
def _far_scores(q, k, relative_key, relative_query, chunk, chunks, stride, T: tl.constexpr, D: tl.constexpr):
    """[T, T] scores of a tile that is far: all distances have the first row of the chunk."""
    row = _first_of(chunk, chunks, T) * stride + tl.arange(0, D)
    of_query = tl.sum(q.to(tl.float32) * tl.load(relative_key + row).to(tl.float32)[None, :], 1)
    of_key = tl.sum(k.to(tl.float32) * tl.load(relative_query + row).to(tl.float32)[None, :], 1)
    return _product(q, tl.trans(k)) + of_query[:, None] + of_key[None, :]


@triton.jit
def _of_queries(q, relative_key, chunk, chunks, stride, T: tl.constexpr, D: tl.constexpr):
    """[i, place] products of queries with a chunk."""
    return _product(q, tl.trans(_chunk(relative_key, chunk, chunks, stride, T, D)))


@triton.jit
def _of_keys(relative_query, k, chunk, chunks, stride, T: tl.constexpr, D: tl.constexpr):
    """[place, j] products of a chunk with keys."""
    return _product(_chunk(relative_query, chunk, chunks, stride, T, D), tl.trans(k))


@triton.jit
def _near_scores(q, k, left, right, upper, lower, T: tl.constexpr):
    """[T, T] scores of a tile before scaling, given products of queries and of keys with chunks c - 1 and c."""
    return _product(q, tl.trans(k)) + pick_in_rows(left, right, T) + pick_in_columns(upper, lower, T)


@triton.jit
def _scores_and_left(
    q, k, right, relative_key, relative_query, chunk, chunks, stride, far, T: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """[T, T] scores of a tile before scaling, given the products of its queries with chunk c (`right`).

    Also those with chunk c - 1, which is chunk c of the next tile in the row. Far tiles hand on what they are given: it
    is that of the outermost chunk.
    """
    if far:
        left = right
        scores = _far_scores(q, k, relative_key, relative_query, chunk, chunks, stride, T, D)
    else:
        left = _of_queries(q, relative_key, chunk - 1, chunks, stride, T, D)
        upper = _of_keys(relative_query, k, chunk - 1, chunks, stride, T, D)
        lower = _of_keys(relative_query, k, chunk, chunks, stride, T, D)
        scores = _near_scores(q, k, left, right, upper, lower, T)
    return scores, left


@triton.jit
def _noise(noise, row_and_head, side: tl.constexpr, place, length):
    """[T] numbers of queries (side 0) or keys (side 1) at these places."""
    return tl.load(noise + (2 * row_and_head + side) * length + place, mask=place < length, other=1)


@triton.jit
def _kept(of_query, of_key, threshold):
    """[T, T] whether dropout keeps the weight of query i for key j; in torch, `model.attention_operator.kept`."""
    return of_query[:, None] * of_key[None, :] >= threshold


@triton.jit
def _within(first, last, block, T: tl.constexpr):
    """[T, T] which tokens of another block each token may attend to: counted from there, 32 bits are enough."""
    place = tl.arange(0, T)[None, :]
    return (place >= (first - block * T)[:, None]) & (place < (last - block * T)[:, None])


@triton.jit
def _span(first, last, inside, length, T: tl.constexpr):
    """Blocks [low, high) in which something is that one of these tokens may attend to."""
    low = tl.min(tl.where(inside, first, length), 0)
    high = tl.max(tl.where(inside, last, 0), 0)
    return low // T, (high + T - 1) // T


@triton.jit
def _slots(slots, row, i, length, queries, SUBSET: tl.constexpr):
    """Where the queries at places i of a row are, among those of all rows, and which of the places have one."""
    if SUBSET:
        slot = tl.load(slots + row * length + i, mask=i < length, other=-1)
        return row * queries + slot, slot >= 0
    return row * length + i, i < length


@triton.jit(do_not_specialize=_ANY_NUMBER)
def forward(
    query, key, value, relative_key, relative_query, first, last, slots, noise, out, log_total,
    query_stride, key_stride, table_stride, length, queries, heads, chunks,
    scale, threshold, keep_scale,
    DROPOUT: tl.constexpr, SUBSET: tl.constexpr, FAR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: contexts [B, Q, H, D] and logarithms of the soft-max's total [B, H, Q].

    Grid: (n * B * H), the blocks of one row and head side by side.
    """
    blocks = (length + T - 1) // T
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    head, row = pair % heads, pair // heads
    width = heads * D
    relative_key, relative_query = relative_key + head * D, relative_query + head * D
    place = tl.arange(0, T)
    i = block * T + place
    at, inside = _slots(slots, row, i, length, queries, SUBSET)
    i_first = tl.load(first + row * length + i, mask=inside, other=0)
    i_last = tl.load(last + row * length + i, mask=inside, other=0)
    low, high = _span(i_first, i_last, inside, length, T)

    q = _rows(query + head * D, at, query_stride, inside, D)
    top = tl.full([T], float("-inf"), tl.float32)
    total = tl.zeros([T], tl.float32)
    context = tl.zeros([T, D], tl.float32)
    right = _of_queries(q, relative_key, block - low, chunks, table_stride, T, D)
    if DROPOUT:
        of_query = _noise(noise, pair, 0, i, length)
    for other in range(low, high):
        j = other * T + place
        k = _rows(key + head * D, row * length + j, key_stride, j < length, D)
        chunk = block - other
        far = FAR and _beyond(chunk, chunks)
        scores, right = _scores_and_left(
            q, k, right, relative_key, relative_query, chunk, chunks, table_stride, far, T, D
        )
        scores = tl.where(_within(i_first, i_last, other, T), scores, float("-inf"))

        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            weights = tl.where(_kept(of_query, _noise(noise, pair, 1, j, length), threshold), weights, 0.0)
        v = _rows(value + head * D, row * length + j, key_stride, j < length, D)
        context = context * shrink[:, None] + _product(weights.to(v.dtype), v)
        top = new_top

    some = total > 0
    context = context * (keep_scale / tl.where(some, total, 1.0))[:, None]
    _set_rows(out + head * D, at, width, inside, context, D)
    # Infinite where there is no key, so that the backward pass finds weights of zero.
    log = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(log_total + (row * heads + head) * queries + (at - row * queries), log, mask=inside)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def backward_queries(
    query, key, value, relative_key, relative_query, first, last, slots, noise, out, log_total, grad_out,
    alignment, grad_query, grad_relative_key,
    query_stride, key_stride, table_stride, batch, length, queries, heads, chunks,
    scale, threshold, keep_scale, kept_share,
    DROPOUT: tl.constexpr, SUBSET: tl.constexpr, FAR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries of one head in some rows, and of Rk as far as these queries saw it.

    Also `alignment` [B, H, Q], the product of each context with its gradient and the share that dropout keeps, for
    `backward_keys`. Until the end gradients are in units of 1 / that share. Grid: (n, H, G); the programs of group g
    take the rows g, g + G, ...; `grad_relative_key` is [G * n, 2 C T, H, D].
    """
    block, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = heads * D
    relative_key, relative_query = relative_key + head * D, relative_query + head * D
    place = tl.arange(0, T)
    i = block * T + place
    program = group * tl.num_programs(0) + block
    mine = grad_relative_key + program.to(tl.int64) * (2 * chunks * T) * width + head * D
    for row in range(group, batch, tl.num_programs(2)):
        at, inside = _slots(slots, row, i, length, queries, SUBSET)
        i_first = tl.load(first + row * length + i, mask=inside, other=0)
        i_last = tl.load(last + row * length + i, mask=inside, other=0)
        low, high = _span(i_first, i_last, inside, length, T)
        numbers = (row * heads + head) * queries + (at - row * queries)

        q = _rows(query + head * D, at, query_stride, inside, D)
        d_out = _rows(grad_out + head * D, at, width, inside, D)
        aligned = tl.sum(d_out.to(tl.float32) * _rows(out + head * D, at, width, inside, D).to(tl.float32), 1)
        aligned *= kept_share
        tl.store(alignment + numbers, aligned, mask=inside)
        log = tl.load(log_total + numbers, mask=inside, other=float("inf"))
        d_query = tl.zeros([T, D], tl.float32)
        nothing = tl.zeros([T, T], tl.float32)
        before = nothing
        far_left, far_right = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        right = _of_queries(q, relative_key, block - low, chunks, table_stride, T, D)
        if DROPOUT:
            of_query = _noise(noise, row * heads + head, 0, i, length)
        for other in range(low, high):
            j = other * T + place
            k = _rows(key + head * D, row * length + j, key_stride, j < length, D)
            v = _rows(value + head * D, row * length + j, key_stride, j < length, D)
            chunk = block - other
            far = FAR and _beyond(chunk, chunks)
            scores, right = _scores_and_left(
                q, k, right, relative_key, relative_query, chunk, chunks, table_stride, far, T, D
            )
            scores = tl.where(_within(i_first, i_last, other, T), scores, float("-inf"))
            weights = tl.exp2(scores * scale - log[:, None])
            d_weights = _product(d_out, tl.trans(v))
            if DROPOUT:
                keep = _kept(of_query, _noise(noise, row * heads + head, 1, j, length), threshold)
                d_weights = tl.where(keep, d_weights, 0.0)
            d_scores = weights * (d_weights - aligned[:, None])

            d_query += _product(d_scores.to(k.dtype), k)
            if far:
                far_sum = tl.sum(d_scores, 1)
                far_left += tl.where(chunk > 0, far_sum, 0.0)
                far_right += tl.where(chunk > 0, 0.0, far_sum)
            else:
                d_products = held_as(pick_in_rows(before, d_scores, T), d_scores, length > 0).to(q.dtype)
                d_query += _product(d_products, _chunk(relative_key, chunk, chunks, table_stride, T, D))
                _add_to_chunk(mine, chunk, chunks, width, _product(tl.trans(d_products), q), T, D)
                before = d_scores
        d_products = held_as(pick_in_rows(before, nothing, T), before, length > 0).to(q.dtype)
        d_query += _product(d_products, _chunk(relative_key, block - high, chunks, table_stride, T, D))
        _add_to_chunk(mine, block - high, chunks, width, _product(tl.trans(d_products), q), T, D)
        if FAR:
            d_query = _add_far(d_query, q, far_left, relative_key, mine, chunks, chunks, table_stride, width, T, D)
            d_query = _add_far(d_query, q, far_right, relative_key, mine, -chunks, chunks, table_stride, width, T, D)
        _set_rows(grad_query + head * D, at, query_stride, inside, d_query * (scale * LN_2 * keep_scale), D)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def backward_keys(
    query, key, value, relative_key, relative_query, first, last, slots, noise, log_total, grad_out,
    alignment, grad_key, grad_value, grad_relative_query,
    query_stride, key_stride, table_stride, batch, length, queries, heads, chunks,
    scale, threshold, keep_scale,
    DROPOUT: tl.constexpr, SUBSET: tl.constexpr, FAR: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values of one head in some rows, and of Rq as far as these keys saw it.

    Whoever may attend to token j, j may attend to: first and last are those of its segment. Grid and slices are those
    of `backward_queries`.
    """
    block, head, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    width = heads * D
    relative_key, relative_query = relative_key + head * D, relative_query + head * D
    place = tl.arange(0, T)
    j = block * T + place
    program = group * tl.num_programs(0) + block
    mine = grad_relative_query + program.to(tl.int64) * (2 * chunks * T) * width + head * D
    for row in range(group, batch, tl.num_programs(2)):
        j_first = tl.load(first + row * length + j, mask=j < length, other=0)
        j_last = tl.load(last + row * length + j, mask=j < length, other=0)
        low, high = _span(j_first, j_last, j < length, length, T)
        k = _rows(key + head * D, row * length + j, key_stride, j < length, D)
        v = _rows(value + head * D, row * length + j, key_stride, j < length, D)
        d_key = tl.zeros([T, D], tl.float32)
        d_value = tl.zeros([T, D], tl.float32)
        nothing = tl.zeros([T, T], tl.float32)
        before = nothing
        far_above, far_below = tl.zeros([T], tl.float32), tl.zeros([T], tl.float32)
        upper = _of_keys(relative_query, k, low - block - 1, chunks, table_stride, T, D)
        if DROPOUT:
            of_key = _noise(noise, row * heads + head, 1, j, length)
        for other in range(low, high):
            i = other * T + place
            at, inside = _slots(slots, row, i, length, queries, SUBSET)
            numbers = (row * heads + head) * queries + (at - row * queries)
            q = _rows(query + head * D, at, query_stride, inside, D)
            d_out = _rows(grad_out + head * D, at, width, inside, D)
            log = tl.load(log_total + numbers, mask=inside, other=float("inf"))
            aligned = tl.load(alignment + numbers, mask=inside, other=0.0)
            chunk = other - block
            far = FAR and _beyond(chunk, chunks)
            if far:
                scores = _far_scores(q, k, relative_key, relative_query, chunk, chunks, table_stride, T, D)
            else:
                left = _of_queries(q, relative_key, chunk - 1, chunks, table_stride, T, D)
                right = _of_queries(q, relative_key, chunk, chunks, table_stride, T, D)
                lower = _of_keys(relative_query, k, chunk, chunks, table_stride, T, D)
                scores = _near_scores(q, k, left, right, upper, lower, T)
                upper = lower  # chunk c of this tile is c - 1 of the next
            i_first = tl.load(first + row * length + i, mask=i < length, other=0)
            i_last = tl.load(last + row * length + i, mask=i < length, other=0)
            scores = tl.where(_within(i_first, i_last, block, T), scores, float("-inf"))
            weights = tl.exp2(scores * scale - log[:, None])
            d_weights = _product(d_out, tl.trans(v))
            dropped = weights
            if DROPOUT:
                keep = _kept(_noise(noise, row * heads + head, 0, i, length), of_key, threshold)
                d_weights = tl.where(keep, d_weights, 0.0)
                dropped = tl.where(keep, weights, 0.0)
            d_value += _product(tl.trans(dropped.to(d_out.dtype)), d_out)
            d_scores = weights * (d_weights - aligned[:, None])

            d_key += _product(tl.trans(d_scores.to(q.dtype)), q)
            if far:
                far_sum = tl.sum(d_scores, 0)
                far_below += tl.where(chunk > 0, far_sum, 0.0)
                far_above += tl.where(chunk > 0, 0.0, far_sum)
            else:
                d_products = held_as(put_back_in_columns(before, d_scores, T), d_scores, length > 0).to(k.dtype)
                d_key += _product(tl.trans(d_products), _chunk(relative_query, chunk - 1, chunks, table_stride, T, D))
                _add_to_chunk(mine, chunk - 1, chunks, width, _product(d_products, k), T, D)
                before = d_scores
        d_products = held_as(put_back_in_columns(before, nothing, T), before, length > 0).to(k.dtype)
        d_key += _product(tl.trans(d_products), _chunk(relative_query, high - block - 1, chunks, table_stride, T, D))
        _add_to_chunk(mine, high - block - 1, chunks, width, _product(d_products, k), T, D)
        if FAR:
            d_key = _add_far(d_key, k, far_below, relative_query, mine, chunks, chunks, table_stride, width, T, D)
            d_key = _add_far(d_key, k, far_above, relative_query, mine, -chunks, chunks, table_stride, width, T, D)
        _set_rows(grad_key + head * D, row * length + j, key_stride, j < length, d_key * (scale * LN_2 * keep_scale), D)
        _set_rows(grad_value + head * D, row * length + j, key_stride, j < length, d_value * keep_scale, D)
