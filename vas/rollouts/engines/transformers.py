"""The engine `transformers`: this package's own decoding, guided or not, on a CPU or a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vas.config import RunConfig
from vas.decoding.engine import Engine
from vas.decoding.loading import load_scorer
from vas.decoding.loop import Loop
from vas.decoding.sequence import Completion, Request
from vas.errors import VasError
from vas.models.base import BaseModel, load_base, set_threads
from vas.models.rates import product_rate
from vas.rollouts.engines.interface import generate_checked


class TransformersEngine:
    """A base model and, when guided, a value model, behind the decoding engine.

    Requests with one prompt share its prefill, and tokens depend on the request alone, not on its batch. Several
    threads may generate at once: their requests share the steps. `value` locates a value model.
    Raises VasError for a model that cannot be loaded.
    """

    cost: Mapping[str, int] = {}

    def __init__(self, config: RunConfig, value: str | None = None) -> None:
        base = load_base(config.base, "cuda" if config.resources.gpus_per_actor else "cpu")
        self.name, self.tokenizer, self.tokenizer_digest = base.name, base.tokenizer, base.tokenizer_digest
        self._flops = 2 * _weights(base)

        def make() -> Engine:
            set_threads(config.resources.cpus_per_actor)
            self._rate = product_rate(base.model.device, base.model.dtype)
            return _engine(config, base, value)

        self._loop = Loop(make)

    @property
    def peak_share(self) -> float:
        """Share of the device's product rate that the base model's products made, while there was work."""
        loop = self._loop
        return loop.positions * self._flops / (loop.busy_seconds * self._rate) if loop.busy_seconds else 0.0

    def check(self, request: Request) -> None:
        """Raise VasError if the request could never be decoded here."""
        self._loop.engine.check(request)

    def generate(self, requests: Sequence[Request]) -> list[Completion | VasError]:
        """Decode requests to the end; in their order. A response that fails is a VasError, and fails alone."""
        return generate_checked(self.check, self._loop.generate, requests)


def _engine(config: RunConfig, base: BaseModel, value: str | None) -> Engine:
    return Engine(
        base,
        [] if value is None else [load_scorer(config.value.name, value, base, config.base.linears)],
        max_sequences=config.rollouts.batch_size,
        kv_tokens=config.resources.kv_tokens,
        linears=config.base.linears,
        free=True,
    )


def _weights(base: BaseModel) -> int:
    """Weights that a token position is multiplied with: all but embeddings that are only looked up."""
    looked_up = base.model.get_input_embeddings().weight
    head = base.model.get_output_embeddings()
    tied = head is not None and head.weight is looked_up
    return sum(p.numel() for p in base.model.parameters()) - (0 if tied else looked_up.numel())
