"""The command: what it writes, what it says, and how it answers bad input."""

import json
import re
import shutil

import pytest
import torch

import fastsiam
from fastsiam.config import load_config
from fastsiam.data.backends import choose
from fastsiam.methods.simsiam import SimSiam
from fastsiam.train import main
from fastsiam.training.step import TrainingStep
from tests.support.kernels_on_cpu import leave_numba_out
from tests.support.processes import run_python
from tests.support.refusals import printed_error
from tests.support.runs import lines, refused_unwritten

KINDS = {"header", "train", "collapse", "spectrum", "knn", "resume", "warning", "end"}


def test_a_run_leaves_its_folder(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("evaluate.controls=true")]) == 0
    run = tmp_path / "runs/run"
    said = capsys.readouterr().out
    told = ("80 images", "dali", "colour matrix", "batch 8", "fp32", "compile off", "2 epochs x 10 steps", str(run))
    for part in told:
        assert part in said
    assert load_config(run / "config.yaml").run.name == "run"
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert "dali" in environment["loader"]
    metrics = lines(run)
    assert metrics[0] == {"kind": "header", "schema": 1, "name": "run"}
    assert {line["kind"] for line in metrics} <= KINDS
    train = [line for line in metrics if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert [line["images_seen"] for line in train] == list(range(8, 168, 8))
    assert all(-1 <= line["loss"] <= 1 for line in train)
    assert all(0 <= line["data_wait_fraction"] <= 1 for line in train)
    assert not any("view_size" in line for line in train)
    controls, *knn = [line for line in metrics if line["kind"] == "knn"]
    assert controls["control"] == "untrained"
    assert [line["step"] for line in knn] == [10, 20]
    end = metrics[-1]
    assert (end["kind"], end["status"], end["knn_top1"]) == ("end", "done", knn[-1]["knn_top1"])
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["step"], status["knn_top1"]) == ("done", 20, end["knn_top1"])
    assert f"{controls['knn_top1']:.2f} % with random weights" in said
    assert f"{controls['raw_pixels_knn_top1']:.2f} % on raw pixels" in said


@pytest.mark.slow
def test_any_folder_of_photographs_trains_with_the_papers_config(photos, tmp_path):
    small = ("model.encoder=resnet18", "views.size=32", "train.max_steps=3", "train.batch_size=8")
    arguments = ["--config", "r50_100ep.yaml", f"data.train={photos}", *small, f"run.dir={tmp_path}/runs"]
    assert main(arguments) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("r50_100ep-")
    assert lines(run)[-1]["step"] == 3
    assert [line["code"] for line in lines(run) if line["kind"] == "warning"][:1] == ["no-validation"]
    assert (run / "encoder.safetensors").is_file()


def test_bad_input_is_one_sentence_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)

    def told(*overrides):
        error = refused_unwritten(capsys, tmp_path, *tiny(*overrides))
        return error.key, error.code

    assert refused_unwritten(capsys, tmp_path, config="r50_100ep.yaml").code == "absent"
    assert told("train.batch_size=100") == ("train.batch_size", "batch-too-large")
    assert told(f"data.train={tmp_path}/bare") == ("data.train", "no-images")
    assert told("views.size=16..32", "train.epochs=null", "budget=8 images") == ("views.size", "no-epochs-to-grow")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told("train.device=cuda") == ("train.device", "no-cuda-device")
    monkeypatch.setattr(choose, "dali_installed", lambda: False)
    assert told("data.backend=dali") == ("data.backend", "no-dali")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert told() == (None, "incomplete-torchrun")


def test_a_run_folder_of_another_config_is_refused(tiny, tmp_path, capsys):
    assert main(["--config", "quickstart", *tiny("train.epochs=1")]) == 0
    other = tiny("train.epochs=1", "optimizer.momentum=0.5")
    assert refused_unwritten(capsys, tmp_path, *other).code == "other-config"
    assert main(["--config", "quickstart", *other, "run.fresh=true"]) == 0
    assert (tmp_path / "runs/run-2/encoder.safetensors").is_file()
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/thesis.txt").write_text("x")
    assert refused_unwritten(capsys, tmp_path, *tiny("run.name=mine")).code == "not-a-run-folder"


def test_an_image_that_cannot_be_decoded_is_named_and_the_checkpoint_stays(tiny, demo_folder, tmp_path, capsys):
    shutil.copytree(demo_folder, tmp_path / "demo")
    overrides = tiny(f"data.train={tmp_path}/demo/train", "data.val=null", "checkpoint.every_seconds=0.001")
    assert main(["--config", "quickstart", *overrides, "train.max_steps=4"]) == 0
    saved = (tmp_path / "runs/run/checkpoint.pt").read_bytes()
    bad = tmp_path / "demo/train/rings/00003.jpg"
    # The same size, so that the data set counts as the same.
    bad.write_bytes(bytes(bad.stat().st_size))
    assert main(["--config", "quickstart", *overrides, "checkpoint.every_seconds=1000"]) == 2
    told = capsys.readouterr().err
    assert told.endswith("[too-many-bad-images]\n")
    assert str(bad) in told
    assert (tmp_path / "runs/run/checkpoint.pt").read_bytes() == saved
    status = json.loads((tmp_path / "runs/run/status.json").read_text())
    assert (status["status"], status["code"]) == ("failed", "too-many-bad-images")


