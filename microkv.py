#!/usr/bin/env python3
"""Why generation is memory-bound, and how serving engines live with it.

A language model writes one token at a time, and every token looks back at all those before it. Keeping their
keys and values, the KV cache, saves nearly all of the work; then the cache itself becomes the problem: it grows
with every token, it must be read for every token, and it decides how many people one card can serve. This
script trains a tiny Llama before your eyes and does with it what vLLM does with a large one: pages the cache,
shares blocks, batches continuously, splits long prompts, and survives running out of memory. Everything
that is claimed is run through the model, and every request's tokens must stay those it would get alone.

Run it (`python microkv.py`), read the trace, then read on from here in order: every section of the trace is a
section of this file. The model and its training come last; the chapter is about the cache.

The papers:
  Williams et al., Roofline: An Insightful Visual Performance Model, CACM 2009            section 2
  Kwon et al., Efficient Memory Management for Large Language Model Serving with
    PagedAttention, 2023, arXiv:2309.06180 (vLLM)                                         sections 4, 5, 9
  Yu et al., Orca: A Distributed Serving System for Transformer-Based Generative
    Models, OSDI 2022                                                                     section 7
  Agrawal et al., SARATHI: Efficient LLM Inference by Piggybacking Decodes with Chunked
    Prefills, 2023, arXiv:2308.16369; Sarathi-Serve, 2024, arXiv:2403.02310               section 8
  Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, 2023,
    arXiv:2311.18677                                                                      section 10
  Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, 2024,
    arXiv:2402.02750                                                                      section 11
"""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from statistics import fmean
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]

PROMPT = "This is the"
MAX_NEW_TOKENS = 24          # tokens to generate in sections 1, 4 and 5
BLOCK_SIZE = 4               # tokens a block holds (vLLM: 16)
MAX_NUM_SEQS = 4             # requests that may run at the same time
MAX_NUM_BATCHED_TOKENS = 24  # tokens a step may compute where prompts are cut up, section 8
VOCAB_SIZE = 160             # every word of TEXT is then one token
SIZES = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=32)
TRAINING = dict(steps=54, length=26)  # length: tokens a step


# =============================================================================================
# THE TECHNIQUES
# =============================================================================================


# 1. Generation without a cache, and with one
#
# To predict the next token, the model needs the keys and values of all tokens before it. Without a cache it
# computes them all again at every step: step t runs t tokens through every matrix. But the key and value of a
# token depend on nothing that comes later, so they never change. Keep them, and a step runs one token:
#
#     without: n steps from nothing cost 1 + 2 + … + n = n(n + 1)/2 tokens        with: n tokens
#
# The cache changes what is computed again, not what is computed: same tokens, same logits.


class KVCache:
    """The keys and values of all tokens so far: a list of each per layer, which grows."""

    def __init__(self, config: Config):
        self.keys: list[Matrix] = [[] for _ in range(config.n_layers)]
        self.values: list[Matrix] = [[] for _ in range(config.n_layers)]

    @property
    def length(self) -> int:
        """Tokens in it."""
        return len(self.keys[-1])  # the last layer is the last to be written

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Add the new tokens' k and v [n][n_kv_heads·head_dim] of a layer; the keys and values of all tokens."""
        self.keys[layer] += k
        self.values[layer] += v
        return self.keys[layer], self.values[layer]


def generate(model: Llama, prompt: Sequence[int], max_new_tokens: int, cache=None) -> list[int]:
    """The new tokens, each the likeliest next one (greedy). With a cache: prefill what it lacks, then one a step.

    ValueError for an empty prompt, a negative max_new_tokens, or a cache that holds the whole prompt already.
    """
    if not prompt or max_new_tokens < 0:
        raise ValueError(f"prompt must have a token and max_new_tokens be at least 0, not {len(prompt)} tokens "
                         f"and {max_new_tokens}")
    if cache is not None and cache.length >= len(prompt):
        raise ValueError(f"cache must hold less than the prompt, whose last token is needed for its logits; it holds "
                         f"{cache.length} of {len(prompt)} tokens")
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        tokens.append(argmax(model.forward(tokens[0 if cache is None else cache.length:], cache)[-1]))
    return tokens[len(prompt):]


def argmax(logits: Vector) -> int:
    """The first index of the largest."""
    return logits.index(max(logits))


# 2. Prefill and decode are different machines
#
# A step must read all the weights, and the cache, from memory, whatever it does with them. Divide its work by that:
#
#     arithmetic intensity = FLOPs / bytes moved            ridge = peak FLOP/s / bandwidth of the card
#
# Below the ridge the card waits for memory, above it for arithmetic (Williams et al. 2009, the roofline model).
# Prefill uses every weight once per token of the prompt, decode once: about one FLOP per byte at 16 bits, where
# the cards want hundreds. Batching lets many requests share one reading of the weights. It does not let them
# share one reading of their caches, as each has its own: that is why the cache's size decides.


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


@dataclass(frozen=True)
class ServedModel:
    """A published configuration (16-bit weights and cache), as far as serving goes."""
    name: str
    parameters: float
    n_layers: int
    n_kv_heads: int
    head_dim: int
    source: str

    @property
    def kv_bytes(self) -> float:
        """Bytes of cache a token takes."""
        return kv_bytes_per_token(self.n_layers, self.n_kv_heads, self.head_dim)


SERVED_MODELS = [
    ServedModel("Llama 2 7B", 6.74e9, 32, 32, 128, "Touvron et al. 2023, arXiv:2307.09288; model card"),
    ServedModel("Mistral 7B", 7.24e9, 32, 8, 128, "Jiang et al. 2023, arXiv:2310.06825; model card"),
    ServedModel("Llama 3.1 8B", 8.03e9, 32, 8, 128, "Llama team 2024, arXiv:2407.21783; model card"),
    ServedModel("Llama 2 13B", 13.02e9, 40, 40, 128, "Touvron et al. 2023, arXiv:2307.09288; model card"),
    ServedModel("Llama 3.1 70B", 70.6e9, 80, 8, 128, "Llama team 2024, arXiv:2407.21783; model card")]
LLAMA_8B = SERVED_MODELS[2]


def step_seconds(card: Card, model: ServedModel, new_tokens: float, cached_tokens: float,
                 weight_bytes: float = 2) -> tuple[float, float]:
    """(seconds of arithmetic, seconds of reading) of a step that runs new_tokens; cached_tokens are read.

    Arithmetic: 2 FLOPs a parameter and token (attention itself, small at these lengths, is left out). Reading:
    the weights once, whatever the batch, and the caches of all requests in it. The step takes the longer one.
    """
    return (2 * model.parameters * new_tokens / card.flops,
            (model.parameters * weight_bytes + cached_tokens * model.kv_bytes) / card.hbm_bytes_per_s)


def kv_bytes_per_token(n_layers: int, n_kv_heads: int, head_dim: int, bytes_per_value: float = 2) -> float:
    """Bytes that one token adds to the KV cache of MHA, GQA or MQA: a key and a value per layer and KV head."""
    return 2 * n_layers * n_kv_heads * head_dim * bytes_per_value


# 3. The cache's size
#
#     2 · n_layers · n_kv_heads · head_dim · bytes per value, for every token of every request
#
# The weights are paid once; this is paid for each user, and grows with every word.


# 4. Paged attention
#
# A request's final length is unknown. Reserve the longest possible as one piece, and most of it stays empty.
# PagedAttention (Kwon et al. 2023) does what operating systems do: memory is cut into blocks of block_size
# tokens; a request's block table says in which physical block each of its logical blocks lies; blocks are handed
# out one at a time, as the text grows, from anywhere in the pool. Token p of a request lies in
#
#     slot = block_table[p // block_size] · block_size + p % block_size
#
# so at most block_size - 1 slots of a request are ever idle. The model reads its keys and values through the
# table. (vLLM's kernel walks the table block by block on the GPU; here the rows are looked up one by one.)


