"""The colour models: what their files hold, and how they are made."""

import json

import numpy as np
import pytest
import torch
from guidance_interval import GuidanceInterval
from guidance_interval.errors import UserError
from guidance_interval.lab import emoji, memorization, scores, sweep, train_emoji
from guidance_interval.toy import data, model, networks, sampling
from PIL import Image

NAMES = ("emoji", "emoji-seed1", "emoji-seed2")


@pytest.fixture(scope="module", params=NAMES)
def lab(request):
    return sweep.load_lab(request.param, "cpu")


def test_the_files_are_small_and_know_their_classes(lab):
    assert model.shipped()["emoji"].stat().st_size < 6 * 2**20
    assert len(lab.config["classes"]) == lab.config["num_classes"] == lab.denoiser.null_class == 96
    assert {"face-smiling", "food-fruit", "country-flag"} <= set(lab.config["classes"])
    assert "CC BY 4.0" in lab.record["data"] and lab.record["held_out_images"] > 700


def test_the_judges_know_real_emoji_and_the_denoiser_restores_them(lab):
    x = data.to_model(lab.reference["thumbnails"], lab.config["pixel_mean"], lab.config["pixel_std"])
    labels = torch.arange(96)
    assert (lab.classifier(x)[1].argmax(1) == labels).float().mean() > 0.85
    sigma = torch.full([96], 0.2)
    noised = x + 0.2 * torch.randn_like(x)
    error = (lab.denoiser(noised, sigma, class_cond=labels) - x).square().mean()
    assert error < 0.3 * 0.2**2
    other = lab.denoiser(noised, sigma, class_cond=labels.roll(1))
    assert (other - x).square().mean() > error  # It uses the class.


def test_the_reference_is_of_these_judges(lab):
    """Features of some of the images lie about the mean and the covariance of all, in both networks."""
    for prefix in ("", "class_"):
        features = lab.reference[f"{prefix}features"].double()
        assert features.shape == (3000, 64)
        mean, cov = (lab.reference[f"{prefix}{k}"].double() for k in ("mean", "cov"))
        assert (features.mean(0) - mean).square().sum() < 0.01 * cov.trace()
        torch.testing.assert_close(features.T.cov().trace(), cov.trace(), rtol=0.05, atol=0)
    x = data.to_model(lab.reference["thumbnails"], lab.config["pixel_mean"], lab.config["pixel_std"])
    for network, prefix in ((lab.ruler, ""), (lab.classifier, "class_")):
        away = train_emoji.features_of(network, x).double().mean(0) - lab.reference[f"{prefix}mean"].double()
        assert away.square().sum() < 0.2 * lab.reference[f"{prefix}cov"].trace()


def test_the_interval_is_cheaper_and_follows_the_class():
    lab = model.load(model.SHIPPED.with_name("emoji.safetensors"))
    none, interval = (
        sampling.sample(lab, sampling.Guidance("", w, GuidanceInterval(0.1, 5.0)), 40, "dpmpp_2m", 6)
        for w in (1.0, 2.5)
    )
    assert torch.equal(none.labels, interval.labels) and none.x.shape == (40, 3, 32, 32)
    assert none.rows == 6 and 6 < interval.rows < 12
    a, b = (scores.judge_samples(lab, drawn.x, drawn.labels)[0] for drawn in (none, interval))
    assert b.accuracy > a.accuracy and a.fd > 0 and b.fd_low < b.fd < b.fd_high


def test_the_distance_is_the_ruler_s():
    lab = model.load(model.SHIPPED.with_name("emoji.safetensors"))
    x = data.to_model(lab.reference["thumbnails"], lab.config["pixel_mean"], lab.config["pixel_std"])
    fd = scores.judge_samples(lab, x, torch.arange(96))[0].fd
    lab.ruler = None
    assert fd != scores.judge_samples(lab, x, torch.arange(96))[0].fd


def test_the_reference_has_the_class_frequencies_of_the_samples():
    """A class that may not be mirrored counts as often as one that may."""
    x, labels = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(20) // 10
    may = labels == 0
    ruler, classifier = (networks.Features(**train_emoji.RULER) for _ in range(2))
    found = train_emoji.reference(ruler, classifier, x, labels, may, num_features=20)
    once, mirrored = (train_emoji.features_of(ruler, part) for part in (x, x.flip(-1)))
    by_class = torch.cat([(once + mirrored)[may] / 2, once[~may]])
    torch.testing.assert_close(found["mean"], by_class.mean(0))
    assert len(found["features"].unique(dim=0)) == 20  # No copies, which would be each other's neighbours.


def test_both_judges_see_the_same_samples():
    lab = model.load(model.SHIPPED.with_name("emoji.safetensors"))
    x = data.to_model(lab.reference["thumbnails"], lab.config["pixel_mean"], lab.config["pixel_std"])
    value, moved = scores.judge_samples(lab, x, torch.arange(96))
    assert moved.shape == (3, 96) and moved.mean(1).abs().max() < 1e-4
    assert value.class_fd_low < value.class_fd < value.class_fd_high and value.class_fd != value.fd
    lab.ruler = None
    reference = dict(lab.reference, mean=lab.reference["class_mean"], cov=lab.reference["class_cov"])
    lab.reference = reference
    assert scores.judge_samples(lab, x, torch.arange(96))[0].fd == pytest.approx(value.class_fd)


