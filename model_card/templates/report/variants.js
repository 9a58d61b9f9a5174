// Values with their intervals, one a row: variants of prompts, and the differences of a study.

/** A table of rows {label, numbers: [value, low, high], text, seeds, isFactor, isClear}; `zero` is drawn as a line. */
function forest(rows, zero = 0) {
  const every = rows
    .flatMap((row) => [...(row.numbers || []).slice(0, 3), ...(row.seeds || [])])
    .filter((value) => value !== null && value !== undefined);
  if (zero !== null) every.push(zero);
  const [low, high] = [Math.min(...every), Math.max(...every)];
  const span = high - low || 1;
  const at = (value) => `${(3 + 94 * ((value - low) / span)).toFixed(2)}%`;
  const lines = rows.map((row) => {
    if (row.isFactor)
      return element("tr", { class: "factor" }, element("td", {}, row.label), element("td", { colspan: 2 }, row.text));
    const picture = drawing("svg", { "aria-hidden": "true" });
    if (zero !== null) picture.append(drawing("line", { class: "zero", x1: at(zero), x2: at(zero), y1: 0, y2: 16 }));
    const [value, from, to] = row.numbers;
    if (from !== null && from !== undefined)
      picture.append(drawing("line", { class: "interval", x1: at(from), x2: at(to), y1: 8, y2: 8 }));
    for (const seed of row.seeds || [])
      if (seed !== null) picture.append(drawing("circle", { class: "seed", cx: at(seed), cy: 8, r: 2 }));
    if (value !== null && value !== undefined)
      picture.append(drawing("circle", { class: "point", cx: at(value), cy: 8, r: 4 }));
    return element(
      "tr",
      { class: row.isClear ? "clear" : "" },
      element("td", {}, row.label),
      element("td", {}, picture),
      element("td", {}, row.text),
    );
  });
  return element(
    "table",
    { class: "forest" },
    element("colgroup", {}, element("col", { class: "label" }), element("col"), element("col", { class: "text" })),
    element("tbody", {}, ...lines),
  );
}

const signed = (value) =>
  value === null ? "–" : `${value > 0 ? "+" : value < 0 ? "−" : ""}${Math.abs(value).toFixed(3)}`;

function showVariants() {
  const kinds = [
    ["sensitivity", "other prompts"],
    ["robustness", "perturbed questions"],
  ];
  const found = kinds.flatMap(([kind, text]) =>
    (data.evaluations || []).flatMap((evaluation) => evaluation[kind].map((part) => ({ kind, text, ...part }))),
  );
  if (!found.length) return;
  const section = byId("variants");
  section.hidden = false;
  section.append(
    element(
      "p",
      { class: "note" },
      "The same items with other wordings, formats and orders, or with typing errors, other case and spacing, or an unrelated sentence: the change of the score against the reference prompt, with its 95 % interval over items. “Blind” is what random answers would give.",
    ),
  );
  const tools = element("div", { class: "tools" });
  const body = element("div");
  section.append(tools, body);
  let [at, factor, sort] = [0, "all", "as asked"];
  const update = () => body.replaceChildren(...variantTable(found[at], factor, sort));
  const controls = () => {
    const factors = found[at].factors.map((one) => one.factor).filter((name) => name !== "all");
    tools.replaceChildren(
      menu(
        "what",
        found.map((part, index) => [index, `${taskName(part.task)}, ${part.text} (${part.model})`]),
        at,
        (index) => {
          at = +index;
          factor = "all";
          controls();
          update();
        },
      ),
      menu("factor", [["all", "all"], ...factors.map((name) => [name, name])], factor, (name) => {
        factor = name;
        update();
      }),
      menu(
        "sorted",
        [
          ["as asked", "as asked"],
          ["change", "by change"],
        ],
        sort,
        (name) => {
          sort = name;
          update();
        },
      ),
    );
  };
  controls();
  update();
}

function variantTable(part, factor, sort) {
  const measure = (one, name) =>
    one?.[name]
      ? `${format(one[name][0])}${one[name][1] === null ? "" : ` (${format(one[name][1])} to ${format(one[name][2])})`}${one[name][3] === null ? "" : `; random ${format(one[name][3])}`}`
      : "–";
  const summaryOf = (one) =>
    `${one.k} prompts, mean ${measure(one, "mean")}; spread ${measure(one, "spread")}${one.p === null ? "" : ` (equally good prompts differ as much with p ${format(one.p)})`}; items right with every prompt ${measure(one, "worst_of_k")}; answers that change ${measure(one, "flips")}`;
  const whole = part.factors.find((one) => one.factor === "all");
  const rows = part.factors
    .filter((one) => one.factor !== "all" && (factor === "all" || one.factor === factor))
    .flatMap((one) => {
      const changes = one.changes.map(([label, value, low, high]) => ({
        label,
        numbers: [value, low, high],
        isClear: low !== null && (low > 0 || high < 0),
        text: `${signed(value)}${low === null ? "" : ` (${signed(low)} to ${signed(high)})`}`,
      }));
      if (sort === "change") changes.sort((a, b) => a.numbers[0] - b.numbers[0]);
      return [{ isFactor: true, label: one.factor, text: `answers that change ${measure(one, "flips")}` }, ...changes];
    });
  return [
    element(
      "p",
      { class: "summary" },
      `${taskName(part.task)}, ${part.metric}, ${part.items} items, ${part.model}${whole ? `: ${summaryOf(whole)}` : ""}`,
    ),
    forest(rows),
  ];
}

// ---- studies ----

function showDifferences() {
  if (!byId("differences")) return;
  const section = byId("differences");
  section.append(
    element(
      "p",
      { class: "note" },
      "Each row is an arm minus the arm that it is compared with, at equal tokens: the mean over seeds with its 95 % interval, and the seeds as small points. Orange: differs, after the correction of the report below.",
    ),
  );
  const whats = [...new Set(data.differences.map((row) => row.what))];
  const body = element("div");
  const show = (what) =>
    body.replaceChildren(
      forest(
        data.differences
          .filter((row) => row.what === what)
          .map((row) => ({
            label: `${row.arm} − ${row.against}`,
            numbers: row.numbers,
            seeds: row.seeds,
            text: row.words,
            isClear: row.differs,
          })),
      ),
    );
  if (whats.length > 1)
    section.append(
      element(
        "div",
        { class: "tools" },
        menu(
          "outcome",
          whats.map((what) => [what, what]),
          whats[0],
          show,
        ),
      ),
    );
  section.append(body);
  show(whats[0]);
}
