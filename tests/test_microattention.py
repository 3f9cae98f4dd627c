"""microattention against references in numpy, written from the definitions.

They share no code with the script.
"""

import math
import random

import numpy as np
import pytest

import microattention as m

TIGHT = dict(rtol=0, atol=1e-12)
SEEDS = range(5)
TOKENS = m.SENTENCE.split()


def numbers(seed, *shape, size=1.0):
    return np.random.default_rng(seed).normal(size=shape) * size


# The naive reference


def mask(n_q, n_k, causal=True, window=None, sinks=0):
    """Return who sees whom, [n_q][n_k], element by element from the words of the docstring."""
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        for j in range(n_k):
            position = n_k - n_q + i
            if causal and j > position:
                seen[i, j] = False
            if window is not None and j <= position - window and j >= sinks:
                seen[i, j] = False
    return seen


def dense_weights(q, k, causal=True, window=None, sinks=0, scale=None, bias=None, sink_logit=None):
    """Return the weights [n_q][n_k]; a sink logit is one more column, dropped in the end."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[1])
    scores = q @ k.T * scale
    if bias is not None:
        scores = scores + bias
    seen = mask(len(q), len(k), causal, window, sinks)
    weights = np.zeros_like(scores)
    for i in range(len(q)):
        row = scores[i, seen[i]]
        if sink_logit is not None:
            row = np.append(row, sink_logit)
        if not seen[i].any():
            continue
        exps = np.exp(row - row.max())
        weights[i, seen[i]] = (exps / exps.sum())[:seen[i].sum()]
    return weights


# 1. Scaled dot-product attention

SHAPES = [  # n_q, n_k, d, d_v
    (1, 1, 1, 1), (1, 7, 4, 3), (7, 7, 4, 4), (5, 13, 3, 5), (13, 5, 2, 7), (16, 16, 8, 1),
    (2, 3, 1, 2)]
OPTIONS = [
    dict(), dict(causal=False), dict(window=1), dict(window=3), dict(window=3, sinks=2),
    dict(window=100), dict(window=2, sinks=100), dict(sinks=3), dict(causal=False, window=2),
    dict(causal=False, window=2, sinks=1), dict(scale=0.3), dict(scale=0.0),
    dict(window=1, sinks=1), dict(sink_logit=0.5), dict(sink_logit=-40.0, window=2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_the_dense_masked_softmax(shape, options, biased):
    n_q, n_k, d, d_v = shape
    q, k, v = numbers(0, n_q, d), numbers(1, n_k, d), numbers(2, n_k, d_v)
    bias = numbers(3, n_q, n_k) if biased else None
    given = dict(options, bias=bias.tolist()) if biased else options
    expected = dense_weights(q, k, bias=bias, **options)
    weights = m.attention_weights(q.tolist(), k.tolist(), **given)
    out = m.attention(q.tolist(), k.tolist(), v.tolist(), **given)
    np.testing.assert_allclose(weights, expected, **TIGHT)
    np.testing.assert_allclose(out, expected @ v, **TIGHT)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "sink_logit" not in o], ids=str)
def test_weights_sum_to_one_and_stay_inside_the_mask(options):
    weights = np.array(m.attention_weights(numbers(0, 11, 3).tolist(), numbers(1, 17, 3).tolist(),
                                           **options))
    which = {name: value for name, value in options.items() if name != "scale"}
    seen = mask(11, 17, **which)
    np.testing.assert_allclose(weights.sum(axis=1), 1, **TIGHT)
    assert (weights[seen] > 0).all() and (weights[~seen] == 0).all()


def test_the_tiny_example_of_the_comment():
    q = [[2.0, 2.0, 0.0, 0.0]]
    k = [[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 5.0, 5.0], [0.0, 1.0, 9.0, 0.0]]
    assert m.attention_weights(q, k)[0] == pytest.approx([0.665, 0.090, 0.245], abs=5e-4)
    assert m.attention(q, k, [[10.0], [20.0], [30.0]])[0] == pytest.approx([15.8], abs=0.05)


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
    third = pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-15)
    assert m.attention_weights(zeros, zeros, bias=hidden)[3] == third
    everything_hidden = [[-math.inf] * 4] * 4
    assert m.attention(zeros, zeros, [[5.0]] * 4, bias=everything_hidden) == [[0.0]] * 4


def test_arguments_are_left_as_they_were():
    q, k, v = numbers(0, 3, 2).tolist(), numbers(1, 3, 2).tolist(), numbers(2, 3, 2).tolist()
    before = repr((q, k, v))
    m.attention(q, k, v, window=2, sinks=1)
    m.rope(q, range(3))
    m.run_pipeline([lambda x: m.add_matrices([x, x])], [q, k])
    m.llama3_thetas(q[0])
    assert repr((q, k, v)) == before


@pytest.mark.parametrize("options, word", [
    (dict(window=0), "window"), (dict(window=-3), "window"), (dict(sinks=-1), "sinks"),
    (dict(bias=[[0.0]]), "bias"), (dict(bias=[[0.0] * 3] * 3), "bias"),
    (dict(bias=[[0.0] * 4] * 2), "bias")])
def test_bad_options_are_named(options, word):
    q, k = numbers(0, 3, 2).tolist(), numbers(1, 4, 2).tolist()
    with pytest.raises(ValueError, match=word):
        m.attention_weights(q, k, **options)
    with pytest.raises(ValueError, match=word):
        m.attention(q, k, k, **options)


@pytest.mark.parametrize("q, k, v, word", [
    ([[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0]] * 2, "channels"),
    ([[]], [[]], [[1.0]], "at least one"),
    ([[1.0]], [[1.0]] * 2, [[1.0, 2.0], [1.0]], "rows"),
    ([[1.0]], [[1.0]], [[1.0], [2.0]], "rows"),
    ([[1.0, 2.0]], [[1.0]], [[1.0]], "channels"),
    ([[1.0]], [], [], "at least one")])
def test_bad_shapes_are_named(q, k, v, word):
    with pytest.raises(ValueError, match=word):
        m.attention(q, k, v)


def test_no_queries_give_no_output():
    assert m.attention([], [[1.0]], [[1.0]]) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_only_undivided_scores_sharpen_as_d_grows(seed):
    rows = m.compare_scales((4, 16, 64, 256), 32, 32, random.Random(seed))
    for row in rows:
        assert row.spread == pytest.approx(row.root_d, rel=0.3)
    assert [row.raw for row in rows] == sorted(row.raw for row in rows)
    scaled = [row.scaled for row in rows]
    assert rows[-1].raw > 3 * max(scaled) and max(scaled) < 2 * min(scaled)


def test_compare_scales_by_hand():
    """One query and one key: all the weight is on it, and q·k is its own spread."""
    (row,) = m.compare_scales((1,), 1, 1, random.Random(7))
    rng = random.Random(7)
    assert row == (1, abs(rng.gauss(0, 1) * rng.gauss(0, 1)), 1.0, 1.0, 1.0)


def test_a_worked_out_row_by_hand():
    rows = m.work_out_row([[1.0], [2.0]], [[3.0], [4.0]], [[1.0, -1.0], [-1.0, -1.0]], "ab", 1)
    assert [(row.j, row.key, row.product, row.score, row.value) for row in rows] == [
        (0, "a", 6.0, 6.0, "+-"), (1, "b", 8.0, 8.0, "--")]
    assert rows[1].weight == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-15)


# 2 and 3. The heads


def reference_gqa(x, wq, wk, wv, wo, n_heads, n_kv_heads, **options):
    """Repeat every KV head for its group, attend densely head by head, concatenate, project."""
    head_dim = len(wq) // n_heads
    v_dim = len(wv) // n_kv_heads
    group = n_heads // n_kv_heads
    q = x @ wq.T
    k = np.repeat((x @ wk.T).reshape(len(x), n_kv_heads, head_dim), group, axis=1)
    v = np.repeat((x @ wv.T).reshape(len(x), n_kv_heads, v_dim), group, axis=1)
    heads = []
    for h in range(n_heads):
        queries = q[:, h * head_dim:(h + 1) * head_dim]
        heads.append(dense_weights(queries, k[:, h], **options) @ v[:, h])
    return np.concatenate(heads, axis=1) @ wo.T


def gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim):
    return [numbers(0, n_heads * head_dim, dim), numbers(1, n_kv_heads * head_dim, dim),
            numbers(2, n_kv_heads * v_dim, dim), numbers(3, dim, n_heads * v_dim)]


@pytest.mark.parametrize("n, dim, n_heads, n_kv_heads, head_dim, v_dim", [
    (1, 4, 1, 1, 3, 3), (7, 6, 4, 2, 3, 3), (5, 8, 6, 3, 2, 5), (9, 5, 4, 1, 2, 2),
    (6, 8, 4, 4, 2, 3), (3, 7, 12, 4, 1, 2)])
@pytest.mark.parametrize("options", [
    dict(), dict(window=2), dict(window=2, sinks=1), dict(causal=False), dict(scale=0.7),
    dict(sink_logit=1.0)], ids=str)
def test_grouped_query_attention(n, dim, n_heads, n_kv_heads, head_dim, v_dim, options):
    x = numbers(9, n, dim)
    weights = gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim)
    expected = reference_gqa(x, *weights, n_heads, n_kv_heads, **options)
    bound = dict(rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))
    lists = [x.tolist(), *(w.tolist() for w in weights)]
    out = m.grouped_query_attention(*lists, n_heads, n_kv_heads, **options)
    np.testing.assert_allclose(out, expected, **bound)
    if n_kv_heads == 1:
        out = m.multi_query_attention(*lists, n_heads, **options)
        np.testing.assert_allclose(out, expected, **bound)
    if n_kv_heads == n_heads:
        out = m.multi_head_attention(*lists, n_heads, **options)
        np.testing.assert_allclose(out, expected, **bound)
    if v_dim == head_dim and not options:
        np.testing.assert_allclose(m.dense_heads(*lists, n_heads, n_kv_heads), expected, **bound)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1), (12, 4)])
def test_mean_pooling(n_heads, n_kv_heads):
    w = numbers(0, n_heads * 3, 5)
    groups = w.reshape(n_kv_heads, n_heads // n_kv_heads, 3, 5)
    pooled = m.mean_pool_kv_heads(w.tolist(), n_heads, n_kv_heads)
    np.testing.assert_allclose(pooled, groups.mean(axis=1).reshape(n_kv_heads * 3, 5), **TIGHT)
    first = m.first_of_group(w.tolist(), n_heads, n_kv_heads)
    np.testing.assert_array_equal(first, groups[:, 0].reshape(n_kv_heads * 3, 5))


@pytest.mark.parametrize("call", [
    lambda w: m.multi_head_attention(w, w, w, w, w, 3),
    lambda w: m.multi_head_attention(w, w, w, w, w, 0),
    lambda w: m.grouped_query_attention(w, w, w, w, w, 4, 3),
    lambda w: m.mean_pool_kv_heads(w, 4, 3),
    lambda w: m.mean_pool_kv_heads(w, 3, 1),
    lambda w: m.mean_pool_kv_heads(w, 4, 0),
    lambda w: m.heads_of_ranks(4, 2, 3),
    lambda w: m.heads_of_ranks(6, 3, 2),
    lambda w: m.heads_of_ranks(4, 2, 8),
    lambda w: m.heads_of_ranks(4, 2, 0)])
def test_heads_that_do_not_divide_are_refused(call):
    with pytest.raises(ValueError, match="divide"):
        call(numbers(0, 4, 4).tolist())


def test_sharing_by_hand():
    """4 heads of 2 channels: a KV head keeps 4 numbers; each of 6 pairs takes 2 + 2 products."""
    x = numbers(0, 3, 8).tolist()
    rows = m.compare_sharing(x, 4, 2, random.Random(0))
    assert [(row.variant, row.kv_heads, row.kept, row.multiplications) for row in rows] == [
        ("MHA", 4, 16, 96), ("GQA", 2, 8, 96), ("MQA", 1, 4, 96)]
    assert max(row.error for row in rows) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_averaging_pays_where_heads_are_alike_and_hurts_where_not(seed):
    x = m.embed(TOKENS, 32, seed)
    identical, noisy, different = m.compare_conversions(x, 4, 2, random.Random(seed))
    assert identical.averaged < 1e-12 and identical.first_kept < 1e-12
    assert noisy.averaged < 0.9 * noisy.first_kept
    assert min(different.averaged, different.first_kept) > 3 * noisy.averaged


# 4. Windows, sinks and the rolling cache


@pytest.mark.parametrize("window, sinks", [
    (1, 0), (1, 1), (3, 0), (3, 2), (4, 1), (5, 7), (50, 0), (50, 3)])
def test_rolling_cache_is_the_masked_computation(window, sinks):
    n = 23
    q, k, v = numbers(0, n, 3), numbers(1, n, 3), numbers(2, n, 2)
    expected = dense_weights(q, k, window=window, sinks=sinks) @ v
    cache = m.RollingKVCache(window, sinks)
    for i in range(n):
        slot = cache.append(k[i].tolist(), v[i].tolist())
        assert slot == (i if i < sinks else sinks + i % window)
        np.testing.assert_allclose(cache.attend(q[i].tolist()), expected[i], **TIGHT)
        kept = {position for position, _, _ in cache.slots.values()}
        assert kept == {p for p in range(i + 1) if p > i - window or p < sinks}
    rescaled = dense_weights(q, k, window=window, sinks=sinks, scale=0.25) @ v
    np.testing.assert_allclose(cache.attend(q[-1].tolist(), scale=0.25), rescaled[-1], **TIGHT)


@pytest.mark.parametrize("arguments", [(0,), (-1, 0), (3, -1)])
def test_rolling_cache_refuses_no_room(arguments):
    with pytest.raises(ValueError, match="window"):
        m.RollingKVCache(*arguments)
    assert m.RollingKVCache(3).sinks == 0


@pytest.mark.parametrize("options", [
    dict(), dict(window=3), dict(window=2, sinks=2), dict(causal=False), dict(sink_logit=1.0)])
def test_the_work_is_that_of_the_visible_pairs(options):
    d, n = 4, 9
    (row,) = m.compare_work((n,), {"it": options}, d, random.Random(0))
    which = {name: value for name, value in options.items() if name != "sink_logit"}
    assert row == {"tokens": n, "it": mask(n, n, **which).sum() * 2 * d}


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_a_kept_first_token_keeps_the_head_that_rests_on_it(seed):
    rows = m.compare_windowed(m.embed(TOKENS, 32, seed), 4, 1, random.Random(seed))
    own_word, one_back, everything, resting, learned = rows
    assert resting.window > 0.3 and resting.with_sinks < 1e-6
    assert max(learned.full, learned.window) < 0.01 < 0.1 < everything.window
    assert resting.full < 1e-6
    assert one_back.window < 0.1 < own_word.window


def test_how_far_an_output_moves_by_hand():
    """A window of 2 hides nothing of two tokens; a window of 1 hides the first from the second.

    A head that looks everywhere then returns v[1] instead of v[1] / 2, as v[0] is 0.
    """
    x = m.embed(["a", "b"], 32, 0)
    for row in m.compare_windowed(x, 2, 0, random.Random(0)):
        assert row[2:] == (0.0, 0.0)
    everything = m.compare_windowed(x, 1, 0, random.Random(0))[2]
    assert everything.window == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("tokens, dim, head_dim, note", [
    (TOKENS, 32, 8, ""), (TOKENS, 8, 2, "same code"), (list("ab") * 20, 32, 8, "far apart"),
    (TOKENS, 32, 4, "4 of the 8")])
def test_what_the_heads_cannot_tell_apart_is_said(tokens, dim, head_dim, note):
    said = m.limits_of_heads(m.embed(tokens, dim, 0), tokens, head_dim)
    assert note in said and bool(note) == bool(said)


@pytest.mark.parametrize("job, weights, right", [
    ("same word", [[1.0, 0.0], [0.5, 0.5]], True), ("same word", [[1.0, 0.0], [0.1, 0.9]], False),
    ("one back", [[1.0, 0.0], [0.9, 0.1]], True), ("one back", [[1.0, 0.0], [0.1, 0.9]], False),
    ("first token", [[1.0, 0.0], [0.9, 0.1]], True),
    ("first token", [[1.0, 0.0], [0.5, 0.5]], False),
    ("everywhere", [[1.0, 0.0], [0.5, 0.5]], True),
    ("everywhere", [[1.0, 0.0], [0.6, 0.4]], False)])
def test_whether_a_head_does_its_job(job, weights, right):
    assert m.does_its_job(job, weights, ["a", "a"]) == right


@pytest.mark.parametrize("windows, reach", [
    ([1], [0]), ([3], [2]), ([3, 3], [2, 4]), ([3, None], [2, 7]), ([None], [7]),
    ([2, 3, 4], [1, 3, 6])])
def test_the_reach_of_a_stack(windows, reach):
    heard = m.spread_marker(windows, 8)
    assert heard == [[token <= last for token in range(8)] for last in reach]


def test_roll_cache_draws_the_slots():
    q = k = v = numbers(0, 4, 2).tolist()
    outputs, pictures = m.roll_cache(q, k, v, 2, 1)
    assert pictures[-1] == "token   3 → slot   2  │  0 │  2 │  3*│"
    expected = dense_weights(np.array(q), np.array(k), window=2, sinks=1) @ np.array(v)
    np.testing.assert_allclose(outputs, expected, **TIGHT)


# 5. Positions


def reference_rope(x, positions, base=10000.0):
    """Multiply each pair of neighbouring channels by its 2 × 2 rotation matrix (RoFormer)."""
    x = np.array(x, float)
    out = np.zeros(x.shape)
    for r, p in enumerate(positions):
        for i in range(x.shape[1] // 2):
            angle = p * base ** (-2 * i / x.shape[1])
            turn = np.array([[math.cos(angle), -math.sin(angle)],
                             [math.sin(angle), math.cos(angle)]])
            out[r, 2 * i:2 * i + 2] = turn @ x[r, 2 * i:2 * i + 2]
    return out


@pytest.mark.parametrize("d, base", [(2, 10000.0), (8, 10000.0), (6, 500000.0), (8, 10.0)])
def test_rope(d, base):
    x, positions = numbers(0, 5, d), [0, 3, 3, 100, 7]
    rotated = m.rope(x.tolist(), positions, base)
    np.testing.assert_allclose(rotated, reference_rope(x, positions, base), **TIGHT)
    assert m.rope(x.tolist(), [0] * 5) == x.tolist()
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), np.linalg.norm(x, axis=1), **TIGHT)


def test_rope_of_nothing():
    assert m.rope([], []) == []


def test_the_traces_reference_is_the_rotation_too():
    x = numbers(0, 1, 6)
    np.testing.assert_allclose([m.rotate_by_hand(x[0].tolist(), 12)], reference_rope(x, [12]),
                               **TIGHT)


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_rope_scores_do_not_change_under_a_shift(shift):
    q, k = numbers(0, 6, 8).tolist(), numbers(1, 6, 8).tolist()
    at_home = np.array(m.rope(q, range(6))) @ np.array(m.rope(k, range(6))).T
    places = range(shift, shift + 6)
    away = np.array(m.rope(q, places)) @ np.array(m.rope(k, places)).T
    np.testing.assert_allclose(away, at_home, rtol=0, atol=1e-11)


@pytest.mark.parametrize("x, positions", [([[1.0, 2.0, 3.0]], [0]), ([[1.0, 2.0]], [0, 1])])
def test_rope_refuses_odd_channels_and_missing_positions(x, positions):
    with pytest.raises(ValueError, match="even|positions"):
        m.rope(x, positions)


def reference_llama3(theta, factor, low, high, original):
    """Return a stretched angle, by wavelength and in three cases, as Meta's code has it."""
    wavelength = 2 * math.pi / theta
    if wavelength < original / high:
        return theta
    if wavelength > original / low:
        return theta / factor
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * theta / factor + smooth * theta


