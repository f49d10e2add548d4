"""What a run says of itself: its first lines, its last ones, and the dry run."""

import torch

import fastsiam
from fastsiam.config import Config
from fastsiam.data.sources.source import ImageSource
from fastsiam.evaluate import collapse
from fastsiam.kernels import numba_cache
from fastsiam.kernels.augment_numba import is_compiled
from fastsiam.methods.simsiam import loss_is_fused
from fastsiam.optim.build import scale_at
from fastsiam.run.folder import Result
from fastsiam.run.progress_line import duration
from fastsiam.runtime.distributed import restarts
from fastsiam.runtime.energy import kilowatt_hours
from fastsiam.runtime.environment import environment
from fastsiam.runtime.runtime import Runtime

# Share of a run from which on the cosine is below 2.5 %.
LATE = 0.9
# What to do with the file that a run is for.
ENCODER_USE = (
    "encoder = fastsiam.load_encoder(RUN) in evaluation mode; it takes RGB in [0, 1], from which encoder.mean is "
    "subtracted, divided by encoder.std (torchvision's Normalize)"
)


def opening_lines(
    config: Config,
    num_train: int,
    num_val: int,
    loader_text: str,
    where: str,
    data_lines: list[str],
    *,
    runtime: Runtime,
    reason: str,
) -> list[str]:
    """Everything that was chosen, before the first step: data, backend, views, model, step, schedule.

    `data_lines`: those of `source_lines`. `reason`: why the run has its backend. Nothing is decided here.
    """
    model, train, device, world_size = config.model, config.train, runtime.device, runtime.world.size
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
        f"views     {_views_text(config.views)}, recipe {config.views.recipe}, " + _augmenter_text(config, device),
        f"model     {config.method.name}, {model.encoder} ({model.stem} stem"
        + (f", width {model.width}" if model.width else "")
        + f"), projector {model.projector.layers} x {model.projector.out}, predictor {model.predictor.hidden}, "
        f"batch-norm statistics {model.bn_statistics}",
        f"step      batch {train.batch_size}, learning rate {config.learning_rate:g} = {config.optimizer.base_lr:g} x "
        f"{train.batch_size} / 256, {_optimizer_text(config)}, "
        f"{'channels-last' if train.channels_last else 'channels-first'}, "
        f"loss {'fused (Triton)' if loss_is_fused(config.views.count, device) else 'in plain torch'}",
    ]
    lines.append(f"device    {_runtime_text(runtime)}")
    if numba_cache.NOTE and device.type == "cpu":
        lines.append(f"cache     {numba_cache.NOTE}")
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
        text += f" of each image (images/s count images, views/s are {views.count} times that)"
    return text


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
    colour = f"colour {config.views.color}, augmented by "
    if device.type == "cuda":
        return colour + "Triton"
    once = "once on this machine" if numba_cache.KEEPS_CODE else "at each start"
    first = "" if is_compiled(config.views.color == "exact") else f" (compiled now, {once}: about 15 s)"
    return f"{colour}numba{first}"


def source_lines(*sources: ImageSource | None) -> list[str]:
    """How labels were read, what deep pixels become and what is left out, of images for training and for kNN."""
    sources = [source for source in sources if source is not None]
    labels = [source.label_text() for source in sources]
    lines = [f"labels    {text}" for text in dict.fromkeys(labels) if text]
    deep = dict.fromkeys(source.levels.text() for source in sources)
    lines += [f"deep      {text}" for text in deep if text]
    return lines + [f"left out  {text}" for source in sources for text in source.exclusion_texts()]


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
    return f"schedule  {text}, {config.optimizer.schedule}{stop}"


def session_lines(session) -> list[str]:
    """The first lines of a run."""
    config, sources = session.config, (session.source, session.val)
    counts = [len(source or ()) for source in sources]
    where = f"run folder {session.folder.path}"
    chosen = {"runtime": session.runtime, "reason": session.backend_reason}
    lines = opening_lines(config, *counts, session.loader_text, where, source_lines(*sources), **chosen)
    return [*lines, schedule_line(config, session.loader.steps_per_epoch)]


def described(session) -> dict:
    """environment.json: versions and hardware, and what was chosen and found."""
    sources = {"train_images": session.source, "val_images": session.val}
    return environment() | {
        "fastsiam": fastsiam.__version__,
        "loader": session.loader_text,
        "energy": session.energy.description,
        "ranks": session.world.size,
        "data": session.identity["data"],
        **session.runtime.names,
        **{key: len(source) for key, source in sources.items() if source is not None},
        **{f"{key}_left_out": source.excluded for key, source in sources.items() if source and source.excluded},
        "deep_pixels": {key: source.levels.ranges for key, source in sources.items() if source is not None},
        **({"left_out": texts} if (texts := _left_out_texts(session)) else {}),
        "images_per_epoch": session.loader.steps_per_epoch * session.config.train.batch_size,
    }


def _left_out_texts(session):
    return [text for source in (session.source, session.val) if source is not None for text in source.exclusion_texts()]


