// Draws the curves with plotly.js.

const COLOURS = ["#4c8bf5", "#f28e2b", "#2ca58d", "#d1495b", "#9b5de5", "#8a8d91", "#c9a227", "#3fb8d9"];
const SECOND = "#f28e2b"; // validation, where there is one run
const TOUCH = matchMedia("(pointer: coarse)").matches;
const DARK = matchMedia("(prefers-color-scheme: dark)");

// plotly.js reads a few tags and entities in names.
function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function colour(index) { return COLOURS[index % COLOURS.length]; }

// [title, unit, what it draws of each run, options]
function charts(runs) {
  const tasks = [...new Set(runs.flatMap((run) => Object.keys(run.tasks)))];
  const several = runs.length > 1;
  const further = [...new Set(runs.flatMap((run) => Object.keys(run.further)))];
  const units = [...new Set(runs.map((run) => run.loss_unit))];
  const of = (name, options = {}) => (run, index) => [line(run, index, name, options)];
  return [
    { id: "loss", title: `Loss, ${units.join(" or ")}`, wide: true, traces: (run, index) => lossTraces(run, index, several) },
    ...further.map((title, number) => ({
      id: `further-${number}`, title, traces: (run, index) => furtherTraces(run, index, title, several),
    })),
    ...tasks.map((task) => ({
      id: `task-${task}`, of: task, title: `${task}, accuracy in %`,
      traces: (run, index) => [curve(run, run.tasks[task] || [[], []], run.name, colour(index), { markers: true })],
    })),
    { id: "norm", title: "Gradient norm", logarithmic: true, traces: normTraces },
    { id: "rate", title: "Learning rate", traces: of("learning_rate") },
    { id: "speed", title: "Tokens per second", traces: of("tokens_per_second"), zero: true },
    { id: "mfu", title: "MFU, % of the device's peak", traces: of("mfu"), zero: true },
    { id: "wait", title: "Waiting for data, % of the step", traces: of("data_wait"), zero: true },
  ];
}

function line(run, index, name, options) { return curve(run, run.curves[name], run.name, colour(index), options); }

function curve(run, [steps, values], name, shade, options = {}) {
  const factor = byTokens() ? run.tokens_per_step : 1;
  return {
    type: "scatter", name: plain(name), x: factor === 1 ? steps : steps.map((step) => step * factor), y: values,
    mode: options.onlyMarks ? "markers" : options.markers ? "lines+markers" : "lines",
    line: { color: shade, width: options.width || 1.6, dash: options.dash || "solid" },
    marker: { color: shade, size: options.onlyMarks ? 9 : 6, symbol: options.symbol || "circle" },
    opacity: options.opacity || 1, hoverinfo: options.silent ? "skip" : "all",
  };
}

function lossTraces(run, index, several) {
  const { loss, loss_smoothed: smoothed, validation } = run.curves;
  return trainAndValidation(run, index, several, [loss, smoothed, validation]);
}

// An objective's own metric, such as the share of pairs in the right order.
function furtherTraces(run, index, title, several) {
  const curves = run.further[title];
  return curves ? trainAndValidation(run, index, several, curves) : [];
}

function trainAndValidation(run, index, several, [each, train, validation]) {
  const shade = colour(index);
  if (several) {
    return [
      curve(run, train, `${run.name}, train`, shade, { width: 1.4, opacity: 0.65 }),
      curve(run, validation, `${run.name}, validation`, shade, { markers: true, dash: "dot", width: 2 }),
    ];
  }
  return [
    curve(run, each, "train, each step", shade, { width: 1, opacity: 0.35 }),
    curve(run, train, "train, smoothed", shade, { width: 2 }),
    curve(run, validation, "validation", SECOND, { markers: true, width: 2 }),
  ];
}

function normTraces(run, index) {
  const marks = curve(run, run.curves.skipped, "skipped", "#d1495b", { onlyMarks: true, symbol: "x" });
  return [line(run, index, "grad_norm", { width: 1.2 }), ...(marks.x.length ? [marks] : [])];
}

function byTokens() { return document.getElementById("axis").value === "tokens"; }

