#!/usr/bin/env python3
"""FlashAttention: attention that never writes down its matrix.

A GPU has a large slow memory (HBM) and a small fast one (SRAM). Attention over n tokens computes
n × n scores, writes them to the slow memory, reads them back, writes n × n weights, and reads those
back: 4n² numbers. FlashAttention cuts the work into tiles that fit in the fast memory, and no score
and no weight ever crosses. What crosses instead are k and v, once for each block of queries: fewer
numbers, the longer the blocks are. The result is the same.

The script moves the tiles for real and counts every number that crosses between the two memories,
forward and backward. It counts traffic and not time: pure Python has no SRAM that could make it
faster.

How to read it
  1. Read the words below (2 minutes), run `python3 microflash.py` and read what it prints
     (15 minutes).
  2. Read THE TECHNIQUES, in order: sections 1 to 4, 6 and 7 are the core of the chapter
     (40 minutes). Sections 5, 8, 9 and 10 can wait (20 minutes).
  3. THE EXPERIMENTS say how each number of the trace was measured. THE MODEL AND THE BENCH has
     cards and kernels by their sources, references and pictures. SHARED BY THE FIVE, which the five
     scripts of this collection have in common, reads text, prints and parses the command line.

The papers
  Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018,
    arXiv:1805.02867                                                              section 2
  Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with
    IO-Awareness, 2022, arXiv:2205.14135                                    sections 1, 3, 5, 6
  Dao, FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning, 2023, arXiv:2307.08691                                          sections 4, 6
  Dao, Haziza, Massa and Sizov, Flash-Decoding for Long-Context Inference, 2023,
    pytorch.org/blog/flash-decoding                                               section 7
  Liu et al., Ring Attention with Blockwise Transformers, 2023, arXiv:2310.01889  section 7
  Kwon et al., PagedAttention (vLLM), 2023, arXiv:2309.06180                      section 8
  Shah et al., FlashAttention-3, 2024, arXiv:2407.08608                           section 9
  Zadouri et al., FlashAttention-4, 2026, arXiv:2603.05451                        section 10
"""

# The words. What is not explained here is explained in the section that uses it.
#
# q, k, v       queries, keys and values, a row for each token: [n_q][d], [n_k][d], [n_k][d_v]
# S, P, O       scores S = q kᵀ · scale and weights P = softmax(S), [n_q][n_k]; output O = P v
# L, or lse     log-sum-exp of a row of scores, log Σ exp(s); the row's weights are exp(s - L)
# head          a query head: one set of queries; attention runs once for each
# KV head       one set of keys and values; several query heads may share it (GQA)
# HBM           the GPU's large memory: tens of gigabytes, slow
# SRAM          the fast memory on the chip, beside the arithmetic: some 200 KB in each SM
# registers     where an SM's arithmetic has its operands; the counts take them as part of SRAM
# channel       one of the d numbers of a query or key, or of the d_v numbers of a value
# SM            streaming multiprocessor: a GPU has about a hundred; they work in parallel
# kernel        a program for the GPU; it reads its inputs from HBM and writes its result there
# tile, block   a block is some consecutive rows of q, or of k and v; a tile is the piece of S for
#               one block of queries and one block of keys
# causal        a token attends to itself and to what came before it
# tensor cores  the part of an SM that multiplies matrices; on an A100 16 times as fast as the rest
# FLOP          a multiplication or an addition of two numbers
# KV cache      k and v of all earlier tokens, kept while a model generates
# decoding      generating one token at a time: one query, and the keys of the KV cache
#
# dot(a, b) is Σ a·b, multiply(a, b) the product of two matrices, transpose(m) the matrix turned,
# add_scaled(a, b, f) is a + f·b. default_scale is 1/√d where no scale is given, and check_… refuses
# what cannot work. These and other small helpers stand further down, and none needs reading now.

from __future__ import annotations

import math
import operator
import os
import random
import re
import sys
import textwrap
import time
import unicodedata
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]

SENTENCE = "This is the cat that killed the rat that ate the malt"
SEQ_LEN = 64       # queries, and keys
HEAD_DIM = 16      # channels of a query, a key and a value
BLOCK_Q = 16       # queries in a tile: the papers' B_r
BLOCK_K = 16       # keys in a tile: the papers' B_c
SRAM = 2048        # numbers that SRAM holds: the papers' M
N_SPLITS = 4       # parts of the cache in section 7
MAX_WORK = 2**19   # seq_len² · head_dim at most, and
MAX_TILES = 2**12  # tiles of scores at most: a run then takes seconds
MAX_TOKENS = 256   # longest text accepted
VOCAB_SIZE = 96    # tokens: each word of SENTENCE is then one token


# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Standard attention and its traffic
#
# A GPU computes in SRAM, which is fast and small, and keeps everything else in HBM, which is large
# and slow. Standard attention runs as three kernels. Each reads its inputs from HBM and writes its
# result back there:
#
#     S = q kᵀ · scale        reads q and k      writes S
#     P = softmax(S)          reads S            writes P
#     O = P v                 reads P and v      writes O
#
# S and P cannot stay in SRAM. At n = 8,192 and 16 bits a number each is 134 MB for one head, and
# the SRAM of all SMs of an A100 together is 18 MB.
#
# So both cross twice, once in each direction: 4n² numbers. The inputs and the output that
# somebody asked for are only 4nd numbers (d channels in each of q, k, v and O). With n = 8,192 and
# d = 128 that is 64 numbers of S and P for each number of q, k, v and O.
#
# The softmax kernel also keeps L, one number a row, which sections 6 and 7 will need:
#
#     L_i = log Σ_j exp(S_ij)         so that    P_ij = exp(S_ij - L_i)
#
# In production: transformers runs these three steps in eager_attention_forward (modeling_llama.py),
# with more passes for the scale, the mask and rounding. PyTorch's scaled_dot_product_attention does
# the same where none of its fused kernels (one for all three steps) fits the arguments.
#
# Measured by show_standard().


@dataclass
class Traffic:
    """The two memories of a GPU: moves tiles between HBM and SRAM and counts what moves.

    sram: how many numbers SRAM holds; None means any number.
    ValueError if SRAM would have to hold more than that.
    """

    sram: int | None = None
    reads: int = 0          # numbers that went from HBM to SRAM
    writes: int = 0         # numbers that went from SRAM to HBM
    held: int = 0           # numbers in SRAM now
    peak: int = 0           # the most that SRAM held at any time
    multiply_adds: int = 0  # made by multiply()
    walk: list[tuple[range, range]] = field(default_factory=list)  # tiles of S: (queries, keys)

    @property
    def accesses(self) -> int:
        """How many numbers crossed, in either direction."""
        return self.reads + self.writes

    def load(self, matrix: Sequence, rows: range) -> list:
        """Copy these rows of a matrix (or numbers of a vector) from HBM into SRAM."""
        tile = copy_rows(matrix[rows.start:rows.stop])
        self.reads += count_numbers(tile)
        self.hold(count_numbers(tile))
        return tile

    def store(self, matrix: list, rows: range, tile: Sequence) -> None:
        """Write a tile from SRAM over these rows of a matrix (or vector) in HBM, or at its end."""
        matrix[rows.start:rows.stop] = tile
        self.writes += count_numbers(tile)

    def hold(self, count: int) -> None:
        """Make room in SRAM for numbers that are computed there."""
        self.held += count
        self.peak = max(self.peak, self.held)
        if self.sram is not None and self.held > self.sram:
            raise ValueError(f"SRAM holds {self.sram} numbers and would have to hold {self.held}")

    def hold_scores(self, queries: range, keys: range) -> None:
        """Make room in SRAM for the scores of this tile, and note that it was visited."""
        self.walk.append((queries, keys))
        self.hold(len(queries) * len(keys))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """Drop from SRAM, at the end of the with block, what came into it since its start."""
        before = self.held
        yield
        self.held = before

    def multiply(self, a: Matrix, b: Matrix) -> Matrix:
        """Return the product a b of two matrices in SRAM: [n][m], [m][p] -> [n][p]."""
        self.multiply_adds += len(a) * len(b) * len(b[0])
        return multiply(a, b)

    def kernel(self, compute: Callable, *inputs: Sequence) -> list:
        """Load inputs whole, compute something from them, and return it, stored in HBM."""
        with self.frame():
            result = compute(*[self.load(m, range(len(m))) for m in inputs])
            stored: list = []
            self.store(stored, range(len(result)), result)
            return stored


def standard_attention(
    q: Matrix, k: Matrix, v: Matrix, *, causal: bool = False, scale: float | None = None,
    traffic: Traffic | None = None,
) -> tuple[Matrix, Vector]:
    """Return (out [n_q][d_v], lse [n_q]), by way of S and P [n_q][n_k] in HBM.

    q [n_q][d], k [n_k][d], v [n_k][d_v]. causal: the queries are the last n_q of the n_k positions,
    and a query sees no later key. scale: 1/√d unless given. A query that sees nothing gets zeros,
    and -inf. Each kernel reads its inputs once, as if SRAM held them whole; real ones read more.
    ValueError where check_inputs() says that shapes do not fit.
    """
    check_inputs(q, k, v)
    queries = range(len(q))
    spans = visible_spans(queries, range(len(k)), len(q), len(k), causal)
    scale = default_scale(scale, k)
    gpu = traffic or Traffic()

    def score(q_held: Matrix, k_held: Matrix) -> Matrix:
        return scale_and_mask(gpu.multiply(q_held, transpose(k_held)), spans, scale)

    # S = q kᵀ · scale
    scores = gpu.kernel(score, q, k)
    # P = softmax(S), and L
    weights = []
    lse = []
    with gpu.frame():
        s = gpu.load(scores, queries)
        gpu.store(weights, queries, list(map(softmax, s)))
        gpu.store(lse, queries, list(map(log_sum_exp, s)))
    # O = P v
    return gpu.kernel(gpu.multiply, weights, v), lse


def scale_and_mask(products: Matrix, spans: Sequence[tuple[int, int]], scale: float) -> Matrix:
    """Return products · scale, but -inf outside spans[i], the keys that query i sees."""
    scores = []
    for row, (first, end) in zip(products, spans):
        seen = [product * scale for product in row[first:end]]
        scores.append([-math.inf] * first + seen + [-math.inf] * (len(row) - end))
    return scores


def log_sum_exp(scores: Vector) -> float:
    """Return L = log Σ exp(s); the largest score is taken out first, so that nothing overflows."""
    m = max(scores, default=-math.inf)
    if m == -math.inf:
        return -math.inf
    return m + math.log(sum(math.exp(s - m) for s in scores))


def visible_spans(
    rows: range, keys: range, n_q: int, n_k: int, causal: bool, window: int | None = None
) -> list[tuple[int, int]]:
    """Return, for each query of a tile, (first, end) of the keys it sees, counted within the tile.

    rows, keys: the tile. The n_q queries are the last of the n_k positions. window: a query sees
    only its own position and the window - 1 before it.
    """
    spans = []
    for i in rows:
        position = n_k - n_q + i
        end = position + 1 if causal else n_k
        first = 0 if window is None else position + 1 - window
        # Cut to the tile, and counted from its first key.
        end = min(max(end, keys.start), keys.stop)
        first = min(max(first, keys.start), end)
        spans.append((first - keys.start, end - keys.start))
    return spans


# 2. Online softmax
#
# Softmax seems to need a whole row of scores before it can begin. First the maximum m, because
# without it exp overflows; then the sum l of exp(s - m); then the weights exp(s - m) / l. Those are
# three passes over the row.
#
# Online softmax computes m and l in one pass, a tile of scores at a time. When a tile brings a
# larger maximum, all that l has summed so far was measured from the wrong m. But it was wrong by
# the same factor everywhere, since
#
#     exp(s - m_old) · exp(m_old - m_new) = exp(s - m_new)
#
# so one multiplication repairs the whole sum:
#
#     m_new = max(m_old, largest score of the tile)
#     c     = exp(m_old - m_new)
#     l_new = c · l_old + Σ exp(s - m_new)
#
# A tiny one, with powers of 2 in place of e. The scores 1, 3 come first, then 2, 5:
#
#     after 1, 3:    m = 3    l = 1/4 + 1 = 5/4
#     after 2, 5:    m = 5    c = 2^(3 - 5) = 1/4    l = 1/4 · 5/4 + 1/8 + 1 = 23/16
#     directly:      l = 2^-4 + 2^-2 + 2^-3 + 2^0 = 23/16
#
# What works for l works for every sum with these weights. The one that attention wants is the sum
# of the rows of v, which only has to be divided by l at the very end:
#
#     o_new = c · o_old + Σ_j exp(s_j - m_new) · v_j          output = o / l
#
# Then the weights themselves are never needed, and one pass over the scores is enough. This step,
# absorb(), is the heart of FlashAttention in all its versions. (If somebody wants the weights, as
# online_softmax() returns them, a second pass is needed: exp(s - L) with L = m + log l.)
#
# In production: flash-attention, csrc/flash_attn/src/softmax.h, Softmax::softmax_rescale_o. It
# computes with exp2, because the hardware does, and folds the factor log2(e) into the scale.
#
# Measured by show_online().


class State(NamedTuple):
    """What one query has gathered from the keys that it has seen."""

    m: float   # the largest score
    l: float   # Σ exp(s - m)
    o: Vector  # Σ exp(s_j - m) · v_j


def empty_state(d_v: int, sink: float | None = None) -> State:
    """Return the state before the first key. (sink: section 8.)"""
    if sink is None:
        return State(-math.inf, 0.0, [0.0] * d_v)
    return State(sink, 1.0, [0.0] * d_v)  # one term, exp(sink - sink), and no value


def absorb(state: State, scores: Vector, columns: Sequence[Sequence[float]]) -> State:
    """Return the state after one more tile of keys: their scores [n], and v by columns [d_v][n]."""
    m_new = max(state.m, max(scores))
    return add_tile(rescale(state, m_new), scores, columns)


def rescale(state: State, m_new: float) -> State:
    """Return the same state measured from m_new."""
    if m_new == state.m:
        return state
    c = math.exp(state.m - m_new)
    return State(m_new, c * state.l, [c * x for x in state.o])


def add_tile(state: State, scores: Vector, columns: Sequence[Sequence[float]]) -> State:
    """Return the state with a tile added to l and o, measured from the m that it has."""
    if state.m == -math.inf:
        return state  # nothing is visible so far
    p = [math.exp(s - state.m) for s in scores]
    o = [x + dot(p, column) for x, column in zip(state.o, columns)]
    return State(state.m, state.l + sum(p), o)


def finish(state: State) -> tuple[Vector, float]:
    """Return (o / l, L) of a query that has seen all its keys: zeros and -inf if it saw none."""
    if state.l == 0:
        return state.o, -math.inf
    return [x / state.l for x in state.o], state.m + math.log(state.l)


def recompute_weights(scores: Vector, lse: float) -> Vector:
    """Return the weights of a row, or of a piece of it, from its L: exp(s - L)."""
    return [math.exp(s - lse) if s > -math.inf else 0.0 for s in scores]


