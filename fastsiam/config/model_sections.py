"""Sections model and optimizer of a config."""

import os
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fastsiam.config.data_sections import PositiveFloat, Section
from fastsiam.config.encoder_names import check_bottlenecks, check_name, check_options
from fastsiam.errors import UserError

# eta of SimCLR, BYOL and the paper's own linear evaluation.
LARS_TRUST = 0.001


class ModelConfig(Section):
    encoder: str
    """Architecture: a torchvision classifier (resnet50, efficientnet_b0, convnext_tiny, ...), timm:NAME of timm (extra
    `timm`), or cifar_resnetN with N = 6n+2 (He et al., section 4.2). Its classifier is left out."""
    stem: Literal["imagenet", "cifar"]
    """First layers of a ResNet. imagenet: 7x7 with stride 2 and max-pool; cifar: 3x3 with stride 1. Other encoders take
    imagenet, which leaves them as they are."""
    # Below 8 channels oneDNN's channels-last backward writes out of bounds (seen at 4: torch 2.15, AVX2).
    width: Annotated[int, Field(ge=8, multiple_of=8)] | None = None
    """Channels of a cifar_resnet's first stage (16 in He et al.), a multiple of 8; null for torchvision's."""
    zero_init_residual: bool
    """Starts the last batch norm of each residual block at 0, so that the block begins as the identity."""
    bn_statistics: Literal["per_view", "joint"] = "per_view"
    """Images over which batch norm averages. per_view: each view apart, as in SimSiam and BYOL; joint: all views of one
    size together, as in SimCLR and SwAV."""
    fused_pointwise: bool = False
    """Takes the last 1x1 convolution of a ResNet's bottlenecks into the kernels of the batch norms on its two sides:
    fewer bytes and less memory on CUDA in half precision, where other last bits come out; elsewhere no change. For
    ResNet-50 three quarters of a step's time and two thirds of its memory are predicted, and not yet measured."""

    weights: str | None = None
    """Weights that a new run begins with: null (random), a file or run folder, torchvision:NAME (torchvision:DEFAULT)
    or timm:NAME (timm:resnet50.a1_in1k). fastsiam/models/README.md lists the formats."""
    weights_partial: bool = False
    """Lets layers that model.weights does not hold, or holds in another shape, keep their random start."""

    @field_validator("encoder")
    @classmethod
    def known_encoder(cls, name):
        check_name(name)
        return name

    @field_validator("weights")
    @classmethod
    def home_expanded(cls, path):
        if path == "":
            raise UserError("model.weights: the name is empty; set a file, or null for random weights", "empty-name")
        return path and os.path.expanduser(path)

    @model_validator(mode="after")
    def options_of_the_encoder(self):
        check_options(self.encoder, self.stem, self.width, self.zero_init_residual)
        if self.fused_pointwise:
            check_bottlenecks(self.encoder)
        if self.weights_partial and self.weights is None:
            raise UserError(
                "model.weights_partial: true, and there are no model.weights; set model.weights, or false",
                "partial-of-nothing",
            )
        return self


class OptimizerConfig(Section):
    name: Literal["sgd", "lars"]
    """Optimizer. lars (arXiv 1708.03888) is for batches above 1024 and needs other rates, see r50_100ep_b4096.yaml."""
    implementation: Literal["torch", "apex"] = "torch"
    """Library of the optimizer. apex: NVIDIA's FusedSGD, the same mathematics with other last bits, so a run keeps
    it."""
    base_lr: PositiveFloat
    """Learning rate for a batch of 256; the rate used is base_lr * batch_size / 256."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of SGD and of LARS."""
    weight_decay: Annotated[float, Field(ge=0)]
    """Weight decay. sgd: on all parameters, batch norm and biases included (paper); lars: not on those of one
    dimension."""
    lars_trust: PositiveFloat = LARS_TRUST
    """LARS moves a tensor w by at most lr * lars_trust * |w|, before momentum; sgd does not use it."""
    lars_vectors: Literal["exempt", "adapted"] = "exempt"
    """Parameters of one dimension under LARS. exempt: neither rescaled nor decayed (SimCLR, BYOL); adapted: as all
    others (SwAV)."""
    schedule: Literal["cosine_per_epoch", "cosine", "constant"]
    """Learning rate over the run. cosine_per_epoch: a cosine to 0 that changes between epochs (the paper's code);
    cosine: the same, changed at each step; constant."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the run in which the learning rate rises linearly from 0."""
    predictor_lr: Literal["fixed", "scheduled"]
    """Learning rate of SimSiam's predictor. fixed: constant after the warm-up (paper, Table 1); scheduled: as that of
    the rest, which is that of other methods' predictors in any case."""

    @model_validator(mode="after")
    def options_of_the_optimizer(self):
        if self.name == "lars" and self.implementation == "apex":
            raise UserError(
                "optimizer.implementation: apex has no LARS; set optimizer.implementation=torch, or optimizer.name=sgd",
                "apex-with-lars",
            )
        if self.name == "sgd" and self.lars_vectors != "exempt":
            raise UserError(
                f"optimizer.lars_vectors: {self.lars_vectors} has no effect with optimizer.name=sgd; set "
                "optimizer.name=lars, or optimizer.lars_vectors=exempt",
                "vectors-without-lars",
            )
        if self.name == "sgd" and self.lars_trust != LARS_TRUST:
            raise UserError(
                f"optimizer.lars_trust: {self.lars_trust:g} has no effect with optimizer.name=sgd; set "
                f"optimizer.name=lars, or optimizer.lars_trust={LARS_TRUST:g}",
                "trust-without-lars",
            )
        return self
