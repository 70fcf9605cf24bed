"""Scorers give candidates their values. One interface, whatever stands behind it.

`ValueScorer` runs a value model in this process: all candidates of all sequences in one
pass. They share the prefix's KV cache, see the prefix and themselves but not each other,
and have the same position. The chosen candidate's KV stays as the next prefix, so no
token is ever run twice (but on a GPU: see `uniform.py`). `VocabScorer` is for value models that score all tokens from
the parent state.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vas.choices import Linears
from vas.decoding.attention import Pass
from vas.decoding.cache import KVCache
from vas.decoding.graphs import upload
from vas.decoding.runner import ModelRunner
from vas.decoding.uniform import Uniform
from vas.errors import VasError
from vas.models.value import ValueModel

LAG = 128  # tokens that a scorer may have missed and still read beside the candidates
READ_TOGETHER = 256  # tokens of a text that is scored, in one pass


@dataclass(slots=True)
class ScoreBatch:
    """One step's question to a scorer: what are these candidates worth?"""

    sequences: Sequence[Hashable]
    """All sequences that can go on, also those without candidates at this step."""
    taken: list[tuple[int, ...]]
    """Tokens of each sequence since it was last extended or scored, of its prompt too; none is empty for one with
    candidates."""
    rows: list[int]
    """Sequences that have candidates, as indices into `sequences`; rising."""
    candidates_BK: Tensor
    """Token ids, a row for each of `rows`."""
    valid_BK: Tensor
    strengths_BJ: Tensor
    """β of this scorer's objectives, for soft values."""
    soft_B: Tensor
    """Rows that want soft values."""


Answer = tuple[Tensor, list[int]]
"""Values [B, K, J] in reward standard deviations, and positions run for each of a batch's `sequences`."""


class ScorerUnreachable(Exception):
    """A scorer outside of this process has no answer for some sequences now; it may have one at the next step.

    answer: what there is; the values of the others are 0. lost: their rows among the batch's candidates.
    """

    def __init__(self, answer: Answer, lost: list[int]) -> None:
        super().__init__(f"no values for {len(lost)} sequences")
        self.answer, self.lost = answer, lost


