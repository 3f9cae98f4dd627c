"""How near to Python's own limit the scripts are: one table, measured in this run. `python tests/benchmark.py`

The floor is what a multiply-add takes in a long dot(); the last column says how many floors each thing takes. Machines
differ and are noisy: quote ratios from one run, never single times.
"""

import math
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import microattention  # noqa: E402
import microbeam  # noqa: E402
import microflash  # noqa: E402
import microkv  # noqa: E402
import microquant  # noqa: E402


def best(function, repeats=3):
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def multiply_adds(module, function):
    """How many multiply-adds function() does in its script's dot(), counted there."""
    count, dot = 0, module.dot

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


def peak_memory(function):
    """Bytes of Python's heap that function() takes at its peak, beyond what was there before."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def matrix(rng, rows, columns):
    return [[rng.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]


def row(what, figure, note="", floors=None):
    print(f"{what:<46}{figure:>16}  {note:<24}" + (f"{floors:>7.1f}" if floors else ""), flush=True)


# ----------------------------------------------------------------------- the trainer to compare with

class Value:
    """A number that remembers what it was made from, as in micrograd and microgpt: a graph of scalars."""
    __slots__ = ("data", "grad", "parents", "slopes")

    def __init__(self, data, parents=(), slopes=()):
        self.data, self.grad, self.parents, self.slopes = data, 0.0, parents, slopes

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
        order, seen, stack = [], set(), [(self, False)]
        while stack:
            node, done = stack.pop()
            if done:
                order.append(node)
            elif node not in seen:
                seen.add(node)
                stack.append((node, True))
                stack.extend((parent, False) for parent in node.parents)
        self.grad = 1.0
        for node in reversed(order):
            for parent, slope in zip(node.parents, node.slopes):
                parent.grad += slope * node.grad


def total(values):
    values = iter(values)
    result = next(values)
    for value in values:
        result = result + value
    return result


def product(w, x):
    return [total(a * b for a, b in zip(unit, x)) for unit in w]


def normed(x, gain, eps):
    scale = (total(value * value for value in x) * (1 / len(x)) + eps) ** -0.5
    return [value * scale * g for value, g in zip(x, gain)]


def shares(scores):
    exps = [(score + -max(s.data for s in scores)).exp() for score in scores]
    inverse = total(exps) ** -1
    return [e * inverse for e in exps]


def turned(x, position, head_dim, base):
    out = []
    for i in range(0, len(x), 2):
        angle = position * base ** (-(i % head_dim) / head_dim)
        a, b, c, s = x[i], x[i + 1], math.cos(angle), math.sin(angle)
        out += [a * c + b * -s, a * s + b * c]
    return out


def scalar_loss(config, w, tokens, targets):
    """The mean loss of the tiny Llama with Values for weights, token by token as microgpt does it."""
    c, cache, losses = config, [([], []) for _ in range(config.n_layers)], []
    for position, (token, target) in enumerate(zip(tokens, targets)):
        x = w["tok_embeddings"][token]
        for layer in range(c.n_layers):
            part = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"layers.{layer}.")}
            h = normed(x, part["attention_norm"], c.norm_eps)
            q = turned(product(part["attention.wq"], h), position, c.head_dim, c.rope_base)
            keys, values = cache[layer]
            keys.append(turned(product(part["attention.wk"], h), position, c.head_dim, c.rope_base))
            values.append(product(part["attention.wv"], h))
            out = []
            for head in range(c.n_heads):
                mine = slice(head * c.head_dim, (head + 1) * c.head_dim)
                first = head // (c.n_heads // c.n_kv_heads) * c.head_dim
                theirs = slice(first, first + c.head_dim)
                weights = shares([s * c.head_dim ** -0.5 for s in product([k[theirs] for k in keys], q[mine])])
                out += [total(p * v for p, v in zip(weights, column)) for column in zip(*(v[theirs] for v in values))]
            x = [a + b for a, b in zip(x, product(part["attention.wo"], out))]
            h = normed(x, part["ffn_norm"], c.norm_eps)
            gates = [a * (((a * -1).exp() + 1) ** -1) * b
                     for a, b in zip(product(part["feed_forward.w1"], h), product(part["feed_forward.w3"], h))]
            x = [a + b for a, b in zip(x, product(part["feed_forward.w2"], gates))]
        losses.append(shares(product(w["output"], normed(x, w["norm"], c.norm_eps)))[target].log() * -1)
    return total(losses) * (1 / len(losses))


def scalar_step(config, weights, tokens, targets):
    """A step of training with a graph of scalars: its loss and its gradients."""
    def wrap(w):
        return [wrap(part) for part in w] if isinstance(w, list) else Value(w)

    def slopes(w):
        return [slopes(part) for part in w] if isinstance(w, list) else w.grad
    values = {name: wrap(w) for name, w in weights.items()}
    loss = scalar_loss(config, values, tokens, targets)
    loss.backward()
    return loss.data, {name: slopes(w) for name, w in values.items()}


def matrix_step(model, tokens, targets):
    """The same with the scripts' tape over matrices."""
    tape = microkv.Tape()
    logits = model.forward(tokens, run=tape)
    loss, d_logits = microkv.cross_entropy(logits, targets)
    gradients = tape.backward(logits, d_logits)
    return loss, {name: gradients[id(w)] for name, w in model.weights.items()}


# ---------------------------------------------------------------------------------------- the table

LAUNCHER = """
import os, sys
pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, sys.argv[1]])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss, file=sys.stderr)
sys.exit(os.waitstatus_to_exitcode(status))
"""  # a small process starts the script: what a large one starts counts its starter's memory as its own


