"""The guided decoding engine: a base model, scorers, and the sequences under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many

import torch

from vas.choices import Linears
from vas.decoding import switches
from vas.decoding.base_runner import BaseRunner, Drawable, LocalRunner
from vas.decoding.blocks import Block, choose
from vas.decoding.check import Check
from vas.decoding.clock import Clock
from vas.decoding.detokenizer import Detokenizer
from vas.decoding.guide import Guide
from vas.decoding.sampler import draw, policy
from vas.decoding.scheduler import Scheduler
from vas.decoding.scorer import InProcess, Scorer
from vas.decoding.sequence import Completion, Drawn, Request, Score, Sequence, Token
from vas.decoding.served import ServedRunner
from vas.errors import Rejected, VasError
from vas.models.base import BaseModel
from vas.models.served import ServedModel


class Engine:
    """Decodes many requests at once, each with its own sampling and guidance.

    Sequences join and leave at every step (continuous batching). Without guidance the
    tokens are those of Hugging Face `generate` in float32.

    max_sequences: how many requests are decoded at once; more wait. With a base model that is only called, no more than
    the calls that it may be asked at once.
    kv_tokens: tokens that the KV cache of the base model may hold, and that of each value model, counted
    as allocated (1, 2, 4 or 8 sequences or more in steps of 8, times the longest one in steps of 64; on a GPU both
    double, lengths from 128 to 1,024, and each sequence takes 64 more places beside the limit). When they grow
    out of it, the youngest sequence waits, and later goes on with the tokens it would have had. None for no limit.
    Beside the cache, a value model holds the KV of the last step's candidates.
    prefill_tokens: how many tokens of prompts are read at a step, by the base model.
    linears: how the base model's linear layers compute on a CPU, see `linears.py`. free: use up the base
    model's own weights instead of keeping them beside the engine's; only the engine can use it then.
    """

    def __init__(
        self,
        base: BaseModel | ServedModel,
        scorers: Many[Scorer] = (),
        max_sequences: int = 64,
        kv_tokens: int | None = None,
        prefill_tokens: int = 2048,
        linears: Linears = "exact",
        free: bool = False,
    ) -> None:
        for name, number in (("max_sequences", max_sequences), ("prefill_tokens", prefill_tokens)):
            if number < 1:
                raise VasError(f"{name} must be at least 1, not {number}")
        self._base, self._scorers = base, list(scorers)
        self.clock = Clock()
        self._guide = Guide(scorers, base.eos_token_ids, base.device, self.clock, base.vocabulary)
        self.objectives = tuple(self._guide.objectives)
        self._runner: BaseRunner
        if isinstance(base, ServedModel):
            self._runner = ServedRunner(base, kv_tokens)
            max_sequences = min(max_sequences, base.server.concurrency)  # more would take each other's prefixes
        else:
            self._runner = LocalRunner(base.model, linears, free, kv_tokens)
        for scorer in scorers:
            scorer.limit(kv_tokens)
        self.check = Check(base, self._guide, self._runner.cache)
        """Raises VasError for a request that could never be decoded here."""
        joint = min(self._runner.joint, prefill_tokens)
        self._scheduler = Scheduler(self._runner.cache.fits, max_sequences, joint)
        self._prefill_tokens = prefill_tokens
        self._early = not switches.off("first_tokens")
        self._added = 0
        self.preempted = 0
        """How often a sequence was sent back to wait."""
        self.interrupted: tuple[str, ...] = ()
        """Requests that were running when a step failed last; they wait again, the oldest first."""
        self.failed: dict[str, Exception] = {}
        """Requests that ended without a completion, and why: VasError, or Rejected for what would end any other, too.
        Only calls of a server fail like this. Whoever reads it empties it."""
        self._completions: dict[str, Completion] = {}
        self._streams: dict[str, deque[Token]] = {}

    def add(self, request: Request) -> None:
        """Queue a request. Raises VasError as `check` does, or if its id is in use."""
        self.check(request)
        if request.request_id in self._completions:
            raise VasError(f"request id '{request.request_id}' is in use already")
        text = Detokenizer(self._base.tokenizer, request.sampling.stop)
        for token in request.begun:
            text.push(token)  # has been released where it was sampled
        sequence = Sequence(request, self._added, Completion(request.request_id), text, list(request.begun))
        self._completions[request.request_id] = sequence.completion
        self._scheduler.waiting.append(sequence)
        self._added += 1

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """Decode requests to the end; completions come in the requests' order."""
        done: dict[str, Completion | None] = {}
        try:
            for request in requests:
                self.add(request)
                done[request.request_id] = None
            while None in done.values():
                for request_id in done.keys() & self.failed.keys():
                    raise _told(self.failed[request_id])
                if not self.busy:
                    raise VasError("a request was aborted, or decoded by somebody else", str(list(done)[:3]))
                for token in self.step():
                    if token.finish_reason and token.request_id in done:
                        done[token.request_id] = self.take(token.request_id)
        except BaseException:
            for request_id in done:
                self.abort(request_id)
                self.failed.pop(request_id, None)
            raise
        return [completion for completion in done.values() if completion]

    def stream(self, request: Request) -> Iterator[Token]:
        """Decode one request, a token at a time; leaving the loop early frees it. Several streams may be interleaved.

        Raises VasError if somebody else aborts the request.
        """
        self.add(request)
        tokens = self._streams[request.request_id] = deque[Token]()
        try:
            while True:
                while tokens:
                    token = tokens.popleft()
                    yield token
                    if token.finish_reason:
                        return
                if request.request_id in self.failed:
                    raise _told(self.failed.pop(request.request_id))
                if request.request_id not in self._completions:
                    raise VasError("the request was aborted", request.request_id)
                self.step()
        finally:
            del self._streams[request.request_id]
            self.abort(request.request_id)

    def completion(self, request_id: str) -> Completion:
        """What a request under way has come to."""
        return self._completions[request_id]

    def take(self, request_id: str) -> Completion:
        """Hand over a finished completion."""
        return self._completions.pop(request_id)

    def abort(self, request_id: str) -> None:
        """Drop a request, wherever it is; unknown ids are fine."""
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            if sequence in self._scheduler.waiting:
                self._scheduler.waiting.remove(sequence)
            else:
                self._leave(sequence)
        self._completions.pop(request_id, None)

    @property
    def busy(self) -> bool:
        """True while any request is waiting or running."""
        return self._scheduler.busy

    @property
    def running(self) -> int:
        """Requests being decoded."""
        return sum(sequence.fork == 0 for sequence in self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._scheduler.waiting)

    @property
    def max_sequences(self) -> int:
        """How many requests are decoded at once; a lower number lets those that run already finish."""
        return self._scheduler.max_sequences

    @max_sequences.setter
    def max_sequences(self, number: int) -> None:
        self._scheduler.max_sequences = number

    @property
    def kv_bytes(self) -> int:
        """Bytes that the KV caches of base and value models hold."""
        return self._runner.cache.memory() + sum(scorer.kv_bytes for scorer in self._scorers)

    def spare(self) -> None:
        """Let go of memory that only makes steps faster, where it is short."""
        self._runner.spare()
        for scorer in self._scorers:
            if isinstance(scorer, InProcess):
                scorer.spare()

    def step(self) -> list[Token]:
        """Admit what fits, read prompts, then append a token to every sequence that is ready; returns those tokens.

        A request with the schedule `block:b` gets its tokens b at a time. If a model fails, what is running
        goes back to wait, so that the engine can go on without the request that brought it about; tokens of parts
        before, which may end a response, stand in their `completion`.
        """
        return [token for part in self.parts() for token in part]

    @torch.inference_mode()
    def parts(self) -> Iterator[list[Token]]:
        """A step, with tokens as soon as they are drawn: first those that need not wait for others' value models.

        Those are the ones that begin a response, and those of requests without guidance. Whoever takes the parts may
        add requests between two of them, and do nothing else with the engine; a request that comes before the first
        tokens may have its own among them. A part that fails has taken in no token; to leave early is to fail.
        """
        try:
            for tokens in self._step():
                for token in tokens:
                    if token.request_id in self._streams:
                        self._streams[token.request_id].append(token)
                yield tokens
        except BaseException:
            trunks = sorted((s for s in self._scheduler.running if s.fork == 0), key=lambda s: s.number)
            self.interrupted = tuple(sequence.request.request_id for sequence in trunks)
            for sequence in reversed(trunks):
                self._send_back(sequence)
            raise

    def _step(self) -> Iterator[list[Token]]:
        with self.clock.part("overhead"):
            self._preempt()
            self._admit()
            with self.clock.part("prefill"):
                left = self._prefill()
            self._begin_blocks()
            with self.clock.part("base"):
                ready = self._scheduler.ready(left)
                left -= sum(sequence.unread for sequence in ready)
                arrival = self._runner.arrived(ready)
                ahead = arrival.ahead
                drawable = Drawable(ahead, self._runner.logits(ahead)) if ahead else None
        if drawable and self._scheduler.joint and any(sequence.steered for sequence in ahead):
            yield []  # requests may come
            with self.clock.part("overhead"):
                first, drawable = self._join(drawable, left).split(self._goes_first)
                tokens = self._take_drawn(self._draw(first)) if first else []
            yield tokens
        with self.clock.part("overhead"):
            drawn: list[_Drawn] = [(sequence, some, None, reason) for sequence, some, reason in arrival.drawn]
            drawn += self._draw(drawable) if drawable else []
            whole = [each for block in arrival.blocks for each in block.continuations]
            chosen = self._choose([*ahead, *whole])
            # no model runs from here on: a part that fails has taken in no token
            for sequence, error in arrival.failed:
                self._fail(sequence, error)
            tokens = self._take_drawn(drawn)
            tokens += [token for each in chosen for token in self._finish_block(*each)]
        yield tokens

    def _goes_first(self, sequence: Sequence) -> bool:
        """Whether its token is drawn before value models run for the other sequences.

        Value models elsewhere are asked once a step. Continuations of blocks are not steered, token by token.
        """
        if not (self._early and sequence.steered):
            return self._early
        return sequence.fresh and all(isinstance(each, InProcess) for each in self._guide.scorers_of(sequence.request))

    def _join(self, drawable: Drawable, budget: int) -> Drawable:
        """Sequences that came while the base model ran for these go on with them, before value models run.

        Only with short prompts, within a budget of tokens, for they have a pass of the base model's to themselves.
        """
        fresh = self._admit()
        self._copy_prefixes()
        late = self._scheduler.ready(budget, [s for s in fresh if not s.blockwise])
        if not late:
            return drawable
        with self.clock.part("base"):
            return drawable.joined_by(late, self._runner.logits(late))

    def _take_drawn(self, drawn: list[_Drawn]) -> list[Token]:
        """Append drawn tokens to their sequences, and end the responses that end; a sequence may have several."""
        tokens = []
        for sequence, some, scores, reason in drawn:
            for place, each in enumerate(some, 1):
                sequence.response.append(each.token)
                last = reason if place == len(some) else None
                tokens.append(self._take_in(sequence, each, scores, ends=last))
                if tokens[-1].finish_reason:
                    break
        return tokens

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """End a request without a completion."""
        self._leave(sequence)
        del self._completions[sequence.request.request_id]
        self.failed[sequence.request.request_id] = error

    def _draw(self, drawable: Drawable) -> list[_Drawn]:
        """A token for each of these; continuations of blocks keep theirs."""
        sequences = drawable.sequences
        with self.clock.part("combine"):
            knobs = [s.request.sampling for s in sequences]
            base_BV = policy(drawable.logits_BV, knobs)
            guided_BV, kl_B = self._guide(sequences, base_BV)
        with self.clock.part("sample"):
            guided_BV = self._runner.certain(guided_BV, knobs)
            drawn, told = draw(sequences, base_BV, guided_BV, kl_B, self._guide.about, self._runner.vocabulary)
            scores = self._guide.scores(sequences, told)
            settled = self._runner.settle(sequences, drawn)
        found: list[_Drawn] = []
        for b, (sequence, each) in enumerate(zip(sequences, settled, strict=True)):
            sequence.completion.base_positions += len(sequence) - sequence.cached
            if each is None:  # its token comes with a later step
                continue
            sequence.cached = len(sequence)
            if sequence.block is None:
                found.append((sequence, [each], scores.get(b), None))
            else:
                sequence.response.append(each.token)
                sequence.pending.append(each)
                sequence.resting = self._has_its_share(sequence, each.token)
        return found

    def _preempt(self) -> None:
        """Send the youngest sequences back to wait, until the others have room for a step."""
        while youngest := self._scheduler.overflowing():
            self.preempted += 1
            self._send_back(youngest)

    def _send_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, at the head of the queue."""
        self._leave(sequence)
        sequence.restart()
        self._scheduler.waiting.appendleft(sequence)

    def _admit(self) -> list[Sequence]:
        """Let waiting sequences in, with a row in every cache they need."""
        fresh = self._scheduler.admit()
        for sequence in fresh:
            self._open(sequence)
        return fresh

    def _open(self, sequence: Sequence) -> None:
        self._runner.cache.add(sequence.owner)
        for scorer in self._guide.scorers_of(sequence.request):
            scorer.open(sequence.owner, len(sequence.request.prompt_token_ids))

    def _prefill(self) -> int:
        """Read prompts, all but the last token, through the base model and the scorers that each needs.

        Returns how many more tokens of prompts may be read at this step.
        """
        left = self._prefill_tokens
        while True:
            self._copy_prefixes()
            chunks = self._scheduler.prefill(left)
            if not chunks:
                return left
            tokens = {s: s.tokens(s.cached, s.cached + size) for s, size in chunks}
            self._runner.read([s.owner for s in tokens], list(tokens.values()))
            for scorer in self._scorers:
                wanted = {s: some for s, some in tokens.items() if scorer in self._guide.scorers_of(s.request)}
                if wanted:
                    self._guide.extend(scorer, wanted)
            for sequence, size in chunks:
                sequence.cached += size
                sequence.completion.base_positions += size
                left -= size

    def _copy_prefixes(self) -> None:
        """Give sequences the prefixes that they share with others and that these have read by now."""
        for sequence in self._scheduler.sharing():
            source, length = sequence.source, sequence.shared
            assert source is not None
            for scorer in self._guide.scorers_of(sequence.request):
                read = source.read.get(scorer.name, 0)
                if read < length:  # its own steps have not been guided yet
                    self._guide.extend(scorer, {source: source.tokens(read, length)})
            self._share(source, sequence, length)
            sequence.source = None

    def _share(self, source: Sequence, target: Sequence, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source` in every cache."""
        self._runner.cache.copy(source.owner, target.owner, length)
        target.cached = length
        for scorer in self._guide.scorers_of(target.request):
            scorer.share(source.owner, target.owner, length)
            target.read[scorer.name] = length

    def _take_in(
        self, sequence: Sequence, drawn: Drawn, scores: dict[str, Score] | None = None, ends: str | None = None
    ) -> Token:
        """Add a token to its request's completion; a finished sequence leaves at once. ends: why it is the last."""
        request, completion, text = sequence.request, sequence.completion, sequence.text
        fresh = text.push(drawn.token)
        reason = None
        if drawn.token in self._base.eos_token_ids or text.stopped:
            reason = "stop"
        elif len(request.begun) + len(completion.token_ids) + 1 == request.sampling.max_tokens:
            reason = "length"
        reason = reason or ends
        if reason:
            fresh += text.push(None)
            self._leave(sequence)
        figures = drawn.logprob, drawn.guided_logprob, drawn.kl, drawn.top
        token = Token(request.request_id, drawn.token, fresh, *figures, reason, scores or {})
        completion.add(token)
        return token

    def _begin_blocks(self) -> None:
        """Give sequences that are guided by blocks their continuations."""
        trunks = [s for s in self._scheduler.running if s.ready and s.blockwise and s.block is None]
        fresh = [(trunk, each) for trunk in trunks for each in Block.of(trunk).continuations[1:]]
        for _, each in fresh:  # all have their rows before memory may run out
            self._scheduler.running.append(each)
            self._open(each)
        for trunk, each in fresh:
            self._share(trunk, each, trunk.cached)

    def _has_its_share(self, sequence: Sequence, token: int) -> bool:
        """Whether a continuation has all the tokens that its block may have."""
        request = sequence.request
        full = len(sequence.pending) == request.guidance.block_size
        return full or token in self._base.eos_token_ids or len(sequence.response) == request.sampling.max_tokens

    def _choose(self, sequences: list[Sequence]) -> list[tuple[Sequence, list[Drawn]]]:
        """One continuation, with its tokens, of each block in which all have theirs."""
        blocks = dict.fromkeys(s.block for s in sequences if s.block and s.block.complete)
        return choose(list(blocks), self._guide)

    def _finish_block(self, chosen: Sequence, drawn: list[Drawn]) -> Iterator[Token]:
        """Take in the tokens of a continuation, and let the others follow it."""
        assert chosen.block is not None
        for one in drawn:
            token = self._take_in(chosen, one)
            yield token
            if token.finish_reason:
                return
        for each in chosen.block.continuations:
            each.pending, each.resting = [], False
            if each is not chosen:
                each.response = list(chosen.response)
                self._share(chosen, each, len(chosen) - 1)

    def _leave(self, sequence: Sequence) -> None:
        """Free what a running sequence holds, and its other continuations with it."""
        for each in sequence.block.continuations if sequence.block else (sequence,):
            self._scheduler.leave(each)
            self._runner.cache.free(each.owner)
            for scorer in self._guide.scorers_of(each.request):
                scorer.close(each.owner)


_Drawn = tuple[Sequence, list[Drawn], dict[str, Score] | None, str | None]
"""A sequence, tokens for it with their scores, and why it ends with them, if it does."""


def _told(error: Exception) -> Exception:
    """What a failure is to whoever asked for that one request."""
    return error.error if isinstance(error, Rejected) else error
