"""The sampler: an actor that holds a sampling engine and turns batches of a plan into rows."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vas import schema
from vas.config import RunConfig
from vas.digests import digest
from vas.errors import EngineDied, VasError
from vas.rollouts import stored
from vas.rollouts.engines.interface import SamplingEngine
from vas.rollouts.ledger import Ledger
from vas.rollouts.plan import Job, Plan

if TYPE_CHECKING:  # torch loads in the actors, not in the driver
    from vas.decoding.sequence import Completion, Request

logger = logging.getLogger(__name__)

# what travels with a row until it is committed
COMPANY = pa.schema(
    [
        ("batch", pa.string()),
        ("retry", pa.bool_()),
        ("tokens", pa.int32()),  # sampled for the row here, roll-in and prefix left out
        ("peak_share", pa.float32()),
    ]
)
# with the prompt, for the rewards to read
ROW_SCHEMA = pa.schema([*schema.rollout_schema([], guided=True), *schema.PROMPT_SCHEMA.remove(3).remove(0), *COMPANY])


class Sampler:
    """A Ray Data actor around one engine. Several calls run in it at once, and share its steps.

    A response that cannot be sampled becomes a row with `error` set; it never stops the others. An engine
    that is past saving takes the process with it: Ray starts another, and gives it the work.
    """

    def __init__(
        self,
        config: RunConfig,
        plans: Sequence[Plan],
        location: str,
        value: str | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self._ledger = ledger
        self._config, self._plans, self._location, self._value = config, plans, location, value
        self._loading = threading.Lock()
        self._loaded: SamplingEngine | None = None
        threading.Thread(target=self._load_early, daemon=True).start()

    def _load_early(self) -> None:
        """Load the engine while the first batch is on its way, which comes upon the same error if there is one."""
        with suppress(Exception):
            _ = self._engine

    @property
    def _engine(self) -> SamplingEngine:
        """Never made in the constructor: an error in an actor's constructor would not reach the user."""
        from vas.rollouts.engines import make_engine

        with self._loading:
            if self._loaded is None:
                self._loaded = make_engine(self._config, self._value, self._ledger)
            return self._loaded

    def __call__(self, work: pa.Table) -> pa.Table:
        """Sample the batches of WORK_SCHEMA's rows; rows without rewards."""
        rows: list[dict[str, Any]] = []
        for task in work.to_pylist():
            if self._ledger is not None and self._ledger.gone:
                break  # it stays to be done
            jobs = self._plans[task["plan"]].batch(task["batch"], self._config.rollouts.batch_size)
            if task["retry"]:
                good = set(stored.good_rows(self._location, task["name"])["rollout_id"].to_pylist())
                jobs = [job for job in jobs if job.rollout_id not in good]
            about = {"batch": task["name"], "retry": task["retry"]}
            rows += [row | about for row in self.sample(jobs)]
        return pa.Table.from_pylist(rows, schema=ROW_SCHEMA)

    def sample(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """A row for each job, in order, without rewards."""
        drafts = [self._draft(job) for job in jobs]
        for draft, roll_in in self._decode([d for d in drafts if d.sound and d.roll_in_tokens], self._roll_in):
            draft.begin(roll_in)
        for draft, response in self._decode([d for d in drafts if d.sound], self._response):
            tokens = draft.prefix + response.token_ids
            draft.row |= {
                "response_token_ids": tokens,
                "response_text": self._text(tokens) if draft.prefix else response.text,
                "logprobs": response.logprobs,
                "finish_reason": response.finish_reason,
                "guided_logprobs": response.guided_logprobs,
                "kl": response.kl,
                "base_positions": response.base_positions,
                "value_positions": sum(response.value_positions.values()),
                "tokens": len(response.token_ids),
            }
        return [draft.row | {"peak_share": self._engine.peak_share} for draft in drafts]

    def _draft(self, job: Job) -> _Draft:
        """A response with its prompt encoded; a chat template may raise anything."""
        from vas.models.base import encode_prompt

        draft = _Draft(job, self._engine, self._config.rollouts.sampling.max_tokens)
        try:
            draft.row["prompt_token_ids"] = encode_prompt(self._engine.tokenizer, job.prompt)
        except Exception as error:
            draft.fail(error)
        return draft

    def _decode(
        self, drafts: Sequence[_Draft], request_of: Callable[[_Draft], Request]
    ) -> Iterator[tuple[_Draft, Completion]]:
        """Decode a request for each draft; what can't be decoded fails alone."""
        requests: list[tuple[_Draft, Request]] = []
        for draft in drafts:
            try:
                request = request_of(draft)
                self._engine.check(request)
                requests.append((draft, request))
            except VasError as error:
                draft.fail(error)
        try:
            outcomes = self._engine.generate([request for _, request in requests])
        except EngineDied as death:
            logger.error("the engine died, and this actor with it: %s", death)
            os._exit(1)
        for (draft, _), outcome in zip(requests, outcomes, strict=True):
            if isinstance(outcome, VasError):
                draft.fail(outcome)
            else:
                draft.row["decode_seconds"] += outcome.seconds
                yield draft, outcome

    def _roll_in(self, draft: _Draft) -> Request:
        """The guided beginning of a response."""
        roll_in = draft.job.roll_in
        assert roll_in is not None
        return self._request(draft, roll_in.setting, roll_in.seed, draft.roll_in_tokens)

    def _response(self, draft: _Draft) -> Request:
        """What comes after the prompt and the response's beginning."""
        room = self._config.rollouts.sampling.max_tokens - len(draft.prefix)
        return self._request(draft, draft.job.setting, draft.seed, room)

    def _request(self, draft: _Draft, setting: str, seed: int, max_tokens: int) -> Request:
        from vas.decoding.sequence import GuidanceParams, Request, SamplingParams

        messages = tuple(draft.job.prompt.messages)
        if messages and draft.prefix:
            messages += ({"role": "assistant", "content": self._engine.tokenizer.decode(draft.prefix)},)
        return Request(
            draft.job.rollout_id,
            (*draft.row["prompt_token_ids"], *draft.prefix),
            replace(SamplingParams.of(self._config.rollouts.sampling, seed), max_tokens=max_tokens),
            GuidanceParams.of(self._config.evaluation, json.loads(setting)),
            messages=messages,
        )

    def _text(self, tokens: list[int]) -> str:
        """The text of a whole response: that of its parts, joined, would have other spaces, and torn characters.

        A stop string that begins in the prefix cuts the text; the engine has not seen it, and went on.
        """
        from vas.decoding.detokenizer import Detokenizer

        text = Detokenizer(self._engine.tokenizer, tuple(self._config.rollouts.sampling.stop))
        return "".join(text.push(token) for token in (*tokens, None))


class _Draft:
    """A response under way, and the row that it becomes."""

    def __init__(self, job: Job, engine: SamplingEngine, longest: int) -> None:
        self.job, self.prefix, self.seed = job, list(job.prefix), job.seed
        self.roll_in_tokens = int(job.roll_in.share * longest) if job.roll_in else 0
        self.row: dict[str, Any] = {
            "rollout_id": job.rollout_id,
            "prompt_id": job.prompt.prompt_id,
            "sample_index": job.sample_index,
            "round": job.round,
            "prompt_token_ids": [],
            "response_token_ids": self.prefix,
            "response_text": "",
            "logprobs": [],
            "finish_reason": "error",
            "base_model": engine.name,
            "tokenizer_digest": engine.tokenizer_digest,
            "held_out": job.prompt.held_out,
            "error": None,
            "roll_in_length": len(self.prefix),
            "setting": job.setting,
            "decode_seconds": 0.0,
            "messages": list(job.prompt.messages),
            "text": job.prompt.text,
            "tokens": 0,
        }

    @property
    def sound(self) -> bool:
        """False once it failed."""
        return self.row["error"] is None

    def fail(self, error: Exception) -> None:
        """Let its row say why there is no response."""
        self.row["error"] = str(error) if isinstance(error, VasError) else f"{type(error).__name__}: {error}"

    def begin(self, roll_in: Completion) -> None:
        """Go on from what the guided policy wrote; from within it, if it ended the response itself."""
        assert self.job.roll_in is not None
        written = roll_in.token_ids
        if roll_in.finish_reason == "stop":
            written = written[: int(self.job.roll_in.share * len(written))]
        self.prefix = written
        self.seed = schema.rollout_seed(digest(self.job.rollout_id, "after roll-in", *written))
        self.row |= {"response_token_ids": written, "roll_in_length": len(written)}
