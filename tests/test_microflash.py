"""microflash against dense numpy references written from the definitions; they share no code."""

import math
import random

import numpy as np
import pytest

import microflash as m

INF = math.inf
TIGHT = {"rtol": 0, "atol": 1e-12}


def numbers(seed, *shape, size=1.0):
    return np.random.default_rng(seed).normal(size=shape) * size


def inputs(n_q, n_k, d, d_v, seed=0, size=1.0):
    q = numbers(seed, n_q, d, size=size)
    k = numbers(seed + 1, n_k, d)
    v = numbers(seed + 2, n_k, d_v)
    return q, k, v


def lists(*arrays):
    return [array.tolist() for array in arrays]


# The naive references


def sees(i, j, n_q, n_k, causal, window):
    """Whether query i sees key j, from the words of the docstring."""
    position = n_k - n_q + i
    if causal and j > position:
        return False
    return window is None or j > position - window


def mask(n_q, n_k, causal=False, window=None):
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        for j in range(n_k):
            seen[i, j] = sees(i, j, n_q, n_k, causal, window)
    return seen


def dense(q, k, v, causal=False, window=None, scale=None, keys=None, sink=-INF):
    """(out, lse, weights) of dense attention. keys: the only ones that exist."""
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
        if row.max() > -INF:
            exps = np.exp(row - row.max())
            weights[i, seen[i]] = exps[:-1] / exps.sum()
            lse[i] = row.max() + math.log(exps.sum())
    return weights @ v, lse, weights


def dense_backward(q, k, v, d_out, causal=False, scale=None):
    """dq, dk, dv through the full Jacobian of every row's softmax, diag(p) - p pᵀ."""
    if scale is None:
        scale = 1 / math.sqrt(q.shape[1])
    weights = dense(q, k, v, causal, None, scale)[2]
    d_scores = np.zeros_like(weights)
    for i, p in enumerate(weights):
        jacobian = np.diag(p) - np.outer(p, p)
        d_scores[i] = jacobian @ (v @ d_out[i])
    return scale * d_scores @ k, scale * d_scores.T @ q, weights.T @ d_out


def agrees(got, expected, size=1.0):
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-13, atol=1e-12 * size)


# (n_q, n_k, d, d_v) and (block_q, block_k)
SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (7, 7, 4, 4), (5, 13, 3, 5), (13, 5, 2, 7), (16, 16, 8, 1),
          (11, 11, 1, 2)]
BLOCKS = [(1, 1), (1, 5), (3, 1), (2, 3), (4, 4), (5, 100), (100, 3)]


def decode_3(*arguments, **options):
    return m.flash_decode(*arguments, n_splits=3, **options)


def decode_29(*arguments, **options):
    """More splits than keys: some are empty."""
    return m.flash_decode(*arguments, n_splits=29, **options)


VERSIONS = [m.flash_attention_v1, m.flash_attention, decode_3, decode_29]
each_version = pytest.mark.parametrize("attend", VERSIONS, ids=lambda f: f.__name__)


# The forward pass


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": -2.0, "causal": True},
                                     {"scale": 0.0}], ids=str)
def test_every_version_is_dense_attention_for_every_block(shape, options):
    arrays = inputs(*shape)
    expected = dense(*arrays, **options)
    agrees(m.standard_attention(*lists(*arrays), **options), expected)
    for block_q, block_k in BLOCKS:
        for attend in VERSIONS[:3]:
            agrees(attend(*lists(*arrays), block_q=block_q, block_k=block_k, **options), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [
    {"window": 3, "causal": True}, {"window": 99, "causal": True}, {"window": 2},
    {"sink": 0.5}, {"sink": 3.0, "causal": True}, {"sink": -1.0, "window": 2, "causal": True},
], ids=str)
def test_windows_and_sinks_are_dense_attention(shape, options):
    arrays = inputs(*shape)
    expected = dense(*arrays, **options)
    for block_q, block_k in BLOCKS:
        got = m.flash_attention(*lists(*arrays), block_q=block_q, block_k=block_k, **options)
        agrees(got, expected)


def test_a_window_in_splits_too():
    arrays = inputs(5, 13, 3, 2)
    got = m.flash_decode(*lists(*arrays), n_splits=4, block_k=2, causal=True, window=4)
    agrees(got, dense(*arrays, causal=True, window=4))


@each_version
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores(attend, size):
    q, k, v = inputs(9, 9, 4, 3, size=abs(size))
    k = k * np.sign(size)
    for causal in (False, True):
        expected = dense(q, k, v, causal)
        for block_q, block_k in ((2, 1), (4, 4)):
            got = attend(*lists(q, k, v), causal=causal, block_q=block_q, block_k=block_k)
            assert np.isfinite(got[0]).all()
            agrees(got, expected, size=10)  # scores of 1e4 are rounded at 1e-12 already


@each_version
@pytest.mark.parametrize("row", [
    [0.0] * 9, [5.0] * 9, [-3.0, 7.0, 7.0, -3.0, 7.0, 7.0, 7.0, -1e4, 1e4], list(range(9)),
    list(range(9, 0, -1)), [-1e4] * 8 + [1e4], [1e4] + [-1e4] * 8, [-800.0] * 8 + [-1e4],
], ids=str)
def test_ties_late_maxima_and_falling_rows(attend, row):
    """One query whose score for key j is row[j], with d = 1 and the scale 1."""
    k = np.array(row)[:, None]
    v = numbers(0, 9, 2)
    expected = dense(np.ones((1, 1)), k, v, scale=1.0)
    for block_k in (1, 2, 4, 9):
        got = attend([[1.0]], k.tolist(), v.tolist(), block_q=1, block_k=block_k, scale=1.0)
        agrees(got, expected)


