"use strict";

// Tables: click a heading to sort; columns of numbers ("89.86 ± 0.41", "<0.001", "12 of 20", "—") go by value and to
// the right, several in one cell ("89.0, 89.2") by their mean.
{
  const number = /^<?([+-]?(?:\d+(?:,\d{3})*|(?=\.\d))(?:\.\d+)?(?:e[+-]?\d+)?)\s*(?:%|±.*|\(.*\)|\[.*\]|of \d+)?$/i;
  const missing = new Set(["", "—", "-", "–", "nan", "none", "<na>"]);
  const text = (row, column) => row.cells[column].textContent.trim().replace(/[−–](?=\d)/g, "-");
  const parts = (shown) => shown.split(", ");
  const values = (shown) => parts(shown).map((part) => parseFloat(number.exec(part)[1].replace(/,/g, "")));
  const value = (shown) => values(shown).reduce((sum, each) => sum + each) / parts(shown).length;

  function sort(body, column, numeric, direction) {
    const rows = [...body.rows].map((row) => ({ row, shown: text(row, column) }));
    const gone = ({ shown }) => missing.has(shown.toLowerCase());
    rows.sort((a, b) => {
      if (gone(a) || gone(b)) return gone(a) - gone(b);  // missing values last, either way
      const order = numeric
        ? value(a.shown) - value(b.shown)
        : a.shown.localeCompare(b.shown, "en", { numeric: true });
      return direction * order;
    });
    body.append(...rows.map(({ row }) => row));
  }

  for (const table of document.querySelectorAll("table.data, table.dataframe")) {
    const body = table.tBodies[0];
    const heads = table.tHead ? [...table.tHead.rows].at(-1).cells : [];
    const rows = body ? [...body.rows] : [];
    const regular = rows.every((row) => row.cells.length === heads.length && [...row.cells].every((c) => c.rowSpan === 1));
    if (!rows.length || !regular) continue;  // merged cells would be torn apart
    [...heads].forEach((head, column) => {
      const shown = rows.map((row) => text(row, column)).filter((t) => !missing.has(t.toLowerCase()));
      const numeric = shown.length > 0 && shown.every((t) => parts(t).every((part) => number.test(part)));
      if (numeric) [head, ...rows.map((row) => row.cells[column])].forEach((cell) => cell.classList.add("number"));
      head.classList.add("sortable");
      head.tabIndex = 0;
      head.title = "Sort";
      const click = () => {
        const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
        sort(body, column, numeric, direction);
      };
      head.addEventListener("click", click);
      head.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        click();
      });
    });
  }
}

// Code: each cell unfolds by itself, the button does all.
{
  const button = document.getElementById("all-code");
  const cells = [...document.querySelectorAll("details.code")];
  if (button) {
    button.hidden = cells.length === 0;
    const name = () => {
      button.textContent = cells.every((cell) => cell.open) ? "Hide all code" : "Show all code";
    };
    cells.forEach((cell) => cell.addEventListener("toggle", name));
    button.addEventListener("click", () => {
      const open = !cells.every((cell) => cell.open);
      cells.forEach((cell) => { cell.open = open; });
    });
  }
}

// Pictures: a small one shrinks to a phone's width, a wide one stays legible and scrolls in its box.
window.addEventListener("load", () => {
  for (const picture of document.images) {
    picture.classList.toggle("wide", (picture.getAttribute("width") ?? picture.naturalWidth) > 720);
  }
});
