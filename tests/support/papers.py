"""Methods as their papers have them: plain networks called view by view, and loops over images. For fp64.

Sources: the equations of SimSiam (arXiv 2011.10566), BYOL (2006.07733), SimCLR (2002.05709), MoCo (1911.05722), SwAV
(2006.09882) and FastSiam (GCPR 2022).
"""

import copy
import math

import torch
from torch import nn

from fastsiam.methods import build_method
from tests.support.small_methods import indices_of, one_convolution, small_step, views_of

TOLERANCE = 1e-10


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def mean(values):
    values = list(values)
    return sum(values) / len(values)


class Paper:
    """Networks of a method, and what changes from step to step beside its weights."""

    def __init__(self, method, config):
        self.config, self.method = config, config.method
        self.encoder, self.projector = copy.deepcopy(method.encoder), copy.deepcopy(method.projector)
        self.predictor = copy.deepcopy(getattr(method, "predictor", nn.Identity()))
        # They are tensors of fp32: 0.1 is there 0.1 + 1.5e-9.
        self.temperature, self.epsilon = (float(getattr(method, name, 0)) for name in ("temperature", "epsilon"))

    def parameters(self):
        networks = nn.ModuleList([self.encoder, self.projector, self.predictor])
        return [parameter for parameter in networks.parameters() if parameter.requires_grad]

    def seen(self, views, encoder=None, projector=None):
        """z of each view, which goes through the networks alone."""
        return [(projector or self.projector)((encoder or self.encoder)(view)) for view in views]

    def after_backward(self, progress):
        """Changes gradients."""

    def after(self, progress):
        """Changes what the step of the optimizer does not."""


class SimSiamPaper(Paper):
    """Algorithm 1, its variants of section 4, and FastSiam's mean of targets."""

    def loss(self, views, indices, number):
        z = self.seen(views)
        p, z = [self.predictor(x) for x in z], [x.detach() for x in z]
        count = len(views)
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        if not self.method.symmetric:
            pairs = [(i, i + 1) for i in range(0, count, 2)]
        if self.method.target_views is not None:
            behind = range(1, self.method.target_views + 1)
            means = [mean(z[(i + step) % count] for step in behind) for i in range(count)]
            return mean(-cosine(p[i][n], means[i][n]) for i in range(count) for n in range(len(p[i])))
        distance = self.cross_entropy if self.method.similarity == "cross_entropy" else lambda p, z: -cosine(p, z)
        return mean(distance(p[i][n], z[j][n]) for i, j in pairs for n in range(len(p[i])))

    @staticmethod
    def cross_entropy(p, z):
        """-softmax(z).log softmax(p)."""
        shares = [math.exp(value) / sum(math.exp(other) for other in z) for value in z]
        normal = torch.log(sum(torch.exp(value) for value in p))
        return -sum(share * (value - normal) for share, value in zip(shares, p, strict=True))


class AlternatingPaper(Paper):
    """Section 5.1: the targets of k steps are computed before them, with the weights as they then are, and cached."""

    def loss(self, views, indices, number):
        k = self.method.steps
        if number % k == 0:
            networks = copy.deepcopy((self.encoder, self.projector))
            with torch.no_grad():
                batches = [views_by_one(self.config, number + later) for later in range(k)]
                self.cache = [self.seen(batch, *networks) for batch in batches]
        eta1, eta2 = self.cache[number % k]
        p1, p2 = (self.predictor(z) for z in self.seen(views))
        pairs = zip(p1, eta2, p2, eta1, strict=True)
        return mean(-cosine(p, eta) / 2 - cosine(q, other) / 2 for p, eta, q, other in pairs)


class AveragePaper(Paper):
    """Section 5.2: eta <- m eta + (1 - m) z2 of each image, no predictor; each view takes the place of z2."""

    def __init__(self, method, config):
        super().__init__(method, config)
        self.eta = {image: torch.zeros(8, dtype=torch.float64) for image in range(self.method.images)}

    def loss(self, views, indices, number):
        z1, z2 = self.seen(views)
        m, losses = self.method.momentum, []
        self.seen_now = {}
        for a, b, image in zip(z1, z2, indices.tolist(), strict=True):
            before = self.eta[image]
            for z, other in ((a, b), (b, a)):
                losses.append(-cosine(z, m * before + (1 - m) * other.detach()))
            self.seen_now[image] = m * before + (1 - m) * (a + b).detach() / 2
        return mean(losses)

    def after(self, progress):
        self.eta.update(self.seen_now)


