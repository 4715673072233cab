"use strict";
// The page: start, vote, answer, report. One of them is in the document at a time, so that none tells of another.

const STRINGS = JSON.parse(document.getElementById("strings").textContent);
const IMAGES = JSON.parse(document.getElementById("images").textContent);
const STUDY = JSON.parse(unsealed(document.getElementById("sealed").textContent));
const RIVALS = STUDY.settings.slice(1);
const EXACT = STUDY.shown.format === "PNG";
const STORE = `guidance-interval-votes:${STUDY.id}`;

const state = {
  language: document.documentElement.lang, view: "start", ballots: [], current: null, setting: RIVALS[0]?.id ?? null,
  read: false,  // Whether the report has been open: votes from then on are not blind.
  exported: true,
};

/** What `seal` of report.py enciphered, as text. */
function unsealed(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  let x = new DataView(bytes.buffer).getUint32(0, true);
  const data = bytes.subarray(4);
  for (let i = 0; i < data.length; i++) {
    x ^= x << 13;
    x ^= x >>> 17;
    x ^= x << 5;
    data[i] ^= x & 0xff;
  }
  return new TextDecoder().decode(data);
}

// ----------------------------------------------------------------------------
// Words and numbers.

/** The sentence of a key in the page's language, with its {names} filled in. */
function t(key, values = {}) {
  return STRINGS[state.language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

function tOr(key, otherwise) {
  return STRINGS[state.language][key] ?? otherwise;
}

function number(value, digits, signed = false) {
  if (value === null || value === undefined) return "–";
  const text = new Intl.NumberFormat(state.language, {
    minimumFractionDigits: digits, maximumFractionDigits: digits, signDisplay: signed ? "exceptZero" : "negative",
  }).format(value);
  return text.replace("-", "−");
}

const plain = (value) => (value === null ? "∞" : String(Number(value.toPrecision(4))));
const percent = (share) => `${number(100 * share, 0)} %`;
const metricOf = (key) => STUDY.metrics.find((m) => m.key === key);
const metricName = (key) => tOr(`name.${metricOf(key).name}`, metricOf(key).name);  // English is the study's own.
const shortName = (key) => tOr(`short.${key}`, metricName(key));
const list = (parts) => new Intl.ListFormat(state.language, {type: "conjunction"}).format(parts);

function labelText(label) {
  if (label.startsWith("preset ")) return t("label.preset", {name: label.slice(7)});
  return tOr(`label.${label}`, label);
}

/** What is set: "(0.1, 3.5], weight 2.5", or in a sentence "The guidance interval (0.1, 3.5] with weight 2.5". */
function bounds(s, sentence = false) {
  if (s.label === "conditional only") return labelText(s.label);
  const weight = plain(s.weight), end = s.sigma_hi === null ? "∞)" : `${plain(s.sigma_hi)}]`;
  if (s.sigma_lo === 0 && s.sigma_hi === null) return t("bounds", {where: t("everywhere"), weight});
  return t(sentence ? "bounds.sentence" : "bounds", {where: `(${plain(s.sigma_lo)}, ${end}`, weight});
}

function rankText(setting) {
  const place = RIVALS.indexOf(setting);
  return place < 0 ? t("baseline") : t(`rank.${Math.min(place, 3)}`);
}

/** A setting in a sentence or over a column. */
function settingName(setting) {
  if (setting === STUDY.settings[0]) return t("baseline");
  return bounds(setting);
}

/** A setting in full: its rank, what is set, and the label that it was tried under. */
function settingTitle(setting) {
  const preset = setting.label.startsWith("preset ") ? `${labelText(setting.label)}: ` : "";
  return t("setting.title", {rank: rankText(setting), bounds: preset + bounds(setting)});
}

/** What was tuned, and where: "txt2img.json (ComfyUI)". */
const origin = () => (STUDY.source === STUDY.host ? STUDY.source : `${STUDY.source} (${STUDY.host})`);
const seedOf = (index) => STUDY.image_seeds?.[index] ?? STUDY.seeds[index % STUDY.seeds.length];
const promptOf = (index) => STUDY.prompts[Math.floor(index / STUDY.seeds.length)];

// ----------------------------------------------------------------------------
// The document.

/** An element with attributes (on… are listeners) and children; false, null and undefined are left out. */
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== false && c !== null && c !== undefined));
  return element;
}

const button = (key, onclick, more = {}) => h("button", {type: "button", onclick, ...more}, t(key));

function picture(setting, index, alt) {
  const [src, width, height] = IMAGES[setting.images[index]];
  return h("img", {src, width, height, alt, class: EXACT ? "exact" : null});
}

