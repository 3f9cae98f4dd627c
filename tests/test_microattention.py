"""microattention against references in numpy, written from the definitions.

They share no code with the script.
"""

import math
import random
from functools import partial

import numpy as np
import pytest

import microattention as m

TIGHT = {"rtol": 0, "atol": 1e-12}
SEEDS = range(5)
TOKENS = m.SENTENCE.split()


def numbers(seed, *shape):
    """Return normal random numbers of this shape."""
    return np.random.default_rng(seed).normal(size=shape)


def assert_close(got, expected):
    """Assert that two arrays differ by at most 1e-12 times the largest expected number."""
    expected = np.asarray(expected)
    size = max(1, np.abs(expected).max(initial=0))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12 * size)


# The naive reference


def mask(n_q, n_k, causal=True, window=None, sinks=0):
    """Return who sees whom, [n_q][n_k], element by element from the words of the docstring."""
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        position = n_k - n_q + i
        for j in range(n_k):
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
        if not seen[i].any():
            continue
        row = scores[i, seen[i]]
        if sink_logit is not None:
            row = np.append(row, sink_logit)
        exps = np.exp(row - row.max())
        shares = exps / exps.sum()
        weights[i, seen[i]] = shares[:seen[i].sum()]
    return weights


# 1. Scaled dot-product attention

SHAPES = [  # n_q, n_k, d, d_v
    (1, 1, 1, 1),
    (1, 7, 4, 3),
    (7, 7, 4, 4),
    (5, 13, 3, 5),
    (13, 5, 2, 7),
    (16, 16, 8, 1),
    (2, 3, 1, 2),
]
MASKS = [
    {},
    {"causal": False},
    {"window": 1},
    {"window": 3},
    {"window": 3, "sinks": 2},
    {"window": 100},
    {"window": 2, "sinks": 100},
    {"sinks": 3},
    {"causal": False, "window": 2},
    {"causal": False, "window": 2, "sinks": 1},
    {"window": 1, "sinks": 1},
]
OPTIONS = [
    *MASKS,
    {"scale": 0.3},
    {"scale": 0.0},
    {"sink_logit": 0.5},
    {"sink_logit": -40.0, "window": 2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_the_dense_masked_softmax(shape, biased):
    n_q, n_k, d, d_v = shape
    q = numbers(0, n_q, d)
    k = numbers(1, n_k, d)
    v = numbers(2, n_k, d_v)
    for options in OPTIONS:
        if biased:
            bias = numbers(3, n_q, n_k)
            expected = dense_weights(q, k, bias=bias, **options)
            options = {**options, "bias": bias.tolist()}
        else:
            expected = dense_weights(q, k, **options)
        weights = m.attention_weights(q.tolist(), k.tolist(), **options)
        out = m.attention(q.tolist(), k.tolist(), v.tolist(), **options)
        np.testing.assert_allclose(weights, expected, err_msg=str(options), **TIGHT)
        np.testing.assert_allclose(out, expected @ v, err_msg=str(options), **TIGHT)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("scale", [None, 0.3, 0.0])
def test_weights_sum_to_one_and_stay_inside_the_mask(options, scale):
    q = numbers(0, 11, 3).tolist()
    k = numbers(1, 17, 3).tolist()
    weights = np.array(m.attention_weights(q, k, scale=scale, **options))
    seen = mask(11, 17, **options)
    np.testing.assert_allclose(weights.sum(axis=1), 1, **TIGHT)
    assert (weights[seen] > 0).all()
    assert (weights[~seen] == 0).all()


def test_the_tiny_example_of_the_comment():
    q = [[2.0, 2.0, 0.0, 0.0]]
    k = [[1.0, 1.0, 0.0, 0.0], [1.0, -1.0, 5.0, 5.0], [0.0, 1.0, 9.0, 0.0]]
    v = [[10.0], [20.0], [30.0]]
    weights = m.attention_weights(q, k)
    assert weights[0] == pytest.approx([0.665, 0.090, 0.245], abs=5e-4)
    out = m.attention(q, k, v)
    assert out[0] == pytest.approx([15.8], abs=0.05)


def test_queries_before_the_first_key_see_nothing():
    q = numbers(0, 6, 2).tolist()
    k = numbers(1, 4, 2).tolist()
    v = numbers(2, 4, 3).tolist()
    out = m.attention(q, k, v)
    assert out[0] == out[1] == [0.0, 0.0, 0.0]
    assert any(out[2])
    weights = m.attention_weights(q, k)
    assert weights[0] == weights[1] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_logits_give_finite_results(size):
    q = numbers(0, 5, 4) * abs(size)
    k = numbers(1, 5, 4) * size
    v = numbers(2, 5, 2)
    out = m.attention(q.tolist(), k.tolist(), v.tolist())
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, dense_weights(q, k) @ v, **TIGHT)


def test_equal_scores_share_evenly():
    zeros = [[0.0]] * 4
    weights = m.attention_weights(zeros, zeros)
    assert weights[3] == [0.25, 0.25, 0.25, 0.25]


def test_a_bias_of_minus_infinity_hides_a_key():
    zeros = [[0.0]] * 4
    bias = [[0.0, -math.inf, 0.0, 0.0]] * 4
    weights = m.attention_weights(zeros, zeros, bias=bias)
    assert weights[3] == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=1e-15)


def test_a_bias_that_hides_every_key_gives_zeros():
    zeros = [[0.0]] * 4
    values = [[5.0]] * 4
    bias = [[-math.inf] * 4] * 4
    assert m.attention(zeros, zeros, values, bias=bias) == zeros


