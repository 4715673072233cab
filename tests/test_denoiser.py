"""CFGDenoiser: every evaluation of every k-diffusion sampler, against references evaluated from the same x."""

import collections
import contextlib
import copy
import inspect
import itertools
import math
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from guidance_interval import CFGDenoiser, GuidanceInterval, sampler_patch
from guidance_interval.toy.sampling import get_sampler, karras_sigmas, schedule_args
from hypothesis import given, settings
from hypothesis import strategies as st
from k_diffusion import sampling
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_structure

SAMPLERS = sorted(
    name.removeprefix("sample_")
    for name, f in vars(sampling).items()
    if name.startswith("sample_") and inspect.isfunction(f)
)
INTERVAL = GuidanceInterval(0.1, 2.5)
WEIGHT = 3.0


def labels(lab, batch):
    cond = torch.arange(batch) % 10
    return {"class_cond": cond}, {"class_cond": torch.full_like(cond, lab.denoiser.null_class)}


def plain_cfg(inner_model, x, sigma, cond, uncond, cond_scale):
    """Classifier-free guidance as k-diffusion users write it: one batch, cond rows first."""
    both = {k: torch.cat([cond[k], uncond[k]]) for k in cond}
    c, u = inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), **both).chunk(2)
    return u + (c - u) * cond_scale


class Recorder(torch.nn.Module):
    """Keeps what a denoiser was asked and what it answered, and how many rows went into the model."""

    def __init__(self, inner_model, make):
        super().__init__()
        self.model, self.rows, self.calls = inner_model, 0, []
        self.denoiser = make(self.count)

    def count(self, x, sigma, **kwargs):
        self.rows += len(x)
        return self.model(x, sigma, **kwargs)

    def forward(self, x, sigma, **kwargs):
        denoised = self.denoiser(x, sigma, **kwargs)
        self.calls.append((x, sigma, denoised))
        return denoised


def run(recorder, lab, sampler, sigmas, batch=2):
    cond, uncond = labels(lab, batch)
    torch.manual_seed(0)
    x = torch.randn(batch, 1, 28, 28) * sigmas[0]
    fn = get_sampler(sampler)
    extra_args = dict(cond=cond, uncond=uncond, cond_scale=WEIGHT)
    with torch.inference_mode():
        return fn(recorder, x, *schedule_args(fn, sigmas), extra_args=extra_args, disable=True)


def test_the_list_of_samplers_is_k_diffusion_s():
    assert {
        "euler", "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "lms", "dpm_fast", "dpm_adaptive",
        "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde",
    } <= set(SAMPLERS)  # fmt: skip


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_evaluation_is_exact_and_at_the_floor(lab, sampler):
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL))
    run(recorder, lab, sampler, karras_sigmas(8))
    cond, uncond = labels(lab, 2)
    guided = [sigma[0] in INTERVAL for _, sigma, _ in recorder.calls]
    assert True in guided and False in guided
    with torch.inference_mode():
        for (x, sigma, denoised), g in zip(recorder.calls, guided, strict=True):
            if g:
                assert torch.equal(denoised, plain_cfg(lab.denoiser, x, sigma, cond, uncond, WEIGHT))
            else:
                assert torch.equal(denoised, lab.denoiser(x, sigma, **cond))
    floor = sum(2 + 2 * g for g in guided)
    assert recorder.rows == recorder.denoiser.rows == floor
    assert recorder.denoiser.evaluations == len(guided)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_an_interval_a_run_is_plain_cfg(lab, sampler):
    ours = Recorder(lab.denoiser, CFGDenoiser)
    theirs = Recorder(lab.denoiser, lambda inner: lambda x, sigma, **kw: plain_cfg(inner, x, sigma, **kw))
    sigmas = karras_sigmas(6)
    assert torch.equal(run(ours, lab, sampler, sigmas), run(theirs, lab, sampler, sigmas))
    assert ours.rows == theirs.rows


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_interval_a_run_is_the_conditional_model_s(lab, sampler):
    ours = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, GuidanceInterval(1e3, 1e4)))
    alone = Recorder(
        lab.denoiser, lambda inner: lambda x, sigma, cond, uncond, cond_scale: inner(x, sigma, **cond)
    )  # fmt: skip
    sigmas = karras_sigmas(6)
    assert torch.equal(run(ours, lab, sampler, sigmas), run(alone, lab, sampler, sigmas))
    assert ours.rows == alone.rows


def test_a_weight_of_1_is_no_guidance_and_evaluates_cond_alone(lab):
    cond, uncond = labels(lab, 3)
    x, sigma = torch.randn(3, 1, 28, 28), torch.ones(3)
    denoiser, alone = CFGDenoiser(lab.denoiser), lab.denoiser(x, sigma, **cond)
    for weight in (1, 1.0, 1 + 2**-52, 1 - 1e-10, [1.0, 1 + 2**-52, 1 - 2**-53], torch.ones(3)):
        denoiser.reset()
        assert torch.equal(denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=weight), alone)
        assert denoiser.rows == 3
    denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=1 + 1e-6)
    assert denoiser.rows == 3 + 6


