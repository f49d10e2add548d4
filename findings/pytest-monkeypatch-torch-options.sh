#!/usr/bin/env bash
# pytest's monkeypatch.setattr on an option of torch, such as torch._dynamo.config.optimize_ddp, deletes the option when the
# test ends. torch's modules of options answer getattr and keep nothing in __dict__; monkeypatch notes an attribute that is
# not in __dict__ as absent, and its undo calls delattr, by which such a module hides the option. Every later torch.compile
# in the process fails: tests pass alone and fail after others.
#
# Needs Python 3.11 or later; installs torch 2.14.1 and pytest 9.2.0 into a temporary folder (PY=PYTHON uses one that has
# them already, TORCH_INDEX=URL another package index for torch). Exits 0 while they behave as described. Seen:
#   pytest 9.2.0, torch 2.14.1+cu130: optimize_ddp is True
#   after setattr and undo: AttributeError: torch._dynamo.config.optimize_ddp does not exist
#   torch.compile: AttributeError: torch._dynamo.config.optimize_ddp does not exist
# Way round it: torch's own `with torch._dynamo.config.patch(optimize_ddp=False):`.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1
  "$PY" -m pip install -q pytest==9.2.0
fi
"$PY" - <<'P'
import sys

import pytest
import torch
import torch._dynamo.config as config

print(f"pytest {pytest.__version__}, torch {torch.__version__}: optimize_ddp is {config.optimize_ddp}")
patch = pytest.MonkeyPatch()
patch.setattr(config, "optimize_ddp", False)
patch.undo()
gone = fails = False
try:
    print(f"after setattr and undo: {config.optimize_ddp}")
except AttributeError as error:
    gone = True
    print(f"after setattr and undo: AttributeError: {error}")
try:
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    print("torch.compile: works")
except AttributeError as error:
    fails = True
    print(f"torch.compile: AttributeError: {error}")
sys.exit(not (gone and fails))
P
