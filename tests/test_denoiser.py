"""CFGDenoiser: every evaluation of every k-diffusion sampler, against references evaluated from the same x."""

import inspect

import pytest
import torch
from guidance_interval import CFGDenoiser, GuidanceInterval, evaluation_sigmas
from guidance_interval.lab.sampling import get_sampler, karras_sigmas, schedule_args
from hypothesis import given, settings
from hypothesis import strategies as st
from k_diffusion import sampling

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
    denoiser = CFGDenoiser(lab.denoiser)
    assert torch.equal(denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=1), lab.denoiser(x, sigma, **cond))
    assert denoiser.rows == 3


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


def test_per_step_refuses_another_sampler_and_starts_afresh(lab):
    sigmas = karras_sigmas(8)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=sigmas, per_step=True))
    with pytest.raises(RuntimeError, match=r"did not evaluate at the given sigmas.*15 evaluations from 40 to 0.01"):
        run(recorder, lab, "euler", sigmas)
    first = run(recorder, lab, "heun", sigmas)
    assert torch.equal(run(recorder, lab, "heun", sigmas), first)  # A second run needs no reset.


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "dpm_adaptive"])
def test_evaluation_sigmas_are_those_of_the_run(lab, sampler):
    fn, sigmas = get_sampler(sampler), karras_sigmas(8)
    state = torch.random.get_rng_state()
    listed = evaluation_sigmas(fn, *schedule_args(fn, sigmas))
    assert torch.equal(torch.random.get_rng_state(), state)
    recorder = Recorder(lab.denoiser, lambda inner: CFGDenoiser(inner, INTERVAL, sigmas=listed))
    run(recorder, lab, sampler, sigmas)
    assert listed[-1] == 0
    torch.testing.assert_close(listed[:-1], torch.stack([sigma[0] for _, sigma, _ in recorder.calls]))


def test_a_schedule_that_misses_the_interval_warns(lab):
    with pytest.warns(UserWarning, match="sigma 40 to 0.01, lies in the guidance interval"):
        CFGDenoiser(lab.denoiser, GuidanceInterval(100, 200), sigmas=karras_sigmas(8))


# ----------------------------------------------------------------------------
# Bad input.

X, SIGMA = torch.randn(2, 3), torch.ones(2)
T = torch.zeros(2, 5)


@pytest.mark.parametrize(
    ("x", "sigma", "cond", "uncond", "error", "says"),
    [
        (X, torch.ones(3), {"a": T}, {"a": T}, ValueError, r"sigma must have shape \[2\].*got \[3\]"),
        (X, torch.tensor(1.0), {"a": T}, {"a": T}, ValueError, r"sigma must have shape \[2\].*got \[\]"),
        (X, torch.ones(2, 1), {"a": T}, {"a": T}, ValueError, r"got \[2, 1\]"),
        (X, SIGMA, {"a": T}, {"b": T}, ValueError, r"same keys, got \['a'\] and \['b'\]"),
        (X, SIGMA, {"a": T}, {"a": T[:1]}, ValueError, r"cond\['a'\] and uncond\['a'\].*\[2, 5\] and \[1, 5\]"),
        (X, SIGMA, {"a": T[:1]}, {"a": T[:1]}, ValueError, r"batch size 2 of x first, got \[1, 5\]"),
        (X, SIGMA, {"a": {"b": T}}, {"a": {"b": T[:, :4]}}, ValueError, r"cond\['a'\]\['b'\].*pad or repeat"),
        (X, SIGMA, {"a": {"b": T}}, {"a": {"c": T}}, ValueError, r"cond\['a'\] and uncond\['a'\] must have the same k"),
        (X, SIGMA, {"a": {"b": T}}, {"a": T}, TypeError, r"uncond\['a'\] must be a dict"),
        (X, SIGMA, {"a": T}, None, TypeError, "uncond must be a dict of keyword arguments, got NoneType"),
        (X, SIGMA, {"a": "on"}, {"a": "off"}, TypeError, r"cond\['a'\].*or the same value, got 'on' and 'off'"),
        (X, SIGMA, {"a": T}, {"a": 0}, TypeError, r"cond\['a'\] and uncond\['a'\] must be tensors"),
    ],
)
def test_bad_input_is_named_and_counts_nothing(x, sigma, cond, uncond, error, says):
    denoiser = CFGDenoiser(lambda x, sigma, **kwargs: x)
    with pytest.raises(error, match=says):
        denoiser(x, sigma, cond=cond, uncond=uncond, cond_scale=3.0)
    assert denoiser.rows == denoiser.evaluations == 0


def test_bad_arguments_of_the_constructor():
    with pytest.raises(TypeError, match=r"interval must be a GuidanceInterval or None, got \(0.1, 2.5\)"):
        CFGDenoiser(None, (0.1, 2.5))
    with pytest.raises(ValueError, match="per_step=True judges by step index: give the schedule"):
        CFGDenoiser(None, INTERVAL, per_step=True)
    with pytest.raises(ValueError, match=r"sigmas must be 1-D, at least 2 noise levels, got shape \[1\]"):
        CFGDenoiser(None, INTERVAL, sigmas=torch.ones(1))
