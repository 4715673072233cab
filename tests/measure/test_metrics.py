"""The metrics of two sets of features: against their authors' code, and their intervals against the truth."""

import contextlib
import io
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_distance
from guidance_interval.measure import metrics
from prdc import compute_prdc
from vendi_score import vendi


def normal(n, dim, shift=0.0, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) * scale + shift


def double_loop_cmmd(x, y):
    """The authors' formula, term by term."""
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))

    def mean_kernel(a, b):
        return np.mean([[np.exp(-np.sum((p - q) ** 2) / (2 * 10**2)) for q in b] for p in a])

    return 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


# ----------------------------------------------------------------------------
# Values.


def test_cmmd_is_the_authors_formula():
    x, y = normal(60, 12, 0.4), normal(45, 12, seed=1)
    expected = double_loop_cmmd(x.numpy(), y.numpy())
    assert metrics.cmmd(x, y).item() == pytest.approx(expected, rel=1e-9)
    assert metrics.cmmd(x.float(), y.float()).item() == pytest.approx(expected, rel=1e-5)
    assert metrics.cmmd(3 * x, y).item() == pytest.approx(expected, rel=1e-9)  # Unit norm.
    assert abs(metrics.cmmd(x, x).item()) < 1e-9


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_is_the_authors_code(k):
    real, fake = normal(220, 10), normal(180, 10, 0.2, 0.8, seed=1)
    fake[:3] = real[:3]  # Distances of zero too.
    with contextlib.redirect_stdout(io.StringIO()):
        expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=k)
    assert metrics.prdc(real, fake, k)._asdict() == pytest.approx(expected)
    assert 0 < expected["recall"] < expected["coverage"] < 1  # Not the trivial ends.


@pytest.mark.parametrize("n", [8, 200])
def test_vendi_is_the_authors_code_through_either_matrix(n):
    x = normal(n, 30, 0.5)
    assert metrics.vendi(x).item() == pytest.approx(vendi.score_dual(x.numpy()), rel=1e-9)
    assert metrics.vendi(torch.eye(n, 300)).item() == pytest.approx(n)
    assert metrics.vendi(torch.ones(n, 3)).item() == pytest.approx(1)


def test_frechet_distance_is_clean_fids():
    x, y = normal(400, 20, 0.3, 1.2), normal(500, 20, seed=1)
    mean, cov = metrics.gaussian(y)
    expected = cleanfid_distance(x.numpy().mean(0), np.cov(x.numpy(), rowvar=False), mean.numpy(), cov.numpy())
    assert metrics.frechet_distance(x, mean, cov).item() == pytest.approx(expected, rel=1e-8)


def frechet_by_definition(x, mean, cov, n):
    """The distance and its influence through D x D matrices, all directions decomposed."""
    values, vectors = torch.linalg.eigh(cov)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
    c = x - x.mean(0)
    sample_cov = c.mT @ c / (n - 1)
    values, vectors = torch.linalg.eigh(root @ sample_cov @ root)
    cross = values.clamp(min=0).sqrt()
    shift = x.mean(0) - mean
    half = root @ (vectors * torch.where(cross > 1e-6 * cross.max(), 1 / cross, 0).sqrt())
    moved = 2 * c @ shift + c.square().sum(1) - (c @ half).square().sum(1)
    return shift @ shift + sample_cov.trace() + cov.trace() - 2 * cross.sum(), moved - moved.mean()


@pytest.mark.parametrize(("n", "reference"), [(30, 200), (200, 30), (30, 30), (41, 200), (40, 200)])
def test_frechet_distance_of_few_samples_is_that_of_singular_covariances(n, reference):
    """40 features, with fewer samples than features in either set or both."""
    x, (mean, cov) = normal(n, 40, 0.3, 1.2), metrics.gaussian(normal(reference, 40, seed=1))
    value, influence = metrics.frechet_distance(x, mean, cov, influence=True)
    expected, moved = frechet_by_definition(x, mean, cov, n)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(influence, moved, rtol=1e-5, atol=1e-5 * moved.abs().max().item())


def test_the_results_do_not_depend_on_the_chunks(monkeypatch):
    real, fake = normal(90, 6), normal(70, 6, 0.3, seed=1)

    def everything():
        _, *influences = metrics.prdc(real, fake, influence=True)
        return torch.stack(
            [
                *metrics.cmmd(fake, real, True)[1],
                *metrics.mean_distance(fake, True)[1],
                *torch.stack(influences[0]).ravel(),
            ]
        )

    whole = everything()
    monkeypatch.setattr(metrics, "CHUNK", 400)
    torch.testing.assert_close(everything(), whole)


