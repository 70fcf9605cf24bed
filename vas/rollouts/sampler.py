"""The sampler: an actor that holds the models and turns jobs into rows."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vas import schema
from vas.config import RunConfig
from vas.errors import VasError

if TYPE_CHECKING:  # torch loads in the actors, not in the driver
    from vas.decoding.engine import Engine
    from vas.models.base import BaseModel


class Sampler:
    """A Ray Data actor: base model and, when guided, a value model, behind one decoding engine.

    A job that cannot be decoded becomes rows with `error` set; it never stops the others.
    """

    def __init__(self, config: RunConfig, value: str | None = None) -> None:
        self._config, self._value = config, value
        # the prompt travels on with the row, for the rewards to read
        self._schema = pa.schema([*schema.rollout_schema([], guided=True), *schema.PROMPT_SCHEMA.remove(3).remove(0)])

    @cached_property
    def _base(self) -> BaseModel:
        """Loaded by the first batch: an error in an actor's constructor would not reach the user."""
        from vas.models.base import load_base, set_threads

        set_threads(self._config.resources.cpus_per_actor)
        return load_base(self._config.base, "cuda" if self._config.resources.gpus_per_actor else "cpu")

    @cached_property
    def _engine(self) -> Engine:
        from vas.decoding.engine import Engine
        from vas.decoding.scorer import make_scorer
        from vas.models.value import ValueModel, check_tokenizers

        scorers = []
        if self._value is not None:
            model = ValueModel.load(self._value, self._base.model.device)
            check_tokenizers(model, self._base.name, self._base.tokenizer_digest)
            scorers.append(make_scorer(self._config.value.name, model, self._config.base.linears, free=True))
        return Engine(
            self._base,
            scorers,
            max_sequences=self._config.rollouts.batch_size,
            kv_tokens=self._config.resources.kv_tokens,
            linears=self._config.base.linears,
            free=True,
        )

    def __call__(self, jobs: pa.Table) -> pa.Table:
        """Sample every response of the jobs; rows without rewards, in the jobs' order."""
        started = time.monotonic()
        rows: dict[str, dict[str, Any]] = {}
        requests = []
        for job in jobs.to_pylist():
            for position, identity in enumerate(job["rollout_id"]):
                rows[identity], request = self._prepare(job, position)
                if request is not None:
                    requests.append(request)
        for done in self._engine.generate(requests):
            row = rows[done.request_id]
            prefix = row["response_token_ids"]
            row |= {
                "response_token_ids": prefix + done.token_ids,
                "response_text": self._text(prefix + done.token_ids) if prefix else done.text,
                "logprobs": done.logprobs,
                "finish_reason": done.finish_reason,
                "guided_logprobs": done.guided_logprobs,
                "kl": done.kl,
                "base_positions": done.base_positions,
                "value_positions": sum(done.value_positions.values()),
            }
        seconds = (time.monotonic() - started) / max(len(rows), 1)
        for row in rows.values():
            row["decode_seconds"] = seconds
        return pa.Table.from_pylist(list(rows.values()), schema=self._schema)

    def _text(self, tokens: list[int]) -> str:
        """The text of a whole response: that of its parts, joined, would have other spaces, and torn characters.

        A stop string that begins in the prefix cuts the text; the engine has not seen it, and went on.
        """
        from vas.decoding.detokenizer import Detokenizer

        text = Detokenizer(self._base.tokenizer, tuple(self._config.rollouts.sampling.stop))
        return "".join(text.push(token) for token in (*tokens, None))

    def _prepare(self, job: dict[str, Any], position: int) -> tuple[dict[str, Any], Any]:
        """The row of one response, with its prefix alone, and the request that fills it (None if it can't be made)."""
        from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
        from vas.models.base import encode_prompt

        prompt, prefix = schema.Prompt.from_row(job), job["prefix_token_ids"][position]
        row = {
            "rollout_id": job["rollout_id"][position],
            "prompt_id": prompt.prompt_id,
            "sample_index": job["sample_index"][position],
            "round": job["round"],
            "prompt_token_ids": [],
            "response_token_ids": prefix,
            "response_text": "",
            "logprobs": [],
            "finish_reason": "error",
            "base_model": self._base.name,
            "tokenizer_digest": self._base.tokenizer_digest,
            "held_out": prompt.held_out,
            "error": None,
            "roll_in_length": len(prefix),
            "setting": job["setting"],
            "messages": job["messages"],
            "text": job["text"],
        }
        try:
            tokens = encode_prompt(self._base.tokenizer, prompt)
            row["prompt_token_ids"] = tokens
            sampling = SamplingParams.of(self._config.rollouts.sampling, job["seed"][position])
            request = Request(
                row["rollout_id"],
                (*tokens, *prefix),
                replace(sampling, max_tokens=sampling.max_tokens - len(prefix)),
                GuidanceParams.of(self._config.evaluation, json.loads(job["setting"])),
            )
            self._engine.check(request)
            return row, request
        except Exception as error:  # a chat template may raise anything
            row["error"] = str(error) if isinstance(error, VasError) else f"{type(error).__name__}: {error}"
            return row, None