// A line across the chart at a published result, once for all runs that ask for it.
function baselines(runs, wanted) {
  const found = new Map(runs.flatMap((run) => run.baselines).filter((one) => one.of === wanted)
    .map((one) => [one.name, one.value]));
  return [...found].map(([name, value]) => ({ name, value }));
}

function layout(chart, runs, traces, small) {
  const style = getComputedStyle(document.documentElement);
  const read = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: read("--line"), zerolinecolor: read("--line"), automargin: true, color: read("--quiet") };
  const lines = baselines(runs, chart.of || chart.id);
  const logarithmic = chart.logarithmic || (chart.id === "loss" && document.getElementById("logarithmic").checked);
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: byTokens() ? "tokens" : "steps",
    font: { color: read("--ink"), size: 12 }, margin: { l: 46, r: 14, t: 30, b: 34 }, hovermode: "x unified",
    hoverlabel: { bgcolor: read("--card"), bordercolor: read("--line"), font: { color: read("--ink") } },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: read("--quiet"), activecolor: read("--accent") },
    dragmode: TOUCH ? false : "zoom", showlegend: traces > 1,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: small ? 10 : 12 } },
    xaxis: { ...axis, title: { text: byTokens() ? "tokens" : "step", standoff: 4 }, hoverformat: ",.4~s" },
    yaxis: {
      ...axis, type: logarithmic ? "log" : "linear", rangemode: chart.zero ? "tozero" : "normal", uirevision: logarithmic,
      ...(chart.id === "rate" ? { exponentformat: "e" } : {}),
      ...(logarithmic ? { dtick: "D2", minexponent: 2 } : {}),
    },
    shapes: lines.map((one) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: one.value, y1: one.value,
      line: { color: read("--quiet"), width: 1.2, dash: "dash" },
    })),
    annotations: lines.map((one) => ({
      xref: "paper", x: 0, xanchor: "left", y: logarithmic ? Math.log10(one.value) : one.value, yanchor: "bottom",
      showarrow: false, text: plain(`${one.name}: ${Number(one.value.toPrecision(4))}`), font: { size: 11, color: read("--quiet") },
    })),
  };
}

const OPTIONS = {
  responsive: true, displaylogo: false, displayModeBar: TOUCH ? true : "hover", scrollZoom: false, showTips: false,
  modeBarButtons: [["zoomIn2d", "zoomOut2d", "pan2d", "resetScale2d"]],
};

// Draws, or draws again, every chart that has a point in it. Zooming into one shows the same steps in all.
function drawCurves(runs) {
  const place = document.getElementById("curves");
  if (!window.Plotly) {
    place.replaceChildren(element("p", "card", "There are no curves, because plotly was not installed where this page was " +
      "written: pip install plotly, then python run.py report and the run's folder."));
    return;
  }
  for (const chart of charts(runs)) {
    const traces = runs.flatMap(chart.traces).filter((trace) => trace.y.some((value) => value !== null));
    let card = document.getElementById(`card-${chart.id}`);
    if (!traces.length) { if (card) card.remove(); continue; }
    if (!card) {
      const plot = element("div", "plot");
      card = element("div", `card${chart.wide ? " wide" : ""}`, element("h2", "", chart.title), plot);
      card.id = `card-${chart.id}`;
      place.append(card);
    }
    const plot = card.lastChild;
    const fresh = !plot.data;
    Plotly.react(plot, traces, layout(chart, runs, traces.length, innerWidth < 700), OPTIONS);
    if (fresh) plot.on("plotly_relayout", (change) => follow(plot, change));
  }
}

let following = false;

function follow(source, change) {
  const range = change["xaxis.range[0]"] !== undefined;
  if (following || !(range || change["xaxis.autorange"])) return;
  following = true;
  const wanted = range ? { "xaxis.range": [change["xaxis.range[0]"], change["xaxis.range[1]"]] } : { "xaxis.autorange": true };
  const others = [...document.querySelectorAll(".plot")].filter((plot) => plot !== source);
  Promise.all(others.map((plot) => Plotly.relayout(plot, wanted))).finally(() => { following = false; });
}