def online_softmax(
    scores: Vector, *, tile: int = 1, traffic: Traffic | None = None
) -> Vector:
    """Return softmax(scores), read twice from HBM: once for m and l, once for the weights.

    tile: scores that are read at a time. Scores of -inf get weight 0.
    ValueError if tile < 1.
    """
    check_counts(tile=tile)
    gpu = traffic or Traffic()
    parts = tiles(range(len(scores)), tile)
    state = empty_state(0)  # no v: nothing is averaged
    for part in parts:
        with gpu.frame():
            state = absorb(state, gpu.load(scores, part), [])
    lse = finish(state)[1]
    weights = []
    for part in parts:
        with gpu.frame():
            gpu.store(weights, part, recompute_weights(gpu.load(scores, part), lse))
    return weights


def tiles(whole: range, block: int) -> list[range]:
    """Return whole, cut into blocks; the last one may be shorter."""
    return [whole[start:start + block] for start in range(0, len(whole), block)]


# 3. FlashAttention: scores that never leave SRAM
#
# The first FlashAttention walks over the tiles of S in two loops. The outer loop brings a block of
# keys and values into SRAM. The inner loop brings one block of queries after another, each with
# what it has gathered so far: o, m and l. The tile of scores is made in SRAM, absorbed and dropped.
# Then o, m and l go back to HBM, because the next block of queries needs the room.
#
#     for each block of queries:     store o = 0, m = -inf, l = 0
#     for each block of keys:        load k, v
#         for each block of queries: load q, o, m, l
#                                    S = q kᵀ · scale        (a tile, in SRAM only)
#                                    o, m, l = absorb(S, v)
#                                    store o, m, l
#
# Nothing of size n × n exists anywhere. Algorithm 1 of the paper keeps o divided by l at all times,
# so each visit multiplies by the old l and divides by the new one.
#
# With a mask, a tile in which no query sees any key is skipped: its q and o are not loaded and its
# scores are not made. (The block of k and v has been loaded by then, even if no query sees it.)
#
# In production: not in this order any more. flash-attention 2.0 replaced it by that of section 4.
# It is here because it is the one in the paper that everybody reads first.
#
# Measured by show_flash_v1().


def flash_attention_v1(
    q: Matrix, k: Matrix, v: Matrix, *, block_q: int, block_k: int, causal: bool = False,
    scale: float | None = None, traffic: Traffic | None = None,
) -> tuple[Matrix, Vector]:
    """Return (out, lse) as standard_attention does, tile by tile: Dao et al. 2022, Algorithm 1.

    block_q, block_k: rows in a block of q, and of k and v; they need not divide anything. HBM is
    left with o, and with m and l, from which lse is made on the way out. ValueError where
    check_inputs() says that shapes do not fit, and for blocks below 1.
    """
    check_inputs(q, k, v, block_q=block_q, block_k=block_k)
    n_q, n_k = len(q), len(k)
    scale = default_scale(scale, k)
    gpu = traffic or Traffic()
    out = []    # o, in HBM
    stats = []  # m and l of each row, in HBM
    gpu.store(out, range(n_q), [[0.0] * len(v[0]) for _ in q])
    gpu.store(stats, range(n_q), [[-math.inf, 0.0] for _ in q])
    for keys in tiles(range(n_k), block_k):
        with gpu.frame():
            k_tile = gpu.load(k, keys)
            v_tile = gpu.load(v, keys)
            for rows in tiles(range(n_q), block_q):
                spans = visible_spans(rows, keys, n_q, n_k, causal)
                if nothing_visible(spans):
                    continue
                with gpu.frame():
                    q_tile = gpu.load(q, rows)
                    o_tile = gpu.load(out, rows)
                    stats_tile = gpu.load(stats, rows)
                    gpu.hold_scores(rows, keys)
                    scores = scale_and_mask(gpu.multiply(q_tile, transpose(k_tile)), spans, scale)
                    # o was kept divided by l: take the division back, and make a new one.
                    states = [State(m, l, [l * x for x in o])
                              for o, (m, l) in zip(o_tile, stats_tile)]
                    states = absorb_tile(states, scores, v_tile)
                    gpu.store(out, rows, [finish(state)[0] for state in states])
                    gpu.store(stats, rows, [[state.m, state.l] for state in states])
    return out, [finish(State(m, l, []))[1] for m, l in stats]


def absorb_tile(states: Sequence[State], scores: Matrix, v_tile: Matrix) -> list[State]:
    """Return the states of a block of queries after a tile: scores [rows][keys], v [keys][d_v]."""
    columns = transpose(v_tile)  # so that each channel of o takes one dot product with the weights
    return [absorb(state, row, columns) for state, row in zip(states, scores)]


def nothing_visible(spans: Sequence[tuple[int, int]]) -> bool:
    """Return whether no query of a tile sees any of its keys."""
    return all(first == end for first, end in spans)


def sram_parts(block_q: int, block_k: int, d: int, d_v: int) -> dict[str, int]:
    """Return what a tile takes of SRAM, by formula; the weights are written over the scores."""
    return {
        "q and o": block_q * (d + d_v),
        "m and l": block_q * 2,
        "k and v": block_k * (d + d_v),
        "scores": block_q * block_k,
    }


# 4. FlashAttention-2: the loops exchanged
#
# Exchange the two loops. Now a block of queries stays in SRAM while all blocks of keys come past,
# so its o, m and l stay there as well, and are written once, when they are finished:
#
#     for each block of queries:     load q;  o, m, l = nothing
#         for each block of keys:    load k, v
#                                    S = q kᵀ · scale        (a tile, in SRAM only)
#                                    o, m, l = absorb(S, v)
#         after the last of them:    store o / l and L = m + log l
#
# The price is that k and v cross once for each block of queries, where version 1 loads them once.
#
# The blocks of queries do not depend on each other now, so each can go to another SM. Besides, the
# division by l waits until the end. (An A100 makes 312 TFLOP/s in its tensor cores and 19.5 outside
# them, so one operation that is no matrix product costs as much as sixteen that are.)
#
# Under a causal mask the tiles above the diagonal are skipped, nearly half if there are many.
# Those on the diagonal are masked, and those below it need no mask. (Kernels do not ask tile by
# tile as this code does: the bounds of their loops say it.)
#
# In production: flash-attention, csrc/flash_attn/src/flash_fwd_kernel.h, compute_attn_1rowblock. It
# walks over the keys from the last block to the first: the masked tiles come first, and the rest of
# its loop needs no mask. PyTorch's scaled_dot_product_attention calls a copy of this kernel.
#
# Measured by show_flash_v2().


def flash_attention(
    q: Matrix, k: Matrix, v: Matrix, *, block_q: int, block_k: int, causal: bool = False,
    window: int | None = None, scale: float | None = None, keys: range | None = None,
    sink: float | None = None, traffic: Traffic | None = None,
) -> tuple[Matrix, Vector]:
    """Return (out, lse) as standard_attention does, tile by tile: FlashAttention-2, Algorithm 1.

    block_q, block_k: rows in a block of q, and of k and v; they need not divide anything.
    window: a query sees only its own position and the window - 1 before it (section 8).
    keys: attend to this run of the keys only, each in its own position (section 7).
    sink: the score of a learned sink (section 8).
    ValueError where check_inputs() finds one: shapes or keys that do not fit, blocks or a window
    below 1.
    """
    check_inputs(q, k, v, keys, block_q=block_q, block_k=block_k, window=window)
    n_q, n_k, d_v = len(q), len(k), len(v[0])
    scale = default_scale(scale, k)
    keys = range(n_k) if keys is None else keys
    gpu = traffic or Traffic()
    out = []
    lse = []
    for rows in tiles(range(n_q), block_q):
        with gpu.frame():
            q_tile = gpu.load(q, rows)
            gpu.hold(len(rows) * (d_v + 2))  # o, m and l
            states = [empty_state(d_v, sink) for _ in rows]
            for part in tiles(keys, block_k):
                spans = visible_spans(rows, part, n_q, n_k, causal, window)
                if nothing_visible(spans):
                    continue
                with gpu.frame():
                    k_tile = gpu.load(k, part)
                    v_tile = gpu.load(v, part)
                    gpu.hold_scores(rows, part)
                    scores = scale_and_mask(gpu.multiply(q_tile, transpose(k_tile)), spans, scale)
                    states = absorb_tile(states, scores, v_tile)
            finished = [finish(state) for state in states]
            gpu.store(out, rows, [o for o, _ in finished])
            gpu.store(lse, rows, [row_lse for _, row_lse in finished])
    return out, lse


# 5. How much traffic, and which tiles
#
# In FlashAttention-2's order k and v cross once for each block of queries. With blocks of B and
# d_v = d:
#
#     accesses = n/B · 2nd + n(2d + 1)
#
# How large can B be? SRAM holds M numbers: q, o, k and v of a block, and a tile of scores:
#
#     M = 4dB + B² + 2B            (the sum of sram_parts, with d_v = d)
#
# While B is small beside d this is nearly 4dB, so B = M/4d, and roughly
#
#     accesses = 8n²d²/M + n(2d + 1)
#
# which is the bound of the papers, n²d²/M, with its constant. Twice the SRAM means nearly half
# the traffic of k and v; q, O and L cross once in any case. Standard attention's 4n² does not
# depend on M; the two meet where 8d² = 4M. So flash crosses less once SRAM holds more than about
# 2d² numbers: 32K of them at d = 128, or 64 KB at 16 bits. An SM has more than that.
#
# Which blocks are best for a given M? What stands in the outer loop stays in SRAM, and what stands
# in the inner loop crosses again and again. So version 1 wants long blocks of keys, and version 2
# long blocks of queries. By the count alone the other side should be as short as can be. Kernels
# choose by the clock: S and O of a tile live in the registers of an SM, and if they need more than
# there are, the compiler "spills" them to memory. flash-attention notes in its source that tiles of
# 256 × 64 at d = 64 are 85% slower than 128 × 128 for this reason.
#
# In production: flash-attention picks its tiles by d and by card in
# csrc/flash_attn/src/flash_fwd_launch_template.h (version 2) and hopper/tile_size.h (version 3).
#
# Measured by show_traffic().


# 6. The backward pass: weights computed again
#
# Training needs the gradients of the loss by q, k and v, given dO, its gradient by the output O.
# (dX always means the gradient of the loss by X.) O = P v gives two of them at once:
#
#     dv = Pᵀ dO
#     dP = dO vᵀ
#
# Then it has to go back through the softmax. One row of it: weights p = softmax(s), and given dp.
#
#     p_j       = exp(s_j) / Σ_i exp(s_i)
#     ∂p_i/∂s_j = p_j (1 - p_j)   if i = j,   and   -p_i p_j   if not
#     ds_j      = Σ_i dp_i ∂p_i/∂s_j
#               = dp_j p_j - p_j Σ_i dp_i p_i
#               = p_j (dp_j - D)        with  D = Σ_i p_i dp_i
#
# So the softmax compares each dp_j with D, the row's weighted average of them. Row by row this is
# dS, and S = q kᵀ · scale gives the rest:
#
#     dS_ij = P_ij (dP_ij - D_i)
#     dq    = dS k · scale
#     dk    = dSᵀ q · scale
#
# The backward pass needs P, which was never written down. But P_ij = exp(S_ij - L_i): a tile of it
# is made again from q, k and one number a row. D is one number a row as well, and it needs no row
# of P and dP, because the sums can be exchanged:
#
#     D_i = Σ_j P_ij (dO_i · v_j) = dO_i · Σ_j P_ij v_j = dO_i · O_i
#
# So the forward pass keeps O (for D) and L, n(d_v + 1) numbers in place of n². What is not kept is
# computed again, which is called activation checkpointing. The price is one more product of
# matrices, q kᵀ, five in place of four.
#
# The outer loop goes over the keys, whose dk and dv stay in SRAM until they are complete. A block
# of dq gets a share from every block of keys, so it crosses each time. (With queries in the outer
# loop, dk and dv would cross each time, two matrices in place of one.)
#
# In production: flash-attention, csrc/flash_attn/src/flash_bwd_kernel.h,
# compute_dq_dk_dv_1colblock; D is dot_do_o in flash_bwd_preprocess_kernel.h. There the blocks of
# keys run on many SMs at once, and each adds its share to dq when it is ready (atomic additions).
# Their order changes from run to run, and with it the last bits of dq, unless deterministic=True is
# asked for.
#
# Measured by show_backward().


def flash_attention_backward(
    q: Matrix, k: Matrix, v: Matrix, out: Matrix, lse: Vector, d_out: Matrix, *, block_q: int,
    block_k: int, causal: bool = False, scale: float | None = None,
    traffic: Traffic | None = None,
) -> tuple[Matrix, Matrix, Matrix]:
    """Return (dq [n_q][d], dk [n_k][d], dv [n_k][d_v]).

    out, lse: what the forward pass left; d_out [n_q][d_v]. causal and scale must be those of the
    forward pass; the blocks may be others. ValueError where check_inputs() or check_rows() says
    that shapes do not fit, and for blocks below 1.
    """
    check_inputs(q, k, v, block_q=block_q, block_k=block_k)
    check_rows(len(q), len(v[0]), out=out, d_out=d_out)
    check_rows(len(q), None, lse=lse)
    n_q, n_k, d, d_v = len(q), len(k), len(k[0]), len(v[0])
    scale = default_scale(scale, k)
    gpu = traffic or Traffic()
    dq = []
    dk = []
    dv = []
    averages = []  # D
    gpu.store(dq, range(n_q), [[0.0] * d for _ in q])
    # D_i = dO_i · O_i
    for rows in tiles(range(n_q), block_q):
        with gpu.frame():
            do_tile = gpu.load(d_out, rows)
            gpu.store(averages, rows, list(map(dot, do_tile, gpu.load(out, rows))))
    for keys in tiles(range(n_k), block_k):
        with gpu.frame():
            k_tile = gpu.load(k, keys)
            v_tile = gpu.load(v, keys)
            gpu.hold(len(keys) * (d + d_v))
            dk_tile = [[0.0] * d for _ in keys]
            dv_tile = [[0.0] * d_v for _ in keys]
            for rows in tiles(range(n_q), block_q):
                spans = visible_spans(rows, keys, n_q, n_k, causal)
                if nothing_visible(spans):
                    continue
                with gpu.frame():
                    q_tile = gpu.load(q, rows)
                    do_tile = gpu.load(d_out, rows)
                    dq_tile = gpu.load(dq, rows)
                    lse_tile = gpu.load(lse, rows)
                    averages_tile = gpu.load(averages, rows)
                    gpu.hold_scores(rows, keys)        # S, and P over it
                    gpu.hold(len(rows) * len(keys))    # dP, and dS over it
                    # P = exp(S - L)
                    s = scale_and_mask(gpu.multiply(q_tile, transpose(k_tile)), spans, scale)
                    p = list(map(recompute_weights, s, lse_tile))
                    # dP = dO vᵀ,  dS = P (dP - D)
                    dp = gpu.multiply(do_tile, transpose(v_tile))
                    ds = list(map(softmax_backward, p, dp, averages_tile))
                    # This tile's share of dv = Pᵀ dO, dk = dSᵀ q · scale and dq = dS k · scale
                    dv_tile = add_scaled(dv_tile, gpu.multiply(transpose(p), do_tile), 1.0)
                    dk_tile = add_scaled(dk_tile, gpu.multiply(transpose(ds), q_tile), scale)
                    dq_tile = add_scaled(dq_tile, gpu.multiply(ds, k_tile), scale)
                    gpu.store(dq, rows, dq_tile)
            gpu.store(dk, keys, dk_tile)
            gpu.store(dv, keys, dv_tile)
    return dq, dk, dv


