// The page of a Grok-1 server. Text of the model is only ever set as text, never as markup.

const at = (id) => document.getElementById(id);
const make = (name, text = "", set = {}) => {
  const node = document.createElement(name);
  node.textContent = text;
  Object.assign(node, set);
  return node;
};

const TOP = 10;
const COLOURS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#eeca3b", "#b279a2", "#9d755d"];
const say = (words) => { at("status").textContent = words; };

let model = "grok-1";
let stop = null; // aborts the request that runs
let tokens = []; // {id, name, logprob, top: [[name, logprob, id]], isPrompt}
let chosen = -1;
let traced = null;
let cell = [0, 0]; // layer and token of the ribbon
let settings = {}; // of the request that made the text

at("key").value = sessionStorage.getItem("key") ?? "";
at("key").addEventListener("input", () => sessionStorage.setItem("key", at("key").value));

function headers() {
  const key = at("key").value.trim();
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

async function ask(path, body, signal) {
  const answer = await fetch(path, {
    method: body ? "POST" : "GET", headers: headers(), body: body && JSON.stringify(body), signal,
  });
  if (!answer.ok) {
    let words = `${answer.status} ${answer.statusText}`;
    try { words = (await answer.json()).error.message; } catch { /* it was no JSON */ }
    throw new Error(words);
  }
  return answer;
}

function sampling() {
  const number = (id) => (at(id).value.trim() === "" ? undefined : Number(at(id).value));
  const stops = at("stops").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  return {
    model, temperature: number("temperature"), top_p: number("top_p"), top_k: number("top_k"),
    min_p: number("min_p"), max_tokens: number("max_tokens"),
    seed: number("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0],
    ...(stops && { stop: [stops] }),
  };
}

// ---- the text -------------------------------------------------------------------------------

function surprisal(token) {
  if (token.logprob === null) return "";
  const bits = -token.logprob / Math.LN2;
  return bits > 9 ? " s3" : bits > 5 ? " s2" : bits > 2 ? " s1" : " s0";
}

function show(from = 0) {
  const box = at("text");
  while (box.children.length > from) box.lastChild.remove();
  for (const [place, token] of tokens.entries()) {
    if (place < from) continue;
    const kind = `t${token.isPrompt ? " prompt" : ""}${surprisal(token)}`;
    const span = make("span", token.name, { className: kind });
    span.dataset.place = place;
    box.append(span);
  }
  at("keep").disabled = at("trace").disabled = !tokens.length;
}

function choose(place) {
  if (!tokens.length) return;
  const box = at("text");
  box.querySelector(".here")?.classList.remove("here");
  chosen = Math.max(0, Math.min(place, tokens.length - 1));
  const token = tokens[chosen];
  box.children[chosen].classList.add("here");
  at("token").hidden = false;
  at("token-name").textContent = `${JSON.stringify(token.name)} (id ${token.id})`;
  const rows = at("alternatives").tBodies[0];
  rows.replaceChildren();
  if (token.logprob === null) {
    at("token-facts").textContent = "Nothing stands before it.";
  } else {
    const rank = token.top.findIndex(([, , id]) => id === token.id);
    const bits = (-token.logprob / Math.LN2).toFixed(2);
    at("token-facts").textContent =
      `${percent(Math.exp(token.logprob))}, ${bits} bits, ${rank < 0 ? "beyond the best" : `rank ${rank + 1}`}`;
    const after = sampler(token.top);
    for (const [number, [name, logprob, id]] of token.top.entries()) {
      const row = make("tr");
      const button = make("button", JSON.stringify(name), {
        type: "button", title: "continue from here", onclick: () => branch(chosen, id),
      });
      const first = make("td");
      first.append(button);
      row.append(first, make("td", percent(Math.exp(logprob))), make("td", after[number]));
      rows.append(row);
    }
  }
  showLens();
}

const percent = (p) => (p >= 0.0995 ? `${(100 * p).toFixed(0)} %` : `${(100 * p).toPrecision(2)} %`);

// What temperature and filters make of the best tokens; the rest of the vocabulary is not known here,
// so that a share is of these, and above what the whole would give.
function sampler(top) {
  const { temperature = 1, top_p = 1, top_k = 0, min_p = 0 } = settings;
  if (temperature === 0) return top.map((_, number) => (number ? "–" : "100 %"));
  const weights = top.map(([, logprob]) => Math.exp((logprob - top[0][1]) / temperature));
  let total = 0;
  const within = weights.slice(0, top_k > 0 ? top_k : undefined);
  const sum = within.reduce((a, b) => a + b, 0);
  const kept = within.map((weight) => {
    const stays = (total === 0 || total / sum < top_p) && weight >= min_p;
    total += weight;
    return stays ? weight : 0;
  });
  const left = kept.reduce((a, b) => a + b, 0);
  return weights.map((_, number) => (kept[number] ? `≤ ${percent(kept[number] / left)}` : "–"));
}

at("text").addEventListener("click", (event) => {
  const place = event.target.dataset?.place;
  if (place !== undefined) choose(Number(place));
});
at("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
  if (step) { event.preventDefault(); choose(chosen + step); }
  if (event.key === "Home") { event.preventDefault(); choose(0); }
  if (event.key === "End") { event.preventDefault(); choose(tokens.length - 1); }
  if (event.key === "Enter") { event.preventDefault(); at("alternatives").querySelector("button")?.focus(); }
});

// ---- asking ---------------------------------------------------------------------------------

// Events of a stream as they come; one decoder, so that no character is torn.
async function* events(answer) {
  const decoder = new TextDecoder();
  let rest = "";
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value ?? new Uint8Array(), { stream: !done });
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
    if (done) throw new Error("the server ended the answer before its end");
  }
}

