"""Quality, adherence and variety of samples: pure functions of features, of whichever network."""

import math
from typing import NamedTuple

import numpy as np
import torch

# ----------------------------------------------------------------------------
# Metrics of two sets of features, or of one. Given influence=True, each also returns how much each sample moves
# it: influence values [N] of mean zero, whose resampled mean is the metric's bootstrap to first order (Efron
# and Tibshirani 1993, ch. 22). Samples are never drawn twice into one set, so that no sample is its own
# neighbour, and a Frechet distance of 2,048 features costs one decomposition, not one per round.

CHUNK = 2**22  # Entries of a matrix of pairs that are in memory at once.


def influence_interval(value, influence, labels=None, rounds=400, seed=0, level=0.95):
    """Bootstrap interval `(low, high)` of the expectation of a metric at this number of samples.

    value: the metric; influence: its influence values [N], resampled; labels: int64 [N] when the classes were
    chosen and not drawn: resampling is then within each class, and the spread between them is no uncertainty.
    """
    if labels is None:
        labels = torch.zeros(len(influence), dtype=torch.int64, device=influence.device)
    generator = torch.Generator().manual_seed(seed)
    strata, values = [influence[labels == c] for c in labels.unique()], influence.new_zeros(rounds)
    for part in torch.arange(rounds).split(50):  # 50 resamples at a time bound the memory.
        for moved in strata:
            index = torch.randint(len(moved), [len(part), len(moved)], generator=generator).to(moved.device)
            values[part] += moved[index].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(value + values / len(influence), values.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def gaussian(features):
    """Mean [D] and covariance [D, D] of features [N, D], N of 2 or more, in float64, in bounded memory."""
    _check(features, at_least=2)
    mean = sum(part.double().sum(0) for part in features.split(4096)) / len(features)
    cov = sum((part.double() - mean).mT @ (part.double() - mean) for part in features.split(4096))
    return mean, cov / (len(features) - 1)


def frechet_distance(features, mean, cov, influence=False):
    """Frechet distance between the Gaussian fitted to `features` and N(mean, cov) (Heusel et al. 2017, eq. 6).

    features: [N, D]; mean: [D]; cov: [D, D]. Returns float64 [], in bounded memory. The expectation over sets of N
    samples exceeds the limit of large N: compare sets of the same size. For the influence, let T be the optimal
    transport from the fitted Gaussian N(m, S) to N(mean, cov): a sample at m + c moves the distance by
    2 c'(m - mean) + c'(I - T)c - tr((I - T)S). Directions in which the sample does not vary have no part in it: no
    resample varies there either.
    """
    mean, cov = mean.double(), cov.double()
    sample_mean, sample_cov = gaussian(features)
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    values, vectors = torch.linalg.eigh(root @ sample_cov @ root)
    cross = values.clamp(min=0).sqrt()
    shift = sample_mean - mean
    value = shift.square().sum() + sample_cov.trace() + cov.trace() - 2 * cross.sum()
    if not influence:
        return value
    inverse = torch.where(cross > 1e-6 * cross.max(), 1 / cross, 0)
    half = root @ (vectors * inverse.sqrt())  # T = half half'
    moved = []
    for part in features.split(4096):
        c = part.double() - sample_mean
        moved.append(2 * c @ shift + c.square().sum(1) - (c @ half).square().sum(1))
    moved = torch.cat(moved)
    return value, moved - moved.mean()


def cmmd(x, y, influence=False):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, sec. 4; Gretton et al. 2012, eq. 5).

    x: [N, D] and y: [M, D], embeddings, scaled to unit norm here. As in the authors' code: a Gaussian kernel of
    bandwidth 10, times 1000, the diagonal included, which adds about 1000 (1 - mean kernel) (1/N + 1/M).
    Returns float64 []; influence values are those of x.
    """
    _check(x, y)
    x, y = _unit(x), _unit(y)

    def kernel_means(a, b):  # Of k - 1: the ones cancel, and float32 keeps the digits that matter.
        parts = a.split(max(1, CHUNK // len(b)))
        return torch.cat([torch.expm1((part @ b.mT - 1) / 10**2).mean(1, dtype=torch.float64) for part in parts])

    xx, xy = kernel_means(x, x), kernel_means(x, y)
    value = 1000 * (xx.mean() - 2 * xy.mean() + kernel_means(y, y).mean())
    return (value, 2000 * _centred(xx - xy)) if influence else value


class PRDC(NamedTuple):
    """Precision, recall, density and coverage, each float64 [], or their influence values, each [N]."""

    precision: torch.Tensor
    recall: torch.Tensor
    density: torch.Tensor
    coverage: torch.Tensor


def prdc(real, fake, k=5, influence=False):
    """Improved precision and recall (Kynkaanniemi et al. 2019, sec. 2), density and coverage (Naeem et al.
    2020, sec. 3), with balls that reach to the k-th neighbour of their own set.

    real: [M, D] and fake: [N, D], features; more than k + 1 of each, else ValueError. Returns a PRDC, and with
    influence another one. Precision and density are means over the samples. Recall and coverage are unions over
    them: their influence is that of leaving a sample out, whose spread errs on the wide side (Efron and Stein 1981).
    """
    _check(real, fake, at_least=k + 2)
    real, fake = real.double(), fake.double()
    real_radius, _, _ = _balls(real, k)
    fake_radius, next_radius, neighbours = _balls(fake, k)
    n = len(fake)
    within, recalled, covered = fake.new_zeros(n), [], []
    any_within = torch.zeros(n, dtype=torch.bool, device=fake.device)
    recall_loss, coverage_loss = fake.new_zeros(n), fake.new_zeros(n)
    step = max(1, CHUNK // n)
    for part, radius in zip(real.split(step), real_radius.split(step), strict=True):
        distance = torch.cdist(part, fake)
        inside = distance < radius[:, None]
        within += inside.sum(0)
        any_within |= inside.any(0)
        covered.append(inside.any(1))
        in_fake = distance < fake_radius
        recalled.append(in_fake.any(1))
        if influence:
            coverage_loss += inside[inside.sum(1) == 1].sum(0)
            recall_loss += _recall_lost(distance, in_fake, next_radius, neighbours)
    per_sample = PRDC(any_within.double(), None, within / k, None)
    recalled, covered = torch.cat(recalled).double(), torch.cat(covered).double()
    value = PRDC(per_sample.precision.mean(), recalled.mean(), per_sample.density.mean(), covered.mean())
    if not influence:
        return value
    left_out = (n - 1) / len(real)
    return value, PRDC(
        _centred(per_sample.precision),
        _centred(recall_loss * left_out),
        _centred(per_sample.density),
        _centred(coverage_loss * left_out),
    )


def _balls(x, k):
    """Distances to the k-th and the next neighbour, [N] each, and the indices of the first k, [N, k]."""
    radius, index = [], []
    for start in range(0, len(x), step := max(1, CHUNK // len(x))):
        distance = torch.cdist(x[start : start + step], x)
        distance.diagonal(start).fill_(-1)  # Itself comes first, even among equals.
        nearest = distance.topk(k + 2, largest=False)
        radius.append(nearest.values)
        index.append(nearest.indices[:, 1 : k + 1])
    radius = torch.cat(radius)
    return radius[:, k], radius[:, k + 1], torch.cat(index)


def _recall_lost(distance, in_fake, next_radius, neighbours):
    """How many of the real samples are no longer recalled without each of the fake ones, less how many are anew.

    distance, in_fake: [C, N], real by fake. Without a sample its ball is gone, and the balls that had it as one
    of their k neighbours reach to the next one.
    """
    few = in_fake.sum(1) <= 1  # In two balls or more, one is always left.
    distance, in_fake = distance[few], in_fake[few]
    row, ball = ((distance < next_radius) & ~in_fake).nonzero().unbind(1)
    grown = torch.zeros_like(in_fake)  # [c, N]: without this sample, a larger ball holds this row.
    grown[row[:, None], neighbours[ball]] = True
    alone = in_fake.any(1)
    return (in_fake & ~grown)[alone].sum(0) - grown[~alone].sum(0)


def expected_coverage(num_real, num_fake, k=5):
    """Coverage of a perfect model: real and fake samples of one distribution (Naeem et al. 2020, sec. 3.3)."""
    missed = math.prod((num_real - i) / (num_real + num_fake - i) for i in range(1, k + 1))
    return 1 - missed


def vendi(features, influence=False):
    """Vendi score (Friedman and Dieng 2023, sec. 3): the effective number of different samples, 1 to N.

    features: [N, D]; the kernel is their cosine. The eigenvalues of the kernel over N are those of the D x D
    matrix of second moments: the smaller of the two is decomposed. Returns float64 [].
    """
    _check(features)
    x, n = _unit(features).double(), len(features)
    wide = x.shape[1] >= n
    values, vectors = torch.linalg.eigh((x @ x.mT if wide else x.mT @ x) / n)
    values = values.clamp(min=0)
    entropy = -torch.special.xlogy(values, values).sum()
    value = entropy.exp()
    if not influence:
        return value
    log = torch.where(values > 1e-12, values, 1).log()
    # x' log(C) x of every sample, C the second moments.
    inner = vectors.square() @ (n * values * log) if wide else (x @ vectors).square() @ log
    return value, -value * _centred(inner)


def mean_distance(features, influence=False):
    """Mean Euclidean distance between two different samples of features [N, D], float64 []; N of 2 or more."""
    _check(features, at_least=2)
    x, n = features.double(), len(features)
    means = torch.cat([torch.cdist(part, x).sum(1) for part in x.split(max(1, CHUNK // n))]) / (n - 1)
    return (means.mean(), 2 * _centred(means)) if influence else means.mean()


# ----------------------------------------------------------------------------
# Values of single images; a set's metric is their mean.


def clip_score(image, text):
    """CLIP score (Hessel et al. 2021, sec. 3) on the scale of 0 to 100: 100 max(cos, 0), not their 2.5 max(cos, 0).

    image, text: CLIP embeddings of images and of their prompts, [N, D] each. Returns float64 [N].
    """
    if image.shape != text.shape:
        raise ValueError(
            f"each image needs one prompt: {tuple(image.shape)} embeddings, {tuple(text.shape)} of prompts"
        )
    return 100 * (_unit(image).double() * _unit(text).double()).sum(1).clamp(min=0)


def pixel_statistics(pixels):
    """Saturation, contrast and clipping of one image, float32 [3]: what shows first when guidance is too strong.

    pixels: uint8 array [H, W, 3], RGB. Mean saturation of the HSV model; RMS contrast, the standard deviation of luma
    (ITU-R BT.601) on the scale of 0 to 1 (Peli 1990); share of pixels with a channel at 0 or 255.
    """
    r, g, b = (np.ascontiguousarray(pixels[..., i]) for i in range(3))  # Planes, in numpy: it runs in threads.
    high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
    saturation = np.divide(high - low, np.maximum(high, 1), dtype=np.float32).mean(dtype=np.float64)
    luma = 0.299 * r.astype(np.float32) + 0.587 * g.astype(np.float32) + 0.114 * b.astype(np.float32)
    clipped = ((low == 0) | (high == 255)).mean()
    return torch.tensor([saturation, luma.std(dtype=np.float64) / 255, clipped], dtype=torch.float32)


# ----------------------------------------------------------------------------
# What a number of samples is too small for.


def caveat(metric, value, num, num_reference, dim, k=5):
    """One sentence for a metric that so few samples cannot bear, with its source, else None.

    metric: "fd", "cmmd", one of PRDC's fields, "vendi" or any mean over samples; num, num_reference: sizes of the
    two sets; dim: number of features.
    """
    small = min(num, num_reference)
    if metric == "fd" and small <= dim:
        return (
            f"{small:,} images in {dim:,} features have a singular covariance, and the value says more about the "
            f"number of images than about them; take {5 * dim:,} or more (Heusel et al. 2017, their code)"
        )
    if metric == "fd" and small < 5 * dim:
        return (
            f"{small:,} images are few for {dim:,} features: the value is too high, by an amount that differs "
            f"between models (Chong and Forsyth 2020); take {5 * dim:,} or more (Heusel et al. 2017, their code)"
        )
    if metric == "cmmd":
        diagonal = 10 * (1 / num + 1 / num_reference)  # For unit vectors with no negative cosine.
        if diagonal > 0.2 * value:
            return (
                f"up to {diagonal:.2g} of it come from each image being compared with itself (Gretton et al. "
                f"2012, eq. 5), with {num:,} images and {num_reference:,} in the reference; take more"
            )
    if metric == "coverage" and (best := expected_coverage(num_reference, num, k)) < 0.9:
        return (
            f"{num:,} images can cover {best:.0%} of {num_reference:,} at best (Naeem et al. 2020, "
            "sec. 3.3); take as many images as the reference has"
        )
    if metric in ("precision", "recall") and max(num, num_reference) > 2 * small:
        return (
            f"the sets have {num:,} and {num_reference:,} images, and the smaller one's balls are wider; "
            "take as many images as the reference has (Kynkaanniemi et al. 2019, sec. 2)"
        )
    if metric == "vendi" and value > num / 10:
        return (
            f"above a tenth of {num:,}, where it still grows with the number of images (Ospanov and Farnia 2024); "
            "compare equal numbers only"
        )
    if metric in ("precision", "recall", "coverage", "accuracy") and num * min(value, 1 - value) < 5:
        return (
            f"hardly an exception among {num:,} images; whatever the interval says, the share may be off by "
            f"{3 / num:.2g} (the rule of three, Hanley and Lippman-Hand 1983)"
        )
    return None


def _unit(x):
    return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def _centred(x):
    return x - x.mean()


def _check(*sets, at_least=1):
    """Raise ValueError unless each set is [N, D] with enough samples, finite and of one D."""
    for x in sets:
        if x.ndim != 2 or len(x) < at_least:
            raise ValueError(f"features must be [N, D] with N of at least {at_least}, got {tuple(x.shape)}")
        if x.shape[1] != sets[0].shape[1]:
            raise ValueError(
                f"the sets have {sets[0].shape[1]} and {x.shape[1]} features: measure both with the same ones"
            )
        if not x.isfinite().all():
            raise ValueError("features hold NaN or infinity; is the network's precision too low?")