/** A table whose cells know their column, for narrow screens; a cell is text, nodes, or {class, content}. */
function table(caption, head, rows) {
  const cell = (content, i) => {
    const {class: name, content: inner} = content?.content !== undefined ? content : {content};
    return i ? h("td", {"data-head": head[i], class: name}, h("span", {}, inner)) : h("th", {scope: "row", role: "rowheader"}, inner);
  };
  // The roles are those of a table: shown as cards, browsers would drop them.
  return h("div", {class: "table"}, h("table", {class: "cards", role: "table"}, h("caption", {}, caption),
    h("thead", {role: "rowgroup"}, h("tr", {role: "row"}, head.map((c) => h("th", {scope: "col", role: "columnheader"}, c)))),
    h("tbody", {role: "rowgroup"}, rows.map((row) => h("tr", {role: "row"}, row.map(cell))))));
}

/** Tell a reader, of a screen or by ear; quiet: only by ear, where it is to be seen anyway. */
function say(text, quiet = false) {
  const status = document.getElementById("status");
  status.className = quiet ? "quiet" : "";
  status.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => { status.textContent = ""; }, 5000);
}

/** Show a view from its top, and tell readers of screens by its heading. */
function show(view) {
  state.view = view;
  say("");
  render();
  window.scrollTo(0, 0);
  document.querySelector("main h1")?.focus();
}

const VIEWS = {start: startView, vote: voteView, answer: answerView, report: reportView};

function render() {
  document.documentElement.lang = state.language;
  document.getElementById("language-label").textContent = t("language");
  document.getElementById("language").value = state.language;
  document.getElementById("study").textContent = t("study", {name: STUDY.name});
  document.title = t("title", {name: STUDY.name});
  document.getElementById("main").replaceChildren(...VIEWS[state.view]());
  if (state.view === "report") drawFigures();
}

const heading = (text) => h("h1", {tabindex: -1}, text);

// ----------------------------------------------------------------------------
// What is kept in the browser, where it keeps anything for a file.

function save() {
  try {
    localStorage.setItem(STORE, JSON.stringify({ballots: state.ballots, read: state.read, language: state.language}));
  } catch { /* Private windows and some browsers: votes last until the page is closed, or exported. */ }
}

function restore() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "{}");
    state.ballots = checkedBallots(kept.ballots ?? [], STUDY);
    state.read = kept.read === true;
    if (kept.language in STRINGS) state.language = kept.language;
  } catch { /* As above, or damaged: begin anew. */ }
}

// ----------------------------------------------------------------------------
// Start.

function startView() {
  const images = STUDY.prompts.length * STUDY.seeds.length;
  const intro = [heading(t("start.heading", {name: STUDY.name})),
    h("p", {}, t("start.tuned", {origin: origin(), trials: STUDY.trials.length,
      images, prompts: STUDY.prompts.length, seeds: STUDY.seeds.length}))];
  if (!RIVALS.length) return [h("section", {class: "first"}, intro, h("p", {}, t("start.none")),
    h("p", {class: "row"}, button("start.report", openReport, {class: "main"})))];
  const open = state.ballots.filter((b) => !isDone(b)), done = state.ballots.filter(isDone);
  const voter = h("input", {id: "voter", autocomplete: "name", maxlength: 60, required: true, "aria-describedby": "voter-note"});
  const rule = h("p", {class: "small", id: "rule"});
  const counts = [10, 20, 40, 100].filter((n) => n < images).concat(images);
  const pairs = h("select", {id: "pairs", onchange: () => tellRule()}, counts.map((n) =>
    h("option", {value: n, selected: n === Math.min(20, images)}, n === images ? t("start.all", {n}) : String(n))));
  const tellRule = () => {
    const n = Number(pairs.value), k = needed(n);
    rule.textContent = k ? t("start.rule", {n, k}) : t("start.tooFew", {n});
  };
  tellRule();
  const setting = h("select", {id: "setting"}, RIVALS.map((s) =>
    h("option", {value: s.id, selected: s.id === state.setting}, t(`choice.${Math.min(RIVALS.indexOf(s), 3)}`))));
  const begin = (event) => {
    event.preventDefault();
    const name = voter.value.trim();
    if (!name) {
      voter.setAttribute("aria-invalid", "true");
      voter.focus();
      return say(t("start.nameMissing"));
    }
    const known = findBallot(state.ballots, name, setting.value);
    if (known && isDone(known)) return say(t("start.votedAlready", {voter: known.voter}));
    // Who has seen an answer knows images of the baseline.
    const blind = !state.ballots.some((b) => isDone(b) && sameVoter(b.voter, name));
    beginVote(known ?? {voter: name, setting: setting.value, pairs: Number(pairs.value), blind, votes: []});
  };
  return [h("section", {class: "first"}, intro,
    h("p", {}, t("start.why")),
    state.read && h("p", {}, t("start.read")),
    open.length > 0 && h("div", {class: "panel"}, h("h2", {}, t("start.goOn")), open.map((b) => h("p", {class: "row"},
      h("button", {type: "button", class: "main", onclick: () => beginVote(b)},
        t("start.continue", {voter: b.voter, done: b.votes.length, pairs: b.pairs}))))),
    h("form", {class: "panel", onsubmit: begin, novalidate: true}, h("h2", {}, t("start.vote")),
      h("div", {class: "fields"},
        h("label", {}, t("start.name"), voter), h("label", {}, t("start.pairs"), pairs),
        RIVALS.length > 1 && h("label", {}, t("start.setting"), setting)),
      h("p", {class: "small", id: "voter-note"}, t("start.nameNote")), rule,
      h("p", {class: "row"}, h("button", {type: "submit", class: "main"}, t("start.begin")))),
    h("p", {class: "row"}, importControl(), done.length > 0 && !open.length && button("start.answer", () => show("answer")),
      button("start.report", openReport)),
    h("p", {class: "small"}, t("start.report.note")))];
}