def test_arguments_are_left_as_they_were():
    q = numbers(0, 3, 2).tolist()
    k = numbers(1, 3, 2).tolist()
    v = numbers(2, 3, 2).tolist()
    before = repr((q, k, v))
    m.attention(q, k, v, window=2, sinks=1)
    m.rope(q, range(3))
    m.run_pipeline([lambda x: m.add_matrices([x, x])], [q, k])
    m.llama3_thetas(q[0])
    assert repr((q, k, v)) == before


@pytest.mark.parametrize("options, word", [
    ({"window": 0}, "window"),
    ({"window": -3}, "window"),
    ({"sinks": -1}, "sinks"),
    ({"bias": [[0.0]]}, "bias"),
    ({"bias": [[0.0] * 3] * 3}, "bias"),
    ({"bias": [[0.0] * 4] * 2}, "bias"),
])
def test_bad_options_are_named(options, word):
    q = numbers(0, 3, 2).tolist()
    k = numbers(1, 4, 2).tolist()
    with pytest.raises(ValueError, match=word):
        m.attention_weights(q, k, **options)
    with pytest.raises(ValueError, match=word):
        m.attention(q, k, k, **options)


@pytest.mark.parametrize("q, k, v, word", [
    ([[1.0, 2.0]], [[1.0, 2.0], [1.0]], [[1.0], [1.0]], "channels"),
    ([[1.0, 2.0]], [[1.0]], [[1.0]], "channels"),
    ([[]], [[]], [[1.0]], "at least one"),
    ([[1.0]], [], [], "at least one"),
    ([[1.0]], [[1.0], [1.0]], [[1.0, 2.0], [1.0]], "rows"),
    ([[1.0]], [[1.0]], [[1.0], [2.0]], "rows"),
])
def test_bad_shapes_are_named(q, k, v, word):
    with pytest.raises(ValueError, match=word):
        m.attention(q, k, v)


def test_no_queries_give_no_output():
    assert m.attention([], [[1.0]], [[1.0]]) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_only_undivided_scores_sharpen_as_d_grows(seed):
    rows = m.compare_scales((4, 16, 64, 256), 32, random.Random(seed))
    for row in rows:
        assert row.spread == pytest.approx(math.sqrt(row.d), rel=0.3)
    raw = [row.raw for row in rows]
    scaled = [row.scaled for row in rows]
    assert raw == sorted(raw)
    assert raw[-1] > 3 * max(scaled)
    assert max(scaled) < 2 * min(scaled)


def test_compare_scales_by_hand():
    """With one query and one key, all the weight is on the key, and q·k is its own spread."""
    rows = m.compare_scales((1,), 1, random.Random(7))
    rng = random.Random(7)
    product = rng.gauss(0, 1) * rng.gauss(0, 1)
    assert rows == [(1, abs(product), 1.0, 1.0)]


def test_a_worked_out_row_by_hand():
    q = [[1.0], [2.0]]
    k = [[3.0], [4.0]]
    v = [[1.0, -1.0], [-1.0, -1.0]]
    first, second = m.work_out_row(q, k, v, ["a", "b"], 1)
    weight = 1 / (1 + math.exp(-2))
    assert first == (0, "a", 6.0, 6.0, pytest.approx(1 - weight, abs=1e-15), "+-")
    assert second == (1, "b", 8.0, 8.0, pytest.approx(weight, abs=1e-15), "--")


@pytest.mark.parametrize("tokens, last", [("abcab", 4), ("abacd", 2), ("abc", 2), ("a", 0)])
def test_the_last_token_that_came_before(tokens, last):
    assert m.last_repeated(tokens) == last


# 2 and 3. The heads


def reference_gqa(x, weights, n_heads, n_kv_heads, **options):
    """Repeat every KV head for its group, attend densely head by head, concatenate, project."""
    wq, wk, wv, wo = weights
    group = n_heads // n_kv_heads
    queries = np.split(x @ wq.T, n_heads, axis=1)
    keys = np.split(x @ wk.T, n_kv_heads, axis=1)
    values = np.split(x @ wv.T, n_kv_heads, axis=1)
    outputs = []
    for h in range(n_heads):
        attended = dense_weights(queries[h], keys[h // group], **options)
        outputs.append(attended @ values[h // group])
    return np.hstack(outputs) @ wo.T


def gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim):
    """Return random wq, wk, wv and wo as arrays."""
    wq = numbers(0, n_heads * head_dim, dim)
    wk = numbers(1, n_kv_heads * head_dim, dim)
    wv = numbers(2, n_kv_heads * v_dim, dim)
    wo = numbers(3, dim, n_heads * v_dim)
    return [wq, wk, wv, wo]


def as_lists(arrays):
    """Return each array as a list of rows."""
    return [array.tolist() for array in arrays]


@pytest.mark.parametrize("n, dim, n_heads, n_kv_heads, head_dim, v_dim", [
    (1, 4, 1, 1, 3, 3),
    (7, 6, 4, 2, 3, 3),
    (5, 8, 6, 3, 2, 5),
    (9, 5, 4, 1, 2, 2),
    (6, 8, 4, 4, 2, 3),
    (3, 7, 12, 4, 1, 2),
])
@pytest.mark.parametrize("options", [
    {},
    {"window": 2},
    {"window": 2, "sinks": 1},
    {"causal": False},
    {"scale": 0.7},
    {"sink_logit": 1.0},
], ids=str)
def test_grouped_query_attention(n, dim, n_heads, n_kv_heads, head_dim, v_dim, options):
    x = numbers(9, n, dim)
    weights = gqa_weights(n_heads, n_kv_heads, head_dim, v_dim, dim)
    expected = reference_gqa(x, weights, n_heads, n_kv_heads, **options)
    arguments = as_lists([x, *weights])
    assert_close(m.grouped_query_attention(*arguments, n_heads, n_kv_heads, **options), expected)
    if n_kv_heads == 1:
        assert_close(m.multi_query_attention(*arguments, n_heads, **options), expected)
    if n_kv_heads == n_heads:
        assert_close(m.multi_head_attention(*arguments, n_heads, **options), expected)
    if v_dim == head_dim and not options:
        assert_close(m.dense_heads(*arguments, n_heads, n_kv_heads), expected)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1), (12, 4)])
