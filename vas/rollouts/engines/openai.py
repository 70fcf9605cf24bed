"""The engine `openai`: any OpenAI-compatible server (vLLM, llama.cpp, OpenAI and others)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from vas.config import RunConfig
from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.loop import Loop
from vas.decoding.sequence import Completion, Request
from vas.errors import Rejected, VasError
from vas.http import Meter
from vas.models.answers import ForeignTokens, Reader
from vas.models.base import set_threads
from vas.models.served import ServedModel, foreign
from vas.models.server import Ask, Prefix, Server
from vas.rollouts.engines.interface import generate_checked


class OpenAIEngine:
    """Asks a server for one response a request, many requests at once. Of the base model only the tokenizer is loaded.

    Sampling is the server's: the seed makes it repeatable as far as the server promises that, and log-probabilities
    are as it tells them, usually those of temperature 1 before truncation.

    Guided requests take a call for each token, or for each block of them. value: location of the value model.
    meter: of the server's calls.
    """

    peak_share = 0.0

    def __init__(self, config: RunConfig, value: str | None = None, meter: Meter | None = None) -> None:
        self._server = server = Server(config.base, meter)
        self.name, self.tokenizer, self.tokenizer_digest = server.name, server.tokenizer, server.tokenizer_digest
        self._pool = ThreadPoolExecutor(server.concurrency, "openai")  # for all callers: it bounds the calls in flight
        self._read = Reader(server.tokenizer, server.eos_token_ids)
        self._loop = None if value is None else Loop(lambda: _engine(config, server, value))

    @property
    def cost(self) -> Mapping[str, int]:
        """Tokens as the server counts them, calls and retries so far."""
        return self._server.cost

    def check(self, request: Request) -> None:
        """Raise VasError for what no server could do; how long a prompt may be, only the server knows."""
        if not request.prompt_token_ids:
            raise VasError("the prompt is empty", request.request_id, "give at least one token")
        if request.guidance.active:
            if self._loop is None:
                raise VasError("there is no value model to guide with", request.request_id)
            self._loop.engine.check(request)

    def generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        """A response for every request, in their order.

        Raises VasError for 401, 403 and 404, for a server that was never reached, and for one with other tokens.
        """
        return generate_checked(self.check, self._generate, requests)

    def _generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        futures = [self._begin(request) for request in requests]
        try:
            return [future.result() for future in futures]
        except BaseException as error:
            for request, future in zip(requests, futures, strict=True):
                if loop := self._loop_of(request):
                    loop.abort(request.request_id)
                else:
                    future.cancel()
            if isinstance(error, Rejected):
                self._server.client.stop()  # what else is asked for need not wait for its next attempt
                raise error.error from None
            raise

    def _begin(self, request: Request) -> Future[Completion | VasError]:
        if loop := self._loop_of(request):
            return loop.submit(request)
        return self._pool.submit(self._sample, request)

    def _loop_of(self, request: Request) -> Loop | None:
        """What decodes it, if it is guided."""
        return self._loop if request.guidance.active else None

    def _sample(self, request: Request) -> Completion | VasError:
        """Raises Rejected for what concerns every request."""
        started = time.perf_counter()
        try:
            completion = self._ask(request)
            completion.seconds = time.perf_counter() - started
            return completion
        except VasError as error:
            return error
        except Rejected as rejected:
            if rejected.whole:
                raise
            return rejected.error
        except ForeignTokens:
            raise Rejected(foreign(self._server), whole=True) from None
        except Exception as error:  # one odd answer; to fail with the batch would have the others paid for again
            return VasError(f"the answer cannot be read: {type(error).__name__}: {error}", request.request_id)

    def _ask(self, request: Request) -> Completion:
        sampling, tokens = request.sampling, request.prompt_token_ids
        ask = Ask(
            sampling.max_tokens - len(request.begun),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            sampling.min_p,
            sampling.seed,
            stop=sampling.stop,
            logit_bias=sampling.logit_bias,
        )
        [choice, *_] = self._server.ask(Prefix(tokens, request.begun, request.messages), ask)
        answer = self._read(choice, request.request_id, bool(sampling.stop))
        return Completion(
            request.request_id,
            answer.tokens,
            answer.text,
            answer.reason,
            answer.logprobs,
            list(answer.logprobs),
            base_positions=len(tokens) + len(request.begun) + len(answer.tokens) - 1,
        )


def _engine(config: RunConfig, server: Server, value: str) -> Engine:
    set_threads(config.resources.cpus_per_actor)
    base = ServedModel(server)
    return Engine(
        base,
        [load_scorer(config.value.name, value, base, config.base.linears)],
        max_sequences=config.rollouts.batch_size,
        kv_tokens=config.resources.kv_tokens,
    )
