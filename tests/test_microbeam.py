"""microbeam against naive references: numpy sorting and cumulative sums, exhaustive enumeration, exact distributions.

Nothing is shared with the script. Models are random tables: the logits after a prefix are drawn from a generator
that is seeded by the prefix.
"""

import functools
import itertools
import math
import random
import re

import numpy as np
import pytest

import microbeam as m

TIGHT = dict(rtol=0, atol=1e-12)
INF = math.inf


def toy(seed, size, spread=1.5, memory=99):
    """A random model over `size` tokens that looks at the last `memory` of them."""
    @functools.cache
    def row(last):
        return np.random.default_rng([seed, size, *last]).normal(0, spread, size).tolist()
    return lambda tokens: list(row(tuple(tokens[-memory:])))


def probabilities(logits):
    exps = np.exp(np.array(logits) - np.max(logits))
    return exps / exps.sum()


# ------------------------------------------------------------------------------------- the filters
# Ports to numpy of what transformers' LogitsWarpers do (src/transformers/generation/logits_process.py), written anew.

def reference_top_k(x, k):
    return np.where(x < np.sort(x)[::-1][min(k, len(x)) - 1], -INF, x)


def reference_top_p(x, p):
    order = np.argsort(x, kind="stable")
    remove = np.cumsum(probabilities(x[order])) <= 1 - p
    remove[-1] = False
    out = x.copy()
    out[order[remove]] = -INF
    return out


def reference_min_p(x, p):
    q = probabilities(x)
    return np.where(q < p * q.max(), -INF, x)


def reference_typical(x, mass):
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = x - x.max() - np.log(np.exp(x - x.max()).sum())
        shifted = np.abs(-log_p + np.nansum(log_p * np.exp(log_p)))
    order = np.argsort(shifted, kind="stable")
    last = min((np.cumsum(np.exp(log_p)[order]) < mass).sum(), len(x) - 1)
    remove = shifted > shifted[order[last]]
    remove[order[0]] = False
    return np.where(remove, -INF, x)


def cases():
    rng = np.random.default_rng(0)
    yield from (rng.normal(0, 2, n) for n in (1, 2, 3, 7, 50))
    yield from (rng.integers(-2, 3, n).astype(float) for n in (3, 5, 11, 40))         # ties
    yield from (np.zeros(4), np.array([5.0]), np.array([1000.0, -1000.0, 999.0]), np.array([-1e4, -1e4 + 1, 0.0]))
    yield np.log([0.5, 0.25, 0.125, 0.125])                                           # sums that are exact in binary
    yield np.array([0.0, -INF, 1.0, -INF])                                            # some removed already


@pytest.mark.parametrize("x", list(cases()), ids=lambda x: f"{len(x)} logits")
def test_filters_are_the_references(x):
    if np.isfinite(x).all():
        for k in (1, 2, 3, 5, len(x), 1000):
            assert m.top_k_filter(x.tolist(), k) == reference_top_k(x, k).tolist()
    for p in (1e-9, 0.1, 0.125, 0.25, 0.3, 0.5, 0.625, 0.75, 0.875, 0.9, 0.99, 1.0):
        assert m.top_p_filter(x.tolist(), p) == reference_top_p(x, p).tolist()
        assert m.min_p_filter(x.tolist(), p) == reference_min_p(x, p).tolist()
        if p < 1:
            assert m.typical_filter(x.tolist(), p) == reference_typical(x, p).tolist()
    assert m.min_p_filter(x.tolist(), 0.0) == x.tolist()


def kept(logits):
    return [i for i, x in enumerate(logits) if x > -INF]


def test_edges_worked_out_by_hand():
    tied = [math.log(p) for p in (0.25, 0.25, 0.25, 0.25)]
    assert kept(m.top_k_filter(tied, 1)) == [0, 1, 2, 3]           # all tie with the first
    assert kept(m.top_p_filter(tied, 0.5)) == [2, 3]               # exactly p: no further one
    assert kept(m.top_p_filter(tied, 0.51)) == [1, 2, 3]           # the one that crosses stays
    assert kept(m.top_p_filter(tied, 1e-12)) == [3] == kept(m.top_p_filter(tied, 1e-17))     # at least one
    assert kept(m.min_p_filter([0.0, math.log(0.5), math.log(0.49)], 0.5)) == [0, 1]
    assert kept(m.min_p_filter([0.0, -1.0, 0.0], 1.0)) == [0, 2]
    surest = [math.log(p) for p in (0.6, 0.2, 0.1, 0.1)]             # H = 1.09 nats; surprises 0.51, 1.61, 2.30, 2.30
    assert kept(m.typical_filter(surest, 0.19)) == [1]
    assert kept(m.typical_filter(surest, 0.21)) == [0, 1]
    assert kept(m.typical_filter([math.log(p) for p in (0.9, 0.05, 0.05)], 0.5)) == [0]
    middle = [math.log(p) for p in (0.4, 0.15, 0.15, 0.15, 0.15)]    # H = 1.50; surprises 0.92 and 1.90
    assert kept(m.typical_filter(middle, 0.5)) == [1, 2, 3, 4]     # the likeliest is not typical


def test_temperature_and_penalties():
    x = np.random.default_rng(1).normal(0, 2, 9)
    for t in (0.1, 1.0, 3.7):
        np.testing.assert_allclose(m.apply_temperature(x.tolist(), t), x / t, **TIGHT)
    seen = [2, 2, 5, 0, 3]
    assert x[3] < 0 < x[2]
    for penalty in (0.5, 1.0, 1.3):
        expected = [(v * penalty if v < 0 else v / penalty) if i in seen else v for i, v in enumerate(x)]
        assert m.repetition_penalty(x.tolist(), seen, penalty) == expected
    expected = [v - 0.3 * (i in seen) - 0.7 * seen.count(i) for i, v in enumerate(x)]
    np.testing.assert_allclose(m.count_penalty(x.tolist(), seen, presence=0.3, frequency=0.7), expected, **TIGHT)
    assert m.count_penalty(x.tolist(), seen) == x.tolist()


def test_distribution_applies_everything_in_order():
    x = np.random.default_rng(2).normal(0, 2, 30)
    way = dict(temperature=1.7, top_k=12, top_p=0.8, min_p=0.1, typical_p=0.7)
    expected = reference_typical(reference_min_p(reference_top_p(reference_top_k(x / 1.7, 12), 0.8), 0.1), 0.7)
    np.testing.assert_allclose(m.distribution(x.tolist(), **way), probabilities(expected), **TIGHT)
    np.testing.assert_allclose(m.distribution(x.tolist()), probabilities(x), **TIGHT)


