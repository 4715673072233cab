"""In the real Forges: every denoiser call judged against the unpatched host, sampler by feature."""

import pytest

pytestmark = pytest.mark.forge

INTERVAL = ["custom", 0.28, 5.42, "Both passes"]
FEATURES = {
    "plain": {},
    "AND": {"prompt": "a cat :1.2 AND a dog :0.6", "batch_size": 2},
    "unequal": {"prompt": "a cat, " * 60},
}


SAMPLERS = [
    "DPM++ 2M", "DPM++ SDE", "DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 2S a", "DPM++ 3M SDE", "Euler a", "Euler",
    "LMS", "Heun", "DPM2", "DPM2 a", "DPM fast", "DPM adaptive", "Restart", "HeunPP2", "IPNDM", "IPNDM_V", "DEIS",
    "DDIM", "DDIM CFG++", "PLMS", "UniPC", "LCM", "DDPM",
]  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_call(judge, generate, report, need_sampler, sampler, feature):
    from guidance_interval.a1111 import settings

    need_sampler(sampler)
    judged = judge(settings.from_controls(*INTERVAL))
    p, _ = generate(accordion=[True, *INTERVAL], sampler_name=sampler, steps=6, **FEATURES[feature])
    report(sampler, feature, judged)
    judged.check()
    assert p.sampler_name == sampler
    assert any(c["guided"] for c in judged.calls)


@pytest.mark.parametrize("other", ["PerturbedAttentionGuidance", "DynamicThresholding", "FreeU"])
def test_the_hosts_own_patches(judge, generate, other):
    """They go on acting: a guided call is theirs, an unguided one starts from the conditional prediction."""
    from guidance_interval.a1111 import settings
    from modules import scripts

    found = [s for s in scripts.scripts_txt2img.alwayson_scripts if s.title().startswith(other)]
    if not found:
        pytest.skip(f"this host has no {other}")
    judged = judge(settings.from_controls(*INTERVAL))
    generate(accordion=[True, *INTERVAL], steps=6, others=[(found[0], [True])])
    judged.check()


def test_self_attention_guidance_keeps_its_uncond(judge, generate):
    from modules import scripts

    found = [s for s in scripts.scripts_txt2img.alwayson_scripts if s.title().startswith("SelfAttentionGuidance")]
    if not found:
        pytest.skip("this host has no SelfAttentionGuidance")
    _, stock = generate(steps=6, others=[(found[0], [True])])
    _, limited = generate(accordion=[True, *INTERVAL], steps=6, others=[(found[0], [True])])
    assert limited.images[0].tobytes() != stock.images[0].tobytes()
    assert len(set(limited.images[0].tobytes())) > 2  # No NaN, which shows as one colour.


def test_every_other_sampler(judge, generate, report):
    """Those of reForge, Forge Neo and Forge Classic that Forge does not have, one after the other."""
    from guidance_interval.a1111 import settings
    from modules import sd_samplers

    wrong = {}
    for name in [s.name for s in sd_samplers.all_samplers if s.name not in SAMPLERS]:
        judged = judge(settings.from_controls(*INTERVAL))
        generate(accordion=[True, *INTERVAL], sampler_name=name, steps=4)
        report(name, "plain", judged)
        # One sampler makes NaN of right predictions, with CFG everywhere as well.
        bad = [c for c in judged.calls if not c["good"] and not c["nan"]]
        if bad or not judged.calls:
            wrong[name] = bad[:1]
    assert not wrong
