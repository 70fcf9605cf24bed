"""The config: every mistake is named with its key and its mend; the digest identifies a run."""

import random
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from vas.config import RunConfig, load_config, parse_config
from vas.configfile import override
from vas.errors import VasError

CONFIGS = Path(__file__).parent.parent / "configs"

LEAST = {
    "name": "least",
    "base": {"model": "bundled:smollm2-135m-instruct"},
    "prompts": {"source": "bundled:demo"},
    "rewards": {"positive": {"use": "sentiment"}, "brief": {"use": "brevity", "params": {"limit": 30}}},
}


def config(*overrides: str) -> RunConfig:
    return parse_config(override(deepcopy(LEAST), overrides), "test")


def mistake(*overrides: str) -> str:
    with pytest.raises(VasError) as caught:
        config(*overrides)
    return str(caught.value)


@pytest.fixture
def write(tmp_path):
    """Writes a config file: text, bytes, or a mapping as YAML."""

    def write(content):
        path = tmp_path / "config.yaml"
        if not isinstance(content, str | bytes):
            content = yaml.safe_dump(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


# --- unknown keys and wrong values --------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sede", "seed"),
        ("trian", "train"),
        ("train.lrr", "lr"),
        ("train.batchsize", "batch_size"),
        ("rollouts.sampling.temprature", "temperature"),
        ("evaluation.candidate", "candidates"),
        ("resources.num_cpu", "num_cpus"),
        ("rewards.positive.usee", "use"),
        ("rewards.positive.parms", "params"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(key, nearest):
    text = mistake(f"{key}=1")
    assert f"{key}: unknown key, did you mean '{nearest}'?" in text
    assert "where: test" in text


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_the_examples_are_right(file):
    assert load_config(file).name == file.stem


def test_an_unknown_key_that_resembles_none_lists_them_all():
    assert "prompts.zzz: unknown key, known: field, held_out, limit, source, system" in mistake("prompts.zzz=1")


def test_an_objective_named_like_a_key_does_not_mislead_the_suggestion():
    assert "rewards.train.usee: unknown key, did you mean 'use'?" in mistake("rewards.train={use: length, usee: 1}")


def test_all_mistakes_are_told_at_once():
    text = mistake("train.lrr=1", "train.epochs=0", "rewards.positive.usee=x", "base.model=3")
    assert text.startswith("the config has 4 mistakes")
    for key in ("train.lrr", "train.epochs", "rewards.positive.usee", "base.model"):
        assert f"{key}: " in text


def test_a_required_key_is_named():
    with pytest.raises(VasError, match="has 3 mistakes") as caught:
        parse_config({"name": "x"}, "test")
    for key in ("base", "prompts", "rewards"):
        assert f"{key}: this key is required" in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        "name=a/b",
        "name=.hidden",
        "name=",
        "seed=-1",
        "seed=1.5",
        "base.dtype=int8",
        "prompts.held_out=0",
        "prompts.held_out=1",
        "prompts.limit=0",
        "rewards={}",
        "rollouts.samples_per_prompt=none",
        "rollouts.sampling.top_p=0",
        "rollouts.sampling.temperature=0.0005",
        "rollouts.sampling.stop=word",
        "value.head=linear",
        "train.lr=0",
        "train.td_lambda=1.1",
        "evaluation.best_of=[1]",
        "evaluation.baseline=median",
        "resources.object_store_memory=1000",
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named_by_its_key(setting):
    assert f"mistake: {setting.partition('=')[0]}" in mistake(setting)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("key", ["train.lr", "train.weight_decay", "rollouts.sampling.temperature"])
def test_numbers_must_be_finite(key, number):
    assert f"mistake: {key}: " in mistake(f"{key}={number}")


# --- what must fit together ---------------------------------------------------------------------


def test_best_of_n_needs_n_samples():
    text = mistake("evaluation.best_of=[2, 16]")
    assert "evaluation.best_of asks for 16 samples a prompt but rollouts.samples_per_prompt is 8" in text
    assert config("evaluation.best_of=[2, 16]", "rollouts.samples_per_prompt=16").evaluation.best_of == [2, 16]


def test_strengths_name_objectives():
    assert "'positve', which is no objective: did you mean 'positive'?" in mistake(
        "evaluation.strengths=[{positve: 2}]"
    )


@pytest.mark.parametrize("strength", [".nan", ".inf", "-.inf"])
def test_a_strength_is_a_finite_number(strength):
    text = mistake(f"evaluation.strengths=[{{positive: 2}}, {{brief: {strength}}}]")
    assert "evaluation.strengths.1.brief" in text
    assert "finite number" in text


def test_the_default_strengths_are_each_objective_alone_and_all_together():
    alone = [{name: beta} for name in ("positive", "brief") for beta in (2.0, 4.0, 8.0)]
    assert config().evaluation.strengths == [*alone, {"positive": 4.0, "brief": 4.0}]


# --- overrides ----------------------------------------------------------------------------------


def test_overrides_set_nested_keys_of_every_type():
    found = config(
        "seed=7",
        "train.lr=1e-4",
        "train.weight_decay=1E-2",
        "prompts.system='Answer: briefly.'",
        "prompts.limit=null",
        "rollouts.sampling.stop=['a', \"b\"]",
        "train.train_embeddings=true",
        "train.deepspeed.zero_optimization.stage=2",
        "rewards.brief.params.limit=12",
        "evaluation.strengths=[{positive: 1e1}]",
    )
    assert found.seed == 7
    assert found.train.lr == 1e-4
    assert found.train.weight_decay == 1e-2
    assert found.prompts.limit is None
    assert found.rollouts.sampling.stop == ["a", "b"]
    assert found.train.train_embeddings
    assert found.train.deepspeed == {"zero_optimization": {"stage": 2}}
    assert found.rewards["brief"].params == {"limit": 12}
    assert found.evaluation.strengths == [{"positive": 10.0}]


def test_a_later_override_wins_and_text_may_hold_an_equals_sign():
    assert config("seed=1", "seed=2").seed == 2
    assert config("rewards.x={use: contains, params: {pattern: 'a=b'}}").rewards["x"].params == {"pattern": "a=b"}


@pytest.mark.parametrize("name", ["nan", "inf", "infinity", "no-1e5", "v1"])
def test_an_override_leaves_words_alone(name):
    assert config(f"name={name}").name == name


@pytest.mark.parametrize("text", ["seed", "=1", ""])
def test_an_override_without_key_or_value_is_refused(text):
    found = mistake(text)
    assert "an override must read key=value" in found
    assert f"--set {text}" in found


def test_an_override_that_is_no_yaml_is_quoted():
    text = mistake("train.lr=[1, 2")
    assert "not valid YAML" in text
    assert "where: --set train.lr=[1, 2" in text


def test_a_date_that_there_is_not_is_told_of():
    with pytest.raises(VasError, match=r"not valid YAML: month must be in 1..12"):
        config("name=2024-13-45")


def test_an_override_below_a_plain_value_is_refused():
    assert "'name' is a value, not a section" in mistake("name.first=1")


def test_numbers_in_exponent_form_are_numbers_wherever_they_stand(write):
    text = yaml.safe_dump(LEAST) + "train: {lr: 3e-4, deepspeed: {zero: {size: 5e8}}}\n"
    found = load_config(write(text))
    assert found.train.lr == 3e-4
    assert found.train.deepspeed == {"zero": {"size": 5e8}}


# --- files --------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(VasError) as caught:
        load_config(tmp_path / "none.yaml")
    assert str(tmp_path / "none.yaml") in str(caught.value)
    assert "No such file" in str(caught.value)
    assert "configs/" in str(caught.value)


def test_a_directory_is_no_config(tmp_path):
    with pytest.raises(VasError, match="cannot read the config"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: [1, 2\nseed: 3", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("seed: 1\x00", "not valid YAML"),
        (b"name: caf\xe9", "not UTF-8"),
        ("- a\n- b", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_a_file_that_is_no_config_is_refused(write, content, says):
    path = write(content)
    with pytest.raises(VasError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_malformed_yaml_is_located_by_line(write):
    with pytest.raises(VasError, match="line 3"):
        load_config(write("name: x\nseed: 1\n  base: {\n"))


# --- identity -----------------------------------------------------------------------------------


def test_the_digest_is_stable():
    """Digests lie in people's run.json: a change here shuts them out of their runs."""
    assert config().digest() == config().digest()
    assert len(config().digest()) == 16
    int(config().digest(), 16)


def test_the_digest_does_not_know_where_a_run_computes():
    there = config("resources.workers=4", "resources.address=auto", "resources.gpus_per_actor=0.5", "runs_dir=s3://b/r")
    assert there.digest() == config().digest()


def test_the_digest_does_not_depend_on_the_order_of_keys():
    shuffled = random.Random(0)

    def shuffle(value):
        if not isinstance(value, dict):
            return value
        items = [(key, shuffle(inner)) for key, inner in value.items()]
        shuffled.shuffle(items)
        return dict(items)

    base = config().model_dump(mode="json")
    digests = {parse_config(shuffle(base), "test").digest() for _ in range(5)}
    assert digests == {config().digest()}


CHANGES = [
    "name=other",
    "seed=1",
    "base.model=other",
    "base.dtype=bfloat16",
    "base.revision=v2",
    "prompts.source=other.jsonl",
    "prompts.field=text",
    "prompts.system=Be kind.",
    "prompts.held_out=0.3",
    "prompts.limit=5",
    "rewards.brief.params.limit=31",
    "rewards.brief.use=length",
    "rewards.more={use: length}",
    "rollouts.samples_per_prompt=9",
    "rollouts.batch_size=64",
    "rollouts.sampling.temperature=0.7",
    "rollouts.sampling.stop=['.']",
    "value.name=other",
    "value.layers=6",
    "value.head=scalar",
    "value.label=two_hot",
    "train.td_lambda=0.9",
    "train.lr=2e-4",
    "train.deepspeed={zero_optimization: {stage: 3}}",
    "evaluation.best_of=[2]",
    "evaluation.strengths=[{positive: 1}]",
    "evaluation.value=soft",
    "evaluation.bootstrap=100",
]


def test_anything_else_changes_the_digest():
    digests = [config(change).digest() for change in [*CHANGES, "seed=0"]]
    assert len(set(digests)) == len(digests)


def test_the_resolved_yaml_is_a_config_of_the_same_run(write):
    first = config("prompts.system=Füchse – ja!", "rollouts.sampling.stop=['\n', ': ', '1e5']", "train.lr=1e-5")
    again = load_config(write(first.yaml()))
    assert again == first
    assert again.digest() == first.digest()
    assert "Füchse" in first.yaml()