def test_neighbours_are_those_of_all_pairs(monkeypatch):
    x = normal(60, 7)
    x[20] = x[50]  # A distance of zero.
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    nearest, index = distance.sort(1)
    for chunk in (2**22, 300):  # One tile, and some of 17.
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        near = metrics.neighbours(x, k=4)
        torch.testing.assert_close(near.radius.sqrt(), nearest[:, 3])
        torch.testing.assert_close(near.next_radius.sqrt(), nearest[:, 4])
        assert near.index.sort(1).values.equal(index[:, :4].sort(1).values)
        torch.testing.assert_close(near.distance, distance.fill_diagonal_(0).sum(1) / 59, atol=1e-6, rtol=1e-6)
        distance.fill_diagonal_(torch.inf)
    few = metrics.neighbours(x[:5], k=4)
    assert few.distance.mean().item() == pytest.approx(torch.pdist(x[:5]).mean().item()) and len(few.index) == 0


def test_a_set_is_compared_with_itself_as_with_another_one(monkeypatch):
    x = normal(90, 6)
    monkeypatch.setattr(metrics, "CHUNK", 400)
    torch.testing.assert_close(torch.stack(metrics.prdc(x, x)), torch.stack(metrics.prdc(x, x.clone())))
    assert metrics.cmmd(x, x).item() == pytest.approx(metrics.cmmd(x, x.clone()).item(), abs=1e-9)
    assert metrics.cmmd(x, x[:50], y_kernel=metrics.kernel_mean(x[:50])) == metrics.cmmd(x, x[:50])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_keeps_the_digits_that_matter(offset):
    """Clusters, as a classifier's features have them, and far from the origin, where squares cancel."""
    centres, generator = 2 * normal(10, 64, seed=9), torch.Generator().manual_seed(3)
    real, fake = (
        centres[torch.randint(10, [n], generator=generator)] + normal(n, 64, scale=0.2, seed=n) + offset
        for n in (1500, 1200)
    )
    real, fake = real.float(), fake.float()
    exact, ours = (
        [*metrics.prdc(x, y), metrics.mean_distance(y), metrics.cmmd(y, x)]
        for x, y in ((real.double(), fake.double()), (real, fake))
    )
    for a, b, tolerance in zip(ours, exact, [2e-3, 2e-3, 2e-3, 2e-3, 1e-6, 1e-5], strict=True):
        assert a.item() == pytest.approx(b.item(), rel=tolerance, abs=1e-6)


def peaks(code, *sizes):
    """Peak memory in MiB of a process after `measure(n)` of `code`, for one n after the other."""
    code = f"""
import re, torch
from guidance_interval.measure import metrics
{code}
for n in {sizes}:
    measure(n)
    print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [int(kib) / 2**10 for kib in done.stdout.split()]


def test_memory_grows_with_the_samples_and_not_with_their_pairs():
    """With small buffers: 7,000 samples more, 14 MiB for each set, cost no copy in float64."""
    code = """
metrics.CHUNK = 2**18
def measure(n):
    x, y = torch.empty(2, n, 512).uniform_()
    near = metrics.neighbours(x)
    metrics.frechet_distance(x, *metrics.gaussian(y), influence=True), metrics.vendi(x, True), metrics.cmmd(x, y, True)
    metrics.prdc(y, x, 5, True, fake_near=near), metrics.mean_distance(x, True, near)
"""
    _, few, many = peaks(code, 1000, 1000, 8000)  # The first time things are loaded.
    assert few < many < few + 2 * 14 + 27, (few, many)


def test_the_heap_is_not_left_in_pieces():
    """With buffers of the usual size, which glibc keeps: 200,000 samples more are 195 MiB, in 24 parts.

    Where the libraries' own memory lies varies from run to run, and in some the heap cannot shrink; our pieces would be
    left in every one.
    """
    code = """
def measure(n):
    x = torch.empty(n, 256).uniform_()
    metrics.frechet_distance(x, *metrics.gaussian(x), influence=True), metrics.vendi(x, True)
