"""Fine-tuning: steps against torch's SGD, interruptions, ranks, learning, the saved model, and what is refused."""

import json
import signal
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from fastsiam import load_classifier, load_encoder
from fastsiam.config import load_config
from fastsiam.config.schema import TrainConfig
from fastsiam.config.views import ViewSpec
from fastsiam.data.build import open_evaluation_loader
from fastsiam.data.demo_images import draw_demo
from fastsiam.data.sources.open import open_source
from fastsiam.evaluate.__main__ import main
from fastsiam.evaluate.protocols.classifier import Classifier
from fastsiam.evaluate.protocols.finetune_settings import Settings, factor
from fastsiam.evaluate.protocols.finetune_training import FineTuning
from fastsiam.models.encoder import build_encoder
from fastsiam.run.encoder_file import describe_encoder, save_encoder
from fastsiam.runtime.runtime import Runtime
from tests.support import optional
from tests.support.gloo_ranks import world
from tests.support.processes import run_python
from tests.support.refusals import printed_error

CPU = TrainConfig(batch_size=2, epochs=1, device="cpu", precision="fp32", compile="off")
WORKERS = str(int(optional.installed("dali")))


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    """A ResNet-8 of width 8 with random weights, for views of 16 px."""
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    torch.manual_seed(0)
    config = load_config("quickstart", ["views.size=16", "model.width=8"])
    save_encoder(build_encoder("cifar_resnet8", "cifar", 8, False), describe_encoder(config, 1, None), path)
    return path


@pytest.fixture
def command(encoder_file, demo_folder, tmp_path):
    """A function giving the arguments of a short fine-tuning that writes to tmp_path / "out"."""

    def arguments(*more, out="out"):
        images = ("--train", f"{demo_folder}/train", "--val", f"{demo_folder}/val", "--out", str(tmp_path / out))
        small = ("--epochs", "3", "--batch-size", "32", "--device", "cpu", "--precision", "fp32", "--workers", WORKERS)
        return ["finetune", str(encoder_file), *images, *small, *map(str, more)]

    return arguments


def finetuned(arguments, capsys):
    """The result's line of a command that must succeed, and what it has said."""
    capsys.readouterr()
    assert main(arguments) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def refusal(arguments, capsys):
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed_error(printed.err)


def classifier():
    torch.manual_seed(3)
    return Classifier(build_encoder("cifar_resnet8", "cifar", 8, zero_init_residual=False), 5)


