"""A schedule in numbers and as a picture: which of its steps an interval guides."""

from ..noise_level import describe_cost
from .model_patch import from_model_sigma, model_interval
from .pictures import plot_schedule, to_image


def describe_schedule(model, sigmas):
    """(plot [1, H, W, 3], table, guided steps, rows against CFG everywhere) of a patched model's run over `sigmas`.

    Counts one evaluation per step, as Euler's and most multistep samplers make. Raises ValueError for a model
    without an interval and for fewer than two noise levels.
    """
    interval = model_interval(model)
    if interval is None:
        raise ValueError("this model has no guidance interval: connect the output of a Guidance Interval node")
    if len(sigmas) < 2:
        raise ValueError(f"sigmas must hold at least 2 noise levels, got {len(sigmas)}")
    model_sampling = model.get_model_object("model_sampling")
    own = sigmas[:-1].float().cpu()
    guided = interval.mask(own).tolist()
    levels = [from_model_sigma(s, model_sampling) for s in own.tolist()]
    bounds = tuple(from_model_sigma(s, model_sampling) for s in (interval.sigma_lo, interval.sigma_hi))

    count = sum(guided)
    rows = (len(guided) + count) / (2 * len(guided))
    head = describe_cost(guided)
    lines = [head, f"interval ({bounds[0]:.4g}, {bounds[1]:.4g}]", "step  sigma     model's   guided"]
    for i, (level, s, g) in enumerate(zip(levels, own.tolist(), guided, strict=True)):
        lines.append(f"{i:>4}  {level:<8.4g}  {s:<8.4g}  {'yes' if g else '-'}")
    return to_image(plot_schedule(levels, guided, bounds, head)), "\n".join(lines), count, rows