@each_version
def test_queries_that_see_nothing_get_zeros_and_minus_infinity(attend):
    q, k, v = lists(*inputs(7, 4, 2, 3))
    for block_q, block_k in BLOCKS:
        out, lse = attend(q, k, v, block_q=block_q, block_k=block_k, causal=True)
        assert out[:3] == [[0.0] * 3] * 3
        assert lse[:3] == [-INF] * 3
        assert all(map(any, out[3:]))
        assert np.isfinite(lse[3:]).all()


def test_standard_attention_too_where_nothing_is_seen():
    out, lse = m.standard_attention(*lists(*inputs(7, 4, 2, 3)), causal=True)
    assert out[:3] == [[0.0] * 3] * 3
    assert lse[:3] == [-INF] * 3


@each_version
def test_no_queries(attend):
    assert attend([], [[1.0]], [[1.0, 2.0]], block_q=2, block_k=2) == ([], [])


@pytest.mark.parametrize("keys", [range(0, 11), range(3, 8), range(10, 11), range(4, 4),
                                  range(0, 1)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 4}], ids=str)
def test_a_run_of_the_keys_keeps_its_positions(keys, options):
    arrays = inputs(8, 11, 3, 2)
    got = m.flash_attention(*lists(*arrays), keys=keys, block_q=3, block_k=2, **options)
    agrees(got, dense(*arrays, keys=keys, **options))


SOFTMAX_ROWS = [numbers(0, 23).tolist(), numbers(1, 23, size=30).tolist(),
                numbers(2, 23, size=1e4).tolist(), [0.0] * 5, [-INF, -INF, 2.0, 1.0], [-INF] * 3,
                [], [1e4], [3.0, -INF, 3.0], [float(j) for j in range(12)]]


@pytest.mark.parametrize("row", SOFTMAX_ROWS, ids=range(len(SOFTMAX_ROWS)))
def test_online_and_safe_softmax(row):
    """The online one and the shared one, which takes the maximum off first."""
    finite = [s for s in row if s > -INF]
    largest = max(finite, default=0.0)
    total = sum(math.exp(s - largest) for s in finite)
    expected = [math.exp(s - largest) / total if s > -INF else 0.0 for s in row]
    np.testing.assert_allclose(m.softmax(row), expected, **TIGHT)
    for tile in (1, 2, 7, 100):
        np.testing.assert_allclose(m.online_softmax(row, tile=tile), expected, **TIGHT)


def test_online_softmax_reads_twice_and_holds_a_tile():
    traffic = m.Traffic(sram=4)
    m.online_softmax(SOFTMAX_ROWS[0], tile=4, traffic=traffic)
    assert (traffic.reads, traffic.writes, traffic.peak) == (2 * 23, 23, 4)
    with pytest.raises(ValueError, match="tile"):
        m.online_softmax([1.0], tile=0)


def test_log_sum_exp():
    assert m.log_sum_exp([]) == m.log_sum_exp([-INF, -INF]) == -INF
    assert m.log_sum_exp([math.log(2), math.log(3)]) == pytest.approx(math.log(5), abs=1e-15)
    assert m.log_sum_exp([1e4, 1e4]) == pytest.approx(1e4 + math.log(2), abs=1e-11)
    assert m.log_sum_exp([-1e4, -INF]) == -1e4


def test_one_step_of_the_recurrence():
    """A state that has seen some keys and takes in others equals one that saw them all at once."""
    scores = numbers(0, 9, size=3.0)
    v = numbers(1, 9, 2)
    for cut in range(1, 9):
        state = m.empty_state(2)
        for part in (slice(0, cut), slice(cut, 9)):
            state = m.absorb(state, scores[part].tolist(), v[part].T.tolist())
            seen = scores[:part.stop]
            exps = np.exp(seen - seen.max())
            assert state.m == seen.max()
            np.testing.assert_allclose(state.l, exps.sum(), **TIGHT)
            np.testing.assert_allclose(state.o, exps @ v[:part.stop], **TIGHT)


def test_the_tiny_example_of_section_2():
    """Powers of 2: the scores 1, 3 and then 2, 5."""
    log2 = math.log(2)
    state = m.absorb(m.empty_state(0), [1 * log2, 3 * log2], [])
    assert state.l == pytest.approx(5 / 4, abs=1e-15)
    state = m.absorb(state, [2 * log2, 5 * log2], [])
    assert state.l == pytest.approx(23 / 16, abs=1e-15)


# The backward pass


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.7}], ids=str)
def test_backward_is_the_dense_backward(shape, options):
    q, k, v = inputs(*shape)
    d_out = numbers(9, shape[0], shape[3])
    expected = dense_backward(q, k, v, d_out, **options)
    out, lse, weights = dense(q, k, v, **options)
    scale = options.get("scale")
    results = [m.standard_attention_backward(*lists(q, k, v, weights, d_out), scale=scale)]
    for block_q, block_k in BLOCKS:
        results.append(m.flash_attention_backward(*lists(q, k, v, out, lse, d_out), **options,
                                                  block_q=block_q, block_k=block_k))
    for gradients in results:
        for got, want in zip(gradients, expected):
            np.testing.assert_allclose(got, want, **TIGHT)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["dq", "dk", "dv"])
def test_backward_is_the_slope_of_the_forward(causal, which):
    """Central differences of Σ d_out ∘ out through flash_attention itself, entry by entry."""
    arrays = inputs(4, 6, 3, 2)
    d_out = numbers(9, 4, 2)
    options = {"block_q": 3, "block_k": 2, "causal": causal}
    out, lse = m.flash_attention(*lists(*arrays), **options)
    gradients = m.flash_attention_backward(*lists(*arrays), out, lse, d_out.tolist(), **options)

    def loss(index, step):
        moved = [array.copy() for array in arrays]
        moved[which][index] += step
        return (np.array(m.flash_attention(*lists(*moved), **options)[0]) * d_out).sum()

    for index in np.ndindex(arrays[which].shape):
        slope = (loss(index, 1e-5) - loss(index, -1e-5)) / 2e-5
        assert abs(slope - gradients[which][index[0]][index[1]]) < 1e-8