def test_arguments_are_left_as_they_were():
    x, prompt = [0.0, 2.0, 1.0, 1.0], [0, 1]
    for name, setting in (("top_k", 2), ("top_p", 0.5), ("min_p", 0.5), ("typical_p", 0.5)):
        m.distribution(x, **{name: setting})
    m.repetition_penalty(x, prompt, 2.0)
    model, rng = toy(0, 4), random.Random(0)
    m.greedy(model, prompt, 3)
    m.sample(model, prompt, 3, rng=rng)
    m.beam_search(model, prompt, 3, width=2)
    m.speculative_sample(model, model, prompt, 3, gamma=2, rng=rng)
    m.speculative_greedy(model, model, prompt, 3, gamma=2)
    m.jacobi_greedy(model, prompt, 3, gamma=2)
    assert (x, prompt) == ([0.0, 2.0, 1.0, 1.0], [0, 1])


def test_log_softmax_and_chi_square():
    x = np.array([1000.0, 0.0, 999.0, -1000.0])
    log_total = 1000 + math.log(1 + math.exp(-1))
    np.testing.assert_allclose(m.log_softmax(x.tolist()), x - log_total, **TIGHT)
    counts, p = [30, 50, 20], [0.25, 0.5, 0.25]
    assert m.chi_square(counts, p) == (pytest.approx(25 / 25 + 0 + 25 / 25), 2)
    assert m.chi_square([90, 4, 3, 3], [0.9, 0.04, 0.03, 0.03]) == (pytest.approx(0), 1)   # the last three expect 4 + 3 + 3
    assert m.chi_square([55, 45], [0.5, 0.5]) == (pytest.approx(1.0), 1)
    assert m.chi_square([9, 5], [9 / 14, 5 / 14]) == (pytest.approx(0), 1)                 # 5 is not fewer than 5
    assert m.chi_square([60, 30, 6, 3, 1], [0.6, 0.3, 0.04, 0.03, 0.03]) == (pytest.approx(0), 2)
    assert m.chi_square([3], [1.0]) == (0.0, 0)


def test_the_toy_looks_at_the_last_word_and_not_at_the_prompt():
    for text, words in (([0], ()), ([2], ()), ([0, 1], (1,)), ([1, 0, 2], (2,)), ([0, 0, 0, 0], (0,))):
        np.testing.assert_allclose(np.exp(m.toy_logits(text)), m.TOY[words], **TIGHT)


def test_the_small_measures():
    assert m.distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4 and m.distinct([[1], [2]], 2) == 1.0
    assert m.survivors([0.5, 0.0, 0.5, 0.0]) == 2
    assert m.distinct([[1, 2, 3, 1, 2, 3, 1, 2]], 4) == 3 / 5 and m.distinct([[1, 2, 3]], 4) == 1.0
    assert m.total_variation({0: 0.5, 1: 0.5}, {1: 0.25, 2: 0.75}) == 0.75
    assert m.count_weights({"w1": [[1.0] * 4] * 2, "w2": [[1.0] * 3]}) == 11
    rng = random.Random(0)
    a, b = m.random_logits_fn(rng, 3), m.random_logits_fn(rng, 3)
    assert a([0]) == a((0,)) != b([0]) != a([1]) and len(a([0])) == 3


def test_log_probability(llama):
    model = toy(0, 4)
    for prompt, text in (([1], [2, 0, 3]), ([3, 1, 1], [0]), ([0], [])):
        expected = sum(math.log(probabilities(model([*prompt, *text[:i]]))[token]) for i, token in enumerate(text))
        assert m.log_probability(model, prompt, text) == pytest.approx(expected, abs=1e-12)
    target = m.CachedModel(llama)
    whole = [math.log(probabilities(row)[token]) for row, token in zip(llama.forward([3, 1, 4, 1]), [1, 4, 1, 5])]
    assert m.log_probability(target, [3], [1, 4, 1, 5]) == pytest.approx(sum(whole), abs=1e-12) and target.passes == 1


def test_overlaps_are_taken_where_drafts_were_judged():
    target, draft = toy(0, 3), toy(1, 3)
    text, rounds = [0, 1, 2, 2, 1, 0], [([1, 0, 2], 1), ([1, 1], 2), ([], 0)]      # after the prompt [0]: 2 + 3 + 1 tokens
    text.append(1)
    counts = m.Counts(rounds)
    found = m.overlaps(target, draft, text[:1], text[1:], counts)
    expected = [np.minimum(probabilities(target(text[:end])), probabilities(draft(text[:end]))).sum() for end in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, expected, **TIGHT)
    assert (counts.target_passes, counts.drafted, counts.accepted) == (3, 5, 3)


# ------------------------------------------------------------------------- greedy, sampling, beams

def reference_greedy(model, prompt, n, eos=None):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(np.argmax(model(tokens))))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt):]


@pytest.mark.parametrize("seed", range(8))
def test_greedy(seed):
    model = toy(seed, 5)
    assert m.greedy(model, [0, 1], 12) == reference_greedy(model, [0, 1], 12)
    for eos in range(5):
        found = m.greedy(model, [0, 1], 12, eos=eos)
        assert found == reference_greedy(model, [0, 1], 12, eos) and found.count(eos) == (found[-1] == eos)
    assert m.greedy(lambda tokens: [1.0, 3.0, 3.0], [0], 2) == [1, 1]          # the first of equals
    assert m.greedy(model, [0], 0) == []
    assert m.extend_by(lambda logits: len(logits) - 1, model, [0], 3, None) == [4, 4, 4]
    assert m.extend_by(lambda logits: len(logits) - 1, model, [0], 3, 4) == [4]


def all_texts(model, prompt, n, eos=None):
    """{tokens: log-probability} of everything that ends with eos or is n long."""
    texts, open_texts = {}, {(): 0.0}
    for _ in range(n):
        longer = {}
        for text, total in open_texts.items():
            for token, p in enumerate(probabilities(model([*prompt, *text]))):
                if p > 0:
                    longer[*text, token] = total + math.log(p)
        texts |= {text: total for text, total in longer.items() if text[-1] == eos}
        open_texts = {text: total for text, total in longer.items() if text[-1] != eos}
    return texts | open_texts