def test_mean_pooling(n_heads, n_kv_heads):
    head_dim, dim = 3, 5
    group = n_heads // n_kv_heads
    w = numbers(0, n_heads * head_dim, dim)
    expected = w.reshape(n_kv_heads, group, head_dim, dim).mean(axis=1)
    pooled = m.mean_pool_kv_heads(w.tolist(), n_heads, n_kv_heads)
    np.testing.assert_allclose(pooled, expected.reshape(n_kv_heads * head_dim, dim), **TIGHT)


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
    lambda w: m.heads_of_ranks(4, 2, 0),
])
def test_heads_that_do_not_divide_are_refused(call):
    w = numbers(0, 4, 4).tolist()
    with pytest.raises(ValueError, match="divide"):
        call(w)


def test_the_heads_are_cut_from_left_to_right():
    x = [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    left, right = m.split_heads(x, 2)
    assert left == [[1.0, 2.0], [5.0, 6.0]]
    assert right == [[3.0, 4.0], [7.0, 8.0]]
    assert m.concat(left, right) == x


def test_sharing_by_hand():
    """4 heads of 2 channels: a KV head keeps 4 numbers; each of 6 pairs takes 2 + 2 products."""
    x = numbers(0, 3, 8).tolist()
    mha, gqa, mqa = m.compare_sharing(x, 4, 2, random.Random(0))
    multiplications = 4 * 6 * (2 + 2)
    assert mha[:4] == ("MHA", 4, 16, multiplications)
    assert gqa[:4] == ("GQA", 2, 8, multiplications)
    assert mqa[:4] == ("MQA", 1, 4, multiplications)
    assert max(mha.error, gqa.error, mqa.error) < 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_averaging_changes_heads_only_where_their_jobs_differ(seed):
    x = m.embed(TOKENS, seed)
    alike = m.convert_to_gqa(x, ["same word", "same word", "one back", "one back"], 2)
    different = m.convert_to_gqa(x, ["same word", "one back", "everywhere", "first token"], 2)
    assert alike < 1e-12
    assert different > 0.4


def test_a_conversion_by_hand():
    """One token looks at itself only.

    A head with the first job hands over its word, one with the second its position: two vectors u
    and w of length 4, which stand side by side in the output. Averaged, both are (u + w) / 2.
    """
    x = m.embed(["a"], 0)
    word = np.array(x[0][:16])
    position = np.array(x[0][16:32])
    moved = np.linalg.norm(word - position) / 2
    expected = math.sqrt(2) * moved / np.linalg.norm(np.append(word, position))
    got = m.convert_to_gqa(x, ["same word", "one back"], 1)
    assert got == pytest.approx(expected, abs=1e-12)


# 4. Windows, sinks and the rolling cache


@pytest.mark.parametrize("window, sinks", [
    (1, 0), (1, 1), (3, 0), (3, 2), (4, 1), (5, 7), (50, 0), (50, 3)])
def test_rolling_cache_is_the_masked_computation(window, sinks):
    n = 23
    q = numbers(0, n, 3)
    k = numbers(1, n, 3)
    v = numbers(2, n, 2)
    expected = dense_weights(q, k, window=window, sinks=sinks) @ v
    cache = m.RollingKVCache(window, sinks)
    for i in range(n):
        slot = cache.append(k[i].tolist(), v[i].tolist())
        expected_slot = i if i < sinks else sinks + i % window
        assert slot == expected_slot
        np.testing.assert_allclose(cache.attend(q[i].tolist()), expected[i], **TIGHT)
        kept = {position for position, _, _ in cache.slots.values()}
        assert kept == {p for p in range(i + 1) if p > i - window or p < sinks}
    rescaled = dense_weights(q, k, window=window, sinks=sinks, scale=0.25) @ v
    np.testing.assert_allclose(cache.attend(q[-1].tolist(), scale=0.25), rescaled[-1], **TIGHT)


@pytest.mark.parametrize("arguments", [(0,), (-1, 0), (3, -1)])
def test_rolling_cache_refuses_no_room(arguments):
    with pytest.raises(ValueError, match="window"):
        m.RollingKVCache(*arguments)


def test_a_rolling_cache_has_no_sinks_unless_asked():
    assert m.RollingKVCache(3).sinks == 0


def test_the_three_masks_by_hand():
    assert m.masks_of(4, 1) == {
        "causal": {},
        "window 4": {"window": 4},
        "with 1 sink": {"window": 4, "sinks": 1},
    }


@pytest.mark.parametrize("options", [
    {}, {"window": 3}, {"window": 2, "sinks": 2}, {"causal": False}], ids=str)
@pytest.mark.parametrize("sink_logit", [None, 1.0])
def test_the_work_is_that_of_the_visible_pairs(options, sink_logit):
    d, n = 4, 9
    given = {**options, "sink_logit": sink_logit}
    rows = m.compare_work((n,), d, {"it": given}, random.Random(0))
    pairs = mask(n, n, **options).sum()
    assert rows == [{"tokens": n, "it": pairs * 2 * d}]


@pytest.mark.parametrize("window", [1, 3, 9, 100])
def test_count_pairs(window):
    assert m.count_pairs(9, window) == mask(9, 9, window=window).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_finding_a_kept_first_token_keeps_the_head_that_rests_on_it(seed):
    rows = m.compare_windowed(m.embed(TOKENS, seed), 4, 1, random.Random(seed))
    own_word, one_back, everything, resting, learned = rows
    assert one_back.window < 0.1 < own_word.window
    assert everything.window > 0.1
    assert resting.full < 1e-6
    assert resting.window > 0.3
    assert resting.with_sinks < 1e-6
    assert max(learned.full, learned.window) < 0.01


def test_a_window_as_long_as_the_text_moves_nothing():
    x = m.embed(["a", "b"], 0)
    for row in m.compare_windowed(x, 2, 0, random.Random(0)):
        assert row.window == row.with_sinks == 0.0


def test_how_far_an_output_moves_by_hand():
    """A window of 1 hides the first of two tokens from the second.

    A head that looks everywhere then returns v[1] instead of v[1] / 2, as v[0] is 0.
    """
    x = m.embed(["a", "b"], 0)
    rows = m.compare_windowed(x, 1, 0, random.Random(0))
    everything = rows[2]
    assert everything.full == pytest.approx(0.5, abs=1e-12)
    assert everything.window == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("windows, reach", [
    ([1], [0]),
    ([3], [2]),
    ([3, 3], [2, 4]),
    ([3, None], [2, 7]),
    ([None], [7]),
    ([2, 3, 4], [1, 3, 6]),
])
def test_the_reach_of_a_stack(windows, reach):
    layers = m.spread_marker(windows, 8)
    assert len(layers) == len(reach)
    for has_heard, last in zip(layers, reach):
        assert has_heard == [token <= last for token in range(8)]


def test_roll_cache_lists_the_slots():
    q = numbers(0, 4, 2)
    outputs, rows = m.roll_cache(q.tolist(), q.tolist(), q.tolist(), 2, 1)
    assert rows[3] == {"token": 3, "goes to slot": 2, "positions, slot by slot": "  0   2   3"}
    expected = dense_weights(q, q, window=2, sinks=1) @ q
    np.testing.assert_allclose(outputs, expected, **TIGHT)


def test_masks_are_drawn_side_by_side():
    assert m.draw_masks({"all": {}, "near": {"window": 2}}, 3) == [
        "all   near",
        "█     █   ",
        "██    ██  ",
        "███    ██ ",
    ]


# 5. Positions


def reference_rope(x, positions, base=10000.0):
    """Multiply each pair of neighbouring channels by its 2 × 2 rotation matrix (RoFormer)."""
    n, d = x.shape
    out = np.zeros((n, d))
    for row in range(n):
        for pair in range(d // 2):
            angle = positions[row] * base ** (-2 * pair / d)
            cos, sin = math.cos(angle), math.sin(angle)
            turn = np.array([[cos, -sin], [sin, cos]])
            channels = slice(2 * pair, 2 * pair + 2)
            out[row, channels] = turn @ x[row, channels]
    return out


@pytest.mark.parametrize("d, base", [(2, 10000.0), (8, 10000.0), (6, 500000.0), (8, 10.0)])
def test_rope(d, base):
    x = numbers(0, 5, d)
    positions = [0, 3, 3, 100, 7]
    rotated = m.rope(x.tolist(), positions, base)
    np.testing.assert_allclose(rotated, reference_rope(x, positions, base), **TIGHT)


def test_rope_keeps_lengths_and_position_0():
    x = numbers(0, 5, 8)
    rotated = m.rope(x.tolist(), [0, 3, 3, 100, 7])
    assert rotated[0] == x[0].tolist()
    lengths = np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=1), lengths, **TIGHT)


