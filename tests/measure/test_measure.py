"""`guidance-interval measure`, offline: networks of the real classes with random weights."""

import functools
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future

import numpy as np
import pytest
import torch
from guidance_interval import cli
from guidance_interval.errors import UserError
from guidance_interval.lab import judge, sweep
from guidance_interval.measure import features, folder, metrics, report
from guidance_interval.toy import data
from PIL import Image

# ----------------------------------------------------------------------------
# Images and networks.


load_digits = functools.cache(data.load_digits)


def write_digits(path, start, num, darker=1.0):
    """Class folders of real digits."""
    images, labels = load_digits()
    order = np.arange(len(labels)).reshape(10, -1).T.ravel()[start : start + num]  # The classes in turn.
    for i in order:
        file = path / str(labels[i]) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[i] * darker).astype(np.uint8)).save(file)
    return path


def write_colours(path, num, seed, low=0, size=(40, 32), suffix=".png"):
    """Smooth random pictures."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    for i in range(num):
        small = Image.fromarray(rng.integers(low, 256, (4, 4, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path / f"{i:04d}{suffix}")
    return path


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file as torch-fidelity's, of random weights."""
    import torch_fidelity.feature_extractor_inceptionv3 as module

    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    torch.manual_seed(0)
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Drawing takes most of a small run's time: it is left to the tests that look at the picture."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(report, "picture", lambda *_: None)


TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = sorted(set("a photo of the digit red dog blue"))
    vocabulary = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({v: i for i, v in enumerate(vocabulary)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    text = dict(vocab_size=len(vocabulary), max_position_embeddings=16, eos_token_id=len(vocabulary) - 1, **TINY)
    vision = dict(image_size=28, patch_size=7, **TINY)
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model

    path = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(image_size=56, patch_size=14, **TINY)).save_pretrained(path)
    return path


@pytest.fixture
def digits(tmp_path):
    """Three folders of 60 digits: a reference, others, and darker ones."""
    write_digits(tmp_path / "real", 0, 60)
    write_digits(tmp_path / "cfg", 60, 60, darker=0.7)
    write_digits(tmp_path / "interval", 120, 60)
    return tmp_path


def extractors(*names):
    return [features.get_extractor(name, more=[judge.Digits]) for name in names]


def run(root, *images, reference="real", use=("digits",), **more):
    return report.run(
        [str(root / i) for i in images], str(root / reference), extractors(*use), out=root / "out", **more
    )


def numbers(result):
    return [result["reference"]["metrics"], [r["metrics"] for r in result["images"]]]


def rows_computed(monkeypatch, extractor=judge.Digits):
    """A list of how many images each call of `rows` was given."""
    calls, rows = [], extractor.rows
    monkeypatch.setattr(extractor, "rows", lambda self, tensors: (calls.append(len(tensors)), rows(self, tensors))[1])
    return calls


# ----------------------------------------------------------------------------
# The numbers.


def test_fid_is_that_of_torch_fidelity_and_of_clean_fid(tmp_path, inception):
    """Features by the one and distance by the other, of the same folders and the same weights."""
    from cleanfid.fid import frechet_distance
    from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

    paths = [write_colours(tmp_path / name, n, n, low) for name, n, low in (("real", 8, 0), ("cfg", 7, 60))]
    result = run(tmp_path, "cfg", use=[f"inception={inception}"])
    fid = result["images"][0]["metrics"]["inception"]["fd"]["value"]
    extractor = features.get_extractor(f"inception={inception}")
    options = dict(cuda=False, batch_size=8, cache=False, verbose=False, samples_find_deep=False)
    network = create_feature_extractor(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(inception), **options
    )
    sets = []
    for path in paths:
        f = folder.Folder(path)
        f.compute(features.Pixels(), [extractor], report.tqdm(disable=True))
        theirs = extract_featuresdict_from_input_id(1, network, input1=str(path), **options)["2048"]
        torch.testing.assert_close(f.rows(extractor), theirs, rtol=1e-4, atol=1e-5)
        sets.append(f.rows(extractor).double())
    basis = torch.linalg.qr(torch.cat(sets).mT).Q  # All that varies: 15 directions of the 2,048.
    statistics = [s for x in sets for s in ((x @ basis).mean(0).numpy(), np.cov((x @ basis).numpy(), rowvar=False))]
    assert fid == pytest.approx(frechet_distance(*statistics), rel=1e-3)
    assert any("7 images in 2,048 features have a singular covariance" in note for note in result["notes"])


def test_the_report_holds_what_the_metrics_say_of_the_rows(digits):
    result = run(digits, "cfg", "interval")
    extractor = judge.Digits()
    rows = {}
    for name in ("real", "cfg", "interval"):
        files = sorted((digits / name).rglob("*.png"))
        rows[name] = extractor.rows([extractor.preprocess(Image.open(f).convert("RGB")) for f in files])[:, :64]
    for name, entry in zip(("cfg", "interval"), result["images"], strict=True):
        found = entry["metrics"]["digits"]
        fd = metrics.frechet_distance(rows[name], *metrics.gaussian(rows["real"]))
        assert found["fd"]["value"] == pytest.approx(fd.item(), rel=1e-6)
        prdc = metrics.prdc(rows["real"], rows[name])._asdict()
        assert [found[k]["value"] for k in prdc] == pytest.approx([v.item() for v in prdc.values()])
        assert found["vendi"]["value"] == pytest.approx(metrics.vendi(rows[name]).item(), rel=1e-6)
        for estimate in found.values():
            assert estimate["low"] <= estimate["value"] <= estimate["high"]
    cfg, interval = (entry["metrics"] for entry in result["images"])
    assert cfg["digits"]["fd"]["value"] > interval["digits"]["fd"]["value"]
    assert cfg["pixels"]["contrast"]["value"] == pytest.approx(0.7 * interval["pixels"]["contrast"]["value"], rel=0.1)
    assert interval["digits"]["accuracy"]["value"] > 0.95 and "fd" not in result["reference"]["metrics"]["digits"]


def test_accuracy_is_told_only_of_class_folders(digits):
    shutil.copytree(digits / "cfg" / "3", digits / "flat")
    result = run(digits, "flat")
    assert "accuracy" not in result["images"][0]["metrics"]["digits"]
    assert "accuracy" in result["reference"]["metrics"]["digits"]


def test_clip_and_dinov2_are_what_transformers_computes(tmp_path, clip, dinov2):
    from transformers import AutoModel, CLIPModel, CLIPTokenizer

    images = [Image.open(p) for p in sorted(write_colours(tmp_path / "x", 3, 0).iterdir())]
    extractor = features.get_extractor(f"clip={clip}")
    pixels = torch.stack([extractor.preprocess(i) for i in images])
    network, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    prompts = ["a red dog", "a dog", "blue"]
    output = network(pixel_values=pixels, **tokenizer(prompts, padding=True, return_tensors="pt"))
    cosine = torch.nn.functional.cosine_similarity
    ours, text = extractor.rows(list(pixels)), extractor.text_rows(prompts)
    assert cosine(ours, output.image_embeds).min() > 1 - 1e-5 and cosine(text, output.text_embeds).min() > 1 - 1e-5
    expected = 100 * cosine(output.image_embeds, output.text_embeds).clamp(min=0)
    assert metrics.clip_score(ours, text).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    crop = np.asarray(images[0].crop((4, 0, 36, 32)).resize((28, 28), Image.Resampling.BICUBIC)) / 255
    expected = (crop - features.CLIP.mean) / features.CLIP.std  # The middle square.
    assert pixels[0].permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-5)

    extractor = features.get_extractor(f"dinov2={dinov2}")
    pixels = torch.stack([extractor.preprocess(i) for i in images])
    assert pixels.shape == (3, 3, 224, 224)
    state = AutoModel.from_pretrained(dinov2).eval()(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor.rows(list(pixels)), state)


