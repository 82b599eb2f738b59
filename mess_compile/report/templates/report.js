const front = data.front, classes = data.classes, costs = data.costs;
let at = front ? front.stops.findIndex((stop) => stop.chosen) : 0;
const shown = () => front.stops[at];
const rates = (stop) => stop.predicted.exit_rates.map(percent).join(", ");

/* ---- the slider and what follows it ---- */
function show(index) {
  at = index;
  const stop = shown(), slider = document.getElementById("stop"), figures = stop.predicted;
  const sentence = `${stop.chosen ? "The chosen plan. " : ""}${ms(figures.latency_ms)} (${speed(stop.latency_ratio)}), `
    + `${figures.miou.toFixed(2)} % mIoU (${signed(-stop.max_err_pp)} pp), images per stage ${rates(stop)}: ${stop.heads}`;
  slider.value = index;
  slider.setAttribute("aria-valuetext", `${stop.max_err}: ${ms(figures.latency_ms)}, ${figures.miou.toFixed(2)} % mIoU`);
  document.getElementById("stop-value").textContent = stop.max_err;
  document.getElementById("shown").textContent = sentence;
  for (const row of document.querySelectorAll("#front-table tr[data-stop]")) {
    if (Number(row.dataset.stop) === index) row.setAttribute("aria-current", "true"); else row.removeAttribute("aria-current");
  }
  showTiles(stop);
  showPoints(stop);
  showCascade(stop);
  if (classes) { showClasses(stop); showSure(stop); }
  for (const drawn of following) drawn();
}

function showTiles(stop) {
  const figures = stop.predicted, baseline = front.baseline;
  const tiles = [
    ["latency, mean", ms(figures.latency_ms), `${speed(stop.latency_ratio)}, ${figures.source}`],
    ["mIoU", figures.miou.toFixed(2) + " %", `${signed(-stop.max_err_pp)} pp vs. the ${baseline.name}`],
    ["workload", figures.gmacs.toFixed(3) + " GMACs", work(stop.workload_ratio)],
    ["p95, worst case", ms(figures.p95_ms), "worst " + ms(figures.worst_ms)],
    ["memory", (figures.memory_bytes / 1048576).toFixed(1) + " MiB", `baseline ${(baseline.memory_bytes / 1048576).toFixed(1)} MiB`],
  ];
  if (figures.energy_mj !== null) tiles.push(["energy", figures.energy_mj.toFixed(1) + " mJ", "mean over images"]);
  document.getElementById("tiles").replaceChildren(...tiles.map(([name, value, more]) => element("div", {},
    element("dt", {}, name), element("dd", {}, value, element("small", {}, more)))));
}

function showPoints(stop) {
  document.getElementById("points-table").replaceChildren(table("Operating points of the plan shown: other thresholds on the same graphs",
    ["", "latency ms", "p95 ms", "mIoU %", "images per stage"], stop.operating_points.map((point) => [point.name,
      point.predicted.latency_ms.toFixed(2), point.predicted.p95_ms.toFixed(2), point.predicted.miou.toFixed(2), point.predicted.exit_rates.map(percent).join(", ")])));
}

/* ---- the front ---- */
const hovered = (stop) => `<b>--max-err ${stop.max_err}</b>${stop.chosen ? ", chosen" : ""}${stop.on_front ? "" : ", not on the front"}<br>${ms(stop.predicted.latency_ms)} ${stop.predicted.source}, `
  + `${stop.predicted.miou.toFixed(2)} % mIoU<br>images per stage ${rates(stop)}<br>${plain(stop.heads)}`;

