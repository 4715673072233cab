"""Quality, adherence and variety of samples, in the features of the shipped classifier."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Scores:
    """What `score` measures of a set of samples.

    fd: Frechet distance to the real images, and fd_low, fd_high: its 95 % bootstrap interval.
    accuracy: share of samples that the classifier takes for the class that was asked for (adherence).
    variety: mean feature distance within a class, relative to that of the real images.
    """

    fd: float
    fd_low: float
    fd_high: float
    accuracy: float
    variety: float


@torch.inference_mode()
def score(lab, x, labels, bootstrap_seed=0):
    """Return the `Scores` of images x [N, 1, 28, 28] on the model's scale, asked for as labels [N]."""
    features, logits = zip(*(lab.classifier(part) for part in x.split(500)), strict=True)
    features, logits = torch.cat(features).double(), torch.cat(logits)
    mean, cov, spread = (lab.reference[k].double() for k in ("mean", "cov", "spread"))

    def fd(features):
        return frechet_distance(features, mean, cov)

    low, high = bootstrap_interval(fd, features, labels, seed=bootstrap_seed)
    return Scores(
        fd=fd(features).item(),
        fd_low=low,
        fd_high=high,
        accuracy=(logits.argmax(1) == labels).double().mean().item(),
        variety=(class_spread(features, labels, len(spread)) / spread).mean().item(),
    )


def frechet_distance(features, mean, cov):
    """Frechet distance between the Gaussian fitted to `features` and N(mean, cov) (Heusel et al. 2017, eq. 6).

    features: [..., N, D], with any batch dimensions; mean: [D]; cov: [D, D]. Returns float64 [...]. The
    expectation over sets of N samples exceeds the limit of large N: compare sets of the same size.
    """
    features, mean, cov = features.double(), mean.double(), cov.double()
    centred = features - features.mean(-2, keepdim=True)
    sample_cov = centred.mT @ centred / (features.shape[-2] - 1)
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    # The eigenvalues of S1 S2 are those of the symmetric S2^1/2 S1 S2^1/2.
    cross = torch.linalg.eigvalsh(root @ sample_cov @ root).clamp(min=0).sqrt().sum(-1)
    trace = sample_cov.diagonal(dim1=-2, dim2=-1).sum(-1) + cov.trace() - 2 * cross
    return (features.mean(-2) - mean).square().sum(-1) + trace


def class_spread(features, labels, num_classes):
    """Mean distance between two different samples of the same class, for each class: [num_classes].

    features: [N, D]; labels: int64 [N]. A class with fewer than two samples gives NaN.
    """
    spread = features.new_full([num_classes], float("nan"))
    for c in range(num_classes):
        members = features[labels == c]
        if len(members) > 1:
            spread[c] = torch.pdist(members).mean()
    return spread


def bootstrap_interval(statistic, features, labels, rounds=400, seed=0, level=0.95):
    """Bootstrap interval of `statistic(features)`, `(low, high)`, resampling within each class.

    features: [N, D]; labels: int64 [N], which were chosen and not drawn, hence the strata; statistic maps
    [R, N, D] to [R]. Resampling inflates a Frechet distance, as a smaller N would: the percentiles are
    shifted so that their mean is the value of the sample itself.
    """
    generator = torch.Generator().manual_seed(seed)
    members = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    values = []
    for part in torch.arange(rounds).split(50):  # 50 resamples at a time bound the memory.
        index = [m[torch.randint(len(m), [len(part), len(m)], generator=generator).to(m.device)] for m in members]
        values.append(statistic(features[torch.cat(index, dim=1)]))
    values = torch.cat(values)
    values += statistic(features[None]) - values.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(values, values.new_tensor([tail, 1 - tail])).tolist()
    return low, high
