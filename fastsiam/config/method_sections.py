"""Section method of a config: one class for each method, with its heads; `name` says which.

The defaults are those of each method's paper or authors' code for ImageNet and ResNet-50; configs/ names the sources.
"""

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fastsiam.config.data_sections import PositiveFloat, PositiveInt, Probability, Section
from fastsiam.errors import UserError

Norm = Literal["all", "hidden", "none"]


class ProjectorConfig(Section):
    layers: Annotated[int, Field(ge=1)]
    """Linear layers of the projector; the paper has 3, and 2 for CIFAR-10."""
    hidden: PositiveInt
    """Width of the layers before the last one."""
    out: PositiveInt
    """Dimensions of the projection, and of the prediction."""
    norm: Norm = "all"
    """Layers with a batch norm. all: each, the last one's without scale and shift (SimSiam's default); hidden: all but
    the last; none."""


class PredictorConfig(Section):
    hidden: PositiveInt
    """Width of the predictor's hidden layer; SimSiam has a quarter of projector.out, BYOL 4096."""
    norm: Norm = "hidden"
    """Layers with a batch norm. hidden: the first (SimSiam's default); all: the output as well, which is unstable
    (paper, Table 3); none."""
    frozen: bool = False
    """Keeps the predictor at its random weights: the paper's Table 1, where nothing is learned."""


HEADS = ("projector", "predictor")


class _WithHeads(Section):
    @model_validator(mode="before")
    @classmethod
    def what_heads_leave_out(cls, given):
        """A key of a head that is not written has the method's own value."""
        if not isinstance(given, dict):
            return given
        defaults = {name: cls.model_fields[name].default for name in HEADS if name in cls.model_fields}
        partial = {name: head for name, head in defaults.items() if head and isinstance(given.get(name), dict)}
        return {**given, **{name: {**head.model_dump(), **given[name]} for name, head in partial.items()}}


class SimSiamConfig(_WithHeads):
    """SimSiam (arXiv 2011.10566), and FastSiam (GCPR 2022) by target_views."""

    name: Literal["simsiam"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=3, hidden=2048, out=2048)
    predictor: PredictorConfig | None = PredictorConfig(hidden=512)
    """null: no predictor, with which the paper's run collapses (Table 1)."""
    stop_gradient: bool = True
    """Stops the gradient at the target branch; false is the paper's Figure 2, where the run collapses."""
    similarity: Literal["cosine", "cross_entropy"] = "cosine"
    """Agreement of p and z. cosine: the paper's; cross_entropy: of their softmax, 63.2 % against 68.1 % (section
    4.5)."""
    symmetric: bool = True
    """Lets each view predict the others. false: view 1 predicts view 2, view 3 view 4, and so on (section 4.6)."""
    target_views: PositiveInt | None = None
    """null: the loss is the mean over all pairs of views. K: each view predicts the mean projection of the K views
    after it, in a circle, and K = views.count - 1 is FastSiam; with two views both are SimSiam."""

    @model_validator(mode="after")
    def variants_of_one_kind(self):
        plain = self.similarity == "cosine" and self.symmetric
        if self.target_views is not None and not plain:
            raise UserError(
                "method.target_views: the mean of several targets goes with similarity=cosine and symmetric=true; set "
                "these, or method.target_views=null",
                "other-target",
            )
        return self


class SimSiamAlternatingConfig(_WithHeads):
    """SimSiam as alternating optimisation: targets of the weights as they were up to k steps ago (section 5.1)."""

    name: Literal["simsiam_alternating"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=3, hidden=2048, out=2048)
    predictor: PredictorConfig | None = PredictorConfig(hidden=512)
    """null: no predictor."""
    steps: PositiveInt = 10
    """Steps k of SGD in which the targets' weights are held; 1 is SimSiam. An epoch has images / train.batch_size."""


class SimSiamAverageConfig(_WithHeads):
    """SimSiam without a predictor whose target is a moving average over augmentations (section 5.2)."""

    name: Literal["simsiam_average"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=3, hidden=2048, out=2048)
    images: PositiveInt
    """Images of the data, each of which has an average; memory grows with images * projector.out."""
    momentum: Probability = 0.8
    """Share of the average that a step keeps; the paper takes 0.8."""


class BYOLConfig(_WithHeads):
    """BYOL (arXiv 2006.07733): SimSiam with a momentum encoder as target."""

    name: Literal["byol"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=2, hidden=4096, out=256, norm="hidden")
    predictor: PredictorConfig | None = PredictorConfig(hidden=4096)
    """null: no predictor, with which the run collapses (the paper's Table 5)."""
    momentum: Probability = 0.99
    """Share of the target's weights that the first step keeps; it rises along a cosine to 1 at the end of the run."""


class SimCLRConfig(_WithHeads):
    """SimCLR (arXiv 2002.05709): the other images of the batch are negatives."""

    name: Literal["simclr"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=2, hidden=2048, out=128, norm="hidden")
    temperature: PositiveFloat = 0.1
    """Temperature of InfoNCE."""
    predictor: PredictorConfig | None = None
    """A predictor in front of the loss, one of SimSiam's variants of SimCLR (appendix C); null: SimCLR."""
    stop_gradient: bool = False
    """Stops the gradient at the keys, another of these variants."""


class MoCoConfig(_WithHeads):
    """MoCo v2 (arXiv 2003.04297): keys of a momentum encoder, negatives in a queue."""

    name: Literal["moco"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=2, hidden=2048, out=128, norm="none")
    temperature: PositiveFloat = 0.2
    """Temperature of InfoNCE."""
    momentum: Probability = 0.999
    """Share of the key encoder's weights that a step keeps."""
    queue: PositiveInt = 65_536
    """Keys of earlier steps that are negatives; a multiple of the keys of a step."""
    symmetric: bool = False
    """Lets both views be queries, and sums both losses; the authors' demo for CIFAR-10 has this variant."""


