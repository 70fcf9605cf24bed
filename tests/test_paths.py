"""The ways through the engine's models: fused, Hugging Face's own, with optimisations off, and what stays untouched."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from command import ROOT
from naive import BOTH, guided_setup, mixed_requests, prompts, request, scorers_of
from tiny import tiny_base, tiny_tokenizer, tiny_value
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

from vas.decoding.engine import Engine
from vas.decoding.llama import FusedLlama
from vas.decoding.runner import HuggingFace
from vas.errors import VasError
from vas.models.base import BaseModel, tokenizer_digest


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral"])
def test_the_fused_path_is_hugging_faces(arch, monkeypatch):
    base, models, fused = guided_setup(arch)
    assert isinstance(fused._runner._forward, FusedLlama)
    requests = mixed_requests()
    requests += [request(f"long {i}", p, BOTH, seed=i, max_tokens=30) for i, p in enumerate(prompts(90, 40, seed=2))]
    requests += [request("blocks", prompts(9)[0], BOTH, seed=5, schedule="block:4")]
    expected = fused.generate(requests)
    monkeypatch.setenv("VAS_OFF", "fused_llama")
    plain = Engine(base, scorers_of(models))
    assert isinstance(plain._runner._forward, HuggingFace)
    assert all(isinstance(scorer._runner._forward, HuggingFace) for scorer in plain._scorers)
    for done, reference in zip(plain.generate(requests), expected, strict=True):
        assert (done.token_ids, done.text) == (reference.token_ids, reference.text)
        assert done.logprobs == pytest.approx(reference.logprobs, abs=1e-5)
        assert done.guided_logprobs == pytest.approx(reference.guided_logprobs, abs=1e-5)
        assert done.kl == pytest.approx(reference.kl, abs=1e-5)


def test_engines_in_several_threads_may_share_a_model_that_runs_through_hugging_face():
    base, models, engine = guided_setup("gpt2")
    requests = mixed_requests()
    expected = [done.token_ids for done in engine.generate(requests)]
    before = base.model.config._attn_implementation
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(lambda _: Engine(base, scorers_of(models)).generate(requests), range(6)):
            assert [done.token_ids for done in found] == expected
    assert base.model.config._attn_implementation == before


def test_without_shared_prefixes_every_prompt_is_read(monkeypatch):
    base, models, sharing = guided_setup("llama")
    requests = [request(str(i), prompts(13)[0], BOTH, seed=i) for i in range(3)]
    expected = sharing.generate(requests)
    assert [done.base_positions - len(done.token_ids) for done in expected] == [12, 0, 0]
    monkeypatch.setenv("VAS_OFF", "shared_prefixes")
    completions = Engine(base, scorers_of(models)).generate(requests)
    assert [done.base_positions - len(done.token_ids) for done in completions] == [12, 12, 12]
    assert [done.token_ids for done in completions] == [done.token_ids for done in expected]


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_an_unknown_optimisation_cannot_be_switched_off(arch, monkeypatch):
    monkeypatch.setenv("VAS_OFF", "shared_prefixes,fused_lama")
    with pytest.raises(VasError, match="no optimisation is called 'fused_lama'") as caught:
        Engine(tiny_base(arch))
    assert "fused_llama" in str(caught.value)


@pytest.mark.parametrize(
    "model",
    [
        BloomForCausalLM(BloomConfig(vocab_size=290, hidden_size=32, n_layer=2, n_head=4)),
        FalconForCausalLM(
            FalconConfig(vocab_size=290, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        ),
    ],
    ids=["bloom", "falcon"],
)
def test_a_model_with_an_attention_of_its_own_is_refused(model):
    tokenizer = tiny_tokenizer()
    base = BaseModel("odd", model.eval(), tokenizer, (0,), tokenizer_digest(tokenizer))
    with pytest.raises(VasError, match=f"{type(model).__name__} has an attention of its own"):
        Engine(base)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral", "gemma2", "gemma3"])
def test_the_base_model_still_generates_as_before(arch):
    base = tiny_base.__wrapped__(arch)  # one that no engine has seen
    several = prompts(9, 4, 1)
    padded = torch.tensor([[0] * (9 - len(prompt)) + list(prompt) for prompt in several])
    mask = torch.tensor([[0] * (9 - len(prompt)) + [1] * len(prompt) for prompt in several])
    single = torch.tensor(several[:1])

    def generate() -> list:
        settings = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
        batch = base.model.generate(padded, attention_mask=mask, **settings)
        alone = base.model.generate(single, attention_mask=torch.ones_like(single), **settings)
        torch.manual_seed(0)
        sampled = base.model.generate(padded, attention_mask=mask, **(settings | {"do_sample": True}))
        return [batch.tolist(), alone.tolist(), sampled.tolist(), base.model(padded, attention_mask=mask).logits]

    *tokens, logits = generate()
    engine = Engine(base, scorers_of([tiny_value(arch)]))
    requests = [request(str(i), prompt, {"positive": 2.0}, seed=i) for i, prompt in enumerate(several)]
    first = [done.token_ids for done in engine.generate(requests)]
    *after, logits_after = generate()
    assert after == tokens
    torch.testing.assert_close(logits_after[mask.bool()], logits[mask.bool()])
    assert [done.token_ids for done in engine.generate(requests)] == first, "and the engine decodes as before"


def test_the_engine_and_its_benchmark_need_torch_and_transformers_alone():
    """They never import the library's modules that need pydantic, pyarrow, Ray or DeepSpeed."""
    script = """
import sys
import benchmarks.decoding
sys.path.insert(0, "tests")
from tiny import tiny_base, tiny_value
from vas.decoding.engine import Engine
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
engine = Engine(tiny_base(), [make_scorer("value", tiny_value())])
request = Request("r", (5, 6, 7), SamplingParams(max_tokens=4), GuidanceParams({"positive": 1.0}))
assert engine.generate([request])[0].token_ids
print(*sorted(name for name in sys.modules if name.split(".")[0] in ("vas", "ray", "deepspeed")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "vas.decoding.engine" in loaded
    assert not loaded & {"ray", "deepspeed", "vas.config", "vas.schema", "vas.storage", "vas.prompts", "vas.http"}
