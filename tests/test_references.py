"""The benchmark's references make the engine's tokens, so that only speed is compared."""

import dataclasses
import sys

from command import ROOT
from naive import ONE, prompts, request, scorers_of
from tiny import tiny_base, tiny_value
from torch import float64

from vas.decoding.engine import Engine

sys.path.insert(0, str(ROOT))
from benchmarks.reference import FullRows, one_at_a_time


def test_both_references_make_the_engines_tokens():
    base = dataclasses.replace(tiny_base("llama", float64), eos_token_ids=())
    model = tiny_value("llama", ("positive",), "scalar", float64)
    requests = [
        request(str(i), prompt, ONE, seed=i, candidates=5, max_tokens=20) for i, prompt in enumerate(prompts(7, 3, 12))
    ]
    ours = [done.token_ids for done in Engine(base, scorers_of([model])).generate(requests)]
    assert [one_at_a_time(base, model, each) for each in requests] == ours
    assert FullRows(base, model, requests).generate() == ours
