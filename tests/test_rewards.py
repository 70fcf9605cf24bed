"""Rewards: what the built-in ones prefer, and what a bad reward, row or param costs."""

import subprocess
import sys

import pytest
import torch
from rewarded import ASK, load, scores

from vas.config import Reward as Spec
from vas.errors import VasError
from vas.rewards import Reward, builtin_rewards, load_rewards, score


class Stub:
    """A reward made from a function of the response texts."""

    version = "stub"

    def __init__(self, function):
        self.function = function

    def __call__(self, prompts, responses):
        return self.function(responses)


def scored(function, *responses):
    return score({"it": Stub(function)}, [ASK] * len(responses), list(responses))


# Built-in rewards


def test_sentiment_orders_texts():
    good, neutral, bad = scores("sentiment", "I love this, wonderful!", "A table.", "I hate this, awful.")
    assert 1 >= good > 0.5 > neutral == 0 > -0.5 > bad >= -1


def test_brevity_falls_with_words_and_has_a_cliff():
    texts = ["word " * n for n in (0, 1, 2, 3, 15, 30, 100)]
    assert scores("brevity", *texts) == [0, 0, 0, pytest.approx(0.9), pytest.approx(0.5), 0, 0]
    assert scores("brevity", "", "one", "one two", limit=4, min_words=1) == [0, 0.75, 0.5]


def test_length_counts_words():
    assert scores("length", "", "one", "one two\n three  ") == [0, 1, 3]


def test_readability_orders_texts():
    easy = "The cat sat on the mat. The dog ran to the red house."
    medium = "Reading a newspaper every morning helps many people understand political events."
    hard = "Institutional considerations necessitate comprehensive epistemological reconsideration."
    values = scores("readability", easy, medium, hard, "", " ...")
    assert values[0] > values[1] > values[2]
    assert values[3:] == [0, 0]
    assert all(0 <= value <= 1 for value in values)


def test_profanity_orders_texts():
    clean, dirty = scores("profanity", "What a lovely day.", "You are a fucking idiot.")
    assert 0 <= clean < 0.2
    assert 0.8 < dirty <= 1


def test_contains_searches_anywhere():
    assert scores("contains", "Call 911 now", "call me", pattern=r"\d{3}") == [1, 0]
    assert scores("contains", "YES", "no", pattern="yes") == [0, 0]
    assert scores("contains", "YES", "no", pattern="yes", ignore_case=True) == [1, 0]


def test_listing_tells_params_and_packages():
    listed = {info.name: info for info in builtin_rewards()}
    assert {"brevity", "contains", "length", "profanity", "readability", "sentiment"} <= listed.keys()
    assert listed["brevity"].params == {"limit": "30", "min_words": "3"}
    assert listed["contains"].params == {"pattern": "required", "ignore_case": "False"}
    assert (listed["profanity"].package, listed["profanity"].installed) == ("alt-profanity-check", True)
    assert (listed["length"].package, listed["length"].installed) == (None, True)
    assert all(info.doc and "\n" not in info.doc for info in listed.values())


def test_importing_rewards_is_light():
    code = "import sys, vas.rewards; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Names, params, versions


def test_every_builtin_is_a_reward_with_a_version():
    reward = load("sentiment")
    assert isinstance(reward, Reward)
    assert reward.version.startswith("sentiment/1 vaderSentiment==")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(VasError, match=r"unknown reward 'sentimant'(.|\n)*rewards\.it(.|\n)*'sentiment'"):
        load("sentimant")


def test_wrong_param_names_the_nearest():
    with pytest.raises(
        VasError, match=r"'limits' is no param of this reward, did you mean 'limit'(.|\n)*rewards\.it\.params"
    ):
        load("brevity", limits=3)
    with pytest.raises(VasError, match="it takes none"):
        load("length", limit=3)


@pytest.mark.parametrize(
    ("use", "params", "said"),
    [
        ("brevity", {"limit": 0}, "'limit'.*greater than 0"),
        ("brevity", {"limit": "many"}, "'limit'.*integer"),
        ("contains", {}, "'pattern' is required"),
        ("contains", {"pattern": "("}, "'pattern': not a regular expression"),
    ],
)
def test_wrong_param_values_are_refused(use, params, said):
    with pytest.raises(VasError, match=said):
        load(use, **params)


def test_missing_package_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)  # as if not installed
    with pytest.raises(VasError, match=r"vaderSentiment(.|\n)*pip install vaderSentiment"):
        load("sentiment")


def test_versions_change_with_params_only():
    assert load("brevity").version == load("brevity", limit=30).version
    assert load("brevity").version != load("brevity", limit=31).version
    assert load("contains", pattern="a").version != load("contains", pattern="b").version