def _cost_line(session):
    """Time and energy of all processes of the run, and of its budget."""
    spent, budget = session.spent, session.pace.budget
    parts = [f"{duration(spent.seconds)} of process time"]
    if spent.joules is not None:
        each = spent.joules_per_image(session.state.images_seen)
        parts.append(f"{kilowatt_hours(spent.joules):.3g} kWh" + (f" ({each:.3g} J/image)" if each else ""))
    else:
        how = session.energy.description
        parts.append(f"energy {how if how.startswith('not available') else 'not known of the whole run'}")
    if price := session.config.budget_price_per_hour:
        parts.append(f"{spent.seconds / 3600 * price:.2f} at {price:g} an hour")
    if budget.kind != "epochs":
        parts[-1] += f"; {100 * session.pace.amount_spent / budget.amount:.1f} % of {budget.text}"
    return f"spent     {', '.join(parts)}"


def closing_lines(status: str, session, knn: float | None) -> list[tuple[str, str | None]]:
    """The last lines of a run, each with its style."""
    state, path = session.state, session.folder.path
    if status == "collapsed":
        lines = [(f"COLLAPSED {session.checkup.reason}", "red"), (f"try       {collapse.ADVICE}", None)]
    elif status == "failed":
        lines = [(f"FAILED    {session.soundness.reason}", "red")]
    elif status == "preempted":
        lines = [(f"stopped   at step {state.step:,} with a checkpoint; the same command goes on from there", "yellow")]
    else:
        rate = state.images_seen / max(state.train_seconds, 1e-9)
        lines = [
            (
                f"done      {state.step:,} steps, {state.images_seen:,} images in {duration(state.train_seconds)} "
                f"({rate:,.0f} images/s), {duration(state.wall_seconds)} in all",
                None,
            ),
        ]
        if session.loader.size != session.config.views.full_size:
            full = session.config.views.full_size
            lines.append((f"views     the run ended at {session.loader.size} px, before the full size of {full}", None))
        lines += _held_rate_lines(session)
        if knn is not None:
            settings = session.config.evaluate
            before = ""
            if state.untrained_knn is not None:
                before = f"; before {state.untrained_knn:.2f} %, raw pixels {state.raw_pixels_knn:.2f} %"
            lines.append(
                (f"kNN       {knn:.2f} % (k {settings.knn_k}, T {settings.knn_temperature:g}{before})", "bold")
            )
    measures = session.checkup.measures
    if measures and status not in ("collapsed", "failed"):
        lines.append((f"collapse  {_verdict(session)}: {measures}", None))
    lines.append((_cost_line(session), None))
    if status == "done":
        lines.append((f"encoder   {path / 'encoder.safetensors'}: {ENCODER_USE}", None))
    return [*lines, (f"run       {path}", None)]


def _held_rate_lines(session):
    """Where a budget has ended in an epoch that was much of the run, and `cosine_per_epoch` has held its rate."""
    state, optimizer = session.state, session.config.optimizer
    began = state.epoch_progress
    if optimizer.schedule != "cosine_per_epoch" or state.progress < 1 or not state.cursor or began >= LATE:
        return []
    share = scale_at(state.progress, optimizer.schedule, optimizer.warmup, began)
    text = (
        f"rate      the run ended at {100 * share:.0f} % of the full learning rate, for its last epoch began at "
        f"{100 * began:.0f} % of {session.pace.budget.text}; optimizer.schedule=cosine comes down to zero in it"
    )
    return [(text, "yellow")]


def _verdict(session) -> str:
    guard = session.checkup.guard
    if collapse.is_collapsed(session.checkup.measures):
        judged = session.state.step >= guard.judge_from_step
        return "COLLAPSED" if judged else f"too early to judge (from step {guard.judge_from_step:,} on)"
    return "healthy"


def finished(session) -> Result | None:
    """What an earlier start came to, said, if there is nothing left to do; None where there is."""
    journal, path, step = session.journal, session.folder.path, session.state.step
    earlier = session.folder.status()
    ended, reason = earlier.get("status"), earlier.get("reason")
    if ended == "done" and session.pace.is_over:
        knn = earlier.get("knn_top1")
        journal.say(f"{path} is finished: step {step:,}" + knn_text(knn))
        more = "a larger train.epochs" if session.pace.budget.kind == "epochs" else "a larger budget"
        journal.say(f"{more} goes on from there; run.fresh=true starts over in a new folder")
        return Result("done", str(path), step, knn)
    if ended == "collapsed" and session.config.collapse.action == "stop":
        journal.say(f"{path} has collapsed: {reason}", "red")
        return Result("collapsed", str(path), step)
    if ended == "failed" and "exit_code" in earlier and restarts():
        journal.say(f"{path} would fail again: {reason}", "red")
        return Result("failed", str(path), step)
    return None


def knn_text(knn: float | None) -> str:
    return "" if knn is None else f", kNN {knn:.2f} %"
