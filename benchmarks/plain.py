"""The yardstick: network, losses, inference and metrics written as plainly as the field writes them.

float32, contiguous tensors, `nn.Upsample` and a convolution, loops over the samples of a batch and
(N, C, F, x, y, z) temporaries in the mutual loss, one window at a time through all decoders, MedPy on whole volumes.
Nothing here is used by the package: `mlrpl bench` times it beside the package and checks that both give the same.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    """`stages` times convolution 3³, BatchNorm, ReLU."""

    def __init__(self, stages: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        ops: list[nn.Module] = []
        for stage in range(stages):
            ops.append(nn.Conv3d(in_channels if stage == 0 else out_channels, out_channels, 3, padding=1))
            ops.append(nn.BatchNorm3d(out_channels))
            ops.append(nn.ReLU(inplace=True))
        self.conv = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DownsamplingConvBlock(nn.Module):
    """Convolution 2³ of stride 2, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv3d(in_channels, out_channels, 2, stride=2), nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class UpsamplingBlock(nn.Module):
    """Transposed convolution, or interpolation and a convolution 3³; BatchNorm, ReLU."""

    def __init__(self, kind: str, in_channels: int, out_channels: int) -> None:
        super().__init__()
        ops: list[nn.Module] = []
        if kind == "deconv":
            ops.append(nn.ConvTranspose3d(in_channels, out_channels, 2, stride=2))
        elif kind == "trilinear":
            ops.append(nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True))
            ops.append(nn.Conv3d(in_channels, out_channels, 3, padding=1))
        else:
            ops.append(nn.Upsample(scale_factor=2, mode="nearest"))
            ops.append(nn.Conv3d(in_channels, out_channels, 3, padding=1))
        ops.append(nn.BatchNorm3d(out_channels))
        ops.append(nn.ReLU(inplace=True))
        self.conv = nn.Sequential(*ops)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PlainEncoder(nn.Module):
    """The V-Net's left half."""

    def __init__(self, in_channels: int, filters: int) -> None:
        super().__init__()
        self.block_one = ConvBlock(1, in_channels, filters)
        self.block_one_dw = DownsamplingConvBlock(filters, filters * 2)
        self.block_two = ConvBlock(2, filters * 2, filters * 2)
        self.block_two_dw = DownsamplingConvBlock(filters * 2, filters * 4)
        self.block_three = ConvBlock(3, filters * 4, filters * 4)
        self.block_three_dw = DownsamplingConvBlock(filters * 4, filters * 8)
        self.block_four = ConvBlock(3, filters * 8, filters * 8)
        self.block_four_dw = DownsamplingConvBlock(filters * 8, filters * 16)
        self.block_five = ConvBlock(3, filters * 16, filters * 16)
        self.dropout = nn.Dropout3d(p=0.5, inplace=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        x1 = self.block_one(x)
        x2 = self.block_two(self.block_one_dw(x1))
        x3 = self.block_three(self.block_two_dw(x2))
        x4 = self.block_four(self.block_three_dw(x3))
        x5 = self.block_five(self.block_four_dw(x4))
        return [x1, x2, x3, x4, self.dropout(x5)]


class PlainDecoder(nn.Module):
    """The V-Net's right half; skips are added."""

    def __init__(self, num_classes: int, filters: int, kind: str) -> None:
        super().__init__()
        self.block_five_up = UpsamplingBlock(kind, filters * 16, filters * 8)
        self.block_six = ConvBlock(3, filters * 8, filters * 8)
        self.block_six_up = UpsamplingBlock(kind, filters * 8, filters * 4)
        self.block_seven = ConvBlock(3, filters * 4, filters * 4)
        self.block_seven_up = UpsamplingBlock(kind, filters * 4, filters * 2)
        self.block_eight = ConvBlock(2, filters * 2, filters * 2)
        self.block_eight_up = UpsamplingBlock(kind, filters * 2, filters)
        self.block_nine = ConvBlock(1, filters, filters)
        self.dropout = nn.Dropout3d(p=0.5, inplace=False)
        self.out_conv = nn.Conv3d(filters, num_classes, 1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        x1, x2, x3, x4, x5 = maps
        x6 = self.block_six(self.block_five_up(x5) + x4)
        x7 = self.block_seven(self.block_six_up(x6) + x3)
        x8 = self.block_eight(self.block_seven_up(x7) + x2)
        x9 = self.dropout(self.block_nine(self.block_eight_up(x8) + x1))
        return self.out_conv(x9), x9


class PlainVNet(nn.Module):
    """One encoder, one decoder for each of `upsamplings`; modules are defined in the order data flows."""

    def __init__(self, in_channels: int, num_classes: int, filters: int, upsamplings: Sequence[str]) -> None:
        super().__init__()
        self.encoder = PlainEncoder(in_channels, filters)
        self.decoders = nn.ModuleList(PlainDecoder(num_classes, filters, kind) for kind in upsamplings)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits and features, one of each a decoder."""
        maps = self.encoder(x)
        outputs = [decoder(maps) for decoder in self.decoders]
        return [logits for logits, _ in outputs], [features for _, features in outputs]


def dice_loss(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 − (2Σ p y + 1e-8)/(Σ p + Σ y + 1e-8), mean over the foreground classes."""
    loss = torch.zeros((), device=probabilities.device)
    for c in range(1, probabilities.shape[1]):
        score, target = probabilities[:, c], (labels == c).float()
        intersect = torch.sum(score * target)
        loss = loss + 1 - (2 * intersect + 1e-8) / (torch.sum(score) + torch.sum(target) + 1e-8)
    return loss / (probabilities.shape[1] - 1)


def entropy(p: Tensor) -> Tensor:
    """−Σ_c p log(p + 1e-6)."""
    return -torch.sum(p * torch.log(p + 1e-6), dim=1)


def similarity_map(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Cosine of each voxel's feature and the prototype of each class, sample by sample: (N, C, x, y, z)."""
    prototypes = []
    for n in range(features.shape[0]):
        of_sample = []
        for c in range(num_classes):
            mask = (labels[n] == c).float().unsqueeze(0)
            of_sample.append(torch.sum(features[n] * mask, dim=(1, 2, 3)) / (torch.sum(mask) + 1e-6))
        prototypes.append(torch.stack(of_sample))
    prototype = torch.stack(prototypes)[:, :, :, None, None, None].expand(-1, -1, -1, *features.shape[2:])
    feature = features.unsqueeze(1).expand(-1, num_classes, -1, -1, -1, -1)
    return F.cosine_similarity(feature, prototype, dim=2)  # of two (N, C, F, x, y, z)


def mutual_loss(logits: list[Tensor], features: list[Tensor]) -> Tensor:
    """Σ_{i≠j} Σ m_ij w_j CE(z_i, ŷ_j) / (Σ m_ij + 1e-6)."""
    probabilities = [torch.softmax(z, dim=1) for z in logits]
    loss = torch.zeros((), device=logits[0].device)
    for i in range(len(logits)):
        for j in range(len(logits)):
            if i == j:
                continue
            with torch.no_grad():
                mask = (entropy(probabilities[i]) > entropy(probabilities[j])).float()
                pseudo_label = torch.argmax(probabilities[j], dim=1)
                similarity = similarity_map(features[j], pseudo_label, logits[j].shape[1])
                weight = torch.mean(1 - (similarity - probabilities[j]) ** 2, dim=1)
            cross_entropy = F.cross_entropy(logits[i], pseudo_label, reduction="none")
            loss = loss + torch.sum(mask * weight * cross_entropy) / (torch.sum(mask) + 1e-6)
    return loss


def train_step(
    network: PlainVNet, optimizer: torch.optim.Optimizer, image: Tensor, label: Tensor, beta: float
) -> dict[str, float]:
    """One iteration: labelled volumes first; the loss and its terms are read at once, as for a log."""
    labelled = label.shape[0]
    outputs, features = network(image)
    supervised = torch.zeros((), device=image.device)
    for output in outputs:
        supervised = supervised + dice_loss(torch.softmax(output, dim=1)[:labelled], label)
    mutual = mutual_loss(outputs, features)
    loss = 0.5 * supervised + beta * mutual
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return {"total": loss.item(), "supervised": supervised.item(), "mutual": mutual.item()}


def test_single_case(
    network: PlainVNet, image: np.ndarray, patch: Sequence[int], stride: Sequence[int], num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (C, x, y, z) of the first decoder and of the decoders' mean, one window at a time.

    `image` is (x, y, z) and at least as large as the patch.
    """
    device = next(network.parameters()).device
    w, h, d = image.shape
    sx, sy, sz = (math.ceil((n - p) / s) + 1 for n, p, s in zip(image.shape, patch, stride, strict=True))
    first = np.zeros((num_classes, *image.shape), dtype=np.float32)
    mean = np.zeros((num_classes, *image.shape), dtype=np.float32)
    count = np.zeros(image.shape, dtype=np.float32)
    for x in range(sx):
        xs = min(stride[0] * x, w - patch[0])
        for y in range(sy):
            ys = min(stride[1] * y, h - patch[1])
            for z in range(sz):
                zs = min(stride[2] * z, d - patch[2])
                window = (slice(xs, xs + patch[0]), slice(ys, ys + patch[1]), slice(zs, zs + patch[2]))
                test_patch = torch.from_numpy(image[window][None, None].astype(np.float32)).to(device)
                with torch.no_grad():
                    outputs, _ = network(test_patch)
                    y1 = [torch.softmax(output, dim=1).cpu().numpy()[0] for output in outputs]
                first[:, *window] += y1[0]
                mean[:, *window] += sum(y1) / len(y1)
                count[window] += 1
    return first / count, mean / count


def calculate_metric_percase(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float] | None = None
) -> dict[str, float]:
    """MedPy's four metrics on whole volumes."""
    from medpy.metric import binary  # here: all else is timed without MedPy, too

    return {
        "dice": binary.dc(prediction, reference),
        "jaccard": binary.jc(prediction, reference),
        "hd95": binary.hd95(prediction, reference, voxelspacing=spacing),
        "asd": binary.asd(prediction, reference, voxelspacing=spacing),
    }
