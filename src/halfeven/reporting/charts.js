// The charts of a report, as descriptions for Vega-Lite. Each function returns what is drawn of which rows.
"use strict";

const dark = window.matchMedia("(prefers-color-scheme: dark)");

function colours() {
  return dark.matches
    ? { text: "#e4e7ee", line: "#343a46", activation: "#8c9eff", weight: "#ffb74d", grid: "#80cbc4", harm: "#ff8a80" }
    : { text: "#1d2129", line: "#d9dde6", activation: "#3949ab", weight: "#ef6c00", grid: "#00796b", harm: "#c62828" };
}

function config() {
  const c = colours();
  const axis = { labelColor: c.text, titleColor: c.text, gridColor: c.line, domainColor: c.line, tickColor: c.line };
  return {
    background: null,
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...axis, labelFontSize: 12, titleFontSize: 12, titleFontWeight: "normal" },
    axisX: { labelOverlap: true, labelSeparation: 8 },
    legend: { labelColor: c.text, titleColor: c.text, labelFontSize: 12, orient: "top", title: null },
    bar: { fill: c.activation },
  };
}

function described(rows, height, rest) {
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    data: { values: rows },
    width: "container",
    height,
    autosize: { type: "fit-x", contains: "padding" },
    config: config(),
    ...rest,
  };
}

// The network from input to output, one bar for each tensor.
function depthChart(rows, field, title) {
  const c = colours();
  return described(rows, 110, {
    mark: { type: "bar", cursor: "pointer", tooltip: true },
    encoding: {
      x: { field: "place", type: "ordinal", axis: { labels: false, ticks: false, title: "input → output" } },
      y: { field, type: "quantitative", title, axis: { minExtent: 52, format: ".3~g" } }, // bars of all charts below each other
      color: {
        field: "kind",
        type: "nominal",
        scale: { domain: ["activation", "weight"], range: [c.activation, c.weight] },
      },
      opacity: { condition: { test: "datum.chosen", value: 1 }, value: 0.75 },
      stroke: { condition: { test: "datum.chosen", value: c.text }, value: null },
      tooltip: [
        { field: "name", title: "tensor" },
        { field: "kind", title: "kind" },
        { field, title, format: ".3g" },
        { field: "bits", title: "bits" },
      ],
    },
  });
}

// The values of a tensor, with the integers of its grid as thin lines and its ends as thick lines.
function histogramChart(tensor) {
  const c = colours();
  const width = (tensor.largest - tensor.smallest) / Math.max(tensor.histogram.length, 1);
  const bars = tensor.histogram.map((count, i) => ({
    from: tensor.smallest + i * width,
    to: tensor.smallest + (i + 1) * width,
    count,
  }));
  const steps = Math.min(2 ** tensor.bits - 1, 255);
  const grid = [];
  for (let i = 0; i <= steps; i += 1) grid.push({ at: tensor.low + ((tensor.high - tensor.low) * i) / steps });
  const ends = [{ at: tensor.low }, { at: tensor.high }];
  return described([], 220, {
    layer: [
      {
        data: { values: bars },
        mark: { type: "bar", tooltip: true },
        encoding: {
          x: { field: "from", type: "quantitative", title: "value" },
          x2: { field: "to" },
          y: { field: "count", type: "quantitative", title: "values (square root)", scale: { type: "sqrt" } },
          y2: { datum: 0 },
        },
      },
      {
        data: { values: grid },
        mark: { type: "rule", strokeWidth: 1, color: c.grid, opacity: steps > 63 ? 0.15 : 0.45 },
        encoding: { x: { field: "at", type: "quantitative" } },
      },
      {
        data: { values: ends },
        mark: { type: "rule", color: c.grid, strokeWidth: 2 },
        encoding: { x: { field: "at", type: "quantitative" } },
      },
    ],
  });
}

function channelChart(tensor) {
  const rows = tensor.channel_largest.map((value, channel) => ({ channel, value }));
  return described(rows, 220, {
    mark: { type: "bar", tooltip: true },
    encoding: {
      x: { field: "channel", type: "ordinal", axis: { labelOverlap: true, labelSeparation: 8, labelAngle: 0 }, title: "channel" },
      y: { field: "value", type: "quantitative", title: "largest magnitude" },
    },
  });
}

// The plans of a search by cost and divergence; those that no cheaper plan matches (Pareto) are joined.
function plansChart(plans, cost) {
  const c = colours();
  const kinds = ["chosen", "Pareto", "other"];
  const x = { field: "cost", type: "quantitative", title: cost, scale: { zero: false, nice: true } };
  const y = { field: "divergence", type: "quantitative", title: "divergence", scale: { type: "sqrt" }, axis: { format: ".3~g" } };
  return described(plans, 300, {
    layer: [
      {
        transform: [{ filter: "datum.kind !== 'other'" }],
        mark: { type: "line", interpolate: "step-after", color: c.line, strokeWidth: 2 },
        encoding: { x, y },
      },
      {
        mark: { type: "point", filled: true, size: 70, tooltip: true },
        encoding: {
          x,
          y,
          color: { field: "kind", type: "nominal", sort: kinds, scale: { domain: kinds, range: [c.harm, c.activation, c.grid] } },
          opacity: { condition: { test: "datum.kind === 'other'", value: 0.45 }, value: 1 },
          tooltip: [
            { field: "number", title: "step" },
            { field: "change", title: "change" },
            { field: "divergence", format: ".3g" },
            { field: "drop", title: "drop" },
            { field: "bits", title: "mean bits", format: ".2f" },
            { field: "cost", title: cost, format: ".3g" },
          ],
        },
      },
    ],
  });
}

// The time of each layer: a bar for the quantized file, and one for the float file.
function layerTimesChart(layers) {
  const c = colours();
  const rows = layers.flatMap((layer) => [
    { layer: layer.name, file: "quantized", ms: layer.deployed, computed: layer.integer ? "in integers" : "in float" },
    { layer: layer.name, file: "float", ms: layer.floating, computed: "in float" },
  ]);
  const files = ["quantized", "float"];
  return described(rows, { step: 26, for: "position" }, {
    mark: { type: "bar", tooltip: true },
    encoding: {
      y: { field: "layer", type: "nominal", sort: null, title: null, axis: { labelLimit: 160 } },
      yOffset: { field: "file", type: "nominal", sort: files },
      x: { field: "ms", type: "quantitative", title: "ms" },
      color: { field: "file", type: "nominal", sort: files, scale: { domain: files, range: [c.activation, c.weight] } },
      tooltip: [
        { field: "layer", title: "layer" },
        { field: "file", title: "file" },
        { field: "computed", title: "computed" },
        { field: "ms", title: "ms", format: ".3g" },
      ],
    },
  });
}

// Bars with a name each: accuracy, size, latency.
function namedBars(values, title) {
  const found = Object.entries(values).map(([name, value]) => ({ name, value }));
  return described(found, { step: 26 }, {
    mark: { type: "bar", tooltip: true },
    encoding: {
      y: { field: "name", type: "nominal", sort: null, title: null, axis: { labelLimit: 160 } },
      x: { field: "value", type: "quantitative", title },
    },
  });
}