function frontChart() {
  const stops = front.stops, baseline = front.baseline, point = shown();
  const onPaper = front.paper.map((row) => ({ ...row, x: baseline.latency_ms / row.latency_ratio, y: baseline.miou + row.miou_pp }));
  const marker = (symbol, color, size, more) => ({ symbol, color, size, line: { color, width: 2 }, ...more });
  const dots = (name, points, of, more) => ({ type: "scatter", mode: "markers", name, x: points.map((p) => p.x), y: points.map((p) => p.y),
    text: points.map(of), hovertemplate: "%{text}<extra></extra>", ...more });
  const own = (one) => ({ ...one, x: one.predicted.latency_ms, y: one.predicted.miou });
  const onFront = stops.filter((stop) => stop.on_front), chosen = stops.filter((stop) => stop.chosen).map(own), others = point.operating_points.map(own);
  const traces = [
    { type: "scatter", mode: "lines", showlegend: false, hoverinfo: "skip", line: { color: colour("accent"), width: 1 },
      x: onFront.map((stop) => stop.predicted.latency_ms), y: onFront.map((stop) => stop.predicted.miou) },
    dots("plans", stops.map(own), hovered, { customdata: stops.map((_, i) => i), marker: { ...marker("circle", colour("accent"), 8), symbol: stops.map((stop) => stop.predicted.source === "estimated" ? "circle-open" : "circle") } }),
    dots("operating points", others, (one) => `<b>operating point ${plain(one.name)}</b><br>${ms(one.x)}, ${one.y.toFixed(2)} % mIoU<br>images per stage ${one.predicted.exit_rates.map(percent).join(", ")}`,
      { marker: marker("diamond-open", colour("exit3"), 10) }),
    dots("baseline", [{ x: baseline.latency_ms, y: baseline.miou }], (one) => `<b>${plain(baseline.name)}</b><br>${ms(one.x)}, ${one.y.toFixed(2)} % mIoU`,
      { marker: marker("square", colour("text"), 11) }),
    dots("paper, as ratios", onPaper, (row) => `<b>paper, row ${row.row}</b>: ${row.network} on ${row.device}<br>${row.requirement}<br>${row.latency_ratio.toFixed(2)}x in latency, `
      + `${row.workload_ratio.toFixed(2)}x in workload, ${signed(row.miou_pp)} pp on MS-COCO`, { marker: marker("x-thin-open", colour("quiet"), 9) }),
    dots("chosen plan", chosen, hovered, { customdata: [stops.findIndex((stop) => stop.chosen)], marker: marker("star", colour("chosen"), 15) }),
    dots("plan shown", [own(point)], hovered, { hoverinfo: "skip", hovertemplate: null, marker: marker("circle-open", colour("chosen"), 22, { line: { color: colour("chosen"), width: 3 } }) }),
  ];
  const near = onPaper.filter((row) => row.miou_pp <= 0);
  const all = [...stops.map(own), ...others, { x: baseline.latency_ms, y: baseline.miou }];
  return [traces, {
    height: 440, hovermode: "closest",
    xaxis: { title: { text: "latency, mean over images, ms" }, range: padded([...all, ...near].map((p) => p.x), 0.06) },
    yaxis: { title: { text: "mIoU, %" }, range: padded([...all, ...near].map((p) => p.y), 0.08) },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: baseline.miou, y1: baseline.miou, line: { color: colour("strong-line"), width: 1, dash: "dot" } }],
  }, `Latency against mIoU of ${stops.length} plans, from ${ms(stops.at(-1).predicted.latency_ms)} to ${ms(stops[0].predicted.latency_ms)}; the baseline takes `
    + `${ms(baseline.latency_ms)} for ${baseline.miou.toFixed(2)} % mIoU. All figures are in the tables below.`];
}

