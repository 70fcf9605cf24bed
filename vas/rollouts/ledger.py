"""What a server has charged a run for, counted over all its actors, and kept with the run; a budget ends it cleanly."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vas import storage
from vas.config import Base
from vas.errors import VasError
from vas.http import Meter

SAVE_EVERY = 10.0  # seconds
COUNTED = ("calls", "prompt_tokens", "completion_tokens")


class Account:
    """The count; a Ray actor. most: calls and tokens that may be spent, if that is bounded."""

    def __init__(self, spent: Mapping[str, int], most: Mapping[str, int | None]) -> None:
        self._spent, self._most = Counter(spent), most

    def take(self) -> str | None:
        """Count a call, unless something is spent: then say what."""
        gone = self.gone()
        if gone is None:
            self._spent["calls"] += 1
        return gone

    def charge(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what a call has cost."""
        self._spent["prompt_tokens"] += prompt_tokens
        self._spent["completion_tokens"] += completion_tokens

    def gone(self) -> str | None:
        """The bound that is reached, if one is: `calls` or `tokens`."""
        spent = {
            "calls": self._spent["calls"],
            "tokens": self._spent["prompt_tokens"] + self._spent["completion_tokens"],
        }
        return next((name for name, most in self._most.items() if most is not None and spent[name] >= most), None)

    def spent(self) -> dict[str, int]:
        """All so far, earlier attempts of the run included."""
        return {name: self._spent[name] for name in COUNTED}


class Ledger(Meter):
    """A process's hold on the account. Calls under way when a token budget is reached are finished, and counted."""

    def __init__(self, account: Any, most: Mapping[str, int | None], file: str) -> None:
        self._account, self._most, self._file = account, most, file
        self._saved = time.monotonic()

    @classmethod
    @contextmanager
    def of(cls, base: Base, file: str) -> Iterator[Ledger | None]:
        """A run's, kept in a JSON file; None for a base model that nobody charges for."""
        if base.openai is None:
            yield None
            return
        spent = json.loads(storage.read_bytes(file)) if storage.exists(file) else {}
        most = {"calls": base.most_calls, "tokens": base.most_tokens}
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        account = ray.remote(num_cpus=0)(Account).options(scheduling_strategy=here).remote(spent, most)
        ledger = cls(account, most, file)
        try:
            yield ledger
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                ledger.save()
            raise
        ledger.save()

    def allow(self) -> None:
        """Count a call. Raises VasError if the budget is spent."""
        gone = ray.get(self._account.take.remote())
        if gone is not None:
            raise self._error(gone)

    def charge(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count what it has cost."""
        self._account.charge.remote(prompt_tokens, completion_tokens)

    @property
    def gone(self) -> bool:
        """Whether the budget is spent."""
        return ray.get(self._account.gone.remote()) is not None

    def check(self) -> None:
        """Raise VasError if the budget is spent."""
        gone = ray.get(self._account.gone.remote())
        if gone is not None:
            raise self._error(gone)

    def spent(self) -> dict[str, int]:
        """All so far: `calls`, `prompt_tokens`, `completion_tokens`."""
        return ray.get(self._account.spent.remote())

    def note(self) -> str:
        """The same in words, for a progress line; keeps it, too, if that is due."""
        spent = self.spent()
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()
        return words(spent)

    def save(self) -> None:
        """Keep it with the run."""
        storage.write_bytes(self._file, json.dumps(self.spent()).encode())
        self._saved = time.monotonic()

    def _error(self, gone: str) -> VasError:
        return VasError(
            f"the run's budget of {self._most[gone]:,} {gone} is spent",
            f"base.most_{gone}",
            f"what is finished is kept; with a larger one (--set base.most_{gone}=…) it goes on from there",
        )


def words(spent: Mapping[str, int]) -> str:
    """`1,234 calls, 56,789 tokens`."""
    tokens = spent.get("prompt_tokens", 0) + spent.get("completion_tokens", 0)
    return f"{spent.get('calls', 0):,} calls, {tokens:,} tokens"
