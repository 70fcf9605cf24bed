"""Runs tokens of many sequences through a model, packed without padding, over its KV cache."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vas.choices import Linears
from vas.decoding import attention, lanes, linears, llama, switches, uniform
from vas.decoding.attention import Grids, Pass, alike, joined
from vas.decoding.cache import KVCache
from vas.decoding.flight import Flight
from vas.decoding.graphs import upload
from vas.decoding.llama import FusedLlama
from vas.decoding.uniform import Uniform
from vas.errors import VasError

_LOCKS: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()  # one for each model


class HuggingFace:
    """A Hugging Face model as it is, but for its attention, which is `attention.attend` during a pass.

    Raises VasError for a model whose attention cannot be replaced. kind, free: see `ModelRunner`.
    """

    def __init__(self, model: PreTrainedModel, kind: Linears, free: bool) -> None:
        self._model, self._backbone = model, model.base_model
        if not self._backbone._supports_attention_backend:
            raise VasError(
                f"{type(model).__name__} has an attention of its own, in which candidates cannot share a prefix",
                model.config.name_or_path or None,
                "take a model of another architecture, such as Llama, Qwen, Gemma, Mistral or GPT-2",
            )
        types = set(getattr(self._backbone.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if types:
            raise VasError(
                f"{type(model).__name__} has layers of a type unknown to the engine: {', '.join(sorted(types))}",
                model.config.name_or_path or None,
                "take a model whose layers all have full or sliding attention",
            )
        if free:
            linears.pack(model, kind)
        elif kind != "exact":
            raise VasError(
                f"{kind} linear layers would replace those of a {type(model).__name__}", mend="give free=True"
            )
        self._lock = _LOCKS.setdefault(self._backbone, threading.Lock())
        # any mask of four dimensions keeps the model from making one; `attend` has its own
        self._no_mask = torch.zeros(1, 1, 1, 1, device=model.device)

    def __call__(self, ids_N: Tensor, where: Pass | Grids, logits: bool, wanted: Tensor | None = None) -> Tensor:
        """Logits [N, V] or last hidden states [N, H]; of some tokens alone, if only they are wanted."""
        with self._attention_replaced():
            output = (self._model if logits else self._backbone)(
                input_ids=ids_N[None],
                position_ids=where.column_N[None],
                attention_mask=self._no_mask,
                use_cache=False,
                vas_pass=where,
            )
        found = (output.logits if logits else output.last_hidden_state).squeeze(0)
        return found if wanted is None else found[wanted]

    @contextmanager
    def _attention_replaced(self) -> Iterator[None]:
        """Between passes the model is as it was, for others to use; engines that share it take turns."""
        config = self._backbone.config
        with self._lock:
            before = config._attn_implementation
            config._attn_implementation = attention.NAME
            try:
                yield
            finally:
                config._attn_implementation = before


class ModelRunner:
    """A transformer with the KV cache of its sequences.

    model: a Hugging Face causal LM or backbone. kind: how linear layers compute, see `linears.py`. free:
    don't keep the model's own weights beside the layers made of them; it can then be used through this
    runner alone. limit: tokens that the KV cache may hold. Raises VasError for a model that cannot be run.
    """

    def __init__(
        self, model: PreTrainedModel, kind: Linears = "exact", free: bool = False, limit: int | None = None
    ) -> None:
        self.device = model.device
        kind = linears.settle(model, kind)
        fused = FusedLlama(model, kind, free) if llama.supports(model) else None
        self._forward = fused or HuggingFace(model, kind, free)
        aside = uniform.ASIDE if fused and uniform.pays(model) else 0
        self.ragged = bool(fused) and not aside and model.device.type == "cpu" and not llama.stretches(model)
        """Whether a pass may as well have any numbers of tokens of its sequences, and be taken apart."""
        self._depth = fused.depth if fused and self.ragged and not switches.off("lanes") else None
        """Layers of a model that several threads may run at once."""
        self.cache = KVCache(model.device, limit, aside)
        self.uniform = Uniform(fused, self.cache) if fused and aside else None
        """For steps whose shapes recur, where it pays to run them so."""
        self._resting = fused if self.ragged and not switches.off("between_layers") else None
        """A model whose passes may rest between two layers."""

    def spare(self) -> None:
        """Let go of what only makes passes faster."""
        if self.uniform:
            self.uniform.forget()

    @contextmanager
    def sequences(self, count: int) -> Iterator[range]:
        """So many fresh sequences for the time of the block, named by their numbers."""
        for owner in range(count):
            self.cache.add(owner)
        try:
            yield range(count)
        finally:
            for owner in range(count):
                self.cache.free(owner)

    @contextmanager
    def apart(self, cache: KVCache) -> Iterator[None]:
        """Another cache for the time of the block, which takes no room from the sequences under way."""
        before, self.cache = self.cache, cache
        try:
            yield
        finally:
            self.cache = before

    @torch.inference_mode()
    def extend(
        self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]], logits: bool = False, last: bool = False
    ) -> Tensor:
        """Append tokens to sequences; returns every token's output [N, ...], in the sequences' order.

        The output is the model's logits, or the backbone's last hidden state. last: that of each sequence's last token
        alone, [B, ...]; in the row of one without tokens is that of another.
        """
        if self.uniform and self.cache is self.uniform.cache and self.uniform.fits(tokens):
            output_NX = self.uniform.append(owners, tokens, logits)
            ends = _ends(tokens, self.device) if last else None
            return output_NX if ends is None else output_NX[ends]
        none = np.empty(0, int)
        outputs, passes = self._run(owners, tokens, none, none, logits, last=last)
        if not last:
            return _joined(outputs, passes)[0]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    @torch.inference_mode()
    def branch(
        self,
        owners: Sequence[Hashable],
        tokens: Sequence[Sequence[int]],
        index: np.ndarray,
        candidates: np.ndarray,
        logits: bool = False,
        places: np.ndarray | None = None,
    ) -> tuple[Tensor, Pass]:
        """Append tokens to sequences, and try candidates for the next token of `owners[index]` without keeping them.

        index must not fall. places: try the candidates at these places of their sequences instead, seeing what
        comes before. Returns the outputs of the appended tokens and then the candidates, [N, ...], and the
        pass, which has the candidates' keys and values.
        """
        return _joined(*self._run(owners, tokens, index, candidates, logits, places))

    def _run(
        self,
        owners: Sequence[Hashable],
        tokens: Sequence[Sequence[int]],
        index: np.ndarray,
        candidates: np.ndarray,
        logits: bool,
        places: np.ndarray | None = None,
        last: bool = False,
    ) -> tuple[list[Tensor], list[list[Pass]]]:
        """As `branch`: the outputs of each lane, and the passes, one for each grid, that are in it.

        last: the outputs of each sequence's last token alone, where there are no candidates.
        """
        counts, works, passes = _counts(tokens), [], []
        for span in self._spans(counts + np.bincount(index, minlength=len(owners))):
            ids, own = self._parts(owners, tokens, index, candidates, span, places)
            wanted = _ends(tokens[span], self.device) if last else None
            works.append(partial(self._forward, ids, joined(own), logits, wanted))
            passes.append(own)
        self._lengthen(owners, counts)
        return lanes.run(works), passes

    def _spans(self, totals: np.ndarray) -> list[slice]:
        """Which sequences, with so many tokens each, every lane of a pass runs."""
        if self.cache.depth == self._depth:
            return lanes.spans(totals)
        return [slice(0, len(totals))]  # the pass gives the cache's layers their memory, one after the other

    def _lengthen(self, owners: Sequence[Hashable], counts: np.ndarray) -> None:
        """Count tokens as appended, those of a pass as soon as it is laid out: the cache keeps room for them."""
        for owner, count in zip(owners, counts.tolist(), strict=True):
            self.cache.lengths[owner] += count

    def _parts(
        self,
        owners: Sequence[Hashable],
        tokens: Sequence[Sequence[int]],
        index: np.ndarray,
        candidates: np.ndarray,
        span: slice,
        places: np.ndarray | None = None,
    ) -> tuple[Tensor, list[Pass]]:
        """Token ids of a span of the sequences, and where they lie, with a pass for each grid; as `branch`."""
        parts, counts = [], _counts(tokens)
        totals = counts + np.bincount(index, minlength=len(owners))
        reach = counts + [self.cache.lengths[owner] for owner in owners]
        for some in alike(totals, reach, span) if self.ragged else [span]:
            tried = slice(*np.searchsorted(index, [some.start, some.stop]))
            at = None if places is None else places[tried]
            parts.append(self._part(owners[some], tokens[some], index[tried] - some.start, candidates[tried], at))
        return torch.cat([ids for ids, _ in parts]), [where for _, where in parts]

    def appending(self, owners: Sequence[Hashable], tokens: Sequence[Sequence[int]]) -> Flight | None:
        """A pass that appends tokens to sequences, a layer at a time; None where it cannot be taken apart."""
        counts, none = _counts(tokens), np.empty(0, int)
        if self._resting is None or len(self._spans(counts)) > 1:
            return None
        ids_N, passes = self._parts(owners, tokens, none, none, slice(0, len(owners)))
        self._lengthen(owners, counts)
        return Flight(self._resting, ids_N, joined(passes), _ends(tokens, self.device))

    def _part(
        self,
        owners: Sequence[Hashable],
        tokens: Sequence[Sequence[int]],
        index: np.ndarray,
        candidates: np.ndarray,
        places: np.ndarray | None,
    ) -> tuple[Tensor, Pass]:
        """Token ids, and where they lie, of some sequences' part of a pass; as `branch`."""
        counts = _counts(tokens)
        lengths = np.array([self.cache.lengths[owner] for owner in owners])
        kept = int(counts.sum())
        ids = np.concatenate([np.concatenate([np.asarray(each, dtype=int) for each in tokens]), candidates])
        owner = np.concatenate([np.repeat(np.arange(len(owners)), counts), index])
        within = np.arange(kept) - np.repeat(counts.cumsum() - counts, counts)
        places = (lengths + counts)[index] if places is None else places
        column = np.concatenate([lengths.repeat(counts) + within, places])
        return torch.from_numpy(ids).to(self.device), Pass(self.cache, owners, owner, column, kept)

    def keep(self, branches: Mapping[Hashable, int], where: Pass) -> None:
        """Append a branch of an earlier pass, by its number there, to each of some sequences."""
        as_tensor = partial(torch.tensor, device=self.device)
        rows = as_tensor([self.cache.row_of[owner] for owner in branches])
        places = as_tensor([self.cache.aside + self.cache.lengths[owner] for owner in branches])
        for owner in branches:
            self.cache.lengths[owner] += 1
        self.cache.grow(max(self.cache.lengths[owner] for owner in branches))
        chosen = as_tensor(list(branches.values()))
        for layer, states in enumerate(where.branches):
            self.cache.write(layer, rows, places, states.index_select(0, chosen))


