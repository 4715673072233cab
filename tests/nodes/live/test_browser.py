"""The live picture in a real browser, on the real front end of a real server."""

import importlib.util
import re
import uuid
from pathlib import Path

import comfy_harness as harness
import pytest
from comfy_server import load_workflow, new_base, running

spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[2] / "browser.py")
browser = importlib.util.module_from_spec(spec)
spec.loader.exec_module(browser)

LIVE = {
    "GuidanceInterval",
    "GuidanceIntervalPercent",
    "GuidanceIntervalSteps",
    "GuidanceIntervalPreset",
    "GuidanceIntervalGuider",
}
READY = """() => !!(window.comfyAPI?.app?.app?.extensionManager && comfyAPI.app.app.graph && comfyAPI.app.app.canvas
    && comfyAPI.app.app.extensions.some((e) => e.name === "GuidanceInterval.Live")
    && window.LiteGraph?.registered_node_types?.GuidanceInterval)"""
LOAD = """async (workflow) => {
    const { app } = comfyAPI.app;
    await app.loadGraphData(workflow, true, false, null,
        { showMissingModelsDialog: false, showMissingNodesDialog: false });
    app.canvas.ds.scale = 1;
    app.canvas.ds.offset = [40, 60];
    app.canvas.setDirty(true, true);
}"""
WIDGET = """([type, name]) => comfyAPI.app.app.graph.nodes.find((n) => n.type === type)
    .widgets.find((w) => w.name === name).value"""
SAY = ".gi-live .say"


@pytest.fixture(scope="module")
def server(host, comfyui_path, tmp_path_factory):
    browser.chromium()  # Skips before a server is started.
    with running(comfyui_path, new_base(tmp_path_factory.mktemp("browser"))) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    path = browser.chromium()
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def open_page(server, chromium):
    """open_page(settings...) -> a page of the front end, ready; one for each set of settings."""
    pages = {}

    def open_page(**settings):
        settings = {"Comfy.VueNodes.Enabled": False, "Comfy.Locale": "en", "GuidanceInterval.Live": True, **settings}
        key = tuple(sorted(settings.items()))
        if key not in pages:
            settings |= {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}
            for name, value in settings.items():
                server.post(f"/settings/{name}", value, read=False)
            pages[key] = chromium.new_page(viewport={"width": 1500, "height": 1000})
            pages[key].goto(server.url)
            pages[key].wait_for_function(READY, timeout=60000)
            pages[key].wait_for_function("() => document.querySelector('#graph-canvas')?.width > 300")
            pages[key].wait_for_timeout(2000)  # The page's own first graph.
        pages[key].bring_to_front()
        return pages[key]

    yield open_page
    for page in pages.values():
        page.close()


RENDERERS = pytest.mark.parametrize("vue", [False, True], ids=["classic", "vue"])


def load(page, graph):
    page.evaluate(LOAD, graph)
    types = limiting(graph)
    page.wait_for_function(
        f"(n) => [...document.querySelectorAll('{SAY}')].filter((e) => e.textContent).length === n", arg=len(types)
    )
    return types


def says(page, text):
    page.wait_for_function(
        f"(text) => [...document.querySelectorAll('{SAY}')].some((e) => e.textContent.includes(text))", arg=text
    )


def edge(page, side):
    """The middle of an edge of the band, on the page, once the layout has settled."""
    before = None
    while True:
        box = page.locator(f"[data-gi-edge={side}] .area").bounding_box()
        if box == before:
            return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        before = box
        page.wait_for_timeout(300)


def limiting(graph):
    """The types of its nodes that have the picture."""
    return [node["type"] for node in graph["nodes"] if node["type"] in LIVE]


TEMPLATES = sorted(path.stem for path in (harness.ROOT / "workflows").glob("*.json"))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if limiting(load_workflow(name))])
def test_each_template_shows_what_its_run_will_be(open_page, name):
    page = open_page()
    graph = load_workflow(name)
    (kind,) = load(page, graph)
    (line,) = page.locator(SAY).all_inner_texts()
    steps = page.evaluate(
        "() => comfyAPI.app.app.graph.nodes.flatMap((n) => n.widgets ?? []).find((w) => w.name === 'steps').value"
    )
    guided, of, saved = map(
        int, re.fullmatch(r"(\d+) of (\d+) steps guided, (\d+) % fewer network evaluations", line).groups()
    )
    assert of == steps and 0 < guided < steps
    assert 0 < saved < 50
    assert page.locator(".gi-live .dot.guided").count() >= guided
    assert line in page.locator(".gi-live [role=img]").get_attribute("aria-label")
    assert page.locator(".gi-live [role=slider]").count() == (0 if kind == "GuidanceIntervalPreset" else 2)


