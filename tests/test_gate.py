"""What an endpoint refuses to start with, or to change to."""

from __future__ import annotations

import pytest
from tiny import tiny_tokenizer

from vas.errors import VasError
from vas.serving.calls import Objective
from vas.serving.config import Gate
from vas.serving.requests import Served

TONE = Objective("tone", "default", "colocated", "0", "scalar", 0.0, 1.0, "1", False)
SERVED = Served("tiny", tiny_tokenizer(), {"tone": TONE}, 1024)


@pytest.mark.parametrize(
    ("gate", "what", "where"),
    [
        ({"presets": {"kind": {"objectives": {"tune": 1}}}}, "no objective 'tune'", "presets.kind"),
        ({"limits": {"strengths": {"tune": [0, 1]}}}, "no objective 'tune'", "limits.strengths"),
        ({"presets": {"kind": {"objectives": {"tone": 21}}}}, "tone: 21 is not in [-20, 20]", "presets.kind"),
        (
            {"guidance": {"objectives": {"tone": 3}}, "limits": {"strengths": {"tone": [0, 2]}}},
            "tone: 3 is not in [0, 2]",
            "guidance",
        ),
        ({"presets": {"kind": {"objectives": {}, "candidates": 65}}}, "more than 64 candidates", "presets.kind"),
    ],
)
def test_guidance_that_requests_could_not_ask_for_is_refused(gate, what, where):
    with pytest.raises(VasError) as error:
        SERVED.check_gate(Gate.model_validate(gate))
    assert what in error.value.what
    assert error.value.where == where


def test_guidance_within_the_bounds_is_let_in():
    presets = {"kind": {"objectives": {"tone": -20}, "candidates": 64}, "plain": {"objectives": {"tone": 0}}}
    SERVED.check_gate(Gate.model_validate({"presets": presets, "limits": {"strengths": {"tone": [-20, -1]}}}))