function beginVote(ballot) {
  if (!state.ballots.includes(ballot)) state.ballots.push(ballot);
  if (state.read && !isDone(ballot)) ballot.blind = false;
  state.current = ballot;
  state.setting = ballot.setting;
  save();
  show(isDone(ballot) ? "answer" : "vote");
}

function openReport() {
  state.read = true;
  save();
  show("report");
}

// ----------------------------------------------------------------------------
// Vote.

function voteView() {
  const ballot = state.current, pair = nextPair(STUDY, ballot), known = imagesByCode(STUDY);
  const {index} = known.get(pair[0]), done = ballot.votes.length;
  const sides = pair.map((code, side) => {
    const setting = STUDY.settings.find((s) => s.id === known.get(code).setting);
    const name = ["A", "B"][side];
    const image = picture(setting, index, t("vote.alt", {side: name}));
    image.addEventListener("click", () => vote(code));
    return h("figure", {}, image, h("button", {type: "button", class: "main", id: `choose-${name}`, onclick: () => vote(code)},
      t("vote.choose", {side: name}), " ", h("kbd", {class: "keys", "aria-hidden": "true"}, ["←", "→"][side])));
  });
  const [, width, height] = IMAGES[STUDY.settings[0].images[index]];
  const key = (text) => h("kbd", {class: "keys", "aria-hidden": "true"}, text);
  return [h("section", {class: EXACT ? "first vote narrow" : "first vote"},
    heading(t("vote.heading", {n: done + 1, pairs: ballot.pairs})),
    h("progress", {max: ballot.pairs, value: done, "aria-label": t("vote.progress", {done, pairs: ballot.pairs})}),
    h("p", {class: "prompt"}, promptOf(index)),
    h("p", {class: "small"}, t("vote.question")),
    h("div", {class: EXACT ? "pair small" : width >= height ? "pair stacked" : "pair"}, sides),
    h("p", {class: "row"},
      h("button", {type: "button", id: "choose-none", onclick: () => vote(null)}, t("vote.none"), " ", key("0")),
      h("button", {type: "button", id: "undo", disabled: !done, onclick: undo}, t("vote.undo"), " ", key("U"))),
    h("p", {class: "small keys"}, t("vote.keys")),
    h("p", {class: "row"}, button("vote.pause", () => show("start")), exportControl([ballot]),
      done > 0 && button("vote.stop", stop)))];
}

let lastVote = 0;

/** Choose an image by its code, or null for no difference. */
function vote(chosen) {
  const now = performance.now();
  if (state.view !== "vote" || now - lastVote < 120) return;  // A double click is one vote.
  lastVote = now;
  const focused = document.activeElement?.id;
  state.current.votes.push({shown: nextPair(STUDY, state.current), chosen});
  state.exported = false;
  save();
  if (isDone(state.current)) {
    show("answer");
    return say(t("vote.finished"));
  }
  render();
  afterVote(focused);
}

function undo() {
  if (state.view !== "vote" || !state.current.votes.length) return;
  const focused = document.activeElement?.id;
  state.current.votes.pop();
  state.exported = false;
  save();
  render();
  afterVote(focused);
}

