"""Checkpoints on a full disk, killed at every moment of a save, damaged, or written to run code."""

import contextlib
import json
import os
import pickle
import shlex
import zipfile
from pathlib import Path

import pytest
import torch

from fastsiam.run.checkpoint import load_newest, path_of, save
from fastsiam.runtime.files import sync_folder
from fastsiam.train import main
from tests.support.files import largest_file
from tests.support.processes import run_python
from tests.support.refusals import printed_error, refuses
from tests.support.runs import lines


def state(step, size=50_000):
    return {"step": step, "weight": torch.full((size,), float(step))}


@pytest.mark.slow
def test_a_kill_at_every_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    done = run_python("-m", "tests.support.kill_at_every_write", tmp_path)
    assert done.returncode == 0, done.stderr
    walked = {(line["keep"], line["kills"]): line["operations"] for line in map(json.loads, done.stdout.splitlines())}
    assert list(walked) == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
    for (keep, _), operations in walked.items():
        written = ["open to write", *["write"] * operations.count("write"), "fsync"]
        assert operations.count("write") >= 3
        assert operations == [*written, *["replace"] * keep, "open", "fsync", "close", "unlink"]


def full_device(folder):
    (folder / "checkpoint.tmp").symlink_to("/dev/full")
    return contextlib.nullcontext()


@pytest.mark.parametrize(
    ("fault", "size"),
    [
        (full_device, 50_000),
        (full_device, 3),
        (lambda folder: largest_file(100_000), 50_000),
        (lambda folder: largest_file(1000), 3),
    ],
)
def test_a_full_disk_gives_the_space_back_and_the_one_before_stays(tmp_path, fault, size):
    save(tmp_path, state(1, size), keep=2)
    with fault(tmp_path), refuses("checkpoint-unwritten"):
        save(tmp_path, state(2, size), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_newest(tmp_path, warn=pytest.fail)["step"] == 1
    save(tmp_path, state(3, size), keep=2)
    assert [torch.load(path_of(tmp_path, age))["step"] for age in (0, 1)] == [3, 1]


def test_where_there_is_no_folder_nothing_is_saved(tmp_path):
    with refuses("checkpoint-unwritten"):
        save(tmp_path / "absent", state(1), keep=1)


def test_an_error_of_the_state_is_not_one_of_the_disk(tmp_path):
    class Lost:
        def __reduce__(self):
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        save(tmp_path, {"lost": Lost()}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_sync_a_folder_is_served():
    """/proc answers fsync of a folder with EINVAL."""
    sync_folder(Path("/proc"))


def test_what_a_killed_save_has_left_disturbs_nobody(tmp_path):
    save(tmp_path, state(1), keep=1)
    (tmp_path / "checkpoint.tmp").write_bytes(path_of(tmp_path, 0).read_bytes()[:100_000])
    assert load_newest(tmp_path, warn=pytest.fail)["step"] == 1
    save(tmp_path, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    path_of(tmp_path, 0).rename(tmp_path / "checkpoint.tmp")
    assert load_newest(tmp_path, warn=pytest.fail) is None


def test_the_order_is_that_of_the_ages_and_what_is_beyond_them_goes(tmp_path):
    for step in range(12):
        save(tmp_path, {"step": step}, keep=12)
    for age in (0, 1):
        path_of(tmp_path, age).write_bytes(b"")
    said = []
    assert load_newest(tmp_path, said.append)["step"] == 9
    assert len(said) == 2
    save(tmp_path, {"step": 12}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.1.pt", "checkpoint.2.pt", "checkpoint.pt"]


class Evil:
    """Touches a file when it is unpickled by who trusts it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {shlex.quote(str(self.path))}",))


WRITERS = {
    "zip": lambda evil, path: torch.save({"step": 2, "method": evil}, path),
    "zip, protocol 4": lambda evil, path: torch.save({"method": evil}, path, pickle_protocol=4),
    "old format": lambda evil, path: torch.save({"method": evil}, path, _use_new_zipfile_serialization=False),
} | {
    f"pickle, protocol {protocol}": lambda evil, path, protocol=protocol: path.write_bytes(pickle.dumps(evil, protocol))
    for protocol in range(6)
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_file_that_would_run_code_is_not_loaded(tmp_path, writer):
    save(tmp_path, {"step": 1}, keep=2)
    path_of(tmp_path, 0).rename(path_of(tmp_path, 1))
    WRITERS[writer](Evil(tmp_path / "owned"), path_of(tmp_path, 0))
    warned = []
    assert load_newest(tmp_path, warned.append)["step"] == 1
    assert [notice.code for notice in warned] == ["damaged-checkpoint"]
    assert not (tmp_path / "owned").exists()


def test_a_file_that_cannot_be_loaded_is_reported_and_the_one_before_it_taken(tmp_path):
    save(tmp_path, state(1), keep=2)
    save(tmp_path, state(2), keep=2)
    data = path_of(tmp_path, 0).read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    renamed = data.replace(b"torch._utils", b"torch._utilt", 1)
    cut = [data[: len(data) * part // 7] for part in range(7)] + [data[:-1], data[:2]]
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(256, (4000,), generator=generator, dtype=torch.uint8).numpy().tobytes() for _ in range(5)]
    for content in (bytes(flipped), renamed, bytes(len(data)), b"garbage " * 1000, *cut, *noise):
        path_of(tmp_path, 0).write_bytes(content)
        warned = []
        assert load_newest(tmp_path, warned.append)["step"] == 1
        assert [notice.code for notice in warned] == ["damaged-checkpoint"]
    with zipfile.ZipFile(path_of(tmp_path, 0), "w") as archive:
        archive.writestr("other/readme.txt", "no checkpoint")
    assert load_newest(tmp_path, warned.append)["step"] == 1
    path_of(tmp_path, 0).unlink()
    path_of(tmp_path, 0).mkdir()
    assert load_newest(tmp_path, warned.append)["step"] == 1
    path_of(tmp_path, 1).write_bytes(b"PK")
    with refuses("no-whole-checkpoint"):
        load_newest(tmp_path, warn=lambda notice: None)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from fastsiam.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_run_outlives_a_disk_that_is_full(tiny, tmp_path):
    """Checkpoints that cannot be written are warnings, the last one is the end; metrics go on; space lets it go on."""
    folder = tmp_path / "runs/run"
    assert main(["--config", "quickstart", *tiny("train.max_steps=7")]) == 0
    before = (folder / "checkpoint.pt").read_bytes()
    command = ["--config", "quickstart", *tiny("checkpoint.every_seconds=0.0001")]
    sizes = [path.stat().st_size for path in folder.iterdir() if not path.name.startswith("checkpoint")]
    limit = len(before) - 1000
    assert limit > 2 * max(sizes)
    done = run_python("-c", LIMITED, limit, *command)
    assert done.returncode == 2, done.stderr
    assert printed_error(done.stderr).code == "checkpoint-unwritten"
    warned = [(line["step"], line["code"]) for line in lines(folder) if line["kind"] == "warning"]
    assert warned == [(step, "checkpoint-unwritten") for step in range(8, 21)]
    assert [line["step"] for line in lines(folder) if line["kind"] == "train"] == list(range(1, 21))
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["code"]) == ("failed", "checkpoint-unwritten")
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not (folder / "checkpoint.tmp").exists()
    assert main(command) == 0
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"] == 20
    assert [line["step"] for line in lines(folder) if line["kind"] == "train"] == list(range(1, 21))
    assert [line for line in lines(folder) if line["kind"] == "warning"] == []
