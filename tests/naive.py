"""A naive reference for guided decoding that caches nothing, and the requests it is compared on."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tiny import tiny_base, tiny_value

from vas.decoding.cache import KVCache
from vas.decoding.engine import Engine
from vas.decoding.sampler import BLOCK, entrants, fork, gumbels
from vas.decoding.scorer import Scorer, make_scorer
from vas.decoding.sequence import Completion, GuidanceParams, Request, SamplingParams
from vas.models.base import BaseModel

NEVER = float("-inf")
VOCAB = 290
LAYERS = 3  # of the base models

ONE = {"positive": 2.0}
TWO = {"positive": 1.5, "concise": -1.0}
BOTH = {"positive": 1.0, "formal": 2.0}
ALL = {"positive": 1.0, "concise": 2.0, "formal": -0.7}


def prompts(*lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(4, VOCAB, length).tolist()) for length in lengths]


def request(
    name: str,
    prompt: tuple[int, ...],
    objectives: dict | None = None,
    candidates: int = 4,
    value: str = "expected",
    baseline: str = "policy",
    outside: str = "keep",
    candidate_mass: float = 1.0,
    schedule: str = "token",
    **sampling,
) -> Request:
    guidance = GuidanceParams(objectives or {}, candidates, value, baseline, outside, candidate_mass, schedule)
    return Request(name, prompt, SamplingParams(**({"max_tokens": 12} | sampling)), guidance)


def also_ending_with(base: BaseModel, *tokens: int) -> BaseModel:
    """The same model with more tokens that end a response."""
    return dataclasses.replace(base, eos_token_ids=(*base.eos_token_ids, *tokens))


def before_draws(engine: Engine, check: Callable[[list], object]) -> Engine:
    """Call `check` with the sequences before each draw of an engine; what it raises is a step's failure."""
    draw = engine._stepper._draw
    engine._stepper._draw = lambda drawable: (check(drawable.sequences), draw(drawable))[1]
    return engine


def rows_in_use(engine: Engine) -> list[int]:
    """Rows in use in the cache of the base model and of every scorer."""
    return [len(engine._runner.cache), *(len(scorer._runner.cache) for scorer in engine._scorers)]


def drain(engine: Engine, after_step: Callable[[], object] = lambda: None) -> dict[str, Completion]:
    """Step until nothing is left to do; the completions by their requests' ids."""
    done = {}
    while engine.busy:
        for token in engine.step():
            if token.finish_reason:
                done[token.request_id] = engine.take(token.request_id)
        after_step()
    return done


def assert_within(limit: int, caches: list[KVCache]) -> None:
    """Each cache takes so many tokens of memory at most."""
    for rows, _, columns, _ in (cache.keys[0].shape for cache in caches if cache.keys):
        assert rows * columns <= limit


@dataclasses.dataclass
class Naive:
    """What the reference decodes."""

    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    guided_logprobs: list[float] = dataclasses.field(default_factory=list)
    kl: float = 0.0
    guided_steps: int = 0
    outside: list[bool] = dataclasses.field(default_factory=list)
    """For each token whether it was no candidate."""
    candidates: int = 0
    """Over all steps."""
    policies: list[tuple[list[float], list[float]]] = dataclasses.field(default_factory=list)
    """log π0 and log π of every token of the vocabulary, a pair a step."""

    def ended(self, base: BaseModel, sampling: SamplingParams) -> bool:
        """Whether EOS, a stop string or max_tokens has come."""
        text = base.tokenizer.decode(self.token_ids, skip_special_tokens=True)
        return (
            any(token in base.eos_token_ids for token in self.token_ids[-1:])
            or len(self.token_ids) == sampling.max_tokens
            or any(stop in text for stop in sampling.stop)
        )


def log_softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    total = top + math.log(sum(math.exp(score - top) for score in scores))
    return [score - total for score in scores]


