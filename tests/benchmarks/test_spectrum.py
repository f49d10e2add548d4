"""Rank correlation of the label-free measures with kNN, from the lines of a run."""

import json

from benchmarks.harness.results import read_results
from benchmarks.spectrum import main


def write(folder, count):
    """RankMe grows with kNN, alpha falls, effective rank does not move."""
    lines = [{"kind": "knn", "step": 0, "knn_top1": 99.0, "control": "untrained"}]
    for step in range(1, count + 1):
        measures = {"rankme": step**2, "alpha": 5 - step, "effective_rank": 3.0, "uniformity": (-1) ** step}
        lines += [
            {"kind": "knn", "step": step, "knn_top1": 10.0 + step},
            {"kind": "spectrum", "step": step, **measures},
        ]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_monotone_measures_correlate_fully(tmp_path, capsys):
    write(tmp_path / "run", 10)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    found = {line["variant"]: line["spearman"] for line in read_results(tmp_path / "out/spectrum.jsonl")}
    assert (round(found["rankme"], 12), round(found["alpha"], 12)) == (1, -1)
    assert abs(found["uniformity"]) < 0.5
    assert "effective_rank" not in found
    write(tmp_path / "short", 9)
    assert main([str(tmp_path / "short")]) == 2
    assert "[too-few-evaluations]" in capsys.readouterr().err