def test_prompts_come_from_a_file_or_from_beside_the_images(tmp_path, clip, capsys):
    write_colours(tmp_path / "real", 8, 0)
    for i, path in enumerate(sorted(write_colours(tmp_path / "cfg", 9, 1).iterdir())):
        if i < 7:
            path.with_suffix(".txt").write_text("a red dog\n" if i % 2 else "blue")
    (tmp_path / "prompts.json").write_text(json.dumps({"0000.png": "a photo of the digit", "0008.png": "dog"}))
    beside = run(tmp_path, "cfg", use=[f"clip={clip}"])
    both = run(tmp_path, "cfg", use=[f"clip={clip}"], prompts=tmp_path / "prompts.json")
    assert any("cfg, clip: CLIP score: of the 7 of 9 images" in note for note in beside["notes"])
    assert any("cfg, clip: CLIP score: of the 8 of 9 images" in note for note in both["notes"])
    extractor = features.get_extractor(f"clip={clip}")
    files = [tmp_path / "cfg" / f"{i:04d}.png" for i in range(7)]
    images = extractor.rows([extractor.preprocess(Image.open(f)) for f in files])
    text = extractor.text_rows(["a red dog" if i % 2 else "blue" for i in range(7)])
    expected = metrics.clip_score(images, text).mean().item()
    scores = [r["images"][0]["metrics"]["clip"]["clip_score"]["value"] for r in (beside, both)]
    assert scores[0] == pytest.approx(expected, rel=1e-4) and scores[1] != scores[0]
    assert "clip_score" not in beside["reference"]["metrics"]["clip"]
    cmmd = beside["images"][0]["metrics"]["clip"]["cmmd"]["value"]
    rows = folder.Rows(tmp_path / "real.clip.safetensors", extractor.identity, extractor.dim)
    real = rows.get(list(rows._where))
    cfg = extractor.rows([extractor.preprocess(Image.open(f)) for f in sorted((tmp_path / "cfg").glob("*.png"))])
    assert cmmd == pytest.approx(metrics.cmmd(cfg, real).item(), rel=1e-3)


# ----------------------------------------------------------------------------
# The caches.


def test_a_second_run_reads_and_computes_nothing(digits, monkeypatch):
    first = run(digits, "cfg", "interval")
    monkeypatch.setattr(folder.Folder, "_read", lambda *_: pytest.fail("read again"))
    monkeypatch.setattr(judge.Digits, "rows", lambda *_: pytest.fail("computed again"))
    monkeypatch.setattr(report, "score", lambda *_: pytest.fail("scored again"))
    before = {p: p.stat().st_mtime_ns for p in digits.glob("*.safetensors")}
    assert len(before) == 7  # Three of pixels, three of digits, and the reference's statistics.
    assert numbers(run(digits, "cfg", "interval")) == numbers(first)
    assert before == {p: p.stat().st_mtime_ns for p in digits.glob("*.safetensors")}


