"""Table of the README: methods component by component, and how ours and the peers' versions of each have raced."""

from benchmarks.race.methods import BENCHMARK, COMPONENTS, rows
from benchmarks.readme.captions import ABSENT, NOTHING, caption, number

CONTESTANTS = ("fastsiam", "lightly", "solo-learn DALI")
NAMES = {
    "simsiam": "SimSiam", "fastsiam": "FastSiam (`method.target_views=3`)", "byol": "BYOL", "simclr": "SimCLR",
    "moco": "MoCo v2", "swav": "SwAV",
}  # fmt: skip
# Where a component is not simply there.
WORDS = {
    ("simclr", "negatives"): "the batch", ("moco", "negatives"): "a queue", ("byol", "stop_gradient"): "by the target",
    ("moco", "stop_gradient"): "by the keys", ("swav", "predictor"): "prototypes",
    ("swav", "stop_gradient"): "at the codes",
}  # fmt: skip


def text(found: dict[str, list[list[dict]]]) -> str:
    """Returns caption and table of the first machine; cells name the contestants' numbers in their order."""
    machines = found.get(BENCHMARK, [])
    if not machines:
        return "No race of methods has been recorded yet."
    raced = [row for row in rows(machines[0]) if ABSENT not in row]
    by_method: dict[str, dict[str, dict]] = {}
    for row in raced:
        by_method.setdefault(row["params"]["method"], {})[row["variant"]] = row
    first = raced[0]["params"]
    shared = {key: first[key] for key in first if all(row["params"].get(key) == first[key] for row in raced)}
    heads = ["method", *(name.replace("_", " ") for name in COMPONENTS), "kNN, %", "images/s", "MiB"]
    rule = ["---"] * (1 + len(COMPONENTS)) + ["---:"] * 3
    table = [heads, rule, *(_cells(name, by_method[name]) for name in NAMES if name in by_method)]
    lines = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    return f"{caption(raced, shared)} Cells: {' / '.join(CONTESTANTS)}.\n\n{lines}"


def _cells(method, by_variant):
    own = next(iter(by_variant.values()))
    components = [WORDS.get((method, name), "yes" if own[name] == "yes" else "") for name in COMPONENTS]
    numbers = [
        " / ".join(show(by_variant[name]) if name in by_variant else NOTHING for name in CONTESTANTS)
        for show in (
            lambda row: row["knn"],
            lambda row: number(row["images_per_second"]),
            lambda row: number(row["peak_memory_bytes"] / 2**20),
        )
    ]
    return [NAMES[method], *components, *numbers]
