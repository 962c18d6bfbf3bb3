"""The page: headlines, charts, configuration, in one HTML file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distill.html_report.accuracy import by_tap, by_timesteps, over_epochs
from distill.html_report.chart import Chart, Missing
from distill.html_report.firing import firing_rates
from distill.html_report.frontier import best_networks, frontier
from distill.html_report.headlines import facts, notes, tiles
from distill.html_report.losses import losses
from distill.html_report.palette import Palette
from distill.html_report.raster import rasters
from distill.html_report.run_data import Run, read_run
from models.io import replace_text

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Writes `report.html` into a run's folder, of what lies in it so far; the same bytes for the same files.

    Args:
        folder: of a run of scripts/distill.py, train_snn.py or train_teacher.py.

    Returns:
        the file.

    Raises:
        ValueError: if the folder is none of a run, or a file in it is damaged.
    """
    path = Path(folder) / REPORT
    replace_text(path, page(read_run(Path(folder))))
    return path


def page(run: Run) -> str:
    """The HTML of a run's report."""
    palette = Palette(len(run.taps))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.tests["chart"] = lambda value: isinstance(value, Chart)
    environment.tests["missing"] = lambda value: isinstance(value, Missing)
    return environment.get_template("page.html").render(
        run=run,
        tiles=tiles(run),
        facts=facts(run),
        notes=notes(run),
        sections=sections(run, palette),
        rasters=rasters(run, palette),
        best=best_networks(run),
        assumptions=assumptions(run),
        settings=settings(run),
        changes=changes(run),
        light=palette.css(dark=False),
        dark=palette.css(dark=True),
    )


def sections(run: Run, palette: Palette) -> list[tuple[str, list[Chart | Missing], list[Chart | Missing]]]:
    """The charts under their headings, those of the left and of the right column."""
    first, second = by_tap(run, palette), by_timesteps(run, palette)
    if isinstance(first, Missing):
        first, second = second, first
    return [
        ("Accuracy", [first], [second]),
        ("Energy", [frontier(run, palette)], []),
        ("Over the epochs", [over_epochs(run, palette), losses(run, palette)], [firing_rates(run, palette)]),
    ]


def assumptions(run: Run) -> list[str]:
    """What the energies rest on."""
    found = run.summary.get("energy_assumptions", [])
    return [str(line) for line in found] if isinstance(found, list) else [str(found)]


def settings(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration by group: name and value of each field."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in run.config.items():
        group, dot, field = name.partition(".")
        groups.setdefault(group if dot else "", []).append((field if dot else name, in_yaml(value)))
    return sorted(groups.items(), key=lambda item: item[0] == "")  # those of no group last


def changes(run: Run) -> list[tuple[str, str, str]]:
    """Fields that were changed when the run was resumed: name, value before, value after."""
    found = []
    for before, after in itertools.pairwise([*run.earlier_configs, run.config]):
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name):
                found.append((name, in_yaml(before.get(name)), in_yaml(after.get(name))))
    return found


def in_yaml(value: Any) -> str:
    """A value as a configuration says it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
