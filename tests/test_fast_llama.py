"""The numpy functions behind the tests of findings, against the scripts' own."""

import random

import numpy as np
import pytest

import microbeam
import microkv
import microquant
from tests.tools.fast_llama import keep_arrays, make_fast

SIZES = [dict(dim=8, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=6),
         dict(dim=12, n_layers=2, n_heads=3, n_kv_heads=1, hidden_dim=10),
         dict(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=5)]


def assert_close(got, expected):
    """Assert that two structures of numbers are the same, up to rounding."""
    if isinstance(expected, dict):
        assert got.keys() == expected.keys()
        for name in expected:
            assert_close(got[name], expected[name])
    else:
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=[microkv, microquant, microbeam], ids=lambda module: module.__name__)
def module(request):
    return request.param


def model_of(module, sizes):
    """Return a random Llama of a script, and a text."""
    config = module.Config(11, **sizes)
    weights = module.init_weights(config, random.Random(3))
    for name, weight in weights.items():
        if name.endswith("norm"):
            weights[name] = [1 + 0.1 * i for i in range(len(weight))]
    return module.Llama(config, weights), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def loss_and_gradients(module, model, tokens):
    return module.loss_and_gradients(model.config, model.weights, tokens)


class Kept:
    """A cache that keeps keys and values."""

    def __init__(self):
        self.length = 0
        self.layers = {}

    def update(self, layer, k, v):
        keys, values = self.layers.setdefault(layer, ([], []))
        keys += k
        values += v
        self.length = len(self.layers[0][0])
        return keys, values


def all_forwards(model, tokens):
    """Return logits: without a cache, in two pieces with one, and of a tree; and what was read."""
    cache = Kept()
    first = model.forward(tokens[:4], cache)
    second = model.forward(tokens[4:], cache)
    mask = [[True, False, False], [True, True, False], [True, False, True]]
    tree = model.forward(tokens[:3], positions=[0, 1, 1], mask=mask)
    plain = model.forward(tokens)
    read = {name: model.inputs[name] for name in model.config.shapes()
            if name != "tok_embeddings"}
    return {"first": first, "second": second, "tree": tree, "plain": plain} | read


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"dim {sizes['dim']}")
def test_forward(module, sizes, monkeypatch):
    model, tokens = model_of(module, sizes)
    expected = all_forwards(model, tokens)
    make_fast(monkeypatch, module)
    assert_close(all_forwards(model, tokens), expected)
    keep_arrays(model)
    assert_close(all_forwards(model, tokens), expected)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: f"dim {sizes['dim']}")
def test_gradients(module, sizes, monkeypatch):
    model, tokens = model_of(module, sizes)
    loss, gradients = loss_and_gradients(module, model, tokens)
    make_fast(monkeypatch, module)
    fast_loss, fast_gradients = loss_and_gradients(module, model, tokens)
    assert_close(fast_loss, loss)
    assert_close(fast_gradients, gradients)


def test_single_operations(module, monkeypatch):
    rng = random.Random(0)
    d, x, b = ([[rng.gauss(0, 2) for _ in range(4)] for _ in range(5)] for _ in range(3))
    w = [[rng.gauss(0, 2) for _ in range(4)] for _ in range(4)]

    def results():
        loss, d_logits = module.cross_entropy(x, [0, 3, 1, 1, 2])
        return [[loss], d_logits, module.linear(x, w), *module.linear_backward(d, x, w),
                *module.swiglu_backward(d, x, b)]

    expected = results()
    make_fast(monkeypatch, module)
    for got, numbers in zip(results(), expected, strict=True):
        assert_close(got, numbers)


def test_steps_of_adam(module, monkeypatch):
    model, _ = model_of(module, SIZES[1])
    gradients, more = (module.init_weights(model.config, random.Random(i)) for i in (1, 2))

    def stepped():
        weights = {name: list(map(list, w)) if isinstance(w[0], list) else list(w)
                   for name, w in model.weights.items()}
        held = {name: list(w) for name, w in weights.items()}  # the rows that a model may hold
        adam = module.Adam(weights)
        for rate in (0.01, 0.02):
            adam.step(gradients, rate)
        adam.step({"output": more["output"]}, 0.005)
        assert all(a is b for a, b in zip(weights["output"], held["output"]))
        return weights

    expected = stepped()
    make_fast(monkeypatch, module)
    assert_close(stepped(), expected)
    assert expected["norm"] != model.weights["norm"]


def test_training(module, monkeypatch):
    """Eight steps of a script's own training, from the same first weights."""
    config = module.Config(11, **SIZES[1])
    rng = random.Random(7)
    ids = [rng.randrange(11) for _ in range(50)]

    def trained():
        if hasattr(module, "train"):
            return module.train(config, ids, random.Random(0), 8, 12, 0.03)[0].weights
        weights = module.init_weights(config, random.Random(0))
        module.descend(config, weights, ids, 8, 12, 0.03)
        return weights

    expected = trained()
    make_fast(monkeypatch, module)
    assert_close(trained(), expected)


@pytest.mark.parametrize("seed", range(3))
def test_microbeam_writes_the_same_texts(seed, monkeypatch):
    """With its cache, which a beam and a tree of texts share."""
    model, tokens = model_of(microbeam, SIZES[1])

    def texts():
        return (microbeam.greedy(microbeam.CachedModel(model), tokens, 20),
                microbeam.beam_search(microbeam.CachedModel(model), tokens[seed:], 9, width=3),
                microbeam.sample(microbeam.CachedModel(model), tokens, 20,
                                 rng=random.Random(seed)))

    plain, beams, drawn = texts()
    make_fast(monkeypatch, microbeam)
    keep_arrays(model)
    fast_plain, fast_beams, fast_drawn = texts()
    assert (fast_plain, fast_drawn) == (plain, drawn)
    assert [text for text, _ in fast_beams] == [text for text, _ in beams]
    assert_close([score for _, score in fast_beams], [score for _, score in beams])


def test_a_subclass_multiplies_as_it_likes(module, monkeypatch):
    class Doubled(module.Llama):
        def linear(self, name, x):
            return [[2 * value for value in row] for row in super().linear(name, x)]

    plain, tokens = model_of(module, SIZES[1])
    model = Doubled(plain.config, plain.weights)
    expected = model.forward(tokens)
    make_fast(monkeypatch, module)
    assert_close(model.forward(tokens), expected)