def naive_policy(logits: list[float], sampling: SamplingParams) -> list[float]:
    """log π0 with temperature and truncation."""
    logprobs = log_softmax([logit / (sampling.temperature or 1.0) for logit in logits])
    kept = sorted(range(len(logits)), key=lambda token: -logprobs[token])
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.top_p < 1:
        mass, before, nucleus = sum(math.exp(logprobs[token]) for token in kept), 0.0, []
        for token in kept:
            if before / mass >= sampling.top_p:
                break
            nucleus.append(token)
            before += math.exp(logprobs[token])
        kept = nucleus
    floor = math.log(sampling.min_p) + logprobs[kept[0]] if sampling.min_p else NEVER
    keep = {token for token in kept if logprobs[token] >= floor}
    return log_softmax([logprob if token in keep else NEVER for token, logprob in enumerate(logprobs)])


def naive_values(model, prefix: list[int], token: int, strengths: dict[str, float], soft: bool) -> dict:
    """Each objective's value of the prefix and a candidate, from one pass over all of it."""
    values = {}
    if model.scores_vocabulary:  # u(s)·e_a, of the state before the candidate
        state = model.hidden(torch.tensor([prefix]))[0, -1]
        state = state / state.square().mean().sqrt()
        embedding = model.get_input_embeddings().weight[token]
        for name, head in zip(model.objectives, model.heads, strict=True):
            between = (head.hidden.weight @ state + head.hidden.bias).tolist()
            between = torch.tensor([x / (1 + math.exp(-x)) for x in between], dtype=state.dtype)
            u = head.linear.weight @ between + head.linear.bias
            values[name] = sum(a * b for a, b in zip(u.tolist(), embedding.tolist(), strict=True))
            values[name] /= math.sqrt(sum(b * b for b in embedding.tolist())) or 1.0  # a token may have none
        return values
    outputs = model.outputs(model.hidden(torch.tensor([[*prefix, token]]))[0, -1])
    for name, head, output in zip(model.objectives, model.heads, outputs, strict=True):
        if not hasattr(head, "centers"):
            values[name] = output.item()
            continue
        chances, centers = [math.exp(p) for p in log_softmax(output.tolist())], head.centers.tolist()
        beta = strengths.get(name, 0.0)
        if soft and beta:
            tilted = sum(p * math.exp(beta * center) for p, center in zip(chances, centers, strict=True))
            values[name] = math.log(tilted) / beta
        else:
            values[name] = sum(p * center for p, center in zip(chances, centers, strict=True))
    return values


def naive_guided(base, models, prefix, logprobs, guidance: GuidanceParams) -> tuple[list[float], set[int]]:
    """log π and the candidates: π(a|s) ∝ π0(a|s)·exp(Σ_j β_j·A_j(s,a))."""
    likeliest, mass = [], 0.0
    for token in sorted(range(len(logprobs)), key=lambda token: -logprobs[token])[: guidance.candidates]:
        if mass >= guidance.candidate_mass and guidance.candidate_mass < 1:
            break
        likeliest.append(token)
        mass += math.exp(logprobs[token])
    candidates = [t for t in {*likeliest, *base.eos_token_ids} if logprobs[t] > NEVER]
    if guidance.baseline == "mean":
        weights = dict.fromkeys(candidates, 1.0)
    else:
        weights = {token: math.exp(logprobs[token]) for token in candidates}
    tilt = dict.fromkeys(candidates, 0.0)
    for model in models:
        if not any(guidance.objectives.get(name) for name in model.objectives):
            continue
        soft = guidance.value == "soft"
        values = {t: naive_values(model, prefix, t, guidance.objectives, soft) for t in candidates}
        for name in model.objectives:
            baseline = sum(weights[t] * values[t][name] for t in candidates) / sum(weights.values())
            for token in candidates:
                tilt[token] += guidance.objectives.get(name, 0.0) * (values[token][name] - baseline)
    outside = NEVER if guidance.outside == "drop" else 0.0
    guided = [p + tilt.get(token, outside) for token, p in enumerate(logprobs)]
    return log_softmax(guided), set(candidates)


def next_policy(base: BaseModel, prefix: list[int], sampling: SamplingParams) -> list[float]:
    """log π0 of the next token, from one pass over the whole prefix."""
    logits = base.model(torch.tensor([prefix])).logits[0, -1].double().tolist()
    for biased, amount in sampling.logit_bias.items():
        logits[biased] += amount
    return naive_policy(logits, sampling)


