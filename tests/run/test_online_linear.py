"""The online linear classifier of a run: pretraining without a trace of it, its accuracy, resumption and ranks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsiam.evaluate.online_linear import RATE, OnlineLinear
from fastsiam.train import main
from tests.support.runs import lines, numbers, record, refused_unwritten, train_here, weights

ON = "evaluate.online_linear=true"


def online(folder):
    return [line for line in lines(folder) if line["kind"] == "online_linear"]


def classifier(folder):
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["online_linear"]
    return saved["heads"]


def test_pretraining_is_the_same_to_the_bit_and_the_console_names_the_number(tiny, tmp_path, capsys):
    for name, *more in (("off",), ("on", ON)):
        assert main(["--config", "quickstart", *tiny(f"run.name={name}", *more)]) == 0
    said = capsys.readouterr().out
    torch.testing.assert_close(weights(tmp_path / "runs/on"), weights(tmp_path / "runs/off"), rtol=0, atol=0)
    ours = [line for line in record(tmp_path / "runs/on") if line["kind"] != "online_linear"]
    assert ours == record(tmp_path / "runs/off")
    found = online(tmp_path / "runs/on")
    # 10 steps an epoch with a line each, and a kNN after each epoch.
    assert [line["step"] for line in found if "train_top1" in line] == list(range(1, 21))
    assert [line["step"] for line in found if "val_top1" in line] == [10, 20]
    assert "online linear (features of the training views)" in said
    assert f"linear    {found[-1]['val_top1']:.2f} % of data.val" in said


def test_it_is_sgd_on_centred_unit_features_of_all_views(tiny, tmp_path, monkeypatch):
    """A loop with autograd over the features and labels of each step."""
    seen, step = [], OnlineLinear.step

    def watched(self, features, labels, scale):
        seen.append((features.clone(), labels.clone(), scale, self._heads.weight[0].clone()))
        step(self, features, labels, scale)

    monkeypatch.setattr(OnlineLinear, "step", watched)
    train_here(tiny(ON, "train.max_steps=12", "views.count=3"))
    features, _, _, first = seen[0]
    layer = torch.nn.Linear(features.shape[1], 10)
    with torch.no_grad():
        layer.weight.copy_(first)
        layer.bias.zero_()
    sgd, losses, mean = torch.optim.SGD(layer.parameters(), RATE, 0.9), [], 0
    for number, (features, labels, scale, _) in enumerate(seen, 1):
        assert (len(features), features.requires_grad) == (24, False)
        unit = F.normalize(features.float(), dim=1)
        share = max(0.1, 1 / number)
        mean = (1 - share) * mean + share * unit.mean(0)
        loss = F.cross_entropy(layer(F.normalize(unit - mean, dim=1)), torch.cat([labels] * 3))
        sgd.zero_grad()
        loss.backward()
        sgd.param_groups[0]["lr"] = RATE * scale
        sgd.step()
        losses.append(loss.item())
    assert [scale for *_, scale, _ in seen][:2] == [1, pytest.approx((1 + np.cos(np.pi / 20)) / 2)]
    found = [line["loss"] for line in online(tmp_path / "runs/run") if "loss" in line]
    np.testing.assert_allclose(found, losses, rtol=1e-4)
    torch.testing.assert_close(classifier(tmp_path / "runs/run")["weight"][0], layer.weight.data, rtol=1e-4, atol=1e-5)


def test_stopped_between_two_log_lines_it_goes_on_exactly(tiny, tmp_path):
    slow = (ON, "train.log_every_steps=4")
    train_here(tiny("run.name=whole", *slow))
    stopped, _ = train_here(tiny("run.name=stopped", *slow), stop_after=6)
    assert (stopped.status, stopped.step) == ("preempted", 6)
    assert main(["--config", "quickstart", *tiny("run.name=stopped", *slow)]) == 0
    one, other = (tmp_path / "runs" / name for name in ("whole", "stopped"))
    torch.testing.assert_close(classifier(one), classifier(other), rtol=0, atol=0)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)
    fields = ("step", "loss", "train_top1", "val_top1")
    kept = [[{key: line.get(key) for key in fields} for line in online(folder)] for folder in (one, other)]
    # The stop has a line of its own only where one was due.
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tiny, ranks, tmp_path):
    """Bit-equal between ranks; the encoder's rounding differs from that of one rank."""
    more = (ON, "train.epochs=1")
    train_here(tiny("run.name=one", *more))
    results = ranks(2, train_here, tiny("run.name=two", *more))
    assert [result.status for result, _ in results] == ["done", "done"]
    one, two = (numbers(tmp_path / "runs" / name, "online_linear", "step") for name in ("one", "two"))
    assert one.tolist() == two.tolist()
    first = [online(tmp_path / "runs" / name)[0] for name in ("one", "two")]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-4)
    heads = [classifier(tmp_path / "runs" / name)["weight"] for name in ("one", "two")]
    torch.testing.assert_close(*heads, rtol=0.05, atol=0.02)


def test_images_without_labels_are_refused_in_one_sentence(tiny, tmp_path, capsys, photos):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in photos.rglob("*.jpg"):
        (flat / path.name).write_bytes(path.read_bytes())
    error = refused_unwritten(capsys, tmp_path, *tiny(ON, f"data.train={flat}", "data.val=null"))
    assert (error.code, error.key) == ("no-labels", "evaluate.online_linear")
    error = refused_unwritten(capsys, tmp_path, *tiny(ON, "data.backend=synthetic", "data.val=null"))
    assert (error.code, error.key) == ("no-labels", "evaluate.online_linear")