# ----------------------------------------------------------------------------
# Batches in which every row has a noise level of its own.


class Affine(torch.nn.Module):
    """A denoiser whose rows do not depend on what they are batched with: bit-equality holds for any batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x, sigma, a, nested, flag="on"):
        self.seen.append(len(x))
        assert flag == "on"
        expand = (slice(None), *[None] * (x.ndim - 1))
        return x * a[expand] + (sigma * nested["deep"]["b"])[expand]


@st.composite
def batches(draw):
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    sigma = draw(st.lists(st.floats(0.0625, 64, width=16), min_size=1, max_size=9))
    shape = (len(sigma), *draw(st.lists(st.integers(1, 4), max_size=3)))
    lo = draw(st.floats(0, 64))
    interval = GuidanceInterval(lo, draw(st.one_of(st.floats(lo, exclude_min=True), st.just(lo + 8))))
    return torch.randn(shape).to(dtype), torch.tensor(sigma, dtype=dtype), interval


@settings(deadline=None)
@given(batches(), st.sampled_from([0.0, 0.5, 1.5, 7.0]))
def test_each_row_of_a_mixed_batch_is_judged_by_its_own_sigma(batch, weight):
    x, sigma, interval = batch
    n = len(x)
    cond = {"a": torch.rand(n).to(x), "nested": {"deep": {"b": torch.rand(n).to(x)}}, "flag": "on"}
    uncond = {"a": torch.rand(n).to(x), "nested": {"deep": {"b": torch.rand(n).to(x)}}, "flag": "on"}
    model = Affine()
    denoiser = CFGDenoiser(model, interval)
    denoised = denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=weight)

    guided = interval.mask(sigma)
    c, u = model(x, sigma, **cond), model(x, sigma, **uncond)
    expected = torch.where(guided.view(-1, *[1] * (x.ndim - 1)), u + (c - u) * weight, c)
    assert denoised.dtype == x.dtype and torch.equal(denoised, expected)
    assert model.seen[0] == denoiser.rows == n + int(guided.sum())


def test_a_mixed_batch_of_the_shipped_model(lab):
    """The network's last bits depend on the batch: equal to rounding here, and bit for bit in the same batch."""
    cond, uncond = labels(lab, 4)
    x, sigma = torch.randn(4, 1, 28, 28), torch.tensor([5.0, 1.0, 0.05, 2.5])
    denoiser = CFGDenoiser(lab.denoiser, INTERVAL)
    with torch.inference_mode():
        denoised = denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=WEIGHT)
        index = torch.tensor([1, 3])
        batch = {"class_cond": torch.cat([cond["class_cond"], uncond["class_cond"][index]])}
        out = lab.denoiser(torch.cat([x, x[index]]), torch.cat([sigma, sigma[index]]), **batch)
        c, u = out[:4], out[4:]
        expected = c.clone()
        expected[index] = u + (c[index] - u) * WEIGHT
        assert torch.equal(denoised, expected)
        assert denoiser.rows == 6
        torch.testing.assert_close(denoised[[0, 2]], lab.denoiser(x, sigma, **cond)[[0, 2]], rtol=1e-5, atol=1e-5)
        full = plain_cfg(lab.denoiser, x, sigma, cond, uncond, WEIGHT)
        torch.testing.assert_close(denoised[index], full[index], rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_mixed_batch():
    x = torch.randn(3, 2, requires_grad=True)
    kwargs = {"a": torch.full((3,), 2.0), "nested": {"deep": {"b": torch.ones(3)}}}
    uncond = {"a": torch.full((3,), 1.0), "nested": {"deep": {"b": torch.ones(3)}}}
    denoiser = CFGDenoiser(Affine(), INTERVAL)
    denoiser(x, torch.tensor([9.0, 1.0, 0.01]), cond=kwargs, uncond=uncond, cond_scale=3.0).sum().backward()
    assert x.grad[:, 0].tolist() == [2.0, 4.0, 2.0]  # Guided: 1 + (2 - 1) * 3.


# ----------------------------------------------------------------------------
# A schedule given up front, and the authors' rule.


def reference_per_step(model, x, sigmas, first, last, cond, uncond, weight):
    """Heun's method with guidance decided once per step, by its index, in the manner of the authors' sampler."""
    steps = len(sigmas) - 1
    ones = torch.ones(len(x))
    for i in range(steps):
        guided = first <= i <= last

        def denoise(x, sigma, guided=guided):
            if guided:
                return plain_cfg(model, x, sigma * ones, cond, uncond, weight)
            return model(x, sigma * ones, **cond)

        d = (x - denoise(x, sigmas[i])) / sigmas[i]
        dt = sigmas[i + 1] - sigmas[i]
        x_2 = x + d * dt
        if sigmas[i + 1] > 0:
            d_2 = (x_2 - denoise(x_2, sigmas[i + 1])) / sigmas[i + 1]
            x_2 = x + (d + d_2) / 2 * dt
        x = x_2
    return x


# Ancestral steps go down to s1^2 / s0, whose geometric mean with s0 is s1: two evaluations at Heun's noise levels.
LIKE_HEUN = {"heun", "dpm_2_ancestral", "dpmpp_2s_ancestral"}


@pytest.mark.parametrize("sampler", sorted(LIKE_HEUN))
def test_per_step_keeps_the_decision_of_each_step(lab, sampler):
    sigmas = karras_sigmas(8)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    run(recorder, lab, sampler, sigmas)
    cond, uncond = labels(lab, 2)
    with torch.inference_mode():
        for i, (x, sigma, denoised) in enumerate(recorder.calls):
            if sigmas[i // 2] in INTERVAL:
                assert torch.equal(denoised, plain_cfg(lab.denoiser, x, sigma, cond, uncond, WEIGHT))
            else:
                assert torch.equal(denoised, lab.denoiser(x, sigma, **cond))


@pytest.mark.parametrize("steps_guided", [(2, 4), (0, 1), (5, 7), (0, 7)])
def test_per_step_is_the_authors_rule(lab, steps_guided):
    from guidance_interval.noise_level import steps_to_interval

    first, last = steps_guided
    sigmas = karras_sigmas(8)
    interval = steps_to_interval(sigmas, first, last)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, interval, sigmas=sigmas, per_step=True))
    x = run(recorder, lab, "heun", sigmas)
    cond, uncond = labels(lab, 2)
    torch.manual_seed(0)
    start = torch.randn(2, 1, 28, 28) * sigmas[0]
    with torch.inference_mode():
        expected = reference_per_step(lab.denoiser, start, sigmas, first, last, cond, uncond, WEIGHT)
    assert torch.equal(x, expected)
    evaluations = [2] * 7 + [1]
    assert recorder.rows == sum(2 * n * (2 if first <= i <= last else 1) for i, n in enumerate(evaluations))


