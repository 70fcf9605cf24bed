"""The guided decoding engine against `generate` and against a naive reference that caches nothing."""

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import CONTEXT, tiny_base, tiny_tokenizer, tiny_value

from vas.decoding.cache import COLUMNS, ROWS
from vas.decoding.detokenizer import Detokenizer
from vas.decoding.engine import Engine
from vas.decoding.sampler import uniforms
from vas.decoding.scorer import ValueScorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError
from vas.models.base import BaseModel

NEVER = float("-inf")
VOCAB = 290


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


def rows_in_use(engine: Engine) -> list[int]:
    """Rows in use in the cache of the base model and of every scorer."""
    return [len(engine._runner.cache), *(len(scorer._runner.cache) for scorer in engine._scorers)]


# --- without guidance: what `generate` gives ---------------------------------------------------


def hugging_face_greedy(base: BaseModel, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = base.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_tokens,
        eos_token_id=list(base.eos_token_ids),
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2", "mistral", "gemma2", "gemma3"])
def test_greedy_without_guidance_is_generate(arch):
    base = tiny_base(arch)
    several = prompts(9, 1, 23, 4, 15, 2)
    limits = [20, 25, 3, 40, 1, 30]
    # a token that the third response would hold ends some responses early
    eos = hugging_face_greedy(base, several[3], 40)[10]
    base = also_ending_with(base, eos)
    expected = [hugging_face_greedy(base, prompt, limit) for prompt, limit in zip(several, limits, strict=True)]

    def check(completions, expected):
        for completion, tokens in zip(completions, expected, strict=True):
            assert completion.token_ids == tokens
            assert completion.finish_reason == ("stop" if tokens[-1] in base.eos_token_ids else "length")
            assert completion.text == base.tokenizer.decode(tokens, skip_special_tokens=True)
            assert completion.kl == 0
            assert completion.guided_logprobs == completion.logprobs

    requests = [
        request(f"r{i}", prompt, temperature=0, max_tokens=limit)
        for i, (prompt, limit) in enumerate(zip(several, limits, strict=True))
    ]
    ragged = Engine(base).generate(requests)
    check(ragged, expected)
    assert {completion.finish_reason for completion in ragged} == {"stop", "length"}
    check(Engine(base).generate(requests[3:4]), expected[3:4])


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_logprobs_are_the_models(arch):
    base = tiny_base(arch)
    requests = [request(f"r{i}", prompt, seed=i) for i, prompt in enumerate(prompts(8, 1, 17))]
    for asked, completion in zip(requests, Engine(base).generate(requests), strict=True):
        ids = [*asked.prompt_token_ids, *completion.token_ids]
        logprobs = torch.log_softmax(base.model(torch.tensor([ids])).logits[0].double(), -1)
        start = len(asked.prompt_token_ids) - 1
        expected = [logprobs[start + t, token].item() for t, token in enumerate(completion.token_ids)]
        assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.8, "top_k": 7},
        {"temperature": 1.2, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    ],
    ids=str,
)
def test_sampled_tokens_follow_the_probabilities_of_generate(knobs):
    base, count = tiny_base("llama"), 1500
    (prompt,) = prompts(6, seed=3)

    def probabilities(tokens):
        """Of the next token, from the scores that `generate` samples from."""
        ids = torch.tensor([tokens])
        settings = {"top_k": 0, "top_p": 1.0, "max_new_tokens": 1, "pad_token_id": 0, **knobs}
        out = base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
        return torch.softmax(out.scores[0][0].double(), -1)

    first = probabilities(prompt)
    expected = {}
    for one in first.nonzero().flatten().tolist():
        if one in base.eos_token_ids:
            expected[one,] = first[one].item()
            continue
        second = probabilities((*prompt, one))
        for two in second.nonzero().flatten().tolist():
            expected[one, two] = (first[one] * second[two]).item()
    assert sum(expected.values()) == pytest.approx(1)

    requests = [request(str(seed), prompt, seed=seed, max_tokens=2, **knobs) for seed in range(count)]
    completions = Engine(base, max_sequences=count).generate(requests)
    seen = dict.fromkeys(expected, 0)
    for completion in completions:
        pair = tuple(completion.token_ids)
        seen[pair] += 1  # an excluded token would be a KeyError
        assert sum(completion.logprobs) == pytest.approx(math.log(expected[pair]), abs=1e-4)
    likely = [pair for pair, p in expected.items() if p * count >= 8]
    assert len(likely) > 20
    counts = [seen[pair] for pair in likely] + [count - sum(seen[pair] for pair in likely)]
    chances = [expected[pair] for pair in likely]
    assert stats.chisquare(counts, np.array([*chances, 1 - sum(chances)]) * count).pvalue > 0.01


