"""Algorithm 1: the K-FAC optimizer, and the baselines that it is compared with."""
