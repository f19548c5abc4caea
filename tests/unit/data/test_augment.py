"""Augmentation against explicit loops over images."""

import numpy as np
import pytest
import torch

from kfac_dist.data.augment import CropFlip, RandomErasing, RunningMixup, soft_labels
from kfac_dist.data.random_streams import RandomStream, keyed_generator
from kfac_dist.errors import InputError


def random_images(num_images: int, height: int = 6, width: int = 8, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_images)
    return 1 + torch.rand(num_images, channels, height, width, dtype=torch.float64, generator=generator)  # no zeros


def test_keys_separate_uses_iterations_and_slots() -> None:
    keys = [
        (RandomStream.MIXUP, 1, 2),
        (RandomStream.MIXUP, 2, 1),
        (RandomStream.MIXUP, 1, 3),
        (RandomStream.ERASING, 1, 2),
    ]
    draws = [keyed_generator(0, *key).random() for key in keys]
    assert len(set(draws)) == len(draws)
    assert keyed_generator(0, *keys[0]).random() == draws[0]
    assert keyed_generator(1, *keys[0]).random() != draws[0]


def test_soft_labels() -> None:
    labels = soft_labels(torch.tensor([2, 0]), 3, torch.float64)
    assert labels.dtype == torch.float64
    assert labels.tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(("padding", "flip"), [(2, True), (2, False), (0, True)])
def test_crop_flip_equals_a_loop(padding: int, flip: bool) -> None:
    images = random_images(400)
    height, width = images.shape[2:]
    crop_flip = CropFlip(padding, flip, seed=3)
    result = crop_flip.apply(images, iteration=5, slot=1)
    pixels = crop_flip.pixels(len(images), height, width, iteration=5, slot=1)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    seen = set()
    for n in range(len(images)):
        mirrored = bool(pixels[n, height] > pixels[n, height + 1])
        top = pixels[n, 0] + padding
        left = pixels[n, height:].min() + padding
        crop = padded[n, :, top : top + height, left : left + width]
        np.testing.assert_array_equal(result[n].numpy(), crop[:, :, ::-1] if mirrored else crop)
        seen.add((int(top), int(left), mirrored))
    assert len(seen) == (2 * padding + 1) ** 2 * (2 if flip else 1)  # every crop, both ways round


def test_crop_flip_off_returns_the_images_themselves() -> None:
    images = random_images(4)
    assert CropFlip(0, False, seed=0).apply(images, 0, 0) is images


def test_flip_takes_half_of_the_images() -> None:
    pixels = CropFlip(0, True, seed=0).pixels(10_000, 4, 4, 0, 0)
    assert (pixels[:, 4] == 3).mean() == pytest.approx(0.5, abs=0.02)


