#!/usr/bin/env python3
"""From logits to text: how the next token is chosen, and how one pass of a model gives several.

A language model only scores the tokens that may come next. Choosing one is called decoding: taking
the best token, drawing one by chance, searching ahead, or letting something cheap guess several
tokens that the model then checks in one pass. Each method runs here on a tiny Llama that
first learns a nursery rhyme, and the trace checks what is usually only said. Speculative decoding,
for one, changes only the speed: greedy texts stay the same, and drawn texts stay as likely as
before.

How to read it
  1. Read the words below (2 minutes), run `python3 microbeam.py` and read what it prints
     (20 minutes).
  2. Read THE TECHNIQUES, in order: sections 1 to 6, 8 and 11 are the core of the chapter
     (60 minutes). Sections 7, 9 and 10 can wait (20 minutes).
  3. THE EXPERIMENTS say how each number of the trace was measured. What the trace says of 20 models
     was measured at the default settings, with the seeds 0 to 19. THE MODEL AND THE BENCH has the
     tiny Llama and its training. SHARED BY THE FIVE, which the five scripts of this collection have
     in common, reads text, prints and parses the command line.

The papers
  Holtzman et al. 2019, The Curious Case of Neural Text Degeneration (top-p), arXiv:1904.09751
  Keskar et al. 2019, CTRL (the repetition penalty), arXiv:1909.05858
  Meister et al. 2022, Locally Typical Sampling, arXiv:2202.00666
  Nguyen et al. 2024, Turning Up the Heat: Min-p Sampling, arXiv:2407.01082, and against it
    Schaeffer et al. 2025, arXiv:2506.13681
  Stahlberg & Byrne 2019, On NMT Search Errors and Model Errors, arXiv:1908.10090
  Vijayakumar et al. 2016, Diverse Beam Search, arXiv:1610.02424
  Leviathan et al. 2022, Fast Inference from Transformers via Speculative Decoding,
    arXiv:2211.17192, and Chen et al. 2023, Speculative Sampling, arXiv:2302.01318
  Cai et al. 2024, Medusa, arXiv:2401.10774
  Li et al. 2024, EAGLE, arXiv:2401.15077, and EAGLE-3, 2025, arXiv:2503.01840
  Santilli et al. 2023, Parallel Decoding (Jacobi), arXiv:2305.10427
  Fu et al. 2024, Lookahead Decoding, arXiv:2402.02057
  Willard & Louf 2023, Efficient Guided Generation for Large Language Models, arXiv:2307.09702
"""

# The words. What is not explained here is explained in the section that uses it.
#
#   token           a piece of text: here a word with its blank, or a letter; a number from 0
#   logits          the model's scores, one per token of the vocabulary; softmax(logits) are
#                   probabilities, and log_softmax(logits) their logarithms
#   argmax          the token with the highest score
#   eos             the token that ends a text (end of sequence); here the line end of a verse
#   pass            one run of the model over all tokens that are new to it, however many (microkv
#                   calls it a step)
#   target, draft   the model whose text is wanted, and a smaller one that guesses this text
#   guess           a token that something cheap suggests, and that the target then keeps or not
#                   (papers: a draft token or proposal, accepted or rejected)
#   greedy          to take the argmax each time
#   hidden state    what the last layer hands to the output matrix: one vector per token
#   head            in sections 8 and 9: a small extra network that guesses tokens from a hidden
#                   state (not an attention head)
#   frozen          not changed while something else is trained
#   logits_fn       how a decoder sees a model: logits_fn(tokens) are the logits of what comes next
#   CachedModel     a Llama as logits_fn that reads no text twice. Its read(texts) takes one pass
#                   for a whole tree of texts, and returns {text: logits} for these texts and for
#                   all their prefixes. last_rows(tokens, n) are the logits after each of the last n
#                   tokens, and hidden_state(tokens) is the one after tokens that it has read.
#                   Llama.forward(tokens) gives the logits after every token, without a cache.
#   helpers         likeliest(logits, n) are the n tokens with the highest scores, best first;
#                   check_request() and check_eos() refuse arguments that cannot work
#   standard error  how far a mean over a few texts may be off by chance. A difference of less than
#                   two standard errors shows nothing.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from statistics import fmean, stdev
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.exit("This script needs Python 3.11 or newer.")

Vector = list[float]
Matrix = list[Vector]  # row-major: m[row][column]
Weights = dict[str, Matrix | Vector]  # of a Llama, under Meta's names
LogitsFn = Callable[[Sequence[int]], Vector]  # tokens so far -> a score for each possible next one
Choose = Callable[[Vector], int]              # logits -> the next token: argmax, or sampler(…)

PROMPT = "This is the"
MAX_NEW_TOKENS = 24   # tokens generated
TEMPERATURE = 1.0     # divides the logits
TOP_K = 5             # tokens kept
TOP_P = 0.9           # probability kept
MIN_P = 0.1           # share of the best token's probability that a token must have
TYPICAL_P = 0.5       # probability kept, most typical tokens first
BEAM_WIDTH = 4        # candidates kept by beam search
LENGTH_PENALTY = 1.0  # score = log-probability / length^this
GAMMA = 4             # guesses before each pass of the target
STEPS = 40            # of training the target; five eighths of it for everything that guesses
MAX_PROMPT = 64       # tokens of the longest prompt accepted

# How much the experiments look at. (The reader's knobs change the rest.)
FILTER_PLACES = 64    # of the rhyme, where the filters are compared
DRAWS = 1000          # of texts of toy 1, counted
EXACT_PASSES = 150    # after which exact search gives up
PAY_TEXTS = 12        # drawn to see what guessing brings
COMPARED_TEXTS = 6    # written in sections 8 and 9 ...
COMPARED_TOKENS = 12  # ... and their length
CONTEXT = "This is the rat that ate the malt that lay in the house that Jack built.\n"

# =============================================================================================
# THE TECHNIQUES
# =============================================================================================

# 1. Greedy
#
# Take the token with the highest score, append it, and ask again:
#
#     x_t = argmax logits(x_1 … x_t-1)
#
# It is the right choice where one answer is wanted, as in code or extraction. It has two
# weaknesses.
#
# It sees one step ahead. The best first word may lead to where every second word is poor. Say "A"
# begins with 0.5, and its best continuation is "A" with 0.4; "B" begins with 0.4, and "C" follows
# "B" with 0.9. Greedy writes "A A" with probability 0.2, and the best text is "B C" with 0.36.
#
# It repeats itself (Holtzman et al. call this degeneration). A model that sees only the last few
# tokens goes in circles for ever once these tokens come back, since the next choice is the same
# again. A model that sees the whole text can find its way out, and often does not.
#
# In production: transformers' generate(do_sample=False), in generation/utils.py; vLLM and
# llama.cpp at temperature 0. Measured by show_greedy().


def greedy(
    logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, eos: int | None = None
) -> list[int]:
    """Return the new tokens, each the likeliest, up to and including eos if it comes.

    Of equals, the lowest id. ValueError for an empty prompt, max_new_tokens below 0, or an eos
    outside the vocabulary.
    """
    return extend_by(argmax, logits_fn, prompt, max_new_tokens, eos)


def extend_by(
    choose: Choose, logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, eos: int | None
) -> list[int]:
    """Return the new tokens of a decoder that goes one by one: ask for logits, choose, append.

    ValueError as for greedy().
    """
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
    """Return the first index of the largest."""
    return logits.index(max(logits))


# 2. Shaping the distribution
#
# To sample is to draw the next token by its probability. The tail is the trouble: thousands of
# tokens are unlikely one by one, but together they are likely, and one bad token spoils all that
# follow. So the logits are reshaped first. A filter removes tokens by setting their logits to -inf.
#
#     temperature   p ∝ exp(logit / t): t < 1 sharpens, t > 1 flattens, the order stays
#     top-k         keeps the k likeliest, whether the model is sure or not
#     top-p         keeps the shortest list of best tokens that has probability p together: few
#                   tokens where the model is sure, many where it is not (the nucleus)
#     min-p         keeps tokens with at least min_p times the probability of the best one
#     typical       keeps the tokens whose surprise -log p is nearest to the mean surprise, which is
#                   the entropy H = -Σ p·log p, until they have probability p together
#
# On the distribution 0.4, 0.15, 0.15, 0.15, 0.15: top-k 2 keeps all five, as the others tie. Top-p
# 0.5 keeps the first and one more. Min-p 0.5 keeps the first only, since 0.15 < 0.5 · 0.4. Typical
# 0.5 has H = 1.50; the surprises are 0.92 and four times 1.90, so the four are nearer. It keeps
# them and drops the likeliest token of all.
#
# The temperature may come before the filters or after them. Before, as in transformers and vLLM, a
# high temperature also widens what top-p, min-p and typical keep. After, as in llama.cpp, they
# choose from the model's own distribution and the temperature reshapes what they kept.
#
# Penalties come first of all and concern the tokens that the text already has. The repetition
# penalty divides their logits (or multiplies those below 0), once, however often a token came.
# OpenAI's API subtracts instead: logit - presence - frequency · (how often the token came).
#
# When to use which: top-p near 0.9 or min-p near 0.1, with a temperature up to 1, is common.
# Whether min-p is the better of the two is disputed (both papers are above).
#
# In production: the …LogitsWarper classes of transformers' generation/logits_process.py, in this
# order. Ties are treated as there, except by top-p: the sort there does not say which of two equals
# comes first. vLLM: vllm/v1/sample/sampler.py. llama.cpp: common_params_sampling.samplers has the
# order. Measured by show_filters().


def apply_temperature(logits: Vector, t: float) -> Vector:
    """Return logits / t. ValueError unless t is finite and above 0; greedy() is the limit at 0."""
    if not 0 < t < math.inf:
        raise ValueError(f"temperature must be above 0 (greedy is the limit at 0), not {t}")
    return [logit / t for logit in logits]


def top_k_filter(logits: Vector, k: int) -> Vector:
    """Keep the k highest, and whatever ties with the k-th. ValueError if k < 1."""
    if k < 1:
        raise ValueError(f"top_k must be at least 1, not {k}")
    kth = sorted(logits, reverse=True)[min(k, len(logits)) - 1]
    return keep_where([logit >= kth for logit in logits], logits)


def top_p_filter(logits: Vector, p: float) -> Vector:
    """Keep the likeliest until p is reached, with the token that reaches p.

    As in transformers: remove tokens from the least likely up (of equals, the lower id first). Stop
    before the removed sum exceeds 1 - p. The likeliest always stays. ValueError unless 0 < p <= 1.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, not {p}")
    probabilities = softmax(logits)
    rising = sorted(range(len(logits)), key=lambda i: logits[i])
    kept = [True] * len(logits)
    gone = 0.0
    for i in rising[:-1]:
        gone += probabilities[i]
        if gone > 1 - p:
            break
        kept[i] = False
    return keep_where(kept, logits)


def min_p_filter(logits: Vector, p: float) -> Vector:
    """Keep tokens with at least p times the best one's probability.

    ValueError unless 0 <= p <= 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, not {p}")
    probabilities = softmax(logits)
    least = p * max(probabilities)
    return keep_where([value >= least for value in probabilities], logits)


def typical_filter(logits: Vector, p: float) -> Vector:
    """Keep tokens, those whose surprise is nearest to the entropy first, until p is reached.

    What ties with the last one stays too. ValueError unless 0 < p < 1.
    """
    if not 0 < p < 1:
        raise ValueError(f"typical_p must be above 0 and below 1, not {p}")
    probabilities = softmax(logits)
    surprises = [-value for value in log_softmax(logits)]
    mean = sum(value * surprise for value, surprise in zip(probabilities, surprises) if value)
    oddness = [abs(surprise - mean) for surprise in surprises]
    total = 0.0
    last = 0.0
    for i in sorted(range(len(logits)), key=lambda i: oddness[i]):
        total += probabilities[i]
        last = oddness[i]
        if total >= p:
            break
    return keep_where([odd <= last for odd in oddness], logits)


def keep_where(kept: Sequence[bool], logits: Vector) -> Vector:
    """Return logits, with -inf where not kept."""
    return [logit if stays else -math.inf for stays, logit in zip(kept, logits)]


def repetition_penalty(logits: Vector, tokens: Sequence[int], penalty: float) -> Vector:
    """Return logits / penalty, or below 0 logits · penalty, for tokens seen before.

    ValueError unless penalty is finite and above 0.
    """
    if not 0 < penalty < math.inf:
        raise ValueError(f"penalty must be above 0 (1 changes nothing), not {penalty}")
    penalised = list(logits)
    for token in set(tokens):
        if logits[token] < 0:
            penalised[token] = logits[token] * penalty
        else:
            penalised[token] = logits[token] / penalty
    return penalised


def distribution(
    logits: Vector,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
    temperature_last: bool = False,
) -> Vector:
    """Return the probabilities after the temperature and the filters that are not None, in order.

    temperature_last: the filters come before it, as in llama.cpp. ValueErrors as the filters.
    """
    if not temperature_last:
        logits = apply_temperature(logits, temperature)
    if top_k is not None:
        logits = top_k_filter(logits, top_k)
    if top_p is not None:
        logits = top_p_filter(logits, top_p)
    if min_p is not None:
        logits = min_p_filter(logits, min_p)
    if typical_p is not None:
        logits = typical_filter(logits, typical_p)
    if temperature_last:
        logits = apply_temperature(logits, temperature)
    return softmax(logits)


# 3. Sampling done right
#
# A sampler is right if its texts come as often as the model says:
#
#     P(x_1 … x_n) = Π_t p(x_t | x_1 … x_t-1)
#
# Counting how often each text comes is a weak test: 1,000 draws tell a share of 10% to about ±1
# point (√(0.1 · 0.9 / 1000)), and a small error hides in that.
#
# Enumerating is exact. A sampler's only randomness is draw(). Give draw() a source of chance that
# follows a script of choices, and that notes the choices it did not take. Run the sampler once per
# script, and add up the probabilities of the scripts that end in the same text. Two tosses of a
# coin that shows heads with 0.6 have four scripts:
#
#     HH 0.36   HT 0.24   TH 0.24   TT 0.16       "one head" has 0.24 + 0.24 = 0.48, exactly
#
# In production: torch.multinomial in transformers; vLLM draws as argmax(p / e) with e from the
# exponential distribution (v1/sample/ops/topk_topp_sampler.py), which is the same distribution and
# needs no sum. Measured by show_sampling().


def sample(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    rng: random.Random,
    eos: int | None = None,
    **settings: float | None,
) -> list[int]:
    """Return the new tokens, up to and including eos, drawn from distribution(logits, **settings).

    ValueErrors as for greedy(), and for a setting out of its range.
    """
    return extend_by(sampler(rng, **settings), logits_fn, prompt, max_new_tokens, eos)


def sampler(rng: random.Random, **settings: float | None) -> Choose:
    """Return a function that draws a token from distribution(logits, **settings)."""
    return lambda logits: draw(distribution(logits, **settings), rng)


def draw(p: Vector, rng: random.Random) -> int:
    """Return an index, i with probability p[i]. All randomness of the decoders is in here."""
    return rng.choices(range(len(p)), weights=p)[0]


class EveryBranch:
    """A source of chance for draw(), which calls its choices() as it would a random.Random's.

    It follows a script of choices, and then takes the first possible one each time.

    For two tosses of a coin, the script [] gives HH and leaves the scripts [T] and [H, T]; then [T]
    gives TH and leaves [T, T].
    """

    def __init__(self, script: Sequence[int]):
        self.script = script
        self.chosen: list[int] = []
        self.probability = 1.0
        self.left: list[list[int]] = []  # the scripts that it did not take

    def choices(self, population: Sequence[int], weights: Vector) -> list[int]:
        """Return the scripted choice, and multiply its probability in."""
        if len(self.chosen) < len(self.script):
            choice = self.script[len(self.chosen)]
        else:
            # Take the first, and note the scripts for the others.
            choice, *others = (i for i in population if weights[i] > 0)
            self.left += [self.chosen + [other] for other in others]
        self.chosen.append(choice)
        self.probability *= weights[choice] / sum(weights)
        return [choice]


def every_outcome(run: Callable[[EveryBranch], object]) -> dict[object, float]:
    """Return {outcome: its exact probability}: run(rng) is called for each way its draws fall."""
    outcomes: Counter[object] = Counter()
    scripts: list[list[int]] = [[]]
    while scripts:
        rng = EveryBranch(scripts.pop())
        outcomes[run(rng)] += rng.probability
        scripts += rng.left
    return dict(outcomes)


# 4. Beam search
#
# Instead of one text, keep the `width` best so far. Each step tries every next token on each of
# them, and keeps the best `width` of all these. A text that ends (eos) is set aside as finished. A
# text's probability is a product, so its log is a sum, which every further token lowers. To
# compare texts of different lengths:
#
#     score = Σ log p / length^length_penalty
#
# Penalty 0 is plain log-probability, which favours short texts; 1 is the mean per token; more
# favours long texts. (Scores under different penalties cannot be compared with each other.)
#
# Width 1 is greedy, and a beam that keeps everything is exhaustive search. In between, a beam
# usually finds likelier texts than greedy, for `width` times the work. It can also lose to greedy.
# Say "A" begins with 0.4, "B" with 0.35, "C" with 0.25. After "A", all three have about one third
# each ("A" 0.34). After "B", "A" and "B" have 0.49 each. Width is 2:
#
#     after one word      A 0.40     B 0.35      C 0.25 is dropped
#     after two words     B A 0.17   B B 0.17    A A 0.14 is dropped
#     after three words   B A A 0.06 …           after "B A" and "B B", all three are alike
#
# Greedy writes "A A A": after "A A", "A" has 0.98, which makes 0.13. The beam has dropped "A A" and
# cannot get it back.
#
# Likelier is not better, either. Stahlberg & Byrne searched exactly, and for more than half of
# their sentences the likeliest translation of all was the empty one. A weak search never found the
# bad texts that the model likes best. (Exact search here extends the likeliest text first. For most
# prompts this is cheap: the tiny Llama is sure of most tokens. A large model is less sure over
# longer texts, and the number of beginnings that are likelier than the best complete text grows
# without bound.)
#
# The texts in a beam tend to be nearly the same. Diverse beam search lets several beams take turns,
# and charges a token `diversity` for every beam that has just chosen this token.
#
# When to use it: where there is one right answer to find, as in translation or speech. For open
# text, sampling is used instead. In production: _beam_search in transformers' generation/utils.py,
# which keeps 2 · width candidates per step so that `width` go on even when some have ended. Ours
# goes on with fewer.
# Measured by show_beam().


