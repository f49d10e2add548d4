"""Table of a sweep: its columns, and the same as text."""

from collections.abc import Sequence

from fastsiam.sweep import scores
from fastsiam.sweep.plan import Plan
from fastsiam.sweep.scores import Setting


def columns(plan: Plan, rows: Sequence[Setting], measure: str) -> list[tuple[str, bool, list[str]]]:
    """Returns the columns of the table as (heading, is a number, cells); `measure`: see `measure_in`."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    found = [(key, False, [row.values.get(key, "–") for row in rows]) for key in keys]
    if not keys:
        found = [("setting", False, [row.label for row in rows])]
    found.append(("n", True, [str(row.score.n if row.score else 0) for row in rows]))
    heading = "kNN, %" if measure == "knn_top1" else "RankMe"
    found.append((heading, True, [scores.number(row.score, 2) for row in rows]))
    if len(plan.rounds) > 1:
        found.append(("of the schedule", True, [f"{100 * row.share:g} %" for row in rows]))
    for name, digits in (("loss", 3), ("std_ratio", 2)):
        found.append((name, True, [_mean(getattr(row, name), digits) for row in rows]))
    found.append(("images/s", True, [_mean(row.images_per_second, 0) for row in rows]))
    found.append(("status", False, [_status(plan, row) for row in rows]))
    return found


def text_of(plan: Plan, rows: Sequence[Setting], measure: str) -> list[str]:
    """Returns the table as lines of text."""
    return aligned(columns(plan, rows, measure))


def aligned(found: Sequence[tuple[str, bool, list[str]]]) -> list[str]:
    """Returns columns (heading, is a number, cells) as lines of text, numbers to the right."""
    widths = [max(map(len, (heading, *cells))) for heading, _, cells in found]
    lines = []
    for cells in ([heading for heading, _, _ in found], *zip(*(cells for _, _, cells in found), strict=True)):
        line = [
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, (_, is_number, _) in zip(cells, widths, found, strict=True)
        ]
        lines.append("  ".join(line).rstrip())
    return lines


def _status(plan, row):
    left_out = row.round + 1 < len(plan.rounds) and row.status == "done"
    return f"left out after round {row.round + 1}" if left_out else row.status


def _mean(found, digits):
    return "–" if found is None else f"{found.mean:,.{digits}f}".replace("-", "−" if digits == 3 else "-")
