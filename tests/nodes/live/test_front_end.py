"""The front end's own code, in an engine without a page: what is asked, what is said, and where an edge goes.

What needs a page is in test_browser.py.
"""

import json
import re

import comfy_harness as harness
import pytest

mini_racer = pytest.importorskip("py_mini_racer", reason="no engine for JavaScript: pip install mini-racer")

STUBS = """
var calls = [], answers = [], listeners = {}, extensions = [], added = [], graph = null;
class Signal { constructor() { this.aborted = false; } }
var AbortController = class { constructor() { this.signal = new Signal(); } abort() { this.signal.aborted = true; } };
var console = { warn: (...args) => calls.push(["warn", String(args[1])]) };
var performance = { now: () => 1000 };
var document = { hidden: false, activeElement: null };
var setInterval = (fn, time) => calls.push(["every", time]);
var URL = class { constructor(text) { this.pathname = text.replace("http://x", ""); } };
var api = {
  clientId: "a page",
  addEventListener: (name, fn) => (listeners[name] = fn),
  fetchApi: (path, options) => { calls.push([path, options]); return answers.shift()(options); },
};
var app = { registerExtension: (e) => extensions.push(e), ui: { settings: { getSettingValue: () => undefined } } };
"""


def engine(*names, before=""):
    """An engine in which these files of web/ have run, without what they import."""
    context = mini_racer.MiniRacer()
    context.eval(STUBS + before)
    for name in names:
        source = (harness.ROOT / "web" / name).read_text(encoding="utf-8")
        source = re.sub(r"^import .*$", "", source, flags=re.M).replace(
            "import.meta.url", '"http://x/extensions/a%20b/t.js"'
        )
        context.eval(re.sub(r"^export ", "", source, flags=re.M))
    return context


def run(context, code):
    """The value of the body of a function, by way of JSON."""
    return json.loads(context.eval(f"JSON.stringify((() => {{ {code} }})() ?? null)"))


def strings(language):
    text = (harness.ROOT / "locales" / language / "main.json").read_text(encoding="utf-8")
    return json.loads(text)["guidanceInterval"]


# ----------------------------------------------------------------------------
# What is asked: the graph as it would be queued.

GRAPH = """
/** Of {id: {type, inputs: [[name, type]], outputs: [type]}}; links as [origin, slot, target, slot]. */
function makeGraph(nodes, links, id = "g") {
  const graph = { id, nodes: [], all: new Map(), getLink: (i) => links[i] };
  graph.getNodeById = (i) => graph.all.get(Number(i));
  for (const [key, { inputs = [], outputs = [], values = {}, ...rest }] of Object.entries(nodes)) {
    const node = {
      id: Number(key), graph, mode: 0, ...rest,
      inputs: inputs.map(([name, type]) => ({ name, type, link: null })),
      outputs: outputs.map((type) => ({ type })),
      widgets: Object.entries(values).map(([name, value]) => ({ name, value })),
    };
    graph.nodes.push(node);
    graph.all.set(node.id, node);
  }
  links.forEach(([origin, slot, target, at], i) => {
    if (graph.all.has(target)) graph.all.get(target).inputs[at].link = i;
    links[i] = { origin_id: origin, origin_slot: slot, target_id: target, target_slot: at };
  });
  return graph;
}
const MODEL = ["model", "MODEL"];
const chain = (between = {}, extra = {}, links = []) => makeGraph(
  {
    1: { type: "Loader", outputs: ["MODEL", "CLIP"] },
    2: { type: "GuidanceInterval", comfyClass: "GuidanceInterval", inputs: [MODEL], outputs: ["MODEL"] },
    3: { type: "Between", inputs: [["other", "IMAGE"], MODEL], outputs: ["MODEL"], ...between },
    4: { type: "KSampler", inputs: [MODEL], outputs: ["LATENT"], values: { steps: 8 } },
    ...extra,
  },
  [[1, 0, 2, 0], [2, 0, 3, 1], [3, 0, 4, 0], ...links],
);
const TYPES_ = new Set(["GuidanceInterval"]);
const asked = (graph) => {
  const { prompt, ids } = toPrompt(graph, TYPES_);
  return { prompt, ids: [...ids.values()] };
};
"""


@pytest.fixture(scope="module")
def prompts():
    return engine("live_prompt.js", before=GRAPH)


def inputs(prompts, graph, node="4"):
    return run(prompts, f"return asked({graph}).prompt[{node!r}]?.inputs")


def test_links_and_values_are_sent(prompts):
    sent = run(prompts, "return asked(chain())")
    assert sent["ids"] == ["2"]
    assert {key: node["inputs"] for key, node in sent["prompt"].items()} == {
        "1": {},
        "2": {"model": ["1", 0]},
        "3": {"model": ["2", 0]},
        "4": {"model": ["3", 0], "steps": 8},
    }
    assert [node["class_type"] for node in sent["prompt"].values()] == [
        "Loader",
        "GuidanceInterval",
        "Between",
        "KSampler",
    ]
    assert sent["prompt"]["3"]["types"] == {"inputs": {"model": "MODEL"}, "outputs": ["MODEL"]}


def test_only_what_is_connected_is_sent(prompts):
    """In either direction, and no link to a node that is not there."""
    beside = "{9: { type: 'Other', inputs: [['x', 'INT']], outputs: ['INT'] }, 8: { type: 'Number', outputs: ['INT'] }}"
    assert sorted(run(prompts, f"return asked(chain({{}}, {beside}, [[8, 0, 9, 0]])).prompt")) == ["1", "2", "3", "4"]
    merged = (
        "{9: { type: 'Merge', inputs: [['a', 'MODEL'], ['b', 'MODEL']] }, 8: { type: 'Loader', outputs: ['MODEL'] }}"
    )
    sent = run(prompts, f"return asked(chain({{}}, {merged}, [[3, 0, 9, 0], [8, 0, 9, 1]])).prompt")
    assert sorted(sent) == ["1", "2", "3", "4", "8", "9"] and sent["9"]["inputs"] == {"a": ["3", 0], "b": ["8", 0]}
    muted = run(prompts, "return asked(chain({ mode: 2 }))")
    assert muted["ids"] == ["2"] and sorted(muted["prompt"]) == ["1", "2"]


