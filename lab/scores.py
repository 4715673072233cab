"""What is measured of the samples of a model that ships, in the features of the networks in its file."""

from dataclasses import dataclass

import torch

from ..measure.metrics import frechet_distance, influence_interval

# Raise it with every change, here or in the functions of `measure.metrics` above, that moves a number: a sweep that
# was begun with another version is then refused, where it would mix both in one table.
SCORES_VERSION = 1


@dataclass(frozen=True)
class Scores:
    """What `score_samples` measures.

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
def score_samples(lab, x, labels, bootstrap_seed=0):
    """Return the `Scores` of images x [N, C, H, W] on the model's scale, asked for as labels [N]."""
    features, logits = zip(*(lab.classifier(part) for part in x.split(500)), strict=True)
    if (ruler := getattr(lab, "ruler", None)) is not None:
        features = [ruler(part) for part in x.split(500)]
    features, logits = torch.cat(features).double(), torch.cat(logits)
    mean, cov, spread = (lab.reference[k].double() for k in ("mean", "cov", "spread"))
    fd, influence = frechet_distance(features, mean, cov, influence=True)
    strata = None if "labels" in lab.reference else labels  # Those were drawn; without them each class has its share.
    low, high = influence_interval(fd, influence, strata, seed=bootstrap_seed)
    return Scores(
        fd=fd.item(),
        fd_low=low,
        fd_high=high,
        accuracy=(logits.argmax(1) == labels).double().mean().item(),
        variety=(class_spread(features, labels, len(spread)) / spread).mean().item(),
    )


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
