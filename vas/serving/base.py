"""The deployment of the base model: the engine's loop, with value models in its process or behind handles."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.loop import Loop
from vas.decoding.scorer import InProcess, Scorer
from vas.decoding.sequence import Completion, Request, Token
from vas.errors import EngineDied, Rejected, VasError
from vas.models.base import quieten, set_threads
from vas.models.served import ServedModel, open_base
from vas.models.value import ValueModelConfig, check_tokenizers
from vas.serving.calls import ENGINE_DIED, OVERLOADED, Event, Question, Reply, own
from vas.serving.config import Settled, ValueModelSpec
from vas.serving.metrics import EngineMetrics
from vas.serving.remote import RemoteScorer
from vas.serving.texts import values_of


class BaseReplica:
    """A replica: a thread that steps the engine, and a stream of events for each call.

    handles: those of the value models that are deployments of their own, by their names.
    """

    def __init__(self, settled: Settled, handles: dict[str, DeploymentHandle]) -> None:
        quieten()
        self._settled = settled
        self._handles = {name: own(handle) for name, handle in handles.items()}
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._metrics = EngineMetrics(self._replica)
        self._streams: dict[_Mailbox, dict[int, str]] = {}
        """Streams, each with the choices that are under way and their request ids."""
        self._sends = settled.serving.sends
        self._base = open_base(settled.base, "cuda" if settled.serving.replicas.gpus else "cpu")
        self._local: dict[str, InProcess] = {}
        self._filled: list[_Mailbox] = []
        self._event_loop = asyncio.get_running_loop()  # handles belong to it; the engine's thread asks through it
        self._loop = Loop(self._make, self._measure, self._post)

    def _make(self) -> Engine:
        serving = self._settled.serving
        set_threads(int(serving.replicas.cpus))
        scorers = [self._scorer(spec) for spec in self._settled.value_models]
        return Engine(
            self._base,
            scorers,
            max_sequences=serving.max_sequences,
            kv_tokens=serving.kv_tokens,
            linears=self._settled.base.linears,
            free=True,
        )

    def _scorer(self, spec: ValueModelSpec) -> Scorer:
        if spec.placement == "colocated":
            self._local[spec.name] = load_scorer(spec.name, spec.path, self._base, self._settled.base.linears)
            return self._local[spec.name]
        config = ValueModelConfig.load(spec.path)
        check_tokenizers(config, self._base.name, self._base.tokenizer_digest)
        handle = self._handles[spec.name]

        async def answer(replica: str | None, question: Question) -> Reply:
            response = handle.score.remote(question, replica=replica)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise

        def ask(replica: str | None, question: Question) -> Future[Reply]:
            return asyncio.run_coroutine_threadsafe(answer(replica, question), self._event_loop)

        return RemoteScorer(
            spec.name,
            tuple(each["name"] for each in config.objectives),
            config.context_length,
            config.head["kind"] == "vocab",
            ask,
            self._replica,
            lambda seconds: self._metrics.value_call(spec.name, seconds),
        )

    async def generate(self, requests: list[Request], streamed: bool) -> AsyncIterator[list[Event]]:
        """What becomes of each request, a token at a time; tokens that come fast share an item.

        streamed: somebody reads along. Leaving it early drops the requests before the next step.
        """
        choices = sum(map(len, self._streams.values()))
        if choices and choices + len(requests) > self._settled.serving.concurrency:
            yield [Event(0, error=(503, OVERLOADED, "too many requests are waiting"))]
            return
        mailbox = _Mailbox(self._event_loop, self._filled)
        left = self._streams[mailbox] = {}
        for choice, request in enumerate(requests):
            left[choice] = request.request_id
            mailbox.submit(self._loop, choice, request, self._settled.base.called)
        sent = 0.0
        try:
            while left:
                await mailbox.wait()
                share = len(self._streams) / self._sends if streamed else 1.0
                if sent and (early := sent + share - time.monotonic()) > 0 and not mailbox.finished:
                    await mailbox.wait_finished(early)
                sent = time.monotonic()
                events = mailbox.take()
                for event in events:
                    if event.last:
                        left.pop(event.choice, None)
                yield events
        finally:
            del self._streams[mailbox]
            for request_id in left.values():
                self._loop.abort(request_id)

    async def values(self, name: str, token_ids: list[int]) -> list[list[float]]:
        """V after each token of a text, of a value model: [T][J]. Raises VasError if it only compares tokens."""
        if name in self._handles:
            return await self._handles[name].values.remote(token_ids)
        parts = self._local[name].values(token_ids)
        return await values_of(lambda: asyncio.wrap_future(self._loop.call(lambda engine: next(parts, None))))

    async def state(self) -> dict[str, Any]:
        """What it holds: for tests, and for people who look for a leak."""
        engine = self._loop.engine
        return await asyncio.wrap_future(
            self._loop.call(
                lambda _: {
                    "replica": self._replica,
                    "streams": len(self._streams),
                    "running": engine.running,
                    "waiting": engine.waiting,
                    "kv_bytes": engine.kv_bytes,
                }
            )
        )

    def check_health(self) -> None:
        """Raises EngineDied when Serve should replace this replica."""
        if self._loop.death is not None:
            raise self._loop.death

    def _post(self) -> None:
        while self._filled:
            self._filled.pop().post()

    def _measure(self, tokens: int, seconds: float) -> None:
        engine = self._loop.engine
        if isinstance(self._base, ServedModel):
            cost = self._base.server.cost
            self._metrics.cost(cost["calls"], cost["prompt_tokens"] + cost["completion_tokens"])
        self._metrics.step(tokens, seconds, engine.running, engine.waiting, engine.kv_bytes)


class _Mailbox:
    """Events on their way from the engine's thread to the event loop's; those of a part of a step come together."""

    def __init__(self, loop: asyncio.AbstractEventLoop, filled: list[_Mailbox]) -> None:
        """filled: where it enters itself once it has something to be posted."""
        self._loop, self._filled, self._lock = loop, filled, threading.Lock()
        self._step: list[Event] = []
        self._events: list[Event] = []
        self._some, self._end = asyncio.Event(), asyncio.Event()

    @property
    def finished(self) -> bool:
        """Whether the end of a choice is among what has come."""
        return self._end.is_set()

    async def wait(self) -> None:
        """Until something has come."""
        await self._some.wait()

    async def wait_finished(self, seconds: float) -> None:
        """Until a choice has ended, or so long."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._end.wait(), seconds)

    def take(self) -> list[Event]:
        """All that has come."""
        with self._lock:
            events, self._events = self._events, []
            self._some.clear()
            self._end.clear()
        return events

    def submit(self, loop: Loop, choice: int, request: Request, elsewhere: bool) -> None:
        """Decode a request; what comes of it lies here. elsewhere: the base model is behind another server."""
        fails = request.guidance.on_error == "fail"

        def listen(token: Token, completion: Completion) -> None:
            if completion.lost_steps and fails:
                self._add(Event(choice, error=(503, "value_model_unavailable", _UNREACHABLE)))
                loop.abort(request.request_id)
            else:
                self._add(Event(choice, token, completion.guided_steps, completion.lost_steps))

        def done(result: Future[Any]) -> None:
            error = result.exception() or result.result()
            if isinstance(error, VasError | Rejected):
                said = (502, "base_model_unavailable") if elsewhere else (500, "server_error")
                self._add(Event(choice, error=(*said, str(error))))
                self.post()
            elif isinstance(error, EngineDied):
                self._add(Event(choice, error=(ENGINE_DIED, "engine_died", str(error))))
                self.post()
                threading.Timer(1.0, os._exit, (1,)).start()  # it would answer fastest, and so be asked most

        try:
            loop.engine.check(request)
        except VasError as error:
            self._add(Event(choice, error=(400, "invalid_value", str(error))))
            self.post()
            return
        loop.submit(request, listen).add_done_callback(done)

    def _add(self, event: Event) -> None:
        if not self._step:
            self._filled.append(self)
        self._step.append(event)

    def post(self) -> None:
        """Hand over what has been added."""
        step, self._step = self._step, []
        ends = any(event.last for event in step)
        with self._lock:
            wake = not self._events
            self._events += step
        if wake or ends:
            with contextlib.suppress(RuntimeError):  # the event loop has ended, and so has the replica
                self._loop.call_soon_threadsafe(self._ring, ends)

    def _ring(self, ends: bool) -> None:
        with self._lock:
            if self._events:  # else it was taken already
                self._some.set()
                if ends:
                    self._end.set()


_UNREACHABLE = "a value model that steers this request cannot be reached"
