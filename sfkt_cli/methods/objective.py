"""What every transfer method has: :class:`Objective`. CONTRIBUTING.md says how to add one."""

from torch import Tensor, nn

from sfkt_cli.data.images import as_rgb, encode
from sfkt_cli.methods.teacher_outputs import TeacherOutputs
from sfkt_cli.models.classifier import Classifier
from sfkt_cli.settings.config import Config
from sfkt_cli.training.loop import Batch


class Objective(nn.Module):
    """A student, and what it is trained with: a batch in, named loss terms out.

    A method sets ``weights``, writes :meth:`forward`, and overrides what else differs.

    Batches hold TR target images as they are stored, shifted and mirrored at random
    (``tr_target``), and their row numbers among all target images (``tr_rows``). With ``needs_ti``
    they also hold ``ti_target`` and ``ti_rows``, the same of TI pairs.
    """

    needs_bridge = False  # whether it takes the outputs of a bridge
    needs_ti = False  # whether it looks at TI pairs
    # Whether batches hold ``tr_target_2``: the images of ``tr_target``, shifted and mirrored anew.
    needs_second_view = False
    skips_parameters = False  # whether some steps leave trained parameters out
    # Whether the student sees translated images: the frozen translator stands in front of it.
    translated = False
    weights: dict[str, float]  # the weight of each loss term, by name

    def __init__(self, student: Classifier, outputs: TeacherOutputs, config: Config) -> None:
        super().__init__()
        self.student = student
        self.outputs = outputs

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, the first of which is 0."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of a batch, scalars by name."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each step of the optimiser."""

    def facts(self) -> dict[str, float]:
        """Figures for done.json, asked for after the training."""
        return {}

    def encoded(self, images: Tensor) -> Tensor:
        """What the student takes, (B, 3, H, W), of target images as stored."""
        return as_rgb(encode(images, self.outputs.encoding))
