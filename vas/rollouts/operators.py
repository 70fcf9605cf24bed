"""The operators of the pipeline around the sampler: rewards, commits, and responses that are stored already."""

from __future__ import annotations

from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from vas import rewards, schema, storage
from vas.config import RunConfig
from vas.rollouts.counts import COMMITTED_SCHEMA
from vas.rollouts.metrics import Metrics
from vas.rollouts.plan import Plan
from vas.rollouts.sampler import COMPANY, ROW_SCHEMA
from vas.rollouts.stored import commit


class RewardScorer:
    """A Ray Data actor that fills in `rewards`; a row that cannot be scored gets `error`."""

    def __init__(self, config: RunConfig, guided: bool) -> None:
        self._config = config
        self._schema = pa.schema([*schema.rollout_schema(list(config.rewards), guided), *COMPANY])

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


class Committer:
    """Writes each batch as one file under a name that its place in the plan decides; says what it was."""

    def __init__(self, location: str, run: str) -> None:
        self._location, self._run = location, run

    def __call__(self, table: pa.Table) -> pa.Table:
        batches = []
        for name in table["batch"].unique().to_pylist():
            batch = table.filter(pc.equal(table["batch"], name))
            commit(self._location, name, batch.drop_columns(COMPANY.names), batch["retry"][0].as_py())
            batches.append(
                {
                    "rows": len(batch),
                    "tokens": pc.sum(batch["tokens"]).as_py(),
                    "errors": batch["error"].drop_null().to_pylist(),
                    "peak_share": batch["peak_share"][0].as_py(),
                }
            )
        committed = pa.Table.from_pylist(batches, schema=COMMITTED_SCHEMA)
        Metrics.of(self._run).count(committed)
        return committed
