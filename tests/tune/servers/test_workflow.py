"""Workflows of ComfyUI made ready: what is found in them, what is changed, what is refused, in a sentence and soon."""

import json
import math
import os
import time

import pytest
from guidance_interval import files
from guidance_interval.errors import UserError
from guidance_interval.tune import command
from guidance_interval.tune.servers import workflow
from guidance_interval.tune.servers.backend import CONDITIONAL, Setting, everywhere


def node(output=(), required=None, optional=None, output_node=False):
    spec = {k: v if isinstance(v, list) else [v, {}] for k, v in {**(required or {}), **(optional or {})}.items()}
    return {"input": {"required": spec}, "output": list(output), "output_node": output_node}


SAMPLER = dict(model="MODEL", positive="CONDITIONING", negative="CONDITIONING", latent_image="LATENT")
INFO = {
    "CheckpointLoaderSimple": node(["MODEL", "CLIP", "VAE"], {"ckpt_name": [["sd.safetensors"]]}),
    "CLIPTextEncode": node(["CONDITIONING"], {"text": "STRING", "clip": "CLIP"}),
    "ConditioningCombine": node(["CONDITIONING"], {"conditioning_1": "CONDITIONING", "conditioning_2": "CONDITIONING"}),
    "ControlNetApplyAdvanced": node(
        ["CONDITIONING", "CONDITIONING"], {"positive": "CONDITIONING", "negative": "CONDITIONING", "strength": "FLOAT"}
    ),
    "EmptyLatentImage": node(["LATENT"], {"width": "INT", "batch_size": "INT"}),
    "KSampler": node(["LATENT"], {**SAMPLER, "seed": "INT", "cfg": "FLOAT", "steps": "INT", "scheduler": [["karras"]]}),
    "KSamplerAdvanced": node(["LATENT"], {**SAMPLER, "noise_seed": "INT", "cfg": "FLOAT", "steps": "INT"}),
    "CFGGuider": node(["GUIDER"], {k: SAMPLER[k] for k in ("model", "positive", "negative")} | {"cfg": "FLOAT"}),
    "BasicGuider": node(["GUIDER"], {"model": "MODEL", "conditioning": "CONDITIONING"}),
    "RandomNoise": node(["NOISE"], {"noise_seed": "INT"}),
    "SamplerCustomAdvanced": node(
        ["LATENT"], {"noise": "NOISE", "guider": "GUIDER", "sigmas": "SIGMAS", "latent_image": "LATENT"}
    ),
    "BasicScheduler": node(["SIGMAS"], {"model": "MODEL", "steps": "INT", "denoise": "FLOAT"}),
    "SplitSigmas": node(["SIGMAS", "SIGMAS"], {"sigmas": "SIGMAS", "step": "INT"}),
    "ModelMergeSimple": node(["MODEL"], {"model1": "MODEL", "model2": "MODEL"}),
    "ImageScale": node(["IMAGE"], {"image": "IMAGE"}),
    "LoraLoaderModelOnly": node(["MODEL"], {"model": "MODEL", "strength_model": "FLOAT"}),
    "GuidanceInterval": node(["MODEL"], {"model": "MODEL", "sigma_lo": "FLOAT", "sigma_hi": "FLOAT"}),
    "GuidanceIntervalGuider": node(
        ["GUIDER"], {"model": "MODEL", "positive": "CONDITIONING", "cfg": "FLOAT", "sigma_lo": "FLOAT"}
    ),
    "PrimitiveFloat": node(["FLOAT"], {"value": "FLOAT"}),
    "PrimitiveString": node(["STRING"], {"value": "STRING"}),
    "VAEDecode": node(["IMAGE"], {"samples": "LATENT", "vae": "VAE"}),
    "SaveImage": node([], {"images": "IMAGE", "filename_prefix": "STRING"}, output_node=True),
    "PreviewImage": node([], {"images": "IMAGE"}, output_node=True),
}


