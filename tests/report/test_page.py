"""What a report plots and says is what the run folder has; nothing from outside becomes markup."""

import html
import json
import re

import numpy as np
import pytest

import fastsiam
from fastsiam.config import load_config
from fastsiam.report import plots, summary
from fastsiam.report.__main__ import main
from fastsiam.report.page import differing, page
from fastsiam.report.read_run import Series, open_run, open_runs
from fastsiam.run import write_report
from tests.support.run_folders import EVIL, PER_EPOCH, STEPS, at, metrics, train_line, write_run


def panel(key):
    return next(panel for panel in plots.PANELS if panel.key == key)


def drawn(figure, label):
    return [line.get_xydata() for line in figure.axes[0].lines if line.get_label() == label]


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


def test_controls_and_resumes_are_marked(tmp_path):
    lines = metrics()
    lines.insert(15, at("resume", 12, world_size=1))
    (run,) = open_runs([write_run(tmp_path / "run", lines)])
    figure = plots.curves(panel("knn"), [run], "epochs")
    assert drawn(figure, "knn_top1")[0][:, 1].tolist() == [31.25, 31.25]
    assert drawn(figure, "raw_pixels_knn_top1")[0][:, 1].tolist() == [24.5, 24.5]
    assert drawn(figure, "resume")[0][:, 0] == pytest.approx([1.2, 1.2])
    assert "resumed" in page([run])


def test_thinning_keeps_extremes_ends_and_gaps():
    generator = np.random.default_rng(0)
    x, y = np.arange(200_000.0), generator.normal(size=200_000)
    y[77_777], y[123_456], y[50_000:60_000] = 99, -99, np.nan
    thinned = plots.thin(Series(x, y), 360)
    assert len(thinned.x) <= 5 * 360
    assert (thinned.x[0], thinned.x[-1]) == (0, 199_999)
    assert (np.diff(thinned.x) > 0).all()
    at_extremes = dict(zip(thinned.x, thinned.y, strict=True))
    assert (at_extremes[77_777], at_extremes[123_456]) == (99, -99)
    assert np.isnan(thinned.y).any()
    assert all(value == y[int(place)] or np.isnan(value) for place, value in at_extremes.items())
    few = Series(x[:1000], y[:1000])
    assert plots.thin(few, 360) is few


def test_the_headline_has_the_runs_numbers(run):
    assert summary.result(run) == summary.Fact(
        "kNN top-1", "80.00 %", "against 31.25 % untrained, 24.50 % on raw pixels"
    )
    told = {fact.label: (fact.value, fact.note) for fact in summary.facts(run)}
    assert told["Epochs"][0] == "3"
    assert told["Images seen"][0] == "120"
    assert told["Training time"] == ("0:15", "0:21 with evaluation")
    assert told["Throughput"][0] == "8.00"
    assert told["Energy"] == ("not available", "")
    assert told["Hardware"] == ("CPU, 2 cores", "torch 2.14.1")
    assert "Budget" not in told


def test_views_that_grow_have_their_curve_and_others_none(tmp_path):
    """Where the size changes, loss and throughput jump."""
    growing = write_run(tmp_path / "growing", [train_line(step, view_size=8 * step) for step in (1, 2, 3)])
    same = write_run(tmp_path / "same")
    for folder, expected in ((growing, True), (same, False)):
        assert ("Size of a view" in page(open_runs([folder]))) == expected
    assert open_runs([growing])[0].series("train", "view_size", "images").y.tolist() == [8, 16, 24]


