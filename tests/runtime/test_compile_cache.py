"""What torch keeps of compiled graphs between processes is not used for other kernels."""

import shutil

import numpy as np
import pytest

from tests.support.processes import REPOSITORY, run_python

COMPILED_LOSS = """
import sys, torch
from torch import nn
from torch._dynamo.utils import counters
from fastsiam.runtime.compile import Compiled
from fastsiam.kernels import cosine_triton

class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 6))

    def forward(self, x):
        return cosine_triton.fused([x * self.scale], [x.flip(0).unsqueeze(0)])

device = "cuda" if torch.cuda.is_available() else "cpu"
loss = Loss().to(device)
compiled = Compiled(loss)
compiled(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(device)).backward()
print(counters["aot_autograd"]["autograd_cache_hit"], *loss.scale.grad.tolist())
"""


@pytest.mark.slow
@pytest.mark.needs("g++")
def test_an_edited_backward_of_an_operator_is_not_taken_from_the_compile_cache(tmp_path):
    """The gradient of an edited formula, where the forward graph is the same and its compiled form is in the cache."""
    shutil.copytree(REPOSITORY / "fastsiam", tmp_path / "fastsiam", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "loss.py").write_text(COMPILED_LOSS)

    def run():
        done = run_python(
            tmp_path / "loss.py", PYTHONPATH=str(tmp_path), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache")
        )
        assert done.returncode == 0, done.stderr
        hits, *gradient = done.stdout.split()
        return int(hits), np.array(gradient, float)

    (first, gradient), (again, same) = run(), run()
    assert (first, again) == (0, 1)
    assert (gradient == same).all()
    assert abs(gradient).max() > 0.01
    kernel = tmp_path / "fastsiam/kernels/cosine_triton.py"
    formula = "    return grads[: len(p)], z_grads"
    assert formula in kernel.read_text()
    kernel.write_text(kernel.read_text().replace(formula, "    return [2 * g for g in grads[: len(p)]], z_grads"))
    hits, doubled = run()
    np.testing.assert_allclose(doubled, 2 * gradient, rtol=1e-6)
    assert hits == 0
