"""The Fisher's block of each layer: one file for each layer type, one row each in `create.py`."""