def test_rope_of_nothing():
    assert m.rope([], []) == []


def test_the_traces_reference_is_the_rotation_too():
    x = numbers(0, 1, 6)
    expected = reference_rope(x, [12])[0]
    np.testing.assert_allclose(m.rotate_by_hand(x[0].tolist(), 12), expected, **TIGHT)


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_rope_scores_do_not_change_under_a_shift(shift):
    q = numbers(0, 6, 8).tolist()
    k = numbers(1, 6, 8).tolist()
    at_home = range(6)
    away = range(shift, shift + 6)
    expected = np.array(m.rope(q, at_home)) @ np.array(m.rope(k, at_home)).T
    shifted = np.array(m.rope(q, away)) @ np.array(m.rope(k, away)).T
    np.testing.assert_allclose(shifted, expected, rtol=0, atol=1e-11)


def test_a_score_at_two_positions():
    q = numbers(0, 1, 4)
    k = numbers(1, 1, 4)
    expected = reference_rope(q, [7]) @ reference_rope(k, [3]).T
    score = m.score_at(q[0].tolist(), k[0].tolist(), 7, 3)
    assert score == pytest.approx(expected[0, 0], abs=1e-12)


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


LLAMA_THETAS = [500000.0 ** (-2 * pair / 128) for pair in range(64)]