class Candidate(NamedTuple):
    """A text that a search has reached: the prompt and the new tokens."""

    tokens: list[int]
    log_p: float  # of the new tokens, in sum


def beam_search(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    width: int,
    length_penalty: float = 1.0,
    eos: int | None = None,
    early_stopping: bool = False,
) -> list[tuple[list[int], float]]:
    """Return [(new tokens, score)], best first, at most `width`; unended texts count too.

    It stops early when `width` texts have ended and no running one can still beat the worst of
    them, however long it gets (transformers calls that early_stopping="never"; its False only looks
    at the present length). early_stopping=True stops as soon as `width` have ended. ValueError for
    width or max_new_tokens below 1, an empty prompt, or an eos outside the vocabulary.
    """
    check_request(prompt, max_new_tokens, width=width, at_least=1)

    def score(text: Candidate) -> float:
        return text.log_p / (len(text.tokens) - len(prompt)) ** length_penalty

    beams = [Candidate(list(prompt), 0.0)]
    finished: list[Candidate] = []
    for length in range(1, max_new_tokens + 1):
        best = extensions(logits_fn, beams, eos, width)
        finished += [text for text in best if text.tokens[-1] == eos]
        finished = sorted(finished, key=score, reverse=True)[:width]
        beams = [text for text in best if text.tokens[-1] != eos]
        if len(finished) == width:
            # The best that a running text can hope for: its sum stays as it is, and (with a penalty
            # above 0, where a greater length helps) it reaches the greatest length.
            longest = max_new_tokens if length_penalty > 0 else length
            hopes = [text.log_p / longest ** length_penalty for text in beams]
            if early_stopping or all(hope <= score(finished[-1]) for hope in hopes):
                beams = []
        if not beams:
            break
    ranked = sorted(finished + beams, key=score, reverse=True)[:width]
    return [(text.tokens[len(prompt):], score(text)) for text in ranked]


def extensions(
    logits_fn: LogitsFn, beams: Sequence[Candidate], eos: int | None = None, keep: int | None = None
) -> list[Candidate]:
    """Return every beam with every next token, best first; only the best `keep`, if given.

    ValueError for an eos outside the vocabulary.
    """
    found = []
    for beam in beams:
        gains = log_softmax(logits_fn(beam.tokens))
        check_eos(eos, len(gains))
        for token, gain in enumerate(gains):
            if gain > -math.inf:
                found.append(Candidate([*beam.tokens, token], beam.log_p + gain))
    return sorted(found, key=lambda text: text.log_p, reverse=True)[:keep]


def diverse_beam_search(
    logits_fn: LogitsFn,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    groups: int,
    diversity: float,
) -> list[tuple[list[int], float]]:
    """Return [(new tokens, log-probability)] of `groups` beams of width 1, in their order.

    A token costs `diversity` for each earlier beam that took it at this step (Hamming diversity).
    ValueError where check_request() says so: no prompt, less than 0 new tokens, groups below 1.
    """
    check_request(prompt, max_new_tokens, groups=groups, at_least=1)
    beams = [Candidate(list(prompt), 0.0)] * groups
    for _ in range(max_new_tokens):
        taken: Counter[int] = Counter()
        for g, beam in enumerate(beams):
            longer = extensions(logits_fn, [beam])
            beams[g] = max(longer, key=lambda c: c.log_p - diversity * taken[c.tokens[-1]])
            taken[beams[g].tokens[-1]] += 1
    return [(beam.tokens[len(prompt):], beam.log_p) for beam in beams]


def exact_search(
    logits_fn: LogitsFn, prompt: Sequence[int], max_new_tokens: int, *, eos: int, max_passes: int
) -> tuple[list[int], float] | None:
    """Return the likeliest of all texts that end with eos or at full length.

    Always extend the likeliest text so far. No token raises a probability, so the first complete
    text that comes up is the best. Return None if none comes up in max_passes.
    """
    queue: list[tuple[float, list[int]]] = [(0.0, list(prompt))]
    passes = 0
    while queue:
        cost, tokens = heapq.heappop(queue)
        length = len(tokens) - len(prompt)
        ended = length > 0 and tokens[-1] == eos
        if ended or length == max_new_tokens:
            return tokens[len(prompt):], -cost
        if passes == max_passes:
            return None
        passes += 1
        for longer, log_p in extensions(logits_fn, [Candidate(tokens, -cost)]):
            heapq.heappush(queue, (-log_p, longer))
    return None


# 5. Speculative decoding
#
# One pass of a large model over five tokens takes about as long as over one, because the time goes
# into reading the weights. So let a small draft model guess γ tokens, and have the target score
# them all in one pass. Keep the guesses before the first wrong one. After these the target's own
# token comes for free, from the logits after the last guess kept.
#
# Greedy: a guess is right if it is the target's argmax. The text is the target's, token for token.
#
# Sampling: a guess x, drawn from the draft's distribution q, is kept or not by chance, so that the
# target's distribution p stays exactly as it was:
#
#     keep x with probability   min(1, p(x) / q(x))
#     otherwise draw from       max(0, p - q), normalized: where p is above q
#
# For two tokens A and B, where the draft guesses A too often:
#
#     token    p     q    kept, if guessed     max(0, p - q), normalized
#     A       0.6   0.8   0.6 / 0.8 = 0.75     0
#     B       0.4   0.2   1                    1: a rejected A turns into B
#
#     A comes with 0.8 · 0.75              = 0.6
#     B comes with 0.2 · 1 + 0.8 · 0.25    = 0.4
#
# Why one token is right: token y comes either guessed and kept, or in place of a rejected guess.
#
#     P(y) = q(y)·min(1, p(y)/q(y)) + P(rejected) · max(0, p(y) - q(y)) / Σ max(0, p - q)
#
# The first term is min(p, q). As min(p, q) + max(0, p - q) is p, and p sums to 1, P(rejected) is
# 1 - Σ min(p, q) = Σ max(0, p - q), so the second term is max(0, p(y) - q(y)). Together they are
# p(y).
#
# Why the whole text is right, by induction: say the text so far has the target's distribution. The
# next token is drawn with fresh random numbers, so what was kept or rejected before cannot change
# its distribution. If there is a guess for the next place, it was drawn from q after exactly this
# text, and the rule makes the token's distribution p. If there is none, the token is drawn from p.
# Guesses behind a wrong one are thrown away, since they continue another text. So the longer text
# has the target's distribution too. (The trace enumerates all texts of small models, which checks
# the code; the proof is this paragraph.)
#
# The rule is right for any q, if the guess was drawn from that same q. To guess the draft's argmax
# and judge this guess by softmax q is a common bug, and the output is biased.
#
# A guess that was not drawn is judged as if q were 1 at the guess and 0 elsewhere (a point mass).
# The rule then says: keep x with p(x), otherwise draw from p without x. With the guess A:
#
#     token    p     q    kept, if guessed     max(0, p - q), normalized
#     A       0.6    1    0.6 / 1 = 0.6        0
#     B       0.4    0    is not guessed       1
#
# A comes with 0.6 and B with 0.4, their p again. Simpler, with the same result: draw a token from
# p; if the guess is this token, it counts as kept. (It would be right for guesses drawn from q as
# well, but keeps fewer of them than the rule: Σ p · q instead of Σ min(p, q).) That is verify(). It
# takes any way to choose, argmax or sampler(…), so all decoders from here on work for both.
#
# If eos stands among the kept guesses, the text ends there and what was kept behind it is cut off.
# Temperature and top-p go into p, which is the distribution wanted, and into q as well, so that the
# two agree more often. (On a GPU, a pass over five tokens may round differently from a pass over
# one.)
#
# In production: vllm/v1/sample/rejection_sampler.py; its NO_DRAFT_PROBS is the point mass.
# transformers: _speculative_sampling in generation/utils.py. Measured by show_speculative().


@dataclass
class Counts:
    """What a speculative run did: for each pass, the guesses and how many of them were kept."""

    rounds: list[tuple[list[int], int]] = field(default_factory=list)

    @property
    def target_passes(self) -> int:
        """Passes of the target."""
        return len(self.rounds)

    @property
    def drafted(self) -> int:
        """Guesses made (the papers' word)."""
        return sum(len(guesses) for guesses, _ in self.rounds)

    @property
    def accepted(self) -> int:
        """Guesses kept (theirs as well)."""
        return sum(kept for _, kept in self.rounds)


def in_rounds(
    one_round: Callable[[list[int], int], tuple[list[int], list[int]]],
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: int | None,
    **settings: int,
) -> tuple[list[int], Counts]:
    """Return the new tokens and Counts of a decoder that guesses and verifies, round by round.

    one_round(tokens, n) runs one pass; n: how many guesses can still be used. It returns its
    guesses, and the tokens found: the guesses that were right, and then the target's own token.
    settings: of the decoder; each must be at least 1. ValueError if one is not, and for an empty
    prompt or max_new_tokens below 0.
    """
    check_request(prompt, max_new_tokens, **settings)
    text: list[int] = []
    counts = Counts()
    while len(text) < max_new_tokens and text[-1:] != [eos]:
        guesses, found = one_round([*prompt, *text], max_new_tokens - len(text) - 1)
        new = found[:max_new_tokens - len(text)]
        if eos in new:
            new = new[:new.index(eos) + 1]  # what was kept behind the end is cut off
        text += new
        # found is the kept guesses and the target's own token: of 5 6 7, two were guesses. If it
        # was cut to 5 (by eos, or where lookahead guessed too many), only one guess is kept.
        counts.rounds.append((guesses, min(len(found) - 1, len(new))))
    return text, counts


def speculative_greedy(
    target_fn: LogitsFn,
    draft_fn: LogitsFn,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    gamma: int,
    eos: int | None = None,
) -> tuple[list[int], Counts]:
    """Return (greedy(target_fn, …), Counts); greedy(draft_fn, …) guesses `gamma` tokens at a time.

    ValueErrors as for speculate().
    """
    guess = partial(greedy, draft_fn)
    return speculate(target_fn, guess, prompt, max_new_tokens, gamma=gamma, eos=eos)


