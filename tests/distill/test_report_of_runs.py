"""Reports that runs leave by themselves."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from toy_runs import distil, tiny

from distill import html_report
from distill.html_report import write_report

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_leaves_its_report_and_the_script_writes_the_same_again(reports, tmp_path):
    summary = distil(tiny(tmp_path / "r"))
    page = (tmp_path / "r" / "report.html").read_text()
    assert f"{summary['student_top1']:.2f}" in page and f"{summary['hybrid_top1']['layer2']:.2f}" in page
    spikes = json.loads((tmp_path / "r" / "raster.json").read_text())
    assert [layer["name"] for layer in spikes["layers"]] == ["act1", "layer2.1.act2", "layer4.1.act2"]
    assert len({image["label"] for image in spikes["images"]}) == 4 and spikes["timesteps"] == 2
    assert page.count('role="img"') == 2 * 6 + 4  # every chart, in two sizes, and four rasters
    (tmp_path / "r" / "report.html").unlink()
    command = [sys.executable, str(ROOT / "scripts" / "report.py"), "--run", "r"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "r/report.html\n", "")
    assert (tmp_path / "r" / "report.html").read_text() == page


def test_a_run_is_not_lost_where_its_report_fails(reports, tmp_path, monkeypatch, capsys):
    def fail(folder):
        assert (folder / "summary.json").exists()  # it is written first
        raise RuntimeError("no\nink")

    monkeypatch.setattr(html_report, "write_report", fail)
    summary = distil(tiny(tmp_path / "r"))
    assert summary["student_top1"] >= 0 and not (tmp_path / "r" / "report.html").exists()
    assert (tmp_path / "r" / "student" / "README.md").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert "RuntimeError: no ink" in line and "scripts/report.py --run" in line
    write_report(tmp_path / "r")


def test_an_interrupted_run_can_be_looked_at(reports, tmp_path):
    distil(tiny(tmp_path / "r"))
    for name in ("summary.json", "raster.json", "report.html"):
        (tmp_path / "r" / name).unlink()
    shutil.rmtree(tmp_path / "r" / "student")
    page = write_report(tmp_path / "r").read_text()
    assert "This run has not ended" in page and page.count('role="img"') == 2 * 4
