"""Side-by-side samples for the report: the same prompt, base and steered."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase

from vas.decoding.detokenizer import Detokenizer
from vas.evaluation.methods import Row
from vas.evaluation.report import SampleColumn, SamplePrompt, SampleToken
from vas.evaluation.results import VAS, Result
from vas.schema import Prompt


def side_by_side(
    prompts: list[Prompt],
    base: dict[str, list[Row]],
    guided: dict[str, dict[str, list[Row]]],
    results: list[Result],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
) -> list[SamplePrompt]:
    """The first held-out prompts, each with its first base response and one per shown setting."""
    settings = _shown(results)
    labels = {result.setting: result.label() for result in results if result.method == VAS}
    shown: list[SamplePrompt] = []
    for prompt in prompts:
        rows = [(labels[s], guided[s].get(prompt.prompt_id)) for s in settings]
        if len(shown) == count or prompt.prompt_id not in base or not all(found for _, found in rows):
            continue
        columns = [_column("base", base[prompt.prompt_id][0], tokenizer)]
        columns += [_column(label, found[0], tokenizer) for label, found in rows if found]
        shown.append(SamplePrompt(prompt.last_user_text(), columns))
    return shown


def _shown(results: list[Result]) -> list[str]:
    """Settings worth a column: each objective's best on its own, and the composed ones' last."""
    vas = [result for result in results if result.method == VAS]
    chosen: dict[str, None] = {}
    for objective in dict.fromkeys(result.objective for result in vas):
        alone = [r for r in vas if r.objective == objective and list(json.loads(r.setting)) == [objective]]
        if alone:
            chosen[max(alone, key=lambda r: r.reward_mean).setting] = None
    composed = [result.setting for result in vas if len(json.loads(result.setting)) > 1]
    return [*chosen, *dict.fromkeys(composed[-1:])]


def _column(label: str, row: Row, tokenizer: PreTrainedTokenizerBase) -> SampleColumn:
    guided = row.get("guided_logprobs") or row["logprobs"]
    special = set(tokenizer.all_special_ids)
    detokenizer = Detokenizer(tokenizer, ())  # a token's text depends on its neighbours
    tokens = [
        SampleToken("⏎" if token in special else detokenizer.push(token), moved - base, base)
        for token, base, moved in zip(row["response_token_ids"], row["logprobs"], guided, strict=True)
    ]
    rewards = {name: value for name, value in row["rewards"].items() if value is not None}
    return SampleColumn(label, tokens, rewards, cut=row["finish_reason"] == "length")
