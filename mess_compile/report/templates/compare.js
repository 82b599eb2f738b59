const plans = data.plans;
const tones = ["exit1", "exit2", "exit3", "accent", "chosen", "quiet"], symbols = ["circle", "triangle-up", "diamond", "cross", "pentagon", "hexagon"];
const tone = (index) => colour(tones[index % tones.length]);
const text = (plan, what, latency, miou) => `<b>${plain(plan.name)}</b>: ${plain(what)}<br>${ms(latency)}, ${miou.toFixed(2)} % mIoU`;

function frontsChart() {
  const traces = plans.flatMap((plan, index) => {
    const small = [...plan.front, ...plan.operating_points].sort((a, b) => a.latency_ms - b.latency_ms), common = { type: "scatter", legendgroup: String(index), hovertemplate: "%{text}<extra></extra>" };
    const at = (figures, what, symbol, size, more) => ({ ...common, mode: "markers", x: [figures.latency_ms], y: [figures.miou], text: [text(plan, what, figures.latency_ms, figures.miou)],
      marker: { symbol, size, color: tone(index) }, ...more });
    return [
      { ...common, mode: "lines+markers", showlegend: false, x: small.map((p) => p.latency_ms), y: small.map((p) => p.miou), text: small.map((p) => text(plan, p.name, p.latency_ms, p.miou)),
        marker: { symbol: symbols[index % symbols.length], size: 6, color: tone(index) }, line: { width: 1, color: tone(index), dash: index % 2 ? "dash" : "solid" } },
      at(plan.baseline, plan.baseline_name, "square", 11, { showlegend: false }),
      at(plan.predicted, plan.heads.join(" → "), "star", 16, { name: plain(plan.name) }),
    ];
  });
  return [traces, { height: 440, hovermode: "closest", xaxis: { title: { text: "latency, mean over images, ms" } }, yaxis: { title: { text: "mIoU, %" } } },
    "Latency against mIoU: " + plans.map((plan) => `${plan.name} ${ms(plan.predicted.latency_ms)}, ${plan.predicted.miou.toFixed(2)} %`).join("; ")];
}

function ratesChart() {
  const exits = Math.max(...plans.map((plan) => plan.heads.length)), names = plans.map((plan) => plain(plan.name));
  const traces = [...Array(exits).keys()].map((exit) => ({ type: "bar", orientation: "h", name: `stage ${exit + 1}`, y: names, x: plans.map((plan) => 100 * (plan.predicted.exit_rates[exit] ?? 0)),
    text: plans.map((plan) => plan.heads[exit] ? plain(plan.heads[exit]) : ""), textposition: "none", marker: { color: exitColour(exit) }, hovertemplate: `stage ${exit + 1}: %{x:.1f} %<br>%{text}<extra></extra>` }));
  return [traces, { barmode: "stack", height: 120 + 36 * plans.length, xaxis: { title: { text: "images, %" }, range: [0, 100] }, yaxis: { autorange: "reversed" } },
    "Images per stage: " + plans.map((plan) => `${plan.name} ${plan.predicted.exit_rates.map(percent).join(", ")}`).join("; ")];
}

drawing("fronts", frontsChart)();
drawing("rates", ratesChart)();
