"""Console output of a run: opening lines and closing lines, as functions of values."""

from pathlib import Path

import torch

import fastsiam
from fastsiam.config import Config
from fastsiam.config.method_sections import chance_loss
from fastsiam.config.published import batch_size_text
from fastsiam.data.sources.source import ImageSource
from fastsiam.evaluate import collapse
from fastsiam.evaluate.online_linear import NAME
from fastsiam.kernels import numba_cache
from fastsiam.methods import loss_is_fused
from fastsiam.optim.build import scale_at
from fastsiam.run.evaluation_schedule import EvaluationSchedule
from fastsiam.run.progress_line import duration
from fastsiam.run.training_data import TrainingData
from fastsiam.runtime.energy import kilowatt_hours
from fastsiam.runtime.environment import environment
from fastsiam.runtime.runtime import Runtime
from fastsiam.training.cost import CostMeter
from fastsiam.training.progress import Progress

# Share of a run from which on the cosine is below 2.5 %.
LATE = 0.9
# What to do with the file that a run is for.
ENCODER_USE = (
    "encoder = fastsiam.load_encoder(RUN) in evaluation mode; it takes RGB in [0, 1], from which encoder.mean is "
    "subtracted, divided by encoder.std (torchvision's Normalize)"
)


def opening_lines(config: Config, runtime: Runtime, data: TrainingData, where: str) -> list[str]:
    """All choices of a run, before the first step: data, backend, views, model, step, device, schedule.

    `where`: its folder, in words.
    """
    counts = [len(source or ()) for source in (data.source, data.val)]
    lines = choice_lines(
        config, runtime, *counts, data.description, data.backend_reason, where, source_lines(data.source, data.val)
    )
    return [*lines, schedule_line(config, data.steps_per_epoch)]


def choice_lines(
    config: Config,
    runtime: Runtime,
    num_train: int,
    num_val: int,
    loader_text: str,
    reason: str,
    where: str,
    data_lines: list[str],
) -> list[str]:
    """`opening_lines` without the schedule, for data that may not exist yet.

    `reason`: why the run has its backend; `data_lines`: those of `source_lines`. Nothing is decided here.
    """
    model, method, train = config.model, config.method, config.train
    device, world_size = runtime.device, runtime.world.size
    lines = [f"fastsiam  {fastsiam.__version__}, torch {torch.__version__}; {where}"]
    if num_train:
        val = f", {num_val:,} for kNN under {config.data.val}" if num_val else ", no kNN"
        lines.append(f"data      {num_train:,} images under {config.data.train}{val}")
        lines += data_lines
    if world_size > 1:
        share = train.batch_size // world_size
        lines.append(f"ranks     {world_size}, {share} images a step each; batch-norm statistics over all of them")
    lines += [
        f"backend   {loader_text}, {reason}",
        f"views     {' + '.join(map(_views_text, config.views))}, " + _augmenter_text(config, device),
        f"model     {method.name}, {model.encoder} ({model.stem} stem"
        + (f", width {model.width}" if model.width else "")
        + f"), {', '.join((_heads_text(method), *_method_texts(method)))}, batch-norm statistics {model.bn_statistics}",
        f"step      batch {train.batch_size}, learning rate {config.learning_rate:g} = {config.optimizer.base_lr:g} x "
        f"{train.batch_size} / 256, {_optimizer_text(config)}, "
        f"{'channels-last' if train.channels_last else 'channels-first'}, "
        f"loss {'fused (Triton)' if loss_is_fused(config, device) else 'in plain torch'}{_chance_text(config)}",
    ]
    lines += _memory_lines(train)
    if config.evaluate.average == "ema":
        lines.append(
            f"average   kNN and encoder.safetensors are of the moving average of the encoder's weights, decay "
            f"{config.evaluate.average_decay:g}, less in the first steps"
        )
    lines.append(f"device    {_runtime_text(runtime)}")
    if numba_cache.NOTE and device.type == "cpu":
        lines.append(f"cache     {numba_cache.NOTE}")
    return lines


def _chance_text(config):
    """For losses that show it: their value where nothing is learned."""
    chance = chance_loss(config.method, sum(group.count for group in config.views), config.train.batch_size)
    return "" if chance is None else f" ({chance[0]} = {chance[1]:.3f} tells nothing apart)"


def _heads_text(method):
    text = f"projector {method.projector.layers} x {method.projector.out}"
    predictor = getattr(method, "predictor", None)
    if predictor is None:
        return f"{text}, no predictor"
    return f"{text}, predictor {predictor.hidden}" + (" (frozen)" if predictor.frozen else "")


