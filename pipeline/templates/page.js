// What every table and the page as a whole can do: sort, switch between light and dark, choose a tab.
"use strict";

function sortable(table) {
  const heads = [...table.querySelectorAll("thead th[data-sort]")];
  for (const head of heads) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") !== "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      sortRows(table, head.cellIndex, descending ? -1 : 1);
    });
  }
}

// A cell's number stands in data-v; cells without one are compared as text, unknown numbers stand last.
function sortRows(table, column, sign) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => {
    const cell = row.cells[column];
    const value = cell.dataset.v;
    return [value === undefined ? cell.textContent.trim() : value === "" ? NaN : Number(value), row];
  });
  keyed.sort(([a], [b]) => {
    if (typeof a === "string") return sign * a.localeCompare(b, undefined, { numeric: true });
    return Number.isNaN(a) ? 1 : Number.isNaN(b) ? -1 : sign * (a - b);
  });
  body.append(...keyed.map(([, row]) => row));
}

function theme(button) {
  const order = ["auto", "light", "dark"];
  button.hidden = false;
  button.addEventListener("click", () => {
    const now = order[(order.indexOf(button.dataset.theme) + 1) % order.length];
    button.dataset.theme = now;
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[now];
    if (now === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = now;
  });
}

function tabs(list) {
  const buttons = [...list.querySelectorAll("[role=tab]")];
  const show = (chosen) => {
    for (const button of buttons) {
      button.setAttribute("aria-selected", String(button === chosen));
      button.tabIndex = button === chosen ? 0 : -1;
      document.getElementById(button.getAttribute("aria-controls")).hidden = button !== chosen;
    }
    document.getElementById(chosen.getAttribute("aria-controls")).dispatchEvent(new Event("shown"));
  };
  for (const [index, button] of buttons.entries()) {
    button.addEventListener("click", () => show(button));
    button.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = buttons[(index + step + buttons.length) % buttons.length];
      next.focus();
      show(next);
    });
  }
  list.hidden = buttons.length < 2;
  if (buttons.length) show(buttons[0]);
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("button.theme").forEach(theme);
document.querySelectorAll("[role=tablist]").forEach(tabs);