def softmax_backward(p: Vector, dp: Vector, average: float) -> Vector:
    """Return ds of a row (or a piece of it): p_j (dp_j - D), D the row's weighted average of dp."""
    return [weight * (gradient - average) for weight, gradient in zip(p, dp)]


def standard_attention_backward(
    q: Matrix, k: Matrix, v: Matrix, weights: Matrix, d_out: Matrix, *,
    scale: float | None = None, traffic: Traffic | None = None,
) -> tuple[Matrix, Matrix, Matrix]:
    """Return (dq, dk, dv) from the weights P [n_q][n_k] that the forward pass kept.

    Five kernels, through dP and dS in HBM (Dao et al. 2022, Algorithm 3). Each reads its inputs
    once, as if SRAM held them whole. ValueError where check_inputs() or check_rows() says that
    shapes do not fit.
    """
    check_inputs(q, k, v)
    check_rows(len(q), len(k), weights=weights)
    check_rows(len(q), len(v[0]), d_out=d_out)
    scale = default_scale(scale, k)
    gpu = traffic or Traffic()
    dv = gpu.kernel(lambda p, do: gpu.multiply(transpose(p), do), weights, d_out)
    dp = gpu.kernel(lambda do, v: gpu.multiply(do, transpose(v)), d_out, v)
    ds = gpu.kernel(
        lambda p, dp: list(map(softmax_backward, p, dp, map(dot, p, dp))), weights, dp)
    dq = gpu.kernel(lambda ds, k: scale_matrix(gpu.multiply(ds, k), scale), ds, k)
    dk = gpu.kernel(lambda ds, q: scale_matrix(gpu.multiply(transpose(ds), q), scale), ds, q)
    return dq, dk, dv


def sram_needed_backward(block_q: int, block_k: int, d: int, d_v: int) -> int:
    """Return what the backward pass takes of SRAM, by formula: for a tile, or for D if larger."""
    queries = block_q * (2 * d + d_v + 2)  # q, dq, dO, L, D
    keys = block_k * 2 * (d + d_v)         # k, v, dk, dv
    tile = 2 * block_q * block_k           # P and dP
    return max(queries + keys + tile, block_q * 2 * d_v)


# 7. Flash-Decoding: split the keys
#
# A model that generates has one query and a long KV cache. That is one block of queries for each
# head, so a request with 8 KV heads keeps 8 SMs busy while a hundred others wait.
#
# Flash-Decoding cuts the keys as well. Each split runs FlashAttention over its own run of the keys,
# as if the others did not exist, and leaves out_s and L_s. They are merged as absorb() merges
# tiles: treat each split as one key, whose score is L_s and whose value is out_s.
#
#     L   = log Σ_s exp(L_s)
#     out = Σ_s exp(L_s - L) · out_s
#
# A tiny one: two splits, L_1 = log 3 with out_1 = 10, and L_2 = log 1 with out_2 = 2. Then
# L = log 4, the shares are 3/4 and 1/4, and out = 3/4 · 10 + 1/4 · 2 = 8.
#
# In exact arithmetic the merge does not depend on the order or the grouping. (In floating point the
# last bits do: 0.1 + 0.2 + 0.3 is 0.6000000000000001 from the left and 0.6 from the right. How many
# splits a request gets depends on how many others share the card, so the same prompt can get other
# scores for its next token in a larger batch. Kernels that avoid this are called batch invariant;
# vLLM has them behind VLLM_BATCH_INVARIANT=1.)
#
# The same merge is ring attention (k and v travel round a ring of cards, and each card merges what
# passes) and cascade attention (many requests share a prefix: attend to it once for all of them,
# then to each one's own rest, and merge).
#
# How many splits? Splits run in rounds, as many at a time as there are SMs, and a round takes as
# long as its longest split. Each split also leaves a partial result to write and read again. So
# take the fewest splits whose wait is within a tenth of the shortest. Splitting saves the most
# where jobs are few beside the SMs. If there are more jobs than SMs, it helps most when the last
# round is nearly empty. It helps little when that round is nearly full, or one of many rounds.
#
# In production: flash-attention, csrc/flash_attn/src/flash_fwd_kernel.h,
# compute_attn_1rowblock_splitkv and combine_attn_seqk_parallel. num_splits_heuristic in
# flash_api.cpp counts two jobs at a time on each SM. It does not split where the jobs fill 80% of
# these places, and otherwise takes the fewest splits within 85% of the best use of them, passing
# over those that do not shorten the longest split. For the six cases of the trace it gives 8, 22,
# 23, 6, 3 and 1 splits. FlashInfer merges in
# include/flashinfer/attention/cascade.cuh, vLLM in csrc/attention/merge_attn_states.cu.
#
# Measured by show_decode().


def flash_decode(
    q: Matrix, k: Matrix, v: Matrix, *, n_splits: int, block_q: int = BLOCK_Q,
    block_k: int = BLOCK_K, traffic: Traffic | None = None, **options,
) -> tuple[Matrix, Vector]:
    """Return (out, lse) as flash_attention does, from n_splits runs of the keys, merged at the end.

    The runs do not wait for each other. A second kernel reads what they left in HBM and merges it.
    options: causal, window and scale, as there. ValueError as there, and if n_splits is below 1.
    """
    check_counts(n_splits=n_splits)
    gpu = traffic or Traffic()
    parts = [flash_attention(q, k, v, keys=keys, block_q=block_q, block_k=block_k, traffic=gpu,
                             **options) for keys in split_evenly(len(k), n_splits)]
    out = []
    lse = []
    rows = range(len(q))
    with gpu.frame():
        merged = merge_partials([(gpu.load(part, rows), gpu.load(part_lse, rows))
                                 for part, part_lse in parts])
        gpu.store(out, rows, merged[0])
        gpu.store(lse, rows, merged[1])
    return out, lse


def merge_partials(parts: Sequence[tuple[Matrix, Vector]]) -> tuple[Matrix, Vector]:
    """Return (out, lse) over all keys, from those of the same queries over disjoint sets of keys.

    Queries that saw nothing anywhere keep zeros and -inf.
    ValueError if there are no parts, or if they differ in length.
    """
    check_parts(parts)
    merged = []
    for i in range(len(parts[0][1])):
        values = [out[i] for out, _ in parts]
        scores = [lse[i] for _, lse in parts]
        merged.append(finish(absorb(empty_state(len(values[0])), scores, transpose(values))))
    return [out for out, _ in merged], [lse for _, lse in merged]


