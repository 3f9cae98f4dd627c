"""microflash against dense numpy references written from the definitions; they share no code."""

import math
import os
import random

import numpy as np
import pytest

import microflash as m

INF = math.inf
TIGHT = {"rtol": 0, "atol": 1e-12}


def numbers(seed, *shape, size=1.0):
    """Return normal random numbers of this shape and standard deviation."""
    return np.random.default_rng(seed).normal(size=shape) * size


def inputs(n_q, n_k, d, d_v, seed=0, size=1.0):
    """Return random q, k and v as arrays; size is that of q."""
    q = numbers(seed, n_q, d, size=size)
    k = numbers(seed + 1, n_k, d)
    v = numbers(seed + 2, n_k, d_v)
    return q, k, v


def lists(*arrays):
    """Return each array as a list."""
    return [array.tolist() for array in arrays]


def blocks(block_q, block_k):
    """Return the options for blocks of these sizes."""
    return {"block_q": block_q, "block_k": block_k}


def attend_with(attend, arrays, **options):
    """Return (out, lse) of a version of attention, given q, k and v as arrays."""
    return attend(*lists(*arrays), **options)


# The naive references


def sees(i, j, n_q, n_k, causal, window):
    """Return whether query i sees key j, from the words of the docstring."""
    position = n_k - n_q + i
    if causal and j > position:
        return False
    return window is None or j > position - window


def mask(n_q, n_k, causal=False, window=None):
    """Return who sees whom, [n_q][n_k]."""
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        for j in range(n_k):
            seen[i, j] = sees(i, j, n_q, n_k, causal, window)
    return seen


def dense(q, k, v, causal=False, window=None, scale=None, keys=None, sink=-INF):
    """Return (out, lse, weights) of dense attention. keys: the only ones that exist."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[1])
    scores = q @ k.T * scale
    seen = mask(len(q), len(k), causal, window)
    if keys is not None:
        seen &= np.isin(np.arange(len(k)), list(keys))
    weights = np.zeros_like(scores)
    lse = np.full(len(q), -INF)
    for i in range(len(q)):
        row = np.append(scores[i, seen[i]], sink)
        largest = row.max()
        if largest > -INF:
            exps = np.exp(row - largest)
            weights[i, seen[i]] = exps[:-1] / exps.sum()
            lse[i] = largest + math.log(exps.sum())
    return weights @ v, lse, weights


def dense_backward(q, k, v, d_out, causal=False, scale=None):
    """Return dq, dk, dv through the full Jacobian of every row's softmax, diag(p) - p pᵀ."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[1])
    _, _, weights = dense(q, k, v, causal, None, scale)
    d_scores = np.zeros_like(weights)
    for i, p in enumerate(weights):
        jacobian = np.diag(p) - np.outer(p, p)
        d_weights = v @ d_out[i]
        d_scores[i] = jacobian @ d_weights
    dq = scale * d_scores @ k
    dk = scale * d_scores.T @ q
    dv = weights.T @ d_out
    return dq, dk, dv


def agrees(got, expected, size=1.0):
    """Assert that two results (out, lse) are the same but for rounding; size is that of out."""
    out, lse = got
    np.testing.assert_allclose(out, expected[0], rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(lse, expected[1], rtol=1e-13, atol=1e-12 * size)


SHAPES = [  # n_q, n_k, d, d_v
    (1, 1, 1, 1),
    (1, 7, 4, 3),
    (7, 7, 4, 4),
    (5, 13, 3, 5),
    (13, 5, 2, 7),
    (16, 16, 8, 1),
    (11, 11, 1, 2),
]
BLOCKS = [
    blocks(1, 1),
    blocks(1, 5),
    blocks(3, 1),
    blocks(2, 3),
    blocks(4, 4),
    blocks(5, 100),
    blocks(100, 3),
]


def decode_3(*arguments, **options):
    """Attend with the keys in 3 splits."""
    return m.flash_decode(*arguments, n_splits=3, **options)


def decode_29(*arguments, **options):
    """Attend with more splits than keys: some are empty."""
    return m.flash_decode(*arguments, n_splits=29, **options)


VERSIONS = [m.flash_attention_v1, m.flash_attention, decode_3, decode_29]
each_version = pytest.mark.parametrize("attend", VERSIONS, ids=lambda f: f.__name__)


# The forward pass


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [
    {},
    {"causal": True},
    {"scale": -2.0, "causal": True},
    {"scale": 0.0},
], ids=str)
def test_every_version_is_dense_attention_for_every_block(shape, options):
    arrays = inputs(*shape)
    expected = dense(*arrays, **options)[:2]
    agrees(attend_with(m.standard_attention, arrays, **options), expected)
    for sizes in BLOCKS:
        for attend in (m.flash_attention_v1, m.flash_attention, decode_3):
            agrees(attend_with(attend, arrays, **sizes, **options), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [
    {"window": 3, "causal": True},
    {"window": 99, "causal": True},
    {"window": 2},
    {"sink": 0.5},
    {"sink": 3.0, "causal": True},
    {"sink": -1.0, "window": 2, "causal": True},
], ids=str)
def test_windows_and_sinks_are_dense_attention(shape, options):
    arrays = inputs(*shape)
    expected = dense(*arrays, **options)
    for sizes in BLOCKS:
        agrees(attend_with(m.flash_attention, arrays, **sizes, **options), expected)


def test_a_window_in_splits_too():
    arrays = inputs(5, 13, 3, 2)
    options = {"causal": True, "window": 4}
    got = attend_with(m.flash_decode, arrays, n_splits=4, block_k=2, **options)
    agrees(got, dense(*arrays, **options))


@each_version
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [blocks(2, 1), blocks(4, 4)], ids=str)
def test_huge_scores(attend, sign, causal, sizes):
    q, k, v = inputs(9, 9, 4, 3, size=1e4)
    arrays = (q, sign * k, v)
    got = attend_with(attend, arrays, causal=causal, **sizes)
    assert np.isfinite(got[0]).all()
    # Scores of 1e4 are rounded at 1e-12 already.
    agrees(got, dense(*arrays, causal), size=10)


@each_version
@pytest.mark.parametrize("row", [
    [0.0] * 9,
    [5.0] * 9,
    [-3.0, 7.0, 7.0, -3.0, 7.0, 7.0, 7.0, -1e4, 1e4],
    list(range(9)),
    list(range(9, 0, -1)),
    [-1e4] * 8 + [1e4],
    [1e4] + [-1e4] * 8,
    [-800.0] * 8 + [-1e4],
], ids=str)
def test_ties_late_maxima_and_falling_rows(attend, row):
    """One query whose score for key j is row[j], with d = 1 and the scale 1."""
    q = np.ones((1, 1))
    k = np.array(row)[:, None]
    v = numbers(0, 9, 2)
    for block_k in (1, 2, 4, 9):
        got = attend_with(attend, (q, k, v), scale=1.0, **blocks(1, block_k))
        agrees(got, dense(q, k, v, scale=1.0))