"""
    seen = []
    for _ in range(6):
        few, many = peaks(code, 50_000, 250_000)
        seen.append((few, many))
        if few < many < few + 195 + 60:
            return
    pytest.fail(f"each time: {seen}")


def test_mean_distance_is_that_of_all_pairs():
    x = normal(50, 7)
    assert metrics.mean_distance(x).item() == pytest.approx(torch.pdist(x).mean().item())


def test_clip_score_is_on_the_scale_of_a_hundred():
    image, text = torch.tensor([[2.0, 0], [1, 1], [0, 1]]), torch.tensor([[1.0, 0], [0, 3], [0, -1]])
    assert metrics.clip_score(image, text).tolist() == pytest.approx([100, 50 * 2**0.5, 0], rel=1e-6)


def test_pixel_statistics_are_those_of_pillow_and_of_the_definitions():
    from PIL import Image

    pixels = np.random.default_rng(0).integers(1, 255, (40, 30, 3), dtype=np.uint8)
    pixels[:10, :, 0] = 255
    pixels[10:15] = 128  # Grey: no saturation.
    saturation, contrast, clipped = metrics.pixel_statistics(pixels).tolist()
    image = Image.fromarray(pixels)
    assert saturation == pytest.approx(np.asarray(image.convert("HSV"))[..., 1].mean() / 255, abs=0.003)
    assert contrast == pytest.approx(np.asarray(image.convert("L")).std() / 255, abs=0.003)
    assert clipped == pytest.approx(0.25)
    assert metrics.pixel_statistics(np.zeros((4, 4, 3), np.uint8)).tolist() == [0, 0, 1]


# ----------------------------------------------------------------------------
# Intervals.


def leave_one_out(statistic, x):
    """Influence by brute force: what each sample's absence does, centred."""
    without = torch.stack([statistic(x[torch.arange(len(x)) != i]) for i in range(len(x))])
    return (len(x) - 1) * (without.mean() - without)


@pytest.mark.parametrize("name", ["recall", "coverage"])
def test_unions_have_the_influence_of_leaving_a_sample_out(name):
    real, fake = normal(150, 8), normal(120, 8, 0.3, 0.8, seed=1)
    _, influence = metrics.prdc(real, fake, influence=True)
    expected = leave_one_out(lambda x: getattr(metrics.prdc(real, x), name), fake)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(getattr(influence, name), expected)


@pytest.mark.parametrize("dim", [6, 300])
def test_smooth_metrics_have_the_influence_of_leaving_a_sample_out(dim):
    """To first order: the rest is of the next order in 1 / N."""
    spectrum = 1 / (1 + torch.arange(dim))  # Few directions hold most of the variance, as in any network's features.
    x, y = normal(200, dim, 0.3) * spectrum, normal(250, dim, 0, 1.3, seed=1) * spectrum
    functions = {"cmmd": lambda x, i=False: metrics.cmmd(x, y, i), "vendi": metrics.vendi}
    functions["distance"] = metrics.mean_distance
    functions["fd"] = lambda x, i=False: metrics.frechet_distance(x, *metrics.gaussian(y), i)
    for name, function in functions.items():
        _, influence = function(x, True)
        assert abs(influence.mean()) < 1e-9, name
        expected = leave_one_out(function, x)
        assert np.corrcoef(influence, expected)[0, 1] > 0.98, name
        assert influence.std() / expected.std() == pytest.approx(1, abs=0.08), name


@pytest.mark.parametrize(("shift", "tolerance"), [(0.1, 0.15), (0.5, 0.05)])
def test_the_linear_bootstrap_of_a_distance_is_the_plain_one(shift, tolerance):
    """The nearer the reference the less so: there the plain one is too wide, being of the second order in part."""
    x, generator = normal(400, 8, shift), torch.Generator().manual_seed(0)
    mean, cov = torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64)
    resampled = [x[torch.randint(len(x), [len(x)], generator=generator)] for _ in range(2000)]
    values = torch.stack([metrics.frechet_distance(r, mean, cov) for r in resampled])
    values += metrics.frechet_distance(x, mean, cov) - values.mean()  # Resampling inflates it, as a smaller N would.
    plain = values.quantile(values.new_tensor([0.025, 0.975])).tolist()
    value, influence = metrics.frechet_distance(x, mean, cov, influence=True)
    linear = metrics.influence_interval(value, influence, rounds=2000)
    assert linear == pytest.approx(plain, abs=tolerance * (plain[1] - plain[0]))


