"""V-Net with one encoder and one to n decoders (the paper's Fig. 2; Milletari et al., 3DV 2016).

All nine methods use these blocks. Every size below is in voxels; feature maps are (N, channels, x, y, z).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEPTHS = (1, 2, 3, 3, 3)  # convolutions in each encoder stage, from full resolution to the bottleneck
STRIDE = 2 ** (len(DEPTHS) - 1)  # patch sides must be divisible by this


def conv_norm_relu(conv: nn.Module) -> list[nn.Module]:
    """A convolution of any kind, then BatchNorm and ReLU."""
    return [conv, nn.BatchNorm3d(conv.out_channels), nn.ReLU(inplace=True)]


def conv_stage(in_channels: int, out_channels: int, depth: int) -> nn.Sequential:
    """`depth` convolutions 3³, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for i in range(depth):
        layers += conv_norm_relu(nn.Conv3d(out_channels if i else in_channels, out_channels, 3, padding=1))
    return nn.Sequential(*layers)


def downsampling(in_channels: int, out_channels: int) -> nn.Sequential:
    """Halve every side with a convolution 2³ of stride 2."""
    return nn.Sequential(*conv_norm_relu(nn.Conv3d(in_channels, out_channels, 2, stride=2)))


class NearestConv3d(nn.Conv3d):
    """Nearest-neighbour up-sampling ×2, then a convolution 3³: (N, in, x, y, z) -> (N, out, 2x, 2y, 2z).

    Done as one transposed convolution. Repeating voxels is a transposed convolution with a kernel of 2³ ones and stride
    2, and two linear filters in a row are one: the 3³ kernel, turned round and summed over every 2³ window. The result
    differs by rounding alone; an output voxel costs 2³ instead of 3³ products a channel, and the map of repeated voxels
    is never made.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, below: Tensor) -> Tensor:
        kernel = F.pad(self.weight.flip(2, 3, 4), (1,) * 6)
        for axis in (2, 3, 4):
            kernel = kernel.narrow(axis, 0, 4) + kernel.narrow(axis, 1, 4)
        return F.conv_transpose3d(below, kernel.transpose(0, 1), self.bias, stride=2, padding=1)


class PointwiseConv3d(nn.Conv3d):
    """A convolution 1³: (N, in, x, y, z) -> (N, out, x, y, z).

    Done as a matrix product over the channels, which takes and returns (also backwards) channels-last maps; PyTorch's
    convolution 1³ on a CPU may return contiguous gradients, and every layer below would then convert them.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        voxels = features.permute(0, 2, 3, 4, 1)
        return F.linear(voxels, self.weight.flatten(1), self.bias).permute(0, 4, 1, 2, 3)


def upsampling(kind: str, in_channels: int, out_channels: int) -> nn.Sequential:
    """Double every side; `kind` is "deconv", "nearest" or "trilinear".

    Raises ValueError for another kind.
    """
    if kind == "deconv":
        return nn.Sequential(*conv_norm_relu(nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2)))
    if kind == "nearest":
        return nn.Sequential(*conv_norm_relu(NearestConv3d(in_channels, out_channels)))
    if kind == "trilinear":
        resize = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True)
        return nn.Sequential(resize, *conv_norm_relu(nn.Conv3d(in_channels, out_channels, 3, padding=1)))
    raise ValueError(f"unknown up-sampling {kind!r}: choose deconv, nearest or trilinear")


