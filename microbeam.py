#!/usr/bin/env python3
"""From logits to text: how the next token is chosen, and how several are had for one pass of the model.

A language model scores every possible next token. Everything after that is decoding: taking the best, drawing
by chance, searching ahead, or letting something cheap guess several tokens that the model then checks all at
once. This script does each on a tiny Llama that it trains first on a nursery rhyme, and proves what is usually
just said: that speculative decoding changes nothing but the bill.

Run it (`python microbeam.py`), read the trace, then read on from here: every section of the trace is a section
of this file. A decoder knows a model only as logits_fn(tokens); the Llama, its training and its cache come last.

The papers:
  Holtzman et al., The Curious Case of Neural Text Degeneration (top-p), 2019,
    arXiv:1904.09751                                                                        sections 1, 2
  Keskar et al., CTRL (the repetition penalty), 2019, arXiv:1909.05858                      section 2
  Meister et al., Locally Typical Sampling, 2022, arXiv:2202.00666                          section 2
  Nguyen et al., Turning Up the Heat: Min-p Sampling, 2024, arXiv:2407.01082                section 2
  Stahlberg & Byrne, On NMT Search Errors and Model Errors, 2019, arXiv:1908.10090          section 4
  Vijayakumar et al., Diverse Beam Search, 2016, arXiv:1610.02424                           section 4
  Leviathan et al., Fast Inference from Transformers via Speculative Decoding, 2022,
    arXiv:2211.17192; Chen et al., Accelerating Large Language Model Decoding with
    Speculative Sampling, 2023, arXiv:2302.01318                                            sections 5, 6
  Cai et al., Medusa, 2024, arXiv:2401.10774                                                section 8
  Li et al., EAGLE, 2024, arXiv:2401.15077                                                  section 9
  Santilli et al., Accelerating Transformer Inference for Translation via Parallel
    Decoding, 2023, arXiv:2305.10427                                                        section 10
  Fu et al., Break the Sequential Dependency of LLM Inference Using Lookahead Decoding,
    2024, arXiv:2402.02057                                                                  section 10
  Willard & Louf, Efficient Guided Generation for Large Language Models, 2023,
    arXiv:2307.09702                                                                        section 11
"""

from __future__ import annotations

import cmath
import heapq
import itertools
import math
import operator
import os
import random
import re
import sys
import textwrap
import time
import unicodedata
from argparse import ArgumentParser, ArgumentTypeError, HelpFormatter, Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from statistics import fmean
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]
LogitsFn = Callable[[Sequence[int]], Vector]  # tokens so far -> a score for each possible next token
Candidate = tuple[list[int], float]           # tokens, and the log-probability of those after the prompt
PROMPT = "This is the"
SECOND_PROMPT = "This is the priest"
CONTEXT = "This is the cat that killed the rat that ate the malt that lay in the house that Jack built.\n"
MAX_NEW_TOKENS = 24   # tokens generated
TEMPERATURE = 1.0     # divides the logits
TOP_K = 5             # tokens kept
TOP_P = 0.8           # probability kept
MIN_P = 0.2           # share of the best token's probability that a token must have
TYPICAL_P = 0.8       # probability kept, most typical tokens first
BEAM_WIDTH = 4        # candidates kept by beam search
LENGTH_PENALTY = 1.0  # score = log-probability / length^this
GAMMA = 4             # tokens drafted before each pass of the target
VOCAB_SIZE = 160      # every word of the rhyme is one token then
TARGET = {"dim": 20, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24}
DRAFT = {"dim": 12, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 16}
STEPS = 44            # of training the target and the Medusa heads; two thirds for the draft, half as many again for EAGLE
STEP_TOKENS = 32      # read in each step
LEARNING_RATE = 0.04
MAX_PROMPT = 64       # tokens of the longest prompt accepted

# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Greedy
#
# Take the token with the highest score, append it, ask again: x_t = argmax logits(x_1 … x_{t-1}). Right where one
# answer is wanted (code, extraction). But it is short-sighted: the best first step may lead to where every next
# step is poor. And it loops: once a text is back where it was, the same choice comes again, for ever; weak models
# and long texts do it most (Holtzman et al. call it degeneration).


def greedy(logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, eos: int | None = None) -> list[int]:
    """The new tokens, each the likeliest (the lowest id of equals), up to and including eos if it comes.

    ValueError: an empty prompt, max_new_tokens below 0, eos outside the vocabulary.
    """
    return extend_by(argmax, logits_fn, prompt, max_new_tokens, eos)


def extend_by(choose: Callable[[Vector], int], logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int,
              eos: int | None) -> list[int]:
    """The loop of every decoder that goes token by token: ask for logits, choose(logits), append."""
    check_request(prompt, max_new_tokens)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens:
        logits = logits_fn(tokens)
        check_eos(eos, len(logits))
        tokens.append(choose(logits))
        if tokens[-1] == eos:
            break
    return tokens[len(prompt):]


def argmax(logits: Vector) -> int:
    """The first index of the largest."""
    return logits.index(max(logits))


# 2. Shaping the distribution
#
# To sample is to draw the next token by its probability. The tail is the trouble: thousands of tokens, each
# unlikely, together not, and one bad token spoils all that follow. So logits are reshaped first.
#
#     temperature   p ∝ exp(logit / t)          t < 1 sharpens, t > 1 flattens, the order stays
#     top-k         the k likeliest             the same number, sure or unsure
#     top-p         the likeliest that together have probability p: few when sure, many when not (a "nucleus")
#     min-p         those with at least min_p times the probability of the best: holds up when t is high
#     typical       those whose surprise -log p is nearest to the entropy H, the surprise expected, up to mass p:
#                   it may throw out the likeliest token, if that says less than a text usually does
#
# A removed token gets -inf. Ties, edges and this order are those of Hugging Face transformers (the …LogitsWarper
# classes of generation/logits_process.py). Penalties come before, against tokens that were there already:
# repetition divides (or, below 0, multiplies) a logit, once; presence and frequency (OpenAI's API) subtract,
# once and per time.


def apply_temperature(logits: Vector, t: float) -> Vector:
    """logits / t. ValueError unless t is above 0 (for t -> 0, ask greedy()) and finite."""
    if not 0 < t < math.inf:
        raise ValueError(f"temperature must be above 0 (greedy is the limit at 0), not {t}")
    return [logit / t for logit in logits]


def top_k_filter(logits: Vector, k: int) -> Vector:
    """The k highest stay, and whatever ties with the k-th. ValueError if k < 1."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}")
    kth = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    return keep_where([logit >= kth for logit in logits], logits)


def top_p_filter(logits: Vector, p: float) -> Vector:
    """The likeliest stay, until p is reached; the token that crosses it too. ValueError unless 0 < p <= 1.

    Said from the other end, as transformers does: the least likely go while all that went, together, have
    at most 1 - p; the last one always stays. Of tokens that tie, the lower id goes first.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {p}")
    kept, gone, probabilities = [True] * len(logits), 0.0, softmax(logits)
    for i in sorted(range(len(logits)), key=lambda i: logits[i])[:-1]:
        gone += probabilities[i]
        if gone > 1 - p:
            break
        kept[i] = False
    return keep_where(kept, logits)


def min_p_filter(logits: Vector, p: float) -> Vector:
    """Tokens with at least p times the probability of the likeliest stay. ValueError unless 0 <= p <= 1."""
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {p}")
    probabilities = softmax(logits)
    least = p * max(probabilities)
    return keep_where([value >= least for value in probabilities], logits)


def typical_filter(logits: Vector, p: float) -> Vector:
    """Those whose surprise is nearest to the entropy stay, until p is reached, and what ties. ValueError unless 0 < p < 1."""
    if not 0 < p < 1:
        raise ValueError(f"typical_p must be above 0 and below 1, not {p}")
    probabilities, surprises = softmax(logits), [-value for value in log_softmax(logits)]
    expected = sum(value * surprise for value, surprise in zip(probabilities, surprises) if value)
    oddness = [abs(surprise - expected) for surprise in surprises]
    total = 0.0
    for i in sorted(range(len(logits)), key=lambda i: oddness[i]):
        total, last = total + probabilities[i], oddness[i]
        if total >= p:
            break
    return keep_where([odd <= last for odd in oddness], logits)


def keep_where(kept: Sequence[bool], logits: Vector) -> Vector:
    """logits, with -inf where not kept."""
    return [logit if stays else -math.inf for stays, logit in zip(kept, logits)]


def repetition_penalty(logits: Vector, tokens: Sequence[int], penalty: float) -> Vector:
    """Tokens seen before: positive logits / penalty, negative × penalty. ValueError unless it is above 0 and finite."""
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be above 0 (1 changes nothing), not {penalty}")
    seen = set(tokens)
    return [logit if i not in seen else logit * penalty if logit < 0 else logit / penalty
            for i, logit in enumerate(logits)]


def count_penalty(logits: Vector, tokens: Sequence[int], presence: float = 0.0, frequency: float = 0.0) -> Vector:
    """logit - presence · (seen before?) - frequency · (how often)."""
    counts = Counter(tokens)
    return [logit - presence * (counts[i] > 0) - frequency * counts[i] for i, logit in enumerate(logits)]


def distribution(logits: Vector, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
                 min_p: float | None = None, typical_p: float | None = None) -> Vector:
    """The probabilities to draw from: what is asked for, in transformers' order, then softmax."""
    logits = apply_temperature(logits, temperature)
    for reshape, setting in ((top_k_filter, top_k), (top_p_filter, top_p), (min_p_filter, min_p),
                             (typical_filter, typical_p)):
        logits = logits if setting is None else reshape(logits, setting)
    return softmax(logits)


# 3. Sampling done right
#
# A sampler is right if its texts come as often as the model says: P(x_1 … x_n) = Π_t p(x_t | what came before).
# Two tests show it. Counting: over many draws, Pearson's χ² = Σ (seen - expected)² / expected should be about as
# large as its degrees of freedom. And enumerating: a sampler's only randomness is draw(), so hand it a source that
# tries every outcome in turn, and add up what each text's branches weigh. Nothing is estimated then.


def sample(logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, rng: random.Random,
           temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None,
           min_p: float | None = None, typical_p: float | None = None, eos: int | None = None) -> list[int]:
    """The new tokens, each drawn from distribution(logits, …), up to and including eos if it comes.

    ValueError: an empty prompt, max_new_tokens below 0, eos outside the vocabulary, a setting out of its range.
    """
    return extend_by(lambda logits: draw(distribution(logits, temperature, top_k, top_p, min_p, typical_p), rng),
                     logits_fn, prompt, max_new_tokens, eos)


def draw(p: Vector, rng: random.Random) -> int:
    """An index, i with probability p[i]. All randomness of the decoders goes through here."""
    return rng.choices(range(len(p)), weights=p)[0]


# 4. Beam search
#
# Instead of one text, keep the `width` best so far. Each step tries every next token on each of them and keeps
# the best `width` of all these; one that ends (eos) is set aside as finished. A text's probability is a product,
# so its log is a sum, and every further token lowers it. To compare texts of different lengths:
#
#     score = Σ log p / length^length_penalty      0: plain log-probability, which favours the short;
#                                                  1: the mean per token; more favours the long
#
# With width 1 this is greedy; wide enough, it is exhaustive search. In between it usually finds likelier texts
# than greedy, at `width` times the work. (Nothing guarantees it: a beam may drop greedy's text half-way and then end
# below it.) Nor is wider always better: Stahlberg & Byrne searched exactly, and for more than half of their sentences
# the likeliest translation of all was the empty one. The model's errors had been hidden by the search's.
# (transformers keeps 2·width candidates a step, so that `width` of them go on even when some have ended.)
#
# The texts in a beam tend to be twins. Diverse beam search makes several beams take turns and charges each
# token `diversity` for every beam that has just chosen it.


def beam_search(logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, width: int,
                length_penalty: float = 1.0, eos: int | None = None, early_stopping: bool = False) -> list[Candidate]:
    """[(new tokens, score)], best first, at most `width`; those still running at the end count too.

    It stops before max_new_tokens when `width` have ended and none that runs can still beat the worst of them, however
    long it gets; with early_stopping as soon as `width` have ended, leaving out what still runs.
    ValueError: width or max_new_tokens below 1, an empty prompt, eos outside the vocabulary.
    """
    check_request(prompt, max_new_tokens, width=width, at_least=1)
    beams, finished = [(list(prompt), 0.0)], []

    def score(candidate: Candidate) -> float:
        return candidate[1] / (len(candidate[0]) - len(prompt)) ** length_penalty

    for length in range(1, max_new_tokens + 1):
        best = extensions(logits_fn, beams, eos, width)
        finished = sorted(finished + [c for c in best if c[0][-1] == eos], key=score, reverse=True)[:width]
        beams = [c for c in best if c[0][-1] != eos]
        # The sum of a running text can only fall; its length may still help it, up to the longest or (< 0) not at all.
        divisor = (max_new_tokens if length_penalty > 0 else length) ** length_penalty
        hopeless = len(finished) == width and all(total / divisor <= score(finished[-1]) for _, total in beams)
        if hopeless or early_stopping and len(finished) == width:
            beams = []
        if not beams:
            break
    ranked = sorted(finished + beams, key=score, reverse=True)[:width]
    return [(tokens[len(prompt):], score((tokens, total))) for tokens, total in ranked]


def extensions(logits_fn: LogitsFn, beams: Sequence[Candidate], eos: int | None = None,
               keep: int | None = None) -> list[Candidate]:
    """The likeliest `keep` (all, if None) of every beam with every next token that is not forbidden (-inf), best first."""
    out = []
    for tokens, total in beams:
        log_p = log_softmax(logits_fn(tokens))
        check_eos(eos, len(log_p))
        out += [(total + gain, tokens, token) for token, gain in enumerate(log_p) if gain > -math.inf]
    ranked = sorted(out, key=lambda candidate: -candidate[0])[:keep]
    return [(tokens + [token], total) for total, tokens, token in ranked]


def diverse_beam_search(logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, groups: int,
                        diversity: float) -> list[Candidate]:
    """One beam of width 1 in each of `groups`: [(new tokens, log-probability)], in their order.

    A token costs `diversity` for each earlier group that took it at this step (Hamming diversity).
    """
    check_request(prompt, max_new_tokens, groups=groups, at_least=1)
    beams: list[Candidate] = [(list(prompt), 0.0)] * groups
    for _ in range(max_new_tokens):
        taken: Counter[int] = Counter()
        for g, beam in enumerate(beams):
            beams[g] = max(extensions(logits_fn, [beam]), key=lambda c: c[1] - diversity * taken[c[0][-1]])
            taken[beams[g][0][-1]] += 1
    return [(tokens[len(prompt):], total) for tokens, total in beams]


def exact_search(logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, eos: int,
                 max_passes: int) -> Candidate | None:
    """The likeliest text of all that end with eos or at full length; None if max_passes cannot settle it.

    Always extend the likeliest text so far. As tokens only lower it, the first complete one to come up is the best.
    """
    queue: list[tuple[float, list[int]]] = [(0.0, list(prompt))]
    for _ in range(max_passes):
        cost, tokens = heapq.heappop(queue)
        if len(tokens) > len(prompt) and tokens[-1] == eos or len(tokens) == len(prompt) + max_new_tokens:
            return tokens[len(prompt):], -cost
        for longer, total in extensions(logits_fn, [(tokens, -cost)], eos):
            heapq.heappush(queue, (-total, longer))
    return None


