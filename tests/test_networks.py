"""The network: sizes of the paper, what goes in and comes out, and the layout that changes no value."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mlrpl.bench.works import yardstick
from mlrpl.networks import (
    Decoder,
    NearestConv3d,
    PointwiseConv3d,
    VNet,
    count_parameters,
    in_present_names,
    keep_all_channels,
    normalise_instances,
    to_channels_last,
)

KINDS = ("deconv", "nearest", "trilinear")
DECODERS = [f"decoders.{number}" for number in range(len(KINDS))]


def tiny(upsamplings: tuple[str, ...] = ("deconv", "nearest"), **arguments) -> VNet:
    torch.manual_seed(0)
    return VNet(filters=2, upsamplings=upsamplings, **arguments)


@pytest.mark.parametrize(("upsamplings", "expected"), [
    (("deconv",), 9_448_866),
    (("deconv", "nearest"), 12_347_716),
    (("deconv", "nearest", "trilinear"), 15_246_566),
])  # fmt: skip
def test_parameter_counts_are_the_papers(upsamplings, expected):
    assert count_parameters(VNet(1, 2, 16, upsamplings)) == expected


def test_parameters_come_in_the_order_data_flows_with_the_values_of_a_plain_network():
    """So that weights of a network written as the field writes it can be taken over one by one."""
    networks = []
    for make in (VNet, yardstick().PlainVNet):
        torch.manual_seed(0)
        networks.append(make(2, 3, 2, KINDS))
    ours, plain = ([*network.parameters()] for network in networks)
    assert len(ours) == len(plain) and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_weights_of_before_parameters_came_in_that_order_are_known_by_their_names():
    network = tiny(KINDS)
    former = {
        f"network.{where}.{kind}.{place}.{name}": value
        for where, kinds in {"encoder": ("stages", "downs"), **dict.fromkeys(DECODERS, ("ups", "stages"))}.items()
        for kind in kinds
        for place, part in enumerate(getattr(network.get_submodule(where), kind))
        for name, value in part.state_dict().items()
    }
    former |= {f"network.{where}.head.{name}": network.get_submodule(f"{where}.head").state_dict()[name]
               for where in DECODERS for name in ("weight", "bias")}  # fmt: skip
    now = {f"network.{name}": value for name, value in network.state_dict().items()}
    found = in_present_names(former)
    assert found.keys() == now.keys() == in_present_names(now).keys() != former.keys()
    assert all(torch.equal(found[name], now[name]) for name in now)


def test_only_trainable_parameters_are_counted():
    network = tiny()
    everything = count_parameters(network)
    head = network.decoders[1].head.requires_grad_(False)
    assert count_parameters(network) == everything - sum(p.numel() for p in head.parameters())


@pytest.mark.parametrize("upsamplings", [*[(kind,) for kind in KINDS], KINDS[:2], KINDS], ids="+".join)
def test_every_decoder_returns_logits_and_features_of_the_patch(upsamplings):
    network = tiny(upsamplings, in_channels=3, num_classes=4)
    logits, features = network(torch.randn(2, 3, 32, 16, 48))
    assert [z.shape for z in logits] == [(2, 4, 32, 16, 48)] * len(upsamplings)
    assert [f.shape for f in features] == [(2, 2, 32, 16, 48)] * len(upsamplings)
    for decoder, z, f in zip(network.decoders, logits, features, strict=True):
        assert torch.equal(decoder.head(f), z)  # the features are what the head is given, after dropout


def test_decoders_differ_in_how_they_upsample():
    network = tiny(KINDS).eval()
    logits, _ = network(torch.randn(1, 1, 16, 16, 16))
    assert not torch.equal(logits[0], logits[1])
    resizings = [type(decoder.ups[0][0]).__name__ for decoder in network.decoders]
    assert resizings == ["ConvTranspose3d", "NearestConv3d", "Upsample"]
    trilinear = network.decoders[2].ups[0][0]
    assert trilinear.mode == "trilinear"
    assert trilinear.align_corners


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum(), inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_nearest_up_sampling_and_convolution_are_one_transposed_convolution(layout):
    layer = NearestConv3d(4, 3).double()
    below = torch.randn(2, 4, 3, 5, 2, dtype=torch.double).to(memory_format=layout).requires_grad_()
    repeated = F.interpolate(below, scale_factor=2, mode="nearest")
    expected = F.conv3d(repeated, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(below), expected)
    inputs = (below, layer.weight, layer.bias)
    torch.testing.assert_close(gradients(layer(below), *inputs), gradients(expected, *inputs))


def test_the_head_is_a_convolution_that_keeps_maps_channels_last():
    layer = PointwiseConv3d(4, 3).double()
    features = torch.randn(2, 4, 6, 5, 2, dtype=torch.double).to(memory_format=torch.channels_last_3d).requires_grad_()
    expected = F.conv3d(features, layer.weight, layer.bias)
    torch.testing.assert_close(layer(features), expected)
    inputs = (features, layer.weight, layer.bias)
    ours = gradients(layer(features), *inputs)
    torch.testing.assert_close(ours, gradients(expected, *inputs))
    assert ours[0].is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("normalisation", ["batch", "instance"])
def test_no_layer_leaves_the_channels_last_layout(normalisation):
    """Where one does, the next layer converts its maps, or their gradients, at more than a convolution's cost."""
    network = tiny(dropout=False)
    if normalisation == "instance":
        normalise_instances(network)
    to_channels_last(network)
    stray = []

    def watch(name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous(memory_format=torch.channels_last_3d):
            stray.append(name)

    for name, module in network.named_modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False  # a hook would watch the map that the next layer overwrites

            def both_ways(_module: nn.Module, _inputs: tuple, output: Tensor, name: str = name) -> None:
                watch(f"{name} forwards", output)
                output.register_hook(lambda gradient: watch(f"{name} backwards", gradient))

            module.register_forward_hook(both_ways)
    logits, _ = network(torch.randn(2, 1, 32, 16, 16).to(memory_format=torch.channels_last_3d))
    sum(z.square().mean() for z in logits).backward()
    assert stray == []


def test_instances_are_normalised_each_by_itself():
    network = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.Sequential(nn.BatchNorm3d(4)), nn.BatchNorm1d(4))
    normalise_instances(network)
    first, nested, other = network[1], network[2][0], network[3]
    assert isinstance(other, nn.BatchNorm1d)
    maps = torch.randn(3, 4, 5, 6, 7)
    for norm in (first, nested):
        assert not list(norm.buffers())  # nothing is remembered from batch to batch
        torch.testing.assert_close(norm(maps), nn.InstanceNorm3d(4)(maps))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 6e-3)])
