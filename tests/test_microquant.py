"""microquant against naive numpy references written from the definitions, and its findings.

The references share no code with the script. The findings are checked for seeds 0 to 4.
"""

import itertools
import math
import os
import random
import re
import struct
from typing import NamedTuple

import numpy as np
import pytest

import microquant as m
from tests.tools.fast_llama import keep_arrays, make_fast


def numbers(seed, *shape, size=1.0):
    """Return normal random numbers with the standard deviation size."""
    return np.random.default_rng(seed).normal(size=shape) * size


def assert_same(got, expected):
    """Assert that all numbers are equal."""
    np.testing.assert_array_equal(np.array(got, float), np.array(expected, float))


def assert_close(got, expected, tolerance=1e-12):
    """Assert that no number is farther from the expected one than the tolerance."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


def assert_close_relatively(got, expected, tolerance=1e-12):
    """Assert that no number is farther off than this share of the expected one."""
    np.testing.assert_allclose(got, expected, rtol=tolerance)


# ------------------------------------------------------------------- rounding to grids


def half_up(x):
    """Return the smallest float16 that is not below x."""
    half = np.float16(x)
    if float(half) < x:
        half = np.nextafter(half, np.float16(np.inf))
    return float(half)


def reference_grid(values, bits, symmetric):
    """Return (scale, zero point) of the grid for these values."""
    if symmetric:
        largest = np.abs(values).max()
        scale = half_up(largest / (2 ** (bits - 1) - 1))
        return scale or 1.0, 0
    low = min(values.min(), 0.0)
    high = max(values.max(), 0.0)
    scale = half_up((high - low) / (2**bits - 1)) or 1.0
    zero_point = -(2 ** (bits - 1)) + np.rint(-low / scale)
    return scale, int(zero_point)


def reference_codes(values, scale, zero_point, bits):
    """Return the nearest code of each value, of those that fit into bits."""
    lowest = -(2 ** (bits - 1))
    highest = 2 ** (bits - 1) - 1
    return np.clip(np.rint(values / scale + zero_point), lowest, highest)


def values_of_grid(w, r, c, granularity):
    """Return the key and the values of the grid that w[r, c] belongs to."""
    if granularity == "tensor":
        return "tensor", w
    if granularity == "channel":
        return r, w[r]
    start = c // granularity * granularity
    return (r, start), w[r, start:start + granularity]


def reference_quantize(w, bits, symmetric, granularity):
    """Return the codes and the weights that they decode to, cell by cell."""
    codes = np.zeros(w.shape, int)
    decoded = np.zeros(w.shape)
    grids = {}
    for r, c in np.ndindex(w.shape):
        key, values = values_of_grid(w, r, c, granularity)
        if key not in grids:
            grids[key] = reference_grid(values, bits, symmetric)
        scale, zero_point = grids[key]
        codes[r, c] = reference_codes(w[r, c], scale, zero_point, bits)
        decoded[r, c] = (codes[r, c] - zero_point) * scale
    return codes, decoded


def special_matrices():
    """Yield matrices of all sorts: one column, one sign, zeros, an outlier, tiny, and ties."""
    yield numbers(0, 5, 64, size=0.1)
    yield numbers(1, 3, 7)
    yield numbers(2, 1, 1)
    yield numbers(3, 4, 1, size=100.0)
    yield np.abs(numbers(4, 3, 33)) + 2
    yield -np.abs(numbers(5, 2, 8)) - 1
    yield np.zeros((3, 5))
    yield np.vstack([np.zeros(6), np.full(6, 0.7), np.full(6, -3.0), [0, 0, 0, 0, 0, 50.0]])
    yield numbers(6, 2, 4, size=1e-7)
    yield np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0, 127.0]])


EVERY_WIDTH = pytest.mark.parametrize("bits", range(2, 9))
GRANULARITIES = ["tensor", "channel", 1, 3, 4, 32, 100]
EVERY_GRANULARITY = pytest.mark.parametrize("granularity", GRANULARITIES)


@EVERY_WIDTH
@EVERY_GRANULARITY
def test_quantize_takes_the_nearest_codes(bits, granularity):
    for w, symmetric in itertools.product(special_matrices(), (True, False)):
        q = m.quantize(w.tolist(), bits, symmetric=symmetric, granularity=granularity)
        codes, decoded = reference_quantize(w, bits, symmetric, granularity)
        assert q.codes == codes.tolist()
        assert_same(q.dequantize(), decoded)


def count_grids(n_rows, n_columns, granularity):
    """Return how many grids a matrix has."""
    if granularity == "tensor":
        return 1
    if granularity == "channel":
        return n_rows
    return n_rows * math.ceil(n_columns / granularity)


@EVERY_WIDTH
@EVERY_GRANULARITY
def test_bits_per_weight_count_codes_scales_and_zero_points(bits, granularity):
    for w, symmetric in itertools.product(special_matrices(), (True, False)):
        q = m.quantize(w.tolist(), bits, symmetric=symmetric, granularity=granularity)
        n_grids = count_grids(*w.shape, granularity)
        n_bytes = math.ceil(w.size * bits / 8) + 2 * n_grids
        if not symmetric:
            n_bytes += math.ceil(n_grids * bits / 8)
        assert q.nbytes == n_bytes
        assert len(q.to_bytes()) == n_bytes
        assert q.bits_per_weight == 8 * n_bytes / w.size


def unpack(data, bits, count):
    """Return the whole numbers of these bits that data holds, the lowest bits first."""
    packed = int.from_bytes(data, "little")
    return [packed >> (i * bits) & (2**bits - 1) for i in range(count)]


def unpack_signed(data, bits, count):
    """Return the numbers in two's complement that data holds, the lowest bits first."""
    half = 2 ** (bits - 1)
    # Adding a half and taking it away turns 0, 1, ... 2^bits - 1 into 0, 1, ... -2, -1.
    return [(number + half) % 2**bits - half for number in unpack(data, bits, count)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_to_bytes_holds_the_codes_and_the_grids(bits):
    w = numbers(0, 3, 10).tolist()
    q = m.quantize(w, bits, granularity=4, symmetric=False)
    data = q.to_bytes()
    scales_start = math.ceil(30 * bits / 8)
    zeros_start = scales_start + 9 * 2
    codes = unpack_signed(data[:scales_start], bits, 30)
    scales = struct.unpack("<9e", data[scales_start:zeros_start])
    zero_points = unpack_signed(data[zeros_start:], bits, 9)
    assert codes == np.ravel(q.codes).tolist()
    assert list(scales) == np.ravel(q.scales).tolist()
    assert zero_points == np.ravel(q.zero_points).tolist()
    assert q.stored() == (q.dequantize(), data)


@pytest.mark.parametrize("bits, granularity, word", [
    (1, 4, "bits"),
    (9, 4, "bits"),
    (0, 4, "bits"),
    (4.5, 4, "bits"),
    (4, 0, "granularity"),
    (4, -1, "granularity"),
    (4, "row", "granularity"),
    (4, 2.0, "granularity"),
    (4, True, "granularity"),
])
def test_bad_bits_and_granularities_are_named(bits, granularity, word):
    w = [[1.0, 2.0]]
    hessian = [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(ValueError, match=word):
        m.quantize(w, bits, granularity=granularity)
    with pytest.raises(ValueError, match=word):
        m.gptq(w, hessian, bits, granularity=granularity)
    with pytest.raises(ValueError, match=word):
        m.awq_search(w, w, bits, granularity=granularity)
    with pytest.raises(ValueError, match=word):
        m.hqq(w, bits, granularity=granularity)


@pytest.mark.parametrize("w", [[], [[]], [[1.0], [1.0, 2.0]], [[math.nan]], [[math.inf]], [[1e6]]])
def test_matrices_that_cannot_be_quantized_are_refused(w):
    with pytest.raises(ValueError, match="w must"):
        m.quantize(w, 4)
    with pytest.raises(ValueError, match="w must"):
        m.quantize_nf4(w)
    with pytest.raises(ValueError, match="w must"):
        m.quantize_nvfp4(w)
    with pytest.raises(ValueError, match="w must"):
        m.gptq(w, [[1.0]], 4, granularity="tensor")


def test_arguments_are_left_as_they_were():
    w = numbers(0, 4, 8).tolist()
    x = numbers(1, 6, 8).tolist()
    hessian = (np.eye(8) + 0.1).tolist()
    before = repr((w, x, hessian))
    m.quantize(w, 4, granularity=4)
    m.quantize_nf4(w, double_quant=True)
    m.quantize_nvfp4(w)
    m.gptq(w, hessian, 4, granularity=4, act_order=True)
    m.awq_search(w, x, 4, granularity=4, grid=3)
    m.hqq(w, 4, granularity=4)
    m.squeezellm(w, hessian[:4], 2)
    m.llm_int8_matmul(x, w)
    m.fp8_matmul(x, *m.fp8_rows(w))
    m.ternary_weights(w)
    m.subspace(w, 2, random.Random(0))
    m.with_adapter(w, m.new_adapter(w, 2, random.Random(0)))
    assert repr((w, x, hessian)) == before


# ---------------------------------------------------------------------- floating point


class Form(NamedTuple):
    """A floating-point format."""

    exponent_bits: int
    mantissa_bits: int
    largest: float  # of its finite values
    overflow: float  # what larger numbers become


FORMS = {
    "fp16": Form(5, 10, 65504.0, math.inf),
    "bf16": Form(8, 7, 2.0**127 * (2 - 2**-7), math.inf),
    "fp8_e4m3": Form(4, 3, 448.0, 448.0),
    "fp8_e5m2": Form(5, 2, 57344.0, math.inf),
    "fp4_e2m1": Form(2, 1, 6.0, 6.0),
}
EVERY_FORM = pytest.mark.parametrize("name", FORMS)


def float_table(name):
    """Return every finite value from 0 up; the index is the bit pattern."""
    form = FORMS[name]
    bias = 2 ** (form.exponent_bits - 1) - 1
    values = []
    for pattern in range(2 ** (form.exponent_bits + form.mantissa_bits)):
        exponent, fraction = divmod(pattern, 2**form.mantissa_bits)
        if exponent == 0:
            exponent = 1  # a subnormal number: it has no leading 1
        else:
            fraction += 2**form.mantissa_bits
        value = math.ldexp(fraction, exponent - bias - form.mantissa_bits)
        if value <= form.largest:
            values.append(value)
    return values


def nearest_of_table(values, x):
    """Return the nearest of a table's values and their negatives; of two, the even pattern's."""
    gaps = np.abs(np.array(values) - abs(x))
    nearest = np.flatnonzero(gaps == gaps.min())
    pattern = min(nearest, key=lambda pattern: pattern % 2)
    return math.copysign(values[pattern], x)


@EVERY_FORM
def test_a_format_keeps_its_own_values(name):
    nearest = getattr(m, name)
    for value in float_table(name):
        assert nearest(value) == value
        assert nearest(-value) == -value


@EVERY_FORM
def test_a_format_rounds_halves_to_the_even_pattern(name):
    nearest = getattr(m, name)
    values = float_table(name)
    for i, (lower, upper) in enumerate(itertools.pairwise(values)):
        even = lower if i % 2 == 0 else upper
        middle = (lower + upper) / 2
        assert nearest(middle) == even
        assert nearest(-middle) == -even


@EVERY_FORM
def test_a_format_rounds_to_the_nearest_value(name):
    nearest = getattr(m, name)
    for lower, upper in itertools.pairwise(float_table(name)):
        middle = (lower + upper) / 2
        below = math.nextafter(middle, 0)
        above = math.nextafter(middle, math.inf)
        assert nearest(below) == lower
        assert nearest(-below) == -lower
        assert nearest(above) == upper
        assert nearest(-above) == -upper


@EVERY_FORM
def test_a_format_overflows_half_a_step_above_its_largest_value(name):
    nearest = getattr(m, name)
    values = float_table(name)
    form = FORMS[name]
    step = values[-1] - values[-2]
    assert values[-1] == form.largest
    assert nearest(math.nextafter(form.largest + step / 2, 0)) == form.largest
    for x in (form.largest + step, 1e39, 1e300, math.inf):
        assert nearest(x) == form.overflow
        assert nearest(-x) == -form.overflow


@EVERY_FORM
def test_a_format_keeps_nan_and_the_sign_of_zero(name):
    nearest = getattr(m, name)
    assert math.isnan(nearest(math.nan))
    assert math.copysign(1, nearest(-0.0)) == -1
    assert math.copysign(1, nearest(-1e-300)) == -1


def numbers_of_all_sizes():
    """Return 2,000 numbers, from subnormal halves to some that overflow."""
    sizes = (1e-8, 1e-4, 1, 1e4)
    return np.concatenate([numbers(0, 500, size=size) for size in sizes])


def test_fp16_and_fp32_are_those_of_numpy():
    x = numbers_of_all_sizes()
    with np.errstate(over="ignore"):
        halves = x.astype(np.float16)
    assert_same([m.fp16(value) for value in x], halves)
    assert_same([m.fp32(value) for value in x], x.astype(np.float32))


def test_fp16_up_never_rounds_down():
    for value in np.abs(numbers_of_all_sizes()):
        if value < 6e4:
            assert m.fp16_up(float(value)) == half_up(float(value))


def test_e4m3_bytes_are_the_bit_patterns():
    for pattern, value in enumerate(float_table("fp8_e4m3")):
        assert m.e4m3_byte(value) == pattern
        assert m.e4m3_byte(-value) == pattern + 128


@pytest.mark.parametrize("name", m.REAL_LLAMAS)
def test_parameters_of_real_models_are_the_published_ones(name):
    sizes, published = m.REAL_LLAMAS[name]
    vocab_size, dim, n_layers, n_heads, n_kv_heads, hidden_dim = sizes
    # Counted without Config: q and o, k and v, three of the feed-forward, two norms a layer.
    queries = 2 * dim * dim
    keys = 2 * dim * dim * n_kv_heads // n_heads
    layer = queries + keys + 3 * dim * hidden_dim + 2 * dim
    embeddings = 2 * vocab_size * dim
    assert n_layers * layer + embeddings + dim == published
    row, = [row for row in m.real_sizes() if row.model == name]
    assert row.parameters == published


@pytest.mark.parametrize("name", m.REAL_LLAMAS)
def test_the_usual_file_of_a_real_model_keeps_fp16_embeddings(name):
    (vocab_size, dim, *_), published = m.REAL_LLAMAS[name]
    embeddings = 2 * vocab_size * dim
    bits = 16 * embeddings + 4.125 * (published - embeddings)
    row, = [row for row in m.real_sizes() if row.model == name]
    assert row.usual == pytest.approx(bits / 8 / 2**30)


# --------------------------------------------------------------------------------- NF4

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]  # bitsandbytes, functional.py


def test_nf4_codebook_is_the_published_one():
    codebook = m.nf4_codebook()
    assert_close(codebook, NF4, 1e-6)
    assert codebook[0] == -1
    assert codebook[7] == 0
    assert codebook[15] == 1


EVERY_BLOCK_SIZE = pytest.mark.parametrize("block_size", [1, 3, 64])


@EVERY_BLOCK_SIZE
def test_quantize_nf4_takes_the_nearest_value(block_size):
    codebook = np.array(m.nf4_codebook())
    for w in special_matrices():
        q = m.quantize_nf4(w.tolist(), block_size=block_size)
        decoded = q.dequantize()
        for r, c in np.ndindex(w.shape):
            start = c // block_size * block_size
            absmax = np.abs(w[r, start:start + block_size]).max()
            scale = float(np.float32(absmax))
            assert q.scales[r][c // block_size] == scale
            code = q.codes[r][c]
            assert decoded[r][c] == codebook[code] * scale
            gaps = np.abs(codebook - w[r, c] / (scale or 1.0))
            assert gaps[code] <= gaps.min() + 1e-15


@EVERY_BLOCK_SIZE
def test_nf4_has_four_bits_a_weight_and_32_a_block(block_size):
    for w in special_matrices():
        q = m.quantize_nf4(w.tolist(), block_size=block_size)
        n_rows, n_columns = w.shape
        n_blocks = n_rows * math.ceil(n_columns / block_size)
        assert q.nbytes == math.ceil(w.size / 2) + 4 * n_blocks


def test_nf4_blocks_are_of_64_unless_told():
    q = m.quantize_nf4(numbers(0, 2, 130).tolist())
    assert q.group == 64
    assert np.shape(q.scales) == (2, 3)


def test_nearest_takes_the_upper_value_halfway():
    values = [-1.0, 0.5, 1.0, 1.5, 3.0, 9.0]
    levels = [0.0, 1.0, 2.0, 4.0]
    assert m.nearest(values, levels) == [0, 1, 1, 2, 3, 3]


def decode_absmaxes(data, absmaxes):
    """Decode double quantization by its layout, and check its mean and scales on the way."""
    table = np.array(float_table("fp8_e4m3"))
    mean, = struct.unpack("<f", data[:4])
    assert mean == np.float32(absmaxes.mean())
    decoded = []
    place = 4
    for start in range(0, len(absmaxes), 256):
        block = absmaxes[start:start + 256]
        scale, = struct.unpack("<f", data[place:place + 4])
        assert scale == np.float32(np.abs(block - mean).max() / 448)
        place += 4
        codes = np.frombuffer(data[place:place + len(block)], np.uint8)
        place += len(block)
        signs = np.where(codes & 128, -1, 1)
        decoded += list(mean + scale * (signs * table[codes & 127]))
    assert len(data) == place
    return np.array(decoded)


@pytest.mark.parametrize("small_rows", [False, True])
@pytest.mark.parametrize("block_size", [64, 10])
def test_double_quantize_decodes_from_its_own_bytes(small_rows, block_size):
    w = numbers(0, 40, 130)
    if small_rows:
        # Most blocks are so far below the mean that some decode to less than 0.
        is_small = np.arange(40) % 5 != 0
        w[is_small] *= 1e-3
    plain = m.quantize_nf4(w.tolist(), block_size=block_size)
    q = m.quantize_nf4(w.tolist(), block_size=block_size, double_quant=True)
    assert q.codes == plain.codes
    absmaxes = np.ravel(plain.scales)
    assert len(absmaxes) == 40 * math.ceil(130 / block_size)
    decoded = decode_absmaxes(q.to_bytes()[w.size // 2:], absmaxes)
    assert_same(np.ravel(q.scales), np.maximum(decoded, 0))


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_double_quantization_of_equal_weights_is_exact(value):
    w = [[value] * 130]
    q = m.quantize_nf4(w, double_quant=True)
    assert q.dequantize() == w


# ------------------------------------------------------------------------ blocks and GGUF

ROW = [((37 * k * k + 11 * k) % 257 - 120) / 64 for k in range(64)]
# What gguf-py 0.19.0 (llama.cpp's own Python package) makes of ROW.
Q8_0_ROW = ("e02386b733f5025af9e317925d6fc66e5b8f13ddf353faec29ac7f93f8a398d96638"
            "ee2261af7c759a3e0f35885957812aff2a81575988350f3e9a757caf614073d48a96")
Q4_0_ROW = "d0b37fad9539889258da07ff92e1fca1224fe032dee30fbf92cc29fbf03eedc0fb581b10"


def test_q8_0_and_q4_0_bytes_as_gguf_has_them():
    assert m.q8_0_encode(ROW).hex() == Q8_0_ROW
    assert m.q4_0_encode(ROW).hex() == Q4_0_ROW


def gguf_rows():
    """Yield rows of 256 or 512: all sizes, zeros, constants, and weights close to halves."""
    for seed, size in enumerate((1e-3, 0.1, 1.0, 30.0)):
        yield np.float32(numbers(seed, 512, size=size))
    yield np.zeros(256, np.float32)
    yield np.full(256, 0.37, np.float32)
    yield np.float32(np.arange(256) % 17 - 8)
    yield np.float32(np.concatenate([np.zeros(32), numbers(9, 224)]))
    steps = np.arange(31)
    yield blocks_that_end_in(127.0, steps - 15.5)
    for extreme in numbers(13, 8):
        yield blocks_that_end_in(extreme, (steps * 4 - 60.5) * abs(extreme) / 127)
        yield blocks_that_end_in(extreme, (steps % 15 - 7.5) * extreme / -8)
    yield -np.abs(np.float32(numbers(10, 256)))
    yield np.abs(np.float32(numbers(11, 256))) + 1


def blocks_that_end_in(extreme, others):
    """Return eight times the same block: 31 values and the extreme one, which sets the scale."""
    return np.float32(np.tile(np.append(others, extreme), 8))


def inverse_of(d):
    """Return 1 / d in float32, or 0 if d is 0."""
    if d == 0:
        return np.float32(0)
    return np.float32(1) / d


def round_as_c(x):
    """Return the nearest whole numbers; halves go away from 0, as with C's roundf."""
    whole = np.trunc(x)
    return whole + np.trunc(2 * (x - whole))


def test_q8_0_encode_follows_the_layout():
    for row in gguf_rows():
        expected = b""
        for block in row.reshape(-1, 32):
            d = np.abs(block).max() / np.float32(127)
            q = round_as_c(block * inverse_of(d)).astype(np.int8)
            expected += np.float16(d).tobytes() + q.tobytes()
        assert m.q8_0_encode(row.tolist()) == expected


def test_q8_0_decode_follows_the_layout():
    for row in gguf_rows():
        data = m.q8_0_encode(row.tolist())
        expected = []
        for start in range(0, len(data), 34):
            d = np.frombuffer(data[start:start + 2], "<f2").astype(float)
            q = np.frombuffer(data[start + 2:start + 34], np.int8)
            expected += list(d * q)
        assert_same(m.q8_0_decode(data, len(row)), expected)


def test_q4_0_encode_follows_the_layout():
    for row in gguf_rows():
        expected = b""
        for block in row.reshape(-1, 32):
            largest = np.abs(block).argmax()
            d = block[largest] / np.float32(-8)
            scaled = np.float64(block) * np.float64(inverse_of(d))
            shifted = np.float32(scaled + 8.5)
            q = np.minimum(shifted.astype(np.uint8), 15)
            packed = q[:16] | q[16:] << 4
            expected += np.float16(d).tobytes() + packed.tobytes()
        assert m.q4_0_encode(row.tolist()) == expected


def test_q4_0_decode_follows_the_layout():
    for row in gguf_rows():
        data = m.q4_0_encode(row.tolist())
        expected = []
        for start in range(0, len(data), 18):
            d = np.frombuffer(data[start:start + 2], "<f2").astype(float)
            packed = np.frombuffer(data[start + 2:start + 18], np.uint8)
            q = np.append(packed & 15, packed >> 4).astype(int)
            expected += list(d * (q - 8))
        assert_same(m.q4_0_decode(data, len(row)), expected)


def test_the_smallest_scale_that_is_inverted():
    """d = 2^-126, the smallest normal FP32, is 0 in FP16; the codes are those of w / d."""
    tiny = 2.0**-126
    codes = range(96, 128)
    assert m.q8_0_encode([code * tiny for code in codes]) == b"\0\0" + bytes(codes)
    codes = [*range(-8, 8), *range(-8, 8)]
    both_halves = bytes(range(0, 256, 17))  # 0x00, 0x11, ... 0xFF
    assert m.q4_0_encode([code * tiny for code in codes]) == b"\0\0" + both_halves


def q4_k_scale_and_low(q, j):
    """Return the six-bit scale and minimum of sub-block j (ggml-quants.c, get_scale_min_k4)."""
    if j < 4:
        return q[j] & 63, q[j + 4] & 63
    scale = (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4)
    low = (q[j + 4] >> 4) | ((q[j] >> 6) << 4)
    return scale, low


def reference_q4_k(block):
    """Decode one super-block, by the published layout."""
    d, dmin = np.frombuffer(block[:4], "<f2").astype(float)
    out = np.zeros(256)
    for j in range(8):
        scale, low = q4_k_scale_and_low(block[4:16], j)
        for i in range(32):
            byte = block[16 + 32 * (j // 2) + i]
            code = byte & 15 if j % 2 == 0 else byte >> 4
            out[32 * j + i] = d * scale * code - dmin * low
    return out


def test_q4_k_decodes_any_super_block():
    rng = np.random.default_rng(0)
    for _ in range(30):
        block = bytearray(rng.integers(0, 256, 144, dtype=np.uint8).tobytes())
        block[1] &= 0x3B  # so that neither FP16 is infinite or NaN
        block[3] &= 0x3B
        assert_same(m.q4_k_decode(bytes(block), 256), reference_q4_k(block))


def hard_q4_k_rows():
    """Yield sub-blocks narrower than their minimum's step, and weights with a subnormal d."""
    falling = -10 - 7.3 * np.repeat(np.arange(8), 32)
    yield np.float32(falling + 0.01 * numbers(12, 256))
    yield np.float32(np.tile(np.linspace(-4e-5, 3.9e-5, 32), 8))
    yield np.float32(np.tile(np.linspace(-5.2e-6, 0.1, 32), 8))


def reference_six_bits(values):
    """Return eight values of at least 0 as they are stored: a unit times codes of six bits."""
    unit = float(np.float16(values.max() / 63))
    if unit == 0:
        return np.zeros(8)
    return unit * np.minimum(np.rint(values / unit), 63)


def reference_q4_k_rounding(block):
    """Return the 256 weights after rounding to the nearest of what Q4_K can store."""
    block = block.reshape(8, 32)
    lows = np.maximum(-block.min(1), 0)
    steps = reference_six_bits((block.max(1) + lows) / 15)
    lows = reference_six_bits(lows)
    out = np.zeros((8, 32))
    for j in range(8):
        codes = np.zeros(32)
        if steps[j] != 0:
            heights = (block[j] + lows[j]) / steps[j]
            codes = np.clip(np.rint(heights), 0, 15)
        out[j] = steps[j] * codes - lows[j]
    return out.ravel()


def test_q4_k_takes_the_nearest_of_what_it_can_store():
    for row in itertools.chain(gguf_rows(), hard_q4_k_rows()):
        data = m.q4_k_encode(row.tolist())
        assert len(data) == len(row) // 256 * 144
        for i, block in enumerate(row.astype(float).reshape(-1, 256)):
            stored = data[144 * i:144 * i + 144]
            assert_same(reference_q4_k(stored), reference_q4_k_rounding(block))


def reference_mxfp4_rounding(row):
    """Return the weights after rounding to MXFP4, by the OCP specification."""
    table = float_table("fp4_e2m1")
    out = []
    for block in row.astype(float).reshape(-1, 32):
        largest = np.abs(block).max()
        exponent = -127
        if largest != 0:
            exponent = max(math.floor(math.log2(largest)) - 2, -127)
        scale = 2.0**exponent
        out += [nearest_of_table(table, value / scale) * scale for value in block]
    return out


def reference_mxfp4_decode(data):
    """Decode blocks of 17 bytes: an exponent, then 32 codes of four bits."""
    table = np.array(float_table("fp4_e2m1"))
    out = []
    for start in range(0, len(data), 17):
        scale = 2.0 ** (data[start] - 127)
        packed = np.frombuffer(data[start + 1:start + 17], np.uint8)
        codes = np.append(packed & 15, packed >> 4)
        signs = np.where(codes & 8, -1, 1)
        out += list(signs * table[codes & 7] * scale)
    return out


def test_mxfp4_takes_the_nearest_value():
    for row in gguf_rows():
        data = m.mxfp4_encode(row.tolist())
        assert_same(reference_mxfp4_decode(data), reference_mxfp4_rounding(row))


def test_mxfp4_decodes_from_its_bytes():
    for row in gguf_rows():
        data = m.mxfp4_encode(row.tolist())
        assert len(data) == len(row) // 32 * 17
        assert_same(m.mxfp4_decode(data, len(row)), reference_mxfp4_decode(data))


def test_nvfp4_takes_the_nearest_value():
    fp4_table = np.array(float_table("fp4_e2m1"))
    fp8_table = float_table("fp8_e4m3")
    for w in special_matrices():
        q = m.quantize_nvfp4(w.tolist())
        decoded = q.dequantize()
        overall = float(np.float32(np.abs(w).max() / 2688)) or 1.0
        for r, c in np.ndindex(w.shape):
            start = c // 16 * 16
            largest = np.abs(w[r, start:start + 16]).max()
            scale = nearest_of_table(fp8_table, largest / 6 / overall) * overall
            assert q.scales[r][c // 16] == scale
            if scale != 0:
                gap = abs(decoded[r][c] - w[r, c]) / scale
                gaps = np.abs(fp4_table - abs(w[r, c]) / scale)
                assert gap <= gaps.min() + 1e-12


def test_nvfp4_has_four_bits_a_weight_and_eight_a_block():
    for w in special_matrices():
        q = m.quantize_nvfp4(w.tolist())
        n_rows, n_columns = w.shape
        n_blocks = n_rows * math.ceil(n_columns / 16)
        assert q.nbytes == math.ceil(w.size / 2) + n_blocks + 4


# The name of a format, the weights of a block, and its bytes.
BLOCK_FORMATS = [("q8_0", 32, 34), ("q4_0", 32, 18), ("q4_k", 256, 144), ("mxfp4", 32, 17)]
EVERY_BLOCK_FORMAT = pytest.mark.parametrize("name, size, nbytes", BLOCK_FORMATS)


@EVERY_BLOCK_FORMAT
def test_rows_that_cannot_be_encoded_are_refused(name, size, nbytes):
    encode = getattr(m, name + "_encode")
    ones = [1.0] * (size - 1)
    bad_rows = [[], ones, [math.nan] * size, [*ones, -math.inf], [*ones, 65505.0]]
    for row in bad_rows:
        with pytest.raises(ValueError, match="row"):
            encode(row)


@EVERY_BLOCK_FORMAT
def test_data_of_another_length_is_refused(name, size, nbytes):
    decode = getattr(m, name + "_decode")
    with pytest.raises(ValueError, match="data"):
        decode(b"", size)
    with pytest.raises(ValueError, match="data"):
        decode(bytes(nbytes), size - 1)
    with pytest.raises(ValueError, match="data"):
        decode(bytes(nbytes + 1), size)
    with pytest.raises(ValueError, match="data"):
        decode(bytes(nbytes), 2 * size)


@EVERY_BLOCK_FORMAT
def test_blocks_of_zeros_and_of_tiny_weights(name, size, nbytes):
    encode = getattr(m, name + "_encode")
    decode = getattr(m, name + "_decode")
    zeros = [0.0] * size
    assert decode(encode(zeros), size) == zeros
    for tiny in (1e-42, -1e-40, 1e-38, 1e-30):
        decoded = decode(encode([tiny, *zeros[1:]]), size)
        assert np.abs(decoded).max() <= 1e-7


class TensorInfo(NamedTuple):
    """What a GGUF file says of a tensor: the shape begins with the length of a row."""

    shape: list
    kind: int
    offset: int  # from the start of the tensors' data


class Reader:
    """Reads a GGUF file by its specification (docs/gguf.md in the ggml repository)."""

    FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q"}

    def __init__(self, data):
        self.data = data
        self.place = 0
        assert self.take(4) == b"GGUF"
        assert self.number("<I") == 3  # the version
        n_tensors = self.number("<Q")
        n_entries = self.number("<Q")
        self.metadata = {}
        for _ in range(n_entries):
            key = self.string()
            kind = self.number("<I")
            self.metadata[key] = self.value(kind)
        self.tensors = {}
        for _ in range(n_tensors):
            name = self.string()
            n_dims = self.number("<I")
            shape = [self.number("<Q") for _ in range(n_dims)]
            kind = self.number("<I")
            offset = self.number("<Q")
            self.tensors[name] = TensorInfo(shape, kind, offset)
        self.start = math.ceil(self.place / 32) * 32

    def take(self, n):
        self.place += n
        return self.data[self.place - n:self.place]

    def number(self, form):
        data = self.take(struct.calcsize(form))
        return struct.unpack(form, data)[0]

    def string(self):
        length = self.number("<Q")
        return self.take(length).decode("utf-8")

    def value(self, kind):
        if kind == 8:
            return self.string()
        if kind == 9:
            return self.array()
        return self.number(self.FORMS[kind])

    def array(self):
        kind = self.number("<I")
        length = self.number("<Q")
        return [self.value(kind) for _ in range(length)]


class Kind(NamedTuple):
    """How a GGUF file stores the numbers of a tensor."""

    number: int
    nbytes: float  # of one weight
    error: float  # the largest, as a share of the largest weight


KINDS = {
    "F32": Kind(0, 4, 1e-6),
    "Q4_0": Kind(2, 18 / 32, 0.14),
    "Q8_0": Kind(8, 34 / 32, 0.005),
}

GGML_NAMES = {
    "tok_embeddings": "token_embd.weight",
    "layers.0.attention_norm": "blk.0.attn_norm.weight",
    "layers.0.attention.wq": "blk.0.attn_q.weight",
    "layers.0.attention.wk": "blk.0.attn_k.weight",
    "layers.0.attention.wv": "blk.0.attn_v.weight",
    "layers.0.attention.wo": "blk.0.attn_output.weight",
    "layers.0.ffn_norm": "blk.0.ffn_norm.weight",
    "layers.0.feed_forward.w1": "blk.0.ffn_gate.weight",
    "layers.0.feed_forward.w2": "blk.0.ffn_down.weight",
    "layers.0.feed_forward.w3": "blk.0.ffn_up.weight",
    "norm": "output_norm.weight",
    "output": "output.weight",
}


def decode_tensor(data, kind, n):
    """Return the n numbers of a tensor in a GGUF file."""
    if kind == "F32":
        return np.frombuffer(data, "<f4")
    if kind == "Q4_0":
        return np.array(m.q4_0_decode(data, n))
    return np.array(m.q8_0_decode(data, n))


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_file_holds_the_weights(kind):
    config = m.lab_config()
    weights = m.init_weights(config, random.Random(0))
    data = m.gguf_file(config, weights, m.word_tokenizer(), kind=kind)
    reader = Reader(data)
    assert set(reader.tensors) == set(GGML_NAMES.values())
    last_end = 0
    for name, ggml_name in GGML_NAMES.items():
        w = np.array(weights[name])
        info = reader.tensors[ggml_name]
        stored_as = kind if w.ndim == 2 else "F32"  # the gains of a norm stay as they are
        assert info.shape == list(reversed(w.shape))
        assert info.kind == KINDS[stored_as].number
        assert info.offset % 32 == 0
        start = reader.start + info.offset
        end = start + int(w.size * KINDS[stored_as].nbytes)
        decoded = decode_tensor(data[start:end], stored_as, w.size)
        bound = KINDS[stored_as].error * np.abs(w).max()
        assert_close(decoded, w.ravel(), bound)
        last_end = max(last_end, end)
    assert 0 <= len(data) - last_end < 32


METADATA = {
    "general.architecture": "llama",
    "llama.vocab_size": 56,
    "llama.context_length": 256,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 32,
    "llama.block_count": 1,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 1,
    "llama.rope.dimension_count": 16,
    "llama.rope.freq_base": 10000,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.add_bos_token": False,
}


def read_gguf_metadata(kind):
    """Return what a GGUF file of a random model says of the model and the tokenizer."""
    config = m.lab_config()
    weights = m.init_weights(config, random.Random(0))
    data = m.gguf_file(config, weights, m.word_tokenizer(), kind=kind)
    return Reader(data).metadata


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_metadata_describe_the_model(kind):
    metadata = read_gguf_metadata(kind)
    for key, value in METADATA.items():
        assert metadata[key] == value
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_metadata_hold_the_tokenizer(kind):
    metadata = read_gguf_metadata(kind)
    tokenizer = m.word_tokenizer()
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [spaces_back(token) for token in tokens] == tokenizer.vocab
    merges = []
    for line in metadata["tokenizer.ggml.merges"]:
        first, second = line.split(" ")
        merges.append((spaces_back(first), spaces_back(second)))
    assert merges == tokenizer.merges
    end_of_text = metadata["tokenizer.ggml.eos_token_id"]
    assert tokenizer.vocab[end_of_text] == "\n"


def spaces_back(token):
    """Return a token of GPT-2's alphabet with its spaces and line ends."""
    return token.replace("Ġ", " ").replace("Ċ", "\n")


def test_gguf_file_refuses_kinds_and_shapes_that_it_cannot_hold():
    tokenizer = m.word_tokenizer()
    config = m.Config(len(tokenizer.vocab), 32, 1, 2, 1, 16)
    weights = m.init_weights(config, random.Random(0))
    with pytest.raises(ValueError, match="kind"):
        m.gguf_file(config, weights, tokenizer, kind="Q5_0")
    with pytest.raises(ValueError, match="hidden_dim"):
        m.gguf_file(config, weights, tokenizer)


def test_main_writes_a_gguf_file(tmp_path, capsys, labs):
    path = tmp_path / "tiny.gguf"
    assert m.main(["--gguf", str(path), "--gguf-type", "F32"]) == 0
    assert "tiny.gguf" in capsys.readouterr().out
    output = Reader(path.read_bytes()).tensors["output.weight"]
    assert output.kind == KINDS["F32"].number


def test_main_refuses_paths_that_it_cannot_write(tmp_path, capsys):
    existing = tmp_path / "existing.gguf"
    existing.write_bytes(b"as it was")
    in_no_folder = tmp_path / "none" / "x.gguf"
    for path in (existing, in_no_folder, tmp_path):
        with pytest.raises(SystemExit) as stop:
            m.main(["--gguf", str(path)])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert "--gguf" in error
        assert error.count("\n") == 1
    assert existing.read_bytes() == b"as it was"


# ---------------------------------------------------------------- activations in 8 bits


def reference_int8(x, w, x_scale=None):
    """Return W x for every row of x, both rounded to INT8: w by rows, x by rows or x_scale."""
    out = np.zeros((len(x), len(w)))
    for r, weights in enumerate(w):
        w_scale, _ = reference_grid(weights, 8, symmetric=True)
        w_codes = reference_codes(weights, w_scale, 0, 8)
        for i, inputs in enumerate(x):
            scale = x_scale or np.abs(inputs).max() / 127 or 1.0
            x_codes = reference_codes(inputs, scale, 0, 8)
            out[i, r] = (w_codes @ x_codes) * scale * w_scale
    return out


@pytest.mark.parametrize("n, rows, columns", [
    (1, 1, 1),
    (5, 3, 7),
    (4, 6, 64),
])
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_int8_matmul_multiplies_codes_and_scales(n, rows, columns, x_scale):
    x = numbers(0, n, columns)
    x[0] = 0
    w = numbers(1, rows, columns, size=0.1)
    q = m.quantize(w.tolist(), 8, granularity="channel")
    y = m.int8_matmul(x.tolist(), q, x_scale)
    assert_close(y, reference_int8(x, w, x_scale))


def layer_with_outliers():
    """Return (x, w), where column 3 of x is large and column 7 reaches the threshold exactly."""
    x = numbers(0, 6, 20)
    x[:, 3] *= 40
    x[2, 7] = -6.0
    return x, numbers(1, 5, 20, size=0.2)


@pytest.mark.parametrize("threshold", [0.0, 1.5, 3.0, 6.0, math.inf])
def test_llm_int8_multiplies_outliers_apart(threshold):
    x, w = layer_with_outliers()
    is_outlier = np.abs(x).max(0) >= threshold
    expected = x[:, is_outlier] @ w[:, is_outlier].T
    if not is_outlier.all():
        rest = ~is_outlier
        expected = expected + reference_int8(x[:, rest], w[:, rest])
    y = m.llm_int8_matmul(x.tolist(), w.tolist(), threshold=threshold)
    assert_close(y, expected)


def test_llm_int8_has_a_threshold_of_6_unless_told():
    x, w = layer_with_outliers()
    largest = np.abs(x).max(0)
    assert list(np.flatnonzero(largest >= 6)) == [3, 7]
    plain = m.llm_int8_matmul(x.tolist(), w.tolist())
    told = m.llm_int8_matmul(x.tolist(), w.tolist(), threshold=6.0)
    assert_same(plain, told)


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_llm_int8_refuses_thresholds_that_are_no_size(threshold):
    with pytest.raises(ValueError, match="threshold"):
        m.llm_int8_matmul([[1.0]], [[1.0]], threshold=threshold)


def reference_fp8(matrix):
    """Return a matrix with every number rounded to E4M3, with one scale a row."""
    table = float_table("fp8_e4m3")
    rounded = np.zeros(matrix.shape)
    for r, c in np.ndindex(matrix.shape):
        scale = np.abs(matrix[r]).max() / 448 or 1.0
        rounded[r, c] = nearest_of_table(table, matrix[r, c] / scale) * scale
    return rounded


def test_fp8_matmul_multiplies_what_e4m3_makes_of_the_numbers():
    x = numbers(0, 4, 9)
    x[1] = 0
    w = numbers(1, 3, 9, size=0.1)
    w_codes, w_scales = m.fp8_rows(w.tolist())
    y = m.fp8_matmul(x.tolist(), w_codes, w_scales)
    assert_close(y, reference_fp8(x) @ reference_fp8(w).T)


def test_static_scale_reaches_the_largest():
    assert m.static_scale([[1.0, -254.0], [3.0, 0.0]]) == 2.0
    assert m.static_scale([[0.0]]) == 1.0


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_scales_share_the_sizes_by_alpha(alpha):
    x_absmax = [1.0, 4.0, 0.0, 9.0]
    w_absmax = [2.0, 0.25, 1.0, 0.0]
    first = 1.0 / 2.0 ** (1 - alpha)
    second = 4.0**alpha / 0.25 ** (1 - alpha)
    scales = m.smoothquant_scales(x_absmax, w_absmax, alpha)
    # A channel that nothing enters, or that nobody reads, stays as it is.
    assert_close(scales, [first, second, 1.0, 1.0])


def test_smoothquant_shares_evenly_unless_told():
    assert m.smoothquant_scales([4.0], [1.0]) == [2.0]


@pytest.mark.parametrize("x_absmax, w_absmax, alpha", [
    ([1.0], [1.0], -0.1),
    ([1.0], [1.0], 1.1),
    ([1.0, 2.0], [1.0], 0.5),
])
def test_smoothquant_refuses_other_shares_and_lengths(x_absmax, w_absmax, alpha):
    with pytest.raises(ValueError, match="alpha"):
        m.smoothquant_scales(x_absmax, w_absmax, alpha)


# ------------------------------------------------------------------------ GPTQ and AWQ


def reference_obq(w, hessian, bits, granularity, act_order, damp):
    """Return the codes and the weights of Optimal Brain Quantization in a fixed order.

    The Hessian of the columns that are left is inverted anew for each column.
    """
    n = w.shape[1]
    damping = damp * np.diag(hessian).mean() or 1.0
    damped = hessian + damping * np.eye(n)
    order = list(range(n))
    if act_order:
        order.sort(key=lambda j: -hessian[j, j])
    repaired = w.copy()
    codes = np.zeros(w.shape, int)
    decoded = np.zeros(w.shape)
    grids = {}
    for i, j in enumerate(order):
        left = order[i:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        for r in range(len(w)):
            # A grid is laid when its first column is rounded; with act_order, before everything.
            source = w if act_order else repaired
            key, values = values_of_grid(source, r, j, granularity)
            if key not in grids:
                grids[key] = reference_grid(values, bits, symmetric=True)
            scale, _ = grids[key]
            codes[r, j] = reference_codes(repaired[r, j], scale, 0, bits)
            decoded[r, j] = codes[r, j] * scale
            error = repaired[r, j] - decoded[r, j]
            repaired[r, left] -= error / inverse[0, 0] * inverse[0]
    return codes, decoded


def layers_to_calibrate():
    """Yield (w, x): weights, and inputs that are correlated and of different sizes."""
    yield numbers(0, 3, 13), correlated_inputs(9, 40, 13)
    yield numbers(1, 4, 8), correlated_inputs(10, 5, 8)
    yield numbers(2, 1, 1), correlated_inputs(11, 3, 1)


def correlated_inputs(seed, n, channels):
    """Return n rows of inputs to channels of which every fifth is of the same size."""
    mixing = np.eye(channels) + 0.5
    sizes = 1 + np.arange(channels) % 5
    return numbers(seed, n, channels) @ mixing * sizes


def test_hessian_is_twice_the_product_of_the_inputs():
    for _, x in layers_to_calibrate():
        hessian = m.hessian_of(x.tolist())
        np.testing.assert_allclose(hessian, 2 * x.T @ x, rtol=1e-12, atol=1e-9)


GPTQ_GRANULARITIES = pytest.mark.parametrize("granularity", ["tensor", "channel", 4, 5, 1])
GPTQ_BITS = pytest.mark.parametrize("bits", [2, 3, 4])
BOTH_ORDERS = pytest.mark.parametrize("act_order", [False, True])


@GPTQ_BITS
@GPTQ_GRANULARITIES
@BOTH_ORDERS
def test_gptq_is_obq_in_a_fixed_order(bits, granularity, act_order):
    for (w, x), damp in itertools.product(layers_to_calibrate(), (0.01, 0.3)):
        hessian = 2 * x.T @ x
        q = m.gptq(w.tolist(), hessian.tolist(), bits, granularity=granularity,
                   act_order=act_order, damp=damp)
        codes, decoded = reference_obq(w, hessian, bits, granularity, act_order, damp)
        assert q.codes == codes.tolist()
        assert_close(q.dequantize(), decoded)


@GPTQ_BITS
@GPTQ_GRANULARITIES
@BOTH_ORDERS
def test_gptq_takes_as_many_bytes_as_rounding_to_nearest(bits, granularity, act_order):
    for w, x in layers_to_calibrate():
        hessian = m.hessian_of(x.tolist())
        q = m.gptq(w.tolist(), hessian, bits, granularity=granularity, act_order=act_order)
        plain = m.quantize(w.tolist(), bits, granularity=granularity)
        assert q.nbytes == plain.nbytes


def test_gptq_damps_by_a_hundredth_unless_told():
    w = numbers(0, 40, 30).tolist()
    x = numbers(1, 40, 5) @ numbers(2, 5, 30)
    x += 0.3 * numbers(3, 40, 30)
    hessian = (2 * x.T @ x).tolist()
    plain = m.gptq(w, hessian, 3, granularity=4)
    assert plain == m.gptq(w, hessian, 3, granularity=4, damp=0.01)
    assert plain != m.gptq(w, hessian, 3, granularity=4, damp=0.011)


def test_gptq_of_dead_inputs_rounds_to_nearest():
    w = numbers(0, 3, 6).tolist()
    dead = np.zeros((6, 6)).tolist()
    q = m.gptq(w, dead, 3, granularity=4)
    assert q == m.quantize(w, 3, granularity=4)


IDENTITY = [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("hessian, damp, word", [
    ([[1.0]], 0.01, "hessian"),
    ([[1.0, 0.0], [0.0, math.nan]], 0.01, "hessian"),
    ([[1.0, 0.0], [0.0]], 0.01, "hessian"),
    (IDENTITY, 0.0, "damp"),
    (IDENTITY, math.inf, "damp"),
])
def test_gptq_refuses_other_hessians_and_damps(hessian, damp, word):
    with pytest.raises(ValueError, match=word):
        m.gptq([[1.0, 2.0]], hessian, 4, granularity="tensor", damp=damp)


def positive_definite_matrix(n):
    """Return a symmetric matrix with eigenvalues of at least 1."""
    a = numbers(0, n, n)
    return a @ a.T + np.eye(n)


EVERY_SIZE = pytest.mark.parametrize("n", [1, 2, 7, 20])


@EVERY_SIZE
def test_upper_factor_is_that_of_the_inverse(n):
    h = positive_definite_matrix(n)
    factor = np.array(m.upper_factor(h.tolist()))
    lower = np.linalg.cholesky(np.linalg.inv(h))
    assert_close(factor, lower.T, 1e-11)
    assert_same(factor, np.triu(factor))


@EVERY_SIZE
def test_upper_factor_refuses_matrices_that_are_not_positive_definite(n):
    h = positive_definite_matrix(n) - 100 * np.eye(n)
    with pytest.raises(ValueError, match="definite"):
        m.upper_factor(h.tolist())


@pytest.mark.parametrize("h", [
    [[0.0]],
    [[1.0, 1.0], [1.0, 1.0]],
    [[1.0, 1.1], [1.1, 1.0]],
])
def test_upper_factor_refuses_matrices_at_the_edge(h):
    with pytest.raises(ValueError, match="definite"):
        m.upper_factor(h)


def reference_awq_scales(x, alpha):
    """Return the scale of every channel: its mean size to the power of alpha, made central."""
    sizes = np.maximum(np.abs(x).mean(0), 1e-4)
    powers = sizes**alpha
    return powers / math.sqrt(powers.max() * powers.min())


def reference_awq_loss(w, x, scales, bits, granularity):
    """Return the squared error of the outputs with columns scaled before they are rounded."""
    _, decoded = reference_quantize(w * scales, bits, True, granularity)
    errors = x / scales @ decoded.T - x @ w.T
    return (errors**2).sum()


def layer_for_awq():
    """Return (w, x) with an input channel that is large and one that is always 0."""
    x = numbers(1, 12, 10)
    x[:, 4] *= 30
    x[:, 7] = 0
    return numbers(0, 5, 10, size=0.3), x


def search_awq(w, x, bits, granularity, grid):
    """Return what awq_search() finds for arrays."""
    return m.awq_search(w.tolist(), x.tolist(), bits, granularity=granularity, grid=grid)


AWQ_CASES = pytest.mark.parametrize("bits, granularity, grid", [
    (3, "channel", 20),
    (4, 4, 20),
    (4, "tensor", 7),
    (2, 3, 1),
])


@AWQ_CASES
def test_awq_search_takes_the_best_alpha_of_its_grid(bits, granularity, grid):
    w, x = layer_for_awq()
    losses = []
    for i in range(grid):
        scales = reference_awq_scales(x, i / grid)
        losses.append(reference_awq_loss(w, x, scales, bits, granularity))
    scales, alpha, _ = search_awq(w, x, bits, granularity, grid)
    assert alpha == np.argmin(losses) / grid
    assert_close_relatively(scales, reference_awq_scales(x, alpha))


@AWQ_CASES
def test_awq_rounds_the_scaled_weights(bits, granularity, grid):
    w, x = layer_for_awq()
    scales, _, q = search_awq(w, x, bits, granularity, grid)
    scaled = w * np.array(scales)
    _, decoded = reference_quantize(scaled, bits, True, granularity)
    assert_same(q.dequantize(), decoded)


@AWQ_CASES
def test_a_try_of_awq_has_the_error_as_a_share_of_the_exact_outputs(bits, granularity, grid):
    w, x = layer_for_awq()
    scales, alpha, q = search_awq(w, x, bits, granularity, grid)
    exact = x @ w.T
    error, *tried = m.awq_try(w.tolist(), x.tolist(), exact.tolist(), alpha, bits, granularity)
    assert tried == [scales, q]
    expected_scales = reference_awq_scales(x, alpha)
    loss = reference_awq_loss(w, x, expected_scales, bits, granularity)
    share = math.sqrt(loss) / np.linalg.norm(exact)
    assert_close_relatively(error, share, 1e-9)


def test_awq_search_with_exponent_0_rounds_to_nearest():
    w = numbers(0, 5, 10).tolist()
    x = numbers(1, 12, 10).tolist()
    scales, alpha, q = m.awq_search(w, x, 4, granularity=5, grid=1)
    assert alpha == 0
    assert scales == [1.0] * 10
    assert q == m.quantize(w, 4, granularity=5)


def test_awq_search_refuses_an_empty_grid_and_other_inputs():
    w = numbers(0, 5, 10).tolist()
    x = numbers(1, 12, 10).tolist()
    with pytest.raises(ValueError, match="grid"):
        m.awq_search(w, x, 4, granularity=5, grid=0)
    with pytest.raises(ValueError, match="grid"):
        m.awq_search(w, [], 4, granularity=5, grid=5)
    with pytest.raises(ValueError, match="grid"):
        m.awq_search(w, [[1.0]], 4, granularity=5, grid=5)


# ---------------------------------------------------------------- HQQ, SqueezeLLM, bits


def hqq_matrices():
    """Yield normal weights, the same with an outlier, and two matrices that take all 20 turns."""
    yield numbers(0, 3, 10)
    with_outlier = numbers(0, 3, 10)
    with_outlier[1, 3] = 9.0
    yield with_outlier
    for seed in (323, 330):
        w = np.random.default_rng(seed).standard_t(2, size=(3, 10))
        w[np.abs(w) < 0.3] = 0.0
        yield w


def reference_shrink(rest, p, beta):
    """Return the rest with every number moved towards 0, the small ones to 0."""
    sizes = np.abs(rest)
    with np.errstate(divide="ignore"):
        sizes = sizes - sizes ** (p - 1) / beta
    return np.sign(rest) * np.maximum(sizes, 0)


def reference_zero_point(values, bits, p, beta):
    """Return the zero point that HQQ finds, turn by turn, and the mean error that it leaves."""
    scale, zero_point = reference_grid(values, bits, symmetric=False)
    best = zero_point
    least = np.inf
    for _ in range(20):
        zero_point = float(np.float16(zero_point))
        codes = reference_codes(values, scale, zero_point, bits)
        rest = values - (codes - zero_point) * scale
        error = np.abs(rest).mean()
        if error >= least:
            break
        best = zero_point
        least = error
        outliers = reference_shrink(rest, p, beta)
        zero_point = (codes - (values - outliers) / scale).mean()
        beta *= 1.01
    return best, least


HQQ_BITS = pytest.mark.parametrize("bits", [2, 4])
HQQ_GRANULARITIES = pytest.mark.parametrize("granularity", ["channel", 4])
HQQ_SHRINKING = pytest.mark.parametrize("p, beta", [(0.7, 10.0), (0.4, 3.0)])


def test_hqq_has_no_grid_for_a_whole_matrix():
    with pytest.raises(ValueError, match="granularity must be 'channel' or a group size"):
        m.hqq([[1.0, 2.0]], 4, granularity="tensor")


@HQQ_BITS
@HQQ_GRANULARITIES
@HQQ_SHRINKING
def test_hqq_finds_the_zero_points(bits, granularity, p, beta):
    for w in hqq_matrices():
        q = m.hqq(w.tolist(), bits, granularity=granularity, p=p, beta=beta)
        all_errors = np.abs(q.dequantize() - w)
        for r, zero_points in enumerate(q.zero_points):
            for g, zero_point in enumerate(zero_points):
                _, values = values_of_grid(w, r, g * q.group, granularity)
                _, errors = values_of_grid(all_errors, r, g * q.group, granularity)
                best, least = reference_zero_point(values, bits, p, beta)
                assert zero_point == best
                assert_close(errors.mean(), least)


@HQQ_BITS
@HQQ_GRANULARITIES
@HQQ_SHRINKING
def test_hqq_takes_two_bytes_for_a_scale_and_two_for_a_zero_point(bits, granularity, p, beta):
    for w in hqq_matrices():
        q = m.hqq(w.tolist(), bits, granularity=granularity, p=p, beta=beta)
        n_grids = count_grids(3, 10, granularity)
        assert q.nbytes == math.ceil(30 * bits / 8) + 4 * n_grids


def reference_kmeans(values, weights, k):
    """Return the centroids that Lloyd's algorithm ends at: it starts at quantiles."""
    n = len(values)
    quantiles = [(2 * i + 1) * n // (2 * k) for i in range(k)]
    centroids = np.sort(values)[quantiles]
    while True:
        nearest = np.abs(values[:, None] - centroids).argmin(1)
        moved = []
        for i in range(k):
            members = nearest == i
            total = (weights * values)[members].sum()
            moved.append(total / weights[members].sum())
        if np.array_equal(moved, centroids):
            return centroids
        centroids = np.array(moved)


@pytest.mark.parametrize("n", [200, 3001])
def test_weighted_kmeans_stands_where_lloyd_stands(n):
    values = numbers(0, n)
    weights = np.abs(numbers(1, n))
    centroids = m.weighted_kmeans(values.tolist(), weights.tolist(), 8)
    assert_close(centroids, reference_kmeans(values, weights, 8), 1e-9)


def test_weighted_kmeans_of_few_values():
    assert m.weighted_kmeans([1.0, 1.0, 5.0], [1.0, 1.0, 3.0], 2) == [1.0, 5.0]
    assert m.weighted_kmeans([], [], 2) == [0.0, 0.0]


class Layer(NamedTuple):
    """A layer's weights, their sensitivities, and how many weights SqueezeLLM keeps apart."""

    w: np.ndarray
    sensitivity: np.ndarray
    n_important: int
    n_large: int

    def apart(self):
        """Return the places of the weights that are kept apart, in order."""
        by_sensitivity = np.argsort(-self.sensitivity.ravel())
        by_size = np.argsort(-np.abs(self.w).ravel())
        return sorted({*by_sensitivity[:self.n_important], *by_size[:self.n_large]})

    def squeezed(self):
        """Return what SqueezeLLM makes of it with codes of 3 bits: the weights and the bytes."""
        decoded, data = m.squeezellm(self.w.tolist(), self.sensitivity.tolist(), 3)
        return np.array(decoded), data


@pytest.fixture(params=[
    (20, 50, 1, 4),
    (40, 100, 2, 16),
    (31, 30, 1, 4),
])
def layer(request):
    """A layer of 1,000, of 4,000 or of 930 weights: 0.05% and 0.4% of them, rounded up."""
    rows, columns, n_important, n_large = request.param
    w = numbers(0, rows, columns, size=0.1)
    sensitivity = np.abs(numbers(1, rows, columns))
    return Layer(w, sensitivity, n_important, n_large)


class Squeezed(NamedTuple):
    """What the bytes of SqueezeLLM hold."""

    dense: np.ndarray  # [out][in] what the codes decode to
    codebook: np.ndarray
    apart: np.ndarray  # the weights kept apart, row by row
    columns: np.ndarray  # where they stand in their rows
    before: np.ndarray  # for every row and the end, how many come before


def unpack_squeezed(data, layer):
    """Take the bytes apart by the layout: codes, codebook, weights apart, columns, and rows."""
    n_apart = len(layer.apart())
    codebook_start = math.ceil(layer.w.size * 3 / 8)
    columns_start = codebook_start + 2 * (8 + n_apart)
    codes = unpack(data[:codebook_start], 3, layer.w.size)
    halves = np.frombuffer(data[codebook_start:columns_start], "<f2").astype(float)
    shorts = np.frombuffer(data[columns_start:], "<u2")
    codebook = halves[:8]
    dense = codebook[codes].reshape(layer.w.shape)
    apart = halves[8:]
    columns = shorts[:n_apart]
    before = shorts[n_apart:]
    return Squeezed(dense, codebook, apart, columns, before)


def test_squeezellm_keeps_what_matters_in_fp16(layer):
    decoded, _ = layer.squeezed()
    apart = layer.apart()
    weights = layer.w.ravel()[apart]
    assert_same(decoded.ravel()[apart], np.float16(weights))


def test_squeezellm_counts_codes_codebook_and_weights_apart(layer):
    _, data = layer.squeezed()
    n_codes = math.ceil(layer.w.size * 3 / 8)
    n_rows = len(layer.w)
    n_apart = len(layer.apart())
    n_codebook = 2 * 8
    n_before = 2 * (n_rows + 1)
    assert len(data) == n_codes + n_codebook + 4 * n_apart + n_before


def test_squeezellm_takes_the_nearest_of_its_codebook(layer):
    _, data = layer.squeezed()
    squeezed = unpack_squeezed(data, layer)
    values = np.delete(layer.w, layer.apart())  # delete() makes one row of it
    dense = np.delete(squeezed.dense, layer.apart())
    gaps = np.abs(values[:, None] - squeezed.codebook)
    errors = np.abs(dense - values)
    assert (errors - gaps.min(1)).max() <= 1e-15


def test_squeezellm_decodes_from_its_bytes(layer):
    decoded, data = layer.squeezed()
    squeezed = unpack_squeezed(data, layer)
    expected = squeezed.dense
    for r, row in enumerate(expected):
        start = squeezed.before[r]
        end = squeezed.before[r + 1]
        row[squeezed.columns[start:end]] = squeezed.apart[start:end]
    assert_same(decoded, expected)


def test_expected_damage_is_half_the_weighted_square():
    w = numbers(0, 3, 5)
    decoded = numbers(1, 3, 5)
    sensitivity = np.abs(numbers(2, 3, 5))
    damage = m.expected_damage(w.tolist(), decoded.tolist(), sensitivity.tolist())
    squares = sensitivity * (w - decoded) ** 2
    expected = squares.sum() / 2
    assert_close_relatively(damage, expected)


def bit_choices():
    """Return for five matrices the choices of 2, 3 and 4 bits, with damages by chance."""
    rng = random.Random(0)
    choices = {}
    for name in "abcde":
        choices[name] = {bits: m.Choice(rng.random() / bits, nbytes=10 * bits)
                         for bits in (2, 3, 4)}
    return choices


def least_damage(choices, budget):
    """Return the least sum of damages that the budget allows, of all combinations."""
    least = math.inf
    for combination in itertools.product(*(row.values() for row in choices.values())):
        nbytes = sum(choice.nbytes for choice in combination)
        if nbytes <= budget:
            least = min(least, sum(choice.damage for choice in combination))
    return least


@pytest.mark.parametrize("budget", [100, 130, 151, 200])
def test_assign_bits_does_the_least_damage_within_the_budget(budget):
    choices = bit_choices()
    assigned = m.assign_bits(choices, budget)
    picked = [choices[name][bits] for name, bits in assigned.items()]
    assert list(assigned) == list(choices)
    assert sum(choice.damage for choice in picked) == least_damage(choices, budget)
    assert sum(choice.nbytes for choice in picked) <= budget


def test_assign_bits_refuses_a_budget_below_the_smallest_choices():
    with pytest.raises(ValueError, match="budget"):
        m.assign_bits(bit_choices(), 99)


# ---------------------------------------------------------------------- one bit, training


def weights_with_a_mean():
    """Return weights of which one is exactly the mean, which is not 0."""
    w = numbers(0, 4, 9) + 0.2
    w[0, 0] = w.mean()
    return w


def reference_ternary(w):
    """Return the codes -1, 0 and 1 of b1.58, and their scale."""
    gamma = np.abs(w).mean()
    return np.clip(np.rint(w / gamma), -1, 1), gamma


def test_bitnet_signs_are_those_of_w_less_its_mean():
    w = weights_with_a_mean()
    size = np.abs(w).mean()
    expected = np.where(w > w.mean(), size, -size)
    assert_close(m.bitnet_signs(w.tolist()), expected)


def test_ternary_codes_are_the_nearest():
    w = weights_with_a_mean()
    codes, gamma = m.ternary_codes(w.tolist())
    expected_codes, expected_gamma = reference_ternary(w)
    assert_same(codes, expected_codes)
    assert_close(gamma, expected_gamma, 1e-15)


def test_ternary_codes_of_halves_are_even():
    codes, gamma = m.ternary_codes([[0.5, -0.5, 1.0, 2.0]])
    assert gamma == 1.0
    assert codes == [[0, 0, 1, 1]]


def test_ternary_weights_are_codes_times_their_scale():
    w = weights_with_a_mean()
    codes, gamma = reference_ternary(w)
    assert_close(m.ternary_weights(w.tolist()), codes * gamma)
    assert m.ternary_weights([[0.0, 0.0]]) == [[0.0, 0.0]]


def test_least_squares_scale_fits_the_codes_best():
    w = weights_with_a_mean()
    codes, _ = m.ternary_codes(w.tolist())
    column = np.reshape(codes, (-1, 1))
    [best], *_ = np.linalg.lstsq(column, w.ravel(), rcond=None)
    assert_close(m.least_squares_scale(w.tolist(), codes), best)


def test_ternary_product_multiplies_once_a_row():
    codes, gamma = m.ternary_codes(weights_with_a_mean().tolist())
    x = numbers(1, 9)
    y, additions, multiplications = m.ternary_product(x.tolist(), codes, gamma)
    assert_close(y, np.array(codes) @ x * gamma)
    assert additions == np.count_nonzero(codes)
    assert multiplications == len(codes)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 23])
def test_pack_ternary_puts_five_codes_in_a_byte(n):
    codes = [(i * 5 + i * i) % 3 - 1 for i in range(n)]
    data = m.pack_ternary(codes)
    assert len(data) == math.ceil(n / 5)
    unpacked = []
    for byte in data:
        unpacked += [byte // 3**i % 3 - 1 for i in range(5)]
    assert unpacked[:n] == codes


CONFIG = m.Config(vocab_size=11, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=12)
TOKENS = [1, 7, 3, 3, 9, 0, 10]


@pytest.fixture
def model():
    """A tiny random model."""
    weights = m.init_weights(CONFIG, random.Random(5))
    return m.Llama(CONFIG, weights)


def test_straight_through_takes_the_gradient_at_the_ternary_weights(model):
    names = ["layers.1.attention.wq", "layers.0.feed_forward.w2"]
    loss, gradients = m.straight_through(CONFIG, model.weights, TOKENS, names)
    ternary = dict(model.weights)
    for name in names:
        codes, gamma = reference_ternary(np.array(model.weights[name]))
        ternary[name] = (codes * gamma).tolist()
    expected_loss, expected = m.loss_and_gradients(CONFIG, ternary, TOKENS)
    assert_close(loss, expected_loss)
    for name in CONFIG.shapes():
        assert_close(gradients[name], expected[name])


def test_with_adapter_adds_the_product_of_its_matrices():
    w = numbers(0, 5, 7)
    a = numbers(2, 3, 7)
    b = numbers(3, 5, 3)
    adapter = m.Adapter(a.tolist(), b.tolist())
    assert_close(m.with_adapter(w.tolist(), adapter), w + b @ a)


def test_adapter_gradient_is_that_of_the_product():
    d_w = numbers(1, 5, 7)
    a = numbers(2, 3, 7)
    b = numbers(3, 5, 3)
    adapter = m.Adapter(a.tolist(), b.tolist())
    d_a, d_b = m.adapter_gradient(d_w.tolist(), adapter)
    assert_close(d_a, b.T @ d_w)
    assert_close(d_b, d_w @ a.T)


def test_new_adapter_begins_at_0():
    w = numbers(4, 3, 400).tolist()
    adapter = m.new_adapter(w, 20, random.Random(0))
    assert np.shape(adapter.a) == (20, 400)
    assert np.std(adapter.a) == pytest.approx(1 / 20, rel=0.05)
    assert adapter.b == [[0.0] * 20] * 3


def test_moving_scales_leaves_the_function(model):
    expected = model.forward(TOKENS)
    for source, readers in m.sources_and_readers(CONFIG).items():
        n_channels = len(model.weights[readers[0]][0])
        scales = np.exp(numbers(1, n_channels)).tolist()
        moved = m.move_scales(model.weights, source, readers, scales)
        assert moved[source] != model.weights[source]
        assert_close(m.Llama(CONFIG, moved).forward(TOKENS), expected, 1e-9)


def test_subspace_is_that_of_the_svd():
    strengths = np.diag([50.0, 20.0, 1.0, 0.1])
    gradient = numbers(0, 6, 4) @ strengths @ numbers(1, 4, 9)
    basis = m.subspace(gradient.tolist(), 2, random.Random(0))
    p = np.array(basis)
    assert_close(p @ p.T, np.eye(2))
    left_vectors, _, _ = np.linalg.svd(gradient)
    first_two = left_vectors[:, :2]
    assert_close(p.T @ p, first_two @ first_two.T, 1e-6)


# The most that an update may miss by, in steps of the grid.
@pytest.mark.parametrize("stochastic, most_steps", [(True, 1.0), (False, 0.5)])
def test_a_step_of_q_galore_is_adams_in_the_subspace(stochastic, most_steps):
    w = numbers(0, 6, 10).tolist()
    gradient = numbers(1, 6, 10)
    optimizer = m.QGaLore(w, 2, random.Random(0), stochastic)
    before = np.array(optimizer.q.dequantize())
    optimizer.step(gradient.tolist(), 0.05)
    after = np.array(optimizer.q.dequantize())
    p = np.array(optimizer.projection.dequantize())
    projected = p @ gradient
    update = projected / (np.abs(projected) + 1e-8)  # Adam's first step is the sign
    wanted = before - 0.05 * p.T @ update
    steps = (after - wanted) / np.array(optimizer.q.scales)
    assert np.abs(steps).max() <= most_steps * (1 + 1e-6)
    assert not np.allclose(after, before)


@pytest.mark.parametrize("stochastic", [True, False])
def test_q_galore_keeps_weights_in_8_bits_and_the_projection_in_4(stochastic):
    w = numbers(0, 6, 10).tolist()
    gradient = numbers(1, 6, 10).tolist()
    optimizer = m.QGaLore(w, 2, random.Random(0), stochastic)
    optimizer.step(gradient, 0.05)
    assert optimizer.q.bits == 8
    assert optimizer.projection.bits == 4
    assert np.shape(optimizer.projection.dequantize()) == (2, 6)


def test_projections_that_agree_are_refreshed_less_often():
    w = numbers(2, 6, 9).tolist()
    optimizer = m.QGaLore(w, 1, random.Random(0))
    gradient = numbers(0, 6, 1) @ numbers(1, 1, 9)
    for _ in range(20):
        optimizer.step(gradient.tolist(), 0.01)
    assert optimizer.refreshed == 4  # at steps 0, 2, 6 and 14
    assert optimizer.interval == 16


def test_projections_that_turn_are_refreshed_every_time():
    w = numbers(2, 6, 9).tolist()
    optimizer = m.QGaLore(w, 1, random.Random(0))
    for i in range(20):
        gradient = np.zeros((6, 9))
        gradient[i // 2 % 6] = 1.0
        optimizer.step(gradient.tolist(), 0.01)
    assert optimizer.refreshed == 10
    assert optimizer.interval == 2


def test_stochastic_codes_are_right_on_average():
    rng = random.Random(0)
    values = [0.25, -0.25, 3.0, 500.0, -1.9]
    codes = np.array([m.stochastic_codes(values, 0.5, rng) for _ in range(2000)])
    seen = [set(column) for column in codes.T]
    assert seen == [{0, 1}, {-1, 0}, {6}, {127}, {-4, -3}]
    assert_close(codes.mean(0), [0.5, -0.5, 6, 127, -3.8], 0.05)


def test_alignment_is_the_cosine_whatever_the_sign():
    u = numbers(0, 5)
    v = numbers(1, 5)
    lengths = np.linalg.norm(u) * np.linalg.norm(v)
    cosine = abs(u @ v) / lengths
    assert_close(m.alignment(u.tolist(), v.tolist()), cosine, 1e-15)
    opposite = -3 * u
    assert_close(m.alignment(opposite.tolist(), u.tolist()), 1, 1e-15)


def test_alignment_with_zeros_is_0():
    assert m.alignment([0.0, 0.0], [1.0, 2.0]) == 0


def test_loss_scale_begins_as_that_of_pytorch():
    scaler = m.LossScale()
    assert scaler.scale == 65536
    assert scaler.patience == 2000


def test_loss_scale_halves_at_once_and_doubles_with_patience():
    scaler = m.LossScale()
    scaler.update(True)
    for _ in range(1999):
        scaler.update(False)
    assert scaler.scale == 32768
    scaler.update(False)
    assert scaler.scale == 65536


def test_through_format_rounds_the_scaled_gradient():
    gradient = numbers(0, 50, size=1e-7)
    halves = (gradient * 1024).astype(np.float16)
    rounded = m.through_format(gradient.tolist(), 1024.0, m.fp16)
    assert_same(rounded, halves.astype(float) / 1024)


# --------------------------------------------------------------- the lab and its measures


@pytest.fixture
def labs(monkeypatch):
    """build_lab() with numpy behind the model and Adam: five models are trained here."""
    make_fast(monkeypatch, m)
    return m.build_lab


def fast_quantize(w, bits, *, symmetric=True, granularity="tensor"):
    """Return what quantize() returns, to the bit, where the grids of a row have equally many."""
    n_columns = len(w[0])
    group = {"tensor": n_columns, "channel": n_columns}.get(granularity, granularity)
    if n_columns % group:
        return SLOW_QUANTIZE(w, bits, symmetric=symmetric, granularity=granularity)
    values = np.array(w).reshape(len(w), -1, group)
    axes = (0, 1, 2) if granularity == "tensor" else 2
    low, high = m.code_range(bits)
    if symmetric:
        sizes = np.abs(values).max(axes, keepdims=True) / high
    else:
        least = np.minimum(values.min(axes, keepdims=True), 0)
        sizes = (np.maximum(values.max(axes, keepdims=True), 0) - least) / (high - low)
    scales = half_up_array(sizes)
    scales[scales == 0] = 1.0
    zeros = 0 if symmetric else low + np.rint(-least / scales)
    codes = np.clip(np.rint(values / scales + zeros), low, high).astype(int).reshape(len(w), -1)
    scales = np.broadcast_to(scales, values.shape)[:, :, 0]
    zeros = np.broadcast_to(zeros, values.shape)[:, :, 0].astype(int)
    overhead = m.grid_bytes(scales.tolist(), zeros.tolist(), bits, granularity, symmetric)
    return m.Quantized(codes.tolist(), scales.tolist(), zeros.tolist(), bits, group, overhead)


def half_up_array(x):
    """Return the smallest float16 of each number that is not below it."""
    halves = x.astype(np.float16)
    return np.where(halves < x, np.nextafter(halves, np.float16(np.inf)), halves).astype(float)


def fast_pack_bits(codes, bits):
    """Return what pack_bits() returns."""
    each_bit = np.array(codes)[:, None] >> np.arange(bits) & 1
    return np.packbits(each_bit.astype(np.uint8), bitorder="little").tobytes()


def fast_gptq(w, hessian, bits, *, granularity, act_order=False, damp=0.01):
    """Return what gptq() returns for a group size, up to rounding, all rows at once."""
    n = len(w[0])
    order = np.argsort(-np.diag(hessian), kind="stable") if act_order else np.arange(n)
    hessian = np.array(hessian)[np.ix_(order, order)]
    damped = hessian + damp * np.mean(np.diag(hessian)) * np.eye(n)
    u = np.linalg.cholesky(np.linalg.inv(damped)).T
    plain = fast_quantize(w, bits, granularity=granularity)
    low, high = m.code_range(bits)
    left = np.array(w)[:, order]
    scales = np.array(plain.scales)
    codes = np.zeros(left.shape, int)
    for i, j in enumerate(order):
        if j % granularity == 0 and not act_order:
            largest = np.abs(left[:, i:i + granularity]).max(1)
            scales[:, j // granularity] = half_up_array(largest / high)
        scale = scales[:, j // granularity]
        codes[:, j] = np.clip(np.rint(left[:, i] / scale), low, high)
        error = (left[:, i] - codes[:, j] * scale) / u[i, i]
        left[:, i + 1:] -= np.outer(error, u[i, i + 1:])
    return m.replace(plain, codes=codes.tolist(), scales=scales.tolist())


def fast_fp8_rows(matrix):
    """Return what fp8_rows() returns, to the bit."""
    x = np.array(matrix)
    scales = np.abs(x).max(1, keepdims=True) / 448
    scales[scales == 0] = 1.0
    x = x / scales
    steps = 2.0 ** (np.maximum(np.frexp(x)[1] - 1, -6) - 3)
    return (np.rint(x / steps) * steps).tolist(), scales[:, 0].tolist()


def fast_int8_matmul(x, q, x_scale=None):
    """Return what int8_matmul() returns, to the bit: sums of whole numbers have no rounding."""
    x = np.array(x)
    scales = x_scale or np.abs(x).max(1, keepdims=True) / 127
    scales = np.where(np.equal(scales, 0), 1.0, scales)
    codes = np.clip(np.rint(x / scales), -128, 127)
    return (codes @ np.array(q.codes).T * scales * np.ravel(q.scales)).tolist()


def fast_hessian_of(x):
    """Return what hessian_of() returns, up to rounding."""
    return (2 * np.array(x).T @ np.array(x)).tolist()


def fast_compress(lab, method, setting):
    """Return what compress() returns; the model's weights are turned into arrays once."""
    model, nbytes = SLOW_COMPRESS(lab, method, setting)
    keep_arrays(model)
    return model, nbytes


SLOW_COMPRESS = m.compress
SLOW_QUANTIZE = m.quantize
FAST = {"quantize": fast_quantize, "pack_bits": fast_pack_bits, "gptq": fast_gptq,
        "fp8_rows": fast_fp8_rows, "int8_matmul": fast_int8_matmul, "hessian_of": fast_hessian_of,
        "compress": fast_compress}


def test_fast_functions_return_what_those_of_the_script_do():
    for seed, (rows, columns) in enumerate([(7, 20), (1, 1), (3, 64), (32, 32)]):
        w = numbers(seed, rows, columns)
        w[0] *= 1e-7
        w[-1] = 0.0
        for bits, granularity, symmetric in itertools.product(
                range(2, 9), ("tensor", "channel", 4, 32), (True, False)):
            arguments = {"symmetric": symmetric, "granularity": granularity}
            assert fast_quantize(w.tolist(), bits, **arguments) == m.quantize(
                w.tolist(), bits, **arguments)
        assert fast_fp8_rows(w.tolist()) == m.fp8_rows(w.tolist())
        codes = m.quantize(w.tolist(), 3).codes
        assert fast_pack_bits(sum(codes, []), 3) == m.pack_bits(sum(codes, []), 3)
        q = m.quantize(w.tolist(), 8, granularity="channel")
        x = numbers(seed + 9, 5, columns)
        x[2] = 0.0
        for x_scale in (None, 0.01):
            assert fast_int8_matmul(x.tolist(), q, x_scale) == m.int8_matmul(x.tolist(), q, x_scale)
        hessian = m.hessian_of(x.tolist())
        assert_close_relatively(fast_hessian_of(x.tolist()), hessian)


@pytest.mark.parametrize("act_order", [False, True])
def test_fast_gptq_is_that_of_the_script(act_order):
    for seed, (rows, columns) in enumerate([(7, 32), (16, 64)]):
        w = numbers(seed, rows, columns).tolist()
        hessian = m.hessian_of(correlated_inputs(seed, 40, columns).tolist())
        for bits in (3, 4):
            arguments = {"granularity": 32, "act_order": act_order}
            got = fast_gptq(w, hessian, bits, **arguments)
            expected = m.gptq(w, hessian, bits, **arguments)
            assert got.codes == expected.codes
            assert got.scales == expected.scales


@pytest.fixture
def lab(labs):
    """The lab of seed 0."""
    return labs(0)


def verses_of(ids):
    """Return the lines of text that token ids spell."""
    return m.word_tokenizer().decode(ids).splitlines(keepends=True)


@pytest.mark.parametrize("seed", range(5))
def test_no_text_shares_a_verse_with_another(seed, labs):
    lab = labs(seed)
    texts = [lab.training, lab.calibration, lab.evaluation]
    texts += [lab.dialect_training, lab.dialect_validation, lab.dialect_evaluation]
    for first, second in itertools.combinations(texts, 2):
        assert not set(verses_of(first)) & set(verses_of(second))


@pytest.mark.parametrize("seed", range(5))
def test_shared_verses_counts_those_of_the_evaluation_text(seed, labs):
    lab = labs(seed)
    n_verses = len(set(verses_of(lab.evaluation)))
    leaking = m.replace(lab, calibration=lab.evaluation)
    assert n_verses >= 4
    assert m.shared_verses(lab) == 0
    assert m.shared_verses(leaking) == n_verses


PROBABILITIES = [0.5, 0.25, 0.15, 0.1]  # of a clause's four successors


@pytest.fixture
def language():
    """A language of the rhyme's first eight clauses."""
    return m.make_language(random.Random(3), m.CLAUSES[:8])


def draw_verses(language, n):
    """Return n verses, each as (text, log of its probability)."""
    rng = random.Random(0)
    return [language.draw(rng) for _ in range(n)]


def clauses_of(language, text):
    """Return the numbers of the clauses in a verse."""
    pattern = "|".join(map(re.escape, language.clauses))
    return [language.clauses.index(clause) for clause in re.findall(pattern, text)]


def test_every_clause_has_four_successors(language):
    for clause, successors in language.successors.items():
        assert len(set(successors)) == 4
        assert clause not in successors
        assert 0 not in successors


def test_a_verse_has_four_clauses_and_ends_at_the_house(language):
    for text, _ in draw_verses(language, 4000):
        order = clauses_of(language, text)
        assert len(order) == 4
        assert order[-1] == 0
        clauses = [m.CLAUSES[number] for number in order]
        assert text == "This is " + " ".join(clauses) + "\n"


def test_successors_are_as_frequent_as_they_are_probable(language):
    following = {clause: [] for clause in language.successors}
    for text, _ in draw_verses(language, 4000):
        first, second, third, _ = clauses_of(language, text)
        following[first].append(second)
        following[second].append(third)
    for clause, successors in language.successors.items():
        for successor, probability in zip(successors, PROBABILITIES):
            frequency = following[clause].count(successor) / len(following[clause])
            assert_close(frequency, probability, 0.06)


def test_a_verse_comes_with_its_log_probability(language):
    for text, log_p in draw_verses(language, 50):
        first, second, third, _ = clauses_of(language, text)
        place_of_second = language.successors[first].index(second)
        place_of_third = language.successors[second].index(third)
        probability = PROBABILITIES[place_of_second] * PROBABILITIES[place_of_third] / 7
        assert log_p == pytest.approx(math.log(probability))


def test_dialect_clauses_have_the_next_clauses_verb():
    assert m.dialect_clauses()[2:4] == ["the rat and killed", "the cat and worried"]


def test_draw_text_avoids_the_used_verses_and_adds_its_own(language):
    ids, _ = m.draw_text(language, random.Random(0), set(), verses=5)
    first, *others = verses_of(ids)
    assert len(others) == 4
    used = {first}
    ids, _ = m.draw_text(language, random.Random(0), used, verses=5)
    drawn = verses_of(ids)
    unused = [verse for verse in others if verse != first]
    assert drawn[:len(unused)] == unused
    assert used == {first, *drawn}


def test_draw_text_goes_on_to_so_many_verses_and_tokens(language):
    ids, _ = m.draw_text(language, random.Random(0), set(), verses=5, tokens=100)
    assert len(ids) >= 100
    *all_but_one, _ = verses_of(ids)
    assert len(m.word_tokenizer().encode("".join(all_but_one))) < 100


def test_draw_text_returns_the_log_probability(language):
    log_p_of = dict(draw_verses(language, 500))
    [(first, _)] = draw_verses(language, 1)
    ids, log_p = m.draw_text(language, random.Random(0), {first}, verses=5, tokens=100)
    expected = sum(log_p_of[verse] for verse in verses_of(ids))
    assert log_p == pytest.approx(expected)


def beginning_of_the_rhyme():
    """Return the first eight lines of the text."""
    lines = m.TEXT.splitlines(keepends=True)
    return "".join(lines[:8])


def test_the_tokenizer_of_words_decodes_what_it_encodes():
    tokenizer = m.word_tokenizer()
    rhyme = beginning_of_the_rhyme()
    assert tokenizer.decode(tokenizer.encode(rhyme)) == rhyme


def test_the_vocabulary_holds_characters_and_words():
    rhyme = beginning_of_the_rhyme()
    full = m.Tokenizer.train(rhyme, 160)
    words = {full.vocab[i] for i in full.encode(rhyme)}
    assert set(m.word_tokenizer().vocab) == set(rhyme) | words


def probabilities(model, ids):
    """Return what a model expects after each token but the last, [tokens][vocabulary]."""
    powers = np.exp(model.forward(ids[:-1]))
    return powers / powers.sum(1, keepdims=True)


def score_in_3_bits(lab):
    """Return the score of the model with one scale a matrix, measured anew."""
    return m.score.__wrapped__(lab, "INT per tensor", m.Setting(bits=3))


def kl_of_verses_in_3_bits(lab):
    """Return the KL divergences of the tokens of each verse of the evaluation text.

    The house at the end of a verse is not measured.
    """
    compressed, _ = m.compress(lab, "INT per tensor", m.Setting(bits=3))
    kls = []
    for verse in verses_of(lab.evaluation):
        ids = lab.tokenizer.encode(verse.removesuffix(" the house that Jack built.\n"))
        p = probabilities(lab.model, ids)
        q = probabilities(compressed, ids)
        kls.append((p * np.log(p / q)).sum(1))
    return kls


def test_a_score_is_the_mean_kl_divergence_of_a_token(lab):
    kls = np.concatenate(kl_of_verses_in_3_bits(lab))
    assert_close_relatively(score_in_3_bits(lab).kl, kls.mean(), 1e-9)


def test_the_error_of_a_score_is_that_of_a_ratio(lab):
    kls = kl_of_verses_in_3_bits(lab)
    all_kls = np.concatenate(kls)
    mean = all_kls.mean()
    squares = [(kl.sum() - mean * len(kl)) ** 2 for kl in kls]
    n = len(kls)
    variance = sum(squares) * n / (n - 1)
    error = math.sqrt(variance) / len(all_kls)
    assert_close_relatively(score_in_3_bits(lab).error, error, 1e-9)


def test_mean_and_error_by_hand():
    mean, error = m.mean_and_error([(1.0, 2), (4.0, 2)])
    assert mean == 5 / 4
    # Each verse is 1.5 from twice the mean.
    assert_close(error, math.sqrt((1.5**2 + 1.5**2) * 2) / 4)


def changed(score, *changes):
    """Return a score with each verse's sum moved by so much."""
    verses = []
    for (total, n_tokens), change in zip(score.verses, changes, strict=True):
        verses.append((total + change, n_tokens))
    return score._replace(verses=verses)


@pytest.fixture
def score(lab):
    """The score of a model on five verses: by luck, one of 16 pairs of equals is no tie."""
    return m.score(lab, "INT per tensor", m.DEFAULTS)


def test_worse_is_worse_on_every_verse_by_however_little(score):
    worse = changed(score, 1e-9, 1e-9, 1.0, 1e-9, 1e-9)
    assert m.compare(score, worse) == "is better than"
    assert m.compare(worse, score) == "is worse than"


def test_one_verse_that_is_not_worse_makes_a_tie(score):
    same_on_one = changed(score, 0.0, 1.0, 1.0, 1.0, 1.0)
    better_on_one = changed(score, -1e-9, 1.0, 1.0, 1.0, 1.0)
    assert m.compare(score, score) == "is in a tie with"
    assert m.compare(score, same_on_one) == "is in a tie with"
    assert m.compare(score, better_on_one) == "is in a tie with"


def count_all_weights(lab):
    """Return how many weights the model has."""
    return sum(math.prod(shape) for shape in lab.config.shapes().values())


def test_quantized_are_all_weights_but_the_embedding_and_the_norms(lab):
    assert lab.n_weights == count_all_weights(lab) - 56 * 64 - 3 * 64


@pytest.mark.parametrize("bits", [4, 8])
def test_a_file_holds_codes_scales_and_the_rest_in_fp16(bits, lab):
    score = m.score(lab, "INT per channel", m.Setting(bits=bits))
    n_rows = sum(len(lab.model.weights[name]) for name in lab.linears)
    nbytes = lab.n_weights * bits // 8 + 2 * n_rows
    n_rest = count_all_weights(lab) - lab.n_weights
    assert score.nbytes == nbytes + 2 * n_rest
    assert score.bits == 8 * nbytes / lab.n_weights


@pytest.mark.parametrize("method", ["INT8 static", "INT8 dynamic", "FP8", "SmoothQuant"])
def test_files_in_8_bits_have_one_size(method, lab):
    plain = m.score(lab, "INT per channel", m.Setting(bits=8))
    assert m.score(lab, method, m.DEFAULTS).nbytes == plain.nbytes


def test_compress_rounds_the_matrices_and_keeps_the_rest_in_fp16(lab):
    model, _ = m.compress(lab, "INT per channel", m.DEFAULTS)
    norm = np.float16(lab.model.weights["norm"])
    assert_same(model.weights["norm"], norm)
    output = np.array(lab.model.weights["output"])
    _, decoded = reference_quantize(output, 4, True, "channel")
    assert_same(model.weights["output"], decoded)


WQ = "layers.0.attention.wq"


def assert_made(lab, method, expected):
    """Assert that encode_matrix() makes this (what it decodes to, its bytes) of wq.

    In 3 bits and groups of 16.
    """
    w = lab.model.weights[WQ]
    assert m.encode_matrix(lab, method, WQ, w, m.Setting(3, 16)) == expected


def test_matrices_are_rounded_by_the_named_method(lab):
    w = lab.model.weights[WQ]
    in_groups = m.quantize(w, 3, granularity=16).stored()
    asymmetric = m.quantize(w, 3, granularity=16, symmetric=False).stored()
    assert_made(lab, "INT per tensor", m.quantize(w, 3).stored())
    assert_made(lab, "INT per channel", m.quantize(w, 3, granularity="channel").stored())
    assert_made(lab, "INT in groups", in_groups)
    assert_made(lab, "INT asymmetric", asymmetric)
    assert_made(lab, "HQQ", m.hqq(w, 3, granularity=16).stored())
    assert_made(lab, "NF4", m.quantize_nf4(w, double_quant=True).stored())
    assert_made(lab, "NVFP4", m.quantize_nvfp4(w).stored())


def test_gptq_calibrates_on_all_tokens_or_on_one(lab):
    w = lab.model.weights[WQ]
    of_all = m.hessian_of(lab.inputs[WQ])
    of_one = m.hessian_of(lab.inputs[WQ][:1])
    ordered = m.gptq(w, of_all, 3, granularity=16, act_order=True)
    assert_made(lab, "GPTQ", m.gptq(w, of_all, 3, granularity=16).stored())
    assert_made(lab, "GPTQ act-order", ordered.stored())
    assert_made(lab, "GPTQ one token", m.gptq(w, of_one, 3, granularity=16).stored())


def test_kmeans_takes_sensitivities_where_it_is_weighted(lab):
    w = lab.model.weights[WQ]
    sensitivity = lab.sensitivities[WQ]
    equal = np.ones(np.shape(w)).tolist()
    weighted = m.squeezellm(w, sensitivity, 3, important=0, large=0)
    assert_made(lab, "SqueezeLLM", m.squeezellm(w, sensitivity, 3))
    assert_made(lab, "k-means weighted", weighted)
    assert_made(lab, "k-means", m.squeezellm(w, equal, 3, important=0, large=0))


@pytest.mark.parametrize("method", ["Q8_0", "Q4_0", "MXFP4"])
def test_matrices_in_blocks_are_encoded_row_by_row(method, lab):
    encode = getattr(m, method.lower() + "_encode")
    decode = getattr(m, method.lower() + "_decode")
    rows = [encode(row) for row in lab.model.weights[WQ]]
    decoded = [decode(data, 64) for data in rows]
    assert_made(lab, method, (decoded, b"".join(rows)))


def test_encode_matrix_refuses_a_method_that_it_does_not_know(lab):
    w = lab.model.weights[WQ]
    with pytest.raises(ValueError, match="method"):
        m.encode_matrix(lab, "GPTQ 2", WQ, w, m.DEFAULTS)


def test_the_kept_column_is_the_one_of_the_largest_inputs():
    w = numbers(0, 5, 8)
    x = numbers(1, 6, 8)
    x[:, 3] *= 9
    plain = m.quantize(w.tolist(), 4, granularity=4)
    kept = np.float16(w[:, 3])
    expected = np.array(plain.dequantize())
    expected[:, 3] = kept
    column = m.largest_column(x.tolist())
    decoded, data = m.keep_column(w.tolist(), column, 4, 4)
    assert_same(decoded, expected)
    assert data == plain.to_bytes() + kept.tobytes()


def test_models_in_8_bits_multiply_as_they_are_called(lab):
    name = "layers.0.feed_forward.w2"
    w = lab.model.weights[name]
    inputs = np.array(lab.inputs[name][:5])
    x = (2 * inputs).tolist()  # some exceed the static scale
    q = m.quantize(w, 8, granularity="channel")
    scale = m.static_scale(lab.inputs[name])
    w_codes, w_scales = m.fp8_rows(w)
    products = {
        "INT8 static": m.int8_matmul(x, q, scale),
        "INT8 dynamic": m.int8_matmul(x, q),
        "FP8": m.fp8_matmul(x, w_codes, w_scales),
        "LLM.int8()": m.llm_int8_matmul(x, w),
    }
    for method, product in products.items():
        model, _ = m.compress(lab, method, m.DEFAULTS)
        assert model.linear(name, x) == product


def test_smoothquant_moves_scales_from_norms_to_their_readers(lab):
    model, _ = m.compress(lab, "SmoothQuant", m.Setting(alpha=0.75))
    plain = lab.model.weights
    for norm, readers in m.norms_and_readers(lab.config).items():
        reader = readers[0]
        rows = np.vstack([plain[name] for name in readers])
        x_absmax = np.abs(lab.inputs[reader]).max(0)
        w_absmax = np.abs(rows).max(0)
        scales = x_absmax**0.75 / w_absmax**0.25
        assert_close_relatively(model.weights[norm], plain[norm] / scales, 1e-3)  # it is in FP16
        assert_close_relatively(model.weights[reader], plain[reader] * scales)


def test_calibration_inputs_are_what_the_matrices_read(lab):
    weights = lab.model.weights
    x = np.array(weights["tok_embeddings"])[lab.calibration]
    mean_squares = (x**2).mean(1, keepdims=True)
    normed = x / np.sqrt(mean_squares + 1e-5)
    expected = normed * weights["layers.0.attention_norm"]
    assert_close(lab.inputs[WQ], expected, 1e-9)
    assert set(lab.inputs) == set(lab.linears)


def loss_after_a_change(lab, name, r, c, change, ids):
    """Return the loss on a verse with one weight of a matrix changed."""
    w = np.array(lab.model.weights[name])
    w[r, c] += change
    weights = lab.model.weights | {name: w.tolist()}
    logits = m.Llama(lab.config, weights).forward(ids[:-1])
    loss, _ = m.cross_entropy(logits, ids[1:])
    return loss


def test_sensitivities_are_squared_gradients(lab):
    name = "layers.0.feed_forward.w2"
    total = 0.0
    for verse in verses_of(lab.calibration):
        ids = lab.tokenizer.encode(verse)
        above = loss_after_a_change(lab, name, 3, 5, 1e-5, ids)
        below = loss_after_a_change(lab, name, 3, 5, -1e-5, ids)
        gradient = (above - below) / 2e-5
        total += gradient**2
    assert_close_relatively(lab.sensitivities[name][3][5], total, 1e-4)


# ------------------------------------------- the findings, of 20 models of seeds 0 to 19
#
# What the trace says of 20 models. The suite measures the first five of them; all are measured by
#     FINDING_SEEDS=20 python3 -m pytest -k findings tests/test_microquant.py

N_SEEDS = int(os.environ.get("FINDING_SEEDS", 5))
SEEDS = pytest.mark.parametrize("seed", range(N_SEEDS))

# (a method, what it is compared with): the seeds of the 20 on which its KL or loss is the higher,
# where that is neither none nor all of them
HIGHER = {
    ("INT in groups", "INT per channel"): {0, 1, 4, 7, 10, 12, 13, 18},
    ("FP8", "INT8 dynamic"): {1, 2, 4, 5, 10, 12, 19},
    ("GPTQ one token", "INT in groups"): {0, *range(2, 16), 18, 19},
    ("column by chance", "INT in groups"): {3, 6, 7, 8, 15, 16, 19},
    ("column by weights", "INT in groups"): {0, 1, 2, 5, 6, 7, 10, 13, 16, 17, 19},
    ("QLoRA", "full"): {2, 4, 5, 6, 7, 9, 11, 12, 15, 16, 18, 19},
    ("QLoRA", "LoRA"): {1, 3, 4, 6, 9, 12, 14, 15, 17, 18},
    ("Q4_0", "INT in groups"): {6},
    ("AWQ", "GPTQ act-order"): {0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 14, 15, 18, 19},
    ("NVFP4", "MXFP4"): {9, 10, 12, 18},
    ("MXFP4", "Q4_0"): {0, 1, 2, 16, 19},
    ("Q4_K simple", "Q4_0"): {0, 2, 7, 8, 9, 12, 14, 15, 16, 19},
    ("HQQ", "INT asymmetric"): {0, 3, 8, 9, 10, 14, 15, 17},
    ("k-means weighted", "k-means"): {0, 8, 9, 15, 16},
    ("SqueezeLLM", "k-means"): {8, 16},
    ("b1.58 trained", "b1.58"): {8, 17},
    ("mixed bits", "INT in groups"): {16, 18},
}


RATIOS = {}  # (a method, what it is compared with): the quotient on each seed so far


def assert_as_on_20_models(sections, seed, measure):
    """Assert what the script says of these sections' methods. measure(method): its KL or loss."""
    for row in itertools.chain(*(m.ON_20_MODELS[section] for section in sections)):
        pair = tuple(name.replace("INT4 ", "INT ").replace(" α 0.5", "")
                     for name in (row.method, row.other))
        ratio = measure(pair[0]) / measure(pair[1])
        RATIOS.setdefault(pair, []).append(round(ratio, 2))
        assert row.least <= round(ratio, 2) <= row.most, pair
        higher = HIGHER.get(pair, range(20) if row.lower_on == 0 else ())
        assert row.lower_on == 20 - len(higher), pair
        assert (ratio > 1) == (seed in higher), pair
        if len(RATIOS[pair]) == 20:  # these are all: none of the figures may be too wide
            assert (min(RATIOS[pair]), max(RATIOS[pair])) == (row.least, row.most), pair


@SEEDS
def test_findings_without_training(seed, labs, monkeypatch):
    """With the fast functions as well, but for seed 0, which takes the script's own."""
    lab = labs(seed)
    if seed > 0:
        for name, function in FAST.items():
            monkeypatch.setattr(m, name, function)

    def kl(method, alpha=0.5):
        return m.score(lab, method, m.Setting(alpha=alpha)).kl

    assert_as_on_20_models(m.ON_20_MODELS.keys() - {8, 14}, seed, kl)
    assert kl("Q8_0") < 0.01 * kl("INT in groups")
    assert kl("GPTQ act-order") < kl("GPTQ")
    others = min(kl("SmoothQuant", alpha=0.0), kl("SmoothQuant", alpha=1.0))
    assert kl("SmoothQuant") < 0.75 * others


@SEEDS
def test_findings_without_outliers(seed, labs):
    """MXFP4's advantage over Q4_0 comes from the outliers, and least squares' harm to b1.58."""
    lab = labs(seed, outliers=(0, 1.0))
    mean, fitted = (loss_by(lab, method) for method in ("b1.58", "b1.58 least squares"))
    assert fitted < mean
    mxfp4, q4_0 = (m.score(lab, method, m.DEFAULTS).kl for method in ("MXFP4", "Q4_0"))
    assert 1.06 < mxfp4 / q4_0 < 3.6


def loss_by(lab, method):
    """Return the loss that compare_one_bit() has for a method, which it trains nothing for."""
    model, _ = m.compress(lab, method, m.DEFAULTS)
    loss, _ = m.mean_and_error(m.losses_on(model, lab.evaluation))
    return loss


def mean_kl(lab, weights):
    """Return the KL of the lab's model with other weights, the mean of a token."""
    model = m.Llama(lab.config, weights)
    verses = []
    for (read, _), expected in zip(m.reading_tasks(lab.evaluation), lab.reference):
        got = map(m.log_softmax, model.forward(read))
        verses.append((sum(map(m.kl_divergence, expected, got)), len(read)))
    mean, _ = m.mean_and_error(verses)
    return mean


@SEEDS
def test_findings_about_nf4_and_the_outliers(seed, labs):
    """NF4's values in the columns that meet outliers take much of INT4's damage away."""
    lab = labs(seed)
    in_groups, _ = m.compress(lab, "INT in groups", m.DEFAULTS)
    nf4, _ = m.compress(lab, "NF4", m.DEFAULTS)
    mixed = dict(in_groups.weights)
    for readers in m.norms_and_readers(lab.config).values():
        for name in readers:
            w = np.array(in_groups.weights[name])
            w[:, lab.outliers] = np.array(nf4.weights[name])[:, lab.outliers]
            mixed[name] = w.tolist()
            sizes = np.abs(np.array(lab.model.weights[name]))
            assert sizes[:, lab.outliers].mean() < 0.6 * sizes.mean()

    assert 0.22 < mean_kl(lab, mixed) / mean_kl(lab, in_groups.weights) < 0.80


def gptq_with_grids_first(w, hessian):
    """Return what GPTQ makes of w in the order of its columns, with quantize()'s scales."""
    n = len(w[0])
    damped = np.array(hessian) + 0.01 * np.mean(np.diag(hessian)) * np.eye(n)
    factor = np.linalg.cholesky(np.linalg.inv(damped)).T.tolist()
    decoded = []
    for row, scales in zip(w, m.quantize(w, 4, granularity=32).scales):
        codes, _ = m.round_and_repair(row, scales, factor, list(range(n)), 4, 32, late=False)
        decoded.append([code * scales[j // 32] for j, code in enumerate(codes)])
    return decoded


@SEEDS
def test_findings_about_act_order(seed, labs):
    """The order of the columns is what helps, and not that the grids are laid first."""
    lab = labs(seed)
    plain, _ = m.compress(lab, "GPTQ", m.DEFAULTS)
    grids_first = dict(plain.weights)
    for name in lab.linears:
        grids_first[name] = gptq_with_grids_first(lab.model.weights[name], lab.hessians[name])
    kl = mean_kl(lab, grids_first)
    ratio = kl / mean_kl(lab, plain.weights)
    assert 0.6 < ratio < 1.71
    assert (ratio > 1) == (seed in {1, 4, 7, 9, 12, 13, 14, 16, 18})
    assert 0.13 < m.score(lab, "GPTQ act-order", m.DEFAULTS).kl / kl < 1


@SEEDS
def test_findings_about_the_model(seed, labs):
    """It has learned, it has not learned everything, and it uses its outliers."""
    least, model, silent, guessing = m.compare_losses(labs(seed))
    assert least.loss + 0.2 < model.loss < guessing.loss / 2.7
    assert silent.loss > model.loss + 0.1


@SEEDS
def test_findings_of_fine_tuning(seed, labs):
    lab = labs(seed)
    before, nf4, full, lora, qlora = m.compare_fine_tuning(lab)
    assert full.loss < before.loss - 0.45
    assert lora.loss < before.loss - 0.45
    assert qlora.loss < nf4.loss - 0.45
    losses = {"QLoRA": qlora.loss, "LoRA": lora.loss, "full": full.loss}
    assert_as_on_20_models([8], seed, losses.get)


@SEEDS
def test_findings_of_one_bit(seed, labs):
    lab = labs(seed)
    _, longer, signs, mean, fitted, trained = m.compare_one_bit(lab)
    assert (mean.loss, fitted.loss) == (loss_by(lab, mean.method), loss_by(lab, fitted.method))
    losses = {"FP16 trained": longer.loss, "b1.58": mean.loss, "b1.58 least squares": fitted.loss,
              "b1.58 trained": trained.loss}
    assert_as_on_20_models([14], seed, losses.get)
    assert fitted.loss < signs.loss - 0.2


RATES_TRIED = {"full": (0.006, 0.008, 0.01, 0.013, 0.016, 0.02),
               "adapters": (0.03, 0.04, 0.05, 0.06, 0.07, 0.08)}


def fine_tune(lab, way, rate):
    """Return the lab's weights after training on the dialect: in full, by LoRA or by QLoRA."""
    if way == "full":
        weights = m.copy_weights(lab.model.weights)
        m.descend(lab.config, weights, lab.dialect_training, *m.FINE_TUNING, rate)
        return weights
    base, _ = m.compress(lab, "NF4" if way == "QLoRA" else "FP16", m.DEFAULTS)
    weights, _ = m.train_adapters(lab, base.weights, rate)
    return weights


@pytest.mark.parametrize("ways, trained", [(["full"], "full"), (["LoRA", "QLoRA"], "adapters")])
def test_rates_are_good_on_the_validation_text(ways, trained, labs):
    """The neighbours of a rate are no better by more than 0.02, in the mean of seeds 0 to 4.

    (At 0.07, adapters are better by 0.017 here, and one of 20 runs diverges.)
    """
    def mean_loss(rate):
        losses = []
        for seed in range(5):
            lab = labs(seed)
            for way in ways:
                weights = fine_tune(lab, way, rate)
                verses = m.losses_on(m.Llama(lab.config, weights), lab.dialect_validation)
                loss, _ = m.mean_and_error(verses)
                losses.append(loss)
        return np.mean(losses)

    tried = RATES_TRIED[trained]
    place = tried.index(m.RATES[trained])
    loss = mean_loss(tried[place])
    assert loss < mean_loss(tried[place - 1]) + 0.02
    assert loss < mean_loss(tried[place + 1]) + 0.02


@SEEDS
def test_findings_of_codebooks(seed):
    symmetric, asymmetric, int4, nf4, double = m.compare_codebooks(seed)
    assert nf4.normal < 0.9 * symmetric.normal
    assert nf4.uniform > 1.2 * symmetric.uniform
    assert asymmetric.bits < nf4.bits - 0.1
    assert asymmetric.normal < 1.01 * nf4.normal
    assert double.normal < 1.005 * nf4.normal


@SEEDS
def test_findings_of_one_outlier(seed):
    tensor, channel, group = m.plant_one_outlier(4, 32, seed)
    assert tensor.error > 2 * channel.error > 2 * group.error


@SEEDS
def test_findings_of_blocks(seed):
    q4_0, q4_k = m.compare_blocks(seed)
    assert q4_k.aside < 0.7 * q4_0.aside
    assert q4_k.error < 0.95 * q4_0.error


@SEEDS
def test_findings_of_q_galore(seed, monkeypatch):
    make_fast(monkeypatch, m)
    full = m.train_one_layer("Adam in full", seed)
    to_nearest = m.train_one_layer("to nearest", seed)
    by_chance = m.train_one_layer("stochastic", seed)
    assert 0.16 < full.loss < 0.39
    assert to_nearest.loss > 0.95
    assert 0.43 < by_chance.loss < 0.71
    assert by_chance.refreshed == 4


class GaLore(m.QGaLore):
    """Q-GaLore, but with the weights in full precision."""

    def step(self, gradient, learning_rate):
        start = np.array(self.q.dequantize())
        super().step(gradient, learning_rate)
        p = np.array(self.projection.dequantize())
        w = start + p.T @ np.array(self.step_in_r)
        self.q = Plain(self.q.scales, w.tolist())


class Plain(NamedTuple):
    """A matrix that nothing has rounded."""

    scales: list
    w: list

    def dequantize(self):
        return self.w


@SEEDS
def test_findings_about_the_projection_of_galore(seed, monkeypatch):
    """It is the projection that makes GaLore slower than Adam, and hardly the rounding."""
    make_fast(monkeypatch, m)
    rounded = m.train_one_layer("stochastic", seed).loss
    monkeypatch.setattr(m, "QGaLore", GaLore)
    plain = m.train_one_layer("stochastic", seed).loss
    assert 0.38 < plain < 0.72
    assert abs(plain - rounded) < 0.15


@SEEDS
def test_findings_of_half_precision(seed, monkeypatch):
    make_fast(monkeypatch, m)
    exact = m.train_in_format("", float, m.LossScale(1.0), seed)
    half = m.train_in_format("", m.fp16, m.LossScale(1.0), seed)
    scaled = m.train_in_format("", m.fp16, m.LossScale(2.0**20), seed)
    brain = m.train_in_format("", m.bf16, m.LossScale(1.0), seed)
    assert half.lost > 0.7
    assert half.loss > exact.loss + 0.2
    for run in (scaled, brain):
        assert run.lost < 0.01
        assert run.loss == pytest.approx(exact.loss, abs=0.05)
