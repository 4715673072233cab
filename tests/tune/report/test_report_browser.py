"""The report in headless Chromium: a vote with keys and mouse, files of votes, both languages, and what it asks for."""

import json
import shutil

import pytest
from guidance_interval.tune.report import report

pytest.importorskip("plotly", reason="of the extra `tune`")
playwright = pytest.importorskip("playwright.sync_api", reason="of the extra `dev`")
stats = pytest.importorskip("scipy.stats", reason="of the extra `dev`")

PAUSE = 130  # Milliseconds: what follows a vote sooner is a double click.
AT_ONCE = "lastVote = -1000"  # For tests that do not ask about it.
NUM = 32


@pytest.fixture(scope="module")
def browser(chromium):
    with playwright.sync_playwright() as p:
        # Without a GPU, parallel coordinates need WebGL in software.
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--enable-unsafe-swiftshader"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(study_folder):
    return report.write_report(study_folder).as_uri()


@pytest.fixture(scope="module")
def shared(browser, address):
    """A page to ask, in which nothing is changed."""
    page = browser.new_page()
    page.goto(address)
    return page


@pytest.fixture
def visit(browser, address):
    """`visit(language, **context)`: a page of a fresh profile; at the end none has asked for anything or complained."""
    wrong, contexts = [], []

    def visit(language="en", url=address, **context):
        contexts.append(browser.new_context(**{"viewport": {"width": 1200, "height": 850}, **context}))
        page = contexts[-1].new_page()
        page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("request", lambda r: r.url.startswith(("data:", "blob:", "file:")) or wrong.append(r.url))
        page.on("dialog", lambda d: d.accept())
        page.goto(url)
        page.select_option("#language", language)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def begin(page, voter="Ann", pairs=10, setting="best-1"):
    page.fill("#voter", voter)
    page.select_option("#pairs", str(pairs))
    page.select_option("#setting", setting)
    page.click("form button[type=submit]")


def press(page, *keys):
    for key in keys:
        page.evaluate(AT_ONCE)
        page.keyboard.press(key)


def click(page, *choices):
    for choice in choices:
        page.evaluate(AT_ONCE)
        page.click(f"#choose-{choice}")


def exported(page, button=".export"):
    with page.expect_download() as download:
        page.click(button)
    return json.loads(download.value.path().read_text())


def offer(page, tmp_path, *files):
    """Import files of votes (or texts) and return what the page says of them."""
    paths = [tmp_path / f"votes-{i}.json" for i in range(len(files))]
    for path, file in zip(paths, files, strict=True):
        path.write_text(file if isinstance(file, str) else json.dumps(file))
    page.set_input_files("input[type=file]", paths)
    page.wait_for_selector("#imported")
    return page.locator("#imported p").all_inner_texts()


def verdict(page):
    keys = "wins", "losses", "ties", "p", "low", "high"
    return {k: float(page.get_attribute("#verdict", f"data-{k}")) for k in keys}


def settings_by_code(page):
    return dict(page.evaluate("STUDY.settings.flatMap((s) => s.codes.map((c) => [c, s.id]))"))


def expected(page, ballots, setting="best-1"):
    """The sign test of ballots by scipy: each pair for the side that more voters chose."""
    of, pairs = settings_by_code(page), {}
    for ballot in ballots:
        for vote in ballot["votes"]:
            score = 0 if vote["chosen"] is None else 1 if of[vote["chosen"]] == setting else -1
            pairs.setdefault(frozenset(vote["shown"]), []).append(score)
    sums = [sum(scores) for scores in pairs.values()]
    wins, losses = sum(s > 0 for s in sums), sum(s < 0 for s in sums)
    found = {"wins": wins, "losses": losses, "ties": len(sums) - wins - losses}
    return found | sign_test(wins, losses)


def sign_test(wins, losses):
    if not wins + losses:
        return {"p": 1, "low": 0, "high": 1}
    test = stats.binomtest(wins, wins + losses)
    ends = test.proportion_ci(method="exact")
    return {"p": test.pvalue, "low": ends.low, "high": ends.high}


