"""A report plots and prints what the run folder has; nothing from outside becomes markup."""

import json
import re

import numpy as np
import pytest
from markupsafe import escape

import fastsiam
from fastsiam.config import load_config
from fastsiam.report import plots, summary
from fastsiam.report.__main__ import main
from fastsiam.report.page import compare, page
from fastsiam.report.read_run import open_run, open_runs
from fastsiam.run import write_report
from tests.support.refusals import refused
from tests.support.run_folders import EVIL, PER_EPOCH, STEPS, at, metrics, train_line, write_run


def panel(key):
    return next(panel for panel in plots.PANELS if panel.key == key)


def drawn(figure, label):
    return [line.get_xydata() for line in figure.axes[0].lines if line.get_label() == label]


def facts(folder):
    return {fact.label: (fact.value, fact.note) for fact in summary.facts(open_run(folder, "run"))}


@pytest.fixture
def run(tmp_path):
    return open_runs([write_run(tmp_path / "run")])[0]


@pytest.mark.parametrize(("axis", "each"), [("time", 0.5), ("images", 4), ("epochs", 4 / PER_EPOCH)])
def test_curves_have_the_numbers_of_metrics(run, axis, each):
    (loss,) = drawn(plots.curves(panel("loss"), [run], axis), "run 0")
    steps = np.arange(1, STEPS + 1)
    assert loss == pytest.approx(np.column_stack([steps * each, -steps / 40]))
    (knn,) = drawn(plots.curves(panel("knn"), [run], axis), "run 0")
    assert knn == pytest.approx(np.array([[10 * each, 60], [20 * each, 70], [30 * each, 80]]))
    (wait,) = drawn(plots.curves(panel("wait"), [run], axis), "run 0")
    assert (wait[:, 1] == 25).all()


def test_seeds_of_one_look_have_their_mean(tmp_path):
    """Of the stretch that all have come through; between its points a seed is a straight line."""
    seeds = [[train_line(step, loss=seed * step) for step in steps] for seed, steps in ((1, (2, 4, 6)), (3, (1, 5)))]
    other = [train_line(step, loss=0.5) for step in (1, 8)]
    folders = [write_run(tmp_path / str(n), found, pictures=False) for n, found in enumerate([*seeds, other])]
    figure = plots.curves(panel("loss"), open_runs(folders), "images", [0, 0, 1])
    assert drawn(figure, "mean 0")[0].tolist() == [[8, 4], [16, 8], [20, 10]]
    assert drawn(figure, "mean 1") == []
    widths = {line.get_label(): line.get_linewidth() for line in figure.axes[0].lines}
    assert widths["run 0"] < widths["run 1"] < widths["mean 0"]


def test_controls_and_resumes_are_marked(tmp_path):
    lines = metrics()
    lines.insert(15, at("resume", 12, world_size=1))
    (run,) = open_runs([write_run(tmp_path / "run", lines)])
    figure = plots.curves(panel("knn"), [run], "epochs")
    assert drawn(figure, "knn_top1")[0][:, 1].tolist() == [31.25, 31.25]
    assert drawn(figure, "raw_pixels_knn_top1")[0][:, 1].tolist() == [24.5, 24.5]
    assert drawn(figure, "resume")[0][:, 0] == pytest.approx([1.2, 1.2])
    assert "resumed" in page([run])


