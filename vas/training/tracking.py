"""Learning curves to TensorBoard, MLflow and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from types import ModuleType, TracebackType
from typing import Any, Literal, Protocol

from vas import storage
from vas.errors import VasError

Kind = Literal["tensorboard", "mlflow", "wandb"]
PROJECT = "vas"  # W&B's project and MLflow's experiment, unless the environment names others
_IDS = "tracked.json"  # what MLflow and W&B call the run, so that an interrupted one goes on there


class Tracking:
    """Where the figures of a training go. For one process of it, the first worker.

    with Tracking.open(["tensorboard"], "demo", "runs/demo/train/tensorboard", config) as tracking:
        tracking.log(1, {"loss": 0.7})
    """

    def __init__(self, folder: str) -> None:
        self._folder = storage.absolute(folder)
        self._temporary = tempfile.TemporaryDirectory(prefix="vas-") if storage.is_remote(folder) else None
        self._sinks: list[_Sink] = []

    @classmethod
    def open(cls, kinds: list[Kind], run_name: str, folder: str, config: dict[str, Any]) -> Tracking:
        """Begin to track, or go on in a folder that was tracked into before.

        folder: a path or a URI. TensorBoard's and W&B's files lie in it, and what identifies the run to MLflow and W&B.
        Raises VasError for a library that is not installed, or a server that cannot be had.
        """
        tracking = cls(folder)
        try:
            os.makedirs(tracking._local, exist_ok=True)
            file = storage.join(tracking._folder, _IDS)
            known: dict[str, str] = json.loads(storage.read_bytes(file)) if storage.exists(file) else {}
            ids = dict(known)
            for kind in kinds:
                tracking._sinks.append(_SINKS[kind](run_name, tracking._local, config, ids))
            if ids != known:
                storage.write_bytes(file, json.dumps(ids).encode())
        except BaseException:
            tracking.close(failed=True)
            raise
        return tracking

    @property
    def _local(self) -> str:
        """Where files are written: the folder itself, or what is copied to its URI."""
        return self._temporary.name if self._temporary else self._folder

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Figures by name, as of an optimizer step; steps must not fall while it is open."""
        for sink in self._sinks:
            sink.log(step, figures)

    def flush(self) -> None:
        """Bring what was logged so far into the folder. Raises VasError if a URI cannot be written."""
        for sink in self._sinks:
            sink.flush()
        self._copy()

    def close(self, failed: bool = False) -> None:
        """End tracking, as a failure or not; a second call does nothing."""
        sinks, self._sinks = self._sinks, []
        with ExitStack() as last_first:  # each of these happens even if one before it fails
            if sinks and self._temporary:
                last_first.callback(self._temporary.cleanup)
                last_first.callback(self._copy)
            for sink in sinks:
                last_first.callback(sink.close, failed)

    def _copy(self) -> None:
        if self._temporary:
            storage.copy_directory(self._local, self._folder)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


class _Sink(Protocol):
    """One tracker. Made of the run's name, a local folder, the config, and the ids it knows or adds itself to."""

    def log(self, step: int, figures: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, run_name: str, folder: str, config: dict[str, Any], ids: dict[str, str]) -> None:
        self._folder, self._config = folder, config
        self._writer: Any = None

    def log(self, step: int, figures: dict[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            # what an interrupted attempt logged after the checkpoint that this one goes on from counts no more
            self._writer = SummaryWriter(self._folder, purge_step=step)
            self._writer.add_text("config", f"```json\n{json.dumps(self._config, indent=2)}\n```", step)
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _MLflow:
    """To the server at MLFLOW_TRACKING_URI, or where MLflow itself would keep runs."""

    def __init__(self, run_name: str, folder: str, config: dict[str, Any], ids: dict[str, str]) -> None:
        self._mlflow = _library("mlflow")
        try:
            if "mlflow" not in ids and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
                self._mlflow.set_experiment(PROJECT)
            run = self._mlflow.start_run(run_id=ids.get("mlflow"), run_name=run_name)
            if "mlflow" not in ids:  # a parameter can be set but once, and resources may change
                self._mlflow.log_params(_flat(config))
        except self._mlflow.exceptions.MlflowException as error:
            raise _refused("MLflow", error, "check MLFLOW_TRACKING_URI and the server", ids.get("mlflow")) from None
        ids["mlflow"] = run.info.run_id

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._mlflow.log_metrics(figures, step=step, synchronous=False)  # training does not wait for a server

    def flush(self) -> None:
        self._mlflow.flush_async_logging()

    def close(self, failed: bool) -> None:
        self.flush()
        try:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")
        except self._mlflow.exceptions.MlflowException as error:  # a finished training is not to fail for it
            logging.getLogger(__name__).warning("MLflow was not told that the run has ended: %s", error)


class _WandB:
    """To W&B as WANDB_API_KEY, WANDB_PROJECT and WANDB_MODE say."""

    def __init__(self, run_name: str, folder: str, config: dict[str, Any], ids: dict[str, str]) -> None:
        wandb = _library("wandb")
        known = ids.get("wandb")
        id_ = ids.setdefault("wandb", uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run_name,
                id=id_,
                resume="allow",
                dir=folder,
                config=config,
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise _refused("W&B", error, "check WANDB_API_KEY, or set WANDB_MODE=offline", known) from None

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def flush(self) -> None:
        """W&B's own process writes all the time."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_SINKS: dict[Kind, Callable[[str, str, dict[str, Any], dict[str, str]], _Sink]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _WandB,
}


def _library(name: Kind) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise VasError(f"tracking with {name} needs a package: {error}", mend=f"pip install 'vas[{name}]'") from None


def _refused(tracker: str, error: Exception, mend: str, run_id: str | None) -> VasError:
    what = f"cannot track with {tracker}: {' '.join(str(error).split())}"
    if run_id is None:
        return VasError(what, mend=mend)
    return VasError(what, f"its run {run_id}, which {_IDS} names", f"{mend}; without {_IDS} it becomes a new run")


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
