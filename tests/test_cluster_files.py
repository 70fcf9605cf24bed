"""ray_config.yaml and the files of `cluster/`, without a cluster: their readers take them, and nothing is open."""

from __future__ import annotations

import ast
import json
import re
import stat
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import ray
import yaml
from command import ROOT
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE
from ray.autoscaler._private.aws.config import _configure_from_network_interfaces
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from vas.run.cluster import SERVE_ENVIRONMENT
from vas.serving.scrape import PREFIX

ROLES = ("sampling", "training", "scoring", "serving")
MONITORING = ROOT / "cluster" / "monitoring"
START = ROOT / "cluster" / "on-premise" / "start.sh"
RAY_KNOWS = {option for parameter in start.params for option in parameter.opts}
KINDS = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}
"""Class of ray.util.metrics → suffixes of its series, as Ray's agents export them."""
RAYS_OWN = {  # where Ray names them → series that are used here
    "dashboard/modules/reporter/reporter_agent.py": """ray_node_cpu_utilization ray_node_gpus_utilization
        ray_node_gram_used ray_node_mem_used_host ray_node_mem_total_host ray_node_network_receive_speed
        ray_node_network_send_speed""",
    "dashboard/modules/metrics/dashboards/default_dashboard_panels.py": """ray_object_store_memory ray_resources
        autoscaler_active_nodes autoscaler_pending_nodes autoscaler_recently_failed_nodes""",
    "serve/_private/deployment_state.py": "ray_serve_deployment_replica_healthy ray_serve_deployment_status",
}

Config = dict[str, Any]


# The cluster on AWS


def raw() -> Config:
    return yaml.safe_load((ROOT / "ray_config.yaml").read_text())


def ready(config: Config) -> Config:
    """The config as `ray up` has it before it asks AWS for anything."""
    config = prepare_config(config)
    validate_config(config)
    return _configure_from_network_interfaces(config)


