"""microquant against naive numpy references written from the definitions; nothing is shared with the script."""

import itertools
import math
import random
import struct
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

import microquant as m

TIGHT = dict(rtol=0, atol=1e-12)


def numbers(seed, *shape, size=1.0):
    return np.random.default_rng(seed).normal(size=shape) * size


def same(got, expected):
    """Equal to the bit."""
    np.testing.assert_array_equal(np.array(got, float), np.array(expected, float))


# ------------------------------------------------------------------------------------ the quantizers

def half_up(x):
    """The smallest float16 that is not below x."""
    near = np.float16(x)
    return float(near if float(near) >= x else np.nextafter(near, np.float16(np.inf)))


def reference_grid(values, bits, symmetric):
    """(scale, zero point) of a flat array."""
    if symmetric:
        return half_up(np.abs(values).max() / (2 ** (bits - 1) - 1)) or 1.0, 0
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = half_up((high - low) / (2 ** bits - 1)) or 1.0
    return scale, -2 ** (bits - 1) + int(np.rint(-low / scale))


def reference_quantize(w, bits, symmetric, granularity):
    """(codes, what they decode to, number of scales), cell by cell."""
    codes, back, grids = np.zeros(w.shape, int), np.zeros(w.shape), {}
    for r in range(w.shape[0]):
        for c in range(w.shape[1]):
            if granularity == "tensor":
                key, values = 0, w
            elif granularity == "channel":
                key, values = r, w[r]
            else:
                g = c // granularity
                key, values = (r, g), w[r, g * granularity:(g + 1) * granularity]
            if key not in grids:
                grids[key] = reference_grid(values, bits, symmetric)
            scale, zero = grids[key]
            codes[r, c] = np.clip(np.rint(w[r, c] / scale + zero), -2 ** (bits - 1), 2 ** (bits - 1) - 1)
            back[r, c] = (codes[r, c] - zero) * scale
    return codes, back, len(grids)


def special_matrices():
    yield numbers(0, 5, 64, size=0.1)
    yield numbers(1, 3, 7)
    yield numbers(2, 1, 1)
    yield numbers(3, 4, 1, size=100.0)
    yield np.abs(numbers(4, 3, 33)) + 2
    yield -np.abs(numbers(5, 2, 8)) - 1
    yield np.zeros((3, 5))
    yield np.vstack([np.zeros(6), np.full(6, 0.7), np.full(6, -3.0), [0, 0, 0, 0, 0, 50.0]])
    yield numbers(6, 2, 4, size=1e-7)
    yield np.array([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 7.0, 127.0]])  # ties