function taken(choice, ids, isPrompt) {
  const { tokens: names, token_logprobs: logprobs, top_logprobs: tops } = choice.logprobs;
  return names.map((name, number) => ({
    id: ids[number], name, logprob: logprobs[number], isPrompt,
    top: Object.entries(tops[number] ?? {}).map(([text, value]) => [text, value, null])
      .sort((a, b) => b[1] - a[1]).slice(0, TOP),
  }));
}

async function run(prompt, keepFrom) {
  stop?.abort();
  const own = stop = new AbortController();
  settings = sampling();
  at("seed").placeholder = `fresh, was ${settings.seed}`;
  const body = {
    ...settings, prompt, stream: true, logprobs: 20, echo: true, return_token_ids: true,
    return_top_ids: true, stream_options: { include_usage: true },
  };
  showRequest(body);
  at("go").disabled = true;
  at("stop").disabled = false;
  say("waiting for the first token …");
  const begun = performance.now();
  let first = 0, count = 0, usage = null;
  traced = null;
  showTrace();
  try {
    const answer = await ask("v1/completions", body, own.signal);
    for await (const event of events(answer)) {
      if (event.usage && !event.choices.length) { usage = event.usage; continue; }
      const [choice] = event.choices;
      first ||= performance.now();
      const from = choice.prompt_token_ids ? keepFrom : tokens.length;
      if (choice.prompt_token_ids) tokens.length = 0;
      const ids = [...(choice.prompt_token_ids ?? []), ...choice.token_ids];
      const fresh = taken(choice, ids, false);
      for (const [number, token] of fresh.entries()) {
        token.isPrompt = number < (choice.prompt_token_ids?.length ?? 0);
        token.top.forEach((entry) => { entry[2] = choice.top_ids?.[number]?.[entry[0]] ?? null; });
      }
      tokens.push(...fresh);
      count += choice.token_ids.length;
      show(Math.min(from, tokens.length));
      say(`${count} tokens …`);
    }
    const seconds = (performance.now() - first) / 1000;
    const cached = usage?.prompt_tokens_details?.cached_tokens ?? 0;
    say(`${count} tokens, ${(count / Math.max(seconds, 1e-3)).toFixed(1)} a second; first after ` +
      `${((first - begun) / 1000).toFixed(2)} s; ${cached} of the prompt's ${usage?.prompt_tokens} were known`);
  } catch (error) {
    say(error.name === "AbortError" ? `stopped after ${count} tokens` : `failed: ${error.message}`);
  } finally {
    if (stop === own) {
      stop = null;
      at("go").disabled = false;
      at("stop").disabled = true;
    }
  }
}

