#!/usr/bin/env bash
# NumPy: SeedSequence joins the 32-bit words of all integers that it is given. Where one of them needs two words, the next
# ones move up, and other integers give the same words: (0, 2**32 + 1, 0) seeds as (0, 1, 1) does, and so do generators
# of a seed, a step and a rank, or of a seed and an image, once one of them exceeds 32 bits. Zeros at the end count for
# nothing either: (7,) seeds as (7, 0) does.
#
# Needs Python 3.11 or later; installs NumPy 2.4.6 into a temporary folder (PY=PYTHON uses one that has NumPy). Exits 0
# while NumPy behaves as described. Seen with NumPy 2.4.6:
#   numpy 2.4.6
#   (0, 4294967297, 0) and (0, 1, 1): same numbers True
#   (7,) and (7, 0): same numbers True
#   (0, 1, 0) and (0, 1, 1): same numbers False
# Way round it: give each integer a fixed number of words, or keep all of them below 2**32 and of one number.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q numpy==2.4.6
fi
"$PY" - <<'P'
import sys

import numpy as np

print("numpy", np.__version__)
PAIRS = [((0, 2**32 + 1, 0), (0, 1, 1), True), ((7,), (7, 0), True), ((0, 1, 0), (0, 1, 1), False)]
as_described = True
for one, other, expected in PAIRS:
    drawn = [np.random.default_rng(np.random.SeedSequence(place)).random(4) for place in (one, other)]
    same = bool((drawn[0] == drawn[1]).all())
    print(f"{one} and {other}: same numbers {same}")
    as_described &= same == expected
sys.exit(0 if as_described else 1)
P
