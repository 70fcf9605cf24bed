"""Sampling engines: what the config says of them, ours, and vLLM."""

import importlib.util
from types import SimpleNamespace

import pytest
from engines import EOS, config
from naive import ONE, prompts, request
from tiny import save_tiny_base, tiny_base, tiny_tokenizer, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.sequence import SamplingParams
from vas.errors import VasError
from vas.rollouts.engines import make_engine
from vas.rollouts.engines.transformers import TransformersEngine
from vas.rollouts.engines.vllm import completion_of, model_arguments, sampling_arguments

# --- the config -------------------------------------------------------------------------------------------------


def test_the_engine_openai_needs_an_address():
    with pytest.raises(VasError, match=r"needs base\.openai"):
        config("m", rollouts={"engine": "openai"})


def test_gpus_that_share_a_model_must_be_there():
    with pytest.raises(VasError, match=r"resources\.gpus_per_actor must be"):
        config("m", rollouts={"engine": "vllm", "tensor_parallel": 2})


def test_a_run_may_go_on_at_another_address_and_with_more_patience():
    here = config("m", base={"openai": "http://a"})
    there = config("m", base={"openai": "http://b", "api_key_env": "K", "attempts": 9})
    assert here.digest() == there.digest()
    assert here.digest() != config("m").digest()


def test_a_model_that_is_only_called_has_no_weights_to_load():
    with pytest.raises(VasError, match="loads the base model's weights"):
        config("m", base={"openai": "http://a"}, rollouts={"engine": "vllm"})
    config("m", base={"openai": "http://a", "local_weights": True}, rollouts={"engine": "vllm"})


# --- transformers -----------------------------------------------------------------------------------------------


def test_the_default_engine_gives_the_tokens_of_the_decoding_engine(tmp_path):
    engine = make_engine(config(save_tiny_base(tmp_path)))
    requests = [request(str(i), prompt, seed=i) for i, prompt in enumerate(prompts(5, 9))]
    requests.insert(1, request("long", prompts(5)[0], max_tokens=2000))
    first, refused, last = engine.generate(requests)
    alone = Engine(tiny_base()).generate([requests[0], requests[2]])
    assert [first.token_ids, last.token_ids] == [each.token_ids for each in alone]
    assert isinstance(refused, VasError)
    assert "room for 1024" in str(refused)
    assert engine.name == str(tmp_path)
    assert engine.tokenizer_digest == tiny_base().tokenizer_digest


def test_guidance_takes_local_weights_whatever_samples_the_rollouts(tmp_path):
    base, value = save_tiny_base(tmp_path / "base"), tmp_path / "value"
    tiny_value().save_pretrained(value)
    tiny_tokenizer().save_pretrained(value)
    openai = config(base, base={"openai": "http://127.0.0.1:9", "local_weights": True})
    engine = make_engine(openai, str(value))
    assert isinstance(engine, TransformersEngine)
    assert engine.generate([request("r", prompts(5)[0], ONE)])[0].guided_steps


# --- vLLM -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_missing_is_a_users_mistake(tokenizer_only):
    with pytest.raises(VasError, match=r"pip install 'vas\[vllm\]'"):
        make_engine(config(tokenizer_only, rollouts={"engine": "vllm"}))


def test_sampling_in_vllms_words():
    sampling = SamplingParams(0.5, 0.9, 20, 0.1, 64, ("\n",), 2**62, {5: -1.0})
    assert sampling_arguments(sampling) == {
        "n": 1,
        "seed": 2**62,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "max_tokens": 64,
        "stop": ["\n"],
        "logit_bias": {5: -1.0},
        "logprobs": 0,
    }
    assert sampling_arguments(SamplingParams())["stop"] is None


def test_the_model_in_vllms_words():
    shared = model_arguments(config("org/model", rollouts={"engine": "vllm"}, resources={"gpus_per_actor": 0.5}))
    assert shared["gpu_memory_utilization"] == 0.45
    assert shared["dtype"] == "bfloat16"
    two = config("org/model", rollouts={"engine": "vllm", "tensor_parallel": 2}, resources={"gpus_per_actor": 2})
    assert model_arguments(two)["tensor_parallel_size"] == 2
    assert "gpu_memory_utilization" not in model_arguments(two)


def test_a_completion_in_vllms_words():
    steps = [{5: SimpleNamespace(logprob=-1.0), 9: SimpleNamespace(logprob=-0.5)}, {EOS: SimpleNamespace(logprob=-2.0)}]
    output = SimpleNamespace(token_ids=(5, EOS), text="x", finish_reason="stop", logprobs=steps)
    found = completion_of(output, request("r", (6, 7)))
    assert (found.token_ids, found.logprobs, found.base_positions) == ([5, EOS], [-1.0, -2.0], 3)
    output.finish_reason = "abort"
    assert "another reason: abort" in str(completion_of(output, request("r", (6, 7))))