@each_version
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_queries_that_see_nothing_get_zeros_and_minus_infinity(attend, sizes):
    out, lse = attend_with(attend, inputs(7, 4, 2, 3), causal=True, **sizes)
    assert out[:3] == [[0.0] * 3] * 3
    assert lse[:3] == [-INF] * 3
    assert all(any(row) for row in out[3:])
    assert np.isfinite(lse[3:]).all()


def test_standard_attention_too_where_nothing_is_seen():
    out, lse = attend_with(m.standard_attention, inputs(7, 4, 2, 3), causal=True)
    assert out[:3] == [[0.0] * 3] * 3
    assert lse[:3] == [-INF] * 3


@each_version
def test_no_queries(attend):
    assert attend([], [[1.0]], [[1.0, 2.0]], **blocks(2, 2)) == ([], [])


@pytest.mark.parametrize("first, end", [(0, 11), (3, 8), (10, 11), (4, 4), (0, 1)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 4}], ids=str)
def test_a_run_of_the_keys_keeps_its_positions(first, end, options):
    arrays = inputs(8, 11, 3, 2)
    keys = range(first, end)
    got = attend_with(m.flash_attention, arrays, keys=keys, **blocks(3, 2), **options)
    agrees(got, dense(*arrays, keys=keys, **options))


SOFTMAX_ROWS = [
    numbers(0, 23).tolist(),
    numbers(1, 23, size=30).tolist(),
    numbers(2, 23, size=1e4).tolist(),
    [0.0] * 5,
    [-INF, -INF, 2.0, 1.0],
    [-INF] * 3,
    [],
    [1e4],
    [3.0, -INF, 3.0],
    [float(j) for j in range(12)],
]


@pytest.mark.parametrize("row", SOFTMAX_ROWS, ids=range(len(SOFTMAX_ROWS)))
def test_online_and_safe_softmax(row):
    """The online one and the shared one, which takes the maximum off first."""
    largest = max(row, default=-INF)
    if largest == -INF:
        expected = [0.0] * len(row)
    else:
        exps = np.exp(np.array(row) - largest)
        expected = exps / exps.sum()
    np.testing.assert_allclose(m.softmax(row), expected, **TIGHT)
    for tile in (1, 2, 7, 100):
        np.testing.assert_allclose(m.online_softmax(row, tile=tile), expected, **TIGHT)


def test_online_softmax_reads_twice_and_holds_a_tile():
    traffic = m.Traffic(sram=4)
    m.online_softmax(SOFTMAX_ROWS[0], tile=4, traffic=traffic)
    assert traffic.reads == 2 * 23
    assert traffic.writes == 23
    assert traffic.peak == 4
    with pytest.raises(ValueError, match="tile"):
        m.online_softmax([1.0], tile=0)


def test_log_sum_exp():
    assert m.log_sum_exp([]) == -INF
    assert m.log_sum_exp([-INF, -INF]) == -INF
    assert m.log_sum_exp([-1e4, -INF]) == -1e4
    assert m.log_sum_exp([math.log(2), math.log(3)]) == pytest.approx(math.log(5), abs=1e-15)
    assert m.log_sum_exp([1e4, 1e4]) == pytest.approx(1e4 + math.log(2), abs=1e-11)


@pytest.mark.parametrize("cut", range(1, 9))
def test_one_step_of_the_recurrence(cut):
    """A state that has seen some keys and takes in others equals one that saw them all at once."""
    scores = numbers(0, 9, size=3.0)
    v = numbers(1, 9, 2)
    state = m.empty_state(2)
    for start, end in ((0, cut), (cut, 9)):
        state = m.absorb(state, scores[start:end].tolist(), v[start:end].T.tolist())
        largest = scores[:end].max()
        exps = np.exp(scores[:end] - largest)
        assert state.m == largest
        np.testing.assert_allclose(state.l, exps.sum(), **TIGHT)
        np.testing.assert_allclose(state.o, exps @ v[:end], **TIGHT)


def test_the_tiny_example_of_section_2():
    """Powers of 2: the scores 1, 3 and then 2, 5."""
    log2 = math.log(2)
    state = m.absorb(m.empty_state(0), [1 * log2, 3 * log2], [])
    assert state.l == pytest.approx(5 / 4, abs=1e-15)
    state = m.absorb(state, [2 * log2, 5 * log2], [])
    assert state.l == pytest.approx(23 / 16, abs=1e-15)


# The backward pass


def assert_gradients(got, expected, atol=1e-12):
    """Assert that dq, dk and dv are those expected, to atol."""
    for gradient, expected_gradient in zip(got, expected, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.7}], ids=str)
def test_flash_attention_backward_is_the_dense_backward(shape, options):
    arrays = inputs(*shape)
    n_q, _, _, d_v = shape
    d_out = numbers(9, n_q, d_v)
    expected = dense_backward(*arrays, d_out, **options)
    out, lse, weights = dense(*arrays, **options)

    arguments = lists(*arrays, weights, d_out)
    got = m.standard_attention_backward(*arguments, scale=options.get("scale"))
    assert_gradients(got, expected)

    arguments = lists(*arrays, out, lse, d_out)
    for sizes in BLOCKS:
        got = m.flash_attention_backward(*arguments, **options, **sizes)
        assert_gradients(got, expected)


def loss_of(arrays, d_out, **options):
    """Return Σ d_out · out of flash_attention: d_out is what its slope in out is."""
    out, _ = attend_with(m.flash_attention, arrays, **options)
    return (np.array(out) * d_out).sum()


def gradients_of(arrays, d_out, sizes, causal=False, **options):
    """Return dq, dk and dv of loss_of() by the flash backward pass, as arrays."""
    out, lse = attend_with(m.flash_attention, arrays, causal=causal, **sizes, **options)
    arguments = [*lists(*arrays), out, lse, d_out.tolist()]
    gradients = m.flash_attention_backward(*arguments, causal=causal, **sizes)
    return [np.array(gradient) for gradient in gradients]


STEP = 1e-5  # of a central difference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_backward_is_the_slope_of_the_forward(causal, which):
    """Central differences through flash_attention itself, entry by entry."""
    arrays = inputs(4, 6, 3, 2)
    d_out = numbers(9, 4, 2)
    sizes = blocks(3, 2)
    gradient = gradients_of(arrays, d_out, sizes, causal)[which]

    def loss(index, step):
        moved = [array.copy() for array in arrays]
        moved[which][index] += step
        return loss_of(moved, d_out, causal=causal, **sizes)

    for index in np.ndindex(gradient.shape):
        slope = (loss(index, STEP) - loss(index, -STEP)) / (2 * STEP)
        assert slope == pytest.approx(gradient[index], abs=1e-8)


