"""The report of a run: `report.html`, one page that needs nothing else, made of what lies in the run's folder."""

from distill.html_report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
