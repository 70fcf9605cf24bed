"""How many processes fit on machines, and what is refused; real clusters are asked in tests/cluster."""

import pytest

from vas import growth
from vas.config import Resources
from vas.errors import VasError
from vas.placement import LIGHT, amounts, options, require, room, sampler_pool, stage_groups, worker

SMALL, LARGE = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 2.0}


@pytest.fixture
def machines(monkeypatch):
    """Sets the machines of the cluster, and those it may grow to."""

    def have(*now: dict, largest: tuple[dict, ...] = ()) -> None:
        monkeypatch.setattr(growth, "machines", lambda: [dict(machine) for machine in now])
        monkeypatch.setattr(growth, "largest", lambda: [dict(machine) for machine in largest])
        monkeypatch.setattr(growth, "feasible", lambda bundles, ahead: False)

    return have


def test_a_process_fits_on_one_machine_not_on_the_sum_of_them(machines):
    machines({"CPU": 3.0}, {"CPU": 3.0})
    assert room(amounts(2, 0, None)) == 2
    assert room(amounts(4, 0, None)) == 0


def test_light_work_is_put_where_it_costs_least(machines):
    machines({"CPU": 2.0}, {"CPU": 3.0})
    assert room(amounts(2, 0, None), [LIGHT]) == 2
    machines({"CPU": 2.0}, {"CPU": 2.0})
    assert room(amounts(2, 0, None), [LIGHT]) == 1


def test_a_mark_picks_the_machines(machines):
    machines(SMALL, SMALL | {"sampling": 1.0})
    asked = amounts(1, 0, "sampling")
    assert room(asked, [LIGHT]) == 4  # the light one goes to the other machine
    assert options(asked) == {"num_cpus": 1.0, "num_gpus": 0, "resources": {"sampling": 0.001}}


def test_samplers_leave_reward_actors_their_gpus(machines):
    machines(LARGE)
    resources = Resources(gpus_per_actor=0.5, gpus_per_reward_actor=0.5, reward_actors=2)
    assert sampler_pool(resources, 100) == (2, 2)
    assert sampler_pool(resources, 1) == (1, 1)
    grows = Resources(gpus_per_actor=0.5, gpus_per_reward_actor=0.5, max_actors=8)
    assert sampler_pool(grows, 100) == (3, 8)


@pytest.mark.parametrize(("workers", "cpus"), [(1, 4), (2, 3), (3, 2), (4, 1), (9, 1)])
def test_workers_take_the_cpus_there_are(machines, workers, cpus):
    machines(SMALL, SMALL)
    assert worker(Resources(workers=workers))["CPU"] == cpus


def refusal(stage: str, **keys: object) -> str:
    with pytest.raises(VasError) as caught:
        require(stage_groups(stage, Resources.model_validate(keys)))
    return str(caught.value)


def test_what_cannot_fit_is_told_with_what_is_there(machines):
    machines(SMALL, LARGE, LARGE)
    said = refusal("train", workers=8, gpus_per_worker=1)
    assert "never hold 8 training workers (1 CPU, 1 GPU each): there is room for 4" in said
    assert "resources.workers, cpus_per_worker, gpus_per_worker, workers_on" in said
    assert "1 x (4 CPU), 2 x (16 CPU, 2 GPU)" in said
    said = refusal("rollouts", actors=3, cpus_per_actor=16)
    assert "3 sampler actors (16 CPU each): there is room for 2" in said
    said = refusal("evaluate", reward_actors_on="scoring")
    assert "1 reward actors (on a machine marked 'scoring' each): there is room for none" in said


def test_what_fits_passes(machines):
    machines(SMALL, LARGE, LARGE)
    require(stage_groups("train 0", Resources(workers=4, gpus_per_worker=1)))
    require(stage_groups("rollouts", Resources(actors=2, cpus_per_actor=15, gpus_per_reward_actor=2)))


def test_a_share_of_a_gpu_is_of_one_gpu(machines):
    machines(LARGE)
    assert room(amounts(1, 0.4, None)) == 4
    assert room(amounts(1, 0.6, None)) == 2


def test_what_is_larger_is_placed_first(machines):
    machines({"CPU": 8.0, "GPU": 1.0}, {"CPU": 16.0, "GPU": 1.0})
    require(stage_groups("rollouts", Resources(actors=1, cpus_per_actor=8, gpus_per_actor=1, cpus_per_reward_actor=9)))


def test_light_work_leaves_marked_machines_alone(machines):
    machines({"CPU": 3.0}, {"CPU": 1.0, "work": 1.0}, {"CPU": 1.0, "work": 1.0})
    require(stage_groups("rollouts", Resources(actors=2, actors_on="work")))
    require(stage_groups("train", Resources(workers=2, workers_on="work")))
    assert "there is room for 2" in refusal("rollouts", actors=3, actors_on="work")


def test_a_cluster_counts_as_large_as_it_can_get(machines):
    machines({}, largest=({}, LARGE, LARGE))
    require(stage_groups("train", Resources(workers=4, gpus_per_worker=1, cpus_per_worker=4)))
    assert "2 x (16 CPU, 2 GPU)" in refusal("train", workers=5, gpus_per_worker=1)
