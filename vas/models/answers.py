"""What a server answers, in the token ids of the base model's own tokenizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from vas.errors import VasError

UNKNOWN = math.nan  # the log-probability of a token that the server says none for
FEW = 4  # tokens

TORN = "\N{REPLACEMENT CHARACTER}"


class ForeignTokens(Exception):
    """The server's token ids are those of another vocabulary: it serves another model."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice of a server's answer, read."""

    tokens: list[int]
    text: str
    reason: str
    """stop | length"""
    logprobs: list[float]
    """log π0 of each token; NaN where it is not told."""


@dataclass(slots=True)
class _Step:
    """One token as the server tells it; any of these may be missing."""

    token: int | None
    piece: str | None
    logprob: float


class Reader:
    """Reads the choices of `/v1/completions`, in each of the shapes that servers give them.

    Token ids, in this order of preference:
    1. those that the server names (llama.cpp: `logprobs.content[].id`; vLLM: `choices[].token_ids`),
    2. the tokens' texts, each of which is a token of the vocabulary,
    3. the response's text, encoded anew: then they may not be the tokens that were sampled, and their
       log-probabilities are not known.
    1 and 2 are taken only if they spell the response's text. llama.cpp tells only the last token of a character
    that takes several: the others are found by encoding the character, their log-probabilities are not known, and
    a character that `max_tokens` has cut is left out.

    A response that the model ended ends with EOS; where the server leaves it out, it is appended, and its
    log-probability is not known. Who ended a response is not known either where a server says `stop` for stop
    strings too and names neither EOS nor a `stop_reason`: then it counts as ended by a stop string, if the request
    has any. Log-probabilities that are not known are NaN; training does not use them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer, self._eos_token_ids = tokenizer, eos_token_ids
        self._vocab = tokenizer.get_vocab()

    def __call__(self, choice: Any, where: str, stops: bool = False) -> Answer:
        """A choice that was asked for with stop strings, or without.

        Raises VasError for one that is no completion, and ForeignTokens. where: what it answers, for the error.
        """
        try:
            text, reason = choice["text"] or "", choice["finish_reason"]
            steps = _steps(choice)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise no_completion(error, choice, where) from None
        if reason not in ("stop", "length"):
            raise VasError(f"the server ended the response for another reason: {reason}", where)
        tokens, logprobs = self._tokens(steps, text, stops)
        if self._model_ended(choice, tokens, reason, stops):
            tokens, logprobs = self._with_eos(steps, tokens, logprobs)
        if not tokens:
            raise VasError("the server's response is empty, without even an end", where)
        return Answer(tokens, text, reason, logprobs)

    def _tokens(self, steps: list[_Step], text: str, stops: bool) -> tuple[list[int], list[float]]:
        if steps and all(step.token is not None for step in steps):
            for whole in (steps, [each for step in steps for each in self._with_skipped(step)]):
                tokens = [step.token for step in whole if step.token is not None]
                if self._spell(tokens, text, stops):
                    return tokens, [step.logprob for step in whole]
            if not self.are_ours(steps):
                raise ForeignTokens
        spelled = [self._token_of(step.piece) for step in steps]
        if spelled and spelled[-1] is None and not steps[-1].piece:
            del spelled[-1]  # the end, without a text; `_with_eos` puts it back
        known = [token for token in spelled if token is not None]
        if len(known) == len(spelled) and self._spell(known, text, stops):
            while known and self._tokenizer.decode(known[-1:]).endswith(TORN):  # the text of half a character
                del known[-1]
            return known, [step.logprob for step in steps[: len(known)]]
        tokens = self._encode(text.rstrip(TORN))
        return tokens, [UNKNOWN] * len(tokens)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _with_skipped(self, step: _Step) -> list[_Step]:
        """A step, after the tokens of its character that came before it, if its text is a whole character."""
        tokens = self._encode(step.piece) if step.piece and TORN not in step.piece else []
        if len(tokens) < 2 or tokens[-1] != step.token:
            return [step]
        return [*(_Step(token, None, UNKNOWN) for token in tokens[:-1]), step]

    def _spell(self, tokens: list[int], text: str, stops: bool) -> bool:
        """Whether tokens decode to a text, or to one that a stop string has cut."""
        for skip in (True, False):
            found = self._tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            found = found.rstrip(TORN)
            for wanted in (text.rstrip(TORN), text.rstrip(TORN).removeprefix(" ")):
                if found == wanted or (stops and found.startswith(wanted)):
                    return True
        return False

    def are_ours(self, steps: list[_Step]) -> bool:
        """Whether most tokens have the text that our vocabulary gives their ids; a few of them prove nothing."""
        named = [(step.token, step.piece) for step in steps if step.token is not None and step.piece]
        told = [(self._tokenizer.decode([token]), piece) for token, piece in named]
        whole = [(ours, theirs) for ours, theirs in told if TORN not in ours + theirs]
        fit = sum(ours.strip() == theirs.strip() for ours, theirs in whole)
        return len(whole) < FEW or 2 * fit >= len(whole)

    def token(self, step: _Step) -> int | None:
        """Our id of a likely token, if it has one."""
        if step.token is not None:
            return step.token
        return self._token_of(step.piece) if step.piece else self._eos_token_ids[0]  # only the end has no text

    def _token_of(self, piece: str | None) -> int | None:
        """The token with this text, if there is one."""
        if not piece:
            return None
        if piece in self._vocab:
            return self._vocab[piece]
        tokens = self._encode(piece)
        return tokens[0] if len(tokens) == 1 else None

    def _model_ended(self, choice: dict[str, Any], tokens: list[int], reason: str, stops: bool) -> bool:
        if reason != "stop":
            return False
        if not stops or (tokens and tokens[-1] in self._eos_token_ids):
            return True
        return "stop_reason" in choice and not isinstance(choice["stop_reason"], str)  # vLLM says which string

    def _with_eos(self, steps: list[_Step], tokens: list[int], logprobs: list[float]) -> tuple[list[int], list[float]]:
        if tokens and tokens[-1] in self._eos_token_ids:
            return tokens, logprobs
        told = bool(steps) and len(steps) == len(tokens) + 1 and not steps[-1].piece
        return [*tokens, self._eos_token_ids[0]], [*logprobs, steps[-1].logprob if told else UNKNOWN]


