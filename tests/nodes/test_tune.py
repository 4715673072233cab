"""The tuner on real ComfyUI servers on loopback: both are used, and whatever is killed, no trial is lost or doubled."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import comfy_harness as harness
import comfy_server
import optuna
import pytest
import torch
from guidance_interval import presets
from guidance_interval.errors import UserError
from guidance_interval.toy import model
from guidance_interval.tune.servers import comfyui, workflow
from guidance_interval.tune.servers.backend import CONDITIONAL, Job, Refused, Setting, everywhere, paste_comfyui
from guidance_interval.tune.servers.client import Client
from optuna.trial import TrialState
from PIL import Image

KILLS = int(os.environ.get("GUIDANCE_INTERVAL_KILLS", 1))  # Rounds; ten take a few minutes.
TRIALS, IMAGES = 6 if KILLS == 1 else 20, 8


def graph(**sampler):
    """`workflows/01_try_it.json` for the API, with a sampler in the comparison's place."""
    inputs = dict(seed=2, steps=6, cfg=4.0, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0) | sampler
    links = dict(model=["1", 0], positive=["2", 0], negative=["3", 0], latent_image=["1", 2])
    return {
        "1": {"class_type": "GuidanceIntervalDemoModel", "inputs": {"batch_size": 6}},
        "2": {"class_type": "GuidanceIntervalDemoPrompt", "inputs": {"subgroup": "plant-flower"}},
        "3": {"class_type": "GuidanceIntervalDemoPrompt", "inputs": {"subgroup": "none"}},
        "4": {"class_type": "KSampler", "inputs": inputs | links},
        "5": {"class_type": "VAEDecode", "inputs": {"samples": ["4", 0], "vae": ["1", 1]}},
        "6": {"class_type": "SaveImage", "inputs": {"images": ["5", 0], "filename_prefix": "x"}},
    }


class Servers:
    """Two ComfyUI on loopback, each with a folder of its own."""

    def __init__(self, comfyui_path, folder):
        self.path, self.bases, self.running = comfyui_path, [folder / "a", folder / "b"], {}
        for base in self.bases:
            for name in ("custom_nodes", "input", "output", "temp", "user", "models"):
                (base / name).mkdir(parents=True)
            comfy_server.install_pack(base / "custom_nodes" / "pack")

    def start(self, *which):
        for i in which or (0, 1):
            port = int(self.running[i][1].rsplit(":")[-1]) if i in self.running else 0
            self.running[i] = comfy_server.start_server(self.path, self.bases[i], port)
        for i in which or (0, 1):
            comfy_server.wait_for(*self.running[i], self.bases[i])

    def kill(self, i):
        self.running[i][0].kill()
        self.running[i][0].wait()

    @property
    def urls(self):
        return [self.running[i][1] for i in (0, 1)]

    def prompts(self, i):
        return (self.bases[i] / "log.txt").read_text().count("got prompt")