def test_per_step_differs_from_the_paper_s_rule_at_the_edges_alone(lab):
    sigmas = karras_sigmas(8)
    by_step = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    by_sigma = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL))
    assert not torch.equal(run(by_step, lab, "heun", sigmas), run(by_sigma, lab, "heun", sigmas))
    assert by_step.rows == by_sigma.rows  # One evaluation moves across at either end.


@pytest.mark.parametrize("sampler", sorted(set(SAMPLERS) - LIKE_HEUN))
def test_per_step_refuses_another_sampler_before_it_is_evaluated(lab, sampler):
    sigmas = karras_sigmas(8)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    with pytest.raises(RuntimeError, match=r"follows sample_heun.*evaluation \d of 15 is at .*; leave per_step"):
        run(recorder, lab, sampler, sigmas)
    plan = [s for step in itertools.pairwise(sigmas) for s in step]
    for (_, sigma, _), planned in zip(recorder.calls, plan, strict=False):
        torch.testing.assert_close(sigma, planned.expand(2), rtol=1e-4, atol=0)


def test_per_step_refuses_another_schedule_and_a_shorter_one(lab):
    recorder = Recorder(
        lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=karras_sigmas(8), per_step=True)
    )
    with pytest.raises(RuntimeError, match=r"evaluation 2 of 15 is at 19\.26, but the sampler evaluates at 14\.05"):
        run(recorder, lab, "heun", karras_sigmas(6))
    with pytest.raises(RuntimeError, match=r"evaluation 1 of 15 is at 40, but the sampler evaluates at 19\.26"):
        run(recorder, lab, "heun", karras_sigmas(8)[1:])


def test_per_step_follows_a_schedule_that_ends_above_0(lab):
    sigmas = karras_sigmas(8)[:6]
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    first = run(recorder, lab, "heun", sigmas)  # Heun's method evaluates where it ends, too.
    assert recorder.denoiser.evaluations == 10 and torch.equal(run(recorder, lab, "heun", sigmas), first)


def test_per_step_starts_afresh_after_any_run(lab):
    sigmas = karras_sigmas(8)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    first = run(recorder, lab, "heun", sigmas)
    assert torch.equal(run(recorder, lab, "heun", sigmas), first)
    with pytest.raises(RuntimeError, match="follows sample_heun"):
        run(recorder, lab, "euler", sigmas)
    assert torch.equal(run(recorder, lab, "heun", sigmas), first)
    x, sigma, _ = recorder.calls[0]
    cond, uncond = labels(lab, 2)
    recorder.denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=WEIGHT)  # A run that is cut short.
    recorder.rows = 0
    recorder.denoiser.reset()
    assert torch.equal(run(recorder, lab, "heun", sigmas), first)
    assert recorder.denoiser.rows == recorder.rows and recorder.denoiser.evaluations == 15


