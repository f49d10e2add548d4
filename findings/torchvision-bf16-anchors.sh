#!/usr/bin/env bash
# Under torch.autocast in bf16, torchvision's detectors keep the coordinates of anchors and boxes in bf16. AnchorGenerator
# takes the dtype of the feature maps for its anchors, and BoxCoder that of the predicted offsets for the boxes it
# decodes. bf16 has 8 bits: beyond 512 px its numbers are 4 apart, beyond 1,024 px 8. Neither training nor evaluation says so.
#
# Needs Python 3.11 or later; installs torch 2.14.1 and torchvision 0.29.1 into a temporary folder (PY=PYTHON uses one
# that has them already, TORCH_INDEX=URL another package index, such as that of the CPU builds). Exits 0 while
# torchvision behaves as described. Seen with these versions:
#   torchvision 0.29.1+cu130: anchors of an image of 800 x 1333 px in torch.bfloat16, up to 4 px from those in fp32
#   a box [801, 603, 1001, 763] with offsets of 0 is decoded to [800, 604, 1000, 764]
# Way round it: hooks that cast the feature maps before AnchorGenerator, and the offsets before BoxCoder, to fp32.
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
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn
from torchvision.models.detection._utils import BoxCoder

model = fasterrcnn_mobilenet_v3_large_320_fpn(weights=None, weights_backbone=None, min_size=800, max_size=1333).eval()
anchors = []
model.rpn.anchor_generator.register_forward_hook(lambda module, given, found: anchors.append(found[0]))
image = torch.zeros(3, 800, 1333)
with torch.no_grad():
    model([image])
    with torch.autocast("cpu", torch.bfloat16):
        model([image])
plain, half = anchors
off = (plain - half.float()).abs().max().item()
print(f"torchvision {torchvision.__version__}: anchors of an image of 800 x 1333 px in {half.dtype}, "
      f"up to {off:g} px from those in fp32")
box = torch.tensor([[801.0, 603.0, 1001.0, 763.0]])
decoded = BoxCoder((1, 1, 1, 1)).decode_single(torch.zeros(1, 4, dtype=torch.bfloat16), box)
print(f"a box {[int(x) for x in box[0]]} with offsets of 0 is decoded to {[int(x) for x in decoded[0]]}")
sys.exit(not (half.dtype == torch.bfloat16 and off >= 4 and (decoded.float() - box).abs().max() >= 1))
P
