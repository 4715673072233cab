"""The judge CLIP, a tiny one of random weights."""

import json

import pytest
import torch
from guidance_interval.errors import UserError
from guidance_interval.tune import confirm
from guidance_interval.tune.judges import clip
from PIL import Image
from tune_harness import make_search


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghij", *(f"{c}</w>" for c in "abcdefghij")]
    (path / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "vocab.json"), str(path / "merges.txt")).save_pretrained(path)
    small = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = dict(small, vocab_size=len(words), bos_token_id=0, eos_token_id=1)
    vision = dict(small, image_size=32, patch_size=16)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    return str(path)


def test_a_study_judged_by_clip_with_a_reference(small_clip, tmp_path):
    reference = tmp_path / "photos"
    reference.mkdir()
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 90, 200 - 30 * i)).save(reference / f"{i}.png")
    judge = clip.ClipJudge("cpu", str(reference), small_clip)
    prompts = list("abcdefghij")
    judge.check(prompts)
    images = [Image.new("RGB", (64, 64), (30 * i, 0, 90)) for i in range(4)]
    features, scores = judge.measure(images, prompts[:4])
    torch.testing.assert_close(features.norm(dim=1), torch.ones(4, dtype=torch.float64))
    text = torch.nn.functional.normalize(judge.clip.text_rows(prompts[:4]).double(), dim=1)
    torch.testing.assert_close(scores, 100 * (features * text).sum(1).clamp(min=0), rtol=1e-4, atol=1e-3)
    shown, rows = [], judge.clip.rows
    judge.clip.rows = lambda tensors: shown.append(len(tensors)) or rows(tensors)
    search = make_search(tmp_path, judge=judge, prompts=prompts, trials=4)
    search.run()
    assert sum(shown) <= len(search.backend.jobs)  # None is embedded twice.
    assert search.goal.keys == ("rows", "distance") and search.goal.margin == 0.5
    found = confirm.report(search, tmp_path / "out", confirm.confirm(search, tmp_path / "out"))
    assert all(s["confirmed"]["distance"]["value"][0] > 0 for s in found["settings"])


def test_without_clips_weights_it_says_how_to_get_them(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--clip .*nowhere: no config.json there"):
        clip.ClipJudge(source=str(tmp_path / "nowhere"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(UserError, match=r"CLIP, which judges .*no network.*`hf download openai/clip.*--clip FOLDER"):
        clip.ClipJudge()
