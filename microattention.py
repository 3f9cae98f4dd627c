#!/usr/bin/env python3
"""Who looks at whom, and what it costs to remember.

Attention lets every token look back at the tokens before it. While a model generates, the keys and
values of all those tokens must be kept: the KV cache, the memory that limits how many people one
card can serve. Most of the variants of attention in use today are ways to keep less of it. This script
puts them side by side on one sentence, draws who looks at whom, and counts what each keeps.

Run it (`python microattention.py`), read the trace, then read on from here in order: every section of
the trace is a section of this file. Nothing is trained; the heads are built by hand, to be recognised.

The papers:
  Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762                       sections 1, 2
  Shazeer, Fast Transformer Decoding: One Write-Head is All You Need, 2019,
    arXiv:1911.02150                                                                      section 3
  Ainslie et al., GQA: Training Generalized Multi-Query Transformer Models from
    Multi-Head Checkpoints, 2023, arXiv:2305.13245                                        section 3
  Jiang et al., Mistral 7B, 2023, arXiv:2310.06825                                        section 4
  Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
    arXiv:2309.17453                                                                      section 4
  DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434; DeepSeek-V3, 2024, arXiv:2412.19437   section 5
  Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021,
    arXiv:2104.09864                                                                      section 6
  Press et al., Train Short, Test Long (ALiBi), 2021, arXiv:2108.12409                    section 6
  Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053                                     section 8
"""

from __future__ import annotations

import cmath
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
from dataclasses import dataclass, replace
from statistics import fmean

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]

SENTENCE = "This is the cat that killed the rat that ate the malt"
VOCAB_SIZE = 96    # tokens: the words of SENTENCE are then one token each
DIM = 32           # channels of an embedding
N_HEADS = 4        # query heads
WINDOW = 4         # keys a query sees in section 4, itself included
SINKS = 1          # first tokens that stay visible outside the window
SHARPNESS = 10.0   # score that a head built by hand gives to what it looks for
MAX_TOKENS = 256   # longest text accepted
MAP_TOKENS = 14    # tokens drawn in a map: four maps then fit side by side


# ---------------------------------------------------------------------------------------------------
# 1. Scaled dot-product attention
#
# A query asks, keys answer, values are what is handed over. For query i and the keys j it may see:
#
#     score[i][j]  = q[i]·k[j] / √d              how well key j answers query i
#     weight[i][:] = softmax(score[i][:])        positive, and sums to 1
#     out[i]       = Σ_j weight[i][j] · v[j]     the average of the values, by those weights
#
# A causal model sees no future: query i stops at its own position. With fewer queries than keys (a
# model that generates: one new query, all the old keys) the queries are the last positions, so the
# mask is aligned at the bottom right. What a query may not see is never computed. (On a GPU, whole tiles
# are skipped; inside a tile the scores are computed and set to -inf.)

def visible_keys(i: int, n_q: int, n_k: int, causal: bool, window: int | None, sinks: int) -> list[int]:
    """The keys that query i of n_q sees among n_k, ascending. window and sinks: see section 4."""
    position = n_k - n_q + i
    start = 0 if window is None else max(position + 1 - window, 0)
    end = max(position + 1, 0) if causal else n_k
    return [*range(min(sinks, start, end)), *range(start, end)]


def visible_weights(q: Matrix, k: Matrix, causal: bool, window: int | None, sinks: int, scale: float | None,
                    bias: Matrix | None) -> Iterator[tuple[list[int], Vector]]:
    """For each query: the keys it sees, and its weights on them."""
    check_attention_arguments(q, k, window, sinks, bias)
    scale = 1 / math.sqrt(len(k[0])) if scale is None else scale
    for i, query in enumerate(q):
        seen = visible_keys(i, len(q), len(k), causal, window, sinks)
        scores = [dot(query, k[j]) * scale for j in seen]
        if bias is not None:
            scores = [score + bias[i][j] for score, j in zip(scores, seen)]
        yield seen, softmax(scores)


def attention_weights(q: Matrix, k: Matrix, *, causal: bool = True, window: int | None = None, sinks: int = 0,
                      scale: float | None = None, bias: Matrix | None = None) -> Matrix:
    """Who looks at whom: q [n_q][d], k [n_k][d] -> weights [n_q][n_k], 0 where the mask hides a key.

    The options are those of attention(). Each row sums to 1, or is all 0 if its query sees nothing.
    """
    rows = (dict(zip(seen, weights)) for seen, weights in visible_weights(q, k, causal, window, sinks, scale, bias))
    return [[row.get(j, 0.0) for j in range(len(k))] for row in rows]


def attention(q: Matrix, k: Matrix, v: Matrix, *, causal: bool = True, window: int | None = None, sinks: int = 0,
              scale: float | None = None, bias: Matrix | None = None) -> Matrix:
    """softmax(q kᵀ · scale + bias) v for one head: q [n_q][d], k [n_k][d], v [n_k][d_v] -> [n_q][d_v].

    causal: no key after the query's own position; the queries are the last n_q of the n_k positions.
    window: no key more than window - 1 positions back; sinks: but the first `sinks` keys all the same.
    scale: 1/√d unless given. bias [n_q][n_k] is added to the scaled scores (section 6).
    A query that sees no key gets zeros. ValueError where shapes disagree, window < 1 or sinks < 0.
    Vaswani et al. 2017, equation 1.
    """
    if len(v) != len(k) or any(len(row) != len(v[0]) for row in v):
        raise ValueError(f"v must have a row for each of the {len(k)} keys, all of one length; it has {len(v)} rows")
    out = []
    for seen, weights in visible_weights(q, k, causal, window, sinks, scale, bias):
        channels = zip(*(v[j] for j in seen))
        out.append([dot(weights, channel) for channel in channels] or [0.0] * len(v[0]))
    return out


def show_attention(trace: Trace, knobs: Namespace) -> None:
    """A head that finds its own word, one of its rows worked out, and the spread of q·k as d grows."""
    x, (wq, wk, wv, _) = embed(knobs), build_heads(["same word"], knobs.dim // knobs.n_heads, knobs.dim)
    q, k, v = linear(x, wq), linear(x, wk), linear(x, wv)
    weights, shown = attention_weights(q, k), min(len(x), MAP_TOKENS)
    trace.say("Each row is a token that looks (a query), each column a token it may look at (a key): itself and "
              "those before it. This head is built (section 2 says how) to look for its own word: where a word "
              "comes back, its row lights up at the earlier ones too." + knobs.cut)
    trace.lines(heat_map(weights[:shown], labels=knobs.labels[:shown], cell=2))
    trace.note(SHADES_LEGEND)

    i = max((i for i in range(shown) if knobs.tokens[i] in knobs.tokens[:i]), default=shown - 1)
    trace.say(f"One row worked out: token {i}, {knobs.labels[i]!r}, its query against every key it sees.")
    trace.ask("how large is its largest weight? (They sum to 1.)", max(weights[i]))
    scores = [dot(q[i], key) for key in k[:i + 1]]
    trace.table(["", "key", "q·k", "q·k/√d", "weight", ""],
                [[str(j), knobs.labels[j], f"{score:z.2f}", f"{score / math.sqrt(len(q[i])):z.2f}",
                  f"{weight:.3f}", bar(weight, 1, 24)] for j, (score, weight) in enumerate(zip(scores, weights[i]))],
                left=(1, 5))

    n_keys, n_queries, rng = 32, 16, random.Random(knobs.seed)
    trace.say(f"Why divide by √d? For random q and k, q·k is a sum of d terms, so it spreads like √d; and softmax "
              f"of widely spread scores is nearly one-hot: it ignores all keys but one, and passes no gradient. "
              f"Measured on {n_queries} queries and {n_keys} keys; an even look at all of them has "
              f"log2({n_keys}) = {math.log2(n_keys):.0f} bits of entropy, and a largest weight of {1 / n_keys:.2f}.")
    rows = []
    for d in (4, 16, 64, 256, 1024):
        a, b = random_matrix(rng, n_queries, d), random_matrix(rng, n_keys, d)
        products = [dot(query, key) for query in a for key in b]
        raw, scaled = (attention_weights(a, b, causal=False, scale=scale) for scale in (1.0, None))
        rows.append([str(d), f"{math.sqrt(dot(products, products) / len(products)):.1f}", f"{math.sqrt(d):.1f}",
                     f"{fmean(map(entropy, raw)):.2f}", f"{fmean(map(max, raw)):.2f}",
                     f"{fmean(map(entropy, scaled)):.2f}", f"{fmean(map(max, scaled)):.2f}"])
    trace.table(["d", "spread of q·k", "√d", "entropy", "largest", "entropy, scaled", "largest, scaled"], rows)
    trace.note("spread: root mean square; entropy in bits; largest: the largest weight; scaled: scores divided by √d")

    trace.check_close("attention() = softmax(QKᵀ/√d)V over the dense masked matrix", attention(q, k, v),
                      dense_attention(q, k, v, lambda i, j: j <= i), 1e-12)


# ---------------------------------------------------------------------------------------------------
# 2. Multi-head attention (MHA)
#
# One head makes one kind of look. n_heads look as many ways at once: x is projected to small queries, keys
# and values of head_dim channels each, every head attends alone, and wo mixes what they brought back:
#
#     head_i = attention(x wq_iᵀ, x wk_iᵀ, x wv_iᵀ)          out = concat(head_1, …, head_n) woᵀ
#
# The heads of this script are built, not trained. An embedding is four blocks of channels:
#     word     a random code of ±1 for the token
#     here     its position, told as the hands of clocks tell time: (cos, sin) with periods of 4, 8, 16, … tokens
#     before   the position one earlier, told the same way
#     start    position 0
# A head's q reads one block and its k another; its score is high where the two agree. Trained models have
# heads that do each of these jobs. (With few channels a head reads its block in part only, and errs.)

JOBS = {"same word": ("word", "word"), "one back": ("before", "here"),  # what q reads, what k reads
        "everywhere": (None, "word"), "first token": ("start", "here")}
BLOCKS = ["word", "here", "before", "start"]


def multi_head_attention(x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, **mask) -> Matrix:
    """x [n][dim]; wq, wk, wv [n_heads·head_dim][dim]; wo [dim][n_heads·head_dim] -> [n][dim].

    mask: the options of attention(). ValueError if n_heads does not divide the rows. Vaswani et al. 2017.
    """
    q, k, v = (split_heads(linear(x, w), n_heads) for w in (wq, wk, wv))
    return linear(concat(*(attention(q[h], k[h], v[h], **mask) for h in range(n_heads))), wo)


def split_heads(m: Matrix, n_heads: int) -> list[Matrix]:
    """[n][n_heads·head_dim] -> n_heads matrices [n][head_dim]."""
    width = len(m[0]) if m else 0
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"n_heads must divide the {width} channels, and {n_heads} does not")
    head_dim = width // n_heads
    return [[row[h * head_dim:(h + 1) * head_dim] for row in m] for h in range(n_heads)]