@pytest.mark.parametrize("settings", [
    (8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (2.0, 2.0, 5.0, 100)])
def test_llama3_thetas(settings):
    expected = [reference_llama3(theta, *settings) for theta in LLAMA_THETAS]
    stretched = m.llama3_thetas(LLAMA_THETAS, *settings)
    np.testing.assert_allclose(stretched, expected, rtol=1e-14)


def test_the_defaults_are_those_of_llama_3_1():
    assert m.llama3_thetas(LLAMA_THETAS) == m.llama3_thetas(LLAMA_THETAS, 8.0, 1.0, 4.0, 8192)


def test_stretched_rows_by_hand():
    """With base 1 every pair turns by one radian a token, in 2π tokens, and nothing is slowed."""
    rows = m.compare_stretched([0, 1], 4, 1.0, 1000)
    for pair, row in enumerate(rows):
        assert row == pytest.approx((pair, 2 * math.pi, 1000 / (2 * math.pi), 1.0))


def test_pair_32_of_llama_3_1_is_slowed_as_worked_out_in_the_source():
    (row,) = m.compare_stretched([32], 128, 500000.0, 8192)
    assert row == pytest.approx((32, 4443, 1.844, 1 / 0.3711), rel=1e-3)


def test_alibi_slopes_are_the_published_ones():
    # Section 3 of the paper has those of 8 heads, and says how others are made.
    assert m.alibi_slopes(8) == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    assert m.alibi_slopes(4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert m.alibi_slopes(1) == [2 ** -8]
    assert m.alibi_slopes(16)[:2] == pytest.approx([2 ** -0.5, 2 ** -1], abs=1e-15)
    # For 12 heads the authors' code takes the 8 of 8 heads, then every other one of 16 heads.
    every_other = m.alibi_slopes(16)[0::2]
    twelve = m.alibi_slopes(8) + every_other[:4]
    assert m.alibi_slopes(12) == pytest.approx(twelve, abs=1e-15)
    for n_heads in range(1, 40):
        assert len(m.alibi_slopes(n_heads)) == n_heads
    with pytest.raises(ValueError, match="n_heads"):
        m.alibi_slopes(0)


@pytest.mark.parametrize("n_q, n_k", [(5, 5), (2, 6), (1, 1)])
def test_alibi_bias_is_slope_times_distance(n_q, n_k):
    bias = m.alibi_bias(n_q, n_k, 0.5)
    assert len(bias) == n_q
    for i, row in enumerate(bias):
        position = n_k - n_q + i
        assert row == [-0.5 * (position - j) for j in range(n_k)]
    assert bias[-1][-1] == 0


def test_the_last_token_looks_back_by_slope():
    """A slope of log 2 halves the weight from one key to the one before it."""
    (weights,) = m.look_back([math.log(2)], 3)
    assert weights == pytest.approx([1 / 7, 2 / 7, 4 / 7], abs=1e-15)


# 6. MLA


def mla_weights(dim, n_heads, head_dim, v_dim, d_c, d_rope):
    """Return random MLA weights of these sizes."""
    def heads(seed, rows, columns):
        return numbers(seed, n_heads, rows, columns).tolist()

    return m.MLAWeights(
        w_down=numbers(0, d_c, dim).tolist(),
        wk_rope=numbers(1, d_rope, dim).tolist(),
        wq=heads(2, head_dim, dim),
        wq_rope=heads(3, d_rope, dim),
        wk_up=heads(4, head_dim, d_c),
        wv_up=heads(5, v_dim, d_c),
        wo=numbers(6, dim, n_heads * v_dim).tolist(),
    )


def reference_mla(x, w):
    """Return DeepSeek-V2's equations for a whole text, without a cache."""
    c = x @ np.array(w.w_down).T
    positions = range(len(x))
    k_rope = reference_rope(x @ np.array(w.wk_rope).T, positions)
    outputs = []
    for h in range(len(w.wq)):
        q_rope = reference_rope(x @ np.array(w.wq_rope[h]).T, positions)
        q = np.hstack([x @ np.array(w.wq[h]).T, q_rope])
        k = np.hstack([c @ np.array(w.wk_up[h]).T, k_rope])
        v = c @ np.array(w.wv_up[h]).T
        outputs.append(dense_weights(q, k) @ v)
    return np.hstack(outputs) @ np.array(w.wo).T


MLA_SIZES = [  # n, dim, n_heads, head_dim, v_dim, d_c, d_rope
    (1, 4, 1, 2, 2, 1, 2),
    (9, 8, 4, 3, 5, 6, 4),
    (6, 12, 3, 4, 2, 7, 2),
    (5, 4, 2, 1, 1, 20, 6),
]


@pytest.mark.parametrize("n, dim, n_heads, head_dim, v_dim, d_c, d_rope", MLA_SIZES)
def test_mla_plain_and_absorbed(n, dim, n_heads, head_dim, v_dim, d_c, d_rope):
    w = mla_weights(dim, n_heads, head_dim, v_dim, d_c, d_rope)
    x = numbers(7, n, dim)
    expected = reference_mla(x, w)
    x = x.tolist()
    c, k_rope = m.mla_compress(x, w)
    for form in (m.mla_attention, m.mla_attention_absorbed):
        assert_close(form(x, c, k_rope, w), expected)
        assert_close(form(x[-2:], c, k_rope, w), expected[-2:])
    assert_close(m.dense_mla(x, w), expected)


@pytest.mark.parametrize("n, dim, n_heads, head_dim, v_dim, d_c, d_rope", MLA_SIZES)
def test_a_text_may_be_compressed_in_parts(n, dim, n_heads, head_dim, v_dim, d_c, d_rope):
    w = mla_weights(dim, n_heads, head_dim, v_dim, d_c, d_rope)
    x = numbers(7, n, dim).tolist()
    c, k_rope = m.mla_compress(x, w)
    assert np.shape(c) == (n, d_c)
    assert np.shape(k_rope) == (n, d_rope)
    half = n // 2
    assert m.mla_compress(x[half:], w, start=half) == (c[half:], k_rope[half:])


def test_both_forms_go_on_from_a_cache():
    w = mla_weights(8, 2, 3, 3, 5, 4)
    x = numbers(7, 7, 8)
    expected = reference_mla(x, w)
    for form in (m.mla_attention, m.mla_attention_absorbed):
        assert_close(m.attend_in_halves(form, x.tolist(), w), expected)


def test_random_mla_weights_have_deepseeks_proportions():
    w = m.random_mla_weights(random.Random(0), 64, 2, 16)
    assert np.shape(w.w_down) == (64, 64)
    assert np.shape(w.wk_rope) == (8, 64)
    assert np.shape(w.wq) == (2, 16, 64)
    assert np.shape(w.wq_rope) == (2, 8, 64)
    assert np.shape(w.wk_up) == np.shape(w.wv_up) == (2, 16, 64)
    assert np.shape(w.wo) == (64, 32)


def test_random_weights_are_as_large_as_their_inputs_are_many():
    w = m.random_mla_weights(random.Random(0), 64, 2, 16)
    assert np.std(w.w_down) == pytest.approx(1 / 8, rel=0.05)
    assert np.std(w.wk_up) == pytest.approx(1 / 8, rel=0.08)
    wq, wk, wv, wo = m.random_weights(random.Random(0), 64, 32)
    assert np.std(wq) == pytest.approx(1 / 8, rel=0.05)
    assert np.shape(wq) == np.shape(wo) == (64, 64)
    assert np.shape(wk) == np.shape(wv) == (32, 64)


def test_the_size_of_a_rotated_key_is_even():
    w = m.random_mla_weights(random.Random(0), 5, 1, 5)
    assert len(w.wk_rope) == 4


def test_what_mla_leaves_by_hand():
    w = mla_weights(dim=8, n_heads=4, head_dim=2, v_dim=3, d_c=7, d_rope=2)
    assert m.compare_mla_caches(w, 2) == [
        ("MHA, 4 KV heads", 20),
        ("GQA, 2 KV heads", 10),
        ("MQA, 1 KV head", 5),
        ("MLA", 9),
    ]


def test_the_work_of_both_forms_by_hand():
    """One head, dim 3, head_dim 2, v_dim 2, d_c 5, d_rope 2; one query on four cached tokens."""
    w = mla_weights(dim=3, n_heads=1, head_dim=2, v_dim=2, d_c=5, d_rope=2)
    (row,) = m.compare_forms(w, [(1, 4)], random.Random(0))
    queries = 3 * 2 + 3 * 2
    out = 2 * 3
    decompress = 5 * 2 + 5 * 2
    assert row.plain == queries + 4 * decompress + 4 * (4 + 2) + out
    assert row.absorbed == queries + 2 * 5 + 4 * (7 + 5) + 5 * 2 + out
    assert row.ratio == row.plain / row.absorbed


@pytest.mark.parametrize("n_heads, head_dim", [(8, 1), (4, 2), (4, 8), (1, 32)])
def test_finding_the_absorbed_form_is_for_few_new_tokens(n_heads, head_dim):
    w = m.random_mla_weights(random.Random(0), n_heads * head_dim, n_heads, head_dim)
    decode, prefill = m.compare_forms(w, [(1, 64), (64, 64)], random.Random(0))
    assert decode.absorbed < decode.plain
    assert prefill.absorbed > prefill.plain


# 7. The bill


def model_named(name):
    """Return the model of the trace's table with this name."""
    return next(model for model in m.REAL_MODELS if model.name == name)


@pytest.mark.parametrize("name, size", [
    ("Llama 2 7B", 512 * 1024),
    ("Llama 3.1 8B", 128 * 1024),
    ("Mistral 7B v0.1", 128 * 1024),
    ("Llama 3.1 70B", 320 * 1024),
    ("GPT-3 175B", 4608 * 1024),
    ("Falcon 7B", 8 * 1024),
    ("DeepSeek-V3", 70272),
])
def test_cache_bytes_of_real_models(name, size):
    """The figures were worked out elsewhere; DeepSeek-V3's are published."""
    assert m.cache_bytes(model_named(name), 1) == size


def test_kv_bytes_per_token():
    assert m.kv_bytes_per_token(80, 8, 128) == 320 * 1024
    assert m.kv_bytes_per_token(80, 8, 128, bytes_per_value=1) == 160 * 1024


def kind_of(model):
    """Return a model's kind of attention, by its numbers."""
    if model.d_c:
        return "MLA"
    if model.n_kv_heads == model.n_heads:
        return "MHA"
    if model.n_kv_heads == 1:
        return "MQA"
    return "GQA"


@pytest.mark.parametrize("model", m.REAL_MODELS, ids=lambda model: model.name)
def test_kinds_fit_their_numbers(model):
    kind, _, mix = model.kind.partition(", ")
    assert kind == kind_of(model)
    assert bool(model.window) == bool(model.n_local_layers) == bool(mix)
    assert model.n_heads % model.n_kv_heads == 0
    assert model.source


def test_a_window_in_every_layer_stops_the_cache():
    mistral = model_named("Mistral 7B v0.1")
    assert m.cache_bytes(mistral, 4095) < m.cache_bytes(mistral, 4096)
    assert m.cache_bytes(mistral, 4096) == m.cache_bytes(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 4096) == m.decode_multiplications(mistral, 10 ** 6)
    assert m.decode_multiplications(mistral, 100) == 32 * 32 * 100 * 256


def test_a_window_in_every_second_layer_slows_the_cache():
    gpt_oss = model_named("gpt-oss-120b")
    of_one_layer = 2 * 8 * 64 * 2
    assert m.cache_bytes(gpt_oss, 1000) == (18 * 1000 + 18 * 128) * of_one_layer
    assert m.cache_bytes(gpt_oss, 1001) - m.cache_bytes(gpt_oss, 1000) == 18 * of_one_layer


def test_decode_multiplications_by_hand():
    llama = model_named("Llama 3.1 8B")
    assert m.decode_multiplications(llama, 10) == 32 * 32 * 10 * (128 + 128)
    deepseek = model_named("DeepSeek-V3")
    assert m.decode_multiplications(deepseek, 10) == 61 * 128 * 10 * (512 + 64 + 512)


def test_the_bill_brackets_what_a_model_was_not_made_for():
    rows = {row.model: row for row in m.bill(m.REAL_MODELS)}
    llama = rows["Llama 2 7B"]
    assert (llama.kib, llama.at_4k, llama.at_128k) == (512.0, "2.00 ", "(64.00)")


@pytest.mark.parametrize("model", m.REAL_MODELS, ids=lambda model: model.name)
def test_finding_flops_per_byte_are_the_query_heads_of_a_kv_head(model):
    """MLA's are those of one KV head of 576 numbers, of which 512 are a value as well."""
    (row,) = m.bill([model])
    if model.d_c:
        assert row.flops_per_byte == pytest.approx(128 * (576 + 512) / 576)
    else:
        assert row.flops_per_byte == model.n_heads / model.n_kv_heads


def test_the_sizes_of_section_6():
    """576 numbers of a latent and its key for 32,768 of MHA, 57 times; 170 queries at most."""
    model = model_named("DeepSeek-V3")
    latent = model.d_c + model.d_rope
    mha = 2 * model.n_heads * model.head_dim
    assert latent == 576
    assert mha == 32768
    assert round(mha / latent) == 57
    decompress = 2 * model.d_c * model.head_dim
    dearer = (latent + model.d_c) - (model.head_dim + model.d_rope + model.head_dim)
    assert decompress // dearer == 170


def test_a_bill_by_hand():
    """2 layers, 2 KV heads of 3 channels: 48 bytes a token; 4 query heads, 48 multiplications."""
    tiny = m.RealModel("tiny", "GQA", 2, 4, 2, 3, 2 ** 20, "here")
    gib = f"{48 * 131072 / 2 ** 30:.2f} "
    assert m.bill([tiny]) == [("tiny", "GQA", 48 / 1024, "0.00 ", gib, 2 * 48 / 48)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_tokens", [1, 3, 8])
def test_the_formulas_of_the_bill_count_right(seed, n_tokens):
    model = m.RealModel("tiny", "GQA", 3, 4, 2, 5, 99, "here", window=3, n_local_layers=2)
    multiplications, stored = m.count_step(model, n_tokens, random.Random(seed))
    assert multiplications == m.decode_multiplications(model, n_tokens)
    assert 2 * stored == m.cache_bytes(model, n_tokens)


# 8. Model parallelism


@pytest.mark.parametrize("n_heads, n_kv_heads", [
    (4, 2), (4, 1), (4, 4), (6, 3), (12, 4), (8, 2), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"window": 2, "sinks": 1}], ids=str)
def test_the_sum_over_ranks_is_the_whole(n_heads, n_kv_heads, options):
    x = numbers(9, 5, 6)
    weights = gqa_weights(n_heads, n_kv_heads, 2, 2, 6)
    whole = reference_gqa(x, weights, n_heads, n_kv_heads, **options)
    arguments = as_lists([x, *weights])
    for n_ranks in m.possible_ranks(n_heads, n_kv_heads):
        parts = m.tensor_parallel_attention(*arguments, n_heads, n_kv_heads, n_ranks, **options)
        assert len(parts) == n_ranks
        assert_close(m.add_matrices(parts), whole)


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (4, 1), (4, 4), (6, 3), (12, 4), (8, 2)])
def test_ranks_hold_each_query_head_once_and_the_kv_heads_it_needs(n_heads, n_kv_heads):
    for n_ranks in m.possible_ranks(n_heads, n_kv_heads):
        all_query_heads = []
        for query_heads, kv_heads in m.heads_of_ranks(n_heads, n_kv_heads, n_ranks):
            all_query_heads += query_heads
            assert set(kv_heads) == {h * n_kv_heads // n_heads for h in query_heads}
        assert all_query_heads == list(range(n_heads))


@pytest.mark.parametrize("heads, ranks", [
    ((4, 2), [1, 2, 4]),
    ((12, 4), [1, 2, 4, 12]),
    ((12, 6), [1, 2, 3, 6, 12]),
    ((8, 1), [1, 2, 4, 8]),
    ((1, 1), [1]),
    ((6, 3), [1, 3, 6]),
])
def test_possible_ranks(heads, ranks):
    assert m.possible_ranks(*heads) == ranks


def test_shards_are_cut_right():
    """Four ranks share four query heads and two KV heads: each KV head stands on two ranks."""
    wq, wk, wv, wo = gqa_weights(4, 2, 3, 3, 5)
    shards = m.shard_weights(*as_lists([wq, wk, wv, wo]), 4, 2, 4)
    assert len(shards) == 4
    for rank, (q, k, v, o) in enumerate(shards):
        own = slice(3 * rank, 3 * rank + 3)
        shared = slice(rank // 2 * 3, rank // 2 * 3 + 3)
        np.testing.assert_array_equal(q, wq[own])
        np.testing.assert_array_equal(k, wk[shared])
        np.testing.assert_array_equal(v, wv[shared])
        np.testing.assert_array_equal(o, wo[:, own])


def test_what_ranks_hold_by_hand():
    weights = as_lists(gqa_weights(4, 2, 3, 3, 5))
    assert m.compare_ranks(weights, 4, 2) == [
        # ranks, query heads, KV heads, cache, copies
        (1, 4, 2, 12, 1.0),
        (2, 2, 1, 6, 1.0),
        (4, 1, 1, 6, 2.0),
    ]


def double_and_add(x, number):
    """Return 2·x + number, element by element: a stage whose place in the order matters."""
    return [[2 * value + number for value in row] for row in x]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("n_micro_batches", [1, 2, 4, 7])
def test_a_pipeline_is_one_machine_with_a_bubble(n_stages, n_micro_batches):
    stages = [partial(double_and_add, number=s) for s in range(n_stages)]
    batch = [numbers(i, 2, 3).tolist() for i in range(n_micro_batches)]
    outputs, schedule = m.run_pipeline(stages, batch)
    expected = []
    for x in batch:
        for s in range(n_stages):
            x = double_and_add(x, s)
        expected.append(x)
    assert outputs == expected
    assert m.run_one_by_one(stages, batch) == expected
    assert len(schedule) == n_stages + n_micro_batches - 1
    for tick, cells in enumerate(schedule):
        for s, cell in enumerate(cells):
            number = tick - s
            working = 0 <= number < n_micro_batches
            assert cell == (number if working else None)


def test_every_stage_works_once_on_every_micro_batch():
    calls = []

    def stage(x):
        calls.append(x)
        return x

    m.run_pipeline([stage] * 3, [[[0.0]]] * 5)
    assert len(calls) == 3 * 5


def test_the_bubble_by_hand():
    one, four = m.compare_micro_batches(3, (1, 4))
    assert one == (1, 3, pytest.approx(2 / 3), 2 / 3)
    assert four == (4, 6, pytest.approx(1 / 3), 2 / 6)


# The heads by hand


def weights_of_job(job):
    """Return the weights of a head with this job on the sentence, as an array."""
    x = m.embed(TOKENS, 0)
    wq, wk, _, _ = m.build_heads([job])
    (weights,) = m.look_with_each_head(x, wq, wk, 1)
    return np.array(weights)


def test_a_head_looks_for_the_same_word():
    weights = weights_of_job("same word")
    for i, token in enumerate(TOKENS):
        places = [j for j in range(i + 1) if TOKENS[j] == token]
        assert weights[i, places].sum() > 0.95


def test_a_head_looks_one_back():
    weights = weights_of_job("one back")
    for i in range(1, len(TOKENS)):
        assert weights[i, i - 1] > 0.9


def test_a_head_looks_everywhere():
    weights = weights_of_job("everywhere")
    for i in range(len(TOKENS)):
        np.testing.assert_allclose(weights[i, :i + 1], 1 / (i + 1), **TIGHT)


def test_a_head_looks_at_the_first_token():
    weights = weights_of_job("first token")
    assert (weights[:, 0] > 0.999).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_long_text_has_no_place_that_looks_like_the_one_before(seed):
    x = m.embed([str(i) for i in range(128)], seed)
    wq, wk, _, _ = m.build_heads(["one back"])
    (weights,) = m.look_with_each_head(x, wq, wk, 1)
    for i in range(1, 128):
        assert weights[i][i - 1] == max(weights[i]) > 0.8


def test_a_key_that_a_head_looks_for_scores_sharpness():
    x = m.embed(TOKENS, 0)
    wq, wk, _, _ = m.build_heads(["same word"])
    q = np.array(m.linear(x, wq))
    k = np.array(m.linear(x, wk))
    own_word = (q * k).sum(axis=1) / math.sqrt(m.CODE)
    assert own_word == pytest.approx([m.SHARPNESS] * 12)


def test_each_head_is_looked_with():
    """The weights of several heads at once are those of the heads one by one."""
    x = m.embed(TOKENS, 0)
    wq, wk, _, _ = m.build_heads(list(m.JOBS))
    weights = m.look_with_each_head(x, wq, wk, 4)
    for job, of_head in zip(m.JOBS, weights, strict=True):
        np.testing.assert_allclose(of_head, weights_of_job(job), **TIGHT)


def test_a_head_hands_over_the_block_that_its_key_reads():
    _, _, wv, wo = m.build_heads(list(m.JOBS))
    assert wo == np.eye(64).tolist()
    same_word, one_back = wv[:16], wv[16:32]
    assert same_word == np.eye(16, 64).tolist()
    assert one_back == np.eye(16, 64, 16).tolist()


def test_more_heads_than_blocks_are_added_in_turn():
    _, _, _, wo = m.build_heads(["same word"] * 8)
    assert wo == np.hstack([np.eye(64), np.eye(64)]).tolist()


def test_an_embedding_has_four_blocks():
    x = m.embed(TOKENS, 0)
    words, here, before, first = np.split(np.array(x), 4, axis=1)
    assert set(words.ravel()) == {1.0, -1.0}
    assert (words[2] == words[6]).all()
    assert (words[2] != words[3]).any()
    assert here[5].tolist() == m.clocks(5)
    assert before[5].tolist() == m.clocks(4)
    assert (first[0] == 1.0).all()
    assert (first[1:] == -1.0).all()


def test_clocks_by_hand():
    """At position 1 the first clock has made half a turn, the second a quarter."""
    hands = m.clocks(1)
    root = math.sqrt(2)
    assert hands[:4] == pytest.approx([-root, 0, 0, root], abs=1e-12)
    assert len(hands) == 16
    assert np.square(hands).mean() == pytest.approx(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_words_have_the_same_code(seed):
    x = m.embed([str(i) for i in range(128)], seed)
    codes = {tuple(row[:16]) for row in x}
    assert len(codes) == 128


def test_counted_dots_counts_and_puts_dot_back():
    before = m.dot
    with m.counted_dots() as count:
        m.linear([[1.0, 2.0, 3.0]] * 2, [[1.0, 0.0, 0.0]] * 4)
    assert count.products == 2 * 4 * 3
    assert m.dot is before


# Pictures


def test_a_weight_is_shaded_by_its_size():
    shades = [m.shade(weight) for weight in (0.0, 0.01, 0.05, 0.2, 0.4, 0.7)]
    assert "".join(shades) == m.SHADES


def test_a_map_shows_no_more_than_fits():
    weights = [[0.0] * 20] * 20
    rows = m.heat_map(weights)
    assert rows == [" " * m.MAP_TOKENS] * m.MAP_TOKENS
