"""The Ray Data pipeline: batches of a plan → sampler actors → rewards → one committed file a batch."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray import exceptions

from vas import storage
from vas.config import RunConfig
from vas.errors import VasError, causes
from vas.placement import options, reward_actor, sampler, sampler_pool
from vas.progress import Tracker
from vas.rollouts.counts import Summary
from vas.rollouts.ledger import Ledger
from vas.rollouts.operators import Finisher, StoredResponses
from vas.rollouts.plan import Plan
from vas.rollouts.sampler import Sampler
from vas.rollouts.stored import pending

logger = logging.getLogger(__name__)

CALLS = 2  # batches in an actor at once: what one leaves free, the other fills
CUT_TOGETHER = 1024  # batches that one task cuts apart
RETRIES = 3  # of a batch whose process died, before what is left is planned anew; Ray Data itself never gives up
FRUITLESS_PASSES = 2  # that end in lost processes without a batch finished, before we give up
LOST = (
    exceptions.RayActorError,
    exceptions.WorkerCrashedError,
    exceptions.NodeDiedError,
    exceptions.ObjectLostError,
    exceptions.OutOfMemoryError,
)


def sample(
    config: RunConfig,
    plans: list[Plan],
    location: str,
    title: str,
    value: str | None = None,
    ledger: Ledger | None = None,
) -> Summary:
    """Sample, score and commit every response of the plans that is not committed under `location` yet.

    value: location of the value model that guides, for plans with a setting or a roll-in. ledger: of a server's calls;
    when its budget is spent, that is an error, and what is finished is kept.
    Rows that failed in an earlier pass are tried again. Work of actors and machines that die is done elsewhere;
    where Ray can't see to that itself, what is missing is planned anew.
    Raises VasError for what no retry mends.
    """
    summary = Summary()
    total = sum(plan.samples * len(plan.prompts) for plan in plans)
    fruitless, before = 0, -1
    while True:
        work, left = pending(plans, config.rollouts.batch_size, location)
        summary.rows, summary.errors = total - left, {}
        if before < 0 < summary.rows and left:
            logger.info("%d of %d rows are there already", summary.rows, total)
        if not len(work):
            return summary
        fruitless = fruitless + 1 if left == before else 0
        before = left
        try:
            rows = _sampled(config, plans, location, value, ledger, work, summary)
            tracker = Tracker(title, left)
            _commit_all(rows, config, location, tracker, summary, guided=value is not None, ledger=ledger)
            if ledger is not None and (summary.rows < total or summary.errors):
                ledger.check()
            return summary
        except Exception as error:
            if not any(isinstance(cause, LOST) for cause in causes(error)):
                raise
            if fruitless == FRUITLESS_PASSES:
                first = ", ".join(work["name"].to_pylist()[:3])
                raise VasError(
                    f"the processes that sample or score die again and again: {str(error).splitlines()[0]}",
                    f"{location}: {len(work)} batches are left, {first} first",
                    "what is finished is kept; see Ray's logs for the reason (memory, most often: lower batch_size)",
                ) from None
            logger.warning("processes were lost; going on with what is missing")


def rescore(config: RunConfig, plan: Plan, source: str, location: str, title: str) -> Summary:
    """Score the responses under `source`, committed by the same plan, with this config's rewards; nothing is sampled.

    Rows come under `location` with the ids they have. Those that failed are failed there too, and tried again
    by `sample`, as those that `source` lacks are. Batches that are there already are left as they are.
    """
    work, _ = pending([plan], config.rollouts.batch_size, location)
    stored = pa.array([file.rpartition("/")[2].removesuffix(".parquet") for file in storage.list_files(source)])
    work = work.filter(pc.and_(pc.is_in(work["name"], stored), pc.invert(work["retry"])))
    summary = Summary()
    if len(work):
        left = sum(plan.size(batch, config.rollouts.batch_size) for batch in work["batch"].to_pylist())
        rows = _dataset(work).map_batches(
            StoredResponses(config, plan, source).__call__, batch_size=None, batch_format="pyarrow", num_cpus=0.25
        )
        _commit_all(rows, config, location, Tracker(title, left), summary, guided=False)
    return summary


def _sampled(
    config: RunConfig,
    plans: list[Plan],
    location: str,
    value: str | None,
    ledger: Ledger | None,
    work: pa.Table,
    summary: Summary,
) -> ray.data.Dataset:
    """Rows of ROW_SCHEMA from a table of WORK_SCHEMA, sampled by a pool of actors."""
    smallest, largest = sampler_pool(config.resources, len(work))
    summary.actors = smallest
    return _dataset(work).map_batches(
        Sampler,
        fn_constructor_args=(config, plans, location, value, ledger),
        compute=ray.data.ActorPoolStrategy(
            min_size=smallest,
            max_size=largest,
            max_tasks_in_flight_per_actor=CALLS + 1,
            max_concurrent_calls_per_actor=CALLS,
            enable_true_multi_threading=True,
        ),
        batch_size=None,
        batch_format="pyarrow",
        max_task_retries=RETRIES,
        **options(sampler(config.resources)),
    )


def _dataset(work: pa.Table) -> ray.data.Dataset:
    """A block a batch; blocks are cut as they are needed, for Ray takes milliseconds to be given one."""
    ray.data.DataContext.get_current().target_max_block_size = None  # a batch is one file: it must stay one block
    parts = [work.slice(row, CUT_TOGETHER) for row in range(0, len(work), CUT_TOGETHER)]
    return ray.data.from_arrow(parts).repartition(target_num_rows_per_block=1)


def _commit_all(
    rows: ray.data.Dataset,
    config: RunConfig,
    location: str,
    tracker: Tracker,
    summary: Summary,
    guided: bool,
    ledger: Ledger | None = None,
) -> None:
    """Score rows of ROW_SCHEMA and commit them, a file a batch, with progress."""
    resources = config.resources
    dataset = rows.map_batches(
        Finisher,
        fn_constructor_args=(config, location, guided),
        compute=ray.data.ActorPoolStrategy(size=resources.reward_actors),
        batch_size=None,
        batch_format="pyarrow",
        max_task_retries=RETRIES,
        **options(reward_actor(resources)),
    )
    earlier = summary.seconds
    with tracker:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            count = summary.add(block)
            summary.seconds = earlier + tracker.elapsed
            tracker.advance(count, summary.note() + (f", {ledger.note()}" if ledger is not None else ""))
