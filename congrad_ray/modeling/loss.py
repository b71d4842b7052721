"""The DPO loss with R-DPO's length penalty, and the scalar by which it weighs a pair's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChosenRejected(NamedTuple):
    """One number for each completion of B pairs: summed log-probabilities, or numbers of tokens."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


@dataclass(frozen=True)
class LossSettings:
    """DPO's `beta` > 0, and R-DPO's alpha, `length_penalty` >= 0, per completion token."""

    beta: float
    length_penalty: float = 0.0


def _margin(
    policy: ChosenRejected, reference: ChosenRejected, settings: LossSettings, tokens: ChosenRejected | None
) -> Tensor:
    """z + alpha * (|y_w| - |y_l|), shape (B,)."""
    margin = settings.beta * ((policy.chosen - reference.chosen) - (policy.rejected - reference.rejected))
    if settings.length_penalty == 0.0:
        return margin
    if tokens is None:
        raise ValueError(f"length_penalty is {settings.length_penalty}; it needs the completions' tokens")
    return margin + settings.length_penalty * (tokens.chosen - tokens.rejected).to(margin.dtype)


def dpo_loss(
    policy: ChosenRejected,
    reference: ChosenRejected,
    settings: LossSettings,
    tokens: ChosenRejected | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's sigmoid loss of each pair, with R-DPO's length penalty.

    loss = -log sigmoid(z + alpha * (|y_w| - |y_l|)),
    z = beta * [(logp_w - ref_w) - (logp_l - ref_l)]           (DPO: Rafailov et al. 2023, arXiv 2305.18290)

    `policy` and `reference` are log-probabilities, summed over completion tokens. alpha is the length penalty, and
    lengths are the numbers of completion `tokens` (R-DPO: Park et al. 2024, arXiv 2403.19159). The sign is plus: a
    longer chosen completion already has part of its margin from its length, so its loss and its gradient shrink
    and the policy is pushed less towards it; for a shorter one it is pushed more.

    Returns the losses (B,) and TRL's metrics as detached means over the batch (0-dimensional): `rewards/chosen`,
    `rewards/rejected`, `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`. As in TRL a
    reward is beta * (logp - ref), without the length penalty.

    Raises ValueError if a length penalty is set and `tokens` is None.
    """
    margin = _margin(policy, reference, settings, tokens)
    chosen_rewards = settings.beta * (policy.chosen - reference.chosen).detach()
    rejected_rewards = settings.beta * (policy.rejected - reference.rejected).detach()
    metrics = {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/chosen": policy.chosen.detach().mean(),
        "logps/rejected": policy.rejected.detach().mean(),
    }
    return -F.logsigmoid(margin), metrics


def pair_coefficient(
    policy: ChosenRejected,
    reference: ChosenRejected,
    settings: LossSettings,
    tokens: ChosenRejected | None = None,
) -> Tensor:
    """c > 0 of each pair, (B,), with grad(dpo_loss) = -c * (grad logp_w - grad logp_l).

    c = beta * sigmoid(-(z + alpha * (|y_w| - |y_l|))); arguments and errors as in `dpo_loss`. Where policy
    and reference are the same and there is no length penalty, c = beta / 2.
    """
    return (settings.beta * torch.sigmoid(-_margin(policy, reference, settings, tokens))).detach()
