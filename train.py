"""Train an image classifier with distributed K-FAC: `[mpirun -n P] python train.py CONFIG.yaml [key=value …]`."""

from kfac_dist.commands.endings import interruptible

with interruptible():
    from kfac_dist.commands.early import run_script

if __name__ == "__main__":
    run_script()
