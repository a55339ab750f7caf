# SPDX-License-Identifier: MIT
"""Attention with a Gaussian bias as one GPU kernel: softmax(q k^T * scaling + S) v, and S never exists as a tensor.

S is zero for prefix tokens; of a query patch in row y, column x and a key patch in row i, column j it is
`amplitude * exp(-Dy / 2 * inverse_variance[0]) * exp(-Dx / 2 * inverse_variance[1])`, D the capped squared distances.
Memory is linear in the number of tokens: what is kept for the backward pass is one number a query and head.

How the work is cut. A program owns a block of queries and walks over the keys; the backward pass does so once for dQ
and the gradients of the three scalars (all of them belong to queries), and once with the parts exchanged for dK and dV.
Nothing is added atomically, so that two runs give the same bits.

How exponentials are saved. A tile of keys is a rectangle of the grid, ROWS x COLUMNS patches. The bias of a block of
queries for the tile is then the outer product of a (BLOCK_M, ROWS) and a (BLOCK_M, COLUMNS) table. Tiles are walked
column by column of tiles, so the second table is computed once for each column of tiles; for a grid as wide as a tile
that is height + width exponentials a query, not height * width. `_key_tile` picks the rectangle with the least work.
A grid that no rectangle fits is padded with masked keys: one more exponential for each pair of patches, the price of
tiles that ignore the grid, costs more than the padding does. Prefix keys are tiles of their own, without a bias.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.utils import logging

from .attention_locat import sdpa_attention_forward
from .locat import Gaussian

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # a machine without it uses another back-end; `unsupported_reason` says so
    triton = None
    constexpr = object  # what follows names it in annotations

logger = logging.get_logger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LOWEST_CAPABILITY = (8, 0)  # the first with bfloat16 and asynchronous copies
LOG2_E = math.log2(math.e)  # exponentials are powers of two on a GPU


def _jit(function):
    return function if triton is None else triton.jit(function)


# ---------------------------------------------------------------------------------------------------------- kernels
# Names are those of FlashAttention: `m_i`, `l_i`, `acc`, `lse`. M counts queries, N keys; `channels` is arange(BLOCK_D)
# with HEAD_DIM real ones. A logit is kept divided by `scaling`, so that the bias costs one multiply-add more
# than plain attention does, and weights are exp2(logit * scale2 - lse_i) with scale2 = scaling * log2(e).


@_jit
def _load_tile(
    base, tokens, token_stride, channels, channel_stride, valid, HEAD_DIM, BLOCK_D: constexpr,
    AGAIN: constexpr = False,
):  # fmt: skip
    """(tokens, BLOCK_D) of one head, zero where a token is not valid or a channel does not exist.

    AGAIN: load anew in every iteration of a loop.
    """
    pointers = base + tokens[:, None] * token_stride + channels[None, :] * channel_stride
    mask = valid[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (channels < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=mask, other=0.0, volatile=AGAIN)


@_jit
def _store_tile(base, tokens, token_stride, channels, valid, tile, HEAD_DIM):
    """Store (tokens, BLOCK_D) into one head of a tensor with contiguous channels."""
    pointers = base + tokens[:, None] * token_stride + channels[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=valid[:, None] & (channels < HEAD_DIM)[None, :])


@_jit
def _load_gaussian(inverse_variance, amplitude, iv_patch, iv_axis, amp_patch, tokens, num_tokens, prefix):
    """Row and column inverse variance and amplitude of queries, zero for a prefix token: no bias."""
    patches = tokens - prefix
    is_patch = (patches >= 0) & (tokens < num_tokens)
    row_inverse_variance = tl.load(inverse_variance + patches * iv_patch, mask=is_patch, other=0.0)
    column_inverse_variance = tl.load(inverse_variance + patches * iv_patch + iv_axis, mask=is_patch, other=0.0)
    return (
        row_inverse_variance,
        column_inverse_variance,
        tl.load(amplitude + patches * amp_patch, mask=is_patch, other=0.0),
    )


@_jit
def _squared_distances(query_positions, key_positions, distance_cap, block_size):
    """(queries, keys) along one axis, between the first patches of blocks and capped, in patches squared."""
    query_positions = query_positions // block_size * block_size
    key_positions = key_positions // block_size * block_size
    distances = (query_positions[:, None] - key_positions[None, :]).to(tl.float32)
    return tl.minimum(distances * distances, distance_cap)


@_jit
def _decay(inverse_variance, squared):
    """exp(-inverse_variance * squared / 2), shape of `squared`; the constant is log2(e) / 2."""
    return tl.exp2(squared * (inverse_variance * -0.7213475204444817)[:, None])


@_jit
def _outer(row_factors, column_factors):
    """(M, ROWS) and (M, COLUMNS) multiplied out to (M, ROWS * COLUMNS), keys in row-major order."""
    M: constexpr = row_factors.shape[0]
    N: constexpr = row_factors.shape[1] * column_factors.shape[1]
    return tl.reshape(row_factors[:, :, None] * column_factors[:, None, :], (M, N))


@_jit
def _absorb(logits, value, m_i, l_i, acc, scale2):
    """One step of the running softmax: largest logit, sum of weights and mixture of values of every query so far."""
    m_new = tl.maximum(m_i, tl.max(logits, 1))
    weights = tl.exp2(logits * scale2 - (m_new * scale2)[:, None])
    correction = tl.exp2((m_i - m_new) * scale2)
    l_i = l_i * correction + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * correction[:, None], input_precision="ieee")
    return m_new, l_i, acc


@_jit
def _forward_kernel(
    query, key, value, inverse_variance, amplitude, output, lse,
    q_batch, q_head, q_token, q_channel,
    k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel,
    iv_batch, iv_head, iv_patch, iv_axis,
    amp_batch, amp_head, amp_patch,
    heads, height, width, prefix, distance_cap, block_size, scaling, scale2,
    HEAD_DIM: constexpr, BLOCK_D: constexpr, BLOCK_M: constexpr, BLOCK_P: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, PADDED: constexpr,
):  # fmt: skip
    """Output (batch, tokens, heads, head_dim) and log2 of the softmax's denominator (batch, heads, tokens)."""
    num_tokens = prefix + height * width
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    is_query = queries < num_tokens
    k_base = key + batch * k_batch + head * k_head
    v_base = value + batch * v_batch + head * v_head

    q_base = query + batch * q_batch + head * q_head
    q = _load_tile(q_base, queries, q_token, channels, q_channel, is_query, HEAD_DIM, BLOCK_D)
    row_inverse_variance, column_inverse_variance, query_amplitude = _load_gaussian(
        inverse_variance + batch * iv_batch + head * iv_head, amplitude + batch * amp_batch + head * amp_head,
        iv_patch, iv_axis, amp_patch, queries, num_tokens, prefix,
    )  # fmt: skip
    query_amplitude = query_amplitude / scaling
    query_rows = (queries - prefix) // width
    query_columns = (queries - prefix) % width

    m_i = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l_i = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)

    for start in tl.range(0, prefix, BLOCK_P, num_stages=1):
        keys = start + tl.arange(0, BLOCK_P)
        is_key = keys < prefix
        k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D)
        v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        m_i, l_i, acc = _absorb(logits, v, m_i, l_i, acc, scale2)

    offsets = tl.arange(0, ROWS * COLUMNS)
    for first_column in range(0, width, COLUMNS):
        squared = _squared_distances(query_columns, first_column + tl.arange(0, COLUMNS), distance_cap, block_size)
        column_factors = _decay(column_inverse_variance, squared) * query_amplitude[:, None]
        key_columns = first_column + offsets % COLUMNS
        for first_row in range(0, height, ROWS):
            key_rows = first_row + offsets // COLUMNS
            keys = prefix + key_rows * width + key_columns
            is_key = (key_rows < height) & (key_columns < width)
            k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D)
            v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D)
            squared_rows = _squared_distances(query_rows, first_row + tl.arange(0, ROWS), distance_cap, block_size)
            bias = _outer(_decay(row_inverse_variance, squared_rows), column_factors)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") + bias
            if PADDED:
                logits = tl.where(is_key[None, :], logits, float("-inf"))
            m_i, l_i, acc = _absorb(logits, v, m_i, l_i, acc, scale2)

    out_base = output + (batch * num_tokens * heads + head) * HEAD_DIM
    _store_tile(out_base, queries, heads * HEAD_DIM, channels, is_query, acc / l_i[:, None], HEAD_DIM)
    lse_base = lse + (batch * heads + head) * num_tokens
    tl.store(lse_base + queries, m_i * scale2 + tl.log2(l_i), mask=is_query)


