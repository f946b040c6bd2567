"""Run the command line of imaml by ``python -m imaml``."""

import sys

from imaml.cli import main

sys.exit(main())