def test_a_long_run_fits_in_a_megabyte_and_keeps_its_extremes(tmp_path):
    lines = [train_line(step, loss=float(np.sin(step) / 2)) for step in range(1, 40_001)]
    lines[20_000]["loss"], lines[30_000]["loss"] = 5.0, None
    runs = open_runs([write_run(tmp_path / "run", lines, pictures=False)])
    assert len(page(runs).encode()) < 1_000_000
    figure = plots.curves(panel("loss"), runs, "images")
    # Points from the top of the figure.
    top = 72 * (figure.get_figheight() - figure.axes[0].transData.transform((0, 5))[1] / figure.dpi)
    curve = max(re.findall(r' d="([^"]*)"', plots.to_svg(figure, "key", "label")), key=len)
    places = [float(number) for number in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", curve)]
    assert min(places) == pytest.approx(top, abs=0.5)
    assert curve.count("M") == 2


def test_the_headline_has_the_runs_numbers(run):
    expected = summary.Fact("kNN top-1", "80.00 %", "against 31.25 % untrained, 24.50 % on raw pixels")
    assert summary.result(run) == expected
    found = facts(run.path)
    assert [found[label][0] for label in ("Epochs", "Images seen", "Throughput")] == ["3", "120", "8.00"]
    assert found["Training time"] == ("0:15", "0:21 with evaluation")
    assert found["Energy"] == ("not available", "")
    assert found["Hardware"] == ("CPU, 2 cores", "torch 2.14.1")
    assert "Budget" not in found


def test_only_growing_views_have_a_curve_of_their_size(tmp_path):
    lines = [train_line(step, view_size=8 * step) for step in (1, 2, 3)]
    growing, same = (write_run(tmp_path / name, some, pictures=False) for name, some in (("a", lines), ("b", None)))
    for folder, expected in ((growing, True), (same, False)):
        assert ("Size of a view" in page(open_runs([folder]))) == expected
    assert open_run(growing, "run").series("train", "view_size", "images").y.tolist() == [8, 16, 24]


def test_energy_budget_and_cost(tmp_path):
    spent = {"spent_seconds": 1800.0, "progress": 0.5}
    lines = [train_line(1, kwh=None), train_line(2, kwh=0.5, joules_per_image=3.0, **spent)]
    folder = write_run(tmp_path / "run", lines)
    # Of the whole budget; progress is of the part that evaluation leaves.
    for budget, share in (
        ("1kWh", "50.0 %"), ("32 images", "25.0 %"), ("3600USD", "50.0 %"), ("much", "–"), ("2h", "25.0 %")
    ):  # fmt: skip
        (folder / "config.yaml").write_text(f"budget: {budget}\nbudget_price_per_hour: 3600\n")
        assert facts(folder)["Budget"] == (share, f"spent of {budget}")
    assert facts(folder)["Energy"] == ("0.5 kWh", "225,000 J/image")
    # The whole process is paid for, not only the 1 s of training.
    assert facts(folder)["Cost"] == ("1,800.00", "at 3600 an hour")
    without = write_run(tmp_path / "cpu", [train_line(1, joules_per_image=3.25)])
    assert facts(without)["Energy"] == ("3.25 J/image", "")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", b""),
        ("metrics.jsonl", None),
        ("metrics.jsonl", b'{"kind": "header"}\n[1]\n5\n{"kind": "tra'),
        ("metrics.jsonl", b"\xff\xfe\n" + json.dumps(train_line(1)).encode()),
        ("metrics.jsonl", json.dumps(train_line(3, loss=None, lr="x")).encode()),
        ("metrics.jsonl", b'{"kind": "train", "step": 1, "loss": NaN}\n'),
        ("config.yaml", None),
        ("config.yaml", b"{{{"),
        ("status.json", b'{"status": "runn'),
        ("environment.json", None),
        ("pictures.npz", b"PK"),
    ],
)
def test_a_run_in_any_state_has_a_page(tmp_path, name, content):
    path = write_run(tmp_path / "run", pictures=False) / name
    path.unlink() if content is None else path.write_bytes(content)
    assert main([str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert text.endswith("</html>")
    assert "nan" not in re.sub(r"data:image/[^\"]*", "", text).lower()


def test_nothing_from_outside_is_markup(tmp_path):
    lines = [*metrics(), at("warning", 30, message=EVIL, code=EVIL), at("bad_file", 30, name=EVIL)]
    folder = write_run(tmp_path / "a<b>'\"", lines, {"status": EVIL, "reason": EVIL}, names=EVIL)
    (folder / "config.yaml").write_text(json.dumps({EVIL: {"key": EVIL}, "train": {"epochs": EVIL}}))
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL, "gpu": EVIL}))
    other = write_run(tmp_path / "other")
    for folders in ([folder], [folder, other]):
        text = page(open_runs(folders))
        assert not any(part in text for part in ("<script", "alert('x')", "<b>"))
        assert escape(EVIL) in text


