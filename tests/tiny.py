"""Tiny random models with a tokenizer of their own: real architectures, milliseconds a pass."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from vas.models.base import BaseModel, tokenizer_digest
from vas.models.value import ValueModel, ValueModelConfig

CONTEXT = 1024

_TEXT = """the quick brown fox jumps over the lazy dog and then the fox rests while the dog
thinks of the other things that there are to think of, such as the weather in the north"""

_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_SHAPE = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "initializer_range": 0.35,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
}
_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SHAPE},
    "qwen2": {"model_type": "qwen2", **_SHAPE},
    "mistral": {"model_type": "mistral", **_SHAPE, "sliding_window": 6},
    "gemma2": {"model_type": "gemma2", **_SHAPE, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3": {
        "model_type": "gemma3_text",
        **_SHAPE,
        "sliding_window": 5,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_head": 4,
        "n_positions": CONTEXT,
        "initializer_range": 0.35,
        "tie_word_embeddings": False,
    },
}
ARCHITECTURES = tuple(_ARCHITECTURES)


@lru_cache
def tiny_tokenizer(marker: str = "<|end|>") -> PreTrainedTokenizerFast:
    """A byte-level BPE of 290 tokens with a chat template; `marker` is its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=[marker, "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=marker,
        pad_token=marker,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        chat_template=_CHAT_TEMPLATE.replace("<|end|>", marker),
    )


def _config(arch: str, layers: int) -> Any:
    tokenizer = tiny_tokenizer()
    knobs = dict(_ARCHITECTURES[arch])
    if "layer_types" in knobs:
        knobs["layer_types"] = knobs["layer_types"][:layers]
    return AutoConfig.for_model(
        **knobs,
        num_hidden_layers=layers,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


@lru_cache
def tiny_base(arch: str = "llama", dtype: torch.dtype = torch.float32, layers: int = 3) -> BaseModel:
    """A random causal LM whose next token is neither a coin toss nor a certainty (about 3 nats)."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(_config(arch, layers), dtype=torch.float32)
    model.requires_grad_(False).eval()
    model.lm_head.weight *= 1.5
    tokenizer = tiny_tokenizer()
    return BaseModel(f"tiny-{arch}", model.to(dtype), tokenizer, (tokenizer.eos_token_id,), tokenizer_digest(tokenizer))


@lru_cache
def tiny_value(
    arch: str = "llama",
    objectives: tuple[str, ...] = ("positive",),
    head: str = "categorical",
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    seed: int = 7,
    vocab: int | None = None,
) -> ValueModel:
    """A value model with random heads, so that candidates' values differ by about one standard deviation.

    vocab: how many token ids it knows, if not those of the tiny tokenizer.
    """
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    model = ValueModel(
        ValueModelConfig(
            backbone=_config(arch, layers).to_dict() | ({"vocab_size": vocab} if vocab else {}),
            objectives=[tiny_objective(name) for name in objectives],
            head={"kind": head, "bins": 11, "label": "hl_gauss"},
            tokenizer_digest=tokenizer_digest(tokenizer),
            base_model=f"tiny-{arch}",
        )
    )
    for each in model.heads:
        for parameter in each.parameters():
            torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False).eval().to(dtype)


def tiny_objective(name: str) -> dict[str, Any]:
    """What a checkpoint says of an objective."""
    return {"name": name, "mean": 0.5, "std": 2.0, "low": -3.0, "high": 3.0, "reward_version": "1"}


def save_tiny_base(folder: str | Path, arch: str = "llama", layers: int = 3) -> str:
    """Write a base model that `load_base` takes by its path: weights, tokenizer, chat template."""
    base = tiny_base(arch, layers=layers)
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return str(folder)
