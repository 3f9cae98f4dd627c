"""microkv: the tiny Llama against numpy written from the papers, its gradients against finite differences, every
cache against none, and every schedule against each request alone."""

import hashlib
import math
import random

import numpy as np
import pytest

import microkv as m

TIGHT = dict(rtol=0, atol=1e-12)
CONFIGS = [m.Config(13, 8, 2, 4, 2, 6), m.Config(5, 6, 1, 3, 1, 7, rope_base=500.0, norm_eps=1e-3), m.Config(17, 8, 3, 2, 2, 5, rope_base=500.0)]
SMALL = m.Config(13, 4, 1, 2, 1, 3)  # for schedules, which are none of its business


def make_model(config=CONFIGS[0], seed=0):
    """A Llama with random weights, the gains included."""
    rng = random.Random(seed)
    weights = m.init_weights(config, rng)
    for name, w in weights.items():
        if name.endswith("norm"):
            weights[name] = [1 + 0.3 * rng.gauss(0, 1) for _ in w]
    return m.Llama(config, weights)


# ------------------------------------------------------------------------------------- the tiny Llama

def reference_logits(config, weights, tokens):
    """Llama from the papers, all tokens at once: RMSNorm, rotary pairs as 2 × 2 matrices, repeated KV heads, SwiGLU."""
    w = {name: np.array(value) for name, value in weights.items()}
    hd, n = config.dim // config.n_heads, len(tokens)

    def norm(x, gain):
        return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + config.norm_eps) * gain

    def turn(x):
        out = np.array(x)
        for p in range(n):
            for i in range(hd // 2):
                a = p * config.rope_base ** (-2 * i / hd)
                out[p, :, 2 * i] = x[p, :, 2 * i] * math.cos(a) - x[p, :, 2 * i + 1] * math.sin(a)
                out[p, :, 2 * i + 1] = x[p, :, 2 * i] * math.sin(a) + x[p, :, 2 * i + 1] * math.cos(a)
        return out

    x = w["tok_embeddings"][tokens]
    for layer in range(config.n_layers):
        part = {name.split(".")[-1]: w[f"layers.{layer}.{name}"] for name in
                ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w2",
                 "feed_forward.w3", "attention_norm", "ffn_norm")}
        h = norm(x, part["attention_norm"])
        q = turn((h @ part["wq"].T).reshape(n, config.n_heads, hd))
        k = turn((h @ part["wk"].T).reshape(n, config.n_kv_heads, hd))
        v = (h @ part["wv"].T).reshape(n, config.n_kv_heads, hd)
        k, v = (np.repeat(a, config.n_heads // config.n_kv_heads, axis=1) for a in (k, v))
        out = np.zeros((n, config.n_heads, hd))
        for head in range(config.n_heads):
            for i in range(n):
                scores = k[:i + 1, head] @ q[i, head] / math.sqrt(hd)
                p = np.exp(scores - scores.max())
                out[i, head] = p / p.sum() @ v[:i + 1, head]
        x = x + out.reshape(n, -1) @ part["wo"].T
        h = norm(x, part["ffn_norm"])
        a = h @ part["w1"].T
        x = x + (a / (1 + np.exp(-a)) * (h @ part["w3"].T)) @ part["w2"].T
    return norm(x, w["norm"]) @ w["output"].T


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dim}x{c.n_layers}")
@pytest.mark.parametrize("n", [1, 2, 11])
def test_the_llama_is_a_llama(config, n):
    model, tokens = make_model(config), [random.Random(n).randrange(config.vocab_size) for _ in range(n)]
    np.testing.assert_allclose(model.forward(tokens), reference_logits(config, model.weights, tokens), **TIGHT)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dim}x{c.n_layers}")
def test_gradients_are_finite_differences_for_every_weight(config):
    model, rng = make_model(config), random.Random(1)
    tokens = [rng.randrange(config.vocab_size) for _ in range(7)] + [0, 0]
    targets = [rng.randrange(config.vocab_size) for _ in tokens]
    recording = m.RecordingLlama(config, model.weights)
    logits = recording.forward(tokens)
    assert logits == model.forward(tokens)
    gradients = recording.backward(tokens, m.cross_entropy(logits, targets)[1])
    for name, w in model.weights.items():
        rows = w if isinstance(w[0], list) else [w]
        d_rows = gradients[name] if isinstance(w[0], list) else [gradients[name]]
        assert (len(d_rows), len(d_rows[0])) == (len(rows), len(rows[0]))
        places = [(i, j) for i in range(len(rows)) for j in range(len(rows[0]))]
        for i, j in rng.sample(places, min(3, len(places))):
            kept, losses = rows[i][j], []
            for shift in (1e-5, -1e-5):
                rows[i][j] = kept + shift
                losses.append(m.cross_entropy(model.forward(tokens), targets)[0])
            rows[i][j] = kept
            assert d_rows[i][j] == pytest.approx((losses[0] - losses[1]) / 2e-5, abs=2e-8), name


