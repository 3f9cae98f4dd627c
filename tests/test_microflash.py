"""microflash against dense numpy references written from the definitions; nothing is shared with the script."""

import itertools
import math
import random

import numpy as np
import pytest

import microflash as m

TIGHT = dict(rtol=0, atol=1e-12)
INF = math.inf


def numbers(seed, *shape, size=1.0):
    return np.random.default_rng(seed).normal(size=shape) * size


def inputs(n_q, n_k, d, d_v, seed=0, size=1.0):
    return numbers(seed, n_q, d, size=size), numbers(seed + 1, n_k, d), numbers(seed + 2, n_k, d_v)


def lists(*arrays):
    return [a.tolist() for a in arrays]


# ------------------------------------------------------------------------------ the naive reference

def mask(n_q, n_k, causal=False, window=None):
    """Who sees whom, [n_q][n_k], element by element from the words of the docstring."""
    seen = np.ones((n_q, n_k), bool)
    for i in range(n_q):
        for j in range(n_k):
            position = n_k - n_q + i
            seen[i, j] = not (causal and j > position) and not (window is not None and j <= position - window)
    return seen


def dense(q, k, v, causal=False, window=None, scale=None, keys=None):
    """(out, lse, weights) of dense attention; keys: the only ones that exist."""
    scores = q @ k.T * (1 / math.sqrt(q.shape[1]) if scale is None else scale)
    seen = mask(len(q), len(k), causal, window)
    if keys is not None:
        seen &= np.isin(np.arange(len(k)), list(keys))
    weights, lse = np.zeros_like(scores), np.full(len(q), -INF)
    for i in range(len(q)):
        if seen[i].any():
            row = scores[i, seen[i]]
            exps = np.exp(row - row.max())
            weights[i, seen[i]] = exps / exps.sum()
            lse[i] = row.max() + math.log(exps.sum())
    return weights @ v, lse, weights


def dense_backward(q, k, v, d_out, causal=False, window=None, scale=None):
    """dq, dk, dv through the full Jacobian of every row's softmax, diag(p) - p pᵀ."""
    scale = 1 / math.sqrt(q.shape[1]) if scale is None else scale
    _, _, weights = dense(q, k, v, causal, window, scale)
    d_scores = np.zeros_like(weights)
    for i, p in enumerate(weights):
        d_scores[i] = (np.diag(p) - np.outer(p, p)) @ (v @ d_out[i])
    return scale * d_scores @ k, scale * d_scores.T @ q, weights.T @ d_out


def agrees(got, expected, size=1.0):
    np.testing.assert_allclose(got[0], expected[0], rtol=0, atol=1e-12 * size)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-13, atol=1e-12 * size)


SHAPES = [(1, 1, 1, 1), (1, 7, 4, 3), (7, 7, 4, 4), (5, 13, 3, 5), (13, 5, 2, 7), (16, 16, 8, 1), (11, 11, 1, 2)]
BLOCKS = [(1, 1), (1, 5), (3, 1), (2, 3), (4, 4), (5, 100), (100, 3)]
VERSIONS = {
    "v1": m.flash_attention_v1,
    "v2": m.flash_attention,
    "decode": lambda *args, **options: m.flash_decode(*args, n_splits=3, **options),
    "decode, more splits than keys": lambda *args, **options: m.flash_decode(*args, n_splits=29, **options),
}
each_version = pytest.mark.parametrize("attend", VERSIONS.values(), ids=VERSIONS)


