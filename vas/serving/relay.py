"""From the gateway to a replica of the base model, and on to another one when it dies.

Sampling is a function of the request, so a replica that is given the prompt and the tokens so far goes on with the
tokens that the first one would have sampled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from vas.decoding.sequence import Request, Token
from vas.errors import EngineDied, causes
from vas.serving.calls import Event
from vas.serving.errors import ApiError

logger = logging.getLogger(__name__)

ATTEMPTS = 8  # replicas in a row that die under a request without a token of it
PAUSE = 0.25  # seconds before the next one is asked


@dataclass(slots=True)
class Choice:
    """One choice of a request, as far as it has come."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    lost_steps: int = 0

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
    fruitless = attempt = 0
    while open_ := [place for place, choice in enumerate(choices) if choice.finish_reason is None]:
        rest = [choices[place].rest(attempt) for place in open_]
        stream = handle.options(stream=True).generate.remote(rest, streamed)
        attempt += 1
        before = sum(len(choice.tokens) for choice in choices)
        try:
            async for events in stream:
                for event in events:
                    event.choice = open_[event.choice]
                    _take_in(choices[event.choice], event)
                yield events
        except BaseException as error:
            stream.cancel()
            if not _is_lost(error):
                raise _as_api_error(error) from None
            logger.warning("a replica was lost under %d responses (%s)", len(open_), type(error).__name__)
        fruitless = fruitless + 1 if sum(len(choice.tokens) for choice in choices) == before else 0
        if any(choice.finish_reason is None for choice in choices):
            died()
            if fruitless == ATTEMPTS:
                raise ApiError(503, "the model cannot be reached", code="model_unavailable", retry_after=5)
            await asyncio.sleep(PAUSE * fruitless)


def _take_in(choice: Choice, event: Event) -> None:
    """Let a choice go on by an event. Raises ApiError for one that is an error."""
    if event.error is not None:
        status, code, message = event.error
        if status == 599:  # the engine died, but said so
            raise EngineDied(message)
        raise ApiError(status, message, code=code, retry_after=5 if status == 503 else None)
    assert event.token is not None
    choice.tokens.append(event.token)
    choice.lost_steps = max(choice.lost_steps, event.lost_steps)
    choice.finish_reason = event.token.finish_reason


def _is_lost(error: BaseException) -> bool:
    """Whether a replica died, and another one may do the same work."""
    if isinstance(error, ReplicaUnavailableError):
        return True
    if any(isinstance(cause, EngineDied) for cause in causes(error)):
        return True
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _as_api_error(error: BaseException) -> BaseException:
    if isinstance(error, BackPressureError):
        return ApiError(503, "too many requests are waiting", code="overloaded", retry_after=2)
    if isinstance(error, DeploymentUnavailableError):
        return ApiError(503, "the model is not available", code="model_unavailable", retry_after=5)
    return error
