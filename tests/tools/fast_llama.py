"""The tiny Llama and its training by numpy, for the tests of findings.

A finding is about a method. It does not depend on the order in which floats are summed, so the
models of its seeds may be trained and asked by numpy. These functions return what the scripts' own
return, up to rounding: tests/test_fast_llama.py compares them with those of each script that has
the model. A script's whole trace is made with its own.
"""

import functools
from collections.abc import Mapping

import numpy as np


def make_fast(monkeypatch, module):
    """Put these functions in the place of a script's own, for one test."""
    monkeypatch.setattr(module.Llama, "forward", forward_of(module.Llama.linear))
    monkeypatch.setattr(module.Adam, "step", step)
    for function in (backward, cross_entropy, linear, linear_backward, swiglu_backward):
        monkeypatch.setattr(module, function.__name__, function)


latest = {}  # {weight: (its rows, the same as an array)} after the latest step of Adam


def in_arrays(weights):
    """Return weights as arrays."""
    return {name: in_array(name, w) for name, w in weights.items()}


def in_array(name, w):
    """Return a weight as an array. If Adam's latest step has made it, it was converted there.

    Comparing lists of the same numbers takes a fraction of converting them.
    """
    rows, array = latest.get(name, (None, None))
    is_matrix = isinstance(w[0], list)
    if rows == (w if is_matrix else [w]):
        return array if is_matrix else array[0]
    return np.array(w)


def keep_arrays(model):
    """Let forward() convert the weights once. They must not change any more."""
    model.arrays = in_arrays(model.weights)


class Read(dict):
    """What each operation read, as lists, each converted when it is first asked for."""

    def __init__(self, arrays):
        super().__init__()
        self.arrays = arrays

    def __missing__(self, name):
        self[name] = self.arrays[name].tolist()
        return self[name]


