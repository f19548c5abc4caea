"""ImageNet and other folders of images."""
