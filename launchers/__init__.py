"""Start a run: on this machine, on a Ray cluster that is there, or as a Slurm job."""

import sys
from pathlib import Path

# Python looks first in the folder of a script that it was given. From this one it would import ray.py in place of Ray.
sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != Path(__file__).resolve().parent]
