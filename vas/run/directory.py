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
from vas.config import RunConfig, parse_config
from vas.configfile import override
from vas.errors import VasError, nearest
from vas.run import lock

VERSIONS_OF = ("ray", "torch", "transformers", "deepspeed", "pyarrow")


def place_of(location: str) -> tuple[str, str]:
    """The `runs_dir` and the `name` of a run at a location. Raises VasError for a bucket, which has no name for it."""
    parent, _, name = storage.absolute(location).rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise VasError(
            "a run cannot be a whole bucket", location, f"give it a path there: {location.rstrip('/')}/runs/mine"
        )
    return parent or "/", name


class RunDirectory:
    """A run's files, by the design's data contract.

    run.json  prompts/  rollouts/round=0/  value/NAME/  train/  evaluation/
    """

    def __init__(self, location: str, config: RunConfig, record: dict[str, Any], version: str | None = None) -> None:
        """version: what `storage` calls the run.json that the record was read from; None if it was not."""
        self.location, self.config, self._record, self._version = location, config, record, version
        self._lock: lock.FileLock | lock.Lease | None = None
        self._depth = 0  # of `held` blocks

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Open the config's run, or begin it; a run that finished no stage begins anew.

        Raises VasError if the directory holds a run of another config, or cannot be written.
        """
        location = storage.absolute(storage.join(config.runs_dir, config.name))
        new = cls(
            location,
            config,
            {
                "config": config.model_dump(mode="json"),
                "digest": config.digest(),
                "created": _now(),
                "git_revision": git_revision(),
                "versions": versions(),
                "stages": {},
            },
        )
        fresh = not storage.exists(new.path("run.json"))
        if fresh and new._begin():
            return new
        run = cls.open(location)  # if `fresh`, another process began it at this moment
        if not fresh and not run._finished_any():
            with run.held():
                if not run._finished_any():  # else a first attempt's mistake would lock the name
                    run.config, run._record = config, new._record
                    run._save()
        run._adopt(config)
        return run

    @classmethod
    def open(cls, location: str, overrides: Iterable[str] = ()) -> RunDirectory:
        """Open a run that exists. Raises VasError if there is none, or an override makes it another run."""
        location = storage.absolute(location)
        file = storage.join(location, "run.json")
        found = storage.read_version(file)
        if found is None:
            folder = Path(location).parent
            names = [p.parent.name for p in folder.glob("*/run.json")] if not storage.is_remote(location) else []
            raise VasError(
                "there is no run here (no run.json)",
                location,
                nearest(Path(location).name, names) if names else "`vas run CONFIG` makes one",
            )
        try:
            record = json.loads(found[0])
            config = parse_config(record["config"], file)
            record["digest"], record["stages"]  # the rest of the code relies on them
        except (ValueError, KeyError, TypeError) as error:
            mend = "restore the file, or remove the directory"
            raise VasError(f"run.json is damaged: {type(error).__name__}: {error}", file, mend) from None
        run = cls(location.rstrip("/"), config, record, found[1])
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
    def held(self) -> Iterator[None]:
        """Work on the run, alone: no other process does while the block lasts. Such blocks may lie inside each other.

        Raises VasError if another process works on the run, if it is another config's by now, and at the end of the
        block if another process took it over. Who only reads need not hold it.
        """
        with lock.hold(self.location) as self._lock:
            self._depth += 1
            try:
                if self._depth == 1:  # others may have worked on it since it was opened
                    now = RunDirectory.open(self.location)
                    now._adopt(self.config)
                    self._record, self._version = now._record, now._version
                yield
            finally:
                self._depth -= 1

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage: its entry in run.json says `running`, then `done` with what the block put in.

        A failure or interruption leaves `interrupted`, and the next run goes on. The run is held meanwhile.
        """
        with self.held():
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

    def _finished_any(self) -> bool:
        return any(map(self.done, self._record["stages"]))

    def _begin(self) -> bool:
        """Write the first run.json; False if there is one by now."""
        self._version = storage.write_new(self.path("run.json"), self._content())
        return self._version is not None

    def _save(self) -> None:
        """Write run.json. Raises VasError if another process took the run over."""
        if isinstance(self._lock, lock.Lease):
            self._lock.check()
        assert self._version is not None
        version = storage.write_over(self.path("run.json"), self._content(), self._version)
        if version is None:
            raise lock.taken_over(self.location)
        self._version = version

    def _content(self) -> bytes:
        return json.dumps(self._record, indent=2).encode()


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
