"""Python imports this at its start where `environment` has put this folder on its path."""

import os

if "KFAC_DIST_EMULATED_GPUS" in os.environ:
    from tests.emulated_gpu import operations

    operations.install()
