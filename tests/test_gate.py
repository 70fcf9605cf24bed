"""What an endpoint refuses to start with, or to change to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from command import tiny_run
from tiny import tiny_tokenizer

from vas.decoding.cache import allocated
from vas.errors import VasError
from vas.serving.answers import ChatAnswer
from vas.serving.calls import Objective
from vas.serving.config import Gate, parse_serving, settle
from vas.serving.errors import ApiError
from vas.serving.gateway import Gateway
from vas.serving.keys import Doorkeeper
from vas.serving.protocol import ChatRequest, parse
from vas.serving.requests import Encoded, Served

# of Serve's ends of gateways that it has not begun
pytestmark = pytest.mark.filterwarnings("ignore:coroutine")

TONE = Objective("tone", "default", "colocated", "0", "scalar", 0.0, 1.0, "1", False)
CHAT = [{"role": "user", "content": "How was your day?"}]
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


def gateway(**first) -> Gateway:
    """As it comes up, with the gate of its arguments."""
    made = object.__new__(Gateway)
    made.served, made._first, made._configured = SERVED, Gate.model_validate(first), False
    made._take_over({})
    return made


def test_a_gateway_that_is_up_outlives_a_mistake_in_its_new_gate(tmp_path):
    door = gateway(limits={"strengths": {"tone": [0, 0]}, "n": 3}, system="Be kind.")
    door.reconfigure({"limits": {"max_tokens": 7}})
    before = door.gate
    assert before.limits.bounds("tone") == (0, 0)  # what the change does not name stays
    assert (before.limits.n, before.limits.max_tokens, before.system) == (3, 7, "Be kind.")
    for wrong in ({"presets": {"kind": {"objectives": {"tune": 1}}}}, {"limts": {}}, {"keys": str(tmp_path / "none")}):
        door.reconfigure(wrong)
        assert door.gate is before


def test_a_gateway_does_not_come_up_with_a_mistake_in_its_gate(tmp_path):
    with pytest.raises(VasError, match="limts: unknown key"):
        gateway().reconfigure({"limts": {}})
    with pytest.raises(VasError):
        gateway().reconfigure({"keys": str(tmp_path / "none")})


@pytest.mark.parametrize("doubling", [False, True])
def test_a_chat_that_names_no_length_gets_what_there_is_room_for(doubling):
    served = replace(SERVED, room=None, kv_tokens=20_000, doubling=doubling)
    guidance = {"objectives": {"tone": 1}, "schedule": "block:8", "candidates": 20}
    for extra, rows in (({}, 1), ({"guidance": guidance}, 20)):
        body = parse(ChatRequest, json.dumps({"model": "tiny", "messages": CHAT, **extra}).encode())
        caller = Doorkeeper(None).admit(None)
        [request] = served.requests(body, Gate(), caller, [Encoded([5] * 100)], "id", ChatAnswer.longest)
        length = 100 + request.sampling.max_tokens
        assert request.sampling.max_tokens == 2048 or allocated(rows, length, doubling) <= 20_000
        assert request.sampling.max_tokens == 2048 or allocated(rows, length + 1, doubling) > 20_000
    assert length < 2148


def sampled_by(gate: Gate, **asked) -> tuple[float, ...]:
    """What the one request of a chat is drawn with."""
    body = parse(ChatRequest, json.dumps({"model": "tiny", "messages": CHAT, **asked}).encode())
    [request] = SERVED.requests(body, gate, Doorkeeper(None).admit(None), [Encoded([5])], "id", ChatAnswer.longest)
    how = request.sampling
    return how.temperature, how.top_p, how.top_k, how.min_p


def test_requests_that_do_not_say_are_drawn_as_the_rollouts_of_the_run(tmp_path):
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 5}
    run = tiny_run(tmp_path, rollouts={"sampling": sampling})
    gate = settle(parse_serving({"run": run.location}, "here")).serving.gate
    assert sampled_by(gate) == (0.6, 0.9, 40, 0.05)
    assert sampled_by(gate, temperature=0, top_k=-1) == (0, 0.9, 0, 0.05)
    gate = settle(parse_serving({"run": run.location, "gate": {"sampling": {"top_p": 1}}}, "here")).serving.gate
    assert sampled_by(gate) == (0.6, 1, 40, 0.05)
    assert sampled_by(Gate()) == (1, 1, 0, 0)
    door = gateway(**gate.model_dump())
    door.reconfigure({"sampling": {"temperature": 1}})
    assert sampled_by(door.gate) == (1, 1, 40, 0.05), "what the change does not name stays"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"temprature": 1}, "temprature: .*did you mean 'temperature'?"),
        ({"guidance": {"objectves": {"tone": 1}}}, "guidance.objectves: .*did you mean 'objectives'?"),
        ({"guidance": {"tone": 1}}, "guidance.tone: .*known: candidates, objectives"),
        ({"stream_options": {"usage": True}, "stream": True}, "usage: .*known: include_obfuscation, include_usage"),
        ({"messages": [CHAT[0] | {"roll": 1}]}, "messages.0.roll: .*did you mean 'role'?"),
        ({"guidance": {"schedule": "foo"}}, "guidance.schedule: .*entropy:NATS"),
        ({"x" * 10_000: 1}, "xxx: .*known: "),
    ],
)
def test_a_request_with_a_slip_is_told_what_was_perhaps_meant(extra, says):
    with pytest.raises(ApiError, match=says.replace("?", r"\?")) as caught:
        parse(ChatRequest, json.dumps({"model": "tiny", "messages": CHAT, **extra}).encode())
    assert caught.value.status == 400


def test_guidance_within_the_bounds_is_let_in():
    presets = {"kind": {"objectives": {"tone": -20}, "candidates": 64}, "plain": {"objectives": {"tone": 0}}}
    SERVED.check_gate(Gate.model_validate({"presets": presets, "limits": {"strengths": {"tone": [-20, -1]}}}))
