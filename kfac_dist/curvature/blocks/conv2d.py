"""Two-dimensional convolutions."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import Parameter

from kfac_dist.curvature import autocorrelation
from kfac_dist.curvature.blocks.kronecker import KroneckerBlock
from kfac_dist.curvature.factors import pixel_moment, pixel_rows
from kfac_dist.curvature.patches import Patches, patch_moment


class Conv2dBlock(KroneckerBlock):
    """Conv2d: F ≈ G ⊗ A, where the input at a position is a patch; the pixels of the output are the positions."""

    sample_dims = 3

    def __init__(self, name: str, module: nn.Conv2d, parameters: Sequence[Parameter]):
        super().__init__(name, module, parameters, module.groups)
        self.module: nn.Conv2d = module

    @property
    def patches(self) -> Patches:
        """As the layer's settings are now, which users change: stride and padding, of a backbone say."""
        return Patches.of(self.module)

    def feature_rows(self, values: Tensor) -> Tensor:
        return pixel_rows(values, self.groups)

    def input_moment(self, x: Tensor) -> Tensor:
        return patch_moment(x, self.patches, self.has_bias)

    def output_moment(self, g: Tensor) -> Tensor:
        return pixel_moment(g, self.groups)

    def pack_factor(self, matrix: str, x: Tensor, g: Tensor, num_samples: int | None, out: Tensor) -> None:
        if matrix != "A" or not autocorrelation.pays(x, self.patches):
            super().pack_factor(matrix, x, g, num_samples, out)
            return
        autocorrelation.pack_patch_moment(x.to(g.dtype), self.has_bias, 1 / (num_samples or g.shape[0]), out)