def test_instances_on_a_gpu_are_normalised_in_the_precision_and_layout_in_which_they_come(dtype, error):
    """As on a CPU, but for rounding; nothing is cast or converted for the next layer to convert back."""
    network = nn.Sequential(nn.BatchNorm3d(4))
    normalise_instances(network)
    (norm,) = network
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    maps = (3 + torch.randn(2, 4, 8, 6, 5)).to(memory_format=torch.channels_last_3d)
    expected, given = maps.clone().requires_grad_(), maps.to(dtype).requires_grad_()
    norm(expected).sin().sum().backward()
    gradients = [p.grad.clone() for p in norm.parameters()]
    norm.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = norm.as_they_come(given)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    found.float().sin().sum().backward()
    for ours, reference in zip(
        (found, given.grad, *(p.grad for p in norm.parameters())),
        (norm(expected), expected.grad, *gradients),
        strict=True,
    ):
        assert (ours - reference).norm() <= error * reference.norm()


def test_a_teacher_stays_untrained_when_its_normalisation_changes():
    network = nn.ModuleList([nn.BatchNorm3d(4), nn.BatchNorm3d(4).requires_grad_(False)])
    normalise_instances(network)
    assert [norm.weight.requires_grad for norm in network] == [True, False]
    assert count_parameters(network) == 8


def test_with_instance_normalisation_other_volumes_and_training_make_no_difference():
    network = tiny(dropout=False)
    normalise_instances(network)
    network.double()
    images = torch.randn(2, 1, 32, 32, 32, dtype=torch.double)
    together = network.train()(images)[0][0]
    torch.testing.assert_close(network.eval()(images[:1])[0][0], together[:1])


def test_one_decoder_runs_the_first_alone():
    network = tiny().eval()
    network.decoders[1].register_forward_pre_hook(lambda *_: pytest.fail("the second decoder ran"))
    image = torch.randn(1, 1, 16, 16, 16)
    logits, features = network(image, decoders=1)
    assert len(logits) == len(features) == 1
    with pytest.raises(pytest.fail.Exception, match="second decoder"):
        network(image)


def test_a_batch_of_one_decoder_is_the_first_of_both():
    network = tiny().eval()
    image = torch.randn(2, 1, 16, 16, 16)
    assert torch.equal(network(image, decoders=1)[0][0], network(image)[0][0])


@pytest.mark.parametrize("patch", [(24, 16, 16), (16, 16, 8), (112, 112, 79)])
def test_a_patch_that_cannot_be_halved_four_times_is_refused(patch):
    with pytest.raises(ValueError, match=r"every side must be divisible by 16") as error:
        tiny()(torch.zeros(1, 1, *patch))
    assert str(patch) in str(error.value)


def test_an_unknown_upsampling_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"'cubic'.*deconv, nearest or trilinear"):
        tiny(("deconv", "cubic"))


