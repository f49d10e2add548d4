"""Comparison of two run folders, on made-up files."""

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.same_weights import compare, tensors_of

STEPS = torch.tensor(40)
WEIGHT = torch.tensor([[1.0, -0.0], [torch.nan, 4.0]])


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes a run folder's two files with the given weight and returns their tensors."""

    def tensors(name, weight, **momentum):
        folder = tmp_path / name
        folder.mkdir()
        optimizer = {"param_groups": [{"lr": 0.1}], "state": {0: {"momentum_buffer": WEIGHT, **momentum}}}
        torch.save({"model": {"weight": weight, "steps": STEPS}, "optimizer": optimizer}, folder / "checkpoint.pt")
        save_file({"weight": WEIGHT}, folder / "encoder.safetensors")
        return tensors_of(folder)

    return tensors


def test_each_tensor_is_compared_and_equal_bits_are_identical(run_folder):
    assert compare(run_folder("one", WEIGHT), run_folder("other", WEIGHT.clone())) == {
        "checkpoint.pt/model/weight": None,
        "checkpoint.pt/model/steps": None,
        "checkpoint.pt/optimizer/state/0/momentum_buffer": None,
        "encoder.safetensors/weight": None,
    }


@pytest.mark.parametrize(
    "weight",
    [
        torch.tensor([[1.0, -0.0], [torch.nan, 4.5]]),
        # The sign of a zero alone.
        torch.tensor([[1.0, 0.0], [torch.nan, 4.0]]),
        WEIGHT[:, :1],
        WEIGHT.double(),
    ],
)
def test_the_tensor_that_differs_is_named(run_folder, weight):
    found = compare(run_folder("one", WEIGHT), run_folder("other", weight))
    assert [name for name, difference in found.items() if difference] == ["checkpoint.pt/model/weight"]


def test_a_missing_tensor_differs_on_either_side(run_folder):
    less, more = run_folder("less", WEIGHT), run_folder("more", WEIGHT, step=STEPS)
    for found in (compare(less, more), compare(more, less)):
        differing = [name for name, difference in found.items() if difference]
        assert differing == ["checkpoint.pt/optimizer/state/0/step"]


def test_the_difference_is_the_largest():
    before, after = {"w": torch.tensor([1.0, 2.0, 3.0])}, {"w": torch.tensor([1.0, 2.5, 2.75])}
    assert compare(before, after)["w"].endswith(" 0.5")
