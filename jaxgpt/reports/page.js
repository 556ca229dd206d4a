// The page around the curves: how each run is doing, its memory, samples and configuration; and live news.

const page = JSON.parse(document.getElementById("data").textContent);

function count(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const [divisor, unit] = value >= 1e12 ? [1e12, "T"] : value >= 1e9 ? [1e9, "B"] : value >= 1e6 ? [1e6, "M"] : value >= 1e4 ? [1e3, "k"] : [1, ""];
  const scaled = value / divisor;
  return (unit || !Number.isInteger(value) ? Number(scaled.toPrecision(digits)) : value).toLocaleString("en") + unit;
}

function duration(seconds) {
  if (seconds === null) return "–";
  const minutes = Math.round(seconds / 60);
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

function when(seconds) { return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" }); }

function last([, values]) { return values.length ? values[values.length - 1] : null; }

function figures(run) {
  const validation = last(run.curves.validation);
  const training = run.state === "training";
  const shown = [
    ["step", `${run.step.toLocaleString("en")} of ${run.steps.toLocaleString("en")}`],
    ["time left", run.step < run.steps ? duration(run.seconds_left) : "none"],
    ["validation loss", validation === null ? "–" : validation.toFixed(4)],
    ["train loss, lately", run.now.loss === null ? "–" : run.now.loss.toFixed(4)],
    ...Object.entries(run.tasks).map(([task, points]) => [task, `${(last(points) || 0).toFixed(2)}%`]),
    ["tokens seen", count(run.step * run.tokens_per_step)],
    ["tokens/s", count(run.now.tokens_per_second)],
    ...(run.now.mfu === null ? [] : [["MFU", `${(100 * run.now.mfu).toFixed(1)}%`]]),
    ["a step", run.now.step_seconds === null ? "–" : `${Number((1000 * run.now.step_seconds).toPrecision(3)).toLocaleString("en")} ms`],
    ["steps skipped", run.skips],
    ...(training && run.seconds_left ? [["done about", when(run.written + run.seconds_left)]] : []),
  ];
  return element("dl", "figures", ...shown.map(([name, value]) => element("div", "", element("dt", "", name), element("dd", "", value))));
}

function summary(run, index) {
  const done = element("div");
  done.style.width = `${run.steps ? Math.min(100, (100 * run.step) / run.steps) : 0}%`;
  const state = element("span", run.state.startsWith("stopped") ? "bad" : "quiet", run.state);
  const card = element("div", "card", element("div", "name", element("b", "", run.name), state));
  if (run.note) card.append(element("p", "note", run.note));
  card.append(element("div", "progress", done), figures(run));
  card.style.setProperty("--colour", colour(index));
  return card;
}

const chosen = new Map(); // which sample of a run is shown, where it isn't the last

function samples(run, index) {
  const card = element("div", "card", element("h2", "", heading("Samples", run)));
  if (!run.samples.length) { card.append(element("p", "quiet", "None was drawn yet.")); return card; }
  const text = element("pre", "sample"), label = element("span", "quiet"), slider = element("input");
  const end = run.samples.length - 1;
  Object.assign(slider, { type: "range", min: 0, max: end, value: Math.min(chosen.get(index) ?? end, end) });
  slider.setAttribute("aria-label", "which sample");
  const show = () => {
    const sample = run.samples[Number(slider.value)];
    label.textContent = `after step ${sample.step.toLocaleString("en")}`;
    text.textContent = sample.text;
  };
  slider.addEventListener("input", () => {
    if (Number(slider.value) === end) chosen.delete(index); else chosen.set(index, Number(slider.value));
    show();
  });
  show();
  card.append(element("div", "picker", slider, label), text);
  return card;
}

function heading(title, run) { return page.runs.length > 1 ? `${title}: ${run.name}` : title; }

function memory(run) { return element("div", "card", element("h2", "", heading("Memory plan of a device", run)), memoryPlan(run.plan)); }

// What gradcheck --as-run found, where it was asked.
function gradients(run) {
  const { gradcheck: found } = run;
  if (!found.tensors) return [];
  const { tensors } = found, wrong = tensors.filter((tensor) => !tensor.passed);
  const right = found.passed && !wrong.length;
  const said = right ? `All ${tensors.length} agree with jax.grad in float64.` : `${wrong.length} of ${tensors.length} are wrong.`;
  const versions = Object.entries(found.versions).map(([name, version]) => `${name} ${version}`);
  const where = [found.when, found.device, found.driver, ...versions].filter(Boolean).join(", ");
  const number = (value) => (value === null ? "not finite" : value.toExponential(1));
  const rows = [...wrong, ...tensors.filter((tensor) => tensor.passed)].map((tensor) => {
    const { error, entry, tolerance, inputs, fault } = tensor;
    const row = element("tr", "", element("th", tensor.passed ? "" : "bad", tensor.tensor));
    row.append(...[number(error), number(entry), number(tolerance), fault ? `${inputs}: ${fault}` : inputs].map((value) => element("td", "", value)));
    return row;
  });
  const titles = ["", "error in norm", "largest error", "allowed", "worst at"].map((title) => element("th", "", title));
  const table = element("table", "", element("thead", "", element("tr", "", ...titles)), element("tbody", "", ...rows));
  const all = element("details", "", element("summary", "", "Each tensor"), element("div", "scroll", table));
  all.open = !right;
  return [element("div", "card", element("h2", "", heading("Gradients on the device", run)), element("p", right ? "" : "bad", said),
    element("p", "quiet", `${found.step}. Compared are ${found.compared}.`), element("p", "quiet", where), all)];
}

// A table of options with a column for each run; what differs between runs comes first and stands out.
function table(tables, title, open) {
  const keys = [...new Set(tables.flatMap((one) => Object.keys(one)))];
  const rows = keys.map((key) => {
    const values = tables.map((one) => (key in one ? show(one[key]) : "–"));
    const row = element("tr", new Set(values).size > 1 ? "differs" : "", element("th", "", key));
    row.append(...values.map((value) => element("td", "", value)));
    return row;
  }).sort((one, other) => other.className.length - one.className.length);
  const body = element("tbody", "", ...rows);
  const head = element("thead", "", element("tr", "", element("th", "", ""), ...page.runs.map((run) => element("th", "", run.name))));
  const made = element("details", "card", element("summary", "", title), element("div", "scroll",
    element("table", "", ...(page.runs.length > 1 ? [head] : []), body)));
  made.open = open;
  return made;
}

function show(value) { return typeof value === "object" ? JSON.stringify(value) : String(value); }

function options(config) {
  return Object.fromEntries(Object.entries(config).flatMap(([section, values]) =>
    Object.entries(values).map(([key, value]) => [`${section}.${key}`, value])));
}

function draw() {
  const { runs } = page;
  const names = runs.map((run) => run.name).join(", ");
  document.title = `${runs.length === 1 && runs[0].steps ? `${Math.floor((100 * runs[0].step) / runs[0].steps)}% ` : ""}${names}`;
  document.getElementById("title").textContent = names;
  document.getElementById("when").textContent = `${page.live ? "live, as of" : "written"} ${when(Math.max(...runs.map((run) => run.written)))}`
    + `; last step ${when(Math.max(...runs.map((run) => run.changed)))}`;
  document.getElementById("hint").textContent = TOUCH ? "tap a curve for its values" : "drag over a curve to zoom, double-click to go back";
  document.getElementById("runs").replaceChildren(...runs.map(summary));
  document.getElementById("details").replaceChildren(...runs.flatMap((run, index) => [samples(run, index), memory(run), ...gradients(run)]));
  const open = [...document.querySelectorAll("#configuration details")].map((one) => one.open);
  const several = runs.length > 1;
  document.getElementById("configuration").replaceChildren(
    table(runs.map((run) => options(run.config)), "Configuration", open[0] ?? several),
    table(runs.map((run) => run.machine), "Machine", open[1] ?? true),
    table(runs.map((run) => run.versions), "Versions", open[2] ?? false));
  drawCurves(runs);
}

async function unpacked(text) {
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

let version = "";

async function news() {
  try {
    const answer = await fetch(`data.json?version=${version}`);
    if (answer.status === 200) {
      const fresh = await answer.json();
      version = fresh.version;
      page.runs = fresh.runs;
      draw();
    } else if (answer.status !== 204) throw new Error(String(answer.status));
  } catch {
    document.getElementById("when").textContent = "the server does not answer; what is shown is the last that it said";
  }
  setTimeout(news, 2000);
}

async function start() {
  const packed = document.getElementById("plotly").textContent;
  if (packed) {
    const script = element("script");
    script.textContent = await unpacked(packed);
    document.head.append(script);
  }
  draw();
  document.body.dataset.drawn = "yes";
  for (const id of ["axis", "logarithmic"]) document.getElementById(id).addEventListener("change", () => drawCurves(page.runs));
  DARK.addEventListener("change", () => drawCurves(page.runs));
  if (page.live) news();
}

start();
