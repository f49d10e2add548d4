"""Answers of the commands to what goes wrong: one sentence on stderr, and an exit code."""

import os
import pickle

import pytest

from fastsiam import cli
from fastsiam.errors import MissingLibraryError, UserError
from tests.support.refusals import printed_error, refused

TEXTS = {"gone": "another process has gone", "stopped": "stopped by Ctrl-C"}


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (UserError("train.epochs: 0 is too few", "too-few"), 2, "too-few"),
        (MissingLibraryError("no apex", "no-apex", name="apex"), 2, "no-apex"),
        (MemoryError(), 2, "out-of-host-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out-of-host-memory"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_what_a_user_can_correct_is_one_line(capsys, error, exit_code, code):
    assert cli.answered(raising(error), **TEXTS) == exit_code
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert printed_error(said.err).code == code


@pytest.mark.parametrize(
    ("work", "arguments", "key"),
    [
        ("fastsiam.train._train", ("train", "--config", "quickstart"), "train.batch_size"),
        ("fastsiam.plan.__main__._print_plan", ("plan", "--config", "quickstart"), "train.batch_size"),
        ("fastsiam.evaluate.protocols.knn.run", ("evaluate", "knn", "x", "--train", "x", "--val", "x"), "--batch-size"),
        ("fastsiam.embed.__main__._embed", ("embed", "x", "x", "--out", "x.npz"), "--batch-size"),
        ("fastsiam.export.__main__.export", ("export", "x", "--to", "onnx", "--out", "x.onnx"), None),
    ],
)
def test_out_of_memory_names_an_option_of_the_command(monkeypatch, work, arguments, key):
    monkeypatch.setattr(work, lambda *_: raising(MemoryError())())
    error = refused(*arguments)
    assert (error.code, error.key) == ("out-of-host-memory", key)


@pytest.mark.parametrize("error", [ValueError("a bug"), ImportError("no libx.so"), RuntimeError("CUDA error")])
def test_what_is_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match=str(error)):
        cli.answered(raising(error), **TEXTS)


def test_one_process_of_a_machine_prints_what_all_of_them_meet(capsys, monkeypatch):
    error = UserError("data.train: is a file", "not-a-folder")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.refused(error) == 2
        assert capsys.readouterr().err.count("\n") == lines


def test_an_error_keeps_its_key_and_code_between_processes():
    error = pickle.loads(pickle.dumps(MissingLibraryError("data.backend: no dali", "no-dali", name="nvidia.dali")))
    assert (type(error), error.key, error.code, str(error)) == (
        MissingLibraryError, "data.backend", "no-dali", "data.backend: no dali",
    )  # fmt: skip
    assert isinstance(error, UserError)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, ("PASSIVE", "10000")),
        ({"GOMP_SPINCOUNT": "7"}, ("PASSIVE", "7")),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ("ACTIVE", None)),
    ],
)
def test_threads_sleep_unless_the_environment_says_how_they_wait(monkeypatch, own, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name in names:
        # Set first, so that it is taken back whatever the function does.
        monkeypatch.setenv(name, own.get(name, ""))
        if name not in own:
            os.environ.pop(name)
    cli.let_threads_sleep()
    assert tuple(os.environ.get(name) for name in names) == expected
