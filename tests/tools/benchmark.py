"""Measure how near the scripts come to Python's own limit, and print one table.

    python3 tests/tools/benchmark.py

The limit, called the floor here, is the time of one multiply-add in a long dot(). The last column
says how many floors each multiply-add takes. Times are of the fastest of some runs, in seconds of
the processor, so that other processes count less. Still, machines differ and are noisy: quote
ratios from one run, never single times.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import time
import tracemalloc
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import microattention
import microbeam
import microflash
import microkv
import microquant
from tests.tools.exercise import NAMES, ROOT, told_in_one_line

# ------------------------------------------------------------------------------------ measuring

def best(function: Callable, repeats: int = 5) -> float:
    """Return the seconds of the fastest of some runs."""
    return min(seconds_of(function) for _ in range(repeats))


def seconds_of(function: Callable) -> float:
    """Return the seconds of one run, without those in which other processes had the processor."""
    start = time.process_time()
    function()
    return time.process_time() - start


def multiply_adds(module, function: Callable) -> int:
    """Return how many multiply-adds function() does in the dot() of its script."""
    count = 0
    dot = module.dot

    def counted(a, b):
        nonlocal count
        count += len(a)
        return dot(a, b)

    module.dot = counted
    try:
        function()
    finally:
        module.dot = dot
    return count


def peak_megabytes(function: Callable) -> float:
    """Return how much Python's heap grows at most while function() runs."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 2**20


def gaussian(rng: random.Random, rows: int, columns: int) -> list[list[float]]:
    """Return a matrix of random numbers."""
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]


def print_row(what: str, figure: str, note: str = "", floors: float | None = None) -> None:
    """Print one row of the table."""
    last = "" if floors is None else f"{floors:>7.1f}"
    print(f"{what:<46}{figure:>16}  {note:<24}{last}".rstrip(), flush=True)


# ------------------------------------------------------------------- the trainer to compare with

class Value:
    """A number that remembers what it was made from, as in micrograd: a graph of scalars."""

    __slots__ = ("data", "grad", "parents", "slopes")

    def __init__(self, data, parents=(), slopes=()):
        self.data = data
        self.grad = 0.0
        self.parents = parents
        self.slopes = slopes  # the derivatives of this value by its parents

    def __add__(self, other):
        if not isinstance(other, Value):
            return Value(self.data + other, (self,), (1.0,))
        return Value(self.data + other.data, (self, other), (1.0, 1.0))

    def __mul__(self, other):
        if not isinstance(other, Value):
            return Value(self.data * other, (self,), (other,))
        return Value(self.data * other.data, (self, other), (other.data, self.data))

    def __pow__(self, power):
        return Value(self.data ** power, (self,), (power * self.data ** (power - 1),))

    def exp(self):
        result = math.exp(self.data)
        return Value(result, (self,), (result,))

    def log(self):
        return Value(math.log(self.data), (self,), (1 / self.data,))

    def backward(self):
        """Set .grad of every value that this one was made from: d self / d value."""
        self.grad = 1.0
        for node in reversed(self.parents_first()):
            for parent, slope in zip(node.parents, node.slopes):
                parent.grad += slope * node.grad

    def parents_first(self) -> list[Value]:
        """Return this value and all that it was made from, each after its parents."""
        order = []
        seen = set()
        stack = [(self, False)]
        while stack:
            node, parents_done = stack.pop()
            if parents_done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((parent, False) for parent in node.parents)
        return order


def total(values):
    """Return the sum of some Values."""
    values = iter(values)
    result = next(values)
    for value in values:
        result = result + value
    return result


def product(w, x):
    """Return W x."""
    return [total(a * b for a, b in zip(unit, x)) for unit in w]


def rms_norm(x, gain, eps):
    """Return x divided by its root mean square, times gain."""
    mean_square = total(value * value for value in x) * (1 / len(x))
    scale = (mean_square + eps) ** -0.5
    return [value * scale * g for value, g in zip(x, gain)]


