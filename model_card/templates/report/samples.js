// What the model wrote at each evaluation, or before and after tuning, side by side.

function showSamples() {
  const runs = (data.runs || []).filter((run) => run.samples?.length);
  if (!runs.length) return;
  const section = byId("samples");
  section.hidden = false;
  if (runs.every((run) => run.samples.every((sample) => sample.isAnswer)))
    section.querySelector("h2").textContent = "Answers before and after tuning";
  const count = Math.max(...runs.map((run) => Math.max(...run.samples.map((sample) => sample.texts.length))));
  const prompts = runs[0].prompts;
  const body = element("div");
  const options = [...Array(count).keys()].map((index) => [
    index,
    prompts[index] ? `“${prompts[index]}”` : `prompt ${index + 1}`,
  ]);
  const control = options.some(([, text]) => text.length > 40) || count > 6 ? menu : choice;
  if (count > 1)
    section.append(
      element(
        "div",
        { class: "tools" },
        control("prompt", options, 0, (index) => strips(runs, +index, body)),
      ),
    );
  section.append(body);
  strips(runs, 0, body);
}

function strips(runs, index, body) {
  body.replaceChildren(
    ...runs.flatMap((run) => {
      const cards = run.samples
        .filter((sample) => sample.texts[index] !== undefined)
        .map((sample) => {
          const where = [
            sample.tokens === null ? null : `${formatTokens(sample.tokens)} tokens`,
            sample.loss === null ? null : `validation loss ${sample.loss.toFixed(3)}`,
          ];
          return element(
            "article",
            { class: "sample" },
            element(runs.length > 1 ? "h4" : "h3", {}, sample.title ?? `step ${sample.step.toLocaleString("en-US")}`),
            element("p", { class: "note" }, where.filter(Boolean).join(" · ")),
            written(sample.texts[index], run.prompts?.[index], sample.isAnswer),
          );
        });
      const strip = element(
        "div",
        { class: "strip", tabindex: 0, role: "region", "aria-label": `samples of ${run.name} along training` },
        ...cards,
      );
      return runs.length > 1 ? [element("h3", {}, run.name), strip] : [strip];
    }),
  );
}

/** A text with the prompt that it continues, or answers, in bold. */
function written(text, prompt, isAnswer) {
  if (isAnswer) return element("pre", {}, element("b", {}, prompt), `\n\n${text || "(nothing)"}`);
  if (!prompt || !text.startsWith(prompt)) return element("pre", {}, text);
  return element("pre", {}, element("b", {}, prompt), text.slice(prompt.length));
}