def _method_texts(method):
    """What a method has beside its heads, in words."""
    match method.name:
        case "simsiam":
            return [] if method.target_views is None else [f"each view predicts the mean of {method.target_views}"]
        case "simsiam_alternating":
            return [f"targets held for {method.steps} steps"]
        case "simsiam_average":
            return [f"averages of {method.images:,} images, momentum {method.momentum:g}"]
        case "byol":
            return [f"momentum target from {method.momentum:g}"]
        case "simclr":
            return [f"T {method.temperature:g}"]
        case "moco":
            loss = "symmetric" if method.symmetric else "asymmetric"
            return [f"queue {method.queue:,}, momentum {method.momentum:g}, T {method.temperature:g}, {loss} loss"]
        case "swav":
            queue = f"queue {method.queue:,}" if method.queue else "no queue"
            return [f"{method.prototypes:,} prototypes, {queue}, T {method.temperature:g}"]


def _memory_lines(train):
    """Lines on what a step does to need less memory."""
    lines, size = [], train.micro_batch
    if size:
        lines.append(
            f"micro     {train.batch_size // size} x {size} images a step: gradients of the whole batch, batch-norm "
            f"statistics of {size} images; {batch_size_text(size)}"
        )
    if train.checkpoint_activations:
        lines.append("recompute the activations of the encoder's blocks are computed again in the backward pass")
    return lines


def _runtime_text(runtime):
    names = runtime.names | {"compile": f"compile {'on' if runtime.compiles else 'off'}"}
    reasons = {key: f" ({reason})" for key, reason in runtime.reasons.items()}
    return ", ".join(text + reasons.get(key, "") for key, text in names.items())


def _views_text(views):
    text = f"{views.count} x {views.size} px"
    if len(views.sizes) > 1:
        text += f" ({', '.join(map(str, views.sizes))})"
    if views.count != 2:
        text += " of each image"
    return f"{text}, recipe {views.recipe}"


def _optimizer_text(config):
    settings = config.optimizer
    if settings.name == "lars":
        return f"lars (trust {settings.lars_trust:g})"
    return "sgd (apex)" if settings.implementation == "apex" else "sgd"


def _augmenter_text(config, device):
    if config.data.backend == "synthetic":
        return "as they are"
    if config.data.augment == "dali":
        return (
            "augmented by DALI: not our augmenter's views; colour in one order whatever views.color says (saturation "
            "and hue in YIQ, contrast about mid-grey, brightness), the blur after it and a sampled Gaussian "
            "whatever views.blur_kind says, 8 bits between operations"
        )
    colour = f"colour {', '.join(dict.fromkeys(group.color for group in config.views))}, augmented by "
    if device.type == "cuda":
        return colour + "Triton"
    return colour + ("numba" if numba_cache.KEEPS_CODE else "numba (compiled at each start: about 15 s)")


def source_lines(*sources: ImageSource | None) -> list[str]:
    """Lines on labels, pixels of more than 8 bits and excluded files, of images for training and for kNN."""
    sources = [source for source in sources if source is not None]
    labels = [source.label_text() for source in sources]
    lines = [f"labels    {text}" for text in dict.fromkeys(labels) if text]
    deep = dict.fromkeys(source.levels.text() for source in sources)
    lines += [f"deep      {text}" for text in deep if text]
    return lines + [f"excluded  {text}" for source in sources for text in source.exclusion_texts()]


def schedule_line(config: Config, steps_per_epoch: int) -> str:
    budget, most = config.to_spend, config.train.max_steps
    if budget.kind == "epochs":
        total = config.train.epochs * steps_per_epoch
        text = f"{config.train.epochs} epochs x {steps_per_epoch:,} steps = {total:,} steps"
    elif budget.kind == "images":
        total = int(budget.amount) // config.train.batch_size
        epochs = total / max(steps_per_epoch, 1)
        text = f"budget {budget.text}: {total:,} steps, {epochs:,.2f} epochs of {steps_per_epoch:,}"
    else:
        total, what = None, "energy of the GPUs" if budget.kind == "joules" else "time of the process"
        worth = f" = {duration(budget.amount)}" if budget.kind == "seconds" else ""
        text = f"budget {budget.text}{worth}: {what}, start, compilation, evaluation and saving included"
    stop = f", stopping at step {most:,}" if most and (total is None or most < total) else ""
    share = config.train.max_share
    stop += f", stopping at {100 * share:g} % of it" if share < 1 else ""
    return f"schedule  {text}, {config.optimizer.schedule}{stop}"


def described(runtime: Runtime, data: TrainingData, cost: CostMeter) -> dict:
    """environment.json: versions and hardware, and the choices and findings of the start."""
    sources = {"train_images": data.source, "val_images": data.val}
    present = {key: source for key, source in sources.items() if source is not None}
    texts = [text for source in present.values() for text in source.exclusion_texts()]
    return environment() | {
        "fastsiam": fastsiam.__version__,
        "loader": data.description,
        "energy": cost.energy.description,
        "ranks": runtime.world.size,
        "data": data.identity["data"],
        **runtime.names,
        **{key: len(source) for key, source in present.items()},
        **{f"{key}_excluded": source.excluded for key, source in present.items() if source.excluded},
        "deep_pixels": {key: source.levels.ranges for key, source in present.items()},
        **({"excluded": texts} if texts else {}),
        "images_per_epoch": data.steps_per_epoch * data.config.train.batch_size,
    }


