"""The Serve application: `vas serve`, `serve run vas.serving.app:build run=…`, and `serve deploy` build it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from vas import storage
from vas.digests import digest
from vas.placement import Group, options, require
from vas.serving.base import BaseReplica
from vas.serving.config import Replicas, Settled, parse_serving, settle
from vas.serving.gateway import Gateway
from vas.serving.requests import Served
from vas.serving.routing import StickyRouter
from vas.serving.value import ValueReplica

LOAD = 0.75  # share of the responses a replica can decode at once, at which another one is started
CALLS = 64  # to a replica of a value model at once: one from each replica of the base model
OPEN_REQUESTS = 2048  # of a gateway
HEALTH = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}


def build(args: dict[str, Any]) -> serve.Application:
    """An application from the keys of `Serving`.

    Raises VasError for a key, a run or a model that is wrong, and for what the cluster can never hold.
    """
    settled = settle(parse_serving(args, "the arguments of the application"))
    app = application(settled)
    if ray.is_initialized():
        require_room(settled)
    return app


def require_room(settled: Settled) -> None:
    """Raise VasError for deployments that the cluster can never hold."""
    least = [Group(what, keys, kept.min, kept.each) for what, keys, kept in deployments(settled)]
    require(least, spare={})


def application(settled: Settled) -> serve.Application:
    """Gateway, base model, and a deployment for each value model that is not colocated.

    Deployed again, it takes the place of its earlier version replica by replica. The gateway's `user_config` alone
    (presets, limits, sampling, keys) may change with no restart. Needs no cluster. Raises VasError for a model that is
    not there, and for presets, bounds and guidance that do not fit the objectives.
    """
    serving = settled.serving
    digests = {spec.name: checkpoint_digest(spec.path) for spec in settled.value_models}
    Served.of(settled, digests).check_gate(serving.gate, "gate.")  # a mistake shows here, not in a replica's log
    handles: dict[str, DeploymentHandle] = {}
    for spec in settled.value_models:
        if spec.placement == "deployment":
            handles[spec.name] = _deployment(
                ValueReplica,
                f"ValueModel-{spec.name}",
                spec.replicas,
                serving.drain_seconds,
                CALLS,
                target=1.0,
                request_router_config=RequestRouterConfig(request_router_class=StickyRouter),
            ).bind(settled, spec)
    base = _deployment(
        BaseReplica,
        "BaseModel",
        serving.replicas,
        serving.drain_seconds,
        serving.concurrency,
        target=LOAD * serving.max_sequences,
        max_queued_requests=serving.max_waiting or 1,
    ).bind(settled, handles)
    gateway = _deployment(
        Gateway,
        "Gateway",
        serving.gateways,
        serving.drain_seconds,
        OPEN_REQUESTS,
        target=OPEN_REQUESTS / 8,
        user_config=serving.gate.model_dump(mode="json"),
    )
    return gateway.bind(settled, digests, base)


def deployments(settled: Settled) -> list[tuple[str, str, Replicas]]:
    """Each deployment's replicas, after what errors call them and the keys that say how many there are."""
    serving = settled.serving
    found = [  # the largest first, for an error names the first that does not fit
        ("replicas of the base model", "replicas", serving.replicas),
        ("replicas of the gateway", "gateways", serving.gateways),
    ]
    for spec in settled.value_models:
        if spec.placement == "deployment":
            found.append((f"replicas of the value model {spec.name}", "value_models: replicas", spec.replicas))
    return found


def checkpoint_digest(location: str) -> str:
    """Identity of a value model: of its config, and of its weights' files."""
    location = storage.absolute(location)
    files = storage.list_files(location, ".safetensors")
    config = storage.read_bytes(storage.join(location, "config.json")).decode()
    return digest(config, *(part for file in files for part in storage.identity(file)))


def _deployment(
    kind: Callable[..., Any],
    name: str,
    replicas: Replicas,
    drain: float,
    ongoing: int,
    target: float,
    **settings: Any,
) -> serve.Deployment:
    if replicas.most > replicas.min:
        settings["autoscaling_config"] = AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.most,
            target_ongoing_requests=target,
            upscale_delay_s=replicas.upscale_delay,
            downscale_delay_s=replicas.downscale_delay,
        )
    else:
        settings["num_replicas"] = replicas.min
    return serve.deployment(
        kind,
        name=name,
        ray_actor_options=options(replicas.each),
        max_ongoing_requests=ongoing,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config=LoggingConfig(enable_access_log=False),  # the gateway writes one of its own
        **HEALTH,
        **settings,
    )