def softmax(scores):
    """Return exp(s) / Σ exp(s)."""
    largest = max(score.data for score in scores)
    exps = [(score + -largest).exp() for score in scores]
    inverse = total(exps) ** -1
    return [e * inverse for e in exps]


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return ((x * -1).exp() + 1) ** -1


def rope(x, position, head_dim, base):
    """Return x with its adjacent pairs rotated by position."""
    out = []
    for i in range(0, len(x), 2):
        angle = position * base ** (-(i % head_dim) / head_dim)
        cos = math.cos(angle)
        sin = math.sin(angle)
        a, b = x[i:i + 2]
        out += [a * cos + b * -sin, a * sin + b * cos]
    return out


def attend(q, keys, values, config):
    """Return the output of all heads for one query: it sees all keys."""
    out = []
    group = config.n_heads // config.n_kv_heads
    for head in range(config.n_heads):
        start = head * config.head_dim
        kv_start = head // group * config.head_dim
        query = q[start:start + config.head_dim]
        head_keys = [key[kv_start:kv_start + config.head_dim] for key in keys]
        head_values = [value[kv_start:kv_start + config.head_dim] for value in values]
        scores = [score * config.head_dim ** -0.5 for score in product(head_keys, query)]
        weights = softmax(scores)
        out += product(zip(*head_values), weights)
    return out


def add(a, b):
    """Return a + b."""
    return [x + y for x, y in zip(a, b)]


def scalar_loss(config, w, tokens):
    """Return the mean loss of the tiny Llama whose weights are Values, one token at a time."""
    caches = [([], []) for _ in range(config.n_layers)]
    losses = []
    for position, (token, target) in enumerate(zip(tokens, tokens[1:])):
        x = w["tok_embeddings"][token]
        for layer, (keys, values) in enumerate(caches):
            prefix = f"layers.{layer}."
            h = rms_norm(x, w[prefix + "attention_norm"], config.norm_eps)
            q = product(w[prefix + "attention.wq"], h)
            k = product(w[prefix + "attention.wk"], h)
            v = product(w[prefix + "attention.wv"], h)
            q = rope(q, position, config.head_dim, config.rope_base)
            keys.append(rope(k, position, config.head_dim, config.rope_base))
            values.append(v)
            out = attend(q, keys, values, config)
            x = add(x, product(w[prefix + "attention.wo"], out))

            h = rms_norm(x, w[prefix + "ffn_norm"], config.norm_eps)
            gate = product(w[prefix + "feed_forward.w1"], h)
            up = product(w[prefix + "feed_forward.w3"], h)
            hidden = [a * sigmoid(a) * b for a, b in zip(gate, up)]
            x = add(x, product(w[prefix + "feed_forward.w2"], hidden))
        logits = product(w["output"], rms_norm(x, w["norm"], config.norm_eps))
        losses.append(softmax(logits)[target].log() * -1)
    return total(losses) * (1 / len(losses))


def apply(function, w):
    """Return a vector or matrix with function applied to each number."""
    return [apply(function, part) for part in w] if isinstance(w, list) else function(w)


def scalar_step(config, weights, tokens):
    """Return the loss and {name: gradient} of a step of training, by a graph of scalars."""
    values = {name: apply(Value, w) for name, w in weights.items()}
    loss = scalar_loss(config, values, tokens)
    loss.backward()
    gradients = {name: apply(lambda value: value.grad, w) for name, w in values.items()}
    return loss.data, gradients


def matrix_step(config, weights, tokens):
    """Return the loss and {name: gradient} of a step of training, as the scripts compute them."""
    return microkv.loss_and_gradients(config, weights, tokens)


def numbers_in(w) -> list[float]:
    """Return all numbers of a vector or matrix."""
    return [x for part in w for x in numbers_in(part)] if isinstance(w, list) else [w]


def largest_gap(a: dict, b: dict) -> float:
    """Return the largest difference between two dictionaries of gradients."""
    gaps = []
    for name in a:
        pairs = zip(numbers_in(a[name]), numbers_in(b[name]), strict=True)
        gaps += [abs(x - y) for x, y in pairs]
    return max(gaps)