def show_multi_head(trace: Trace, knobs: Namespace) -> None:
    """Four jobs on one sentence, and where the last token looks."""
    n_heads, head_dim, x = knobs.n_heads, knobs.dim // knobs.n_heads, embed(knobs)
    jobs = [job_of(h) for h in range(n_heads)]
    wq, wk, wv, wo = build_heads(jobs, head_dim, knobs.dim)
    q, k, v = (split_heads(linear(x, w), n_heads) for w in (wq, wk, wv))
    weights = [attention_weights(q[h], k[h]) for h in range(n_heads)]
    trace.say("The same tokens, several looks at once. A head that looks one back draws a line below the diagonal; "
              "one that looks everywhere fades downwards, as each row is shared among more keys." + knobs.cut
              + f" (The first 4 of {n_heads} heads.)" * (n_heads > 4))
    h, last = min(1, n_heads - 1), min(len(x), MAP_TOKENS) - 1
    trace.ask(f"head {h} looks for {jobs[h]!r}. Which token does token {last}, {knobs.labels[last]!r}, look at most?",
              knobs.labels[weights[h][last].index(max(weights[h][last]))])
    labels = {0: knobs.labels[:MAP_TOKENS]}  # beside the first map only
    trace.lines(side_by_side([heat_map(weights[h][:MAP_TOKENS], labels.get(h, ()), jobs[h])
                              for h in range(min(n_heads, 4))]))
    trace.note(SHADES_LEGEND)
    one_by_one = [linear(attention(q[h], k[h], v[h]), [row[h * head_dim:(h + 1) * head_dim] for row in wo])
                   for h in range(n_heads)]
    trace.check_close("concat, then wo = Σ of the heads, each through its columns of wo",
                      multi_head_attention(x, wq, wk, wv, wo, n_heads), add_matrices(one_by_one), 1e-12)


# ---------------------------------------------------------------------------------------------------
# 3. Multi-query and grouped-query attention (MQA, GQA)
#
# To generate one token, every head must read the keys and values of all tokens so far, and those are
# what the cache holds. The queries are used once and thrown away. So share the keys and values: all
# query heads read one KV head (MQA), or each group of n_heads / n_kv_heads of them reads one (GQA):
#
#     head_h = attention(q_h, k_g, v_g)     with g = h // (n_heads / n_kv_heads)
#
# A trained MHA checkpoint is converted by averaging the wk, and the wv, of the heads in each group
# (Ainslie et al.), then trained on for a little (5% of the original compute, in the paper) to recover.
# How much there is to recover depends on how alike the heads of a group were.

def multi_query_attention(x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, **mask) -> Matrix:
    """All query heads share one KV head: wq [n_heads·head_dim][dim], wk and wv [head_dim][dim] -> [n][dim].

    mask: the options of attention(). Shazeer 2019.
    """
    k, v = linear(x, wk), linear(x, wv)
    return linear(concat(*(attention(q, k, v, **mask) for q in split_heads(linear(x, wq), n_heads))), wo)


