"""Check a machine and a launch before training: `[mpirun -n P] python scripts/doctor.py [--data DIR] [--output DIR]`.

The same as `kfac-dist doctor`.
"""

import sys

from kfac_dist.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
