"""The settings of preference losses; without pydantic and torch, as algorithms and recipes share them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from congrad_ray.config.training import Train

LossType = Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "simpo", "orpo"]

_OVER_MEANS = ("sigmoid_norm", "ipo", "simpo", "orpo")
_WITHOUT_REFERENCE = ("simpo", "orpo")
SIMPO_GAMMA = 0.5  # TRL's default


@dataclass(frozen=True)
class LossSettings:
    """A preference loss; the formulas are in `modeling.loss.preference_loss`. Names as in TRL where it has them.

    Raises ValueError for a number out of range, or one that the loss has no use for.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    """Above 0. IPO calls it tau, ORPO lambda."""
    length_penalty: float = 0.0
    """alpha of R-DPO, per completion token; for losses over summed log-probabilities."""
    label_smoothing: float = 0.0
    """The share of pairs whose labels are taken for flipped, below 1/2; for robust."""
    simpo_gamma: float = SIMPO_GAMMA
    """The margin that SimPO aims at."""
    sft_weight: float = 0.0
    """Of -log p(chosen) per token, added to the loss; ORPO has such a term of its own."""
    margin_weighting: bool = False
    """Whether a pair's loss is weighted by the margin of the judge's scores, see `margin_weights`."""

    def __post_init__(self) -> None:
        name = self.loss_type
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it should be above 0")
        for setting in ("length_penalty", "simpo_gamma", "sft_weight"):
            value = getattr(self, setting)
            if value < 0:
                raise ValueError(f"{setting} is {value}; it should be 0 or more")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}; it should be 0 or more and below 0.5, where labels "
                "say nothing"
            )
        if self.label_smoothing and name != "robust":
            raise ValueError(
                f"label_smoothing ({self.label_smoothing}) does nothing in loss_type {name}; use loss_type "
                "robust, or set it to 0"
            )
        if self.length_penalty and over_means(self):
            raise ValueError(
                f"length_penalty ({self.length_penalty}) does nothing in loss_type {name}, which takes means over "
                "tokens; set it to 0, or use sigmoid, hinge or robust"
            )
        if self.simpo_gamma != SIMPO_GAMMA and name != "simpo":
            raise ValueError(
                f"simpo_gamma ({self.simpo_gamma}) does nothing in loss_type {name}; leave it out, or use simpo"
            )
        if self.sft_weight and name == "orpo":
            raise ValueError(
                f"sft_weight ({self.sft_weight}) is for other losses: orpo has an SFT term of its own, of weight "
                "1, beside which beta weighs the odds ratio; set sft_weight to 0"
            )


DPO = LossSettings()


def over_means(loss: LossSettings) -> bool:
    """Whether the loss is one of log-probabilities per token, and not of their sums."""
    return loss.loss_type in _OVER_MEANS


def needs_reference(loss: LossSettings) -> bool:
    """Whether the loss depends on the reference's log-probabilities."""
    return loss.loss_type not in _WITHOUT_REFERENCE


def loss_settings(train: Train) -> LossSettings:
    """The loss that a recipe trains with, and its pairs are sketched for."""
    return LossSettings(**{field.name: getattr(train, field.name) for field in fields(LossSettings)})
