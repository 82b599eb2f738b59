/* Texts whose contrast to what lies behind them is less than WCAG 2.1 AA asks (1.4.3), with the ratio. */
(() => {
  const linear = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const numbers = (text) => (text.match(/[\d.]+/g) || []).map(Number);
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((value) => linear(value / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let up = node; up; up = up.parentElement) {
      const rgb = numbers(getComputedStyle(up).backgroundColor);
      if (rgb.length === 3 || rgb[3] === 1) return rgb.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const named = (name) => {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return text.match(/\w\w/g).map((value) => parseInt(value, 16));
  };
  const bad = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || node.closest("script, style, noscript, .skip") || !node.getClientRects().length) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const text = numbers(node.closest("svg") ? style.fill : style.color).slice(0, 3);
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const cell = node.closest(".heatmap-label") !== null;
    for (const ground of cell ? [named("--low"), named("--high")] : [behind(node)]) {
      const [high, low] = [luminance(text), luminance(ground)].sort((a, b) => b - a);
      const ratio = (high + 0.05) / (low + 0.05);
      if (ratio < (large ? 3 : 4.5)) bad.push([node.textContent.slice(0, 30), ratio.toFixed(2)]);
    }
  }
  return bad;
})()
