"""`python -m kfac_dist.study`."""

import sys

from kfac_dist.communicator.terminal import outliving_readers
from kfac_dist.study.command import main

if __name__ == "__main__":  # a worker process imports this module, too
    with outliving_readers():
        sys.exit(main())
