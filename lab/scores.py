"""What is measured of the samples of a model that ships, in the features of the networks in its file."""

import math
from dataclasses import dataclass

import torch

from ..measure.metrics import frechet_distance, influence_interval

# Raise it with every change, here or in the functions of `measure.metrics` above, that moves a number: a sweep that
# was begun with another version is then refused, where it would mix both in one table.
SCORES_VERSION = 2


@dataclass(frozen=True)
class Scores:
    """What `judge_samples` measures.

    fd: Frechet distance to the real images, and fd_low, fd_high: its 95 % confidence interval, by bootstrap.
    accuracy: share of samples that the classifier takes for the class that was asked for (adherence).
    variety: mean feature distance within a class, relative to that of the real images, of the classes with two samples.
    class_fd, class_fd_low, class_fd_high: the distance by a second judge, the classifier, where fd is in the features
    of a network that never saw the classes; NaN where the classifier's are the only ones.
    """

    fd: float
    fd_low: float
    fd_high: float
    accuracy: float
    variety: float
    class_fd: float = math.nan
    class_fd_low: float = math.nan
    class_fd_high: float = math.nan


@torch.inference_mode()
def judge_samples(lab, x, labels):
    """Return the `Scores` of images x [N, C, H, W], asked for as labels [N], and what moves them.

    The latter is float32 [3, N] on the CPU: the influence of each sample on fd, on class_fd (zeros where there is none)
    and on accuracy. With it two settings that sampled the same seeds are compared in pairs: `lab.compare`.
    """
    features, logits = map(torch.cat, zip(*(lab.classifier(part) for part in x.split(500)), strict=True))
    real = lab.reference
    judges = [(features, real["mean"], real["cov"])]
    if (ruler := getattr(lab, "ruler", None)) is not None:
        measured = torch.cat([ruler(part) for part in x.split(500)])
        judges = [(measured, real["mean"], real["cov"]), (features, real["class_mean"], real["class_cov"])]
    distances, influence = [], torch.zeros(3, len(x))
    for row, (f, mean, cov) in enumerate(judges):
        value, influence_of_fd = frechet_distance(f.double(), mean, cov, influence=True)
        distances.append((value.item(), *influence_interval(value, influence_of_fd, strata(lab, labels))))
        influence[row] = influence_of_fd.cpu()
    right, spread = (logits.argmax(1) == labels).double(), real["spread"].double()
    influence[2] = (right - right.mean()).cpu()
    accuracy = right.mean().item()
    variety = (class_spread(judges[0][0].double(), labels, len(spread)) / spread).nanmean().item()
    return Scores(*distances[0], accuracy, variety, *sum(distances[1:], ())), influence


def strata(lab, labels):
    """The labels to resample within, for `influence_interval`: None where they stand for a draw from the data's own."""
    return None if "labels" in lab.reference else labels


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
