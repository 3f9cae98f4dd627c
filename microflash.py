#!/usr/bin/env python3
"""Attention that never writes down its matrix.

Attention multiplies fast and waits for memory: the n × n matrix of its weights is written out, read back, and
thrown away. FlashAttention cuts the work into tiles that fit in the small fast memory next to the arithmetic
(SRAM), and never sends that matrix through the large slow one (HBM). The result is the same; what changes is
how many numbers cross between the two. This script moves the tiles for real and counts every number that
crosses, forward and backward, until the bounds of the papers come out.

It shows what FlashAttention does and how much traffic that saves, not how fast it is: in pure Python there is
no SRAM to win from, and the tiles only cost time. Plain attention is faster here.

Run it (`python microflash.py`), read the trace, then read on from here in order: every section of the trace is
a section of this file.

The papers:
  Milakov and Gimelshein, Online Normalizer Calculation for Softmax, 2018, 1805.02867     section 2
  Dao et al., FlashAttention: Fast and Memory-Efficient Exact Attention with
    IO-Awareness, 2022, arXiv:2205.14135                                                  sections 1, 3, 5, 6
  Dao, FlashAttention-2: Faster Attention with Better Parallelism and Work
    Partitioning, 2023, arXiv:2307.08691                                                  sections 4, 6
  Dao, Haziza, Massa and Sizov, Flash-Decoding for Long-Context Inference, 2023,
    pytorch.org/blog/flash-decoding                                                       section 7
  Liu et al., Ring Attention with Blockwise Transformers, 2023, arXiv:2310.01889          section 7
  Kwon et al., PagedAttention (vLLM), 2023, arXiv:2309.06180                              section 8
  Shah et al., FlashAttention-3, 2024, arXiv:2407.08608                                   section 9
  Zadouri et al., FlashAttention-4, 2026, arXiv:2603.05451                                section 9
"""

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
from dataclasses import dataclass
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
MAX_WORK = 2**19   # seq_len² · head_dim, and
MAX_TILES = 2**12  # tiles of scores: more would take longer than anyone watches
MAX_TOKENS = 256   # longest text accepted
VOCAB_SIZE = 96    # tokens: the words of SENTENCE are then one token each


# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Standard attention and its traffic
#
# A GPU computes in SRAM: fast, a few hundred KB for each of its hundred-odd processors (SMs). Everything else
# lives in HBM: tens of GB, and slow. Standard attention runs as three kernels, each of which reads its inputs
# from HBM and writes its result back there, because the n × n matrices between them do not fit anywhere else:
#
#     S = q kᵀ · scale            reads q, k          writes S
#     P = softmax(S)              reads S             writes P
#     O = P v                     reads P, v          writes O
#
# So n² numbers cross four times, for the sake of n·d numbers of input and n·d of output. (More in practice: mask
# and dropout used to be kernels of their own.) L, the log-sum-exp of each row of S, is kept as well; the backward
# pass and the merging of partial results will want it.

class Traffic:
    """HBM on one side, SRAM on the other: counts the numbers that cross, and how many SRAM holds.

    sram: how many it can hold (None: any number). What does not fit is refused with a ValueError.
    draw: keep the walk, the tiles of scores made, as (queries, keys), in order; their number is counted anyway.
    """

    def __init__(self, sram: int | None = None, draw: bool = False):
        self.sram, self.reads, self.writes, self.held, self.peak, self.tiles = sram, 0, 0, 0, 0, 0
        self.walk: list[tuple[range, range]] | None = [] if draw else None

    @property
    def accesses(self) -> int:
        """Numbers that crossed, either way."""
        return self.reads + self.writes

    def load(self, matrix: Sequence, rows: range) -> list:
        """Copy these rows of a matrix (or numbers of a vector) from HBM into SRAM: a change to the copy stays there."""
        tile = [row if isinstance(row, (int, float)) else list(row) for row in matrix[rows.start:rows.stop]]
        self.reads += count_numbers(tile)
        self.hold(count_numbers(tile))
        return tile

    def store(self, matrix: list, rows: range, tile: Sequence) -> None:
        """Write a tile from SRAM over these rows of a matrix (or vector) in HBM, or after its last.

        ValueError if the tile has more rows or fewer than that, or would leave a gap.
        """
        if len(tile) != len(rows) or rows.start > len(matrix):
            raise ValueError(f"tile must have a row for each of {rows} and leave no gap, not {len(tile)} rows")
        matrix[rows.start:rows.stop] = tile
        self.writes += count_numbers(tile)

    def hold(self, count: int) -> None:
        """Make room in SRAM for numbers that are computed there."""
        self.held += count
        self.peak = max(self.peak, self.held)
        if self.sram is not None and self.held > self.sram:
            raise ValueError(f"SRAM holds {self.sram} numbers and would have to hold {self.held}")

    def visit(self, queries: range, keys: range) -> None:
        """Make room for this tile of scores."""
        self.tiles += 1
        if self.walk is not None:
            self.walk.append((queries, keys))
        self.hold(len(queries) * len(keys))

    @contextmanager
    def frame(self) -> Iterator[None]:
        """with hbm.frame(): what SRAM takes in from here on is dropped at the end of the block."""
        before = self.held
        yield
        self.held = before


def score_tile(q: Matrix, k: Matrix, spans: Sequence[tuple[int, int]], scale: float) -> Matrix:
    """S = q kᵀ · scale: [n_q][d], [n_k][d] -> [n_q][n_k]; -inf outside spans[i], the keys that query i sees."""
    return [[-math.inf] * lo + [dot(query, key) * scale for key in k[lo:hi]] + [-math.inf] * (len(k) - hi)
            for query, (lo, hi) in zip(q, spans)]


def standard_attention(q: Matrix, k: Matrix, v: Matrix, *, causal: bool = False, window: int | None = None,
                       scale: float | None = None, traffic: Traffic | None = None) -> tuple[Matrix, Vector]:
    """q [n_q][d], k [n_k][d], v [n_k][d_v] -> (out [n_q][d_v], lse [n_q]), by way of S and P [n_q][n_k] in HBM.

    causal: no key after the query's own position; the queries are the last n_q of the n_k positions. window: and
    none more than window - 1 positions back. scale: 1/√d unless given. A query that sees nothing gets zeros, and
    -inf. Each kernel goes row by row and reads k or v only once, which flatters it: they stay in SRAM whole.
    Raises ValueError where the arguments do not fit together. Dao et al. 2022.
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic, window=window)
    scores, weights, out, lse = ([], [], [], [])                       # these four are in HBM
    with hbm.frame():
        k_held = hbm.load(k, range(len(k)))
        for i in range(len(q)):
            with hbm.frame():
                span = visible(i, len(q), len(k), causal, window, 0)[1:]
                hbm.store(scores, range(i, i + 1), score_tile(hbm.load(q, range(i, i + 1)), k_held, [span], scale))
    for i in range(len(q)):
        with hbm.frame():
            row, = hbm.load(scores, range(i, i + 1))
            p = softmax(row)
            hbm.store(weights, range(i, i + 1), [p])
            # The largest weight is exp(0) / Σ exp(s - max), so its logarithm is max - lse.
            hbm.store(lse, range(i, i + 1), [max(row) - math.log(max(p)) if max(p) else -math.inf])
    with hbm.frame():
        columns = list(zip(*hbm.load(v, range(len(v)))))
        for i in range(len(q)):
            with hbm.frame():
                p, = hbm.load(weights, range(i, i + 1))
                hbm.store(out, range(i, i + 1), [[dot(p, column) for column in columns]])
    return out, lse


def standard_accesses(n_q: int, n_k: int, d: int, d_v: int) -> int:
    """The numbers that cross, by formula: S and P each written and read; q, k, v, O and L once."""
    return 4 * n_q * n_k + n_q * d + n_k * (d + d_v) + n_q * (d_v + 1)


def flash_accesses(n_q: int, n_k: int, d: int, d_v: int, block_q: int) -> int:
    """The same for flash_attention without a mask: k and v once for every block of queries; q, O and L once."""
    return -(-n_q // block_q) * n_k * (d + d_v) + n_q * (d + d_v + 1)


# 2. Softmax in one pass
#
# Softmax seems to need its whole row before it can begin: the maximum m first (without it exp overflows), then
# the sum l of exp(s - m), and only then the weights. Three passes. Milakov and Gimelshein's online softmax
# carries m and l together, tile by tile. When a tile brings a larger maximum, everything summed so far was
# measured from the wrong m, and by the same factor all over. One multiplication repairs it:
#
#     m_new = max(m, max(s))       c = exp(m - m_new)       l_new = c·l + Σ exp(s - m_new)
#
# If l can be carried along and repaired, so can any sum with the same weights, and the one that attention wants
# is o = Σ exp(s - m) · v. Divided by l at the very end, it is the output:
#
#     o_new = c·o + Σ_j exp(s_j - m_new) · v_j
#
# This step is the heart of FlashAttention, in every version of it, and absorb() is the only place where it is
# written in this file. With nothing to average (o empty), it is online softmax.

State = tuple[float, float, Vector]  # of one query: (m, l, o)
EMPTY = -math.inf, 0.0               # m and l before the first key


def absorb(state: State, scores: Vector, columns: Sequence[Sequence[float]], threshold: float = 0.0) -> State:
    """One query takes in one more tile of keys: its scores [n], and the columns of v [d_v][n].

    Scores of -inf weigh nothing, and may be all there is.
    threshold: how far m may be exceeded before it follows (section 9; 0 is the usual softmax).
    """
    m, l, o = state
    top = max(scores)
    m_new = top if top > m + threshold else m
    if m_new == -math.inf:
        return state  # all hidden so far; and -inf - -inf is not a number
    c = math.exp(m - m_new)
    p = [math.exp(s - m_new) for s in scores]
    return m_new, c * l + sum(p), [c * x + dot(p, column) for x, column in zip(o, columns)]


def finish(state: State) -> tuple[Vector, float]:
    """(o / l, log-sum-exp) of a query that has seen all its keys: zeros and -inf if there were none."""
    m, l, o = state
    return ([x / l for x in o], m + math.log(l)) if l else ([0.0] * len(o), -math.inf)


def safe_softmax(scores: Vector, traffic: Traffic | None = None) -> Vector:
    """Softmax in the three passes of the textbooks, each of which reads the scores from HBM again. -inf gets 0."""
    hbm, row, weights = traffic or Traffic(), range(len(scores)), []
    with hbm.frame():
        m = max(hbm.load(scores, row), default=-math.inf)
    if m == -math.inf:
        return [0.0] * len(scores)
    with hbm.frame():
        l = sum(math.exp(s - m) for s in hbm.load(scores, row))
    with hbm.frame():
        hbm.store(weights, row, [math.exp(s - m) / l for s in hbm.load(scores, row)])
    return weights


def online_softmax(scores: Vector, *, tile: int = 1, traffic: Traffic | None = None) -> Vector:
    """Softmax in two passes, one for m and l together and one for the weights; `tile` scores at a time.

    Scores of -inf get 0. ValueError if tile < 1. Milakov and Gimelshein 2018.
    """
    if tile < 1:
        raise ValueError(f"tile must be at least 1 score, not {tile}")
    hbm, weights, state = traffic or Traffic(), [], (*EMPTY, [])
    for part in tiles(range(len(scores)), tile):
        with hbm.frame():
            state = absorb(state, hbm.load(scores, part), [])
    m, l, _ = state
    for part in tiles(range(len(scores)), tile):
        with hbm.frame():
            hbm.store(weights, part, [math.exp(s - m) / l if l else 0.0 for s in hbm.load(scores, part)])
    return weights


def tiles(whole: range, block: int) -> list[range]:
    """whole, cut into blocks; the last may be shorter."""
    return [whole[start:start + block] for start in range(0, len(whole), block)]


# 3. FlashAttention, Algorithm 1
#
# Now the tiles. A block of keys and values comes into SRAM (outer loop); then, one after another, every block of
# queries (inner loop) with what it has so far: o, m and l. It absorbs the tile of scores q kᵀ, which is made in
# SRAM, used, and dropped. Then o, m and l go back to HBM. Algorithm 1 keeps o divided by l at all times, so each
# visit takes the old division back and makes a new one; the paper writes both in one line:
#
#     o = diag(l_new)⁻¹ (diag(l) · exp(m - m_new) · o + …)
#
# Nothing of size n × n exists anywhere. What remains of S is the log-sum-exp of each row, L = m + log l: one
# number from which section 6 can make any weight again, as exp(s - L).

def flash_attention_v1(q: Matrix, k: Matrix, v: Matrix, *, block_q: int, block_k: int, causal: bool = False,
                       window: int | None = None, scale: float | None = None,
                       traffic: Traffic | None = None) -> tuple[Matrix, Vector]:
    """(out, lse) as standard_attention, tile by tile in the order of 2022: Dao et al., Algorithm 1.

    block_q, block_k: rows in a tile of q, and of k and v; they need not divide anything. HBM begins with o, m and
    l of no keys, written for every row, and is left with m and l, from which lse is made on the way out. Every block
    of k and v is loaded, even one that nobody sees.
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic, block_q=block_q, block_k=block_k, window=window)
    out, stats = [], []                                                # in HBM: o, and (m, l)
    hbm.store(out, range(len(q)), [[0.0] * len(v[0]) for _ in q])
    hbm.store(stats, range(len(q)), [list(EMPTY) for _ in q])
    for keys in tiles(range(len(k)), block_k):
        with hbm.frame():
            k_tile, v_tile = hbm.load(k, keys), hbm.load(v, keys)
            for rows in tiles(range(len(q)), block_q):
                spans = tile_spans(rows, keys, len(q), len(k), causal, window)
                if nothing_seen(spans):
                    continue
                with hbm.frame():
                    q_tile, o_tile, ml = hbm.load(q, rows), hbm.load(out, rows), hbm.load(stats, rows)
                    hbm.visit(rows, keys)
                    states = [(m, l, [l * x for x in o]) for o, (m, l) in zip(o_tile, ml)]
                    states = absorb_tile(states, score_tile(q_tile, k_tile, spans, scale), v_tile)
                    hbm.store(out, rows, [finish(state)[0] for state in states])
                    hbm.store(stats, rows, [[m, l] for m, l, _ in states])
    return out, [m + math.log(l) if l else -math.inf for m, l in stats]


