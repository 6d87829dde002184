"""Lets the tests of this folder import `service_client`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
