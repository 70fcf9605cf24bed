"""Sampling engines: what turns requests into responses, behind one interface; docs/engines.md compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # each kind is imported in the actors, and only where it is asked for
    from vas.config import RunConfig
    from vas.rollouts.engines.interface import SamplingEngine


def make_engine(config: RunConfig, value: str | None = None) -> SamplingEngine:
    """The engine of `rollouts.engine`, ready to sample; models are loaded here.

    value: location of the value model that guides. Guidance looks at every step's candidates, which only the
    engine `transformers` shows; so that one guides, whatever samples the rollouts.
    Raises VasError for whatever the user can mend.
    """
    kind = "transformers" if value is not None else config.rollouts.engine
    if kind == "openai":
        from vas.rollouts.engines.openai import OpenAIEngine

        return OpenAIEngine(config)
    if kind == "vllm":
        from vas.rollouts.engines.vllm import VLLMEngine

        return VLLMEngine(config)
    from vas.rollouts.engines.transformers import TransformersEngine

    return TransformersEngine(config, value)
