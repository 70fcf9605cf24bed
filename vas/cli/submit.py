"""`vas submit`: a run as a job of a Ray cluster, followed until it ends. The job needs nobody who follows it."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from pathlib import Path

import aiohttp
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.markup import escape

from vas.errors import VasError
from vas.progress import console

PATIENCE = 600.0  # seconds without an answer of the cluster until we give up following
PAUSE = 0.5  # seconds between attempts
SILENCE = 60.0  # seconds without a line, after which we ask whether the job is still there
LEFT_OUT = ["/runs/"]  # of the working tree, beside what its .gitignore names, .git and .venv
INTERRUPTED, FAILED = 130, 1
TROUBLE = (OSError, RuntimeError, ValueError, RayError)  # what Ray's client raises when something is wrong


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
    except TROUBLE as error:
        raise VasError(
            f"the cluster does not take the job: {_last_line(error)}",
            client.get_address(),
            "if the working directory is too large for it, name large folders in .gitignore",
        ) from None
    return client, job


def check_place(location: str) -> None:
    """Raises VasError for a run that would lie in the job's own folder, which the cluster deletes."""
    if "://" not in location and not Path(location).is_absolute():
        raise VasError(
            "the job's own folder is no place for a run: the cluster deletes it",
            location,
            "say where it is to lie: --run s3://bucket/runs/mine, or an absolute path that all machines share",
        )


def connect(address: str | None) -> JobSubmissionClient:
    """The cluster's job API. Raises VasError if it cannot be reached, or wants a token."""
    if address:
        os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray prefers what is set there
    for name in ("ray.dashboard", "ray._private.runtime_env"):  # of each connection, and each file that is left out
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise _no_token() from None
    except TROUBLE as error:
        raise VasError(
            f"cannot reach the cluster's job API: {_last_line(error)}",
            f"--address {address}" if address else "RAY_API_SERVER_ADDRESS",
            "e.g. --address http://127.0.0.1:8265, where `ray dashboard` or ssh -L brings it",
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
        except AuthenticationError:
            raise _no_token() from None
        except TROUBLE as error:
            if "status code 404" in str(error):
                raise VasError("there is no such job", job, "`ray job list` shows those that are") from None
            if time.monotonic() - heard > PATIENCE:
                raise VasError(f"the cluster does not answer any more: {_last_line(error)}", job) from None
        time.sleep(PAUSE)


async def _show(client: JobSubmissionClient, job: str, shown: int) -> int:
    """Print what the log has beyond `shown` characters, as long as the connection lasts; how many it has then."""
    seen, log = 0, client.tail_job_logs(job)
    while True:
        try:
            text = await asyncio.wait_for(anext(log), SILENCE)
        except (StopAsyncIteration, RuntimeError, OSError, aiohttp.ClientError):  # its end, or that of the connection
            return shown
        fresh = text[max(0, shown - seen) :]
        seen += len(text)
        shown = max(shown, seen)
        sys.stdout.write(fresh)
        sys.stdout.flush()


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
        said = escape((details.message or "").strip()[-2000:])
        console.print(f"[red]{job} failed:[/red] {said}", highlight=False)
    return code if code is not None and code > 0 else FAILED


def _no_token() -> VasError:
    return VasError(
        "the cluster wants its token",
        "RAY_AUTH_TOKEN",
        "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or ~/.ray/auth_token; `ray get-auth-token` on the head prints it",
    )


def _last_line(error: BaseException) -> str:
    """What it is about: servers answer with a whole traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
