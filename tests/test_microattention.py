"""microattention against dense numpy references written from the definitions; nothing is shared with the script."""

import math
import random

import numpy as np
import pytest

import microattention as m

TIGHT = dict(rtol=0, atol=1e-12)


def numbers(seed, *shape, size=1.0):
    return np.random.default_rng(seed).normal(size=shape) * size


# ------------------------------------------------------------------------------ the naive reference

def mask(n_q, n_k, causal, window, sinks):
    """Who sees whom, [n_q][n_k], element by element from the words of the docstring."""
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        for j in range(n_k):
            position = n_k - n_q + i
            if causal and j > position:
                seen[i, j] = False
            if window is not None and j <= position - window and j >= sinks:
                seen[i, j] = False
    return seen


def dense_weights(q, k, causal=True, window=None, sinks=0, scale=None, bias=None):
    scores = q @ k.T * (1 / math.sqrt(q.shape[1]) if scale is None else scale)
    if bias is not None:
        scores = scores + bias
    seen = mask(len(q), len(k), causal, window, sinks)
    weights = np.zeros_like(scores)
    for i in range(len(q)):
        if seen[i].any():
            exps = np.exp(scores[i, seen[i]] - scores[i, seen[i]].max())
            weights[i, seen[i]] = exps / exps.sum()
    return weights


SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (7, 7, 4, 4), (5, 13, 3, 5), (13, 5, 2, 7), (16, 16, 8, 1), (2, 3, 1, 2)]
MASKS = [dict(), dict(causal=False), dict(window=1), dict(window=3), dict(window=3, sinks=2), dict(window=100),
         dict(window=2, sinks=100), dict(sinks=3), dict(causal=False, window=2), dict(causal=False, window=2, sinks=1),
         dict(scale=0.3), dict(scale=0.0), dict(window=1, sinks=1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_the_dense_masked_softmax(shape, options, biased):
    n_q, n_k, d, d_v = shape
    q, k, v, bias = numbers(0, n_q, d), numbers(1, n_k, d), numbers(2, n_k, d_v), numbers(3, n_q, n_k)
    options = options | ({"bias": bias} if biased else {})
    expected = dense_weights(q, k, **options)
    given = options | ({"bias": bias.tolist()} if biased else {})
    weights = m.attention_weights(q.tolist(), k.tolist(), **given)
    np.testing.assert_allclose(weights, expected, **TIGHT)
    np.testing.assert_allclose(m.attention(q.tolist(), k.tolist(), v.tolist(), **given), expected @ v, **TIGHT)


@pytest.mark.parametrize("options", MASKS, ids=str)
def test_weights_sum_to_one_and_stay_inside_the_mask(options):
    n_q, n_k = 11, 17
    weights = np.array(m.attention_weights(numbers(0, n_q, 3).tolist(), numbers(1, n_k, 3).tolist(), **options))
    seen = mask(n_q, n_k, options.get("causal", True), options.get("window"), options.get("sinks", 0))
    np.testing.assert_allclose(weights.sum(axis=1), 1, **TIGHT)
    assert (weights[seen] > 0).all() and (weights[~seen] == 0).all()


def test_queries_before_the_first_key_see_nothing():
    q, k, v = numbers(0, 6, 2).tolist(), numbers(1, 4, 2).tolist(), numbers(2, 4, 3).tolist()
    assert m.attention(q, k, v)[:2] == [[0.0] * 3] * 2
    assert m.attention_weights(q, k)[:2] == [[0.0] * 4] * 2
    assert any(m.attention(q, k, v)[2])


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_finite_results(size):
    q, k, v = numbers(0, 5, 4, size=abs(size)), numbers(1, 5, 4) * size, numbers(2, 5, 2)
    out = m.attention(q.tolist(), k.tolist(), v.tolist())
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, dense_weights(q, k) @ v, **TIGHT)


def test_ties_share_evenly_and_minus_infinity_hides():
    zeros = [[0.0]] * 4
    assert m.attention_weights(zeros, zeros)[3] == [0.25] * 4
    hidden = [[0.0, -math.inf, 0.0, 0.0]] * 4
    assert m.attention_weights(zeros, zeros, bias=hidden)[3] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-15)
    assert m.attention(zeros, zeros, [[5.0]] * 4, bias=[[-math.inf] * 4] * 4) == [[0.0]] * 4