def split_evenly(n: int, n_splits: int) -> list[range]:
    """Return range(n) in n_splits runs whose lengths differ by at most 1; some may be empty."""
    bounds = [n * s // n_splits for s in range(n_splits + 1)]
    return [range(start, end) for start, end in zip(bounds, bounds[1:])]


def decode_wait(n_sms: int, n_jobs: int, n_tiles: int, n_splits: int) -> int:
    """Return how many tiles everybody waits for: n_jobs of n_tiles each, in n_splits each."""
    rounds = ceil_div(n_jobs * n_splits, n_sms)
    longest_split = ceil_div(n_tiles, n_splits)
    return rounds * longest_split


def choose_splits(n_sms: int, n_jobs: int, n_tiles: int) -> int:
    """Return the fewest splits whose wait is at most a tenth longer than the shortest."""
    waits = {n_splits: decode_wait(n_sms, n_jobs, n_tiles, n_splits)
             for n_splits in range(1, n_tiles + 1)}
    shortest = min(waits.values())
    return min(n_splits for n_splits, wait in waits.items() if 10 * wait <= 11 * shortest)


# 8. Grouped queries, windows, pages and sinks
#
# What changes only which keys a query sees, or where they lie, leaves absorb() alone:
#
# - Grouped-query attention: n_heads query heads share n_kv_heads KV heads, so query head h reads KV
#   head h // group. No copy of k and v is made. While decoding, each head has one query, and the
#   queries of a group can form one block: then k and v cross once for the group, not once a head.
# - A sliding window: tiles too far back are skipped like those above the diagonal.
# - Pages: the cache lies scattered in pages (microkv's blocks), and a block table says which one
#   holds which positions. A tile is gathered through the table on its way into SRAM.
# - A learned sink (gpt-oss): a number for each head that competes in the softmax like the score of
#   one more key, but has no value, so that a head can attend to nothing. It is one more term in l:
#   a query starts from m = sink, l = 1, o = 0 (empty_state), and the rest is as always. L includes
#   it, so the backward pass for q, k and v does not change either. (The sink's own gradient is
#   -Σ_i exp(sink - L_i) · D_i, as if it were a key whose dP is 0.)
#
# In production: a group as one block is hopper/pack_gqa.h in flash-attention. Pages are
# hopper/paged_kv.h there and include/flashinfer/page.cuh in FlashInfer; vLLM passes its block_table
# to flash_attn_varlen_func in vllm/v1/attention/backends/flash_attn.py. Sinks are added to l at
# the end, not at the start: Softmax.finalize in flash_attn/cute/softmax.py.
#
# Measured by show_family().


def flash_grouped_query(
    q_heads: Sequence[Matrix], k_heads: Sequence[Matrix], v_heads: Sequence[Matrix], **options
) -> list[tuple[Matrix, Vector]]:
    """Return (out, lse) of each query head. options: those of flash_attention.

    ValueError if the number of KV heads does not divide that of the query heads.
    """
    group = heads_per_kv_head(q_heads, k_heads, v_heads)
    return [flash_attention(q, k_heads[h // group], v_heads[h // group], **options)
            for h, q in enumerate(q_heads)]


def flash_packed_group(
    q_heads: Sequence[Matrix], k_heads: Sequence[Matrix], v_heads: Sequence[Matrix], **options
) -> list[tuple[Matrix, Vector]]:
    """Return (out, lse) of each KV head while decoding, with a row for each of its query heads.

    q_heads [n_heads][1][d]: the queries of a group form one block. They see all keys: no mask.
    """
    group = heads_per_kv_head(q_heads, k_heads, v_heads)
    blocks = [[q_heads[h][0] for h in heads] for heads in tiles(range(len(q_heads)), group)]
    return flash_grouped_query(blocks, k_heads, v_heads, **options | {"block_q": group})


@dataclass
class PagedRows(Sequence):
    """n rows that lie in pages; it reads as a matrix.

    Row j is pages[block_table[j // page_size]][j % page_size]. ValueError if the pages of the table
    have fewer than n rows.
    """

    pages: Sequence[Matrix]
    block_table: Sequence[int]
    n: int

    def __post_init__(self):
        self.page_size = len(self.pages[0])
        if self.n > len(self.block_table) * self.page_size:
            raise ValueError(f"n must be at most {len(self.block_table)} pages of "
                             f"{self.page_size} rows, not {self.n}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            return [self[j] for j in range(*rows.indices(self.n))]
        page, slot = divmod(range(self.n)[rows], self.page_size)  # range: -1 is the last row
        return self.pages[self.block_table[page]][slot]


# 9. FlashAttention-3: FP8
#
# The tiles stayed. Version 3, for Hopper cards (H100), lets an SM do three things at once: copy the
# next tile, multiply this one, and take the softmax of another (asynchrony; nothing of it shows in
# counts). And it can multiply in FP8, which is twice as fast as 16 bits.
#
# An E4M3 number has a sign, 4 bits of exponent and 3 of mantissa: 1, 1.125, 1.25, …, up to 448. So
# rounding is off by up to 1 part in 16, half a step of 1/8, and by more in large numbers than in
# small ones. That hurts where large meets large: if q and k have the same wide channels (channels
# of large numbers), as in real models, the scores there are large and so are their errors. There
# are two remedies, and the second does the work:
#
# - Block quantization: each tile has a scale of its own, which takes its largest value to 448. FP8
#   numbers have an exponent of their own, so this matters most where tiles differ so much that
#   under one scale the small ones fall below the smallest number, 2⁻⁹.
# - Incoherent processing: multiply q and k by the same random orthogonal matrix R first. As
#   (qR)(kR)ᵀ = q R Rᵀ kᵀ = q kᵀ, no score changes, but a wide channel is spread over all channels.
#
# R is a Hadamard matrix with random signs. Four channels by hand, signs all +, H with entries ±1:
#
#         1  1  1  1        q = (8, 0, 0, 0)    qH/2 = (4, 4, 4, 4)
#     H = 1 -1  1 -1        k = (1, 2, 3, 4)    kH/2 = (5, -1, -2, 0)
#         1  1 -1 -1
#         1 -1 -1  1        q · k = 8           rotated: 4 · (5 - 1 - 2 + 0) = 8
#
# (A kernel needs only d·log2(d) additions a row for it, because H is made of 2 × 2 pieces, each
# (a, b) -> (a + b, a - b).)
#
# In production: flash-attention's hopper/ folder. What it takes from callers today is one scale for
# each request and KV head (q_descale of shape (b, h_k) in flash_api.cpp), not one a tile; and the
# rotation is left to the caller.
#
# Measured by show_fp8().

E4M3_MAX = 448.0


def round_to_e4m3(x: float) -> float:
    """Return the nearest FP8 number, of the 4-bit exponent kind; 448 at most, in size."""
    if x == 0:
        return x
    _, exponent = math.frexp(x)               # 2^(exponent - 1) ≤ |x| < 2^exponent
    spacing = 2.0 ** max(exponent - 4, -9)    # between neighbours: 8 of them per power of two
    return max(-448.0, min(448.0, round(x / spacing) * spacing))


def quantize_blocks(m: Matrix, block: int) -> Matrix:
    """Return m as FP8 can hold it, each block of rows with a scale of its own."""
    out = []
    for rows in tiles(range(len(m)), block):
        largest = max(abs(x) for i in rows for x in m[i])
        scale = largest / E4M3_MAX if largest else 1.0
        for i in rows:
            out.append([round_to_e4m3(x / scale) * scale for x in m[i]])
    return out


def hadamard_rotate(m: Matrix, signs: Vector) -> Matrix:
    """Return m R, R = diag(signs) · H / √d, H Sylvester's Hadamard matrix [[H, H], [H, -H]].

    ValueError unless d is a power of two, with one sign for each channel.
    """
    check_rotation(m, signs)
    h = [[1.0]]
    while len(h) < len(signs):
        h = [row + row for row in h] + [row + [-x for x in row] for row in h]
    return scale_matrix(multiply(scale_channels(m, signs), h), 1 / math.sqrt(len(signs)))


# 10. FlashAttention-4: cheaper exponentials
#
# From Hopper (H100) to Blackwell cards (B200) the tensor cores became twice as fast, and the units
# for exp did not. Count the clock cycles of one SM for a tile of 128 × 128 at d = 128:
#
#     tensor cores, q kᵀ and P v    4 · 128³ / 4,096 = 2,048    (H100: 4,096 FLOPs a clock)
#                                   4 · 128³ / 8,192 = 1,024    (B200: 8,192)
#     exp units                         128² / 16    = 1,024    (16 a clock, on both)
#
# Now exp takes as long as the products, and version 4 saves it work in two ways.
#
# Rescale less. m need not be the maximum of what was seen. Any number near it keeps exp from
# overflowing, and the division by l at the end makes up for it exactly. So let m follow only when
# the maximum has outgrown it by more than a threshold of 8 powers of two: exp(s - m) then reaches
# at most 2⁸ = 256, and the rescaling of o is nearly always skipped.
#
# Compute some exponentials without the exp unit. The kernels work with powers of two, and
#
#     2^x = 2^n · 2^f        n = floor(x), 0 <= f < 1
#
# 2^n only sets the exponent bits of a float. 2^f is nearly a cubic polynomial in f, which takes
# three multiply-adds; an SM makes 128 of those in a clock cycle, against 16 exponentials. The
# polynomial is wrong by less than 1 part in 10,000. That does not matter, because P is rounded to
# BF16 next, which has 8 significant bits, so that its steps are at least 1 part in 256.
#
# In production: flash-attention, flash_attn/cute/. flash_fwd_sm100.py sets rescale_threshold to 8
# for 16-bit inputs, and to less for FP8; ex2_emulation in utils.py is the polynomial. Only a part
# of each row takes it (ex2_emu_freq; 10 to 25% by the paper), so that both kinds of unit are busy.
# On a B300, whose exp units are faster, it is off.
#
# Measured by show_fa4().

RESCALE_THRESHOLD = 8 * math.log(2)  # 8 powers of two, for scores that go through exp
EXP2_COEFFICIENTS = (1.0, 0.69514614, 0.22756439, 0.07711909)  # POLY_EX2[3], cute/utils.py


def absorb_lazily(
    state: State, scores: Vector, columns: Sequence[Sequence[float]], threshold: float
) -> State:
    """Return the state after one more tile, as absorb(); m follows only beyond the threshold."""
    largest = max(scores)
    if largest > state.m + threshold:
        state = rescale(state, largest)
    return add_tile(state, scores, columns)


def exp2_by_polynomial(x: float) -> float:
    """Return 2^x, nearly."""
    n = math.floor(x)
    f = x - n
    # ((c3 · f + c2) · f + c1) · f + c0
    power = 0.0
    for coefficient in reversed(EXP2_COEFFICIENTS):
        power = power * f + coefficient
    return math.ldexp(power, n)


# =============================================================================================
# THE EXPERIMENTS: what the trace shows, and how it is measured
# =============================================================================================


class Sizes(NamedTuple):
    """Attention of n queries on n keys with d channels, in tiles, and the room for them."""

    n: int
    d: int
    block_q: int
    block_k: int
    sram: int | None = None
    seed: int = 0

    @property
    def blocks(self) -> dict[str, int]:
        """The two blocks, as the techniques take them."""
        return {"block_q": self.block_q, "block_k": self.block_k}


class Run(NamedTuple):
    """What crossed between HBM and SRAM in one run, by count and by formula."""

    attention: str            # "standard", "version 1" or "version 2"
    mask: str
    n: int
    block_q: int
    read: int
    written: int
    crossed: int
    peak: int                 # M, the most numbers that SRAM held
    bound: float              # 8n²d²/M
    tiles: int
    walk: list[tuple[range, range]]
    formula: tuple[int, int]  # (read, written)
    error: float              # distance of out and L from the definition


def run_attention(attention: str, sizes: Sizes, causal: bool = False) -> Run:
    """Run standard attention or a version of flash attention on random q, k and v."""
    q, k, v = random_inputs(sizes.seed, sizes.n, sizes.d)
    if attention == "standard":
        traffic = Traffic()
        out, lse = standard_attention(q, k, v, causal=causal, traffic=traffic)
    else:
        traffic = Traffic(sizes.sram)
        attend = flash_attention_v1 if attention == "version 1" else flash_attention
        out, lse = attend(q, k, v, causal=causal, traffic=traffic, **sizes.blocks)
    expected, expected_lse = attention_by_definition(q, k, v, causal)
    return Run(attention, "causal" if causal else "none", sizes.n, sizes.block_q, traffic.reads,
               traffic.writes, traffic.accesses, traffic.peak,
               8 * (sizes.n * sizes.d)**2 / traffic.peak, len(traffic.walk), traffic.walk,
               crossings_by_formula(attention, sizes, causal),
               matrix_gap([*out, lse], [*expected, expected_lse]))


def check_runs(trace: Trace, claim: str, runs: Sequence[Run]) -> None:
    """Check that runs give attention as it is defined, and that their counts are the formula's."""
    trace.check(f"{claim} = attention by its definition, out and L",
                max(run.error for run in runs) < 1e-12, "|Δ| < 1e-12")
    trace.check("numbers read and written = by formula",
                all((run.read, run.written) == run.formula for run in runs), f"runs: {len(runs)}")


# 1. Standard attention and its traffic


def move_and_compute(n: int, d: int, block_q: int) -> list[dict]:
    """Return, for each card, the milliseconds to compute one head, and to move its numbers.

    By the data sheets, at 16 bits a number.
    """
    sizes = Sizes(n, d, n, n)
    crossed = {
        "standard": crossings_by_formula("standard", sizes),
        "flash, no L2": crossings_by_formula("version 2", sizes._replace(block_q=block_q)),
        "flash, L2": crossings_by_formula("version 2", sizes),
    }
    rows = []
    for card in CARDS:
        row = {"card": card.name}
        row["computing"] = 1000 * 4 * n * n * d / card.flops  # two products of n × n × d
        for attention, numbers in crossed.items():
            row[attention] = 1000 * 2 * sum(numbers) / card.hbm_bytes_per_s
        rows.append(row)
    return rows


def show_standard(trace: Trace, knobs: Namespace) -> None:
    """Show what crosses, by count, and what that means on real cards."""
    n = knobs.sizes.n
    lengths = sorted({max(1, n // 4), max(1, n // 2), n})
    runs = [run_attention("standard", knobs.sizes._replace(n=length), knobs.causal)
            for length in lengths]
    share = 4 * n * n / runs[-1].crossed
    trace.say("A GPU has a large slow memory (HBM) and a small fast one (SRAM). Attention over n "
              "tokens makes n × n scores S = q kᵀ/√d, n × n weights P = softmax(S), and the output "
              "O = P v. At real lengths S and P do not fit into SRAM. So both are written to HBM "
              "and read back: 4n² numbers cross. Counted on random q, k and v with d = "
              f"{knobs.sizes.d} channels; read is into SRAM, written is back to HBM:")
    trace.ask(f"n = {n}: how many percent of all numbers that cross are 4n² for S and P?",
              100 * share)
    trace.table(runs, {"n": "d", "read": ",d", "written": ",d", "crossed": ",d bar 36"})
    trace.say(f"At n = {n}, S and P are {share:.0%} of it. What that means on real cards, for one "
              "head of n = 8,192 and d = 128 at 16 bits: milliseconds to compute the two products "
              "of matrices, and to move the numbers that cross, by the formulas that the counts "
              "confirm and the cards' data sheets. Where moving takes longer than computing, the "
              "arithmetic waits.")
    times = dict.fromkeys(("computing", "standard", "flash, no L2", "flash, L2"), ".3f")
    trace.table(move_and_compute(8192, 128, 128), {"card": "", **times})
    trace.note("Flash: sections 3 and 4, in blocks of 128 queries, each of which reads K and V "
               "again. This chapter counts every reading. But these cards have a cache in front "
               f"of HBM, the L2, of {A100_SHEET.l2_mb} and {H100_SHEET.l2_mb} MB. One head's K and "
               "V are 4 MB. If they stay there, every number crosses once, the last column. S and "
               "P, 134 MB each, do not fit. The model leaves out the softmax, and all waiting but "
               "for HBM.")
    check_runs(trace, "standard attention", runs)


# 2. Online softmax


class OnlineStep(NamedTuple):
    """One tile of scores, and the state after it."""

    keys: str
    largest: str         # the token with the tile's largest score
    scores: str
    m: float
    c: float             # what the old l is multiplied by
    kept: float          # c · l_old
    l: float
    error: float         # of l, against the sum taken directly


def follow_online(scores: Vector, labels: Sequence[str], tile: int) -> list[OnlineStep]:
    """Return the state of online softmax after each tile of a row of scores."""
    rows = []
    state = empty_state(0)
    for part in tiles(range(len(scores)), tile):
        new = scores[part.start:part.stop]
        old = state
        state = absorb(old, new, [])
        c = math.exp(old.m - state.m)
        seen = scores[:part.stop]
        direct = sum(math.exp(s - max(seen)) for s in seen)
        rows.append(OnlineStep(f"{part.start}-{part[-1]}", labels[scores.index(max(new))],
                               " ".join(f"{s:6.2f}" for s in new), state.m, c, c * old.l, state.l,
                               abs(state.l - direct)))
    return rows


def show_online(trace: Trace, knobs: Namespace) -> None:
    """Show a row of scores from the text, absorbed three at a time, and what is read."""
    scores = text_scores(knobs.tokens, knobs.seed)[-1]
    n = len(scores)
    steps = follow_online(scores, knobs.labels, 3)
    traffic = Traffic()
    weights = online_softmax(scores, tile=3, traffic=traffic)
    trace.say("Softmax needs the largest score m of a row, so that exp does not overflow, and the "
              "sum l of exp(s - m). Online softmax gathers both in one pass, a tile of scores at a "
              "time. When m grows, one factor c = exp(m_old - m) repairs the whole sum, because "
              "exp(s - m_old) · exp(m_old - m) = exp(s - m).")
    trace.say(f"How the last token of the text, {knobs.labels[-1]!r}, scores all tokens, 3 at a "
              "time. (Each different token has a random code of 16 numbers, which is its query and "
              "its key, so equal tokens score high.)")
    shown = shorten(steps)
    left_out = ""
    if len(shown) < len(steps):
        left_out = f" {len(steps) - len(shown)} tiles in the middle are left out."
    trace.table(shown, {"keys": "", "largest": "", "scores": "", "m": ".4f", "c": ".4f",
                        "kept as c·l_old": ".4f", "l": ".4f"})
    trace.note("Largest: the token with the tile's largest score. Where c is below 1, m has grown, "
               "and the old sum shrinks to c·l_old. (Before the first tile m is minus infinity, so "
               "c is 0.)" + left_out)
    trace.ask(f"textbook softmax reads {n} scores three times, for m, for l and for the weights. "
              "How many numbers does online softmax read?", traffic.reads)
    trace.say(f"Textbook softmax reads {n} scores three times. Online softmax read them twice, "
              f"{traffic.reads} numbers: once for m and l, once more for the weights. Attention "
              "does not need the weights by themselves, so it does without the second pass.")
    trace.check("after each tile, l = Σ exp(s - m) of all scores so far",
                max(step.error for step in steps) < 1e-12, "|Δ| < 1e-12")
    trace.check_close("online softmax = softmax()", [weights], [softmax(scores)], 1e-12)
    trace.check("it reads each score twice", traffic.reads == 2 * n, f"{traffic.reads}")


# 3. FlashAttention: scores that never leave SRAM


def show_flash_v1(trace: Trace, knobs: Namespace) -> None:
    """Show what SRAM holds, and what crosses."""
    sizes = knobs.sizes
    runs = [run_attention(name, sizes, knobs.causal) for name in ("standard", "version 1")]
    standard, flash = runs
    parts = sram_parts(sizes.block_q, sizes.block_k, sizes.d, sizes.d)
    held = [{"part": part, "numbers": count} for part, count in parts.items()]
    trace.say("FlashAttention makes a tile of scores in SRAM, lets each query absorb its row of "
              "it as in section 2, with o = Σ exp(s - m) · v beside m and l, and drops it. "
              "Version 1 divides o by l after each tile, and leaves O = o, m and l. Here with "
              "tiles of "
              f"{sizes.block_q} × {sizes.block_k} (queries × keys), d = {sizes.d}. SRAM holds "
              f"{sizes.sram:,} numbers; the matrix S has {sizes.n**2:,}.")
    trace.ask("how many numbers does SRAM hold at the most, with q, o, m and l for each query, k "
              "and v for each key, and the scores?", flash.peak)
    trace.table([*held, {"part": "peak, counted", "numbers": flash.peak}],
                {"part as in SRAM": "", "numbers": f",d bar 40 of {sizes.sram}"})
    trace.say(f"And what crosses between HBM and SRAM, n = {sizes.n}, mask: {flash.mask}.")
    trace.table(runs, {"attention": "", "read": ",d", "written": ",d", "crossed": ",d bar 28"})
    trace.say(f"Version 1 moves {flash.crossed / standard.crossed:.0%} of the numbers that "
              "standard attention moves. For each tile, o, m and l come in and go out again. "
              "Version 2 will save that.")
    check_runs(trace, "version 1", runs[1:])
    trace.check("the peak is the sum of the parts, and SRAM has room for it",
                flash.peak == sum(parts.values()) <= sizes.sram,
                f"{flash.peak:,} of {sizes.sram:,}")


# 4. FlashAttention-2: the loops exchanged


def show_flash_v2(trace: Trace, knobs: Namespace) -> None:
    """Show the two walks over the tiles, and what the exchange of the loops saves."""
    sizes = knobs.sizes
    runs = [run_attention(version, sizes, causal)
            for version in ("version 1", "version 2") for causal in (False, True)]
    first, first_causal, second, causal = runs
    cut = ""
    if ceil_div(sizes.n, sizes.block_q) > 8 or ceil_div(sizes.n, sizes.block_k) > 6:
        cut = " (They show 8 × 6 tiles.)"
    trace.say("Version 2 exchanges the two loops: a block of queries stays in SRAM with its o, m "
              "and l while the blocks of keys come past. In the pictures a row is a block of "
              "queries and a column a block of keys. The numbers say when a tile is visited, under "
              f"a causal mask.{cut}")
    trace.ask(f"without a mask {second.tiles} tiles are visited. How many with a causal mask?",
              causal.tiles)
    trace.lines(draw_walks(sizes, first_causal, causal))
    trace.note("█ full tile   ▒ masked tile   · skipped: no scores made")
    trace.say(f"What crosses, n = {sizes.n}, d = {sizes.d}:")
    trace.table(runs, {"attention as flash attention": "", "mask": "", "tiles": ",d", "read": ",d",
                       "written": ",d", "crossed": ",d bar 18"})
    trace.say(f"Version 2 writes O and L once, {second.written:,} numbers; version 1 writes "
              f"{first.written:,}. But it reads k and v for each block of queries. In all, without "
              f"a mask, it moves {second.crossed / first.crossed:.0%} of what version 1 moves, "
              "with these tiles and this d.")
    check_runs(trace, "versions 1 and 2, with a mask and without,", runs)
    trace.check("both versions visit the same tiles, as many as see something",
                set(first_causal.walk) == set(causal.walk)
                and causal.tiles == len(walked_tiles(sizes, True)),
                f"{causal.tiles} of {second.tiles}")


# 5. How much traffic, and which tiles


def show_traffic(trace: Trace, knobs: Namespace) -> None:
    """Show the traffic by the size of SRAM, and the tiles of real kernels."""
    small = Sizes(48, 16, 0, 0, seed=knobs.seed)
    squares = [run_attention("version 2", small._replace(block_q=block, block_k=block))
               for block in (2, 4, 6, 8, 12, 24)]
    trace.say("The more SRAM, the longer the blocks, and the fewer numbers cross: about 8n²d²/M, "
              "if SRAM holds M. FlashAttention-2 with square tiles of B × B, n = 48, d = 16:")
    trace.ask("how many times fewer numbers cross with B = 8 than with B = 4?",
              squares[1].crossed / squares[3].crossed)
    trace.table(squares, {"block_q as B": "d", "peak as M, counted": ",d", "bound as 8n²d²/M":
                          ",.0f", "crossed": ",d bar 40"})
    trace.say("Standard attention moves "
              f"{sum(crossings_by_formula('standard', small)):,}, whatever M is. 8n²d²/M comes to "
              "its 4n² at M = 2d², here 512. (It is an estimate. It leaves out n(2d + 1) numbers "
              "of q, O and L, which makes it too small, and that the scores take some of M, too. "
              "Here M is as large as the blocks need; section 3 has a limit.)")
    trace.say("Tiles of real kernels (forward, 16 bits, no mask). Stages: how many tiles of K and "
              "V are in SRAM at once, so that one loads while another is multiplied.")
    trace.table(REAL_TILES, {"kernel": "", "card": "", "d": "d", "block_q": "d", "block_k": "d",
                             "stages": "d", "sram_kb as SRAM": "{:.0f} KB",
                             "of_kb as of": "{:d} KB", "gain": "{:.1f}×"})
    trace.note("SRAM: q, k and v, and in FlashAttention-3 at d = 64 also P; the rest is in "
               "registers, and these set the limit. Gain: standard attention's traffic over "
               "theirs, n = 8,192, by formula, without the L2. In FlashAttention-3 at d = 128 two "
               "SMs share each K and V that they load, so it counts as 256 queries. Sources: the "
               "files named at REAL_TILES.")
    check_runs(trace, "square tiles", squares)
    trace.check("M, counted = 4dB + B² + 2B",
                all(run.peak == run.block_q * (4 * 16 + run.block_q + 2) for run in squares),
                f"{len(squares)} sizes")


# 6. The backward pass: weights computed again


class BackwardRow(NamedTuple):
    """A backward pass: what the forward pass kept for it, what crossed, what was computed."""

    backward: str
    kept: int           # numbers besides q, k and v
    crossed: int
    multiply_adds: int


class BackwardRun(NamedTuple):
    """Both backward passes on the same inputs, and the differences between them."""

    rows: list[BackwardRow]
    peak: int             # of SRAM, in the flash backward pass
    error: float          # largest difference of dq, dk, dv from the standard backward pass


def run_backward(sizes: Sizes, causal: bool) -> BackwardRun:
    """Run both backward passes for random q, k, v and dO."""
    q, k, v = random_inputs(sizes.seed, sizes.n, sizes.d)
    d_out = random_inputs(sizes.seed + 1, sizes.n, sizes.d)[0]
    weights = list(map(softmax, all_scores(q, k, causal)))
    out, lse = flash_attention(q, k, v, causal=causal, **sizes.blocks)
    standard = Traffic()
    flash = Traffic(sizes.sram)
    expected = standard_attention_backward(q, k, v, weights, d_out, traffic=standard)
    gradients = flash_attention_backward(q, k, v, out, lse, d_out, causal=causal, traffic=flash,
                                         **sizes.blocks)
    rows = [BackwardRow("standard", count_numbers(weights), standard.accesses,
                        standard.multiply_adds),
            BackwardRow("flash", count_numbers(out) + count_numbers(lse), flash.accesses,
                        flash.multiply_adds)]
    return BackwardRun(rows, flash.peak, max(map(matrix_gap, gradients, expected)))


def backward_by_formula(sizes: Sizes, causal: bool = False) -> list[BackwardRow]:
    """Return what both passes keep, move and compute, for d_v = d."""
    n, d = sizes.n, sizes.d
    walked = walked_tiles(sizes, causal)
    once = n * (7 * d + 1)  # zeros for dq; dO, O and D; k and v; dk and dv
    crossed = once + sum(queries * (4 * d + 2) for queries, _ in walked)  # q, dO, dq twice, L, D
    products = 5 * d * sum(queries * keys for queries, keys in walked)
    return [BackwardRow("standard", n * n, 7 * n * n + 8 * n * d, 4 * n * n * d),
            BackwardRow("flash", n * (d + 1), crossed, products)]


def slope_error(seed: int) -> float:
    """Return how far dq, dk and dv are from the slope of Σ dO · O in a random direction."""
    inputs = random_inputs(seed, 5, 3)
    direction = random_inputs(seed + 1, 5, 3)
    d_out = random_inputs(seed + 2, 5, 3)[0]
    options = {"block_q": 2, "block_k": 3, "causal": True}

    def loss(step: float) -> float:
        moved = [add_scaled(m, u, step) for m, u in zip(inputs, direction)]
        return sum(map(dot, flash_attention(*moved, **options)[0], d_out))

    out, lse = flash_attention(*inputs, **options)
    gradients = flash_attention_backward(*inputs, out, lse, d_out, **options)
    expected = sum(sum(map(dot, g, u)) for g, u in zip(gradients, direction))
    return abs((loss(1e-5) - loss(-1e-5)) / 2e-5 - expected)


def show_backward(trace: Trace, knobs: Namespace) -> None:
    """Show what each backward pass keeps, moves and computes, and that the gradients are right."""
    d, sram = knobs.sizes.d, knobs.sizes.sram
    block_q, block_k = backward_blocks(knobs.sizes.block_q, knobs.sizes.block_k, d, d, sram)
    sizes = knobs.sizes._replace(block_q=block_q, block_k=block_k)
    run = run_backward(sizes, knobs.causal)
    standard, flash = run.rows
    trace.say("Training needs the gradients of the loss by q, k and v, from dO, its gradient by "
              "the output. For that it needs the n × n weights P again. Standard attention keeps "
              "them. Flash keeps O and one number a row, L, and makes P again tile by tile, as "
              "exp(S - L). The softmax's gradient needs one more number a row, D = dO · O.")
    trace.ask(f"standard attention keeps {standard.kept:,} weights. How many numbers does flash "
              "keep, besides q, k and v?", flash.kept)
    trace.say(f"n = {sizes.n}, d = {d}, mask: {'causal' if knobs.causal else 'none'}, tiles of "
              f"{block_q} × {block_k}. (A backward tile also holds dO, dq, dk, dv and dP, and so "
              "may have to be smaller than a forward one.)")
    trace.table(run.rows, {"backward": "", "kept": ",d", "crossed": ",d bar 18",
                           "multiply_adds as multiply-adds": ",d"})
    trace.say("Kept: besides q, k and v, which both keep. Flash keeps "
              f"{flash.kept / standard.kept:.0%} of what standard attention keeps, O for D and L "
              f"for P. It moves {flash.crossed / standard.crossed:.0%} of the numbers, with these "
              "tiles and this d. It makes five products of matrices for each tile, where standard "
              "attention makes four.")
    real, real_flash = backward_by_formula(Sizes(8192, 128, 64, 128))
    trace.say("At the size of a real head, n = 8,192, d = 128, tiles of 64 × 128, no mask, by the "
              f"formulas that the counts confirm, flash keeps {real_flash.kept / real.kept:.1%} "
              f"and moves {real_flash.crossed / real.crossed:.0%} of the numbers, for "
              f"{real_flash.multiply_adds / real.multiply_adds:.0%} of the multiply-adds.")
    trace.check("dq, dk, dv = the standard backward pass", run.error < 1e-11, "|Δ| < 1e-11")
    trace.check("dq, dk, dv = the slope of Σ dO · O in a random direction",
                slope_error(knobs.seed) < 1e-8, "by differences, 5 causal queries, |Δ| < 1e-8")
    trace.check("numbers kept, crossed and multiplied = by formula",
                run.rows == backward_by_formula(sizes, knobs.causal), "both passes")
    trace.check("SRAM held what the formula says, and has room for it",
                run.peak == sram_needed_backward(block_q, block_k, d, d) <= sram,
                f"peak {run.peak:,} of {sram:,}")


# 7. Flash-Decoding: split the keys


class SplitRow(NamedTuple):
    """One split of the keys: its partial result and its share of the weight."""

    split: str
    keys: str
    lse: float
    share: float
    out: float  # channel 0


class DecodeRun(NamedTuple):
    """One query, its splits and their merge, and how far they are from attention's definition."""

    rows: list[SplitRow]
    error: float          # of the merged out and L
    order_error: float    # of out and L, merged one at a time


def run_decode(sizes: Sizes, n_splits: int) -> DecodeRun:
    """Decode one query over n keys in n_splits; merge in several orders."""
    q, k, v = random_inputs(sizes.seed, sizes.n, sizes.d)
    query = q[-1:]
    runs = split_evenly(sizes.n, n_splits)
    parts = [flash_attention(query, k, v, keys=keys, **sizes.blocks) for keys in runs]
    out, lse = flash_decode(query, k, v, n_splits=n_splits, **sizes.blocks)
    rows = []
    for s, (keys, (part_out, part_lse)) in enumerate(zip(runs, parts)):
        name = f"{keys[0]}-{keys[-1]}" if keys else "none"
        rows.append(SplitRow(str(s), name, part_lse[0], math.exp(part_lse[0] - lse[0]),
                             part_out[0][0]))
    everything = math.fsum(row.share for row in rows)
    rows = shorten(rows)
    rows.append(SplitRow("all", f"0-{sizes.n - 1}", lse[0], everything, out[0][0]))

    merged = parts[0]
    for part in parts[1:]:
        merged = merge_partials([part, merged])
    expected = attention_by_definition(query, k, v)
    return DecodeRun(rows, pair_gap((out, lse), expected), pair_gap(merged, expected))


class SplitChoice(NamedTuple):
    """A decoding step on one card: the wait unsplit and split, in tiles of keys."""

    batch: int
    length: int
    jobs: int      # requests × KV heads
    unsplit: int
    splits: int
    split: int
    ideal: int     # if all SMs worked all the time


def compare_splits(requests: Sequence[tuple[int, int]]) -> list[SplitChoice]:
    """Return the wait for each (batch, length) on an A100: 8 KV heads, tiles of 128 keys."""
    n_sms = A100_SHEET.n_sms
    rows = []
    for batch, length in requests:
        jobs = 8 * batch
        n_tiles = ceil_div(length, 128)
        splits = choose_splits(n_sms, jobs, n_tiles)
        rows.append(SplitChoice(batch, length, jobs, decode_wait(n_sms, jobs, n_tiles, 1), splits,
                                decode_wait(n_sms, jobs, n_tiles, splits),
                                ceil_div(jobs * n_tiles, n_sms)))
    return rows


def show_decode(trace: Trace, knobs: Namespace) -> None:
    """Show partial results and their merge, and how long a decoding step waits, split and not."""
    run = run_decode(knobs.sizes, knobs.n_splits)
    left_out = " Some in the middle are left out." if len(run.rows) <= knobs.n_splits else ""
    trace.say("While a model generates, each head has one query and many keys. Flash-Decoding cuts "
              "the keys into splits that different SMs take at the same time. Each split leaves "
              "its output and its L. exp(L_s - L) is the share of the weight that lies in split s, "
              "and the merged output is the average of the outputs by these shares.")
    trace.say(f"One query over {knobs.sizes.n} random keys, {knobs.n_splits} splits. out_s is "
              f"channel 0 of the output.{left_out}")
    trace.table(run.rows, {"split": "", "keys": "", "lse as L_s": ".3f",
                           "share": ".3f bar 24 of 1", "out as out_s": ".4f"})
    rows = compare_splits(((1, 1024), (1, 8192), (1, 65536), (4, 8192), (16, 8192), (256, 8192)))
    trace.say(f"How long does everybody wait? One decoding step on an {A100_SHEET.name} with "
              f"{A100_SHEET.n_sms} SMs, its processors; 8 KV heads (sets of keys and values); "
              "tiles of 128 keys. A job is one KV head of one request. Jobs run in rounds, one on "
              "each SM; the wait is counted in tiles.")
    trace.ask("16 requests of 8,192 tokens are 128 jobs of 64 tiles, for 108 SMs. How many tiles "
              "is the wait, unsplit?", rows[4].unsplit)
    trace.table(rows, {"batch": "d", "length": ",d", "jobs": ",d",
                       "unsplit as wait unsplit": ",d", "splits": "d", "split as wait split": ",d",
                       "ideal": ",d"})
    trace.note("ideal: all tiles over all SMs, rounded up. splits: the fewest whose wait is within "
               "a tenth of that of the best number of splits. A model: it leaves out the merge, "
               "and that SMs share the bandwidth of HBM.")
    trace.check("split and merged = attention by its definition, out and L", run.error < 1e-12,
                "|Δ| < 1e-12")
    trace.check("merged one at a time: the same",
                run.order_error < 1e-12, "|Δ| < 1e-12")
    trace.check("split, the wait is within a tenth of the ideal",
                all(10 * row.split <= 11 * row.ideal for row in rows), f"{len(rows)} cases")
    trace.self_tests()
    check_decode(trace, rows[2].splits, knobs.seed)


def check_decode(trace: Trace, splits: int, seed: int) -> None:
    """Check splits by hand, and queries that are the last of the positions."""
    trace.check("10 tiles on 3 SMs in 4 splits of 2, 3, 2 and 3 wait for 6, and twice that on 4 "
                "SMs, in 2 splits of 5, for 5; row 3 gets 13 splits",
                list(map(len, split_evenly(10, 4))) == [2, 3, 2, 3] and splits == 13
                and (decode_wait(3, 1, 10, 4), decode_wait(4, 2, 10, 2)) == (6, 5), "by hand")
    q, k, v = random_inputs(seed, 9, 4)
    split = partial(flash_decode, n_splits=3, block_q=3, block_k=2, causal=True)
    trace.check("4 causal queries, the last of 9 positions = attention by its definition",
                pair_gap(split(q[:4], k, v), attention_by_definition(q[:4], k, v, causal=True))
                < 1e-12, "|Δ| < 1e-12")
    out, lse = split(q, k[:4], v[:4])
    trace.check("of 9 causal queries over 4 keys, the first 5 see nothing: zeros, and L = -inf",
                out[:5] == [[0.0] * 4] * 5 and lse[:5] == [-math.inf] * 5, "by hand")


# 8. Grouped queries, windows, pages and sinks


class FamilyRow(NamedTuple):
    """One of section 8's variants: what crosses, and how far it is from attention's definition."""

    variant: str
    read: int
    crossed: int
    error: float


def run_decoding(sizes: Sizes) -> list[FamilyRow]:
    """Run one decoding step of 4 query heads on 2 KV heads, head by head and by groups."""
    q_heads = [[row] for row in random_inputs(sizes.seed, 4, sizes.d)[0]]
    _, k, v = random_inputs(sizes.seed + 1, sizes.n, sizes.d)
    k_heads = [k, v]
    v_heads = [v, k]
    expected = [attention_by_definition(q, k_heads[h // 2], v_heads[h // 2])[0][0]
                for h, q in enumerate(q_heads)]
    rows = []
    for name, attend in (("head by head", flash_grouped_query),
                         ("a group as one block", flash_packed_group)):
        traffic = Traffic()
        results = attend(q_heads, k_heads, v_heads, traffic=traffic, **sizes.blocks)
        outputs = [row for out, _ in results for row in out]
        rows.append(FamilyRow(name, traffic.reads, traffic.accesses,
                              matrix_gap(outputs, expected)))
    return rows


def run_variants(
    sizes: Sizes, window: int, sink: float, page_size: int, block_table: list[int]
) -> list[FamilyRow]:
    """Run causal attention as it is, with a window, with a sink, and from pages."""
    q, k, v = random_inputs(sizes.seed, sizes.n, sizes.d)
    pages = [into_pages(rows, block_table, page_size) for rows in (k, v)]
    variants = {"causal": (k, v, {}), f"window of {window}": (k, v, {"window": window}),
                "learned sink": (k, v, {"sink": sink}), "pages": (*pages, {})}
    rows = []
    for name, (keys, values, options) in variants.items():
        traffic = Traffic()
        result = flash_attention(q, keys, values, causal=True, traffic=traffic, **sizes.blocks,
                                 **options)
        expected = attention_by_definition(q, k, v, True, **options)
        rows.append(FamilyRow(name, traffic.reads, traffic.accesses, pair_gap(result, expected)))
    return rows


def show_family(trace: Trace, knobs: Namespace) -> None:
    """Show the traffic of GQA, a window, pages and a sink, and that each is still attention."""
    sizes = knobs.sizes
    window = max(1, sizes.n // 4)
    page_size = sizes.block_k // 2 + 1  # not that of a tile, so that tiles cross pages
    n_pages = ceil_div(sizes.n, page_size)
    block_table = random.Random(knobs.seed).sample(range(n_pages + 3), n_pages)
    decoding = run_decoding(sizes)
    variants = run_variants(sizes, window, 1.0, page_size, block_table)
    apart, together = decoding
    trace.say("In grouped-query attention several query heads share the k and v of one KV head. "
              f"In one decoding step of 4 query heads on 2 KV heads with n = {sizes.n} keys, head "
              "by head, k and v are read once for each query head. If the queries of a group form "
              "one block, they are read once for the group.")
    trace.ask("how many times fewer numbers cross then?", apart.crossed / together.crossed)
    columns = {"read": ",d", "crossed": ",d bar 36"}
    trace.table(decoding, {"variant as decoding": "", **columns})
    trace.say(f"Causal attention, n = {sizes.n}: as it is; with a window of {window}, where tiles "
              "too far back are skipped as well; with a learned sink of score 1, one more term in "
              f"each query's l; and with k and v scattered in pages of {page_size}, where a block "
              f"table says where each page lies, {' '.join(map(str, block_table[:12]))}"
              f"{' …' if len(block_table) > 12 else ''}.")
    trace.table(variants, {"variant": "", **columns})
    trace.check("each of them = attention by its definition",
                max(row.error for row in decoding + variants) < 1e-12,
                f"{len(decoding + variants)} variants, |Δ| < 1e-12")
    reads = [4 * sizes.d + heads * 2 * sizes.n * sizes.d for heads in (4, 2)]
    trace.check("k and v are read for each query head, or for each group",
                [row.read for row in decoding] == reads, f"{reads[0]:,} and {reads[1]:,}")
    causal, near, sink, paged = (row.crossed for row in variants)
    formula = sum(crossings_by_formula("version 2", sizes, True, window))
    trace.check("a window moves what the formula says, a sink and pages what causal does",
                near == formula and causal == sink == paged, f"{near:,} and {causal:,}")


# 9. FlashAttention-3: FP8

FP8_TILE = 8  # rows that share a scale


class Fp8Row(NamedTuple):
    """The error of the output, |error| / |exact|, with q and k in FP8; mean over the draws."""

    inputs: str
    one_scale: float   # for the matrix
    tile_scale: float  # for each tile
    rotated: float     # a scale for each tile, and q and k rotated first
    rotation: float    # rotated, but not rounded: what the rotation alone changes


def compare_fp8(inputs: str, widths: Vector, seed: int) -> Fp8Row:
    """Draw q and k with channels of these widths several times, quantize them, compare outputs."""
    rng = random.Random(seed)
    d = len(widths)
    errors = []
    for _ in range(4):
        q = scale_channels(gaussian_matrix(rng, 16, d), widths)
        k = scale_channels(gaussian_matrix(rng, 64, d), widths)
        v = gaussian_matrix(rng, 64, d)
        signs = [rng.choice((-1.0, 1.0)) for _ in widths]
        rotated = [hadamard_rotate(m, signs) for m in (q, k)]
        variants = [[quantize_blocks(m, 64) for m in (q, k)],
                    [quantize_blocks(m, FP8_TILE) for m in (q, k)],
                    [quantize_blocks(m, FP8_TILE) for m in rotated], rotated]
        exact, _ = attention_by_definition(q, k, v)
        norm = math.hypot(*(x for row in exact for x in row))
        errors.append([matrix_gap(attention_by_definition(*variant, v)[0], exact) / norm
                       for variant in variants])
    return Fp8Row(inputs, *map(fmean, zip(*errors)))


def show_fp8(trace: Trace, knobs: Namespace) -> None:
    """Show the output's error with q and k in FP8, with and without rotation."""
    normal = compare_fp8("all channels alike", [1.0] * 32, knobs.seed)
    wide = compare_fp8("2 channels 5 times as wide", [5.0] * 2 + [1.0] * 30, knobs.seed)
    gain = wide.tile_scale / wide.rotated
    trace.say("FlashAttention-3, for the H100, copies the next tile, multiplies this one and takes "
              "the softmax of another at the same time. That changes no count. And it can multiply "
              "in FP8, numbers with 4 significant bits. Two remedies keep the error low: a scale "
              "for each tile, and rotating q and k by the same random orthogonal matrix first. "
              "That changes no score, and spreads channels with large numbers over all channels.")
    trace.ask("with some channels wide, how many times does the rotation lower the error of the "
              "output?", gain)
    trace.say("The error of the output, |error| / |exact|, when q and k are rounded to FP8 (16 "
              f"queries, 64 keys, d = 32; tiles of {FP8_TILE} rows; mean of 4 random "
              "inputs of each kind):")
    trace.table([normal, wide], {"inputs as q and k": "", "one_scale": ".1%",
                                 "tile_scale as a scale a tile": ".1%",
                                 "rotated as both": ".1%"})
    trace.say(f"With wide channels, both make the error {gain:.1f} times smaller than a scale a "
              "tile alone; on seeds 0 to 19 it was 1.3 to 2.7 times. (The authors report 2.6 "
              "times, with one number in a thousand large.) Where all channels are alike, there is "
              "nothing to spread. A scale a tile alone leaves "
              f"{wide.tile_scale / wide.one_scale:.0%} of the error that one scale leaves, on "
              "seeds 0 to 19 44% to 114%.")
    trace.note("Small draws, and v and P stay exact here. In the kernel they are FP8 too, which "
               "adds an error that no rotation of q and k lowers.")
    trace.check("rotating q and k alone changes no output", wide.rotation < 1e-12,
                "wide channels, relative error < 1e-12")
    trace.self_tests()
    codes = {round_to_e4m3(i / 2**10) for i in range(2**10 + 1)}
    trace.check("e4m3: 57 numbers from 0 to 1, and 448 the largest",
                len(codes) == 57 and round_to_e4m3(1e9) == 448, "8 in each power of two")
    trace.check("1.07 becomes 1.125 and 1.06 becomes 1",
                (round_to_e4m3(1.07), round_to_e4m3(1.06)) == (1.125, 1), "by hand")
    trace.check("q = (8, 0, 0, 0) rotated is (4, 4, 4, 4), and -4 each if the first sign is -1",
                [hadamard_rotate([[8.0, 0.0, 0.0, 0.0]], [sign, 1.0, 1.0, 1.0])
                 for sign in (1.0, -1.0)] == [[[4.0] * 4], [[-4.0] * 4]], "by hand")
    trace.check("-8 beside 1 stays -8", quantize_blocks([[-8.0], [1.0]], 2)[0] == [-8.0], "by hand")
    pair = [[1.0], [2.0**-20]]
    trace.check("beside 1, a number of 2^-20 is lost under one scale, and not under its own",
                quantize_blocks(pair, 2)[1] == [0.0] and quantize_blocks(pair, 1)[1][0] > 2**-21,
                "2 rows")


# 10. FlashAttention-4: cheaper exponentials


class Rescalings(NamedTuple):
    """How often m moves after the first tile, in rows of scores taken in tile by tile."""

    scores: str
    tiles: int             # after the first, in all rows
    always: int            # moves, if m follows every new maximum
    lazily: int            # moves, if it follows beyond the threshold
    largest: float         # exp(s - m) under the threshold
    error: float           # of L under the threshold, against log_sum_exp


def count_rescalings(name: str, rows: Matrix, tile: int, threshold: float) -> Rescalings:
    """Take in rows of scores tile by tile, with and without the threshold."""
    parts = tiles(range(len(rows[0])), tile)
    always = 0
    lazily = 0
    weights = []
    errors = []
    for row in rows:
        strict = lazy = empty_state(0)
        for part in parts:
            scores = row[part.start:part.stop]
            old_strict, old_lazy = strict, lazy
            strict = absorb(strict, scores, [])
            lazy = absorb_lazily(lazy, scores, [], threshold)
            always += strict.m > old_strict.m > -math.inf
            lazily += lazy.m > old_lazy.m > -math.inf
            weights.append(math.exp(max(scores) - lazy.m))
        errors.append(abs(finish(lazy)[1] - log_sum_exp(row)))
    return Rescalings(name, len(rows) * (len(parts) - 1), always, lazily, max(weights),
                      max(errors))


def polynomial_error() -> float:
    """Return the largest relative error of exp2_by_polynomial at 1,001 points from -8 to 0."""
    xs = [-i / 125 for i in range(1001)]
    return max(abs(exp2_by_polynomial(x) / 2.0**x - 1) for x in xs)


def rescaled_rows(seed: int) -> list[Rescalings]:
    """Count rescalings in scores of three kinds."""
    q, k, _ = random_inputs(seed, 64, 16)
    kinds = {"random q and k": all_scores(q, k, False),
             "rising by 5.5 a tile": [[j * 5.5 / 8 for j in range(64)]],
             "rising by 5.6 a tile": [[j * 5.6 / 8 for j in range(64)]]}
    return [count_rescalings(name, rows, 8, RESCALE_THRESHOLD) for name, rows in kinds.items()]


def show_fa4(trace: Trace, knobs: Namespace) -> None:
    """Show rescaling by threshold, and exp2 by polynomial."""
    rows = rescaled_rows(knobs.seed)
    error = polynomial_error()
    trace.say("On a B200 the tensor cores multiply so fast that exp takes as long as the products: "
              "1,024 clock cycles each, for a tile of 128 × 128 at d = 128. "
              "FlashAttention-4 rescales less: m may lag behind the maximum by up to 8 powers of "
              "two, which is 8 · ln 2 = 5.545. How often does it move after the first tile, with "
              "tiles of 8 scores, and how large does exp(s - m) get?")
    trace.ask("8 powers of two are a rise of 5.545. Scores rise by 5.5 a tile: in how many of the "
              "7 tiles after the first does m move under the threshold?", rows[1].lazily)
    trace.table(rows, {"scores as rows of scores": "", "tiles as later tiles": ",d",
                       "always as moves": ",d", "lazily as moves lazily": ",d",
                       "largest as largest exp(s - m)": ",.1f"})
    trace.say(f"Of {rows[0].always} rescalings of random scores the threshold leaves "
              f"{rows[0].lazily}. And part of the exponentials come from a polynomial of degree 3. "
              f"For x from -8 to 0 it is off by at most {error:.1e} of 2^x. Weights are rounded to "
              "bf16 next, whose last place is worth at least 1/256 of a number, so that is at most "
              f"{256 * error:.3f} of the last place.")
    trace.check("lazy rescaling ends with the same L", max(row.error for row in rows) < 1e-12,
                "|Δ| < 1e-12")
    trace.check("no exp(s - m) above 2^8, and some above 1",
                1 < max(row.largest for row in rows) <= 256, "the threshold")
    trace.check("the polynomial is within 1e-4, and bf16 itself rounds by up to 3.9e-3",
                5e-5 < error < 1e-4, "1,001 points")
    trace.self_tests()
    trace.check("a rise of 5.5 a tile moves m at every other tile, 5.6 at each (8 ln 2 = 5.545)",
                [(row.always, row.lazily) for row in rows[1:]] == [(7, 3), (7, 7)], "by hand")


# =============================================================================================
# THE MODEL AND THE BENCH: there is no model here; cards, kernels, references, pictures
# =============================================================================================

# Cards and kernels, by their sources


class DataSheet(NamedTuple):
    """A GPU by its data sheet."""

    name: str
    flops: float            # a second, dense, 16 bits
    hbm_bytes_per_s: float
    l2_mb: int              # the cache between HBM and all SMs
    n_sms: int


# NVIDIA A100 data sheet and A100 architecture white paper.
A100_SHEET = DataSheet("A100 80GB SXM", 312e12, 2039e9, 40, 108)
# NVIDIA H100 architecture white paper.
H100_SHEET = DataSheet("H100 80GB SXM", 989.4e12, 3350e9, 50, 132)
CARDS = (A100_SHEET, H100_SHEET)


class RealTile(NamedTuple):
    """The tile of a real kernel: forward, 16 bits, no mask."""

    kernel: str
    card: str
    of_kb: int         # shared memory of an SM
    d: int
    block_q: int
    block_k: int
    stages: int        # tiles of K and of V in SRAM at once
    p_in_sram: bool    # P lies in SRAM, not in registers
    cluster: int       # SMs that share the K and V that they load

    @property
    def sram_kb(self) -> float:
        """What it takes of an SM's shared memory: q, the stages of k and v, and P or not."""
        numbers = (self.block_q + self.stages * 2 * self.block_k) * self.d
        if self.p_in_sram:
            numbers += self.block_q * self.block_k
        return 2 * numbers / 1024

    @property
    def gain(self) -> float:
        """How many times less it moves than standard attention, at n = 8,192 and without caches."""
        sizes = Sizes(8192, self.d, self.block_q * self.cluster, 8192)
        return (sum(crossings_by_formula("standard", sizes))
                / sum(crossings_by_formula("version 2", sizes)))


# Dao-AILab/flash-attention: csrc/flash_attn/src/flash_fwd_launch_template.h for version 2;
# hopper/tile_size.h and hopper/flash_fwd_launch_template.h (kStages, ClusterM) for version 3.
# Shared memory: the Ampere and Hopper tuning guides.
REAL_TILES = (
    RealTile("FlashAttention-2", "A100", 164, 64, 128, 128, 1, False, 1),
    RealTile("FlashAttention-2", "A100", 164, 128, 128, 64, 1, False, 1),
    RealTile("FlashAttention-3", "H100", 228, 64, 192, 192, 2, True, 1),
    RealTile("FlashAttention-3", "H100", 228, 128, 128, 176, 2, False, 2),
)


# Matrices


def multiply(a: Matrix, b: Matrix) -> Matrix:
    """Return the product a b: [n][m], [m][p] -> [n][p]."""
    columns = transpose(b)
    return [[dot(row, column) for column in columns] for row in a]


def transpose(m: Matrix) -> list[tuple[float, ...]]:
    """Return m with rows and columns exchanged."""
    return list(zip(*m))


def scale_matrix(m: Matrix, factor: float) -> Matrix:
    """Return m · factor."""
    return [[x * factor for x in row] for row in m]


def scale_channels(m: Matrix, factors: Vector) -> Matrix:
    """Return m with each column multiplied by its factor."""
    return [list(map(operator.mul, row, factors)) for row in m]


def add_scaled(a: Matrix, b: Matrix, factor: float) -> Matrix:
    """Return a + b · factor."""
    return [[x + y * factor for x, y in zip(*rows)] for rows in zip(a, b)]


def copy_rows(rows: Sequence) -> list:
    """Return a copy of the rows of a matrix, or of the numbers of a vector."""
    return [row if isinstance(row, (int, float)) else list(row) for row in rows]


def count_numbers(tile: Sequence) -> int:
    """Return how many numbers a matrix or a vector has."""
    if not tile or isinstance(tile[0], (int, float)):
        return len(tile)
    return sum(map(len, tile))


def gaussian_matrix(rng: random.Random, rows: int, columns: int) -> Matrix:
    """Return normal numbers of mean 0 and standard deviation 1."""
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]


def random_inputs(seed: int, n: int, d: int) -> tuple[Matrix, Matrix, Matrix]:
    """Return random q, k, v [n][d]."""
    rng = random.Random(seed)
    q = gaussian_matrix(rng, n, d)
    k = gaussian_matrix(rng, n, d)
    v = gaussian_matrix(rng, n, d)
    return q, k, v


def text_scores(tokens: Sequence[str], seed: int) -> Matrix:
    """Return the scores of every token against every other, [n][n].

    Each different token has a random code of 16 numbers, its query and its key.
    """
    rng = random.Random(seed)
    codes = {token: gaussian_matrix(rng, 1, 16)[0] for token in dict.fromkeys(tokens)}
    x = [codes[token] for token in tokens]
    return all_scores(x, x, False)


def into_pages(rows: Matrix, block_table: Sequence[int], page_size: int) -> PagedRows:
    """Return rows, laid into pages at the slots that block_table says."""
    pages = [[[]] * page_size for _ in range(max(block_table) + 1)]
    for slot, page in zip(block_table, tiles(range(len(rows)), page_size)):
        pages[slot][:len(page)] = rows[page.start:page.stop]
    return PagedRows(pages, block_table, len(rows))


def backward_blocks(
    block_q: int, block_k: int, d: int, d_v: int, sram: int
) -> tuple[int, int]:
    """Return the blocks, halved as often as it takes until a backward tile fits into SRAM."""
    while block_q * block_k > 1 and sram_needed_backward(block_q, block_k, d, d_v) > sram:
        # Keys stand in the outer loop, so their blocks should stay long.
        if block_q > 1:
            block_q = ceil_div(block_q, 2)
        else:
            block_k = ceil_div(block_k, 2)
    return block_q, block_k


# Arguments: what is left out, and what cannot work


def default_scale(scale: float | None, k: Matrix) -> float:
    """Return the scale, or 1/√d where none is given."""
    return 1 / math.sqrt(len(k[0])) if scale is None else scale


def check_counts(**counts: int | None) -> None:
    """Raise ValueError for a count that is less than 1; None passes."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")


def check_inputs(
    q: Matrix, k: Matrix, v: Matrix, keys: range | None = None, **counts: int | None
) -> None:
    """Raise ValueError, with what would do, where attention cannot work."""
    if len(v) != len(k) or not (len(k) and len(k[0]) and len(v[0])):
        raise ValueError("k and v must have as many rows as each other, at least one, of at least "
                         f"one channel, not {len(k)} and {len(v)} rows")
    if any(len(row) != len(k[0]) for row in q):
        raise ValueError("q and k must have as many channels as each other, not "
                         f"{len(q[0])} and {len(k[0])}")
    check_counts(**counts)
    if keys and (keys.step != 1 or keys.start < 0 or keys.stop > len(k)):
        raise ValueError(f"keys must be a run within the {len(k)} keys, not {keys}")


def check_rows(n: int, width: int | None, **matrices: Sequence) -> None:
    """Raise ValueError unless each has n rows, one for each query, of so many channels."""
    for name, rows in matrices.items():
        if len(rows) != n or width is not None and any(len(row) != width for row in rows):
            channels = "" if width is None else f" of {width} channels"
            raise ValueError(f"{name} must have {n} rows, one for each query,{channels}, not "
                             f"{len(rows)} rows or others")


def check_parts(parts: Sequence[tuple[Matrix, Vector]]) -> None:
    """Raise ValueError unless there is at least one part, and all have as many rows."""
    lengths = {len(rows) for part in parts for rows in part}
    if len(lengths) != 1:
        raise ValueError("parts must be at least one (out, lse), all of as many rows, not "
                         f"{len(parts)} of {sorted(lengths)}")


def check_rotation(m: Matrix, signs: Vector) -> None:
    """Raise ValueError unless the channels are a power of two, with a sign for each."""
    d = len(signs)
    if d < 1 or d & (d - 1) or any(len(row) != d for row in m):
        raise ValueError("signs must be one for each channel of m, and a power of two of them, "
                         f"not {d}")


def heads_per_kv_head(
    q_heads: Sequence[Matrix], k_heads: Sequence[Matrix], v_heads: Sequence[Matrix]
) -> int:
    """Return how many query heads share a KV head; ValueError if that does not work out."""
    if not k_heads or len(q_heads) % len(k_heads) or len(v_heads) != len(k_heads):
        raise ValueError(f"n_kv_heads must divide the {len(q_heads)} query heads, and be the same "
                         f"for k and v; {len(k_heads)} and {len(v_heads)} do not")
    return len(q_heads) // len(k_heads)


# References, which share only products of matrices with the techniques


def all_scores(q: Matrix, k: Matrix, causal: bool, window: int | None = None) -> Matrix:
    """Return S, -inf where a mask hides the key; the queries are the last of the positions."""
    scores = scale_matrix(multiply(q, transpose(k)), 1 / math.sqrt(len(k[0])))
    for i, row in enumerate(scores, len(k) - len(q)):
        for j in range(len(row)):
            if causal and j > i or window is not None and j <= i - window:
                row[j] = -math.inf
    return scores


def attention_by_definition(
    q: Matrix, k: Matrix, v: Matrix, causal: bool = False, window: int | None = None,
    sink: float = -math.inf,
) -> tuple[Matrix, Vector]:
    """Return (out, lse) by way of all scores, with nothing done against overflow."""
    weights = []
    lse = []
    for row in all_scores(q, k, causal, window):
        exps = list(map(math.exp, row))
        total = sum(exps) + math.exp(sink)
        weights.append([e / total for e in exps])
        lse.append(math.log(total))
    return multiply(weights, v), lse


def walked_tiles(
    sizes: Sizes, causal: bool, window: int | None = None
) -> list[tuple[int, int]]:
    """Return (queries, keys) of each tile in which a query sees a key."""
    walked = []
    for queries in tiles(range(sizes.n), sizes.block_q):
        for keys in tiles(range(sizes.n), sizes.block_k):
            near = window is None or keys[-1] > queries[0] - window
            if near and (not causal or keys[0] <= queries[-1]):
                walked.append((len(queries), len(keys)))
    return walked


def crossings_by_formula(
    attention: str, sizes: Sizes, causal: bool = False, window: int | None = None
) -> tuple[int, int]:
    """Return how many numbers are read and written, for d_v = d."""
    n, d = sizes.n, sizes.d
    if attention == "standard":
        return 2 * n * n + 3 * n * d, 2 * n * n + n * (d + 1)
    walked = walked_tiles(sizes, causal, window)
    if attention == "version 1":
        visits = sum(queries for queries, _ in walked)
        return 2 * n * d + visits * (2 * d + 2), n * (d + 2) + visits * (d + 2)
    return n * d + 2 * d * sum(keys for _, keys in walked), n * (d + 1)


def matrix_gap(a: Matrix, b: Matrix) -> float:
    """Return the Euclidean distance of two matrices; infinity if shapes differ, or for nan."""
    if list(map(len, a)) != list(map(len, b)):
        return math.inf
    gap = math.hypot(*(x - y for rows in zip(a, b) for x, y in zip(*rows)))
    return math.inf if math.isnan(gap) else gap


def pair_gap(got: tuple[Matrix, Vector], expected: tuple[Matrix, Vector]) -> float:
    """Return the distance of two pairs (out, lse)."""
    return matrix_gap([*got[0], got[1]], [*expected[0], expected[1]])


# Words and pictures


def shorten(rows: list) -> list:
    """Return at most 10 rows: of more, the first five and the last four."""
    return rows if len(rows) <= 10 else rows[:5] + rows[-4:]


def draw_walks(sizes: Sizes, *runs: Run) -> list[str]:
    """Return pictures of causal walks, side by side: when each tile was visited.

    At most 8 × 6 tiles of each. Tiles that the mask cuts are lighter.
    """
    lines = ["".join(run.attention.ljust(40) for run in runs)]
    for queries in tiles(range(sizes.n), sizes.block_q)[:8]:
        line = ""
        for run in runs:
            cells = ""
            for keys in tiles(range(sizes.n), sizes.block_k)[:6]:
                if (queries, keys) in run.walk:
                    shade = "█" if keys[-1] <= queries[0] else "▒"
                    cells += f"{shade}{run.walk.index((queries, keys)) + 1:<5}"
                else:
                    cells += "·     "
            line += cells.ljust(40)
        lines.append(line)
    return lines


def show_token(token: str) -> str:
    """Return a token as a label of at most 12 columns, blanks and controls made visible."""
    text = token[1:] if len(token) > 1 and token[0] == " " else token.replace(" ", "␣")
    text = printable(text)
    while display_width(text) > 12:
        text = text[:-2] + "…"
    return text


# =============================================================================================
# SHARED BY THE FIVE: the same in each script, read once
# =============================================================================================

# Arithmetic


def dot_by_hand(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Σ a[i]·b[i]."""
    return sum(map(operator.mul, a, b))


dot = getattr(math, "sumprod", dot_by_hand)  # Python 3.12 and newer have it built in


def softmax(scores: Vector) -> Vector:
    """Return exp(s) / Σ exp(s): weights that are positive and sum to 1.

    The largest score is subtracted first, so that nothing overflows. A score of -inf gets weight 0.
    If all scores are -inf, as for a query that sees no key, all weights are 0.
    """
    largest = max(scores, default=-math.inf)
    if largest == -math.inf:
        return [0.0] * len(scores)
    exps = [math.exp(s - largest) for s in scores]
    total = sum(exps)
    return [e / total for e in exps]


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


# The text and the tokenizer

CLAUSES = [
    "the house that Jack built.",
    "the malt that lay in",
    "the rat that ate",
    "the cat that killed",
    "the dog that worried",
    "the cow with the crumpled horn that tossed",
    "the maiden all forlorn that milked",
    "the man all tattered and torn that kissed",
    "the priest all shaven and shorn that married",
    "the cock that crowed in the morn that waked",
    "the farmer sowing his corn that kept",
    "the horse and the hound and the horn that belonged to",
]
# The House That Jack Built: verse n tells clauses n, n - 1, …, 0.
TEXT = "".join("This is " + " ".join(CLAUSES[n::-1]) + "\n" for n in range(len(CLAUSES)))


def split_words(text: str) -> list[str]:
    """Return the units that no merge crosses: words and punctuation with the blank before them."""
    return re.findall(r" ?\w+| ?[^\w\s]+|\s", text)


def merge_pair(parts: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return parts with every occurrence of pair joined, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding in miniature, over characters (Sennrich et al. 2016, arXiv:1508.07909).

    vocab[id] is a token. merges are the pairs that were joined, in the order they were learned.
    """

    vocab: list[str]
    merges: list[tuple[str, str]]

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Tokenizer:
        """Return a tokenizer of vocab_size tokens, or fewer if every word has become one token.

        ValueError if text is empty or has more different characters than vocab_size.
        """
        vocab = sorted(set(text))
        merges: list[tuple[str, str]] = []
        if not 0 < len(vocab) <= vocab_size:
            raise ValueError(f"vocab_size must be at least the number of different characters, "
                             f"{len(vocab)}, and the text not empty; got {vocab_size}")
        words = Counter(map(tuple, split_words(text)))  # {the parts of a word: how often it comes}
        while len(vocab) < vocab_size:
            pairs: Counter[tuple[str, str]] = Counter()
            for parts, count in words.items():
                for pair in zip(parts, parts[1:]):
                    pairs[pair] += count
            if not pairs:
                break
            # The most frequent pair; of equally frequent ones, the one that sorts first.
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            words = {merge_pair(parts, best): count for parts, count in words.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text: within each word, the merges in the order of learning.

        ValueError names a character that the vocabulary does not have.
        """
        ids = {token: i for i, token in enumerate(self.vocab)}
        unknown = set(text) - set(ids)
        if unknown:
            known = "".join(token for token in self.vocab if len(token) == 1)
            raise ValueError(f"the vocabulary has no character {min(unknown)!r}; it knows "
                             f"{known!r}")
        words = split_words(text)
        parts = {word: tuple(word) for word in words}
        for pair in self.merges:
            parts = {word: merge_pair(split, pair) for word, split in parts.items()}
        return [ids[part] for word in words for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


# Printing

WIDTH = 80  # columns of the trace
# What an output that cannot show these characters gets: one for one, then several for one.
ASCII = str.maketrans("█▓▒░·│─┴␣×Δ", "#*+:.|-+_xd") | str.maketrans({
    "→": "->", "←": "<-", "…": "...", "√": "sqrt ", "Σ": "sum ", "ᵀ": "^T", "²": "^2", "±": "+-",
    "α": "alpha", "β": "beta", "γ": "gamma",
})


def printable(text: str) -> str:
    """Return text with everything escaped that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def display_width(text: str) -> int:
    """Return the columns that text takes: East Asian wide characters two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    combining = sum(unicodedata.combining(c) > 0 for c in text)
    return len(text) + wide - combining


def bar(value: float, full: float, width: int) -> str:
    """Return a bar of value / full times width characters; a dot for a value too small to draw."""
    if value <= 0:
        return ""
    return "█" * round(width * value / full) or "·"


def format_cell(value: object, form: str) -> str:
    """Return a value as text: form is a format specification, or a template with braces."""
    if value is None:
        return ""
    return form.format(value) if "{" in form else format(value, form)


class Trace:
    """Prints the sections and their checks, as the output can show them, and counts the checks.

    predict: ask the reader for each result before it is shown. self_tests: list those that hold.
    """

    def __init__(self, ascii_only: bool = False, predict: bool = False, self_tests: bool = False):
        encoding = sys.stdout.encoding or "ascii"
        self.ascii = ascii_only or b"?" in "".join(map(chr, ASCII)).encode(encoding, "replace")
        self.colour = (sys.stdout.isatty() and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.predict = predict
        self.listening = sys.stdin is not None and sys.stdin.isatty()  # is there anybody to answer?
        self.list_self_tests = self_tests
        self.in_self_tests = False     # are the checks that come now self-tests?
        self.unlisted = 0              # self-tests of this section that held and are not listed,
        self.all_unlisted = 0          # and of all sections
        self.held = self.failed = 0    # checks
        self.asked = self.right = 0    # predictions
        self.unwritten = []            # numbers of sections that wait for a function
        self.in_checks = False         # was the last line a check?

    def plain(self, text: str) -> str:
        """Return text as this output can show it."""
        if not self.ascii:
            return text
        return text.translate(ASCII).encode("ascii", "backslashreplace").decode()

    def lines(self, lines: Sequence[str], style: str = "") -> None:
        """Print lines as they are (a picture, say). style: an ANSI code, for terminals."""
        self.in_checks = False
        for line in lines:
            line = self.plain(line).rstrip()
            print(f"\x1b[{style}m{line}\x1b[0m" if style and self.colour else line)

    def section(self, number: int, title: str, techniques: Sequence[Callable]) -> None:
        """Print a section's head: its number, its title, and the functions that do the work."""
        self.lines(["", f"── {number} ── {title} ".ljust(WIDTH, "─")], "1")
        names = "in the source: " + ", ".join(technique.__name__ for technique in techniques)
        self.lines(textwrap.wrap(names, WIDTH, subsequent_indent=" " * 15), "2")

    def say(self, text: str) -> None:
        """Print a paragraph."""
        self.lines(["", *textwrap.wrap(self.plain(text), WIDTH)])

    def note(self, text: str) -> None:
        """Print the legend of the table or picture above."""
        self.lines(textwrap.wrap(self.plain(text), WIDTH), "2")

    def table(self, rows: Sequence, columns: dict[str, str]) -> None:
        """Print rows (named tuples or dictionaries) as a table. columns: {field: format}, in order.

        A format is ".1%" or "{:.1f}×". With "bar 20" after it, the number is drawn as well; with
        nothing before that, it is drawn only. The longest bar stands for the largest number in the
        column, or for F in "bar 20 of F". A heading is the field's name with blanks for _, or what
        is said after " as ". What has a format goes to the right. None is an empty cell.
        """
        printed = []
        for column, form in columns.items():
            field, _, heading = column.partition(" as ")
            heading = heading or field.replace("_", " ")
            values = [row[field] if isinstance(row, dict) else getattr(row, field) for row in rows]
            form, _, bars = form.partition("bar ")
            if form or not bars:
                cells = [format_cell(value, form.strip()) for value in values]
                printed.append(self.pad([heading, *cells], to_the_right=form != ""))
                heading = ""
            if bars:
                width, _, full = bars.partition(" of ")
                largest = float(full) if full else max(values, default=0)
                cells = [bar(value, largest, int(width)) for value in values]
                printed.append(self.pad([heading, *cells], to_the_right=False))
        for i, cells in enumerate(zip(*printed)):
            self.lines(["  ".join(cells)], "2" if i == 0 else "")

    def pad(self, cells: list[str], to_the_right: bool) -> list[str]:
        """Return cells filled up with blanks to the same width."""
        cells = [self.plain(cell) for cell in cells]
        width = max(map(display_width, cells))
        padded = []
        for cell in cells:
            blanks = " " * (width - display_width(cell))
            padded.append(blanks + cell if to_the_right else cell + blanks)
        return padded

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared. A failure makes the status 1."""
        self.held += holds
        self.failed += not holds
        if holds and self.in_self_tests and not self.list_self_tests:
            self.unlisted += 1
        else:
            self.verdict(holds, f"{claim} ({evidence})")

    def verdict(self, holds: bool, claim: str) -> None:
        """Print a claim behind "ok" or "FAIL"."""
        if not self.in_checks:
            self.lines([""])
        mark, style = ("ok    ", "32") if holds else ("FAIL  ", "1;31")
        wrapped = textwrap.wrap(self.plain(claim), WIDTH, initial_indent=mark,
                                subsequent_indent=" " * 6)
        self.lines(wrapped, style)
        self.in_checks = True

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """Check that two matrices have one shape, and differ by less than bound in every place."""
        close = list(map(len, got)) == list(map(len, expected))
        for a, b in zip(got, expected):
            close = close and all(abs(x - y) < bound for x, y in zip(a, b))
        self.check(claim, close, f"max |Δ| < {bound:.0e}")

    def self_tests(self) -> None:
        """Take the section's checks from here on as self-tests.

        They test its functions on small examples, and nothing that the section shows. One line
        counts those that hold, unless the reader wants them listed.
        """
        self.in_self_tests = True

    def end_section(self) -> None:
        """Print how many self-tests held without being listed."""
        if self.unlisted:
            noun = "self-test" if self.unlisted == 1 else "self-tests"
            self.verdict(True, f"{self.unlisted} {noun} of these functions (--self-tests lists "
                               "them)")
        self.all_unlisted += self.unlisted
        self.unlisted = 0
        self.in_self_tests = False

    def ask(self, question: str, answer: float | str) -> None:
        """With --predict: ask, wait for the reader's answer, show the computed one, and wait again.

        A number is right within a tenth. Text is right if it is the same but for case.
        """
        if not self.predict:
            return
        if isinstance(answer, str):
            shown = answer.strip()
        elif isinstance(answer, int) or abs(answer) >= 1000:
            shown = f"{answer:,.0f}"
        else:
            shown = f"{answer:.3g}"
        self.say(f"Predict: {question}")
        if isinstance(answer, str):
            reply = self.hear("  your answer (Enter: pass) > ")
            right = reply.casefold() == shown.casefold()
        else:
            reply = self.hear("  your number, within a tenth of it (Enter: pass) > ")
            number = read_number(reply)
            while reply and number is None:
                reply = self.hear("  a number, such as 12, 0.5, 50% or 1/2 > ")
                number = read_number(reply)
            right = number is not None and abs(number - answer) <= abs(answer) / 10
        verdict = ""
        if reply:
            self.asked += 1
            self.right += right
            verdict = ": yes" if right else ": not quite"
        self.lines([f"  computed: {shown}{verdict}"], "1")
        self.hear("  (Enter: go on) ")

    def hear(self, prompt: str) -> str:
        """Return what the reader types, or "" where there is nobody to ask."""
        if not self.listening:
            return ""
        try:
            return input(prompt).strip()
        except EOFError:
            print()
            self.listening = False  # no more answers will come
            return ""


def read_number(reply: str) -> float | None:
    """Return the number that reply is, or None; 1,234, 33% and 1/3 are numbers."""
    above, _, below = reply.rstrip("%×x ").replace(",", "").partition("/")
    try:
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return number / 100 if reply.endswith("%") else number


# The command line


class Section(NamedTuple):
    """A section of the trace. core: it belongs to the chapter itself; the others can wait."""

    title: str
    show: Callable
    techniques: Sequence[Callable]  # the functions and classes that its head names
    core: bool = True


class OneLineParser(ArgumentParser):
    """argparse, but a refusal is one line, and shows control characters instead of sending them."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists the options)\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number from low, which is at least 0, to high."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """Return a parser with the options that all five scripts have; a script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    number = whole_number(1, n_sections)
    parser.add_argument("--section", metavar="N[,N...]", action="extend",
                        type=lambda text: [number(part) for part in text.split(",")],
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true",
                        help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true",
                        help="be asked for each section's result before it is shown")
    parser.add_argument("--self-tests", action="store_true",
                        help="list the checks on small examples, too, instead of their number")
    return parser


def list_sections(trace: Trace, sections: Sequence[Section]) -> None:
    """Print the sections' numbers and titles, the core ones with a star."""
    for number, section in enumerate(sections, 1):
        star = "*" if section.core else " "
        trace.lines([f"{number:>2}{star} {section.title}"])
    trace.lines(["", "* the core of the chapter; the others can wait"])


def run_section(trace: Trace, number: int, section: Section, knobs: Namespace) -> None:
    """Print one section. Where a function is not written yet (an exercise), say so and go on."""
    start = time.perf_counter()
    trace.section(number, section.title, section.techniques)
    missing = None
    try:
        section.show(trace, knobs)
    except NotImplementedError as error:
        missing = error
    trace.end_section()
    if missing is not None:
        trace.unwritten.append(number)
        trace.say(f"Not written yet: {missing}. This section goes on once it is.")
    if knobs.time:
        sys.stdout.flush()
        print(f"section {number}: {time.perf_counter() - start:.2f} s", file=sys.stderr)


def print_summary(trace: Trace, next_experiment: str) -> None:
    """Print how many checks held, and what to run next."""
    summary = [""]
    if trace.failed:
        summary.append(f"{trace.failed} of {trace.failed + trace.held} checks FAILED.")
    elif trace.held:
        summary.append(f"All {trace.held} checks held.")
        if trace.all_unlisted:
            summary[-1] += f" (Self-tests: {trace.all_unlisted}.)"
    else:
        summary.append("No check was reached.")
    if trace.unwritten:
        numbers = ", ".join(map(str, trace.unwritten))
        waiting = "Section {} waits" if len(trace.unwritten) == 1 else "Sections {} wait"
        summary += textwrap.wrap(f"{waiting.format(numbers)} for a function.", WIDTH)
    if trace.asked:
        summary.append(f"Predictions: {trace.right} of {trace.asked} right.")
    trace.lines([*summary, f"Try next: {next_experiment}"], "1")


def run_sections(sections: Sequence[Section], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections and return the exit status.

    0: every check held. 1: one failed, or a function is not written yet. 130: Ctrl-C. A reader who
    closes the pipe ends the trace quietly.
    """
    if sys.stdout is None:
        return 1  # there is nowhere to print
    try:
        trace = Trace(knobs.ascii, knobs.predict, knobs.self_tests)
        if knobs.list:
            list_sections(trace, sections)
        else:
            for number, section in enumerate(sections, 1):
                if not knobs.section or number in knobs.section:
                    run_section(trace, number, section, knobs)
            print_summary(trace, next_experiment)
        sys.stdout.flush()
        return 1 if trace.failed or trace.unwritten else 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Nothing can be written any more. Closing stdout must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"cannot write the trace: {error.strerror}", file=sys.stderr)
        return 1


# The sections

SECTIONS = [
    Section("Standard attention and its traffic", show_standard,
            [Traffic, standard_attention, visible_spans]),
    Section("Online softmax", show_online, [absorb, rescale, online_softmax]),
    Section("FlashAttention: scores that never leave SRAM", show_flash_v1,
            [flash_attention_v1, absorb_tile]),
    Section("FlashAttention-2: the loops exchanged", show_flash_v2, [flash_attention, finish]),
    Section("How much traffic, and which tiles", show_traffic,
            [flash_attention], core=False),
    Section("The backward pass: weights computed again", show_backward,
            [flash_attention_backward, recompute_weights, softmax_backward,
             standard_attention_backward]),
    Section("Flash-Decoding: split the keys", show_decode,
            [flash_decode, merge_partials, decode_wait, choose_splits]),
    Section("Grouped queries, windows, pages and sinks", show_family,
            [flash_grouped_query, flash_packed_group, PagedRows], core=False),
    Section("FlashAttention-3: FP8", show_fp8,
            [round_to_e4m3, quantize_blocks, hadamard_rotate], core=False),
    Section("FlashAttention-4: cheaper exponentials", show_fa4,
            [absorb_lazily, exp2_by_polynomial], core=False),
]


def build_parser() -> OneLineParser:
    """Return the parser with this script's knobs."""
    parser = common_parser("microflash", "FlashAttention, tile by tile, its traffic counted.",
                           len(SECTIONS))
    parser.add_argument("--text", default=SENTENCE,
                        help=f"the text whose scores section 2 takes in (default: {SENTENCE!r})")
    for flag, high, default, meaning in (
        ("--seq-len", 256, SEQ_LEN, "queries, and keys"),
        ("--head-dim", 128, HEAD_DIM, "channels of a head"),
        ("--block-q", 10**6, BLOCK_Q, "queries in a tile"),
        ("--block-k", 10**6, BLOCK_K, "keys in a tile"),
        ("--n-splits", 1024, N_SPLITS, "parts of the cache in section 7"),
    ):
        parser.add_argument(flag, metavar="N", type=whole_number(1, high), default=default,
                            help=f"{meaning} (default {default})")
    parser.add_argument("--sram", metavar="N", type=whole_number(1, 10**9),
                        help=f"numbers that SRAM holds (default {SRAM}, or what the tiles need if "
                             "that is more)")
    parser.add_argument("--causal", action="store_true",
                        help="mask the future in sections 1, 3 and 6 (4 and 8 always do)")
    return parser


def read_sizes(parser: OneLineParser, knobs: Namespace) -> Sizes:
    """Return the sizes, or refuse in one line those that take too long or do not fit into SRAM."""
    n, d = knobs.seq_len, knobs.head_dim
    n_tiles = ceil_div(n, knobs.block_q) * ceil_div(n, knobs.block_k)
    if n * n * d > MAX_WORK or n_tiles > MAX_TILES:
        parser.error(f"argument --seq-len: {n} makes {n * n * d:,} products and {n_tiles:,} tiles, "
                     f"more than this trace takes, {MAX_WORK:,} and {MAX_TILES:,}; --seq-len "
                     f"{min(math.isqrt(MAX_WORK // d), math.isqrt(MAX_TILES))} would do")
    block_q = min(knobs.block_q, n)
    block_k = min(knobs.block_k, n)
    # The backward pass can take smaller tiles, but none smaller than 1 × 1.
    needed = max(sum(sram_parts(block_q, block_k, d, d).values()),
                 sram_needed_backward(1, 1, d, d))
    sram = max(SRAM, needed) if knobs.sram is None else knobs.sram
    if sram < needed:
        parser.error(f"argument --sram: {sram} numbers do not hold the tiles of --block-q "
                     f"{block_q} and --block-k {block_k}; {needed} would")
    return Sizes(n, d, block_q, block_k, sram, knobs.seed)


def read_tokens(parser: OneLineParser, knobs: Namespace) -> None:
    """Set knobs.tokens and knobs.labels from the text, or refuse it in one line."""
    if not knobs.text.strip():
        parser.error("argument --text: there must be something in it")
    # Room for the characters that TEXT does not have.
    tokenizer = Tokenizer.train(TEXT + knobs.text, VOCAB_SIZE + len(set(knobs.text) - set(TEXT)))
    knobs.tokens = [tokenizer.vocab[i] for i in tokenizer.encode(knobs.text)]
    knobs.labels = [show_token(token) for token in knobs.tokens]
    if len(knobs.tokens) > MAX_TOKENS:
        parser.error(f"argument --text: {len(knobs.tokens)} tokens are more than this trace shows, "
                     f"{MAX_TOKENS}")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace and return the exit status."""
    parser = build_parser()
    knobs = parser.parse_args(argv)
    knobs.sizes = read_sizes(parser, knobs)
    read_tokens(parser, knobs)
    return run_sections(SECTIONS, knobs,
                        "python3 microflash.py --section 3,4 --causal --block-q 8 --block-k 32")


if __name__ == "__main__":
    sys.exit(main())
