"""Workers: the processes of a role, and the driver's side of it. The only place that names Ray."""
