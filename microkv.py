#!/usr/bin/env python3
"""The KV cache: why generation waits for memory, and how serving engines live with it.

A language model generates one token at a time, and every token looks back at all before it.
Keeping the keys and values of all tokens, the KV cache, saves nearly all of the work. Then the
cache itself becomes the problem: it grows with every token, it is read for every token, and its
size decides how many people one card can serve.

Run it (`python3 microkv.py`): it trains a tiny Llama in seconds and serves it as vLLM serves a
large one. It pages the cache, shares blocks, batches continuously, cuts up long prompts, and
survives running out of memory. Every request must get the very tokens that it gets alone.

Not everything is run through the model. Figures of real models, and all milliseconds, are computed
from data sheets by a stated cost model (step_seconds). Where only a schedule is asked for, as in
most tables of sections 7 to 11, the scheduler runs for real and a stand-in takes the place of the
model.

How to read it
  1. Read the words below (2 minutes), run `python3 microkv.py` and read what it prints
     (15 minutes). A line that begins with "ok" is a claim that was checked, and its brackets
     say on what.
  2. Read THE TECHNIQUES, in order: sections 1 to 7 are the core of the chapter (45 minutes).
     Sections 8 to 12 can wait (15 minutes).
  3. THE EXPERIMENTS show how each number of the trace was made. What the trace says of 20 sets of
     requests, or 20 models, was measured at the default settings, with the seeds 0 to 19. THE
     MODEL AND THE BENCH has the Llama, its training and what the experiments share. SHARED BY THE
     FIVE, which all five scripts of this collection have, reads text, prints, and parses the
     command line.

The papers
  Williams et al., Roofline: An Insightful Visual Performance Model, CACM 2009     section 2
  Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention (vLLM), 2023, arXiv:2309.06180                                  section 3
  Zheng et al., SGLang: Efficient Execution of Structured Language Model
    Programs, 2023, arXiv:2312.07104                                               section 5
  Yu et al., Orca: A Distributed Serving System for Transformer-Based
    Generative Models, OSDI 2022                                                   section 6
  Agrawal et al., Taming Throughput-Latency Tradeoff in LLM Inference with
    Sarathi-Serve, 2024, arXiv:2403.02310                                          section 7
  Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase
    Splitting, 2023, arXiv:2311.18677                                              section 10
  Zhong et al., DistServe: Disaggregating Prefill and Decoding for
    Goodput-optimized LLM Serving, 2024, arXiv:2401.09670                          sections 10, 11
  Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache,
    2024, arXiv:2402.02750                                                         section 12
"""

# The words. What is not explained here is explained in the section that uses it.
#
#   token        a word, or a piece of one (here a word); a model works with their numbers
#   logits       the model's score for every token that could come next
#   greedy       the next token is always the one with the largest logit (argmax)
#   key, value   two vectors that attention keeps for each token, in every layer: a later token
#                compares its query with the key, and gathers the value if query and key are alike
#   write        storing a token's keys and values in the cache
#   KV head      one set of keys and values. Each query head may have its own (MHA), several may
#                share one (GQA), or all may (MQA)
#   prefill      running the prompt through the model, all of its tokens at once
#   decode       the steps after that; each runs one token and yields the next
#   step         one pass through the model, for one request or for several (a batch)
#   FLOP         an addition or a multiplication
#   card         a GPU; HBM is its memory, where weights and caches lie, and the host is the
#                computer that the card is plugged into
#   first token  the time from a request's arrival to its first new token (TTFT)
#   gap          the time from one new token of a request to the next (ITL, or TPOT)
#   ceil_div(a, b)              a / b, rounded up
#   PRICED_MODEL, PRICED_GPU    the model and the card of the cost model: Llama 3.1 8B, an A100
#
# Llama.forward(tokens, cache) runs tokens that come after those in the cache, and returns a row of
# logits for each. In every layer one line of it uses the cache:
#
#     k, v = cache.update(layer, k, v)
#
# This stores the keys and values of the new tokens and returns those of all tokens so far.

from __future__ import annotations

import cmath
import functools
import hashlib
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
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from statistics import fmean, pstdev
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]
Weights = dict[str, Matrix | Vector]  # of a Llama, under Meta's names

PROMPT = "This is the"
MAX_NEW_TOKENS = 24          # tokens to generate in sections 1 and 3
BLOCK_SIZE = 4               # tokens a block holds (vLLM: 16)
MAX_NUM_SEQS = 4             # requests that may run at the same time
MAX_NUM_BATCHED_TOKENS = 38  # budget of a step where prompts are cut up: the free tokens
VOCAB_SIZE = 160             # every word of TEXT is then one token
SIZES = dict(dim=24, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=24)
TRAINING = dict(steps=50, length=24, learning_rate=0.03)  # length: tokens per step


# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Generation without a cache, and with one
#
# To predict the next token, the model needs the keys and values of all tokens before it. Without a
# cache it computes them all again at every step. But the key and value of a token depend on nothing
# that comes later, so they never change. Keep them, and a step runs only the newest token.
#
# For a prompt of p tokens and n new tokens, the model runs
#
#     without a cache:   p + (p + 1) + … + (p + n - 1)   tokens
#     with a cache:      p + 1 + 1 + … + 1  =  p + n - 1  tokens
#
# For p = 3 and n = 4 these are 3 + 4 + 5 + 6 = 18 and 3 + 1 + 1 + 1 = 6. The results are the same.
#
# In production: DynamicCache in transformers (src/transformers/cache_utils.py) is this list that
# grows. Engines page it instead (section 3).
#
# Measured by show_cache().


