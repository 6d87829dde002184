"""Reports in the terminal, as HTML, Markdown and JSON."""
