"""The Fisher's block of each layer: one file a kind."""
