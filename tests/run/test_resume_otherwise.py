"""A run that is resumed on other terms: data elsewhere, another precision or device, more epochs, another name."""

import json
import shutil

import pytest
import torch

from fastsiam.run import resume
from fastsiam.run.metrics import Journal
from fastsiam.run.resume import changed_computation, differences_against_resuming, find_run
from fastsiam.runtime import device
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from fastsiam.train import main, pretrain
from tests.support.refusals import refused
from tests.support.runs import lines, of_an_earlier_version, weights


def test_a_run_without_a_name_whose_data_moved_is_pointed_to(tiny, tmp_path, demo_folder, capsys):
    """By default another path is another run, which would begin anew without a word."""
    unnamed = [override for override in tiny("data.val=null") if not override.startswith("run.name")]
    assert main(["--config", "quickstart", *unnamed, "train.max_steps=2"]) == 0
    (first,) = (tmp_path / "runs").iterdir()
    status = json.loads((first / "status.json").read_text())
    (tmp_path / "moved").symlink_to(demo_folder)
    moved = [*unnamed, f"data.train={tmp_path}/moved/train", "train.max_steps=2"]
    for ended, told in (("done", False), ("preempted", True)):
        (first / "status.json").write_text(json.dumps(status | {"status": ended}))
        capsys.readouterr()
        assert main(["--config", "quickstart", *moved]) == 0
        assert (f"run.name={first.name} resumes it" in capsys.readouterr().out) == told
        for path in set((tmp_path / "runs").iterdir()) - {first}:
            shutil.rmtree(path)
    assert main(["--config", "quickstart", *moved, "optimizer.momentum=0.5"]) == 0
    assert f"run.name={first.name}" not in capsys.readouterr().out


def test_a_run_elsewhere_is_the_same_run_and_warns_that_bits_may_differ(tiny, tmp_path, demo_folder, monkeypatch):
    """Its folder has another name, its data another path, and the CPU more threads."""
    assert main(["--config", "quickstart", *tiny("train.max_steps=2", "data.val=null")]) == 0
    (tmp_path / "moved").symlink_to(demo_folder)
    (tmp_path / "runs/run").rename(tmp_path / "runs/thesis")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    moved = tiny(f"data.train={tmp_path}/moved/train", "data.val=null", "run.name=thesis", "train.max_steps=4")
    assert main(["--config", "quickstart", *moved]) == 0
    found = lines(tmp_path / "runs/thesis")
    assert [line["step"] for line in found if line["kind"] == "resume"] == [2]
    assert [line["code"] for line in found if line["kind"] == "warning"] == ["other-computation"]


def test_a_compiled_run_of_an_earlier_version_is_told_that_its_batch_norm_is_another(tiny_config, tmp_path):
    """0.1.0 compiled the batch norm of one process view by view: the same to rounding."""
    config = tiny_config("train.max_steps=2")
    assert pretrain(config).step == 2
    run = tmp_path / "runs/run"
    of_an_earlier_version(run)
    environment = json.loads((run / "environment.json").read_text())
    for compiles in (False, True):
        (run / "environment.json").write_text(json.dumps(environment | {"compile": compiles}))
        then = find_run(config, World(), Journal(World()))[1]["computation"]
        notice = changed_computation(then, then | ({"norm": "batch norm written out"} if compiles else {}))
        assert (notice and notice.code) == ("other-computation" if compiles else None)


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_other_convolutions_of_a_cpu_are_told(dtype, told, monkeypatch):
    sides = []
    for tiles in (True, False):
        monkeypatch.setattr(resume, "multiplies_tiles", lambda tiles=tiles: tiles)
        sides.append(resume.computation(Runtime(World(), torch.device("cpu"), dtype, False)))
    notice = changed_computation(*sides)
    assert (notice is not None) == told
    assert not told or "with convolutions for a CPU with AMX, and this start has" in notice


@pytest.mark.parametrize(("then", "earlier"), [("fp32", True), ("bf16", False)])
def test_a_resumed_run_keeps_its_precision_where_the_config_says_auto(
    tiny, tmp_path, capsys, monkeypatch, then, earlier
):
    """Whatever this machine would choose, the run ends as one in its first precision does."""
    assert main(["--config", "quickstart", *tiny(f"train.precision={then}", "run.name=whole", "data.val=null")]) == 0
    auto = tiny("train.precision=auto", "data.val=null")
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: then == "bf16")
    assert main(["--config", "quickstart", *auto, "train.max_steps=4"]) == 0
    if earlier:
        of_an_earlier_version(tmp_path / "runs/run")
    # fp32 is kept where bf16 would be chosen; bf16 is kept as long as the machine multiplies it.
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: True)
    capsys.readouterr()
    assert main(["--config", "quickstart", *auto]) == 0
    said = capsys.readouterr().out
    assert f"device    cpu, {then} (auto: as in the checkpoint)" in said
    assert "may differ" not in said
    assert main(["--config", "quickstart", *auto, "--dry-run"]) == 0
    assert f"device    cpu, {then} (auto: as in the checkpoint)" in capsys.readouterr().err
    torch.testing.assert_close(weights(tmp_path / "runs/whole"), weights(tmp_path / "runs/run"), rtol=0, atol=0)