class KVCache:
    """The keys and values of all tokens so far: two lists for each layer, a row for each token."""

    def __init__(self, config: Config):
        self.config = config
        self.keys: list[Matrix] = [[] for _ in range(config.n_layers)]
        self.values: list[Matrix] = [[] for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return len(self.keys[-1])  # the last layer is written last

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Add k and v of the new tokens in one layer, and return those of all tokens.

        k and v: [new tokens][n_kv_heads·head_dim].
        """
        self.keys[layer] += k
        self.values[layer] += v
        return self.keys[layer], self.values[layer]


def generate(model: Llama, prompt: Sequence[int], max_new_tokens: int, cache=None) -> list[int]:
    """Return max_new_tokens new tokens, each the likeliest next one (greedy).

    With a cache, the first step runs what the cache lacks of the prompt (prefill), and each later
    step runs a single token (decode). ValueError where check_prompt() says so: no prompt, or fewer
    than 0 new tokens.
    """
    check_prompt(prompt, max_new_tokens, cache)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        n_known = cache.length if cache is not None else 0
        logits = model.forward(tokens[n_known:], cache)
        tokens.append(argmax(logits[-1]))
    return tokens[len(prompt):]


def argmax(logits: Vector) -> int:
    """Return the first index of the largest."""
    return logits.index(max(logits))


def check_prompt(prompt: Sequence[int], max_new_tokens: int, cache=None) -> None:
    """Raise ValueError if generate() could not work with these."""
    if not prompt or max_new_tokens < 0:
        raise ValueError(f"prompt must have a token and max_new_tokens be at least 0, not "
                         f"{len(prompt)} tokens and {max_new_tokens}")
    if cache is not None and cache.length >= len(prompt):
        raise ValueError(f"cache must hold less than the prompt, whose last token is run for its "
                         f"logits; it holds {cache.length} of {len(prompt)} tokens")


# 2. Prefill and decode have different limits
#
# A step reads from the card's memory every weight that it uses, and the cached keys and values of
# its requests, each of them once, whether it runs one token or a thousand. A step has two times:
#
#     arithmetic = 2 · weights · tokens / FLOPs per second         a multiplication and an addition
#     reading    = (bytes of weights + bytes of caches) / bytes per second
#
# Both go on at once, so the step takes the longer of the two. The ridge of a card is the number of
# FLOPs that the card can do in the time in which it reads one byte (Williams et al. 2009):
#
#     ridge = FLOPs per second / bytes per second                  A100: 312e12 / 2039e9 = 153
#
# A weight of 2 bytes needs 2 FLOPs for each token. So a step of 1 token makes 1 FLOP per byte, and
# a step of 153 tokens makes 153. Below the ridge a step waits for memory, and more tokens in the
# step cost no time. How many tokens are free depends on the bytes per weight:
#
#     free tokens = ridge · bytes per weight / 2               16 bits: 153, 4 bits: 38
#
# So a prefill of a few hundred tokens is bound by arithmetic, and a decode step, one token per
# request, is bound by memory. Requests should share decode steps, as they then share one reading of
# the weights. They do not share their caches:
#
#     bytes per token = 2 · n_layers · n_kv_heads · head_dim · bytes per value      (key and value)
#
# One more request in a decode step, with c tokens cached, adds to both times:
#
#     more arithmetic = 2 · weights / FLOPs per second
#     more reading    = c · bytes per token / bytes per second
#
# The two times are equal for a batch of b requests when
#
#     b · more arithmetic = bytes of weights / bytes per second + b · more reading
#     b = (bytes of weights / bytes per second) / (more arithmetic - more reading)
#
# They are never equal if a request adds more reading than arithmetic. Even where they can be equal,
# memory may be full before the batch is that large. The next sections are about that memory.
#
# A step reads all weights but the embedding table, where it only looks up a few rows. But the table
# takes up memory like the rest. The cost model leaves out activations, attention's own arithmetic,
# and the fixed overhead of every step.
#
# In production: vLLM may use 0.92 of the card's memory (gpu_memory_utilization). It measures at its
# start what weights and activations take. What is left of the 0.92 becomes cache blocks:
# determine_available_memory in vllm/v1/worker/gpu_worker.py.
#
# Measured by show_intensity().


class Gpu(NamedTuple):
    """A card by its data sheet. flops: in dense matrix products of 16 bits."""

    name: str
    flops: float            # per second
    hbm_bytes_per_s: float
    hbm_bytes: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte: what the card can do in the time in which it reads a byte."""
        return self.flops / self.hbm_bytes_per_s


class ServedModel(NamedTuple):
    """The sizes of a published model that decide the cost. Bytes per weight are given apart."""

    name: str
    parameters: float  # with the embedding table
    vocab_size: int
    dim: int
    n_layers: int
    n_kv_heads: int
    head_dim: int

    @property
    def used_weights(self) -> float:
        """Weights that a step reads and multiplies by: all but the embedding table."""
        return self.parameters - self.vocab_size * self.dim

    @property
    def kv_bytes(self) -> float:
        """Bytes of cache for one token."""
        return kv_bytes_per_token(self.n_layers, self.n_kv_heads, self.head_dim)


def kv_bytes_per_token(
    n_layers: int, n_kv_heads: int, head_dim: int, bytes_per_value: float = 2
) -> float:
    """Return the bytes that one token adds to the KV cache of MHA, GQA or MQA."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


class StepTime(NamedTuple):
    """The two times of a step, in seconds."""

    arithmetic: float
    reading: float

    @property
    def seconds(self) -> float:
        """The time that the step takes: the longer one."""
        return max(self.arithmetic, self.reading)


def step_seconds(
    gpu: Gpu, model: ServedModel, new_tokens: float, cached_tokens: float, weight_bytes: float = 2
) -> StepTime:
    """Return the times of a step that runs new_tokens and reads cached_tokens, of all its requests.

    weight_bytes: bytes per weight, 0.5 for 4 bits.
    """
    flops = 2 * model.used_weights * new_tokens
    bytes_read = model.used_weights * weight_bytes + cached_tokens * model.kv_bytes
    return StepTime(flops / gpu.flops, bytes_read / gpu.hbm_bytes_per_s)


def batch_at_ridge(gpu: Gpu, model: ServedModel, cached_tokens: float) -> int | None:
    """Return the smallest decode batch for which arithmetic takes longer than reading, or None.

    cached_tokens: per request.
    """
    reading_weights = step_seconds(gpu, model, 0, 0).reading
    one_request = step_seconds(gpu, model, 1, cached_tokens)
    more_arithmetic = one_request.arithmetic
    more_reading = one_request.reading - reading_weights
    if more_arithmetic <= more_reading:
        return None
    return math.ceil(reading_weights / (more_arithmetic - more_reading))


def requests_that_fit(
    gpu: Gpu, model: ServedModel, tokens_each: int, memory_share: float = 0.92
) -> int:
    """Return how many requests of tokens_each tokens fit beside the weights."""
    left = gpu.hbm_bytes * memory_share - 2 * model.parameters
    return max(0, math.floor(left / (tokens_each * model.kv_bytes)))


# 3. Paged attention
#
# An engine does not know how long an answer will get. If it reserves the longest that is allowed,
# in one piece, most of that memory stays empty. PagedAttention (Kwon et al. 2023) does what
# operating systems do. The memory is a pool of blocks, each with slots for block_size tokens. A
# request takes blocks one at a time, as its text grows, from anywhere in the pool. Its block table
# lists its blocks in the order of the text, and tells where a token is:
#
#     slot = block_table[position // block_size] · block_size + position % block_size
#
# An example: blocks of 4, and a request with the block table 7 2 5. Its token 6 is in the second
# block of the text (6 // 4 = 1), that is block 2 of the pool, at offset 6 % 4 = 2. So its slot is
# 2 · 4 + 2 = 10.
#
#     pool     … | block 2: tokens 4 5 6 7 | … | block 5: 8 9 _ _ | … | block 7: 0 1 2 3 | …
#
# Only the last block of a request can have empty slots, so at most block_size - 1 are wasted.
#
# In production: vllm/v1/core/block_pool.py (BlockPool) and kv_cache_manager.py keep the blocks. The
# attention kernels walk the table on the GPU, as update() does here, but without gathering a copy.
#
# Measured by show_paging().


class BlockPool:
    """num_blocks blocks of block_size slots; a slot holds one token's keys and values, all layers.

    A block is free when no block table lists it (its ref_count is 0). Blocks that were freed first
    are handed out first. Until then they keep their content, which section 5 finds by its hash.
    ValueError if one of the numbers is below 1.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, not {num_blocks} and "
                             f"{block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_count = [0] * num_blocks
        # In the order of handing out. An OrderedDict, as share() takes blocks out of its middle.
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))
        # slots[slot][layer] = (key, value)
        self.slots: list[dict] = [{} for _ in range(num_blocks * block_size)]
        self.block_of: dict[str, int] = {}  # hash -> the block that has this content (section 5)
        self.hash_of: dict[int, str] = {}   # and back

    @property
    def num_free_blocks(self) -> int:
        """Blocks that allocate() can hand out."""
        return len(self.free_blocks)

    def allocate(self) -> int:
        """Return a free block, which now has one reference and no hash.

        ValueError if none is free.
        """
        if not self.free_blocks:
            raise ValueError(f"all {self.num_blocks} blocks are in use; free some, or make "
                             f"num_blocks larger")
        block, _ = self.free_blocks.popitem(last=False)
        if block in self.hash_of:  # its content will be overwritten: nobody may find it any more
            old_hash = self.hash_of.pop(block)
            del self.block_of[old_hash]
        self.ref_count[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block. If it was free, it leaves the free list."""
        self.free_blocks.pop(block, None)
        self.ref_count[block] += 1

    def free(self, block: int) -> None:
        """Take a reference off a block. A block without any goes to the end of the queue.

        ValueError if it was free already.
        """
        if self.ref_count[block] < 1:
            raise ValueError(f"block {block} is free already")
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.free_blocks[block] = None


class PagedKVCache:
    """The cache of one request: a block table into a pool. Llama.forward uses it like a KVCache."""

    def __init__(self, pool: BlockPool, config: Config):
        self.pool = pool
        self.config = config
        self.length = 0                   # tokens in the cache
        self.block_table: list[int] = []  # its blocks, in the order of the text
        self.hashes: list[str] = []       # of its full blocks (section 5)

    def slot(self, position: int) -> int:
        """Return the slot in the pool of the token at this position of the text."""
        block, offset = divmod(position, self.pool.block_size)
        return self.block_table[block] * self.pool.block_size + offset

    def blocks_needed(self, n_new: int) -> int:
        """Return how many blocks reserve(n_new) would take from the pool."""
        total = ceil_div(self.length + n_new, self.pool.block_size)
        more = max(0, total - len(self.block_table))
        if n_new > 0 and self.writes_to_shared_block():
            more += 1  # for the copy
        return more

    def writes_to_shared_block(self) -> bool:
        """Return whether the next token's slot is in a block that others refer to as well."""
        block = self.length // self.pool.block_size
        if block >= len(self.block_table):
            return False
        return self.pool.ref_count[self.block_table[block]] > 1

    def fits(self, n_new: int) -> bool:
        """Return whether the pool has enough free blocks for n_new more tokens."""
        return self.blocks_needed(n_new) <= self.pool.num_free_blocks

    def reserve(self, n_new: int) -> None:
        """Make room for n_new tokens.

        ValueError, and nothing is changed, if the pool has too few free blocks.
        """
        if not self.fits(n_new):
            raise ValueError(f"{n_new} tokens need {self.blocks_needed(n_new)} more blocks, and "
                             f"{self.pool.num_free_blocks} are free; make num_blocks larger")
        if n_new > 0 and self.writes_to_shared_block():
            copy_last_block(self)  # section 4
        while len(self.block_table) * self.pool.block_size < self.length + n_new:
            self.block_table.append(self.pool.allocate())

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Write k and v of the new tokens into their slots; return those of all tokens, in order.

        Reserves what is missing. length grows at the last layer only, so that all layers of a step
        write into the same slots.
        """
        self.reserve(len(k))  # the call for the first layer reserves for all layers
        size = self.pool.block_size
        for i in range(len(k)):
            self.pool.slots[self.slot(self.length + i)][layer] = (k[i], v[i])
        # Walk the table and gather what its blocks hold.
        slots = []
        for block in self.block_table:
            slots += self.pool.slots[block * size:(block + 1) * size]
        filled = slots[:self.length + len(k)]
        keys = [slot[layer][0] for slot in filled]
        values = [slot[layer][1] for slot in filled]
        if layer == self.config.n_layers - 1:
            self.length += len(k)
        return keys, values

    def free(self) -> None:
        """Give all blocks back, the last one first.

        Blocks freed first are reused first, so the end of a text is lost before its beginning.
        """
        for block in reversed(self.block_table):
            self.pool.free(block)
        self.block_table = []
        self.hashes = []
        self.length = 0


# 4. Sharing: reference counts and copy on write
#
# Several answers to one prompt need its keys and values only once. fork() copies the block table
# and not the blocks, and every block counts the tables that list it. A full block is never written
# again, so it can be shared for good. The last block may be half full, and then two answers would
# write different tokens into the same slot. So an answer that has to write into a block with more
# than one reference takes a copy of the block first, and writes into the copy (copy on write).
# Blocks of 4, a prompt of 6 tokens:
#
#     after the prompt   A: 0 1          B: 0 1          references to 0 and 1:      2 2
#     A writes token 6   A: 0 2 (copy)   B: 0 1          references to 0, 1 and 2:   2 1 1
#     B writes token 6   A: 0 2          B: 0 1          B is alone in block 1: no copy
#
# In production: today's vLLM runs n answers as n requests (vllm/v1/engine/parallel_sampling.py)
# that find the prompt's full blocks by prefix caching (section 5), and computes the half-full block
# again for each answer. Copy on write was in vLLM's first engine, and in the paper.
#
# BlockPool.share and free, above, count the references. PagedKVCache.reserve makes the copy.
#
# Measured by show_sharing().


def fork(cache: PagedKVCache) -> PagedKVCache:
    """Return a second cache with the same content in the same blocks. Nothing is copied."""
    twin = PagedKVCache(cache.pool, cache.config)
    twin.length = cache.length
    # Leave out blocks that reserve() has taken, but that hold no token yet.
    n_blocks = ceil_div(cache.length, cache.pool.block_size)
    twin.block_table = cache.block_table[:n_blocks]
    twin.hashes = list(cache.hashes)
    for block in twin.block_table:
        cache.pool.share(block)
    return twin


def copy_last_block(cache: PagedKVCache) -> None:
    """Give this cache its own copy of the block that it writes next."""
    pool = cache.pool
    last, filled = divmod(cache.length, pool.block_size)
    shared = cache.block_table[last]
    own = pool.allocate()
    for i in range(filled):
        copied = pool.slots[shared * pool.block_size + i]
        pool.slots[own * pool.block_size + i] = dict(copied)
    cache.block_table[last] = own
    pool.free(shared)


# 5. Prefix caching
#
# Requests often begin alike: with the same system prompt, or with the conversation so far. The keys
# and values in a full block depend on its tokens and on all tokens before them. So give the block a
# hash that is made from both. The hash of the block before stands for all tokens before:
#
#     hash(block i) = SHA-256(hash(block i - 1), tokens of block i)
#
# With blocks of 2, the texts "a b c d" and "a b c e" have these hashes:
#
#     a b c d:   H1 = hash("", a b)   H2 = hash(H1, c d)
#     a b c e:   H1 = hash("", a b)   H3 = hash(H1, c e)
#
# The second text finds H1 in the pool, takes that block, and runs only "c e" through the model.
# Free blocks keep their content and their hash until they are handed out, so even the blocks of
# finished requests are found. The last token of a prompt is always run: the cache has keys and
# values, and the request needs the logits of that token.
#
# CachingEngine (section 6) looks for the beginning of every request that it lets in.
#
# Equal hashes are taken for equal tokens, without a comparison. With SHA-256 that is safe: nobody
# knows two texts with the same hash. With a shorter or weaker hash, compare the tokens of the block
# and of all before it.
#
# Two requests that start together compute the same block twice. Here the hash then leads to the
# first of the two blocks, and when that is handed out, the other is not found any more.
#
# In production: vLLM (block_pool.py) keeps all blocks of a hash. nano-vllm keeps the last one, and
# compares its tokens. SGLang keeps a tree of prefixes instead of hashes. LMCache and Mooncake keep
# copies in the host's memory or on other machines.
#
# Measured by show_prefix_caching().


def hash_block(parent_hash: str, token_ids: Sequence[int]) -> str:
    """Return a full block's hash, SHA-256 in hex of "<parent>|<tokens with commas>".

    parent_hash: the hash of the block before it, "" for the first.
    """
    numbers = ",".join(map(str, token_ids))
    return hashlib.sha256(f"{parent_hash}|{numbers}".encode()).hexdigest()


def block_hashes(tokens: Sequence[int], block_size: int, known: Sequence[str] = ()) -> list[str]:
    """Return the hashes of all full blocks of tokens. known: the hashes of the first blocks."""
    hashes = list(known)
    # Go through the starts of the full blocks that have no hash yet.
    for start in range(len(hashes) * block_size, len(tokens) - block_size + 1, block_size):
        parent = hashes[-1] if hashes else ""
        hashes.append(hash_block(parent, tokens[start:start + block_size]))
    return hashes


def register_blocks(cache: PagedKVCache, tokens: Sequence[int]) -> None:
    """Hash the full blocks of a cache that holds these tokens, so that others find the blocks."""
    pool = cache.pool
    n_known = len(cache.hashes)
    cache.hashes = block_hashes(tokens[:cache.length], pool.block_size, cache.hashes)
    for block, block_hash in zip(cache.block_table[n_known:], cache.hashes[n_known:]):
        if block_hash not in pool.block_of:
            pool.block_of[block_hash] = block
            pool.hash_of[block] = block_hash


def adopt_prefix(cache: PagedKVCache, tokens: Sequence[int]) -> int:
    """Fill an empty cache with blocks that hold the beginning of tokens, as far as any are found.

    Returns how many tokens were found. The last token is never looked for: it must be run.
    """
    pool = cache.pool
    for block_hash in block_hashes(tokens[:-1], pool.block_size):
        if block_hash not in pool.block_of:
            break
        block = pool.block_of[block_hash]
        pool.share(block)
        cache.block_table.append(block)
        cache.hashes.append(block_hash)
        cache.length += pool.block_size
    return cache.length


# 6. Continuous batching
#
# Reading the weights takes most of the time of a decode step of a few requests (section 2), so
# requests should share steps. A static batch starts together and ends with its longest answer.
# Requests that are done leave their places empty, and new requests wait outside. Orca (Yu et al.
# 2022) decides anew at every step: whoever is done leaves, and whoever waits and fits comes in.
# There is room in a step for
#
#     max_num_seqs requests,  max_num_batched_tokens tokens,  and what the free blocks can hold.
#
# Requests that run come first, the oldest before the others. Each gets the blocks that it needs.
# Then waiting requests come in, in order of arrival, until one does not fit.
#
# The newest token of a request has been generated, but its keys and values are not in the cache:
# the next step runs it and stores them. So a text of 6 tokens has 5 cached. An example with blocks
# of 4 and one free block. A and B are running, and C waits with a prompt of 6 tokens:
#
#     A has 8 tokens cached in 2 full blocks; its newest needs a third:       1 free -> 0 free
#     B has 5 tokens cached in 2 blocks; its newest fits:                     0 free
#     C needs 2 blocks for its prompt:                                        C waits
#     the step runs one token of A and one of B
#
# If a running request needs a block and none is free, the youngest running request is preempted:
# the youngest loses all of its blocks and goes back to the head of the queue. When it comes in
# again, its text so far is run like a prompt. The same example without a free block:
#
#     A needs a block:                                      0 free
#     B, the youngest, is preempted and gives back 2:       2 free
#     A takes one of them:                                  1 free
#     the step runs one token of A; nobody comes in:        1 free
#     next step: B needs 2 blocks for its text of 6:        B waits, and C behind it
#
# Nobody comes in during a step that had to preempt. Otherwise a request whose prompt is cut up
# (section 7) could return at once with a small part of it, and lose its blocks again.
#
# The engine schedules without knowing how long an answer will be. It uses max_new_tokens only to
# stop, and to refuse a request that could never fit. A real model also stops at its end-of-text
# token; ours has none, so it always generates max_new_tokens.
#
# The model really runs every step, one request after the other. (An engine runs all tokens of a
# step through each matrix at once. In a product with a matrix, each token's row is computed by
# itself, and each request's attention reads only its own cache. So the results are the same but for
# rounding.) The clock is the cost model of section 2: each step takes step_seconds() of Llama 3.1
# 8B with weights of 4 bits on an A100. Then 38 tokens of a step are free (with 16 bits it would be
# 153, more than our steps usually run).
#
# Read Engine from its top. run() makes steps, step() schedules one and runs the model, schedule()
# decides who is in it. Prefix caching is added below, in CachingEngine; swapping and the split over
# two machines are added in sections 9 and 10.
#
# In production: vllm/v1/core/sched/scheduler.py (Scheduler.schedule) has the same order: the
# running requests, then the waiting ones, and no waiting ones in a step that had to preempt.
#
# Measured by show_continuous().

PRICED_WEIGHT_BYTES = 0.5  # bytes per weight: 4 bits


class Request(NamedTuple):
    """What a user asks for, and when: arrival in seconds on the engine's clock."""

    prompt: Sequence[int]
    max_new_tokens: int
    arrival: float = 0


@dataclass(eq=False)  # two of these are equal only if they are the same object
class RequestState:
    """A request on its way through the engine."""

    number: int
    request: Request
    tokens: list[int]                 # the prompt and the answer so far
    cache: PagedKVCache
    arrival: float                    # at this engine
    times: list[float] = field(default_factory=list)  # when each new token came, in seconds
    found: int = 0                    # tokens that prefix caching found
    slots: list[dict] = field(default_factory=list)   # its content, outside the pool (section 9)

    @property
    def done(self) -> bool:
        """Whether the request has all its new tokens."""
        return len(self.tokens) == len(self.request.prompt) + self.request.max_new_tokens


class Step(NamedTuple):
    """What one step did."""

    start: float            # seconds
    end: float
    tokens: dict[int, int]  # {request: how many of its tokens ran}
    cached: dict[int, int]  # {request: tokens in its cache afterwards}
    waiting: int            # requests that had arrived and were not in the step


@dataclass
class Report:
    """What serve() did."""

    states: list[RequestState]
    steps: list[Step] = field(default_factory=list)
    preempted: list[tuple[int, int]] = field(default_factory=list)  # (step, request)
    swapped_tokens: int = 0  # moved to the host or back (section 9), or to this card (section 10)

    @property
    def tokens(self) -> list[list[int]]:
        """The new tokens of every request."""
        return [state.tokens[len(state.request.prompt):] for state in self.states]

    @property
    def computed(self) -> int:
        """Tokens that were run through the model."""
        return sum(sum(step.tokens.values()) for step in self.steps)


@dataclass(eq=False)
class Engine:
    """The scheduler, and the loop around the model. serve() explains the settings.

    ValueError where check_settings() finds settings with which it could not go on.
    """

    model: Llama
    requests: Sequence[Request]
    _: KW_ONLY  # what follows must be given by name
    policy: str = "continuous"
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int

    def __post_init__(self):
        check_settings(self)
        self.pool = BlockPool(self.num_blocks, self.block_size)
        states = []
        for number, request in enumerate(self.requests):
            cache = PagedKVCache(self.pool, self.model.config)
            tokens = list(request.prompt)
            states.append(RequestState(number, request, tokens, cache, request.arrival))
        self.waiting = deque(in_order_of_arrival(states))
        self.running: list[RequestState] = []  # the oldest first
        self.clock = 0.0                       # seconds
        self.report = Report(states)

    def run(self) -> Report:
        """Step until no request is left, and return the report."""
        while self.waiting or self.running:
            self.step()
        return self.report

    def step(self) -> None:
        """Schedule a step, put it on the clock and in the report, and run the model.

        RuntimeError if there is no work: the scheduler would go on for ever.
        """
        if not self.running:  # nothing to do until the next request comes
            self.clock = max(self.clock, self.waiting[0].arrival)
        start = self.clock
        work = self.schedule()  # swapping (section 9) moves the clock, and so does record()
        if not work:
            raise RuntimeError("a step had no work: the scheduler is stuck")
        self.record(start, work)
        for state, n in work:
            self.advance(state, n)

    def schedule(self) -> list[tuple[RequestState, int]]:
        """Return what the next step runs, as (request, how many tokens). Blocks are reserved."""
        n_running = len(self.running)
        work = self.schedule_running()
        had_to_preempt = len(self.running) < n_running
        batch_under_way = self.policy == "static" and n_running > 0
        if had_to_preempt or batch_under_way:
            return work
        budget = self.max_num_batched_tokens - sum(n for _, n in work)
        return work + self.schedule_waiting(budget)

    def schedule_running(self) -> list[tuple[RequestState, int]]:
        """Let every running request run what its cache lacks and the budget allows."""
        budget = self.max_num_batched_tokens
        work = []
        for state in list(self.running):
            # All but the last of this loop lack 1 token, their newest. The last may be in the
            # middle of a prompt that is cut up, and takes what is left of the budget.
            n = min(len(state.tokens) - state.cache.length, budget)
            # Without enough blocks, the youngest request loses its own: one that this loop has not
            # reached, or `state` itself.
            while state in self.running and not state.cache.fits(n):
                self.preempt(self.running[-1])
            if state in self.running:
                state.cache.reserve(n)
                work.append((state, n))
                budget -= n
        return work

    def schedule_waiting(self, budget: int) -> list[tuple[RequestState, int]]:
        """Let waiting requests in, in order of arrival, until one does not fit."""
        work = []
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            state = self.waiting[0]
            if state.arrival > self.clock:
                break
            n = self.admit(state, budget)
            if n == 0:
                break  # nobody overtakes
            self.running.append(self.waiting.popleft())
            work.append((state, n))
            budget -= n
        return work

    def admit(self, state: RequestState, budget: int) -> int:
        """Reserve blocks for a waiting request; return how many tokens run, or 0 if it must wait.

        The budget is at least 1.
        """
        n = len(state.tokens) - state.cache.length
        if self.policy == "chunked":  # section 7
            n = min(n, budget)
        if n > budget or not state.cache.fits(n):
            return 0
        state.cache.reserve(n)
        return n

    def preempt(self, state: RequestState) -> None:
        """Take a running request's blocks away, and put it at the head of the queue."""
        self.running.remove(state)
        self.waiting.appendleft(state)
        self.report.preempted.append((len(self.report.steps), state.number))
        state.cache.free()

    def advance(self, state: RequestState, n: int) -> None:
        """Run n tokens of a request. If its whole text has run then, it gets a new token."""
        next_token = self.run_model(state, n)
        if state.cache.length == len(state.tokens):  # not so in the middle of a prompt
            state.tokens.append(next_token)
            state.times.append(self.clock)
        if state.done:
            self.finish(state)

    def run_model(self, state: RequestState, n: int) -> int:
        """Run n tokens of a request through the model, and return the likeliest next one."""
        first = state.cache.length
        logits = self.model.forward(state.tokens[first:first + n], state.cache)
        return argmax(logits[-1])

    def finish(self, state: RequestState) -> None:
        """Let a request that has all its tokens go."""
        state.cache.free()
        self.running.remove(state)

    def record(self, start: float, work: list[tuple[RequestState, int]]) -> None:
        """Advance the clock by the time of a step, and put the step in the report."""
        tokens = {state.number: n for state, n in work}
        cached = {state.number: state.cache.length + n for state, n in work}
        waiting = sum(state.arrival <= start for state in self.waiting)
        self.clock += priced_step(sum(tokens.values()), sum(cached.values())).seconds
        self.report.steps.append(Step(start, self.clock, tokens, cached, waiting))


class CachingEngine(Engine):
    """An engine with prefix caching (section 5)."""

    def admit(self, state: RequestState, budget: int) -> int:
        """Take the blocks that hold the beginning of the text, then reserve blocks for the rest.

        If the request must wait, undo that, and put the free blocks into their order again.
        """
        order = self.pool.free_blocks.copy()
        found = 0
        if state.cache.length == 0:  # else its tokens come back from the host (section 9)
            found = adopt_prefix(state.cache, state.tokens)
        n = super().admit(state, budget)
        if n > 0:
            state.found += found
        elif found > 0:
            # It does not come in. Put the free blocks back in their order: nothing was used.
            state.cache.free()
            self.pool.free_blocks = order
        return n

    def run_model(self, state: RequestState, n: int) -> int:
        """Run n tokens, and hash the blocks that are now full."""
        next_token = super().run_model(state, n)
        register_blocks(state.cache, state.tokens)
        return next_token


def serve(
    model: Llama, requests: Sequence[Request], *, engine: type[Engine] = Engine, **settings
) -> Report:
    """Return every request's greedy tokens, and the schedule that made them. The settings, by name:

    engine: Engine, CachingEngine, or SwappingEngine (section 9)
    policy: "static" (a batch starts when the one before is done), "continuous" (the default:
        whole prompts join running requests) or "chunked" (prompts are cut up, section 7)
    num_blocks, block_size: the pool
    max_num_seqs: requests that may run at the same time
    max_num_batched_tokens: tokens that a step may run

    ValueError for settings under which some request could never run.
    """
    return engine(model, requests, **settings).run()


def in_order_of_arrival(states: Sequence[RequestState]) -> list[RequestState]:
    """Return the requests as a queue: by arrival, then by number."""
    return sorted(states, key=lambda state: (state.arrival, state.number))


def priced_step(new_tokens: int, cached_tokens: int) -> StepTime:
    """Return the times of an engine's step, by the cost model, for PRICED_MODEL on PRICED_GPU."""
    return step_seconds(PRICED_GPU, PRICED_MODEL, new_tokens, cached_tokens, PRICED_WEIGHT_BYTES)


def blocks_for(request: Request, block_size: int) -> int:
    """Return how many blocks a request has at its end.

    The keys and values of its last token are never stored: no later token needs them.
    """
    return ceil_div(len(request.prompt) + request.max_new_tokens - 1, block_size)


def check_settings(engine: Engine) -> None:
    """Raise ValueError, which says what would do, if some request could never run."""
    policy = engine.policy
    budget = engine.max_num_batched_tokens
    if policy not in ("static", "continuous", "chunked"):
        raise ValueError(f'policy must be "static", "continuous" or "chunked", not {policy!r}')
    if min(engine.max_num_seqs, budget, engine.block_size) < 1:
        raise ValueError(f"max_num_seqs, max_num_batched_tokens and block_size must be at least 1, "
                         f"not {engine.max_num_seqs}, {budget} and {engine.block_size}")
    if policy == "chunked" and budget < engine.max_num_seqs:
        raise ValueError(f"max_num_batched_tokens must be at least max_num_seqs, "
                         f"{engine.max_num_seqs}, so that every running request gets a token, not "
                         f"{budget}")
    for number, request in enumerate(engine.requests):
        total = len(request.prompt) + request.max_new_tokens
        # If it is preempted just before its last token, it runs total - 1 tokens in one step.
        most = total - 1
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {number} must have a prompt and max_new_tokens of at least "
                             "1")
        need = blocks_for(request, engine.block_size)
        if need > engine.num_blocks:
            raise ValueError(f"request {number} needs {need} blocks of {engine.block_size} for its "
                             f"{total} tokens, so num_blocks must be at least {need}, not "
                             f"{engine.num_blocks}")
        if policy != "chunked" and most > budget:
            raise ValueError(f"request {number} may have to run {most} tokens in one step, so "
                             f"max_num_batched_tokens must be at least {most}, not {budget}; or "
                             f'policy "chunked"')


