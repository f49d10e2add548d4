"""transformers: a folder that ResNetModel and AutoImageProcessor load; transformers is not needed to write it."""

from pathlib import Path

from safetensors.torch import save
from torch import nn

from fastsiam.errors import UserError
from fastsiam.export.feeding import Feeding, weights
from fastsiam.export.output import as_json, put_folder
from fastsiam.export.resnet import Part, others, part_of, resnet_name, shape

# Pillow's numbers, which transformers takes.
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}


def write(encoder: nn.Module, out: Path) -> str:
    """Writes the folder; returns the code that loads it. Its pooler_output is [B, D, 1, 1]."""
    name = resnet_name(encoder, "huggingface")
    numbers = shape(encoder)
    if numbers.groups > 1 or numbers.width_per_group != 64:
        text = f"ENCODER: ResNetModel of transformers has no {name}, only ResNets of one group of width 64"
        raise UserError(f"{text}; {others(encoder.description)}", "no-counterpart")
    state = {transformers_name(part_of(key)): value for key, value in weights(encoder).items()}
    # Without the metadata "fastsiam", which would promise our names.
    files = {"config.json": as_json(_config(encoder, numbers)), "model.safetensors": save(state, {"format": "pt"})}
    processor = _processor(Feeding.of(encoder))
    if processor:
        files["preprocessor_config.json"] = as_json(processor)
    put_folder(out, files)
    loads = [f"model = ResNetModel.from_pretrained({str(out)!r})"]
    loads += [f"processor = AutoImageProcessor.from_pretrained({str(out)!r})"] if processor else []
    return f"from transformers import AutoImageProcessor, ResNetModel; {'; '.join(loads)}"


def transformers_name(part: Part) -> str:
    """`encoder.stages.0.layers.0.layer.0.normalization.weight` for torchvision's `layer1.0.bn1.weight`."""
    if part.stage is None:
        module = "embedder.embedder"
    else:
        inner = f"layer.{part.convolution - 1}" if part.convolution else "shortcut"
        module = f"encoder.stages.{part.stage - 1}.layers.{part.block}.{inner}"
    return f"{module}.{'normalization' if part.is_norm else 'convolution'}.{part.tensor}"


def _config(encoder, numbers):
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": numbers.widths,
        "depths": numbers.depths,
        "layer_type": "bottleneck" if numbers.is_bottleneck else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        # The stride is in the 3x3 convolution.
        "downsample_in_bottleneck": False,
        "fastsiam": encoder.description,
    }


def _processor(feeding):
    if feeding.unknown:
        return None
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": feeding.resize},
        "resample": _RESAMPLE[feeding.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": feeding.size, "width": feeding.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": feeding.mean,
        "image_std": feeding.std,
    }