def paged(rows, page_size, seed=0):
    """rows (an array), scattered over pages."""
    rng, n_pages = random.Random(seed), -(-len(rows) // page_size)
    pages = [[[math.nan] * rows.shape[1] for _ in range(page_size)] for _ in range(n_pages + 4)]
    table = rng.sample(range(n_pages + 4), n_pages)
    for j, row in enumerate(rows.tolist()):
        pages[table[j // page_size]][j % page_size] = row
    return m.PagedRows(pages, table, len(rows))


# ------------------------------------------------------------------------------------- the forward

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(window=3, causal=True), dict(causal=True, window=99),
                                     dict(window=2), dict(scale=-2.0, causal=True), dict(scale=0.0)], ids=str)
def test_every_version_is_dense_attention_for_every_block(shape, options):
    arrays = inputs(*shape)
    q, k, v = lists(*arrays)
    expected = dense(*arrays, **options)
    agrees(m.standard_attention(q, k, v, **options), expected)
    for (block_q, block_k), attend in itertools.product(BLOCKS, [*VERSIONS.values()][:3]):
        agrees(attend(q, k, v, block_q=block_q, block_k=block_k, **options), expected)


@each_version
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_huge_scores(attend, size):
    q, k, v = inputs(9, 9, 4, 3, size=abs(size))
    k = k * np.sign(size)
    for causal in (False, True):
        expected = dense(q, k, v, causal)
        for options in (dict(block_q=2, block_k=1), dict(block_q=4, block_k=4)):
            got = attend(*lists(q, k, v), causal=causal, **options)
            assert np.isfinite(got[0]).all()
            agrees(got, expected, size=10)  # scores of 1e4 are rounded at 1e-12 already


@each_version
@pytest.mark.parametrize("row", [[0.0] * 9, [5.0] * 9, [-3.0, 7.0, 7.0, -3.0, 7.0, 7.0, 7.0, -1e4, 1e4], list(range(9)),
                                 list(range(9, 0, -1)), [-1e4] * 8 + [1e4], [1e4] + [-1e4] * 8, [-800.0] * 8 + [-1e4]], ids=str)
def test_ties_late_maxima_and_falling_rows(attend, row):
    """One query whose score for key j is row[j], with d = 1 and the scale 1."""
    k, v = np.array(row)[:, None], numbers(0, 9, 2)
    for block_k in (1, 2, 4, 9):
        got = attend([[1.0]], k.tolist(), v.tolist(), block_q=1, block_k=block_k, scale=1.0)
        agrees(got, dense(np.ones((1, 1)), k, v, scale=1.0))


@each_version
def test_queries_that_see_nothing_get_zeros_and_minus_infinity(attend):
    q, k, v = lists(*inputs(7, 4, 2, 3))
    for blocks in BLOCKS:
        out, lse = attend(q, k, v, block_q=blocks[0], block_k=blocks[1], causal=True)
        assert out[:3] == [[0.0] * 3] * 3 and lse[:3] == [-INF] * 3
        assert all(map(any, out[3:])) and np.isfinite(lse[3:]).all()
    assert m.standard_attention(q, k, v, causal=True)[1][:3] == [-INF] * 3


@each_version
def test_no_queries(attend):
    assert attend([], [[1.0]], [[1.0, 2.0]], block_q=2, block_k=2) == ([], [])


@pytest.mark.parametrize("keys", [range(0, 11), range(3, 8), range(10, 11), range(4, 4), range(0, 1)], ids=str)
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(causal=True, window=4)], ids=str)
def test_a_run_of_the_keys_keeps_its_positions(keys, options):
    arrays = inputs(8, 11, 3, 2)
    agrees(m.flash_attention(*lists(*arrays), keys=keys, block_q=3, block_k=2, **options), dense(*arrays, keys=keys, **options))


def test_online_and_safe_softmax():
    rows = [numbers(s, 23, size=size).tolist() for s, size in enumerate((1, 30, 1e4))]
    rows += [[0.0] * 5, [-INF, -INF, 2.0, 1.0], [-INF] * 3, [], [1e4], [3.0, -INF, 3.0], list(map(float, range(12)))]
    for row in rows:
        seen = np.array(row)[np.isfinite(row)] if row else np.array([])
        expected = [math.exp(s - seen.max()) / np.exp(seen - seen.max()).sum() if s > -INF else 0.0 for s in row]
        np.testing.assert_allclose(m.safe_softmax(row), expected, **TIGHT)
        for tile in (1, 2, 7, 100):
            np.testing.assert_allclose(m.online_softmax(row, tile=tile), expected, **TIGHT)
    for softmax, passes in ((m.safe_softmax, 3), (m.online_softmax, 2)):
        traffic = m.Traffic()
        softmax(rows[0], traffic=traffic)
        assert (traffic.reads, traffic.writes) == (passes * 23, 23)
    traffic = m.Traffic(sram=4)
    m.online_softmax(rows[0], tile=4, traffic=traffic)
    assert traffic.peak == 4
    with pytest.raises(ValueError, match="tile"):
        m.online_softmax([1.0], tile=0)


