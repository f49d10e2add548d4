"""Finds the stage that limits a run, and the changes that would speed it up."""

from collections.abc import Iterator

from fastsiam.config import Config
from fastsiam.config.published import batch_size_text
from fastsiam.data.bottleneck import Loading, Window, advise
from fastsiam.plan.results import BatchRate, Limit, Measured, Tip

# Below, a gain is within the spread of a minute's measurements.
LEAST_GAIN = 1.05
_LOADER = ("disk", "decoding", "augmentation")
_STEP = ("step", "communication")


def together(loader: float | None, step: float, shares_cores: bool) -> float:
    """Returns images per second of training from those of its loader and its step."""
    if loader is None:
        return step
    return 1 / (1 / loader + 1 / step) if shares_cores else min(loader, step)


def limit_of(measured: Measured) -> Limit:
    """Returns the slowest stage: of all stages on a CPU; beside a GPU, of the slower of loader and step."""
    loader, step = measured.loader_rate and measured.loader_rate.median, measured.step_images_per_second.median
    stages = measured.known_stages
    if not measured.shares_cores:
        side = _LOADER if loader is not None and loader < step else _STEP
        stages = {name: seconds for name, seconds in stages.items() if name in side} or stages
    expected = together(loader, step, measured.shares_cores)
    return Limit(max(stages, key=stages.get), expected, measured.images_per_second.median / expected)


def tips(config: Config, measured: Measured, loading: Loading, limit: Limit) -> tuple[Tip, ...]:
    """Returns the changes that would speed the run up, the largest measured gain first."""
    found = [*_loader_tips(measured, loading), *_batch_tips(config, measured)]
    if limit.stage in _STEP:
        found += _step_tips(config, measured, limit)
    return tuple(sorted(found, key=lambda tip: -(tip.gain or 0)))


def _loader_tips(measured: Measured, loading: Loading) -> list[Tip]:
    found, own = [], measured.loader_rate
    for other in measured.loaders[1:]:
        rate = other.images_per_second
        if rate is None or rate.lowest <= own.highest:
            continue
        gain = _gain(measured, loader=rate.median)
        if gain >= LEAST_GAIN:
            cause = f"{other.name} loads {rate.median:,.0f} images/s, {measured.backend} {own.median:,.0f}"
            found.append(Tip("faster-loader", f"set {other.settings}", cause, gain))
    advice = advise(loading, Window(measured.wait_fraction, measured.idle_cores, measured.disk_cores))
    if advice and advice.action not in {tip.action for tip in found}:
        cause = f"{100 * measured.wait_fraction:.0f} % of the time is spent waiting for data: {advice.cause}"
        found.append(Tip("slow-loader", advice.action, cause))
    return found


def _batch_tips(config: Config, measured: Measured) -> Iterator[Tip]:
    if measured.measured_batch_size != config.train.batch_size:
        return

    def gain(batch: BatchRate) -> float:
        rate, own = batch.step_images_per_second, measured.step_images_per_second
        return _gain(measured, step=rate.median) if rate and rate.lowest > own.highest else 0.0

    best = max(measured.batch_sizes, key=gain)
    if gain(best) >= LEAST_GAIN:
        action = f"set train.batch_size={best.batch_size} (the learning rate becomes {best.learning_rate:g})"
        cause = f"steps of {best.batch_size} images are faster per image; {batch_size_text(best.batch_size)}"
        yield Tip("batch-size", action, cause, gain(best))


def _step_tips(config: Config, measured: Measured, limit: Limit) -> Iterator[Tip]:
    train, on_gpu, full_size = config.train, not measured.shares_cores, config.views[0].full_size
    # Five sevenths, as 160 px of 224, in whole strides of a ResNet at ImageNet's sizes.
    one_size = len(config.views) == len(config.view_stages) == 1
    smaller = full_size * 5 // 7 // 32 * 32 if one_size and full_size >= 96 else 0
    if limit.stage == "communication":
        yield Tip("fewer-ranks", "set a larger train.batch_size, or use fewer ranks", "ranks wait for gradients")
    if not measured.compile and (on_gpu or measured.ranks > 1):
        yield Tip("compile", "set train.compile=on", "the step is not compiled")
    if on_gpu and measured.dtype == train.precision == "fp32":
        yield Tip("precision", "set train.precision=auto (bf16 where the GPU has it)", "the step computes in fp32")
    if not train.channels_last:
        yield Tip("channels-last", "set train.channels_last=true", "convolutions are faster on channels-last memory")
    if smaller:
        share = f"{(smaller / full_size) ** 2:.2f} of the arithmetic of {full_size} px"
        yield Tip("smaller-views", f"set views.size={smaller} (not the paper's recipe)", f"{smaller} px need {share}")
    if on_gpu:
        yield Tip("faster-gpu", "use a GPU with more memory bandwidth, or more GPUs", "memory bandwidth limits ResNets")
    else:
        yield Tip("use-a-gpu", "train on a GPU", "this machine has no GPU, or train.device excludes it")


def _gain(measured: Measured, loader: float | None = None, step: float | None = None) -> float:
    """Returns the factor on the rate of training where the loader's or the step's rate is another."""
    own_loader, own_step = measured.loader_rate and measured.loader_rate.median, measured.step_images_per_second.median
    now = together(loader or own_loader, step or own_step, measured.shares_cores)
    return now / together(own_loader, own_step, measured.shares_cores)