@pytest.mark.parametrize("way", [{}, {"temperature": 0.6}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}, {"typical_p": 0.6},
                                 {"temperature": 2.0, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("eos", [None, 1])
def test_sample_has_exactly_the_model_s_distribution(way, eos):
    model = toy(3, 3)
    got = m.every_outcome(lambda rng: tuple(m.sample(model, [2], 3, rng=rng, eos=eos, **way)))

    def shaped(tokens):
        x = np.array(model(tokens)) / way.get("temperature", 1.0)
        for name, reference in (("top_k", reference_top_k), ("top_p", reference_top_p), ("min_p", reference_min_p),
                                ("typical_p", reference_typical)):
            x = reference(x, way[name]) if name in way else x
        return x

    with np.errstate(divide="ignore"):
        expected = {text: math.exp(total) for text, total in all_texts(shaped, [2], 3, eos).items()}
    assert got.keys() == expected.keys()
    assert max(abs(got[text] - expected[text]) for text in got) < 1e-12
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)


def test_draws_follow_the_probabilities_with_a_real_generator():
    rng, p, n = random.Random(5), [0.5, 0.0, 0.2, 0.3], 20000
    counts = np.bincount([m.draw(p, rng) for _ in range(n)], minlength=4)
    assert counts[1] == 0
    assert (np.abs(counts / n - p) < 5 * np.sqrt(np.array(p) * (1 - np.array(p)) / n) + 1e-12).all()


def reference_beam(model, prompt, n, width, length_penalty, eos):
    """Beam search as its docstring says, never stopping early: keep the best width, set aside what has ended."""
    beams, finished = [((), 0.0)], []
    for _ in range(n):
        candidates = []
        for text, total in beams:
            for token, p in enumerate(probabilities(model([*prompt, *text]))):
                candidates.append(((*text, token), total + math.log(p)))
        best = sorted(candidates, key=lambda c: -c[1])[:width]
        finished += [c for c in best if c[0][-1] == eos]
        beams = [c for c in best if c[0][-1] != eos]
    ranked = sorted(((total / len(text) ** length_penalty, text) for text, total in finished + beams), reverse=True)
    return [(list(text), score) for score, text in ranked[:width]]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eos", [None, 0, 2])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0, -0.7])
def test_beam_search(seed, eos, length_penalty):
    model, prompt, n = toy(seed, 4), [3, 1], 5
    for width in (1, 2, 3, 5):
        found = m.beam_search(model, prompt, n, width=width, length_penalty=length_penalty, eos=eos)
        expected = reference_beam(model, prompt, n, width, length_penalty, eos)
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], **TIGHT)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
def test_a_wide_beam_is_exhaustive_search(seed, eos, length_penalty):
    model, prompt, n = toy(seed, 3), [0], 4
    ranked = sorted(((total / len(text) ** length_penalty, text) for text, total in all_texts(model, prompt, n, eos).items()),
                    reverse=True)
    found = m.beam_search(model, prompt, n, width=3 ** n, length_penalty=length_penalty, eos=eos)
    assert [tuple(tokens) for tokens, _ in found] == [text for _, text in ranked]      # the whole n-best list
    np.testing.assert_allclose([score for _, score in found], [score for score, _ in ranked], **TIGHT)


@pytest.mark.parametrize("seed", range(10))
def test_width_1_is_greedy(seed):
    model = toy(seed, 6)
    for eos in (None, 0, 3):
        for length_penalty in (0.0, 1.0, 3.0):
            [(tokens, score)] = m.beam_search(model, [1], 8, width=1, eos=eos, length_penalty=length_penalty)
            assert tokens == reference_greedy(model, [1], 8, eos)
            total = sum(math.log(probabilities(model([1, *tokens[:i]]))[token]) for i, token in enumerate(tokens))
            assert score == pytest.approx(total / len(tokens) ** length_penalty, abs=1e-12)


def test_what_is_not_asked_for_is_the_default():
    model, context = toy(1, 4), [1, 2, 3, 4, 9, 2, 3, 4, 8, 1, 2, 3, 4]                  # 3 tokens: 8 follows; 4: 9
    assert m.beam_search(model, [0], 5, width=3, eos=1) == m.beam_search(model, [0], 5, width=3, eos=1, length_penalty=1.0,
                                                                         early_stopping=False)
    assert m.distribution(model([0])) == m.distribution(model([0]), temperature=1.0)
    assert m.prompt_lookup(context, 1) == m.prompt_lookup(context, 1, 3) == [8] != m.prompt_lookup(context, 1, 4) == [9]
    assert m.best_gamma(0.99, 0.0) == 16


def test_early_stopping_ends_with_the_first_that_end_and_saves_calls():
    calls = [0, 0]

    def model(tokens, stop):
        calls[stop] += 1
        return {1: [0.0, -0.1, -9.0]}.get(len(tokens), [0.0, -0.2, -9.0]) if len(tokens) < 3 else [-3.0, 2.0, -3.0]

    found = [m.beam_search(lambda tokens, stop=stop: model(tokens, stop), [2], 8, width=2, length_penalty=2.0, eos=0,
                           early_stopping=bool(stop)) for stop in (False, True)]
    assert [tokens for tokens, _ in found[1]] == [[1, 0], [0]] and calls[1] < calls[0]
    assert found[0][0][1] > found[1][0][1]
    # the bound lets the search stop on its own where nothing can win any more
    calls[:] = [0, 0]
    m.beam_search(lambda tokens: model(tokens, 0), [2], 8, width=2, length_penalty=0.0, eos=0)
    assert calls[0] < 8


def test_exact_search():
    for seed in range(6):
        model = toy(seed, 3)
        for eos in (0, 2):
            texts = all_texts(model, [1], 4, eos)
            best = max(texts, key=texts.get)
            tokens, total = m.exact_search(model, [1], 4, eos=eos, max_passes=1000)
            assert tuple(tokens) == best and total == pytest.approx(texts[best], abs=1e-12)
        assert m.exact_search(model, [1], 4, eos=0, max_passes=1) is None


def test_exact_search_does_not_take_the_prompt_s_last_token_for_an_end():
    assert len(m.exact_search(toy(1, 3), [0], 3, eos=0, max_passes=1000)[0]) >= 1


@pytest.mark.parametrize("seed", range(5))
def test_diverse_beam_search(seed):
    model, groups, n, diversity = toy(seed, 5), 3, 4, 1.2
    texts, totals = [()] * groups, [0.0] * groups
    for _ in range(n):
        taken = []
        for g in range(groups):
            log_p = np.log(probabilities(model([4, *texts[g]])))
            token = int(np.argmax([value - diversity * taken.count(i) for i, value in enumerate(log_p)]))
            texts[g], totals[g] = (*texts[g], token), totals[g] + log_p[token]
            taken.append(token)
    found = m.diverse_beam_search(model, [4], n, groups=groups, diversity=diversity)
    assert [tuple(tokens) for tokens, _ in found] == texts
    np.testing.assert_allclose([total for _, total in found], totals, **TIGHT)
    assert {tuple(tokens) for tokens, _ in m.diverse_beam_search(model, [4], n, groups=3, diversity=0.0)} == \
        {tuple(reference_greedy(model, [4], n))}