def test_one_step_of_the_recurrence():
    """A state that has seen some keys and takes in others equals one that has seen them all at once."""
    scores, v = numbers(0, 9, size=3.0), numbers(1, 9, 2)
    for cut in range(1, 9):
        state = (-INF, 0.0, [0.0, 0.0])
        for part in (slice(0, cut), slice(cut, 9)):
            state = m.absorb(state, scores[part].tolist(), v[part].T.tolist())
            seen = scores[:part.stop]
            exps = np.exp(seen - seen.max())
            assert state[0] == seen.max()
            np.testing.assert_allclose(state[1], exps.sum(), **TIGHT)
            np.testing.assert_allclose(state[2], exps @ v[:part.stop], **TIGHT)


# ------------------------------------------------------------------------------------- the backward

@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(causal=True, window=2), dict(scale=0.7), dict(window=3)], ids=str)
def test_backward_is_the_dense_backward(shape, options):
    q, k, v = inputs(*shape)
    d_out = numbers(9, shape[0], shape[3])
    expected = dense_backward(q, k, v, d_out, **options)
    out, lse, weights = dense(q, k, v, **options)
    everything = [m.standard_attention_backward(*lists(q, k, v, weights, d_out), scale=options.get("scale"))]
    everything += [m.flash_attention_backward(*lists(q, k, v, out, lse, d_out), block_q=block_q, block_k=block_k, **options)
                   for block_q, block_k in BLOCKS]
    for gradients in everything:
        for got, want in zip(gradients, expected):
            np.testing.assert_allclose(got, want, **TIGHT)


@pytest.mark.parametrize("causal", [False, True])
def test_backward_is_the_slope_of_the_forward(causal):
    """Central differences of Σ d_out ∘ out through flash_attention itself, every entry of q, k and v."""
    arrays, d_out = inputs(4, 6, 3, 2), numbers(9, 4, 2)
    options, step = dict(block_q=3, block_k=2, causal=causal), 1e-5

    def loss(arrays):
        return (np.array(m.flash_attention(*lists(*arrays), **options)[0]) * d_out).sum()

    out, lse = m.flash_attention(*lists(*arrays), **options)
    gradients = m.flash_attention_backward(*lists(*arrays), out, lse, d_out.tolist(), **options)
    for which, gradient in enumerate(gradients):
        for index in np.ndindex(arrays[which].shape):
            up, down = ([a.copy() for a in arrays] for _ in "ab")
            up[which][index] += step
            down[which][index] -= step
            assert abs((loss(up) - loss(down)) / (2 * step) - gradient[index[0]][index[1]]) < 1e-8


def test_backward_with_huge_scores_is_finite():
    q, k, v = inputs(6, 6, 2, 2, size=1e4)
    d_out = numbers(9, 6, 2)
    out, lse = m.flash_attention(*lists(q, k, v), block_q=2, block_k=2)
    gradients = m.flash_attention_backward(*lists(q, k, v), out, lse, d_out.tolist(), block_q=2, block_k=3)
    assert all(np.isfinite(g).all() for g in gradients)
    for got, want in zip(gradients, dense_backward(q, k, v, d_out)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)  # exp(s - L) of s near 1e4, rounded at 1e-12, times q


# ---------------------------------------------------------------------------------------- the traffic

def covered(n, block):
    return [(a, min(a + block, n)) for a in range(0, n, block)]


