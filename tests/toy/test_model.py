"""The lab: the model file, its training, the metrics and the sampling."""

import json

import numpy as np
import pytest
import torch
from guidance_interval import GuidanceInterval, cli
from guidance_interval.errors import UserError
from guidance_interval.lab import scores, train
from guidance_interval.measure import metrics
from guidance_interval.toy import data, model, sampling
from safetensors.torch import save_file
from scipy import linalg

# ----------------------------------------------------------------------------
# The model that ships.


def test_the_shipped_file_is_small_and_says_how_it_was_made(lab):
    assert model.SHIPPED.stat().st_size < 4 * 2**20
    assert {"data", "steps", "seed", "device", "seconds", "classifier_held_out_accuracy"} <= lab.record.keys()
    assert lab.record["classifier_held_out_accuracy"] > 0.98


def test_the_shipped_statistics_are_those_of_the_real_images(lab):
    images, labels = data.load_digits()
    x = data.to_model(images, lab.config["pixel_mean"], lab.config["pixel_std"])
    assert x.mean().abs() < 1e-3 and abs(x.std() - lab.config["sigma_data"]) < 1e-3
    again = train.reference_statistics(lab.classifier, x, torch.as_tensor(labels))
    for key, value in again.items():
        torch.testing.assert_close(value, lab.reference[key], rtol=1e-3, atol=1e-5)
    measured = scores.judge_samples(lab, x, torch.as_tensor(labels))[0]
    assert measured.fd < 1e-6 and measured.variety == pytest.approx(1, abs=1e-3) and measured.accuracy > 0.98


def test_pixels_round_trip(lab):
    images, _ = data.load_digits()
    scale = lab.config["pixel_mean"], lab.config["pixel_std"]
    back = data.to_pixels(data.to_model(images[:50], *scale), *scale)[:, 0]
    assert torch.equal(back, torch.as_tensor(images[:50]))


def test_the_denoiser_denoises(lab):
    """Far below the trivial error, which is that of answering with the mean (0) or with the input."""
    images, labels = data.load_digits()
    i = torch.arange(0, 5000, 25)
    x = data.to_model(images[i], lab.config["pixel_mean"], lab.config["pixel_std"])
    class_cond, sigma = torch.as_tensor(labels)[i], torch.full([len(i)], 0.5)
    with torch.inference_mode():
        denoised = lab.denoiser(x + torch.randn_like(x) * 0.5, sigma, class_cond=class_cond)
    assert (denoised - x).square().mean() < 0.1 * x.square().mean()