def grouped_query_attention(x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, n_kv_heads: int,
                            **mask) -> Matrix:
    """Query heads in n_kv_heads groups, one KV head a group: wk and wv [n_kv_heads·head_dim][dim] -> [n][dim].

    mask: the options of attention(). ValueError if n_kv_heads does not divide n_heads. Ainslie et al. 2023.
    """
    group = group_size(n_heads, n_kv_heads)
    q = split_heads(linear(x, wq), n_heads)
    k, v = (split_heads(linear(x, w), n_kv_heads) for w in (wk, wv))
    return linear(concat(*(attention(q[h], k[h // group], v[h // group], **mask) for h in range(n_heads))), wo)


def mean_pool_kv_heads(w: Matrix, n_heads: int, n_kv_heads: int) -> Matrix:
    """An MHA checkpoint's wk or wv [n_heads·head_dim][dim] -> GQA's [n_kv_heads·head_dim][dim]: group means.

    ValueError if n_heads does not divide the rows, or n_kv_heads n_heads.
    """
    group = group_size(n_heads, n_kv_heads)
    if len(w) % n_heads:
        raise ValueError(f"n_heads must divide the {len(w)} rows of w, and {n_heads} does not")
    head_dim = len(w) // n_heads
    heads = [w[h * head_dim:(h + 1) * head_dim] for h in range(n_heads)]
    return [[fmean(channel) for channel in zip(*rows)]
            for g in range(n_kv_heads) for rows in zip(*heads[g * group:(g + 1) * group])]


def group_size(n_heads: int, n_kv_heads: int) -> int:
    """How many query heads share a KV head."""
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads must divide n_heads = {n_heads}, and {n_kv_heads} does not")
    return n_heads // n_kv_heads


def show_grouped(trace: Trace, knobs: Namespace) -> None:
    """What each variant keeps per token, and what averaging KV heads does to the output."""
    n_heads, n_kv_heads, dim, x = knobs.n_heads, knobs.n_kv_heads, knobs.dim, embed(knobs)
    head_dim, group, rng = dim // n_heads, group_size(n_heads, n_kv_heads), random.Random(knobs.seed)
    wq, wk, wv, wo = (random_matrix(rng, dim, dim, 1 / math.sqrt(dim)) for _ in range(4))
    trace.say("Fewer KV heads, a smaller cache, as many queries. Counted: the numbers in the k and v that one token "
              "leaves behind for those after it.")
    rows = []
    for name, n_kv in (("MHA", n_heads), ("GQA", n_kv_heads), ("MQA", 1)):
        kept = len(linear(x, wk[:n_kv * head_dim])[-1]) + len(linear(x, wv[:n_kv * head_dim])[-1])
        sharing = "  ".join(["q" * (n_heads // n_kv) + "→kv"] * n_kv)
        rows.append([name, str(n_kv), str(kept), bar(kept, 2 * dim, 16), sharing if len(sharing) <= 31 else "…"])
    trace.ask(f"MHA, with {n_heads} KV heads of {head_dim} channels, keeps {rows[0][2]}. How many does GQA keep, with "
              f"{n_kv_heads}?", int(rows[1][2]))
    trace.table(["", "KV heads", "kept per token", "", "queries → KV head"], rows, left=(0, 3, 4))

    trace.say(f"An MHA checkpoint turned into GQA by averaging the KV heads of each group of {group}: how far the "
              f"output moves, |GQA - MHA| / |MHA|, when the heads of a group had the same job and when not.")
    alike = [job_of(g) for g in range(n_kv_heads) for _ in range(group)]
    kinds = {"identical": (alike, 0.0), "same job, 10% noise": (alike, 0.1),
             "different jobs": ([job_of(h) for h in range(n_heads)], 0.0)}
    moved = {}
    for kind, (jobs, noise) in kinds.items():
        mha = build_heads(jobs, head_dim, dim, noise, rng)
        pooled = [mean_pool_kv_heads(w, n_heads, n_kv_heads) for w in mha[1:3]]
        moved[kind] = relative_error(grouped_query_attention(x, mha[0], *pooled, mha[3], n_heads, n_kv_heads),
                                     multi_head_attention(x, *mha, n_heads))
    trace.table(["heads of a group", "output moves by", ""],
                [[kind, f"{error:.1%}", bar(error, 1, 24)] for kind, error in moved.items()], left=(0, 2))

    few = [w[:n_kv_heads * head_dim] for w in (wk, wv)]
    one = [w[:head_dim] for w in (wk, wv)]

    def repeat_heads(w: Matrix) -> Matrix:
        heads = [w[g * head_dim:(g + 1) * head_dim] for g in range(n_kv_heads)]
        return [row for head in heads for row in head * group]

    trace.check_close("GQA with n_kv_heads = n_heads is MHA",
                      grouped_query_attention(x, wq, wk, wv, wo, n_heads, n_heads),
                      multi_head_attention(x, wq, wk, wv, wo, n_heads), 1e-12)
    trace.check_close("GQA with n_kv_heads = 1 is MQA", grouped_query_attention(x, wq, *one, wo, n_heads, 1),
                      multi_query_attention(x, wq, *one, wo, n_heads), 1e-12)
    trace.check_close("GQA = MHA with each KV head repeated for its group",
                      grouped_query_attention(x, wq, *few, wo, n_heads, n_kv_heads),
                      multi_head_attention(x, wq, *map(repeat_heads, few), wo, n_heads), 1e-12)
    trace.check("averaging identical heads loses nothing", moved["identical"] < 1e-12, "relative error < 1e-12")


# ---------------------------------------------------------------------------------------------------
# 4. Sliding window and attention sinks
#
# With a window, a query sees the latest w keys only. Work grows as n·w instead of n²/2, and the cache
# stops growing at w entries: position p goes to slot p mod w and overwrites p - w, which nobody can see
# any more. Attention does not mind that the slots are out of order: a weighted average has no order.
#
# What is lost? A layer reaches w - 1 tokens back, but what it read there had itself looked w - 1 further
# back one layer down: L layers reach L·(w - 1). (Mistral 7B: w = 4096, 32 layers; its paper says W·k, not
# counting the token itself.)
#
# Heads that have nothing to say rest on the first token (see "first token" in section 2). Let it slide out
# of the window, and their weights must go somewhere else: the output breaks. StreamingLLM keeps the first
# few tokens (4, in the paper) visible for ever, as sinks, in s slots before the w rolling ones. It also counts
# positions within the cache instead of in the text, so that no distance exceeds what training has seen.

class RollingKVCache:
    """The keys and values of the latest `window` positions and of the first `sinks`: never more than their sum."""

    def __init__(self, window: int, sinks: int = 0):
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be at least 1 and sinks at least 0, not {window} and {sinks}")
        self.window, self.sinks, self.length = window, sinks, 0
        self.slots: dict[int, tuple[int, Vector, Vector]] = {}  # slot -> (position, key, value)

    def append(self, key: Vector, value: Vector) -> int:
        """Keep the next position's key and value; the slot they went to: p for a sink, else sinks + p mod window."""
        position = self.length
        slot = position if position < self.sinks else self.sinks + position % self.window
        self.slots[slot] = (position, key, value)
        self.length += 1
        return slot

    def attend(self, query: Vector, scale: float | None = None) -> Vector:
        """The newest position's query against everything kept -> [d_v]. The slots' order does not matter."""
        _, keys, values = zip(*self.slots.values())
        return attention([query], list(keys), list(values), causal=False, scale=scale)[0]


def show_window(trace: Trace, knobs: Namespace) -> None:
    """The masks, the work, the weight lost, the reach of a stack of layers, and the rolling cache."""
    x, n, window, sinks, rng = embed(knobs), len(knobs.tokens), knobs.window, knobs.sinks, random.Random(knobs.seed)
    masks = {"causal": {}, f"window {window}": {"window": window},
             f"with {sinks} sink" + "s" * (sinks != 1): {"window": window, "sinks": sinks}}
    trace.say("Who (row) may look at whom (column): nobody ahead, nobody further back than the window; the sinks "
              "stay visible to all." + knobs.cut)
    blank = [[0.0]] * n  # zeros as q and k: every visible key gets an equal share
    open_to = {name: attention_weights(blank, blank, **mask) for name, mask in masks.items()}
    trace.lines(side_by_side([[name.ljust(MAP_TOKENS)] + ["".join("█" if w else "·" for w in row[:MAP_TOKENS])
                                                          for row in rows[:MAP_TOKENS]]
                              for name, rows in open_to.items()], gap=6))

    d, counts_agree, rows = 4, True, []
    trace.say(f"The work, in multiplications counted while attention runs: {d + d + 1} for each pair of a query and a "
              f"key it sees, d for q·k, d_v for weight·v and 1 for the scale.")
    for length in (32, 64, 128):
        q, k, v = (random_matrix(rng, length, d) for _ in range(3))
        counted = [count_multiplications(lambda q, k, v: attention(q, k, v, **mask), q, k, v)
                   for mask in masks.values()]
        pairs = [sum(min(i + 1, most) for i in range(length)) for most in (length, window, window + sinks)]
        counts_agree &= counted == [p * (d + d + 1) for p in pairs]
        rows.append([length, *counted])
    trace.ask(f"twice the text is four times the work without a window. How many times is it with one of {window} "
              f"keys, from {rows[1][0]} tokens to {rows[2][0]}?", rows[2][2] / rows[1][2])
    trace.table(["tokens", *masks], [[f"{count:,}" for count in row] for row in rows])

    trace.say("What is lost: the share of a head's weight, averaged over the tokens, that falls on keys which the "
              "window hides; and what is still hidden with the sinks.")
    rows = []
    for job in JOBS:
        wq, wk, _, _ = build_heads([job], knobs.dim // knobs.n_heads, knobs.dim)
        full, cells = attention_weights(linear(x, wq), linear(x, wk)), [job]
        for seen in list(open_to.values())[1:]:
            hidden = fmean(sum(w for w, visible in zip(*pair) if not visible) for pair in zip(full, seen))
            cells += [f"{hidden:.0%}", bar(hidden, 1, 8)]
        rows.append(cells)
    trace.table(["head that looks for", "hidden by window", "", "still, with sinks", ""], rows, left=(0, 2, 4))

    layers, width = 4, 64
    trace.say(f"How layers see further: a marker on token 0 of {width}, handed on by {layers} layers of window "
              f"{window}. A token is marked if it sees a marked one in the layer below.")
    marker, zeros, reach, lines = [[1.0]] + [[0.0]] * (width - 1), [[0.0]] * width, [], []  # zeros as q and k, as above
    for layer in range(1, layers + 1):
        marker = attention(zeros, zeros, marker, window=window)
        reach.append(max(i for i, (mark,) in enumerate(marker) if mark > 0))
        lines.append(f"layer {layer}  " + "".join("█" if mark > 0 else "·" for (mark,) in marker))
    trace.ask(f"how far does it get: which is the last token marked in layer {layers}?", reach[-1])
    trace.lines(lines)

    q, k, v = random_matrix(rng, n, d), random_matrix(rng, n, d), random_matrix(rng, n, d)
    cache, rolled, pictures = RollingKVCache(window, sinks), [], []
    for i in range(n):
        slot = cache.append(k[i], v[i])
        rolled.append(cache.attend(q[i]))
        kept = "│".join(f"{position:>3}" + " *"[s == slot] for s, (position, _, _) in sorted(cache.slots.items()))
        pictures.append(f"token {i:>3} → slot {slot:>3}  │{kept}│"[:WIDTH - 1])
    trace.say("The rolling cache that a window allows: the position kept in each slot (the sinks' first), the newest "
              "with a star.")
    trace.lines(pictures[-5:])

    trace.check_close("attention() with window and sinks = the dense masked matrix",
                      attention(q, k, v, window=window, sinks=sinks),
                      dense_attention(q, k, v, lambda i, j: j <= i and (j > i - window or j < sinks)), 1e-12)
    trace.check("multiplications counted = visible pairs × (d + d_v + 1)", counts_agree, "equal")
    trace.check("L layers carry the marker L·(w - 1) tokens, or to the end",
                reach == [min(layer * (window - 1), width - 1) for layer in range(1, layers + 1)], str(reach)[1:-1])
    trace.check_close("rolling cache = attention() with window and sinks", rolled,
                      attention(q, k, v, window=window, sinks=sinks), 1e-12)


# ---------------------------------------------------------------------------------------------------
# 5. Multi-head latent attention (MLA, DeepSeek-V2)
#
# Instead of sharing heads, compress: from each token keep one small latent c, out of which every head's
# own keys and values are made again. With DeepSeek-V2's names (section 2.1 of its paper):
#
#     c      = x W_DKVᵀ             the latent, d_c numbers: this is cached
#     k_rope = RoPE(x W_KRᵀ)        one key for positions, shared by all heads, d_R numbers: cached
#     k_h    = [c W_UK_hᵀ ; k_rope]          q_h = [x W_Q_hᵀ ; RoPE(x W_QR_hᵀ)]          v_h = c W_UV_hᵀ
#
# That is the plain form: decompress, then attend. But two matrices can change sides:
#
#     q·(W_UK c) = (W_UKᵀ q)·c               move W_UK over to the query, once a step
#     Σ_j w_j (W_UV c_j) = W_UV (Σ_j w_j c_j)      apply W_UV to the average, not to every token
#
# This absorbed form attends to the latents themselves and never decompresses the cache. It *is* multi-query
# attention, with the key [c ; k_rope] and the value c. (RoPE could not be absorbed: its rotation, which differs
# for every token, would stand between q and W_UK. Hence the separate, "decoupled" k_rope.)
# DeepSeek also compresses the queries, which saves training memory and no cache, and normalises c before it is
# cached, which changes nothing here; both are left out.

@dataclass(frozen=True)
class MLAWeights:
    """One matrix per head where it says heads; every one W[out][in]."""
    w_down: Matrix          # W_DKV   [d_c][dim]
    wk_rope: Matrix         # W_KR    [d_R][dim]
    wq: list[Matrix]        # W_Q     heads of [head_dim][dim]
    wq_rope: list[Matrix]   # W_QR    heads of [d_R][dim]
    wk_up: list[Matrix]     # W_UK    heads of [head_dim][d_c]
    wv_up: list[Matrix]     # W_UV    heads of [v_dim][d_c]
    wo: Matrix              # W_O     [dim][n_heads·v_dim]


def mla_compress(x: Matrix, w: MLAWeights, start: int = 0) -> tuple[Matrix, Matrix]:
    """What is cached of x [n][dim], whose first row is at position `start`: (c [n][d_c], k_rope [n][d_R])."""
    return linear(x, w.w_down), rope(linear(x, w.wk_rope), range(start, start + len(x)))


def mla_attention(x: Matrix, c: Matrix, k_rope: Matrix, w: MLAWeights) -> Matrix:
    """Plain MLA: x [n_q][dim], the last tokens, attend to the cache of all n tokens -> [n_q][dim]."""
    positions, heads = range(len(c) - len(x), len(c)), []
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        q = concat(linear(x, wq), rope(linear(x, wq_rope), positions))
        k = concat(linear(c, wk_up), k_rope)                            # decompress every token's key …
        heads.append(attention(q, k, linear(c, wv_up)))                 # … and value
    return linear(concat(*heads), w.wo)


def mla_attention_absorbed(x: Matrix, c: Matrix, k_rope: Matrix, w: MLAWeights) -> Matrix:
    """The same numbers as mla_attention, attending in the latent: nothing of the cache is decompressed."""
    positions, heads = range(len(c) - len(x), len(c)), []
    scale = 1 / math.sqrt(len(w.wq[0]) + len(w.wq_rope[0]))             # of head_dim + d_R, as in the plain form
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        q = concat(linear(linear(x, wq), list(zip(*wk_up))), rope(linear(x, wq_rope), positions))
        latent = attention(q, concat(c, k_rope), c, scale=scale)        # [n_q][d_c]
        heads.append(linear(latent, wv_up))
    return linear(concat(*heads), w.wo)


def random_mla_weights(rng: random.Random, dim: int, n_heads: int, head_dim: int, v_dim: int, d_c: int,
                       d_rope: int) -> MLAWeights:
    """Random weights of these sizes; d_rope must be even."""
    def weight(rows: int, columns: int) -> Matrix:
        return random_matrix(rng, rows, columns, 1 / math.sqrt(columns))

    def heads(rows: int, columns: int) -> list[Matrix]:
        return [weight(rows, columns) for _ in range(n_heads)]

    return MLAWeights(weight(d_c, dim), weight(d_rope, dim), heads(head_dim, dim), heads(d_rope, dim),
                      heads(head_dim, d_c), heads(v_dim, d_c), weight(dim, n_heads * v_dim))


def show_mla(trace: Trace, knobs: Namespace) -> None:
    """What is cached, and the work of a decoding step in both forms."""
    n_heads, head_dim, dim, x = knobs.n_heads, knobs.dim // knobs.n_heads, knobs.dim, embed(knobs)[:32]
    d_c, d_rope = 4 * head_dim, 2 * -(-head_dim // 4)  # DeepSeek-V2's proportions, d_rope rounded up to even
    w = random_mla_weights(random.Random(knobs.seed), dim, n_heads, head_dim, head_dim, d_c, d_rope)
    c, k_rope = mla_compress(x, w)
    deepseek = REAL_MODELS[-1]
    trace.say(f"A latent of {d_c} numbers, 4 · head_dim as in DeepSeek-V2, and one rotated key of {d_rope} stand for "
              f"the keys and values of every head. What one token leaves in the cache, by the arrays' lengths:")
    per_head = [len(linear(c[-1:], k_up)[0]) + len(linear(c[-1:], v_up)[0]) for k_up, v_up in zip(w.wk_up, w.wv_up)]
    kept = {f"MHA, {n_heads} KV heads": sum(per_head),
            f"GQA, {knobs.n_kv_heads} KV heads": sum(per_head[:knobs.n_kv_heads]),
            "MQA, 1 KV head": per_head[0], "MLA": len(c[-1]) + len(k_rope[-1])}
    trace.ask(f"a KV head leaves {per_head[0]} numbers. How many KV heads' worth does MLA leave?",
              kept["MLA"] / per_head[0])
    trace.table(["", "numbers", ""], [[name, str(size), bar(size, 2 * dim, 40)] for name, size in kept.items()],
                left=(0, 2))
    heads_worth = 2 * deepseek.n_heads * deepseek.head_dim / (deepseek.d_c + deepseek.d_rope)
    trace.say(f"That is {kept['MLA'] / per_head[0]:.2f} KV heads' worth, however many heads there are: little is saved "
              f"with a few heads, {heads_worth:.0f} times with the {deepseek.n_heads} heads of {deepseek.name}.")
    trace.say("One decoding step, a new token against the cache: multiplications counted in the plain form, which "
              "makes the keys and values of every cached token again, and in the absorbed form.")
    rows, rng = [], random.Random(knobs.seed)
    for n in (8, 16, 32):
        cache = random_matrix(rng, n, d_c), random_matrix(rng, n, d_rope)
        plain, absorbed = (count_multiplications(lambda x, c, k: form(x, c, k, w), x[-1:], *cache)
                           for form in (mla_attention, mla_attention_absorbed))
        rows.append([str(n), f"{plain:,}", f"{absorbed:,}", f"{plain / absorbed:.1f}×"])
    trace.table(["cached tokens", "plain", "absorbed", "ratio"], rows)
    whole = mla_attention(x, c, k_rope, w)
    trace.check_close("absorbed = plain, all tokens at once",
                      mla_attention_absorbed(x, c, k_rope, w), whole, 1e-12)
    steps = [mla_attention_absorbed(x[i:i + 1], c[:i + 1], k_rope[:i + 1], w)[0] for i in range(len(x))]
    trace.check_close("absorbed, token by token from the cache = plain, all at once", steps, whole, 1e-12)


# ---------------------------------------------------------------------------------------------------
# 6. Positions: RoPE and ALiBi
#
# Attention itself is blind to order. RoPE turns each adjacent pair of channels of q and k, read as one
# complex number, by an angle proportional to the position p (RoFormer; Meta's Llama):
#
#     (x[2m], x[2m+1])  ->  (x[2m] + i·x[2m+1]) · exp(i·p·θ_m)       with i = √-1, θ_m = base^(-2m/d)
#
# In q·k, the turn of the query and the turn of the key meet as exp(i·(p_q - p_k)·θ): the score depends on the
# distance alone. The key's own turn depends on its own position alone. So a key is rotated once and cached that
# way: later tokens change nothing about it. (StreamingLLM renumbers positions, so it must cache keys unrotated.
# Checkpoints in Hugging Face's layout pair channel i with i + d/2 instead: the same rotation, the channels permuted.)
#
# ALiBi leaves q and k alone and lowers each score by slope × distance, with a slope of its own for each head:
# steep slopes look near, gentle ones far. As softmax ignores what is added to a whole row, slope × the key's
# position does as well as -slope × the distance. Like RoPE it has no parameters.

def rope(x: Matrix, positions: Sequence[int], base: float = 10000.0) -> Matrix:
    """Rotate row r of x [n][d] to positions[r] -> [n][d]. ValueError if d is odd or the lengths differ."""
    d = len(x[0]) if x else 0
    if d % 2 or len(positions) != len(x):
        raise ValueError(f"x must have an even number of channels and one position a row, not {d} channels, "
                         f"{len(x)} rows and {len(positions)} positions")
    thetas = [base ** (-2 * m / d) for m in range(d // 2)]
    out = []
    for row, p in zip(x, positions):
        turned = [complex(a, b) * cmath.rect(1.0, p * theta) for a, b, theta in zip(row[::2], row[1::2], thetas)]
        out.append([part for z in turned for part in (z.real, z.imag)])
    return out


def alibi_slopes(n_heads: int) -> Vector:
    """One slope a head: 2^(-8/n), 2^(-16/n), … for n a power of two; other n as in the authors' code.

    Those take the slopes of the power of two below n, then every other slope of the power of two above.
    ValueError if n_heads < 1.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, not {n_heads}")
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes + [2 ** (-4 * (h + 1) / power) for h in range(0, 2 * (n_heads - power), 2)]


def alibi_bias(n_q: int, n_k: int, slope: float) -> Matrix:
    """What ALiBi adds to the scores: -slope × distance, [n_q][n_k]; the queries are the last n_q positions.

    The distance is query's position - key's, so below 0 for keys to come, which a causal mask hides.
    """
    return [[-slope * (n_k - n_q + i - j) for j in range(n_k)] for i in range(n_q)]


def show_positions(trace: Trace, knobs: Namespace) -> None:
    """Scores under a shift, and ALiBi's penalties."""
    d, rng = 16, random.Random(knobs.seed)
    q, k = random_matrix(rng, 1, d), random_matrix(rng, 1, d)

    def score(query_at: int, key_at: int) -> float:
        return dot(rope(q, [query_at])[0], rope(k, [key_at])[0])

    places, distances = (0, 7, 100, 5000), (0, 1, 2, 8, 32)
    scores = [[score(place + distance, place) for distance in distances] for place in places]
    trace.say(f"RoPE. One q and one k (random, d = {d}), rotated to different places. Read down a column: their "
              f"score depends on how far apart they are and on nothing else.")
    trace.ask(f"a query 8 tokens after a key at 0 scores {scores[0][3]:.4f}. What does it score 8 tokens after the "
              f"same key at {places[-1]}?", scores[-1][3])
    trace.table(["key at", *(f"{distance} apart" for distance in distances)],
                [[str(place)] + [f"{s:z.4f}" for s in row] for place, row in zip(places, scores)])

    n, slopes = 10, alibi_slopes(knobs.n_heads)
    shown = sorted({h * (knobs.n_heads - 1) // 3 for h in range(4)})
    trace.say(f"ALiBi. All content scores equal, so that the penalty alone is left: heads "
              f"{', '.join(map(str, shown))} of {knobs.n_heads}, each with its own slope, from short-sighted to "
              f"far-sighted.")
    blank = [[0.0]] * n
    maps = {h: attention_weights(blank, blank, bias=alibi_bias(n, n, slopes[h])) for h in shown}
    trace.lines(side_by_side([heat_map(maps[h], title=f"slope {slopes[h]:.4f}") for h in shown], gap=4))
    trace.note(SHADES_LEGEND)

    trace.check_close("RoPE: scores stay when both positions are shifted",
                      scores[1:], scores[:1] * (len(places) - 1), 1e-9)
    keys, cache = random_matrix(rng, 64, 16), []
    for position, key in enumerate(keys):
        cache += rope([key], [position])  # rotated when its token came, never touched again
    trace.check("RoPE: keys rotated one by one as they come = all at the end", cache == rope(keys, range(64)),
                "to the bit")
    farthest = shown[-1]
    trace.check_close("ALiBi: bias by the key's position alone gives the same weights", maps[farthest],
                      attention_weights(blank, blank, bias=[[slopes[farthest] * j for j in range(n)]] * n), 1e-12)


# ---------------------------------------------------------------------------------------------------
# 7. The bill
#
# What a token leaves in the cache: a key and a value (2) for every KV head and layer,
#
#     2 · n_layers · n_kv_heads · head_dim · bytes per value            MLA: n_layers · (d_c + d_R) · bytes
#
# The formula that is often quoted, 2 · layers · hidden · tokens · bytes, takes a key and a value to be as wide as
# the hidden state, and every token to be kept. It was right for MHA and has been wrong since. The
# configurations below are the published ones, all at 16 bits.

@dataclass(frozen=True)
class RealModel:
    """A published configuration; n_kv_heads counts for the cache, n_heads for the work."""
    name: str
    kind: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context: int                 # tokens it was trained for
    source: str
    window: int | None = None    # tokens
    d_c: int = 0                 # MLA's latent
    d_rope: int = 0              # MLA's rotated key


REAL_MODELS = [
    RealModel("GPT-3 175B", "MHA", 96, 12288, 96, 96, 128, 2048,
              "Brown et al. 2020, arXiv:2005.14165, table 2.1 (counted as if all its layers were dense)"),
    RealModel("Llama 2 7B", "MHA", 32, 4096, 32, 32, 128, 4096, "Touvron et al. 2023, arXiv:2307.09288; config.json"),
    RealModel("Falcon 7B", "MQA", 32, 4544, 71, 1, 64, 2048, "Almazrouei et al. 2023, arXiv:2311.16867; config.json"),
    RealModel("Mistral 7B", "GQA + window", 32, 4096, 32, 8, 128, 8192,
              "Jiang et al. 2023, arXiv:2310.06825, table 1", window=4096),
    RealModel("Llama 3.1 8B", "GQA", 32, 4096, 32, 8, 128, 131072, "Llama team 2024, arXiv:2407.21783, table 3"),
    RealModel("Llama 3.1 70B", "GQA", 80, 8192, 64, 8, 128, 131072, "Llama team 2024, arXiv:2407.21783, table 3"),
    RealModel("DeepSeek-V3", "MLA", 61, 7168, 128, 128, 128, 131072,
              "DeepSeek-AI 2024, arXiv:2412.19437, sections 4.2 and 4.3", d_c=512, d_rope=64),
]
PUBLISHED_DEEPSEEK_V3_BYTES = 70_272  # per token; Zhao et al., Insights into DeepSeek-V3, 2025, 2505.09343, table 1


def kv_bytes_per_token(n_layers: int, n_kv_heads: int, head_dim: int, bytes_per_value: float = 2) -> float:
    """Bytes that one token adds to the KV cache of MHA, GQA or MQA: a key and a value per layer and KV head."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


def cache_bytes(model: RealModel, n_tokens: int, bytes_per_value: float = 2) -> float:
    """Bytes of one request's cache after n_tokens: what a window has dropped is not counted."""
    if model.d_c:
        return n_tokens * model.n_layers * (model.d_c + model.d_rope) * bytes_per_value
    kept = n_tokens if model.window is None else min(n_tokens, model.window)
    return kept * kv_bytes_per_token(model.n_layers, model.n_kv_heads, model.head_dim, bytes_per_value)


def decode_multiplications(model: RealModel, n_tokens: int) -> int:
    """Multiplications in QKᵀ and weights·V for one new token among n_tokens; FLOPs are twice that.

    What a window hides is not computed; MLA in its absorbed form. The projections, whose cost does not grow with
    n_tokens, are not in it.
    """
    seen = n_tokens if model.window is None else min(n_tokens, model.window)
    per_pair = 2 * model.head_dim if not model.d_c else (model.d_c + model.d_rope) + model.d_c
    return model.n_layers * model.n_heads * seen * per_pair


def show_bill(trace: Trace, knobs: Namespace) -> None:
    """The table of real models: cache, popular formula, work."""
    lengths = {"4K": 4096, "32K": 32768, "128K": 131072}
    trace.say("The KV cache of one request in GiB, at 16 bits a value, from the published configurations. In "
              "parentheses: longer than the model was made for.")
    rows = []
    for model in REAL_MODELS:
        sizes = [("{:.2f} " if n <= model.context else "({:.2f})").format(cache_bytes(model, n) / 2**30)
                 for n in lengths.values()]
        rows.append([model.name, model.kind, f"{cache_bytes(model, 1) / 1024:,.1f} KiB", *sizes])
    trace.table(["model", "attention", "one token", *(f"{name} tokens" for name in lengths)], rows, left=(0, 1))

    trace.say("One token's bytes, drawn; how far off the popular formula is, 2 · layers · hidden · tokens · bytes; and "
              "the work in QKᵀ and weights·V for one new token after 32K (2 FLOPs a multiplication, MLA absorbed), "
              "also for each byte of cache read: sharing KV heads saves bytes, not work.")
    rows, most, n, too_much = [], max(cache_bytes(model, 1) for model in REAL_MODELS), lengths["32K"], {}
    for model in REAL_MODELS:
        true, flops = cache_bytes(model, n), 2 * decode_multiplications(model, n)
        too_much[model.name] = 2 * model.n_layers * model.hidden * n * 2 / true
        rows.append([model.name, bar(cache_bytes(model, 1), most, 20), f"{too_much[model.name]:.1f}×",
                     f"{flops / 1e9:,.1f} GFLOP", f"{flops / true:.0f}"])
    trace.ask("Llama 3.1 8B has 32 query heads and 8 KV heads. How many times too much does the popular formula say?",
              too_much["Llama 3.1 8B"])
    trace.table(["model", "bytes of a token", "popular / true", "work", "FLOPs a byte"], rows, left=(0, 1))

    n, head_dim, rng = 8, knobs.dim // knobs.n_heads, random.Random(knobs.seed)
    tiny = RealModel("tiny", "GQA", 1, knobs.dim, knobs.n_heads, knobs.n_kv_heads, head_dim, n, "this script's knobs")
    x, wk = random_matrix(rng, n, knobs.dim), random_matrix(rng, knobs.n_kv_heads * head_dim, knobs.dim)
    k, v = linear(x, wk), linear(x, wk)
    stored = 2 * sum(map(len, k + v))  # 2 bytes a number
    trace.check(f"kv_bytes_per_token() × {n} = bytes of a real cache of {n} tokens", stored == cache_bytes(tiny, n),
                f"{stored:,}")
    one_head = count_multiplications(attention, random_matrix(rng, 1, head_dim), *(split_heads(m, tiny.n_kv_heads)[0]
                                                                                  for m in (k, v))) - n  # the scale's
    trace.check("decode_multiplications() = those counted in attention(), × heads",
                one_head * tiny.n_heads == decode_multiplications(tiny, n), f"{one_head * tiny.n_heads:,}")
    trace.check("DeepSeek-V3's bytes a token = Zhao et al. 2025, table 1",
                cache_bytes(REAL_MODELS[-1], 1) == PUBLISHED_DEEPSEEK_V3_BYTES,
                f"{PUBLISHED_DEEPSEEK_V3_BYTES:,}")


# ---------------------------------------------------------------------------------------------------
# 8. Tensor parallelism
#
# Heads never talk to each other before wo, so they can live on different cards (Megatron-LM).
# Each rank holds the rows of wq, wk and wv that make its heads, and the columns of wo that read them. (Megatron
# writes y = xA, so there it is A's columns, then rows.) Each rank's output is a partial sum of the whole
# output; one all-reduce adds them up and leaves the total on every rank.
#
# With more ranks than KV heads, several ranks need the same one: it is kept on each of them, and from there
# on the cache per rank no longer shrinks. That is the price of few KV heads.

def tensor_parallel_attention(x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int,
                              n_kv_heads: int, n_ranks: int, **mask) -> list[Matrix]:
    """Each rank's partial output [n][dim]; their sum is grouped_query_attention(…). mask: as in attention()."""
    heads = heads_of_ranks(n_heads, n_kv_heads, n_ranks)
    shards = shard_weights(wq, wk, wv, wo, n_heads, n_kv_heads, n_ranks)
    return [grouped_query_attention(x, *shard, len(queries), len(kv), **mask)
            for (queries, kv), shard in zip(heads, shards)]


def shard_weights(wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, n_kv_heads: int,
                  n_ranks: int) -> list[tuple[Matrix, Matrix, Matrix, Matrix]]:
    """Each rank's own (wq, wk, wv, wo): the rows that make its heads, and the columns of wo that read them."""
    head_dim, shards = len(wq) // n_heads, []
    for heads in heads_of_ranks(n_heads, n_kv_heads, n_ranks):
        q, kv = (slice(run[0] * head_dim, (run[-1] + 1) * head_dim) for run in heads)
        shards.append((wq[q], wk[kv], wv[kv], [row[q] for row in wo]))
    return shards


def heads_of_ranks(n_heads: int, n_kv_heads: int, n_ranks: int) -> list[tuple[range, range]]:
    """Each rank's (query heads, KV heads). A KV head stands on every rank that has a query head of its group.

    ValueError if n_ranks is none of possible_ranks().
    """
    if n_ranks not in possible_ranks(n_heads, n_kv_heads):
        raise ValueError(f"n_ranks must divide n_heads = {n_heads}, and divide n_kv_heads = {n_kv_heads} or be a "
                         f"multiple of it, and {n_ranks} does not")
    group, mine = group_size(n_heads, n_kv_heads), n_heads // n_ranks
    queries = [range(r * mine, (r + 1) * mine) for r in range(n_ranks)]
    return [(heads, range(heads[0] // group, heads[-1] // group + 1)) for heads in queries]


def possible_ranks(n_heads: int, n_kv_heads: int) -> list[int]:
    """The numbers of ranks that share the heads evenly."""
    return [r for r in range(1, n_heads + 1)
            if n_heads % r == 0 and (n_kv_heads % r == 0 or r % n_kv_heads == 0)]


def ring_all_reduce(parts: list[Vector]) -> tuple[list[Vector], list[int]]:
    """One vector a rank -> (their sum, on every rank; how many numbers each rank sent).

    The vector is cut into as many chunks as there are ranks. For R - 1 steps everyone passes a chunk to the
    right, who adds it to its own (reduce-scatter); then each rank has one finished chunk, and for R - 1 steps
    the finished ones go round (all-gather). NCCL's ring does this.
    """
    n_ranks, size = len(parts), len(parts[0])
    buffers, sent = [list(part) for part in parts], [0] * n_ranks
    chunks = [slice(size * c // n_ranks, size * (c + 1) // n_ranks) for c in range(n_ranks)]
    for step in range(2 * (n_ranks - 1)):
        messages = [buffers[r][chunks[(r - step) % n_ranks]] for r in range(n_ranks)]  # all send at once
        for r, message in enumerate(messages):
            right, chunk = buffers[(r + 1) % n_ranks], chunks[(r - step) % n_ranks]
            right[chunk] = map(operator.add, right[chunk], message) if step < n_ranks - 1 else message
            sent[r] += len(message)
    return buffers, sent


def show_tensor_parallel(trace: Trace, knobs: Namespace) -> None:
    """Who holds what, and what more ranks than KV heads cost."""
    n_heads, n_kv_heads, ranks, dim, x = knobs.n_heads, knobs.n_kv_heads, knobs.ranks, knobs.dim, embed(knobs)
    head_dim, rng = dim // n_heads, random.Random(knobs.seed)
    weights = [random_matrix(rng, rows, dim, 1 / math.sqrt(dim))
               for rows in (dim, n_kv_heads * head_dim, n_kv_heads * head_dim, dim)]
    whole = grouped_query_attention(x, *weights, n_heads, n_kv_heads)
    parts = tensor_parallel_attention(x, *weights, n_heads, n_kv_heads, ranks)
    reduced, sent = ring_all_reduce([[value for row in part for value in row] for part in parts])
    trace.say(f"{n_heads} query heads and {n_kv_heads} KV heads on {ranks} rank{'s' * (ranks > 1)}"
              f"{' (the first 8 shown)' * (ranks > 8)}. Counted: the numbers "
              f"in each rank's weights, in its keys and values of one token, and those it passed on in the "
              f"all-reduce of the output, {len(x)} × {dim} numbers.")
    trace.ask("how many numbers does each rank send in the all-reduce, if it goes round a ring?", sent[0])
    rows = []
    for r, (queries, kv) in enumerate(heads_of_ranks(n_heads, n_kv_heads, ranks)[:8]):
        shard = shard_weights(*weights, n_heads, n_kv_heads, ranks)[r]
        rows.append([str(r), span("q", queries), span("kv", kv), f"{sum(len(row) for w in shard for row in w):,}",
                     str(len(linear(x[:1], shard[1])[0]) + len(linear(x[:1], shard[2])[0])), f"{sent[r]:,}"])
    trace.table(["rank", "query heads", "KV heads", "weights held", "cache a token", "sent"], rows, left=(1, 2))

    trace.say("With more ranks, weights and cache shrink in step, until there are more ranks than KV heads. From there "
              "on each rank keeps one whole KV head, and there are copies.")
    rows = []
    for n_ranks in possible_ranks(n_heads, n_kv_heads):
        held = [len(wk) + len(wv) for _, wk, wv, _ in shard_weights(*weights, n_heads, n_kv_heads, n_ranks)]
        rows.append([str(n_ranks), str(held[0]), bar(held[0], 2 * n_kv_heads * head_dim, 20), str(sum(held)),
                     f"{sum(held) // (2 * n_kv_heads * head_dim)}×"])
    trace.table(["ranks", "cache a token: each", "", "all ranks", "copies"], rows, left=(2,))

    trace.check_close("sum of the ranks' outputs = the single machine's", add_matrices(parts), whole, 1e-12)
    trace.check_close("after the all-reduce every rank has that sum", reduced,
                      [[value for row in whole for value in row]] * ranks, 1e-12)
    share = 2 * (ranks - 1) / ranks * len(x) * dim
    trace.check("each rank sent 2·(R - 1)/R of the output, chunks rounded",
                all(abs(s - share) <= 2 * (ranks - 1) for s in sent), f"{share:,.0f}")


# ---------------------------------------------------------------------------------------------------
# The supporting cast of this script: embeddings and heads built by hand, a dense reference, small measures.

def embed(knobs: Namespace) -> Matrix:
    """knobs.tokens -> [n][dim], the four BLOCKS of dim / 4 channels that section 2 describes."""
    rng, size = random.Random(knobs.seed), knobs.dim // len(BLOCKS)
    codes = {token: [rng.choice((-1.0, 1.0)) for _ in range(size)] for token in dict.fromkeys(knobs.tokens)}

    def clocks(position: int) -> Vector:
        """Clock c moves a quarter turn per token, an eighth, …; √2, so that a channel's mean square is 1."""
        return [math.sqrt(2) * hand(position * math.pi / 2 ** (c + 1))
                for c in range(size) for hand in (math.cos, math.sin)][:size]

    return [codes[token] + clocks(p) + clocks(p - 1) + clocks(0) for p, token in enumerate(knobs.tokens)]


def build_heads(jobs: Sequence[str], head_dim: int, dim: int, noise: float = 0.0,
                rng: random.Random | None = None) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """(wq, wk, wv, wo), one head per job of JOBS, for embed()'s channels; values are channels of the word.

    noise: how long a random vector is added to each row of wk and wv, which have length 1.
    """
    size = dim // len(BLOCKS)

    def read(block: str | None, gain: float) -> Matrix:
        """[head_dim][dim]: row r passes on channel r of that block (again from its start if there are fewer)."""
        start = BLOCKS.index(block) * size if block else -dim
        return [[gain if c == start + r % size else 0.0 for c in range(dim)] for r in range(head_dim)]

    wq = [row for job in jobs for row in read(JOBS[job][0], SHARPNESS / math.sqrt(head_dim))]
    wk = [row for job in jobs for row in read(JOBS[job][1], 1.0)]
    wv = [row for _ in jobs for row in read("word", 1.0)]
    if noise:
        wk, wv = ([[value + rng.gauss(0, noise / math.sqrt(dim)) for value in row] for row in w] for w in (wk, wv))
    return wq, wk, wv, [[float(i == j) for j in range(len(wq))] for i in range(dim)]


def job_of(h: int) -> str:
    """Head h's job: those of JOBS in turn."""
    return list(JOBS)[h % len(JOBS)]


def dense_attention(q: Matrix, k: Matrix, v: Matrix, sees: Callable[[int, int], bool]) -> Matrix:
    """The reference of section 1: all of QKᵀ, a mask of -inf, softmax as written in textbooks, all of V."""
    scores = [[math.fsum(a * b for a, b in zip(qi, kj)) / math.sqrt(len(qi)) if sees(i, j) else -math.inf
               for j, kj in enumerate(k)] for i, qi in enumerate(q)]
    exps = [[math.exp(s) for s in row] for row in scores]
    return [[math.fsum(e * vj[c] for e, vj in zip(row, v)) / math.fsum(row) for c in range(len(v[0]))]
            for row in exps]


def check_attention_arguments(q: Matrix, k: Matrix, window: int | None, sinks: int, bias: Matrix | None) -> None:
    """ValueError, with what would do, where attention() cannot work."""
    if not k or not k[0]:
        raise ValueError("k must have at least one row of at least one channel")
    if wrong := next((row for row in [*q, *k] if len(row) != len(k[0])), None):
        raise ValueError(f"q and k must have as many channels as each other, not {len(wrong)} and {len(k[0])}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself) or None, not {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, not {sinks}")
    if bias is not None and (len(bias) != len(q) or any(len(row) != len(k) for row in bias)):
        raise ValueError(f"bias must have one row a query and one number a key: {len(q)} rows of {len(k)}")


def concat(*blocks: Matrix) -> Matrix:
    """Side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [[value for part in rows for value in part] for rows in zip(*blocks)]


def add_matrices(matrices: Sequence[Matrix]) -> Matrix:
    """The sum, element by element."""
    return [[sum(values) for values in zip(*rows)] for rows in zip(*matrices)]


def random_matrix(rng: random.Random, rows: int, columns: int, spread: float = 1.0) -> Matrix:
    """Normal numbers of mean 0 and standard deviation spread, [rows][columns]."""
    return [[rng.gauss(0, spread) for _ in range(columns)] for _ in range(rows)]


def entropy(weights: Vector) -> float:
    """Entropy in bits: 0 for one-hot, log2(n) for an even look at n keys."""
    return max(0.0, -sum(w * math.log2(w) for w in weights if w > 0))


def relative_error(a: Matrix, b: Matrix) -> float:
    """|a - b| / |b| in the Frobenius norm."""
    difference, reference = [x - y for p, r in zip(a, b) for x, y in zip(p, r)], [y for r in b for y in r]
    return math.sqrt(dot(difference, difference) / dot(reference, reference))


def span(prefix: str, indices: range) -> str:
    """A run of heads in short: q0, or q0-3."""
    return f"{prefix}{indices[0]}" + (f"-{indices[-1]}" if len(indices) > 1 else "")


def count_multiplications(function: Callable[..., object], *matrices: Matrix) -> int:
    """How many multiplications function(*matrices) makes with those numbers and with what comes of them.

    They are handed over as floats that count, so whoever multiplies is counted, whatever way it goes about
    it. (What math.exp, a division or a complex number makes of them counts no further.)
    """
    count = 0

    class Counted(float):
        def __mul__(self, other):
            nonlocal count
            count += 1
            return Counted(float.__mul__(self, other))

        def __add__(self, other):
            return Counted(float.__add__(self, other))

        __rmul__, __radd__ = __mul__, __add__

    function(*([list(map(Counted, row)) for row in matrix] for matrix in matrices))
    return count


# ---------------------------------------------------------------------------------------------------
# Shared by the five scripts, the same in each: arithmetic, the text, the tokenizer, the trace.

def dot_by_hand(a: Sequence[float], b: Sequence[float]) -> float:
    """Σ a[i]·b[i]."""
    return sum(map(operator.mul, a, b))


dot = getattr(math, "sumprod", dot_by_hand)  # Python 3.12 and newer have it built in


def softmax(scores: Vector) -> Vector:
    """exp(s) / Σ exp(s), with the largest score taken off first so that nothing overflows.

    A score of -inf gets weight 0; where all are -inf, as in a row that sees nothing, all weights are 0.
    """
    top = max(scores, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(scores)
    exps = [math.exp(s - top) for s in scores]
    total = sum(exps)
    return [e / total for e in exps]


def linear(x: Matrix, w: Matrix) -> Matrix:
    """y = W x for every row: x [n][in], w [out][in] -> [n][out], as nn.Linear without a bias."""
    return [[dot(row, unit) for unit in w] for row in x]


CLAUSES = ["the house that Jack built.", "the malt that lay in", "the rat that ate", "the cat that killed",
           "the dog that worried", "the cow with the crumpled horn that tossed", "the maiden all forlorn that milked",
           "the man all tattered and torn that kissed", "the priest all shaven and shorn that married",
           "the cock that crowed in the morn that waked", "the farmer sowing his corn that kept",
           "the horse and the hound and the horn that belonged to"]
# The House That Jack Built: verse n tells clauses n, n - 1, …, 0.
TEXT = "".join("This is " + " ".join(CLAUSES[n::-1]) + "\n" for n in range(len(CLAUSES)))


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding in miniature, over characters: vocab[id] is a token, merges are in order of learning.

    Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016, arXiv:1508.07909.
    """
    vocab: list[str]
    merges: list[tuple[str, str]]

    @staticmethod
    def words(text: str) -> list[str]:
        """The units no merge crosses: words and punctuation with their leading space, other white space alone."""
        return re.findall(r" ?\w+| ?[^\w\s]+|\s", text)

    @staticmethod
    def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
        """Join every occurrence of pair in parts, from the left."""
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == pair:
                merged[-1] += part
            else:
                merged.append(part)
        return merged

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Tokenizer:
        """Start from the text's characters; merge the most frequent pair until there are vocab_size tokens.

        Ties go to the pair that sorts first. The vocabulary stays smaller when every word is one token already.
        ValueError if text is empty or has more characters than vocab_size.
        """
        vocab, merges = sorted(set(text)), []
        if not 0 < len(vocab) <= vocab_size:
            raise ValueError(f"vocab_size must be at least the number of different characters, {len(vocab)}, "
                             f"and the text not empty; got {vocab_size}")
        counts = Counter(cls.words(text))
        parts = {word: list(word) for word in counts}
        while len(vocab) < vocab_size:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, count in counts.items():
                for pair in zip(parts[word], parts[word][1:]):
                    pairs[pair] += count
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            parts = {word: cls.merge(split, best) for word, split in parts.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of text: the merges, in order, within each word. ValueError names an unknown character."""
        ids = {token: i for i, token in enumerate(self.vocab)}
        if unknown := next((c for c in text if c not in ids), None):
            known = "".join(token for token in self.vocab if len(token) == 1)
            raise ValueError(f"the vocabulary has no character {unknown!r}; it knows {known!r}")
        parts = {word: list(word) for word in set(self.words(text))}
        for pair in self.merges:
            parts = {word: self.merge(split, pair) for word, split in parts.items()}
        return [ids[part] for word in self.words(text) for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


WIDTH = 80  # columns of the trace
# What a terminal without the left character gets instead of it.
ASCII = str.maketrans({
    "█": "#", "▓": "*", "▒": "+", "░": ":", "·": ".", "│": "|", "─": "-", "┌": "+", "┐": "+", "└": "+", "┘": "+",
    "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+", "→": "->", "←": "<-", "␣": "_", "…": "...", "×": "x",
    "√": "sqrt ", "Σ": "sum ", "Δ": "d", "ᵀ": "^T", "²": "^2", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~"})
SHADES = " ·░▒▓█"
SHADES_LEGEND = "blank: hidden   · under 2%   ░ 2 to 10%   ▒ 10 to 30%   ▓ 30 to 60%   █ more"


class Trace:
    """Prints the sections and their checks; knows what the output can show, and how many checks held.

    predict: ask the reader before each result; None: don't; False: ask, but wait for no answer.
    """

    def __init__(self, ascii_only: bool = False, predict: bool | None = None):
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        probe = "".join(map(chr, ASCII))
        self.ascii = ascii_only or probe.encode(encoding, "ignore").decode(encoding) != probe
        self.colour = (sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.held = self.failed = self.unwritten = 0
        self.predict, self.asked, self.right = predict, 0, 0
        self.in_checks = False  # was the last line a check?

    def plain(self, text: str) -> str:
        """text as this output can show it."""
        return text.translate(ASCII).encode("ascii", "backslashreplace").decode() if self.ascii else text

    def lines(self, lines: Sequence[str], style: str = "") -> None:
        """Print lines as they are (a picture, say); style: an ANSI code, for terminals."""
        self.in_checks = False
        for line in lines:
            line = self.plain(line).rstrip()
            print(f"\x1b[{style}m{line}\x1b[0m" if style and self.colour else line)

    def section(self, number: int, title: str, functions: Sequence[Callable]) -> None:
        """A section's head: its number and title, and the functions in the source that do the work."""
        self.lines(["", f"── {number} ── {title} ".ljust(WIDTH, "─")], "1")
        names = "in the source: " + ", ".join(function.__name__ for function in functions)
        self.lines(textwrap.wrap(names, WIDTH, subsequent_indent=" " * 15), "2")

    def say(self, text: str) -> None:
        """A paragraph, wrapped."""
        self.lines(["", *textwrap.wrap(self.plain(text), WIDTH)])

    def note(self, text: str) -> None:
        """A line under a picture: its legend."""
        self.lines(textwrap.wrap(self.plain(text), WIDTH), "2")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
        """A table, two blanks between the columns, right-aligned but for the columns named in left."""
        cells = [[self.plain(cell) for cell in row] for row in (header, *rows)]
        widths = [max(map(display_width, column)) for column in zip(*cells)]
        for i, row in enumerate(cells):
            pads = [" " * (width - display_width(cell)) for cell, width in zip(row, widths)]
            self.lines(["  ".join(cell + pad if c in left else pad + cell
                                  for c, (cell, pad) in enumerate(zip(row, pads)))], "2" if i == 0 else "")

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared or bounded. A failure makes the exit status 1."""
        self.held, self.failed = self.held + bool(holds), self.failed + (not holds)
        text = textwrap.wrap(self.plain(f"{claim} ({evidence})"), WIDTH - 6)
        mark = "ok  " if holds else "FAIL"
        if self.colour:
            mark = f"\x1b[{'32' if holds else '1;31'}m{mark}\x1b[0m"
        self.lines([""] * (not self.in_checks) + [f"{mark}  {text[0]}", *("      " + line for line in text[1:])])
        self.in_checks = True

    def ask(self, question: str, answer: float | str) -> None:
        """With --predict: ask before the result is shown, wait for the reader's answer, show the computed one.

        A number is right within a tenth, a text when it is the same but for case and blanks around it.
        """
        if self.predict is None:
            return
        shown = answer.strip() if isinstance(answer, str) else (
            f"{answer:,.0f}" if isinstance(answer, int) or abs(answer) >= 1000 else f"{answer:.3g}")
        self.say(f"Predict: {question}")
        reply = ""
        if self.predict:
            try:
                reply = input("  your answer (Enter: pass) > ").strip()
            except EOFError:
                print()
                self.predict = False  # no more answers to come
        right = bool(reply) and reply.casefold() == shown.casefold()
        if not isinstance(answer, str) and (number := re.search(r"[+-]?[0-9][0-9,]*(\.[0-9]+)?|[+-]?\.[0-9]+", reply)):
            right = abs(float(number[0].replace(",", "")) - answer) <= abs(answer) / 10
        self.asked, self.right = self.asked + bool(reply), self.right + right
        self.lines([f"  computed: {shown}" + (" - yes" if right else " - not quite") * bool(reply)], "1")

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """A check that two matrices have the same shape and differ by less than bound in every place."""
        same_shape = [len(row) for row in got] == [len(row) for row in expected]
        gaps = [abs(a - b) for p, q in zip(got, expected) for a, b in zip(p, q)]
        holds = same_shape and all(gap < bound for gap in gaps)
        failure = f"max |Δ| = {max(gaps):.1e}" if same_shape else "the shapes differ"
        self.check(claim, holds, f"max |Δ| < {bound:.0e}" if holds else f"{failure}; bound {bound:.0e}")


def display_width(text: str) -> int:
    """Columns that text takes in a terminal: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def show_token(token: str) -> str:
    """A token as a label of 12 columns at most: no leading space, other white space and the unprintable escaped."""
    text = token[1:] if len(token) > 1 and token[0] == " " else token.replace(" ", "␣")
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    while display_width(text) > 12:
        text = text[:-2] + "…"
    return text


def shade(weight: float) -> str:
    """A weight between 0 and 1 as one character, darker for more."""
    return SHADES[sum(weight > step for step in (0, 0.02, 0.1, 0.3, 0.6))]


def bar(value: float, full: float, width: int) -> str:
    """A bar of value / full times width characters; a trace of one for anything above zero."""
    length = round(width * max(0.0, min(value / full, 1.0))) if full else 0
    return "█" * length or "·" * (value > 0)


def heat_map(weights: Matrix, labels: Sequence[str] = (), title: str = "", cell: int = 1) -> list[str]:
    """A square of weights as shaded cells, each cell characters wide, with a label before each row."""
    margin = max(map(display_width, labels), default=-1) + 1
    names = [label + " " * (margin - display_width(label)) for label in labels] or [""] * len(weights)
    return ([" " * margin + title.ljust(cell * len(weights))] if title else []) + [
        name + "".join(shade(w) * cell for w in row[:len(weights)]) for name, row in zip(names, weights)]


def side_by_side(blocks: Sequence[list[str]], gap: int = 3) -> list[str]:
    """Pictures of the same height next to each other."""
    widths = [max(map(display_width, block)) for block in blocks]
    return [(" " * gap).join(line + " " * (width - display_width(line)) for line, width in zip(lines, widths))
            for lines in zip(*blocks)]


class OneLineParser(ArgumentParser):
    """argparse, except that a refusal is one line, on every Python."""

    def parse_args(self, args=None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):  # argparse takes these for no value at all
                self.error(f"argument {argument[:-3]}: expected a value")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def section_numbers(count: int) -> Callable[[str], list[int]]:
    """An argparse type: numbers of sections with commas between them."""
    def parse(text: str) -> list[int]:
        numbers = [int(part) if re.fullmatch(r" *[0-9]{1,4} *", part) else 0 for part in text.split(",")]
        if not all(1 <= number <= count for number in numbers):
            raise ArgumentTypeError(f"must be numbers from 1 to {count} (--list names them), as in 1,{count}, "
                                             f"not {text!r}")
        return numbers
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """The options that all five scripts have; the script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    parser.add_argument("--section", metavar="N[,N...]", action="extend", type=section_numbers(n_sections),
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true", help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true", help="be asked for each section's result before it is shown")
    return parser


def announce(multiply_adds: float) -> None:
    """On stderr, before a run that will take more than half a minute here: how long, from the work it will count."""
    ones, start = [1.0] * 10_000, time.process_time()
    for _ in range(20):
        dot(ones, ones)
    seconds = multiply_adds * (time.process_time() - start) / (20 * len(ones))
    if seconds > 30:
        print(f"these settings take about {multiply_adds:.0e} multiply-adds, {seconds:.0f} s on this machine; "
              f"Ctrl-C ends it", file=sys.stderr)


def run_sections(sections: Sequence[tuple], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections (title, show function, functions named in the head); the exit status.

    0 when every check held, 1 when one failed or a function is not written yet (an exercise: its section says so,
    and the others go on), 130 after Ctrl-C. A reader who closes the pipe ends it quietly.
    """
    try:
        trace = Trace(knobs.ascii, sys.stdin is not None and sys.stdin.isatty() if knobs.predict else None)
        if knobs.list:
            trace.lines([f"{number:>2}  {title}" for number, (title, *_) in enumerate(sections, 1)])
        else:
            for number in sorted(set(knobs.section or range(1, len(sections) + 1))):
                title, show, functions = sections[number - 1]
                start = time.perf_counter()
                trace.section(number, title, functions)
                try:
                    show(trace, knobs)
                except NotImplementedError as error:
                    trace.unwritten += 1
                    trace.say(f"Not written yet: {error}. This section goes on once it is.")
                if knobs.time:
                    sys.stdout.flush()
                    print(f"section {number}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
            trace.lines(["", f"{trace.failed} of {trace.failed + trace.held} checks FAILED." if trace.failed else
                         f"All {trace.held} checks held." if trace.held else
                         "No check was reached.",
                         *[f"Sections that wait for a function: {trace.unwritten}."] * bool(trace.unwritten),
                         *[f"Predictions: {trace.right} of {trace.asked} right."] * bool(trace.asked),
                         f"Try next: {next_experiment}"], "1")
        if sys.stdout is not None:
            sys.stdout.flush()
        return 1 if trace.failed or trace.unwritten else 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout cannot fail again
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"cannot write the trace: {error.strerror}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------------------------------------------

SECTIONS = [
    ("Scaled dot-product attention", show_attention, [visible_keys, attention_weights, attention]),
    ("Multi-head attention (MHA)", show_multi_head, [multi_head_attention, split_heads, build_heads]),
    ("Shared keys and values: MQA and GQA", show_grouped,
     [multi_query_attention, grouped_query_attention, mean_pool_kv_heads]),
    ("Sliding window and attention sinks", show_window, [visible_keys, attention, RollingKVCache]),
    ("Multi-head latent attention (MLA)", show_mla, [mla_compress, mla_attention, mla_attention_absorbed]),
    ("Positions: RoPE and ALiBi", show_positions, [rope, alibi_slopes, alibi_bias]),
    ("The bill: cache and work of real models", show_bill, [kv_bytes_per_token, cache_bytes, decode_multiplications]),
    ("Tensor parallelism", show_tensor_parallel, [tensor_parallel_attention, heads_of_ranks, ring_all_reduce]),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; the exit status."""
    parser = common_parser("microattention", "Attention and its variants, side by side on one sentence.",
                           len(SECTIONS))
    parser.add_argument("--text", default=SENTENCE, help=f"the sentence to look at (default: {SENTENCE!r})")
    parser.add_argument("--dim", metavar="N", type=whole_number(8, 128), default=DIM,
                        help=f"channels of an embedding, a multiple of 4 (default {DIM})")
    parser.add_argument("--n-heads", metavar="N", type=whole_number(1, 64), default=N_HEADS,
                        help=f"query heads; divides dim (default {N_HEADS})")
    parser.add_argument("--n-kv-heads", metavar="N", type=whole_number(1, 64),
                        help="KV heads; divides n-heads (default: half of them, or what comes next)")
    parser.add_argument("--window", metavar="N", type=whole_number(1, 9999), default=WINDOW,
                        help=f"keys a query sees in section 4, itself included (default {WINDOW})")
    parser.add_argument("--sinks", metavar="N", type=whole_number(0, 9999), default=SINKS,
                        help=f"first tokens that stay visible outside the window (default {SINKS})")
    parser.add_argument("--ranks", metavar="N", type=whole_number(1, 64),
                        help="cards that share the heads in section 8 (default: 2 where that works)")
    knobs = parser.parse_args(argv)

    n_heads = knobs.n_heads
    divisors = [d for d in range(1, n_heads + 1) if n_heads % d == 0]
    knobs.n_kv_heads = knobs.n_kv_heads or max([1] + divisors[:-1])
    if knobs.dim % 4 or knobs.dim % n_heads:
        parser.error(f"argument --dim: {knobs.dim} must be a multiple of 4 and of --n-heads, {n_heads}; "
                     f"{math.lcm(4, n_heads) * max(1, round(knobs.dim / math.lcm(4, n_heads)))} would do")
    if n_heads % knobs.n_kv_heads:
        parser.error(f"argument --n-kv-heads: {knobs.n_kv_heads} does not divide --n-heads, {n_heads}; "
                     f"these do: {', '.join(map(str, divisors))}")
    ranks = possible_ranks(n_heads, knobs.n_kv_heads)
    knobs.ranks = knobs.ranks or min(ranks[1:] or ranks)
    if knobs.ranks not in ranks:
        parser.error(f"argument --ranks: {knobs.ranks} ranks cannot share {n_heads} query heads and "
                     f"{knobs.n_kv_heads} KV heads evenly; these can: {', '.join(map(str, ranks))}")
    if not knobs.text.strip():
        parser.error("argument --text: there must be something in it")
    tokenizer = Tokenizer.train(TEXT + knobs.text, VOCAB_SIZE + len(set(knobs.text) - set(TEXT)))
    knobs.tokens = [tokenizer.vocab[i] for i in tokenizer.encode(knobs.text)]
    knobs.labels = [show_token(token) for token in knobs.tokens]
    knobs.cut = f" (The first {MAP_TOKENS} of {len(knobs.tokens)} tokens.)" * (len(knobs.tokens) > MAP_TOKENS)
    if len(knobs.tokens) > MAX_TOKENS:
        parser.error(f"argument --text: {len(knobs.tokens)} tokens are more than this trace shows, {MAX_TOKENS}")
    if not knobs.list:  # most of it (measured): projections, and counting in section 5
        announce((60 * len(knobs.tokens) + 9000 / n_heads) * knobs.dim**2)
    return run_sections(SECTIONS, knobs, "python microattention.py --section 4 --window 3 --sinks 0")


if __name__ == "__main__":
    sys.exit(main())