@RENDERERS
def test_an_edge_is_dragged_undone_and_moved_by_keys(open_page, vue):
    page = open_page(**{"Comfy.VueNodes.Enabled": vue})
    load(page, load_workflow("02_drag_it"))
    says(page, "7 of 16 steps guided, 28 % fewer network evaluations")
    x, y = edge(page, "hi")
    page.mouse.move(x, y)
    page.mouse.down()
    for i in range(1, 7):
        page.mouse.move(x, y + 2 * i)
    now = page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"])
    assert 1 < now < 9
    page.mouse.up()
    page.wait_for_function(f"() => !document.querySelector('{SAY}').textContent.startsWith('7 ')")
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) == now
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_lo"]) == 0.2
    if vue:  # The node's own field follows.
        page.wait_for_function(
            "(now) => [...document.querySelectorAll('input')].some((e) => Number(e.value) === now)", arg=now
        )

    page.keyboard.press("Control+z")
    says(page, "7 of 16 steps guided")
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) == 10

    # The edge that was dragged has the focus, also after the undo, which makes the node anew.
    page.wait_for_function("() => document.activeElement.dataset.giEdge === 'hi'")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) > 10
    page.keyboard.press("End")
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) == -1
    says(page, "13 of 16 steps guided")
    page.locator("[data-gi-edge=lo]").focus()
    page.keyboard.press("Home")
    says(page, "16 of 16 steps guided, no network evaluations saved")


