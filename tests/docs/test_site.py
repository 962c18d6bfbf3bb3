"""The site: it is built without a warning, loads nothing from elsewhere, and has every public name."""

import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import yaml
from pages import ROOT

import distill
import models

RESULTS = ROOT / "benchmarks" / "results"
API = {models: ROOT / "docs" / "api" / "models.md", distill: ROOT / "docs" / "api" / "distill.md"}
LOADS = re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"([^\"]+)\"|<link\b[^>]*\bhref=\"([^\"]+)\"")


@pytest.mark.parametrize("package", API, ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name_once(package):
    found = re.findall(rf"(?m)^::: {package.__name__}\.(\w+)$", API[package].read_text())
    assert sorted(found) == sorted(package.__all__)


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/name:", lambda loader, suffix, node: suffix)
    listed = []

    def walk(node):
        for child in node.values() if isinstance(node, dict) else node:
            listed.append(child) if isinstance(child, str) else walk(child)

    walk(yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages <= set(listed) and len(listed) == len(set(listed))


def test_the_picture_is_one_file_for_light_and_dark():
    path = ROOT / "docs" / "hybrids.svg"
    names = [element.tag.rpartition("}")[2] for element in ElementTree.parse(path).iter()]
    assert "title" in names and "desc" in names and "script" not in names and "image" not in names
    text = path.read_text()
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in text.split("@media (prefers-color-scheme: dark)"))
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert light == dark == used  # each colour is said for both
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="the site is built with `pip install -e .[docs]`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # Material's advertisement
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "tutorial.html", "maths.html"} <= {page.name for page in pages}
    for page in pages:
        for match in LOADS.finditer(page.read_text(encoding="utf-8")):
            target = match[1] or match[2]
            assert not re.match(r"(?:https?:)?//", target), f"{page.name} loads {target}"
            if page.name != "404.html" and not target.startswith("data:"):  # that one has the site's absolute paths
                assert (page.parent / target.partition("#")[0].partition("?")[0]).exists(), f"{page}: {target}"
    text = (tmp_path / "site" / "api" / "models.html").read_text()
    assert "spiking_twin" in text and "Copies a network with neurons in place of its activations" in text
    results = tmp_path / "site" / "results"  # what lies outside of docs/
    for picture in re.findall(r"!\[[^\]]*\]\((\S+)\)", (RESULTS / "study" / "short_no.md").read_text()):
        assert (results / "study" / picture).is_file() and (results / "study" / "short_no.html").is_file()
