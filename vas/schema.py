"""The rows that stages hand each other, and the identities that make them resumable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vas.digests import digest

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat or a plain string, with an id that stays the same wherever it is read."""

    prompt_id: str
    messages: tuple[Message, ...] = ()
    """A chat; empty for a plain string."""
    text: str = ""
    """A plain string, to be continued as it is; empty for a chat."""
    held_out: bool = False

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Prompt:
        """The prompt in a row that has PROMPT_SCHEMA's columns."""
        return cls(row["prompt_id"], tuple(row["messages"] or ()), row["text"] or "", row["held_out"])

    def last_user_text(self) -> str:
        """What was asked: the last user message, or the plain string."""
        for message in reversed(self.messages):
            if message["role"] == "user":
                return message["content"]
        return self.text


PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("text", pa.string()),
        ("held_out", pa.bool_()),
    ]
)


def rollout_schema(objectives: list[str], guided: bool = False) -> pa.Schema:
    """Arrow schema of a row of rollouts/round=R/*.parquet; `rewards` has a field per objective.

    guided: add what guidance did, for responses of the guided policy.
    """
    guidance = [
        ("setting", pa.string()),  # JSON: objective → strength
        ("guided_logprobs", pa.list_(pa.float32())),
        ("kl", pa.float64()),  # Σ over the response's steps, nats
        ("base_positions", pa.int32()),  # token positions run through the base model
        ("value_positions", pa.int32()),
    ]
    return pa.schema(
        [
            ("rollout_id", pa.string()),
            ("prompt_id", pa.string()),
            ("sample_index", pa.int32()),
            ("round", pa.int32()),
            ("prompt_token_ids", pa.list_(pa.int32())),
            (
                "response_token_ids",
                pa.list_(pa.int32()),
            ),  # ends with EOS when the model ended the response itself
            ("response_text", pa.string()),
            ("logprobs", pa.list_(pa.float32())),  # log π0 of each response token, as it was sampled
            ("finish_reason", pa.string()),  # stop | length | error
            ("base_model", pa.string()),
            ("tokenizer_digest", pa.string()),
            ("held_out", pa.bool_()),
            ("error", pa.string()),
            ("rewards", pa.struct([(name, pa.float64()) for name in objectives])),
            ("roll_in_length", pa.int32()),
            ("decode_seconds", pa.float64()),  # the row's share of its batch's time on one actor
            *(guidance if guided else []),
        ]
    )


def rollout_id(run_seed: int, round: int, prompt_id: str, sample_index: int) -> str:
    """The rollout's identity: the same whoever samples it, and however often it is retried."""
    return digest("rollout", run_seed, round, prompt_id, sample_index)


def rollout_seed(identity: str) -> int:
    """The seed of a rollout's random numbers, a function of its identity alone."""
    return int(identity, 16) % (1 << 63)
