"""`python -m ddfast` is the command `ddfast`."""

from __future__ import annotations

import sys

from ddfast.cli import main

sys.exit(main())