def test_scalings_are_edm_s(lab):
    sigma = torch.tensor([0.01, 0.5, 40.0])
    c_skip, c_out, c_in = lab.denoiser.get_scalings(sigma)
    torch.testing.assert_close(c_in**2 * (0.25 + sigma**2), torch.ones(3))  # Unit variance in ...
    torch.testing.assert_close((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2, c_out**2)  # ... and out (eq. 119).


@pytest.mark.parametrize("how", ["missing", "text", "truncated", "foreign", "newer", "unfit"])
def test_a_model_file_that_is_none_is_refused_by_name(tmp_path, how):
    path = tmp_path / "model.safetensors"
    shipped = model.SHIPPED.read_bytes()
    config = json.dumps(dict(unet={}, classifier={}, sigma_data=0.5))
    if how == "text":
        path.write_text("not a model")
    elif how == "truncated":
        path.write_bytes(shipped[: len(shipped) // 2])
    elif how == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    elif how == "newer":
        save_file({"weight": torch.zeros(2)}, path, {"format": "guidance-interval-lab/9"})
    elif how == "unfit":
        save_file({"weight": torch.zeros(2)}, path, {"format": model.FORMAT, "config": config, "record": "{}"})
    says = {
        "missing": "does not exist; `make train` writes one",
        "text": "is not a readable safetensors file",
        "truncated": "is not a readable safetensors file",
        "foreign": "has format None, not 'guidance-interval-lab/1'",
        "newer": "has format 'guidance-interval-lab/9'",
        "unfit": "its contents do not fit",
    }[how]
    with pytest.raises(UserError, match=says) as error:
        model.load(path)
    assert str(path) in str(error.value)


def test_training_writes_a_model_file_that_loads(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    args = ["--out", str(path), "--device", "cpu", "--steps", "3", "--batch", "32", "--classifier-steps", "60"]
    assert cli.main(["train", *args]) == 0
    lab = model.load(path)
    assert lab.record["steps"] == 3
    assert lab.record["classifier_held_out_accuracy"] > 0.5
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert "of the held-out digits are right" in capsys.readouterr().out


def test_an_interrupted_write_leaves_the_old_file(tmp_path, lab, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    monkeypatch.setattr("safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"model.safetensors' cannot be written \(disk full\)"):
        model.save(path, lab.denoiser, lab.classifier, lab.reference, lab.config, lab.record)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


# ----------------------------------------------------------------------------
# Metrics.


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6)) + 1
    (m1, c1), (m2, c2) = ((f.mean(0), np.cov(f, rowvar=False)) for f in (a, b))
    expected = np.square(m1 - m2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    ours = metrics.frechet_distance(torch.as_tensor(a), torch.as_tensor(m2), torch.as_tensor(c2))
    assert ours.item() == pytest.approx(expected, rel=1e-6)


def test_class_spread_is_the_mean_distance_within_a_class():
    features = torch.tensor([[0.0, 0], [3, 4], [1, 1], [0, 8]])
    spread = scores.class_spread(features, torch.tensor([0, 0, 1, 0]), 3)
    assert spread[0].item() == pytest.approx((5 + 8 + 5) / 3)
    assert spread[1:].isnan().all()


def test_the_bootstrap_interval_covers_as_often_as_it_says():
    """Means of strata: 95 % of the intervals of 200 repetitions hold the true value, give or take."""
    generator, labels, covered = torch.Generator().manual_seed(1), torch.arange(120) % 3, 0
    for seed in range(200):
        values = torch.randn(120, generator=generator) + labels * 10  # True mean of all: 10.
        mean = values.mean()
        low, high = metrics.influence_interval(mean, values - mean, labels, rounds=200, seed=seed)
        covered += low <= 10 <= high
        assert high - low < 1  # The spread between classes is no uncertainty.
    assert 0.89 <= covered / 200 <= 0.99


# ----------------------------------------------------------------------------
# Sampling.


def test_the_same_seed_gives_the_same_images_and_another_does_not(lab):
    setting = sampling.Guidance("interval", 3.0, GuidanceInterval(0.1, 2.5))
    a, b, c = (sampling.sample(lab, setting, 20, "dpmpp_2m_sde", 6, seed) for seed in (3, 3, 4))
    assert torch.equal(a.x, b.x) and a.rows == b.rows
    assert not torch.equal(a.x, c.x)


def test_each_batch_of_each_seed_has_noise_of_its_own(lab, monkeypatch):
    """A batch that repeats the one before, or another seed's, would count as variety that is not there."""
    monkeypatch.setattr(sampling, "BATCH", 10)
    setting = sampling.Guidance("none", 1.0)
    runs = [sampling.sample(lab, setting, 40, "euler_ancestral", 3, seed).x for seed in (0, 1, 10)]
    assert torch.pdist(torch.cat(runs).flatten(1)).min() > 1
    assert torch.equal(sampling.sample(lab, setting, 20, "euler_ancestral", 3, 0).x, runs[0][:20])


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
def test_a_seed_out_of_range_is_refused_before_any_work(lab, seed):
    with pytest.raises(UserError, match=f"seed must be a whole number from 0 to 4294967295, got {seed}"):
        sampling.sample(lab, sampling.Guidance("none", 1.0), 20, "euler", 2, seed)
    assert len(sampling.sample(lab, sampling.Guidance("none", 1.0), 2, "euler", 2, sampling.MAX_SEED).x) == 2


def test_evaluations_are_those_of_the_run(lab):
    seen = []
    record = lab.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[1][0].item()))
    for name in ("heun", "dpm_2", "dpm_fast", "dpmpp_2m"):
        del seen[:]
        sampling.sample(lab, sampling.Guidance("none", 1.0), 2, name, 5)
        sigmas, fixed = sampling.evaluations(name, 5)
        assert fixed and seen == pytest.approx(sigmas.tolist(), rel=1e-5)
    record.remove()
    assert not sampling.evaluations("dpm_adaptive", 5)[1]


def test_sampling_leaves_the_random_state_alone(lab):
    state = torch.random.get_rng_state()
    sampling.sample(lab, sampling.Guidance("none", 1.0), 20, "euler_ancestral", 4)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    "sampler", ["euler", "heun", "dpm_2", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_3m_sde", "dpm_fast"]
)
def test_evaluation_sigmas_are_those_of_a_run(lab, sampler):
    fn, sigmas, seen = sampling.get_sampler(sampler), sampling.karras_sigmas(8), []

    def denoiser(x, sigma):
        seen.append(sigma[0])
        return lab.denoiser(x, sigma, class_cond=torch.zeros(2, dtype=torch.long))

    state = torch.random.get_rng_state()
    listed = sampling.evaluation_sigmas(fn, *sampling.schedule_args(fn, sigmas))
    assert torch.equal(torch.random.get_rng_state(), state)
    fn(denoiser, torch.randn(2, 1, 28, 28) * sigmas[0], *sampling.schedule_args(fn, sigmas), disable=True)
    torch.testing.assert_close(listed, torch.stack(seen))


def test_rows_per_sample_are_those_of_the_schedule(lab):
    interval = GuidanceInterval(0.1, 2.5)
    sigmas = sampling.karras_sigmas(8)
    seen = []
    samples = sampling.sample(lab, sampling.Guidance("interval", 3.0, interval), 120, "euler", 8, progress=seen.append)
    assert samples.rows == 8 + interval.mask(sigmas).sum().item()
    assert seen == [100, 20] and len(samples.x) == len(samples.labels) == 120
    assert samples.labels.bincount().tolist() == [12] * 10


def test_an_unknown_sampler_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"unknown sampler 'eular'; k-diffusion has dpm_2, .*euler"):
        sampling.get_sampler("eular")
