"""K-FAC against other optimizers over batch sizes and grids of hyper-parameters: `python -m kfac_dist.study`."""
