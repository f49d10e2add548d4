"""End of a run: last evaluation and checkpoint, encoder, status, closing lines, report."""

from fastsiam.errors import Notice
from fastsiam.run.console import closing_lines
from fastsiam.run.encoder_file import describe_encoder, save_encoder
from fastsiam.run.evaluation_schedule import EvaluationSchedule
from fastsiam.run.folder import EXIT_CODES, Result
from fastsiam.run.run import Run
from fastsiam.run.watchdog import remove_stacks_of_absent_ranks
from fastsiam.run.write_report import write_own_report
from fastsiam.training.step import TrainingStep


def finish(run: Run, status: str, step: TrainingStep, evaluation: EvaluationSchedule) -> Result:
    """Write and print the end of a run; `status`: as `train` returns it. All ranks must call."""
    state, path, world = run.progress.state, run.folder.path, run.runtime.world
    knn = None
    if status == "done":
        if not state.step:
            _warn_untrained(run)
        run.save_before_evaluation(step, evaluation)
        knn = evaluation.measure_last()
        run.data.bad_files.finish()
    with world.together():
        if status != "failed":
            run.checkpoints.save(run.contents(step, evaluation))
        if status == "done" and world.is_first:
            known = (state.images_seen, state.knn, state.knn_step, run.folder.weights)
            description = describe_encoder(run.config, state.step, run.folder.commit, *known)
            save_encoder(step.encoder, description, path / "encoder.safetensors")
    reason = run.reason or evaluation.collapsed
    _write_end(run, status, knn, evaluation.measures, reason)
    if status == "done":
        run.watchdog.forget_earlier()
        if world.is_first:
            remove_stacks_of_absent_ranks(path, world.size)
    run.journal.close()
    for line, style in closing_lines(status, run.config, run.progress, run.data, evaluation, reason, knn, path):
        run.journal.say(line, style)
    # Who has asked a run to stop does not wait for a page.
    if status != "preempted" and world.is_first:
        run.journal.say(*write_own_report(path))
    return Result(status, str(path), state.step, knn, run.signal if status == "preempted" else None)


def _write_end(run, status, knn, measures, reason):
    progress, cost = run.progress, run.progress.cost
    details = {"step": progress.state.step} | ({"knn_top1": knn} if knn is not None else {})
    if measures:
        details |= measures.fields()
    if status in ("collapsed", "failed"):
        details |= {"reason": reason}
    progress.read_energy()
    details |= cost.fields(cost.joules_per_image(progress.state.images_seen))
    run.journal.write("end", status=status, **details)
    if status in EXIT_CODES:
        details["exit_code"] = int(EXIT_CODES[status])
    run.set_status(status, **details)


def _warn_untrained(run):
    budget, seconds = run.progress.budget, run.progress.cost.seconds
    text = f"budget: {budget.text} was spent before the first step ({seconds:,.0f} s); the weights are untrained"
    run.journal.warn(Notice(text, "budget-spent-before-training"))