def test_cross_entropy_is_minus_log_softmax():
    logits, targets = [[1.0, 2.0, 3.0], [0.0, 0.0, 1e4]], [0, 2]
    loss, d = m.cross_entropy(logits, targets)
    assert loss == pytest.approx((math.log(1 + math.e + math.e ** 2) + 0) / 2, abs=1e-12)
    np.testing.assert_allclose(np.sum(d, axis=1), 0, **TIGHT)


def test_adam_is_adam():
    """Against the update rule written out for scalars, several steps, with bias correction."""
    w, v = {"a": [[1.0, -2.0]], "g": [0.5]}, {"a": [[0.3, -0.2]], "g": [2.0]}
    flat, first, second = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    adam = m.Adam(w, beta1=0.8, beta2=0.9)
    for t in range(1, 6):
        gradient = np.array([0.3 * t, -0.2, 2.0 / t])
        adam.step({"a": [gradient[:2].tolist()], "g": gradient[2:].tolist()}, 0.1)
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient ** 2
        flat = flat - 0.1 * (first / (1 - 0.8 ** t)) / (np.sqrt(second / (1 - 0.9 ** t)) + 1e-8)
    np.testing.assert_allclose([*w["a"][0], *w["g"]], flat, **TIGHT)
    assert v


def test_training_learns_and_says_nothing(capsys):
    tokenizer = m.Tokenizer.train(m.TEXT, 60)
    ids = tokenizer.encode(m.TEXT)
    _, losses = m.train(m.Config(len(tokenizer.vocab), 8, 1, 2, 1, 8), ids, random.Random(0), steps=30, length=16)
    assert losses[0] > 4 and sum(losses[-5:]) < sum(losses[:5]) - 3
    assert capsys.readouterr() == ("", "")


def test_training_reads_the_text_in_order_and_starts_again():
    """With a rate of 0 the weights stay what they were, and each step's loss tells which tokens it read."""
    config, ids = CONFIGS[0], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    model, losses = m.train(config, ids, random.Random(0), steps=5, length=5, learning_rate=0.0)
    assert model.weights == m.init_weights(config, random.Random(0))
    for loss, start in zip(losses, (0, 5, 10 - 7, 15 - 14, 20 - 14), strict=True):
        logits = reference_logits(config, model.weights, ids[start:start + 5])
        chosen = logits[range(5), ids[start + 1:start + 6]]
        assert loss == pytest.approx((np.log(np.exp(logits).sum(axis=1)) - chosen).mean(), abs=1e-12)


def test_the_learning_rate_rises_over_ten_steps_and_falls_to_nothing(monkeypatch):
    rates = []
    monkeypatch.setattr(m.Adam, "step", lambda self, gradients, rate: rates.append(rate))
    for settings, peak in ((dict(learning_rate=3.0), 3.0), (dict(), 0.02)):
        m.train(SMALL, [1, 2, 3, 4], random.Random(0), steps=20, length=2, **settings)
        assert rates == pytest.approx([peak * min(1, s / 10) * (21 - s) / 20 for s in range(1, 21)], abs=1e-15)
        rates.clear()
    adam = m.Adam({"g": [1.0]})
    assert (adam.beta1, adam.beta2) == (0.7, 0.95)


def test_weights_begin_at_their_sizes():
    weights = m.init_weights(m.Config(50, 64, 1, 2, 2, 16), random.Random(0))
    sizes = {name: np.std(w) for name, w in weights.items() if np.ndim(w) == 2}
    expected = {"tok_embeddings": 1, "layers.0.attention.wo": 0.5 / 8, "layers.0.feed_forward.w2": 0.5 / 4}
    for name, size in sizes.items():
        assert size == pytest.approx(expected.get(name, 1 / 8), rel=0.08), name
    assert weights["norm"] == weights["layers.0.ffn_norm"] == [1.0] * 64