def draw(logprobs: list[float], seed: int, position: int) -> int:
    """Two races with a seed's and a position's noise: of blocks of tokens, and of the tokens of the one that won."""
    noise = gumbels([seed], [position], entrants(len(logprobs)))[0].tolist()
    blocks = [logprobs[start : start + BLOCK] for start in range(0, len(logprobs), BLOCK)]
    masses = [math.log(mass) if (mass := sum(map(math.exp, block))) else NEVER for block in blocks]
    block = _winner(masses, noise[: len(blocks)])
    return block * BLOCK + _winner(blocks[block], noise[len(blocks) :])


def _winner(logprobs: list[float], noise: list[float]) -> int:
    times = [p + g for p, g in zip(logprobs, noise, strict=False)]
    return times.index(max(times))


@torch.inference_mode()
def naive(base: BaseModel, models: list, asked: Request) -> Naive:
    """Decode a request the slow way: every prefix and every candidate from scratch, one at a time."""
    result, prefix = Naive(), list(asked.prompt_token_ids)
    while not result.ended(base, asked.sampling):
        logprobs = next_policy(base, prefix, asked.sampling)
        guided, candidates = logprobs, set()
        entropy = -sum(math.exp(p) * p for p in logprobs if p > NEVER)
        threshold = asked.guidance.entropy_threshold
        if any(asked.guidance.objectives.values()) and (threshold is None or entropy > threshold):
            result.guided_steps += 1
            guided, candidates = naive_guided(base, models, prefix, logprobs, asked.guidance)
        if asked.sampling.temperature == 0:
            token = max(range(len(guided)), key=guided.__getitem__)
        else:
            token = draw(guided, asked.sampling.seed, len(result.token_ids))
        result.token_ids.append(token)
        result.logprobs.append(logprobs[token])
        result.guided_logprobs.append(guided[token])
        result.kl += sum(math.exp(p) * (p - q) for p, q in zip(guided, logprobs, strict=True) if p > NEVER)
        result.outside.append(token not in candidates)
        result.candidates += len(candidates)
        result.policies.append((logprobs, guided))
        prefix.append(token)
    return result


@torch.inference_mode()
def naive_blocks(base: BaseModel, models: list, asked: Request) -> Naive:
    """Decode a request with the schedule `block:b`: k continuations from π0, one drawn by exp(Σ β·V)."""
    result, sampling, guidance = Naive(), asked.sampling, asked.guidance
    while not result.ended(base, sampling):
        start = len(result.token_ids)
        before = [*asked.prompt_token_ids, *result.token_ids]
        continuations, tilts = [], []
        for number in range(guidance.candidates):
            tokens, logprobs = [], []
            while len(tokens) < min(guidance.block_size, sampling.max_tokens - start):
                policy = next_policy(base, [*before, *tokens], sampling)
                tokens.append(draw(policy, fork(sampling.seed, number), start + len(tokens)))
                logprobs.append(policy[tokens[-1]])
                if tokens[-1] in base.eos_token_ids:
                    break
            values, active = {}, guidance.active
            for model in [m for m in models if not active.isdisjoint(m.objectives)]:
                soft = guidance.value == "soft"
                values |= naive_values(model, [*before, *tokens[:-1]], tokens[-1], guidance.objectives, soft)
            tilts.append(sum(guidance.objectives[name] * values[name] for name in active))
            continuations.append((tokens, logprobs))
        weights = log_softmax(tilts)
        chosen = tilts.index(max(tilts)) if sampling.temperature == 0 else draw(weights, fork(sampling.seed, -1), start)
        result.guided_steps += 1
        tokens, logprobs = continuations[chosen]
        for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            last = place == len(tokens) - 1  # the choice counts as part of the last token
            result.token_ids.append(token)
            result.logprobs.append(logprob)
            result.guided_logprobs.append(logprob + last * (weights[chosen] + math.log(len(weights))))
            result.kl += last * sum(math.exp(p) * (p + math.log(len(weights))) for p in weights)
            if result.ended(base, sampling):
                break
    return result


def assert_same(completion, expected: Naive):
    assert completion.token_ids == expected.token_ids
    assert completion.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
    assert completion.guided_logprobs == pytest.approx(expected.guided_logprobs, abs=1e-4)
    assert completion.kl == pytest.approx(expected.kl, abs=1e-4)
    assert completion.guided_steps == expected.guided_steps