# ------------------------------------------------------------------------------------ the table

# Starts a script and prints its peak memory. The system counts what a process inherits from its
# starter as the process's own memory, so that a small process has to start it.
LAUNCHER = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, sys.argv[1]])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measure_whole_scripts() -> None:
    """Print the seconds and the peak memory of each script's whole run."""
    maxrss_per_megabyte = 2**20 if sys.platform == "darwin" else 2**10
    for name in NAMES:
        command = [sys.executable, "-I", "-c", LAUNCHER, str(ROOT / f"{name}.py")]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                              check=True)
        seconds = time.perf_counter() - start
        megabytes = int(done.stderr) / maxrss_per_megabyte
        print_row(f"{name}.py, whole", f"{seconds:.1f} s", f"peak {megabytes:.0f} MB")


def measure_training(floor: float) -> None:
    """Print the time of a step of training on texts of some lengths, and by a graph of scalars.

    A token of a longer text takes more time, because it attends to more tokens. The graph of
    scalars gets the shortest text, as it is slow.
    """
    tokenizer = microkv.Tokenizer.train(microkv.TEXT, microkv.VOCAB_SIZE)
    ids = tokenizer.encode(microkv.TEXT)
    config = microkv.Config(len(tokenizer.vocab), **microkv.SIZES)
    weights = microkv.init_weights(config, random.Random(0))
    n_parameters = sum(map(math.prod, config.shapes().values()))

    print(f"training a Llama of {n_parameters:,} parameters, a token and parameter:")
    measured = {}
    for length in (8, 32, 128):
        measured[length] = measure_step(config, weights, ids[:length + 1])
        seconds, work = measured[length]
        print_row(f"  gradients, a text of {length} tokens",
                  f"{seconds / length / n_parameters * 1e6:.3f} µs", "", seconds / work / floor)

    tokens = ids[:9]
    seconds, work = measured[8]
    start = time.process_time()
    _, scalar_gradients = scalar_step(config, weights, tokens)
    scalar_seconds = time.process_time() - start
    _, gradients = matrix_step(config, weights, tokens)
    print_row("  by a graph of scalars, a text of 8 tokens",
              f"{scalar_seconds / 8 / n_parameters * 1e6:.3f} µs",
              f"{scalar_seconds / seconds:.0f} times as long", scalar_seconds / work / floor)
    print_row("  the two agree: gradients differ by",
              f"{largest_gap(gradients, scalar_gradients):.0e}")

    adam = microkv.Adam(weights)
    update = best(lambda: adam.step(gradients, 0.0), 15)
    print_row("  the optimizer, once a step", f"{update * 1e3:.1f} ms")


def measure_step(config, weights, tokens) -> tuple[float, int]:
    """Return the seconds and the multiply-adds of the gradients on a text."""
    seconds = best(lambda: matrix_step(config, weights, tokens), 15)
    work = multiply_adds(microkv, lambda: matrix_step(config, weights, tokens))
    return seconds, work


def attention_by_zip(q, k, v):
    """Return causal attention, with generator expressions over zip for its inner loops."""
    scale = len(q[0]) ** -0.5
    columns = list(zip(*v))
    out = []
    for i, query in enumerate(q):
        scores = [sum(a * b for a, b in zip(query, key)) * scale for key in k[:i + 1]]
        weights = microattention.softmax(scores)
        out.append([sum(w * x for w, x in zip(weights, column)) for column in columns])
    return out


def measure_kernel(
    what: str, module, function: Callable, floor: float, other_work: int = 0
) -> float:
    """Print the time of a multiply-add in function(). Return its seconds.

    other_work: multiply-adds that are not done in dot().
    """
    seconds = best(function)
    work = multiply_adds(module, function) + other_work
    print_row(what, f"{seconds / work * 1e9:.1f} ns", "a multiply-add", seconds / work / floor)
    return seconds


