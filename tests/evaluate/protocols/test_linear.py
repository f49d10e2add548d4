"""Linear evaluation as a command: what the encoder sees, what may choose, ranks, resumption and refusals."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fastsiam.config.views import ViewGroup, ViewSpec
from fastsiam.data.build import open_training_loader
from fastsiam.data.demo_images import draw_demo
from fastsiam.data.sources.open import open_source
from fastsiam.evaluate import linear_features
from fastsiam.evaluate.linear import LinearHeads
from fastsiam.evaluate.linear_features import Cached, Streamed, decoded_at_once
from fastsiam.evaluate.linear_training import LinearTraining
from fastsiam.evaluate.protocols import inputs, linear
from fastsiam.run.encoder_file import load_encoder
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime
from tests.support.encoders import random_encoder
from tests.support.gloo_ranks import world as world_of_group
from tests.support.refusals import refused

ALONE = ("--backend", "pil", "--workers", "0", "--device", "cpu", "--precision", "fp32")
RUNTIME = Runtime(World(), torch.device("cpu"), torch.float32, compiles=False)


@pytest.fixture
def encoder(tmp_path):
    return random_encoder(tmp_path / "encoder.safetensors")


def parsed(encoder, images, *more, val=None):
    parser = argparse.ArgumentParser()
    linear.add_arguments(parser)
    paths = ("--train", images / "train", "--val", val or images / "val")
    defaults = ("--epochs", "3", "--batch-size", "16", *ALONE)
    return parser.parse_args([str(word) for word in (encoder, *paths, *defaults, *more)])


def measured(*arguments, val=None, world=None):
    """The line of an evaluation, and its heads."""
    asked, kept = parsed(*arguments, val=val), []
    with pytest.MonkeyPatch.context() as patch:
        forget = LinearTraining.forget
        patch.setattr(LinearTraining, "forget", lambda self: kept.append(self.heads) or forget(self))
        line = linear.measure(asked, linear.sweep_of(asked), world or World())
    return line, kept[0]


def training_loader(folder, size=16, batch_size=16):
    groups = (ViewGroup(1, linear.training_view(ViewSpec(size=size, color="exact"))),)
    return open_training_loader(
        open_source(str(folder)), groups, batch_size=batch_size, seed=0, backend="pil", workers=0
    )


def test_streamed_features_are_those_of_each_epochs_views_in_batches_of_any_size(encoder, demo_folder):
    network, loader = load_encoder(encoder), training_loader(demo_folder / "train")
    with torch.no_grad():
        batches = list(loader.epoch(2))
        expected = torch.cat([network(batch.views[0]) for batch in batches])
        found = list(Streamed(network, training_loader(demo_folder / "train"), 24, RUNTIME).epoch(2))
    assert [len(batch.labels) for batch in found] == [24, 24, 24, 8]
    torch.testing.assert_close(torch.cat([batch.features for batch in found]), expected, rtol=1e-5, atol=1e-6)
    assert torch.cat([batch.labels for batch in found]).tolist() == torch.cat([b.labels for b in batches]).tolist()
    assert torch.cat([batch.images for batch in found]).tolist() == [i for b in batches for i in b.indices]


def test_cached_features_are_those_of_the_first_epochs_shuffled_in_turn(encoder, demo_folder):
    network, loader = load_encoder(encoder), training_loader(demo_folder / "train", batch_size=24)
    cached = Cached(network, loader, 30, RUNTIME, passes=2)
    cached.fill()
    passes = list(training_loader(demo_folder / "train", batch_size=24).epoch(1))
    with torch.no_grad():
        rows = torch.cat([network(batch.views[0]) for batch in passes])
    images = np.concatenate([batch.indices for batch in passes])
    orders = []
    for epoch in (1, 3):
        parts = list(cached.epoch(epoch))
        assert [len(part.labels) for part in parts] == [30, 30, 20]
        whole = linear_features.joined(parts)
        assert sorted(whole.images.tolist()) == list(range(80))
        # 8 of 80 images fill no batch of 24.
        assert (whole.labels < 0).sum() == 8
        where = {image: row for row, image in enumerate(whole.images.tolist())}
        torch.testing.assert_close(whole.features[[where[image] for image in images]], rows.half())
        orders.append(whole.images.tolist())
    assert orders[0] != orders[1]


def test_views_are_crops_of_8_to_100_percent_and_flips_alone():
    spec = linear.training_view(ViewSpec(size=24, color="exact", mean=(0.1, 0.2, 0.3)))
    assert (spec.size, spec.mean, spec.crop_scale, spec.flip) == (24, (0.1, 0.2, 0.3), (0.08, 1.0), 0.5)
    assert spec.jitter == spec.grayscale == spec.blur == spec.solarize == 0


def test_few_images_fill_no_batch_of_the_loader():
    """They divide the training batch, so that ranks share the same batches as one process."""
    assert decoded_at_once(1_281_167, 4096, 1) == 128
    assert decoded_at_once(1_280_000, 4096, 1) == 256
    assert decoded_at_once(5000, 256, 1) == 128
    assert decoded_at_once(5000, None, 1) == 250
    assert decoded_at_once(5000, None, 4) == 1000
    assert decoded_at_once(80, 16, 2) == 16


def test_the_encoder_is_left_to_the_bit(encoder, demo_folder, monkeypatch):
    network = load_encoder(encoder)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes, forward = set(), network.forward
    monkeypatch.setattr(network, "forward", lambda x: modes.add(network.bn1.training) or forward(x))
    monkeypatch.setattr(inputs, "load_encoder", lambda path: network)
    line, heads = measured(encoder, demo_folder)
    assert modes == {False}
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert (line["epochs"], line["batch"], line["lr"], line["optimizer"]) == (3, 16, pytest.approx(0.1 / 16), "lars")
    assert line["epoch"] == "last"
    assert heads.bias.abs().sum() > 0


def coloured(root):
    """Four classes of 12 training and 5 validation images, each of one colour."""
    for number in range(4):
        for split, count in (("train", 12), ("val", 5)):
            folder = root / split / f"class{number}"
            folder.mkdir(parents=True)
            for image in range(count):
                colour = tuple(40 + 160 * (number >> bit & 1) + 3 * image for bit in range(3))
                Image.new("RGB", (20, 20), colour).save(folder / f"{image}.png")
    return root


def test_validation_labels_have_no_part_in_the_choice(encoder, tmp_path):
    """The classes of the validation images are exchanged; the choice and its scores stay."""
    images = coloured(tmp_path / "images")
    options = ("--cached", "--passes", "1", "--optimizer", "sgd", "--lr", "1e-6,3", "--epochs", "20")
    line, _ = measured(encoder, images, *options)
    for number in range(4):
        shutil.copytree(images / f"val/class{number}", tmp_path / f"spoiled/class{(number + 1) % 4}")
    spoiled, _ = measured(encoder, images, *options, val=tmp_path / "spoiled")
    slow, fast = line["heads"]
    assert (fast["top1"], fast["top1_held_out"]) == (100, 100)
    assert slow["top1_held_out"] < 80
    assert [head["top1_held_out"] for head in spoiled["heads"]] == [slow["top1_held_out"], 100]
    # Of equal epochs the first is the best, at 0 % too.
    assert (spoiled["best_top1"], spoiled["best_epoch"]) != (0, 0)
    assert (line["base_lr"], spoiled["base_lr"], line["top1"], spoiled["top1"]) == (3, 3, 100, 0)


def test_heads_of_a_sweep_are_those_of_runs_of_their_own(encoder, demo_folder):
    """Those that give the result have all training images."""
    sweep, heads = measured(encoder, demo_folder, "--lr", "3,30", "--weight-decay", "0,0.01")
    assert [(head["base_lr"], head["weight_decay"]) for head in sweep["heads"]] == [
        (3, 0),
        (3, 0.01),
        (30, 0),
        (30, 0.01),
    ]
    _, alone = measured(encoder, demo_folder, "--lr", "30", "--weight-decay", "0.01")
    torch.testing.assert_close(heads.weight[3], alone.weight[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cached", [(), ("--cached", "--passes", "2")])
def test_stopped_after_an_epoch_it_ends_as_if_undisturbed(encoder, demo_folder, tmp_path, monkeypatch, cached, capsys):
    expected, heads = measured(encoder, demo_folder, "--lr", "3,30", *cached)
    folder, save = tmp_path / "results", LinearTraining._save

    def stop(self):
        save(self)
        if self.epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LinearTraining, "_save", stop)
    with pytest.raises(KeyboardInterrupt):
        measured(encoder, demo_folder, "--lr", "3,30", "--out", folder, *cached)
    monkeypatch.undo()
    assert len(list(folder.glob("linear-*.pt")) if folder.exists() else []) == (not cached)
    capsys.readouterr()
    # Another evaluation does not take it up.
    measured(encoder, demo_folder, "--lr", "3,31", "--out", folder, *cached)
    assert "resume" not in capsys.readouterr().err
    line, later = measured(encoder, demo_folder, "--lr", "3,30", "--out", folder, *cached)
    assert ("resume    after epoch 2" in capsys.readouterr().err) == (not cached)
    assert torch.equal(heads.weight, later.weight)
    assert line["heads"] == expected["heads"]
    assert list(folder.glob("linear-*.pt")) == []
    written = [json.loads(text) for text in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [found["heads"] for found in written][-1] == line["heads"]


def on_this_rank(encoder, images, cached):
    line, heads = measured(encoder, images, "--lr", "30,100", *cached, world=world_of_group())
    return line["heads"] if "heads" in line else line["details"]["heads"], heads.weight


@pytest.mark.slow
@pytest.mark.parametrize("cached", [(), ("--cached", "--passes", "2")])
def test_two_ranks_are_one(ranks, encoder, demo_folder, cached):
    line, heads = measured(encoder, demo_folder, "--lr", "30,100", *cached)
    for found, weight in ranks(2, on_this_rank, encoder, demo_folder, cached):
        torch.testing.assert_close(weight, heads.weight, rtol=1e-4, atol=1e-6)
        assert found == line["heads"]


@pytest.mark.needs("sklearn")
def test_within_a_point_of_logistic_regression(encoder, tmp_path):
    """200 validation images of ten classes; the same penalty, converged."""
    from sklearn.linear_model import LogisticRegression

    draw_demo(tmp_path / "demo", seed=1, train_per_class=40, val_per_class=20)
    network = load_encoder(encoder)
    tables = []
    for split in ("train", "val"):
        source = open_source(str(tmp_path / "demo" / split))
        loader = inputs.open_evaluation_loader(
            source, ViewSpec(size=16, color="exact"), batch_size=200, backend="pil", workers=0
        )
        tables.append(linear_features.centre_features(network, loader, np.arange(len(source)), RUNTIME))
    (train, train_labels), (val, val_labels) = ((rows.float(), labels) for rows, labels in tables)
    centre, spread = train.mean(0), train.std(0) + 1e-6
    train, val = ((rows - centre) / spread for rows in (train, val))
    decay = 0.01
    heads = LinearHeads(train.shape[1], 10, [0.3], [decay], "sgd")
    for step in range(300):
        heads.step(train, train_labels, 1 - step / 300)
    reference = LogisticRegression(C=1 / (decay * len(train)), max_iter=2000)
    reference.fit(train.numpy(), train_labels.numpy())
    expected = 100 * reference.score(val.numpy(), val_labels.numpy())
    assert heads.accuracy(val, val_labels)[0][0] == pytest.approx(expected, abs=1)
    assert 15 < expected < 95


def test_mistakes_are_one_sentence(encoder, demo_folder, tmp_path):
    def error(*more):
        paths = ("--train", demo_folder / "train", "--val", demo_folder / "val", "--out", tmp_path / "out")
        found = refused("evaluate", "linear", encoder, *paths, *ALONE, *more)
        assert not (tmp_path / "out").exists()
        return found

    found = error()
    assert (found.code, found.key) == ("batch-too-large", "--batch-size")
    assert "4096 is more than the 80 images" in str(found)
    assert "--batch-size 64" in str(found)
    assert error("--lr", "0.1,fast").code == "no-number"
    assert error("--lr", "0").code == "no-number"
    assert error("--weight-decay", "-1").code == "no-number"
    assert error("--passes", "3").code == "passes-uncached"
    assert error("--epochs", "0").key == "--epochs"
