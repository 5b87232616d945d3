"""`python tools/plot.py` finds this file instead of the package lab: it says how to run tools."""

import sys
from pathlib import Path

name = Path(sys.argv[0]).stem
raise SystemExit(f'{sys.argv[0]} must be run as a module, from the root: python -m tools.{name}')