def test_arguments_are_left_as_they_were():
    q, k, v = numbers(0, 3, 2).tolist(), numbers(1, 3, 2).tolist(), numbers(2, 3, 2).tolist()
    before = repr((q, k, v))
    m.attention(q, k, v, window=2, sinks=1)
    m.rope(q, range(3))
    m.ring_all_reduce(q)
    assert repr((q, k, v)) == before


@pytest.mark.parametrize("options, word", [(dict(window=0), "window"), (dict(window=-3), "window"), (dict(sinks=-1), "sinks"),
                                           (dict(bias=[[0.0]]), "bias"), (dict(bias=[[0.0] * 3] * 3), "bias"),
                                           (dict(bias=[[0.0] * 4] * 2), "bias")])
def test_bad_options_are_named(options, word):
    q, k = numbers(0, 3, 2).tolist(), numbers(1, 4, 2).tolist()
    with pytest.raises(ValueError, match=word):
        m.attention_weights(q, k, **options)
    with pytest.raises(ValueError, match=word):
        m.attention(q, k, k, **options)


def test_bad_shapes_are_named():
    for q, k, v in (([[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0]] * 2), ([[]], [[]], [[1.0]]),
                    ([[1.0]], [[1.0]] * 2, [[1.0, 2.0], [1.0]])):
        with pytest.raises(ValueError):
            m.attention(q, k, v)
    with pytest.raises(ValueError, match="rows"):
        m.attention([[1.0]], [[1.0]], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="channels"):
        m.attention([[1.0, 2.0]], [[1.0]], [[1.0]])
    with pytest.raises(ValueError, match="at least one"):
        m.attention([[1.0]], [], [])
    assert m.attention([], [[1.0]], [[1.0]]) == []


# ---------------------------------------------------------------------------------------- the heads

def reference_gqa(x, wq, wk, wv, wo, n_heads, n_kv_heads, **options):
    """Repeat every KV head for its group, attend densely head by head, concatenate, project."""
    hd, hv = len(wq) // n_heads, len(wv) // n_kv_heads
    q, k, v = x @ wq.T, x @ wk.T, x @ wv.T
    k = np.repeat(k.reshape(len(x), n_kv_heads, hd), n_heads // n_kv_heads, axis=1)
    v = np.repeat(v.reshape(len(x), n_kv_heads, hv), n_heads // n_kv_heads, axis=1)
    heads = [dense_weights(q[:, h * hd:(h + 1) * hd], k[:, h], **options) @ v[:, h] for h in range(n_heads)]
    return np.concatenate(heads, axis=1) @ wo.T


def gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim):
    return [numbers(i, *shape) for i, shape in enumerate([(n_heads * head_dim, dim), (n_kv_heads * head_dim, dim),
                                                          (n_kv_heads * v_dim, dim), (dim, n_heads * v_dim)])]


@pytest.mark.parametrize("n, dim, n_heads, n_kv_heads, head_dim, v_dim",
                         [(1, 4, 1, 1, 3, 3), (7, 6, 4, 2, 3, 3), (5, 8, 6, 3, 2, 5), (9, 5, 4, 1, 2, 2), (6, 8, 4, 4, 2, 3),
                          (3, 7, 12, 4, 1, 2)])
@pytest.mark.parametrize("options", [dict(), dict(window=2), dict(window=2, sinks=1), dict(causal=False), dict(scale=0.7)], ids=str)
def test_grouped_query_attention(n, dim, n_heads, n_kv_heads, head_dim, v_dim, options):
    x, weights = numbers(9, n, dim), gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim)
    expected = reference_gqa(x, *weights, n_heads, n_kv_heads, **options)
    bound = dict(rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    lists = [w.tolist() for w in weights]
    np.testing.assert_allclose(m.grouped_query_attention(x.tolist(), *lists, n_heads, n_kv_heads, **options), expected, **bound)
    if n_kv_heads == 1:
        np.testing.assert_allclose(m.multi_query_attention(x.tolist(), *lists, n_heads, **options), expected, **bound)
    if n_kv_heads == n_heads:
        np.testing.assert_allclose(m.multi_head_attention(x.tolist(), *lists, n_heads, **options), expected, **bound)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1), (12, 4)])
