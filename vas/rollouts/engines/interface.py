"""What every sampling engine offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from vas.errors import VasError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vas.decoding.sequence import Completion, Request


class SamplingEngine(Protocol):
    """Samples responses of one base model."""

    name: str
    """The base model, as the config names it."""
    tokenizer: PreTrainedTokenizerBase
    tokenizer_digest: str

    @property
    def cost(self) -> Mapping[str, int]:
        """What a server has counted so far: `prompt_tokens`, `completion_tokens`, `calls`, `retries`.

        Empty for engines that compute here.
        """
        ...

    @property
    def peak_share(self) -> float:
        """Share of the device's measured product rate that sampling makes use of; 0 where nothing measures it."""
        ...

    def check(self, request: Request) -> None:
        """Raise VasError if the request could never be sampled here."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        """A completion for every request, in their order; a VasError in its place marks one that failed alone.

        Several threads may call it at once. Raises VasError for a mistake that no other request would escape, e.g.
        a wrong key, and EngineDied.
        """
        ...


def generate_checked(
    check: Callable[[Request], None],
    generate: Callable[[Sequence[Request]], Sequence[Completion | VasError]],
    requests: Sequence[Request],
) -> list[Completion | VasError]:
    """`generate` for the requests that pass `check`; the others' VasErrors are in their places."""
    results: list[Completion | VasError | None] = []
    good = []
    for request in requests:
        try:
            check(request)
        except VasError as error:
            results.append(error)
        else:
            good.append(request)
            results.append(None)
    done = iter(generate(good))
    return [next(done) if result is None else result for result in results]