/** The focus stays on the button that was pressed, for the next pair; the heading is read out. */
function afterVote(focused) {
  const target = (focused && document.getElementById(focused)) || document.querySelector("main h1");
  (target.disabled ? document.querySelector("main h1") : target).focus({preventScroll: true});
  say(`${document.querySelector("main h1").textContent}. ${document.querySelector(".prompt").textContent}`, true);
}

/** End a ballot before its last pair; what was cast counts. */
function stop() {
  if (!confirm(t("vote.stopQuestion", {done: state.current.votes.length, pairs: state.current.pairs}))) return;
  state.current.pairs = state.current.votes.length;
  save();
  show("answer");
}

document.addEventListener("keydown", (event) => {
  if (state.view !== "vote" || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("select, input, textarea, dialog")) return;
  const pair = nextPair(STUDY, state.current);
  const actions = {
    ArrowLeft: () => vote(pair[0]), a: () => vote(pair[0]), 1: () => vote(pair[0]),
    ArrowRight: () => vote(pair[1]), b: () => vote(pair[1]), 2: () => vote(pair[1]),
    0: () => vote(null), u: undo, Backspace: undo,
  };
  const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

// ----------------------------------------------------------------------------
// Votes as files.

function exportControl(ballots = null) {
  return button("votes.export", () => {
    const chosen = ballots ?? state.ballots;
    const name = [STUDY.name, "votes", ...(chosen.length === 1 ? [chosen[0].voter] : [])].join("-");
    const url = URL.createObjectURL(new Blob([votesFile(STUDY, chosen)], {type: "application/json"}));
    h("a", {href: url, download: `${name.replace(/[^\p{L}\p{N}._-]+/gu, "_")}.json`}).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
    state.exported = true;
  }, {class: "export"});
}

function importControl() {
  const input = h("input", {type: "file", accept: ".json,application/json", multiple: true, onchange: async () => {
    const said = [];
    for (const file of input.files) {
      try {
        const merged = mergeBallots(state.ballots, readVotes(await file.text(), STUDY));
        state.ballots.splice(0, Infinity, ...merged.ballots);
        said.push(...merged.said.map(([key, values]) => t(key, values)));
      } catch (error) {
        if (!(error instanceof VotesError)) throw error;
        said.push(t("import.refused", {file: file.name, reason: t(error.key, error.values)}));
      }
    }
    save();
    render();
    document.querySelector("main h1").after(h("div", {class: "panel", id: "imported", role: "status"},
      said.map((text) => h("p", {}, text))));
  }});
  return h("label", {class: "file"}, t("votes.import"), input);
}

window.addEventListener("beforeunload", (event) => {
  let kept = false;
  try { kept = localStorage.getItem(STORE) !== null; } catch { /* Not kept. */ }
  if (!kept && !state.exported) event.preventDefault();
});

// ----------------------------------------------------------------------------
// The answer.

function answerView() {
  const done = state.ballots.filter(isDone);
  return [h("section", {class: "first"}, heading(t("answer.heading")), answer(done),
    h("p", {class: "row"}, button("answer.report", openReport, {class: "main"}), exportControl(), importControl(),
      button("answer.another", () => show("start"))))];
}

/** What finished ballots say of the chosen setting. */
function answer(done) {
  const voted = RIVALS.filter((s) => done.some((b) => b.setting === s.id));
  if (!voted.length) return h("p", {}, t("answer.nothing"));
  const setting = voted.find((s) => s.id === state.setting) ?? voted[0];
  const own = done.filter((b) => b.setting === setting.id), found = tally(STUDY, own, setting.id), {test} = found;
  const names = {setting: settingName(setting), baseline: t("baseline")};
  const verdict = !test.n ? "none" : test.p > 0.05 ? "unclear" : test.share > 0.5 ? "won" : "lost";
  const share = test.n ? t("answer.test", {wins: found.wins, n: test.n, share: percent(test.share), low: percent(test.low),
    high: percent(test.high), p: test.p < 0.001 ? t("answer.tiny") : `p = ${number(test.p, 3)}`}) : "";
  const k = needed(test.n);
  const notes = [found.ties && t("answer.ties", {ties: found.ties}),
    verdict === "unclear" && (k ? t("answer.needed", {n: test.n, k}) : t("answer.tooFew", {n: test.n})),
    own.length > 1 && t("answer.several", {votes: found.votes, pairs: found.pairs.length}),
    own.some((b) => !b.blind) && t("answer.notBlind", {voters: list(own.filter((b) => !b.blind).map((b) => b.voter))})];
  return [
    voted.length > 1 && h("p", {}, h("label", {}, t("answer.of"), " ", h("select", {id: "answer-setting", onchange: (e) => {
      state.setting = e.target.value;
      render();
    }}, voted.map((s) => h("option", {value: s.id, selected: s === setting}, settingTitle(s)))))),
    h("div", {class: "panel", id: "verdict", "data-wins": found.wins, "data-losses": found.losses, "data-ties": found.ties,
      "data-p": test.p, "data-low": test.low, "data-high": test.high},
      h("h2", {}, t(`answer.${verdict}`, names)), h("p", {}, share), notes.filter(Boolean).map((text) => h("p", {}, text))),
    promptTable(found, names), lostPairs(found, setting, names), voterTable(own)];
}

/** Per prompt, the worst first. */
function promptTable(found, names) {
  const prompts = new Map();
  for (const pair of found.pairs) {
    const text = promptOf(pair.index);
    const row = prompts.get(text) ?? {text, wins: 0, losses: 0, ties: 0};
    row[pair.wins > pair.losses ? "wins" : pair.wins < pair.losses ? "losses" : "ties"]++;
    prompts.set(text, row);
  }
  const rows = [...prompts.values()].sort((a, b) => b.losses - b.wins - (a.losses - a.wins));
  return table(t("answer.perPrompt"), [t("prompt"), names.setting, names.baseline, t("answer.noDifference")],
    rows.map((r) => [r.text, r.wins, r.losses, r.ties].map((v, i) => (i ? String(v) : v))));
}

function lostPairs(found, setting, names) {
  const lost = found.pairs.filter((p) => p.losses > p.wins);
  if (!lost.length) return null;
  const [baseline] = STUDY.settings;
  return h("details", {}, h("summary", {}, t("answer.lostPairs", {n: lost.length})),
    h("div", {class: "grid", style: "--columns: 2; max-width: 40rem"},
      [baseline, setting].map((s) => h("div", {class: "head"}, s === setting ? names.setting : names.baseline)),
      lost.map(({index}) => [h("p", {class: "caption"}, promptOf(index)), [baseline, setting].map((s) =>
        h("figure", {}, picture(s, index, imageAlt(s, index))))])));
}

function voterTable(own) {
  const remove = (ballot) => {
    if (!confirm(t("answer.removeQuestion", {voter: ballot.voter, votes: ballot.votes.length}))) return;
    state.ballots.splice(state.ballots.indexOf(ballot), 1);
    save();
    render();
  };
  return h("details", {}, h("summary", {}, t("answer.voters", {n: own.length})), table(t("answer.votersCaption"),
    [t("answer.voter"), t("answer.votes"), t("answer.blind"), t("answer.removeHead")], own.map((b) =>
      [b.voter, String(b.votes.length), t(b.blind ? "yes" : "no"), {content: h("button", {type: "button", onclick: () => remove(b),
        "aria-label": t("answer.removeLabel", {voter: b.voter})}, t("answer.remove"))}])));
}

const imageAlt = (setting, index) =>
  t("image.alt", {setting: settingName(setting), prompt: promptOf(index), seed: seedOf(index)});

// ----------------------------------------------------------------------------
// The report.

function reportView() {
  const sections = [summarySection(), gridSection(), figuresSection(), voteSection(), trialsSection(), aboutSection()];
  return sections.filter(Boolean);
}

const interval = ([, low, high], digits, signed) =>
  low === null || high === null || low === high ? null : h("span", {class: "interval"}, ` [${number(low, digits, signed)}, ${number(high, digits, signed)}]`);

const estimate = (v, digits, signed) => (v ? [number(v[0], digits, signed), interval(v, digits, signed)] : "–");

/** How a confirmed difference is judged: "better", "worse", "unclear", "lower", "higher" or null. */
function judged(key, confirmed) {
  const verdict = confirmed?.verdict, better = metricOf(key).better;
  if (!verdict || verdict === "unclear") return verdict ?? null;
  if (!better) return verdict;
  return verdict === better ? "better" : "worse";
}

/** Whether the bound of the objective held: "held", "broken", "open" or null. */
function boundOf(setting) {
  const bound = STUDY.objective.bound;
  const difference = bound && setting.confirmed[bound.metric]?.difference;
  if (!difference) return null;
  if (difference[1] === null || difference[2] === null) return "open";  // No confidence interval, of too few images.
  // Towards the worse: what is lost, at least and at most.
  const [least, most] = metricOf(bound.metric).better === "lower" ? [difference[1], difference[2]] : [-difference[2], -difference[1]];
  return most <= bound.margin ? "held" : least > bound.margin ? "broken" : "open";
}

function objectiveText() {
  const {minimize, maximize, bound} = STUDY.objective;
  const wanted = [...minimize.map((k) => t("objective.least", {metric: shortName(k)})),
    ...maximize.map((k) => t("objective.most", {metric: shortName(k)}))];
  return t(bound ? "objective.bound" : "objective.free", bound ? {wanted: list(wanted), metric: shortName(bound.metric),
    margin: plain(bound.margin)} : {wanted: list(wanted)});
}

/** Better, worse or neither in the objectives, in one sentence. */
function headline(setting) {
  const keys = [...STUDY.objective.minimize, ...STUDY.objective.maximize].filter((k) => setting.confirmed[k]);
  const by = (kind) => keys.filter((k) => judged(k, setting.confirmed[k]) === kind);
  const better = by("better"), worse = by("worse"), bound = boundOf(setting);
  const bounded = STUDY.objective.bound?.metric;
  if (bound === "broken" || (bound === "open" && judged(bounded, setting.confirmed[bounded]) === "worse")) worse.push(bounded);
  const kind = better.length ? (worse.length ? "trade" : bound === "open" ? "open" : "holds") : worse.length ? "fails" : "unclear";
  return t(`headline.${kind}`, {setting: bounds(setting, true), better: list(better.map(shortName)), worse: list(worse.map(shortName)),
    metric: bounded && shortName(bounded)});
}

function verdictCell(key, confirmed) {
  const kind = judged(key, confirmed);
  if (!kind) return {class: "text", content: "–"};
  const text = t(`verdict.${kind}`);
  return {class: kind, content: `${{better: "▲", worse: "▼"}[kind] ?? "≈"} ${text}`};
}

/** One setting beside the baseline: what the search said, what the confirmation found, and the difference. */
function comparison(setting) {
  const [baseline] = STUDY.settings;
  const keys = STUDY.metrics.map((m) => m.key).filter((k) => setting.confirmed[k]);
  return table(t("comparison.caption", {setting: settingName(setting)}),
    [t("comparison.metric"), t("comparison.search"), t("comparison.confirmed"), t("comparison.baseline"),
      t("comparison.difference"), t("comparison.verdict")],
    keys.map((key) => {
      const {digits} = metricOf(key), c = setting.confirmed[key];
      return [metricName(key), {content: estimate(setting.search[key], digits)}, {content: estimate(c.value, digits)},
        {content: estimate(baseline.confirmed[key]?.value, digits)}, {content: estimate(c.difference, digits, true)},
        verdictCell(key, c)];
    }));
}

function summarySection() {
  const [baseline] = STUDY.settings, [best] = RIVALS, images = STUDY.prompts.length * STUDY.seeds.length;
  const tried = STUDY.trials.filter((x) => x.state === "complete").length;
  const head = [heading(best ? headline(best) : t("start.none")),
    h("p", {}, t("summary.tuned", {origin: origin(), tried, objective: objectiveText()}))];
  if (!best) return h("section", {class: "first", id: "summary"}, head);
  const bound = boundOf(best), metric = STUDY.objective.bound && shortName(STUDY.objective.bound.metric);
  return h("section", {class: "first", id: "summary"}, head,
    h("p", {}, t(STUDY.fresh_prompts === false ? "summary.confirmedSeeds" : "summary.confirmed", {images,
      prompts: STUDY.prompts.length, seeds: STUDY.seeds.length})),
    bound && h("p", {}, t(`bound.${bound}`, {metric, margin: plain(STUDY.objective.bound.margin)})),
    comparison(best),
    h("p", {class: "small"}, t("summary.curse")),
    h("h2", {id: "paste"}, t("paste.heading")), paste(best),
    RIVALS.slice(1).map((s) => h("details", {}, h("summary", {}, settingTitle(s)), h("p", {}, headline(s)), comparison(s), paste(s))));
}

function paste(setting) {
  const block = (key, text) => {
    const pre = h("pre", {tabindex: 0}, text);
    return h("div", {}, h("h3", {}, t(key)), pre, h("button", {type: "button", class: "copy", onclick: () => copy(text, pre)},
      t("paste.copy")));
  };
  const {comfyui, a1111} = setting.paste ?? {};
  const conditional = setting.weight === 1;  // No interval, which a preset would have.
  return [
    h("p", {}, conditional ? t("paste.conditional") : t("paste.byHand", {lo: plain(setting.sigma_lo),
      hi: setting.sigma_hi === null ? "-1" : plain(setting.sigma_hi), weight: plain(setting.weight)})),
    !conditional && setting !== STUDY.settings[0] && h("p", {}, t("paste.preset"), " ",
      h("code", {}, `--save ${setting === RIVALS[0] ? "mine" : `mine=${setting.id}`}`)),
    h("div", {class: "pastes"}, a1111 && block("paste.a1111", a1111),
      comfyui && block("paste.comfyui", JSON.stringify(comfyui, null, 1).replace(/\n */g, " ")))];
}

async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // Some browsers give a file no clipboard.
    getSelection().selectAllChildren(element);
    if (!document.execCommand("copy")) return say(t("paste.notCopied"));
    getSelection().removeAllRanges();
  }
  say(t("paste.copied"));
}

