"""Figures of the reports, by matplotlib: PNG and SVG files, and SVG that takes a page's colours."""
