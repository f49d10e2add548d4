#!/usr/bin/env bash
# torch.optim.SGD(fused=True) under GradScaler: a first step that is skipped, because fp16 gradients overflowed, leaves
# memory that nobody has written as momentum. The next step multiplies it by the momentum factor and moves the weights.
#
# Needs Python 3.11 or later; installs torch 2.14.1 into a temporary folder (PY=PYTHON uses one that has torch already,
# TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while torch behaves as described.
# Seen with torch 2.14.1 on a CPU:
#   torch 2.14.1
#   fused=False: momentum after the skipped step None, after the next one [3.0, 3.0, 3.0, 3.0]; weights finite True
#   fused=True: momentum after the skipped step [nan, nan, nan, nan], after the next one [nan, nan, nan, nan]; weights
#   finite False
# NaN because the script has torch fill new memory with NaN (deterministic mode); without it the values are whatever
# the memory held. Way round it: put zeros into optimizer.state[parameter]["momentum_buffer"] before the first step,
# which leaves every other run as it is to the bit.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1 numpy
fi
"$PY" - <<'P'
import sys

import torch

print("torch", torch.__version__)
torch.use_deterministic_algorithms(True)


def trained(fused):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    momentum = []
    # The first gradient overflows once it is scaled by 2 ** 16, as the first ones of fp16 training do.
    for gradient in (1e35, 1.0):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(3, 4)) * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        buffer = optimizer.state[model.weight].get("momentum_buffer")
        momentum.append(None if buffer is None else buffer[0].tolist())
    return momentum, bool(model.weight.isfinite().all())


found = {fused: trained(fused) for fused in (False, True)}
for fused, ((skipped, following), finite) in found.items():
    print(f"fused={fused}: momentum after the skipped step {skipped}, after the next one {following}; weights finite {finite}")
sys.exit(0 if found[False][1] and not found[True][1] else 1)
P
