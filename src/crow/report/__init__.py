"""The report of a purification, as one HTML file, and the model card that goes with the weights."""

from crow.report.card import model_card
from crow.report.html import render_comparison, render_report, write_report

__all__ = ["model_card", "render_comparison", "render_report", "write_report"]