def count(version, n_q, n_k, d, d_v, block_q, block_k, causal, window=None):
    """(reads, writes, peak, tiles), counted from the words of the algorithms over a dense mask, one tile at a time."""
    seen = mask(n_q, n_k, causal, window)
    reads = writes = peak = 0
    visited = []
    if version == "v1":
        writes += n_q * d_v + 2 * n_q                                           # o, m and l begin in HBM
        for j0, j1 in covered(n_k, block_k):
            reads += (j1 - j0) * (d + d_v)
            peak = max(peak, (j1 - j0) * (d + d_v))
            for i0, i1 in covered(n_q, block_q):
                if seen[i0:i1, j0:j1].any():
                    rows = i1 - i0
                    visited.append((range(i0, i1), range(j0, j1)))
                    reads += rows * (d + d_v + 2)
                    writes += rows * (d_v + 2)
                    peak = max(peak, (j1 - j0) * (d + d_v) + rows * (d + d_v + 2) + rows * (j1 - j0))
    if version == "v2":
        for i0, i1 in covered(n_q, block_q):
            rows = i1 - i0
            reads += rows * d
            writes += rows * (d_v + 1)
            peak = max(peak, rows * (d + d_v + 2))
            for j0, j1 in covered(n_k, block_k):
                if seen[i0:i1, j0:j1].any():
                    visited.append((range(i0, i1), range(j0, j1)))
                    reads += (j1 - j0) * (d + d_v)
                    peak = max(peak, (j1 - j0) * (d + d_v) + rows * (d + d_v + 2) + rows * (j1 - j0))
    if version == "backward":
        writes += n_q * d                                                       # dq begins in HBM, as zeros
        for i0, i1 in covered(n_q, block_q):                                    # D = rowsum(dO ∘ O)
            reads += (i1 - i0) * 2 * d_v
            writes += i1 - i0
            peak = max(peak, (i1 - i0) * 2 * d_v)
        for j0, j1 in covered(n_k, block_k):
            keys = j1 - j0
            reads += keys * (d + d_v)
            writes += keys * (d + d_v)
            peak = max(peak, 2 * keys * (d + d_v))
            for i0, i1 in covered(n_q, block_q):
                if seen[i0:i1, j0:j1].any():
                    rows = i1 - i0
                    visited.append((range(i0, i1), range(j0, j1)))
                    reads += rows * (d + d_v + d + 1 + 1)                       # q, dO, dq, L, D
                    writes += rows * d
                    peak = max(peak, 2 * keys * (d + d_v) + rows * (2 * d + d_v + 2) + 2 * rows * keys)
    return reads, writes, peak, visited


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("causal, window", [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("blocks", BLOCKS, ids=str)
def test_traffic_is_what_an_independent_count_says(shape, causal, window, blocks):
    arrays = inputs(*shape)
    q, k, v = lists(*arrays)
    options = dict(block_q=blocks[0], block_k=blocks[1], causal=causal, window=window)
    for version, attend in (("v1", m.flash_attention_v1), ("v2", m.flash_attention)):
        reads, writes, peak, visited = count(version, *shape, *blocks, causal, window)
        traffic = m.Traffic(sram=peak, draw=True)
        attend(q, k, v, traffic=traffic, **options)
        assert (traffic.reads, traffic.writes, traffic.peak, traffic.walk) == (reads, writes, peak, visited)
        assert traffic.accesses == reads + writes and traffic.held == 0 and traffic.tiles == len(visited)
        with pytest.raises(ValueError):
            attend(q, k, v, traffic=m.Traffic(sram=peak - 1), **options)
    reads, writes, peak, visited = count("backward", *shape, *blocks, causal, window)
    out, lse, _ = dense(*arrays, causal, window)
    traffic = m.Traffic(sram=peak, draw=True)
    m.flash_attention_backward(q, k, v, *lists(out, lse, numbers(9, shape[0], shape[3])), traffic=traffic, **options)
    assert (traffic.reads, traffic.writes, traffic.peak, traffic.walk) == (reads, writes, peak, visited)


@pytest.mark.parametrize("n_q, n_k, d, d_v", SHAPES + [(13, 1, 1, 9)])
def test_standard_traffic_and_the_formulas(n_q, n_k, d, d_v):
    q, k, v = lists(*inputs(n_q, n_k, d, d_v))
    for causal in (False, True):
        traffic = m.Traffic()
        m.standard_attention(q, k, v, causal=causal, traffic=traffic)
        assert traffic.reads == n_q * d + n_k * d + n_q * n_k + n_q * n_k + n_k * d_v
        assert traffic.writes == n_q * n_k + n_q * n_k + n_q + n_q * d_v
        assert traffic.accesses == m.standard_accesses(n_q, n_k, d, d_v)
    traffic = m.Traffic()
    weights, d_out = dense(*inputs(n_q, n_k, d, d_v))[2], numbers(9, n_q, d_v)
    m.standard_attention_backward(q, k, v, *lists(weights, d_out), traffic=traffic)
    assert traffic.reads == 5 * n_q * n_k + 2 * n_q * d_v + n_k * d_v + n_k * d + n_q * d
    assert traffic.writes == 2 * n_q * n_k + n_k * d_v + n_q * d + n_k * d
    for block_q, block_k in BLOCKS:
        reads, writes, peak, _ = count("v2", n_q, n_k, d, d_v, block_q, block_k, False)
        assert reads + writes == m.flash_accesses(n_q, n_k, d, d_v, block_q)
        block_q, block_k = min(block_q, n_q), min(block_k, n_k)
        assert peak == m.sram_needed(block_q, block_k, d, d_v)
        assert count("backward", n_q, n_k, d, d_v, block_q, block_k, False)[2] == m.sram_needed_backward(block_q, block_k, d, d_v)


@pytest.mark.parametrize("sram", [5, 12, 13, 20, 21, 57, 100, 1000])
def test_blocks_that_fit_are_all_that_fit_and_no_larger(sram):
    n_q, n_k, d, d_v = 6, 9, 2, 3
    expected = []
    for block_q in range(1, n_q + 1):
        fitting = [b for b in range(1, n_k + 1) if m.sram_needed(block_q, b, d, d_v) <= sram]
        expected += [(block_q, max(fitting))] if fitting else []
    assert m.blocks_that_fit(sram, d, d_v, n_q, n_k) == expected
    q, k, v = lists(*inputs(n_q, n_k, d, d_v))
    for block_q, block_k in expected:
        traffic = m.Traffic(sram=sram)
        agrees(m.flash_attention(q, k, v, block_q=block_q, block_k=block_k, traffic=traffic), dense(*map(np.array, (q, k, v))))
        assert traffic.peak <= sram


def test_traffic_moves_copies():
    assert m.Traffic().walk is None
    hbm, matrix = m.Traffic(sram=6), [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    with hbm.frame():
        tile = hbm.load(matrix, range(1, 3))
        assert tile == [[3.0, 4.0], [5.0, 6.0]] and (hbm.reads, hbm.held, hbm.peak) == (4, 4, 4)
        tile[0][0] = 9.0
        assert matrix[1][0] == 3.0
        assert hbm.load([7.0, 8.0, 9.0], range(0, 2)) == [7.0, 8.0] and hbm.held == 6
        with pytest.raises(ValueError, match="6 numbers and would have to hold 7"):
            hbm.hold(1)
    assert hbm.held == 0 and hbm.reads == 6
    for rows in (range(0, 2), range(0, 0), range(4, 5)):
        with pytest.raises(ValueError, match="tile must"):
            hbm.store(matrix, rows, [[0.0, 0.0]])
    hbm.store(matrix, range(0, 1), [[0.0, 0.0]])
    assert matrix[0] == [0.0, 0.0] and hbm.writes == 2 and hbm.accesses == 8


def test_powers_are_found_again():
    points = [(n, d, s) for n in (2, 5, 9) for d in (1, 4, 6) for s in (3, 7)]
    fit = m.fit_powers(points, [3.5 * n**2 * d**1.5 / s for n, d, s in points])
    assert fit == pytest.approx([3.5, 2, 1.5, -1], abs=1e-9)


def test_operations_are_counted():
    a, b = [[1.0, 2.0, 3.0]], [[4.0], [5.0], [6.0]]
    assert m.count_operations(lambda x, y: m.multiply(x, y), a, b) == 3
    assert m.count_operations(lambda x: [v / 2 * 3 - 1 + v for v in x[0]], a) == 6
    assert m.count_operations(lambda x: [2 * v * 2 for v in x[0]], a) == 6


# ------------------------------------------------------------------------------------ splits and merging

@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 13])
def test_partials_merge_in_any_order_and_tree(n_parts):
    rng = random.Random(n_parts)
    arrays = inputs(4, 13, 3, 2, size=20.0)
    k, v = arrays[1], arrays[2]
    owners = [rng.randrange(n_parts) for _ in range(13)]  # any sets of keys, not runs
    parts = []
    for part in range(n_parts):
        out, lse, _ = dense(*arrays, keys=[j for j in range(13) if owners[j] == part])
        parts.append((out.tolist(), lse.tolist()))
    expected = dense(*arrays)
    for _ in range(10):
        rng.shuffle(parts)
        agrees(m.merge_partials(parts), expected)
        tree = parts[:]
        while len(tree) > 1:
            taken = [tree.pop(rng.randrange(len(tree))) for _ in range(min(len(tree), rng.randint(2, 3)))]
            tree.append(m.merge_partials(taken))
        agrees(tree[0], expected)


def test_merging_what_saw_nothing():
    nothing, something = ([[0.0, 0.0]], [-INF]), ([[1.0, 2.0]], [-900.0])
    assert m.merge_partials([nothing, nothing]) == nothing
    assert m.merge_partials([nothing, something, nothing]) == something
    agrees(m.merge_partials([([[4.0]], [1e4]), ([[2.0]], [1e4]), ([[99.0]], [-1e4])]), ([[3.0]], [1e4 + math.log(2)]))


@pytest.mark.parametrize("n, n_splits", [(10, 1), (10, 3), (10, 10), (3, 7), (0, 2)])
def test_splits_are_even_and_cover(n, n_splits):
    runs = m.split_evenly(n, n_splits)
    assert [j for run in runs for j in run] == list(range(n)) and len(runs) == n_splits
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_decode_counts_its_partials():
    n_k, d, d_v, n_splits = 12, 3, 2, 4
    q, k, v = lists(*inputs(1, n_k, d, d_v))
    traffic = m.Traffic()
    m.flash_decode(q, k, v, n_splits=n_splits, block_q=1, block_k=2, traffic=traffic)
    assert traffic.reads == n_splits * d + n_k * (d + d_v) + n_splits * (d_v + 1)
    assert traffic.writes == (n_splits + 1) * (d_v + 1)


@pytest.mark.parametrize("work, n_tiles, expected", [(1, 1000, 108), (8, 512, 13), (8, 8, 8), (54, 9, 2), (55, 9, 1), (500, 9, 1)])
def test_splits_that_fill_a_card(work, n_tiles, expected):
    assert m.splits_that_fill(m.A100, work, n_tiles) == expected


# --------------------------------------------------------------------------------------- the family

@pytest.mark.parametrize("n_heads, n_kv_heads", [(4, 2), (4, 1), (3, 3), (6, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(n_heads, n_kv_heads, causal):
    q = numbers(0, n_heads, 5, 3)
    k, v = numbers(1, n_kv_heads, 9, 3), numbers(2, n_kv_heads, 9, 2)
    got = m.flash_grouped_query(*lists(q, k, v), block_q=2, block_k=4, causal=causal)
    k, v = (np.repeat(a, n_heads // n_kv_heads, axis=0) for a in (k, v))
    assert len(got) == n_heads
    for h in range(n_heads):
        agrees(got[h], dense(q[h], k[h], v[h], causal))


@pytest.mark.parametrize("page_size", [1, 3, 4, 50])
@pytest.mark.parametrize("block_k", [1, 3, 5])
def test_pages(page_size, block_k):
    q, k, v = inputs(6, 11, 3, 2)
    k_pages, v_pages = paged(k, page_size, 1), paged(v, page_size, 2)
    assert list(k_pages) == k.tolist() and k_pages[-1] == k[-1].tolist() and k_pages[4:9] == k[4:9].tolist()
    with pytest.raises(IndexError):
        k_pages[11]
    for attend in (m.flash_attention, m.flash_attention_v1, VERSIONS["decode"]):
        for causal in (False, True):
            agrees(attend(q.tolist(), k_pages, v_pages, block_q=4, block_k=block_k, causal=causal), dense(q, k, v, causal))


def test_versions_decode_and_pages_are_one_and_the_same():
    arrays = inputs(10, 17, 5, 3)
    q, k, v = lists(*arrays)
    for causal in (False, True):
        expected = m.standard_attention(q, k, v, causal=causal)
        options = dict(block_q=4, block_k=5, causal=causal)
        for attend in VERSIONS.values():
            agrees(attend(q, k, v, **options), expected)
        agrees(m.flash_attention(q, paged(arrays[1], 3), paged(arrays[2], 4), **options), expected)


# ---------------------------------------------------------------------------------- versions 3 and 4

def e4m3_values():
    """All finite e4m3 numbers, from the format's definition: sign, 4 bits of exponent (bias 7), 3 of fraction."""
    values = []
    for bits in range(128):
        exponent, fraction = bits >> 3, bits & 7
        values.append(fraction / 8 * 2.0 ** -6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return values[:127]  # the last pattern is NaN


def test_e4m3_is_the_nearest_of_the_format():
    values = e4m3_values()
    assert max(values) == m.E4M3_MAX == 448 and min(v for v in values if v) == 2.0 ** -9
    for bits, x in enumerate(values):
        assert m.round_to_e4m3(x) == x and m.round_to_e4m3(-x) == -x
        if bits + 1 < len(values):
            middle, above = (x + values[bits + 1]) / 2, values[bits + 1]
            assert m.round_to_e4m3(middle) == (x if bits % 2 == 0 else above)  # ties to the even pattern
            assert m.round_to_e4m3(middle * (1 + 1e-12)) == above and m.round_to_e4m3(middle * (1 - 1e-12)) == x
    assert m.round_to_e4m3(1e9) == 448 and m.round_to_e4m3(-449.0) == -448 and m.round_to_e4m3(1e-9) == 0


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_block_quantization(block):
    x = numbers(0, 7, 4) * np.logspace(0, 9, 7)[:, None]
    values = np.array(e4m3_values())
    grid = np.concatenate([-values, values])
    got = np.array(m.quantize_blocks(x.tolist(), block))
    for start in range(0, 7, block):
        rows = slice(start, start + block)
        scale = np.abs(x[rows]).max() / 448
        nearest = grid[np.abs(x[rows, :, None] / scale - grid).argmin(axis=2)] * scale
        np.testing.assert_allclose(got[rows], nearest, rtol=1e-14, atol=0)
    assert m.quantize_blocks([[0.0, 0.0]], block) == [[0.0, 0.0]]


@pytest.mark.parametrize("d", [1, 2, 8, 64])
def test_hadamard_rotation(d):
    signs = np.random.default_rng(d).choice([-1.0, 1.0], size=d)
    hadamard = np.array([[(-1) ** bin(i & j).count("1") for j in range(d)] for i in range(d)]) / math.sqrt(d)
    x, y = numbers(0, 5, d), numbers(1, 5, d)
    np.testing.assert_allclose(m.hadamard_rotate(x.tolist(), signs.tolist()), x @ np.diag(signs) @ hadamard, **TIGHT)
    a, b = (np.array(m.hadamard_rotate(z.tolist(), signs.tolist())) for z in (x, y))
    np.testing.assert_allclose(a @ b.T, x @ y.T, rtol=0, atol=1e-12 * d)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 5.0, m.RESCALE_THRESHOLD, 100.0])
@pytest.mark.parametrize("tile", [1, 3, 40])
def test_a_threshold_changes_nothing_but_the_reference(threshold, tile):
    for size in (1.0, 30.0):
        scores, v = numbers(0, 40, size=size), numbers(1, 40, 3)
        state, references = (-INF, 0.0, [0.0] * 3), []
        for start in range(0, 40, tile):
            part = slice(start, start + tile)
            old = state[0]
            state = m.absorb(state, scores[part].tolist(), v[part].T.tolist(), threshold)
            top = scores[part].max()
            assert state[0] == (top if top > old + threshold else old)
            references.append(state[0])
        exps = np.exp(scores - scores.max())
        agrees(([m.finish(state)[0]], [m.finish(state)[1]]),
               ([exps @ v / exps.sum()], [scores.max() + math.log(exps.sum())]))
        moves = sum(a != b for a, b in zip(references, references[1:]))
        assert m.count_rescalings([scores.tolist()] * 2, tile, threshold) == 2 * moves
    assert m.absorb((0.0, 1.0, [1.0]), [5.0], [[1.0]], 5.0)[0] == 0.0  # exceeded, not met
    assert m.RESCALE_THRESHOLD == pytest.approx(math.log(256), abs=1e-15)


# ------------------------------------------------------------------------------------- the arguments

def test_arguments_are_left_as_they_were():
    q, k, v = lists(*inputs(5, 5, 2, 2))
    out, lse = m.flash_attention(q, k, v, block_q=2, block_k=2)
    d_out, signs, blocks = numbers(9, 5, 2).tolist(), [1.0, -1.0], dict(block_q=2, block_k=3)
    before = repr((q, k, v, out, lse, d_out, signs))
    m.standard_attention(q, k, v, causal=True)
    m.flash_attention_v1(q, k, v, **blocks)
    m.flash_attention_backward(q, k, v, out, lse, d_out, **blocks)
    m.standard_attention_backward(q, k, v, [[0.2] * 5] * 5, d_out)
    m.merge_partials([(out, lse), (out, lse)])
    m.flash_decode(q, k, v, n_splits=2, **blocks)
    m.quantize_blocks(q, 2)
    m.hadamard_rotate(q, signs)
    m.online_softmax(lse)
    state, row = (1.0, 2.0, [3.0]), [5.0, 6.0]
    m.absorb(state, row, [[1.0, 2.0]])
    assert state == (1.0, 2.0, [3.0]) and row == [5.0, 6.0]
    assert repr((q, k, v, out, lse, d_out, signs)) == before


@pytest.mark.parametrize("attend", [m.flash_attention, m.flash_attention_v1, VERSIONS["decode"]])
@pytest.mark.parametrize("options, word", [(dict(block_q=0), "block_q .*not 0"), (dict(block_k=0), "block_k .*not 0"),
                                           (dict(block_k=-3), "block_k .*not -3"), (dict(window=0), "window .*not 0")])
def test_bad_options_are_named(attend, options, word):
    q, k, v = lists(*inputs(3, 4, 2, 2))
    with pytest.raises(ValueError, match=word):
        attend(q, k, v, **(dict(block_q=2, block_k=2) | options))
    if "block_q" in options or "block_k" in options:
        with pytest.raises(ValueError, match=word):
            m.flash_attention_backward(q, k, v, q, [0.0] * 3, q, **(dict(block_q=2, block_k=2) | options))


@pytest.mark.parametrize("call, word", [
    (lambda q, k, v: m.flash_attention(q, k, v[:-1], block_q=1, block_k=1), "rows"),
    (lambda q, k, v: m.flash_attention(q, [], [], block_q=1, block_k=1), "at least one"),
    (lambda q, k, v: m.flash_attention(q, k, [[]] * 4, block_q=1, block_k=1), "at least one channel"),
    (lambda q, k, v: m.standard_attention([[1.0]], k, v), "channels"),
    (lambda q, k, v: m.standard_attention(q, k, v, window=0), "window"),
    (lambda q, k, v: m.flash_attention(q, k, v, block_q=1, block_k=1, keys=range(2, 5)), "keys must be a run"),
    (lambda q, k, v: m.flash_attention(q, k, v, block_q=1, block_k=1, keys=range(-1, 2)), "keys must be a run"),
    (lambda q, k, v: m.flash_attention(q, k, v, block_q=1, block_k=1, keys=range(0, 4, 2)), "keys must be a run"),
    (lambda q, k, v: m.flash_decode(q, k, v, n_splits=0), "n_splits"),
    (lambda q, k, v: m.flash_attention_backward(q, k, v, q[:2], [0.0] * 3, q, block_q=1, block_k=1), "out must"),
    (lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 2, q, block_q=1, block_k=1), "lse must"),
    (lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 3, q[:1], block_q=1, block_k=1), "d_out must"),
    (lambda q, k, v: m.flash_attention_backward(q, k, v, q, [0.0] * 3, [[1.0]] * 3, block_q=1, block_k=1), "d_out must"),
    (lambda q, k, v: m.flash_attention_backward(q, k, v, [[1.0] * 3] * 3, [0.0] * 3, q, block_q=1, block_k=1), "out must"),
    (lambda q, k, v: m.standard_attention_backward(q, k, v, [], q), "weights must"),
    (lambda q, k, v: m.standard_attention_backward(q, k, v, q, q), "weights must"),
    (lambda q, k, v: m.merge_partials([]), "parts"),
    (lambda q, k, v: m.merge_partials([(q, [0.0] * 3), (q[:2], [0.0] * 2)]), "parts"),
    (lambda q, k, v: m.flash_grouped_query([q] * 3, [k] * 2, [v] * 2, block_q=1, block_k=1), "divide"),
    (lambda q, k, v: m.flash_grouped_query([q], [k] * 2, [v] * 2, block_q=1, block_k=1), "divide"),
    (lambda q, k, v: m.flash_grouped_query([q] * 2, [k] * 2, [v], block_q=1, block_k=1), "divide"),
    (lambda q, k, v: m.flash_grouped_query([q], [], [], block_q=1, block_k=1), "divide"),
    (lambda q, k, v: m.PagedRows([k], [0], 5), "n must be at most"),
    (lambda q, k, v: m.hadamard_rotate([[1.0] * 3], [1.0] * 3), "power of two"),
    (lambda q, k, v: m.hadamard_rotate([[]], []), "power of two"),
    (lambda q, k, v: m.hadamard_rotate(q, [1.0] * 4), "signs"),
])
def test_what_does_not_fit_together_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call(*lists(*inputs(3, 4, 2, 2)))


# ----------------------------------------------------------------------------------------- the facts

def test_real_cards_and_tiles():
    """The tiles in use fit the shared memory of their card, and their arithmetic is the trace's."""
    for _, card, d, block_q, block_k in m.REAL_TILES:
        assert 2 * (block_q * d + 2 * block_k * d) <= card.sram_kb * 1024
    assert (m.A100.n_sms, m.A100.sram_kb, m.H100.n_sms, m.H100.sram_kb) == (108, 164, 132, 228)
    assert m.standard_accesses(8192, 8192, 128, 128) == 4 * 8192**2 + 4 * 8192 * 128 + 8192