def guided_setup(arch: str, ending: tuple[int, ...] = (83,)) -> tuple[BaseModel, list, Engine]:
    """A base model and two value models that differ in architecture, depth and head, in float64."""
    base = also_ending_with(tiny_base(arch, torch.float64), *ending)
    other = "gpt2" if arch != "gpt2" else "llama"
    models = [
        tiny_value(arch, ("positive", "concise"), "categorical", torch.float64, layers=2),
        tiny_value(other, ("formal",), "scalar", torch.float64, layers=3, seed=8),
    ]
    return base, models, Engine(base, scorers_of(models))


def scorers_of(models: list) -> list[Scorer]:
    return [make_scorer("+".join(model.objectives), model) for model in models]


def mixed_requests() -> list[Request]:
    """Every kind of request, in one batch, with prompts of 1 to 18 tokens."""
    p = prompts(7, 1, 18, 3, 11, 2, 9, 14, 5, 8, 12, 4, 6, 10)
    return [
        request("plain", p[0], seed=0),
        request("plain greedy", p[1], temperature=0),
        request("one objective", p[2], ONE, seed=1),
        request("one objective greedy", p[3], ONE, temperature=0, candidates=5),
        request("two objectives of one model", p[4], TWO, seed=2, candidates=6),
        request("the other model alone", p[5], {"formal": 3.0}, seed=3, candidates=3),
        request("both models", p[6], BOTH, seed=4, candidates=5, temperature=0.7),
        request("both models greedy", p[7], ALL, candidates=6, temperature=0, max_tokens=7),
        request("outside dropped", p[8], BOTH, seed=5, outside="drop", max_tokens=15),
        request("mean baseline", p[9], TWO, seed=6, baseline="mean", candidates=5),
        request("soft", p[10], ALL, seed=7, value="soft", candidates=4),
        request("soft, mean, drop", p[11], TWO, seed=8, value="soft", baseline="mean", outside="drop"),
        request("truncated", p[12], ALL, seed=9, top_p=0.5, top_k=40, temperature=1.3, candidates=6),
        request("min_p and a strength of 0", p[13], {"positive": 0.0, "formal": 2.0}, seed=10, min_p=0.05),
        request("strengths of 0", p[0], {"positive": 0.0, "formal": 0.0}, seed=11),
        request("adaptive k", p[2], BOTH, seed=13, candidates=30, candidate_mass=0.6),
        request("adaptive k of one token", p[3], ONE, seed=14, candidates=30, candidate_mass=0.01),
        request("entropy schedule", p[4], ALL, seed=15, candidates=6, schedule="entropy:3.2", max_tokens=20),
        request("entropy schedule, greedy", p[6], BOTH, temperature=0, schedule="entropy:3", candidates=5),
        request("never uncertain enough", p[5], ONE, seed=16, schedule="entropy:99"),
        request("logit_bias", p[8], TWO, seed=17, candidates=5, logit_bias={7: 4.0, 83: -100.0, 9: -3.5}),
        request("all tokens are candidates", p[1], ONE, seed=12, candidates=1000, max_tokens=2),
    ]


def counting(engine: Engine, monkeypatch) -> list[int]:
    """The tokens of each pass of the base model from now on."""
    ran = []
    forward = engine._runner._forward
    start = forward.start
    monkeypatch.setattr(forward, "start", lambda ids, *rest: ran.append(len(ids)) or start(ids, *rest))
    return ran


def alone(asked: Request) -> list[int]:
    """A request's tokens in an engine of its own that reads prompts in passes of their own."""
    return whole_alone(asked).token_ids


def whole_alone(asked: Request) -> Completion:
    """All that becomes of a request in such an engine."""
    base, models, _ = guided_setup("llama", ending=())
    engine = Engine(base, scorers_of(models))
    engine._scheduler.joint = 0
    return engine.generate([asked])[0]


def assert_as_alone(done: dict[str, Completion], requests: list[Request]) -> None:
    """These requests, and no others, are done, with the tokens that each has alone."""
    assert {name: each.token_ids for name, each in done.items()} == {each.request_id: alone(each) for each in requests}