# --- with guidance: a naive reference ----------------------------------------------------------


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
    outputs = model.outputs(model.hidden(torch.tensor([[*prefix, token]]))[0, -1])
    values = {}
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


@torch.inference_mode()
def naive(base: BaseModel, models: list, asked: Request) -> Naive:
    """Decode a request the slow way: every prefix and every candidate from scratch, one at a time."""
    result, prefix = Naive(), list(asked.prompt_token_ids)
    while len(result.token_ids) < asked.sampling.max_tokens:
        logits = base.model(torch.tensor([prefix])).logits[0, -1].double().tolist()
        for biased, amount in asked.sampling.logit_bias.items():
            logits[biased] += amount
        logprobs = naive_policy(logits, asked.sampling)
        guided, candidates = logprobs, set()
        entropy = -sum(math.exp(p) * p for p in logprobs if p > NEVER)
        threshold = asked.guidance.entropy_threshold
        if any(asked.guidance.objectives.values()) and (threshold is None or entropy > threshold):
            result.guided_steps += 1
            guided, candidates = naive_guided(base, models, prefix, logprobs, asked.guidance)
        if asked.sampling.temperature == 0:
            token = max(range(len(guided)), key=guided.__getitem__)
        else:
            number = uniforms([asked.sampling.seed], [len(result.token_ids)])[0]
            cumulative = itertools.accumulate(math.exp(p) for p in guided)
            token = next(t for t, below in enumerate(cumulative) if below > number)
        result.token_ids.append(token)
        result.logprobs.append(logprobs[token])
        result.guided_logprobs.append(guided[token])
        result.kl += sum(math.exp(p) * (p - q) for p, q in zip(guided, logprobs, strict=True) if p > NEVER)
        result.outside.append(token not in candidates)
        result.candidates += len(candidates)
        prefix.append(token)
        if token in base.eos_token_ids:
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


def scorers_of(models: list) -> list[ValueScorer]:
    return [ValueScorer("+".join(model.objectives), model) for model in models]


ONE = {"positive": 2.0}
TWO = {"positive": 1.5, "concise": -1.0}
BOTH = {"positive": 1.0, "formal": 2.0}
ALL = {"positive": 1.0, "concise": 2.0, "formal": -0.7}


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


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma3"])
def test_guided_decoding_is_the_naive_reference(arch):
    base, models, engine = guided_setup(arch)
    requests = mixed_requests()
    expected = [naive(base, models, asked) for asked in requests]
    for completion, reference in zip(engine.generate(requests), expected, strict=True):
        assert_same(completion, reference)
    assert rows_in_use(engine) == [0, 0, 0]
    for i in (2, 6, 12):  # the same engine, one request at a time
        assert_same(engine.generate([requests[i]])[0], expected[i])
    assert sum(sum(reference.outside) for reference in expected[2:]) > 8, "the test should sample outside"


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_guided_decoding_in_float32(arch):
    base = tiny_base(arch)
    models = [tiny_value(arch, ("positive", "concise")), tiny_value(arch, ("formal",), "scalar", seed=8)]
    requests = mixed_requests()[2:9]
    completions = Engine(base, scorers_of(models)).generate(requests)
    for asked, completion in zip(requests, completions, strict=True):
        assert_same(completion, naive(base, models, asked))


def test_a_model_without_eos_decodes():
    base, models, _ = guided_setup("llama")
    endless = dataclasses.replace(base, eos_token_ids=())
    requests = [request("guided", prompts(5)[0], ONE), request("plain", prompts(3)[0])]
    for asked, done in zip(requests, Engine(endless, scorers_of(models)).generate(requests), strict=True):
        assert done.finish_reason == "length"
        assert_same(done, naive(endless, models, asked))


# --- continuous batching -----------------------------------------------------------------------