@pytest.fixture(scope="module")
def two(comfyui_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    found, context = Servers(comfyui_path, folder), pytest.MonkeyPatch()
    context.setenv("GUIDANCE_INTERVAL_PRESETS", str(folder / "presets.toml"))  # The servers' too.
    try:
        found.start()
        yield found
    finally:
        context.undo()
        for process, _ in found.running.values():
            process.kill()
            process.wait()


@pytest.fixture
def files(tmp_path):
    (tmp_path / "flowers.json").write_text(json.dumps(graph()))
    (tmp_path / "prompts.txt").write_text("\n".join(model.read_config(model.shipped()["emoji"])["classes"][:24]))
    return tmp_path


def command(two, files):
    args = [sys.executable, "-m", "guidance_interval", "tune", str(files / "flowers.json"), "--out", str(files / "out")]
    args += ["--prompts", str(files / "prompts.txt"), "--trials", str(TRIALS), "--images", str(IMAGES)]
    return args + [part for url in two.urls for part in ("--server", url)]


def trials(files):
    try:
        study = optuna.load_study(study_name="flowers", storage=f"sqlite:///{files / 'out' / 'study.db'}")
        return study.get_trials()
    except Exception:  # Not there yet, or not whole.
        return []


def images(files):
    return len(list((files / "out").glob("*/*/*.png")))


# ----------------------------------------------------------------------------
# Conditional only, as it is pasted and as every trial of it is rendered.


def zero_terminal(model, host):
    return harness.run_node(host, "ModelSamplingDiscrete", model=model, sampling="v_prediction", zsnr=True)[0]


def noisiest_edm(model, host):
    return harness.run_node(host, "ModelSamplingContinuousEDM", model=model, sampling="edm", sigma_max=1000.0)[0]


def shifted(model, host):
    return harness.run_node(host, "ModelSamplingSD3", model=model, shift=8.0)[0]


@pytest.mark.parametrize("name", ["GuidanceInterval", "GuidanceIntervalGuider"])
@pytest.mark.parametrize(
    ("kind", "change"),
    [("sd15", None), ("sd15", noisiest_edm), ("v-prediction", None), ("v-prediction", zero_terminal), ("sdxl", None),
     ("flow", None), ("flow", shifted), ("video", None), ("video", shifted), ("audio", None)],
)  # fmt: skip
def test_conditional_only_guides_no_evaluation_of_any_model(host, kind, change, name):
    import comfy.samplers

    plain = harness.tiny_model(kind) if change is None else change(harness.tiny_model(kind), host)
    conds = {"positive": harness.conditioning(1), "negative": harness.conditioning(2)}
    inputs = {"model": plain, **paste_comfyui(CONDITIONAL)["inputs"]}
    if name == "GuidanceInterval":
        guider = comfy.samplers.CFGGuider(harness.run_node(host, name, **inputs)[0])
        guider.set_conds(*conds.values())
        guider.set_cfg(7.0)
    else:
        guider = harness.run_node(host, name, **inputs, **conds, cfg=7.0)[0]
    stock = comfy.samplers.CFGGuider(plain)
    stock.set_conds(*conds.values())
    stock.set_cfg(1.0)
    sampling = plain.get_model_object("model_sampling")
    highest = comfy.samplers.calculate_sigmas(sampling, "simple", 4)[0].item()
    assert highest == (1.0 if kind in harness.FLOW else pytest.approx(sampling.sigma_max.item()))
    highest *= 1.0000002  # What rounding may make of it, which for a flow model is beyond the end of time.
    sigmas = torch.tensor([highest, highest / 3, 1e-3, 1e-6, 1e-30, 0.0])
    finals = []
    for one in (guider, stock):
        with torch.inference_mode(), harness.counted_rows(plain) as rows:
            latent = harness.empty_latent(kind)
            sampler = comfy.samplers.sampler_object("euler")
            evaluations, final = harness.record(one, sampler, sigmas, latent, rows)
        assert [e.rows for e in evaluations] == [1] * 5
        finals.append(final)
    assert torch.equal(*finals)


# ----------------------------------------------------------------------------
# The servers.


def test_images_come_from_both_and_are_of_their_settings(two, files):
    backend = comfyui.Comfy(files / "flowers.json", two.urls)
    assert backend.weight == 4 and len(backend.sigmas) == 6 and backend.shows_emoji
    before = [two.prompts(i) for i in (0, 1)]
    jobs = [Job(s, p, 7) for s in (everywhere(4.0), CONDITIONAL) for p in ("fruit", "food-fruit", "heart", "cat-face")]
    with pytest.raises(Refused, match=r"GuidanceIntervalDemoPrompt.*fruit"):
        list(backend.render(jobs))
    jobs = [j for j in jobs if j.prompt != "fruit"]
    found = dict(backend.render(jobs))
    assert len(found) == len(jobs) and all(two.prompts(i) > before[i] for i in (0, 1))
    assert [found[i].rows for i in range(6)] == [12.0] * 3 + [6.0] * 3
    assert len({r.image.tobytes() for r in found.values()}) == 6
    again = dict(backend.render(jobs[::-1]))
    assert all(found[i].image.tobytes() == again[5 - i].image.tobytes() for i in range(6))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"4": {"class_type": "KSampler", "inputs": graph()["4"]["inputs"] | {"scheduler": "my"}}}, "'my' .scheduler"),
        ({"7": {"class_type": "SomeoneElses", "inputs": {}}}, "lacks the node SomeoneElses"),
    ],
)
def test_what_a_server_lacks_is_told_before_the_first_image(two, files, what, message):
    (files / "flowers.json").write_text(json.dumps(graph() | what))
    with pytest.raises(UserError, match=rf"cannot run: {two.urls[0]} .*{message}.*; {two.urls[1]}"):
        comfyui.Comfy(files / "flowers.json", two.urls)