# 5. Speculative decoding
#
# One pass of a large model over five tokens takes about as long as over one: the time goes into reading the
# weights. So let a small draft model guess γ tokens, and have the target score them all in one pass. Keep the
# guesses up to the first wrong one; the row behind the last one kept gives one more token for free.
#
# Greedy: a guess is right if it is the target's argmax. The output *is* the target's, token for token.
#
# Sampling: right by chance, so that the target's distribution p stays exactly as it was. The guess x is drawn from
# the draft's own distribution q:
#
#     keep x with probability min(1, p(x) / q(x))
#     otherwise draw from max(0, p - q), normalised: where the target wants more than the draft gave
#
# Why it is exact: P(y) = q(y) min(1, p/q) + P(rejected) · max(0, p(y) - q(y)) / Σ max(0, p - q). The first term is
# min(p, q), and P(rejected) = 1 - Σ min(p, q) = Σ max(0, p - q): the sum is min(p, q) + max(0, p - q) = p(y).
# It holds for any q if the guess was drawn from that same q. Taking the draft's argmax, but judging it by softmax
# q, is a common bug. Temperature and top-p go into p, as that is the distribution wanted, and into q, so that the
# two agree more often. (Exact up to arithmetic: a GPU may round a pass over five tokens otherwise than over one.)


@dataclass
class Counts:
    """What a speculative run did: for every pass of the target, the tokens drafted and how many were accepted."""
    rounds: list[tuple[list[int], int]] = field(default_factory=list)

    @property
    def target_passes(self) -> int:
        """Passes of the target."""
        return len(self.rounds)

    @property
    def drafted(self) -> int:
        """Tokens drafted."""
        return sum(len(drafts) for drafts, _ in self.rounds)

    @property
    def accepted(self) -> int:
        """Drafted tokens kept."""
        return sum(kept for _, kept in self.rounds)


def speculative_greedy(target_fn: LogitsFn, draft_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *,
                       gamma: int) -> tuple[list[int], Counts]:
    """(greedy(target_fn, …), Counts): `gamma` tokens at a time drafted by greedy(draft_fn, …).

    ValueError: gamma below 1, an empty prompt, max_new_tokens below 0.
    """
    return speculate(target_fn, partial(greedy, draft_fn), prompt, max_new_tokens, gamma=gamma)


def speculate(target_fn: LogitsFn, propose: Callable[[list[int], int], list[int]], prompt: Sequence[int],
              max_new_tokens: int, *, gamma: int) -> tuple[list[int], Counts]:
    """(greedy(target_fn, …), Counts), whoever guesses: propose(tokens, n) gives up to n tokens to follow tokens.

    A pass is asked for at most gamma guesses, and never for more than it can use: it puts one token itself.
    """
    check_request(prompt, max_new_tokens, gamma=gamma)
    tokens, counts, end = list(prompt), Counts(), len(prompt) + max_new_tokens
    while len(tokens) < end:
        drafts = propose(tokens, min(gamma, end - len(tokens) - 1))
        best, kept = verify(target_fn, tokens, drafts)
        tokens += best[:kept + 1]  # the drafts that agree, and the target's own token after them
        counts.rounds.append((drafts, kept))
    return tokens[len(prompt):], counts


def speculative_sample(target_fn: LogitsFn, draft_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *,
                       gamma: int, rng: random.Random, temperature: float = 1.0, top_k: int | None = None,
                       top_p: float | None = None, min_p: float | None = None,
                       choose_draft: Callable[[Vector, random.Random], int] = draw) -> tuple[list[int], Counts]:
    """(tokens distributed as sample(target_fn, …), Counts). As Leviathan et al. and Chen et al.

    choose_draft picks a guess from q; anything but draw() is a mistake, and section 5 makes it.
    ValueError: as speculative_greedy and sample, and if the two vocabularies differ in size.
    """
    check_request(prompt, max_new_tokens, gamma=gamma)
    shape = partial(distribution, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    tokens, counts, end = list(prompt), Counts(), len(prompt) + max_new_tokens
    while len(tokens) < end:
        drafts, q = [], []
        for _ in range(min(gamma, end - len(tokens) - 1)):
            q.append(shape(draft_fn(tokens + drafts)))
            drafts.append(choose_draft(q[-1], rng))
        p = [shape(row) for row in last_rows(target_fn, tokens + drafts, len(drafts) + 1)]
        kept = 0
        while kept < len(drafts):
            keep = acceptance(p[kept], q[kept])[drafts[kept]]
            rejected = draw([keep, 1 - keep], rng)  # 0 or 1
            if rejected:
                break
            kept += 1
        after = p[kept] if kept == len(drafts) else residual(p[kept], q[kept])
        tokens += drafts[:kept] + [draw(after, rng)]
        counts.rounds.append((drafts, kept))
    return tokens[len(prompt):], counts


def acceptance(p: Vector, q: Vector) -> Vector:
    """For each token, the probability that it is kept when drafted: min(1, p / q)."""
    if len(p) != len(q):
        raise ValueError(f"target and draft must have the same vocabulary, not {len(p)} and {len(q)} tokens")
    return [min(1.0, a / b) if b else 1.0 for a, b in zip(p, q)]


def residual(p: Vector, q: Vector) -> Vector:
    """What a rejected draft is replaced from: max(0, p - q), normalised (p itself where p = q: nothing is rejected)."""
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    total = sum(rest)
    return [value / total for value in rest] if total else p


def verify(target_fn: LogitsFn, tokens: list[int], drafts: list[int]) -> tuple[list[int], int]:
    """One pass: (the target's own token after tokens and after each draft, how many drafts from the first agree)."""
    best = [argmax(row) for row in last_rows(target_fn, tokens + drafts, len(drafts) + 1)]
    return best, next((i for i, draft in enumerate(drafts) if draft != best[i]), len(drafts))


def last_rows(logits_fn: LogitsFn, tokens: Sequence[int], n: int) -> Matrix:
    """Logits after each of the last n prefixes of tokens, [n][vocab_size]; in one pass where the model offers that."""
    if hasattr(logits_fn, "last_rows"):
        return logits_fn.last_rows(tokens, n)
    return [logits_fn(tokens[:end]) for end in range(len(tokens) - n + 1, len(tokens) + 1)]


# 6. When it pays
#
# The probability that one draft is kept is β = Σ_x q(x) min(1, p(x)/q(x)) = Σ min(p, q), different at every place;
# call its mean α. Were places alike and independent, a pass would yield (1 - α^(γ+1)) / (1 - α) tokens on average,
# and if a pass of the draft costs c passes of the target, a round of γ drafts and one check costs γc + 1:
#
#     speed-up = (1 + α + α² + … + α^γ) / (γc + 1)
#
# That counts the target's pass over γ + 1 tokens as one over one token: true while reading the weights is what
# takes the time, at small batches. A busy server has no idle arithmetic to spend, and gains little or loses.


def expected_tokens(alpha: float, gamma: int) -> float:
    """Mean tokens of a pass if each draft is kept with probability alpha: 1 + alpha + … + alpha^gamma."""
    return sum(alpha ** i for i in range(gamma + 1))


def speed_up(alpha: float, gamma: int, cost: float) -> float:
    """How many times faster than without a draft, whose pass costs `cost` passes of the target."""
    return expected_tokens(alpha, gamma) / (gamma * cost + 1)


def best_gamma(alpha: float, cost: float, limit: int = 16) -> int:
    """The γ up to limit with the best speed-up; 0: no drafts at all is best."""
    return max(range(limit + 1), key=lambda gamma: speed_up(alpha, gamma, cost))


# 7. Drafts for nothing
#
# A draft need not be a trained model. Text repeats itself: prompt lookup (Saxena 2023) finds the last few tokens
# earlier in the text and proposes what came after them; summaries, edits and code copy a lot. An n-gram model counts
# which token follows which, in any corpus. And the target itself, with its weights rounded to a few bits
# (microquant.py does that well; here the simple way), agrees nearly always and reads less memory.


def prompt_lookup(tokens: Sequence[int], n: int, max_ngram: int = 3) -> list[int]:
    """Up to n tokens that followed the last max_ngram tokens when they last came, or as many as did come, or [].

    (transformers takes the first place where they came, and looks for two tokens at most unless told otherwise.)
    """
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start:start + size] == tokens[-size:]:
                return list(tokens[start + size:start + size + n])
    return []


def ngram_model(corpus: Sequence[int], vocab_size: int, order: int = 3) -> LogitsFn:
    """What followed in the corpus, counted: after the longest context, up to order - 1 tokens, that was seen there."""
    counts: dict[tuple[int, ...], Counter[int]] = {}
    for i, token in enumerate(corpus):
        for size in range(min(order - 1, i) + 1):
            counts.setdefault(tuple(corpus[i - size:i]), Counter())[token] += 1

    def logits_fn(tokens: Sequence[int]) -> Vector:
        contexts = (tuple(tokens[len(tokens) - size:]) for size in range(min(order - 1, len(tokens)), -1, -1))
        seen = next(counts[context] for context in contexts if context in counts)
        return [math.log(seen[token] + 0.01) for token in range(vocab_size)]

    return logits_fn


def rounded_weights(weights: dict[str, Matrix | Vector], bits: int) -> dict[str, Matrix | Vector]:
    """Every row of every matrix rounded to 2^(bits-1) - 1 steps each way of its largest weight."""
    steps = 2 ** (bits - 1) - 1

    def rounded(row: Vector) -> Vector:
        scale = max(map(abs, row)) / steps
        return [round(x / scale) * scale for x in row] if scale else row

    return {name: list(map(rounded, w)) if isinstance(w[0], list) else w for name, w in weights.items()}


# 8. Medusa
#
# Drop the draft model: the target's last hidden state h already knows something about the tokens after next.
# Put extra heads on it, trained while the target stays frozen; head k guesses the token k places after the next:
#
#     logits_k = w2_k (h + silu(w1_k h))          w1 starts at 0 and w2 at the target's own output matrix
#
# Take the best few of each head: the candidates form a tree, verified in one pass. A node of the tree is the text
# that ends there, and it sees the nodes whose text begins its own, no other branch (CachedModel.run does that). The
# longest path on which every token is the target's choice is kept. (The paper's best trees are sparse, with the
# likeliest paths only; and its "typical acceptance", which is looser and changes the output, is left out.)


Head = dict[str, Matrix]


def medusa_head(h: Matrix, head: Head) -> Matrix:
    """Hidden states [n][dim] -> logits [n][vocab_size] of the token that this head is for."""
    return linear(add(h, silu(linear(h, head["w1"]))), head["w2"])


def silu(x: Matrix) -> Matrix:
    """x · sigmoid(x), element by element: swiglu with nothing to gate."""
    return swiglu(x, [[1.0] * len(x[0])] * len(x))