def test_a_request_alone_equals_itself_in_a_crowd():
    base, models, _ = guided_setup("llama")
    requests = mixed_requests()
    alone = [Engine(base, scorers_of(models)).generate([asked])[0] for asked in requests]
    for at_once in (1, 3, 7):
        crowd = Engine(base, scorers_of(models), max_sequences=at_once)
        for one, many in zip(alone, crowd.generate(requests), strict=True):
            assert many.token_ids == one.token_ids
            assert (many.text, many.finish_reason) == (one.text, one.finish_reason)
            assert many.guided_logprobs == pytest.approx(one.guided_logprobs, abs=1e-5)
            assert many.kl == pytest.approx(one.kl, abs=1e-5)


def test_requests_may_join_at_any_step():
    _, _, engine = guided_setup("gpt2")
    requests = mixed_requests()
    alone = {asked.request_id: engine.generate([asked])[0].token_ids for asked in requests}
    arrivals, tokens = list(requests), {asked.request_id: [] for asked in requests}
    while arrivals or engine.busy:
        for asked in arrivals[:2]:
            engine.add(asked)
        arrivals = arrivals[2:]
        for token in engine.step():
            tokens[token.request_id].append(token.token_id)
            if token.finish_reason:
                assert engine.take(token.request_id).token_ids == tokens[token.request_id]
    assert tokens == alone
    assert rows_in_use(engine) == [0, 0, 0]


def test_samples_of_one_prompt_share_its_prefill():
    base, models, engine = guided_setup("llama")
    (prompt,) = prompts(13)
    other = prompts(13, seed=1)[0]
    requests = [request(f"s{i}", prompt, ONE, seed=i) for i in range(4)]
    requests.insert(2, request("other", other, ONE, seed=9))
    completions = engine.generate(requests)
    prefilled = [done.base_positions - len(done.token_ids) for done in completions]
    assert prefilled == [12, 0, 12, 0, 0]
    for asked, done in zip(requests, completions, strict=True):
        assert done.token_ids == Engine(base, scorers_of(models)).generate([asked])[0].token_ids


@pytest.mark.parametrize("objectives", [ONE, BOTH])
def test_no_token_is_run_twice(objectives):
    base, models, engine = guided_setup("llama")
    steps = outside = 0
    for seed, prompt in enumerate(prompts(6, 1, 15, 9)):
        asked = request("r", prompt, objectives, seed=seed, candidates=3, max_tokens=20)
        (done,) = engine.generate([asked])
        reference = naive(base, models, asked)
        assert done.token_ids == reference.token_ids
        assert done.base_positions == len(prompt) - 1 + len(done.token_ids)
        scored = len(prompt) + reference.candidates + sum(reference.outside[:-1])
        used = [m for m in models if any(name in objectives for name in m.objectives)]
        assert done.value_positions == {"+".join(model.objectives): scored for model in used}
        steps, outside = steps + len(done.token_ids), outside + sum(reference.outside[:-1])
    assert 0 < outside < steps, "the test should take candidates and other tokens"


# --- ending ------------------------------------------------------------------------------------


def brevity_model(base: BaseModel):
    """A value model fitted by least squares to be 1 after EOS and -1 elsewhere."""
    model = tiny_value("llama", ("brief",), "scalar", torch.float64, seed=21)
    with torch.no_grad():
        ids = torch.tensor(prompts(*[20] * 100, seed=5))
        ended = torch.cat([ids[:, :-1], torch.full((100, 1), base.tokenizer.eos_token_id)], 1)
        hidden = torch.cat([model.hidden(ended)[:, -1], model.hidden(ids)[:, -1]])
        target = torch.cat([torch.ones(100), -torch.ones(100)]).double()
        fit = torch.linalg.lstsq(torch.cat([hidden, torch.ones(200, 1)], 1), target[:, None]).solution
        model.heads[0].linear.weight.copy_(fit[:-1].T)
        model.heads[0].linear.bias.copy_(fit[-1])
    return model


def test_eos_is_always_a_candidate_and_guidance_can_end_responses():
    base = tiny_base("llama", torch.float64)
    engine = Engine(base, [ValueScorer("brief", brevity_model(base))])
    lengths = {}
    for strength in (-2.0, 0.0, 3.0, 6.0):
        requests = [
            request(f"r{i}", prompt, {"brief": strength}, candidates=1, seed=i, max_tokens=60)
            for i, prompt in enumerate(prompts(*range(2, 22)))
        ]
        completions = engine.generate(requests)
        for done in completions:
            ended = done.token_ids[-1] in base.eos_token_ids
            assert done.finish_reason == ("stop" if ended else "length")
            assert ended or len(done.token_ids) == 60
        lengths[strength] = np.mean([len(done.token_ids) for done in completions])
    assert lengths[-2.0] > lengths[0.0] > 1.3 * lengths[3.0] > 2 * lengths[6.0]


