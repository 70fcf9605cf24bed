"""`vas serve`: the endpoint on this machine, or on the cluster that RAY_ADDRESS names."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from contextlib import ExitStack, redirect_stdout
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client

from vas.config import Resources
from vas.configfile import override, read_config
from vas.errors import VasError
from vas.models.value import ValueModelConfig
from vas.progress import console
from vas.run.cluster import ray_cluster
from vas.serving.app import application, deployments, require_room
from vas.serving.config import Settled, merged, parse_serving, settle
from vas.serving.keys import load_keys

NAME = "vas"


def serve_forever(target: str, overrides: list[str], host: str, port: int) -> None:
    """Serve a run, or what a YAML file says, until the process is stopped.

    Raises VasError for a run or a key that is wrong, for a cluster that is too small, for a port that is taken, and for
    models that do not start.
    """
    serving = parse_serving(_content(target, overrides), target)
    local = "RAY_ADDRESS" not in os.environ
    if local and "cpus" not in serving.replicas.model_fields_set:
        serving.replicas.cpus = os.cpu_count() or 1  # the machine is the base model's; the rest is light
    settled = settle(serving)
    if local:
        _check_port(host, port)
        if serving.gate.keys:
            load_keys(serving.gate.keys)
    app = application(settled)
    with ExitStack() as quiet, ray_cluster(Resources(), spare_cpus=_spare(settled)):
        _start(app, settled, target, host, port)
        console.print("Ctrl-C stops it.")
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        stopped.wait()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        console.print("\nStopping; what has begun is finished first. Ctrl-C breaks it off.")
        serve.delete(NAME, _blocking=False)
        while NAME in serve.status().applications:
            time.sleep(0.5)
        if local:
            quiet.enter_context(redirect_stdout(io.StringIO()))  # Ray tells of actors that end as they should
            serve.shutdown()


def deploy(target: str, overrides: list[str], host: str, port: int) -> None:
    """Serve it on the cluster that RAY_ADDRESS names, in place of what is served there, and leave it running.

    Raises VasError as `serve_forever` does.
    """
    settled = settle(parse_serving(_content(target, overrides), target))
    app = application(settled)
    with ray_cluster(Resources(address=os.environ.get("RAY_ADDRESS", "auto"))):
        _start(app, settled, target, host, port)


def _start(app: serve.Application, settled: Settled, target: str, host: str, port: int) -> None:
    require_room(settled)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options=HTTPOptions(host=host, port=port))
    with console.status("loading the models"):
        try:
            serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError:
            raise VasError(f"the models did not start: {_reason()}", target, "mend it, and try again") from None
    listening = _get_global_client().http_config  # where it did before, if Serve was up already
    _greet(settled, listening.host or host, listening.port)


def _content(target: str, overrides: list[str]) -> dict[str, Any]:
    """The keys of Serving: a run's directory, a file of them, or the arguments in a config for `serve deploy`."""
    if not target.endswith((".yaml", ".yml")):
        return override({"run": target}, overrides)
    content = read_config(target)
    if "rollouts" in content or "rewards" in content:
        run = f"{content.get('runs_dir', 'runs')}/{content.get('name', 'NAME')}"
        raise VasError("this is the config of a run, not of an endpoint", target, f"serve the run: vas serve {run}")
    if "applications" in content:
        application = _application(content, target)
        content = dict(application.get("args") or {})
        for each in application.get("deployments") or []:
            if each.get("name") == "Gateway":
                content["gate"] = merged(content.get("gate") or {}, each.get("user_config") or {})
    return override(content, overrides)


def _application(content: dict[str, Any], target: str) -> dict[str, Any]:
    """The first application of a config for `serve deploy`."""
    match content["applications"]:
        case [dict() as application, *_]:
            return application
    raise VasError("there is no application in this config", target, "see cluster/serve/ for examples")


def _check_port(host: str, port: int) -> None:
    """Two endpoints may listen at one port, and then share the requests. Raises VasError if somebody does already."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        mend = "take another --port or --host"
        raise VasError(f"cannot listen there: {error.strerror}", f"{host}:{port}", mend) from None


def _reason() -> str:
    """What the deployments that did not start say: the last error of each one's traceback."""
    deployments = serve.status().applications[NAME].deployments
    said = {name: about.message.strip() for name, about in deployments.items() if about.status != "HEALTHY"}
    return "; ".join(f"{name}: {_last(text)}" for name, text in said.items() if text) or "Ray Serve does not say why"


def _last(message: str) -> str:
    """The last error of a traceback; of ours what, where and how to mend it, in one line."""
    *errors, last = re.split(r"^(?=[\w.]+Error: )", message, flags=re.MULTILINE)
    ours = last.removeprefix("vas.errors.VasError: ")
    if ours != last:
        return ", ".join(line.strip().removeprefix("- ") for line in ours.splitlines()).replace(":, ", ": ")
    return last.splitlines()[0 if errors else -1]


def _spare(settled: Settled) -> int:
    """Logical CPUs that Ray needs beside the machine's own, for all deployments at their largest."""
    asked = sum(kept.cpus * kept.most for _, _, kept in deployments(settled))
    return max(1, int(asked) + 1 - (os.cpu_count() or 1))


def _greet(settled: Settled, host: str, port: int) -> None:
    """Say where it is, and how to use it."""
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    objectives = [each["name"] for spec in settled.value_models for each in ValueModelConfig.load(spec.path).objectives]
    steers = f"steered by {', '.join(objectives)}" if objectives else "without a value model"
    asked: dict[str, Any] = {"model": settled.name, "messages": [{"role": "user", "content": "How was your day?"}]}
    asked["max_tokens"] = 32
    if objectives:
        asked["guidance"] = {"objectives": {objectives[0]: 5}}
    key = " -H 'Authorization: Bearer KEY'" if settled.serving.gate.keys else ""
    console.print(
        f"[bold]{settled.name}[/bold], {steers}, at [bold]{url}/v1[/bold]\n"
        f"Try it: curl -s {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{json.dumps(asked)}'\n"
        f"In a browser: {url}; the API: {url}/docs.",
        highlight=False,
        soft_wrap=True,
    )