# 7. Chunked prefill
#
# A long prompt makes one long step, and everybody who is in the middle of an answer waits for it.
# So cut the prompt into chunks (Sarathi-Serve, Agrawal et al. 2024). Running requests come first,
# one token each. What is left of max_num_batched_tokens goes to the prompt. With a budget of 38, 3
# requests running and a prompt of 100 tokens:
#
#     step 1   3 + 35 tokens
#     step 2   3 + 35 tokens
#     step 3   3 + 30 tokens, and the prompt has its first new token
#
# How large should the budget be? Below the ridge a step takes the same time whatever is in it, as
# it waits for memory. So the budget should be as large as it can be while arithmetic is still free:
#
#     budget = free tokens = ridge · bytes per weight / 2    4 bits on an A100: 153 · 0.5 / 2 = 38
#
# With a smaller budget the prompt takes more steps, and a step is hardly shorter. With a larger
# budget the steps are longer for everybody, but the prompt may take fewer of them: with r requests
# running, a prompt of p tokens takes ceil(p / (budget - r)) steps.
#
# The rule assumes empty caches. Reading caches lengthens the step, so more arithmetic fits: with
# 1,000 cached tokens to read, 39 tokens are free; with 4,400, 44 are.
#
# The code is in the engine already: the min(…, budget) in schedule_running() and in admit().
#
# In production: vLLM does this by default. Its max_num_batched_tokens, 2048 to 16384 by card and
# use (EngineArgs in vllm/engine/arg_utils.py), is larger: a step also has a fixed overhead, which
# this cost model leaves out, and fewer steps pay that less often. In return the gaps are longer.
#
# Measured by show_chunked().


def free_tokens(gpu: Gpu, weight_bytes: float) -> int:
    """Return the most tokens that a step can run before arithmetic takes longer than reading.

    weight_bytes: bytes per weight. The caches are taken to be empty.
    """
    return math.floor(gpu.ridge * weight_bytes / 2)


# 8. What paging saves
#
# Before paging, a request's memory was one piece, reserved when it came in, as long as the longest
# text that was allowed. Kwon et al. (2023) ask of every slot of a memory what becomes of it:
#
#     used       it holds a token now
#     reserved   it will hold a token of the same request later
#     internal   it is set aside for the request, which will end without using it
#     free       it is set aside for nobody
#
# A request with 3 tokens now and 5 at its end, in a piece of 8 slots, has 3 used, 2 reserved and 3
# internal. The same request in blocks of 2 has two blocks: 3 used, 1 reserved, none internal.
#
# A piece as long as the longest text is a block of that size, and every request takes one. So one
# engine can measure both ways. (Pieces of different lengths also leave gaps between them that fit
# no request; blocks of one size leave no such gaps.)
#
# The smaller the blocks, the less is wasted. But block tables grow, and a kernel reads a block of
# tokens at a time: vLLM takes 16.
#
# Paging has its price. A pool that lets more requests in may run out of blocks while their texts
# grow, and what a preempted request had computed is computed again (section 9). So preemptions and
# computed tokens are counted, too.
#
# Measured by show_waste().


class Waste(NamedTuple):
    """What became of the slots of a memory, summed over the steps in which a request waited."""

    used: int
    reserved: int
    internal: int
    free: int


def slot_waste(report: Report, n_slots: int, block_size: int) -> Waste:
    """Return what became of the n_slots slots of an engine's memory, without prefix caching."""
    used = reserved = internal = free = 0
    for step in report.steps:
        if not step.waiting:
            continue
        free += n_slots  # less the slots of each request, below
        for number, now in step.cached.items():
            request = report.states[number].request
            final = len(request.prompt) + request.max_new_tokens - 1  # the last is never stored
            slots = ceil_div(now, block_size) * block_size
            used += now
            reserved += min(final, slots) - now
            internal += max(0, slots - final)
            free -= slots
    return Waste(used, reserved, internal, free)


# 9. Running out of blocks
#
# An engine lets in more requests than may fit in the end, as answers may be short. When a running
# request needs a block and none is free, the youngest request is preempted. There are two ways to
# go on with the preempted request later:
#
#     recompute   throw its keys and values away; later run its text so far like a prompt
#     swap        copy its keys and values to the host's memory, and back later, over PCI Express
#
# Either way its text goes on as if nothing had happened. Which way is cheaper? Swapping costs the
# same for every token. Recomputing is free for as many tokens as are free in the step (section 7),
# and costs arithmetic for every token more, 2 · 7.505e9 / 312e12 s = 0.0481 ms (section 2). Take a
# step in which 3 others decode. It runs 4 newest tokens in any case, and 38 tokens are free:
#
#     tokens cached   recompute                              swap, out and in
#     32              32 + 4 < 38, all free: 0 ms            2 · 32 · 131072 / 32e9 s = 0.26 ms
#     128             (128 + 4 - 38) · 0.0481 = 4.5 ms       2 · 128 · 131072 / 32e9 s = 1.05 ms
#
# So short texts are cheaper to recompute and long texts are cheaper to swap. (The cost model lets
# the card wait for the copies. Copies that run beside the step would cost less.)
#
# Engine recomputes, with just its preempt() and admit(). SwappingEngine copies. While a request's
# slots are on the host, its cache keeps its length, but its table is empty. So admit() reserves
# blocks for the old tokens and the new ones together, and then the slots are copied back.
#
# A request that could not even run alone in the pool must be refused at the door (check_settings).
#
# In production: vLLM recomputes (Scheduler._preempt_request). Its first engine recomputed by
# default, too, and swapped only requests with several answers. With prefix caching, much of what a
# preempted request had computed is found again, as free blocks keep their content for a while.
#
# Measured by show_preemption().

PCIE_BYTES_PER_S = 32e9  # each way, PCI Express 4.0 (A100 data sheet: 64 GB/s both ways)


def swap_out(cache: PagedKVCache) -> list[dict]:
    """Return a copy of what every slot of a cache holds, in the order of the text."""
    slots = cache.pool.slots
    return [dict(slots[cache.slot(position)]) for position in range(cache.length)]


def swap_in(cache: PagedKVCache, contents: Sequence[dict]) -> None:
    """Write what swap_out() returned into a cache that has blocks but nothing in them."""
    for position, content in enumerate(contents):
        cache.pool.slots[cache.slot(position)] = dict(content)
    cache.length = len(contents)


class SwappingEngine(Engine):
    """An engine that copies what preempted requests have cached to the host, and back later."""

    def preempt(self, state: RequestState) -> None:
        """Copy a running request's slots to the host before its blocks are taken away."""
        state.slots = swap_out(state.cache)
        super().preempt(state)
        self.report.swapped_tokens += len(state.slots)
        state.cache.length = len(state.slots)  # so that admit() reserves blocks for them, too

    def admit(self, state: RequestState, budget: int) -> int:
        """Reserve blocks, and copy the slots of a preempted request back into them."""
        n = super().admit(state, budget)
        if n > 0 and state.slots:
            swap_in(state.cache, state.slots)
            self.report.swapped_tokens += len(state.slots)
            state.slots = []
        return n

    def schedule(self) -> list[tuple[RequestState, int]]:
        """Return what the next step runs. The copies take their time on the clock."""
        before = self.report.swapped_tokens
        work = super().schedule()
        swapped = self.report.swapped_tokens - before
        self.clock += swapped * PRICED_MODEL.kv_bytes / PCIE_BYTES_PER_S  # the card waits
        return work


# 10. Prefill here, decode there
#
# Prefill wants arithmetic, decode wants bandwidth, and on one card they get in each other's way.
# Splitwise (Patel et al. 2023) and DistServe (Zhong et al. 2024) give each phase cards of its own.
# A prompt never waits behind decode steps, and no decode step ever has a prompt in it. The price:
# the keys and values of the prompt must cross from one card to the other before the second token,
# and there is a second card, which could have served requests as well.
#
# Here keys and values cross in one piece, when the prompt is done. Splitwise does the same if the
# prompt is short. If it is long, each layer is sent while the next layer is computed.
#
# In production: vLLM's KV connectors (vllm/distributed/kv_transfer) and NVIDIA Dynamo.
#
# Measured by show_split().


class PrefillEngine(Engine):
    """An engine that keeps the slots of finished requests, for another machine to go on with."""

    def finish(self, state: RequestState) -> None:
        """Keep a copy of a request's slots, and let the request go."""
        state.slots = swap_out(state.cache)
        super().finish(state)


