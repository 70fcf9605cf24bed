"""One thread that steps a decoding engine for several callers: what one leaves free, the other fills.

A step that fails is taken apart: what ran in it waits again, and half as many run at once, until they fit into
memory or the one bad request is alone. Sampling is a function of the request, so what is repeated is the same.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import torch

from vas.decoding.engine import Engine
from vas.decoding.faults import alone, describe, is_fatal, is_memory
from vas.decoding.sequence import Completion, Request, Token
from vas.errors import EngineDied, Rejected, VasError

logger = logging.getLogger(__name__)

GROW_AFTER = 64  # steps that went well, before twice as many requests run at once again

T = TypeVar("T")
Result = Completion | VasError
Listener = Callable[[Token, Completion], None]
"""Told of each token, with the completion so far, in the loop's thread."""


@dataclass(slots=True)
class _Errand:
    """Something to do with the engine, what whoever asked for it waits for, and whether a step need not be over."""

    do: Callable[[Engine], Any]
    result: Future[Any]
    midway: bool = False


class Loop:
    """Decodes the requests of many callers at once. All methods may be called from any thread.

    make: gives the engine; it is called in the loop's own thread, for torch counts its threads by the caller.
    after: is called after each step, in that thread too, with how many tokens the step made and its seconds; with 0
    and 0 when a request was dropped.
    told: is called when listeners have been told of the tokens of a part of a step; not after parts without any.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        after: Callable[[int, float], None] | None = None,
        told: Callable[[], None] | None = None,
    ) -> None:
        self._inbox: queue.SimpleQueue[_Errand] = queue.SimpleQueue()
        self._put_off: deque[_Errand] = deque()
        self._waiting: dict[str, Future[Result]] = {}
        self._listeners: dict[str, Listener] = {}
        self._seconds: dict[str, float] = {}
        self._after, self._told = after, told
        self._good = 0
        self._common = 0.0  # seconds of parts without a token; each one that comes takes its share, of all that run
        self.positions, self.busy_seconds = 0, 0.0
        """Token positions that the base model has run, and the time that steps took."""
        self.death: EngineDied | None = None
        """Why no call can succeed any more."""
        ready: Future[Engine] = Future()
        threading.Thread(target=self._run, args=(make, ready), daemon=True, name="engine loop").start()
        self.engine = ready.result()
        self._most = self._limit = self.engine.max_sequences

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """A completion or, for a request that fails alone, a VasError, in order.

        Raises EngineDied if the engine can't go on; no call succeeds after that.
        """
        futures = [self.submit(request) for request in requests]
        return [future.result() for future in futures]

    def submit(self, request: Request, listener: Listener | None = None) -> Future[Result]:
        """Begin to decode a request; the future has what `generate` returns or raises."""
        result: Future[Result] = Future()

        def add(engine: Engine) -> None:
            try:
                engine.add(request)
            except VasError as error:
                result.set_result(error)
                return
            except Exception as error:  # of this request, not of the step that it may have come in the middle of
                logger.exception("a request could not be added")
                result.set_result(alone(error, request.request_id))
                return
            self._waiting[request.request_id] = result
            if listener is not None:
                self._listeners[request.request_id] = listener

        self._inbox.put(_Errand(add, result, midway=True))
        return result

    def abort(self, request_id: str) -> None:
        """Drop a request before the next step, wherever it is; its future stays without a result."""

        def drop(engine: Engine) -> None:
            engine.abort(request_id)
            self._forget(request_id)
            if self._after is not None:
                self._after(0, 0.0)

        self._inbox.put(_Errand(drop, Future()))

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Do something else with the engine between two steps."""
        result: Future[T] = Future()

        def run(engine: Engine) -> None:
            if not result.set_running_or_notify_cancel():
                return  # nobody waits any more
            try:
                result.set_result(function(engine))
            except Exception as error:
                result.set_exception(error)

        self._inbox.put(_Errand(run, result))
        return result

    def _run(self, make: Callable[[], Engine], ready: Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(engine)
        try:
            while True:
                if not engine.busy and not self._put_off:
                    self._inbox.get().do(engine)
                while self._put_off:
                    self._put_off.popleft().do(engine)
                for _ in range(self._inbox.qsize()):  # what comes meanwhile has its turn in the step, or after it
                    self._inbox.get().do(engine)
                if engine.busy:
                    self._step(engine)
        except EngineDied as death:
            self._die(death)
        except BaseException as error:  # a mistake of ours: nobody must wait for a thread that is gone
            logger.exception("the engine's loop failed")
            self._die(EngineDied(f"the engine's loop failed: {describe(error)}"))

    def _listen(self, engine: Engine) -> None:
        """Add the requests that have come; from the first other errand on, all wait for the end of the step."""
        for _ in range(self._inbox.qsize()):
            errand = self._inbox.get()
            if errand.midway and not self._put_off:
                errand.do(engine)
            else:
                self._put_off.append(errand)

    def _die(self, death: EngineDied) -> None:
        """Tell all who wait, and whoever still asks."""
        self.death = death
        for future in self._waiting.values():
            future.set_exception(death)
        self._waiting.clear()
        for errand in chain(self._put_off, iter(self._inbox.get, None)):
            if not errand.result.done():
                errand.result.set_exception(death)

    def _step(self, engine: Engine) -> None:
        parts, made, spent = engine.parts(), 0, 0.0
        while True:
            started = time.perf_counter()
            try:
                tokens = next(parts, None)
            except Exception as error:
                if made and self._after is not None:
                    self._after(made, spent)
                self._mend(engine, error)
                return
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
            if tokens is None:
                break
            made, spent = made + len(tokens), spent + seconds
            self._tell(engine, tokens, seconds)
            self._listen(engine)
        for name in list(engine.failed):
            self._fail(name, engine.failed.pop(name))
        if self._after is not None:
            self._after(made, spent)
        self._good += 1
        if engine.max_sequences < self._most and self._good >= GROW_AFTER:
            self._allow(engine, 2 * engine.max_sequences)

    def _tell(self, engine: Engine, tokens: list[Token], seconds: float) -> None:
        """Tell the listeners of a part's tokens, and end the responses that end. seconds: what the part took."""
        if not tokens:
            self._common += seconds
            return
        running = max(engine.running + sum(bool(token.finish_reason) for token in tokens), len(tokens))
        common = self._common / running
        self._common -= common * len(tokens)
        for token in tokens:
            name = token.request_id
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds / len(tokens) + common
            if listener := self._listeners.get(name):
                listener(token, engine.completion(name))
            if token.finish_reason:
                done = engine.take(name)
                done.seconds = self._seconds[name]
                self.positions += done.base_positions
                self._forget(name).set_result(done)
        if self._told is not None:
            self._told()

    def _fail(self, request_id: str, error: Exception) -> None:
        """End a request without a completion; where it was refused whatever it is, its caller need not ask for more."""
        result = self._forget(request_id)
        if isinstance(error, Rejected):
            result.set_exception(error)
        else:
            result.set_result(alone(error, request_id))

    def _forget(self, request_id: str) -> Future[Result]:
        """Nothing more is to be done for a request, but to set its result."""
        self._seconds.pop(request_id, None)
        self._listeners.pop(request_id, None)
        return self._waiting.pop(request_id, Future())

    def _mend(self, engine: Engine, error: Exception) -> None:
        """Go on with fewer at once, or without the one that fails alone. Raises EngineDied if that is no use."""
        ran, memory = engine.interrupted, is_memory(error)
        if is_fatal(error) or not ran:
            raise EngineDied(f"the engine died: {describe(error)}") from error
        if len(ran) > 1:
            half = -(-len(ran) // 2)
            logger.warning("%d responses failed together (%s); trying %d at a time", len(ran), describe(error), half)
            self._most = half if memory else self._most
            self._allow(engine, half)
        else:
            engine.abort(ran[0])
            if memory:
                self._most = self._limit  # it was this one that the others had no room beside
            self._forget(ran[0]).set_result(alone(error, ran[0]))
            self._allow(engine, self._most)
        if memory:
            error.__traceback__ = None  # its frames hold tensors
            engine.spare()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _allow(self, engine: Engine, sequences: int) -> None:
        engine.max_sequences, self._good = min(sequences, self._most), 0
