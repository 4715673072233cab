"""The picture of a graph is that of its run, or says what it assumes: switches, contexts, sums, latents, packs."""

import json
import types

import comfy_harness as harness
import pytest


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def prompt_with(sampler=(), **others):
    """A KSampler, n3, behind an interval node, n2, behind a loader, n1; `others` by id."""
    inputs = {"steps": 8, "cfg": 5.0, "sampler_name": "euler", "scheduler": "karras", "denoise": 1.0}
    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="x.ckpt"),
        "2": node("GuidanceInterval", model=["1", 0], sigma_lo=0.28, sigma_hi=5.42),
        "3": node("KSampler", **{**inputs, "model": ["2", 0], **dict(sampler)}),
    }
    return prompt | {key.removeprefix("n"): value for key, value in others.items()}


def drawn(live, prompt, node_id="2"):
    """The answer, without what is said of the model, which these servers have no file of."""
    answer = live.route.describe(json.loads(json.dumps(prompt)), node_id)
    assert "error" not in answer, answer
    answer = json.loads(json.dumps(answer, allow_nan=False))
    answer["notes"] = [note for note in answer["notes"] if note[0] != "model"]
    return answer


def notes(live, prompt):
    return drawn(live, prompt)["notes"]


STEPS = node("ComfySwitchNode", switch=["20", 0], on_false=["21", 0], on_true=4)
CFG = node("ComfySwitchNode", switch=["20", 0], on_false=4.0, on_true=1.0)


def test_the_hosts_switches_are_followed_for_values(live):
    values = {"steps": ["10", 0], "cfg": ["11", 0]}
    prompt = prompt_with(
        values, n10=STEPS, n11=CFG, n21=node("PrimitiveInt", value=50), n20=node("PrimitiveBoolean", value=True)
    )
    answer = drawn(live, prompt)
    assert (answer["steps"], answer["guided"], answer["nothing"], answer["notes"]) == (4, 0, "cfg", [])
    prompt["20"]["inputs"]["value"] = False
    answer = drawn(live, prompt)
    assert (answer["steps"], answer["nothing"], answer["notes"]) == (50, None, []) and answer["guided"] > 10
    prompt["20"] = node("SomebodysCoin")
    assert notes(live, prompt) == [["linked", "steps = 20 (SomebodysCoin)"], ["cfg_unknown", "SomebodysCoin"]]
    soft = {"n10": node("ComfySoftSwitchNode", switch=["9", 0], on_true=7)}
    assert drawn(live, prompt_with({"steps": ["10", 0]}, **soft))["steps"] == 7
    both = {"n10": node("ComfySoftSwitchNode", switch=False, on_true=7, on_false=9)}
    assert drawn(live, prompt_with({"steps": ["10", 0]}, **both))["steps"] == 9


@pytest.mark.parametrize("kind", ["ComfySwitchNode", "ComfySoftSwitchNode"])
def test_a_switch_between_models(live, kind):
    def through(switch, on_false, on_true):
        chosen = node(kind, switch=switch, on_false=[on_false, 0], on_true=[on_true, 0])
        return prompt_with({"model": ["9", 0]}, n9=chosen)

    assert drawn(live, through(True, "1", "2"))["steps"] == 8
    assert notes(live, through(False, "2", "1")) == []
    for switch, on_false, on_true in ((False, "1", "2"), (True, "2", "1")):
        answer = drawn(live, through(switch, on_false, on_true))
        assert answer["notes"] == [["switched_off", kind]] and answer["sampler_id"] is None
    prompt = through(["8", 0], "1", "2") | {"8": node("SomebodysCoin")}
    answer = drawn(live, prompt)
    assert answer["notes"] == [["choice", kind]] and answer["steps"] == 8


def test_a_merge_keeps_the_interval_of_its_first_model(live):
    merged = prompt_with({"model": ["9", 0]}, n9=node("ModelMergeSimple", model1=["2", 0], model2=["1", 0], ratio=0.5))
    assert notes(live, merged) == []
    merged["9"]["inputs"] |= {"model1": ["1", 0], "model2": ["2", 0]}
    assert notes(live, merged) == [["switched_off", "ModelMergeSimple"]]


