#!/usr/bin/env python3
"""Attention: who looks at whom, and what it costs to remember.

A language model writes one token at a time. For each new token, attention looks back at the tokens
before it, and so their keys and values must be kept: this is the KV cache, the memory that limits
how many people one card can serve. Most variants of attention in use today are ways to keep less of
it. This script runs them on one sentence, draws who looks at whom, and counts what each one keeps.
Nothing is trained. The heads that are drawn are built by hand, so that you can see what each of
them looks for; where only sizes and sums count, the weights are random.

How to read it
  1. Read the words below (3 minutes), run `python3 microattention.py` and read sections 1 to 5 of
     what it prints (12 minutes).
  2. Read THE TECHNIQUES, in order: sections 1 to 5 are the core of the chapter (30 minutes).
     Sections 6 to 8 (MLA, the memory of real models, several cards) can wait, in the trace and in
     the source (25 minutes).
  3. THE EXPERIMENTS say how each number of the trace was measured. THE MODEL AND THE BENCH has the
     heads built by hand. SHARED BY THE FIVE, which the five scripts of this collection have in
     common, reads text, prints and parses the command line.

The papers
  Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762             sections 1, 2
  Shazeer, Fast Transformer Decoding, 2019, arXiv:1911.02150                    section 3
  Ainslie et al., GQA, 2023, arXiv:2305.13245                                   section 3
  Jiang et al., Mistral 7B, 2023, arXiv:2310.06825                              section 4
  Xiao et al., Efficient Streaming Language Models with Attention Sinks, 2023,
    arXiv:2309.17453                                                            section 4
  Gemma Team, Gemma 3, 2025, arXiv:2503.19786                                   section 4
  OpenAI, gpt-oss model card, 2025, arXiv:2508.10925                            section 4
  Su et al., RoFormer, 2021, arXiv:2104.09864                                   section 5
  Chen et al., Position Interpolation, 2023, arXiv:2306.15595                   section 5
  Peng et al., YaRN, 2023, arXiv:2309.00071                                     section 5
  Press et al., Train Short, Test Long (ALiBi), 2021, arXiv:2108.12409          section 5
  DeepSeek-AI, DeepSeek-V2, 2024, arXiv:2405.04434                              section 6
  Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053                           section 8
  Huang et al., GPipe, 2018, arXiv:1811.06965                                   section 8
"""

# The words. What is not explained here is explained in the section that uses it.
#
#   token            a word, or a piece of one: what the model reads and writes
#   embedding        the vector that stands for a token; its numbers are called channels
#   query, key,      three vectors that each token makes from its embedding: what it looks for,
#     value          what it can be found by, and what it hands over when it is found
#   score            how well a key answers a query: their dot product, scaled
#   softmax(scores)  weights that are positive and sum to 1; a higher score gets more weight
#   head             a query head: one set of queries, which looks for one thing
#   KV head          one set of keys and values; several query heads may share it
#   layer            attention with many heads, and then a feed-forward network, which works on each
#                    token alone; a model is a stack of layers
#   causal           no token sees a later one
#   prefill, decode  reading the prompt, all tokens at once; then writing, one token at a time
#   KV cache         the keys and values of all tokens so far, kept for the tokens to come
#   latent           a short vector from which longer ones are computed again
#   card             a GPU with its own memory
#   rank             one of several cards that work together
#   all-reduce       the ranks add up their vectors, and every rank gets the sum
#   perplexity       how unsure a model is about the next token; 1 would be certain
#   dense            computed with the whole matrix of scores, [n_q][n_k], as a textbook does it
#   FLOP             a multiplication or an addition
#   engine           a program that serves many requests at once, as vLLM does; llama.cpp runs
#                    models on any computer, and transformers is Hugging Face's library
#
# linear(x, w) multiplies every row of x by the matrix w [out][in]. dot(a, b) is Σ a[i]·b[i]; every
# product of numbers is made in it, and the experiments count them there. check_… refuses what
# cannot work. All stand further down, and none needs reading now.
# A shape in brackets says how many: q [n_q][d] is n_q queries of d channels each.

from __future__ import annotations

import cmath
import itertools
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
from functools import partial
from statistics import fmean
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]

SENTENCE = "This is the cat that killed the rat that ate the malt"
VOCAB_SIZE = 96    # tokens; the words of SENTENCE are then one token each
DIM = 32           # channels of a token where weights are random
N_HEADS = 4        # query heads
WINDOW = 4         # keys that a query sees in section 4, itself included
SINKS = 1          # first tokens that stay visible outside the window
STAGES = 4         # cards in the pipeline of section 8
MICRO_BATCHES = 8  # pieces of the batch in that pipeline
MAX_TOKENS = 128   # longest text accepted
MAP_TOKENS = 14    # tokens drawn in a map, so that four maps fit side by side


# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Scaled dot-product attention
#
# A model turns each token's embedding x into three vectors, by three matrices that it has learned:
# a query q = W_Q x, a key k = W_K x and a value v = W_V x. Attention compares the query of a token
# with the keys of the tokens that it may see, and returns a mixture of their values:
#
#     score[i][j]  = q[i]·k[j] / √d              how well key j answers query i
#     weight[i][:] = softmax(score[i][:])        positive, and the sum is 1
#     out[i]       = Σ_j weight[i][j] · v[j]     the values, averaged by these weights
#
# A tiny one, with d = 4, so that √d = 2. The query is (2, 2, 0, 0). Three keys and their values:
#
#     key                q·k   q·k/√d   e^(q·k/√d)   weight   value
#     (1, 1,  0, 0)       4       2        7.39       .665      10
#     (1, -1, 5, 5)       0       0        1.00       .090      20
#     (0, 1,  9, 0)       2       1        2.72       .245      30
#
#     out = .665 · 10 + .090 · 20 + .245 · 30 = 15.8
#
# Why divide by √d? If the channels of q and k are random with variance 1, q·k is a sum of d
# terms, and its standard deviation is √d. Without the division, the scores of d = 128 channels
# would spread by about 11, and softmax would give nearly all the weight to one key. Such a head
# hardly learns any more: if a score changes a little, its weight changes by weight · (1 - weight)
# times that. For a weight of 0.5 this is 0.25, for one of 0.99 it is 0.01.
#
# In a causal model query i stops at its own position. While a model writes, there is one new
# query for all the keys so far. So the queries are the last positions of the text: with 1 query
# and 5 keys the query is at position 4, and sees all of them.
#
# In production: FlashAttention computes the same without ever storing the scores (flash_attn_func
# in flash_attn/flash_attn_interface.py; microflash.py takes it apart). vLLM calls it in
# vllm/v1/attention/backends/flash_attn.py. There keys are taken in blocks. A block that is wholly
# hidden is skipped, and in the others hidden scores are computed and set to -inf.
# Measured by show_attention().


def attention(
    q: Matrix,
    k: Matrix,
    v: Matrix,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    bias: Matrix | None = None,
    sink_logit: float | None = None,
) -> Matrix:
    """Return softmax(q kᵀ · scale + bias) v for one head (Vaswani et al. 2017, equation 1).

    q [n_q][d], k [n_k][d], v [n_k][d_v] -> [n_q][d_v]. A query that sees no key gets zeros.
    causal: a query sees no key after its own position; the queries are the last n_q of n_k.
    scale: 1/√d unless given. bias [n_q][n_k]: added to the scaled scores (section 5).
    window, sinks, sink_logit: see section 4. dot() makes all products, where they are counted.
    ValueError where shapes disagree, window < 1 or sinks < 0.
    """
    check_values(v, len(k))
    out = []
    options = dict(causal=causal, window=window, sinks=sinks, scale=scale, bias=bias,
                   sink_logit=sink_logit)
    for seen, weights in visible_weights(q, k, **options):
        if not seen:
            out.append([0.0] * len(v[0]))
            continue
        channels = zip(*[v[j] for j in seen])  # the values that are seen, channel by channel
        out.append([dot(weights, channel) for channel in channels])
    return out


def attention_weights(q: Matrix, k: Matrix, **options) -> Matrix:
    """Return who looks at whom: q [n_q][d], k [n_k][d] -> weights [n_q][n_k].

    options: those of attention(). A weight is 0 where the query does not see the key.
    """
    rows = []
    for seen, weights in visible_weights(q, k, **options):
        row = [0.0] * len(k)
        for j, weight in zip(seen, weights):
            row[j] = weight
        rows.append(row)
    return rows


def visible_weights(
    q: Matrix,
    k: Matrix,
    *,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    bias: Matrix | None = None,
    sink_logit: float | None = None,
) -> Iterator[tuple[list[int], Vector]]:
    """Yield for each query the keys that it sees, and its weights on them.

    What is hidden is not computed. ValueError where check_attention_arguments() says that shapes or
    options do not fit.
    """
    check_attention_arguments(q, k, window, sinks, bias)
    if scale is None:
        scale = 1 / math.sqrt(len(k[0]))
    for i, query in enumerate(q):
        seen = visible_keys(i, len(q), len(k), causal, window, sinks)
        scores = [dot(query, k[j]) * scale for j in seen]
        if bias is not None:
            scores = [score + bias[i][j] for score, j in zip(scores, seen)]
        if sink_logit is None:
            yield seen, softmax(scores)
        else:
            # The sink takes its share of the weight, and hands over no value.
            yield seen, softmax([*scores, sink_logit])[:-1]


def visible_keys(
    i: int, n_q: int, n_k: int, causal: bool = True, window: int | None = None, sinks: int = 0
) -> list[int]:
    """Return the keys that query i of n_q sees among n_k, in ascending order."""
    position = n_k - n_q + i
    end = max(position + 1, 0) if causal else n_k
    start = 0 if window is None else max(position + 1 - window, 0)
    # The sinks that are not in the window, and the window.
    return [*range(min(sinks, start)), *range(start, end)]


# 2. Multi-head attention (MHA)
#
# One head looks for one thing. A layer has n_heads of them, each with queries, keys and values of
# its own, of head_dim channels. Every head attends alone. Then the outputs are put side by side,
# and the matrix wo mixes them:
#
#     head_h = attention(x W_Qhᵀ, x W_Khᵀ, x W_Vhᵀ)
#     out    = concat(head_1, …, head_n) W_Oᵀ
#
# The rows of wq are the W_Q of head 1, then those of head 2, and so on; wk and wv likewise. One big
# product makes the queries of all heads, and split_heads() cuts them apart.
#
# The heads that this script looks at are built by hand (build_heads), so that it is known what they
# look for: the same word, the token one back, everything alike, or the first token. Their
# embeddings hold the word and its position. (How positions enter real models: section 5.) Trained
# models have heads that look one back (Olsson et al. 2022, arXiv:2209.11895) and heads that rest on
# the first token (StreamingLLM, section 4).
#
# In production: transformers has it in plain PyTorch, eager_attention_forward() in
# models/llama/modeling_llama.py.
# Measured by show_multi_head().


def multi_head_attention(
    x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, **options
) -> Matrix:
    """Return multi-head attention of x [n][dim] -> [n][dim] (Vaswani et al. 2017, section 3.2.2).

    wq, wk, wv [n_heads·head_dim][dim]; wo [dim][n_heads·head_dim]. options: those of attention().
    ValueError if n_heads does not divide the rows of wq, wk or wv.
    """
    q = split_heads(linear(x, wq), n_heads)
    k = split_heads(linear(x, wk), n_heads)
    v = split_heads(linear(x, wv), n_heads)
    heads = [attention(q[h], k[h], v[h], **options) for h in range(n_heads)]
    return linear(concat(*heads), wo)


def split_heads(x: Matrix, n_heads: int) -> list[Matrix]:
    """Return the heads of x: [n][n_heads·head_dim] -> n_heads matrices [n][head_dim].

    ValueError if n_heads does not divide the channels.
    """
    width = len(x[0]) if x else 0
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"n_heads must divide the {width} channels, and {n_heads} does not")
    head_dim = width // n_heads
    return [[row[h * head_dim:(h + 1) * head_dim] for row in x] for h in range(n_heads)]


