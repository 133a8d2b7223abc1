"""WR, HR and the mutual loss against golden values, and what must hold for any input."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mlrpl.losses import dice_loss
from mlrpl.reliability import (
    WEIGHTINGS,
    _class_sums,
    entropy,
    mutual_loss,
    prototype_similarity,
    select,
    weigh,
)

GOLDEN = sorted((Path(__file__).parent / "data").glob("mlrpl_*.npz"))


def assert_close(ours: torch.Tensor, expected: np.ndarray) -> None:
    """Equal to a relative 1e-5 of the largest expected value."""
    expected = torch.as_tensor(expected)
    assert (ours.detach() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    return dict(np.load(request.param))


def random_decoders(
    classes: int = 3, decoders: int = 2, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(2, classes, 6, 5, 4, generator=generator) for _ in range(decoders)]
    features = [torch.randn(2, 16, 6, 5, 4, generator=generator) for _ in range(decoders)]
    return logits, features


def test_golden_vectors_are_there() -> None:
    assert len(GOLDEN) == 3


def test_selection_is_golden_exactly(golden: dict[str, np.ndarray]) -> None:
    p = [torch.as_tensor(z).softmax(1) for z in golden["logits"]]
    for i in range(len(p)):
        for j in range(len(p)):
            if i != j:
                assert np.array_equal(select("wr", p[i], p[j]).numpy(), golden["select"][i, j])


def test_weight_is_golden(golden: dict[str, np.ndarray]) -> None:
    for z, f, expected in zip(golden["logits"], golden["features"], golden["weight"], strict=True):
        p = torch.as_tensor(z).softmax(1)
        assert_close(weigh("mse", p, torch.as_tensor(f), p.argmax(1)), expected)


def test_losses_and_gradient_are_golden(golden: dict[str, np.ndarray]) -> None:
    logits = torch.as_tensor(golden["logits"]).requires_grad_()
    features = torch.as_tensor(golden["features"]).requires_grad_()
    mutual = mutual_loss(list(logits), list(features))
    assert_close(mutual, golden["mutual_loss"])
    total = float(golden["beta"]) * mutual
    if "dice_loss" in golden:
        labels = torch.as_tensor(golden["labels"]).long()
        supervised = sum(dice_loss(z[:2].softmax(1), labels) for z in logits)
        assert_close(supervised, golden["dice_loss"])
        total = total + float(golden["gamma"]) * supervised
    assert_close(total, golden["total"])
    total.backward()
    assert_close(logits.grad, golden["grad_logits"])
    assert features.grad is None


def test_the_surer_decoder_teaches() -> None:
    sure, unsure = torch.tensor([0.05, 0.95]), torch.tensor([0.4, 0.6])
    shape = (1, 2, 1, 1, 1)
    assert select("wr", student=unsure.view(shape), teacher=sure.view(shape)).item()
    assert not select("wr", student=sure.view(shape), teacher=unsure.view(shape)).item()


def test_no_voxel_teaches_both_ways_and_equal_entropies_teach_nobody() -> None:
    a, b = (z.softmax(1) for z in random_decoders()[0])
    assert select("wr", a, b).any()
    assert not (select("wr", a, b) & select("wr", b, a)).any()
    assert not select("wr", a, a.clone()).any()
    logits, features = random_decoders(classes=2)
    assert mutual_loss([logits[0], logits[0].clone()], features).item() == 0


def test_absent_class_has_zero_similarity_and_weight_one_minus_p_squared() -> None:
    logits, features = random_decoders(classes=3)
    z = logits[0].clone()
    z[:, 2] = z.amin() - 1
    p = z.softmax(1)
    labels = p.argmax(1)
    assert not (labels == 2).any()
    s = prototype_similarity(features[0], labels, 3)
    assert (s[:, 2] == 0).all()
    expected = ((1 - (s[:, 0] - p[:, 0]) ** 2) + (1 - (s[:, 1] - p[:, 1]) ** 2) + (1 - p[:, 2] ** 2)) / 3
    torch.testing.assert_close(weigh("mse", p, features[0], labels), expected)
    assert torch.isfinite(mutual_loss([z, logits[1]], features))


def test_prototypes_are_per_volume() -> None:
    logits, features = random_decoders()
    labels = logits[0].argmax(1)
    together = prototype_similarity(features[0], labels, 3)
    alone = torch.cat([prototype_similarity(features[0][n : n + 1], labels[n : n + 1], 3) for n in range(2)])
    torch.testing.assert_close(together, alone)


def test_similarity_is_the_plain_cosine() -> None:
    logits, features = random_decoders()
    labels = logits[0].argmax(1)
    s = prototype_similarity(features[0], labels, 3)
    f = features[0][1]
    prototype = f[:, labels[1] == 2].mean(1)
    plain = torch.cosine_similarity(f, prototype.view(-1, 1, 1, 1), dim=0)
    torch.testing.assert_close(s[1, 2], plain, atol=1e-5, rtol=1e-5)


def test_mutual_loss_is_the_plain_sum() -> None:
    """Against the formula written voxel by voxel."""
    logits, features = random_decoders()
    p = [z.softmax(1) for z in logits]
    expected = 0.0
    for i, j in ((0, 1), (1, 0)):
        labels = p[j].argmax(1)
        weight = weigh("mse", p[j], features[j], labels)
        numerator = count = 0.0
        for index in np.ndindex(*labels.shape):
            n, x, y, z = index
            if entropy(p[i])[index] > entropy(p[j])[index]:
                count += 1
                numerator -= weight[index] * p[i][n, labels[index], x, y, z].log()
        expected += numerator / (count + 1e-6)
    torch.testing.assert_close(mutual_loss(logits, features), torch.as_tensor(expected))


@pytest.mark.parametrize("decoders", [2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_gradient_is_that_of_the_plain_sum(decoders: int, layout: torch.memory_format) -> None:
    """Σ_j scale_ij (softmax(z_i) − one-hot(ŷ_j)), in double precision, whatever the layout."""
    logits, features = random_decoders(decoders=decoders)
    logits = [z.double().to(memory_format=layout).requires_grad_() for z in logits]
    features = [f.double().to(memory_format=layout) for f in features]
    mutual_loss(logits, features).backward()
    p = [z.detach().softmax(1) for z in logits]
    for i, z in enumerate(logits):
        expected = torch.zeros_like(p[i])
        for j in range(decoders):
            if i != j:
                labels = p[j].argmax(1)
                mask = entropy(p[i]) > entropy(p[j])
                scale = mask * weigh("mse", p[j], features[j], labels) / (mask.sum() + 1e-6)
                one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
                expected += scale.unsqueeze(1) * (p[i] - one_hot)
        torch.testing.assert_close(z.grad, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_autocast_leaves_the_loss_in_float32(precision: torch.dtype) -> None:
    """In float16 the sum of a feature over a large volume is infinite, and the loss would be NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(1, 2, 64, 64, 32, generator=generator) for _ in range(2)]
    features = [1 + torch.rand(1, 4, 64, 64, 32, generator=generator) for _ in range(2)]
    assert features[0].sum((2, 3, 4)).min() > torch.finfo(torch.float16).max
    expected = mutual_loss(logits, features)
    with torch.autocast("cpu", dtype=precision):
        assert mutual_loss(logits, features) == expected