def test_rgthrees_any_switch_takes_the_first_that_is_there(live):
    switch = "Any Switch (rgthree)"
    prompt = prompt_with({"model": ["9", 0]}, n9=node(switch, any_02=["2", 0], any_03=["1", 0]))
    assert notes(live, prompt) == []
    prompt["9"]["inputs"]["any_01"] = ["1", 0]
    assert notes(live, prompt) == [["switched_off", switch]]
    steps = {"n9": node(switch, any_01=["8", 0], any_02=["7", 0]), "n8": node("PrimitiveInt", value=5)}
    assert drawn(live, prompt_with({"steps": ["9", 0]}, **steps))["steps"] == 5


def test_rgthrees_contexts_are_followed(live):
    """Model, steps and cfg go through chained contexts, a switch and a merge."""
    prompt = prompt_with(
        {
            "model": ["15", 1],
            "steps": ["15", 9],
            "cfg": ["15", 11],
            "scheduler": ["15", 14],
            "sampler_name": ["15", 13],
        },
        n10=node("Context Big (rgthree)", steps=["20", 0], cfg=["21", 0], model=["1", 0]),
        n11=node("Context Big (rgthree)", base_ctx=["10", 0], model=["2", 0], scheduler="normal"),
        n12=node("Any Switch (rgthree)", any_02=["11", 0]),
        n13=node("Context Switch Big (rgthree)", ctx_03=["12", 0]),
        n14=node("Context Merge Big (rgthree)", ctx_01=["10", 0], ctx_02=["13", 0], ctx_03=["16", 0]),
        n15=node("Context Big (rgthree)", base_ctx=["14", 0]),
        n16=node("Context Big (rgthree)", sampler="heun"),
        n20=node("PrimitiveInt", value=5),
        n21=node("PrimitiveFloat", value=3.5),
    )
    answer = drawn(live, prompt)
    assert (answer["steps"], answer["sampler"], answer["scheduler"]) == (5, "heun", "normal")
    assert answer["evaluations"] == 9 and answer["notes"] == []
    prompt["15"]["inputs"]["model"] = ["1", 0]
    assert notes(live, prompt) == [["switched_off", "Context Big (rgthree)"]]
    prompt["15"] = node("SomebodysContext", ctx=["14", 0])
    codes = [code for code, _ in notes(live, prompt)]
    assert codes == ["choice", "linked", "linked", "linked", "cfg_unknown"]
    # In a circle, and merged many times over.
    prompt["15"] = node("Context Big (rgthree)", base_ctx=["15", 0])
    drawn(live, prompt)
    for i in range(15, 60):
        merged = {"ctx_01": [str(i + 1), 0], "ctx_02": [str(i + 1), 0]}
        prompt[str(i)] = node("Context Merge Big (rgthree)", **merged)
    drawn(live, prompt)


def test_sums_are_done(host, live):
    expression = node("ComfyMathExpression", expression="a * 2 + b", **{"values.a": ["20", 0], "values.b": 1})
    prompt = prompt_with({"steps": ["10", 1], "denoise": ["10", 2]}, n10=expression, n20=node("PrimitiveInt", value=4))
    answer = drawn(live, prompt)
    if "ComfyMathExpression" in host.nodes:
        assert answer["steps"] == 9 and answer["notes"] == []
    else:
        assert answer["notes"][0] == ["linked", "steps = 20 (ComfyMathExpression)"]
    prompt["10"]["inputs"]["expression"] = "a.b"
    assert ["linked", "steps = 20 (ComfyMathExpression)"] in notes(live, prompt)


def test_inputs_that_grow_are_handed_on(host, live):
    if "ComfyAndNode" not in host.nodes:
        pytest.skip("this host has none")
    both = node("ComfyAndNode", **{"values.value0": True, "values.value1": ["20", 0]})
    switch = node("ComfySwitchNode", switch=["9", 0], on_false=6, on_true=7)
    prompt = prompt_with({"steps": ["10", 0]}, n9=both, n10=switch, n20=node("PrimitiveBoolean", value=True))
    assert drawn(live, prompt)["steps"] == 7
    prompt["20"]["inputs"]["value"] = False
    assert drawn(live, prompt)["steps"] == 6


def custom(sigmas, **others):
    prompt = prompt_with(**others)
    prompt["3"] = node("SamplerCustom", model=["2", 0], cfg=4.0, sampler=["5", 0], sigmas=sigmas)
    return prompt | {"5": node("KSamplerSelect", sampler_name="euler")}


