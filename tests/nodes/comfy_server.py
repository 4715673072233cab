"""A stock ComfyUI server on loopback, with this folder in its custom_nodes, and workflows as they are sent to it."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from pathlib import Path

import av
import comfy_harness as harness
import numpy as np
import pytest

FOLDER = "any-name"
NODES = {
    "GuidanceInterval",
    "GuidanceIntervalPercent",
    "GuidanceIntervalSteps",
    "GuidanceIntervalPreset",
    "GuidanceIntervalGuider",
    "GuidanceIntervalSchedule",
    "GuidanceIntervalCompare",
    "GuidanceIntervalDemoModel",
    "GuidanceIntervalDemoPrompt",
}


class Server:
    def __init__(self, url, folder):
        self.url, self.folder = url, folder

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return json.load(response)

    def post(self, path, body, read=True):
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response) if read else None

    def run(self, prompt, timeout=180):
        """The outputs of each node of a prompt, {node id: outputs}; fails with the server's error."""
        number = self.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})["prompt_id"]
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            history = self.get(f"/history/{number}").get(number)
            if history and history["status"]["completed"]:
                return history["outputs"]
            if history and history["status"]["status_str"] == "error":
                pytest.fail(json.dumps(history["status"]["messages"][-1])[:2000])
            time.sleep(0.2)
        pytest.fail(f"not finished after {timeout} s")

    def read(self, entry):
        """A saved picture, the frames of a video, or a sound in one piece; arrays, channels last."""
        with av.open(self.folder / entry["type"] / entry.get("subfolder", "") / entry["filename"]) as file:
            if file.streams.video:
                return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            return [np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1).T]


def install_pack(folder):
    """Copy what git knows of this repository to `folder`, as users have it in custom_nodes."""
    listed = ["git", "-C", str(harness.ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (harness.ROOT / name).is_file():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(harness.ROOT / name, target)


def start_server(comfyui_path, base, port=0):
    """`(process, url)` of a ComfyUI on loopback whose models, custom nodes and outputs are in `base`; it may not be up
    yet (`wait_for`)."""
    if not port:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--disable-auto-launch", "--database-url", "sqlite:///:memory:"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(base / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=comfyui_path, stdout=log, stderr=subprocess.STDOUT, env=env)
    return process, f"http://127.0.0.1:{port}"


def wait_for(process, url, base):
    """Wait until a server answers."""
    deadline = time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(url + "/system_stats", timeout=30).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail("the server did not start:\n" + (base / "log.txt").read_text()[-3000:])
            time.sleep(0.5)


def new_base(base):
    """`base` as a server's base directory: its folders, and the files of this repository under custom_nodes."""
    for name in ("custom_nodes", "input", "output", "temp", "user"):
        (base / name).mkdir()
    for name in ("checkpoints", "diffusion_models", "loras", "text_encoders", "vae"):
        (base / "models" / name).mkdir(parents=True)
    install_pack(base / "custom_nodes" / FOLDER)
    return base


@contextlib.contextmanager
def running(comfyui_path, base):
    """A Server, which is stopped at the end."""
    process, url = start_server(comfyui_path, base)
    try:
        wait_for(process, url, base)
        yield Server(url, base)
    finally:
        process.terminate()
        process.wait(timeout=30)


# ----------------------------------------------------------------------------
# From the file that a user opens to what the front end sends.


def node_inputs(info):
    """[(name, type, options)] in the order of the node's widgets."""
    fields = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return [(name, field[0], field[1] if len(field) > 1 else {}) for name, field in fields.items()]


def to_prompt(workflow, object_info):
    """API format of a workflow in UI format; asserts that every node exists and every link fits."""
    links = {link[0]: link for link in workflow["links"]}
    by_id = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        assert node["type"] in object_info, f"{node['type']} is missing"
        linked = {i["name"]: i["link"] for i in node["inputs"] if i["link"] is not None}
        values = iter(node["widgets_values"])
        inputs = {}
        fields = node_inputs(object_info[node["type"]])
        while fields:
            name, kind, options = fields.pop(0)
            is_widget = isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
            if kind == "COMFY_DYNAMICCOMBO_V3":  # Of newer hosts: each choice has inputs of its own.
                choices = {choice["key"]: choice for choice in options["options"]}
                inputs[name] = next(values, next(iter(choices)))
                of_choice = node_inputs({"input": choices[inputs[name]]["inputs"]})
                fields[:0] = [(f"{name}.{field}", *rest) for field, *rest in of_choice]
            if is_widget:
                inputs[name] = next(values, options.get("default"))  # A newer host's node may have more widgets.
                if options.get("control_after_generate") or options.get("image_upload"):
                    next(values, None)
            if name in linked:
                _, source, slot, target, _, link_type = links[linked[name]]
                assert target == node["id"]
                output = object_info[by_id[source]["type"]]["output"][slot]
                assert link_type == output and kind in (output, "*"), (node["type"], name)
                inputs[name] = [str(source), slot]
        assert node["type"] not in NODES or next(values, None) is None  # The host's own may have lost some.
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def load_workflow(name):
    return json.loads((harness.ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