def test_channels_last_gives_the_same_values_and_gradients():
    image = torch.randn(2, 1, 32, 16, 16)
    results = []
    for arrange in (lambda module: module, to_channels_last):
        network = arrange(tiny(KINDS)).eval()
        logits, _ = network(image if arrange is not to_channels_last else
                            image.to(memory_format=torch.channels_last_3d))  # fmt: skip
        sum(z.square().mean() for z in logits).backward()
        results.append((logits, [p.grad for p in network.parameters()]))
    (plain, plain_gradients), (last, last_gradients) = results
    torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(last_gradients, plain_gradients, rtol=1e-3, atol=1e-6)
    assert network.encoder.stages[1][0].weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_dropout_is_drawn_in_training_only_and_can_be_left_out():
    image = torch.randn(2, 1, 16, 16, 16)
    network = tiny().train()
    torch.manual_seed(1)
    first = network(image)[1][0]
    assert not torch.equal(network(image)[1][0], first)
    torch.manual_seed(1)
    assert torch.equal(network(image)[1][0], first)
    network.eval()
    assert torch.equal(network(image)[1][0], network(image)[1][0])
    without = tiny(dropout=False).train()
    assert torch.equal(without(image)[1][0], without(image)[1][0])


def test_the_heads_dropout_alone_can_be_left_out():
    network = tiny().train()
    maps = [torch.randn(2, 2 * 2**level, *(16 // 2**level,) * 3) for level in range(5)]
    assert not torch.equal(network.decoders[0](maps)[0], network.decoders[0](maps)[0])
    keep_all_channels(network)
    assert all(torch.equal(decoder(maps)[0], decoder(maps)[0]) for decoder in network.decoders)
    image = torch.randn(2, 1, 32, 32, 16)
    assert not torch.equal(network.encoder(image)[-1], network.encoder(image)[-1])  # the bottleneck's is still there


def test_every_encoder_map_reaches_the_logits():
    network = tiny(("deconv",)).eval()
    maps = network.encoder(torch.randn(1, 1, 16, 16, 16))
    whole = network.decoders[0](maps)[0]
    for level in range(len(maps)):
        changed = [m * 2 if i == level else m for i, m in enumerate(maps)]
        assert not torch.equal(network.decoders[0](changed)[0], whole)


def test_levels_are_the_decoders_maps_from_an_eighth_to_full_resolution():
    network = tiny(("nearest",)).eval()
    maps = network.encoder(torch.randn(1, 1, 32, 32, 16))
    assert [tuple(m.shape[1:]) for m in network.decoders[0].levels(maps)] == [
        (16, 4, 4, 2), (8, 8, 8, 4), (4, 16, 16, 8), (2, 32, 32, 16),
    ]  # fmt: skip


def straightforward(self: Decoder, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A decoder's pass with every map kept, and dropout behind the last ReLU."""
    below = maps[-1]
    for up, stage, skip in zip(self.ups, self.stages, reversed(maps[:-1]), strict=True):
        below = stage(up(below) + skip)
    features = self.dropout(below)
    return self.head(features), features


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_kept_changes_no_bit(monkeypatch, training, precision):
    def step() -> dict[str, Tensor]:
        network = to_channels_last(tiny(KINDS)).train(training)
        # Three levels deep: in bfloat16, oneDNN's weight gradients of 3³ convolutions differ from call to call on maps
        # one or two voxels thick (measured on a CPU with avx512_bf16), ours or not.
        image = torch.randn(2, 1, 48, 64, 48, requires_grad=True)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits, features = network(image.contiguous(memory_format=torch.channels_last_3d))
        loss = sum(z.float().square().mean() + f.float().mean() for z, f in zip(logits, features, strict=True))
        loss.backward()
        return {"loss": loss, "image": image.grad, **{name: p.grad for name, p in network.named_parameters()}}

    ours = step()
    monkeypatch.setattr(Decoder, "forward", straightforward)
    plain = step()
    assert len(ours) > 200 and all(gradient is not None for gradient in ours.values())
    assert [name for name in ours if not torch.equal(ours[name], plain[name])] == []


def test_sums_with_skips_and_maps_before_dropout_are_let_go():
    network = tiny()
    passing: list[StorageWeakRef] = []
    for decoder in network.decoders:
        for stage in decoder.stages:
            stage[0].register_forward_pre_hook(
                lambda _, sums: passing.append(StorageWeakRef(sums[0].untyped_storage()))
            )
        decoder.dropout.register_forward_pre_hook(
            lambda _, maps: passing.append(StorageWeakRef(maps[0].untyped_storage()))
        )
    logits, _ = network(torch.randn(2, 1, 16, 16, 16))
    assert all(z.requires_grad for z in logits)
    assert [storage.expired() for storage in passing] == [True] * 2 * (4 + 1)
