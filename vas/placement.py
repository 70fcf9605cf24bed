"""How many processes and threads fit on the cluster; asks Ray, and refuses what could only hang."""

from __future__ import annotations

import ray

from vas.config import Resources
from vas.errors import VasError


def model_cpus() -> int:
    """CPUs for the models: all that the cluster has but one, which reads, scores and writes."""
    return max(1, int(ray.cluster_resources().get("CPU", 1)) - 1)


def sampler_pool(resources: Resources, batches: int) -> tuple[int, int]:
    """The least and the most sampler actors for so many batches. Raises VasError as `sampler_actors` does."""
    smallest = min(sampler_actors(resources), batches)
    return smallest, max(smallest, min(resources.max_actors or 0, batches))


def sampler_actors(resources: Resources) -> int:
    """Sampler actors: as asked for, else as many as there is room for beside the reward actors.

    Raises VasError if they don't fit.
    """
    room = model_cpus() // resources.cpus_per_actor
    if resources.gpus_per_actor:
        gpus = ray.cluster_resources().get("GPU", 0) - resources.reward_actors * resources.gpus_per_reward_actor
        room = min(room, int(gpus // resources.gpus_per_actor))
    actors = resources.actors or max(1, room)
    _refuse_if_larger(actors, resources.cpus_per_actor, "resources.actors x resources.cpus_per_actor")
    return actors


def worker_threads(resources: Resources) -> int:
    """CPUs, and so torch threads, of a training worker. Raises VasError if the workers don't fit."""
    threads = resources.cpus_per_worker or max(1, model_cpus() // resources.workers)
    _refuse_if_larger(resources.workers, threads, "resources.workers x resources.cpus_per_worker")
    return threads


def _refuse_if_larger(processes: int, cpus: int, where: str) -> None:
    if processes * cpus > model_cpus():
        raise VasError(
            f"{processes} x {cpus} CPUs are asked for, but the cluster has {model_cpus()} for models",
            where,
            "lower them, or join a larger cluster with resources.address (one CPU is kept for light work)",
        )
