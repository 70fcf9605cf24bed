"""From the gateway to a replica of the base model, and on to another one when it dies.

Sampling is a function of the request, so a replica that is given the prompt and the tokens so far goes on with the
tokens that the first one would have sampled.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

import grpc
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from vas.decoding.sequence import Request, Token
from vas.errors import EngineDied, causes
from vas.serving.calls import ENGINE_DIED, OVERLOADED, Event
from vas.serving.errors import ApiError

logger = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds without a token in which replicas may die, or be full, under a response that has begun
PAUSE = 0.25  # seconds before another one is asked


@dataclass(slots=True)
class Choice:
    """One choice of a request, as far as it has come."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    ended: float = 0.0
    """When it did, by the clock `time.perf_counter`."""
    guided_steps: int = 0
    lost_steps: int = 0
    """Steps that value models had a say in, and that they could not be reached for."""

    def rest(self, attempt: int) -> Request:
        """What is left to be done, for a replica that knows nothing of it."""
        begun = tuple(token.token_id for token in self.tokens)
        return replace(self.request, request_id=f"{self.request.request_id}.{attempt}", begun=begun)


async def relay(
    handle: DeploymentHandle, choices: list[Choice], streamed: bool, died: Callable[[], None]
) -> AsyncIterator[list[Event]]:
    """Decode choices to their ends, and yield what comes of them; `died` is told of each replica that is lost.

    Raises ApiError. Leaving it early drops the requests.
    """
    attempt, fruitless_since = 0, None
    while open_ := [place for place, choice in enumerate(choices) if choice.finish_reason is None]:
        rest = [choices[place].rest(attempt) for place in open_]
        stream = handle.options(stream=True).generate.remote(rest, streamed)
        attempt += 1
        before = [(choice.guided_steps, choice.lost_steps) for choice in choices]
        try:
            async for events in stream:
                good = [event for event in events if event.error is None]
                for event in good:
                    event.choice = open_[event.choice]
                    _take_in(choices[event.choice], event, *before[event.choice])
                if good:
                    fruitless_since = None
                    yield good
                for event in events:
                    _raise(event)
        except BaseException as error:
            with suppress(Exception):  # it says once more what became of the call
                stream.cancel()
            lost = _is_lost(error)
            if not lost and not (isinstance(error, BackPressureError | _Full) and attempt > 1):
                raise _as_api_error(error) from None
            logger.warning("%d responses have to go on elsewhere (%s)", len(open_), type(error).__name__)
        else:
            lost = True
        if any(choice.finish_reason is None for choice in choices):
            if lost:
                died()
            fruitless_since = fruitless_since or time.monotonic()
            if time.monotonic() - fruitless_since > PATIENCE:
                raise ApiError(503, "the model cannot be reached", code="model_unavailable", retry_after=5)
            await asyncio.sleep(PAUSE)


def _take_in(choice: Choice, event: Event, guided: int, lost: int) -> None:
    """Let a choice go on by a token; guided, lost: its steps so far, at replicas before this one."""
    assert event.token is not None
    choice.tokens.append(event.token)
    choice.guided_steps, choice.lost_steps = guided + event.guided_steps, lost + event.lost_steps
    choice.finish_reason = event.token.finish_reason
    choice.ended = time.perf_counter()


def _raise(event: Event) -> None:
    """Raise what an event says went wrong, if anything: ApiError, or EngineDied."""
    if event.error is not None:
        status, code, message = event.error
        if status == ENGINE_DIED:
            raise EngineDied(message)
        if code == OVERLOADED:
            raise _Full(message)
        raise ApiError(status, message, code=code, retry_after=5 if status == 503 else None)


class _Full(Exception):
    """A replica has too much to do already."""


def _is_lost(error: BaseException) -> bool:
    """Whether a replica died, and another one may do the same work."""
    if isinstance(error, ReplicaUnavailableError):
        return True
    if any(isinstance(cause, EngineDied) for cause in causes(error)):
        return True
    return isinstance(error, RayError | grpc.RpcError) and not isinstance(error, RayTaskError)


def _as_api_error(error: BaseException) -> BaseException:
    if isinstance(error, BackPressureError | _Full):
        return ApiError(503, "too many requests are waiting", code="overloaded", retry_after=2)
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(503, "the model is not available", code="model_unavailable", retry_after=5)
    return error