def test_another_precision_is_told_where_the_checkpoints_is_not_to_be_had(tiny, tmp_path, monkeypatch):
    auto = tiny("train.precision=auto", "data.val=null")
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: True)
    assert main(["--config", "quickstart", *auto, "train.max_steps=4"]) == 0
    monkeypatch.setattr(device, "_cpu_multiplies_bf16", lambda: False)
    assert main(["--config", "quickstart", *auto, "train.max_steps=6"]) == 0
    warned = [line["code"] for line in lines(tmp_path / "runs/run") if line["kind"] == "warning"]
    assert warned == ["other-precision"]
    # A precision that is asked for is taken, with its scaler.
    assert main(["--config", "quickstart", *tiny("train.precision=fp16", "data.val=null", "train.max_steps=8")]) == 0
    warned = [line["code"] for line in lines(tmp_path / "runs/run") if line["kind"] == "warning"]
    assert warned == ["other-precision"] * 2


def test_device_compiler_and_ranks_that_changed_are_told():
    before = {"device": "cuda", "dtype": "bf16", "compile": True, "threads": 8, "ranks": 1}
    assert changed_computation(before, dict(before)) is None
    assert changed_computation({"threads": 8}, before) is None
    now = before | {"device": "cpu", "compile": False, "ranks": 2}
    notice = changed_computation(before, now)
    assert notice.code == "other-computation"
    assert "with cuda, compile on, 1 process, and this start has cpu, compile off, 2 processes" in notice


@pytest.mark.parametrize(
    ("then", "now", "keys"),
    [
        ("train.device=cuda", "train.device=cpu", []),
        ("train.precision=auto", "train.precision=bf16", []),
        ("train.precision=fp32", "train.precision=bf16", ["train.precision"]),
        ("train.compile=on", "train.compile=auto", []),
        ("train.compile=on", "train.compile=off", ["train.compile"]),
        ("data.backend=dali", "data.backend=auto", []),
        ("budget_price_per_hour=1", "budget_price_per_hour=2", []),
        ("optimizer.momentum=0.9", "optimizer.momentum=0.5", ["optimizer.momentum"]),
    ],
)
def test_what_a_config_may_change_between_two_starts(tiny_config, then, now, keys):
    assert list(differences_against_resuming(tiny_config(then), tiny_config(now))) == keys


def test_auto_keeps_the_compiler_setting_of_a_checkpoint_on_the_same_device(tiny_config):
    train = tiny_config("train.compile=auto").train
    for compiles in (True, False):
        assert Runtime.of(train, before={"device": "cpu", "compile": compiles}).compiles == compiles
    assert not Runtime.of(train, before={"device": "cuda", "compile": True}).compiles
    assert not Runtime.of(train).compiles


@pytest.mark.parametrize("schedule", ["cosine", "cosine_per_epoch"])
def test_a_finished_run_goes_on_with_more_epochs_on_their_schedule(tiny, tmp_path, capsys, schedule):
    more = (f"optimizer.schedule={schedule}", "data.val=null", "checkpoint.keep=1", "optimizer.warmup=0.1")
    assert main(["--config", "quickstart", *tiny("train.epochs=1", *more)]) == 0
    folder = tmp_path / "runs/run"
    (folder / "encoder.safetensors").unlink()
    capsys.readouterr()
    assert main(["--config", "quickstart", *tiny("train.epochs=1", *more)]) == 0
    assert "a larger train.epochs resumes it" in capsys.readouterr().out
    assert main(["--config", "quickstart", *tiny("train.epochs=3", *more)]) == 0
    assert (folder / "encoder.safetensors").exists()
    assert main(["--config", "quickstart", *tiny("train.epochs=3", "run.name=whole", *more)]) == 0
    rates = [
        {line["step"]: line["lr"] for line in lines(run) if line["kind"] == "train"}
        for run in (folder, folder.with_name("whole"))
    ]
    assert list(rates[0]) == list(range(1, 31))
    assert [rates[0][step] for step in range(11, 31)] == [rates[1][step] for step in range(11, 31)]
    assert [line["code"] for line in lines(folder) if line["kind"] == "warning"] == ["larger-budget"]
    # Fewer are refused with what to type.
    assert "train.max_steps=N" in str(refused("train", "--config", "quickstart", *tiny("train.epochs=2", *more)))


def test_a_larger_budget_of_the_same_kind_goes_on(tiny, tmp_path):
    for budget in ("40 images", "120 images"):
        assert main(["--config", "quickstart", *tiny("train.epochs=null", f"budget={budget}", "data.val=null")]) == 0
    assert lines(tmp_path / "runs/run")[-1]["step"] == 15
    other = tiny("train.epochs=null", "budget=2h", "data.val=null")
    assert refused("train", "--config", "quickstart", *other).code == "other-config"