def test_energy_and_budget_are_told_where_they_are_known(tmp_path):
    spent = {"spent_seconds": 1800.0, "progress": 0.5}
    lines = [train_line(1, kwh=None), train_line(2, kwh=0.5, joules_per_image=3.0, **spent)]
    folder = write_run(tmp_path / "run", lines)
    (folder / "config.yaml").write_text("budget: 2h\nbudget_price_per_hour: 3600\ntrain: {epochs: 5}\n")
    (run,) = open_runs([folder])
    told = {fact.label: (fact.value, fact.note) for fact in summary.facts(run)}
    # Of the budget itself; progress is of what the last evaluation leaves of it.
    assert told["Budget"] == ("25.0 %", "spent of 2h")
    assert told["Energy"] == ("0.5 kWh", "225,000 J/image")
    # The process is paid for, not only the 1.4 s that training took.
    assert told["Cost"] == ("1,800.00", "at 3600 an hour")
    for budget, share in (("1kWh", "50.0 %"), ("32 images", "25.0 %"), ("3600USD", "50.0 %"), ("much", "–")):
        (folder / "config.yaml").write_text(f"budget: {budget}\nbudget_price_per_hour: 3600\n")
        assert {fact.label: fact.value for fact in summary.facts(open_runs([folder])[0])}["Budget"] == share
    without = [train_line(1, spent_seconds=60.0)]
    (other,) = open_runs([write_run(tmp_path / "cpu", without, budget_price_per_hour="6")])
    assert {fact.label: fact.value for fact in summary.facts(other)}["Cost"] == "0.10"
    assert summary.joules(open_runs([write_run(tmp_path / "b", [train_line(1, joules_per_image=3.25)])])[0]) == 3.25


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "metrics.jsonl").write_text(""),
        lambda folder: (folder / "metrics.jsonl").unlink(),
        lambda folder: (folder / "metrics.jsonl").write_text('{"kind": "header"}\n[1]\n5\n{"kind": "tra'),
        lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + json.dumps(train_line(1)).encode()),
        lambda folder: (folder / "metrics.jsonl").write_text(json.dumps(train_line(3, loss=None, lr="x")) + "\n"),
        lambda folder: (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": NaN}\n'),
        lambda folder: (folder / "config.yaml").unlink(),
        lambda folder: (folder / "config.yaml").write_text("{{{"),
        lambda folder: (folder / "status.json").write_text('{"status": "runn'),
        lambda folder: (folder / "environment.json").unlink(),
        lambda folder: (folder / "pictures.npz").write_bytes(b"PK"),
    ],
)
def test_a_run_in_any_state_has_a_page(tmp_path, spoil):
    spoil(write_run(tmp_path / "run"))
    assert main([str(tmp_path / "run")]) == 0
    text = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert text.endswith("</html>\n")
    assert "nan" not in re.sub(r"data:image/[^\"]*", "", text).lower().replace("nanosecond", "")


def test_nothing_from_outside_is_markup(tmp_path):
    lines = [*metrics(), at("warning", 30, message=EVIL), at("bad_file", 30, name=EVIL)]
    status = {"status": EVIL, "reason": EVIL}
    folder = write_run(tmp_path / "a<b>'\"", lines, status, names=EVIL)
    (folder / "config.yaml").write_text(json.dumps({EVIL: {"key": EVIL}, "train": {"epochs": EVIL}}))
    (folder / "environment.json").write_text(json.dumps({EVIL: EVIL, "gpu": EVIL}))
    other = write_run(tmp_path / "other")
    for folders in ([folder], [folder, other]):
        text = page(open_runs(folders))
        assert "<script" not in text
        assert "alert('x')" not in text
        assert html.escape(EVIL) in text
        assert "<b>'" not in text


