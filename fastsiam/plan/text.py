"""A plan in words and as JSON."""

import json
from dataclasses import asdict, dataclass

import torch

import fastsiam
from fastsiam.config import Config
from fastsiam.config.budget import Budget
from fastsiam.config.published import TABLE_4, Worth, batch_size_text, worth
from fastsiam.data.bottleneck import Loading
from fastsiam.optim.build import large_batch_warning
from fastsiam.plan.advice import Limit, Tip, limit_of, tips
from fastsiam.plan.predict import Costs, Run, Schedule, run_of_budget, run_of_config
from fastsiam.plan.results import Measured, Rate
from fastsiam.runtime.energy import kilowatt_hours

_STAGES = {
    "disk": "reading from the disk",
    "decoding": "decoding and cropping",
    "augmentation": "augmentation",
    "step": "the step",
    "communication": "communication between ranks",
}


@dataclass(frozen=True)
class Plan:
    """What was measured, and all that follows from it."""

    config: Config
    measured: Measured
    schedule: Schedule
    limit: Limit
    tips: list[Tip]
    asked: Budget
    """Of the config: its epochs or its budget."""
    run: Run | None
    """None where a budget of energy cannot be measured here."""
    budget: Budget | None
    """Asked for on top."""
    bought: Run | None
    """What it buys."""

    @classmethod
    def of(cls, config: Config, budget: Budget | None, measured: Measured, loading: Loading) -> "Plan":
        schedule, costs, limit = Schedule.of(config, measured.images), Costs.of(measured), limit_of(measured)
        return cls(
            config,
            measured,
            schedule,
            limit,
            tips(config, measured, loading, limit),
            config.to_spend,
            run_of_config(schedule, costs, config.to_spend),
            budget,
            None if budget is None else run_of_budget(schedule, costs, budget),
        )

    @property
    def epoch_seconds(self) -> float:
        """Of training alone."""
        return self.schedule.images_per_epoch / self.measured.end_to_end.rate.median

    def worth_of(self, run: Run | None) -> tuple[list[Worth], str | None]:
        return ([], None) if run is None else worth(self.config, self.measured.images, run.epochs)

    def to_json(self) -> str:
        """One object; what is not known is null."""
        measured, config = self.measured, self.config
        stages = asdict(measured.stages)
        found = {
            "fastsiam": fastsiam.__version__,
            "torch": torch.__version__,
            "config": config.run.name,
            "device": measured.device,
            "gpu": measured.gpu,
            "dtype": measured.dtype,
            "compile": measured.compiles,
            "ranks": measured.ranks,
            "images": measured.images,
            "val_images": measured.val_images,
            "batch_size": config.train.batch_size,
            "learning_rate": config.learning_rate,
            "measured_batch_size": measured.measured_batch_size,
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "backend": measured.backend,
            "images_per_second": _rate(measured.end_to_end.rate),
            "step_images_per_second": _rate(measured.step),
            "wait_fraction": measured.end_to_end.wait_fraction,
            "joules_per_image": measured.end_to_end.joules_per_image,
            "energy": measured.energy,
            **self._alternatives(),
            "seconds_per_image": {name: stages[name] for name in _STAGES},
            "limit": {"stage": self.limit.stage, "expected": self.limit.expected, "share": self.limit.share},
            "advice": [asdict(tip) for tip in self.tips],
            "epoch_seconds": self.epoch_seconds,
            "start_seconds": measured.start_seconds,
            "compile_seconds": measured.compile_seconds,
            "knn_seconds": measured.knn_seconds,
            "collapse_seconds": measured.collapse_seconds,
            "checkpoint": {"bytes": measured.saving.bytes, "seconds": measured.saving.seconds},
            "run": self._run(self.asked, self.run),
            "budget": None if self.budget is None else self._run(self.budget, self.bought),
            "notes": [*measured.notes, *measured.stages.notes],
            "measuring_seconds": measured.seconds,
        }
        return json.dumps(found, allow_nan=False)

    def _alternatives(self):
        measured = self.measured
        return {
            "loaders": [
                {"name": one.name, "images_per_second": _rate(one.rate), "note": one.note} for one in measured.loaders
            ],
            "batch_sizes": [
                {
                    "batch_size": one.batch_size,
                    "learning_rate": one.learning_rate,
                    "step_images_per_second": _rate(one.rate),
                    "note": one.note,
                }
                for one in measured.batch_sizes
            ],
        }

    def _run(self, budget, run):
        found, reason = self.worth_of(run)
        published = [
            {
                "source": one.table.who,
                "metric": one.table.metric,
                "batch_size": one.table.batch_size,
                "below": one.below and {"epochs": one.below, "percent": one.table.rows[one.below]},
                "above": one.above and {"epochs": one.above, "percent": one.table.rows[one.above]},
            }
            for one in found
        ]
        text = {"asked": budget.text, "kind": budget.kind, "amount": budget.amount}
        if run is None:
            return {**text, "steps": None}
        joules = run.joules
        return {
            **text,
            **run.fields(),
            "kwh": None if joules is None else kilowatt_hours(joules),
            "cost": run.cost(self.config.budget_price_per_hour),
            "published": published,
            "not_published": reason,
        }

    def to_text(self) -> str:
        """The answer first, then what it is made of."""
        measured = self.measured
        lines = [self._answer(), "", *self._machine(), "", *self._rates(), "", *self._limit(), "", *self._parts()]
        lines += [f"note      {note}" for note in [*measured.notes, *measured.stages.notes]]
        if warning := large_batch_warning(self.config):
            lines.append(f"note      {warning}")
        return "\n".join(lines)

    def _answer(self):
        parts = []
        if self.run is None:
            parts.append(f"{self.asked.text}: energy is {self.measured.energy}, so nobody can say how far it goes")
        elif self.asked.kind == "epochs":
            epochs = _epochs(self.run.epochs)
            parts.append(f"{epochs} take{'s' if epochs == '1 epoch' else ''} {spoken(self.run.total)}")
        else:
            parts.append(_bought(self.asked, self.run, f" in {spoken(self.run.total)}"))
        parts.append(f"{_STAGES[self.limit.stage]} is the limit")
        if self.budget is not None:
            none = f"{self.budget.text} cannot be measured here"
            parts.append(none if self.bought is None else _bought(self.budget, self.bought))
        return "; ".join(parts) + "."

    def _machine(self):
        measured, config = self.measured, self.config
        ranks = f", {measured.ranks} ranks" if measured.ranks > 1 else ""
        val = f", {measured.val_images:,} for kNN" if measured.val_images else ", no kNN"
        return [
            f"fastsiam  {fastsiam.__version__}, torch {torch.__version__}, {measured.gpu or measured.device}{ranks}",
            f"data      {measured.images:,} images under {config.data.train}{val}",
            f"step      {config.model.encoder}, {self._views()}, batch {config.train.batch_size}, "
            f"{measured.dtype}, compile {'on' if measured.compiles else 'off'}",
            f"loader    {measured.loader_text}",
            f"measured  in {spoken(measured.seconds)}, in windows of time, at batch {measured.measured_batch_size}",
        ]

    def _views(self):
        views = self.config.views
        each = "" if views.count == 2 else f"{views.count} views of "
        if len(views.sizes) == 1:
            return f"{each}{views.size} px"
        return f"{each}{views.full_size} px (a run of {views.size} px is faster while they grow)"

    def _rates(self):
        measured = self.measured
        lines = [_row("images/s", "median", "lowest", "highest")]
        lines.append(_rate_row("training", measured.end_to_end.rate, "loader and step together"))
        lines.append(_rate_row("step alone", measured.step, "on views that lie on the device"))
        for one in measured.loaders:
            lines.append(_rate_row(f"loader alone, {one.name}", one.rate, one.note or ""))
        lines += ["", _row("batch, step alone", "median", "lowest", "highest", "learning rate")]
        for one in measured.batch_sizes:
            note = f"{one.learning_rate:.4g}" + (f"  {one.note}" if one.note else "")
            lines.append(_rate_row(f"{one.batch_size:,}", one.rate, note))
        return lines

    def _limit(self):
        measured = self.measured
        stages = ", ".join(f"{_STAGES[name]} {_millis(value)}" for name, value in measured.stages.known().items())
        how = "one after the other on the same cores" if measured.shares_cores else "side by side"
        lines = [
            f"an image  {stages}, each alone",
            f"limit     {_STAGES[self.limit.stage]}; loader and step {how} come to {_digits(self.limit.expected)} "
            f"images/s, training reaches {100 * self.limit.share:.0f} % of that",
        ]
        for tip in self.tips:
            gain = f"{tip.gain:.2f} times the images/s, from what was measured" if tip.gain else "not measured"
            lines.append(f"try       {tip.action}: {tip.cause} ({gain})")
        return lines

    def _parts(self):
        config = self.config
        lines = [f"epoch     {self.schedule.steps_per_epoch:,} steps, {spoken(self.epoch_seconds)}"]
        if self.run is not None:
            lines += self._run_lines(self.asked.text, self.run)
        if self.bought is not None:
            lines += self._run_lines(self.budget.text, self.bought)
        if self.measured.end_to_end.joules_per_image is None:
            lines.append(f"energy    {self.measured.energy}")
        if config.budget_price_per_hour is None:
            lines.append("cost      not known: set budget_price_per_hour to what an hour of all machines costs")
        return lines

    def _run_lines(self, name, run):
        parts = [("start", run.start), ("compilation", run.compile), ("training", run.train)]
        parts += [(f"{run.knn_times} kNN", run.knn), (f"{run.collapse_times} collapse measures", run.collapse)]
        size = self.measured.saving.bytes
        saves = f"{run.save_times} checkpoints" + (f" of {size / 1e6:,.0f} MB" if size else "")
        parts.append((saves, run.saves))
        text = " + ".join(f"{part} {spoken(seconds)}" for part, seconds in parts if seconds)
        epochs = "" if name == _epochs(run.epochs) else f"{_epochs(run.epochs)}, "
        lines = [f"{name:<9} {epochs}{run.steps:,} steps in {spoken(run.total)} = {text}"]
        if run.joules is not None:
            each = self.measured.end_to_end.joules_per_image
            lines.append(f"energy    {kilowatt_hours(run.joules):.3g} kWh at {run.watts:,.0f} W, {each:.3g} J/image")
        price = self.config.budget_price_per_hour
        if price is not None:
            lines.append(f"cost      {run.cost(price):,.2f} at {price:g} an hour")
        found, reason = self.worth_of(run)
        lines += [f"worth     {one}" for one in found]
        if any(one.table is TABLE_4 for one in found):
            lines.append(f"worth     {batch_size_text(self.config.train.batch_size)}")
        if found:
            lines.append("worth     these are numbers of others' runs of full length, not a promise")
        return [*lines, f"worth     {reason}"] if reason else lines