def whole_scripts():
    for script in sorted(ROOT.glob("micro*.py")):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-I", "-c", LAUNCHER, str(script)], stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, check=True)
        megabytes = int(done.stderr) / (2**20 if sys.platform == "darwin" else 2**10)
        row(f"{script.name}, whole", f"{time.perf_counter() - start:.1f} s", f"peak {megabytes:.0f} MB")


def training(floor, length=32, few=8):
    tokenizer = microkv.Tokenizer.train(microkv.TEXT, microkv.VOCAB_SIZE)
    ids = tokenizer.encode(microkv.TEXT)
    config = microkv.Config(len(tokenizer.vocab), **microkv.SIZES)
    model = microkv.Llama(config, microkv.init_weights(config, random.Random(0)))
    n = sum(map(math.prod, config.shapes().values()))
    gradients = matrix_step(model, ids[:length], ids[1:length + 1])[1]
    adam = microkv.Adam(model.weights)
    step = best(lambda: matrix_step(model, ids[:length], ids[1:length + 1]))
    update = best(lambda: adam.step(gradients, 0.0))
    work = multiply_adds(microkv, lambda: matrix_step(model, ids[:length], ids[1:length + 1]))
    fast = (step + update) / length / n
    row(f"training a Llama of {n:,} parameters", f"{fast * 1e6:.3f} µs", "a token and parameter", (step + update) / work / floor)
    row("  of that, the optimizer", f"{update / length / n * 1e6:.3f} µs")
    ours, start = matrix_step(model, ids[:few], ids[1:few + 1]), time.perf_counter()
    theirs = scalar_step(config, model.weights, ids[:few], ids[1:few + 1])
    slow = (time.perf_counter() - start) / few / n
    rows = [list(zip(*(g[name] if isinstance(g[name][0], list) else [g[name]] for g in (ours[1], theirs[1])))) for name in ours[1]]
    gap = max(abs(a - b) for pairs in rows for p, q in pairs for a, b in zip(p, q))
    row("  as a graph of scalars, without optimizer", f"{slow * 1e6:.3f} µs", f"{slow / fast:.0f} times as long",
        slow * few * n / (work * few / length) / floor)
    row("  the two agree: gradients differ by", f"{gap:.0e}")


def attention_by_zip(q, k, v):
    """Causal attention with its inner loops as generator expressions over zip."""
    scale, columns, out = len(q[0]) ** -0.5, list(zip(*v)), []
    for i, query in enumerate(q):
        scores = [sum(a * b for a, b in zip(query, key)) * scale for key in k[:i + 1]]
        weights = microattention.softmax(scores)
        out.append([sum(w * x for w, x in zip(weights, column)) for column in columns])
    return out


def kernels(floor, n=256, d=64):
    rng = random.Random(0)
    q, k, v = (matrix(rng, n, d) for _ in range(3))

    def report(what, module, function, more=0):
        seconds, work = best(function), multiply_adds(module, function) + more
        row(what, f"{seconds / work * 1e9:.1f} ns", "a multiply-add", seconds / work / floor)
        return seconds
    fast = report(f"attention, causal, n = {n}, d = {d}", microattention, lambda: microattention.attention(q, k, v))
    slow = best(lambda: attention_by_zip(q, k, v))
    row("  with generator expressions instead of dot", f"{slow / fast:.1f} times", "as long")
    report(f"flash attention, causal, tiles of 32, n = {n}", microflash,
           lambda: microflash.flash_attention(q, k, v, block_q=32, block_k=32, causal=True))
    w, x = matrix(rng, 160, 64), matrix(rng, 64, 64)
    hessian = microquant.hessian_of(x)
    report("GPTQ, 160 × 64, 4 bits in groups of 32", microquant,
           lambda: microquant.gptq(w, hessian, 4, granularity=32), len(w) * 64 * 63 // 2)  # the updates to the right


def flash_memory(d=16, block=64):
    for n in (128, 256, 512, 1024):
        q, k, v = (matrix(random.Random(seed), n, d) for seed in range(3))
        standard, flash = (peak_memory(run) / 2**20 for run in (
            lambda: microflash.standard_attention(q, k, v),
            lambda: microflash.flash_attention(q, k, v, block_q=block, block_k=block)))
        row(f"memory at n = {n:,}, d = {d}: flash, tiles of {block}", f"{flash:.1f} MB", f"standard: {standard:.1f} MB")


def decoding(n=48):
    llama, draft = (microbeam.Llama(config, microbeam.init_weights(config, random.Random(0))) for config in (
        microbeam.Config(microbeam.VOCAB_SIZE, **sizes) for sizes in (microbeam.TARGET, microbeam.DRAFT)))
    prompt = microbeam.rhyme()[0].encode(microbeam.PROMPT)
    slow = best(lambda: microbeam.greedy(lambda tokens: llama.forward(tokens)[-1], prompt, n), 1)
    fast = best(lambda: microbeam.greedy(microbeam.CachedModel(llama), prompt, n))
    row(f"{n} tokens, greedy, with a KV cache", f"{fast * 1e3:.0f} ms", f"without: {slow * 1e3:.0f} ms")


def main():
    a, b = matrix(random.Random(0), 2, 100_000)
    floor = best(lambda: microkv.dot(a, b), 7) / len(a)
    print(f"Python {sys.version.split()[0]}")
    print(f"{'measured':<46}{'figure':>16}  {'':<24}{'floors':>7}")
    row("the floor: a long dot", f"{floor * 1e9:.1f} ns", "a multiply-add", 1.0)
    whole_scripts()
    training(floor)
    kernels(floor)
    flash_memory()
    decoding()


if __name__ == "__main__":
    main()
