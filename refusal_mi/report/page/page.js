"use strict";
(function () {
  const narrow = window.matchMedia("(max-width: 720px)");

  // Title and model stand in the caption; the figure keeps them for the picture that its toolbar saves.
  function shape(figure) {
    const source = narrow.matches ? figure.narrow : figure.wide;
    const layout = Object.assign({}, source.layout);
    const hasPanels = (layout.annotations || []).some((note) => note.yref === "paper" && note.yanchor === "bottom");
    const top = hasPanels ? 70 : 36;
    layout.height = source.layout.height - source.layout.margin.t + top;
    layout.margin = Object.assign({}, source.layout.margin, { t: top });
    if (narrow.matches) {
      layout.dragmode = false; // a finger on a plot scrolls the page
    }
    delete layout.title;
    delete layout.width; // as wide as its place
    delete layout.meta;
    return { data: source.data, layout: layout };
  }

  function draw() {
    const figures = JSON.parse(document.getElementById("figures").textContent);
    for (const place of document.querySelectorAll("[data-figure]")) {
      const found = shape(figures[place.dataset.figure]);
      Plotly.react(place, found.data, found.layout, {
        responsive: true,
        displaylogo: false,
        displayModeBar: narrow.matches ? false : "hover",
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      });
    }
  }

  // Columns beyond the edge are announced, and reached with the keyboard too.
  function hint() {
    for (const table of document.querySelectorAll(".scroll")) {
      const wider = table.scrollWidth > table.clientWidth + 1;
      table.classList.toggle("wider", wider);
      if (wider) table.tabIndex = 0;
      else table.removeAttribute("tabindex");
    }
  }

  function filtered(section) {
    const step = 12;
    const rows = Array.from(section.querySelectorAll(".row"));
    const text = section.querySelector("[data-filter=text]");
    const verdict = section.querySelector("[data-filter=verdict]");
    const column = section.querySelector("[data-filter=column]");
    const count = section.querySelector(".count");
    const more = section.querySelector(".more");
    let limit = step;

    function matches(row) {
      if (!row.textContent.toLowerCase().includes(text.value.trim().toLowerCase())) return false;
      if (verdict.value === "any") return true;
      const cells = Array.from(row.querySelectorAll(".cell"));
      const looked = column.value === "any" ? cells : cells.filter((cell) => cell.dataset.label === column.value);
      return looked.some((cell) => cell.dataset.verdicts.split(" ").includes(verdict.value));
    }

    function update() {
      let found = 0;
      for (const row of rows) {
        const hit = matches(row);
        if (hit) found += 1;
        row.hidden = !hit || found > limit;
      }
      const shown = Math.min(found, limit);
      count.textContent = shown + " shown of " + found + (found === rows.length ? "" : " that match, " + rows.length + " in all");
      more.hidden = found <= limit;
    }

    function restart() {
      limit = step;
      update();
    }

    for (const field of [text, verdict, column]) field.addEventListener("input", restart);
    more.addEventListener("click", () => {
      limit += 4 * step;
      update();
    });
    section.querySelector(".filters").hidden = false;
    update();
  }

  if (document.querySelector("[data-figure]")) {
    draw();
    narrow.addEventListener("change", draw);
    window.addEventListener("beforeprint", () => {
      for (const place of document.querySelectorAll("[data-figure]")) Plotly.Plots.resize(place);
    });
  }
  for (const section of document.querySelectorAll(".answers")) filtered(section);
  hint();
  window.addEventListener("resize", hint);
  for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", hint);
})();
