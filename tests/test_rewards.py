"""Rewards: what the built-in ones prefer, and what a bad reward, row or param costs."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from vas.config import Reward as Spec
from vas.errors import VasError
from vas.rewards import Reward, builtin_rewards, load_rewards, score
from vas.schema import Prompt

ASK = Prompt("p", messages=({"role": "user", "content": "tell me"},))


def load(use, **params):
    return load_rewards({"it": Spec(use=use, params=params)})["it"]


def scores(use, *responses, **params):
    return list(load(use, **params)([ASK] * len(responses), list(responses)))


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


# hf:

VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "<eos>",
    "tell",
    "me",
    "good",
    "bad",
    "user",
    "assistant",
    ":",
]
CHAT = "{% for m in messages %}{{ m.role }} : {{ m.content }} <eos>{% endfor %}"


def tokenizer(**special):
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


def settings(**more):
    sizes = {"vocab_size": len(VOCABULARY), "hidden_size": 16, "intermediate_size": 32}
    return {**sizes, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 24, **more}


def randomised(model):
    """Weights large enough for texts to get clearly different scores."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A one-logit reward model with a chat template and no padding token."""
    folder = tmp_path_factory.mktemp("llama")
    words = tokenizer(eos_token="<eos>")
    words.chat_template = CHAT
    words.save_pretrained(folder)
    model = LlamaForSequenceClassification(LlamaConfig(**settings(num_labels=1, pad_token_id=None)))
    randomised(model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A two-label classifier that reads text pairs."""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]").save_pretrained(folder)
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    randomised(BertForSequenceClassification(BertConfig(**settings(id2label=labels)))).save_pretrained(folder)
    return folder


RESPONSES = ["good", "bad bad bad", "me good bad tell me", "", "tell"]


def test_hf_chat_model_equals_the_model_called_by_hand(llama):
    model = LlamaForSequenceClassification.from_pretrained(llama)
    words = PreTrainedTokenizerFast.from_pretrained(llama)
    by_hand = []
    for response in RESPONSES:  # alone, so that no padding is involved; the last token is EOS
        ids = words(f"user : tell me <eos>assistant : {response} <eos>", add_special_tokens=False)["input_ids"]
        assert ids[-1] == words.eos_token_id
        by_hand.append(model(torch.tensor([ids])).logits.item())
    assert len({round(value, 3) for value in by_hand}) == len(RESPONSES)
    for batch_size in (1, 2, 16):
        values = scores(f"hf:{llama}", *RESPONSES, batch_size=batch_size, device="cpu")
        assert values == pytest.approx(by_hand, abs=1e-4)


def test_hf_pair_model_equals_the_model_called_by_hand(bert):
    model = BertForSequenceClassification.from_pretrained(bert)
    words = PreTrainedTokenizerFast.from_pretrained(bert)
    logits = torch.stack([model(**words("tell me", r, return_tensors="pt")).logits[0] for r in RESPONSES[:3]])
    responses, cpu = RESPONSES[:3], {"device": "cpu"}
    assert scores(f"hf:{bert}", *responses, **cpu) == pytest.approx(logits[:, 1].tolist(), abs=1e-4)
    assert scores(f"hf:{bert}", *responses, label=0, **cpu) == pytest.approx(logits[:, 0].tolist(), abs=1e-4)
    shares = logits.softmax(-1)[:, 0].tolist()
    assert scores(f"hf:{bert}", *responses, label="NEGATIVE", transform="probability", **cpu) == pytest.approx(
        shares, abs=1e-4
    )


def test_hf_probability_of_a_single_logit_is_its_sigmoid(llama):
    (logit,) = scores(f"hf:{llama}", "good", device="cpu")
    (probability,) = scores(f"hf:{llama}", "good", device="cpu", transform="probability")
    assert probability == pytest.approx(torch.tensor(logit).sigmoid().item(), abs=1e-5)


def test_hf_reads_the_prompt_unless_told_not_to(bert):
    other = Prompt("q", text="bad bad bad")
    both = load(f"hf:{bert}", device="cpu")([ASK, other], ["good", "good"])
    alone = load(f"hf:{bert}", device="cpu", reads="response")([ASK, other], ["good", "good"])
    assert abs(both[0] - both[1]) > 1e-3
    assert alone[0] == pytest.approx(alone[1])


def test_hf_long_texts_keep_their_end(llama):
    long = "tell " * 60
    good, bad = scores(f"hf:{llama}", long + "good", long + "bad", device="cpu")
    assert abs(good - bad) > 1e-3
    assert len(scores(f"hf:{llama}", long, device="cpu", max_length=4)) == 1


def test_hf_row_without_a_token_is_marked_alone(tmp_path):
    words = tokenizer(eos_token="<eos>")
    words.save_pretrained(tmp_path)
    model = LlamaForSequenceClassification(LlamaConfig(**settings(num_labels=1, pad_token_id=None)))
    randomised(model).save_pretrained(tmp_path)
    reward = load(f"hf:{tmp_path}", device="cpu")
    rows = score({"it": reward}, [Prompt("e"), Prompt("f", text="tell")], ["", " me"])
    assert rows[0].error
    assert "nothing to score" in rows[0].error
    assert rows[1].error is None


def test_hf_labels_and_params_are_checked(bert):
    with pytest.raises(VasError, match=r"no label 'POSITVE'(.|\n)*'POSITIVE'"):
        load(f"hf:{bert}", label="POSITVE")
    with pytest.raises(VasError, match=r"no label 2(.|\n)*0 to 1"):
        load(f"hf:{bert}", label=2)
    with pytest.raises(VasError, match=r"'batchsize' is no param(.|\n)*'batch_size'"):
        load(f"hf:{bert}", batchsize=2)


def test_hf_version_follows_weights_and_params(bert, tmp_path):
    first = load(f"hf:{bert}").version
    assert load(f"hf:{bert}", batch_size=3, label="POSITIVE").version == first  # decide nothing
    assert load(f"hf:{bert}", label=0).version != first
    (bert / "README.md").write_text("about")
    assert load(f"hf:{bert}").version == first
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    assert load(f"hf:{bert}").version != first
    (bert / "config.json").write_text(json.dumps(config))


def test_hf_refuses_a_model_without_a_trained_head(tmp_path):
    tokenizer(eos_token="<eos>").save_pretrained(tmp_path)
    LlamaForCausalLM(LlamaConfig(**settings())).save_pretrained(tmp_path)
    reward = load(f"hf:{tmp_path}", device="cpu")
    with pytest.raises(VasError, match=r"lacks weights of a sequence classifier: score\.weight"):
        score({"it": reward}, [ASK], ["good"])


def test_hf_missing_model_is_one_clear_error(tmp_path):
    code = (
        "import sys\nfrom vas.config import Reward\nfrom vas.errors import VasError\n"
        "from vas.rewards import load_rewards\n"
        "try: load_rewards({'it': Reward(use='hf:' + sys.argv[1])})\n"
        "except VasError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    for model in ("nobody/nothing", str(tmp_path)):
        done = subprocess.run(
            [sys.executable, "-c", code, model], env=environment, capture_output=True, text=True, check=True
        )
        lines = done.stdout.strip().splitlines()
        assert lines[0].startswith(f"cannot load the reward model '{model}': ")
        assert "rewards.it.use" in lines[1]
        assert len(lines) == 3
