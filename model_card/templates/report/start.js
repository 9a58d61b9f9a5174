// Everything in the order of the page; one part that fails leaves the others.

for (const show of [
  showCurves,
  showEvents,
  showSamples,
  showScores,
  showItems,
  showCalibration,
  showVariants,
  showDifferences,
])
  later(show);
later(() => {
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    byId("sections").append(element("li", {}, element("a", { href: `#${section.id}` }, section.dataset.title)));
  }
  document.body.dataset.ready = "yes";
});
