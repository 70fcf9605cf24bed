"""Sampling engines: what turns requests into responses, behind one interface; docs/engines.md compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # each kind is imported in the actors, and only where it is asked for
    from vas.config import RunConfig
    from vas.http import Meter
    from vas.rollouts.engines.interface import SamplingEngine


def make_engine(config: RunConfig, value: str | None = None, meter: Meter | None = None) -> SamplingEngine:
    """The engine of `rollouts.engine`, ready to sample; models are loaded here.

    value: location of the value model that guides. Guidance looks at every step's candidates. The engine
    `transformers` shows them, and a server that tells log-probs; where there are local weights, the former guides,
    whatever samples the rollouts. meter: of a server's calls.
    Raises VasError for whatever the user can mend.
    """
    kind = "transformers" if value is not None and not config.base.called else config.rollouts.engine
    if kind == "openai":
        from vas.rollouts.engines.openai import OpenAIEngine

        return OpenAIEngine(config, value, meter)
    if kind == "vllm":
        from vas.rollouts.engines.vllm import VLLMEngine

        return VLLMEngine(config)
    from vas.rollouts.engines.transformers import TransformersEngine

    return TransformersEngine(config, value)
