"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const drawings = [];

function colour(name) { return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim(); }

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function plain(text) { return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); }

const ms = (value) => value.toFixed(value < 1 ? 3 : 2) + " ms";
/* As search/display.py says it: what takes 1 / `ratio` of the time (or work). */
function compared(ratio, better, worse, equal) {
  if (Math.abs(ratio - 1) < 0.005) return equal;
  const more = 100 * (1 / ratio - 1);
  return ratio > 1 ? ratio.toFixed(2) + "x " + better : more.toFixed(more >= 1 ? 0 : 1) + " % " + worse;
}
const speed = (ratio) => compared(ratio, "faster", "slower", "as fast");
const work = (ratio) => compared(ratio, "less work", "more work", "as much work");
const percent = (share) => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const exitColour = (index) => colour("exit" + (index % 3 + 1));

/* Draw into the element `id`, now and whenever theme or width change; `make` gives [traces, layout, description]. */
function drawing(id, make) {
  const drawn = () => {
    const host = document.getElementById(id);
    const [traces, layout, described] = make();
    host.setAttribute("role", "img");
    host.setAttribute("aria-label", described);
    Plotly.react(host, traces, styled(layout, host.clientWidth), { displayModeBar: false });
    document.getElementById("js-plotly-tester").setAttribute("aria-hidden", "true");
  };
  drawings.push(drawn);
  return drawn;
}

function styled(layout, width) {
  const axis = { gridcolor: colour("line"), linecolor: colour("strong-line"), zerolinecolor: colour("line"), automargin: true };
  const ready = {
    width: Math.max(width, 240), height: 320, margin: { l: 56, r: 16, t: 16, b: 48 }, dragmode: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("text"), size: 13, family: "system-ui, sans-serif" },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("strong-line"), font: { color: colour("text") }, align: "left" },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" },
    ...layout,
  };
  for (const name of Object.keys(ready).filter((key) => /^[xy]axis/.test(key))) ready[name] = { ...axis, fixedrange: true, ...ready[name] };
  return ready;
}

function redraw() { for (const drawn of drawings) drawn(); }

function table(caption, header, rows) {
  const cells = (tag, row, scope) => row.map((cell, i) => element(i ? tag : "th", i && tag === "td" ? {} : { scope }, String(cell)));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, element("table", {},
    element("caption", {}, caption),
    element("thead", {}, element("tr", {}, ...cells("th", header, "col"))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...cells("td", row, "row"))))));
}

function padded(values, share) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * share;
  return [low - room, high + room];
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
let lastWidth = innerWidth;
addEventListener("resize", () => { if (innerWidth !== lastWidth) { lastWidth = innerWidth; redraw(); } });
addEventListener("beforeprint", () => { document.documentElement.classList.add("printing"); redraw(); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("printing"); redraw(); });
