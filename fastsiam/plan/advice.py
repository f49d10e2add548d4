"""Which stage a run waits for, and what would change it."""

from dataclasses import dataclass

from fastsiam.config import Config
from fastsiam.config.published import batch_size_text
from fastsiam.data.bottleneck import Loading, Window, advise
from fastsiam.plan.results import BatchRate, Measured, Stages

# Below, a gain is not worth a sentence, and within the spread of a minute's measurements.
LEAST_GAIN = 1.05
_LOADER = ("disk", "decoding", "augmentation")
_STEP = ("step", "communication")


@dataclass(frozen=True)
class Limit:
    """The slowest stage, and how training compares with what loader and step allow."""

    stage: str
    expected: float
    """Images a second: the slower of loader and step where they run side by side; both after each other on a CPU."""
    share: float
    """Measured end to end, of that."""


@dataclass(frozen=True)
class Tip:
    """What to change, and why."""

    cause: str
    action: str
    gain: float | None = None
    """Of images a second end to end, from measured loaders and steps; None where it was not measured."""


def together(loader: float | None, step: float, shares_cores: bool) -> float:
    """Images a second of training, from those of its loader and its step."""
    if loader is None:
        return step
    return 1 / (1 / loader + 1 / step) if shares_cores else min(loader, step)


def limit_of(measured: Measured) -> Limit:
    """Of the stages that can be the limit the one that takes longest for an image."""
    loader = measured.loader and measured.loader.median
    expected = together(loader, measured.step.median, measured.shares_cores)
    share = measured.end_to_end.rate.median / expected
    return Limit(slowest(measured.stages, loader, measured.step.median, measured.shares_cores), expected, share)


def slowest(stages: Stages, loader: float | None, step: float, shares_cores: bool) -> str:
    """On a CPU all stages add up; beside a GPU those of the slower of loader and step count."""
    known = stages.known()
    if not shares_cores:
        side = _LOADER if loader is not None and loader < step else _STEP
        known = {name: seconds for name, seconds in known.items() if name in side} or known
    return max(known, key=known.get)


def tips(config: Config, measured: Measured, loading: Loading, limit: Limit) -> list[Tip]:
    """What would make the run faster, the measured gains first."""
    found = [*_loader_tips(measured, loading), *_batch_tips(config, measured)]
    if limit.stage in _STEP:
        found += _step_tips(config, measured, limit)
    found.sort(key=lambda tip: -(tip.gain or 0))
    seen: set[str] = set()
    return [tip for tip in found if not (tip.action in seen or seen.add(tip.action))]


def _loader_tips(measured: Measured, loading: Loading) -> list[Tip]:
    found, own = [], measured.loader
    for other in measured.loaders[1:]:
        if other.rate is None or other.rate.lowest <= own.highest:
            continue
        gain = _gain(measured, loader=other.rate.median)
        if gain >= LEAST_GAIN:
            cause = f"{other.name} loads {other.rate.median:,.0f} images/s, {measured.backend} {own.median:,.0f}"
            found.append(Tip(cause, f"set {other.settings}", gain))
    end = measured.end_to_end
    advice = advise(loading, Window(end.wait_fraction, end.idle_cores, end.disk_cores))
    if advice and advice.action not in {tip.action for tip in found}:
        waiting = f"{100 * end.wait_fraction:.0f} % of the time is spent waiting for data"
        found.append(Tip(f"{waiting}: {advice.cause}", advice.action))
    return found


def _batch_tips(config: Config, measured: Measured) -> list[Tip]:
    def gain(batch: BatchRate) -> float:
        clear = batch.rate is not None and batch.rate.lowest > measured.step.highest
        return _gain(measured, step=batch.rate.median) if clear else 0.0

    best = max(measured.batch_sizes, key=gain)
    if measured.measured_batch_size != config.train.batch_size or gain(best) < LEAST_GAIN:
        return []
    cause = f"a step on {best.batch_size} images is faster for each image; {batch_size_text(best.batch_size)}"
    rate = f"the learning rate becomes {best.learning_rate:g}"
    return [Tip(cause, f"set train.batch_size={best.batch_size} ({rate})", gain(best))]


def _step_tips(config: Config, measured: Measured, limit: Limit) -> list[Tip]:
    found, train, on_gpu = [], config.train, not measured.shares_cores
    if limit.stage == "communication":
        found.append(Tip("the ranks wait for each other's gradients", "set a larger train.batch_size, or fewer ranks"))
    if not measured.compiles and (on_gpu or measured.ranks > 1):
        found.append(Tip("the step is not compiled", "set train.compile=on"))
    if measured.dtype == "fp32" and train.precision == "fp32" and on_gpu:
        found.append(Tip("the step computes in fp32", "set train.precision=auto, bf16 where the GPU has it"))
    if not train.channels_last:
        found.append(Tip("convolutions are faster on channels-last memory", "set train.channels_last=true"))
    size = config.views.full_size
    if len(config.views.sizes) == 1 and (smaller := _smaller_view(size)):
        share = (smaller / size) ** 2
        cause = f"views of {smaller} px need {share:.2f} of the arithmetic of {size} px"
        found.append(Tip(cause, f"set views.size={smaller} (another recipe than the paper's)"))
    found.append(
        Tip("ResNets wait for memory more than for arithmetic", "take a GPU with more memory bandwidth, or more GPUs")
        if on_gpu
        else Tip("this machine has no GPU, or train.device does not let it be used", "train on a GPU")
    )
    return found


def _smaller_view(size):
    """Five sevenths, as 160 px of 224, in whole strides of a ResNet at ImageNet's sizes; None for small views."""
    return size * 5 // 7 // 32 * 32 if size >= 96 else None


def _gain(measured: Measured, loader: float | None = None, step: float | None = None) -> float:
    """Of training, where one of the two rates is another."""
    before = measured.loader and measured.loader.median
    now = together(loader or before, step or measured.step.median, measured.shares_cores)
    return now / together(before, measured.step.median, measured.shares_cores)
