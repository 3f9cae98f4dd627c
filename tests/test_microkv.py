"""microkv: every cache against none, every schedule against each request alone, the tiny Llama
against numpy written from the papers, its gradients against finite differences; and what the
experiments count, worked out by hand on small inputs, and found again for several seeds.
"""

import functools
import hashlib
import math
import os
import random

import numpy as np
import pytest

import microkv as m
from tests.tools.fast_llama import make_fast

TIGHT = {"rtol": 0, "atol": 1e-12}
CONFIGS = [
    m.Config(13, 8, 2, 4, 2, 6),
    m.Config(5, 6, 1, 3, 1, 7, rope_base=500.0, norm_eps=1e-3),
    m.Config(17, 8, 3, 2, 2, 5, rope_base=500.0),
]
SMALL = m.Config(13, 4, 1, 2, 1, 3)  # for tests of schedules
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dim}x{c.n_layers}")


def make_model(config=CONFIGS[0], seed=0):
    """Return a Llama with random weights, gains included."""
    rng = random.Random(seed)
    weights = m.init_weights(config, rng)
    for name, w in weights.items():
        if name.endswith("norm"):
            weights[name] = [1 + 0.3 * rng.gauss(0, 1) for _ in w]
    return m.Llama(config, weights)


# 1. Generation without a cache, and with one


@pytest.mark.parametrize("kind", ["none", "plain", "paged"])
def test_generate_is_greedy(kind):
    model = make_model()
    tokens = [3, 1]
    for _ in range(9):
        logits = reference_logits(model.config, model.weights, tokens)[-1]
        tokens.append(int(logits.argmax()))
    caches = {
        "none": None,
        "plain": m.KVCache(model.config),
        "paged": m.PagedKVCache(m.BlockPool(9, 2), model.config),
    }
    assert m.generate(model, [3, 1], 9, caches[kind]) == tokens[2:]
    assert m.generate(model, [3, 1], 0) == []


def test_generate_goes_on_from_a_cache_that_holds_part_of_the_prompt():
    model = make_model()
    prompt = [3, 1, 4, 1, 5]
    expected = m.generate(model, prompt, 6)
    for n_known in range(1, 5):
        cache = m.KVCache(model.config)
        model.forward(prompt[:n_known], cache)
        assert m.generate(model, prompt, 6, cache) == expected
    cache = m.KVCache(model.config)
    model.forward(prompt, cache)
    with pytest.raises(ValueError, match="cache"):
        m.generate(model, prompt, 6, cache)


def test_argmax_takes_the_first_of_the_largest():
    assert m.argmax([1.0, 3.0, 3.0]) == 1


@pytest.mark.parametrize("prompt, n", [([], 3), ([1], -1)])
def test_generate_refuses(prompt, n):
    with pytest.raises(ValueError, match="prompt"):
        m.generate(make_model(), prompt, n)


def test_a_watched_model_counts_tokens_and_keeps_the_last_logits():
    plain = make_model()
    model = m.WatchedLlama(plain)
    cache = m.KVCache(plain.config)
    logits = [model.forward(tokens, cache)[-1] for tokens in ([1, 2, 3], [4])]
    assert model.n_run == [3, 1]
    assert model.logits == logits
    assert plain.forward([1, 2, 3])[-1] == logits[0]


# 2. Prefill and decode


TOY_GPU = m.Gpu("toy", flops=100.0, hbm_bytes_per_s=10.0, hbm_bytes=100.0)
# 5 weights that a step uses, beside an embedding table of 6; 4 bytes of cache for a token
TOY_MODEL = m.ServedModel("toy", 11.0, 3, 2, 1, 1, 1)


def test_step_seconds_is_the_roofline():
    assert TOY_GPU.ridge == 10
    assert TOY_MODEL.used_weights == 5
    assert TOY_MODEL.kv_bytes == 4
    assert m.kv_bytes_per_token(3, 5, 7, 0.5) == 105
    assert m.step_seconds(TOY_GPU, TOY_MODEL, 3, 0) == (0.3, 1.0)
    assert m.step_seconds(TOY_GPU, TOY_MODEL, 3, 5, weight_bytes=0.5) == (0.3, 2.25)
    assert m.StepTime(1.0, 2.0).seconds == m.StepTime(2.0, 1.0).seconds == 2.0


@pytest.mark.parametrize("cached", [0, 1, 100, 256, 500])
def test_batch_at_ridge_is_the_first_that_arithmetic_takes_longer_for(cached):
    got = m.batch_at_ridge(m.PRICED_GPU, m.PRICED_MODEL, cached)
    first = None
    for batch in range(1, 3000):
        step = m.step_seconds(m.PRICED_GPU, m.PRICED_MODEL, batch, batch * cached)
        if step.arithmetic >= step.reading:
            first = batch
            break
    assert got == first
    assert m.batch_at_ridge(m.PRICED_GPU, m.PRICED_MODEL, 1024) is None


def test_the_batch_at_the_ridge_is_rounded_up():
    assert m.PRICED_GPU.ridge == pytest.approx(153.02, abs=0.005)
    assert m.batch_at_ridge(m.PRICED_GPU, m.PRICED_MODEL, 0) == 154


def test_requests_that_fit():
    # 92 of 100 bytes, less 22 for the weights, leave 70; a request of 3 tokens takes 12.
    assert m.requests_that_fit(TOY_GPU, TOY_MODEL, 3) == 5
    assert m.requests_that_fit(TOY_GPU, TOY_MODEL, 3, memory_share=0.2) == 0


def test_the_steps_of_the_trace():
    one = m.price_phase("decode", 1, 1, 1024)
    step = m.step_seconds(m.PRICED_GPU, m.PRICED_MODEL, 1, 1024)
    assert one[:3] == ("decode", 1, 1)
    assert one.arithmetic == pytest.approx(step.arithmetic * 1e3, rel=1e-12)
    assert one.reading == pytest.approx(step.reading * 1e3, rel=1e-12)
    # The caches are read beside the weights: a larger batch takes longer, and yields more.
    many = m.price_phase("decode", 128, 1, 1024)
    assert many.tokens == 128
    assert 2 < many.reading / one.reading < 2.2
    assert many.arithmetic < many.reading
    prefill = m.price_phase("prefill", 1, 1024, 1024)
    assert prefill.arithmetic > prefill.reading == one.reading


@pytest.mark.parametrize("bits, expected", [(2.0, 153), (0.5, 38), (1.0, 76)])
def test_free_tokens(bits, expected):
    assert m.free_tokens(m.PRICED_GPU, bits) == expected
    assert m.MAX_NUM_BATCHED_TOKENS == m.priced_free_tokens() == 38


@pytest.mark.parametrize("cached, expected", [(0, 38), (1000, 39), (4400, 44)])
def test_more_tokens_are_free_beside_full_caches(cached, expected):
    """The comment of section 7 says so."""
    for tokens in (expected, expected + 1):
        step = m.priced_step(tokens, cached)
        assert (step.arithmetic <= step.reading) == (tokens == expected)


# 3. Paged attention


def scattered_pool(num_blocks, block_size, seed=0):
    """Return a pool whose free blocks come in no order."""
    pool = m.BlockPool(num_blocks, block_size)
    order = list(range(num_blocks))
    random.Random(seed).shuffle(order)
    pool.free_blocks = m.OrderedDict.fromkeys(order)
    return pool