def test_what_is_heavy_is_not_sent(prompts):
    heavy = "CONDITIONING IMAGE MASK VAE CLIP CLIP_VISION CLIP_VISION_OUTPUT CONTROL_NET STYLE_MODEL UPSCALE_MODEL"
    for kind in [*heavy.split(), "AUDIO", "VIDEO"]:
        graph = f"chain({{ inputs: [['other', '{kind}'], MODEL] }}, {{}}, [[1, 1, 3, 0]])"
        assert inputs(prompts, graph, "3") == {"model": ["2", 0]}, kind
    light = "chain({ inputs: [['other', 'SIGMAS'], MODEL] }, {}, [[1, 1, 3, 0]])"
    assert inputs(prompts, light, "3")["other"] == ["1", 1]
    # A latent's size counts for a schedule and for a model's sampling, and for nothing else.
    latent = "chain({{ inputs: [['latent', 'LATENT'], MODEL], outputs: ['{}'] }}, {{}}, [[1, 1, 3, 0]])"
    for kind, sent in (("MODEL", True), ("SIGMAS", True), ("LATENT", False)):
        assert ("latent" in inputs(prompts, latent.format(kind), "3")) == sent, kind


def test_which_values_are_sent(prompts):
    values = {
        "a": 1,
        "b": True,
        "c": "x" * 2000,
        "long": "x" * 2001,
        "none": None,
        "list": [1],
        "seed": 3,
        "noise_seed": 4,
    }
    graph = f"chain({{ values: {json.dumps({**values, 'control_after_generate': 'fixed'})} }})"
    assert inputs(prompts, graph, "3") == {"a": 1, "b": True, "c": "x" * 2000, "model": ["2", 0]}
    code = "const g = chain({ values: { a: 1 } }); g.all.get(3).widgets[0].options = { serialize: %s }; return asked(g)"
    assert "a" not in run(prompts, code % "false")["prompt"]["3"]["inputs"]
    assert run(prompts, code % "true")["prompt"]["3"]["inputs"]["a"] == 1
    seeds = "chain({ inputs: [['seed', 'INT'], MODEL] }, {}, [[1, 1, 3, 0]])"
    assert inputs(prompts, seeds, "3") == {"model": ["2", 0]}


def test_a_bypassed_node_hands_on_the_input_of_its_type(prompts):
    assert inputs(prompts, "chain({ mode: 4 })")["model"] == ["2", 0]
    same_slot = "chain({ mode: 4, inputs: [['first', 'MODEL'], MODEL] }, {}, [[1, 0, 3, 0]])"
    assert inputs(prompts, same_slot)["model"] == ["1", 0]
    two = "mode: 4, inputs: [['first', 'MODEL'], MODEL], outputs: ['MODEL', 'MODEL']"
    assert inputs(prompts, f"chain({{ {two} }}, {{}}, [[1, 0, 3, 0], [3, 1, 4, 0]])")["model"] == ["2", 0]
    any_slot = "chain({ mode: 4, inputs: [['first', '*'], MODEL] }, {}, [[1, 0, 3, 0]])"
    assert inputs(prompts, any_slot)["model"] == ["1", 0]
    assert inputs(prompts, "chain({ mode: 4, inputs: [['a', 'IMAGE'], ['b', 'VAE']] })") is None  # Cut off.
    assert run(prompts, "return asked(chain()).ids") == ["2"]
    off = run(prompts, "const g = chain(); g.all.get(2).mode = 4; return asked(g)")
    assert off["ids"] == [None] and off["prompt"] == {}


def test_virtual_nodes_are_followed(prompts):
    assert (
        inputs(prompts, "chain({ isVirtualNode: true, inputs: [MODEL, MODEL] })") is None
    )  # Its first input is empty.
    code = "const g = chain({ isVirtualNode: true }); const n = g.all.get(3); %s; return asked(g).prompt[4]?.inputs"
    assert run(prompts, code % "n.getInputLink = () => g.getLink(n.inputs[1].link)")["model"] == ["2", 0]
    by_name = "n.resolveVirtualOutput = (slot) => ({ node: g.all.get(2), slot: slot + 1 })"
    assert run(prompts, code % by_name)["model"] == ["2", 1]
    primitive = "{5: { type: 'PrimitiveNode', isVirtualNode: true, outputs: ['INT'], values: { value: 12 } }}"
    graph = f"chain({{}}, {primitive}, [[5, 0, 4, 1]])".replace("chain(", "withSteps(")
    prompts.eval(
        "function withSteps(...args) { const make = makeGraph; makeGraph = (nodes, ...rest) => { nodes[4].inputs ="
        " [MODEL, ['steps', 'INT']]; return make(nodes, ...rest); };"
        " try { return chain(...args); } finally { makeGraph = make; } }"
    )
    assert inputs(prompts, graph) == {"model": ["3", 0], "steps": 12}


