"""How the charts of a report are drawn: matplotlib figures, as SVG elements that take their colours from the page.

A chart is drawn in stand-in colours, one for each name in COLOURS, which become CSS variables: so one drawing serves
light, dark and paper. Text stays text, in the page's font. It is laid out in DejaVu Sans, which is wider than what
browsers use, so that what does not overlap here does not overlap there.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303", "before": "#040404", "after": "#050505",
    "one": "#060606", "two": "#070707", "three": "#080808", "four": "#090909", "five": "#0a0a0a",
}  # fmt: skip
SERIES = ("one", "two", "three", "four", "five")
WIDTH, HEIGHT = 5.0, 3.1  # inches; 360 x 223 units of the page, so that text keeps its size on a phone
_SVG = "{http://www.w3.org/2000/svg}"
_XLINK = "{http://www.w3.org/1999/xlink}"
_STYLE: Any = {  # rcParams, whose type names every key there is
    "svg.fonttype": "none",
    "svg.hashsalt": "pycompress",
    "text.parse_math": False,  # a name with a dollar sign is no formula
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.unicode_minus": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.titlecolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
}


Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


@contextmanager
def figure_of(height: float = HEIGHT, width: float = WIDTH) -> Iterator[Figure]:
    """An empty figure without a window, with the report's style as long as the block lasts."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: no display, no global state
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that DejaVu Sans lacks: the browser has them
        quiet = logging.getLogger("matplotlib.font_manager")
        level = quiet.level
        quiet.setLevel(logging.ERROR)
        try:
            figure = Figure(figsize=(width, height), layout="constrained")
            FigureCanvasAgg(figure)
            yield figure
        finally:
            quiet.setLevel(level)


def svg_of(figure: Figure, key: str, label: str, tips: Mapping[str, Sequence[str]] | None = None) -> str:
    """The figure as an <svg> element for HTML. Called within `figure_of`.

    key: begins all its ids, so that those of several charts differ. label: what a screen reader says of it.
    tips: for a group of marks (set_gid), the text that each shows under the pointer, in the order drawn.
    """
    file = io.StringIO()
    metadata: Any = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(file.getvalue())
    for child in list(root):
        if child.tag == f"{_SVG}metadata":
            root.remove(child)
    for group in root.iter(f"{_SVG}g"):
        marks = list(group.iter(f"{_SVG}use"))
        for mark, tip in zip(marks, (tips or {}).get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(mark, f"{_SVG}title").text = tip
    for element in root.iter():
        _to_html(element, key)
    root.set("class", "chart")
    root.set("role", "img")
    root.set("aria-label", label)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    root.set("style", f"max-width: {1.25 * width:.0f}px")
    return ElementTree.tostring(root, encoding="unicode")


def _to_html(element: ElementTree.Element, key: str) -> None:
    """HTML knows SVG without namespaces; and ids and colours are the page's, not the drawing's."""
    element.tag = element.tag.removeprefix(_SVG)
    attributes, element.attrib = element.attrib, {}
    for name, value in attributes.items():
        name = name.removeprefix(_XLINK)
        if name == "id":
            value = f"{key}-{value}"
        elif name == "href" and value.startswith("#"):
            value = f"#{key}-{value[1:]}"
        elif "url(#" in value:
            value = value.replace("url(#", f"url(#{key}-")
        if name == "style":
            for colour, stand_in in COLOURS.items():
                value = value.replace(stand_in, f"var(--{colour})")
        element.set(name, value)


def thin_axes(axes: Any, axis: str = "both") -> None:
    """Grid along one axis, and no ticks sticking out."""
    axes.grid(False)
    axes.grid(True, axis=axis)
    axes.tick_params(which="both", length=0)
    axes.margins(x=0.02)


def few_ticks(axis: Any, most: int = 5) -> None:
    """On a linear axis, plain numbers that stay apart."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(most))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def log_scale(axes: Any, which: str) -> None:
    """Makes the axis "x" or "y" logarithmic, with plain numbers at its ticks: matplotlib's own are formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    subs = (1.0,) if high > 30 * max(low, 1e-300) else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def shorten(name: str, most: int = 26) -> str:
    """The name with its first words as letters, e.l.0.attention.query; what is too long still loses its middle."""
    words = name.split(".")
    for i, word in enumerate(words[:-1]):
        if sum(map(len, words)) + len(words) - 1 > most and not word.isdigit():
            words[i] = word[:1]
    name = ".".join(words)
    if len(name) <= most:
        return name
    head = (most - 1) // 3
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def place_labels(
    axes: Any, points: Sequence[Point], texts: Sequence[str], *, lines: Sequence[tuple[Point, Point]] = (), **style: Any
) -> None:
    """Writes each text beside its point, where it covers no other text, point or line, as far as there is room.

    Points that lie on each other share one label: "1, 2, 3". Called last, when the axes have their limits.
    """
    axes.figure.draw_without_rendering()
    pixels = [_pixel(axes, point) for point in points]
    scale = axes.figure.dpi / 72
    groups: list[list[int]] = []
    for i, pixel in enumerate(pixels):
        near = (g for g in groups if max(abs(a - b) for a, b in zip(pixels[g[0]], pixel, strict=True)) < 9 * scale)
        group = next(near, None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    frame = axes.get_window_extent()
    taken = [(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in pixels]
    for ends in lines:
        (x0, y0), (x1, y1) = (_pixel(axes, end) for end in ends)
        steps = int(max(abs(x1 - x0), abs(y1 - y0)) / (3 * scale)) + 1
        between = [(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)]
        taken += [(x - 1.5 * scale, y - 1.5 * scale, x + 1.5 * scale, y + 1.5 * scale) for x, y in between]
    for group in groups:
        text = ", ".join(texts[i] for i in group)
        x, y = pixels[group[0]]
        half, tall = (3.2 * len(text) + 2) * scale, 6 * scale
        best, least = (0.0, 11.0), float("inf")
        for dx, dy in ((0, 11), (0, -11), (1, 0), (-1, 0), (1, 9), (-1, 9), (1, -9), (-1, -9), (0, 20), (0, -20)):
            shift = dx * (half + 7 * scale)
            box = (x + shift - half, y + dy * scale - tall, x + shift + half, y + dy * scale + tall)
            outside = _outside(box, (frame.x0, frame.y0, frame.x1, frame.y1))
            cost = outside + sum(_overlap(box, other) for other in taken)
            if cost < least - 1:  # a square pixel; less is rounding
                best, least, chosen = (shift / scale, dy), cost, box
        taken.append(chosen)
        axes.annotate(
            text, points[group[0]], best, textcoords="offset points", ha="center", va="center", annotation_clip=False,
            **style,
        )  # fmt: skip


def _pixel(axes: Any, point: Point) -> Point:
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def _overlap(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Box, frame: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)