# ---------------------------------------------------------------------------- speculative decoding

class Counting:
    """A model that scores several prefixes in one pass, and counts its passes and how many rows each gave."""

    def __init__(self, model):
        self.model, self.asked = model, []

    def __call__(self, tokens):
        return self.last_rows(tokens, 1)[0]

    def last_rows(self, tokens, n):
        self.asked.append(n)
        return [self.model(list(tokens[:len(tokens) - n + 1 + i])) for i in range(n)]


def reference_rounds(model, draft, prompt, n, gamma):
    """Speculative greedy by its definition, from the two greedy rules alone: [(drafts, accepted)]."""
    plain, at, rounds = reference_greedy(model, prompt, n), 0, []
    while at < n:
        before = [*prompt, *plain[:at]]
        drafts = reference_greedy(draft, before, min(gamma, n - at - 1))
        right = 0
        while right < len(drafts) and drafts[right] == plain[at + right]:
            right += 1
        rounds.append((drafts, right))
        at += right + 1
    return rounds


@pytest.mark.parametrize("gamma", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(6))
def test_speculative_greedy_is_greedy_and_its_counts_are_right(seed, gamma):
    model = toy(seed, 3, memory=2)
    never = lambda tokens: [-x for x in model(tokens)]          # its favourite is the target's last choice
    sometimes = lambda tokens: model(tokens) if len(tokens) % 3 else toy(seed + 50, 3)(tokens)
    for draft in (toy(seed + 100, 3, memory=2), never, sometimes, model):
        for n in (1, 2, 9):
            target = Counting(model)
            tokens, counts = m.speculative_greedy(target, draft, [0, 1], n, gamma=gamma)
            rounds = reference_rounds(model, draft, [0, 1], n, gamma)
            assert tokens == reference_greedy(model, [0, 1], n)
            assert counts.rounds == rounds
            assert counts.target_passes == len(rounds) == len(target.asked)
            assert target.asked == [len(drafts) + 1 for drafts, _ in rounds]
            assert counts.drafted == sum(len(drafts) for drafts, _ in rounds)
            assert counts.accepted == n - counts.target_passes
            if draft is never:
                assert counts.accepted == 0 and counts.target_passes == n
            if draft is model:
                assert counts.target_passes == -(-n // (gamma + 1))


def test_a_draft_may_propose_nothing_and_a_plain_function_will_do():
    model = toy(0, 4)
    tokens, counts = m.speculate(model, lambda tokens, n: [], [0], 5, gamma=3)
    assert tokens == reference_greedy(model, [0], 5) and counts.target_passes == 5 and counts.drafted == 0
    rows = m.last_rows(model, [0, 1, 2, 3], 3)
    assert rows == [model([0, 1]), model([0, 1, 2]), model([0, 1, 2, 3])]


def exact(model, n, size, shape):
    return {text: math.prod(shape(model([0, *text[:i]]))[token] for i, token in enumerate(text))
            for text in itertools.product(range(size), repeat=n)}


WAYS = [{}, {"temperature": 0.5}, {"top_p": 0.6}, {"temperature": 1.8, "top_p": 0.85}, {"top_k": 2}, {"min_p": 0.4}]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("size, gamma, n", [(2, 1, 3), (2, 2, 4), (2, 3, 4), (3, 1, 3), (3, 2, 3), (3, 3, 4), (4, 1, 2), (4, 2, 3)])
def test_speculative_sampling_has_exactly_the_target_s_distribution(size, gamma, n, way):
    def shape(logits):
        x = np.array(logits) / way.get("temperature", 1.0)
        for name, reference in (("top_k", reference_top_k), ("top_p", reference_top_p), ("min_p", reference_min_p)):
            x = reference(x, way[name]) if name in way else x
        return probabilities(x)

    for seed in (0, 1) if n < 4 else (0,):
        target, draft = toy(seed, size), toy(seed + 10, size)
        got = m.every_outcome(lambda rng: tuple(m.speculative_sample(target, draft, [0], n, gamma=gamma, rng=rng, **way)[0]))
        expected = exact(target, n, size, shape)
        assert all(len(text) == n for text in got)
        assert max(abs(got.get(text, 0.0) - p) for text, p in expected.items()) < 1e-12
        assert sum(got.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_speculative_sampling_counts_and_extremes(gamma):
    target, n = toy(4, 3), 6
    rng = random.Random(0)
    tokens, counts = m.speculative_sample(target, target, [0], n, gamma=gamma, rng=rng)
    assert counts.accepted == counts.drafted and counts.target_passes == -(-n // (gamma + 1))     # the same model
    p, q = [0.0, -INF, -INF], [-INF, 0.0, -INF]
    counting = Counting(lambda tokens: p)
    tokens, counts = m.speculative_sample(counting, lambda tokens: q, [0], n, gamma=gamma, rng=rng)
    assert tokens == [0] * n and counts.accepted == 0 and counts.target_passes == n == len(counting.asked)
    assert counting.asked == [min(gamma, n - i - 1) + 1 for i in range(n)]
    for seed in range(5):
        tokens, counts = m.speculative_sample(target, toy(9, 3), [0], 11, gamma=gamma, rng=random.Random(seed))
        assert len(tokens) == 11 == counts.accepted + counts.target_passes
        at = 0
        for drafts, kept in counts.rounds:                    # what was accepted stands in the text; what was not, does not
            assert tokens[at:at + kept] == drafts[:kept] and len(drafts) == min(gamma, 11 - at - 1)
            at += kept + 1


def test_the_settings_shape_the_drafts_too():
    target, draft = toy(1, 4), toy(2, 4)
    tokens, counts = m.speculative_sample(target, draft, [0], 9, gamma=3, rng=random.Random(0), top_k=1)
    assert tokens == reference_greedy(target, [0], 9)
    assert counts.rounds == reference_rounds(target, draft, [0], 9, 3)        # drafted greedily, as nothing else is left


def test_the_argmax_draft_is_biased_as_the_algebra_says():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.45, 0.35, 0.2])
    got = m.every_outcome(lambda rng: m.speculative_sample(lambda t: np.log(p).tolist(), lambda t: np.log(q).tolist(), [0], 2,
                                                           gamma=1, rng=rng, choose_draft=lambda q, rng: m.argmax(q))[0][0])
    assert got == pytest.approx({0: 1.0})                     # 0 is always drafted, and p/q > 1 keeps it always


def test_acceptance_and_residual():
    p, q = [0.5, 0.3, 0.2, 0.0], [0.25, 0.6, 0.0, 0.15]
    assert m.acceptance(p, q) == [1.0, 0.5, 1.0, 0.0]
    np.testing.assert_allclose(m.residual(p, q), [0.25 / 0.45, 0, 0.2 / 0.45, 0], **TIGHT)
    assert m.residual(p, p) == p
    with pytest.raises(ValueError, match="vocabulary"):
        m.acceptance([1.0], [0.5, 0.5])


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
def test_the_formulas(alpha):
    for gamma in (1, 2, 5):
        chances = [alpha ** i * (1 - alpha) for i in range(gamma)] + [alpha ** gamma]       # exactly i accepted
        mean = sum((i + 1) * chance for i, chance in enumerate(chances))
        assert m.expected_tokens(alpha, gamma) == pytest.approx(mean, abs=1e-12)
        assert m.speed_up(alpha, gamma, 0.25) == pytest.approx(mean / (1 + gamma / 4), abs=1e-12)
    best = max(range(9), key=lambda g: (sum(alpha ** i for i in range(g + 1))) / (0.1 * g + 1))
    assert m.best_gamma(alpha, 0.1, limit=8) == best


def test_every_outcome_weighs_every_branch_once():
    def sampler(rng):
        first = m.draw([0.2, 0.0, 0.8], rng)
        return (first, m.draw([0.5, 0.5], rng)) if first else (first,)
    assert m.every_outcome(sampler) == pytest.approx({(0,): 0.2, (2, 0): 0.4, (2, 1): 0.4}, abs=1e-15)
    assert m.every_outcome(lambda rng: m.draw([1.0, 3.0], rng)) == {0: 0.25, 1: 0.75}       # as random.choices takes weights


# ------------------------------------------------------------------------------------ cheap drafts

def reference_lookup(tokens, n, max_ngram):
    for size in range(max_ngram, 0, -1):
        places = [i for i in range(len(tokens) - size) if tokens[i:i + size] == tokens[-size:]] if size < len(tokens) else []
        if places:
            return tokens[places[-1] + size:][:n]
    return []


def test_prompt_lookup():
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 14))]
        for max_ngram in (1, 2, 3):
            assert m.prompt_lookup(tokens, 3, max_ngram) == reference_lookup(tokens, 3, max_ngram)
    assert m.prompt_lookup([7], 3) == []
    assert m.prompt_lookup([1, 2, 1, 2, 9, 5, 1, 2], 2) == [9, 5]            # the latest place
    for seed in range(4):
        model = toy(seed, 3, memory=1)                                       # loops, so that there is something to look up
        tokens, counts = m.speculate(model, m.prompt_lookup, [0, 1], 15, gamma=4)
        assert tokens == reference_greedy(model, [0, 1], 15) and counts.target_passes < 15