def test_backward_with_a_sink_needs_nothing_but_its_lse():
    """The slope of the forward pass with a sink, in a random direction."""
    arrays = inputs(4, 6, 3, 2)
    directions = inputs(4, 6, 3, 2, seed=20)
    d_out = numbers(9, 4, 2)
    sizes = blocks(3, 2)

    def loss(step):
        moved = [array + step * direction for array, direction in zip(arrays, directions)]
        return loss_of(moved, d_out, sink=0.5, **sizes)

    expected = 0.0
    for gradient, direction in zip(gradients_of(arrays, d_out, sizes, sink=0.5), directions):
        expected += (gradient * direction).sum()
    slope = (loss(STEP) - loss(-STEP)) / (2 * STEP)
    assert slope == pytest.approx(expected, abs=1e-8)


def test_the_gradient_of_a_sink():
    """It is -Σ_i exp(sink - L_i) · D_i, as section 8 says."""
    arrays = inputs(4, 6, 3, 2)
    d_out = numbers(9, 4, 2)
    sizes = blocks(3, 2)
    out, lse = attend_with(m.flash_attention, arrays, sink=0.5, **sizes)
    averages = (np.array(out) * d_out).sum(axis=1)
    expected = -(np.exp(0.5 - np.array(lse)) * averages).sum()
    above = loss_of(arrays, d_out, sink=0.5 + STEP, **sizes)
    below = loss_of(arrays, d_out, sink=0.5 - STEP, **sizes)
    slope = (above - below) / (2 * STEP)
    assert slope == pytest.approx(expected, abs=1e-8)


def test_backward_with_huge_scores_is_finite():
    arrays = inputs(6, 6, 2, 2, size=1e4)
    d_out = numbers(9, 6, 2)
    out, lse = attend_with(m.flash_attention, arrays, **blocks(2, 2))
    arguments = [*lists(*arrays), out, lse, d_out.tolist()]
    gradients = m.flash_attention_backward(*arguments, **blocks(2, 3))
    for gradient in gradients:
        assert np.isfinite(gradient).all()
    # exp(s - L) of s near 1e4, which is rounded at 1e-12, times q
    assert_gradients(gradients, dense_backward(*arrays, d_out), atol=1e-7)


# The traffic


def runs_of(n, block):
    """Return range(n) in runs of `block`, the last one shorter if it must be."""
    return [range(first, min(first + block, n)) for first in range(0, n, block)]