class _WithFollower(Paper):
    def __init__(self, method, config):
        super().__init__(method, config)
        self.follower = copy.deepcopy((self.encoder, self.projector))

    def follow(self, share):
        with torch.no_grad():
            for theirs, ours in zip(self.follower, (self.encoder, self.projector), strict=True):
                for xi, theta in zip(theirs.parameters(), ours.parameters(), strict=True):
                    xi.copy_(share * xi + (1 - share) * theta)


class BYOLPaper(_WithFollower):
    """Eq. 2 and its symmetrised sum; the target follows at tau = 1 - (1 - tau_0)(cos(pi k / K) + 1) / 2."""

    def loss(self, views, indices, number):
        p = [self.predictor(z) for z in self.seen(views)]
        with torch.no_grad():
            targets = self.seen(views, *self.follower)
        one = mean(2 - 2 * cosine(q, z) for q, z in zip(p[0], targets[1], strict=True))
        return one + mean(2 - 2 * cosine(q, z) for q, z in zip(p[1], targets[0], strict=True))

    def after(self, progress):
        self.follow(1 - (1 - self.method.momentum) * (math.cos(math.pi * progress) + 1) / 2)


class SimCLRPaper(Paper):
    """Eq. 1, averaged over all anchors and their positives."""

    def loss(self, views, indices, number):
        z = self.seen(views)
        keys = torch.cat(z).detach() if self.method.stop_gradient else torch.cat(z)
        keys = keys / keys.norm(dim=1, keepdim=True)
        queries, losses, images = torch.cat([self.predictor(view) for view in z]), [], len(z[0])
        for i, query in enumerate(queries):
            terms = torch.exp(keys @ query / query.norm() / self.temperature)
            below = sum(term for k, term in enumerate(terms) if k != i)
            losses += [-torch.log(terms[j] / below) for j in range(i % images, len(keys), images) if j != i]
        return mean(losses)


class MoCoPaper(_WithFollower):
    """Eq. 1: keys of a network that follows, a queue that is a ring; the new keys come in after the loss."""

    def __init__(self, method, config):
        super().__init__(method, config)
        self.queue, self.pointer = list(method.queue.clone()), 0

    def loss(self, views, indices, number):
        pairs = [(0, 1), (1, 0)] if self.method.symmetric else [(0, 1)]
        self.keys, total = [], 0
        for asking, answering in pairs:
            (queries,) = self.seen([views[asking]])
            with torch.no_grad():
                (keys,) = self.seen([views[answering]], *self.follower)
            total = total + mean(self.of_one(*pair) for pair in zip(queries, keys, strict=True))
            self.keys += [key / key.norm() for key in keys]
        return total

    def of_one(self, query, key):
        # Keys of the first queue are unit vectors of fp32.
        rows = torch.stack([key / key.norm(), *self.queue])
        terms = torch.exp(rows @ query / query.norm() / self.temperature)
        return -torch.log(terms[0] / terms.sum())

    def after(self, progress):
        for key in self.keys:
            self.queue[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.queue)
        self.follow(self.method.momentum)