@_jit
def _query_gradient_kernel(
    query, key, value, inverse_variance, amplitude, output, lse, d_output,
    d_query, d_inverse_variance, d_amplitude, deltas,
    q_batch, q_head, q_token, q_channel,
    k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel,
    iv_batch, iv_head, iv_patch, iv_axis,
    amp_batch, amp_head, amp_patch,
    do_batch, do_head, do_token, do_channel,
    heads, height, width, prefix, distance_cap, block_size, scaling, scale2,
    HEAD_DIM: constexpr, BLOCK_D: constexpr, BLOCK_M: constexpr, BLOCK_P: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, PADDED: constexpr,
):  # fmt: skip
    """Everything that belongs to a query: dQ, the gradients of its three scalars, and delta = sum(dO * O) for dK."""
    num_tokens = prefix + height * width
    blocks = tl.cdiv(num_tokens, BLOCK_M)
    batch = (tl.program_id(0) // blocks // heads).to(tl.int64)
    head = (tl.program_id(0) // blocks % heads).to(tl.int64)
    queries = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_D)
    is_query = queries < num_tokens
    k_base = key + batch * k_batch + head * k_head
    v_base = value + batch * v_batch + head * v_head
    token_base = (batch * num_tokens * heads + head) * HEAD_DIM
    query_base = (batch * heads + head) * num_tokens

    q_base = query + batch * q_batch + head * q_head
    do_base = d_output + batch * do_batch + head * do_head
    do = _load_tile(do_base, queries, do_token, channels, do_channel, is_query, HEAD_DIM, BLOCK_D)
    out = _load_tile(output + token_base, queries, heads * HEAD_DIM, channels, 1, is_query, HEAD_DIM, BLOCK_D)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(deltas + query_base + queries, delta, mask=is_query)
    q = _load_tile(q_base, queries, q_token, channels, q_channel, is_query, HEAD_DIM, BLOCK_D)
    lse_i = tl.load(lse + query_base + queries, mask=is_query, other=0.0)
    row_inverse_variance, column_inverse_variance, query_amplitude = _load_gaussian(
        inverse_variance + batch * iv_batch + head * iv_head, amplitude + batch * amp_batch + head * amp_head,
        iv_patch, iv_axis, amp_patch, queries, num_tokens, prefix,
    )  # fmt: skip
    query_rows = (queries - prefix) // width
    query_columns = (queries - prefix) % width

    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_query_amplitude = tl.zeros((BLOCK_M,), tl.float32)
    d_row = tl.zeros((BLOCK_M,), tl.float32)
    d_column = tl.zeros((BLOCK_M,), tl.float32)

    for start in tl.range(0, prefix, BLOCK_P, num_stages=1):
        keys = start + tl.arange(0, BLOCK_P)
        is_key = keys < prefix  # what is not has k = 0: it adds nothing to dq
        k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D)
        v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        weights = tl.where(is_key[None, :], tl.exp2(logits * scale2 - lse_i[:, None]), 0.0)
        d_logits = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision="ieee")

    offsets = tl.arange(0, ROWS * COLUMNS)
    for first_column in range(0, width, COLUMNS):
        squared_columns = _squared_distances(
            query_columns, first_column + tl.arange(0, COLUMNS), distance_cap, block_size
        )
        column_factors = _decay(column_inverse_variance, squared_columns)
        key_columns = first_column + offsets % COLUMNS
        d_bias_columns = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
        for first_row in range(0, height, ROWS):
            key_rows = first_row + offsets // COLUMNS
            keys = prefix + key_rows * width + key_columns
            is_key = (key_rows < height) & (key_columns < width)
            k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D)
            v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D)
            squared_rows = _squared_distances(query_rows, first_row + tl.arange(0, ROWS), distance_cap, block_size)
            # Here the bias is kept without its amplitude: that is what the gradient of the amplitude multiplies.
            shape = _outer(_decay(row_inverse_variance, squared_rows), column_factors)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") + shape * (query_amplitude / scaling)[:, None]
            weights = tl.exp2(logits * scale2 - lse_i[:, None])
            if PADDED:
                weights = tl.where(is_key[None, :], weights, 0.0)
            d_logits = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
            dq = tl.dot(d_logits.to(k.dtype), k, dq, input_precision="ieee")
            d_shape = tl.reshape(d_logits * shape, (BLOCK_M, ROWS, COLUMNS))
            d_bias_columns += tl.sum(d_shape, 1)
            d_row += tl.sum(tl.sum(d_shape * squared_rows[:, :, None], 1), 1)
        d_query_amplitude += tl.sum(d_bias_columns, 1)
        d_column += tl.sum(d_bias_columns * squared_columns, 1)

    _store_tile(d_query + token_base, queries, heads * HEAD_DIM, channels, is_query, dq * scaling, HEAD_DIM)
    is_patch = is_query & (queries >= prefix)
    patches = (batch * heads + head) * (height * width) + queries - prefix
    tl.store(d_amplitude + patches, d_query_amplitude, mask=is_patch)
    tl.store(d_inverse_variance + 2 * patches, d_row * query_amplitude * -0.5, mask=is_patch)
    tl.store(d_inverse_variance + 2 * patches + 1, d_column * query_amplitude * -0.5, mask=is_patch)


