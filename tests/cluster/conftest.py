"""Toy workers are imported by name, here and in the processes of Ray."""

import os
import sys
from pathlib import Path

HERE = str(Path(__file__).parent)
sys.path.append(HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), HERE]))
