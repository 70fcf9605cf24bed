"""Bad input through the real command line: one readable block, exit code 2, and nothing lost."""

import contextlib
import json
import socket
from pathlib import Path

import pyarrow as pa
import pytest
import ray
import yaml
from command import message, tiny_content, tiny_run, vas
from tiny import tiny_value

from vas import schema, storage
from vas.cli.serve import _last, serve_forever
from vas.config import load_config
from vas.errors import VasError
from vas.rewards import load_rewards
from vas.run.directory import RunDirectory
from vas.run.stages import _check_rewards, _warn_of_nothing_learned, prepare
from vas.serving.keys import load_keys

REWARDS = '''
def bad(prompts, responses):
    """Raises for half the prompts and is no number for the others."""
    if len(prompts) > 1:
        raise TypeError("one at a time, please")
    if int(prompts[0].last_user_text().split()[-1].rstrip("?")) % 2:
        raise ValueError("the scorer is out of order")
    return [float("nan")]


def good(prompts, responses):
    return [float(len(response)) + i for i, response in enumerate(responses)]
'''


def refused(*words, **environment) -> str:
    """What the error block says of a command that must be refused."""
    found = vas(*words, **environment)
    both = found.stdout + found.stderr
    assert found.returncode == 2, both
    assert "Traceback" not in both
    assert found.stderr.count("╭─ error ") == 1, both
    text = message(found.stderr)
    assert text, both
    return text


@pytest.fixture
def write(tmp_path):
    """Writes the tiny config, with sections changed."""

    def write(**changes) -> Path:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(tiny_content(tmp_path, **changes), sort_keys=False))
        return file

    return write


def contents(folder: str) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def test_an_unknown_key(write):
    file = write(train={"epocs": 3})
    text = refused("run", file)
    assert "train.epocs: unknown key, did you mean 'epochs'?" in text
    assert f"where: {file}" in text
    assert not (file.parent / "runs").exists()


def test_a_file_that_is_not_there(tmp_path):
    text = refused("run", tmp_path / "none.yaml")
    assert "cannot read the config: No such file" in text
    assert f"where: {tmp_path / 'none.yaml'}" in text
    assert "mend: " in text


def test_a_malformed_line_of_json(write, tmp_path):
    lines = [json.dumps({"prompt": f"What is {number}?"}) for number in range(6)]
    lines[3] = '{"prompt": "What is'
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    text = refused("config", "check", write(prompts={"source": str(tmp_path / "bad.jsonl")}))
    assert "it is not JSON" in text
    assert f"where: {tmp_path / 'bad.jsonl'}:4" in text
    assert "one JSON object a line" in text


