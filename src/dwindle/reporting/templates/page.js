(() => {
  "use strict";
  const all = (selector, within) => [...(within || document).querySelectorAll(selector)];

  // The plot shows one axis at a time; without this script, and on paper, both are there.
  function chooseAxis(plots) {
    const axes = plots.querySelector(".axes");
    const figures = all("figure[data-axis]", plots);
    if (!axes || figures.length < 2) return;
    const show = (key) => figures.forEach((figure) => { figure.hidden = figure.dataset.axis !== key; });
    axes.hidden = false;
    axes.addEventListener("change", (event) => show(event.target.value));
    show((axes.querySelector("input:checked") || axes.querySelector("input")).value);
  }

  function tips(figure) {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    figure.append(tip);
    const hide = () => { tip.hidden = true; };
    const show = (point) => {
      const [name, figures] = [document.createElement("b"), document.createElement("span")];
      name.textContent = "#" + point.dataset.trial + " " + point.dataset.name;
      figures.textContent = point.dataset.figures;
      tip.replaceChildren(name, figures);
      const mark = point.querySelector(".mark").getBoundingClientRect();
      const box = figure.getBoundingClientRect();
      tip.hidden = false;
      const half = tip.offsetWidth / 2;
      const x = mark.left + mark.width / 2 - box.left + figure.scrollLeft;
      tip.style.left = Math.min(Math.max(x, half), Math.max(half, figure.scrollWidth - half)) + "px";
      tip.style.top = mark.top + mark.height / 2 - box.top + "px";
      tip.classList.toggle("low", mark.top - box.top < tip.offsetHeight + 20);
    };
    for (const point of all(".point", figure)) {
      point.addEventListener("pointerenter", () => show(point));
      point.addEventListener("pointerleave", hide);
      point.addEventListener("focus", () => show(point));
      point.addEventListener("blur", hide);
    }
    figure.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  }

  // One stop of the Tab key for all points; arrow keys go from one to the next.
  function arrows(figure) {
    const points = all(".point", figure).sort((a, b) => a.dataset.x - b.dataset.x);
    const stop = (point) => points.forEach((each) => each.setAttribute("tabindex", each === point ? "0" : "-1"));
    if (points.length) stop(points.find((each) => each.classList.contains("chosen")) || points[0]);
    const moves = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, Home: -Infinity, End: Infinity };
    figure.addEventListener("keydown", (event) => {
      const at = points.indexOf(document.activeElement);
      if (at < 0 || !(event.key in moves)) return;
      event.preventDefault();
      const next = points[Math.min(Math.max(at + moves[event.key], 0), points.length - 1)];
      stop(next);
      next.focus();
    });
  }

  function link(root) {
    const points = all(".point", root);
    const rows = all("tr[data-trial]", root);
    const same = (trial) => [...points, ...rows].filter((each) => each.dataset.trial === trial);
    const mark = (word, trial, on) => same(trial).forEach((each) => each.classList.toggle(word, on));
    for (const each of [...points, ...rows]) {
      each.addEventListener("pointerenter", () => mark("near", each.dataset.trial, true));
      each.addEventListener("pointerleave", () => mark("near", each.dataset.trial, false));
    }
    const pick = (trial) => {
      [...points, ...rows].forEach((each) => each.classList.toggle("picked", each.dataset.trial === trial));
    };
    for (const point of points) {
      point.addEventListener("click", (event) => {
        event.preventDefault();
        pick(point.dataset.trial);
        const row = rows.find((each) => each.dataset.trial === point.dataset.trial);
        if (row) row.scrollIntoView({ block: "center" });
      });
    }
    for (const row of rows) row.addEventListener("click", () => pick(row.dataset.trial));
  }

  function sortable(table) {
    const body = table.tBodies[0];
    all("thead th[data-sort]", table).forEach((head) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = "Sort";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        all("th", table.tHead).forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const value = (row) => parseFloat(row.dataset[head.dataset.sort]);
        const sorted = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
          return up ? x - y : y - x;
        });
        body.append(...sorted);
      });
    });
  }

  function start() {
    all(".plots").forEach(chooseAxis);
    all("figure[data-axis]").forEach((figure) => { tips(figure); arrows(figure); });
    link(document);
    all("table.sortable").forEach(sortable);
  }
  document.addEventListener("dwindle:start", start);
  start();
})();