def test_the_sign_test_is_scipy_s(visit):
    page = visit()
    cases = [(w, n - w) for n in (0, 1, 2, 5, 6, 20, 33) for w in range(n + 1)] + [(130, 70), (512, 488), (3, 997)]
    got = page.evaluate("cases => cases.map(([w, l]) => signTest(w, l))", cases)
    for (wins, losses), found in zip(cases, got, strict=True):
        for key, value in sign_test(wins, losses).items():
            assert found[key] == pytest.approx(value, abs=1e-9), (wins, losses, key)
    for n in (3, 5, 6, 10, 20, 64):
        least = next((k for k in range(n // 2, n + 1) if stats.binomtest(k, n).pvalue <= 0.05), None)
        assert page.evaluate("n => needed(n)", n) == least


def test_a_vote_with_keys_and_mouse(visit):
    page = visit()
    begin(page)
    assert page.inner_text("h1") == "Pair 1 of 10" and page.is_disabled("#undo")
    press(page, "ArrowLeft", "b", "0")
    click(page, "A", "B", "none")
    page.wait_for_timeout(PAUSE)
    page.locator(".pair img").nth(1).click()
    assert page.inner_text("h1") == "Pair 8 of 10"
    press(page, "u")
    page.click("#undo")
    assert page.inner_text("h1") == "Pair 6 of 10" and page.evaluate("document.activeElement.id") == "undo"
    file = exported(page)
    assert [len(b["votes"]) for b in file["ballots"]] == [5] and file["ballots"][0]["blind"] is True
    chosen = [v["chosen"] and v["shown"].index(v["chosen"]) for v in file["ballots"][0]["votes"]]
    assert chosen == [0, 1, None, 0, 1]
    press(page, "2", "1", "ArrowRight", "a", "0")
    assert page.inner_text("h1") == "The answer"
    file = exported(page)
    assert verdict(page) == pytest.approx(expected(page, file["ballots"]))
    assert len(file["ballots"][0]["votes"]) == 10
    prompts = page.locator("table").first.locator("tbody tr").all_inner_texts()
    assert len(prompts) == 8  # The first pairs go through all prompts.


def test_a_held_key_or_a_double_click_is_one_vote(visit):
    page = visit()
    begin(page)
    page.dblclick("#choose-A")
    assert page.inner_text("h1") == "Pair 2 of 10"
    page.wait_for_timeout(PAUSE)
    for _ in range(3):
        page.keyboard.down("a")
        page.wait_for_timeout(PAUSE)
    page.keyboard.up("a")
    assert page.inner_text("h1") == "Pair 3 of 10"


def test_nothing_tells_the_answer_before_the_end(visit):
    page = visit()
    begin(page, pairs=NUM)
    study = page.evaluate("({labels: STUDY.settings.flatMap((s) => [s.id, s.label, bounds(s)])})")
    sides, of = [], settings_by_code(page)
    for _ in range(NUM - 1):
        html = page.inner_html("main") + page.inner_html("header")
        assert not any(label in html for label in study["labels"])
        assert [i.get_attribute("alt") for i in page.locator(".pair img").all()] == ["Image A", "Image B"]
        shown = page.evaluate("nextPair(STUDY, state.current)")
        sides.append(of[shown[0]] == "baseline")
        page.evaluate(AT_ONCE)
        page.keyboard.press("a")
    assert 5 < sum(sides) < NUM - 5  # A fair coin is outside once in 13,000; the voter's name fixes it.
    kept = page.evaluate("JSON.stringify(localStorage)")
    assert not any(label in kept for label in ("baseline", "CFG everywhere", "(0.1"))
    assert len(set(page.evaluate("plan(STUDY, 'best-1', 'Ann').map(String)"))) == NUM
    assert page.evaluate("String(plan(STUDY, 'best-1', 'Ann')) !== String(plan(STUDY, 'best-1', 'Bob'))")


def test_a_vote_goes_on_after_the_page_was_closed(visit):
    page = visit()
    begin(page)
    press(page, "a", "b", "a")
    before = exported(page)["ballots"]
    page.reload()
    page.click("text=Ann: 3 of 10 pairs, continue")
    assert page.inner_text("h1") == "Pair 4 of 10"
    assert exported(page)["ballots"] == before


def test_a_vote_that_goes_on_after_the_report_is_not_blind(visit):
    page = visit()
    begin(page)
    press(page, "a")
    page.click("text=Pause")
    page.click("text=Skip to the report")
    page.click("#votes button:has-text('Vote')")
    page.click("text=Ann: 1 of 10 pairs, continue")
    press(page, *"ab" * 4, "a")
    assert "Not blind, because the report or an answer had been read before: Ann." in page.inner_text("#verdict")
    assert [b["blind"] for b in exported(page)["ballots"]] == [False]


def test_a_vote_is_possible_where_the_browser_keeps_nothing(visit, browser):
    page = visit()
    page.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('denied'); }})")
    page.reload()
    begin(page)
    press(page, *"ab" * 5)
    assert page.inner_text("h1") == "The answer"
    exported(page)  # Else it would ask before it is left.


