"""Findings and measurements for people: in the terminal, as Markdown, as JSON."""