class DecodeEngine(Engine):
    """An engine that goes on with requests whose prompts were run by another machine."""

    def __post_init__(self):
        super().__post_init__()
        self.waiting.clear()  # all requests come through receive()

    def receive(self, before: RequestState, arrival: float) -> None:
        """Take over a request: its tokens, their times, and, if it is not done, its slots."""
        state = self.report.states[before.number]
        state.tokens = list(before.tokens)
        state.times = list(before.times)
        if not state.done:
            state.arrival = arrival
            state.slots = before.slots
            state.cache.length = len(state.slots)  # so that admit() reserves blocks for them, too
            self.report.swapped_tokens += len(state.slots)
            self.waiting = deque(in_order_of_arrival([*self.waiting, state]))

    def admit(self, state: RequestState, budget: int) -> int:
        """Reserve blocks, and write the slots that were received into them."""
        n = super().admit(state, budget)
        if n > 0 and state.slots:
            swap_in(state.cache, state.slots)
            state.slots = []
        return n


def serve_split(
    model: Llama, requests: Sequence[Request], link_bytes_per_s: float, **settings
) -> Report:
    """Return what the decode machine does; report.swapped_tokens crossed to it.

    The prefill machine makes the first token of every request. The request arrives at the decode
    machine when its keys and values have crossed the link, where requests do not slow each other.
    Decode never affects prefill, so one can be simulated after the other. settings: those of
    serve(), for both machines.
    """
    prompts_only = [request._replace(max_new_tokens=1) for request in requests]
    prefill = PrefillEngine(model, prompts_only, **settings)
    prefill.run()
    decode = DecodeEngine(model, requests, **settings)
    for state in prefill.report.states:
        seconds = len(state.slots) * PRICED_MODEL.kv_bytes / link_bytes_per_s
        decode.receive(state, state.times[0] + seconds)
    return decode.run()


# 11. Latency against load
#
# How good is a policy? It depends on how many requests come. So serving systems are judged by a
# curve: requests arrive at random at a certain rate (a Poisson process), and two times are
# measured, from arrival to the first token, and from one token to the next. While the rate is low,
# both times are short. At some rate the queue gets longer and longer: the curve tips over. Goodput
# (DistServe) is the highest rate at which both times stay within what users were promised.
#
# Measured by show_load(). Nothing new is needed: it runs the engine of section 6.


# 12. A smaller cache
#
# Fewer bits per number make the cache smaller, and the decode steps that read it faster. FP8 (E4M3)
# is a sign, 4 bits of exponent and 3 bits of mantissa: half the bytes of 16 bits. Between 2^e and
# 2^(e + 1) its 8 numbers are 2^(e - 3) apart, so rounding moves a number by one part in 16 at most.
# The largest FP8 number is 448. Below 2^-6 the numbers are evenly spaced, 2^-9 apart.
#
# Still fewer bits need groups of numbers that share a scale. In real models a few channels of the
# keys are far larger than the others, for every token. KIVI (Liu et al. 2024) therefore rounds keys
# in groups per channel, over 32 tokens, so that such a channel is alone in its group, and values
# per token, all to 2 bits. The newest tokens stay in full precision. KIVI is not run here: our
# little model has no such channels, so it could not show why KIVI groups as it does.
#
# In production: FP8 is the usual choice (vLLM: kv_cache_dtype="fp8"; it also has 4-bit caches, and
# scales per token and head). QuantizedCache in transformers is in the manner of KIVI.
#
# Measured by show_small_cache().


def nearest_e4m3(x: float) -> float:
    """Return the FP8 number (E4M3) that is nearest to x. The largest is 448, the smallest -448."""
    if x == 0:
        return x
    _, exponent = math.frexp(x)               # 2^e ≤ |x| < 2^(e + 1); frexp's exponent is e + 1
    spacing = 2.0 ** max(exponent - 4, -9)    # between neighbours: 2^(e - 3), or 2^-9 below 2^-6
    return max(-448.0, min(448.0, round(x / spacing) * spacing))


