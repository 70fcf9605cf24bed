"""The ingress: OpenAI-compatible HTTP in front of the base model's replicas.

No `from __future__ import annotations` here: FastAPI reads the annotations of the routes, which Serve pickles without
the names that only annotations in quotes would use.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from vas.configfile import validated
from vas.errors import VasError, as_vas_error
from vas.serving import openapi
from vas.serving.answers import Answer, ChatAnswer, sse
from vas.serving.calls import own
from vas.serving.config import Gate, Settled, merged
from vas.serving.errors import ApiError
from vas.serving.front import Front, body_of
from vas.serving.keys import Caller, Doorkeeper, load_keys
from vas.serving.metrics import GatewayMetrics
from vas.serving.protocol import ChatRequest, CompletionRequest, SamplingBody, ScoreRequest, parse
from vas.serving.relay import Choice, relay
from vas.serving.requests import Encoded, Served
from vas.serving.scrape import scrape

PLAYGROUND = Path(__file__).with_name("playground.html").read_text()
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"

logger = logging.getLogger("ray.serve.vas")

app = FastAPI(title="VAS on Ray", version="1", description=openapi.ABOUT, redirect_slashes=False)
app.add_middleware(Front)


@app.exception_handler(ApiError)
async def _api_error(request: Request, error: ApiError) -> Response:
    return error.response()


@app.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> Response:
    what = {
        404: "there is nothing at this path: the API is under /v1, and described at /docs",
        405: "this path does not take that method",
    }
    response = ApiError(error.status_code, what.get(error.status_code, str(error.detail))).response()
    response.headers.update(error.headers or {})
    return response


@app.exception_handler(RequestValidationError)
async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    return ApiError(400, str(error.errors()[0]["msg"])).response()


async def _stream(
    answer: Answer, choices: list[Choice], first: list[int], events: AsyncIterator[list[int]], usage: bool
) -> AsyncIterator[bytes]:
    """Server-sent events: chunks of each choice's new tokens, the usage if it is asked for, and [DONE]."""
    sent = [0] * len(choices)
    try:
        for chunk in answer.begin(len(choices)):
            yield sse(chunk)
        fresh: list[int] | None = first
        while fresh is not None:
            for place in sorted(set(fresh)):
                tokens = choices[place].tokens[sent[place] :]
                sent[place] += len(tokens)
                part = answer.chunk(place, choices[place], tokens) if tokens else None
                if part is not None:
                    yield sse(part)
            fresh = await anext(events, None)
        if usage:
            yield sse(answer.end(choices))
        yield sse("[DONE]")
    except ApiError as error:
        yield sse(error.body)
    except Exception:
        yield sse(ApiError(500, "the server failed").body)
        raise
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # it is an async generator


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


