"""Data sets, the order of samples, augmentation."""
