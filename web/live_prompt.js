// The graph as it would be queued, as far as schedules go: {execution id: {class_type, inputs}}.
//
// {inputs, outputs} under "types" name what is connected, for the nodes that the server does not know.
//
// The front end's own conversion asks every widget of every node for its value, and some answer by uploading a file or
// drawing a seed. So links are followed here, by the same rules: through reroutes, bypassed nodes and subgraphs.

const MUTED = 2;
const BYPASSED = 4;
const HEAVY = new Set([
  "CONDITIONING",
  "IMAGE",
  "MASK",
  "VAE",
  "CLIP",
  "CLIP_VISION",
  "CLIP_VISION_OUTPUT",
  "CONTROL_NET",
  "STYLE_MODEL",
  "UPSCALE_MODEL",
  "AUDIO",
  "VIDEO",
]);
const LONGEST = 2000; // Characters of a value: prompts may be longer, schedules are not.
const IGNORED = new Set(["seed", "noise_seed", "control_after_generate"]);

const nodesOf = (graph) => graph.nodes ?? graph._nodes ?? [];
const linkOf = (graph, id) => graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
const fromOutside = (link) => Number(link.origin_id) === -10; // Of a subgraph.
const isSubgraph = (node) => Boolean(node.isSubgraphNode?.());

let levels = new Map(); // Node -> its level: the graph that it is in, and where that is.

/** {prompt, ids}: what is connected with the nodes of `types`, and a Map of those nodes to their execution ids. */
export function toPrompt(root, types) {
  const entries = [];
  collect({ graph: root, path: "", parent: null, host: null }, entries, 0);
  levels = new Map(entries.map(({ node, level }) => [node, level]));
  const prompt = {};
  const ids = new Map();
  for (const { node, level } of entries) {
    if (node.isVirtualNode || node.mode === MUTED || node.mode === BYPASSED || isSubgraph(node)) {
      if (types.has(node.comfyClass) && !ids.has(node)) ids.set(node, null);
      continue;
    }
    const id = `${level.path}${node.id}`;
    const inputs = inputsOf(level, node);
    prompt[id] = { class_type: node.comfyClass ?? node.type, inputs, types: typesOf(node, inputs) };
    if (types.has(node.comfyClass) && !ids.get(node)) ids.set(node, id);
  }
  return { prompt: connected(prompt, [...ids.values()].filter(Boolean)), ids };
}

function collect(level, entries, depth) {
  if (depth > 20) return;
  for (const node of nodesOf(level.graph)) {
    entries.push({ node, level });
    if (isSubgraph(node) && node.mode !== MUTED && node.mode !== BYPASSED) {
      collect(
        { graph: node.subgraph, path: `${level.path}${node.id}:`, parent: level, host: node },
        entries,
        depth + 1,
      );
    }
  }
}

function inputsOf(level, node) {
  const inputs = {};
  for (const widget of node.widgets ?? []) {
    if (!widget.name || widget.options?.serialize === false || IGNORED.has(widget.name)) continue;
    const value = widget.value;
    if (["number", "boolean"].includes(typeof value) || (typeof value === "string" && value.length <= LONGEST)) {
      inputs[widget.name] = value;
    }
  }
  (node.inputs ?? []).forEach((input, slot) => {
    if (isHeavy(input.type, node) || IGNORED.has(input.name)) return;
    const found = followInput(level, node, slot, input.type, 0);
    if (found?.link) inputs[input.name] = found.link;
    else if (found && "value" in found) inputs[input.name] = found.value;
  });
  return inputs;
}

/** Latents are heavy, but where a schedule or a model's sampling depends on their size. */
function isHeavy(type, node) {
  if (type === "LATENT") return !(node.outputs ?? []).some((o) => o.type === "SIGMAS" || o.type === "MODEL");
  return HEAVY.has(type);
}

function typesOf(node, inputs) {
  const linked = (node.inputs ?? []).filter((i) => Array.isArray(inputs[i.name]));
  const name = (type) => (typeof type === "string" ? type : "*");
  return {
    inputs: Object.fromEntries(linked.map((i) => [i.name, name(i.type)])),
    outputs: (node.outputs ?? []).map((o) => name(o.type)),
  };
}

/** {link: [id, slot]}, {value} of a widget that stands for the link, or undefined. */
function followInput(level, node, slot, type, depth) {
  const id = node.inputs?.[slot]?.link;
  return id == null ? undefined : followLink(level, linkOf(level.graph, id), type, depth);
}

function followLink(level, link, type, depth) {
  if (!link || depth > 200) return undefined;
  if (fromOutside(link) && level.host) {
    const outer = level.host.inputs?.[link.origin_slot];
    if (outer?.link != null) return followInput(level.parent, level.host, link.origin_slot, type, depth + 1);
    const widget = level.host.getWidgetFromSlot?.(outer) ?? level.host.widgets?.find((w) => w.name === outer?.name);
    return widget ? { value: widget.value } : undefined;
  }
  const origin = level.graph.getNodeById(link.origin_id);
  return origin ? followOutput(level, origin, link.origin_slot, type, depth + 1) : undefined;
}

function followOutput(level, node, slot, type, depth) {
  if (depth > 200 || node.mode === MUTED) return undefined;
  if (node.mode === BYPASSED) {
    const fits = (i) => i?.type === type || i?.type === "*";
    const at = fits(node.inputs?.[slot]) ? slot : (node.inputs ?? []).findIndex(fits);
    return at < 0 ? undefined : followInput(level, node, at, type, depth + 1);
  }
  if (isSubgraph(node)) {
    const inner = node.subgraph;
    const output = inner.outputNode?.slots?.[slot] ?? inner.outputs?.[slot];
    const link = output?.linkIds?.length ? linkOf(inner, output.linkIds[0]) : null;
    const origin = link && inner.getNodeById(link.origin_id);
    const within = { graph: inner, path: `${level.path}${node.id}:`, parent: level, host: node };
    if (link && fromOutside(link)) return followInput(level, node, link.origin_slot, type, depth + 1);
    return origin ? followOutput(within, origin, link.origin_slot, type, depth + 1) : undefined;
  }
  if (node.isVirtualNode) {
    const source = node.resolveVirtualOutput?.(slot); // Of nodes that set and get by name, perhaps in another graph.
    if (source) return followOutput(levels.get(source.node) ?? level, source.node, source.slot, type, depth + 1);
    const link = node.getInputLink?.(slot);
    if (link) return followLink(level, link, type, depth + 1);
    if (node.inputs?.length) return followInput(level, node, 0, type, depth + 1);
    return node.widgets?.length ? { value: node.widgets[0].value } : undefined;
  }
  return { link: [`${level.path}${node.id}`, slot] };
}

/** The part of a prompt that is linked with `starts`, in either direction. */
function connected(prompt, starts) {
  const neighbours = new Map();
  const join = (a, b) => neighbours.set(a, [...(neighbours.get(a) ?? []), b]);
  for (const [id, { inputs }] of Object.entries(prompt)) {
    for (const [name, value] of Object.entries(inputs)) {
      if (!Array.isArray(value)) continue;
      if (!prompt[value[0]]) {
        delete inputs[name];
        continue;
      }
      join(id, value[0]);
      join(value[0], id);
    }
  }
  const kept = {};
  const front = [...starts];
  while (front.length) {
    const id = front.pop();
    if (kept[id] || !prompt[id]) continue;
    kept[id] = prompt[id];
    front.push(...(neighbours.get(id) ?? []));
  }
  return kept;
}
