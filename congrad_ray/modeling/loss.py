"""The DPO loss with R-DPO's length penalty, and the scalar by which it weighs a pair's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _margin(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    length_penalty: float,
    chosen_tokens: Tensor | None,
    rejected_tokens: Tensor | None,
) -> Tensor:
    """z + alpha * (|y_w| - |y_l|), shape (B,)."""
    margin = beta * ((policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps))
    if length_penalty == 0.0:
        return margin
    if chosen_tokens is None or rejected_tokens is None:
        raise ValueError(f"length_penalty is {length_penalty}; it needs chosen_tokens and rejected_tokens")
    return margin + length_penalty * (chosen_tokens - rejected_tokens).to(margin.dtype)


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    length_penalty: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO's sigmoid loss of each pair, with R-DPO's length penalty.

    loss = -log sigmoid(z + alpha * (|y_w| - |y_l|)),
    z = beta * [(logp_w - ref_w) - (logp_l - ref_l)]           (DPO: Rafailov et al. 2023, arXiv 2305.18290)

    alpha is `length_penalty` >= 0, lengths are in completion tokens (R-DPO: Park et al. 2024, arXiv
    2403.19159). The sign is plus: a winner that is longer already has part of its margin from its length, so
    its loss and its gradient shrink and the policy is pushed less towards it; a shorter winner is pushed for
    more.

    All tensors are (B,); log-probabilities are sums over completion tokens. Returns the losses (B,) and TRL's
    metrics as detached means over the batch (0-dimensional): `rewards/chosen`, `rewards/rejected`,
    `rewards/accuracies`, `rewards/margins`, `logps/chosen`, `logps/rejected`. As in TRL a reward is
    beta * (logp - ref), without the length penalty.

    Raises ValueError if `length_penalty` is set and the numbers of tokens are missing.
    """
    margin = _margin(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta,
        length_penalty,
        chosen_tokens,
        rejected_tokens,
    )
    chosen_rewards = beta * (policy_chosen_logps - ref_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - ref_rejected_logps).detach()
    metrics = {
        "rewards/chosen": chosen_rewards.mean(),
        "rewards/rejected": rejected_rewards.mean(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
        "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
        "logps/chosen": policy_chosen_logps.detach().mean(),
        "logps/rejected": policy_rejected_logps.detach().mean(),
    }
    return -F.logsigmoid(margin), metrics


def pair_coefficient(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    length_penalty: float = 0.0,
    chosen_tokens: Tensor | None = None,
    rejected_tokens: Tensor | None = None,
) -> Tensor:
    """c > 0 of each pair, (B,), with grad(dpo_loss) = -c * (grad logp_w - grad logp_l).

    c = beta * sigmoid(-(z + alpha * (|y_w| - |y_l|))); arguments and errors as in `dpo_loss`. Where policy
    and reference are the same and there is no length penalty, c = beta / 2.
    """
    margin = _margin(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        beta,
        length_penalty,
        chosen_tokens,
        rejected_tokens,
    )
    return (beta * torch.sigmoid(-margin)).detach()
