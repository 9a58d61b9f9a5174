// Small helpers that all parts of the page use.

const data = JSON.parse(document.getElementById("data").textContent);
const COLORS = 8; // --c0 to --c7 of page.css

/** An element with attributes (functions are listeners) and children, texts or elements. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** The same for SVG, whose elements have a namespace. */
function drawing(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const byId = (id) => document.getElementById(id);

/** A number in few characters. */
function format(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
  if (Number.isInteger(value)) return value.toLocaleString("en-US");
  return value.toLocaleString("en-US", { maximumSignificantDigits: size < 1 ? 3 : 5 });
}

function formatTokens(value) {
  for (const [size, unit] of [
    [1e12, "T"],
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "k"],
  ]) {
    if (Math.abs(value) >= size) return `${+(value / size).toPrecision(4)}${unit}`;
  }
  return `${+value.toPrecision(4)}`;
}

function formatSeconds(value) {
  if (value < 120) return `${+value.toPrecision(3)} s`;
  if (value < 7200) return `${+(value / 60).toPrecision(3)} min`;
  return `${+(value / 3600).toPrecision(4)} h`;
}

const taskName = (task) => task.replace(/^embedded_/, "").replaceAll("_", " ");
const metricName = (metric) => (metric === "bits_per_byte" ? "bits per byte" : metric);

/** A menu with a label; `choose(value)` is called with the value that is chosen. options: [[value, text]]. */
function menu(label, options, chosen, choose) {
  const select = element("select", { change: () => choose(select.value) });
  for (const [value, text] of options)
    select.append(element("option", { value, selected: `${value}` === `${chosen}` }, text));
  return element("label", {}, label, select);
}

/** A row of buttons of which one is pressed. options: [[value, text]]. */
function choice(label, options, chosen, choose) {
  const group = element("div", { class: "group", role: "group", "aria-label": label });
  for (const [value, text] of options) {
    group.append(
      element(
        "button",
        {
          type: "button",
          "aria-pressed": `${value === chosen}`,
          click: (event) => {
            for (const button of group.children)
              button.setAttribute("aria-pressed", `${button === event.currentTarget}`);
            choose(value);
          },
        },
        text,
      ),
    );
  }
  return element("fieldset", {}, element("legend", {}, label), group);
}

/** A button that is pressed or not. */
function toggle(text, pressed, choose, label = null) {
  const button = element(
    "button",
    {
      type: "button",
      "aria-pressed": `${pressed}`,
      "aria-label": label,
      click: () => {
        const now = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", `${now}`);
        choose(now);
      },
    },
    text,
  );
  return button;
}

/** A table of texts or elements. */
function tableOf(header, rows, label) {
  const head = element("tr", {}, ...header.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell ?? ""))));
  return element(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": label },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)),
  );
}

// ---- work in small pieces, so that the page never stalls ----

const waiting = [];
const channel = new MessageChannel();
const PIECE = 12; // milliseconds

channel.port1.onmessage = () => {
  const begin = performance.now();
  if (waiting.length > 1) channel.port2.postMessage(0);
  while (waiting.length && performance.now() - begin < PIECE) waiting.shift()();
};

/** Call `work` soon, after what waits already. */
function later(work) {
  waiting.push(work);
  channel.port2.postMessage(0);
}

/** A promise that all charts have drawn what was asked of them: for tests. */
window.settled = () => new Promise(later);

// ---- colors, light and dark ----

const probe = document.body.appendChild(element("span", { hidden: true }));
let known = new Map();
const recolored = []; // functions to call when light becomes dark

/** The color of a custom property as it is now; canvases do not know custom properties. */
function color(name) {
  if (!known.has(name)) {
    probe.style.color = `var(${name})`;
    known.set(name, getComputedStyle(probe).color);
  }
  return known.get(name);
}

const seriesColor = (index) => color(`--c${index % COLORS}`);

function recolor() {
  known = new Map();
  for (const redraw of recolored) redraw();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolor);
byId("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const isDark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  recolor();
});
