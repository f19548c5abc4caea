"""Networks without residual connections: a small one for digits, and AlexNet for 32x32 images."""

from __future__ import annotations

from torch import nn


def digits_cnn(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """Two 3x3 convolutions with BatchNorm, each halving the image, and a linear layer.

    Args:
        num_classes: Outputs.
        image_shape: (channels, height, width), height and width at least 4.

    Raises:
        ValueError: If the images are smaller.
    """
    channels, height, width = image_shape
    if min(height, width) < 4:
        raise ValueError("height and width must be at least 4")
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), num_classes),
    )


def alexnet32(num_classes: int, image_shape: tuple[int, int, int]) -> nn.Sequential:
    """AlexNet (Krizhevsky, Sutskever and Hinton, 2012) for 32x32 images.

    Five convolutions with the channels of the one-GPU version and overlapping 3x3 pooling; the first kernel
    is 5x5 with stride 1 in place of 11x11 with stride 4, and the hidden linear layers have 1,024 units.
    Without dropout, whose masks would depend on how a batch is spread over ranks, and without local response
    normalisation.

    Args:
        num_classes: Outputs.
        image_shape: (channels, 32, 32).

    Raises:
        ValueError: If the images have another size.
    """
    channels, height, width = image_shape
    if (height, width) != (32, 32):
        raise ValueError("height and width must be 32")
    features: list[nn.Module] = []
    for outputs, kernel, pooled in (
        (64, 5, True),
        (192, 5, True),
        (384, 3, False),
        (256, 3, False),
        (256, 3, True),
    ):
        features += [nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
        if pooled:
            features.append(nn.MaxPool2d(3, stride=2))
        channels = outputs
    return nn.Sequential(
        *features,
        nn.Flatten(),
        nn.Linear(256 * 3 * 3, 1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, 1024),
        nn.ReLU(inplace=True),
        nn.Linear(1024, num_classes),
    )
