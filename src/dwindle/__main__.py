"""``python -m dwindle``: the command."""

import sys

from dwindle.cli import main

sys.exit(main())
