"""Learning curves: written, read back with the trackers' own libraries, and gone on with after an interruption."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vas import storage
from vas.errors import VasError
from vas.training.tracking import Kind, Tracking

CONFIG = {"name": "demo", "train": {"lr": 1e-4, "epochs": 2}}


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(step, figure) of a curve, as TensorBoard shows it."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def break_off(kind: Kind, folder: str, losses: dict[int, float]) -> None:
    """An attempt that logs these losses and is then interrupted."""
    with Tracking.open([kind], "demo", folder, CONFIG) as tracking:
        for step, loss in losses.items():
            tracking.log(step, {"loss": loss})
        raise KeyboardInterrupt


def test_tensorboard_shows_the_curves_and_the_config(tmp_path):
    with Tracking.open(["tensorboard"], "demo", str(tmp_path), CONFIG) as tracking:
        tracking.log(1, {"loss": 0.5, "lr": 1e-4})
        tracking.log(2, {"loss": 0.25})
        tracking.flush()
        assert curve(tmp_path, "loss") == [(1, 0.5), (2, 0.25)]
        tracking.log(3, {"loss": 0.125})
    assert curve(tmp_path, "loss") == [(1, 0.5), (2, 0.25), (3, 0.125)]
    assert curve(tmp_path, "lr") == [(1, 1e-4)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (config,) = events.Tensors("config/text_summary")
    assert json.loads(config.tensor_proto.string_val[0].decode().strip("`json\n")) == CONFIG


def test_a_curve_goes_on_from_the_checkpoint_without_what_came_after_it(tmp_path):
    """The first attempt broke off at step 4; the second goes on from a checkpoint of step 2."""
    with pytest.raises(KeyboardInterrupt):
        break_off("tensorboard", str(tmp_path), dict.fromkeys(range(1, 5), 1.0))
    with Tracking.open(["tensorboard"], "demo", str(tmp_path), CONFIG) as tracking:
        for step in range(3, 6):
            tracking.log(step, {"loss": 2.0})
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]


def test_a_uri_gets_a_copy(tmp_path, bucket):
    uri = f"{bucket}/demo/train/tensorboard"
    for start in (1, 3):
        with Tracking.open(["tensorboard"], "demo", uri, CONFIG) as tracking:
            tracking.log(start, {"loss": 0.5})
            tracking.flush()
            storage.copy_directory(uri, str(tmp_path / f"flushed {start}"))
            tracking.log(start + 1, {"loss": 0.25})
    storage.copy_directory(uri, str(tmp_path / "closed"))
    assert curve(tmp_path / "flushed 1", "loss") == [(1, 0.5)]
    assert curve(tmp_path / "closed", "loss") == [(1, 0.5), (2, 0.25), (3, 0.5), (4, 0.25)]


def test_nothing_may_be_tracked(tmp_path):
    with Tracking.open([], "demo", str(tmp_path / "none"), CONFIG) as tracking:
        tracking.log(1, {"loss": 0.5})
        tracking.flush()
    assert not list((tmp_path / "none").iterdir())


def test_it_may_be_closed_twice(tmp_path):
    tracking = Tracking.open(["tensorboard"], "demo", str(tmp_path), CONFIG)
    tracking.log(1, {"loss": 0.5})
    tracking.close()
    tracking.close()
    assert curve(tmp_path, "loss") == [(1, 0.5)]


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_a_missing_library_is_named(tmp_path, kind):
    if find_spec(kind):
        pytest.skip(f"{kind} is installed")
    with pytest.raises(VasError, match=f"tracking with {kind} needs a package") as caught:
        Tracking.open(["tensorboard", kind], "demo", str(tmp_path), CONFIG)
    assert f"pip install 'vas[{kind}]'" in str(caught.value)


def test_mlflow_has_one_run_for_all_attempts(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", exc_type=ImportError)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    folder = str(tmp_path / "train")
    with pytest.raises(KeyboardInterrupt):
        break_off("mlflow", folder, {1: 0.5})
    client = mlflow.MlflowClient()
    experiments = [client.get_experiment_by_name("vas").experiment_id]
    assert [run.info.status for run in client.search_runs(experiments)] == ["FAILED"]
    with Tracking.open(["mlflow"], "demo", folder, CONFIG | {"resources": {"workers": 2}}) as tracking:
        tracking.log(2, {"loss": 0.25})
    (run,) = client.search_runs(experiments)
    assert (run.info.run_name, run.info.status) == ("demo", "FINISHED")
    assert run.data.params == {"name": "demo", "train.lr": "0.0001", "train.epochs": "2"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    storage.write_bytes(storage.join(folder, "tracked.json"), b'{"mlflow": "gone"}')
    with pytest.raises(VasError, match=r"cannot track with MLflow: .*not found"):
        Tracking.open(["mlflow"], "demo", folder, CONFIG)


def test_wandb_has_one_run_for_all_attempts(tmp_path, monkeypatch):
    pytest.importorskip("wandb", exc_type=ImportError)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        with Tracking.open(["wandb"], "demo", str(tmp_path), CONFIG) as tracking:
            tracking.log(step, {"loss": 0.5})
    id_ = json.loads((tmp_path / "tracked.json").read_text())["wandb"]
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert files
    assert {file.name for file in files} == {f"run-{id_}.wandb"}