def test_a_latent_gives_its_size(host, live):
    """The schedule and the shift of LTXV depend on the number of tokens."""
    size = {"width": 768, "height": 512, "length": 161}
    made = {"steps": 30, "max_shift": 2.05, "base_shift": 0.95}
    (latent,) = harness.run_node(host, "EmptyLTXVLatentVideo", **size, batch_size=1)
    (sigmas,) = harness.run_node(host, "LTXVScheduler", **made, stretch=True, terminal=0.1, latent=latent)
    interval = live.model_patch.in_edm_units(live.model_patch.to_interval(0.28, 5.42))
    flow = harness.tiny_model("flow").get_model_object("model_sampling")
    real = sum(interval(flow).mask(sigmas[:-1]).tolist())
    scheduler = node("LTXVScheduler", **made, stretch=True, terminal=0.1, latent=["6", 0])
    shifted = node("ModelSamplingLTXV", model=["1", 0], max_shift=2.05, base_shift=0.95, latent=["6", 0])
    prompt = custom(["4", 0], n4=scheduler, n6=node("EmptyLTXVLatentVideo", **size), n8=shifted)
    prompt["2"]["inputs"]["model"] = ["8", 0]
    answer = drawn(live, prompt)
    assert (answer["steps"], answer["guided"], answer["notes"]) == (30, real, [])
    del prompt["4"]["inputs"]["latent"]
    assert drawn(live, prompt)["guided"] != real
    prompt["4"]["inputs"]["latent"] = ["7", 0]
    prompt["7"] = node("SomebodysLatent")
    assert notes(live, prompt) == [["without", "latent (SomebodysLatent)"]]
    # What the model itself is shifted by.
    basic = node("BasicScheduler", model=["8", 0], scheduler="normal", steps=12, denoise=1.0)
    shift = custom(["4", 0], n4=basic, n6=node("EmptyLTXVLatentVideo", **size), n8=shifted)
    shift["2"]["inputs"]["model"] = ["8", 0]
    (model,) = harness.run_node(
        host, "ModelSamplingLTXV", model=harness.tiny_model("flow"), max_shift=2.05, base_shift=0.95, latent=latent
    )
    (sigmas,) = harness.run_node(host, "BasicScheduler", model=model, scheduler="normal", steps=12, denoise=1.0)
    assert drawn(live, shift)["guided"] == sum(interval(flow).mask(sigmas[:-1]).tolist())


def test_of_nodes_that_set_the_sampling_the_last_one_counts(live):
    def through(*shifts):
        prompt = prompt_with()
        for i, shift in enumerate(shifts):
            prompt[str(10 + i)] = node("ModelSamplingSD3", model=[str(9 + i) if i else "1", 0], shift=shift)
        prompt["2"]["inputs"]["model"] = [str(9 + len(shifts)), 0]
        return drawn(live, prompt)

    assert through(12.0, 3.0) == through(3.0) != through(12.0)


def test_the_size_of_a_latent_is_that_of_the_hosts_node(host, live):
    for kind, (in_time, _) in live.prompt_graph.LATENTS.items():
        size = {"width": 320, "height": 256} | ({"length": 25} if in_time else {})
        if kind == "LTXVImgToVideo":
            continue  # Encodes an image; its latent is that of the empty one.
        (latent,) = harness.run_node(host, kind, **size, batch_size=1)
        graph = live.prompt_graph.Graph({"1": node(kind, **size)})
        assert graph._latent(["1", 0])["samples"].shape[2:] == latent["samples"].shape[2:], kind


def test_cfg_that_is_not_known_is_said(live):
    prompt = prompt_with({"cfg": ["9", 0]}, n9=node("FloatConstant", value=1.0))
    assert notes(live, prompt) == [["cfg_unknown", "FloatConstant"]]
    for cfg in ("x", None):
        assert [code for code, _ in notes(live, prompt_with({"cfg": cfg}))] == ["cfg_unknown"]
    assert notes(live, prompt_with({"cfg": ["9", 0]}, n9=node("PrimitiveFloat", value=3.0))) == []
    preset = prompt_with({"cfg": ["2", 1]}, n2=node("GuidanceIntervalPreset", model=["1", 0], preset="sdxl", cfg=7.0))
    assert notes(live, preset) == [] and drawn(live, preset)["nothing"] is None
    override = prompt_with(n2=node("GuidanceInterval", model=["9", 0]))
    override["9"] = node("CFGOverride", model=["1", 0], cfg=1.0, start_percent=0.0, end_percent=0.5)
    assert notes(live, override) == [["without", "CFGOverride"]]