def test_mean_pooling(n_heads, n_kv_heads):
    w = numbers(0, n_heads * 3, 5)
    expected = w.reshape(n_kv_heads, n_heads // n_kv_heads, 3, 5).mean(axis=1).reshape(n_kv_heads * 3, 5)
    np.testing.assert_allclose(m.mean_pool_kv_heads(w.tolist(), n_heads, n_kv_heads), expected, **TIGHT)


@pytest.mark.parametrize("call", [lambda w: m.multi_head_attention(w, w, w, w, w, 3), lambda w: m.multi_head_attention(w, w, w, w, w, 0),
                                  lambda w: m.grouped_query_attention(w, w, w, w, w, 4, 3), lambda w: m.mean_pool_kv_heads(w, 4, 3),
                                  lambda w: m.mean_pool_kv_heads(w, 3, 1), lambda w: m.mean_pool_kv_heads(w, 4, 0),
                                  lambda w: m.heads_of_ranks(4, 2, 3), lambda w: m.heads_of_ranks(6, 3, 2),
                                  lambda w: m.heads_of_ranks(4, 2, 8), lambda w: m.heads_of_ranks(4, 2, 0)])
def test_heads_that_do_not_divide_are_refused(call):
    with pytest.raises(ValueError, match="divide"):
        call(numbers(0, 4, 4).tolist())


# ------------------------------------------------------------------------- windows and rolling caches

@pytest.mark.parametrize("window, sinks", [(1, 0), (1, 1), (3, 0), (3, 2), (4, 1), (5, 7), (50, 0), (50, 3)])
def test_rolling_cache_is_the_masked_computation(window, sinks):
    n, d = 23, 3
    q, k, v = numbers(0, n, d), numbers(1, n, d), numbers(2, n, 2)
    expected = dense_weights(q, k, window=window, sinks=sinks) @ v
    cache = m.RollingKVCache(window, sinks)
    for i in range(n):
        slot = cache.append(k[i].tolist(), v[i].tolist())
        assert slot == (i if i < sinks else sinks + i % window)
        np.testing.assert_allclose(cache.attend(q[i].tolist()), expected[i], **TIGHT)
        kept = {position for position, _, _ in cache.slots.values()}
        assert kept == {p for p in range(i + 1) if p > i - window or p < sinks}
    np.testing.assert_allclose(cache.attend(q[-1].tolist(), scale=0.25),
                               (dense_weights(q, k, window=window, sinks=sinks, scale=0.25) @ v)[-1], **TIGHT)


@pytest.mark.parametrize("arguments", [(0,), (-1, 0), (3, -1)])
def test_rolling_cache_refuses_no_room(arguments):
    with pytest.raises(ValueError, match="window"):
        m.RollingKVCache(*arguments)
    assert m.RollingKVCache(3).sinks == 0


@pytest.mark.parametrize("n_q, n_k, options", [(8, 8, dict()), (1, 9, dict()), (8, 8, dict(window=3)), (9, 9, dict(window=2, sinks=2)),
                                               (4, 7, dict(causal=False))])
def test_multiplications_are_those_of_the_visible_pairs(n_q, n_k, options):
    d, d_v = 3, 5
    matrices = [numbers(i, *shape).tolist() for i, shape in enumerate([(n_q, d), (n_k, d), (n_k, d_v)])]
    counted = m.count_multiplications(lambda q, k, v: m.attention(q, k, v, **options), *matrices)
    pairs = mask(n_q, n_k, options.get("causal", True), options.get("window"), options.get("sinks", 0)).sum()
    assert counted == pairs * (d + d_v + 1)


# ---------------------------------------------------------------------------------------------- MLA

def reference_mla(x, w):
    """DeepSeek-V2's equations for a whole text, without a cache."""
    c = x @ np.array(w.w_down).T
    k_rope = reference_rope(x @ np.array(w.wk_rope).T, range(len(x)))
    heads = []
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        q = np.hstack([x @ np.array(wq).T, reference_rope(x @ np.array(wq_rope).T, range(len(x)))])
        k = np.hstack([c @ np.array(wk_up).T, k_rope])
        heads.append(dense_weights(q, k) @ (c @ np.array(wv_up).T))
    return np.hstack(heads) @ np.array(w.wo).T


@pytest.mark.parametrize("n, dim, n_heads, head_dim, v_dim, d_c, d_rope",
                         [(1, 4, 1, 2, 2, 1, 2), (9, 8, 4, 3, 5, 6, 4), (6, 12, 3, 4, 2, 7, 2), (5, 4, 2, 1, 1, 20, 6)])
def test_mla_plain_and_absorbed(n, dim, n_heads, head_dim, v_dim, d_c, d_rope):
    w = m.random_mla_weights(random.Random(0), dim, n_heads, head_dim, v_dim, d_c, d_rope)
    x = numbers(1, n, dim)
    expected, lists = reference_mla(x, w), x.tolist()
    c, k_rope = m.mla_compress(lists, w)
    assert (len(c), len(c[0]), len(k_rope[0])) == (n, d_c, d_rope)
    for form in (m.mla_attention, m.mla_attention_absorbed):
        np.testing.assert_allclose(form(lists, c, k_rope, w), expected, **TIGHT)
        np.testing.assert_allclose(form(lists[-2:], c, k_rope, w), expected[-2:], **TIGHT)
    later = m.mla_compress(lists[n // 2:], w, start=n // 2)
    assert (later[0], later[1]) == (c[n // 2:], k_rope[n // 2:])


# ---------------------------------------------------------------------------------------- positions

def reference_rope(x, positions, base=10000.0):
    """Each pair of adjacent channels times its 2 × 2 rotation matrix (RoFormer)."""
    x, out = np.array(x, float), np.zeros(np.shape(x))
    for r, p in enumerate(positions):
        for i in range(x.shape[1] // 2):
            angle = p * base ** (-2 * i / x.shape[1])
            turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            out[r, 2 * i:2 * i + 2] = turn @ x[r, 2 * i:2 * i + 2]
    return out


@pytest.mark.parametrize("d, base", [(2, 10000.0), (8, 10000.0), (6, 500000.0), (8, 10.0)])
def test_rope(d, base):
    x, positions = numbers(0, 5, d), [0, 3, 3, 100, 7]
    np.testing.assert_allclose(m.rope(x.tolist(), positions, base), reference_rope(x, positions, base), **TIGHT)
    assert m.rope(x.tolist(), [0] * 5) == x.tolist()
    np.testing.assert_allclose(np.linalg.norm(m.rope(x.tolist(), positions), axis=1), np.linalg.norm(x, axis=1), **TIGHT)


def test_rope_of_nothing():
    assert m.rope([], []) == []


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_rope_scores_do_not_change_under_a_shift(shift):
    q, k = numbers(0, 6, 8), numbers(1, 6, 8)
    at_home, away = (np.array(m.rope(q.tolist(), range(s, s + 6))) @ np.array(m.rope(k.tolist(), range(s, s + 6))).T
                     for s in (0, shift))
    np.testing.assert_allclose(away, at_home, rtol=0, atol=1e-11)


@pytest.mark.parametrize("x, positions", [([[1.0, 2.0, 3.0]], [0]), ([[1.0, 2.0]], [0, 1])])
def test_rope_refuses_odd_channels_and_missing_positions(x, positions):
    with pytest.raises(ValueError, match="even|positions"):
        m.rope(x, positions)


def test_alibi_slopes_are_the_published_ones():
    assert m.alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]  # section 3 of the paper
    assert m.alibi_slopes(16)[:2] == pytest.approx([2 ** -0.5, 2 ** -1], abs=1e-15)
    assert m.alibi_slopes(1) == [2 ** -8]
    # For 12 heads the authors' code takes the 8 of 8 heads, then every other one of 16 heads.
    assert m.alibi_slopes(12) == pytest.approx(m.alibi_slopes(8) + m.alibi_slopes(16)[0::2][:4], abs=1e-15)
    assert all(len(m.alibi_slopes(n)) == n for n in range(1, 40))
    with pytest.raises(ValueError, match="n_heads"):
        m.alibi_slopes(0)


@pytest.mark.parametrize("n_q, n_k", [(5, 5), (2, 6), (1, 1)])
def test_alibi_bias_is_slope_times_distance(n_q, n_k):
    expected = [[-0.5 * (n_k - n_q + i - j) for j in range(n_k)] for i in range(n_q)]
    assert m.alibi_bias(n_q, n_k, 0.5) == expected
    assert expected[-1][-1] == 0


# ----------------------------------------------------------------------------------------- the bill

def test_bytes_of_real_models():
    """Figures worked out elsewhere: 512 KiB for Llama 2 7B, 128 KiB for Llama 3.1 8B, 320 for 70B, 70,272 bytes for DeepSeek-V3."""
    by_name = {model.name: m.cache_bytes(model, 1) for model in m.REAL_MODELS}
    assert by_name["Llama 2 7B"] == 512 * 1024
    assert by_name["Llama 3.1 8B"] == by_name["Mistral 7B"] == 128 * 1024
    assert by_name["Llama 3.1 70B"] == 320 * 1024
    assert by_name["GPT-3 175B"] == 4.5 * 2 ** 20
    assert by_name["Falcon 7B"] == 8 * 1024
    assert by_name["DeepSeek-V3"] == 70272
    assert m.kv_bytes_per_token(80, 8, 128) == 2 * m.kv_bytes_per_token(80, 8, 128, bytes_per_value=1) == 320 * 1024


def test_kinds_fit_their_numbers():
    for model in m.REAL_MODELS:
        kind = ("MLA" if model.d_c else "MHA" if model.n_kv_heads == model.n_heads else "MQA" if model.n_kv_heads == 1
                else "GQA") + " + window" * (model.window is not None)
        assert model.kind == kind and model.source and model.n_heads % model.n_kv_heads == 0


def test_random_mla_weights_keep_sizes_and_a_model_is_plain_unless_it_says_otherwise():
    w = m.random_mla_weights(random.Random(0), 64, 2, 16, 16, 64, 16)
    assert np.std(w.w_down) == pytest.approx(1 / 8, rel=0.05) and np.std(w.wk_up) == pytest.approx(1 / 8, rel=0.08)
    model = m.RealModel("tiny", "MHA", 1, 8, 2, 2, 4, 99, "here")
    assert (model.window, model.d_c, model.d_rope) == (None, 0, 0)


def test_the_cache_stops_growing_at_the_window():
    mistral = next(model for model in m.REAL_MODELS if model.window)
    assert m.cache_bytes(mistral, 4095) < m.cache_bytes(mistral, 4096) == m.cache_bytes(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 4096) == m.decode_multiplications(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 100) == 32 * 32 * 100 * 256


def test_decode_multiplications_of_absorbed_mla_are_those_counted():
    model = m.RealModel("tiny", "MLA", 1, 8, 3, 3, 4, 99, "here", d_c=5, d_rope=2)
    k, c = numbers(0, 6, 7).tolist(), numbers(1, 6, 5).tolist()
    counted = sum(m.count_multiplications(lambda q, k, v: m.attention(q, k, v), numbers(h, 1, 7).tolist(), k, c) - 6
                  for h in range(3))
    assert m.decode_multiplications(model, 6) == counted


# ------------------------------------------------------------------------------------ tensor parallel

@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (4, 1), (4, 4), (6, 3), (12, 4), (8, 2), (1, 1)])
def test_sum_over_ranks_is_the_whole(n_heads, n_kv_heads):
    x, weights = numbers(9, 5, 6), gqa_weights(n_heads, n_kv_heads, 2, 2, 6)
    options = dict(window=2, sinks=1) if n_heads == 4 else {}
    whole = reference_gqa(x, *weights, n_heads, n_kv_heads, **options)
    lists = [w.tolist() for w in weights]
    for n_ranks in m.possible_ranks(n_heads, n_kv_heads):
        parts = m.tensor_parallel_attention(x.tolist(), *lists, n_heads, n_kv_heads, n_ranks, **options)
        assert len(parts) == n_ranks
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=0, atol=1e-12 * np.abs(whole).max())
        heads = m.heads_of_ranks(n_heads, n_kv_heads, n_ranks)
        assert [h for queries, _ in heads for h in queries] == list(range(n_heads))
        for queries, kv in heads:  # each query head finds the KV head of its group, and nothing idle is kept
            assert {h * n_kv_heads // n_heads for h in queries} == set(kv)


@pytest.mark.parametrize("heads, ranks", [((4, 2), [1, 2, 4]), ((12, 4), [1, 2, 4, 12]), ((12, 6), [1, 2, 3, 6, 12]),
                                          ((8, 1), [1, 2, 4, 8]), ((1, 1), [1]), ((6, 3), [1, 3, 6])])
def test_possible_ranks(heads, ranks):
    assert m.possible_ranks(*heads) == ranks


def test_shards_are_cut_and_counted_right():
    wq, wk, wv, wo = gqa_weights(4, 2, 3, 3, 5)
    shards = m.shard_weights(wq.tolist(), wk.tolist(), wv.tolist(), wo.tolist(), 4, 2, 4)
    for r, (q, k, v, o) in enumerate(shards):  # four ranks, two KV heads: each stands on two ranks
        np.testing.assert_array_equal(q, wq[3 * r:3 * r + 3])
        np.testing.assert_array_equal(k, wk[r // 2 * 3:r // 2 * 3 + 3])
        np.testing.assert_array_equal(v, wv[r // 2 * 3:r // 2 * 3 + 3])
        np.testing.assert_array_equal(o, wo[:, 3 * r:3 * r + 3])


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 4, 7, 30])
def test_ring_all_reduce(n_ranks, size):
    parts = numbers(0, n_ranks, size)
    reduced, sent = m.ring_all_reduce(parts.tolist())
    np.testing.assert_allclose(reduced, [parts.sum(axis=0)] * n_ranks, **TIGHT)
    assert sum(sent) == 2 * (n_ranks - 1) * size
    if size % n_ranks == 0:
        assert sent == [2 * (n_ranks - 1) * size // n_ranks] * n_ranks


# --------------------------------------------------------------------------------- the heads by hand

def test_the_heads_do_their_jobs():
    """The maps of sections 1 and 2, in numbers: what the trace lets a reader see."""
    class Knobs:
        seed, dim, tokens = 0, 32, "This is the cat that killed the rat that ate the malt".split()
    x = m.embed(Knobs)
    wq, wk, wv, wo = m.build_heads(list(m.JOBS), 8, 32)
    q, k = (m.split_heads(m.linear(x, w), 4) for w in (wq, wk))
    same, back, everywhere, first = (np.array(m.attention_weights(q[h], k[h])) for h in range(4))
    last_the = 10
    assert sum(same[last_the, j] for j in (2, 6, 10)) > 0.95
    assert all(back[i, i - 1] > 0.9 for i in range(1, 12))
    np.testing.assert_allclose(everywhere[11], [1 / 12] * 12, **TIGHT)
    assert (first[:, 0] > 0.9).all()
    # A full match scores SHARPNESS, whatever the head's size.
    assert np.diag(np.array(q[0]) @ np.array(k[0]).T) / 8 ** 0.5 == pytest.approx([m.SHARPNESS] * 12)
    assert wo == np.eye(32).tolist() and wv[:8] == np.eye(8, 32).tolist()
    assert [m.job_of(h) for h in range(5)] == [*m.JOBS, "same word"]
    # The blocks of an embedding.
    assert set(np.abs(np.array(x)[:, :8]).ravel()) == {1.0} and x[2][:8] == x[6][:8] != x[3][:8]
    assert x[5][8:12] == pytest.approx([2 ** 0.5 * f(5 * math.pi / n) for n in (2, 4) for f in (math.cos, math.sin)])
    assert x[5][16:24] == x[4][8:16] and x[5][24:] == x[0][8:16]


def test_noise_makes_heads_a_little_different():
    exact = m.build_heads(["same word"] * 2, 8, 32)
    noisy = m.build_heads(["same word"] * 2, 8, 32, 0.1, random.Random(0))
    assert exact == m.build_heads(["same word"] * 2, 8, 32, 0.0, random.Random(0)) and noisy[0] == exact[0]
    for clean, moved in zip(exact[1:3], noisy[1:3]):
        assert np.linalg.norm(np.array(moved) - clean, axis=1).mean() == pytest.approx(0.1, abs=0.02)