def concat(*blocks: Matrix) -> Matrix:
    """Return the blocks side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


# 3. Shared keys and values: MQA and GQA
#
# To write one token, every head reads the keys and values of all tokens so far, and does only one
# multiplication with each number. A card multiplies much faster than it reads memory. So with
# long texts or many requests the reading is what takes the time (microkv, section 2, computes it).
# Queries are used once and thrown away. So keep n_heads query heads, and let several of them share
# one KV head:
#
#     MHA   every query head has its own KV head            n_kv_heads = n_heads
#     GQA   each group of n_heads / n_kv_heads shares one   1 < n_kv_heads < n_heads
#     MQA   all query heads share one                       n_kv_heads = 1
#
#     head_h = attention(q_h, k_g, v_g)     with g = h // (n_heads / n_kv_heads)
#
# With 8 query heads and 2 KV heads, query heads 0 to 3 read KV head 0, and 4 to 7 read KV head 1.
# The cache, and what is read of it, is a quarter of MHA's. The work is not: every query head still
# compares its query with every key, and averages every value.
#
# A trained MHA model is converted by averaging the wk, and the wv, of the heads in each group. Then
# it is trained a little more, to recover; in the paper, with 5% of the compute of pre-training.
#
# In production: transformers repeats the KV heads for their groups (repeat_kv() in
# models/llama/modeling_llama.py). FlashAttention copies nothing: it takes K and V with fewer
# heads than Q, and finds a query head's KV head by an integer division, as here.
# Measured by show_grouped().


def grouped_query_attention(
    x: Matrix,
    wq: Matrix,
    wk: Matrix,
    wv: Matrix,
    wo: Matrix,
    n_heads: int,
    n_kv_heads: int,
    **options,
) -> Matrix:
    """Return grouped-query attention of x [n][dim] -> [n][dim] (Ainslie et al. 2023).

    wq [n_heads·head_dim][dim]; wk and wv [n_kv_heads·head_dim][dim]; options: those of attention().
    ValueError if n_kv_heads does not divide n_heads.
    """
    group = group_size(n_heads, n_kv_heads)
    q = split_heads(linear(x, wq), n_heads)
    k = split_heads(linear(x, wk), n_kv_heads)
    v = split_heads(linear(x, wv), n_kv_heads)
    heads = [attention(q[h], k[h // group], v[h // group], **options) for h in range(n_heads)]
    return linear(concat(*heads), wo)


def multi_query_attention(
    x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, **options
) -> Matrix:
    """Return attention in which all query heads share one KV head (Shazeer 2019).

    wq [n_heads·head_dim][dim]; wk and wv [head_dim][dim]; options: those of attention().
    """
    k = linear(x, wk)
    v = linear(x, wv)
    heads = [attention(q, k, v, **options) for q in split_heads(linear(x, wq), n_heads)]
    return linear(concat(*heads), wo)


def group_size(n_heads: int, n_kv_heads: int) -> int:
    """Return how many query heads share a KV head.

    ValueError if n_kv_heads does not divide n_heads.
    """
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads must divide n_heads = {n_heads}, and {n_kv_heads} does not")
    return n_heads // n_kv_heads


def mean_pool_kv_heads(w: Matrix, n_heads: int, n_kv_heads: int) -> Matrix:
    """Return the wk or wv of a GQA model, made from that of an MHA model (Ainslie et al. 2023).

    [n_heads·head_dim][dim] -> [n_kv_heads·head_dim][dim]: the heads of a group are averaged.
    ValueError if n_heads does not divide the rows of w, or n_kv_heads does not divide n_heads.
    """
    group = group_size(n_heads, n_kv_heads)
    if len(w) % n_heads:
        raise ValueError(f"n_heads must divide the {len(w)} rows of w, and {n_heads} does not")
    head_dim = len(w) // n_heads
    heads = [w[row:row + head_dim] for row in range(0, len(w), head_dim)]
    pooled = []
    for start in range(0, n_heads, group):
        for rows in zip(*heads[start:start + group]):  # the same row of each head
            pooled.append([fmean(column) for column in zip(*rows)])
    return pooled


# 4. Sliding windows and attention sinks
#
# With a window of w, a query sees only the latest w keys, itself included. The work grows with
# n·w instead of n²/2, and w entries of cache are enough: position p is written to slot p mod w
# (behind the sinks, if there are any), over position p - w, which no query can see any more. The
# slots are then out of order. Attention does not mind, because a weighted average has no order.
#
# A layer with a window reaches w - 1 tokens back. What it reads there has itself looked w - 1
# further back, one layer below. So L layers reach L · (w - 1) tokens back, in small steps. Models
# therefore often mix: most layers are local, and every second, fourth or sixth is global, with no
# window. One global layer reaches everything, and its cache grows with the text; the others' do
# not. The total grows more slowly, but it does grow.
#
# Attention sinks. The weights of a query sum to 1, so a head that finds nothing it looks for must
# still put them somewhere. Trained models often put them on the first token, which every later
# token can see. If a window hides that token, its weight goes to the tokens that are left, which
# the head did not mean to read. There are two ways out:
#
#     StreamingLLM   keep the first few tokens (4 in the paper) visible for ever, as sinks
#     gpt-oss        a learned number per head, s, is one more term in the softmax's sum:
#
#                    weight[j] = e^score[j] / (e^s + Σ_i e^score[i])
#
#     With s, the weights sum to less than 1, and no token has to be kept for it.
#
# How much it matters differs. In the paper's table 2, perplexity without any first token and with
# 4 of them is 3,360 against 9.6 for Llama 2 7B, and 17.9 against 12.1 for Falcon 7B. StreamingLLM
# also counts positions within the cache instead of in the text, so that no distance is longer than
# what the model was trained on.
#
# In production: vLLM frees the blocks that a window has left behind (SlidingWindowManager in
# vllm/v1/core/single_type_kv_cache_manager.py); llama.cpp keeps two caches for a mixed model
# (llama-kv-cache-iswa.cpp). FlashAttention counts a window without the token itself: vLLM and
# transformers call it with window - 1. StreamingLLM: streaming_llm/kv_cache.py. gpt-oss: sdpa() in
# gpt_oss/torch/model.py, where S is the learned sink.
# Measured by show_window().


class RollingKVCache:
    """The keys and values of the latest `window` positions, and of the first `sinks`.

    ValueError if window < 1 or sinks < 0.
    """

    def __init__(self, window: int, sinks: int = 0):
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be at least 1 and sinks at least 0, not {window} and "
                             f"{sinks}")
        self.window = window
        self.sinks = sinks
        self.length = 0  # positions seen so far
        self.slots: dict[int, tuple[int, Vector, Vector]] = {}  # slot: (position, key, value)

    def append(self, key: Vector, value: Vector) -> int:
        """Keep the next position's key and value, and return the slot they went to.

        Sink p goes to slot p, any other position p to slot sinks + p mod window.
        """
        position = self.length
        if position < self.sinks:
            slot = position
        else:
            slot = self.sinks + position % self.window
        self.slots[slot] = (position, key, value)
        self.length += 1
        return slot

    def attend(self, query: Vector, scale: float | None = None) -> Vector:
        """Return the attention of the newest position's query to everything kept, [d_v]."""
        # Whatever is kept may be seen, in the order of the slots.
        _, keys, values = zip(*self.slots.values())
        return attention([query], list(keys), list(values), causal=False, scale=scale)[0]


# 5. Positions: RoPE and ALiBi
#
# A score by itself does not depend on where the tokens stand; only the causal mask tells earlier
# from later. RoPE rotates queries and keys by their position p. Two neighbouring channels are read
# as one complex number, and pair m turns by p·θ_m: the first pairs fast, to tell near places apart,
# and the last ones slowly, for far places.
#
#     (x[2m], x[2m+1])  ->  (x[2m] + i·x[2m+1]) · e^(i·p·θ_m)        θ_m = base^(-2m/d)
#
# Of two complex numbers a and b, the dot product of their parts is the real part of a · conj(b),
# where conj(b) has the opposite angle. So in q·k the two angles meet as a difference:
#
#     e^(i·p_q·θ) · conj(e^(i·p_k·θ)) = e^(i·(p_q - p_k)·θ)
#
# The positions enter the score by their distance only. A tiny one: d = 2, q = k = (1, 0), and
# suppose that θ is a quarter turn. A query at position 5 has turned by 450°, a key at 3 by 270°.
# They lie 180° apart, so q·k = cos 180° = -1. At positions 2 and 0 the query has turned by 180° and
# the key by 0°: q·k is -1 again.
#
# The key's own rotation depends on its own position alone. So a key is rotated once, when its token
# comes, and cached that way. (StreamingLLM renumbers positions, so it must cache keys unrotated.)
#
# Stretching RoPE. The wavelength of pair m, 2π / θ_m, is the number of tokens in one full turn. In
# training on 8,192 tokens, a fast pair has made many turns and seen all angles. A slow pair has not
# finished a turn: at token 100,000 it meets angles that it has never seen. Ways to go further,
# which are mostly followed by some more training on longer texts:
#
#     position interpolation    divide every θ by the factor s; neighbours become hard to tell apart
#     NTK-aware                 a larger base: fast pairs change little, the slowest is slowed by s
#     Llama 3.1                 by wavelength: pairs that turn often within the old length stay as
#                               they are, those that never finish a turn are slowed by s = 8
#     YaRN                      by wavelength, too, and the scores are scaled up a little
#
# Keys that were cached with the old angles do not fit the new ones.
#
# ALiBi leaves q and k alone and subtracts slope · distance from each score. Every head has a slope
# of its own: a steep one looks near, a gentle one far. Most models today use RoPE.
#
# Not about positions, but done at the same place: many models normalize q and k before they meet,
# so that the scores cannot grow during training. This is QK-norm, an RMSNorm (each vector divided
# by its root mean square) over each head in Qwen3 and Gemma 3, over all heads together in OLMo 2.
#
# In production: transformers has the ways to stretch RoPE in modeling_rope_utils.py, vLLM in
# model_executor/layers/rotary_embedding/. Checkpoints in Hugging Face's layout pair channel i
# with i + d/2 instead of neighbours: the same rotation, the channels in another order.
# Measured by show_positions().