SUBGRAPH = """
const inner = makeGraph(
  {
    1: { type: "Patch", inputs: [MODEL], outputs: ["MODEL"] },
    2: { type: "Steps", inputs: [["n", "INT"]], outputs: ["INT"] },
  },
  [[-10, 0, 1, 0], [1, 0, -20, 0], [-10, 1, 2, 0], [2, 0, -20, 1], [-10, 0, -20, 2]],
  "inner",
);
inner.outputNode = { slots: [{ linkIds: [1] }, { linkIds: [3] }, { linkIds: [4] }, { linkIds: [] }] };
const sub = { isSubgraphNode: () => true, subgraph: inner, inputs: [MODEL, ["n", "INT"]], values: { n: 6 },
              outputs: ["MODEL", "INT", "MODEL", "MODEL"] };
const outer = (slot, rest = {}) => {
  const g = makeGraph(
    {
      1: { type: "Loader", outputs: ["MODEL"] },
      2: { type: "GuidanceInterval", comfyClass: "GuidanceInterval", inputs: [MODEL], outputs: ["MODEL"] },
      3: { ...sub, ...rest },
      4: { type: "KSampler", inputs: [MODEL, ["steps", "INT"]], outputs: [] },
    },
    [[1, 0, 2, 0], [2, 0, 3, 0], [3, slot, 4, 0], [3, 1, 4, 1]],
  );
  return g;
};
"""


def test_subgraphs_are_entered_and_left(prompts):
    prompts.eval(SUBGRAPH)
    sent = run(prompts, "return asked(outer(0)).prompt")
    assert sent["4"]["inputs"] == {"model": ["3:1", 0], "steps": ["3:2", 0]}
    assert sent["3:1"]["inputs"] == {"model": ["2", 0]} and sent["3:2"]["inputs"] == {"n": 6}
    assert "3" not in sent
    assert inputs(prompts, "outer(2)")["model"] == ["2", 0]  # Straight through.
    assert "model" not in (inputs(prompts, "outer(3)") or {})  # An output that nothing gives.
    bypassed = run(prompts, "return asked(outer(0, { mode: 4 })).prompt")
    assert bypassed["4"]["inputs"]["model"] == ["2", 0] and "3:1" not in bypassed
    assert sorted(run(prompts, "return asked(outer(0, { mode: 2 })).prompt")) == ["1", "2"]
    within = """
        const g = makeGraph({ 5: { ...sub, inputs: [], subgraph: chain() } }, []);
        return [...toPrompt(g, TYPES_).ids.values()];
    """
    assert run(prompts, within) == ["5:2"]


def test_circles_end(prompts):
    loop = """
        const g = chain({ isVirtualNode: true });
        g.all.get(3).inputs[0].link = 3;
        const links = g.getLink;
        g.getLink = (i) => (i === 3 ? { origin_id: 3, origin_slot: 0 } : links(i));
        return Object.keys(asked(g).prompt);
    """
    assert run(prompts, loop) == ["1", "2"]
    nested = (
        "const g = chain(); g.all.get(3).isSubgraphNode = () => true; g.all.get(3).subgraph = g; return asked(g).ids"
    )
    assert run(prompts, nested)[0] == "2"


# ----------------------------------------------------------------------------
# What is said.


def words(language):
    context = engine("live.js", before="class Chart {}\nconst toPrompt = () => graph;")
    context.eval(f"strings = {json.dumps(strings(language))}")
    return context


@pytest.fixture(scope="module")
def english():
    return words("en")


def say(context, **data):
    full = {"steps": 8, "guided": 3, "notes": [], "sampler": "euler", "scheduler": "karras", "bounds": [0.28, 5.42]}
    return run(context, f"return describe({json.dumps({**full, **data})})")


def test_the_line_says_steps_and_rows(english):
    assert say(english, saved=31)["line"] == "3 of 8 steps guided, 31 % fewer network evaluations"
    assert say(english, saved=0)["line"] == "3 of 8 steps guided, no network evaluations saved"
    assert say(english, saved=-4)["line"] == "3 of 8 steps guided, 4 % more network evaluations"
    assert say(english)["line"] == "3 of 8 steps guided"
    assert say(english, error="no")["line"] == "no"
    assert say(english, error="KeyError: x", failed=True)["line"] == strings("en")["failed"]
    for nothing, key in (("cfg", "cfg_is_1"), ("guider", "no_uncond"), ("steps", "no_steps")):
        said = say(english, saved=0, nothing=nothing)
        assert said["line"] == strings("en")[key] and said["large"] == "\N{MINUS SIGN}"


def test_zoomed_out_it_is_one_number(english):
    assert say(english, saved=31)["large"] == "\N{MINUS SIGN}31 %" and say(english, saved=1)["large"][1:] == "1 %"
    assert say(english, saved=0)["large"] == say(english, saved=-1)["large"] == say(english)["large"] == "3/8"


def test_the_note_says_what_is_assumed(english):
    said = say(english, notes=[["model", "X"], ["linked", "cfg = 3"], ["new code", 1]])
    assert said["note"] == "euler, karras · model unknown, shown as SDXL · linked value, assuming cfg = 3 · new code"
    assert say(english, sampler="", scheduler="")["note"] == ""
    assert say(english)["edge"] == {"lo": "Lower bound", "hi": "Upper bound"}
    said = say(english, saved=31, bounds=[0.28123, None])
    assert said["alternative"] == (
        "Noise level by step. 3 of 8 steps guided, 31 % fewer network evaluations. "
        "Guided from sigma ∞ down to 0.281. euler, karras"
    )
    assert "down to ∞" in say(english, bounds=[None, None])["alternative"]
    japanese = say(words("ja"), saved=31)
    assert japanese["line"] == "8 ステップ中 3 ステップをガイド、ネットワークの評価回数 31% 減"


def runs(context, *reports, shown="3"):
    noted = "; ".join(f"noteRun(of, {json.dumps(report)})" for report in reports)
    shown = json.dumps(shown)
    return run(context, f"const of = new Map(); {noted}; return describeRuns(of.values(), {shown})")


