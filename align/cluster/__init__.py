"""Ray: processes, placement, failures. The only package that names Ray."""
