"""In the real Automatic1111: every denoiser call judged against the unpatched host, sampler by feature."""

import pytest

pytestmark = pytest.mark.a1111

INTERVAL = ["custom", 0.28, 5.42, "Both passes"]
FEATURES = {
    "plain": {},
    "batch 2 x 2": {"batch_size": 2, "n_iter": 2},
    "AND": {"prompt": "a cat :1.2 AND a dog :0.6", "batch_size": 2},
    "unequal": {"prompt": "a cat, " * 60},
    "unbatched": {"opts": {"batch_cond_uncond": False}},
    "unequal AND unbatched": {"prompt": "a cat, " * 60 + " AND a dog", "opts": {"batch_cond_uncond": False}},
}


SAMPLERS = [
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler",
    "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "DDIM", "DDIM CFG++", "PLMS", "UniPC",
    "LCM",
]  # fmt: skip


@pytest.fixture
def ours(webui):
    from guidance_interval.a1111 import settings

    return settings


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call(judge, generate, ours, monkeypatch, report, sampler, feature):
    from modules import shared

    kwargs = dict(FEATURES[feature])
    for name, value in kwargs.pop("opts", {}).items():
        monkeypatch.setitem(shared.opts.data, name, value)
    judged = judge(ours.from_controls(*INTERVAL))
    p, _ = generate(accordion=[True, *INTERVAL], sampler_name=sampler, **kwargs)
    report(sampler, feature, judged)
    judged.check()
    guided = [c["guided"] for c in judged.calls]
    assert any(guided) and not all(guided)
    assert p.sampler_name == sampler


def test_all_samplers_are_tested(webui):
    from modules import sd_samplers

    assert {s.name for s in sd_samplers.all_samplers} == set(SAMPLERS)
