#!/usr/bin/env bash
# Triton 3.6's interpreter (TRITON_INTERPRET=1), the one of torch 2.11, fails with NumPy 2.4 wherever a kernel uses a
# runtime integer as a Python one, as in range(count): NumPy no longer converts arrays of one element to scalars.
#
# Seen on 2026-11-28, Python 3.11, x86-64 without a GPU:
#   triton 3.6.0, numpy 2.3.5, torch 2.11.0+cu130: sum 8
#   triton 3.6.0, numpy 2.4.6, torch 2.11.0+cu130: TypeError: only 0-dimensional arrays can be converted to Python scalars
#   triton 3.7.0, numpy 2.4.6: sum 8 (seen with torch 2.14.1)
# Exits with 1 where the first two no longer hold.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.11.0 triton==3.6.0 numpy==2.3.5
cat > "$work/total.py" <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import numpy, torch, triton, triton.language as tl


@triton.jit
def total(x, out, count):
    found = 0.0
    for index in range(count):
        found += tl.load(x + index)
    tl.store(out, found)


x, out = torch.ones(8), torch.zeros(1)
try:
    total[(1,)](x, out, 8)
    said = f"sum {out.item():g}"
except Exception as error:
    cause = error.__cause__ or error
    said = f"{type(cause).__name__}: {cause}"
print(f"triton {triton.__version__}, numpy {numpy.__version__}, torch {torch.__version__}: {said}")
PY
"$work/venv/bin/python" "$work/total.py" | tee "$work/said"
"$work/venv/bin/pip" install -q numpy==2.4.6
"$work/venv/bin/python" "$work/total.py" | tee -a "$work/said"
grep -q 'numpy 2.3.5.*: sum 8$' "$work/said" && grep -q 'numpy 2.4.6.*: TypeError: only 0-dimensional' "$work/said"
