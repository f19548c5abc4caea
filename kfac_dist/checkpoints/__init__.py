"""Checkpoints on disk: written whole or not at all, found out when damaged, nothing executed when read.

shard       one file of nested states, such as a rank's; its size and checksum
manifest    what a checkpoint consists of
store       the folder of a run's checkpoints: commit, prune, find the newest
"""
