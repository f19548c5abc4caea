"""The maths of the Fisher: sees tensors and layers, never ranks."""
