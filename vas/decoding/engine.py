"""The guided decoding engine: a base model, scorers, and the sequences under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from functools import partial

import torch
from torch import Tensor

from vas import guidance
from vas.decoding.detokenizer import Detokenizer
from vas.decoding.runner import ModelRunner
from vas.decoding.sampler import sample, uniforms
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
    steps of 8, times the longest one in steps of 64). When they grow out of it, the youngest
    sequence waits, and later goes on with the tokens it would have had. None for no limit.
    """

    def __init__(
        self,
        base: BaseModel,
        scorers: Many[Scorer] = (),
        max_sequences: int = 64,
        kv_tokens: int | None = None,
    ) -> None:
        self._base, self._scorers, self._max_sequences = base, list(scorers), max_sequences
        self.objectives: dict[str, int] = {}
        for scorer in scorers:
            for name in scorer.objectives:
                if name in self.objectives:
                    raise VasError(f"two value models bring the objective '{name}'", scorer.name, "name them apart")
                self.objectives[name] = len(self.objectives)
        model = base.model
        self._runner = ModelRunner(
            model.__call__,
            model.base_model.__call__,
            model.config.get_text_config(),
            model.dtype,
            model.device,
            kv_tokens,
        )
        self._eos = torch.tensor(base.eos_token_ids, dtype=torch.long, device=model.device)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._added = 0
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
        rooms |= {scorer.name: scorer.context_length for scorer in self._scorers if self._uses(request, scorer)}
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
        self._waiting.append(Sequence(request, self._added))
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
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        for sequence in self._running:
            if sequence.request.request_id == request_id:
                self._leave(sequence)
                break
        if request_id in self._completions:
            self.take(request_id)

    @property
    def busy(self) -> bool:
        """True while any request is waiting or running."""
        return bool(self._waiting or self._running)

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """Admit what fits, then append one token to every running sequence; returns those tokens."""
        self._preempt()
        self._admit()
        if not self._running:
            return []
        sequences = list(self._running)
        base_BV = self._policy(sequences)
        guided_BV = self._guide(sequences, base_BV)
        device = base_BV.device
        numbers = uniforms([s.request.sampling.seed for s in sequences], [len(s.response) for s in sequences])
        greedy = torch.tensor([s.request.sampling.temperature == 0 for s in sequences], device=device)
        chosen_B = sample(guided_BV, torch.from_numpy(numbers).to(device), greedy)
        figures = torch.stack(
            [
                base_BV.gather(1, chosen_B[:, None]).squeeze(1),
                guided_BV.gather(1, chosen_B[:, None]).squeeze(1),
                guidance.kl_divergence(guided_BV, base_BV)
                if guided_BV is not base_BV
                else torch.zeros_like(base_BV[:, 0]),
            ]
        ).tolist()
        return [
            self._append(sequence, token, *numbers)
            for sequence, token, *numbers in zip(sequences, chosen_B.tolist(), *figures, strict=True)
        ]

    def _admit(self) -> None:
        """Let waiting sequences in: all but the last token goes through the models."""
        fresh: list[Sequence] = []
        while (
            self._waiting
            and len(self._running) + len(fresh) < self._max_sequences
            and self._fits([*self._running, *fresh, self._waiting[0]])
        ):
            fresh.append(self._waiting.popleft())
        if not fresh:
            return
        prompts = {s.request.request_id: s.token_ids for s in fresh}
        run = self._runner.prefill(list(prompts), [tokens[:-1] for tokens in prompts.values()])
        for request_id, positions in run.items():
            self._completions[str(request_id)].base_positions += positions
        for scorer in self._scorers:
            wanted = [s.request.request_id for s in fresh if self._uses(s.request, scorer)]
            if wanted:
                for request_id, positions in scorer.open(wanted, [prompts[i] for i in wanted]).items():
                    spent = self._completions[str(request_id)].value_positions
                    spent[scorer.name] = spent.get(scorer.name, 0) + positions
        self._running.extend(fresh)

    def _fits(self, sequences: list[Sequence]) -> bool:
        """Whether the KV cache holds these after the next step."""
        return self._runner.cache.fits(len(sequences), max(map(len, sequences)))

    def _preempt(self) -> None:
        """Send the youngest sequences back to wait, until the others have room for a step."""
        while self._running and not self._fits(self._running):
            youngest = max(self._running, key=lambda sequence: sequence.number)
            self._leave(youngest)
            youngest.unscored = []  # the scorers will open it with these
            self._waiting.appendleft(youngest)

    def _policy(self, sequences: list[Sequence]) -> Tensor:
        """log π0 of every sequence's next token: [B, V]."""
        owners = [s.request.request_id for s in sequences]
        ids = torch.tensor([[s.last_token] for s in sequences], device=self._runner.device)
        place = self._runner.lengths(owners)[:, None]
        logits = self._runner.run(owners, ids, place, place, place).logits[:, -1]
        for owner in owners:
            self._runner.cache.lengths[owner] += 1
            self._completions[owner].base_positions += 1
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
        guided = [b for b, sequence in enumerate(sequences) if sequence.guided]
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
        guided = [sequences[b] for b in rows]
        policy = base_BV if len(rows) == len(sequences) else base_BV[rows]
        device = policy.device
        params = [s.request.guidance for s in guided]
        k = torch.tensor([p.candidates for p in params], device=device)
        masses = [p.candidate_mass for p in params]
        adaptive = torch.tensor(masses, device=device) if min(masses) < 1 else None
        tokens, valid = guidance.select_candidates(policy, k, self._eos, adaptive)
        strengths = torch.zeros(len(rows), len(self.objectives), device=device)
        for b, p in enumerate(params):
            for name, strength in p.objectives.items():
                strengths[b, self.objectives[name]] = strength
        values = self._values(guided, tokens, valid, strengths)
        advantage = guidance.advantages(
            values,
            policy.gather(1, tokens),
            valid,
            torch.tensor([p.baseline == "mean" for p in params], device=device),
        )
        drop = torch.tensor([p.outside == "drop" for p in params], device=device)
        result = guidance.combine(policy, tokens, valid, advantage, strengths, drop)
        return (
            result if len(rows) == len(sequences) else base_BV.index_copy(0, torch.tensor(rows, device=device), result)
        )

    def _values(self, sequences: list[Sequence], tokens_BK: Tensor, valid_BK: Tensor, strengths_BJ: Tensor) -> Tensor:
        """Values of the candidates for every objective, 0 where a sequence doesn't use the scorer. [B, K, J]"""
        values = torch.zeros(*tokens_BK.shape, len(self.objectives), device=tokens_BK.device)
        for scorer in self._scorers:
            rows = [b for b, sequence in enumerate(sequences) if self._uses(sequence.request, scorer)]
            if not rows:
                continue
            wanted = [sequences[b] for b in rows]
            first = self.objectives[scorer.objectives[0]]
            own = slice(first, first + len(scorer.objectives))
            scored, positions = scorer.score(
                ScoreBatch(
                    sequences=[s.request.request_id for s in wanted],
                    taken=[s.unscored for s in wanted],
                    candidates_BK=tokens_BK[rows],
                    valid_BK=valid_BK[rows],
                    strengths_BJ=strengths_BJ[rows, own],
                    soft_B=torch.tensor([s.request.guidance.value == "soft" for s in wanted]),
                )
            )
            values[rows, :, own] = scored.to(values)
            for sequence in wanted:
                self._completions[sequence.request.request_id].value_positions[scorer.name] += positions
        for sequence in sequences:
            sequence.unscored = []
            self._completions[sequence.request.request_id].guided_steps += 1
        return values

    @staticmethod
    def _uses(request: Request, scorer: Scorer) -> bool:
        strengths = request.guidance.objectives
        return any(strengths.get(name) for name in scorer.objectives)

    def _append(self, sequence: Sequence, token: int, logprob: float, guided_logprob: float, kl: float) -> Token:
        """Take the sampled token in; a finished sequence leaves at once."""
        request_id = sequence.request.request_id
        sequence.append(token)
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
        last = self._running.pop()  # the order of the cache's rows, so that a step reads plain slices
        if last is not sequence:
            self._running[self._running.index(sequence)] = last
        self._runner.cache.free(sequence.request.request_id)
        for scorer in self._scorers:
            if self._uses(sequence.request, scorer):
                scorer.close(sequence.request.request_id)
