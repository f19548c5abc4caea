"""`KFAC.step` against dense matrices that this file computes from the equations alone. One process, float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_dist import KFAC, create_communicator
from kfac_dist.optim import distributed_fisher
from kfac_dist.optim.kfac import CommDtypes

SAMPLES, CLASSES = 8, 4
CONV = {"stride": (2, 1), "padding": (1, 0)}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (3, 2), **CONV)  # type: ignore[arg-type]
        self.bn = nn.BatchNorm2d(3)
        self.fc = nn.Linear(36, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    net = Net().double()
    with torch.no_grad():
        net.bn.weight.uniform_(0.5, 1.5)
        net.bn.bias.normal_()
    return net


def make_batch(step: int, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(samples, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (samples,), generator=generator)


class DenseKfac:
    """The reference: a dense Fisher for each layer, solved as a whole; weights are plain tensors by name."""

    LAYERS = ("conv", "bn", "fc")

    def __init__(self, net: Net, form: str, ema_decay: float | None = None, weight_decay: float = 0.0) -> None:
        self.w = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        self.w_before = {name: weight.clone() for name, weight in self.w.items()}
        self.form, self.ema_decay, self.weight_decay = form, ema_decay, weight_decay
        self.seen: dict[str, list[Tensor]] = {}  # all factors so far, oldest first
        self.fisher: dict[str, Tensor] = {}  # damped, dense

    def backward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Gradients of the weights; remembers inputs and output gradients of the layers."""
        w = {name: weight.clone().requires_grad_() for name, weight in self.w.items()}
        z = F.conv2d(x, w["conv.weight"], w["conv.bias"], **CONV)
        mean = z.mean(dim=(0, 2, 3), keepdim=True)
        var = ((z - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
        h = (z - mean) / (var + 1e-5).sqrt()
        b = h * w["bn.weight"].view(1, -1, 1, 1) + w["bn.bias"].view(1, -1, 1, 1)
        a = b.clamp(min=0).flatten(1)
        out = a @ w["fc.weight"].T + w["fc.bias"]
        loss = -torch.log_softmax(out, dim=1)[torch.arange(len(y)), y].mean()
        gradients = torch.autograd.grad(loss, [*w.values(), z, b, out])
        gz, gb, gout = gradients[-3:]
        self.captured = (x, gz, h.detach(), gb, a.detach(), gout)
        return dict(zip(w, gradients, strict=False))

    def factors(self) -> dict[str, Tensor]:
        """A and G of conv and fc, F of bn, sample by sample."""
        x, gz, h, gb, a, gout = self.captured
        n = len(x)
        patches = F.unfold(x, (3, 2), **CONV)  # (N, C·kh·kw, T)
        ones = torch.ones_like(patches[:, :1])
        patches = torch.cat([patches, ones], dim=1)
        positions = patches.shape[2]
        conv_A = sum(torch.outer(p, p) for sample in patches for p in sample.T) / n
        conv_G = sum(torch.outer(n * g, n * g) for s in gz for g in s.flatten(1).T) / (n * positions)
        a1 = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        fc_A = sum(torch.outer(v, v) for v in a1) / n
        fc_G = sum(torch.outer(n * g, n * g) for g in gout) / n
        j = [torch.cat([(n * g * hs).sum(dim=(1, 2)), (n * g).sum(dim=(1, 2))]) for g, hs in zip(gb, h, strict=True)]
        bn_F = sum(torch.outer(v, v) for v in j) / n
        channel = torch.arange(3).repeat(2)
        kept = {
            "full": torch.ones(6, 6),
            "unit": (channel[:, None] == channel[None]).double(),
            "diagonal": torch.eye(6, dtype=torch.float64),
        }
        return {"conv.A": conv_A, "conv.G": conv_G, "fc.A": fc_A, "fc.G": fc_G, "bn.F": bn_F * kept[self.form]}

    def running(self, key: str) -> Tensor:
        """Weighted mean of all factors, weights decay^age scaled to sum to one; the last one without decay."""
        seen = self.seen[key]
        if self.ema_decay is None:
            return seen[-1]
        weights = torch.tensor([self.ema_decay ** (len(seen) - 1 - i) for i in range(len(seen))], dtype=torch.float64)
        return sum(w * s for w, s in zip(weights / weights.sum(), seen, strict=True))

    def refresh(self, damping: float, ratio: float) -> None:
        for key, factor in self.factors().items():
            self.seen.setdefault(key, []).append(factor)
        for layer in ("conv", "fc"):
            A, G = self.running(f"{layer}.A"), self.running(f"{layer}.G")
            pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
            A = A + pi * damping**0.5 * torch.eye(len(A), dtype=torch.float64)
            G = G + damping**0.5 / pi * torch.eye(len(G), dtype=torch.float64)
            self.fisher[layer] = torch.kron(G, A)  # of the row-major d_out × (d_in + 1) matrix
        self.fisher["bn"] = self.running("bn.F") + ratio * damping * torch.eye(6, dtype=torch.float64)

    def update(self, gradients: dict[str, Tensor], lr: float, momentum: float, rescaling: str) -> None:
        directions = {}
        for layer in self.LAYERS:
            names = [f"{layer}.weight", f"{layer}.bias"]
            gw, gb = (gradients[name] + self.weight_decay * self.w[name] for name in names)
            joined = torch.cat([gw.reshape(len(gb), -1), gb[:, None]], dim=1) if layer != "bn" else torch.cat([gw, gb])
            solved = torch.linalg.solve(self.fisher[layer], joined.flatten()).view(joined.shape)
            parts = (solved[:, :-1], solved[:, -1]) if layer != "bn" else solved.chunk(2)
            directions |= {name: part.reshape(self.w[name].shape) for name, part in zip(names, parts, strict=True)}
        new = {n: w - lr * directions[n] + momentum * (w - self.w_before[n]) for n, w in self.w.items()}
        for name in ("conv.weight", "fc.weight"):
            scale = (2 * len(new[name])) ** 0.5 / (new[name].norm() + 1e-9)
            if rescaling == "always" or (rescaling == "cap" and scale < 1):
                new[name] = new[name] * scale
        self.w_before, self.w = self.w, new


def assert_same_weights(net: nn.Module, expected: dict[str, Tensor], rtol: float = 1e-11) -> None:
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), expected[name], rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


def backward(net: nn.Module, x: Tensor, y: Tensor) -> None:
    F.cross_entropy(net(x), y).backward()


@pytest.mark.parametrize("form", ["full", "unit", "diagonal"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ema_decay": 0.7},
        {"weight_decay": 0.1},
        {"weight_rescaling": "always"},
        {"weight_rescaling": "cap", "ema_decay": 0.95, "weight_decay": 0.01},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_three_steps_equal_the_dense_computation(form: str, settings: dict[str, Any]) -> None:
    net = make_net()
    reference = DenseKfac(net, form, settings.get("ema_decay"), settings.get("weight_decay", 0.0))
    optimizer = KFAC(net, create_communicator("reduce"), batchnorm=form, batchnorm_damping_ratio=4.0, **settings)
    for step in range(3):
        # Everything that a schedule may change, changes at every step.
        lr, momentum, damping = 0.3 / (step + 1), 0.9 - 0.1 * step, 0.1 * (step + 1)
        optimizer.param_groups[0].update(lr=lr, momentum=momentum, damping=damping)
        x, y = make_batch(step)
        optimizer.zero_grad()
        backward(net, x, y)
        optimizer.step()
        assert optimizer.report.retries == optimizer.report.kept_inverses == 0

        gradients = reference.backward(x, y)
        reference.refresh(damping, 4.0)
        before = {name: weight.clone() for name, weight in reference.w.items()}
        reference.update(gradients, lr, momentum, settings.get("weight_rescaling", "off"))
        assert_same_weights(net, reference.w)
        assert max((reference.w[name] - before[name]).abs().max() for name in before) > 1e-3, "a step that moves"


def test_first_running_average_equals_the_first_statistics() -> None:
    states = []
    for decay in (None, 0.99):
        net = make_net()
        optimizer = KFAC(net, create_communicator("reduce"), ema_decay=decay)
        backward(net, *make_batch(0))
        optimizer.step()
        states.append(optimizer.state_dict()["kfac"]["blocks"])
    for name, block in states[0].items():
        for matrix, running in block["running"].items():
            assert torch.equal(running, states[1][name]["running"][matrix])


def test_between_refreshes_the_old_inverses_are_used_and_nothing_is_captured() -> None:
    net = make_net()
    reference = DenseKfac(net, "diagonal")
    communicator = create_communicator("reduce")
    optimizer = KFAC(net, communicator, lr=0.1, momentum=0.5, damping=0.1, refresh=3)
    values = sum(parameter.numel() for parameter in net.parameters())
    for step in range(7):
        x, y = make_batch(step)
        sent = communicator.payload_bytes
        optimizer.zero_grad()
        backward(net, x, y)
        assert bool(optimizer._fisher.capture.captured) == (step % 3 == 0)
        optimizer.step()
        assert (communicator.payload_bytes - sent == 2 * 8 * values) == (step % 3 != 0), "only gradients travel"

        gradients = reference.backward(x, y)
        if step in (0, 3, 6):
            reference.refresh(0.1, 16.0)
        reference.update(gradients, 0.1, 0.5, "off")
        assert_same_weights(net, reference.w)


@pytest.mark.parametrize(
    ("form", "batchnorm_numel"), [("full", 6 * 7 // 2), ("unit", 3 * 3), ("diagonal", 6)], ids=lambda v: str(v)
)
@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.float64, 8)])
def test_payload_is_the_triangles_once_and_the_gradients_twice(
    form: str, batchnorm_numel: int, dtype: torch.dtype, itemsize: int
) -> None:
    net = make_net().to(dtype)
    communicator = create_communicator("reduce")
    optimizer = KFAC(net, communicator, batchnorm=form)
    x, y = make_batch(0)
    backward(net, x.to(dtype), y)
    assert communicator.payload_bytes == 0
    optimizer.step()
    # conv: A 13, G 3; fc: A 37, G 4. Gradients: conv 39, bn 6, fc 148.
    triangles = 13 * 14 // 2 + 3 * 4 // 2 + 37 * 38 // 2 + 4 * 5 // 2 + batchnorm_numel
    assert communicator.payload_bytes == itemsize * (triangles + 2 * (39 + 6 + 148))


# Accumulation --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """No BatchNorm: micro-batches then give exactly what the whole batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.fc = nn.Linear(75, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv(x)).flatten(1))


def accumulated(num_micro_batches: int) -> tuple[dict[str, Any], dict[str, Tensor], int]:
    torch.manual_seed(0)
    net = Plain().double()
    communicator = create_communicator("reduce")
    optimizer = KFAC(net, communicator, accumulation_steps=num_micro_batches, weight_rescaling="always")
    x, y = make_batch(0)
    for xs, ys in zip(x.chunk(num_micro_batches), y.chunk(num_micro_batches), strict=True):
        (F.cross_entropy(net(xs), ys) / num_micro_batches).backward()
    optimizer.step()
    tensors = {
        f"{name}.{matrix}": running
        for name, block in optimizer.state_dict()["kfac"]["blocks"].items()
        for matrix, running in block["running"].items()
    }
    tensors |= {f"{name}.grad": parameter.grad for name, parameter in net.named_parameters()}
    return tensors, {name: weight.detach() for name, weight in net.named_parameters()}, communicator.payload_bytes


@pytest.mark.parametrize("num_micro_batches", [2, 4, 8])
def test_accumulation_equals_one_batch_and_communicates_once(num_micro_batches: int) -> None:
    whole, whole_weights, whole_bytes = accumulated(1)
    parts, parts_weights, parts_bytes = accumulated(num_micro_batches)
    assert set(whole) == {f"{layer}.{matrix}" for layer in ("conv", "fc") for matrix in "AG"} | {
        f"{layer}.{parameter}.grad" for layer in ("conv", "fc") for parameter in ("weight", "bias")
    }
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-12, atol=1e-14, msg=lambda t, n=name: f"{n}: {t}")
    for name, expected in whole_weights.items():
        torch.testing.assert_close(parts_weights[name], expected, rtol=1e-10, atol=1e-12)
    assert parts_bytes == whole_bytes


def test_accumulation_averages_the_batchnorm_fisher_of_the_micro_batches() -> None:
    batches = [make_batch(step) for step in range(3)]
    singles = []
    for x, y in batches:
        net = make_net()
        optimizer = KFAC(net, create_communicator("reduce"), batchnorm="full")
        backward(net, x, y)
        optimizer.step()
        singles.append(optimizer.state_dict()["kfac"]["blocks"]["bn"]["running"]["F"])
    net = make_net()
    optimizer = KFAC(net, create_communicator("reduce"), batchnorm="full", accumulation_steps=3)
    for x, y in batches:
        (F.cross_entropy(net(x), y) / 3).backward()
    optimizer.step()
    together = optimizer.state_dict()["kfac"]["blocks"]["bn"]["running"]["F"]
    torch.testing.assert_close(together, sum(singles) / 3, rtol=1e-12, atol=1e-14)


def test_a_layer_that_this_rank_did_not_capture_contributes_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks may have captured it; what an earlier step left in the buffer must not reach their average."""
    net = make_net()
    communicator = create_communicator("reduce")
    optimizer = KFAC(net, communicator)
    backward(net, *make_batch(0))
    optimizer.step()
    optimizer.zero_grad()
    net.bn.eval()
    backward(net, *make_batch(1))
    sent = []
    original = communicator.start_reduce_scatter_v
    monkeypatch.setattr(
        communicator,
        "start_reduce_scatter_v",
        lambda buffer, *rest: sent.append(buffer.clone()) or original(buffer, *rest),
    )
    fisher = optimizer._fisher.factors.copies(("bn", "F"))[0]
    assert fisher.norm() > 0, "left over from the first step"
    optimizer.step()
    begin = fisher.storage_offset()
    assert sent[0][begin : begin + fisher.numel()].norm() == 0
    assert sent[0].norm() > 0


def test_the_log_tells_of_a_part_of_the_samples() -> None:
    layer, part = nn.Linear(6, 4), ", A and G from the first 6.25 % of each pass's samples"
    assert KFAC(layer, sample_fraction=0.0625).describe() == [f"K-FAC covers 1 layer{part}"]
    assert KFAC(layer).describe() == ["K-FAC covers 1 layer"]


def test_many_copies_of_factors_in_half_precision_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank sends the owner its own rounded copy: hundreds of ranks can fill a GPU."""
    layer = nn.Linear(6, 4, bias=False)
    optimizer = KFAC(layer, create_communicator("reduce"), comm_dtypes=CommDtypes(factors=torch.bfloat16))
    assert len(optimizer.describe()) == 1
    received = 2 * (6 * 7 // 2 + 4 * 5 // 2)
    monkeypatch.setattr(distributed_fisher, "_MANY_BYTES", received)
    assert len(optimizer.describe()) == 1
    monkeypatch.setattr(distributed_fisher, "_MANY_BYTES", received - 1)
    assert "a copy from each of 1 ranks" in optimizer.describe()[1]
    in_fp32 = KFAC(nn.Linear(6, 4, bias=False), create_communicator("reduce"))
    assert len(in_fp32.describe()) == 1
