"""The Ray Data pipeline: jobs → sampler actors → rewards → one committed file a batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import cached_property

import pyarrow as pa
import ray
import ray.data

from vas import rewards, schema, storage
from vas.config import RunConfig
from vas.digests import digest
from vas.placement import sampler_actors
from vas.progress import Tracker
from vas.rollouts.jobs import Plan, discard_failed, finished_ids
from vas.rollouts.sampler import Sampler

logger = logging.getLogger(__name__)


@dataclass
class Summary:
    """What a pass over the pipeline did."""

    rows: int = 0
    """Rows there are now, those of earlier passes included."""
    sampled: int = 0
    tokens: int = 0
    seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    """First line of an error → rows."""

    @property
    def tokens_per_s(self) -> float:
        """Response tokens per second, all actors together."""
        return self.tokens / self.seconds if self.seconds else 0.0


class RewardScorer:
    """A Ray Data actor that fills in `rewards`; a row that cannot be scored gets `error`."""

    def __init__(self, config: RunConfig, guided: bool) -> None:
        self._config = config
        self._schema = schema.rollout_schema(list(config.rewards), guided)

    @cached_property
    def _rewards(self) -> dict[str, rewards.Reward]:
        """Loaded by the first batch: an error in an actor's constructor would not reach the user."""
        return rewards.load_rewards(self._config.rewards)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        sampled = [row for row in rows if row["error"] is None]
        prompts = [schema.Prompt.from_row(row) for row in sampled]
        scored = rewards.score(self._rewards, prompts, [row["response_text"] for row in sampled])
        for row, result in zip(sampled, scored, strict=True):
            row["rewards"], row["error"] = result.rewards, result.error
            if result.error is not None:
                row["finish_reason"] = "error"
        return pa.Table.from_pylist(rows, schema=self._schema)


class Committer:
    """Writes each batch as one file, atomically, under a name that its rows decide.

    So a batch that is retried lands on its own file, and readers see whole files only.
    """

    def __init__(self, location: str) -> None:
        self._location = location

    def __call__(self, table: pa.Table) -> pa.Table:
        identity = digest(*table["rollout_id"].to_pylist())
        storage.write_table(storage.join(self._location, f"{identity}.parquet"), table)
        return pa.table(
            {
                "tokens": [len(sampled) for sampled in table["logprobs"].to_pylist()],
                "error": table["error"],
            }
        )


def sample(config: RunConfig, plans: list[Plan], location: str, title: str, value: str | None = None) -> Summary:
    """Sample, score and commit every response of the plans that is not committed under `location` yet.

    value: location of the value model that guides, for plans with a setting.
    Rows that failed in an earlier pass are tried again.
    """
    if discard_failed(location):
        logger.info("trying the rows again that failed before")
    finished = finished_ids(location)
    batches = [batch for plan in plans for batch in plan.missing(finished, config.rollouts.batch_size)]
    total = sum(plan.samples * len(plan.prompts) for plan in plans)
    left = sum(len(ids) for batch in batches for ids in batch["rollout_id"].to_pylist())
    summary = Summary(rows=total - left)
    if summary.rows and left:
        logger.info("%d of %d rows are there already", summary.rows, total)
    if not batches:
        return summary
    dataset = (
        ray.data.from_arrow(batches)
        .map_batches(
            Sampler,
            fn_constructor_args=(config, value),
            compute=ray.data.ActorPoolStrategy(
                size=min(sampler_actors(config.resources), len(batches)), max_tasks_in_flight_per_actor=2
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=config.resources.cpus_per_actor,
            num_gpus=config.resources.gpus_per_actor,
        )
        .map_batches(
            RewardScorer,
            fn_constructor_args=(config, value is not None),
            compute=ray.data.ActorPoolStrategy(size=config.resources.reward_actors),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0.5 / config.resources.reward_actors,
            num_gpus=config.resources.gpus_per_reward_actor,
        )
        .map_batches(Committer(location).__call__, batch_size=None, batch_format="pyarrow", num_cpus=0.25)
    )
    with Tracker(title, left) as tracker:
        for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            _count(summary, block)
            summary.seconds = tracker.elapsed
            failed = sum(summary.errors.values())
            note = f"{summary.tokens_per_s:.0f} tokens/s" + (f", {failed} errors" if failed else "")
            tracker.advance(block.num_rows, note)
    return summary


def _count(summary: Summary, block: pa.Table) -> None:
    summary.rows += block.num_rows
    summary.sampled += block.num_rows
    summary.tokens += sum(block["tokens"].to_pylist())
    for error in block["error"].to_pylist():
        if error is not None:
            kind = error.splitlines()[0]
            summary.errors[kind] = summary.errors.get(kind, 0) + 1
