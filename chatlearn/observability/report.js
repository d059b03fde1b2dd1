"use strict";
// Shows the values under the pointer; the curves themselves are there without it.
const WIDTH = 460, LEFT = 46, RIGHT = 12;
const tip = document.body.appendChild(Object.assign(document.createElement("div"), { className: "tip" }));
for (const figure of document.querySelectorAll("figure.chart")) {
  const data = JSON.parse(figure.dataset.chart), svg = figure.querySelector("svg");
  const cross = figure.querySelector(".cross"), [low, high] = data.range;
  const toPixel = (x) => LEFT + ((x - low) / (high - low || 1)) * (WIDTH - LEFT - RIGHT);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    let best = data.x[0];
    for (const x of data.x) if (Math.abs(toPixel(x) - at) < Math.abs(toPixel(best) - at)) best = x;
    cross.setAttribute("transform", `translate(${toPixel(best)} 0)`);
    figure.classList.add("hover");
    tip.replaceChildren(`episode ${best}`);
    for (const series of data.series) {
      const value = series.points[String(best)];
      if (value === undefined) continue;
      const row = document.createElement("div"), key = document.createElement("i");
      key.className = `c${series.colour}`;
      const strong = Object.assign(document.createElement("b"), { textContent: value });
      row.append(key, `${series.label} `, strong);
      tip.append(row);
    }
    tip.style.display = "block";
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${left + scrollX}px`;
    tip.style.top = `${event.clientY + scrollY + 14}px`;
  });
  svg.addEventListener("pointerleave", () => {
    figure.classList.remove("hover");
    tip.style.display = "none";
  });
}
