"""Sampling and guidance parameters out of their range are refused."""

import math

import pytest
from naive import ONE

from vas.decoding.sequence import GuidanceParams, SamplingParams
from vas.errors import VasError


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"min_p": 1.0},
        {"min_p": -0.1},
        {"max_tokens": 0},
        {"stop": ("",)},
        {"logit_bias": {3: math.nan}},
    ],
    ids=str,
)
def test_bad_sampling_is_refused(wrong):
    with pytest.raises(VasError, match=next(iter(wrong))):
        SamplingParams(**wrong)


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_must_be_finite(strength):
    with pytest.raises(VasError, match="'positive' is not finite"):
        GuidanceParams({"positive": strength})


def test_candidates_must_be_at_least_one():
    with pytest.raises(VasError, match="at least 1"):
        GuidanceParams(ONE, candidates=0)


@pytest.mark.parametrize("mass", [0.0, -1.0, 1.1, math.nan])
def test_candidate_mass_is_a_probability(mass):
    with pytest.raises(VasError, match="candidate_mass is out of its range"):
        GuidanceParams(ONE, candidate_mass=mass)


@pytest.mark.parametrize("schedule", ["", "entropy", "entropy:", "entropy:-1", "entropy:x", "tokens", "token:3"])
def test_an_unknown_schedule_is_refused(schedule):
    with pytest.raises(VasError, match="unknown schedule"):
        GuidanceParams(ONE, schedule=schedule)
