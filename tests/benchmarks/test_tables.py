"""Tables of the pages equal the result files, digit by digit."""

import json
import re

import pytest

from benchmarks import tables
from benchmarks.readme.captions import number
from benchmarks.tables import Column, Table, main, render
from tests.support.bench_configs import MACHINE

GPU = {**MACHINE, "gpu": "NVIDIA H200", "driver": "580.1", "power_limit_watts": 700.0}
README = "# Title\n\n<!-- table: loss -->\n<!-- /table -->\n\nThe end.\n"

EXPECTED = """# Title

<!-- table: loss -->
AMD EPYC, 2 cores, 2 threads; torch 2.15.0, triton 3.9.0; batch 512, n = 3 to 5; commit 0123456789ab; 2026-01-31.

| mode | variant | ms [p20, p80] | GB/s | of the copy bandwidth | against eager |
| --- | --- | ---: | ---: | ---: | ---: |
| forward | compile | 4.00 [3.00, 5.00] | 12.3 | 45.7 % | 3.00x |
| forward | eager | 12.0 [11.5, 1,234] | - | - | 1.00x |
| both | eager | 0.0500 [0.0400, 0.0600] | 1,235 | 100 % | 1.00x |
<!-- /table -->

The end.
"""


def line(variant, seconds=(2.0, 1.0, 3.0), n=3, benchmark="loss", machine=MACHINE, params=None, **numbers):
    """A result line; `seconds` are median, p20 and p80."""
    return {
        "schema": 1,
        "benchmark": benchmark,
        "variant": variant,
        "params": params or {},
        "samples_seconds": [seconds[0]] * n,
        **dict(zip(("median_seconds", "p20_seconds", "p80_seconds"), seconds, strict=True)),
        **numbers,
        "environment": machine,
    }


def absent(variant, **more):
    found = line(variant, (None, None, None), n=0, absent="pip install peer", **more)
    return {**found, "samples_seconds": []}


