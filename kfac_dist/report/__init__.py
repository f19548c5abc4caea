"""Pages and tables of runs and studies, each one file that needs no network: `python -m kfac_dist.report --help`."""
