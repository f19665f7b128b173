"""`python -m mlm` is the `mlm` command."""

import sys

from mlm.cli.main import console

sys.exit(console())