def faults(config: Config) -> list[str]:
    """What leaves the cluster open, costs without bound, or has roles that no work finds."""
    found = []
    text = json.dumps(config)
    if re.search(r"(?i)AKIA|ASIA|access_?key|secret|aws_credentials|auth_token=", text):
        found.append("holds a key")
    if "0.0.0.0" in text:
        found.append("open to everywhere")
    if config["file_mounts"].get("~/.ray/auth_token") != "~/.ray/auth_token":
        found.append("brings no token")
    commands = [config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker")]
    if not all("RAY_AUTH_MODE=token ray start " in command for command in commands):
        found.append("starts without a token")
    if "--dashboard-host=127.0.0.1 " not in commands[0]:
        found.append("shows its dashboard")
    if not all(f" {name}={value} " in command for name, value in SERVE_ENVIRONMENT.items() for command in commands):
        found.append("lets requests wait for threads")
    unknown = {word for command in commands for word in re.findall(r"--[\w-]+", command)} - RAY_KNOWS
    found += [f"ray start does not know {option}" for option in sorted(unknown)]
    kinds = config["available_node_types"]
    workers = {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}
    if config["max_workers"] > sum(kind["max_workers"] for kind in workers.values()):
        found.append("has no bound")
    for name, kind in kinds.items():
        machine = kind["node_config"]
        if machine.get("MetadataOptions", {}).get("HttpTokens") != "required":
            found.append(f"{name}: IMDSv1")
        if not all(disk["Ebs"].get("Encrypted") for disk in machine.get("BlockDeviceMappings", [{"Ebs": {}}])):
            found.append(f"{name}: disks in the clear")
        if not machine.get("SecurityGroupIds"):
            found.append(f"{name}: Ray would let in SSH from everywhere")
        if not machine.get("IamInstanceProfile"):
            found.append(f"{name}: has no role")
        found += [f"{name}: {line}" for line in ec2_says(machine)]
    for role in ROLES:
        if workers.get(role, {}).get("resources", {}).get(role) != 1:
            found.append(f"no machine has the resource {role}")
    return found


@cache
def run_instances() -> Any:
    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def ec2_says(machine: Config) -> list[str]:
    """What is wrong with it by the EC2 API's own description; SubnetIds is Ray's word, it picks one of them."""
    given = {key: value for key, value in machine.items() if key != "SubnetIds"} | {"MinCount": 1, "MaxCount": 1}
    report = botocore.validate.ParamValidator().validate(given, run_instances())
    return report.generate_report().splitlines()


def machine(config: Config, role: str) -> Config:
    return config["available_node_types"][role]["node_config"]


def test_the_cluster_is_one_that_ray_up_takes_and_nothing_is_open():
    assert faults(ready(raw())) == []


def test_only_what_may_be_lost_is_on_spot():
    config = ready(raw())
    spot = {role for role in (*ROLES, "head") if "InstanceMarketOptions" in machine(config, role)}
    assert spot == {"sampling"}
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_training_is_on_machines_side_by_side_with_efa():
    training = machine(ready(raw()), "training")
    assert [card["InterfaceType"] for card in training["NetworkInterfaces"]] == ["efa"]
    assert training["Placement"]["GroupName"]
    assert training["SubnetIds"]
    assert training["SecurityGroupIds"]


def test_what_is_copied_is_there_and_enough_to_install_it():
    config = raw()
    copied = {local for local in config["file_mounts"].values() if not local.startswith("~")}
    assert all((ROOT / local).exists() for local in copied)
    assert copied >= {"Makefile", "requirements.lock", "pyproject.toml", "README.md", "LICENSE", "vas"}
    assert "make -C ~/vas .venv/installed" in config["setup_commands"]
    assert "$(VENV)/installed: requirements.lock pyproject.toml\n" in (ROOT / "Makefile").read_text()


MISTAKES: dict[str, Callable[[Config], Any]] = {
    "holds a key": lambda c: c["provider"].update(aws_credentials={"aws_access_key_id": "x"}),
    "open to everywhere": lambda c: c["provider"].update(security_group={"IpPermissions": [{"CidrIp": "0.0.0.0/0"}]}),
    "brings no token": lambda c: c["file_mounts"].pop("~/.ray/auth_token"),
    "starts without a token": lambda c: c["worker_start_ray_commands"].append("ray start --address=$RAY_HEAD_IP:6379"),
    "lets requests wait for threads": lambda c: c["worker_start_ray_commands"].append("RAY_AUTH_MODE=token ray start "),
    "shows its dashboard": lambda c: c.pop("head_start_ray_commands"),  # Ray's own is 0.0.0.0
    "ray start does not know --dashbord-port": lambda c: c["head_start_ray_commands"].append("--dashbord-port=1"),
    "has no bound": lambda c: c.update(max_workers=100),
    "head: IMDSv1": lambda c: machine(c, "head").pop("MetadataOptions"),
    "serving: disks in the clear": lambda c: machine(c, "serving").pop("BlockDeviceMappings"),
    "scoring: Ray would let in SSH from everywhere": lambda c: machine(c, "scoring").pop("SecurityGroupIds"),
    "sampling: has no role": lambda c: machine(c, "sampling").pop("IamInstanceProfile"),
    'training: Unknown parameter in MetadataOptions: "HopLimit"': lambda c: machine(c, "training").update(
        MetadataOptions={"HttpTokens": "required", "HopLimit": 1}
    ),
    "no machine has the resource scoring": lambda c: c["available_node_types"]["scoring"].update(resources={}),
}


@pytest.mark.parametrize("fault", MISTAKES)
def test_such_a_mistake_is_found(fault):
    config = raw()
    MISTAKES[fault](config)
    assert any(found.startswith(fault) for found in faults(ready(config)))


def test_rays_own_schema_is_asked():
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        ready(raw() | {"max_worker": 3})
    config = raw()
    machine(config, "training")["NetworkInterfaces"][0].pop("Groups")
    with pytest.raises(ValueError, match="security group"):
        ready(config)


# Machines of one's own


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`start.sh WORDS`, which shows what it would run."""
    given = {"PATH": "/usr/bin:/bin", "RAY": "echo"} | environment
    return subprocess.run(["bash", START, *words], env=given, capture_output=True, text=True, timeout=30)


def options(*words: str, **environment: str) -> dict[str, str]:
    """The options of `ray start` that it comes to; a later one counts."""
    done = run(*words, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("start ")
    found = dict(re.findall(r"(--[\w-]+)(?:=(\{.*?\}|\S+))?", done.stdout))
    assert set(found) <= RAY_KNOWS
    return found


@pytest.mark.parametrize("script", [*START.parent.glob("*.sh")], ids=lambda path: path.name)
def test_bash_can_read(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script.stat().st_mode & stat.S_IXUSR


def test_a_head_makes_its_token_once_and_keeps_it_to_itself(tmp_path):
    token = tmp_path / ".ray" / "auth_token"
    found = options("head", HOME=str(tmp_path))
    assert found["--dashboard-host"] == "127.0.0.1"
    assert re.fullmatch("[0-9a-f]{64}", made := token.read_text())
    assert [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)] == [0o600, 0o700]
    token.chmod(0o644)
    options("head", HOME=str(tmp_path))
    assert token.read_text() == made
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


def test_a_worker_has_its_roles_and_needs_the_token(tmp_path):
    here = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = run("worker", "10.0.0.1:6379", "sampling", **here)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "no token" in refused.stderr
    (tmp_path / "token").write_text("secret")
    found = options("worker", "10.0.0.1:6379", "sampling,scoring", **here)
    assert found["--address"] == "10.0.0.1:6379"
    assert json.loads(found["--resources"]) == {"sampling": 1, "scoring": 1}
    assert "secret" not in str(found)  # a command line can be read by everyone on the machine


def test_several_can_share_a_machine(tmp_path):
    here = {"HOME": str(tmp_path)}
    head = options("head", "--num-cpus=0", "--dashboard-port=9000", FIRST_PORT="7000", **here)
    worker = options("worker", "10.0.0.1:7000", "sampling", "--num-cpus=1", FIRST_PORT="7010", **here)
    assert (head["--num-cpus"], head["--dashboard-port"], head["--port"]) == ("0", "9000", "7000")
    ports = [value for found in (head, worker) for name, value in found.items() if name.endswith("port")]
    assert len(ports) == len(set(ports)) == 8 + 1 + 6


def test_the_token_mode_and_what_serve_is_told_reach_ray(tmp_path):
    shows = tmp_path / "shows"
    shows.write_text("#!/bin/sh\nenv\n")
    shows.chmod(0o755)
    seen = run("head", HOME=str(tmp_path), RAY=str(shows)).stdout.splitlines()
    assert {"RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={tmp_path}/.ray/auth_token"} <= set(seen)
    assert {f"{name}={value}" for name, value in SERVE_ENVIRONMENT.items()} <= set(seen)


@pytest.mark.parametrize(
    "words", [(), ("head-node",), ("worker",), ("worker", "10.0.0.1", "x"), ("worker", "10.0.0.1:1", 'x"')]
)
def test_what_makes_no_sense_is_refused(words, tmp_path):
    done = run(*words, HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr


def test_the_unit_starts_the_script():
    unit = (START.parent / "ray@.service").read_text()
    assert f"ExecStart=/opt/vas/{START.relative_to(ROOT)} %i $ARGUMENTS --block\n" in unit


# What is watched


@cache
def registered() -> dict[str, str]:
    """Metric → its class, of all that the library makes."""
    found = {}
    for file in ROOT.glob("vas/**/*.py"):
        tree = ast.parse(file.read_text())
        imports = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if not {"ray.util", "ray.util.metrics"} & set(imports):
            continue
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args):
            kind = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if kind in KINDS and isinstance(call.args[0], ast.Constant):
                found[call.args[0].value] = kind
    return found


def exported() -> set[str]:
    """Series that Prometheus can find, and `up`, which is its own."""
    ours = {f"ray_{name}{suffix}" for name, kind in registered().items() for suffix in KINDS[kind]}
    return ours | {series for names in RAYS_OWN.values() for series in names.split()} | {"up"}


def series(expression: str) -> set[str]:
    """The series that a PromQL expression asks for."""
    bare = re.sub(r'"[^"]*"', "", expression)
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]", " ", bare)
    bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right) *\([^)]*\)", " ", bare)
    return set(re.findall(r"\b[A-Za-z_:][\w:]*\b(?! *\()", bare)) - {"and", "or", "unless", "offset", "bool"}


def dashboard() -> Config:
    return json.loads((MONITORING / "grafana-dashboard.json").read_text())


def charts() -> list[Config]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[Config]:
    return [
        rule for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
    ]


def test_the_dashboard_and_the_alerts_ask_for_what_there_is():
    asked = [target["expr"] for chart in charts() for target in chart["targets"]]
    asked += [rule["expr"] for rule in rules()]
    variables = [variable["definition"] for variable in dashboard()["templating"]["list"] if "definition" in variable]
    asked += [re.sub(r"^label_values\((.*), \w+\)$", r"\1", definition) for definition in variables]
    known = exported()
    assert {expression: missing for expression in asked if (missing := series(expression) - known)} == {}


def test_the_dashboard_shows_every_metric():
    shown = {name for chart in charts() for target in chart["targets"] for name in series(target["expr"])}
    for name, kind in registered().items():
        assert shown & {f"ray_{name}{suffix}" for suffix in KINDS[kind]}, f"{name} is on no panel"


def test_series_are_found_in_an_expression():
    expression = """sum by (le, key) (rate(ray_a_bucket{status=~"5..{x}", run="b"}[$__rate_interval]))
        / on () group_left (c) (ray_d_total offset 15m > 0) or vector(0) unless ray_e"""
    assert series(expression) == {"ray_a_bucket", "ray_d_total", "ray_e"}


@pytest.mark.parametrize(
    "wrong",
    ["vas_requests_total", "ray_vas_requests", "ray_vas_request_total", "ray_vas_engine_running_total", "ray_cpu"],
)
def test_a_metric_that_nobody_makes_is_found(wrong):
    assert {"ray_vas_requests_total", "ray_vas_engine_running", "ray_vas_inter_token_seconds_bucket"} <= exported()
    assert series(f"sum(rate({wrong}[5m]))") - exported() == {wrong}


def test_ray_still_has_the_series_that_are_its_own():
    for file, names in RAYS_OWN.items():
        text = (Path(ray.__file__).parent / file).read_text()
        for name in names.split():
            assert re.search(rf'"{name.removeprefix("ray_")}"|\b{name}\b', text), f"{name} is not in {file}"


def test_the_endpoints_own_page_leaves_out_the_prefix_alone():
    assert PREFIX == "ray_vas_"
    assert all(name.startswith("vas_") for name in registered())


def test_the_dashboard_can_be_imported():
    board = dashboard()
    assert board["schemaVersion"] >= 39
    assert board["id"] is None
    source = board["templating"]["list"][0]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for chart in charts():
        assert all((chart["fieldConfig"]["defaults"]["unit"], chart["title"], chart["description"]))
        for part in (chart, *chart["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    cells = [cell for panel in panels for cell in covered(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "panels lie on each other"
    assert max(x for x, _ in cells) < 24


def covered(place: dict[str, int]) -> list[tuple[int, int]]:
    across, down = range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
    return [(x, y) for x in across for y in down]


def test_an_alert_says_how_bad_and_what():
    assert len({rule["alert"] for rule in rules()}) == len(rules())
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]


def test_prometheus_finds_the_machines_and_the_alerts_their_job():
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape["file_sd_configs"][0]["files"] == [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]
    assert all((MONITORING / file).exists() for file in config["rule_files"])
    monitor = yaml.safe_load((MONITORING / "podmonitor.yaml").read_text())
    jobs = {rule["replacement"] for each in monitor["spec"]["podMetricsEndpoints"] for rule in each["relabelings"]}
    asked = {job for rule in rules() for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert jobs == {scrape["job_name"]} == asked
