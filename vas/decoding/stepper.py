"""A step of the engine: who joins, which prompts are read, and which token each sequence gets."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Many

import torch

from vas.decoding import switches
from vas.decoding.base_runner import BaseRunner, Drawable
from vas.decoding.blocks import Block, choose
from vas.decoding.clock import Clock
from vas.decoding.flight import Flight
from vas.decoding.guide import Guide
from vas.decoding.prefixes import Prefixes
from vas.decoding.sampler import draw, policy
from vas.decoding.scheduler import Scheduler
from vas.decoding.scorer import InProcess
from vas.decoding.sequence import Drawn, Score, Sequence, Token


class Stepper:
    """Appends a token to every sequence that is ready.

    prefill_tokens: how many tokens of prompts are read at a step.
    """

    def __init__(
        self,
        runner: BaseRunner,
        guide: Guide,
        scheduler: Scheduler,
        prefixes: Prefixes,
        eos_token_ids: Many[int],
        prefill_tokens: int,
        clock: Clock,
    ) -> None:
        self._runner, self.guide, self._scheduler, self._prefixes = runner, guide, scheduler, prefixes
        self._eos_token_ids, self._prefill_tokens = eos_token_ids, prefill_tokens
        self._clock = clock
        self._early = not switches.off("first_tokens")
        self.preempted = 0
        self.failed: dict[str, Exception] = {}
        """Requests that have ended without a completion, and why: see `Engine.failed`."""

    @torch.inference_mode()
    def parts(self) -> Iterator[list[Token]]:
        """A step, see `Engine.parts`."""
        with self._clock.part("overhead"):
            self._preempt()
            self._admit()
            with self._clock.part("prefill"):
                left = self._prefill()
            self._begin_blocks()
            with self._clock.part("base"):
                ready = self._scheduler.ready(left)
                left -= sum(sequence.unread for sequence in ready)
                arrival = self._runner.arrived(ready)
        ahead = arrival.ahead
        drawable = (yield from self._pass(ahead, left)) if ahead else None
        if drawable and self._scheduler.joint:
            with self._clock.part("overhead"):
                first, drawable = drawable.split(self._goes_first)
                tokens = self._take_drawn(self._draw(first)) if first else []
            yield tokens
        with self._clock.part("overhead"):
            drawn: list[_Drawn] = [(sequence, some, None, reason) for sequence, some, reason in arrival.drawn]
            drawn += self._draw(drawable) if drawable else []
            whole = [each for block in arrival.blocks for each in block.continuations]
            chosen = self._choose([*ahead, *whole])
            # no model runs from here on: a part that fails has taken in no token
            for sequence, error in arrival.failed:
                self.leave(sequence)
                self.failed[sequence.request.request_id] = error
            tokens = self._take_drawn(drawn)
            tokens += [token for each in chosen for token in self._finish_block(*each)]
        yield tokens

    def send_back(self, sequence: Sequence) -> None:
        """Let a running sequence wait again, at the head of the queue."""
        self.leave(sequence)
        sequence.restart()
        self._scheduler.waiting.appendleft(sequence)

    def leave(self, sequence: Sequence) -> None:
        """Free what a running sequence holds, and its other continuations with it."""
        for each in sequence.block.continuations if sequence.block else (sequence,):
            self._scheduler.leave(each)
            self._prefixes.close(each)

    def _preempt(self) -> None:
        """Send the youngest sequences back to wait, until the others have room for a step."""
        while youngest := self._scheduler.overflowing():
            self.preempted += 1
            self.send_back(youngest)

    def _admit(self) -> list[Sequence]:
        """Let waiting sequences in, with a row in every cache they need; they are the last ones that run."""
        fresh = self._scheduler.admit()
        for sequence in fresh:
            self._prefixes.open(sequence)
        return fresh

    def _prefill(self) -> int:
        """Read prompts, all but the last token and short rests; returns how many more tokens this step may read."""
        left = self._prefill_tokens
        while True:
            self._prefixes.inherit(self._scheduler.sharing())
            chunks = self._scheduler.prefill(left)
            if not chunks:
                return left
            self._prefixes.read(chunks)
            left -= sum(size for _, size in chunks)

    def _goes_first(self, sequence: Sequence) -> bool:
        """Whether its token is drawn before value models run for the other sequences.

        Value models elsewhere are asked once a step. Continuations of blocks are not steered, token by token.
        """
        if not (self._early and sequence.steered):
            return self._early
        return sequence.fresh and all(isinstance(each, InProcess) for each in self.guide.scorers_of(sequence.request))

    def _pass(self, sequences: list[Sequence], budget: int) -> Generator[list[Token], None, Drawable]:
        """The base model's pass over these, and over those that come meanwhile, which need not wait for the next step.

        The first ones that come have a pass of their own between two layers of it, and their first token at once; those
        after them share one at its end. Only with short prompts, within a budget of tokens, for all others wait for
        them. Their rows are the last ones: who ends with the first token moves none that the pass is over.
        """
        if not self._scheduler.joint:
            return self._logits(sequences)
        with self._clock.part("base"):
            flight = self._runner.flight(sequences)
        before, begun = len(self._scheduler.running), list[Sequence]()
        while flight and self._advance(flight):
            yield []  # requests may come
            if not begun and (begun := self._late(before, budget, self._goes_first)):
                budget -= sum(sequence.unread for sequence in begun)
                with self._clock.part("overhead"):
                    tokens = self._take_drawn(self._draw(self._logits(begun)))
                yield tokens
        drawable = self._logits(sequences, flight)
        yield []
        late = self._late(before, budget, lambda sequence: sequence not in begun)
        return drawable.joined_by(self._logits(late)) if late else drawable

    def _advance(self, flight: Flight) -> bool:
        with self._clock.part("base"):
            return flight.advance()

    def _logits(self, sequences: Many[Sequence], flight: Flight | None = None) -> Drawable:
        """What the base model says comes next, at the end of a flight or of a pass over these."""
        with self._clock.part("base"):
            return Drawable(list(sequences), flight.logits() if flight else self._runner.logits(sequences))

    def _late(self, before: int, budget: int, wanted: Callable[[Sequence], bool]) -> list[Sequence]:
        """Sequences that may join a step that has begun, of those that have come since so many were running."""
        with self._clock.part("overhead"):
            if self._admit():
                self._prefixes.inherit(self._scheduler.sharing())
            came = [s for s in self._scheduler.running[before:] if not s.blockwise and wanted(s)]
            return self._scheduler.ready(budget, came)

    def _draw(self, drawable: Drawable) -> list[_Drawn]:
        """A token for each of these; continuations of blocks keep theirs."""
        sequences = drawable.sequences
        with self._clock.part("combine"):
            knobs = [s.request.sampling for s in sequences]
            base_BV = policy(drawable.logits_BV, knobs)
            guided_BV, kl_B = self.guide(sequences, base_BV)
        with self._clock.part("sample"):
            guided_BV = self._runner.certain(guided_BV, knobs)
            drawn, told = draw(sequences, base_BV, guided_BV, kl_B, self.guide.about, self._runner.vocabulary)
            scores = self.guide.scores(sequences, told)
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

    def _take_in(
        self, sequence: Sequence, drawn: Drawn, scores: dict[str, Score] | None = None, ends: str | None = None
    ) -> Token:
        """Add a token to its request's completion; a finished sequence leaves at once. ends: why it is the last."""
        request, completion, text = sequence.request, sequence.completion, sequence.text
        fresh = text.push(drawn.token)
        reason = None
        if drawn.token in self._eos_token_ids or text.stopped:
            reason = "stop"
        elif len(request.begun) + len(completion.token_ids) + 1 == request.sampling.max_tokens:
            reason = "length"
        reason = reason or ends
        if reason:
            fresh += text.push(None)
            self.leave(sequence)
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
            self._prefixes.open(each)
        for trunk, each in fresh:
            self._prefixes.share(trunk, each, trunk.cached)

    def _has_its_share(self, sequence: Sequence, token: int) -> bool:
        """Whether a continuation has all the tokens that its block may have."""
        request = sequence.request
        full = len(sequence.pending) == request.guidance.block_size
        return full or token in self._eos_token_ids or len(sequence.response) == request.sampling.max_tokens

    def _choose(self, sequences: list[Sequence]) -> list[tuple[Sequence, list[Drawn]]]:
        """One continuation, with its tokens, of each block in which all have theirs."""
        blocks = dict.fromkeys(s.block for s in sequences if s.block and s.block.complete)
        return choose(list(blocks), self.guide)

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
                self._prefixes.share(chosen, each, len(chosen) - 1)


_Drawn = tuple[Sequence, list[Drawn], dict[str, Score] | None, str | None]
"""A sequence, tokens for it with their scores, and why it ends with them, if it does."""
