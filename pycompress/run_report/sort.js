// A button in every head of the layer table sorts its rows: numbers by data-value, text as it reads, no value last.
document.querySelectorAll("table.sortable").forEach(function (table) {
  var body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach(function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", function () {
      var down = head.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      Array.from(body.rows).map(function (row) {
        var cell = row.cells[column];
        var number = parseFloat(cell.dataset.value);
        return { row: row, number: number, text: cell.textContent, none: !cell.textContent || cell.textContent === "–" };
      }).sort(function (a, b) {
        if (a.none !== b.none) return a.none ? 1 : -1;
        var order = isNaN(a.number) || isNaN(b.number)
          ? a.text.localeCompare(b.text, "en", { numeric: true }) : a.number - b.number;
        return down ? -order : order;
      }).forEach(function (item) { body.appendChild(item.row); });
    });
  });
});
