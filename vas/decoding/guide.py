"""The guide: from log π0 to log π, with the values of all scorers (arXiv:2405.06639)."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Many

import torch
from torch import Tensor

from vas import guidance
from vas.decoding.clock import Clock
from vas.decoding.graphs import upload
from vas.decoding.scorer import LAG, InProcess, ScoreBatch, Scorer, ScorerUnreachable
from vas.decoding.sequence import Request, Score, Sequence
from vas.errors import VasError


class Guide:
    """Which steps are guided, what the candidates are worth, and what that makes of log π0.

    scorers: bring an objective each or more. eos_token_ids: always among the candidates. clock: counts the
    scorers' time as `value`. Raises VasError if two scorers bring the same objective.
    """

    def __init__(
        self,
        scorers: Many[Scorer],
        eos_token_ids: Many[int],
        device: torch.device,
        clock: Clock,
        vocabulary: int | None = None,
    ) -> None:
        self._scorers = sorted(scorers, key=lambda scorer: isinstance(scorer, InProcess))  # what can overlap, first
        self._clock, self._vocabulary = clock, vocabulary
        self._eos = torch.tensor(eos_token_ids, dtype=torch.long, device=device)
        self.objectives: dict[str, int] = {}
        """Objective → its place in the last dimension of values."""
        names = [scorer.name for scorer in scorers]
        for name in names:
            if names.count(name) > 1:
                raise VasError(f"two value models have the name '{name}'", mend="name them apart")
        for scorer in scorers:
            for name in scorer.objectives:
                if name in self.objectives:
                    raise VasError(f"two value models bring the objective '{name}'", scorer.name, "name them apart")
                self.objectives[name] = len(self.objectives)
        self._relative = {name for scorer in scorers if scorer.relative for name in scorer.objectives}
        self._last: tuple[list[int], Tensor, Tensor, Tensor, Tensor] | None = None
        """The last call: its guided rows, candidates and which of them count, values and advantages."""
        self._lost: dict[int, set[str]] = {}
        """Rows of the last call, with the objectives that there were no values of."""

    def scorers_of(self, request: Request) -> list[Scorer]:
        """The scorers that a request's objectives need."""
        return [scorer for scorer in self._scorers if not request.guidance.active.isdisjoint(scorer.objectives)]

    def __call__(self, sequences: Many[Sequence], base_BV: Tensor) -> tuple[Tensor, Tensor]:
        """log π of every sequence's next token [B, V], and KL(π‖π0) [B]; the rows without guidance are π0's."""
        rows = self.wanted(sequences, base_BV)
        self._last = None
        kl_B = base_BV.new_zeros(len(base_BV))
        if not rows:
            return base_BV, kl_B
        device = base_BV.device
        policy = _some(base_BV, rows)
        params = [sequences[b].request.guidance for b in rows]
        k = torch.tensor([p.candidates for p in params])
        masses = [p.candidate_mass for p in params]
        adaptive = upload(masses, device) if min(masses) < 1 else None
        tokens, valid = guidance.select_candidates(policy[:, : self._vocabulary], k, self._eos, adaptive)
        strengths = upload(self.strengths([sequences[b] for b in rows]), device)
        values = self.values(sequences, rows, tokens, valid, strengths)
        mean = torch.tensor([p.baseline == "mean" for p in params])
        advantage = guidance.advantages(values, policy.gather(1, tokens), valid, mean)
        self._last = rows, tokens, valid, values, advantage
        drop = torch.tensor([p.outside == "drop" for p in params])
        result = guidance.combine(policy, tokens, valid, advantage, strengths, drop)
        kl_R = guidance.kl_divergence(result, policy, tokens, valid, guidance.tilts(advantage, strengths, valid))
        for b in rows:
            lost = self._lost.get(b, set())
            sequences[b].completion.guided_steps += not sequences[b].request.guidance.active <= lost
        return _with(base_BV, rows, result), _with(kl_B, rows, kl_R)

    def about(self, chosen_B: Tensor) -> Tensor:
        """What the value models say of the tokens drawn after the last call, for `scores`: [B, X]."""
        if self._last is None:
            return chosen_B.new_empty(len(chosen_B), 0)
        rows, tokens_RK, valid_RK, *figures = self._last
        here_RK = (tokens_RK == _some(chosen_B, rows)[:, None]) & valid_RK
        scored_R1, place_R1 = here_RK.to(figures[0]).max(-1, keepdim=True)
        found = [each.gather(1, place_R1[..., None].expand(-1, -1, each.shape[2])).squeeze(1) for each in figures]
        told_RX = torch.cat([scored_R1, *found], dim=1)
        return _with(told_RX.new_zeros(len(chosen_B), told_RX.shape[1]), rows, told_RX)

    def scores(self, sequences: Many[Sequence], told: list[list[float]]) -> dict[int, dict[str, Score]]:
        """What `about` has found, for each row that was guided."""
        found: dict[int, dict[str, Score]] = {}
        for b in self._last[0] if self._last else ():
            scored, *figures = told[b]
            values, advantages = figures[: len(self.objectives)], figures[len(self.objectives) :]
            found[b] = {}
            for name in sequences[b].request.guidance.active - self._lost.get(b, set()):
                j = self.objectives[name]
                value = values[j] if scored and name not in self._relative else None
                found[b][name] = Score(value, advantages[j] if scored else 0.0)
        return found

    def wanted(self, sequences: Many[Sequence], base_BV: Tensor) -> list[int]:
        """Rows whose schedule wants guidance at this step."""
        guided = [b for b, sequence in enumerate(sequences) if sequence.steered]
        thresholds = {b: sequences[b].request.guidance.entropy_threshold for b in guided}
        asked = [b for b, threshold in thresholds.items() if threshold is not None]
        if not asked:
            return guided
        entropies = dict(zip(asked, guidance.entropy(base_BV[asked]).tolist(), strict=True))
        return [b for b in guided if b not in entropies or entropies[b] > (thresholds[b] or 0.0)]

    def strengths(self, sequences: Many[Sequence]) -> Tensor:
        """β of every objective: [B, J]."""
        strengths = torch.zeros(len(sequences), len(self.objectives))
        for b, sequence in enumerate(sequences):
            for name, strength in sequence.request.guidance.objectives.items():
                strengths[b, self.objectives[name]] = strength
        return strengths

    def values(
        self,
        sequences: Many[Sequence],
        rows: list[int],
        tokens_BK: Tensor,
        valid_BK: Tensor,
        strengths_BJ: Tensor,
        unread: int = 0,
    ) -> Tensor:
        """Values of candidates of `sequences[rows]`, 0 where a sequence doesn't use a scorer: [B, K, J].

        Sequences that have no candidates at this step ride along: what they have appended is read in
        the same pass. unread: so many tokens at the ends of the sequences are not read, but candidates.
        """
        values = torch.zeros(*tokens_BK.shape, len(self.objectives), device=tokens_BK.device)
        guided = set(rows)
        self._lost = {}
        with self._clock.part("value"):
            asked = []
            for scorer in self._scorers:
                users = [  # those that have begun come along, for what they miss costs less here than on its own
                    b
                    for b, s in enumerate(sequences)
                    if scorer in self.scorers_of(s.request)
                    and (b in guided or (not s.blockwise and s.read.get(scorer.name)))
                ]
                place = {b: i for i, b in enumerate(users)}
                asking = [i for i, b in enumerate(rows) if b in place]
                if not asking:
                    continue
                self._catch_up(scorer, [sequences[b] for b in users], unread)
                first = self.objectives[scorer.objectives[0]]
                own = slice(first, first + len(scorer.objectives))
                batch = ScoreBatch(
                    sequences=[sequences[b].owner for b in users],
                    taken=[self._unread(sequences[b], scorer, unread) for b in users],
                    rows=[place[rows[i]] for i in asking],
                    candidates_BK=_some(tokens_BK, asking),
                    valid_BK=_some(valid_BK, asking),
                    strengths_BJ=_some(strengths_BJ, asking)[:, own],
                    soft_B=torch.tensor([sequences[rows[i]].request.guidance.value == "soft" for i in asking]),
                )
                asked.append((scorer, users, asking, own, scorer.score(batch)))
            for scorer, users, asking, own, answer in asked:
                try:
                    scored, positions = answer()
                except ScorerUnreachable as missing:
                    scored, positions = missing.answer
                    for i in missing.lost:
                        self._lost.setdefault(rows[asking[i]], set()).update(scorer.objectives)
                values[upload(asking, values.device), :, own] = scored.to(values)
                for b, count in zip(users, positions, strict=True):
                    sequences[b].read[scorer.name] = len(sequences[b]) - unread
                    sequences[b].completion.scored(scorer.name, count)
        for b in self._lost:
            sequences[b].completion.lost_steps += sequences[b].fork == 0
        return values

    def _catch_up(self, scorer: Scorer, sequences: Many[Sequence], spared: int) -> None:
        """Let a scorer read what it has missed for long, so that no pass is wide for the sake of one sequence."""
        behind = {s: self._unread(s, scorer, spared)[:-1] for s in sequences}
        for start in range(0, max(map(len, behind.values())), LAG):
            late = {s: tokens for s, tokens in behind.items() if len(tokens) > max(start, scorer.lag)}
            chunk = {s: tokens[start : start + LAG] for s, tokens in late.items()}
            if chunk:
                self.extend(scorer, chunk)

    @staticmethod
    def extend(scorer: Scorer, tokens: Mapping[Sequence, tuple[int, ...]]) -> None:
        """Let a scorer read the next tokens of some sequences, and count them."""
        scorer.extend([sequence.owner for sequence in tokens], list(tokens.values()))
        for sequence, some in tokens.items():
            sequence.read[scorer.name] = sequence.read.get(scorer.name, 0) + len(some)
            sequence.completion.scored(scorer.name, len(some))

    @staticmethod
    def _unread(sequence: Sequence, scorer: Scorer, spared: int) -> tuple[int, ...]:
        """What a scorer has not read of a sequence, but for the last `spared` tokens."""
        return sequence.tokens(sequence.read.get(scorer.name, 0), len(sequence) - spared)


def _some(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor; all of them without a copy."""
    return tensor if len(rows) == len(tensor) else tensor.index_select(0, upload(rows, tensor.device))


def _with(tensor: Tensor, rows: list[int], other: Tensor) -> Tensor:
    """A tensor with some rows of another in place of its own; the other one itself if these are all."""
    return other if len(rows) == len(tensor) else tensor.index_copy(0, upload(rows, tensor.device), other)
