"""Networks: structure, initialisation, what they refuse; running statistics over slots."""

import math

import pytest
import torch
from torch import nn

from kfac_dist.errors import InputError
from kfac_dist.models import SlotwiseBatchNorm, available_models, create_model
from kfac_dist.models.cifar_resnet import ResidualBlock

CIFAR = (3, 32, 32)


@pytest.mark.parametrize(
    ("name", "image_shape", "num_parameters"),
    [
        ("digits_cnn", (1, 8, 8), 9 * 16 + 144 * 32 + 2 * 48 + 129 * 10),
        ("resnet20", CIFAR, 269_722),
        ("resnet32", CIFAR, 464_154),
        ("resnet44", CIFAR, 658_586),
        ("resnet56", CIFAR, 853_018),
        ("alexnet32", CIFAR, 5_871_434),
        ("resnet18", CIFAR, 11_181_642),
    ],
)
def test_size_and_output(name: str, image_shape: tuple[int, int, int], num_parameters: int) -> None:
    model = create_model(name, 10, image_shape, seed=0)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    logits = model(torch.randn(2, *image_shape))
    assert logits.shape == (2, 10)
    nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_depth_of_the_cifar_networks() -> None:
    for depth in (20, 32, 44, 56):
        model = create_model(f"resnet{depth}", 10, CIFAR, seed=0)
        assert sum(isinstance(module, nn.Conv2d | nn.Linear) for module in model.modules()) == depth


def test_shortcut_has_no_parameters_and_pads_channels_with_zeros() -> None:
    block = ResidualBlock(2, 4, stride=2).double()
    nn.init.zeros_(block.conv2.weight)
    x = torch.rand(3, 2, 5, 7, dtype=torch.float64)
    expected = torch.zeros(3, 4, 3, 4, dtype=torch.float64)
    expected[:, 1:3] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


def test_he_normal_initialisation() -> None:
    for name in ("alexnet32", "resnet18"):
        for module in create_model(name, 10, CIFAR, seed=4).modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                fan_in = module.weight.shape[1:].numel()
                spread = math.sqrt(2 / fan_in)
                sampling_error = 5 / math.sqrt(2 * module.weight.numel())
                assert module.weight.std().item() == pytest.approx(spread, rel=sampling_error)
                assert abs(module.weight.mean().item()) < 5 * spread / math.sqrt(module.weight.numel())
                assert module.bias is None or not module.bias.any()
            elif isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all()
                assert not module.bias.any()


def test_fan_in_of_a_grouped_convolution() -> None:
    model = create_model("shufflenet_v2_x0_5", 10, (3, 64, 64), seed=0)
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels]
    spreads = torch.tensor([module.weight.std().item() for module in depthwise])
    assert spreads.mean().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)


