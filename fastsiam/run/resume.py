"""Compares two starts of one run: what may change between them, and the warning for what has changed."""

from fastsiam.config import Config, differences

_MAY_BE_AUTO = ("data.backend", "train.precision", "train.compile")
_OF_THE_BUDGET = ("train.epochs", "budget", "budget_price_per_hour")


def differences_against_resuming(before: Config, now: Config) -> dict[str, tuple]:
    """Those of `differences` with which a run of the config `before` cannot resume.

    More epochs are allowed, a larger budget of the same kind, and another device. Where one of the two configs says
    auto, what that came to is in the checkpoint, and is compared there.
    """
    same_kind = before.to_spend.kind == now.to_spend.kind
    allowed = {"train.device"}
    if same_kind and not asks_for_less(before, now):
        allowed.update(_OF_THE_BUDGET)
    for key in _MAY_BE_AUTO:
        section, name = key.split(".")
        if "auto" in (getattr(getattr(config, section), name) for config in (before, now)):
            allowed.add(key)
    return {key: values for key, values in differences(before, now).items() if key not in allowed}


def asks_for_less(before: Config, now: Config) -> bool:
    """Whether the budget of `now` is a smaller one of the same kind."""
    return before.to_spend.kind == now.to_spend.kind and before.to_spend.amount > now.to_spend.amount


def changes(saved: dict, computation: dict, config: Config) -> list[str]:
    """The warnings for a run that resumes from the checkpoint `saved`.

    `computation`: what the last bits depend on beside the config: those of `Runtime.names`, `threads` of the CPU in
    each process, and `ranks`, the number of processes.
    """
    found = changed_computation(saved["computation"], computation), changed_budget(saved["budget"], config)
    return [sentence for sentence in found if sentence]


def changed_computation(then: dict, now: dict) -> str | None:
    """The warning for a run that is resumed on other terms, see `changes`; None for the same ones.

    What an older checkpoint does not hold is not compared.
    """
    keys = [key for key in now if key in then and then[key] != now[key]]
    if not keys:
        return None
    before, after = (", ".join(_term(key, side[key]) for key in keys) for side in (then, now))
    effect = "results may differ" if "dtype" in keys else "the last bits may differ"
    return f"the checkpoint was written with {before}, and this start has {after}: {effect}"


def changed_budget(before: float, now: Config) -> str | None:
    """The warning for a run that goes on with a larger budget than the amount `before` of its checkpoint."""
    budget = now.to_spend
    if before == budget.amount:
        return None
    share = f"{before / budget.amount:.0%}"
    return (
        f"{budget.text} in all now, of which the budget before was {share}: learning rate and view size follow the new "
        "schedule from here on, which is not what a run of this length has from its first step"
    )


def _term(key, value):
    if key == "compile":
        return f"compile {'on' if value else 'off'}"
    if key == "threads":
        return f"{value} CPU threads"
    if key == "ranks":
        return f"{value} process{'es' if value > 1 else ''}"
    return str(value)
