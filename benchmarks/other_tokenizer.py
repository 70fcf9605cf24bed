"""The bundled model with another tokenizer: fewer merges, so other tokens, with other ids. Its weights are the same."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.llama import MODEL
from vas.models.base import load_tokenizer
from vas.models.bundled import resolve

MERGES = 12_000  # of 48,900: every third word or so falls apart into more tokens


def save_with_another_tokenizer(folder: Path, merges: int = MERGES) -> str:
    """Write it to a folder; returns where."""
    before = load_tokenizer(MODEL)
    content = json.loads(before.backend_tokenizer.to_str())
    old, special = content["model"]["vocab"], {each["content"] for each in content["added_tokens"]}
    kept = content["model"]["merges"][:merges]
    pieces = {piece for merge in kept for piece in (*merge, "".join(merge))} | {p for p in old if len(p) == 1} | special
    order = sorted(pieces & set(old), key=lambda piece: piece[::-1])  # any order but the old one
    content["model"] |= {"vocab": {piece: i for i, piece in enumerate(order)}, "merges": kept}
    for each in content["added_tokens"]:
        each["id"] = order.index(each["content"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    tokenizer.add_special_tokens({"eos_token": before.eos_token})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(resolve(MODEL), dtype=torch.float32)
    rows = torch.tensor([old[piece] for piece in order])
    weight = model.get_input_embeddings().weight.detach()[rows].clone()
    model.resize_token_embeddings(len(order))
    model.get_input_embeddings().weight.data.copy_(weight)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    return str(folder)
