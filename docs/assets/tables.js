// The table of models: a search that ignores case, hyphens and dots, and columns that sort when their title is pressed.
const plain = (text) => text.toLowerCase().replace(/[^a-z0-9]/g, "");

function addSearch(table) {
  const scroll = table.closest(".table-scroll");
  const box = document.createElement("input");
  box.type = "search";
  box.className = "table-search";
  box.placeholder = "Find a model: Qwen3-MoE, gpt-oss, GLM-4.5 …";
  box.setAttribute("aria-label", "Find a model");
  const count = document.createElement("p");
  count.className = "table-count";
  count.setAttribute("aria-live", "polite");
  const rows = [...table.tBodies[0].rows];
  const names = rows.map((row) => plain(row.cells[0].textContent + " " + row.cells[1].textContent));
  const show = () => {
    const wanted = plain(box.value);
    rows.forEach((row, i) => { row.hidden = !names[i].includes(wanted); });
    const found = rows.filter((row) => !row.hidden).length;
    count.textContent = found === 0 ? "No family of that name. hf-moe info MODEL tells for any config." : `${found} of ${rows.length} families`;
  };
  box.addEventListener("input", show);
  scroll.before(box, count);
  show();
}

function addSorting(table) {
  [...table.tHead.rows[0].cells].forEach((title, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = title.textContent;
    title.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = title.getAttribute("aria-sort") === "ascending";
      [...title.parentElement.cells].forEach((each) => each.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => a.cells[column].textContent.localeCompare(b.cells[column].textContent) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    });
  });
}

document.querySelectorAll("table.models").forEach((table) => { addSearch(table); addSorting(table); });