function ratesChart() {
  const stops = front.stops, exits = Math.max(...stops.map((stop) => stop.stages.length));
  const traces = [...Array(exits).keys()].map((exit) => ({
    type: "bar", name: `stage ${exit + 1}`, x: stops.map((_, i) => i), y: stops.map((stop) => 100 * (stop.predicted.exit_rates[exit] ?? 0)),
    marker: { color: exitColour(exit), opacity: stops.map((_, i) => i === at ? 1 : 0.45) },
    text: stops.map((stop) => stop.stages[exit] ? plain(stop.stages[exit].head) : ""), textposition: "none",
    customdata: stops.map((stop) => stop.max_err),
    hovertemplate: `stage ${exit + 1}: %{y:.1f} %<br>%{text}<br>--max-err %{customdata}<extra></extra>`,
  }));
  const every = Math.ceil(stops.length / Math.max(2, Math.floor(innerWidth / 120))), marks = stops.map((_, i) => i).filter((i) => i % every === 0);
  return [traces, { barmode: "stack", bargap: 0.1, height: 300,
    xaxis: { title: { text: "--max-err that allows the plan" }, tickvals: marks, ticktext: marks.map((i) => stops[i].max_err) },
    yaxis: { title: { text: "images, %" }, range: [0, 100] },
  }, `Images per stage of the plan shown: ${rates(shown())}. Those of all plans are in the table of plans.`];
}

/* ---- the cascade ---- */
const stageOf = (stage) => { const point = /^exit(\d+)\./.exec(stage.head); return point ? `Stage ${stage.exit} = network exit ${point[1]}` : `Stage ${stage.exit}`; };
const needed = (stage) => stage.sure ? `${(100 * stage.cut / stage.sure.cells).toFixed(1)} % of its cells are confident` : `${stage.cut} cells are confident`;
const ruleOf = (stage) => stage.threshold === null ? `policy ${stage.row}` : `confidence of ${stage.threshold.toFixed(2)} or more`;
const PARTS = [["segment", "accent"], ["head", "exit2"], ["decision", "text"], ["labels", "exit3"]];

function showCascade(stop) {
  const last = stop.stages.at(-1).times, anytime = front.setting === "anytime";
  let start = stop.upload_ms;
  document.getElementById("stages").replaceChildren(...stop.stages.map((stage, index) => {
    const times = stage.times, lines = [["reached by", percent(stage.arriving)]];
    lines.push(["leaves when", stage.cut === null ? (anytime ? "always reports" : "always, it is the last") : `${needed(stage)} (${ruleOf(stage)})`]);
    if (anytime && stop.reports[index]) lines.push(["mIoU by then", stop.reports[index].miou.toFixed(2) + " %"]);
    if (times) {
      lines.push([times.segment, ms(times.segment_ms)], ["head and gate", ms(times.head_ms)]);
      if (times.decision_ms) lines.push(["decision", ms(times.decision_ms)]);
      lines.push(["labels out", ms(times.leave_ms)]);
    }
    const card = element("div", { class: "stage", style: `--stage: var(--exit${index % 3 + 1})` }, element("h3", {}, `${stageOf(stage)}: ${stage.head}`),
      element("dl", {}, element("dt", {}, anytime ? "ends here" : "images leave"), element("dd", { class: "big" }, percent(stage.leaving)),
        ...(times ? [element("dt", {}, "answer after"), element("dd", { class: "big" }, ms(times.done_ms))] : []),
        ...lines.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])));
    if (times) {
      const bar = element("div", { class: "time", "aria-hidden": "true" });
      let from = start;
      [times.segment_ms, times.head_ms, times.decision_ms, times.leave_ms].forEach((length, part) => {
        bar.append(element("span", { style: `left:${100 * from / last.done_ms}%;width:${100 * length / last.done_ms}%;background:var(--${PARTS[part][1]})` }));
        from += length;
      });
      start = anytime ? from : from - times.leave_ms;
      card.append(bar);
    }
    return element("li", {}, river(stage, index), card);
  }));
  document.getElementById("time-legend").replaceChildren(...(last ? PARTS.map(([name, tone]) => element("li", {}, element("span", { style: `background:var(--${tone})` }), name)) : []));
  document.getElementById("cascade-note").textContent = last
    ? `The bars stand on one scale, from the image's arrival to ${ms(last.done_ms)}; upload takes ${ms(stop.upload_ms)}. Means, ${stop.predicted.source}.` : "";
}

