"""Text of tables: numbers, and captions that name machine, versions, commit and days."""

import math

ABSENT, NOTHING = "absent", "-"
VERSIONS = ("torch", "cuda", "triton", "torchvision", "numba", "dali", "lightly")


def number(value: float) -> str:
    """Returns three significant digits, a whole number from 1,000 on; integers in full."""
    if isinstance(value, int) or value == 0:
        return f"{value:,.0f}"
    value = float(f"{value:.3g}") if abs(value) < 1000 else value
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def caption(lines: list[dict], constant: dict, commit: str | None = None) -> str:
    """Returns machine, versions, shared params, n, commit and days, then why each absent row is absent."""
    machine = lines[0]["environment"]
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    if machine["gpu"]:
        limit = machine["power_limit_watts"]
        power = f", {limit:.0f} W" if limit else ""
        where = f"{machine['gpu']} (driver {machine['driver']}{power}), {where}"
    versions = [f"{name} {machine[name]}" for name in VERSIONS if machine.get(name)]
    # A line without samples is one run.
    counts = [len(line["samples_seconds"]) or 1 for line in lines if ABSENT not in line]
    n = f"n = {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "") if counts else "n = 0"
    shared = [f"{name} {param(value)}" for name, value in constant.items()]
    commit = commit or (f"commit {machine['commit'][:12]}" if machine["commit"] else "no commit")
    days = sorted({line["environment"]["date"][:10] for line in lines})
    when = " to ".join(dict.fromkeys((days[0], days[-1])))
    parts = [where, ", ".join(versions), ", ".join([*shared, n]), commit, when]
    missing = {line["variant"]: line[ABSENT] for line in lines if line.get(ABSENT)}
    parts += [f"{variant} is absent: {sentence}" for variant, sentence in missing.items()]
    return "; ".join(filter(None, parts)) + "."


def param(value) -> str:
    """Returns a param of a benchmark as text."""
    return NOTHING if value is None else number(value) if isinstance(value, float) else str(value)