# swin_t also has parameters that HeNormal leaves alone.
@pytest.mark.parametrize("name", ["digits_cnn", "swin_t"])
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    shape = (3, 32, 32)
    torch.manual_seed(98)
    first = create_model(name, 10, shape, seed=1)
    before = torch.random.get_rng_state()
    second = create_model(name, 10, shape, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(99)
    third = create_model(name, 10, shape, seed=1)
    other = create_model(name, 10, shape, seed=2)
    for a, b, c in zip(first.parameters(), second.parameters(), third.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_unknown_name_lists_close_ones() -> None:
    with pytest.raises(InputError, match=r"'resnet2O'; close to it: .*resnet20.*To list all: .*available_models"):
        create_model("resnet2O", 10, CIFAR, seed=0)
    names = available_models()
    assert {"digits_cnn", "alexnet32", "resnet20", "resnet50", "vgg16"} <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "image_shape", "problem"),
    [
        ("alexnet32", (3, 28, 28), "3x28x28.*must be 32"),
        ("digits_cnn", (1, 3, 8), "1x3x8.*at least 4"),
        ("alexnet", CIFAR, "3x32x32.*too small"),
        ("resnet18", (1, 32, 32), "1x32x32.*channel"),
        ("vit_b_16", CIFAR, "3x32x32.*Expected 224"),
    ],
)
def test_images_that_do_not_fit_are_refused(name: str, image_shape: tuple[int, int, int], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        create_model(name, 10, image_shape, seed=0)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_models_with_auxiliary_outputs_return_logits_alone(name: str) -> None:
    model = create_model(name, 7, (3, 96, 96), seed=0)
    assert model(torch.randn(2, 3, 96, 96)).shape == (2, 7)


def normalised_network(momentum: float) -> nn.Sequential:
    network = nn.Sequential(
        nn.BatchNorm2d(3, momentum=momentum),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.BatchNorm1d(4, momentum=momentum / 2),
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.double()


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_running_statistics_do_not_depend_on_the_ranks(momentum: float, num_ranks: int) -> None:
    num_slots, iterations = 6, 3
    slots = torch.randn(
        iterations, num_slots, 5, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    ranks = [normalised_network(momentum) for _ in range(num_ranks)]
    slotwise = [SlotwiseBatchNorm(rank) for rank in ranks]
    first = ranks[0][0]
    assert isinstance(first, nn.BatchNorm2d)
    assert first.running_mean is not None
    assert first.running_var is not None
    mean, variance = first.running_mean.clone(), first.running_var.clone()
    for iteration in range(iterations):
        batches = slots[iteration].transpose(1, 2).flatten(2)  # (slot, channel, values)
        mean = (1 - momentum) * mean + momentum * batches.mean(2).mean(0)
        variance = (1 - momentum) * variance + momentum * batches.var(2).mean(0)
        for rank, network in enumerate(ranks):
            local = range(rank, num_slots, num_ranks)
            for j, slot in enumerate(local):
                slotwise[rank].before_slot(j, len(local))
                network(slots[iteration, slot])
    # One average at the end is enough, because ranks only ever scale and add.
    for copies in zip(*(rank.running_buffers() for rank in slotwise), strict=True):
        copies[0].copy_(torch.stack(copies).mean(0))
    torch.testing.assert_close(first.running_mean, mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(first.running_var, variance, rtol=1e-13, atol=1e-13)

    alone = normalised_network(momentum)
    alone_slotwise = SlotwiseBatchNorm(alone)
    for iteration in range(iterations):
        for slot in range(num_slots):
            alone_slotwise.before_slot(slot, num_slots)
            alone(slots[iteration, slot])
    buffers = alone_slotwise.running_buffers()
    assert len(buffers) == 4
    for buffer, expected in zip(slotwise[0].running_buffers(), buffers, strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-13, atol=1e-13)


def test_one_slot_is_the_ordinary_momentum() -> None:
    network = normalised_network(0.1)
    SlotwiseBatchNorm(network).before_slot(0, 1)
    assert [network[0].momentum, network[3].momentum] == [0.1, 0.05]


def test_layers_without_running_statistics_are_left_alone_and_cumulative_ones_refused() -> None:
    without = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    slotwise = SlotwiseBatchNorm(without)
    slotwise.before_slot(0, 2)
    assert slotwise.running_buffers() == []
    assert without[0].momentum == 0.1
    with pytest.raises(InputError, match=r"layer norm: momentum must be a number, got None"):
        SlotwiseBatchNorm(nn.ModuleDict({"norm": nn.BatchNorm1d(3, momentum=None)}))


def test_resnet50_reduces_in_the_3x3_or_the_first_1x1_convolution() -> None:
    shape = (3, 64, 64)
    plain, later, earlier = (
        create_model("resnet50", 10, shape, seed=0, variant=variant) for variant in (None, "v1.5", "v1")
    )
    for model, first, second in ((plain, 1, 2), (later, 1, 2), (earlier, 2, 1)):
        for name in ("layer2", "layer3", "layer4"):
            block = model.get_submodule(f"{name}.0")
            assert (block.conv1.stride, block.conv2.stride) == ((first, first), (second, second))
            assert model.get_submodule(f"{name}.1").conv1.stride == (1, 1)
        assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Conv2d))
        assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032 - 990 * 2049
    images = torch.randn(2, *shape)
    assert all(map(torch.equal, later.state_dict().values(), earlier.state_dict().values()))
    assert torch.equal(plain(images), later(images))
    assert not torch.allclose(earlier(images), later(images))
    with pytest.raises(InputError, match=r"model\.variant must be left out for resnet18: only bottleneck ResNets"):
        create_model("resnet18", 10, CIFAR, seed=0, variant="v1")


@pytest.mark.parametrize(("name", "last"), [("resnet20", "bn2"), ("resnet18", "bn2"), ("resnet50", "bn3")])
def test_zero_init_last_gamma(name: str, last: str) -> None:
    model = create_model(name, 10, CIFAR, seed=0, zero_init_last_gamma=True)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    zero = {n for n, m in norms.items() if not m.weight.any()}
    assert zero == {n for n in norms if "." in n and n.endswith(f".{last}")}
    assert len(zero) == {"resnet20": 9, "resnet18": 8, "resnet50": 16}[name]
    with pytest.raises(InputError, match=r"model\.zero_init_last_gamma must be false for alexnet32"):
        create_model("alexnet32", 10, CIFAR, seed=0, zero_init_last_gamma=True)
