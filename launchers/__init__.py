"""Start a run: on this machine, on an existing Ray cluster, or as a Slurm job."""

import sys
from pathlib import Path

# Python puts the folder of a script first on its path. From this folder it would import ray.py instead of Ray.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
