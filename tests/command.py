"""The command line as a user runs it, and small runs made by hand for it to work on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tiny import save_tiny_base, tiny_tokenizer, tiny_value

from vas.config import RunConfig, parse_config
from vas.models.value import ValueModel
from vas.run.directory import RunDirectory

ROOT = Path(__file__).parent.parent
PROMPTS = [f"What does the fox do on day {number}?" for number in range(8)]


def vas(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `vas WORDS` to its end, in a terminal wide enough that no line is broken."""
    return python("-m", "vas.cli.main", *map(str, words), timeout=timeout, **environment)


def python(*words: str, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with this checkout on its path."""
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=python_environment() | environment,
    )


def python_environment() -> dict[str, str]:
    """The environment of such a process."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "COLUMNS": "400", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a documentation page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C for a process that takes it well; returns what it says on stderr."""
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    return stderr


def message(text: str) -> str:
    """The text inside the frame of an error."""
    return "\n".join(re.sub(r"^│ ?|│$", "", line).rstrip() for line in text.splitlines() if line.startswith("│"))


def tiny_content(folder: Path, **changes: Any) -> dict[str, Any]:
    """A config over the tiny base model and a few prompts, all of them saved in `folder`."""
    base, prompts = folder / "base", folder / "prompts.txt"
    if not base.exists():
        save_tiny_base(base)
    prompts.write_text("\n".join(PROMPTS))
    return {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "base": {"model": str(base)},
        "prompts": {"source": str(prompts), "held_out": 0.5},
        "rewards": {"positive": {"use": "sentiment"}, "concise": {"use": "brevity"}},
        "rollouts": {"samples_per_prompt": 2, "sampling": {"max_tokens": 12}},
        "evaluation": {"best_of": [2], "candidates": 8},
    } | changes


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """The same, checked."""
    return parse_config(tiny_content(folder, **changes), "a test")


def tiny_run(folder: Path, value: ValueModel | None = None, **changes: Any) -> RunDirectory:
    """A run directory that looks trained: its value model is `value`, by default a random one."""
    run = RunDirectory.create(tiny_config(folder, **changes))
    value = value or tiny_value(objectives=("positive", "concise"))
    value.save(run.value, tiny_tokenizer(), "# A random value model")
    for stage in ("prompts", "rollouts", "train"):
        with run.stage(stage):
            pass
    return run
