"""Train an image classifier with distributed K-FAC: `[mpirun -n P] python train.py CONFIG.yaml [key=value …]`."""

from kfac_dist.commands.train import main
from kfac_dist.communicator import launch

if __name__ == "__main__":
    launch.run(main)
