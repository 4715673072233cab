"""`python -m guidance_interval` is the command `guidance-interval`."""

import sys

from .cli import main

sys.exit(main())
