"""Ray: sessions, placement, worker processes, health and failures. Only this package and `align.serve` name Ray."""