class Count:
    """Reads, writes, peak and walk, counted from the words of the algorithms over a dense mask."""

    def __init__(self, shape, block_q, block_k, causal=False, window=None):
        self.n_q, self.n_k, self.d, self.d_v = shape
        self.rows = runs_of(self.n_q, block_q)
        self.keys = runs_of(self.n_k, block_k)
        self.seen = mask(self.n_q, self.n_k, causal, window)
        self.reads = 0
        self.writes = 0
        self.peak = 0
        self.walk = []

    def visit(self, rows, keys):
        """Note the tile, unless no query sees any of its keys."""
        if not self.seen[rows.start:rows.stop, keys.start:keys.stop].any():
            return False
        self.walk.append((rows, keys))
        return True

    def held(self, count):
        """Note that SRAM holds so many numbers."""
        self.peak = max(self.peak, count)

    def forward_tile(self, rows, keys):
        """Return what a tile takes: q, o, m and l; k and v; the scores."""
        of_queries = len(rows) * (self.d + self.d_v + 2)
        of_keys = len(keys) * (self.d + self.d_v)
        scores = len(rows) * len(keys)
        return of_queries + of_keys + scores

    def version_1(self):
        """Count FlashAttention-1."""
        self.writes += self.n_q * (self.d_v + 2)  # o, m and l begin in HBM
        for keys in self.keys:
            self.reads += len(keys) * (self.d + self.d_v)
            self.held(len(keys) * (self.d + self.d_v))
            for rows in self.rows:
                if self.visit(rows, keys):
                    self.reads += len(rows) * (self.d + self.d_v + 2)
                    self.writes += len(rows) * (self.d_v + 2)
                    self.held(self.forward_tile(rows, keys))
        return self

    def version_2(self):
        """Count FlashAttention-2."""
        for rows in self.rows:
            self.reads += len(rows) * self.d
            self.writes += len(rows) * (self.d_v + 1)
            self.held(len(rows) * (self.d + self.d_v + 2))
            for keys in self.keys:
                if self.visit(rows, keys):
                    self.reads += len(keys) * (self.d + self.d_v)
                    self.held(self.forward_tile(rows, keys))
        return self

    def backward(self):
        """Count the backward pass."""
        self.writes += self.n_q * self.d  # dq begins in HBM, as zeros
        for rows in self.rows:  # D = rowsum(dO ∘ O)
            self.reads += len(rows) * 2 * self.d_v
            self.writes += len(rows)
            self.held(len(rows) * 2 * self.d_v)
        for keys in self.keys:
            own = len(keys) * (self.d + self.d_v)
            self.reads += own
            self.writes += own
            self.held(2 * own)
            for rows in self.rows:
                if self.visit(rows, keys):
                    queries = len(rows) * (2 * self.d + self.d_v + 2)  # q, dq, dO, L, D
                    scores = len(rows) * len(keys)
                    self.reads += queries
                    self.writes += len(rows) * self.d
                    self.held(2 * own + queries + 2 * scores)
        return self

    def check(self, run):
        """Assert that run(traffic=…) makes these counts with just enough SRAM, and not with less.
        """
        traffic = m.Traffic(sram=self.peak)
        run(traffic=traffic)
        assert traffic.reads == self.reads
        assert traffic.writes == self.writes
        assert traffic.accesses == self.reads + self.writes
        assert traffic.peak == self.peak
        assert traffic.held == 0
        assert traffic.walk == self.walk
        with pytest.raises(ValueError, match="SRAM holds"):
            run(traffic=m.Traffic(sram=self.peak - 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_traffic_is_what_an_independent_count_says(shape, causal, sizes):
    arrays = inputs(*shape)
    options = {"causal": causal, **sizes}

    def version_1(traffic):
        attend_with(m.flash_attention_v1, arrays, traffic=traffic, **options)

    def version_2(traffic):
        attend_with(m.flash_attention, arrays, traffic=traffic, **options)

    out, lse, _ = dense(*arrays, causal)
    d_out = numbers(9, *out.shape)

    def backward(traffic):
        arguments = lists(*arrays, out, lse, d_out)
        m.flash_attention_backward(*arguments, traffic=traffic, **options)

    Count(shape, **options).version_1().check(version_1)
    Count(shape, **options).version_2().check(version_2)
    Count(shape, **options).backward().check(backward)


@pytest.mark.parametrize("sizes", BLOCKS, ids=str)
def test_traffic_with_a_window(sizes):
    shape = (11, 13, 3, 2)
    options = {"causal": True, "window": 3, **sizes}

    def run(traffic):
        attend_with(m.flash_attention, inputs(*shape), traffic=traffic, **options)

    Count(shape, **options).version_2().check(run)


@pytest.mark.parametrize("n_q, n_k, d, d_v", [*SHAPES, (13, 1, 1, 9)])
def test_standard_traffic(n_q, n_k, d, d_v):
    """S and P, [n_q][n_k] each, are written and read."""
    traffic = m.Traffic()
    attend_with(m.standard_attention, inputs(n_q, n_k, d, d_v), causal=True, traffic=traffic)
    scores = n_q * n_k
    assert traffic.reads == n_q * d + n_k * d + scores + scores + n_k * d_v
    assert traffic.writes == scores + scores + n_q + n_q * d_v
    assert traffic.multiply_adds == scores * (d + d_v)


@pytest.mark.parametrize("n_q, n_k, d, d_v", [*SHAPES, (13, 1, 1, 9)])
def test_standard_backward_traffic(n_q, n_k, d, d_v):
    traffic = m.Traffic()
    arrays = inputs(n_q, n_k, d, d_v)
    _, _, weights = dense(*arrays)
    arguments = lists(*arrays, weights, numbers(9, n_q, d_v))
    m.standard_attention_backward(*arguments, traffic=traffic)
    scores = n_q * n_k
    assert traffic.reads == 5 * scores + 2 * n_q * d_v + n_k * d_v + n_k * d + n_q * d
    assert traffic.writes == 2 * scores + n_k * d_v + n_q * d + n_k * d
    assert traffic.multiply_adds == scores * (2 * d + 2 * d_v)


def test_the_flash_backward_pass_multiplies_five_matrices():
    arrays = inputs(6, 8, 3, 2)
    out, lse, _ = dense(*arrays)
    traffic = m.Traffic()
    arguments = lists(*arrays, out, lse, numbers(9, 6, 2))
    m.flash_attention_backward(*arguments, traffic=traffic, **blocks(4, 3))
    assert traffic.multiply_adds == 6 * 8 * (3 * 3 + 2 * 2)


@pytest.mark.parametrize("shape", [*SHAPES, (13, 1, 1, 9)], ids=str)
def test_what_tiles_take_of_sram(shape):
    """The formulas, for blocks that are no longer than the whole."""
    n_q, n_k, d, d_v = shape
    for sizes in BLOCKS:
        block_q = min(sizes["block_q"], n_q)
        block_k = min(sizes["block_k"], n_k)
        forward = Count(shape, block_q, block_k).version_2()
        parts = m.sram_parts(block_q, block_k, d, d_v)
        assert sum(parts.values()) == forward.peak
        backward = Count(shape, block_q, block_k).backward()
        assert m.sram_needed_backward(block_q, block_k, d, d_v) == backward.peak


def test_backward_blocks_by_hand():
    assert m.backward_blocks(16, 16, 16, 16, 2048) == (8, 16)
    assert m.backward_blocks(16, 16, 16, 16, 10**9) == (16, 16)


@pytest.mark.parametrize("wanted, expected", [((4, 16), (1, 8)), ((64, 64), (1, 1))])
def test_the_smallest_sram_gets_the_smallest_backward_blocks(wanted, expected):
    sram = m.sram_needed_backward(*expected, 2, 3)
    assert m.backward_blocks(*wanted, 2, 3, sram) == expected


def test_backward_blocks_fit_and_keep_the_keys_long():
    for sram in range(30, 3000, 37):
        block_q, block_k = m.backward_blocks(13, 9, 2, 3, sram)
        assert m.sram_needed_backward(block_q, block_k, 2, 3) <= sram
        assert block_k == 9 or block_q == 1


def test_a_load_counts_and_copies():
    matrix = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    gpu = m.Traffic(sram=6)
    with gpu.frame():
        tile = gpu.load(matrix, range(1, 3))
        assert tile == [[3.0, 4.0], [5.0, 6.0]]
        assert gpu.reads == gpu.held == gpu.peak == 4
        tile[0][0] = 9.0
        assert matrix[1][0] == 3.0
        assert gpu.load([7.0, 8.0, 9.0], range(0, 2)) == [7.0, 8.0]
        assert gpu.held == 6
        with pytest.raises(ValueError, match="6 numbers and would have to hold 7"):
            gpu.hold(1)
    assert gpu.held == 0
    assert gpu.reads == gpu.accesses == 6


def test_a_store_counts_and_writes():
    matrix = [[1.0, 2.0], [3.0, 4.0]]
    gpu = m.Traffic(sram=6)
    gpu.store(matrix, range(0, 1), [[0.0, 0.0]])
    assert matrix == [[0.0, 0.0], [3.0, 4.0]]
    assert gpu.writes == gpu.accesses == 2


def test_a_new_gpu_has_counted_nothing():
    assert m.Traffic() == m.Traffic(None, 0, 0, 0, 0, 0, [])


def test_a_kernel_reads_its_inputs_and_writes_what_it_makes():
    gpu = m.Traffic()
    assert gpu.kernel(gpu.multiply, [[1.0, 2.0]], [[3.0], [4.0]]) == [[11.0]]
    assert gpu.reads == 4
    assert gpu.writes == 1
    assert gpu.multiply_adds == 2
    assert gpu.held == 0


# Splits and merging


def merge_as_a_tree(parts, rng):
    """Return all parts merged, two or three at a time, in a random order."""
    tree = list(parts)
    while len(tree) > 1:
        count = min(len(tree), rng.randint(2, 3))
        taken = [tree.pop(rng.randrange(len(tree))) for _ in range(count)]
        tree.append(m.merge_partials(taken))
    return tree[0]


@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 13])
def test_partials_merge_in_any_order_and_tree(n_parts):
    """Each part has any of the keys, not a run of them."""
    rng = random.Random(n_parts)
    arrays = inputs(4, 13, 3, 2, size=20.0)
    owners = [rng.randrange(n_parts) for _ in range(13)]
    parts = []
    for part in range(n_parts):
        keys = [j for j in range(13) if owners[j] == part]
        out, lse, _ = dense(*arrays, keys=keys)
        parts.append((out.tolist(), lse.tolist()))
    expected = dense(*arrays)
    for _ in range(10):
        rng.shuffle(parts)
        agrees(m.merge_partials(parts), expected)
        agrees(merge_as_a_tree(parts, rng), expected)


def test_cascade_attention():
    """All queries to a shared prefix, then to the rest, merged: as to everything."""
    arrays = inputs(6, 12, 3, 2)
    prefix = attend_with(m.flash_attention, arrays, keys=range(0, 8), **blocks(4, 3))
    rest = attend_with(m.flash_attention, arrays, keys=range(8, 12), **blocks(4, 3))
    agrees(m.merge_partials([prefix, rest]), dense(*arrays))


