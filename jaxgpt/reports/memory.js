// Makes the elements of every part of the page, and draws the memory plan.

// Returns an element with text or other elements in it. Text is set as text: what a run wrote can't become markup.
function element(tag, classes, ...content) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  made.append(...content.map((part) => (part instanceof Node ? part : String(part))));
  return made;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (Math.abs(count) >= 1024 && unit < units.length - 1) { count /= 1024; unit += 1; }
  return `${count.toFixed(unit && Math.abs(count) < 100 ? 1 : 0)} ${units[unit]}`;
}

const PARTS = ["#4c8bf5", "#8fb8ff", "#8a8d91", "#f28e2b", "#ffc078", "#2ca58d", "#8fd3c4", "#9b5de5", "#d1495b"];

function memoryPlan(plan) {
  if (!plan.parts) return element("p", "quiet", "This run's folder has no memory plan.");
  const parts = Object.entries(plan.parts).filter(([, size]) => size !== 0);
  const positive = parts.reduce((sum, [, size]) => sum + Math.max(0, size), 0);
  // Against the device's memory where that can be seen; a tiny model on a large device would be no bar at all.
  const visible = plan.capacity && positive > 0.05 * plan.capacity;
  const whole = visible ? Math.max(plan.capacity, positive) : positive;
  const bar = element("div", "bar");
  const legend = element("ul", "parts");
  parts.forEach(([name, size], index) => {
    const colour = size > 0 ? PARTS[index % PARTS.length] : "transparent";
    if (size > 0) {
      const piece = element("div");
      piece.style.cssText = `width:${(100 * size) / whole}%;background:${colour}`;
      piece.title = `${name}: ${bytes(size)}`;
      bar.append(piece);
    }
    const mark = element("span");
    mark.style.background = colour;
    legend.append(element("li", "", mark, element("span", "", name), element("span", "", bytes(size))));
  });
  const share = plan.capacity ? `, ${((100 * plan.total) / plan.capacity).toPrecision(2)}% of ${bytes(plan.capacity)}` : "";
  const scale = plan.capacity && !visible ? " The bar is what the run needs." : "";
  const words = `${bytes(plan.total)}${share} (${plan.source}), recompute = ${plan.recompute}.${visible ? " Grey is free." : scale}`;
  return element("div", "", bar, legend, element("p", "quiet", words));
}