LINES = [
    line("compile", (0.004, 0.003, 0.005), 5, params={"batch": 512, "mode": "forward"},
         gigabytes_per_second=12.345, share_of_copy_bandwidth=0.4567, peak_memory_bytes=None),
    line("eager", (0.012, 0.0115, 1.23412), params={"mode": "forward", "batch": 512}),
    line("eager", (5e-5, 4e-5, 6e-5), params={"mode": "both", "batch": 512},
         gigabytes_per_second=1234.56, share_of_copy_bandwidth=0.9996),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Returns a function that writes result files and a page, and returns the arguments of `main`."""

    def make(files, readme=README):
        for name, lines in files.items():
            path = tmp_path / "results" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        (tmp_path / "README.md").write_text(readme)
        return ["--pages", str(tmp_path / "README.md"), "--results", str(tmp_path / "results")]

    return make


def test_a_table_is_written_to_the_letter_and_checked(folder, tmp_path):
    arguments = folder({"2026-01-31_epyc/loss.jsonl": LINES, "quickstart_cpu.jsonl": [{"config": "another shape"}]})
    readme = tmp_path / "README.md"
    assert main([*arguments, "--check"]) == 1
    assert readme.read_text() == README
    assert main(arguments) == 0
    assert readme.read_text() == EXPECTED
    assert main([*arguments, "--check"]) == 0
    readme.write_text(EXPECTED.replace("12.3 |", "12.4 |"))
    assert main([*arguments, "--check"]) == 1
    readme.write_text(EXPECTED.replace("The end", "An end"))
    assert main([*arguments, "--check"]) == 0


def test_the_newest_folder_of_each_machine_is_shown(folder, tmp_path):
    def files(milliseconds, machine):
        return [line("eager", (milliseconds / 1000,) * 3, machine=machine)]

    arguments = folder(
        {
            "2026-01-31_epyc/loss.jsonl": files(1, MACHINE),
            "2026-02-01_epyc/loss.jsonl": files(2, MACHINE),
            "2026-02-02_epyc/augment.jsonl": [line("eager", benchmark="augment")],
            "2025-12-31_h200/loss.jsonl": files(3, GPU),
        }
    )
    assert main(arguments) == 0
    text = (tmp_path / "README.md").read_text()
    cells = [row.split("|")[2].strip() for row in text.splitlines() if row.startswith("| eager")]
    assert cells == ["2.00 [2.00, 2.00]", "3.00 [3.00, 3.00]"]
    assert "NVIDIA H200 (driver 580.1, 700 W), AMD EPYC, 2 cores" in text


def refused(arguments, capsys) -> tuple[str, str]:
    """Returns what `main` names first, a file and line or a page, and the code of its error."""
    assert main(arguments) == 2
    place, code = re.fullmatch(r"benchmarks: (.*?): .* \[(\S+)\]\n", capsys.readouterr().err).groups()
    return place.rpartition("/")[2], code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda entry: entry["environment"].update(dirty=True), "dirty"),
        (lambda entry: entry["environment"].update(dirty=None), "dirty"),
        (lambda entry: entry["environment"].update(commit="f" * 40), "several-runs"),
        (lambda entry: entry.update(environment={**GPU}), "several-runs"),
        (lambda entry: entry.update(schema=2), "other-schema"),
        (lambda entry: entry.pop("schema"), "other-schema"),
        (lambda entry: entry.update(benchmark="step"), "other-benchmark"),
        (lambda entry: entry.update(LINES[0]), "same-row-twice"),
    ],
)
def test_a_line_that_cannot_be_trusted_is_refused(folder, tmp_path, capsys, change, code):
    lines = json.loads(json.dumps(LINES))
    change(lines[1])
    assert refused(folder({"2026-01-31_epyc/loss.jsonl": lines}), capsys) == ("loss.jsonl:2", code)
    assert (tmp_path / "README.md").read_text() == README


def test_other_files_of_results_are_refused(folder, tmp_path, capsys):
    lines = [{**entry, "environment": {**MACHINE, "commit": None, "dirty": None}} for entry in LINES]
    assert refused(folder({"2026-01-31_epyc/loss.jsonl": lines}), capsys) == ("loss.jsonl:1", "no-commit")
    arguments = folder({"2026-01-31_epyc/loss.jsonl": LINES})
    with open(tmp_path / "results/2026-01-31_epyc/loss.jsonl", "a") as file:
        file.write('{"schema": 1')
    assert refused(arguments, capsys) == ("loss.jsonl:4", "not-json")
    arguments = folder({"2026-01-31_epyc/loss.jsonl": LINES, "mine/loss.jsonl": LINES})
    assert refused(arguments, capsys) == ("mine", "folder-name")


@pytest.mark.parametrize(
    ("readme", "code"),
    [
        ("<!-- table: loss -->\n", "marker-without-end"),
        ("<!-- table: loss -->\n<!-- table: loss -->\n<!-- /table -->\n", "marker-without-end"),
        ("<!-- table: lost -->\n<!-- /table -->\n", "unknown-table"),
        ("<!-- table: augment -->\n<!-- /table -->\n", "no-results"),
    ],
)
def test_a_marker_without_a_table_is_an_error(folder, capsys, readme, code):
    assert refused(folder({"2026-01-31_epyc/loss.jsonl": LINES}, readme), capsys) == ("README.md", code)


def test_what_is_absent_is_shown():
    """A peer that is not installed, and a row that the table asks for and no line holds."""
    table = Table(
        "step", (Column("ms", "median_seconds", 1000), Column("n", "count")), "authors", ("ours", "peer", "x")
    )
    text = render(table, [line("authors", count=3), line("ours", (1.0, 1.0, 1.0), count=1234), absent("peer")])
    assert text.splitlines()[2:] == [
        "| variant | ms | n | against authors |",
        "| --- | ---: | ---: | ---: |",
        "| ours | 1,000 | 1,234 | 2.00x |",
        "| peer | absent | absent | absent |",
        "| x | absent | absent | absent |",
    ]
    assert text.splitlines()[0].endswith("; 2026-01-31; peer is absent: pip install peer.")
    nothing = render(table, [absent("authors"), line("ours", (1.0, 1.0, 1.0), count=1)])
    assert "| ours | 1,000 | 1 | absent |" in nothing


def test_a_rate_falls_as_time_grows_and_is_compared_by_itself():
    """10 images/s in the median of 2 s: the slow end, 4 s, gives 5 images/s, the fast end, 1.6 s, 12.5."""
    table = Table("step", (Column("images/s", "images_per_second", spread=True),), "slow", speed="images_per_second")
    slow = line("slow", (2.0, 1.6, 4.0), images_per_second=10.0)
    fast = line("fast", (2.0, 2.0, 2.0), images_per_second=25.0)
    assert render(table, [slow, fast]).splitlines()[4:] == [
        "| slow | 10.0 [5.00, 12.5] | 1.00x |",
        "| fast | 25.0 [25.0, 25.0] | 2.50x |",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0"), (7, "7"), (12345, "12,345"), (0.001234, "0.00123"), (0.9996, "1.00"), (1.0, "1.00"),
     (9.996, "10.0"), (99.96, "100"), (123.4, "123"), (999.6, "1,000"), (3566.4, "3,566"), (-0.8547, "-0.855")],
)  # fmt: skip
def test_three_digits(value, text):
    assert number(value) == text


def gpu_tests(commit, date, passed=16, failed=0, skipped=0, mixed=True, gpu="NVIDIA H200"):
    machine = {**GPU, "gpu": gpu, "commit": commit * 40, "date": date}
    counts = {"passed": passed, "failed": failed, "skipped": skipped, "mixed_decoding": mixed}
    return [{**line("pytest -m gpu", (None, None, None), 0, "gpu_tests", machine), **counts}]


def test_a_page_names_the_last_commit_that_passed_on_a_gpu(folder, tmp_path):
    marker = "<!-- table: gpu_tests -->\n<!-- /table -->\n"

    def sentence(files):
        assert main(folder(files, marker)) == 0
        return (tmp_path / "README.md").read_text().splitlines()[1]

    assert sentence({"2026-01-31_epyc/loss.jsonl": LINES}) == "No commit has been verified on a GPU yet."
    fails = {"2026-02-03_h200/gpu_tests.jsonl": gpu_tests("c", "2026-02-03", failed=1)}
    assert sentence(fails) == "No commit has been verified on a GPU yet."
    both = {
        "2026-02-01_h200/gpu_tests.jsonl": gpu_tests("a", "2026-02-01"),
        "2026-02-02_h100/gpu_tests.jsonl": gpu_tests("b", "2026-02-02", 14, mixed=False, gpu="NVIDIA H100"),
    }
    (tmp_path / "results/2026-02-03_h200/gpu_tests.jsonl").unlink()
    assert sentence(both) == (
        "Last commit verified on a GPU: bbbbbbbbbbbb on NVIDIA H100, 2026-02-02 (torch 2.15.0): 14 tests passed, "
        "mixed decoding not seen."
    )
    skips = {"2026-02-04_h100/gpu_tests.jsonl": gpu_tests("d", "2026-02-04", skipped=2)}
    assert "verified on a GPU: aaaaaaaaaaaa on NVIDIA H200" in sentence(skips)


def test_the_pages_here_equal_the_results():
    assert main(["--check"]) == 0


def test_every_table_reads_a_benchmark_of_the_suite():
    from benchmarks.suite import BENCHMARKS

    # The one of budgets takes minutes of its own to say anything, methods hours, kNN needs faiss, NT-Xent and eight
    # views a peer, spectra runs, linear an encoder; bytes are counted, not timed;
    # the host's time is told against another commit.
    alone = {"budget", "host", "knn", "spectrum", "linear", "methods", "multi_crop", "nt_xent", "traffic"}
    known = {benchmark.name for benchmark in BENCHMARKS} | alone
    assert {table.benchmark for table in tables.TABLES.values()} == known


def rates(benchmark, params, machine=MACHINE, **by_variant):
    return [
        line(
            variant.replace("_", " "), n=4, benchmark=benchmark, params=params, machine=machine, images_per_second=rate
        )
        for variant, rate in by_variant.items()
    ]


def test_the_first_table_answers_for_everyone_from_the_newest_lines(folder, tmp_path):
    """A question that nobody has measured is left out, a peer that is absent is a dash; a machine has its own table."""
    loader = {"size": 224, "workers": 2, "images": 512}
    other = {**MACHINE, "commit": "f" * 40, "date": MACHINE["date"].replace("01-31", "01-29")}
    arguments = folder({
        "2026-01-31_epyc/loader.jsonl": [
            *rates("loader", loader, dali_matrix=700.0, authors=175.0, lightly=140.0),
            *rates("loader", {**loader, "workers": 1}, dali_matrix=500.0, authors=90.0),
        ],
        "2026-01-31_epyc/step.jsonl": rates("step", {"encoder": "resnet50"}, other, fastsiam=6.0, authors=2.0),
        "2026-02-01_h200/step.jsonl": rates("step", {"encoder": "resnet50"}, GPU, fastsiam=4000.0, authors=2000.0),
    }, "<!-- table: summary -->\n<!-- /table -->\n")  # fmt: skip
    assert main(arguments) == 0
    text = (tmp_path / "README.md").read_text().splitlines()
    commits = "n = 4; commits 0123456789ab (loader), ffffffffffff (step); 2026-01-29 to 2026-01-31."
    assert text[1] == f"AMD EPYC, 2 cores, 2 threads; torch 2.15.0, triton 3.9.0; {commits}"
    assert text[5:7] == [
        "| two views each of ImageNet photographs, 224 px, images/s | 700 | 175 | 140 | - | 4.00x |",
        "| training step, ResNet-50, 224 px, images/s | 6.00 | 2.00 | - | - | 3.00x |",
    ]
    assert text[8].startswith("NVIDIA H200 (driver 580.1, 700 W), AMD EPYC")
    assert text[12] == "| training step, ResNet-50, 224 px, images/s | 4,000 | 2,000 | - | - | 2.00x |"


def test_a_race_is_compared_in_points_of_its_seeds_means(folder, tmp_path):
    """Of solo-learn's two loaders the faster one; a race of another length answers another question."""
    setting = {"data": "cifar10", "images": 10000, "encoder": "cifar_resnet8", "seconds": 300.0}
    facts = {"kind": "run", "target": 45.0, "precision": "bf16", "memory_format": "contiguous", "loader": "PIL"}
    lines = [
        line(
            variant, n=0, benchmark="time_to_accuracy", params={**setting, "seed": seed, "base_lr": 0.4, **more},
            knn=knn, images_per_second=700.0, curve=[[300.0, 210000, knn]], **facts,
        ) | {"seconds": 300.0}
        for variant, seed, knn, more in (
            ("fastsiam", 0, 47.0, {}), ("fastsiam", 1, 49.0, {}), ("authors", 0, 40.0, {}), ("authors", 1, 41.5, {}),
            ("solo-learn DALI", 0, 46.0, {}), ("lightly", 0, 99.0, {"seconds": 30.0}),
        )
    ]  # fmt: skip
    readme = "<!-- table: summary -->\n<!-- /table -->\n"
    assert main(folder({"2026-01-31_epyc/time_to_accuracy.jsonl": lines}, readme)) == 0
    row = (tmp_path / "README.md").read_text().splitlines()[5]
    question = "kNN after 5 minutes on 10,000 CIFAR-10 images, ResNet-8, %"
    assert row == f"| {question} | 48.0 ± 1.4 | 40.8 ± 1.1 | - | 46.0 | +7.2 points |"