def test_names_that_are_not_utf8_can_be_written(tmp_path):
    folder = write_run(tmp_path / "run\udcff", status={"status": "done"})
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "run\\xff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_several_runs_show_where_they_differ(tmp_path):
    one = write_run(tmp_path / "a/run", **{"optimizer.momentum": 0.5, "run.name": "x"})
    two = write_run(tmp_path / "b/run", **{"optimizer.momentum": 0.75, "run.name": "y"})
    runs = open_runs([one, two])
    assert [run.name for run in runs] == [str(one), str(two)]
    differing, common = compare(runs, "config")
    assert differing == {"optimizer.momentum": ["0.5", "0.75"]}
    assert common["optimizer.weight_decay"] == "0.0005"
    figure = plots.curves(panel("loss"), runs, "epochs")
    assert len(drawn(figure, "run 0")) == len(drawn(figure, "run 1")) == 1
    first, second = figure.axes[0].lines
    assert first.get_color() != second.get_color()
    assert first.is_dashed() != second.is_dashed()
    assert page(runs).count("optimizer.momentum") == 1


def test_the_page_is_the_same_bytes_and_its_ids_are_unique(run):
    text = page([run])
    assert page(open_runs([run.path])) == text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(ids)
    assert not re.search(r"#0102[0-9a-f]{2}", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_a_mistaken_folder_is_refused(tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").write_text("")
    assert refused("report", tmp_path / "none").code == "no-run-folder"
    assert refused("report", tmp_path / "runs").code == "not-a-run"
    folder = write_run(tmp_path / "run")
    assert refused("report", folder, "--out", "/proc/none/page.html").code == "report-unwritten"


@pytest.mark.slow
def test_a_run_writes_its_report_when_it_ends(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastsiam.run.finish.write_own_report", write_report.write_own_report)
    path = tmp_path / "runs/run/report.html"
    assert fastsiam.pretrain(load_config("quickstart", tiny())).status == "done"
    assert f"report    {path}" in capsys.readouterr().out
    text = path.read_text()
    assert all(part in text for part in ("Nearest neighbours", "View pairs", "Features in two dimensions"))


@pytest.mark.slow
def test_a_report_that_cannot_be_written_is_a_warning(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "report.html.tmp").mkdir()
    line, _ = write_report.write_own_report(folder)
    assert line.startswith("warning: ")
    assert line.endswith("[report-unwritten])")


@pytest.mark.parametrize("key", ["excluded", "left_out"])
def test_excluded_images_are_among_the_warnings(tmp_path, key):
    """By the listing and by a scan, and those that a resumed run has in its skip list alone."""
    write_run(tmp_path / "run", pictures=False)
    assert open_run(tmp_path / "run", "run").warnings == []
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    texts = ["12 dead links under photos", "3 of the 80 images under photos, by x.tsv: 3 truncated"]
    (tmp_path / "run/environment.json").write_text(json.dumps(environment | {key: texts}))
    (tmp_path / "run/skip.tsv").write_text("a.jpg\ta.jpg: it is empty\nb.jpg\tb.jpg: cut off\n")
    lines = [
        {"kind": "warning", "step": 6, "message": "slow", "code": "data-wait"},
        {"kind": "bad_file", "step": 7, "message": "b.jpg: cut off", "bad_files": 1},
    ]
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    assert open_run(tmp_path / "run", "run").warnings == [
        *((None, f"excluded: {text}") for text in texts),
        (6, "slow [data-wait]"),
        (7, "message b.jpg: cut off bad_files 1"),
        (None, "excluded: a.jpg: it is empty"),
    ]
