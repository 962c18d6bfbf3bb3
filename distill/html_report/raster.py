"""Spike rasters: what some neurons do for some images, and what the network makes of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from distill.html_report.chart import Missing, Table
from distill.html_report.palette import Palette
from distill.html_report.run_data import Run
from distill.html_report.svg import Canvas, drawn
from distill.html_report.text import share, shortened
from distill.spike_examples import RASTER

WIDTH, ROW = 250, 5
"""Width of a raster and height of a neuron's row, in pixels."""


@dataclass(frozen=True)
class Prediction:
    """What the network says after one or several steps."""

    text: str
    correct: bool


@dataclass(frozen=True)
class Example:
    """One image with its raster."""

    label: str
    index: int
    picture: str
    """A data URI."""
    predictions: list[Prediction]
    drawing: str


@dataclass(frozen=True)
class Rasters:
    """All examples of a run."""

    note: str
    examples: list[Example]
    table: Table


def rasters(run: Run, palette: Palette) -> Rasters | Missing:
    """The spikes of a few neurons of a few layers, image by image."""
    key, title = "rasters", "Spikes of example images"
    if not run.raster:
        when = "the run was made by a version that did not record them" if run.finished else "the run has not ended"
        return Missing(key, title, f"There is no {RASTER}: {when}.")
    layers, images = run.raster["layers"], run.raster["images"]
    examples = [
        Example(
            image["label"],
            image["index"],
            image["picture"] if image["picture"].startswith("data:image/png;base64,") else "",
            _predictions(image),
            _drawing(f"raster-{number}", image, layers, run.raster["timesteps"], palette),
        )
        for number, image in enumerate(images)
    ]
    header = ["Layer", "Neuron", *(f"Image {image['index']} ({image['label']})" for image in images)]
    rows = [
        [layer["name"], str(neuron), *(" ".join(map(str, image["spikes"][i][j])) or "\u2013" for image in images)]
        for i, layer in enumerate(layers)
        for j, neuron in enumerate(layer["neurons"])
    ]
    shown = ", ".join(f"{len(layer['neurons'])} of {layer['fired']:,} in {layer['name']}" for layer in layers)
    note = (
        "A row is a neuron, a column a time step, a mark a spike. The neurons are spread over those that fire for any "
        f"of these images ({shown}) and are the same for all. Below, what the network says after each step, its logits "
        "averaged so far."
    )
    return Rasters(note, examples, Table(header, rows))


def _drawing(key: str, image: dict[str, Any], layers: list[dict[str, Any]], timesteps: int, palette: Palette) -> str:
    heights = [ROW * max(len(layer["neurons"]), 2) for layer in layers]
    head, foot = 22, 38
    height = sum(heights) + head * len(layers) + foot

    def paint(canvas: Canvas) -> None:
        top = 0.0
        for number, (layer, spikes) in enumerate(zip(layers, image["spikes"], strict=True)):
            top += head
            axes = canvas.axes(8, height - top - heights[number], 8, top)
            top += heights[number]
            axes.set_xlim(0.5, timesteps + 0.5)
            axes.set_ylim(len(spikes) - 0.5 if spikes else 0.5, -0.5)
            axes.grid(False)
            axes.set_yticks([])
            axes.set_title(
                shortened(layer["name"], 36), loc="left", fontsize=10.5, pad=4, color=palette["muted"]
            )  # fmt: skip
            for side in ("left", "right", "top"):
                axes.spines[side].set_visible(False)
            axes.spines["bottom"].set_color(palette["line"])
            last = number == len(layers) - 1
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
            axes.tick_params(axis="x", labelbottom=last, labelsize=10.5)
            if last:
                axes.set_xlabel("time step", fontsize=10.5, labelpad=2)
            axes.set_xlim(0.5, timesteps + 0.5)
            if not spikes:
                axes.text(
                    (timesteps + 1) / 2, 0, "no neuron fires", ha="center", va="center", fontsize=10.5,
                    color=palette["muted"],
                )  # fmt: skip
            marks = [(step, row) for row, steps in enumerate(spikes) for step in steps]
            if marks:
                axes.add_patch(PathPatch(_marks(marks), facecolor=palette["student"], edgecolor="none"))

    said = "; ".join(
        f"{layer['name']}: {sum(map(len, spikes))} spikes of {len(spikes)} neurons"
        + (f" ({share(sum(map(len, spikes)) / (len(spikes) * timesteps), 0)} of all places)" if spikes else "")
        for layer, spikes in zip(layers, image["spikes"], strict=True)
    )
    predictions = ", ".join(prediction.text for prediction in _predictions(image))
    words = (
        f"Spike raster over {timesteps} time steps of an image of class {image['label']}. {said}. Predictions: "
        f"{predictions}."
    )
    return drawn(key, words, WIDTH, height, palette, paint, "raster")


def _marks(places: list[tuple[int, int]]) -> Path:
    """A bar for each spike, as one path."""
    vertices, codes = [], []
    for x, y in places:
        left, right, top, bottom = x - 0.41, x + 0.41, y - 0.36, y + 0.36
        vertices += [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return Path(vertices, codes)


def _predictions(image: dict[str, Any]) -> list[Prediction]:
    """After each step, equal neighbours as one: "steps 2-4: cat (91 %)", with the last of their confidences."""
    found, step = [], 1
    for name, group in itertools.groupby(image["predictions"]):
        last = step + len(list(group)) - 1
        when = f"step {step}" if step == last else f"steps {step}\u2013{last}"
        confidence = share(image["confidences"][last - 1], 0)
        found.append(Prediction(f"{when}: {name} ({confidence})", name == image["label"]))
        step = last + 1
    return found