def plain():
    """SD1.5's usual graph."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd.safetensors"}},
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["1", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "batch_size": 4}},
        "5": {
            "class_type": "KSampler",
            "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
                       "seed": 1, "cfg": 7.0, "steps": 20, "scheduler": "karras"},
        },
        "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
        "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "x"}},
    }  # fmt: skip


def made(graph):
    return workflow.Workflow("w.json", graph, workflow.Types(INFO))


def changed(**nodes):
    graph = plain()
    for n, inputs in nodes.items():
        graph[n.removeprefix("n")]["inputs"] |= inputs
    return graph


def test_the_node_goes_before_the_sampler_and_a_graph_is_of_its_job():
    flow = made(plain())
    assert flow.weight == 7.0
    sent = flow.graph(Setting(0.28, 5.42, 9.0), "a dog", 5)
    new = sent["guidance-interval-1"]
    assert sent["5"]["inputs"]["model"] == ["guidance-interval-1", 0] and new["inputs"]["model"] == ["1", 0]
    assert (new["inputs"]["sigma_lo"], new["inputs"]["sigma_hi"]) == (0.28, 5.42)
    assert (sent["5"]["inputs"]["cfg"], sent["5"]["inputs"]["seed"], sent["2"]["inputs"]["text"]) == (9.0, 5, "a dog")
    assert sent["3"]["inputs"]["text"] == "blurry" and sent["4"]["inputs"]["batch_size"] == 1
    assert sent["7"] == {"class_type": "PreviewImage", "inputs": {"images": ["6", 0]}}
    assert flow.graph(everywhere(7.0), "", 0)["guidance-interval-1"]["inputs"]["sigma_hi"] == -1.0
    conditional = flow.graph(CONDITIONAL, "", 0)["guidance-interval-1"]["inputs"]
    assert conditional["sigma_lo"] == 1e6 and conditional["sigma_hi"] == -1.0
    assert conditional["units"] == "model" and new["inputs"]["units"] == "edm"  # No model counts so far itself.
    json.dumps([sent, flow.graph(everywhere(7.0), "", 0)], allow_nan=False)


def test_an_interval_is_replaced_wherever_it_is_and_two_samplers_share_one():
    graph = plain()
    graph["8"] = {"class_type": "GuidanceInterval", "inputs": {"model": ["1", 0], "sigma_lo": 1.0, "sigma_hi": 2.0}}
    graph["9"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["8", 0], "strength_model": 1.0}}
    graph["5"]["inputs"]["model"] = ["9", 0]
    second = json.loads(json.dumps(graph["5"]))
    second["inputs"] |= {"latent_image": ["5", 0]}
    graph["10"], graph["6"]["inputs"]["samples"] = second, ["10", 0]
    flow = made(graph)
    sent = flow.graph(Setting(0.28, 5.42, 9.0), "p", 5)
    assert flow.limits == ["guidance-interval-1"] and sent["9"]["inputs"]["model"] == ["1", 0]
    assert all(sent[n]["inputs"]["model"] == ["guidance-interval-1", 0] for n in ("5", "10"))
    assert all(sent[n]["inputs"] | {"cfg": 9.0, "seed": 5} == sent[n]["inputs"] for n in ("5", "10"))


def test_guiders_primitives_and_conditionings_are_followed():
    graph = plain()
    graph["5"] = {"class_type": "SamplerCustomAdvanced",
                  "inputs": {"noise": ["11", 0], "guider": ["12", 0], "latent_image": ["4", 0]}}  # fmt: skip
    graph["11"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}}
    graph["12"] = {"class_type": "CFGGuider", "inputs": {"model": ["1", 0], "positive": ["13", 0],
                                                         "negative": ["13", 1], "cfg": ["14", 0]}}  # fmt: skip
    graph["13"] = {"class_type": "ControlNetApplyAdvanced",
                   "inputs": {"positive": ["2", 0], "negative": ["3", 0], "strength": 1.0}}  # fmt: skip
    graph["14"] = {"class_type": "PrimitiveFloat", "inputs": {"value": 5.5}}
    graph["2"]["inputs"]["text"] = ["15", 0]
    graph["15"] = {"class_type": "PrimitiveString", "inputs": {"value": "a cat"}}
    flow = made(graph)
    sent = flow.graph(Setting(0.28, 5.42, 9.0), "p", 5)
    assert flow.weight == 5.5 and sent["12"]["inputs"]["cfg"] == 9.0 and sent["11"]["inputs"]["noise_seed"] == 5
    assert sent["15"]["inputs"]["value"] == "p" and sent["3"]["inputs"]["text"] == "blurry"
    graph["12"] |= {"class_type": "GuidanceIntervalGuider"}
    graph["12"]["inputs"] |= {"sigma_lo": 1.0}
    flow = made(graph)
    assert flow.limits == ["12"] and flow.graph(Setting(0.28, 5.42, 9.0), "p", 5)["12"]["inputs"]["sigma_hi"] == 5.42


def test_a_placeholder_says_where_the_prompts_go():
    graph = plain()
    graph["2"]["inputs"]["text"] = "a photo of {prompt}, sharp"
    assert made(graph).graph(CONDITIONAL, "a dog", 0)["2"]["inputs"]["text"] == "a photo of a dog, sharp"


# ----------------------------------------------------------------------------
# Which image is judged.


def hires():
    """Two passes, each of which is saved; the first has the lower id."""
    graph = plain()
    graph["15"] = {
        "class_type": "KSampler",
        "inputs": graph["5"]["inputs"] | {"latent_image": ["5", 0], "denoise": 0.5},
    }
    graph["16"] = {"class_type": "VAEDecode", "inputs": {"samples": ["15", 0], "vae": ["1", 2]}}
    graph["17"] = {"class_type": "SaveImage", "inputs": {"images": ["16", 0], "filename_prefix": "y"}}
    return graph


def test_the_last_of_several_images_is_judged_and_another_one_can_be_named():
    flow = made(hires())
    assert flow.output == "17" and flow.samplers == ["5", "15"]
    assert flow.changes[0] == "node 17 (SaveImage) has the image that is judged; --output-node ID names another one"
    assert "node 7 (SaveImage) is left out" in flow.changes and "7" not in flow.graph(CONDITIONAL, "", 0)
    first = workflow.Workflow("w.json", hires(), workflow.Types(INFO), "7")
    assert first.output == "7" and first.samplers == ["5"]
    with pytest.raises(UserError, match=r"no image of a sampler at --output-node 99; there is node 7 .*, node 17 "):
        workflow.Workflow("w.json", hires(), workflow.Types(INFO), "99")
    preview = hires()
    preview["17"] = {"class_type": "PreviewImage", "inputs": {"images": ["16", 0]}}
    assert made(preview).output == "7"  # What is saved before what is shown.


def test_of_one_sampler_the_image_that_more_was_done_to_is_judged():
    graph = plain()
    graph["8"] = {"class_type": "ImageScale", "inputs": {"image": ["6", 0]}}
    graph["9"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}}
    assert made(graph).output == "9"
    graph["8"]["inputs"]["image"], graph["7"]["inputs"]["images"] = ["6", 0], ["6", 0]
    assert made(graph | {"9": graph["7"]}).output == "7"  # Of two that are equal, the first.


def test_of_images_that_have_nothing_in_common_one_must_be_named():
    graph = hires()
    graph["15"]["inputs"]["latent_image"] = ["4", 0]
    with pytest.raises(
        UserError, match=r"images of different samplers: name one with --output-node ID, of node 7 .*17 "
    ):
        made(graph)
    assert workflow.Workflow("w.json", graph, workflow.Types(INFO), "17").samplers == ["15"]


# ----------------------------------------------------------------------------
# Which samplers there are.


def two_stages():
    """A guider that two samplers have, one after the other."""
    graph = plain()
    graph["12"] = {"class_type": "CFGGuider", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0],
                                                         "cfg": 5.0}}  # fmt: skip
    graph["11"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}}
    graph["13"] = {"class_type": "BasicScheduler", "inputs": {"model": ["1", 0], "steps": 6, "denoise": 1.0}}
    graph["14"] = {"class_type": "SplitSigmas", "inputs": {"sigmas": ["13", 0], "step": 3}}
    for n, slot, latent in (("5", 0, ["4", 0]), ("15", 1, ["5", 0])):
        graph[n] = {"class_type": "SamplerCustomAdvanced",
                    "inputs": {"noise": ["11", 0], "guider": [12, 0], "sigmas": ["14", slot],
                               "latent_image": latent}}  # fmt: skip
    graph["6"]["inputs"]["samples"] = ["15", 0]
    return graph


def test_a_sampler_or_guider_is_foreseen_when_something_samples_with_it():
    flow = made(hires())
    assert flow.unforeseen(["5", "15"]) == [] and flow.unforeseen(["15"]) == ["5"]
    assert flow.unforeseen([]) == ["5", "15"]
    flow = made(two_stages())
    assert flow.samplers == ["12"]
    assert flow.unforeseen(["5", "15"]) == flow.unforeseen(["15"]) == [] and flow.unforeseen(["1"]) == ["12"]


def test_a_graph_may_keep_its_own_prompt_and_seed():
    sent = made(plain()).graph(everywhere(7.0))
    assert (sent["2"]["inputs"]["text"], sent["5"]["inputs"]["seed"]) == ("a cat", 1)


# ----------------------------------------------------------------------------
# Odd workflows: refused in a sentence, or read, and soon.


def chain(count):
    graph = plain()
    for i in range(count):
        before = ["1", 0] if i == 0 else [f"lora-{i - 1}", 0]
        graph[f"lora-{i}"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": before, "strength_model": 1.0}}
    graph["5"]["inputs"]["model"] = [f"lora-{count - 1}", 0]
    return graph


def doubled(count):
    """Conditionings, and models, each of which is combined with itself: 2^count ways."""
    graph = plain()
    for i in range(count):
        text, model = (["2", 0], ["1", 0]) if i == 0 else ([f"c-{i - 1}", 0], [f"m-{i - 1}", 0])
        graph[f"c-{i}"] = {
            "class_type": "ConditioningCombine",
            "inputs": {"conditioning_1": text, "conditioning_2": text},
        }
        graph[f"m-{i}"] = {"class_type": "ModelMergeSimple", "inputs": {"model1": model, "model2": model}}
    graph["5"]["inputs"] |= {"positive": [f"c-{count - 1}", 0], "model": [f"m-{count - 1}", 0]}
    return graph


def patched(count):
    graph = plain()
    for i in range(count):
        before = ["1", 0] if i == 0 else [f"p-{i - 1}", 0]
        graph[f"p-{i}"] = {"class_type": "GuidanceInterval", "inputs": {"model": before}}
    graph["5"]["inputs"]["model"] = [f"p-{count - 1}", 0]
    return graph


@pytest.mark.parametrize("graph", [chain(2000), doubled(60), patched(2000)])
def test_long_and_entangled_workflows_are_read_at_once(graph):
    begin = time.process_time()
    flow = made(graph)
    assert flow.texts == [("2", "text")] and time.process_time() - begin < 2
    sent = flow.graph(CONDITIONAL, "", 0)
    if "p-0" in graph:
        assert sent["guidance-interval-1"]["inputs"]["model"] == ["1", 0]


def test_a_list_of_values_is_no_link():
    assert workflow.is_link(["5", 0]) and workflow.is_link([5, 1])
    assert not any(map(workflow.is_link, (["5", "b"], ["5"], [["5"], 0], "50", None)))


def in_a_circle():
    graph = chain(3)
    graph["lora-0"]["inputs"]["model"] = ["lora-2", 0]
    return graph


def without_a_model(name):
    graph = patched(1)
    graph["p-0"] = {"class_type": name, "inputs": {}}
    return graph


def guider_without_a_model():
    graph = plain()
    graph["12"] = {"class_type": "GuidanceIntervalGuider", "inputs": {"positive": ["2", 0], "cfg": 5.0}}
    graph["11"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 3}}
    graph["5"] = {"class_type": "SamplerCustomAdvanced", "inputs": {"guider": ["12", 0], "noise": ["11", 0]}}
    return graph


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (in_a_circle(), r"goes in a circle, which ComfyUI does not render: from node lora-\d to lora-\d"),
        (changed(n6={"samples": ["6", 0], "vae": ["5", 0]}), "goes in a circle.*from node 6 to 6$"),
        (without_a_model("GuidanceInterval"), r"no model at node p-0 .GuidanceInterval.: connect one there"),
        (without_a_model("GuidanceIntervalPreset"), "no model at node p-0 .GuidanceIntervalPreset."),
        (guider_without_a_model(), "no model at node 12 .GuidanceIntervalGuider."),
        (changed(n5={"model": None}), "no model at node 5 .KSampler."),
        (changed(n5={"cfg": 10**400}), r"has a cfg of 10000000… .401 digits. at node 5 .*type one up to 1000"),
        (changed(n5={"cfg": 1e300}), r"has a cfg of 1e\+300 at node 5"),
        (changed(n5={"cfg": -(10**400)}), "has a cfg of -1000000"),
        (changed(n5={"cfg": "\x1b[2J"}), "a cfg at node 5"),
        (changed(n5={"cfg": ["8", 0]}) | {"8": {"class_type": "GuidanceIntervalPreset", "inputs": {"preset": []}}},
         "a cfg at node 5 .KSampler. that another node computes"),
    ],
)  # fmt: skip
def test_an_odd_workflow_is_refused_in_a_sentence(graph, message):
    with pytest.raises(UserError, match=rf"^workflow 'w.json' .*{message}") as e:
        made(graph)
    assert str(e.value).isprintable() and len(str(e.value)) < 600


def test_a_circle_that_leads_nowhere_is_left_out():
    graph = plain()
    graph["20"] = {"class_type": "LoraLoaderModelOnly", "inputs": {"model": ["20", 0], "strength_model": 1.0}}
    assert "20" not in made(graph).graph(CONDITIONAL, "", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"2": None}, "is no workflow of ComfyUI"),
        ({"2": {"class_type": ["a"], "inputs": {}}}, "is no workflow of ComfyUI"),
        ({"2": {"class_type": "a\x1b[2J", "inputs": None}}, r"has null for the inputs of node 2 .a .2J."),
        ({"2": {"class_type": "a", "inputs": []}}, r"has \[\] for the inputs of node 2 .a."),
        ({"2": {"class_type": "a", "inputs": {"cfg": math.inf}}}, "holds Infinity, which is no number of JSON"),
        ({"2": {"class_type": "a", "inputs": {"cfg": math.nan}}}, "holds NaN"),
    ],
)
def test_a_workflow_with_an_odd_node_is_told(tmp_path, change, message):
    (tmp_path / "w.json").write_text(json.dumps(plain() | change))
    with pytest.raises(UserError, match=rf"w.json' {message}") as e:
        workflow.read(tmp_path / "w.json")
    assert str(e.value).isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"1": {"class_type": "a", "inputs": {"x": 1e999}}}', "holds a number beyond all bounds"),
        ('{"1": {"class_type": "a", "inputs": {"x": %s}}}' % ("[" * 200 + "]" * 200), "nested more than 100 levels"),
        ("[" * 100_000, "is neither JSON nor a PNG"),
        ('{"1": {"class_type": "a", "inputs": {"x": %s}}}' % ("1" * 5000), "is neither JSON nor a PNG"),
    ],
)  # fmt: skip
def test_deep_and_endless_json_is_told(tmp_path, text, message):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(UserError, match=rf"w.json' .*{message}"):
        workflow.read(tmp_path / "w.json")


def test_a_file_that_is_none_or_too_large_is_not_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        with pytest.raises(UserError, match=rf"workflow '{name}' is not a file"):
            workflow.read(name)
        with pytest.raises(UserError, match=rf"--prompts '{name}' is not a file"):
            command.read_prompts(str(name))
    (tmp_path / "w.json").write_text("{}" + " " * 100)
    with pytest.raises(UserError, match=r"w.json' is too large .0 MB, at most 0."):
        files.content_of(tmp_path / "w.json", "workflow", 50)
    with pytest.raises(UserError, match="cannot be read"):
        files.content_of("a\0b", "workflow")


@pytest.mark.parametrize("info", [None, [], 7, "a"])
def test_what_tells_of_no_nodes_is_none(info):
    with pytest.raises(TypeError):
        workflow.Types(info)


def test_what_a_server_tells_oddly_of_a_node_is_left_out():
    choices = {"x": ["COMBO", {"options": {"a": 1}}], "y": ["COMBO", {"options": ["a"]}]}
    odd = {"a": None, "b": {"input": []}, "c": {"input": {"required": {"x": [], "y": "INT", "z": [{}], "w": ["INT"]}}},
           "d": {"input": {"required": None, "optional": 3}, "output": "IMAGE"}, "e": {"output": None},
           "f": {"input": {"required": choices}}}  # fmt: skip
    types = workflow.Types(odd)
    assert "a" not in types and types.inputs("b") == types.inputs("d") == types.inputs("nowhere") == {}
    assert types.inputs("c") == {"x": None, "y": None, "z": None, "w": "INT"}
    assert types.outputs("d") == types.outputs("e") == [] and types.inputs("f") == {"x": None, "y": ["a"]}


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ({k: v for k, v in plain().items() if k != "5"}, "has no sampler: no node takes a model and a cfg"),
        ({k: v for k, v in plain().items() if k != "7"}, "saves no image that a sampler made"),
        (changed(n5={"cfg": 1.0}), "the cfg of its samplers is 1"),
        (changed(n5={"cfg": ["4", 0]}), r"a cfg at node 5 \(KSampler\) that another node computes"),
        (plain() | {"12": {"class_type": "ConditioningCombine",
                           "inputs": {"conditioning_1": ["2", 0], "conditioning_2": ["3", 0]}}}
         | {"5": changed(n5={"positive": ["12", 0]})["5"]}, r"has 2 nodes with text .*node 2.*node 3.*\{prompt\}"),
        (plain() | {"5": {"class_type": "BasicGuider", "inputs": {"model": ["1", 0]}}}, "node 5 .BasicGuider. has no"),
        (plain() | {"10": changed(n5={"cfg": 4.0, "latent_image": ["5", 0]})["5"],
                    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["10", 0], "vae": ["1", 2]}}},
         r"samplers of different cfg \(4, 7\)"),
    ],
)  # fmt: skip
def test_a_workflow_that_cannot_be_tuned_is_told_why(graph, message):
    with pytest.raises(UserError, match=rf"workflow 'w.json' .*{message}"):
        made(graph)


def test_what_is_missing_is_named():
    lacking = workflow.missing(changed(n1={"ckpt_name": "my.safetensors"}), workflow.Types(INFO))
    assert lacking == ["'my.safetensors' (ckpt_name of CheckpointLoaderSimple, node 1)"]
    found = workflow.missing(plain() | {"9": {"class_type": "FaceThing", "inputs": {}}}, workflow.Types({}))
    assert found[0].startswith("our node Guidance Interval (clone") and "the node FaceThing" in found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .No such file"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG that cannot be read"),
        (b"no json", "is neither JSON nor a PNG"),
        (b"[1]", "is no workflow of ComfyUI"),
        (b'{"nodes": [], "links": []}', r"is in the editor's form.*Export \(API\)"),
        (b'{"1": {"class_type": "KSampler"}}', r"has null for the inputs of node 1 .KSampler.; open it in ComfyUI"),
    ],
)
def test_what_is_no_workflow_is_told(tmp_path, content, message):
    file = tmp_path / "w.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"w.json' {message}"):
        workflow.read(file)
