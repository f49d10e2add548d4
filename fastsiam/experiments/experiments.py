"""The paper's experiments: each a list of variants of a base config, and what the paper finds about their order.

A variant is a set of config values; its label names its run folders and its row of the paper. Sizes follow the base:
batch sizes and output dimensions keep the paper's ratios, steps of an epoch are counted.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastsiam.errors import UserError
from fastsiam.experiments import published
from fastsiam.experiments.base import Base
from fastsiam.experiments.published import Result

# Of the paper's base: ImageNet at batch 256, d = 2048.
_BATCH, _DIM = 256, 2048
# The paper trains batches of 1024 and more with 10 of 100 epochs of warm-up.
_LARGE_BATCH, _WARMUP = 1024, 0.1
# SwAV's authors put 3,840 earlier projections beside batches of 256, and none beside 4,096.
_QUEUE, _QUEUE_BELOW = 3840 // 256, 1024


@dataclass(frozen=True)
class Case:
    """One variant of an experiment."""

    row: str
    """Of the paper's table."""
    label: str
    """Names its run folders."""
    title: str
    values: Mapping[str, object]
    """Config values in which it differs from the base."""
    paper: Result


@dataclass(frozen=True)
class Claim:
    """The paper finds that one variant is better than another, by their rows."""

    better: str
    worse: str


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper."""

    name: str
    title: str
    source: str
    """Table, figure or section of the paper."""
    shows: str
    """What the paper shows with it, in a sentence."""
    cases: Callable[[Base], list[Case]] = field(repr=False)
    claims: tuple[Claim, ...] = ()


def _rows(table: Mapping[str, Result], rows: Mapping[str, tuple[str, dict]]) -> list[Case]:
    return [Case(row, row, title, values, table[row]) for row, (title, values) in rows.items()]


def _stop_gradient(base: Base):
    rows = {
        "with": ("with stop-gradient", {}),
        "without": ("without stop-gradient", {"method.stop_gradient": False}),
    }
    return _rows(published.STOP_GRADIENT, rows)


def _predictor(base: Base):
    rate = "optimizer.predictor_lr"
    rows = {
        "none": ("no predictor", {"method.predictor": None}),
        "fixed": ("fixed random predictor", {"method.predictor.frozen": True}),
        "decayed": ("learning rate decayed", {rate: "scheduled"}),
        "constant": ("learning rate constant", {rate: "fixed"}),
    }
    return _rows(published.PREDICTOR, rows)


def _batch_size(base: Base):
    cases, train = [], base.config.train
    for batch, result in published.BATCH_SIZE.items():
        size = train.batch_size * batch // _BATCH
        if not 2 <= size <= base.images:
            continue
        values: dict = {"train.batch_size": size}
        if train.micro_batch is not None and size % train.micro_batch:
            values["train.micro_batch"] = None
        if batch >= _LARGE_BATCH:
            values["optimizer.warmup"] = max(_WARMUP, base.config.optimizer.warmup)
        cases.append(Case(str(batch), f"batch={size}", f"{size:,} images (the paper's {batch:,})", values, result))
    return cases


def _batch_norm(base: Base):
    def norms(projector, predictor):
        return {"method.projector.norm": projector, "method.predictor.norm": predictor}

    rows = {
        "none": ("none", norms("none", "none")),
        "hidden": ("hidden layers", norms("hidden", "hidden")),
        "default": ("hidden layers and projector's output", norms("all", "hidden")),
        "all": ("all layers, predictor's output too", norms("all", "all")),
    }
    return _rows(published.BATCH_NORM, rows)


def _similarity(base: Base):
    rows = {name: (name.replace("_", "-"), {"method.similarity": name}) for name in published.SIMILARITY}
    return _rows(published.SIMILARITY, rows)


def _symmetry(base: Base):
    rows = {
        "symmetric": ("symmetric", {}),
        "asymmetric": ("asymmetric", {"method.symmetric": False}),
        "asymmetric_2x": ("asymmetric, two pairs an image", {"method.symmetric": False, "views": _with_views(base, 4)}),
    }
    return _rows(published.SYMMETRY, rows)


def _output_dimension(base: Base):
    cases, out = [], base.config.method.projector.out
    for paper_dim, result in published.OUTPUT_DIMENSION.items():
        dim = out * paper_dim // _DIM
        values = {"method.projector.out": dim, "method.predictor.hidden": max(1, dim // 4)}
        if dim:
            title = f"{dim:,} dimensions (the paper's {paper_dim:,})"
            cases.append(Case(str(paper_dim), f"out={dim}", title, values, result))
    return cases


def _simclr(base: Base):
    def simclr(**more):
        return {"method": {"name": "simclr", "projector": _contrastive_projector(base), **more}}

    predictor = {"hidden": base.config.method.predictor.hidden}
    rows = {
        "simclr": ("SimCLR", simclr()),
        "predictor": ("with predictor", simclr(predictor=predictor)),
        "stop_gradient": ("with predictor and stop-gradient", simclr(predictor=predictor, stop_gradient=True)),
    }
    return _rows(published.SIMCLR, rows)


def _swav(base: Base):
    method, batch = base.config.method, base.config.train.batch_size
    shared = {
        "name": "swav",
        "projector": _contrastive_projector(base),
        # SwAV's 3000 beside d = 2048.
        "prototypes": max(2, round(3000 * method.projector.out / _DIM)),
        "queue": _QUEUE * batch if batch < _QUEUE_BELOW else 0,
    }
    rows = {
        "swav": ("SwAV", {"method": shared}),
        "predictor": ("with predictor", {"method": {**shared, "predictor": {"hidden": method.predictor.hidden}}}),
        "gradient": ("without stop-gradient", {"method": {**shared, "stop_gradient": False}}),
    }
    return _rows(published.SWAV, rows)


def _alternating(base: Base):
    steps = {"1": 1, "10": 10, "100": 100, "epoch": base.steps_per_epoch}
    heads = _heads(base, "projector", "predictor")
    rows = {
        label: (
            f"{k} step{'s' * (k > 1)}" if label != "epoch" else f"1 epoch ({k:,} steps)",
            {"method": {"name": "simsiam_alternating", **heads, "steps": k}},
        )
        for label, k in steps.items()
    }
    return _rows(published.ALTERNATING, rows)


def _moving_average(base: Base):
    average = {"name": "simsiam_average", **_heads(base, "projector"), "images": base.images}
    rows = {
        "average": ("moving average, no predictor", {"method": average, "train.micro_batch": None}),
        "neither": ("no predictor", {"method.predictor": None}),
    }
    return _rows(published.MOVING_AVERAGE, rows)


def _heads(base, *names):
    return {name: getattr(base.config.method, name).model_dump() for name in names}


def _contrastive_projector(base):
    """That of SimCLR and SwAV, 2048-128, no wider than the base's."""
    projector = base.config.method.projector
    return {"layers": 2, "hidden": projector.hidden, "out": min(128, projector.out), "norm": "hidden"}