def test_only_what_is_new_is_computed(digits, monkeypatch):
    first = run(digits, "cfg")
    calls = rows_computed(monkeypatch)
    for path in (digits / "cfg").rglob("*.png"):  # Touched: read, and known by content.
        os.utime(path, (1, 1))
    assert numbers(run(digits, "cfg")) == numbers(first) and calls == []
    monkeypatch.setattr(folder.Folder, "_read", lambda *_: pytest.fail("read again"))
    run(digits, "cfg")
    monkeypatch.undo()

    calls, changed = rows_computed(monkeypatch), next((digits / "cfg" / "1").iterdir())
    write_digits(digits / "cfg", 300, 17)  # Added.
    shutil.copy(changed, changed.with_name("copy.png"))
    added = run(digits, "cfg")
    assert sum(calls) == 17 and added["images"][0]["images"] == 78
    assert any("cfg: 1 of 78 images are exact copies of others" in note for note in added["notes"])

    calls.clear()
    Image.new("L", (28, 28), 200).save(changed)  # Changed in place.
    again = run(digits, "cfg")
    assert sum(calls) == 1 and numbers(again) != numbers(added)

    for path in [*(digits / "cfg" / "3").iterdir(), changed]:  # Gone: as if they had never been.
        path.unlink()
    few = run(digits, "cfg")
    for path in [*digits.glob("*.safetensors"), *digits.glob("*.json")]:
        path.unlink()
    fresh = run(digits, "cfg")
    for kind in ("digits", "pixels"):
        for name, estimate in fresh["images"][0]["metrics"][kind].items():
            assert few["images"][0]["metrics"][kind][name] == pytest.approx(estimate, rel=1e-4, abs=1e-7), name


def test_a_file_changed_at_the_same_size_is_read_again(tmp_path):
    write_colours(tmp_path / "x", 2, 0, suffix=".bmp")
    file, pixels = tmp_path / "x" / "0000.bmp", features.Pixels()

    def rows():
        f = folder.Folder(tmp_path / "x")
        f.compute(pixels, [], report.tqdm(disable=True))
        return f.rows(pixels).clone()

    before, size = rows(), file.stat().st_size
    Image.new("RGB", (40, 32), "red").save(file)
    os.utime(file, (1, 1))
    assert file.stat().st_size == size and rows()[0].tolist() == [1, 0, 1] != before[0].tolist()


def test_rows_of_images_that_are_gone_leave_the_cache(digits):
    run(digits, "cfg")
    for path in (digits / "cfg" / "3").iterdir():
        path.unlink()
    run(digits, "cfg")
    for kind, extractor in (("digits", judge.Digits()), ("pixels", features.Pixels())):
        width = extractor.dim + len(extractor.classes)
        rows = folder.Rows(digits / f"cfg.{kind}.safetensors", extractor.identity, width)
        assert len(rows._where) == len(rows._rows) == 54
        assert not any(name.startswith("3/") for name in rows.files)


def test_another_reference_makes_other_scores_of_the_same_images(digits):
    first = run(digits, "cfg")
    second = run(digits, "cfg", reference="interval")
    third = run(digits, "cfg")
    fd = [r["images"][0]["metrics"]["digits"]["fd"]["value"] for r in (first, second, third)]
    assert fd[0] == fd[2] != fd[1]
    next((digits / "real" / "1").iterdir()).unlink()
    assert run(digits, "cfg")["images"][0]["metrics"]["digits"]["fd"]["value"] != fd[0]


def test_what_the_reference_costs_is_kept(digits, monkeypatch):
    run(digits, "cfg")
    calls, neighbours = [], metrics.neighbours
    monkeypatch.setattr(metrics, "neighbours", lambda x, *a: (calls.append(len(x)), neighbours(x, *a))[1])
    write_digits(digits / "cfg", 300, 5)
    added = run(digits, "cfg", "interval")
    assert calls == [65, 60]  # Not of the reference.
    for path in digits.glob("*.statistics.safetensors"):
        path.unlink()
    for path in digits.glob("*.scores.json"):
        path.unlink()
    assert numbers(run(digits, "cfg", "interval")) == numbers(added) and calls[2:] == [60, 65, 60]


def test_memory_holds_the_features_of_one_folder_and_the_reference(digits, monkeypatch):
    held = []
    monkeypatch.setattr(report, "picture", lambda _, folders, *__: held.extend(set(f._rows) for f in folders))
    run(digits, "cfg", "interval")
    assert held == [{"pixels", "digits"}, {"pixels"}, {"pixels"}]


class AtOnce(Executor):
    """Threads that run away: whatever they are given is done before the caller goes on."""

    def __init__(self, workers):
        pass

    def submit(self, fn, *args):
        future = Future()
        future.set_result(fn(*args))
        return future


def test_threads_are_a_few_files_ahead_and_no_more(monkeypatch):
    read, taken = [], 0

    def reader(size):
        return lambda file, _: (read.append(file), (file, "key", {"x": torch.zeros(size, dtype=torch.uint8)}, None))[1]

    workers = min(8, os.cpu_count())
    monkeypatch.setattr(folder, "ThreadPoolExecutor", AtOnce)
    for file, *_ in folder._read_ahead(reader(1), range(100), []):
        assert file == taken and len(read) <= taken + 2 * workers
        taken += 1
    assert taken == 100 == len(read)

    read.clear()
    monkeypatch.setattr(folder, "AHEAD", 1300)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for taken, _ in enumerate(folder._read_ahead(reader(600), range(40), [])):
        assert len(read) <= taken + 2  # This one and the next.
    assert taken == 39


def test_large_images_are_decoded_one_at_a_time():
    share, inside = folder._Share(100), []
    entered, leave = ({amount: threading.Event() for amount in (300, 50, 40)} for _ in range(2))

    def use(amount):
        with share.of(amount):
            inside.append(amount)
            entered[amount].set()
            leave[amount].wait(60)
            inside.remove(amount)

    threads = [threading.Thread(target=use, args=(amount,)) for amount in entered]
    with share.of(60):
        for thread in threads:
            thread.start()
        assert entered[40].wait(60) and inside == [40] and share.free == 0
    assert entered[50].wait(60) and inside == [40, 50] and share.free == 10
    leave[40].set()
    leave[50].set()
    assert entered[300].wait(60) and inside == [300] and share.free == 0
    leave[300].set()
    for thread in threads:
        thread.join()
    assert share.free == 100


