"""How batches are committed, and what is counted of them."""

import numpy as np
import pyarrow as pa
import pytest

from vas import schema, storage
from vas.rollouts.counts import kind
from vas.rollouts.stored import commit, read_rollouts
from vas.rollouts.summary import BINS, _spread


def rows(*ids: str, error: str | None = None) -> pa.Table:
    """Rows of these ids; failed, if an error is given."""
    return pa.Table.from_pylist(
        [{"rollout_id": id_, "error": error, "rewards": {"brief": 1.0}} for id_ in ids],
        schema=schema.rollout_schema(["brief"]),
    )


def ids_of(location: str) -> list[str]:
    return read_rollouts(location)["rollout_id"].to_pylist()


def test_a_retry_that_is_committed_twice_has_its_rows_once(tmp_path):
    location = str(tmp_path)
    commit(location, "batch", pa.concat_tables([rows("a", "b"), rows("c", "d", error="stalled")]), retry=False)
    assert len(storage.list_files(location, hidden=True)) == 2
    for _ in range(2):
        commit(location, "batch", rows("c", "d"), retry=True)
        assert ids_of(location) == ["a", "b", "c", "d"]
        assert len(storage.list_files(location, hidden=True)) == 1  # the mark is gone


def test_a_retry_that_fails_in_part_keeps_what_went_well(tmp_path):
    location = str(tmp_path)
    commit(location, "batch", pa.concat_tables([rows("a"), rows("b", "c", error="stalled")]), retry=False)
    again = pa.concat_tables([rows("b"), rows("c", error="stalled")])
    for _ in range(2):
        commit(location, "batch", again, retry=True)
        assert sorted(ids_of(location)) == ["a", "b", "c"]
        assert len(storage.list_files(location, hidden=True)) == 2
    commit(location, "batch", rows("c"), retry=True)
    assert ids_of(location) == ["a", "b", "c"]


def test_errors_that_differ_in_numbers_are_of_one_kind():
    found = {kind(f"prompt and max_tokens make {length} tokens; the model has 4096\nwhere: x") for length in (5123, 9)}
    assert found == {"prompt and max_tokens make N tokens; the model has N"}


def test_rewards_that_differ_in_their_last_digit_have_a_histogram():
    values = np.array([1.0, np.nextafter(np.float32(1), np.float32(0))] * 5, dtype=np.float32)
    found = _spread(values)
    assert sum(found["histogram"]["counts"]) == 10
    assert len(found["histogram"]["edges"]) == BINS + 1


@pytest.mark.parametrize(("count", "each"), [(2, 1), (31, 1), (40, 1), (41, 2), (100, 3)])
def test_steps_of_one_size_have_bins_with_as_many_steps_each(count, each):
    values = (1 - np.arange(count) / 30).astype(np.float32).repeat(2)  # as the reward `brevity` of each length
    counts = _spread(values)["histogram"]["counts"]
    assert counts[:-1] == [2 * each] * (len(counts) - 1)
    assert sum(counts) == 2 * count
    assert len(counts) <= BINS


def test_other_values_have_bins_of_a_share_of_their_range():
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    found = _spread(values)["histogram"]
    assert (len(found["counts"]), sum(found["counts"])) == (BINS, 1000)
    assert found["edges"][0] == values.min()
