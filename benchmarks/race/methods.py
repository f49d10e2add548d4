"""Methods of a race of methods: their components, our settings, what peers have otherwise, and rows of the table.

All have the encoder, data, views (of one size), batch, optimizer, schedule and weight decay of `methods_cpu.yaml`, and
heads of equal width. Peers keep the numbers of their own CIFAR configs for the loss: lightly's CIFAR-10 benchmark
(docs/source/getting_started/benchmarks/cifar10_benchmark.py), solo-learn's scripts/pretrain/cifar. They try a grid of
rates around ours, scaled by what their loss is less than ours: lightly averages BYOL's and MoCo's two directions, and
leaves out BYOL's factor of two; solo-learn averages MoCo's.
"""

from dataclasses import dataclass, field

from benchmarks.race import standings
from fastsiam.config import Config

BENCHMARK = "methods"
# What makes methods differ, in the order of the table's columns.
COMPONENTS = ("negatives", "momentum_encoder", "predictor", "stop_gradient", "clustering")


@dataclass(frozen=True)
class Recipe:
    """What one peer has otherwise."""

    overrides: tuple[str, ...] = ()
    """Overrides of the config."""
    rate: float = 1.0
    """The middle of its grid of rates, as a multiple of ours."""


@dataclass(frozen=True)
class Entry:
    """One method of a race."""

    name: str
    components: tuple[str, ...]
    """Those of COMPONENTS that it has."""
    overrides: tuple[str, ...]
    """Our config, as overrides of `methods_cpu.yaml`."""
    peers: dict[str, Recipe] = field(default_factory=dict)
    """By the first word of a contestant's name."""

    def of(self, variant: str) -> Recipe:
        """Returns the recipe of a contestant; ours, and a peer's that is not listed, changes nothing."""
        return self.peers.get(variant.split()[0], Recipe())


_HEADS = "projector: {layers: 2, hidden: 256, out: 128, norm: %s}"
_ONE_SIZE = "views.size=32"
ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("simsiam", ("predictor", "stop_gradient"), (_ONE_SIZE,)),
        Entry(
            "fastsiam", ("predictor", "stop_gradient"), (_ONE_SIZE, "views.count=4", "method.target_views=3"),
        ),
        Entry(
            "byol", ("momentum_encoder", "predictor", "stop_gradient"),
            (_ONE_SIZE, "optimizer.base_lr=0.2", "method={name: byol, momentum: 0.99, predictor: {hidden: 256}, "
             "projector: {layers: 2, hidden: 256, out: 256, norm: hidden}}"),
            {"lightly": Recipe(rate=4.0)},
        ),
        Entry(
            "simclr", ("negatives",),
            (_ONE_SIZE, f"method={{name: simclr, temperature: 0.2, {_HEADS % 'hidden'}}}"),
            {"lightly": Recipe(("method.temperature=0.5",))},
        ),
        Entry(
            "moco", ("negatives", "momentum_encoder", "stop_gradient"),
            (_ONE_SIZE, "optimizer.base_lr=0.2", "method={name: moco, temperature: 0.1, momentum: 0.99, queue: 4096, "
             f"symmetric: true, {_HEADS % 'none'}}}"),
            # Three times as many keys as images, as solo-learn has them, would hold each image's own.
            {"lightly": Recipe(rate=2.0), "solo-learn": Recipe(("method.temperature=0.2",), rate=2.0)},
        ),
        Entry(
            "swav", ("stop_gradient", "clustering"),
            (_ONE_SIZE, f"method={{name: swav, prototypes: 512, epsilon: 0.03, {_HEADS % 'hidden'}}}"),
            {
                "lightly": Recipe(("method.epsilon=0.05",)),
                "solo-learn": Recipe(("method.epsilon=0.05", "method.prototypes=3000", "method.queue=3840",
                                      "method.queue_from=0.05", "method.freeze_prototypes=0.002")),
            },
        ),
    )
}  # fmt: skip


def protocol(variant: str, config: Config) -> str:
    """Returns one line: the numbers of a contestant's loss, its momentum encoder and its optimizer."""
    method, optimizer = config.method, config.optimizer
    words = []
    for key, text in (("temperature", "T"), ("epsilon", "eps"), ("prototypes", "prototypes"), ("queue", "queue")):
        if value := getattr(method, key, None):
            words.append(f"{text} {value:g}")
    if hasattr(method, "momentum"):
        words.append(f"tau {_tau(variant, method)}")
    heads = f"{method.projector.hidden}-{method.projector.out}"
    return ", ".join([f"heads {heads}", *words, f"wd {optimizer.weight_decay:g}", optimizer.name])


def _tau(variant, method):
    """lightly's stays; solo-learn's rises to 1 and 0.999 as its CIFAR configs have it, ours for BYOL alone."""
    last = {("fastsiam", "byol"): "..1", ("solo-learn", "byol"): "..1", ("solo-learn", "moco"): "..0.999"}
    return f"{method.momentum:g}{last.get((variant.split()[0], method.name), '')}"


def rows(lines: list[dict]) -> list[dict]:
    """Lines for a table: those of `standings.rows`, with the components of each method."""
    found = standings.rows(lines)
    for row in found:
        # kNN at equal time is told, not the time to a target.
        row["params"] = {key: value for key, value in row["params"].items() if key != "target"}
        own = ENTRIES[row["params"]["method"]].components
        row |= {name: "yes" if name in own else "no" for name in COMPONENTS}
    return found