def test_a_run_is_said_with_the_sampler_that_made_it(english):
    report = {"rows": 138, "rows_cfg": 192, "seconds": 9.996, "seconds_cfg": 12.4, "sampler": "3", "prompt": "p"}
    one = "Last run: 138 network evaluations, 10.00 s. CFG everywhere: 192 (28 % saved), about 12 s"
    assert runs(english, report) == one
    assert runs(english, report | {"prompt": "q"}, report) == one
    assert runs(english, report, shown=None) == one  # Nothing is shown of a sampler.
    assert runs(english, report, shown="4") == f"{one} (sampler 3)"
    assert runs(english, report, report, report) == f"{one} (the last of 3 runs)"
    second = {"rows": 40, "rows_cfg": None, "seconds": 10.2, "seconds_cfg": None, "sampler": "12", "prompt": "p"}
    both = f"{one} (sampler 3)\nLast run: 40 network evaluations, 10 s (sampler 12)"
    assert runs(english, second, report) == runs(english, report, second) == both
    assert runs(english, second, report, shown="12") == "\n".join(reversed(both.split("\n")))
    assert runs(english, second, report | {"prompt": "q"}) == one  # Of the last prompt alone.
    rows = "Last run: 138 network evaluations, 10.00 s. CFG everywhere: 192 (28 % saved)"
    assert runs(english, report | {"seconds_cfg": None}) == rows
    old = {key: value for key, value in report.items() if key not in ("sampler", "prompt")}
    assert runs(english, old, old, shown=None) == one


def test_a_run_that_was_left_as_it_is_is_said_with_the_reason(english, host):
    report = {"rows": 40, "rows_cfg": None, "seconds": 3, "seconds_cfg": None, "sampler": "3", "prompt": "p"}
    said = runs(english, report | {"left": ["past", "NAGCFGGuider"]})
    assert (
        said
        == "Last run: 40 network evaluations, 3.00 s. Not limited: NAGCFGGuider evaluates the model in a way of its own"
    )
    assert "評価 40 回、3.00 秒。cfg が 1 だった" in runs(words("ja"), report | {"left": ["cfg_one", ""]})
    assert runs(english, report | {"left": ["new code", ""]}) == "Last run: 40 network evaluations, 3.00 s. new code"
    for language in ("en", "ja"):
        assert strings(language)["left"].keys() == harness.our_module(host, "model_patch").LEFT.keys()


# ----------------------------------------------------------------------------
# Asking.

VIEW = """
var shown = [], olds = [];
const view = Object.create(View.prototype);
view.chart = { data: null, drag: null, old: (yes) => olds.push(yes) };
view.chart.show = (data) => shown.push((view.chart.data = data));
view.asked = null;
const reply = (status, data) => async () => ({ status, ok: status === 200, json: async () => data });
const settled = async (...asks) => {
  await Promise.all(asks);
  return JSON.stringify({ shown, olds, calls, asked: view.asked });
};
"""


def asking(code):
    """{shown, olds, calls, asked} after `code`, the arguments of settled(...)."""
    context = words("en")
    context.eval(VIEW)
    return json.loads(context.eval(f"settled({code})").get())


def test_a_question_is_asked_once(english):
    code = "(answers = [reply(200, { steps: 3 })], view.ask({ a: 1 }, '2')), view.ask({ a: 1 }, '2')"
    after = asking(code)
    ((path, options),) = after["calls"]
    assert path == "/guidance_interval/forecast" and options["method"] == "POST"
    assert options["headers"] == {"Content-Type": "application/json"}
    assert json.loads(options["body"]) == {"prompt": {"a": 1}, "node": "2", "client": "a page"}
    assert after["shown"] == [{"steps": 3}] and after["olds"] == [True, False]


def test_a_newer_question_aborts_the_older_one():
    code = """(answers = [
        (options) => new Promise((_, no) => (view.stop = () => no(new Error("aborted: " + options.signal.aborted)))),
        reply(200, { steps: 4 }),
    ], view.ask({}, '1')), (view.ask({}, '2')), (view.stop(), Promise.resolve())"""
    after = asking(code)
    assert after["shown"] == [{"steps": 4}]
    assert [call[0] for call in after["calls"]] == ["/guidance_interval/forecast"] * 2  # And no warning.
    assert after["calls"][0][1]["signal"] == {"aborted": True} and after["calls"][1][1]["signal"] == {"aborted": False}


@pytest.mark.parametrize("status", [409, 503])
def test_what_a_busy_server_leaves_is_asked_again(status):
    after = asking(f"(answers = [reply({status}, {{ error: 'later' }})], view.ask({{}}, '2'))")
    assert after["asked"] is None and after["shown"] == [] and len(after["calls"]) == 1


def test_a_failure_is_said_once_and_only_where_nothing_is_shown():
    failed = {"error": strings("en")["failed"]}
    after = asking("(answers = [reply(500, { error: 'no' })], view.ask({}, '2'))")
    assert after["shown"] == [failed] and after["calls"][1] == ["warn", "Error: no"] and after["olds"] == [True, False]
    after = asking("(view.chart.data = { steps: 1 }, answers = [reply(500, {})], view.ask({}, '2'))")
    assert after["shown"] == []
    after = asking("view.ask({}, null)")
    assert after["shown"] == [{"error": strings("en")["off"]}] and after["calls"] == []


def test_a_drag_is_not_disturbed_by_an_answer():
    drag = "(view.chart.data = { band: [0.1, 0.7] }, view.chart.drag = {}, answers = [reply(200, { band: [0, 1] })],"
    after = asking(drag + " view.ask({}, '2'))")
    assert after["shown"] == [{"band": [0.1, 0.7]}] and after["olds"] == [False, False]


