"""What a sweep remembers between two starts: its plan, and a line for each run that has ended a round."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fastsiam.config import differing_keys, load_config
from fastsiam.errors import UserError
from fastsiam.runtime.files import Appender, json_lines
from fastsiam.sweep.plan import Plan, config_path

NAME = "sweep.jsonl"
# Nothing is gained by training these again; all other ends may be mended, and the next start tries once more.
FINAL = ("done", "collapsed", "not finite")


@dataclass(frozen=True)
class Ended:
    """A run at the end of a round, or where it ended before."""

    name: str
    label: str
    seed: int
    round: int
    """From 0."""
    status: str
    """done | collapsed | not finite | refused | stuck | crashed"""
    exit_code: int
    said: str = ""
    """Sentence with which it failed."""
    knn_top1: float | None = None
    """Percent, at the end of the round; None without labelled images."""
    rankme: float | None = None
    loss: float | None = None
    std_ratio: float | None = None
    images_per_second: float | None = None
    seconds: float | None = None
    """Of all its processes."""
    step: int | None = None


_FIELDS = {field.name for field in fields(Ended)}


class Ledger:
    """Lines of `FOLDER/sweep.jsonl`, read once and appended to."""

    def __init__(self, folder: Path):
        self.path = folder / NAME
        self._file = Appender(self.path)
        lines = json_lines(self.path.read_bytes()) if self.path.exists() else []
        plans = [line for line in lines if line.get("kind") == "plan"]
        self.plan: dict = plans[-1] if plans else {}
        """Of the last start; empty before the first."""
        self._ended: dict[tuple[str, int], Ended] = {}
        self._last: dict[str, Ended] = {}
        for line in lines:
            if line.get("kind") == "run":
                self._keep(Ended(**{key: value for key, value in line.items() if key in _FIELDS}))

    def check(self, plan: Plan) -> None:
        """Raises `UserError` where the folder holds another sweep; more runs without a budget are no other one."""
        self._check_configs(plan)
        before = {key: self.plan.get(key) for key in plan.identity}
        if not self.plan or before == plan.identity:
            return
        changed = [key for key, value in plan.identity.items() if before[key] != value]
        # Rounds and measure follow from the runs.
        more = changed[0] == "runs" and set(before["runs"]) <= set(plan.identity["runs"])
        if more and plan.budget is None and len(plan.rounds) == 1 == len(before["rounds"]):
            return
        what = {"runs": "runs of other values", "measure": "another measure", "budget": f"--budget {before['budget']}"}
        raise UserError(
            f"run.name: {self.path.parent} holds a sweep with {what.get(changed[0], 'other rounds (--halving)')}; give "
            "the same command to go on with it, or run.name=NEW to keep both",
            "other-sweep",
        )

    def _check_configs(self, plan):
        """A config file may have been edited since some of the runs were trained with it."""
        for variant in plan.variants:
            path = config_path(plan, variant)
            changed = differing_keys(load_config(path), variant.config) if path.exists() else []
            # Its budget is the sweep's, see the plan.
            changed = [text for text in changed if not text.startswith(("train.epochs ", "budget ")) or not plan.budget]
            if changed:
                raise UserError(
                    f"run.name: {plan.folder} was begun with another config: {', '.join(changed[:3])}; set it back, or "
                    "give run.name=NEW for another sweep",
                    "other-config",
                )

    def begin(self, plan: Plan) -> None:
        """Writes the plan where it is new."""
        line = {"kind": "plan", **plan.identity, "each": plan.each}
        if line != self.plan:
            self._write(line)
            self.plan = line

    def add(self, ended: Ended) -> None:
        self._write({"kind": "run", **asdict(ended)})
        self._keep(ended)

    def of(self, name: str, number: int) -> Ended | None:
        """Returns how a run ended round `number`, or a round before from which it did not come back."""
        for before in range(number + 1):
            ended = self._ended.get((name, before))
            if ended is not None and (before == number or ended.status != "done"):
                return ended
        return None

    def last(self, name: str) -> Ended | None:
        """Returns how a run ended the last round that it trained in."""
        return self._last.get(name)

    @property
    def leaves_knn_out(self) -> bool:
        """True where a run that is done has RankMe alone."""
        ends = self._last.values()
        return any(end.status == "done" and end.knn_top1 is None and end.rankme is not None for end in ends)

    def is_final(self, name: str, number: int) -> bool:
        """True where a run need not be started any more for round `number`."""
        ended = self.of(name, number)
        return ended is not None and ended.status in FINAL

    def _keep(self, ended):
        self._ended[ended.name, ended.round] = ended
        last = self._last.get(ended.name)
        if last is None or last.round <= ended.round:
            self._last[ended.name] = ended

    def _write(self, line):
        self._file.pending.append((json.dumps(line) + "\n").encode())
        error = self._file.flush()
        if error is not None:
            raise UserError(
                f"run.dir: cannot write {self.path} ({error.strerror or error}); make room, and give the same command "
                "to go on",
                "ledger-unwritten",
            ) from error