def rope(x: Matrix, positions: Sequence[int], base: float = 10000.0) -> Matrix:
    """Return x [n][d] with row r rotated to positions[r] (Su et al. 2021, arXiv:2104.09864).

    Channels 2m and 2m + 1, read as one complex number, turn by position · base^(-2m/d).
    ValueError if d is odd, or if there is not one position per row.
    """
    d = len(x[0]) if x else 0
    if d % 2 or len(positions) != len(x):
        raise ValueError(f"x must have an even number of channels and one position a row, not {d} "
                         f"channels, {len(x)} rows and {len(positions)} positions")
    thetas = [base ** (-2 * m / d) for m in range(d // 2)]
    out = []
    for row, position in zip(x, positions):
        rotated = []
        for a, b, theta in zip(row[::2], row[1::2], thetas):
            z = complex(a, b) * cmath.rect(1.0, position * theta)  # e^(i · position · theta)
            rotated += [z.real, z.imag]
        out.append(rotated)
    return out


def llama3_thetas(
    thetas: Vector,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_context: int = 8192,
) -> Vector:
    """Return RoPE's angles per token, stretched as in Llama 3.1 (its defaults are given).

    A pair that makes more than high_freq_factor turns in the original context keeps its angle. One
    that makes fewer than low_freq_factor turns gets angle / factor. In between, the share
    (turns - low_freq_factor) / (high_freq_factor - low_freq_factor) of the angle is kept as it is,
    and the rest is divided by factor.
    """
    stretched = []
    for theta in thetas:
        turns = original_context * theta / (2 * math.pi)
        kept = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)
        stretched.append(kept * theta + (1 - kept) * theta / factor)
    return stretched


def alibi_slopes(n_heads: int) -> Vector:
    """Return one slope per head: 2^(-8/n), 2^(-16/n), … for n a power of two (Press et al. 2021).

    Other numbers of heads, as in the authors' code: first the slopes of the next smaller power of
    two, then the 1st, 3rd, … slope of twice that power. ValueError if n_heads < 1.
    """
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, not {n_heads}")
    power = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    slopes_of_twice_as_many = [2 ** (-8 * (h + 1) / (2 * power)) for h in range(2 * power)]
    every_other = slopes_of_twice_as_many[::2]
    return slopes + every_other[:n_heads - power]


def alibi_bias(n_q: int, n_k: int, slope: float) -> Matrix:
    """Return what ALiBi adds to the scores: -slope · (query's position - key's), [n_q][n_k].

    The queries are the last n_q positions. Keys to come get a positive number; a causal mask hides
    them.
    """
    return [[-slope * (n_k - n_q + i - j) for j in range(n_k)] for i in range(n_q)]


# 6. Multi-head latent attention (MLA)
#
# GQA saves memory by having fewer KV heads. MLA (DeepSeek-V2) keeps all heads, and caches for each
# token one short vector, the latent c, from which the keys and values of every head are computed
# again. RoPE gets a second, small key that all heads share. The matrices, with d_c numbers in the
# latent, d_rope in the rotated key, and v_dim in a head's value:
#
#     name here   in the paper   shape               with DeepSeek-V3's sizes
#     w_down      W_DKV          [d_c][dim]          512 × 7168
#     wk_rope     W_KR           [d_rope][dim]        64 × 7168
#     wq          W_Q            [head_dim][dim]     128 × 7168, for each of 128 heads
#     wq_rope     W_QR           [d_rope][dim]        64 × 7168, for each head
#     wk_up       W_UK           [head_dim][d_c]     128 × 512, for each head
#     wv_up       W_UV           [v_dim][d_c]        128 × 512, for each head
#
#     c      = w_down x                         cached
#     k_rope = RoPE(wk_rope x)                  cached
#     k_h    = concat(wk_up_h c, k_rope)
#     v_h    = wv_up_h c
#     q_h    = concat(wq_h x, RoPE(wq_rope_h x))
#
# A token leaves 512 + 64 = 576 numbers per layer. MHA would leave 2 · 128 · 128 = 32,768.
#
# The plain form computes the keys and values of all cached tokens again, at every step. The
# absorbed form does not. It moves wk_up to the query, and wv_up behind the average:
#
#     q·(wk_up c)         = (wk_upᵀ q)·c          once per query instead of once per cached token
#     Σ_j w_j (wv_up c_j) = wv_up (Σ_j w_j c_j)
#
# In numbers: c = (3, 1), q = (1, 2), and wk_up has the rows (1, 2) and (0, 1). Plain: the key is
# wk_up c = (5, 1), and q·key = 5 + 2 = 7. Absorbed: wk_upᵀ q = (1, 4), and (1, 4)·(3, 1) = 7.
#
# So the query meets the latent itself, and the absorbed form is multi-query attention with the key
# concat(c, k_rope) and the value c. Why is there a separate k_rope? A rotation R would stand in the
# middle, q·(R wk_up c). It is a different one for each token, so R and wk_up are not one matrix
# that could move to the query.
#
# When does it pay, if there are many cached tokens? For each of them and each head, the plain form
# pays 512 · (128 + 128) = 131,072 multiplications in every step, however many queries the step has,
# to compute key and value again. For every pair of query and key it then pays (128 + 64) + 128 =
# 320, and the absorbed form (512 + 64) + 512 = 1,088, since the latent is longer than a head's key.
# So the absorbed form takes less for up to 131,072 / (1,088 - 320) = 170 queries. It is used for
# few queries on many cached tokens, as in decoding, and the plain form for a whole prompt at once.
#
# Left out: DeepSeek makes the queries, by wq and wq_rope alike, from a latent of their own (1,536
# numbers in V3, by a matrix that all heads share). That saves memory in training and none in the
# cache. It also normalizes c before it is cached.
#
# In production: vLLM's model_executor/layers/attention/mla_attention.py has both forms:
# forward_mha() is the plain one, for prompts, forward_mqa() the absorbed one, for decoding.
# DeepSeek-V3's own inference/model.py has the absorbed form for both (and a "naive" one, which
# caches keys and values). DeepSeek-V3.2-Exp's has both, as here.
# Measured by show_mla().


@dataclass(frozen=True)
class MLAWeights:
    """The matrices of MLA, each W[out][in]; lists have one matrix per head."""

    w_down: Matrix         # [d_c][dim]
    wk_rope: Matrix        # [d_rope][dim]
    wq: list[Matrix]       # [head_dim][dim]
    wq_rope: list[Matrix]  # [d_rope][dim]
    wk_up: list[Matrix]    # [head_dim][d_c]
    wv_up: list[Matrix]    # [v_dim][d_c]
    wo: Matrix             # [dim][n_heads·v_dim]


def mla_compress(x: Matrix, w: MLAWeights, start: int = 0) -> tuple[Matrix, Matrix]:
    """Return what is cached of x [n][dim]: c [n][d_c] and k_rope [n][d_rope].

    start: the position of the first row.
    """
    positions = range(start, start + len(x))
    return linear(x, w.w_down), rope(linear(x, w.wk_rope), positions)


def mla_attention(x: Matrix, c: Matrix, k_rope: Matrix, w: MLAWeights) -> Matrix:
    """Return MLA in the plain form: x [n_q][dim], the last tokens -> [n_q][dim].

    c and k_rope: the cache of all tokens, those of x included.
    """
    positions = range(len(c) - len(x), len(c))
    heads = []
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        q = concat(linear(x, wq), rope(linear(x, wq_rope), positions))
        k = concat(linear(c, wk_up), k_rope)  # every cached token's key is computed again,
        v = linear(c, wv_up)                  # and its value
        heads.append(attention(q, k, v))
    return linear(concat(*heads), w.wo)


def mla_attention_absorbed(x: Matrix, c: Matrix, k_rope: Matrix, w: MLAWeights) -> Matrix:
    """Return the same as mla_attention(), without computing any key or value of a cached token."""
    positions = range(len(c) - len(x), len(c))
    scale = 1 / math.sqrt(len(w.wq[0]) + len(w.wq_rope[0]))  # head_dim + d_rope, as in plain form
    heads = []
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        # W_UKᵀ W_Q could be one matrix, but in V3 it would have 512 × 7168 numbers, and the two
        # have 128 × (512 + 7168).
        wk_up_transposed = list(zip(*wk_up))
        absorbed = linear(linear(x, wq), wk_up_transposed)  # [n_q][d_c]
        q = concat(absorbed, rope(linear(x, wq_rope), positions))
        mean_latent = attention(q, concat(c, k_rope), c, scale=scale)  # [n_q][d_c]
        heads.append(linear(mean_latent, wv_up))
    return linear(concat(*heads), w.wo)


# 7. The bill: cache and work of real models
#
# What one token leaves in the cache, in bytes:
#
#     MHA, GQA, MQA   2 · n_layers · n_kv_heads · head_dim · bytes per number     (2: key, value)
#     MLA             n_layers · (d_c + d_rope) · bytes per number
#
# A layer with a window keeps the latest `window` tokens and no more. The formula that is often
# quoted, 2 · n_layers · width · bytes for every token, uses the width of the model where
# n_kv_heads · head_dim belongs, and forgets windows and latents. It is right only for MHA whose
# heads together are as wide as the model. Llama 3.1 8B is 4,096 wide and has 8 KV heads of 128
# channels: there it says 4,096 / 1,024 = 4 times too much.
#
# In production: v1/kv_cache_interface.py in vLLM computes these sizes for each kind of layer, and
# the engine fills the memory that the weights leave with blocks of them.
# Measured by show_bill().


def kv_bytes_per_token(
    n_layers: int, n_kv_heads: int, head_dim: int, bytes_per_value: float = 2
) -> float:
    """Return the bytes that one token adds to the KV cache of MHA, GQA or MQA."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


def cache_bytes(model: RealModel, n_tokens: int, bytes_per_value: float = 2) -> float:
    """Return the bytes of one request's cache after n_tokens, without what windows have dropped."""
    if model.d_c:
        per_layer = (model.d_c + model.d_rope) * bytes_per_value
    else:
        per_layer = kv_bytes_per_token(1, model.n_kv_heads, model.head_dim, bytes_per_value)
    n_local = model.n_layers - model.n_global_layers  # 0 if the model has no window
    kept_entries = model.n_global_layers * n_tokens + n_local * min(n_tokens, model.window)
    return kept_entries * per_layer


def decode_multiplications(model: RealModel, n_tokens: int) -> int:
    """Return the multiplications in QKᵀ and weights·V for one new token among n_tokens.

    MLA is taken in its absorbed form. The projections are left out: they do not grow with n_tokens.
    """
    if model.d_c:
        per_pair = (model.d_c + model.d_rope) + model.d_c
    else:
        per_pair = 2 * model.head_dim
    n_local = model.n_layers - model.n_global_layers
    pairs = model.n_global_layers * n_tokens + n_local * min(n_tokens, model.window)
    return pairs * model.n_heads * per_pair


# 8. Model parallelism: heads and layers on several cards
#
# Tensor parallelism cuts each layer. Heads do not talk to each other before wo, so each rank takes
# some of them: the rows of wq, wk and wv that make its heads, and the columns of wo that read them.
# Its output is one term of a sum; an all-reduce adds the terms up, so that every rank has the sum
# and goes on.
#
# If there are more ranks than KV heads, several ranks keep the same KV head. From there on, more
# ranks do not shrink the cache on each. MLA has one latent for all heads: every rank would keep all
# of it. So such models are often served with data-parallel attention instead: each rank has all
# heads, and requests of its own.
#
# Pipeline parallelism cuts between layers. Each card is a stage: it holds some layers, gets its
# input from the stage before it, and hands its output to the stage after it. To keep the stages
# busy, the batch is cut into m micro-batches that follow each other. With p = 3 stages and m = 4
# (a row is a stage, a column a tick):
#
#     0 1 2 3 . .
#     . 0 1 2 3 .
#     . . 0 1 2 3
#
# A stage idles until the first micro-batch reaches it, and again after the last has left. This is
# the bubble:
#
#     idle share = (p - 1) / (m + p - 1)
#
# One request alone gets no faster by it: with m = 1 only one stage works at a time. What it buys is
# memory, since a stage holds only its layers and their cache. And it needs little traffic: one
# hand-over per stage, where tensor parallelism has two all-reduces per layer: one after attention
# and one after the feed-forward network.
#
# In production: vLLM shards heads in QKVParallelLinear (model_executor/layers/linear.py), which
# copies KV heads by the same rule; it fills a pipeline with different batches of requests instead
# of pieces of one. Megatron-LM: core/tensor_parallel/layers.py,
# core/pipeline_parallel/schedules.py.
# Attention data-parallel: vLLM's --data-parallel-size.
# Measured by show_parallel().


def tensor_parallel_attention(
    x: Matrix,
    wq: Matrix,
    wk: Matrix,
    wv: Matrix,
    wo: Matrix,
    n_heads: int,
    n_kv_heads: int,
    n_ranks: int,
    **options,
) -> list[Matrix]:
    """Return each rank's partial output [n][dim]; their sum is grouped_query_attention(…)."""
    parts = []
    for heads, shard in zip(heads_of_ranks(n_heads, n_kv_heads, n_ranks),
                            shard_weights(wq, wk, wv, wo, n_heads, n_kv_heads, n_ranks)):
        query_heads, kv_heads = heads
        parts.append(grouped_query_attention(x, *shard, len(query_heads), len(kv_heads), **options))
    return parts


def shard_weights(
    wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, n_kv_heads: int, n_ranks: int
) -> list[tuple[Matrix, Matrix, Matrix, Matrix]]:
    """Return each rank's own wq, wk, wv and wo.

    Its rows of wq, wk and wv are those that make its heads; its columns of wo are those that read
    them.
    """
    head_dim = len(wq) // n_heads
    shards = []
    for query_heads, kv_heads in heads_of_ranks(n_heads, n_kv_heads, n_ranks):
        channels = slice(query_heads[0] * head_dim, (query_heads[-1] + 1) * head_dim)
        kv_rows = slice(kv_heads[0] * head_dim, (kv_heads[-1] + 1) * head_dim)
        shards.append((wq[channels], wk[kv_rows], wv[kv_rows], [row[channels] for row in wo]))
    return shards


def heads_of_ranks(n_heads: int, n_kv_heads: int, n_ranks: int) -> list[tuple[range, range]]:
    """Return each rank's query heads and the KV heads that those read.

    ValueError if n_ranks is not one of possible_ranks().
    """
    if n_ranks not in possible_ranks(n_heads, n_kv_heads):
        raise ValueError(f"n_ranks must divide n_heads = {n_heads}, and divide n_kv_heads = "
                         f"{n_kv_heads} or be a multiple of it, and {n_ranks} does not")
    group = group_size(n_heads, n_kv_heads)
    per_rank = n_heads // n_ranks
    heads = []
    for rank in range(n_ranks):
        start = rank * per_rank
        end = start + per_rank
        heads.append((range(start, end), range(start // group, ceil_div(end, group))))
    return heads


def possible_ranks(n_heads: int, n_kv_heads: int) -> list[int]:
    """Return the numbers of ranks that share the heads evenly.

    Each rank has whole KV heads, or several ranks have the same one.
    """
    possible = []
    for n_ranks in range(1, n_heads + 1):
        kv_heads_fit = n_kv_heads % n_ranks == 0 or n_ranks % n_kv_heads == 0
        if n_heads % n_ranks == 0 and kv_heads_fit:
            possible.append(n_ranks)
    return possible


def run_pipeline(
    stages: Sequence[Callable[[Matrix], Matrix]], micro_batches: Sequence[Matrix]
) -> tuple[list[Matrix], list[list[int | None]]]:
    """Run every micro-batch through all stages, one tick after another (Huang et al. 2018).

    Return the outputs, in order, and the schedule: schedule[tick][stage] is the number of the
    micro-batch that the stage worked on, or None where it was idle.
    """
    waiting = list(enumerate(micro_batches))
    inbox: list[tuple[int, Matrix] | None] = [None] * len(stages)  # what each stage works on next
    outputs = []
    schedule = []
    while len(outputs) < len(micro_batches):
        if waiting:
            inbox[0] = waiting.pop(0)
        # All stages work at the same time. Then each hands its result to the next.
        numbers: list[int | None] = []
        results: list[tuple[int, Matrix] | None] = []
        for stage, work in zip(stages, inbox):
            if work is None:
                numbers.append(None)
                results.append(None)
            else:
                number, x = work
                numbers.append(number)
                results.append((number, stage(x)))
        schedule.append(numbers)
        if results[-1] is not None:
            outputs.append(results[-1][1])
        inbox = [None, *results[:-1]]
    return outputs, schedule


# What this chapter leaves out on purpose: sparse attention, in which a query reads only the blocks
# or tokens that it has chosen (NSA, arXiv:2502.11089; DSA of DeepSeek-V3.2, arXiv:2512.02556), and
# linear attention, which replaces the cache by a state of fixed size (Kimi Linear,
# arXiv:2510.26692; Qwen3-Next, whose Gated DeltaNet is arXiv:2412.06464).


# =============================================================================================
# THE EXPERIMENTS: what the trace shows, and how it is measured
# =============================================================================================

# 1. Scaled dot-product attention


class KeyRow(NamedTuple):
    """One key, as a query sees it."""

    j: int
    key: str
    product: float
    score: float
    weight: float
    value: str  # the signs of its channels


def work_out_row(q: Matrix, k: Matrix, v: Matrix, labels: Sequence[str], i: int) -> list[KeyRow]:
    """Return a row for each key that query i sees."""
    weights = attention_weights(q, k)[i]
    rows = []
    for j in range(i + 1):
        product = dot(q[i], k[j])
        score = product / math.sqrt(len(k[0]))
        value = "".join("+" if number > 0 else "-" for number in v[j])
        rows.append(KeyRow(j, labels[j], product, score, weights[j], value))
    return rows


def last_repeated(tokens: Sequence[str]) -> int:
    """Return the last place of a token that came before, or the last place if there is none."""
    repeated = [i for i, token in enumerate(tokens) if token in tokens[:i]]
    return max(repeated, default=len(tokens) - 1)


class ScaleRow(NamedTuple):
    """Random queries and keys of d channels, compared."""

    d: int
    spread: float   # root mean square of q·k
    raw: float      # the largest weight of a query, mean, scores not scaled
    scaled: float   # the same with scores divided by √d


def compare_scales(sizes: Sequence[int], n: int, rng: random.Random) -> list[ScaleRow]:
    """Return for each d what random queries and keys, [n][d] each, do."""
    rows = []
    for d in sizes:
        q = random_matrix(rng, n, d)
        k = random_matrix(rng, n, d)
        products = list(itertools.chain(*linear(q, k)))
        spread = math.sqrt(dot(products, products) / len(products))
        raw = attention_weights(q, k, causal=False, scale=1.0)
        scaled = attention_weights(q, k, causal=False)
        rows.append(ScaleRow(d, spread, fmean(map(max, raw)), fmean(map(max, scaled))))
    return rows


def show_attention(trace: Trace, knobs: Namespace) -> None:
    """Show who looks at whom, one row worked out, and what √d is for."""
    x = embed(knobs.tokens, knobs.seed)
    wq, wk, wv, _ = build_heads(["same word"])
    q = linear(x, wq)
    k = linear(x, wk)
    v = linear(x, wv)
    weights = attention_weights(q, k)
    trace.say("Each token makes a query, a key and a value. A query is compared with the keys of "
              "the tokens that it may see, itself and those before it. The comparison gives "
              "weights, and the output is the average of the values by these weights. Each row "
              "below is a token that looks, each column a token it may look at. All this is one "
              "head; it was built to look for its own word." + knobs.cut)
    trace.lines(side_by_side([knobs.labels[:MAP_TOKENS], heat_map(weights)]))
    trace.note(SHADES_LEGEND)
    show_row(trace, q, k, v, knobs)
    dense = dense_attention(q, k, v)
    trace.check_close("attention() = softmax(QKᵀ/√d)V over the dense masked matrix",
                      attention(q, k, v), dense, 1e-12)
    trace.check_close("the weights in the picture, times the values, are the same",
                      linear(weights, list(zip(*v))), dense, 1e-12)
    half = len(x) // 2
    trace.check_close("attention() of the second half of the queries and all keys gets the same",
                      attention(q[half:], k, v), dense[half:], 1e-12)
    show_scaling(trace, random.Random(knobs.seed))


def show_row(trace: Trace, q: Matrix, k: Matrix, v: Matrix, knobs: Namespace) -> None:
    """Show one row of the picture worked out, from q·k to the output."""
    i = last_repeated(knobs.tokens[:MAP_TOKENS])
    rows = work_out_row(q, k, v, knobs.labels, i)
    trace.say(f"One row worked out: token {i}, {knobs.labels[i]!r}, with d = {CODE} channels. "
              "Every word has a code of +1 and -1, which is its key and its value (column v). The "
              f"query is the code of its own word times {SHARPNESS / math.sqrt(CODE)}, so that "
              f"q·k/√d of a perfect match is {SHARPNESS:.0f}. A word whose code differs in most "
              "channels scores below 0.")
    largest = sorted(rows, key=lambda row: -row.weight)[:3]
    trace.ask("how large is its largest weight? (They sum to 1.)", largest[0].weight)
    trace.table(rows, {"j": "d", "key as word": "", "product as q·k": "z.2f",
                       "score as q·k/√d": "z.2f", "weight": ".3f bar 16 of 1", "value as v": ""})
    terms = [f"{row.weight:.3f}·v[{row.j}]" for row in sorted(largest)]
    if len(rows) > 3:
        terms.append("…")
    channels = ", ".join(f"{y:z.2f}" for y in attention(q, k, v)[i][:8])
    trace.lines(["out = " + " + ".join(terms), f"    = ({channels}, …)"])


def show_scaling(trace: Trace, rng: random.Random) -> None:
    """Show what softmax makes of scores that are not divided by √d."""
    rows = compare_scales((4, 16, 64, 256), 32, rng)
    trace.say("Why divide by √d? 32 random queries meet 32 random keys. q·k is a sum of d terms, "
              "so it spreads like √d. The largest weight of a query, mean of 32, by softmax of q·k "
              "and of q·k/√d:")
    trace.table(rows, {"d": "d", "spread as spread of q·k": ".1f",
                       "raw as largest by q·k": ".2f", "scaled as by q·k/√d": ".2f"})
    trace.say("Undivided, one key gets nearly all the weight once d is large: at 256 the mean is "
              f"{rows[-1].raw:.2f}. Divided, d makes no such difference.")
    trace.check("divided by √d, the largest weight depends little on d; undivided, it grows",
                max(row.scaled for row in rows) < 2 * min(row.scaled for row in rows)
                and rows[-1].raw > 2 * max(row.scaled for row in rows),
                f"{rows[-1].scaled:.2f} and {rows[-1].raw:.2f} at d = {rows[-1].d}")


# 2. Multi-head attention (MHA)


def look_with_each_head(x: Matrix, wq: Matrix, wk: Matrix, n_heads: int) -> list[Matrix]:
    """Return each head's weights [n][n] for x [n][dim]."""
    heads = zip(split_heads(linear(x, wq), n_heads), split_heads(linear(x, wk), n_heads))
    return [attention_weights(q, k) for q, k in heads]


def show_multi_head(trace: Trace, knobs: Namespace) -> None:
    """Show four heads with four jobs on one text."""
    x = embed(knobs.tokens, knobs.seed)
    weights = build_heads(list(JOBS))
    maps = look_with_each_head(x, weights[0], weights[1], len(JOBS))
    trace.say("A layer has many heads, which look at the same tokens, each with queries, keys and "
              "values of its own. Their outputs are put side by side, and the matrix wo mixes "
              "them. A head that looks one back draws a line below the diagonal (the first token "
              "has only itself). One that looks everywhere fades downwards, because each row has "
              "more keys to share its weight among. (The embeddings of these heads hold each "
              "token's position. Section 5 shows how positions enter real models.)" + knobs.cut)
    last = min(len(x), MAP_TOKENS) - 1
    row = maps[1][last]
    trace.ask(f"the second head looks one back. Which token does token {last}, "
              f"{knobs.labels[last]!r}, look at most?", knobs.labels[row.index(max(row))])
    pictures = [[job, *heat_map(head)] for job, head in zip(JOBS, maps)]
    trace.lines(side_by_side([["", *knobs.labels[:MAP_TOKENS]], *pictures]))
    trace.note(SHADES_LEGEND)
    trace.check_close("all heads at once = each head alone and dense, through its columns of wo",
                      multi_head_attention(x, *weights, len(JOBS)),
                      dense_heads(x, *weights, len(JOBS), len(JOBS)), 1e-12)


# 3. Shared keys and values: MQA and GQA


class SharingRow(NamedTuple):
    """What attention with this number of KV heads keeps, and the work it does."""

    variant: str
    kv_heads: int
    kept: int             # numbers in the keys and values of one token
    multiplications: int  # in QKᵀ and weights·V, for the whole text
    error: float          # largest difference from heads attending one by one, densely


def compare_sharing(
    x: Matrix, n_heads: int, n_kv_heads: int, rng: random.Random
) -> list[SharingRow]:
    """Return a row for MHA, GQA and MQA with the same random queries; x [n][dim]."""
    dim = len(x[0])
    wq, wk, wv, wo = random_weights(rng, dim, dim)
    rows = []
    for variant, n_kv in (("MHA", n_heads), ("GQA", n_kv_heads), ("MQA", 1)):
        kept_rows = n_kv * dim // n_heads
        weights = (wq, wk[:kept_rows], wv[:kept_rows], wo)
        with counted_dots() as count:
            if variant == "MQA":
                out = multi_query_attention(x, *weights, n_heads)
            else:
                out = grouped_query_attention(x, *weights, n_heads, n_kv)
        projections = len(x) * sum(len(row) for w in weights for row in w)
        error = distance(out, dense_heads(x, *weights, n_heads, n_kv))
        rows.append(SharingRow(variant, n_kv, len(weights[1]) + len(weights[2]),
                               count.products - projections, error))
    return rows


def convert_to_gqa(x: Matrix, jobs: Sequence[str], n_kv_heads: int) -> float:
    """Return how far MHA with these jobs moves when it becomes GQA, |GQA - MHA| / |MHA|."""
    n_heads = len(jobs)
    wq, wk, wv, wo = build_heads(jobs)
    mha = multi_head_attention(x, wq, wk, wv, wo, n_heads)
    pooled = [mean_pool_kv_heads(w, n_heads, n_kv_heads) for w in (wk, wv)]
    gqa = grouped_query_attention(x, wq, *pooled, wo, n_heads, n_kv_heads)
    return distance(gqa, mha) / length_of(mha)


def show_grouped(trace: Trace, knobs: Namespace) -> None:
    """Show what each variant keeps and computes, and how a model is converted."""
    rng = random.Random(knobs.seed)
    x = random_matrix(rng, 12, knobs.dim)
    mha, gqa, mqa = rows = compare_sharing(x, knobs.n_heads, knobs.n_kv_heads, rng)
    trace.say("While a model writes, the KV cache holds a key and a value of every KV head for "
              "every token. If several query heads share a KV head, it is smaller. "
              f"{plural(knobs.n_heads, 'query head')}; counted: the numbers kept for one token, "
              f"and the multiplications in QKᵀ and weights·V for a text of {len(x)} tokens.")
    trace.ask(f"MHA keeps {mha.kept} numbers. How many does GQA keep, with {gqa.kv_heads} KV "
              "heads?", gqa.kept)
    trace.table(rows, {"variant": "", "kv_heads as KV heads": "d",
                       "kept as kept per token": "d bar 24", "multiplications": ",d"})
    trace.say(f"GQA keeps {gqa.kept} of MHA's {mha.kept} numbers, and MQA {mqa.kept}. The work on "
              "the cache is the same for all three: every query head still meets every key.")
    trace.check("all three = every head attending densely to the KV head of its group",
                max(row.error for row in rows) < 1e-12, "|Δ| < 1e-12")
    trace.check("sharing does not change the work on the cache: pairs × 2·head_dim × query heads",
                {row.multiplications for row in rows} == {len(x) * (len(x) + 1) * knobs.dim},
                f"{mha.multiplications:,} each; head_dim = {knobs.dim // knobs.n_heads}")
    x = embed(knobs.tokens, knobs.seed)
    alike = convert_to_gqa(x, ["same word", "same word", "one back", "one back"], 2)
    different = convert_to_gqa(x, list(JOBS), 2)
    trace.say("A trained MHA model becomes a GQA model by averaging the KV heads of each group. "
              "Where the heads of a group do the same, this changes nothing. 4 heads with 4 "
              f"different jobs, averaged to 2: the output vectors move by {different:.0%} of their "
              "length. The training afterwards has to make up for that.")
    trace.self_tests()
    trace.check("a head of ones and one of threes are averaged to twos, and identical heads do not "
                "move the output",
                mean_pool_kv_heads([[1.0], [3.0]], 2, 1) == [[2.0]] and alike < 1e-12,
                "relative error < 1e-12")


# 4. Sliding windows and attention sinks


Masks = dict[str, dict[str, int]]  # options of attention(), by a name


def masks_of(window: int, sinks: int) -> Masks:
    """Return three masks: causal, with a window, and with sinks as well."""
    return {"causal": {}, f"window {window}": {"window": window},
            f"with {plural(sinks, 'sink')}": {"window": window, "sinks": sinks}}


def compare_work(
    lengths: Sequence[int], d: int, masks: Masks, rng: random.Random
) -> list[dict[str, int]]:
    """Return for each length the multiplications of attention() under each mask, counted."""
    rows = []
    for n in lengths:
        x = random_matrix(rng, n, d)
        row = {"tokens": n}
        for name, mask in masks.items():
            with counted_dots() as count:
                attention(x, x, x, **mask)
            row[name] = count.products
        rows.append(row)
    return rows


def count_pairs(n_tokens: int, most: int) -> int:
    """Return the pairs of a query and a key it sees, if each sees up to `most`."""
    return sum(min(i + 1, most) for i in range(n_tokens))


class MovedRow(NamedTuple):
    """How far a head's output moves when a window hides keys: |windowed - full| / |values|."""

    head_looks_for: str
    full: float        # the output without a window, |full| / |values|
    window: float
    with_sinks: float  # the window, and the first tokens kept visible


def compare_windowed(x: Matrix, window: int, sinks: int, rng: random.Random) -> list[MovedRow]:
    """Return a row for each kind of head on x, all with the same random values.

    Only the value of token 0 is 0: a head that rests there says nothing.
    """
    values = [[0.0] * CODE] + random_matrix(rng, len(x) - 1, CODE)
    scale = length_of(values) or 1.0  # a text of one token has no other value than 0
    heads = [("same word", "same word", None), ("one back", "one back", None),
             ("everywhere", "everywhere", None),
             ("nothing: rests on token 0", "first token", None),
             ("nothing: learned sink", "everywhere", SHARPNESS)]
    rows = []
    for name, job, sink_logit in heads:
        wq, wk, _, _ = build_heads([job])
        q = linear(x, wq)
        k = linear(x, wk)
        full, cut, kept = [attention(q, k, values, sink_logit=sink_logit, **mask)
                           for mask in masks_of(window, sinks).values()]
        rows.append(MovedRow(name, length_of(full) / scale, distance(cut, full) / scale,
                             distance(kept, full) / scale))
    return rows


def spread_marker(windows: Sequence[int | None], n_tokens: int) -> list[list[bool]]:
    """Return for each layer of a stack which tokens have heard of token 0: [layer][token].

    A token hears of it if it sees one in the layer below that has. None: a layer without a window.
    """
    blank = [[0.0]] * n_tokens  # zeros as queries and keys: every visible key gets the same weight
    marker = [[1.0]] + [[0.0]] * (n_tokens - 1)
    layers = []
    for window in windows:
        marker = attention(blank, blank, marker, window=window)
        layers.append([mark > 0 for (mark,) in marker])
    return layers


def roll_cache(
    q: Matrix, k: Matrix, v: Matrix, window: int, sinks: int
) -> tuple[Matrix, list[dict]]:
    """Return each token's output from a RollingKVCache, and which positions it then holds."""
    cache = RollingKVCache(window, sinks)
    outputs = []
    rows = []
    for i in range(len(q)):
        slot = cache.append(k[i], v[i])
        outputs.append(cache.attend(q[i]))
        positions = [f"{cache.slots[s][0]:>3}" for s in sorted(cache.slots)]
        rows.append({"token": i, "goes to slot": slot,
                     "positions, slot by slot": " ".join(positions[:12])})
    return outputs, rows


def show_window(trace: Trace, knobs: Namespace) -> None:
    """Show the masks and the work, what a window hides, a stack's reach, the rolling cache."""
    rng = random.Random(knobs.seed)
    show_masks(trace, knobs, rng)
    show_hidden(trace, knobs, rng)
    show_reach(trace, knobs.window)
    show_rolling(trace, knobs, rng)


def show_masks(trace: Trace, knobs: Namespace, rng: random.Random) -> None:
    """Show who sees whom, and the work."""
    window = knobs.window
    masks = masks_of(window, knobs.sinks)
    windowed = list(masks)[1]
    trace.say("With a window, a token sees only the latest keys, itself included. Sinks are first "
              "tokens that stay visible all the same. Row: who looks; column: at whom; blank: "
              "hidden." + knobs.cut)
    trace.lines(draw_masks(masks, len(knobs.tokens)))
    trace.say("The work, in multiplications counted while attention runs. Without a window it "
              f"grows with the square of the text. A window of {window} lets a query meet "
              f"{plural(window, 'key')} at most, and the sinks.")
    work = compare_work((32, 64, 128), 4, masks, rng)
    trace.ask("twice the text is four times the work without a window. How many times is it with "
              f"a window of {window}, from 64 to 128 tokens?",
              work[2][windowed] / work[1][windowed])
    trace.table(work, {"tokens": "d", **dict.fromkeys(masks, ",d")})
    pairs = [count_pairs(128, most) for most in (128, window, window + knobs.sinks)]
    trace.check("multiplications = pairs of a query and a key it sees × 2·d, with d = 4",
                list(work[2].values()) == [128, *(8 * count for count in pairs)],
                ", ".join(f"{count:,}" for count in pairs) + " pairs")


def show_hidden(trace: Trace, knobs: Namespace, rng: random.Random) -> None:
    """Show how far the outputs of heads move when a window hides keys."""
    x = embed(knobs.tokens, knobs.seed)
    rows = compare_windowed(x, knobs.window, knobs.sinks, rng)
    trace.say("What a window costs depends on what a head looks for. The weights of a head must "
              "sum to 1. A head that finds nothing can still put out 0 if token 0 has the value 0, "
              "as here: it rests there. If a window hides that token, the weights fall on tokens "
              "that the head did not mean to read, and its output is not 0; if the token is kept "
              "as a sink, it is. A learned sink is one more term in the softmax's sum, which takes "
              "weight and has no value. It needs no token.")
    trace.say("Five heads, built by hand, run with all keys and with the window, on random values: "
              "how far apart are the two outputs, divided by the length of the values? 0 means "
              "that the window changed nothing.")
    trace.table(rows, {"head_looks_for": "", "window": ".2f bar 10 of 1",
                       f"with_sinks as with {plural(knobs.sinks, 'sink')}": ".2f bar 10 of 1"})
    trace.note("That trained models rest on the first token is a finding of Xiao et al. 2023. "
               "These heads only show what follows from it.")
    resting, learned = rows[3:]
    if knobs.sinks and knobs.window < len(x):
        trace.check("the output of the resting head is 0 unless its token is hidden",
                    resting.window > 0.1 and max(resting.full, resting.with_sinks) < 1e-6,
                    f"moved by {resting.window:.2f}; with sinks by {resting.with_sinks:.2f}")
    trace.check("the output of a head with a learned sink is 0 with and without a window",
                max(learned.full, learned.window) < 0.01, f"moved by {learned.window:.2f}")


def show_reach(trace: Trace, window: int) -> None:
    """Show how far layers with windows reach together, and how far a global one does."""
    width = 64
    local = spread_marker([window] * 4, width)
    mixed = spread_marker([window] * 3 + [None], width)
    trace.say(f"How far do layers see together? Token 0 of {width} starts with a marker. In each "
              f"layer, a token that sees a marked one gets the marker as well (█). All 4 layers "
              f"have the window {window}. The last row is the 4th layer again, but without one:")
    names = ["layer 1", "layer 2", "layer 3", "layer 4", "global "]
    for name, row in zip(names, [*local, mixed[3]]):
        trace.lines([f"{name}  " + "".join("█" if has else "·" for has in row)])
    reach = [sum(row) - 1 for row in local]
    trace.check("L local layers reach L·(w - 1) tokens back, a global one through the whole text",
                reach == [min(layer * (window - 1), width - 1) for layer in range(1, 5)]
                and all(mixed[3]), ", ".join(map(str, reach)))


def show_rolling(trace: Trace, knobs: Namespace, rng: random.Random) -> None:
    """Show a rolling cache, slot by slot."""
    window = knobs.window
    sinks = knobs.sinks
    q, k, v = (random_matrix(rng, len(knobs.tokens), 4) for _ in range(3))
    rolled, rows = roll_cache(q, k, v, window, sinks)
    trace.say(f"The cache that a window allows: {plural(sinks, 'slot')} for sinks and "
              f"{plural(window, 'slot')} for the window, with the position that each holds. Once "
              "it is full, each new position takes the slot of one that nobody can see any more.")
    trace.table(rows[-5:], {"token": "d", "goes to slot": "d", "positions, slot by slot": ""})
    dense = dense_attention(q, k, v, lambda i, j: j <= i and (j > i - window or j < sinks))
    trace.check_close("attention() with window and sinks = the dense masked matrix",
                      attention(q, k, v, window=window, sinks=sinks), dense, 1e-12)
    weights = attention_weights(q, k, window=window, sinks=sinks)
    trace.check_close("the weights with window and sinks, times the values, are the same",
                      linear(weights, list(zip(*v))), dense, 1e-12)
    trace.check_close("with the rolling cache = the dense masked matrix", rolled, dense, 1e-12)
    trace.check_close("with a learned sink = the dense matrix with one more term in its sums",
                      attention(q, k, v, sink_logit=1.5),
                      dense_attention(q, k, v, sink_logit=1.5), 1e-12)


def draw_masks(masks: Masks, n: int) -> list[str]:
    """Return pictures of who sees whom under each mask, side by side."""
    blank = [[0.0]] * n
    pictures = []
    for name, mask in masks.items():
        weights = attention_weights(blank, blank, **mask)
        seen = [[float(weight > 0) for weight in row] for row in weights]
        pictures.append([name, *heat_map(seen)])
    return side_by_side(pictures)


# 5. Positions: RoPE and ALiBi


def score_at(q: Vector, k: Vector, q_position: int, k_position: int) -> float:
    """Return q·k, both rotated to their positions."""
    return dot(rope([q], [q_position])[0], rope([k], [k_position])[0])


def rotate_by_hand(x: Vector, position: int) -> Vector:
    """Return what rope() should, with sines and cosines (Su et al. 2021, equation 34)."""
    out = []
    for m in range(len(x) // 2):
        angle = position / 10000 ** (2 * m / len(x))
        a, b = x[2 * m:2 * m + 2]
        out.append(a * math.cos(angle) - b * math.sin(angle))
        out.append(a * math.sin(angle) + b * math.cos(angle))
    return out


class StretchRow(NamedTuple):
    """A pair of channels before and after RoPE is stretched."""

    pair: int
    before: float   # tokens in a full turn, before
    turns: float    # full turns within the original context, before
    slowed: float   # how many times as many tokens a turn takes after the stretching


def compare_stretched(
    pairs: Sequence[int], head_dim: int, base: float, original_context: int
) -> list[StretchRow]:
    """Return what Llama 3.1's rule does to these pairs of channels."""
    thetas = [base ** (-2 * m / head_dim) for m in pairs]
    stretched = llama3_thetas(thetas, original_context=original_context)
    rows = []
    for m, old, new in zip(pairs, thetas, stretched):
        turns = original_context * old / (2 * math.pi)
        rows.append(StretchRow(m, 2 * math.pi / old, turns, old / new))
    return rows


def look_back(slopes: Vector, n_keys: int) -> Matrix:
    """Return the last token's weights for each slope, all scores equal but for ALiBi's bias."""
    blank = [[0.0]] * n_keys
    return [attention_weights(blank[:1], blank, bias=alibi_bias(1, n_keys, slope))[0]
            for slope in slopes]


def show_positions(trace: Trace, knobs: Namespace) -> None:
    """Show scores under a shift, stretched angles, and ALiBi's penalties."""
    d = 16
    q, k = random_matrix(random.Random(knobs.seed), 2, d)
    places = (0, 7, 100, 5000)
    distances = (0, 1, 2, 8, 32)
    scores = [[score_at(q, k, place + far, place) for far in distances] for place in places]
    trace.say("A score does not depend on where the two tokens stand; only the causal mask tells "
              "earlier from later. RoPE brings the positions in. It takes the channels of q and k "
              "two by two, as points in a plane, and turns each point by an angle in proportion to "
              "the position, some points fast and some slowly: fast ones tell near places apart, "
              "slow ones far places.")
    trace.ask(f"a query 8 tokens after a key at 0 scores {scores[0][3]:.4f}. What does it score 8 "
              f"tokens after the same key at {places[-1]}?", scores[-1][3])
    trace.say(f"Here are the scores of one random q and k of {d} channels at different places. "
              "Read down a column: where they stand does not matter, only how far apart. A key "
              "turns by its own position alone. So that is done once, and the key is cached that "
              "way.")
    columns = [f"{far} apart" for far in distances]
    rows = [{"key at": place, **dict(zip(columns, row))} for place, row in zip(places, scores)]
    trace.table(rows, {"key at": "d", **dict.fromkeys(columns, "z.4f")})
    trace.check_close("rope() turns q to these places as the paper's sines and cosines do",
                      rope([q] * len(places), places),
                      [rotate_by_hand(q, place) for place in places], 1e-9)
    trace.check_close("a score stays when both positions are shifted", scores[1:],
                      scores[:1] * (len(places) - 1), 1e-9)
    show_stretched(trace)
    show_alibi(trace)


def show_stretched(trace: Trace) -> None:
    """Show what Llama 3.1's rule does to the angles."""
    rows = compare_stretched((0, 16, 26, 29, 32, 35, 48, 63), 128, 500_000.0, 8192)
    trace.say("For texts longer than the 8,192 tokens that it first learned on, Llama 3.1 slows "
              "down some rotations (and it was trained further on long texts). Its rule, at its "
              "own sizes (128 channels, base 500,000), for some of the 64 pairs of channels. "
              "How fast they turn before, and how much they are slowed:")
    trace.table(rows, {"pair": "d", "before as tokens in a full turn": ",.1f",
                       "turns as turns in 8,192 tokens": ",.3f",
                       "slowed as slowed by": "{:.2f}×"})
    trace.say("Fast pairs, which tell neighbours apart, are left alone: those of more than four "
              "turns in 8,192 tokens. Pairs of less than one turn are slowed by 8. Those between "
              "are slowed the more, the fewer turns they make.")
    # Pair 32 by hand: θ = 1/√500,000, a turn takes 4,443 tokens, 8,192 tokens make 1.844 turns; so
    # .2813 of its angle is kept as it is, and .7187 of it is divided by 8: .3711 of it is left.
    # Pair 26 makes more than 4 turns and keeps its angle; pair 35 makes less than one.
    trace.check_close("pairs 26, 32 and 35 are slowed as worked out by hand, by 1, 2.695 and 8",
                      [[row.slowed for row in rows if row.pair in (26, 32, 35)]],
                      [[1.0, 1 / 0.3711, 8.0]], 1e-3)


def show_alibi(trace: Trace) -> None:
    """Show where heads look if all scores are equal but for ALiBi's penalty."""
    n_keys = 40
    slopes = alibi_slopes(8)
    weights = look_back(slopes, n_keys)
    trace.say("ALiBi takes slope × distance off each score. Suppose that all scores were equal "
              f"before, and the last of {n_keys} tokens looks back (oldest key on the left). The "
              "steeper the slope, the nearer it looks. The slopes of 8 heads:")
    for slope, row in zip(slopes, weights):
        picture = "".join(shade(weight / max(row)) for weight in row)
        trace.lines([f"slope {slope:.4f}  {picture}"])
    trace.note("darker: nearer to the row's largest weight")
    trace.check_close("each key's weight is e^slope times that of the key before it", weights,
                      [softmax([slope * j for j in range(n_keys)]) for slope in slopes], 1e-12)
    trace.self_tests()
    trace.check("the bias is -slope × distance, the queries at the last positions",
                alibi_bias(2, 4, 0.5) == [[-1.0, -0.5, 0.0, 0.5], [-1.5, -1.0, -0.5, 0.0]],
                "2 queries, 4 keys")
    published = [2.0 ** -h for h in range(1, 9)] + [2.0 ** -(h + 0.5) for h in range(4)]
    trace.check_close("12 heads have the published slopes of 8 heads, 1/2 to 1/256, and the first "
                      "four of every other slope of 16 heads", [alibi_slopes(12)], [published],
                      1e-12)


# 6. Multi-head latent attention (MLA)


class CacheRow(NamedTuple):
    """What one token leaves in the cache."""

    attention: str
    numbers: int


def compare_mla_caches(w: MLAWeights, n_kv_heads: int) -> list[CacheRow]:
    """Return what a token leaves for MHA, GQA and MQA with heads like w's, and for MLA."""
    n_heads = len(w.wq)
    kv_head = len(w.wk_up[0]) + len(w.wv_up[0])
    c, k_rope = mla_compress([[1.0] * len(w.w_down[0])], w)
    return [CacheRow(f"MHA, {plural(n_heads, 'KV head')}", n_heads * kv_head),
            CacheRow(f"GQA, {plural(n_kv_heads, 'KV head')}", n_kv_heads * kv_head),
            CacheRow("MQA, 1 KV head", kv_head),
            CacheRow("MLA", len(c[0]) + len(k_rope[0]))]


class FormRow(NamedTuple):
    """The work of both forms of MLA, in multiplications counted."""

    new_tokens: int
    cached_tokens: int  # the new ones included
    plain: int
    absorbed: int
    ratio: float        # plain / absorbed


def compare_forms(
    w: MLAWeights, cases: Sequence[tuple[int, int]], rng: random.Random
) -> list[FormRow]:
    """Return a row for each case (new tokens, all tokens), on random numbers."""
    rows = []
    for n_new, n_all in cases:
        x = random_matrix(rng, n_new, len(w.w_down[0]))
        c = random_matrix(rng, n_all, len(w.w_down))
        k_rope = random_matrix(rng, n_all, len(w.wk_rope))
        with counted_dots() as plain:
            mla_attention(x, c, k_rope, w)
        with counted_dots() as absorbed:
            mla_attention_absorbed(x, c, k_rope, w)
        rows.append(FormRow(n_new, n_all, plain.products, absorbed.products,
                            plain.products / absorbed.products))
    return rows


def attend_in_halves(form: Callable, x: Matrix, w: MLAWeights) -> Matrix:
    """Return MLA of x in a form, read in two halves, the second on the cache of both."""
    half = len(x) // 2
    c, k_rope = mla_compress(x[:half], w)
    first = form(x[:half], c, k_rope, w)
    new_c, new_k_rope = mla_compress(x[half:], w, start=half)
    return first + form(x[half:], c + new_c, k_rope + new_k_rope, w)


def show_mla(trace: Trace, knobs: Namespace) -> None:
    """Show what is cached, when each form does less work, and that both are right."""
    rng = random.Random(knobs.seed)
    w = random_mla_weights(rng, knobs.dim, knobs.n_heads, knobs.dim // knobs.n_heads)
    show_latent(trace, w, knobs.n_kv_heads)
    show_forms(trace, w, rng)
    x = random_matrix(rng, 12, knobs.dim)
    for name, form in (("plain", mla_attention), ("absorbed", mla_attention_absorbed)):
        trace.check_close(f"{name} form, in two halves with a cache = DeepSeek-V2's equations, "
                          "dense and without one", attend_in_halves(form, x, w), dense_mla(x, w),
                          1e-12)


def show_latent(trace: Trace, w: MLAWeights, n_kv_heads: int) -> None:
    """Show what one token takes in the cache."""
    rows = compare_mla_caches(w, n_kv_heads)
    kv_heads_worth = rows[3].numbers / rows[2].numbers
    trace.say("Instead of keys and values, cache a latent: a short vector from which every head's "
              f"keys and values are computed again. Here it has {len(w.w_down)} numbers (4 · "
              f"head_dim, as in DeepSeek-V2), and one rotated key of {len(w.wk_rope)} stands "
              "beside it. In the cache, one token takes:")
    trace.ask(f"a KV head takes {rows[2].numbers} numbers. How many KV heads' worth does MLA take?",
              kv_heads_worth)
    trace.table(rows, {"attention": "", "numbers": "d bar 40"})
    trace.say(f"MLA takes {kv_heads_worth:.2f} KV heads' worth, however many such heads there are. "
              "DeepSeek-V3 has 128 of them: MHA would keep 32,768 numbers, and MLA keeps 576. "
              "GQA with 2 KV heads keeps less than MLA, but all its query heads share those 2, "
              "where every head of MLA has keys and values of its own.")


def show_forms(trace: Trace, w: MLAWeights, rng: random.Random) -> None:
    """Show the work of the plain and of the absorbed form."""
    rows = compare_forms(w, ((1, 32), (1, 64), (8, 64), (64, 64)), rng)
    trace.say("Two ways to use that cache. The plain form multiplies all cached latents by the "
              "matrices that make keys and values. The absorbed form multiplies the query and the "
              "result by these matrices instead, and attends to the latents themselves. "
              "Multiplications, counted:")
    trace.table(rows, {"new_tokens": "d", "cached_tokens as all tokens": "d",
                       "plain": ",d", "absorbed": ",d", "ratio as plain / absorbed": ".2f"})
    trace.say("For one new token the absorbed form does less, for a whole prompt more. So decoding "
              "is done absorbed, and a prompt is read in the plain form.")
    trace.check("absorbed takes fewer multiplications for one new token, plain for a whole text",
                rows[1].ratio > 1 > rows[3].ratio, f"{rows[1].ratio:.2f} and {rows[3].ratio:.2f}")


# 7. The bill: cache and work of real models


class BillRow(NamedTuple):
    """What a real model's cache costs, in units for the table."""

    model: str
    attention: str
    kib: float     # one token's KiB while nothing has left a window
    at_4k: str     # GiB of one request, in parentheses beyond the model's context
    at_128k: str
    flops_per_byte: float  # work of a new token in QKᵀ and weights·V, for each byte of cache


def bill(models: Sequence[RealModel]) -> list[BillRow]:
    """Return a row per model, at 16 bits a number."""
    rows = []
    for model in models:
        sizes = []
        for n_tokens in (4096, 131072):
            gib = cache_bytes(model, n_tokens) / 2**30
            sizes.append(f"{gib:.2f} " if n_tokens <= model.context else f"({gib:.2f})")
        of_one = cache_bytes(model, 1)
        flops = 2 * decode_multiplications(model, 1)
        rows.append(BillRow(model.name, model.kind, of_one / 1024, *sizes, flops / of_one))
    return rows


def count_step(model: RealModel, n_tokens: int, rng: random.Random) -> tuple[int, int]:
    """Return the multiplications of the last of n_tokens, and the numbers in its cache, counted."""
    multiplications = 0
    numbers = 0
    for layer in range(model.n_layers):
        cache = RollingKVCache(model.window if layer < model.n_local_layers else n_tokens)
        for key in random_matrix(rng, n_tokens, model.head_dim):
            cache.append(key, key)
        with counted_dots() as count:
            cache.attend(key)
        multiplications += model.n_heads * count.products
        numbers += model.n_kv_heads * 2 * model.head_dim * len(cache.slots)
    return multiplications, numbers


def show_bill(trace: Trace, knobs: Namespace) -> None:
    """Show the cache of real models, and the work on it."""
    trace.say("The KV cache of one request after 4K and after 128K tokens, 16 bits a number, "
              "computed from published configurations. In parentheses: longer than the model was "
              "made for. \"5:1 local\" means that of six layers five have a window. KiB/token "
              "counts all layers, as long as no window has dropped the token. FLOPs/byte: the work "
              "of one new token in QKᵀ and weights·V (2 FLOPs a multiplication; MLA absorbed) for "
              "each byte of cache.")
    rows = bill(REAL_MODELS)
    trace.ask("Llama 3.1 70B has 80 layers, each with 8 KV heads of 128 channels. How many KiB "
              "does it keep for a token?", rows[5].kib)
    trace.table(rows, {"model": "", "attention": "", "kib as KiB/token": ",.1f",
                       "at_4k as GiB at 4K": "", "at_128k as GiB at 128K": "",
                       "flops_per_byte as FLOPs/byte": ",.0f"})
    h100 = H100_FLOPS / H100_BANDWIDTH
    trace.say("Sharing KV heads saves bytes and no work. Is that a good trade? An H100 can do "
              f"{h100:.0f} FLOPs while it reads a byte (by its data sheet). MHA does 1, and leaves "
              f"it waiting. {rows[-1].model} does the most, {rows[-1].flops_per_byte:.0f}, as all "
              "its query heads read the same latent.")
    multiplications, numbers = count_step(TINY_MODEL, 8, random.Random(knobs.seed))
    trace.check("the formulas give what is counted in a tiny model with 8 tokens and two layers, "
                "one with a window: multiplications of one token, and bytes of the cache",
                (multiplications, 2 * numbers)
                == (decode_multiplications(TINY_MODEL, 8), cache_bytes(TINY_MODEL, 8)),
                f"{multiplications} and {2 * numbers}")
    trace.check("DeepSeek-V3 takes (512 + 64) + 512 multiplications a token, head and layer",
                decode_multiplications(REAL_MODELS[-1], 1) == (512 + 64 + 512) * 128 * 61,
                "absorbed form")
    trace.check("DeepSeek-V3's bytes a token are the published ones",
                cache_bytes(REAL_MODELS[-1], 1) == PUBLISHED_DEEPSEEK_V3_BYTES,
                f"{PUBLISHED_DEEPSEEK_V3_BYTES:,}, Zhao et al. 2025, table 1")


# 8. Model parallelism: heads and layers on several cards


class RanksRow(NamedTuple):
    """What each rank holds, if there are so many."""

    ranks: int
    query_heads: int  # on each
    kv_heads: int     # on each
    cache: int        # numbers that one token leaves on each
    copies: float     # of every KV head, on all ranks together


def compare_ranks(weights: Sequence[Matrix], n_heads: int, n_kv_heads: int) -> list[RanksRow]:
    """Return a row for each possible number of ranks; weights: wq, wk, wv and wo of all heads."""
    rows = []
    for n_ranks in possible_ranks(n_heads, n_kv_heads):
        query_heads, kv_heads = heads_of_ranks(n_heads, n_kv_heads, n_ranks)[0]
        shard = shard_weights(*weights, n_heads, n_kv_heads, n_ranks)[0]
        rows.append(RanksRow(n_ranks, len(query_heads), len(kv_heads),
                             len(shard[1]) + len(shard[2]), n_ranks * len(kv_heads) / n_kv_heads))
    return rows


class PipelineRow(NamedTuple):
    """A pipeline run with the batch cut into so many micro-batches."""

    micro_batches: int
    ticks: int
    idle: float     # share of idle cells in the schedule, counted
    formula: float  # (p - 1) / (m + p - 1)


def run_one_by_one(
    stages: Sequence[Callable[[Matrix], Matrix]], batch: Sequence[Matrix]
) -> list[Matrix]:
    """Return what one machine makes of each micro-batch in turn."""
    outputs = []
    for x in batch:
        for stage in stages:
            x = stage(x)
        outputs.append(x)
    return outputs


def compare_micro_batches(p: int, counts: Sequence[int]) -> list[PipelineRow]:
    """Return a row for each number m of micro-batches in p stages, counted in the schedule."""
    rows = []
    for m in counts:
        _, schedule = run_pipeline([lambda x: x] * p, [[[0.0]]] * m)
        idle = sum(cell is None for tick in schedule for cell in tick)
        rows.append(PipelineRow(m, len(schedule), idle / (p * len(schedule)),
                                (p - 1) / (m + p - 1)))
    return rows


def show_parallel(trace: Trace, knobs: Namespace) -> None:
    """Show who holds what, what more ranks than KV heads cost, and a pipeline's bubble."""
    show_tensor_parallel(trace, knobs)
    show_pipeline(trace, knobs)


def show_tensor_parallel(trace: Trace, knobs: Namespace) -> None:
    """Show heads on several ranks."""
    n_heads = knobs.n_heads
    n_kv_heads = knobs.n_kv_heads
    rng = random.Random(knobs.seed)
    x = random_matrix(rng, 12, knobs.dim)
    weights = random_weights(rng, knobs.dim, n_kv_heads * knobs.dim // n_heads)
    trace.say("Tensor parallelism: each rank (one of the cards) holds the weights of some heads, "
              "and their keys and values. It returns a vector, and an all-reduce adds up the "
              f"vectors of all ranks. With {plural(n_heads, 'query head')} and "
              f"{plural(n_kv_heads, 'KV head')}, each rank holds, in numbers:")
    rows = compare_ranks(weights, n_heads, n_kv_heads)
    trace.ask(f"with {rows[-1].ranks} ranks, how many copies of each KV head are there?",
              rows[-1].copies)
    trace.table(rows, {"ranks": "d", "query_heads": "d", "kv_heads as KV heads": "d",
                       "cache as cache for a token": "d bar 16", "copies": "{:.0f}×"})
    trace.say("With more ranks each keeps less of the cache, until there are more ranks than KV "
              "heads. From there on the same KV head is kept on several.")
    parts = tensor_parallel_attention(x, *weights, n_heads, n_kv_heads, knobs.ranks)
    trace.check_close(f"the sum of the outputs of {plural(knobs.ranks, 'rank')} = all heads on one "
                      "machine, densely", add_matrices(parts),
                      dense_heads(x, *weights, n_heads, n_kv_heads), 1e-12)
    head_dim = knobs.dim // n_heads
    trace.check("however many ranks, each keeps at least one KV head, and no more than its share",
                (rows[0].ranks, rows[-1].ranks) == (1, n_heads)
                and all(row.cache == 2 * head_dim * max(1, n_kv_heads // row.ranks)
                        for row in rows),
                f"{plural(rows[-1].ranks, 'rank')}, {rows[-1].cache} numbers")


def show_pipeline(trace: Trace, knobs: Namespace) -> None:
    """Show layers on several stages."""
    p = knobs.stages
    m = knobs.micro_batches
    rng = random.Random(knobs.seed)
    stages = [partial(linear, w=random_matrix(rng, 4, 4)) for _ in range(p)]
    batch = [random_matrix(rng, 2, 4) for _ in range(m)]
    outputs, schedule = run_pipeline(stages, batch)
    trace.say(f"Pipeline parallelism: {plural(p, 'stage')}, a linear layer each, and a batch cut "
              f"into {plural(m, 'micro-batch', 'micro-batches')}. A row is a stage, a column a "
              "tick, a number the micro-batch that the stage works on, a dot an idle stage.")
    for stage in range(p):
        cells = ["·" if tick[stage] is None else str(tick[stage]) for tick in schedule]
        trace.lines([f"stage {stage}  " + " ".join(f"{cell:>2}" for cell in cells)])
    rows = compare_micro_batches(p, (1, 2, 4, 8, 16))
    trace.say("The idle cells are the bubble. Its share for p stages and m micro-batches:")
    trace.ask(f"with {plural(p, 'stage')} and 1 micro-batch, what share of the cells is idle?",
              rows[0].idle)
    trace.table(rows, {"micro_batches": "d", "ticks": "d", "idle as idle, counted": ".0%",
                       "formula as (p-1)/(m+p-1)": ".0%"})
    if p > 1:
        trace.say(f"With one micro-batch only one of the {p} cards works at a time: a pipeline "
                  "makes no single request faster; it shares out the memory. At most a fifth is "
                  f"idle from {4 * (p - 1)} micro-batches on. (In decoding, cutting up a batch "
                  "gains less: reading the weights takes most of the time, and each micro-batch "
                  "reads them all again.)")
    trace.check("the pipeline's outputs = one machine's, in order",
                outputs == run_one_by_one(stages, batch), "to the bit")
    trace.check("idle cells, counted = (p - 1) / (m + p - 1)",
                all(abs(row.idle - row.formula) < 1e-12 for row in rows),
                ", ".join(f"{row.idle:.0%}" for row in rows))


# =============================================================================================
# THE MODEL AND THE BENCH: heads built by hand, a dense reference, real models, pictures
# =============================================================================================

# Nothing is trained here. An embedding is four blocks of CODE channels:
#
#     word     a code of ±1 for the token
#     here     its position, told as the hands of clocks tell time: (cos, sin) of clocks that go
#              round in 2, 4, 6, … tokens
#     before   the position one earlier, told the same way
#     first    1 at position 0, and -1 elsewhere
#
# A head's query reads one block and its key another. Its score is SHARPNESS where the two agree.

CODE = 16  # channels of a block, and of a head that reads it
BLOCKS = ["word", "here", "before", "first"]
JOBS = {  # what a head looks for: (block that q reads, block that k reads, factor of q)
    "same word": ("word", "word", 1),
    "one back": ("before", "here", 1),
    "everywhere": ("word", "word", 0),
    "first token": ("first", "first", -1),  # a later token, -1, wants the one that is +1
}
SHARPNESS = 10.0  # the score of a key that is just what a head looks for


def embed(tokens: Sequence[str], seed: int) -> Matrix:
    """Return embeddings [n][4·CODE] of the tokens."""
    words = list(dict.fromkeys(tokens))
    codes = random.Random(seed).sample(range(2 ** CODE), len(words))  # no two words have the same
    rows = []
    for position, token in enumerate(tokens):
        code = codes[words.index(token)]
        word = [1.0 if code >> bit & 1 else -1.0 for bit in range(CODE)]
        first = [1.0 if position == 0 else -1.0] * CODE
        rows.append(word + clocks(position) + clocks(position - 1) + first)
    return rows


def clocks(position: int) -> Vector:
    """Return CODE channels that tell the position, their mean square 1."""
    hands = []
    for c in range(1, CODE // 2 + 1):
        angle = position * math.pi / c
        hands += [math.sqrt(2) * math.cos(angle), math.sqrt(2) * math.sin(angle)]
    return hands


def build_heads(jobs: Sequence[str]) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Return wq, wk, wv and wo with one head per job of JOBS, for the channels of embed().

    A head hands over the block that its key reads. wo adds the heads to the channels in turn.
    """
    gain = SHARPNESS / math.sqrt(CODE)
    wq, wk, wv = [], [], []
    for job in jobs:
        q_block, k_block, factor = JOBS[job]
        wq += read_block(q_block, gain * factor)
        wk += read_block(k_block, 1.0)
        wv += read_block(k_block, 1.0)
    dim = CODE * len(BLOCKS)
    wo = [[float(j % dim == i) for j in range(len(wq))] for i in range(dim)]
    return wq, wk, wv, wo


def read_block(block: str, gain: float) -> Matrix:
    """Return [CODE][4·CODE]: row r passes on channel r of that block, times gain."""
    rows = []
    for r in range(CODE):
        row = [0.0] * (CODE * len(BLOCKS))
        row[BLOCKS.index(block) * CODE + r] = gain
        rows.append(row)
    return rows


def random_mla_weights(
    rng: random.Random, dim: int, n_heads: int, head_dim: int
) -> MLAWeights:
    """Return random weights of DeepSeek's proportions: d_c = 4·head_dim, d_rope = head_dim / 2."""
    d_c = 4 * head_dim
    d_rope = 2 * ceil_div(head_dim, 4)  # even, as pairs of channels rotate

    def weight(rows: int, columns: int) -> Matrix:
        return random_matrix(rng, rows, columns, 1 / math.sqrt(columns))

    def heads(rows: int, columns: int) -> list[Matrix]:
        return [weight(rows, columns) for _ in range(n_heads)]

    return MLAWeights(
        w_down=weight(d_c, dim), wk_rope=weight(d_rope, dim), wq=heads(head_dim, dim),
        wq_rope=heads(d_rope, dim), wk_up=heads(head_dim, d_c), wv_up=heads(head_dim, d_c),
        wo=weight(dim, n_heads * head_dim))


@dataclass(frozen=True)
class RealModel:
    """A published configuration. n_kv_heads counts for the cache, n_heads for the work."""

    name: str
    kind: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    context: int               # tokens it was made for
    source: str
    window: int = 0            # tokens seen by the local layers
    n_local_layers: int = 0    # layers that have the window
    d_c: int = 0               # MLA's latent
    d_rope: int = 0            # MLA's rotated key

    @property
    def n_global_layers(self) -> int:
        """Layers that see the whole text."""
        return self.n_layers - self.n_local_layers


REAL_MODELS = [
    RealModel("GPT-3 175B", "MHA", 96, 96, 96, 128, 2048,
              "Brown et al. 2020, arXiv:2005.14165, table 2.1; every second layer was sparse, "
              "and is counted as dense"),
    RealModel("Llama 2 7B", "MHA", 32, 32, 32, 128, 4096,
              "Touvron et al. 2023, arXiv:2307.09288; config.json"),
    RealModel("Falcon 7B", "MQA", 32, 71, 1, 64, 2048,
              "Almazrouei et al. 2023, arXiv:2311.16867; config.json"),
    RealModel("Mistral 7B v0.1", "GQA, window", 32, 32, 8, 128, 8192,
              "Jiang et al. 2023, arXiv:2310.06825, table 1; v0.2 has no window",
              window=4096, n_local_layers=32),
    RealModel("Llama 3.1 8B", "GQA", 32, 32, 8, 128, 131072,
              "Llama team 2024, arXiv:2407.21783, table 3"),
    RealModel("Llama 3.1 70B", "GQA", 80, 64, 8, 128, 131072,
              "Llama team 2024, arXiv:2407.21783, table 3"),
    RealModel("Gemma 3 27B", "GQA, 5:1 local", 62, 32, 16, 128, 131072,
              "Gemma Team 2025, arXiv:2503.19786; config.json", window=1024, n_local_layers=52),
    RealModel("gpt-oss-120b", "GQA, 1:1 local", 36, 64, 8, 64, 131072,
              "OpenAI 2025, arXiv:2508.10925; config.json", window=128, n_local_layers=18),
    RealModel("DeepSeek-V3", "MLA", 61, 128, 128, 128, 131072,
              "DeepSeek-AI 2024, arXiv:2412.19437, section 4.2", d_c=512, d_rope=64),
]
TINY_MODEL = RealModel("tiny", "GQA, 1:1 local", 2, 3, 1, 6, 8, "small enough to count",
                       window=4, n_local_layers=1)
# Bytes per token, from Zhao et al., Insights into DeepSeek-V3, 2025, arXiv:2505.09343, table 1.
PUBLISHED_DEEPSEEK_V3_BYTES = 70_272
H100_FLOPS = 989.4e12     # per second in 16 bits, and
H100_BANDWIDTH = 3350e9   # bytes per second: H100 SXM, by NVIDIA's H100 architecture white paper


def dense_attention(
    q: Matrix,
    k: Matrix,
    v: Matrix,
    sees: Callable[[int, int], bool] = lambda i, j: j <= i,
    sink_logit: float = -math.inf,
) -> Matrix:
    """Return attention as in a textbook: all scores, no weight where hidden, all values.

    sees(i, j): does query i see key j? By default all up to its own. It shares no code with
    attention().
    """
    out = []
    for i, query in enumerate(q):
        exps = []
        for j, key in enumerate(k):
            score = math.fsum(a * b for a, b in zip(query, key)) / math.sqrt(len(query))
            exps.append(math.exp(score) if sees(i, j) else 0.0)
        total = math.fsum(exps) + math.exp(sink_logit)
        out.append([math.fsum(e * row[c] for e, row in zip(exps, v)) / total
                    for c in range(len(v[0]))])
    return out


def dense_heads(
    x: Matrix, wq: Matrix, wk: Matrix, wv: Matrix, wo: Matrix, n_heads: int, n_kv_heads: int
) -> Matrix:
    """Return causal grouped-query attention: each head densely, through its own columns of wo."""
    head_dim = len(wq) // n_heads
    parts = []
    for h in range(n_heads):
        g = h * n_kv_heads // n_heads
        mine = slice(h * head_dim, (h + 1) * head_dim)
        shared = slice(g * head_dim, (g + 1) * head_dim)
        head = dense_attention(linear(x, wq[mine]), linear(x, wk[shared]), linear(x, wv[shared]))
        parts.append(linear(head, [row[mine] for row in wo]))
    return add_matrices(parts)


def dense_mla(x: Matrix, w: MLAWeights) -> Matrix:
    """Return MLA of a whole text as the equations say, densely and without a cache."""
    latents = linear(x, w.w_down)
    heads = []
    for h in range(len(w.wq)):
        q = beside_rotated(linear(x, w.wq[h]), linear(x, w.wq_rope[h]))
        k = beside_rotated(linear(latents, w.wk_up[h]), linear(x, w.wk_rope))
        v = linear(latents, w.wv_up[h])
        heads.append(dense_attention(q, k, v))
    return linear(concat(*heads), w.wo)


def beside_rotated(plain: Matrix, turned: Matrix) -> Matrix:
    """Return the plain rows, each with its turned row beside it, rotated to its position."""
    return [row + rotate_by_hand(turned[position], position) for position, row in enumerate(plain)]


def check_attention_arguments(
    q: Matrix, k: Matrix, window: int | None, sinks: int, bias: Matrix | None
) -> None:
    """Raise ValueError, with what would do, where attention() cannot work."""
    if not k or not k[0]:
        raise ValueError("k must have at least one row of at least one channel")
    for row in [*q, *k]:
        if len(row) != len(k[0]):
            raise ValueError(f"q and k must have as many channels as each other, not {len(row)} "
                             f"and {len(k[0])}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself) or None, not {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, not {sinks}")
    if bias is not None and [len(row) for row in bias] != [len(k)] * len(q):
        raise ValueError(f"bias must have one row a query and one number a key: {len(q)} rows of "
                         f"{len(k)}")


def check_values(v: Matrix, n_k: int) -> None:
    """Raise ValueError if v does not have a row for each key, all of one length."""
    if len(v) != n_k or any(len(row) != len(v[0]) for row in v):
        raise ValueError(f"v must have a row for each of the {n_k} keys, all of one length; it has "
                         f"{len(v)} rows")


def add_matrices(matrices: Sequence[Matrix]) -> Matrix:
    """Return the sum, element by element."""
    return [[sum(values) for values in zip(*rows)] for rows in zip(*matrices)]


def random_matrix(rng: random.Random, rows: int, columns: int, spread: float = 1.0) -> Matrix:
    """Return normal numbers of mean 0 and standard deviation spread, [rows][columns]."""
    return [[rng.gauss(0, spread) for _ in range(columns)] for _ in range(rows)]


def random_weights(rng: random.Random, dim: int, kv_channels: int) -> list[Matrix]:
    """Return random wq, wk, wv and wo for x [n][dim]; wk and wv have kv_channels rows."""
    return [random_matrix(rng, rows, dim, 1 / math.sqrt(dim))
            for rows in (dim, kv_channels, kv_channels, dim)]


def length_of(m: Matrix) -> float:
    """Return |m|, the square root of the sum of all squares (the Frobenius norm)."""
    return math.sqrt(sum(dot(row, row) for row in m))


def distance(a: Matrix, b: Matrix) -> float:
    """Return |a - b|. ValueError if the shapes differ."""
    return length_of([[x - y for x, y in zip(p, r, strict=True)]
                      for p, r in zip(a, b, strict=True)])


@contextmanager
def counted_dots() -> Iterator[Namespace]:
    """While this is open, every dot product that anybody makes adds its length to .products."""
    global dot
    plain_dot = dot
    count = Namespace(products=0)

    def counting_dot(a: Sequence[float], b: Sequence[float]) -> float:
        count.products += len(a)
        return plain_dot(a, b)

    dot = counting_dot
    try:
        yield count
    finally:
        dot = plain_dot


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a count with its noun: 1 head, 2 heads."""
    return f"{count} {noun}" if count == 1 else f"{count} {nouns or noun + 's'}"


SHADES = " ·░▒▓█"
SHADES_LEGEND = ("blank: hidden   · under 2%   ░ 2 to 10%   ▒ 10 to 30%   ▓ 30 to 60%   "
                 "█ more")


def show_token(token: str) -> str:
    """Return a token as a label of at most 12 columns, blanks and controls made visible."""
    text = token[1:] if len(token) > 1 and token[0] == " " else token.replace(" ", "␣")
    text = printable(text)
    while display_width(text) > 12:
        text = text[:-2] + "…"
    return text


def shade(weight: float) -> str:
    """Return a weight between 0 and 1 as one character, darker for more."""
    return SHADES[sum(weight > step for step in (0, 0.02, 0.1, 0.3, 0.6))]


def heat_map(weights: Matrix) -> list[str]:
    """Return the first MAP_TOKENS rows and columns as shaded cells."""
    return ["".join(shade(weight) for weight in row[:MAP_TOKENS]) for row in weights[:MAP_TOKENS]]


def side_by_side(blocks: Sequence[list[str]]) -> list[str]:
    """Return pictures of the same height next to each other."""
    padded = []
    for block in blocks:
        width = max(map(display_width, block))
        padded.append([line + " " * (width - display_width(line)) for line in block])
    return ["   ".join(lines) for lines in zip(*padded)]


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


SECTIONS = [
    Section("Scaled dot-product attention", show_attention,
            [attention, attention_weights, visible_keys]),
    Section("Multi-head attention (MHA)", show_multi_head,
            [multi_head_attention, split_heads, build_heads]),
    Section("Shared keys and values: MQA and GQA", show_grouped,
            [grouped_query_attention, multi_query_attention, mean_pool_kv_heads]),
    Section("Sliding windows and attention sinks", show_window,
            [visible_keys, visible_weights, RollingKVCache]),
    Section("Positions: RoPE and ALiBi", show_positions,
            [rope, llama3_thetas, alibi_slopes, alibi_bias]),
    Section("Multi-head latent attention (MLA)", show_mla,
            [mla_compress, mla_attention, mla_attention_absorbed], core=False),
    Section("The bill: cache and work of real models", show_bill,
            [kv_bytes_per_token, cache_bytes, decode_multiplications], core=False),
    Section("Model parallelism: heads and layers on several cards", show_parallel,
            [tensor_parallel_attention, heads_of_ranks, run_pipeline], core=False),
]


def make_parser() -> OneLineParser:
    """Return the parser of this script's options."""
    parser = common_parser("microattention",
                           "Attention and its variants, side by side on one sentence.",
                           len(SECTIONS))
    parser.add_argument("--text", default=SENTENCE,
                        help=f"the sentence to look at (default: {SENTENCE!r})")
    options = [  # name, least, most, default, meaning
        ("--dim", 8, 128, DIM, "channels of a token where weights are random"),
        ("--n-heads", 1, 64, N_HEADS, "query heads; divides dim"),
        ("--n-kv-heads", 1, 64, None,
         "KV heads; divides n-heads (default: half of them, or the most below)"),
        ("--window", 1, 9999, WINDOW, "keys a query sees in section 4, itself included"),
        ("--sinks", 0, 9999, SINKS, "first tokens that stay visible there"),
        ("--ranks", 1, 64, None,
         "cards that share the heads in section 8 (default: 2 if possible)"),
        ("--stages", 1, 8, STAGES, "cards that share the layers in section 8"),
        ("--micro-batches", 1, 16, MICRO_BATCHES, "pieces of the batch in that pipeline"),
    ]
    for name, least, most, default, meaning in options:
        if default is not None:
            meaning += f" (default {default})"
        parser.add_argument(name, metavar="N", type=whole_number(least, most), default=default,
                            help=meaning)
    return parser


def check_heads(parser: OneLineParser, knobs: Namespace) -> None:
    """Fill in the numbers of KV heads and ranks, and refuse what does not divide."""
    n_heads = knobs.n_heads
    if knobs.dim % n_heads:
        parser.error(f"argument --n-heads: {n_heads} does not divide --dim, {knobs.dim}; --dim "
                     f"{n_heads * ceil_div(knobs.dim, n_heads)} would do")
    divisors = [d for d in range(1, n_heads + 1) if n_heads % d == 0]
    if knobs.n_kv_heads is None:
        knobs.n_kv_heads = divisors[-2] if n_heads > 1 else 1
    if n_heads % knobs.n_kv_heads:
        parser.error(f"argument --n-kv-heads: {knobs.n_kv_heads} does not divide --n-heads, "
                     f"{n_heads}; these do: {', '.join(map(str, divisors))}")
    ranks = possible_ranks(n_heads, knobs.n_kv_heads)
    if knobs.ranks is None:
        knobs.ranks = ranks[1] if n_heads > 1 else 1
    if knobs.ranks not in ranks:
        parser.error(f"argument --ranks: {knobs.ranks} ranks cannot share {n_heads} query heads "
                     f"and {knobs.n_kv_heads} KV heads evenly; these can: "
                     f"{', '.join(map(str, ranks))}")


def read_text(parser: OneLineParser, knobs: Namespace) -> None:
    """Cut the text into tokens, and refuse one that is empty or too long."""
    if not knobs.text.strip():
        parser.error("argument --text: there must be something in it")
    new_characters = set(knobs.text) - set(TEXT)
    tokenizer = Tokenizer.train(TEXT + knobs.text, VOCAB_SIZE + len(new_characters))
    knobs.tokens = [tokenizer.vocab[i] for i in tokenizer.encode(knobs.text)]
    knobs.labels = [show_token(token) for token in knobs.tokens]
    if len(knobs.tokens) > MAX_TOKENS:
        parser.error(f"argument --text: {len(knobs.tokens)} tokens are more than this trace "
                     f"shows, {MAX_TOKENS}")
    knobs.cut = ""
    if len(knobs.tokens) > MAP_TOKENS:
        knobs.cut = f" (The first {MAP_TOKENS} of {len(knobs.tokens)} tokens.)"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace and return the exit status."""
    parser = make_parser()
    knobs = parser.parse_args(argv)
    check_heads(parser, knobs)
    read_text(parser, knobs)
    return run_sections(SECTIONS, knobs,
                        "python3 microattention.py --section 4 --window 2 --sinks 4")


if __name__ == "__main__":
    sys.exit(main())
