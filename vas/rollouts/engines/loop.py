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
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from vas.decoding.engine import Engine
from vas.decoding.sequence import Completion, Request
from vas.errors import VasError
from vas.rollouts.engines.faults import alone, describe, is_fatal, is_memory
from vas.rollouts.engines.interface import EngineDied

logger = logging.getLogger(__name__)

GROW_AFTER = 64  # steps that went well, before twice as many requests run at once again

Result = Completion | VasError


class Loop:
    """Decodes the requests of many callers at once.

    make: gives the engine; it is called in the loop's own thread, for torch counts its threads by the caller.
    """

    def __init__(self, make: Callable[[], Engine]) -> None:
        self._inbox: queue.SimpleQueue[tuple[Request, Future[Result]]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[Result]] = {}
        self._seconds: dict[str, float] = {}
        self._good = 0
        self.positions, self.busy_seconds = 0, 0.0
        """Token positions that the base model has run, and the time that steps took."""
        ready: Future[Engine] = Future()
        threading.Thread(target=self._run, args=(make, ready), daemon=True, name="engine loop").start()
        self.engine = ready.result()
        self._most = self._limit = self.engine.max_sequences

    def generate(self, requests: Sequence[Request]) -> list[Result]:
        """A completion or, for a request that fails alone, a VasError, in order. Several threads may call it.

        Raises EngineDied if the engine can't go on; no call succeeds after that.
        """
        futures: list[Future[Result]] = []
        for request in requests:
            futures.append(Future())
            self._inbox.put((request, futures[-1]))
        return [future.result() for future in futures]

    def _run(self, make: Callable[[], Engine], ready: Future[Engine]) -> None:
        try:
            engine = make()
        except BaseException as error:
            ready.set_exception(error)
            return
        ready.set_result(engine)
        while True:
            self._take_in(engine)
            try:
                self._step(engine)
            except EngineDied as death:
                for future in self._waiting.values():
                    future.set_exception(death)
                self._waiting.clear()
                while True:  # whoever still asks is told
                    self._inbox.get()[1].set_exception(death)

    def _take_in(self, engine: Engine) -> None:
        """Queue what has been asked for; wait for it while there is nothing to decode."""
        while not engine.busy or not self._inbox.empty():
            request, future = self._inbox.get()
            try:
                engine.add(request)
                self._waiting[request.request_id] = future
            except VasError as error:
                future.set_result(error)

    def _step(self, engine: Engine) -> None:
        started = time.perf_counter()
        try:
            tokens = engine.step()
        except Exception as error:
            self._mend(engine, error)
            return
        seconds = time.perf_counter() - started
        self.busy_seconds += seconds
        for token in tokens:
            self._seconds[token.request_id] = self._seconds.get(token.request_id, 0.0) + seconds / len(tokens)
            if token.finish_reason:
                done = engine.take(token.request_id)
                done.seconds = self._seconds.pop(token.request_id)
                self.positions += done.base_positions
                self._waiting.pop(token.request_id).set_result(done)
        self._good += 1
        if engine.max_sequences < self._most and self._good >= GROW_AFTER:
            self._allow(engine, 2 * engine.max_sequences)

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
            self._seconds.pop(ran[0], None)
            self._waiting.pop(ran[0]).set_result(alone(error, ran[0]))
            self._allow(engine, self._most)
        if memory:
            error.__traceback__ = None  # its frames hold tensors
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _allow(self, engine: Engine, sequences: int) -> None:
        engine.max_sequences, self._good = min(sequences, self._most), 0
