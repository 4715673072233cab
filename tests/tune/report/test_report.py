"""The report's file: what is in it, what is not to be read in it, and what is refused."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("plotly", reason="of the extra `tune`")

from guidance_interval import cli
from guidance_interval.errors import UserError
from guidance_interval.tune.report import report

PAGE = report.PAGE


def part(text, name):
    """The content of one of the page's script elements."""
    return re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', text, re.S)[1]


def unseal(text):
    """`report.seal` undone, written anew."""
    data = base64.b64decode(text)
    x, out = int.from_bytes(data[:4], "little"), bytearray()
    for byte in data[4:]:
        x = (x ^ (x << 13)) & 0xFFFFFFFF
        x ^= x >> 17
        x = (x ^ (x << 5)) & 0xFFFFFFFF
        out.append(byte ^ (x & 255))
    return json.loads(out)


def decoded(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.fixture(scope="module")
def study(study_folder):
    return json.loads((study_folder / "confirmed.json").read_text())


@pytest.fixture(scope="module")
def text(study_folder):
    return report.write_report(study_folder).read_text(encoding="utf-8")


@pytest.fixture
def copy(study_folder, tmp_path):
    """A copy of the study to break."""
    return Path(shutil.copytree(study_folder, tmp_path / "study"))


def change(folder, edit):
    path = folder / "confirmed.json"
    study = json.loads(path.read_text())
    edit(study)
    path.write_text(json.dumps(study))


def test_the_page_holds_the_study_and_every_image_exactly(text, study, study_folder):
    held, images = unseal(part(text, "sealed")), json.loads(part(text, "images"))
    assert {k: held[k] for k in ("name", "trials", "metrics", "prompts", "objective")} == {
        k: study[k] for k in ("name", "trials", "metrics", "prompts", "objective")
    }
    assert len(images) == sum(len(s["images"]) for s in study["settings"]) == 96
    for ours, theirs in zip(held["settings"], study["settings"], strict=True):
        assert ours["confirmed"] == theirs["confirmed"]
        for place, name in zip(ours["images"], theirs["images"], strict=True):
            uri, *size = images[place]
            assert uri.startswith("data:image/png") and tuple(size) == decoded(uri).size == (32, 32)
            np.testing.assert_array_equal(decoded(uri), Image.open(study_folder / name).convert("RGB"))


def test_the_source_does_not_tell_which_image_is_which(text, study, study_folder):
    images, held = json.loads(part(text, "images")), unseal(part(text, "sealed"))
    source = text.replace(part(text, "plotly"), "")
    source = source.replace(part(source, "strings"), "")
    for setting in study["settings"]:
        assert setting is study["settings"][0] or setting["id"] not in source
        assert setting["paste"]["a1111"] not in source
        assert setting is study["settings"][0] or setting["label"] not in source
        for name in setting["images"]:
            assert name not in source and "a workflow of" in Image.open(study_folder / name).text["prompt"]
            assert base64.b64encode((study_folder / name).read_bytes()).decode() not in source
    assert not any(b"workflow" in base64.b64decode(uri.partition(",")[2]) for uri, *_ in images)
    assert all(not decoded(uri).info for uri, *_ in images)
    pools = [s["images"] for s in held["settings"]]
    assert sorted(place for pool in pools for place in pool) == list(range(96))
    first = {tuple(sorted(pool)[:4]) for pool in pools}
    assert not first & {tuple(range(i, i + 4)) for i in (0, 32, 64)} and all(sorted(p) != p for p in pools)
    codes = [code for s in held["settings"] for code in s["codes"]]
    assert len(set(codes)) == 96 and not any(c in source for c in codes)


def test_it_is_one_file_that_asks_for_nothing(text):
    page = text.replace(part(text, "plotly"), "").replace(part(text, "images"), "")
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*"', page) and "@@" not in page
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_made_again_it_is_the_same_but_for_the_language(study_folder, text):
    again = report.write_report(study_folder, "ja").read_text(encoding="utf-8")
    assert again != text and again.replace('<html lang="ja">', '<html lang="en">') == text
    assert "<title>emoji &lt;/script&gt; &amp; co</title>" in text


def test_both_languages_are_complete():
    en, ja = (json.loads((PAGE / f"{name}.json").read_text(encoding="utf-8")) for name in report.LANGUAGES)
    # The names of our metrics are translated from the study's English.
    assert list(en) == [k for k in ja if not k.startswith("name.")] and all(en.values()) and all(ja.values())
    for key in en:
        names = [sorted(set(re.findall(r"\{(\w+)\}", strings[key]))) for strings in (en, ja)]
        assert names[0] == names[1], key
    code = "".join((PAGE / name).read_text(encoding="utf-8") for name in report.SCRIPTS)
    used = set(re.findall(r'(?:\bt|button|block|choice|VotesError)\([^"`()]*"([\w.]+)"', code))
    assert len(used) > 80 and {u for u in used if "." in u or u in en} - set(en) == set()
    named = set(re.findall(r'"([a-z]\w*\.\w[\w.]*)"', code))  # However a key is handed on.
    templates = re.findall(r"`((?:[\w.]|\$\{\})+)`", re.sub(r"\$\{[^}]*\}", "${}", code))
    computed = [re.escape(k).replace(r"\$\{\}", ".*") for k in templates]
    unused = [k for k in en if k not in used | named and not any(re.fullmatch(c, k) for c in computed)]
    assert [k for k in unused if not k.startswith(("label.", "yes", "no"))] == []


def test_studies_of_earlier_versions_are_told_in_the_same_words():
    en, ja = (json.loads((PAGE / f"{name}.json").read_text(encoding="utf-8")) for name in report.LANGUAGES)
    for strings in (en, ja):
        assert strings["label.CFG as it was"] == strings["label.baseline"]
    for old, new in (
        ("Network rows an image", "Network evaluations per image"),
        ("Seconds an image", "Seconds per image"),
    ):
        assert ja[f"name.{old}"] == ja[f"name.{new}"]


def test_large_images_become_jpegs_within_the_budget(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (6, 400, 300, 3), dtype=np.uint8)
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for path, pixels in zip(paths, noise, strict=True):
        Image.fromarray(pixels).save(path)
    images, note = report.embed(paths)
    assert note == {"format": "JPEG", "side": 400, "longest": 400}
    assert [i[1:] for i in images] == [[300, 400]] * 6 and decoded(images[0][0]).format == "JPEG"
    monkeypatch.setattr(report, "BUDGET", 200_000)
    smaller, note = report.embed(paths)
    assert 128 < note["side"] < 400 and note["longest"] == 400
    assert sum(len(i[0]) for i in smaller) < 1.1 * 200_000 < sum(len(i[0]) for i in images)


def test_votes_are_bound_to_the_very_images(copy):
    study = report.read_study(copy)
    paths = [copy / name for s in study["settings"] for name in s["images"]]
    before = report.identity(study, paths)
    assert before == report.identity(study, paths)
    Image.new("RGB", (32, 32)).save(paths[5])
    assert report.identity(study, paths) != before


def broken(study):
    study["settings"][1]["images"].pop()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda s: s.pop("prompts"), "lacks 'prompts'"),
        (lambda s: s.update(settings=[]), "no settings"),
        (lambda s: s["settings"][1].pop("paste"), "lacks 'paste'"),
        (lambda s: s["metrics"].pop(), "unknown metrics: variety"),
        (broken, "'best-1' has 31 images where 8 prompts by 4 seeds are 32"),
        (lambda s: s["settings"][1]["images"].__setitem__(3, "none.png"), "none.png' of the study cannot be read"),
    ],
)  # fmt: skip
def test_a_damaged_study_gets_one_sentence_and_keeps_the_older_report(copy, edit, said):
    old = report.write_report(copy).read_bytes()
    change(copy, edit)
    with pytest.raises(UserError, match=said) as e:
        report.write_report(copy)
    assert "\n" not in str(e.value) and str(copy) in str(e.value)
    assert (copy / "report.html").read_bytes() == old and not list(copy.glob(".*"))


def test_what_is_no_study_is_refused(tmp_path, copy):
    with pytest.raises(UserError, match=r"holds no confirmed\.json"):
        report.write_report(tmp_path)
    with pytest.raises(UserError, match="language must be one of en, ja, got 'fr'"):
        report.write_report(copy, "fr")
    (copy / "confirmed.json").write_text('{"name": ')
    with pytest.raises(UserError, match="is not JSON"):
        report.write_report(copy)


def test_the_command_makes_it_again(copy, capsys):
    assert cli.main(["report", str(copy), "--language", "ja"]) == 0
    assert capsys.readouterr().out == f"wrote {copy / 'report.html'}\n"
    assert '<html lang="ja">' in (copy / "report.html").read_text(encoding="utf-8")
    assert cli.main(["report", str(copy / "confirmed")]) == 2
    assert re.fullmatch("guidance-interval: error: .* holds no confirmed.json; .*\n", capsys.readouterr().err)
