"""The forward pass of the Llama family, without what decoding doesn't need.

Same numbers as Hugging Face's classes, from the same weights. Projections that read the same input
are one product, and a layer is a dozen operations instead of fifty calls of modules: with a few
tokens in a pass, those calls cost as much as a third of the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    LlamaForCausalLM,
    LlamaModel,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen2Model,
)

from vas.choices import Linears
from vas.decoding import linears, switches

Product = Callable[[Tensor], Tensor]
Residual = Callable[[Tensor, Tensor], Tensor]
"""h and x to h + product(x); h may be overwritten."""
FAMILY = (LlamaModel, MistralModel, Qwen2Model, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)


class Where(Protocol):
    """Where a pass's tokens lie, and how they attend to what they see: `attention.Pass`, `uniform.UniformPass`."""

    column_N: Tensor

    def attend(
        self, layer: int, query: Tensor, states: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        """One layer's attention: query [N, H, D], keys and values in one [N, 2, H_kv, D], to [N, H, D]."""
        ...


def supports(model: PreTrainedModel) -> bool:
    """Whether `FusedLlama` computes what this model does."""
    return type(model) in FAMILY and model.config.hidden_act == "silu" and not switches.off("fused_llama")


def stretches(model: PreTrainedModel) -> bool:
    """Whether its positions' frequencies depend on how long the longest text of a pass is."""
    scaling = getattr(model.config, "rope_parameters", None) or {}
    return scaling.get("rope_type") in ("dynamic", "longrope")


@dataclass(slots=True)
class _Layer:
    """One decoder layer's weights."""

    input_norm: _RMSNorm
    qkv: Product
    out: Residual
    mlp_norm: _RMSNorm
    gate_up: Product
    down: Residual
    scale: float
    window: int | None


@dataclass(slots=True)
class Underway:
    """Tokens between two layers: their residual stream, and by what their queries and keys are turned."""

    h_NH: Tensor
    turn_N1D: Tensor


class FusedLlama:
    """A Llama, Mistral or Qwen2 model, with or without its output layer.

    free: let go of the model's own weights on the way; it can then be used through this object alone.
    """

    def __init__(self, model: PreTrainedModel, kind: Linears, free: bool) -> None:
        backbone: Any = model.base_model
        config = model.config
        self._embed, self._rotary = backbone.embed_tokens, backbone.rotary_emb
        self._norm = _RMSNorm(backbone.norm.weight, config.rms_norm_eps)
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._dim: int = backbone.layers[0].self_attn.head_dim
        self._layers = [self._layer(layer, kind, free) for layer in backbone.layers[: config.num_hidden_layers]]
        self.depth = len(self._layers)
        self._head = _join([cast(Any, model).lm_head], kind, free) if model is not backbone else None

    def _layer(self, layer: Any, kind: Linears, free: bool) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        return _Layer(
            _RMSNorm(layer.input_layernorm.weight, attention.config.rms_norm_eps),
            _join([attention.q_proj, attention.k_proj, attention.v_proj], kind, free, self._in_pairs()),
            _residual(attention.o_proj, kind, free),
            _RMSNorm(layer.post_attention_layernorm.weight, attention.config.rms_norm_eps),
            _join([mlp.gate_proj, mlp.up_proj], kind, free),
            _residual(mlp.down_proj, kind, free),
            attention.scaling,
            # a layer's own word counts, also when it says that it has none
            getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None)),
        )

    def _in_pairs(self) -> Tensor:
        """An order of queries, keys and values in which numbers of a query or a key that turn together are neighbours.

        Scores stay as they are: queries and keys are reordered alike.
        """
        turning = self._heads + self._shared
        places = torch.arange((turning + self._shared) * self._dim).view(-1, 2, self._dim // 2)
        return torch.cat([places[:turning].transpose(1, 2).flatten(), places[turning:].flatten()])

    def __call__(self, ids_N: Tensor, where: Where, logits: bool, wanted: Tensor | None = None) -> Tensor:
        """Logits [N, V], or hidden states after the last norm [N, H]; of some tokens alone, if only they are wanted."""
        tokens = self.start(ids_N, where.column_N)
        for number in range(self.depth):
            self.run(number, tokens, where)
        return self.end(tokens, logits, wanted)

    def start(self, ids_N: Tensor, column_N: Tensor) -> Underway:
        """These tokens, at their places, before the first layer."""
        h_NH = self._embed(ids_N)
        return Underway(h_NH, self._turns(h_NH, column_N))

    def run(self, number: int, tokens: Underway, where: Where) -> None:
        """Take tokens through a layer."""
        layer, h, queries = self._layers[number], tokens.h_NH, self._heads
        states = layer.qkv(layer.input_norm(h)).view(len(h), -1, self._dim)
        _turn(states[:, : queries + self._shared].view(len(h), -1, self._dim // 2, 2), tokens.turn_N1D)
        pairs = states[:, queries:].view(len(h), 2, self._shared, self._dim)
        found = where.attend(number, states[:, :queries], pairs, layer.scale, layer.window, None)
        h = layer.out(h, found.flatten(1))
        gate, up = layer.gate_up(layer.mlp_norm(h)).chunk(2, dim=-1)
        tokens.h_NH = layer.down(h, F.silu(gate).mul_(up))

    def end(self, tokens: Underway, logits: bool, wanted: Tensor | None = None) -> Tensor:
        """What comes of tokens that have been through all layers; as a call."""
        h = self._norm(tokens.h_NH if wanted is None else tokens.h_NH[wanted])
        if not logits:
            return h
        assert self._head is not None, "a backbone has no logits"
        return self._head(h)

    def _turns(self, h: Tensor, column_N: Tensor) -> Tensor:
        """By what rotary position embeddings turn each pair of numbers at these places: [N, 1, D / 2], complex."""
        exact = torch.promote_types(h.dtype, torch.float32)  # there are no smaller complex numbers
        cos, sin = (each[0, :, None, : self._dim // 2].to(exact) for each in self._rotary(h, column_N[None]))
        return torch.complex(cos, sin)


def _turn(pairs: Tensor, turn: Tensor) -> None:
    """Turn pairs of numbers [..., 2] by complex ones [...], in place."""
    if pairs.dtype in (torch.float32, torch.float64):
        torch.view_as_complex(pairs).mul_(turn)
    else:
        pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turn))


class _RMSNorm:
    """x / sqrt(mean(x²) + ε) · weight: torch's own on a GPU and in reduced precision, on a CPU a shorter way."""

    def __init__(self, weight_H: Tensor, eps: float) -> None:
        self._weight_H, self._eps, size = weight_H, eps, len(weight_H)
        self._own = weight_H.is_cuda or weight_H.dtype not in (torch.float32, torch.float64)
        self._scaled_H = weight_H * size**0.5
        self._least = weight_H.new_tensor((size * eps) ** 0.5)

    def __call__(self, x_NH: Tensor) -> Tensor:
        """[N, H] to [N, H]."""
        if self._own:
            return F.rms_norm(x_NH, x_NH.shape[-1:], self._weight_H, self._eps)
        length_N1 = torch.hypot(torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True), self._least)
        return torch.div(x_NH, length_N1).mul_(self._scaled_H)


def _join(parts: list[nn.Linear], kind: Linears, free: bool, order: Tensor | None = None) -> Product:
    """Linear layers of one input as one layer; order: of its outputs."""
    weight = torch.cat([part.weight for part in parts]) if len(parts) > 1 else parts[0].weight
    bias = torch.cat([part.bias for part in parts]) if parts[0].bias is not None else None
    if order is not None:
        weight, bias = weight[order], None if bias is None else bias[order]
    joined = linears.make(weight, bias, kind).forward  # calling the module would cost more than a small operation
    if free:
        for part in parts:
            part.weight = nn.Parameter(part.weight.new_empty(0), requires_grad=False)
    return joined


def _residual(part: nn.Linear, kind: Linears, free: bool) -> Residual:
    """A linear layer whose output is added to a residual stream; on a GPU by the product's own kernel."""
    if part.weight.is_cuda and part.bias is None:
        transposed = part.weight.detach().t()
        return lambda h_NH, x_NI: torch.addmm(h_NH, x_NI, transposed)
    product = _join([part], kind, free)
    return lambda h_NH, x_NI: h_NH.add_(product(x_NI))
