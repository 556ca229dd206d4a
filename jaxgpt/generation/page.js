"use strict";
const $ = (id) => document.getElementById(id);
const RUNNERS_UP = 5;
let names = [], running = null;
// A turn: {text} of the user's, or {runs, chosen} of the models'; a run: {model, number, text, tokens, note, error}.
let turns = [];

// Whatever a model or a person writes comes in here as a text, and never as markup.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function button(words, action, label) {
  const made = make("button", {type: "button", onclick: action}, words);
  if (label) made.setAttribute("aria-label", label);
  return made;
}

function say(words, wrong = false) {
  $("status").textContent = words;
  $("status").classList.toggle("wrong", wrong);
}

// The server

function headers() {
  const key = $("key").value.trim();
  return {"Content-Type": "application/json", ...(key ? {Authorization: `Bearer ${key}`} : {})};
}

async function failure(answer) {
  if (answer.status === 401) {
    $("key-label").hidden = false;
    $("more").open = true;
  }
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answered with status ${answer.status}`;
  }
}

async function findModels() {
  const answer = await fetch("/v1/models", {headers: headers()});
  if (!answer.ok) throw new Error(await failure(answer));
  names = (await answer.json()).data.map((model) => model.id);
  $("model").textContent = document.title = names.join(", ");
  $("models").hidden = names.length < 2;
  $("models").replaceChildren($("models").firstElementChild, ...names.map((name) =>
    make("label", {className: "check"}, make("input", {type: "checkbox", checked: true, value: name}), name)));
}

function askedModels() {
  const asked = [...$("models").querySelectorAll("input:checked")].map((box) => box.value);
  return asked.length ? asked : names.slice(0, 1);
}

function request(messages, {model, number}) {
  const body = {model, messages, stream: true};
  for (const id of ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_completion_tokens", "seed"]) {
    if ($(id).value !== "") body[id] = Number($(id).value);
  }
  if ("seed" in body) body.seed += number;
  if ($("logprobs").checked) Object.assign(body, {logprobs: true, top_logprobs: RUNNERS_UP});
  return body;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let waiting = ""; ;) {
    const {value, done} = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function draw(run, messages, signal, changed) {
  const answer = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(request(messages, run)), signal,
  });
  if (!answer.ok) throw new Error(await failure(answer));
  const decoder = new TextDecoder();
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      run.text += choice.delta.content ?? "";
      for (const token of choice.logprobs?.content ?? []) {
        const text = decoder.decode(new Uint8Array(token.bytes), {stream: true});
        run.tokens.push({text, logprob: token.logprob, likeliest: token.top_logprobs, written: token.token});
      }
      if (choice.finish_reason === "length") run.note = "Ended by the most tokens.";
    }
    changed();
  }
}

// What is said so far, up to a turn
function messagesBefore(end) {
  const system = $("system").value.trim();
  const said = turns.slice(0, end).map((turn) => turn.runs
    ? {role: "assistant", content: turn.runs[turn.chosen].text} : {role: "user", content: turn.text});
  return [...(system ? [{role: "system", content: system}] : []), ...said];
}

async function answer(place) {
  if (running) return;
  running = new AbortController();
  const {signal} = running;
  const turn = {runs: [newRun("", 0)], chosen: 0};
  turns = [...turns.slice(0, place), turn];
  drawAll();
  try {
    busy(true);
    say("The model is writing.");
    if (!names.length) await findModels();
    const count = Math.max(1, Math.min(8, Number($("runs").value) || 1));
    turn.runs = askedModels().flatMap((model) => Array.from({length: count}, (_, number) => newRun(model, number)));
    drawAll();
    const views = turn.runs.map((run, number) => $(`run-${place}-${number}`));
    const messages = messagesBefore(place);
    const all = turn.runs.map(async (run, number) => {
      try {
        await draw(run, messages, signal, () => fill(views[number], run));
      } catch (error) {
        if (error.name === "AbortError") run.note = "Stopped."; else run.error = error.message;
      }
    });
    await Promise.all(all);
    const wrong = turn.runs.find((run) => run.error);
    say(wrong ? wrong.error : signal.aborted ? "Stopped." : "The answer is complete.", Boolean(wrong));
  } catch (error) {
    turn.runs.forEach((run) => { run.error = error.message; });
    say(error.message, true);
  }
  running = null;
  drawAll();
  busy(false);
  if (!turn.runs.some((run) => run.error)) $("spoken").textContent = turn.runs[0].text;
}

function newRun(model, number) {
  return {model, number, text: "", tokens: [], note: "", error: ""};
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  $("turns").setAttribute("aria-busy", String(is));
  document.body.dataset.busy = is ? "yes" : "no";
}

// The conversation

function drawAll() {
  $("turns").replaceChildren(...turns.map((turn, place) => turn.runs ? drawTheirs(turn, place) : drawMine(turn, place)));
  if (!turns.length) $("turns").append(make("p", {className: "note"}, "Nothing has been said yet."));
  hideTip();
}

function drawMine(turn, place) {
  const edit = button("Edit", () => {
    const field = make("textarea", {value: turn.text, rows: 3});
    field.setAttribute("aria-label", "Edit the message");
    const save = () => { turns[place] = {text: field.value}; answer(place + 1); };
    const form = make("form", {onsubmit: (event) => { event.preventDefault(); save(); }}, field,
      make("p", {className: "buttons"}, make("button", {className: "first"}, "Send again"), button("Cancel", drawAll)));
    section.replaceChildren(heading, form);
    field.focus();
  }, `Edit message ${place + 1}`);
  edit.disabled = Boolean(running);
  const heading = make("h2", {}, "You");
  const section = make("section", {className: "turn mine"}, heading, make("div", {className: "said"}, turn.text),
    make("div", {className: "buttons"}, edit));
  return section;
}

function drawTheirs(turn, place) {
  const several = turn.runs.length > 1, models = new Set(turn.runs.map((run) => run.model)).size > 1;
  const runs = turn.runs.map((run, number) => {
    const said = make("div", {className: "said", id: `run-${place}-${number}`, tabIndex: 0});
    said.setAttribute("role", "group");
    const by = models ? `, by ${run.model}` : "";
    said.setAttribute("aria-label", several ? `Answer ${number + 1} of ${turn.runs.length}${by}` : "Answer");
    fill(said, run);
    walkable(said);
    const note = make("span", {className: run.error ? "note wrong" : "note"}, run.error || run.note);
    const buttons = make("div", {className: "buttons"});
    if (several) {
      const choose = button("Go on with this", () => { turn.chosen = number; drawAll(); }, `Go on with answer ${number + 1}`);
      choose.setAttribute("aria-pressed", String(turn.chosen === number));
      buttons.append(choose);
    }
    buttons.append(note);
    const chosen = several && turn.chosen === number ? "run chosen" : "run";
    return make("div", {className: chosen}, ...(models ? [make("h3", {}, run.model)] : []), said, buttons);
  });
  const again = button("Regenerate", () => answer(place), `Regenerate answer ${place + 1}`);
  again.disabled = Boolean(running);
  return make("section", {className: "turn"}, make("h2", {}, models ? "Models" : "Model"), make("div", {className: "runs"}, ...runs),
    make("div", {className: "buttons"}, again));
}

// Tokens are spans of the run's text; those that are there already stay.
function fill(said, run) {
  if (!run.tokens.length) {
    said.textContent = run.text;
    return;
  }
  let place = 0;
  run.tokens.forEach((token, number) => {
    const text = run.text.slice(place, place + token.text.length);
    place += text.length;
    if (number < said.childElementCount) return;
    const span = make("span", {className: "token"}, text);
    span.token = token;
    span.style.setProperty("--doubt", String(0.55 * (1 - Math.exp(token.logprob))));
    said.append(span);
  });
  said.rest?.remove();
  said.rest = document.createTextNode(run.text.slice(place));
  said.append(said.rest);
  const main = $("main");
  if (main.scrollHeight - main.scrollTop - main.clientHeight < 200) main.scrollTop = main.scrollHeight;
}

// A token's probability, and the runners-up

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
const visible = (text) => text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "(nothing)";

function showTip(span) {
  const {token} = span;
  const rows = token.likeliest.map((other) => {
    const row = make("tr", {}, make("td", {}, visible(other.token)), make("td", {}, percent(other.logprob)));
    row.classList.toggle("drawn", other.token === token.written && other.logprob === token.logprob);
    return row;
  });
  if (!rows.some((row) => row.classList.contains("drawn"))) {
    rows.push(make("tr", {className: "drawn"}, make("td", {}, visible(token.written)), make("td", {}, percent(token.logprob))));
  }
  $("tip").replaceChildren(make("table", {}, make("tbody", {}, ...rows)));
  $("tip").hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), tip = $("tip").getBoundingClientRect();
  const below = at.bottom + 6 + tip.height < innerHeight;
  $("tip").style.left = `${Math.max(4, Math.min(at.left, innerWidth - tip.width - 4))}px`;
  $("tip").style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - tip.height - 6)}px`;
}