LOOKED = """
var far = [], ran = [], asks = [];
app.graph = { id: "w" };
app.canvas = { ds: { scale: 1 } };
const seen = (id, place = { id: "w" }) => {
  const node = { id, graph: place };
  const chart = { data: { sampler_id: "3" }, far: (yes) => far.push(yes), showRun: (text) => ran.push(text) };
  views.set(node, { chart: { ...chart, element: { isConnected: false } }, ask: (...question) => asks.push(question) });
  return node;
};
const node = seen(7);
graph = { prompt: { a: 1 }, ids: new Map([[node, "7"]]) };
const looked = () => { far = []; ran = []; asks = []; look(); return { far, ran, asks }; };
"""


@pytest.fixture
def looking():
    context = words("en")
    context.eval(LOOKED)
    return context


def test_each_node_is_asked_about_and_shows_its_runs(looking):
    assert run(looking, "return looked()") == {"far": [False], "ran": [""], "asks": [[{"a": 1}, "7"]]}
    looking.eval("extensions[0].setup(); var report = { rows: 9, seconds: 1, sampler: '3', prompt: 'p', node: '7' }")
    assert run(looking, "return calls") == [["every", 250]]
    looking.eval("const tell = (more) => listeners['guidance_interval.run']({ detail: { ...report, ...more } })")
    looking.eval("tell({ workflow: 'another' }); tell({ node: '8' })")
    assert run(looking, "return looked().ran") == [""]
    looking.eval("tell({}); tell({ workflow: 'w' })")  # A server that does not say which workflow means this one.
    assert run(looking, "return looked().ran") == ["Last run: 9 network evaluations, 1.00 s (the last of 2 runs)"]


def test_from_afar_and_where_there_is_nothing_to_look_at(looking):
    for scale, is_far in ((0.49, True), (0.5, False), (2, False)):
        assert run(looking, f"app.canvas.ds.scale = {scale}; return looked().far") == [is_far]
    nothing = {"far": [], "ran": [], "asks": []}
    assert run(looking, "document.hidden = true; return looked()") == nothing
    looking.eval("document.hidden = false; const kept = app.graph; app.graph = null")
    assert run(looking, "return looked()") == nothing
    looking.eval("app.graph = { id: 'inner', rootGraph: kept }; seen(8, null); seen(9)")
    after = run(looking, "return looked()")  # One is being made; the other is in no graph that is open.
    assert after["asks"] == [[{"a": 1}, "7"]] and len(after["far"]) == 2


def test_a_node_grows_and_never_shrinks(looking):
    grown = (
        "const n = { size: [200, %d], computeSize: () => [100, 90], setSize: (s) => (n.size = s) }; grow(n); return n"
    )
    assert run(looking, grown % 80)["size"] == [200, 90]
    assert run(looking, grown % 100)["size"] == [200, 100]
    assert run(looking, "const n = { size: [1, 2] }; grow(n); return n")["size"] == [1, 2]


def test_a_made_node_has_a_view_until_it_is_removed():
    context = words("en")
    context.eval(
        """
        var made = [];
        const setting = {};
        app.ui.settings.getSettingValue = (name) => setting[name];
        Object.assign(Chart.prototype, { lately: () => "hi", remove: () => made.push("removed") });
        Chart.prototype.element = { setAttribute() {} };
        const born = (comfyClass, more = {}) => {
          const node = { id: 1, graph: { id: "w" }, comfyClass, size: [1, 1], widgets: [], inputs: [], ...more };
          node.addDOMWidget = (...args) => (node.dom = args, {});
          extensions[0].nodeCreated(node);
          return node;
        };
        """
    )
    assert run(context, "return born('KSampler').dom") is None
    assert run(context, "setting['GuidanceInterval.Live'] = false; return born('GuidanceInterval').dom") is None
    context.eval("setting['GuidanceInterval.Live'] = true")
    assert run(context, "return born('GuidanceInterval').dom.slice(0, 2)") == [
        "guidance_interval_live",
        "guidance_interval_live",
    ]
    options = run(
        context, "const o = born('GuidanceIntervalGuider').dom[3]; return [o.serialize, o.getMinHeight(), o.getValue()]"
    )
    assert options == [False, 172, ""]
    context.eval("views.clear(); const n = born('GuidanceIntervalSteps', { onRemoved: () => made.push('theirs') })")
    assert run(context, "return views.size") == 1
    context.eval(
        "views.get(n).asking = new AbortController(); const signal = views.get(n).asking.signal; n.onRemoved()"
    )
    assert run(context, "return [views.size, made, signal.aborted, gone.get('w:1').edge]") == [
        0,
        ["removed", "theirs"],
        True,
        "hi",
    ]


def test_a_value_is_set_as_the_user_would(english):
    code = """
        const set = [];
        const view = Object.create(View.prototype);
        view.node = { widgets: [{ name: "a", value: 1, callback: (value) => set.push(value) }],
                      inputs: [{ widget: { name: "a" }, link: %s }, { widget: { name: "b" }, link: 0 }],
                      setDirtyCanvas: () => set.push("drawn") };
        view.set("a", 2); view.set("nothing", 3);
        return [set, view.node.widgets[0].value, view.linked("a"), view.linked("b"), view.linked("c")];
    """
    assert run(english, code % "null") == [[2, "drawn"], 2, False, True, False]


def test_strings_fall_back_to_english():
    context = words("en")
    answer = {"en": {"guidanceInterval": {"a": "A", "b": "B", "notes": {"x": "X", "y": "Y"}, "left": {"z": "Z"}}}}
    answer["ja"] = {"guidanceInterval": {"a": "あ", "notes": {"x": "え"}}}
    context.eval(f"answers = [() => Promise.resolve({{ json: () => Promise.resolve({json.dumps(answer)}) }})]")
    context.eval("app.ui.settings.getSettingValue = () => 'ja'")
    assert json.loads(context.eval("load().then(JSON.stringify)").get()) == {
        "a": "あ",
        "b": "B",
        "notes": {"x": "え", "y": "Y"},
        "left": {"z": "Z"},
    }