def test_ngram_model():
    corpus = [0, 1, 2, 0, 1, 3, 0, 1, 2]
    model = m.ngram_model(corpus, 5, order=3)
    assert np.argsort(model([9, 0, 1]))[-2:].tolist() == [3, 2]              # after 0 1: 2 twice, 3 once
    assert model([0, 1])[2] == pytest.approx(math.log(2.01)) and model([0, 1])[4] == pytest.approx(math.log(0.01))
    assert m.argmax(model([4, 1])) == 2                                      # 4 1 never came; after 1: 2 twice, 3 once
    assert model([4, 4]) == pytest.approx([math.log(corpus.count(i) + 0.01) for i in range(5)])
    assert m.argmax(model([2])) == 0
    model = m.ngram_model([0, 1, 2, 3, 1, 4, 3, 1, 4], 5, order=3)
    assert [m.argmax(model(text)) for text in ([0, 1], [1], [2, 1])] == [2, 4, 4]        # the longest context that was seen
    model = m.ngram_model([0, 1, 2, 3, 2, 4, 2, 4], 5, order=5)
    assert m.argmax(model([0, 1, 2])) == 3 and m.argmax(model([2])) == 4     # a text shorter than the context


def test_rounded_weights():
    w = {"a": np.random.default_rng(0).normal(size=(3, 5)).tolist() + [[0.0] * 5], "norm": [1.5, 2.5],
         "row": [[3.0, -1.4, 0.0]]}
    for bits in (2, 4, 8):
        out, steps = m.rounded_weights(w, bits), 2 ** (bits - 1) - 1
        assert out["row"][0][0] == 3.0 and abs(out["row"][0][1] + 1.4) <= 1.5 / steps
        assert out["norm"] == w["norm"] and out["a"][3] == [0.0] * 5
        for row, rounded in zip(w["a"][:3], out["a"]):
            scale = max(map(abs, row)) / steps
            assert len(set(np.round(np.array(rounded) / scale, 9))) <= 2 * steps + 1
            assert np.abs(np.array(row) - rounded).max() <= scale / 2 + 1e-12


# ------------------------------------------------------------ the tiny Llama: Medusa, EAGLE, lookahead

@pytest.fixture(scope="module", params=[0, 1], ids=["random", "peaked"])
def llama(request):
    config = m.Config(11, 8, 2, 4, 2, 8)
    weights = m.init_weights(config, random.Random(3))
    if request.param:
        weights["output"] = [[x * 6 for x in row] for row in weights["output"]]
    return m.Llama(config, weights)


def plain_greedy(llama, prompt, n):
    return reference_greedy(lambda tokens: llama.forward(tokens)[-1], prompt, n)


def test_the_cached_model_is_the_model(llama):
    model, rng = m.CachedModel(llama), random.Random(1)
    texts = [[rng.randrange(3) for _ in range(rng.randrange(1, 9))] for _ in range(60)]     # much in common
    for text in texts:
        n = rng.randrange(1, len(text) + 1)
        assert model.last_rows(text, n) == llama.forward(text)[-n:]
        assert model(text) == llama.forward(text)[-1]
    assert model.passes == 120 and model.forwards < 60
    model([1, 2, 0])
    assert [model.feature([1, 2, 0][:end]) for end in (1, 2, 3)] == states_of(llama)([1, 2, 0]).tolist()
    assert model.feature([9, 9]) is None
    fresh = m.CachedModel(llama)
    fresh.last_rows([1, 2, 3, 4, 5], 3)
    assert (fresh.passes, fresh.forwards) == (1, 1)
    fresh([1, 2, 3])
    assert (fresh.passes, fresh.forwards) == (2, 1)            # read before


