// Draws the charts of the page, by day or by night, and as wide as the page is.
(() => {
  const night = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");
  const plots = () => [...document.querySelectorAll(".plot")];
  const colour = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const template = () => {
    const axis = {
      gridcolor: colour("--line"), linecolor: colour("--line"), zerolinecolor: colour("--line"),
      tickcolor: colour("--line"), automargin: true, title: { standoff: 10 },
    };
    return { layout: {
      font: { color: colour("--muted"), size: narrow.matches ? 11 : 12,
              family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      colorway: ["--accent", "--done", "--pruned", "--failed", "--mvdr", "--somp"].map(colour),
      xaxis: axis, yaxis: axis, hovermode: "closest",
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"),
                    font: { color: colour("--ink") } },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
      annotationdefaults: { font: { color: colour("--muted") } },
    } };
  };

  // Parallel coordinates with the axes from top to bottom: many fit on a phone.
  const turn = (data, layout) => {
    for (const trace of data) [trace.x, trace.y] = [trace.y, trace.x];
    for (const shape of layout.shapes || []) {
      [shape.x0, shape.y0] = [shape.y0, shape.x0];
      [shape.x1, shape.y1] = [shape.y1, shape.x1];
    }
    for (const label of layout.annotations || []) {
      [label.x, label.y] = [label.y, label.x];
      Object.assign(label, { xanchor: "center", xshift: 0, yanchor: "top", yshift: -1 });
    }
    const axis = layout.xaxis;
    layout.xaxis = { ...layout.yaxis, range: [-0.06, 1.06] };
    layout.yaxis = {
      ...axis, range: [axis.tickvals.length - 0.5, -0.6], ticklabelposition: "inside top",
      ticktext: axis.ticktext.map((text) => text.replace("<br>", "")), fixedrange: true,
      // Labels inside are else of the colour that plotly finds right on white.
      tickfont: { color: colour("--ink") },
    };
  };

  const draw = (plot) => {
    const text = plot.querySelector("script").textContent
      .replace(/var\((--[a-z0-9-]+)\)/g, (_, name) => colour(name));
    const { data, layout } = JSON.parse(text);
    if (narrow.matches && layout.meta && layout.meta.turns) turn(data, layout);
    const room = { l: 8, r: 12, t: layout.showlegend === false ? 8 : 30, b: 8 };
    const whole = { ...layout, template: template(), autosize: true,
                    margin: { ...room, ...(layout.margin || {}) } };
    if (narrow.matches) whole.dragmode = false; // a finger scrolls the page
    return Plotly.react(plot, data, whole,
      { responsive: true, displaylogo: false, displayModeBar: false, scrollZoom: false });
  };

  const drawAll = () => plots().forEach(draw);
  const drawInTurn = (left) => {
    if (!left.length) {
      document.documentElement.dataset.drawn = "all";
      return;
    }
    draw(left[0]);
    setTimeout(drawInTurn, 0, left.slice(1)); // the page answers meanwhile
  };

  addEventListener("DOMContentLoaded", () => drawInTurn(plots()));
  night.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("paper");
    drawAll();
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("paper");
    drawAll();
  });
})();