class BlockPool:
    """num_blocks physical blocks of block_size slots; a slot holds one token's keys and values of every layer.

    A block is free when nobody refers to it (ref_count 0). Free blocks are handed out least recently used
    first, and keep what is in them until then: section 6 finds it again by its hash.
    """

    def __init__(self, num_blocks: int, block_size: int):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"num_blocks and block_size must be at least 1, not {num_blocks} and {block_size}")
        self.num_blocks, self.block_size = num_blocks, block_size
        self.ref_count = [0] * num_blocks
        self.free_blocks = OrderedDict.fromkeys(range(num_blocks))  # an ordered set, oldest first
        self.slots: list[dict[int, tuple[Vector, Vector]]] = [{} for _ in range(num_blocks * block_size)]  # layer: k, v
        self.block_of: dict[str, int] = {}   # hash -> block with that content (section 6)
        self.hash_of: dict[int, str] = {}    # and back

    @property
    def num_free_blocks(self) -> int:
        """Blocks that allocate() can hand out."""
        return len(self.free_blocks)

    def allocate(self) -> int:
        """A free block, now with one reference; nobody finds what it held any more. ValueError if none is free."""
        if not self.free_blocks:
            raise ValueError(f"all {self.num_blocks} blocks are in use; free some, or make num_blocks larger")
        block, _ = self.free_blocks.popitem(last=False)
        if (old := self.hash_of.pop(block, None)) is not None:
            del self.block_of[old]  # evicted from the prefix cache
        self.ref_count[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference; a free block that still holds what is wanted comes back into use."""
        self.free_blocks.pop(block, None)
        self.ref_count[block] += 1

    def free(self, block: int) -> None:
        """One reference less; at none the block is free, last in line to be handed out. ValueError if it was free."""
        if self.ref_count[block] < 1:
            raise ValueError(f"block {block} is free already")
        self.ref_count[block] -= 1
        if self.ref_count[block] == 0:
            self.free_blocks[block] = None


class PagedKVCache:
    """One request's cache: a block table into a pool. Serves Llama.forward as KVCache does."""

    def __init__(self, pool: BlockPool, config: Config):
        self.pool, self.config, self.length = pool, config, 0
        self.block_table: list[int] = []

    def slot(self, position: int) -> int:
        """The physical slot of a position."""
        block, offset = divmod(position, self.pool.block_size)
        return self.block_table[block] * self.pool.block_size + offset

    def blocks_needed(self, n_new: int) -> int:
        """How many blocks reserve(n_new) would take from the pool."""
        total = -(-(self.length + n_new) // self.pool.block_size)
        return total - len(self.block_table) + (n_new > 0 and self.last_is_shared())

    def last_is_shared(self) -> bool:
        """Is the next token to be written into a block that others refer to as well?"""
        block = self.length // self.pool.block_size
        return block < len(self.block_table) and self.pool.ref_count[self.block_table[block]] > 1

    def reserve(self, n_new: int) -> None:
        """Make room for n_new tokens. ValueError, and nothing changed, if the pool has not enough free blocks."""
        if self.blocks_needed(n_new) > self.pool.num_free_blocks:
            raise ValueError(f"{n_new} tokens need {self.blocks_needed(n_new)} more blocks, and "
                             f"{self.pool.num_free_blocks} are free; make num_blocks larger")
        if n_new and self.last_is_shared():  # copy on write (section 5)
            size, (logical, filled) = self.pool.block_size, divmod(self.length, self.pool.block_size)
            shared, own = self.block_table[logical], self.pool.allocate()
            for i in range(filled):
                self.pool.slots[own * size + i] = dict(self.pool.slots[shared * size + i])
            self.block_table[logical] = own
            self.pool.free(shared)
        while len(self.block_table) * self.pool.block_size < self.length + n_new:
            self.block_table.append(self.pool.allocate())

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Write the new tokens' k and v of a layer into their slots; the keys and values of all, read by the table.

        Reserves what is missing. The tokens count in length once the last layer has them.
        """
        self.reserve(len(k))
        for position, row in enumerate(zip(k, v), self.length):
            self.pool.slots[self.slot(position)][layer] = row
        rows = [self.pool.slots[self.slot(position)][layer] for position in range(self.length + len(k))]
        if layer == self.config.n_layers - 1:
            self.length += len(k)
        return [key for key, _ in rows], [value for _, value in rows]

    def fork(self) -> PagedKVCache:
        """A second cache with the same content, in the same blocks: no copy, one more reference each (section 5)."""
        twin = PagedKVCache(self.pool, self.config)
        filled = -(-self.length // self.pool.block_size)  # blocks only reserved so far stay ours alone
        twin.block_table, twin.length = self.block_table[:filled], self.length
        for block in twin.block_table:
            self.pool.share(block)
        return twin

    def free(self) -> None:
        """Give all blocks back, the last first: the beginning of a text is the likeliest to be wanted again."""
        for block in reversed(self.block_table):
            self.pool.free(block)
        self.block_table, self.length = [], 0


@dataclass
class Waste:
    """Slots of a memory, summed over steps, by what became of them (Kwon et al. 2023)."""
    used: int = 0       # hold a token
    reserved: int = 0   # will hold one before the request ends
    internal: int = 0   # set aside, and the request ends without having used them
    free: int = 0       # not set aside; while somebody waits, that is external fragmentation

    def shares(self) -> list[str]:
        """Each as a share of all."""
        counts = [self.used, self.reserved, self.internal, self.free]
        return [f"{count / sum(counts):.0%}" for count in counts]


def contiguous_waste(lengths: Sequence[tuple[int, int]], size: int, reserve: Callable[[int], int]) -> Waste:
    """Requests of (prompt, final) tokens, each kept in one piece of reserve(final) slots, for as long as some wait.

    First come, first served; a request takes the first gap it fits. It is there for a step with its prompt, one with
    a token more, …, one with all; then it goes. ValueError for a piece larger than size, the slots there are.
    """
    waiting, placed, waste = deque(lengths), [], Waste()  # placed: [start, length of the piece, tokens now, final]
    while waiting:
        piece, start = reserve(waiting[0][1]), 0
        for other, length, _, _ in sorted(placed):
            if start + piece <= other:
                break
            start = other + length
        if start + piece <= size:
            placed.append([start, piece, *waiting.popleft()])
            continue
        if not placed:
            raise ValueError(f"size must be at least {piece}, for the piece a request reserves, not {size}")
        waste.used += sum(now for _, _, now, _ in placed)
        waste.reserved += sum(final - now for _, _, now, final in placed)
        waste.internal += sum(length - final for _, length, _, final in placed)
        waste.free += size - sum(length for _, length, _, _ in placed)
        placed = [[start, length, now + 1, final] for start, length, now, final in placed if now < final]
    return waste


def paged_waste(model: Llama, requests: Sequence[Request], num_blocks: int, block_size: int) -> tuple[Waste, int]:
    """The same for a pool of blocks, by the engine of section 7; and the most idle slots any request ever had."""
    engine = Engine(model, requests, num_blocks=num_blocks, block_size=block_size, max_num_seqs=len(requests),
                    max_num_batched_tokens=1024)
    schedule, waste, most_idle = engine.schedule, Waste(), 0

    def counting() -> list[tuple[RequestState, int]]:
        nonlocal most_idle
        work = schedule()
        idle = [len(state.cache.block_table) * block_size - state.cache.length - n for state, n in work]
        most_idle = max(most_idle, *idle)
        if engine.waiting:
            waste.used += sum(state.cache.length + n for state, n in work)
            waste.internal += sum(idle)
            waste.free += engine.pool.num_free_blocks * block_size
        return work

    engine.schedule = counting
    engine.run()
    return waste, most_idle


# 5. Sharing: reference counts and copy on write
#
# Several answers to one prompt need its keys and values once. fork() copies the block table, not the blocks, and
# each block counts its references. Full blocks are never written again, so sharing them is safe. The last,
# half-full one is: whoever writes into a block with more than one reference takes a copy of it first and writes
# into that (copy on write). When the references to a block are down to none, it is free.


# 6. Prefix caching
#
# Requests often begin alike: a system prompt, a conversation so far. A full block's content depends on its own
# tokens and on all tokens before them, so name it by a hash of both, its parent block's hash standing for what
# came before:
#
#     hash(block i) = H(hash(block i - 1), tokens of block i)
#
# A new request walks down its own chain of hashes; as long as the pool knows them, it takes those blocks and skips
# their computation. Free blocks keep their content until they are handed out, least recently used first, so even
# the blocks of finished requests are found. The last token of a prompt is always computed, cached or not:
# what is cached are keys and values, and what the request needs is the logits after that token. (vLLM does this.
# SGLang keeps a radix tree instead of hashes: the same idea, token by token instead of block by block.)


def hash_block(parent_hash: str, token_ids: Sequence[int]) -> str:
    """A full block's name: SHA-256, in hex, of "<the parent's name, empty for the first>|<tokens with commas>"."""
    return hashlib.sha256(f"{parent_hash}|{','.join(map(str, token_ids))}".encode()).hexdigest()


def block_hashes(tokens: Sequence[int], block_size: int) -> list[str]:
    """The hash chain of all full blocks of tokens."""
    hashes = [""]
    for end in range(block_size, len(tokens) + 1, block_size):
        hashes.append(hash_block(hashes[-1], tokens[end - block_size:end]))
    return hashes[1:]


def register_blocks(cache: PagedKVCache, tokens: Sequence[int]) -> None:
    """Make the full blocks of a cache that holds these tokens findable; of two alike the first keeps the name."""
    pool = cache.pool
    for block, name in zip(cache.block_table, block_hashes(tokens[:cache.length], pool.block_size)):
        if name not in pool.block_of and block not in pool.hash_of:
            pool.block_of[name], pool.hash_of[block] = block, name


def adopt_prefix(cache: PagedKVCache, tokens: Sequence[int]) -> int:
    """Fill an empty cache with the longest run of full blocks that the pool knows; how many tokens that skips.

    The last token is left to be computed: its logits are needed.
    """
    for name in block_hashes(tokens[:len(tokens) - 1], cache.pool.block_size):
        if name not in cache.pool.block_of:
            break
        block = cache.pool.block_of[name]
        cache.pool.share(block)
        cache.block_table.append(block)
        cache.length += cache.pool.block_size
    return cache.length


# 7. Continuous batching
#
# Reading the weights is most of a decode step, so requests should share steps. A static batch starts together and
# ends with its longest member: finished ones sit in their places, new ones wait outside. Orca (Yu et al. 2022)
# decides anew at every step: whoever is done leaves, whoever waits and fits comes in. A scheduler in vLLM's words:
# requests are waiting, running, or preempted back to waiting; a step has room for max_num_seqs requests and
# max_num_batched_tokens tokens, and every request needs free blocks for what it will write.
#
# The model really runs every step here, request by request. (An engine runs all tokens of a step through each
# matrix at once. The rows do not mix, so the numbers are the same, but for rounding on a GPU, where the shape of a
# batch changes the order of sums.) The clock is one stated cost model: a step takes step_seconds() of Llama 3.1 8B
# on an A100, with 4-bit weights, so that 38 tokens a step, as many as our short texts have, already use up the card.


PRICED_WEIGHT_BYTES = 0.5   # a weight, 4 bits   # a weight, 4 bits
PCIE = 32e9                 # bytes/s each way, PCI Express 4.0 with 16 lanes (A100 data sheet: 64 GB/s both ways)                 # bytes/s


@dataclass(frozen=True)
class Request:
    """What a user asks for, and when: arrival in seconds on the engine's clock."""
    prompt: Sequence[int]
    max_new_tokens: int
    arrival: float = 0


@dataclass(eq=False)
class RequestState:
    """A request on its way: its tokens so far, its cache, and when each new token came."""
    number: int
    request: Request
    tokens: list[int]
    cache: PagedKVCache
    times: list[float] = field(default_factory=list)
    stash: list[dict] | None = None  # its slots' contents while they are not in the pool
    found: int = 0                   # tokens that prefix caching spared it
    swapped: bool = False            # is the stash in the host's memory, a PCIe transfer away?

    @property
    def done(self) -> bool:
        """Has it all its tokens?"""
        return len(self.tokens) == len(self.request.prompt) + self.request.max_new_tokens


@dataclass
class Report:
    """What serve() did."""
    states: list[RequestState]
    max_num_seqs: int
    steps: list[tuple[float, float, dict[int, int]]] = field(default_factory=list)  # start, end, {request: tokens}
    preempted: list[tuple[int, int]] = field(default_factory=list)                  # step, request
    swapped_tokens: int = 0                                                         # moved to the host or back

    @property
    def tokens(self) -> list[list[int]]:
        """Every request's new tokens."""
        return [state.tokens[len(state.request.prompt):] for state in self.states]

    @property
    def times(self) -> list[list[float]]:
        """When each of them came, in seconds."""
        return [state.times for state in self.states]

    @property
    def computed(self) -> int:
        """Tokens run through the model."""
        return sum(n for _, _, work in self.steps for n in work.values())

    @property
    def utilisation(self) -> float:
        """Share of the max_num_seqs places that did useful work, over the steps."""
        return fmean(len(work) for _, _, work in self.steps) / self.max_num_seqs


@dataclass(eq=False)
class Engine:
    """The scheduler and the loop around the model. The settings are those of serve(), which explains them."""
    model: Llama
    requests: Sequence[Request]
    _: KW_ONLY
    policy: str = "continuous"
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    preemption: str = "recompute"
    prefix_caching: bool = False

    def __post_init__(self):
        check_settings(self)
        self.pool = BlockPool(self.num_blocks, self.block_size)
        states = [RequestState(number, request, list(request.prompt), PagedKVCache(self.pool, self.model.config))
                  for number, request in enumerate(self.requests)]
        self.waiting = deque(sorted(states, key=lambda state: (state.request.arrival, state.number)))
        self.running: list[RequestState] = []  # oldest first
        self.clock, self.report = 0.0, Report(states, self.max_num_seqs)

    def schedule(self) -> list[tuple[RequestState, int]]:
        """What the next step runs: (request, how many of its tokens). Blocks for them are reserved.

        The running first, oldest first: all that the cache lacks and the budget allows. Then the waiting, in order,
        until one does not fit; but none in a step that had to preempt, nor into a static batch under way.
        """
        budget, work = self.max_num_batched_tokens, []
        admits = self.policy != "static" or not self.running
        for state in list(self.running):
            if state not in self.running:
                continue  # preempted a moment ago
            n = min(len(state.tokens) - state.cache.length, budget)
            while state in self.running and state.cache.blocks_needed(n) > self.pool.num_free_blocks:
                self.preempt(self.running[-1])  # the youngest, be it this one
                admits = False
            if state in self.running:
                state.cache.reserve(n)
                work.append((state, n))
                budget -= n
        while (admits and self.waiting and self.waiting[0].request.arrival <= self.clock
               and len(self.running) < self.max_num_seqs):
            n = self.admit(self.waiting[0], budget)
            if not n:
                break  # first come, first served: nobody overtakes
            self.running.append(self.waiting.popleft())
            work.append((self.running[-1], n))
            budget -= n
        return work

    def admit(self, state: RequestState, budget: int) -> int:
        """Let a waiting request in: bring back its stash or find its prefix, reserve blocks; how many tokens to run.

        0, and its cache empty as before, if blocks or budget do not do for all it has to run; "chunked" may run a part.
        """
        cache = state.cache
        if state.stash is None and self.prefix_caching:
            adopt_prefix(cache, state.tokens)
        known = cache.length if state.stash is None else len(state.stash)
        n = len(state.tokens) - known
        n = min(n, budget) if self.policy == "chunked" else n
        if not 0 < n <= budget or cache.blocks_needed(known - cache.length + n) > self.pool.num_free_blocks:
            cache.free()  # what it had found stays findable
            return 0
        state.found += cache.length
        cache.reserve(known - cache.length + n)
        if state.stash is not None:
            swap_in(cache, state.stash)
            self.report.swapped_tokens += known * state.swapped
            state.stash = None
        return n

    def preempt(self, state: RequestState) -> None:
        """Take a running request's blocks away. Nothing is lost: they are computed again, or kept on the host."""
        self.running.remove(state)
        self.waiting.appendleft(state)
        self.report.preempted.append((len(self.report.steps), state.number))
        if self.preemption == "swap":
            state.stash, state.swapped = swap_out(state.cache), True
            self.report.swapped_tokens += len(state.stash)
        state.cache.free()

    def step(self) -> None:
        """Schedule, advance the clock, run the model. Whoever has all its tokens leaves, its slots in its stash.

        The clock: step_seconds() with the caches as they are after the step, then PCIe for what was swapped.
        """
        if not self.running:
            self.clock = max(self.clock, self.waiting[0].request.arrival)
        start, swapped = self.clock, self.report.swapped_tokens
        work = self.schedule()
        cached = sum(state.cache.length + n for state, n in work)
        self.clock += max(step_seconds(A100, LLAMA_8B, sum(n for _, n in work), cached, PRICED_WEIGHT_BYTES))
        self.clock += (self.report.swapped_tokens - swapped) * LLAMA_8B.kv_bytes / PCIE
        self.report.steps.append((start, self.clock, {state.number: n for state, n in work}))
        for state, n in work:
            first = state.cache.length
            logits = self.model.forward(state.tokens[first:first + n], state.cache)
            if self.prefix_caching:
                register_blocks(state.cache, state.tokens)
            if state.cache.length == len(state.tokens):  # not the case halfway through a prompt
                state.tokens.append(argmax(logits[-1]))
                state.times.append(self.clock)
            if state.done:
                state.stash = swap_out(state.cache)  # section 10 hands it on
                state.cache.free()
                self.running.remove(state)

    def run(self) -> Report:
        """Step until nobody is left; the report. RuntimeError for a step without work: it would go on for ever."""
        while self.waiting or self.running:
            self.step()
            if not self.report.steps[-1][2]:
                raise RuntimeError("a step had no work: the scheduler is stuck")
        return self.report


def serve(model: Llama, requests: Sequence[Request], **settings) -> Report:
    """Every request's greedy tokens and the schedule that made them. The settings, by name:

    policy: "static" (batches that start and end together), "continuous" (whole prompts join running decodes; the
    default) or "chunked" (prompts are cut to the token budget, section 8). num_blocks, block_size: the pool.
    max_num_seqs: requests that run at the same time. max_num_batched_tokens: tokens of a step.
    preemption: "recompute" (the default) or "swap" (section 9). prefix_caching: False unless given (section 6).
    ValueError for settings under which some request could never run.
    """
    return Engine(model, requests, **settings).run()


def check_settings(engine: Engine) -> None:
    """ValueError, with what would do, where some request could never run."""
    policy, budget, num_blocks = engine.policy, engine.max_num_batched_tokens, engine.num_blocks
    if policy not in ("static", "continuous", "chunked") or engine.preemption not in ("recompute", "swap"):
        raise ValueError(f'policy must be "static", "continuous" or "chunked" and preemption "recompute" or "swap", '
                         f"not {policy!r} and {engine.preemption!r}")
    if engine.max_num_seqs < 1 or budget < 1 or engine.block_size < 1:
        raise ValueError(f"max_num_seqs, max_num_batched_tokens and block_size must be at least 1, not "
                         f"{engine.max_num_seqs}, {budget} and {engine.block_size}")
    if policy == "chunked" and budget < engine.max_num_seqs:
        raise ValueError(f"max_num_batched_tokens must be at least max_num_seqs, {engine.max_num_seqs}, so that every "
                         f"running request gets a token, not {budget}")
    for number, request in enumerate(engine.requests):
        total = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(f"request {number} must have a prompt and max_new_tokens of at least 1")
        if (need := blocks_for(request, engine.block_size)) > num_blocks:
            raise ValueError(f"request {number} needs {need} blocks of {engine.block_size} for its {total} tokens, so "
                             f"num_blocks must be at least {need}, not {num_blocks}")
        if policy != "chunked" and total > budget:
            raise ValueError(f"request {number} may have to run {total} tokens in one step, so max_num_batched_tokens "
                             f'must be at least {total}, not {budget}; or policy "chunked"')


def blocks_for(request: Request, block_size: int) -> int:
    """Blocks that a request fills at its end; its last token is never written."""
    return -(-(len(request.prompt) + request.max_new_tokens - 1) // block_size)


# 8. Chunked prefill
#
# A long prompt makes one long step, and everybody who is in the middle of an answer waits for it. Cut prompts into
# chunks (Sarathi, Agrawal et al. 2023), under a budget of max_num_batched_tokens a step: decodes go first, a token
# each, and what is left of the budget goes to a prompt (Sarathi-Serve, 2024). The decodes ride on steps that have
# their weights read anyway. The long prompt's own first token comes later; nobody else stalls.


# 9. Running out of blocks
#
# Nobody knows how long the answers get, so an engine admits more than may fit in the end. When a running request
# needs a block and none is free, the youngest gives up its own: preempted, back to the head of the queue. Either its
# keys and values are thrown away and computed again, prompt and answer so far in one prefill (recompute), or
# they are copied to the host's memory and back over PCIe (swap). Either way its text goes on as if nothing had
# happened. Recomputing a short text is nearly free: below 38 tokens a step costs what a decode costs anyway. A
# request that could not even run alone in the pool must be refused at the door.


def swap_out(cache: PagedKVCache) -> list[dict]:
    """A copy of every slot's contents, to be kept elsewhere."""
    return [dict(cache.pool.slots[cache.slot(position)]) for position in range(cache.length)]


def swap_in(cache: PagedKVCache, contents: Sequence[dict]) -> None:
    """Write contents into an empty cache: other blocks than before, the same tokens."""
    cache.reserve(len(contents))
    for position, content in enumerate(contents):
        cache.pool.slots[cache.slot(position)] = dict(content)
    cache.length = len(contents)


# 10. Splitwise: prefill here, decode there
#
# Prefill wants arithmetic, decode wants bandwidth, and in one machine they get in each other's way. Splitwise
# (Patel et al. 2023; DistServe, Zhong et al. 2024, is alike) gives each phase machines of its own. The price: the
# keys and values of the prompt must cross from one to the other before the second token. (Splitwise sends each layer
# as soon as it is done, while the next is computed; here they go when all are.) Two machines are twice the hardware:
# what is compared is the gaps, not the throughput.


LINKS = {"two cards, NVLink": (300e9, "A100 data sheet: 600 GB/s, both ways together"),
         "two machines, HDR": (25e9, "InfiniBand HDR, 200 Gb/s")}


def hand_over(prefill: Report, model: Llama, requests: Sequence[Request], link: float,
              **settings) -> tuple[Report, float]:
    """(what the decode machine does, bytes that crossed), after a prefill machine has made each first token.

    A request arrives at the decode machine with the stash the prefill machine left of it, as soon as a link of that
    many bytes/s, all its own, has carried it. settings: those of serve().
    """
    sizes = [len(state.stash) * LLAMA_8B.kv_bytes for state in prefill.states]
    engine = Engine(model, [replace(request, arrival=times[0] + size / link)
                            for request, times, size in zip(requests, prefill.times, sizes)], **settings)
    for state, before in zip(engine.report.states, prefill.states):
        state.tokens, state.stash, state.times = list(before.tokens), before.stash, list(before.times)
    engine.waiting = deque(state for state in engine.waiting if not state.done)
    return engine.run(), sum(sizes)


# 11. A smaller cache
#
# Fewer bits a number: round each group of numbers to an even grid between its smallest and its largest (an offset
# and a scale a group, asymmetric as in KIVI). Which numbers form a group decides the error. Per token: one
# token's key of a head. Per channel: one channel of a head over all tokens, so that a channel that is large for
# every token does not spoil the grid of the others. KIVI found such channels in the keys of real models,
# and not in the values, hence: keys per channel, values per token. (It must gather some tokens before it can
# do that: the newest ones wait in full precision.)


def round_to_grid(values: Vector, bits: int) -> Vector:
    """Each value to the nearest of 2^bits evenly spaced numbers, the first their smallest, the last their largest."""
    low, high = min(values), max(values)
    scale = (high - low) / (2 ** bits - 1) or 1.0
    return [low + round((value - low) / scale) * scale for value in values]


def quantize_cache(m: Matrix, bits: int, n_kv_heads: int, per: str) -> Matrix:
    """m [n][n_kv_heads·head_dim] on grids of `bits`; per "token" and head, or per "channel". bits 16: a plain copy."""
    if bits >= 16:
        return list(m)
    if per == "channel":
        return [list(row) for row in zip(*(round_to_grid(list(channel), bits) for channel in zip(*m)))]
    return concat(*([round_to_grid(row, bits) for row in head] for head in split_heads(m, n_kv_heads)))


def quantized_bytes(m: Matrix, bits: int, n_kv_heads: int, per: str) -> float:
    """Bytes that quantize_cache(m, …) takes: the codes, and an offset and a scale of 16 bits for each group."""
    n, width = len(m), len(m[0])
    groups = 0 if bits >= 16 else width if per == "channel" else n * n_kv_heads
    return n * width * bits / 8 + groups * 4


# =============================================================================================
# THE EXPERIMENTS
# =============================================================================================


# 1. Generation without a cache, and with one


def show_cache(trace: Trace, knobs: Namespace) -> None:
    """The same text generated twice, and the multiplications of every step."""
    model, prompt, n_new = knobs.model(), knobs.prompt_ids, knobs.max_new_tokens
    c = model.config
    runs = {}
    for name, cache in (("without", None), ("with", KVCache(c))):
        tokens, logits, work = list(prompt), [], []
        for _ in range(n_new):
            unseen = tokens[0 if cache is None else cache.length:]
            with counted_dots() as count:
                logits.append(model.forward(unseen, cache)[-1])
            work.append(count.products)
            tokens.append(argmax(logits[-1]))
        runs[name] = tokens, logits, work
    trace.say(f"The tiny Llama ({c.n_layers} layers, {count_parameters(c):,} parameters) goes on from its prompt:")
    trace.lines(textwrap.wrap(repr(knobs.tokenizer.decode(runs["with"][0])), WIDTH - 4, initial_indent="    ",
                              subsequent_indent="    "))
    trace.say("Multiplications in dot products, counted at each step. Without a cache each step does all the tokens "
              "again; with one, the first step does the prompt (prefill) and each later one a single token (decode).")
    trace.ask("over all steps, how many times fewer multiplications are made with the cache?",
              sum(runs["without"][2]) / sum(runs["with"][2]))
    most, rows = runs["without"][2][-1], []
    for t in sorted({0, 1, *range(3, n_new - 1, max(1, n_new // 5)), n_new - 1} & set(range(n_new))):
        without, with_ = runs["without"][2][t], runs["with"][2][t]
        rows.append([str(t + 1), f"{without:,}", bar(without, most, 24), f"{with_:,}", bar(with_, most, 24)])
    rows.append(["all", f"{sum(runs['without'][2]):,}", "", f"{sum(runs['with'][2]):,}", ""])
    text_table(trace, ["step", "without", "", "with", ""], rows, left=(2, 4))
    trace.check("the same tokens with the cache as without", runs["with"][0] == runs["without"][0], f"{n_new} tokens")
    trace.check_close("the same logits at every step", runs["with"][1], runs["without"][1], 1e-9)
    n = len(prompt)
    formula = ([forward_products(c, n + t, 0) for t in range(n_new)],
               [forward_products(c, n, 0)] + [forward_products(c, 1, n + t) for t in range(n_new - 1)])
    trace.check("every step's count = the closed formula", formula == (runs["without"][2], runs["with"][2]), "equal")


def forward_products(c: Config, n_new: int, n_cached: int) -> int:
    """Multiplications in the dot products of forward() on n_new tokens after n_cached: a closed formula."""
    kv_dim = c.n_kv_heads * c.head_dim
    layer = 2 * c.dim * c.dim + 2 * kv_dim * c.dim + 3 * c.hidden_dim * c.dim   # wq and wo, wk and wv, w1 to w3
    norms = (2 * c.n_layers + 1) * c.dim
    pairs = n_new * n_cached + n_new * (n_new + 1) // 2                        # of a query and a key it sees
    return n_new * (c.n_layers * layer + c.vocab_size * c.dim + norms) + c.n_layers * pairs * 2 * c.dim


# 2. Prefill and decode are different machines


def show_intensity(trace: Trace, knobs: Namespace) -> None:
    """FLOPs and bytes of a prefill and a decode step, counted; then Llama 3.1 8B on real cards."""
    c = knobs.config
    model = WatchedLlama(c, init_weights(c, random.Random(knobs.seed)))  # the counts do not depend on what it learned
    trace.say("Our own model: FLOPs (2 for each multiplication, counted) and the bytes of all weights and cached keys "
              "and values that the step's operations touched (counted, at 2 a number).")
    rows, intensity = [], {}
    for n_new, n_cached in ((1, 0), (1, 63), (8, 0), (64, 0)):
        cache = KVCache(c)
        model.touched = []
        if n_cached:
            model.forward([0] * n_cached, cache)
        model.touched = []
        with counted_dots() as count:
            model.forward([0] * n_new, cache)
        read = 2 * sum(len(row) for matrix in model.touched for row in matrix)
        intensity[n_new, n_cached] = 2 * count.products / read
        rows.append(["decode" if n_new == 1 else "prefill", str(n_new), str(n_cached), f"{2 * count.products:,}",
                     f"{read:,}", f"{2 * count.products / read:.1f}", bar(2 * count.products / read, 64, 16)])
    trace.ask("how many times as many FLOPs for each byte does a prefill of 64 tokens make as a decode step with "
              "nothing cached?", intensity[64, 0] / intensity[1, 0])
    text_table(trace, ["", "new tokens", "cached", "FLOPs", "bytes", "FLOPs a byte", ""], rows, left=(0, 6))

    trace.say(f"{LLAMA_8B.name}, {LLAMA_8B.parameters / 1e9:.2f} billion parameters: one decoding step for a batch of "
              f"requests, each with 1024 tokens cached, on an {A100.name}, whose ridge is at {A100.ridge:.0f} FLOPs a "
              "byte. It takes the longer of the two times.")
    rows = []
    for batch in (1, 8, 32, 128, 384):
        arithmetic, reading = step_seconds(A100, LLAMA_8B, batch, batch * 1024)
        rows.append([str(batch), f"{arithmetic * 1e3:.2f}", f"{reading * 1e3:.2f}",
                     f"{arithmetic * A100.flops / (reading * A100.hbm_bytes_per_s):.0f}",
                     f"{batch / max(arithmetic, reading):,.0f}", f"{batch * 1024 * LLAMA_8B.kv_bytes / 1e9:.1f}"])
    text_table(trace, ["batch", "arithmetic, ms", "reading, ms", "FLOPs a byte", "tokens a second", "cache, GB"], rows)
    rows = []
    for cached in (0, 256, 1024):
        row = [str(cached)]
        for card in (A100, H100):
            request = step_seconds(card, LLAMA_8B, 1, cached, weight_bytes=0)  # what one more adds to both times
            _, weights = step_seconds(card, LLAMA_8B, 0, 0)
            row.append(f"{weights / (request[0] - request[1]):,.0f}" if request[0] > request[1] else "never")
        rows.append(row)
    trace.say("From which batch size on arithmetic is the longer time, so that a bigger batch buys nothing. With much "
              "in the caches that never comes: reading them grows with the batch as well.")
    text_table(trace, ["tokens cached, each", A100.name, H100.name], rows)
    trace.check("decode stays near 1 FLOP a byte, prefill of n tokens near n",
                all(n / 2 < ratio < 1.5 * n for (n, _), ratio in intensity.items()), "between n / 2 and 1.5 n")


# 3. The cache's size


def show_size(trace: Trace, knobs: Namespace) -> None:
    """Bytes per token of real models, and how many requests fit beside the weights."""
    trace.say("Real models at 16 bits, and how many requests of 4096 tokens fit beside the weights on one 80 GB card.")
    rows = []
    for model in SERVED_MODELS:
        weights, request = 2 * model.parameters, 4096 * model.kv_bytes
        fit = int((A100.hbm_bytes - weights) // request)
        if model is LLAMA_8B:
            trace.ask(f"{model.name}: weights of {weights / 1e9:.0f} GB, {request / 1e9:.2f} GB of cache for a "
                      "request. How many requests fit?", fit)
        rows.append([model.name, f"{weights / 1e9:.0f} GB", f"{model.kv_bytes / 1024:.0f} KiB",
                     f"{request / 1e9:.2f} GB", str(fit) if fit > 0 else "weights too big", bar(max(fit, 0), 128, 20)])
    text_table(trace, ["model", "weights", "a token", "4K tokens", "requests", ""], rows, left=(0, 5))
    c, cache, held = knobs.config, KVCache(knobs.config), []
    model = Llama(c, init_weights(c, random.Random(knobs.seed)))
    for _ in range(8):
        model.forward([0, 0], cache)
        held.append(2 * sum(len(row) for layers in (cache.keys, cache.values) for layer in layers for row in layer))
    each = kv_bytes_per_token(c.n_layers, c.n_kv_heads, c.head_dim)
    trace.check("our own cache, measured as it grows: every token adds kv_bytes_per_token()",
                held == [n * each for n in range(2, 18, 2)], f"{each:.0f} bytes")


# 4. Paged attention


def show_paging(trace: Trace, knobs: Namespace) -> None:
    """Two requests interleaved in one pool, drawn; then the waste of four ways to set memory aside."""
    model, bs, n_new = knobs.model(), knobs.block_size, knobs.max_new_tokens
    prompts = [knobs.prompt_ids, knobs.tokenizer.encode("This is the man all tattered and torn")]
    blocks = sum(-(-(len(p) + n_new) // bs) for p in prompts) + 2
    pool, solo = BlockPool(blocks, bs), [KVCache(model.config) for _ in prompts]
    random.Random(knobs.seed).shuffle(order := list(pool.free_blocks))
    pool.free_blocks = OrderedDict.fromkeys(order)  # as after some hours of service: free blocks in no order
    paged = [PagedKVCache(pool, model.config) for _ in prompts]
    same, texts = True, [list(p) for p in prompts]
    for _ in range(n_new):
        for text, cache, reference in zip(texts, paged, solo):
            unseen = text[cache.length:]
            logits = model.forward(unseen, cache)
            same &= logits == model.forward(unseen, reference)
            text.append(argmax(logits[-1]))
    trace.say(f"Two requests, A and B, written token by token, in turn, into one pool of {blocks} blocks of {bs}. Each "
              f"letter is a token's keys and values; a dot is an idle slot.")
    owner = {cache.slot(p): name for name, cache in zip("AB", paged) for p in range(cache.length)}
    boxes = [f"{block}│" + "".join(owner.get(block * bs + i, "·") for i in range(bs)) + "│" for block in range(blocks)]
    trace.lines(textwrap.wrap(" ".join(boxes), WIDTH))
    for name, cache in zip("AB", paged):
        trace.lines(textwrap.wrap(f"block table of {name}: " + " ".join(map(str, cache.block_table)), WIDTH))
    last = paged[0].length - 1
    trace.ask(f"slots are numbered from the first of block 0. In which slot is token {last} of A, its last (its first "
              "is token 0)?", paged[0].slot(last))
    trace.lines([f"token {last} of A: block_table[{last // bs}] · {bs} + {last % bs} = slot {paged[0].slot(last)}"])

    requests, size, most = [replace(request, arrival=0) for request in knobs.requests] * 2, 128 // bs * bs, 64
    lengths = [(len(request.prompt), len(request.prompt) + request.max_new_tokens - 1) for request in requests]
    finals = [final for _, final in lengths]
    trace.say(f"Waste. {len(requests)} requests that end up with {min(finals)} to {max(finals)} cached tokens, which "
              f"nobody could know, share {size} slots; {most} is the most anyone may use. What became of the slots, "
              "averaged over the steps in which somebody waited for room:")
    paged_share, most_idle = paged_waste(model, requests, size // bs, bs)
    wastes = {f"in one piece: the most, {most}": contiguous_waste(lengths, size, lambda final: most),
              "the next power of 2": contiguous_waste(lengths, size, lambda final: 1 << (final - 1).bit_length()),
              "what it will be (an oracle)": contiguous_waste(lengths, size, lambda final: final),
              f"paged, blocks of {bs}": paged_share}
    text_table(trace, ["", "used", "reserved", "internal", "free"],
                [[name, *waste.shares()] for name, waste in wastes.items()], left=(0,))
    trace.note("internal: set aside and never used; free: left over while somebody waits, for want of a gap or of "
               "blocks enough. Kwon et al. found 20.4% to 38.2% used in the systems before theirs.")
    trace.check("paged logits = contiguous logits at every step", same, "equal to the bit")
    trace.check("no request ever had more than block_size - 1 idle slots", most_idle < bs, f"at most {most_idle}")


# 5. Sharing: reference counts and copy on write


def show_sharing(trace: Trace, knobs: Namespace) -> None:
    """Four different continuations of one prompt: blocks with and without sharing."""
    model, bs, n_new, n_samples = knobs.model(), knobs.block_size, min(knobs.max_new_tokens, 8), 4
    half_full = -(-12 // bs) * bs + (bs // 2 - len(knobs.prompt_ids)) % bs  # so that it ends inside a block
    prompt = knobs.tokenizer.encode(TEXT)[-half_full:] + knobs.prompt_ids
    pool = BlockPool(n_samples * -(-(len(prompt) + n_new + 1) // bs), bs)
    first = PagedKVCache(pool, model.config)
    logits = model.forward(prompt, first)[-1]
    samples = [first] + [first.fork() for _ in range(n_samples - 1)]
    best = sorted(range(len(logits)), key=lambda token: -logits[token])[:n_samples]  # each starts with another word
    texts, forked = [prompt + [token] for token in best], list(first.block_table)
    trace.say(f"A prompt of {len(prompt)} tokens, {n_samples} answers that begin with the {n_samples} likeliest words, "
              f"blocks of {bs}. After the prompt all have one block table, blocks {forked[0]} to {forked[-1]}, and "
              f"each of these has {pool.ref_count[0]} references. Then every answer writes a token.")

    def write_a_token() -> None:
        for text, cache in zip(texts, samples):
            text.append(argmax(model.forward(text[cache.length:], cache)[-1]))

    write_a_token()
    copies = sum(cache.block_table[:len(forked)] != forked for cache in samples)
    trace.ask(f"the prompt fills {len(prompt) % bs} slots of its last block (0: all). How many of the {n_samples} "
              "copy that block before they write?", copies)
    trace.lines([""])
    for name, cache in zip("ABCD", samples):
        trace.lines(textwrap.wrap(f"{name}: blocks " + " ".join(map(str, cache.block_table)), WIDTH,
                                  subsequent_indent=" " * 10))
    trace.lines(textwrap.wrap("references to blocks 0, 1, …: " + " ".join(str(n) for n in pool.ref_count if n), WIDTH))
    trace.note(f"{copies} wrote into the half-full block and took a copy first; the last to hold it needed none."
               if copies else "Each took a new block: the prompt had filled its last one.")
    for _ in range(n_new - 1):
        write_a_token()
    used, alone = pool.num_blocks - pool.num_free_blocks, sum(-(-cache.length // bs) for cache in samples)
    trace.say(f"After {n_new} tokens each, {used} blocks are in use; without sharing it would be {alone}.")
    for name, text in zip("ABCD", texts):
        trace.lines([f"{name}: … " + knobs.tokenizer.decode(text[len(prompt) - 3:])[:WIDTH - 8].replace("\n", " / ")])
    undisturbed = all(text == prompt + [token] + generate(model, prompt + [token], n_new, KVCache(model.config))
                      for text, token in zip(texts, best))
    trace.check("copies taken = answers - 1, if the prompt ends inside a block", copies
                == (n_samples - 1) * (len(prompt) % bs > 0), f"{copies}")
    trace.check("every answer = what it is without sharing", undisturbed, f"{n_samples} × {n_new} tokens")
    held = Counter(block for cache in samples for block in cache.block_table)
    trace.check("every reference count = the block tables that name the block",
                pool.ref_count == [held[block] for block in range(pool.num_blocks)], "equal")
    for cache in samples:
        cache.free()
    trace.check("when all are done, every block is free again", pool.num_free_blocks == pool.num_blocks,
                f"{pool.num_blocks}")


# 6. Prefix caching


def show_prefix_caching(trace: Trace, knobs: Namespace) -> None:
    """A conversation that grows by a verse a turn; then a stranger comes between."""
    model, bs, verses = knobs.model(), knobs.block_size, TEXT.splitlines(keepends=True)
    turns = ["".join(verses[:n]) + f"This is {CLAUSES[n].split(' that')[0]}" for n in (1, 2, 2, 3)]
    prompts = [tuple(knobs.tokenizer.encode(text)) for text in [*turns, verses[5], turns[-1]]]
    requests = [Request(prompt, 4, float(i)) for i, prompt in enumerate(prompts)]  # a second apart: each runs alone
    plenty, enough = (f(blocks_for(request, bs) for request in requests) for f in (sum, max))
    without, report, small = (serve(model, requests, num_blocks=blocks, block_size=bs, max_num_seqs=1,
                                    max_num_batched_tokens=1024, prefix_caching=caching)
                              for blocks, caching in ((plenty, False), (plenty, True), (enough, True)))
    texts = [prompt + tuple(new[:-1]) for prompt, new in zip(prompts, report.tokens)]  # the last token is never run
    naive = [max([common_full_blocks(prompt[:-1], text, bs) for text in texts[:n]], default=0)
             for n, prompt in enumerate(prompts)]
    trace.say("Requests that begin alike: the rhyme so far, then a new line. Each comes when the one before has ended "
              "and given its blocks back. Then a stranger comes, request 4, and the last one asks again. █ the prompt "
              "tokens the model ran, ░ those it found in the pool.")
    found = [state.found for state in report.states]
    alike = max(common_full_blocks(prompts[3], text, 1) for text in texts[:3])
    trace.ask(f"the first {alike} tokens of request 3 are those of an earlier text. How many does it find in the pool, "
              f"with blocks of {bs}?", found[3])
    text_table(trace, ["request", "prompt", f"found in {plenty} blocks", "", f"in {enough} blocks"],
                [[str(n), str(len(prompt)), str(hit), "░" * (hit // 3) + "█" * ((len(prompt) - hit) // 3), str(state.found)]
                 for n, (prompt, hit, state) in enumerate(zip(prompts, found, small.states))], left=(3,))
    trace.note(f"In {enough} blocks, no more than the largest request needs, the stranger's content takes the place of "
               "the least recently used.")
    trace.check("found = the longest run of full blocks shared with any earlier text", found == naive,
                ", ".join(map(str, found)))
    trace.check("tokens computed without, less those computed with it = those found",
                without.computed - report.computed == sum(found), f"{without.computed} - {report.computed}")
    trace.check("the answers are what each request gets alone", all(r.tokens == [knobs.alone(q) for q in requests] for r
                in (without, report, small)), f"{len(requests)} requests")


def common_full_blocks(a: Sequence[int], b: Sequence[int], block_size: int) -> int:
    """Tokens in the full blocks that two texts have in common from their start, by comparing them."""
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    return same // block_size * block_size


# 7. Continuous batching


def make_requests(tokenizer: Tokenizer, rng: random.Random) -> list[Request]:
    """Users with lines of the rhyme as prompts, arriving about 3 ms apart, wanting 3 to 20 tokens."""
    arrival, requests = 0.0, []
    for clause in CLAUSES[1:10]:
        requests.append(Request(tuple(tokenizer.encode("This is " + clause)), rng.randint(3, 20), arrival))
        arrival += rng.expovariate(1 / 0.003)
    return requests


def show_continuous(trace: Trace, knobs: Namespace) -> None:
    """The same requests in static batches and continuously."""
    model, requests = knobs.model(), knobs.requests
    blocks = knobs.num_blocks or sum(blocks_for(request, knobs.block_size) for request in requests)
    settings = dict(num_blocks=blocks, block_size=knobs.block_size, max_num_seqs=knobs.max_num_seqs,
                    max_num_batched_tokens=1024)
    reports = {policy: serve(model, requests, policy=policy, **settings) for policy in ("static", "continuous")}
    trace.say(f"{len(requests)} requests, {knobs.max_num_seqs} places, {blocks} blocks of {knobs.block_size}. A column "
              f"is a step, a row a request (its prompt + new tokens): dots while it waits, █ its prompt runs, ▒ a new "
              f"token.")
    for policy, report in reports.items():
        if policy == "continuous":
            trace.ask(f"static batches took {len(reports['static'].steps)} steps. How many does it take if whoever is "
                      "done leaves at once, and whoever waits comes in?", len(report.steps))
        trace.lines(["", f"{policy}:"] + timeline(report))
    trace.lines([""])
    text_table(trace, ["", "steps", "places used", "ms in all", "tokens/s", "first token", "each later"],
                [[policy, *metrics(report)] for policy, report in reports.items()], left=(0,))
    trace.note(f"Times by the cost model: {LLAMA_8B.name}, 4-bit weights, {A100.name}; the last two are means in ms, "
               f"from arrival to the first token, and from a token to the next.")
    alone = [knobs.alone(request) for request in requests]
    for policy, report in reports.items():
        trace.check(f"{policy}: every request's tokens are what it gets alone", report.tokens == alone,
                    f"{sum(map(len, alone))} tokens")
    most = max(len(work) for report in reports.values() for _, _, work in report.steps)
    trace.check("a step never ran more requests than there are places", most <= knobs.max_num_seqs, f"at most {most}")


def metrics(report: Report) -> list[str]:
    """Steps, utilisation, time, throughput, mean time to first token and per later token, as cells of a table."""
    end = report.steps[-1][1]
    first = fmean(state.times[0] - state.request.arrival for state in report.states)
    gaps = token_gaps(report)
    return [str(len(report.steps)), f"{report.utilisation:.0%}", f"{end * 1e3:.1f}",
            f"{sum(map(len, report.tokens)) / end:,.0f}", f"{first * 1e3:.1f}", f"{fmean(gaps) * 1e3:.2f}"]


def token_gaps(report: Report, requests: slice = slice(None)) -> list[float]:
    """The seconds between each new token and the next of the same request."""
    return [later - earlier for times in report.times[requests] for earlier, later in zip(times, times[1:])] or [0.0]


def timeline(report: Report, width: int = 66) -> list[str]:
    """The schedule as a picture of at most width + 12 columns: a row per request, a column per step."""
    lines, preempted = [], set(report.preempted)
    for state in report.states:
        row, seen = "", 0
        last = max(i for i, (_, _, work) in enumerate(report.steps) if state.number in work)
        for i, (start, _, work) in enumerate(report.steps):
            if state.number in work:
                row += "▒" if work[state.number] == 1 and seen >= len(state.request.prompt) else "█"
                seen += work[state.number]
            elif (i, state.number) in preempted:
                row += "×"
            else:
                row += "·" if state.request.arrival <= start and i < last else " "
        lines.append(f"{state.number:>2} {len(state.request.prompt):>2}+{state.request.max_new_tokens:<3} "
                     + (row.rstrip() if len(row.rstrip()) <= width else row[:width] + "…"))
    return lines


# 8. Chunked prefill


def show_chunked(trace: Trace, knobs: Namespace) -> None:
    """Three users are answered when a long prompt comes in."""
    model, n_seqs = knobs.model(), max(knobs.max_num_seqs, 4)
    budget = max(knobs.max_num_batched_tokens, n_seqs)
    long_prompt = tuple(knobs.tokenizer.encode("".join(TEXT.splitlines(keepends=True)[:6])))
    requests = [Request(tuple(knobs.tokenizer.encode("This is " + clause)), 20) for clause in CLAUSES[1:4]]
    requests.append(Request(long_prompt, 4, 0.012))
    settings = dict(num_blocks=sum(blocks_for(request, knobs.block_size) for request in requests),
                    block_size=knobs.block_size, max_num_seqs=n_seqs)
    reports = {"whole": serve(model, requests, policy="continuous", max_num_batched_tokens=1024, **settings),
               "chunked": serve(model, requests, policy="chunked", max_num_batched_tokens=budget, **settings)}
    trace.say(f"Requests 0 to 2 have come when request 3 does, with a prompt of {len(long_prompt)} tokens. A column is "
              f"a millisecond; a mark says that a new token came out in it.")
    worst = {name: max(token_gaps(report, slice(3))) for name, report in reports.items()}
    for name, report in reports.items():
        if name == "chunked":
            trace.ask(f"the long prompt made users 0 to 2 wait {worst['whole'] * 1e3:.1f} ms for a token. What is "
                      f"their longest wait, in ms, if a step runs at most {budget} tokens?", worst["chunked"] * 1e3)
        trace.lines(["", "whole prompts:" if name == "whole" else f"chunked, at most {budget} tokens a step:"])
        trace.lines(clock_line(report))
    rows = []
    for name, report in reports.items():
        rows.append([name, f"{worst[name] * 1e3:.1f}", f"{(report.times[3][0] - requests[3].arrival) * 1e3:.1f}",
                     str(max(sum(work.values()) for _, _, work in report.steps))])
    trace.lines([""])
    text_table(trace, ["", "worst gap, ms", "3's first token, ms", "largest step, tokens"], rows, left=(0,))
    alone = [knobs.alone(request) for request in requests]
    trace.check("every request's tokens are those it gets alone, both ways",
                all(report.tokens == alone for report in reports.values()), f"{sum(map(len, alone))} tokens")
    trace.check("no chunked step ran more than max_num_batched_tokens",
                all(sum(work.values()) <= budget for _, _, work in reports["chunked"].steps), f"{budget}")


def clock_line(report: Report, width: int = 67) -> list[str]:
    """When tokens came, a column per millisecond: ▒ for a token, dots in between."""
    lines = []
    for state in report.states:
        marks = {int(t * 1e3) for t in state.times}
        row = "".join(" " if ms < int(state.request.arrival * 1e3) or ms > max(marks) else "▒" if ms in marks else "·"
                      for ms in range(width)) + "…" * (max(marks) >= width)
        lines.append(f"{state.number:>2} {len(state.request.prompt):>3}+{state.request.max_new_tokens:<3} {row}")
    return lines


# 9. Running out of blocks


def show_preemption(trace: Trace, knobs: Namespace) -> None:
    """The requests of section 7 in ever smaller pools."""
    model, requests, bs = knobs.model(), knobs.requests, knobs.block_size
    smallest = max(blocks_for(request, bs) for request in requests)
    pools = [knobs.num_blocks] if knobs.num_blocks else [2 * smallest, smallest]
    settings = dict(block_size=bs, max_num_seqs=knobs.max_num_seqs, max_num_batched_tokens=1024)
    alone = [knobs.alone(request) for request in requests]
    trace.say(f"The requests of section 7 again; the largest needs {smallest} blocks of {bs}. Computed: tokens run "
              f"through the model. Swapped: both ways, at {LLAMA_8B.kv_bytes / 1024:.0f} KiB a token (Llama 3.1 8B).")
    rows, unchanged, empty, reports = [], True, True, {}
    for blocks in pools:
        for preemption in ("recompute", "swap"):
            engine = Engine(model, requests, num_blocks=blocks, preemption=preemption, **settings)
            report = reports[preemption] = engine.run()
            unchanged &= report.tokens == alone
            empty &= engine.pool.num_free_blocks == blocks and not any(engine.pool.ref_count)
            rows.append([str(blocks), preemption, str(len(report.preempted)), str(report.computed),
                         f"{report.swapped_tokens * LLAMA_8B.kv_bytes / 2**20:.0f} MiB", str(len(report.steps)),
                         f"{report.steps[-1][1] * 1e3:.1f}"])
    trace.ask(f"the prompts have {sum(len(request.prompt) for request in requests)} tokens, the answers "
              f"{sum(map(len, alone))}; the last token of each of the {len(requests)} answers is never run. How many "
              "tokens go through the model when blocks are swapped out and in?", reports["swap"].computed)
    text_table(trace, ["blocks", "preemption by", "preempted", "computed", "swapped", "steps", "ms in all"], rows, left=(1,))
    trace.say(f"In {pools[-1]} blocks, by recomputation; × marks where a request lost its blocks:")
    trace.lines(timeline(reports["recompute"]))
    refusal = ""
    try:
        serve(model, requests, num_blocks=smallest - 1, **settings)
    except ValueError as error:
        refusal = str(error)
    trace.say(f"One block less than the smallest: {refusal}.")
    trace.check("no token changed, in any pool, either way", unchanged, f"{len(rows)} runs")
    trace.check("every pool is empty at the end", empty, "all free, no references")
    trace.check("a pool that is one block too small is refused", bool(refusal), "ValueError")


# 10. Splitwise: prefill here, decode there


def show_split(trace: Trace, knobs: Namespace) -> None:
    """The same requests on one machine and on two, over two links."""
    model, bs = knobs.model(), knobs.block_size
    rng, verses = random.Random(knobs.seed), TEXT.splitlines(keepends=True)
    requests = [Request(tuple(knobs.tokenizer.encode("".join(verses[:n]))), rng.randint(8, 16), 0.008 * i)
                for i, n in enumerate((3, 5, 4))]
    settings = dict(num_blocks=sum(blocks_for(request, bs) for request in requests), block_size=bs, max_num_seqs=4,
                    max_num_batched_tokens=1024)
    prompt_tokens, kv_bytes = sum(len(request.prompt) for request in requests), LLAMA_8B.kv_bytes
    prefill = serve(model, [replace(request, max_new_tokens=1) for request in requests], **settings)
    runs = {"one machine": (serve(model, requests, **settings), 0.0)}
    runs |= {name: hand_over(prefill, model, requests, rate, **settings) for name, (rate, _) in LINKS.items()}
    trace.say(f"{len(requests)} requests, {prompt_tokens} tokens of prompts, on one machine and on two. First token: "
              "after arrival, on average. Worst gap: the longest between two tokens of a request. Later gap: the longest "
              "but for the first ones, which have the crossing in them and the wait for the step under way. Crossing: a "
              "request's, on average.")
    trace.ask(f"how many MB of keys and values cross, all in all, at {kv_bytes / 1024:.0f} KiB a token?",
              runs["two machines, HDR"][1] / 1e6)
    rows, same = [], True
    for name, (report, crossed) in runs.items():
        same &= report.tokens == [knobs.alone(request) for request in requests]
        first = fmean(times[0] - request.arrival for times, request in zip(report.times, requests))
        later = max(b - a for times in report.times for a, b in zip(times[1:], times[2:]))
        crossing = f"{crossed / LINKS[name][0] * 1e3 / len(requests):.2f}" if crossed else "-"
        rows.append([name, *(f"{s * 1e3:.1f}" for s in (first, max(token_gaps(report)), later)), crossing,
                     f"{crossed / 1e6:.1f}"])
    text_table(trace, ["times in ms", "first token", "worst gap", "later gap", "crossing", "MB crossed"], rows, left=(0,))
    trace.check("two machines write what one writes, and what each request gets alone", same,
                f"{len(requests)} requests")
    trace.check("the keys and values of every prompt token crossed, once",
                [crossed for _, crossed in runs.values()][1:] == [prompt_tokens * kv_bytes] * len(LINKS),
                f"{prompt_tokens} tokens")


# 11. A smaller cache


def show_small_cache(trace: Trace, knobs: Namespace) -> None:
    """The error in the logits, and the tokens that change, for keys and values of fewer bits."""
    model, n_new = knobs.model(), 24
    c = model.config
    tokens = knobs.tokenizer.encode("".join(TEXT.splitlines(keepends=True)[4:6]))
    half = len(tokens) // 2
    exact = KVCache(c)
    model.forward(tokens[:half], exact)
    keys, values = [list(k) for k in exact.keys], [list(v) for v in exact.values]
    reference = model.forward(tokens[half:], exact)
    trace.say(f"The first {half} tokens of two verses are cached and rounded; then the model reads the next "
              f"{len(tokens) - half}. The error in its logits (root mean square), how often its favourite token "
              f"changes, and what the {half} tokens take, the offset and scale of each group included (16 bits each).")
    rows, errors = [], {}
    for key_bits, value_bits, per in ((16, 16, "-"), (8, 8, "token"), (4, 16, "token"), (4, 16, "channel"),
                                      (2, 16, "token"), (2, 16, "channel"), (16, 4, "token"), (16, 4, "channel")):
        cache = KVCache(c)
        cache.keys = [quantize_cache(k, key_bits, c.n_kv_heads, per) for k in keys]
        cache.values = [quantize_cache(v, value_bits, c.n_kv_heads, per) for v in values]
        logits = model.forward(tokens[half:], cache)
        gaps = [a - b for p, q in zip(logits, reference) for a, b in zip(p, q)]
        error = errors[key_bits, value_bits, per] = math.sqrt(dot(gaps, gaps) / len(gaps))
        nbytes = sum(quantized_bytes(m, bits, c.n_kv_heads, per)
                     for matrices, bits in ((keys, key_bits), (values, value_bits)) for m in matrices)
        changed = sum(argmax(p) != argmax(q) for p, q in zip(logits, reference))
        rows.append([f"{key_bits}", f"{value_bits}", per, f"{nbytes:,.0f}", f"{error:.4f}", bar(error, 1, 16),
                     f"{changed} of {len(logits)}"])
    better = "channel" if errors[4, 16, "channel"] < errors[4, 16, "token"] else "token"
    trace.ask("on the keys of this model, does a grid of 4 bits do better per token or per channel?", better)
    text_table(trace, ["key bits", "value bits", "grid per", "bytes", "error", "", "changed"], rows, left=(2, 5))
    trace.note(f"A head of ours has {c.head_dim} channels, so offset and scale weigh much. With the 128 of real models, "
               f"8 bits per token take {(128 + 4) / (2 * 128):.0%} of 16, not {rows[1][3]} of {rows[0][3]}.")
    largest = [[max(map(abs, channel)) for channel in zip(*k)] for k in keys]
    factor = max(max(channels) / fmean(channels) for channels in largest)
    trace.say(f"On this model's keys, 4 bits do better per {better}. Its largest key channel is {factor:.1f} times the "
              f"mean one. Real models have a few key channels that are far larger than the rest for every token (KIVI): "
              f"those spoil the grid of every token, and channels gain.")
    groups = [row for k in keys for head in split_heads(k, c.n_kv_heads) for row in head]
    trace.check("8 bits: every value comes back to within half a step",
                all(abs(a - b) <= (max(row) - min(row)) / 255 / 2 * (1 + 1e-9)
                    for row in groups for a, b in zip(round_to_grid(row, 8), row)), "scale / 2")


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
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            prefix = f"layers.{layer}."
            shapes[prefix + "attention_norm"] = (self.dim,)
            shapes[prefix + "attention.wq"] = (self.dim, self.dim)
            shapes[prefix + "attention.wk"] = (kv_dim, self.dim)
            shapes[prefix + "attention.wv"] = (kv_dim, self.dim)
            shapes[prefix + "attention.wo"] = (self.dim, self.dim)
            shapes[prefix + "ffn_norm"] = (self.dim,)
            shapes[prefix + "feed_forward.w1"] = (self.hidden_dim, self.dim)
            shapes[prefix + "feed_forward.w2"] = (self.dim, self.hidden_dim)
            shapes[prefix + "feed_forward.w3"] = (self.hidden_dim, self.dim)
        shapes["norm"] = (self.dim,)
        shapes["output"] = (self.vocab_size, self.dim)
        return shapes


class Llama:
    """weights: {name: matrix [out][in] or gain [dim]}, named and shaped as Config.shapes() says.

    Every weight is applied by one of the small methods, so that a subclass can do it differently.
    """

    def __init__(self, config: Config, weights: dict[str, Matrix | Vector]):
        for name in config.shapes():
            if name not in weights:
                raise ValueError(f"weights must have {name!r}")
        self.config = config
        self.weights = weights

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
            attended = self.attend(prefix + "attention", q, k, v, mask)
            x = add(x, self.linear(prefix + "attention.wo", attended))
            # Feed-forward: every token is worked on by itself.
            h = self.norm(prefix + "ffn_norm", x)
            gate = self.linear(prefix + "feed_forward.w1", h)
            up = self.linear(prefix + "feed_forward.w3", h)
            hidden = self.gate(prefix + "feed_forward", gate, up)
            x = add(x, self.linear(prefix + "feed_forward.w2", hidden))
        return self.linear("output", self.norm("norm", x))

    def linear(self, name: str, x: Matrix) -> Matrix:
        """Apply the matrix of that name."""
        return linear(x, self.weights[name])

    def norm(self, name: str, x: Matrix) -> Matrix:
        """Apply the RMSNorm whose gain has that name."""
        return rms_norm(x, self.weights[name], self.config.norm_eps)

    def attend(self, name: str, q: Matrix, k: Matrix, v: Matrix, mask=None) -> Matrix:
        """Apply the attention of the layer of that name, which has no weights of its own."""
        return attend(q, k, v, self.config.n_heads, self.config.n_kv_heads, mask)

    def gate(self, name: str, a: Matrix, b: Matrix) -> Matrix:
        """Apply the SwiGLU of the layer of that name, which has no weights of its own."""
        return swiglu(a, b)


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
            z = complex(a, b) * cmath.rect(1.0, position * theta)
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
        channels = list(zip(*values[h // group]))
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


def concat(*blocks: Matrix) -> Matrix:
    """Return the blocks side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


# Training: skip this on a first reading
#
# The forward pass runs on a model that keeps what every operation read. The backward pass goes
# through the operations in the opposite order. Each takes the gradient of its output and returns
# those of its inputs, for whole matrices at a time, so that all the work is in dot() here as well.


class RecordingLlama(Llama):
    """A Llama that keeps in .inputs what each of its operations read, under the operation's name.

    Of a matrix or a norm that is x, of an attention (q, k, v), of a SwiGLU (a, b).
    """

    def __init__(self, config: Config, weights: dict[str, Matrix | Vector]):
        super().__init__(config, weights)
        self.inputs: dict[str, Matrix | tuple] = {}

    def linear(self, name: str, x: Matrix) -> Matrix:
        self.inputs[name] = x
        return super().linear(name, x)

    def norm(self, name: str, x: Matrix) -> Matrix:
        self.inputs[name] = x
        return super().norm(name, x)

    def attend(self, name: str, q: Matrix, k: Matrix, v: Matrix, mask=None) -> Matrix:
        self.inputs[name] = (q, k, v)
        return super().attend(name, q, k, v, mask)

    def gate(self, name: str, a: Matrix, b: Matrix) -> Matrix:
        self.inputs[name] = (a, b)
        return super().gate(name, a, b)

    def backward(self, tokens: Sequence[int], d_logits: Matrix) -> dict[str, Matrix | Vector]:
        """Return {weight: its gradient} after forward(tokens); d_logits: the gradient of its output."""
        c = self.config
        gradients: dict[str, Matrix | Vector] = {}
        unrotate = [-position for position in range(len(tokens))]

        def linear_back(name: str, d: Matrix) -> Matrix:
            d_x, gradients[name] = linear_backward(d, self.inputs[name], self.weights[name])
            return d_x

        def norm_back(name: str, d: Matrix) -> Matrix:
            d_x, gradients[name] = rms_norm_backward(d, self.inputs[name], self.weights[name],
                                                     c.norm_eps)
            return d_x

        d = norm_back("norm", linear_back("output", d_logits))
        for layer in reversed(range(c.n_layers)):
            prefix = f"layers.{layer}."
            # Feed-forward: d goes past the block as it is, and through it.
            d_hidden = linear_back(prefix + "feed_forward.w2", d)
            d_gate, d_up = swiglu_backward(d_hidden, *self.inputs[prefix + "feed_forward"])
            d_h = add(linear_back(prefix + "feed_forward.w1", d_gate),
                      linear_back(prefix + "feed_forward.w3", d_up))
            d = add(d, norm_back(prefix + "ffn_norm", d_h))
            # Attention
            d_attended = linear_back(prefix + "attention.wo", d)
            d_q, d_k, d_v = attend_backward(d_attended, *self.inputs[prefix + "attention"],
                                            c.n_heads, c.n_kv_heads)
            d_q = rope_heads(d_q, unrotate, c.n_heads, c.rope_base)
            d_k = rope_heads(d_k, unrotate, c.n_kv_heads, c.rope_base)
            d_h = add(linear_back(prefix + "attention.wq", d_q),
                      linear_back(prefix + "attention.wk", d_k))
            d_h = add(d_h, linear_back(prefix + "attention.wv", d_v))
            d = add(d, norm_back(prefix + "attention_norm", d_h))
        # A token's gradient goes to its row of the embedding table.
        d_table = [[0.0] * c.dim for _ in self.weights["tok_embeddings"]]
        for token, row in zip(tokens, d):
            d_table[token] = list(map(operator.add, d_table[token], row))
        gradients["tok_embeddings"] = d_table
        return gradients


def linear_backward(d: Matrix, x: Matrix, w: Matrix) -> tuple[Matrix, Matrix]:
    """y = x wᵀ: return dx = d w and dw = dᵀ x."""
    d_x = linear(d, list(zip(*w)))
    d_w = linear(list(zip(*d)), list(zip(*x)))
    return d_x, d_w


def rms_norm_backward(d: Matrix, x: Matrix, gain: Vector, eps: float) -> tuple[Matrix, Vector]:
    """y = gain · u with u = x / rms: return dx = (gain·d - u · mean(gain·d · u)) / rms and dgain."""
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
    d_keys = [[[0.0] * len(row) for row in head] for head in keys]
    d_values = [[[0.0] * len(row) for row in head] for head in values]
    for h, (queries, d_head) in enumerate(zip(split_heads(q, n_heads), split_heads(d, n_heads))):
        g = h // group
        scale = 1 / math.sqrt(len(queries[0]))
        p = []
        d_s = []
        for weights, d_row in zip(head_weights(queries, keys[g]), d_head):
            d_p = [dot(d_row, value) for value in values[g][:len(weights)]]
            mean = dot(weights, d_p)
            unseen = [0.0] * (len(k) - len(weights))
            p.append(weights + unseen)
            d_s.append([w * (slope - mean) * scale for w, slope in zip(weights, d_p)] + unseen)
        d_queries.append(linear(d_s, list(zip(*keys[g]))))
        d_keys[g] = add(d_keys[g], linear(list(zip(*d_s)), list(zip(*queries))))
        d_values[g] = add(d_values[g], linear(list(zip(*p)), list(zip(*d_head))))
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
    config: Config, weights: dict[str, Matrix | Vector], tokens: Sequence[int]
) -> tuple[float, dict[str, Matrix | Vector]]:
    """Return the mean loss of predicting each token from those before it, and its gradients."""
    model = RecordingLlama(config, weights)
    loss, d_logits = cross_entropy(model.forward(tokens[:-1]), tokens[1:])
    return loss, model.backward(tokens[:-1], d_logits)


class Adam:
    """Steps scaled by running means of the gradient and of its square (Kingma & Ba 2015)."""

    def __init__(self, weights: dict[str, Matrix | Vector], beta1: float = 0.7, beta2: float = 0.95):
        self.rows = {name: as_rows(w) for name, w in weights.items()}
        self.mean = {name: [[0.0] * len(row) for row in rows] for name, rows in self.rows.items()}
        self.square = {name: [[0.0] * len(row) for row in rows] for name, rows in self.rows.items()}
        self.beta1 = beta1
        self.beta2 = beta2
        self.steps = 0

    def step(self, gradients: dict[str, Matrix | Vector], learning_rate: float) -> None:
        """Change the weights, in place."""
        self.steps += 1
        b1, c1 = self.beta1, 1 - self.beta1
        b2, c2 = self.beta2, 1 - self.beta2
        # The means start at zero; these undo that.
        rate = learning_rate / (1 - b1 ** self.steps)
        unbias = 1 / (1 - b2 ** self.steps)
        for name, gradient in gradients.items():
            rows = zip(self.rows[name], as_rows(gradient), self.mean[name], self.square[name])
            for w, d, m, v in rows:
                m[:] = [b1 * mean + c1 * slope for mean, slope in zip(m, d)]
                v[:] = [b2 * mean + c2 * slope * slope for mean, slope in zip(v, d)]
                w[:] = [weight - rate * mean / (math.sqrt(square * unbias) + 1e-8)
                        for weight, mean, square in zip(w, m, v)]


def as_rows(w: Matrix | Vector) -> Matrix:
    """Return a matrix as it is, and a vector as a matrix of one row; the numbers are not copied."""
    return w if isinstance(w[0], list) else [w]


def init_weights(config: Config, rng: random.Random) -> dict[str, Matrix | Vector]:
    """Return first weights: gains 1, embeddings of size 1, matrices of size 1/√in.

    Matrices that write to the residual stream get half of that.
    """
    weights: dict[str, Matrix | Vector] = {}
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


# The bench


def count_parameters(c: Config) -> int:
    """All of a model's numbers."""
    return sum(math.prod(shape) for shape in c.shapes().values())


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


class WatchedLlama(Llama):
    """A Llama that notes in .touched the matrices, keys and values that its operations read."""

    def linear(self, name: str, x: Matrix) -> Matrix:
        self.touched.append(self.weights[name])
        return super().linear(name, x)

    def attend(self, name: str, q: Matrix, k: Matrix, v: Matrix, mask=None) -> Matrix:
        self.touched += [k, v]
        return super().attend(name, q, k, v, mask)


def text_table(trace: Trace, header: Sequence[str], rows: Sequence[Sequence[str]], left=()) -> None:
    """For the time being: a table of text."""
    columns = {f"{i} as {name}" if name else f"{i} as  ": "" for i, name in enumerate(header)}
    trace.table([{str(i): cell for i, cell in enumerate(row)} for row in rows], columns)


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


SECTIONS = [
    Section("Generation without a cache, and with one", show_cache, [KVCache, generate]),
    Section("Prefill and decode are different machines", show_intensity, [step_seconds]),
    Section("The cache's size", show_size, [kv_bytes_per_token], core=False),
    Section("Paged attention", show_paging, [BlockPool, PagedKVCache, contiguous_waste]),
    Section("Sharing: reference counts and copy on write", show_sharing, [PagedKVCache, BlockPool]),
    Section("Prefix caching", show_prefix_caching, [hash_block, register_blocks, adopt_prefix]),
    Section("Continuous batching", show_continuous, [serve, Engine]),
    Section("Chunked prefill", show_chunked, [serve, Engine]),
    Section("Running out of blocks", show_preemption, [Engine, swap_out, swap_in], core=False),
    Section("Splitwise: prefill here, decode there", show_split, [hand_over, swap_in], core=False),
    Section("A smaller cache", show_small_cache, [round_to_grid, quantize_cache], core=False),
]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; the exit status."""
    parser = common_parser("microkv", "The KV cache of a tiny Llama, and what serving engines do about it.",
                           len(SECTIONS))
    parser.add_argument("--prompt", default=PROMPT, help=f"what to go on from (default: {PROMPT!r})")
    parser.add_argument("--max-new-tokens", metavar="N", type=whole_number(1, 64), default=MAX_NEW_TOKENS,
                        help=f"tokens to generate (default {MAX_NEW_TOKENS})")
    parser.add_argument("--block-size", metavar="N", type=whole_number(1, 64), default=BLOCK_SIZE,
                        help=f"tokens a block holds (default {BLOCK_SIZE})")
    parser.add_argument("--num-blocks", metavar="N", type=whole_number(1, 999),
                        help="blocks in the pool of sections 7 and 9 (default: plenty, and ever fewer)")
    parser.add_argument("--max-num-seqs", metavar="N", type=whole_number(1, 64), default=MAX_NUM_SEQS,
                        help=f"requests that may run at the same time (default {MAX_NUM_SEQS})")
    parser.add_argument("--max-num-batched-tokens", metavar="N", type=whole_number(1, 9999),
                        default=MAX_NUM_BATCHED_TOKENS, help="tokens a step may compute where prompts are cut up, "
                        f"section 8; the running requests get one each in any case (default {MAX_NUM_BATCHED_TOKENS})")
    knobs = parser.parse_args(argv)

    tokenizer = knobs.tokenizer = Tokenizer.train(TEXT, VOCAB_SIZE)
    try:
        knobs.prompt_ids = tokenizer.encode(knobs.prompt)
    except ValueError as error:
        parser.error(f"argument --prompt: {error}")
    if not 1 <= len(knobs.prompt_ids) <= 64:
        parser.error(f"argument --prompt: {len(knobs.prompt_ids)} tokens; it must have 1 to 64")
    knobs.requests = make_requests(tokenizer, random.Random(knobs.seed))
    smallest = max(blocks_for(request, knobs.block_size) for request in knobs.requests)
    if knobs.num_blocks and knobs.num_blocks < smallest:
        parser.error(f"argument --num-blocks: the largest request needs {smallest} blocks of {knobs.block_size}, "
                     f"so {smallest} or more, not {knobs.num_blocks}")
    knobs.config = Config(len(tokenizer.vocab), **SIZES)
    ids = tokenizer.encode(TEXT)
    knobs.model = functools.cache(lambda: train(knobs.config, ids, random.Random(knobs.seed), **TRAINING)[0])
    knobs.alone = functools.cache(lambda request: generate(knobs.model(), request.prompt, request.max_new_tokens,
                                                           KVCache(knobs.config)))
    return run_sections(SECTIONS, knobs, "python microkv.py --section 9 --num-blocks 8 --max-num-seqs 8")


if __name__ == "__main__":
    sys.exit(main())
