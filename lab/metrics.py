"""Quality, adherence and variety of samples, in the features of the shipped classifier."""

import torch

# ----------------------------------------------------------------------------
# Quality.


def frechet_distance(features, mean, cov):
    """Frechet distance between the Gaussian fitted to `features` and N(mean, cov) (Heusel et al. 2017, eq. 6).

    features: [..., N, D], with any batch dimensions; mean: [D]; cov: [D, D]. Returns float64 [...].
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


# ----------------------------------------------------------------------------
# Variety.


def class_spread(features, labels, num_classes):
    """Mean distance between two different samples of the same class, for each class: [num_classes].

    features: [N, D]; labels: int64 [N]. A class with fewer than two samples gives NaN.
    """
    spread = features.new_full([num_classes], float("nan"))
    for c in range(num_classes):
        member = features[labels == c]
        if len(member) > 1:
            spread[c] = torch.pdist(member).mean()
    return spread


# ----------------------------------------------------------------------------
# Uncertainty.


def bootstrap_interval(statistic, features, rounds=400, seed=0, level=0.95):
    """Bootstrap interval of `statistic(features)` over the rows of `features`: `(low, high)`.

    statistic maps [R, N, D] to [R]. Resampling with replacement inflates a Frechet distance, so the
    percentiles are shifted to be centred, in the mean, on the value of the sample itself.
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(0, rounds, 50):  # 50 at a time bounds the memory.
        index = torch.randint(len(features), [50, len(features)], generator=generator)
        values.append(statistic(features[index.to(features.device)]))
    values = torch.cat(values)
    shift = statistic(features[None])[0] - values.mean()
    tail = (1 - level) / 2
    low, high = torch.quantile(values, values.new_tensor([tail, 1 - tail])) + shift
    return low.item(), high.item()