class SwAVConfig(_WithHeads):
    """SwAV (arXiv 2006.09882): views predict each other's cluster; the clusters are learned on the way."""

    name: Literal["swav"]
    """Training method."""
    projector: ProjectorConfig = ProjectorConfig(layers=2, hidden=2048, out=128, norm="hidden")
    prototypes: Annotated[int, Field(ge=2)] = 3000
    """Number of clusters."""
    temperature: PositiveFloat = 0.1
    """Temperature of the softmax over prototypes."""
    epsilon: PositiveFloat = 0.05
    """Regularisation of Sinkhorn-Knopp; smaller codes are sharper."""
    sinkhorn_iterations: Annotated[int, Field(ge=0)] = 3
    """Iterations of Sinkhorn-Knopp. 0: softmax in its place, with which nothing stops a collapse."""
    freeze_prototypes: Probability = 0.01
    """Share of the run in which the prototypes keep their first values; the authors take one epoch of 100."""
    queue: Annotated[int, Field(ge=0)] = 0
    """Projections of earlier steps that join in Sinkhorn-Knopp, for each view with codes; the authors take 3,840 for
    batches of 256."""
    queue_from: Probability = 0.075
    """Share of the run from which the queue is used, once it is full; the authors wait 15 epochs of 200."""
    predictor: PredictorConfig | None = None
    """A predictor in front of the prototypes, one of SimSiam's variants of SwAV (appendix C); null: SwAV."""
    stop_gradient: bool = True
    """Stops the gradient at the codes; false is another of these variants, which diverges."""

    @model_validator(mode="after")
    def start_of_a_queue(self):
        default = type(self).model_fields["queue_from"].default
        if not self.queue and self.queue_from != default:
            raise UserError(
                f"method.queue_from: {self.queue_from:g} has no effect without a queue; set method.queue=3840, or "
                f"method.queue_from={default:g}",
                "start-without-queue",
            )
        return self


MethodConfig = Annotated[
    SimSiamConfig
    | SimSiamAlternatingConfig
    | SimSiamAverageConfig
    | BYOLConfig
    | SimCLRConfig
    | MoCoConfig
    | SwAVConfig,
    Field(discriminator="name"),
]


def chance_loss(method, num_views: int, batch_size: int) -> tuple[str, float] | None:
    """Returns the loss of a method that tells nothing apart, with its formula; None where the loss does not show it.

    `num_views`: of each image; `batch_size`: images of all ranks.
    """
    match method.name:
        case "simclr":
            negatives = num_views * batch_size - 1
            return f"ln {negatives:,}", math.log(negatives)
        case "moco":
            times = 2 if method.symmetric else 1
            return f"{'2 ' * (times - 1)}ln {method.queue + 1:,}", times * math.log(method.queue + 1)
        case "swav":
            return f"ln {method.prototypes:,}", math.log(method.prototypes)
    return None


def check_method(method, num_views: int, batch_size: int, micro_batch: int | None = None) -> None:
    """Raises `UserError` where a method does not fit its views or its batch.

    `num_views`: of each image; `batch_size` and `micro_batch`: images of all ranks.
    """
    targets = getattr(method, "target_views", None)
    if targets is not None and targets >= num_views:
        raise UserError(
            f"method.target_views: {targets}, and an image has {num_views - 1} other views to predict; set "
            f"method.target_views={num_views - 1}, or views.count={targets + 1}",
            "too-many-targets",
        )
    if getattr(method, "symmetric", True) is False and method.name != "moco" and num_views % 2:
        raise UserError(
            f"method.symmetric: false pairs views, and there are {num_views}; set views.count={num_views + 1}",
            "odd-views",
        )
    if method.name in ("moco", "simsiam_average") and num_views != 2:
        raise UserError(
            f"method.name: {method.name} takes 2 views, and there are {num_views}; set views.count=2", "two-views"
        )
    if method.name == "moco":
        _check_moco(method, batch_size)
    if method.name == "simsiam_average":
        _check_average(method, batch_size, micro_batch)


def check_images(method, num_images: int, where: object) -> None:
    """Raises `UserError` where a method has an average of each image, and the data `where` have another number."""
    if method.name == "simsiam_average" and method.images != num_images:
        raise UserError(
            f"method.images: {method.images}, and there are {num_images} under {where}; set method.images={num_images}",
            "other-number-of-images",
        )


def _check_average(method, batch_size, micro_batch):
    if micro_batch not in (None, batch_size):
        raise UserError(
            f"train.micro_batch: {micro_batch}, but method.name=simsiam_average reads the averages of a whole batch; "
            "set train.micro_batch=null",
            "average-with-micro-batch",
        )
    if method.images < batch_size:
        raise UserError(
            f"method.images: {method.images} are less than train.batch_size={batch_size}; set the number of images "
            "under data.train",
            "other-number-of-images",
        )


def _check_moco(method, batch_size):
    keys = batch_size * (2 if method.symmetric else 1)
    if method.queue < keys:
        raise UserError(
            f"method.queue: {method.queue} is less than the {keys} keys of a step; set method.queue={16 * keys}, or a "
            "smaller train.batch_size",
            "queue-too-small",
        )
    if method.queue % keys:
        raise UserError(
            f"method.queue: {method.queue} does not divide by the {keys} keys of a step; set "
            f"method.queue={method.queue // keys * keys}",
            "queue-not-divisible",
        )