@serve.ingress(app)  # what stands below it does not reach the replicas
class Gateway:
    """Reads requests, asks the base model's replicas, and sends what comes of it."""

    def __init__(self, settled: Settled, digests: dict[str, str], base: DeploymentHandle) -> None:
        self._base = own(base)
        self.served = Served.of(settled, digests)
        self.metrics = GatewayMetrics()
        self._first = settled.serving.gate
        self._created = int(time.time())
        self._configured = False
        self._take_over({})

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take over new presets, limits, sampling and keys; what is not named stays as the application's arguments say.

        A gateway that is up keeps those that it has, and says so in its log, where there is something wrong with the
        new ones: Serve would end it. One that starts raises VasError. The keys file is read again.
        """
        try:
            self._take_over(user_config)
        except VasError as error:
            if not self._configured:
                raise
            logger.error("the gateway goes on with what it had: %s", error)
        self._configured = True

    def _take_over(self, user_config: dict[str, Any]) -> None:
        content = merged(self._first.model_dump(exclude_unset=True), user_config)
        gate = validated(Gate, content, "the Gateway's user_config")
        self.served.check_gate(gate)
        self.doorkeeper = Doorkeeper(load_keys(gate.keys) if gate.keys else None)
        self.gate = gate

    @app.get("/", include_in_schema=False)
    async def playground(self) -> Response:
        """A page to try it on: the base model's answer and the steered one, side by side."""
        return HTMLResponse(PLAYGROUND, headers={"Content-Security-Policy": POLICY})

    @app.post("/v1/chat/completions", **openapi.chat)
    async def chat(self, request: Request) -> Response:
        """Answer a chat."""
        body: ChatRequest = parse(ChatRequest, await self._body(request))
        tokens = [await asyncio.to_thread(self.served.encode, self.gate, body.messages)]
        return await self._respond(request, body, tokens, ChatAnswer)

    @app.post("/v1/completions", **openapi.completion)
    async def completion(self, request: Request) -> Response:
        """Go on from a text, or several."""
        body: CompletionRequest = parse(CompletionRequest, await self._body(request))
        if len(body.prompts) > self.gate.limits.n:
            raise ApiError(400, f"there are {len(body.prompts)} prompts, more than {self.gate.limits.n}", "prompt")
        tokens = [await self._tokens(prompt) for prompt in body.prompts]
        return await self._respond(request, body, tokens, Answer)

    @app.post("/v1/score", **openapi.score)
    async def score(self, request: Request) -> dict[str, Any]:
        """Values of a text, for each token and objective."""
        body: ScoreRequest = parse(ScoreRequest, await self._body(request))
        served, caller = self.served, _caller(request)
        names = served.scored(body, self.gate, caller)
        before, after = await asyncio.to_thread(served.encode_pair, self.gate, body.messages, body.text)
        tokens = len(before) + len(after)
        caller.spend(tokens)
        try:
            values = await self._values(names, before + after)
        except BaseException:
            caller.give_back(tokens)
            raise
        self.metrics.tokens(caller.name, tokens, 0)
        return {
            "object": "score",
            "model": served.name,
            "tokens": [{"id": token, "text": served.tokenizer.decode([token])} for token in after],
            "objectives": {name: each[len(before) :] for name, each in values.items()},
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    @app.get("/v1/models", **openapi.plain)
    async def models(self) -> dict[str, Any]:
        """The base model, and each preset as a model of its own."""
        return {"object": "list", "data": [self._model(name) for name in self.served.models(self.gate)]}

    @app.get("/v1/models/{model}", **openapi.plain)
    async def model(self, model: str) -> dict[str, Any]:
        """One of them."""
        self.served.preset(model, self.gate)
        return self._model(model)

    @app.get("/v1/objectives", **openapi.plain)
    async def objectives(self) -> dict[str, Any]:
        """What requests may steer by, and within which bounds."""
        data = [
            {"id": each.name, "object": "objective", **asdict(each), "strength": self.gate.limits.bounds(each.name)}
            for each in self.served.objectives.values()
        ]
        return {"object": "list", "data": data}

    @app.get("/health", **openapi.open_)
    async def health(self) -> dict[str, str]:
        """Whether the gateway is up."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, **openapi.text)
    async def prometheus(self) -> Response:
        """Metrics of all replicas, for Prometheus."""
        return PlainTextResponse(await scrape(), media_type="text/plain; version=0.0.4")

    async def _respond(
        self, request: Request, body: SamplingBody, prompts: list[Encoded], form: type[Answer]
    ) -> Response:
        caller, tokenizer = _caller(request), self.served.tokenizer
        answer = form(body.model, tokenizer, sum(len(prompt.tokens) for prompt in prompts), body.likeliest)
        requests = self.served.requests(body, self.gate, caller, prompts, uuid.uuid4().hex, form.longest)
        caller.spend(answer.prompt_tokens + sum(each.sampling.max_tokens for each in requests))
        self.metrics.strengths(requests[0].guidance.objectives)
        choices = [Choice(each) for each in requests]
        events = self._decode(request, caller, choices, answer.prompt_tokens, bool(body.stream))
        if not body.stream:
            async for _ in events:
                pass
            return JSONResponse(answer.whole(choices))
        first = await anext(events)  # an error that comes at once has a status of its own
        usage = body.stream_options is not None and body.stream_options.include_usage
        return StreamingResponse(_stream(answer, choices, first, events, usage), media_type="text/event-stream")

    async def _decode(
        self, request: Request, caller: Caller, choices: list[Choice], prompt: int, streamed: bool
    ) -> AsyncIterator[list[int]]:
        """Decode choices to their ends; yields which have new tokens. Counts it all, however it ends.

        prompt: tokens of the prompts, each counted once.
        """
        started, first = time.perf_counter(), None
        events = relay(self._base, choices, streamed, self.metrics.failover)
        try:
            async for some in events:
                if first is None:
                    first = time.perf_counter()
                    self.metrics.first_token(first - started)
                yield [event.choice for event in some]
        except ApiError:
            raise
        except Exception as error:
            known = as_vas_error(error)
            if known is None:
                raise
            raise ApiError(400, known.what) from None
        finally:
            await events.aclose()  # type: ignore[attr-defined]  # it is an async generator
            read = prompt if first is not None else 0
            sampled = sum(len(choice.tokens) for choice in choices)
            caller.give_back(prompt + sum(choice.request.sampling.max_tokens for choice in choices) - read - sampled)
            self.metrics.tokens(caller.name, read, sampled)
            self._count(choices, first)
            figures = {"prompt_tokens": read, "completion_tokens": sampled}
            request.state.log = figures | {"guidance": choices[0].request.guidance.objectives}

    def _count(self, choices: list[Choice], first: float | None) -> None:
        for choice in choices:
            if choice.finish_reason is not None:
                guided = bool(choice.request.guidance.active)
                more = len(choice.tokens) - 1
                kl = sum(token.kl for token in choice.tokens)
                seconds = (choice.ended - first) / more if more and first is not None else None
                self.metrics.response(seconds, kl if guided else None)
            if choice.lost_steps:
                self.metrics.unguided()

    async def _values(self, names: list[str], token_ids: list[int]) -> dict[str, list[float]]:
        """Values of each objective, one for each token. Raises ApiError for a value model that cannot be reached."""
        models = {name: self.served.objectives[name].value_model for name in names}
        columns = {name: self.served.column(name) for name in names}
        try:
            rows = {model: await self._base.values.remote(model, token_ids) for model in set(models.values())}
        except Exception as error:
            known = as_vas_error(error)
            if known is not None:
                raise ApiError(400, known.what, "objectives") from None
            raise ApiError(503, "the value model cannot be reached", code="model_unavailable", retry_after=5) from None
        return {name: [row[columns[name]] for row in rows[models[name]]] for name in names}

    async def _tokens(self, prompt: str | list[int]) -> Encoded:
        """A completion's prompt as token ids; in a thread, for a long one must not hold up the streams of others."""
        if isinstance(prompt, list):
            return Encoded(self.served.check_length(self.gate, prompt))
        return await asyncio.to_thread(self.served.encode, self.gate, prompt)

    async def _body(self, request: Request) -> bytes:
        return await body_of(request.receive, self.gate.limits.body_bytes)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "vas"}
