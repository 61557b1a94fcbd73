"""`python -m tyir COMMAND ...` is `tyir COMMAND ...`."""

import importlib
import sys
from typing import Final

_HOME: Final = "tyir.tools.umbrella"  # by name: the core imports nothing that is built on it

if __name__ == "__main__":
    sys.exit(importlib.import_module(_HOME).main())
