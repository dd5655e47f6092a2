// What `report --interactive` adds to the page: tables that sort, a search in the stages, values of curves where one points.
// All of it only rearranges what the page says already.
"use strict";

const make = (name, properties) => Object.assign(document.createElement(name), properties);

// A cell as a number, where it begins with one; `data-value` goes before what is written.
const value = cell => parseFloat(cell?.dataset.value ?? cell?.textContent.replaceAll(",", "").replace("\u2212", "-"));

const compare = column => (one, other) => {
  const [a, b] = [one, other].map(row => row.cells[column]);
  const [x, y] = [a, b].map(value);
  if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  // Numbers before words, words before nothing.
  if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1;
  return a.textContent.localeCompare(b.textContent, "en", { numeric: true });
};

for (const table of document.querySelectorAll("main table")) {
  const headings = [...(table.tHead?.rows[0]?.cells ?? [])];
  if (![...table.tBodies].some(body => body.rows.length > 2)) continue;
  headings.forEach((heading, column) => {
    const button = make("button", { type: "button", className: "sort" });
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const falls = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", falls ? "descending" : "ascending");
      for (const body of table.tBodies) {
        const rows = [...body.rows].sort(compare(column));
        body.append(...(falls ? rows.reverse() : rows));
      }
    });
  });
}

const stages = document.querySelector("#stages table");
if (stages && stages.rows.length > 8) {
  const search = make("input", { type: "search", placeholder: "Search the stages" });
  search.setAttribute("aria-label", "Show the stages that contain");
  const look = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of stages.tBodies[0].rows) {
      // Name, kind, state, time and key; the name of the file is in every command.
      const text = [...row.cells].slice(0, 5).map(cell => cell.textContent).join(" ").toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
    }
  };
  search.addEventListener("input", look);
  // Whoever follows a link to a stage wants to see it.
  addEventListener("hashchange", () => {
    const row = document.getElementById(location.hash.slice(1));
    if (row?.hidden) {
      search.value = "";
      look();
      row.scrollIntoView();
    }
  });
  stages.closest(".wide").before(search);
}

// From pixels of an axis back to its numbers: `from to low high`, and `log`.
const scale = text => {
  const [from, to, low, high] = text.split(" ").map(Number);
  const inverse = at => (at - from) / (to - from);
  return text.endsWith("log")
    ? at => low * (high / low) ** inverse(at)
    : at => low + (high - low) * inverse(at);
};

// The corners of a path of `M` and `l`.
const corners = path => {
  let [x, y] = [0, 0];
  return [...(path?.getAttribute("d") ?? "").matchAll(/([Ml])(-?\d*\.?\d+) ?(-?\d*\.?\d+)/g)].map(([, step, right, down]) => {
    [x, y] = step === "M" ? [+right, +down] : [x + +right, y + +down];
    return { x, y };
  });
};

const nearest = (points, x) =>
  points.reduce((best, point) => (best && Math.abs(best.x - x) <= Math.abs(point.x - x) ? best : point), undefined);

// A tenth of a pixel is what a curve is known to.
const round = (number, digits) => String(Number(number.toPrecision(digits)));

for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [across, up] = [scale(svg.dataset.x), scale(svg.dataset.y)];
  const names = [...svg.closest("figure").querySelectorAll("thead th")].map(heading => heading.textContent);
  const series = [...svg.querySelectorAll("g")].filter(group => group.querySelector(":scope > title"));
  const curves = series.map((group, index) => ({ name: names[index + 1], points: corners(group.querySelector(".line")) }));
  const places = [...new Set(curves.flatMap(curve => curve.points.map(point => point.x)))].sort((a, b) => a - b);
  if (places.length === 0) continue;
  const reading = make("p", { className: "reading", textContent: "\u00a0" });
  reading.setAttribute("aria-live", "polite");
  svg.after(reading);
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "mark");
  svg.append(rule);
  const [bottom, top] = svg.dataset.y.split(" ");
  let shown = -1;
  const show = index => {
    shown = index;
    const x = places[index];
    rule.setAttribute("d", x === undefined ? "" : `M${x} ${top}V${bottom}`);
    const said = curves.map(({ name, points }) => [name, nearest(points, x)]);
    const close = said.filter(([, point]) => point && Math.abs(point.x - x) < 2);
    reading.textContent = x === undefined
      ? "\u00a0"
      : `${names[0]} ${round(across(x), 4)}: ${close.map(([name, point]) => `${name} ${round(up(point.y), 3)}`).join(", ")}`;
  };
  svg.tabIndex = 0;
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    show(places.indexOf(nearest(places.map(x => ({ x })), x).x));
  });
  svg.addEventListener("pointerleave", () => show(-1));
  svg.addEventListener("blur", () => show(-1));
  svg.addEventListener("keydown", event => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -places.length, End: places.length };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(Math.max(0, Math.min(places.length - 1, shown + steps[event.key])));
  });
}
