"""API keys: who is let in, for what, and how much of it."""

from __future__ import annotations

import base64

import pytest
import yaml

from vas.errors import VasError
from vas.serving import keys
from vas.serving.errors import ApiError
from vas.serving.keys import Doorkeeper, Key, hash_of, load_keys, new_key


def caller_of(**bounds):
    """The caller of a fresh key with these bounds."""
    secret, digest = new_key()
    return Doorkeeper([Key(name="one", sha256=digest, **bounds)]).admit(f"Bearer {secret}")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    return now


def status_of(call, *arguments) -> ApiError:
    with pytest.raises(ApiError) as raised:
        call(*arguments)
    return raised.value


def basic(credentials: str) -> str:
    """As a browser sends what was typed in."""
    return f"Basic {base64.b64encode(credentials.encode()).decode()}"


def test_a_key_opens_and_nothing_else_does():
    (alice, hers), (bob, his) = new_key(), new_key()
    door = Doorkeeper([Key(name="alice", sha256=hers), Key(name="bob", sha256=his)])
    assert door.admit(f"Bearer {alice}").name == "alice"
    assert door.admit(f"bearer  {bob} ").name == "bob"
    assert door.admit(basic(f"whoever:{bob}")).name == "bob"
    for header in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Basic {alice}",
        basic(alice),
        basic(f"{alice}:"),
        basic(f"alice:{alice}x"),
        alice,
        f"Bearer {hers}",
        f"Bearer {alice}x",
        "Bearer é",
    ):
        assert status_of(door.admit, header).status == 401
    assert status_of(Doorkeeper([]).admit, f"Bearer {alice}").status == 401  # an empty file lets nobody in
    assert Doorkeeper(None).admit(None).name == ""


def test_strengths_stay_within_the_keys_bounds():
    caller = caller_of(objectives={"positive": (0, 3)})
    caller.check_strength("positive", 3)
    caller.check_strength("brief", 0)
    assert status_of(caller.check_strength, "positive", 3.5).status == 403
    assert status_of(caller.check_strength, "brief", 1).status == 403
    assert caller.may_use("positive")
    assert not caller.may_use("brief")
    caller_of().check_strength("anything", 99)


def test_a_budget_fills_up_again(clock):
    caller = caller_of(requests_per_minute=2)
    caller.spend(10)
    caller.spend(10)
    error = status_of(caller.spend, 10)
    assert error.status == 429
    assert error.retry_after == pytest.approx(30)
    assert error.response().headers["retry-after"] == "30"
    clock[0] += 30
    caller.spend(10)
    assert status_of(caller.spend, 10).status == 429


def test_tokens_that_were_not_used_are_given_back(clock):
    caller = caller_of(tokens_per_minute=100)
    caller.spend(100)
    assert status_of(caller.spend, 50).status == 429
    caller.give_back(60)
    caller.spend(50)
    clock[0] += 120
    caller.spend(500)  # more than a minute's worth waits for a full budget, and is let in then
    assert status_of(caller.spend, 1).retry_after == pytest.approx(60 * 401 / 100, rel=0.01)


def test_a_request_that_tokens_refuse_costs_no_request(clock):
    caller = caller_of(requests_per_minute=1, tokens_per_minute=10)
    caller.spend(5)
    clock[0] += 60
    caller.spend(10)
    clock[0] += 59
    assert status_of(caller.spend, 10).status == 429
    clock[0] += 2
    caller.spend(10)


def test_a_keys_file_is_read_and_checked(tmp_path):
    file = tmp_path / "keys.yaml"
    entry = {"name": "alice", "sha256": hash_of("x"), "tokens_per_minute": 5}
    file.write_text(yaml.safe_dump({"keys": [entry]}))
    assert load_keys(str(file)) == [Key(**entry)]
    for content, says in (
        ({"keys": [entry, entry]}, "two keys"),
        ({"keys": [entry | {"sha": 1}]}, "sha256"),
        ({"keys": [entry | {"sha256": "vas-secret"}]}, "sha256"),
        ([], "keys"),
    ):
        file.write_text(yaml.safe_dump(content))
        with pytest.raises(VasError, match=says) as raised:
            load_keys(str(file))
        assert "vas-secret" not in str(raised.value)  # somebody may have put the key itself there
    with pytest.raises(VasError, match="keys"):
        load_keys(str(tmp_path / "none.yaml"))
