"""Committed rows: a file a batch. What is there, what is left to do, and how a batch is committed.

Commit protocol: a batch's file is named after its place in the plan and written atomically, so whoever writes it,
and however often, readers see its rows once. A batch with failed rows has a mark beside its file, written
before it and removed after a file without any; a mark too many costs a look, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vas import storage
from vas.errors import VasError
from vas.rollouts.plan import Plan

SUFFIX = ".parquet"
LOOKS = 16  # into files at once
_MARK = "_failed-"  # what begins with an underscore is no committed file

WORK_SCHEMA = pa.schema(
    [
        ("plan", pa.int32()),
        ("batch", pa.int32()),
        ("name", pa.string()),
        ("retry", pa.bool_()),  # its file is there, with failed rows in it
    ]
)


def pending(plans: Sequence[Plan], sequences: int, location: str) -> tuple[pa.Table, int]:
    """What is left to do under a location, a row a batch, and the responses in it.

    One listing answers it, so that the cost of resuming grows with the number of files and no faster.
    Raises VasError if there are files that the plans would not make.
    """
    found = [file.rpartition("/")[2] for file in storage.list_files(location, hidden=True)]
    names = {file.removesuffix(SUFFIX) for file in found if file.endswith(SUFFIX) and file[0] not in "._"}
    failed = {file.removeprefix(_MARK) for file in found if file.startswith(_MARK)} & names
    with ThreadPoolExecutor(LOOKS) as threads:  # a look may be a request to S3
        names_failed = sorted(failed)
        failures = dict(zip(names_failed, threads.map(partial(_failed_rows, location), names_failed), strict=True))
    rows: list[tuple[int, int, str, bool]] = []
    responses, known = 0, 0
    for number, plan in enumerate(plans):
        for batch in range(plan.batches(sequences)):
            name = f"{plan.key}-{batch:07d}"
            known += name in names
            if name not in names:
                responses += plan.size(batch, sequences)
            elif failures.get(name):
                responses += failures[name]
            else:
                continue
            rows.append((number, batch, name, name in names))
    if known < len(names):
        stranger = min(names - {f"{p.key}-{b:07d}" for p in plans for b in range(p.batches(sequences))})
        raise VasError(
            f"{len(names) - known} files here are of other rollouts than are to be sampled, such as {stranger}{SUFFIX}",
            location,
            "they were made with other settings or an older version: give the run another name, or remove them",
        )
    columns = list(zip(*rows, strict=True)) or [()] * len(WORK_SCHEMA)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, WORK_SCHEMA, strict=True)], WORK_SCHEMA), responses


def good_rows(location: str, name: str) -> pa.Table:
    """The rows of a committed batch that did not fail."""
    table = storage.read_table([_file(location, name)])
    return table.filter(pc.is_null(table["error"]))


def commit(location: str, name: str, table: pa.Table, retry: bool) -> None:
    """Write a batch's rows; on a retry, beside those of its file that did not fail.

    The same retry may be committed twice, by a task that is done again: what is there by then stays.
    """
    if retry:
        good = good_rows(location, name)
        there = pc.is_in(table["rollout_id"], good["rollout_id"].combine_chunks())
        table = pa.concat_tables([good, table.filter(pc.invert(there))]).combine_chunks()
    mark = storage.join(location, _MARK + name)
    failed = table["error"].null_count < len(table)
    if failed:
        storage.write_bytes(mark, b"")
    storage.write_table(_file(location, name), table)
    if retry and not failed:
        storage.delete(mark)


def _failed_rows(location: str, name: str) -> int:
    """Failed rows of a marked batch; none, and the mark goes, if its writer died before it could remove it."""
    table = storage.read_table([_file(location, name)], columns=["error"])
    failed = len(table) - table["error"].null_count
    if not failed:
        storage.delete(storage.join(location, _MARK + name))
    return failed


def _file(location: str, name: str) -> str:
    return storage.join(location, name + SUFFIX)


def read_rollouts(location: str, columns: Iterable[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
    """All committed rows under a location, or those that `where` keeps."""
    files = storage.list_files(location, SUFFIX)
    return storage.read_table(files, columns=list(columns) if columns else None, where=where)


def by_prompt(rollouts: pa.Table) -> dict[str, list[dict[str, Any]]]:
    """Rows that did not fail, by prompt, ordered by sample."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rollouts.to_pylist(), key=lambda row: row["sample_index"]):
        if row["error"] is None:
            found.setdefault(row["prompt_id"], []).append(row)
    return found
