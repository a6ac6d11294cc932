"""The oracle: the student's network trained on target images *with* labels.

    L = cross-entropy with label smoothing

No method: a bound that shows what the network could reach on this sensor. ``evaluate`` trains it,
the only stage that may see target labels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sfkt_cli.data.images import Encoding, as_rgb, encode
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.training.loop import Batch


class OracleObjective(nn.Module):
    """The objective of the oracle.

    Args:
        model: The classifier in training.
        encoding: Of the target images.
        label_smoothing: Share of the label that is spread over all classes.
    """

    def __init__(self, model: Classifier, encoding: Encoding, *, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self._encoding = encoding
        self._label_smoothing = label_smoothing

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Loss terms of ``target`` (B, H, W[, C]) as stored and ``labels`` (B,)."""
        _, logits = self.model(as_rgb(encode(batch["target"], self._encoding)))
        loss = F.cross_entropy(
            logits.float(), batch["labels"], label_smoothing=self._label_smoothing
        )
        return {"cross_entropy": loss}