/* What arrives comes from the left, what leaves turns down, the rest goes on. In pixels: the band stretches, the bend does not. */
function river(stage, index) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg"), top = 4, full = 36, bottom = 74;
  const on = full * Math.max(stage.arriving - stage.leaving, 0), out = stage.leaving > 0 ? Math.max(full * stage.leaving, 1) : 0, y = top + on;
  const add = (tag, attributes) => { const made = document.createElementNS(space, tag); for (const name in attributes) made.setAttribute(name, attributes[name]); svg.append(made); };
  svg.setAttribute("aria-hidden", "true");
  if (on > 0.01) add("rect", { x: 0, y: top, width: "100%", height: on, fill: "var(--band)" });
  if (out) add("path", { d: `M0 ${y}H40Q${60 + out} ${y} ${60 + out} ${bottom}H60Q60 ${y + out} 40 ${y + out}H0Z`, fill: `var(--exit${index % 3 + 1})` });
  return svg;
}

/* ---- classes and confidence ---- */
function showClasses(stop) {
  const value = (iou) => iou === null || iou === undefined ? "-" : iou.toFixed(2);
  document.getElementById("classes-table").replaceChildren(table("IoU in percent", ["class", front.baseline.name, "plan shown", "difference, pp"],
    classes.names.map((name, i) => [name, value(classes.baseline[i]), value(stop.iou[i]),
      stop.iou[i] === null || stop.iou[i] === undefined ? "-" : signed(stop.iou[i] - classes.baseline[i])])));
}

function classesChart() {
  const stop = shown(), names = classes.names.map(plain);
  const bars = (name, values, color) => ({ type: "bar", orientation: "h", name: plain(name), y: names, x: values, marker: { color }, hovertemplate: "%{y}: %{x:.2f} %<extra>%{fullData.name}</extra>" });
  return [[bars(front.baseline.name, classes.baseline, colour("band")), bars("plan shown", stop.iou, colour("exit1"))], {
    barmode: "group", height: 90 + 34 * names.length, bargap: 0.25,
    xaxis: { title: { text: "IoU, %" }, range: [0, 100] }, yaxis: { autorange: "reversed" },
  }, `IoU of ${names.length} classes, plan and baseline; all figures are in the table below.`];
}

/* Exits whose confidence says something: without an early exit nothing is decided by it. */
const withThresholds = (stop) => stop.stages.length > 1 ? stop.stages.filter((stage) => stage.sure) : [];

function showSure(stop) {
  const host = document.getElementById("sure-charts");
  for (const chart of host.querySelectorAll(".chart")) Plotly.purge(chart);
  const known = withThresholds(stop), none = stop.stages.length === 1 ? "This plan has no early exit, so no image is compared with a threshold." : "There is no current evaluation of this plan's precision.";
  for (const id of ["sure-note", "sure-details"]) document.getElementById(id).hidden = !known.length;
  host.replaceChildren(...(known.length ? known : [null]).map((stage) => stage
    ? element("figure", {}, element("h3", {}, `${stageOf(stage)}: ${stage.head}`), element("div", { class: "chart", id: `sure-${stage.exit}` }))
    : element("p", { class: stop.stages.length === 1 ? "quiet" : "missing" }, none)));
  document.getElementById("sure-tables").replaceChildren(...known.map((stage) => table(
    `Stage ${stage.exit}, images by share of confident cells` + (stage.sure.cut === null ? "" : ` (needs ${(100 * stage.sure.cut).toFixed(1)} %)`),
    ["confident cells", "left here", "went on"],
    stage.sure.left.map((count, i) => [binned(stage.sure, i), count, stage.sure.went_on[i]]).filter((row) => row[1] + row[2]))));
}

const binned = (sure, i) => `${(100 * (sure.start + i * sure.width)).toFixed(1)} to ${(100 * (sure.start + (i + 1) * sure.width)).toFixed(1)} %`;

