// Draws the sections of a report from the page's data. All texts are set as text, never as HTML.
"use strict";

const contents = JSON.parse(document.getElementById("data").textContent);
const tensors = contents.tensors.map((tensor, place) => ({
  ...tensor,
  place,
  kind: tensor.weight ? "weight" : "activation",
  chosen: false,
}));
const redraw = [];
let chosen = tensors.reduce((a, b) => (a && a.kl_in_context >= b.kl_in_context ? a : b), null);

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function section(title, ...children) {
  document.getElementById("page").append(element("section", {}, element("h2", {}, title), ...children.filter((child) => child !== null)));
}

function shown(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(digits)));
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const percent = (value) => (value === null || value === undefined ? "–" : `${shown(100 * value)} %`);

// A chart that is drawn again when the page changes between light and dark, or another tensor is chosen.
function chart(describe, caption, clicked) {
  const place = element("div", { class: "chart" });
  const draw = async () => {
    const made = await vegaEmbed(place, describe(), { actions: false, renderer: "svg" });
    if (clicked) made.view.addEventListener("click", (_, item) => item && item.datum && clicked(item.datum));
  };
  redraw.push(draw);
  return element("figure", {}, element("figcaption", {}, caption), place);
}

function drawAll() {
  for (const tensor of tensors) tensor.chosen = chosen !== null && tensor.place === chosen.place;
  return Promise.all(redraw.map((draw) => draw()));
}

function head() {
  const facts = element("dl", { class: "facts" });
  for (const [name, value] of Object.entries(contents.facts))
    facts.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  document.title = contents.title;
  document
    .getElementById("page")
    .append(element("h1", {}, contents.title), element("p", { class: "verdict" }, contents.verdict), facts);
}

function findings() {
  if (!contents.findings.length) return;
  const made = contents.findings.map((finding, number) => {
    const brought = finding.recovered === null ? "" : `, takes away ${percent(finding.recovered)} of the damage`;
    const tried = finding.tried
      .filter((trial) => trial.recovered !== null)
      .map((trial) => `${trial.remedy} ${percent(trial.recovered)}`);
    return element(
      "article",
      { class: "finding" },
      element("h3", {}, `${number + 1}. ${capital(finding.cause)}: ${finding.where}`),
      element("p", {}, finding.evidence),
      element("p", {}, `Remedy: ${finding.remedy}${brought}.`),
      finding.paste ? element("pre", {}, finding.paste) : null,
      finding.further ? element("p", {}, `${finding.further}.`) : null,
      tried.length > 1 ? element("p", { class: "quiet" }, `Tried: ${tried.join(", ")}.`) : null,
    );
  });
  section("Findings", ...made);
}

const COLUMNS = [
  ["tensor", (t) => t.name, (t) => t.name],
  ["kind", (t) => t.kind, (t) => t.kind],
  ["bits", (t) => t.bits, (t) => shown(t.bits)],
  ["harm in context", (t) => t.kl_in_context, (t) => shown(t.kl_in_context)],
  ["harm alone", (t) => t.kl_alone, (t) => shown(t.kl_alone)],
  ["SQNR, dB", (t) => t.sqnr, (t) => shown(t.sqnr)],
  ["SQNR of outputs, dB", (t) => t.sqnr_of_outputs, (t) => shown(t.sqnr_of_outputs)],
  ["clipped", (t) => t.clipped_share, (t) => percent(t.clipped_share)],
  ["become 0", (t) => t.vanished_share, (t) => percent(t.vanished_share)],
  ["unused levels", (t) => t.dead_levels, (t) => percent(t.dead_levels)],
  ["worst channels", (t) => (t.worst_channels[0] || [0, null])[1], (t) => t.worst_channels.map((c) => `${c[0]} (${shown(c[1], 2)} dB)`).join(", ")],
];

function tensorTable() {
  const body = element("tbody", {});
  const headers = COLUMNS.map(([title], column) =>
    element("th", { scope: "col" }, element("button", { type: "button", onclick: () => sort(column) }, title)),
  );
  let sorted = { column: 3, ascending: false };
  const fill = () => {
    const value = COLUMNS[sorted.column][1];
    const rows = [...tensors].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (sorted.ascending ? 1 : -1);
    });
    body.replaceChildren(
      ...rows.map((tensor) => {
        const choice = { class: `choice${tensor === chosen ? " chosen" : ""}`, tabindex: "0" };
        const choose_it = () => choose(tensor);
        return element(
          "tr",
          { ...choice, onclick: choose_it, onkeydown: (event) => event.key === "Enter" && choose_it() },
          ...COLUMNS.map(([, , text], column) => element("td", column ? {} : { title: tensor.name }, text(tensor))),
        );
      }),
    );
    headers.forEach((header, column) =>
      header.setAttribute("aria-sort", column !== sorted.column ? "none" : sorted.ascending ? "ascending" : "descending"),
    );
  };
  const sort = (column) => {
    sorted = { column, ascending: column === sorted.column ? !sorted.ascending : column < 2 };
    fill();
  };
  redraw.push(async () => fill());
  return element("div", { class: "scroll" }, element("table", {}, element("thead", {}, element("tr", {}, ...headers)), body));
}