def test_merging_what_saw_nothing():
    nothing = ([[0.0, 0.0]], [-INF])
    something = ([[1.0, 2.0]], [-900.0])
    assert m.merge_partials([nothing, nothing]) == nothing
    assert m.merge_partials([nothing, something, nothing]) == something


def test_merging_section_7s_example():
    first = ([[10.0]], [math.log(3)])
    second = ([[2.0]], [0.0])
    agrees(m.merge_partials([first, second]), ([[8.0]], [math.log(4)]))


def test_merging_huge_scores_by_hand():
    parts = [([[4.0]], [1e4]), ([[2.0]], [1e4]), ([[99.0]], [-1e4])]
    agrees(m.merge_partials(parts), ([[3.0]], [1e4 + math.log(2)]))


def test_sums_depend_on_their_order():
    """As section 7 says."""
    assert (0.1 + 0.2) + 0.3 == 0.6000000000000001
    assert 0.1 + (0.2 + 0.3) == 0.6


@pytest.mark.parametrize("n, n_splits", [(10, 1), (10, 3), (10, 10), (3, 7), (0, 2)])
def test_splits_are_even_and_cover(n, n_splits):
    runs = m.split_evenly(n, n_splits)
    assert len(runs) == n_splits
    assert [j for run in runs for j in run] == list(range(n))
    lengths = [len(run) for run in runs]
    assert max(lengths) - min(lengths) <= 1


def test_decode_counts_its_partials():
    n_k, d, d_v, n_splits = 12, 3, 2, 4
    traffic = m.Traffic()
    arrays = inputs(1, n_k, d, d_v)
    attend_with(m.flash_decode, arrays, n_splits=n_splits, traffic=traffic, **blocks(1, 2))
    assert traffic.reads == n_splits * d + n_k * (d + d_v) + n_splits * (d_v + 1)
    assert traffic.writes == (n_splits + 1) * (d_v + 1)


def simulated_wait(n_sms, n_jobs, n_tiles, n_splits):
    """Return when the last job ends, if each goes to the SM that is free first, long ones first."""
    splits = []
    for s in range(n_splits):
        first = n_tiles * s // n_splits
        end = n_tiles * (s + 1) // n_splits
        splits.append(end - first)
    free_at = [0] * n_sms
    for tiles in sorted(splits * n_jobs, reverse=True):
        earliest = free_at.index(min(free_at))
        free_at[earliest] += tiles
    return max(free_at)


@pytest.mark.parametrize("n_sms, n_jobs, n_tiles", [(3, 1, 10), (4, 6, 12), (7, 5, 9), (2, 9, 4)])
def test_the_wait_is_that_of_a_simulation(n_sms, n_jobs, n_tiles):
    """The same where all splits are equal, and never less where they are not."""
    for n_splits in range(1, n_tiles + 1):
        wait = m.decode_wait(n_sms, n_jobs, n_tiles, n_splits)
        simulated = simulated_wait(n_sms, n_jobs, n_tiles, n_splits)
        assert wait >= simulated
        if n_tiles % n_splits == 0:
            assert wait == simulated


@pytest.mark.parametrize("n_jobs, n_tiles, n_splits, wait", [
    (128, 64, 1, 128),
    (8, 512, 1, 512),
    (108, 7, 1, 7),
    (128, 64, 16, 76),
])
def test_the_wait_on_108_sms_by_hand(n_jobs, n_tiles, n_splits, wait):
    assert m.decode_wait(108, n_jobs, n_tiles, n_splits) == wait


@pytest.mark.parametrize("n_sms, n_jobs, n_tiles, expected", [
    (3, 1, 10, 3),
    (108, 8, 512, 13),
    (108, 8, 8, 8),
    (108, 128, 64, 4),
    (108, 2048, 64, 1),
    (108, 108, 9, 1),
    (2, 9, 11, 1),  # a wait of 55 where 50 is the shortest: just within
])
def test_splits_are_the_fewest_within_a_tenth(n_sms, n_jobs, n_tiles, expected):
    assert m.choose_splits(n_sms, n_jobs, n_tiles) == expected
    waits = [m.decode_wait(n_sms, n_jobs, n_tiles, s) for s in range(1, n_tiles + 1)]
    assert 10 * waits[expected - 1] <= 11 * min(waits)
    for wait in waits[:expected - 1]:
        assert 10 * wait > 11 * min(waits)


# The family

GROUPS = [(4, 2), (4, 1), (3, 3), (6, 2)]  # query heads, KV heads


def grouped_inputs(n_heads, n_kv_heads, n_q):
    """Return q, k and v of several heads, with 9 keys, d = 3 and d_v = 2."""
    q = numbers(0, n_heads, n_q, 3)
    k = numbers(1, n_kv_heads, 9, 3)
    v = numbers(2, n_kv_heads, 9, 2)
    return q, k, v


@pytest.mark.parametrize("n_heads, n_kv_heads", GROUPS)
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(n_heads, n_kv_heads, causal):
    q, k, v = grouped_inputs(n_heads, n_kv_heads, n_q=5)
    got = m.flash_grouped_query(*lists(q, k, v), causal=causal, **blocks(2, 4))
    assert len(got) == n_heads
    for h in range(n_heads):
        kv_head = h // (n_heads // n_kv_heads)
        agrees(got[h], dense(q[h], k[kv_head], v[kv_head], causal))


@pytest.mark.parametrize("n_heads, n_kv_heads", GROUPS)
def test_a_group_as_one_block(n_heads, n_kv_heads):
    """The same as head by head, and each k and v read once."""
    q, k, v = grouped_inputs(n_heads, n_kv_heads, n_q=1)
    traffic = m.Traffic()
    got = m.flash_packed_group(*lists(q, k, v), block_k=4, traffic=traffic)
    rows = []
    for out, _ in got:
        rows += out
    for h in range(n_heads):
        kv_head = h // (n_heads // n_kv_heads)
        expected, _, _ = dense(q[h], k[kv_head], v[kv_head])
        np.testing.assert_allclose(rows[h], expected[0], **TIGHT)
    assert traffic.reads == n_heads * 3 + n_kv_heads * 9 * (3 + 2)


