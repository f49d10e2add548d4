"""Checkpoints as other projects write them, around a torchvision ResNet; decoys hold other weights."""

import argparse
import copy
import hashlib

import torch
import torchvision
from torch import nn

from fastsiam.models.encoder import build_encoder
from fastsiam.run.start_weights import start_weights
from fastsiam.runtime.distributed import World

RESNET = ("model.encoder=resnet18", "model.stem=imagenet", "model.width=null")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def loaded(config):
    """The encoder of a config with its weights, as `train.opened` has it."""
    encoder = build_encoder(config.model.encoder, config.model.stem, config.model.width, False).eval()
    weights = start_weights(config, World())
    weights.load_into(encoder)
    return encoder, weights


def resnet18(seed):
    """A ResNet-18 whose batch norms have seen something."""
    torch.manual_seed(seed)
    model = torchvision.models.resnet18()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 2)
            layer.weight.data.uniform_(0.5, 1.5)
    return model.eval()


def features(model, images):
    """Pooled features [B, 512] of a torchvision ResNet."""
    headless = copy.deepcopy(model)
    headless.fc = nn.Identity()
    return headless.eval()(images)


def body(model):
    return {name: value for name, value in model.state_dict().items() if not name.startswith("fc.")}


def under(prefix, tensors):
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def mlp(prefix, *places):
    return {f"{prefix}{place}.weight": torch.ones(4, 4) for place in places}


def _optimizer():
    return {"state": {0: {"momentum_buffer": torch.ones(64, 3, 7, 7)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


def simsiam_authors(model, other):
    state = under("module.encoder.", body(model)) | mlp("module.encoder.fc.", 0, 1, 3, 4, 6, 7)
    state |= mlp("module.predictor.", 0, 1, 3)
    return {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": _optimizer()}


def moco(model, other):
    # Its key encoder follows by momentum.
    state = under("module.encoder_k.", body(other)) | under("module.encoder_q.", body(model))
    state |= mlp("module.encoder_q.fc.", 0, 2) | mlp("module.encoder_k.fc.", 0, 2)
    state |= {"module.queue": torch.ones(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)}
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": _optimizer()}


def swav(model, other):
    return under("module.", body(model)) | mlp("module.projection_head.", 0, 1, 3) | mlp("module.", "prototypes")


def lucidrains_byol(model, other):
    state = under("net.", model.state_dict()) | under("online_encoder.net.", model.state_dict())
    state |= mlp("online_encoder.projector.", 0, 1, 3) | mlp("online_predictor.", 0, 1, 3)
    return state | under("target_encoder.net.", other.state_dict())


def dino(model, other):
    def network(trained):
        return under("module.backbone.", body(trained)) | mlp("module.head.mlp.", 0, 2, 4)

    arguments = argparse.Namespace(arch="resnet18", lr=0.03)
    found = {"student": network(other), "teacher": network(model), "optimizer": _optimizer(), "epoch": 100}
    return found | {"args": arguments, "dino_loss": {"center": torch.zeros(1, 8)}}


def lightly_example(model, other):
    """The module of lightly's SimSiam example, from its own classes."""
    from lightly.models.modules import SimSiamPredictionHead, SimSiamProjectionHead

    class SimSiam(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(*list(copy.deepcopy(model).children())[:-1])
            self.projection_head = SimSiamProjectionHead(512, 32, 16)
            self.prediction_head = SimSiamPredictionHead(16, 8, 16)

    return SimSiam().state_dict()


def lightly_lightning(model, other):
    """A .ckpt of Lightning around the names of lightly's benchmarks, with options of a command line."""
    state = under("backbone.", body(model)) | mlp("projection_head.layers.", 0, 1, 3) | mlp("", "online_classifier")
    return {
        "epoch": 99, "global_step": 100, "pytorch-lightning_version": "2.4.0", "state_dict": state, "loops": {},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None}},
        "optimizer_states": [_optimizer()], "lr_schedulers": [{"last_epoch": 99}],
        "hyper_parameters": argparse.Namespace(batch_size_per_device=128, num_classes=1000),
    }  # fmt: skip


def solo_learn(model, other):
    # Its order is that of the attributes; the momentum copy comes first where a method makes it first.
    state = under("momentum_backbone.", body(other)) | under("backbone.", body(model)) | mlp("", "classifier")
    return {"epoch": 400, "global_step": 1, "state_dict": state | mlp("projector.", 0, 1, 3), "callbacks": {}}


def mmpretrain(model, other):
    state = under("backbone.", body(model)) | mlp("neck.mlp.", "fc0", "bn0") | mlp("head.predictor.", "fc0")
    return {"meta": {"mmpretrain_version": "1.0.0", "cfg": "model = dict()"}, "state_dict": state}


def compiled_in_ddp(model, other):
    return {"model": under("module._orig_mod.", model.state_dict()), "epoch": 3}


def timm_train(model, other):
    return {
        "epoch": 9, "arch": "resnet18", "state_dict": model.state_dict(), "state_dict_ema": other.state_dict(),
        "version": 2, "args": argparse.Namespace(model="resnet18"), "metric": 70.1, "optimizer": _optimizer(),
    }  # fmt: skip


def torchvision_itself(model, other):
    return model.state_dict()


# By project: the contents of its file, and the prefix under which the weights lie.
FORMATS = {
    "torchvision": (torchvision_itself, ""),
    "SimSiam's authors": (simsiam_authors, "state_dict.module.encoder."),
    "MoCo": (moco, "state_dict.module.encoder_q."),
    "SwAV": (swav, "module."),
    "BYOL of lucidrains": (lucidrains_byol, "net."),
    "DINO": (dino, "teacher.module.backbone."),
    "lightly's example": (lightly_example, "backbone."),
    "lightly in Lightning": (lightly_lightning, "state_dict.backbone."),
    "solo-learn": (solo_learn, "state_dict.backbone."),
    "mmpretrain": (mmpretrain, "state_dict.backbone."),
    "compiled in DDP": (compiled_in_ddp, "model.module."),
    "timm's train.py": (timm_train, "state_dict."),
}