def absorb_tile(states: Sequence[State], scores: Matrix, v_tile: Matrix) -> list[State]:
    """absorb() for every query of a tile: scores [rows][keys], v_tile [keys][d_v]."""
    columns = list(zip(*v_tile))  # so that each output channel is one dot product with the weights
    return [absorb(state, row, columns) for state, row in zip(states, scores)]


def tile_spans(rows: range, keys: range, n_q: int, n_k: int, causal: bool, window: int | None) -> list[tuple[int, int]]:
    """For each query of a tile, the keys lo to hi of the tile that it sees, counted from the tile's first."""
    def clip(j: int) -> int:
        return min(max(j, keys.start), keys.stop) - keys.start

    return [(clip(lo), clip(hi)) for _, lo, hi in (visible(i, n_q, n_k, causal, window, 0) for i in rows)]


def nothing_seen(spans: Sequence[tuple[int, int]]) -> bool:
    """Does no query of the tile see any of its keys? Such a tile is neither loaded nor computed."""
    return all(lo == hi for lo, hi in spans)


def visible(i: int, n_q: int, n_k: int, causal: bool, window: int | None, sinks: int) -> tuple[int, int, int]:
    """(s, lo, hi): query i of n_q sees the keys [0, s) and [lo, hi) of n_k, where s <= lo <= hi."""
    position = n_k - n_q + i
    hi = max(position + 1, 0) if causal else n_k
    lo = 0 if window is None else min(max(position + 1 - window, 0), hi)
    return min(sinks, lo), lo, hi


def sram_needed(block_q: int, block_k: int, d: int, d_v: int) -> int:
    """What a tile takes, by formula: q, o, m and l; k and v; and the scores, over which the weights are written."""
    return block_q * (d + d_v + 2) + block_k * (d + d_v) + block_q * block_k


# 4. FlashAttention-2
#
# Exchange the loops, and o, m and l never leave SRAM until their row is finished: they are written once. The
# division by l waits until the end as well, so that between the products of matrices, which tensor cores make
# fast, less is left for the slow ordinary arithmetic. And blocks of queries are now independent of each other, so
# each can go to another SM: one head of one long text fills a card.
#
# Under a causal mask the tiles above the diagonal are never loaded, those below it need no mask, and only those
# on it are masked. Half of the work is gone. (Kernels do not ask tile by tile: the bounds of the loop say it.)

def flash_attention(q: Matrix, k: Matrix, v: Matrix, *, block_q: int, block_k: int, causal: bool = False,
                    window: int | None = None, scale: float | None = None, keys: range | None = None,
                    traffic: Traffic | None = None) -> tuple[Matrix, Vector]:
    """(out, lse) as standard_attention, tile by tile in the order of 2023: Dao, FlashAttention-2, Algorithm 1.

    block_q, block_k: rows in a tile of q, and of k and v; they need not divide anything. keys: attend to this run
    of the keys only, each in its own position (section 7).
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic, block_q=block_q, block_k=block_k, window=window, keys=keys)
    out, lse = [], []                                                  # in HBM
    for rows in tiles(range(len(q)), block_q):
        with hbm.frame():
            q_tile, states = hbm.load(q, rows), [(*EMPTY, [0.0] * len(v[0]))] * len(rows)
            hbm.hold(len(rows) * (len(v[0]) + 2))                      # m, l, o
            for part in tiles(range(len(k)) if keys is None else keys, block_k):
                spans = tile_spans(rows, part, len(q), len(k), causal, window)
                if nothing_seen(spans):
                    continue
                with hbm.frame():
                    k_tile, v_tile = hbm.load(k, part), hbm.load(v, part)
                    hbm.visit(rows, part)
                    states = absorb_tile(states, score_tile(q_tile, k_tile, spans, scale), v_tile)
            finished = [finish(state) for state in states]
            hbm.store(out, rows, [o for o, _ in finished])
            hbm.store(lse, rows, [log_sum_exp for _, log_sum_exp in finished])
    return out, lse


# 5. How much traffic, really
#
# In FlashAttention-2's order, k and v cross once for every block of queries: n/B_r times n·2d numbers (for
# d_v = d). SRAM must hold q, o, k and v tiles and the scores: for square tiles, M = 4dB + B² + 2B. While B is small
# beside d that is B = M/4d, and so
#
#     accesses = n/B · n·2d + O(nd) = 8 · n²d²/M + O(nd)
#
# which is the papers' bound, order n²d²/M, with its constant. Standard attention's 4n² does not depend on M. The
# two meet where 8d² = 4M: FlashAttention pays as soon as SRAM is larger than some 2d². (With d = 128 that is 32K
# numbers, 64 KB at 16 bits; a tile wide and low, of few keys and many queries, needs half of it.)
#
# Which blocks are best for a given M? Whatever stands in the outer loop stays, whatever stands in the inner loop
# crosses again and again: version 1 wants long blocks of keys, version 2 long blocks of queries. So the other side
# should be as short as the tensor cores allow.
#
# What this leaves out: a card's L2 cache (40 MB on an A100) serves part of these reads, so its HBM sees fewer.

@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense 16-bit FLOP/s, its HBM in bytes/s and bytes, its SMs and their shared memory."""
    name: str
    flops: float
    hbm_bytes_per_s: float
    hbm_bytes: float
    n_sms: int
    sram_kb: int  # of one SM
    source: str

    @property
    def ridge(self) -> float:
        """FLOPs it can do in the time it takes to read a byte."""
        return self.flops / self.hbm_bytes_per_s


A100 = Card("A100 80GB SXM", 312e12, 2039e9, 80e9, 108, 164, "NVIDIA A100 data sheet; Ampere tuning guide")
H100 = Card("H100 80GB SXM", 989.4e12, 3350e9, 80e9, 132, 228, "NVIDIA Hopper white paper; Hopper tuning guide")
# Forward tiles at 16 bits without a mask: version, card, d, block_q, block_k. From Dao-AILab/flash-attention,
# csrc/flash_attn/src/flash_fwd_launch_template.h and hopper/tile_size.h.
REAL_TILES = [("FlashAttention-2", A100, 64, 128, 128), ("FlashAttention-2", A100, 128, 128, 64),
              ("FlashAttention-3", H100, 64, 192, 192), ("FlashAttention-3", H100, 128, 128, 176)]