class Fp8KVCache(KVCache):
    """A KVCache that keeps every number in FP8."""

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Round k and v of the new tokens to FP8, then store them."""
        small_k = [list(map(nearest_e4m3, row)) for row in k]
        small_v = [list(map(nearest_e4m3, row)) for row in v]
        return super().update(layer, small_k, small_v)


# =============================================================================================
# THE EXPERIMENTS: what the trace shows, and how it is measured
# =============================================================================================

# 1. Generation without a cache, and with one


class CacheStep(NamedTuple):
    """One row: the tokens that a step runs."""

    step: int
    without_cache: int
    with_cache: int


def show_cache(trace, knobs) -> None:
    """Show a text generated twice, and how many tokens every step runs."""
    lab = knobs.lab
    n_prompt = len(knobs.prompt_ids)
    n_new = knobs.max_new_tokens
    without = WatchedLlama(lab.model)
    cached = WatchedLlama(lab.model)
    generate(without, knobs.prompt_ids, n_new)
    text = generate(cached, knobs.prompt_ids, n_new, KVCache(lab.config))
    rows = list(map(CacheStep, range(1, n_new + 1), without.n_run, cached.n_run))
    n_weights = sum(math.prod(shape) for shape in lab.config.shapes().values())
    times_as_many = sum(without.n_run) / sum(cached.n_run)

    trace.say(f"The tiny Llama ({lab.config.n_layers} layers, {n_weights:,} weights) goes on "
              f"from {lab.tokenizer.decode(knobs.prompt_ids)!r} with "
              f"{lab.tokenizer.decode(text)!r}.")
    trace.say("Tokens that go through the model, at some of the steps. Without a cache, each step "
              "runs all tokens again. With a cache, the first step runs the prompt (prefill), and "
              "each later step runs a single token (decode).")
    trace.ask("how many times as many tokens are run without the cache, over all steps?",
              times_as_many)
    bar_of_most = f"d bar 20 of {without.n_run[-1]}"
    trace.table(rows[::max(1, n_new // 6)],
                {"step": "d", "without_cache": bar_of_most, "with_cache": bar_of_most})
    trace.say(f"In all, {sum(without.n_run):,} tokens are run without the cache and "
              f"{sum(cached.n_run)} with it: {times_as_many:.1f} times as many.")
    trace.check_close("the same logits at every step with the cache as without, so the same tokens",
                      cached.logits, without.logits, 1e-9)
    trace.check("tokens run: p, p + 1, … at each step without the cache, p + n - 1 in all with it",
                without.n_run == list(range(n_prompt, n_prompt + n_new))
                and sum(cached.n_run) == n_prompt + n_new - 1, f"p = {n_prompt}, n = {n_new}")


# 2. Prefill and decode have different limits


class PricedStep(NamedTuple):
    """One row: a step by the cost model, at 16 bits."""

    phase: str
    requests: int
    tokens: int        # that it runs, of all requests
    arithmetic: float  # milliseconds
    reading: float


def price_phase(phase: str, requests: int, tokens_each: int, cached_each: int) -> PricedStep:
    """Return the times of a step that runs tokens_each of every request."""
    tokens = requests * tokens_each
    step = step_seconds(PRICED_GPU, PRICED_MODEL, tokens, requests * cached_each)
    return PricedStep(phase, requests, tokens, step.arithmetic * 1e3, step.reading * 1e3)


def show_intensity(trace, knobs) -> None:
    """Show the times of a prefill and of decode steps, of a real model on a real card."""
    prefill = price_phase("prefill", 1, 1024, 1024)
    decode = [price_phase("decode", batch, 1, 1024) for batch in (1, 8, 32, 128)]
    longer = decode[-1].reading / decode[0].reading
    batches = {n: batch_at_ridge(PRICED_GPU, PRICED_MODEL, n) for n in (0, 256, 1024)}  # n cached
    fit = requests_that_fit(PRICED_GPU, PRICED_MODEL, 4096)
    trace.say("Each step reads every weight that it uses once, and all cached keys and values, "
              "whether it runs one token or many. The step takes the longer of two times, "
              "arithmetic and reading: this rule is the cost model of this page. The "
              f"{PRICED_GPU.name} can do {PRICED_GPU.ridge:.0f} FLOPs while it reads a byte (the "
              "ridge). A weight of 2 bytes takes 2 FLOPs for each token, so a step that runs fewer "
              f"than {PRICED_GPU.ridge:.0f} tokens waits for memory.")
    trace.say(f"{PRICED_MODEL.name} with weights of 16 bits, by the cost model: the prefill of a "
              "prompt, and decode steps for batches of requests, all with 1024 tokens each:")
    trace.ask("how many times as long as for one request does a decode step take for 128?", longer)
    trace.table([prefill, *decode], {"phase": "", "requests": "d", "tokens as tokens run": ",d",
                                     "arithmetic as arithmetic, ms": ".2f",
                                     "reading as reading, ms": ".2f"})
    trace.note("The prefill reads what one request's decode step reads: the weights, and the keys "
               "and values of 1024 tokens, which it has just stored.")
    trace.say("The prefill is bound by arithmetic, the decode steps by memory. The batch of 128 "
              f"takes {longer:.1f} times as long as one request and yields "
              f"{128 / longer:.0f} times as many tokens a second, as all share one reading of the "
              f"weights. Arithmetic takes longer than reading from a batch of {batches[0]} on if "
              f"nothing is cached, and from {batches[256]} on with 256 tokens cached for each "
              "request. With 1024 it never does: to read them takes longer than a token's "
              "arithmetic, so every request adds more reading than arithmetic.")
    trace.say("And memory is limited. A token's keys and values take "
              f"{PRICED_MODEL.kv_bytes / 1024:.0f} KiB, so {fit} requests of 4096 tokens fit "
              "beside the weights, in 0.92 of 80 GB. (Engines leave the rest for activations.)")
    trace.check("by hand: the prefill takes 2 · 7.505e9 · 1024 FLOPs / 312e12 per second, one "
                "request's decode step (2 · 7.505e9 + 1024 · 131072) bytes / 2039e9 per second",
                abs(prefill.arithmetic - 49.26) < 0.01 and abs(decode[0].reading - 7.427) < 0.001,
                "49.26 and 7.427 ms")
    trace.self_tests()
    trace.check("by hand: the weights are read in 7.361 ms, a request adds 0.0481 ms of "
                "arithmetic, and 256 cached tokens add 0.0165 ms of reading. 7.361 / 0.0481 is "
                "just over 153, and 7.361 / (0.0481 - 0.0165) is just under 233",
                batches == {0: 154, 256: 233, 1024: None}, "batches of 154, 233 and none")
    trace.check("by hand: a request takes 4096 · 131072 bytes = 0.537 GB, and 73.6 GB less 2 bytes "
                "for each of 8.03e9 weights leave 57.54 GB", fit == 107, f"{fit} requests")


# 3. Paged attention


def run_paged(
    model: Llama, prompts: Sequence[Sequence[int]], n_new: int, block_size: int, rng: random.Random
) -> tuple[list[list[int]], list[PagedKVCache]]:
    """Generate n_new tokens for each prompt, in turn, in a pool whose free blocks are in no order.

    Returns the texts and their caches. The last token of a text is not in its cache.
    """
    n_blocks = 2 + sum(ceil_div(len(prompt) + n_new, block_size) for prompt in prompts)
    pool = BlockPool(n_blocks, block_size)
    pool.free_blocks = OrderedDict.fromkeys(rng.sample(range(n_blocks), n_blocks))
    texts = [list(prompt) for prompt in prompts]
    caches = [PagedKVCache(pool, model.config) for _ in prompts]
    grow_texts(model, texts, caches, n_new)
    return texts, caches


def grow_texts(
    model: Llama, texts: Sequence[list[int]], caches: Sequence[PagedKVCache], n_new: int
) -> None:
    """Let every text go on for n_new tokens, in turn."""
    for _ in range(n_new):
        for text, cache in zip(texts, caches):
            logits = model.forward(text[cache.length:], cache)
            text.append(argmax(logits[-1]))


def draw_pool(pool: BlockPool, caches: Sequence[PagedKVCache]) -> list[str]:
    """Return the blocks as boxes with a letter for each token of a cache."""
    owner = {}
    for letter, cache in zip("AB", caches):
        for position in range(cache.length):
            owner[cache.slot(position)] = letter
    boxes = []
    for block in range(pool.num_blocks):
        empty = "·" if pool.ref_count[block] else "_"
        first = block * pool.block_size
        slots = range(first, first + pool.block_size)
        boxes.append(f"{block}│{''.join(owner.get(slot, empty) for slot in slots)}│")
    return textwrap.wrap(" ".join(boxes), WIDTH)


def print_tables(trace, caches: Sequence[PagedKVCache]) -> None:
    """Print the block tables of caches A, B, …"""
    for letter, cache in zip("ABCD", caches):
        trace.lines(textwrap.wrap(f"block table of {letter}: {cache.block_table}", WIDTH))


def show_paging(trace, knobs) -> None:
    """Show two requests that grow in one pool, and where one of their tokens is."""
    model = knobs.lab.model
    size = knobs.block_size
    prompts = [knobs.prompt_ids, knobs.lab.tokenizer.encode("This is the man all tattered and "
                                                            "torn")]
    rng = random.Random(knobs.seed)
    texts, caches = run_paged(model, prompts, knobs.max_new_tokens, size, rng)
    pool = caches[0].pool
    trace.say("Memory is cut into blocks. A request takes a block at a time, from anywhere, and "
              "its block table lists them. Two requests, A and B, have grown in turn, token by "
              f"token, in one pool of {pool.num_blocks} blocks of {size}, whose free blocks are in "
              "no order, as after long use. A letter is a token's keys and values, a dot an empty "
              "slot of a request, _ a slot of a free block.")
    trace.lines(["", *draw_pool(pool, caches)])
    print_tables(trace, caches)
    cache = caches[1]  # of B
    position = cache.length - 2
    number, offset = divmod(position, size)
    block = cache.block_table[number]
    slot = cache.slot(position)
    trace.ask(f"slots are numbered from the first of block 0, and tokens from 0. In which slot is "
              f"token {position} of B?", slot)
    trace.say(f"Token {position} of B: {position} // {size} = {number}, so it is in block "
              f"block_table[{number}] = {block}, at offset {position} % {size} = {offset}. Its "
              f"slot is {block} · {size} + {offset} = {slot}.")
    trace.check_close("keys and values read through the tables = those of caches in one piece",
                      contents(caches), contents_alone(model, texts), 1e-9)


# 4. Sharing: reference counts and copy on write


def show_sharing(trace, knobs) -> None:
    """Show the blocks of four answers to one prompt, with sharing and without."""
    model = knobs.lab.model
    size = knobs.block_size
    prompt = knobs.lab.text_ids[:22]
    pool = BlockPool(4 * ceil_div(len(prompt) + 1, size), size)
    first = PagedKVCache(pool, model.config)
    model.forward(prompt, first)
    caches = [first, fork(first), fork(first), fork(first)]
    prompt_table = list(first.block_table)
    needed = [cache.blocks_needed(1) for cache in caches]
    texts = [[*prompt, token] for token in range(4)]
    grow_texts(model, texts, caches, 1)
    copies = sum(cache.block_table[:len(prompt_table)] != prompt_table for cache in caches)
    counts = [count for count in pool.ref_count if count]
    trace.say(f"Four answers to one prompt share its blocks. The prompt has {len(prompt)} tokens, "
              f"and its block table is {prompt_table}, with blocks of {size}. The answers A to D "
              "begin with four different tokens. Every block counts its references: the block "
              "tables that list it. An answer that has to write into a block with several "
              "references takes a copy of the block first.")
    trace.ask(f"the prompt fills {len(prompt) % size} slots of its last block (0: all of them). "
              "How many of the four answers copy that block before they write?", copies)
    trace.say("After each answer has written the keys and values of its first token:")
    print_tables(trace, caches)
    trace.lines(textwrap.wrap(f"references to blocks 0, 1, …: {counts}", WIDTH))
    if copies:
        trace.say(f"{copies} answers took a copy of the half-full block {prompt_table[-1]}. The "
                  "last answer to write was then alone in that block, and needed no copy.")
    trace.say(f"{len(counts)} blocks are in use. Without sharing there would be {pool.num_blocks}.")
    trace.check("right after fork(), while nobody has copied, each answer still needs one block",
                needed == [1] * 4, "4 answers")
    trace.check_close("keys and values of every answer, in order = those of a cache of its own",
                      contents(caches), contents_alone(model, texts), 1e-9)
    full_blocks = len(prompt) // size
    trace.check("each full block of the prompt has 4 references, each answer has one block of its "
                "own, and all other blocks are free",
                counts == [4] * full_blocks + [1] * 4
                and pool.num_free_blocks == pool.num_blocks - full_blocks - 4,
                f"{len(counts)} in use, {pool.num_free_blocks} free")


# 5. Prefix caching


class PrefixHit(NamedTuple):
    """One row: a request, and how many tokens of its prompt were found in the pool."""

    request: int
    prompt: int     # tokens
    found: int
    longest: int    # in full blocks shared with an earlier text, by comparing the texts
    picture: str    # a mark for each token


def prefix_hits(report: Report, block_size: int) -> list[PrefixHit]:
    """Return a row per request. The requests were served one after the other."""
    rows = []
    earlier: list[list[int]] = []
    for state in report.states:
        prompt = state.request.prompt
        longest = max((shared_start(prompt[:-1], text) for text in earlier), default=0)
        rows.append(PrefixHit(state.number, len(prompt), state.found,
                              longest // block_size * block_size,
                              "░" * state.found + "█" * (len(prompt) - state.found)))
        earlier.append(state.tokens[:-1])  # the last token was never run
    return rows


def shared_start(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two texts share from their start."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def conversation(tokenizer: Tokenizer) -> list[Request]:
    """Return turns that repeat the rhyme so far, two beginnings of one, and one with a gap."""
    verses = TEXT.splitlines(keepends=True)
    one = tokenizer.encode(verses[0])
    two = one + tokenizer.encode(verses[1])
    three = two + tokenizer.encode(verses[2])
    prompts = [one, two, two[:20], two[:21], three, three[:4] + three[8:]]
    # A second apart, so that each finds the engine empty
    return [Request(tuple(prompt), 4, float(i)) for i, prompt in enumerate(prompts)]


def show_prefix_caching(trace, knobs) -> None:
    """Show what a conversation that grows by a verse per turn finds in the pool."""
    size = knobs.block_size
    requests = conversation(knobs.lab.tokenizer)
    needed = sum(slots_needed(requests))
    report = serve(knobs.lab.model, requests, engine=CachingEngine, num_blocks=needed,
                   block_size=size, max_num_seqs=1, max_num_batched_tokens=1024)
    rows = prefix_hits(report, size)
    trace.say("If the beginning of a prompt was computed before, its keys and values are still in "
              "the pool, under a hash of its tokens. Requests 0, 1 and 4 are a conversation: each "
              "repeats the rhyme so far and adds a verse. Requests 2 and 3 are the first 20 and 21 "
              "tokens of request 1, and request 5 is request 4 without its tokens 4 to 7. Each "
              "comes when the request before has ended, and the pool is large enough for all.")
    trace.ask("request 2 has nothing but the first 20 tokens of request 1. How many does it find "
              f"in the pool, with blocks of {size}?", rows[2].found)
    trace.table(rows, {"request": "d", "prompt as prompt, tokens": "d", "found": "d",
                       "picture as ░ found, █ run (a mark is a token)": ""})
    trace.say(f"Only full blocks, here of {size} tokens, are found, and the last token of a prompt "
              f"is always run: request 2 finds {rows[2].found} tokens, and request 3, one token "
              f"longer, finds {rows[3].found}. Request 5 finds nothing behind its gap, as the hash "
              "of a block depends on all tokens before it. Answers (4 tokens) stay in the pool, "
              "too, all but their last token, which is never run: request 0 leaves "
              f"{len(requests[0].prompt)} + 3 tokens.")
    trace.check("found = the longest run of full blocks shared with any earlier text",
                all(row.found == row.longest for row in rows), f"{len(rows)} requests")
    trace.check("what was found was not computed, and the answers are what each request gets alone",
                report.computed == needed - sum(row.found for row in rows)
                and report.tokens == knobs.lab.solo_tokens(requests),
                f"{report.computed} of {needed} tokens were computed")
    # A request that is still there, and others that need all free blocks
    cache = report.states[0].cache  # empty by now
    adopted = adopt_prefix(cache, requests[4].prompt)
    pool = cache.pool
    while pool.num_free_blocks:
        pool.allocate()
    trace.check("after that all free blocks are handed out; they are not found any more, and those "
                "still in use are",
                list(pool.block_of) == cache.hashes and list(pool.hash_of) == cache.block_table
                and adopted == len(cache.block_table) * size, f"{adopted} tokens are in use")


# 6. Continuous batching


def make_requests(tokenizer: Tokenizer, rng: random.Random) -> list[Request]:
    """Return requests with lines of the rhyme, about 3 ms apart, for 3 to 20 new tokens each."""
    arrival = 0.0
    requests = []
    for clause in CLAUSES[1:10]:
        prompt = tuple(tokenizer.encode("This is " + clause))
        requests.append(Request(prompt, rng.randint(3, 20), arrival))
        arrival += rng.expovariate(1 / 0.003)
    return requests


def timeline(report: Report, width: int = 66) -> list[str]:
    """Return the schedule as a picture: a row per request, a column per step, width at most."""
    lines = []
    for state in report.states:
        row = ""
        n_run = 0
        for i, step in enumerate(report.steps):
            n = step.tokens.get(state.number, 0)
            n_run += n
            if n:
                row += "▒" if n == 1 and n_run > len(state.request.prompt) else "█"
            elif (i, state.number) in report.preempted:
                row += "×"
            elif state.arrival <= step.start < state.times[-1]:
                row += "·"
            else:
                row += " "
        if len(row.rstrip()) > width:
            row = row[:width] + "…"
        sizes = f"{len(state.request.prompt):>2}+{state.request.max_new_tokens:<3}"
        lines.append(f"{state.number:>2} {sizes} {row}")
    return lines


def show_continuous(trace, knobs) -> None:
    """Show the same requests in static batches and in continuous ones."""
    requests = knobs.requests
    places = knobs.max_num_seqs
    static = serve_plenty(knobs.lab.model, requests, "static", max_num_seqs=places)
    continuous = serve_plenty(knobs.lab.model, requests, "continuous", max_num_seqs=places)
    trace.say("A static batch starts with whoever is there and ends with the longest request. "
              f"Continuous batching decides anew at every step who runs. {len(requests)} requests; "
              f"at most {places} may run at a time. A row is a request (tokens of its prompt + new "
              "tokens), a column is a step: · the request waits, █ its prompt runs and gives the "
              "first new token, ▒ its newest token runs and gives one more.")
    trace.lines(["", "static:", *timeline(static)])
    trace.ask(f"static batches took {len(static.steps)} steps. How many steps does it take if "
              "whoever is done leaves at once, and whoever waits comes in?", len(continuous.steps))
    trace.lines(["", "continuous:", *timeline(continuous)])
    trace.say(f"Static batches take {len(static.steps)} steps, and the first token of a request "
              f"comes after {fmean(first_tokens(static.states)):.1f} ms on average. Continuous "
              f"batching takes {len(continuous.steps)} steps, and the first token comes after "
              f"{fmean(first_tokens(continuous.states)):.1f} ms: no place stays empty while "
              "somebody waits. (On 20 sets of requests, static batches took 1.2 to 1.6 times as "
              "many steps, and 2.1 to 6.0 times as long to the first token. The first request "
              "comes alone, and its batch keeps three places empty. If all come at once, the first "
              "token takes 1.2 to 2.1 times as long.)")
    trace.say("The tokens come from the tiny Llama. The times come from the cost model of section "
              f"2, as if it were {PRICED_MODEL.name} on an {PRICED_GPU.name}, from here on with "
              f"weights of 4 bits: {priced_free_tokens()} tokens can then run while the weights "
              f"are read. (With 16 bits it would be {free_tokens(PRICED_GPU, 2)}, more than these "
              "small requests bring to a step.)")
    trace.check("static: two requests start together, or one starts when the other has ended",
                all(late.times[0] == early.times[0] or late.times[0] > early.times[-1]
                    for early, late in itertools.combinations(static.states, 2)),
                "all pairs of requests")
    trace.check("no first token comes sooner than a step after its request, either way",
                min(first_tokens(static.states + continuous.states))
                > priced_step(0, 0).seconds * 1e3, "of all requests")
    busy = [step for step in continuous.steps if step.waiting]
    if busy:
        trace.check("continuous: no place stays empty while somebody waits",
                    all(len(step.tokens) == places for step in busy), f"in {len(busy)} steps")
    alone = knobs.lab.solo_tokens(requests)
    trace.check("both ways, every request's tokens are what it gets alone",
                static.tokens == continuous.tokens == alone, f"{sum(map(len, alone))} tokens")


# 7. Chunked prefill


class BudgetRow(NamedTuple):
    """One row: requests are being answered when a long prompt comes in. Milliseconds."""

    budget: int | str   # tokens per step
    worst_gap: float    # of the others
    first_token: float  # of the long prompt, from its arrival
    end: float          # of all


def long_prompt_requests(tokenizer: Tokenizer) -> list[Request]:
    """Return three requests for 20 tokens each, and one that comes 12 ms later with six verses."""
    texts = ["This is " + clause for clause in CLAUSES[1:4]]
    requests = [Request(tuple(tokenizer.encode(text)), 20) for text in texts]
    verses = "".join(TEXT.splitlines(keepends=True)[:6])
    return [*requests, Request(tuple(tokenizer.encode(verses)), 4, 0.012)]


def budget_row(report: Report, budget: int | str) -> BudgetRow:
    """Return the figures of a run whose last request has the long prompt."""
    return BudgetRow(budget, max(token_gaps(report.states[:-1])), first_tokens(report.states)[-1],
                     report.steps[-1].end * 1e3)


def clock_line(report: Report, width: int = 66) -> list[str]:
    """Return when tokens came, as a picture: a row per request, a column per millisecond."""
    lines = []
    for state in report.states:
        marks = {int(seconds * 1e3) for seconds in state.times}
        row = " " * int(state.arrival * 1e3)
        for ms in range(len(row), max(marks) + 1):
            row += "▒" if ms in marks else "·"
        if len(row) > width:
            row = row[:width] + "…"
        sizes = f"{len(state.request.prompt):>3}+{state.request.max_new_tokens:<3}"
        lines.append(f"{state.number:>2} {sizes} {row}")
    return lines


def show_chunked(trace, knobs) -> None:
    """Show what a long prompt does to three requests that are being answered."""
    requests = long_prompt_requests(knobs.lab.tokenizer)
    budget = max(knobs.max_num_batched_tokens, len(requests))
    whole = serve_plenty(knobs.lab.model, requests)
    chunked = serve_plenty(knobs.lab.model, requests, "chunked", budget=budget)
    whole_row = budget_row(whole, "whole prompts")
    rows = {n: budget_row(serve_plenty(StandIn(), requests, "chunked", budget=n), n)
            for n in sorted({8, priced_free_tokens(), 96, budget})}
    trace.say("A long prompt makes one long step, and all that are being answered wait for that "
              "step. Chunked prefill cuts the prompt up, so that no step runs more tokens than a "
              "budget. Requests 0 to 2 are being answered when 3 comes, with "
              f"{len(requests[3].prompt)} tokens. A column is a millisecond by the cost model: ▒ a "
              "new token came, · none came. (Times are rounded down, so two ▒ side by side can be "
              "almost 2 ms apart.)")
    trace.lines(["", "whole prompts:", *clock_line(whole)])
    trace.ask(f"the long prompt made requests 0 to 2 wait {whole_row.worst_gap:.1f} ms for a "
              f"token. What is their longest gap, in ms, if a step runs at most {budget} tokens?",
              rows[budget].worst_gap)
    trace.lines(["", f"chunked, at most {budget} tokens per step:", *clock_line(chunked)])
    if rows[budget] == whole_row._replace(budget=rows[budget].budget):
        trace.say("This budget holds the whole prompt, so nothing changes. How large should it be?")
    else:
        trace.say("Chunks make the longest gap shorter than whole prompts do. What they cost: the "
                  "prompt takes several steps, so the first token of request 3 comes later. How "
                  "large should the budget be?")
    show_budgets(trace, rows, whole_row)
    alone = knobs.lab.solo_tokens(requests)
    trace.check("every request's tokens are those it gets alone, both ways",
                whole.tokens == chunked.tokens == alone, f"{sum(map(len, alone))} tokens")
    largest = largest_step(chunked)
    trace.check("no chunked step runs more than the budget, and one fills it if there is so much "
                "to run",
                largest == min(budget, largest_step(whole)), f"{largest} tokens of {budget}")


def largest_step(report: Report) -> int:
    """Return the most tokens that a step ran."""
    return max(sum(step.tokens.values()) for step in report.steps)


def show_budgets(trace, rows: dict[int, BudgetRow], whole: BudgetRow) -> None:
    """Show the same requests with other budgets, and the rule for a good one."""
    free = priced_free_tokens()
    small = rows[8]
    best = rows[free]
    trace.table([*rows.values(), whole],
                {"budget": ">", "worst_gap as gap, ms": ".1f bar 12",
                 "first_token as first token, ms": ".1f", "end as end, ms": ".1f"})
    trace.note("gap: the longest of requests 0 to 2. first token: of request 3, after its arrival. "
               "end: when all requests are done.")
    trace.say(f"Up to {free} tokens, a step takes nearly the same time, as it waits for memory. "
              "(Weights of 4 bits are read 4 times as fast as those of 16: 153 / 4.) A smaller "
              "budget delays request 3 and hardly shortens a step. A larger budget lengthens the "
              f"steps of all. With {free}, all requests are also done sooner than with whole "
              "prompts: every decode step waits until the weights are read, and a chunk that runs "
              "meanwhile costs no time.")
    trace.check("no budget makes the longest gap longer than whole prompts do",
                max(row.worst_gap for row in rows.values()) <= whole.worst_gap,
                f"{len(rows)} budgets")
    trace.check("with the budget that the rule gives, 153 · 0.5 / 2 = 38, the first token comes "
                "sooner than with 8, the longest gap is hardly longer, by a ninth at most, and all "
                "are done sooner than with whole prompts",
                free == 38 and best.first_token < small.first_token
                and best.worst_gap < small.worst_gap / 0.9 and best.end < whole.end,
                f"{best.end:.1f} and {whole.end:.1f} ms")


# 8. What paging saves


class MemoryRow(NamedTuple):
    """One row: a pool with blocks of one size, and what became of its slots."""

    block_size: int
    used: float       # shares of the slots, over the steps in which a request waited
    reserved: float
    internal: float
    free: float
    preempted: int
    computed: int     # tokens run
    steps: int        # until the last request is done


def memory_row(requests: Sequence[Request], n_slots: int, block_size: int) -> MemoryRow:
    """Return a row for requests that come at time 0 to n_slots slots. The model is a stand-in."""
    report = serve(StandIn(), requests, num_blocks=n_slots // block_size, block_size=block_size,
                   max_num_seqs=len(requests), max_num_batched_tokens=2048)
    waste = slot_waste(report, n_slots, block_size)
    shares = [count / max(1, sum(waste)) for count in waste]
    return MemoryRow(block_size, *shares, len(report.preempted), report.computed, len(report.steps))


def show_waste(trace, knobs) -> None:
    """Show the waste of one piece per request and of blocks, and the price of paging."""
    requests = [request._replace(arrival=0.0) for request in knobs.requests] * 2
    needed = slots_needed(requests)
    one_piece = memory_row(requests, 128, 64)
    paged = memory_row(requests, 128, knobs.block_size)
    trace.say("In short: small blocks use most of a memory, and one piece per request leaves most "
              "of it empty.")
    trace.say("Before paging, a request's cache was one piece, as long as the longest text that "
              f"is allowed, here 64 slots. {len(requests)} requests share a memory of 128 slots. "
              f"Each will use {min(needed)} to {max(needed)}, but the engine does not know this. "
              "In blocks of 64, each request has one piece: the old way. On average over the steps "
              "in which somebody waited, a slot is")
    trace.lines(["  used      if it holds a token now",
                 "  reserved  if it will hold a token of the same request later",
                 "  internal  if it is set aside for a request that will end without using it",
                 "  free      if it is set aside for nobody"])
    trace.ask("with 64 slots set aside for each, two requests fit. What share of all slots holds a "
              "token? (as 0.5 or 50%)", one_piece.used)
    trace.say("preempted: how often a request lost its blocks, as none was free (section 9). "
              f"computed: tokens run; {sum(needed)} are needed.")
    trace.table([paged, one_piece], {"block_size": "d", "used": ".0%", "reserved": ".0%",
                                     "internal": ".0%", "free": ".0%", "preempted": "d",
                                     "computed": "d", "steps": "d"})
    trace.note("Shares are rounded. The PagedAttention paper (2023) found 20.4% to 38.2% used in "
               "earlier systems.")
    trace.say(f"In blocks of {paged.block_size}, {paged.used:.0%} of the memory is used and all "
              f"are done in {paged.steps} steps; in pieces, {one_piece.used:.0%} is used and "
              f"{one_piece.steps} steps are needed. The price of blocks: {paged.preempted} "
              f"preemptions, and {paged.computed - sum(needed)} tokens that were run again.")
    trace.say("On 20 sets of requests, 85% to 88% of the memory was used in blocks of 4, and 21% "
              "to 24% in pieces, which took 2.9 to 3.6 times as many steps. The price was 5 to 11 "
              "preemptions, and 13% to 33% more tokens run. The limit of 64 is our choice: no "
              "request needs more than 30 slots, and in pieces of 32, 39% to 46% would be used.")
    trace.check("blocks use as much of the memory as pieces or more, and take no more steps",
                paged.used >= one_piece.used and paged.steps <= one_piece.steps,
                f"{paged.used:.0%} and {one_piece.used:.0%} used")
    by_hand = serve_by_hand([(3, 3), (5, 1)], num_blocks=2, budget=64)
    trace.self_tests()
    trace.check("by hand: in 2 blocks of 4, a request with 3, 4, then 5 tokens has used 12 slots, "
                "reserved 1, left 3 of its second block empty, and left 8 free",
                slot_waste(by_hand, 8, 4) == (12, 1, 3, 8), "3 · 8 slots")


# 9. Running out of blocks


class PreemptionRow(NamedTuple):
    """One row: a way to come back after a preemption."""

    by: str
    preempted: int
    computed: int  # tokens run
    swapped: int   # tokens, out and in
    steps: int
    end: float     # milliseconds until the last request is done


def preemption_row(report: Report, by: str) -> PreemptionRow:
    """Return the figures of a run."""
    return PreemptionRow(by, len(report.preempted), report.computed, report.swapped_tokens,
                         len(report.steps), report.steps[-1].end * 1e3)


def show_preemption(trace, knobs) -> None:
    """Show the requests of section 6 in a small pool, with both ways of coming back."""
    requests = knobs.requests
    needed = sum(slots_needed(requests))
    largest = max(blocks_for(request, knobs.block_size) for request in requests)
    n_blocks = knobs.num_blocks or 2 * largest
    settings = dict(num_blocks=n_blocks, block_size=knobs.block_size,
                    max_num_seqs=knobs.max_num_seqs, max_num_batched_tokens=1024)
    recomputed = serve(knobs.lab.model, requests, **settings)
    swapped = serve(knobs.lab.model, requests, engine=SwappingEngine, **settings)
    trace.say("In short: a request that loses its blocks loses no token, only time.")
    trace.say("When a running request needs a block and none is free, the youngest running "
              "request loses its blocks and waits. Its text so far is recomputed when it comes "
              "back, or its keys and values are swapped, out to the host and in again. The "
              f"requests of section 6 have {needed} tokens to run in a pool of {n_blocks} blocks "
              f"of {knobs.block_size}; the largest request needs {largest}:")
    trace.ask("how many tokens go through the model when blocks are swapped out and in?",
              swapped.computed)
    trace.table([preemption_row(recomputed, "recompute"), preemption_row(swapped, "swap")],
                {"by as comes back by": "", "preempted": "d", "computed": "d",
                 "swapped as swapped out + in, tokens": "d", "steps": "d", "end as ms": ".1f"})
    trace.lines(["", "By recomputation (× the request loses its blocks, █ its text so far runs):",
                 *timeline(recomputed)])
    trace.say("Swapping runs no token again, but its copies take time. Short texts are cheaper to "
              "recompute and long texts are cheaper to swap; the source works it out. The texts "
              "here are short: on 19 of 20 sets of requests, all were done 0.07 to 0.63 ms earlier "
              "by recomputation, although up to 44% more tokens were run. (On one, nobody was "
              "preempted.)")
    check_preemption(trace, knobs, recomputed, swapped)


def check_preemption(trace, knobs, recomputed: Report, swapped: Report) -> None:
    """Check that a preemption changes nothing but when a request is served, and by what work."""
    needed = sum(slots_needed(knobs.requests))
    trace.check("no token changed, either way, and swapping ran none again",
                recomputed.tokens == swapped.tokens == knobs.lab.solo_tokens(knobs.requests)
                and swapped.computed == needed, f"{needed} tokens are needed")
    if swapped.preempted:
        lost = sum(swapped.steps[i - 1].cached[number] for i, number in swapped.preempted)
        copying = 0.0
        for step in swapped.steps:
            priced = priced_step(sum(step.tokens.values()), sum(step.cached.values()))
            copying += step.end - step.start - priced.seconds
        trace.check("what was cached before each preemption is swapped out, and in again: the "
                    "steps take 131072 bytes / 32e9 per second longer for each token",
                    swapped.swapped_tokens == 2 * lost
                    and abs(copying - 2 * lost * 131072 / 32e9) < 1e-9, f"2 × {lost} tokens")
    else:
        trace.note("No request lost its blocks here, so a check is left out. Try fewer "
                   "--num-blocks or more --max-num-seqs.")
    trace.self_tests()
    cache = swapped.states[0].cache  # empty by now
    slots = [{0: number} for number in range(8)]
    cache.reserve(len(slots))
    swap_in(cache, slots)
    trace.check("slots that are swapped in, and out again, have the same order",
                swap_out(cache) == slots, "8 slots")
    cut_up = serve_by_hand([(3, 4), (8, 1)], num_blocks=3, budget=4)
    trace.check("by hand: the younger of two requests is preempted. Its prompt is cut up, but it "
                "loses its block once and not again in the next step, as nobody comes in during a "
                "step that preempts",
                cut_up.preempted == [(2, 1)], "a prompt of 8, 3 blocks of 4, 4 tokens per step")


# 10. Prefill here, decode there

# NVLink joins two cards: 600 GB/s, both ways together (A100 data sheet)
NVLINK_BYTES_PER_S = 300e9


class Latency(NamedTuple):
    """One row: requests on two cards. Times in milliseconds."""

    way: str
    rate: int           # requests per second and card, where they come at random
    first_token: float  # after arrival: 9 of 10 are no longer
    second_gap: float   # the longest from a first token to the second
    later_gap: float    # between later tokens: 99 of 100 are no longer


def measure_latency(requests: Sequence[Request], way: str, rate: int = 0) -> Latency:
    """Serve the requests by a policy, on two cards that take them in turn, or split over a link.

    The model is a stand-in.
    """
    if way == "split":
        reports = [serve_split(StandIn(), requests, NVLINK_BYTES_PER_S, **plenty(requests))]
    else:
        budget = priced_free_tokens() if way == "chunked" else 2048
        shares = [requests[::2], requests[1::2]]
        reports = [serve_plenty(StandIn(), share, way, budget=budget) for share in shares]
    states = []
    for report in reports:
        states += report.states
    waits = sorted(first_tokens(states))
    second_gaps = [(state.times[1] - state.times[0]) * 1e3 for state in states]
    later_gaps = sorted(token_gaps(states, first=1))
    return Latency(way, rate, waits[len(waits) * 9 // 10], max(second_gaps),
                   later_gaps[len(later_gaps) * 99 // 100])


def show_split(trace, knobs) -> None:
    """Show the same requests on two cards alike, and on two with a phase each."""
    requests = long_prompt_requests(knobs.lab.tokenizer)
    prompt_tokens = sum(len(request.prompt) for request in requests)
    whole = measure_latency(requests, "continuous")
    chunked = measure_latency(requests, "chunked")
    split = measure_latency(requests, "split")
    report = serve_split(knobs.lab.model, requests, 1e9, **plenty(requests))
    crossed = report.swapped_tokens * PRICED_MODEL.kv_bytes
    trace.say("In short: with a card for each phase, the first token comes early and the later "
              "gaps are short, but the second token waits.")
    trace.say("One card can do the prefill of all requests and another card their decode; then no "
              "prompt disturbs an answer. The keys and values of a prompt must cross over before "
              "its second token. The requests of section 7, by the cost model, on two cards: the "
              "requests go to card 1, card 2, card 1, …, or each card does a phase (split):")
    trace.ask(f"the prompts have {prompt_tokens} tokens. How many MB of keys and values cross in "
              f"all, at {PRICED_MODEL.kv_bytes / 1024:.0f} KiB per token?", crossed / 1e6)
    trace.table([whole, chunked, split],
                {"way": "", "first_token as first token, ms": ".1f",
                 "second_gap as to the second, ms": ".1f", "later_gap as later gap, ms": ".1f"})
    trace.note("Each column is the longest time of any request: from arrival to the first token, "
               "from the first to the second, and between later tokens. continuous: whole prompts. "
               f"chunked: at most {priced_free_tokens()} tokens per step. split: a link of "
               f"{NVLINK_BYTES_PER_S / 1e9:.0f} GB a second each way (NVLink) joins the cards.")
    trace.say("On two cards, whole prompts make long gaps. Chunks make short ones, but the first "
              "token comes later. The split has both: its first token is early, and its later gaps "
              "are short. Only the second token waits, and hardly for the link, which all prompts "
              f"({crossed / 1e6:.0f} MB) cross in {1e3 * crossed / NVLINK_BYTES_PER_S:.2f} ms. It "
              "waits until the step that the decode card is in has ended, and then for a whole "
              "step. Section 11 asks which way serves more people with two cards.")
    trace.check("split, every request gets the tokens that it gets alone, and the keys and values "
                "of every prompt token cross once",
                report.tokens == knobs.lab.solo_tokens(requests)
                and report.swapped_tokens == prompt_tokens, f"{prompt_tokens} tokens cross")
    trace.check("split, the first token comes before that of chunks, and the later gaps are "
                "shorter than with whole prompts",
                split.first_token < chunked.first_token and split.later_gap < whole.later_gap,
                "on two cards each")
    first, second, *_ = report.states[-1].times
    crossing = len(requests[-1].prompt) * 131072 / 1e9
    trace.check("over a slow link, the second token of request 3 comes within 5 ms after its "
                "prompt's keys and values have crossed",
                crossing < second - first < crossing + 0.005, "131,072 bytes a token at 1 GB/s")


# 11. Latency against load


def poisson_requests(n: int, rate: float, rng: random.Random) -> list[Request]:
    """Return n requests that come at random, `rate` per second for each of two cards."""
    arrival = 0.0
    requests = []
    for _ in range(n):
        arrival += rng.expovariate(2 * rate)
        requests.append(Request((0,) * rng.randint(64, 448), rng.randint(8, 56), arrival))
    return requests


def measure_load(way: str, rates: Sequence[int], n_requests: int, seed: int) -> list[Latency]:
    """Return a row per rate, on two cards. The schedule is real, the model a stand-in."""
    rows = []
    for rate in rates:
        requests = poisson_requests(n_requests, rate, random.Random(seed))
        rows.append(measure_latency(requests, way, rate))
    return rows


def goodput(rows: Sequence[Latency]) -> int:
    """Return the highest rate with first tokens within 60 ms and later gaps within 5 ms, or 0."""
    kept = [row.rate for row in rows if row.first_token <= 60 and row.later_gap <= 5]
    return max(kept, default=0)


def show_load(trace, knobs) -> None:
    """Show first tokens and gaps under growing load, in four ways."""
    curves = {way: measure_load(way, (5, 10, 20, 40, 80), 80, knobs.seed)
              for way in ("static", "continuous", "chunked", "split")}
    kept = {way: goodput(rows) for way, rows in curves.items()}
    trace.say("In short: while few requests come, all ways but static batches are fast. As more "
              "come, first tokens or gaps get long, in some ways sooner than in others.")
    trace.say("A serving system is judged by its times under load. 80 requests with prompts of 64 "
              "to 448 tokens and answers of 8 to 56 come at random to two cards. They go to card "
              "1, card 2, card 1, …, or one card does the prefill and the other the decode (split, "
              "as in section 10). The scheduler runs for real, with a stand-in for the model. "
              "rate: requests per second for each card, so twice as many come in all. Chunked: at "
              f"most {priced_free_tokens()} tokens per step.")
    trace.ask("users were promised a first token within 60 ms and later gaps within 5 ms. Which "
              "way keeps that up to the highest rate: static, continuous, chunked or split?",
              max(kept, key=kept.get))
    trace.say("First tokens, ms after arrival (9 of 10 come within this time):")
    print_curves(trace, curves, "first_token", ".0f")
    trace.say("Gaps after the second token, ms (99 of 100 gaps are at most this long):")
    print_curves(trace, curves, "later_gap", ".1f")
    goodputs = ", ".join(f"{way} {rate or 'none'}" for way, rate in kept.items())
    trace.say("Users were promised first tokens within 60 ms (9 of 10) and later gaps within 5 ms "
              "(99 of 100). The highest of these rates that keeps the promise is the goodput: "
              f"{goodputs}. (On 20 sets of requests, chunks always had 40, the split 20 or 10, and "
              "whole prompts and static batches 5 or 10.)")
    trace.say("In static batches gaps are short, as no prompt joins a running batch, but everybody "
              "waits for the batch before. Continuous batching brings the first token sooner, but "
              "whole prompts make some gaps long; chunks keep them short. In the split, too, gaps "
              "are short, but one card must run all prompts. (Where a way cannot keep up, its "
              "queue grows as long as requests come; these figures only stop at 80 requests.)")
    trace.say("Two things here favour chunks. The cost model leaves out the overhead of each step, "
              f"so chunks of {priced_free_tokens()} tokens run nearly as fast as large ones. And "
              "the split gives each phase one card, whatever the work is.")
    busy = {way: rows[1:] for way, rows in curves.items()}  # from 10 requests a second on
    trace.check("from 10 a second on, static batches have the latest first tokens",
                all(static.first_token > max(row.first_token for row in others)
                    for static, *others in zip(*busy.values())), "at 4 rates")
    trace.check("from 10 a second on, chunks have shorter gaps than whole prompts",
                all(chunked.later_gap < whole.later_gap
                    for chunked, whole in zip(busy["chunked"], busy["continuous"])),
                "at 4 rates")
    trace.check("chunks have the highest goodput, static batches and whole prompts a lower one",
                max(kept["static"], kept["continuous"]) < kept["chunked"] == max(kept.values()),
                f"{kept['chunked']} requests a second and card")


def print_curves(trace, curves: dict[str, Sequence[Latency]], field: str, form: str) -> None:
    """Print one time of every way: a row per rate, a column per way."""
    table = []
    for rows in zip(*curves.values()):
        cells = {row.way: getattr(row, field) for row in rows}
        table.append({"rate": rows[0].rate, **cells})
    trace.table(table, {"rate": "d", **dict.fromkeys(curves, form)})


# 12. A smaller cache


def fp8_errors(model: Llama, texts: Sequence[Sequence[int]]) -> tuple[list[float], int]:
    """Read each text with a cache in FP8.

    Returns how far the logits of each text move, as a share of their standard deviation, and after
    how many tokens another next token becomes the likeliest.
    """
    errors = []
    changed = 0
    for text in texts:
        exact = model.forward(text)
        moved = model.forward(text, Fp8KVCache(model.config))
        changed += sum(argmax(a) != argmax(b) for a, b in zip(exact, moved))
        logits = list(itertools.chain(*exact))
        gaps = list(map(operator.sub, itertools.chain(*moved), logits))
        errors.append(math.sqrt(dot(gaps, gaps) / len(gaps)) / pstdev(logits))
    return errors, changed


def shuffled_verses(n: int, rng: random.Random) -> list[str]:
    """Return n verses with all clauses of the rhyme, in orders that the model has not read."""
    return ["This is " + " ".join(rng.sample(CLAUSES, len(CLAUSES))) for _ in range(n)]


def show_small_cache(trace, knobs) -> None:
    """Show how far a cache in FP8 moves the logits."""
    model = knobs.lab.model
    verses = shuffled_verses(3, random.Random(knobs.seed))
    texts = [knobs.lab.tokenizer.encode(verse) for verse in verses]
    errors, changed = fp8_errors(model, texts)
    n_tokens = sum(map(len, texts))
    trace.say("A cache of 8 bits per number takes half the bytes, so twice as many requests fit. "
              "FP8 (E4M3) rounds every number by itself, to a sign, 4 bits of exponent and 3 bits "
              f"of mantissa. With such a cache the model reads {len(texts)} verses, {n_tokens} "
              "tokens in all, whose clauses are in a new order.")
    trace.ask(f"after how many of the {n_tokens} tokens is another next token the likeliest than "
              "with the exact cache?", changed)
    trace.say(f"The logits move by {fmean(errors):.1%} of their own spread (both as root mean "
              f"squares), and at {changed} of {n_tokens} places another next token becomes the "
              "likeliest. (Of 20 models, each trained with a seed of its own, the logits moved by "
              "1.2% to 3.5%, and the likeliest token changed at 0 to 8 places.)")
    trace.check("the verses are not in the training text",
                all(verse not in TEXT for verse in verses), f"{len(verses)} verses")
    trace.check("rounding moves the logits, by less than a tenth of their standard deviation",
                min(errors) > 0 and max(errors) < 0.1, f"in each of {len(errors)} verses")
    trace.self_tests()
    trace.check("by hand: 1.07 becomes 1.125, as its neighbours are 1 and 1.125; 0.003 becomes 2 · "
                "2^-9; and 1000 becomes 448, the largest",
                list(map(nearest_e4m3, (1.07, 0.003, 1000))) == [1.125, 2 ** -8, 448], "3 numbers")


# =============================================================================================
# THE MODEL AND THE BENCH
# =============================================================================================

# The tiny Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, and Meta's
# names for the weights, so that they fit any implementation of Llama.


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama. ValueError where one does not divide another, or is below 1."""

    vocab_size: int
    dim: int         # channels of the residual stream
    n_layers: int
    n_heads: int     # query heads; they divide dim
    n_kv_heads: int  # key and value heads; they divide n_heads
    hidden_dim: int  # channels inside the feed-forward block
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        sizes = [self.vocab_size, self.dim, self.n_layers, self.n_heads, self.n_kv_heads,
                 self.hidden_dim]
        if min(sizes) < 1:
            raise ValueError(f"every size must be at least 1, not {self}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError(f"dim must be a multiple of 2 · n_heads, and n_heads of n_kv_heads, "
                             f"not {self}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name of a weight: its shape}."""
        kv_dim = self.n_kv_heads * self.head_dim
        layer_shapes = {
            "attention_norm": (self.dim,),
            "attention.wq": (self.dim, self.dim),
            "attention.wk": (kv_dim, self.dim),
            "attention.wv": (kv_dim, self.dim),
            "attention.wo": (self.dim, self.dim),
            "ffn_norm": (self.dim,),
            "feed_forward.w1": (self.hidden_dim, self.dim),
            "feed_forward.w2": (self.dim, self.hidden_dim),
            "feed_forward.w3": (self.hidden_dim, self.dim),
        }
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            for name, shape in layer_shapes.items():
                shapes[f"layers.{layer}.{name}"] = shape
        shapes["norm"] = (self.dim,)
        shapes["output"] = (self.vocab_size, self.dim)
        return shapes


class Llama:
    """weights: {name: matrix [out][in] or gain [dim]}, named and shaped as Config.shapes() says.

    inputs: what each operation read in the last forward(), under the operation's name. Of a matrix
    or a norm that is x, of an attention (q, k, v), of a SwiGLU its two sides. Training needs them.
    """

    def __init__(self, config: Config, weights: Weights):
        for name in config.shapes():
            if name not in weights:
                raise ValueError(f"weights must have {name!r}")
        self.config = config
        self.weights = weights
        self.inputs: dict[str, Matrix | tuple] = {}

    def forward(
        self,
        tokens: Sequence[int],
        cache=None,
        *,
        positions: Sequence[int] | None = None,
        mask: Sequence[Sequence[bool]] | None = None,
    ) -> Matrix:
        """Return logits [len(tokens)][vocab_size]: row i predicts what follows tokens[i].

        With a cache, the tokens come after those already in it, and their keys and values are added
        to it. positions: of each token in the text; the next ones unless given. mask[i][j]: may
        token i see key j? Unless given, it sees all keys up to its own.
        """
        c = self.config
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = range(start, start + len(tokens))
        x = [self.weights["tok_embeddings"][token] for token in tokens]
        for layer in range(c.n_layers):
            prefix = f"layers.{layer}."
            # Attention: every token gathers from the tokens before it.
            h = self.norm(prefix + "attention_norm", x)
            q = self.linear(prefix + "attention.wq", h)
            k = self.linear(prefix + "attention.wk", h)
            v = self.linear(prefix + "attention.wv", h)
            q = rope_heads(q, positions, c.n_heads, c.rope_base)
            k = rope_heads(k, positions, c.n_kv_heads, c.rope_base)
            if cache is not None:
                k, v = cache.update(layer, k, v)  # now those of all tokens so far
            self.inputs[prefix + "attention"] = (q, k, v)
            attended = attend(q, k, v, c.n_heads, c.n_kv_heads, mask)
            x = add(x, self.linear(prefix + "attention.wo", attended))
            # Feed-forward: every token is worked on by itself.
            h = self.norm(prefix + "ffn_norm", x)
            gate = self.linear(prefix + "feed_forward.w1", h)
            up = self.linear(prefix + "feed_forward.w3", h)
            self.inputs[prefix + "feed_forward"] = (gate, up)
            x = add(x, self.linear(prefix + "feed_forward.w2", swiglu(gate, up)))
        return self.linear("output", self.norm("norm", x))

    def linear(self, name: str, x: Matrix) -> Matrix:
        """Apply the matrix of that name. A subclass may do it differently."""
        self.inputs[name] = x
        return linear(x, self.weights[name])

    def norm(self, name: str, x: Matrix) -> Matrix:
        """Apply the RMSNorm whose gain has that name."""
        self.inputs[name] = x
        return rms_norm(x, self.weights[name], self.config.norm_eps)


# The operations of the model


def rms_norm(x: Matrix, gain: Vector, eps: float) -> Matrix:
    """Return gain · x / √(mean(x²) + eps), row by row (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    out = []
    for row in x:
        scale = 1 / math.sqrt(dot(row, row) / len(row) + eps)
        out.append([value * scale * g for value, g in zip(row, gain)])
    return out


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


def rope_heads(x: Matrix, positions: Sequence[int], n_heads: int, base: float) -> Matrix:
    """Return x [n][n_heads·head_dim] with every head rotated by rope()."""
    return concat(*(rope(head, positions, base) for head in split_heads(x, n_heads)))


def attend(q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int, mask=None) -> Matrix:
    """Return causal grouped-query attention [n_q][n_heads·head_dim].

    q [n_q][n_heads·head_dim], k and v [n_k][n_kv_heads·head_dim]; the queries are the last n_q of
    the n_k positions. mask: as in head_weights().
    """
    group = n_heads // n_kv_heads
    keys = split_heads(k, n_kv_heads)
    values = split_heads(v, n_kv_heads)
    heads = []
    for h, queries in enumerate(split_heads(q, n_heads)):
        channels = transpose(values[h // group])
        out = []
        for weights in head_weights(queries, keys[h // group], mask):
            out.append([dot(weights, channel[:len(weights)]) for channel in channels])
        heads.append(out)
    return concat(*heads)


def head_weights(q: Matrix, k: Matrix, mask: Sequence[Sequence[bool]] | None = None) -> Matrix:
    """Return softmax(q·k / √d) of one head; a query's row ends with its own key.

    mask[i][j] is False where query i must not see key j, although j comes before it.
    """
    scale = 1 / math.sqrt(len(k[0]))
    n_earlier = len(k) - len(q)
    rows = []
    for i, query in enumerate(q):
        scores = [dot(query, key) * scale for key in k[:n_earlier + i + 1]]
        if mask is not None:
            scores = [s if seen else -math.inf for s, seen in zip(scores, mask[i])]
        rows.append(softmax(scores))
    return rows


def swiglu(a: Matrix, b: Matrix) -> Matrix:
    """Return silu(a) · b, element by element, with silu(x) = x · sigmoid(x) (Shazeer 2020)."""
    return [[x * sigmoid(x) * y for x, y in zip(p, q)] for p, q in zip(a, b)]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), for any x."""
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def add(a: Matrix, b: Matrix) -> Matrix:
    """Return the sum, element by element."""
    return [list(map(operator.add, p, q)) for p, q in zip(a, b)]


def split_heads(x: Matrix, n_heads: int) -> list[Matrix]:
    """Return the heads of x: [n][n_heads·head_dim] -> n_heads matrices [n][head_dim].

    ValueError if n_heads does not divide the channels.
    """
    width = len(x[0]) if x else 0
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"n_heads must divide the {width} channels, and {n_heads} does not")
    head_dim = width // n_heads
    return [[row[h * head_dim:(h + 1) * head_dim] for row in x] for h in range(n_heads)]