@pytest.mark.parametrize("settings", [
    (8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2.0, 2.0, 5.0, 100)])
def test_llama3_thetas(settings):
    thetas = [500000.0 ** (-2 * m_ / 128) for m_ in range(64)]
    expected = [reference_llama3(theta, *settings) for theta in thetas]
    np.testing.assert_allclose(m.llama3_thetas(thetas, *settings), expected, rtol=1e-14)
    if settings == (8.0, 1.0, 4.0, 8192):
        assert m.llama3_thetas(thetas) == m.llama3_thetas(thetas, *settings)


def test_stretched_rows_by_hand():
    """With base 1 every pair turns by one radian a token, in 2π tokens, and nothing is slowed."""
    rows = m.compare_stretched(4, 1.0, 1000)
    assert [row.pair for row in rows] == [0, 1]
    for row in rows:
        assert row[1:] == pytest.approx((2 * math.pi, 1000 / (2 * math.pi), 2 * math.pi, 1.0))


def test_alibi_slopes_are_the_published_ones():
    published = [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert m.alibi_slopes(8) == published  # section 3 of the paper
    assert m.alibi_slopes(16)[:2] == pytest.approx([2 ** -0.5, 2 ** -1], abs=1e-15)
    assert m.alibi_slopes(1) == [2 ** -8]
    # For 12 heads the authors' code takes the 8 of 8 heads, then every other one of 16 heads.
    twelve = m.alibi_slopes(8) + m.alibi_slopes(16)[0::2][:4]
    assert m.alibi_slopes(12) == pytest.approx(twelve, abs=1e-15)
    assert all(len(m.alibi_slopes(n)) == n for n in range(1, 40))
    with pytest.raises(ValueError, match="n_heads"):
        m.alibi_slopes(0)


@pytest.mark.parametrize("n_q, n_k", [(5, 5), (2, 6), (1, 1)])
def test_alibi_bias_is_slope_times_distance(n_q, n_k):
    expected = [[-0.5 * (n_k - n_q + i - j) for j in range(n_k)] for i in range(n_q)]
    assert m.alibi_bias(n_q, n_k, 0.5) == expected
    assert expected[-1][-1] == 0


# 6. MLA


def reference_mla(x, w):
    """Return DeepSeek-V2's equations for a whole text, without a cache."""
    c = x @ np.array(w.w_down).T
    positions = range(len(x))
    k_rope = reference_rope(x @ np.array(w.wk_rope).T, positions)
    heads = []
    for wq, wq_rope, wk_up, wv_up in zip(w.wq, w.wq_rope, w.wk_up, w.wv_up):
        q_rope = reference_rope(x @ np.array(wq_rope).T, positions)
        q = np.hstack([x @ np.array(wq).T, q_rope])
        k = np.hstack([c @ np.array(wk_up).T, k_rope])
        heads.append(dense_weights(q, k) @ (c @ np.array(wv_up).T))
    return np.hstack(heads) @ np.array(w.wo).T


@pytest.mark.parametrize("n, dim, n_heads, head_dim, v_dim, d_c, d_rope", [
    (1, 4, 1, 2, 2, 1, 2), (9, 8, 4, 3, 5, 6, 4), (6, 12, 3, 4, 2, 7, 2), (5, 4, 2, 1, 1, 20, 6)])
def test_mla_plain_and_absorbed(n, dim, n_heads, head_dim, v_dim, d_c, d_rope):
    w = m.random_mla_weights(random.Random(0), dim, n_heads, head_dim, v_dim, d_c, d_rope)
    x = numbers(1, n, dim)
    expected = reference_mla(x, w)
    lists = x.tolist()
    c, k_rope = m.mla_compress(lists, w)
    assert (len(c), len(c[0]), len(k_rope[0])) == (n, d_c, d_rope)
    for form in (m.mla_attention, m.mla_attention_absorbed):
        np.testing.assert_allclose(form(lists, c, k_rope, w), expected, **TIGHT)
        np.testing.assert_allclose(form(lists[-2:], c, k_rope, w), expected[-2:], **TIGHT)
    np.testing.assert_allclose(m.dense_mla(lists, w), expected, **TIGHT)
    later = m.mla_compress(lists[n // 2:], w, start=n // 2)
    assert later == (c[n // 2:], k_rope[n // 2:])


def test_random_mla_weights_are_as_large_as_their_inputs_are_many():
    w = m.random_mla_weights(random.Random(0), 64, 2, 16, 16, 64, 16)
    assert np.std(w.w_down) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(w.wk_up) == pytest.approx(1 / 8, rel=0.08)


def test_what_mla_leaves_by_hand():
    w = m.random_mla_weights(random.Random(0), 8, 4, 2, 3, 7, 2)
    assert [row.numbers for row in m.compare_mla_caches(w, 2)] == [20, 10, 5, 9]


def test_the_work_of_both_forms_by_hand():
    """One head, dim 3, head_dim 2, v_dim 2, d_c 5, d_rope 2; one query on four cached tokens."""
    w = m.random_mla_weights(random.Random(0), 3, 1, 2, 2, 5, 2)
    (row,) = m.compare_forms(w, ((1, 4),), random.Random(0))
    queries = 3 * 2 + 3 * 2
    out = 2 * 3
    assert row.plain == queries + 4 * (5 * 2 + 5 * 2) + 4 * (4 + 2) + out
    assert row.absorbed == queries + 2 * 5 + 4 * (7 + 5) + 5 * 2 + out
    assert row.ratio == row.plain / row.absorbed


# 7. The bill


def model_named(name):
    return next(model for model in m.REAL_MODELS if model.name == name)


def test_bytes_of_real_models():
    """Figures worked out elsewhere; DeepSeek-V3's are published."""
    expected = {
        "Llama 2 7B": 512 * 1024, "Llama 3.1 8B": 128 * 1024, "Mistral 7B v0.1": 128 * 1024,
        "Llama 3.1 70B": 320 * 1024, "GPT-3 175B": 4.5 * 2 ** 20, "Falcon 7B": 8 * 1024,
        "DeepSeek-V3": 70272}
    for name, size in expected.items():
        assert m.cache_bytes(model_named(name), 1) == size
    assert m.kv_bytes_per_token(80, 8, 128) == 320 * 1024
    assert m.kv_bytes_per_token(80, 8, 128, bytes_per_value=1) == 160 * 1024


def test_kinds_fit_their_numbers():
    for model in m.REAL_MODELS:
        if model.d_c:
            kind = "MLA"
        elif model.n_kv_heads == model.n_heads:
            kind = "MHA"
        else:
            kind = "MQA" if model.n_kv_heads == 1 else "GQA"
        assert model.kind.split(",")[0] == kind
        assert bool(model.window) == ("window" in model.kind or "local" in model.kind)
        assert bool(model.window) == bool(model.n_local_layers)
        assert model.source and model.n_heads % model.n_kv_heads == 0


def test_a_window_stops_the_cache_only_in_its_own_layers():
    mistral = model_named("Mistral 7B v0.1")
    assert m.cache_bytes(mistral, 4095) < m.cache_bytes(mistral, 4096)
    assert m.cache_bytes(mistral, 4096) == m.cache_bytes(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 4096) == m.decode_multiplications(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 100) == 32 * 32 * 100 * 256
    gpt_oss = model_named("gpt-oss-120b")
    growth = m.cache_bytes(gpt_oss, 1001) - m.cache_bytes(gpt_oss, 1000)
    assert growth == 18 * 2 * 8 * 64 * 2
    assert m.cache_bytes(gpt_oss, 1000) == (18 * 1000 + 18 * 128) * 2 * 8 * 64 * 2


def test_the_bill_brackets_what_a_model_was_not_made_for():
    rows = {row.model: row for row in m.bill(m.REAL_MODELS)}
    assert rows["Llama 2 7B"][2:] == (512.0, "2.00 ", "(16.00)", "(64.00)")
    assert {row.model for row in m.decode_work(m.REAL_MODELS, 32768)} == {
        model.name for model in m.REAL_MODELS if model.context >= 32768}


def test_decode_work_by_hand():
    tiny = m.RealModel("tiny", "GQA", 2, 12, 4, 2, 3, 99, "here")
    (row,) = m.decode_work([tiny], 10)
    stored = 2 * 2 * 2 * 3 * 10 * 2  # layers, keys and values, KV heads, channels, tokens, bytes
    flops = 2 * 2 * 4 * 10 * (3 + 3)
    assert row == ("tiny", 2 * 2 * 12 * 10 * 2 / stored, flops / 1e9, flops / stored)


# 8. Model parallelism


@pytest.mark.parametrize("n_heads, n_kv_heads", [
    (4, 2), (4, 1), (4, 4), (6, 3), (12, 4), (8, 2), (1, 1)])
def test_the_sum_over_ranks_is_the_whole(n_heads, n_kv_heads):
    x = numbers(9, 5, 6)
    weights = gqa_weights(n_heads, n_kv_heads, 2, 2, 6)
    options = dict(window=2, sinks=1) if n_heads == 4 else {}
    whole = reference_gqa(x, *weights, n_heads, n_kv_heads, **options)
    lists = [x.tolist(), *(w.tolist() for w in weights)]
    for n_ranks in m.possible_ranks(n_heads, n_kv_heads):
        parts = m.tensor_parallel_attention(*lists, n_heads, n_kv_heads, n_ranks, **options)
        assert len(parts) == n_ranks
        np.testing.assert_allclose(np.sum(parts, axis=0), whole, rtol=0,
                                   atol=1e-12 * np.abs(whole).max())
        heads = m.heads_of_ranks(n_heads, n_kv_heads, n_ranks)
        assert [h for queries, _ in heads for h in queries] == list(range(n_heads))
        for queries, kv in heads:  # each query head finds its KV head, and no other is kept
            assert {h * n_kv_heads // n_heads for h in queries} == set(kv)


@pytest.mark.parametrize("heads, ranks", [
    ((4, 2), [1, 2, 4]), ((12, 4), [1, 2, 4, 12]), ((12, 6), [1, 2, 3, 6, 12]),
    ((8, 1), [1, 2, 4, 8]), ((1, 1), [1]), ((6, 3), [1, 3, 6])])
def test_possible_ranks(heads, ranks):
    assert m.possible_ranks(*heads) == ranks


def test_shards_are_cut_and_counted_right():
    wq, wk, wv, wo = gqa_weights(4, 2, 3, 3, 5)
    weights = [w.tolist() for w in (wq, wk, wv, wo)]
    for r, (q, k, v, o) in enumerate(m.shard_weights(*weights, 4, 2, 4)):
        # Four ranks, two KV heads: each stands on two ranks.
        np.testing.assert_array_equal(q, wq[3 * r:3 * r + 3])
        np.testing.assert_array_equal(k, wk[r // 2 * 3:r // 2 * 3 + 3])
        np.testing.assert_array_equal(v, wv[r // 2 * 3:r // 2 * 3 + 3])
        np.testing.assert_array_equal(o, wo[:, 3 * r:3 * r + 3])
    assert m.compare_ranks(weights, 4, 2) == [
        # ranks, query heads, KV heads, weights, cache, copies
        (1, 4, 2, 12 * 5 + 6 * 5 + 6 * 5 + 5 * 12, 12, 1.0),
        (2, 2, 1, 6 * 5 + 3 * 5 + 3 * 5 + 5 * 6, 6, 1.0),
        (4, 1, 1, 3 * 5 + 3 * 5 + 3 * 5 + 5 * 3, 6, 2.0)]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("n_micro_batches", [1, 2, 4, 7])
def test_a_pipeline_is_one_machine_with_a_bubble(n_stages, n_micro_batches):
    calls = []

    def stage(s):
        def work(x):
            calls.append(s)
            return [[value * 2 + s for value in row] for row in x]
        return work

    stages = [stage(s) for s in range(n_stages)]
    batch = [numbers(i, 2, 3).tolist() for i in range(n_micro_batches)]
    outputs, schedule = m.run_pipeline(stages, batch)
    assert len(calls) == n_stages * n_micro_batches
    for x, out in zip(batch, outputs, strict=True):
        for work in stages:
            x = work(x)
        assert out == x
    assert len(schedule) == n_stages + n_micro_batches - 1
    for tick, row in enumerate(schedule):
        for s, cell in enumerate(row):
            number = tick - s
            assert cell == (number if 0 <= number < n_micro_batches else None)


def test_the_bubble_by_hand():
    stages = m.make_stages(3, 4, random.Random(0))
    rows = m.compare_micro_batches(stages, (1, 4), random.Random(0))
    assert rows[0] == (1, 3, pytest.approx(2 / 3), 2 / 3, pytest.approx(1.0))
    assert rows[1] == (4, 6, pytest.approx(1 / 3), 2 / 6, pytest.approx(2.0))


# The heads by hand


def test_the_heads_do_their_jobs():
    """The maps of sections 1 and 2, in numbers: what the trace lets a reader see."""
    x = m.embed(TOKENS, 32, 0)
    wq, wk, wv, wo = m.build_heads(list(m.JOBS), 8, 32)
    q = m.split_heads(m.linear(x, wq), 4)
    k = m.split_heads(m.linear(x, wk), 4)
    same, back, everywhere, first = (np.array(m.attention_weights(q[h], k[h])) for h in range(4))
    last_the = 10
    assert sum(same[last_the, j] for j in (2, 6, 10)) > 0.95
    assert all(back[i, i - 1] > 0.9 for i in range(1, 12))
    np.testing.assert_allclose(everywhere[11], [1 / 12] * 12, **TIGHT)
    assert (first[:, 0] > 0.999).all()
    # A key that is just what a head looks for scores SHARPNESS, whatever the head's size.
    own_word = np.diag(np.array(q[0]) @ np.array(k[0]).T) / math.sqrt(8)
    assert own_word == pytest.approx([m.SHARPNESS] * 12)
    assert wo == np.eye(32).tolist() and wv[:8] == np.eye(8, 32).tolist()
    assert [m.job_of(h) for h in range(5)] == [*m.JOBS, "same word"]


def test_an_embedding_has_four_blocks():
    x = m.embed(TOKENS, 32, 0)
    assert set(np.abs(np.array(x)[:, :8]).ravel()) == {1.0}
    assert x[2][:8] == x[6][:8] != x[3][:8]
    hands = [math.sqrt(2) * f(5 * math.pi / n) for n in (2, 4) for f in (math.cos, math.sin)]
    assert x[5][8:12] == pytest.approx(hands)
    assert x[5][16:24] == x[4][8:16]
    assert x[0][24:] == [1.0] * 8 and x[5][24:] == [-1.0] * 8


@pytest.mark.parametrize("seed", SEEDS)
def test_the_codes_of_the_sentences_words_differ(seed):
    codes = m.word_codes(sorted(set(TOKENS)), 8, random.Random(seed))
    assert len({tuple(code) for code in codes.values()}) == len(codes) == 9


def test_noise_makes_heads_a_little_different():
    jobs = ["same word"] * 2
    exact = m.build_heads(jobs, 8, 32)
    noisy = m.build_heads(jobs, 8, 32, 0.1, random.Random(0))
    assert exact == m.build_heads(jobs, 8, 32, 0.0, random.Random(0)) and noisy[0] == exact[0]
    for clean, moved in zip(exact[1:3], noisy[1:3]):
        lengths = np.linalg.norm(np.array(moved) - clean, axis=1)
        assert lengths.mean() == pytest.approx(0.1, abs=0.02)


def test_counted_dots_counts_and_puts_dot_back():
    before = m.dot
    with m.counted_dots() as count:
        m.linear([[1.0, 2.0, 3.0]] * 2, [[1.0, 0.0, 0.0]] * 4)
    assert count.products == 2 * 4 * 3 and m.dot is before
