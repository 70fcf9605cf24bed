"""What the decoding benchmarks share: models, prompts, requests, and how a case is timed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vas import guidance
from vas.choices import Linears
from vas.decoding.engine import Engine
from vas.decoding.guide import Guide
from vas.decoding.scorer import make_scorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.decoding.sequence import Sequence as Decoded
from vas.models.base import BaseModel, encode_prompt, load_base, load_tokenizer, tokenizer_digest
from vas.models.value import ValueModel, ValueModelConfig

PROMPTS = Path(__file__).parent.parent / "vas" / "data" / "demo_prompts.jsonl"
MODEL = "bundled:smollm2-135m-instruct"
CANDIDATES, STRENGTH = 20, 2.0
SEED = 0  # of random weights: each run decodes the same tokens
OBJECTIVE = {"name": "any", "mean": 0.0, "std": 1.0, "low": -3.0, "high": 3.0, "reward_version": "random"}
SHAPES = {
    "llama-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
}


@dataclass
class Setting:
    """One machine's models and prompts; every case of a benchmark uses the same.

    The base never ends a response, so that every case makes the same number of tokens.
    """

    base: BaseModel
    value: ValueModel
    """The base's first layers with a random head: speed does not depend on what it has learned."""
    prompts: list[tuple[int, ...]]

    @classmethod
    def load(cls, model: str, layers: int, device: str | None, dtype: str) -> Setting:
        """Load the base and make the value model of its first layers."""
        torch.manual_seed(SEED)
        spec: Any = SimpleNamespace(
            model=model, tokenizer_id=model, dtype=dtype, revision=None
        )  # as vas.config.Base, without pydantic
        base = load_base(spec, device)
        about = {"backbone": None, "layers": layers, "extends": None, "lora": None}
        shape: Any = SimpleNamespace(**about, head="scalar", bins=0, label="")
        return cls._of(base, ValueModel.build(shape, spec, base.tokenizer, [OBJECTIVE]))

    @classmethod
    def random(cls, shape: str, layers: int, device: str, dtype: str) -> Setting:
        """Random weights in one of `SHAPES`, made where they are used: only the times of such models mean anything."""
        torch.manual_seed(SEED)
        config, kind = LlamaConfig(**SHAPES[shape]), torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        tokenizer = load_tokenizer(MODEL)
        torch.set_default_dtype(kind)
        with torch.device(device):
            model = LlamaForCausalLM(config).requires_grad_(False).eval()
            backbone = config.to_dict() | {"num_hidden_layers": layers}
            value = ValueModel(ValueModelConfig(backbone=backbone, objectives=[OBJECTIVE], head={"kind": "scalar"}))
        torch.set_default_dtype(torch.float32)
        return cls._of(BaseModel(shape, model, tokenizer, (), tokenizer_digest(tokenizer)), value)

    @classmethod
    def _of(cls, base: BaseModel, value: ValueModel) -> Setting:
        base.eos_token_ids = ()
        base.model.generation_config.eos_token_id = None
        torch.nn.init.normal_(value.heads[0].linear.weight, std=0.02)
        value = value.requires_grad_(False).eval().to(base.model.device, base.model.dtype)
        asked = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
        chats: list[Any] = [SimpleNamespace(messages=[{"role": "user", "content": each}]) for each in asked]
        return cls(base, value, [tuple(encode_prompt(base.tokenizer, chat)) for chat in chats])

    def with_vocab_heads(self) -> ValueModel:
        """The value model with a random vocab head."""
        model = ValueModel(ValueModelConfig(**(self.value.config.to_dict() | {"head": {"kind": "vocab"}})))
        model.backbone.load_state_dict(self.value.backbone.state_dict())
        torch.nn.init.normal_(model.heads[0].linear.weight, std=0.02)
        return model.requires_grad_(False).eval().to(self.base.model.device, self.base.model.dtype)

    def requests(self, batch: int, new_tokens: int) -> list[Request]:
        """So many requests without guidance."""
        return [Request(str(i), self.prompts[i], SamplingParams(max_tokens=new_tokens, seed=i)) for i in range(batch)]

    def engine(self, value: ValueModel | None, batch: int, linears: Linears = "exact", **options: int) -> Engine:
        """An engine for so many sequences at once, guided if there is a value model."""
        scorers = [] if value is None else [make_scorer("value", value, linears)]
        return Engine(self.base, scorers, batch, linears=linears, **options)


class Watching(Guide):
    """Guides every step, and notes π0's entropy at each."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.entropies: list[float] = []

    def wanted(self, sequences: Sequence[Decoded], base_BV: Tensor) -> list[int]:
        """All rows."""
        self.entropies += guidance.entropy(base_BV).tolist()
        return super().wanted(sequences, base_BV)


def guide_by(engine: Engine, kind: type[Guide]) -> Engine:
    """Let an engine choose its guided steps in another way."""
    engine._stepper.guide = kind(engine._scorers, engine._base.eos_token_ids, engine._base.model.device, engine.clock)
    return engine


def median_entropy(engine: Engine, requests: list[Request]) -> float:
    """The entropy of π0 that half the steps exceed, when these requests are guided at every step."""
    guide_by(engine, Watching).generate(requests)
    assert isinstance(engine._stepper.guide, Watching)
    return round(float(np.median(engine._stepper.guide.entropies)), 3)


def guided(requests: list[Request], **how: float | int | str) -> list[Request]:
    """The same requests with guidance."""
    params = GuidanceParams(**({"objectives": {"any": STRENGTH}, "candidates": CANDIDATES} | how))
    return [replace(request, guidance=params) for request in requests]


def run(engine: Engine, requests: list[Request]) -> int:
    """Decode; returns how many tokens were made."""
    return sum(len(done.token_ids) for done in engine.generate(requests))


def generate(base: BaseModel, requests: list[Request]) -> int:
    """Hugging Face `generate` on one batch, padded on the left, with sampling; as `run`.

    It runs as long as the longest request; only tokens that were asked for count.
    """
    longest = max(len(r.prompt_token_ids) for r in requests)
    new_tokens = max(r.sampling.max_tokens for r in requests)
    pad = base.tokenizer.eos_token_id
    padded = [[pad] * (longest - len(r.prompt_token_ids)) + list(r.prompt_token_ids) for r in requests]
    ids = torch.tensor(padded, device=base.model.device)
    mask = torch.tensor(
        [[token_place >= longest - len(r.prompt_token_ids) for token_place in range(longest)] for r in requests],
        device=base.model.device,
    ).long()
    with torch.inference_mode():
        out = base.model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
        )
    assert out.shape[1] == longest + new_tokens
    return sum(r.sampling.max_tokens for r in requests)


def rates(cases: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens per second of each case: the median over rounds, in each of which every case runs once."""
    seen: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            started = time.perf_counter()
            tokens = case()
            seen[name].append(tokens / (time.perf_counter() - started))
    return {name: statistics.median(each) for name, each in seen.items()}
