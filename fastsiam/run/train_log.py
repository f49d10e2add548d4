"""What a run tells of its steps: every so many a line of metrics.jsonl, every few seconds a line on the screen."""

import torch

from fastsiam.data.bottleneck import LoaderWatch, describe
from fastsiam.training.timing import Lap, Laps


class TrainLog:
    """Tells what `Soundness` has read; all ranks call the same methods at the same steps."""

    def __init__(self, session, loading):
        """`loading`: the config that the loader was built from."""
        self._session = session
        self._written, self._shown = (Laps(session.state, session.clock, session.spent) for _ in range(2))
        self.loader_watch = LoaderWatch(lambda: describe(loading, session.source, session.backend_name, session.device))

    def write(self, rate: float) -> None:
        """A line of metrics.jsonl, with the learning rate of its step."""
        session, journal, lap = self._session, self._session.journal, self._next(self._written)
        journal.write("train", lr=rate, **_train_fields(session, session.soundness.reading, lap))
        if advice := self.loader_watch.add(lap.waited, lap.stepped):
            journal.warn(advice)
        if error := session.spent.error:
            journal.warn_once(f"what was spent cannot be written down ({error}); a kill would hide it")

    def show(self) -> None:
        """The line on the screen."""
        session, lap = self._session, self._next(self._shown)
        session.journal.progress(session.pace.share_done, _progress_text(session, session.soundness.reading, lap))

    def _next(self, laps):
        self._session.pace.read_energy()
        return laps.next()


def _size_fields(session) -> dict[str, int]:
    """What a `train` line says of views that grow."""
    return {"view_size": session.loader.size} if len(session.config.views.sizes) > 1 else {}


def _train_fields(session, reading, lap: Lap) -> dict:
    """What a `train` line says, but for the learning rate; `reading` is of its step, `lap` from the line before on."""
    fields = {"loss": reading.loss, "images_per_second": lap.images_per_second}
    if session.dtype == torch.float16:
        fields["skipped_steps"] = reading.skipped_steps
    fields |= {"data_wait_fraction": lap.wait_fraction, "progress": session.state.progress, **_size_fields(session)}
    return fields | session.spent.fields(lap.joules_per_image)


def _progress_text(session, reading, lap: Lap) -> str:
    """What the progress line says; arguments as `_train_fields` takes them."""
    state, pace, health, loss = session.state, session.pace, session.checkup.measures, reading.loss
    measured = ""
    if health:
        measured = (
            f"std_ratio {health.std_ratio:.2f} rank {health.effective_rank:.0f} |cos| {health.mean_abs_cos:.2f}  "
        )
    size = "".join(f"{side} px  " for side in _size_fields(session).values())
    return (
        f"{_where(state, pace)}  {size}loss {loss:+.3f} (cosine {-loss:.3f})  {measured}"
        f"{lap.images_per_second:,.0f} img/s  wait {100 * lap.wait_fraction:.0f} %"
        + (f"  {lap.joules_per_image:.3g} J/image" if lap.joules_per_image is not None else "")
        + (f"  {reading.skipped_steps} steps skipped (fp16)" if reading.skipped_steps else "")
    )


def _where(state, pace):
    of = f"/{pace.last_step}" if pace.last_step else ""
    if pace.budget.kind == "epochs":
        epochs = int(pace.budget.amount)
        return f"epoch {min(state.epoch + 1, epochs)}/{epochs}  step {state.step}{of}"
    return f"epoch {state.epoch + 1}  step {state.step}{of}  {100 * state.progress:.1f} % of {pace.budget.text}"
