"""The engine `vllm`: vLLM inside the actor, for large models on GPUs.

Written for vLLM's V1 engine (`LLM`, `SamplingParams`, `RequestOutput` of 0.11 and later), and run with the CPU build
of 0.32. What only GPUs have was not run: several of them for one model, a fraction of one, a worker that dies.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vas.config import RunConfig
from vas.decoding.sequence import Completion, Request, SamplingParams
from vas.errors import VasError
from vas.models import bundled
from vas.models.base import load_tokenizer, tokenizer_digest
from vas.rollouts.engines.apart import generate_apart
from vas.rollouts.engines.interface import generate_checked


class VLLMEngine:
    """vLLM samples with a seed per request, so a response hardly depends on its batch; its random numbers are its own.

    Log-probabilities are those of the distribution that was sampled from, after temperature and truncation.
    Raises VasError if vLLM is not installed, or does not start.
    """

    cost: Mapping[str, int] = {}
    peak_share = 0.0

    def __init__(self, config: RunConfig) -> None:
        try:
            import vllm
        except ImportError as error:
            raise VasError(
                f"vLLM cannot be imported: {error}",
                "rollouts.engine: vllm",
                "pip install 'vas[vllm]' where the actors run, or take the engine `transformers`",
            ) from None
        self.name = config.base.model
        self.tokenizer = load_tokenizer(config.base.tokenizer_id, config.base.revision)
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        try:
            self._llm = vllm.LLM(**model_arguments(config))
        except (ValueError, RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise VasError(
                f"vLLM cannot load the model: {reason[0]}", self.name, "its log above says more; check GPU memory"
            ) from error
        self._sampling = vllm.SamplingParams
        self._one_at_a_time = threading.Lock()  # `LLM` is for one thread

    def check(self, request: Request) -> None:
        """Raise VasError if the request could never be sampled here."""
        where, model = request.request_id, self._llm.llm_engine.model_config
        if not request.prompt_token_ids:
            raise VasError("the prompt is empty", where, "give at least one token")
        if request.guidance.active:
            raise VasError("vLLM cannot be guided", where, "guide with the engine `transformers`")
        outside = [token for token in request.prompt_token_ids if not 0 <= token < model.get_vocab_size()]
        if outside:
            raise VasError(f"token id {outside[0]} is outside the vocabulary", where)
        longest = len(request.prompt_token_ids) + request.sampling.max_tokens
        if longest > model.max_model_len:
            raise VasError(
                f"prompt and max_tokens make {longest} tokens; {self.name} has room for {model.max_model_len}",
                where,
                "shorten the prompt or lower max_tokens",
            )

    def generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        """Sample responses, all of a call at once; in the requests' order. Calls of several threads take turns."""
        with self._one_at_a_time:
            return generate_checked(self.check, lambda good: generate_apart(self._generate, good), requests)

    def _generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        started = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests],
            [self._sampling(**sampling_arguments(request.sampling)) for request in requests],
            use_tqdm=False,
        )
        results = [completion_of(each.outputs[0], request) for each, request in zip(outputs, requests, strict=True)]
        for result in results:
            if isinstance(result, Completion):
                result.seconds = (time.perf_counter() - started) / len(results)
        return results


def model_arguments(config: RunConfig) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM`."""
    gpus = config.resources.gpus_per_actor
    dtype = config.base.dtype if config.base.dtype != "auto" else ("bfloat16" if gpus else "float32")
    arguments: dict[str, Any] = {
        "model": bundled.resolve(config.base.model),
        "revision": config.base.revision,
        "tokenizer_revision": config.base.revision,
        "dtype": dtype,
        "tensor_parallel_size": config.rollouts.tensor_parallel,
        "max_num_seqs": config.rollouts.batch_size,
        "seed": config.seed,
        "enable_prefix_caching": True,  # samples of one prompt share its prefill
        "logprobs_mode": "processed_logprobs",
    }
    if 0 < gpus < 1:  # several actors share a GPU
        arguments["gpu_memory_utilization"] = round(0.9 * gpus, 3)
    return arguments


def sampling_arguments(sampling: SamplingParams) -> dict[str, Any]:
    """Keyword arguments of vLLM's `SamplingParams`: one response, with the log-probability of each of its tokens."""
    return {
        "n": 1,
        "seed": sampling.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "max_tokens": sampling.max_tokens,
        "stop": list(sampling.stop) or None,
        "logit_bias": dict(sampling.logit_bias) or None,
        "logprobs": 0,
    }


def completion_of(output: Any, request: Request) -> Completion | VasError:
    """vLLM's `CompletionOutput` as ours; its token ids end with EOS already when the model ended the response."""
    if output.finish_reason not in ("stop", "length"):
        return VasError(f"vLLM ended the response for another reason: {output.finish_reason}", request.request_id)
    tokens = list(output.token_ids)
    logprobs = [float(step[token].logprob) for step, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(
        request.request_id,
        tokens,
        output.text,
        output.finish_reason,
        logprobs,
        list(logprobs),
        base_positions=len(request.prompt_token_ids) + len(tokens) - 1,
    )