def test_running_mixup_is_equations_9_to_11() -> None:
    alpha, seed, slot = 0.4, 7, 3
    mixup = RunningMixup(alpha, seed)
    virtual_images, virtual_labels = None, None
    for iteration in range(4):
        images = random_images(5) + iteration
        labels = soft_labels(torch.arange(5) * (iteration + 1) % 4, 4, torch.float64)
        mixed_images, mixed_labels = mixup.mix(images, labels, iteration, slot)
        if virtual_images is None:
            virtual_images, virtual_labels = images.clone(), labels.clone()
        else:
            weights = np.random.default_rng([seed, RandomStream.MIXUP, iteration, slot]).beta(alpha, alpha, size=5)
            for n, weight in enumerate(weights):
                virtual_images[n] = weight * images[n] + (1 - weight) * virtual_images[n]
                virtual_labels[n] = weight * labels[n] + (1 - weight) * virtual_labels[n]
        torch.testing.assert_close(mixed_images, virtual_images, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(mixed_labels, virtual_labels, rtol=1e-14, atol=1e-14)
    assert len(set(weights)) == 5


def test_running_mixup_does_not_depend_on_who_has_a_slot_and_resumes_exactly() -> None:
    def batch(iteration: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = random_images(4) * (1 + iteration + 10 * slot)
        return images, soft_labels(torch.arange(4) % 3, 3, torch.float64)

    alone = RunningMixup(1.0, seed=1)
    ranks = [RunningMixup(1.0, seed=1) for _ in range(2)]
    for iteration in range(3):
        expected = [alone.mix(*batch(iteration, slot), iteration, slot) for slot in range(4)]
        if iteration == 2:  # go on from a checkpoint, with the slots the other way round
            states = [rank.state_dict() for rank in ranks]
            assert list(states[1]) == [1, 3]
            ranks = [RunningMixup(1.0, seed=1) for _ in range(2)]
            for rank, state in zip(ranks, reversed(states), strict=True):
                rank.load_state_dict(state)
        for slot in range(4):
            owner = slot % 2 if iteration < 2 else 1 - slot % 2
            images, labels = ranks[owner].mix(*batch(iteration, slot), iteration, slot)
            assert torch.equal(images, expected[slot][0])
            assert torch.equal(labels, expected[slot][1])


def test_running_mixup_off_keeps_nothing() -> None:
    mixup = RunningMixup(0.0, seed=0)
    images, labels = random_images(2), torch.ones(2, 2)
    for iteration in range(2):
        mixed = mixup.mix(images, labels, iteration, 0)
        assert mixed[0] is images
        assert mixed[1] is labels
    assert mixup.state_dict() == {}


def test_running_mixup_refuses_a_state_of_another_batch_size() -> None:
    mixup = RunningMixup(0.4, seed=0)
    mixup.mix(random_images(4), torch.ones(4, 2), 0, 0)
    with pytest.raises(InputError, match=r"slot 0 has images \(4, 3, 6, 8\).*got \(2, 3, 6, 8\).*batch\.per_rank"):
        mixup.mix(random_images(2), torch.ones(2, 2), 1, 0)


def test_random_erasing_equals_a_loop_and_leaves_its_input() -> None:
    erasing = RandomErasing(0.5, (0.02, 0.25), (0.3, 1.0), seed=2)
    images = random_images(50)
    original = images.clone()
    result = erasing.apply(images, iteration=4, slot=1)
    rectangles = erasing.rectangles(50, 6, 8, iteration=4, slot=1)
    assert torch.equal(images, original)
    for n, (top, bottom, left, right) in enumerate(rectangles):
        original[n, :, top:bottom, left:right] = 0
    assert torch.equal(result, original)
    assert not torch.equal(result, images)


def test_random_erasing_draws_what_it_promises() -> None:
    height, width, num_images = 200, 240, 20_000
    erasing = RandomErasing(0.3, (0.02, 0.25), (0.3, 1.0), seed=0)
    top, bottom, left, right = erasing.rectangles(num_images, height, width, 0, 0).T
    chosen = bottom > 0
    assert chosen.mean() == pytest.approx(0.3, abs=0.015)
    assert not np.stack([top, left, right])[:, ~chosen].any()
    heights, widths = (bottom - top)[chosen], (right - left)[chosen]
    share = heights * widths / (height * width)
    assert share.min() == pytest.approx(0.02, abs=0.001)
    assert share.max() == pytest.approx(0.25, abs=0.003)
    assert share.mean() == pytest.approx(0.135, abs=0.003)
    ratio = np.minimum(heights, widths) / np.maximum(heights, widths)
    assert ratio.min() == pytest.approx(0.3, abs=0.02)
    assert ratio.mean() == pytest.approx(0.65, abs=0.01)
    assert (heights < widths).mean() == pytest.approx(0.5, abs=0.03)
    assert top.min() == left.min() == 0
    assert bottom.max() == height
    assert right.max() == width
    assert (top[chosen] / (height - heights)).mean() == pytest.approx(0.5, abs=0.02)  # places are uniform
    assert (left[chosen] / (width - widths)).mean() == pytest.approx(0.5, abs=0.02)


def test_random_erasing_always_fits_even_in_small_and_flat_images() -> None:
    erasing = RandomErasing(1.0, (0.02, 1.0), (0.1, 1.0), seed=0)
    top, bottom, left, right = erasing.rectangles(5_000, 2, 40, 0, 0).T
    assert (top >= 0).all()
    assert (bottom <= 2).all()
    assert (left >= 0).all()
    assert (right <= 40).all()
    assert (bottom > top).all()
    assert (right > left).all()


def test_random_erasing_without_a_chosen_image_copies_nothing_and_keeps_the_dtype() -> None:
    images = random_images(8).to(torch.bfloat16)
    assert RandomErasing(0.0, (0.1, 0.2), (0.5, 1.0), seed=0).apply(images, 0, 0) is images
    assert RandomErasing(1.0, (0.1, 0.2), (0.5, 1.0), seed=0).apply(images, 0, 0).dtype == torch.bfloat16


def test_erasing_stays_out_of_the_state_of_mixup() -> None:
    mixup = RunningMixup(0.4, seed=0)
    images, _ = mixup.mix(random_images(4), torch.ones(4, 2), 0, 0)
    erased = RandomErasing(1.0, (0.2, 0.3), (0.5, 1.0), seed=0).apply(images, 0, 0)
    assert (erased == 0).any()
    assert (mixup.state_dict()[0][0] != 0).all()
