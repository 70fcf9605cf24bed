"""The guided decoding engine: a base model, scorers, and the sequences under way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from functools import partial

import torch
from torch import Tensor

from vas import guidance
from vas.config import Linears
from vas.decoding.clock import Clock
from vas.decoding.detokenizer import Detokenizer
from vas.decoding.runner import ModelRunner
from vas.decoding.sampler import sample, uniforms
from vas.decoding.scheduler import Scheduler
from vas.decoding.scorer import ScoreBatch, Scorer
from vas.decoding.sequence import Completion, Request, SamplingParams, Sequence, Token
from vas.errors import VasError, nearest
from vas.models.base import BaseModel


class Engine:
    """Decodes many requests at once, each with its own sampling and guidance.

    Sequences join and leave at every step (continuous batching). Without guidance the
    tokens are those of Hugging Face `generate` in float32.

    max_sequences: how many are decoded at once; more wait.
    kv_tokens: tokens that the base model's KV cache may hold, counted as allocated (sequences in
    steps of 8, times the longest one in steps of 64); each value model's cache stays within the same
    number. When they grow out of it, the youngest sequence waits, and later goes on with the tokens
    it would have had. None for no limit.
    prefill_tokens: how many tokens of prompts are read between two decoding steps.
    linears: how the base model's linear layers compute on a CPU, see `linears.py`. free: use up the base
    model's own weights instead of keeping them beside the engine's; only the engine can use it then.
    """

    def __init__(
        self,
        base: BaseModel,
        scorers: Many[Scorer] = (),
        max_sequences: int = 64,
        kv_tokens: int | None = None,
        prefill_tokens: int = 2048,
        linears: Linears = "exact",
        free: bool = False,
    ) -> None:
        self._base, self._scorers = base, list(scorers)
        self.objectives: dict[str, int] = {}
        for scorer in scorers:
            for name in scorer.objectives:
                if name in self.objectives:
                    raise VasError(f"two value models bring the objective '{name}'", scorer.name, "name them apart")
                self.objectives[name] = len(self.objectives)
        self._runner = ModelRunner(base.model, kv_tokens, linears, free)
        self._scheduler = Scheduler(self._runner.cache.fits, max_sequences)
        self._prefill_tokens = prefill_tokens
        self._eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=base.model.device)
        self._added = 0
        self.clock = Clock()
        self._completions: dict[str, Completion] = {}
        self._texts: dict[str, Detokenizer] = {}

    def check(self, request: Request) -> None:
        """Raise VasError if the request could never be decoded here."""
        if not request.prompt_token_ids:
            raise VasError("the prompt is empty", request.request_id, "give at least one token")
        vocab = self._base.model.get_input_embeddings().num_embeddings
        named = (*request.prompt_token_ids, *request.sampling.logit_bias)
        for token in (min(named), max(named)):
            if not 0 <= token < vocab:  # would take every running sequence down with it
                raise VasError(f"token id {token} is outside the vocabulary", request.request_id)
        longest = len(request.prompt_token_ids) + request.sampling.max_tokens
        rooms = {self._base.name: self._base.context_length}
        rooms |= {scorer.name: scorer.context_length for scorer in self._scorers_of(Sequence(request, 0))}
        for model, room in rooms.items():
            if room is not None and longest > room:
                raise VasError(
                    f"prompt and max_tokens make {longest} tokens; {model} has room for {room}",
                    request.request_id,
                    "shorten the prompt or lower max_tokens",
                )
        if not self._runner.cache.fits(1, longest):
            raise VasError(
                f"prompt and max_tokens make {longest} tokens, more than the KV cache may hold",
                request.request_id,
                "shorten the prompt, lower max_tokens or raise kv_tokens",
            )
        for name in request.guidance.objectives:
            if name not in self.objectives:
                raise VasError(
                    f"no value model knows the objective '{name}'", mend=nearest(name, list(self.objectives))
                )

    def add(self, request: Request) -> None:
        """Queue a request. Raises VasError as `check` does, or if its id is in use."""
        self.check(request)
        if request.request_id in self._completions:
            raise VasError(f"request id '{request.request_id}' is in use already")
        self._completions[request.request_id] = Completion(request.request_id)
        self._texts[request.request_id] = Detokenizer(self._base.tokenizer, request.sampling.stop)
        self._scheduler.waiting.append(Sequence(request, self._added))
        self._added += 1

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Decode requests to the end; completions come in the requests' order."""
        done: dict[str, Completion | None] = {}
        try:
            for request in requests:
                self.add(request)
                done[request.request_id] = None
            while None in done.values():
                for token in self.step():
                    if token.finish_reason and token.request_id in done:
                        done[token.request_id] = self.take(token.request_id)
        except BaseException:
            for request_id in done:
                self.abort(request_id)
            raise
        return [completion for completion in done.values() if completion]

    def stream(self, request: Request) -> Iterator[Token]:
        """Decode one request, a token at a time; leaving the loop early frees it."""
        self.add(request)
        try:
            while True:
                for token in self.step():
                    if token.request_id == request.request_id:
                        yield token
                        if token.finish_reason:
                            return
        finally:
            self.abort(request.request_id)

    def take(self, request_id: str) -> Completion:
        """Hand over a finished completion."""
        self._texts.pop(request_id, None)
        return self._completions.pop(request_id)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; unknown ids are fine."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            if sequence in self._scheduler.waiting:
                self._scheduler.waiting.remove(sequence)
            else:
                self._leave(sequence)
        if request_id in self._completions:
            self.take(request_id)

    @property
    def busy(self) -> bool:
        """True while any request is waiting or running."""
        return self._scheduler.busy

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admit what fits, read prompts, then append a token to every sequence that is ready; returns those tokens."""
        with self.clock.part("overhead"):
            self._preempt()
            self._admit()
            with self.clock.part("prefill"):
                self._prefill()
            sequences = [s for s in self._scheduler.running if s.ready]
            return self._advance(sequences) if sequences else []

    def _advance(self, sequences: list[Sequence]) -> list[Token]:
        """Append one token to each of these."""
        with self.clock.part("base"):
            logits_BV = self._run_base(sequences)
        with self.clock.part("combine"):
            base_BV = self._policy(sequences, logits_BV)
            guided_BV = self._guide(sequences, base_BV)
        with self.clock.part("sample"):
            drawn = self._draw(sequences, base_BV, guided_BV)
        return [self._append(sequence, *each) for sequence, each in zip(sequences, drawn, strict=True)]

    @staticmethod
    def _draw(sequences: list[Sequence], base_BV: Tensor, guided_BV: Tensor) -> list[tuple[int, float, float, float]]:
        """The next token of every sequence, its log π0 and log π, and the step's KL."""
        device = base_BV.device
        numbers = uniforms([s.request.sampling.seed for s in sequences], [len(s.response) for s in sequences])
        greedy = [s.request.sampling.temperature == 0 for s in sequences]
        chosen_B = sample(guided_BV, torch.from_numpy(numbers).to(device), torch.tensor(greedy, device=device))
        figures = torch.stack(
            [
                base_BV.gather(1, chosen_B[:, None]).squeeze(1),
                guided_BV.gather(1, chosen_B[:, None]).squeeze(1),
                guidance.kl_divergence(guided_BV, base_BV)
                if guided_BV is not base_BV
                else torch.zeros_like(base_BV[:, 0]),
            ]
        ).tolist()
        return list(zip(chosen_B.tolist(), *figures, strict=True))

    def _preempt(self) -> None:
        """Send the youngest sequences back to wait, until the others have room for a step."""
        while youngest := self._scheduler.overflowing():
            self._leave(youngest)
            youngest.restart()
            self._scheduler.waiting.appendleft(youngest)

    def _admit(self) -> None:
        """Let waiting sequences in, with a row in every cache they need."""
        for sequence in self._scheduler.admit():
            self._runner.cache.add(sequence.request.request_id)
            for scorer in self._scorers_of(sequence):
                scorer.open(sequence.request.request_id)

    def _prefill(self) -> None:
        """Read prompts, all but the last token, through the base model and the scorers that each needs."""
        left = self._prefill_tokens
        while True:
            for sequence in self._scheduler.sharing():
                self._share(sequence)
            chunks = self._scheduler.prefill(left)
            if not chunks:
                return
            tokens = {s: s.token_ids[s.cached : s.cached + size] for s, size in chunks}
            self._runner.extend([s.request.request_id for s in tokens], list(tokens.values()))
            for scorer in self._scorers:
                wanted = [s for s in tokens if scorer in self._scorers_of(s)]
                if wanted:
                    scorer.extend([s.request.request_id for s in wanted], [tokens[s] for s in wanted])
            for sequence, size in chunks:
                sequence.cached += size
                self._spent(sequence, size)
                for scorer in self._scorers_of(sequence):
                    sequence.read[scorer.name] = sequence.cached
                    self._spent(sequence, size, scorer)
                left -= size

    def _share(self, sequence: Sequence) -> None:
        """Copy the prefix that a sequence has in common with its source."""
        assert sequence.source is not None
        source, target = sequence.source.request.request_id, sequence.request.request_id
        self._runner.cache.copy(source, target, sequence.shared)
        for scorer in self._scorers_of(sequence):
            scorer.share(source, target, sequence.shared)
            sequence.read[scorer.name] = sequence.shared
        sequence.cached, sequence.source = sequence.shared, None

    def _spent(self, sequence: Sequence, positions: int, scorer: Scorer | None = None) -> None:
        """Count positions run for a sequence, by the base model or a scorer."""
        completion = self._completions[sequence.request.request_id]
        if scorer is None:
            completion.base_positions += positions
        else:
            spent = completion.value_positions
            spent[scorer.name] = spent.get(scorer.name, 0) + positions

    def _run_base(self, sequences: list[Sequence]) -> Tensor:
        """The base model's logits of every sequence's next token: [B, V]."""
        owners = [s.request.request_id for s in sequences]
        logits = self._runner.extend(owners, [[s.last_token] for s in sequences], logits=True)
        for sequence in sequences:
            sequence.cached += 1
            self._spent(sequence, 1)
        return logits

    def _policy(self, sequences: list[Sequence], logits: Tensor) -> Tensor:
        """log π0 of every sequence's next token: [B, V]."""
        knobs = [s.request.sampling for s in sequences]
        logits = self._biased(logits, knobs)
        as_tensor = partial(torch.tensor, device=logits.device)
        return guidance.policy_logprobs(
            logits,
            as_tensor([float(k.temperature) for k in knobs]),
            as_tensor([k.top_k for k in knobs]),
            as_tensor([float(k.top_p) for k in knobs]),
            as_tensor([float(k.min_p) for k in knobs]),
        )

    @staticmethod
    def _biased(logits_BV: Tensor, knobs: list[SamplingParams]) -> Tensor:
        """The logits with each request's `logit_bias`."""
        biased = [(b, *item) for b, k in enumerate(knobs) for item in k.logit_bias.items()]
        if not biased:
            return logits_BV
        rows, tokens, amounts = zip(*biased, strict=True)
        device = logits_BV.device
        at = torch.tensor(rows, device=device), torch.tensor(tokens, device=device)
        return logits_BV.float().index_put(at, torch.tensor(amounts, device=device), accumulate=True)

    def _guided_now(self, sequences: list[Sequence], base_BV: Tensor) -> list[int]:
        """Rows whose schedule wants guidance at this step."""
        guided = [b for b, sequence in enumerate(sequences) if sequence.objectives]
        thresholds = {b: sequences[b].request.guidance.entropy_threshold for b in guided}
        asked = [b for b, threshold in thresholds.items() if threshold is not None]
        if not asked:
            return guided
        entropies = dict(zip(asked, guidance.entropy(base_BV[asked]).tolist(), strict=True))
        return [b for b in guided if b not in entropies or entropies[b] > (thresholds[b] or 0.0)]

    def _guide(self, sequences: list[Sequence], base_BV: Tensor) -> Tensor:
        """log π of every sequence's next token; the rows without guidance are π0's. [B, V]"""
        rows = self._guided_now(sequences, base_BV)
        if not rows:
            return base_BV
        every = len(rows) == len(sequences)
        policy = base_BV if every else base_BV[rows]
        device = policy.device
        params = [sequences[b].request.guidance for b in rows]
        k = torch.tensor([p.candidates for p in params], device=device)
        masses = [p.candidate_mass for p in params]
        adaptive = torch.tensor(masses, device=device) if min(masses) < 1 else None
        tokens, valid = guidance.select_candidates(policy, k, self._eos, adaptive)
        strengths = torch.zeros(len(rows), len(self.objectives), device=device)
        for b, p in enumerate(params):
            for name, strength in p.objectives.items():
                strengths[b, self.objectives[name]] = strength
        with self.clock.part("value"):
            values = self._values(sequences, rows, tokens, valid, strengths)
        advantage = guidance.advantages(
            values,
            policy.gather(1, tokens),
            valid,
            torch.tensor([p.baseline == "mean" for p in params], device=device),
        )
        drop = torch.tensor([p.outside == "drop" for p in params], device=device)
        result = guidance.combine(policy, tokens, valid, advantage, strengths, drop)
        return result if every else base_BV.index_copy(0, torch.tensor(rows, device=device), result)

    def _values(
        self, sequences: list[Sequence], rows: list[int], tokens_BK: Tensor, valid_BK: Tensor, strengths_BJ: Tensor
    ) -> Tensor:
        """Values of the candidates of `sequences[rows]`, 0 where a sequence doesn't use a scorer. [B, K, J]

        Sequences that rest at this step ride along: what they have appended is read in the same pass.
        """
        values = torch.zeros(*tokens_BK.shape, len(self.objectives), device=tokens_BK.device)
        for sequence in (sequences[b] for b in rows):
            self._completions[sequence.request.request_id].guided_steps += 1
        for scorer in self._scorers:
            users = [b for b, sequence in enumerate(sequences) if scorer in self._scorers_of(sequence)]
            asking = [i for i, b in enumerate(rows) if b in users]
            if not asking:
                continue
            first = self.objectives[scorer.objectives[0]]
            own = slice(first, first + len(scorer.objectives))
            scored, positions = scorer.score(
                ScoreBatch(
                    sequences=[sequences[b].request.request_id for b in users],
                    taken=[sequences[b].since(sequences[b].read.get(scorer.name, 0)) for b in users],
                    rows=[users.index(rows[i]) for i in asking],
                    candidates_BK=tokens_BK[asking],
                    valid_BK=valid_BK[asking],
                    strengths_BJ=strengths_BJ[asking, own],
                    soft_B=torch.tensor([sequences[rows[i]].request.guidance.value == "soft" for i in asking]),
                )
            )
            values[asking, :, own] = scored.to(values)
            for b, count in zip(users, positions, strict=True):
                sequences[b].read[scorer.name] = len(sequences[b])
                self._spent(sequences[b], count, scorer)
        return values

    def _scorers_of(self, sequence: Sequence) -> list[Scorer]:
        """The scorers that a sequence's objectives need."""
        return [scorer for scorer in self._scorers if not sequence.objectives.isdisjoint(scorer.objectives)]

    def _append(self, sequence: Sequence, token: int, logprob: float, guided_logprob: float, kl: float) -> Token:
        """Take the sampled token in; a finished sequence leaves at once."""
        request_id = sequence.request.request_id
        sequence.response.append(token)
        text = self._texts[request_id]
        ended = token in self._base.eos_token_ids
        fresh = text.push(token)
        reason = None
        if ended or text.stopped:
            reason = "stop"
        elif len(sequence.response) >= sequence.request.sampling.max_tokens:
            reason = "length"
        if reason:
            fresh += text.push(None)
            self._leave(sequence)
        result = Token(request_id, token, fresh, logprob, guided_logprob, kl, reason)
        self._completions[request_id].add(result)
        return result

    def _leave(self, sequence: Sequence) -> None:
        """Free what a running sequence holds."""
        self._scheduler.leave(sequence)
        self._runner.cache.free(sequence.request.request_id)
        for scorer in self._scorers_of(sequence):
            scorer.close(sequence.request.request_id)
