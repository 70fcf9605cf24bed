"""The engine `openai`: any server with OpenAI's `/v1/completions` (vLLM, llama.cpp, OpenAI and others)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from vas.config import RunConfig
from vas.decoding.sequence import Completion, Request
from vas.errors import VasError
from vas.http import Client, Rejected
from vas.models import bundled
from vas.models.base import load_tokenizer, tokenizer_digest
from vas.rollouts.engines.answers import ForeignTokens, Reader

logger = logging.getLogger(__name__)


class OpenAIEngine:
    """Asks a server for one response a request, many requests at once. Of the base model only the tokenizer is loaded.

    Prompts are sent as token ids, with the parameters that vLLM and llama.cpp have beyond OpenAI's. All of them are
    sent, because either server has defaults of its own that would sample from another distribution (top_k 40, say).
    A server that refuses the first of them gets the same request in plain OpenAI form, with the prompt as text; if
    that goes well, it gets all later ones like this. A BOS token that the tokenizer puts before every text is left
    out of it: the server's will do so again.

    Sampling is the server's: the seed makes it repeatable as far as the server promises that, and log-probabilities
    are as it tells them, usually those of temperature 1 before truncation.
    """

    peak_share = 0.0

    def __init__(self, config: RunConfig) -> None:
        assert config.base.openai is not None, "the config checks it"
        self.name = config.base.model
        self.tokenizer = load_tokenizer(config.base.model, config.base.revision)
        self.tokenizer_digest = tokenizer_digest(self.tokenizer)
        self._served = config.base.served_name or config.base.model
        threads = config.rollouts.concurrency
        self._pool = ThreadPoolExecutor(threads, "openai")  # one for all callers: it bounds the requests in flight
        self._client = Client(
            config.base.openai,
            _key(config.base.api_key_env),
            config.rollouts.timeout,
            config.rollouts.attempts,
            threads,
        )
        self._read = Reader(self.tokenizer, eos_token_ids(config.base.model, config.base.revision, self.tokenizer))
        self._plain: bool | None = None  # not known yet
        self._usage: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def cost(self) -> Mapping[str, int]:
        """Tokens as the server counts them, calls and retries so far."""
        counted = Counter(self._usage) + self._client.counts
        return {name: counted[name] for name in ("prompt_tokens", "completion_tokens", "calls", "retries")}

    def check(self, request: Request) -> None:
        """Raise VasError for what no server could do; how long a prompt may be, only the server knows."""
        if not request.prompt_token_ids:
            raise VasError("the prompt is empty", request.request_id, "give at least one token")
        if request.guidance.active:
            raise VasError("a server cannot be guided", request.request_id, "guide with the engine `transformers`")

    def generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        """A response for every request, in their order.

        Raises VasError for 401, 403 and 404, for a server that was never reached, and for one with other tokens.
        """
        futures = [self._pool.submit(self._sample, request) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            for future in futures:
                future.cancel()
            if isinstance(error, Rejected):
                self._client.stop()  # what else is asked for need not wait for its next attempt
                raise error.error from None
            raise

    def _sample(self, request: Request) -> Completion | VasError:
        """Raises Rejected for what concerns every request."""
        started = time.perf_counter()
        try:
            self.check(request)
            answer = self._ask(request)
            self._add_usage(answer)
            completion = self._read(answer, request)
            completion.seconds = time.perf_counter() - started
            return completion
        except VasError as error:
            return error
        except Rejected as rejected:
            if rejected.whole:
                raise
            return rejected.error
        except ForeignTokens:
            raise Rejected(
                VasError(
                    f"the server's tokens are not those of {self.name}",
                    self._client.url,
                    "let base.model name the model that the server serves, or base.served_name the right one there",
                ),
                whole=True,
            ) from None
        except Exception as error:  # one odd answer; to fail with the batch would have the others paid for again
            return VasError(f"the answer cannot be read: {type(error).__name__}: {error}", request.request_id)

    def _ask(self, request: Request) -> Any:
        if not self._plain:
            try:
                answer = self._client.post("completions", self.body(request, plain=False))
                self._plain = False
                return answer
            except Rejected as rejected:
                if rejected.whole or self._plain is False:
                    raise
        answer = self._client.post("completions", self.body(request, plain=True))
        if not self._plain:
            logger.info("%s takes prompts as text only", self._client.url)
            self._plain = True
        return answer

    def body(self, request: Request, plain: bool) -> dict[str, Any]:
        """What is sent for a request; plain: with nothing in it that OpenAI's own servers refuse, if possible."""
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self._served,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed & 0x7FFFFFFF,  # some keep no more of it than this
            "logprobs": 1,
            "n": 1,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        extras = {"top_k": sampling.top_k, "min_p": sampling.min_p}
        if plain:
            extras = {name: value for name, value in extras.items() if value}
            return body | extras | {"prompt": self._text(request.prompt_token_ids)}
        body |= extras | {"repetition_penalty": 1.0, "return_token_ids": True}
        return body | {"prompt": list(request.prompt_token_ids)}

    def _text(self, tokens: Sequence[int]) -> str:
        bos = self.tokenizer.bos_token_id
        if tokens[0] == bos and self.tokenizer("a").input_ids[0] == bos:
            tokens = tokens[1:]
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _add_usage(self, answer: Any) -> None:
        usage = answer.get("usage") if isinstance(answer, dict) else None
        with self._lock:
            for name in ("prompt_tokens", "completion_tokens"):
                self._usage[name] += int((usage or {}).get(name) or 0)


def eos_token_ids(model: str, revision: str | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response, the tokenizer's own first, without the model's weights."""
    try:
        found = GenerationConfig.from_pretrained(bundled.resolve(model), revision=revision or "main").eos_token_id
    except (OSError, ValueError):  # a model without such a file
        found = None
    configured = found if isinstance(found, list) else [found]
    ids = tuple(dict.fromkeys(i for i in [tokenizer.eos_token_id, *configured] if i is not None))
    if not ids:
        raise VasError("the model has no token that ends a response", model, "give its tokenizer an eos_token")
    return ids


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise VasError(
            "the server's key is not set", f"base.api_key_env: {variable}", f"export {variable} where the actors run"
        )
    return key