def closing_lines(
    status: str,
    config: Config,
    progress: Progress,
    data: TrainingData,
    evaluation: EvaluationSchedule,
    reason: str | None,
    knn: float | None,
    path: Path,
) -> list[tuple[str, str | None]]:
    """The last lines of a run in `path`, each with its style; `reason`: why it collapsed or failed."""
    state = progress.state
    if status == "collapsed":
        lines = [(f"COLLAPSED {reason}", "red"), (f"try       {collapse.advice(config)}", None)]
    elif status == "failed":
        lines = [(f"FAILED    {reason}", "red")]
    elif status == "preempted":
        lines = [(f"stopped   at step {state.step:,} with a checkpoint; rerun the command to resume", "yellow")]
    else:
        rate = state.images_seen / max(state.train_seconds, 1e-9)
        text = (
            f"done      {state.step:,} steps, {state.images_seen:,} images in {duration(state.train_seconds)} "
            f"({rate:,.0f} images/s), {duration(state.wall_seconds)} in all"
        )
        lines = [(text, None)]
        if data.sizes != config.view_stages[-1]:
            now, full = (" and ".join(map(str, sizes)) for sizes in (data.sizes, config.view_stages[-1]))
            lines.append((f"views     the run ended at {now} px, before the full size of {full}", None))
        lines += _held_rate_lines(config, progress)
        if knn is not None:
            lines.append((_knn_line(config, state, knn), "bold"))
        if evaluation.linear is not None:
            lines.append((_linear_line(evaluation.linear), None))
    if evaluation.measures and status not in ("collapsed", "failed"):
        verdict = _verdict(evaluation.measures, evaluation.guard, state.step)
        lines.append((f"collapse  {verdict}: {evaluation.measures}", None))
    lines.append((_cost_line(progress, config.budget_price_per_hour), None))
    if status == "done":
        lines.append((f"encoder   {path / 'encoder.safetensors'}: {ENCODER_USE}", None))
    return [*lines, (f"run       {path}", None)]


def _knn_line(config, state, knn):
    settings, before = config.evaluate, ""
    if state.untrained_knn is not None:
        before = f"; before {state.untrained_knn:.2f} %, raw pixels {state.raw_pixels_knn:.2f} %"
    averaged = ", averaged weights" if settings.average == "ema" else ""
    return f"kNN       {knn:.2f} % (k {settings.knn_k}, T {settings.knn_temperature:g}{averaged}{before})"


def _linear_line(linear):
    parts = [] if linear.val_top1 is None else [f"{linear.val_top1:.2f} % of data.val"]
    parts += [f"{linear.last.top1:.2f} % of the last views"] if linear.last else []
    return f"linear    {', '.join(parts) or 'not measured'}: {NAME}"


def _cost_line(progress, price):
    """Time and energy of all processes of the run, and the share of its budget."""
    cost, budget = progress.cost, progress.budget
    parts = [f"{duration(cost.seconds)} of process time"]
    if cost.joules is not None:
        each = cost.joules_per_image(progress.state.images_seen)
        parts.append(f"{kilowatt_hours(cost.joules):.3g} kWh" + (f" ({each:.3g} J/image)" if each else ""))
    else:
        how = cost.energy.description
        parts.append(f"energy {how if how.startswith('not available') else 'not known of the whole run'}")
    if price:
        parts.append(f"{cost.seconds / 3600 * price:.2f} at {price:g} an hour")
    if budget.kind != "epochs":
        parts[-1] += f"; {100 * progress.amount_spent / budget.amount:.1f} % of {budget.text}"
    return f"spent     {', '.join(parts)}"


def _held_rate_lines(config, progress):
    """A warning where a budget has ended in an epoch that was much of the run, whose rate `cosine_per_epoch` holds."""
    state, optimizer = progress.state, config.optimizer
    began = state.epoch_progress
    if optimizer.schedule != "cosine_per_epoch" or state.progress < 1 or not state.cursor or began >= LATE:
        return []
    share = scale_at(state.progress, optimizer.schedule, optimizer.warmup, began)
    text = (
        f"rate      the run ended at {100 * share:.0f} % of the full learning rate, for its last epoch began at "
        f"{100 * began:.0f} % of {progress.budget.text}; optimizer.schedule=cosine comes down to zero in it"
    )
    return [(text, "yellow")]


def _verdict(measures, guard, step) -> str:
    if collapse.is_collapsed(measures, guard.limits):
        judged = step >= guard.judge_from_step
        return "COLLAPSED" if judged else f"too early to judge (from step {guard.judge_from_step:,} on)"
    return "healthy"