def test_names_that_are_no_utf8_can_be_written(tmp_path):
    folder = write_run(tmp_path / "run\udcff", status={"status": "done"})
    assert main([str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert "run\\xff" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_several_runs_show_first_where_they_differ(tmp_path):
    one = write_run(tmp_path / "a/run", **{"optimizer.momentum": 0.5, "run.name": "x"})
    two = write_run(tmp_path / "b/run", **{"optimizer.momentum": 0.75, "run.name": "y"})
    runs = open_runs([one, two])
    assert [run.name for run in runs] == [str(one), str(two)]
    assert differing(runs) == ["optimizer.momentum"]
    figure = plots.curves(panel("loss"), runs, "epochs")
    assert len(drawn(figure, "run 0")) == len(drawn(figure, "run 1")) == 1
    first, second = figure.axes[0].lines
    assert first.get_color() != second.get_color()
    assert first.is_dashed() != second.is_dashed()
    text = page(runs)
    differ, shared = text.index("Where the configs differ"), text.index("What the configs share")
    assert differ < text.index("optimizer.momentum") < shared < text.index("optimizer.weight_decay")
    assert text.count("optimizer.momentum") == 1


def test_the_page_is_the_same_bytes_and_its_ids_are_unique(tmp_path):
    runs = open_runs([write_run(tmp_path / "run")])
    text = page(runs)
    assert page(open_runs([tmp_path / "run"])) == text
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)
    assert not re.search(r"#0102[0-9a-f]{2}", text)
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_a_long_run_fits_in_two_megabytes(tmp_path):
    lines = [train_line(step, loss=np.sin(step) / 2) for step in range(1, 40_001)]
    folder = write_run(tmp_path / "run", lines)
    assert len(page(open_runs([folder])).encode()) < 2_000_000


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").write_text("")
    for path, said in (("none", "is no folder"), ("runs", "it holds run folders, for example")):
        assert main([str(tmp_path / path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("fastsiam: RUN: ")
        assert said in error
        assert error.count("\n") == 1
    folder = write_run(tmp_path / "run")
    assert main([str(folder), "--out", "/proc/none/page.html"]) == 2
    assert (
        capsys.readouterr().err
        == "fastsiam: --out: /proc/none/page.html cannot be written (No such file or directory)\n"
    )


@pytest.fixture
def reporting(monkeypatch):
    monkeypatch.setattr("fastsiam.run.session.write_own_report", write_report.write_own_report)


def test_a_run_writes_its_report_when_it_ends(tiny, tmp_path, reporting, capsys):
    assert fastsiam.pretrain(load_config("quickstart", tiny())).status == "done"
    assert f"report    {tmp_path}/runs/run/report.html" in capsys.readouterr().out
    text = (tmp_path / "runs/run/report.html").read_text()
    assert all(part in text for part in ("Nearest neighbours", "What the encoder saw", "Features in two dimensions"))


def test_a_report_that_cannot_be_written_changes_nothing(tiny, tmp_path, reporting, capsys):
    (tmp_path / "runs/run/report.html.tmp").mkdir(parents=True)
    (tmp_path / "runs/run/config.yaml").write_text(load_config("quickstart", tiny()).to_yaml())
    result = fastsiam.pretrain(load_config("quickstart", tiny()))
    assert (result.status, result.exit_code) == ("done", 0)
    assert "warning: the report could not be written (--out: " in capsys.readouterr().out
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["status"] == "done"


def test_what_is_left_out_stands_among_the_warnings(tmp_path):
    """By the listing and by a scan, and what a resumed run knows from its skip list alone."""
    write_run(tmp_path / "run", pictures=False)
    assert open_run(tmp_path / "run", "run").warnings == []
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    texts = ["12 dead links under photos", "3 of the 80 images under photos, by x.tsv: 3 truncated"]
    (tmp_path / "run/environment.json").write_text(json.dumps(environment | {"left_out": texts}))
    (tmp_path / "run/skip.tsv").write_text("a.jpg\ta.jpg: it is empty\nb.jpg\tb.jpg: cut off\n")
    line = {"kind": "bad_file", "step": 7, "message": "b.jpg: cut off", "bad_files": 1}
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    told = open_run(tmp_path / "run", "run").warnings
    assert told == [
        *((None, f"left out: {text}") for text in texts),
        (7, "message b.jpg: cut off bad_files 1"),
        (None, "left out: a.jpg: it is empty"),
    ]
