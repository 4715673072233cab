// The live picture under the inputs of the interval nodes: what the run of this graph will be, and what the last was.
//
// Where anything is missing (the route, the strings, an API of the front end) the nodes stay as they are.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Chart } from "./live_chart.js";
import { toPrompt } from "./live_prompt.js";

const TYPES = new Set([
  "GuidanceInterval",
  "GuidanceIntervalPercent",
  "GuidanceIntervalSteps",
  "GuidanceIntervalPreset",
  "GuidanceIntervalGuider",
]);
const WIDGET = "guidance_interval_live";
const SETTING = "GuidanceInterval.Live";
const HEIGHT = 172;
const FAR = 0.5; // Zoom below which text is too small to read.
// Milliseconds. No event of the front end tells of every change (a link, a bypass, a value that an extension sets).
const LOOK = 250;
const BUSY = new Set([409, 503]); // The server has something newer to answer, or too much.

const views = new Map(); // Node -> View.
const gone = new Map(); // "graph:node id" -> the element of a node that was removed, and which edge had the focus.
const runs = new Map(); // "workflow/execution id" -> Map of sampler id -> what the server said of its last run.
let strings = null;

class View {
  constructor(node) {
    this.node = node;
    this.asked = null;
    this.chart = new Chart({
      say: (data) => describe(data),
      movable: (name) => Boolean(this.widget(name)) && !this.linked(name),
      set: (name, value) => this.set(name, value),
      begin: () => app.canvas?.emitBeforeChange?.(),
      end: () => app.canvas?.emitAfterChange?.(),
      wheel: (event) => app.canvas?.processMouseWheel?.(event),
    });
    this.chart.element.setAttribute("aria-label", strings.title);
    const options = {
      serialize: false,
      hideOnZoom: false,
      margin: 6,
      getMinHeight: () => HEIGHT,
      getValue: () => "",
      setValue: () => {},
    };
    const widget = node.addDOMWidget(WIDGET, "guidance_interval_live", this.chart.element, options);
    widget.serialize = false; // Neither in a workflow nor in a prompt.
  }

  widget(name) {
    return this.node.widgets?.find((w) => w.name === name);
  }

  linked(name) {
    return this.node.inputs?.some((i) => i.widget?.name === name && i.link != null);
  }

  set(name, value) {
    const widget = this.widget(name);
    if (!widget) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
    this.node.setDirtyCanvas?.(true, true);
  }

  /** What is being asked is not needed any more. */
  abort() {
    this.asking?.abort();
  }

  async ask(prompt, id) {
    const question = JSON.stringify({ prompt, node: id, client: api.clientId ?? "" });
    if (question === this.asked) return;
    this.asked = question;
    this.abort();
    if (id === null) return this.chart.show({ error: strings.off });
    this.chart.old(!this.chart.drag);
    const { signal } = (this.asking = new AbortController());
    try {
      const response = await api.fetchApi("/guidance_interval/forecast", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: question,
        signal,
      });
      const data = await response.json();
      if (question !== this.asked) return; // A later one is under way.
      if (BUSY.has(response.status)) {
        this.asked = null; // To ask again.
        return;
      }
      if (!response.ok) throw new Error(data.error);
      if (this.chart.drag) data.band = this.chart.data.band;
      this.chart.show(data);
    } catch (error) {
      if (signal.aborted) return;
      warn(error);
      if (question === this.asked && !this.chart.data) this.chart.show({ error: strings.failed });
    } finally {
      if (question === this.asked) this.chart.old(false);
    }
  }
}

// ---------------------------------------------------------------------------
// Words.

function fill(template, values) {
  return template.replace(/\{(\w+)\}/g, (_, key) => values[key] ?? "");
}

function percent(value) {
  return fill(strings.percent, { value });
}

function describe(data) {
  if (data.error) return { line: data.failed ? strings.failed : data.error, edge: {} };
  const { steps, guided, saved } = data;
  const cost =
    saved === undefined
      ? ""
      : saved > 0
        ? fill(strings.fewer, { share: percent(saved) })
        : saved < 0
          ? fill(strings.more, { share: percent(-saved) })
          : strings.same;
  const nothing = { cfg: strings.cfg_is_1, guider: strings.no_uncond, steps: strings.no_steps }[data.nothing];
  const line = nothing ?? fill(cost ? strings.line : strings.steps, { guided, steps, cost });
  const assumptions = data.notes.map(([code, value]) => fill(strings.notes[code] ?? code, { value }));
  const what = [data.sampler, data.scheduler].filter(Boolean).join(", ");
  const [low, high] = data.bounds;
  const bounds = { low: low === null ? "∞" : number(low), high: high === null ? "∞" : number(high) };
  return {
    line,
    note: [what, ...assumptions].join(strings.separator),
    alternative: fill(strings.alternative, { ...bounds, line, what }),
    large: nothing ? "−" : saved > 0 ? `−${percent(saved)}` : `${guided}/${steps}`,
    edge: { lo: strings.lower, hi: strings.upper },
  };
}

function number(value) {
  return String(Number(value.toPrecision(3)));
}