@pytest.mark.parametrize(
    "how",
    ["text", "truncated", "empty", "width", "nan", "twice", "files", "other", "scores", "values", "list", "statistics"],
)
def test_a_corrupt_cache_is_made_anew(digits, capsys, how):
    from safetensors import safe_open
    from safetensors.torch import save_file

    first = run(digits, "cfg")
    files = {"scores": "digits.scores.json", "values": "digits.scores.json", "list": "digits.scores.json"}
    files |= {"files": "pixels.safetensors", "other": "pixels.safetensors"}
    path = digits / f"cfg.{files.get(how, 'digits.safetensors')}"
    if how == "statistics":
        path = digits / "real.digits.statistics.safetensors"
        (digits / "cfg.digits.scores.json").unlink()
    content = path.read_bytes()
    if how in ("width", "nan", "files", "twice"):
        with safe_open(path, framework="pt") as f:
            rows, metadata = f.get_tensor("rows").clone(), f.metadata()
        rows = rows[:, 1:].contiguous() if how == "width" else rows
        rows[5, 2] = torch.nan if how == "nan" else rows[5, 2]
        changed = {"files": '{"1/0001.png": 3}'} if how == "files" else {}
        if how == "twice":
            keys = json.loads(metadata["keys"])
            changed = {"keys": json.dumps([*keys, keys[0]])}
        save_file({"rows": rows}, path, {**metadata, **changed})
    else:
        values = (
            json.dumps({**json.loads(content), "scores": {"fd": ["0.1", 0, 1]}}).encode() if how == "values" else b""
        )
        other = (digits / "cfg.digits.safetensors").read_bytes()
        half = content[: len(content) // 2]
        written = {"text": b"not features", "truncated": half, "statistics": half, "scores": half, "list": b"[]"}
        path.write_bytes({**written, "values": values, "other": other}.get(how, b""))
    capsys.readouterr()
    again = run(digits, "cfg")
    assert numbers(again) == numbers(first)
    error = capsys.readouterr().err
    assert f"note: {path}" in error and "computing it anew" in error
    assert path.stat().st_mode & 0o44 == (digits / "out" / "report.json").stat().st_mode & 0o44
    assert path.stat().st_size > 0 and not list(digits.glob(".*.tmp"))


def test_two_files_of_one_content_have_one_row(tmp_path):
    rows = folder.Rows(tmp_path / "x", "i", 2)
    rows.add(["a", "b", "a"], torch.tensor([[1.0, 1], [2, 2], [1, 1]]))
    rows.add(["b", "c", "c"], torch.tensor([[2.0, 2], [3, 3], [3, 3]]))
    assert rows.get(["a", "b", "c"]).tolist() == [[1, 1], [2, 2], [3, 3]] and len(rows._where) == 3
    rows.save()
    assert folder.Rows(tmp_path / "x", "i", 2).get(["c", "a", "c"]).tolist() == [[3, 3], [1, 1], [3, 3]]


def test_other_weights_are_another_cache(tmp_path, clip, capsys):
    from transformers import CLIPModel

    write_colours(tmp_path / "real", 8, 0)
    write_colours(tmp_path / "cfg", 8, 1)
    first = run(tmp_path, "cfg", use=[f"clip={clip}"])
    other = shutil.copytree(clip, tmp_path / "other")
    network = CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        network.visual_projection.weight.mul_(torch.linspace(0.5, 2, 16)[:, None])
    network.save_pretrained(other)
    capsys.readouterr()
    second = run(tmp_path, "cfg", use=[f"clip={other}"])
    assert numbers(second) != numbers(first)
    assert "cfg.clip.safetensors was computed by clip/1" in capsys.readouterr().err


def test_a_killed_run_keeps_what_it_has_computed(tmp_path):
    """SIGKILL in the middle; the next run computes the rest, and ends with the numbers of one that was not killed."""
    write_digits(tmp_path / "real", 0, 200)
    write_digits(tmp_path / "cfg", 200, 200)
    code = (
        "import itertools, sys, types; from guidance_interval.lab import judge\n"
        "from guidance_interval.measure import folder, report\n"
        "folder.SAVE_EVERY = 0.0\n"  # With this clock, after each 20 files.
        "folder.time = types.SimpleNamespace(monotonic=itertools.count().__next__)\n"
        "rows, calls = judge.Digits.rows, []\n"
        "def held(self, tensors):\n"
        "    calls.append(len(tensors))\n"
        "    if len(calls) == 3:\n"
        "        print('held', flush=True)\n"
        "        sys.stdin.read()\n"
        "    return rows(self, tensors)\n"
        "judge.Digits.rows = held\n"
        "report.run([sys.argv[2]], sys.argv[1], [judge.Digits()], out=sys.argv[3])\n"
    )
    arguments = [str(tmp_path / name) for name in ("real", "cfg", "out")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], **pipes, env=one_thread())
    assert process.stdout.readline() == b"held\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cache = tmp_path / "real.digits.safetensors"
    kept = len(folder.Rows(cache, judge.Digits().identity, 74)._where)
    assert kept in (folder.BATCH, 2 * folder.BATCH)

    with pytest.MonkeyPatch.context() as patch:
        calls = rows_computed(patch)
        resumed = run(tmp_path, "cfg")
        assert sum(calls) == 400 - kept
    assert not list(tmp_path.glob(".*.tmp"))
    shutil.rmtree(tmp_path / "out")
    fresh = report.run(
        [tmp_path / "cfg"], tmp_path / "real", extractors("digits"), out=tmp_path / "out", cache=tmp_path / "c"
    )
    assert fresh["images"][0]["metrics"]["digits"]["fd"]["value"] == pytest.approx(
        resumed["images"][0]["metrics"]["digits"]["fd"]["value"], rel=1e-4
    )


