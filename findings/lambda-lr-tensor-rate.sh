#!/usr/bin/env bash
# A learning rate given to a torch optimizer as a tensor, as torch's tutorial on compiled optimizers does, is one tensor
# for all parameter groups. LambdaLR with a function for each group fills it in place group by group: all groups train
# with the last one's rate, without a warning. A group meant to keep its rate takes the schedule away from the others.
#
# Needs Python 3.11 or later; installs torch 2.14.1 into a temporary folder (PY=PYTHON uses one that has torch already,
# TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while torch behaves as described.
# Seen with torch 2.14.1 on a CPU, two groups, functions 0.5 ** epoch and 1:
#   torch 2.14.1
#   lr=0.1: rates after three epochs [0.0125, 0.1], weights moved by [0.175, 0.3]
#   lr=tensor(0.1): rates after three epochs [0.1, 0.1], weights moved by [0.3, 0.3]
# Way round it: a tensor of its own for each group, {"params": ..., "lr": torch.tensor(0.1)}.
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


def trained(rate):
    """Rates of the two groups, and how far a constant gradient of 1 moved the weights of each, after three epochs."""
    weights = [torch.nn.Parameter(torch.zeros(())) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 1.0])
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.ones(())
        optimizer.step()
        schedule.step()
    rates = [round(float(group["lr"]), 4) for group in optimizer.param_groups]
    moved = [round(-weight.item(), 4) for weight in weights]
    return rates, moved


found = {}
for name, rate in (("0.1", 0.1), ("tensor(0.1)", torch.tensor(0.1))):
    found[name] = trained(rate)
    print(f"lr={name}: rates after three epochs {found[name][0]}, weights moved by {found[name][1]}")
right, wrong = ([0.0125, 0.1], [0.175, 0.3]), ([0.1, 0.1], [0.3, 0.3])
sys.exit(0 if found["0.1"] == right and found["tensor(0.1)"] == wrong else 1)
P
