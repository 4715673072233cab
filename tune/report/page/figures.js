"use strict";
// Optuna's figures of a study, from its trials: the front, parallel coordinates, slices. `words` translates.

/** A logarithmic axis with room for an open end: positions, and ticks as people read them. missing: where null goes. */
function logAxis(values) {
  const finite = values.filter((v) => v > 0 && v !== null);
  const low = finite.length ? Math.min(...finite) : 1, high = finite.length ? Math.max(...finite) : 1;
  const ends = {zero: Math.log10(low) - 0.35, open: Math.log10(high) + 0.35};
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const lead of high / low > 30 ? [1, 3] : [1, 2, 5]) {
      const value = lead * 10 ** power;
      if (value >= low * 0.9 && value <= high * 1.1) ticks.push([Math.log10(value), String(Number(value.toPrecision(1)))]);
    }
  }
  if (values.includes(0)) ticks.unshift([ends.zero, "0"]);
  if (values.includes(null)) ticks.push([ends.open, "∞"]);
  return {
    at: values.map((v) => (v === null ? ends.open : v <= 0 ? ends.zero : Math.log10(v))),
    tickvals: ticks.map((t) => t[0]),
    ticktext: ticks.map((t) => t[1]),
  };
}

/** Colours of the page, so that a figure follows light and dark. */
function figureColours() {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["text", "muted", "line", "panel", "blue", "orange"].map((name) =>
    [name, style.getPropertyValue(`--${name}`).trim()]));
}

function figureLayout(colours, more) {
  const axis = {gridcolor: colours.line, linecolor: colours.line, zeroline: false, automargin: true};
  return {
    font: {family: getComputedStyle(document.body).fontFamily, size: 13, color: colours.text},
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: {l: 60, r: 20, t: 20, b: 60}, hovermode: "closest",
    hoverlabel: {bgcolor: colours.panel, font: {color: colours.text}}, dragmode: false, ...more,
    xaxis: {...axis, ...more.xaxis}, yaxis: {...axis, ...more.yaxis},
    ...Object.fromEntries(Object.entries(more).filter(([k]) => /^[xy]axis\d/.test(k)).map(([k, v]) => [k, {...axis, ...v}])),
  };
}

const FIGURE_CONFIG = {
  responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"],
  ...(matchMedia("(hover: none)").matches ? {displayModeBar: false} : {}),  // There it would always hide the figure.
};

/** Lengths of the error bars of [value, low, high]s; none where an end is open. */
function errorBars(list, colour) {
  const length = (v, end, sign) => (v[end] === null || v[end] === undefined ? 0 : Math.max(0, sign * (v[end] - v[0])));
  return {type: "data", symmetric: false, array: list.map((v) => length(v, 2, 1)),
    arrayminus: list.map((v) => length(v, 1, -1)), color: colour, thickness: 1, width: 3};
}

/** All trials by two metrics, those of the front marked, and where the confirmation found the chosen ones. */
function frontFigure(study, x, y, words) {
  const colours = figureColours();
  const trials = study.trials.filter((t) => t.state === "complete" && t.values[x] && t.values[y]);
  const points = (list, more) => ({
    x: list.map((t) => t.values[x][0]), y: list.map((t) => t.values[y][0]), text: list.map(words.trial),
    hovertemplate: "%{text}<extra></extra>", mode: "markers", ...more,
  });
  const front = trials.filter((t) => t.front), starts = trials.filter((t) => t.label);
  const chosen = study.settings.filter((s) => s.search[x] && s.search[y] && s.confirmed[x] && s.confirmed[y]);
  const confirmed = (s, key) => s.confirmed[key].value;
  const data = [
    points(trials.filter((t) => !t.front), {name: words.t("figure.tried"),
      marker: {color: colours.muted, symbol: "circle-open", size: 8}}),
    points(front, {name: words.t("figure.front"), marker: {color: colours.blue, symbol: "diamond", size: 10},
      error_x: errorBars(front.map((t) => t.values[x]), colours.blue),
      error_y: errorBars(front.map((t) => t.values[y]), colours.blue)}),
    {x: chosen.flatMap((s) => [s.search[x][0], confirmed(s, x)[0], null]), hoverinfo: "skip", showlegend: false,
      y: chosen.flatMap((s) => [s.search[y][0], confirmed(s, y)[0], null]), mode: "lines",
      line: {color: colours.orange, width: 1.5, dash: "dot"}},
    {x: chosen.map((s) => confirmed(s, x)[0]), y: chosen.map((s) => confirmed(s, y)[0]), mode: "markers",
      name: words.t("figure.confirmed"), text: chosen.map(words.setting), hovertemplate: "%{text}<extra></extra>",
      marker: {color: colours.orange, symbol: "star", size: 13},
      error_x: errorBars(chosen.map((s) => confirmed(s, x)), colours.orange),
      error_y: errorBars(chosen.map((s) => confirmed(s, y)), colours.orange)},
    points(starts, {mode: "text", text: starts.map((t) => `${words.label(t.label)}<br> `), textposition: "top center",
      textfont: {size: 11, color: colours.text}, hoverinfo: "skip", hovertemplate: null, showlegend: false,
      cliponaxis: false}),
  ];
  return {data, layout: figureLayout(colours, {
    height: 440, legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0},
    xaxis: {title: {text: words.metric(x)}}, yaxis: {title: {text: words.metric(y)}}, margin: {l: 60, r: 20, t: 50, b: 60},
  })};
}