// Images.

const ROWS = 8;  // At first: all of a large study would be long to scroll past.

function gridSection() {
  const total = STUDY.prompts.length * STUDY.seeds.length, num = STUDY.seeds.length;
  // One seed of every prompt first, so that the first rows show as many prompts as they can.
  const order = [...Array(total).keys()].map((i) => (i % STUDY.prompts.length) * num + Math.floor(i / STUDY.prompts.length));
  const grid = h("div", {class: EXACT ? "grid small" : "grid", style: `--columns: ${STUDY.settings.length}`},
    STUDY.settings.map((s) => h("div", {class: "head"}, settingTitle(s))));
  const row = (index) => [
    h("p", {class: "caption"}, t("grid.row", {prompt: promptOf(index), seed: seedOf(index)})),
    STUDY.settings.map((s) => h("figure", {}, h("button", {type: "button", onclick: () => enlarge(s, index),
      "aria-label": t("grid.enlarge", {image: imageAlt(s, index)})}, picture(s, index, ""))))];
  grid.append(...order.slice(0, ROWS).flatMap(row).flat());
  const more = order.length > ROWS && h("button", {type: "button", onclick: () => {
    grid.append(...order.slice(ROWS).flatMap(row).flat());
    more.remove();
  }}, t("grid.more", {n: order.length - ROWS}));
  const {format, side, longest} = STUDY.shown;
  return h("section", {id: "images"}, h("h2", {}, t("grid.heading")), h("p", {}, t("grid.note")),
    h("div", {class: "table", tabindex: 0, role: "region", "aria-label": t("grid.heading")}, grid), more && h("p", {class: "row"}, more),
    h("p", {class: "small"}, t(format === "PNG" ? "grid.exact" : side < longest ? "grid.smaller" : "grid.jpeg", {side, longest})));
}