def guided_by(kind, **inputs):
    prompt = custom(["4", 0], n4=node("KarrasScheduler", steps=6, sigma_max=14.6, sigma_min=0.03, rho=7.0))
    prompt["3"] = node("SamplerCustomAdvanced", guider=["9", 0], sampler=["5", 0], sigmas=["4", 0])
    return prompt | {"9": node(kind, model=["2", 0], **inputs)}


def test_guiders(live):
    for kind, inputs, rows, nothing in (
        ("CFGGuider", {"cfg": 4.0}, 2, None),
        ("CFGGuider", {"cfg": 1.0}, 1, "cfg"),
        ("BasicGuider", {}, 1, "guider"),
        ("DualCFGGuider", {"cfg_conds": 1.0, "cfg_cond2_negative": 1.0}, 3, None),
        ("PerpNegGuider", {"cfg": 4.0}, 3, None),
        ("DualModelGuider", {"cfg": 1.0, "model_negative": ["1", 0]}, 1, "cfg"),
        ("LTXVDualCFGGuider", {"video_cfg": 1.0, "audio_cfg": 1.0}, 1, "cfg"),
        ("LTXVDualCFGGuider", {"video_cfg": 1.0, "audio_cfg": 3.0}, 2, None),
    ):
        answer = drawn(live, guided_by(kind, **inputs))
        assert answer["nothing"] == nothing and answer["notes"] == [], kind
        assert answer["rows_everywhere"] == rows * 6
        assert (answer["guided"] > 0) == (nothing is None) == (answer["saved"] > 0)
        assert any(p[2] for p in answer["points"]) == (nothing is None)
    assert notes(live, guided_by("SomebodysGuider", cfg=2.0)) == [["unknown_guider", "SomebodysGuider"]]
    assert [code for code, _ in notes(live, guided_by("SomebodysGuider"))] == ["unknown_guider", "cfg_unknown"]