def test_backward_with_a_sink_needs_nothing_but_its_lse():
    """The slope of the forward pass with a sink, in a random direction."""
    arrays = inputs(4, 6, 3, 2)
    directions = inputs(4, 6, 3, 2, seed=20)
    d_out = numbers(9, 4, 2)
    blocks = {"block_q": 3, "block_k": 2}

    def loss(step):
        moved = [a + step * u for a, u in zip(arrays, directions)]
        return (np.array(m.flash_attention(*lists(*moved), sink=0.5, **blocks)[0]) * d_out).sum()

    out, lse = m.flash_attention(*lists(*arrays), sink=0.5, **blocks)
    gradients = m.flash_attention_backward(*lists(*arrays), out, lse, d_out.tolist(), **blocks)
    expected = sum((np.array(g) * u).sum() for g, u in zip(gradients, directions))
    assert abs((loss(1e-5) - loss(-1e-5)) / 2e-5 - expected) < 1e-8


def test_the_gradient_of_a_sink():
    """-Σ_i exp(sink - L_i) · D_i, as section 8 says."""
    arrays = inputs(4, 6, 3, 2)
    d_out = numbers(9, 4, 2)

    def run(sink):
        return m.flash_attention(*lists(*arrays), sink=sink, block_q=3, block_k=2)

    out, lse = run(0.5)
    averages = (np.array(out) * d_out).sum(axis=1)
    expected = -(np.exp(0.5 - np.array(lse)) * averages).sum()
    above = (np.array(run(0.5 + 1e-5)[0]) * d_out).sum()
    below = (np.array(run(0.5 - 1e-5)[0]) * d_out).sum()
    assert abs((above - below) / 2e-5 - expected) < 1e-8


def test_backward_with_huge_scores_is_finite():
    q, k, v = inputs(6, 6, 2, 2, size=1e4)
    d_out = numbers(9, 6, 2)
    out, lse = m.flash_attention(*lists(q, k, v), block_q=2, block_k=2)
    gradients = m.flash_attention_backward(*lists(q, k, v), out, lse, d_out.tolist(), block_q=2,
                                           block_k=3)
    for got, want in zip(gradients, dense_backward(q, k, v, d_out)):
        assert np.isfinite(got).all()
        # exp(s - L) of s near 1e4, which is rounded at 1e-12, times q
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)


# The traffic


