#!/usr/bin/env bash
# A model in training mode is exported to ONNX half in training: Dropout is active, batch normalization takes its
# running statistics. This is neither of the model's two modes. torch.onnx.export's `training` argument changes nothing;
# its documentation says to set the mode of the model instead, and that gives this file. The warning on export does not
# say which parts are in training.
#
# Needs Python 3.11 or later; installs torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0 into a temporary
# folder (PY=PYTHON uses one that has them already, TORCH_INDEX=URL another index for torch, such as that of the CPU
# builds). Exits 0 while torch behaves as described. Seen with these versions on a CPU:
#   torch 2.14.1, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0
#   batch norm, model.train(): largest difference to torch in training 1.7, in evaluation 0.0
#   batch norm, model.train(), training=TRAINING: largest difference to torch in training 1.7, in evaluation 0.0
#   batch norm, model.train(), dynamo=False, training=TRAINING: largest difference to torch in training 0.0, in
#   evaluation 1.7
#   dropout, model.train(): zeros among 1,000 ones 481 (another number each time)
# The old exporter (dynamo=False) with training=TRAINING is right. For an evaluation file call model.eval() first.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${PY:-}" ]; then
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1
  "$PY" -m pip install -q numpy onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
fi
"$PY" - "$folder/model.onnx" <<'P'
import contextlib
import copy
import io
import sys
import warnings
from importlib.metadata import version

import numpy as np
import onnxruntime
import torch

print(", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "onnxruntime")))
warnings.simplefilter("ignore")
path = sys.argv[1]
TRAINING = torch.onnx.TrainingMode.TRAINING


def exported(model, batch, **options):
    """What ONNX Runtime answers for `batch` from a file of `model` in training mode."""
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(copy.deepcopy(model).train(), (batch,), path, **options)
    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]


torch.manual_seed(0)
norm = torch.nn.BatchNorm1d(4)
batch = torch.arange(32.0).reshape(8, 4) / 16
expected = {
    "training": copy.deepcopy(norm).train()(batch).detach().numpy(),
    "evaluation": copy.deepcopy(norm).eval()(batch).detach().numpy(),
}
nearest = []
for options, text in (
    ({}, ""),
    ({"training": TRAINING}, ", training=TRAINING"),
    ({"training": TRAINING, "dynamo": False}, ", dynamo=False, training=TRAINING"),
):
    found = exported(norm, batch, **options)
    far = {mode: float(np.abs(found - values).max()) for mode, values in expected.items()}
    print(
        f"batch norm, model.train(){text}: largest difference to torch "
        f"in training {far['training']:.1f}, in evaluation {far['evaluation']:.1f}"
    )
    nearest.append(min(far, key=far.get) if min(far.values()) < 1e-4 < 0.5 < max(far.values()) else None)
zeros = int((exported(torch.nn.Dropout(0.5), torch.ones(1000)) == 0).sum())
print(f"dropout, model.train(): zeros among 1,000 ones {zeros}")
sys.exit(0 if nearest == ["evaluation", "evaluation", "training"] and 400 < zeros < 600 else 1)
P
