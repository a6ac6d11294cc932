"""Every equation, one function each.

Shapes: B batch, K classes, D features, C channels, H and W pixels. All return an unweighted float32
scalar in nats unless said otherwise; weights live in the configuration. Logits may be of any float
type: they are taken to float32 first, and logarithms go through ``log_softmax``.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.distributed import mean_over_processes, sharing_processes


def reconstruction(bridged: Tensor, rgb: Tensor) -> Tensor:
    """Mean squared error between translated TI images and their RGB partners.

    L_rec = mean (T(x_target^TI) - x_rgb^TI)^2

    Source: arXiv:2401.05014, Eq. 1. Large: the picture differs (0.08 is a grey card before a
    natural image); small: the same picture, pixel by pixel. Without unit.

    Args:
        bridged: (B, 3, H, W), translated, in [0, 1]; receives a gradient.
        rgb: (B, 3, H, W), the partners, in [0, 1].
    """
    return F.mse_loss(bridged.float(), rgb.float())


def absolute_error(bridged: Tensor, rgb: Tensor) -> Tensor:
    """Mean absolute difference of translated TI images and their RGB partners.

    L_l1 = mean |T(x_target^TI) - x_rgb^TI|

    Source: ours, as in pix2pix (Isola et al., CVPR 2017), in place of the paper's L_rec; blurs
    less. 0.25 is a grey card before white noise; 0: the same picture. Without unit.

    Args:
        bridged: (B, 3, H, W), translated, in [0, 1]; receives a gradient.
        rgb: (B, 3, H, W), the partners, in [0, 1].
    """
    return (bridged.float() - rgb.float()).abs().mean()


def structural_dissimilarity(bridged: Tensor, rgb: Tensor) -> Tensor:
    """One minus the structural similarity of translated TI images and their RGB partners.

    L_ssim = 1 - mean SSIM, over windows of 11 x 11 pixels under a Gaussian of 1.5, no padding

    Source: Wang et al., IEEE TIP 2004, Eq. 13; ours, in place of the paper's L_rec. 1: nothing in
    common; 0: the same structure, contrast and brightness everywhere. Without unit.

    Args:
        bridged: (B, 3, H, W), translated, in [0, 1], H and W at least 11; receives a gradient.
        rgb: (B, 3, H, W), the partners, in [0, 1].
    """
    first, second = bridged.float(), rgb.float()
    offsets = torch.arange(-5.0, 6.0, device=first.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()

    def blur(images: Tensor) -> Tensor:
        flat = images.flatten(0, 1).unsqueeze(1)
        with torch.autocast(flat.device.type, enabled=False):  # variances need all their digits
            return F.conv2d(F.conv2d(flat, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_a, mean_b = blur(first), blur(second)
    variance_a = blur(first * first) - mean_a.square()
    variance_b = blur(second * second) - mean_b.square()
    covariance = blur(first * second) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    likeness = likeness / (mean_a.square() + mean_b.square() + c1)
    return 1.0 - (likeness / (variance_a + variance_b + c2)).mean()


def commitment(encoded: Tensor, codes: Tensor) -> Tensor:
    """How far the encoder's vectors are from the codebook entries that stand for them.

    L_commit = mean (z - sg(e))^2

    Source: VQ-VAE (van den Oord et al., NeurIPS 2017), Eq. 3, last term. 0: every vector is an
    entry; the variance of the vectors: the codebook says nothing. In squared code units.

    Args:
        encoded: (..., D), z; receives a gradient.
        codes: (..., D), the nearest entries e; a constant.
    """
    return F.mse_loss(encoded.float(), codes.detach().float())


class _ReverseGradient(torch.autograd.Function):
    """Identity forward, minus the gradient backward."""

    @staticmethod
    def forward(ctx: object, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return -gradients[0]


def reverse_gradient(features: Tensor) -> Tensor:
    """Pass features on and turn the sign of their gradient (Ganin et al., JMLR 2016, Section 4.2).

    Put between the translator and the discriminator, one backward pass of L_D teaches the
    discriminator to tell TI from TR and the translator to hide it.
    """
    reversed_: Tensor = _ReverseGradient.apply(features)
    return reversed_


def domain_adversarial(ti_logits: Tensor, tr_logits: Tensor) -> Tensor:
    """Binary cross-entropy of a discriminator that tells translated TI (1) from TR (0).

    L_D = (mean softplus(-d(TI)) + mean softplus(d(TR))) / 2

    Source: arXiv:2401.05014, L_D, whose exact form we do not know; this is the usual one (Ganin et
    al., JMLR 2016). Large: the discriminator is wrong; log 2 = 0.693: it guesses; 0: it tells TI
    from TR.

    Args:
        ti_logits: (B, ...), discriminator outputs for translated TI; receives a gradient.
        tr_logits: (B, ...), the same for translated TR; receives a gradient.
    """
    ti, tr = ti_logits.float(), tr_logits.float()
    return 0.5 * (F.softplus(-ti).mean() + F.softplus(tr).mean())


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions: mean_b -sum_k p_bk log p_bk.

    log K: no prediction says anything; 0: each names one class.

    Args:
        logits: (B, K); receives a gradient.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def diversity(logits: Tensor) -> Tensor:
    """Entropy of the mean prediction: -sum_k q_k log q_k with q = mean_b p_b.

    log K: all classes are predicted equally often; 0: one class takes all.

    Args:
        logits: (B, K); receives a gradient.
    """
    mean = _mean_prediction(logits)
    return -torch.xlogy(mean, mean.clamp_min(1e-30)).sum()


def information_maximisation(logits: Tensor, prior: Tensor | None = None) -> Tensor:
    """Minus the mutual information of image and prediction, towards given class frequencies.

    L_IM = mean_b H(p_b) + KL(mean_b p_b to prior) - log K

    Without a prior all classes count as equally frequent, and this is entropy - diversity =
    mean_b H(p_b) - H(mean_b p_b). Source: arXiv:2401.05014, L_IM; SHOT (Liang et al., ICML 2020),
    Eq. 3; the prior is ours. -log K: every prediction certain, classes as frequent as in the
    prior; 0 without a prior: every prediction the same.

    Args:
        logits: (B, K); receives a gradient.
        prior: (K,), positive, sums to 1; a constant.
    """
    loss = entropy(logits) - diversity(logits)
    if prior is None:
        return loss
    return loss - (_mean_prediction(logits) * prior.log()).sum() - math.log(logits.shape[1])


def _mean_prediction(logits: Tensor) -> Tensor:
    """Mean (K,) of the predictions over the batches of all processes."""
    return mean_over_processes(F.log_softmax(logits.float(), dim=1).exp().mean(dim=0))


def feature_matching(features: Tensor, partners: Tensor) -> Tensor:
    """Mean squared error between features of the two images of each TI pair.

    L_f = mean_bd (f_bd - g_bd)^2

    Source: arXiv:2401.05014, L_f with F_t(x_target^TI) and F_s(x_rgb^TI); the distance there is not
    known to us. The same equation with F_s(T(x_target^TI)) is the feature term of the bridge
    (ours). 0: both sensors look alike to the model; twice the features' variance: unrelated. In
    squared feature units.

    Args:
        features: (B, D); receives a gradient.
        partners: (B, D), of the RGB partners; a constant.
    """
    return F.mse_loss(features.float(), partners.detach().float())


def perceptual(
    seen: Sequence[Tensor], partners: Sequence[Tensor], variances: Sequence[float]
) -> Tensor:
    """Distance between what a network sees in the two images of each TI pair, level by level.

    L_p = mean_l mean (a_l - g_l)^2 / v_l

    Source: Johnson et al., ECCV 2016, Eq. 2, with the frozen source model in place of a VGG and
    each level over the variance of its activations (ours), so that all have equal weight. 0: the
    source model sees the same on all levels; 1: no more is known than the mean of a level; 2:
    unrelated. Without unit.

    Args:
        seen: For each level l the maps (B' >= B, C, H, W), of which the first B are a_l and receive
            a gradient; the others, of TR images that went along, receive none.
        partners: (B, C, H, W) of the RGB partners, g_l; constants.
        variances: Variances of the activations of RGB images at each level, v_l.
    """
    gaps = [
        _SquaredGap.apply(level, partner) / variance
        for level, partner, variance in zip(seen, partners, variances, strict=True)
    ]
    return torch.stack(gaps).mean()


class _SquaredGap(torch.autograd.Function):
    """Mean squared difference of the first rows from constants, in two passes over memory each way.

    Maps are large: slicing, casting and ``mse_loss`` take twice as long.
    """

    @staticmethod
    def forward(ctx: Any, level: Tensor, partner: Tensor) -> Tensor:
        gap = level[: len(partner)] - partner
        ctx.save_for_backward(gap)
        ctx.like = torch.empty_like(level, device="meta")
        squares: Tensor = torch.linalg.vector_norm(gap, dtype=torch.float32).square()
        return squares / gap.numel()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gap,) = ctx.saved_tensors
        gradient = torch.empty_like(ctx.like, device=gap.device)
        slope = 2.0 / gap.numel() * gradients[0]  # small before it is cast: scaled, fp16 overflows
        torch.mul(gap, slope.to(gap.dtype), out=gradient[: len(gap)])
        gradient[len(gap) :].zero_()
        return gradient, None


def feature_matching_norm(features: Tensor, partners: Tensor) -> Tensor:
    """Frobenius norm of the difference of features over the batch, neither squared nor averaged.

    || F_s(x_rgb^TI) - F_t(x_target^TI) ||_F

    Source: SOCKET (Ahmed et al., ECCV 2022), the TI feature term. Grows with the root of B and D.

    Args:
        features: (B, D); receives a gradient.
        partners: (B, D), of the RGB partners; a constant.
    """
    squares = (features.float() - partners.detach().float()).square().sum()
    whole = mean_over_processes(squares) * sharing_processes(squares)
    return (whole + 1e-12).sqrt()


def distillation(logits: Tensor, teacher_probabilities: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the student from the teacher.

    L_KL = mean_b sum_k t_bk (log t_bk - log p_bk)

    Source: arXiv:2401.05014, L_KL = KL(source model on T(x_target^TR) || target model). 0: the
    student agrees with the teacher; log K and more: it contradicts a certain teacher.

    Args:
        logits: (B, K) of the student; receives a gradient.
        teacher_probabilities: (B, K), rows sum to 1; a constant.
    """
    log_p = F.log_softmax(logits.float(), dim=1)
    teacher = teacher_probabilities.detach().float()
    return (torch.xlogy(teacher, teacher) - teacher * log_p).sum(dim=1).mean()


def pseudo_label_cross_entropy(logits: Tensor, pseudo_labels: Tensor) -> Tensor:
    """Cross-entropy of the student with pseudo-labels.

    L_self = mean_b -log p_b[y_b]

    Source: arXiv:2401.05014, L_self; SHOT, Eq. 7. 0: the student agrees and is certain.

    Args:
        logits: (B, K); receives a gradient.
        pseudo_labels: (B,) integers in [0, K).
    """
    return F.cross_entropy(logits.float(), pseudo_labels, reduction="none").mean()


def attraction(logits: Tensor, neighbours: Tensor, affinity: Tensor | None = None) -> Tensor:
    """Minus the agreement with the predictions of neighbours.

    L_attract = -mean_b sum_k a_bk <p_b, q_bk>

    Source: AaD (Yang et al., NeurIPS 2022), the attracting term, with a = 1; NRC (Yang et al.,
    NeurIPS 2021), the terms of near and wider neighbours and of the image itself. -k: all say the
    same with certainty; 0: no neighbour agrees. Without unit.

    Args:
        logits: (B, K); receives a gradient.
        neighbours: (B, k, K), probabilities of the k neighbours; a constant.
        affinity: (B, k), non-negative weights; a constant. None: 1 each.
    """
    probabilities = F.softmax(logits.float(), dim=1)
    agreement = (probabilities.unsqueeze(1) * neighbours.detach().float()).sum(dim=2)
    if affinity is not None:
        agreement = agreement * affinity
    return -agreement.sum(dim=1).mean()


def dispersion(logits: Tensor) -> Tensor:
    """Agreement of each prediction with those of the other images of the batch.

    L_disperse = mean_b sum_{c != b} <p_b, p_c>

    Source: AaD (Yang et al., NeurIPS 2022), the dispersing term. B - 1: all say the same with
    certainty; 0: no two agree. Grows with B. Without unit.

    Args:
        logits: (B, K); receives a gradient.
    """
    probabilities = F.softmax(logits.float(), dim=1)
    mean = mean_over_processes(probabilities.mean(dim=0))
    everybody = len(probabilities) * sharing_processes(probabilities) * mean.square().sum()
    return everybody - probabilities.square().sum(dim=1).mean()


def batch_norm_matching(layers: Sequence[tuple[Tensor, nn.BatchNorm2d]]) -> Tensor:
    """Distance of a batch's statistics from those that the source model stored.

    sum_l w_l (||mean_l(batch) - running_mean_l||_2 + ||var_l(batch) - running_var_l||_2),
    w = 10 for the first layer, 1 for the others

    Source: SOCKET (Ahmed et al., ECCV 2022), the BatchNorm term. 0: the student's inputs have the
    statistics of the source images in every layer.

    Args:
        layers: The input (B, C, H, W) of each BatchNorm layer, which receives a gradient, and the
            source model's layer with its stored statistics, in order. Without any: 0, on the CPU.
    """
    gaps = []
    for number, (activations, norm) in enumerate(layers):
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError("a BatchNorm layer without running statistics cannot be matched")
        variance, mean = torch.var_mean(activations.float(), dim=(0, 2, 3), correction=0)
        gap = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
        gaps.append((10.0 if number == 0 else 1.0) * gap)
    return torch.stack(gaps).sum() if gaps else torch.zeros(())