@pytest.mark.parametrize("sizes", [(0, 8, 1, 2, 1, 4), (5, 6, 1, 2, 1, 4), (5, 8, 1, 2, 3, 4), (5, 8, 0, 2, 1, 4)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError, match="must be"):
        m.Config(*sizes)


def test_a_llama_is_metas_unless_it_says_otherwise():
    config = m.Config(5, 8, 1, 2, 1, 4)
    assert (config.rope_base, config.norm_eps) == (10000.0, 1e-5)


def test_missing_weights_are_named():
    model = make_model()
    with pytest.raises(ValueError, match="layers.1.attention.wo"):
        m.Llama(model.config, {k: v for k, v in model.weights.items() if k != "layers.1.attention.wo"})


@pytest.mark.parametrize("x", [0.0, 1.5, -3.0, 40.0, -40.0, 1e4, -1e4])
def test_sigmoid_never_overflows(x):
    expected = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    assert m.sigmoid(x) == pytest.approx(expected, abs=1e-15)


# ----------------------------------------------------------------------------------------- the caches

def scattered_pool(num_blocks, block_size, seed=0):
    """A pool whose free blocks come in no order."""
    pool = m.BlockPool(num_blocks, block_size)
    order = list(range(num_blocks))
    random.Random(seed).shuffle(order)
    pool.free_blocks = m.OrderedDict.fromkeys(order)
    return pool


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 15, 16, 17])
@pytest.mark.parametrize("piece", [1, 2, 5, 100])
def test_cached_uncached_and_paged_agree(block_size, n, piece):
    model = make_model()
    tokens = [random.Random(7).randrange(13) for _ in range(n)]
    whole = model.forward(tokens)
    plain, paged = m.KVCache(model.config), m.PagedKVCache(scattered_pool(20, block_size), model.config)
    out = []
    for start in range(0, n, piece):
        logits = model.forward(tokens[start:start + piece], plain)
        assert model.forward(tokens[start:start + piece], paged) == logits  # to the bit
        out += logits
    np.testing.assert_allclose(out, whole, **TIGHT)
    assert plain.length == paged.length == n
    assert len(paged.block_table) == -(-n // block_size) == 20 - paged.pool.num_free_blocks
    slots = [paged.slot(p) for p in range(n)]
    assert slots == [paged.block_table[p // block_size] * block_size + p % block_size for p in range(n)]


def test_the_model_reads_through_the_table():
    """Move a block's contents and its number in the table: nothing changes. Move only the contents: everything does."""
    model, tokens = make_model(), [1, 2, 3, 4, 5, 6]
    outcome = []
    for move, fix_table in ((False, False), (True, True), (True, False)):
        pool = m.BlockPool(8, 2)
        cache, other = m.PagedKVCache(pool, model.config), m.PagedKVCache(pool, model.config)
        model.forward(tokens, cache)
        model.forward(tokens[::-1], other)
        if move:
            a, b = cache.block_table[0], other.block_table[0]
            pool.slots[2 * a:2 * a + 2], pool.slots[2 * b:2 * b + 2] = pool.slots[2 * b:2 * b + 2], pool.slots[2 * a:2 * a + 2]
            if fix_table:
                cache.block_table[0] = b
        outcome.append(model.forward([7], cache)[0])
    assert outcome[0] == outcome[1]
    assert max(abs(a - b) for a, b in zip(outcome[0], outcome[2])) > 1e-3


@pytest.mark.parametrize("n", range(0, 9))
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_fork_and_copy_on_write_disturb_nobody(n, block_size):
    model, rng = make_model(), random.Random(n)
    prompt = [rng.randrange(13) for _ in range(n)] or [3]
    pool = m.BlockPool(60, block_size)
    caches, texts = [m.PagedKVCache(pool, model.config)], [list(prompt)]
    model.forward(prompt, caches[0])
    for _ in range(3):
        texts.append(list(texts[0]))
        caches.append(caches[0].fork())
    in_use = pool.num_blocks - pool.num_free_blocks
    assert in_use == -(-len(prompt) // block_size)  # forking takes no block
    for step in range(7):
        for i in rng.sample(range(4), 3):
            token = rng.randrange(13)
            texts[i].append(token)
            assert model.forward([token], caches[i])[-1] == pytest.approx(model.forward(texts[i])[-1], abs=1e-12)
        check_pool(pool, caches)
    for cache in caches:
        cache.free()
    check_pool(pool, [])
    assert pool.num_free_blocks == pool.num_blocks


def check_pool(pool, caches):
    """What must hold of a pool at any time."""
    held = [0] * pool.num_blocks
    for cache in caches:
        assert len(cache.block_table) * pool.block_size >= cache.length
        for block in cache.block_table:
            held[block] += 1
    assert pool.ref_count == held
    assert set(pool.free_blocks) == {block for block, n in enumerate(held) if n == 0}
    assert pool.num_free_blocks + sum(n > 0 for n in held) == pool.num_blocks
    assert {name: block for block, name in pool.hash_of.items()} == pool.block_of


def test_a_pool_hands_out_what_it_has_and_no_more():
    pool = m.BlockPool(3, 2)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2] and pool.num_free_blocks == 0
    with pytest.raises(ValueError, match="block"):
        pool.allocate()
    pool.share(1)
    pool.free(1)
    assert pool.num_free_blocks == 0 and pool.ref_count == [1, 1, 1]
    pool.free(1), pool.free(0)
    assert pool.num_free_blocks == 2 and pool.allocate() == 1  # freed first, handed out first
    with pytest.raises(ValueError, match="free"):
        pool.free(0)


@pytest.mark.parametrize("arguments", [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_of_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="at least 1"):
        m.BlockPool(*arguments)


def test_a_copy_on_write_shares_nothing_with_what_it_was_copied_from():
    """The block that was copied from is freed and used by another text: the copy must not feel it."""
    model, pool = make_model(), m.BlockPool(8, 4)
    a = m.PagedKVCache(pool, model.config)
    model.forward([1, 2], a)
    b = a.fork()
    assert b.blocks_needed(0) == 0 and b.blocks_needed(1) == 1
    b.reserve(0)
    assert b.block_table == a.block_table
    model.forward([3], b)
    old = a.block_table[0]
    a.free()
    pool.free_blocks.move_to_end(old, last=False)
    other = m.PagedKVCache(pool, model.config)
    model.forward([9, 8, 7], other)
    assert other.block_table == [old]
    assert model.forward([4], b)[-1] == pytest.approx(model.forward([1, 2, 3, 4])[-1], abs=1e-12)


def test_a_fork_shares_no_block_that_was_only_reserved():
    model, pool = make_model(), m.BlockPool(8, 2)
    a = m.PagedKVCache(pool, model.config)
    a.reserve(6)
    model.forward([1, 2, 3], a)
    b = a.fork()
    assert pool.ref_count[:3] == [2, 2, 1]
    outcome = [model.forward(rest, cache)[-1] for cache, rest in ((a, [4, 5, 6]), (b, [7, 8, 9]), (a, [0]), (b, [0]))]
    for logits, text in zip(outcome[2:], ([1, 2, 3, 4, 5, 6, 0], [1, 2, 3, 7, 8, 9, 0])):
        assert logits == pytest.approx(model.forward(text)[-1], abs=1e-12)
    check_pool(pool, [a, b])


def test_too_few_blocks_change_nothing():
    model = make_model()
    cache = m.PagedKVCache(m.BlockPool(2, 2), model.config)
    model.forward([1, 2, 3], cache)
    before = list(cache.block_table)
    with pytest.raises(ValueError, match="block"):
        model.forward([4, 5], cache)
    assert (cache.block_table, cache.length, cache.pool.num_free_blocks) == (before, 3, 0)
    model.forward([4], cache)


@pytest.mark.parametrize("cache", [None, "plain", "paged"])
def test_generate_is_greedy(cache):
    model, tokens = make_model(), [3, 1]
    for _ in range(9):
        logits = reference_logits(model.config, model.weights, tokens)[-1]
        tokens.append(int(logits.argmax()))
    cache = {"plain": m.KVCache(model.config), "paged": m.PagedKVCache(m.BlockPool(9, 2), model.config)}.get(cache)
    assert m.generate(model, [3, 1], 9, cache) == tokens[2:]
    assert m.generate(model, [3, 1], 0) == []


def test_generate_goes_on_from_a_cache_that_holds_part_of_the_prompt():
    model, prompt = make_model(), [3, 1, 4, 1, 5]
    expected = m.generate(model, prompt, 6)
    for known in range(1, 5):
        cache = m.KVCache(model.config)
        model.forward(prompt[:known], cache)
        assert m.generate(model, prompt, 6, cache) == expected
    cache = m.KVCache(model.config)
    model.forward(prompt, cache)
    with pytest.raises(ValueError, match="cache"):
        m.generate(model, prompt, 6, cache)
    assert m.argmax([1.0, 3.0, 3.0]) == 1


@pytest.mark.parametrize("prompt, n", [([], 3), ([1], -1)])
def test_generate_refuses(prompt, n):
    with pytest.raises(ValueError, match="prompt"):
        m.generate(make_model(), prompt, n)


# ------------------------------------------------------------------------------------ the closed formulas

@pytest.mark.parametrize("n_new, n_cached", [(1, 0), (5, 0), (1, 9), (4, 3)])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.dim}x{c.n_layers}")
def test_multiplications_are_counted_where_they_are_made(config, n_new, n_cached):
    model, cache = make_model(config), m.KVCache(config)
    if n_cached:
        model.forward([0] * n_cached, cache)
    with m.counted_dots() as count:
        model.forward([0] * n_new, cache)
    assert count.products == m.forward_products(config, n_new, n_cached)
    matrices = sum(np.size(w) for name, w in model.weights.items() if np.ndim(w) == 2 and name != "tok_embeddings")
    assert m.forward_products(config, 1, 0) == matrices + (2 * config.n_layers + 1 + 2 * config.n_layers) * config.dim
    assert m.dot is getattr(math, "sumprod", m.dot_by_hand)


def test_step_seconds_is_the_roofline():
    card = m.Card("toy", flops=100.0, hbm_bytes_per_s=10.0, hbm_bytes=1.0, n_sms=1, sram_kb=1, source="")
    model = m.ServedModel("toy", 5.0, 1, 1, 1, "")
    assert card.ridge == 10 and model.kv_bytes == 4 and m.kv_bytes_per_token(3, 5, 7, 0.5) == 105
    assert m.step_seconds(card, model, 3, 0) == (0.3, 1.0)
    assert m.step_seconds(card, model, 3, 5, weight_bytes=0.5) == (0.3, 2.25)


# ----------------------------------------------------------------------------------------- prefix caching

def test_hash_chain():
    expected = hashlib.sha256(b"|1,2").hexdigest()
    assert m.hash_block("", [1, 2]) == expected
    assert m.hash_block(expected, [3]) == hashlib.sha256(f"{expected}|3".encode()).hexdigest()
    assert m.block_hashes([1, 2, 3, 4, 5], 2) == [expected, m.hash_block(expected, [3, 4])]
    assert m.hash_block("", [1, 23]) != m.hash_block("", [12, 3])
    assert m.block_hashes([9, 2, 3, 4], 2)[1] != m.block_hashes([1, 2, 3, 4], 2)[1]  # the parent is in it
    assert m.block_hashes([1], 2) == []


@pytest.mark.parametrize("seed", range(12))
def test_prefix_hits_are_the_longest_common_run_of_full_blocks(seed):
    model, rng = make_model(), random.Random(seed)
    block_size = rng.choice([1, 2, 3, 5])
    pool, earlier = m.BlockPool(400, block_size), []
    for _ in range(12):
        base = rng.choice(earlier)[:rng.randrange(1, 12)] if earlier and rng.random() < 0.8 else []
        prompt = base + [rng.randrange(2) for _ in range(rng.randrange(1, 8))]
        naive = 0
        for text in earlier:
            same = 0
            while same < min(len(text), len(prompt) - 1) and text[same] == prompt[same]:
                same += 1
            naive = max(naive, same // block_size * block_size)
        cache = m.PagedKVCache(pool, model.config)
        assert m.adopt_prefix(cache, prompt) == naive == cache.length
        np.testing.assert_allclose(model.forward(prompt[naive:], cache), model.forward(prompt)[naive:], **TIGHT)
        m.register_blocks(cache, prompt)
        check_pool(pool, [cache])
        earlier.append(prompt)
        cache.free()
    check_pool(pool, [])


@pytest.mark.parametrize("a, b, block_size, expected", [("abcdefg", "abcdefx", 2, 6), ("abcdefg", "abcdefx", 4, 4), ("ab", "abcd", 1, 2),
                                                         ("abc", "xbc", 1, 0), ("", "abc", 1, 0), ("abcd", "abcd", 3, 3)])
def test_common_full_blocks(a, b, block_size, expected):
    assert m.common_full_blocks(a, b, block_size) == m.common_full_blocks(b, a, block_size) == expected


def test_eviction_takes_the_least_recently_used_and_ends_first():
    model, pool = make_model(), m.BlockPool(4, 1)
    for text in ([1, 2], [3, 4]):
        cache = m.PagedKVCache(pool, model.config)
        model.forward(text, cache)
        m.register_blocks(cache, text)
        cache.free()
    known = lambda: [text for text in ([1], [1, 2], [3], [3, 4]) if m.block_hashes(text, 1)[-1] in pool.block_of]
    assert known() == [[1], [1, 2], [3], [3, 4]]
    again = m.PagedKVCache(pool, model.config)
    assert m.adopt_prefix(again, [1, 9]) == 1  # used again: now the youngest
    again.free()
    left = []
    for _ in range(4):
        pool.allocate()
        left.append(known())
    assert left == [[[1], [3], [3, 4]], [[1], [3]], [[1]], []]


# ------------------------------------------------------------------------------------------------ serving

def request_set(seed):
    """Random requests, some alike, and random settings under which every request can just run."""
    rng = random.Random(seed)
    common = [rng.randrange(13) for _ in range(6)]
    requests = [m.Request(tuple((common[:rng.randrange(7)] + [rng.randrange(13) for _ in range(rng.randrange(1, 9))])),
                          rng.randrange(1, 10), rng.choice([0.0, rng.random() * 0.02]))
                for _ in range(rng.randrange(1, 8))]
    block_size, n_seqs = rng.choice([1, 2, 3, 4, 7]), rng.randrange(1, 6)
    smallest = max(-(-(len(r.prompt) + r.max_new_tokens - 1) // block_size) for r in requests)
    return requests, dict(block_size=block_size, max_num_seqs=n_seqs), smallest, rng


@pytest.mark.parametrize("seed", range(24))
def test_every_schedule_gives_every_request_what_it_gets_alone(seed):
    model = make_model(SMALL)
    requests, settings, smallest, rng = request_set(seed)
    alone = [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]
    preempted = 0
    for policy in ("static", "continuous", "chunked"):
        for preemption in ("recompute", "swap"):
            for prefix_caching in (False, True):
                budget = rng.randrange(settings["max_num_seqs"], 12) if policy == "chunked" else 64
                blocks = smallest + rng.choice([0, 0, 1, 3, 50])
                engine = m.Engine(model, requests, policy=policy, num_blocks=blocks, max_num_batched_tokens=budget,
                                  preemption=preemption, prefix_caching=prefix_caching, **settings)
                while engine.waiting or engine.running:
                    engine.step()
                    check_engine(engine, requests, budget)
                report = engine.run()
                assert report.tokens == alone, (policy, preemption, prefix_caching, blocks)
                assert engine.pool.num_free_blocks == blocks and not any(engine.pool.ref_count)
                assert [len(times) for times in report.times] == [r.max_new_tokens for r in requests]
                assert all(list(times) == sorted(times) and times[0] > r.arrival for times, r in zip(report.times, requests))
                assert report.computed == sum(n for *_, work in report.steps for n in work.values())
                if not report.preempted:
                    assert report.computed + sum(state.found for state in report.states) == sum(len(r.prompt) + r.max_new_tokens - 1 for r in requests)
                    assert report.swapped_tokens == 0
                if preemption == "swap" and not prefix_caching and policy != "chunked":
                    assert report.computed == sum(len(r.prompt) + r.max_new_tokens - 1 for r in requests)
                preempted += len(report.preempted)
    PREEMPTED[seed] = preempted


PREEMPTED = {}  # seed -> how often, over all its runs


def test_the_random_request_sets_did_force_preemption():
    if len(PREEMPTED) == 24:
        assert sum(n > 0 for n in PREEMPTED.values()) > 9


def check_engine(engine, requests, budget):
    """What must hold after every step."""
    check_pool(engine.pool, [state.cache for state in engine.running])
    assert len(engine.running) <= engine.max_num_seqs
    start, end, work = engine.report.steps[-1]
    assert end > start and sum(work.values()) <= budget and work
    assert all(requests[number].arrival <= start for number in work)
    assert all(not state.cache.block_table for state in engine.waiting)
    for queue in (engine.waiting, engine.running):  # first come, first served, also after a preemption
        assert [s.number for s in queue] == [s.number for s in sorted(queue, key=lambda s: (s.request.arrival, s.number))]
    for step, number in engine.report.preempted:
        assert number not in engine.report.steps[step][2]
    for state in engine.running:
        names = m.block_hashes(state.tokens[:state.cache.length], engine.pool.block_size)
        for block, name in zip(state.cache.block_table, names):  # the hash table points to live content
            if block in engine.pool.hash_of:
                assert engine.pool.hash_of[block] == name


def test_preemption_happens_and_both_ways_cost_what_they_say():
    model, requests = make_model(), [m.Request((1, 2, 3), 8), m.Request((4, 5, 6), 8)]
    settings = dict(num_blocks=6, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    again, swapped = (m.serve(model, requests, preemption=way, **settings) for way in ("recompute", "swap"))
    assert again.preempted == swapped.preempted and [number for _, number in again.preempted] == [1]
    assert again.computed > swapped.computed == 20 and again.swapped_tokens == 0
    stashed = swapped.swapped_tokens
    assert stashed == 2 * (again.computed - swapped.computed)  # out and back; computed again otherwise
    slow = [end - start for start, end, _ in swapped.steps]
    fast = [end - start for start, end, _ in again.steps]
    assert max(slow) - max(fast) == pytest.approx(stashed / 2 * m.LLAMA_8B.kv_bytes / m.PCIE, rel=0.3)


def test_static_batches_start_and_end_together():
    model = make_model()
    requests = [m.Request((1,), n) for n in (2, 5, 3, 4)]
    report = m.serve(model, requests, policy="static", num_blocks=40, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    assert [sorted(work) for *_, work in report.steps] == [[0, 1]] * 2 + [[1]] * 3 + [[2, 3]] * 3 + [[3]]
    assert report.utilisation == (4 + 3 + 6 + 1) / (9 * 2)
    report = m.serve(model, requests, policy="continuous", num_blocks=40, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    assert [sorted(work) for *_, work in report.steps] == [[0, 1]] * 2 + [[1, 2]] * 3 + [[3]] * 4
    assert report.utilisation == (4 + 6 + 4) / (9 * 2)


def test_chunked_prefill_keeps_the_budget_and_decodes_first():
    model = make_model()
    requests = [m.Request((1, 2), 9), m.Request(tuple(range(12)), 2, 1e-9)]
    report = m.serve(model, requests, policy="chunked", num_blocks=40, block_size=2, max_num_seqs=2, max_num_batched_tokens=5)
    assert [work for *_, work in report.steps][:5] == [{0: 2}, {0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 4}, {0: 1, 1: 1}]


def test_static_batches_are_closed_and_the_clock_waits_only_for_work():
    model = make_model()
    settings = dict(num_blocks=40, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    report = m.serve(model, [m.Request((1,), 5), m.Request((1,), 2, 1e-9)], policy="static", **settings)
    assert [sorted(work) for *_, work in report.steps] == [[0]] * 5 + [[1]] * 2
    report = m.serve(model, [m.Request((1,), 5), m.Request((2,), 1, 1.0)], **settings)
    assert report.times[0][-1] < 1 < report.times[1][0]


def test_prefix_caching_in_the_engine():
    model, prompt = make_model(), (1, 2, 3, 4, 5)
    requests = [m.Request(prompt, 2), m.Request(prompt, 2, 1.0)]
    settings = dict(num_blocks=40, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    report = m.serve(model, requests, prefix_caching=True, **settings)
    assert [state.found for state in report.states] == [0, 4] and report.tokens[0] == report.tokens[1] == m.generate(model, prompt, 2)
    assert [state.found for state in m.serve(model, requests, **settings).states] == [0, 0]


def test_more_seats_than_budget_is_fine_where_prompts_are_whole():
    report = m.serve(make_model(), [m.Request((1,), 3)], num_blocks=9, block_size=2, max_num_seqs=20, max_num_batched_tokens=10)
    assert len(report.steps) == 3


def test_gaps_metrics_and_timeline():
    model = make_model()
    requests = [m.Request((1, 2, 3), 8), m.Request((4, 5, 6), 8)]
    report = m.serve(model, requests, num_blocks=6, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    assert m.token_gaps(report) == [b - a for times in report.times for a, b in zip(times, times[1:])]
    rows = [line[10:] for line in m.timeline(report)]
    step = report.preempted[0][0]
    assert rows[0][:8] == " █▒▒▒▒▒▒▒"[1:9] and rows[1][step] == "×"
    first_again = next(i for i, (*_, work) in enumerate(report.steps) if i > step and 1 in work)
    assert set(rows[1][step + 1:first_again]) <= {"·"} and rows[1][first_again] == "█"
    assert m.metrics(report)[0] == str(len(report.steps))


def test_a_scheduler_that_is_stuck_is_noticed():
    model, requests = make_model(), [m.Request((1,), 2)]
    engine = m.Engine(model, requests, num_blocks=9, block_size=2, max_num_seqs=1, max_num_batched_tokens=64)
    engine.step()
    engine.schedule = iter([[], []]).__next__  # two steps without work; a third would raise StopIteration
    with pytest.raises(RuntimeError, match="no work"):
        engine.run()


def test_nobody_overtakes():
    """A long prompt at the head of the queue is not passed by a short one behind it."""
    model = make_model()
    requests = [m.Request((1,) * 8, 4), m.Request((2,) * 8, 2), m.Request((3,), 1)]
    report = m.serve(model, requests, num_blocks=8, block_size=2, max_num_seqs=3, max_num_batched_tokens=64)
    assert report.times[2][0] >= report.times[1][0]


def test_the_clock_is_the_cost_model():
    model = make_model()
    report = m.serve(model, [m.Request((1,) * 10, 3, 5.0)], num_blocks=10, block_size=2, max_num_seqs=1, max_num_batched_tokens=64)
    seconds = lambda new, cached: max(m.step_seconds(m.A100, m.LLAMA_8B, new, cached, m.PRICED_WEIGHT_BYTES))
    expected = [5 + seconds(10, 10), 5 + seconds(10, 10) + seconds(1, 11), 5 + seconds(10, 10) + seconds(1, 11) + seconds(1, 12)]
    np.testing.assert_allclose(report.times[0], expected, rtol=1e-12)


@pytest.mark.parametrize("change, word", [(dict(num_blocks=4), "num_blocks must be at least 5"), (dict(policy="best"), "policy"),
                                          (dict(preemption="kill"), "preemption"), (dict(max_num_seqs=0), "max_num_seqs"),
                                          (dict(max_num_batched_tokens=9), "max_num_batched_tokens must be at least 10"),
                                          (dict(policy="chunked", max_num_batched_tokens=1), "at least max_num_seqs"),
                                          (dict(block_size=0), "block_size")])
def test_settings_that_cannot_work_are_refused(change, word):
    settings = dict(num_blocks=5, block_size=2, max_num_seqs=2, max_num_batched_tokens=10)
    requests = [m.Request((1, 2, 3), 7), m.Request((1,), 1)]
    m.serve(make_model(), requests, **settings)
    with pytest.raises(ValueError, match=word):
        m.serve(make_model(), requests, **settings | change)


@pytest.mark.parametrize("request_", [m.Request((), 3), m.Request((1,), 0)])
def test_empty_requests_are_refused(request_):
    with pytest.raises(ValueError, match="request 0 must have"):
        m.serve(make_model(), [request_], num_blocks=5, block_size=2, max_num_seqs=2, max_num_batched_tokens=10)


def test_the_crossing_takes_its_time_and_changes_nothing():
    model, requests = make_model(), [m.Request((1, 2, 3), 3, 0.5), m.Request((4, 5), 2)]
    settings = dict(num_blocks=3, block_size=2, max_num_seqs=2, max_num_batched_tokens=64)
    prefill = m.serve(model, [m.replace(r, max_new_tokens=1) for r in requests], **settings)
    first, again = (m.hand_over(prefill, model, requests, 1e8, **settings)[0] for _ in range(2))
    assert first.tokens == again.tokens == [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]
    crossing = 3 * m.LLAMA_8B.kv_bytes / 1e8
    step = max(m.step_seconds(m.A100, m.LLAMA_8B, 1, 4, m.PRICED_WEIGHT_BYTES))
    assert first.times[0][1] == pytest.approx(prefill.times[0][0] + crossing + step, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_two_machines_write_what_one_writes(seed):
    model = make_model(SMALL)
    requests, settings, smallest, _ = request_set(seed)
    settings |= dict(num_blocks=smallest, max_num_batched_tokens=1024)
    prefill = m.serve(model, [m.replace(r, max_new_tokens=1) for r in requests], **settings)
    report, crossed = m.hand_over(prefill, model, requests, 1e9, **settings)
    assert report.tokens == [m.generate(model, r.prompt, r.max_new_tokens) for r in requests]
    assert crossed == sum(len(r.prompt) for r in requests) * m.LLAMA_8B.kv_bytes
    for times, first, request in zip(report.times, prefill.times, requests):
        assert times[0] == first[0] and len(times) == request.max_new_tokens
        assert all(later > times[0] + len(request.prompt) * m.LLAMA_8B.kv_bytes / 1e9 for later in times[1:])


# --------------------------------------------------------------------------------- memory in one piece

def test_contiguous_waste_by_hand():
    """8 slots. Two requests of 2 growing to 4, one of 3 growing to 3, reserving 4 each: the third waits three steps."""
    waste = m.contiguous_waste([(2, 4), (2, 4), (3, 3)], 8, lambda final: 4)
    assert waste == m.Waste(used=4 + 6 + 8, reserved=4 + 2 + 0, internal=0, free=0)
    waste = m.contiguous_waste([(3, 3), (3, 3), (1, 4)], 8, lambda final: final)
    assert waste == m.Waste(used=6, reserved=0, internal=0, free=2)  # 2 free slots, and 4 wanted
    waste = m.contiguous_waste([(1, 1), (1, 1)], 4, lambda final: 4)
    assert waste == m.Waste(used=1, reserved=0, internal=3, free=0)


def test_a_piece_that_never_fits_is_refused():
    with pytest.raises(ValueError, match="9"):
        m.contiguous_waste([(1, 2), (1, 9)], 8, lambda final: final)


def test_paged_waste_counts_while_somebody_waits():
    model = make_model()
    waste, idle = m.paged_waste(model, [m.Request((1,), 3), m.Request((1, 2, 3), 2)], 2, 2)
    # One at a time. In the first's steps: 1 token in a block, 2 in a block, 3 in two; its last is never written.
    assert waste == m.Waste(used=1 + 2 + 3, reserved=0, internal=1 + 0 + 1, free=2 + 2 + 0) and idle == 1


def test_first_fit_uses_a_gap_between_others():
    lengths = [(1, 3), (1, 1), (1, 3), (1, 1), (1, 9)]
    waste = m.contiguous_waste(lengths, 9, lambda final: 3 if final < 9 else 9)
    # step 1 [a b c], d waits for room; b ends, d takes its gap in step 2, and the last waits for all to end.
    assert waste.used == 3 + (2 + 2 + 1) + (3 + 3)
    assert waste.free == 0 + 0 + 3


# ------------------------------------------------------------------------------------- a smaller cache

@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_round_to_grid(bits):
    values = np.random.default_rng(bits).normal(size=50)
    low, step = values.min(), (values.max() - values.min()) / (2 ** bits - 1)
    grid = low + step * np.arange(2 ** bits)
    expected = [grid[np.abs(grid - v).argmin()] for v in values]
    np.testing.assert_allclose(m.round_to_grid(values.tolist(), bits), expected, **TIGHT)
    assert m.round_to_grid([3.0, 3.0], bits) == [3.0, 3.0]


@pytest.mark.parametrize("bits, per, expected", [(16, "-", 7 * 6 * 2), (15, "token", 7 * 6 * 15 / 8 + 7 * 2 * 4), (8, "token", 7 * 6 + 7 * 2 * 4), (3, "channel", 7 * 6 * 3 / 8 + 6 * 4)])
def test_bytes_of_a_quantized_cache(bits, per, expected):
    assert m.quantized_bytes([[0.0] * 6] * 7, bits, 2, per) == expected


@pytest.mark.parametrize("per", ["token", "channel"])
def test_quantize_cache_groups(per):
    x = np.random.default_rng(0).normal(size=(7, 6))
    got = np.array(m.quantize_cache(x.tolist(), 3, 2, per))
    expected = np.zeros_like(x)
    groups = ([(slice(None), [c]) for c in range(6)] if per == "channel" else
              [([t], slice(h * 3, h * 3 + 3)) for t in range(7) for h in range(2)])
    for group in groups:
        part = x[group]
        step = (part.max() - part.min()) / 7
        expected[group] = part.min() + np.round((part - part.min()) / step) * step
    np.testing.assert_allclose(got, expected, **TIGHT)
    rows = x.tolist()
    copy = m.quantize_cache(rows, 16, 2, per)
    assert copy == rows and copy is not rows
