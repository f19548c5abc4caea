"""`python -m kfac_dist`: the same as `kfac-dist`, where that is not on PATH."""

import sys

from kfac_dist.commands.endings import interruptible

if __name__ == "__main__":  # a study's worker process imports this module, too
    with interruptible():
        from kfac_dist.commands.table import main
    sys.exit(main(program="python -m kfac_dist"))