def next_tokens(choice: dict[str, Any], reader: Reader) -> list[tuple[int, float]]:
    """The likeliest tokens of a choice's first step with their log π0; those that are not ours are left out.

    Empty if it tells none. Raises ForeignTokens if hardly any is ours.
    """
    told = choice.get("logprobs") or {}
    try:
        if told.get("content"):  # as chat completions have it
            listed = [(each.get("id"), each["token"], each["logprob"]) for each in told["content"][0]["top_logprobs"]]
        else:
            listed = [(None, token, logprob) for token, logprob in told["top_logprobs"][0].items()]
        steps = [_step(*each) for each in listed]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return []
    found = [(reader.token(step), step.logprob) for step in steps]
    known = [(token, logprob) for token, logprob in found if token is not None]
    if len(steps) >= FEW and (2 * len(known) < len(steps) or not reader.are_ours(steps)):
        raise ForeignTokens
    return known


def no_completion(error: Exception, answer: object, where: str) -> VasError:
    """An answer that has another shape than it should."""
    return VasError(
        f"the server's answer is not a completion ({type(error).__name__}: {error})",
        where,
        "is it OpenAI-compatible, with /v1/completions or /v1/chat/completions? It answered " + str(answer)[:200],
    )


def _steps(choice: dict[str, Any]) -> list[_Step]:
    """The tokens of a choice, from either shape of `logprobs`, or from vLLM's `token_ids` alone."""
    told = choice.get("logprobs") or {}
    if told.get("content"):  # as chat completions have it
        steps = [_step(each.get("id"), each.get("token"), each.get("logprob")) for each in told["content"]]
    else:
        pieces = told.get("tokens") or []
        numbers = told.get("token_logprobs") or [None] * len(pieces)
        steps = [_step(None, piece, number) for piece, number in zip(pieces, numbers, strict=True)]
    ids = choice.get("token_ids") or []
    if ids and not steps:
        steps = [_Step(None, None, UNKNOWN) for _ in ids]
    if len(ids) == len(steps):
        for step, token in zip(steps, ids, strict=True):
            step.token = int(token)
    return steps


def _step(token: Any, piece: str | None, logprob: Any) -> _Step:
    """A token that a server names by its id, as `token_id:5` or by its text."""
    if piece and piece.startswith("token_id:"):
        token, piece = int(piece.removeprefix("token_id:")), None
    return _Step(token, piece, UNKNOWN if logprob is None else float(logprob))