def test_a_tree_in_one_pass_is_each_path_alone(llama):
    rng = random.Random(0)
    for _ in range(12):
        text = tuple(rng.randrange(11) for _ in range(rng.randrange(1, 6)))
        nodes = [text]
        for _ in range(rng.randrange(1, 9)):                   # grow a tree anywhere
            nodes.append((*rng.choice(nodes), rng.randrange(11)))
        rng.shuffle(nodes)
        for before in (0, len(text)):                          # all new, or the text read before
            model = m.CachedModel(llama)
            if before:
                model(text)
            rows, forwards = model.read(nodes), model.forwards
            for node in nodes:
                np.testing.assert_allclose(rows[node], llama.forward(node)[-1], **TIGHT)
                np.testing.assert_allclose(model((*node, 5)), llama.forward((*node, 5))[-1], **TIGHT)     # its keys serve on
            assert rows.keys() == {node[:end] for node in nodes for end in range(1, len(node) + 1)}
            assert forwards == 1 + bool(before) and model.passes == len(nodes) + forwards


def test_verify_tree_keeps_the_longest_path_that_is_the_target_s_own(llama):
    text, following = [3, 1], plain_greedy(llama, [3, 1], 4)
    wrong = [(token + 1) % 11 for token in following]
    for candidates, kept in (([], 0), ([following[:1]], 1), ([wrong, following[:2], wrong[:1]], 2),
                             ([following[:1] + wrong[1:], wrong[:1] + following[1:]], 1), ([following[:3], following[:3]], 3)):
        model = m.CachedModel(llama)
        found, rows = m.verify_tree(model, text, candidates)
        assert found == following[:kept + 1] and model.forwards == 1 == model.passes
        assert {tuple(text + path) for path in candidates} <= rows.keys()


def random_heads(llama, n, seed):
    rng, dim = random.Random(seed), llama.config.dim
    return [{"w1": [[rng.gauss(0, 0.5) for _ in range(dim)] for _ in range(dim)],
             "w2": [[rng.gauss(0, 1) for _ in range(dim)] for _ in range(llama.config.vocab_size)]} for _ in range(n)]


@pytest.mark.parametrize("seed", range(2))
def test_medusa_eagle_and_lookahead_are_greedy(llama, seed):
    rng = random.Random(seed)
    for prompt in ([seed], [rng.randrange(11) for _ in range(5)]):
        plain = plain_greedy(llama, prompt, 12)
        for n in (1, 2, 12):
            target = m.CachedModel(llama)
            tokens, counts = m.medusa_greedy(target, random_heads(llama, 2, seed), prompt, n, tops=(4, 3))
            assert target.passes == counts.target_passes == target.forwards
            assert tokens == plain[:n] and n <= counts.accepted + counts.target_passes < n + 4
            dim = llama.config.dim
            head = {"w1": [[rng.gauss(0, 0.3) for _ in range(2 * dim)] for _ in range(6)],
                    "w2": [[rng.gauss(0, 0.3) for _ in range(6)] for _ in range(dim)]}
            target = m.CachedModel(llama)
            tokens, counts = m.speculate(target, lambda tokens, k: m.eagle_draft(target, head, tokens, k), prompt, n, gamma=3)
            assert tokens == plain[:n] and target.passes == counts.target_passes == target.forwards
            if n > 1 and len(prompt) > 1:
                assert counts.rounds[0] == ([], 0) and counts.drafted > 0 or n == 2
            for window, ngram, guesses in ((1, 2, 1), (4, 4, 3)):
                target = m.CachedModel(llama)
                tokens, counts = m.lookahead_greedy(target, prompt, n, window=window, ngram=ngram, guesses=guesses)
                assert target.passes == counts.target_passes == target.forwards
                assert tokens == plain[:n] and n <= counts.accepted + counts.target_passes < n + window + ngram
                assert all(kept <= len(drafts) for drafts, kept in counts.rounds)
                assert counts.target_passes <= n
            for gamma in (1, 3):
                target = Counting(lambda tokens: llama.forward(tokens)[-1])
                tokens, counts = m.jacobi_greedy(target, prompt, n, gamma=gamma)
                assert tokens == plain[:n] and counts.target_passes == len(target.asked) == n - counts.accepted


def test_medusa_guesses_from_the_state_of_the_last_token_read(llama):
    prompt, heads = [3, 1, 4], random_heads(llama, 2, 7)
    heads = [{"w1": head["w1"], "w2": [[a + 3 * b for a, b in zip(*rows)] for rows in zip(head["w2"], llama.weights["output"])]}
             for head in heads]
    tokens, counts = m.medusa_greedy(m.CachedModel(llama), heads, prompt, 20)
    text, states = [*prompt, *plain_greedy(llama, prompt, 30)], states_of(llama)
    assert counts.rounds[0] == ([], 0)
    at = len(prompt)                                          # tokens read before this round's tree
    for drafts, kept in counts.rounds[1:]:
        first, second = (np.argsort(-reference_medusa_head(states(text[:at])[-1], head), kind="stable").tolist() for head in heads)
        assert drafts == [token for a in first[:3] for token in (a, *second[:2])]
        expected = 0
        if text[at + 1] in first[:3]:
            expected = 2 if text[at + 2] in second[:2] else 1
        assert kept == expected
        at += kept + 1
    assert counts.accepted > 0


def states_of(llama):
    """The hidden states that the output matrix reads, after every token of a text."""
    def states(text):
        recording = m.RecordingLlama(llama.config, llama.weights)
        recording.forward(text)
        return np.array(recording.inputs["output"])
    return states


def test_lookahead_keeps_the_n_grams_of_its_window(llama):
    """The pool, rebuilt from the words of the section: every cell's row from a plain pass over the path it stands for."""
    prompt, window, ngram, guesses, n = [3, 1, 4], 3, 3, 2, 16
    tokens, counts = m.lookahead_greedy(m.CachedModel(llama), prompt, n, window=window, ngram=ngram, guesses=guesses)
    best = lambda text: int(np.argmax(llama.forward(text)[-1]))
    text, pool = list(prompt), []
    first, second = [[prompt[j % 3] for j in range(window)] for _ in range(2)]
    for drafts, kept in counts.rounds:
        grams = [gram[1:] for gram in pool if gram[0] == text[-1]][-guesses:]
        paths = [first[:j + 1] + [second[j]] for j in range(window)] + grams
        nodes = dict.fromkeys(tuple(path[:end]) for path in paths for end in range(1, len(path) + 1))
        assert drafts == [node[-1] for node in nodes]
        renewed = [best(text + first[:j + 1] + [second[j]]) for j in range(window)]
        following = plain_greedy(llama, text, 6)
        assert kept == max(next((i for i, (a, b) in enumerate(zip(path, following)) if a != b), len(path)) for path in paths)
        text += following[:kept + 1]
        for gram in map(list, zip(first, second, renewed)):
            pool = [old for old in pool if old != gram] + [gram]
        first, second = second, renewed
    assert text[3:3 + n] == tokens