class Scorer(Protocol):
    """open → extend with the prompt, but for a short rest → score, score, … → close, for many sequences at once."""

    name: str
    objectives: tuple[str, ...]
    context_length: int | None
    """Longest sequence it has positions for; None if it does not say."""
    relative: bool
    """Whether values can only be compared among next tokens of one state."""
    lag: int
    """Tokens that it may have missed and still read beside the candidates; more are extended before."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that it holds here."""
        ...

    def limit(self, kv_tokens: int | None) -> None:
        """Hold at most so many tokens of KV, counted as the engine's own; it will not ask for more."""
        ...

    def open(self, sequence: Hashable, prompt: int = 0) -> None:
        """Begin a sequence; the first so many of its tokens are the prompt's."""
        ...

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """The first `length` tokens of `target` are those of `source`; it forgets what it held before."""
        ...

    def extend(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        """Read more of the sequences' prompts."""
        ...

    def score(self, batch: ScoreBatch) -> Callable[[], Answer]:
        """Begin to score; what is returned gives the answer, and raises ScorerUnreachable if there is none.

        So several scorers outside of this process compute at the same time.
        """
        ...

    def close(self, sequence: Hashable) -> None:
        """Forget a sequence."""
        ...


class InProcess:
    """What scorers share that run a value model here: the model, and the KV of the sequences' prefixes.

    linears, free: as the engine's, for the value model's backbone.
    """

    relative = False

    def __init__(self, name: str, model: ValueModel, linears: Linears = "exact", free: bool = False) -> None:
        self.name = name
        self.objectives = model.objectives
        self.context_length = model.config.context_length
        self._model = model
        self._runner = ModelRunner(model.backbone, linears, free)
        self.lag = LAG if self._runner.ragged else 8  # else all sequences' tokens are padded to what one has missed

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held."""
        return self._runner.cache.memory()

    def limit(self, kv_tokens: int | None) -> None:
        """Hold at most so many tokens of KV."""
        self._runner.cache.limit = kv_tokens

    def spare(self) -> None:
        """Let go of memory that only makes steps faster."""
        self._runner.spare()

    def fits(self, sequences: int, longest: int) -> bool:
        """Whether the KV of so many sequences of up to so many tokens stays within the limit."""
        return self._runner.cache.fits(sequences, longest)

    def open(self, sequence: Hashable, prompt: int = 0) -> None:
        """Give the sequence a row of the cache."""
        self._runner.cache.add(sequence)

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """Copy the KV of a common prefix."""
        self._runner.cache.copy(source, target, length)

    def extend(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        """Run these tokens for their KV."""
        self._runner.extend(sequences, token_ids)

    def close(self, sequence: Hashable) -> None:
        """Free the sequence's KV."""
        self._runner.cache.free(sequence)

    def score(self, batch: ScoreBatch) -> Callable[[], Answer]:
        """Score here and now, when the answer is asked for."""
        return partial(self.answer, batch)

    def answer(self, batch: ScoreBatch) -> Answer:
        """Values of a batch's candidates."""
        raise NotImplementedError

    @torch.inference_mode()
    def ends(self, states: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
        """V after the last token of prompts with responses, in the base model's tokens: [B, J]."""
        tokens = [self._ids(*state) for state in states]
        with self._runner.apart(KVCache(self._runner.device, None)), self._runner.sequences(len(tokens)) as owners:
            hidden_BH = self._runner.extend(owners, tokens, last=True)
        return self._model.values(self._model.outputs(hidden_BH))

    def _ids(self, prompt: Sequence[int], response: Sequence[int]) -> list[int]:
        """The value model's own tokens."""
        return [*prompt, *response]

    def _values(self, outputs: list[Tensor], strengths: Tensor, soft: Tensor) -> Tensor:
        """Values [..., J] of the heads' outputs, expected or soft as each asks; soft ones need strengths [..., J]."""
        values = self._model.values(outputs)
        if bool(soft.any()):
            tilted = self._model.values(outputs, upload(strengths, values.device))
            values = torch.where(upload(soft, values.device)[..., None], tilted, values)
        return values

    def values(self, token_ids: Sequence[int]) -> Iterator[Tensor]:
        """V after each token of a text, in reward standard deviations: parts [t, J] of a few hundred tokens.

        Whatever else the scorer has to do may come between two parts.
        Raises VasError, at the first, if the value model only compares tokens.
        """
        if self.relative:
            raise VasError("this value model only compares next tokens; it has no values of texts", self.name)
        cache = KVCache(self._runner.device, None)
        cache.add(0)
        for start in range(0, len(token_ids), READ_TOGETHER):
            with self._runner.apart(cache), torch.inference_mode():
                hidden_NH = self._runner.extend([0], [token_ids[start : start + READ_TOGETHER]])
                part = self._model.values(self._model.outputs(hidden_NH))
            yield part


class ValueScorer(InProcess):
    """A value model in this process, run on every candidate."""

    def __init__(self, name: str, model: ValueModel, linears: Linears = "exact", free: bool = False) -> None:
        super().__init__(name, model, linears, free)
        self._offered: dict[Hashable, tuple[Pass, dict[int, int]]] = {}
        """The pass that each sequence was last scored in, and its candidates: token → number among the branches."""

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV held, that of the last candidates included."""
        passes = {where for where, _ in self._offered.values()}
        return super().kv_bytes + sum(states.nbytes for where in passes for states in where.branches)

    @torch.inference_mode()
    def answer(self, batch: ScoreBatch) -> Answer:
        """One tree-masked pass; see the module's text."""
        uniform = self._runner.uniform
        if uniform and uniform.fits(batch.taken, batch.candidates_BK.shape[1]):
            return self._try_all(batch, uniform)
        missed = self._keep_taken(batch)
        valid = batch.valid_BK.cpu().numpy()
        tokens = batch.candidates_BK.cpu().numpy()
        row, place = valid.nonzero()
        index = np.array(batch.rows)[row]
        output, where = self._runner.branch(batch.sequences, missed, index, tokens[row, place])
        for number, (sequence, token) in enumerate(zip(index.tolist(), tokens[row, place].tolist(), strict=True)):
            self._offered.setdefault(batch.sequences[sequence], (where, {}))[1][token] = number

        hidden_NH = output[len(output) - len(row) :]
        row_N, place_N = (torch.from_numpy(each).to(hidden_NH.device) for each in (row, place))
        values = hidden_NH.new_zeros(*valid.shape, len(self.objectives), dtype=torch.float32)
        strengths_NJ, soft_N = batch.strengths_BJ[row], batch.soft_B[row]
        values[row_N, place_N] = self._values(self._model.outputs(hidden_NH), strengths_NJ, soft_N)
        run = np.bincount(index, minlength=len(batch.sequences)) + [len(each) for each in missed]
        return values, run.tolist()

    def _try_all(self, batch: ScoreBatch, uniform: Uniform) -> Answer:
        """The same in a pass that runs the tokens that were taken, whether they were candidates or not."""
        for sequence in batch.sequences:
            self._offered.pop(sequence, None)
        read = {sequence: taken for sequence, taken in zip(batch.sequences, batch.taken, strict=True) if taken}
        askers = [batch.sequences[b] for b in batch.rows]
        hidden_RKH = uniform.tries(list(read), list(read.values()), askers, batch.candidates_BK)
        values = self._values(self._model.outputs(hidden_RKH), batch.strengths_BJ[:, None], batch.soft_B[:, None])
        run = [len(read.get(sequence, ())) for sequence in batch.sequences]
        for b in batch.rows:
            run[b] += batch.candidates_BK.shape[1]
        return values.float().masked_fill(~upload(batch.valid_BK, values.device)[..., None], 0.0), run

    def _keep_taken(self, batch: ScoreBatch) -> list[tuple[int, ...]]:
        """Keep the KV of each candidate that was taken; returns the tokens that were no candidates."""
        kept: dict[Pass, dict[Hashable, int]] = {}
        missed = []
        for sequence, taken in zip(batch.sequences, batch.taken, strict=True):
            where, offered = self._offered.pop(sequence, (None, {}))
            if where and taken and taken[0] in offered:
                kept.setdefault(where, {})[sequence] = offered[taken[0]]
                taken = taken[1:]
            missed.append(taken)
        for where, branches in kept.items():
            self._runner.keep(branches, where)
        return missed

    def extend(self, sequences: Sequence[Hashable], token_ids: list[tuple[int, ...]]) -> None:
        """Run these tokens for their KV."""
        super().extend(sequences, token_ids)
        for sequence in sequences:
            self._offered.pop(sequence, None)

    def share(self, source: Hashable, target: Hashable, length: int) -> None:
        """Copy the KV of a common prefix."""
        super().share(source, target, length)
        self._offered.pop(target, None)

    def close(self, sequence: Hashable) -> None:
        """Free the sequence's KV."""
        super().close(sequence)
        self._offered.pop(sequence, None)


class VocabScorer(InProcess):
    """A value model with vocab heads in this process: a step runs the taken token alone, whatever k is."""

    relative = True

    @torch.inference_mode()
    def answer(self, batch: ScoreBatch) -> Answer:
        """One pass over the taken tokens; candidates are looked up in its last states."""
        output_BH = self._runner.extend(batch.sequences, batch.taken, last=True)
        outputs = self._model.outputs(output_BH[upload(batch.rows, output_BH.device)])
        counts = [len(taken) for taken in batch.taken]
        return self._model.next_values(outputs, batch.candidates_BK.to(output_BH.device)), counts


def make_scorer(name: str, model: ValueModel, linears: Linears = "exact", free: bool = False) -> InProcess:
    """The scorer that a value model's heads need; see `ModelRunner` for linears and free."""
    return (VocabScorer if model.scores_vocabulary else ValueScorer)(name, model, linears, free)