/** A setting's image beside the baseline's, as large as they are. */
function enlarge(setting, index) {
  const [baseline] = STUDY.settings, both = setting === baseline ? [baseline] : [baseline, setting];
  const dialog = h("dialog", {"aria-label": promptOf(index), onclose: () => dialog.remove()},
    h("p", {class: "prompt"}, t("grid.row", {prompt: promptOf(index), seed: seedOf(index)})),
    h("div", {class: "pair", style: `grid-template-columns: repeat(${both.length}, 1fr)`}, both.map((s) =>
      h("figure", {}, picture(s, index, imageAlt(s, index)), h("figcaption", {}, settingName(s))))),
    h("form", {method: "dialog"}, h("button", {class: "main"}, t("close"))));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.body.append(dialog);
  dialog.showModal();
}

// Figures.

const figureChoice = {x: null, y: null, of: null};

function figuresSection() {
  const complete = STUDY.trials.filter((x) => x.state === "complete");
  const keys = STUDY.metrics.map((m) => m.key).filter((k) => complete.some((x) => x.values[k]));
  if (keys.length < 2) return null;
  const [first, second] = [...STUDY.objective.minimize, ...STUDY.objective.maximize, ...keys].filter((k) => keys.includes(k));
  figureChoice.x ??= first;
  figureChoice.y ??= second ?? keys.find((k) => k !== first);
  figureChoice.of ??= figureChoice.y;
  const choice = (name, key) => h("label", {}, t(key), h("select", {onchange: (e) => {
    figureChoice[name] = e.target.value;
    drawFigures();
  }}, keys.map((k) => h("option", {value: k, selected: figureChoice[name] === k}, metricName(k)))));
  const figure = (id, wide) => h("div", {class: wide ? "figure wide" : "figure", tabindex: wide ? 0 : null, role: wide ? "region" : null,
    "aria-label": wide ? t(`figure.${id}.heading`) : null},
    h("div", {id: `figure-${id}`, role: "img", "aria-label": t(`figure.${id}.alt`)}));
  return h("section", {id: "figures"}, h("h2", {}, t("figures.heading")), h("p", {class: "small"}, t("figures.note")),
    h("h3", {}, t("figure.front.heading")), h("p", {}, t("figure.front.note")),
    h("div", {class: "fields"}, choice("x", "figure.across"), choice("y", "figure.up")), figure("front", false),
    h("div", {class: "fields"}, choice("of", "figure.of")),
    h("h3", {}, t("figure.slices.heading")), h("p", {}, t("figure.slices.note")), figure("slices", false),
    h("h3", {}, t("figure.parallel.heading")), h("p", {}, t("figure.parallel.note")), figure("parallel", true));
}