# Scoring rows


def test_score_gives_each_objective_of_each_row():
    rewards = load_rewards({"short": Spec(use="brevity"), "words": Spec(use="length")})
    rows = score(rewards, [ASK, ASK], ["a b c", "a b c d e f"])
    assert [row.rewards for row in rows] == [{"short": 0.9, "words": 3}, {"short": 0.8, "words": 6}]
    assert [row.error for row in rows] == [None, None]
    assert score(rewards, [], []) == []


def test_raising_reward_marks_only_guilty_rows():
    def picky(responses):
        if "bad" in responses:
            raise RuntimeError("cannot read this")
        return [1.0 for _ in responses]

    rows = scored(picky, "good", "bad", "fine")
    assert [row.rewards["it"] for row in rows] == [1, None, 1]
    assert [row.error for row in rows] == [None, "it: RuntimeError: cannot read this", None]


def test_one_reward_failing_leaves_the_others():
    rewards = {"broken": Stub(lambda responses: 1 / 0), "words": load("length")}
    (row,) = score(rewards, [ASK], ["a b"])
    assert row.rewards == {"broken": None, "words": 2}
    assert row.error == "broken: ZeroDivisionError: division by zero"


def test_what_is_no_finite_number_marks_its_row():
    values = [1, float("nan"), float("inf"), "3", None, torch.tensor(0.5), [2.0], True]
    rows = scored(lambda responses: values, *"abcdefgh")
    assert [row.rewards["it"] for row in rows] == [1, None, None, None, None, 0.5, None, 1]
    assert rows[1].error == "it: returned nan"
    assert "which is no number" in rows[3].error


def test_wrong_count_marks_the_rows_it_holds_for():
    drops_empty = scored(lambda responses: [1.0 for r in responses if r], "a", "", "b")
    assert [row.rewards["it"] for row in drops_empty] == [1, None, 1]
    assert drops_empty[1].error == "it: ValueError: returned 0 values for 1 rows"
    assert [row.rewards["it"] for row in scored(lambda responses: [1.0] * 7, "a", "b")] == [None, None]


def test_no_list_at_all_marks_the_batch():
    assert all(row.error and row.rewards["it"] is None for row in scored(lambda responses: 1.0, "a", "b"))


# python:


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "LIMIT = 3\n"
        "def shout(prompts, responses, mark='!', weight=1.0):\n"
        "    asked = ['tell' in prompt.last_user_text() for prompt in prompts]\n"
        "    return [weight * r.count(mark) + 10 * a for a, r in zip(asked, responses)]\n"
    )
    return path


def test_python_reward_from_a_file(own):
    assert scores(f"python:{own}:shout", "hey!!", "hey") == [12, 10]
    assert scores(f"python:{own}:shout", "a?", weight=2.0, mark="?") == [12]


def test_python_reward_from_a_module(own, monkeypatch):
    monkeypatch.syspath_prepend(own.parent)
    assert scores("python:own.shout", "hey!") == [11]


def test_python_version_follows_source_and_params(own):
    first = load(f"python:{own}:shout").version
    assert load(f"python:{own}:shout").version == first
    assert load(f"python:{own}:shout", weight=2).version != first
    own.write_text(own.read_text().replace("10 *", "20 *"))
    changed = load(f"python:{own}:shout")
    assert changed.version != first
    assert changed([ASK], ["!"]) == [21]


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("nowhere.at.all", {}, "no Python module 'nowhere'"),
        ("json.nothing.at_all", {}, "no Python module 'json.nothing'"),
        ("function", {}, "names no function"),
        ("no/such/file.py:score", {}, "cannot read 'no/such/file.py'"),
        ("{own}:shoot", {}, "has no function 'shoot'(.|\n)*'shout'"),
        ("{own}:LIMIT", {}, "is no function but a int"),
        ("{own}:shout", {"marks": "?"}, "'marks' is no param of this reward, did you mean 'mark'"),
        ("{broken}:score", {}, "cannot be imported: it needs the module 'not_there'"),
        ("{wrong}:score", {}, "cannot be imported: SyntaxError"),
        ("{own2}:lonely", {}, "cannot be called as function"),
    ],
)
def test_python_mistakes_are_told(own, tmp_path, name, params, said):
    files = {"own": own}
    for stem, text in {
        "broken": "import not_there",
        "wrong": "def score(:",
        "own2": "def lonely(responses): ...",
    }.items():
        files[stem] = tmp_path / f"{stem}.py"
        files[stem].write_text(text)
    with pytest.raises(VasError, match=said):
        load("python:" + name.format(**files), **params)
