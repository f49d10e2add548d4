#!/usr/bin/env bash
# Importing any part of torchvision, its transforms for example, imports torch's compiler: torch._dynamo and the modules
# below it, which `import torch` leaves out until something is compiled. torchvision/__init__.py imports all its models,
# a model imports the operator roi_align, and that one asks torch._dynamo whether it could be compiled. Each process of
# a DataLoader that is started by spawn or forkserver pays for it again.
#
# Needs Python 3.11 or later; installs torch 2.14.1 and torchvision 0.29.1 into a temporary folder (PY=PYTHON uses one
# that has them already, TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while
# torchvision behaves as described. Seen with these versions on two cores of an AMD EPYC, files in the page cache:
#   torch 2.14.1+cu130, torchvision 0.29.1+cu130
#   torch: 0 modules of torch._dynamo among 1200, 1.3 s
#   torch, torchvision.transforms: 96 modules of torch._dynamo among 2293, 2.4 s
# Way round it for worker processes: a forkserver that has imported torchvision before it forks them,
# multiprocessing.get_context("forkserver").set_forkserver_preload(["torchvision"]).
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1 torchvision==0.29.1
fi
"$PY" -c 'import torch, torchvision; print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")'
count() {
  "$PY" - "$1" <<'P'
import importlib, sys, time

names = sys.argv[1].split(", ")
began = time.perf_counter()
for name in names:
    importlib.import_module(name)
seconds = time.perf_counter() - began
found = sum(name.startswith("torch._dynamo") for name in sys.modules)
print(f"{sys.argv[1]}: {found} modules of torch._dynamo among {len(sys.modules)}, {seconds:.1f} s", file=sys.stderr)
print(found)
P
}
# The first turn fills the page cache.
count "torch, torchvision.transforms" >/dev/null 2>&1
alone=$(count "torch")
both=$(count "torch, torchvision.transforms")
[ "$alone" -eq 0 ] && [ "$both" -gt 0 ]
