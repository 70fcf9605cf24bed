"""A scorer whose value model is a deployment of its own: one call a step for each of its replicas.

Each sequence stays on the replica that first scored it, which has its KV. When the replica is gone, or has forgotten
the sequence, it is opened again from its token ids, wherever the router sends it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from vas.decoding.scorer import LAG, Answer, ScoreBatch, ScorerUnreachable
from vas.serving.calls import Question, Reply

logger = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds in which a question must find an answer; replicas that died are replaced meanwhile
ATTEMPT = 10.0  # seconds that one replica may take
PAUSE = 0.2  # seconds between attempts
REST = 5.0  # seconds that a greeting may take, after which another is sent


Ask = Callable[[str | None, Question], Future[Reply]]
"""Begins a call to the replica named, or to any."""


@dataclass(slots=True)
class _Remote:
    """What the base replica knows of a sequence that a value replica reads."""

    number: int
    tokens: list[int] = field(default_factory=list)
    held: int = 0
    replica: str | None = None
    shared: tuple[int, int] = (0, 0)

    def forget(self) -> None:
        """Nobody has read it."""
        self.held, self.replica, self.shared = 0, None, (0, 0)


@dataclass(slots=True)
class _Asked:
    """A step's question to one replica."""

    rows: list[int]
    call: Future[Reply]
    deadline: float = 0.0
    reply: Reply | None = None