/** What the last prompt's runs were, the one of the sampler that is shown first; `of` it is [{sampler, count, ...}]. */
function describeRuns(of, shown) {
  const first = (run) => (run.sampler === shown ? 0 : 1);
  const sorted = [...of].sort((a, b) => first(a) - first(b));
  return sorted
    .map((run) => {
      const line = describeRun(run);
      const several = run.count > 1 ? fill(strings.last_of, { count: run.count, line }) : line;
      return sorted.length > 1 || (shown != null && run.sampler !== shown)
        ? fill(strings.of_sampler, { sampler: run.sampler, line: several })
        : several;
    })
    .join("\n");
}

/** Keep what the server said of a run: of one prompt, the last of each sampler, and how many there were. */
function noteRun(of, run) {
  const key = run.sampler ?? "";
  const before = of.get(key);
  const same = run.prompt != null && before?.prompt === run.prompt;
  if ([...of.values()].some((other) => other.prompt !== run.prompt)) of.clear();
  of.set(key, { ...run, count: same ? before.count + 1 : 1 });
}

function describeRun(run) {
  const seconds = (s) => s.toFixed(s < 10 ? 2 : 0);
  const share = run.rows_cfg ? Math.round(100 * (1 - run.rows / run.rows_cfg)) : 0;
  const values = { rows: run.rows, cfg: run.rows_cfg, seconds: seconds(run.seconds), share: percent(share) };
  if (run.left) {
    const [code, value] = run.left;
    return fill(strings.ran_left, { ...values, why: fill(strings.left[code] ?? code, { value }) });
  }
  if (run.seconds_cfg == null) return fill(run.rows_cfg ? strings.ran_rows : strings.ran, values);
  return fill(strings.ran_all, { ...values, cfg_seconds: seconds(run.seconds_cfg) });
}

async function load() {
  const response = await api.fetchApi("/i18n");
  const all = await response.json();
  const locale = app.ui?.settings?.getSettingValue?.("Comfy.Locale") ?? "en";
  const of = (name) => all[name]?.guidanceInterval;
  const english = of("en");
  const own = of(locale) ?? {};
  const both = (key) => ({ ...english[key], ...own[key] });
  return { ...english, ...own, notes: both("notes"), left: both("left") };
}

// ---------------------------------------------------------------------------
// Looking.

function look() {
  if (document.hidden || !views.size) return;
  const root = app.graph?.rootGraph ?? app.graph;
  if (!root) return;
  const { prompt, ids } = toPrompt(root, TYPES);
  for (const [node, view] of views) {
    if (!node.graph) continue; // Being made, or kept for an undo.
    view.chart.far((app.canvas?.ds?.scale ?? 1) < FAR);
    const id = ids.get(node);
    if (id === undefined) continue;
    view.place = placeOf(node);
    settle(view);
    view.ask(prompt, id);
    const of = runs.get(`${root.id}/${id}`);
    view.chart.showRun(of ? describeRuns(of.values(), view.chart.data?.sampler_id) : "");
  }
}

const placeOf = (node) => `${node.graph?.id}:${node.id}`;

/** Vue nodes keep the element of a widget that an undo has made anew: the new one takes its place. */
function settle(view) {
  const before = gone.get(view.place);
  if (!before) return;
  gone.delete(view.place);
  if (before.element.isConnected && !view.chart.element.isConnected) before.element.replaceWith(view.chart.element);
  view.chart.focusNext = before.edge;
}

function grow(node) {
  const size = node.computeSize?.();
  if (size && node.size[1] < size[1]) node.setSize([node.size[0], size[1]]);
}

let warned = false;

function warn(error) {
  if (!warned) console.warn("Guidance Interval: no picture:", error);
  warned = true;
}

function safely(fn) {
  try {
    fn();
  } catch (error) {
    warn(error);
  }
}

app.registerExtension({
  name: "GuidanceInterval.Live",
  settings: [
    {
      id: SETTING,
      name: "Show the live picture on Guidance Interval nodes",
      category: ["Guidance Interval", "Nodes", "Live"],
      type: "boolean",
      defaultValue: true,
      tooltip: "Takes effect when a workflow is opened.",
    },
  ],
  async setup() {
    api.addEventListener("guidance_interval.run", ({ detail }) => {
      const root = app.graph?.rootGraph ?? app.graph;
      const key = `${detail.workflow ?? root?.id}/${detail.node}`;
      if (!runs.has(key)) runs.set(key, new Map());
      noteRun(runs.get(key), detail);
    });
    setInterval(() => safely(look), LOOK);
  },
  async init() {
    try {
      strings = await load();
    } catch (error) {
      warn(error);
    }
  },
  nodeCreated(node) {
    if (!TYPES.has(node.comfyClass) || !strings?.line || !node.addDOMWidget) return;
    if (app.ui?.settings?.getSettingValue?.(SETTING) === false) return;
    safely(() => {
      const view = new View(node);
      views.set(node, view);
      const configured = node.onConfigure;
      node.onConfigure = function (...args) {
        const result = configured?.apply(this, args);
        grow(this); // Workflows of before have nodes without room for it.
        return result;
      };
      const removed = node.onRemoved;
      node.onRemoved = function (...args) {
        views.delete(node);
        view.abort();
        gone.set(view.place ?? placeOf(node), { element: view.chart.element, edge: view.chart.lately() });
        view.chart.remove();
        return removed?.apply(this, args);
      };
    });
  },
});