def blocks_that_fit(sram: int, d: int, d_v: int, n_q: int, n_k: int) -> list[tuple[int, int]]:
    """Every block_q up to n_q for which SRAM has room, with the largest block_k up to n_k that then fits."""
    return [(block_q, min(n_k, room // (d + d_v + block_q))) for block_q in range(1, n_q + 1)
            if (room := sram - block_q * (d + d_v + 2)) >= d + d_v + block_q]


# 6. The backward pass
#
# Given dO, the gradient of the loss by the output, training needs dq, dk and dv:
#
#     dv = Pᵀ dO        dP = dO vᵀ        dS = P ∘ (dP - D)        dq = dS k · scale        dk = dSᵀ q · scale
#
# with D_i = Σ_j P_ij dP_ij. P again, and it was never written down. But P = exp(S - L), tile by tile, from q, k
# and one number a row: one product of matrices more than if P had been kept, and far less traffic, hence less
# memory *and* less time. And D needs no row of P: Σ_j P_ij (dO_i · v_j) = dO_i · O_i, so D = rowsum(dO ∘ O).
#
# The outer loop is over keys, whose dk and dv stay in SRAM till they are complete. dq of a block of queries gets a
# share from every block of keys, so it crosses each time; on a GPU many SMs add to it at once, by atomic adds,
# which is why its last bits may change from run to run.

def flash_attention_backward(q: Matrix, k: Matrix, v: Matrix, out: Matrix, lse: Vector, d_out: Matrix, *, block_q: int,
                             block_k: int, causal: bool = False, window: int | None = None, scale: float | None = None,
                             traffic: Traffic | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """(dq [n_q][d], dk [n_k][d], dv [n_k][d_v]) from what the forward pass left, out and lse, and d_out [n_q][d_v].

    The options are those of flash_attention, and must be the same. D, block by block of queries, and zeros for dq are
    written first. Dao, FlashAttention-2.
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic, block_q=block_q, block_k=block_k, window=window)
    d, d_v = len(k[0]), len(v[0])
    check_rows(len(q), out=(out, d_v), lse=(lse, None), d_out=(d_out, d_v))
    dq, dk, dv, rowsums = [], [], [], []                               # in HBM
    hbm.store(dq, range(len(q)), [[0.0] * d for _ in q])
    for rows in tiles(range(len(q)), block_q):
        with hbm.frame():
            hbm.store(rowsums, rows, list(map(dot, hbm.load(d_out, rows), hbm.load(out, rows))))
    for keys in tiles(range(len(k)), block_k):
        with hbm.frame():
            k_tile, v_tile = hbm.load(k, keys), hbm.load(v, keys)
            dk_tile, dv_tile = [[0.0] * d for _ in keys], [[0.0] * d_v for _ in keys]
            hbm.hold(len(keys) * (d + d_v))
            for rows in tiles(range(len(q)), block_q):
                spans = tile_spans(rows, keys, len(q), len(k), causal, window)
                if nothing_seen(spans):
                    continue
                with hbm.frame():
                    q_tile, do_tile, dq_tile = hbm.load(q, rows), hbm.load(d_out, rows), hbm.load(dq, rows)
                    lse_tile, rowsum_tile = hbm.load(lse, rows), hbm.load(rowsums, rows)
                    hbm.visit(rows, keys)                              # P
                    hbm.hold(len(rows) * len(keys))                    # dP, and dS over it
                    p = recompute_weights(score_tile(q_tile, k_tile, spans, scale), lse_tile)
                    dp = linear(do_tile, v_tile)                       # dO vᵀ
                    ds = [[weight * (slope - rowsum) * scale for weight, slope in zip(weights, slopes)]
                          for weights, slopes, rowsum in zip(p, dp, rowsum_tile)]
                    dv_tile = add_matrices([dv_tile, multiply(transpose(p), do_tile)])
                    dk_tile = add_matrices([dk_tile, multiply(transpose(ds), q_tile)])
                    hbm.store(dq, rows, add_matrices([dq_tile, multiply(ds, k_tile)]))
            hbm.store(dk, keys, dk_tile)
            hbm.store(dv, keys, dv_tile)
    return dq, dk, dv


def recompute_weights(scores: Matrix, lse: Vector) -> Matrix:
    """P = exp(S - L): the weights of a tile again, finished, with no maximum and no sum to wait for."""
    return [[math.exp(s - log_sum_exp) if s > -math.inf else 0.0 for s in row] for row, log_sum_exp in zip(scores, lse)]


def standard_attention_backward(q: Matrix, k: Matrix, v: Matrix, weights: Matrix, d_out: Matrix, *,
                                scale: float | None = None,
                                traffic: Traffic | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """(dq, dk, dv) from the weights P [n_q][n_k], kept since the forward pass. Dao et al. 2022.

    Five kernels, through dP and dS in HBM; each is again read in one go, as though SRAM held it whole.
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic)
    check_rows(len(q), weights=(weights, len(k)), d_out=(d_out, len(v[0])))
    queries, keys = range(len(q)), range(len(k))
    dp, ds, dq, dk, dv = [], [], [], [], []                            # in HBM
    with hbm.frame():
        hbm.store(dv, keys, multiply(transpose(hbm.load(weights, queries)), hbm.load(d_out, queries)))
    with hbm.frame():
        hbm.store(dp, queries, linear(hbm.load(d_out, queries), hbm.load(v, keys)))
    with hbm.frame():
        hbm.store(ds, queries, [[weight * (slope - dot(row, slopes)) * scale for weight, slope in zip(row, slopes)]
                                for row, slopes in zip(hbm.load(weights, queries), hbm.load(dp, queries))])
    with hbm.frame():
        hbm.store(dq, queries, multiply(hbm.load(ds, queries), hbm.load(k, keys)))
    with hbm.frame():
        hbm.store(dk, keys, multiply(transpose(hbm.load(ds, queries)), hbm.load(q, queries)))
    return dq, dk, dv


def sram_needed_backward(block_q: int, block_k: int, d: int, d_v: int) -> int:
    """What a tile of the backward pass takes, by formula: q, dq, dO, L and D; k, v, dk and dv; P and dP."""
    return max(block_q * (2 * d + d_v + 2) + block_k * 2 * (d + d_v) + 2 * block_q * block_k, block_q * 2 * d_v)


# 7. Flash-Decoding
#
# A model that generates has one query and a long cache: one block of queries, so one SM works and the others wait.
# Flash-Decoding cuts the keys instead. Each split runs FlashAttention over its own part, and leaves out_s and L_s,
# as if there were nothing else. They are merged as section 2 merges tiles; L_s is all it takes:
#
#     L = log Σ_s exp(L_s)         out = Σ_s exp(L_s - L) · out_s
#
# Merging is associative and commutative, so the parts may come in any order and meet in any tree. The same step is
# ring attention (k and v go round a ring of cards, and each card merges what passes) and cascade attention (many
# requests share a prefix: attend to it once for all of them, to each one's own rest alone, and merge).

def flash_decode(q: Matrix, k: Matrix, v: Matrix, *, n_splits: int, block_q: int = BLOCK_Q, block_k: int = BLOCK_K,
                 causal: bool = False, window: int | None = None, scale: float | None = None,
                 traffic: Traffic | None = None) -> tuple[Matrix, Vector]:
    """(out, lse) as flash_attention, the keys cut into n_splits runs that do not wait for each other, then merged.

    A second kernel merges: it reads all parts from HBM, where the runs wrote them, and writes out and lse there.
    """
    scale, hbm = check_arguments(q, k, v, scale, traffic, n_splits=n_splits)
    parts = [flash_attention(q, k, v, keys=keys, block_q=block_q, block_k=block_k, causal=causal, window=window,
                             scale=scale, traffic=hbm) for keys in split_evenly(len(k), n_splits)]
    out, lse, whole = [], [], range(len(q))
    with hbm.frame():
        merged = merge_partials([(hbm.load(part, whole), hbm.load(part_lse, whole)) for part, part_lse in parts])
        hbm.store(out, whole, merged[0])
        hbm.store(lse, whole, merged[1])
    return out, lse


def merge_partials(parts: Sequence[tuple[Matrix, Vector]]) -> tuple[Matrix, Vector]:
    """(out [n][d_v], lse [n]) of the same queries over disjoint sets of keys -> (out, lse) over all of them.

    Queries that saw nothing anywhere keep zeros and -inf. ValueError if there are no parts, or of unequal length.
    """
    if not parts or len({len(rows) for part in parts for rows in part}) > 1:
        raise ValueError(f"parts must be at least one (out, lse), all of as many rows, not {len(parts)} of "
                         f"{[len(rows) for part in parts for rows in part]}")
    merged = []
    for outs, lses in zip(zip(*(out for out, _ in parts)), zip(*(lse for _, lse in parts))):
        # As if each part were one key, with L_s its score and out_s its value.
        merged.append(finish(absorb((*EMPTY, [0.0] * len(outs[0])), list(lses), list(zip(*outs)))))
    return [out for out, _ in merged], [lse for _, lse in merged]


def split_evenly(n: int, n_splits: int) -> list[range]:
    """range(n) in n_splits runs whose lengths differ by at most 1; runs are empty where there are more than n."""
    return [range(n * s // n_splits, n * (s + 1) // n_splits) for s in range(n_splits)]


def splits_that_fill(card: Card, work: int, n_tiles: int) -> int:
    """The most splits, up to n_tiles, for which no SM gets a second job; at least 1.

    work: independent problems of n_tiles tiles of keys, each of which makes a job a split.
    """
    return max(1, min(n_tiles, card.n_sms // work))


# 8. Grouped queries, windows and pages
#
# Whatever changes only *which* keys a query sees or *where* they lie leaves absorb() alone:
#
# - Grouped-query attention: query head h reads KV head h // group. No copy of k and v is made. While decoding,
#   the group's queries (one each) can form one block, which then reads k and v once for all of them.
# - A sliding window: tiles too far back are skipped like those above the diagonal, so traffic grows with n·w.
# - Pages: the cache lies scattered in blocks, and a block table says which block holds which positions. A tile is
#   then gathered through the table on its way into SRAM. Nothing else changes.

def flash_grouped_query(q_heads: Sequence[Matrix], k_heads: Sequence[Matrix], v_heads: Sequence[Matrix],
                        **options) -> list[tuple[Matrix, Vector]]:
    """(out, lse) of each query head; n_heads of q, n_kv_heads of k and v. options: those of flash_attention.

    ValueError if n_kv_heads does not divide n_heads.
    """
    if not k_heads or len(q_heads) % len(k_heads) or len(v_heads) != len(k_heads):
        raise ValueError(f"n_kv_heads must divide the {len(q_heads)} query heads, and be the same for k and v; "
                         f"{len(k_heads)} and {len(v_heads)} do not")
    group = len(q_heads) // len(k_heads)
    return [flash_attention(q, k_heads[h // group], v_heads[h // group], **options) for h, q in enumerate(q_heads)]


class PagedRows(Sequence):
    """n rows that lie in pages: row j is pages[block_table[j // page_size]][j % page_size]. Reads as a matrix."""

    def __init__(self, pages: Sequence[Matrix], block_table: Sequence[int], n: int):
        self.pages, self.block_table, self.page_size, self.n = pages, block_table, len(pages[0]), n
        if n > len(block_table) * self.page_size:
            raise ValueError(f"n must be at most {len(block_table)} pages of {self.page_size} rows, not {n}")

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, rows):
        if isinstance(rows, slice):
            return [self[j] for j in range(*rows.indices(self.n))]
        page, slot = divmod(range(self.n)[rows], self.page_size)
        return self.pages[self.block_table[page]][slot]


# 9. What FlashAttention-3 and -4 changed
#
# The tiles stayed. Version 3 (Hopper) overlaps the copying with the products, and softmax with both, and can run the
# products in FP8: e4m3 numbers have 3 bits after the leading one, and lie between 2⁻⁹ and 448. Outliers are what is
# feared then, and there are two remedies. Block quantization: each tile has a scale of its own. Incoherent processing:
# multiply q and k by the same random orthogonal matrix R first. Since (qR)(kR)ᵀ = q R Rᵀ kᵀ = q kᵀ, no score changes,
# but every outlier is spread over all d channels. R is a Hadamard matrix with random signs: d·log d additions.
#
# Version 4 (Blackwell): products have become so fast that exp and the rescaling of o are what takes time. So rescale
# less. m need not be the maximum; any number near it keeps exp from overflowing, and the division by l at the end
# makes up for it exactly. Follow the maximum only when it has outgrown m by more than a threshold, log2(256) = 8 in
# powers of two (the kernels compute with exp2): weights then stay below 256. It is a condition in absorb().

E4M3_MAX = 448.0
RESCALE_THRESHOLD = 8 * math.log(2)  # 16-bit inputs: flash_attn/cute/flash_fwd_sm100.py


def round_to_e4m3(x: float) -> float:
    """The nearest FP8 e4m3 number, ties to even; beyond ±448, ±448. (OCP 8-bit floating point, 2023.)"""
    step = 2.0 ** (max(math.frexp(x)[1] - 1, -6) - 3)  # below 2⁻⁶ numbers are evenly spaced
    return max(-E4M3_MAX, min(E4M3_MAX, round(x / step) * step))


def quantize_blocks(m: Matrix, block: int) -> Matrix:
    """m as FP8 can hold it, each block of rows with a scale of its own that takes its largest value, if not 0, to 448."""
    out = []
    for rows in tiles(range(len(m)), block):
        scale = max(abs(x) for i in rows for x in m[i]) / E4M3_MAX or 1.0
        out += [[round_to_e4m3(x / scale) * scale for x in m[i]] for i in rows]
    return out


def hadamard_rotate(m: Matrix, signs: Vector) -> Matrix:
    """m R, R = diag(signs) · H / √d, H as Sylvester built it, [[H, H], [H, -H]] again and again: mixes all d channels.

    ValueError unless d is a power of two, and there is one sign for each channel.
    """
    d = len(signs)
    if d < 1 or d & (d - 1) or any(len(row) != d for row in m):
        raise ValueError(f"signs must be one for each channel of m, and a power of two of them, not {d}")
    out = []
    for row in m:
        x, half = list(map(operator.mul, row, signs)), 1
        while half < d:  # butterflies: (a, b) -> (a + b, a - b), at distances 1, 2, 4, …
            x = [x[c] + x[c + half] if not c & half else x[c - half] - x[c] for c in range(d)]
            half *= 2
        out.append([value / math.sqrt(d) for value in x])
    return out


def count_rescalings(rows: Matrix, tile: int, threshold: float) -> int:
    """How often o would be rescaled while rows of scores are taken in tile by tile: m moves, the first time aside."""
    count = 0
    for row in rows:
        state = (*EMPTY, [])
        for part in tiles(range(len(row)), tile):
            m, state = state[0], absorb(state, row[part.start:part.stop], [], threshold)
            count += state[0] != m > -math.inf
    return count


# =============================================================================================
# THE EXPERIMENTS: what the trace shows, and how it is measured
# =============================================================================================

# 1. Standard attention and its traffic

def show_standard(trace: Trace, knobs: Namespace) -> None:
    """The count against the formula, and what that is on real cards."""
    n, d, causal = knobs.seq_len, knobs.head_dim, knobs.causal
    trace.say(f"What crosses between HBM and SRAM while standard_attention runs, counted in numbers, d = {d}. The "
              "longer the text, the more of it is S and P, which nobody asked for.")
    rows, counts_agree = [], True
    for length in sorted({max(1, n // 4), max(1, n // 2), n}):
        q, k, v = random_inputs(knobs, length)
        (out, _), t = counted(standard_attention, q, k, v, causal=causal)
        counts_agree &= t.accesses == standard_accesses(length, length, d, d)
        rows.append([str(length), f"{t.reads:,}", f"{t.writes:,}", f"{t.accesses:,}",
                     f"{4 * length**2 / t.accesses:.0%}"])
    trace.ask(f"for n = {n}, how many percent of all that crosses are S and P, each written and read?",
              100 * 4 * n**2 / t.accesses)
    old_table(trace, ["n", "read", "written", "crossed", "of that, S and P"], rows)

    length, d_real, nbytes = 8192, 128, 2
    trace.say(f"The same for one head of a real model, by the formula that the counts confirm: n = {length:,}, d = "
              f"{d_real}, {nbytes} bytes a number. How long a card takes to move that, and how long for the 4n²d "
              "floating-point operations (from data sheets, not timed). A ratio above 1: the arithmetic waits.")
    rows = []
    for card in (A100, H100):
        for name, crossed in (("standard", standard_accesses(length, length, d_real, d_real)),
                              ("flash, block_q 128", flash_accesses(length, length, d_real, d_real, 128))):
            moving, computing = crossed * nbytes / card.hbm_bytes_per_s, 4 * length**2 * d_real / card.flops
            rows.append([card.name, name, f"{crossed * nbytes / 1e6:,.0f} MB", f"{moving * 1e3:.3f} ms",
                         f"{computing * 1e3:.3f} ms", f"{moving / computing:.1f}×"])
    old_table(trace, ["card", "attention", "crosses", "moving", "computing", "ratio"], rows, left=(0, 1))
    trace.check("numbers counted = 4n² + n(d + d + d_v) + n(d_v + 1)", counts_agree, "equal, for each n")
    trace.check_close("standard_attention() = softmax(q kᵀ/√d) v, written out with sums", out,
                      dense_attention(q, k, v, lambda i, j: j <= i or not causal), 1e-12)


# 2. Softmax in one pass

def show_online(trace: Trace, knobs: Namespace) -> None:
    """A row of scores from the text, taken in three at a time, and what each way reads."""
    scores, tile, last = text_scores(knobs)[-1], 3, knobs.labels[-1]
    trace.say(f"How the last token of the text, {last!r}, scores the tokens, three at a time: m is the largest score "
              "so far, l the sum of exp(s - m). Watch for a late surprise: when m jumps, c = exp(m_old - m) shrinks "
              "all that l had gathered, which was measured from the wrong maximum.")
    state, rows = (*EMPTY, []), []
    for part in tiles(range(len(scores)), tile):
        new, old = scores[part.start:part.stop], state
        state = absorb(old, new, [])
        c = math.exp(old[0] - state[0])
        rows.append([f"{part.start}-{part[-1]}", knobs.labels[part.start + new.index(max(new))],
                     " ".join(f"{s:6.2f}" for s in new), *(f"{x:.4f}" for x in (state[0], c, c * old[1], state[1]))])
    if len(rows) > 10:
        rows[5:-4] = [["…"] + [""] * 6]
    old_table(trace, ["keys", "largest", "scores", "m", "c", "c·l_old", "l"], rows, left=(0, 1, 2))
    safe, three = counted(safe_softmax, scores)
    online, two = counted(online_softmax, scores, tile=tile)
    trace.ask(f"safe softmax reads its {len(scores)} scores three times, {three.reads} in all. How many numbers does "
              "online softmax read?", two.reads)
    trace.say(f"What crosses for these {len(scores)} scores: three passes read {three.reads} and write "
              f"{three.writes}, online softmax reads {two.reads} and writes {two.writes}. In attention its second "
              "pass goes too, as nobody asks for the weights themselves.")
    trace.check_close("online = three passes = softmax()", [online, safe], [softmax(scores)] * 2, 1e-12)


# 3. FlashAttention, Algorithm 1

def show_flash_v1(trace: Trace, knobs: Namespace) -> None:
    """What SRAM holds, what crosses, and the log-sum-exp."""
    n, d, causal, sram = knobs.seq_len, knobs.head_dim, knobs.causal, knobs.sram
    b_q, b_k = min(knobs.block_q, n), min(knobs.block_k, n)
    q, k, v = random_inputs(knobs, n)
    expected, standard = counted(standard_attention, q, k, v, causal=causal)
    (out, lse), flash = counted(flash_attention_v1, q, k, v, sram=sram, causal=causal, **knobs.blocks)
    trace.say(f"What SRAM holds at once, for tiles of {b_q} queries and {b_k} keys, d = {d}: never more than its "
              f"{sram:,} numbers. The matrix that standard attention writes down has {n * n:,}.")
    trace.ask("how many numbers is that, with q, o, m and l for each query, k and v for each key, and the scores?",
              flash.peak)
    parts = {"q, o": b_q * 2 * d, "m, l": b_q * 2, "k, v": b_k * 2 * d, "scores": b_q * b_k,
             "peak, counted": flash.peak}
    old_table(trace, ["", "numbers", ""], [[name, f"{size:,}", bar(size, sram, 48)] for name, size in parts.items()],
                left=(0, 2))
    trace.say(f"And what crosses, n = {n}{', causal' * causal}. For each tile of scores o, m and l come in and go "
              "out again; that is what version 2 will save.")
    old_table(trace, ["", "read", "written", "crossed", ""],
                traffic_rows({"standard": standard, "flash, version 1": flash}, 30), left=(0, 4))
    walked = walked_tiles(n, b_q, b_k, causal)
    trace.check_close("version 1 = standard attention, out and L", [*out, lse], [*expected[0], expected[1]], 1e-12)
    last, = score_tile(q[-1:], k, [(0, n)], 1 / math.sqrt(d))
    trace.check_close("what is left of S is one number a row, and gives its weights again: exp(s - L) = softmax(s)",
                      [[math.exp(s - lse[-1]) for s in last]], [softmax(last)], 1e-12)
    trace.check("numbers counted = by formula", flash.reads == 2 * n * d + sum(a * (2 * d + 2) for a, _ in walked)
                and flash.writes == n * (d + 2) + sum(a * (d + 2) for a, _ in walked), f"{flash.accesses:,}")
    trace.check("SRAM never held more than it can", flash.peak == sram_needed(b_q, b_k, d, d) <= sram,
                f"peak {flash.peak:,} of {sram:,}")


# 4. FlashAttention-2

def show_flash_v2(trace: Trace, knobs: Namespace) -> None:
    """The two walks over the tiles, and what the exchange of the loops saves."""
    n, d = knobs.seq_len, knobs.head_dim
    q, k, v = random_inputs(knobs, n)
    versions = {"1": flash_attention_v1, "2": flash_attention}
    runs = {(name, mask): counted(versions[name], q, k, v, sram=knobs.sram, causal=mask == "causal", draw=True,
                                 **knobs.blocks)
            for name in versions for mask in ("full", "causal")}
    walks = {key: t.walk for key, (_, t) in runs.items()}
    trace.say("The causal walk: rows are blocks of queries, columns blocks of keys, the numbers tell in which order "
              "the tiles come. Version 1 goes down the columns, version 2 along the rows.")
    trace.ask(f"without a mask {len(walks['2', 'full'])} tiles are computed. How many under a causal mask?",
              len(walks["2", "causal"]))
    trace.lines(side_by_side([draw_walk(f"version {name}", n, knobs, walks[name, "causal"], n) for name in "12"], 4))
    trace.note(WALK_LEGEND)
    size, width, block = min(n, 12), min(d, 8), 4
    products = 2 * size * size * width
    others = {name: count_operations(lambda *qkv: attend(*qkv, block_q=block, block_k=block),
                                     *random_inputs(knobs, size, width)) - products - size * size
              for name, attend in versions.items()}
    trace.say(f"Exchanging the loops: o is written once instead of once a tile. The last column counts, on {size} "
              f"queries and keys, d = {width}, tiles of {block} × {block}, the multiplications and divisions that "
              f"are no part of q kᵀ · scale or P v. (Those two take {products + size * size:,}, in either version.)")
    rows = traffic_rows({f"version {name}, {mask}": t for (name, mask), (_, t) in runs.items()}, 12)
    old_table(trace, ["", "tiles", "read", "written", "crossed", "", "other × and /"],
                [[row[0], str(len(walks[key])), *row[1:], f"{others[key[0]]:,}" if key[1] == "full" else ""]
                 for key, row in zip(runs, rows)], left=(0, 5))
    for mask in ("full", "causal"):
        (out, lse), t = runs["2", mask]
        expected, expected_lse = standard_attention(q, k, v, causal=mask == "causal")
        walked = walked_tiles(n, knobs.block_q, knobs.block_k, mask == "causal")
        trace.check_close(f"{mask}: version 2 = standard attention, out and L", [*out, lse],
                          [*expected, expected_lse], 1e-12)
        trace.check(f"{mask}: numbers counted = by formula; o and L written once",
                    t.reads == n * d + sum(b * 2 * d for _, b in walked) and t.writes == n * (d + 1), f"{t.accesses:,}")
    trace.check("both versions touch the same tiles, and no causal one lies above the diagonal",
                all(set(walks["1", mask]) == set(walks["2", mask]) for mask in ("full", "causal"))
                and all(keys.start < rows.stop for rows, keys in walks["2", "causal"]),
                f"{len(walks['2', 'causal'])} of {len(walks['2', 'full'])}")


# 5. How much traffic, really

def show_traffic(trace: Trace, knobs: Namespace) -> None:
    """Accesses over a grid of n, d and M, fitted; blocks for one M; tiles in use."""
    n, d, rng = 48, 16, random.Random(knobs.seed)
    q, k, v = random_inputs(knobs, n, d)
    trace.say(f"FlashAttention-2 on n = {n}, d = {d}, square tiles of B × B: the more SRAM, the fewer numbers cross. "
              f"The vertical line is standard attention; flash gets below it when M is about 2d² = {2 * d * d}.")
    standard, rows, width, crossed = standard_accesses(n, n, d, d), [], 36, {}
    for block in (2, 4, 6, 8, 12, 24):
        _, t = counted(flash_attention, q, k, v, sram=sram_needed(block, block, d, d), block_q=block, block_k=block)
        crossed[block] = t.accesses
        most = max(crossed.values())
        line, mark = bar(t.accesses, most, width).ljust(width), round(width * standard / most)
        rows.append([str(block), f"{t.peak:,}", f"{t.accesses:,}", f"{8 * (n * d)**2 / t.peak:,.0f}",
                     line[:mark] + "│" + line[mark:]])
    trace.ask("how many times fewer numbers cross with B = 8 than with B = 4?", crossed[4] / crossed[8])
    old_table(trace, ["B", "M, counted", "crossed", "8n²d²/M", f"the line: standard's {standard:,}"], rows, left=(4,))

    points, crossed, blocks = [], [], (2, 4, 6)
    for n in (12, 24, 36):
        for d in (16, 32, 64):
            q, k, v = random_inputs(knobs, n, d)
            for block in blocks:
                _, t = counted(flash_attention, q, k, v, block_q=block, block_k=block)
                points.append((n, d, t.peak))
                crossed.append(t.accesses)
    alone = [count - n * (2 * d + 1) for count, (n, d, _) in zip(crossed, points)]
    fits = {"theory": [8, 2, 2, -1], "counted": fit_powers(points, alone)}
    trace.say(f"{len(points)} runs like these (n from 12 to 36, d from 16 to 64, tiles of 2, 4 and 6), and constant "
              "· n^a · d^b · M^c fitted to the numbers of k and v that crossed. (q, O and L cross once whatever M is.) "
              "Nearly the theory, which neglects that the scores take some of M too.")
    old_table(trace, ["", "constant", "a", "b", "c"],
                [[name, f"{fit[0]:.1f}", *(f"{power:.2f}" for power in fit[1:])] for name, fit in fits.items()], (0,))

    n, d, sram = min(knobs.seq_len, 48), knobs.head_dim, knobs.sram
    q, k, v = random_inputs(knobs, n)
    fitting = blocks_that_fit(sram, d, d, n, n)
    trace.say(f"The blocks that M = {sram:,} allows for n = {n}, d = {d}: the more queries, the fewer keys. What "
              "stays in the outer loop should be long: keys in version 1, queries in version 2. (With very few keys "
              "tensor cores would idle, so kernels stop short of the best.)")
    rows, counts = [], {}
    for block_q, block_k in sorted({fitting[(len(fitting) - 1) * i // 3] for i in range(4)}):
        first, second = (counted(attend, q, k, v, sram=sram, block_q=block_q, block_k=block_k)[1]
                         for attend in (flash_attention_v1, flash_attention))
        counts[block_q] = second.accesses
        rows.append([f"{block_q}", f"{block_k}", f"{second.peak:,}", f"{first.accesses:,}", f"{second.accesses:,}"])
    old_table(trace, ["block_q", "block_k", "peak", "version 1 crosses", "version 2 crosses"], rows)

    trace.say("Tiles that real kernels use (forward, 16 bits, no mask), and what their q, k and v take of an SM's "
              "shared memory (the rest is in registers). Last column: standard attention's traffic over theirs, n = 8,192.")
    rows = []
    for name, card, d, block_q, block_k in REAL_TILES:
        held = 2 * (block_q * d + 2 * block_k * d) / 1024
        gain = standard_accesses(8192, 8192, d, d) / flash_accesses(8192, 8192, d, d, block_q)
        rows.append([name, card.name, str(d), f"{block_q} × {block_k}", f"{held:.0f} of {card.sram_kb} KB",
                     f"{gain:.1f}×"])
    old_table(trace, ["kernel", "card", "d", "tile", "q, k, v", "traffic"], rows, left=(0, 1))
    trace.check("what crosses = n/B · n · 2d + n(2d + 1), for every run",
                crossed == [flash_accesses(n, n, d, d, block) for (n, d, _), block in zip(points, blocks * 9)],
                f"{len(points)} counts")
    off = [abs(power - theory) for power, theory in zip(fits["counted"][1:], (2, 2, -1))]
    trace.check("k and v: exponents of n, d and M as in theory",
                all(map(operator.lt, off, (0.01, 0.1, 0.05))), "to 0.01, 0.1 and 0.05")
    trace.check("version 2: more queries in a block never make more cross",
                list(counts.values()) == sorted(counts.values(), reverse=True),
                f"from {max(counts.values()):,} down to {min(counts.values()):,}")


# 6. The backward pass

def show_backward(trace: Trace, knobs: Namespace) -> None:
    """Traffic and memory of both backward passes, and the gradients by finite differences."""
    n, d, causal = knobs.seq_len, knobs.head_dim, knobs.causal
    b_q, b_k, rng = min(knobs.block_q, n), min(knobs.block_k, n), random.Random(knobs.seed + 1)
    (q, k, v), d_out = random_inputs(knobs, n), random_matrix(rng, n, d)
    scores = score_tile(q, k, [visible(i, n, n, causal, None, 0)[1:] for i in range(n)], 1 / math.sqrt(d))
    weights = list(map(softmax, scores))
    out, lse = flash_attention(q, k, v, causal=causal, **knobs.blocks)
    expected, standard = counted(standard_attention_backward, q, k, v, weights, d_out)
    gradients, flash = counted(flash_attention_backward, q, k, v, out, lse, d_out, causal=causal, **knobs.blocks)

    trace.say("Less memory, less traffic, a little more arithmetic (five products of matrices instead of four): instead "
              f"of n² weights the forward pass leaves O and L. n = {n}, d = {d}{', causal' * causal}.")
    kept = [f"{count_numbers(weights):,}", f"{count_numbers(out) + count_numbers(lse):,}"]
    trace.ask(f"standard attention keeps {kept[0]} weights for the backward pass. How many numbers does flash keep, "
              "besides q, k and v?", count_numbers(out) + count_numbers(lse))
    old_table(trace, ["backward", "kept for it", "read", "written", "crossed", ""],
                [[row[0], numbers, *row[1:]] for row, numbers
                 in zip(traffic_rows({"standard": standard, "flash": flash}, 24), kept)], left=(0, 5))

    options = dict(block_q=2, block_k=3, causal=True)
    q2, k2, v2, d_out2 = (random_matrix(rng, *shape) for shape in ((5, 3), (7, 3), (7, 2), (5, 2)))

    def loss() -> float:
        return sum(map(dot, flash_attention(q2, k2, v2, **options)[0], d_out2))

    differences = [[[difference_quotient(loss, row, c) for c in range(len(row))] for row in m] for m in (q2, k2, v2)]
    analytic = flash_attention_backward(q2, k2, v2, *flash_attention(q2, k2, v2, **options), d_out2, **options)
    for name, got, want in zip(("dq", "dk", "dv"), gradients, expected):
        trace.check_close(f"{name} = the standard backward pass", got, want, 1e-11)
    trace.check_close("dq, dk, dv of 5 causal queries and 7 keys = finite differences of Σ dO × O",
                      [row for m in analytic for row in m], [row for m in differences for row in m], 1e-8)
    trace.check_close("D: rowsum(dO × O) = rowsum(P × dP)", [list(map(dot, d_out, out))],
                      [list(map(dot, weights, linear(d_out, v)))], 1e-11)
    walked = walked_tiles(n, b_q, b_k, causal)
    trace.check("numbers counted = by formula, both", standard.accesses == 7 * n * n + 8 * n * d
                and flash.accesses == n * (7 * d + 1) + sum(rows * (4 * d + 2) for rows, _ in walked),
                f"{standard.accesses:,} and {flash.accesses:,}")
    trace.check("SRAM held what the formula says", flash.peak == sram_needed_backward(b_q, b_k, d, d),
                f"peak {flash.peak:,}")


# 7. Flash-Decoding

def show_decode(trace: Trace, knobs: Namespace) -> None:
    """Partial results and their merge; SMs at work."""
    n, n_splits, rng = knobs.seq_len, knobs.n_splits, random.Random(knobs.seed)
    q, k, v = random_inputs(knobs, n)
    query, runs = q[-1:], split_evenly(n, n_splits)
    parts = [flash_attention(query, k, v, keys=keys, **knobs.blocks) for keys in runs]
    out, lse = flash_decode(query, k, v, n_splits=n_splits, **knobs.blocks)
    trace.say(f"One query, {n} keys, {n_splits} split{'s' * (n_splits > 1)}. Each leaves an output and an L. exp(L_s "
              "- L) is the share of the weight that lies in its part; the merged output is the average by these "
              "shares.")
    rows = []
    for s, (keys, (part, (part_lse,))) in enumerate(zip(runs, parts)):
        share = math.exp(part_lse - lse[0])
        rows.append([str(s), f"{keys[0]}-{keys[-1]}" if keys else "none", f"{part_lse:.3f}", f"{share:.3f}",
                     bar(share, 1, 24), f"{part[0][0]:8.4f}"])
    if len(rows) > 10:
        rows[5:-4] = [["…"] + [""] * 5]
    old_table(trace, ["split", "keys", "L_s", "share", "", "out_s[0]"],
                rows + [["all", f"0-{n - 1}", f"{lse[0]:.3f}", "1.000", "", f"{out[0][0]:8.4f}"]], left=(1, 4))

    heads, block_k = 8, 128
    trace.say(f"Who works? {A100.name}, {A100.n_sms} SMs; one decoding step of a model with {heads} KV heads; tiles "
              f"of {block_k} keys. Unsplit, there is one job for each request and head. The longest job, in tiles, "
              "is what everybody waits for.")
    rows = []
    for batch, length in ((1, 1024), (1, 8192), (1, 65536), (4, 8192), (16, 8192)):
        jobs, n_tiles = batch * heads, length // block_k
        splits = splits_that_fill(A100, jobs, n_tiles)
        cells = [[f"{min(A100.n_sms, busy)}", bar(busy, A100.n_sms, 12), f"{longest}"]
                 for busy, longest in ((jobs, n_tiles), (jobs * splits, -(-n_tiles // splits)))]
        rows.append([f"{batch}", f"{length:,}", *cells[0], f"{splits}", *cells[1]])
    trace.ask("one request of 65,536 tokens. Into how many splits must each head's keys be cut, so that nearly all SMs "
              "have work?", splits_that_fill(A100, heads, 65536 // block_k))
    old_table(trace, ["batch", "length", "SMs", "unsplit", "longest", "splits", "SMs", "split", "longest"], rows, (3, 7))

    whole, trees = flash_attention(query, k, v, **knobs.blocks), parts[:]
    while len(trees) > 1:
        trees.append(merge_partials([trees.pop(rng.randrange(len(trees))) for _ in "ab"]))
    trace.check_close("decode = one pass over all keys, out and L", [*out, lse], [*whole[0], whole[1]], 1e-12)
    trace.check_close("merged the other way round, and two by two in a random tree: the same",
                      [*merge_partials(parts[::-1])[0], *trees[0][0]], [*out, *out], 1e-12)
    halves = [flash_attention(q, k, v, keys=keys, **knobs.blocks) for keys in split_evenly(n, 2)]
    trace.check_close("cascade: all queries to a shared prefix, then to the rest, merged = to everything",
                      merge_partials(halves)[0], standard_attention(q, k, v)[0], 1e-12)


# 8. Grouped queries, windows and pages

def show_family(trace: Trace, knobs: Namespace) -> None:
    """GQA, a window and pages: traffic, walks, and equality with the dense computation."""
    n, d, rng, blocks = knobs.seq_len, knobs.head_dim, random.Random(knobs.seed), knobs.blocks
    q_heads, k_heads, v_heads = ([random_matrix(rng, n, d) for _ in range(count)] for count in (4, 2, 2))
    q, k, v = q_heads[0], k_heads[0], v_heads[0]
    apart, together = Traffic(), Traffic()
    steps = flash_grouped_query([q[-1:] for q in q_heads], k_heads, v_heads, traffic=apart, **blocks)
    as_blocks = [flash_attention([q[-1] for q in q_heads[2 * g:2 * g + 2]], k_heads[g], v_heads[g], block_q=2,
                                 block_k=knobs.block_k, traffic=together) for g in range(2)]
    trace.say(f"Grouped-query attention, 4 query heads on 2 KV heads, one decoding step over {n} keys: head by head "
              "k and v are read twice; once, if the group's queries form a block.")
    trace.ask("how many times fewer numbers cross if they do?", apart.accesses / together.accesses)
    old_table(trace, ["", "read", "written", "crossed", ""],
                traffic_rows({"head by head": apart, "group as a block": together}, 32), left=(0, 4))

    window = max(1, n // 4)
    full, windowed = (counted(flash_attention, q, k, v, causal=True, window=w, draw=True, **blocks)
                      for w in (None, window))
    trace.say(f"A window of {window} keys: tiles too far back are not touched either.")
    trace.lines(side_by_side([draw_walk(f"{name}: {t.accesses:,} crossed", n, knobs, t.walk, reach) for name, t, reach
                              in (("causal", full[1], n), (f"window {window}", windowed[1], window))], gap=4))
    trace.note(WALK_LEGEND)

    page_size = min(knobs.block_k, n)
    n_pages = -(-n // page_size)
    table = rng.sample(range(n_pages + 3), n_pages)
    k_pages, v_pages = ([[[0.0] * d] * page_size for _ in range(n_pages + 3)] for _ in "kv")
    for page, rows in zip(table, tiles(range(n), page_size)):
        k_pages[page][:len(rows)], v_pages[page][:len(rows)] = k[rows.start:rows.stop], v[rows.start:rows.stop]
    trace.say(f"Pages of {page_size} rows in {n_pages + 3} slots. The block table: " + " ".join(map(str, table[:12]))
              + " …" * (n_pages > 12) + ". k and v never lie in a row; each tile is gathered through it.")
    paged_k, paged_v = PagedRows(k_pages, table, n), PagedRows(v_pages, table, n)
    paged = counted(flash_attention, q, paged_k, paged_v, causal=True, **blocks)
    grouped = flash_grouped_query(q_heads, k_heads, v_heads, causal=True, **blocks)
    repeated = [standard_attention(q_heads[h], k_heads[h // 2], v_heads[h // 2], causal=True) for h in range(4)]
    trace.check_close("GQA without copies = standard attention with each KV head repeated",
                      [row for out, _ in grouped for row in out], [row for out, _ in repeated for row in out], 1e-12)
    trace.check_close("the group as a block = head by head", [row for out, _ in as_blocks for row in out],
                      [row for out, _ in steps for row in out], 1e-12)
    trace.check_close("window = dense attention under that mask", windowed[0][0],
                      dense_attention(q, k, v, lambda i, j: i - window < j <= i), 1e-12)
    trace.check("pages = rows in order, and as many numbers crossed",
                paged[0] == full[0] and paged[1].accesses == full[1].accesses, "to the bit")


# 9. What FlashAttention-3 and -4 changed

def show_later_versions(trace: Trace, knobs: Namespace) -> None:
    """FP8 with and without rotation; rescaling less often; what the papers report."""
    n, d, block, rng = 32, 64, 8, random.Random(knobs.seed)
    signs = [rng.choice((-1.0, 1.0)) for _ in range(d)]

    kinds = {"outliers anywhere": lambda i, c: rng.gauss(0, 10 if rng.random() < 0.001 else 1),
             "outliers in one channel": lambda i, c: rng.gauss(0, 1) + 20 * (c == d // 2) * rng.choice((-1, 1)),
             "one tile a millionth": lambda i, c: rng.gauss(0, 1e-6 if i < block else 1)}
    trace.say(f"FP8: q and k of {n} rows, d = {d}, stored in e4m3. How far a row of q kᵀ is off on average, |error| "
              f"/ |exact|, with one scale for the matrix, one for each tile of {block} rows, and q and k rotated "
              "first. Three kinds of trouble: one number in a thousand ten times as wide (much as in the "
              "FlashAttention-3 paper's test); one channel near ±20 in q and in k; a tile that is tiny.")
    errors, rotation = {}, []
    for kind, entry in kinds.items():
        q, k = ([[entry(i, c) for c in range(d)] for i in range(n)] for _ in "qk")
        rotated, exact = [hadamard_rotate(m, signs) for m in (q, k)], linear(q, k)
        rotation.append(relative_error(linear(*rotated), exact))
        errors[kind] = [fmean(relative_error([got], [want]) for got, want
                              in zip(linear(quantize_blocks(a, rows), quantize_blocks(b, rows)), exact))
                        for a, b, rows in ((q, k, n), (q, k, block), (*rotated, block))]
    remedies = errors["outliers in one channel"]
    trace.ask("one channel is large in every row. What lowers the error more, a 'scale' for each tile or 'rotation'?",
              "scale" if remedies[0] - remedies[1] > remedies[1] - remedies[2] else "rotation")
    old_table(trace, ["", "one scale", "one a tile", "and rotated"],
                [[kind, *(f"{error:.1%}" for error in row)] for kind, row in errors.items()], left=(0,))
    trace.say("e4m3 has an exponent of its own, so a scale a tile matters only where tiles differ by more than its "
              "range. Rotation helps where large meets large: spread over d channels, the rounding errors average "
              "out.")

    tile, a, b, c = 8, *(random_matrix(rng, rows, 16, spread) for rows, spread in ((32, 1), (64, 1), (64, 1)))
    scores = {"random q and k, d = 16": linear(a, b), "the text's own": text_scores(knobs),
              "rising by 1 a key": [[float(j) for j in range(64)]]}
    trace.say(f"Rescaling less: rows of scores taken in {tile} at a time. How often does m move after the first "
              "tile, so that o must be rescaled, if it follows every new maximum, and if only one that exceeds it "
              "by more than 8 powers of two?")
    rows, saved = [], True
    for name, matrix in scores.items():
        always, rarely = (count_rescalings(matrix, tile, threshold) for threshold in (0.0, RESCALE_THRESHOLD))
        saved &= rarely <= always
        steps = len(matrix) * (len(tiles(range(len(matrix[0])), tile)) - 1)
        rows.append([name, f"{steps:,}", f"{always:,}", f"{rarely:,}"])
    old_table(trace, ["rows of scores", "tiles after the first", "m follows always", "by threshold"], rows, left=(0,))
    states = [(*EMPTY, [0.0] * 16)] * len(a)
    for part in tiles(range(len(b)), tile):
        states = [absorb(state, row[part.start:part.stop], list(zip(*c[part.start:part.stop])), RESCALE_THRESHOLD)
                  for state, row in zip(states, linear(a, b))]
    trace.check("rotation changes no score", max(rotation) < 1e-12, "relative error < 1e-12")
    trace.check("rotation at least halves the error where one channel is wide, a scale a tile where a tile is tiny",
                2 * errors["outliers in one channel"][2] < errors["outliers in one channel"][1]
                and 2 * errors["one tile a millionth"][1] < errors["one tile a millionth"][0], "as in the table")
    trace.check_close("rescaling by threshold = standard attention", [finish(state)[0] for state in states],
                      standard_attention(a, b, c, scale=1.0)[0], 1e-12)
    trace.check("it never rescales more often", saved, "the counts above")


# =============================================================================================
# THE MODEL AND THE BENCH
# =============================================================================================

def multiply(a: Matrix, b: Matrix) -> Matrix:
    """The product a b: [n][m], [m][p] -> [n][p]."""
    columns = list(zip(*b))
    return [[dot(row, column) for column in columns] for row in a]


def transpose(m: Matrix) -> list[tuple[float, ...]]:
    """[n][m] -> [m][n]."""
    return list(zip(*m))


def count_numbers(tile: Sequence) -> int:
    """How many numbers a matrix or a vector has."""
    return len(tile) if not tile or isinstance(tile[0], (int, float)) else sum(map(len, tile))


def check_arguments(q: Matrix, k: Matrix, v: Matrix, scale: float | None, traffic: Traffic | None,
                    keys: range | None = None, **counts: int | None) -> tuple[float, Traffic]:
    """(the scale, the traffic to count in). ValueError, with what would do, where attention cannot work."""
    if not len(k) or not len(k[0]) or len(v) != len(k) or not len(v[0]):
        raise ValueError(f"k and v must have as many rows as each other, at least one, of at least one channel, "
                         f"not {len(k)} and {len(v)} rows")
    if any(len(row) != len(k[0]) for row in q):
        raise ValueError(f"q and k must have as many channels as each other, not {len(q[0])} and {len(k[0])}")
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, not {count}")
    if keys is not None and not (keys.step == 1 and 0 <= keys.start and (keys.stop <= len(k) or not keys)):
        raise ValueError(f"keys must be a run within the {len(k)} keys, not {keys}")
    return 1 / math.sqrt(len(k[0])) if scale is None else scale, traffic or Traffic()


def check_rows(n: int, **matrices: tuple[Sequence, int | None]) -> None:
    """ValueError unless each has n rows, one for each query, of so many channels (None: it is a vector)."""
    for name, (rows, width) in matrices.items():
        if len(rows) != n or width is not None and any(len(row) != width for row in rows):
            wanted = f"{n} rows, one for each query" + ("" if width is None else f", of {width} channels")
            found = f"{len(rows)}" + ("" if width is None else f", of {sorted(set(map(len, rows)))}")
            raise ValueError(f"{name} must have {wanted}, not {found}")


def random_inputs(knobs: Namespace, n: int, d: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """Random q, k, v [n][d], d the head_dim unless given."""
    rng = random.Random(knobs.seed)
    q, k, v = (random_matrix(rng, n, d or knobs.head_dim) for _ in range(3))
    return q, k, v


def text_scores(knobs: Namespace) -> Matrix:
    """Scores of every token of the text against every other, [n][n]: each different token has a random code, d = 16.

    Equal tokens agree, others do so by chance.
    """
    rng, d = random.Random(knobs.seed), 16
    codes = {token: random_matrix(rng, 1, d)[0] for token in dict.fromkeys(knobs.tokens)}
    x = [codes[token] for token in knobs.tokens]
    return [[score / math.sqrt(d) for score in row] for row in linear(x, x)]


def counted(function: Callable, *arguments: object, sram: int | None = None, draw: bool = False,
            **options: object) -> tuple:
    """(what function(*arguments, **options) returns, the Traffic it made)."""
    traffic = Traffic(sram, draw)
    return function(*arguments, traffic=traffic, **options), traffic


def traffic_rows(traffics: dict[str, Traffic], width: int) -> list[list[str]]:
    """Rows of a table: name, read, written, crossed, and crossed as a bar."""
    most = max(t.accesses for t in traffics.values())
    return [[name, f"{t.reads:,}", f"{t.writes:,}", f"{t.accesses:,}", bar(t.accesses, most, width)]
            for name, t in traffics.items()]


def walked_tiles(n: int, block_q: int, block_k: int, causal: bool) -> list[tuple[int, int]]:
    """For the formulas: (queries, keys) in each tile with something to see, n queries and keys.

    Under the mask that is any tile whose bottom left corner is on or below the diagonal.
    """
    return [(min(block_q, n - i), min(block_k, n - j)) for i in range(0, n, block_q) for j in range(0, n, block_k)
            if not causal or j <= min(i + block_q, n) - 1]


def draw_walk(title: str, n: int, knobs: Namespace, walk: Sequence[tuple[range, range]], reach: int) -> list[str]:
    """Tiles of n queries and keys as cells: when each was visited, and whether a causal mask `reach` wide cuts it.

    At most 8 × 8 tiles and 38 columns.
    """
    when = {(rows.start, keys.start): (step, rows, keys) for step, (rows, keys) in enumerate(walk, 1)}
    cell = len(str(len(walk))) + 2
    starts_q, starts_k = range(0, n, knobs.block_q), range(0, n, knobs.block_k)
    shown_q, shown_k = starts_q[:8], starts_k[:min(8, 38 // cell)]
    lines = [title + " (cut)" * ((shown_q, shown_k) != (starts_q, starts_k))]
    for i in shown_q:
        line = ""
        for j in shown_k:
            step, rows, keys = when.get((i, j), ("·", (), ()))
            seen = [a - reach < b <= a for a in rows for b in keys]
            line += (" █" if all(seen) else " ▒") + f"{step:>{cell - 2}}" if seen else f"{step:>{cell}}"
        lines.append(line)
    return [line.ljust(38) for line in lines]


WALK_LEGEND = "█ full tile   ▒ masked tile   · skipped: never loaded"


def difference_quotient(function: Callable[[], float], row: Vector, c: int, step: float = 1e-5) -> float:
    """The derivative of function() by row[c], by central differences; row is as before afterwards."""
    here, values = row[c], []
    for row[c] in (here + step, here - step):
        values.append(function())
    row[c] = here
    return (values[0] - values[1]) / (2 * step)


def fit_powers(points: Sequence[Sequence[float]], ys: Sequence[float]) -> Vector:
    """[c, a, b, …] for which y = c · x1^a · x2^b · … comes closest: least squares in the logarithms."""
    rows = [[1.0, *map(math.log, point)] for point in points]
    columns, target = list(zip(*rows)), list(map(math.log, ys))
    system = [[dot(a, b) for b in columns] + [dot(a, target)] for a in columns]
    for i, pivot in enumerate(system):  # Gauss and Jordan
        pivot[:] = [x / pivot[i] for x in pivot]
        for row in system:
            if row is not pivot:
                row[:] = [x - row[i] * y for x, y in zip(row, pivot)]
    solution = [row[-1] for row in system]
    return [math.exp(solution[0]), *solution[1:]]


def count_operations(function: Callable[..., object], *matrices: Matrix) -> int:
    """How many multiplications and divisions function(*matrices) makes with these numbers and what comes of them.

    They are handed over as floats that count, so whoever multiplies is counted, whatever way it goes about it.
    What comes of math.exp is a plain number; multiplied by one of the counting kind, it counts.
    """
    count = 0

    class Counted(float):
        def __mul__(self, other):
            nonlocal count
            count += 1
            return Counted(float.__mul__(self, other))

        def __truediv__(self, other):
            nonlocal count
            count += 1
            return Counted(float.__truediv__(self, other))

        def __add__(self, other):
            return Counted(float.__add__(self, other))

        def __sub__(self, other):
            return Counted(float.__sub__(self, other))

        __rmul__, __radd__ = __mul__, __add__

    function(*([list(map(Counted, row)) for row in matrix] for matrix in matrices))
    return count


def dense_attention(q: Matrix, k: Matrix, v: Matrix, sees: Callable[[int, int], bool]) -> Matrix:
    """The reference of section 1: all of QKᵀ, a mask of -inf, softmax as written in textbooks, all of V."""
    scores = [[math.fsum(a * b for a, b in zip(qi, kj)) / math.sqrt(len(qi)) if sees(i, j) else -math.inf
               for j, kj in enumerate(k)] for i, qi in enumerate(q)]
    exps = [[math.exp(s) for s in row] for row in scores]
    return [[math.fsum(e * vj[c] for e, vj in zip(row, v)) / math.fsum(row) for c in range(len(v[0]))]
            for row in exps]


def add_matrices(matrices: Sequence[Matrix]) -> Matrix:
    """The sum, element by element."""
    return [[sum(values) for values in zip(*rows)] for rows in zip(*matrices)]


def random_matrix(rng: random.Random, rows: int, columns: int, spread: float = 1.0) -> Matrix:
    """Normal numbers of mean 0 and standard deviation spread, [rows][columns]."""
    return [[rng.gauss(0, spread) for _ in range(columns)] for _ in range(rows)]


def relative_error(a: Matrix, b: Matrix) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    difference, reference = [x - y for p, r in zip(a, b) for x, y in zip(p, r)], [y for r in b for y in r]
    return math.sqrt(dot(difference, difference) / dot(reference, reference))


def old_table(trace: Trace, header: Sequence[str], rows: Sequence[Sequence[str]], left=()) -> None:
    """Print cells that are text already (to go, section by section)."""
    width = [max(map(display_width, column)) for column in zip(header, *rows)]
    for row in (header, *rows):
        cells = [cell.ljust(w) if c in left else cell.rjust(w)
                 for c, (cell, w) in enumerate(zip(row, width))]
        trace.lines(["  ".join(cells)])


def show_token(token: str) -> str:
    """Return a token as a label of at most 12 columns, blanks and controls made visible."""
    text = token[1:] if len(token) > 1 and token[0] == " " else token.replace(" ", "␣")
    text = printable(text)
    while display_width(text) > 12:
        text = text[:-2] + "…"
    return text


def side_by_side(blocks: Sequence[list[str]], gap: int = 3) -> list[str]:
    """Return pictures of the same height next to each other."""
    widths = [max(map(display_width, block)) for block in blocks]
    lines = []
    for parts in zip(*blocks):
        padded = [part + " " * (width - display_width(part)) for part, width in zip(parts, widths)]
        lines.append((" " * gap).join(padded))
    return lines


# =============================================================================================
# SHARED BY THE FIVE: the same in each script, read once
# =============================================================================================

# Arithmetic


def dot_by_hand(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Σ a[i]·b[i]."""
    return sum(map(operator.mul, a, b))


dot = getattr(math, "sumprod", dot_by_hand)  # Python 3.12 and newer have it built in


def linear(x: Matrix, w: Matrix) -> Matrix:
    """Return y = W x for every row of x: x [n][in], w [out][in] -> [n][out]. nn.Linear, no bias."""
    return [[dot(row, unit) for unit in w] for row in x]


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


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Return parts with every occurrence of pair joined, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


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
        word_counts = Counter(split_words(text))
        parts = {word: list(word) for word in word_counts}
        while len(vocab) < vocab_size:
            pair_counts: Counter[tuple[str, str]] = Counter()
            for word, count in word_counts.items():
                for pair in zip(parts[word], parts[word][1:]):
                    pair_counts[pair] += count
            if not pair_counts:
                break
            # The most frequent pair; of equally frequent ones, the one that sorts first.
            best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            parts = {word: merge_pair(split, best) for word, split in parts.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text: within each word, the merges in the order of learning.

        ValueError names a character that the vocabulary does not have.
        """
        ids = {token: i for i, token in enumerate(self.vocab)}
        for character in text:
            if character not in ids:
                known = "".join(token for token in self.vocab if len(token) == 1)
                raise ValueError(f"the vocabulary has no character {character!r}; it knows "
                                 f"{known!r}")
        words = split_words(text)
        parts = {word: list(word) for word in words}
        for pair in self.merges:
            parts = {word: merge_pair(split, pair) for word, split in parts.items()}
        return [ids[part] for word in words for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


# Printing

WIDTH = 80  # columns of the trace
# What a terminal that cannot show the character on the left gets instead of it.
ASCII = str.maketrans({
    "█": "#", "▓": "*", "▒": "+", "░": ":", "·": ".", "│": "|", "─": "-", "┌": "+", "┐": "+",
    "└": "+", "┘": "+", "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+", "→": "->", "←": "<-",
    "␣": "_", "…": "...", "×": "x", "√": "sqrt ", "Σ": "sum ", "Δ": "d", "ᵀ": "^T", "²": "^2",
    "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "α": "alpha", "β": "beta", "γ": "gamma",
    "θ": "theta", "λ": "lambda", "μ": "mu", "σ": "sigma", "τ": "tau", "∞": "inf", "≠": "!=",
})


def printable(text: str) -> str:
    """Return text with everything escaped that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def display_width(text: str) -> int:
    """Return the columns that text takes: East Asian wide characters two, combining marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    combining = sum(unicodedata.combining(c) > 0 for c in text)
    return len(text) + wide - combining


def bar(value: float, full: float, width: int) -> str:
    """Return a bar of value / full times width characters; a dot for a value too small to draw."""
    if full <= 0 or value <= 0:
        return ""
    return "█" * round(width * min(value / full, 1.0)) or "·"


def format_cell(value: object, form: str) -> str:
    """Return a value as text: form is a format specification, or a template with braces."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return form.format(value) if "{" in form else format(value, form)


class Trace:
    """Prints the sections and their checks, as the output can show them, and counts the checks.

    predict: ask the reader for each result before it is shown.
    """

    def __init__(self, ascii_only: bool = False, predict: bool = False):
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        probe = "".join(map(chr, ASCII))
        self.ascii = ascii_only or probe.encode(encoding, "ignore").decode(encoding) != probe
        self.colour = (sys.stdout is not None and sys.stdout.isatty()
                       and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.predict = predict
        self.listening = sys.stdin is not None and sys.stdin.isatty()  # is there anybody to answer?
        self.held = self.failed = 0    # checks
        self.asked = self.right = 0    # predictions
        self.unwritten = 0             # sections that wait for a function
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
        is said after " as ". Text goes to the left, numbers to the right; None is an empty cell.
        """
        printed = []
        for column, form in columns.items():
            field, _, heading = column.partition(" as ")
            values = [row[field] if isinstance(row, dict) else getattr(row, field) for row in rows]
            printed += self.table_column(heading or field.replace("_", " "), values, form)
        for i, cells in enumerate(zip(*printed)):
            self.lines(["  ".join(cells)], "2" if i == 0 else "")

    def table_column(self, heading: str, values: list, form: str) -> list[list[str]]:
        """Return the cells, heading first and padded, of the numbers and of the bars, if any."""
        form, _, bars = form.partition("bar ")
        numbers = [value for value in values if isinstance(value, (int, float))]
        columns = []
        if form or not bars:
            cells = [heading] + [format_cell(value, form.strip()) for value in values]
            columns.append(self.pad(cells, to_the_right=bool(numbers)))
            heading = ""
        if bars:
            width, _, full = bars.partition(" of ")
            largest = float(full) if full else max(numbers, default=0)
            drawn = [bar(value or 0, largest, int(width)) for value in values]
            columns.append(self.pad([heading] + drawn, to_the_right=False))
        return columns

    def pad(self, cells: list[str], to_the_right: bool) -> list[str]:
        """Return cells filled up with blanks to the same width."""
        cells = [self.plain(cell) for cell in cells]
        width = max(map(display_width, cells))
        blanks = [" " * (width - display_width(cell)) for cell in cells]
        if to_the_right:
            return [blank + cell for cell, blank in zip(cells, blanks)]
        return [cell + blank for cell, blank in zip(cells, blanks)]

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared. A failure makes the status 1."""
        if holds:
            self.held += 1
            mark, colour = "ok  ", "32"
        else:
            self.failed += 1
            mark, colour = "FAIL", "1;31"
        if self.colour:
            mark = f"\x1b[{colour}m{mark}\x1b[0m"
        if not self.in_checks:
            self.lines([""])
        first, *others = textwrap.wrap(self.plain(f"{claim} ({evidence})"), WIDTH - 6)
        self.lines([f"{mark}  {first}"] + ["      " + line for line in others])
        self.in_checks = True

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """Check that two matrices have one shape, and differ by less than bound in every place."""
        if [len(row) for row in got] != [len(row) for row in expected]:
            self.check(claim, False, "the shapes differ")
            return
        gaps = [abs(a - b) for rows in zip(got, expected) for a, b in zip(*rows)]
        if all(gap < bound for gap in gaps):
            self.check(claim, True, f"max |Δ| < {bound:.0e}")
        else:
            self.check(claim, False, f"max |Δ| = {max(gaps):.1e}; bound {bound:.0e}")

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
        reply = self.hear("  your answer (Enter: pass) > ")
        verdict = ""
        if reply:
            right = reply.casefold() == shown.casefold() or (
                not isinstance(answer, str) and is_near(reply, answer))
            self.asked += 1
            self.right += right
            verdict = " - yes" if right else " - not quite"
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


def is_near(reply: str, answer: float) -> bool:
    """Return whether reply is a number within a tenth of answer; 33% and 0,33 count as well."""
    scale = 100 if reply.endswith("%") else 1
    for comma in ("", "."):  # of thousands, or the decimal comma
        try:
            number = float(reply.rstrip("%×x ").replace(",", comma)) / scale
        except ValueError:
            continue
        if abs(number - answer) <= abs(answer) / 10:
            return True
    return False


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
    """Return an argparse type: a whole number from low to high."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def section_numbers(count: int) -> Callable[[str], list[int]]:
    """Return an argparse type: section numbers with commas between them."""
    def parse(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")]
        if not all(re.fullmatch("[0-9]{1,4}", part) and 1 <= int(part) <= count for part in parts):
            raise ArgumentTypeError(f"must be numbers from 1 to {count} (--list names them), as in "
                                    f"1,{count}, not {text!r}")
        return [int(part) for part in parts]
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """Return a parser with the options that all five scripts have; a script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    parser.add_argument("--section", metavar="N[,N...]", action="extend",
                        type=section_numbers(n_sections),
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true",
                        help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true",
                        help="be asked for each section's result before it is shown")
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
    try:
        section.show(trace, knobs)
    except NotImplementedError as error:
        trace.unwritten += 1
        trace.say(f"Not written yet: {error}. This section goes on once it is.")
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
    else:
        summary.append("No check was reached.")
    if trace.unwritten:
        summary.append(f"Sections that wait for a function: {trace.unwritten}.")
    if trace.asked:
        summary.append(f"Predictions: {trace.right} of {trace.asked} right.")
    trace.lines([*summary, f"Try next: {next_experiment}"], "1")


def run_sections(sections: Sequence[Section], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections and return the exit status.

    0: every check held. 1: one failed, or a function is not written yet. 130: Ctrl-C. A reader who
    closes the pipe ends the trace quietly.
    """
    try:
        trace = Trace(knobs.ascii, knobs.predict)
        if knobs.list:
            list_sections(trace, sections)
        else:
            for number in sorted(set(knobs.section or range(1, len(sections) + 1))):
                run_section(trace, number, sections[number - 1], knobs)
            print_summary(trace, next_experiment)
        if sys.stdout is not None:
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
    Section("Standard attention and its traffic", show_standard, [Traffic, standard_attention, standard_accesses]),
    Section("Softmax in one pass", show_online, [absorb, online_softmax, safe_softmax]),
    Section("FlashAttention, Algorithm 1", show_flash_v1, [flash_attention_v1, absorb_tile, tile_spans]),
    Section("FlashAttention-2", show_flash_v2, [flash_attention, finish]),
    Section("How much traffic, really", show_traffic, [flash_attention, blocks_that_fit, flash_accesses, fit_powers],
            core=False),
    Section("The backward pass", show_backward, [flash_attention_backward, recompute_weights, standard_attention_backward]),
    Section("Flash-Decoding", show_decode, [flash_decode, merge_partials, splits_that_fill]),
    Section("Grouped queries, windows and pages", show_family, [flash_grouped_query, flash_attention, PagedRows],
            core=False),
    Section("What FlashAttention-3 and -4 changed", show_later_versions,
     [quantize_blocks, hadamard_rotate, absorb, count_rescalings], core=False),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; the exit status."""
    parser = common_parser("microflash", "FlashAttention, tile by tile, its traffic counted.", len(SECTIONS))
    parser.add_argument("--text", default=SENTENCE,
                        help=f"the text whose scores sections 2 and 9 take in (default: {SENTENCE!r})")
    parser.add_argument("--seq-len", metavar="N", type=whole_number(1, 256), default=SEQ_LEN,
                        help=f"queries, and keys (default {SEQ_LEN})")
    parser.add_argument("--head-dim", metavar="N", type=whole_number(1, 128), default=HEAD_DIM,
                        help=f"channels of a head (default {HEAD_DIM})")
    parser.add_argument("--block-q", metavar="N", type=whole_number(1, 10**6), default=BLOCK_Q,
                        help=f"queries in a tile (default {BLOCK_Q})")
    parser.add_argument("--block-k", metavar="N", type=whole_number(1, 10**6), default=BLOCK_K,
                        help=f"keys in a tile (default {BLOCK_K})")
    parser.add_argument("--sram", metavar="N", type=whole_number(1, 10**9),
                        help=f"numbers that SRAM holds (default {SRAM}, or what the tiles need if that is more)")
    parser.add_argument("--n-splits", metavar="N", type=whole_number(1, 1024), default=N_SPLITS,
                        help=f"parts of the cache in section 7 (default {N_SPLITS})")
    parser.add_argument("--causal", action="store_true",
                        help="mask the future in sections 1, 3 and 6 (4 and 8 always do)")
    knobs = parser.parse_args(argv)

    n, d = knobs.seq_len, knobs.head_dim
    if n * n * d > MAX_WORK:
        parser.error(f"argument --seq-len: {n}² × --head-dim {d} is more than this trace computes, {MAX_WORK:,}; "
                     f"--seq-len {math.isqrt(MAX_WORK // d)} would do")
    if (n_tiles := -(-n // knobs.block_q) * -(-n // knobs.block_k)) > MAX_TILES:
        parser.error(f"argument --block-q: with --block-k {knobs.block_k} it makes {n_tiles:,} tiles, more than this "
                     f"trace walks, {MAX_TILES:,}; larger blocks or --seq-len {math.isqrt(MAX_TILES)} would do")
    needed = sram_needed(min(knobs.block_q, n), min(knobs.block_k, n), d, d)
    knobs.sram = knobs.sram or max(SRAM, needed)
    knobs.blocks = dict(block_q=knobs.block_q, block_k=knobs.block_k)
    if knobs.sram < needed:
        parser.error(f"argument --sram: {knobs.sram} numbers do not hold the tiles of --block-q {knobs.block_q} and "
                     f"--block-k {knobs.block_k}; {needed} would")
    if not knobs.text.strip():
        parser.error("argument --text: there must be something in it")
    tokenizer = Tokenizer.train(TEXT + knobs.text, VOCAB_SIZE + len(set(knobs.text) - set(TEXT)))
    knobs.tokens = [tokenizer.vocab[i] for i in tokenizer.encode(knobs.text)]
    knobs.labels = [show_token(token) for token in knobs.tokens]
    if len(knobs.tokens) > MAX_TOKENS:
        parser.error(f"argument --text: {len(knobs.tokens)} tokens are more than this trace shows, {MAX_TOKENS}")
    return run_sections(SECTIONS, knobs, "python microflash.py --section 3,4,6 --causal --block-q 8 --block-k 32")


if __name__ == "__main__":
    sys.exit(main())
