"""Quality, adherence and variety of samples: pure functions of features, of whichever network."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple, overload

import numpy as np
import torch

# ----------------------------------------------------------------------------
# Metrics of two sets of features, or of one. Given influence=True, each also returns how much each sample moves
# it: influence values [N] of mean zero, whose resampled mean is the metric's bootstrap to first order (Efron
# and Tibshirani 1993, ch. 22). Samples are never drawn twice into one set, so that no sample is its own
# neighbour, and a Frechet distance of 2,048 features costs one decomposition, not one per round.
#
# Memory does not grow with the pairs. What runs over pairs of samples keeps to the features' own precision, float32 or
# float64, and adds up in float64; what runs over pairs of features is float64 throughout.

VERSION = 2  # Counts up with every change of a metric's value or interval: what was kept of an earlier one is void.
CHUNK = 2**22  # Entries of a buffer: 16 MiB in float32. A few are in memory at once.


def influence_interval(
    value: float | torch.Tensor,
    influence: torch.Tensor,
    labels: torch.Tensor | None = None,
    rounds: int = 400,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap interval `(low, high)` of the expectation of a metric at this number of samples.

    value: the metric; influence: its influence values [N], resampled; labels: int64 [N] when the classes were
    chosen and not drawn: resampling is then within each class, and the spread between them is no uncertainty.
    """
    if labels is None:
        labels = torch.zeros(len(influence), dtype=torch.int64, device=influence.device)
    generator = torch.Generator().manual_seed(seed)
    strata, values = [influence[labels == c] for c in labels.unique()], influence.new_zeros(rounds)
    for part in torch.arange(rounds).split(
        max(1, min(50, CHUNK // len(influence)))
    ):  # These at a time bound the memory.
        for moved in strata:
            index = torch.randint(len(moved), [len(part), len(moved)], generator=generator).to(moved.device)
            values[part] += moved[index].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(value + values / len(influence), values.new_tensor([tail, 1 - tail])).tolist()
    return low, high


def gaussian(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [D] and covariance [D, D] of features [N, D], N of 2 or more, in float64, in bounded memory."""
    _check(features, at_least=2)
    mean = sum(part.sum(0) for part in _in_double(features)) / len(features)
    return mean, _second_moments(part.sub_(mean) for part in _in_double(features)) / (len(features) - 1)


@overload
def frechet_distance(
    features: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor, influence: Literal[False] = False
) -> torch.Tensor: ...
@overload
def frechet_distance(
    features: torch.Tensor, mean: torch.Tensor, cov: torch.Tensor, influence: Literal[True]
) -> tuple[torch.Tensor, torch.Tensor]: ...
def frechet_distance(features, mean, cov, influence=False):
    """Frechet distance between the Gaussian fitted to `features` and N(mean, cov) (Heusel et al. 2017, eq. 6).

    features: [N, D]; mean: [D]; cov: [D, D]. Returns float64 [], in bounded memory. The expectation over sets of N
    samples exceeds the limit of large N: compare sets of the same size. For the influence, let T be the optimal
    transport from the fitted Gaussian N(m, S) to N(mean, cov): a sample at m + c moves the distance by
    2 c'(m - mean) + c'(I - T)c - tr((I - T)S). Directions in which the sample does not vary have no part in it: no
    resample varies there either. As for `vendi`, the smaller of an N x N and a D x D matrix is decomposed.
    """
    mean, cov, n = mean.double(), cov.double(), len(features)
    _check(features, at_least=2)
    wide = features.shape[1] >= n
    if wide:
        sample_mean = features.double().mean(0)
        c = features.double() - sample_mean
        variances = c.square().sum(1)
        values, vectors = torch.linalg.eigh(c @ cov @ c.mT / (n - 1))  # Those of S cov, but for zeros.
        trace = variances.sum() / (n - 1)
    else:
        sample_mean, sample_cov = gaussian(features)
        root, failed = torch.linalg.cholesky_ex(cov)  # Any root will do.
        if failed:
            values, vectors = torch.linalg.eigh(cov)
            root = vectors * values.clamp(min=0).sqrt()
        values, vectors = torch.linalg.eigh(root.mT @ sample_cov @ root)
        trace = sample_cov.trace()
    cross, shift = values.clamp(min=0).sqrt(), sample_mean - mean
    value = shift.square().sum() + trace + cov.trace() - 2 * cross.sum()
    if not influence:
        return value
    if wide:
        moved = 2 * c @ shift + variances - (n - 1) * (vectors.square() @ cross)
    else:
        half = root @ (vectors * torch.where(cross > 1e-6 * cross.max(), 1 / cross, 0).sqrt())  # T = half half'
        moved = []
        for c, transported in _products((part.sub_(sample_mean) for part in _in_double(features)), half):
            moved.append(2 * c @ shift + _squared_norms(c) - _squared_norms(transported))
        moved = torch.cat(moved)
    return value, moved - moved.mean()


@overload
def cmmd(
    x: torch.Tensor, y: torch.Tensor, influence: Literal[False] = False, y_kernel: torch.Tensor | None = None
) -> torch.Tensor: ...
@overload
def cmmd(
    x: torch.Tensor, y: torch.Tensor, influence: Literal[True], y_kernel: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]: ...
def cmmd(x, y, influence=False, y_kernel=None):
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, sec. 4; Gretton et al. 2012, eq. 5).

    x: [N, D] and y: [M, D], embeddings, scaled to unit norm here. As in the authors' code: a Gaussian kernel of
    bandwidth 10, times 1000, the diagonal included, which adds about 1000 (1 - mean kernel) (1/N + 1/M).
    Returns float64 []; influence values are those of x. y_kernel: `kernel_mean(y)`, if it is known.
    """
    _check(x, y)
    xx, xy = _kernel_means(x), _kernel_means(x, y)
    value = 1000 * (xx.mean() - 2 * xy.mean() + (kernel_mean(y) if y_kernel is None else y_kernel))
    return (value, 2000 * _centred(xx - xy)) if influence else value


def kernel_mean(x: torch.Tensor) -> torch.Tensor:
    """Mean of `cmmd`'s kernel less one over all pairs of embeddings x [N, D]: float64 []."""
    _check(x)
    return _kernel_means(x).mean()


def _kernel_means(x, y=None):
    """Mean over y, or x itself, of the kernel less one, in which float32 has the digits, for each of x: float64 [N]."""
    means = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for rows, columns, squares in _squared_distances(x, y, _unit):
        kernel = squares.div_(-2 * 10**2).expm1_()
        means[rows] += kernel.sum(1)
        if y is None and rows != columns:
            means[columns] += kernel.sum(0)
    return means / len(x if y is None else y)


class Neighbours(NamedTuple):
    """Of each sample of a set, float64 [N] or as said; the radii are squared.

    distance: mean Euclidean distance to the others; radius, next_radius: to the k-th and to the next neighbour, in the
    features' precision; index: int64 [N, k], the first k neighbours. The last three are empty in sets of k + 1 or less.
    """

    distance: torch.Tensor
    radius: torch.Tensor
    next_radius: torch.Tensor
    index: torch.Tensor


def neighbours(features: torch.Tensor, k: int = 5) -> Neighbours:
    """`Neighbours` of features [N, D], N of 2 or more: what `mean_distance` and `prdc` share."""
    _check(features, at_least=2)
    n, x, origin = len(features), features, features.mean(0)
    distance = torch.zeros(n, dtype=torch.float64, device=x.device)
    count = k + 1 if n > k + 1 else 0
    nearest, index = x.new_full([n, count], torch.inf), torch.zeros([n, count], dtype=torch.int64, device=x.device)
    for rows, columns, squares in _squared_distances(x, None, lambda part, out: torch.sub(part, origin, out=out)):
        if rows == columns:
            squares.fill_diagonal_(torch.inf)  # No sample is its own neighbour.
        if count:
            _take_nearest(nearest[rows], index[rows], squares, columns.start)
            if rows != columns:
                _take_nearest(nearest[columns], index[columns], squares.mT, rows.start)
        if rows == columns:
            squares.fill_diagonal_(0)
        distance[rows] += squares.sqrt_().sum(1)
        if rows != columns:
            distance[columns] += squares.sum(0)
    radius, next_radius = nearest[:, k - 1 : k + 1].unbind(1) if count else (nearest[:0].flatten(),) * 2
    return Neighbours(distance / (n - 1), radius, next_radius, index[:, :k] if count else index[:0])


def _take_nearest(nearest, index, squares, start):
    """Update squared distances and indices [R, k] by those of `squares` [R, C], whose first column is `start`."""
    count = nearest.shape[1]
    found, which = squares.topk(min(count, squares.shape[1]), largest=False)
    merged, order = torch.cat([nearest, found], 1).topk(count, largest=False)
    index.copy_(torch.cat([index, which + start], 1).gather(1, order))
    nearest.copy_(merged)


class PRDC(NamedTuple):
    """Precision, recall, density and coverage, each float64 [], or their influence values, each [N]."""

    precision: torch.Tensor
    recall: torch.Tensor
    density: torch.Tensor
    coverage: torch.Tensor


@overload
def prdc(
    real: torch.Tensor,
    fake: torch.Tensor,
    k: int = 5,
    influence: Literal[False] = False,
    real_near: Neighbours | None = None,
    fake_near: Neighbours | None = None,
) -> PRDC: ...
@overload
def prdc(
    real: torch.Tensor,
    fake: torch.Tensor,
    k: int = 5,
    *,
    influence: Literal[True],
    real_near: Neighbours | None = None,
    fake_near: Neighbours | None = None,
) -> tuple[PRDC, PRDC]: ...
def prdc(real, fake, k=5, influence=False, real_near=None, fake_near=None):
    """Improved precision and recall (Kynkaanniemi et al. 2019, sec. 2), density and coverage (Naeem et al.
    2020, sec. 3), with balls that reach to the k-th neighbour of their own set.

    real: [M, D] and fake: [N, D], features; more than k + 1 of each, else ValueError. real_near, fake_near: their
    `neighbours`, if they are known. Returns a PRDC, and with influence another one. Precision and density are means
    over the samples. Recall and coverage are unions over them: their influence is that of leaving a sample out, whose
    spread errs on the wide side (Efron and Stein 1981).
    """
    _check(real, fake, at_least=k + 2)
    real_near, fake_near = real_near or neighbours(real, k), fake_near or neighbours(fake, k)
    m, n, device, origin = len(real), len(fake), real.device, real.mean(0)
    height = max(1, 4 * CHUNK // n)
    squares = real.new_empty([min(height, m), n])  # Of the real samples of one strip to all fake ones.
    within = torch.zeros(n, dtype=torch.int64, device=device)  # Balls of real samples around each fake one.
    covering, recalling = torch.zeros([2, m], dtype=torch.int64, device=device)  # Samples and balls at each real one.
    coverage_loss, recall_loss = torch.zeros([2, n], dtype=torch.float64, device=device)
    tiles = _squared_distances(real, fake, lambda part, out: torch.sub(part, origin, out=out), height)
    for rows, columns, tile in tiles:
        inside = tile < real_near.radius[rows, None]
        within[columns] += inside.sum(0)
        covering[rows] += inside.sum(1)
        recalling[rows] += (tile < fake_near.radius[columns]).sum(1)
        strip = squares[: len(tile)]
        strip[:, columns] = tile
        if influence and columns.stop == n:
            coverage_loss += torch.bincount(strip.argmin(1)[covering[rows] == 1], minlength=n)
            for few in (recalling[rows] <= 1).nonzero()[:, 0].split(64):  # In two balls or more, one is always left.
                recall_loss += _recall_lost(strip[few], fake_near)
    per_sample = PRDC((within > 0).double(), None, within.double() / k, None)
    recalled, covered = (recalling > 0).double(), (covering > 0).double()
    value = PRDC(per_sample.precision.mean(), recalled.mean(), per_sample.density.mean(), covered.mean())
    if not influence:
        return value
    left_out = (n - 1) / m
    return value, PRDC(
        _centred(per_sample.precision),
        _centred(recall_loss * left_out),
        _centred(per_sample.density),
        _centred(coverage_loss * left_out),
    )


def _recall_lost(squares, near):
    """How many of the real samples are no longer recalled without each of the fake ones, less how many are anew.

    squares: [C, N], squared distances of real to fake samples, whose `Neighbours` are `near`. Without a sample its
    ball is gone, and the balls that had it as one of their k neighbours reach to the next one.
    """
    in_fake = squares < near.radius
    row, ball = ((squares < near.next_radius) & ~in_fake).nonzero().unbind(1)
    grown = torch.zeros_like(in_fake)  # [C, N]: without this sample, a larger ball holds this row.
    grown[row[:, None], near.index[ball]] = True
    alone = in_fake.any(1)
    return (in_fake & ~grown)[alone].sum(0) - grown[~alone].sum(0)


def expected_coverage(num_real: int, num_fake: int, k: int = 5) -> float:
    """Coverage of a perfect model: real and fake samples of one distribution (Naeem et al. 2020, sec. 3.3)."""
    missed = math.prod((num_real - i) / (num_real + num_fake - i) for i in range(1, k + 1))
    return 1 - missed


@overload
def vendi(features: torch.Tensor, influence: Literal[False] = False) -> torch.Tensor: ...
@overload
def vendi(features: torch.Tensor, influence: Literal[True]) -> tuple[torch.Tensor, torch.Tensor]: ...
def vendi(features, influence=False):
    """Vendi score (Friedman and Dieng 2023, sec. 3): the effective number of different samples, 1 to N.

    features: [N, D]; the kernel is their cosine. The eigenvalues of the kernel over N are those of the D x D
    matrix of second moments: the smaller of the two is decomposed. Returns float64 [].
    """
    _check(features)
    n = len(features)
    wide = features.shape[1] >= n
    if wide:
        x = _unit(features).double()
        moments = x @ x.mT
    else:
        moments = _second_moments(_unit(part, out=part) for part in _in_double(features))
    values, vectors = torch.linalg.eigh(moments / n)
    values = values.clamp(min=0)
    entropy = -torch.special.xlogy(values, values).sum()
    value = entropy.exp()
    if not influence:
        return value
    log = torch.where(values > 1e-12, values, 1).log()
    # x' log(C) x of every sample, C the second moments.
    if wide:
        inner = vectors.square() @ (n * values * log)
    else:
        parts = _products((_unit(part, out=part) for part in _in_double(features)), vectors)
        inner = torch.cat([along.square_() @ log for _, along in parts])
    return value, -value * _centred(inner)


@overload
def mean_distance(
    features: torch.Tensor, influence: Literal[False] = False, near: Neighbours | None = None
) -> torch.Tensor: ...
@overload
def mean_distance(
    features: torch.Tensor, influence: Literal[True], near: Neighbours | None = None
) -> tuple[torch.Tensor, torch.Tensor]: ...
def mean_distance(features, influence=False, near=None):
    """Mean Euclidean distance between two different samples of features [N, D], float64 []; N of 2 or more.

    near: their `neighbours`, if they are known.
    """
    means = (near or neighbours(features)).distance
    return (means.mean(), 2 * _centred(means)) if influence else means.mean()


# ----------------------------------------------------------------------------
# Values of single images; a set's metric is their mean.

LUMA = (0.299, 0.587, 0.114)  # Of R, G and B, ITU-R BT.601.


def clip_score(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """CLIP score (Hessel et al. 2021, sec. 3) on the scale of 0 to 100: 100 max(cos, 0), not their 2.5 max(cos, 0).

    image, text: CLIP embeddings of images and of their prompts, [N, D] each. Returns float64 [N].
    """
    if image.shape != text.shape:
        raise ValueError(
            f"each image needs one prompt: {tuple(image.shape)} embeddings, {tuple(text.shape)} of prompts"
        )
    return 100 * (_unit(image).double() * _unit(text).double()).sum(1).clamp(min=0)


def pixel_statistics(stripes: np.ndarray | Iterable[np.ndarray]) -> torch.Tensor:
    """Saturation, contrast and clipping of one image, float32 [3]: what shows first when guidance is too strong.

    stripes: uint8 array [H, W, 3], RGB, or several [h, W, 3] one below the other, to save memory. Mean
    saturation of the HSV model; RMS contrast, the standard deviation of luma (ITU-R BT.601) on the scale of 0 to 1
    (Peli 1990); share of pixels with a channel at 0 or 255.
    """
    num = saturated = clipped = total = total_square = 0
    origin = None
    for stripe in [stripes] if isinstance(stripes, np.ndarray) else stripes:
        if origin is None:
            origin = np.float32(stripe[0, 0] @ np.array(LUMA))  # Near the mean, so that the squares keep their digits.
        r, g, b = (np.ascontiguousarray(stripe[..., i]) for i in range(3))  # Planes, in numpy: it runs in threads.
        high, low = np.maximum(np.maximum(r, g), b), np.minimum(np.minimum(r, g), b)
        num += r.size
        saturated += np.divide(high - low, np.maximum(high, 1), dtype=np.float32).sum(dtype=np.float64)
        clipped += int(((low == 0) | (high == 255)).sum())
        luma = sum(np.float32(w) * plane.astype(np.float32) for w, plane in zip(LUMA, (r, g, b), strict=True)) - origin
        total += luma.sum(dtype=np.float64)
        total_square += np.square(luma).sum(dtype=np.float64)
    variance = max(0.0, total_square / num - (total / num) ** 2)
    return torch.tensor([saturated / num, math.sqrt(variance) / 255, clipped / num], dtype=torch.float32)


# ----------------------------------------------------------------------------
# What a number of samples is too small for.


def caveat(metric: str, value: float, num: int, num_reference: int, dim: int, k: int = 5) -> str | None:
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


def _unit(x, out=None):
    """x [N, D] with rows of norm 1, those of zeros as they are; in float32 unless x is float64, or into `out`."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.div(x, torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_(min=1e-12), out=out)


def _in_double(features):
    """Yield features [N, D] in parts of float64, in one buffer that is used again."""
    step = max(1, CHUNK // 2 // features.shape[1])
    buffer = features.new_empty([min(step, len(features)), features.shape[1]], dtype=torch.float64)
    for part in features.split(step):
        yield buffer[: len(part)].copy_(part)


def _products(parts, matrix):
    """Yield `(part, part @ matrix)` of float64 parts, the largest first, in one buffer that is used again."""
    buffer = None
    for part in parts:
        buffer = part.new_empty([len(part), matrix.shape[1]]) if buffer is None else buffer
        yield part, torch.mm(part, matrix, out=buffer[: len(part)])


def _squared_norms(x):
    """Of each row of x [N, D]: [N]. A copy of x is not made, as `square` would."""
    return torch.linalg.vector_norm(x, dim=1).square_()


def _second_moments(parts):
    """Sum of x'x [D, D] over parts [n, D] of float64."""
    first = next(parts := iter(parts))
    total = first.mT @ first
    for part in parts:
        total.addmm_(part.mT, part)
    return total


def _squared_distances(x, y, prepare, height=CHUNK):
    """Yield `(rows, columns, squares)`: tiles [R, C] of squared distances between x [N, D] and y [M, D].

    rows, columns: slices of x and y, rows of at most `height`. Without y, of x with itself: the tiles on the diagonal
    and above it. prepare(part, out): scales or moves a part of either before; near the origin float32 keeps the digits
    that matter. All buffers are used again, as glibc keeps what it is given back at this size, in pieces; the caller
    may change `squares`.
    """
    upper, y = y is None, x if y is None else y
    side = max(1, min(math.isqrt(CHUNK), CHUNK // x.shape[1]))
    height, width = min(height, side, len(x)), min(side, len(y))
    a_buffer, b_buffer = x.new_empty([height, x.shape[1]]), x.new_empty([width, x.shape[1]])
    buffer = x.new_empty(height * width)
    columns_of_y = [slice(i, min(i + width, len(y))) for i in range(0, len(y), width)]
    norms = [_squared_norms(prepare(y[c], b_buffer[: c.stop - c.start])) for c in columns_of_y]
    for start in range(0, len(x), height):
        rows = slice(start, min(start + height, len(x)))
        a = prepare(x[rows], a_buffer[: rows.stop - rows.start])
        a_norm = _squared_norms(a)[:, None]
        for columns, b_norm in zip(columns_of_y, norms, strict=True):
            if upper and columns.start < rows.start:
                continue
            b = prepare(y[columns], b_buffer[: columns.stop - columns.start])
            squares = buffer[: len(a) * len(b)].view(len(a), len(b))
            torch.addmm(b_norm.expand_as(squares), a, b.mT, alpha=-2, out=squares)
            yield rows, columns, squares.add_(a_norm).clamp_(min=0)


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
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"features must be float32 or float64, got {x.dtype}")
        if not all(bound.isfinite() for bound in x.aminmax()):  # In place: `isfinite` would copy x.
            raise ValueError("features hold NaN or infinity; is the network's precision too low?")