def test_an_interrupt_keeps_what_is_computed(digits, monkeypatch, capsys):
    calls = []

    def interrupted(self, tensors):
        calls.append(len(tensors))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return torch.zeros(len(tensors), 74)

    monkeypatch.setattr(judge.Digits, "rows", interrupted)
    args = ["measure", "--images", str(digits / "cfg"), "--reference", str(digits / "real"), "--features", "digits"]
    assert cli.main([*args, "--out", str(digits / "out")]) == 130
    assert "interrupted; what is computed is kept" in capsys.readouterr().err
    assert len(folder.Rows(digits / "real.digits.safetensors", judge.Digits().identity, 74)._where) == calls[0] == 32


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_two_processes_may_measure_the_same_folders_at_once(tmp_path):
    write_digits(tmp_path / "real", 0, 60)
    write_digits(tmp_path / "cfg", 60, 60)
    code = (
        "import sys; from guidance_interval.lab import judge; from guidance_interval.measure import folder, report\n"
        "folder.SAVE_EVERY, folder.BATCH = 0.0, 2  # They save all the time.\n"
        "report.picture = lambda *_: None\n"
        "report.run([sys.argv[2]], sys.argv[1], [judge.Digits()], out=sys.argv[3])"
    )
    command = [sys.executable, "-c", code, *(str(tmp_path / name) for name in ("real", "cfg", "out"))]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=one_thread()) for _ in range(2)]
    for process in both:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0, error
        assert "cannot be read" not in error
    assert not list(tmp_path.rglob(".*.tmp"))
    kept = json.loads((tmp_path / "out" / "report.json").read_text())
    fresh = run(tmp_path, "cfg", cache=tmp_path / "c")
    assert kept["images"][0]["metrics"] == fresh["images"][0]["metrics"]


def test_a_large_image_is_measured_in_little_more_than_its_pixels(tmp_path):
    """Peak of a process: 48 megapixels are 183 MiB in Pillow; as floats of three planes they would be 550 more."""
    for name, size in (("small", 64), ("large", 6928)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (size, size), (9, 200, 99)).save(tmp_path / name / "a.jpg")
    code = (
        "import re, sys; from guidance_interval.lab import judge, sweep; from tqdm import tqdm\n"
        "from guidance_interval.measure import features, folder\n"
        "for name in ('small', 'large'):\n"
        "    f = folder.Folder(sys.argv[1] + '/' + name); e = [judge.Digits(), features.Pixels()]\n"
        "    f.compute(e[1], e[:1], tqdm(disable=True))\n"
        "    print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], f.rows(e[1])[0].tolist())"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=one_thread())
    (small, *a), (large, *b) = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert int(large) < int(small) + 300 * 2**10 and a == b, done.stdout


# ----------------------------------------------------------------------------
# The command.


def command(root, *more, images=("cfg",), reference="real"):
    args = ["--images", *(str(root / i) for i in images), "--reference", str(root / reference), *more]
    for option, value in (("--features", "digits"), ("--out", str(root / "out"))):
        args += [] if option in more else [option, value]
    return cli.main(["measure", *args])


def test_the_command_prints_a_row_per_folder_and_leaves_a_report_and_a_picture(digits, capsys):
    (digits / "cfg" / "1" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(digits / "cfg" / "deep.png")
    (digits / "cfg" / ".hidden.png").write_text("not to be looked at")
    shutil.copytree(digits / "real", digits / "cfg" / ".thumbnails")
    shutil.copytree(digits / "real", digits / "cfg" / "1" / ".trash")
    (digits / "cfg" / "notes.md").write_text("neither")
    assert command(digits, images=("cfg", "interval")) == 0
    out = capsys.readouterr().out
    lines = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert lines == ["digits", "-" * 8, "cfg", "interval", *["digits", "-" * 8, "real", "cfg", "interval"],
                     *["pixels", "-" * 8, "real", "cfg", "interval"]]  # fmt: skip
    (contrast,) = (line.split("|")[4] for line in out.splitlines() if line.startswith("| cfg") and "%" in line)
    assert -35 < float(contrast.split("(")[1].split("%")[0]) < -25  # Made 30 % darker.
    assert "cfg: 1/broken.png cannot be read (not an image of a known format, or damaged)" in out
    assert "cfg: deep.png cannot be read (mode I;16; convert it to 8 bits per channel); left out" in out
    result = json.loads((digits / "out" / "report.json").read_text())
    assert [r["images"] for r in result["images"]] == [60, 60] and len(result["images"][0]["unreadable"]) == 2
    assert result["features"]["digits"].startswith("digits/1 ")
    with Image.open(digits / "out" / "measure.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp", ".PNG"])