# ----------------------------------------------------------------------------
# The picture's arithmetic.

CHART = """
const chart = (band, stops) => {
  const c = Object.create(Chart.prototype);
  c.data = { band, edges: { lo: { widget: "lo", value: 0, stops }, hi: { widget: "hi", value: 1, stops } } };
  c.drag = null;
  c.set = [];
  c.actions = { begin: () => c.set.push("begin"), end: () => c.set.push("end"), set: (w, v) => c.set.push([w, v]) };
  c.draw = () => c.set.push("draw");
  return c;
};
const TEN = Array.from({ length: 11 }, (_, i) => [i / 10, i]);
const press = (c, key, side, more = {}) => {
  let prevented = 0;
  c.key({ key, preventDefault: () => prevented++, stopPropagation: () => prevented++, ...more }, side);
  return [c.data.band, c.set, prevented];
};
"""


@pytest.fixture(scope="module")
def charts():
    return engine("live_chart.js", before=CHART)


@pytest.mark.parametrize(
    ("key", "side", "band", "value"),
    [
        ("ArrowUp", "lo", [0.3, 0.7], 3),
        ("ArrowRight", "lo", [0.3, 0.7], 3),
        ("ArrowDown", "lo", [0.1, 0.7], 1),
        ("ArrowLeft", "lo", [0.1, 0.7], 1),
        ("PageUp", "lo", [0.6, 0.7], 6),  # An edge does not pass the other one.
        ("PageDown", "lo", [0.0, 0.7], 0),
        ("Home", "lo", [0.0, 0.7], 0),
        ("End", "lo", [0.6, 0.7], 6),
        ("ArrowUp", "hi", [0.2, 0.8], 8),
        ("ArrowDown", "hi", [0.2, 0.6], 6),
        ("PageUp", "hi", [0.2, 1.0], 10),
        ("PageDown", "hi", [0.2, 0.3], 3),
        ("Home", "hi", [0.2, 0.3], 3),
        ("End", "hi", [0.2, 1.0], 10),
    ],
)
def test_keys_move_an_edge_from_stop_to_stop(charts, key, side, band, value):
    moved, calls, prevented = run(charts, f"return press(chart([0.2, 0.7], TEN), '{key}', '{side}')")
    assert moved == pytest.approx(band) and prevented == 2
    assert calls == ["begin", [side, value], "end", "draw"]


def test_keys_between_stops_and_at_the_ends(charts):
    def moved(band, key, side="lo", stops="TEN"):
        return run(charts, f"return press(chart({band}, {stops}), '{key}', '{side}')[0]")

    assert moved([0.25, 0.7], "ArrowUp") == pytest.approx([0.3, 0.7])
    assert moved([0.25, 0.7], "ArrowDown") == pytest.approx([0.2, 0.7])
    assert moved([0.0, 0.7], "ArrowDown") == pytest.approx([0.0, 0.7])
    assert moved([0.6, 0.7], "ArrowUp") == pytest.approx([0.6, 0.7])
    assert moved([0.2, 0.7], "PageUp", stops="Array.from({ length: 101 }, (_, i) => [i / 100, i])")[0] == pytest.approx(
        0.3
    )
    assert moved([0.2, 0.21], "ArrowUp", "hi", stops="[[0.1, 1]]") == [0.2, 0.21]  # No stop is left.


def test_other_keys_are_the_pages(charts):
    for key, more in (
        ("a", "{}"),
        ("Tab", "{}"),
        *(
            (k, m)
            for k in ("ArrowUp", "Home", "End")
            for m in ("{ ctrlKey: true }", "{ metaKey: true }", "{ altKey: true }")
        ),
    ):
        assert run(charts, f"return press(chart([0.2, 0.7], TEN), '{key}', 'lo', {more})") == [[0.2, 0.7], [], 0]


def test_numbers_beside_the_axis_are_short(charts):
    values = {
        0.28: "0.28",
        5.42: "5.4",
        14.6: "15",
        123: "120",
        99999: "100000",
        100000: "1e+5",
        0.001: "0.001",
        0.00099: "1e-3",
    }
    for value, text in values.items():
        assert run(charts, f"return short({value!r})") == text, value


def test_the_nearest_stop(charts):
    for at, index in ((0, 0), (0.04, 0), (0.06, 1), (0.94, 9), (2, 10), (-1, 0), (0.5, 5)):
        assert run(charts, f"return nearest(TEN, {at})") == index


def test_the_band_follows_a_drag(charts):
    code = "const c = chart([0.2, 0.7], TEN); c.drag = {}; return c.bandNow()"
    assert run(charts, code.format("null")) == [0.2, 0.7]
    assert run(charts, code.format("{ side: 'lo', y: 0.4 }")) == [0.4, 0.7]
    assert run(charts, code.format("{ side: 'hi', y: 0.4 }")) == [0.2, 0.4]


# ----------------------------------------------------------------------------
# The picture, on elements that only remember.

