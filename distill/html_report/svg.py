"""Drawings by Matplotlib as SVG that lives inside an HTML page: text stays text, colours are the page's variables."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from distill.html_report.palette import Palette

SVG = "http://www.w3.org/2000/svg"
HREF = "{http://www.w3.org/1999/xlink}href"
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 1,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 1,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.pad": 6,
    "legend.frameon": False,
}


class Canvas:
    """A drawing of some width and height, in pixels of the page when it is not scaled; y goes up."""

    def __init__(self, width: int, height: int, palette: Palette) -> None:
        self.width, self.height, self.palette = width, height, palette
        self.figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        self.tips: dict[str, str] = {}
        self.halos: set[str] = set()

    def axes(self, left: float, bottom: float, right: float, top: float) -> Axes:
        """Axes between margins, in pixels from the edges of the drawing."""
        width, height = self.width - left - right, self.height - bottom - top
        box = (left / self.width, bottom / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, facecolor="none")

    def tip(self, artist: Artist, text: str) -> None:
        """What is shown when the mouse rests on it."""
        name = f"tip-{len(self.tips)}"
        artist.set_gid(name)
        self.tips[name] = text

    def halo(self, text: Text) -> Text:
        """Draws a rim in the colour of the background around a text that lies on lines."""
        name = f"halo-{len(self.halos)}"
        text.set_gid(name)
        self.halos.add(name)
        return text


def drawn(
    key: str, words: str, width: int, height: int, palette: Palette, paint: Callable[[Canvas], None], css_class: str
) -> str:
    """An SVG element, the same bytes each time.

    Args:
        key: of letters, digits and dashes, different for all drawings of a page: its ids begin with it.
        words: the text alternative.
        width, height: in pixels.
        paint: draws.
    """
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from")  # the browser has other fonts
        matplotlib.rcdefaults()
        settings: Any = SETTINGS | _colours(palette) | {"svg.hashsalt": key}  # its stubs know literal keys alone
        matplotlib.rcParams.update(settings)
        canvas = Canvas(width, height, palette)
        paint(canvas)
        file = io.StringIO()
        canvas.figure.savefig(file, format="svg", metadata={"Date": None})
    root = ET.fromstring(file.getvalue())
    _strip(root, canvas, key)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    for element in root.iter():  # all that names hold besides texts, the label, is not there yet
        for name, value in element.attrib.items():
            element.set(name, palette.variables(value))
    root.attrib |= {"class": css_class, "role": "img", "aria-label": words}
    ET.register_namespace("", SVG)
    text = ET.tostring(root, encoding="unicode", short_empty_elements=True)
    return re.sub(r">\s+<", "><", text)


def _colours(palette: Palette) -> dict[str, Any]:
    ink, muted, axis, line = (palette[role] for role in ("ink", "muted", "axis", "line"))
    ticks = {f"{which}tick.{part}": muted for which in "xy" for part in ("color", "labelcolor")}
    return ticks | {"text.color": ink, "axes.labelcolor": muted, "axes.edgecolor": axis, "grid.color": line}


def _strip(root: ET.Element, canvas: Canvas, key: str) -> None:
    """Takes out what means nothing in a page, and makes the ids that are left the drawing's own."""
    text = ET.tostring(root, encoding="unicode")
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    for parent in list(root.iter()):
        for child in list(parent):
            # the style would hold for the whole page
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in canvas.tips:
            tip = ET.Element(f"{{{SVG}}}title")
            tip.text = canvas.tips[name]
            element.insert(0, tip)
        elif name in canvas.halos:
            element.set("class", "halo")
        elif name in used:
            element.set("id", f"{key}-{name}")
        if (target := element.attrib.pop(HREF, None)) is not None:
            element.set("href", f"#{key}-{target[1:]}")
        if (clip := element.get("clip-path")) is not None:
            element.set("clip-path", clip.replace("url(#", f"url(#{key}-"))
        if element.tag == f"{{{SVG}}}text":
            element.set("style", _text_style(element.get("style", "")))


def _text_style(style: str) -> str:
    """Size, weight, anchor and colour as they are; the family is the page's."""
    font = re.search(r"font: (?:(bold|\d+) )?([\d.]+)px[^;]*", style)
    if font is None:
        return style
    weight = f"font-weight: {font[1]}; " if font[1] else ""
    return style.replace(font[0], f"{weight}font-size: {font[2]}px")