def test_gradients_pass_gradcheck_in_double_precision() -> None:
    """Away from ties a small step changes neither m nor ŷ, but w and Σm are constants: they are held fixed here."""
    logits, features = random_decoders(classes=2)
    logits = [z[:1, :, :2, :2, :2].double().requires_grad_() for z in logits]
    features = [f[:1, :, :2, :2, :2].double() for f in features]
    loss = lambda *z: mutual_loss(z, features, "all", "none")  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_bounded_and_constant(weighting: str) -> None:
    logits, features = random_decoders()
    p = logits[0].softmax(1).requires_grad_()
    f = features[0].requires_grad_()
    w = weigh(weighting, p, f, p.argmax(1))
    assert w.shape == (2, 6, 5, 4)
    assert w.max() <= (2 if weighting == "margin" else 1 + 1e-6)
    loss = mutual_loss([z.requires_grad_() for z in logits], features, weighting=weighting)
    loss.backward()
    assert f.grad is None
    assert all(z.grad.abs().sum() > 0 for z in logits)


def test_threshold_half_selects_all_for_two_classes() -> None:
    logits, features = random_decoders(classes=2)
    everything = mutual_loss(logits, features, "all")
    assert mutual_loss(logits, features, "threshold", threshold=0.5) == everything
    assert mutual_loss(logits, features, "threshold", threshold=0.9) != everything


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"selection": "both"}, "unknown selection"),
        ({"selection": "threshold"}, "needs a threshold"),
        ({"weighting": "guess"}, "unknown weighting"),
    ],
)
def test_wrong_names_are_named(kwargs: dict[str, str], message: str) -> None:
    logits, features = random_decoders()
    with pytest.raises(ValueError, match=message):
        mutual_loss(logits, features, **kwargs)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_class_sums_in_pieces_are_those_of_the_whole(last: bool) -> None:
    """As a GPU adds them up."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 8, 4, 6, generator=generator)
    if last:
        features = features.to(memory_format=torch.channels_last_3d)
    member = torch.rand(2, 3, 192, generator=generator).round()
    expected = torch.stack(
        [torch.stack([features[n].flatten(1)[:, member[n, c] > 0].sum(1) for c in range(3)]) for n in range(2)]
    )
    for pieces in (1, 2, 64):
        assert torch.allclose(_class_sums(member, features.flatten(2), pieces), expected, atol=1e-5)