function go() {
  tokens = [];
  chosen = -1;
  show();
  at("token").hidden = true;
  run(at("prompt").value, 0);
}

function branch(place, id) {
  const ids = [...tokens.slice(0, place).map((token) => token.id), id];
  at("text").focus();
  run(ids, place);
}

at("go").addEventListener("click", go);
at("stop").addEventListener("click", () => stop?.abort());
at("keep").addEventListener("click", async () => {
  const ids = tokens.map((token) => token.id);
  at("prompt").value = (await (await ask("detokenize", { tokens: ids })).json()).prompt;
  at("prompt").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); go(); }
  if (event.key === "Escape") stop?.abort();
});

function showRequest(body) {
  const { stream, echo, return_token_ids, return_top_ids, stream_options, logprobs, ...plain } = body;
  const url = `${location.origin}/v1`;
  const quoted = JSON.stringify(plain).replaceAll("'", "'\\''");
  at("curl").textContent =
    `curl ${url}/completions -H 'Content-Type: application/json' \\\n  -d '${quoted}'`;
  const { top_k, min_p, ...known } = plain;
  const words = Object.entries(known).map(([name, value]) => `    ${name}=${JSON.stringify(value)},\n`);
  at("python").textContent =
    `import openai\n\nclient = openai.OpenAI(base_url="${url}", api_key="KEY")\n` +
    `answer = client.completions.create(\n${words.join("")}` +
    `    extra_body=${JSON.stringify({ top_k, min_p })},\n)\nprint(answer.choices[0].text)`;
}

// ---- inside ---------------------------------------------------------------------------------

async function trace() {
  at("cell").textContent = "tracing …";
  try {
    const ids = tokens.map((token) => token.id);
    traced = await (await ask("v1/trace", { model, prompt: ids })).json();
    cell = [0, Math.max(chosen, 0)];
    showTrace();
  } catch (error) {
    at("cell").textContent = `failed: ${error.message}`;
  }
}

function showTrace() {
  const canvas = at("ribbon");
  for (const id of ["routing", "expert-load", "lens"]) at(id).replaceChildren();
  if (!traced) { canvas.width = canvas.height = 0; at("cell").textContent = ""; return; }
  const { experts, gates, num_experts } = traced;
  const layers = experts.length, length = experts[0].length;
  const size = [Math.max(6, Math.min(24, Math.floor(1100 / length))), Math.max(6, Math.min(18, Math.floor(400 / layers)))];
  canvas.width = size[0] * length;
  canvas.height = size[1] * layers;
  const paint = canvas.getContext("2d");
  for (let layer = 0; layer < layers; layer++) {
    for (let place = 0; place < length; place++) {
      const [x, y] = [place * size[0], layer * size[1]];
      experts[layer][place].slice(0, 2).forEach((expert, number) => {
        paint.globalAlpha = 0.25 + 0.75 * Math.min(1, gates[layer][place][number] * (number ? 2 : 1.2));
        paint.fillStyle = COLOURS[expert % COLOURS.length];
        if (number) paint.fillRect(x, y + size[1] * 0.65, size[0] - 1, size[1] * 0.3);
        else paint.fillRect(x, y, size[0] - 1, size[1] * 0.6);
      });
    }
  }
  canvas.dataset.size = size.join();
  at("experts-key").replaceChildren(...Array.from({ length: num_experts }, (_, expert) => {
    const one = make("span", `expert ${expert}`);
    one.style.setProperty("background", COLOURS[expert % COLOURS.length]);
    return one;
  }));
  table("routing", ["layer", ...traced.tokens.map((name) => JSON.stringify(name))],
    experts.map((row, layer) => [layer, ...row.map((pair, place) =>
      pair.map((expert, number) => `${expert} (${gates[layer][place][number].toFixed(2)})`).join(" "))]));
  table("expert-load", ["layer", ...Array.from({ length: num_experts }, (_, expert) => `expert ${expert}`)],
    experts.map((row, layer) => {
      const counts = new Array(num_experts).fill(0);
      row.flat().forEach((expert) => { counts[expert] += 1; });
      return [layer, ...counts.map((count) => {
        const share = count / row.flat().length;
        return `${"█".repeat(Math.round(share * 20))} ${(100 * share).toFixed(0)} %`;
      })];
    }));
  showCell();
  showLens();
}