class Count:
    """Reads, writes, peak and walk, counted from the words of the algorithms over a dense mask."""

    def __init__(self, n_q, n_k, d, d_v, block_q, block_k, causal, window=None):
        self.n_q, self.n_k, self.d, self.d_v = n_q, n_k, d, d_v
        self.rows = [range(i, min(i + block_q, n_q)) for i in range(0, n_q, block_q)]
        self.keys = [range(j, min(j + block_k, n_k)) for j in range(0, n_k, block_k)]
        self.seen = mask(n_q, n_k, causal, window)
        self.reads = self.writes = self.peak = 0
        self.walk = []

    def visit(self, rows, keys):
        """Note the tile, unless no query sees any of its keys."""
        if not self.seen[rows.start:rows.stop, keys.start:keys.stop].any():
            return False
        self.walk.append((rows, keys))
        return True

    def held(self, count):
        self.peak = max(self.peak, count)

    def forward_tile(self, rows, keys):
        """q, o, m and l; k and v; the scores."""
        return (len(rows) * (self.d + self.d_v + 2) + len(keys) * (self.d + self.d_v)
                + len(rows) * len(keys))

    def version_1(self):
        self.writes += self.n_q * (self.d_v + 2)  # o, m and l begin in HBM
        for keys in self.keys:
            self.reads += len(keys) * (self.d + self.d_v)
            self.held(len(keys) * (self.d + self.d_v))
            for rows in self.rows:
                if self.visit(rows, keys):
                    self.reads += len(rows) * (self.d + self.d_v + 2)
                    self.writes += len(rows) * (self.d_v + 2)
                    self.held(self.forward_tile(rows, keys))

    def version_2(self):
        for rows in self.rows:
            self.reads += len(rows) * self.d
            self.writes += len(rows) * (self.d_v + 1)
            self.held(len(rows) * (self.d + self.d_v + 2))
            for keys in self.keys:
                if self.visit(rows, keys):
                    self.reads += len(keys) * (self.d + self.d_v)
                    self.held(self.forward_tile(rows, keys))

    def backward(self):
        self.writes += self.n_q * self.d  # dq begins in HBM, as zeros
        for rows in self.rows:            # D = rowsum(dO ∘ O)
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
                    self.reads += queries
                    self.writes += len(rows) * self.d
                    self.held(2 * own + queries + 2 * len(rows) * len(keys))

    def check(self, run):
        """run(traffic) makes these counts, with just enough SRAM and not with one number less."""
        traffic = m.Traffic(sram=self.peak)
        run(traffic)
        counts = (traffic.reads, traffic.writes, traffic.peak, traffic.walk)
        assert counts == (self.reads, self.writes, self.peak, self.walk)
        assert traffic.accesses == self.reads + self.writes
        assert traffic.held == 0
        with pytest.raises(ValueError, match="SRAM holds"):
            run(m.Traffic(sram=self.peak - 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_traffic_is_what_an_independent_count_says(shape, causal, blocks):
    arrays = inputs(*shape)
    out, lse, _ = dense(*arrays, causal)
    d_out = numbers(9, shape[0], shape[3])
    options = {"block_q": blocks[0], "block_k": blocks[1], "causal": causal}

    count = Count(*shape, *blocks, causal)
    count.version_1()
    count.check(lambda t: m.flash_attention_v1(*lists(*arrays), traffic=t, **options))

    count = Count(*shape, *blocks, causal)
    count.version_2()
    count.check(lambda t: m.flash_attention(*lists(*arrays), traffic=t, **options))

    count = Count(*shape, *blocks, causal)
    count.backward()
    count.check(lambda t: m.flash_attention_backward(*lists(*arrays, out, lse, d_out), traffic=t,
                                                     **options))


@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_traffic_with_a_window(blocks):
    shape = (11, 13, 3, 2)
    count = Count(*shape, *blocks, causal=True, window=3)
    count.version_2()
    count.check(lambda t: m.flash_attention(*lists(*inputs(*shape)), traffic=t, block_q=blocks[0],
                                            block_k=blocks[1], causal=True, window=3))


@pytest.mark.parametrize("n_q, n_k, d, d_v", [*SHAPES, (13, 1, 1, 9)])
def test_standard_traffic(n_q, n_k, d, d_v):
    q, k, v = lists(*inputs(n_q, n_k, d, d_v))
    traffic = m.Traffic()
    m.standard_attention(q, k, v, causal=True, traffic=traffic)
    assert traffic.reads == n_q * d + n_k * d + n_q * n_k + n_q * n_k + n_k * d_v
    assert traffic.writes == n_q * n_k + n_q * n_k + n_q + n_q * d_v
    assert traffic.multiply_adds == n_q * n_k * (d + d_v)

    traffic = m.Traffic()
    weights = dense(*inputs(n_q, n_k, d, d_v))[2]
    d_out = numbers(9, n_q, d_v)
    m.standard_attention_backward(q, k, v, *lists(weights, d_out), traffic=traffic)
    assert traffic.reads == 5 * n_q * n_k + 2 * n_q * d_v + n_k * d_v + n_k * d + n_q * d
    assert traffic.writes == 2 * n_q * n_k + n_k * d_v + n_q * d + n_k * d
    assert traffic.multiply_adds == n_q * n_k * (2 * d + 2 * d_v)


def test_the_flash_backward_pass_multiplies_five_matrices():
    q, k, v = inputs(6, 8, 3, 2)
    out, lse, _ = dense(q, k, v)
    traffic = m.Traffic()
    m.flash_attention_backward(*lists(q, k, v, out, lse, numbers(9, 6, 2)), block_q=4, block_k=3,
                               traffic=traffic)
    assert traffic.multiply_adds == 6 * 8 * (3 * 3 + 2 * 2)


@pytest.mark.parametrize("n_q, n_k, d, d_v", [*SHAPES, (13, 1, 1, 9)])
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_what_tiles_take_of_sram(n_q, n_k, d, d_v, block_q, block_k):
    """The formulas, for blocks that are no longer than the whole."""
    block_q = min(block_q, n_q)
    block_k = min(block_k, n_k)
    forward = Count(n_q, n_k, d, d_v, block_q, block_k, False)
    forward.version_2()
    assert sum(m.sram_parts(block_q, block_k, d, d_v).values()) == forward.peak
    backward = Count(n_q, n_k, d, d_v, block_q, block_k, False)
    backward.backward()
    assert m.sram_needed_backward(block_q, block_k, d, d_v) == backward.peak


def test_backward_blocks_fit_and_keep_the_keys_long():
    assert m.backward_blocks(16, 16, 16, 16, 2048) == (8, 16)
    assert m.backward_blocks(16, 16, 16, 16, 10**9) == (16, 16)
    assert m.backward_blocks(4, 16, 2, 3, m.sram_needed_backward(1, 8, 2, 3)) == (1, 8)
    assert m.backward_blocks(64, 64, 2, 3, m.sram_needed_backward(1, 1, 2, 3)) == (1, 1)
    for sram in range(30, 3000, 37):
        block_q, block_k = m.backward_blocks(13, 9, 2, 3, sram)
        assert m.sram_needed_backward(block_q, block_k, 2, 3) <= sram
        assert block_k == 9 or block_q == 1


def test_traffic_moves_copies():
    matrix = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    gpu = m.Traffic(sram=6)
    with gpu.frame():
        tile = gpu.load(matrix, range(1, 3))
        assert tile == [[3.0, 4.0], [5.0, 6.0]]
        assert (gpu.reads, gpu.held, gpu.peak) == (4, 4, 4)
        tile[0][0] = 9.0
        assert matrix[1][0] == 3.0
        assert gpu.load([7.0, 8.0, 9.0], range(0, 2)) == [7.0, 8.0]
        assert gpu.held == 6
        with pytest.raises(ValueError, match="6 numbers and would have to hold 7"):
            gpu.hold(1)
    assert gpu.held == 0
    gpu.store(matrix, range(0, 1), [[0.0, 0.0]])
    assert matrix[0] == [0.0, 0.0]
    assert (gpu.reads, gpu.writes, gpu.accesses) == (6, 2, 8)
    assert m.Traffic() == m.Traffic(None, 0, 0, 0, 0, 0, [])


def test_a_kernel_reads_its_inputs_and_writes_what_it_makes():
    gpu = m.Traffic()
    assert gpu.kernel(gpu.multiply, [[1.0, 2.0]], [[3.0], [4.0]]) == [[11.0]]
    assert (gpu.reads, gpu.writes, gpu.multiply_adds, gpu.held) == (4, 1, 2, 0)


# Splits and merging


@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 13])
def test_partials_merge_in_any_order_and_tree(n_parts):
    rng = random.Random(n_parts)
    arrays = inputs(4, 13, 3, 2, size=20.0)
    owners = [rng.randrange(n_parts) for _ in range(13)]  # any sets of keys, not runs
    parts = []
    for part in range(n_parts):
        keys = [j for j in range(13) if owners[j] == part]
        out, lse, _ = dense(*arrays, keys=keys)
        parts.append((out.tolist(), lse.tolist()))
    expected = dense(*arrays)
    for _ in range(10):
        rng.shuffle(parts)
        agrees(m.merge_partials(parts), expected)
        tree = parts[:]
        while len(tree) > 1:
            count = min(len(tree), rng.randint(2, 3))
            taken = [tree.pop(rng.randrange(len(tree))) for _ in range(count)]
            tree.append(m.merge_partials(taken))
        agrees(tree[0], expected)


