"""The deployment of a value model: answers base-model replicas' questions, and keeps the KV of their sequences."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from ray import serve
from torch import Tensor

from vas.decoding.scorer import LAG, InProcess, ScoreBatch, make_scorer
from vas.models.base import pick_device, quieten, set_threads
from vas.models.value import ValueModel
from vas.serving.calls import Question, Reply
from vas.serving.config import Settled, ValueModelSpec
from vas.serving.texts import values_of

AT_ONCE = 256  # tokens that are read for one answer beside those with the candidates, for who asks waits
FORGOTTEN_AFTER = 600.0  # seconds without a question about a sequence: its caller is gone


class Reader:
    """The sequences that a value model reads for others: any of them may be unknown, and is then asked for."""

    def __init__(self, scorer: InProcess, replica: str, kv_tokens: int | None) -> None:
        self._scorer, self._replica = scorer, replica
        scorer.limit(kv_tokens)
        self._read: dict[tuple[str, int], int] = {}
        self._asked: dict[tuple[str, int], float] = {}

    def answer(self, question: Question, most: int = AT_ONCE) -> Reply:
        """Values of the candidates; or what is missing to find them; or, after `most` tokens, how far it has read."""
        now = time.monotonic()
        names = [(question.caller, number) for number in question.sequences]
        idle = [name for name, asked in self._asked.items() if now - asked > FORGOTTEN_AFTER]
        for name in [*idle, *((question.caller, number) for number in question.closed)]:
            self._forget(name)
        if not names:
            return Reply(self._replica)
        if missing := self._missing(question):
            return Reply(self._replica, missing)
        longest = max(held + len(fresh) for held, fresh in zip(question.held, question.fresh, strict=True))
        sources = {(question.caller, source) for source, shared in question.shared if shared}
        held = len(self._read)
        if not self._make_room({*names, *sources}, longest + 1) and len(names) > 1:
            return self._in_halves(question)
        if len(self._read) < held:  # callers that push each other out would never get to an end part by part
            most = sys.maxsize
        try:
            return self._scored(names, question, now, most)
        except BaseException:
            for name in names:  # who knows what of them was read
                self._forget(name)
            raise

    def _scored(self, names: list[tuple[str, int]], question: Question, now: float, most: int) -> Reply:
        """Read what is new of the sequences, up to `most` tokens, and score their candidates if that was all."""
        taken = []
        for i, name in enumerate(names):
            read, rest = self._begin(name, i, question, most)
            taken.append(rest)
            most -= read
        self._asked |= dict.fromkeys(names, now)
        if any(len(rest) > LAG for rest in taken):
            return Reply(self._replica, held=[self._read[name] for name in names])
        values, positions = self._scorer.answer(
            ScoreBatch(
                sequences=names,
                taken=taken,
                rows=question.rows,
                candidates_BK=torch.from_numpy(question.candidates_BK),
                valid_BK=torch.from_numpy(question.valid_BK),
                strengths_BJ=torch.from_numpy(question.strengths_BJ),
                soft_B=torch.from_numpy(question.soft_B),
            )
        )
        for i, name in enumerate(names):
            self._read[name] = question.held[i] + len(question.fresh[i])
        return Reply(self._replica, [], values.float().cpu().numpy(), positions)

    def values(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """V after each token of a text, in parts, as the scorer's `values`."""
        return self._scorer.values(token_ids)

    def _missing(self, question: Question) -> list[int]:
        """Sequences, as indices, that are not here as the question says."""
        found = []
        for i, number in enumerate(question.sequences):
            source, shared = question.shared[i]
            here = self._read.get((question.caller, number), 0)
            if (question.held[i] and here != question.held[i]) or self._read.get((question.caller, source), 0) < shared:
                found.append(i)
        return found

    def _in_halves(self, question: Question) -> Reply:
        """Answer a question about more sequences than there is room for at once; those of one half make way."""
        middle = len(question.sequences) // 2
        replies = []
        for part in (slice(None, middle), slice(middle, None)):
            reply = self.answer(question.part(part), most=sys.maxsize)  # the halves would push each other out
            if reply.missing:
                return Reply(self._replica, [i + (part.start or 0) for i in reply.missing])
            replies.append(reply)
        values = np.concatenate([reply.values_BKJ for reply in replies if reply.values_BKJ is not None])
        return Reply(self._replica, [], values, [count for reply in replies for count in reply.positions])

    def _begin(self, name: tuple[str, int], i: int, question: Question, most: int) -> tuple[int, tuple[int, ...]]:
        """Read of a sequence what is not for the pass with the candidates, `most` of it; how much, and what is left."""
        fresh, (source, shared) = question.fresh[i], question.shared[i]
        if not question.held[i]:
            self._forget(name)
            self._scorer.open(name)
            self._read[name] = 0
            if shared:
                self._scorer.share((question.caller, source), name, shared)
                self._read[name], fresh = shared, fresh[shared:]
        ahead = fresh[:-1][:most] if len(fresh) > LAG or not question.held[i] else ()
        if ahead:
            self._scorer.extend([name], [ahead])
            self._read[name] += len(ahead)
        return len(ahead), fresh[len(ahead) :]

    def _forget(self, name: tuple[str, int]) -> None:
        self._asked.pop(name, None)
        if self._read.pop(name, None) is not None:
            self._scorer.close(name)

    def _make_room(self, wanted: set[tuple[str, int]], longest: int) -> bool:
        """Forget the sequences that were asked about longest ago, until there is room; returns whether there is."""
        others = sorted((name for name in self._asked if name not in wanted), key=self._asked.__getitem__)
        while not self._scorer.fits(len(wanted | self._read.keys()), max([longest, *self._read.values()])):
            if not others:
                return False
            self._forget(others.pop(0))
        return True


class ValueReplica:
    """A replica: one thread that reads and scores."""

    def __init__(self, settled: Settled, spec: ValueModelSpec) -> None:
        quieten()
        self._thread = ThreadPoolExecutor(1)
        self._reader = self._thread.submit(self._load, settled, spec).result()

    @staticmethod
    def _load(settled: Settled, spec: ValueModelSpec) -> Reader:
        set_threads(int(spec.replicas.cpus))  # torch counts its threads by the caller
        model = ValueModel.load(spec.path, pick_device("cuda" if spec.replicas.gpus else "cpu"))
        scorer = make_scorer(spec.name, model, settled.base.linears, free=True)
        return Reader(scorer, serve.get_replica_context().replica_id.unique_id, settled.serving.kv_tokens)

    async def score(self, question: Question, replica: str | None = None) -> Reply:
        """Answer a question; `replica` is for the router."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._reader.answer, question)

    async def values(self, token_ids: list[int]) -> list[list[float]]:
        """V after each token: [T][J]."""
        parts, loop = self._reader.values(token_ids), asyncio.get_running_loop()
        return await values_of(lambda: loop.run_in_executor(self._thread, next, parts, None))
