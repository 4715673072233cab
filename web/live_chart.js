// The picture: a schedule, its guided band with two edges to drag, and lines of text. It draws what the server says
// (coordinates from 0 to 1) and hands on what the user does; of noise it knows nothing.

const MARGIN = { left: 34, right: 10, top: 8, bottom: 6 };
const SVG = "http://www.w3.org/2000/svg";

const STYLE = `
div:has(> .gi-live) { pointer-events: none !important; }
.gi-live { --gi-ink: #222; --gi-soft: #5a5a5a; --gi-grid: #0002; --gi-line: #777; --gi-guided: #0072b2;
  --gi-paper: #fff; display: flex; flex-direction: column; gap: 2px; width: 100%; height: 100%; min-height: 160px;
  box-sizing: border-box; padding: 4px 6px; overflow: hidden; pointer-events: none; user-select: none;
  border-radius: 6px;
  background: var(--gi-paper);
  color: var(--gi-ink); font: 11px/1.35 Inter, Arial, "Noto Sans CJK JP", sans-serif; }
.dark-theme .gi-live { --gi-ink: #eee; --gi-soft: #b4b4b4; --gi-grid: #fff2; --gi-line: #999; --gi-guided: #56b4e9;
  --gi-paper: #1b1c1e; }
.gi-live svg { flex: 1 1 0; min-height: 40px; width: 100%; display: block; overflow: visible; touch-action: none; }
.gi-live text { fill: var(--gi-soft); font-size: 10px; }
.gi-live .grid { stroke: var(--gi-grid); }
.gi-live .curve { fill: none; stroke: var(--gi-line); stroke-width: 1.5; }
.gi-live .band { fill: var(--gi-guided); fill-opacity: .17; }
.gi-live .dot { fill: var(--gi-paper); stroke: var(--gi-line); stroke-width: 1.5; }
.gi-live .dot.guided { fill: var(--gi-guided); stroke: var(--gi-guided); }
.gi-live .edge line { stroke: var(--gi-guided); stroke-width: 1.5; }
.gi-live .edge.fixed line { stroke-dasharray: 4 3; }
.gi-live .edge .grip { fill: var(--gi-guided); stroke: var(--gi-paper); stroke-width: 1.5; }
.gi-live .edge .area { fill: transparent; pointer-events: all; cursor: ns-resize; touch-action: none; }
.gi-live .edge:focus { outline: none; }
.gi-live .edge:focus-visible line { stroke-width: 3; }
.gi-live .edge:focus-visible .grip { stroke: var(--gi-ink); }
.gi-live .say { font-size: 12px; font-weight: 600; }
.gi-live .note, .gi-live .ran { color: var(--gi-soft); }
.gi-live .say, .gi-live .note, .gi-live .ran { flex: none; white-space: pre-line; }
.gi-live .say:empty, .gi-live .note:empty, .gi-live .ran:empty { display: none; }
.gi-live .large { display: none; fill: var(--gi-ink); font-size: 40px; font-weight: 700; text-anchor: middle; }
.gi-live.far .large { display: block; }
.gi-live.far .tick, .gi-live.far .grip, .gi-live.far .dot, .gi-live.far .say, .gi-live.far .note, .gi-live.far .ran
  { display: none; }
.gi-live.far .curve { stroke-width: 4; } .gi-live.far .edge line { stroke-width: 4; }
.gi-live.old svg { opacity: .55; }
`;

export class Chart {
  /**
   * actions: say(data) -> {line, note, alternative, large, edge: {lo, hi}}, the words for an answer of the server;
   * movable(widget name); set(widget name, value), between begin() and end(), which make it one undo; wheel(event).
   */
  constructor(actions) {
    addStyle();
    this.actions = actions;
    this.data = null;
    this.drag = null;
    this.element = document.createElement("div");
    this.element.className = "gi-live";
    this.element.setAttribute("role", "group");
    this.svg = create("svg", {}, this.element);
    this.line = text("say", this.element);
    this.line.setAttribute("aria-live", "polite");
    this.note = text("note", this.element);
    this.ran = text("ran", this.element);
    this.left = { side: undefined, at: -Infinity }; // The edge that last lost the focus, and when.
    this.svg.addEventListener("focusout", (e) => {
      this.left = { side: e.target.dataset.giEdge, at: performance.now() };
    });
    this.observer = new ResizeObserver(() => this.draw());
    this.observer.observe(this.svg);
  }

  remove() {
    this.observer.disconnect();
  }

  far(yes) {
    this.element.classList.toggle("far", yes);
  }

