"""Which replica of a value model gets a question: the one that knows its sequences."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class StickyRouter(RequestRouter):
    """Sends a call to the replica that its argument `replica` names, as long as it is there; else to a random one.

    A call that goes elsewhere all the same is answered with what is missing there, so nothing but time is lost.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first."""
        wanted = pending_request.kwargs.get("replica") if pending_request is not None else None
        mine = [each for each in candidate_replicas if each.replica_id.unique_id == wanted]
        return [mine or [random.choice(candidate_replicas)]] if candidate_replicas else []