def _with_views(base, count):
    return [{**base.config.views[0].model_dump(), "count": count}]


EXPERIMENTS = {
    found.name: found
    for found in (
        Experiment(
            "stop_gradient", "Stop-gradient", "Figure 2",
            "Without stop-gradient the loss reaches its minimum at once and z collapses to one point.",
            _stop_gradient, (Claim("with", "without"),),
        ),
        Experiment(
            "predictor", "Predictor", "Table 1",
            "No predictor collapses, a fixed random one learns nothing, a constant learning rate is as good as a "
            "decayed one or better.",
            _predictor,
            (Claim("decayed", "none"), Claim("decayed", "fixed"), Claim("constant", "decayed")),
        ),
        Experiment(
            "batch_size", "Batch size", "Table 2",
            "Accuracy is flat over a wide range of batch sizes and falls at both ends.",
            _batch_size,
            (Claim("256", "64"), Claim("256", "4096")),
        ),
        Experiment(
            "batch_norm", "Batch norm in the heads", "Table 3",
            "Batch norm in the hidden layers is what matters, the projector's output adds a little, the predictor's is "
            "unstable.",
            _batch_norm,
            (Claim("hidden", "none"), Claim("default", "hidden"), Claim("default", "all")),
        ),
        Experiment(
            "similarity", "Similarity", "section 4.5",
            "Cross-entropy in place of the cosine converges too, to a lower accuracy.",
            _similarity, (Claim("cosine", "cross_entropy"),),
        ),
        Experiment(
            "symmetry", "Symmetric loss", "section 4.6",
            "An asymmetric loss works; two pairs of views make up most of the difference.",
            _symmetry,
            (Claim("symmetric", "asymmetric"), Claim("asymmetric_2x", "asymmetric"),
             Claim("symmetric", "asymmetric_2x")),
        ),
        Experiment(
            "output_dimension", "Output dimension", "appendix B",
            "More dimensions of z are better, with a predictor a quarter as wide.",
            _output_dimension, (Claim("2048", "1024"), Claim("1024", "512"), Claim("512", "256")),
        ),
        Experiment(
            "simclr", "SimCLR with predictor and stop-gradient", "appendix C",
            "What SimSiam needs does not help SimCLR, which has negatives.",
            _simclr, (Claim("simclr", "predictor"), Claim("simclr", "stop_gradient")),
        ),
        Experiment(
            "swav", "SwAV with predictor and without stop-gradient", "appendix C",
            "A predictor does not help SwAV; without stop-gradient at the codes it diverges.",
            _swav, (Claim("swav", "predictor"), Claim("swav", "gradient")),
        ),
        Experiment(
            "alternating", "Alternating optimisation", "section 5.1",
            "Targets held for k steps work as well as SimSiam: it behaves like an alternation between two problems.",
            _alternating, (Claim("10", "1"), Claim("100", "1"), Claim("1", "epoch")),
        ),
        Experiment(
            "moving_average", "Moving average in the predictor's place", "section 5.2",
            "A moving average over augmentations takes the predictor's place to a degree.",
            _moving_average, (Claim("average", "neither"),),
        ),
    )
}  # fmt: skip


def experiment_named(name: str) -> Experiment:
    """Returns an experiment; raises `UserError` that names the nearest one."""
    if name in EXPERIMENTS:
        return EXPERIMENTS[name]
    near = difflib.get_close_matches(name.lower().replace("-", "_"), EXPERIMENTS, 1)
    cure = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(EXPERIMENTS)}"
    raise UserError(f"NAME: {name} is no experiment; {cure}", "no-such-experiment")