@RENDERERS
def test_a_run_tells_what_it_was(open_page, vue):
    page = open_page(**{"Comfy.VueNodes.Enabled": vue})
    graph = load_workflow("02_drag_it")
    (sampler,) = (node for node in graph["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][0] = 100 + vue  # A seed that is not cached.
    load(page, graph)
    saved = page.evaluate("() => comfyAPI.app.app.graph.serialize().nodes.map((n) => n.widgets_values)")
    assert [values or [] for values in saved] == [node["widgets_values"] for node in graph["nodes"]]
    page.evaluate("() => comfyAPI.app.app.queuePrompt(0, 1)")
    page.wait_for_function("() => document.querySelector('.gi-live .ran').textContent", timeout=60000)
    ran = page.locator(".gi-live .ran").inner_text()
    # 6 images, 16 evaluations, 7 of them guided.
    assert re.fullmatch(
        r"Last run: 138 network evaluations, [\d.]+ s\. CFG everywhere: 192 \(28 % saved\), about [\d.]+ s", ran
    ), ran
    # The same graph as another workflow, where only the sampler runs anew: its run is told there.
    graph["id"] = str(uuid.uuid4())
    sampler["widgets_values"][0] = 200 + vue
    load(page, graph)
    assert not page.locator(".gi-live .ran").text_content()
    page.evaluate("() => comfyAPI.app.app.queuePrompt(0, 1)")
    page.wait_for_function("() => document.querySelector('.gi-live .ran').textContent", timeout=60000)
    sent = page.evaluate("async () => (await comfyAPI.app.app.graphToPrompt()).output")
    (ours,) = (node["inputs"] for node in sent.values() if node["class_type"] == "GuidanceInterval")
    assert set(ours) == {"model", "sigma_lo", "sigma_hi", "units", "outside"}


FOLLOWED = """() => {
    const { app } = comfyAPI.app;
    const graph = app.graph;
    const find = (type) => graph.nodes.find((n) => n.type === type);
    const [interval, sampler] = [find("GuidanceInterval"), find("KSampler")];
    const add = (type) => { const node = LiteGraph.createNode(type); graph.add(node); return node; };
    const reroute = add("Reroute");
    const bypassed = add("RescaleCFG");
    bypassed.mode = 4;
    const steps = add("PrimitiveInt");
    steps.widgets[0].value = 10;
    const setter = add("Reroute"); // As nodes that set and get by name do it: a virtual node, and no link.
    const getter = add("Reroute");
    getter.resolveVirtualOutput = () => ({ node: setter, slot: 0 });
    getter.getInputLink = () => graph.getLink(setter.inputs[0].link);
    interval.connect(0, reroute, 0);
    reroute.connect(0, bypassed, 0);
    bypassed.connect(0, setter, 0);
    getter.connect(0, sampler, 0);
    steps.connect(0, sampler, sampler.inputs.findIndex((i) => i.name === "steps"));
}"""


def test_links_are_followed_through_reroutes_bypassed_nodes_and_subgraphs(open_page):
    page = open_page()
    load(page, load_workflow("02_drag_it"))
    page.evaluate(FOLLOWED)
    says(page, "of 10 steps guided")
    assert "sampler connected" not in page.locator(".gi-live .note").inner_text()
    page.evaluate(
        """() => {
            const { app } = comfyAPI.app;
            const inside = ["KSampler", "PrimitiveInt"];
            app.graph.convertToSubgraph(new Set(app.graph.nodes.filter((n) => inside.includes(n.type))));
            const inner = [...app.graph.subgraphs.values()][0];
            inner.nodes.find((n) => n.type === "PrimitiveInt").widgets[0].value = 12;
        }"""
    )
    says(page, "of 12 steps guided")
    page.evaluate(
        """() => {
            const { app } = comfyAPI.app;
            app.graph.convertToSubgraph(new Set(app.graph.nodes.filter((n) => n.type === "GuidanceInterval")));
            const holds = (graph) => graph.nodes.some((n) => n.type === "GuidanceInterval");
            app.canvas.setGraph([...app.graph.subgraphs.values()].find(holds));
        }"""
    )
    says(page, "of 12 steps guided")
    note = page.locator(".gi-live .note").last.inner_text()
    assert note == "dpmpp_2m, karras", note  # Nothing assumed.


def test_without_a_sampler_the_picture_says_what_it_assumes(open_page):
    page = open_page()
    load(page, load_workflow("02_drag_it"))
    page.evaluate("() => comfyAPI.app.app.graph.nodes.find((n) => n.type === 'KSampler').disconnectInput(0)")
    says(page, "of 20 steps guided")
    assert "no active sampler connected, assuming 20 steps" in page.locator(".gi-live .note").inner_text()


SET = """([type, name, value]) => {
    const node = comfyAPI.app.app.graph.nodes.find((n) => n.type === type);
    node.widgets.find((w) => w.name === name).value = value;
}"""


def test_where_nothing_is_guided_the_picture_says_why(open_page):
    page = open_page()
    load(page, load_workflow("02_drag_it"))
    page.evaluate(SET, ["KSampler", "cfg", 1])
    says(page, "cfg is 1, so no step is guided: nothing to save")
    assert page.locator(".gi-live .dot").count() >= 16 and page.locator(".gi-live .dot.guided").count() == 0
    page.evaluate(SET, ["KSampler", "denoise", 0])
    says(page, "The sampler has no step to take")
    page.evaluate(SET, ["KSampler", "denoise", 1])
    page.evaluate(SET, ["KSampler", "cfg", 4])
    says(page, "7 of 16 steps guided, 28 % fewer network evaluations")


SECOND = """() => {
    const { app } = comfyAPI.app;
    const find = (type) => app.graph.nodes.find((n) => n.type === type);
    const [interval, first, decode] = [find("GuidanceInterval"), find("KSampler"), find("VAEDecode")];
    const second = first.clone();
    second.id = -1; // To be given one: of some front ends (1.49.6) the clone's is "undefined", and stays.
    app.graph.add(second);
    const at = (node, name) => node.inputs.findIndex((i) => i.name === name);
    interval.connect(0, second, at(second, "model"));
    for (const name of ["positive", "negative"]) {
        const link = app.graph.getLink(first.inputs[at(first, name)].link);
        app.graph.getNodeById(link.origin_id).connect(link.origin_slot, second, at(second, name));
    }
    first.connect(0, second, at(second, "latent_image"));
    second.connect(0, decode, at(decode, "samples"));
    second.widgets.find((w) => w.name === "steps").value = 5;
    return [first.id, second.id];
}"""


def test_of_two_samplers_the_picture_names_the_one_it_shows(open_page):
    page = open_page()
    graph = load_workflow("02_drag_it")
    (sampler,) = (node for node in graph["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][0] = 300  # A seed that is not cached.
    graph["id"] = str(uuid.uuid4())
    load(page, graph)
    first, second = page.evaluate(SECOND)
    page.wait_for_function("() => document.querySelector('.gi-live .note').textContent.includes('several samplers')")
    assert f"several samplers, shown for KSampler #{first}" in page.locator(".gi-live .note").inner_text()
    says(page, "of 16 steps guided")
    page.evaluate("() => comfyAPI.app.app.queuePrompt(0, 1)")
    page.wait_for_function("() => document.querySelector('.gi-live .ran').textContent.includes('\\n')", timeout=60000)
    lines = page.locator(".gi-live .ran").inner_text().split("\n")
    rows, of = re.fullmatch(r"Last run: (\d+) network evaluations.* \(sampler (\d+)\)", lines[0]).groups()
    assert (rows, of) == ("138", str(first))
    assert lines[1].endswith(f"(sampler {second})")


def test_zoomed_out_the_picture_is_a_number(open_page):
    page = open_page()
    load(page, load_workflow("02_drag_it"))
    page.evaluate("() => { comfyAPI.app.app.canvas.ds.scale = 0.3; comfyAPI.app.app.canvas.setDirty(true, true); }")
    page.wait_for_function("() => document.querySelector('.gi-live.far')")
    assert not page.locator(SAY).is_visible()
    assert page.locator(".gi-live .large").text_content() == "\N{MINUS SIGN}28 %"


def test_a_failing_route_leaves_the_node_as_it_is(open_page):
    page = open_page()
    page.route("**/guidance_interval/forecast", lambda route: route.fulfill(status=500, body="no"))
    try:
        load(page, load_workflow("02_drag_it"))
        says(page, "No picture")
        assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) == 10
        sent = page.evaluate("async () => (await comfyAPI.app.app.graphToPrompt()).output")
        assert any(node["class_type"] == "GuidanceInterval" for node in sent.values())
    finally:
        page.unroute("**/guidance_interval/forecast")


def test_a_front_end_without_dom_widgets_has_plain_nodes(open_page):
    names = open_page().evaluate(
        """() => {
            const of = LiteGraph.LGraphNode.prototype;
            const kept = of.addDOMWidget;
            of.addDOMWidget = undefined;
            try {
                return LiteGraph.createNode("GuidanceInterval").widgets.map((w) => w.name);
            } finally {
                of.addDOMWidget = kept;
            }
        }"""
    )
    assert names == ["sigma_lo", "sigma_hi", "units", "outside"]


def test_the_picture_can_be_turned_off(open_page):
    page = open_page(**{"GuidanceInterval.Live": False})
    page.evaluate(LOAD, load_workflow("02_drag_it"))
    page.wait_for_timeout(600)
    assert page.locator(SAY).count() == 0
    assert page.evaluate(WIDGET, ["GuidanceInterval", "sigma_hi"]) == 10


def test_touch(server, chromium, open_page):
    """A finger drags an edge, and the canvas stays where it is."""
    page = open_page()
    load(page, load_workflow("02_drag_it"))
    x, y = edge(page, "lo")
    before = page.evaluate("() => [...comfyAPI.app.app.canvas.ds.offset]")
    session = page.context.new_cdp_session(page)
    points = lambda dy: [{"x": x, "y": y + dy, "id": 1}]  # noqa: E731
    session.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": points(0)})
    for dy in (-3, -6, -9):
        session.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": points(dy)})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function(f"() => ({WIDGET})(['GuidanceInterval', 'sigma_lo']) > 0.21")
    assert page.evaluate("() => [...comfyAPI.app.app.canvas.ds.offset]") == before


def test_japanese(open_page):
    page = open_page(**{"Comfy.Locale": "ja"})
    load(page, load_workflow("02_drag_it"))
    says(page, "16 ステップ中 7 ステップをガイド、ネットワークの評価回数 28% 減")