GRANULARITIES = ["tensor", "channel", 1, 3, 4, 32, 100]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_quantize(bits, symmetric, granularity):
    for w in special_matrices():
        codes, back, n_scales = reference_quantize(w, bits, symmetric, granularity)
        q = m.quantize(w.tolist(), bits, symmetric=symmetric, granularity=granularity)
        assert q.codes == codes.tolist()
        same(q.dequantize(), back)
        n_bytes = -(-w.size * bits // 8) + 2 * n_scales + (0 if symmetric else -(-n_scales * bits // 8))
        assert q.nbytes == len(q.to_bytes()) == n_bytes
        assert q.bits_per_weight == 8 * n_bytes / w.size
        group = {"tensor": w.shape[1], "channel": w.shape[1]}.get(granularity, granularity)
        scales = np.repeat(np.array(q.scales), group, axis=1)[:, :w.shape[1]]
        assert (np.abs(np.array(q.dequantize()) - w) <= scales / 2 * (1 + 1e-12)).all()
        assert w.any() or (scales == 1).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_to_bytes_holds_the_codes_and_the_scales(bits):
    w = numbers(0, 3, 10).tolist()
    q = m.quantize(w, bits, granularity=4, symmetric=False)
    data, n_codes = q.to_bytes(), -(-30 * bits // 8)
    number = int.from_bytes(data[:n_codes], "little")
    flat = [number >> i * bits & 2**bits - 1 for i in range(30)]
    assert [code - 2**bits * (code >= 2 ** (bits - 1)) for code in flat] == [code for row in q.codes for code in row]
    assert list(struct.unpack("<9e", data[n_codes:n_codes + 18])) == [scale for row in q.scales for scale in row]
    number = int.from_bytes(data[n_codes + 18:], "little")
    zeros = [number >> i * bits & 2**bits - 1 for i in range(9)]
    assert [zero - 2**bits * (zero >= 2 ** (bits - 1)) for zero in zeros] == [zero for row in q.zero_points for zero in row]


@pytest.mark.parametrize("arguments, word", [((1,), "bits"), ((9,), "bits"), ((0,), "bits"), ((-4,), "bits"), ((4.5,), "bits"),
                                             ((4, 0), "granularity"), ((4, -1), "granularity"), ((4, "row"), "granularity"),
                                             ((4, 2.0), "granularity"), ((4, True), "granularity")])
def test_bad_bits_and_granularities_are_named(arguments, word):
    w, h = [[1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]
    bits, granularity = (*arguments, "tensor")[:2]
    for call in (lambda: m.quantize(w, bits, granularity=granularity), lambda: m.gptq(w, h, bits, granularity=granularity),
                 lambda: m.awq_search(w, w, bits, granularity=granularity), lambda: m.hqq(w, bits, granularity=granularity)):
        with pytest.raises(ValueError, match=word):
            call()


@pytest.mark.parametrize("w", [[], [[]], [[1.0], [1.0, 2.0]], [[math.nan]], [[math.inf]], [[-math.inf, 0.0]], [[1e6]]])
def test_matrices_that_cannot_be_quantized_are_refused(w):
    for call in (lambda: m.quantize(w, 4), lambda: m.quantize_nf4(w), lambda: m.gptq(w, [[1.0]], 4, granularity="tensor")):
        with pytest.raises(ValueError, match="w must"):
            call()


def test_arguments_are_left_as_they_were():
    w, x, h = numbers(0, 4, 8).tolist(), numbers(1, 6, 8).tolist(), (np.eye(8) + 0.1).tolist()
    before = repr((w, x, h))
    m.quantize(w, 4, granularity=4), m.quantize_nf4(w, double_quant=True), m.gptq(w, h, 4, granularity=4, act_order=True)
    m.awq_search(w, x, 4, granularity=4, grid=3), m.hqq(w, 4, granularity=4), m.squeezellm(w, h[:4], 2)
    m.llm_int8_matmul(x, w), m.ternary_weights(w), m.bitnet_signs(w), m.subspace(w, 2, random.Random(0))
    assert repr((w, x, h)) == before


# ---------------------------------------------------------------------------------- floating point

def float_table(exponent_bits, mantissa_bits, largest):
    """Every non-negative finite value in order, from the bit patterns; index = pattern, so even index = even mantissa."""
    bias, values = 2 ** (exponent_bits - 1) - 1, []
    for pattern in range(2 ** (exponent_bits + mantissa_bits)):
        e, f = divmod(pattern, 2 ** mantissa_bits)
        value = math.ldexp(f, 1 - bias - mantissa_bits) if e == 0 else math.ldexp(f + 2 ** mantissa_bits, e - bias - mantissa_bits)
        if value <= largest:
            values.append(value)
    return values


FORMATS = {"fp16": (5, 10, 65504.0, math.inf), "bf16": (8, 7, 2.0**127 * (2 - 2**-7), math.inf),
           "fp8_e4m3": (4, 3, 448.0, 448.0), "fp8_e5m2": (5, 2, 57344.0, math.inf)}


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_every_midpoint_and_their_neighbours(name):
    exponent_bits, mantissa_bits, largest, overflow = FORMATS[name]
    rounded, values = getattr(m, name), float_table(exponent_bits, mantissa_bits, largest)
    assert values[-1] == largest
    assert rounded == m.FloatFormat(rounded.name, *FORMATS[name])
    for i, (a, b) in enumerate(zip(values, values[1:])):
        middle = (a + b) / 2
        cases = {a: a, middle: a if i % 2 == 0 else b, math.nextafter(middle, 0): a, math.nextafter(middle, math.inf): b}
        for x, expected in cases.items():
            assert rounded(x) == expected and rounded(-x) == -expected, x
    step = values[-1] - values[-2]
    assert rounded(math.nextafter(largest + step / 2, 0)) == rounded(largest) == largest
    for x in (largest + step, 1e39, 1e300, math.inf):
        assert rounded(x) == overflow and rounded(-x) == -overflow
    assert math.isnan(rounded(math.nan))
    assert math.copysign(1, rounded(-0.0)) == -1 and math.copysign(1, rounded(-1e-300)) == -1
    assert rounded(5e-324) == 0


def test_halves_as_numpy_has_them():
    x = np.concatenate([numbers(0, 500, size=s) for s in (1e-8, 1e-4, 1, 1e4)])
    with np.errstate(over="ignore"):
        same([m.fp16(v) for v in x], x.astype(np.float16))
    same([m.fp32(v) for v in x], x.astype(np.float32))
    for v in np.abs(x[np.abs(x) < 6e4]):
        assert m.fp16_up(float(v)) == half_up(float(v))


def test_e4m3_bytes_are_the_bit_patterns():
    values = float_table(4, 3, 448.0)
    for pattern, value in enumerate(values):
        assert m.e4m3_byte(value) == pattern
        assert m.e4m3_byte(-value) == pattern + 128


# ----------------------------------------------------------------------------------------- packing

@pytest.mark.parametrize("n", range(10))
def test_pack_int4(n):
    codes = [((i * 7) % 16) - 8 for i in range(n)]
    data = m.pack_int4(codes)
    assert len(data) == -(-n // 2)
    assert m.unpack_int4(data, n) == codes
    expected = [0] * len(data)
    for i, code in enumerate(codes):
        expected[i // 2] |= (code % 16) << (4 * (i % 2))
    assert list(data) == expected


def test_pack_int4_by_hand_and_refusals():
    assert m.pack_int4([1, 2, -1]) == bytes([0x21, 0x0F]) and m.pack_int4([7, -8]) == bytes([0x87])
    assert m.unpack_int4(b"\x8f\x70", 4) == [-1, -8, 0, 7]
    for codes in ([8], [0, -9]):
        with pytest.raises(ValueError, match="codes"):
            m.pack_int4(codes)
    for data, n in ((b"\x00", 3), (b"\x00\x00", 2), (b"", 1)):
        with pytest.raises(ValueError, match="data"):
            m.unpack_int4(data, n)


@pytest.mark.parametrize("name", m.REAL_LLAMAS)
def test_parameters_of_real_models(name):
    """Counted here without Config: per layer q, o, k, v, three of the feed-forward, two norms; embedding, output, norm."""
    (vocab, dim, layers, heads, kv, hidden), published = m.REAL_LLAMAS[name]
    layer = 2 * dim * dim + 2 * dim * dim * kv // heads + 3 * dim * hidden + 2 * dim
    assert layers * layer + 2 * vocab * dim + dim == published


# --------------------------------------------------------------------------------------------- NF4

NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # bitsandbytes, functional.py


def test_nf4_codebook_is_the_published_one():
    np.testing.assert_allclose(m.nf4_codebook(), NF4, rtol=0, atol=1e-6)
    assert m.nf4_codebook()[0] == -1 and m.nf4_codebook()[7] == 0 and m.nf4_codebook()[15] == 1


@pytest.mark.parametrize("block", [1, 3, 64])
def test_nf4_takes_the_nearest_value(block):
    codebook = np.array(m.nf4_codebook())
    for w in special_matrices():
        q = m.quantize_nf4(w.tolist(), block_size=block)
        for r, c in np.ndindex(w.shape):
            absmax = np.float64(np.float32(np.abs(w[r, c // block * block:c // block * block + block]).max()))
            assert q.scales[r][c // block] == absmax
            if absmax:
                gaps = np.abs(codebook - w[r, c] / absmax)
                assert gaps[q.codes[r][c]] <= gaps.min() + 1e-15
            assert q.dequantize()[r][c] == codebook[q.codes[r][c]] * absmax and q.zero_points[r][c // block] == 0
        n_blocks = w.shape[0] * -(-w.shape[1] // block)
        assert q.nbytes == -(-w.size // 2) + 4 * n_blocks


def test_nf4_blocks_are_of_64_and_halfway_goes_to_the_upper_value():
    q = m.quantize_nf4(numbers(0, 2, 130).tolist())
    assert q.group == 64 and [len(scales) for scales in q.scales] == [3, 3]
    assert m.nearest([-1.0, 0.5, 1.0, 1.5, 3.0, 9.0], [0.0, 1.0, 2.0, 4.0]) == [0, 1, 1, 2, 3, 3]
    upper = m.quantize_nf4([[1.0, m.nf4_codebook()[8] / 2, m.nf4_codebook()[6] / 2]])  # halfway to 0, whose code is 7
    assert upper.codes == [[15, 8, 7]]


def test_double_quantization_decodes_from_its_own_bytes():
    w = numbers(0, 40, 130)  # 120 blocks of 64 or less … and 600 of 10, more than two times 256
    small = w * np.where(np.arange(40) % 5, 1e-3, 1.0)[:, None]  # most are so far below the mean that some decode to less than 0
    table = float_table(4, 3, 448.0)
    for w, block in itertools.product((w, small), (64, 10)):
        plain, q = (m.quantize_nf4(w.tolist(), block_size=block, double_quant=double) for double in (False, True))
        n = 40 * -(-130 // block)
        data = q.to_bytes()[w.size // 2:]
        assert len(data) == 4 + n + 4 * -(-n // 256)
        mean, = struct.unpack("<f", data[:4])
        assert mean == np.float32(np.mean(plain.scales))
        scales, place = [], 4
        for start in range(0, n, 256):
            scale, = struct.unpack("<f", data[place:place + 4])
            here = data[place + 4:place + 4 + min(256, n - start)]
            scales += [mean + scale * (table[byte] if byte < 128 else -table[byte - 128]) for byte in here]
            place += 4 + len(here)
            centred = np.abs(np.array(plain.scales).ravel()[start:start + 256] - mean)
            assert scale == np.float32(centred.max() / 448)
        same(np.array(q.scales).ravel(), np.maximum(scales, 0))
        assert w is not small or min(scales) < 0
        assert np.abs(np.array(q.scales) - plain.scales).max() <= np.abs(np.array(plain.scales) - mean).max() / 16
    for value in (0.0, -3.0):  # all absmaxes are their mean
        assert m.quantize_nf4([[value] * 130], double_quant=True).dequantize() == [[value] * 130]


# -------------------------------------------------------------------------------------------- GGUF

ROW = [((37 * k * k + 11 * k) % 257 - 120) / 64 for k in range(64)]
# What gguf-py 0.19.0 (llama.cpp's own Python package) makes of ROW.
Q8_0_ROW = ("e02386b733f5025af9e317925d6fc66e5b8f13ddf353faec29ac7f93f8a398d96638ee2261af7c759a3e0f35885957812aff"
            "2a81575988350f3e9a757caf614073d48a96")
Q4_0_ROW = "d0b37fad9539889258da07ff92e1fca1224fe032dee30fbf92cc29fbf03eedc0fb581b10"


def test_q8_0_and_q4_0_bytes_as_gguf_has_them():
    assert m.q8_0_encode(ROW).hex() == Q8_0_ROW
    assert m.q4_0_encode(ROW).hex() == Q4_0_ROW


def gguf_rows():
    for seed, size in enumerate((1e-3, 0.1, 1.0, 30.0)):
        yield numbers(seed, 512, size=size).astype(np.float32)
    yield np.zeros(256, np.float32)
    yield np.full(256, 0.37, np.float32)
    yield np.float32(np.arange(256) % 17 - 8)
    yield np.concatenate([np.zeros(32), numbers(9, 224)]).astype(np.float32)
    yield np.float32(np.tile(np.append(np.arange(31) - 15.5, 127.0), 8))  # Q8_0's d is 1: halves to round
    for extreme in numbers(13, 8):  # every weight halfway between two codes, as near as FP32 has it: each rounding shows
        yield np.float32(np.tile(np.append((np.arange(31) * 4 - 60.5) * abs(extreme) / 127, extreme), 8))
        yield np.float32(np.tile(np.append((np.arange(31) % 15 - 7.5) * extreme / -8, extreme), 8))
    yield -np.abs(numbers(10, 256)).astype(np.float32)
    yield np.abs(numbers(11, 256)).astype(np.float32) + 1


def test_q8_0_from_its_layout():
    for row in gguf_rows():
        expected = b""
        for block in row.reshape(-1, 32):
            d = np.abs(block).max() / np.float32(127)
            inverse = np.float32(1) / d if d else np.float32(0)
            scaled = block * inverse
            q = np.trunc(scaled) + np.trunc(2 * (scaled - np.trunc(scaled)))  # halves go away from zero, as C's roundf
            expected += np.float16(d).tobytes() + q.astype(np.int8).tobytes()
        data = m.q8_0_encode(row.tolist())
        assert data == expected
        blocks = np.frombuffer(data, np.dtype([("d", "<f2"), ("q", "i1", 32)]))
        same(m.q8_0_decode(data, len(row)), (blocks["d"][:, None].astype(float) * blocks["q"]).ravel())


def test_the_smallest_scale_that_is_inverted():
    """d = 2^-126, the smallest normal FP32: 0 in FP16, but the codes are those of w / d."""
    assert m.q8_0_encode([i * 2.0**-126 for i in range(96, 128)]) == b"\0\0" + bytes(range(96, 128))
    assert m.q4_0_encode([i * 2.0**-126 for i in [*range(-8, 8)] * 2]) == b"\0\0" + bytes(range(0, 256, 17))


def test_q4_0_from_its_layout():
    for row in gguf_rows():
        expected, back = b"", []
        for block in row.reshape(-1, 32):
            d = block[np.abs(block).argmax()] / np.float32(-8)
            inverse = np.float32(1) / d if d else np.float32(0)
            q = np.minimum(np.float32(np.float64(block) * np.float64(inverse) + 8.5).astype(np.uint8), 15)
            expected += np.float16(d).tobytes() + (q[:16] | q[16:] << 4).astype(np.uint8).tobytes()
            back += list(float(np.float16(d)) * (q.astype(int) - 8))
        data = m.q4_0_encode(row.tolist())
        assert data == expected
        same(m.q4_0_decode(data, len(row)), back)


def reference_q4_k(block):
    """One super-block of 144 bytes, by the published layout (ggml-common.h, ggml-quants.c: get_scale_min_k4)."""
    d, dmin = np.frombuffer(block[:4], "<f2").astype(float)
    q, out = block[4:16], np.zeros(256)
    for j in range(8):
        if j < 4:
            scale, low = q[j] & 63, q[j + 4] & 63
        else:
            scale, low = (q[j + 4] & 0xF) | ((q[j - 4] >> 6) << 4), (q[j + 4] >> 4) | ((q[j] >> 6) << 4)
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
        same(m.q4_k_decode(bytes(block), 256), reference_q4_k(block))


def test_q4_k_encodes_what_decodes_close():
    for row in gguf_rows():
        data = m.q4_k_encode(row.tolist())
        assert len(data) == len(row) // 256 * 144
        back = np.concatenate([reference_q4_k(data[i:i + 144]) for i in range(0, len(data), 144)])
        same(m.q4_k_decode(data, len(row)), back)
        for start in range(0, len(row), 256):
            block = row[start:start + 256]
            lows = np.maximum(-block.reshape(8, 32).min(1), 0)
            steps = (block.reshape(8, 32).max(1) + lows) / 15
            # half a step, and what 6 bits of scale and minimum may miss: half of the largest over 63, each, times 15
            bound = steps / 2 + 15 * steps.max() / 126 + lows.max() / 126 + 2e-3 * np.abs(block).max()
            assert (np.abs(back[start:start + 256] - block).reshape(8, 32) <= bound[:, None]).all()


def hard_q4_k_rows():
    """Sub-blocks far narrower than their minimum is rounded; weights so small that d or dmin is a subnormal half, and 63 too few."""
    yield np.float32(-10 - 7.3 * np.repeat(np.arange(8), 32) + 0.01 * numbers(12, 256))
    yield np.float32(np.tile(np.linspace(-4e-5, 3.9e-5, 32), 8))
    yield np.float32(np.tile(np.linspace(-5.2e-6, 0.1, 32), 8))


def test_q4_k_takes_the_nearest_of_what_it_can_store():
    for row in itertools.chain(gguf_rows(), hard_q4_k_rows()):
        data = m.q4_k_encode(row.tolist())
        for i, block in enumerate(row.astype(float).reshape(-1, 8, 32)):
            lows = np.maximum(-block.min(1), 0)
            steps = (block.max(1) + lows) / 15
            (d, sc), (dmin, mn) = ((unit, np.minimum(np.rint(values / unit), 63) if unit else np.zeros(8)) for values in (steps, lows)
                                   for unit in [float(np.float16(values.max() / 63))])
            scale, low = (d * sc)[:, None], (dmin * mn)[:, None]
            codes = np.clip(np.rint((block + low) / np.where(scale, scale, np.inf)), 0, 15)
            same(reference_q4_k(data[144 * i:144 * i + 144]), (d * sc[:, None] * codes - low).ravel())


def test_q4_k_by_hand():
    """Sub-block j holds 0, s, …, 15·s twice (and minimum 0), s = j + 1: scales 63·s/8 in 6 bits."""
    row = [float((j + 1) * (i % 16)) for j in range(8) for i in range(32)]
    data = m.q4_k_encode(row)
    assert data[:4] == np.float16(8 / 63).tobytes() + b"\x00\x00"
    scales = [round((j + 1) / float(np.float16(8 / 63))) for j in range(8)]
    assert list(data[4:16]) == ([scales[j] | (scales[j + 4] >> 4) << 6 for j in range(4)] + [0] * 4
                                + [scales[j] & 15 for j in range(4, 8)])
    assert data[16:48] == bytes([i % 16 * 17 for i in range(32)])


@pytest.mark.parametrize("form, size, nbytes", [("q8_0", 32, 34), ("q4_0", 32, 18), ("q4_k", 256, 144)])
def test_gguf_refusals(form, size, nbytes):
    encode, decode = getattr(m, form + "_encode"), getattr(m, form + "_decode")
    for row in ([], [1.0] * (size - 1), [math.nan] * size, *([1.0] * (size - 1) + [x] for x in (math.inf, -math.inf, 65505.0, -1e6))):
        with pytest.raises(ValueError, match="row"):
            encode(row)
    for data, n in ((b"", size), (bytes(nbytes), size - 1), (bytes(nbytes), size + 1), (bytes(nbytes + 1), size), (bytes(nbytes), 2 * size)):
        with pytest.raises(ValueError, match="data"):
            decode(data, n)
    assert decode(encode([0.0] * size), size) == [0.0] * size
    largest = decode(encode([65504.0, -65504.0] * (size // 2)), size)
    np.testing.assert_allclose(largest, [65504.0, -65504.0] * (size // 2), rtol=0.13)  # in Q4_0 the other end is at 7/8
    for tiny in (1e-42, -1e-40, 1e-38, 1e-30):
        assert max(map(abs, decode(encode([tiny] + [0.0] * (size - 1)), size))) <= 1e-7


# ------------------------------------------------------------------------------- activations in INT8

def reference_int8(x, w, x_scale=None):
    codes, _, _ = reference_quantize(w, 8, True, "channel")
    scales = np.array([half_up(np.abs(row).max() / 127) or 1.0 for row in w])
    out = np.zeros((len(x), len(w)))
    for i, row in enumerate(x):
        s = x_scale or np.abs(row).max() / 127 or 1.0
        q = np.clip(np.rint(row / s), -128, 127)
        out[i] = (codes @ q) * s * scales
    return out


@pytest.mark.parametrize("n, rows, columns", [(1, 1, 1), (5, 3, 7), (4, 6, 64)])
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_int8_matmul(n, rows, columns, x_scale):
    x, w = numbers(0, n, columns), numbers(1, rows, columns, size=0.1)
    x[0] = 0
    q = m.quantize(w.tolist(), 8, granularity="channel")
    np.testing.assert_allclose(m.int8_matmul(x.tolist(), q, x_scale), reference_int8(x, w, x_scale), **TIGHT)


@pytest.mark.parametrize("threshold", [0.0, 1.5, 3.0, 6.0, math.inf])
def test_llm_int8(threshold):
    x, w = numbers(0, 6, 20), numbers(1, 5, 20, size=0.2)
    x[:, 3] *= 40
    x[2, 7] = -6.0  # exactly at the default threshold: an outlier
    exact = [c for c in range(20) if np.abs(x[:, c]).max() >= threshold]
    rest = [c for c in range(20) if c not in exact]
    expected = x[:, exact] @ w[:, exact].T
    if rest:
        expected = expected + reference_int8(x[:, rest], w[:, rest])
    np.testing.assert_allclose(m.llm_int8_matmul(x.tolist(), w.tolist(), threshold=threshold), expected, **TIGHT)
    if threshold == 0:
        np.testing.assert_allclose(expected, x @ w.T, **TIGHT)
    if threshold == 6:
        assert 7 in exact and 3 in exact
        same(m.llm_int8_matmul(x.tolist(), w.tolist()), m.llm_int8_matmul(x.tolist(), w.tolist(), threshold=6.0))


@pytest.mark.parametrize("threshold", [-1.0, math.nan])
def test_llm_int8_refuses(threshold):
    with pytest.raises(ValueError, match="threshold"):
        m.llm_int8_matmul([[1.0]], [[1.0]], threshold=threshold)


def test_static_scales():
    x = numbers(0, 50, 60)
    x[3, 4] = 90.0
    sizes = np.sort(np.abs(x).ravel())
    assert m.static_scale(x.tolist(), "absmax") == 90.0 / 127
    assert m.static_scale(x.tolist(), "percentile") == sizes[math.ceil(0.999 * 3000) - 1] / 127 < 5 / 127
    assert m.static_scale([[float(i) for i in range(1, 1501)]], "percentile") == 1499 / 127  # 1498 would clip two of 1500
    chosen, on_a_grid = set(), [share / 127 * np.append(np.arange(14000) % 90, 127 / share)[None] for share in (0.8, 0.78)]
    for x in (x, *on_a_grid, *(numbers(seed, 2, 3 + seed % 4) for seed in range(80)), *numbers(0, 12, 10, 100)):
        errors = {}
        for percent in range(80, 102, 2):
            s = np.abs(x).max() * percent / 100 / 127
            errors[percent] = ((x - np.clip(np.rint(x / s), -127, 127) * s) ** 2).sum()
        best = min(errors, key=errors.get)
        assert m.static_scale(x.tolist(), "error") == pytest.approx(np.abs(x).max() * best / 100 / 127, rel=1e-12)
        chosen.add(best)
    assert chosen >= {80, 98, 100}
    assert m.static_scale([[0.0]], "error") == 1.0
    assert m.static_scale([[0.0]], "absmax") == m.static_scale([[0.0]], "percentile") == 1.0
    with pytest.raises(ValueError, match="method"):
        m.static_scale(x.tolist(), "median")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothquant_scales(alpha):
    x, w = np.array([1.0, 4.0, 0.0, 9.0]), np.array([2.0, 0.25, 1.0, 0.0])
    expected = [1.0 ** alpha / 2.0 ** (1 - alpha), 4.0 ** alpha / 0.25 ** (1 - alpha), 1.0, 1.0]
    np.testing.assert_allclose(m.smoothquant_scales(x.tolist(), w.tolist(), alpha), expected, **TIGHT)
    assert m.smoothquant_scales([4.0], [1.0]) == [2.0]


@pytest.mark.parametrize("arguments", [([1.0], [1.0], -0.1), ([1.0], [1.0], 1.1), ([1.0, 2.0], [1.0], 0.5)])
def test_smoothquant_refuses(arguments):
    with pytest.raises(ValueError, match="alpha"):
        m.smoothquant_scales(*arguments)


# ---------------------------------------------------------------------- a tiny random model, as a lab

CONFIG = m.Config(vocab_size=11, dim=8, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=12)


@pytest.fixture(scope="module")
def lab():
    rng = random.Random(5)
    calm = m.Llama(CONFIG, m.init_weights(CONFIG, rng))
    for name, w in calm.weights.items():
        if not isinstance(w[0], list):
            calm.weights[name] = [rng.uniform(0.5, 2) for _ in w]
    model = m.plant_outliers(calm, 2, 20.0, rng)
    text = [rng.randrange(11) for _ in range(200)]
    unseen, logits = m.capture(model, text[100:130])
    return m.Lab(None, model, calm, text[:100], text[70:100], text[100:131], m.capture(model, text[70:100])[0], unseen, logits)


def test_planting_outliers_leaves_the_function(lab):
    np.testing.assert_allclose(lab.model.forward(list(range(11))), lab.calm.forward(list(range(11))), rtol=0, atol=1e-9)
    for norm, readers in (("layers.1.attention_norm", ("attention.wq", "attention.wk", "attention.wv")),
                          ("layers.0.ffn_norm", ("feed_forward.w1", "feed_forward.w3"))):
        ratio = np.array(lab.model.weights[norm]) / lab.calm.weights[norm]
        assert sorted(np.round(ratio, 9)) == [1] * 6 + [20] * 2
        for reader in readers:
            name = norm.rsplit(".", 1)[0] + "." + reader
            rows = np.ones((len(lab.calm.weights[name]), 1))
            if reader.endswith(("wq", "wk")):  # one pair of channels of the 4 in each head, 20 / 4 times larger in keys
                rows = np.array(lab.calm.weights[name])[:, :1] / np.array(lab.model.weights[name])[:, :1] / ratio[0]
                assert sorted(np.round(rows.ravel() ** (1 if reader.endswith("wq") else -1), 9)) == [1] * (len(rows) // 2) + [5] * (len(rows) // 2)
                heads = rows.reshape(-1, 4)
                assert (heads[:, ::2] == pytest.approx(heads[:, 1::2])) and (heads == pytest.approx(np.tile(heads[:1], (len(heads), 1))))
            np.testing.assert_allclose(np.array(lab.model.weights[name]) * ratio * rows, lab.calm.weights[name], **TIGHT)
    assert (m.key_size(32.0), m.key_size(2.0)) == (8.0, 1.0)
    assert [m.key_pairs(channels, CONFIG) for channels in (0, 1, 2, 3, 9)] == [0, 1, 1, 2, 2]  # heads of 4 channels
    for seed in range(8):
        for channels, pairs in ((1, 1), (2, 1), (3, 2), (4, 2), (8, 2)):  # a head has 2 pairs of channels
            planted = m.plant_outliers(lab.calm, channels, 20.0, random.Random(seed)).weights
            gains, keys = (np.array(planted[n]) / lab.calm.weights[n] for n in ("layers.0.attention_norm", "layers.0.attention.wk"))
            assert sorted(np.round(gains, 9)) == [1] * (8 - channels) + [20] * channels
            np.testing.assert_allclose(np.sort(keys * gains, axis=0).T, [[1] * (4 - 2 * pairs) + [5] * 2 * pairs] * 8, rtol=1e-9)
    unchanged = m.plant_outliers(lab.calm, 0, 20.0, random.Random(0)).weights
    assert unchanged == lab.calm.weights


def test_captured_inputs_are_what_the_matrices_get(lab):
    x = np.array(lab.inputs["layers.0.attention.wq"])
    embedded = np.array(lab.model.weights["tok_embeddings"])[lab.calibration]
    rms = np.sqrt((embedded ** 2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(x, embedded / rms * np.array(lab.model.weights["layers.0.attention_norm"]), **TIGHT)
    assert set(lab.inputs) == set(lab.linears) and lab.inputs["layers.0.attention.wk"] is lab.inputs["layers.0.attention.wq"]


def test_moving_scales_leaves_the_function(lab):
    for source, readers in m.sources_and_readers(CONFIG).items():
        n = len(lab.model.weights[readers[0]][0])
        moved = m.move_scales(lab.model.weights, source, readers, np.exp(numbers(1, n)).tolist())
        assert moved[source] != lab.model.weights[source]
        np.testing.assert_allclose(m.Llama(CONFIG, moved).forward(lab.evaluation[:-1]), lab.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_leaves_the_function_and_does_what_it_says(lab, alpha):
    smooth = m.smoothquant(lab.model.weights, CONFIG, lab.inputs, alpha)
    model = m.Llama(CONFIG, smooth)
    np.testing.assert_allclose(model.forward(lab.evaluation[:-1]), lab.logits, rtol=0, atol=1e-9)
    before = np.abs(lab.inputs["layers.1.feed_forward.w1"]).max(0)
    weights = np.abs(np.vstack([lab.model.weights[f"layers.1.feed_forward.{w}"] for w in ("w1", "w3")])).max(0)
    after = np.abs(m.capture(model, lab.calibration)[0]["layers.1.feed_forward.w1"]).max(0)
    np.testing.assert_allclose(after, before ** (1 - alpha) * weights ** (1 - alpha), rtol=1e-9)


@pytest.mark.parametrize("method", ["absmax", "percentile", "error", "dynamic", "LLM.int8()", "SmoothQuant"])
def test_a_whole_model_in_int8(lab, method):
    """By replacing linear with the reference's product; a file has INT8 codes and scales, the rest in FP16, and for LLM.int8() columns."""
    c = m.in_int8(lab, method, 0.4)
    weights = m.smoothquant(lab.model.weights, CONFIG, lab.inputs, 0.4) if method == "SmoothQuant" else lab.model.weights
    half = {name: np.array(w).astype(np.float16).astype(float) for name, w in weights.items()}
    stored = half | {name: reference_quantize(np.array(weights[name]), 8, True, "channel")[1] for name in lab.linears}
    nbytes = sum(w.size + 2 * len(w) if name in lab.linears else 2 * w.size for name, w in half.items())
    if method == "LLM.int8()":
        for name in lab.linears:
            large = np.abs(lab.inputs[name]).max(0) >= 6
            stored[name][:, large] = half[name][:, large]
            nbytes += 2 * (len(half[name]) + 1) * large.sum()  # and two bytes a column to say which
    assert c.nbytes == nbytes
    for name, w in stored.items():
        same(c.weights[name], w)
    names = {id(w): name for name, w in c.weights.items()}

    def run(operation, *inputs):
        if operation is not m.linear:
            return operation(*inputs)
        x, name = np.array(inputs[0]), names[id(inputs[1])]
        if method == "LLM.int8()":
            exact, w = np.abs(x).max(0) >= 6, stored[name]
            return (x[:, exact] @ w[:, exact].T + (reference_int8(x[:, ~exact], w[:, ~exact]) if not exact.all() else 0)).tolist()
        scale = m.static_scale(lab.inputs[name], method) if method in ("absmax", "percentile", "error") else None
        return reference_int8(x, np.array(weights[name]), scale).tolist()

    tokens = lab.evaluation[:-1]
    got = m.Llama(CONFIG, c.weights).forward(tokens, run=c.run)
    np.testing.assert_allclose(got, m.Llama(CONFIG, c.weights).forward(tokens, run=run), rtol=0, atol=1e-9)


def test_the_table_has_every_model_once_and_counts_its_bytes(lab, monkeypatch):
    monkeypatch.setattr(m, "assign_bits", lambda damage, budget: dict.fromkeys(damage, 3))  # 15 matrices are too many for it
    models = m.everything(lab, Namespace(bits=3, group_size=4, alpha=0.5))
    assert len({c.name for c in models}) == len(models) == 22
    for c in models:  # a file is the rest in FP16, and its matrices at so many bits a weight
        assert c.nbytes == pytest.approx(lab.rest_bytes + c.bits_per_weight * lab.n_weights / 8, rel=1e-12)
    sizes = {c.name: c.nbytes - lab.rest_bytes for c in models}
    adapters = sum(4 * (len(lab.model.weights[name]) + len(lab.model.weights[name][0])) for name in lab.linears)
    assert m.by_qlora(lab)[1] == adapters
    assert sizes["NF4 + QLoRA"] == sizes["NF4, double quant."] + 2 * adapters
    matrices = [np.array(lab.calm.weights[name]) for name in lab.linears]
    for name, per_byte in (("1 bit, BitNet", 8), ("b1.58, untrained", 5), ("b1.58 trained", 5)):
        assert sizes[name] == sum(-(-w.size // per_byte) + 2 for w in matrices)


def test_one_bit_models_decode_to_signs_and_ternaries_of_the_calm_weights(lab):
    for method, rounded in (("BitNet", m.bitnet_signs), ("b1.58", m.ternary_weights)):
        c = m.in_one_bit(lab, method)
        for name in lab.linears:
            same(c.weights[name], np.array(rounded(lab.calm.weights[name])).astype(np.float16))
        same(c.weights["norm"], np.array(lab.calm.weights["norm"]).astype(np.float16))
    trained = m.in_one_bit(lab, "b1.58 trained")
    for name in lab.linears:
        assert len({abs(v) for row in trained.weights[name] for v in row}) == 2  # 0 and γ
        assert trained.weights[name] != m.in_one_bit(lab, "b1.58").weights[name]


def test_measure_is_perplexity_kl_and_changes(lab):
    c = m.rounded_to_nearest(lab, 3, "tensor")
    ours, theirs = np.array(m.Llama(CONFIG, c.weights).forward(lab.evaluation[:-1])), np.array(lab.logits)
    p, q = (np.exp(a) / np.exp(a).sum(1, keepdims=True) for a in (theirs, ours))
    targets = lab.evaluation[1:]
    got = m.measure(lab, c)
    assert got.perplexity == pytest.approx(math.exp(-np.log(q[range(30), targets]).mean()), rel=1e-12)
    assert got.kl == pytest.approx((p * np.log(p / q)).sum() / 30, rel=1e-9)
    assert got.changed == (ours.argmax(1) != theirs.argmax(1)).sum() > 0
    assert lab.perplexity == pytest.approx(math.exp(-np.log(p[range(30), targets]).mean()), rel=1e-12)


def test_compressed_files_are_counted(lab):
    rest = 2 * sum(math.prod(shape) for name, shape in CONFIG.shapes().items() if len(shape) == 1 or name == "tok_embeddings")
    n = sum(math.prod(CONFIG.shapes()[name]) for name in lab.linears)
    assert lab.n_weights == n and lab.rest_bytes == rest and lab.fp32_bytes == 4 * (n + rest // 2)
    for c, nbytes in ((m.rounded_to_nearest(lab, 4, "channel"), sum(len(lab.model.weights[x]) * 2 + math.prod(CONFIG.shapes()[x]) // 2
                                                                    for x in lab.linears)),
                      (m.in_int8(lab, "dynamic"), sum(len(lab.model.weights[x]) * 2 + math.prod(CONFIG.shapes()[x]) for x in lab.linears))):
        assert c.nbytes == rest + nbytes and c.bits_per_weight == 8 * nbytes / n
    c = m.rounded_to_nearest(lab, 4, "channel")
    same(c.weights["norm"], np.array(lab.model.weights["norm"]).astype(np.float16))
    same(c.weights["output"], reference_quantize(np.array(lab.model.weights["output"]), 4, True, "channel")[1])


# -------------------------------------------------------------------------------------------- GPTQ

def reference_obq(w, hessian, bits, granularity, act_order, damp):
    """Optimal Brain Quantization in a fixed order: one row, one weight at a time, H of the rest inverted each time."""
    rows, n = w.shape
    order = sorted(range(n), key=lambda j: -hessian[j, j]) if act_order else list(range(n))
    h = hessian + (damp * np.diag(hessian).mean() or 1.0) * np.eye(n)
    group = granularity if isinstance(granularity, int) else n
    now, codes, back, grids = w.copy(), np.zeros(w.shape, int), np.zeros(w.shape), {}
    for i, j in enumerate(order):
        for r in range(rows):
            key = 0 if granularity == "tensor" else (r, j // group)
            source = w if act_order else now
            if key not in grids:
                first = j // group * group
                values = source if granularity == "tensor" else source[r, first:first + group]
                grids[key] = reference_grid(values, bits, True)
        left = order[i:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        for r in range(rows):
            scale = grids[0 if granularity == "tensor" else (r, j // group)][0]
            codes[r, j] = np.clip(np.rint(now[r, j] / scale), -2 ** (bits - 1), 2 ** (bits - 1) - 1)
            back[r, j] = codes[r, j] * scale
            now[r, left] -= (now[r, j] - back[r, j]) / inverse[0, 0] * inverse[0]
    return codes, back


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4, 5, 1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("damp", [0.01, 0.3])
def test_gptq_is_obq_in_a_fixed_order(bits, granularity, act_order, damp):
    for seed, (rows, n, samples) in enumerate([(3, 13, 40), (4, 8, 5), (1, 1, 3)]):
        w, x = numbers(seed, rows, n), numbers(seed + 9, samples, n) @ (np.eye(n) + 0.5) * (1 + np.arange(n) % 5)
        hessian = m.hessian_of(x.tolist())
        np.testing.assert_allclose(hessian, 2 * x.T @ x, rtol=1e-12, atol=1e-9)
        q = m.gptq(w.tolist(), hessian, bits, granularity=granularity, act_order=act_order, damp=damp)
        codes, back = reference_obq(w, 2 * x.T @ x, bits, granularity, act_order, damp)
        assert q.codes == codes.tolist()
        np.testing.assert_allclose(q.dequantize(), back, **TIGHT)
        assert q.nbytes == m.quantize(w.tolist(), bits, granularity=granularity).nbytes


def test_gptq_default_damping_and_dead_inputs():
    w, x = numbers(0, 3, 6), numbers(1, 9, 6)
    x[:, 2] = 0
    h = (2 * x.T @ x).tolist()
    assert m.gptq(w.tolist(), h, 3, granularity="channel") == m.gptq(w.tolist(), h, 3, granularity="channel", damp=0.01)
    assert m.gptq(w.tolist(), h, 3, granularity="channel").codes == reference_obq(w, 2 * x.T @ x, 3, "channel", False, 0.01)[0].tolist()
    zero = m.gptq(w.tolist(), np.zeros((6, 6)).tolist(), 3, granularity=4)
    assert zero == m.quantize(w.tolist(), 3, granularity=4)


def test_gptq_damps_by_a_hundredth_unless_told():
    w, x = numbers(0, 40, 30), numbers(1, 40, 5) @ numbers(2, 5, 30) + 0.3 * numbers(3, 40, 30)
    by_damp = [m.gptq(w.tolist(), (2 * x.T @ x).tolist(), 3, granularity=4, **damp)
               for damp in ({}, {"damp": 0.01}, {"damp": 0.011})]
    assert by_damp[0] == by_damp[1] != by_damp[2]


def test_gptq_moves_the_output_less():
    w, x = numbers(0, 16, 24), numbers(1, 60, 6) @ numbers(2, 6, 24) + 0.1 * numbers(3, 60, 24)
    plain = m.quantize(w.tolist(), 3, granularity=8)
    for act_order in (False, True):
        q = m.gptq(w.tolist(), m.hessian_of(x.tolist()), 3, granularity=8, act_order=act_order)
        assert np.linalg.norm(x @ (np.array(q.dequantize()) - w).T) < 0.6 * np.linalg.norm(x @ (np.array(plain.dequantize()) - w).T)


@pytest.mark.parametrize("hessian, damp, word", [([[1.0]], 0.01, "hessian"), ([[1.0, 0.0], [0.0, math.nan]], 0.01, "hessian"),
                                                 ([[1.0, 0.0], [0.0]], 0.01, "hessian"), ([[1.0, 0.0], [0.0, 1.0]], 0.0, "damp"),
                                                 ([[1.0, 0.0], [0.0, 1.0]], -1.0, "damp"), ([[1.0, 0.0], [0.0, 1.0]], math.inf, "damp")])
def test_gptq_refuses(hessian, damp, word):
    with pytest.raises(ValueError, match=word):
        m.gptq([[1.0, 2.0]], hessian, 4, granularity="tensor", damp=damp)


@pytest.mark.parametrize("n", [1, 2, 7, 20])
def test_upper_factor(n):
    a = numbers(0, n, n)
    a = a @ a.T + np.eye(n)
    u = np.array(m.upper_factor(a.tolist()))
    np.testing.assert_allclose(u, np.linalg.cholesky(np.linalg.inv(a)).T, rtol=0, atol=1e-11)
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(a), rtol=0, atol=1e-11)
    assert (u == np.triu(u)).all() and m.upper_factor([[4.0]]) == [[0.5]]
    with pytest.raises(ValueError, match="definite"):
        m.upper_factor((a - 100 * np.eye(n)).tolist())


@pytest.mark.parametrize("h", [[[0.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, 1.1], [1.1, 1.0]]])
def test_factors_of_matrices_at_the_edge_are_refused(h):
    with pytest.raises(ValueError, match="definite"):
        m.upper_factor(h)


def test_the_models_of_gptq(lab):
    c = m.by_gptq(lab, 4, 4, True)
    for name in lab.linears:
        x = np.array(lab.inputs[name])
        same(c.weights[name], m.gptq(lab.model.weights[name], (2 * x.T @ x).tolist(), 4, granularity=4, act_order=True).dequantize())


# --------------------------------------------------------------------------------------------- AWQ

@pytest.mark.parametrize("bits, granularity, grid", [(3, "channel", 20), (4, 4, 20), (4, "tensor", 7), (2, 3, 1)])
def test_awq_is_brute_force_over_its_grid(bits, granularity, grid):
    w, x = numbers(0, 5, 10, size=0.3), numbers(1, 12, 10)
    x[:, 4] *= 30
    x[:, 7] = 0
    losses, found = [], []
    for i in range(grid):
        s = np.maximum(np.abs(x).mean(0), 1e-4) ** (i / grid)
        s = s / math.sqrt(s.max() * s.min())
        back = reference_quantize(w * s, bits, True, granularity)[1]
        losses.append(((x / s @ back.T - x @ w.T) ** 2).sum())
        found.append(s)
    best = int(np.argmin(losses))
    scales, alpha, q = m.awq_search(w.tolist(), x.tolist(), bits, granularity=granularity, **({} if grid == 20 else {"grid": grid}))
    assert alpha == best / grid
    np.testing.assert_allclose(scales, found[best], rtol=1e-12)
    same(q.dequantize(), reference_quantize(w * np.array(scales), bits, True, granularity)[1])
    assert grid == 1 or losses[best] < losses[0]


def test_awq_exponent_0_is_round_to_nearest():
    w, x = numbers(0, 5, 10).tolist(), numbers(1, 12, 10).tolist()
    assert m.awq_search(w, x, 4, granularity=5, grid=1) == ([1.0] * 10, 0.0, m.quantize(w, 4, granularity=5))
    for grid, rows in ((0, x), (5, []), (5, [[1.0]])):
        with pytest.raises(ValueError, match="grid"):
            m.awq_search(w, rows, 4, granularity=5, grid=grid)


def test_awq_folded_leaves_the_function_and_is_what_gets_rounded(lab):
    found = m.awq_scales(lab, 3, 4)
    assert set(found) == set(m.sources_and_readers(CONFIG))
    assert any(alpha > 0 for _, alpha in found.values())
    folded = m.awq_fold(lab, found)
    np.testing.assert_allclose(m.Llama(CONFIG, folded).forward(lab.evaluation[:-1]), lab.logits, rtol=0, atol=1e-9)
    c = m.by_awq(lab, 3, 4)
    for name in lab.linears:
        same(c.weights[name], reference_quantize(np.array(folded[name]), 3, True, 4)[1])
    same(c.weights["norm"], np.array(folded["norm"]).astype(np.float16))


def test_columns_beside_the_codes():
    w = numbers(0, 3, 5)
    q = m.quantize(w.tolist(), 8, granularity="channel")
    back, data = m.with_columns(w.tolist(), q, [4, 1])
    expected = reference_quantize(w, 8, True, "channel")[1]
    expected[:, [4, 1]] = w[:, [4, 1]].astype(np.float16)
    same(back, expected)
    assert data == q.to_bytes() + w[:, [4, 1]].T.astype("<f2").tobytes() + np.array([4, 1], "<u2").tobytes()
    assert m.with_columns(w.tolist(), q, []) == (q.dequantize(), q.to_bytes())


def test_channels_kept_in_fp16(lab):
    c = m.keeping_channels(lab, 3, 4, 2, "activations")
    by_chance = m.keeping_channels(lab, 3, 4, 2, "chance")
    assert c.nbytes == by_chance.nbytes == m.rounded_to_nearest(lab, 3, 4).nbytes + sum(
        2 * 2 * (len(lab.model.weights[name]) + 1) for name in lab.linears)
    assert any(c.weights[name] != by_chance.weights[name] for name in lab.linears)
    for name in lab.linears:
        w = np.array(lab.model.weights[name])
        sizes = np.abs(np.array(lab.inputs[name])).mean(0)
        kept = np.argsort(-sizes)[:2]
        expected = reference_quantize(w, 3, True, 4)[1]
        expected[:, kept] = w[:, kept].astype(np.float16)
        same(c.weights[name], expected)


# ------------------------------------------------------------------------------- HQQ and SqueezeLLM

def hqq_matrices():
    yield numbers(0, 3, 10)
    yield np.where(np.arange(30).reshape(3, 10) == 13, 9.0, numbers(0, 3, 10))
    for seed in (323, 330):  # these take all 20 turns, and would go on; a third of them is exactly 0
        w = np.random.default_rng(seed).standard_t(2, size=(3, 10))
        yield np.where(np.abs(w) < 0.3, 0.0, w)


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("options", [{}, {"p": 0.4, "beta": 3.0}])
def test_hqq(bits, granularity, options):
    low, high = -2 ** (bits - 1), 2 ** (bits - 1) - 1
    group = granularity if isinstance(granularity, int) else 10
    pieces = [(slice(0, 3), slice(0, 10))] if granularity == "tensor" else [
        (slice(r, r + 1), slice(c, c + group)) for r in range(3) for c in range(0, 10, group)]
    for w, place in itertools.product(hqq_matrices(), pieces):
        q = m.hqq(w.tolist(), bits, granularity=granularity, **options)
        values = w[place].ravel()
        scale, zero = reference_grid(values, bits, False)
        p, beta, least, best = options.get("p", 0.7), options.get("beta", 10.0), np.inf, zero
        for _ in range(20):
            zero = float(np.float16(zero))
            codes = np.clip(np.rint(values / scale + zero), low, high)
            rest = values - (codes - zero) * scale
            if np.abs(rest).mean() >= least:
                break
            least, best = np.abs(rest).mean(), zero
            with np.errstate(divide="ignore"):
                e = np.sign(rest) * np.maximum(np.abs(rest) - np.abs(rest) ** (p - 1) / beta, 0)
            zero = (codes - (values - np.nan_to_num(e)) / scale).mean()
            beta *= 1.01
        error = np.abs(np.array(q.dequantize())[place].ravel() - values).mean()
        assert error == pytest.approx(least, abs=1e-12)
        assert {z for row in np.array(q.zero_points)[place[0]] for z in row[place[1].start // group:][:1]} == {best}
    n_scales = {"tensor": 1, "channel": 3, 4: 9}[granularity]
    assert q.nbytes == -(-30 * bits // 8) + 4 * n_scales
    assert m.hqq([[-1.0, 1.0, 0.4]], 2, granularity="tensor").nbytes == 1 + 4  # its zero point starts at a whole 0
    assert m.hqq([[0.0, 0.0]], 4, granularity="tensor").dequantize() == [[0.0, 0.0]]


def test_weighted_kmeans():
    for n in (200, 3001):  # after 12 turns the centroids of 3001 values still move
        values, weights = numbers(0, n), np.abs(numbers(1, n))
        ours = np.array(m.weighted_kmeans(values.tolist(), weights.tolist(), 8))
        centroids = np.sort(values)[[(2 * i + 1) * n // 16 for i in range(8)]]
        for _ in range(12):
            nearest = np.abs(values[:, None] - centroids).argmin(1)
            centroids = np.array([np.average(values[nearest == k], weights=weights[nearest == k]) for k in range(8)])
        np.testing.assert_allclose(ours, centroids, **TIGHT)
    assert m.weighted_kmeans([1.0, 1.0, 5.0], [1.0, 1.0, 3.0], 2) == [1.0, 5.0]
    assert m.weighted_kmeans([], [], 2) == [0.0, 0.0]
    back, data = m.squeezellm([[0.7]], [[1.0]], 4)  # nothing but what is apart
    assert (back, len(data)) == ([[float(np.float16(0.7))]], 1 + 2 * 16 + 4 + 2 * 2)


@pytest.mark.parametrize("rows, columns, matter, large", [(20, 50, 1, 4), (40, 100, 2, 16), (31, 30, 1, 4)])
def test_squeezellm_keeps_what_matters_apart(rows, columns, matter, large):
    """0.05% and 0.4% of 1,000 weights, of 4,000, and of 930, rounded up."""
    w, s, n = numbers(0, rows, columns, size=0.1), np.abs(numbers(1, rows, columns)), rows * columns
    back, data = m.squeezellm(w.tolist(), s.tolist(), 3)
    back = np.array(back)
    apart = set(np.argsort(-s.ravel())[:matter]) | set(np.argsort(-np.abs(w).ravel())[:large])
    for i in apart:
        assert back.ravel()[i] == np.float16(w.ravel()[i])
    dense = [i for i in range(n) if i not in apart]
    codebook = np.array([float(np.float16(c)) for c in m.weighted_kmeans(w.ravel()[dense].tolist(), s.ravel()[dense].tolist(), 8)])
    same(back.ravel()[dense], codebook[np.abs(w.ravel()[dense][:, None] - codebook).argmin(1)])
    packed, few = -(-n * 3 // 8), len(apart)
    assert len(data) == packed + 8 * 2 + few * 4 + (rows + 1) * 2
    number = int.from_bytes(data[:packed], "little")  # what the bytes alone decode to: the dense part, then the CSR over it
    halves, shorts = np.frombuffer(data[packed:packed + 16 + 2 * few], "<f2"), np.frombuffer(data[packed + 16 + 2 * few:], "<u2")
    decoded = np.array([float(halves[number >> 3 * i & 7]) for i in range(n)]).reshape(rows, columns)
    places, before = shorts[:few], shorts[few:]
    for r in range(rows):
        decoded[r, places[before[r]:before[r + 1]]] = halves[8:][before[r]:before[r + 1]]
    same(back, decoded)


def test_sensitivities_are_squared_gradients(lab):
    name, place = "layers.0.feed_forward.w2", (3, 5)
    got = m.sensitivities(lab)[name][place[0]][place[1]]
    total = 0.0
    for start in range(0, 29, 16):
        piece, losses = lab.calibration[start:start + 17], []
        for change in (1e-5, -1e-5):
            w = [list(row) for row in lab.model.weights[name]]
            w[place[0]][place[1]] += change
            logits = m.Llama(CONFIG, lab.model.weights | {name: w}).forward(piece[:-1])
            losses.append(m.cross_entropy(logits, piece[1:])[0])
        total += ((losses[0] - losses[1]) / 2e-5) ** 2
    assert got == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------- one bit and a bit

def test_bitnet_and_ternary():
    w = numbers(0, 4, 9) + 0.2
    w[0, 0] = w.mean()
    beta = np.abs(w).mean()
    np.testing.assert_allclose(m.bitnet_signs(w.tolist()), np.where(w > w.mean(), beta, -beta), **TIGHT)
    codes, gamma = m.ternary_codes(w.tolist())
    assert gamma == pytest.approx(beta, abs=1e-15)
    same(codes, np.clip(np.rint(w / beta), -1, 1))
    np.testing.assert_allclose(m.ternary_weights(w.tolist()), np.clip(np.rint(w / beta), -1, 1) * beta, **TIGHT)
    assert m.ternary_weights([[0.0, 0.0]]) == [[0.0, 0.0]]
    assert m.ternary_codes([[0.5, -0.5, 1.0, 2.0]]) == ([[0, 0, 1, 1]], 1.0)  # halves are rounded to 0
    x = numbers(1, 9)
    y, additions, multiplications = m.ternary_product(x.tolist(), codes, gamma)
    np.testing.assert_allclose(y, np.array(codes) @ x * gamma, **TIGHT)
    assert (additions, multiplications) == (np.count_nonzero(codes), 4)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 23])
def test_pack_ternary(n):
    codes = [(i * 5 + i * i) % 3 - 1 for i in range(n)]
    data = m.pack_ternary(codes)
    assert len(data) == -(-n // 5)
    assert [byte // 3**i % 3 - 1 for byte in data for i in range(5)][:n] == codes
    assert m.pack_ternary([1, -1, 0, 1, 1]) == bytes([2 + 0 * 3 + 1 * 9 + 2 * 27 + 2 * 81])


def test_straight_through_takes_the_gradient_at_the_ternary_weights(lab):
    tokens, targets = lab.text[:6], lab.text[1:7]
    ternary = lab.calm.weights | {name: m.ternary_weights(lab.calm.weights[name]) for name in lab.linears}
    gradients = []
    for model, wrap in ((lab.calm, m.straight_through), (m.Llama(CONFIG, ternary), lambda tape: tape)):
        tape = m.Tape()
        logits = model.forward(tokens, run=wrap(tape))
        found = tape.backward(logits, m.cross_entropy(logits, targets)[1])
        gradients.append([found[id(model.weights[name])] for name in (*lab.linears, "tok_embeddings", "norm")])
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, **TIGHT)


# -------------------------------------------------------------------------------- training in few bits

def test_adapters_are_added_and_alone_get_gradients(lab):
    rng = random.Random(0)
    adapters = {id(lab.model.weights[n]): ([[rng.gauss(0, 1) for _ in range(len(lab.model.weights[n][0]))] for _ in range(2)],
                                           [[rng.gauss(0, 0.1) for _ in range(2)] for _ in lab.model.weights[n]]) for n in lab.linears}
    merged = lab.model.weights | {n: (np.array(lab.model.weights[n]) + np.array(adapters[id(lab.model.weights[n])][1])
                                      @ np.array(adapters[id(lab.model.weights[n])][0])).tolist() for n in lab.linears}
    tape = m.Tape()
    logits = lab.model.forward(lab.text[:6], run=m.with_adapters(adapters)(tape))
    plain = m.Tape()
    expected = m.Llama(CONFIG, merged).forward(lab.text[:6], run=plain)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10)
    d = m.cross_entropy(logits, lab.text[1:7])[1]
    found, reference = tape.backward(logits, d), plain.backward(expected, d)
    for n in lab.linears:
        a, b = adapters[id(lab.model.weights[n])]
        dw = np.array(reference[id(merged[n])])
        np.testing.assert_allclose(found[id(b)], dw @ np.array(a).T, rtol=0, atol=1e-10)
        np.testing.assert_allclose(found[id(a)], np.array(b).T @ dw, rtol=0, atol=1e-10)
        assert id(lab.model.weights[n]) not in found


def test_qlora_starts_at_the_nf4_model_and_lowers_the_loss(lab, monkeypatch):
    def loss(c):
        logits = m.Llama(CONFIG, c.weights).forward(lab.recent[:-1], run=c.run)
        return m.cross_entropy(logits, lab.recent[1:])[0]

    base, trained = m.in_nf4(lab, True), m.by_qlora(lab)[0]
    assert loss(trained) < loss(base) - 0.01 and trained.weights == base.weights
    monkeypatch.setattr(m, "FEW_STEPS", 0)
    made, original = [], m.with_adapters
    monkeypatch.setattr(m, "with_adapters", lambda adapters: made.append(adapters) or original(adapters))
    assert loss(m.by_qlora(lab, 16)[0]) == loss(base)
    sizes = [value * math.sqrt(len(row)) for a, _ in made[0].values() for row in a for value in row]
    assert len(sizes) == 16 * sum(len(lab.model.weights[name][0]) for name in lab.linears)
    assert math.hypot(*sizes) / math.sqrt(len(sizes)) == pytest.approx(1, abs=0.05)  # A keeps the size of what it reads
    assert abs(np.mean(sizes)) < 0.1


def test_short_runs_take_piece_after_piece_at_a_falling_rate(lab):
    """96 tokens, so that pieces start at 0, 24, 48, and from the start again at 72."""
    ids, names, read, taken = lab.text[:96], ["output", "norm"], [], []

    def watched(tape):
        def run(operation, *inputs):
            if operation is m.look_up:
                read.append(inputs[1])
            return tape(operation, *inputs)
        return run

    m.short_run(lab.calm, {name: lab.calm.weights[name] for name in names}, ids, 5, 0.2, watched, lambda *step: taken.append(step))
    assert read == [ids[start:start + 24] for start in (0, 24, 48, 0, 24)]
    np.testing.assert_allclose([rate for _, rate in taken], [0.2, 0.16, 0.12, 0.08, 0.04], **TIGHT)
    for start, (gradients, _) in zip((0, 24, 48), taken):
        assert list(gradients) == names
        for place in (3, 7):
            losses = []
            for change in (1e-5, -1e-5):
                gain = [value + change * (i == place) for i, value in enumerate(lab.calm.weights["norm"])]
                logits = m.Llama(CONFIG, lab.calm.weights | {"norm": gain}).forward(ids[start:start + 24])
                losses.append(m.cross_entropy(logits, ids[start + 1:start + 25])[0])
            assert gradients["norm"][place] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_short_runs_take_steps_of_adam_unless_told_otherwise(lab):
    one, other = ({"norm": list(lab.calm.weights["norm"])} for _ in range(2))
    m.short_run(m.Llama(CONFIG, lab.calm.weights | one), one, lab.text, 3, 0.01)
    m.short_run(m.Llama(CONFIG, lab.calm.weights | other), other, lab.text, 3, 0.01, step=m.Adam(other).step)
    assert one == other != {"norm": lab.calm.weights["norm"]}


def test_the_short_runs_of_ternaries_and_of_qlora_are_as_long_and_as_fast_as_told(lab, monkeypatch):
    rates, first, read, loss = [], [], [], m.cross_entropy
    monkeypatch.setattr(m, "cross_entropy", lambda logits, targets: read.append(targets) or loss(logits, targets))

    class Watched(m.Adam):
        def step(self, gradients, rate):
            rates.append(rate)
            first.append(gradients)
            super().step(gradients, rate)

    monkeypatch.setattr(m, "Adam", Watched)
    another = replace(lab)  # of which nothing is remembered
    m.in_one_bit(another, "b1.58 trained")
    np.testing.assert_allclose(rates, [0.02 * i / 8 for i in range(8, 0, -1)], **TIGHT)
    ternary = m.Llama(CONFIG, lab.calm.weights | {name: m.ternary_weights(lab.calm.weights[name]) for name in lab.linears})
    tape = m.Tape()
    logits = ternary.forward(lab.text[:24], run=tape)
    found = tape.backward(logits, m.cross_entropy(logits, lab.text[1:25])[1])
    assert set(first[0]) == set(ternary.weights)  # every weight is trained, on the gradient at the ternary ones
    for name, gradient in first[0].items():
        np.testing.assert_allclose(gradient, found[id(ternary.weights[name])], **TIGHT)
    rates.clear(), read.clear()
    m.by_qlora(another)
    assert read[:2] == [lab.text[-48:-24], lab.text[-24:]]  # the end of the text
    np.testing.assert_allclose(rates, [0.005 * i / 6 for i in range(6, 0, -1)], **TIGHT)


def test_subspace_is_that_of_the_svd():
    g = numbers(0, 12, 4) @ np.diag([50.0, 20.0, 1e-3, 1e-4]) @ numbers(1, 4, 9)
    p = np.array(m.subspace(g.tolist(), 2, random.Random(0)))
    np.testing.assert_allclose(p @ p.T, np.eye(2), **TIGHT)
    u = np.linalg.svd(g)[0][:, :2]
    np.testing.assert_allclose(p.T @ p, u @ u.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_step_of_q_galore(shape):
    w, g = numbers(0, *shape), numbers(1, *shape)
    optimizer = m.QGaLore(w.tolist(), 2, random.Random(0))
    before = np.array(optimizer.q.dequantize())
    optimizer.step(g.tolist(), 0.05)
    after = np.array(optimizer.w)
    same(after, optimizer.q.dequantize())
    p = np.array(optimizer.projection.dequantize())
    assert optimizer.projection.bits == 4 and p.shape == (2, 6) and optimizer.q.bits == 8
    assert [max(map(abs, codes)) for codes in optimizer.projection.codes] == [7, 7]  # a scale for every vector
    r = p @ (g if shape[0] < shape[1] else g.T)
    change = -0.05 * p.T @ (r / (np.abs(r) + 1e-8))  # Adam's first step is the sign
    change = change if shape[0] < shape[1] else change.T
    scales = np.array(optimizer.q.scales)
    assert (np.abs(after - before - change) <= scales * (1 + 1e-9)).all()
    assert not np.allclose(after, before)


def test_stochastic_rounding_is_right_on_average():
    rng = random.Random(0)
    seen = np.array([m.stochastic_codes([0.25, -0.25, 3.0, 500.0, -1.9], 0.5, rng) for _ in range(2000)])
    assert [set(column) for column in seen.T] == [{0, 1}, {-1, 0}, {6}, {127}, {-4, -3}]
    np.testing.assert_allclose(seen.mean(0), [0.5, -0.5, 6, 127, -3.8], rtol=0, atol=0.05)


def test_alignment_is_the_cosine_whatever_the_sign():
    u, v = numbers(0, 5), numbers(1, 5)
    assert m.alignment(u.tolist(), v.tolist()) == pytest.approx(abs(u @ v) / np.linalg.norm(u) / np.linalg.norm(v), abs=1e-15)
    assert m.alignment((-3 * u).tolist(), u.tolist()) == pytest.approx(1, abs=1e-15)
    assert m.alignment([0.0, 0.0], [1.0, 2.0]) == 0


def test_projections_that_agree_are_refreshed_less_often():
    g = (numbers(0, 6, 1) @ numbers(1, 1, 9)).tolist()
    steady, moving = (m.QGaLore(numbers(2, 6, 9).tolist(), 1, random.Random(0)) for _ in range(2))
    for i in range(20):
        steady.step(g, 0.01)
        moving.step([[float(r == i // 2 % 6) for _ in range(9)] for r in range(6)], 0.01)
    assert (steady.refreshed, steady.interval) == (4, 16)  # at steps 0, 2, 6 and 14
    assert (moving.refreshed, moving.interval) == (10, 2)
    leading = m.QGaLore(numbers(3, 16, 20).tolist(), 6, random.Random(0))  # only the first of six vectors stays
    for i in range(8):
        leading.step((100 * numbers(0, 16, 1) @ numbers(1, 1, 20) + numbers(10 + i, 16, 20)).tolist(), 0.01)
    assert (leading.refreshed, leading.interval) == (3, 8)  # at steps 0, 2 and 6


# -------------------------------------------------------------------------------------- mixed precision

def test_bits_are_assigned_as_brute_force_does(lab):
    damage = m.measure_sensitivity(lab, 3, 4)
    assert list(damage) == lab.linears and all(sorted(found) == [2, 3, 4] for found in damage.values())
    few = dict(list(damage.items())[:4])
    budget = sum(found[3][1] for found in few.values())
    best = min((sum(found[b][0] for found, b in zip(few.values(), choice)) for choice in itertools.product((2, 3, 4), repeat=4)
                if sum(found[b][1] for found, b in zip(few.values(), choice)) <= budget))
    chosen = m.assign_bits(few, budget)
    assert sum(few[n][b][0] for n, b in chosen.items()) == best
    assert sum(few[n][b][1] for n, b in chosen.items()) <= budget
    for name in lab.linears[:2]:
        q = m.quantize(lab.model.weights[name], 4, granularity=4)
        a, b = (np.array(m.Llama(CONFIG, weights).forward(lab.calibration[-16:]))
                for weights in (lab.model.weights, lab.model.weights | {name: q.dequantize()}))
        p, r = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (a, b))
        assert damage[name][4] == (pytest.approx((p * np.log(p / r)).sum(1).mean(), rel=1e-6), q.nbytes)
    by_hand = {"a": {2: (5.0, 10), 3: (1.0, 20)}, "b": {2: (3.0, 10), 3: (2.0, 20)}}
    assert m.assign_bits(by_hand, 30) == {"a": 3, "b": 2} and m.assign_bits(by_hand, 40) == {"a": 3, "b": 3}
    assert m.widths(2) == [2, 3] and m.widths(8) == [7, 8] and m.widths(4) == [3, 4, 5]


def test_the_front_is_what_nothing_else_beats():
    assert m.pareto_front([(2, 5.0), (1, 9.0), (3, 5.0), (2, 4.0), (4, 1.0), (1, 9.0), (5, 1.0)]) == {1, 3, 4}
    assert m.pareto_front([]) == set()
    for seed in range(20):
        points = np.random.default_rng(seed).integers(0, 8, (12, 2)).tolist()
        assert m.pareto_front(points) == {
            i for i, (x, y) in enumerate(points) if not any(
                a <= x and b <= y and ((a, b) != (x, y) or j < i) for j, (a, b) in enumerate(points) if j != i)}


# ---------------------------------------------------------------------------------- what is measured on

@pytest.fixture(scope="module")
def trained():
    """The lab of the script, on a model that has hardly learned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "STEPS", 2)
        yield m.build_lab(12345, m.CALIBRATION_TOKENS, m.OUTLIERS)


def test_calibration_and_evaluation_share_no_token_position(trained):
    ids = trained.tokenizer.encode(m.TEXT)
    last = len(trained.tokenizer.encode(m.TEXT.splitlines(True)[-1]))
    assert trained.text == ids[:-last] and trained.text[-m.CALIBRATION_TOKENS:] == trained.calibration
    assert trained.evaluation == ids[-m.EVALUATION_TOKENS - 1:] and len(trained.evaluation) <= last


def test_the_lab_sees_its_two_texts_through_the_planted_model(trained):
    config, (channels, size) = trained.model.config, m.OUTLIERS
    for tokens, inputs in ((trained.calibration, trained.inputs), (trained.evaluation[:-1], trained.unseen)):
        seen, logits = m.capture(trained.model, tokens)
        assert inputs == seen and set(seen) == set(trained.linears)
    assert trained.logits == logits and len(logits) == m.EVALUATION_TOKENS
    np.testing.assert_allclose(logits, trained.calm.forward(trained.evaluation[:-1]), rtol=0, atol=1e-9)
    ratio = np.array(trained.model.weights["norm"]) / trained.calm.weights["norm"]
    assert sorted(np.round(ratio, 9)) == [1] * (config.dim - channels) + [size] * channels
    for w in trained.calm.weights.values():
        same(w, np.float32(w))


def test_the_vocabulary_holds_what_the_text_needs_and_no_more():
    tokenizer, full = m.word_tokenizer(), m.Tokenizer.train(m.TEXT, m.VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode(m.TEXT)) == m.TEXT
    assert set(tokenizer.vocab) == set(m.TEXT) | {full.vocab[i] for i in full.encode(m.TEXT)}
