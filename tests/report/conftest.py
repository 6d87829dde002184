"""Lets the tests of this folder import `layouts`, the rows of every format."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "data"))
