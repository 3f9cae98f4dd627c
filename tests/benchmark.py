"""How fast the scripts are, measured in this run: `python tests/benchmark.py`. Quote ratios, not single times."""

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
import microquant  # noqa: E402


def best(function, repeats=5):
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def attention_by_zip(q, k, v):
    """Causal attention with its inner loops as generator expressions over zip."""
    scale, columns, out = len(q[0]) ** -0.5, list(zip(*v)), []
    for i, query in enumerate(q):
        scores = [sum(a * b for a, b in zip(query, key)) * scale for key in k[:i + 1]]
        weights = microattention.softmax(scores)
        out.append([sum(w * x for w, x in zip(weights, column)) for column in columns])
    return out


def attention_by_index(q, k, v):
    """The same as the equation is written, with indices: Σ_c q[i][c]·k[j][c] and Σ_j w[j]·v[j][c]."""
    d, d_v, out = len(q[0]), len(v[0]), []
    for i in range(len(q)):
        scores = [sum(q[i][c] * k[j][c] for c in range(d)) / d ** 0.5 for j in range(i + 1)]
        weights = microattention.softmax(scores)
        out.append([sum(weights[j] * v[j][c] for j in range(i + 1)) for c in range(d_v)])
    return out


def whole_scripts():
    """Seconds of importing and of running each script, in a process of its own, start-up of Python apart."""
    empty = best(lambda: subprocess.run([sys.executable, "-c", "pass"], check=True))
    print(f"{'script':<22}{'import':>10}{'whole run':>12}     (Python {sys.version.split()[0]}; its own start-up, "
          f"{empty:.2f} s, taken off)")
    for script in sorted(ROOT.glob("micro*.py")):
        imported = best(lambda: subprocess.run([sys.executable, "-c", f"import {script.stem}"], cwd=ROOT, check=True))
        whole = best(lambda: subprocess.run([sys.executable, script], check=True, stdout=subprocess.DEVNULL), 3)
        print(f"{script.name:<22}{imported - empty:>8.3f} s{whole - empty:>10.2f} s")


def attention():
    """ns per multiply-add of attention, beside the same in generator expressions and a long dot."""
    n, d, rng = 256, 64, random.Random(0)
    q, k, v = (microattention.random_matrix(rng, n, d) for _ in range(3))
    pairs = n * (n + 1) // 2 * 2 * d
    fast = best(lambda: microattention.attention(q, k, v))
    a, b = (microattention.random_matrix(rng, 1, 100_000)[0] for _ in "ab")
    floor = best(lambda: microattention.dot(a, b)) / len(a)
    print(f"\ncausal attention, n = {n}, d = {d}: {fast * 1e3:.0f} ms, {fast / pairs * 1e9:.1f} ns a multiply-add; "
          f"a long dot takes {floor * 1e9:.1f} ns")
    for name, other in (("zip", attention_by_zip), ("indices", attention_by_index)):
        slow = best(lambda: other(q, k, v), 3)
        print(f"with generator expressions over {name}: {slow * 1e3:.0f} ms, {slow / fast:.1f} times as long")


def peak_memory(function):
    """Bytes of Python's heap that function() takes at its peak, beyond what was there before."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def flash(d=64, block=128):
    """Memory and time of flash_attention beside standard_attention, written with the same primitives."""
    print(f"\nflash and standard attention, d = {d}, tiles of {block} x {block}, no mask: peak memory beside the inputs, time")
    print(f"{'n':>5}{'standard':>12}{'flash':>12}{'standard':>12}{'flash':>10}{'ratio':>8}")
    blocks, before = dict(block_q=block, block_k=block), None
    for n in (256, 512, 1024, 2048):
        q, k, v = (microflash.random_matrix(random.Random(seed), n, d) for seed in range(3))
        runs = (lambda: microflash.standard_attention(q, k, v)), (lambda: microflash.flash_attention(q, k, v, **blocks))
        memory = [peak_memory(run) for run in runs]
        seconds = [best(run, 3 if n < 1024 else 1) for run in runs]
        growth = "" if before is None else "   memory grew by " + " and ".join(f"{a / b:.1f}" for a, b in zip(memory, before))
        print(f"{n:>5}" + "".join(f"{b / 2**20:>9.2f} MB" for b in memory) + f"{seconds[0]:>10.2f} s{seconds[1]:>8.2f} s"
              f"{seconds[1] / seconds[0]:>8.2f}{growth}")
        before = memory


def quantization():
    """ns per weight of the quantizers, and of training, evaluating and compressing the tiny Llama."""
    rng = random.Random(0)
    w, x = ([[rng.gauss(0, 0.1) for _ in range(64)] for _ in range(rows)] for rows in (160, 64))
    n, hessian = sum(map(len, w)), microquant.hessian_of(x)
    print(f"\na matrix of {n:,} weights at 4 bits in groups of 32:")
    for name, method in (("round to nearest", lambda: microquant.quantize(w, 4, granularity=32)),
                         ("NF4", lambda: microquant.quantize_nf4(w)),
                         ("HQQ", lambda: microquant.hqq(w, 4, granularity=32)),
                         ("GPTQ", lambda: microquant.gptq(w, hessian, 4, granularity=32)),
                         ("AWQ, 20 exponents", lambda: microquant.awq_search(w, x[:32], 4, granularity=32))):
        seconds = best(method, 3)
        print(f"  {name:<20}{seconds * 1e3:>8.1f} ms{seconds / n * 1e9:>10.0f} ns a weight")


def decoding():
    """Seconds of training the tiny Llama, and of decoding with it: with a cache, without one, speculatively."""
    start = time.perf_counter()
    llama = microbeam.trained_llama(0, microbeam.STEPS, **microbeam.TARGET)
    draft = microbeam.trained_llama(0, microbeam.STEPS * 2 // 3, **microbeam.DRAFT)
    print(f"\ntraining the target and the draft of microbeam: {time.perf_counter() - start:.1f} s")
    prompt, n = microbeam.rhyme()[0].encode(microbeam.PROMPT), 48
    ways = {"greedy, the whole text read again for each token":
            lambda: microbeam.greedy(lambda tokens: llama.forward(tokens)[-1], prompt, n),
            "greedy, with a KV cache": lambda: microbeam.greedy(microbeam.CachedModel(llama), prompt, n),
            "speculative, gamma 4": lambda: microbeam.speculative_greedy(
                microbeam.CachedModel(llama), microbeam.CachedModel(draft), prompt, n, gamma=4)}
    for name, way in ways.items():
        print(f"{n} tokens, {name}: {best(way, 3) * 1e3:.0f} ms")
    print("(Pure Python has no idle arithmetic, so a pass over five tokens costs five: speculation pays in passes, not here.)")


if __name__ == "__main__":
    whole_scripts()
    attention()
    flash()
    quantization()
    decoding()
