"""Which processes a stage keeps, and how many the cluster has room for; what could only hang is refused."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vas import growth
from vas.config import Resources
from vas.errors import VasError
from vas.growth import Amounts

SHARE = 0.001  # of a machine's mark, for each process that is to run on such machines
LIGHT: Amounts = {"CPU": 1.0}  # for what reads, cuts and writes beside the models


@dataclass(frozen=True)
class Group:
    """Processes of one kind that run at once."""

    what: str
    """Their name in errors."""
    keys: str
    """The config's keys that say how many there are, and what each takes."""
    count: int
    each: Amounts


def amounts(cpus: float, gpus: float, mark: str | None) -> Amounts:
    """What a process takes. mark: the custom resource of the machines it is to run on."""
    asked = {"CPU": float(cpus), "GPU": float(gpus)} | ({mark: SHARE} if mark else {})
    return {name: amount for name, amount in asked.items() if amount}


def options(each: Amounts) -> dict[str, Any]:
    """The same as options of a Ray task or actor."""
    marks = {name: each[name] for name in growth.marks(each)}
    return {"num_cpus": each.get("CPU", 0), "num_gpus": each.get("GPU", 0), "resources": marks}


def sampler(resources: Resources) -> Amounts:
    """What a sampler actor takes."""
    return amounts(resources.cpus_per_actor, resources.gpus_per_actor, resources.actors_on)


def reward_actor(resources: Resources) -> Amounts:
    """What an actor that scores takes."""
    return amounts(resources.cpus_per_reward_actor, resources.gpus_per_reward_actor, resources.reward_actors_on)


def worker(resources: Resources) -> Amounts:
    """What a training worker takes; its CPUs are its torch threads, by default as many as the machines have for it."""
    if resources.cpus_per_worker:
        return amounts(resources.cpus_per_worker, resources.gpus_per_worker, resources.workers_on)
    machines = growth.largest() or growth.machines()
    most = int(max((machine.get("CPU", 0) for machine in machines), default=1))
    kinds = [amounts(cpus, resources.gpus_per_worker, resources.workers_on) for cpus in range(max(1, most), 0, -1)]
    return next((each for each in kinds if room(each, [LIGHT], machines) >= resources.workers), kinds[-1])


def sampler_pool(resources: Resources, batches: int) -> tuple[int, int]:
    """The least and the most sampler actors for so many batches: as asked for, else as many as there is room for."""
    beside = [reward_actor(resources)] * resources.reward_actors + [LIGHT]
    smallest = min(resources.actors or max(1, room(sampler(resources), beside)), batches)
    return smallest, max(smallest, min(resources.max_actors or 0, batches))


def room(each: Amounts, beside: Sequence[Amounts] = (), machines: Sequence[Amounts] | None = None) -> int:
    """Processes of this kind that machines, by default those there are now, can hold while those of `beside` run too.

    These are put where they cost the least room.
    """
    if not each:
        return sys.maxsize
    free = [dict(machine) for machine in (growth.machines() if machines is None else machines)]
    for other in beside:
        costs = [(_fit(each, m) - _fit(each, _less(m, other)), i) for i, m in enumerate(free) if _fit(other, m)]
        if costs:
            _, cheapest = min(costs)
            free[cheapest] = _less(free[cheapest], other)
    return sum(_fit(each, machine) for machine in free)


def stage_groups(stage: str, resources: Resources) -> list[Group]:
    """What a stage of a run keeps running at once."""
    if stage.startswith("train"):
        keys = "resources.workers, cpus_per_worker, gpus_per_worker, workers_on"
        return [Group("training workers", keys, resources.workers, worker(resources))]
    samplers = "resources.actors, cpus_per_actor, gpus_per_actor, actors_on"
    scoring = "resources.reward_actors, cpus_per_reward_actor, gpus_per_reward_actor, reward_actors_on"
    return [
        Group("sampler actors", samplers, resources.actors or 1, sampler(resources)),
        Group("reward actors", scoring, resources.reward_actors, reward_actor(resources)),
    ]


def require(groups: Sequence[Group], spare: Amounts = LIGHT, ahead: bool = False) -> None:
    """Raise VasError unless the cluster can hold these groups at once, and `spare` beside them.

    A cluster that grows counts as large as it can get, where that is known; where not, its autoscaler is asked,
    which takes it some seconds. ahead: they are not to run now, so that no machines are to be started for them.
    """
    largest = growth.largest()
    machines = largest or growth.machines()
    for group in groups:
        beside = [one.each for one in groups if one is not group for _ in range(one.count)]
        fit = room(group.each, [*beside, spare], machines)
        if fit >= group.count:
            continue
        if not largest and growth.feasible([one.each for one in groups for _ in range(one.count)], ahead):
            return
        raise VasError(
            f"the cluster can never hold {group.count} {group.what} ({_words(group.each)} each): "
            f"there is room for {fit or 'none'}",
            group.keys,
            f"ask for less, or join a larger cluster; this one has {_inventory(machines)}"
            + (f", of which {_words(spare)} is kept for light work" if spare else ""),
        )


def _fit(each: Amounts, machine: Amounts) -> int:
    """Processes that fit on a machine; one that takes less than a GPU has its share of a single one."""
    counts = [_times(amount, machine.get(name, 0.0)) for name, amount in each.items()]
    if 0 < (share := each.get("GPU", 0)) < 1:
        whole, rest = divmod(machine.get("GPU", 0.0) + 1e-6, 1.0)
        counts.append(int(whole) * _times(share, 1.0) + _times(share, rest))
    return min(counts, default=sys.maxsize)


def _times(amount: float, of: float) -> int:
    return int(of / amount + 1e-6)


def _less(machine: Amounts, each: Amounts) -> Amounts:
    return machine | {name: machine.get(name, 0.0) - amount for name, amount in each.items()}


def _words(each: Amounts) -> str:
    """`2 CPU, 1 GPU, on a machine marked sampling`."""
    marks = [f"on a machine marked '{name}'" for name in growth.marks(each)]
    return ", ".join([f"{each[name]:g} {name}" for name in ("CPU", "GPU") if name in each] + marks) or "no CPU"


def _inventory(machines: Sequence[Amounts]) -> str:
    """`2 × (8 CPU, 1 GPU, sampling), 1 × (4 CPU)`."""
    kinds = Counter(_kind(machine) for machine in machines)
    return ", ".join(f"{count} x ({kind})" for kind, count in kinds.items())


def _kind(machine: Amounts) -> str:
    """`8 CPU, 1 GPU, sampling`."""
    counted = [f"{machine[name]:g} {name}" for name in ("CPU", "GPU") if machine.get(name)]
    return ", ".join(counted + growth.marks(machine)) or "no CPU"
