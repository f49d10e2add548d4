#!/usr/bin/env bash
# torchvision's builders of detection and segmentation models take any keyword and drop those that they do not know,
# while its other models raise TypeError. norm_layer is one of them, which resnet50 takes: asked for another norm, the
# detector trains with BatchNorm2d. So is a misspelt threshold.
#
# Needs Python 3.11 or later; installs torch 2.14.1 and torchvision 0.29.1 into a temporary folder (PY=PYTHON uses one
# that has them already, TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while
# torchvision behaves as described. Seen with these versions on a CPU:
#   torch 2.14.1, torchvision 0.29.1
#   resnet50(nonsense=1): TypeError: ResNet.__init__() got an unexpected keyword argument 'nonsense'
#   nonsense=1 is accepted by 12 of 12 builders of torchvision.models.detection
#   nonsense=1 is accepted by 6 of 6 builders of torchvision.models.segmentation
#   resnet50(norm_layer=InstanceNorm2d): norms {'InstanceNorm2d'}
#   fasterrcnn_resnet50_fpn(norm_layer=InstanceNorm2d, box_score_threshold=0.5): norms {'BatchNorm2d'}, threshold 0.05
# Way round it: read the norms and thresholds back from the model that was built.
set -euo pipefail
if [ -z "${PY:-}" ]; then
  folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"; PY=$folder/venv/bin/python
  "$PY" -m pip install -q ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.14.1 torchvision==0.29.1
fi
"$PY" - <<'P'
import sys

import torch
import torchvision
from torchvision import models

print(f"torch {torch.__version__}, torchvision {torchvision.__version__}")


def norms(model):
    return {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("Norm2d")}


held = False
try:
    models.resnet50(nonsense=1)
except TypeError as error:
    print(f"resnet50(nonsense=1): TypeError: {error}")
    held = True
# Without memory for the weights: only the call's arguments matter here.
with torch.device("meta"):
    for family in (models.detection, models.segmentation):
        names = models.list_models(module=family)
        accepted = 0
        for name in names:
            try:
                models.get_model(name, weights=None, weights_backbone=None, nonsense=1)
                accepted += 1
            except TypeError as error:
                print(f"{name}: TypeError: {error}")
        print(f"nonsense=1 is accepted by {accepted} of {len(names)} builders of {family.__name__}")
        held &= accepted == len(names)
    norm = torch.nn.InstanceNorm2d
    plain = models.resnet50(norm_layer=norm)
    detector = models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, norm_layer=norm, box_score_threshold=0.5
    )
threshold = detector.roi_heads.score_thresh
print(f"resnet50(norm_layer=InstanceNorm2d): norms {norms(plain)}")
print(
    "fasterrcnn_resnet50_fpn(norm_layer=InstanceNorm2d, box_score_threshold=0.5): "
    f"norms {norms(detector)}, threshold {threshold}"
)
held &= norms(plain) == {"InstanceNorm2d"} and norms(detector) == {"BatchNorm2d"} and threshold == 0.05
sys.exit(0 if held else 1)
P
