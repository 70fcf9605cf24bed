"""What the scripts in jobs/ share: one stage of a run, or all, as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import json

from vas import storage
from vas.cli.main import program
from vas.config import load_config
from vas.run.directory import RunDirectory


def run_job(stage: str, about: str, source: bool = False) -> None:
    """Parse the command line and run a stage, or "all", of the run that it names; `about` is what --help says.

    source: the stage takes another run's rows; --from names that run.
    Exits as `vas` does: 0 when done, 2 for what the user can mend, 130 when stopped.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="config of the run, which is begun unless it is there")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable")
    parser.add_argument("--run", metavar="DIR", help="directory or URI of the run, in place of the config's own")
    if source:
        parser.add_argument(
            "--from", metavar="DIR", dest="source", required=True, help="run whose responses are scored"
        )
    asked = parser.parse_args()
    if not (asked.config or asked.run):
        parser.error("give --config, --run or both")
    with program():
        run = _open(asked.config, asked.run, asked.set)
        from vas.run.stages import STAGES, run_all  # slow to import, so after what may fail at once

        work = run_all if stage == "all" else STAGES[stage]
        work(run, *([asked.source] if source else ()))


def _open(config: str | None, location: str | None, overrides: list[str]) -> RunDirectory:
    """The run at `location`; with a config, the config's run, which lies there if a location is given."""
    if config is None:
        assert location is not None
        return RunDirectory.open(location, overrides)
    if location is None:
        return RunDirectory.create(load_config(config, overrides))
    parent, _, name = storage.absolute(location).rstrip("/").rpartition("/")
    place = [f"runs_dir={json.dumps(parent or '/')}", f"name={json.dumps(name)}"]
    return RunDirectory.create(load_config(config, [*overrides, *place]))