const PARAMETERS = ["sigma_lo", "sigma_hi", "weight"];

function parameterAxis(trials, name) {
  const values = trials.map((t) => t[name]);
  if (name !== "weight") return logAxis(values);
  return {at: values, tickvals: undefined, ticktext: undefined};
}

/** Every complete trial as a line through its bounds, weight and metrics, coloured by one metric. */
function parallelFigure(study, key, words) {
  const colours = figureColours();
  const trials = study.trials.filter((t) => t.state === "complete" && t.values[key]);
  const dimensions = PARAMETERS.map((name) => {
    const axis = parameterAxis(trials, name);
    return {label: words.parameter(name), values: axis.at,
      ...(axis.tickvals ? {tickvals: axis.tickvals, ticktext: axis.ticktext} : {})};
  });
  const wanted = [...study.objective.minimize, ...study.objective.maximize, study.objective.bound?.metric];
  for (const metric of study.metrics.filter((m) => m.key === key || wanted.includes(m.key))) {
    if (trials.every((t) => t.values[metric.key])) {
      dimensions.push({label: words.short(metric.key), values: trials.map((t) => t.values[metric.key][0])});
    }
  }
  const font = {color: colours.text, size: 12};
  return {data: [{
    type: "parcoords", dimensions, labelfont: font, tickfont: font, rangefont: {...font, size: 10},
    line: {color: trials.map((t) => t.values[key][0]), colorscale: "Cividis", showscale: true,
      colorbar: {title: {text: words.short(key), side: "right"}, thickness: 14}},
    labelangle: 0,
  }], layout: figureLayout(colours, {height: 420, margin: {l: 70, r: 30, t: 60, b: 30}})};
}

/** One metric over each parameter; the colour is the trial's number, as in Optuna. */
function sliceFigure(study, key, words) {
  const colours = figureColours();
  const trials = study.trials.filter((t) => t.state === "complete" && t.values[key]);
  const layout = {height: 380, showlegend: false, grid: {rows: 1, columns: PARAMETERS.length, pattern: "independent"}};
  const narrow = document.documentElement.clientWidth < 700;
  if (narrow) Object.assign(layout, {height: 900, grid: {rows: PARAMETERS.length, columns: 1, pattern: "independent"}});
  const data = PARAMETERS.map((name, i) => {
    const axis = parameterAxis(trials, name), n = i ? String(i + 1) : "";
    layout[`xaxis${n}`] = {title: {text: words.parameter(name)},
      ...(axis.tickvals ? {tickvals: axis.tickvals, ticktext: axis.ticktext} : {})};
    layout[`yaxis${n}`] = {title: {text: narrow || !i ? words.metric(key) : ""}, matches: i ? "y" : undefined};
    return {
      x: axis.at, y: trials.map((t) => t.values[key][0]), xaxis: `x${n}`, yaxis: `y${n}`, mode: "markers",
      text: trials.map(words.trial), hovertemplate: "%{text}<extra></extra>",
      marker: {size: 9, symbol: trials.map((t) => (t.front ? "diamond" : "circle")), line: {width: 1, color: colours.text},
        color: trials.map((t) => t.number), colorscale: "Cividis", showscale: i === PARAMETERS.length - 1,
        colorbar: {title: {text: words.t("figure.number"), side: "right"}, thickness: 14}},
    };
  });
  return {data, layout: figureLayout(colours, {...layout, margin: {l: 70, r: 20, t: 20, b: 60}})};
}