DOM = """
class El {
  constructor(name) {
    Object.assign(this, { name, attributes: {}, children: [], dataset: {}, style: {}, on: {}, textContent: "" });
    this.classes = new Set();
    this.classList = { toggle: (name, yes) => (yes ? this.classes.add(name) : this.classes.delete(name)) };
    [this.clientWidth, this.clientHeight] = [300, 100];
  }
  setAttribute(key, value) { this.attributes[key] = String(value); }
  append(child) { this.children.push(child); }
  replaceChildren(...children) { this.children = children; }
  addEventListener(name, fn) { this.on[name] = fn; }
  all() { return [this, ...this.children.flatMap((c) => c.all())]; }
  contains(other) { return this.all().includes(other); }
  querySelector(text) { return this.all().find((e) => e.dataset.giEdge === text.match(/=(\\w+)/)[1]); }
  focus(options) { document.activeElement = this; this.focused = options; }
  getBoundingClientRect() { return { top: 50, height: 200 }; }
}
var observed = [], pointer = "fine", styles = 0;
var ResizeObserver = class {
  constructor(fn) { this.fn = fn; }
  observe(of) { observed.push(of); }
  disconnect() { observed.push("done"); }
};
Object.assign(document, {
  createElementNS: (_, name) => new El(name),
  createElement: (name) => new El(name),
  getElementById: () => styles,
  head: { append: () => styles++ },
  body: new El("body"),
});
var matchMedia = () => ({ matches: pointer === "coarse" });
var window = {
  on: {},
  addEventListener(name, fn) { this.on[name] = fn; },
  removeEventListener(name, fn) { if (this.on[name] === fn) delete this.on[name]; },
};
var acts = [];
const make = () => new Chart({
  say: (data) => (data.error ? { line: data.error } : {
    line: "line", note: "note", alternative: "all of it", large: "big", edge: { lo: "Lower", hi: "Upper" },
  }),
  movable: (name) => name !== "fixed",
  set: (name, value) => acts.push([name, value]),
  begin: () => acts.push("begin"),
  end: () => acts.push("end"),
  wheel: () => acts.push("wheel"),
});
const stops = Array.from({ length: 11 }, (_, i) => [i / 10, i]);
const answer = (more = {}) => ({
  band: [0.25, 0.75], ticks: [[0.5, 0.28]], end: 0.1,
  points: [[0, 1, false, true], [0.5, 0.5, true, true], [0.25, 0.6, true, false]],
  edges: { lo: { widget: "sigma_lo", value: 0.2, stops }, hi: { widget: "sigma_hi", value: 5, stops } }, ...more,
});
const shownChart = (more) => { acts = []; const c = make(); c.show(answer(more)); return c; };
const of = (chart, name) => chart.svg.all().filter((e) => e.name === name).map((e) => e.attributes);
const group = (chart, side) => chart.svg.querySelector(`[data-gi-edge=${side}]`);
const event = (more) => ({ button: 0, pointerId: 1, preventDefault() {}, stopPropagation() {}, ...more });
"""


@pytest.fixture
def page():
    return engine("live_chart.js", before="var stylesheet;" + DOM)


def number(attributes, *names):
    return [float(attributes[name]) for name in names]


def test_the_picture_is_drawn_to_scale(page):
    page.eval("var c = shownChart()")
    # 300 by 100: between 34 and 290 from the left, 8 and 94 from the top.
    band, *_ = run(page, "return of(c, 'rect')")
    assert band["class"] == "band" and number(band, "x", "width", "y", "height") == [34, 256, 29.5, 43]
    (text, large) = run(page, "return of(c, 'text')")
    assert number(text, "x", "y") == [30, 54.5] and text["text-anchor"] == "end"
    assert number(large, "x", "y") == [150, 64] and large["class"] == "large"
    assert run(page, "return c.svg.all().filter((e) => e.name === 'text').map((e) => e.textContent)") == ["0.28", "big"]
    (grid, hi, lo) = run(page, "return of(c, 'line')")
    assert number(grid, "x1", "x2", "y1", "y2") == [34, 290, 51, 51]
    assert [hi, lo] == [{"x1": "34", "x2": "290"}] * 2
    (curve,) = run(page, "return of(c, 'polyline')")
    assert curve["points"] == "40.0,8.0 162.0,51.0 284.0,85.4"  # Its steps, and where it ends.
    dots = run(page, "return of(c, 'circle')")
    assert [dot["class"] for dot in dots] == ["dot", "dot guided", "dot guided"]
    assert [number(dot, "cx", "cy", "r") for dot in dots] == [
        [40, 8, 4],
        [162, 51, 4],
        [101, pytest.approx(42.4), pytest.approx(2.4)],
    ]
    assert run(page, "return of(shownChart({ end: 0 }), 'polyline')[0].points") == "40.0,8.0 162.0,51.0"
    many = "Array.from({ length: %d }, (_, i) => [0, 0, false, true])"
    assert [
        float(run(page, f"return of(shownChart({{ points: {many % n} }}), 'circle')[0].r")) for n in (50, 1000)
    ] == [
        pytest.approx(0.42 * 256 / 50),
        1.2,
    ]
    assert run(page, "return of(c, 'g').find((g) => g.role === 'img')['aria-label']") == "all of it"
    assert run(page, "return [c.line, c.note, c.ran].map((e) => e.textContent)") == ["line", "note", ""]


def test_the_edges_can_be_taken_and_are_named(page):
    page.eval("var c = shownChart()")
    (hi, lo) = run(page, "return c.svg.children.slice(1).map((e) => e.attributes)")
    assert hi["transform"] == "translate(0 29.5)" and lo["transform"] == "translate(0 72.5)"
    expected = {"class": "edge", "tabindex": "0", "role": "slider", "aria-orientation": "vertical"}
    for edge, label, now, text in ((hi, "Upper", "7", "5"), (lo, "Lower", "2", "0.2")):
        assert expected.items() <= edge.items() and edge["aria-label"] == label
        assert [edge[f"aria-value{k}"] for k in ("min", "max", "now", "text")] == ["0", "10", now, text]
    _, grip, area, *_ = run(page, "return of(c, 'rect')")
    assert number(grip, "x", "width", "y", "height", "rx") == [268, 18, -5, 10, 5]
    assert number(area, "x", "width", "y", "height") == [34, 256, -8, 16]
    assert number(run(page, "pointer = 'coarse'; return of(shownChart(), 'rect')[2]"), "y", "height") == [-16, 32]
    fixed = "{ edges: { lo: null, hi: { widget: 'fixed', value: 1, stops } } }"
    assert run(page, f"return shownChart({fixed}).svg.children.slice(1).map((e) => e.attributes.class)") == [
        "edge fixed",
        "edge fixed",
    ]
    assert len(run(page, f"return of(shownChart({fixed}), 'rect')")) == 1
    assert run(page, "group(c, 'lo').children[2].on.wheel({}); return acts") == ["wheel"]