def test_an_empty_prompt_set_and_then_the_mended_one(write, tmp_path):
    """A first attempt that came to nothing does not stand in the way of the second."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    text = refused("run", write(prompts={"source": str(tmp_path / "empty.jsonl")}))
    assert "the prompt set is empty" in text
    assert f"where: {tmp_path / 'empty.jsonl'}" in text
    again = refused("run", write(base={"model": "no/such-model"}))
    assert "no/such-model" in again
    assert "another config" not in again


def test_a_model_that_does_not_exist(write):
    text = refused("config", "check", write(base={"model": "nobody/no-such-model"}), HF_HUB_OFFLINE="1")
    assert "cannot load the model" in text
    assert "where: nobody/no-such-model" in text
    assert "check the id or path" in text


def test_a_folder_of_a_model_that_does_not_exist(write, tmp_path):
    text = refused("config", "check", write(base={"model": str(tmp_path / "nowhere")}))
    assert f"where: {tmp_path / 'nowhere'}" in text
    assert "the folder does not exist" in text


def test_a_reward_that_fails_on_every_row(write, tmp_path):
    """The one test here that runs the pipeline: what was sampled stays, with the reason beside it."""
    (tmp_path / "mine.py").write_text(REWARDS)
    file = write(rewards={"mine": {"use": f"python:{tmp_path / 'mine.py'}:bad"}})
    text = refused("run", file, "--set", "resources.num_cpus=1")
    assert "every rollout failed" in text
    assert "8 × mine: ValueError: the scorer is out of order" in text
    assert "8 × mine: returned nan" in text
    run = tmp_path / "runs" / "tiny"
    assert str(run / "rollouts" / "round=0") in text
    rows = storage.read_table(storage.list_files(str(run / "rollouts" / "round=0"))).to_pylist()
    assert len(rows) == 16
    assert all(row["error"] and row["finish_reason"] == "error" and row["response_token_ids"] for row in rows)
    assert json.loads((run / "run.json").read_text())["stages"]["rollouts"]["state"] == "interrupted"


def test_a_value_model_of_another_tokenizer(tmp_path):
    other = tiny_value(objectives=("positive", "concise"), seed=8)
    other.config.tokenizer_digest = "0123456789abcdef"
    run = tiny_run(tmp_path, other)
    text = refused("generate", run.location, "Hello", "-s", "positive=2")
    assert "different tokenizers" in text
    assert "value model of tiny-llama (0123456789abcdef)" in text
    assert f"base model {tmp_path / 'base'} (" in text
    assert "mend: " in text


def test_a_damaged_value_model(tmp_path):
    run = tiny_run(tmp_path)
    weights = Path(run.value, "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    text = refused("generate", run.location, "Hello", "-s", "positive=2")
    assert "cannot load a value model" in text
    assert f"where: {run.value}" in text


def test_a_strength_that_is_not_finite(trained):
    text = refused("generate", trained.location, "Hello", "--strength", "positive=nan")
    assert "not a finite number" in text
    assert "--strength positive=nan" in text
    assert "give a number, e.g. 2" in text


@pytest.mark.parametrize("below", ["/dev/null", "FILE"])
def test_a_place_that_cannot_be_written(write, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    place = f"{below.replace('FILE', str(tmp_path / 'file'))}/runs"
    text = refused("run", write(), "--set", f"runs_dir={place}")
    assert "cannot write here: Not a directory" in text
    assert f"where: {place}/tiny/run.json" in text
    assert "check the path, its rights and free space" in text
    assert (tmp_path / "file").read_text() == "mine"


def test_the_run_directory_of_another_config(write, tmp_path):
    run = tiny_run(tmp_path)
    storage.write_bytes(f"{run.rollouts}/1.parquet", b"rows that took a night")
    before = contents(run.location)
    for words in (["run", write(seed=1)], ["train", run.location, "--set", "seed=1"]):
        text = refused(*words)
        assert "another config: seed was 0, now 1" in text
        assert f"where: {run.location}" in text
        assert "--set name=" in text
    assert contents(run.location) == before


def test_a_reward_that_changes_within_a_run(write, tmp_path):
    module = tmp_path / "changing.py"
    module.write_text("def good(prompts, responses):\n    return [1.0 for _ in responses]\n")
    file = write(
        rewards={"good": {"use": f"python:{module}:good"}}, evaluation={"strengths": [{"good": 1}], "best_of": []}
    )
    prepare(run := RunDirectory.create(load_config(str(file))))
    versions = {name: reward.version for name, reward in load_rewards(run.config.rewards).items()}
    storage.write_bytes(run.path("rollouts", "rewards.json"), json.dumps(versions).encode())
    module.write_text("def good(prompts, responses):\n    return [2.0 for _ in responses]\n")
    for error in ("the reward failed", None):
        row = {"prompt_id": "a", "error": error}
        table = pa.Table.from_pylist([row], schema=schema.rollout_schema(["good"]))
        storage.write_table(run.path("rollouts", "round=0", "a.parquet"), table)
        refusal = pytest.raises(VasError, match="'good' has changed since this run")
        with contextlib.nullcontext() if error else refusal:  # as long as nothing is scored it may be mended
            _check_rewards(run)
        storage.write_bytes(run.path("rollouts", "rewards.json"), json.dumps(versions).encode())
    assert "`vas rollout CONFIG --from" in refused("rollout", file)


def test_a_port_that_is_taken(trained):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(VasError, match=rf"cannot listen there: Address already in use(.|\n)*127.0.0.1:{port}"):
            serve_forever(trained.location, [], "127.0.0.1", port)


@pytest.mark.parametrize("name", ["Alice Smith", ""])
def test_a_name_for_a_key_that_its_file_could_not_hold(name):
    assert "name: " in refused("key", name)


def test_a_name_for_a_key_that_looks_like_a_number(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + vas("key", "2024").stdout)
    assert [key.name for key in load_keys(str(file))] == ["2024"]


@pytest.mark.parametrize("content", ["applications: []", "applications: 3"])
def test_a_config_to_deploy_without_an_application(tmp_path, content):
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    with pytest.raises(VasError, match="there is no application in this config"):
        serve_forever(str(file), [], "127.0.0.1", 0)


def test_an_endpoint_with_a_keys_file_that_is_not_there(trained):
    with pytest.raises(VasError, match=r"no file of API keys here(.|\n)*gate.keys: nokeys.yaml(.|\n)*vas key"):
        serve_forever(trained.location, ["gate.keys=nokeys.yaml"], "127.0.0.1", 0)


def test_an_endpoint_with_a_preset_of_no_objective(trained):
    preset = "gate.presets.kind={objectives: {positiv: 2}}"
    with pytest.raises(VasError, match=r"no objective 'positiv'\n  where: gate.presets.kind\n.*'positive'"):
        serve_forever(trained.location, [preset], "127.0.0.1", 0)
    assert not ray.is_initialized()


def test_an_endpoint_of_the_config_of_a_run(trained, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(trained.config.yaml())
    with pytest.raises(VasError, match=f"config of a run(.|\n)*vas serve {trained.location}"):
        serve_forever(str(file), [], "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "Traceback:\n  File x\nvas.errors.VasError: what\n  where: here\n  mend:  so\n",
            "what, where: here, mend:  so",
        ),
        (
            "Traceback:\nvas.errors.VasError: 2 mistakes:\n  - a: no\n  - b: no\n  where: here\n",
            "2 mistakes: a: no, b: no, where: here",
        ),
        ("ValueError: one\n\nThe cause\nray.exceptions.RayError: two\nmore", "ray.exceptions.RayError: two"),
        ("no replica\nwas placed", "was placed"),
    ],
)
def test_of_a_deployments_traceback_the_last_error_is_told(message, said):
    assert _last(message) == said


def test_a_run_that_is_not_there(trained):
    text = refused("generate", trained.location.replace("tiny", "tinny"), "Hello")
    assert "there is no run here" in text
    assert "did you mean 'tiny'?" in text


def test_a_stage_before_its_turn(tmp_path):
    run = tiny_run(tmp_path)
    record = json.loads(storage.read_bytes(run.path("run.json")))
    del record["stages"]["train"]
    storage.write_bytes(run.path("run.json"), json.dumps(record).encode())
    assert f"vas train {run.location}" in refused("evaluate", run.location)
    assert f"vas run {run.location}" in refused("generate", run.location, "Hello", "-s", "positive=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that looks trained; no test changes it."""
    run = tiny_run(tmp_path_factory.mktemp("trained"))
    before = contents(run.location)
    yield run
    assert contents(run.location) == before


def test_a_value_model_that_has_learned_nothing_is_told(capsys):
    _warn_of_nothing_learned({"positive": 0.4})
    assert capsys.readouterr().err == ""
    _warn_of_nothing_learned({"positive": 0.4, "brief": -0.1, "formal": float("nan")})
    assert "hardly learned brief or formal:" in capsys.readouterr().err
