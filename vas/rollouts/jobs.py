"""What is to be sampled: a row per prompt and setting, with the sample indices that are missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vas import schema, storage
from vas.digests import digest

JOB_SCHEMA = pa.schema(
    [
        *schema.PROMPT_SCHEMA,
        ("setting", pa.string()),  # JSON: objective → strength; "{}" samples from π0
        ("round", pa.int32()),
        ("sample_index", pa.list_(pa.int32())),
        ("rollout_id", pa.list_(pa.string())),
        ("seed", pa.list_(pa.int64())),
        ("prefix_token_ids", pa.list_(pa.list_(pa.int32()))),  # what each response begins with already
    ]
)

BASE_SETTING = "{}"


def setting_key(strengths: dict[str, float]) -> str:
    """The JSON that names a setting of β, the same for the same strengths."""
    return json.dumps({name: float(beta) for name, beta in sorted(strengths.items()) if beta})


@dataclass(frozen=True)
class Plan:
    """Responses to sample: `samples` a prompt, under one setting of β.

    The random numbers of a sample are a function of (seed, prompt, sample_index) and its prefix alone,
    so settings are compared under the same ones.
    """

    prompts: list[schema.Prompt]
    samples: int
    run_seed: int
    round: int = 0
    setting: str = BASE_SETTING
    prefixes: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    """Roll-in: prompt id → the tokens that each of its samples begins with; none for a prompt that is not named."""

    def rollout_id(self, prompt: schema.Prompt, sample_index: int) -> str:
        """The identity of one response."""
        base = self._draw_id(prompt, sample_index)
        return base if self.setting == BASE_SETTING else digest(base, self.setting)

    def _draw_id(self, prompt: schema.Prompt, sample_index: int) -> str:
        """What the random numbers of a response hang on: not those again that its prefix was drawn with."""
        base = schema.rollout_id(self.run_seed, self.round, prompt.prompt_id, sample_index)
        if prompt.prompt_id not in self.prefixes:
            return base
        return digest(base, "roll-in", *self.prefixes[prompt.prompt_id][sample_index])

    def missing(self, finished: set[str], sequences: int) -> list[pa.Table]:
        """What is left to sample, in batches of about `sequences` responses."""
        batches: list[pa.Table] = []
        rows: list[dict[str, object]] = []
        count = 0
        for prompt in self.prompts:
            left = {i: self.rollout_id(prompt, i) for i in range(self.samples)}
            left = {i: identity for i, identity in left.items() if identity not in finished}
            if not left:
                continue
            if rows and count + len(left) > sequences:
                batches.append(pa.Table.from_pylist(rows, schema=JOB_SCHEMA))
                rows, count = [], 0
            rows.append(self._job(prompt, left))
            count += len(left)
        if rows:
            batches.append(pa.Table.from_pylist(rows, schema=JOB_SCHEMA))
        return batches

    def _job(self, prompt: schema.Prompt, left: dict[int, str]) -> dict[str, object]:
        prefixes = self.prefixes.get(prompt.prompt_id, [()] * self.samples)
        return {
            "prompt_id": prompt.prompt_id,
            "messages": list(prompt.messages),
            "text": prompt.text,
            "held_out": prompt.held_out,
            "setting": self.setting,
            "round": self.round,
            "sample_index": list(left),
            "rollout_id": list(left.values()),
            "seed": [schema.rollout_seed(self._draw_id(prompt, i)) for i in left],
            "prefix_token_ids": [list(prefixes[i]) for i in left],
        }


def discard_failed(location: str) -> int:
    """Take failed rows out of the committed files, so that they are sampled again; returns how many.

    Each file is replaced whole: whenever this is interrupted, a row is there once or missing.
    """
    failed = 0
    for file in storage.list_files(location, ".parquet"):
        table = storage.read_table([file])
        good = table.filter(pc.is_null(table["error"]))
        if good.num_rows < table.num_rows:
            failed += table.num_rows - good.num_rows
            storage.write_table(file, good)
    return failed


def finished_ids(location: str) -> set[str]:
    """The ids of all rows committed under a location."""
    table = storage.read_table(storage.list_files(location, ".parquet"), columns=["rollout_id"])
    return set(table["rollout_id"].to_pylist()) if table.num_columns else set()


def read_rollouts(location: str, columns: Iterable[str] | None = None) -> pa.Table:
    """All committed rows under a location."""
    return storage.read_table(storage.list_files(location, ".parquet"), columns=list(columns) if columns else None)


def by_prompt(rollouts: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """Rows that did not fail, by prompt, ordered by sample."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rollouts.to_pylist(), key=lambda row: row["sample_index"]):
        if row["error"] is None:
            found.setdefault(row["prompt_id"], []).append(row)
    return found
