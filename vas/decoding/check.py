"""What only an engine knows of a request: whether it could ever be decoded there."""

from __future__ import annotations

from collections.abc import Sequence

from vas.decoding.base_runner import Room
from vas.decoding.guide import Guide
from vas.decoding.scorer import Scorer
from vas.decoding.sequence import Request
from vas.errors import VasError, nearest
from vas.models.base import BaseModel
from vas.models.served import ServedModel


class Check:
    """Refuses requests that an engine's models or its KV cache cannot take."""

    def __init__(self, base: BaseModel | ServedModel, guide: Guide, room: Room) -> None:
        self._base, self._guide, self._room = base, guide, room
        # models of one family differ in how many embeddings they have beyond those that are tokens
        known = max(*base.tokenizer.get_vocab().values(), *base.eos_token_ids)
        self._tokens = min(base.vocabulary, known + 1)

    def __call__(self, request: Request) -> None:
        """Raise VasError if the request could never be decoded here."""
        self._check_tokens(request)
        known = tuple(self._guide.objectives)
        for name in request.guidance.objectives:
            if name not in known:
                raise VasError(f"no value model knows the objective '{name}'", mend=nearest(name, known))
        scorers = self._guide.scorers_of(request)
        self._check_schedule(request, scorers)
        self._check_length(request, scorers)

    def _check_tokens(self, request: Request) -> None:
        where = request.request_id
        if not request.prompt_token_ids:
            raise VasError("the prompt is empty", where, "give at least one token")
        if len(request.begun) >= request.sampling.max_tokens:
            raise VasError(f"the response has {len(request.begun)} tokens already", where, "raise max_tokens")
        named = (*request.prompt_token_ids, *request.sampling.logit_bias)
        for token in (min(named), max(named)):
            if not 0 <= token < self._tokens:  # would take every running sequence down with it
                raise VasError(f"token id {token} is outside the vocabulary", where)

    def _check_schedule(self, request: Request, scorers: Sequence[Scorer]) -> None:
        if isinstance(self._base, ServedModel) and (request.guidance.active or request.sampling.logprobs):
            size = request.guidance.block_size or 0
            self._base.check(request.guidance.blockwise, whole=size >= request.sampling.max_tokens)
        for scorer in scorers:
            if request.guidance.blockwise and scorer.relative:
                raise VasError(
                    f"the schedule `{request.guidance.schedule}` needs values of whole continuations; "
                    f"{scorer.name} has vocab heads, which only compare next tokens",
                    request.request_id,
                    "take the value model that it was distilled from, or the schedule `token`",
                )

    def _check_length(self, request: Request, scorers: Sequence[Scorer]) -> None:
        longest = len(request.prompt_token_ids) + request.sampling.max_tokens
        rooms = {self._base.name: self._base.context_length} | {s.name: s.context_length for s in scorers}
        for model, room in rooms.items():
            if room is not None and longest > room:
                raise VasError(
                    f"prompt and max_tokens make {longest} tokens; {model} has room for {room}",
                    request.request_id,
                    "shorten the prompt or lower max_tokens",
                )
        rows = request.guidance.rows
        if not self._room.fits(rows, longest):
            raise VasError(
                f"prompt and max_tokens make {longest} tokens, which take {self._room.allocated(rows, longest):,} "
                f"as allocated, more than the KV cache may hold ({self._room.limit:,})",
                request.request_id,
                "shorten the prompt, lower max_tokens or raise kv_tokens",
            )