  /** A forecast is under way: what is shown is of the last one. */
  old(yes) {
    this.element.classList.toggle("old", yes);
  }

  show(data) {
    this.data = data;
    this.draw();
  }

  showRun(line) {
    this.ran.textContent = line ?? "";
  }

  draw() {
    const { data } = this;
    if (!data) return;
    const words = this.actions.say(data);
    this.line.textContent = words.line;
    this.note.textContent = words.note ?? "";
    this.svg.style.display = data.error ? "none" : "";
    if (data.error) return;
    const width = this.svg.clientWidth || 260;
    const height = this.svg.clientHeight || 90;
    this.box = { left: MARGIN.left, right: width - MARGIN.right, top: MARGIN.top, bottom: height - MARGIN.bottom };
    const x = (v) => this.box.left + 6 + v * (this.box.right - this.box.left - 12);
    const y = (v) => this.box.bottom - v * (this.box.bottom - this.box.top);
    const focused = this.focused();
    const picture = create("g", { role: "img", "aria-label": words.alternative });
    const [low, high] = this.bandNow();
    create(
      "rect",
      {
        class: "band",
        x: this.box.left,
        width: Math.max(this.box.right - this.box.left, 0),
        y: y(high),
        height: Math.max(y(low) - y(high), 0),
      },
      picture,
    );
    for (const [at, sigma] of data.ticks) {
      create("line", { class: "grid", x1: this.box.left, x2: this.box.right, y1: y(at), y2: y(at) }, picture);
      create(
        "text",
        { class: "tick", x: this.box.left - 4, y: y(at) + 3.5, "text-anchor": "end" },
        picture,
      ).textContent = short(sigma);
    }
    const steps = data.points.filter((p) => p[3]);
    const last = data.end > 0 ? [[1, data.end]] : [];
    const path = [...steps, ...last].map(([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`).join(" ");
    create("polyline", { class: "curve", points: path }, picture);
    const radius = Math.max(1.2, Math.min(4, (0.42 * (this.box.right - this.box.left)) / Math.max(steps.length, 1)));
    for (const [px, py, wasGuided, isStep] of data.points) {
      const guided = this.drag ? py > low && py <= high : wasGuided; // Until the server has said it.
      create(
        "circle",
        { class: guided ? "dot guided" : "dot", cx: x(px), cy: y(py), r: isStep ? radius : radius * 0.6 },
        picture,
      );
    }
    create("text", { class: "large", x: width / 2, y: height / 2 + 14 }, picture).textContent = words.large ?? "";
    this.svg.replaceChildren(picture);
    for (const side of ["hi", "lo"]) this.drawEdge(side, side === "hi" ? high : low, y, words.edge[side]);
    if (focused) this.focus(focused);
    if (!this.focusNext) return;
    if (document.activeElement === document.body) this.focus(this.focusNext);
    if (document.activeElement !== document.body) this.focusNext = null; // Else it is not visible yet.
  }

  /** The edge that has the focus: "lo", "hi" or undefined. */
  focused() {
    const { activeElement } = document;
    return this.svg.contains(activeElement) ? activeElement.dataset.giEdge : undefined;
  }

  /** The same, when the element may just have been taken off the page. */
  lately() {
    return this.focused() ?? (performance.now() - this.left.at < 500 ? this.left.side : undefined);
  }

  focus(side) {
    this.svg.querySelector(`[data-gi-edge=${side}]`)?.focus({ preventScroll: true });
  }

  bandNow() {
    const [low, high] = this.data.band;
    if (this.drag?.side === "lo") return [this.drag.y, high];
    if (this.drag?.side === "hi") return [low, this.drag.y];
    return [low, high];
  }

  drawEdge(side, at, y, label) {
    const edge = this.data.edges?.[side];
    const movable = edge && this.actions.movable(edge.widget);
    const group = create("g", { class: movable ? "edge" : "edge fixed", transform: `translate(0 ${y(at)})` }, this.svg);
    create("line", { x1: this.box.left, x2: this.box.right }, group);
    if (!movable) return;
    const coarse = matchMedia("(pointer: coarse)").matches ? 16 : 8;
    create("rect", { class: "grip", x: this.box.right - 22, width: 18, y: -5, height: 10, rx: 5 }, group);
    const area = create(
      "rect",
      {
        class: "area",
        x: this.box.left,
        width: Math.max(this.box.right - this.box.left, 0),
        y: -coarse,
        height: 2 * coarse,
      },
      group,
    );
    group.dataset.giEdge = side;
    group.setAttribute("tabindex", "0");
    group.setAttribute("role", "slider");
    group.setAttribute("aria-orientation", "vertical");
    group.setAttribute("aria-label", label);
    const now = nearest(edge.stops, at);
    group.setAttribute("aria-valuemin", 0);
    group.setAttribute("aria-valuemax", edge.stops.length - 1);
    group.setAttribute("aria-valuenow", now);
    group.setAttribute("aria-valuetext", String(this.drag?.side === side ? this.drag.value : edge.value));
    group.addEventListener("keydown", (e) => this.key(e, side));
    area.addEventListener("pointerdown", (e) => this.press(e, side));
    area.addEventListener("wheel", (e) => this.actions.wheel(e), { passive: false });
  }

  /** The stops of an edge that leave something between it and the other one. */
  allowed(side) {
    const other = this.data.band[side === "lo" ? 1 : 0];
    return this.data.edges[side].stops.filter(([at]) => (side === "lo" ? at < other - 1e-9 : at > other + 1e-9));
  }

  press(event, side) {
    if (event.button !== 0 || this.drag) return;
    event.preventDefault();
    event.stopPropagation();
    const stops = this.allowed(side);
    if (!stops.length) return;
    const edge = this.data.edges[side];
    this.drag = { side, y: this.data.band[side === "lo" ? 0 : 1], value: edge.value };
    this.actions.begin();
    const place = (e) => {
      const box = this.svg.getBoundingClientRect(); // Scaled with the canvas.
      const scale = box.height / (this.svg.clientHeight || 1);
      const at = (this.box.bottom - (e.clientY - box.top) / scale) / (this.box.bottom - this.box.top);
      const [y, value] = stops[nearest(stops, at)];
      if (value === this.drag.value) return;
      Object.assign(this.drag, { y, value });
      this.actions.set(edge.widget, value);
      this.draw();
    };
    // On the window: the drawing, and the element under the pointer with it, is replaced at every move.
    const move = (e) => e.pointerId === event.pointerId && place(e);
    const stop = (e) => {
      if (e.pointerId !== event.pointerId) return;
      for (const [kind, fn] of [
        ["pointermove", move],
        ["pointerup", stop],
        ["pointercancel", stop],
      ]) {
        window.removeEventListener(kind, fn, true);
      }
      this.data.band[side === "lo" ? 0 : 1] = this.drag.y;
      this.data.edges[side].value = this.drag.value; // Of the answer that is shown by now.
      this.drag = null;
      this.actions.end();
      this.draw();
      this.focus(side);
    };
    window.addEventListener("pointermove", move, true);
    window.addEventListener("pointerup", stop, true);
    window.addEventListener("pointercancel", stop, true);
  }

  key(event, side) {
    const stride = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 }[event.key];
    if ((!stride && event.key !== "Home" && event.key !== "End") || event.ctrlKey || event.metaKey || event.altKey)
      return;
    event.preventDefault();
    event.stopPropagation();
    const stops = this.allowed(side);
    if (!stops.length) return;
    const index = side === "lo" ? 0 : 1;
    const at = this.data.band[index];
    let to;
    if (event.key === "Home") to = 0;
    else if (event.key === "End") to = stops.length - 1;
    else {
      const above = stops.findIndex((s) => s[0] > at + 1e-9);
      const below = stops.findLastIndex((s) => s[0] < at - 1e-9);
      const first = stride > 0 ? (above < 0 ? stops.length - 1 : above) : below < 0 ? 0 : below;
      to = Math.min(Math.max(first + stride - Math.sign(stride), 0), stops.length - 1);
    }
    const [y, value] = stops[to];
    this.actions.begin();
    this.actions.set(this.data.edges[side].widget, value);
    this.actions.end();
    this.data.band[index] = y;
    this.data.edges[side].value = value;
    this.draw();
  }
}

function nearest(stops, at) {
  let best = 0;
  for (let i = 1; i < stops.length; i++) if (Math.abs(stops[i][0] - at) < Math.abs(stops[best][0] - at)) best = i;
  return best;
}

function short(value) {
  return value >= 1e5 || value < 1e-3 ? value.toExponential(0) : String(Number(value.toPrecision(2)));
}

function create(name, attributes, parent) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent?.append(element);
  return element;
}

function text(name, parent) {
  const element = document.createElement("div");
  element.className = name;
  parent.append(element);
  return element;
}

function addStyle() {
  if (document.getElementById("gi-live-style")) return;
  const style = document.createElement("style");
  style.id = "gi-live-style";
  style.textContent = STYLE;
  document.head.append(style);
}