def test_every_usual_format_is_read(tmp_path, suffix):
    write_colours(tmp_path / "real" / "deeper", 4, 0, suffix=suffix)
    f = folder.Folder(tmp_path / "real")
    f.compute(features.Pixels(), [], report.tqdm(disable=True))
    assert f.names == [f"deeper/{i:04d}{suffix}" for i in range(4)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_usual_mode_is_read_as_pillow_converts_it(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode)
    (tmp_path / "x").mkdir()
    image.save(tmp_path / "x" / f"a.{'tif' if mode == 'CMYK' else 'png'}")
    f, pixels = folder.Folder(tmp_path / "x"), features.Pixels()
    f.compute(pixels, [], report.tqdm(disable=True))
    torch.testing.assert_close(f.rows(pixels)[0], pixels.preprocess(image.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpositions, the other way round.
    stored = upright.transpose(back[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    image = folder.decode(Image.open(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(image), np.asarray(upright))


def test_turned_digits_are_as_accurate_as_upright_ones(digits):
    for path in (digits / "cfg").rglob("*.png"):
        exif = Image.Exif()
        exif[0x0112] = 3
        Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, exif=exif)
    assert run(digits, "cfg")["images"][0]["metrics"]["digits"]["accuracy"]["value"] > 0.95


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "DDS", "PPM", "SGI"])
def test_no_broken_file_ends_a_run(tmp_path, kind, monkeypatch):
    """Whatever it is called: Pillow looks at the content."""
    image, content = Image.fromarray(load_digits()[0][:3].transpose(1, 2, 0).copy()), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    try:
        image.save(content, kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
    except KeyError:
        pytest.skip(f"this Pillow has no {kind}")
    (tmp_path / "x").mkdir()
    rng = np.random.default_rng(0)
    for i in range(60):
        broken = bytearray(content.getvalue())
        for _ in range(rng.choice([1, 2, 20])):
            broken[rng.integers(min(len(broken), rng.choice([64, 10**6])))] = rng.integers(256)
        (tmp_path / "x" / f"{i}.png").write_bytes(broken[: rng.integers(len(broken))] if i % 3 == 0 else broken)
    f, pixels = folder.Folder(tmp_path / "x"), features.Pixels()
    f.compute(pixels, [], report.tqdm(disable=True))
    assert len(f.names) + len(f.unreadable) == 60 and len(f.unreadable) > 10
    assert all(reason and "0x" not in reason for _, reason in f.unreadable)


@pytest.mark.parametrize("error", [ValueError, RuntimeError, TypeError, OSError])
def test_a_bug_in_an_extractor_is_not_taken_for_an_unreadable_image(digits, monkeypatch, error):
    def buggy(*_):
        raise error("a bug")

    monkeypatch.setattr(judge.Digits, "preprocess", buggy)
    with pytest.raises(error, match="a bug"):
        run(digits, "cfg")


def test_what_is_no_regular_file_is_listed_and_not_opened(digits, monkeypatch):
    os.mkfifo(digits / "cfg" / "pipe.png")
    (digits / "cfg" / "nowhere.png").symlink_to(digits / "nowhere.png")
    (digits / "cfg" / "link").symlink_to(digits / "real")
    (digits / "cfg" / "secret").mkdir()
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    result = run(digits, "cfg")
    assert result["images"][0]["images"] == 60
    assert result["images"][0]["unreadable"] == [
        ["link", "a link to a folder, which is not followed"],
        ["nowhere.png", "No such file or directory"],
        ["pipe.png", "not a regular file"],
        ["secret", "Permission denied"],
    ]
    assert sum("cannot be read" in note for note in result["notes"]) == 4


def test_images_above_pillows_limit_are_listed(digits, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 28)
    for name, side in (("warned", 36), ("refused", 90)):
        Image.new("L", (side, side)).save(digits / "cfg" / f"{name}.png")
    assert [name for name, reason in run(digits, "cfg")["images"][0]["unreadable"] if "Pillow's limit" in reason] == [
        "refused.png", "warned.png",
    ]  # fmt: skip


def test_a_folder_full_of_broken_files_is_told_in_a_few_lines(digits):
    for i in range(30):
        (digits / "cfg" / f"broken{i:02d}.png").write_text("no image")
    result = run(digits, "cfg")
    about = [note for note in result["notes"] if "cannot be read" in note]
    assert len(about) == 11 and about[-1] == "cfg: 20 more files cannot be read; report.json names them"
    assert len(result["images"][0]["unreadable"]) == 30


def test_few_images_are_measured_as_far_as_they_go(digits, capsys):
    (digits / "two").mkdir()
    for path in list((digits / "real" / "1").iterdir())[:2]:
        shutil.copy(path, digits / "two")
    result = run(digits, "two")
    assert {"fd", "vendi", "distance"} <= result["images"][0]["metrics"]["digits"].keys()
    text = "\n".join(result["notes"])
    assert "two, digits: precision, recall, density, coverage: these need 7 images or more on both sides" in text
    assert "two, digits: FD: 2 images in 64 features have a singular covariance" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (dict(images=("nowhere",)), "nowhere' is not there; give a folder of images"),
        (dict(images=("a.txt",)), "a.txt' is a file; give a folder of images"),
        (dict(images=("real",)), "real' is given twice; name a folder once"),
        (dict(images=("cfg", "cfg")), "cfg' is given twice"),
        (dict(images=("real/1",)), "real/1' lies in "),
        (dict(images=("empty",)), "empty' holds 0 readable images and 0 others; give a folder with 2 or more of .png"),
        (dict(images=("one",)), "one' holds 1 readable images and 1 others, the first being b.png (not an image"),
        (("--features", "incept"), "unknown features 'incept'; there are digits, inception, dinov2, clip"),
        (("--features", "digits", "digits"), "features digits digits name one twice; name each once"),
        (("--features", "clip=/nowhere"), "features clip=/nowhere: no config.json there; give a folder of openai/clip"),
        (("--features", "inception=/nowhere"), "features inception=/nowhere: no such file; give torch-fidelity's"),
        (("--features", "digits=/nowhere"), "features digits=/nowhere: no such file"),
        (("--prompts", "p.json"), "--prompts has no effect without --features clip; add clip, or leave"),
        (("--cache", "a.txt/x"), "cannot be kept in 'a.txt/x' (Not a directory); choose another folder with --cache"),
        (("--out", "a.txt/x"), "output folder 'a.txt/x' cannot be written to"),
        (("--out", "cfg/new"), "output folder 'cfg/new' lies in "),
        (("--out", "real"), "where the next run would count measure.png as an image; choose another --out"),
    ],
)
def test_bad_arguments_are_told_in_one_line(digits, capsys, monkeypatch, args, says):
    monkeypatch.chdir(digits)
    (digits / "a.txt").write_text("text")
    (digits / "list.json").write_text("[]")
    (digits / "empty").mkdir()
    (digits / "one").mkdir()
    Image.new("L", (28, 28)).save(digits / "one" / "a.png")
    (digits / "one" / "b.png").write_text("broken")
    assert (command(digits, *args) if isinstance(args, tuple) else command(digits, **args)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(error) == 1 and error[0].startswith("guidance-interval: error: ") and says in error[0]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("clip", r"openai/clip-vit-large-patch14-336 is not in .* or name a copy: --features clip=FOLDER"),
        ("dinov2", r"run `hf download facebook/dinov2-large` with a network"),
        ("inception", r"weights-inception-2015-12-05-6726825d.pth is missing and cannot .* --features inception=PATH"),
    ],
)
def test_weights_that_are_nowhere_are_told_with_what_to_do(tmp_path, monkeypatch, name, says):
    from huggingface_hub import constants

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    with pytest.raises(UserError, match=says) as error:
        features.get_extractor(name)
    assert "\n" not in str(error.value)


def test_a_model_in_the_hubs_cache_is_loaded_as_it_is_there(tmp_path, monkeypatch, clip):
    commit, cache = hashlib.sha1(b"a commit").hexdigest(), tmp_path / "models--openai--clip-vit-large-patch14-336"
    shutil.copytree(clip, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    code = (
        "import torch; from guidance_interval.measure import features; e = features.get_extractor('clip')\n"
        "print(e.identity, len(e.rows([torch.zeros(3, 28, 28)])[0]), len(e.text_rows(['a dog'])))"
    )
    env = {**one_thread(), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["clip/1", commit, "16", "1"], done.stderr


def clip_without(clip, path, *names, **texts):
    copy = shutil.copytree(clip, path)
    for name in names:
        (copy / name).unlink()
    for name, text in texts.items():
        (copy / f"{name}.json").write_text(text)
    return copy


def test_prompts_of_the_generated_images_are_enough(tmp_path, clip):
    write_colours(tmp_path / "real", 8, 0).rename(tmp_path / "x")
    for i, path in enumerate(sorted((tmp_path / "x").iterdir())):
        path.rename(path.with_name(f"photo{i}.png"))
    (tmp_path / "x").rename(tmp_path / "real")
    write_colours(tmp_path / "cfg", 8, 1)
    write_colours(tmp_path / "other" / "deeper", 8, 2)
    prompts = tmp_path / "p.json"
    prompts.write_text(json.dumps({"0001.png": "a red dog", "0002.png": "blue"}))
    result = run(tmp_path, "cfg", "other", use=[f"clip={clip}"], prompts=prompts)
    assert "clip_score" in result["images"][0]["metrics"]["clip"]
    assert "clip_score" not in result["reference"]["metrics"]["clip"]
    assert "other: --prompts names none of its images" in result["notes"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text", r"""p\.json' is not JSON in UTF-8 \(Expecting value.*write {"a/0001.png": "a prompt", ...}"""),
        ("[]", r"""p\.json' must be one JSON object of texts; write {"a/0001.png": "a prompt", ...}"""),
        ('{"0000.png": 3}', "must be one JSON object of texts"),
        ('{"x.png": "blue"}', r"""names no image of any folder; their names are like "0000.png", relative"""),
        (None, r"p\.json' cannot be read \(No such file or directory\)"),
    ],
)
def test_prompts_are_judged_before_any_image_is_read(tmp_path, clip, monkeypatch, text, says):
    for name in ("real", "cfg"):
        write_colours(tmp_path / name, 2, 0)
    if text is not None:
        (tmp_path / "p.json").write_text(text)
    monkeypatch.setattr(folder.Folder, "_read", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match=says):
        run(tmp_path, "cfg", use=[f"clip={clip}"], prompts=tmp_path / "p.json")


def test_a_tokenizer_that_is_missing_or_another_one_is_noticed(tmp_path, clip, monkeypatch):
    for name in ("real", "cfg"):
        write_colours(tmp_path / name, 8, len(name))
    (tmp_path / "p.json").write_text(json.dumps({f"{i:04d}.png": "a red dog" for i in range(8)}))
    measured = functools.partial(run, tmp_path, "cfg", prompts=tmp_path / "p.json")
    first = measured(use=[f"clip={clip}"])
    bare = clip_without(clip, tmp_path / "bare", "tokenizer.json", "merges.txt", "vocab.json")
    monkeypatch.setattr(folder.Folder, "_read", lambda *_: pytest.fail("read"))
    with pytest.raises(UserError, match="bare has no tokenizer, which prompts need: copy"):
        measured(use=[f"clip={bare}"])
    monkeypatch.undo()
    monkeypatch.setattr(report, "picture", lambda *_: None)
    run(tmp_path, "cfg", use=[f"clip={bare}"])  # Without prompts it does.
    tokenizer = json.loads((clip / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["a</w>"], words["d</w>"] = words["d</w>"], words["a</w>"]
    other = clip_without(clip, tmp_path / "other", tokenizer=json.dumps(tokenizer))
    scores = [r["images"][0]["metrics"]["clip"]["clip_score"] for r in (first, measured(use=[f"clip={other}"]))]
    assert scores[0] != scores[1]


def test_files_of_weights_that_do_not_do_are_told_before_any_image_is_read(tmp_path, clip, inception, monkeypatch):
    for name in ("real", "cfg"):
        write_colours(tmp_path / name, 2, 0)
    monkeypatch.setattr(folder.Folder, "_read", lambda *_: pytest.fail("read"))
    bad = {name: clip_without(clip, tmp_path / name) for name in ("none", "short", "text", "config", "list")}
    (bad["none"] / "model.safetensors").unlink()
    (bad["short"] / "model.safetensors").write_bytes((clip / "model.safetensors").read_bytes()[:5000])
    (bad["text"] / "model.safetensors").write_text("weights")
    (bad["config"] / "config.json").write_text("")
    (bad["list"] / "config.json").write_text("[]")
    (tmp_path / "short.pth").write_bytes(inception.read_bytes()[:5000])
    (tmp_path / "short.safetensors").write_bytes(judge.model.SHIPPED.read_bytes()[:5000])
    for spec, says in (
        (f"clip={bad['none']}", "no weights there"),
        (f"clip={bad['short']}", "the weights of .*short do not load"),
        (f"clip={bad['text']}", "the weights of .*text do not load"),
        (f"clip={bad['config']}", r"config.config\.json cannot be read \(Expecting value"),
        (f"clip={bad['list']}", r"list.config\.json cannot be read"),
        (f"inception={tmp_path / 'short.pth'}", r"short\.pth is not torch-fidelity's"),
        (f"digits={tmp_path / 'short.safetensors'}", r"short\.safetensors' is not a readable safetensors file"),
        (f"digits={sweep.experiment('optdigits')}", "is not for 28x28 grey images"),
        (f"digits={sweep.experiment('clips')}", "is not for 28x28 grey images"),
    ):
        with pytest.raises(UserError, match=says):
            run(tmp_path, "cfg", use=[spec])


def test_weights_that_give_nan_are_told_and_not_kept(digits, monkeypatch):
    monkeypatch.setattr(judge.Digits, "rows", lambda _, tensors: torch.full([len(tensors), 74], torch.nan))
    with pytest.raises(UserError, match="features digits: the network gives NaN or infinity for images of"):
        run(digits, "cfg")
    assert not (digits / "real.digits.safetensors").exists()


def test_weights_of_another_kind_are_refused(tmp_path, clip, dinov2):
    with pytest.raises(ValueError, match=r"config\.json is of a 'dinov2' model, not 'clip'"):
        features.get_extractor(f"clip={dinov2}")
    with pytest.raises(ValueError, match="is not torch-fidelity's weights-inception"):
        _ = features.get_extractor(f"inception={clip / 'vocab.json'}").network
    from safetensors.torch import load_file, save_file

    lacking = shutil.copytree(dinov2, tmp_path / "lacking")
    weights = load_file(lacking / "model.safetensors")
    weights.pop("layernorm.weight")
    save_file(weights, lacking / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['layernorm.weight'\]"):
        _ = features.get_extractor(f"dinov2={lacking}").network


def test_without_the_extra_the_error_names_it(digits, monkeypatch, capsys):
    monkeypatch.setattr(judge.Digits, "needs", "no_such_package")
    assert command(digits) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "guidance_interval.measure.report")
    monkeypatch.delattr("guidance_interval.measure.report")
    assert command(digits) == 2
    first, second = capsys.readouterr().err.splitlines()
    advice = "; in the folder of this repository, run: pip install -e '.[measure]'"
    assert f"features digits need no_such_package{advice}" in first
    assert "matplotlib" in second and advice in second


def test_names_that_are_not_utf8_are_shown_on_any_terminal_picture_and_all(tmp_path):
    write_digits(tmp_path / "real", 0, 20)
    odd = os.fsencode(tmp_path) + b"/caf\xe9 $x_$"
    os.rename(write_digits(tmp_path / "cfg", 20, 20), odd)
    with open(odd + b"/\xff.png", "wb") as f:
        f.write(b"no image")
    args = ["--features", "digits", "--reference", tmp_path / "real", "--images", odd, "--out", tmp_path / "out"]
    command = [sys.executable, "-m", "guidance_interval", "measure", *args]
    done = subprocess.run(command, capture_output=True, env={**one_thread(), "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode("ascii").splitlines()
    assert any(line.startswith(r"| caf\xe9 $x_$ |") for line in lines) and any("+-" in line for line in lines)
    assert len({len(line) for line in lines[:3]}) == 1  # The columns are still one below the other.
    assert any(r"\xff.png cannot be read" in line for line in lines)
    result = json.loads((tmp_path / "out" / "report.json").read_text())
    assert result["images"][0]["folder"].endswith(r"caf\xe9 $x_$") and (tmp_path / "out" / "measure.png").exists()


def test_a_disk_that_is_full_is_told_in_one_line_with_the_file(digits, monkeypatch, capsys):
    """A limit on the size of files, which the system refuses to pass as it does on a full disk."""
    run(digits, "cfg")
    write_digits(digits / "cfg", 300, 60)
    before = {path: path.read_bytes() for path in digits.glob("cfg.*")}
    compute, limits = folder.Folder.compute, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
        try:
            compute(self, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(folder.Folder, "compute", limited)
    assert command(digits) == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert "cfg.pixels.safetensors' cannot be written (" in error and "File too large" in error
    assert before == {path: path.read_bytes() for path in digits.glob("cfg.*")}
    assert not list(digits.glob(".*.tmp"))


def test_folders_of_one_name_share_a_cache_folder(digits, tmp_path):
    write_digits(digits / "other" / "cfg", 400, 30)
    result = run(digits, "cfg", "other/cfg", cache=digits / "cache")
    assert [r["images"] for r in result["images"]] == [60, 30]
    assert [folder["folder"] for folder in result["images"]] == [str(digits / "cfg"), str(digits / "other" / "cfg")]
    assert len(list((digits / "cache").glob("cfg-*.digits.safetensors"))) == 2
    assert not list(digits.glob("*.safetensors"))


def test_an_extreme_estimate_is_shown_in_full():
    assert report.show(report.Estimate(0.9531, 0.94, 0.966)) == "0.953 ±0.013"
    assert report.show(report.Estimate(123.4, 100.0, 147.0)) == "123 ±24"
    assert report.show(report.Estimate(1.0, 1.0, 1.0)) == "1"
