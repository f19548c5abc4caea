"""`python -m kfac_dist.report`."""

import sys

from kfac_dist.report.command import main

sys.exit(main())
