"""Algorithm 1: the K-FAC optimizer, and SGD as the baseline."""