def paged(rows, page_size, seed):
    """Return rows (an array), scattered over pages; unused slots hold nan."""
    n_pages = math.ceil(len(rows) / page_size)
    pages = np.full((n_pages + 4, page_size, rows.shape[1]), math.nan)
    block_table = random.Random(seed).sample(range(n_pages + 4), n_pages)
    for j, row in enumerate(rows):
        page = block_table[j // page_size]
        pages[page, j % page_size] = row
    return m.PagedRows(pages.tolist(), block_table, len(rows))


@pytest.mark.parametrize("page_size", [1, 3, 4, 50])
def test_pages_are_read_like_a_matrix(page_size):
    k = numbers(1, 11, 3)
    pages = paged(k, page_size, 1)
    assert list(pages) == k.tolist()
    assert pages[-1] == k[-1].tolist()
    assert pages[4:9] == k[4:9].tolist()
    with pytest.raises(IndexError):
        pages[11]


@each_version
@pytest.mark.parametrize("block_k", [1, 3, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_pages(attend, block_k, causal):
    q, k, v = inputs(6, 11, 3, 2)
    for page_size in (1, 3, 4, 50):
        k_pages = paged(k, page_size, 1)
        v_pages = paged(v, page_size, 2)
        got = attend(q.tolist(), k_pages, v_pages, causal=causal, **blocks(4, block_k))
        agrees(got, dense(q, k, v, causal))


# FlashAttention-3 and -4


def e4m3_values():
    """Return all e4m3 numbers from 0 up, by their definition: 4 bits of exponent, 3 of fraction."""
    values = []
    for bits in range(127):  # pattern 127 is NaN
        exponent = bits >> 3
        fraction = bits & 7
        if exponent == 0:
            values.append(fraction / 8 * 2.0 ** -6)
        else:
            values.append((1 + fraction / 8) * 2.0 ** (exponent - 7))
    return values


def test_round_to_e4m3_is_the_nearest_of_the_format():
    """Halfway between two numbers, the one with the even pattern is taken."""
    values = e4m3_values()
    for bits, (below, above) in enumerate(zip(values, values[1:])):
        middle = (below + above) / 2
        even = below if bits % 2 == 0 else above
        assert m.round_to_e4m3(below) == below
        assert m.round_to_e4m3(-below) == -below
        assert m.round_to_e4m3(middle) == even
        assert m.round_to_e4m3(middle * (1 + 1e-12)) == above
        assert m.round_to_e4m3(middle * (1 - 1e-12)) == below


def test_e4m3_ends_at_448():
    assert max(e4m3_values()) == m.E4M3_MAX == 448
    assert m.round_to_e4m3(1e9) == 448
    assert m.round_to_e4m3(-449.0) == -448
    assert m.round_to_e4m3(-1e9) == -448
    assert m.round_to_e4m3(1e-9) == 0


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_quantize_blocks(block):
    x = numbers(0, 7, 4) * np.logspace(0, 9, 7)[:, None]
    values = np.array(e4m3_values())
    grid = np.concatenate([-values, values])
    got = np.array(m.quantize_blocks(x.tolist(), block))
    for start in range(0, 7, block):
        rows = slice(start, start + block)
        scale = np.abs(x[rows]).max() / 448
        distances = np.abs(x[rows, :, None] / scale - grid)
        expected = grid[distances.argmin(axis=2)] * scale
        np.testing.assert_allclose(got[rows], expected, rtol=1e-14, atol=0)
    assert m.quantize_blocks([[0.0, 0.0]], block) == [[0.0, 0.0]]


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_hadamard_rotation(d):
    signs = np.random.default_rng(d).choice([-1.0, 1.0], size=d)
    hadamard = np.zeros((d, d))
    for i in range(d):
        for j in range(d):
            hadamard[i, j] = (-1) ** (i & j).bit_count()
    rotation = np.diag(signs) @ hadamard / math.sqrt(d)
    x = numbers(0, 5, d)
    np.testing.assert_allclose(m.hadamard_rotate(x.tolist(), signs.tolist()), x @ rotation, **TIGHT)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(d), **TIGHT)


def test_the_rotation_of_section_9_by_hand():
    q, k = m.hadamard_rotate([[8.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]], [1.0] * 4)
    assert q == [4.0, 4.0, 4.0, 4.0]
    assert k == [5.0, -1.0, -2.0, 0.0]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 5.0, m.RESCALE_THRESHOLD, 100.0])
@pytest.mark.parametrize("tile", [1, 3, 40])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_absorb_lazily_changes_nothing_but_the_reference(threshold, tile, size):
    scores = numbers(0, 40, size=size)
    v = numbers(1, 40, 3)
    state = m.empty_state(3)
    for start in range(0, 40, tile):
        part = slice(start, start + tile)
        old_m = state.m
        state = m.absorb_lazily(state, scores[part].tolist(), v[part].T.tolist(), threshold)
        largest = scores[part].max()
        if largest > old_m + threshold:
            assert state.m == largest
        else:
            assert state.m == old_m
    out, lse = m.finish(state)
    exps = np.exp(scores - scores.max())
    np.testing.assert_allclose(out, exps @ v / exps.sum(), **TIGHT)
    np.testing.assert_allclose(lse, scores.max() + math.log(exps.sum()), **TIGHT)


def test_a_threshold_that_is_only_met_moves_nothing():
    state = m.absorb_lazily(m.State(0.0, 1.0, [1.0]), [5.0], [[1.0]], 5.0)
    assert state.m == 0.0


def test_the_threshold():
    assert pytest.approx(math.log(256), abs=1e-15) == m.RESCALE_THRESHOLD


def test_the_polynomial():
    """It is within 1e-4 of 2^x, and grows."""
    xs = np.linspace(-20, 3, 5001)
    got = np.array([m.exp2_by_polynomial(x) for x in xs])
    worst = np.abs(got / 2**xs - 1).max()
    assert 8e-5 < worst < 9e-5
    assert (np.diff(got) > 0).all()


@pytest.mark.parametrize("n", range(-3, 4))
def test_the_polynomial_is_exact_at_whole_numbers(n):
    assert m.exp2_by_polynomial(float(n)) == 2.0**n


# The experiments


def test_a_run_of_version_2_by_hand():
    """2 queries and keys, d = 1, tiles of 1 × 1: a causal mask leaves three tiles."""
    run = m.run_attention("version 2", m.Sizes(2, 1, 1, 1), causal=True)
    assert run.tiles == 3
    assert run.read == 2 + 3 * 2
    assert run.written == 4
    assert run.formula == (8, 4)
    assert run.error < 1e-14


def test_a_run_of_version_1_by_hand():
    """k and v; q, o, m and l at each of 4 tiles; and o, m and l written first."""
    run = m.run_attention("version 1", m.Sizes(2, 1, 1, 1))
    assert run.read == 4 + 4 * 4
    assert run.written == 6 + 4 * 3


def test_the_formula_of_standard_attention_by_hand():
    assert m.crossings_by_formula("standard", m.Sizes(2, 1, 1, 1)) == (8 + 6, 8 + 4)


@pytest.mark.parametrize("n, d, block_q, block_k", [(7, 3, 2, 3), (9, 2, 9, 1), (5, 1, 1, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formulas_are_what_is_counted(n, d, block_q, block_k, causal):
    sizes = m.Sizes(n, d, block_q, block_k)
    for attention in ("standard", "version 1", "version 2"):
        run = m.run_attention(attention, sizes, causal)
        assert (run.read, run.written) == run.formula
    assert m.run_backward(sizes, causal).rows == m.backward_by_formula(sizes, causal)


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"causal": True, "window": 2}, {"sink": 0.5}], ids=str)
def test_the_reference_of_the_trace(options):
    arrays = inputs(5, 5, 3, 2)
    got = attend_with(m.attention_by_definition, arrays, **options)
    agrees(got, dense(*arrays, **options))