def test_a_team_s_votes_are_merged_and_each_voter_counts_once(visit, tmp_path):
    files = []
    for voter, keys in (("Ann", "aabba0aabb"), ("Bob", "bbbb0aaaaa")):
        page = visit()
        begin(page, voter)
        press(page, *keys)
        files.append(exported(page))
    page = visit()
    assert offer(page, tmp_path, *files) == ["Ann: 10 votes added.", "Bob: 10 votes added."]
    page.click("text=Show the answer")
    assert verdict(page) == pytest.approx(expected(page, [b for f in files for b in f["ballots"]]))
    (said,) = offer(page, tmp_path, files[0])
    assert said == "Ann: these 10 votes are here already. Nothing changed."
    twice = json.loads(json.dumps(files[0]))
    twice["ballots"][0]["voter"] = " ANN "
    twice["ballots"][0]["votes"][0]["chosen"] = twice["ballots"][0]["votes"][0]["shown"][1]
    (said,) = offer(page, tmp_path, twice)
    assert said.startswith("ANN has already voted here, and differently.")
    assert exported(page)["ballots"] == [b for f in files for b in f["ballots"]]
    page.click("summary:has-text('Voters (2)')")
    page.click("[aria-label='Remove the votes of Bob']")
    assert verdict(page) == pytest.approx(expected(page, files[0]["ballots"]))


def test_a_partial_vote_is_imported_continued_and_replaced(visit, tmp_path):
    page = visit()
    begin(page)
    press(page, "a", "b")
    part = exported(page)
    press(page, *"ab" * 4)
    whole = exported(page)
    other = visit()
    assert offer(other, tmp_path, part) == ["Ann: 2 votes added."]
    other.click("text=Ann: 2 of 10 pairs, continue")
    press(other, *"ab" * 4)
    assert exported(other)["ballots"] == whole["ballots"]
    third = visit()
    offer(third, tmp_path, part)
    assert offer(third, tmp_path, whole) == ["Ann: went on, now 10 votes."]
    assert offer(third, tmp_path, part) == ["Ann: these 2 votes are here already. Nothing changed."]


def test_files_that_are_no_votes_of_this_study_are_refused_in_a_sentence(visit, tmp_path):
    page = visit()
    begin(page)
    press(page, *"ab" * 5)
    good = exported(page)

    def edited(change):
        file = json.loads(json.dumps(good))
        change(file)
        return file

    vote = good["ballots"][0]["votes"][0]
    files = ["{", "[]", edited(lambda f: f.update(id="0", study="other")),
             edited(lambda f: f["ballots"][0]["votes"].append(vote)),
             edited(lambda f: f["ballots"][0]["votes"][0].update(chosen="0123456789")),
             edited(lambda f: f["ballots"][0]["votes"][0].update(shown=[vote["shown"][0]] * 2)),
             edited(lambda f: f["ballots"][0].update(setting="best-2")),
             edited(lambda f: f.update(ballots=[None]))]  # fmt: skip
    said = offer(page, tmp_path, *files)
    assert [s.partition(": ")[2][:25] for s in said] == [
        "it is not a JSON file.", "it is not a file of votes", "its votes are of another ",
        *["the votes of Ann do not f"] * 4, "the votes of undefined do"]  # fmt: skip
    assert exported(page) == good


def test_the_report_tells_what_was_found_in_both_languages(visit, study_folder):
    study = json.loads((study_folder / "confirmed.json").read_text())
    page = visit()
    page.click("text=Skip to the report")
    rows = page.locator("#summary table").first.locator("tbody tr").all_inner_texts()
    best, variety = study["settings"][1], study["settings"][1]["confirmed"]["variety"]
    assert len(rows) == 3 and "▲ better" in rows[0]
    for value in (best["search"]["variety"], variety["value"], study["settings"][0]["confirmed"]["variety"]["value"]):
        assert f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]" in rows[2].replace("\n", " ").replace("  ", " ")
    assert f"{variety['difference'][0]:+.3f}" in rows[2].replace("\u2212", "-")
    assert page.locator("#figures .plotly").count() >= 3 and page.locator("#figure-parallel canvas").count()
    assert "CUDA out of memory. <b>Tried</b>" in page.inner_text("#trials")
    page.click(".copy >> nth=0")
    page.wait_for_selector("#status:has-text('Copied.')")
    before = page.locator("#images img").count()
    page.click("text=Show 24 more rows")
    assert (before, page.locator("#images img").count()) == (3 * 8, 3 * NUM)
    page.locator("#images .grid button").nth(1).click()
    assert page.locator("dialog img").count() == 2 and "Baseline" in page.inner_text("dialog")
    page.keyboard.press("Escape")
    page.select_option("#language", "ja")
    assert page.get_attribute("html", "lang") == "ja" and "検証の数値を見る理由" in page.inner_text("#summary")
    assert "undefined" not in page.inner_text("body") and "{" not in page.inner_text("#summary p >> nth=0")
    page.reload()  # In the language that was chosen.
    begin(page, "後から")
    press(page, *"ab" * 5)
    assert "ブラインドではない投票者: 後から" in page.inner_text("#verdict")


