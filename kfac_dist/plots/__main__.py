"""`python -m kfac_dist.plots`."""

import sys

from kfac_dist.plots.command import main

sys.exit(main())