def test_moving_and_computing_by_hand():
    """Milliseconds for 2 bytes a number; without L2 each of 64 blocks reads K and V again."""
    n, d = 8192, 128
    a100, h100 = m.move_and_compute(n, d, 128)
    assert a100["computing"] == pytest.approx(4 * n**2 * d / 312e12 * 1e3)
    standard = 4 * n**2 + 4 * n * d + n
    assert a100["standard"] == pytest.approx(2 * standard / 2039e9 * 1e3)
    once = 4 * n * d + n
    assert h100["flash, L2"] == pytest.approx(2 * once / 3350e9 * 1e3)
    again = 64 * n * 2 * d + 2 * n * d + n
    assert h100["flash, no L2"] == pytest.approx(2 * again / 3350e9 * 1e3)


def test_the_cards():
    """FLOP/s = SMs × FLOPs a clock × boost clock, from the white papers."""
    assert m.A100_SHEET.n_sms == 108
    assert m.A100_SHEET.flops == pytest.approx(108 * 2048 * 1.41e9, rel=1e-3)
    assert m.H100_SHEET.n_sms == 132
    assert m.H100_SHEET.flops == pytest.approx(132 * 4096 * 1.83e9, rel=1e-3)


def test_the_real_tiles():
    """What they take of an SM, worked out by hand, and their traffic."""
    kilobytes = [tile.sram_kb for tile in m.REAL_TILES]
    assert kilobytes == [16 + 32, 32 + 32, 24 + 4 * 24 + 72, 32 + 4 * 44]
    for tile in m.REAL_TILES:
        assert tile.sram_kb <= tile.of_kb
    gains = [round(tile.gain, 1) for tile in m.REAL_TILES]
    assert gains == [4.0, 2.0, 5.9, 3.9]


def test_the_steps_of_online_softmax_by_hand():
    powers = [1, 3, 2, 5, 0]
    scores = [power * math.log(2) for power in powers]
    steps = m.follow_online(scores, "abcde", 2)
    assert [step.keys for step in steps] == ["0-1", "2-3", "4-4"]
    assert [step.largest for step in steps] == ["b", "d", "e"]
    assert [step.c for step in steps] == pytest.approx([0.0, 1 / 4, 1.0])
    assert [step.l for step in steps] == pytest.approx([5 / 4, 23 / 16, 23 / 16 + 1 / 32])


def test_the_gap_of_matrices():
    assert m.matrix_gap([[3.0, 1.0], [2.0]], [[0.0, 1.0], [-2.0]]) == 5.0
    assert m.matrix_gap([[1.0]], [[1.0, 2.0]]) == INF
    assert m.matrix_gap([[1.0], [math.nan]], [[1.0], [1.0]]) == INF


def test_a_long_table_keeps_its_ends():
    assert m.shorten(list(range(10))) == list(range(10))
    assert m.shorten(list(range(30))) == [0, 1, 2, 3, 4, 26, 27, 28, 29]


@pytest.mark.parametrize("words, said", [(9, False), (90, True)])
def test_the_trace_says_when_rows_are_left_out(words, said, capsys):
    text = " ".join(["rat"] * words)
    assert m.main(["--section", "2", "--text", text]) == 0
    out = capsys.readouterr().out
    assert ("in the middle are left out." in " ".join(out.split())) == said


def test_the_walks_are_drawn():
    sizes = m.Sizes(4, 1, 2, 2)
    first = m.run_attention("version 1", sizes, causal=True)
    second = m.run_attention("version 2", sizes, causal=True)
    pictures = [line.split() for line in m.draw_walks(sizes, first, second)]
    assert pictures[1] == ["▒1", "·", "▒1", "·"]
    assert pictures[2] == ["█2", "▒3", "█2", "▒3"]


@pytest.mark.parametrize("version, better, worse", [
    ("version 1", (4, 24), (24, 4)),
    ("version 2", (24, 4), (4, 24)),
])
def test_what_stands_in_the_outer_loop_should_be_long(version, better, worse):
    """As section 5 says: blocks of keys in version 1, blocks of queries in version 2."""
    less = m.run_attention(version, m.Sizes(48, 16, *better))
    more = m.run_attention(version, m.Sizes(48, 16, *worse))
    assert 2 * less.crossed < more.crossed


def test_the_clock_cycles_of_section_10():
    """4 · 128³ FLOPs and 128² exponentials, by what an SM makes in a clock."""
    flops = 4 * 128**3
    assert flops // 4096 == 2048
    assert flops // 8192 == 1024
    assert 128**2 // 16 == 1024


def test_the_sizes_of_section_1():
    """134 MB for S, 18 MB for all SRAM of an A100, 64 numbers of S and P for one of q, k, v, O."""
    assert round(2 * 8192**2 / 1e6) == 134
    assert round(108 * 164 * 1024 / 1e6) == 18
    assert 4 * 8192**2 / (4 * 8192 * 128) == 64


seeds = pytest.mark.parametrize("seed", range(int(os.environ.get("FINDING_SEEDS", 5))))


@seeds
def test_flash_moves_less_at_the_default_sizes(seed):
    sizes = m.Sizes(m.SEQ_LEN, m.HEAD_DIM, m.BLOCK_Q, m.BLOCK_K, m.SRAM, seed)
    standard = m.run_attention("standard", sizes)
    first = m.run_attention("version 1", sizes)
    second = m.run_attention("version 2", sizes)
    assert second.crossed < first.crossed < standard.crossed


@seeds
def test_going_back_moves_and_keeps_less_at_the_default_sizes(seed):
    block_q, block_k = m.backward_blocks(m.BLOCK_Q, m.BLOCK_K, m.HEAD_DIM, m.HEAD_DIM, m.SRAM)
    sizes = m.Sizes(m.SEQ_LEN, m.HEAD_DIM, block_q, block_k, m.SRAM, seed)
    run = m.run_backward(sizes, causal=False)
    standard, flash = run.rows
    assert flash.crossed < standard.crossed
    assert flash.kept < standard.kept
    assert flash.multiply_adds == 1.25 * standard.multiply_adds
    assert run.error < 1e-12
    assert m.slope_error(seed) < 1e-8


@seeds
def test_finding_rotation_helps_where_channels_are_wide(seed):
    wide = m.compare_fp8("wide", [5.0] * 2 + [1.0] * 30, seed)
    assert 1.3 < wide.tile_scale / wide.rotated < 2.7
    assert wide.rotated < wide.one_scale / 1.4
    assert 0.435 < wide.tile_scale / wide.one_scale < 1.145
    assert wide.rotation < 1e-12