class SwAVPaper(Paper):
    """Eq. 2 with codes by Eq. 5; views of one size share statistics in the encoder, all views in the projector."""

    def __init__(self, method, config):
        super().__init__(method, config)
        self.prototypes = nn.Parameter(method.prototypes.weight.detach().clone())
        self.queues = [[] for _ in range(config.view_groups[0].count)]

    def parameters(self):
        return [*super().parameters(), self.prototypes]

    def seen_together(self, views):
        sizes = sorted({view.shape[-1] for view in views}, reverse=True)
        features = [self.encoder(torch.cat([v for v in views if v.shape[-1] == size])) for size in sizes]
        return list(self.projector(torch.cat(features)).chunk(len(views)))

    def loss(self, views, indices, number):
        joint = self.config.model.bn_statistics == "joint"
        z = self.seen_together(views) if joint else self.seen(views)
        self.z = [x / x.norm(dim=1, keepdim=True) for x in z]
        p = [self.predictor(x) for x in self.z] if self.method.predictor else self.z
        scores = [(x / x.norm(dim=1, keepdim=True)) @ self.prototypes.t() for x in p]
        full = bool(self.method.queue) and len(self.queues[0]) == self.method.queue
        is_used, losses = full and self.progress_of(number) >= self.method.queue_from, []
        for i, queue in enumerate(self.queues):
            rows = self.z[i] @ self.prototypes.t()
            if self.method.stop_gradient:
                rows = rows.detach()
            if is_used:
                rows = torch.cat([rows, (torch.stack(queue) @ self.prototypes.t()).detach()])
            codes = self.codes(rows)
            for v in (v for v in range(len(views)) if v != i):
                for n, row in enumerate(scores[v]):
                    exps = torch.exp(row / self.temperature)
                    losses.append(-sum(codes[n] * torch.log(exps / exps.sum())))
        return mean(losses)

    def codes(self, rows):
        """Columns, then rows, divided by their sums, three times."""
        q = torch.exp(rows / self.epsilon)
        for _ in range(self.method.sinkhorn_iterations):
            q = q / q.sum(0, keepdim=True) / q.shape[1]
            q = q / q.sum(1, keepdim=True)
        return q

    def progress_of(self, number):
        return number / self.steps

    def after_backward(self, progress):
        if progress < self.method.freeze_prototypes:
            self.prototypes.grad = None

    def after(self, progress):
        if progress >= self.method.freeze_prototypes:
            with torch.no_grad():
                self.prototypes /= self.prototypes.norm(dim=1, keepdim=True)
        for number, queue in enumerate(self.queues):
            queue[:] = [*self.z[number].detach(), *queue][: self.method.queue]


def views_by_one(config, number):
    """Views [N, 3, S, S] of step `number`, one by one."""
    groups = zip(views_of(config, number), config.view_groups, strict=True)
    return [view for group, (count, _) in groups for view in group.chunk(count)]


PAPERS = {
    "simsiam": SimSiamPaper,
    "simsiam_alternating": AlternatingPaper,
    "simsiam_average": AveragePaper,
    "byol": BYOLPaper,
    "simclr": SimCLRPaper,
    "moco": MoCoPaper,
    "swav": SwAVPaper,
}


def trained_beside(config, steps=5):
    """Trains a method by `TrainingStep` beside its paper; returns both after `steps`, equal in loss and networks."""
    step = small_step(config)
    with one_convolution():
        plain = build_method(config.with_values({"model.bn_statistics": "joint"})).double()
    plain.load_state_dict(step.method.state_dict())
    paper = PAPERS[config.method.name](plain, config)
    paper.steps = steps
    settings = config.optimizer
    sgd = torch.optim.SGD(
        paper.parameters(), config.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    for number in range(steps):
        views, indices, progress = views_of(config, number), indices_of(config, number), number / steps
        out = step(views, number + 1, indices, progress)
        sgd.zero_grad()
        loss = paper.loss(views_by_one(config, number), indices, number)
        loss.backward()
        paper.after_backward(progress)
        sgd.step()
        paper.after(progress)
        torch.testing.assert_close(out["loss"].detach(), loss.detach(), atol=TOLERANCE, rtol=TOLERANCE)
        if number == 0:
            first = [parameter.detach().clone() for parameter in paper.parameters()]
    moved = max((a - b).abs().max() for a, b in zip(first, paper.parameters(), strict=True))
    assert moved > 1e-2
    for name in ("encoder", "projector", "predictor"):
        ours = getattr(step.method, name, nn.Identity()).state_dict()
        torch.testing.assert_close(ours, getattr(paper, name).state_dict(), atol=TOLERANCE, rtol=TOLERANCE)
    return step.method, paper
