"""Values of a whole text, found a part at a time between the steps of others."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_base, tiny_tokenizer, tiny_value

from vas.decoding.engine import Engine
from vas.decoding.scorer import ValueScorer, VocabScorer
from vas.decoding.sequence import GuidanceParams, Request, SamplingParams
from vas.errors import VasError

TEXT = tuple(tiny_tokenizer()("the fox thinks of the weather, and of the dog " * 3).input_ids)


def decode(between=None) -> list[list[int]]:
    """Guided responses, with something done after each step."""
    scorer = ValueScorer("value", tiny_value())
    engine = Engine(tiny_base(), [scorer])
    for seed in range(4):
        guidance = GuidanceParams({"positive": 2.0}, candidates=4)
        engine.add(Request(str(seed), TEXT[: 5 + seed], SamplingParams(max_tokens=12, seed=seed), guidance))
    after = between(scorer) if between is not None else iter(())
    while engine.busy:
        engine.step()
        next(after, None)
    return [engine.take(str(seed)).token_ids for seed in range(4)]


def test_a_text_is_read_in_parts_between_the_steps_of_others(monkeypatch):
    monkeypatch.setattr("vas.decoding.scorer.READ_TOGETHER", 7)
    found = []

    def read(scorer):
        for part in scorer.values(TEXT):
            found.append(part)
            yield

    assert decode(read) == decode()
    assert [len(part) for part in found[:-1]] == [7] * (len(found) - 1)
    expected = tiny_value()(torch.tensor([TEXT]))[0]
    torch.testing.assert_close(torch.cat(found), expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_only_compares_tokens_has_none():
    scorer = VocabScorer("value", tiny_value(head="vocab"))
    with pytest.raises(VasError, match="only compares"):
        next(scorer.values(TEXT))