def test_an_interval_that_is_there_is_replaced(two, files):
    nodes = graph(cfg=["8", 1])
    nodes["7"] = {"class_type": "GuidanceInterval", "inputs": {"model": ["1", 0], "sigma_lo": 1.0, "sigma_hi": 2.0}}
    nodes["8"] = {"class_type": "GuidanceIntervalPreset", "inputs": {"model": ["7", 0], "preset": "edm2-xxl-fid"}}
    nodes["4"]["inputs"]["model"] = ["8", 0]
    (files / "flowers.json").write_text(json.dumps(nodes))
    backend = comfyui.Comfy(files / "flowers.json", two.urls[:1])
    assert backend.weight == 2.0  # The preset's.
    job = Job(everywhere(4.0), "heart", 7)
    (files / "plain.json").write_text(json.dumps(graph()))
    plain = comfyui.Comfy(files / "plain.json", two.urls[:1])
    (_, ours), (_, theirs) = *backend.render([job]), *plain.render([job])
    assert ours.image.tobytes() == theirs.image.tobytes()


def test_a_picture_of_comfyui_is_a_workflow_too(two, files):
    server = comfyui.Server(two.urls[0])
    job = server.queue(graph())
    while (found := server.finished(job)) is None:
        time.sleep(0.1)
    entry = found[0]["6"]["images"][0]
    saved = two.bases[0] / "output" / entry["subfolder"] / entry["filename"]
    assert workflow.read(saved) == workflow.read(files / "flowers.json")
    Image.open(saved).save(files / "stripped.png")
    with pytest.raises(UserError, match=r"stripped.png' holds no workflow"):
        workflow.read(files / "stripped.png")


def test_the_preset_node_lists_what_was_saved_and_renders_it(two, files):
    entry = dict(model="flowers.json", sigma_lo=0.5, sigma_hi=20.0, weight=6.0, weight_everywhere=4.0, study="flowers")
    presets.save_mine("mine", entry)
    server = comfyui.Server(two.urls[0])
    options = server.object_info().inputs("GuidanceIntervalPreset")["preset"]
    assert options == [*presets.PRESETS, "mine (measured by you)"]  # Without a restart.
    nodes = graph(cfg=["8", 1], seed=7)
    nodes["8"] = {"class_type": "GuidanceIntervalPreset", "inputs": {"model": ["1", 0], "preset": options[-1]}}
    nodes["4"]["inputs"]["model"], nodes["2"]["inputs"]["subgroup"] = ["8", 0], "heart"
    nodes["1"]["inputs"]["batch_size"] = 1
    job = server.queue(nodes)
    while (found := server.finished(job)) is None:
        time.sleep(0.1)
    backend = comfyui.Comfy(files / "flowers.json", two.urls[:1])
    ((_, ours),) = backend.render([Job(Setting(0.5, 20.0, 6.0), "heart", 7)])
    assert server.image(found[0]["6"]["images"][0]).tobytes() == ours.image.tobytes()


# ----------------------------------------------------------------------------
# What is forecast is what runs.


def two_stages():
    """Two samplers that share a schedule of eight steps; the second evaluates twice a step, but for the last."""
    nodes = graph()
    of_both = {k: v for k, v in nodes["4"]["inputs"].items() if k not in ("seed", "denoise")} | {"steps": 8}
    first = dict(noise_seed=2, add_noise="enable", start_at_step=0, end_at_step=5, return_with_leftover_noise="enable")
    second = dict(noise_seed=2, add_noise="disable", start_at_step=5, end_at_step=10000, sampler_name="heun")
    second |= dict(return_with_leftover_noise="disable", latent_image=["4", 0])
    nodes["4"] = {"class_type": "KSamplerAdvanced", "inputs": of_both | first}
    nodes["7"] = {"class_type": "KSamplerAdvanced", "inputs": of_both | second}
    nodes["5"]["inputs"]["samples"] = ["7", 0]
    return nodes


def runs(server, nodes):
    """What our nodes on a server tell of each run of a prompt: `{sampler: report}`."""
    found = {}
    with server.listen() as socket:
        job = server.queue(nodes)
        while True:
            message = socket.recv(timeout=60)
            told = {"type": "preview"} if isinstance(message, bytes) else json.loads(message)
            if told["type"] == "guidance_interval.run":
                assert told["data"]["sampler"] not in found
                found[told["data"]["sampler"]] = told["data"]
            if told["type"] == "executing" and told["data"] == {"node": None, "prompt_id": job}:
                return found


