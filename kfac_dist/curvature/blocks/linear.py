"""Linear layers."""

from torch import Tensor

from kfac_dist.curvature.blocks.kronecker import KroneckerBlock


class LinearBlock(KroneckerBlock):
    """Linear: F ≈ G ⊗ A; dimensions between the batch's and the features' are positions."""

    sample_dims = 1

    def feature_rows(self, values: Tensor) -> Tensor:
        return values.reshape(1, -1, values.shape[-1])
