"""The repository root on the path, so that the tests import the modules from any way of starting pytest."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
