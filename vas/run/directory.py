"""The run directory: where everything of a run lies, and `run.json`, which says how far it is."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vas
from vas import storage
from vas.config import RunConfig, override, parse_config
from vas.errors import VasError, nearest

VERSIONS_OF = ("ray", "torch", "transformers", "deepspeed", "pyarrow")


class RunDirectory:
    """A run's files, by the design's data contract.

    run.json  prompts/  rollouts/round=0/  value/NAME/  train/  evaluation/
    """

    def __init__(self, location: str, config: RunConfig, record: dict[str, Any]) -> None:
        self.location, self.config, self._record = location, config, record

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Open the config's run, or begin it; a run that finished no stage begins anew.

        Raises VasError if the directory holds a run of another config, or cannot be written.
        """
        location = storage.absolute(storage.join(config.runs_dir, config.name))
        if storage.exists(storage.join(location, "run.json")):
            run = cls.open(location)
            if any(map(run.done, run._record["stages"])):  # else a first attempt's mistake would lock the name
                run._adopt(config)
                return run
        record = {
            "config": config.model_dump(mode="json"),
            "digest": config.digest(),
            "created": _now(),
            "git_revision": git_revision(),
            "versions": versions(),
            "stages": {},
        }
        run = cls(location, config, record)
        run._save()
        return run

    @classmethod
    def open(cls, location: str, overrides: Iterable[str] = ()) -> RunDirectory:
        """Open a run that exists. Raises VasError if there is none, or an override makes it another run."""
        location = storage.absolute(location)
        file = storage.join(location, "run.json")
        if not storage.exists(file):
            folder = Path(location).parent
            names = [p.parent.name for p in folder.glob("*/run.json")] if not storage.is_remote(location) else []
            raise VasError(
                "there is no run here (no run.json)",
                location,
                nearest(Path(location).name, names) if names else "`vas run CONFIG` makes one",
            )
        try:
            record = json.loads(storage.read_bytes(file))
            config = parse_config(record["config"], file)
            record["digest"], record["stages"]  # the rest of the code relies on them
        except (ValueError, KeyError, TypeError) as error:
            mend = "restore the file, or remove the directory"
            raise VasError(f"run.json is damaged: {type(error).__name__}: {error}", file, mend) from None
        run = cls(location.rstrip("/"), config, record)
        if overrides:
            run._adopt(parse_config(override(config.model_dump(mode="json"), overrides), file))
        return run

    def _adopt(self, config: RunConfig) -> None:
        """Take a config whose `resources` may differ; any other difference is another run."""
        if config.digest() != self._record["digest"]:
            raise VasError(
                f"this directory holds a run of another config: {'; '.join(_differences(self.config, config))}",
                self.location,
                "give the run another `name` (--set name=…), or remove the directory",
            )
        self.config = config

    def path(self, *parts: str) -> str:
        """A location inside the run."""
        return storage.join(self.location, *parts)

    @property
    def rollouts(self) -> str:
        return self.path("rollouts", "round=0")

    @property
    def value(self) -> str:
        return self.path("value", self.config.value.name)

    @property
    def revision(self) -> str:
        """Git revision the run began at."""
        return self._record["git_revision"]

    def done(self, stage: str) -> bool:
        """True if the stage has finished."""
        return self._record["stages"].get(stage, {}).get("state") == "done"

    def about(self, stage: str) -> dict[str, Any]:
        """What the stage left in run.json."""
        return self._record["stages"].get(stage, {})

    def seconds(self) -> dict[str, float]:
        """Time spent in each stage, interrupted attempts left out."""
        return {name: entry["seconds"] for name, entry in self._record["stages"].items() if "seconds" in entry}

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage: its entry in run.json says `running`, then `done` with what the block put in.

        A failure or interruption leaves `interrupted`, and the next run goes on.
        """
        entry: dict[str, Any] = {"state": "running", "started": _now()}
        self._record["stages"][name] = entry
        self._save()
        began = time.monotonic()
        try:
            yield entry
        except BaseException:
            entry["state"] = "interrupted"
            self._save()
            raise
        entry |= {"state": "done", "seconds": round(time.monotonic() - began, 1), "finished": _now()}
        self._save()

    def _save(self) -> None:
        storage.write_bytes(self.path("run.json"), json.dumps(self._record, indent=2).encode())


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    return {"vas": vas.__version__, "python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in VERSIONS_OF
    }


def git_revision() -> str:
    """The checkout's revision, `+` if it has uncommitted changes; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys in which two configs differ, `resources` left out."""

    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        items = [flat(inner, f"{prefix}.{key}" if prefix else key) for key, inner in value.items()]
        return {key: inner for item in items for key, inner in item.items()}

    exclude = {"resources", "runs_dir"}
    was, now = (
        flat(old.model_dump(mode="json", exclude=exclude)),
        flat(new.model_dump(mode="json", exclude=exclude)),
    )
    return [
        f"{key} was {was.get(key)}, now {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key)
    ]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
