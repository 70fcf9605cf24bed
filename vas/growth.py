"""The machines of a cluster: those there are, and those that its autoscaler may start."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import ray
import yaml
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

Amounts = dict[str, float]
"""Ray resource → amount: of a machine, or of what a process takes."""

BOOTSTRAP = "~/ray_bootstrap_config.yaml"  # where `ray up` leaves its config on the head
HEAD = "node:__internal_head__"
PATIENCE = 25.0  # seconds for the autoscaler to say what it makes of a request
NO_MARKS = ("CPU", "GPU", "memory", "object_store_memory")


def machines() -> list[Amounts]:
    """The machines there are now, as what each has in all."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def marks(machine: Amounts) -> list[str]:
    """Its custom resources."""
    return sorted(name for name in machine if name not in NO_MARKS and ":" not in name)


def largest() -> list[Amounts]:
    """The machines of the cluster at its largest; empty unless `ray up` made it and this is its head."""
    file = Path(BOOTSTRAP).expanduser()
    if not file.exists() or not _state().autoscaling_state.autoscaler_state_version:
        return []
    config = yaml.safe_load(file.read_text())
    kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
    room = config.get("max_workers", 0)
    workers = [kind.get("resources", {}) for kind in kinds for _ in range(min(kind.get("max_workers", room), room))]
    return [machine for machine in machines() if HEAD in machine] + workers


def feasible(bundles: Sequence[Amounts], ahead: bool = False) -> bool:
    """Whether the autoscaler would find machines for these processes at once; False where there is none to ask.

    It is asked by a placement group, for which it starts machines; `ahead` of need we do not ask on Kubernetes, where
    alone it is of use, and hope. Of a cluster that others use we are told what is free: then we wait, and say True.
    """
    if not _state().autoscaling_state.autoscaler_state_version:
        return False
    if (ahead and "KUBERNETES_SERVICE_HOST" in os.environ) or _busy():
        return True
    asked = placement_group([dict(bundle) for bundle in bundles if bundle], strategy="PACK")
    try:
        seen, deadline = 0, time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not asked.wait(0.5):
            state = _state()
            cluster, autoscaler = state.cluster_resource_state, state.autoscaling_state
            if _about(asked, autoscaler.infeasible_gang_resource_requests):
                return False
            if not seen and _about(asked, cluster.pending_gang_resource_requests):
                seen = cluster.cluster_resource_state_version
            if seen and autoscaler.last_seen_cluster_resource_state_version >= seen:
                return True  # it has thought about it: machines are on their way
        return True
    finally:
        remove_placement_group(asked)


def _busy() -> bool:
    total, free = ray.cluster_resources(), ray.available_resources()
    return any(total.get(name, 0) - free.get(name, 0) > 1e-3 for name in ("CPU", "GPU"))


def _about(asked: PlacementGroup, requests: Iterable[GangResourceRequest]) -> bool:
    return any(asked.id.hex() in request.details for request in requests)


def _state() -> GetClusterStatusReply:
    """What the cluster and its autoscaler say of each other."""
    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
