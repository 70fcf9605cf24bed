"""What the scripts in jobs/ share: one stage of a run, or all, as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import json
from typing import get_args

from vas.choices import Stage
from vas.cli.main import program
from vas.config import load_config
from vas.run.directory import RunDirectory, place_of


def run_job(stage: str | None, about: str | None, source: bool = False) -> None:
    """Parse the command line and run a stage, or "all", of the run that it names; `about` is what --help says.

    stage: None if the command line's first word is to say it. source: the stage takes another run's rows; --from
    names that run.
    Exits as `vas` does: 0 when done, 2 for what the user can mend, 130 when stopped.
    """
    parser = _parser(about, "config of the run, which is begun unless it is there")
    if stage is None:
        parser.add_argument("stage", choices=get_args(Stage))
    if source:
        parser.add_argument(
            "--from", metavar="DIR", dest="source", required=True, help="run whose responses are scored"
        )
    asked = _parsed(parser)
    with program():
        run = _open(asked.config, asked.run, asked.set)
        from vas.run.stages import STAGES, run_all  # slow to import, so after what may fail at once

        work = STAGES | {"all": run_all}
        work[stage or asked.stage](run, *([asked.source] if source else ()))


def run_serve(about: str | None) -> None:
    """Parse the command line and leave an endpoint running on the cluster; exits as `run_job` does."""
    parser = _parser(about, "config of the endpoint: its keys, or a file for `serve deploy`")
    parser.add_argument("--host", default="127.0.0.1", help="address that the machines listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="and port (%(default)s)")
    asked = _parsed(parser)
    place = [f"run={json.dumps(asked.run)}"] if asked.run and asked.config else []
    with program():
        from vas.cli.serve import deploy

        deploy(asked.config or asked.run, [*place, *asked.set], asked.host, asked.port)


def _parser(about: str | None, config: str) -> argparse.ArgumentParser:
    """The flags that all jobs take."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help=config)
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable")
    parser.add_argument("--run", metavar="DIR", help="directory or URI of the run, in place of the config's own")
    return parser


def _parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    asked = parser.parse_args()
    if not (asked.config or asked.run):
        parser.error("give --config, --run or both")
    return asked


def _open(config: str | None, location: str | None, overrides: list[str]) -> RunDirectory:
    """The run at `location`; with a config, the config's run, which lies there if a location is given."""
    if config is None:
        assert location is not None
        return RunDirectory.open(location, overrides)
    if location is None:
        return RunDirectory.create(load_config(config, overrides))
    runs_dir, name = place_of(location)
    place = [f"runs_dir={json.dumps(runs_dir)}", f"name={json.dumps(name)}"]
    return RunDirectory.create(load_config(config, [*overrides, *place]))


if __name__ == "__main__":
    run_job(None, about=__doc__)
