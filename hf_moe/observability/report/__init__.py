"""One self-contained HTML page about the routing of a model."""
