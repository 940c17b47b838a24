"""The study's objectives that are not PAPO's: a successor's use of the masked scores, a control.

Each takes what `papo_loss` takes and returns what it returns: `trainer.objective = vppo_loss` is
all that a run needs. Shapes: B responses, T response length.
"""

from dataclasses import replace

from papo import aggregate, clipped_policy_loss, kl_k3, papo_loss


def vppo_loss(config, logps, old_logps, advantages, response_mask, masked_logps, **_):
    """VPPO (arXiv 2510.09285), an objective without a perception term. k3 of pi and pi_mask says
    how far a token depends on the image; the 40 % of a response that depend most are trained, and
    the more a response depends, the more it counts.

    0.4, 0.9 and 0.06 are its authors' values. Two things differ from their code: a response's
    factor is scaled within its group, not within the update's batch, and the second update of a
    batch takes the dependencies of its own policy."""
    dependency = kl_k3(logps, masked_logps).detach().masked_fill(response_mask == 0, -1)  # (B, T)
    kept = (0.4 * response_mask.sum(1, keepdim=True)).ceil()  # (B, 1) tokens trained
    rank = dependency.argsort(1, descending=True).argsort(
        1
    )  # (B, T) 0 for the most dependent token
    means = (dependency * response_mask).sum(1) / response_mask.sum(1)  # (B,)
    above = means - means.min()  # (B,)
    factor = 0.9 + 0.1 * above / above.mean().clamp(
        min=1e-9
    )  # (B,) 0.9 at the smallest, 1 in the mean
    clips = config.clip_low, config.clip_high, config.clip_dual
    policy = clipped_policy_loss(logps, old_logps, advantages * factor, *clips)  # (B, T)
    mean = lambda per_token: aggregate(per_token, response_mask, config.aggregation)  # -> scalar
    terms = {"policy_loss": mean(policy * (rank < kept)), "entropy": mean(-logps)}
    loss = terms["policy_loss"] + 0.06 * terms["entropy"]
    return loss, {"loss": loss.item(), **{name: term.item() for name, term in terms.items()}}


def push_loss(config, logps, advantages, response_mask, **rest):
    """The control of the gated term: gamma log pi instead of gamma k3, for every token of a
    response with A > 0."""
    given = dict(advantages=advantages, response_mask=response_mask, **rest)
    loss, metrics = papo_loss(replace(config, gamma=0.0), logps, **given)
    right = (advantages[:, None] > 0) * logps  # (B, T)
    return loss - config.gamma * aggregate(right, response_mask, config.aggregation), metrics


OBJECTIVES = {
    "vppo": vppo_loss,
    "control-push": push_loss,
}  # of the study's arms that have their own