def test_cascade_attention():
    """All queries to a shared prefix, then to the rest, merged: as to everything."""
    arrays = inputs(6, 12, 3, 2)
    prefix, rest = (m.flash_attention(*lists(*arrays), keys=keys, block_q=4, block_k=3)
                    for keys in (range(0, 8), range(8, 12)))
    agrees(m.merge_partials([prefix, rest]), dense(*arrays))


def test_merging_what_saw_nothing():
    nothing = ([[0.0, 0.0]], [-INF])
    something = ([[1.0, 2.0]], [-900.0])
    assert m.merge_partials([nothing, nothing]) == nothing
    assert m.merge_partials([nothing, something, nothing]) == something


def test_merging_by_hand():
    merged = m.merge_partials([([[10.0]], [math.log(3)]), ([[2.0]], [0.0])])  # section 7's example
    agrees(merged, ([[8.0]], [math.log(4)]))
    merged = m.merge_partials([([[4.0]], [1e4]), ([[2.0]], [1e4]), ([[99.0]], [-1e4])])
    agrees(merged, ([[3.0]], [1e4 + math.log(2)]))


def test_sums_depend_on_their_order():
    """As section 7 says."""
    assert (0.1 + 0.2) + 0.3 == 0.6000000000000001
    assert 0.1 + (0.2 + 0.3) == 0.6


@pytest.mark.parametrize("n, n_splits", [(10, 1), (10, 3), (10, 10), (3, 7), (0, 2)])
def test_splits_are_even_and_cover(n, n_splits):
    runs = m.split_evenly(n, n_splits)
    assert [j for run in runs for j in run] == list(range(n))
    assert len(runs) == n_splits
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_decode_counts_its_partials():
    n_k, d, d_v, n_splits = 12, 3, 2, 4
    traffic = m.Traffic()
    m.flash_decode(*lists(*inputs(1, n_k, d, d_v)), n_splits=n_splits, block_q=1, block_k=2,
                   traffic=traffic)
    assert traffic.reads == n_splits * d + n_k * (d + d_v) + n_splits * (d_v + 1)
    assert traffic.writes == (n_splits + 1) * (d_v + 1)


def simulated_wait(n_sms, n_jobs, n_tiles, n_splits):
    """Each job to the SM that is free first, the longest first; returns when the last one ends."""
    splits = [n_tiles * (s + 1) // n_splits - n_tiles * s // n_splits for s in range(n_splits)]
    free_at = [0] * n_sms
    for tiles in sorted(splits * n_jobs, reverse=True):
        free_at[free_at.index(min(free_at))] += tiles
    return max(free_at)


@pytest.mark.parametrize("n_sms, n_jobs, n_tiles", [(3, 1, 10), (4, 6, 12), (7, 5, 9), (2, 9, 4)])
def test_the_wait_is_that_of_a_simulation(n_sms, n_jobs, n_tiles):
    """The same where all splits are equal, and never less where they are not."""
    for n_splits in range(1, n_tiles + 1):
        wait = m.decode_wait(n_sms, n_jobs, n_tiles, n_splits)
        simulated = simulated_wait(n_sms, n_jobs, n_tiles, n_splits)
        if n_tiles % n_splits == 0:
            assert wait == simulated
        assert wait >= simulated


@pytest.mark.parametrize("n_jobs, n_tiles, unsplit", [(128, 64, 128), (8, 512, 512), (108, 7, 7)])
def test_the_wait_unsplit(n_jobs, n_tiles, unsplit):
    assert m.decode_wait(108, n_jobs, n_tiles, 1) == unsplit
    assert m.decode_wait(108, 128, 64, 16) == 76


@pytest.mark.parametrize("n_sms, n_jobs, n_tiles, expected", [
    (3, 1, 10, 3), (108, 8, 512, 13), (108, 8, 8, 8), (108, 128, 64, 4), (108, 2048, 64, 1),
    (108, 108, 9, 1)])
def test_splits_are_the_fewest_within_a_tenth(n_sms, n_jobs, n_tiles, expected):
    waits = [m.decode_wait(n_sms, n_jobs, n_tiles, s) for s in range(1, n_tiles + 1)]
    n_splits = m.choose_splits(n_sms, n_jobs, n_tiles)
    assert n_splits == expected
    assert waits[n_splits - 1] <= 1.1 * min(waits)
    assert all(wait > 1.1 * min(waits) for wait in waits[:n_splits - 1])


# The family


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (4, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(n_heads, n_kv_heads, causal):
    q = numbers(0, n_heads, 5, 3)
    k = numbers(1, n_kv_heads, 9, 3)
    v = numbers(2, n_kv_heads, 9, 2)
    got = m.flash_grouped_query(*lists(q, k, v), block_q=2, block_k=4, causal=causal)
    assert len(got) == n_heads
    for h in range(n_heads):
        kv_head = h // (n_heads // n_kv_heads)
        agrees(got[h], dense(q[h], k[kv_head], v[kv_head], causal))


@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (4, 1), (3, 3), (6, 2)])
def test_a_group_as_one_block(n_heads, n_kv_heads):
    """The same as head by head, and each k and v read once."""
    q = numbers(0, n_heads, 1, 3)
    k = numbers(1, n_kv_heads, 9, 3)
    v = numbers(2, n_kv_heads, 9, 2)
    traffic = m.Traffic()
    got = m.flash_packed_group(*lists(q, k, v), block_k=4, traffic=traffic)
    rows = [row for out, _ in got for row in out]
    for h in range(n_heads):
        kv_head = h // (n_heads // n_kv_heads)
        np.testing.assert_allclose(rows[h], dense(q[h], k[kv_head], v[kv_head])[0][0], **TIGHT)
    assert traffic.reads == n_heads * 3 + n_kv_heads * 9 * (3 + 2)