function choose(tensor) {
  chosen = tensors[tensor.place];
  drawAll();
}

function network() {
  if (!tensors.length) return;
  const charts = [
    ["kl_in_context", "harm in context", "Harm: what the answers gain where this tensor alone is raised"],
    ["sqnr", "SQNR, dB", "Signal-to-quantization-noise ratio at the tensor"],
    ["bits", "bits", "Bits"],
  ].map(([field, title, caption]) => chart(() => depthChart(tensors, field, title), caption, (datum) => datum.place !== undefined && choose(datum)));
  section("The network from input to output", ...charts);
  section("Tensors", tensorTable());
  const select = element("select", { id: "tensor", onchange: (event) => choose(tensors[Number(event.target.value)]) });
  select.append(...tensors.map((t) => element("option", { value: String(t.place) }, `${t.name}${t.weight ? " (weight)" : ""}`)));
  const facts = element("p", { class: "quiet" });
  redraw.push(async () => {
    select.value = String(chosen.place);
    facts.textContent = `${chosen.scheme}; grid from ${shown(chosen.low)} to ${shown(chosen.high)}, values from ${shown(chosen.smallest)} to ${shown(chosen.largest)}; ${percent(chosen.clipped_share)} clipped, ${percent(chosen.vanished_share)} become 0, ${percent(chosen.dead_levels)} of the levels unused.`;
  });
  section(
    "One tensor",
    element("label", { for: "tensor" }, "Tensor ", select),
    facts,
    element(
      "div",
      { class: "pair" },
      chart(() => histogramChart(chosen), "Values, with the grid's integers as thin and its ends as thick lines"),
      chart(() => channelChart(chosen), "Largest magnitude of each channel"),
    ),
  );
}

function bars() {
  const present = (values) => Object.keys(values).length > 0;
  const made = [];
  if (present(contents.accuracy)) made.push(chart(() => namedBars(contents.accuracy, "accuracy"), "Accuracy"));
  if (present(contents.latency)) made.push(chart(() => namedBars(contents.latency, "ms"), "Latency"));
  if (present(contents.sizes)) {
    const megabytes = Object.fromEntries(Object.entries(contents.sizes).map(([name, size]) => [name, size / 1e6]));
    made.push(chart(() => namedBars(megabytes, "MB"), "Size"));
  }
  if (contents.layers.length)
    made.push(chart(() => layerTimesChart(contents.layers), "Latency by layer, by the runtime's own profile of both files"));
  if (made.length) section("Accuracy, size, latency", element("div", { class: "pair" }, ...made));
}

function plans() {
  if (!contents.plans.length) return;
  const caption = "Each point is a plan; the line joins those that no cheaper plan matches (Pareto)";
  section(
    "Cost and divergence of the plans",
    chart(() => plansChart(contents.plans, contents.plans_cost), caption),
    contents.paste ? element("pre", {}, contents.paste) : null,
  );
}

function tables() {
  for (const [title, [header, ...rows]] of Object.entries(contents.tables)) {
    const lines = rows.map((row) => element("tr", {}, ...row.map((cell) => element("td", {}, cell))));
    const top = element("thead", {}, element("tr", {}, ...header.map((cell) => element("th", { scope: "col" }, cell))));
    section(title, element("div", { class: "scroll" }, element("table", {}, top, element("tbody", {}, ...lines))));
  }
}

// The plan, folded by the blocks of the model.
function plan() {
  if (!contents.plan_blocks.length) return;
  const folded = contents.plan_blocks.map(({ name, lines, quantized, in_float }) =>
    element(
      "details",
      {},
      element("summary", {}, name, element("span", {}, ` – ${quantized} quantized, ${in_float} in float`)),
      element("ul", {}, ...lines.map((line) => element("li", {}, line))),
    ),
  );
  const options = contents.plan.options;
  section("Plan", element("p", { class: "quiet" }, `For ${options.target}, ${options.scheme}.`), ...folded);
}

function notes() {
  if (contents.notes.length) section("Notes", element("ul", {}, ...contents.notes.map((note) => element("li", {}, note))));
}

head();
findings();
bars();
network();
plans();
tables();
plan();
notes();
drawAll();
dark.addEventListener("change", drawAll);