function drawFigures() {
  if (!document.getElementById("figure-front")) return;
  if (!window.Plotly) document.head.append(h("script", {}, document.getElementById("plotly").textContent));
  const words = {
    t, metric: metricName, short: shortName, label: labelText,
    parameter: (name) => t(`parameter.${name}`),
    trial: (x) => [t("figure.trial", {number: x.number}), x.label && labelText(x.label), bounds(x), ...Object.entries(x.values).map(
      ([k, v]) => `${shortName(k)}: ${number(v[0], metricOf(k).digits)}`), t("figure.images", {n: x.images})].filter(Boolean).map(escaped).join("<br>"),
    setting: (s) => [escaped(settingTitle(s)), t("figure.confirmed")].join("<br>"),
  };
  const draw = (id, figure) => Plotly.react(`figure-${id}`, figure.data, figure.layout, FIGURE_CONFIG);
  draw("front", frontFigure(STUDY, figureChoice.x, figureChoice.y, words));
  draw("slices", sliceFigure(STUDY, figureChoice.of, words));
  draw("parallel", parallelFigure(STUDY, figureChoice.of, words));
}

/** Plotly reads some HTML in its texts. */
const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => state.view === "report" && drawFigures());

// Votes, trials, and how it was made.

function voteSection() {
  if (!RIVALS.length) return null;
  const done = state.ballots.filter(isDone);
  return h("section", {id: "votes"}, h("h2", {}, t("votes.heading")), answer(done), h("p", {class: "row"},
    button("votes.more", () => show("start")), done.length > 0 && exportControl(), importControl()));
}