def test_a_sampler_without_a_step(live):
    late = {"start_at_step": 10, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    for kind, inputs in (("KSamplerAdvanced", late), ("KSampler", {"denoise": 0.0}), ("KSampler", {"denoise": 0.01})):
        prompt = prompt_with({**inputs, "steps": 8 if kind == "KSamplerAdvanced" or not inputs["denoise"] else 1})
        prompt["3"]["class_type"] = kind
        answer = drawn(live, prompt)
        empty = inputs.get("denoise") != 0.01
        assert (answer["steps"], answer["nothing"]) == ((0, "steps") if empty else (1, None))
        assert answer["points"] == [] or not empty
    counted = node("GuidanceIntervalSteps", model=["1", 0], first_step=2, last_step=4, sigmas=["4", 0])
    prompt = prompt_with(late, n2=counted, n4=node("SplitSigmas", sigmas=["5", 0], step=0))
    prompt["5"] = node("KarrasScheduler", steps=6, sigma_max=14.6, sigma_min=0.03, rho=7.0)
    assert drawn(live, prompt)["nothing"] == "steps"


def test_one_node_before_two_samplers_says_which(live):
    prompt = prompt_with()
    prompt["12"] = node("KSampler", **{**prompt["3"]["inputs"], "steps": 3})
    answer = drawn(live, prompt)
    assert answer["notes"] == [["samplers", "KSampler #3"]] and answer["sampler_id"] == "3"
    # After a sampler that hands its model on, too.
    del prompt["12"]
    prompt["3"] |= {"class_type": "KSampler (Efficient)", "types": {"inputs": {}, "outputs": ["MODEL", "LATENT"]}}
    prompt["4"] = node("KSampler", **{**prompt["3"]["inputs"], "model": ["3", 0]})
    assert ["samplers", "KSampler (Efficient) #3"] in notes(live, prompt)


def test_the_comparison_replaces_the_interval_before_it(live):
    prompt = prompt_with()
    prompt["3"]["class_type"] = "GuidanceIntervalCompare"
    assert notes(live, prompt) == [["replaced", "GuidanceIntervalCompare"]]


def test_samplers_of_packs_are_read_as_the_hosts_and_said(live):
    prompt = prompt_with({"script": ["9", 0]}, n9=node("HighRes-Fix Script"))
    prompt["3"] |= {"class_type": "KSampler (Efficient)"}
    prompt["3"]["types"] = {"inputs": {"model": "MODEL", "script": "SCRIPT"}, "outputs": ["LATENT"]}
    assert notes(live, prompt) == [["read_as", "KSampler (Efficient)"], ["also", "script"]]
    twice = custom(["4", 0], n4=node("KarrasScheduler", steps=6, sigma_max=14.6, sigma_min=0.03, rho=7.0))
    twice["3"]["class_type"] = "SomebodysCustom"
    twice["3"]["inputs"]["sigmas2"] = ["4", 0]
    twice["3"]["types"] = {"inputs": {"sigmas2": "SIGMAS", "sigmas": "SIGMAS", "model": "MODEL"}}
    assert notes(live, twice) == [["read_as", "SomebodysCustom"], ["also", "sigmas2"]]


def test_a_model_that_goes_on_where_nothing_is_known(live):
    detailer = {"9": node("SomebodysDetailer", model=["2", 0], guide_size=512)}
    prompt = {key: value for key, value in prompt_with().items() if key != "3"} | detailer
    assert notes(live, prompt) == [["unfollowed", "SomebodysDetailer"]]
    prompt["9"]["types"] = {"inputs": {"model": "MODEL"}, "outputs": ["IMAGE"]}
    assert notes(live, prompt) == [["unfollowed", "SomebodysDetailer"]]
    prompt["9"]["types"]["outputs"] = ["MODEL", "IMAGE"]  # After which nothing comes.
    assert notes(live, prompt) == [["no_sampler", 20]]
    del prompt["9"]
    assert notes(live, prompt) == [["no_sampler", 20]]
    # Through a pipe of another pack.
    piped = prompt_with({"model": ["9", 1]}, n9=node("SomebodysPipeOut", pipe=["8", 0]))
    piped["8"] = node("SomebodysPipeIn", model=["2", 0], vae=["1", 2])
    piped["8"]["types"] = {"inputs": {"model": "MODEL"}, "outputs": ["PIPE"]}
    piped["9"]["types"] = {"inputs": {"pipe": "PIPE"}, "outputs": ["PIPE", "MODEL", "VAE"]}
    answer = drawn(live, piped)
    assert (answer["steps"], answer["notes"]) == (8, [])
    # And through its switch, of which only its own run knows the way.
    piped["9"] = node("SomebodysSwitch", select=2, input1=["1", 0], input2=["2", 0])
    piped["3"]["inputs"]["model"] = ["9", 0]
    piped["9"]["types"] = {"inputs": {"input1": "*", "input2": "*"}, "outputs": ["*"]}
    answer = drawn(live, piped)
    assert (answer["steps"], answer["notes"]) == (8, [["choice", "SomebodysSwitch"]])


def test_types_that_equal_every_other(host, live, monkeypatch):
    class Any(str):
        def __eq__(self, other):
            return True

        def __ne__(self, other):
            return False

        __hash__ = str.__hash__

    class Flexible(dict):
        def __contains__(self, key):
            return True

        def __getitem__(self, key):
            return (Any("*"),)

    class Switch:
        INPUT_TYPES = staticmethod(lambda: {"required": {"any1": (Any("*"),)}, "optional": Flexible(any2=(Any("*"),))})
        RETURN_TYPES = (Any("*"), "STRING")

    class Broken:
        @staticmethod
        def INPUT_TYPES():
            raise RuntimeError("a file is missing")

    monkeypatch.setitem(host.nodes, "SomebodysSwitch", Switch)
    monkeypatch.setitem(host.nodes, "SomebodysBroken", Broken)
    prompt = prompt_with({"model": ["9", 0]}, n9=node("SomebodysSwitch", select=1, any1=["2", 0], any2=["1", 0]))
    assert notes(live, prompt) == [["choice", "SomebodysSwitch"]]
    prompt["3"]["inputs"]["model"] = ["9", 1]  # A text.
    assert notes(live, prompt) == [["no_sampler", 20]]
    prompt["3"]["inputs"]["model"] = ["9", 0]
    prompt["9"] = node("SomebodysBroken", model=["2", 0])
    assert notes(live, prompt) == []


def test_own_values_that_are_not_known_are_said(live):
    prompt = prompt_with(n9=node("SomebodysNumber"))
    prompt["2"]["inputs"] |= {"sigma_lo": ["9", 0], "units": ["9", 0]}
    assert notes(live, prompt) == [
        ["linked", "sigma_lo = 0.28 (SomebodysNumber)"],
        ["linked", "units = edm (SomebodysNumber)"],
    ]
    assert notes(live, prompt_with({"start_at_step": ["9", 0]}, n9=node("X"))) == [["without", "start_at_step (X)"]]
    assert notes(live, prompt_with({"denoise": 1.5})) == [["unknown", "denoise"]]
    assert notes(live, prompt_with({"scheduler": "of a pack"})) == [["unknown", "scheduler = 'of a pack'"]]
    counted = node("GuidanceIntervalSteps", model=["1", 0], first_step=2, last_step=4, sigmas=["9", 0])
    assert notes(live, prompt_with(n2=counted, n9=node("X"))) == [["unknown_sigmas", "X"]]


def test_a_sampler_with_an_input_that_is_not_there(live):
    """It is linked to a node that is muted, so that the page cannot send it."""
    prompt = prompt_with()
    for name in ("steps", "sampler_name", "scheduler", "cfg"):
        del prompt["3"]["inputs"][name]
    assert notes(live, prompt) == [
        ["linked", "sampler_name = euler"],
        ["linked", "scheduler = normal"],
        ["linked", "steps = 20"],
        ["cfg_unknown", "cfg"],
    ]
    prompt["3"] = node("SamplerCustom", model=["2", 0], cfg=4.0)
    assert notes(live, prompt) == [["unknown_sigmas", "sigmas"], ["unknown_sampler", "sampler"]]
    prompt["3"] = node("SamplerCustomAdvanced", guider=["9", 0])
    prompt["9"] = node("CFGGuider", model=["2", 0], cfg=3.0)
    assert notes(live, prompt) == [["unknown_sigmas", "sigmas"], ["unknown_sampler", "sampler"]]


def test_what_is_remembered_is_of_the_same_values(live):
    """A shift that is linked is part of what led to the model."""
    prompt = prompt_with(
        n8=node("SomebodysShift", model=["6", 0], shift=["9", 0]), n9=node("PrimitiveFloat", value=3.0)
    )
    prompt["6"] = node("LoraLoader", model=["1", 0], lora_name="x", strength_model=1.0)
    prompt["2"]["inputs"]["model"] = ["8", 0]
    ran = json.loads(json.dumps(prompt))
    ran["6"]["inputs"]["clip"], ran["3"]["inputs"]["seed"] = ["1", 1], 9  # What the page does not send.
    ran["8"]["inputs"]["noise_seed"] = 5
    hidden = types.SimpleNamespace(unique_id="2", prompt=ran)
    live.events.teller(types.SimpleNamespace(hidden=hidden), harness.tiny_model("flow"))

    def known(prompt):
        return "model" not in {code for code, _ in live.route.describe(prompt, "2")["notes"]}

    assert known(prompt)
    prompt["9"]["inputs"]["value"] = 4.0
    assert not known(prompt)

    # So is the size of a latent, where it counts.
    def digest(kind, width):
        latent = node("EmptyLTXVLatentVideo", width=width, height=512, length=97)
        made = node(kind, model=["1", 0], latent=["5", 0], max_shift=2.05, base_shift=0.95)
        return live.prompt_graph.Graph({"4": made, "5": latent}).digest("4")

    assert digest("ModelSamplingLTXV", 512) == digest("ModelSamplingLTXV", 512) != digest("ModelSamplingLTXV", 768)

    # Where a choice is open, nothing is remembered: it may have been the other one.
    prompt["9"] = node("SomebodysSwitch", on_true=["1", 0])
    prompt["2"]["inputs"]["model"] = ["7", 0]
    prompt["7"] = node("ComfySwitchNode", switch=["9", 0], on_false=["8", 0], on_true=["1", 0])
    hidden.prompt = prompt
    before = live.weightless.changes
    live.events.teller(types.SimpleNamespace(hidden=hidden), harness.tiny_model("flow"))
    assert live.weightless.changes == before and not known(prompt)
