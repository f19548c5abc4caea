"""The commands of `kfac-dist`: `table.py` lists them, each is loaded only when it was asked for."""
