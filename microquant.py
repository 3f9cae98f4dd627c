#!/usr/bin/env python3
"""The same model in a quarter of the bytes.

A language model that writes one token at a time spends its time fetching weights from memory, so a weight in
4 bits instead of 16 is nearly four times the speed, and lets a card hold a model it could not hold before. The price is
rounding. This script trains a tiny Llama, plants in it the outliers that real ones have, then compresses it by
the methods that people deploy, and measures each on the same three things: the bytes it really takes, the
model's loss, and how far its predictions moved.

Run it (`python microquant.py`), read the trace, then read on from here in order: every section of the trace is
a section of this file. The model under test and its measures stand after the last section, then what the five
scripts share.

The papers:
  Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433                section 1
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, 2023, arXiv:2305.14314    sections 4, 11
  Gerganov et al., llama.cpp, ggml-common.h and ggml-quants.c                               section 5
  Dettmers et al., LLM.int8(), 2022, arXiv:2208.07339                                       section 6
  Xiao et al., SmoothQuant, 2023, arXiv:2211.10438                                          section 6
  Frantar et al., GPTQ, 2023, arXiv:2210.17323                                              section 7
  Lin et al., AWQ: Activation-aware Weight Quantization, 2024, arXiv:2306.00978             section 8
  Badri & Shaji, Half-Quadratic Quantization, 2023, mobiusml.github.io/hqq_blog             section 9
  Kim et al., SqueezeLLM: Dense-and-Sparse Quantization, 2024, arXiv:2306.07629             section 9
  Wang et al., BitNet, 2023, arXiv:2310.11453; Ma et al., The Era of 1-bit LLMs, 2024,
    arXiv:2402.17764                                                                        section 10
  Zhao et al., GaLore, 2024, arXiv:2403.03507; Zhang et al., Q-GaLore, 2024, arXiv:2407.08296   section 11
  Liu et al., KIVI, 2024, arXiv:2402.02750: the large channels of keys      the model under test
"""

from __future__ import annotations

import cmath
import math
import operator
import os
import random
import re
import struct
import sys
import textwrap
import time
import unicodedata
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from bisect import bisect, bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from statistics import NormalDist, fmean

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]

VOCAB_SIZE = 160           # tokens that the tokenizer learns: all words of the text but one are then one token
DIM = 64                   # channels: two groups of 32 in a row
HIDDEN_DIM = 32            # channels inside the feed-forward
STEPS = 20                 # of training
LENGTH = 40                # tokens a training step
LEARNING_RATE = 0.035      # at its highest
BITS = 4                   # of the low-bit formats
GROUP_SIZE = 32            # weights that share a scale, where there are groups
CALIBRATION_TOKENS = 64    # what GPTQ, AWQ and the others see of the activations
EVALUATION_TOKENS = 48     # the last of the last verse: what every method has to predict
ALPHA = 0.5                # SmoothQuant's: how much of the difficulty moves to the weights
OUTLIERS = (2, 32.0)       # channels planted as outliers, and how many times larger they are made
PROMPT = "This is the"     # what the samples of text continue
TERNARY_STEPS = 8          # of training with ternary weights, section 10
FEW_STEPS = 6              # of the short runs of section 11
PIECE = 24                 # tokens a step of both


# ---------------------------------------------------------------------------------------------------
# 1. Numbers in few bits
#
# A grid of evenly spaced values stands in for the real numbers. With b bits a code is a whole number from
# -2^(b-1) to 2^(b-1) - 1; the scale is the distance between grid points, the zero point the code that means 0:
#
#     code = clip(round(w / scale + zero_point))          w ≈ (code - zero_point) · scale
#
# Symmetric: scale = absmax / (2^(b-1) - 1) and zero_point = 0, so INT8 runs from -127 to 127. Asymmetric: the grid
# is laid from min to max instead (0 always included, so that zero stays zero), which pays where values lean to one
# side: scale = (max - min) / (2^b - 1), zero_point = -2^(b-1) + round(-min / scale). Scales are stored as FP16,
# rounded up. Either way nothing is further from a grid point than half a step: |error| ≤ scale / 2. Floating
# point spends its bits on range instead: the steps double with every power of two.

Grids = list[list[tuple]]  # [row][group]: (scale, zero_point)


@dataclass(frozen=True)
class Quantized:
    """A matrix [out][in] in few bits: w ≈ (code - zero_point) · scale, or codebook[code] · scale.

    scales[r][c // group] and zero_points[r][c // group] belong to codes[r][c]. overhead: the scales and zero
    points as a file stores them, and what else decoding needs; a scale that all rows share is in there once.
    """
    codes: list[list[int]]
    scales: Matrix
    zero_points: Matrix
    bits: int
    group: int
    overhead: bytes
    codebook: tuple[float, ...] = ()

    def dequantize(self) -> Matrix:
        """The matrix that the codes stand for, [out][in]."""
        book, g = self.codebook, self.group
        return [flatten([(book[code] if book else code - zero) * scale for code in codes[i * g:(i + 1) * g]]
                        for i, (scale, zero) in enumerate(zip(scales, zeros)))
                for codes, scales, zeros in zip(self.codes, self.scales, self.zero_points)]

    def to_bytes(self) -> bytes:
        """What a file would hold: the codes, packed, then the overhead."""
        return pack_bits(flatten(self.codes), self.bits) + self.overhead

    @property
    def nbytes(self) -> int:
        """Bytes that storing it takes, scales included."""
        return len(self.to_bytes())

    @property
    def bits_per_weight(self) -> float:
        """The same per weight, in bits."""
        return 8 * self.nbytes / sum(map(len, self.codes))


def quantize(w: Matrix, bits: int, *, symmetric: bool = True, granularity: str | int = "tensor") -> Quantized:
    """w [out][in] rounded to the nearest points of grids of 2^bits values.

    granularity: one grid for the "tensor", one per "channel" (row), or one per that many columns of a row.
    bits: 2 to 8. ValueError for anything else, for ragged or empty w, NaN, and infinities.
    """
    group = group_columns(w, bits, granularity)
    grids = lay_grids(w, group, granularity, partial(make_grid, bits=bits, symmetric=symmetric))
    return on_grids(w, grids, bits, group, granularity, symmetric)


def group_columns(w: Matrix, bits: int, granularity: str | int) -> int:
    """How many columns share a grid; ValueError where quantize() cannot work."""
    if bits not in range(2, 9):
        raise ValueError(f"bits must be a whole number from 2 to 8, not {bits!r}")
    if granularity not in ("tensor", "channel") and not (type(granularity) is int and granularity > 0):
        raise ValueError(f"granularity must be 'tensor', 'channel' or a positive group size, not {granularity!r}")
    if not w or not w[0] or any(len(row) != len(w[0]) for row in w):
        raise ValueError("w must have at least one row and one column, and rows of one length")
    if not all(map(fp16.largest.__ge__, map(abs, flatten(w)))):  # false for NaN too
        raise ValueError(f"w must hold finite numbers of at most {fp16.largest:.0f}, what FP16 scales allow for")
    return granularity if type(granularity) is int else len(w[0])


def lay_grids(w: Matrix, group: int, granularity: str | int, make: Callable[[Vector], tuple]) -> Grids:
    """For each row of w, make() of each group of its columns; for "tensor" of all values at once, in every row."""
    if granularity == "tensor":
        return [[make(flatten(w))]] * len(w)
    return [[make(row[c:c + group]) for c in range(0, len(row), group)] for row in w]


def make_grid(values: Vector, *, bits: int, symmetric: bool) -> tuple[float, int]:
    """(scale, zero_point) of the finest grid on which no value is clipped; for zeros alone the scale is 1."""
    low, high = code_range(bits)
    if symmetric:
        return fp16_up(max(map(abs, values)) / high) or 1.0, 0
    least, most = min(0.0, *values), max(0.0, *values)
    scale = fp16_up((most - least) / (high - low)) or 1.0
    return scale, low + round(-least / scale)


def code_range(bits: int) -> tuple[int, int]:
    """The least and the greatest code."""
    return -2 ** (bits - 1), 2 ** (bits - 1) - 1


def to_codes(values: Vector, scale: float, zero_point: float, bits: int) -> list[int]:
    """Each value's nearest grid point; halfway goes to the even code, as everywhere in Python and IEEE 754."""
    low, high = code_range(bits)
    codes = [round(value / scale + zero_point) for value in values]
    return codes if low <= min(codes) and max(codes) <= high else [min(max(code, low), high) for code in codes]


def on_grids(w: Matrix, grids: Grids, bits: int, group: int, granularity: str | int, symmetric: bool) -> Quantized:
    """w [out][in], each group of a row rounded to its own grid."""
    codes = [flatten(to_codes(row[g * group:(g + 1) * group], *grid, bits) for g, grid in enumerate(row_grids))
             for row, row_grids in zip(w, grids)]
    return with_grids(codes, grids, bits, group, granularity, symmetric)


def with_grids(codes: list[list[int]], grids: Grids, bits: int, group: int, granularity: str | int,
               symmetric: bool = True) -> Quantized:
    """Scales are stored in FP16, zero points (unless symmetric) like codes, or in FP16 if not whole."""
    scales, zeros = zip(*(grids[0] if granularity == "tensor" else flatten(grids)))
    overhead = struct.pack(f"<{len(scales)}e", *scales)
    if not symmetric:
        overhead += pack_bits(zeros, bits) if isinstance(zeros[0], int) else struct.pack(f"<{len(zeros)}e", *zeros)
    scales, zeros = ([[grid[part] for grid in row] for row in grids] for part in (0, 1))
    return Quantized(codes, scales, zeros, bits, group, overhead)


@dataclass(frozen=True)
class FloatFormat:
    """Numbers of a sign, an exponent and a mantissa of so many bits; called with x, it gives the nearest one."""
    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    overflow: float  # what anything larger becomes

    def __call__(self, x: float) -> float:
        """The nearest number, halfway the even one; ±overflow beyond what rounds to largest; ±0 and NaN stay."""
        if x == 0 or not math.isfinite(x):
            return math.copysign(self.overflow, x) if math.isinf(x) else x
        exponent = max(math.frexp(x)[1] - 1, 2 - 2 ** (self.exponent_bits - 1))  # below: subnormal, steps stay
        step = 2.0 ** (exponent - self.mantissa_bits)
        y = round(x / step) * step
        return math.copysign(self.overflow if abs(y) > self.largest else y, x)


fp16 = FloatFormat("FP16", 5, 10, 65504.0, math.inf)
bf16 = FloatFormat("BF16", 8, 7, (2 - 2**-7) * 2.0**127, math.inf)  # FP32 cut short
fp8_e4m3 = FloatFormat("FP8 E4M3", 4, 3, 448.0, 448.0)  # no infinity: it stays at 448, as saturating hardware does
fp8_e5m2 = FloatFormat("FP8 E5M2", 5, 2, 57344.0, math.inf)  # FP16 cut short


def fp32(x: float) -> float:
    """The nearest FP32."""
    return struct.unpack("<f", struct.pack("<f", x))[0]


def fp16_up(x: float) -> float:
    """The smallest FP16 number that is not below x, which is from 0 to 65504."""
    step = 2.0 ** (max(math.frexp(x)[1] - 1, -14) - 10)
    return math.ceil(x / step) * step


def fp16_row(values: Sequence[float]) -> Vector:
    """fp16() of every one, by struct, which is quicker; none may round beyond 65504."""
    return list(struct.unpack(f"<{len(values)}e", struct.pack(f"<{len(values)}e", *values)))