def test_it_fits_a_phone_and_twice_the_size_and_speaks_to_screen_readers(visit):
    for size, language in (((360, 640), "ja"), ((600, 425), "en")):  # The second: 1200 x 850 at 200%.
        page = visit(language, viewport={"width": size[0], "height": size[1]}, color_scheme="dark")
        for view in ("start", "vote", "answer", "report"):
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= size[0], (size, language, view)
            unnamed = page.evaluate("""[...document.querySelectorAll("button, select, input, img, [role=img]")]
                .filter((e) => !(e.labels?.length || e.ariaLabel || e.alt || e.textContent.trim() ||
                  e.closest("button")?.ariaLabel || e.closest(".plotly")))
                .map((e) => e.outerHTML.slice(0, 200))""")
            assert unnamed == []
            assert page.locator("main h1").count() == 1
            if view == "start":
                begin(page)
                images = page.locator(".pair img").all()
                boxes = [image.bounding_box() for image in images]
                assert all(b["width"] >= 96 and b["y"] + b["height"] <= size[1] for b in boxes)
            elif view == "vote":
                page.evaluate("state.current.pairs = 1")
                press(page, "a")
            elif view == "answer":
                page.click("main button.main")
                page.wait_for_selector("#figure-front .main-svg")


@pytest.mark.parametrize(
    ("rows", "variety", "adherence", "said"),
    [
        ("lower", "higher", [1, -4, 6], "holds up on new images: better in NFE and variety."),
        ("lower", "unclear", [-2, -4, -1], "holds up on new images: better in NFE."),  # Less, but no more than 5.
        (
            "lower",
            "higher",
            [1, -6, 8],
            "better in NFE and variety on new images. Whether adherence kept up is not clear.",
        ),
        ("lower", "higher", [1, None, None], "Whether adherence kept up is not clear."),
        ("lower", "higher", [-4, -7, -1], "is a trade: better in NFE and variety, worse in adherence."),
        ("lower", "lower", [1, -4, 6], "is a trade: better in NFE, worse in variety."),
        ("higher", "unclear", [1, -4, 6], "did not hold up on new images: worse in NFE."),
        ("unclear", "unclear", [-9, -12, -6], "did not hold up on new images: worse in adherence."),
        ("unclear", "unclear", [0, -1, 1], "shows no clear difference on new images."),
    ],
)
def test_the_headline_says_what_the_confirmation_bears_out(shared, rows, variety, adherence, said):
    low, high = adherence[1:]
    verdict = "unclear" if low is None or low <= 0 <= high else "lower" if high < 0 else "higher"
    confirmed = {"rows": {"verdict": rows}, "variety": {"verdict": variety},
                 "adherence": {"verdict": verdict, "difference": adherence}}  # fmt: skip
    setting = {"sigma_lo": 0.1, "sigma_hi": 3.5, "weight": 2.5, "label": "", "confirmed": confirmed}
    text = shared.evaluate("s => headline(s)", setting)
    assert text.startswith("The guidance interval (0.1, 3.5] with weight 2.5 ") and text.endswith(said)


def test_conditional_only_is_used_without_a_node_or_a_preset(shared):
    told = (
        "paste({weight: %s, sigma_lo: 0, sigma_hi: null, id: 'best-1'}).filter(Boolean).map((e) => e.innerText).join()"
    )
    only, guided = (shared.evaluate(told % weight) for weight in ("1", "2"))
    assert "set CFG to 1" in only and "--save" not in only and "sigma_lo" not in only
    assert "--save" in guided and "sigma_lo 0" in guided


def test_a_study_in_which_nothing_was_better_says_so(visit, study_folder, tmp_path):
    folder = shutil.copytree(study_folder, tmp_path / "study")
    study = json.loads((folder / "confirmed.json").read_text())
    study["settings"] = study["settings"][:1]
    study["trials"][1]["values"]["variety"] = [1.0, None, None]  # An interval without ends.
    (folder / "confirmed.json").write_text(json.dumps(study))
    page = visit(url=report.write_report(folder).as_uri())
    assert "No setting was found that improves on the baseline." in page.inner_text("main")
    page.click("text=Skip to the report")
    page.wait_for_selector("#figure-front .main-svg")
    assert page.inner_text("h1") == "No setting was found that improves on the baseline."