def _counts(tokens: Sequence[Sequence[int]]) -> np.ndarray:
    """How many tokens each sequence has."""
    return np.array([len(each) for each in tokens])


def _ends(tokens: Sequence[Sequence[int]], device: torch.device) -> Tensor | None:
    """Where each sequence's last token is among the tokens of all; None if each has one."""
    counts = [len(each) for each in tokens]
    return None if set(counts) == {1} else upload(np.cumsum(counts) - 1, device)


def _joined(found: list[Tensor], passes: list[list[Pass]]) -> tuple[Tensor, Pass]:
    """The outputs of all lanes' passes, first of what is kept; and a pass that has all of their branches."""
    parts = [where for own in passes for where in own]
    first = parts[0]
    if len(parts) == 1:
        return found[0], first
    each_lanes = zip(found, passes, strict=True)
    outputs = [output for all_, own in each_lanes for output in all_.split([where.total for where in own])]
    kept = [output[: part.kept] for output, part in zip(outputs, parts, strict=True)]
    tried = [output[part.kept :] for output, part in zip(outputs, parts, strict=True)]
    if branching := [part.branches for part in parts if part.branches]:
        depth = len(branching[0])
        first.branches = [torch.cat([layers.pop(0) for layers in branching]) for _ in range(depth)]  # none held twice
    return torch.cat([*kept, *tried]), first