def show_numbers(trace: Trace, knobs: Namespace) -> None:
    """The model, weights there and back, a matrix's histogram over the grids, and the float formats."""
    lab, bits, (channels, size) = laboratory(knobs), knobs.bits, knobs.outliers
    config, name = lab.model.config, "layers.0.attention.wv"
    trace.say(f"The patient: a Llama of {lab.fp32_bytes // 4:,} weights, {config.dim} channels and "
              f"{config.n_layers} layer, trained for {STEPS} steps on The House That Jack Built. Its perplexity "
              f"on the last verse, where everything here is measured, is {lab.perplexity:.3f}. (Calibration takes "
              f"the tokens before it. Training read nearly all: the place is held apart, not the words.)")
    n_keys = 2 * key_pairs(channels, config)
    trace.say("Large models have a few channels with activations many times the others'; a tiny one has none. " + (
        f"So they are planted: on {channels} channels every norm's gain is made {size:g} times larger and the "
        f"columns that read them as much smaller; in each head, {n_keys} channels of the keys are made "
        f"{key_size(size):g} times larger, of the queries smaller. In exact arithmetic nothing changes."
        if lab is not without_outliers(knobs) else "Nor has this one, with these --outliers."))
    matrix = lab.model.weights[name]
    w, width = flatten(matrix), len(matrix[0])
    forms = {form: (flatten(q.codes), flatten(q.dequantize()), q.scales[0][0]) for form, q in (
        ("INT8", quantize(matrix, 8)), (f"INT{bits}", quantize(matrix, bits)),
        (f"INT{bits} asymmetric", quantize(matrix, bits, symmetric=False)))}
    furthest = max(range(len(w)), key=lambda i: abs(w[i]))
    row = sorted(range(furthest // width * width, (furthest // width + 1) * width), key=w.__getitem__)
    trace.ask(f"the weight of {name} that is furthest out is {w[furthest]:+.4f}. Which code is it in INT{bits}?",
              forms[f"INT{bits}"][0][furthest])
    trace.say(f"Some weights of {name}, rounded to INT8 and INT{bits} (one scale for the matrix) and back:")
    trace.table(["weight", *flatten((form, "back") for form in forms)],
                [[f"{w[i]:+.4f}", *flatten((str(q[i]), f"{back[i]:+.4f}") for q, back, _ in forms.values())]
                 for i in (*row[::width // 6], row[-1])])
    trace.say("Their histogram, and the grids under it: a mark where a code's value is. Most weights are small, "
              "and the few largest decide how wide the grid is laid.")
    trace.lines(histogram(w, {f"INT{b}": [code * forms[f"INT{b}"][2] for code in range(1 - 2**(b - 1), 2**(b - 1))]
                              for b in (bits, 8)}))

    trace.say("Floating point instead: what formats make of the same numbers. Range is paid for with precision.")
    samples = (0.1, 300.0, 70000.0, 1e-6)
    trace.table(["", "bits", "largest", "smallest", "step at 1", *(f"{x:g}" for x in samples)],
                [[f.name, str(1 + f.exponent_bits + f.mantissa_bits), f"{f.largest:.3g}",
                  f"2^{2 - 2 ** (f.exponent_bits - 1) - f.mantissa_bits}", f"2^-{f.mantissa_bits}",
                  *(f"{f(x):.5g}" for x in samples)] for f in (fp16, bf16, fp8_e4m3, fp8_e5m2)], left=(0,))

    trace.check_close("the planted outliers left the FP32 logits where they were", lab.logits,
                      lab.calm.forward(lab.evaluation[:-1]), 1e-9)
    for form, (_, back, scale) in forms.items():
        gap = max(abs(a - b) for a, b in zip(back, w))
        trace.check(f"{form}: |error| ≤ scale / 2", gap <= scale / 2 * (1 + 1e-12), f"all {len(w):,} weights")
    some = w + [10.0 ** e for e in range(-9, 5)]
    trace.check("fp16() = what struct packs", [fp16(x) for x in some] == fp16_row(some), f"{len(some):,} numbers")


# ---------------------------------------------------------------------------------------------------
# 2. Granularity
#
# A scale is set by the largest weight it serves. One outlier, and all who share its scale are rounded on a
# grid laid for it. So let fewer share: a scale per tensor, per output channel (a row of W), per group of 32
# weights. Each scale costs 16 bits, so groups of g cost 16/g bits a weight on top:
#
#     bits per weight = bits + 16 · (number of scales) / (number of weights)
#
# Production formats use groups of 16 (NVFP4) or 32 (GGUF, MXFP4) to 128 (the usual one for GPTQ and AWQ).

def show_granularity(trace: Trace, knobs: Namespace) -> None:
    """Bits, error and loss at each granularity, and what one outlier does to its neighbours."""
    lab, g, bits = laboratory(knobs), knobs.group_size, knobs.bits
    kinds: dict[str, str | int] = {"tensor": "tensor", "channel": "channel", f"group of {g}": g}
    trace.say("The whole model rounded to nearest, at three granularities. Error: how far the weights moved, as a "
              "share of their size. Perplexity on the last verse; KL: how far the predictions moved from FP32's, in "
              "nats a token; changed: how often the likeliest next token is another one.")
    trace.ask(f"INT{bits} with a scale for every group of {g}: how many bits a weight does that take?",
              rounded_to_nearest(lab, bits, g).bits_per_weight)
    rows, sizes_agree = [["FP32", "", "", "32.00", f"{lab.perplexity:.3f}", "", ""]], True
    for b, (kind, granularity) in product(dict.fromkeys((8, bits)), kinds.items()):
        c = rounded_to_nearest(lab, b, granularity)
        error = fmean(relative_distance(c.weights[n], lab.model.weights[n]) for n in lab.linears)
        rows.append([f"INT{b}", kind, f"{error:.1%}", *lab.scores(c)])
        shapes = map(lab.model.config.shapes().get, lab.linears)
        n_scales = sum({"tensor": 1, "channel": n_out}.get(kind, n_out * -(-n_in // g)) for n_out, n_in in shapes)
        sizes_agree &= c.bits_per_weight == (b * lab.n_weights + 16 * n_scales) / lab.n_weights
    trace.table(["", "a scale per", "error", "bits/weight", "perplexity", "KL", "changed"], rows, left=(0, 1))
    trace.note("Perplexity may, by luck, fall below FP32's; KL is at least 0." + " A scale per tensor pays for the "
               "planted keys as well." * (lab is not without_outliers(knobs)))

    w = [list(row) for row in lab.calm.weights["layers.0.attention.wv"][:4]]
    typical = math.sqrt(fmean(value * value for value in flatten(w)))
    w[2][len(w[0]) // 3] = 20 * typical
    trace.say(f"One outlier's damage: {len(w)} rows of {len(w[0])} weights, one of them (in row 3) made 20 times "
              f"the typical size. How far INT{bits} moves each of the others, as a share of the typical size:")
    for kind, granularity in kinds.items():
        back = quantize(w, bits, granularity=granularity).dequantize()
        errors = [[abs(a - b) / typical for a, b in zip(p, q)] for p, q in zip(back, w)]
        moved = sum(e > 0.3 for e in flatten(errors))
        trace.lines([f"a scale per {kind}: {moved} weights moved by more than 30%",
                     *("  " + "".join(map(shade, row)) for row in errors)])
    trace.note("blank: not moved   · under 2%   ░ under 10%   ▒ under 30%   ▓ under 60%   █ more")
    trace.check("bits per weight counted from the bytes = the formula", sizes_agree, "equal")
    if (bits, knobs.outliers) == (4, OUTLIERS):  # other widths and outliers may make less of a difference
        tensor, group = (measure(lab, rounded_to_nearest(lab, 4, granularity)) for granularity in ("tensor", g))
        trace.check("INT4: a scale per tensor is worse than one per group, in perplexity and by twice in KL",
                    tensor.perplexity > group.perplexity and tensor.kl > 2 * group.kl,
                    f"KL {tensor.kl:.3f} against {group.kl:.3f}")


# ---------------------------------------------------------------------------------------------------
# 3. Bytes for real
#
# A byte holds two 4-bit codes: the first in its low half, the second in its high half. In general, b bits a
# code, one after the other from the lowest bit up. A negative code is stored as two's complement: -1 is 1111.

def pack_int4(codes: Sequence[int]) -> bytes:
    """Codes from -8 to 7 (else ValueError), two to a byte, first one low; an odd one out leaves a high half 0."""
    if wrong := [code for code in codes if not -8 <= code <= 7]:
        raise ValueError(f"codes must be from -8 to 7, not {wrong[0]}")
    return bytes(low & 15 | (high & 15) << 4 for low, high in zip(codes[::2], [*codes[1::2], 0]))


def unpack_int4(data: bytes, n: int) -> list[int]:
    """The n codes that pack_int4() packed. ValueError if data is not as long as n codes take."""
    if len(data) != (n + 1) // 2:
        raise ValueError(f"data must be {(n + 1) // 2} bytes for n = {n} codes, not {len(data)}")
    halves = [half for byte in data for half in (byte & 15, byte >> 4)]
    return [half - 16 * (half > 7) for half in halves[:n]]


def pack_bits(codes: Sequence[int], bits: int) -> bytes:
    """Codes of so many bits each, in one long number, the first code lowest; zeros fill up its last byte."""
    digits = [f"{code:0{bits}b}" for code in range(2**bits)]  # a negative index counts from the end: -1 is 1…1
    number = int("".join([digits[code] for code in reversed(codes)]) or "0", 2)
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


# {model: (the fields of Config, the published number of parameters)}, from its config.json and its checkpoint
# (Touvron et al. 2023, arXiv:2307.09288; Llama team 2024, arXiv:2407.21783).
REAL_LLAMAS = {"Llama 2 7B": ((32000, 4096, 32, 32, 32, 11008), 6_738_415_616),
               "Llama 3.1 8B": ((128256, 4096, 32, 32, 8, 14336), 8_030_261_248),
               "Llama 3.1 70B": ((128256, 8192, 80, 64, 8, 28672), 70_553_706_496)}


def show_bytes(trace: Trace, knobs: Namespace) -> None:
    """Nibbles in bytes, the model's file in each format, and what real models would take."""
    codes, g, bits = [3, -1, -8, 7, 0, 5, -2], knobs.group_size, knobs.bits
    data = pack_int4(codes)
    trace.say(f"{len(codes)} codes in {len(data)} bytes. Read each byte from the right: low half first.")
    pairs = [codes[i:i + 2] for i in range(0, len(codes), 2)]
    trace.table(["codes", "in four bits", "byte", "hex"],
                [[", ".join(map(str, pair)), " ".join(f"{code & 15:04b}" for code in pair), f"{byte:08b}",
                  f"{byte:02x}"] for pair, byte in zip(pairs, data)], left=(0, 1))

    config, rng = model_config(len(word_tokenizer().vocab)), random.Random(knobs.seed)
    shapes = [shape for name, shape in config.shapes().items() if is_linear(name, shape)]
    rest = sum(map(math.prod, config.shapes().values())) - sum(map(math.prod, shapes))
    trace.say(f"A file of the tiny model's shapes: {len(shapes)} matrices of normal numbers in each format, encoded, "
              f"and the bytes counted. What only looks up or scales, the embedding and the norms, stays in FP16: "
              f"{2 * rest:,} bytes.")
    matrices = [[[rng.gauss(0, 0.1) for _ in range(n_in)] for _ in range(n_out)] for n_out, n_in in shapes]
    weights = flatten(map(flatten, matrices))
    sizes = {form: len(struct.pack(f"<{len(weights)}{code}", *weights)) + struct.calcsize(code) * rest
             for form, code in (("FP32", "f"), ("FP16", "e"))}
    for form, b, granularity in (("INT8, channels", 8, "channel"), (f"INT{bits}, tensor", bits, "tensor"),
                                 (f"INT{bits}, groups of {g}", bits, g)):
        sizes[form] = sum(quantize(w, b, granularity=granularity).nbytes for w in matrices) + 2 * rest
    trace.table(["format", "bytes", "of FP32", ""],
                [[form, f"{size:,}", f"{size / sizes['FP32']:.0%}", bar(size, sizes["FP32"], 40)]
                 for form, size in sizes.items()], left=(0, 3))

    counts = {name: sum(map(math.prod, Config(*fields).shapes().values()))
              for name, (fields, _) in REAL_LLAMAS.items()}
    gib = {name: {b: count * b / 8 / 2**30 for b in (32, 16, 8, 4.5, 4)} for name, count in counts.items()}
    trace.ask("how many GiB do the 8,030,261,248 weights of Llama 3.1 8B take at 4.5 bits, an FP16 scale for "
              "every 32 included?", gib["Llama 3.1 8B"][4.5])
    trace.say("The weights of real models in GiB; 4.5 bits is 4 bits and an FP16 scale for every 32.")
    trace.table(["model", "parameters", *(f"{b:g} bits" for b in (32, 16, 8, 4.5, 4))],
                [[name, f"{counts[name]:,}", *(f"{n:.1f}" for n in row.values())]
                 for name, row in gib.items()], left=(0,))
    some = [codes * 3 for codes in ([], [1], [-8, 7], codes, list(range(-8, 8)))]
    trace.check("pack_int4() = the general pack_bits() at 4 bits, and unpack_int4() undoes it, odd lengths too",
                all(pack_int4(part) == pack_bits(part, 4) and unpack_int4(pack_int4(part), len(part)) == part
                    for part in some), "equal")
    trace.check("parameters computed from the configurations = the published counts",
                counts == {name: count for name, (_, count) in REAL_LLAMAS.items()}, "equal")


# ---------------------------------------------------------------------------------------------------
# 4. NF4 and double quantization
#
# Weights are bell-shaped, so an even grid spends most of its codes where few weights are. NormalFloat puts its
# 16 values at quantiles of the normal distribution instead: more nearly as many weights for each. A plain set of
# quantiles would have no zero, so the two sides are cut separately, in 8 even steps of probability above zero and
# 7 below, both from the quantile 1 - ½(1/32 + 1/30) inwards to ½, where zero is, and scaled to end at ±1.
#
#     w ≈ codebook[code] · absmax                  absmax: of a block of 64, in FP32, so 4 + 32/64 = 4.5 bits
#
# Double quantization: those absmaxes are numbers too. Take their mean off, and store each in 8-bit floating
# point with one FP32 scale for every 256 of them: 4 + 8/64 + 32/(64·256) = 4.127 bits. (bitsandbytes uses an
# 8-bit float of its own making there; E4M3 does the same job.)

def nf4_codebook() -> Vector:
    """The 16 values of NF4, ascending from -1 to 1, 0 among them: QLoRA, section 3, as bitsandbytes cuts it."""
    far, quantile = 1 - (1 / 32 + 1 / 30) / 2, NormalDist().inv_cdf
    above = [quantile(far + (0.5 - far) * i / 8) for i in range(8)]
    below = [-quantile(far + (0.5 - far) * i / 7) for i in range(7)]
    return [value / above[0] for value in sorted([*below, 0.0, *above])]


def quantize_nf4(w: Matrix, *, block_size: int = 64, double_quant: bool = False) -> Quantized:
    """w [out][in] in NF4, one absmax per block_size columns of a row (the last block of a row may be shorter).

    An absmax is the block's scale; a block of zeros gets the code of 0. overhead: the absmaxes in FP32, or with
    double_quant as double_quantize() stores them. ValueError as for quantize().
    """
    group, codebook = group_columns(w, 4, block_size), tuple(nf4_codebook())
    absmax = lay_grids(w, group, group, lambda values: fp32(max(map(abs, values))))
    codes = [nearest([value / (scales[c // group] or 1.0) for c, value in enumerate(row)], codebook)
             for row, scales in zip(w, absmax)]
    overhead = struct.pack(f"<{len(flatten(absmax))}f", *flatten(absmax))
    if double_quant:
        absmax, overhead = double_quantize(absmax)
    return Quantized(codes, absmax, [[0] * len(row) for row in absmax], 4, group, overhead, codebook)


def nearest(values: Sequence[float], levels: Sequence[float]) -> list[int]:
    """For each value which of the levels, in ascending order, is nearest; halfway goes to the upper one."""
    between = [(a + b) / 2 for a, b in zip(levels, levels[1:])]
    return [bisect(between, value) for value in values]


def double_quantize(absmax: Matrix, block_size: int = 256) -> tuple[Matrix, bytes]:
    """(the absmaxes as they decode, none below 0; their bytes).

    The bytes: the mean in FP32, then for every block_size absmaxes a scale in FP32, which takes the furthest from
    the mean to 448, and each one's difference from the mean, over that scale, in E4M3.
    """
    flat, decoded = flatten(absmax), []
    mean = fp32(fmean(flat))
    overhead = struct.pack("<f", mean)
    for start in range(0, len(flat), block_size):
        centred = [a - mean for a in flat[start:start + block_size]]
        scale = fp32(max(map(abs, centred)) / 448) or 1.0
        small = [fp8_e4m3(a / scale) for a in centred]
        overhead += struct.pack("<f", scale) + bytes(map(e4m3_byte, small))
        decoded += [max(mean + value * scale, 0.0) for value in small]
    width = len(absmax[0])
    return [decoded[i:i + width] for i in range(0, len(flat), width)], overhead


def e4m3_byte(x: float) -> int:
    """The bit pattern of a number that fp8_e4m3() has rounded: sign, four of exponent, three of mantissa."""
    exponent = max(math.frexp(x)[1] - 1, -6) if x else -6
    return (math.copysign(1, x) < 0) << 7 | round(abs(x) / 2.0 ** (exponent - 3)) + (exponent + 6 << 3)


# As bitsandbytes has them (functional.py, get_4bit_type, 'nf4'), to eight digits.
PUBLISHED_NF4 = [-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
                 0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0]


def show_nf4(trace: Trace, knobs: Namespace) -> None:
    """The codebook over a bell, NF4 against INT4 on two kinds of weights, and the bits of double quantization."""
    rng, codebook = random.Random(knobs.seed), nf4_codebook()
    bell = [[rng.gauss(0, 1) for _ in range(512)] for _ in range(32)]
    even = [[rng.uniform(-1, 1) for _ in range(512)] for _ in range(32)]
    trace.ask("of INT4's 15 values, laid over -1 to 1, three lie between -0.2 and 0.2. How many of NF4's 16?",
              sum(abs(value) < 0.2 for value in codebook))
    trace.say("Normal numbers divided by the absmax of their block of 64, and the grids under them. NF4's values "
              "stand close where the numbers are; INT4's do not care.")
    normal = [v / max(map(abs, part)) for row in bell for part in (row[:64], row[64:128]) for v in part]
    trace.lines(histogram(normal, {"NF4": codebook, "INT4": [code / 7 for code in range(-7, 8)]}))
    trace.note("NF4: " + " ".join(f"{value:+.3f}" for value in codebook))
    trace.say("16,384 numbers of each kind, in blocks of 64: bytes and bits with the scales (INT4's are in FP16), "
              "and the root mean square error as a share of the numbers' own.")
    forms = {"INT4": partial(quantize, bits=4, granularity=64), "NF4": quantize_nf4,
             "NF4, double quantization": partial(quantize_nf4, double_quant=True)}
    coded = {form: method(bell) for form, method in forms.items()}
    errors = {form: [relative_distance(q.dequantize(), w) for q, w in ((coded[form], bell), (method(even), even))]
              for form, method in forms.items()}
    trace.table(["", "bytes", "bits/weight", "error: bell-shaped", "uniform"],
                [[form, f"{q.nbytes:,}", f"{q.bits_per_weight:.3f}", *(f"{e:.2%}" for e in errors[form])]
                 for form, q in coded.items()], left=(0,))
    trace.check_close("the derived codebook = the 16 published values", [codebook], [PUBLISHED_NF4], 1e-6)
    trace.check("NF4 beats INT4 on bell-shaped numbers, and loses on uniform ones",
                errors["NF4"][0] < errors["INT4"][0] and errors["NF4"][1] > errors["INT4"][1], "both")
    trace.check("bits counted = 4 + 32/64, and 4 + 8/64 + 32/(64·256) + the mean's 32 over all",
                [q.bits_per_weight for q in coded.values()][1:]
                == [4.5, 4 + 8 / 64 + 32 / (64 * 256) + 32 / 16384], "equal")


# ---------------------------------------------------------------------------------------------------
# 5. llama.cpp's blocks
#
# A GGUF file holds a quantized matrix as blocks of consecutive weights, each with its scale in front:
#
#     Q8_0   32 weights   d (FP16), 32 signed bytes                   w ≈ d · q         d = absmax / 127
#            q = w / d, rounded, halves away from 0
#     Q4_0   32 weights   d (FP16), 16 bytes                          w ≈ d · (q - 8)   d = (the extreme one) / -8
#            q = w / d + 8.5, cut off, at most 15; byte j holds weight j in its low half, j + 16 in its high
#     Q4_K   256 weights  d, dmin (FP16), 12 bytes, 128 bytes         w ≈ d · scale · q - dmin · min
#            eight sub-blocks of 32, each with a scale and a min of 6 bits, quantized themselves: 4.5 bits a weight
#            like Q4_0, but with a zero point. Bytes: see q4_k_decode().
#
# In Q8_0 and Q4_0, ggml computes in FP32 (hence all the fp32()), multiplies by 1 / d (0 for a d of 0), and only
# then stores d in FP16; w / d + 8.5 is rounded once, as by a fused multiply-add. Q4_K's own encoder tries several
# scales for each sub-block and keeps the best; ours takes the range from min to max. The layout is the same.

def blocks_of(row: Sequence[float], size: int) -> list[Vector]:
    """row cut into blocks, in FP32. ValueError if it is no multiple of size, or holds what FP16 scales cannot."""
    if not row or len(row) % size:
        raise ValueError(f"row must have a multiple of {size} weights, not {len(row)}")
    if not all(abs(value) <= fp16.largest for value in row):
        raise ValueError(f"row must hold finite numbers of at most {fp16.largest:.0f}")
    return [list(map(fp32, row[i:i + size])) for i in range(0, len(row), size)]


def block_fields(data: bytes, n: int, size: int, layout: str) -> Iterator[tuple]:
    """The fields of each block of `size` weights, in a struct layout; ValueError if data is not n weights long."""
    nbytes = struct.calcsize(layout)
    if n % size or len(data) != n // size * nbytes:
        raise ValueError(f"data must be {nbytes} bytes for every {size} weights, and n a multiple of {size}; "
                         f"not {len(data)} bytes and n = {n}")
    return struct.iter_unpack(layout, data)


def q8_0_encode(row: Sequence[float]) -> bytes:
    """Weights (a multiple of 32) -> GGUF Q8_0 blocks of 34 bytes. ValueError as blocks_of() has it."""
    data = b""
    for block in blocks_of(row, 32):
        d = fp32(max(map(abs, block)) / 127)
        inverse = fp32(1 / d) if d >= 2.0**-126 else 0.0  # for a smaller d, 1 / d may be too large for FP32
        products = [fp32(value * inverse) for value in block]
        data += struct.pack("<e32b", d, *(int(math.copysign(abs(x) + 0.5, x)) for x in products))
    return data


def q8_0_decode(data: bytes, n: int) -> Vector:
    """The n weights of Q8_0 blocks. ValueError as block_fields() has it."""
    return [d * q for d, *codes in block_fields(data, n, 32, "<e32b") for q in codes]


def q4_0_encode(row: Sequence[float]) -> bytes:
    """Weights (a multiple of 32) -> GGUF Q4_0 blocks of 18 bytes. ValueError as blocks_of() has it."""
    data = b""
    for block in blocks_of(row, 32):
        d = max(block, key=abs) / -8  # the extreme one gets code 0: its side of zero has 8 steps, the other 7
        inverse = fp32(1 / d) if abs(d) >= 2.0**-126 else 0.0
        codes = [min(15, int(fp32(value * inverse + 8.5))) for value in block]
        data += struct.pack("<e16B", d, *(low | high << 4 for low, high in zip(codes[:16], codes[16:])))
    return data


def q4_0_decode(data: bytes, n: int) -> Vector:
    """The n weights of Q4_0 blocks. ValueError as block_fields() has it."""
    return [d * (q - 8) for d, *pairs in block_fields(data, n, 32, "<e16B")
            for q in [pair & 15 for pair in pairs] + [pair >> 4 for pair in pairs]]


def q4_k_encode(row: Sequence[float]) -> bytes:
    """Weights (a multiple of 256) -> GGUF Q4_K super-blocks of 144 bytes, laid out as q4_k_decode() says.

    A sub-block's minimum is how far it reaches below 0, its step 1/15 of the way from there to its largest weight;
    the largest step is 63 · d and the largest minimum 63 · dmin. q: nearest to what then decodes, from 0 to 15.
    """
    data = b""
    for block in blocks_of(row, 256):
        parts = [block[i:i + 32] for i in range(0, 256, 32)]
        mins = [max(0.0, -min(part)) for part in parts]
        steps = [(max(part) + low) / 15 for part, low in zip(parts, mins)]
        d, dmin = fp16(max(steps) / 63), fp16(max(mins) / 63)
        sc, mn = ([min(63, round(value / unit)) if unit else 0 for value in values]
                  for values, unit in ((steps, d), (mins, dmin)))
        codes = [[min(15, max(0, round((value + dmin * m) / (d * s)))) if d * s else 0 for value in part]
                 for part, s, m in zip(parts, sc, mn)]
        data += struct.pack("<2e", d, dmin) + bytes(
            [value & 63 | above >> 4 << 6 for six in (sc, mn) for value, above in zip(six, six[4:])]
            + [s & 15 | (m & 15) << 4 for s, m in zip(sc[4:], mn[4:])]
            + [low | high << 4 for even, odd in zip(codes[::2], codes[1::2]) for low, high in zip(even, odd)])
    return data


def q4_k_decode(data: bytes, n: int) -> Vector:
    """The n weights of Q4_K super-blocks: d and dmin, 12 bytes of scales and minimums, 4 × 32 bytes of codes.

    Of those four, number j holds sub-block 2j in the low halves and sub-block 2j + 1 in the high halves.
    """
    out: Vector = []
    for d, dmin, *rest in block_fields(data, n, 256, "<2e140B"):
        for j, (scale, low) in enumerate(zip(*q4_k_scales(rest[:12]))):
            pairs = rest[12 + j // 2 * 32:][:32]
            out += [d * scale * (pair >> 4 if j % 2 else pair & 15) - dmin * low for pair in pairs]
    return out


def q4_k_scales(b: Sequence[int]) -> tuple[list[int], list[int]]:
    """The eight scales and the eight minimums in a super-block's 12 bytes.

    The first four of each are whole, in the low 6 bits of bytes 0-3 and 4-7. Of the last four, bytes 8-11 hold
    the low 4 bits (scale's in the low half, minimum's in the high), and the 2 bits left above those six the rest.
    """
    return ([b[j] & 63 for j in range(4)] + [b[8 + j] & 15 | b[j] >> 6 << 4 for j in range(4)],
            [b[4 + j] & 63 for j in range(4)] + [b[8 + j] >> 4 | b[4 + j] >> 6 << 4 for j in range(4)])


GGUF = {"Q8_0": (q8_0_encode, q8_0_decode, 32), "Q4_0": (q4_0_encode, q4_0_decode, 32),
        "Q4_K": (q4_k_encode, q4_k_decode, 256)}


def show_gguf(trace: Trace, knobs: Namespace) -> None:
    """A Q4_0 block taken apart, the three formats' sizes and errors, and where Q4_K's 6-bit scales go."""
    rng = random.Random(knobs.seed)
    rows = [[fp32(rng.gauss(0, 0.1)) for _ in range(512)] for _ in range(8)]
    row, block = rows[0][:32], q4_0_encode(rows[0][:32])
    extreme, back = max(range(32), key=lambda i: abs(row[i])), q4_0_decode(block, 32)
    trace.ask("a Q4_0 block is an FP16 scale and 32 codes of 4 bits. How many bytes?", len(block))
    trace.say("One Q4_0 block of 32 weights, byte for byte as a GGUF file has it: the FP16 scale, lowest byte "
              "first, then 16 bytes of two codes each.")
    trace.lines(["  " + block[:2].hex(" ") + " │ " + block[2:].hex(" ")])
    trace.table(["weight", "value", "in byte", "code", "(code - 8) · d"],
                [[str(i), f"{row[i]:+.4f}", f"{2 + i % 16}, {('low', 'high')[i // 16]} half",
                  str(block[2 + i % 16] >> i // 16 * 4 & 15), f"{back[i]:+.4f}"]
                 for i in sorted({0, 1, 16, 17, extreme})])
    trace.note(f"d = {struct.unpack('<e', block[:2])[0]:.6f}: weight {extreme}, the one furthest out, over -8. So "
               f"its side of zero has 8 steps, down to code 0; the other has 7, up to code 15.")

    lean, labs = [[value + 0.15 for value in row] for row in rows], (without_outliers(knobs), laboratory(knobs))
    trace.say("The three formats: error on 4,096 weights around zero, and on the same weights moved to one side, where "
              "Q4_K's minimums pay off; and the model's KL from FP32, without outliers and with them planted.")
    table = []
    for form, (encode, decode, size) in GGUF.items():
        n = len(encode(rows[0][:size]))
        errors = [relative_distance([decode(encode(row), 512) for row in w], w) for w in (rows, lean)]
        table.append([form, f"{n} bytes", str(size), f"{8 * n / size:.2f}", *(f"{e:.2%}" for e in errors),
                      *(f"{measure(lab, in_gguf(lab, form)).kl:.4f}" for lab in labs)])
    trace.table(["", "block", "of weights", "bits/weight", "error", "moved aside", "KL", "planted"], table,
                left=(0,))
    trace.note("The columns that read a planted outlier hold small weights. A grid with an exact zero is off by no more "
               "than they are; Q4_K's, whose minimum is free, by up to half a step, which the large input multiplies.")
    data = q4_k_encode(rows[0][:256])
    d, dmin = struct.unpack("<2e", data[:4])
    trace.say(f"A Q4_K super-block's first 16 bytes: d = {d:.6f}, dmin = {dmin:.6f}, and eight scales and eight "
              f"minimums in 12 bytes, the last four of each in two pieces:")
    trace.lines([f"  {data[:2].hex(' ')} │ {data[2:4].hex(' ')} │ {data[4:16].hex(' ')}"])
    scales, mins = q4_k_scales(data[4:16])
    trace.table(["sub-block", *map(str, range(8))],
                [["scale", *map(str, scales)], ["min", *map(str, mins)]], left=(0,))
    # 1, 2, …, 32: d = 32/127, so weight i is code round(127·i/32).
    fixture = struct.pack("<e", 32 / 127) + bytes(math.floor(127 * i / 32 + 0.5) for i in range(1, 33))
    trace.check("Q8_0 of 1, 2, …, 32 = the block worked out by hand",
                q8_0_encode(range(1, 33)) == fixture, "34 bytes equal")
    # -8, …, 7, twice: d = 1, codes 0 to 15, weights j and j + 16 the same, so bytes 00, 11, …, ff.
    trace.check("Q4_0 of -8, …, 7, twice = the block worked out by hand",
                q4_0_encode([*range(-8, 8)] * 2) == b"\x00\x3c" + bytes(range(0, 256, 17)), "18 bytes equal")
    grid = [float((63 - j) * q - (56 + j)) for j in range(8) for q in [*range(16)] * 2]  # 6-bit scales and minimums
    trace.check("Q4_K gives back weights that lie on its grid", q4_k_decode(q4_k_encode(grid), 256) == grid, "256 equal")


# ---------------------------------------------------------------------------------------------------
# 6. Activations too
#
# With weights alone in INT8, every product is still done in floating point. If the activations are INT8 as well
# (W8A8), integer units do it: y = (codes of x)·(codes of w) · scale_x · scale_w, the sum exact. The scale of x is
# static, chosen once from calibration data (its absmax; a percentile, which clips the rare extremes; or whatever
# gives the least error), or dynamic: each token's own absmax.
#
# A channel that is always 30 times the others hurts all of these, the static ones most; at 128 times it ruins the
# model: on a grid laid for it, the others round to almost nothing. Two ways out. LLM.int8() multiplies the columns
# of x that reach 6.0 in floating point, the rest in INT8 with a scale for each row of x and of W (vector-wise).
# SmoothQuant moves some of the difficulty into the weights, which are easier to round; with α = 1/2 both get the
# same maxima:
#
#     s_j = max|x_j|^α / max|w_j|^(1-α)          y = (x / s) · (w · s)          x / s: folded into the norm's gain

def int8_matmul(x: Matrix, q: Quantized, x_scale: float | None = None) -> Matrix:
    """W x in integers; x [n][in] is rounded by x_scale, or a row's absmax / 127 (or 1); q: W [out][in] by row."""
    y = []
    for row in x:
        scale = x_scale or max(map(abs, row)) / 127 or 1.0
        codes = to_codes(row, scale, 0, 8)
        y.append([dot(codes, unit) * scale * unit_scale for unit, (unit_scale,) in zip(q.codes, q.scales)])
    return y


def static_scale(x: Matrix, method: str) -> float:
    """A scale for INT8 activations like x [n][in]; 1 where it would be 0. ValueError for any other method than:

    "absmax": nothing is clipped, to ±127. "percentile": the least with which 99.9% of the magnitudes are not.
    "error": of 80%, 82%, … 100% of the first, the one of least squared error, the smallest of equally good ones.
    """
    sizes = sorted(map(abs, flatten(x)))
    largest = {"absmax": [sizes[-1]], "percentile": [sizes[math.ceil(0.999 * len(sizes)) - 1]],
               "error": [sizes[-1] * percent / 100 for percent in range(80, 101, 2)]}
    if method not in largest:
        raise ValueError(f"method must be 'absmax', 'percentile' or 'error', not {method!r}")
    return min((size / 127 or 1.0 for size in largest[method]),
               key=lambda scale: sum((size - min(round(size / scale), 127) * scale) ** 2 for size in sizes))


def llm_int8_matmul(x: Matrix, w: Matrix, *, threshold: float = 6.0) -> Matrix:
    """y = W x, the columns of x with a magnitude >= threshold in floating point, the others in INT8.

    x [n][in], w [out][in] -> [n][out]. Threshold 0 leaves no INT8, infinity no floating point. ValueError if it
    is negative or NaN. Dettmers et al. 2022, section 3.2.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be 0 or more, not {threshold}")
    exact = [c for c, column in enumerate(zip(*x)) if max(map(abs, column)) >= threshold]
    rest = [c for c in range(len(w[0])) if c not in exact]
    x_exact, w_exact, x_rest, w_rest = ([[row[c] for c in columns] for row in m]
                                        for columns in (exact, rest) for m in (x, w))
    y = linear(x_exact, w_exact)  # zeros if there are none
    return add(y, int8_matmul(x_rest, quantize(w_rest, 8, granularity="channel"))) if rest else y


def smoothquant_scales(x_absmax: Vector, w_absmax: Vector, alpha: float = 0.5) -> Vector:
    """s_j = max|x_j|^α / max|w_j|^(1-α) per input channel; 1 where either is 0. Xiao et al. 2023, equation 4."""
    if not 0 <= alpha <= 1 or len(x_absmax) != len(w_absmax):
        raise ValueError(f"alpha must be from 0 to 1, and x_absmax as long as w_absmax; got {alpha}, "
                         f"{len(x_absmax)} and {len(w_absmax)}")
    return [a ** alpha / b ** (1 - alpha) if a and b else 1.0 for a, b in zip(x_absmax, w_absmax)]


def move_scales(weights: dict, source: str, readers: Sequence[str], scales: Vector) -> dict:
    """The same function: source's channels (a gain, or rows) divided by scales, readers' columns multiplied."""
    divided = [[value / s for value in made] if isinstance(made, list) else made / s
               for made, s in zip(weights[source], scales)]
    return weights | {source: divided} | {
        name: [[value * s for value, s in zip(row, scales)] for row in weights[name]] for name in readers}


def smoothquant(weights: dict, config: Config, inputs: dict[str, Matrix], alpha: float) -> dict:
    """New weights, the same function, with the activations after every norm smoothed by calibration inputs."""
    for source, readers in norms_and_readers(config).items():
        seen = inputs[readers[0]], flatten(weights[name] for name in readers)
        absmax = ([max(map(abs, column)) for column in zip(*m)] for m in seen)
        weights = move_scales(weights, source, readers, smoothquant_scales(*absmax, alpha))
    return weights


def with_columns(w: Matrix, q: Quantized, columns: Sequence[int]) -> tuple[Matrix, bytes]:
    """(q decoded, but those columns of w in FP16; q's bytes, the columns', and their numbers in 2 bytes each)."""
    exact = {c: fp16_row([row[c] for row in w]) for c in columns}
    decoded = [[exact[c][r] if c in exact else value for c, value in enumerate(row)]
               for r, row in enumerate(q.dequantize())]
    return decoded, q.to_bytes() + struct.pack(f"<{len(w) * len(exact)}e{len(exact)}H", *flatten(exact.values()), *exact)


@lru_cache(maxsize=None)
def in_int8(lab: Lab, method: str, alpha: float = ALPHA) -> Compressed:
    """The whole model in W8A8, by a method of static_scale(), "dynamic", "SmoothQuant" or "LLM.int8()".

    The last one's file has, beside the codes, the columns that reach 6.0 in calibration, in FP16. (bitsandbytes takes
    them from the codes: fewer bytes, and exact only in x.)
    """
    weights, codes = lab.model.weights, {}
    if method == "SmoothQuant":
        weights = smoothquant(weights, lab.model.config, lab.inputs, alpha)

    def to_int8(name: str, w: Matrix) -> Quantized | tuple[Matrix, bytes]:
        codes[name] = q = quantize(w, 8, granularity="channel")
        large = [c for c, column in enumerate(zip(*lab.inputs[name])) if max(map(abs, column)) >= 6]
        return with_columns(w, q, large) if method == "LLM.int8()" else q

    c = compress(lab, "W8A8 static" if method == "absmax" else method, to_int8, weights)
    scales = {name: static_scale(lab.inputs[name], method) for name in lab.linears
              if method in ("absmax", "percentile", "error")}
    names = {id(c.weights[name]): name for name in lab.linears}

    def run(operation: Callable, *inputs):
        if operation is not linear or method == "LLM.int8()":
            return (llm_int8_matmul if operation is linear else operation)(*inputs)
        x, name = inputs[0], names[id(inputs[1])]
        return int8_matmul(x, codes[name], scales.get(name))

    return replace(c, run=run)


def show_activations(trace: Trace, knobs: Namespace) -> None:
    """The activations' sizes, W8A8's ways to set a scale, and the two rescues."""
    lab, calm, name = laboratory(knobs), without_outliers(knobs), "layers.0.attention.wq"
    smooth = Llama(lab.model.config, smoothquant(lab.model.weights, lab.model.config, lab.inputs, knobs.alpha))
    before, after = ([max(map(abs, column)) for column in zip(*inputs[name])]
                     for inputs in (lab.inputs, capture(smooth, lab.calibration)[0]))
    trace.say(f"The largest magnitude on the calibration tokens of each channel that goes into {name}, "
              f"{len(before)} from left to right: as the model has it, and after SmoothQuant with exponent "
              f"{knobs.alpha:g}.")
    trace.lines([f"{mark:>7} {line}" for sizes in (before, after)
                 for mark, line in zip([f"{max(sizes):.1f}"] + [""] * 6, columns_picture(sizes, 6) + [""])][:-1])
    kept = sum(size >= 6 for size in before)
    trace.ask(f"how many of these {len(before)} columns will LLM.int8() keep in floating point?", kept)
    channels, size = knobs.outliers
    trace.say(f"LLM.int8() keeps {kept} of these {len(before)} columns in floating point. The model with weights "
              f"and activations in INT8: perplexity (FP32's is {lab.perplexity:.3f}) and KL as the outliers grow. "
              f"One scale for a matrix or a token serves its largest channels at the cost of all others.")
    sizes = {f"{grown:g} times": (channels, grown) for grown in (size, 4 * size) if lab is not calm}
    labs = [calm, *(build_lab(knobs.seed, knobs.calibration_tokens, planted) for planted in sizes.values())]
    methods = {"absmax": "static, absmax", "percentile": "static, 99.9th percentile",
               "error": "static, least error", "dynamic": "dynamic, per token", "LLM.int8()": "LLM.int8()",
               "SmoothQuant": "SmoothQuant, dynamic"}
    found = {method: [measure(other, in_int8(other, method, knobs.alpha)) for other in labs] for method in methods}
    rows = [[methods[method], *(f"{m.perplexity:.3f}  {m.kl:.4f}" for m in ms)] for method, ms in found.items()]
    trace.table(["scales of x", "no outliers", *sizes], rows, left=(0,))
    if (knobs.outliers, knobs.alpha, knobs.calibration_tokens) == (OUTLIERS, ALPHA, CALIBRATION_TOKENS):
        plain, *rescued = ([m.kl for m in found[method][1:]] for method in ("absmax", "LLM.int8()", "SmoothQuant"))
        trace.check("plain W8A8 fails where both rescues hold",
                    all(kl > 50 * max(others) for kl, *others in zip(plain, *rescued)),
                    f"KL over 50 times as large, for outliers of {size:g} and of {4 * size:g}")
    x, w = lab.inputs[name][:8], lab.model.weights[name]
    steps = [max(map(abs, row)) / 127 for row in x]
    rounded = [[round(value / step) * step for value in row] for row, step in zip(x, steps)]
    trace.check_close("LLM.int8() with threshold infinity = the product of the rounded x and W",
                      llm_int8_matmul(x, w, threshold=math.inf),
                      linear(rounded, quantize(w, 8, granularity="channel").dequantize()), 1e-9)
    trace.check_close("SmoothQuant left the FP32 logits where they were", smooth.forward(lab.evaluation[:-1]),
                      lab.logits, 1e-9)


# ---------------------------------------------------------------------------------------------------
# 7. GPTQ
#
# Rounding each weight to the nearest is best for the weights, not for what the layer puts out. GPTQ minimises
# |W x - Q x|² over calibration inputs: a quadratic with the Hessian H = 2 X Xᵀ, the same for every row of W.
# Column by column from the left, the rounding error is pushed into the columns that are not quantized yet, as far
# as their inputs are correlated, where it does the least harm (Optimal Brain Surgeon):
#
#     error_j = (w_j - quant(w_j)) / U[j][j]          w_k -= error_j · U[j][k]  for every k > j
#
# U is the upper Cholesky factor of H⁻¹, Uᵀ U = H⁻¹. Its row j is, up to a factor, the first row of the inverse of H
# restricted to columns j, j + 1, …: all that OBS needs at step j, for every step from one factorization. Damping
# (1% of H's mean diagonal) keeps H invertible.
# act-order takes the columns with the largest diagonal first, while there is still somewhere to put their errors.
# Production takes a block's inputs from the quantized blocks before it; ours takes all from the FP32 model.

def hessian_of(x: Matrix) -> Matrix:
    """H = 2 X Xᵀ of inputs x [n][in] -> [in][in]; the factor cancels out of GPTQ."""
    columns = list(zip(*x))
    return [[2 * dot(a, b) for b in columns] for a in columns]


def gptq(w: Matrix, hessian: Matrix, bits: int, *, granularity: str | int, act_order: bool = False,
         damp: float = 0.01) -> Quantized:
    """w [out][in] on symmetric grids as quantize() has them, but the codes by Frantar et al. 2023, algorithm 1.

    A group's grid is laid when its first column comes up, on the weights as they then are; under act_order, whose
    groups come in pieces, on the weights given (static groups, in the authors' code, where act-order is from). To
    hessian's [in][in] diagonal, damp times its mean is added, or 1 if that is 0. ValueError if damp is not above 0
    and finite, if hessian is not [in][in], finite, and then positive definite, or as for quantize().
    """
    group, n = group_columns(w, bits, granularity), len(w[0])
    if len(hessian) != n or any(len(row) != n or not all(map(math.isfinite, row)) for row in hessian):
        raise ValueError(f"hessian must hold {n} × {n} finite numbers, a row and a column for each column of w")
    if not 0 < damp < math.inf:
        raise ValueError(f"damp must be positive, not {damp}")
    order = sorted(range(n), key=lambda j: -hessian[j][j]) if act_order else range(n)
    ridge = damp * fmean(hessian[j][j] for j in range(n)) or 1.0
    u = upper_factor([[hessian[i][j] + ridge * (i == j) for j in order] for i in order])
    make, (low, high) = partial(make_grid, bits=bits, symmetric=True), code_range(bits)
    grids = lay_grids(w, group, granularity, make) if act_order else [[] for _ in w]
    columns = [[row[j] for row in w] for j in order]  # those to the right change as we go
    codes: list = [None] * n
    for i, j in enumerate(order):
        if j % group == 0 and not act_order:
            now = list(zip(*columns[i:i + group]))
            grids = [row + laid for row, laid in zip(grids, lay_grids(now, group, granularity, make))]
        scales = [row[j // group][0] for row in grids]
        codes[j] = [min(max(round(value / scale), low), high) for value, scale in zip(columns[i], scales)]
        errors = [(value - code * scale) / u[i][i] for value, code, scale in zip(columns[i], codes[j], scales)]
        for k in range(i + 1, n):
            columns[k] = [value - error * u[i][k] for value, error in zip(columns[k], errors)]
    return with_grids(list(map(list, zip(*codes))), grids, bits, group, granularity)


def upper_factor(h: Matrix) -> Matrix:
    """U, upper triangular, with Uᵀ U = h⁻¹, for a symmetric h [n][n]; ValueError if that is not positive definite.

    From the last row up: with b = h[j][j+1:], V the part of U below and right of U[j][j], and t = V b, row j is
    (1, -Vᵀ t) / √(h[j][j] - t·t) from the diagonal on.
    """
    u: Matrix = []
    for j in reversed(range(len(h))):
        t = [dot(row, h[j][j + 1:]) for row in u]
        rest = h[j][j] - dot(t, t)
        if rest <= 0:
            raise ValueError("h must be positive definite; more damping would make it so")
        top = [1.0, *(-dot(column, t) for column in zip(*u))]
        u = [[value / math.sqrt(rest) for value in top], *([0.0] + row for row in u)]
    return u


@lru_cache(maxsize=None)
def by_gptq(lab: Lab, bits: int, granularity: str | int, act_order: bool = False) -> Compressed:
    """The whole model by GPTQ."""
    return compress(lab, "GPTQ" + ", act-order" * act_order, lambda name, w: gptq(
        w, hessian_of(lab.inputs[name]), bits, granularity=granularity, act_order=act_order))


def show_gptq(trace: Trace, knobs: Namespace) -> None:
    """Every matrix's output error, and the model's loss."""
    lab, bits, g = laboratory(knobs), knobs.bits, knobs.group_size
    methods = {"to nearest": rounded_to_nearest(lab, bits, g), "GPTQ": by_gptq(lab, bits, g),
               "act-order": by_gptq(lab, bits, g, act_order=True)}
    trace.ask(f"the KL of the model rounded to nearest at INT{bits} in groups of {g} is "
              f"{measure(lab, methods['to nearest']).kl:.4f}. And by GPTQ?", measure(lab, methods["GPTQ"]).kl)
    trace.say(f"Layer by layer: how far each matrix's output moves on text that the calibration never saw, "
              f"|Wx - Qx| / |Wx|, at INT{bits} in groups of {g}.")
    rows = []
    for name in lab.linears:
        exact = linear(lab.unseen[name], lab.model.weights[name])
        errors = [relative_distance(linear(lab.unseen[name], c.weights[name]), exact) for c in methods.values()]
        rows.append([name, *(f"{e:.1%}" for e in errors)])
    trace.table(["matrix", *methods], rows, left=(0,))
    trace.say("And the model, by the loss that no layer saw:")
    score_table(trace, lab, methods, "method")

    name, n = "layers.0.feed_forward.w2", HIDDEN_DIM
    w, identity = lab.model.weights[name], [[float(i == j) for j in range(n)] for i in range(n)]
    h = add(hessian_of(lab.inputs[name]), identity)
    u = upper_factor(h)
    trace.check_close("U H Uᵀ = 1, so Uᵀ U is the inverse of H", linear(linear(u, h), u), identity, 1e-9)
    trace.check("with uncorrelated inputs GPTQ = round to nearest",
                gptq(w, identity, bits, granularity=g) == quantize(w, bits, granularity=g), "equal, scales too")


# ---------------------------------------------------------------------------------------------------
# 8. AWQ
#
# Not all weights matter alike: those that multiply large activations do most. Kept in FP16, 1% of the channels,
# chosen by their activations, would save most of the loss; but a matrix of mixed formats is slow. AWQ protects
# them within the format: multiply a salient channel of W by s > 1 before rounding and divide its input by s. The
# grid hardly changes, and the channel's error shrinks by s. How strongly, is searched, for least output error:
#
#     s = mean|x|^α, scaled to √(max s · min s) = 1       α from 0 (nothing) in 20 steps       |Wx - Q(W·s)(x/s)|²
#
# x / s costs nothing: it is folded into the operation before, a norm's gain or the rows of another matrix (w3
# makes the channels that w2 reads). Matrices that read the same input share s. For wo there is no such place when
# query heads share KV heads: it stays as it is, as in the authors' code. (They compare what the whole attention or
# MLP puts out, and clip weights as well.)

def awq_search(w: Matrix, x: Matrix, bits: int, *, granularity: str | int,
               grid: int = 20) -> tuple[Vector, float, Quantized]:
    """(scales [in], α, Q(w · scales)) of the least output error on inputs x [n][in].

    w [out][in]; α = 0, 1/grid, … (grid - 1)/grid, the first of equally good ones. ValueError if grid < 1, if x is
    empty or has rows of another length than w's, or as for quantize(). Lin et al. 2024, equation 5.
    """
    if grid < 1 or not x or len(x[0]) != len(w[0]):
        raise ValueError(f"grid must be at least 1, and x have rows of {len(w[0])}; got {grid} and {len(x)} rows")
    tried = try_exponents(w, x, [step / grid for step in range(grid)], bits, granularity)
    _, alpha, scales, q = min(tried, key=lambda one: one[0])
    return scales, alpha, q


def try_exponents(w: Matrix, x: Matrix, alphas: Sequence[float], bits: int, granularity: str | int) -> list[tuple]:
    """For each α (relative output error, α, scales, Q(w · scales)); a mean |x| below 1e-4 counts as 1e-4."""
    exact, sizes, tried = linear(x, w), [max(fmean(map(abs, column)), 1e-4) for column in zip(*x)], []
    for alpha in alphas:
        middle = math.sqrt(max(sizes) ** alpha * min(sizes) ** alpha)
        scales = [size ** alpha / middle for size in sizes]
        q = quantize([[value * s for value, s in zip(row, scales)] for row in w], bits, granularity=granularity)
        y = linear([[value / s for value, s in zip(row, scales)] for row in x], q.dequantize())
        tried.append((relative_distance(y, exact), alpha, scales, q))
    return tried


def readers_of(lab: Lab, readers: Sequence[str]) -> tuple[Matrix, Matrix]:
    """(the matrices that read one input, stacked; that input on the calibration tokens)."""
    return flatten(lab.model.weights[name] for name in readers), lab.inputs[readers[0]]


@lru_cache(maxsize=None)
def awq_scales(lab: Lab, bits: int, granularity: str | int) -> dict[str, tuple[Vector, float]]:
    """{source: (scales, α)} for every norm, and for every w3, whose channels w2 reads."""
    return {source: awq_search(*readers_of(lab, readers), bits, granularity=granularity)[:2]
            for source, readers in sources_and_readers(lab.model.config).items()}


def awq_fold(lab: Lab, found: dict[str, tuple[Vector, float]]) -> dict:
    """lab's weights with those scales moved into them: the same function."""
    weights = lab.model.weights
    for source, readers in sources_and_readers(lab.model.config).items():
        weights = move_scales(weights, source, readers, found[source][0])
    return weights


@lru_cache(maxsize=None)
def by_awq(lab: Lab, bits: int, granularity: str | int) -> Compressed:
    """The whole model by AWQ."""
    folded = awq_fold(lab, awq_scales(lab, bits, granularity))
    return compress(lab, "AWQ", lambda _, w: quantize(w, bits, granularity=granularity), folded)


def keeping_channels(lab: Lab, bits: int, granularity: str | int, count: int, by: str) -> Compressed:
    """Rounded to nearest, but `count` channels of every matrix in FP16, by "activations" or by "chance"."""
    rng = random.Random(0)

    def method(name: str, w: Matrix) -> tuple[Matrix, bytes]:
        columns = zip(*lab.inputs[name])
        sizes = [fmean(map(abs, column)) if by == "activations" else rng.random() for column in columns]
        largest = sorted(range(len(sizes)), key=lambda c: -sizes[c])[:count]
        return with_columns(w, quantize(w, bits, granularity=granularity), largest)

    return compress(lab, f"{count} channels in FP16", method)


def show_awq(trace: Trace, knobs: Namespace) -> None:
    """Which channels to protect, the search over α, and the model."""
    lab, bits, g = laboratory(knobs), knobs.bits, knobs.group_size
    found, (source, readers) = awq_scales(lab, bits, g), next(iter(sources_and_readers(lab.model.config).items()))
    trace.ask(f"which of the exponents 0, 0.05, …, 0.95 does the search find for {source}?", found[source][1])
    count = max(1, knobs.outliers[0])
    trace.say(f"INT{bits} in groups of {g}, with {count} of each matrix's channels kept in FP16: whether that helps "
              f"depends on how they are chosen. And AWQ, which keeps none.")
    kept = {f"{count}, by {how}": keeping_channels(lab, bits, g, count, how) for how in ("chance", "activations")}
    plain, awq = {"none": rounded_to_nearest(lab, bits, g)}, {"none, but AWQ's scales": by_awq(lab, bits, g)}
    score_table(trace, lab, plain | kept | awq, "channels in FP16")
    trace.say(f"The search behind {source}: output error of {', '.join(name.split('.')[-1] for name in readers)} "
              f"on calibration tokens for some of the exponents; 0 is round to nearest. AWQ takes the least.")
    w, x = readers_of(lab, readers)
    tried = try_exponents(w, x, (0, 0.2, 0.4, 0.6, 0.8, 0.95), bits, g)
    worst = max(error for error, *_ in tried)
    trace.table(["exponent", "error", ""], [[f"{alpha:.2f}", f"{error:.2%}", bar(error, worst, 44)]
                                            for error, alpha, *_ in tried], left=(2,))
    trace.note("found: " + ", ".join(f"{name} {alpha:.2f}" for name, (_, alpha) in sorted(found.items())))
    trace.check_close("AWQ's scales, folded in, left the FP32 logits where they were", Llama(
        lab.model.config, awq_fold(lab, found)).forward(lab.evaluation[:-1]), lab.logits, 1e-9)
    trace.check("exponent 0 = round to nearest", tried[0][3] == quantize(w, bits, granularity=g), "equal")


# ---------------------------------------------------------------------------------------------------
# 9. HQQ and SqueezeLLM
#
# HQQ needs no data. It keeps the scales of round-to-nearest and looks for the zero point z that minimises
# |W - Q(W)| to the power p < 1, which forgives the few outliers and cares for the many. Half-quadratic splitting
# gives each weight an error e of its own, W - Q(W) shrunk towards 0, and fits z to W - e by a mean, turn by turn:
#
#     e = shrink(W - Q(W), β)                      shrink(r, β) = sign(r) · max(|r| - |r|^(p-1) / β, 0)
#     z = mean(code - (W - e) / scale)             β grows a little every turn
#
# (With the authors' β = 10, errors below 0.17 have e = 0: in 4 bits nearly all of ours, and z is a plain mean. They
# stop for the whole matrix at once, and take the last z.)
#
# SqueezeLLM lets the grid be any 2^bits values, found by k-means in which each weight counts by how much the loss
# minds it (the squared gradient, the diagonal of the Fisher information); and takes 0.45% of the weights out into
# a sparse matrix in FP16: 0.05% that matter most, 0.4% that are largest. (The authors: a codebook for every row,
# of thousands of weights; ours have 64, so it is one for the matrix.)

def hqq(w: Matrix, bits: int, *, granularity: str | int, p: float = 0.7, beta: float = 10.0) -> Quantized:
    """w [out][in] on the asymmetric grids of quantize(), with zero points in FP16. ValueError as for quantize().

    Of up to 20 z's, the one with the least mean |error| stays. Each is rounded to FP16 and codes the values; the
    search ends where the error is not less than before. Else come e, the next z, and β times 1.01.
    """
    def best_zero(values: Vector) -> tuple[float, float]:
        (scale, zero), least = make_grid(values, bits=bits, symmetric=False), math.inf
        for turn in range(20):
            zero = fp16(float(zero))
            codes = to_codes(values, scale, zero, bits)
            rest = [value - (code - zero) * scale for value, code in zip(values, codes)]
            error, b = fmean(map(abs, rest)), beta * 1.01 ** turn
            if error >= least:
                break
            least, best = error, zero
            shrunk = [math.copysign(max(abs(r) - abs(r) ** (p - 1) / b, 0.0), r) if r else 0.0 for r in rest]
            zero = fmean(code - (value - e) / scale for code, value, e in zip(codes, values, shrunk))
        return scale, best

    group = group_columns(w, bits, granularity)
    return on_grids(w, lay_grids(w, group, granularity, best_zero), bits, group, granularity, symmetric=False)


def weighted_kmeans(values: Vector, weights: Vector, k: int, turns: int = 12) -> Vector:
    """k values, ascending, for the least Σ weight · (value - its nearest)²: Lloyd's algorithm in one dimension.

    It starts from the middles of k equal shares of the sorted values. A value that none is nearest to
    stays; of no values at all, they are 0.
    """
    order = sorted(values) or [0.0]
    centroids = [order[(2 * i + 1) * len(order) // (2 * k)] for i in range(k)]
    for _ in range(turns):
        mass, total = [0.0] * k, [0.0] * k
        for i, value, weight in zip(nearest(values, centroids), values, weights):
            mass[i], total[i] = mass[i] + weight, total[i] + weight * value
        centroids = [t / m if m else c for t, m, c in zip(total, mass, centroids)]
    return centroids


def squeezellm(w: Matrix, sensitivity: Matrix, bits: int) -> tuple[Matrix, bytes]:
    """(what w [out][in] decodes to, its bytes): codes, their 2^bits values in FP16, and a few weights apart.

    Apart are the 0.05% of the highest sensitivity [out][in] and the 0.4% largest, each rounded up. k-means does
    not see them, but they have a code all the same. They are stored by rows (CSR), in 2 bytes each: the values in
    FP16, the columns, and for every row and the end how many come before.
    """
    values, weights, columns = flatten(w), flatten(sensitivity), len(w[0])
    places, n = range(len(values)), len(values)
    apart = sorted({*sorted(places, key=lambda i: -weights[i])[:math.ceil(0.0005 * n)],
                    *sorted(places, key=lambda i: -abs(values[i]))[:math.ceil(0.004 * n)]})
    exact, dense = {i: fp16(values[i]) for i in apart}, sorted({*places} - {*apart})
    codebook = fp16_row(weighted_kmeans([values[i] for i in dense], [weights[i] for i in dense], 2 ** bits))
    codes, before = nearest(values, codebook), [bisect_left(apart, r * columns) for r in range(len(w) + 1)]
    data = pack_bits(codes, bits) + struct.pack(
        f"<{len(codebook) + len(apart)}e{len(apart) + len(before)}H", *codebook, *exact.values(),
        *(i % columns for i in apart), *before)
    decoded = [exact.get(i, codebook[code]) for i, code in enumerate(codes)]
    return [decoded[i:i + columns] for i in range(0, n, columns)], data


@lru_cache(maxsize=None)
def sensitivities(lab: Lab) -> dict[str, Matrix]:
    """{matrix: Σ of its weights' squared gradients} over the calibration text, 16 tokens to predict at a time."""
    total: dict[str, Matrix] = {}
    for start in range(0, max(1, len(lab.calibration) - 1), 16):
        tape, piece = Tape(), lab.calibration[start:start + 17]
        logits = lab.model.forward(piece[:-1] or piece, run=tape)
        gradients = tape.backward(logits, cross_entropy(logits, piece[1:] or piece)[1])
        for name in lab.linears:
            squares = [[slope * slope for slope in row] for row in gradients[id(lab.model.weights[name])]]
            total[name] = add(total[name], squares) if name in total else squares
    return total


@lru_cache(maxsize=None)
def by_hqq(lab: Lab, bits: int, granularity: str | int) -> Compressed:
    """The whole model by HQQ."""
    return compress(lab, "HQQ", lambda _, w: hqq(w, bits, granularity=granularity))


@lru_cache(maxsize=None)
def by_squeezellm(lab: Lab, bits: int) -> Compressed:
    """The whole model by SqueezeLLM."""
    return compress(lab, "SqueezeLLM", lambda name, w: squeezellm(w, sensitivities(lab)[name], bits))


def show_hqq_squeezellm(trace: Trace, knobs: Namespace) -> None:
    """Both beside round to nearest, and where k-means puts its values."""
    lab, calm, bits, g = laboratory(knobs), without_outliers(knobs), knobs.bits, knobs.group_size
    models, plain = ([rounded_to_nearest(one, bits, g, False), by_hqq(one, bits, g), by_squeezellm(one, bits)]
                     for one in (lab, calm))
    trace.ask(f"at {bits} bits, which has the least KL: {', '.join(c.name for c in models)}?",
              min(models, key=lambda c: measure(lab, c).kl).name)
    trace.say(f"At {bits} bits. HQQ moves zero points; SqueezeLLM moves all values, and keeps a few weights out.")
    trace.table(["method", "bits/weight", "perplexity", "KL", "changed", "KL without outliers"],
                [[c.name, *lab.scores(c), f"{measure(calm, p).kl:.4f}"] for c, p in zip(models, plain)], left=(0,))
    trace.note("HQQ's zero points need not be whole, so that 0 is not exact: where outliers are planted, that has the "
               "price that Q4_K's minimums have in section 5. (SqueezeLLM has one codebook for a matrix, the others a "
               "scale for every group.)")
    few, name = 2 ** min(bits, 4), "layers.0.attention.wo"
    values, weights = flatten(calm.model.weights[name]), flatten(sensitivities(calm)[name])
    even = [max(map(abs, values)) * (2 * i / (few - 1) - 1) for i in range(few)]
    trace.say(f"Where {few} values go in {name}: evenly; and by k-means, every weight counted by its sensitivity.")
    trace.lines(histogram(values, {"even": even, "k-means": weighted_kmeans(values, weights, few)}))
    errors = [fmean(map(abs, map(operator.sub, flatten(c.weights[name]), values))) for c in plain]
    trace.check("HQQ: mean |error| no larger than where it started", errors[1] <= errors[0] * (1 + 1e-12),
                f"{errors[1] / errors[0]:.1%} of it")


# ---------------------------------------------------------------------------------------------------
# 10. One bit and a bit
#
# BitNet's weights are signs, with one scale for the matrix; those of b1.58 are -1, 0 or 1, log2(3) = 1.58 bits:
#
#     BitNet   w ≈ mean|W| · sign(w - mean W)          b1.58   w ≈ γ · clip(round(w / γ), -1, 1)      γ = mean|W|
#
# A product with such a matrix adds what meets a 1, takes off what meets a -1, and multiplies each sum once, by the
# scale. Done to a trained model this is ruin. So train with it: forwards with the ternary weights, backwards as if
# rounding were not there (straight through), and the full-precision weights behind them take the steps. In the
# papers that goes for the whole training, with activations in 8 bits; here for a short run from trained weights.

def bitnet_signs(w: Matrix) -> Matrix:
    """w as BitNet has it: mean|W| where it is above the mean, -mean|W| elsewhere (Wang et al. 2023)."""
    mean, scale = fmean(flatten(w)), fmean(map(abs, flatten(w)))
    return [[scale if v > mean else -scale for v in row] for row in w]


def ternary_codes(w: Matrix) -> tuple[list[list[int]], float]:
    """(codes -1, 0, 1, γ) of b1.58 (Ma et al. 2024, equations 1 to 3); γ is 1 where all of w is 0."""
    gamma = fmean(map(abs, flatten(w))) or 1.0
    return [[(v > gamma / 2) - (v < -gamma / 2) for v in row] for row in w], gamma  # halves are rounded to 0


def ternary_weights(w: Matrix) -> Matrix:
    """w as b1.58 has it: γ · codes."""
    codes, gamma = ternary_codes(w)
    return [[code * gamma for code in row] for row in codes]


def pack_ternary(codes: Sequence[int]) -> bytes:
    """Codes -1, 0, 1, five to a byte, as five digits to base 3, the lowest first: 1.6 bits each."""
    return bytes(sum((code + 1) * 3**i for i, code in enumerate(codes[j:j + 5])) for j in range(0, len(codes), 5))


def ternary_product(x: Vector, codes: list[list[int]], gamma: float) -> tuple[Vector, int, int]:
    """(y = γ · codes x; how many additions and subtractions of values it took; how many multiplications)."""
    y, additions = [], 0
    for row in codes:
        plus, minus = ([value for value, code in zip(x, row) if code == sign] for sign in (1, -1))
        y.append(gamma * (sum(plus) - sum(minus)))
        additions += len(plus) + len(minus)
    return y, additions, len(y)


def straight_through(tape: Tape) -> Callable:
    """Runs linear with ternary weights; their gradient goes to those behind them as it is (see BACKWARD below)."""
    return lambda operation, x, *rest: (tape(linear, x, tape(ternary_weights, *rest)) if operation is linear else
                                        tape(operation, x, *rest))


ONE_BIT = {"BitNet": "1 bit, BitNet", "b1.58": "b1.58, untrained", "b1.58 trained": "b1.58 trained"}


@lru_cache(maxsize=None)
def in_one_bit(lab: Lab, method: str) -> Compressed:
    """The whole model by a method of ONE_BIT, from the one without outliers; a matrix's scale is kept in FP16."""
    weights = map_rows(list, lab.calm.weights)
    if method == "b1.58 trained":
        short_run(Llama(lab.model.config, weights), weights, lab.text, TERNARY_STEPS, 0.02, straight_through)

    def rounded(_: str, w: Matrix) -> tuple[Matrix, bytes]:
        decoded = bitnet_signs(w) if method == "BitNet" else ternary_weights(w)
        data = (pack_bits([v > 0 for v in flatten(decoded)], 1) if method == "BitNet" else
                pack_ternary(flatten(ternary_codes(w)[0])))
        return list(map(fp16_row, decoded)), data + struct.pack("<e", max(map(abs, flatten(decoded))))

    return compress(lab, ONE_BIT[method], rounded, weights)


def show_one_bit(trace: Trace, knobs: Namespace) -> None:
    """What is left of the model, before and after training that way; and products without multiplications."""
    lab, name = laboratory(knobs), "layers.0.attention.wq"
    trace.say(f"All matrices in one bit, or one of three values, after training; and trained that way for "
              f"{TERNARY_STEPS} steps more (from the model without planted outliers; a scale for each matrix).")
    score_table(trace, lab, {c.name: c for c in (in_one_bit(lab, method) for method in ONE_BIT)})
    w, x = lab.calm.weights[name], lab.inputs[name][0]
    codes, gamma = ternary_codes(w)
    y, additions, multiplications = ternary_product(x, codes, gamma)
    n, zeros = len(flatten(codes)), flatten(codes).count(0)
    trace.ask(f"{name} has {n:,} weights, bell-shaped. With γ = mean|W|, how many become 0?", zeros)
    trace.say(f"{name} times one token, counted while it is done: {additions:,} additions and {multiplications} "
              f"multiplications, where the matrix in full has {n:,} of each. A corner of it:")
    trace.lines(["  " + "".join("-·+"[code + 1] for code in row) for row in codes[:6]])
    trace.check_close("the product without multiplications = the one with the decoded weights", [y],
                      linear([x], ternary_weights(w)), 1e-9)
    trace.check("additions counted = codes that are not 0", additions == n - zeros, f"{additions:,}")


# ---------------------------------------------------------------------------------------------------
# 11. Training in few bits
#
# Full training with Adam keeps two more numbers for every weight. QLoRA freezes the weights, in NF4, and trains a
# low-rank correction beside each matrix: y = W x + (α/r) B A x, A [r][in] random and B [out][r] zero at first.
# Only A and B have gradients and optimizer state.
#
# Q-GaLore trains the weights themselves, kept in INT8. The gradient G [m][n], turned so that m ≤ n, is projected
# by its top r left singular vectors P [m][r], kept in INT4; Adam works there, and its step goes back through P:
#
#     W = round_stochastically(W - rate · P · Adam(Pᵀ G))
#
# Rounding up or down by chance, in proportion, lets steps smaller than INT8's act on average. P is made again at
# intervals; where its first vector agrees with the old one's (|cosine| ≥ 0.4), the interval doubles. (The authors
# ask that of the mean of the last five cosines, signed, and keep Adam's state in 8 bits; ours has FP32.)

def frozen_linear(x: Matrix, w: Matrix) -> Matrix:
    """linear(), but the weights get no gradient (see BACKWARD below)."""
    return linear(x, w)


def with_adapters(adapters: dict[int, tuple[Matrix, Matrix]]) -> Callable[[Callable], Callable]:
    """tape -> what runs every operation on it, linear as W x + B (A x), with the (A, B) of W's id; α/r is 1."""
    def run(tape: Callable, operation: Callable, *inputs):
        if operation is not linear:
            return tape(operation, *inputs)
        a, b = adapters[id(inputs[1])]
        return tape(add, tape(frozen_linear, *inputs), tape(linear, tape(linear, inputs[0], a), b))
    return lambda tape: partial(run, tape)


@lru_cache(maxsize=None)
def by_qlora(lab: Lab, rank: int = 4) -> tuple[Compressed, int]:
    """(the NF4 model with adapters trained on top, which its file keeps in FP16; how many numbers they have)."""
    base, rng, adapters = in_nf4(lab, True), random.Random(1), {}
    for w in (base.weights[name] for name in lab.linears):
        a = [[rng.gauss(0, len(w[0]) ** -0.5) for _ in w[0]] for _ in range(rank)]
        adapters[id(w)] = a, [[0.0] * rank for _ in w]
    parameters = {str(i): part for i, part in enumerate(flatten(adapters.values()))}
    model = Llama(lab.model.config, base.weights)
    short_run(model, parameters, lab.recent, FEW_STEPS, 0.005, with_adapters(adapters))
    n = sum(len(flatten(part)) for part in parameters.values())
    return replace(base, name="NF4 + QLoRA", nbytes=base.nbytes + 2 * n, run=with_adapters(adapters)(call),
                   bits_per_weight=base.bits_per_weight + 16 * n / lab.n_weights), n


def subspace(g: Matrix, rank: int, rng: random.Random, turns: int = 2) -> Matrix:
    """About the top `rank` left singular vectors of g [m][n], as rows [rank][m]: orthogonal iteration on g gᵀ."""
    vectors, columns = [[rng.gauss(0, 1) for _ in g] for _ in range(rank)], list(zip(*g))
    for _ in range(turns):
        vectors = linear(linear(vectors, columns), g)
        for i, v in enumerate(vectors):
            for u in vectors[:i]:
                share = dot(u, v)
                v = [a - share * b for a, b in zip(v, u)]
            size = math.sqrt(dot(v, v)) or 1.0
            vectors[i] = [a / size for a in v]
    return vectors


class QGaLore:
    """One matrix in INT8 (a scale per row), its projection in INT4, and Adam on the projected gradient."""

    def __init__(self, w: Matrix, rank: int, rng: random.Random):
        self.q, self.rank, self.rng = quantize(w, 8, granularity="channel"), rank, rng
        self.w = self.q.dequantize()                # what a forward pass uses; changed in place
        self.tall = len(w) > len(w[0])
        self.projection: Quantized | None = None    # Pᵀ [r][m]
        self.interval, self.wait, self.refreshed = 2, 0, 0
        self.adam = Adam({"R": [[0.0] * max(len(w), len(w[0])) for _ in range(rank)]})

    def step(self, gradient: Matrix, rate: float) -> None:
        """Project the gradient [out][in] (transposed if tall), let Adam step there, project back, add, and round to
        stochastic_codes() on new INT8 grids.

        With no steps left to wait, P is made of this gradient first; the interval doubles if the alignment() of its
        first vector and the old one's is 0.4 or more, and that many steps, this one included, are to wait.
        """
        g = list(zip(*gradient)) if self.tall else gradient
        if not self.wait:
            new = quantize(subspace(g, self.rank, self.rng), 4, granularity="channel")
            if self.projection and alignment(self.projection.dequantize()[0], new.dequantize()[0]) >= 0.4:
                self.interval *= 2
            self.projection, self.wait, self.refreshed = new, self.interval, self.refreshed + 1
        self.wait -= 1
        p = self.projection.dequantize()
        self.adam.rows["R"] = r = [[0.0] * len(g[0]) for _ in p]   # Adam writes its step into these zeros, [r][n]
        self.adam.step({"R": linear(p, list(zip(*g)))}, rate)
        update = linear(list(zip(*p)), list(zip(*r)))              # P · Adam(Pᵀ G), [m][n]
        w = add(self.w, list(zip(*update)) if self.tall else update)
        q = quantize(w, 8, granularity="channel")
        self.q = replace(q, codes=[stochastic_codes(row, scale, self.rng) for row, [scale] in zip(w, q.scales)])
        self.w[:] = self.q.dequantize()


def stochastic_codes(values: Vector, scale: float, rng: random.Random) -> list[int]:
    """INT8 codes, rounded up with the probability of the fraction, so that the mean is the value."""
    return [min(127, math.floor(value / scale + rng.random())) for value in values]


def alignment(u: Vector, v: Vector) -> float:
    """|cosine| of the angle between them; 0 if one is all zeros."""
    return abs(dot(u, v)) / math.sqrt(dot(u, u) * dot(v, v) or 1.0)


def show_training(trace: Trace, knobs: Namespace) -> None:
    """QLoRA and Q-GaLore beside full training: what is kept, and what it does to the loss."""
    lab, rng = laboratory(knobs), random.Random(knobs.seed)
    calm, base, (qlora, n_adapters) = lab.calm, in_nf4(lab, True), by_qlora(lab)

    def perplexity(matrices: dict[str, Matrix]) -> float:
        return measure(lab, Compressed("", calm.weights | matrices, 0, 0, call)).perplexity

    def galore_step(gradients: dict[str, Matrix], rate: float) -> None:
        for name, matrix in galore.items():
            matrix.step(gradients[name], rate)

    full = map_rows(list, {name: calm.weights[name] for name in lab.linears})
    adam, galore = Adam(full), {name: QGaLore(w, 8, rng) for name, w in full.items()}
    int8 = {name: matrix.w for name, matrix in galore.items()}
    before = lab.perplexity, measure(lab, base).perplexity, perplexity(int8)
    for matrices, step in ((full, adam.step), (int8, galore_step)):
        short_run(Llama(calm.config, calm.weights | matrices), matrices, lab.recent, FEW_STEPS, 0.005, step=step)
    after = perplexity(full), measure(lab, qlora).perplexity, perplexity(int8)

    n, shapes, ours = lab.n_weights, [calm.config.shapes()[name] for name in full], galore.values()
    trace.ask("QLoRA at rank 4: how many numbers does it train beside all the matrices, whose rows and columns "
              f"sum to {sum(map(sum, shapes)):,}?", n_adapters)
    trace.say(f"{FEW_STEPS} steps of {PIECE} tokens more, on the text just before the last verse, three ways, "
              f"from the same learning rate. Bytes of the matrices as they are kept while training, and of what the "
              f"optimizer keeps: two FP32 numbers for each one that Adam sees, and Q-GaLore's projections in INT4. "
              f"Perplexity on the last verse.")
    moments = [sum(map(len, flatten(one.m.values()))) for one in (adam, *(m.adam for m in ours))]
    kept = 4 * n, base.nbytes - lab.rest_bytes + 4 * n_adapters, sum(m.q.nbytes for m in ours)
    state = 8 * moments[0], 8 * n_adapters, 8 * sum(moments[1:]) + sum(m.projection.nbytes for m in ours)
    ways = zip(("full", "QLoRA, rank 4", "Q-GaLore, rank 8"), (n, n_adapters, n), kept, state, before, after)
    trace.table(["", "trained", "weights", "optimizer", "before", "after"],
                [[way, *(f"{count:,}" for count in counts), f"{old:.3f}", f"{new:.3f}"]
                 for way, *counts, old, new in ways], left=(0,))
    trace.note(f"Q-GaLore made its {len(ours)} projections {sum(m.refreshed for m in ours)} times in all; every "
               f"second step, it would be {len(ours) * FEW_STEPS // 2}.")
    trace.check("QLoRA trains r·(in + out) numbers a matrix", n_adapters == 4 * sum(map(sum, shapes)),
                f"{n_adapters:,}")
    trace.check("Q-GaLore's Adam keeps 2·r·max(in, out) numbers a matrix",
                sum(moments[1:]) == 8 * sum(map(max, shapes)), f"{2 * sum(moments[1:]):,}")


# ---------------------------------------------------------------------------------------------------
# 12. Mixed precision
#
# Not every matrix minds rounding as much. Measure each alone: the KL that it causes when only it is quantized, on
# calibration data, at several bit widths. If the damages roughly add up, the best assignment under a budget of
# bytes is a small knapsack; with 8 matrices and 3 widths all 6,561 assignments can be tried. (llama.cpp's Q4_K_M
# mixes in the same spirit, by rule: more bits for some of the attention and feed-forward matrices.)

def widths(bits: int) -> list[int]:
    """The bit widths that mixed precision chooses from, at a budget of so many bits for all."""
    return sorted({min(8, max(2, bits + change)) for change in (-1, 0, 1)})


@lru_cache(maxsize=None)
def measure_sensitivity(lab: Lab, bits: int, group: int) -> dict[str, dict[int, tuple[float, int]]]:
    """{matrix: {bits: (KL when it alone is quantized, on 16 calibration tokens; bytes)}}."""
    tokens, found = lab.calibration[-16:], {name: {} for name in lab.linears}
    reference = [log_softmax(row) for row in lab.model.forward(tokens)]
    for name, width in product(found, widths(bits)):
        q = quantize(lab.model.weights[name], width, granularity=group)
        ours = Llama(lab.model.config, lab.model.weights | {name: q.dequantize()}).forward(tokens)
        found[name][width] = fmean(map(kl_divergence, reference, map(log_softmax, ours))), q.nbytes
    return found


def assign_bits(damage: dict[str, dict[int, tuple[float, int]]], budget: int) -> dict[str, int]:
    """{matrix: bits} with the least sum of damages among all assignments of at most `budget` bytes."""
    def total(choice: Sequence[int], part: int) -> float:
        return sum(found[bits][part] for found, bits in zip(damage.values(), choice))
    affordable = (choice for choice in product(*map(sorted, damage.values())) if total(choice, 1) <= budget)
    return dict(zip(damage, min(affordable, key=lambda choice: total(choice, 0))))


@lru_cache(maxsize=None)
def in_mixed_precision(lab: Lab, bits: int, group: int) -> tuple[Compressed, dict[str, int]]:
    """(the whole model, no larger than at `bits` throughout, its bits where they help most; the bits)."""
    damage = measure_sensitivity(lab, bits, group)
    chosen = assign_bits(damage, sum(found[bits][1] for found in damage.values()))
    return compress(lab, "mixed bits", lambda name, w: quantize(w, chosen[name], granularity=group)), chosen


def show_mixed(trace: Trace, knobs: Namespace) -> None:
    """Each matrix's sensitivity, the assignment, and the model against uniform bits."""
    lab, bits, g = laboratory(knobs), knobs.bits, knobs.group_size
    damage, (mixed, chosen) = measure_sensitivity(lab, bits, g), in_mixed_precision(lab, bits, g)
    uniform, shapes = rounded_to_nearest(lab, bits, g), lab.model.config.shapes()
    trace.ask(f"rounded alone to {bits} bits, which matrix harms most: wq, wk, wv, wo, w1, w2, w3 or output?",
              max(damage, key=lambda name: damage[name][bits][0]).split(".")[-1])
    trace.say(f"The KL that each matrix causes when it alone is quantized (in thousandths of a nat a token, on "
              f"16 calibration tokens, in groups of {g}), and the bits that the search gives it, all together within the "
              f"bytes of {bits} bits throughout.")
    trace.table(["matrix", "weights", *(f"{width} bits" for width in widths(bits)), "gets"],
                [[name, f"{math.prod(shapes[name]):,}", *(f"{1000 * kl:.2f}" for kl, _ in found.values()),
                  str(chosen[name])] for name, found in damage.items()], left=(0,))
    both = (map(log_softmax, Llama(lab.model.config, weights).forward(lab.calibration[-16:]))
            for weights in (lab.model.weights, uniform.weights))
    trace.note(f"At {bits} bits they add up to {1000 * sum(found[bits][0] for found in damage.values()):.1f}; all "
               f"matrices rounded at once cause {1000 * fmean(map(kl_divergence, *both)):.1f}.")
    trace.say("On the last verse:")
    score_table(trace, lab, {f"{bits} bits throughout": uniform, "mixed": mixed})
    trace.check("mixed is no larger, in encoded bytes", mixed.nbytes <= uniform.nbytes,
                f"{mixed.nbytes:,} of {uniform.nbytes:,}")


# ---------------------------------------------------------------------------------------------------
# 13. The table
#
# Everything above on one page (but for granularity: section 2). What to expect of a method in production follows
# from what it needs: rounding to nearest, NF4 and HQQ need nothing; GPTQ, AWQ and SqueezeLLM need calibration data and
# minutes to hours; one bit and adapters need training. (A model of 64 channels has little to spare: bits cost it
# more than they cost a large one.)


def everything(lab: Lab, knobs: Namespace) -> list[Compressed]:
    """Every compressed model of this script, in the table's order."""
    b, g = knobs.bits, knobs.group_size
    return [rounded_to_nearest(lab, 8, "channel"), rounded_to_nearest(lab, b, "tensor"),
            rounded_to_nearest(lab, b, g), rounded_to_nearest(lab, b, g, False),
            in_nf4(lab, False), in_nf4(lab, True), *(in_gguf(lab, form) for form in GGUF),
            in_int8(lab, "absmax", knobs.alpha), in_int8(lab, "LLM.int8()", knobs.alpha),
            in_int8(lab, "SmoothQuant", knobs.alpha),
            by_gptq(lab, b, g), by_gptq(lab, b, g, True), by_awq(lab, b, g),
            by_hqq(lab, b, g), by_squeezellm(lab, b),
            *(in_one_bit(lab, method) for method in ONE_BIT),
            by_qlora(lab)[0], in_mixed_precision(lab, b, g)[0]]


def show_table(trace: Trace, knobs: Namespace) -> None:
    """The table and the picture."""
    lab, letters = laboratory(knobs), "abcdefghijklmnopqrstuvwxyz"
    compressed = everything(lab, knobs)
    measured = [measure(lab, c) for c in compressed]
    small = [i for i, c in enumerate(compressed) if c.bits_per_weight < 5.5]
    trace.ask("which method under 5.5 bits a weight has the least KL? (One of "
              + "; ".join(compressed[i].name for i in small) + ")",
              compressed[min(small, key=lambda i: measured[i].kl)].name)
    trace.say(f"Every method on the same {len(lab.logits)} tokens. Bits: per weight of the matrices, counted; "
              f"bytes: the whole file; chg: likeliest tokens changed. The sample continues {knobs.prompt!r}. A letter "
              f"marks the method in the picture below, with a star if nothing else is both as small and as good: the "
              f"Pareto front.")
    points = [(c.nbytes, m.kl) for c, m in zip(compressed, measured)]
    front = pareto_front(points)
    rows = [["", "FP32", "32.00", f"{lab.fp32_bytes:,}", f"{lab.perplexity:.3f}", "", "",
             continue_text(lab, knobs, lab.model.weights, call)]]
    for i, (c, m) in enumerate(zip(compressed, measured)):
        rows.append([letters[i] + "*" * (i in front), c.name, f"{c.bits_per_weight:.2f}", f"{c.nbytes:,}",
                     f"{m.perplexity:.3f}", f"{m.kl:.4f}", str(m.changed), continue_text(lab, knobs, c.weights, c.run)])
    trace.table(["", "method", "bits", "bytes", "ppl", "KL", "chg", "sample"], rows, left=(0, 1, 7))
    trace.note("The KL of models that were trained further counts what they learned as well. For Q4_K and HQQ without "
               "planted outliers see sections 5 and 9.")
    trace.say("Bytes of the file from left to right, KL from FP32 upwards (ten times for every four lines; the "
              "lowest line is for whatever is less). Down and left is better. Where several meet, they stand in a row.")
    trace.lines(scatter([(*point, letters[i], i in front) for i, point in enumerate(points)]))
    trace.check("KL is nowhere negative", all(m.kl > -1e-12 for m in measured), f"{len(measured)} methods")


def pareto_front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Which of the points (x, y) no other beats by being as low in both; of equal ones the first."""
    return {i for i, (x, y) in enumerate(points)
            if not any(a <= x and b <= y and (a, b, j) < (x, y, i) for j, (a, b) in enumerate(points))}


def scatter(points: Sequence[tuple[float, float, str, bool]], width: int = 70, height: int = 17) -> list[str]:
    """Points (x, y, letter, on the front) as text, y on a logarithmic axis; where a place is taken, the next free one."""
    logs = [math.log10(max(y, 1e-5)) for _, y, _, _ in points]
    top, least, most = max(logs), min(x for x, *_ in points), max(x for x, *_ in points)
    picture = [[" "] * width for _ in range(height)]
    for (x, _, letter, best), log in sorted(zip(points, logs), key=lambda pair: not pair[0][3]):  # the front first
        line = picture[min(height - 1, round((top - log) * 4))]
        column = round((x - least) / (most - least or 1) * (width - 10))
        while column < width - 2 and (line[column] != " " or best and line[column + 1] != " "):
            column += 1
        line[column:column + 1 + best] = letter + "*" * best
    marks = [f"{10 ** (top - i / 4):7.4f}" if i % 4 == 0 else " " * 7 for i in range(height)]
    return [f"{mark} │" + "".join(line) for mark, line in zip(marks, picture)] + [
        " " * 8 + "└" + "─" * width, " " * 9 + f"{least:,} bytes".ljust(width - 22) + f"{most:,} bytes"]


# ---------------------------------------------------------------------------------------------------
# The model under test, what it is measured by, and the pictures.

@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model: its weights as they decode, the bytes of its file, and how its operations run."""
    name: str
    weights: dict[str, Matrix | Vector]
    nbytes: int
    bits_per_weight: float      # of the matrices
    run: Callable


@dataclass(frozen=True)
class Measured:
    """What compression did to the loss (perplexity) and the predictions (KL from FP32's in nats, top tokens changed)."""
    perplexity: float
    kl: float
    changed: int


@dataclass(frozen=True, eq=False)
class Lab:
    """The model under test, in FP32, and the data: tokens to calibrate on, and others to measure on."""
    tokenizer: Tokenizer
    model: Llama                # with the planted outliers
    calm: Llama                 # the same function without them
    text: list[int]             # everything but the last verse, for short runs of training
    calibration: list[int]
    evaluation: list[int]       # all of its tokens but the first are predicted
    inputs: dict[str, Matrix]   # of each matrix, on the calibration tokens
    unseen: dict[str, Matrix]   # of each matrix, on the evaluation tokens, which calibration does not see
    logits: Matrix              # FP32's, on the evaluation tokens

    @property
    def linears(self) -> list[str]:
        """The names of the matrices that are quantized: all but the embedding."""
        return [name for name, shape in self.model.config.shapes().items() if is_linear(name, shape)]

    @property
    def recent(self) -> list[int]:
        """The end of the text before the last verse."""
        return self.text[-2 * PIECE - 1:]

    @property
    def n_weights(self) -> int:
        """How many weights the quantized matrices have."""
        return sum(math.prod(self.model.config.shapes()[name]) for name in self.linears)

    @property
    def fp32_bytes(self) -> int:
        """Bytes of the whole model in FP32."""
        return 4 * sum(map(math.prod, self.model.config.shapes().values()))

    @property
    def rest_bytes(self) -> int:
        """Bytes of all weights that are not quantized, in FP16."""
        return self.fp32_bytes // 2 - 2 * self.n_weights

    @property
    def perplexity(self) -> float:
        """FP32's, on the evaluation tokens."""
        return math.exp(cross_entropy(self.logits, self.evaluation[1:])[0])

    def scores(self, c: Compressed) -> list[str]:
        """Bits, perplexity, KL and changes as cells of a table."""
        m = measure(self, c)
        return [f"{c.bits_per_weight:.2f}", f"{m.perplexity:.3f}", f"{m.kl:.4f}", f"{m.changed} of {len(self.logits)}"]


def word_tokenizer() -> Tokenizer:
    """A tokenizer for TEXT without the parts of words that TEXT never needs: half of the vocabulary would be those."""
    full = Tokenizer.train(TEXT, VOCAB_SIZE)
    used = sorted(set(range(len(set(TEXT)))) | set(full.encode(TEXT)))
    return Tokenizer([full.vocab[i] for i in used], full.merges)


def model_config(vocab_size: int) -> Config:
    """The tiny Llama of this script."""
    return Config(vocab_size, DIM, n_layers=1, n_heads=4, n_kv_heads=1, hidden_dim=HIDDEN_DIM)


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Is this weight a matrix that multiplies activations?"""
    return len(shape) == 2 and name != "tok_embeddings"


def norms_and_readers(config: Config) -> dict[str, list[str]]:
    """{norm: the matrices that read what it puts out}."""
    pairs = {}
    for layer in (f"layers.{i}." for i in range(config.n_layers)):
        pairs[layer + "attention_norm"] = [layer + "attention." + name for name in ("wq", "wk", "wv")]
        pairs[layer + "ffn_norm"] = [layer + "feed_forward." + name for name in ("w1", "w3")]
    return pairs | {"norm": ["output"]}


def sources_and_readers(config: Config) -> dict[str, list[str]]:
    """The same, and {w3: [w2]} of every layer: the rows of w3 scale the channels that w2 reads."""
    return norms_and_readers(config) | {f"layers.{i}.feed_forward.w3": [f"layers.{i}.feed_forward.w2"]
                                        for i in range(config.n_layers)}


@lru_cache(maxsize=None)
def trained(seed: int) -> Llama:
    """The tiny Llama after its training on TEXT, its weights in FP32."""
    tokenizer = word_tokenizer()
    model, _ = train(model_config(len(tokenizer.vocab)), tokenizer.encode(TEXT), random.Random(seed), STEPS, LENGTH,
                     LEARNING_RATE)
    return Llama(model.config, map_rows(lambda row: list(map(fp32, row)), model.weights))


def plant_outliers(model: Llama, channels: int, size: float, rng: random.Random) -> Llama:
    """The same function, but every norm puts out some channels `size` times larger, and the keys some of theirs.

    A key's channels come in pairs, since rope() turns two together; the queries' are made as much smaller.
    """
    config, weights, chosen = model.config, model.weights, rng.sample(range(model.config.dim), channels)
    scales = [1 / size if c in chosen else 1.0 for c in range(config.dim)]
    for norm, readers in norms_and_readers(config).items():
        weights = move_scales(weights, norm, readers, scales)
    pairs = set(rng.sample(range(config.head_dim // 2), key_pairs(channels, config)))
    rows = [key_size(size) if r % config.head_dim // 2 in pairs else 1.0 for r in range(config.dim)]
    for layer in range(config.n_layers):
        wq, wk = (f"layers.{layer}.attention.{name}" for name in ("wq", "wk"))
        weights = weights | {wk: [[value * s for value in row] for row, s in zip(weights[wk], rows)],
                             wq: [[value / s for value in row] for row, s in zip(weights[wq], rows)]}
    return Llama(config, weights)


def key_pairs(channels: int, config: Config) -> int:
    """How many pairs of a key's channels are made large, where so many of the norms' channels are."""
    return min((channels + 1) // 2, config.head_dim // 2)


def key_size(size: float) -> float:
    """How much larger the large channels of keys are, where those of the norms are `size` times larger."""
    return max(1.0, size / 4)


@lru_cache(maxsize=None)
def build_lab(seed: int, calibration_tokens: int, outliers: tuple[int, float]) -> Lab:
    """Train (or take the model trained before), plant, and run FP32 once on both parts of the text.

    The last verse is for measuring; calibration takes the tokens just before it.
    """
    tokenizer, calm = word_tokenizer(), trained(seed)
    model = plant_outliers(calm, *outliers, random.Random(seed))
    text, last = (tokenizer.encode(part) for part in re.fullmatch(r"(.*\n)(.*\n)", TEXT, re.DOTALL).groups())
    calibration, evaluation = text[-calibration_tokens:], last[-EVALUATION_TOKENS - 1:]
    unseen, logits = capture(model, evaluation[:-1])
    return Lab(tokenizer, model, calm, text, calibration, evaluation, capture(model, calibration)[0], unseen, logits)


def laboratory(knobs: Namespace) -> Lab:
    """The lab that the knobs describe."""
    channels, size = knobs.outliers
    return build_lab(knobs.seed, knobs.calibration_tokens, (channels, size) if channels and size > 1 else (0, 1.0))


def without_outliers(knobs: Namespace) -> Lab:
    """The same, but with no outliers planted."""
    return build_lab(knobs.seed, knobs.calibration_tokens, (0, 1.0))


def capture(model: Llama, tokens: Sequence[int]) -> tuple[dict[str, Matrix], Matrix]:
    """({matrix: the inputs it gets} while the model reads tokens, the logits)."""
    names, seen = {id(w): name for name, w in model.weights.items()}, {}

    def run(operation: Callable, *inputs):
        if operation is linear:
            seen[names[id(inputs[1])]] = inputs[0]
        return operation(*inputs)

    return seen, model.forward(tokens, run=run)


@lru_cache(maxsize=None)
def measure(lab: Lab, c: Compressed) -> Measured:
    """A compressed model on the evaluation tokens, beside FP32."""
    logits = Llama(lab.model.config, c.weights).forward(lab.evaluation[:-1], run=c.run)
    ours, theirs = list(map(log_softmax, logits)), list(map(log_softmax, lab.logits))
    loss = -fmean(row[target] for row, target in zip(ours, lab.evaluation[1:]))
    changed = sum(a.index(max(a)) != b.index(max(b)) for a, b in zip(ours, theirs))
    return Measured(math.exp(loss), fmean(map(kl_divergence, theirs, ours)), changed)


def log_softmax(logits: Vector) -> Vector:
    """log softmax(logits) = logits - log Σ exp(logits), without overflow."""
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(value - top) for value in logits))
    return [value - norm for value in logits]


def kl_divergence(p: Vector, q: Vector) -> float:
    """Σ p · log(p / q) in nats, of log-probabilities."""
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q))


def map_rows(function: Callable[[Vector], Vector], weights: dict[str, Matrix | Vector]) -> dict[str, Matrix | Vector]:
    """The function of every row of a matrix, and of every gain, in arrays of their own; list just copies."""
    return {name: list(map(function, w)) if isinstance(w[0], list) else function(w) for name, w in weights.items()}


def short_run(model: Llama, parameters: dict[str, Matrix | Vector], ids: Sequence[int], steps: int, rate: float,
              run_on: Callable[[Tape], Callable] = lambda tape: tape, step: Callable | None = None) -> None:
    """PIECE tokens of ids at a time: step(the parameters' gradients, a learning rate that falls to 0), or Adam's."""
    step = step or Adam(parameters).step
    for i in range(steps):
        tape, piece = Tape(), ids[i * PIECE % (len(ids) - PIECE):][:PIECE + 1]
        logits = model.forward(piece[:-1], run=run_on(tape))
        gradients = tape.backward(logits, cross_entropy(logits, piece[1:])[1])
        step({name: gradients[id(p)] for name, p in parameters.items()}, rate * (1 - i / steps))


def compress(lab: Lab, name: str, method: Callable, weights: dict | None = None) -> Compressed:
    """lab's model with every matrix through method(name, w) -> Quantized, or (decoded, its bytes); the rest in FP16."""
    weights = lab.model.weights if weights is None else weights
    out = map_rows(fp16_row, {n: w for n, w in weights.items() if n not in lab.linears})
    nbytes = 0
    for n in lab.linears:
        q = method(n, weights[n])
        out[n], data = (q.dequantize(), q.to_bytes()) if isinstance(q, Quantized) else q
        nbytes += len(data)
    return Compressed(name, out, lab.rest_bytes + nbytes, 8 * nbytes / lab.n_weights, call)


@lru_cache(maxsize=None)
def rounded_to_nearest(lab: Lab, bits: int, granularity: str | int, symmetric: bool = True) -> Compressed:
    """The whole model by quantize()."""
    kind = f"g{granularity}" if isinstance(granularity, int) else granularity
    return compress(lab, f"INT{bits} {kind}" + ", asym." * (not symmetric),
                    lambda _, w: quantize(w, bits, symmetric=symmetric, granularity=granularity))


@lru_cache(maxsize=None)
def in_nf4(lab: Lab, double_quant: bool) -> Compressed:
    """The whole model by quantize_nf4()."""
    return compress(lab, "NF4" + ", double quant." * double_quant,
                    lambda _, w: quantize_nf4(w, double_quant=double_quant))


@lru_cache(maxsize=None)
def in_gguf(lab: Lab, form: str) -> Compressed:
    """The whole model in one of llama.cpp's formats; rows follow each other, and zeros fill the last block up.

    (llama.cpp cuts no block across rows: where 256 does not divide their length, it takes a format of smaller blocks.)
    """
    encode, decode, size = GGUF[form]

    def method(_: str, w: Matrix) -> tuple[Matrix, bytes]:
        flat, width = flatten(w), len(w[0])
        filled = flat + [0.0] * (-len(flat) % size)
        data = encode(filled)
        decoded = decode(data, len(filled))
        return [decoded[i:i + width] for i in range(0, len(flat), width)], data

    return compress(lab, "GGUF " + form, method)


def score_table(trace: Trace, lab: Lab, compressed: dict[str, Compressed], title: str = "") -> None:
    """Bits, perplexity, KL and changes of some models."""
    trace.table([title, "bits/weight", "perplexity", "KL", "changed"],
                [[label, *lab.scores(c)] for label, c in compressed.items()], left=(0,))


def continue_text(lab: Lab, knobs: Namespace, weights: dict, run: Callable, n_tokens: int = 3) -> str:
    """What the model writes after the prompt, the likeliest token each time, on one line of 17 characters."""
    model, tokens = Llama(lab.model.config, weights), lab.tokenizer.encode(knobs.prompt)
    n = len(tokens)
    for _ in range(n_tokens):
        logits = model.forward(tokens, run=run)[-1]
        tokens = tokens + [logits.index(max(logits))]
    text = lab.tokenizer.decode(tokens[n:]).replace("\n", " ").strip()
    return text if len(text) <= 17 else text[:16] + "…"


def flatten(rows: Iterable[Sequence]) -> list:
    """All of the rows in one."""
    return [value for row in rows for value in row]


def relative_distance(a: Matrix, b: Matrix) -> float:
    """|a - b| / |b| in the Frobenius norm; 0 where both are 0."""
    size = math.hypot(*flatten(b))
    return math.dist(flatten(a), flatten(b)) / size if size else 0.0


def histogram(values: Sequence[float], grids: dict[str, Sequence[float]], width: int = 69,
              height: int = 7) -> list[str]:
    """How many values fall where, as columns, from -absmax to absmax; under them, marks where each grid has a point."""
    absmax = max(map(abs, values))
    places = Counter(round((value / absmax + 1) / 2 * (width - 1)) for value in values)
    lines, margin = columns_picture([places[c] for c in range(width)], height), max(map(len, grids)) + 1
    for points in grids.values():
        marked = {round((point / absmax + 1) / 2 * (width - 1)) for point in points
                  if abs(point) <= absmax * (1 + 1e-3)}
        lines.append("".join("┴" if c in marked else " " for c in range(width)))
    lines.append(f"{-absmax:+.2f}".ljust(width // 2) + "0" + f"{absmax:+.2f}".rjust(width - width // 2 - 1))
    return [label.ljust(margin) + line for label, line in zip([""] * height + list(grids) + [""], lines)]


def columns_picture(sizes: Sequence[float], height: int) -> list[str]:
    """Sizes as columns side by side, the largest of them `height` lines high."""
    most = max(sizes)
    return ["".join("█" if size / most > level / height else " " for size in sizes)
            for level in reversed(range(height))]


# ---------------------------------------------------------------------------------------------------
# Shared by the five scripts, the same in each: arithmetic, the text, the tokenizer, the trace.

def dot_by_hand(a: Sequence[float], b: Sequence[float]) -> float:
    """Σ a[i]·b[i]."""
    return sum(map(operator.mul, a, b))


dot = getattr(math, "sumprod", dot_by_hand)  # Python 3.12 and newer have it built in


def softmax(scores: Vector) -> Vector:
    """exp(s) / Σ exp(s), with the largest score taken off first so that nothing overflows.

    A score of -inf gets weight 0; where all are -inf, as in a row that sees nothing, all weights are 0.
    """
    top = max(scores, default=-math.inf)
    if top == -math.inf:
        return [0.0] * len(scores)
    exps = [math.exp(s - top) for s in scores]
    total = sum(exps)
    return [e / total for e in exps]


def linear(x: Matrix, w: Matrix) -> Matrix:
    """y = W x for every row: x [n][in], w [out][in] -> [n][out], as nn.Linear without a bias."""
    return [[dot(row, unit) for unit in w] for row in x]


CLAUSES = ["the house that Jack built.", "the malt that lay in", "the rat that ate", "the cat that killed",
           "the dog that worried", "the cow with the crumpled horn that tossed", "the maiden all forlorn that milked",
           "the man all tattered and torn that kissed", "the priest all shaven and shorn that married",
           "the cock that crowed in the morn that waked", "the farmer sowing his corn that kept",
           "the horse and the hound and the horn that belonged to"]
# The House That Jack Built: verse n tells clauses n, n - 1, …, 0.
TEXT = "".join("This is " + " ".join(CLAUSES[n::-1]) + "\n" for n in range(len(CLAUSES)))


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding in miniature, over characters: vocab[id] is a token, merges are in order of learning.

    Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016, arXiv:1508.07909.
    """
    vocab: list[str]
    merges: list[tuple[str, str]]

    @staticmethod
    def words(text: str) -> list[str]:
        """The units no merge crosses: words and punctuation with their leading space, other white space alone."""
        return re.findall(r" ?\w+| ?[^\w\s]+|\s", text)

    @staticmethod
    def merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
        """Join every occurrence of pair in parts, from the left."""
        merged: list[str] = []
        for part in parts:
            if merged and (merged[-1], part) == pair:
                merged[-1] += part
            else:
                merged.append(part)
        return merged

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Tokenizer:
        """Start from the text's characters; merge the most frequent pair until there are vocab_size tokens.

        Ties go to the pair that sorts first. The vocabulary stays smaller when every word is one token already.
        ValueError if text is empty or has more characters than vocab_size.
        """
        vocab, merges = sorted(set(text)), []
        if not 0 < len(vocab) <= vocab_size:
            raise ValueError(f"vocab_size must be at least the number of different characters, {len(vocab)}, "
                             f"and the text not empty; got {vocab_size}")
        counts = Counter(cls.words(text))
        parts = {word: list(word) for word in counts}
        while len(vocab) < vocab_size:
            pairs: Counter[tuple[str, str]] = Counter()
            for word, count in counts.items():
                for pair in zip(parts[word], parts[word][1:]):
                    pairs[pair] += count
            if not pairs:
                break
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            parts = {word: cls.merge(split, best) for word, split in parts.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Token ids of text: the merges, in order, within each word. ValueError names an unknown character."""
        ids = {token: i for i, token in enumerate(self.vocab)}
        if unknown := next((c for c in text if c not in ids), None):
            known = "".join(token for token in self.vocab if len(token) == 1)
            raise ValueError(f"the vocabulary has no character {unknown!r}; it knows {known!r}")
        parts = {word: list(word) for word in set(self.words(text))}
        for pair in self.merges:
            parts = {word: self.merge(split, pair) for word, split in parts.items()}
        return [ids[part] for word in self.words(text) for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


WIDTH = 80  # columns of the trace
# What a terminal without the left character gets instead of it.
ASCII = str.maketrans({
    "█": "#", "▓": "*", "▒": "+", "░": ":", "·": ".", "│": "|", "─": "-", "┌": "+", "┐": "+", "└": "+", "┘": "+",
    "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+", "→": "->", "←": "<-", "␣": "_", "…": "...", "×": "x",
    "√": "sqrt ", "Σ": "sum ", "Δ": "d", "ᵀ": "^T", "²": "^2", "±": "+-", "≤": "<=", "≥": ">=", "≈": "~"})
SHADES = " ·░▒▓█"


class Trace:
    """Prints the sections and their checks; knows what the output can show, and how many checks held.

    predict: ask the reader before each result; None: don't; False: ask, but wait for no answer.
    """

    def __init__(self, ascii_only: bool = False, predict: bool | None = None):
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        probe = "".join(map(chr, ASCII))
        self.ascii = ascii_only or probe.encode(encoding, "ignore").decode(encoding) != probe
        self.colour = (sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.held = self.failed = self.unwritten = 0
        self.predict, self.asked, self.right = predict, 0, 0
        self.in_checks = False  # was the last line a check?

    def plain(self, text: str) -> str:
        """text as this output can show it."""
        return text.translate(ASCII).encode("ascii", "backslashreplace").decode() if self.ascii else text

    def lines(self, lines: Sequence[str], style: str = "") -> None:
        """Print lines as they are (a picture, say); style: an ANSI code, for terminals."""
        self.in_checks = False
        for line in lines:
            line = self.plain(line).rstrip()
            print(f"\x1b[{style}m{line}\x1b[0m" if style and self.colour else line)

    def section(self, number: int, title: str, functions: Sequence[Callable]) -> None:
        """A section's head: its number and title, and the functions in the source that do the work."""
        self.lines(["", f"── {number} ── {title} ".ljust(WIDTH, "─")], "1")
        names = "in the source: " + ", ".join(function.__name__ for function in functions)
        self.lines(textwrap.wrap(names, WIDTH, subsequent_indent=" " * 15), "2")

    def say(self, text: str) -> None:
        """A paragraph, wrapped."""
        self.lines(["", *textwrap.wrap(self.plain(text), WIDTH)])

    def note(self, text: str) -> None:
        """A line under a picture: its legend."""
        self.lines(textwrap.wrap(self.plain(text), WIDTH), "2")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> None:
        """A table, two blanks between the columns, right-aligned but for the columns named in left."""
        cells = [[self.plain(cell) for cell in row] for row in (header, *rows)]
        widths = [max(map(display_width, column)) for column in zip(*cells)]
        for i, row in enumerate(cells):
            pads = [" " * (width - display_width(cell)) for cell, width in zip(row, widths)]
            self.lines(["  ".join(cell + pad if c in left else pad + cell
                                  for c, (cell, pad) in enumerate(zip(row, pads)))], "2" if i == 0 else "")

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared or bounded. A failure makes the exit status 1."""
        self.held, self.failed = self.held + bool(holds), self.failed + (not holds)
        text = textwrap.wrap(self.plain(f"{claim} ({evidence})"), WIDTH - 6)
        mark = "ok  " if holds else "FAIL"
        if self.colour:
            mark = f"\x1b[{'32' if holds else '1;31'}m{mark}\x1b[0m"
        self.lines([""] * (not self.in_checks) + [f"{mark}  {text[0]}", *("      " + line for line in text[1:])])
        self.in_checks = True

    def ask(self, question: str, answer: float | str) -> None:
        """With --predict: ask before the result is shown, wait for the reader's answer, show the computed one.

        A number is right within a tenth, a text when it is the same but for case and blanks around it.
        """
        if self.predict is None:
            return
        shown = answer.strip() if isinstance(answer, str) else (
            f"{answer:,.0f}" if isinstance(answer, int) or abs(answer) >= 1000 else f"{answer:.3g}")
        self.say(f"Predict: {question}")
        reply = ""
        if self.predict:
            try:
                reply = input("  your answer (Enter: pass) > ").strip()
            except EOFError:
                print()
                self.predict = False  # no more answers to come
        right = bool(reply) and reply.casefold() == shown.casefold()
        if not isinstance(answer, str) and (number := re.search(r"[+-]?[0-9][0-9,]*(\.[0-9]+)?|[+-]?\.[0-9]+", reply)):
            right = abs(float(number[0].replace(",", "")) - answer) <= abs(answer) / 10
        self.asked, self.right = self.asked + bool(reply), self.right + right
        self.lines([f"  computed: {shown}" + (" - yes" if right else " - not quite") * bool(reply)], "1")

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """A check that two matrices have the same shape and differ by less than bound in every place."""
        same_shape = [len(row) for row in got] == [len(row) for row in expected]
        gaps = [abs(a - b) for p, q in zip(got, expected) for a, b in zip(p, q)]
        holds = same_shape and all(gap < bound for gap in gaps)
        failure = f"max |Δ| = {max(gaps):.1e}" if same_shape else "the shapes differ"
        self.check(claim, holds, f"max |Δ| < {bound:.0e}" if holds else f"{failure}; bound {bound:.0e}")


def display_width(text: str) -> int:
    """Columns that text takes in a terminal: East Asian wide characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shade(weight: float) -> str:
    """A weight between 0 and 1 as one character, darker for more."""
    return SHADES[sum(weight > step for step in (0, 0.02, 0.1, 0.3, 0.6))]


def bar(value: float, full: float, width: int) -> str:
    """A bar of value / full times width characters; a trace of one for anything above zero."""
    length = round(width * max(0.0, min(value / full, 1.0))) if full else 0
    return "█" * length or "·" * (value > 0)


class OneLineParser(ArgumentParser):
    """argparse, except that a refusal is one line, on every Python."""

    def parse_args(self, args=None, namespace=None):
        for argument in sys.argv[1:] if args is None else args:
            if argument.startswith("--") and argument.endswith("=--"):  # argparse takes these for no value at all
                self.error(f"argument {argument[:-3]}: expected a value")
        return super().parse_args(args, namespace)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number from low to high."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def section_numbers(count: int) -> Callable[[str], list[int]]:
    """An argparse type: numbers of sections with commas between them."""
    def parse(text: str) -> list[int]:
        numbers = [int(part) if re.fullmatch(r" *[0-9]{1,4} *", part) else 0 for part in text.split(",")]
        if not all(1 <= number <= count for number in numbers):
            raise ArgumentTypeError(f"must be numbers from 1 to {count} (--list names them), as in 1,{count}, "
                                             f"not {text!r}")
        return numbers
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """The options that all five scripts have; the script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    parser.add_argument("--section", metavar="N[,N...]", action="extend", type=section_numbers(n_sections),
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true", help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true", help="be asked for each section's result before it is shown")
    return parser


def announce(multiply_adds: float) -> None:
    """On stderr, before a run that will take more than half a minute here: how long, from the work it will count."""
    ones, start = [1.0] * 10_000, time.process_time()
    for _ in range(20):
        dot(ones, ones)
    seconds = multiply_adds * (time.process_time() - start) / (20 * len(ones))
    if seconds > 30:
        print(f"these settings take about {multiply_adds:.0e} multiply-adds, {seconds:.0f} s on this machine; "
              f"Ctrl-C ends it", file=sys.stderr)


def run_sections(sections: Sequence[tuple], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections (title, show function, functions named in the head); the exit status.

    0 when every check held, 1 when one failed or a function is not written yet (an exercise: its section says so,
    and the others go on), 130 after Ctrl-C. A reader who closes the pipe ends it quietly.
    """
    try:
        trace = Trace(knobs.ascii, sys.stdin is not None and sys.stdin.isatty() if knobs.predict else None)
        if knobs.list:
            trace.lines([f"{number:>2}  {title}" for number, (title, *_) in enumerate(sections, 1)])
        else:
            for number in sorted(set(knobs.section or range(1, len(sections) + 1))):
                title, show, functions = sections[number - 1]
                start = time.perf_counter()
                trace.section(number, title, functions)
                try:
                    show(trace, knobs)
                except NotImplementedError as error:
                    trace.unwritten += 1
                    trace.say(f"Not written yet: {error}. This section goes on once it is.")
                if knobs.time:
                    sys.stdout.flush()
                    print(f"section {number}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
            trace.lines(["", f"{trace.failed} of {trace.failed + trace.held} checks FAILED." if trace.failed else
                         f"All {trace.held} checks held." if trace.held else
                         "No check was reached.",
                         *[f"Sections that wait for a function: {trace.unwritten}."] * bool(trace.unwritten),
                         *[f"Predictions: {trace.right} of {trace.asked} right."] * bool(trace.asked),
                         f"Try next: {next_experiment}"], "1")
        if sys.stdout is not None:
            sys.stdout.flush()
        return 1 if trace.failed or trace.unwritten else 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that closing stdout cannot fail again
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"cannot write the trace: {error.strerror}", file=sys.stderr)
        return 1


# ---------------------------------------------------------------------------------------------------
# The tiny Llama, the same in microkv, microquant and microbeam: RMSNorm, rotary positions, grouped-query
# attention, SwiGLU, no biases, and Meta's names for the weights, so that they fit any Llama implementation.
#
# The forward pass is written once. It does everything through run(operation, *inputs), which just calls the
# operation, unless it is told otherwise: training hands over a Tape, which also remembers, to run backwards.

@dataclass(frozen=True)
class Config:
    """The sizes of a Llama; head_dim is dim / n_heads."""
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        if min(self.vocab_size, self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.hidden_dim) < 1:
            raise ValueError(f"every size must be at least 1, not {self}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError(f"dim must be a multiple of 2 · n_heads, and n_heads of n_kv_heads, not {self}")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every weight; a matrix is [out][in], a norm's gain [dim]."""
        kv_dim, shapes = self.n_kv_heads * self.head_dim, {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            for name, shape in {"attention_norm": (self.dim,), "attention.wq": (self.dim, self.dim),
                                "attention.wk": (kv_dim, self.dim), "attention.wv": (kv_dim, self.dim),
                                "attention.wo": (self.dim, self.dim), "ffn_norm": (self.dim,),
                                "feed_forward.w1": (self.hidden_dim, self.dim),
                                "feed_forward.w2": (self.dim, self.hidden_dim),
                                "feed_forward.w3": (self.hidden_dim, self.dim)}.items():
                shapes[f"layers.{layer}.{name}"] = shape
        return shapes | {"norm": (self.dim,), "output": (self.vocab_size, self.dim)}


def call(operation: Callable, *inputs):
    """operation(*inputs): the plain way to run an operation of the forward pass."""
    return operation(*inputs)


class Llama:
    """weights: {name: matrix [out][in] or gain [dim]}, named and shaped as Config.shapes() says."""

    def __init__(self, config: Config, weights: dict[str, Matrix | Vector]):
        if missing := [name for name in config.shapes() if name not in weights]:
            raise ValueError(f"weights must have {missing[0]!r}")
        self.config, self.weights = config, weights

    def forward(self, tokens: Sequence[int], cache=None, run: Callable = call) -> Matrix:
        """Logits [len(tokens)][vocab_size]: row i predicts what follows tokens[i].

        With a cache, tokens come after those already in it, and their keys and values are added to it.
        """
        c, w = self.config, self.weights
        start = cache.length if cache is not None else 0
        positions = range(start, start + len(tokens))
        x = run(look_up, w["tok_embeddings"], tokens)
        for layer in range(c.n_layers):
            wq, wk, wv, wo = (w[f"layers.{layer}.attention.{name}"] for name in ("wq", "wk", "wv", "wo"))
            w1, w2, w3 = (w[f"layers.{layer}.feed_forward.{name}"] for name in ("w1", "w2", "w3"))
            h = run(rms_norm, x, w[f"layers.{layer}.attention_norm"], c.norm_eps)
            q = run(rope_heads, run(linear, h, wq), positions, c.n_heads, c.rope_base)
            k = run(rope_heads, run(linear, h, wk), positions, c.n_kv_heads, c.rope_base)
            v = run(linear, h, wv)
            if cache is not None:
                k, v = cache.update(layer, k, v)  # of all tokens so far
            x = run(add, x, run(linear, run(attend, q, k, v, c.n_heads, c.n_kv_heads), wo))
            h = run(rms_norm, x, w[f"layers.{layer}.ffn_norm"], c.norm_eps)
            x = run(add, x, run(linear, run(swiglu, run(linear, h, w1), run(linear, h, w3)), w2))
        return run(linear, run(rms_norm, x, w["norm"], c.norm_eps), w["output"])


def look_up(table: Matrix, tokens: Sequence[int]) -> Matrix:
    """The embedding of each token: table [vocab_size][dim] -> [n][dim]."""
    return [table[token] for token in tokens]


def rms_norm(x: Matrix, gain: Vector, eps: float) -> Matrix:
    """gain · x / √(mean(x²) + eps), row by row (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    scales = [1 / math.sqrt(dot(row, row) / len(row) + eps) for row in x]
    return [[value * scale * g for value, g in zip(row, gain)] for row, scale in zip(x, scales)]


def rope_heads(x: Matrix, positions: Sequence[int], n_heads: int, base: float) -> Matrix:
    """rope() in each head of x [n][n_heads·head_dim]."""
    return concat(*(rope(head, positions, base) for head in split_heads(x, n_heads)))


def attend(q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int) -> Matrix:
    """Causal grouped-query attention: q [n_q][n_heads·head_dim], k and v [n_k][n_kv_heads·head_dim].

    The queries are the last n_q of the n_k positions. -> [n_q][n_heads·head_dim].
    """
    group, heads = n_heads // n_kv_heads, []
    keys, values = split_heads(k, n_kv_heads), split_heads(v, n_kv_heads)
    for h, queries in enumerate(split_heads(q, n_heads)):
        columns = list(zip(*values[h // group]))
        heads.append([[dot(weights, column[:len(weights)]) for column in columns]
                      for weights in causal_weights(queries, keys[h // group])])
    return concat(*heads)


def causal_weights(q: Matrix, k: Matrix) -> list[Vector]:
    """softmax(q·k / √d) of one head; row i has weights for the keys it sees only, the first n_k - n_q + i + 1."""
    scale, hidden = 1 / math.sqrt(len(k[0])), len(k) - len(q)
    return [softmax([dot(query, key) * scale for key in k[:hidden + i + 1]]) for i, query in enumerate(q)]


def swiglu(a: Matrix, b: Matrix) -> Matrix:
    """silu(a) · b, element by element (Shazeer 2020, arXiv:2002.05202); silu(x) = x · sigmoid(x)."""
    return [[x * sigmoid(x) * y for x, y in zip(p, q)] for p, q in zip(a, b)]


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def add(a: Matrix, b: Matrix) -> Matrix:
    """The sum, element by element."""
    return [list(map(operator.add, p, q)) for p, q in zip(a, b)]


# Training: each operation's backward pass takes the gradient of its output, and its inputs, and returns the
# gradients of those inputs that have one. Whole matrices at a time, so that here too all the work is in dot.

def look_up_backward(d: Matrix, table: Matrix, tokens: Sequence[int]) -> list[Matrix]:
    """Each token's gradient goes to its row of the table."""
    d_table = [[0.0] * len(table[0]) for _ in table]
    for row, token in zip(d, tokens):
        d_table[token] = list(map(operator.add, d_table[token], row))
    return [d_table]


def linear_backward(d: Matrix, x: Matrix, w: Matrix) -> list[Matrix]:
    """y = x wᵀ: dx = d w, dw = dᵀ x."""
    return [linear(d, list(zip(*w))), linear(list(zip(*d)), list(zip(*x)))]


def rms_norm_backward(d: Matrix, x: Matrix, gain: Vector, eps: float) -> list[Matrix | Vector]:
    """y = gain · x̂ with x̂ = x / rms: dx = (g·d - x̂ · mean(g·d · x̂)) / rms."""
    d_x, d_gain = [], [0.0] * len(gain)
    for d_row, row in zip(d, x):
        scale = 1 / math.sqrt(dot(row, row) / len(row) + eps)
        unit, pull = [value * scale for value in row], list(map(operator.mul, d_row, gain))
        share = dot(pull, unit) / len(row)
        d_x.append([(p - u * share) * scale for p, u in zip(pull, unit)])
        d_gain = [total + slope * u for total, slope, u in zip(d_gain, d_row, unit)]
    return [d_x, d_gain]


def rope_heads_backward(d: Matrix, x: Matrix, positions: Sequence[int], n_heads: int, base: float) -> list[Matrix]:
    """The gradient is turned back."""
    return [rope_heads(d, [-p for p in positions], n_heads, base)]


def attend_backward(d: Matrix, q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int) -> list[Matrix]:
    """With P = softmax(S), S = q kᵀ / √d: dv = Pᵀ d, dP = d vᵀ, dS = P·(dP - rowsum(P·dP)), dq = dS k, dk = dSᵀ q."""
    group, d_q = n_heads // n_kv_heads, []
    keys, values = split_heads(k, n_kv_heads), split_heads(v, n_kv_heads)
    d_k, d_v = ([[[0.0] * len(head[0]) for _ in head] for head in heads] for heads in (keys, values))
    for h, (queries, d_head) in enumerate(zip(split_heads(q, n_heads), split_heads(d, n_heads))):
        g, scale = h // group, 1 / math.sqrt(len(queries[0]))
        p, d_s = [], []
        for weights, d_row in zip(causal_weights(queries, keys[g]), d_head):
            d_p = [dot(d_row, value) for value in values[g][:len(weights)]]
            mean = dot(weights, d_p)
            unseen = [0.0] * (len(k) - len(weights))
            p.append(weights + unseen)
            d_s.append([w * (slope - mean) * scale for w, slope in zip(weights, d_p)] + unseen)
        d_q.append(linear(d_s, list(zip(*keys[g]))))
        d_k[g] = add(d_k[g], linear(list(zip(*d_s)), list(zip(*queries))))
        d_v[g] = add(d_v[g], linear(list(zip(*p)), list(zip(*d_head))))
    return [concat(*d_q), concat(*d_k), concat(*d_v)]


def swiglu_backward(d: Matrix, a: Matrix, b: Matrix) -> list[Matrix]:
    """y = x σ(x) · b: dx = b · σ(x) · (1 + x·(1 - σ(x))), db = x σ(x)."""
    d_a, d_b = [], []
    for d_row, a_row, b_row in zip(d, a, b):
        gates = list(map(sigmoid, a_row))
        d_a.append([slope * y * s * (1 + x * (1 - s)) for slope, x, y, s in zip(d_row, a_row, b_row, gates)])
        d_b.append([slope * x * s for slope, x, s in zip(d_row, a_row, gates)])
    return [d_a, d_b]


def add_backward(d: Matrix, a: Matrix, b: Matrix) -> list[Matrix]:
    """Both get it."""
    return [d, d]


BACKWARD = {look_up: look_up_backward, linear: linear_backward, rms_norm: rms_norm_backward,
            rope_heads: rope_heads_backward, attend: attend_backward, swiglu: swiglu_backward, add: add_backward}


class Tape:
    """Runs operations and remembers them: forward(tokens, run=tape), then tape.backward(logits, d_logits)."""

    def __init__(self):
        self.steps: list[tuple] = []

    def __call__(self, operation: Callable, *inputs):
        output = operation(*inputs)
        self.steps.append((operation, inputs, output))
        return output

    def backward(self, output: Matrix, d_output: Matrix) -> dict[int, Matrix | Vector]:
        """{id(array): its gradient} for every array the output was made from that no operation made."""
        gradients = {id(output): d_output}
        for operation, inputs, result in reversed(self.steps):
            for array, d in zip(inputs, BACKWARD[operation](gradients.pop(id(result)), *inputs)):
                gradients[id(array)] = add(gradients[id(array)], d) if id(array) in gradients else d
        return gradients


def cross_entropy(logits: Matrix, targets: Sequence[int]) -> tuple[float, Matrix]:
    """Mean of -log softmax(logits)[target] in nats, and its gradient in the logits."""
    p = [softmax(row) for row in logits]
    loss = -sum(math.log(row[target]) for row, target in zip(p, targets)) / len(targets)
    return loss, [[(value - (i == target)) / len(targets) for i, value in enumerate(row)]
                  for row, target in zip(p, targets)]


class Adam:
    """Kingma & Ba 2015, arXiv:1412.6980: steps scaled by running means of the gradient and of its square."""

    def __init__(self, weights: dict[str, Matrix | Vector], beta1: float = 0.7, beta2: float = 0.95):
        self.rows = {name: w if isinstance(w[0], list) else [w] for name, w in weights.items()}
        self.beta1, self.beta2, self.steps = beta1, beta2, 0
        self.m, self.v = ({name: [[0.0] * len(row) for row in rows] for name, rows in self.rows.items()}
                          for _ in range(2))

    def step(self, gradients: dict[str, Matrix | Vector], rate: float) -> None:
        """Change the weights, in place."""
        self.steps += 1
        b1, b2, c1, c2 = self.beta1, self.beta2, 1 - self.beta1, 1 - self.beta2
        rate, unbias = rate / (1 - b1 ** self.steps), 1 / (1 - b2 ** self.steps)
        for name, gradient in gradients.items():
            d_rows = gradient if isinstance(gradient[0], list) else [gradient]
            for w, d, m, v in zip(self.rows[name], d_rows, self.m[name], self.v[name]):
                m[:] = [b1 * a + c1 * slope for a, slope in zip(m, d)]
                v[:] = [b2 * a + c2 * slope * slope for a, slope in zip(v, d)]
                w[:] = [x - rate * a / (math.sqrt(b * unbias) + 1e-8) for x, a, b in zip(w, m, v)]


def init_weights(config: Config, rng: random.Random) -> dict[str, Matrix | Vector]:
    """Embeddings of size 1, matrices 1/√in, half of that where they write to the residual stream, gains of 1."""
    weights: dict[str, Matrix | Vector] = {}
    for name, shape in config.shapes().items():
        size = 1.0 if name == "tok_embeddings" else shape[-1] ** -0.5 * (0.5 if name.endswith(("wo", "w2")) else 1)
        weights[name] = ([1.0] * shape[0] if len(shape) == 1 else
                         [[rng.gauss(0, size) for _ in range(shape[1])] for _ in range(shape[0])])
    return weights


def train(config: Config, ids: Sequence[int], rng: random.Random, steps: int, length: int,
          learning_rate: float = 0.02) -> tuple[Llama, list[float]]:
    """A Llama that has read ids, length tokens a step, from the start again at the end; the loss of each step.

    The learning rate rises over 10 steps and falls to 0. Progress goes to stderr where that is a terminal.
    """
    model, losses = Llama(config, init_weights(config, rng)), []
    adam, show = Adam(model.weights), sys.stderr is not None and sys.stderr.isatty()
    for step in range(steps):
        start = step * length % (len(ids) - length)
        tape = Tape()
        logits = model.forward(ids[start:start + length], run=tape)
        loss, d_logits = cross_entropy(logits, ids[start + 1:start + length + 1])
        gradients = tape.backward(logits, d_logits)
        adam.step({name: gradients[id(w)] for name, w in model.weights.items()},
                  learning_rate * min(1, (step + 1) / 10) * (1 - step / steps))
        losses.append(loss)
        if show:
            print(f"\rtraining the tiny Llama: step {step + 1} of {steps}, loss {loss:.2f} ", end="", file=sys.stderr)
    if show:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return model, losses


def rope(x: Matrix, positions: Sequence[int], base: float = 10000.0) -> Matrix:
    """Rotate row r of x [n][d] to positions[r] -> [n][d]. ValueError if d is odd or the lengths differ."""
    d = len(x[0]) if x else 0
    if d % 2 or len(positions) != len(x):
        raise ValueError(f"x must have an even number of channels and one position a row, not {d} channels, "
                         f"{len(x)} rows and {len(positions)} positions")
    thetas = [base ** (-2 * m / d) for m in range(d // 2)]
    out = []
    for row, p in zip(x, positions):
        turned = [complex(a, b) * cmath.rect(1.0, p * theta) for a, b, theta in zip(row[::2], row[1::2], thetas)]
        out.append([part for z in turned for part in (z.real, z.imag)])
    return out


def split_heads(m: Matrix, n_heads: int) -> list[Matrix]:
    """[n][n_heads·head_dim] -> n_heads matrices [n][head_dim]."""
    width = len(m[0]) if m else 0
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"n_heads must divide the {width} channels, and {n_heads} does not")
    head_dim = width // n_heads
    return [[row[h * head_dim:(h + 1) * head_dim] for row in m] for h in range(n_heads)]


def concat(*blocks: Matrix) -> Matrix:
    """Side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [[value for part in rows for value in part] for rows in zip(*blocks)]


# What the short runs add: straight through, the gradient of what w was rounded to is taken for w's (section 10);
# a frozen w has none, and y = x wᵀ leaves dx = d w (section 11).
BACKWARD |= {ternary_weights: lambda d, w: [d], frozen_linear: lambda d, x, w: [linear(d, list(zip(*w)))]}

# ---------------------------------------------------------------------------------------------------

SECTIONS = [
    ("Numbers in few bits", show_numbers, [quantize, Quantized, FloatFormat]),
    ("Granularity", show_granularity, [quantize, lay_grids]),
    ("Bytes for real", show_bytes, [pack_int4, unpack_int4, pack_bits]),
    ("NF4 and double quantization", show_nf4, [nf4_codebook, quantize_nf4, double_quantize]),
    ("llama.cpp's blocks", show_gguf, [q8_0_encode, q4_0_encode, q4_k_encode, q4_k_decode]),
    ("Activations too", show_activations, [int8_matmul, static_scale, llm_int8_matmul, smoothquant_scales,
                                           move_scales]),
    ("GPTQ", show_gptq, [hessian_of, gptq, upper_factor]),
    ("AWQ", show_awq, [awq_search, try_exponents, awq_fold]),
    ("HQQ, SqueezeLLM", show_hqq_squeezellm, [hqq, weighted_kmeans, squeezellm, sensitivities]),
    ("One bit and a bit", show_one_bit, [bitnet_signs, ternary_codes, straight_through, ternary_product]),
    ("Training in few bits", show_training, [with_adapters, by_qlora, QGaLore, subspace]),
    ("Mixed precision", show_mixed, [measure_sensitivity, assign_bits]),
    ("The table", show_table, [everything, measure]),
]


def outlier_knob(text: str) -> tuple[int, float]:
    """An argparse type: channels,size."""
    match = re.fullmatch(r"([0-9]{1,2}),([0-9]{1,4}(?:\.[0-9]{1,3})?)", text)
    if not match or not 0 <= int(match[1]) <= 16 or not 1 <= float(match[2]) <= 1000:
        raise ArgumentTypeError(f"must be a number of channels up to 16 and a size from 1 to 1000, as in 3,32, not "
                                f"{text!r}")
    return int(match[1]), float(match[2])


def fraction(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    if not re.fullmatch(r"[01](\.[0-9]{1,6})?|\.[0-9]{1,6}", text) or float(text) > 1:
        raise ArgumentTypeError(f"must be a number from 0 to 1, not {text!r}")
    return float(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; the exit status."""
    parser = common_parser("microquant", "One tiny Llama, quantized by the methods that people deploy.", len(SECTIONS))
    parser.add_argument("--bits", metavar="N", type=whole_number(2, 8), default=BITS,
                        help=f"bits of the low-bit formats (default {BITS})")
    parser.add_argument("--group-size", metavar="N", type=whole_number(1, 64), default=GROUP_SIZE,
                        help=f"weights that share a scale, where there are groups (default {GROUP_SIZE})")
    parser.add_argument("--calibration-tokens", metavar="N", type=whole_number(1, 256), default=CALIBRATION_TOKENS,
                        help=f"tokens that the calibrated methods see (default {CALIBRATION_TOKENS})")
    parser.add_argument("--alpha", metavar="X", type=fraction, default=ALPHA,
                        help=f"SmoothQuant's share of the difficulty for the weights, 0 to 1 (default {ALPHA})")
    parser.add_argument("--outliers", metavar="N,SIZE", type=outlier_knob, default=OUTLIERS,
                        help=f"channels planted as outliers, and how many times larger (default "
                             f"{OUTLIERS[0]},{OUTLIERS[1]:g})")
    parser.add_argument("--prompt", default=PROMPT, help=f"what the samples continue (default: {PROMPT!r})")
    knobs = parser.parse_args(argv)
    try:
        fits = 0 < len(word_tokenizer().encode(knobs.prompt)) <= 32
    except (KeyError, ValueError):  # a part of a word, or a character, that the vocabulary lacks
        fits = False
    if not fits:
        parser.error(f"argument --prompt: must be 1 to 32 words of The House That Jack Built, not {knobs.prompt[:40]!r}")
    if knobs.group_size < 8 or knobs.calibration_tokens > 2 * CALIBRATION_TOKENS:  # the knobs that take time
        weights = sum(map(math.prod, model_config(len(word_tokenizer().vocab)).shapes().values()))
        learned = STEPS * LENGTH + (TERNARY_STEPS + 3 * FEW_STEPS) * PIECE + knobs.calibration_tokens
        read = 60 * EVALUATION_TOKENS + 10 * knobs.calibration_tokens
        announce(weights * (3 * learned + read + 2000 / knobs.group_size))  # a small group costs what 2,000 tokens do
    return run_sections(SECTIONS, knobs, "python microquant.py --section 2,7,8 --bits 3")


if __name__ == "__main__":
    sys.exit(main())