@pytest.mark.parametrize(("shift", "scale"), [(0.3, 1.0), (0.0, 0.8), (0.0, 1.0)])
def test_intervals_cover_as_often_as_they_say_or_more(shift, scale):
    """Of 200 repetitions, with what the metric is on average for as many samples as the true value."""
    reference = normal(400, 8, seed=99)
    mean, cov = metrics.gaussian(reference)
    values, bounds = {}, {}
    for seed in range(200):
        x = normal(300, 8, shift, scale, seed=seed)
        prdc, prdc_influence = metrics.prdc(reference, x, influence=True)
        measured = {
            "fd": metrics.frechet_distance(x, mean, cov, True),
            "cmmd": metrics.cmmd(x, reference, True),
            "vendi": metrics.vendi(x, True),
            "distance": metrics.mean_distance(x, True),
            **{name: (getattr(prdc, name), getattr(prdc_influence, name)) for name in prdc._fields},
        }
        for name, (value, influence) in measured.items():
            values.setdefault(name, []).append(value.item())
            bounds.setdefault(name, []).append(metrics.influence_interval(value, influence, rounds=200, seed=seed))
    for name in values:
        true = np.mean(values[name])
        covered = np.mean([low <= true <= high for low, high in bounds[name]])
        assert covered >= (0.8 if name == "precision" else 0.89), (name, covered)  # Near 1 it says so: `caveat`.
        widest = np.mean([high - low for low, high in bounds[name]]) / (4 * np.std(values[name]))
        assert widest < 2.5, (name, widest)  # Not by being wide at will.


def test_classes_that_were_chosen_add_nothing_to_an_interval():
    labels = torch.arange(300) % 3
    x = labels.double() * 10 + normal(300, 1)[:, 0]
    low, high = metrics.influence_interval(x.mean(), x - x.mean(), labels)
    plain = metrics.influence_interval(x.mean(), x - x.mean())
    assert low < x.mean() < high and high - low < 0.3 < plain[1] - plain[0]


# ----------------------------------------------------------------------------
# What is refused, and what is said of few samples.


def test_sets_that_make_no_sense_are_refused():
    x = normal(20, 4)
    with pytest.raises(ValueError, match=r"N of at least 7, got \(6, 4\)"):
        metrics.prdc(x, x[:6])
    with pytest.raises(ValueError, match="4 and 3 features"):
        metrics.cmmd(x, x[:, :3])
    with pytest.raises(ValueError, match="NaN or infinity"):
        metrics.vendi(x / 0)
    with pytest.raises(ValueError, match=r"N of at least 2, got \(1, 4\)"):
        metrics.gaussian(x[:1])
    with pytest.raises(ValueError, match="each image needs one prompt"):
        metrics.clip_score(x, x[:3])
    with pytest.raises(ValueError, match="float32 or float64, got"):
        metrics.vendi(x.half())


@pytest.mark.parametrize(
    ("metric", "value", "num", "reference", "says"),
    [
        ("fd", 30.0, 1000, 20_000, "1,000 images in 2,048 features have a singular covariance.* take 10,240 or more"),
        ("fd", 30.0, 20_000, 5000, "5,000 images are few for 2,048 features"),
        ("fd", 30.0, 20_000, 20_000, None),
        ("cmmd", 0.1, 500, 500, "up to 0.04 of it come from each image being compared with itself"),
        ("cmmd", 1.0, 500, 500, None),
        ("coverage", 0.3, 100, 1000, "100 images can cover 38% of 1,000 at best"),
        ("coverage", 0.9, 1000, 1000, None),
        ("recall", 0.5, 300, 1000, "the sets have 300 and 1,000 images"),
        ("vendi", 90.0, 200, 200, "above a tenth of 200, where it still grows"),
        ("precision", 0.999, 1000, 1000, "hardly an exception among 1,000 images; .* off by 0.003"),
        ("accuracy", 0.9, 1000, 1000, None),
        ("accuracy", 0.75, 20, 1000, None),  # Five exceptions are enough, on either side.
        ("accuracy", 0.25, 20, 1000, None),
        ("accuracy", 0.75, 19, 1000, "hardly an exception among 19 images"),
        ("accuracy", 0.25, 19, 1000, "hardly an exception among 19 images"),
        ("precision", 0.75, 20, 40, None),  # Twice as many are not too many.
        ("precision", 0.75, 20, 41, "the sets have 20 and 41 images"),
        ("vendi", 20.0, 200, 200, None),
        ("fd", 30.0, 2048, 20_000, "a singular covariance"),
        ("fd", 30.0, 2049, 20_000, "are few for"),
        ("fd", 30.0, 10_240, 20_000, None),
        ("saturation", 0.5, 99, 1000, None),
    ],
)
def test_too_few_samples_are_told_with_the_source(metric, value, num, reference, says):
    said = metrics.caveat(metric, value, num, reference, dim=2048)
    assert said is None if says is None else re.search(says, said)


def test_expected_coverage_is_what_one_distribution_gives():
    real = [metrics.prdc(normal(200, 4, seed=s), normal(100, 4, seed=s + 50)).coverage for s in range(20)]
    assert np.mean(real) == pytest.approx(metrics.expected_coverage(200, 100), abs=0.01)
    assert metrics.expected_coverage(10**6, 10**6) == pytest.approx(1 - 0.5**5, abs=1e-4)
