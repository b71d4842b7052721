"""Preference losses by name, and what a pair's gradient is made of under each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from congrad_ray.config.loss import DPO as DPO
from congrad_ray.config.loss import LossSettings as LossSettings
from congrad_ray.config.loss import LossType as LossType
from congrad_ray.config.loss import loss_settings as loss_settings
from congrad_ray.config.loss import needs_reference as needs_reference
from congrad_ray.config.loss import over_means as over_means


class ChosenRejected(NamedTuple):
    """One number for each completion of B pairs: summed log-probabilities, or numbers of tokens."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)


def preference_loss(
    policy: ChosenRejected,
    reference: ChosenRejected,
    settings: LossSettings,
    tokens: ChosenRejected,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, and TRL's metrics of each pair.

    `policy` and `reference` are log-probabilities in nats, summed over completion tokens; `tokens` are the numbers
    of those, |y|. With the log-ratios r = logp - ref, z = beta * (r_w - r_l) and l = -log sigmoid:

    - sigmoid: l(z + alpha * (|y_w| - |y_l|)). DPO (Rafailov et al. 2023, arXiv 2305.18290); alpha is R-DPO's
      length penalty (Park et al. 2024, arXiv 2403.19159). A longer chosen completion already has part of its
      margin from its length, so the policy is pushed less towards it; towards a shorter one it is pushed more.
    - hinge: max(0, 1 - z - alpha * (|y_w| - |y_l|)). SLiC's (Zhao et al. 2023, arXiv 2305.10425) on DPO's margin
      (Liu et al. 2023, arXiv 2309.06657).
    - robust: ((1 - e) * l(z') - e * l(-z')) / (1 - 2e), e the label smoothing and z' with the length penalty as
      above (Chowdhury et al. 2024, arXiv 2403.00409).
    - sigmoid_norm: l(beta * (r_w / |y_w| - r_l / |y_l|)). The length-normalised DPO of Tulu 3 (Lambert et al.
      2024, arXiv 2411.15124).
    - ipo: (r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2. Azar et al. 2023, arXiv 2310.12036, who write sums; means
      are TRL's form.
    - simpo: l(beta * (logp_w / |y_w| - logp_l / |y_l|) - gamma). Meng et al. 2024, arXiv 2405.14734.
    - orpo: -m_w + beta * l(log(odds_w / odds_l)), m = logp / |y| and odds = e^m / (1 - e^m). Hong et al. 2024,
      arXiv 2403.07691. The first term is that of SFT on the completion (TRL's takes the prompt's tokens as well).

    `sft_weight` adds sft_weight * -logp_w / |y_w| (Pang et al. 2024, arXiv 2404.19733): each pair counts the same,
    where TRL's loss 'sft' counts each token of the batch the same. `weights` (B,) are factors
    on the pairs' losses.

    Returns the losses (B,), and detached, each (B,): `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`,
    `rewards/margins`, `logps/chosen`, `logps/rejected`. As in TRL a reward is beta * (logp - ref), and for losses
    without a reference beta * logp / |y|, whose logps are per token too.
    """
    means = ChosenRejected(policy.chosen / tokens.chosen, policy.rejected / tokens.rejected)
    if needs_reference(settings):
        rewarded = ChosenRejected(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
        logps = policy
    else:
        rewarded = logps = means
    scores = rewarded
    if over_means(settings) and needs_reference(settings):
        scores = ChosenRejected(rewarded.chosen / tokens.chosen, rewarded.rejected / tokens.rejected)
    losses = _losses(scores, settings, tokens)
    if settings.sft_weight:
        losses = losses - settings.sft_weight * means.chosen
    if weights is not None:
        losses = losses * weights
    chosen, rejected = (settings.beta * reward.detach() for reward in rewarded)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).float(),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps.chosen.detach(),
        "logps/rejected": logps.rejected.detach(),
    }
    return losses, metrics


def _losses(scores: ChosenRejected, settings: LossSettings, tokens: ChosenRejected) -> Tensor:
    """The losses (B,) without SFT term and weights, of what each takes: log-ratios or log-probabilities."""
    difference = scores.chosen - scores.rejected
    margin = settings.beta * difference
    if settings.length_penalty:
        margin = margin + settings.length_penalty * (tokens.chosen - tokens.rejected).to(margin.dtype)
    match settings.loss_type:
        case "sigmoid" | "sigmoid_norm":
            return -F.logsigmoid(margin)
        case "hinge":
            return torch.relu(1 - margin)
        case "robust":
            flipped = settings.label_smoothing
            return (flipped * F.logsigmoid(-margin) - (1 - flipped) * F.logsigmoid(margin)) / (1 - 2 * flipped)
        case "ipo":
            return (difference - 1 / (2 * settings.beta)).square()
        case "simpo":
            return -F.logsigmoid(margin - settings.simpo_gamma)
        case "orpo":
            log_odds = _log_odds(scores.chosen) - _log_odds(scores.rejected)
            return -settings.beta * F.logsigmoid(log_odds) - scores.chosen


def _log_odds(logps: Tensor) -> Tensor:
    """log(p / (1 - p)) of p = e^logps, where p is 1 of the largest number below."""
    return logps - torch.log(-torch.expm1(logps.clamp(max=-torch.finfo(logps.dtype).eps)))


def gradient_seeds(
    policy: ChosenRejected,
    reference: ChosenRejected,
    settings: LossSettings,
    tokens: ChosenRejected,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """c of each pair, (B,), and the seeds s of both completions, (2B,), those of chosen first; both detached.

    grad(loss) = -c * (s_w * grad logp_w + s_l * grad logp_l). The seed of chosen is 1 for losses over summed
    log-probabilities and 1 / |y_w| for those over means; so for sigmoid, hinge and robust without an SFT term the
    seeds are +1 and -1, and c = beta * sigmoid(-(z + alpha * (|y_w| - |y_l|))) for sigmoid. ORPO and SFT terms
    pull at chosen more than they push rejected away, so their s_l depends on the log-probabilities.

    Where policy and reference are the same, c >= 0. (IPO's is negative once the policy is past its target.) Where
    c is 0 (a loss without a slope there), the seeds are +1 and -1, or 1 / |y_w| and -1 / |y_l|. `weights` are
    factors on c alone. Arguments as in `preference_loss`.
    """
    logps = torch.cat(policy).detach().requires_grad_()
    with torch.enable_grad():
        fixed = ChosenRejected(reference.chosen.detach(), reference.rejected.detach())
        losses, _ = preference_loss(ChosenRejected(*logps.chunk(2)), fixed, settings, tokens)
        slope_chosen, slope_rejected = torch.autograd.grad(losses.sum(), logps)[0].chunk(2)
    lengths = torch.cat(tokens).to(logps.dtype)
    one_chosen, one_rejected = (1 / lengths if over_means(settings) else torch.ones_like(lengths)).chunk(2)
    coefficients = -slope_chosen / one_chosen
    flat = coefficients == 0
    rejected = torch.where(flat, -one_rejected, -slope_rejected / torch.where(flat, 1.0, coefficients))
    return coefficients if weights is None else coefficients * weights, torch.cat([one_chosen, rejected])


def margin_weights(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Weights (B,) in [0, 1) of pairs by the judge's scores: tanh(margin / 2), 0 where the judge disagrees.

    Taking scores for rewards, Bradley and Terry's model has chosen preferred with P = sigmoid(margin), and
    tanh(margin / 2) = 2P - 1: how much more often than not. A pair's weight depends on the pair alone. That a
    pair's loss is weighted by its difference in reward is from Wang et al. 2024 (RDO, arXiv 2408.09385), who learn
    the differences by a model; this function of it is ours. WPO (Zhou et al. 2024, arXiv 2406.11827), TRL's
    `use_weighting`, weighs pairs too, but by the policy's probabilities.
    """
    return torch.tanh((chosen_scores - rejected_scores).clamp(min=0.0) / 2)