def test_a_stop_string_ends_a_response_and_is_cut():
    base, _, engine = guided_setup("llama", ending=())
    ended = 0
    for seed, prompt in enumerate(prompts(*range(2, 12))):
        asked = request("r", prompt, BOTH, seed=seed, max_tokens=40)
        (whole,) = engine.generate([asked])
        texts = [base.tokenizer.decode(whole.token_ids[:n], skip_special_tokens=True) for n in range(40)]
        for start in (0, 3, 20):  # strings of two to four characters, so most span tokens
            stop = whole.text[start : start + 2 + seed % 3]
            if not stop or "\N{REPLACEMENT CHARACTER}" in stop:
                continue
            sampling = dataclasses.replace(asked.sampling, stop=("never said", stop))
            tokens = list(engine.stream(dataclasses.replace(asked, sampling=sampling)))
            steps = next(n for n, text in enumerate([*texts, whole.text]) if stop in text)
            assert [token.token_id for token in tokens] == whole.token_ids[:steps]
            assert "".join(token.text for token in tokens) == whole.text[: whole.text.index(stop)]
            assert tokens[-1].finish_reason == "stop"
            ended += 1
    assert ended > 8
    assert rows_in_use(engine) == [0, 0, 0]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_streamed_pieces_make_the_text(arch):
    base, _, engine = guided_setup(arch)
    for asked in mixed_requests():
        (whole,) = engine.generate([asked])
        tokens = list(engine.stream(asked))
        assert [token.token_id for token in tokens] == whole.token_ids
        assert "".join(token.text for token in tokens) == whole.text
        assert whole.text == base.tokenizer.decode(whole.token_ids, skip_special_tokens=True)
        assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + [whole.finish_reason]


def detokenize(text: str, stop: tuple[str, ...]) -> tuple[list[str], int]:
    """The pieces that a text's tokens release, and how many tokens were taken."""
    tokenizer = tiny_tokenizer()
    detokenizer, pieces = Detokenizer(tokenizer, stop), []
    tokens = tokenizer(text).input_ids
    for token in tokens:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped:
            break
    taken = len(pieces)
    pieces.append(detokenizer.push(None))
    return pieces, taken


def test_characters_split_over_tokens_are_released_whole():
    text = "the 🙂 says 日本語, naïvely, to the ñandú " * 3
    pieces, _ = detokenize(text, ())
    assert "".join(pieces) == text
    assert "🙂" in pieces
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_string_that_begins_before_a_split_character_is_held_back():
    pieces, _ = detokenize("the n🙂 and on", ("n🙂",))
    assert "".join(pieces) == "the "


def test_the_earliest_of_several_stop_strings_cuts():
    for stop in itertools.permutations(["x", "ox", "fox"]):  # one token may complete them all
        pieces, _ = detokenize("the quick brown fox jumps over", stop)
        assert "".join(pieces) == "the quick brown "


def test_any_text_with_any_stop_strings():
    """Against decoding everything after every token."""
    rng, tokenizer = random.Random(0), tiny_tokenizer()
    alphabet = ["the", "fox", " ", "\n", "a", "ab", "ba", "b", "🙂", "é", "日", ".", " a", "<", "1"]
    stopped = 0
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 60)))
        stop = []
        for _ in range(rng.randint(0, 3)):
            start = rng.randrange(len(text))
            piece = text[start : start + rng.randint(1, 6)]
            stop.append(piece if rng.random() < 0.5 else piece + rng.choice("ab🙂"))
        tokens = tokenizer(text).input_ids
        expected, steps = text, len(tokens)
        for n in range(1, len(tokens) + 1):
            so_far = tokenizer.decode(tokens[:n])
            if found := [so_far.find(each) for each in stop if each in so_far]:
                expected, steps = so_far[: min(found)], n
                stopped += 1
                break
        pieces, taken = detokenize(text, tuple(stop))
        assert ("".join(pieces), taken) == (expected, steps), (text, stop)
    assert 50 < stopped < 250