def check_pool(pool, caches):
    """Assert what must hold of a pool at any time."""
    held = [0] * pool.num_blocks
    for cache in caches:
        assert len(cache.block_table) * pool.block_size >= cache.length
        for block in cache.block_table:
            held[block] += 1
    assert pool.ref_count == held
    assert set(pool.free_blocks) == {block for block, n in enumerate(held) if n == 0}
    assert pool.num_free_blocks + sum(n > 0 for n in held) == pool.num_blocks
    assert {name: block for block, name in pool.hash_of.items()} == pool.block_of


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 15, 16, 17])
def test_cached_uncached_and_paged_agree(block_size, n):
    model = make_model()
    rng = random.Random(7)
    tokens = [rng.randrange(13) for _ in range(n)]
    for piece in (1, 2, 5, 100):
        plain = m.KVCache(model.config)
        paged = m.PagedKVCache(scattered_pool(20, block_size), model.config)
        out = []
        for start in range(0, n, piece):
            logits = model.forward(tokens[start:start + piece], plain)
            assert model.forward(tokens[start:start + piece], paged) == logits  # to the bit
            out += logits
        np.testing.assert_allclose(out, model.forward(tokens), **TIGHT)
        assert plain.length == paged.length == n
        n_blocks = math.ceil(n / block_size)
        assert len(paged.block_table) == n_blocks == 20 - paged.pool.num_free_blocks
        for p in range(n):
            assert paged.slot(p) == paged.block_table[p // block_size] * block_size + p % block_size


@pytest.mark.parametrize("move, fix_table", [(True, True), (True, False)])
def test_the_model_reads_through_the_table(move, fix_table):
    """Move a block's content and its number in the table: the logits stay. Else they change."""
    model = make_model()
    tokens = [1, 2, 3, 4, 5, 6]
    expected = model.forward([*tokens, 7])[-1]
    pool = m.BlockPool(8, 2)
    cache = m.PagedKVCache(pool, model.config)
    other = m.PagedKVCache(pool, model.config)
    model.forward(tokens, cache)
    model.forward(tokens[::-1], other)
    a = cache.block_table[0]
    b = other.block_table[0]
    for i in range(2):
        content = pool.slots[2 * a + i]
        pool.slots[2 * a + i] = pool.slots[2 * b + i]
        pool.slots[2 * b + i] = content
    if fix_table:
        cache.block_table[0] = b
    [logits] = model.forward([7], cache)
    gap = np.abs(np.subtract(logits, expected)).max()
    assert gap < 1e-12 if fix_table else gap > 1e-3


def test_a_block_pool_hands_out_what_it_has_and_no_more():
    pool = m.BlockPool(3, 2)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    assert pool.num_free_blocks == 0
    with pytest.raises(ValueError, match="block"):
        pool.allocate()
    pool.share(1)
    pool.free(1)
    assert pool.num_free_blocks == 0
    assert pool.ref_count == [1, 1, 1]
    pool.free(1)
    pool.free(0)
    assert pool.num_free_blocks == 2
    pool.hash_of = {0: "of 0", 1: "of 1"}
    pool.block_of = {"of 0": 0, "of 1": 1}
    assert pool.allocate() == 1  # freed first, handed out first
    assert pool.hash_of == {0: "of 0"}
    assert pool.block_of == {"of 0": 0}
    with pytest.raises(ValueError, match="free"):
        pool.free(0)
    assert pool.ref_count == [0, 1, 1]


def test_a_free_block_that_is_shared_leaves_the_queue():
    pool = m.BlockPool(3, 2)
    pool.share(1)
    assert pool.num_free_blocks == 2
    assert pool.ref_count == [0, 1, 0]
    assert [pool.allocate(), pool.allocate()] == [0, 2]


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_of_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        m.BlockPool(*arguments)


def test_too_few_blocks_change_nothing():
    model = make_model()
    cache = m.PagedKVCache(m.BlockPool(2, 2), model.config)
    model.forward([1, 2, 3], cache)
    before = list(cache.block_table)
    with pytest.raises(ValueError, match="block"):
        model.forward([4, 5], cache)
    assert (cache.block_table, cache.length, cache.pool.num_free_blocks) == (before, 3, 0)
    model.forward([4], cache)


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_the_picture_of_a_pool(block_size):
    model = make_model()
    texts, caches = m.run_paged(model, [[1, 2], [3, 4, 5]], 4, block_size, random.Random(1))
    pool = caches[0].pool
    assert [cache.length for cache in caches] == [5, 6]
    for text, prompt in zip(texts, ([1, 2], [3, 4, 5])):
        assert text == prompt + m.generate(model, prompt, 4)
    boxes = {}
    for box in " ".join(m.draw_pool(pool, caches)).split():
        number, slots = box.split("│")[:2]
        boxes[int(number)] = slots
    for letter, cache in zip("AB", caches):
        text = "".join(boxes[block] for block in cache.block_table)
        assert text == (letter * cache.length).ljust(len(text), "·")
    assert sum(slots == "_" * block_size for slots in boxes.values()) == pool.num_free_blocks


# 4. Sharing


@pytest.mark.parametrize("n", range(0, 9))
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_fork_and_copy_on_write_disturb_nobody(n, block_size):
    model = make_model()
    rng = random.Random(n)
    prompt = [rng.randrange(13) for _ in range(n)] or [3]
    pool = m.BlockPool(60, block_size)
    caches = [m.PagedKVCache(pool, model.config)]
    model.forward(prompt, caches[0])
    for _ in range(3):
        caches.append(m.fork(caches[0]))
    plain = [m.KVCache(model.config) for _ in caches]
    for cache in plain:
        model.forward(prompt, cache)
    # Forking takes no block.
    assert pool.num_blocks - pool.num_free_blocks == math.ceil(len(prompt) / block_size)
    for _ in range(7):
        for i in rng.sample(range(4), 3):
            token = rng.randrange(13)
            expected = model.forward([token], plain[i])
            assert model.forward([token], caches[i]) == expected  # to the bit
        check_pool(pool, caches)
    for cache in caches:
        cache.free()
    check_pool(pool, [])
    assert pool.num_free_blocks == pool.num_blocks


def test_a_copy_on_write_shares_nothing_with_what_it_was_copied_from():
    """Free the block that was copied from, and write another text into it."""
    model = make_model()
    pool = m.BlockPool(8, 4)
    a = m.PagedKVCache(pool, model.config)
    model.forward([1, 2], a)
    b = m.fork(a)
    assert b.blocks_needed(0) == 0
    assert b.blocks_needed(1) == 1
    b.reserve(0)
    assert b.block_table == a.block_table
    model.forward([3], b)
    old = a.block_table[0]
    a.free()
    pool.free_blocks.move_to_end(old, last=False)
    other = m.PagedKVCache(pool, model.config)
    model.forward([9, 8, 7], other)
    assert other.block_table == [old]
    expected = model.forward([1, 2, 3, 4])[-1]
    assert model.forward([4], b)[-1] == pytest.approx(expected, abs=1e-12)


def test_a_fork_shares_no_block_that_was_only_reserved():
    model = make_model()
    pool = m.BlockPool(8, 2)
    a = m.PagedKVCache(pool, model.config)
    a.reserve(6)
    model.forward([1, 2, 3], a)
    b = m.fork(a)
    assert pool.ref_count[:3] == [2, 2, 1]
    model.forward([4, 5, 6], a)
    model.forward([7, 8, 9], b)
    for cache, text in ((a, [1, 2, 3, 4, 5, 6, 0]), (b, [1, 2, 3, 7, 8, 9, 0])):
        expected = model.forward(text)[-1]
        assert model.forward([0], cache)[-1] == pytest.approx(expected, abs=1e-12)
    check_pool(pool, [a, b])


def test_a_fork_knows_its_hashes_and_keeps_them_to_itself():
    model = make_model()
    pool = m.BlockPool(8, 2)
    a = m.PagedKVCache(pool, model.config)
    model.forward([1, 2, 3], a)
    m.register_blocks(a, [1, 2, 3])
    b = m.fork(a)
    model.forward([4], b)
    m.register_blocks(b, [1, 2, 3, 4])
    assert a.hashes == m.block_hashes([1, 2], 2)
    assert b.hashes == m.block_hashes([1, 2, 3, 4], 2)


# 5. Prefix caching


def test_hash_chain():
    first = hashlib.sha256(b"|1,2").hexdigest()
    assert m.hash_block("", [1, 2]) == first
    assert m.hash_block(first, [3]) == hashlib.sha256(f"{first}|3".encode()).hexdigest()
    assert m.block_hashes([1, 2, 3, 4, 5], 2) == [first, m.hash_block(first, [3, 4])]
    assert m.block_hashes([1], 2) == []
    assert m.hash_block("", [1, 23]) != m.hash_block("", [12, 3])
    # The parent is in the name.
    assert m.block_hashes([9, 2, 3, 4], 2)[1] != m.block_hashes([1, 2, 3, 4], 2)[1]


def test_only_new_blocks_are_hashed(monkeypatch):
    model = make_model()
    cache = m.PagedKVCache(m.BlockPool(20, 2), model.config)
    hashed = []
    plain = m.hash_block

    def counting(parent, tokens):
        hashed.append(tuple(tokens))
        return plain(parent, tokens)

    monkeypatch.setattr(m, "hash_block", counting)
    text = [1, 2, 3]
    model.forward(text, cache)
    m.register_blocks(cache, text)
    for token in range(4, 9):
        text.append(token)
        model.forward([token], cache)
        m.register_blocks(cache, text)
    assert hashed == [(1, 2), (3, 4), (5, 6), (7, 8)]


@pytest.mark.parametrize("seed", range(12))
def test_prefix_hits_are_the_longest_common_run_of_full_blocks(seed):
    model = make_model()
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 3, 5])
    pool = m.BlockPool(400, block_size)
    earlier = []
    for _ in range(12):
        base = []
        if earlier and rng.random() < 0.8:
            base = rng.choice(earlier)[:rng.randrange(1, 12)]
        prompt = base + [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
        naive = 0
        for text in earlier:
            same = 0
            while same < min(len(text), len(prompt) - 1) and text[same] == prompt[same]:
                same += 1
            naive = max(naive, same // block_size * block_size)
        cache = m.PagedKVCache(pool, model.config)
        assert m.adopt_prefix(cache, prompt) == naive == cache.length
        logits = model.forward(prompt[naive:], cache)
        np.testing.assert_allclose(logits, model.forward(prompt)[naive:], **TIGHT)
        m.register_blocks(cache, prompt)
        check_pool(pool, [cache])
        earlier.append(prompt)
        cache.free()
    check_pool(pool, [])


def test_the_last_token_is_never_adopted():
    model = make_model()
    pool = m.BlockPool(4, 2)
    cache = m.PagedKVCache(pool, model.config)
    model.forward([1, 2, 3, 4], cache)
    m.register_blocks(cache, [1, 2, 3, 4])
    table = list(cache.block_table)
    cases = [  # a prompt, and the blocks that it finds
        ([1, 2, 3, 4, 5], table),
        ([1, 2, 3, 4], table[:1]),
        ([1, 3], []),
    ]
    for tokens, expected in cases:
        other = m.PagedKVCache(pool, model.config)
        assert m.adopt_prefix(other, tokens) == 2 * len(expected)
        assert other.block_table == expected
        other.free()


def test_a_refused_admission_leaves_the_order_of_eviction_alone():
    """The head of the queue finds its prefix at every step, and does not fit."""
    early = m.Request((1, 2), 1)
    long = m.Request((9,), 9)
    late = m.Request((7,), 2)
    waiting = m.Request((1, 2, 5, 5, 5, 5, 5, 5, 5), 1)
    engine = m.CachingEngine(make_model(SMALL), [early, long, late, waiting], num_blocks=10,
                             block_size=1, max_num_seqs=3, max_num_batched_tokens=16)
    engine.step()
    engine.step()
    order = list(engine.pool.free_blocks)
    assert len(engine.pool.hash_of) > 3  # what early and late have left is among them
    engine.step()
    assert [state.number for state in engine.waiting] == [3]
    assert list(engine.pool.free_blocks) == order[1:]  # the long one has taken a block


@pytest.mark.parametrize("a, b, expected", [
    ("abcdefg", "abcdefx", 6), ("ab", "abcd", 2), ("abc", "xbc", 0), ("", "abc", 0),
    ("abcd", "abcd", 4),
])
def test_shared_start(a, b, expected):
    assert m.shared_start(a, b) == m.shared_start(b, a) == expected


def test_eviction_takes_the_least_recently_used_and_ends_first():
    model = make_model()
    pool = m.BlockPool(4, 1)
    for text in ([1, 2], [3, 4]):
        cache = m.PagedKVCache(pool, model.config)
        model.forward(text, cache)
        m.register_blocks(cache, text)
        cache.free()

    def known():
        texts = ([1], [1, 2], [3], [3, 4])
        return [text for text in texts if m.block_hashes(text, 1)[-1] in pool.block_of]

    assert known() == [[1], [1, 2], [3], [3, 4]]
    again = m.PagedKVCache(pool, model.config)
    assert m.adopt_prefix(again, [1, 9]) == 1  # used again: now the last in line
    again.free()
    left = []
    for _ in range(4):
        pool.allocate()
        left.append(known())
    assert left == [[[1], [3], [3, 4]], [[1], [3]], [[1]], []]


def test_prefix_rows_by_hand():
    model = make_model(SMALL)
    requests = [m.Request((1, 2, 3, 4, 5), 2), m.Request((1, 2, 3, 9), 1, 1.0)]
    report = m.serve(model, requests, engine=m.CachingEngine, num_blocks=20, block_size=2,
                     max_num_seqs=1, max_num_batched_tokens=64)
    first, second = m.prefix_hits(report, 2)
    assert first == (0, 5, 0, 0, "█████")
    assert second == (1, 4, 2, 2, "░░██")


# 6. Continuous batching


def times_of(report):
    """Return when each request's new tokens came."""
    return [state.times for state in report.states]


def request_set(seed):
    """Return random requests, some alike, and settings under which each can just run."""
    rng = random.Random(seed)
    common = [rng.randrange(13) for _ in range(6)]
    requests = []
    for _ in range(rng.randrange(1, 8)):
        start = common[:rng.randrange(7)]
        rest = [rng.randrange(13) for _ in range(rng.randrange(1, 9))]
        arrival = rng.choice([0.0, rng.random() * 0.02])
        requests.append(m.Request(tuple(start + rest), rng.randrange(1, 10), arrival))
    block_size = rng.choice([1, 2, 3, 4, 7])
    settings = {"block_size": block_size, "max_num_seqs": rng.randrange(1, 6)}
    smallest = 0
    for request in requests:
        tokens = len(request.prompt) + request.max_new_tokens - 1
        smallest = max(smallest, math.ceil(tokens / block_size))
    return requests, settings, smallest, rng


@functools.cache
def answers_alone(seed):
    """Return what the requests of request_set(seed) get, each alone and without a cache."""
    model = make_model(SMALL)
    requests, *_ = request_set(seed)
    return [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]


class SwappingCachingEngine(m.SwappingEngine, m.CachingEngine):
    """An engine that does both: what is on the host is not looked for in the pool."""


@pytest.mark.parametrize("swapping", [False, True], ids=["recompute", "swap"])
@pytest.mark.parametrize("policy", ["static", "continuous", "chunked"])
@pytest.mark.parametrize("seed", range(24))
def test_every_schedule_gives_every_request_what_it_gets_alone(seed, policy, swapping):
    model = make_model(SMALL)
    requests, settings, smallest, rng = request_set(seed)
    alone = answers_alone(seed)
    needed = sum(len(r.prompt) + r.max_new_tokens - 1 for r in requests)
    engines = [m.Engine, m.CachingEngine]
    if swapping:
        engines = [m.SwappingEngine, SwappingCachingEngine]
    for kind in engines:
        budget = 64
        if policy == "chunked":
            budget = rng.randrange(settings["max_num_seqs"], 12)
        blocks = smallest + rng.choice([0, 0, 1, 3, 50])
        engine = kind(model, requests, policy=policy, num_blocks=blocks,
                      max_num_batched_tokens=budget, **settings)
        while engine.waiting or engine.running:
            engine.step()
            check_engine(engine, budget)
        report = engine.run()
        assert report.tokens == alone
        assert engine.pool.num_free_blocks == blocks
        assert not any(engine.pool.ref_count)
        for request, times in zip(requests, times_of(report)):
            assert len(times) == request.max_new_tokens
            assert times == sorted(times)
            assert times[0] > request.arrival
        found = sum(state.found for state in report.states)
        if not report.preempted:
            assert report.computed + found == needed
            assert report.swapped_tokens == 0
        if kind is m.SwappingEngine and policy != "chunked":
            assert report.computed == needed


def test_the_random_request_sets_do_force_preemption():
    preempted = 0
    for seed in range(24):
        requests, settings, smallest, _ = request_set(seed)
        report = m.serve(m.StandIn(), requests, num_blocks=smallest, max_num_batched_tokens=64,
                         **settings)
        preempted += len(report.preempted) > 0
    assert preempted > 7


def check_engine(engine, budget):
    """Assert what must hold after every step."""
    check_pool(engine.pool, [state.cache for state in engine.running])
    assert len(engine.running) <= engine.max_num_seqs
    step = engine.report.steps[-1]
    assert step.end > step.start
    assert 0 < sum(step.tokens.values()) <= budget
    assert set(step.cached) == set(step.tokens)
    for number in step.tokens:
        assert engine.requests[number].arrival <= step.start
    assert all(not state.cache.block_table for state in engine.waiting)
    for queue in (engine.waiting, engine.running):  # first come, first served, after preemption too
        assert list(queue) == m.in_order_of_arrival(queue)
    for i, number in engine.report.preempted:
        assert number not in engine.report.steps[i].tokens
    for state in engine.running:
        text = state.tokens[:state.cache.length]
        for block, name in zip(state.cache.block_table, m.block_hashes(text, engine.block_size)):
            assert engine.pool.hash_of.get(block, name) == name  # a name tells what is in the block


def run_steps(requests, **settings):
    """Return the report of a stand-in's run in a pool of plenty, unless told otherwise."""
    defaults = {"num_blocks": 40, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    return m.serve(m.StandIn(), requests, **(defaults | settings))


def request_of(prompt_length, max_new_tokens, arrival=0.0):
    """Return a request whose prompt has so many tokens; which tokens does not matter."""
    return m.Request((1,) * prompt_length, max_new_tokens, arrival)


def members(report):
    """Return who was in each step."""
    return [sorted(step.tokens) for step in report.steps]


def test_static_batches_start_and_end_together():
    requests = [request_of(1, n) for n in (2, 5, 3, 4)]
    report = run_steps(requests, policy="static")
    assert members(report) == [[0, 1]] * 2 + [[1]] * 3 + [[2, 3]] * 3 + [[3]]
    assert [step.waiting for step in report.steps] == [2] * 5 + [0] * 4
    report = run_steps(requests, policy="continuous")
    assert members(report) == [[0, 1]] * 2 + [[1, 2]] * 3 + [[3]] * 4


def test_static_batches_are_closed_and_the_clock_waits_only_for_work():
    report = run_steps([request_of(1, 5), request_of(1, 2, 1e-9)], policy="static")
    assert members(report) == [[0]] * 5 + [[1]] * 2
    report = run_steps([request_of(1, 5), request_of(1, 1, 1.0)])
    first, second = times_of(report)
    assert first[-1] < 1 < second[0]


def test_nobody_comes_in_during_a_step_that_had_to_preempt():
    """A prompt of 8 is cut up. In step 2 the request with 4 tokens takes the last block."""
    report = m.serve_by_hand([(3, 4), (8, 1)], num_blocks=3, budget=4)
    tokens = [step.tokens for step in report.steps]
    assert tokens == [{0: 3, 1: 1}, {0: 1, 1: 3}, {0: 1}, {0: 1, 1: 3}, {1: 4}, {1: 1}]
    assert report.preempted == [(2, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_first_tokens_if_all_requests_come_at_once(seed):
    """The trace says: in static batches 1.2 to 2.1 times as late, on 20 sets of requests."""
    requests = requests_at_once(seed)[:9]
    means = []
    for policy in ("static", "continuous"):
        report = m.serve_plenty(m.StandIn(), requests, policy, max_num_seqs=4)
        means.append(np.mean(m.first_tokens(report.states)))
    assert 1.2 <= round(means[0] / means[1], 1) <= 2.1


def test_nobody_overtakes():
    """A long prompt at the head of the queue is not passed by a short one behind it."""
    requests = [request_of(8, 4), request_of(8, 2), request_of(1, 1)]
    times = times_of(run_steps(requests, num_blocks=8, max_num_seqs=3))
    assert times[2][0] >= times[1][0]


def test_the_step_of_the_comment_of_section_6():
    """One block is free: A takes it, B needs none, C waits."""
    requests = [request_of(8, 4), request_of(5, 2), request_of(6, 1, 1e-9)]
    report = run_steps(requests, num_blocks=5, block_size=4, max_num_seqs=3)
    assert report.steps[0].cached == {0: 8, 1: 5}
    assert report.steps[1].tokens == {0: 1, 1: 1}
    assert report.steps[1].waiting == 1


def test_the_preemption_of_the_comment_of_section_6():
    """No block is free: B gives back its two, A takes one, and one is too few for B or for C."""
    requests = [request_of(8, 4), request_of(5, 2), request_of(6, 1, 1e-9)]
    report = run_steps(requests, num_blocks=4, block_size=4, max_num_seqs=3)
    assert report.steps[0].cached == {0: 8, 1: 5}
    assert report.preempted == [(1, 1)]
    assert [step.tokens for step in report.steps[1:5]] == [{0: 1}, {0: 1}, {0: 1}, {1: 6, 2: 6}]
    assert [step.waiting for step in report.steps[1:5]] == [2, 2, 2, 0]


def test_prefix_caching_in_the_engine():
    model = make_model()
    prompt = (1, 2, 3, 4, 5)
    requests = [m.Request(prompt, 2), m.Request(prompt, 2, 1.0)]
    settings = {"num_blocks": 40, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    report = m.serve(model, requests, engine=m.CachingEngine, **settings)
    assert [state.found for state in report.states] == [0, 4]
    assert report.tokens == [m.generate(model, prompt, 2)] * 2
    report = m.serve(model, requests, **settings)
    assert [state.found for state in report.states] == [0, 0]


def test_the_clock_is_the_cost_model():
    report = run_steps([request_of(10, 3, 5.0)])

    def seconds(new, cached):
        return m.step_seconds(m.PRICED_GPU, m.PRICED_MODEL, new, cached, 0.5).seconds

    expected = [5 + seconds(10, 10)]
    expected.append(expected[-1] + seconds(1, 11))
    expected.append(expected[-1] + seconds(1, 12))
    np.testing.assert_allclose(times_of(report)[0], expected, rtol=1e-12)


def test_a_scheduler_that_is_stuck_is_noticed(monkeypatch):
    engine = m.Engine(m.StandIn(), [request_of(1, 2)], num_blocks=9, block_size=2, max_num_seqs=1,
                      max_num_batched_tokens=64)
    engine.step()
    monkeypatch.setattr(engine, "schedule", lambda: [])
    with pytest.raises(RuntimeError, match="no work"):
        engine.run()
    assert len(engine.report.steps) == 1


def test_more_seats_than_budget_is_fine_where_prompts_are_whole():
    report = run_steps([request_of(1, 3)], max_num_seqs=20, max_num_batched_tokens=10)
    assert len(report.steps) == 3


@pytest.mark.parametrize("change, word", [
    ({"num_blocks": 4}, "num_blocks must be at least 5"),
    ({"policy": "best"}, "policy"),
    ({"max_num_seqs": 0}, "max_num_seqs"),
    ({"max_num_batched_tokens": 8}, "max_num_batched_tokens must be at least 9"),
    ({"policy": "chunked", "max_num_batched_tokens": 1}, "at least max_num_seqs"),
    ({"block_size": 0}, "block_size"),
])
def test_settings_that_cannot_work_are_refused(change, word):
    requests = [request_of(3, 7), request_of(1, 1)]
    settings = {"num_blocks": 5, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 9}
    m.serve(m.StandIn(), requests, **settings)
    with pytest.raises(ValueError, match=word):
        m.serve(m.StandIn(), requests, **(settings | change))


@pytest.mark.parametrize("request_", [request_of(0, 3), request_of(1, 0)])
def test_empty_requests_are_refused(request_):
    with pytest.raises(ValueError, match="request 0 must have"):
        run_steps([request_])


def test_gaps_and_first_tokens_by_hand():
    report = run_steps([request_of(1, 3), request_of(1, 1, 0.5)])
    step = (report.steps[0].end - report.steps[0].start) * 1e3
    gaps = m.token_gaps(report.states)
    assert gaps == pytest.approx([step, step], rel=1e-3)
    assert m.token_gaps(report.states, first=1) == gaps[1:]
    assert m.token_gaps(report.states[1:]) == [0.0]
    assert m.first_tokens(report.states) == pytest.approx([step, step], rel=1e-3)


def test_the_timeline_by_hand():
    requests = [request_of(3, 4), request_of(3, 4), request_of(1, 2)]
    report = run_steps(requests, num_blocks=4)
    assert [line[10:].rstrip() for line in m.timeline(report)] == [
        "█▒▒▒",
        "█▒×·█▒",
        "····█▒",
    ]
    assert m.timeline(report)[0].startswith(" 0  3+4   ")
    assert m.timeline(report, width=3)[0][10:] == "█▒▒…"


TOKENIZER = m.Tokenizer.train(m.TEXT, m.VOCAB_SIZE)


# 7. Chunked prefill


def test_chunked_prefill_keeps_the_budget_and_decodes_first():
    requests = [m.Request((1, 2), 9), m.Request(tuple(range(12)), 2, 1e-9)]
    report = run_steps(requests, policy="chunked", max_num_batched_tokens=5)
    assert [step.tokens for step in report.steps[:5]] == [
        {0: 2}, {0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 1},
    ]


def test_the_chunks_of_the_comment_of_section_7():
    requests = [request_of(1, 9)] * 3 + [request_of(100, 2, 1e-9)]
    report = run_steps(requests, policy="chunked", num_blocks=60, max_num_seqs=4,
                       max_num_batched_tokens=38)
    assert [sum(step.tokens.values()) for step in report.steps[:5]] == [3, 38, 38, 33, 4]


def test_chunks_close_the_gap_that_a_long_prompt_tears():
    requests = m.long_prompt_requests(TOKENIZER)
    rows = {}
    for budget in (8, 16, 38, 64, 96):
        report = m.serve_plenty(m.StandIn(), requests, "chunked", budget=budget)
        rows[budget] = m.budget_row(report, budget)
    whole = m.budget_row(m.serve_plenty(m.StandIn(), requests), "whole")
    assert rows[38].worst_gap < whole.worst_gap / 3
    assert rows[38].end < 0.92 * whole.end
    assert rows[38].first_token < 1.25 * whole.first_token
    assert rows[8].worst_gap > 0.95 * rows[38].worst_gap
    assert rows[8].first_token > 4 * rows[38].first_token
    assert rows[96].worst_gap > 2 * rows[38].worst_gap


def test_clock_line_by_hand():
    report = run_steps([request_of(1, 2), request_of(1, 1, 0.0025)])
    ms = report.steps[0].end * 1e3
    assert 1.5 < ms < 2
    first, second = [line[11:] for line in m.clock_line(report)]
    assert first == "·▒·▒"
    assert second == "  ···▒"
    assert m.clock_line(report, width=2)[0][11:] == "·▒…"


# 8. What paging saves


def test_slot_waste_by_hand():
    """Two requests in a pool of 2 blocks of 2, one at a time; the last token is never stored."""
    requests = [request_of(1, 3), request_of(3, 2)]
    report = run_steps(requests, num_blocks=2)
    # While the second waits, the first has 1 token in a block, 2 in one, 3 in two.
    assert m.slot_waste(report, 4, 2) == m.Waste(used=6, reserved=1, internal=1, free=4)


def test_the_request_of_the_comment_of_section_8():
    """3 tokens now, 5 at its end: in a piece of 8, and in blocks of 2."""
    requests = [request_of(3, 3), request_of(5, 1)]
    in_pieces = m.Waste(used=3, reserved=2, internal=3, free=0)
    in_blocks = m.Waste(used=3, reserved=1, internal=0, free=4)
    for block_size, first in ((8, in_pieces), (2, in_blocks)):
        report = run_steps(requests, num_blocks=8 // block_size, block_size=block_size)
        report.steps = report.steps[:1]
        assert m.slot_waste(report, 8, block_size) == first


def requests_at_once(seed):
    """Return the 18 requests of the trace, all of which come at time 0."""
    requests = m.make_requests(TOKENIZER, random.Random(seed))
    return [request._replace(arrival=0.0) for request in requests] * 2


def unused_in_pieces(requests, n_pieces, piece):
    """Return the share `internal` of a memory of pieces, worked out without an engine.

    A request holds the piece that is free first, for one step for each of its new tokens.
    """
    free_from = [0] * n_pieces  # the step from which each piece is free
    starts = []
    for request in requests:
        start = min(free_from)
        free_from[free_from.index(start)] = start + request.max_new_tokens
        starts.append(start)
    nobody_waits = starts[-1]
    unused = 0
    for request, start in zip(requests, starts):
        steps = min(start + request.max_new_tokens, nobody_waits) - start
        unused += steps * (piece - len(request.prompt) - request.max_new_tokens + 1)
    return unused / (n_pieces * piece * nobody_waits)


@pytest.mark.parametrize("block_size", [1, 3, 4, 7, 16, 64])
def test_the_shares_of_memory_by_another_count(block_size):
    """All come at time 0. The shares are all of the memory, whether blocks divide it or not."""
    requests = requests_at_once(1)
    row = m.memory_row(requests, 128, block_size)
    assert sum(row[1:5]) == pytest.approx(1, abs=1e-9)
    report = m.serve(m.StandIn(), requests, num_blocks=128 // block_size, block_size=block_size,
                     max_num_seqs=18, max_num_batched_tokens=2048)
    used = [sum(step.cached.values()) for step in report.steps if step.waiting]
    assert row.used == pytest.approx(np.mean(used) / 128, rel=1e-12)
    if block_size == 64:
        assert row.internal == pytest.approx(unused_in_pieces(requests, 2, 64), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_a_lower_limit_wastes_less(seed):
    """The trace says: 39% to 46% in pieces of 32, and no request needs more than 30 slots."""
    requests = requests_at_once(seed)
    assert max(m.slots_needed(requests)) <= 30
    assert 0.39 <= round(m.memory_row(requests, 128, 32).used, 2) <= 0.46


def test_the_default_row():
    requests = requests_at_once(0)
    row = m.memory_row(requests, 128, 4)
    shares = [row.used, row.reserved, row.internal, row.free]
    assert [round(100 * share) for share in shares] == [88, 9, 1, 3]
    assert (row.preempted, row.computed) == (9, 457)
    row = m.memory_row(requests, 128, 64)
    shares = [row.used, row.reserved, row.internal, row.free]
    assert [round(100 * share) for share in shares] == [22, 10, 68, 0]
    assert (row.preempted, row.computed) == (0, 358)


# 9. Running out of blocks


def test_preemption_happens_and_both_ways_cost_what_they_say():
    model = make_model()
    requests = [m.Request((1, 2, 3), 8), m.Request((4, 5, 6), 8)]
    settings = {"num_blocks": 6, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    again = m.serve(model, requests, **settings)
    swapped = m.serve(model, requests, engine=m.SwappingEngine, **settings)
    assert again.preempted == swapped.preempted
    assert [number for _, number in again.preempted] == [1]
    assert again.computed > swapped.computed == 20
    assert again.swapped_tokens == 0
    # What is swapped out and in by one is computed again by the other.
    moved = swapped.swapped_tokens
    assert moved == 2 * (again.computed - swapped.computed)
    extra = swapped.steps[-1].end - again.steps[-1].end
    assert extra == pytest.approx(moved * m.PRICED_MODEL.kv_bytes / 32e9, rel=0.01)


def test_a_row_of_the_preemption_table():
    requests = [m.Request((1, 2, 3), 8), m.Request((4, 5, 6), 8)]
    model = make_model(SMALL)
    report = m.serve(model, requests, engine=m.SwappingEngine, num_blocks=6, block_size=2,
                     max_num_seqs=2, max_num_batched_tokens=64)
    row = m.preemption_row(report, "swap")
    assert row[:-1] == ("swap", 1, 20, report.swapped_tokens, len(report.steps))
    assert row.end == 1e3 * report.steps[-1].end


@pytest.mark.parametrize("kind", [m.Engine, m.SwappingEngine])
def test_a_cache_that_was_preempted_holds_what_one_holds_that_never_was(kind):
    """Watch the caches when requests finish: all their keys and values, in order."""
    kept = {}

    class WatchedEngine(kind):
        def finish(self, state):
            kept[state.number] = m.contents([state.cache])
            super().finish(state)

    model = make_model(SMALL)
    requests = [m.Request((1, 2, 3), 8), m.Request((4, 5, 6), 8)]
    report = m.serve(model, requests, engine=WatchedEngine, num_blocks=6, block_size=2,
                     max_num_seqs=2, max_num_batched_tokens=64)
    assert report.preempted
    for state in report.states:
        expected = m.contents_alone(model, [state.tokens])
        np.testing.assert_allclose(kept[state.number], expected, **TIGHT)


@pytest.mark.parametrize("n, block_size", [(1, 3), (6, 3), (7, 2)])
def test_swapping_out_and_in_takes_other_blocks_and_the_same_tokens(n, block_size):
    model = make_model()
    text = list(range(n))
    n_blocks = math.ceil(n / block_size)
    cache = m.PagedKVCache(m.BlockPool(2 * n_blocks, block_size), model.config)
    model.forward(text, cache)
    slots = m.swap_out(cache)
    cache.free()
    cache.reserve(n)
    m.swap_in(cache, slots)
    assert cache.block_table == list(range(n_blocks, 2 * n_blocks))
    assert cache.length == n
    np.testing.assert_array_equal(m.contents([cache]), m.contents_alone(model, [[*text, 0]]))


def test_a_request_that_comes_back_runs_its_newest_token_too():
    """The comment of section 9 counts it: 8 tokens were cached, 9 are run."""
    requests = [request_of(4, 9), request_of(4, 9)]
    report = run_steps(requests, num_blocks=5, block_size=4)
    i, number = report.preempted[0]
    cached = report.steps[i - 1].cached[number]
    back = next(step for step in report.steps[i:] if number in step.tokens)
    assert back.tokens[number] == cached + 1


@pytest.mark.parametrize("tokens, recompute, swap", [(32, 0.0, 0.26), (128, 4.5, 1.05)])
def test_coming_back_by_the_comment_of_section_9(tokens, recompute, swap):
    """Three others decode, with as many tokens cached."""
    cached = 4 * (tokens + 1)
    more = m.priced_step(tokens + 4, cached).seconds - m.priced_step(4, cached).seconds
    assert more * 1e3 == pytest.approx(recompute, abs=0.05)
    copies = 2 * tokens * m.PRICED_MODEL.kv_bytes / m.PCIE_BYTES_PER_S
    assert copies * 1e3 == pytest.approx(swap, abs=0.005)


# 10. Prefill here, decode there


def test_the_crossing_takes_its_time_and_changes_nothing():
    model = make_model()
    requests = [m.Request((1, 2, 3), 3, 0.5), m.Request((4, 5), 2)]
    settings = {"num_blocks": 3, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    report = m.serve_split(model, requests, 1e8, **settings)
    assert report.tokens == [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]
    assert report.swapped_tokens == 5
    prefill = m.priced_step(3, 3).seconds
    crossing = 3 * m.PRICED_MODEL.kv_bytes / 1e8
    decode = m.priced_step(1, 4).seconds
    first, second, _ = report.states[0].times
    assert first == pytest.approx(0.5 + prefill, rel=1e-12)
    assert second == pytest.approx(first + crossing + decode, rel=1e-12)


def test_a_request_of_one_token_never_crosses():
    model = make_model(SMALL)
    requests = [m.Request((1, 2, 3), 1), m.Request((4, 5), 2)]
    settings = {"num_blocks": 9, "block_size": 2, "max_num_seqs": 2, "max_num_batched_tokens": 64}
    report = m.serve_split(model, requests, 1e9, **settings)
    assert report.swapped_tokens == 2
    assert report.tokens == [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]


@pytest.mark.parametrize("seed", range(6))
def test_two_machines_write_what_one_writes(seed):
    model = make_model(SMALL)
    requests, settings, smallest, _ = request_set(seed)
    settings |= {"num_blocks": smallest, "max_num_batched_tokens": 1024}
    report = m.serve_split(model, requests, 1e9, **settings)
    assert report.tokens == [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]
    for state in report.states:
        crossing = len(state.request.prompt) * m.PRICED_MODEL.kv_bytes / 1e9
        assert len(state.times) == state.request.max_new_tokens
        assert all(later > state.times[0] + crossing for later in state.times[1:])


def test_the_split_has_the_first_token_of_whole_prompts_and_the_gaps_of_chunks():
    requests = m.long_prompt_requests(TOKENIZER)
    rows = {}
    for way in ("continuous", "chunked", "split"):
        rows[way] = m.measure_latency(requests, way)
    split = rows["split"]
    assert split.first_token < 0.9 * rows["continuous"].first_token
    assert split.first_token < 0.8 * rows["chunked"].first_token
    assert split.later_gap < 1.05 * rows["chunked"].later_gap
    assert split.second_gap > 1.5 * rows["chunked"].second_gap


# 11. Latency against load


def test_latency_by_hand():
    """Two cards, a request for each: all first tokens after one step, all gaps a step long."""
    requests = [request_of(1, 3), request_of(1, 3)]
    row = m.measure_latency(requests, "continuous", 7)
    step = m.priced_step(1, 1).seconds * 1e3
    assert row[:2] == ("continuous", 7)
    assert row[2:] == pytest.approx([step] * 3, rel=1e-3)


def test_the_longest_waits_are_what_is_shown():
    """Of 10 requests, 9 have their first token sooner than the one that is shown."""
    lengths = range(10, 110, 10)
    requests = [request_of(n, 2, arrival=float(n)) for n in lengths]  # each is alone
    row = m.measure_latency(requests, "continuous")
    waits = sorted(m.priced_step(n, n).seconds * 1e3 for n in lengths)
    assert row.first_token == pytest.approx(waits[9], rel=1e-9)
    assert row.later_gap == 0.0  # there is none


def test_poisson_requests():
    requests = m.poisson_requests(4000, 25.0, random.Random(0))  # for each of two cards
    arrivals = [request.arrival for request in requests]
    assert arrivals == sorted(arrivals)
    gaps = np.diff(arrivals)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.05)  # as large as the mean: a Poisson process
    assert {len(request.prompt) for request in requests} == set(range(64, 449))


def test_goodput_by_hand():
    rows = [
        m.Latency("x", rate=1, first_token=40.0, second_gap=0.0, later_gap=4.0),
        m.Latency("x", rate=2, first_token=60.0, second_gap=0.0, later_gap=5.0),  # just kept
        m.Latency("x", rate=3, first_token=61.0, second_gap=0.0, later_gap=4.0),
        m.Latency("x", rate=4, first_token=9.0, second_gap=0.0, later_gap=6.0),
    ]
    assert m.goodput(rows) == 2
    assert m.goodput(rows[2:]) == 0


# 12. A smaller cache


def e4m3_values():
    """Return all finite FP8 E4M3 numbers, from their bits."""
    values = []
    for code in range(127):  # 127 is not a number
        exponent, mantissa = divmod(code, 8)
        if exponent == 0:
            values.append(mantissa / 8 * 2 ** -6)
        else:
            values.append((1 + mantissa / 8) * 2 ** (exponent - 7))
    return np.array([-v for v in values[:0:-1]] + values)


def test_nearest_e4m3_finds_the_nearest():
    values = e4m3_values()
    assert values.max() == 448
    rng = np.random.default_rng(0)
    sizes = np.repeat([1, 1e-3, 200], 300)
    for x in rng.normal(size=900) * sizes:
        nearest = np.abs(values - x).min()
        assert abs(m.nearest_e4m3(x) - x) == pytest.approx(nearest, abs=1e-15)
        assert m.nearest_e4m3(x) in values
    assert [m.nearest_e4m3(x) for x in (0.0, 1e9, -1e9, 448.0)] == [0.0, 448.0, -448.0, 448.0]


def test_an_fp8_cache_rounds_every_number_by_itself():
    keys, values = np.random.default_rng(0).normal(size=(2, 5, 4)).tolist()
    given = [list(row) for row in keys]
    grid = np.array(e4m3_values())
    got = m.Fp8KVCache(m.Config(2, 4, 1, 1, 1, 1)).update(0, keys, values)
    for rounded, exact in zip(got, (keys, values)):
        nearest = np.abs(np.ravel(exact)[:, None] - grid).min(axis=1)
        np.testing.assert_allclose(np.abs(np.subtract(rounded, exact)).ravel(), nearest, atol=1e-15)
    assert keys == given


def test_the_move_of_the_logits_by_another_count(monkeypatch):
    """With a cache that rounds nothing they stay; of one text, the move is worked out again."""
    model = make_model()
    texts = [[1, 2, 3, 4, 5, 6, 7], [3, 3, 8]]
    errors, changed = m.fp8_errors(model, texts)
    exact = np.array(model.forward(texts[1]))
    moved = np.array(model.forward(texts[1], m.Fp8KVCache(model.config)))
    expected = np.sqrt(((moved - exact) ** 2).mean()) / exact.std()
    assert errors[1] == pytest.approx(expected, rel=1e-12)
    assert 0 <= changed < 10
    monkeypatch.setattr(m, "nearest_e4m3", lambda x: x)
    errors, changed = m.fp8_errors(model, texts)
    assert max(errors) < 1e-12
    assert changed == 0
    monkeypatch.setattr(m, "nearest_e4m3", lambda x: -x)
    assert m.fp8_errors(model, texts)[1] > 0


# The findings, of 20 sets of requests and 20 models, of seeds 0 to 19
#
# What the trace says of the 20. The suite measures the first five of them; all are measured by
#     FINDING_SEEDS=20 python3 -m pytest -k finding tests/test_microkv.py

SEEDS = pytest.mark.parametrize("seed", range(int(os.environ.get("FINDING_SEEDS", 5))))

# The least and the most of the 20, as the trace rounds them
RANGES = {
    "steps of static batches / of continuous ones": (1.2, 1.6),
    "first tokens of static batches / of continuous ones": (2.1, 6.0),
    "used in blocks of 4": (0.85, 0.88),
    "used in pieces": (0.21, 0.24),
    "steps in pieces / in blocks of 4": (2.9, 3.6),
    "preemptions in blocks of 4": (5, 11),
    "more tokens in blocks of 4": (0.13, 0.33),
    "preemptions in a small pool": (0, 7),
    "more tokens in a small pool": (0.00, 0.44),
    "swapping ends later, ms": (0.00, 0.63),
    "FP8 moves the logits least": (0.012, 0.035),
    "FP8 moves the logits most": (0.012, 0.035),
    "FP8 changes the likeliest": (0, 8),
}

# The seeds on which nobody is preempted in the small pool
UNDISTURBED = {13}

# The goodput of each way, and the seeds of the 20 on which it is another one
GOODPUT = {
    "static": (5, {13: 10}),
    "continuous": (5, {13: 10, 14: 10, 15: 10}),
    "chunked": (40, {}),
    "split": (20, {6: 10}),
}


def assert_in_ranges(found):
    """Compare each number, rounded like the ends of its range, with these ends."""
    for name, number in found.items():
        least, most = RANGES[name]
        digits = max(len(str(end).partition(".")[2]) for end in (least, most))
        assert least <= round(number, digits) <= most, (name, number)


@SEEDS
def test_finding_about_batches(seed):
    requests = m.make_requests(TOKENIZER, random.Random(seed))
    for max_num_seqs in (1, 2, 9, m.MAX_NUM_SEQS):
        static, continuous = (
            m.serve_plenty(m.StandIn(), requests, policy, max_num_seqs=max_num_seqs)
            for policy in ("static", "continuous"))
        assert len(continuous.steps) <= len(static.steps)
    first_tokens = [np.mean(m.first_tokens(report.states)) for report in (static, continuous)]
    assert_in_ranges({
        "steps of static batches / of continuous ones": len(static.steps) / len(continuous.steps),
        "first tokens of static batches / of continuous ones": first_tokens[0] / first_tokens[1],
    })


@SEEDS
def test_finding_about_blocks(seed):
    requests = requests_at_once(seed)
    rows = [m.memory_row(requests, 128, block_size) for block_size in (1, 4, 16, 64)]
    used = [row.used for row in rows]
    steps = [row.steps for row in rows]
    assert used == sorted(used, reverse=True)
    assert steps[1:] == sorted(steps[1:])
    _, blocks, _, pieces = rows
    assert pieces.preempted == 0
    assert_in_ranges({
        "used in blocks of 4": blocks.used,
        "used in pieces": pieces.used,
        "steps in pieces / in blocks of 4": pieces.steps / blocks.steps,
        "preemptions in blocks of 4": blocks.preempted,
        "more tokens in blocks of 4": blocks.computed / sum(m.slots_needed(requests)) - 1,
    })


@SEEDS
def test_finding_about_a_small_pool(seed):
    requests = m.make_requests(TOKENIZER, random.Random(seed))
    num_blocks = 2 * max(m.blocks_for(request, m.BLOCK_SIZE) for request in requests)
    again, swap = (
        m.serve(m.StandIn(), requests, engine=engine, num_blocks=num_blocks,
                block_size=m.BLOCK_SIZE, max_num_seqs=m.MAX_NUM_SEQS, max_num_batched_tokens=1024)
        for engine in (m.Engine, m.SwappingEngine))
    later = (swap.steps[-1].end - again.steps[-1].end) * 1e3
    assert len(swap.preempted) == len(again.preempted)
    assert (len(again.preempted) == 0) == (seed in UNDISTURBED)
    assert (round(later, 2) >= 0.07) == (seed not in UNDISTURBED)
    assert_in_ranges({
        "preemptions in a small pool": len(again.preempted),
        "more tokens in a small pool": again.computed / sum(m.slots_needed(requests)) - 1,
        "swapping ends later, ms": later,
    })


@SEEDS
def test_finding_about_load(seed):
    curves = {way: m.measure_load(way, (5, 10, 20, 40, 80), 80, seed) for way in GOODPUT}
    for way, (goodput, others) in GOODPUT.items():
        assert m.goodput(curves[way]) == others.get(seed, goodput), way
    for static, continuous, chunked, split in list(zip(*curves.values()))[1:]:
        assert continuous.first_token < 0.5 * static.first_token
        assert chunked.first_token < 0.5 * static.first_token
        assert split.first_token < static.first_token
        assert chunked.later_gap < 0.6 * continuous.later_gap


@SEEDS
def test_finding_about_the_small_cache(seed, monkeypatch):
    make_fast(monkeypatch, m)
    verses = m.shuffled_verses(3, random.Random(seed))
    assert all(verse not in m.TEXT for verse in verses)
    texts = [TOKENIZER.encode(verse) for verse in verses]
    errors, changed = m.fp8_errors(m.ServingLab(seed).model, texts)
    assert sum(map(len, texts)) == 249
    assert_in_ranges({
        "FP8 moves the logits least": min(errors),
        "FP8 moves the logits most": max(errors),
        "FP8 changes the likeliest": changed,
    })


# The tiny Llama


def reference_logits(config, weights, tokens):
    """Return a Llama's logits, from the papers, all tokens at once.

    RMSNorm, rotary pairs as 2 × 2 matrices, repeated KV heads, SwiGLU.
    """
    w = {name: np.array(value) for name, value in weights.items()}
    head_dim = config.dim // config.n_heads
    n = len(tokens)

    def norm(x, gain):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.norm_eps) * gain

    def turn(x):
        out = np.array(x)
        for p in range(n):
            for i in range(head_dim // 2):
                angle = p * config.rope_base ** (-2 * i / head_dim)
                a = x[p, :, 2 * i]
                b = x[p, :, 2 * i + 1]
                out[p, :, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                out[p, :, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    x = w["tok_embeddings"][tokens]
    for layer in range(config.n_layers):
        prefix = f"layers.{layer}."
        h = norm(x, w[prefix + "attention_norm"])
        q = turn((h @ w[prefix + "attention.wq"].T).reshape(n, config.n_heads, head_dim))
        k = turn((h @ w[prefix + "attention.wk"].T).reshape(n, config.n_kv_heads, head_dim))
        v = (h @ w[prefix + "attention.wv"].T).reshape(n, config.n_kv_heads, head_dim)
        k = np.repeat(k, config.n_heads // config.n_kv_heads, axis=1)
        v = np.repeat(v, config.n_heads // config.n_kv_heads, axis=1)
        out = np.zeros((n, config.n_heads, head_dim))
        for head in range(config.n_heads):
            for i in range(n):
                scores = k[:i + 1, head] @ q[i, head] / math.sqrt(head_dim)
                p = np.exp(scores - scores.max())
                out[i, head] = p / p.sum() @ v[:i + 1, head]
        x = x + out.reshape(n, -1) @ w[prefix + "attention.wo"].T
        h = norm(x, w[prefix + "ffn_norm"])
        a = h @ w[prefix + "feed_forward.w1"].T
        b = h @ w[prefix + "feed_forward.w3"].T
        x = x + (a / (1 + np.exp(-a)) * b) @ w[prefix + "feed_forward.w2"].T
    return norm(x, w["norm"]) @ w["output"].T


@each_config
@pytest.mark.parametrize("n", [1, 2, 11])
def test_the_llama_is_a_llama(config, n):
    model = make_model(config)
    rng = random.Random(n)
    tokens = [rng.randrange(config.vocab_size) for _ in range(n)]
    expected = reference_logits(config, model.weights, tokens)
    np.testing.assert_allclose(model.forward(tokens), expected, **TIGHT)


@each_config
def test_gradients_are_finite_differences_for_every_weight(config):
    model = make_model(config)
    rng = random.Random(1)
    tokens = [rng.randrange(config.vocab_size) for _ in range(8)] + [0, 0]
    _, gradients = m.loss_and_gradients(config, model.weights, tokens)
    assert set(gradients) == set(model.weights)
    for name, w in model.weights.items():
        rows = m.as_rows(w)
        slopes = m.as_rows(gradients[name])
        assert np.shape(slopes) == np.shape(rows)
        places = list(np.ndindex(np.shape(rows)))
        for i, j in rng.sample(places, min(3, len(places))):
            kept = rows[i][j]
            losses = []
            for shift in (1e-5, -1e-5):
                rows[i][j] = kept + shift
                losses.append(m.cross_entropy(model.forward(tokens[:-1]), tokens[1:])[0])
            rows[i][j] = kept
            slope = (losses[0] - losses[1]) / 2e-5
            assert slopes[i][j] == pytest.approx(slope, abs=2e-8), name


def test_cross_entropy_is_minus_log_softmax():
    loss, d = m.cross_entropy([[1.0, 2.0, 3.0], [0.0, 0.0, 1e4]], [0, 2])
    assert loss == pytest.approx(math.log(1 + math.e + math.e ** 2) / 2, abs=1e-12)
    np.testing.assert_allclose(np.sum(d, axis=1), 0, **TIGHT)


def test_adam_is_adam():
    """Against the update rule written out for scalars, several steps, with bias correction."""
    w = {"a": [[1.0, -2.0]], "g": [0.5]}
    flat = np.array([1.0, -2.0, 0.5])
    first = np.zeros(3)
    second = np.zeros(3)
    adam = m.Adam(w, beta1=0.8, beta2=0.9)
    for t in range(1, 6):
        gradient = np.array([0.3 * t, -0.2, 2.0 / t])
        d_a = [gradient[:2].tolist()]
        d_g = gradient[2:].tolist()
        adam.step({"a": d_a, "g": d_g}, 0.1)
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient ** 2
        mean = first / (1 - 0.8 ** t)
        flat = flat - 0.1 * mean / (np.sqrt(second / (1 - 0.9 ** t)) + 1e-8)
    np.testing.assert_allclose([*w["a"][0], *w["g"]], flat, **TIGHT)


def test_training_learns_and_says_nothing(capsys):
    tokenizer = m.Tokenizer.train(m.TEXT, 60)
    config = m.Config(len(tokenizer.vocab), 8, 1, 2, 1, 8)
    _, losses = m.train(config, tokenizer.encode(m.TEXT), random.Random(0), steps=30, length=16)
    assert losses[0] > 4
    assert sum(losses[-5:]) < sum(losses[:5]) - 3
    assert capsys.readouterr() == ("", "")


def test_training_reads_the_text_in_order_and_starts_again():
    """With a rate of 0 the weights stay, and each step's loss tells which tokens it read."""
    config = CONFIGS[0]
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    model, losses = m.train(config, ids, random.Random(0), steps=5, length=5, learning_rate=0.0)
    assert model.weights == m.init_weights(config, random.Random(0))
    starts = [0, 5, 10 - 7, 15 - 14, 20 - 14]  # 5 further each time, and 7 = 12 - 5 is 0 again
    for loss, start in zip(losses, starts, strict=True):
        logits = reference_logits(config, model.weights, ids[start:start + 5])
        chosen = logits[range(5), ids[start + 1:start + 6]]
        expected = (np.log(np.exp(logits).sum(axis=1)) - chosen).mean()
        assert loss == pytest.approx(expected, abs=1e-12)


def test_the_learning_rate_rises_over_ten_steps_and_falls_to_nothing(monkeypatch):
    rates = []
    monkeypatch.setattr(m.Adam, "step", lambda self, gradients, rate: rates.append(rate))
    for settings, peak in (({"learning_rate": 3.0}, 3.0), ({}, 0.02)):
        m.train(SMALL, [1, 2, 3, 4], random.Random(0), steps=20, length=2, **settings)
        expected = [peak * min(1, s / 10) * (21 - s) / 20 for s in range(1, 21)]
        assert rates == pytest.approx(expected, abs=1e-15)
        rates.clear()
    adam = m.Adam({"g": [1.0]})
    assert (adam.beta1, adam.beta2) == (0.7, 0.95)


def test_weights_begin_at_their_sizes():
    weights = m.init_weights(m.Config(50, 64, 1, 2, 2, 16), random.Random(0))
    expected = {"tok_embeddings": 1, "layers.0.attention.wo": 0.5 / 8,
                "layers.0.feed_forward.w2": 0.5 / 4}
    for name, w in weights.items():
        if np.ndim(w) == 2:
            assert np.std(w) == pytest.approx(expected.get(name, 1 / 8), rel=0.08), name
        else:
            assert w == [1.0] * 64


@pytest.mark.parametrize("sizes", [
    (0, 8, 1, 2, 1, 4),  # no vocabulary
    (5, 6, 1, 2, 1, 4),  # heads of 3 channels, which make no pairs
    (5, 8, 1, 2, 3, 4),  # 2 heads share 3 KV heads
    (5, 8, 0, 2, 1, 4),  # no layer
])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        m.Config(*sizes)


def test_a_llama_is_metas_unless_it_says_otherwise():
    config = m.Config(5, 8, 1, 2, 1, 4)
    assert (config.rope_base, config.norm_eps) == (10000.0, 1e-5)


def test_missing_weights_are_named():
    model = make_model()
    weights = {name: w for name, w in model.weights.items() if name != "layers.1.attention.wo"}
    with pytest.raises(ValueError, match="layers.1.attention.wo"):
        m.Llama(model.config, weights)


@pytest.mark.parametrize("x", [0.0, 1.5, -3.0, 40.0, -40.0, 1e4, -1e4])
def test_sigmoid_never_overflows(x):
    expected = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    assert m.sigmoid(x) == pytest.approx(expected, abs=1e-15)


def test_positions_and_mask_make_a_tree_of_two_branches():
    """A prompt of 2 and two tokens that both come next: each sees the prompt and itself."""
    model = make_model()
    mask = [[True], [True, True], [True, True, True], [True, True, False, True]]
    logits = model.forward([1, 2, 3, 4], positions=[0, 1, 2, 2], mask=mask)
    for row, token in ((2, 3), (3, 4)):
        np.testing.assert_allclose(logits[row], model.forward([1, 2, token])[-1], **TIGHT)