function trialsSection() {
  const failed = STUDY.trials.filter((x) => x.state !== "complete"), complete = STUDY.trials.filter((x) => x.state === "complete");
  const keys = STUDY.metrics.map((m) => m.key).filter((k) => complete.some((x) => x.values[k]));
  const name = (x) => [String(x.number), x.label && ` ${labelText(x.label)}`].filter(Boolean).join(" ·");
  return h("section", {id: "trials"}, h("h2", {}, t("trials.heading")),
    failed.length ? table(t("trials.failed", {n: failed.length}), [t("trials.number"), t("trials.setting"), t("trials.error")],
      failed.map((x) => [name(x), {class: "text", content: bounds(x)}, {class: "text", content: x.error || t("trials.noReason")}]))
      : h("p", {}, t("trials.noneFailed")),
    h("details", {}, h("summary", {}, t("trials.all", {n: complete.length})), table(t("trials.caption"),
      [t("trials.number"), t("trials.setting"), t("trials.images"), ...keys.map(shortName), t("trials.front")], complete.map((x) =>
        [name(x), {class: "text", content: bounds(x)}, String(x.images), ...keys.map((k) => ({content: estimate(x.values[k], metricOf(k).digits)})),
          x.front ? t("yes") : ""]))));
}

function aboutSection() {
  const date = new Date(STUDY.created);
  const seeds = STUDY.image_seeds ? `${STUDY.image_seeds[0]} … ${STUDY.image_seeds.at(-1)}` : STUDY.seeds.join(", ");
  const facts = [
    ["about.name", STUDY.name], ["about.created", isNaN(date) ? STUDY.created : new Intl.DateTimeFormat(state.language,
      {dateStyle: "long", timeStyle: "short"}).format(date)],
    ["about.source", origin()], ["about.objective", objectiveText()], ["about.seed", String(STUDY.seed)],
    ["about.seeds", seeds], ["about.versions", Object.entries(STUDY.versions).map(([k, v]) => `${k} ${v}`).join(", ")],
    ["about.id", STUDY.id],
  ];
  return h("section", {id: "about"}, h("h2", {}, t("about.heading")),
    h("dl", {}, facts.map(([key, value]) => [h("dt", {}, t(key)), h("dd", {}, value)])),
    h("details", {}, h("summary", {}, t("about.prompts", {n: STUDY.prompts.length})), h("ol", {}, STUDY.prompts.map((p) => h("li", {}, p)))),
    h("p", {class: "small"}, t("about.method")));
}

// ----------------------------------------------------------------------------

document.getElementById("language").addEventListener("change", (event) => {
  state.language = event.target.value;
  save();
  render();
});
restore();
render();