def batches(dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        images = torch.randn(8, 3, 16, 16, generator=generator, dtype=dtype)
        yield images, torch.randint(0, 5, (8,), generator=generator)


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_those_of_torchs_sgd(nesterov):
    mine, plain = classifier(), classifier().train()
    settings = Settings("swav", 1, 8, 0.1, 0.5, "constant", nesterov, weight_decay=0.01, layer_decay=0.5)
    training = FineTuning(mine.train(), settings, Runtime.of(CPU), seed=0)
    parts = {"encoder.blocks.2": 0.1, "encoder.blocks.1": 0.05, "encoder.blocks.0": 0.025, "encoder": 0.0125, "fc": 0.5}
    groups = [
        {"params": [parameter], "lr": next(rate for part, rate in parts.items() if name.startswith(part))}
        for name, parameter in plain.named_parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=9.0, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    for images, labels in batches():
        loss = F.cross_entropy(plain(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert training.step(images, labels).item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(mine.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def test_schedules():
    """SwAV's falls at epochs 12 and 16 of 20; the cosine's half is half-way."""
    assert [factor("step", epoch, 0, 9, 20) for epoch in (11, 12, 15, 16, 19)] == pytest.approx(
        [1, 0.2, 0.2, 0.04, 0.04]
    )
    assert [factor("cosine", epoch, step, 4, 2) for epoch, step in ((0, 0), (0, 2), (1, 0), (1, 2))] == pytest.approx(
        [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    )
    assert factor("constant", 5, 1, 2, 6) == 1


def of_a_rank():
    """Three steps in float64 on this rank's half of each batch."""
    here = world()
    settings = Settings("swav", 1, 8, 0.1, 0.5, "constant", True)
    training = FineTuning(classifier().double(), settings, Runtime.of(CPU, here), seed=0)
    training.model.train()
    for images, labels in batches(torch.float64):
        part = here.share_of(len(images))
        training.step(images[part], labels[part])
    return training.model.state_dict()


@pytest.mark.slow
def test_two_ranks_equal_one(ranks):
    """Weights and running statistics."""
    one, first, second = *ranks(1, of_a_rank), *ranks(2, of_a_rank)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, one, rtol=1e-9, atol=1e-11)


def run_of_a_rank(arguments):
    from argparse import ArgumentParser

    from fastsiam.evaluate.protocols import finetune

    parser = ArgumentParser()
    finetune.add_arguments(parser)
    finetune.run(parser.parse_args(arguments[1:]), world())


@pytest.mark.slow
def test_a_run_of_two_ranks_is_that_of_one(ranks, command, tmp_path):
    more = ("--epochs", 2, "--lr", 1e-3, "--head-lr", 1e-2, "--workers", WORKERS)
    for size in (1, 2):
        ranks(size, run_of_a_rank, command(*more, out=str(size)))
    one, two = (load_file(tmp_path / name / "finetune-100pct/model.safetensors") for name in "12")
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_result_and_model(command, demo_folder, tmp_path, capsys):
    """The accuracy of the line is that of the model read back, counted image by image; a rerun prints the line."""
    line, said = finetuned(command("--labels", "30%", "--head-lr", 0.5), capsys)
    folder = tmp_path / "out/finetune-30pct"
    assert (line["labels"], line["epochs"], line["lr"], line["head_lr"]) == ("30%", 3, 0.01 * 24 / 256, 0.5)
    assert (line["data"]["labelled_images"], line["batch_size"], line["epoch"]) == (24, 24, "last")
    assert "24 images have labels" in said
    assert len((folder / "labels.tsv").read_text().splitlines()) == 24
    model = load_classifier(folder)
    val = open_source(str(demo_folder / "val"))
    spec = ViewSpec(size=model.description["size"], color="exact", mean=model.mean, std=model.std)
    loader = open_evaluation_loader(
        val, spec, batch_size=7, crop_ratio=model.description["crop_ratio"], workers=int(WORKERS)
    )
    hits = [
        model.classes[int(model(image[None]).argmax())] == val.classes[label]
        for batch in loader.batches()
        for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
    ]
    assert line["top1"] == 100 * np.mean(hits)
    assert line["best_top1"] >= line["top1"]
    torch.testing.assert_close(load_encoder(folder / "model.safetensors").state_dict(), model.encoder.state_dict())
    before = (folder / "model.safetensors").read_bytes()
    assert finetuned(command("--labels", "30%", "--head-lr", 0.5), capsys)[0] == line
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(command, tmp_path, capsys):
    """kill -9 after the first checkpoint, and the same command again."""
    more = ("--epochs", 6, "--batch-size", 8, "--lr", 0.05)
    killed, undisturbed = command(*more, out="killed"), command(*more, out="whole")
    process = run_python("-m", "fastsiam.evaluate", *killed, wait=False)
    saved, deadline = tmp_path / "killed/finetune-100pct/checkpoint.pt", time.monotonic() + 200
    while not saved.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(torch.load(saved, weights_only=True)["history"]) < 6
    line, said = finetuned(killed, capsys)
    assert "resumed   after epoch" in said
    expected, _ = finetuned(undisturbed, capsys)
    names = ("top1", "top5", "best_top1", "best_epoch", "loss")
    assert [line[name] for name in names] == [expected[name] for name in names]
    one, other = (load_file(tmp_path / name / "finetune-100pct/model.safetensors") for name in ("killed", "whole"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_another_option_is_refused_until_fresh(command, capsys):
    finetuned(command("--epochs", 1, "--lr", 0.01), capsys)
    error = refusal(command("--epochs", 1, "--lr", 0.02), capsys)
    assert (error.code, error.key) == ("changed-option", "--lr")
    assert "--lr 0.01" in str(error)
    assert finetuned(command("--epochs", 1, "--lr", 0.02, "--fresh"), capsys)[0]["lr"] == 0.02


@pytest.mark.parametrize(
    ("more", "code", "key"),
    [
        (("--labels", "0%"), "out-of-range", "--labels"),
        (("--labels", "101%"), "out-of-range", "--labels"),
        (("--labels", "nowhere.txt"), "absent", "--labels"),
        (("--epochs", 0), "out-of-range", "--epochs"),
        (("--layer-decay", 1.5), "out-of-range", "--layer-decay"),
        (("--batch-size", 1), "batch-too-small", "--batch-size"),
        (("--lr", 1e30), "not-finite", "--lr"),
        (("--lr", 1e30, "--batch-size", 80), "not-finite", "--lr"),
    ],
)
def test_mistakes_are_one_sentence(command, tmp_path, capsys, more, code, key):
    error = refusal(command(*more), capsys)
    assert (error.code, error.key) == (code, key)
    assert not (tmp_path / "out/evaluations.jsonl").exists()


def test_images_that_do_not_fit_are_refused(command, put, picture, tmp_path, capsys):
    """Other classes, no labels, one labelled image; nothing is written."""
    root = put({"one/a/1.txt": "", "flat/1.txt": ""})
    for name in ("one/a/1.jpg", "one/x.txt", "flat/1.jpg", "flat/2.jpg"):
        (root / name).write_bytes(picture)
    assert refusal(command("--val", root / "one"), capsys).code in ("no-labels", "unknown-classes")
    assert refusal(command("--train", root / "flat"), capsys).code == "no-labels"
    (root / "list.txt").write_text("00000.jpg\n")
    assert refusal(command("--labels", root / "list.txt"), capsys).key == "--labels"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_labels_teach(encoder_file, tmp_path, capsys):
    """On 400 images of ten kinds: above chance, and better with all labels than with a tenth of them."""
    draw_demo(tmp_path / "demo", seed=3, train_per_class=40, val_per_class=20)
    images = ("--train", str(tmp_path / "demo/train"), "--val", str(tmp_path / "demo/val"), "--out", str(tmp_path))
    training = ("--epochs", "12", "--batch-size", "20", "--lr", "0.1", "--head-lr", "0.1", "--schedule", "cosine")
    options = (*images, *training, "--size", "24", "--device", "cpu", "--precision", "fp32", "--workers", WORKERS)
    found = {
        share: finetuned(["finetune", str(encoder_file), *options, "--labels", share], capsys)[0]["top1"]
        for share in ("10%", "100%")
    }
    # Chance is 10 % with a standard deviation of 2.
    assert found["100%"] > 25
    assert found["100%"] > found["10%"] + 8
