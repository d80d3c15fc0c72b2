"""The page of a report in a real browser, where a Chromium is installed: it fits, nothing fails, nothing overlaps."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pycompress.run_report import write_report
from pycompress.run_report.page import SECTIONS
from tests.run_folders import make_run

pytest.importorskip("matplotlib")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

# What a person would see, asked of the browser: widths, texts that lie on each other, and what sorting does.
PROBE = """
<script>
(function () {
  function boxes(svg) {
    return Array.from(svg.querySelectorAll("text")).map(function (text) {
      return { text: text.textContent, box: text.getBoundingClientRect() };
    }).filter(function (item) { return item.text.trim(); });
  }
  var covered = [];
  document.querySelectorAll("svg").forEach(function (svg) {
    var all = boxes(svg);
    all.forEach(function (a, i) {
      all.slice(i + 1).forEach(function (b) {
        var x = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
        var y = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
        // A line of text is higher than its letters.
        if (x > 1 && y > 0.35 * Math.min(a.box.height, b.box.height)) covered.push([a.text, b.text]);
      });
    });
  });
  function column(index) {
    return Array.from(document.querySelectorAll("table.sortable tbody tr")).map(function (row) {
      return row.cells[index].textContent;
    });
  }
  var heads = Array.from(document.querySelectorAll("table.sortable th[scope=col]"));
  var error = heads.findIndex(function (head) { return head.textContent === "error"; });
  var sorted = [];
  if (heads.length) {
    heads[error].querySelector("button").click();
    sorted.push(column(error));
    heads[error].querySelector("button").click();
    sorted.push(column(error));
  }
  var page = document.documentElement;
  var cut = Array.from(document.querySelectorAll("svg text")).filter(function (text) {
    var box = text.getBoundingClientRect(), frame = text.ownerSVGElement.getBoundingClientRect();
    return box.left < frame.left - 1 || box.right > frame.right + 1;
  }).map(function (text) { return text.textContent; });
  var sections = {};
  document.querySelectorAll("section").forEach(function (section) {
    sections[section.id] = section.getBoundingClientRect().height;
  });
  var found = {
    sections: sections,
    inner: window.innerWidth, scroll: page.scrollWidth, covered: covered, cut: cut, sorted: sorted,
    background: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
  };
  parent.postMessage(JSON.stringify(found), "*");
})();
</script>
</body>
"""
# A window has a least width; a frame in it has none, and for the page it is the window.
FRAME = """<!doctype html><meta charset="utf-8"><body style="margin: 0">
<pre id="probe"></pre>
<script>
addEventListener("message", function (event) { document.getElementById("probe").textContent = event.data; });
</script>
<iframe src="probed.html" width="WIDTH" height="900" style="border: 0"></iframe>
</body>
"""


def browse(page: Path, folder: Path, width: int = 1200, dark: bool = False) -> dict[str, Any]:
    """What PROBE found. Fails where the browser reports an error."""
    text = page.read_text(encoding="utf-8")
    assert text.count("</body>") == 1
    (folder / "probed.html").write_text(text.replace("</body>", PROBE), encoding="utf-8")
    frame = folder / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    assert BROWSER is not None
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1300,1000", "--enable-logging=stderr", "--v=0",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run([BROWSER, *flags], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="probe">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stdout[-500:]
    content: dict[str, Any] = json.loads(html.unescape(found[1]))
    return content


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_run(tmp_path_factory.mktemp("browser") / "run", blocks=7))


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_fits_and_no_texts_lie_on_each_other(tmp_path: Path, page: Path, width: int) -> None:
    found = browse(page, tmp_path, width)
    assert set(found["sections"]) == set(SECTIONS)
    assert all(height > 40 for height in found["sections"].values())
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["covered"] == []
    assert found["cut"] == []


def test_the_table_sorts_and_the_page_is_dark_where_that_is_wanted(tmp_path: Path, page: Path) -> None:
    light, dark = browse(page, tmp_path), browse(page, tmp_path, dark=True)
    assert (light["background"], dark["background"]) == ("rgb(255, 255, 255)", "rgb(20, 24, 29)")
    assert light["ink"] != dark["ink"]
    down, up = ([float(text) for text in column] for column in light["sorted"])
    assert down == sorted(down, reverse=True)
    assert up == sorted(up)
    assert down[0] > down[-1]


def test_an_unfinished_run_with_long_names_fits(tmp_path: Path) -> None:
    name = "a_very_long_name_without_any_place_to_break_" * 6
    run = make_run(
        tmp_path / "run", status="failed", error=name, layers=[], latency={}, model={"class": name}, notes=[name],
        recipe={"stages": [{"prune": {"skip": [name]}}]},
    )  # fmt: skip
    found = browse(write_report(run), tmp_path, 400)
    assert found["inner"] == 400
    assert found["scroll"] <= 400