def test_precision_and_layout_reach_the_step(tiny, tmp_path, monkeypatch):
    seen = []
    real = TrainingStep.__call__

    def spy(self, views, number, indices, progress):
        out = real(self, views, number, indices, progress)
        (group,) = views
        seen.append((group.dtype, group.is_contiguous(memory_format=torch.channels_last), out["z"].dtype))
        return out

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    for precision in ("fp32", "bf16"):
        overrides = tiny(f"train.precision={precision}", "train.max_steps=1", f"run.name={precision}")
        fastsiam.pretrain(load_config("quickstart", overrides))
    assert [(views, layout) for views, layout, _ in seen] == [(torch.float32, True), (torch.bfloat16, True)]


def test_out_of_memory_names_the_largest_micro_batch_that_fits_and_its_price(tiny, tmp_path, capsys, monkeypatch):
    """A forward pass of more than 2 images runs out of memory; no GPU is needed to read what is said then."""
    real = SimSiam.forward

    def small_gpu(self, views):
        if len(views[0]) > 2 * 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, views)

    monkeypatch.setattr(SimSiam, "forward", small_gpu)
    assert main(["--config", "quickstart", *tiny()]) == 2
    said = capsys.readouterr().err
    assert printed_error(said).code == "out-of-memory"
    # The batch that failed, the micro batch that fits, and the paper's accuracy at batch 64 and 256.
    assert re.findall(r"[\d.]*\d", said)[:3] == ["8", "2", "2"]
    assert re.findall(r"[\d.]*\d", said.partition("Table 2")[2])[:4] == ["66.1", "64", "68.1", "256"]
    assert said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.needs("g++")
def test_compiled_training_follows_eager_training(tiny, tmp_path):
    """The forced compile is fullgraph; a recompile after the second step would raise."""
    # The cache belongs to the code, not to the model: other tests have compiled it for other layouts.
    torch._dynamo.reset()
    losses = {}
    for setting in ("off", "on"):
        with torch._dynamo.config.patch(error_on_recompile=True):
            overrides = tiny(f"train.compile={setting}", f"run.name={setting}", "train.max_steps=4", "data.val=null")
            fastsiam.pretrain(load_config("quickstart", overrides))
        losses[setting] = [line["loss"] for line in lines(tmp_path / "runs" / setting) if line["kind"] == "train"]
    assert len(losses["on"]) == 4
    (line,) = [line for line in lines(tmp_path / "runs/on") if line["kind"] == "compile"]
    assert (line["step"], line["graphs"], line["recompiles"]) == (0, 1, 0)
    assert line["seconds"] > 0.5
    assert losses["on"] == pytest.approx(losses["off"], abs=2e-4)


@pytest.mark.slow
def test_a_machine_without_a_compiler_refuses_to_compile(tiny, tmp_path):
    arguments = tiny("train.compile=on", "train.max_steps=2", "data.val=null")
    environment = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = run_python("-m", "fastsiam.train", "--config", "quickstart", *arguments, **environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert printed_error(done.stderr).code == "compile-failed"
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["exit_code"] == 2


def test_fp16_scales_the_loss_and_counts_what_it_skips(tiny, tmp_path, capsys):
    """Scaled by 2^40 the gradients overflow, and each skipped step halves the scale."""
    overrides = tiny("train.precision=fp16", "data.val=null", "train.epochs=4")
    assert main(["--config", "quickstart", *overrides, "train.max_steps=2"]) == 0
    path = tmp_path / "runs/run/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["scaler"]["scale"] = 2.0**40
    torch.save(saved, path)
    capsys.readouterr()
    assert main(["--config", "quickstart", *overrides, "train.max_steps=4"]) == 0
    assert "2 steps skipped (fp16)" in capsys.readouterr().out
    after = torch.load(path, weights_only=True)
    assert after["scaler"]["scale"] == 2.0**38
    assert after["skipped_steps"] == 2
    assert all(torch.equal(after["method"][name], value) for name, value in saved["method"].items() if "weight" in name)
    train = [line for line in lines(tmp_path / "runs/run") if line["kind"] == "train"]
    assert [line["skipped_steps"] for line in train] == [0, 0, 1, 2]
    assert main(["--config", "quickstart", *overrides]) == 0
    skipped = torch.load(path, weights_only=True)["skipped_steps"]
    assert 2 < skipped < 30
    assert main(["--config", "quickstart", *tiny("train.epochs=4", "data.val=null", "run.name=fp32")]) == 0


@pytest.mark.parametrize("more", [(), ("train.micro_batch=4", "evaluate.average=ema")], ids=["plain", "averaged"])
def test_steps_between_log_points_read_nothing_back(tiny, tmp_path, monkeypatch, more):
    """Reading a tensor back to the host waits for a GPU; between log points nothing may."""
    # The kernels for a CPU take its memory as numpy's, which waits for nothing.
    leave_numba_out(monkeypatch)
    reads = []
    for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)

        def spy(self, *arguments, real=real, name=name, **more):
            reads.append(name)
            return real(self, *arguments, **more)

        monkeypatch.setattr(torch.Tensor, name, spy)
    per_step = []
    real_step = TrainingStep.__call__

    def step(self, views, number, indices, progress):
        reads.clear()
        out = real_step(self, views, number, indices, progress)
        per_step.append(list(reads))
        return out

    monkeypatch.setattr(TrainingStep, "__call__", step)
    fastsiam.pretrain(load_config("quickstart", tiny("train.max_steps=3", "data.val=null", *more)))
    assert per_step == [[], [], []]


def test_the_command_runs_as_a_module_and_by_name():
    from fastsiam.__main__ import main as by_name

    assert by_name([]) == 2
    for arguments, code in ((["tarin"], 2), (["train", "--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            by_name(arguments)
        assert ended.value.code == code