@_jit
def _key_value_gradient_kernel(
    query, key, value, inverse_variance, amplitude, lse, d_output, d_key, d_value, deltas,
    q_batch, q_head, q_token, q_channel,
    k_batch, k_head, k_token, k_channel,
    v_batch, v_head, v_token, v_channel,
    iv_batch, iv_head, iv_patch, iv_axis,
    amp_batch, amp_head, amp_patch,
    do_batch, do_head, do_token, do_channel,
    heads, height, width, prefix, distance_cap, block_size, scaling, scale2,
    HEAD_DIM: constexpr, BLOCK_D: constexpr, BLOCK_M: constexpr,
    ROWS: constexpr, COLUMNS: constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys. The first tiles hold the prefix keys: there the amplitude is zero."""
    BLOCK_N: constexpr = ROWS * COLUMNS
    num_tokens = prefix + height * width
    prefix_tiles = tl.cdiv(prefix, BLOCK_N)
    tiles_across = tl.cdiv(width, COLUMNS)
    tiles = prefix_tiles + tiles_across * tl.cdiv(height, ROWS)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    tile = tl.program_id(0) % tiles
    is_prefix = tile < prefix_tiles
    grid_tile = tl.maximum(tile - prefix_tiles, 0)
    first_row = grid_tile // tiles_across * ROWS
    first_column = grid_tile % tiles_across * COLUMNS

    offsets = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D)
    key_rows = first_row + offsets // COLUMNS
    key_columns = first_column + offsets % COLUMNS
    keys = tl.where(is_prefix, tile * BLOCK_N + offsets, prefix + key_rows * width + key_columns)
    is_key = tl.where(is_prefix, keys < prefix, (key_rows < height) & (key_columns < width))
    k_base = key + batch * k_batch + head * k_head
    v_base = value + batch * v_batch + head * v_head
    k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D)
    v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D)

    q_base = query + batch * q_batch + head * q_head
    do_base = d_output + batch * do_batch + head * do_head
    query_base = (batch * heads + head) * num_tokens
    unit = tl.where(is_prefix, 0.0, 1.0 / scaling)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, num_tokens, BLOCK_M):
        if q_base.dtype.element_ty == tl.float32:
            # Ordinary units take operands from registers: tiles held there all through the loop would push others out.
            k = _load_tile(k_base, keys, k_token, channels, k_channel, is_key, HEAD_DIM, BLOCK_D, True)
            v = _load_tile(v_base, keys, v_token, channels, v_channel, is_key, HEAD_DIM, BLOCK_D, True)
        # What is no query has q = dO = delta = 0 and finite weights: it adds nothing. What is no key is not stored.
        queries = start + tl.arange(0, BLOCK_M)
        is_query = queries < num_tokens
        q = _load_tile(q_base, queries, q_token, channels, q_channel, is_query, HEAD_DIM, BLOCK_D)
        do = _load_tile(do_base, queries, do_token, channels, do_channel, is_query, HEAD_DIM, BLOCK_D)
        lse_i = tl.load(lse + query_base + queries, mask=is_query, other=0.0)
        delta = tl.load(deltas + query_base + queries, mask=is_query, other=0.0)
        row_inverse_variance, column_inverse_variance, query_amplitude = _load_gaussian(
            inverse_variance + batch * iv_batch + head * iv_head, amplitude + batch * amp_batch + head * amp_head,
            iv_patch, iv_axis, amp_patch, queries, num_tokens, prefix,
        )  # fmt: skip
        query_rows = (queries - prefix) // width
        query_columns = (queries - prefix) % width
        squared = _squared_distances(query_rows, first_row + tl.arange(0, ROWS), distance_cap, block_size)
        row_factors = _decay(row_inverse_variance, squared) * (query_amplitude * unit)[:, None]
        squared = _squared_distances(query_columns, first_column + tl.arange(0, COLUMNS), distance_cap, block_size)
        bias = _outer(row_factors, _decay(column_inverse_variance, squared))
        logits = tl.dot(q, tl.trans(k), input_precision="ieee") + bias
        weights = tl.exp2(logits * scale2 - lse_i[:, None])
        dv = tl.dot(tl.trans(weights.to(do.dtype)), do, dv, input_precision="ieee")
        d_logits = weights * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dk = tl.dot(tl.trans(d_logits.to(q.dtype)), q, dk, input_precision="ieee")

    token_base = (batch * num_tokens * heads + head) * HEAD_DIM
    _store_tile(d_key + token_base, keys, heads * HEAD_DIM, channels, is_key, dk * scaling, HEAD_DIM)
    _store_tile(d_value + token_base, keys, heads * HEAD_DIM, channels, is_key, dv, HEAD_DIM)


# ------------------------------------------------------------------------------------------------------------- tiles


class Tiles(NamedTuple):
    """How a kernel is cut: queries and keys of a tile, warps of a program, depth of the load pipeline."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def options(self) -> dict[str, int | bool | None]:
        """What the compiler is told. Releases of Triton differ in whether they fuse a product and a sum unasked."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
            "enable_fp_fusion": True,
        }


# By bytes of an element and channels of a padded head. A fixed table: no warm-up, the same bits in every process. The
# entries were chosen by what the compiler reports, not by timing: on sm_80, as on consumer GPUs, shared memory below
# their 99 KB; few or no registers spilled there and on sm_90. Eight warps a program; with 128 registers a thread two
# programs share a multiprocessor, one computing exponentials while the other multiplies. float32 runs on the ordinary
# units, which take operands from registers: small tiles are what fits.
FORWARD_TILES = {
    (2, 32): Tiles(128, 64, 8, 3),
    (2, 64): Tiles(128, 64, 8, 3, max_registers=128),
    (2, 128): Tiles(128, 64, 8, 2),
    (4, 32): Tiles(64, 32, 8, 2),
    (4, 64): Tiles(64, 32, 8, 2),
    (4, 128): Tiles(32, 32, 8, 2),
}
QUERY_GRADIENT_TILES = {
    (2, 32): Tiles(128, 64, 8, 3),
    (2, 64): Tiles(128, 64, 8, 2),
    (2, 128): Tiles(128, 32, 8, 2),
    (4, 32): Tiles(32, 32, 4, 2),
    (4, 64): Tiles(32, 32, 4, 2),
    (4, 128): Tiles(32, 16, 8, 2),
}
KEY_VALUE_GRADIENT_TILES = {
    (2, 32): Tiles(128, 64, 8, 2),
    (2, 64): Tiles(128, 64, 8, 2),
    (2, 128): Tiles(64, 64, 8, 2),
    (4, 32): Tiles(32, 32, 8, 2),
    (4, 64): Tiles(32, 32, 8, 2),
    (4, 128): Tiles(16, 16, 8, 2),
}


def _key_tile(height: int, width: int, keys: int, columns_once: bool) -> tuple[int, int]:
    """Rows and columns, both powers of two, of the tile of `keys` patches that covers a grid with the least work.

    The unit is an exponential a query: one for each key, padding included; one for each row of a tile, four times, as
    the four threads that share a query's logits each need all rows; one for each column, for every tile or
    (columns_once) for every column of tiles.
    """

    def work(columns: int) -> int:
        rows = keys // columns
        across, down = -(-width // columns), -(-height // rows)
        return across * (down * (keys + 4 * rows) + columns * (1 if columns_once else down))

    # A tile of one row would need the fewest, and so many registers for its columns that others spill.
    columns = min((2**power for power in range(keys.bit_length() - 2, -1, -1)), key=work)
    return keys // columns, columns


def _prefix_block(num_prefix_tokens: int) -> int:
    """Keys of a prefix tile: a power of two, at least the 16 that a matrix unit takes."""
    return min(max(16, 1 << (num_prefix_tokens - 1).bit_length()), 64)


# ----------------------------------------------------------------------------------------------------- torch operators
# torch.compile takes an operator as one node and never looks inside; eager mode calls the same functions directly.
# A file that travels may be loaded from several repositories into one process: the namespace holds its module's name.

NAMESPACE = "locatvit_" + re.sub(r"\W", "_", __name__)
GEOMETRY = "SymInt height, SymInt width, SymInt prefix, float distance_cap, SymInt block_size, float scaling"


def _kernel_arguments(query, key, value, inverse_variance, amplitude, geometry) -> tuple[list[int], tuple]:
    """What every kernel takes alike: strides, and the numbers that describe the grid."""
    tensors = (query, key, value, inverse_variance, amplitude)
    return [stride for tensor in tensors for stride in tensor.stride()], (
        query.shape[1],
        *geometry,
        geometry[-1] * LOG2_E,
    )


def _forward(query, key, value, inverse_variance, amplitude, *geometry):
    """geometry: what GEOMETRY names. Returns the output (batch, tokens, heads, head_dim) and what backward needs."""
    batch, heads, tokens, head_dim = query.shape
    height, width, prefix = geometry[:3]
    output = query.new_empty((batch, tokens, heads, head_dim))
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    strides, numbers = _kernel_arguments(query, key, value, inverse_variance, amplitude, geometry)
    block_d = triton.next_power_of_2(head_dim)
    tiles = FORWARD_TILES[query.element_size(), block_d]
    rows, columns = _key_tile(height, width, tiles.keys, columns_once=True)
    with torch.cuda.device_of(query):
        _forward_kernel[(triton.cdiv(tokens, tiles.queries) * batch * heads,)](
            query, key, value, inverse_variance, amplitude, output, lse, *strides, *numbers,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tiles.queries, BLOCK_P=_prefix_block(prefix),
            ROWS=rows, COLUMNS=columns, PADDED=bool(height % rows or width % columns),
            **tiles.options(),
        )  # fmt: skip
    return output, lse


def _backward(d_output, output, lse, query, key, value, inverse_variance, amplitude, *geometry):
    """Gradients of query, key and value, (batch, tokens, heads, head_dim), of inverse_variance and of amplitude."""
    batch, heads, tokens, head_dim = query.shape
    height, width, prefix = geometry[:3]
    d_query, d_key, d_value = (torch.empty_like(output) for _ in range(3))
    d_inverse_variance = query.new_empty(inverse_variance.shape, dtype=torch.float32)
    d_amplitude = query.new_empty(amplitude.shape, dtype=torch.float32)
    deltas = torch.empty_like(lse)
    strides, numbers = _kernel_arguments(query, key, value, inverse_variance, amplitude, geometry)
    strides += [d_output.stride(axis) for axis in (0, 2, 1, 3)]
    block_d = triton.next_power_of_2(head_dim)
    with torch.cuda.device_of(query):
        # In this order: the first kernel also writes the deltas that the second reads.
        tiles = QUERY_GRADIENT_TILES[query.element_size(), block_d]
        rows, columns = _key_tile(height, width, tiles.keys, columns_once=True)
        _query_gradient_kernel[(triton.cdiv(tokens, tiles.queries) * batch * heads,)](
            query, key, value, inverse_variance, amplitude, output, lse, d_output,
            d_query, d_inverse_variance, d_amplitude, deltas, *strides, *numbers,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tiles.queries, BLOCK_P=_prefix_block(prefix),
            ROWS=rows, COLUMNS=columns, PADDED=bool(height % rows or width % columns),
            **tiles.options(),
        )  # fmt: skip
        tiles = KEY_VALUE_GRADIENT_TILES[query.element_size(), block_d]
        rows, columns = _key_tile(height, width, tiles.keys, columns_once=False)
        key_tiles = triton.cdiv(prefix, tiles.keys) + triton.cdiv(height, rows) * triton.cdiv(width, columns)
        _key_value_gradient_kernel[(key_tiles * batch * heads,)](
            query, key, value, inverse_variance, amplitude, lse, d_output, d_key, d_value, deltas,
            *strides, *numbers,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=tiles.queries, ROWS=rows, COLUMNS=columns,
            **tiles.options(),
        )  # fmt: skip
    return d_query, d_key, d_value, d_inverse_variance, d_amplitude


_forward_operator = torch.library.custom_op(
    f"{NAMESPACE}::attention",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor inverse_variance, Tensor amplitude, "
    f"{GEOMETRY}) -> (Tensor, Tensor)",
)
_backward_operator = torch.library.custom_op(
    f"{NAMESPACE}::attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor d_output, Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor inverse_variance, Tensor amplitude, {GEOMETRY}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_forward_operator.register_fake
def _forward_shapes(query, key, value, inverse_variance, amplitude, *geometry):
    batch, heads, tokens, head_dim = query.shape
    lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    return query.new_empty((batch, tokens, heads, head_dim)), lse


@_backward_operator.register_fake
def _backward_shapes(d_output, output, lse, query, key, value, inverse_variance, amplitude, *geometry):
    scalars = (query.new_empty(tensor.shape, dtype=torch.float32) for tensor in (inverse_variance, amplitude))
    return *(torch.empty_like(output) for _ in range(3)), *scalars


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the log sums have no gradient: no zeros for it
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.geometry = inputs[5:]


def _gradients(ctx, d_output, _, backward=_backward_operator):
    gradients = backward(d_output, *ctx.saved_tensors, *ctx.geometry)
    return *(gradient.transpose(1, 2) for gradient in gradients[:3]), *gradients[3:], *(None for _ in ctx.geometry)


_forward_operator.register_autograd(_gradients, setup_context=_save)


class _EagerAttention(torch.autograd.Function):
    """The operator without its dispatch, which takes the CPU longer than launching a kernel does."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, d_output, d_lse):
        if torch.is_grad_enabled():  # with create_graph=True
            raise RuntimeError("'locat_fused' has one derivative: use attn_implementation='eager' for a second one.")
        return _gradients(ctx, d_output, d_lse, backward=_backward)


# ------------------------------------------------------------------------------------------------------------- public

# With TRITON_INTERPRET=1 kernels run on CPU: that is how they are tested without a GPU.
INTERPRETED = triton is not None and not isinstance(_forward_kernel, triton.runtime.JITFunction)


def unsupported_reason(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gaussian: Gaussian | None,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> str | None:
    """Why `fused_attention` cannot take these arguments, as half a sentence; None where it can.

    Reads nothing but types, devices, shapes and strides: it never waits for the GPU.
    """
    if triton is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return "the kernel is written for NVIDIA GPUs, and this is the ROCm build of PyTorch"
    if not (INTERPRETED or query.device.type == "cuda"):
        return f"the tensors are on {query.device.type!r}, not on a CUDA device"
    if query.device.type == "cuda":
        properties = torch.cuda.get_device_properties(query.device)  # torch.compile knows this one as a constant
        if (properties.major, properties.minor) < LOWEST_CAPABILITY:
            return "the GPU is older than compute capability 8.0"
    if gaussian is None:
        return "there is no Gaussian, and plain attention is served best by PyTorch"
    if attention_mask is not None:
        return "it takes no attention mask"
    if dropout > 0.0:
        return "it has no dropout"
    if torch._C._are_functorch_transforms_active():
        return "it has one derivative, and no transform of torch.func"
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}, not all bf16, fp16 or fp32"
    if gaussian.inverse_variance.dtype != torch.float32 or gaussian.amplitude.dtype != torch.float32:
        return "the Gaussian is not in float32"
    batch, heads, tokens, head_dim = query.shape
    if head_dim % 16 or not 32 <= head_dim <= 128:
        return f"the head size {head_dim} is not a multiple of 16 from 32 to 128"
    height, width = gaussian.grid
    if key.shape != query.shape or value.shape != query.shape:
        return "query, key and value differ in shape"
    if tokens != gaussian.num_prefix_tokens + height * width:
        return "the tokens are not the prefix tokens and the patches of the grid"
    if gaussian.amplitude.shape != (batch, heads, height * width):
        return "the Gaussian is not one of each head and patch"
    if max(tokens * tensor.stride(2) for tensor in (query, key, value)) + 128 * tokens >= 2**31:
        return "one head spans more than 2**31 elements"
    return None


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gaussian: Gaussian,
    scaling: float,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """softmax(query key^T * scaling + gaussian.bias()) value, without the bias ever being written out.

    query, key, value: (batch, heads, tokens, head_dim), any strides; tokens are the prefix tokens and then the patches.
    Differentiable in all three and in `gaussian.inverse_variance` and `gaussian.amplitude`, once. Products and sums are
    kept in float32; float32 inputs are multiplied in float32, never in TF32.
    Returns (batch, tokens, heads, head_dim), contiguous, as every attention function does.
    Raises ValueError with what `unsupported_reason` says.
    """
    reason = unsupported_reason(query, key, value, gaussian, attention_mask, dropout)
    if reason is None and scaling <= 0.0:
        reason = f"the scaling {scaling} is not above zero"
    if reason is not None:
        raise ValueError(f"The fused attention kernel cannot run: {reason}.")
    attend = _forward_operator if torch.compiler.is_compiling() else _EagerAttention.apply
    output, _ = attend(
        query,
        key,
        value,
        gaussian.inverse_variance,
        gaussian.amplitude,
        *gaussian.grid,
        gaussian.num_prefix_tokens,
        float(gaussian.distance_cap),
        gaussian.block_size,
        float(scaling),
    )
    return output


def fused_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    gaussian: Gaussian | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The backend "locat_fused"; where the kernel cannot run, 'sdpa' and one line that says why.

    Shapes as in `eager_attention_forward`.
    """
    reason = unsupported_reason(query, key, value, gaussian, attention_mask, dropout)
    if reason is None and gaussian is not None:
        return fused_attention(query, key, value, gaussian, scaling), None
    logger.warning_once(f"'locat_fused' is not used: {reason}.")
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling, dropout, gaussian, **kwargs)


# Makes the name legal in transformers; which function runs is decided by the table of the model's family.
AttentionInterface.register("locat_fused", fused_attention_forward)