def paged(rows, page_size, seed):
    """rows (an array), scattered over pages; unused slots hold nan."""
    rng = random.Random(seed)
    n_pages = math.ceil(len(rows) / page_size)
    pages = [[[math.nan] * rows.shape[1] for _ in range(page_size)] for _ in range(n_pages + 4)]
    table = rng.sample(range(n_pages + 4), n_pages)
    for j, row in enumerate(rows.tolist()):
        pages[table[j // page_size]][j % page_size] = row
    return m.PagedRows(pages, table, len(rows))


@pytest.mark.parametrize("page_size", [1, 3, 4, 50])
@pytest.mark.parametrize("block_k", [1, 3, 5])
def test_pages(page_size, block_k):
    q, k, v = inputs(6, 11, 3, 2)
    k_pages = paged(k, page_size, 1)
    v_pages = paged(v, page_size, 2)
    assert list(k_pages) == k.tolist()
    assert k_pages[-1] == k[-1].tolist()
    assert k_pages[4:9] == k[4:9].tolist()
    with pytest.raises(IndexError):
        k_pages[11]
    for attend in VERSIONS:
        for causal in (False, True):
            got = attend(q.tolist(), k_pages, v_pages, block_q=4, block_k=block_k, causal=causal)
            agrees(got, dense(q, k, v, causal))


# FlashAttention-3 and -4


def e4m3_values():
    """All e4m3 numbers from 0 up, by their definition: 4 bits of exponent, 3 of fraction."""
    values = []
    for bits in range(127):  # pattern 127 is NaN
        exponent, fraction = bits >> 3, bits & 7
        if exponent == 0:
            values.append(fraction / 8 * 2.0 ** -6)
        else:
            values.append((1 + fraction / 8) * 2.0 ** (exponent - 7))
    return values


def test_e4m3_is_the_nearest_of_the_format():
    values = e4m3_values()
    assert max(values) == m.E4M3_MAX == 448
    for bits, (x, above) in enumerate(zip(values, values[1:])):
        middle = (x + above) / 2
        assert m.round_to_e4m3(x) == x
        assert m.round_to_e4m3(-x) == -x
        assert m.round_to_e4m3(middle) == (x if bits % 2 == 0 else above)  # the even pattern
        assert m.round_to_e4m3(middle * (1 + 1e-12)) == above
        assert m.round_to_e4m3(middle * (1 - 1e-12)) == x
    assert m.round_to_e4m3(1e9) == 448
    assert m.round_to_e4m3(-449.0) == -448
    assert m.round_to_e4m3(1e-9) == 0


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_block_quantization(block):
    x = numbers(0, 7, 4) * np.logspace(0, 9, 7)[:, None]
    values = np.array(e4m3_values())
    grid = np.concatenate([-values, values])
    got = np.array(m.quantize_blocks(x.tolist(), block))
    for start in range(0, 7, block):
        rows = slice(start, start + block)
        scale = np.abs(x[rows]).max() / 448
        nearest = np.abs(x[rows, :, None] / scale - grid).argmin(axis=2)
        np.testing.assert_allclose(got[rows], grid[nearest] * scale, rtol=1e-14, atol=0)
    assert m.quantize_blocks([[0.0, 0.0]], block) == [[0.0, 0.0]]


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_hadamard_rotation(d):
    signs = np.random.default_rng(d).choice([-1.0, 1.0], size=d)
    entries = [[(-1) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    rotation = np.diag(signs) @ np.array(entries) / math.sqrt(d)
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
def test_a_threshold_changes_nothing_but_the_reference(threshold, tile, size):
    scores = numbers(0, 40, size=size)
    v = numbers(1, 40, 3)
    state = m.empty_state(3)
    for start in range(0, 40, tile):
        part = slice(start, start + tile)
        old = state
        state = m.absorb_lazily(old, scores[part].tolist(), v[part].T.tolist(), threshold)
        largest = scores[part].max()
        assert state.m == (largest if largest > old.m + threshold else old.m)
    out, lse = m.finish(state)
    exps = np.exp(scores - scores.max())
    np.testing.assert_allclose(out, exps @ v / exps.sum(), **TIGHT)
    np.testing.assert_allclose(lse, scores.max() + math.log(exps.sum()), **TIGHT)


def test_the_threshold():
    assert pytest.approx(math.log(256), abs=1e-15) == m.RESCALE_THRESHOLD
    state = m.absorb_lazily(m.State(0.0, 1.0, [1.0]), [5.0], [[1.0]], 5.0)
    assert state.m == 0.0  # exceeded, not met


def test_the_polynomial():
    """Within 1e-4 of 2^x, exact at whole numbers, and growing."""
    xs = np.linspace(-20, 3, 5001)
    got = np.array([m.exp2_by_polynomial(x) for x in xs])
    assert 8e-5 < np.abs(got / 2**xs - 1).max() < 9e-5
    assert (np.diff(got) > 0).all()
    assert [m.exp2_by_polynomial(float(n)) for n in range(-3, 4)] == [2.0**n for n in range(-3, 4)]


# The experiments


def test_a_run_by_hand():
    """2 queries and keys, d = 1, tiles of 1 × 1."""
    sizes = m.Sizes(2, 1, 1, 1)
    run = m.run_attention("version 2", sizes, causal=True)
    assert (run.read, run.written, run.tiles) == (2 + 3 * 2, 4, 3)
    assert run.formula == (8, 4)
    assert run.error < 1e-14
    run = m.run_attention("version 1", sizes)
    # k and v; q, o, m and l at each of 4 tiles; and o, m and l written first
    assert (run.read, run.written) == (4 + 4 * 4, 6 + 4 * 3)
    assert m.crossings_by_formula("standard", sizes) == (8 + 6, 8 + 4)


@pytest.mark.parametrize("n, d, block_q, block_k", [(7, 3, 2, 3), (9, 2, 9, 1), (5, 1, 1, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_formulas_are_what_is_counted(n, d, block_q, block_k, causal):
    sizes = m.Sizes(n, d, block_q, block_k)
    for attention in ("standard", "version 1", "version 2"):
        run = m.run_attention(attention, sizes, causal)
        assert (run.read, run.written) == run.formula
    assert m.run_backward(sizes, causal).rows == m.backward_by_formula(sizes, causal)


def test_the_reference_of_the_trace():
    for options in ({}, {"causal": True}, {"causal": True, "window": 2}, {"sink": 0.5}):
        arrays = inputs(5, 5, 3, 2)
        agrees(m.attention_by_definition(*lists(*arrays), **options), dense(*arrays, **options))


def test_moving_and_computing_by_hand():
    a100, h100 = m.move_and_compute(8192, 128, 128)
    assert a100["computing"] == pytest.approx(4 * 8192**2 * 128 / 312e12 * 1e3)
    standard = 4 * 8192**2 + 4 * 8192 * 128 + 8192
    assert a100["standard"] == pytest.approx(2 * standard / 2039e9 * 1e3)
    assert h100["flash, L2"] == pytest.approx(2 * (4 * 8192 * 128 + 8192) / 3350e9 * 1e3)
    assert h100["flash, no L2"] == pytest.approx(
        2 * (64 * 8192 * 256 + 2 * 8192 * 128 + 8192) / 3350e9 * 1e3)


def test_the_cards():
    """FLOP/s = SMs × FLOPs a clock × boost clock, from the white papers."""
    assert m.A100_SHEET.flops == pytest.approx(108 * 2048 * 1.41e9, rel=1e-3)
    assert m.H100_SHEET.flops == pytest.approx(132 * 4096 * 1.83e9, rel=1e-3)
    assert (m.A100_SHEET.n_sms, m.H100_SHEET.n_sms) == (108, 132)


def test_the_real_tiles():
    """What they take of an SM, worked out by hand, and their traffic."""
    kilobytes = [tile.sram_kb for tile in m.REAL_TILES]
    assert kilobytes == [16 + 32, 32 + 32, 24 + 4 * 24 + 72, 32 + 4 * 44]
    assert all(tile.sram_kb <= tile.of_kb for tile in m.REAL_TILES)
    gains = [round(tile.gain, 1) for tile in m.REAL_TILES]
    assert gains == [4.0, 2.0, 5.9, 3.9]


def test_the_steps_of_online_softmax_by_hand():
    log2 = math.log(2)
    scores = [1 * log2, 3 * log2, 2 * log2, 5 * log2, 0.0]
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


def test_the_walks_are_drawn():
    sizes = m.Sizes(4, 1, 2, 2)
    runs = [m.run_attention(f"version {i}", sizes, causal=True) for i in (1, 2)]
    pictures = [line.split() for line in m.draw_walks(sizes, *runs)]
    assert pictures[1] == ["▒1", "·", "▒1", "·"]
    assert pictures[2] == ["█2", "▒3", "█2", "▒3"]


def test_what_stands_in_the_outer_loop_should_be_long():
    """As section 5 says: blocks of keys in version 1, blocks of queries in version 2."""
    long_queries = m.Sizes(48, 16, 24, 4)
    long_keys = m.Sizes(48, 16, 4, 24)
    for version, better, worse in (("version 1", long_keys, long_queries),
                                   ("version 2", long_queries, long_keys)):
        less = m.run_attention(version, better).crossed
        more = m.run_attention(version, worse).crossed
        assert 2 * less < more


def test_the_clock_cycles_of_section_10():
    """4 · 128³ FLOPs and 128² exponentials, by what an SM makes in a clock."""
    assert [4 * 128**3 // flops for flops in (4096, 8192)] == [2048, 1024]
    assert 128**2 // 16 == 1024


def test_the_sizes_of_section_1():
    """134 MB for S, 18 MB for all SRAM of an A100, 64 numbers of S and P for one of q, k, v, O."""
    assert round(2 * 8192**2 / 1e6) == 134
    assert round(108 * 164 * 1024 / 1e6) == 18
    assert 4 * 8192**2 / (4 * 8192 * 128) == 64


seeds = pytest.mark.parametrize("seed", range(5))


@seeds
def test_flash_moves_less_at_the_default_sizes(seed):
    sizes = m.Sizes(m.SEQ_LEN, m.HEAD_DIM, m.BLOCK_Q, m.BLOCK_K, m.SRAM, seed)
    standard, first, second = (m.run_attention(name, sizes)
                               for name in ("standard", "version 1", "version 2"))
    assert second.crossed < first.crossed < standard.crossed
    blocks = m.backward_blocks(m.BLOCK_Q, m.BLOCK_K, m.HEAD_DIM, m.HEAD_DIM, m.SRAM)
    run = m.run_backward(sizes._replace(block_q=blocks[0], block_k=blocks[1]), causal=False)
    standard, flash = run.rows
    assert flash.crossed < standard.crossed
    assert flash.kept < standard.kept
    assert flash.multiply_adds == 1.25 * standard.multiply_adds
    assert run.error < 1e-12
    assert m.slope_error(seed) < 1e-8


@seeds
def test_rotation_helps_where_channels_are_wide(seed):
    wide = m.compare_fp8("wide", [5.0] * 2 + [1.0] * 30, seed)
    assert wide.rotated < wide.tile_scale / 1.4
    assert wide.rotated < wide.one_scale / 1.4
    normal = m.compare_fp8("normal", [1.0] * 32, seed)
    assert normal.rotated == pytest.approx(normal.tile_scale, rel=0.25)
    assert normal.one_scale == pytest.approx(normal.tile_scale, rel=0.25)
    assert max(wide.rotation, normal.rotation) < 1e-12


@seeds
def test_m_lags_behind_nearly_always(seed):
    random_scores, slow, fast = m.rescaled_rows(seed)
    assert random_scores.always > 50
    assert random_scores.lazily == 0
    assert (slow.always, slow.lazily) == (7, 3)
    assert (fast.always, fast.lazily) == (7, 7)
    assert all(row.largest <= 256 for row in (random_scores, slow, fast))
    assert slow.largest == pytest.approx(math.exp(5.5))


@seeds
def test_decoding_by_groups(seed):
    apart, together = m.run_decoding(m.Sizes(20, 3, 4, 4, seed=seed))
    assert (apart.read, together.read) == (4 * (3 + 20 * 6), 4 * 3 + 2 * 20 * 6)
    assert max(apart.error, together.error) < 1e-12


@seeds
def test_the_variants(seed):
    rows = m.run_variants(m.Sizes(20, 3, 4, 5, seed=seed), 5, 1.0, 6, [2, 5, 0, 3])
    causal, near, sink, pages = rows
    assert near.crossed < causal.crossed == sink.crossed == pages.crossed
    assert max(row.error for row in rows) < 1e-12


# The arguments


def test_arguments_are_left_as_they_were():
    q, k, v = lists(*inputs(5, 5, 2, 2))
    out, lse = m.flash_attention(q, k, v, block_q=2, block_k=2)
    d_out = numbers(9, 5, 2).tolist()
    signs = [1.0, -1.0]
    state = m.State(1.0, 2.0, [3.0])
    blocks = {"block_q": 2, "block_k": 3}
    before = repr((q, k, v, out, lse, d_out, signs, state))
    m.standard_attention(q, k, v, causal=True)
    m.flash_attention_v1(q, k, v, **blocks)
    m.flash_attention_backward(q, k, v, out, lse, d_out, **blocks)
    m.standard_attention_backward(q, k, v, [[0.2] * 5] * 5, d_out)
    m.merge_partials([(out, lse), (out, lse)])
    m.flash_decode(q, k, v, n_splits=2, **blocks)
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
    options = {"block_q": 2, "block_k": 2, option: value}
    with pytest.raises(ValueError, match=f"{option} .*not {value}"):
        attend(q, k, v, **options)
    with pytest.raises(ValueError, match=f"{option} .*not {value}"):
        m.flash_attention_backward(q, k, v, q, [0.0] * 3, q, **options)


ONE = {"block_q": 1, "block_k": 1}
REFUSED = [
    ("rows", lambda q, k, v: m.flash_attention(q, k, v[:-1], **ONE)),
    ("at least one", lambda q, k, v: m.flash_attention(q, [], [], **ONE)),
    ("at least one channel", lambda q, k, v: m.flash_attention(q, k, [[]] * 4, **ONE)),
    ("channels", lambda q, k, v: m.standard_attention([[1.0]], k, v)),
    ("window", lambda q, k, v: m.flash_attention(q, k, v, window=0, **ONE)),
    ("keys must be a run", lambda q, k, v: m.flash_attention(q, k, v, keys=range(2, 5), **ONE)),
    ("keys must be a run", lambda q, k, v: m.flash_attention(q, k, v, keys=range(-1, 2), **ONE)),
    ("keys must be a run", lambda q, k, v: m.flash_attention(q, k, v, keys=range(0, 4, 2), **ONE)),
    ("n_splits", lambda q, k, v: m.flash_decode(q, k, v, n_splits=0)),
    ("out must", lambda q, k, v: m.flash_attention_backward(q, k, v, q[:2], [0.0] * 3, q, **ONE)),
    ("lse must", lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 2, q, **ONE)),
    ("d_out must", lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 3, q[:1], **ONE)),
    ("d_out must", lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 3, [[1.0]] * 3,
                                                              **ONE)),
    ("weights must", lambda q, k, v: m.standard_attention_backward(q, k, v, [], q)),
    ("weights must", lambda q, k, v: m.standard_attention_backward(q, k, v, q, q)),
    ("d_out must", lambda q, k, v: m.standard_attention_backward(q, k, v, [[0.25] * 4] * 3, q[:2])),
    ("parts", lambda q, k, v: m.merge_partials([])),
    ("parts", lambda q, k, v: m.merge_partials([(q, [0.0] * 3), (q[:2], [0.0] * 2)])),
    ("divide", lambda q, k, v: m.flash_grouped_query([q] * 3, [k] * 2, [v] * 2, **ONE)),
    ("divide", lambda q, k, v: m.flash_grouped_query([q], [k] * 2, [v] * 2, **ONE)),
    ("divide", lambda q, k, v: m.flash_grouped_query([q] * 2, [k] * 2, [v], **ONE)),
    ("divide", lambda q, k, v: m.flash_packed_group([q], [], [], block_k=1)),
    ("n must be at most", lambda q, k, v: m.PagedRows([k], [0], 5)),
    ("power of two", lambda q, k, v: m.hadamard_rotate([[1.0] * 3], [1.0] * 3)),
    ("power of two", lambda q, k, v: m.hadamard_rotate([[]], [])),
    ("signs", lambda q, k, v: m.hadamard_rotate(q, [1.0] * 4)),
]


@pytest.mark.parametrize("words, call", REFUSED, ids=[f"{i} {words}" for i, (words, _)
                                                      in enumerate(REFUSED)])
def test_what_does_not_fit_together_is_refused(words, call):
    with pytest.raises(ValueError, match=words):
        call(*lists(*inputs(3, 4, 2, 2)))
