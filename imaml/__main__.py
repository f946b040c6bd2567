"""``python -m imaml`` is the command ``imaml``."""

import sys

from imaml.cli import main

sys.exit(main())
