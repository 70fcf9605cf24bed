"""Lines of progress where there is no terminal."""

import pytest

from vas import progress
from vas.progress import Tracker


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_rest_is_estimated_from_the_rate_since_the_first_results(clock, capsys):
    with Tracker("sampling", 100) as tracker:
        clock[0] = 60.0  # models load
        tracker.advance(10)
        clock[0] = 80.0
        tracker.advance(20, "40 tokens/s")
    assert lines(capsys.readouterr().err) == [
        "sampling 0/100",
        "sampling 10/100 60 s, 540 s to go",
        "sampling 30/100 80 s, 70 s to go 40 tokens/s",
    ]


def test_work_that_has_to_be_done_again_has_its_own_rate(clock, capsys):
    with Tracker("training", 1000) as tracker:
        tracker.advance(100)
        clock[0] = 20.0
        tracker.advance(-50, "from the last checkpoint")
        clock[0] = 40.0
        tracker.advance(50)
    assert lines(capsys.readouterr().err)[-1] == "training 100/1000 40 s, 360 s to go"