function drawSure() {
  for (const stage of withThresholds(shown())) {
    const sure = stage.sure, width = 100 * sure.width, x = sure.left.map((_, i) => 100 * sure.start + (i + 0.5) * width), cut = sure.cut === null ? null : 100 * sure.cut;
    const bars = (name, counts, color) => ({ type: "bar", name, x, y: counts, width, text: counts.map((_, i) => binned(sure, i)), textposition: "none",
      marker: { color, line: { color: colour("page"), width: 1 } }, hovertemplate: "%{text}: %{y} images<extra>%{fullData.name}</extra>" });
    const host = document.getElementById(`sure-${stage.exit}`);
    host.setAttribute("role", "img");
    host.setAttribute("aria-label", `Stage ${stage.exit}: images by ${stage.threshold === null ? `the policy ${stage.row}` : `share of cells with a ${ruleOf(stage)}`}` + (cut === null ? "" : ` (needs ${cut.toFixed(1)} %)`));
    Plotly.react(host, [bars("leave here", sure.left, exitColour(stage.exit - 1)), bars("go on", sure.went_on, colour("band"))], styled({
      barmode: "stack", height: 260, xaxis: { title: { text: `confident cells, %` } }, yaxis: { title: { text: "images" } },
      shapes: cut === null ? [] : [{ type: "line", yref: "paper", y0: 0, y1: 1, x0: cut, x1: cut, line: { color: colour("text"), width: 2, dash: "dash" } }],
      annotations: cut === null ? [] : [{ x: cut, yref: "paper", y: 1, yanchor: "bottom", text: `needs ${cut.toFixed(1)} %`, showarrow: false }],
      legend: { orientation: "h", y: -0.35, x: 0, traceorder: "normal" },
    }, host.clientWidth), { displayModeBar: false });
  }
}

/* ---- the latency table ---- */
const told = (cost) => (cost.source === "estimated" ? "≈ " : "") + cost.mean_ms.toFixed(cost.mean_ms < 1 ? 3 : 2);
const sourced = (cost) => cost.source === "estimated" ? "estimated" + (cost.error === null ? "" : `, off by a factor of up to ${cost.error.toFixed(2)}`)
  : "measured" + (cost.shared_with === null ? "" : `, of ${cost.shared_with}`);
const costText = (cost) => `<b>${plain(cost.graph)}</b> (${cost.precision})<br>mean ${ms(cost.mean_ms)}, p99 ${ms(cost.p99_ms)}<br>${plain(sourced(cost))}`;

function segmentsChart() {
  const count = Math.max(...costs.segments.map(([, to]) => to)), ends = [...Array(count).keys()];
  const grid = (of, missing) => ends.map((from) => ends.map((to) => { const one = costs.segments.find(([a, b]) => a === from && b === to + 1); return one ? of(one[2]) : missing; }));
  const estimated = costs.segments.filter(([, , cost]) => cost.source === "estimated");
  return [[{
    type: "heatmap", z: grid((cost) => cost.mean_ms, null), x: ends.map((to) => to + 1), y: ends, text: grid(told, ""), customdata: grid(costText, ""), texttemplate: "%{text}", textfont: { color: colour("text") },
    hovertemplate: "%{customdata}<extra></extra>", hoverongaps: false, xgap: 3, ygap: 3, colorscale: [[0, colour("low")], [1, colour("high")]], colorbar: { title: { text: "ms" }, thickness: 12, outlinewidth: 0 },
  }], {
    height: 110 + 46 * count, xaxis: { title: { text: "to exit point" }, dtick: 1, showgrid: false, zeroline: false }, yaxis: { title: { text: "from" }, dtick: 1, autorange: "reversed", showgrid: false, zeroline: false },
    shapes: estimated.map(([a, b]) => ({ type: "rect", x0: b - 0.46, x1: b + 0.46, y0: a - 0.46, y1: a + 0.46, line: { color: colour("chosen"), width: 2, dash: "dash" } })),
  }, `Latency of ${costs.segments.length} segments, ${estimated.length} of them estimated; all figures are in the table below.`];
}