def speculate(
    target_fn: LogitsFn,
    guess: Callable[[list[int], int], list[int]],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    gamma: int,
    eos: int | None = None,
    choose: Choose = argmax,
) -> tuple[list[int], Counts]:
    """Return the tokens that choose() alone would give, and Counts, whoever guesses.

    guess(tokens, n) returns up to n tokens that may follow. A pass gets at most gamma guesses, and
    at most (tokens still wanted - 1), since the target adds one itself. ValueErrors as for
    in_rounds(), and for an eos outside the vocabulary.
    """
    def one_round(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
        guesses = guess(tokens, min(gamma, room))
        rows = last_rows(target_fn, tokens + guesses, len(guesses) + 1)
        check_eos(eos, len(rows[0]))
        return guesses, verify(rows, guesses, choose)

    return in_rounds(one_round, prompt, max_new_tokens, eos, gamma=gamma)


def verify(rows: Matrix, guesses: Sequence[int], choose: Choose = argmax) -> list[int]:
    """Return the target's own tokens, as far as the guesses foresaw them, and one more.

    rows: logits before the first guess, and after each of them.
    """
    found = []
    for i, row in enumerate(rows):
        found.append(choose(row))
        if i == len(guesses) or found[i] != guesses[i]:
            break  # the rows behind a wrong guess belong to another text
    return found


def speculative_sample(
    target_fn: LogitsFn,
    draft_fn: LogitsFn,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    gamma: int,
    rng: random.Random,
    eos: int | None = None,
    choose_guess: Callable[[Vector, random.Random], int] = draw,
    **settings: float | None,
) -> tuple[list[int], Counts]:
    """Return (tokens distributed as those of sample(target_fn, …, **settings), Counts).

    choose_guess picks a guess from q; anything but draw() is a mistake, and section 5 makes it.
    ValueErrors as for speculate() and sample(), and if the two vocabularies differ in size.
    """
    shape = partial(distribution, **settings)

    def one_round(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
        guesses: list[int] = []
        q = []
        for _ in range(min(gamma, room)):
            q.append(shape(draft_fn(tokens + guesses)))
            guesses.append(choose_guess(q[-1], rng))
        rows = last_rows(target_fn, tokens + guesses, len(guesses) + 1)
        check_eos(eos, len(rows[0]))
        p = [shape(row) for row in rows]
        return guesses, accept_or_replace(p, q, guesses, rng)

    return in_rounds(one_round, prompt, max_new_tokens, eos, gamma=gamma)


def accept_or_replace(
    p: Matrix, q: Matrix, guesses: Sequence[int], rng: random.Random
) -> list[int]:
    """Return the guesses kept by the rule, and one more token; p has one row more than q."""
    for i, token in enumerate(guesses):
        keep = acceptance(p[i], q[i])[token]
        rejected = draw([keep, 1 - keep], rng) == 1
        if rejected:
            return [*guesses[:i], draw(residual(p[i], q[i]), rng)]
    return [*guesses, draw(p[len(guesses)], rng)]


def acceptance(p: Vector, q: Vector) -> Vector:
    """Return, for each token, the probability that it is kept if guessed: min(1, p / q).

    ValueError unless p and q have as many tokens.
    """
    if len(p) != len(q):
        raise ValueError(f"target and draft must have the same vocabulary, not {len(p)} and "
                         f"{len(q)} tokens")
    return [min(1.0, a / b) if b else 1.0 for a, b in zip(p, q)]


def residual(p: Vector, q: Vector) -> Vector:
    """Return what replaces a rejected guess: max(0, p - q), normalized.

    If p = q, no guess is rejected, and this returns p.
    """
    rest = [max(0.0, a - b) for a, b in zip(p, q)]
    total = sum(rest)
    return [value / total for value in rest] if total else p


def last_rows(logits_fn: LogitsFn, tokens: Sequence[int], n: int) -> Matrix:
    """Return logits after each of the last n prefixes of tokens, [n][vocab_size].

    In one pass, if the model has a method for it.
    """
    if hasattr(logits_fn, "last_rows"):
        return logits_fn.last_rows(tokens, n)
    return [logits_fn(tokens[:end]) for end in range(len(tokens) - n + 1, len(tokens) + 1)]


# 6. When it pays
#
# A guess is kept with probability Σ_x q(x)·min(1, p(x)/q(x)) = Σ min(p, q), which differs from
# place to place. Call its mean α. If all places were alike and independent, then
#
#     tokens per pass = 1 + α + α² + … + α^γ
#
# since the i-th guess counts only if all before it were kept. If a pass of the draft costs c passes
# of the target, a round of γ guesses and one check costs γc + 1:
#
#     speed-up = tokens per pass / (γc + 1)
#
# With α = 0.6 and γ = 2 a pass gives 1 + 0.6 + 0.36 = 1.96 tokens. At c = 0.1 the round costs 1.2
# and the speed-up is 1.63. At c = 0.5 the round costs 2, and nothing is won.
#
# This counts the target's pass over γ + 1 tokens as one pass over one token. That is true while
# reading the weights takes the time, as at small batches. A busy server computes all the time, has
# nothing to spend on guesses, and gains little or loses.
#
# In production: vLLM reports these counts (v1/spec_decode/metrics.py). transformers' assisted
# generation stops guessing where the draft is unsure, and can raise and lower γ as guesses are kept
# or not. Measured by show_when_it_pays().


def expected_tokens(alpha: float, gamma: int) -> float:
    """Return the mean tokens per pass if each guess is kept with probability alpha."""
    return sum(alpha ** i for i in range(gamma + 1))


def speed_up(tokens_per_pass: float, gamma: int, cost: float) -> float:
    """Return how many times faster than one token per pass, if a guess costs `cost` passes."""
    return tokens_per_pass / (gamma * cost + 1)


# 7. Prompt lookup: guesses for nothing
#
# Guesses need no model. Text repeats itself: prompt lookup (Saxena 2023) finds the last few tokens
# earlier in the text, and guesses what came after them there. It reads no weights. It pays for
# summaries, edits and code, which copy a lot, and brings nothing for text that says new things.
# Counts of which token followed which in a large corpus (n-grams) serve in the same way.
#
# These guesses are single tokens without a distribution, so speculate() judges them by the point
# mass of section 5. In production: vLLM's v1/spec_decode/ngram_proposer.py (which takes the
# earliest place where the tokens came, and ours the latest), transformers'
# PromptLookupCandidateGenerator, llama.cpp's examples/lookup. Measured by show_prompt_lookup().


def prompt_lookup(tokens: Sequence[int], n: int, max_ngram: int = 3) -> list[int]:
    """Return up to n tokens that followed the last max_ngram tokens when they last came.

    If those never came before, the last max_ngram - 1 are looked for, and so on; [] if none came.
    """
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start:start + size] == tokens[-size:]:
                return list(tokens[start + size:start + size + n])
    return []


# 8. Medusa, and how a tree is verified
#
# Drop the draft model: the target's last hidden state h already knows something about the tokens
# after the next one. Put extra heads on h, and train them while the target stays frozen. After x_t,
# the model gives x_t+1, head 1 guesses x_t+2, and head 2 x_t+3:
#
#     h_t → x_t+1             the target itself: output · h
#     h_t → x_t+2, x_t+3      head 1 and head 2: logits_k = w2_k (h + silu(w1_k h))
#
# w1 starts at 0 and w2 at the target's own output matrix: a head begins with the target's own
# logits. When the heads guess, the target has just chosen x_t+1 from h_t, but the heads do not see
# which token this was.
#
# The best few of each head form a tree, which is verified in one pass. Every node is a token. Its
# position is its place in its own text, and it sees the text before the tree and its own ancestors,
# but no other branch. Say the target has read "This is" (positions 0 and 1) and chosen "the", which
# is node 0. Nodes 1 to 3 are guesses. A row shows which nodes its node sees (1: seen):
#
#                                                      node
#     node         text that ends there    position    0 1 2 3
#     0  the       This is the                2        1 . . .
#     1  cow       This is the cow            3        1 1 . .
#     2  that      This is the cow that       4        1 1 1 .
#     3  cat       This is the cat            3        1 . . 1
#
# So node i sees node j if the text of i begins with the text of j. tree_mask() says where, and
# CachedModel.read() uses it. From node 0, follow the target's own choices as long as the tree has
# them. The first choice that the tree does not have is the free token. The keys and values of the
# other branches leave the cache.
#
# What a pass costs: a tree of ten nodes is ten tokens of arithmetic, and most of them are rolled
# back. As long as reading weights takes the time, a text of n tokens has
#
#     speed-up = n / (passes + c · runs)
#
# c is what one run of a head (or of a draft) costs, in passes of the target. Two heads are two runs
# per pass, for a chain and for a tree. Where arithmetic takes the time, on a busy server, the nodes
# read per token are the price instead.
#
# In production: vLLM's v1/spec_decode/medusa.py verifies a chain; Medusa's own code picks a sparse
# tree of the likeliest paths, and has a looser "typical acceptance" that changes the output and is
# left out here. Measured by show_medusa().

Head = dict[str, Matrix]


def better_state(h: Matrix, x: Matrix, head: Head) -> Matrix:
    """Return h + silu(w1 x): h [n][dim] plus a correction computed from x [n][…]."""
    return add(h, silu(linear(x, head["w1"])))


def medusa_head(h: Matrix, head: Head) -> Matrix:
    """Return logits of the token that this head is for: [n][dim] -> [n][vocab_size]."""
    return linear(better_state(h, h, head), head["w2"])


def silu(x: Matrix) -> Matrix:
    """Return x · sigmoid(x) = x / (1 + exp(-x)), element by element."""
    return [[value * sigmoid(value) for value in row] for row in x]


def medusa_paths(
    target: CachedModel, heads: Sequence[Head], tops: Sequence[int], tokens: Sequence[int]
) -> list[tuple[int, ...]]:
    """Return every way to go on with one of head 1's tops[0] best, one of head 2's tops[1] …

    The target chose the last token from the hidden state before it; the heads read that state. In
    the first round the target may have read nothing: then there is no state and no path.
    """
    h = target.hidden_state(tokens[:-1])
    if h is None:
        return []
    best = [likeliest(medusa_head([h], head)[0], top) for head, top in zip(heads, tops)]
    return list(itertools.product(*best))


def tree_mask(
    nodes: Sequence[tuple[int, ...]], keys: Sequence[tuple[int, ...]]
) -> list[list[bool]]:
    """Return mask[i][j]: does the text of node i begin with the text of key j?"""
    return [[node[:len(key)] == key for key in keys] for node in nodes]


def verify_tree(
    target: CachedModel,
    tokens: Sequence[int],
    paths: Sequence[Sequence[int]],
    choose: Choose = argmax,
) -> tuple[list[int], list[int], dict[tuple[int, ...], Vector]]:
    """Read the tree of these paths in one pass, and follow the target's own choices in it.

    Return the guess at every node but node 0, which is the last of tokens; the target's tokens, as
    far as a path foresaw them, and one more; and {text: logits after it} of all nodes.
    """
    text = tuple(tokens)
    # {text: logits} of the text, of every node, and of all their prefixes
    rows = target.read([text, *((*text, *path) for path in paths)])
    guesses = [node[-1] for node in rows if len(node) > len(tokens)]
    while text in rows:
        text = (*text, choose(rows[text]))
    return guesses, list(text[len(tokens):]), rows


def medusa_decode(
    target: CachedModel,
    heads: Sequence[Head],
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    tops: Sequence[int] = (3, 2),
    eos: int | None = None,
    choose: Choose = argmax,
) -> tuple[list[int], Counts]:
    """Return the tokens that choose() alone would give, and Counts.

    The guesses of a round are all nodes of its tree but the first.
    """
    def one_round(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
        paths = medusa_paths(target, heads[:room], tops, tokens)  # no guess past the end
        guesses, found, _ = verify_tree(target, tokens, paths, choose)
        return guesses, found

    return in_rounds(one_round, prompt, max_new_tokens, eos)


# 9. EAGLE
#
# Medusa's heads do not know the token before the one that they guess. EAGLE guesses the next
# *hidden state*, from the last one and the embedding e of the token that was chosen there. An
# output matrix turns the state into a token, and so on along a chain:
#
#     f_t+1 = f_t + silu(w1 [f_t ; e(x_t+1)])        x_t+2 = argmax(w2 · f_t+1), and again
#
# f_t is the target's own state h_t at first, and a guessed state from then on.
#
# Beside Medusa, on one timeline: from h_t, the target has chosen x_t+1. Medusa's head 1 guesses
# x_t+2 from h_t alone. EAGLE guesses it from h_t and x_t+1, and is right more often. For x_t+3
# Medusa has a second head, trained for that place. EAGLE applies its one head again, to the state
# f_t+1 that it has just guessed. The head learned on the target's states and not on guessed ones,
# and its second guess is right less often than Medusa's.
#
# Here w1 and w2 start and learn as Medusa's do, by the tokens alone: nothing asks that the guessed
# state is like the target's, only that w2 makes the right token of it. The first EAGLE has a whole
# decoder layer with attention over all states so far, keeps the target's output matrix, learns the
# states as well as the tokens (Smooth L1, with noise on the states), and guesses a tree. EAGLE-3
# learns the tokens alone, from states of several layers, and on its own guesses: so it knows what
# it will read at the second guess. Multi-token prediction (DeepSeek-V3) trains such a layer
# together with the model.
#
# In production: vLLM's v1/spec_decode/eagle.py. Measured by show_eagle().


def eagle_step(f: Matrix, embeddings: Matrix, head: Head) -> Matrix:
    """Return the next hidden states [n][dim], from the last ones and the embeddings [n][dim]."""
    return better_state(f, concat(f, embeddings), head)


def eagle_guesses(target: CachedModel, head: Head, tokens: list[int], n: int) -> list[int]:
    """Return up to n guesses for speculate(), none before the target has read anything."""
    guesses: list[int] = []
    f = target.hidden_state(tokens[:-1])
    embeddings = target.llama.weights["tok_embeddings"]
    while f is not None and len(guesses) < n:
        last = (tokens + guesses)[-1]
        [f] = eagle_step([f], [embeddings[last]], head)
        guesses.append(argmax(linear([f], head["w2"])[0]))
    return guesses


# 10. Lookahead decoding
#
# Greedy text solves equations: x_t = argmax logits(x_1 … x_t-1) for every t. Jacobi decoding
# (Santilli et al.) guesses all x_t, lets one pass renew them all at once, and repeats that, as
# Jacobi did for linear equations. Each pass makes one more token right, or with luck several. But
# mostly a good token appears in the wrong place, and is overwritten in the next pass.
#
# Lookahead decoding keeps what appears. Beside the text it has a window: two rows of guesses, each
# renewed by the pass before. With a window of 3, before a pass and after it:
#
#     row 1    rat    cat      dog        the tokens guessed for the next places
#     row 2    that   that     that       what the target put after each of them, one pass ago
#     new      ate    killed   worried    what it puts now after "rat that", after "rat cat that",
#                                         and after "rat cat dog that"
#
# Read a column downwards: "that" was the target's choice after "rat", and "ate" its choice after
# "that". So "rat that ate" is a piece of text (an n-gram) that the target itself put together, if
# for another place. It goes into a pool, and so do "cat that killed" and "dog that worried". Then
# row 1 is dropped: row 2 becomes row 1, and the new tokens row 2. When the text ends in "rat" some
# time later, "that ate" is guessed, and verified in the same pass as a branch of a tree. (Here the
# window is verified as well, since it is in the pass anyway; in the paper it only feeds the pool.)
#
# There is no draft and no training, but more arithmetic. In production: Fu et al.'s own code and
# llama.cpp's examples/lookahead. Measured by show_lookahead().


def lookahead_decode(
    target: CachedModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    window: int = 5,
    ngram: int = 3,
    verified: int = 4,
    eos: int | None = None,
    choose: Choose = argmax,
) -> tuple[list[int], Counts]:
    """Return the tokens that choose() alone would give, and Counts.

    Every row begins as the first `window` tokens of the prompt, which is repeated if too short. Of
    the pool's n-grams that begin with the text's last token, the latest `verified` are guessed. The
    guesses of a round are all nodes of its tree but the first. ValueError where check_request()
    says so: no prompt, less than 0 new tokens, or a setting below its least.
    """
    check_request(prompt, max_new_tokens, window=window, ngram=ngram, verified=verified)
    pool: list[tuple[int, ...]] = []  # the latest n-grams last
    rows = [[prompt[j % len(prompt)] for j in range(window)]] * (ngram - 1)

    def one_round(tokens: list[int], room: int) -> tuple[list[int], list[int]]:
        # Row 1 is a chain after the text; under each of its tokens hangs the rest of its column.
        # As above: rat that, rat cat that, rat cat dog that.
        columns = [(*rows[0][:j], *column) for j, column in enumerate(zip(*rows))]
        grams = [gram[1:] for gram in pool if gram[0] == tokens[-1]][-verified:]
        guesses, found, logits = verify_tree(target, tokens, columns + grams, choose)
        # The window is always greedy; only the text uses choose().
        renewed = [argmax(logits[*tokens, *column]) for column in columns]
        for gram in zip(*rows, renewed):
            if gram in pool:
                pool.remove(gram)
            pool.append(gram)
        rows[:] = [*rows[1:], renewed]
        return guesses, found

    return in_rounds(one_round, prompt, max_new_tokens, eos)


# 11. Text with a shape
#
# Output that a program must read (JSON, a date, one of three answers) can be forced into shape. An
# automaton reads what was written so far, and every token that it could not read next gets -inf.
# Here the shape is a grammar. A rule is a list of choices, (string, the rule that comes after it),
# and None is the end. So the texts " cat that" and " cow that" are
#
#     {"animal": [(" cat", "that"), (" cow", "that")], "that": [(" that", None)]}
#
# A rule may come after itself: the regular expression (ab)*c is {"s": [("ab", "s"), ("c", None)]}.
# So a grammar can say what a regular expression can, but its strings must not be empty. A state is
# (what is left of a string, the rule after it): after " c" the automaton is in two states at once,
# ("at", "that") and ("ow", "that").
#
# The mask is local, and that distorts. Z_t is the probability that the model gave to the allowed
# tokens at step t, and the mask divides by Z_t:
#
#     P_local(text) = Π (p(x_t) / Z_t)              what masking gives
#     P(text | it fits) = P(text) / P(fits)         what asking the model for fitting text would be
#
# Say two texts fit. "cat that" begins with 0.1 and goes on with 0.9. "cow that" begins with 0.1
# too, but the model then wants "with", and leaves 0.001 for "that". Given that a text fits, it is
# "cat that" with 0.09 / (0.09 + 0.0001) = 99.9%. Under the mask both have one half: at the first
# word, the mask cannot see that the second will be forced against the model's will.
#
# In production: XGrammar and llguidance, in vLLM as v1/structured_output/backend_xgrammar.py and
# backend_guidance.py, and llama.cpp's GBNF grammars. All three read nested shapes, as JSON has
# them, and mask locally. XGrammar works out most of its masks beforehand, llguidance computes each
# at its step, and llama.cpp runs the candidates through the grammar as it samples.
# Measured by show_constrained().

Grammar = dict[str, list[tuple[str, str | None]]]  # a text starts with the first rule
States = frozenset[tuple[str, str | None]]


def follow(grammar: Grammar, states: States, text: str) -> States:
    """Return the states after reading text in any of these; none if it does not fit."""
    for character in text:
        after = set()
        for left, rule in states:
            # ("at", rule): read this rest first. ("", rule): the rule comes next, and ("", None)
            # is the end of the text, which has no choices.
            choices = [(left, rule)] if left else grammar.get(rule, [])
            for string, next_rule in choices:
                if string[0] == character:
                    after.add((string[1:], next_rule))
        states = frozenset(after)
    return states


def constrain(
    logits_fn: LogitsFn, vocab: Sequence[str], grammar: Grammar, prompt_length: int, eos: int
) -> LogitsFn:
    """Return logits_fn with -inf wherever the text after the prompt could no longer fit.

    eos is allowed only where the text may end.
    """
    start = frozenset({("", next(iter(grammar)))})

    @cache  # the tokens that a state allows never change
    def allowed(states: States) -> list[bool]:
        fits = [bool(follow(grammar, states, text)) for text in vocab]
        fits[eos] = ("", None) in states
        return fits

    def masked(tokens: Sequence[int]) -> Vector:
        written = "".join(vocab[token] for token in tokens[prompt_length:])
        return keep_where(allowed(follow(grammar, start, written)), logits_fn(tokens))

    return masked


# =============================================================================================
# THE EXPERIMENTS: what the trace shows, and how it is measured
# =============================================================================================

# 1. Greedy

# A toy language is a table: the probabilities of the next word, after the words so far. After any
# words that are not in the table, all words are alike. The words are A, B, C, with ids 0, 1, 2.
ToyLanguage = dict[tuple[int, ...], Vector]
TOY: ToyLanguage = {  # toy 1, in which greedy loses
    (): [0.5, 0.4, 0.1],
    (0,): [0.4, 0.35, 0.25],
    (1,): [0.05, 0.05, 0.9],
    (2,): [0.2, 0.6, 0.2],
}
TOY_PROMPT = [0]  # any one token: the words come after it


def model_of(language: ToyLanguage) -> LogitsFn:
    """Return a model that speaks a toy language."""
    alike = [1 / len(language[()])] * len(language[()])
    return lambda tokens: [math.log(p) for p in language.get(tuple(tokens[1:]), alike)]


def toy_texts() -> dict[str, float]:
    """Return {text: its probability} of all texts of two words of toy 1."""
    texts = {}
    for a, b in itertools.product(range(3), repeat=2):
        texts[letters((a, b))] = TOY[()][a] * TOY[a,][b]
    return texts


def show_greedy(trace: Trace, knobs: Namespace) -> None:
    """Show toy 1, where greedy loses, and what two models write."""
    lab = knobs.lab
    toy = toy_texts()
    best = max(toy, key=toy.get)
    by_greedy = letters(greedy(model_of(TOY), TOY_PROMPT, 2))
    marks = {best: "← best", by_greedy: "← greedy"}
    trace.say("Greedy takes the likeliest next token each time, and so sees one step ahead. Toy 1 "
              "is a language of three words, A, B and C. Of all its texts of two words, the best "
              "does not begin with the best first word:")
    trace.ask("A begins with 0.5, B with 0.4, C with 0.1. After A they have 0.4, 0.35, 0.25; after "
              "B 0.05, 0.05, 0.9; after C 0.2, 0.6, 0.2. How probable is the best text?", toy[best])
    trace.table([{"text": text, "p": p, "mark": marks.get(text)} for text, p in toy.items()],
                {"text": "", "p": ".3f bar 20", "mark as  ": ""})

    trace.say("Now a tiny Llama, the target of this chapter, and a smaller one. They have read "
              f"{lab.steps * STEP_TOKENS:,} and {lab.draft_steps * STEP_TOKENS:,} tokens of The "
              "House That Jack Built, and nothing else. Their greedy texts (a slash is a line "
              "end):")
    right = []
    for name, model in (("target", lab.reader), ("small", CachedModel(lab.draft))):
        tokens = greedy(model, knobs.tokens, knobs.max_new_tokens)
        trace.lines(quoted(f"{name}: " + lab.tokenizer.decode([*knobs.tokens, *tokens])))
        right.append(is_greedy(model.llama, knobs.tokens, tokens))
    trace.check("toy 1: greedy writes A A, and the best text is B C; of equals, argmax takes the "
                "first", by_greedy == "A A" and best == "B C" and argmax([1.0, 2.0, 2.0]) == 1,
                f"probabilities {toy['A A']:.2f} and {toy[best]:.2f}")
    trace.check("every token is the argmax of one pass over the whole text, without a cache",
                all(right), "the texts of both models")


# 2. Shaping the distribution


def filters_of(knobs: Namespace) -> dict[str, dict[str, float]]:
    """Return {name: setting of distribution()} of the four filters."""
    return {
        f"top-k {knobs.top_k}": {"top_k": knobs.top_k},
        f"top-p {knobs.top_p:g}": {"top_p": knobs.top_p},
        f"min-p {knobs.min_p:g}": {"min_p": knobs.min_p},
        f"typical {TYPICAL_P:g}": {"typical_p": TYPICAL_P},
    }


def heated(knobs: Namespace) -> dict[str, dict[str, float]]:
    """Return {name: setting} of top-p and min-p after a high temperature."""
    return {
        f"t 5, then top-p {knobs.top_p:g}": {"temperature": 5.0, "top_p": knobs.top_p},
        f"t 5, then min-p {knobs.min_p:g}": {"temperature": 5.0, "min_p": knobs.min_p},
    }


def compare_shapes(
    lab: DecodingLab, tokens: list[int], settings: dict[str, dict[str, float]], n: int
) -> list[dict]:
    """Return the n likeliest next tokens, and their probability with each setting."""
    logits = lab.target.forward(tokens)[-1]
    shaped = {name: distribution(logits, **setting) for name, setting in settings.items()}
    return [{"token": lab.name(i)} | {name: p[i] for name, p in shaped.items()}
            for i in likeliest(logits, n)]


class Kept(NamedTuple):
    """How many tokens a setting keeps, over many places of a text."""

    setting: str
    fewest: int
    mean: float
    most: int
    best_dropped: int  # places where the likeliest token is removed


def count_kept(rows: Matrix, settings: dict[str, dict[str, float]]) -> list[Kept]:
    """Return, for each setting of distribution(), what it keeps of each row of logits."""
    found = []
    for name, setting in settings.items():
        shaped = [distribution(row, **setting) for row in rows]
        counts = [count_survivors(p) for p in shaped]
        best_dropped = sum(p[argmax(row)] == 0 for row, p in zip(rows, shaped))
        found.append(Kept(name, min(counts), fmean(counts), max(counts), best_dropped))
    return found


def show_filters(trace: Trace, knobs: Namespace) -> None:
    """Show what each filter keeps of one distribution, and at many places of the rhyme."""
    lab = knobs.lab
    shaped = {"t 0.5": {"temperature": 0.5}, "t 2": {"temperature": 2.0}} | filters_of(knobs)
    shapes = compare_shapes(lab, knobs.tokens, {"as is": {}} | shaped, 9)
    most = max(max(row[name] for name in shaped) for row in shapes)
    trace.say("A filter removes unlikely tokens before one is drawn. Top-k keeps the k likeliest; "
              "top-p the shortest list of best tokens that has probability p together; min-p "
              "those with at least min-p times the best one's probability. Typical keeps those "
              "whose surprise, -log p, is nearest to the expected surprise (the entropy), until "
              f"they have probability {TYPICAL_P:g} together. A temperature t below 1 sharpens the "
              "distribution, and above 1 flattens it.")
    trace.say(f"What may follow {lab.tail(knobs.tokens)!r}, the {len(shapes)} likeliest tokens:")
    trace.table(shapes, {"token": "", "as is": f".3f bar 6 of {most}"}
                | dict.fromkeys(shaped, f"bar 7 of {most}"))
    trace.note("·: too unlikely for a bar. Empty: the filter has removed the token.")
    show_kept(trace, knobs)
    check_filters(trace)


def show_kept(trace: Trace, knobs: Namespace) -> None:
    """Show how many tokens each filter keeps at many places of the rhyme."""
    lab = knobs.lab
    rows = lab.target.forward(lab.ids[-FILTER_PLACES:])
    kept = count_kept(rows, filters_of(knobs) | heated(knobs))
    top_k, top_p, min_p, typical, hot_top_p, hot_min_p = kept
    trace.ask(f"Over {len(rows)} places of the rhyme, how many tokens does {top_p.setting} keep "
              "where it keeps fewest?", top_p.fewest)
    trace.say(f"Tokens kept, over the last {len(rows)} places of the rhyme:")
    trace.table(kept, {"setting": "", "fewest": "d", "mean": ".1f", "most": "d",
                       "best_dropped as places where the best is removed": "d"})
    trace.say(f"Top-k keeps {top_k.fewest} even where the model is sure; top-p keeps from "
              f"{top_p.fewest} to {top_p.most}. Typical removes even the likeliest token where its "
              f"surprise is too far below the mean surprise, at {typical.best_dropped} places. A "
              "high temperature before the filter, as in transformers, flattens what top-p and "
              f"min-p choose from. They keep {hot_top_p.mean:.0f} and {hot_min_p.mean:.0f} of "
              f"{VOCAB_SIZE} tokens on average then, and {top_p.mean:.1f} and {min_p.mean:.1f} "
              "where the temperature comes after the filter, as in llama.cpp.")
    trace.say("One model proves little. On 20 models, of seeds 0 to 19 at the default settings "
              f"(this page shows seed {lab.seed}), top-p kept 4.4 to 9.1 tokens on average, and "
              "min-p 2.9 to 4.3. After t 5 they kept 135 to 137, and 131 to 152.")


def check_filters(trace: Trace) -> None:
    """Check the filters, the temperature and the penalty by hand."""
    tail = [0.4, 0.15, 0.15, 0.15, 0.15]
    three = [0.76, 0.19, 0.05]
    cases = [  # probabilities, a setting, and how many of the tokens it keeps
        (tail, {"top_k": 1}, 1),
        (tail, {"top_k": 2}, 5),
        (tail, {"top_p": 0.5}, 2),
        (tail, {"top_p": 0.9}, 5),
        (tail, {"min_p": 0.5}, 1),
        (tail, {"typical_p": 0.5}, 4),
        ([0.25] * 4, {"top_p": 0.5}, 2),
        ([0.6, 0.2, 0.1, 0.1], {"typical_p": 0.19}, 1),  # the second
        (three, {"temperature": 2.0, "min_p": 0.1}, 3),
        (three, {"temperature": 2.0, "min_p": 0.1, "temperature_last": True}, 2),
    ]
    right = [count_survivors(distribution(list(map(math.log, p)), **setting)) == kept
             for p, setting, kept in cases]
    trace.self_tests()
    trace.check("by hand, how many tokens are kept: of 0.4 and four times 0.15, one by top-k 1, "
                "all by top-k 2 (four tie), two by top-p 0.5, one by min-p 0.5, the four by "
                "typical 0.5; of 0.76, 0.19 and 0.05, two by min-p 0.1, but all three if "
                "temperature 2 comes before it", all(right), f"{len(cases)} cases")
    trace.check("by hand, repetition penalty 2 for the first two tokens: it divides a logit, or "
                "multiplies it where it is below 0",
                repetition_penalty([2.0, -2.0, 1.0], [0, 1, 1], 2.0) == [1.0, -4.0, 1.0],
                "2, -2, 1 become 1, -4, 1")


# 3. Sampling done right


def compare_shares(seed: int) -> list[dict]:
    """Return how often each text of toy 1 comes: by product, enumerated, and counted."""
    def run(rng: random.Random | EveryBranch) -> str:
        return letters(sample(model_of(TOY), TOY_PROMPT, 2, rng=rng))

    rng = random.Random(seed)
    counts = Counter(run(rng) for _ in range(DRAWS))
    enumerated = every_outcome(run)
    return [{"text": text, "product": p, "enumerated": enumerated.get(text, 0.0),
             "counted": counts[text] / DRAWS} for text, p in toy_texts().items()]


def show_sampling(trace: Trace, knobs: Namespace) -> None:
    """Show a text of each of three samplers, and the shares of toy 1's texts."""
    lab = knobs.lab
    ways = {
        "as it is": {},
        "t 2": {"temperature": 2.0},
        f"t 2, then min-p {knobs.min_p:g}": {"temperature": 2.0, "min_p": knobs.min_p},
    }
    trace.say("To sample is to draw the next token by its probability, reshaped or not. One text "
              "per way, as an illustration:")
    for name, setting in ways.items():
        tokens = sample(lab.reader, knobs.tokens, 14, rng=random.Random(lab.seed), **setting)
        trace.lines(quoted(f"{name}: " + lab.tokenizer.decode([*knobs.tokens, *tokens])))
    rows = compare_shares(lab.seed)
    trace.ask("In toy 1, the text A A has probability 0.2. About how often does it come in "
              f"{DRAWS:,} draws?", round(rows[0]["counted"] * DRAWS))
    trace.say("Is a sampler right? Toy 1 (section 1) has nine texts of two words. The probability "
              f"of each is a product. Counting {DRAWS:,} draws comes near the product. Taking "
              "every branch of sample(), with its probability, and adding up is exact.")
    trace.table(rows, {"text": "", "product": ".4f", "enumerated": ".4f", "counted": ".4f"})
    gap = max(abs(row["enumerated"] - row["product"]) for row in rows)
    trace.check("enumerated, sample() gives each text its product of probabilities", gap < 1e-12,
                f"{len(rows)} texts, max |Δ| < 1e-12")


# 4. Beam search

# Toy 2, in which a beam of width 2 loses to greedy.
LOSING: ToyLanguage = {
    (): [0.4, 0.35, 0.25],
    (0,): [0.34, 0.33, 0.33],
    (1,): [0.49, 0.49, 0.02],
    (0, 0): [0.98, 0.01, 0.01],
}
# Toy 3, in which B ends a text, and the text with the best score ends last.
LATE: ToyLanguage = {(): [0.45, 0.55], (0,): [0.5, 0.5], (0, 0): [0.1, 0.9]}


def toy_beam(language: ToyLanguage, n: int, width: int, **options) -> tuple[str, float]:
    """Return the best text of up to n words by a beam in a toy language, and exp(its score)."""
    [(tokens, score), *_] = beam_search(model_of(language), TOY_PROMPT, n, width=width, **options)
    return letters(tokens), math.exp(score)


def beam_steps(language: ToyLanguage, width: int, n: int) -> list[dict]:
    """Return the texts kept at each step of a beam in a toy language, and the best one dropped."""
    beams = [Candidate(TOY_PROMPT, 0.0)]
    rows = []
    for step in range(1, n + 1):
        ranked = extensions(model_of(language), beams, keep=width + 1)
        beams = ranked[:width]
        for rank, beam in enumerate(ranked, 1):
            place = f"#{rank}" if rank <= width else "dropped"
            rows.append({"step": step, "place": place, "text": letters(beam.tokens[1:]),
                         "p": math.exp(beam.log_p)})
    return rows


class SearchRow(NamedTuple):
    """Searches for the likeliest text to the end of the verse, as means over some prompts."""

    search: str
    log_p: float | None   # None where exact search gave up on every prompt
    tokens: float | None
    texts: float          # that the target read
    not_best: int         # prompts where exact search found a likelier text


def compare_with_exact(
    lab: DecodingLab, prompts: Sequence[list[int]], beams: Sequence[tuple[int, float]], n: int
) -> list[SearchRow]:
    """Return rows of exact search and of beams, each with its width and length penalty.

    The row of exact search leaves out the prompts where it gives up.
    """
    target = lab.reader
    target.passes = 0
    exact = [exact_search(target, prompt, n, eos=lab.eos, max_passes=EXACT_PASSES)
             for prompt in prompts]
    rows = [search_row("exact", exact, exact, target.passes)]
    for width, penalty in beams:
        target.passes = 0
        found = []
        for prompt in prompts:
            [(tokens, score), *_] = beam_search(target, prompt, n, width=width,
                                                length_penalty=penalty, eos=lab.eos)
            found.append((tokens, score * len(tokens) ** penalty))
        name = f"width {width}, penalty {penalty:g}"
        rows.append(search_row(name, found, exact, target.passes))
    return rows


def search_row(name: str, found: Sequence, exact: Sequence, passes: int) -> SearchRow:
    """Return the row of a search. It found (tokens, log p) per prompt, or None; so did exact."""
    settled = [text for text in found if text is not None]
    not_best = sum(best is not None and text[1] < best[1] - 1e-9
                   for text, best in zip(found, exact))
    return SearchRow(name, mean_if_any([log_p for _, log_p in settled]),
                     mean_if_any([len(tokens) for tokens, _ in settled]),
                     passes / len(found), not_best)


def compare_diversity(lab: DecodingLab, prompts: Sequence[list[int]], n: int) -> list[dict]:
    """Return the variety of the four best texts of a beam, and of four diverse beams."""
    searches = {
        "a beam of 4": partial(beam_search, width=4, length_penalty=0.0),
        "4 diverse beams": partial(diverse_beam_search, groups=4, diversity=2.0),
    }
    rows = []
    for name, search in searches.items():
        found = [search(lab.reader, prompt, n) for prompt in prompts]
        variety = fmean(distinct_bigrams([tokens for tokens, _ in texts]) for texts in found)
        rows.append({"texts of": name, "distinct bigrams / all bigrams": variety,
                     "log p": fmean(total for texts in found for _, total in texts)})
    return rows


def show_beam(trace: Trace, knobs: Namespace) -> None:
    """Show what a beam keeps in toy 2, where it loses to greedy; then searches in the Llama."""
    trace.say("Beam search keeps the few best texts so far instead of one. In toy 2, A, B and C "
              "begin with 0.40, 0.35, 0.25; after A they have 0.34, 0.33, 0.33, and after B 0.49, "
              "0.49, 0.02; after B A and B B all three have 1/3. What a beam of width 2 keeps at "
              "each step, and the best text that it drops:")
    trace.ask("Greedy keeps one text and a beam of width 2 keeps two. Whose text is likelier, "
              "greedy's or the beam's?", "greedy's")
    trace.table(beam_steps(LOSING, 2, 3), {"step": "d", "place": "", "text": "", "p": ".2f bar 20"})
    text, p = toy_beam(LOSING, 3, 1, length_penalty=0.0)
    _, p_of_two = toy_beam(LOSING, 3, 2, length_penalty=0.0)
    text_of_three, _ = toy_beam(LOSING, 3, 3, length_penalty=0.0)
    trace.say(f"Greedy writes A A A, which has {p:.2f}, since A follows A A with 0.98. The beam "
              "dropped A A, because two others looked better then, and its best text has "
              f"{p_of_two:.2f}. Width 3 finds A A A again.")
    show_ended_beams(trace, knobs)
    trace.check("toy 2: width 1 writes the greedy text; it and width 3 find a likelier text than "
                "width 2", text == text_of_three == letters(greedy(model_of(LOSING), TOY_PROMPT, 3))
                and p > p_of_two, f"{p:.2f} and {p_of_two:.2f}")
    check_beams(trace)


def show_ended_beams(trace: Trace, knobs: Namespace) -> None:
    """Show searches for texts that may end, length penalties, and diverse beams."""
    lab = knobs.lab
    n = knobs.max_new_tokens
    prompts = [knobs.tokens, *lab.prompts[3:5]]
    rows = compare_with_exact(
        lab, prompts, [(1, 0.0), (4, 0.0), (knobs.width, knobs.length_penalty)], n)
    _, one, four, own = rows
    shorter = compare_words(four.tokens, one.tokens, "longer than", "shorter than", "as long as")
    longer = compare_words(own.tokens, four.tokens, "longer than", "shorter than", "as long as")
    trace.ask("A text may end at the end of a verse. Are the likeliest texts that width 4 finds "
              "longer or shorter than greedy's?", shorter.split()[0])
    trace.say(f"Now a text ends at the end of a verse (eos), or at {n} tokens. A beam takes the "
              "text with the best log p / tokens^penalty: with penalty 0 the likeliest. Means over "
              f"{len(prompts)} prompts. Exact search finds the likeliest of all texts, but gives "
              f"up on a prompt after reading {EXACT_PASSES} texts, and its row leaves that prompt "
              "out. It reads every beginning that is likelier than the best whole text. These are "
              "few only if a model is tiny and sure of most tokens. For long texts of a large "
              "model they are too many, so beams are used.")
    trace.table(rows, {"search": "", "log_p": ".2f", "tokens": ".1f", "texts as texts read": ".0f",
                       "not_best as not the best": "d"})
    trace.note("not the best: prompts where exact search found a likelier text")
    trace.say(f"With penalty 0, the texts of width 4 are {shorter} those of width 1, on average. "
              "Every further token lowers log p, so a short text that ends can be the likeliest, "
              "whether it is wanted or not. A penalty makes up for this: as log p is negative, "
              "dividing by a larger length brings it nearer to 0. The texts of the last row are "
              f"{longer} those of width 4 with penalty 0.")
    found_here = "Here it found none." if four.not_best == 0 else "Here it did, too."
    trace.say("The texts of a beam tend to be nearly the same. Diverse beams choose one after the "
              "other, and a token loses 2 (of log p) for each earlier beam that chose it at this "
              "step. Four texts of 8 tokens per prompt; a bigram is two neighbouring tokens:")
    trace.table(compare_diversity(lab, prompts, 8),
                {"texts of": "", "distinct bigrams / all bigrams": ".2f", "log p": ".2f"})
    trace.say("On 20 models at the defaults, width 4 had a higher mean log p than width 1 on all "
              "20, and shorter texts on 18. On 18 of the 20, exact search found a still likelier "
              f"text for at least one prompt. ({found_here}) Diverse beams had more distinct "
              "bigrams on all 20, and a lower log p.")


def check_beams(trace: Trace) -> None:
    """Check searches for texts that may end, and diverse beams, by hand."""
    trace.self_tests()
    tokens, log_p = exact_search(model_of(LATE), [1], 3, eos=1, max_passes=9)
    late, _ = toy_beam(LATE, 3, 2, eos=1)
    early, _ = toy_beam(LATE, 3, 2, eos=1, early_stopping=True)
    trace.check("by hand, toy 3, where B ends a text: A and B begin with 0.45 and 0.55; after A "
                "both have 0.5, after A A 0.1 and 0.9. Exact search finds B, which has 0.55. Width "
                "2 with penalty 1 goes on when B and A B have ended, as another can still score "
                "better, and finds A A B. With early_stopping it stops there, and finds B",
                letters(tokens) == early == "B" and late == "A A B"
                and abs(math.exp(log_p) - 0.55) < 1e-12, "log 0.2025 / 3 > log 0.55")
    found = diverse_beam_search(model_of(TOY), TOY_PROMPT, 2, groups=3, diversity=0.2)
    chances = [(letters(tokens), round(math.exp(log_p), 12)) for tokens, log_p in found]
    trace.check("by hand, toy 1, three beams, diversity 0.2. Step 1: A, A, then B, as A costs 0.4. "
                "Step 2: A A, then A B, as A costs 0.2, and B C",
                chances == [("A A", 0.2), ("A B", 0.175), ("B C", 0.36)],
                "probabilities 0.2, 0.175 and 0.36")


# 5. Speculative decoding


class RuleRow(NamedTuple):
    """One token under the rule of speculative sampling."""

    token: str
    p: float
    q: float
    kept: float  # probability of being kept, if guessed
    both: float  # min(p, q)
    rest: float  # what replaces a rejected guess


def rule_rows(lab: DecodingLab, p: Vector, q: Vector, n: int) -> list[RuleRow]:
    """Return the n tokens with most probability under p or q."""
    kept = acceptance(p, q)
    rest = residual(p, q)
    return [RuleRow(lab.name(i), p[i], q[i], kept[i], min(p[i], q[i]), rest[i])
            for i in likeliest(list(map(max, p, q)), n)]


class ProofRow(NamedTuple):
    """One text, and its exact probability in each way of writing it."""

    text: str
    target: float
    rule: float         # speculative sampling
    argmax_by_q: float  # the common bug
    point_mass: float   # the draft's argmax, judged rightly


def enumerate_speculation(
    target_fn: LogitsFn,
    draft_fn: LogitsFn,
    n: int,
    gamma: int,
    eos: int | None = None,
    **settings: float,
) -> list[ProofRow]:
    """Take every branch of sample() and of three decoders, for n tokens; the likeliest first."""
    def target(rng: EveryBranch) -> tuple[int, ...]:
        return tuple(sample(target_fn, [0], n, rng=rng, eos=eos, **settings))

    def rule(rng: EveryBranch, **options) -> tuple[int, ...]:
        tokens, _ = speculative_sample(target_fn, draft_fn, [0], n, gamma=gamma, rng=rng, eos=eos,
                                       **options, **settings)
        return tuple(tokens)

    def argmax_by_q(rng: EveryBranch) -> tuple[int, ...]:
        return rule(rng, choose_guess=lambda q, rng: argmax(q))

    def point_mass(rng: EveryBranch) -> tuple[int, ...]:
        tokens, _ = speculate(target_fn, partial(greedy, draft_fn), [0], n, gamma=gamma, eos=eos,
                              choose=sampler(rng, **settings))
        return tuple(tokens)

    exact = every_outcome(target)
    others = [every_outcome(decode) for decode in (rule, argmax_by_q, point_mass)]
    return [ProofRow(letters(text), exact[text], *(shares.get(text, 0.0) for shares in others))
            for text in sorted(exact, key=exact.get, reverse=True)]


def proof_gap(rows: Sequence[ProofRow]) -> float:
    """Return how far the rule and the point mass are from the target, at most."""
    return max(max(abs(row.rule - row.target), abs(row.point_mass - row.target)) for row in rows)


def round_lines(lab: DecodingLab, tokens: Sequence[int], counts: Counts) -> list[str]:
    """Return a line per pass: guesses kept (+), the first wrong one (×), the target's own (→)."""
    lines = []
    done = 0
    for number, (guesses, kept) in enumerate(counts.rounds, 1):
        marks = ["+" + lab.name(token) for token in guesses[:kept]]
        marks += ["×" + lab.name(token) for token in guesses[kept:kept + 1]]
        marks.append("→" + lab.name(tokens[done + kept]))
        lines += textwrap.wrap(f"{number:>3}  " + " ".join(marks), WIDTH - 10,
                               subsequent_indent=" " * 5)
        done += kept + 1
    return lines


def show_speculative(trace: Trace, knobs: Namespace) -> None:
    """Show a greedy text with the guesses marked, then the rule of sampling and its proof."""
    lab = knobs.lab
    n = knobs.max_new_tokens
    target = CachedModel(lab.target)
    tokens, counts = speculative_greedy(target, CachedModel(lab.draft), knobs.tokens, n,
                                        gamma=knobs.gamma)
    wrong = sum(kept < len(guesses) for guesses, kept in counts.rounds)
    trace.say(f"A small draft model guesses gamma = {knobs.gamma} tokens, and the target checks "
              "them all in one pass. Greedy first, a line per pass: + a guess that is right, × "
              "the first wrong one (those behind it are not shown), → the target's own token, in "
              "place of the wrong guess or after the last right one.")
    trace.ask(f"{n} tokens are wanted, and {counts.accepted} guesses were right. How many passes "
              "did the target make?", counts.target_passes)
    trace.lines(round_lines(lab, tokens, counts)[:14])
    trace.note(f"{n} tokens in {counts.target_passes} passes. Of {counts.drafted} guesses "
               f"{counts.accepted} were kept, {wrong} were wrong, and "
               f"{counts.drafted - counts.accepted - wrong} stood behind a wrong one: they were "
               "read, but of no use. (The last passes guess no more tokens than are wanted.) On 20 "
               "models at the defaults, 24 tokens took 8 to 11 passes.")
    show_rule(trace, knobs)
    show_proof(trace, random_pair(lab.seed))
    trace.check("greedy: the text is the target's own, by one plain pass over it; passes = tokens "
                "- guesses kept", len(tokens) == n and is_greedy(lab.target, knobs.tokens, tokens)
                and target.passes == counts.target_passes == n - counts.accepted,
                f"{n} - {counts.accepted} = {target.passes}")


def show_rule(trace: Trace, knobs: Namespace) -> None:
    """Show the rule of speculative sampling on one distribution."""
    lab = knobs.lab
    p, q = (distribution(llama.forward(knobs.tokens)[-1], knobs.temperature, top_p=knobs.top_p)
            for llama in (lab.target, lab.draft))
    rows = rule_rows(lab, p, q, 8)
    most = max(max(row.both, row.rest) for row in rows)
    trace.say(f"Sampling: what may follow {lab.tail(knobs.tokens)!r}, temperature "
              f"{knobs.temperature:g} and top-p {knobs.top_p:g} for both models; the {len(rows)} "
              "tokens with the largest p (target) or q (draft). A guess drawn from q is kept with "
              f"min(1, p / q); over all tokens, that is Σ min(p, q) = {sum(map(min, p, q)):.0%} of "
              "the guesses. Otherwise the token is drawn from the rest: max(0, p - q), normalized.")
    trace.table(rows, {"token": "", "p": ".3f", "q": ".3f", "kept": ".0%", "both as min(p, q)":
                       f"bar 18 of {most}", "rest as the rest": f"bar 18 of {most}"})


def show_proof(trace: Trace, pair: tuple[LogitsFn, LogitsFn]) -> None:
    """Show the rule enumerated, on a random target and draft over two tokens."""
    rows = enumerate_speculation(*pair, 5, 2)
    trace.say("The rule, checked by enumeration: a random target and draft over two tokens, all "
              "32 texts of 5 tokens, gamma 2. Every branch that a decoder can take is taken and "
              "weighed. The common bug: guess the draft's likeliest token, but keep it with "
              "min(1, p / q), as if it had been drawn from q. Such a guess was not drawn by "
              "chance. The rule with q = 1 for it (a point mass) keeps it with probability p, and "
              "otherwise draws from p without it. The likeliest texts:")
    trace.table(rows[:6], {"text": "", "target": ".4f", "rule as by the rule": ".4f",
                           "argmax_by_q as the bug": ".4f",
                           "point_mass as point mass": ".4f"})
    bias = sum(abs(row.argmax_by_q - row.target) for row in rows) / 2
    trace.say(f"The bug gives some texts too much probability, {bias:.1%} in all, and others too "
              "little. The rule and the point mass are exact. With 20 random pairs, of seeds 0 to "
              "19, the bug gave 8% to 36% too much.")
    ended = enumerate_speculation(*pair, 5, 1, eos=1, temperature=1.5, top_p=0.8)
    trace.check("enumerated, the rule and the point mass give every text the target's probability; "
                "also with gamma 1, temperature 1.5 and top-p 0.8, where B ends a text",
                max(proof_gap(rows), proof_gap(ended)) < 1e-12, "max |Δ| < 1e-12")


# 6. When it pays


def keep_chances(
    target_fn: LogitsFn, draft_fn: LogitsFn, prompt: Sequence[int], tokens: Sequence[int]
) -> Vector:
    """Return, for each token x that the target drew, the probability that it is a kept guess.

    That is the share of min(p, q) in p, or min(1, q(x)/p(x)). Its mean over what the target draws
    is α = Σ min(p, q).
    """
    text = [*prompt, *tokens][:-1]
    chances = []
    for token, p_row, q_row in zip(tokens, last_rows(target_fn, text, len(tokens)),
                                   last_rows(draft_fn, text, len(tokens))):
        chances.append(min(1.0, softmax(q_row)[token] / softmax(p_row)[token]))
    return chances


def expected_passes(chances: Vector, gamma: int) -> float:
    """Return the mean passes for a text whose places have these chances of a kept guess.

    passes[i] is the mean from place i to the end. A round keeps some guesses and puts one token.
    """
    n = len(chances)
    passes = [0.0] * (n + 1)
    for i in reversed(range(n)):
        guesses = min(gamma, n - i - 1)
        all_kept = 1.0
        passes[i] = 1.0
        for k in range(i, i + guesses):
            passes[i] += all_kept * (1 - chances[k]) * passes[k + 1]
            all_kept *= chances[k]
        passes[i] += all_kept * passes[i + guesses + 1]
    return passes[0]


def measure_payoff(
    lab: DecodingLab, n_texts: int, n: int, gammas: Sequence[int], costs: Sequence[float]
) -> tuple[list[dict], float]:
    """Draw texts of n tokens; return what each gamma brings on them, and α, their mean chance.

    A row has the speed-up for each cost of a pass of the draft, in passes of the target.
    """
    target = lab.reader
    draft = CachedModel(lab.draft)
    rng = random.Random(lab.seed)
    texts = []
    for prompt in itertools.islice(itertools.cycle(lab.prompts), n_texts):
        texts.append(keep_chances(target, draft, prompt, sample(target, prompt, n, rng=rng)))
    alpha = fmean(map(fmean, texts))
    rows = []
    for gamma in gammas:
        rates = [n / expected_passes(chances, gamma) for chances in texts]
        mean = fmean(rates)
        row = {"gamma": gamma, "tokens per pass": mean, "±": standard_error(rates),
               "formula": expected_tokens(alpha, gamma)}
        rows.append(row | {f"c = {c:.2f}": speed_up(mean, gamma, c) for c in costs})
    return rows, alpha


def best_gamma(rows: Sequence[dict], column: str) -> int:
    """Return the gamma with the best speed-up, or 0 where none is faster than no guesses."""
    best = max(rows, key=operator.itemgetter(column))
    return best["gamma"] if best[column] > 1 else 0


def show_when_it_pays(trace: Trace, knobs: Namespace) -> None:
    """Show tokens per pass, measured and by the formula, and the speed-ups."""
    lab = knobs.lab
    own = lab.cost("a smaller Llama")
    costs = (0.0, 0.05, own)
    gammas = sorted({1, 2, 3, 4, 6, 8, knobs.gamma})
    rows, alpha = measure_payoff(lab, PAY_TEXTS, 24, gammas, costs)
    columns = [f"c = {c:.2f}" for c in costs]
    trace.say("More guesses give more tokens per pass, and cost more passes of the draft. "
              f"{PAY_TEXTS} texts of 24 tokens, drawn from the target at temperature 1. On "
              f"average, a guess is kept with alpha = Σ min(p, q) = {alpha:.2f}. The table has the "
              "tokens per pass on these texts, and by the formula 1 + alpha + … + alpha^gamma. If "
              "a pass of the draft costs c passes of the target, the measured speed-up is tokens "
              "per pass / (1 + gamma · c). The last c is this draft's.")
    trace.ask(f"A pass of the draft costs {own:.2f} of the target's. Which gamma is fastest (0: "
              "none pays)?", best_gamma(rows, columns[-1]))
    trace.table(rows, {"gamma": "d", "tokens per pass": ".2f", "±": ".2f", "formula": ".2f"}
                | dict.fromkeys(columns, "{:.2f}×"))
    trace.note("±: the standard error over the texts, how far the mean may be off by chance. c of "
               "this draft: weights of the draft / weights of the target, without the embeddings")
    last = rows[-1]
    best = [best_gamma(rows, column) or "none" for column in columns]
    trace.say("The formula assumes that all places are alike and that texts never end; here the "
              f"last pass of a text is cut short. At gamma {last['gamma']} the formula "
              f"says {last['formula']:.2f}, and these texts give {last['tokens per pass']:.2f} ± "
              f"{last['±']:.2f}. "
              f"From left to right, the best gamma for each c is {', '.join(map(str, best))}.")
    trace.say("On 20 models at the defaults, the best gamma was 8 for c = 0.00, 3 or 4 for 0.05, "
              "and 1 for the draft's own c. At that c, gamma 1 was 1.10 to 1.22 times as fast as "
              "greedy, and gamma 8 was slower than greedy on all 20. All this counts a pass over "
              "gamma + 1 tokens like a pass over one. That is so where the processor waits for the "
              "weights and could compute more meanwhile, but not on a busy server.")
    check_payoff(trace, random_pair(lab.seed))


def check_payoff(trace: Trace, pair: tuple[LogitsFn, LogitsFn]) -> None:
    """Check the passes on a random target and draft, and the formulas by hand."""
    texts = every_outcome(lambda rng: tuple(sample(pair[0], [0], 4, rng=rng)))
    worked_out = sum(p * expected_passes(keep_chances(*pair, [0], text), 2)
                     for text, p in texts.items())
    passes = every_outcome(
        lambda rng: speculative_sample(*pair, [0], 4, gamma=2, rng=rng)[1].target_passes)
    enumerated = sum(number * p for number, p in passes.items())
    trace.check("section 5's random pair: the mean number of passes, computed in two ways, from "
                "the chances of all texts and from all branches of the decoder",
                abs(worked_out - enumerated) < 1e-9, f"{enumerated:.4f}, |Δ| < 1e-9")
    long_run = 1000 / expected_passes([0.6] * 1000, 2)
    faster = speed_up(1.96, 2, 0.1)
    trace.check("where all places are alike, alpha 0.6 and gamma 2, a text of 1,000 tokens has the "
                "tokens per pass of the formula; at c = 0.1 that is 1.96 / 1.2 times as fast",
                abs(long_run - expected_tokens(0.6, 2)) < 0.01
                and abs(faster - 1.96 / 1.2) < 1e-12, f"{long_run:.2f} and {faster:.2f}×")


# 7. Prompt lookup: guesses for nothing


class Way(NamedTuple):
    """One way to decode several prompts, each of which the target has read beforehand."""

    way: str
    c: float             # cost of one run of the draft or a head, in passes of the target
    runs: float          # of the draft or a head, for one text, mean
    passes: float        # of the target for one text, mean
    nodes: float         # tokens read by the target after the prompt, per new token
    speed_up: float      # over greedy, which takes one pass per token
    per_text: list[int]  # passes of each text
    first_kept: float | None   # share of the first guesses that was kept
    second_kept: float | None  # share of the second guesses, where the first was kept
    right: int           # texts that are the target's own, where the cache agrees with the counts


WAY_COLUMNS = {"way": "", "c": ".2f", "runs": ".1f", "passes": ".1f", "nodes": ".1f",
               "speed_up": "{:.2f}×"}


def decode_by(
    lab: DecodingLab, way: str, target: CachedModel, prompt: list[int], n: int, gamma: int
) -> tuple[list[int], Counts]:
    """Return n greedy tokens and Counts, by the way of that name."""
    if way == "Medusa tree":
        return medusa_decode(target, lab.medusa, prompt, n)
    if way == "Medusa chain":
        return medusa_decode(target, lab.medusa, prompt, n, tops=(1, 1))
    if way == "lookahead":
        return lookahead_decode(target, prompt, n)
    if way == "prompt lookup":
        guess = prompt_lookup
    elif way == "EAGLE":
        guess = partial(eagle_guesses, target, lab.eagle)
    else:
        guess = partial(greedy, CachedModel(lab.draft))
    return speculate(target, guess, prompt, n, gamma=gamma)


def measure_way(
    lab: DecodingLab, way: str, prompts: Sequence[list[int]], n: int, gamma: int
) -> Way:
    """Decode n tokens after each prompt. A plain pass over each text checks it is the target's."""
    total = Counts()
    per_text = []
    right = 0
    for prompt in prompts:
        target = CachedModel(lab.target)
        target(prompt[:-1])  # prefill: the first pass of every way has a state to guess from
        tokens, counts = decode_by(lab, way, target, prompt, n, gamma)
        total.rounds += counts.rounds
        per_text.append(counts.target_passes)
        # The cache holds the prompt, the guesses, and each pass's own token but the last.
        read = len(prompt) + counts.drafted + counts.target_passes - 1
        right += is_greedy(lab.target, prompt, tokens) and len(target.known) == read
    cost = lab.cost(way)
    runs = total.drafted if cost else 0
    if way == "Medusa tree":  # one run of head 1 gives 3 guesses, and one of head 2 the other 6
        runs = sum(min(2, len(guesses) // 3) for guesses, _ in total.rounds)
    texts = len(prompts)
    passes = total.target_passes
    nodes = total.drafted + passes - texts
    return Way(way, c=cost, runs=runs / texts, passes=passes / texts, nodes=nodes / (n * texts),
               speed_up=n * texts / (passes + cost * runs), per_text=per_text,
               first_kept=share_kept(total.rounds, 0), second_kept=share_kept(total.rounds, 1),
               right=right)


def share_kept(rounds: Sequence[tuple[list[int], int]], place: int) -> float | None:
    """Return how often the guess at a place is kept, if those before it are; None without any."""
    judged = [kept > place for guesses, kept in rounds if len(guesses) > place <= kept]
    return mean_if_any(judged)


@cache  # section 9 shows a row of section 8 again
def measure_two_guesses(lab: DecodingLab, way: str, n: int) -> Way:
    """Return measure_way() for two guesses at a time, on the texts of sections 8 and 9."""
    return measure_way(lab, way, lab.prompts[:COMPARED_TEXTS], n, 2)


def fewer_passes(row: Way, other: Way) -> str:
    """Return in words which of two ways takes fewer passes, by the differences text by text."""
    gaps = list(map(operator.sub, other.per_text, row.per_text))
    gap = fmean(gaps)
    limit = 2 * standard_error(gaps)
    if gap and not limit:
        more = compare_words(gap, 0, "fewer", "more")
        return f"{row.way} takes {abs(gap):.0f} passes {more} than {other.way}, on each text"
    if abs(gap) <= limit:
        return (f"{row.way} and {other.way} differ by {abs(gap):.2f} passes (two standard errors: "
                f"{limit:.2f}), which shows nothing")
    more = compare_words(gap, 0, "fewer", "more")
    return (f"{row.way} takes {abs(gap):.2f} passes {more} than {other.way} (two standard errors: "
            f"{limit:.2f})")


def check_ways(trace: Trace, rows: Sequence[Way]) -> None:
    """Check that all texts are the target's own."""
    texts = len(rows[0].per_text)
    trace.check("every text is the target's own, by one plain pass over it; the cache holds as "
                "many tokens as the counts say", all(row.right == texts for row in rows),
                f"{texts} texts for each way")


def show_prompt_lookup(trace: Trace, knobs: Namespace) -> None:
    """Show what guesses looked up in the text bring, and those of a smaller model."""
    lab = knobs.lab
    n = min(knobs.max_new_tokens, COMPARED_TOKENS)
    prompts = [lab.tokenizer.encode(CONTEXT) + prompt for prompt in lab.prompts[:4]]
    lookup = measure_way(lab, "prompt lookup", prompts, n, knobs.gamma)
    smaller = measure_way(lab, "a smaller Llama", prompts, n, knobs.gamma)
    trace.say("Guesses need no model: prompt lookup copies what followed the same words when they "
              f"last came. Gamma {knobs.gamma}, {len(prompts)} greedy texts of {n} tokens. Each "
              "comes after a verse about the rat, so that there is something to look up. The "
              "prompt has been read before the passes are counted.")
    trace.ask("Which is faster, prompt lookup or a smaller Llama?",
              max(lookup, smaller, key=lambda row: row.speed_up).way)
    trace.table([lookup, smaller], WAY_COLUMNS)
    trace.note("c: weights that one run of the guesser reads, as a share of the target's. runs: of "
               "the guesser, per text. nodes: tokens that the target reads, per token of the "
               "final text. speed up over greedy, if arithmetic costs nothing: "
               f"{n} / (passes + c · runs).")
    trace.say(f"On average, {fewer_passes(smaller, lookup)}. But the Llama runs once per guess, "
              "and looking up runs nothing. On 20 models at the defaults, the Llama took fewer "
              "passes on all 20, and prompt lookup was faster on all 20. A rhyme that repeats its "
              "clauses is a good case of prompt lookup; of text that says new things this shows "
              "nothing.")
    check_ways(trace, [lookup, smaller])
    trace.self_tests()
    found = [prompt_lookup([1, 2, 3, 9, 1, 2, 3, 4, 2, 3, 5, 1, 2, 3], 2),
             prompt_lookup([5, 6, 5], 1)]
    trace.check("by hand: in 1 2 3 9 1 2 3 4 2 3 5 1 2 3, the two tokens after the last earlier "
                "1 2 3; and the one after the earlier 5 in 5 6 5", found == [[4, 2], [6]],
                "4 2, and 6")


# 8. Medusa, and how a tree is verified


def draw_tree(lab: DecodingLab, prompt: list[int]) -> list[dict]:
    """Return the nodes of the tree of the pass after the one that reads the prompt."""
    target = CachedModel(lab.target)
    text = (*prompt, argmax(target(prompt)))
    _, found, rows = verify_tree(target, text, medusa_paths(target, lab.medusa, (3, 2), text))
    nodes = [node for node in rows if len(node) >= len(text)]
    drawn = []
    for i, (node, mask) in enumerate(zip(nodes, tree_mask(nodes, nodes))):
        indent = "  " * (len(node) - len(text))
        sees = "".join("█" if seen else "·" for seen in mask)
        kept = "+" if i > 0 and (*text, *found)[:len(node)] == node else ""
        drawn.append({"node": i, "token": indent + lab.name(node[-1]), "sees": sees, "kept": kept})
    return drawn


def last_state(llama: Llama, tokens: Sequence[int]) -> Vector:
    """Return the hidden state after the last token, by a plain pass."""
    llama.forward(tokens)
    return llama.inputs["output"][-1]


def best_by_formula(h: Vector, x: Vector, head: Head, n: int) -> tuple[list[int], Vector]:
    """Return the n likeliest tokens of w2 (h + silu(w1 x)), number by number, and that state."""
    z = [dot(row, x) for row in head["w1"]]
    state = [a + b * sigmoid(b) for a, b in zip(h, z)]
    logits = [dot(row, state) for row in head["w2"]]
    return heapq.nlargest(n, range(len(logits)), key=logits.__getitem__), state


def show_medusa(trace: Trace, knobs: Namespace) -> None:
    """Show a tree with its mask and what is kept of it, and the passes of chains and trees."""
    lab = knobs.lab
    n = min(knobs.max_new_tokens, COMPARED_TOKENS)
    nodes = draw_tree(lab, knobs.tokens)
    trace.say("The target gives the next token. Two extra heads read its last state and guess the "
              "two tokens after. (Only the heads were trained for this.) The 3 best of the first, "
              "and under each the 2 best of the second, make a tree, and one pass verifies it all.")
    trace.ask("The root is the target's own token. Under the root hang 3 guesses, and under each "
              "of them 2. How many nodes has the tree?", len(nodes))
    trace.say(f"The first tree after {lab.tail(knobs.tokens)!r}. Node 0 is the token that the "
              "target has just chosen, and the others are guesses. A node sees itself and its "
              "ancestors (█), and all of the text before the tree. Head 2 does not know what head "
              "1 guessed, so its two guesses are the same in each branch. Kept (+): guesses that "
              "are the target's own choices.")
    indices = "".join(map(str, range(len(nodes))))
    trace.table(nodes, {"node": "d", "token": "", f"sees as sees node {indices}": "s", "kept": ""})
    chain = measure_two_guesses(lab, "Medusa chain", n)
    tree = measure_two_guesses(lab, "Medusa tree", n)
    trace.say(f"Measured on {COMPARED_TEXTS} texts of {n} tokens. The prompt has been read before "
              "the passes are counted. The chain has the best guess of each head and no other. "
              "One run is a run of one head. Both ways run two heads per pass, or fewer where "
              "fewer tokens are still wanted.")
    trace.table([chain, tree], WAY_COLUMNS)
    trace.note(f"columns as in section 7; speed up: {n} / (passes + c · runs)")
    trace.say(f"On average, {fewer_passes(tree, chain)}. Per token of the text, the tree reads "
              f"{tree.nodes:.1f} nodes, and the chain {chain.nodes:.1f}. On a busy server the "
              "nodes are the price. On 20 models at the defaults, the tree took fewer passes on "
              "all 20, and was 1.08 to 1.34 times as fast as greedy.")
    check_ways(trace, [chain, tree])
    check_medusa(trace, lab, knobs.tokens)


def check_medusa(trace: Trace, lab: DecodingLab, prompt: list[int]) -> None:
    """Check the heads against their formula, and a tree against plain passes."""
    text = [*prompt, 0]
    lab.reader(prompt)
    paths = medusa_paths(lab.reader, lab.medusa, (3, 2), text)
    h = last_state(lab.target, prompt)
    best = [best_by_formula(h, h, head, top)[0] for head, top in zip(lab.medusa, (3, 2))]
    trace.check("head 1 guesses its three likeliest tokens and head 2 its two, by the formula and "
                "a plain pass", paths == list(itertools.product(*best)), f"{len(paths)} paths")
    nodes = [(*text, *path) for path in paths]
    rows = CachedModel(lab.target).read(nodes)
    trace.check_close("logits after each path of a tree, read in one pass = of each path alone, "
                      "without a cache", [rows[node] for node in nodes],
                      [lab.target.forward(node)[-1] for node in nodes], 1e-12)


# 9. EAGLE


def eagle_by_formula(lab: DecodingLab, prompt: list[int], token: int, n: int) -> list[int]:
    """Return EAGLE's n guesses after the prompt and this token, number by number."""
    embeddings = lab.target.weights["tok_embeddings"]
    f = last_state(lab.target, prompt)
    guesses = [token]
    for _ in range(n):
        best, f = best_by_formula(f, f + embeddings[guesses[-1]], lab.eagle, 1)
        guesses += best
    return guesses[1:]


def show_eagle(trace: Trace, knobs: Namespace) -> None:
    """Show the passes that EAGLE's, Medusa's and the small Llama's guesses take."""
    lab = knobs.lab
    n = min(knobs.max_new_tokens, COMPARED_TOKENS)
    chain = measure_two_guesses(lab, "Medusa chain", n)
    eagle = measure_two_guesses(lab, "EAGLE", n)
    smaller = measure_two_guesses(lab, "a smaller Llama", n)
    rows = [chain, eagle, smaller]
    output = VOCAB_SIZE * lab.target.config.dim
    trace.say("EAGLE makes a hidden state for the next place from the last one and from the token "
              "just chosen, which Medusa's heads do not know. Its second guess starts from the "
              f"state that it has made. Chains of two guesses, {COMPARED_TEXTS} texts of {n} "
              "tokens after a prompt that has been read. All three were trained for "
              f"{lab.draft_steps} steps, and run once per guess:")
    trace.ask("Which takes fewest passes: Medusa chain; EAGLE; a smaller Llama?",
              min(rows, key=lambda row: row.passes).way)
    trace.table(rows, WAY_COLUMNS | {"first_kept": ".0%", "second_kept": ".0%"})
    trace.note(f"columns as in section 7; speed up: {n} / (passes + c · runs); first kept: share "
               "of the first guesses that the target keeps; second kept: of the second ones where "
               "it keeps the first")
    trace.say(f"On average, {fewer_passes(eagle, chain)}; {fewer_passes(smaller, chain)}. c "
              "includes the output matrix that Medusa and EAGLE read for every guess. Here it is "
              f"{output / weights_read(lab.target.weights):.0%} of what the target reads, and in a "
              "large model a few per cent, so the speed up here does not carry over.")
    trace.say("On 20 models at the defaults, EAGLE kept more of its first guesses than the Medusa "
              "chain on all 20: to know the last token helps. But it kept fewer of its second "
              "guesses on all 20: its head was trained on the target's states, and not on guessed "
              "ones. Which of the three takes fewest passes on one model is partly chance: EAGLE "
              "took fewer than the chain on 12, and more on 3; the smaller Llama took fewer than "
              "the chain on 15, and more on 4.")
    check_ways(trace, rows)
    lab.reader(knobs.tokens)
    trace.check("EAGLE's two guesses after the prompt and a token are the formula's",
                all(eagle_guesses(lab.reader, lab.eagle, [*knobs.tokens, token], 2)
                    == eagle_by_formula(lab, knobs.tokens, token, 2) for token in range(6)),
                "each of 6 tokens")


# 10. Lookahead decoding


def in_circle(tokens: Sequence[int]) -> Vector:
    """Return logits of a model of six tokens: 1 follows 0, 2 follows 1, …, and 0 follows 5."""
    return [float(token == (tokens[-1] + 1) % 6) for token in range(6)]


def show_lookahead(trace: Trace, knobs: Namespace) -> None:
    """Show the passes that lookahead takes."""
    lab = knobs.lab
    n = min(knobs.max_new_tokens, 2 * COMPARED_TOKENS)  # its pool has to fill first
    lookahead = measure_way(lab, "lookahead", lab.prompts[:COMPARED_TEXTS // 2], n, 0)
    trace.say("Nothing is trained, and there is no draft. Beside the text, each pass reads a "
              "window of guesses, for example:")
    trace.lines(["  row 1    rat    cat      dog       guessed for the next places",
                 "  row 2    that   that     that      what the target put after it, one pass ago",
                 "  new      ate    killed   worried   what it puts after these now"])
    trace.say("Each column, read downwards, is a chain that the target itself put together. The "
              "chains go into a pool, and row 2 and the new tokens are the next window. When the "
              "text ends in the first token of a chain, the other two are guessed. (At first, both "
              f"rows are tokens of the prompt.) {len(lookahead.per_text)} texts of {n} tokens "
              "after a prompt that has been read; the nodes of the window count as well:")
    trace.ask(f"For {n} tokens greedy takes {n} passes. And lookahead, on average?",
              lookahead.passes)
    trace.table([lookahead], WAY_COLUMNS)
    trace.note(f"columns as in section 7; speed up: {n} / (passes + c · runs)")
    trace.say(f"On average, lookahead saves {n - lookahead.passes:.1f} of {n} passes. It reads "
              f"{lookahead.nodes:.0f} nodes per token of the text, so it needs a processor that "
              "waits for the weights. On 20 models at the defaults, it saved 7 to 11 of 24 passes.")
    check_ways(trace, [lookahead])
    trace.self_tests()
    _, counts = lookahead_decode(ToyTarget(in_circle), [0, 3], 16, window=4, verified=1)
    windows, kept = zip(*counts.rounds)
    trace.check("by hand, a model that counts 0 to 5 in a circle, prompt 0 3, window 4: the first "
                "pass reads the columns 0 0, 3 3, 0 0, 3 3, and the second 0 1, 3 4, 0 1, 3 4. "
                "Once the pool has the circle, a pass keeps two guesses, and the last one the one "
                "that is still wanted of 16 tokens",
                windows[:2] == ([0, 0, 3, 3, 0, 0, 3, 3], [0, 1, 3, 4, 0, 1, 3, 4])
                and kept == (0, 0, 0, 2, 2, 2, 2, 1), f"kept: {str(kept)[1:-1]}")


# 11. Text with a shape

# Who killed or worried whom, as often as the model likes; and one of three animals.
STORY: Grammar = {
    "animal": [(" cat", "clause"), (" dog", "clause"), (" rat", "clause")],
    "clause": [(" that killed the", "animal"), (" that worried the", "animal"),
               (" that lay in the house", None)],
}
STORY_RE = " (cat|dog|rat)( that (killed|worried) the (cat|dog|rat))* that lay in the house"
ANIMALS: Grammar = {
    "animal": [(" cow", "that"), (" cat", "that"), (" rat", "that")],
    "that": [(" that", None)],
}


def force_texts(lab: DecodingLab, prompt: list[int], n: int, n_drawn: int) -> list[str]:
    """Return those of n_drawn samples in the shape of STORY that end within n tokens."""
    forced = constrain(lab.reader, lab.tokenizer.vocab, STORY, len(prompt), lab.eos)
    rng = random.Random(lab.seed)
    texts = [sample(forced, prompt, n, rng=rng, eos=lab.eos) for _ in range(n_drawn)]
    return [lab.tokenizer.decode(text[:-1]) for text in texts if text[-1] == lab.eos]


# A model that begins with " cat" or " cow" alike, and goes on with " that" after one of them only.
CAT_OR_COW: ToyLanguage = {
    (): [0.1, 0.1, 0.4, 0.4],
    (0,): [0.04, 0.03, 0.9, 0.03],
    (1,): [0.333, 0.333, 0.001, 0.333],
}


class ShapeRow(NamedTuple):
    """One text of a shape, however it is cut into tokens."""

    text: str
    local: float  # probability under the local mask
    given: float  # P(text | it fits)


class Distortion(NamedTuple):
    """What local masking does to the texts of a shape."""

    rows: list[ShapeRow]
    ways: int     # to cut the texts into tokens
    moved: float  # probability that is at the wrong texts


def measure_distortion(
    logits_fn: LogitsFn, vocab: Sequence[str], prompt: list[int], grammar: Grammar, eos: int
) -> Distortion:
    """Enumerate every way to write the grammar's texts, under the mask and under the model."""
    forced = constrain(logits_fn, vocab, grammar, len(prompt), eos)
    by_tokens = every_outcome(lambda rng: tuple(sample(forced, prompt, 64, rng=rng, eos=eos)))
    local: Counter[str] = Counter()
    free: Counter[str] = Counter()
    for tokens, p in by_tokens.items():
        written = "".join(vocab[token] for token in tokens[:-1]).strip()
        local[written] += p
        free[written] += math.exp(log_probability(logits_fn, prompt, tokens))
    fits = sum(free.values())
    rows = [ShapeRow(text, local[text], free[text] / fits) for text in sorted(local)]
    moved = sum(abs(row.local - row.given) for row in rows) / 2
    return Distortion(rows, len(by_tokens), moved)


def count_cuts(vocab: Sequence[str], text: str) -> int:
    """Return how many ways there are to cut a text into tokens of the vocabulary."""
    if not text:
        return 1
    return sum(count_cuts(vocab, text[len(token):]) for token in vocab if text.startswith(token))


def show_constrained(trace: Trace, knobs: Namespace) -> None:
    """Show forced texts, and what local masking does to their probabilities."""
    lab = knobs.lab
    texts = force_texts(lab, knobs.tokens, 60, 5)
    trace.say("Text can be forced into a shape: every token that the shape does not allow gets "
              f"-inf. Here the shape is the regular expression {STORY_RE!r}, written as a grammar. "
              f"Of five drawn texts, the {len(texts)} that ended within 60 tokens:")
    for text in texts:
        trace.lines(quoted("…" + text))
    found = measure_distortion(lab.reader, lab.tokenizer.vocab, knobs.tokens, ANIMALS, lab.eos)
    show_distortion(trace, found)
    trace.check("all forced texts match the shape, by Python's re",
                all(re.fullmatch(STORY_RE, text) for text in texts),
                f"{len(texts)} texts of the first shape")
    check_distortion(trace, lab.tokenizer.vocab, found)


def show_distortion(trace: Trace, found: Distortion) -> None:
    """Show what local masking does to the probabilities of three texts."""
    trace.say("The mask is local: at each step it looks at the next token only, and does not see "
              "where that leads. How far is this from the model's own probabilities, given that "
              f"the text fits? A smaller shape, one animal and \"that\", has {len(found.rows)} "
              f"texts and {found.ways} ways to cut them into tokens (a word can be one token or "
              "several shorter ones). All are enumerated:")
    widest = max(found.rows, key=lambda row: abs(row.local - row.given))
    trace.ask(f"{widest.text!r} has probability {widest.local:.3f} under the local mask. Given "
              "that the text fits, is it higher or lower?",
              compare_words(widest.given, widest.local, "higher", "lower", "the same"))
    trace.table(found.rows, {"text": "", "local as local mask": ".3f bar 18 of 1",
                             "given as given that it fits": ".3f bar 18 of 1"})
    trace.say(f"The mask gives some texts too much probability, {found.moved:.0%} in all, and "
              "others too little. When the mask lets the model pick the animal, it "
              "does not know how likely \"that\" and the line end will be. The column on the right "
              f"counts this: it has {widest.given:.3f} for {widest.text!r}, and the mask "
              f"{widest.local:.3f}. (On 20 models at the defaults, 9% to 91% were too much.)")


def check_distortion(trace: Trace, vocab: Sequence[str], found: Distortion) -> None:
    """Check that all ways to write the three texts were found, and a toy by hand."""
    ways = sum(count_cuts(vocab, f" {animal} that") for animal in ("cat", "cow", "rat"))
    trace.check("the mask loses no way to cut the three texts into tokens, counted from their "
                "letters", found.ways == ways, f"{ways} ways")
    trace.self_tests()
    words = [" cat", " cow", " that", "\n"]
    row = measure_distortion(model_of(CAT_OR_COW), words, TOY_PROMPT, ANIMALS, 3).rows[0]
    trace.check("by hand: cat and cow begin with 0.1, and \"that\" follows with 0.9 and 0.001. "
                "\"Cat that\" has one half under the mask, and 0.09 / 0.0901 given that it fits",
                max(abs(row.local - 0.5), abs(row.given - 0.09 / 0.0901)) < 1e-12,
                f"{row.local:.1%} and {row.given:.1%}")


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
        layer_shapes = {
            "attention_norm": (self.dim,),
            "attention.wq": (self.dim, self.dim),
            "attention.wk": (kv_dim, self.dim),
            "attention.wv": (kv_dim, self.dim),
            "attention.wo": (self.dim, self.dim),
            "ffn_norm": (self.dim,),
            "feed_forward.w1": (self.hidden_dim, self.dim),
            "feed_forward.w2": (self.dim, self.hidden_dim),
            "feed_forward.w3": (self.hidden_dim, self.dim),
        }
        shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (self.vocab_size, self.dim)}
        for layer in range(self.n_layers):
            for name, shape in layer_shapes.items():
                shapes[f"layers.{layer}.{name}"] = shape
        shapes["norm"] = (self.dim,)
        shapes["output"] = (self.vocab_size, self.dim)
        return shapes


class Llama:
    """weights: {name: matrix [out][in] or gain [dim]}, named and shaped as Config.shapes() says.

    inputs: what each operation read in the last forward(), under the operation's name. Of a matrix
    or a norm that is x, of an attention (q, k, v), of a SwiGLU its two sides. Training needs them.
    """

    def __init__(self, config: Config, weights: Weights):
        for name in config.shapes():
            if name not in weights:
                raise ValueError(f"weights must have {name!r}")
        self.config = config
        self.weights = weights
        self.inputs: dict[str, Matrix | tuple] = {}

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
            self.inputs[prefix + "attention"] = (q, k, v)
            attended = attend(q, k, v, c.n_heads, c.n_kv_heads, mask)
            x = add(x, self.linear(prefix + "attention.wo", attended))
            # Feed-forward: every token is worked on by itself.
            h = self.norm(prefix + "ffn_norm", x)
            gate = self.linear(prefix + "feed_forward.w1", h)
            up = self.linear(prefix + "feed_forward.w3", h)
            self.inputs[prefix + "feed_forward"] = (gate, up)
            x = add(x, self.linear(prefix + "feed_forward.w2", swiglu(gate, up)))
        return self.linear("output", self.norm("norm", x))

    def linear(self, name: str, x: Matrix) -> Matrix:
        """Apply the matrix of that name. A subclass may do it differently."""
        self.inputs[name] = x
        return linear(x, self.weights[name])

    def norm(self, name: str, x: Matrix) -> Matrix:
        """Apply the RMSNorm whose gain has that name."""
        self.inputs[name] = x
        return rms_norm(x, self.weights[name], self.config.norm_eps)


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
            z = complex(a, b) * cmath.rect(1.0, position * theta)  # e^(i · position · theta)
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
        channels = transpose(values[h // group])
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


def transpose(m: Matrix) -> list[tuple[float, ...]]:
    """Return m with rows and columns exchanged."""
    return list(zip(*m))


def concat(*blocks: Matrix) -> Matrix:
    """Return the blocks side by side: [n][a], [n][b], … -> [n][a + b + …]."""
    return [list(itertools.chain(*rows)) for rows in zip(*blocks)]


# The bench: what this script's experiments share


class CachedModel:
    """A Llama as logits_fn that reads nothing twice.

    A text is known by its tokens. Of every text that was read it keeps the logits, the hidden
    state, and in each layer the key and value of the text's last token. So a beam can go back to
    any text for nothing, and a tree of texts takes one pass. (A real cache holds one text, or
    some, and has to forget the branches that were not kept.) passes: how often it was asked.
    """

    def __init__(self, llama: Llama):
        self.llama = llama
        self.passes = 0
        self.known: dict[tuple[int, ...], tuple[Vector, Vector]] = {}  # text: logits, hidden state
        self.layers: list[dict] = [{} for _ in range(llama.config.n_layers)]  # text: key, value
        self.nodes: list[tuple[int, ...]] = []  # the texts that this pass reads
        self.keys: list[tuple[int, ...]] = []   # the texts whose keys and values it needs

    def __call__(self, tokens: Sequence[int]) -> Vector:
        return self.last_rows(tokens, 1)[0]

    def last_rows(self, tokens: Sequence[int], n: int) -> Matrix:
        """Return logits after each of the last n prefixes, [n][vocab_size], in one pass."""
        rows = self.read([tuple(tokens)])  # of all prefixes, the shortest first
        return list(rows.values())[len(rows) - n:]

    def read(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Vector]:
        """Return {text: logits} for these texts and all their prefixes, from one pass."""
        nodes = prefixes(texts)
        self.passes += 1
        self.nodes = [text for text in nodes if text not in self.known]
        if self.nodes:
            # Keys and values that are there already come first, then those of the new nodes.
            self.keys = [text for text in nodes if text in self.known] + self.nodes
            rows = self.llama.forward([text[-1] for text in self.nodes], self,
                                      positions=[len(text) - 1 for text in self.nodes],
                                      mask=tree_mask(self.nodes, self.keys))
            self.known.update(zip(self.nodes, zip(rows, self.llama.inputs["output"])))
        return {text: self.known[text][0] for text in nodes}

    def update(self, layer: int, k: Matrix, v: Matrix) -> tuple[Matrix, Matrix]:
        """Keep the keys and values of the new nodes, and return those of self.keys."""
        cached = self.layers[layer]
        cached.update(zip(self.nodes, zip(k, v)))
        return [cached[text][0] for text in self.keys], [cached[text][1] for text in self.keys]

    def hidden_state(self, tokens: Sequence[int]) -> Vector | None:
        """Return the last hidden state after these tokens, or None if they were not read yet."""
        _, state = self.known.get(tuple(tokens), (None, None))
        return state


class ToyTarget:
    """A toy model that reads trees, as CachedModel does, with nothing cached."""

    def __init__(self, logits_fn: LogitsFn):
        self.logits_fn = logits_fn

    def read(self, texts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Vector]:
        """Return {text: logits} for these texts and all their prefixes."""
        return {text: self.logits_fn(text) for text in prefixes(texts)}


def prefixes(texts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return what these texts begin with, themselves included: each once, in order."""
    found = []
    for text in texts:
        found += [text[:end] for end in range(1, len(text) + 1)]
    return list(dict.fromkeys(found))


VOCAB_SIZE = 160      # every word of the rhyme is one token then
TARGET = {"dim": 20, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 24}
DRAFT = {"dim": 12, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 16}
STEP_TOKENS = 32      # read in each step of training
LEARNING_RATE = 0.04  # of the target
DRAFT_RATE = 0.055    # of everything that guesses, which is trained for fewer steps
WHO = ("man", "priest", "cock", "farmer", "cow", "maiden")


class DecodingLab:
    """What the sections share: the text, the prompts, and the models, trained when first needed."""

    def __init__(self, seed: int, steps: int):
        self.seed = seed
        self.steps = steps
        self.draft_steps = max(1, steps * 5 // 8)  # the same for everything that drafts
        self.tokenizer = Tokenizer.train(TEXT, VOCAB_SIZE)
        self.ids = self.tokenizer.encode(TEXT)
        self.eos = self.tokenizer.vocab.index("\n")
        self.prompts = [self.tokenizer.encode("This is the " + name) for name in WHO]

    def trained(self, sizes: dict[str, int], steps: int, rate: float) -> Llama:
        """Return a Llama of these sizes that has read the rhyme for so many steps."""
        model, _ = train(Config(VOCAB_SIZE, **sizes), self.ids, random.Random(self.seed), steps,
                         STEP_TOKENS, rate)
        return model

    @cached_property
    def target(self) -> Llama:
        """The model whose text is wanted."""
        return self.trained(TARGET, self.steps, LEARNING_RATE)

    @cached_property
    def reader(self) -> CachedModel:
        """The target with a cache that sections share: what one has read, others need not read."""
        return CachedModel(self.target)

    @cached_property
    def draft(self) -> Llama:
        """The smaller model."""
        return self.trained(DRAFT, self.draft_steps, DRAFT_RATE)

    @cached_property
    def medusa(self) -> list[Head]:
        """Two heads on the target."""
        return [train_head(self.target, self.ids, ahead, self.draft_steps) for ahead in (2, 3)]

    @cached_property
    def eagle(self) -> Head:
        """EAGLE's head on the target."""
        return train_head(self.target, self.ids, 2, self.draft_steps, sees_next=True)

    def cost(self, way: str) -> float:
        """Return what a guess costs, in passes of the target: weights read, as a share of its."""
        weights = {}  # lookahead and prompt lookup read none
        if way == "a smaller Llama":
            weights = self.draft.weights
        elif way == "EAGLE":
            weights = self.eagle
        elif way.startswith("Medusa"):
            weights = self.medusa[0]
        return weights_read(weights) / weights_read(self.target.weights)

    def name(self, token: int) -> str:
        """Return a token without its blank; a line end is a slash, and a blank alone is ␣."""
        text = self.tokenizer.vocab[token]
        return {"\n": "/", " ": "␣"}.get(text, text.strip())

    def tail(self, tokens: Sequence[int]) -> str:
        """Return the last four tokens of a text, with a slash for a line end."""
        return self.tokenizer.decode(tokens[-4:]).replace("\n", "/").strip()


def weights_read(weights: Weights) -> int:
    """Return how many weights a pass reads: all but the embeddings, of which it reads rows."""
    total = 0
    for name, w in weights.items():
        if name != "tok_embeddings":
            total += sum(len(row) for row in as_rows(w))
    return total


def check_request(
    prompt: Sequence[int], max_new_tokens: int, at_least: int = 0, **settings: int
) -> None:
    """Raise ValueError where a decoder cannot work. Each of settings must be at least 1."""
    if not prompt:
        raise ValueError("prompt must have at least one token: a model predicts what comes after "
                         "something")
    if max_new_tokens < at_least:
        raise ValueError(f"max_new_tokens must be at least {at_least}, not {max_new_tokens}")
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def check_eos(eos: int | None, vocab_size: int) -> None:
    """Raise ValueError if the end token is none of the vocabulary."""
    if eos is not None and not 0 <= eos < vocab_size:
        raise ValueError(f"eos must be a token id from 0 to {vocab_size - 1}, or None, not {eos}")


# Measures


def log_softmax(logits: Vector) -> Vector:
    """Return log softmax(logits) = logits - log Σ exp(logits), without overflow."""
    largest = max(logits)
    total = largest + math.log(math.fsum(math.exp(value - largest) for value in logits))
    return [value - total for value in logits]


def log_probability(logits_fn: LogitsFn, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """Return Σ log p(token | all before it), in nats."""
    rows = last_rows(logits_fn, [*prompt, *tokens][:-1], len(tokens))
    return sum(log_softmax(row)[token] for row, token in zip(rows, tokens))


def is_greedy(llama: Llama, prompt: Sequence[int], tokens: Sequence[int]) -> bool:
    """Return whether each token is the argmax of one plain pass over the text, without a cache."""
    return plain_choices(llama, (*prompt, *tokens)[:-1])[len(prompt) - 1:] == list(tokens)


@cache  # a text that several ways wrote is read once
def plain_choices(llama: Llama, text: tuple[int, ...]) -> list[int]:
    """Return the argmax after every token of a text."""
    return list(map(argmax, llama.forward(text)))


def random_model(name: str) -> LogitsFn:
    """Return a model with no sense over two tokens: for every text, normal logits of its own."""
    @cache
    def logits_of(text: tuple[int, ...]) -> Vector:
        rng = random.Random(f"{name} {text}")
        return [rng.gauss(0, 1.5), rng.gauss(0, 1.5)]

    return lambda tokens: logits_of(tuple(tokens))


def random_pair(seed: int) -> tuple[LogitsFn, LogitsFn]:
    """Return a random target and a random draft."""
    return random_model(f"target {seed}"), random_model(f"draft {seed}")


def distinct_bigrams(texts: Sequence[Sequence[int]]) -> float:
    """Return how many pairs of neighbouring tokens are different, as a share of all such pairs."""
    pairs: list[tuple[int, int]] = []
    for text in texts:
        pairs += zip(text, text[1:])
    return len(set(pairs)) / len(pairs)


def mean_if_any(values: Sequence[float]) -> float | None:
    """Return the mean of values, or None if there are none."""
    return fmean(values) if values else None


def standard_error(values: Vector) -> float:
    """Return the standard error of the mean of values."""
    return stdev(values) / math.sqrt(len(values))


def likeliest(p: Vector, n: int) -> list[int]:
    """Return the n tokens with the highest values, best first."""
    return sorted(range(len(p)), key=lambda i: -p[i])[:n]


def count_survivors(p: Vector) -> int:
    """Return how many tokens have any probability."""
    return sum(value > 0 for value in p)


def compare_words(a: float, b: float, more: str, less: str, same: str = "") -> str:
    """Return which of the words says how a compares to b."""
    if a == b:
        return same
    return more if a > b else less


# Pictures


def letters(text: Sequence[int]) -> str:
    """Return a text of a toy language."""
    return " ".join("ABC"[token] for token in text)


def quoted(text: str) -> list[str]:
    """Return a text, set in, with a slash for the end of a line."""
    text = printable(text.replace("\n", " / ").strip())
    return textwrap.wrap(text, WIDTH - 2, initial_indent="    ", subsequent_indent="    ")


# Training: skip this on a first reading
#
# The forward pass leaves in the model's .inputs what every operation read. The backward pass goes
# through the operations in the opposite order. Each takes the gradient of its output and returns
# those of its inputs, for whole matrices at a time, so that all the work is in dot() here as well.


def backward(model: Llama, tokens: Sequence[int], d_logits: Matrix) -> Weights:
    """Return {weight: its gradient} after forward(tokens), from the gradient of the logits."""
    c = model.config
    inputs = model.inputs
    gradients: Weights = {}
    unrotate = [-position for position in range(len(tokens))]

    def linear_back(name: str, d: Matrix) -> Matrix:
        d_x, gradients[name] = linear_backward(d, inputs[name], model.weights[name])
        return d_x

    def norm_back(name: str, d: Matrix) -> Matrix:
        d_x, gradients[name] = rms_norm_backward(d, inputs[name], model.weights[name], c.norm_eps)
        return d_x

    d = norm_back("norm", linear_back("output", d_logits))
    for layer in reversed(range(c.n_layers)):
        prefix = f"layers.{layer}."
        # Feed-forward: d goes past the block as it is, and through it.
        d_hidden = linear_back(prefix + "feed_forward.w2", d)
        d_gate, d_up = swiglu_backward(d_hidden, *inputs[prefix + "feed_forward"])
        d_h = add(linear_back(prefix + "feed_forward.w1", d_gate),
                  linear_back(prefix + "feed_forward.w3", d_up))
        d = add(d, norm_back(prefix + "ffn_norm", d_h))
        # Attention
        d_attended = linear_back(prefix + "attention.wo", d)
        d_q, d_k, d_v = attend_backward(d_attended, *inputs[prefix + "attention"],
                                        c.n_heads, c.n_kv_heads)
        d_q = rope_heads(d_q, unrotate, c.n_heads, c.rope_base)
        d_k = rope_heads(d_k, unrotate, c.n_kv_heads, c.rope_base)
        d_h = add(linear_back(prefix + "attention.wq", d_q),
                  linear_back(prefix + "attention.wk", d_k))
        d_h = add(d_h, linear_back(prefix + "attention.wv", d_v))
        d = add(d, norm_back(prefix + "attention_norm", d_h))
    # A token's gradient goes to its row of the embedding table.
    d_table = zeros_like(model.weights["tok_embeddings"])
    for token, row in zip(tokens, d):
        d_table[token] = list(map(operator.add, d_table[token], row))
    gradients["tok_embeddings"] = d_table
    return gradients


def linear_backward(d: Matrix, x: Matrix, w: Matrix) -> tuple[Matrix, Matrix]:
    """y = x wᵀ: return dx = d w and dw = dᵀ x."""
    d_x = linear(d, transpose(w))
    d_w = linear(transpose(d), transpose(x))
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
    d_keys = [zeros_like(head) for head in keys]
    d_values = [zeros_like(head) for head in values]
    for h, (queries, d_head) in enumerate(zip(split_heads(q, n_heads), split_heads(d, n_heads))):
        g = h // group
        scale = 1 / math.sqrt(len(queries[0]))
        # The weights, with zeros for the keys that a query does not see.
        p = [row + [0.0] * (len(k) - len(row)) for row in head_weights(queries, keys[g])]
        d_s = []
        for weights, d_p in zip(p, linear(d_head, values[g])):
            mean = dot(weights, d_p)
            d_s.append([w * (slope - mean) * scale for w, slope in zip(weights, d_p)])
        d_q, d_k = linear_backward(d_s, queries, keys[g])  # S is linear in q, with weights k
        d_queries.append(d_q)
        d_keys[g] = add(d_keys[g], d_k)
        d_values[g] = add(d_values[g], linear(transpose(p), transpose(d_head)))
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
    config: Config, weights: Weights, tokens: Sequence[int]
) -> tuple[float, Weights]:
    """Return the mean loss of predicting each token from those before it, and its gradients."""
    model = Llama(config, weights)
    loss, d_logits = cross_entropy(model.forward(tokens[:-1]), tokens[1:])
    return loss, backward(model, tokens[:-1], d_logits)


class Adam:
    """Steps scaled by running means of the gradient and of its square (Kingma & Ba 2015)."""

    def __init__(self, weights: Weights, beta1: float = 0.7, beta2: float = 0.95):
        self.rows = {name: as_rows(w) for name, w in weights.items()}
        self.mean = {name: zeros_like(rows) for name, rows in self.rows.items()}
        self.square = {name: zeros_like(rows) for name, rows in self.rows.items()}
        self.beta1 = beta1
        self.beta2 = beta2
        self.steps = 0

    def step(self, gradients: Weights, learning_rate: float) -> None:
        """Change the weights, in place."""
        self.steps += 1
        b1 = self.beta1
        b2 = self.beta2
        # The means start at zero; these undo that.
        rate = learning_rate / (1 - b1 ** self.steps)
        unbias = 1 / (1 - b2 ** self.steps)
        for name, gradient in gradients.items():
            rows = zip(self.rows[name], as_rows(gradient), self.mean[name], self.square[name])
            for w, d, m, v in rows:
                for i, slope in enumerate(d):
                    m[i] = b1 * m[i] + (1 - b1) * slope
                    v[i] = b2 * v[i] + (1 - b2) * slope * slope
                    w[i] -= rate * m[i] / (math.sqrt(v[i] * unbias) + 1e-8)


def as_rows(w: Matrix | Vector) -> Matrix:
    """Return a matrix as it is, and a vector as a matrix of one row; the numbers are not copied."""
    return w if isinstance(w[0], list) else [w]


def zeros_like(m: Matrix) -> Matrix:
    """Return zeros in the shape of m."""
    return [[0.0] * len(row) for row in m]


def init_weights(config: Config, rng: random.Random) -> Weights:
    """Return first weights: gains 1, embeddings of size 1, matrices of size 1/√in.

    Matrices that write to the residual stream get half of that.
    """
    weights: Weights = {}
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


# Training the heads, on the frozen target; skip this too


def train_head(
    llama: Llama, ids: Sequence[int], ahead: int, steps: int, sees_next: bool = False
) -> Head:
    """Return a head for the token `ahead` places on, trained on llama's hidden states.

    sees_next: an EAGLE head, which reads the embedding of the next token beside the state.
    """
    dim = llama.config.dim
    embeddings = llama.weights["tok_embeddings"]
    head = {"w1": [[0.0] * (2 * dim if sees_next else dim) for _ in range(dim)],
            "w2": [list(row) for row in llama.weights["output"]]}
    adam = Adam(head)
    batches = hidden_batches(llama, tuple(ids))
    for step in range(steps):
        start, h = batches[step % len(batches)]
        targets = ids[start + ahead:start + ahead + len(h)]
        h = h[:len(targets)]
        x = h
        if sees_next:
            x = concat(h, [embeddings[token] for token in ids[start + 1:start + 1 + len(h)]])
        adam.step(head_gradients(head, h, x, targets), DRAFT_RATE * (1 - step / steps))
    return head


def head_gradients(head: Head, h: Matrix, x: Matrix, targets: Sequence[int]) -> Head:
    """Return the gradients of the cross-entropy of w2 (h + silu(w1 x)) in the head's weights."""
    z = linear(x, head["w1"])
    mixed = add(h, silu(z))
    _, d_logits = cross_entropy(linear(mixed, head["w2"]), targets)
    d_mixed, d_w2 = linear_backward(d_logits, mixed, head["w2"])
    ones = [[1.0] * len(row) for row in z]
    d_z, _ = swiglu_backward(d_mixed, z, ones)
    d_w1 = linear(transpose(d_z), transpose(x))  # as in linear_backward(); x needs no gradient
    return {"w1": d_w1, "w2": d_w2}


@cache
def hidden_batches(llama: Llama, ids: tuple[int, ...]) -> list[tuple[int, Matrix]]:
    """Return (start, hidden states) for every STEP_TOKENS tokens of ids."""
    batches = []
    for start in range(0, len(ids) - STEP_TOKENS // 2, STEP_TOKENS):
        llama.forward(ids[start:start + STEP_TOKENS])
        batches.append((start, llama.inputs["output"]))
    return batches


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


def merge_pair(parts: Sequence[str], pair: tuple[str, str]) -> tuple[str, ...]:
    """Return parts with every occurrence of pair joined, from the left."""
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


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
        words = Counter(map(tuple, split_words(text)))  # {the parts of a word: how often it comes}
        while len(vocab) < vocab_size:
            pairs: Counter[tuple[str, str]] = Counter()
            for parts, count in words.items():
                for pair in zip(parts, parts[1:]):
                    pairs[pair] += count
            if not pairs:
                break
            # The most frequent pair; of equally frequent ones, the one that sorts first.
            best = min(pairs, key=lambda pair: (-pairs[pair], pair))
            merges.append(best)
            if "".join(best) not in vocab:
                vocab.append("".join(best))
            words = {merge_pair(parts, best): count for parts, count in words.items()}
        return cls(vocab, merges)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of text: within each word, the merges in the order of learning.

        ValueError names a character that the vocabulary does not have.
        """
        ids = {token: i for i, token in enumerate(self.vocab)}
        unknown = set(text) - set(ids)
        if unknown:
            known = "".join(token for token in self.vocab if len(token) == 1)
            raise ValueError(f"the vocabulary has no character {min(unknown)!r}; it knows "
                             f"{known!r}")
        words = split_words(text)
        parts = {word: tuple(word) for word in words}
        for pair in self.merges:
            parts = {word: merge_pair(split, pair) for word, split in parts.items()}
        return [ids[part] for word in words for part in parts[word]]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text that these token ids stand for."""
        return "".join(self.vocab[i] for i in ids)


# Printing

WIDTH = 80  # columns of the trace
# What an output that cannot show these characters gets: one for one, then several for one.
ASCII = str.maketrans("█▓▒░·│─┴␣×Δ", "#*+:.|-+_xd") | str.maketrans({
    "→": "->", "←": "<-", "…": "...", "√": "sqrt ", "Σ": "sum ", "ᵀ": "^T", "²": "^2", "±": "+-",
    "α": "alpha", "β": "beta", "γ": "gamma",
})


def printable(text: str) -> str:
    """Return text with everything escaped that a terminal would obey instead of showing."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def display_width(text: str) -> int:
    """Return the columns that text takes: East Asian wide characters two, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    combining = sum(unicodedata.combining(c) > 0 for c in text)
    return len(text) + wide - combining


def bar(value: float, full: float, width: int) -> str:
    """Return a bar of value / full times width characters; a dot for a value too small to draw."""
    if value <= 0:
        return ""
    return "█" * round(width * value / full) or "·"


def format_cell(value: object, form: str) -> str:
    """Return a value as text: form is a format specification, or a template with braces."""
    if value is None:
        return ""
    return form.format(value) if "{" in form else format(value, form)


class Trace:
    """Prints the sections and their checks, as the output can show them, and counts the checks.

    predict: ask the reader for each result before it is shown. self_tests: list those that hold.
    """

    def __init__(self, ascii_only: bool = False, predict: bool = False, self_tests: bool = False):
        encoding = sys.stdout.encoding or "ascii"
        self.ascii = ascii_only or b"?" in "".join(map(chr, ASCII)).encode(encoding, "replace")
        self.colour = (sys.stdout.isatty() and "NO_COLOR" not in os.environ
                       and os.environ.get("TERM", "dumb") != "dumb")
        self.predict = predict
        self.listening = sys.stdin is not None and sys.stdin.isatty()  # is there anybody to answer?
        self.list_self_tests = self_tests
        self.in_self_tests = False     # are the checks that come now self-tests?
        self.unlisted = 0              # self-tests of this section that held and are not listed,
        self.all_unlisted = 0          # and of all sections
        self.held = self.failed = 0    # checks
        self.asked = self.right = 0    # predictions
        self.unwritten = []            # numbers of sections that wait for a function
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
        is said after " as ". What has a format goes to the right. None is an empty cell.
        """
        printed = []
        for column, form in columns.items():
            field, _, heading = column.partition(" as ")
            heading = heading or field.replace("_", " ")
            values = [row[field] if isinstance(row, dict) else getattr(row, field) for row in rows]
            form, _, bars = form.partition("bar ")
            if form or not bars:
                cells = [format_cell(value, form.strip()) for value in values]
                printed.append(self.pad([heading, *cells], to_the_right=form != ""))
                heading = ""
            if bars:
                width, _, full = bars.partition(" of ")
                largest = float(full) if full else max(values, default=0)
                cells = [bar(value, largest, int(width)) for value in values]
                printed.append(self.pad([heading, *cells], to_the_right=False))
        for i, cells in enumerate(zip(*printed)):
            self.lines(["  ".join(cells)], "2" if i == 0 else "")

    def pad(self, cells: list[str], to_the_right: bool) -> list[str]:
        """Return cells filled up with blanks to the same width."""
        cells = [self.plain(cell) for cell in cells]
        width = max(map(display_width, cells))
        padded = []
        for cell in cells:
            blanks = " " * (width - display_width(cell))
            padded.append(blanks + cell if to_the_right else cell + blanks)
        return padded

    def check(self, claim: str, holds: bool, evidence: str) -> None:
        """Print one check: what is claimed, and what was compared. A failure makes the status 1."""
        self.held += holds
        self.failed += not holds
        if holds and self.in_self_tests and not self.list_self_tests:
            self.unlisted += 1
        else:
            self.verdict(holds, f"{claim} ({evidence})")

    def verdict(self, holds: bool, claim: str) -> None:
        """Print a claim behind "ok" or "FAIL"."""
        if not self.in_checks:
            self.lines([""])
        mark, style = ("ok    ", "32") if holds else ("FAIL  ", "1;31")
        wrapped = textwrap.wrap(self.plain(claim), WIDTH, initial_indent=mark,
                                subsequent_indent=" " * 6)
        self.lines(wrapped, style)
        self.in_checks = True

    def check_close(self, claim: str, got: Matrix, expected: Matrix, bound: float) -> None:
        """Check that two matrices have one shape, and differ by less than bound in every place."""
        close = list(map(len, got)) == list(map(len, expected))
        for a, b in zip(got, expected):
            close = close and all(abs(x - y) < bound for x, y in zip(a, b))
        self.check(claim, close, f"max |Δ| < {bound:.0e}")

    def self_tests(self) -> None:
        """Take the section's checks from here on as self-tests.

        They test its functions on small examples, and nothing that the section shows. One line
        counts those that hold, unless the reader wants them listed.
        """
        self.in_self_tests = True

    def end_section(self) -> None:
        """Print how many self-tests held without being listed."""
        if self.unlisted:
            noun = "self-test" if self.unlisted == 1 else "self-tests"
            self.verdict(True, f"{self.unlisted} {noun} of these functions (--self-tests lists "
                               "them)")
        self.all_unlisted += self.unlisted
        self.unlisted = 0
        self.in_self_tests = False

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
        if isinstance(answer, str):
            reply = self.hear("  your answer (Enter: pass) > ")
            right = reply.casefold() == shown.casefold()
        else:
            reply = self.hear("  your number, within a tenth of it (Enter: pass) > ")
            number = read_number(reply)
            while reply and number is None:
                reply = self.hear("  a number, such as 12, 0.5, 50% or 1/2 > ")
                number = read_number(reply)
            right = number is not None and abs(number - answer) <= abs(answer) / 10
        verdict = ""
        if reply:
            self.asked += 1
            self.right += right
            verdict = ": yes" if right else ": not quite"
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


def read_number(reply: str) -> float | None:
    """Return the number that reply is, or None; 1,234, 33% and 1/3 are numbers."""
    above, _, below = reply.rstrip("%×x ").replace(",", "").partition("/")
    try:
        number = float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        return None
    return number / 100 if reply.endswith("%") else number


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
    """Return an argparse type: a whole number from low, which is at least 0, to high."""
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise ArgumentTypeError(f"must be a whole number from {low} to {high}, not {text!r}")
        return int(text)
    return parse


def common_parser(prog: str, description: str, n_sections: int) -> OneLineParser:
    """Return a parser with the options that all five scripts have; a script adds its own knobs."""
    parser = OneLineParser(prog=prog, description=description, allow_abbrev=False,
                           formatter_class=lambda prog: HelpFormatter(prog, width=WIDTH))
    parser.add_argument("--list", action="store_true", help="list the sections and stop")
    number = whole_number(1, n_sections)
    parser.add_argument("--section", metavar="N[,N...]", action="extend",
                        type=lambda text: [number(part) for part in text.split(",")],
                        help="run only these sections (may be repeated)")
    parser.add_argument("--seed", metavar="N", type=whole_number(0, 10**9), default=0,
                        help="seed of all randomness (default 0)")
    parser.add_argument("--ascii", action="store_true", help="print no character outside ASCII")
    parser.add_argument("--time", action="store_true",
                        help="print the seconds each section took, on stderr")
    parser.add_argument("--predict", action="store_true",
                        help="be asked for each section's result before it is shown")
    parser.add_argument("--self-tests", action="store_true",
                        help="list the checks on small examples, too, instead of their number")
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
    missing = None
    try:
        section.show(trace, knobs)
    except NotImplementedError as error:
        missing = error
    trace.end_section()
    if missing is not None:
        trace.unwritten.append(number)
        trace.say(f"Not written yet: {missing}. This section goes on once it is.")
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
        if trace.all_unlisted:
            summary[-1] += f" (Self-tests: {trace.all_unlisted}.)"
    else:
        summary.append("No check was reached.")
    if trace.unwritten:
        numbers = ", ".join(map(str, trace.unwritten))
        waiting = "Section {} waits" if len(trace.unwritten) == 1 else "Sections {} wait"
        summary += textwrap.wrap(f"{waiting.format(numbers)} for a function.", WIDTH)
    if trace.asked:
        summary.append(f"Predictions: {trace.right} of {trace.asked} right.")
    trace.lines([*summary, f"Try next: {next_experiment}"], "1")


def run_sections(sections: Sequence[Section], knobs: Namespace, next_experiment: str) -> int:
    """Print the chosen sections and return the exit status.

    0: every check held. 1: one failed, or a function is not written yet. 130: Ctrl-C. A reader who
    closes the pipe ends the trace quietly.
    """
    if sys.stdout is None:
        return 1  # there is nowhere to print
    try:
        trace = Trace(knobs.ascii, knobs.predict, knobs.self_tests)
        if knobs.list:
            list_sections(trace, sections)
        else:
            for number, section in enumerate(sections, 1):
                if not knobs.section or number in knobs.section:
                    run_section(trace, number, section, knobs)
            print_summary(trace, next_experiment)
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
    Section("Greedy", show_greedy, [greedy, extend_by, argmax]),
    Section("Shaping the distribution", show_filters,
            [apply_temperature, top_k_filter, top_p_filter, min_p_filter, typical_filter,
             repetition_penalty, distribution]),
    Section("Sampling done right", show_sampling, [sample, sampler, draw, every_outcome]),
    Section("Beam search", show_beam, [beam_search, extensions, diverse_beam_search, exact_search]),
    Section("Speculative decoding", show_speculative,
            [speculative_greedy, in_rounds, speculate, verify, speculative_sample, acceptance,
             residual]),
    Section("When it pays", show_when_it_pays, [expected_tokens, speed_up]),
    Section("Prompt lookup: guesses for nothing", show_prompt_lookup, [prompt_lookup], core=False),
    Section("Medusa, and how a tree is verified", show_medusa,
            [medusa_head, medusa_paths, tree_mask, verify_tree, medusa_decode]),
    Section("EAGLE", show_eagle, [eagle_step, eagle_guesses], core=False),
    Section("Lookahead decoding", show_lookahead, [lookahead_decode], core=False),
    Section("Text with a shape", show_constrained, [follow, constrain]),
]


def decimal(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """Return an argparse type: a number from low (or above it) to high."""
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or above and value == low:
            bounds = f"from {low:g} to {high:g}"
            if above:
                bounds = f"above {low:g} and at most {high:g}"
            raise ArgumentTypeError(f"must be a number {bounds}, not {text!r}")
        return value
    return parse


def main(argv: Sequence[str] | None = None) -> int:
    """Print the trace and return the exit status."""
    parser = common_parser("microbeam", "From logits to text: decoding, and speculative decoding.",
                           len(SECTIONS))
    parser.add_argument("--prompt", default=PROMPT,
                        help=f"the text to go on from (default: {PROMPT!r})")
    for option, kind, default, text in (
        ("--max-new-tokens", whole_number(1, 64), MAX_NEW_TOKENS, "tokens generated"),
        ("--temperature", decimal(0.05, 10), TEMPERATURE, "divides the logits"),
        ("--top-k", whole_number(1, 999), TOP_K, "tokens that top-k keeps"),
        ("--top-p", decimal(0, 1, above=True), TOP_P, "probability that top-p keeps"),
        ("--min-p", decimal(0, 1), MIN_P, "share of the best probability that min-p asks for"),
        ("--width", whole_number(1, 16), BEAM_WIDTH, "candidates that beam search keeps"),
        ("--length-penalty", decimal(-2, 4), LENGTH_PENALTY, "score = log p / length^this"),
        ("--gamma", whole_number(1, 16), GAMMA, "guesses before each pass of the target"),
        ("--steps", whole_number(1, 100), STEPS, "of training; fewer make the models less sure"),
    ):
        parser.add_argument(option, metavar="N" if isinstance(default, int) else "X", type=kind,
                            default=default, help=f"{text} (default {default:g})")
    knobs = parser.parse_args(argv)

    knobs.lab = DecodingLab(knobs.seed, knobs.steps)
    try:
        knobs.tokens = knobs.lab.tokenizer.encode(knobs.prompt)
    except ValueError as error:
        parser.error(f"argument --prompt: {error}")
    if not 0 < len(knobs.tokens) <= MAX_PROMPT:
        parser.error(f"argument --prompt: must have from 1 to {MAX_PROMPT} tokens, "
                     f"not {len(knobs.tokens)}")
    return run_sections(SECTIONS, knobs, "python3 microbeam.py --section 5,6 --gamma 8")


if __name__ == "__main__":
    sys.exit(main())