def spoken(seconds: float) -> str:
    """As people say it: 0.4 s, 52 s, 12 min 5 s, 11 h 20 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    for unit, size, part, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        whole, rest = divmod(round(seconds / smaller), size // smaller)
        if whole:
            return f"{whole} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{round(seconds)} s"


def _bought(budget: Budget, run: Run, time: str = "") -> str:
    if not run.steps:
        return f"{budget.text} buys no step, for what is no training takes {spoken(run.total)}"
    return f"{budget.text} buys {_epochs(run.epochs)}{time}"


def _rate(rate: Rate | None):
    if rate is None:
        return None
    return {"median": rate.median, "lowest": rate.lowest, "highest": rate.highest, "windows": len(rate.windows)}


def _row(name: str, median: str, lowest: str, highest: str, note: str = "") -> str:
    return f"{name:<40}{median:>9}{lowest:>9}{highest:>9}  {note}".rstrip()


def _rate_row(name: str, rate: Rate | None, note: str) -> str:
    if rate is None:
        return _row(name, "-", "", "", note)
    spread = (_digits(rate.lowest), _digits(rate.highest)) if len(rate.windows) > 1 else ("once", "")
    return _row(name, _digits(rate.median), *spread, note)


def _digits(number: float) -> str:
    """Three digits, no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _millis(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _epochs(number: float) -> str:
    text = f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
    return f"{text} epoch" + ("" if text == "1" else "s")
