"""Transfer to object detection: images with boxes, detectors around an encoder, training, average precision."""