def measure_kernels(floor: float, n: int = 256, d: int = 64) -> None:
    """Print the times of attention, flash attention and GPTQ."""
    rng = random.Random(0)
    q = gaussian(rng, n, d)
    k = gaussian(rng, n, d)
    v = gaussian(rng, n, d)

    with_dot = measure_kernel(f"attention, causal, n = {n}, d = {d}", microattention,
                              lambda: microattention.attention(q, k, v), floor)
    by_zip = best(lambda: attention_by_zip(q, k, v))
    print_row("  with generator expressions instead of dot", f"{by_zip / with_dot:.1f} times",
              "as long")

    def flash():
        microflash.flash_attention(q, k, v, block_q=32, block_k=32, causal=True)

    measure_kernel(f"flash attention, causal, tiles of 32, n = {n}", microflash, flash, floor)

    w = gaussian(rng, 160, 64)
    x = gaussian(rng, 64, 64)
    hessian = microquant.hessian_of(x)
    updates = len(w) * 64 * 63 // 2  # each column changes all columns to its right
    measure_kernel("GPTQ, 160 × 64, 4 bits in groups of 32", microquant,
                   lambda: microquant.gptq(w, hessian, 4, granularity=32), floor, updates)


def measure_flash_memory(d: int = 16, block: int = 64) -> None:
    """Print the peak memory of standard and of flash attention for longer and longer inputs."""
    for n in (128, 256, 512, 1024):
        print_flash_memory(n, d, block)


def print_flash_memory(n: int, d: int, block: int) -> None:
    """Print the peak memory of standard and of flash attention for n tokens."""
    q = gaussian(random.Random(0), n, d)
    k = gaussian(random.Random(1), n, d)
    v = gaussian(random.Random(2), n, d)
    standard = peak_megabytes(lambda: microflash.standard_attention(q, k, v))
    flash = peak_megabytes(
        lambda: microflash.flash_attention(q, k, v, block_q=block, block_k=block))
    print_row(f"memory at n = {n:,}, d = {d}: flash, tiles of {block}", f"{flash:.1f} MB",
              f"standard: {standard:.1f} MB")


def measure_decoding(n: int = 48) -> None:
    """Print the time of n new tokens with a KV cache, and without."""
    config = microbeam.Config(microbeam.VOCAB_SIZE, **microbeam.TARGET)
    model = microbeam.Llama(config, microbeam.init_weights(config, random.Random(0)))
    tokenizer = microbeam.Tokenizer.train(microbeam.TEXT, microbeam.VOCAB_SIZE)
    prompt = tokenizer.encode(microbeam.PROMPT)

    def without_cache(tokens):
        return model.forward(tokens)[-1]

    slow = best(lambda: microbeam.greedy(without_cache, prompt, n), 1)
    fast = best(lambda: microbeam.greedy(microbeam.CachedModel(model), prompt, n))
    print_row(f"{n} tokens, greedy, with a KV cache", f"{fast * 1e3:.0f} ms",
              f"without: {slow * 1e3:.0f} ms")


def print_table() -> None:
    """Measure everything and print the table."""
    a, b = gaussian(random.Random(0), 2, 100_000)
    floor = best(lambda: microkv.dot(a, b), 7) / len(a)
    print(f"Python {sys.version.split()[0]}")
    print(f"{'measured':<46}{'figure':>16}  {'':<24}{'floors':>7}")
    print_row("the floor: a long dot", f"{floor * 1e9:.1f} ns", "a multiply-add", 1.0)
    measure_whole_scripts()
    measure_training(floor)
    measure_kernels(floor)
    measure_flash_memory()
    measure_decoding()


def main() -> int:
    parser = ArgumentParser(prog="benchmark.py", description=__doc__,
                            formatter_class=RawDescriptionHelpFormatter)
    parser.parse_args()
    try:
        print_table()
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return told_in_one_line(error, "benchmark.py")


if __name__ == "__main__":
    sys.exit(main())
