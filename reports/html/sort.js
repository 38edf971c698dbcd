"use strict";
(() => {
  // Tables: a button in each head; the page reads the same without it.
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.hasAttribute("data-sort") ? cell.getAttribute("data-sort") : null;
  };

  const compare = (numeric, sign) => (a, b) => {
    if (a.value === null || b.value === null) return (a.value === null) - (b.value === null) || a.place - b.place;
    const order = numeric ? Number(a.value) - Number(b.value) : a.value.localeCompare(b.value, "en", { numeric: true });
    return sign * order || a.place - b.place;
  };

  const sort = (table, heads, column) => {
    const head = heads[column];
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const numeric = head.classList.contains("number") || table.tBodies[0].rows[0].cells[column].classList.contains("number");
    const rows = Array.from(table.tBodies[0].rows, (row) => ({ row, place: table.places.get(row), value: value(row, column) }));
    rows.sort(compare(numeric, descending ? -1 : 1));
    table.tBodies[0].append(...rows.map((entry) => entry.row));
  };

  document.querySelectorAll("table[data-sortable]").forEach((table) => {
    if (table.tBodies[0].rows.length < 2) return;
    table.places = new Map(Array.from(table.tBodies[0].rows, (row, place) => [row, place]));
    const heads = Array.from(table.tHead.rows[0].cells);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => sort(table, heads, column));
    });
  });

  // Code: a button that copies it.
  const copy = async (code) => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      return true;
    } catch {
      const range = document.createRange();
      range.selectNodeContents(code);
      const selection = window.getSelection();
      selection.removeAllRanges();
      selection.addRange(range);
      return document.execCommand("copy");
    }
  };

  document.querySelectorAll("[data-copy]").forEach((listing) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", async () => {
      button.textContent = (await copy(listing.querySelector("code"))) ? "Copied" : "Selected: press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    listing.append(button);
  });

  // Paper shows what is folded on the screen.
  window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
