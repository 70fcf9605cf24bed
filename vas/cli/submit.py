"""`vas submit`: a run as a job of a Ray cluster, followed until it ends. The job needs nobody who follows it."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from vas.errors import VasError
from vas.progress import console

PATIENCE = 600.0  # seconds without an answer of the cluster until we give up following
PAUSE = 0.5  # seconds between attempts
LEFT_OUT = ["/runs/", "/.venv/", "/.git/"]  # of the working tree, beside what its .gitignore names
INTERRUPTED, FAILED = 130, 1


def submit(
    config: str, stage: str, run: str | None, overrides: list[str], environment: list[str], address: str | None
) -> tuple[JobSubmissionClient, str]:
    """Send the working tree and a command that runs a stage, or "all"; the cluster, and the job's id there.

    The config's path is relative to the working directory, which must hold it. Raises VasError for a config outside
    it, and for a cluster that cannot be reached or does not take the job.
    """
    here = Path.cwd()
    file = Path(config).resolve()
    if not file.is_relative_to(here):
        raise VasError("the config is not in the working directory, which is what the cluster is sent", config)
    words = ["python", "-m", "vas.cli.job", stage, "--config", str(file.relative_to(here))]
    words += ["--run", run] if run else []
    words += [word for each in overrides for word in ("--set", each)]
    runtime = {"working_dir": str(here), "excludes": LEFT_OUT, "env_vars": _variables(environment)}
    client = connect(address)
    try:
        job = client.submit_job(entrypoint=shlex.join(words), runtime_env=runtime)
    except (RuntimeError, ValueError) as error:
        raise VasError(f"the cluster does not take the job: {_first_line(error)}", address) from None
    return client, job


def connect(address: str | None) -> JobSubmissionClient:
    """The cluster's job API. Raises VasError if it cannot be reached, or wants a token."""
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it tells of each connection
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise VasError(
            f"cannot reach the cluster's job API: {_first_line(error)}",
            f"--address {address}" if address else "RAY_API_SERVER_ADDRESS",
            "e.g. --address http://HEAD:8265; if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ) from None


def follow(client: JobSubmissionClient, job: str) -> int:
    """Show the job's log as it grows, through lost connections, until it ends; its exit code.

    Raises VasError for a job that is not there, or a cluster that is gone for good.
    """
    shown, heard = 0, time.monotonic()
    while True:
        try:
            ended = client.get_job_info(job).status.is_terminal()  # before its log is read, so that none is missed
            shown = asyncio.run(_show(client, job, shown))
            heard = time.monotonic()
            if ended:
                return _end(client.get_job_info(job), job)
        except (OSError, RuntimeError) as error:
            if "status code 404" in str(error):
                raise VasError("there is no such job", job, "`ray job list` shows those that are") from None
            if time.monotonic() - heard > PATIENCE:
                raise VasError(f"the cluster does not answer any more: {_first_line(error)}", job) from None
        time.sleep(PAUSE)


async def _show(client: JobSubmissionClient, job: str, shown: int) -> int:
    """Print what the log has beyond `shown` characters, as long as the connection lasts; how many it has then."""
    seen = 0
    with suppress(RuntimeError, OSError, aiohttp.ClientError):  # the connection is gone
        async for text in client.tail_job_logs(job):
            fresh = text[max(0, shown - seen) :]
            seen += len(text)
            shown = max(shown, seen)
            sys.stdout.write(fresh)
            sys.stdout.flush()
    return shown


def _variables(asked: list[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME for what it is here. Raises VasError for one that is not set."""
    found = {}
    for each in asked:
        name, given, value = each.partition("=")
        if not given and name not in os.environ:
            raise VasError("this variable is not set here", f"--env {name}", "set it, or say --env NAME=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def _end(details: JobDetails, job: str) -> int:
    """Say how it ended; the exit code."""
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        console.print(f"[yellow]{job} was stopped.[/yellow] What is finished is kept; submit it again to go on.")
        return INTERRUPTED
    code = details.driver_exit_code
    if code is None or code < 0:  # the cluster ended it, or could not start it: its log does not say why
        console.print(f"[red]{job} failed:[/red] {(details.message or '').strip()[-2000:]}", highlight=False)
    return code if code is not None and code > 0 else FAILED


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