def test_guesses_that_are_right_are_believed():
    model = lambda tokens: [float(i == (tokens[-1] + 1) % 8) for i in range(8)]
    tokens, counts = m.speculate(model, lambda tokens, n: [(tokens[-1] + 1 + i) % 8 for i in range(n)], [0], 12, gamma=3)
    assert tokens == [(1 + i) % 8 for i in range(12)] and counts.target_passes == 3 and counts.accepted == 9
    # Jacobi settles a text whose tokens do not depend on each other in one pass more than it fits
    fixed = lambda tokens: [float(i == len(tokens) % 5) for i in range(5)]
    tokens, counts = m.jacobi_greedy(fixed, [0], 10, gamma=4)
    assert tokens == [(1 + i) % 5 for i in range(10)] and counts.target_passes <= 4


def test_lookahead_finds_what_it_has_seen():
    """On a text that goes round in circles the pool fills, and passes are saved."""
    config = m.Config(6, 12, 1, 1, 1, 4)
    weights = m.init_weights(config, random.Random(0))
    zero = {name: [[0.0] * len(row) for row in w] for name, w in weights.items() if name.endswith(("wo", "w2"))}
    eye = [[3.0 * (i == j) for j in range(12)] for i in range(6)]
    weights |= zero | {"tok_embeddings": eye, "output": eye[-1:] + eye[:-1]}       # argmax: the last token plus one
    circle = m.Llama(config, weights)
    tokens, counts = m.lookahead_greedy(m.CachedModel(circle), [0], 20, window=4, ngram=3)
    assert tokens == [(1 + i) % 6 for i in range(20)]
    assert counts.target_passes <= 11


def reference_medusa_head(h, head):
    z = np.array(h) @ np.array(head["w1"]).T
    return (np.array(h) + z / (1 + np.exp(-z))) @ np.array(head["w2"]).T


def test_the_heads_are_their_equations(llama):
    rng = np.random.default_rng(0)
    h, [head] = rng.normal(size=(3, 8)), random_heads(llama, 1, 0)
    np.testing.assert_allclose(m.medusa_head(h.tolist(), head), reference_medusa_head(h, head), **TIGHT)
    w1, w2, f, e = rng.normal(size=(6, 16)), rng.normal(size=(8, 6)), rng.normal(size=8), rng.normal(size=8)
    z = w1 @ np.concatenate([f, e])
    expected = f + w2 @ (z / (1 + np.exp(-z)))
    eagle = {"w1": w1.tolist(), "w2": w2.tolist()}
    np.testing.assert_allclose(m.eagle_step([[*f, *e]], [f.tolist()], eagle)[0], expected, **TIGHT)


def test_eagle_drafts_from_the_last_state_and_the_last_token(llama):
    rng, dim = random.Random(0), llama.config.dim
    head = {"w1": [[rng.gauss(0, 1) for _ in range(2 * dim)] for _ in range(5)],
            "w2": [[rng.gauss(0, 1) for _ in range(5)] for _ in range(dim)]}
    target, tokens = m.CachedModel(llama), [3, 1, 4, 1]
    assert m.eagle_draft(target, head, tokens, 3) == [] == m.medusa_candidates(target, random_heads(llama, 2, 0), (2, 2), tokens)
    target(tokens[:-1])
    f, text = np.array(target.feature(tokens[:-1])), list(tokens)
    for _ in range(3):
        z = np.array(head["w1"]) @ np.concatenate([f, llama.weights["tok_embeddings"][text[-1]]])
        f = f + np.array(head["w2"]) @ (z / (1 + np.exp(-z)))
        text.append(int(np.argmax(np.array(llama.weights["output"]) @ f)))
    assert m.eagle_draft(target, head, tokens, 3) == text[4:]


def test_a_medusa_head_learns_the_token_it_is_for(llama, monkeypatch):
    fits, ids = [], [i * i % 11 for i in range(50)]                          # two batches: 32 tokens and the other 18
    monkeypatch.setattr(m, "fit", lambda head, batches, *_: fits.append(batches))
    m.train_medusa(llama, ids, 2, 5)
    for ahead, batches in zip((2, 3), fits):
        for start, n, (h, goal) in zip((0, 32), (32, 18 - ahead), batches):
            assert goal == [ids[start + i + ahead] for i in range(n)]
            np.testing.assert_allclose(h, states_of(llama)(ids[start:start + n]), **TIGHT)


def test_training_a_head_makes_it_better(llama):
    """Trained on a text that goes round in circles, the heads get to know what comes two and three tokens on."""
    ids = [i % 7 for i in range(160)]
    states = states_of(llama)(ids[:32]).tolist()
    heads = m.train_medusa(llama, ids, 2, 60)
    assert len(heads) == 2
    for ahead, head in zip((2, 3), heads):
        guesses = reference_medusa_head(states, head).argmax(axis=1)
        assert (guesses == [(i + ahead) % 7 for i in range(32)]).mean() > 0.9
    assert heads[0]["w2"] != llama.weights["output"]
    head = m.train_eagle(llama, ids, random.Random(0), 0)                    # before training: the state stays as it is
    assert not np.any(head["w2"]) and np.std(head["w1"]) == pytest.approx(16 ** -0.5, rel=0.15) and np.shape(head["w1"]) == (8, 16)
    head = m.train_eagle(llama, ids, random.Random(0), 60)
    x = [f + llama.weights["tok_embeddings"][(i + 1) % 7] for i, f in enumerate(states[:-1])]
    after = m.eagle_step(x, states[:-1], head)
    says = [(np.array(f) @ np.array(llama.weights["output"]).T).argmax(axis=1) for f in (states[:-1], after, states[1:])]
    assert (says[1] == says[2]).mean() > max(0.8, (says[0] == says[2]).mean())
    closer = np.square(np.array(after) - states[1:]).mean() / np.square(np.array(states[:-1]) - states[1:]).mean()
    assert closer < 0.2


# --------------------------------------------------------------------------------- text with a shape

GRAMMARS = {  # as a regular expression: the grammar
    "ab": {"s": [("ab", None)]},
    "a|b": {"s": [("a", None), ("b", None)]},
    "(ab|c)*d": {"s": [("ab", "s"), ("c", "s"), ("d", None)]},
    "a(b|c)*d": {"s": [("a", "t")], "t": [("b", "t"), ("c", "t"), ("d", None)]},
    "a*ab": {"s": [("a", "s"), ("ab", None)]},                                     # which a is the last shows only later
    "(a|ab)(c|bc)": {"s": [("a", "t"), ("ab", "t")], "t": [("c", None), ("bc", None)]},
    "(abc)(abc|a)": {"s": [("abc", "t")], "t": [("abc", None), ("a", None)]}}