def test_per_step_forgives_what_a_logarithm_rounds_and_no_more():
    x, cond = torch.ones(1, 3, dtype=torch.float64), {"a": torch.ones(1, 1)}
    for off, refused in ((1 + 5e-5, False), (1 - 5e-5, False), (1 + 2e-4, True), (1 - 2e-4, True)):
        denoiser = CFGDenoiser(lambda x, sigma, a: x, INTERVAL, sigmas=[4.0, 2.0, 0.0], per_step=True)
        with pytest.raises(RuntimeError, match="evaluation 1 of 3") if refused else contextlib.nullcontext():
            denoiser(x, torch.tensor([4 * off], dtype=torch.float64), cond=cond, uncond=cond, cond_scale=WEIGHT)


@pytest.mark.parametrize("kind", [list, torch.Tensor.double, torch.Tensor.numpy, torch.Tensor.tolist])
def test_the_schedule_of_per_step_may_be_a_list_or_an_array(lab, kind):
    sigmas = karras_sigmas(8)
    runs = []
    for form in (sigmas, kind(sigmas)):
        recorder = Recorder(lab.denoiser, lambda inner, s=form: CFGDenoiser(inner, INTERVAL, sigmas=s, per_step=True))
        runs.append((run(recorder, lab, "heun", sigmas), recorder.rows))
    assert torch.equal(runs[0][0], runs[1][0]) and runs[0][1] == runs[1][1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_per_step_follows_a_run_in_another_dtype(dtype):
    sigmas = karras_sigmas(8)
    denoiser = CFGDenoiser(lambda x, sigma, a: x / 2, INTERVAL, sigmas=sigmas, per_step=True)
    extra_args = dict(cond={"a": torch.ones(2, 1)}, uncond={"a": torch.zeros(2, 1)}, cond_scale=WEIGHT)
    sampling.sample_heun(denoiser, torch.ones(2, 3, dtype=dtype), sigmas.to(dtype), extra_args=extra_args, disable=True)
    guided = INTERVAL.mask(sigmas[:-1])
    assert denoiser.rows == sum(2 * n * (1 + g) for n, g in zip([2] * 7 + [1], guided.tolist(), strict=True))


def test_a_schedule_that_misses_the_interval_warns(lab):
    with pytest.warns(UserWarning, match="sigma 40 to 0.01, lies in the guidance interval"):
        CFGDenoiser(lab.denoiser, GuidanceInterval(100, 200), sigmas=karras_sigmas(8), per_step=True)


# ----------------------------------------------------------------------------
# What conds and weights may be.


class Sum(torch.nn.Module):
    """A denoiser that adds up all that it is given, wherever it is, so that any row in the wrong place shows."""

    def forward(self, x, sigma, **kwargs):
        self.kwargs = kwargs
        tensors = [t.reshape(len(x), -1).sum(1) for t in tree_leaves(kwargs) if isinstance(t, torch.Tensor)]
        return x * (sigma + sum(tensors))[:, None]


CONDS = {
    "LDM's lists": lambda: {"c_crossattn": [torch.randn(3, 7, 4)], "c_concat": [torch.randn(3, 2), torch.rand(3)]},
    "tuples": lambda: {"residuals": (torch.randn(3, 2), torch.randn(3, 4))},
    "diffusers' nested dicts": lambda: {"context": torch.randn(3, 7, 4), "added": {"time_ids": torch.randn(3, 6)}},
    "all of them": lambda: {
        "a": [{"b": (torch.randn(3), [torch.randn(3, 1)])}],
        "scale": 0.5,
        "none": None,
        "on": True,
    },
    "NumPy values": lambda: {"a": torch.rand(3), "array": np.arange(6.0), "number": np.float32(0.1), "names": ["x"]},
    "numbers of two kinds": lambda: {"a": torch.rand(3), "scale": random.choice([2, 2.0, np.int64(2), np.float32(2)])},
    "nothing": dict,
}


@pytest.mark.parametrize("make", CONDS.values(), ids=CONDS)
@pytest.mark.parametrize("levels", [[1.0, 2.0, 0.5], [9.0, 1.0, 0.01], [9.0, 9.0, 9.0]])
def test_conds_are_joined_wherever_their_tensors_are(make, levels):
    x, sigma, cond, uncond, model = torch.randn(3, 5), torch.tensor(levels), make(), make(), Sum()
    denoised = CFGDenoiser(model, INTERVAL)(x, sigma, cond=cond, uncond=uncond, cond_scale=WEIGHT)
    assert tree_structure(model.kwargs) == tree_structure(cond)
    c, u = model(x, sigma, **cond), model(x, sigma, **uncond)
    assert torch.equal(denoised, torch.where(INTERVAL.mask(sigma)[:, None], u + (c - u) * WEIGHT, c))


WEIGHTS = {
    "list": list,
    "tuple": tuple,
    "array": np.array,
    "tensor": torch.tensor,
    "float64": lambda w: torch.tensor(w, dtype=torch.float64),
    "list of tensors": lambda w: [torch.tensor(v) for v in w],
}


IN_FLOAT32 = ("tensor", "list of tensors")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_weight_per_row_is_that_number_for_the_row(kind, dtype):
    """7.3 and 0.1 have no exact form in any of the dtypes; a weight of 1 leaves its row at the cond alone."""
    weights = [7.3, 1.0, 0.1, 1.0, 7.3]
    x, sigma = torch.randn(5, 2, 3).to(dtype), torch.tensor([1.0, 1.0, 2.0, 9.0, 9.0], dtype=dtype)
    cond, uncond = ({"a": torch.rand(5).to(x), "nested": {"deep": {"b": torch.rand(5).to(x)}}} for _ in range(2))
    denoiser = CFGDenoiser(Affine(), INTERVAL)
    denoised = denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=WEIGHTS[kind](weights))
    assert denoised.dtype == dtype and denoiser.rows == 5 + 2  # Rows 0 and 2: in the interval, and not of weight 1.
    for row, weight in enumerate(weights):
        weight = torch.tensor(weight).item() if kind in IN_FLOAT32 else weight
        alone = CFGDenoiser(Affine(), INTERVAL)(x, sigma, cond=cond, uncond=uncond, cond_scale=weight)
        assert torch.equal(denoised[row], alone[row])