class RemoteScorer:
    """Asks the replicas of a value model; see the module's text.

    caller: a name for the replica that asks, unique in the cluster. measured: is told the seconds of each call.
    """

    kv_bytes = 0
    lag = LAG

    def __init__(
        self,
        name: str,
        objectives: tuple[str, ...],
        context_length: int | None,
        relative: bool,
        ask: Ask,
        caller: str,
        measured: Callable[[float], None] = lambda seconds: None,
        patience: float = PATIENCE,
    ) -> None:
        self.name, self.objectives, self.context_length, self.relative = name, objectives, context_length, relative
        self._ask, self._caller, self._measured, self._patience = ask, caller, measured, patience
        self._sequences: dict[Hashable, _Remote] = {}
        self._closed: dict[str, list[int]] = {}
        self._opened = 0
        self._greeting: Future[Reply] | None = None  # under way since a question found no answer
        self._greeted = 0.0

    def limit(self, kv_tokens: int | None) -> None:
        """The replicas have a limit of their own."""

    def open(self, sequence: Hashable, prompt: int = 0) -> None:
        """Begin a sequence; the replica hears of it with its first question."""
        self._opened += 1
        self._sequences[sequence] = _Remote(self._opened)

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """Let the target begin on its source's replica, with what that has read."""
        one, other = self._sequences[source], self._sequences[target]
        if other.replica is not None:
            self._closed.setdefault(other.replica, []).append(other.number)
        self._opened += 1
        self._sequences[target] = _Remote(
            self._opened, one.tokens[:length], 0, one.replica, (one.number, length) if one.replica else (0, 0)
        )

    def extend(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        """Remember these tokens; the replica reads them with the next question."""
        for sequence, tokens in zip(sequences, token_ids, strict=True):
            self._sequences[sequence].tokens += tokens

    def close(self, sequence: Hashable) -> None:
        """Let the replica forget it, with the next question that goes there or, if there is no other sequence, now."""
        gone = self._sequences.pop(sequence, None)
        if gone is not None and gone.replica is not None:
            self._closed.setdefault(gone.replica, []).append(gone.number)
        if not self._sequences:
            for replica in list(self._closed):
                self._ask(replica, self._question([], [], None, self._closed.pop(replica)))

    def score(self, batch: ScoreBatch) -> Callable[[], Answer]:
        """Send this step's questions, one for each replica; what is returned waits for the replies."""
        for sequence, taken in zip(batch.sequences, batch.taken, strict=True):
            self._sequences[sequence].tokens += taken
        if self._silent():
            return self._nothing(batch)
        groups: dict[str | None, list[int]] = {}
        for row, index in enumerate(batch.rows):
            groups.setdefault(self._sequences[batch.sequences[index]].replica, []).append(row)
        started = time.perf_counter()
        asked = [_Asked(rows, self._begin(replica, rows, batch)) for replica, rows in groups.items()]

        def answer() -> Answer:
            values = torch.zeros(*batch.candidates_BK.shape, len(self.objectives))
            positions, lost, waiting = [0] * len(batch.sequences), [], asked
            for each in asked:
                each.deadline = time.monotonic() + self._patience
            while waiting:  # in rounds, so that no replica stands idle while another one is waited for
                waiting = [each for each in waiting if not self._settles(each, batch)]
            for each in asked:
                reply = each.reply
                if reply is None or reply.values_BKJ is None or reply.values_BKJ.shape[2] != len(self.objectives):
                    lost += each.rows
                    continue
                values[each.rows] = torch.from_numpy(reply.values_BKJ)
                for row, count in zip(each.rows, reply.positions, strict=True):
                    positions[batch.rows[row]] = count
            self._measured(time.perf_counter() - started)
            if lost:
                if len(lost) == len(batch.rows):  # not one replica has answered
                    self._greet()
                raise ScorerUnreachable((values, positions), lost)
            return values, positions

        return answer

    def _silent(self) -> bool:
        """Whether a question found no answer, and no replica has answered a greeting since: then nobody waits."""
        for _ in range(2):
            if self._greeting is None:
                return False
            try:
                self._greeting.result(timeout=0)
            except TimeoutError:
                if time.monotonic() < self._greeted + REST:
                    return True
                self._greeting.cancel()
                self._greet()
            except Exception:
                self._greet()
            else:
                self._greeting = None
        return self._greeting is not None

    def _greet(self) -> None:
        """Ask nothing of any replica, to hear whether one is there."""
        self._greeting, self._greeted = self._ask(None, self._question([], [], None, [])), time.monotonic()

    def _nothing(self, batch: ScoreBatch) -> Callable[[], Answer]:
        """No answer, and no waiting for one."""
        values = torch.zeros(*batch.candidates_BK.shape, len(self.objectives))

        def answer() -> Answer:
            raise ScorerUnreachable((values, [0] * len(batch.sequences)), list(range(len(batch.rows))))

        return answer

    def _settles(self, asked: _Asked, batch: ScoreBatch) -> bool:
        """Wait for the call under way; whether it was the last: there are values, or the patience is at an end.

        Else another call is under way, to whichever replica may have them.
        """
        members = [self._sequences[batch.sequences[batch.rows[row]]] for row in asked.rows]
        replica = None
        try:
            reply = asked.call.result(timeout=min(ATTEMPT, max(0.01, asked.deadline - time.monotonic())))
        except Exception as error:
            asked.call.cancel()
            for each in members:
                each.forget()
            logger.warning("value model %s: a replica was lost (%s)", self.name, type(error).__name__)
        else:
            replica = reply.replica
            if not reply.missing:
                held = reply.held or [len(each.tokens) for each in members]
                for each, tokens in zip(members, held, strict=True):
                    each.held, each.replica, each.shared = tokens, replica, (0, 0)
                if not reply.held:
                    asked.reply = reply
                    return True
                asked.deadline = time.monotonic() + self._patience  # it reads on
            for place in reply.missing:
                members[place].forget()
        if time.monotonic() > asked.deadline:
            return True
        if replica is None:
            time.sleep(PAUSE)
        asked.call = self._begin(replica, asked.rows, batch)
        return False

    def _begin(self, replica: str | None, rows: list[int], batch: ScoreBatch) -> Future[Reply]:
        members = [self._sequences[batch.sequences[batch.rows[row]]] for row in rows]
        closed = self._closed.pop(replica, []) if replica else []
        return self._ask(replica, self._question(members, rows, batch, closed))

    def _question(
        self, members: list[_Remote], rows: list[int], batch: ScoreBatch | None, closed: list[int]
    ) -> Question:
        empty = np.empty((0, 0))
        return Question(
            caller=self._caller,
            sequences=[each.number for each in members],
            held=[each.held for each in members],
            fresh=[tuple(each.tokens[each.held :]) for each in members],
            shared=[each.shared for each in members],
            rows=list(range(len(rows))),
            candidates_BK=empty if batch is None else batch.candidates_BK[rows].cpu().numpy(),
            valid_BK=empty if batch is None else batch.valid_BK[rows].cpu().numpy(),
            strengths_BJ=empty if batch is None else batch.strengths_BJ[rows].cpu().numpy(),
            soft_B=empty if batch is None else batch.soft_B[rows].cpu().numpy(),
            closed=closed,
        )