def transpose(m: Matrix) -> list[tuple[float, ...]]:
    """Return m with rows and columns exchanged."""
    return list(zip(*m))


def concat(*blocks: Matrix) -> Matrix:
    """Return the blocks side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


# Training: skip this on a first reading
#
# The forward pass leaves in the model's .inputs what every operation read. The backward pass goes
# through the operations in the opposite order. Each takes the gradient of its output and returns
# those of its inputs, for whole matrices at a time, so that all the work is in dot() here as well.


def backward(model: Llama, tokens: Sequence[int], d_logits: Matrix) -> Weights:
    """Return {weight: its gradient} after forward(tokens), from the gradient of the logits."""
    c = model.config
    inputs = model.inputs
    gradients: Weights = {}
    unrotate = [-position for position in range(len(tokens))]

    def linear_back(name: str, d: Matrix) -> Matrix:
        d_x, gradients[name] = linear_backward(d, inputs[name], model.weights[name])
        return d_x

    def norm_back(name: str, d: Matrix) -> Matrix:
        d_x, gradients[name] = rms_norm_backward(d, inputs[name], model.weights[name], c.norm_eps)
        return d_x

    d = norm_back("norm", linear_back("output", d_logits))
    for layer in reversed(range(c.n_layers)):
        prefix = f"layers.{layer}."
        # Feed-forward: d goes past the block as it is, and through it.
        d_hidden = linear_back(prefix + "feed_forward.w2", d)
        d_gate, d_up = swiglu_backward(d_hidden, *inputs[prefix + "feed_forward"])
        d_h = add(linear_back(prefix + "feed_forward.w1", d_gate),
                  linear_back(prefix + "feed_forward.w3", d_up))
        d = add(d, norm_back(prefix + "ffn_norm", d_h))
        # Attention
        d_attended = linear_back(prefix + "attention.wo", d)
        d_q, d_k, d_v = attend_backward(d_attended, *inputs[prefix + "attention"],
                                        c.n_heads, c.n_kv_heads)
        d_q = rope_heads(d_q, unrotate, c.n_heads, c.rope_base)
        d_k = rope_heads(d_k, unrotate, c.n_kv_heads, c.rope_base)
        d_h = add(linear_back(prefix + "attention.wq", d_q),
                  linear_back(prefix + "attention.wk", d_k))
        d_h = add(d_h, linear_back(prefix + "attention.wv", d_v))
        d = add(d, norm_back(prefix + "attention_norm", d_h))
    # A token's gradient goes to its row of the embedding table.
    d_table = zeros_like(model.weights["tok_embeddings"])
    for token, row in zip(tokens, d):
        d_table[token] = list(map(operator.add, d_table[token], row))
    gradients["tok_embeddings"] = d_table
    return gradients


def linear_backward(d: Matrix, x: Matrix, w: Matrix) -> tuple[Matrix, Matrix]:
    """y = x wᵀ: return dx = d w and dw = dᵀ x."""
    d_x = linear(d, transpose(w))
    d_w = linear(transpose(d), transpose(x))
    return d_x, d_w


def rms_norm_backward(d: Matrix, x: Matrix, gain: Vector, eps: float) -> tuple[Matrix, Vector]:
    """y = gain · u, u = x / rms: return dx = (gain·d - u · mean(gain·d · u)) / rms and dgain."""
    d_x = []
    d_gain = [0.0] * len(gain)
    for d_row, row in zip(d, x):
        scale = 1 / math.sqrt(dot(row, row) / len(row) + eps)
        unit = [value * scale for value in row]
        pull = list(map(operator.mul, d_row, gain))
        mean = dot(pull, unit) / len(row)
        d_x.append([(p - u * mean) * scale for p, u in zip(pull, unit)])
        d_gain = [total + slope * u for total, slope, u in zip(d_gain, d_row, unit)]
    return d_x, d_gain


def attend_backward(
    d: Matrix, q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int
) -> tuple[Matrix, Matrix, Matrix]:
    """Return dq, dk and dv of attend(). With S = q kᵀ / √d, P = softmax(S), out = P v:

    dv = Pᵀ d,  dP = d vᵀ,  dS = P · (dP - rowsum(P · dP)),  dq = dS k / √d,  dk = dSᵀ q / √d.
    """
    group = n_heads // n_kv_heads
    keys = split_heads(k, n_kv_heads)
    values = split_heads(v, n_kv_heads)
    d_queries = []
    d_keys = [zeros_like(head) for head in keys]
    d_values = [zeros_like(head) for head in values]
    for h, (queries, d_head) in enumerate(zip(split_heads(q, n_heads), split_heads(d, n_heads))):
        g = h // group
        scale = 1 / math.sqrt(len(queries[0]))
        # The weights, with zeros for the keys that a query does not see.
        p = [row + [0.0] * (len(k) - len(row)) for row in head_weights(queries, keys[g])]
        d_s = []
        for weights, d_p in zip(p, linear(d_head, values[g])):
            mean = dot(weights, d_p)
            d_s.append([w * (slope - mean) * scale for w, slope in zip(weights, d_p)])
        d_q, d_k = linear_backward(d_s, queries, keys[g])  # S is linear in q, with weights k
        d_queries.append(d_q)
        d_keys[g] = add(d_keys[g], d_k)
        d_values[g] = add(d_values[g], linear(transpose(p), transpose(d_head)))
    return concat(*d_queries), concat(*d_keys), concat(*d_values)


def swiglu_backward(d: Matrix, a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """y = a σ(a) · b: return da = d · b · σ(a) · (1 + a·(1 - σ(a))) and db = d · a σ(a)."""
    d_a = []
    d_b = []
    for d_row, a_row, b_row in zip(d, a, b):
        gates = list(map(sigmoid, a_row))
        d_a.append([slope * y * s * (1 + x * (1 - s))
                    for slope, x, y, s in zip(d_row, a_row, b_row, gates)])
        d_b.append([slope * x * s for slope, x, s in zip(d_row, a_row, gates)])
    return d_a, d_b


def cross_entropy(logits: Matrix, targets: Sequence[int]) -> tuple[float, Matrix]:
    """Return the mean of -log softmax(logits)[target] in nats, and its gradient in the logits."""
    loss = 0.0
    d_logits = []
    for row, target in zip(logits, targets):
        p = softmax(row)
        loss -= math.log(p[target]) / len(targets)
        p[target] -= 1
        d_logits.append([value / len(targets) for value in p])
    return loss, d_logits


def loss_and_gradients(
    config: Config, weights: Weights, tokens: Sequence[int]
) -> tuple[float, Weights]:
    """Return the mean loss of predicting each token from those before it, and its gradients."""
    model = Llama(config, weights)
    loss, d_logits = cross_entropy(model.forward(tokens[:-1]), tokens[1:])
    return loss, backward(model, tokens[:-1], d_logits)


class Adam:
    """Steps scaled by running means of the gradient and of its square (Kingma & Ba 2015)."""

    def __init__(self, weights: Weights, beta1: float = 0.7, beta2: float = 0.95):
        self.rows = {name: as_rows(w) for name, w in weights.items()}
        self.mean = {name: zeros_like(rows) for name, rows in self.rows.items()}
        self.square = {name: zeros_like(rows) for name, rows in self.rows.items()}
        self.beta1 = beta1
        self.beta2 = beta2
        self.steps = 0

    def step(self, gradients: Weights, learning_rate: float) -> None:
        """Change the weights, in place."""
        self.steps += 1
        b1 = self.beta1
        b2 = self.beta2
        # The means start at zero; these undo that.
        rate = learning_rate / (1 - b1 ** self.steps)
        unbias = 1 / (1 - b2 ** self.steps)
        for name, gradient in gradients.items():
            rows = zip(self.rows[name], as_rows(gradient), self.mean[name], self.square[name])
            for w, d, m, v in rows:
                for i, slope in enumerate(d):
                    m[i] = b1 * m[i] + (1 - b1) * slope
                    v[i] = b2 * v[i] + (1 - b2) * slope * slope
                    w[i] -= rate * m[i] / (math.sqrt(v[i] * unbias) + 1e-8)


def as_rows(w: Matrix | Vector) -> Matrix:
    """Return a matrix as it is, and a vector as a matrix of one row; the numbers are not copied."""
    return w if isinstance(w[0], list) else [w]


def zeros_like(m: Matrix) -> Matrix:
    """Return zeros in the shape of m."""
    return [[0.0] * len(row) for row in m]


def init_weights(config: Config, rng: random.Random) -> Weights:
    """Return first weights: gains 1, embeddings of size 1, matrices of size 1/√in.

    Matrices that write to the residual stream get half of that.
    """
    weights: Weights = {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            weights[name] = [1.0] * shape[0]
            continue
        size = 1.0 if name == "tok_embeddings" else 1 / math.sqrt(shape[1])
        if name.endswith(("wo", "w2")):
            size /= 2
        weights[name] = [[rng.gauss(0, size) for _ in range(shape[1])] for _ in range(shape[0])]
    return weights


def train(
    config: Config,
    ids: Sequence[int],
    rng: random.Random,
    steps: int,
    length: int,
    learning_rate: float = 0.02,
) -> tuple[Llama, list[float]]:
    """Return a Llama that has read ids, `length` tokens a step, and the loss of each step.

    At the end of ids it starts again. The learning rate rises for 10 steps and then falls to 0.
    Progress goes to stderr where that is a terminal.
    """
    model = Llama(config, init_weights(config, rng))
    adam = Adam(model.weights)
    watched = sys.stderr is not None and sys.stderr.isatty()
    losses = []
    for step in range(steps):
        start = step * length % (len(ids) - length)
        loss, gradients = loss_and_gradients(config, model.weights, ids[start:start + length + 1])
        adam.step(gradients, learning_rate * min(1, (step + 1) / 10) * (1 - step / steps))
        losses.append(loss)
        if watched:
            print(f"\rtraining the tiny Llama: step {step + 1} of {steps}, loss {loss:.2f} ",
                  end="", file=sys.stderr)
    if watched:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return model, losses


# The bench: what the experiments of this script share

# The card and the model of the cost model: NVIDIA's A100 data sheet; Llama team 2024,
# arXiv:2407.21783, and its model card
PRICED_GPU = Gpu("A100 80GB SXM", 312e12, 2039e9, 80e9)
PRICED_MODEL = ServedModel("Llama 3.1 8B", 8.03e9, 128256, 4096, 32, 8, 128)


def priced_free_tokens() -> int:
    """Return free_tokens() for the card and the weights of the engines' cost model."""
    return free_tokens(PRICED_GPU, PRICED_WEIGHT_BYTES)


