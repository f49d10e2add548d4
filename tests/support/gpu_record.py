"""The result file that a whole `pytest -m gpu` leaves: which commit was verified on which GPU, and what it saw."""

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from benchmarks.harness.checkout import CHECKOUT
from benchmarks.harness.results import Results
from benchmarks.tables import GPU_TESTS

RESULTS = CHECKOUT / "benchmarks" / "results"
# What a test of the decoder says of itself with `record_property`.
DECODER = "decoder"


class GpuRecord:
    """A pytest plugin that counts the tests marked gpu and writes one line when the session ends.

    Written to `folder`/<date>_<gpu>/gpu_tests.jsonl, in place of an earlier one of the same day; as gpu_tests.dirty
    from a checkout with changes, which no table reads. Nothing is written for a selection of the tests.
    """

    def __init__(self, folder: Path = RESULTS, device: torch.device | None = None):
        self._folder, self._device = folder, device or torch.device("cuda")
        self._outcomes: dict[str, str] = {}
        self._decoders: set[str] = set()

    def pytest_runtest_logreport(self, report):
        self._decoders |= {value for name, value in report.user_properties if name == DECODER}
        # A failed set-up or teardown fails a test that passed; a skip is reported in the set-up.
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session):
        if not _is_whole(session.config) or not self._outcomes:
            return
        counts = {name: list(self._outcomes.values()).count(name) for name in ("passed", "failed", "skipped")}
        mixed = any("mixed" in decoder for decoder in self._decoders)
        path = self._folder / folder_name(self._device) / f"{GPU_TESTS}.jsonl"
        path.unlink(missing_ok=True)
        results = Results(path.parent, self._device)
        line = results.add(GPU_TESTS, "pytest -m gpu", {}, None, **counts, mixed_decoding=mixed)
        if line["environment"]["dirty"] is not False:
            path.replace(path.with_suffix(".dirty"))


def folder_name(device: torch.device) -> str:
    """<date>_<machine>, as `benchmarks.tables` wants it: 2026-01-31_h200."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    machine = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")
    return f"{datetime.now(UTC):%Y-%m-%d}_{machine}"


def _is_whole(config) -> bool:
    """Returns True where all tests marked gpu were asked for and no others."""
    everywhere = config.args_source != pytest.Config.ArgsSource.ARGS
    return config.option.markexpr == "gpu" and not config.option.keyword and everywhere
