"""A runtime decides once, is in force inside its block, and puts back what it has set."""

import pytest
import torch

from fastsiam.config.schema import TrainConfig
from fastsiam.runtime import malloc
from fastsiam.runtime.device import spinning_notice
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime


def chosen(before=None, **train):
    return Runtime.of(TrainConfig(epochs=1, batch_size=8, device="cpu", **train), before=before)


@pytest.mark.parametrize(
    ("precision", "before", "dtype"),
    [("fp16", {"dtype": "fp32"}, "fp16"), ("auto", {"dtype": "fp16"}, "fp16"), ("auto", {}, "bf16")],
)
def test_auto_keeps_the_precision_of_a_checkpoint(monkeypatch, precision, before, dtype):
    monkeypatch.setattr("fastsiam.runtime.runtime.multiplies_bf16", lambda device: True)
    monkeypatch.setattr("fastsiam.runtime.device.multiplies_bf16", lambda device: True)
    assert chosen(before, precision=precision).names["dtype"] == dtype


def test_bf16_of_a_checkpoint_is_not_kept_where_the_hardware_lacks_it(monkeypatch):
    monkeypatch.setattr("fastsiam.runtime.runtime.multiplies_bf16", lambda device: False)
    monkeypatch.setattr("fastsiam.runtime.device.multiplies_bf16", lambda device: False)
    assert chosen({"dtype": "bf16"}).names["dtype"] == "fp32"


def test_the_exit_puts_back_what_the_entry_has_set(monkeypatch):
    calls = []
    for name in ("keep_freed", "give_back_freed"):
        monkeypatch.setattr(malloc, name, lambda name=name: calls.append(name) or True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    random = torch.get_rng_state()
    runtime = Runtime.of(TrainConfig(epochs=1, batch_size=8, device="cpu", compile="on"), World(size=2))
    # monkeypatch would leave torch's option deleted: its modules of options keep none in __dict__.
    with torch._dynamo.config.patch(optimize_ddp=True):
        with runtime:
            assert calls == ["keep_freed"]
            assert (torch.backends.cudnn.benchmark, torch._dynamo.config.optimize_ddp) == (False, False)
            torch.manual_seed(12345)
        assert (torch.backends.cudnn.benchmark, torch._dynamo.config.optimize_ddp) == (True, True)
    assert calls == ["keep_freed", "give_back_freed"]
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("threads", "policy", "warned"), [(2, None, True), (2, "PASSIVE", False), (1, None, False)])
def test_threads_that_spin_are_told(threads, policy, warned, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    notice = spinning_notice(torch.device("cpu"))
    assert (notice is not None and notice.code == "threads-spin") == warned
    assert spinning_notice(torch.device("cuda")) is None