# --- leaving early -----------------------------------------------------------------------------


def test_abort_frees_a_request_wherever_it_is():
    base, models, _ = guided_setup("llama")
    engine = Engine(base, scorers_of(models), max_sequences=3)
    requests = [
        request(str(i), prompt, BOTH, seed=i, max_tokens=30) for i, prompt in enumerate(prompts(5, 9, 3, 12, 7))
    ]
    alone = [Engine(base, scorers_of(models)).generate([asked])[0] for asked in requests]
    for asked in requests:
        engine.add(asked)
    for _ in range(4):
        engine.step()
    assert rows_in_use(engine) == [3, 3, 3]
    engine.abort("0")  # running
    engine.abort("3")  # waiting
    engine.abort("nobody")
    assert rows_in_use(engine) == [2, 2, 2]
    engine.add(dataclasses.replace(requests[0], request_id="0"))  # the id is free again
    done = {}
    while engine.busy:
        for token in engine.step():
            if token.finish_reason:
                done[token.request_id] = engine.take(token.request_id).token_ids
    assert done == {i: alone[int(i)].token_ids for i in ("0", "1", "2", "4")}
    assert rows_in_use(engine) == [0, 0, 0]


def test_leaving_a_stream_early_frees_it():
    _, _, engine = guided_setup("llama")
    asked = request("r", prompts(6)[0], BOTH, max_tokens=30)
    whole = [token.token_id for token in engine.stream(asked)]
    stream = engine.stream(asked)
    assert [next(stream).token_id for _ in range(3)] == whole[:3]
    assert rows_in_use(engine) == [1, 1, 1]
    stream.close()
    assert rows_in_use(engine) == [0, 0, 0]
    assert not engine.busy
    assert engine.generate([asked])[0].token_ids == whole


def test_steps_without_guidance_cost_no_value_pass_and_adaptive_k_narrows_it():
    base = tiny_base("llama")
    model = tiny_value("llama")
    (prompt,) = prompts(5)

    def positions(**guidance) -> tuple[int, int]:
        engine = Engine(base, scorers_of([model]))
        (done,) = engine.generate([request("r", prompt, ONE, seed=3, candidates=30, max_tokens=20, **guidance)])
        return sum(done.value_positions.values()), done.guided_steps

    every, steps = positions()
    assert steps == 20
    assert positions(schedule="entropy:99") == (len(prompt) - 1, 0)
    half, some = positions(schedule="entropy:3.2")
    assert 0 < some < steps
    assert half < every
    assert positions(candidate_mass=0.5)[0] < every


def test_caches_do_not_grow_with_the_number_of_requests():
    base, models, _ = guided_setup("llama")
    engine = Engine(base, scorers_of(models), max_sequences=5)
    caches = [engine._runner.cache, *(scorer._runner.cache for scorer in engine._scorers)]
    lengths = np.random.default_rng(0).integers(1, 40, 60).tolist()
    requests = [
        request(str(i), prompt, BOTH, seed=i, max_tokens=1 + i % 6) for i, prompt in enumerate(prompts(*lengths))
    ]
    engine.generate(requests[:20])
    for cache in caches:
        rows, _, columns, _ = cache.keys[0].shape
        assert (rows, columns) == (ROWS, COLUMNS)
    held = [cache.memory() for cache in caches]
    engine.generate(requests[20:])
    assert [cache.memory() for cache in caches] == held


@pytest.mark.parametrize("limit", [2 * ROWS * COLUMNS, 3 * ROWS * COLUMNS])
def test_preempted_sequences_go_on_with_the_same_tokens_within_the_memory_stated(limit):
    base, models, _ = guided_setup("llama")
    lengths = np.random.default_rng(1).integers(1, 50, 24).tolist()
    requests = [
        request(
            str(i),
            prompt,
            [BOTH, ALL, {}][i % 3],
            seed=i,
            max_tokens=20 + 10 * (i % 4),
            schedule=["token", "entropy:3"][i % 2],
        )
        for i, prompt in enumerate(prompts(*lengths))
    ]
    free = Engine(base, scorers_of(models)).generate(requests)
    engine = Engine(base, scorers_of(models), max_sequences=24, kv_tokens=limit)
    cache, done, left, leave = engine._runner.cache, {}, [], engine._leave
    engine._leave = lambda sequence: (left.append(sequence), leave(sequence))
    for asked in requests:
        engine.add(asked)
    while engine.busy:
        for token in engine.step():
            if token.finish_reason:
                done[token.request_id] = engine.take(token.request_id)
        rows, _, columns, _ = cache.keys[0].shape
        assert rows * columns <= limit
    assert len(left) > len(requests), "the test should preempt"
    for expected in free:
        found = done[expected.request_id]
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
        assert found.guided_steps == expected.guided_steps
    assert rows_in_use(engine) == [0, 0, 0]


