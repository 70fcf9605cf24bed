"""The guided decoding engine: a base model, scorers, and the requests under way; `stepper.py` has its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many

from vas.choices import Linears
from vas.decoding.base_runner import BaseRunner, LocalRunner
from vas.decoding.check import Check
from vas.decoding.clock import Clock
from vas.decoding.detokenizer import Detokenizer
from vas.decoding.guide import Guide
from vas.decoding.prefixes import Prefixes
from vas.decoding.scheduler import Scheduler
from vas.decoding.scorer import InProcess, Scorer
from vas.decoding.sequence import Completion, Request, Sequence, Token
from vas.decoding.served import ServedRunner
from vas.decoding.stepper import Stepper
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
        guide = Guide(scorers, base.eos_token_ids, base.device, self.clock, base.vocabulary)
        self.objectives = tuple(guide.objectives)
        self._runner: BaseRunner
        if isinstance(base, ServedModel):
            self._runner = ServedRunner(base, kv_tokens)
            max_sequences = min(max_sequences, base.server.concurrency)  # more would take each other's prefixes
        else:
            self._runner = LocalRunner(base.model, linears, free, kv_tokens)
        for scorer in scorers:
            scorer.limit(kv_tokens)
        self.check = Check(base, guide, self._runner.cache)
        """Raises VasError for a request that could never be decoded here."""
        joint = min(self._runner.joint, prefill_tokens)
        self._scheduler = Scheduler(self._runner.cache.fits, max_sequences, joint)
        self._prefixes = Prefixes(self._runner, self._scorers, guide)
        self._stepper = Stepper(
            self._runner,
            guide,
            self._scheduler,
            self._prefixes,
            base.eos_token_ids,
            prefill_tokens,
            self.clock,
        )
        self._added = 0
        self.interrupted: tuple[str, ...] = ()
        """Requests that were running when a step failed last; they wait again, the oldest first."""
        self.failed = self._stepper.failed
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
                self._stepper.leave(sequence)
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
        return self._prefixes.kv_bytes

    @property
    def preempted(self) -> int:
        """How often a sequence was sent back to wait."""
        return self._stepper.preempted

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

    def parts(self) -> Iterator[list[Token]]:
        """A step, with tokens as soon as they are drawn: first those that need not wait for others' value models.

        Those are the ones that begin a response, and those of requests without guidance. Before them come parts between
        the layers of the base model, without a token, or with the first tokens of requests that have come meanwhile.
        Whoever takes the parts may add requests between two of them, and do nothing else with the engine. A part that
        fails has taken in no token; to leave early is to fail.
        """
        try:
            for tokens in self._stepper.parts():
                for request_id in self.failed.keys() & self._completions.keys():
                    del self._completions[request_id]
                for token in tokens:
                    if token.request_id in self._streams:
                        self._streams[token.request_id].append(token)
                yield tokens
        except BaseException:
            trunks = sorted((s for s in self._scheduler.running if s.fork == 0), key=lambda s: s.number)
            self.interrupted = tuple(sequence.request.request_id for sequence in trunks)
            for sequence in reversed(trunks):
                self._stepper.send_back(sequence)
            raise


def _told(error: Exception) -> Exception:
    """What a failure is to whoever asked for that one request."""
    return error.error if isinstance(error, Rejected) else error
