"""TGMB: learn the translator T from TI pairs, guided by the frozen source model.

    L_TGMB = alpha_rec L_rec + alpha_d L_D + alpha_im L_IM + alpha_f L_f + alpha_p L_p

    L_rec  T(x_target^TI) looks like x_rgb^TI                     arXiv:2401.05014, Eq. 1
    L_D    translated TI and translated TR cannot be told apart    arXiv:2401.05014
    L_IM   the source model is certain and diverse on T(x^TR)      arXiv:2401.05014
    L_f    the source model sees T(x_target^TI) as x_rgb^TI        ours
    L_p    and so do its earlier layers, at each resolution        ours

A vector-quantised translator adds alpha_commit L_commit + alpha_patch L_patch: the commitment of
its encoder, and a discriminator that tells patches of T(x_target^TI) from those of x_rgb^TI.

The gradient passes through the frozen source model to T.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.data.images import Encoding, encode, rgb_to_float
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.models.frozen import FeatureMaps
from sfkt_cli.models.translators import VqganTranslator, patch_discriminator
from sfkt_cli.training.loop import Batch, Objective

REC_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": losses.reconstruction,
    "l1": losses.absolute_error,
    "ssim": losses.structural_dissimilarity,
}
"""Equation of L_rec for each value of ``bridge.rec_loss``."""


class Tgmb(Objective):
    """The objective of ``sfkt bridge``.

    Args:
        translator: T, which is trained.
        source: The frozen source model; never a child of this module, so that ``train()`` here
            does not wake its batch norms.
        encoding: Encoding of the target images.
        weights: ``rec``, ``d``, ``im``, ``f`` and ``p``, for vqgan ``commit`` and ``patch``; a term
            at 0 is not computed, ``p`` only where there are ``feature_maps``.
        rec_loss: Key of REC_LOSSES.
        d_on: ``feature`` or ``image``: what the discriminator of L_D sees.
        feature_maps: Feature maps of the source model's backbone; None: without L_p.
    """

    def __init__(
        self,
        translator: nn.Module,
        source: Classifier,
        encoding: Encoding,
        *,
        weights: dict[str, float],
        rec_loss: str,
        d_on: str,
        feature_maps: FeatureMaps | None = None,
    ) -> None:
        super().__init__()
        self.translator = translator
        if weights["d"] and d_on == "image":
            self.discriminator = patch_discriminator()
        elif weights["d"]:
            layers = nn.Linear(source.feature_size, 128), nn.ReLU(), nn.Linear(128, 1)
            self.discriminator = nn.Sequential(*layers)
        if weights.get("patch"):
            self.patch_discriminator = patch_discriminator()
        self._on_image = d_on == "image"
        self._rec_loss = REC_LOSSES[rec_loss]
        self._frozen = (source,)
        self._feature_maps = feature_maps
        self._encoding = encoding
        self.weights = weights

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of stored ``ti_rgb`` and ``ti_target`` (pairs) and ``tr_target``."""
        (source,) = self._frozen
        weights = self.weights
        rgb = rgb_to_float(batch["ti_rgb"])
        pairs = len(rgb)
        stored = batch["ti_target"].to(torch.float32)
        if weights["d"] or weights["im"]:  # together: one set of batch statistics for TI and TR
            stored = torch.cat([stored, batch["tr_target"].to(torch.float32)])
        encoded = encode(stored, self._encoding)
        terms = {}
        if isinstance(self.translator, VqganTranslator):
            bridged, terms["commit"] = self.translator.translate(encoded)
        else:
            bridged = self.translator(encoded)
        ti_bridged = bridged[:pairs]
        if weights.get("patch"):
            terms["patch"] = losses.domain_adversarial(
                self.patch_discriminator(losses.reverse_gradient(ti_bridged)),
                self.patch_discriminator(rgb),
            )
        if weights["rec"]:
            terms["rec"] = self._rec_loss(ti_bridged, rgb)
        matched = weights["f"] or self._feature_maps is not None
        if matched or weights["im"] or (weights["d"] and not self._on_image):
            with self._recording() as feature_maps:
                features, logits = source(bridged)
        if matched:
            with torch.no_grad(), self._recording() as partner_maps:
                partners = source.features(rgb)
        if weights["f"]:
            terms["f"] = losses.feature_matching(features[:pairs], partners)
        if self._feature_maps is not None:
            terms["p"] = losses.perceptual(feature_maps, partner_maps, self._feature_maps.variances)
        if weights["im"]:
            terms["im"] = losses.information_maximisation(logits[pairs:])
        if weights["d"]:
            domain_input = bridged if self._on_image else features
            domains = self.discriminator(losses.reverse_gradient(domain_input))
            terms["d"] = losses.domain_adversarial(domains[:pairs], domains[pairs:])
        return terms

    def _recording(self) -> contextlib.AbstractContextManager[list[Tensor]]:
        return (
            contextlib.nullcontext([])
            if self._feature_maps is None
            else self._feature_maps.recording()
        )