def test_labels_are_spread_evenly():
    labels = torch.arange(12).repeat_interleave(torch.arange(1, 13) * 5)
    spread = train_emoji.spread_evenly(labels)
    assert torch.equal(spread.bincount(), labels.bincount())
    for n in (40, 130, 300):
        expected = labels.bincount() * n / len(labels)
        assert (spread[:n].bincount(minlength=12) - expected).abs().max() <= 1.5


def test_names_are_matched_whatever_their_spelling(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "en/shortcodes").mkdir(parents=True)
    (tmp_path / "meta/groups.json").write_text(json.dumps({"subgroups": {"0": "face-smiling", "98": "country-flag"}}))
    entries = [("1F600", "grinning face", 0), ("1F1E8-1F1EE", "flag: Côte d\u2019Ivoire", 98)]
    listed = [dict(hexcode=h, label=label, subgroup=s) for h, label, s in entries]
    (tmp_path / "en/data.json").write_text(json.dumps([*listed, dict(hexcode="1F1E6", label="regional indicator A")]))
    for kind in emoji.SHORT_NAMES:
        (tmp_path / f"en/shortcodes/{kind}.json").write_text(json.dumps({"1F600": ["grinning", "gleeful"]}))
    slugs, subgroups, names = emoji.unicode_names(tmp_path)
    assert slugs[emoji.slug("grinning-face")] == slugs["gleeful"] == "grinning face"
    assert slugs[emoji.slug("flag-for-cote-divoire")] == "flag: Côte d\u2019Ivoire"
    assert names[subgroups["flag: Côte d\u2019Ivoire"]] == "country-flag" and len(subgroups) == 2


def test_without_the_drawings_the_command_is_named(tmp_path):
    with pytest.raises(UserError, match=r"draw the emoji with: guidance-interval emoji --out"):
        emoji.load(tmp_path / "none.npz")


def test_training_writes_a_file_that_loads(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    n = 60
    np.savez(
        tmp_path / "emoji.npz",
        images=rng.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8), labels=np.arange(n) % 3, names=np.arange(n) // 3,
        styles=np.arange(n) % 6, held_out=np.arange(n) >= 54, classes=np.array(["heart", "arrow", "flag"]),
        name_list=np.array([f"name {i}" for i in range(20)]),
    )  # fmt: skip
    monkeypatch.setattr(train_emoji, "UNET", dict(train_emoji.UNET, channels=(8, 16), blocks=(1, 1), attention=(1,)))
    out = tmp_path / "model.safetensors"
    train_emoji.run(tmp_path / "emoji.npz", out, "cpu", steps=3, batch=8, lr=1e-3, seed=0, classifier_steps=3)
    lab = model.load(out)
    assert lab.config["classes"] == ["heart", "arrow", "flag"] and lab.ruler is not None
    drawn = sampling.sample(lab, sampling.Guidance("", 2.0), 6, "euler", 3)
    assert drawn.x.isfinite().all() and drawn.labels.bincount(minlength=3).tolist() == [2, 2, 2]
    again = tmp_path / "again.safetensors"
    train_emoji.run(tmp_path / "emoji.npz", again, "cpu", 3, 8, 1e-3, 1, 3, donor=out)
    other = model.load(again)
    torch.testing.assert_close(other.reference["mean"], lab.reference["mean"], atol=1e-3, rtol=0)  # The donor's judges.
    assert not torch.equal(other.denoiser.inner_model.conv_in.weight, lab.denoiser.inner_model.conv_in.weight)


def test_a_copy_is_found_as_it_is_and_mirrored():
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(30, 3, 32, 32, generator=generator)
    x = torch.stack([others[4], others[7].flip(-1), torch.rand(3, 32, 32, generator=generator)])
    value, index = memorization.distances(x, others)
    assert index[:2].tolist() == [4, 7] and value[:2].max() < 1e-3 < 0.1 < value[2]
    assert memorization.distances(x[:1] + 0.1, others)[0].item() == pytest.approx(0.1, rel=1e-3)


def test_the_neighbours_are_drawn_and_told(tmp_path, capsys):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    rest = dict.fromkeys(("labels", "names", "styles"), np.zeros(60, int)) | {"classes": ["a"], "name_list": ["b"]}
    np.savez(tmp_path / "emoji.npz", images=images, held_out=np.arange(60) % 3 == 0, **rest)
    memorization.run(tmp_path / "emoji.npz", tmp_path / "new" / "picture.png", samples=20)
    told = capsys.readouterr().out.splitlines()
    assert "Nearest of 40 training images" in told[1] and "For the 20 real drawings" in told[1]
    with Image.open(tmp_path / "new" / "picture.png") as image:
        assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 24)) > 20
    with pytest.raises(UserError, match="does not exist; draw the emoji with"):
        memorization.run(tmp_path / "none.npz", tmp_path / "picture.png")