@pytest.mark.parametrize("number", [3, np.float32(3), np.int64(3), np.array(3.0), torch.tensor(3.0), torch.tensor(3)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_number_may_be_of_any_kind(number, dtype):
    x, sigma = torch.randn(2, 3).to(dtype), torch.ones(2, dtype=dtype)
    cond, uncond = {"a": torch.rand(2, 1).to(x)}, {"a": torch.rand(2, 1).to(x)}
    expected = CFGDenoiser(Sum())(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    assert torch.equal(CFGDenoiser(Sum())(x, sigma, cond=cond, uncond=uncond, cond_scale=number), expected)


def test_a_sampler_runs_with_a_weight_per_row(lab):
    weights = torch.tensor([1.0, 3.0])
    denoiser, sigmas = CFGDenoiser(lab.denoiser, INTERVAL), karras_sigmas(8)
    cond, uncond = labels(lab, 2)
    x = torch.randn(2, 1, 28, 28) * sigmas[0]
    for cond_scale in (weights, weights.tolist()):
        denoiser.reset()
        extra_args = dict(cond=cond, uncond=uncond, cond_scale=cond_scale)
        sampling.sample_dpmpp_2m(denoiser, x, sigmas, extra_args=extra_args, disable=True)
        assert denoiser.rows == 2 * 8 + int(INTERVAL.mask(sigmas[:-1]).sum())


def test_the_gradient_reaches_a_weight_per_row():
    weights = torch.tensor([2.0, 3.0, 1.0], requires_grad=True)
    cond, uncond = {"a": torch.tensor([2.0, 5.0, 7.0])}, {"a": torch.ones(3)}
    model = CFGDenoiser(lambda x, sigma, a: x * a[:, None], INTERVAL)
    model(torch.ones(3, 1), torch.ones(3), cond=cond, uncond=uncond, cond_scale=weights).sum().backward()
    assert weights.grad.tolist() == [1.0, 4.0, 0.0]  # cond - uncond; a weight of 1 is not guidance.


# ----------------------------------------------------------------------------
# Another device than the CPU, without one.


class There(torch.Tensor):
    """A tensor that is on another device by its own account, and whose numbers are on the CPU."""

    syncs = 0

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=numbers.dtype, device="meta")

    def __init__(self, numbers):
        self.numbers = numbers

    def tolist(self):
        There.syncs += 1
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of OtherDevice()")


class OtherDevice(TorchDispatchMode):
    """Makes "meta" a device that computes, and that refuses tensors of the CPU as an accelerator does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        there = any(isinstance(t, There) for t in tensors)
        if kwargs.get("device") is not None:
            there, kwargs["device"] = torch.device(kwargs["device"]).type == "meta", "cpu"
        elif there and any(t.ndim and not isinstance(t, There) for t in tensors):
            raise RuntimeError(f"{func}: expected all tensors on one device")
        if func is torch.ops.aten._local_scalar_dense.default and there:
            There.syncs += 1
            there = False
        args, kwargs = tree_map(lambda t: t.numbers if isinstance(t, There) else t, (args, kwargs))
        out = func(*args, **kwargs)
        return tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) else t, out) if there else out


@pytest.mark.parametrize("levels", [[1.0, 2.0, 0.5], [9.0, 1.0, 0.01], [9.0, 9.0, 9.0]])
@pytest.mark.parametrize(
    ("weight", "there", "syncs"),
    [
        (3.0, False, 1),
        ([3.0, 1.0, 2.0], False, 1),
        (torch.tensor([3.0, 2.0, 1.0]), False, 1),
        (torch.tensor([3.0, 2.0, 1.0]), True, 2),
        (torch.tensor(3.0), True, 2),
    ],
)
def test_another_device_gives_what_the_cpu_gives_for_one_sync(levels, weight, there, syncs):
    x, sigma = torch.randn(3, 5), torch.tensor(levels)
    cond, uncond = CONDS["LDM's lists"](), CONDS["LDM's lists"]()
    here = CFGDenoiser(Sum(), INTERVAL)
    expected = here(x, sigma, cond=cond, uncond=uncond, cond_scale=weight)
    with OtherDevice():
        moved = tree_map(lambda t: t.to("meta") if isinstance(t, torch.Tensor) else t, (x, sigma, cond, uncond))
        weight = weight.to("meta") if there else weight
        denoiser = CFGDenoiser(Sum(), INTERVAL)
        There.syncs = 0
        denoised = denoiser(*moved, weight)
        assert There.syncs == syncs
    assert torch.equal(denoised.numbers, expected) and denoiser.rows == here.rows


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_k_diffusion_s_samplers_wait_for_the_device_themselves(sampler):
    """Why each sigma is read: but for two of them, nothing would be saved."""
    fn, sigmas = get_sampler(sampler), karras_sigmas(8)
    with OtherDevice():
        args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in schedule_args(fn, sigmas)]
        kwargs = {"noise_sampler": lambda *_: 0.0} if "noise_sampler" in inspect.signature(fn).parameters else {}
        x = torch.randn(2, 3).to("meta")
        There.syncs = 0
        fn(lambda x, sigma: x / 2, x, *args, disable=True, **kwargs)
        waits = There.syncs
    assert waits == 0 if sampler in ("lms", "dpm_fast") else waits >= 7


def test_per_step_on_another_device_for_one_sync_per_evaluation():
    sigmas = karras_sigmas(8)
    levels = [s for step in itertools.pairwise(sigmas) for s in step][:-1]
    with OtherDevice():
        denoiser = CFGDenoiser(Sum(), INTERVAL, sigmas=sigmas.to("meta"), per_step=True)
        x, cond = torch.randn(2, 3).to("meta"), {"a": torch.rand(2, 1).to("meta")}
        There.syncs = 0
        for sigma in levels:
            denoiser(x, sigma.repeat(2).to("meta"), cond=cond, uncond=cond, cond_scale=3.0)
        assert There.syncs == len(levels)
        with pytest.raises(RuntimeError, match=r"evaluation 1 of 15 is at 40, but the sampler evaluates at 19\.26"):
            denoiser(x, sigmas[1].repeat(2).to("meta"), cond=cond, uncond=cond, cond_scale=3.0)
    guided = INTERVAL.mask(sigmas[:-1])
    assert denoiser.rows == sum(2 * n * (1 + g) for n, g in zip([2] * 7 + [1], guided.tolist(), strict=True))


# ----------------------------------------------------------------------------
# torch.compile.


class Graphs:
    """A backend of torch.compile that runs each graph as it is and counts its runs."""

    def __init__(self):
        self.runs = []

    def __call__(self, graph, inputs):
        number = len(self.runs)
        self.runs.append(0)

        def run(*args):
            self.runs[number] += 1
            return graph(*args)

        return run


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed = torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Embedding(11, 1)

    def forward(self, x, sigma, class_cond):
        shift = self.embed(class_cond) + sigma[:, None].log()
        return torch.tanh(self.conv(x / sigma[:, None, None, None]) + shift[:, :, None, None])


@pytest.mark.parametrize("what", ["the wrapper", "the inner model"])
@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("weight", [3.0, [3.0, 2.0]], ids=str)
def test_compiled_there_are_two_graphs_and_no_more(lab, graphs, what, per_step, weight):
    """One of B rows and one of 2 B, over all evaluations of several runs, and nothing else changes."""
    sigmas, (cond, uncond), model = karras_sigmas(8), labels(lab, 2), Small()

    def run(compiled):
        inner_model = torch.compile(model, backend=graphs, dynamic=False) if compiled == "the inner model" else model
        denoiser = CFGDenoiser(inner_model, INTERVAL, sigmas=sigmas if per_step else None, per_step=per_step)
        wrapper = torch.compile(denoiser, backend=graphs) if compiled == "the wrapper" else denoiser
        extra_args, samples = dict(cond=cond, uncond=uncond, cond_scale=weight), []
        for seed in range(3):
            x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * sigmas[0]
            with torch._dynamo.config.patch(error_on_recompile=seed > 0):  # Of what holds no graph, too.
                samples.append(sampling.sample_heun(wrapper, x, sigmas, extra_args=extra_args, disable=True))
        return torch.stack(samples), denoiser.rows, denoiser.evaluations

    expected, rows, evaluations = run(None)
    assert evaluations == 3 * 15 and graphs.runs == []
    samples, *counted = run(what)
    assert torch.equal(samples, expected) and counted == [rows, evaluations]
    guided = (rows - 2 * evaluations) // 2
    assert sorted(graphs.runs) == sorted([guided, evaluations - guided])


def test_compiled_a_bad_input_raises_what_it_raises_otherwise(graphs):
    denoiser = torch.compile(CFGDenoiser(Sum(), INTERVAL), backend=graphs)
    with pytest.raises(TypeError, match="uncond must be a dict of keyword arguments"):
        denoiser(torch.ones(2, 3), torch.ones(2), cond={}, uncond=None, cond_scale=3.0)


def test_importing_and_copying_do_without_the_compiler():
    code = "import sys, guidance_interval as g; g.CFGDenoiser(abs); print('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_counts_for_itself(lab, clone):
    original = CFGDenoiser(lab.denoiser, INTERVAL, sigmas=karras_sigmas(8), per_step=True)
    cond, uncond = labels(lab, 2)
    args = (torch.randn(2, 1, 28, 28), torch.full((2,), 40.0), cond, uncond, 3.0)
    original(*args)
    twin = clone(original)
    assert torch.equal(twin(*args), original(*args))
    assert (twin.rows, original.rows) == (4, 4)
    twin.reset()
    assert (twin.rows, original.rows) == (0, 4)


# ----------------------------------------------------------------------------
# Bad input: named at the first evaluation, in the interval or not, and nothing is evaluated.

X, SIGMA, T = torch.randn(2, 3), torch.ones(2), torch.zeros(2, 77, 768)
Names = collections.namedtuple("Names", "a")


@pytest.mark.parametrize(
    ("cond", "uncond", "error", "says"),
    [
        ({"a": T}, {"b": T}, ValueError, r"cond and uncond must have the same keys, got dict of \['a'\] and .*\['b'\]"),
        ({"a": T}, {}, ValueError, r"same keys, got dict of \['a'\] and dict of \[\]"),
        ({"a": T}, {"a": T[:1]}, ValueError, r"cond\['a'\] and uncond\['a'\].*\[2, 77, 768\].* and .*\[1, 77, 768\]"),
        ({"a": T[:1]}, {"a": T[:1]}, ValueError, r"with the batch size 2 of x first, got Tensor \[1, 77, 768\]"),
        ({"a": T.sum()}, {"a": T.sum()}, ValueError, r"batch size 2 of x first, got Tensor \[\] float32 on cpu"),
        ({"a": T}, {"a": T.half()}, ValueError, r"same shape, dtype and device.*float32 on cpu and .*float16 on cpu"),
        ({"a": T}, {"a": T.to("meta")}, ValueError, "same shape, dtype and device.*on cpu and .* on meta"),
        ({"a": {"b": T}}, {"a": {"b": T[:, :4]}}, ValueError, r"cond\['a'\]\['b'\].*pad or repeat"),
        ({"a": {"b": T}}, {"a": {"c": T}}, ValueError, r"cond\['a'\] and uncond\['a'\] must have the same keys"),
        ({"a": {"b": T}}, {"a": T}, TypeError, r"uncond\['a'\] must be alike.*got dict of \['b'\] and Tensor \[2, 77"),
        ({"a": [T, T]}, {"a": [T]}, TypeError, r"cond\['a'\].*got list of 2 and list of 1"),
        ({"a": [T]}, {"a": (T,)}, TypeError, r"got list of 1 and tuple of 1"),
        ({"a": [T]}, {"a": T}, TypeError, r"got list of 1 and Tensor \[2, 77, 768\]"),
        ({"a": [T, [T]]}, {"a": [T, [T[:, :4]]]}, ValueError, r"cond\['a'\]\[1\]\[0\] and uncond\['a'\]\[1\]\[0\]"),
        ({"a": Names(T)}, {"a": Names(T)}, TypeError, r"got Names of 1 and Names of 1"),
        ({"a": "on"}, {"a": "off"}, TypeError, r"one value for all rows, equal in both; got str 'on' and str 'off'"),
        ({"a": 0.5}, {"a": 0.7}, TypeError, r"got float 0.5 and float 0.7"),
        ({"a": T}, {"a": 0}, TypeError, r"got Tensor \[2, 77, 768\] float32 on cpu and int 0"),
        ({"a": T}, {"a": T.numpy()}, TypeError, r"float32 on cpu and ndarray \[2, 77, 768\] float32"),
        ({"a": T.numpy()}, {"a": T.numpy() + 1}, TypeError, r"ndarray \[2, 77, 768\] float32 and ndarray"),
        ({"a": Affine()}, {"a": Affine()}, TypeError, r"got Affine and Affine"),
        ({"a": T}, None, TypeError, r"^uncond must be a dict of keyword arguments of the model.*got NoneType$"),
        ({"a": T}, {"a": None}, TypeError, r"got Tensor .* and NoneType"),
        ({"a": T}, T, TypeError, r"^uncond must be a dict.*such as {'context': tensor}, got Tensor \[2, 77, 768\]"),
        (T, T, TypeError, r"^cond must be a dict of keyword arguments.*got Tensor \[2, 77, 768\] float32 on cpu$"),
        ([T], [T], TypeError, r"^cond must be a dict of keyword arguments.*got list of 1$"),
        ("a cat", "", TypeError, r"^cond must be a dict of keyword arguments.*got str 'a cat'$"),
    ],
)
@pytest.mark.parametrize("level", [1.0, 9.0], ids=["in the interval", "outside"])
def test_bad_conds_are_named(cond, uncond, error, says, level):
    refuses(error, says, X, SIGMA * level, cond, uncond, 3.0)


@pytest.mark.parametrize(
    ("sigma", "says"),
    [
        (torch.ones(3), r"sigma must be a tensor of shape \[2\], one per row of x, got Tensor \[3\]"),
        (torch.tensor(1.0), r"got Tensor \[\] float32"),
        (torch.ones(2, 1), r"got Tensor \[2, 1\]"),
        (1.0, "got float 1.0"),
        ([1.0, 1.0], "got list of 2"),
    ],
)
def test_a_bad_sigma_is_named(sigma, says):
    refuses(TypeError if not isinstance(sigma, torch.Tensor) else ValueError, says, X, sigma, {"a": T}, {"a": T}, 3.0)


@pytest.mark.parametrize(
    ("cond_scale", "error", "says"),
    [
        ([3.0], ValueError, "cond_scale must be a number or 2, one per row, got list of 1"),
        (torch.ones(3), ValueError, r"got Tensor \[3\] float32 on cpu"),
        (torch.ones(2, 1, 1), ValueError, r"got Tensor \[2, 1, 1\]"),
        (np.ones((2, 2)), ValueError, r"got ndarray \[2, 2\] float64"),
        ("7", TypeError, "cond_scale must be a number or one per row, got str '7'"),
        (None, TypeError, "got NoneType"),
        ({"a": 1}, TypeError, r"got dict of \['a'\]"),
        (3j, TypeError, "got complex 3j"),
        ([3.0, "7"], TypeError, "got list of 2"),
        (math.nan, ValueError, "cond_scale must be finite, got nan"),
        (10**400, ValueError, "cond_scale must be finite, got inf"),
        ([3.0, 10**400], TypeError, "got list of 2"),
        (torch.tensor([3.0, math.inf]), ValueError, "cond_scale must be finite, got inf"),
    ],
)
@pytest.mark.parametrize("level", [1.0, 9.0], ids=["in the interval", "outside"])
def test_a_bad_weight_is_named(cond_scale, error, says, level):
    refuses(error, says, X, SIGMA * level, {"a": T}, {"a": T}, cond_scale)


def refuses(error, says, x, sigma, cond, uncond, cond_scale):
    asked = []
    denoiser = CFGDenoiser(lambda x, sigma, **kwargs: asked.append(x), INTERVAL)
    with pytest.raises(error, match=says) as raised:
        denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale)
    assert len(str(raised.value)) < 300 and "tensor(" not in str(raised.value)
    assert not asked and denoiser.rows == denoiser.evaluations == 0


def test_conds_that_change_during_a_run_are_looked_at_anew():
    """Whoever edits the prompt in a run may get it wrong there."""
    cond, uncond = {"a": T}, {"a": T}
    denoiser = CFGDenoiser(lambda x, sigma, a: x, INTERVAL)
    denoiser(X, SIGMA * 9, cond=cond, uncond=uncond, cond_scale=3.0)
    uncond["a"] = T[:, :4]
    with pytest.raises(ValueError, match="pad or repeat"):
        denoiser(X, SIGMA * 9, cond=cond, uncond=uncond, cond_scale=3.0)
    assert denoiser.rows == 2


def test_conds_are_looked_into_once_a_run_and_when_their_objects_change(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(sampler_patch, "_check_conds", lambda cond, uncond, batch: seen.append(batch))
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL))
    run(recorder, lab, "heun", karras_sigmas(6))
    assert seen == [2]
    recorder.denoiser.reset()
    run(recorder, lab, "euler", karras_sigmas(3), batch=3)
    assert seen == [2, 3]


def test_bad_arguments_of_the_constructor():
    with pytest.raises(TypeError, match="interval must be a GuidanceInterval or None, got tuple of 2"):
        CFGDenoiser(None, (0.1, 2.5))
    with pytest.raises(TypeError, match=r"interval must be a GuidanceInterval or None, got Tensor \[2, 77, 768\]"):
        CFGDenoiser(None, T)
    with pytest.raises(ValueError, match="per_step=True judges by step: give the schedule"):
        CFGDenoiser(None, INTERVAL, per_step=True)
    with pytest.raises(
        ValueError, match="sigmas is for per_step=True; without it, each evaluation is judged by its own"
    ):
        CFGDenoiser(None, INTERVAL, sigmas=karras_sigmas(8))
    with pytest.raises(ValueError, match=r"sigmas must be 1-D, at least 2 noise levels, got shape \[1\]"):
        CFGDenoiser(None, INTERVAL, sigmas=torch.ones(1), per_step=True)
    for sigmas in ([0, 0], [1.0, 0.0, 0.0], [1.0, math.nan, 0.0], torch.tensor([-1.0, 0.0])):
        with pytest.raises(ValueError, match=r"^sigmas must be above 0, but for the last one, got \["):
            CFGDenoiser(None, INTERVAL, sigmas=sigmas, per_step=True)
    with pytest.raises(
        TypeError, match="sigmas must be a tensor, an array or a list of noise levels, got str 'karras'"
    ):
        CFGDenoiser(None, INTERVAL, sigmas="karras", per_step=True)