def test_a_drag_sets_values_and_ends(page):
    """The canvas shows the drawing at twice its size: 200 high, from 50 down."""
    page.eval("var c = shownChart(); var drag = (more) => group(c, 'lo').children[2].on.pointerdown(event(more))")
    assert run(page, "drag({ button: 2 }); return [acts, c.drag]") == [[], None]
    page.eval("drag()")
    assert run(page, "return [acts, c.drag]") == [["begin"], {"side": "lo", "y": 0.25, "value": 0.2}]
    page.eval("drag()")  # Not twice.
    page.eval("var go = (y, more) => window.on.pointermove(event({ clientY: y, ...more }))")
    page.eval("go(50 + 2 * (94 - 0.41 * 86))")
    assert run(page, "return [acts.slice(1), c.drag.y]") == [[["sigma_lo", 4]], 0.4]
    page.eval("go(50 + 2 * (94 - 0.42 * 86)); go(0, { pointerId: 2 })")  # The same stop; another finger.
    assert len(run(page, "return acts")) == 2
    page.eval("go(0)")  # Up to the last stop below the other edge.
    assert run(page, "return acts.at(-1)") == ["sigma_lo", 7]
    # Until the server has said it, the dots follow the band.
    dots = run(page, "return of(c, 'circle').map((e) => e.class)")
    assert dots == ["dot", "dot", "dot"]
    page.eval("go(50 + 2 * (94 - 0.5 * 86))")
    assert run(page, "return of(c, 'circle').map((e) => e.class)") == ["dot", "dot", "dot guided"]
    page.eval("window.on.pointerup(event({ pointerId: 2 }))")
    assert run(page, "return c.drag") is not None
    page.eval("window.on.pointerup(event())")
    assert run(page, "return [c.drag, acts.at(-1), c.data.band, c.data.edges.lo.value, Object.keys(window.on)]") == [
        None,
        "end",
        [0.5, 0.75],
        5,
        [],
    ]
    assert run(page, "return document.activeElement.dataset.giEdge") == "lo"
    page.eval("group(c, 'hi').children[2].on.pointerdown(event()); go(1000); window.on.pointercancel(event())")
    assert run(page, "return [c.data.band, c.data.edges.hi.value]") == [[0.5, 0.6], 6]


def test_the_focus_stays_where_it_was(page):
    page.eval("var c = shownChart(); c.focus('hi')")
    assert run(page, "return [c.focused(), document.activeElement.focused]") == ["hi", {"preventScroll": True}]
    page.eval("c.draw()")
    assert run(page, "return [c.focused(), c.svg.contains(document.activeElement)]") == ["hi", True]
    page.eval("c.svg.on.focusout({ target: document.activeElement }); document.activeElement = document.body")
    assert run(page, "return [c.focused(), c.lately()]") == [None, "hi"]
    page.eval("performance.now = () => 1499")
    assert run(page, "return c.lately()") == "hi"
    page.eval("performance.now = () => 1500")
    assert run(page, "return c.lately()") is None
    page.eval("c.focusNext = 'lo'; c.draw()")  # After an undo, when nothing else has it.
    assert run(page, "return [c.focused(), c.focusNext]") == ["lo", None]
    page.eval("document.activeElement = new El('elsewhere'); c.focusNext = 'hi'; c.draw()")
    assert run(page, "return [c.focused(), c.focusNext]") == [None, None]


def test_what_is_shown_where_there_is_no_picture(page):
    page.eval("var c = make(); c.draw()")
    assert run(page, "return [c.svg.children.length, observed.length]") == [0, 1]
    page.eval("c.show({ error: 'no' })")
    assert run(page, "return [c.line.textContent, c.note.textContent, c.svg.style.display]") == ["no", "", "none"]
    page.eval("c.show(answer()); c.far(true); c.old(true); c.showRun('ran')")
    assert run(page, "return [c.svg.style.display, [...c.element.classes], c.ran.textContent]") == [
        "",
        ["far", "old"],
        "ran",
    ]
    page.eval("c.far(false); c.old(false); c.showRun(); c.remove()")
    assert run(page, "return [[...c.element.classes], c.ran.textContent, observed.at(-1)]") == [[], "", "done"]
    assert run(page, "c.svg.clientWidth = c.svg.clientHeight = 0; c.draw(); return c.box") == {
        "left": 34,
        "right": 250,
        "top": 8,
        "bottom": 84,
    }
    assert run(page, "return styles") == 1  # Added once.


# ----------------------------------------------------------------------------
# Templates.


def test_our_templates_are_in_order_and_others_as_they_were():
    lists = {"a b": ["10_x", "02_y", "01_z"], "another pack": ["b", "a"]}
    listing = f"api.getWorkflowTemplates = () => Promise.resolve({json.dumps(lists)});"
    context = engine("templates.js", before=listing)
    context.eval("extensions[0].init()")
    listed = json.loads(context.eval("api.getWorkflowTemplates().then(JSON.stringify)").get())
    assert listed == {"a b": ["01_z", "02_y", "10_x"], "another pack": ["b", "a"]}
    older = engine("templates.js")
    older.eval("extensions[0].init()")
    assert older.eval("typeof api.getWorkflowTemplates") == "undefined"