@dataclass
class ServingLab:
    """What the sections share: the tokenizer, and the tiny Llama, trained when it is needed."""

    seed: int

    def __post_init__(self):
        self.tokenizer = Tokenizer.train(TEXT, VOCAB_SIZE)
        self.text_ids = self.tokenizer.encode(TEXT)
        self.config = Config(len(self.tokenizer.vocab), **SIZES)
        self.answers: dict[Request, list[int]] = {}

    @functools.cached_property
    def model(self) -> Llama:
        """The trained model."""
        model, _ = train(self.config, self.text_ids, random.Random(self.seed), **TRAINING)
        return model

    def solo_tokens(self, requests: Sequence[Request]) -> list[list[int]]:
        """Return the new tokens that each request gets when it is alone, with a plain KVCache."""
        for request in requests:
            if request not in self.answers:
                self.answers[request] = generate(
                    self.model, request.prompt, request.max_new_tokens, KVCache(self.config))
        return [self.answers[request] for request in requests]


class StandIn:
    """What takes the place of the model in an engine where only the schedule matters.

    It fills slots with nothing. Its logits are the same for every token, so it picks token 0.
    """

    def __init__(self):
        self.config = Config(1, 2, 1, 1, 1, 1)

    def forward(self, tokens: Sequence[int], cache: PagedKVCache) -> Matrix:
        """Return logits of the last token only; the tokens are in the cache afterwards.

        The engine has reserved their slots.
        """
        cache.length += len(tokens)
        return [[0.0]]