function headsChart() {
  const heads = costs.heads, names = heads.map((cost) => plain(cost.graph.replace(/^head-/, "")));
  return [[{
    type: "bar", orientation: "h", y: names, x: heads.map((cost) => cost.mean_ms), text: heads.map(told), textposition: "outside", cliponaxis: false,
    customdata: heads.map(costText), hovertemplate: "%{customdata}<extra></extra>",
    marker: { color: colour("accent"), pattern: { shape: heads.map((cost) => cost.source === "estimated" ? "/" : ""), fillmode: "overlay", fgcolor: colour("page"), size: 8 } },
  }], { height: 90 + 24 * heads.length, xaxis: { title: { text: "ms" }, range: [0, 1.2 * Math.max(...heads.map((cost) => cost.mean_ms))] }, yaxis: { autorange: "reversed", tickfont: { size: 11 } } },
  `Latency of ${heads.length} heads, ${heads.filter((cost) => cost.source === "estimated").length} of them estimated; all figures are in the table below.`];
}

/* ---- predicted against measured ---- */
function benchChart(key, title) {
  const columns = data.bench.columns, names = columns.map((column) => column.name === "baseline" ? plain(data.bench.baseline_name) : column.name);
  return () => [[{ type: "bar", x: names, y: columns.map((column) => column[key]), text: columns.map((column) => column[key].toFixed(2)), textposition: "outside", cliponaxis: false,
    marker: { color: columns.map((column) => column.name === "baseline" ? colour("band") : column.name === "measured" ? colour("chosen") : colour("accent")) }, hovertemplate: "%{x}: %{y:.3f}<extra></extra>" }],
  { height: 280, margin: { l: 56, r: 16, t: 28, b: 48 }, yaxis: { title: { text: title }, rangemode: "tozero" } }, `${title}: ` + columns.map((column, i) => `${names[i]} ${column[key].toFixed(2)}`).join(", ")];
}

/* ---- start ---- */
const following = [];
if (front) {
  following.push(drawing("front-chart", frontChart), drawing("rates-chart", ratesChart));
  if (classes) { following.push(drawing("classes-chart", classesChart), drawSure); drawings.push(drawSure); }
  document.getElementById("stop").addEventListener("input", (event) => show(Number(event.target.value)));
  for (const button of document.querySelectorAll("button[data-stop]")) button.addEventListener("click", () => show(Number(button.dataset.stop)));
  document.getElementById("paper-table").replaceChildren(table("The paper's rows on MS-COCO, each against its own baseline", ["row", "latency", "workload", "mIoU, pp", "network", "device", "requirement"],
    front.paper.map((row) => [row.row, row.latency_ratio.toFixed(2) + "x", row.workload_ratio.toFixed(2) + "x", signed(row.miou_pp), row.network, row.device, row.requirement])));
  show(at);
  document.getElementById("front-chart").on("plotly_click", (event) => { const point = event.points.find((one) => one.customdata !== undefined); if (point) show(point.customdata); });
}
if (costs) {
  if (costs.segments.length) drawing("segments-chart", segmentsChart)();
  if (costs.heads.length) drawing("heads-chart", headsChart)();
  document.getElementById("costs-table").replaceChildren(table("Latency table", ["graph", "precision", "mean ms", "p99 ms", "source"],
    [...costs.segments.map(([, , cost]) => cost), ...costs.heads, ...costs.others].map((cost) => [cost.graph, cost.precision, cost.mean_ms.toFixed(3), cost.p99_ms.toFixed(3), sourced(cost)])));
}
if (data.bench) { drawing("bench-latency", benchChart("latency_ms", "latency, ms"))(); drawing("bench-miou", benchChart("miou", "mIoU, %"))(); }
