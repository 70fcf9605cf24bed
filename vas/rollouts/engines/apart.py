"""A batch that fails is taken apart, until the one bad request is alone."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from vas.decoding.faults import alone, describe, is_fatal
from vas.decoding.sequence import Completion, Request
from vas.errors import EngineDied, VasError

logger = logging.getLogger(__name__)

Result = Completion | VasError


def generate_apart(generate: Callable[[Sequence[Request]], list[Result]], requests: Sequence[Request]) -> list[Result]:
    """What `generate` gives for all requests, called with half of them at a time where it fails with more.

    For an engine that takes whole batches; a request that fails alone is a VasError in its place.
    Raises EngineDied if the engine can't go on. A VasError that `generate` raises is the user's to mend, and raised.
    """
    results: list[Result] = []
    queue = deque([list(requests)] if requests else [])
    while queue:
        batch = queue.popleft()
        try:
            results += generate(batch)
        except VasError:
            raise
        except Exception as error:
            if is_fatal(error):
                raise EngineDied(f"the engine died: {describe(error)}") from error
            if len(batch) == 1:
                results.append(alone(error, batch[0].request_id))
                continue
            half = -(-len(batch) // 2)
            logger.warning("%d responses failed together (%s); trying %d at a time", len(batch), describe(error), half)
            queue.extendleft([batch[half:], batch[:half]])
    return results
