"""The first lines of a run print what was decided, whatever this machine would decide."""

import pytest
import torch

from fastsiam.run.console import choice_lines
from fastsiam.runtime.distributed import World
from fastsiam.runtime.runtime import Runtime


@pytest.mark.parametrize(
    ("device", "count", "loss"),
    [("cuda", 2, "fused (Triton)"), ("cuda", 4, "in plain torch"), ("cpu", 2, "in plain torch")],
)
def test_the_step_line_is_the_decision(tiny_config, device, count, loss):
    config = tiny_config(f"views.count={count}", "train.precision=auto", "train.compile=auto", "train.device=auto")
    reasons = {"device": "auto: here", "dtype": "auto: as before", "compile": "auto: why"}
    for dtype, name, compiles in ((torch.bfloat16, "bf16", True), (torch.float16, "fp16", False)):
        runtime = Runtime(World(), torch.device(device), dtype, compiles, reasons)
        lines = choice_lines(config, runtime, 80, 0, "a loader", "as chosen", "here", [])
        (step,) = (line for line in lines if line.startswith("step "))
        assert f"channels-last, loss {loss}" in step
        compiled = "on" if compiles else "off"
        assert f"device    {device} (auto: here), {name} (auto: as before), compile {compiled} (auto: why)" in lines
        assert "backend   a loader, as chosen" in lines
