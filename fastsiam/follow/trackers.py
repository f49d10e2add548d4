"""Weights & Biases and MLflow, as far as a log is copied into them. Their libraries are imported when one is opened."""

import os
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple, Protocol

from fastsiam.config.yaml_file import flat
from fastsiam.errors import MissingLibraryError, UserError

# Of a text; MLflow takes 8,000.
_CHARACTERS = 1000
# What one call of MLflow's log_batch takes.
_METRICS, _PARAMS = 1000, 100


class Point(NamedTuple):
    """What a tracker gets of one line of metrics.jsonl."""

    row: int
    """Lines that were sent before it, over all starts."""
    step: int
    numbers: dict[str, float]
    """By `kind/field`."""
    texts: dict[str, str]


class Tracker(Protocol):
    """A run in a tracker, open to be written."""

    run_id: str
    where: str
    """In words."""

    def send(self, points: Sequence[Point]) -> None:
        """Raises `UserError` where the tracker does not take them."""

    def close(self, ended: str | None) -> None:
        """`ended`: how the run has ended, see `run.reading.ending`; None where it goes on and only the copying ends."""


def open_tracker(to: str, folder: Path, config: dict, project: str, run_id: str, offline: bool) -> Tracker:
    """Opens the run `run_id` of a tracker, `wandb` or `mlflow`, or begins one with this config where it is "".

    Raises `MissingLibraryError` where the library is not installed, `UserError` where the tracker refuses.
    """
    return {"wandb": WeightsAndBiases, "mlflow": MLflow}[to](folder, config, project, run_id, offline)


class WeightsAndBiases:
    """A run of wandb, whose files lie in `folder`/wandb. The metric `step` is the horizontal axis of all others."""

    def __init__(self, folder: Path, config: dict, project: str, run_id: str, offline: bool):
        if offline:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = _imported("wandb", "wandb", "wandb")
        self._errors = wandb.errors.Error
        # The console, the processor load and the checkout are those of this process, not of the one that trains.
        settings = wandb.Settings(
            console="off", silent=True, x_disable_stats=True, x_disable_meta=True, disable_git=True, save_code=False
        )
        more = {"mode": "offline"} if offline else {}
        try:
            self._run = wandb.init(
                project=project,
                name=folder.resolve().name,
                dir=str(folder),
                id=run_id or None,
                # Without a network there is nothing to look up; `wandb sync` joins the parts of one id.
                resume="allow" if run_id and not offline else None,
                config=config if not run_id else None,
                settings=settings,
                **more,
            )
        except self._errors as error:
            raise _refusal("wandb", error, "log in with wandb login, or give --offline") from error
        self._run.define_metric("*", step_metric="step")
        self.run_id = self._run.id
        self.where = f"{Path(self._run.dir).parent}; wandb sync sends it" if self._run.offline else self._run.url

    def send(self, points: Sequence[Point]) -> None:
        try:
            for point in points:
                if point.numbers:
                    # A row that wandb has had before the copying was killed is dropped by its number.
                    self._run.log(point.numbers | {"step": point.step}, step=point.row, commit=True)
                if point.texts:
                    self._run.summary.update(point.texts)
        except self._errors as error:
            raise _refusal("wandb", error, "the lines are tried again") from error

    def close(self, ended: str | None) -> None:
        self._run.finish(exit_code=int(ended in ("failed", "collapsed", "killed")))


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in `folder`/mlruns; the step of a metric is the training step."""

    def __init__(self, folder: Path, config: dict, project: str, run_id: str, offline: bool):
        if offline:
            # MLflow 3.17 refuses folders without it; a database would need SQLAlchemy and the whole of MLflow.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = _imported("mlflow", "mlflow-skinny", "mlflow")
        self._entities, self._errors = import_module("mlflow.entities"), mlflow.exceptions.MlflowException
        uri = (folder.resolve() / "mlruns").as_uri() if offline else mlflow.get_tracking_uri()
        self.where = f"{uri}, experiment {project}"
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            self.run_id = run_id or self._begun(folder, config, project)
            self._client.update_run(self.run_id, "RUNNING")
        except self._errors as error:
            cure = "set MLFLOW_TRACKING_URI to your server, or give --offline"
            if run_id:
                cure += f"; delete follow-mlflow*.json in {folder} to begin another run than {run_id}"
            raise _refusal(f"mlflow at {uri}", error, cure) from error

    def _begun(self, folder, config, project):
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        run_id = self._client.create_run(experiment, run_name=folder.resolve().name).info.run_id
        params = [self._entities.Param(key, str(value)) for key, value in flat(config).items()]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(run_id, params=params[first : first + _PARAMS])
        return run_id

    def send(self, points: Sequence[Point]) -> None:
        now, entities = int(1000 * time.time()), self._entities
        metrics = [entities.Metric(key, value, now, p.step) for p in points for key, value in p.numbers.items()]
        texts = {key: text for point in points for key, text in point.texts.items()}
        tags = [entities.RunTag(key, text) for key, text in texts.items()]
        try:
            for first in range(0, max(len(metrics), len(tags)), _METRICS):
                part = metrics[first : first + _METRICS]
                self._client.log_batch(self.run_id, metrics=part, tags=tags if first == 0 else [])
        except self._errors as error:
            raise _refusal("mlflow", error, "the lines are tried again") from error

    def close(self, ended: str | None) -> None:
        if ended is None:
            return
        status = {"failed": "FAILED", "collapsed": "FAILED", "killed": "KILLED", "preempted": "KILLED"}
        try:
            self._client.set_terminated(self.run_id, status.get(ended, "FINISHED"))
        except self._errors as error:
            raise _refusal("mlflow", error, "its run still counts as running; start the command again") from error


def texts_of(line: dict) -> dict[str, str]:
    """Returns the texts of a line of metrics.jsonl by `kind/field`: messages, codes, the status of an end."""
    kind = line.get("kind")
    return {
        f"{kind}/{field}": value[:_CHARACTERS]
        for field, value in line.items()
        if field not in ("kind", "name") and isinstance(value, str)
    }


def _imported(module, package, extra):
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingLibraryError(
            f"--to: {module} is not installed; pip install {package}, or in a clone pip install -e '.[{extra}]'",
            f"no-{module}",
            name=module,
        ) from error


def _refusal(name, error, cure):
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"--to: {name} answers: {first[:300].rstrip('.')}; {cure}", "tracker-refuses")