function table(id, head, rows) {
  const top = make("tr");
  top.append(...head.map((word) => make("th", word, { scope: "col" })));
  const body = rows.map((row) => {
    const line = make("tr");
    line.append(...row.map((word, number) => make(number ? "td" : "th", String(word))));
    return line;
  });
  at(id).replaceChildren(top, ...body);
}

function showCell() {
  if (!traced) return;
  const { experts, gates, tokens: names } = traced;
  cell = [Math.max(0, Math.min(cell[0], experts.length - 1)), Math.max(0, Math.min(cell[1], names.length - 1))];
  const [layer, place] = cell;
  const words = experts[layer][place].map((expert, n) => `expert ${expert} with gate ${gates[layer][place][n].toFixed(2)}`);
  at("cell").textContent = `layer ${layer}, token ${place} ${JSON.stringify(names[place])}: ${words.join(", ")}`;
}

function showLens() {
  if (!traced || chosen < 0 || chosen >= traced.tokens.length) return;
  table("lens", ["layer", "first", "second", "third"], traced.lens_tokens.map((row, layer) =>
    [layer, ...row[chosen].map((id, number) =>
      `${JSON.stringify(traced.names[id])} ${percent(Math.exp(traced.lens_logprobs[layer][chosen][number]))}`)]));
}

at("trace").addEventListener("click", trace);
at("ribbon").addEventListener("mousemove", (event) => {
  const [width, height] = (at("ribbon").dataset.size ?? "1,1").split(",").map(Number);
  cell = [Math.floor(event.offsetY / height), Math.floor(event.offsetX / width)];
  showCell();
});
at("ribbon").addEventListener("click", () => choose(cell[1]));
at("ribbon").addEventListener("keydown", (event) => {
  const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
  if (!step) return;
  event.preventDefault();
  cell = [cell[0] + step[0], cell[1] + step[1]];
  showCell();
});

// ---- the server -----------------------------------------------------------------------------

let before = null;
async function load() {
  try {
    const health = await (await fetch("health")).json();
    let words = health.status === "ok" ? "" : `${health.status}; `;
    if (health.running !== undefined) words += `${health.running} running, ${health.waiting} waiting`;
    const answer = await fetch("metrics", { headers: headers() });
    if (answer.ok) {
      const values = new Map();
      for (const line of (await answer.text()).split("\n")) {
        if (line.startsWith("#")) continue;
        const [name, value] = line.split(" ");
        values.set(name.replace("grok1_", ""), Number(value));
      }
      const now = [performance.now(), values.get("generation_tokens_total") ?? 0];
      if (before) words += `, ${(1000 * (now[1] - before[1]) / (now[0] - before[0])).toFixed(0)} tokens/s`;
      before = now;
      const asked = values.get("prefix_cache_queries_total");
      words += ` of ${values.get("num_slots")}`.replace(/^ of/, "; slots");
      if (asked) words += `, ${(100 * values.get("prefix_cache_hits_total") / asked).toFixed(0)} % of prompts known`;
    }
    at("load").textContent = words;
  } catch {
    at("load").textContent = "the server does not answer";
  }
}
async function begin() {
  try {
    model = (await (await ask("v1/models")).json()).data[0].id;
    at("model").textContent = model;
  } catch (error) {
    say(error.message);
  }
}
at("key").addEventListener("change", begin);
begin();
load();
setInterval(load, 2000);