function hideTip() {
  $("tip").hidden = true;
  document.querySelector(".token.at")?.classList.remove("at");
}

function walkable(said) {
  said.addEventListener("keydown", (event) => {
    const spans = [...said.querySelectorAll(".token")], at = spans.findIndex((span) => span.classList.contains("at"));
    const to = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: spans.length - 1}[event.key];
    if (event.key === "Escape") hideTip();
    if (to === undefined || !spans.length) return;
    event.preventDefault();
    hideTip();
    const span = spans[Math.max(0, Math.min(to, spans.length - 1))];
    span.classList.add("at");
    showTip(span);
    const others = span.token.likeliest.map((other) => `${visible(other.token)} ${percent(other.logprob)}`).join(", ");
    $("spoken").textContent = `${visible(span.token.written)}: ${percent(span.token.logprob)}. Likeliest: ${others}`;
  });
  said.addEventListener("blur", hideTip);
}

$("turns").addEventListener("pointerover", (event) => {
  if (event.target.token) showTip(event.target); else hideTip();
});
// A finger leaves when it is lifted; what it tapped at stays.
$("turns").addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") hideTip(); });
$("turns").addEventListener("click", (event) => { if (event.target.token) showTip(event.target); });
$("main").addEventListener("scroll", hideTip);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running) running.abort();
});

// What is typed

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (running || !text.trim()) return;
  $("text").value = "";
  turns.push({text});
  answer(turns.length);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("shaded").addEventListener("change", () => $("turns").classList.toggle("shaded", $("shaded").checked));
$("key").addEventListener("change", () => findModels().then(() => say("Connected."), (error) => say(error.message, true)));

drawAll();
findModels().catch((error) => say(error.message, true)).finally(() => { document.body.dataset.drawn = "yes"; });