VOCAB = ["a", "b", "c", "d", "ab", "bc", "abc", "ca", "$"]
END = 8


@pytest.mark.parametrize("pattern", GRAMMARS)
def test_a_grammar_is_its_regular_expression(pattern):
    """Every text of up to 4 characters: may it end, may it go on? By re, trying all that may still come."""
    grammar = GRAMMARS[pattern]
    texts = ["".join(text) for n in range(5) for text in itertools.product("abcd", repeat=n)]
    fits = {text for text in texts if re.fullmatch(pattern, text)}
    endings = ["".join(text) for n in range(5) for text in itertools.product("abcd", repeat=n)]
    for text in texts:
        states = m.follow(grammar, frozenset({("", "s")}), text)
        assert (("", None) in states) == (text in fits)
        assert bool(states) == any(re.fullmatch(pattern, text + more) for more in endings)


@pytest.mark.parametrize("pattern", GRAMMARS)
def test_constrained_output_always_matches(pattern):
    for seed in range(6):
        free = toy(seed, len(VOCAB))
        eager = lambda tokens: [x + 2 * (i in (3, END)) for i, x in enumerate(free(tokens))]         # wants to end
        forced, rng = m.constrain(eager, VOCAB, GRAMMARS[pattern], 2, END), random.Random(seed)
        texts = [m.greedy(forced, [2, END], 40, eos=END), m.sample(forced, [2, END], 40, rng=rng, eos=END),
                 *(tokens for tokens, _ in m.beam_search(forced, [2, END], 40, width=3, eos=END))]
        for tokens in texts:
            assert tokens[-1] != END or re.fullmatch(pattern, "".join(VOCAB[token] for token in tokens[:-1]))
        assert any(tokens[-1] == END for tokens in texts)


def test_the_mask_allows_exactly_what_can_still_match():
    pattern = "(ab|c)*d"
    forced = m.constrain(lambda tokens: [0.0] * 9, VOCAB, GRAMMARS[pattern], 1, END)
    can_match = lambda text: any(re.fullmatch(pattern, text + more) for more in ("", "d", "bd"))
    for prefix in (prefix for n in range(4) for prefix in itertools.product(range(8), repeat=n)):
        text = "".join(VOCAB[token] for token in prefix)
        if can_match(text):
            expected = [can_match(text + token) for token in VOCAB[:8]] + [bool(re.fullmatch(pattern, text))]
            assert [x == 0.0 for x in forced([5, *prefix])] == expected
        else:
            assert forced([5, *prefix]) == [-INF] * 9


def test_the_story_s_regular_expression_is_its_grammar():
    rng = random.Random(0)
    for _ in range(50):
        text, rule = "", "animal"
        while rule:
            words, rule = rng.choice(m.STORY[rule])
            text += words
        assert re.fullmatch(m.STORY_RE, text)


# ------------------------------------------------------------------------------------ clear errors

MODEL = toy(0, 3)
RNG = random.Random(0)
BAD = [
    (lambda: m.greedy(MODEL, [], 3), "prompt"), (lambda: m.sample(MODEL, [], 3, rng=RNG), "prompt"),
    (lambda: m.beam_search(MODEL, [], 3, width=2), "prompt"), (lambda: m.speculative_greedy(MODEL, MODEL, [], 3, gamma=1), "prompt"),
    (lambda: m.speculative_sample(MODEL, MODEL, [], 3, gamma=1, rng=RNG), "prompt"),
    (lambda: m.jacobi_greedy(MODEL, [], 3, gamma=1), "prompt"), (lambda: m.lookahead_greedy(None, [], 3), "prompt"),
    (lambda: m.medusa_greedy(None, [], [], 3), "prompt"),
    (lambda: m.greedy(MODEL, [0], -1), "max_new_tokens"), (lambda: m.beam_search(MODEL, [0], 0, width=2), "max_new_tokens"),
    (lambda: m.greedy(MODEL, [0], 2, eos=3), "eos"), (lambda: m.greedy(MODEL, [0], 2, eos=-1), "eos"),
    (lambda: m.sample(MODEL, [0], 2, rng=RNG, eos=3), "eos"), (lambda: m.beam_search(MODEL, [0], 2, width=2, eos=3), "eos"),
    (lambda: m.beam_search(MODEL, [0], 2, width=0), "width"), (lambda: m.diverse_beam_search(MODEL, [0], 2, groups=0, diversity=1), "groups"),
    (lambda: m.diverse_beam_search(MODEL, [0], 0, groups=1, diversity=1), "max_new_tokens"),
    (lambda: m.speculative_greedy(MODEL, MODEL, [0], 3, gamma=0), "gamma"),
    (lambda: m.speculative_sample(MODEL, MODEL, [0], 3, gamma=0, rng=RNG), "gamma"),
    (lambda: m.jacobi_greedy(MODEL, [0], 3, gamma=0), "gamma"), (lambda: m.lookahead_greedy(None, [0], 3, window=0), "window"),
    (lambda: m.speculative_sample(MODEL, toy(0, 4), [0], 3, gamma=2, rng=RNG), "vocabulary"),
    *((lambda t=t: m.sample(MODEL, [0], 2, rng=RNG, temperature=t), "temperature") for t in (0, -1.0, INF, math.nan)),
    *((lambda p=p: m.sample(MODEL, [0], 2, rng=RNG, top_p=p), "top_p") for p in (0, -0.1, 1.5, math.nan)),
    *((lambda p=p: m.sample(MODEL, [0], 2, rng=RNG, min_p=p), "min_p") for p in (-0.1, 1.5)),
    *((lambda p=p: m.sample(MODEL, [0], 2, rng=RNG, typical_p=p), "typical_p") for p in (0, 1, 1.5)),
    *((lambda k=k: m.sample(MODEL, [0], 2, rng=RNG, top_k=k), "top_k") for k in (0, -3)),
    *((lambda p=p: m.repetition_penalty([0.0], [0], p), "penalty") for p in (0, -1.0)),
]


def test_an_error_says_what_would_do():
    for call, text in ((lambda: m.greedy(MODEL, [0], 2, eos=3), "from 0 to 2"), (lambda: m.greedy(MODEL, [0], -1), "at least 0"),
                       (lambda: m.beam_search(MODEL, [0], 0, width=1), "at least 1")):
        with pytest.raises(ValueError, match=text):
            call()
    assert m.greedy(MODEL, [0], 1, eos=2) and m.greedy(MODEL, [0], 1, eos=0)


@pytest.mark.parametrize("bad, word", BAD, ids=[f"{i} {word}" for i, (_, word) in enumerate(BAD)])
def test_bad_settings_are_named(bad, word):
    with pytest.raises(ValueError, match=word):
        bad()
