"""TGMB: learn the translator T from TI pairs, guided by the frozen source model.

    L_TGMB = alpha_rec L_rec + alpha_d L_D + alpha_im L_IM + alpha_f L_f

    L_rec  T(x_target^TI) looks like x_rgb^TI                     arXiv:2401.05014, Eq. 1
    L_D    translated TI and translated TR cannot be told apart    arXiv:2401.05014
    L_IM   the source model is certain and diverse on T(x^TR)      arXiv:2401.05014
    L_f    the source model sees T(x_target^TI) as x_rgb^TI        ours

The gradient passes through the frozen source model to T.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfkt_cli import losses
from sfkt_cli.data.images import Encoding, encode, rgb_to_float
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.training.loop import Batch


class Tgmb(nn.Module):
    """The objective of ``sfkt bridge``.

    Args:
        translator: T, in training.
        source: The frozen source model; never a child of this module, so that ``train()`` here
            does not wake its batch norms.
        encoding: Of the target images.
        weights: ``rec``, ``d``, ``im`` and ``f``; a term at 0 is not computed.
        registered: Whether the pixels of a pair match; without, there is no L_rec.
    """

    def __init__(
        self,
        translator: nn.Module,
        source: Classifier,
        encoding: Encoding,
        *,
        weights: dict[str, float],
        features: int,
        registered: bool,
    ) -> None:
        super().__init__()
        self.translator = translator
        self.discriminator = nn.Sequential(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 1))
        self._frozen = (source,)
        self._encoding = encoding
        self._weights = weights
        self._registered = registered

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``ti_rgb`` and ``ti_target`` (pairs) and ``tr_target``, as stored."""
        (source,) = self._frozen
        rgb = rgb_to_float(batch["ti_rgb"])
        bridged = self.translator(encode(batch["ti_target"], self._encoding))
        with torch.no_grad():
            partners = source.features(rgb)
        features = source.features(bridged)
        terms = {}
        if self._weights["f"]:
            terms["f"] = losses.feature_matching(features, partners)
        if self._weights["rec"] and self._registered:
            terms["rec"] = losses.reconstruction(bridged, rgb)
        if self._weights["d"] or self._weights["im"]:
            tr_bridged = self.translator(encode(batch["tr_target"], self._encoding))
            tr_features, tr_logits = source(tr_bridged)
            if self._weights["im"]:
                terms["im"] = losses.information_maximisation(tr_logits)
            if self._weights["d"]:
                terms["d"] = losses.domain_adversarial(
                    self.discriminator(losses.reverse_gradient(features)),
                    self.discriminator(losses.reverse_gradient(tr_features)),
                )
        return terms
        self.skips_parameters = not weights["d"]