def test_a_request_larger_than_the_memory_is_refused():
    engine = Engine(tiny_base("llama"), kv_tokens=ROWS * COLUMNS)
    with pytest.raises(VasError, match="more than the KV cache may hold"):
        engine.add(request("r", prompts(10)[0], max_tokens=COLUMNS))


# --- errors ------------------------------------------------------------------------------------


def test_what_cannot_be_decoded_is_refused():
    base, _, engine = guided_setup("llama")
    (prompt,) = prompts(4)
    for wrong, says in [
        (request("r", ()), "prompt is empty"),
        (request("r", (*prompt, VOCAB)), f"token id {VOCAB} is outside the vocabulary"),
        (request("r", (-1, *prompt)), "token id -1 is outside the vocabulary"),
        (request("r", prompt, logit_bias={VOCAB: 1.0}), f"token id {VOCAB} is outside the vocabulary"),
        (request("r", prompt, {"positiv": 1.0}), "did you mean 'positive'"),
        (request("r", prompt, {"zzz": 1.0}), "known: concise, formal, positive"),
        (request("r", prompt, max_tokens=CONTEXT - 3), f"room for {CONTEXT}"),
    ]:
        with pytest.raises(VasError, match=says):
            engine.add(wrong)
        assert not engine.busy
    engine.add(request("r", prompt, max_tokens=CONTEXT - 4))
    with pytest.raises(VasError, match="'r' is in use"):
        engine.add(request("r", prompt))
    with pytest.raises(VasError, match="none is known"):
        Engine(base).add(request("r", prompt, ONE))


def test_a_request_that_is_refused_leaves_none_of_its_batch_behind():
    _, _, engine = guided_setup("llama")
    good = request("good", prompts(4)[0], ONE)
    with pytest.raises(VasError, match="empty"):
        engine.generate([good, request("bad", ())])
    assert not engine.busy
    assert engine.generate([good])[0].finish_reason


def test_generate_minds_its_own_requests():
    _, _, engine = guided_setup("llama")
    first, short, long = (
        request(name, prompt, ONE, temperature=0, max_tokens=limit)
        for name, prompt, limit in zip(("first", "short", "long"), prompts(4, 5, 6), (2, 1, 9), strict=True)
    )
    alone = [done.token_ids for done in (engine.generate([asked])[0] for asked in (first, short, long))]
    engine.add(first)
    assert [done.token_ids for done in engine.generate([short, long])] == alone[1:]
    assert engine.take("first").token_ids == alone[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"logit_bias": {3: math.nan}},
    ],
    ids=str,
)
def test_bad_sampling_is_refused(wrong):
    with pytest.raises(VasError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_must_be_finite(strength):
    with pytest.raises(VasError, match="'positive' is not finite"):
        GuidanceParams({"positive": strength})


def test_candidates_must_be_at_least_one():
    with pytest.raises(VasError, match="at least 1"):
        GuidanceParams(ONE, candidates=0)


@pytest.mark.parametrize("mass", [0.0, -1.0, 1.1, math.nan])
def test_candidate_mass_is_a_probability(mass):
    with pytest.raises(VasError, match="candidate_mass is out of its range"):
        GuidanceParams(ONE, candidate_mass=mass)


@pytest.mark.parametrize("schedule", ["", "entropy", "entropy:", "entropy:-1", "entropy:x", "tokens", "token:3"])
def test_an_unknown_schedule_is_refused(schedule):
    with pytest.raises(VasError, match="unknown schedule"):
        GuidanceParams(ONE, schedule=schedule)


def test_two_value_models_may_not_bring_the_same_objective():
    models = [tiny_value("llama", ("a", "b")), tiny_value("gpt2", ("b",))]
    with pytest.raises(VasError, match="'b'"):
        Engine(tiny_base("llama"), scorers_of(models))