class Gradients(Mapping):
    """{weight: its gradient}, as lists, each converted when it is first asked for."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.lists = Read(arrays)

    def __getitem__(self, name):
        return self.lists[name]

    def __iter__(self):
        return iter(self.arrays)

    def __len__(self):
        return len(self.arrays)


def linear(x, w):
    """Return y = W x for every row of x."""
    if not x or not x[0]:
        return [[0.0] * len(w) for _ in x]
    return (np.array(x) @ np.array(w).T).tolist()


def linear_backward(d, x, w):
    """y = x wᵀ: return dx and dw."""
    d = np.array(d)
    return (d @ np.array(w)).tolist(), (d.T @ np.array(x)).tolist()


def softmax(scores):
    """Return the softmax of each row."""
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def cross_entropy(logits, targets):
    """Return the mean of -log softmax(logits)[target], and its gradient in the logits."""
    n = len(targets)
    p = softmax(np.array(logits))
    loss = -np.log(p[range(n), targets]).sum() / n
    p[range(n), targets] -= 1
    return float(loss), (p / n).tolist()


def swiglu_backward(d, a, b):
    """y = a σ(a) · b: return da and db."""
    d_a, d_b = swiglu_gradients(np.array(d), np.array(a), np.array(b))
    return d_a.tolist(), d_b.tolist()


def swiglu_gradients(d, a, b):
    """Return the gradients of swiglu_backward() as arrays."""
    s = sigmoid(a)
    return d * b * s * (1 + a * (1 - s)), d * a * s


@functools.cache
def thetas(half, base):
    """Return by how much each pair of channels turns from one position to the next."""
    return base ** (-np.arange(half) / half)


def turn(x, positions, base, backwards=False):
    """Return heads [n][heads][head_dim] with their pairs of channels rotated to the positions."""
    angles = np.multiply.outer(positions, thetas(x.shape[-1] // 2, base))
    rotation = np.exp(-1j * angles if backwards else 1j * angles)
    pairs = np.ascontiguousarray(x).view(complex)  # channels 2m and 2m + 1 as one number
    return (pairs * rotation[:, None, :]).view(float)


def in_heads(x, n_heads):
    """Return x [n][channels] as [n][n_heads][channels of a head]."""
    return x.reshape(len(x), n_heads, -1)


def normed(x, gain, eps):
    """Return gain · x / √(mean(x²) + eps), row by row."""
    return x / rms(x, eps) * gain


def rms(x, eps):
    """Return √(mean(x²) + eps) of each row, as a column."""
    return np.sqrt((x * x).sum(-1, keepdims=True) / x.shape[-1] + eps)


def by_kv_head(x, n_kv_heads):
    """Return x [heads][n][m] as [n_kv_heads][those of the heads that share keys · n][m]."""
    return x.reshape(n_kv_heads, -1, x.shape[-1])


def products(q, k):
    """Return the products of queries [n_q][heads][d] with their keys [n_k][n_kv_heads][d].

    They are [heads][n_q][n_k].
    """
    n_kv_heads = k.shape[1]
    found = by_kv_head(q.swapaxes(0, 1), n_kv_heads) @ k.transpose(1, 2, 0)
    return found.reshape(-1, len(q), len(k))


def weighted_sums(weights, v):
    """Return the sums [n_q][heads][d] of v [n_k][n_kv_heads][d], by weights [heads][n_q][n_k]."""
    sums = by_kv_head(weights, v.shape[1]) @ v.swapaxes(0, 1)
    return sums.reshape(len(weights), -1, v.shape[-1]).swapaxes(0, 1)


def sums_over_queries(weights, q, n_kv_heads):
    """Return the sums [n_k][n_kv_heads][d] of queries [n_q][heads][d], by the same weights."""
    queries = by_kv_head(q.swapaxes(0, 1), n_kv_heads)
    return (by_kv_head(weights, n_kv_heads).swapaxes(1, 2) @ queries).swapaxes(0, 1)


def attention(q, k, v, config, mask):
    """Return (the weights [heads][n_q][n_k], the output [n_q][dim]) of heads in arrays."""
    scores = products(q, k) / np.sqrt(config.head_dim)
    seen = np.tri(len(q), len(k), len(k) - len(q), dtype=bool)
    if mask is not None:
        seen = seen & np.array(mask, dtype=bool)
    weights = softmax(np.where(seen, scores, -np.inf))
    return weights, weighted_sums(weights, v).reshape(len(q), -1)


def forward_of(plain_linear):
    """Return Llama.forward() by numpy, where a subclass may have a linear() of its own."""
    def forward(self, tokens, cache=None, *, positions=None, mask=None):
        c = self.config
        w = getattr(self, "arrays", None) or in_arrays(self.weights)
        read = {}  # by backward(), in arrays
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = range(start, start + len(tokens))
        positions = np.array(positions)

        def apply(name, x):
            read[name] = x
            if type(self).linear is not plain_linear:
                return np.array(self.linear(name, x.tolist()))
            return x @ w[name].T

        def norm(name, x):
            read[name] = x
            return normed(x, w[name], c.norm_eps)

        x = w["tok_embeddings"][list(tokens)]
        for layer in range(c.n_layers):
            prefix = f"layers.{layer}."
            h = norm(prefix + "attention_norm", x)
            q = in_heads(apply(prefix + "attention.wq", h), c.n_heads)
            k = in_heads(apply(prefix + "attention.wk", h), c.n_kv_heads)
            v = apply(prefix + "attention.wv", h)
            turned = turn(np.concatenate([q, k], axis=1), positions, c.rope_base)
            q = turned[:, :c.n_heads]
            k = turned[:, c.n_heads:]
            if cache is not None:
                k, v = cache.update(layer, k.reshape(len(k), -1).tolist(), v.tolist())
                k = in_heads(np.array(k), c.n_kv_heads)
            v = in_heads(np.array(v), c.n_kv_heads)
            weights, attended = attention(q, k, v, c, mask)
            read[prefix + "attention"] = (q, k, v, weights)
            x = x + apply(prefix + "attention.wo", attended)
            h = norm(prefix + "ffn_norm", x)
            gate = apply(prefix + "feed_forward.w1", h)
            up = apply(prefix + "feed_forward.w3", h)
            read[prefix + "feed_forward"] = (gate, up)
            x = x + apply(prefix + "feed_forward.w2", gate * sigmoid(gate) * up)
        logits = apply("output", norm("norm", x))
        self.read = (w, read)
        self.inputs = Read(read)
        return logits.tolist()

    return forward


def backward(model, tokens, d_logits):
    """Return {weight: its gradient} after forward(tokens), from the gradient of the logits."""
    c = model.config
    w, read = model.read
    positions = np.arange(len(tokens))
    gradients = {}

    def linear_back(name, d):
        gradients[name] = d.T @ read[name]
        return d @ w[name]

    def norm_back(name, d):
        x = read[name]
        scale = 1 / rms(x, c.norm_eps)
        unit = x * scale
        gradients[name] = (d * unit).sum(0)
        pull = d * w[name]
        return (pull - unit * (pull * unit).mean(-1, keepdims=True)) * scale

    def attention_back(prefix, d):
        q, k, v, weights = read[prefix]
        d = in_heads(d, c.n_heads)
        d_weights = products(d, v)
        mean = (weights * d_weights).sum(-1, keepdims=True)
        d_scores = weights * (d_weights - mean) / np.sqrt(c.head_dim)
        d_q = weighted_sums(d_scores, k)
        d_k = sums_over_queries(d_scores, q, c.n_kv_heads)
        d_v = sums_over_queries(weights, d, c.n_kv_heads)
        d_q = turn(d_q, positions, c.rope_base, backwards=True)
        d_k = turn(d_k, positions, c.rope_base, backwards=True)
        return (x.reshape(len(x), -1) for x in (d_q, d_k, d_v))

    d = norm_back("norm", linear_back("output", np.array(d_logits)))
    for layer in reversed(range(c.n_layers)):
        prefix = f"layers.{layer}."
        d_hidden = linear_back(prefix + "feed_forward.w2", d)
        d_gate, d_up = swiglu_gradients(d_hidden, *read[prefix + "feed_forward"])
        d_h = linear_back(prefix + "feed_forward.w1", d_gate)
        d_h = d_h + linear_back(prefix + "feed_forward.w3", d_up)
        d = d + norm_back(prefix + "ffn_norm", d_h)
        d_attended = linear_back(prefix + "attention.wo", d)
        d_q, d_k, d_v = attention_back(prefix + "attention", d_attended)
        d_h = linear_back(prefix + "attention.wq", d_q)
        d_h = d_h + linear_back(prefix + "attention.wk", d_k)
        d_h = d_h + linear_back(prefix + "attention.wv", d_v)
        d = d + norm_back(prefix + "attention_norm", d_h)
    table = np.zeros(w["tok_embeddings"].shape)
    np.add.at(table, list(tokens), d)
    gradients["tok_embeddings"] = table
    return Gradients(gradients)


def step(adam, gradients, learning_rate):
    """Do what Adam.step() does: change the weights, in place."""
    adam.steps += 1
    b1 = adam.beta1
    b2 = adam.beta2
    rate = learning_rate / (1 - b1**adam.steps)
    unbias = 1 / (1 - b2**adam.steps)
    for name, gradient in getattr(gradients, "arrays", gradients).items():
        rows = adam.rows[name]
        slope = np.asarray(gradient).reshape(len(rows), -1)
        mean = b1 * np.asarray(adam.mean[name]) + (1 - b1) * slope
        square = b2 * np.asarray(adam.square[name]) + (1 - b2) * slope * slope
        adam.mean[name] = mean
        adam.square[name] = square
        change = rate * mean / (np.sqrt(square * unbias) + 1e-8)
        changed = in_array(name, rows) - change
        latest[name] = changed.tolist(), changed
        for row, values in zip(rows, latest[name][0]):
            row[:] = values  # in place, as the model holds these rows