@contextmanager
def made_again(total: Tensor, *parts: Tensor) -> Iterator[None]:
    """Within, what autograd would keep of a sum are its parts: they are kept anyway, so a map of this size is saved."""
    if torch.compiler.is_compiling():  # the compiler decides by itself what to make again
        yield
        return
    address, parts = total.data_ptr(), tuple(part.detach() for part in parts)

    def pack(saved: Tensor) -> Tensor | tuple[Tensor, ...]:
        return parts if saved.data_ptr() == address else saved

    def unpack(packed: Tensor | tuple[Tensor, ...]) -> Tensor:
        return packed if isinstance(packed, Tensor) else torch.add(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class Encoder(nn.Module):
    """Five stages; returns their five maps, full resolution first, the bottleneck after Dropout3d 0.5.

    Raises ValueError unless every side of the image is divisible by 16.
    """

    def __init__(self, in_channels: int, filters: int, dropout: bool) -> None:
        super().__init__()
        widths = [filters * 2**level for level in range(len(DEPTHS))]
        self.parts = nn.ModuleList()  # in the order data flows, so that parameters come in it: stage, down, stage, …
        for level, (width, depth) in enumerate(zip(widths, DEPTHS, strict=True)):
            if level:
                self.parts.append(downsampling(widths[level - 1], width))
            self.parts.append(conv_stage(width if level else in_channels, width, depth))
        self.dropout = nn.Dropout3d(0.5) if dropout else nn.Identity()

    @property
    def stages(self) -> nn.ModuleList:
        """The convolutions of each level, full resolution first."""
        return self.parts[::2]

    @property
    def downs(self) -> nn.ModuleList:
        """What leads from each level to the next."""
        return self.parts[1::2]

    def forward(self, image: Tensor) -> list[Tensor]:
        if any(side % STRIDE for side in image.shape[2:]):
            raise ValueError(f"patch {tuple(image.shape[2:])}: every side must be divisible by {STRIDE}")
        first, *others = self.stages
        maps = [first(image)]
        for down, stage in zip(self.downs, others, strict=True):
            maps.append(stage(down(maps[-1])))
        maps[-1] = self.dropout(maps[-1])
        return maps


class Decoder(nn.Module):
    """From the five encoder maps to (logits, features); skips are added, not concatenated."""

    def __init__(self, num_classes: int, filters: int, kind: str, dropout: bool) -> None:
        super().__init__()
        widths = [filters * 2**level for level in range(len(DEPTHS))]
        self.parts = nn.ModuleList()  # in the order data flows: up, stage, up, …
        for level in reversed(range(len(DEPTHS) - 1)):
            self.parts.append(upsampling(kind, widths[level + 1], widths[level]))
            self.parts.append(conv_stage(widths[level], widths[level], DEPTHS[level]))
        self.dropout = nn.Dropout3d(0.5) if dropout else nn.Identity()
        self.head = PointwiseConv3d(filters, num_classes)

    @property
    def ups(self) -> nn.ModuleList:
        """The up-samplings, from 1/8 to full resolution."""
        return self.parts[::2]

    @property
    def stages(self) -> nn.ModuleList:
        """The convolutions behind each of them."""
        return self.parts[1::2]

    def levels(self, maps: Sequence[Tensor], dropout: bool = False) -> list[Tensor]:
        """The decoder's maps before any head, from 1/8 to full resolution, the last one after dropout if asked for."""
        outputs: list[Tensor] = []
        below = maps[-1]
        for up, stage, skip in zip(self.ups, self.stages, reversed(maps[:-1]), strict=True):
            above = up(below)
            with made_again(total := above + skip, above, skip):
                if dropout and len(outputs) + 1 == len(self.stages):
                    # Dropout and ReLU give the same in either order; in this one autograd keeps one map, not two.
                    below = stage[-1](self.dropout(stage[:-1](total)))
                else:
                    below = stage(total)
            outputs.append(below)
        return outputs

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        features = self.levels(maps, dropout=True)[-1]
        return self.head(features), features


class VNet(nn.Module):
    """One encoder, one decoder for each of `upsamplings`.

    Args:
        in_channels: image channels.
        num_classes: classes, background included.
        filters: channels of the first stage (the paper: 16); they double at each of the four stages below.
        upsamplings: one of "deconv", "nearest", "trilinear" a decoder. V-Net: ("deconv",).
        dropout: Dropout3d 0.5 on the bottleneck and on the features before each head.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 2,
        filters: int = 16,
        upsamplings: Sequence[str] = ("deconv", "nearest"),
        dropout: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = Encoder(in_channels, filters, dropout)
        self.decoders = nn.ModuleList(Decoder(num_classes, filters, kind, dropout) for kind in upsamplings)

    def forward(self, image: Tensor, decoders: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (N, classes, x, y, z) and features (N, filters, x, y, z), two lists with one entry a decoder.

        Args:
            image: (N, in_channels, x, y, z); every side divisible by 16, else ValueError.
            decoders: run only the first so many; default all.
        """
        maps = self.encoder(image)
        outputs = [decoder(maps) for decoder in self.decoders[:decoders]]
        return [logits for logits, _ in outputs], [features for _, features in outputs]


def in_present_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state as it is called now.

    Until its parameters came in the order data flows, a part had its place among its kind for a name: the encoder's
    "downs.1" is its "parts.3".
    """
    first = {"encoder": ("stages", "downs"), "decoders": ("ups", "stages")}

    def renamed(name: re.Match[str]) -> str:
        return f"{name['where']}.parts.{2 * int(name['place']) + first[name['part']].index(name['kind'])}."

    former = re.compile(r"(?P<where>(?P<part>encoder|decoders)(\.\d+)?)\.(?P<kind>stages|downs|ups)\.(?P<place>\d+)\.")
    return {former.sub(renamed, name): value for name, value in weights.items()}


def count_parameters(network: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation, written as GroupNorm with a channel a group: the same, but it keeps channels-last.

    Left alone, CUDA's would not: under autocast it casts to float32, and it returns maps contiguous.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """(N, channels, x, y, z) normalised, in the precision and layout in which they come."""
        return self.as_they_come(maps) if maps.is_cuda else super().forward(maps)

    def as_they_come(self, maps: Tensor) -> Tensor:
        """What a GPU does; its kernel adds up in float32 whatever the maps are."""
        with torch.autocast(maps.device.type, enabled=False):
            weight, bias = self.weight.to(maps.dtype), self.bias.to(maps.dtype)
            normalised = F.group_norm(maps, self.num_groups, weight, bias, self.eps)
        return normalised.contiguous(memory_format=torch.channels_last_3d)


def normalise_instances(module: nn.Module) -> None:
    """Replace every BatchNorm3d within by instance normalisation, which has no running statistics.

    Each volume is then normalised by its own mean and variance, in training and in prediction alike. What is not
    trained, a teacher's, stays so.
    """
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm3d):
                norm = InstanceNorm(child.num_features, child.num_features, child.eps)
                setattr(parent, name, norm.requires_grad_(child.weight.requires_grad))


def keep_all_channels(module: nn.Module) -> None:
    """Take away the dropout before every decoder's head; the bottleneck's stays."""
    for part in module.modules():
        if isinstance(part, Decoder):
            part.dropout = nn.Identity()


@contextmanager
def counted_volumes(module: nn.Module) -> Iterator[dict[type[nn.Module], list[int]]]:
    """Within, each pass through an encoder or a decoder of `module` adds its number of volumes to that part's list."""
    passes: dict[type[nn.Module], list[int]] = {Encoder: [], Decoder: []}

    def count(volumes: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: volumes.append(len(inputs[0]))

    # The first stage of each: a decoder's own input is a list of maps.
    handles = [
        part.stages[0].register_forward_pre_hook(count(passes[type(part)]))
        for part in module.modules()
        if type(part) in passes
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def to_channels_last(module: nn.Module) -> nn.Module:
    """Store the 3-D convolutions' weights channels-last, the layout in which CPUs and GPUs run them fastest."""
    return module.to(memory_format=torch.channels_last_3d)