def medusa_candidates(target: CachedModel, heads: Sequence[Head], tops: Sequence[int],
                      tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """Every way to follow tokens with one of the tops[0] best of head 1, then one of the tops[1] best of head 2, …

    The heads read the state where the target last was, before the last token; before it has read anything: [].
    """
    h = target.feature(tokens[:-1])
    rows = [medusa_head([h], head)[0] for head in heads] if h else []
    best = [sorted(range(len(row)), key=lambda i: -row[i])[:top] for row, top in zip(rows, tops)]
    return list(itertools.product(*best)) if best else []


def tree_mask(nodes: Sequence[tuple[int, ...]], keys: Sequence[tuple[int, ...]]) -> list[list[bool]]:
    """mask[i][j]: does the text of node i begin with the text of key j?"""
    return [[node[:len(key)] == key for key in keys] for node in nodes]


def verify_tree(target: CachedModel, tokens: Sequence[int], candidates: Sequence[Sequence[int]]) -> tuple[list[int], dict]:
    """One pass: (what the target puts after tokens, as far as a candidate foresaw it, and one more; {text: logits})."""
    text = tuple(tokens)
    rows = target.read([text, *((*text, *path) for path in candidates)])
    while text in rows:
        text += (argmax(rows[text]),)
    return list(text[len(tokens):]), rows


def medusa_greedy(target: CachedModel, heads: Sequence[Head], prompt: Sequence[int], max_new_tokens: int, *,
                  tops: Sequence[int] = (3, 2)) -> tuple[list[int], Counts]:
    """(the same tokens as greedy, Counts: a round's drafts are all nodes of its tree); the first pass reads the prompt."""
    check_request(prompt, max_new_tokens)
    tokens, counts = list(prompt), Counts()
    while len(tokens) < len(prompt) + max_new_tokens:
        found, rows = verify_tree(target, tokens, medusa_candidates(target, heads, tops, tokens))
        counts.rounds.append(([text[-1] for text in rows if len(text) > len(tokens)], len(found) - 1))
        tokens += found
    return tokens[len(prompt):][:max_new_tokens], counts


# 9. EAGLE
#
# Medusa's heads guess tokens without knowing the token before. EAGLE guesses the next *hidden state*, from the last
# one and the embedding of the token chosen there; the target's own output matrix turns it into a token, and so on.
#
#     f_t+1 ≈ f_t + w2 silu(w1 [f_t ; embedding(x_t+1)])       draft x_t+2 = argmax(output f_t+1), and again
#
# Trained to hit the state, by squared error. (The paper adds a cross-entropy on the token, uses a whole decoder layer
# with attention over all states so far, and drafts a tree; two matrices and a chain show the idea.)


def eagle_step(x: Matrix, f: Matrix, head: Head) -> Matrix:
    """x = [f ; embedding of the next token] [n][2·dim], f [n][dim] -> the next hidden states [n][dim]."""
    return add(f, linear(silu(linear(x, head["w1"])), head["w2"]))


def eagle_draft(target: CachedModel, head: Head, tokens: list[int], n: int) -> list[int]:
    """Up to n guesses for speculate(), from the state where the target last was; none before it has read anything."""
    drafts, f = [], target.feature(tokens[:-1])
    weights = target.llama.weights
    for _ in range(n if f else 0):
        f = eagle_step([f + weights["tok_embeddings"][(tokens + drafts)[-1]]], [f], head)[0]
        drafts.append(argmax(linear([f], weights["output"])[0]))
    return drafts


# 10. Jacobi and lookahead decoding
#
# Greedy text solves equations: x_t = argmax logits(x_1 … x_t-1) for every t. Guess them all, and one pass renews
# every x_t at once (Jacobi's way; Santilli et al.). At least the first is right after each pass; with luck several
# settle together. Mostly, good tokens appear in the wrong place and are overwritten.
#
# Lookahead decoding keeps them. `window` guesses run side by side for ngram - 1 levels, each level renewed from the
# one before it; every column read downwards is an n-gram that the target itself strung together, and goes into a
# pool. In the same pass, the n-grams of the pool that start with the last token are verified, like Medusa's
# candidates. (The paper's windows keep a few more tokens in the first level.) No draft, no training, more arithmetic.


def jacobi_greedy(target_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *,
                  gamma: int) -> tuple[list[int], Counts]:
    """(the same tokens as greedy, Counts): gamma guesses at a time, renewed by each pass; a new one is the last token."""
    check_request(prompt, max_new_tokens, gamma=gamma)
    tokens, counts, end = list(prompt), Counts(), len(prompt) + max_new_tokens
    guesses: list[int] = []
    while len(tokens) < end:
        guesses = (guesses + [tokens[-1]] * gamma)[:min(gamma, end - len(tokens) - 1)]
        best, kept = verify(target_fn, tokens, guesses)
        counts.rounds.append((guesses, kept))
        tokens, guesses = tokens + best[:kept + 1], best[kept + 1:]
    return tokens[len(prompt):], counts


def lookahead_greedy(target: CachedModel, prompt: Sequence[int], max_new_tokens: int, *, window: int = 5,
                     ngram: int = 3, guesses: int = 4) -> tuple[list[int], Counts]:
    """(the same tokens as greedy, Counts: a round's drafts are all nodes of its tree).

    Every level begins as the first `window` tokens of the prompt, over again if it is shorter. Verified in a pass: of
    the pool's n-grams that begin with the last token, the `guesses` that came up last.
    """
    check_request(prompt, max_new_tokens, window=window, ngram=ngram, guesses=guesses)
    tokens, counts, pool = list(prompt), Counts(), {}
    levels = [[prompt[j % len(prompt)] for j in range(window)]] * (ngram - 1)
    while len(tokens) < len(prompt) + max_new_tokens:
        # The first level is a chain after the text; under each of its tokens hangs its column of the other levels.
        columns = [(*levels[0][:j], *column) for j, column in enumerate(zip(*levels))]
        found, rows = verify_tree(target, tokens, columns + list(pool.get(tokens[-1], {}))[-guesses:])
        counts.rounds.append(([text[-1] for text in rows if len(text) > len(tokens)], len(found) - 1))
        renewed = [argmax(rows[*tokens, *column]) for column in columns]  # what comes at the foot of each
        for first, *rest in zip(*levels, renewed):
            grams = pool.setdefault(first, {})
            grams.pop(tuple(rest), None)
            grams[tuple(rest)] = True  # a dict keeps its order: the latest last
        levels, tokens = levels[1:] + [renewed], tokens + found
    return tokens[len(prompt):][:max_new_tokens], counts


# 11. Text with a shape
#
# Output that a program must read (JSON, a date, one of three answers) can be forced into shape: an automaton reads
# what was written so far, and every token it could not go on from gets -inf. Here the shape is a grammar whose
# rules are lists of (words, the rule that comes after them; None: the end), which can say all that a regular
# expression can. The automaton may be in several states at once: (what is left of the words, the rule after them).
#
# The mask is local, though: P_local(text) = Π p(x_t) / Z_t, where Z_t is the mass that was allowed at step t. Asking
# the model for a text *given* that it fits would be P(text) / P(fits). Local masking walks gladly into a place
# where the model has nothing good to say, since it never sees the bill, Π Z_t.


Grammar = dict[str, list[tuple[str, str | None]]]  # it starts with its first rule; words are never empty


States = frozenset[tuple[str, str | None]]


def follow(grammar: Grammar, states: States, text: str) -> States:
    """The states after reading text in any of these; none if it does not fit."""
    for c in text:
        choices = [choice for left, rule in states
                   for choice in ([(left, rule)] if left else grammar.get(rule, []))]
        states = frozenset((words[1:], rule) for words, rule in choices if words[0] == c)
    return states


def constrain(logits_fn: LogitsFn, vocab: Sequence[str], grammar: Grammar, prompt_length: int, eos: int) -> LogitsFn:
    """logits_fn with -inf wherever the text after the prompt could no longer fit; eos only where it may end."""
    start = frozenset({("", next(iter(grammar)))})

    @cache  # which tokens a state allows never changes; production works it out beforehand
    def allowed(states: States) -> list[bool]:
        return [("", None) in states if token == eos else bool(follow(grammar, states, text))
                for token, text in enumerate(vocab)]

    def masked(tokens: Sequence[int]) -> Vector:
        written = "".join(vocab[token] for token in tokens[prompt_length:])
        return keep_where(allowed(follow(grammar, start, written)), logits_fn(tokens))

    return masked


# 12. The table
#
# Everything above on the same prompts. log p: what the model says of the text, whoever chose it; distinct-2: the
# share of its pairs of neighbours that differ; passes: of the target (a beam's go side by side, but each is paid for).

# =============================================================================================
# THE EXPERIMENTS
# =============================================================================================

# A language of three words. "a" is the likeliest first word, but whatever follows it is a toss-up.
TOY = {(): [0.5, 0.4, 0.1], (0,): [0.4, 0.35, 0.25], (1,): [0.05, 0.05, 0.9], (2,): [0.2, 0.6, 0.2]}


TOY_PROMPT = [0]  # any one token: the words come after it


def toy_logits(tokens: Sequence[int]) -> Vector:
    """Logits of the toy language: log-probabilities that depend on the last word generated."""
    return list(map(math.log, TOY[tuple(tokens[1:][-1:])]))


# 1. Greedy


def show_greedy(trace: Trace, knobs: Namespace) -> None:
    """The toy where greedy loses, and greedy on two models: one good, one that loops."""
    trace.say("Greedy sees one step ahead. A toy language of three words, all its two-word texts with their "
              "probabilities: the best first word is not the first word of the best text.")
    every = {(a, b): TOY[()][a] * TOY[a,][b] for a in range(3) for b in range(3)}
    path, best = tuple(greedy(toy_logits, TOY_PROMPT, 2)), max(every, key=every.get)
    trace.ask("a begins with 0.5, b with 0.4, c with 0.1. After a come 0.4, 0.35, 0.25; after b 0.05, 0.05, 0.9; "
              "after c 0.2, 0.6, 0.2. How probable is the best text of two words?", every[best])
    rows = [[f"{'abc'[a]} {TOY[()][a]:.2f}" * (b == 0), f"{'abc'[b]} {TOY[a,][b]:.2f}", f"{p:.3f}", bar(p, 0.4, 20),
             "← greedy" * ((a, b) == path) + "← best" * ((a, b) == best)] for (a, b), p in every.items()]
    old_table(trace, ["first", "second", "both", "", ""], rows, left=(0, 1, 3, 4))

    target, draft = models(knobs)
    n = 2 * knobs.max_new_tokens
    text = greedy(target, knobs.tokens, n)
    trace.say(f"Greedy from {knobs.prompt!r}, {n} tokens, on the tiny Llama of this chapter ({knobs.sizes[0]:,} "
              f"weights) and on a smaller one ({knobs.sizes[1]:,}). Repeated: the share of runs of four tokens that "
              f"were there before. (The slashes are line ends.)")
    for name, tokens in (("the target", text), ("a smaller model", greedy(draft, knobs.tokens, n))):
        trace.say(f"{name}: {1 - distinct([tokens], 4):.0%} repeated")
        trace.lines(quoted(knobs.tokenizer.decode(tokens)))
    trace.check("the toy's best text by trying all: greedy misses it", best != path,
                f"{every[best]:.2f} against {every[path]:.2f}")
    rows = target.llama.forward(knobs.tokens + text)
    trace.check("every token is the argmax of one pass over the whole text, without a cache",
                [argmax(row) for row in rows[len(knobs.tokens) - 1:-1]] == text, "equal")


def survivors(p: Vector) -> int:
    """How many tokens have any probability left."""
    return sum(value > 0 for value in p)


# 2. Shaping the distribution


def show_filters(trace: Trace, knobs: Namespace) -> None:
    """Each filter on the distribution where the model is least sure and where it is most; the penalties."""
    target, draft = models(knobs)
    text = knobs.tokens + greedy(target, knobs.tokens, 16)
    places = sorted(range(len(knobs.tokens), len(text)), key=lambda n: entropy(softmax(target(text[:n]))))
    sure, unsure = places[0], places[-1]
    ways = {"as is": {}, "t 0.5": {"temperature": 0.5}, "t 2": {"temperature": 2.0}, "top-k": {"top_k": knobs.top_k},
            "top-p": {"top_p": knobs.top_p}, "min-p": {"min_p": knobs.min_p}, "typical": {"typical_p": TYPICAL_P}}
    shaped = {place: {name: distribution(target(text[:place]), **way) for name, way in ways.items()}
              for place in (unsure, sure)}
    p, most = shaped[unsure]["as is"], max(max(p) for name, p in shaped[unsure].items() if name != "top-k")
    trace.ask(f"Where the model is surest it gives its best token {max(shaped[sure]['as is']):.3f}. How many tokens "
              f"does top-p {knobs.top_p:g} keep there?", survivors(shaped[sure]["top-p"]))
    trace.say(f"What may follow {knobs.tail(text[:unsure])!r}, where the model is least sure, reshaped: temperatures "
              f"0.5 and 2, top-k {knobs.top_k}, top-p {knobs.top_p:g}, min-p {knobs.min_p:g}, typical {TYPICAL_P:g}. "
              f"The nine likeliest tokens; then how many survive and the entropy in bits, there and where the model "
              f"is surest, after {knobs.tail(text[:sure])!r}. There top-k lets in as many as ever; the others close up.")
    rows = [[knobs.name(i), f"{p[i]:.2f}"] + [bar(way[i], most, 6) for way in shaped[unsure].values()]
            for i in sorted(range(len(p)), key=lambda i: -p[i])[:9]]
    for place, name in ((unsure, "unsure"), (sure, "sure")):
        rows += [[f"{name}: tokens", "", *(str(survivors(way)) for way in shaped[place].values())],
                 ["  entropy", "", *(f"{entropy(way):.2f}" for way in shaped[place].values())]]
    old_table(trace, ["token", "p", *ways], rows, left=(0, *range(2, 9)))

    trace.say("Penalties, on greedy's loop in the smaller model of section 1:")
    rows, new = [], slice(len(knobs.tokens), None)
    penalties = {"none": lambda logits, tokens: logits,
                 "repetition 1.3": lambda logits, tokens: repetition_penalty(logits, tokens, 1.3),
                 "presence 1": lambda logits, tokens: count_penalty(logits, tokens[new], presence=1.0),
                 "frequency 1": lambda logits, tokens: count_penalty(logits, tokens[new], frequency=1.0)}
    for name, penalise in penalties.items():
        tokens = greedy(lambda tokens: penalise(draft(tokens), tokens), knobs.tokens, 2 * knobs.max_new_tokens)
        rows.append([name, f"{1 - distinct([tokens], 4):.0%}", str(len(set(tokens))), knobs.clip(tokens, 36)])
    old_table(trace, ["penalty", "repeated", "different", "text"], rows, left=(0, 3))

    tied = list(map(math.log, (0.4, 0.2, 0.2, 0.2)))
    cut = [top_k_filter(tied, 2), top_p_filter(tied, 0.3), top_p_filter(tied, 0.5), min_p_filter(tied, 0.45),
           min_p_filter(tied, 1.0)]
    trace.check("edges on 0.4, 0.2, 0.2, 0.2: top-k 2 keeps the ties, top-p 0.3 the one that crosses, top-p 0.5 a "
                "second, min-p 0.45 all, min-p 1 the best", [[i for i, x in enumerate(row) if x > -math.inf] for row in cut]
                == [[0, 1, 2, 3], [0], [0, 3], [0, 1, 2, 3], [0]], "as in transformers")


class EveryBranch:
    """Stands in for random.Random in draw(): follows a script of choices, then takes the first possible one."""

    def __init__(self, script: Sequence[int]):
        self.script, self.chosen, self.probability = script, [], 1.0
        self.others: list[list[int]] = []  # the scripts of the branches passed by

    def choices(self, population: Sequence[int], weights: Vector) -> list[int]:
        """The choice that the script says, its probability kept."""
        if len(self.chosen) < len(self.script):
            choice = self.script[len(self.chosen)]
        else:
            choice, *others = (i for i in population if weights[i] > 0)
            self.others += [self.chosen + [other] for other in others]
        self.chosen.append(choice)
        self.probability *= weights[choice] / sum(weights)
        return [choice]


def every_outcome(sampler: Callable[[EveryBranch], object]) -> dict[object, float]:
    """{outcome: its exact probability}: sampler(rng) is run once for every way its draws can fall."""
    outcomes: Counter[object] = Counter()
    scripts: list[list[int]] = [[]]
    while scripts:
        rng = EveryBranch(scripts.pop())
        outcomes[sampler(rng)] += rng.probability
        scripts += rng.others
    return dict(outcomes)


def chi_square(counts: Sequence[int], p: Vector) -> tuple[float, int]:
    """(χ², degrees of freedom) of counts against p; the rarest cells are put together until each expects 5."""
    cells = sorted((sum(counts) * q, count) for count, q in zip(counts, p))
    while len(cells) > 1 and cells[0][0] < 5:
        (expected, seen), (more, others), *rest = cells
        cells = sorted([(expected + more, seen + others), *rest])
    return sum((seen - expected) ** 2 / expected for expected, seen in cells), len(cells) - 1


# 3. Sampling done right


def show_sampling(trace: Trace, knobs: Namespace) -> None:
    """Frequencies against probabilities, and what each sampler trades."""
    target, _ = models(knobs)
    rng, n = random.Random(knobs.seed), 4000
    p = distribution(target(knobs.tokens), knobs.temperature)
    tokens = [sample(target, knobs.tokens, 1, rng=rng, temperature=knobs.temperature)[0] for _ in range(n)]
    counts = [tokens.count(i) for i in range(len(p))]
    trace.say(f"{n} draws of the token after {knobs.tail(knobs.tokens)!r} at temperature {knobs.temperature:g}, "
              f"against the probabilities (the eight likeliest).")
    rows = [[knobs.name(i), f"{n * p[i]:.0f}", str(counts[i]), bar(p[i], max(p), 20), bar(counts[i] / n, max(p), 20)]
            for i in sorted(range(len(p)), key=lambda i: -p[i])[:8]]
    old_table(trace, ["token", "expected", "drawn", "probability", "frequency"], rows, left=(0, 3, 4))
    total, freedom = chi_square(counts, p)
    bound = freedom + 2 * math.sqrt(12 * freedom) + 24  # exceeded with P < exp(-12) (Laurent & Massart 2000, lemma 1)
    trace.say(f"Chi-square is {total:.1f} with {freedom} degrees of freedom.")

    ways = {"greedy": {"top_k": 1}, "t = 0.5": {"temperature": 0.5}, "as it is": {}, "t = 1.5": {"temperature": 1.5},
            f"top-k {knobs.top_k}": {"top_k": knobs.top_k}, f"top-p {knobs.top_p:g}": {"top_p": knobs.top_p},
            f"min-p {knobs.min_p:g}, t = 1.5": {"min_p": knobs.min_p, "temperature": 1.5},
            f"typical {TYPICAL_P:g}": {"typical_p": TYPICAL_P}}
    runs, length, rows = 8, 12, []
    texts = {name: [sample(target, knobs.tokens, length, rng=rng, **way) for _ in range(runs)]
             for name, way in ways.items()}
    trace.ask(f"How many different texts does greedy write in {runs} tries?", len(set(map(tuple, texts["greedy"]))))
    trace.say(f"What each sampler trades: {runs} texts of {length} tokens. Likelihood: mean log-probability of a "
              f"token under the model as it is. Distinct-2: different pairs of neighbours, of all pairs.")
    for name, found in texts.items():
        likelihood = fmean(log_probability(target, knobs.tokens, text) / length for text in found)
        rows.append([name, f"{likelihood:.2f}", f"{distinct(found, 2):.2f}", str(len(set(map(tuple, found)))),
                     knobs.clip(found[-1], 22)])
    old_table(trace, ["sampler", "likelihood", "distinct-2", "texts", "the last"], rows, left=(0, 4))

    trace.check("frequencies agree with the probabilities", total < bound, f"chi-square below {bound:.0f}")
    exact = every_outcome(lambda rng: tuple(sample(toy_logits, TOY_PROMPT, 2, rng=rng)))
    trace.check_close("enumerated, sample() on the toy of section 1 gives each text its probability",
                      [[exact[a, b] for a in range(3) for b in range(3)]],
                      [[TOY[()][a] * TOY[a,][b] for a in range(3) for b in range(3)]], 1e-12)


def beam_tree(logits_fn: LogitsFn, prompt: Sequence[int], width: int, steps: int,
              name: Callable[[int], str]) -> list[str]:
    """Beam search drawn: a column a step, kept candidates numbered by rank, and the best of the pruned ones."""
    beams, children = [(list(prompt), 0.0)], {}
    for _ in range(steps):
        ranked = extensions(logits_fn, beams, keep=width + 2)
        for rank, (tokens, total) in enumerate(ranked):
            children.setdefault(tuple(tokens[:-1]), []).append((tokens, total, rank))
        beams = ranked[:width]

    def draw_under(tokens: Sequence[int], margin: str) -> Iterator[str]:
        branches = children.get(tuple(tokens), [])
        for i, (longer, total, rank) in enumerate(branches):
            fork, trunk = ("├─", "│  ") if i < len(branches) - 1 else ("└─", "   ")
            yield f"{margin}{fork} {name(longer[-1])} {total:.2f} " + (f"#{rank + 1}" if rank < width else "×")
            yield from draw_under(longer, margin + trunk) if rank < width else ()

    return list(draw_under(prompt, ""))


# 4. Beam search


def show_beam(trace: Trace, knobs: Namespace) -> None:
    """The tree, widths 1 to 8 beside exact search, length penalties, n-best and diverse beams."""
    target, _ = models(knobs)
    eos, n = knobs.eos, knobs.max_new_tokens
    trace.say(f"Four steps of width 3 from {knobs.tail(knobs.tokens)!r}. Each token with the log-probability of the "
              f"text so far; #1 to #3 are kept at their step, × are the two best that were pruned.")
    trace.lines(beam_tree(target, knobs.tokens, 3, 4, knobs.name))

    rows, found, prompts = [], {}, (knobs.tokens, knobs.tokenizer.encode(SECOND_PROMPT))
    for first, prompt in zip((True, False), prompts):
        for width in (1, 2, 4, 8, "exact"):
            target.passes = 0
            best = (exact_search(target, prompt, n, eos=eos, max_passes=150) if width == "exact" else
                    beam_search(target, prompt, n, width=width, length_penalty=0.0, eos=eos)[0])
            if best:
                found[first, width] = tokens, total = best
                rows.append([knobs.tail(prompt) * (width == 1), str(width), f"{total:.2f}", str(len(tokens)),
                             str(target.passes), knobs.clip(tokens, 24)])
    narrow, wide = (len(found[True, width][0]) for width in (1, 8))
    trace.ask("Log-probability alone decides. Is the best text of width 8 longer, shorter or as long as that of "
              "width 1?", "as long" if wide == narrow else "shorter" if wide < narrow else "longer")
    trace.say("Wider beams, to the end of the verse: the likeliest text found (length penalty 0), and the passes it "
              "took. \"exact\" is the likeliest text of all, by a search that ends within 150 passes.")
    old_table(trace, ["after", "width", "log p", "tokens", "passes", "text"], rows, left=(0, 5))

    trace.say(f"Likelier is not better: every token costs, so a wide beam digs up short texts. The length penalty "
              f"decides what \"best\" means. After {knobs.tail(knobs.tokens)!r}, width {knobs.width}:")
    rows = []
    for penalty in sorted({0.0, 0.5, 1.0, 2.0, knobs.length_penalty}):
        tokens, score = beam_search(target, knobs.tokens, n, width=knobs.width, length_penalty=penalty, eos=eos)[0]
        rows.append([f"{penalty:g}", f"{score:.3f}", str(len(tokens)), knobs.clip(tokens, 44)])
    old_table(trace, ["length penalty", "score", "tokens", "text"], rows, left=(3,))

    trace.say("The four best of a beam of width 4, six tokens, beside four diverse beams (diversity 2):")
    twins = beam_search(target, knobs.tokens, 6, width=4, length_penalty=0.0)
    others = diverse_beam_search(target, knobs.tokens, 6, groups=4, diversity=2.0)
    old_table(trace, ["log p", "beam search", "log p", "diverse beam search"],
                [[cell for tokens, total in pair for cell in (f"{total:.2f}", knobs.clip(tokens, 29))]
                 for pair in zip(twins, others)], left=(1, 3))

    trace.check("width 1 = greedy", found[True, 1][0] == greedy(target, knobs.tokens, n, eos=eos), "the same tokens")
    [(tokens, total), *_] = beam_search(toy_logits, TOY_PROMPT, 4, width=27, length_penalty=0.0)
    every = every_outcome(lambda rng: tuple(sample(toy_logits, TOY_PROMPT, 4, rng=rng)))
    trace.check("on the toy, four words, a beam of 27 finds the best of all 81 texts",
                tuple(tokens) == max(every, key=every.get) and abs(math.exp(total) - every[tuple(tokens)]) < 1e-12,
                f"p = {math.exp(total):.3f}")
    if knobs.as_shipped:  # other prompts and other models may be the exception
        log_p = {key: total for key, (_, total) in found.items()}
        gaps = [log_p[first, width] - log_p[first, to] for first in (True, False)
                for width, to in ((2, 1), (4, 1), (8, 1), (8, "exact"))]
        trace.check("no beam ends below greedy, and width 8 meets the exact optimum", min(gaps) > -1e-9,
                    "both prompts; |Δ| < 1e-9")


# 5. Speculative decoding


def show_speculative(trace: Trace, knobs: Namespace) -> None:
    """Greedy, drafts marked; the rule drawn on one distribution; the proof by enumeration."""
    target, draft = models(knobs)
    n, gamma = knobs.max_new_tokens, knobs.gamma
    tokens, counts = speculative_greedy(target, draft, knobs.tokens, n, gamma=gamma)
    passes, forwards = target.passes, target.forwards
    trace.say(f"Greedy, gamma = {gamma}: each line is one pass of the target. + drafted and kept, × drafted and "
              f"wrong, → what the target puts instead or behind.")
    trace.ask(f"{n} tokens are wanted, and {counts.accepted} drafted ones were kept. How many passes did the target "
              f"make?", counts.target_passes)
    at = 0
    for number, (drafts, kept) in enumerate(counts.rounds[:12], 1):
        marks = [("+" if i < kept else "×") + knobs.name(token) for i, token in enumerate(drafts[:kept + 1])]
        line = f"{number:>3}  " + " ".join(marks + [f"→{knobs.name(tokens[at + kept])}"])
        trace.lines(textwrap.wrap(trace.plain(line), WIDTH, subsequent_indent=" " * 5, drop_whitespace=True))
        at += kept + 1
    trace.note(f"{n} tokens in {counts.target_passes} passes; {counts.drafted} drafted, {counts.accepted} kept.")

    p, q = (distribution(model(knobs.tokens), knobs.temperature, top_p=knobs.top_p) for model in (target, draft))
    kept, rest, overlap = acceptance(p, q), residual(p, q), sum(map(min, p, q))
    trace.say(f"Sampling: the rule on what may follow {knobs.tail(knobs.tokens)!r}, at temperature "
              f"{knobs.temperature:g} and top-p {knobs.top_p:g} on both sides. A draft is kept with probability Σ min(p, "
              f"q) = {overlap:.2f} in all; otherwise the rest is drawn from.")
    most = max(p + q + rest)
    old_table(trace, ["token", "p", "q", "kept", "target p", "draft q", "min(p, q)", "the rest"],
                [[knobs.name(i), f"{p[i]:.2f}", f"{q[i]:.2f}", f"{kept[i]:.0%}" if q[i] else "-"]
                 + [bar(value, most, 11) for value in (p[i], q[i], min(p[i], q[i]), rest[i])]
                 for i in sorted(range(len(p)), key=lambda i: -max(p[i], q[i]))[:9]], left=(0, 4, 5, 6, 7))

    rng = random.Random(knobs.seed)
    t_fn, d_fn = random_logits_fn(rng, 3), random_logits_fn(rng, 3)

    def spread(gamma: int, choose_draft: Callable = draw, **way: float) -> dict:
        return every_outcome(lambda rng: tuple(speculative_sample(t_fn, d_fn, [0], 3, gamma=gamma, rng=rng,
                                                                  choose_draft=choose_draft, **way)[0]))

    exact = every_outcome(lambda rng: tuple(sample(t_fn, [0], 3, rng=rng)))
    ways = {"target": exact, "speculative": spread(2), "argmax drafts": spread(2, lambda q, rng: argmax(q))}
    trace.say("The proof: a random target and a random draft over 3 tokens, all 27 texts of 3 tokens, gamma = 2. "
              "Every branch that speculative_sample can take is taken and weighed. The six likeliest:")
    most = max(max(way.values()) for way in ways.values())
    old_table(trace, ["text", *ways, *ways],
                [[" ".join("abc"[token] for token in text), *(f"{way.get(text, 0):.4f}" for way in ways.values()),
                  *(bar(way.get(text, 0), most, 9) for way in ways.values())]
                 for text in sorted(exact, key=lambda text: -exact[text])[:6]], left=(0, 4, 5, 6))
    bias = total_variation(ways["argmax drafts"], exact)
    trace.say(f"Drafting the argmax but judging it by softmax q is biased: {bias:.1%} of all texts come out other "
              f"than they should (total variation).")

    trace.check("greedy: the output is the target's own", tokens == greedy(CachedModel(target.llama), knobs.tokens, n),
                f"{n} tokens")
    trace.check("one pass scores all the drafts: forward passes run = rounds = tokens - drafts kept",
                passes == forwards == counts.target_passes == n - counts.accepted, f"{passes} passes, {n} tokens")
    trace.check("enumerated, speculative sampling has the target's distribution exactly",
                ways["speculative"].keys() == exact.keys()
                and max(abs(ways["speculative"][text] - exact[text]) for text in exact) < 1e-12, "max |Δ| < 1e-12")
    both = dict(temperature=0.7, top_p=0.8)
    exact = every_outcome(lambda rng: tuple(sample(t_fn, [0], 3, rng=rng, **both)))
    trace.check("the same with temperature 0.7 and top-p 0.8, gamma = 3",
                total_variation(spread(3, **both), exact) < 1e-12, "Σ |Δ| / 2 < 1e-12")


def overlaps(target_fn: LogitsFn, draft_fn: LogitsFn, prompt: Sequence[int], tokens: Sequence[int],
             counts: Counts) -> Vector:
    """β = Σ min(p, q) at every place where a draft was judged."""
    betas, at, text = [], len(prompt), [*prompt, *tokens]
    for drafts, kept in counts.rounds:
        for place in range(at, at + min(kept + 1, len(drafts))):
            betas.append(sum(map(min, softmax(target_fn(text[:place])), softmax(draft_fn(text[:place])))))
        at += kept + 1
    return betas


# 6. When it pays


def show_when_it_pays(trace: Trace, knobs: Namespace) -> None:
    """Acceptance and tokens a pass, measured and by formula; the speed-up as γ and c change."""
    target, draft = models(knobs)
    rng, runs, n, rows, total, every = random.Random(knobs.seed), 2, 30, [], 0, []
    trace.say(f"{runs} texts of {n} tokens for each gamma, temperature 1. Acceptance: kept, of those judged; beside it "
              f"the mean of Σ min(p, q) at the same places, alpha. Tokens a pass: counted, and by the formula.")
    for gamma in sorted({1, 2, 4, 8, knobs.gamma}):
        kept, passes, betas = 0, 0, []
        for _ in range(runs):
            tokens, counts = speculative_sample(target, draft, knobs.tokens, n, gamma=gamma, rng=rng)
            kept, passes = kept + counts.accepted, passes + counts.target_passes
            betas += overlaps(target, draft, knobs.tokens, tokens, counts)
        alpha, total, every = fmean(betas), total + kept, every + betas
        rows.append([str(gamma), str(len(betas)), f"{kept / len(betas):.2f}", f"{alpha:.2f}", f"{runs * n / passes:.2f}",
                     f"{expected_tokens(alpha, gamma):.2f}", bar(runs * n / passes, gamma + 1, 14)])
    old_table(trace, ["gamma", "judged", "acceptance", "Σ min(p, q)", "tokens a pass", "formula", "of gamma + 1"],
                rows, left=(6,))
    alpha, cost = fmean(every), knobs.sizes[1] / knobs.sizes[0]
    trace.say(f"(Places are not alike: sure ones come in runs.) The speed-up for alpha = {alpha:.2f} and drafts of "
              f"different cost c; ours has {cost:.2f} of the target's weights. Last: the best gamma from 0 to 16.")
    trace.ask(f"A draft costs {cost:.2f} of the target. Which gamma from 0 to 16 is best?", best_gamma(alpha, cost))
    gammas = (1, 2, 3, 4, 6, 8)
    old_table(trace, ["c | gamma", *map(str, gammas), "best"],
                [[f"{c:.2f}", *(f"{speed_up(alpha, gamma, c):.2f}" for gamma in gammas), str(best_gamma(alpha, c))]
                 for c in sorted({0.0, 0.05, 0.2, 0.5, cost})])

    spread = math.sqrt(sum(beta * (1 - beta) for beta in every) + 1)
    trace.check(f"drafts kept = the sum over the {len(every)} places judged of Σ min(p, q), but for chance",
                abs(total - sum(every)) < 6 * spread, "within 6 standard deviations")
    p, q, gamma = [0.5, 0.3, 0.2], [0.2, 0.2, 0.6], 3
    t_fn, d_fn = (lambda tokens, v=v: list(map(math.log, v)) for v in (p, q))
    first = every_outcome(lambda rng: speculative_sample(t_fn, d_fn, [0], gamma + 1, gamma=gamma,
                                                         rng=rng)[1].rounds[0][1])
    trace.check("where all places are alike, tokens a pass, enumerated = the formula",
                abs(sum((kept + 1) * p for kept, p in first.items()) - (1 - 0.6 ** (gamma + 1)) / 0.4) < 1e-12,
                f"{expected_tokens(0.6, gamma):.3f}; |Δ| < 1e-12")


# 7. Drafts for nothing


def show_free_drafts(trace: Trace, knobs: Namespace) -> None:
    """Guesses from the text, from counts, from rounded weights and from a smaller model, on the same text."""
    target, draft = models(knobs)
    prompt = knobs.tokenizer.encode(CONTEXT) + knobs.tokens
    n, gamma, llama = knobs.max_new_tokens, knobs.gamma, target.llama
    drafters = {"prompt lookup": ("-", prompt_lookup),
                "3-grams of the rhyme": ("-", partial(greedy, ngram_model(rhyme()[1], VOCAB_SIZE))),
                "a smaller Llama": (f"{64 * knobs.sizes[1] / knobs.sizes[0]:.0f}", partial(greedy, draft))}
    for bits in (8, 4, 2):
        rounded = CachedModel(Llama(llama.config, rounded_weights(llama.weights, bits)))
        drafters[f"the target in {bits} bits"] = (str(bits), partial(greedy, rounded))
    trace.say(f"Greedy, {n} tokens, gamma = {gamma}, after a verse about the cat, so that there is something to look up. "
              f"Read: bits that a drafted token reads for each weight of the target (64 bits as it is). Accepted: of all "
              f"that were drafted.")
    plain, rows, runs = greedy(target, prompt, n), [], {}
    for name, (bits, propose) in drafters.items():
        runs[name] = tokens, counts = speculate(target, propose, prompt, n, gamma=gamma)
        share = f"{counts.accepted / counts.drafted:.0%}" if counts.drafted else "-"
        rows.append([name, bits, share, str(counts.target_passes),
                     f"{n / counts.target_passes:.2f}", bar(n / counts.target_passes, gamma + 1, 18)])
    lookup, small = (runs[name][1].target_passes for name in ("prompt lookup", "a smaller Llama"))
    trace.ask(f"With the smaller Llama the target needs {small} passes. Does it need more, fewer or as many with "
              f"prompt lookup?", "as many" if lookup == small else "more" if lookup > small else "fewer")
    old_table(trace, ["draft", "read", "accepted", "passes", "tokens a pass", ""], rows, left=(0, 5))
    trace.check("whoever drafts, the output is the target's own", all(tokens == plain for tokens, _ in runs.values()),
                f"{len(runs)} drafts")


def train_medusa(llama: Llama, ids: Sequence[int], n_heads: int, steps: int) -> list[Head]:
    """Heads for 1, 2, … places after the next token, on the frozen llama's hidden states."""
    dim, heads = llama.config.dim, []
    for ahead in range(2, 2 + n_heads):
        head = {"w1": [[0.0] * dim for _ in range(dim)], "w2": [list(row) for row in llama.weights["output"]]}
        fit(head, [(h[:len(ids) - start - ahead], ids[start + ahead:start + ahead + len(h)])
                   for start, h in hidden_batches(llama, tuple(ids))], medusa_gradients, steps)
        heads.append(head)
    return heads


# 8. Medusa


def show_medusa(trace: Trace, knobs: Namespace) -> None:
    """A tree with its mask and what is kept of it; passes against a chain's and greedy's."""
    target, _ = models(knobs)
    n, tops, heads = knobs.max_new_tokens, (3, 2), medusa_heads(knobs.seed, knobs.steps)
    (tokens, counts), (_, chained) = (medusa_greedy(target, heads, knobs.tokens, n, tops=way) for way in (tops, (1, 1)))

    best = max(range(len(counts.rounds)), key=lambda i: counts.rounds[i][1])  # the pass that yields most
    text = (*knobs.tokens, *tokens[:max(1, sum(kept + 1 for _, kept in counts.rounds[:best]))])
    candidates = medusa_candidates(target, heads, tops, text)
    nodes = list(dict.fromkeys(text + path[:end] for path in candidates for end in range(len(path) + 1)))
    found = text + tuple(verify_tree(target, text, candidates)[0])
    trace.ask(f"Under the target's own token the {tops[0]} best of head 1, under each of these the {tops[1]} best of "
              f"head 2. How many nodes has the tree?", len(nodes))
    trace.say(f"{len(heads)} heads, the {', '.join(map(str, tops))} best of each: a tree of {len(nodes)} nodes, "
              f"verified in one pass after {knobs.tail(text[:-1])!r}. Its root is the target's own. Right: the tree "
              f"attention mask, who (row) sees whom (column) besides the text. * is kept.")
    trace.lines([("  " * (len(node) - len(text)) + knobs.name(node[-1]) + " *" * (node == found[:len(node)])).ljust(28)
                 + "".join("█" if node[:len(other)] == other else "·" for other in nodes) for node in nodes])
    trace.say(f"{n} tokens: one at a time {n} passes; the heads' best guesses as one chain {chained.target_passes}; "
              f"as a tree {counts.target_passes}. (The first pass reads the prompt.)")
    trace.check("greedy output unchanged", tokens == greedy(target, knobs.tokens, n), f"{n} tokens")
    rows = CachedModel(target.llama).read(nodes)
    trace.check_close("the tree in one pass = each path alone, through the model's own causal attention",
                      [rows[node] for node in nodes], [target.llama.forward(node)[-1] for node in nodes], 1e-12)


def train_eagle(llama: Llama, ids: Sequence[int], rng: random.Random, steps: int) -> Head:
    """The head, fitted to the frozen llama's hidden states."""
    dim, batches = llama.config.dim, []
    head = {"w1": [[rng.gauss(0, (2 * dim) ** -0.5) for _ in range(2 * dim)] for _ in range(dim)],
            "w2": [[0.0] * dim for _ in range(dim)]}
    for start, f in hidden_batches(llama, tuple(ids)):
        embeddings = [llama.weights["tok_embeddings"][token] for token in ids[start + 1:start + len(f)]]
        batches.append((concat(f[:-1], embeddings), f[:-1], f[1:]))
    fit(head, batches, eagle_gradients, steps)
    return head


# 9. EAGLE


def show_eagle(trace: Trace, knobs: Namespace) -> None:
    """EAGLE's drafts against Medusa's and the smaller model's, place by place and per parameter."""
    target, draft = models(knobs)
    n, gamma = knobs.max_new_tokens, 2
    head, heads = eagle_head(knobs.seed, knobs.steps), medusa_heads(knobs.seed, knobs.steps)

    def chain(tokens: list[int], n: int) -> list[int]:
        """The best of each head: one candidate, or none yet."""
        return [token for path in medusa_candidates(target, heads[:n], (1, 1), tokens) for token in path]

    drafters = {"a smaller Llama": (partial(greedy, draft), knobs.sizes[1]),
                "Medusa, as a chain": (chain, sum(map(count_weights, heads))),
                "EAGLE": (partial(eagle_draft, target, head), count_weights(head))}
    prompts = [knobs.tokens, knobs.tokenizer.encode(SECOND_PROMPT)]
    rows, same, gains = [], [], {}
    for name, (propose, extra) in drafters.items():
        rounds = []
        for prompt in prompts:
            tokens, counts = speculate(target, propose, prompt, n, gamma=gamma)
            same.append(tokens == greedy(target, prompt, n))
            rounds += counts.rounds
        judged = [[kept > i for drafts, kept in rounds if kept >= i and len(drafts) > i] for i in range(gamma)]
        shares = [f"{fmean(right):.0%}" if right else "-" for right in judged]
        a_pass = len(prompts) * n / len(rounds)
        gains[name] = 1000 * (a_pass - 1) / extra
        rows.append([name, f"{extra:,}", *shares, f"{a_pass:.2f}", f"{gains[name]:.2f}", bar(a_pass, gamma + 1, 12)])
    trace.say(f"{len(prompts)} prompts, {n} tokens each, chains of {gamma}. The share kept of the first and second "
              f"guess, of those judged; and what a thousand extra weights bring in tokens a pass above 1.")
    trace.ask("Which brings most for a thousand weights: " + "; ".join(drafters) + "?", max(gains, key=gains.get))
    old_table(trace, ["draft", "weights", "1st", "2nd", "tokens a pass", "per 1000", ""], rows, left=(0, 6))
    trace.check("output unchanged, whoever drafts", all(same), f"{len(same)} texts")


# 10. Jacobi and lookahead decoding


def show_lookahead(trace: Trace, knobs: Namespace) -> None:
    """Jacobi's guesses settling, pass by pass; passes of both against greedy's."""
    target, _ = models(knobs)
    n, gamma, prompt = knobs.max_new_tokens, 4, knobs.tokens
    jacobi, counts = jacobi_greedy(target, prompt, n, gamma=gamma)
    lookahead, ahead = lookahead_greedy(target, prompt, n)
    trace.say(f"Jacobi: {gamma} guesses, renewed all at once in each pass. + was right and kept. ~ comes in the text "
              f"near here, but in another place, or behind a wrong guess: overwritten. × does not.")
    done = 0
    for number, (guesses, kept) in enumerate(counts.rounds[:6], 1):
        near, done = jacobi[max(0, done - gamma):done + 2 * gamma], done + kept + 1
        marks = "  ".join(("+" if i < kept else "~" if token in near else "×") + knobs.name(token)
                          for i, token in enumerate(guesses))
        trace.lines([f"pass {number}  " + (marks or "no guess: one token is left")])
    trace.say(f"Passes for {n} tokens, no draft model anywhere, nothing trained:")
    trace.ask(f"Greedy takes {n}, Jacobi {counts.target_passes}. And lookahead?", ahead.target_passes)
    old_table(trace, ["", "passes", "tokens a pass", ""], [
        [name, str(passes), f"{n / passes:.2f}", bar(n / passes, 4, 32)] for name, passes in
        (("greedy", n), ("Jacobi", counts.target_passes), ("lookahead", ahead.target_passes))], left=(0, 3))
    trace.check("the output of both is greedy's, in no more passes", jacobi == lookahead == greedy(target, prompt, n)
                and max(counts.target_passes, ahead.target_passes) <= n, f"{n} tokens")


# Who killed or worried whom, as often as the model likes; and one of three animals.
STORY = {"animal": [(" cat", "clause"), (" dog", "clause"), (" rat", "clause")],
         "clause": [(" that killed the", "animal"), (" that worried the", "animal"), (" that lay in the house", None)]}


STORY_RE = " (cat|dog|rat)( that (killed|worried) the (cat|dog|rat))* that lay in the house"


ANIMALS = {"animal": [(" cow", "that"), (" cat", "that"), (" rat", "that")], "that": [(" that", None)]}


# 11. Text with a shape


def show_constrained(trace: Trace, knobs: Namespace) -> None:
    """Forced texts; the distribution of local masking against the true conditional one."""
    target, _ = models(knobs)
    prompt, vocab, eos, longest = knobs.tokens, knobs.tokenizer.vocab, knobs.eos, 60
    forced, rng = constrain(target, vocab, STORY, len(prompt), eos), random.Random(knobs.seed)
    texts = [greedy(forced, prompt, longest, eos=eos)]
    texts += [sample(forced, prompt, longest, rng=rng, eos=eos) for _ in range(3)]
    texts = [knobs.tokenizer.decode(text[:-1]) for text in texts if text[-1] == eos]
    trace.say(f"A grammar, as a regular expression: {STORY_RE!r}. Texts forced into it, by greedy and by sampling; any "
              f"decoder takes the masked logits.")
    for text in texts:
        trace.lines(quoted("…" + text))

    forced = constrain(target, vocab, ANIMALS, len(prompt), eos)
    local = every_outcome(lambda rng: tuple(sample(forced, prompt, longest, rng=rng, eos=eos)))
    true = {tokens: math.exp(log_probability(target, prompt, tokens)) for tokens in local}
    fits = sum(true.values())
    masked, given = Counter(), Counter()  # by text, however it is cut into tokens
    for tokens, p in local.items():
        text = knobs.tokenizer.decode(tokens[:-1]).strip()
        masked[text] += p
        given[text] += true[tokens] / fits
    trace.say(f"How far local masking strays, on one animal and \"that\": all {len(local)} ways to write the "
              f"{len(masked)} texts in tokens, enumerated. (The model itself fits with probability {fits:.1e}.)")
    widest = max(masked, key=lambda text: abs(masked[text] - given[text]))
    trace.ask(f"{widest!r} has probability {masked[widest]:.3f} under the local mask. Given that the text fits, is it "
              f"higher or lower?", "higher" if given[widest] > masked[widest] else "lower")
    old_table(trace, ["text", "local mask", "given it fits", "local mask", "given it fits"],
                [[text, f"{masked[text]:.3f}", f"{given[text]:.3f}", bar(masked[text], 1, 18), bar(given[text], 1, 18)]
                 for text in sorted(masked)], left=(0, 3, 4))
    trace.say(f"{total_variation(masked, given):.0%} of the texts come out other than they should (total variation).")
    trace.check("what was forced matches, says Python's re", all(re.fullmatch(STORY_RE, text) for text in texts)
                and all(re.fullmatch("(cow|cat|rat) that", text) for text in masked), f"{len(texts)} + {len(local)} texts")
    worst = 0.0
    for tokens, p in local.items():
        bill = p
        for i in range(len(tokens)):
            text = prompt + list(tokens[:i])
            bill *= sum(value for value, logit in zip(softmax(target(text)), forced(text)) if logit > -math.inf)
        worst = max(worst, abs(bill - true[tokens]))
    trace.check("P_local times the product of all Z_t = P, text by text", worst < 1e-12, "max |Δ| < 1e-12")


# 12. The table


def show_all_decoders(trace: Trace, knobs: Namespace) -> None:
    """Every decoder on two prompts."""
    target, draft = models(knobs)
    n, gamma = min(knobs.max_new_tokens, 16), knobs.gamma
    heads, head = medusa_heads(knobs.seed, knobs.steps), eagle_head(knobs.seed, knobs.steps)
    warm, nucleus = {"temperature": knobs.temperature}, {"temperature": knobs.temperature, "top_p": knobs.top_p}
    beam = {"width": knobs.width, "length_penalty": knobs.length_penalty}
    decoders = {
        "greedy": lambda prompt, rng: greedy(target, prompt, n),
        "sample": lambda prompt, rng: sample(target, prompt, n, rng=rng, **warm),
        f"top-k {knobs.top_k}": lambda prompt, rng: sample(target, prompt, n, rng=rng, top_k=knobs.top_k, **warm),
        f"top-p {knobs.top_p:g}": lambda prompt, rng: sample(target, prompt, n, rng=rng, **nucleus),
        f"min-p {knobs.min_p:g}": lambda prompt, rng: sample(target, prompt, n, rng=rng, min_p=knobs.min_p, **warm),
        f"beam, width {knobs.width}": lambda prompt, rng: beam_search(target, prompt, n, **beam)[0][0],
        "speculative top-p": lambda prompt, rng: speculative_sample(target, draft, prompt, n, gamma=gamma, rng=rng,
                                                                    **nucleus)}
    lossless = {
        "speculative": lambda prompt, _: speculative_greedy(target, draft, prompt, n, gamma=gamma),
        "prompt lookup": lambda prompt, _: speculate(target, prompt_lookup, prompt, n, gamma=gamma),
        "Medusa": lambda prompt, _: medusa_greedy(target, heads, prompt, n),
        "EAGLE": lambda prompt, _: speculate(target, partial(eagle_draft, target, head), prompt, n, gamma=gamma),
        "Jacobi": lambda prompt, _: jacobi_greedy(target, prompt, n, gamma=gamma),
        "lookahead": lambda prompt, _: lookahead_greedy(target, prompt, n)}
    same = []
    for prompt in (knobs.tokens, knobs.tokenizer.encode(SECOND_PROMPT)):
        rows, plain = [], greedy(target, prompt, n)
        for name, decode in (decoders | lossless).items():
            target.passes = 0
            found = decode(prompt, random.Random(knobs.seed))
            tokens, passes = (found, target.passes) if isinstance(found, list) else (found[0], found[1].target_passes)
            if name in lossless:
                same.append(tokens == plain)
            log_p = log_probability(target, prompt, tokens)
            rows.append([name, f"{log_p:.2f}", f"{distinct([tokens], 2):.2f}", f"{passes / n:.2f}", knobs.clip(tokens, 21)])
            if name.startswith("beam"):
                trace.ask(f"After {knobs.tail(prompt)!r}, {n} tokens: greedy takes one pass a token. How many does a "
                          f"beam of width {knobs.width} take?", passes / n)
        trace.say(f"After {knobs.tail(prompt)!r}, {n} tokens:")
        old_table(trace, ["decoder", "log p", "distinct-2", "passes a token", "text"], rows, left=(0, 4))
    trace.check("the last six say what greedy says", all(same), f"{len(same)} texts")

# =============================================================================================
# THE MODEL AND THE BENCH
# =============================================================================================

# The tiny Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, and Meta's
# names for the weights, so that they fit any implementation of Llama.


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama. ValueError where one does not divide another, or is below 1."""

    vocab_size: int
    dim: int         # channels of the residual stream
    n_layers: int
    n_heads: int     # query heads; they divide dim
    n_kv_heads: int  # key and value heads; they divide n_heads
    hidden_dim: int  # channels inside the feed-forward block
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self):
        sizes = [self.vocab_size, self.dim, self.n_layers, self.n_heads, self.n_kv_heads,
                 self.hidden_dim]
        if min(sizes) < 1:
            raise ValueError(f"every size must be at least 1, not {self}")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ValueError(f"dim must be a multiple of 2 · n_heads, and n_heads of n_kv_heads, "
                             f"not {self}")

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.dim // self.n_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {name of a weight: its shape}."""
        kv_dim = self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            prefix = f"layers.{layer}."
            shapes[prefix + "attention_norm"] = (self.dim,)
            shapes[prefix + "attention.wq"] = (self.dim, self.dim)
            shapes[prefix + "attention.wk"] = (kv_dim, self.dim)
            shapes[prefix + "attention.wv"] = (kv_dim, self.dim)
            shapes[prefix + "attention.wo"] = (self.dim, self.dim)
            shapes[prefix + "ffn_norm"] = (self.dim,)
            shapes[prefix + "feed_forward.w1"] = (self.hidden_dim, self.dim)
            shapes[prefix + "feed_forward.w2"] = (self.dim, self.hidden_dim)
            shapes[prefix + "feed_forward.w3"] = (self.hidden_dim, self.dim)
        shapes["norm"] = (self.dim,)
        shapes["output"] = (self.vocab_size, self.dim)
        return shapes


class Llama:
    """weights: {name: matrix [out][in] or gain [dim]}, named and shaped as Config.shapes() says.

    Every weight is applied by one of the small methods, so that a subclass can do it differently.
    """

    def __init__(self, config: Config, weights: dict[str, Matrix | Vector]):
        for name in config.shapes():
            if name not in weights:
                raise ValueError(f"weights must have {name!r}")
        self.config = config
        self.weights = weights

    def forward(
        self,
        tokens: Sequence[int],
        cache=None,
        *,
        positions: Sequence[int] | None = None,
        mask: Sequence[Sequence[bool]] | None = None,
    ) -> Matrix:
        """Return logits [len(tokens)][vocab_size]: row i predicts what follows tokens[i].

        With a cache, the tokens come after those already in it, and their keys and values are added
        to it. positions: of each token in the text; the next ones unless given. mask[i][j]: may
        token i see key j? Unless given, it sees all keys up to its own.
        """
        c = self.config
        if positions is None:
            start = cache.length if cache is not None else 0
            positions = range(start, start + len(tokens))
        x = [self.weights["tok_embeddings"][token] for token in tokens]
        for layer in range(c.n_layers):
            prefix = f"layers.{layer}."
            # Attention: every token gathers from the tokens before it.
            h = self.norm(prefix + "attention_norm", x)
            q = self.linear(prefix + "attention.wq", h)
            k = self.linear(prefix + "attention.wk", h)
            v = self.linear(prefix + "attention.wv", h)
            q = rope_heads(q, positions, c.n_heads, c.rope_base)
            k = rope_heads(k, positions, c.n_kv_heads, c.rope_base)
            if cache is not None:
                k, v = cache.update(layer, k, v)  # now those of all tokens so far
            attended = self.attend(prefix + "attention", q, k, v, mask)
            x = add(x, self.linear(prefix + "attention.wo", attended))
            # Feed-forward: every token is worked on by itself.
            h = self.norm(prefix + "ffn_norm", x)
            gate = self.linear(prefix + "feed_forward.w1", h)
            up = self.linear(prefix + "feed_forward.w3", h)
            hidden = self.gate(prefix + "feed_forward", gate, up)
            x = add(x, self.linear(prefix + "feed_forward.w2", hidden))
        return self.linear("output", self.norm("norm", x))

    def linear(self, name: str, x: Matrix) -> Matrix:
        """Apply the matrix of that name."""
        return linear(x, self.weights[name])

    def norm(self, name: str, x: Matrix) -> Matrix:
        """Apply the RMSNorm whose gain has that name."""
        return rms_norm(x, self.weights[name], self.config.norm_eps)

    def attend(self, name: str, q: Matrix, k: Matrix, v: Matrix, mask=None) -> Matrix:
        """Apply the attention of the layer of that name, which has no weights of its own."""
        return attend(q, k, v, self.config.n_heads, self.config.n_kv_heads, mask)

    def gate(self, name: str, a: Matrix, b: Matrix) -> Matrix:
        """Apply the SwiGLU of the layer of that name, which has no weights of its own."""
        return swiglu(a, b)


# The operations of the model


def rms_norm(x: Matrix, gain: Vector, eps: float) -> Matrix:
    """Return gain · x / √(mean(x²) + eps), row by row (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    out = []
    for row in x:
        scale = 1 / math.sqrt(dot(row, row) / len(row) + eps)
        out.append([value * scale * g for value, g in zip(row, gain)])
    return out


def rope(x: Matrix, positions: Sequence[int], base: float = 10000.0) -> Matrix:
    """Return x [n][d] with row r rotated to positions[r] (Su et al. 2021, arXiv:2104.09864).

    Channels 2m and 2m + 1, read as one complex number, turn by position · base^(-2m/d).
    ValueError if d is odd, or if there is not one position per row.
    """
    d = len(x[0]) if x else 0
    if d % 2 or len(positions) != len(x):
        raise ValueError(f"x must have an even number of channels and one position a row, not {d} "
                         f"channels, {len(x)} rows and {len(positions)} positions")
    thetas = [base ** (-2 * m / d) for m in range(d // 2)]
    out = []
    for row, position in zip(x, positions):
        rotated = []
        for a, b, theta in zip(row[::2], row[1::2], thetas):
            z = complex(a, b) * cmath.rect(1.0, position * theta)
            rotated += [z.real, z.imag]
        out.append(rotated)
    return out


def rope_heads(x: Matrix, positions: Sequence[int], n_heads: int, base: float) -> Matrix:
    """Return x [n][n_heads·head_dim] with every head rotated by rope()."""
    return concat(*(rope(head, positions, base) for head in split_heads(x, n_heads)))


def attend(q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int, mask=None) -> Matrix:
    """Return causal grouped-query attention [n_q][n_heads·head_dim].

    q [n_q][n_heads·head_dim], k and v [n_k][n_kv_heads·head_dim]; the queries are the last n_q of
    the n_k positions. mask: as in head_weights().
    """
    group = n_heads // n_kv_heads
    keys = split_heads(k, n_kv_heads)
    values = split_heads(v, n_kv_heads)
    heads = []
    for h, queries in enumerate(split_heads(q, n_heads)):
        channels = list(zip(*values[h // group]))
        out = []
        for weights in head_weights(queries, keys[h // group], mask):
            out.append([dot(weights, channel[:len(weights)]) for channel in channels])
        heads.append(out)
    return concat(*heads)


def head_weights(q: Matrix, k: Matrix, mask: Sequence[Sequence[bool]] | None = None) -> Matrix:
    """Return softmax(q·k / √d) of one head; a query's row ends with its own key.

    mask[i][j] is False where query i must not see key j, although j comes before it.
    """
    scale = 1 / math.sqrt(len(k[0]))
    n_earlier = len(k) - len(q)
    rows = []
    for i, query in enumerate(q):
        scores = [dot(query, key) * scale for key in k[:n_earlier + i + 1]]
        if mask is not None:
            scores = [s if seen else -math.inf for s, seen in zip(scores, mask[i])]
        rows.append(softmax(scores))
    return rows


def swiglu(a: Matrix, b: Matrix) -> Matrix:
    """Return silu(a) · b, element by element, with silu(x) = x · sigmoid(x) (Shazeer 2020)."""
    return [[x * sigmoid(x) * y for x, y in zip(p, q)] for p, q in zip(a, b)]


def sigmoid(x: float) -> float:
    """Return 1 / (1 + exp(-x)), for any x."""
    return 0.5 + 0.5 * math.tanh(0.5 * x)


def add(a: Matrix, b: Matrix) -> Matrix:
    """Return the sum, element by element."""
    return [list(map(operator.add, p, q)) for p, q in zip(a, b)]


def split_heads(x: Matrix, n_heads: int) -> list[Matrix]:
    """Return the heads of x: [n][n_heads·head_dim] -> n_heads matrices [n][head_dim].

    ValueError if n_heads does not divide the channels.
    """
    width = len(x[0]) if x else 0
    if n_heads < 1 or width % n_heads:
        raise ValueError(f"n_heads must divide the {width} channels, and {n_heads} does not")
    head_dim = width // n_heads
    return [[row[h * head_dim:(h + 1) * head_dim] for row in x] for h in range(n_heads)]


def concat(*blocks: Matrix) -> Matrix:
    """Return the blocks side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


# Training: skip this on a first reading
#
# The forward pass runs on a model that keeps what every operation read. The backward pass goes
# through the operations in the opposite order. Each takes the gradient of its output and returns
# those of its inputs, for whole matrices at a time, so that all the work is in dot() here as well.


class RecordingLlama(Llama):
    """A Llama that keeps in .inputs what each of its operations read, under the operation's name.

    Of a matrix or a norm that is x, of an attention (q, k, v), of a SwiGLU (a, b).
    """

    def __init__(self, config: Config, weights: dict[str, Matrix | Vector]):
        super().__init__(config, weights)
        self.inputs: dict[str, Matrix | tuple] = {}

    def linear(self, name: str, x: Matrix) -> Matrix:
        self.inputs[name] = x
        return super().linear(name, x)

    def norm(self, name: str, x: Matrix) -> Matrix:
        self.inputs[name] = x
        return super().norm(name, x)

    def attend(self, name: str, q: Matrix, k: Matrix, v: Matrix, mask=None) -> Matrix:
        self.inputs[name] = (q, k, v)
        return super().attend(name, q, k, v, mask)

    def gate(self, name: str, a: Matrix, b: Matrix) -> Matrix:
        self.inputs[name] = (a, b)
        return super().gate(name, a, b)

    def backward(self, tokens: Sequence[int], d_logits: Matrix) -> dict[str, Matrix | Vector]:
        """Return {weight: its gradient} after forward(tokens), from the gradient of the logits."""
        c = self.config
        gradients: dict[str, Matrix | Vector] = {}
        unrotate = [-position for position in range(len(tokens))]

        def linear_back(name: str, d: Matrix) -> Matrix:
            d_x, gradients[name] = linear_backward(d, self.inputs[name], self.weights[name])
            return d_x

        def norm_back(name: str, d: Matrix) -> Matrix:
            d_x, gradients[name] = rms_norm_backward(d, self.inputs[name], self.weights[name],
                                                     c.norm_eps)
            return d_x

        d = norm_back("norm", linear_back("output", d_logits))
        for layer in reversed(range(c.n_layers)):
            prefix = f"layers.{layer}."
            # Feed-forward: d goes past the block as it is, and through it.
            d_hidden = linear_back(prefix + "feed_forward.w2", d)
            d_gate, d_up = swiglu_backward(d_hidden, *self.inputs[prefix + "feed_forward"])
            d_h = add(linear_back(prefix + "feed_forward.w1", d_gate),
                      linear_back(prefix + "feed_forward.w3", d_up))
            d = add(d, norm_back(prefix + "ffn_norm", d_h))
            # Attention
            d_attended = linear_back(prefix + "attention.wo", d)
            d_q, d_k, d_v = attend_backward(d_attended, *self.inputs[prefix + "attention"],
                                            c.n_heads, c.n_kv_heads)
            d_q = rope_heads(d_q, unrotate, c.n_heads, c.rope_base)
            d_k = rope_heads(d_k, unrotate, c.n_kv_heads, c.rope_base)
            d_h = add(linear_back(prefix + "attention.wq", d_q),
                      linear_back(prefix + "attention.wk", d_k))
            d_h = add(d_h, linear_back(prefix + "attention.wv", d_v))
            d = add(d, norm_back(prefix + "attention_norm", d_h))
        # A token's gradient goes to its row of the embedding table.
        d_table = [[0.0] * c.dim for _ in self.weights["tok_embeddings"]]
        for token, row in zip(tokens, d):
            d_table[token] = list(map(operator.add, d_table[token], row))
        gradients["tok_embeddings"] = d_table
        return gradients


def linear_backward(d: Matrix, x: Matrix, w: Matrix) -> tuple[Matrix, Matrix]:
    """y = x wᵀ: return dx = d w and dw = dᵀ x."""
    d_x = linear(d, list(zip(*w)))
    d_w = linear(list(zip(*d)), list(zip(*x)))
    return d_x, d_w


def rms_norm_backward(d: Matrix, x: Matrix, gain: Vector, eps: float) -> tuple[Matrix, Vector]:
    """y = gain · u, u = x / rms: return dx = (gain·d - u · mean(gain·d · u)) / rms and dgain."""
    d_x = []
    d_gain = [0.0] * len(gain)
    for d_row, row in zip(d, x):
        scale = 1 / math.sqrt(dot(row, row) / len(row) + eps)
        unit = [value * scale for value in row]
        pull = list(map(operator.mul, d_row, gain))
        mean = dot(pull, unit) / len(row)
        d_x.append([(p - u * mean) * scale for p, u in zip(pull, unit)])
        d_gain = [total + slope * u for total, slope, u in zip(d_gain, d_row, unit)]
    return d_x, d_gain


def attend_backward(
    d: Matrix, q: Matrix, k: Matrix, v: Matrix, n_heads: int, n_kv_heads: int
) -> tuple[Matrix, Matrix, Matrix]:
    """Return dq, dk and dv of attend(). With S = q kᵀ / √d, P = softmax(S), out = P v:

    dv = Pᵀ d,  dP = d vᵀ,  dS = P · (dP - rowsum(P · dP)),  dq = dS k / √d,  dk = dSᵀ q / √d.
    """
    group = n_heads // n_kv_heads
    keys = split_heads(k, n_kv_heads)
    values = split_heads(v, n_kv_heads)
    d_queries = []
    d_keys = [[[0.0] * len(row) for row in head] for head in keys]
    d_values = [[[0.0] * len(row) for row in head] for head in values]
    for h, (queries, d_head) in enumerate(zip(split_heads(q, n_heads), split_heads(d, n_heads))):
        g = h // group
        scale = 1 / math.sqrt(len(queries[0]))
        p = []
        d_s = []
        for weights, d_row in zip(head_weights(queries, keys[g]), d_head):
            d_p = [dot(d_row, value) for value in values[g][:len(weights)]]
            mean = dot(weights, d_p)
            unseen = [0.0] * (len(k) - len(weights))
            p.append(weights + unseen)
            d_s.append([w * (slope - mean) * scale for w, slope in zip(weights, d_p)] + unseen)
        d_queries.append(linear(d_s, list(zip(*keys[g]))))
        d_keys[g] = add(d_keys[g], linear(list(zip(*d_s)), list(zip(*queries))))
        d_values[g] = add(d_values[g], linear(list(zip(*p)), list(zip(*d_head))))
    return concat(*d_queries), concat(*d_keys), concat(*d_values)


def swiglu_backward(d: Matrix, a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """y = a σ(a) · b: return da = d · b · σ(a) · (1 + a·(1 - σ(a))) and db = d · a σ(a)."""
    d_a = []
    d_b = []
    for d_row, a_row, b_row in zip(d, a, b):
        gates = list(map(sigmoid, a_row))
        d_a.append([slope * y * s * (1 + x * (1 - s))
                    for slope, x, y, s in zip(d_row, a_row, b_row, gates)])
        d_b.append([slope * x * s for slope, x, s in zip(d_row, a_row, gates)])
    return d_a, d_b


def cross_entropy(logits: Matrix, targets: Sequence[int]) -> tuple[float, Matrix]:
    """Return the mean of -log softmax(logits)[target] in nats, and its gradient in the logits."""
    loss = 0.0
    d_logits = []
    for row, target in zip(logits, targets):
        p = softmax(row)
        loss -= math.log(p[target]) / len(targets)
        p[target] -= 1
        d_logits.append([value / len(targets) for value in p])
    return loss, d_logits


def loss_and_gradients(
    config: Config, weights: dict[str, Matrix | Vector], tokens: Sequence[int]
) -> tuple[float, dict[str, Matrix | Vector]]:
    """Return the mean loss of predicting each token from those before it, and its gradients."""
    model = RecordingLlama(config, weights)
    loss, d_logits = cross_entropy(model.forward(tokens[:-1]), tokens[1:])
    return loss, model.backward(tokens[:-1], d_logits)


class Adam:
    """Steps scaled by running means of the gradient and of its square (Kingma & Ba 2015)."""

    def __init__(
        self, weights: dict[str, Matrix | Vector], beta1: float = 0.7, beta2: float = 0.95
    ):
        self.rows = {name: as_rows(w) for name, w in weights.items()}
        self.mean = {name: [[0.0] * len(row) for row in rows] for name, rows in self.rows.items()}
        self.square = {name: [[0.0] * len(row) for row in rows] for name, rows in self.rows.items()}
        self.beta1 = beta1
        self.beta2 = beta2
        self.steps = 0

    def step(self, gradients: dict[str, Matrix | Vector], learning_rate: float) -> None:
        """Change the weights, in place."""
        self.steps += 1
        b1, c1 = self.beta1, 1 - self.beta1
        b2, c2 = self.beta2, 1 - self.beta2
        # The means start at zero; these undo that.
        rate = learning_rate / (1 - b1 ** self.steps)
        unbias = 1 / (1 - b2 ** self.steps)
        for name, gradient in gradients.items():
            rows = zip(self.rows[name], as_rows(gradient), self.mean[name], self.square[name])
            for w, d, m, v in rows:
                m[:] = [b1 * mean + c1 * slope for mean, slope in zip(m, d)]
                v[:] = [b2 * mean + c2 * slope * slope for mean, slope in zip(v, d)]
                w[:] = [weight - rate * mean / (math.sqrt(square * unbias) + 1e-8)
                        for weight, mean, square in zip(w, m, v)]


def as_rows(w: Matrix | Vector) -> Matrix:
    """Return a matrix as it is, and a vector as a matrix of one row; the numbers are not copied."""
    return w if isinstance(w[0], list) else [w]


def init_weights(config: Config, rng: random.Random) -> dict[str, Matrix | Vector]:
    """Return first weights: gains 1, embeddings of size 1, matrices of size 1/√in.

    Matrices that write to the residual stream get half of that.
    """
    weights: dict[str, Matrix | Vector] = {}
    for name, shape in config.shapes().items():
        if len(shape) == 1:
            weights[name] = [1.0] * shape[0]
            continue
        size = 1.0 if name == "tok_embeddings" else 1 / math.sqrt(shape[1])
        if name.endswith(("wo", "w2")):
            size /= 2
        weights[name] = [[rng.gauss(0, size) for _ in range(shape[1])] for _ in range(shape[0])]
    return weights


def train(
    config: Config,
    ids: Sequence[int],
    rng: random.Random,
    steps: int,
    length: int,
    learning_rate: float = 0.02,
) -> tuple[Llama, list[float]]:
    """Return a Llama that has read ids, `length` tokens a step, and the loss of each step.

    At the end of ids it starts again. The learning rate rises for 10 steps and then falls to 0.
    Progress goes to stderr where that is a terminal.
    """
    model = Llama(config, init_weights(config, rng))
    adam = Adam(model.weights)
    watched = sys.stderr is not None and sys.stderr.isatty()
    losses = []
    for step in range(steps):
        start = step * length % (len(ids) - length)
        loss, gradients = loss_and_gradients(config, model.weights, ids[start:start + length + 1])
        adam.step(gradients, learning_rate * min(1, (step + 1) / 10) * (1 - step / steps))
        losses.append(loss)
        if watched:
            print(f"\rtraining the tiny Llama: step {step + 1} of {steps}, loss {loss:.2f} ",
                  end="", file=sys.stderr)
    if watched:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return model, losses


# The bench


# The supporting cast: the models behind the sections, and small measures.


def old_table(trace: Trace, columns: Sequence[str], rows: Sequence, left: Sequence[int] = ()) -> None:
    """Print rows of text."""
    named = [{str(i): cell for i, cell in enumerate(row)} for row in rows]
    trace.table(named, {f"{i} as {name or ' '}": "" for i, name in enumerate(columns)})


class CachedModel:
    """A Llama as logits_fn that reads nothing twice.

    Of every text that it has read it keeps the logits, the hidden state, and in each layer its last token's key and
    value. So going back to another text, as a beam does all the time, is free, and a tree of texts takes one pass.
    passes: how often a decoder asked; forwards: how often the Llama ran.
    """
    def __init__(self, llama: Llama):
        self.llama, self.passes, self.forwards, self.nodes = RecordingLlama(llama.config, llama.weights), 0, 0, []
        self.known: dict[tuple[int, ...], tuple[Vector, Vector]] = {}  # text: (logits, hidden state)
        self.layers = [{} for _ in range(llama.config.n_layers)]       # of each layer, text: (key, value)

    def __call__(self, tokens: Sequence[int]) -> Vector:
        return self.last_rows(tokens, 1)[0]

    def last_rows(self, tokens: Sequence[int], n: int) -> Matrix:
        """Logits after each of the last n prefixes of tokens, [n][vocab_size], in one pass."""
        text = tuple(tokens)
        rows = self.read([text])
        return [rows[text[:end]] for end in range(len(text) - n + 1, len(text) + 1)]

    def read(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Vector]:
        """{text: logits after it} for these texts and everything that they begin with, in one pass."""
        prefixes = dict.fromkeys(text[:end] for text in texts for end in range(1, len(text) + 1))
        self.nodes, self.passes = [text for text in prefixes if text not in self.known], self.passes + 1
        if self.nodes:
            self.forwards += 1
            needed = {text[:end] for text in self.nodes for end in range(1, len(text))}
            # Keys and values that are there already come first, then those of the new nodes.
            self.keys = sorted(needed - set(self.nodes), key=len) + self.nodes
            rows = self.llama.forward([text[-1] for text in self.nodes], self,
                                      positions=[len(text) - 1 for text in self.nodes],
                                      mask=tree_mask(self.nodes, self.keys))
            features = self.llama.inputs["output"]
            self.known.update(zip(self.nodes, zip(rows, features)))
        return {text: self.known[text][0] for text in prefixes}

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Keep the nodes' keys and values of a layer; return all that attention needs."""
        cached = self.layers[layer]
        cached.update(zip(self.nodes, zip(k, v)))
        keys, values = zip(*(cached[text] for text in self.keys))
        return list(keys), list(values)

    def feature(self, tokens: Sequence[int]) -> Vector | None:
        """The last hidden state, which the output matrix reads, after these tokens; None if they were not read yet."""
        return self.known.get(tuple(tokens), (None, None))[1]


@cache
def rhyme() -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and TEXT in tokens."""
    tokenizer = Tokenizer.train(TEXT, VOCAB_SIZE)
    return tokenizer, tokenizer.encode(TEXT)


@cache
def trained_llama(seed: int, steps: int, **sizes: int) -> Llama:
    """A Llama of these sizes that has read the rhyme."""
    return train(Config(VOCAB_SIZE, **sizes), rhyme()[1], random.Random(seed), steps, STEP_TOKENS, LEARNING_RATE)[0]


def models(knobs: Namespace) -> tuple[CachedModel, CachedModel]:
    """(target, draft) with nothing read yet."""
    return (CachedModel(trained_llama(knobs.seed, knobs.steps, **TARGET)),
            CachedModel(trained_llama(knobs.seed, -(-knobs.steps * 2 // 3), **DRAFT)))


@cache
def medusa_heads(seed: int, steps: int) -> list[Head]:
    """Two heads on the trained target."""
    return train_medusa(trained_llama(seed, steps, **TARGET), rhyme()[1], 2, steps)


@cache
def eagle_head(seed: int, steps: int) -> Head:
    """The EAGLE head on the trained target."""
    return train_eagle(trained_llama(seed, steps, **TARGET), rhyme()[1], random.Random(seed), steps * 3 // 2)


@cache
def hidden_batches(llama: Llama, ids: tuple[int, ...]) -> list[tuple[int, Matrix]]:
    """(start, hidden states) for every STEP_TOKENS tokens of ids: what a head on the frozen llama learns from."""
    batches = []
    for start in range(0, len(ids) - STEP_TOKENS // 2, STEP_TOKENS):
        model, part = CachedModel(llama), ids[start:start + STEP_TOKENS]
        model(part)
        batches.append((start, [model.feature(part[:end]) for end in range(1, len(part) + 1)]))
    return batches


def fit(head: Head, batches: Sequence[tuple], gradients: Callable, steps: int) -> None:
    """Train head, in place, with gradients(head, *batch), batch by batch."""
    adam = Adam(head)
    for step in range(steps):
        batch = batches[step % len(batches)]
        adam.step(gradients(head, *batch), LEARNING_RATE * (1 - step / steps))


def medusa_gradients(head: Head, h: Matrix, targets: Sequence[int]) -> Head:
    """The gradients of cross-entropy in a Medusa head's weights."""
    z = linear(h, head["w1"])
    mixed = add(h, silu(z))
    _, d_logits = cross_entropy(linear(mixed, head["w2"]), targets)
    d_mixed, d_w2 = linear_backward(d_logits, mixed, head["w2"])
    d_z, _ = swiglu_backward(d_mixed, z, [[1.0] * len(z[0])] * len(z))
    _, d_w1 = linear_backward(d_z, h, head["w1"])
    return {"w1": d_w1, "w2": d_w2}


def eagle_gradients(head: Head, x: Matrix, f: Matrix, states: Matrix) -> Head:
    """The gradients of the squared error in EAGLE's weights."""
    z = linear(x, head["w1"])
    s = silu(z)
    guess = add(f, linear(s, head["w2"]))
    d_guess = [[(a - b) / (len(row) * len(states)) for a, b in zip(row, state)]
               for row, state in zip(guess, states)]
    d_s, d_w2 = linear_backward(d_guess, s, head["w2"])
    d_z, _ = swiglu_backward(d_s, z, [[1.0] * len(z[0])] * len(z))
    _, d_w1 = linear_backward(d_z, x, head["w1"])
    return {"w1": d_w1, "w2": d_w2}


def count_weights(weights: dict[str, Matrix]) -> int:
    """How many numbers there are."""
    return sum(len(row) for w in weights.values() for row in w)


def check_request(prompt: Sequence[int], max_new_tokens: int, at_least: int = 0, **at_least_1: int) -> None:
    """ValueError, saying what would do, where a decoder cannot work."""
    if not prompt:
        raise ValueError("prompt must have at least one token: a model predicts what comes after something")
    if max_new_tokens < at_least:
        raise ValueError(f"max_new_tokens must be at least {at_least}, not {max_new_tokens}")
    for name, value in at_least_1.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def check_eos(eos: int | None, vocab_size: int) -> None:
    """ValueError if the end token is none of the vocabulary."""
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos must be a token id from 0 to {vocab_size - 1}, or None, not {eos}")


def log_softmax(logits: Vector) -> Vector:
    """log softmax(logits) = logits - log Σ exp(logits), without overflow."""
    top = max(logits)
    norm = top + math.log(math.fsum(math.exp(value - top) for value in logits))
    return [value - norm for value in logits]


def log_probability(logits_fn: LogitsFn, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Σ log p(token | all before it), in nats."""
    rows = last_rows(logits_fn, [*prompt, *tokens][:-1], len(tokens))
    return sum(log_softmax(row)[token] for row, token in zip(rows, tokens))


def total_variation(p: dict, q: dict) -> float:
    """Σ |p - q| / 2: the probability that has to move to make one distribution the other."""
    return sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {**p, **q}) / 2


def random_logits_fn(rng: random.Random, vocab_size: int) -> LogitsFn:
    """A model with no sense: for every prefix, normal logits of its own, the same whenever asked."""
    salt = rng.random()
    return lambda tokens: [random.Random(f"{salt} {list(tokens)} {i}").gauss(0, 1.5) for i in range(vocab_size)]


def distinct(texts: Sequence[Sequence[int]], n: int) -> float:
    """Distinct-n: of all runs of n tokens in the texts, the share that remains when each is counted once."""
    runs = [run for text in texts for run in zip(*(text[i:] for i in range(n)))]
    return len(set(runs)) / len(runs) if runs else 1.0


def entropy(weights: Vector) -> float:
    """Entropy in bits: 0 for one-hot, log2(n) for an even look at n keys."""
    return max(0.0, -sum(w * math.log2(w) for w in weights if w > 0))


def quoted(text: str) -> list[str]:
    """A text, set in; a slash for the end of a line. There is room for an ellipsis as three dots."""
    return textwrap.wrap(text.replace("\n", " / ").strip(), WIDTH - 2, initial_indent="    ", subsequent_indent="    ")


def clip(text: str, width: int) -> str:
    """text on one line, cut to width characters."""
    text = text.replace("\n", "/").strip()
    return text if len(text) <= width else text[:width - 2].rstrip() + " …"


def show_token(token: str) -> str:
    """Return a token as a label of at most 12 columns, blanks and controls made visible."""
    text = token[1:] if len(token) > 1 and token[0] == " " else token.replace(" ", "␣")
    text = printable(text)
    while display_width(text) > 12:
        text = text[:-2] + "…"
    return text


# =============================================================================================
# SHARED BY THE FIVE: the same in each script, read once
# =============================================================================================

# Arithmetic


def dot_by_hand(a: Sequence[float], b: Sequence[float]) -> float:
    """Return Σ a[i]·b[i]."""
    return sum(map(operator.mul, a, b))


dot = getattr(math, "sumprod", dot_by_hand)  # Python 3.12 and newer have it built in


def linear(x: Matrix, w: Matrix) -> Matrix:
    """Return y = W x for every row of x: x [n][in], w [out][in] -> [n][out]. nn.Linear, no bias."""
    return [[dot(row, unit) for unit in w] for row in x]


def softmax(scores: Vector) -> Vector:
    """Return exp(s) / Σ exp(s): weights that are positive and sum to 1.

    The largest score is subtracted first, so that nothing overflows. A score of -inf gets weight 0.
    If all scores are -inf, as for a query that sees no key, all weights are 0.
    """
    largest = max(scores, default=-math.inf)
    if largest == -math.inf:
        return [0.0] * len(scores)
    exps = [math.exp(s - largest) for s in scores]
    total = sum(exps)
    return [e / total for e in exps]


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


# The text and the tokenizer

CLAUSES = [
    "the house that Jack built.",
    "the malt that lay in",
    "the rat that ate",
    "the cat that killed",
    "the dog that worried",
    "the cow with the crumpled horn that tossed",
    "the maiden all forlorn that milked",
    "the man all tattered and torn that kissed",
    "the priest all shaven and shorn that married",
    "the cock that crowed in the morn that waked",
    "the farmer sowing his corn that kept",
    "the horse and the hound and the horn that belonged to",
]
# The House That Jack Built: verse n tells clauses n, n - 1, …, 0.
TEXT = "".join("This is " + " ".join(CLAUSES[n::-1]) + "\n" for n in range(len(CLAUSES)))


def split_words(text: str) -> list[str]:
    """Return the units that no merge crosses: words and punctuation with the blank before them."""
    return re.findall(r" ?\w+| ?[^\w\s]+|\s", text)


def merge_pair(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Return parts with every occurrence of pair joined, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return merged


@dataclass(frozen=True)
class Tokenizer:
    """Byte-pair encoding in miniature, over characters (Sennrich et al. 2016, arXiv:1508.07909).

    vocab[id] is a token. merges are the pairs that were joined, in the order they were learned.
    """

    vocab: list[str]
    merges: list[tuple[str, str]]

    @classmethod
    def train(cls, text: str, vocab_size: int) -> Tokenizer:
        """Return a tokenizer of vocab_size tokens, or fewer if every word has become one token.

        ValueError if text is empty or has more different characters than vocab_size.
        """
        vocab = sorted(set(text))
        merges: list[tuple[str, str]] = []
        if not 0 < len(vocab) <= vocab_size:
            raise ValueError(f"vocab_size must be at least the number of different characters, "
                             f"{len(vocab)}, and the text not empty; got {vocab_size}")
        word_counts = Counter(split_words(text))
        parts = {word: list(word) for word in word_counts}
        while len(vocab) < vocab_size:
            pair_counts: Counter[tuple[str, str]] = Counter()
            for word, count in word_counts.items():
                for pair in zip(parts[word], parts[word][1:]):
                    pair_counts[pair] += count
            if not pair_counts:
                break
            # The most frequent pair; of equally frequent ones, the one that sorts first.
            best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            parts = {word: merge_pair(split, best) for word, split in parts.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text: within each word, the merges in the order of learning.

        ValueError names a character that the vocabulary does not have.
        """
        ids = {token: i for i, token in enumerate(self.vocab)}
        for character in text:
            if character not in ids:
                known = "".join(token for token in self.vocab if len(token) == 1)
                raise ValueError(f"the vocabulary has no character {character!r}; it knows "
                                 f"{known!r}")
        words = split_words(text)
        parts = {word: list(word) for word in words}
        for pair in self.merges:
            parts = {word: merge_pair(split, pair) for word, split in parts.items()}
        return [ids[part] for word in words for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


# Printing

WIDTH = 80  # columns of the trace
# What a terminal that cannot show the character on the left gets instead of it.
ASCII = str.maketrans({
    "█": "#", "▓": "*", "▒": "+", "░": ":", "·": ".", "│": "|", "─": "-", "┌": "+", "┐": "+",
    "└": "+", "┘": "+", "├": "+", "┤": "+", "┬": "+", "┴": "+", "┼": "+", "→": "->", "←": "<-",
    "␣": "_", "…": "...", "×": "x", "√": "sqrt ", "Σ": "sum ", "Δ": "d", "ᵀ": "^T", "²": "^2",
    "±": "+-", "≤": "<=", "≥": ">=", "≈": "~", "α": "alpha", "β": "beta", "γ": "gamma",
    "θ": "theta", "λ": "lambda", "μ": "mu", "σ": "sigma", "τ": "tau", "∞": "inf", "≠": "!=",
})


def printable(text: str) -> str:
    """Return text with everything escaped that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def display_width(text: str) -> int:
    """Return the columns that text takes: East Asian wide characters two, combining marks none."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    combining = sum(unicodedata.combining(c) > 0 for c in text)
    return len(text) + wide - combining


def bar(value: float, full: float, width: int) -> str:
    """Return a bar of value / full times width characters; a dot for a value too small to draw."""
    if full <= 0 or value <= 0:
        return ""
    return "█" * round(width * min(value / full, 1.0)) or "·"


def format_cell(value: object, form: str) -> str:
    """Return a value as text: form is a format specification, or a template with braces."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return form.format(value) if "{" in form else format(value, form)


class Trace:
    """Prints the sections and their checks, as the output can show them, and counts the checks.

    predict: ask the reader for each result before it is shown.
    """

    def __init__(self, ascii_only: bool = False, predict: bool = False):
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        probe = "".join(map(chr, ASCII))
        self.ascii = ascii_only or probe.encode(encoding, "ignore").decode(encoding) != probe
        self.colour = (sys.stdout is not None and sys.stdout.isatty()
                       and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.predict = predict
        self.listening = sys.stdin is not None and sys.stdin.isatty()  # is there anybody to answer?
        self.held = self.failed = 0    # checks
        self.asked = self.right = 0    # predictions
        self.unwritten = 0             # sections that wait for a function
        self.in_checks = False         # was the last line a check?

    def plain(self, text: str) -> str:
        """Return text as this output can show it."""
        if not self.ascii:
            return text
        return text.translate(ASCII).encode("ascii", "backslashreplace").decode()

    def lines(self, lines: Sequence[str], style: str = "") -> None:
        """Print lines as they are (a picture, say). style: an ANSI code, for terminals."""
        self.in_checks = False
        for line in lines:
            line = self.plain(line).rstrip()
            print(f"\x1b[{style}m{line}\x1b[0m" if style and self.colour else line)

    def section(self, number: int, title: str, techniques: Sequence[Callable]) -> None:
        """Print a section's head: its number, its title, and the functions that do the work."""
        self.lines(["", f"── {number} ── {title} ".ljust(WIDTH, "─")], "1")
        names = "in the source: " + ", ".join(technique.__name__ for technique in techniques)
        self.lines(textwrap.wrap(names, WIDTH, subsequent_indent=" " * 15), "2")

    def say(self, text: str) -> None:
        """Print a paragraph."""
        self.lines(["", *textwrap.wrap(self.plain(text), WIDTH)])

    def note(self, text: str) -> None:
        """Print the legend of the table or picture above."""
        self.lines(textwrap.wrap(self.plain(text), WIDTH), "2")

    def table(self, rows: Sequence, columns: dict[str, str]) -> None:
        """Print rows (named tuples or dictionaries) as a table. columns: {field: format}, in order.

        A format is ".1%" or "{:.1f}×". With "bar 20" after it, the number is drawn as well; with
        nothing before that, it is drawn only. The longest bar stands for the largest number in the
        column, or for F in "bar 20 of F". A heading is the field's name with blanks for _, or what
        is said after " as ". Text goes to the left, numbers to the right; None is an empty cell.
        """
        printed = []
        for column, form in columns.items():
            field, _, heading = column.partition(" as ")
            values = [row[field] if isinstance(row, dict) else getattr(row, field) for row in rows]
            printed += self.table_column(heading or field.replace("_", " "), values, form)
        for i, cells in enumerate(zip(*printed)):
            self.lines(["  ".join(cells)], "2" if i == 0 else "")

    def table_column(self, heading: str, values: list, form: str) -> list[list[str]]:
        """Return the cells, heading first and padded, of the numbers and of the bars, if any."""
        form, _, bars = form.partition("bar ")
        numbers = [value for value in values if isinstance(value, (int, float))]
        columns = []
        if form or not bars:
            cells = [heading] + [format_cell(value, form.strip()) for value in values]
            columns.append(self.pad(cells, to_the_right=bool(numbers)))
            heading = ""
        if bars:
            width, _, full = bars.partition(" of ")
            largest = float(full) if full else max(numbers, default=0)
            drawn = [bar(value or 0, largest, int(width)) for value in values]
            columns.append(self.pad([heading] + drawn, to_the_right=False))
        return columns

    def pad(self, cells: list[str], to_the_right: bool) -> list[str]:
        """Return cells filled up with blanks to the same width."""
        cells = [self.plain(cell) for cell in cells]
        width = max(map(display_width, cells))
        blanks = [" " * (width - display_width(cell)) for cell in cells]
        if to_the_right:
            return [blank + cell for cell, blank in zip(cells, blanks)]
        return [cell + blank for cell, blank in zip(cells, blanks)]

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared. A failure makes the status 1."""
        if holds:
            self.held += 1
            mark, colour = "ok  ", "32"
        else:
            self.failed += 1
            mark, colour = "FAIL", "1;31"
        if self.colour:
            mark = f"\x1b[{colour}m{mark}\x1b[0m"
        if not self.in_checks:
            self.lines([""])
        first, *others = textwrap.wrap(self.plain(f"{claim} ({evidence})"), WIDTH - 6)
        self.lines([f"{mark}  {first}"] + ["      " + line for line in others])
        self.in_checks = True

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """Check that two matrices have one shape, and differ by less than bound in every place."""
        if [len(row) for row in got] != [len(row) for row in expected]:
            self.check(claim, False, "the shapes differ")
            return
        gaps = [abs(a - b) for rows in zip(got, expected) for a, b in zip(*rows)]
        if all(gap < bound for gap in gaps):
            self.check(claim, True, f"max |Δ| < {bound:.0e}")
        else:
            self.check(claim, False, f"max |Δ| = {max(gaps):.1e}; bound {bound:.0e}")

    def ask(self, question: str, answer: float | str) -> None:
        """With --predict: ask, wait for the reader's answer, show the computed one, and wait again.

        A number is right within a tenth. Text is right if it is the same but for case.
        """
        if not self.predict:
            return
        if isinstance(answer, str):
            shown = answer.strip()
        elif isinstance(answer, int) or abs(answer) >= 1000:
            shown = f"{answer:,.0f}"
        else:
            shown = f"{answer:.3g}"
        self.say(f"Predict: {question}")
        reply = self.hear("  your answer (Enter: pass) > ")
        verdict = ""
        if reply:
            right = reply.casefold() == shown.casefold() or (
                not isinstance(answer, str) and is_near(reply, answer))
            self.asked += 1
            self.right += right
            verdict = " - yes" if right else " - not quite"
        self.lines([f"  computed: {shown}{verdict}"], "1")
        self.hear("  (Enter: go on) ")

    def hear(self, prompt: str) -> str:
        """Return what the reader types, or "" where there is nobody to ask."""
        if not self.listening:
            return ""
        try:
            return input(prompt).strip()
        except EOFError:
            print()
            self.listening = False  # no more answers will come
            return ""


def is_near(reply: str, answer: float) -> bool:
    """Return whether reply is a number within a tenth of answer; 33% and 0,33 count as well."""
    scale = 100 if reply.endswith("%") else 1
    for comma in ("", "."):  # of thousands, or the decimal comma
        try:
            number = float(reply.rstrip("%×x ").replace(",", comma)) / scale
        except ValueError:
            continue
        if abs(number - answer) <= abs(answer) / 10:
            return True
    return False


# The command line


class Section(NamedTuple):
    """A section of the trace. core: it belongs to the chapter itself; the others can wait."""

    title: str
    show: Callable
    techniques: Sequence[Callable]  # the functions and classes that its head names
    core: bool = True


class OneLineParser(ArgumentParser):
    """argparse, but a refusal is one line, and shows control characters instead of sending them."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists the options)\n")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """Return an argparse type: a whole number from low to high."""
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def section_numbers(count: int) -> Callable[[str], list[int]]:
    """Return an argparse type: section numbers with commas between them."""
    def parse(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")]
        if not all(re.fullmatch("[0-9]{1,4}", part) and 1 <= int(part) <= count for part in parts):
            raise ArgumentTypeError(f"must be numbers from 1 to {count} (--list names them), as in "
                                    f"1,{count}, not {text!r}")
        return [int(part) for part in parts]
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """Return a parser with the options that all five scripts have; a script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    parser.add_argument("--section", metavar="N[,N...]", action="extend",
                        type=section_numbers(n_sections),
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true",
                        help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true",
                        help="be asked for each section's result before it is shown")
    return parser


def list_sections(trace: Trace, sections: Sequence[Section]) -> None:
    """Print the sections' numbers and titles, the core ones with a star."""
    for number, section in enumerate(sections, 1):
        star = "*" if section.core else " "
        trace.lines([f"{number:>2}{star} {section.title}"])
    trace.lines(["", "* the core of the chapter; the others can wait"])


def run_section(trace: Trace, number: int, section: Section, knobs: Namespace) -> None:
    """Print one section. Where a function is not written yet (an exercise), say so and go on."""
    start = time.perf_counter()
    trace.section(number, section.title, section.techniques)
    try:
        section.show(trace, knobs)
    except NotImplementedError as error:
        trace.unwritten += 1
        trace.say(f"Not written yet: {error}. This section goes on once it is.")
    if knobs.time:
        sys.stdout.flush()
        print(f"section {number}: {time.perf_counter() - start:.2f} s", file=sys.stderr)


def print_summary(trace: Trace, next_experiment: str) -> None:
    """Print how many checks held, and what to run next."""
    summary = [""]
    if trace.failed:
        summary.append(f"{trace.failed} of {trace.failed + trace.held} checks FAILED.")
    elif trace.held:
        summary.append(f"All {trace.held} checks held.")
    else:
        summary.append("No check was reached.")
    if trace.unwritten:
        summary.append(f"Sections that wait for a function: {trace.unwritten}.")
    if trace.asked:
        summary.append(f"Predictions: {trace.right} of {trace.asked} right.")
    trace.lines([*summary, f"Try next: {next_experiment}"], "1")


def run_sections(sections: Sequence[Section], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections and return the exit status.

    0: every check held. 1: one failed, or a function is not written yet. 130: Ctrl-C. A reader who
    closes the pipe ends the trace quietly.
    """
    try:
        trace = Trace(knobs.ascii, knobs.predict)
        if knobs.list:
            list_sections(trace, sections)
        else:
            for number in sorted(set(knobs.section or range(1, len(sections) + 1))):
                run_section(trace, number, sections[number - 1], knobs)
            print_summary(trace, next_experiment)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 1 if trace.failed or trace.unwritten else 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Nothing can be written any more. Closing stdout must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        print(f"cannot write the trace: {error.strerror}", file=sys.stderr)
        return 1


SECTIONS = [
    Section("Greedy", show_greedy,
            [greedy, extend_by, argmax]),
    Section("Shaping the distribution", show_filters,
            [apply_temperature, top_k_filter, top_p_filter, min_p_filter, typical_filter, repetition_penalty, count_penalty]),
    Section("Sampling done right", show_sampling,
            [sample, draw, every_outcome, chi_square]),
    Section("Beam search", show_beam,
            [beam_search, extensions, diverse_beam_search, exact_search]),
    Section("Speculative decoding", show_speculative,
            [speculative_greedy, speculate, speculative_sample, acceptance, residual]),
    Section("When it pays", show_when_it_pays,
            [expected_tokens, speed_up, best_gamma]),
    Section("Drafts for nothing", show_free_drafts,
            [prompt_lookup, ngram_model, rounded_weights], core=False),
    Section("Medusa", show_medusa,
            [medusa_head, medusa_candidates, verify_tree, CachedModel, medusa_greedy]),
    Section("EAGLE", show_eagle,
            [eagle_step, eagle_draft, train_eagle], core=False),
    Section("Jacobi and lookahead decoding", show_lookahead,
            [jacobi_greedy, lookahead_greedy], core=False),
    Section("Text with a shape", show_constrained,
            [follow, constrain]),
    Section("The table", show_all_decoders,
            [log_probability], core=False),
]


def number(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a number from low (or above it) to high."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or above and value == low:
            bounds = f"above {low:g} and at most {high:g}" if above else f"from {low:g} to {high:g}"
            raise ArgumentTypeError(f"must be a number {bounds}, not {text!r}")
        return value
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace; the exit status."""
    parser = common_parser("microbeam", "From logits to text: decoding, and speculative decoding.", len(SECTIONS))
    parser.add_argument("--prompt", default=PROMPT, help=f"the text to go on from (default: {PROMPT!r})")
    for option, kind, default, text in (
            ("--max-new-tokens", whole_number(1, 64), MAX_NEW_TOKENS, "tokens generated"),
            ("--temperature", number(0.05, 10), TEMPERATURE, "divides the logits"),
            ("--top-k", whole_number(1, 999), TOP_K, "tokens that top-k keeps"),
            ("--top-p", number(0, 1, above=True), TOP_P, "probability that top-p keeps"),
            ("--min-p", number(0, 1), MIN_P, "share of the best probability that min-p asks for"),
            ("--width", whole_number(1, 16), BEAM_WIDTH, "candidates that beam search keeps"),
            ("--length-penalty", number(-2, 4), LENGTH_PENALTY, "score = log-probability / length^this"),
            ("--gamma", whole_number(1, 16), GAMMA, "tokens drafted before each pass of the target"),
            ("--steps", whole_number(1, 200), STEPS, "of training the models first; fewer: less sure, sooner done")):
        parser.add_argument(option, metavar="N" if isinstance(default, int) else "X", type=kind, default=default,
                            help=f"{text} (default {default:g})")
    knobs = parser.parse_args(argv)

    tokenizer, _ = rhyme()
    try:
        knobs.tokens = tokenizer.encode(knobs.prompt)
    except ValueError as error:
        parser.error(f"argument --prompt: {error}")
    if not 0 < len(knobs.tokens) <= MAX_PROMPT:
        parser.error(f"argument --prompt: must have from 1 to {MAX_PROMPT} tokens, not {len(knobs.tokens)}")
    knobs.tokenizer, knobs.eos = tokenizer, tokenizer.vocab.index("\n")
    knobs.as_shipped = (knobs.prompt, knobs.seed, knobs.steps, knobs.max_new_tokens) == (PROMPT, 0, STEPS,
                                                                                         MAX_NEW_TOKENS)
    knobs.sizes = [sum(map(math.prod, Config(VOCAB_SIZE, **sizes).shapes().values())) for sizes in (TARGET, DRAFT)]
    knobs.name = lambda token: show_token(tokenizer.vocab[token])
    knobs.clip = lambda tokens, width: clip(tokenizer.decode(tokens), width)
    knobs.tail = lambda tokens: ("… " + knobs.clip(tokens[-4:], 22)) if len(tokens) > 5 else knobs.clip(tokens, 24)
    return run_sections(SECTIONS, knobs, "python microbeam.py --section 5 --temperature 0.5 --gamma 8")


if __name__ == "__main__":
    sys.exit(main())
