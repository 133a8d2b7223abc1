"""Losses by hand, ramps at the places where the paper's curve is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from mlrpl.losses import (
    batch_dice,
    ce_dice_loss,
    consistency_weight,
    dice_loss,
    hard_labels,
    one_hot,
    ramp_up,
    squared_dice_loss,
)


def volume(*rows: list[float]) -> torch.Tensor:
    """One volume of one line of voxels: rows are the classes (1, C, n, 1, 1)."""
    return torch.tensor(rows)[None, :, :, None, None]


def line(*labels: int) -> torch.Tensor:
    return torch.tensor(labels)[None, :, None, None]


def random_problem(classes: int = 3, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 3, 4, 2, generator=generator, dtype=dtype)
    return logits, torch.randint(classes, (2, 3, 4, 2), generator=generator)


def test_dice_loss_of_two_classes_by_hand():
    p = volume([0.1, 0.4, 0.8, 0.7], [0.9, 0.6, 0.2, 0.3])
    # foreground at the first and third voxel: 2 (0.9 + 0.2) / (2.0 + 2)
    assert dice_loss(p, line(1, 0, 1, 0)).item() == pytest.approx(1 - 2.2 / 4, abs=1e-6)


def test_dice_loss_of_three_classes_is_the_mean_over_the_foreground():
    p = volume([0.2, 0.5, 0.1, 0.6], [0.7, 0.3, 0.1, 0.1], [0.1, 0.2, 0.8, 0.3])
    first = 1 - 2 * 0.7 / (1.2 + 1)  # class 1 at the first voxel
    second = 1 - 2 * (0.8 + 0.3) / (1.4 + 2)  # class 2 at the last two
    assert dice_loss(p, line(1, 0, 2, 2)).item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_dice_loss_sums_over_the_batch_before_it_divides():
    p = torch.cat([volume([0.0, 1.0], [1.0, 0.0]), volume([1.0, 1.0], [0.0, 0.0])])
    labels = torch.cat([line(1, 1), line(1, 0)])
    together = 1 - 2 * 1 / (1 + 3)
    assert dice_loss(p, labels).item() == pytest.approx(together, abs=1e-6)
    assert together != pytest.approx(((1 - 2 / 3) + 1) / 2)  # what a mean over volumes would be


@pytest.mark.parametrize(("foreground", "label", "expected"), [
    ([1.0, 0.0], (1, 0), 0.0),
    ([0.0, 1.0], (1, 0), 1.0),
    ([0.0, 0.0], (0, 0), 0.0),  # nothing there and nothing found: no loss, thanks to 1e-8
])  # fmt: skip
def test_dice_loss_at_its_ends(foreground, label, expected):
    p = volume([1 - f for f in foreground], foreground)
    assert dice_loss(p, line(*label)).item() == pytest.approx(expected, abs=1e-6)


def test_squared_dice_loss_by_hand_counts_the_background_too():
    p = volume([0.1, 0.4], [0.9, 0.6])
    background = 1 - (2 * 0.4 + 1e-5) / (0.01 + 0.16 + 1 + 1e-5)
    foreground = 1 - (2 * 0.9 + 1e-5) / (0.81 + 0.36 + 1 + 1e-5)
    assert squared_dice_loss(p, line(1, 0)).item() == pytest.approx((background + foreground) / 2, abs=1e-6)


def test_ce_dice_is_half_of_each():
    logits, labels = random_problem()
    p = logits.softmax(1)
    nll = -torch.gather(p, 1, labels[:, None]).log().mean()
    dice = 0.0
    for c in range(3):
        y = (labels == c).float()
        dice += (1 - (2 * (p[:, c] * y).sum() + 1e-5) / (p[:, c].square().sum() + y.sum() + 1e-5)) / 3
    torch.testing.assert_close(ce_dice_loss(logits, labels), 0.5 * (nll + dice))


@pytest.mark.parametrize("loss", [ce_dice_loss, lambda z, y: dice_loss(z.softmax(1), y)], ids=["ce_dice", "dice"])
def test_gradients_are_the_losses_slopes(loss):
    """Central differences along random directions; the losses compute in float32, so the step is wide."""
    logits, labels = random_problem()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, labels), logits)
    for seed in range(3):
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            slope = (loss(logits + 0.01 * direction, labels) - loss(logits - 0.01 * direction, labels)) / 0.02
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=2e-2, abs=1e-4)


def test_losses_are_computed_in_float32_under_autocast():
    logits, labels = random_problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ce_dice_loss(logits.bfloat16(), labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(ce_dice_loss(logits.bfloat16().float(), labels).item(), rel=1e-6)


def test_ramp_up_is_a_gaussian_up_to_one():
    assert ramp_up(0) == pytest.approx(math.exp(-5))
    assert ramp_up(0.5) == pytest.approx(math.exp(-1.25))
    assert ramp_up(1) == ramp_up(7) == 1
    assert ramp_up(-1) == ramp_up(0)
    ramp = [ramp_up(x / 100) for x in range(101)]
    assert ramp == sorted(ramp)


def test_published_beta_stays_small_for_1499_iterations_and_is_one_at_6000():
    beta = [consistency_weight(k, 6000, 1) for k in range(1, 6002)]
    assert max(beta[:1499]) < 0.05
    assert beta[1499] > 0.05  # iteration 1,500
    assert beta[5998] < 1  # iteration 5,999
    assert beta[5999] == beta[6000] == 1
    assert beta[0] == pytest.approx(math.exp(-5))


def test_beta_moves_once_in_150_iterations_and_scales():
    beta = [consistency_weight(k, 600, 0.1) for k in range(1, 601)]
    moves = [k for k in range(2, 601) if beta[k - 1] != beta[k - 2]]
    assert moves == [150, 300, 450, 600]
    assert beta[-1] == pytest.approx(0.1)
    assert beta[149] == pytest.approx(0.1 * math.exp(-5 * 0.75**2))
    assert consistency_weight(600, 600, 0) == 0


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_hard_labels_are_the_argmax(classes):
    logits, _ = random_problem(classes)
    assert torch.equal(hard_labels(logits), logits.argmax(1))


def test_of_equal_scores_the_first_class_wins():
    ties = volume([1.0, 0.0, 2.0, 0.0], [1.0, 3.0, 0.0, 0.0], [1.0, 3.0, 2.0, 0.0])
    assert hard_labels(ties).flatten().tolist() == [0, 1, 0, 0]
    # Whole numbers make many ties; numpy promises the first of them.
    scores = torch.randint(3, (2, 4, 6, 6, 6), generator=torch.Generator().manual_seed(0)).float()
    assert hard_labels(scores).tolist() == scores.numpy().argmax(1).tolist()


def test_one_hot():
    labels = line(2, 0, 1)
    assert torch.equal(one_hot(labels, 3), F.one_hot(labels, 3).movedim(-1, 1).float())


def test_batch_dice_by_hand():
    scores = volume([1.0, 0, 0, 0], [0.0, 1, 1, 0], [0.0, 0, 0, 1])  # labels 0 1 1 2
    assert batch_dice(scores, line(1, 1, 0, 2)).item() == pytest.approx((2 * 1 / 4 + 1) / 2)
    assert batch_dice(scores[:, :, 1:3], line(1, 1)).item() == 1  # class 2 is rightly nowhere
    assert batch_dice(scores[:, :, 3:], line(0)).item() == 0.5  # called class 2, class 1 rightly nowhere
