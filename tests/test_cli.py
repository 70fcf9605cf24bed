"""The command line: quick to start, helpful, and the same text for the same seed."""

import json
import re
import subprocess
import sys
import time
from importlib import metadata

import pytest
import yaml
from command import interrupt, python, python_environment, tiny_content, tiny_run, vas

from vas.cli.main import _unraisable
from vas.config import load_config

HEAVY = ("torch", "ray", "transformers", "deepspeed")
COMMANDS = [
    *("", "run", "rollout", "train", "evaluate", "generate", "rewards", "config", "config show", "config check"),
    *("value", "value show", "value score", "value push", "value distill"),
]

# A process that runs the command line and says at the end what it had imported.
SPY = """
import sys
from vas.cli.main import main
try:
    main()
finally:
    print("imported", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def imported(stderr: str) -> set[str]:
    return set(stderr.splitlines()[-1].split()[1:])


# --- quick --------------------------------------------------------------------------------------


def test_importing_vas_is_cheap():
    code = "import time; t = time.perf_counter(); import vas, sys; print(time.perf_counter() - t, *sys.modules)"
    runs = [python("-c", code).stdout.split() for _ in range(3)]
    assert min(float(run[0]) for run in runs) < 1.0
    for run in runs:
        assert not {name.partition(".")[0] for name in run[1:]} & {*HEAVY, "numpy", "pyarrow"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command):
    found = python("-c", SPY, *command.split(), "--help")
    assert found.returncode == 0
    assert "Usage: " in found.stdout
    assert not imported(found.stderr) & set(HEAVY)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in ("", "config", "value")])
def test_help_shows_an_example(command):
    found = vas(*command.split(), "--help")
    assert f"Example: vas {command}" in found.stdout


def test_bare_vas_says_how_to_start():
    found = vas()
    assert "vas run configs/demo.yaml" in found.stdout
    for command in ("run", "rollout", "train", "evaluate", "generate", "rewards", "config"):
        assert f" {command} " in found.stdout


def test_the_version_is_told():
    assert vas("--version").stdout.strip() == metadata.version("vas")


# --- looking around -----------------------------------------------------------------------------


def test_rewards_lists_the_built_in_ones_on_stdout():
    found = python("-c", SPY, "rewards")
    assert found.returncode == 0
    for name in ("sentiment", "brevity", "length", "readability", "profanity", "contains", "hf:MODEL", "python:"):
        assert name in found.stdout
    assert "limit=30" in found.stdout
    assert not imported(found.stderr) & {"torch", "ray"}


def test_config_show_prints_a_config_of_the_same_run(tmp_path):
    file, again = tmp_path / "config.yaml", tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(tiny_content(tmp_path), sort_keys=False))
    found = python("-c", SPY, "config", "show", str(file), "--set", "train.lr=3e-5", "--set", "prompts.system=Füchse")
    assert found.returncode == 0
    again.write_text(found.stdout)
    first = load_config(file, ["train.lr=3e-5", "prompts.system=Füchse"])
    assert load_config(again) == first
    assert found.stdout.startswith(f"# digest {first.digest()}\n")
    assert not imported(found.stderr) & set(HEAVY)


def test_config_check_says_that_all_is_fine(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tiny_content(tmp_path), sort_keys=False))
    found = vas("config", "check", file)
    assert found.returncode == 0
    assert "is fine: 8 prompts (" in found.stderr
    assert "rewards positive, concise" in found.stderr
    assert not (tmp_path / "runs").exists()


def test_an_unknown_command_or_option_is_a_usage_error():
    for words in (["rnu"], ["run"], ["generate", "x", "y", "--max-tokens", "0"]):
        found = vas(*words)
        assert found.returncode == 2
        assert "Usage: " in found.stderr
        assert "Traceback" not in found.stderr


def test_an_interruption_says_that_what_is_finished_is_kept(tmp_path):
    """Ctrl-C while a command works: here, while it waits for its config on a pipe."""
    code = (
        "import os; from vas.cli.main import main; import sys; os.mkfifo(sys.argv[1]); "
        "sys.argv = ['vas', 'config', 'show', sys.argv[1]]; main()"
    )
    pipe = tmp_path / "config.yaml"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(pipe)], stderr=subprocess.PIPE, text=True, env=python_environment()
    )
    while not pipe.exists():
        time.sleep(0.05)
    time.sleep(0.5)  # now it waits in open()
    assert "Interrupted" in interrupt(process)


# --- vas generate -------------------------------------------------------------------------------

TOLD = r"seed \d+: (\d+ tokens|cut at \d+ tokens \(--max-tokens\))(, \d+\.\d nats from the base model)?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("cli"), prompts={"source": "bundled:demo", "system": "Be a fox."})


@pytest.fixture(scope="module")
def answers(run):
    """What `vas generate` prints with various options, all from one process: importing torch takes seconds."""
    options = {
        "base": [],
        "base again": [],
        "other seed": ["--seed", "1"],
        "zero": ["-s", "positive=0"],
        "guided": ["-s", "positive=4"],
        "guided again": ["--strength", "positive=4", "--plain"],
        "inverted": ["-s", "positive=-4"],
        "composed": ["-s", "positive=4", "-s", "concise=4"],
        "three": ["-n", "3", "-s", "positive=4"],
        "greedy": ["--temperature", "0", "--seed", "5"],
        "greedy again": ["--temperature", "0", "--seed", "6"],
        "short": ["--max-tokens", "2"],
    }
    code = (
        "import json, sys; from vas.cli.main import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['vas', *words]\n"
        "    try: main()\n"
        "    except SystemExit as ended: assert not ended.code, ended\n"
        "    print('\\x1e', end='')\n"
    )
    words = [["generate", run.location, "What does the fox do?", *option] for option in options.values()]
    found = python("-c", code, json.dumps(words))
    assert found.returncode == 0, found.stderr
    told = found.stderr.splitlines()
    assert all(re.fullmatch(TOLD, line) for line in told), "a line about each response, and nothing else"
    assert len(told) == len(options) + 2
    assert told[-1].startswith("seed 0: cut at 2 tokens")
    return dict(zip(options, found.stdout.split("\x1e"), strict=False))


def test_the_same_seed_gives_the_same_text_and_another_seed_another(answers):
    assert answers["base"].strip()
    assert answers["base"] == answers["base again"]
    assert answers["base"] != answers["other seed"]
    assert answers["guided"] == answers["guided again"]
    assert answers["greedy"] == answers["greedy again"]


def test_strength_steers_and_zero_is_no_strength(answers):
    assert answers["zero"] == answers["base"]
    assert len({answers[name] for name in ("base", "guided", "inverted", "composed")}) == 4


def test_samples_take_the_seeds_that_follow(answers):
    assert answers["three"].startswith(answers["guided"])
    assert len(answers["three"]) > len(answers["guided"])


def test_max_tokens_cuts(answers):
    assert answers["base"].startswith(answers["short"].rstrip("\n"))
    assert len(answers["short"]) < len(answers["base"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["-s", "positve=2"], "did you mean 'positive'?"),
        (["-s", "positive"], "a strength reads OBJECTIVE=NUMBER"),
        (["-s", "positive=much"], "a strength reads OBJECTIVE=NUMBER"),
        (["--temperature", "-1"], "temperature is out of its range"),
    ],
)
def test_what_cannot_be_asked_for_is_said_at_once(run, words, says):
    found = python("-c", SPY, "generate", run.location, "Hello", *words)
    assert found.returncode == 2
    assert says in found.stderr
    assert not imported(found.stderr) & set(HEAVY)
    assert "Traceback" not in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize(("module", "shown"), [("ray.data._internal", False), ("vas.run", True)])
def test_what_rays_objects_raise_while_they_are_collected_shows_no_stack(module, shown, capfd, monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", _unraisable)

    class Iterator:
        def __del__(self):
            raise RuntimeError("the cluster is gone")

    Iterator.__del__.__module__ = module
    made = Iterator()
    del made
    assert ("the cluster is gone" in capfd.readouterr().err) is shown