@seeds
def test_rotation_changes_little_where_channels_are_alike(seed):
    normal = m.compare_fp8("normal", [1.0] * 32, seed)
    assert normal.rotated == pytest.approx(normal.tile_scale, rel=0.25)
    assert normal.one_scale == pytest.approx(normal.tile_scale, rel=0.25)
    assert normal.rotation < 1e-12


@seeds
def test_m_lags_behind_nearly_always(seed):
    random_scores, slow, fast = m.rescaled_rows(seed)
    assert random_scores.always > 50
    assert random_scores.lazily == 0
    assert (slow.always, slow.lazily) == (7, 3)
    assert (fast.always, fast.lazily) == (7, 7)
    assert max(random_scores.largest, slow.largest, fast.largest) <= 256
    assert slow.largest == pytest.approx(math.exp(5.5))


@seeds
def test_decoding_by_groups(seed):
    apart, together = m.run_decoding(m.Sizes(20, 3, 4, 4, seed=seed))
    assert apart.read == 4 * (3 + 20 * 6)
    assert together.read == 4 * 3 + 2 * 20 * 6
    assert max(apart.error, together.error) < 1e-12


@seeds
def test_the_variants(seed):
    rows = m.run_variants(m.Sizes(20, 3, 4, 5, seed=seed), 5, 1.0, 6, [2, 5, 0, 3])
    causal, near, sink, pages = rows
    assert near.crossed < causal.crossed
    assert causal.crossed == sink.crossed == pages.crossed
    for row in rows:
        assert row.error < 1e-12


# The arguments


def test_arguments_are_left_as_they_were():
    q, k, v = lists(*inputs(5, 5, 2, 2))
    out, lse = m.flash_attention(q, k, v, **blocks(2, 2))
    d_out = numbers(9, 5, 2).tolist()
    signs = [1.0, -1.0]
    state = m.State(1.0, 2.0, [3.0])
    before = repr((q, k, v, out, lse, d_out, signs, state))
    m.standard_attention(q, k, v, causal=True)
    m.flash_attention_v1(q, k, v, **blocks(2, 3))
    m.flash_attention_backward(q, k, v, out, lse, d_out, **blocks(2, 3))
    m.standard_attention_backward(q, k, v, [[0.2] * 5] * 5, d_out)
    m.merge_partials([(out, lse), (out, lse)])
    m.flash_decode(q, k, v, n_splits=2, **blocks(2, 3))
    m.quantize_blocks(q, 2)
    m.hadamard_rotate(q, signs)
    m.online_softmax(lse)
    m.absorb(state, [5.0, 6.0], [[1.0, 2.0]])
    m.absorb_lazily(state, [5.0, 6.0], [[1.0, 2.0]], 1.0)
    assert repr((q, k, v, out, lse, d_out, signs, state)) == before


@each_version
@pytest.mark.parametrize("option, value", [("block_q", 0), ("block_k", 0), ("block_k", -3)])
def test_bad_blocks_are_named(attend, option, value):
    q, k, v = lists(*inputs(3, 4, 2, 2))
    options = {**blocks(2, 2), option: value}
    with pytest.raises(ValueError, match=f"{option} .*not {value}"):
        attend(q, k, v, **options)
    with pytest.raises(ValueError, match=f"{option} .*not {value}"):
        m.flash_attention_backward(q, k, v, q, [0.0] * 3, q, **options)


# What does not fit together. q has 3 rows, k and v have 4, and all have 2 channels.


def attend_by_ones(q, k, v, **options):
    """Run flash_attention with blocks of 1."""
    return m.flash_attention(q, k, v, **blocks(1, 1), **options)


def back_by_ones(q, k, v, out, lse, d_out):
    """Run the flash backward pass with blocks of 1."""
    return m.flash_attention_backward(q, k, v, out, lse, d_out, **blocks(1, 1))


def group_by_ones(q, k, v):
    """Run flash_grouped_query with blocks of 1."""
    return m.flash_grouped_query(q, k, v, **blocks(1, 1))


LSE = [0.0] * 3

REFUSED = [
    ("rows", lambda q, k, v: attend_by_ones(q, k, v[:-1])),
    ("at least one", lambda q, k, v: attend_by_ones(q, [], [])),
    ("at least one channel", lambda q, k, v: attend_by_ones(q, k, [[]] * 4)),
    ("window", lambda q, k, v: attend_by_ones(q, k, v, window=0)),
    ("keys must be a run", lambda q, k, v: attend_by_ones(q, k, v, keys=range(2, 5))),
    ("keys must be a run", lambda q, k, v: attend_by_ones(q, k, v, keys=range(-1, 2))),
    ("keys must be a run", lambda q, k, v: attend_by_ones(q, k, v, keys=range(0, 4, 2))),
    ("channels", lambda q, k, v: m.standard_attention([[1.0]], k, v)),
    ("n_splits", lambda q, k, v: m.flash_decode(q, k, v, n_splits=0)),
    ("out must", lambda q, k, v: back_by_ones(q, k, v, q[:2], LSE, q)),
    ("lse must", lambda q, k, v: back_by_ones(q, k, v, q, LSE[:2], q)),
    ("d_out must", lambda q, k, v: back_by_ones(q, k, v, q, LSE, q[:1])),
    ("d_out must", lambda q, k, v: back_by_ones(q, k, v, q, LSE, [[1.0]] * 3)),
    ("weights must", lambda q, k, v: m.standard_attention_backward(q, k, v, [], q)),
    ("weights must", lambda q, k, v: m.standard_attention_backward(q, k, v, q, q)),
    ("d_out must", lambda q, k, v: m.standard_attention_backward(q, k, v, [[0.25] * 4] * 3, q[:2])),
    ("parts", lambda q, k, v: m.merge_partials([])),
    ("parts", lambda q, k, v: m.merge_partials([(q, LSE), (q[:2], LSE[:2])])),
    ("divide", lambda q, k, v: group_by_ones([q] * 3, [k] * 2, [v] * 2)),
    ("divide", lambda q, k, v: group_by_ones([q], [k] * 2, [v] * 2)),
    ("divide", lambda q, k, v: group_by_ones([q] * 2, [k] * 2, [v])),
    ("divide", lambda q, k, v: m.flash_packed_group([q], [], [], block_k=1)),
    ("n must be at most", lambda q, k, v: m.PagedRows([k], [0], 5)),
    ("power of two", lambda q, k, v: m.hadamard_rotate([[1.0] * 3], [1.0] * 3)),
    ("power of two", lambda q, k, v: m.hadamard_rotate([[]], [])),
    ("signs", lambda q, k, v: m.hadamard_rotate(q, [1.0] * 4)),
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda i: f"{i} {REFUSED[i][0]}")
def test_what_does_not_fit_together_is_refused(number):
    words, call = REFUSED[number]
    q, k, v = lists(*inputs(3, 4, 2, 2))
    with pytest.raises(ValueError, match=words):
        call(q, k, v)