class WatchedLlama:
    """A Llama that keeps, of every forward(), how many tokens were run and the last logits."""

    def __init__(self, model: Llama):
        self.model = model
        self.n_run: list[int] = []
        self.logits: Matrix = []

    def forward(self, tokens: Sequence[int], cache: KVCache | None) -> Matrix:
        """Return what the model returns."""
        logits = self.model.forward(tokens, cache)
        self.n_run.append(len(tokens))
        self.logits.append(logits[-1])
        return logits


def plenty(requests: Sequence[Request], budget: int = 2048, max_num_seqs: int = 32) -> dict:
    """Return settings under which memory is never short. budget: tokens per step.

    A budget must have a token for each running request, so it limits them as well.
    """
    return dict(num_blocks=sum(blocks_for(request, 16) for request in requests), block_size=16,
                max_num_seqs=min(max_num_seqs, budget), max_num_batched_tokens=budget)


def serve_plenty(
    model: Llama, requests: Sequence[Request], policy: str = "continuous", **limits: int
) -> Report:
    """Return serve()'s report for plenty of memory. limits: those of plenty(), by name."""
    return serve(model, requests, policy=policy, **plenty(requests, **limits))


def serve_by_hand(sizes: Sequence[tuple[int, int]], num_blocks: int, budget: int) -> Report:
    """Return the report of a stand-in, with blocks of 4, two places, and prompts that are cut up.

    sizes: (tokens of the prompt, new tokens) of each request. budget: tokens per step.
    """
    requests = [Request((0,) * n_prompt, n_new) for n_prompt, n_new in sizes]
    return serve(StandIn(), requests, policy="chunked", num_blocks=num_blocks, block_size=4,
                 max_num_seqs=2, max_num_batched_tokens=budget)


def slots_needed(requests: Sequence[Request]) -> list[int]:
    """Return how many tokens each request has to run, and so to cache: all but its last new one."""
    return [len(request.prompt) + request.max_new_tokens - 1 for request in requests]


def contents(caches: Sequence[KVCache | PagedKVCache]) -> Matrix:
    """Return all keys and values of the caches, cache by cache and layer by layer, a row per token.

    Attention does not mind the order of its keys. A comparison of these rows does.
    """
    rows = []
    for cache in caches:
        for layer in range(cache.config.n_layers):
            keys, values = cache.update(layer, [], [])
            rows += concat(keys, values)
    return rows


def contents_alone(model: Llama, texts: Sequence[Sequence[int]]) -> Matrix:
    """Return contents() of a KVCache for each text; the last token was not run."""
    caches = []
    for text in texts:
        caches.append(KVCache(model.config))
        model.forward(text[:-1], caches[-1])
    return contents(caches)


def first_tokens(states: Sequence[RequestState]) -> list[float]:
    """Return the milliseconds from each request's arrival to its first token."""
    return [(state.times[0] - state.request.arrival) * 1e3 for state in states]


def token_gaps(states: Sequence[RequestState], first: int = 0) -> list[float]:
    """Return the milliseconds between each new token and the next one of its request.

    first: gaps before this token of a request are left out. [0.0] if there are no gaps.
    """
    gaps = []
    for state in states:
        for earlier, later in zip(state.times[first:], state.times[first + 1:]):
            gaps.append((later - earlier) * 1e3)
    return gaps or [0.0]


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


# The sections of the trace, and the knobs

SECTIONS = [
    Section("Generation without a cache, and with one", show_cache, [KVCache, generate]),
    Section("Prefill and decode have different limits", show_intensity,
            [step_seconds, batch_at_ridge, kv_bytes_per_token]),
    Section("Paged attention", show_paging, [BlockPool, PagedKVCache]),
    Section("Sharing: reference counts and copy on write", show_sharing,
            [fork, copy_last_block, BlockPool]),
    Section("Prefix caching", show_prefix_caching,
            [hash_block, register_blocks, adopt_prefix, CachingEngine]),
    Section("Continuous batching", show_continuous, [serve, Engine]),
    Section("Chunked prefill", show_chunked, [serve, Engine, free_tokens]),
    Section("What paging saves", show_waste, [slot_waste], core=False),
    Section("Running out of blocks", show_preemption, [Engine, SwappingEngine], core=False),
    Section("Prefill here, decode there", show_split, [serve_split, PrefillEngine, DecodeEngine],
            core=False),
    Section("Latency against load", show_load, [serve, Engine, serve_split], core=False),
    Section("A smaller cache", show_small_cache, [nearest_e4m3, Fp8KVCache], core=False),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace and return the exit status."""
    parser = common_parser("microkv", "The KV cache of a tiny Llama, and what serving engines do "
                           "about it.", len(SECTIONS))
    parser.add_argument("--prompt", default=PROMPT, help="what to go on from (default: "
                                                         f"{PROMPT!r})")

    def add_number(option: str, default: int, highest: int, what: str) -> None:
        parser.add_argument(option, metavar="N", type=whole_number(1, highest), default=default,
                            help=f"{what} (default {default})")

    add_number("--max-new-tokens", MAX_NEW_TOKENS, 64, "tokens to generate in sections 1 and 3")
    add_number("--block-size", BLOCK_SIZE, 64, "tokens a block holds")
    add_number("--max-num-seqs", MAX_NUM_SEQS, 64,
               "requests that may run at the same time, sections 6 and 9")
    add_number("--max-num-batched-tokens", MAX_NUM_BATCHED_TOKENS, 9999,
               "tokens a step may run where prompts are cut up, section 7; the running requests "
               "get one each in any case")
    parser.add_argument("--num-blocks", metavar="N", type=whole_number(1, 999),
                        help="blocks in the pool of section 9 (default: twice what the largest "
                        "request needs, and just that)")
    knobs = parser.parse_args(argv)

    knobs.lab = ServingLab(knobs.seed)
    try:
        knobs.prompt_ids = knobs.lab.tokenizer.encode(knobs.prompt)
    except ValueError as error:
        parser.error(f"argument --prompt: {error}")
    if not 1 <= len(knobs.prompt_ids) <= 64:
        parser.error(f"argument --prompt: {len(knobs.prompt_ids)} tokens; it must have 1 to 64")
    knobs.requests = make_requests(knobs.lab.tokenizer, random.Random(knobs.seed))
    smallest = max(blocks_for(request, knobs.block_size) for request in knobs.requests)
    if knobs.num_blocks and knobs.num_blocks < smallest:
        parser.error(f"argument --num-blocks: the largest request needs {smallest} blocks of "
                     f"{knobs.block_size}, so {smallest} or more, not {knobs.num_blocks}")
    return run_sections(SECTIONS, knobs,
                        "python3 microkv.py --section 9 --num-blocks 8 --max-num-seqs 8")


if __name__ == "__main__":
    sys.exit(main())