@pytest.mark.parametrize(
    ("nodes", "evaluations"), [(graph(sampler_name="heun"), {"4": 11}), (two_stages(), {"4": 5, "7": 5})]
)
def test_as_many_evaluations_run_as_are_forecast(two, files, nodes, evaluations):
    (files / "flowers.json").write_text(json.dumps(nodes))
    backend, setting = comfyui.Comfy(files / "flowers.json", two.urls[:1]), Setting(0.5, 8.0, 4.0)
    assert len(backend.sigmas) == sum(evaluations.values())
    told = "\n".join(backend.describe())
    for n, count in evaluations.items():
        assert f"  node {n} ({nodes[n]['class_type']}): {count} evaluations, sigma " in told
    found = runs(backend.servers[0], backend.workflow.graph(setting, "heart", 7))
    assert {n: run["evaluations"] for n, run in found.items()} == evaluations
    rows = sum(run["rows"] for run in found.values())
    assert setting.rows(backend.sigmas) == rows and len(backend.sigmas) < rows < 2 * len(backend.sigmas)


# ----------------------------------------------------------------------------
# Killed.


def test_a_server_and_the_tuner_are_killed_and_nothing_is_lost_or_doubled(two, files):
    draw = random.Random(0)
    for round_ in range(KILLS):
        with open(files / "log.txt", "a") as log:
            tuner = subprocess.Popen(command(two, files), stdout=log, stderr=log)
        victims = draw.choice([("server",), ("tuner",), ("server", "tuner")]) if KILLS > 1 else ("server", "tuner")
        wait(lambda t=tuner, n=8 * (round_ + 1): images(files) >= n or t.poll() is not None, files)
        if "server" in victims:
            two.kill(1)
            had = images(files)
            wait(lambda t=tuner, n=had + 5: images(files) >= n or t.poll() is not None, files)
        if tuner.poll() is not None:  # All was done before.
            assert tuner.returncode == 0, (files / "log.txt").read_text()[-3000:]
        tuner.kill()
        tuner.wait()
        if "server" in victims:
            two.start(1)
    before = [two.prompts(i) for i in (0, 1)]
    done = subprocess.run(command(two, files), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(two.prompts(i) > before[i] for i in (0, 1))  # The one that came back as well.

    found = trials(files)
    states = Counter(t.state for t in found)
    assert states[TrialState.COMPLETE] == TRIALS and not states[TrialState.RUNNING] + states[TrialState.WAITING]
    complete = [t for t in found if t.state == TrialState.COMPLETE]
    assert len({tuple(t.user_attrs["setting"]) for t in complete}) == TRIALS
    history = Counter(n for t in complete for n in t.system_attrs.get("retry_history", []))
    failed = {t.number for t in found if t.state == TrialState.FAIL}
    assert set(history) == failed and set(history.values()) <= {1}  # Each was tried again, once.
    told = json.loads((files / "out" / "confirmed.json").read_text())
    assert sum(t["state"] == "complete" for t in told["trials"]) == TRIALS
    for setting in told["settings"]:
        assert len(setting["images"]) == 64 and all((files / "out" / name).is_file() for name in setting["images"])

    # A third time there is nothing to render.
    before = [two.prompts(i) for i in (0, 1)]
    subprocess.run(command(two, files), check=True, capture_output=True, timeout=120)
    assert [two.prompts(i) for i in (0, 1)] == before


def test_without_any_server_it_ends_after_a_while(two, files, monkeypatch):
    backend = comfyui.Comfy(files / "flowers.json", two.urls)
    monkeypatch.setattr(comfyui, "ALONE", 1)
    for server in backend.servers:
        server.client = Client("--server", "127.0.0.1:9", "", lambda *_: None)  # As if both had died since.
    with pytest.raises(UserError, match=r"no server answers any more .*what is done is kept: start one"):
        list(backend.render([Job(CONDITIONAL, "heart", 1)]))


def wait(for_what, files, seconds=120):
    deadline = time.monotonic() + seconds
    while not for_what():
        assert time.monotonic() < deadline, (files / "log.txt").read_text()[-3000:]
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--server", "http://127.0.0.1:9"], "no ComfyUI there"),
        (["--server", "file:///etc"], "is not an address"),
    ],
)
def test_no_server_is_told_in_one_sentence(files, args, message):
    run = [sys.executable, "-m", "guidance_interval", "tune", str(files / "flowers.json"), *args]
    done = subprocess.run([*run, "--prompts", str(files / "prompts.txt")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
