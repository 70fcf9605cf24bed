"""A base model behind an OpenAI-compatible server: only its tokenizer is here, its log-probs come over HTTP.

A call tells the likeliest next tokens of a text. What the others have together is known, too, and one of them can be
drawn by a second call in which the first are forbidden, so nothing of π0 is cut off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from vas.errors import VasError
from vas.http import Client, Rejected

MOST = (200, 100, 50, 20, 10, 5)  # log-probs to ask for, until the server gives as many
FORBIDDEN = -100.0  # OpenAI's bias of a token that must not come


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a server says of a text's next token: the likeliest, with their log π0."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def rest(self) -> float:
        """log of what all other tokens have together; -inf if nothing is left."""
        left = 1.0 - math.fsum(math.exp(each) for each in self.logprobs)
        return math.log(left) if left > 1e-6 else -math.inf  # below that it is rounding


class ServedModel:
    """Next tokens of texts in the base model's own token ids, by `/v1/completions`.

    vocabulary: how many token ids there are. Calls of one batch go out together, `concurrency` at once.
    Raises VasError for a server that cannot be reached, has no log-probs, or has other tokens.
    """

    context_length = None  # only the server knows
    device = torch.device("cpu")

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: tuple[int, ...],
        tokenizer_digest: str,
        client: Client,
        served: str,
        concurrency: int,
    ) -> None:
        self.name, self.tokenizer, self.eos_token_ids = name, tokenizer, eos_token_ids
        self.tokenizer_digest = tokenizer_digest
        self.vocabulary = max(len(tokenizer), max(eos_token_ids) + 1)
        self._client, self._served = client, served
        self._pool = ThreadPoolExecutor(concurrency, "served model")
        self._vocab = tokenizer.get_vocab()
        self.top = self._find_top()
        """How many of the likeliest tokens a call tells."""

    def ahead(self, texts: Sequence[Sequence[int]]) -> list[Ahead]:
        """The next tokens of some texts, given as token ids. Raises VasError for an answer without log-probs."""
        return list(self._pool.map(lambda text: self._ask(text, self.top), texts))

    def draw(self, text: Sequence[int], ahead: Ahead, seed: int) -> tuple[int, float]:
        """One of the tokens that `ahead` does not tell, as π0 has them at temperature 1, and its log π0."""
        bias = {str(token): FORBIDDEN for token in ahead.tokens}
        choice = self._post(text, seed=seed, logit_bias=bias, temperature=1.0, logprobs=1)
        ((token, logprob),) = self._told(choice, drawn=True)
        return token, logprob

    def _find_top(self) -> int:
        text = self.tokenizer("a").input_ids
        problem: VasError | None = None
        for most in MOST:
            try:
                return min(most, len(self._ask(text, most).tokens))
            except Rejected as rejected:
                if rejected.whole:
                    raise rejected.error from None
                problem = rejected.error
        assert problem is not None
        raise problem

    def _ask(self, text: Sequence[int], top: int) -> Ahead:
        told = self._told(self._post(text, temperature=1.0, logprobs=top), drawn=False)
        best: dict[int, float] = {}
        for token, logprob in told:
            best[token] = max(logprob, best.get(token, -math.inf))
        ordered = sorted(best.items(), key=lambda item: -item[1])
        return Ahead(tuple(token for token, _ in ordered), tuple(logprob for _, logprob in ordered))

    def _post(self, text: Sequence[int], **more: Any) -> dict[str, Any]:
        body = {"model": self._served, "prompt": list(text), "max_tokens": 1, "n": 1, "top_p": 1.0}
        body |= {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_tokens_as_token_ids": True}
        answer = self._client.post("completions", body | more)
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise VasError(
                f"the server's answer is not a completion ({type(error).__name__})",
                self._client.url,
                "is it OpenAI-compatible, with /v1/completions? It answered " + str(answer)[:200],
            ) from None

    def _told(self, choice: dict[str, Any], drawn: bool) -> list[tuple[int, float]]:
        """Tokens of a choice's only step with their log-probs: the one that was drawn, or the likeliest."""
        told = choice.get("logprobs") or {}
        try:
            if told.get("content"):  # as chat completions have it
                step = told["content"][0]
                listed = [step] if drawn else step["top_logprobs"]
                named = [(each.get("id"), each["token"], each["logprob"]) for each in listed]
            elif drawn:
                named = [(None, told["tokens"][0], told["token_logprobs"][0])]
            else:
                named = [(None, token, logprob) for token, logprob in told["top_logprobs"][0].items()]
        except (KeyError, IndexError, TypeError, AttributeError):
            raise VasError(
                "the server tells no log-probs of next tokens",
                self._client.url,
                "take one that does (vLLM, llama.cpp), or guide in blocks",
            ) from None
        ids = [(self._id(token, piece), logprob) for token, piece, logprob in named]
        return [(token, float(logprob)) for token, logprob in ids if token is not None]

    def _id(self, token: int | None, piece: str) -> int | None:
        """Our id of a token that the server names by its id, as `token_id:5`, or by its text."""
        if token is not None:
            return int(token)
        if piece.startswith("token_id:"):
            return int(piece.removeprefix("token_id:"))
        if piece in self._vocab:
            return self._vocab[piece]
        found = self.tokenizer(piece, add_special_tokens=False).input_ids
        return found[0] if len(found) == 1 else None
