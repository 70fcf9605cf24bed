"""The operators of the pipeline around the sampler: rewards, commits, and responses that are stored already."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vas import rewards, schema, storage
from vas.config import RunConfig
from vas.rollouts.counts import COMMITTED_SCHEMA
from vas.rollouts.metrics import Metrics
from vas.rollouts.plan import Plan
from vas.rollouts.sampler import COMPANY, ROW_SCHEMA
from vas.rollouts.stored import commit


class StoredResponses:
    """Takes the place of the sampler for responses that another run has: its rows, with the prompts they answer."""

    def __init__(self, config: RunConfig, plan: Plan, source: str) -> None:
        self._config, self._plan, self._source = config, plan, source

    def __call__(self, work: pa.Table) -> pa.Table:
        rows = []
        for task in work.to_pylist():
            jobs = self._plan.batch(task["batch"], self._config.rollouts.batch_size)
            prompts = {job.rollout_id: job.prompt for job in jobs}
            for row in storage.read_table([storage.join(self._source, task["name"] + ".parquet")]).to_pylist():
                prompt = prompts[row["rollout_id"]]
                row |= {"messages": list(prompt.messages), "text": prompt.text, "rewards": None}
                rows.append(row | {"batch": task["name"], "retry": False, "tokens": 0, "peak_share": 0.0})
        return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)


class Finisher:
    """A Ray Data actor that scores each batch, commits it as one file, and says what it was.

    The file's name says the batch's place in the plan. A row that cannot be scored gets `error`.
    One actor does both: a task that commits would be a process of its own, begun anew for most batches.
    """

    def __init__(self, config: RunConfig, location: str, guided: bool) -> None:
        self._config, self._location = config, location
        self._schema = pa.schema([*schema.rollout_schema(list(config.rewards), guided), *COMPANY])

    @cached_property
    def _rewards(self) -> dict[str, rewards.Reward]:
        """Loaded by the first batch: an error in an actor's constructor would not reach the user."""
        return rewards.load_rewards(self._config.rewards)

    def __call__(self, table: pa.Table) -> pa.Table:
        """A row of COMMITTED_SCHEMA for each batch in a table of ROW_SCHEMA."""
        scored = self._scored(table)
        batches = [self._committed(name, scored) for name in scored["batch"].unique().to_pylist()]
        committed = pa.Table.from_pylist(batches, schema=COMMITTED_SCHEMA)
        Metrics.of(self._config.name).count(committed)
        return committed

    def _scored(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        sampled = [row for row in rows if row["error"] is None]
        prompts = [schema.Prompt.from_row(row) for row in sampled]
        scored = rewards.score(self._rewards, prompts, [row["response_text"] for row in sampled])
        for row, result in zip(sampled, scored, strict=True):
            row["rewards"], row["error"] = result.rewards, result.error
            if result.error is not None:
                row["finish_reason"] = "error"
        return pa.Table.from_pylist(rows, schema=self._schema)

    def _committed(self, name: str, table: pa.Table) -> dict[str, Any]:
        batch = table.filter(pc.equal(table["batch"], name))
        commit(self._location, name, batch.drop_columns(COMPANY.names), batch["retry"][0].as_py())
        return {
            "rows": len(batch),
            "tokens": pc.sum(batch["tokens"]).as_py(),
            "errors": batch["error"].drop_null().to_pylist(),
            "peak_share": batch["peak_share"][0].as_py(),
        }
