"""The study's objectives that are not PAPO's: what its successors do with a second view, a control.

Each takes what `papo_loss` takes and returns what it returns: `trainer.objective = pgpo_loss` is
all that PGPO needs. The others want flags (FLAGS in compare.py), so that there is a masked pass,
and DVRP how far the run is. In each docstring stand its equations and constants, and where ours
departs from its authors'. `weight` is the one constant that the study varies, by default theirs.
VPPO's and VEPO's authors score the second view by the policy before a batch's updates (PGPO's and
DVRP's do, second-hand), ours is scored by the policy that is trained, as PAPO's. All views are
constants: no gradient flows through them.
Means and minmax over a group or an update's batch are over a pass here, which is a group.
"Second-hand": from descriptions, not from paper or code; "read": in the authors' code.

    d_t     k3 of pi and the view at token t, in [0, 10]        |o|  a response's tokens
    minmax  scaled to [0, 1], per response where nothing else is said; 0 where all are equal
    L_t     the clipped policy loss of token t. A weight that is not negative may multiply L_t or
            the advantage: the same.      mean  as the base has it, DAPO's over all tokens

Shapes: B responses of one group, T response length, N all their tokens, H hidden width, L row.
"""

import math
from dataclasses import replace
from functools import partial

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from papo import HEAD_CHUNK, aggregate, clipped_policy_loss, group_logps, kl_k3, papo_loss


def minmax(x, mask):
    """Each row scaled to [0, 1] over the entries in the mask; 0 outside. (B, T) x 2 -> (B, T)"""
    low = x.masked_fill(mask == 0, math.inf).amin(1, keepdim=True)  # (B, 1)
    high = x.masked_fill(mask == 0, -math.inf).amax(1, keepdim=True)  # (B, 1)
    return ((x - low) / (high - low).clamp(min=1e-9)).masked_fill(mask == 0, 0)  # (B, T)


def top(x, mask, share):
    """The ceil(share |o|) largest entries of each row. (B, T), (B, T) -> (B, T) bool"""
    rank = x.masked_fill(mask == 0, -1).argsort(1, descending=True).argsort(1)  # (B, T) from 0
    return rank < (share * mask.sum(1, keepdim=True)).ceil()


def weighted_loss(config, logps, old_logps, advantages, mask, weights, terms=()):
    """The clipped policy loss with a weight for each token (B, T), and further terms: name, weight
    and (B, T). Returns the scalar and metrics."""
    clips = config.clip_low, config.clip_high, config.clip_dual
    policy = weights * clipped_policy_loss(logps, old_logps, advantages, *clips)  # (B, T)
    terms = [("policy_loss", 1.0, policy), ("entropy", 0.0, -logps), *terms]
    means = {name: aggregate(x, mask, config.aggregation) for name, _, x in terms}  # scalars
    loss = sum(weight * means[name] for name, weight, _ in terms if weight)
    return loss, {"loss": loss.item(), **{name: x.item() for name, x in means.items()}}


def vppo_loss(
    config, logps, old_logps, advantages, response_mask, masked_logps, weight=0.4, **_
):  # fmt: skip
    """VPPO, arXiv 2510.09285, code huaixuheqing/VPPO-RL (read).

        loss = mean over all tokens of [t in the top share by d_t] L_t(f_i A_i) + 0.06 mean(-log pi)
        f_i  = 0.9 + 0.1 s_i / mean(s),   s_i = mean_t d_t - the smallest mean_t d_t

    f_i is their trajectory advantage shaping, the choice of tokens their token gradient filtering.
    weight: the share, 0.4, rounded up. 0.9 (beta_min), 0.06, a masking ratio of 0.5 and accuracy as
    the whole reward are its authors', too. Departures: s_i within the group, theirs within the
    update's batch; one mask for a group, theirs one for each response. Their paper has the exact
    KL, their code k3."""
    dependency = kl_k3(logps, masked_logps).detach().masked_fill(response_mask == 0, -1)  # (B, T)
    means = (dependency * response_mask).sum(1) / response_mask.sum(1)  # (B,)
    above = means - means.min()  # (B,)
    factor = 0.9 + 0.1 * above / above.mean().clamp(min=1e-9)  # (B,) 0.9 at least, 1 in the mean
    kept = top(dependency, response_mask, weight)  # (B, T)
    given = config, logps, old_logps, advantages * factor, response_mask
    return weighted_loss(*given, kept, [("entropy", 0.06, -logps)])


def pgpo_loss(
    config, logps, old_logps, advantages, response_mask, row, masked_logps=None, dev=False,
    weight=2.0, **_,
):  # fmt: skip
    """PGPO, arXiv 2604.01840 (second-hand; its code is not public). The view has no image.

        I_t  = minmax(log(1 + d_t)),   tau = 0.4
        w_t  = I_t / tau where I_t < tau, else 1 + weight (I_t - tau) / (1 - tau)
        loss = mean(w_t L_t),   w scaled to sum to |o| (all 1 where it is 0)

    dev: as its development code is described, tau = the response's I in ascending order at
    floor(0.4 |o|), w at least 0.1, not scaled. masked_logps, where given, stands in for the view
    without image. Departures: no token sees the image's, but the positions after it stay; G = 8,
    theirs 5."""
    if masked_logps is None:
        with torch.no_grad():
            blind = row.model, {**row.prompt, "blind": True}, row.responses
            masked_logps = group_logps(*blind, config.temperature)[0]  # (B, T)
    dependency = kl_k3(logps, masked_logps).detach().log1p()  # (B, T)
    index, tau = minmax(dependency, response_mask), torch.tensor(0.4)  # (B, T), ()
    lengths = response_mask.sum(1, keepdim=True)  # (B, 1)
    if dev:
        ascending = index.masked_fill(response_mask == 0, math.inf).sort(1).values  # (B, T)
        tau = ascending.gather(1, (0.4 * lengths).long())  # (B, 1)
    above = 1 + weight * (index - tau) / (1 - tau).clamp(min=1e-9)  # (B, T)
    weights = torch.where(index < tau, index / tau.clamp(min=1e-9), above) * response_mask  # (B, T)
    total = weights.sum(1, keepdim=True)  # (B, 1)
    scaled = torch.where(total > 0, weights * lengths / total.clamp(min=1e-9), 1.0)  # (B, T)
    weights = weights.clamp(min=0.1) if dev else scaled
    return weighted_loss(config, logps, old_logps, advantages, response_mask, weights)


def vgpo_loss(config, logps, old_logps, advantages, response_mask, row, weight=0.3, **_):
    """VGPO, arXiv 2604.09349, code wzb-bupt/VGPO (read). No second view: c_t is the cosine of the
    last layer's state after o_t and the mean state of the image's tokens.

        w_t   = minmax over the group (c_t) * (1 + weight g_t t / (|o| - 1))
        g_t   = 1 for the top fifth by c_t of the second half, at least one token; else 0
        psi_t = clamp(1 + v_t - mean(v), 0.1, 2),    v = minmax(w)
        a_i   = clamp(1 + p_i - mean(p), 0.9, 2),    p = minmax over the group (sum_t v_t)
        loss  = mean(a_i psi_t L_t),   reward = accuracy alone

    weight: its beta, 0.3. Departures: its code takes minmax(c) over 4 responses of a micro-batch
    and p over 8, padding included; ours both over the question's group, as its paper, which has
    (c + 1) / 2 for minmax(c)."""
    P, lengths = row.prompt["input_ids"].shape[1], response_mask.sum(1, keepdim=True)  # (B, 1)
    image = row.prompt["input_ids"][0] == row.model.config.image_token_id  # (P,)
    hidden = row.hidden.detach().float()  # (L, H)
    seen = hidden[:P][image.to(hidden.device)].mean(0)  # (H,)
    cosine = torch.cosine_similarity(hidden[P:], seen[None])  # (N,)
    cosine = pad_sequence(cosine.split([len(o) for o in row.responses]), True)  # (B, T)
    place = torch.arange(cosine.shape[1], device=cosine.device)  # (T,)
    late = ((place >= lengths // 2) * response_mask).bool()  # (B, T) second half
    count = (0.2 * late.sum(1, keepdim=True)).long().clamp(min=1)  # (B, 1)
    ranked = cosine.masked_fill(~late, -math.inf).sort(1, descending=True).values  # (B, T)
    gate = late & (cosine >= ranked.gather(1, count - 1))  # (B, T)
    weights = minmax(cosine.view(1, -1), response_mask.view(1, -1)).view_as(cosine)  # (B, T)
    weights = weights * (1 + weight * gate * place / (lengths - 1).clamp(min=1))  # (B, T)
    focus = minmax(weights, response_mask)  # (B, T) v
    total = focus.sum(1, keepdim=True)  # (B, 1)
    share = minmax(total.T, torch.ones_like(total.T)).T  # (B, 1) p
    factor = (1 + share - share.mean()).clamp(0.9, 2)  # (B, 1)
    factor = factor * (1 + focus - total / lengths).clamp(0.1, 2)  # (B, T)
    return weighted_loss(config, logps, old_logps, advantages, response_mask, factor)


def diffused(prompt, t):
    """The prompt with t of 1000 steps of diffusion noise e on its images, the same on both
    of a patch's frames:

    b_i = sigmoid(linspace(-6, 6))_i (5e-3 - 1e-5) + 1e-5,   a = prod_{i <= t} (1 - b_i),
    x   = clip(sqrt(a) x + sqrt(1 - a) e, 0, 1)"""
    pixels = prompt["pixel_values"]  # (patches, 3 * 2 * patch^2), normalised
    means, stds = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    betas = torch.linspace(-6, 6, 1000).sigmoid() * (5e-3 - 1e-5) + 1e-5  # (1000,)
    kept = (1 - betas).cumprod(0)[t]  # ()
    x = pixels.view(len(pixels), 3, 2, -1) * stds + means  # (patches, 3, 2, patch^2) in [0, 1]
    x = (kept.sqrt() * x + (1 - kept).sqrt() * torch.randn_like(x[:, :, :1])).clamp(0, 1)
    return {**prompt, "pixel_values": ((x - means) / stds).view_as(pixels)}


def dvrp_loss(
    config, logps, old_logps, advantages, response_mask, row, masked_logps, progress, weight=0.01,
    **_,
):  # fmt: skip
    """DVRP, arXiv 2601.06801 (second-hand, no code): a masked view to depart from, a noised one to
    stay near.

        loss = mean(L_t) - weight KL[pi || pi_mask] + weight KL[pi || pi_noise]
                         + 0.05 H[pi_mask] + 0.05 H[pi_noise]

    Patches of 14 pixels are black with probability 0.6; the noise is that of step t = 500
    sigmoid(10 (0.5 - progress)), from much to none over the run. weight: of both KLs, 0.01 each.
    Departures: KL is k3; the views are constant, which the paper does not settle, so that the two
    entropies would change nothing and are left out."""
    t = int(500 / (1 + math.exp(-10 * (0.5 - progress))))
    with torch.no_grad():
        view = row.model, diffused(row.prompt, t), row.responses
        noised_logps = group_logps(*view, config.temperature)[0]  # (B, T)
    terms = [
        ("kl_prcp", -weight, kl_k3(logps, masked_logps.detach())),  # (B, T)
        ("kl_noise", weight, kl_k3(logps, noised_logps)),  # (B, T)
    ]
    return weighted_loss(config, logps, old_logps, advantages, response_mask, 1.0, terms)


def vepo_scores(row, noised, temperature):
    """Jensen-Shannon divergence of two passes over the vocabulary, and the entropy of each, never
    holding all logits. Row, Row -> (B, T), (B, T), (B, T)"""
    head, parts = row.model.get_output_embeddings(), []
    states = [x.hidden[x.predictor].split(HEAD_CHUNK) for x in (row, noised)]  # chunks of (N, H)
    for pair in zip(*states):
        p, q = ((head(x).float() / temperature).log_softmax(-1) for x in pair)  # (N, V), (N, V)
        entropy = lambda x: -(x.exp() * x).sum(-1)  # (N, V) -> (N,)
        middle = torch.logaddexp(p, q) - math.log(2)  # (N, V)
        alone = entropy(p), entropy(q)  # (N,), (N,)
        parts.append((entropy(middle) - sum(alone) / 2, *alone))
    lengths = [len(o) for o in row.responses]
    return [pad_sequence(torch.cat(x).split(lengths), True) for x in zip(*parts)]


@torch.no_grad()
def vepo_mask(row, response_mask, temperature, share=0.2):
    """The tokens that VEPO trains. Row, (B, T) -> (B, T)"""
    pixels = row.prompt["pixel_values"]  # (patches, values)
    noised = {**row.prompt, "pixel_values": pixels + 2 * torch.randn_like(pixels)}
    noised = group_logps(row.model, noised, row.responses, temperature, with_row=True)[-1]
    divergence, entropy, other = vepo_scores(row, noised, temperature)  # (B, T) each
    j, h, e = (minmax(x, response_mask) for x in (divergence, entropy, (other - entropy).abs()))
    score = (1 - (1 - j) ** 0.7 * (1 - e) ** 0.3) * h  # (B, T)
    return response_mask * top(score, response_mask, share)


def vepo_loss(
    config, logps, old_logps, advantages, response_mask, row, entropy, weight=0.2, **_
):  # fmt: skip
    """VEPO, arXiv 2606.03937, code Leonnnnnn929/VEPO (read). The view: normal noise of deviation 2
    on the normalised pixels. j, h, e = minmax of JSD(pi, pi_noise), H[pi], |H[pi_noise] - H[pi]|.

        s_t  = (1 - (1 - j)^0.7 (1 - e)^0.3) h
        loss = mean of L_t over the top share by s_t  -  0.001 mean(H[pi])

    weight: the share. Both clips 0.2, no dual clip. Departures: with DAPO's redrawing, where theirs
    has none; the vision tower is trained, theirs is frozen; G = 8, theirs 12; the mean over chosen
    tokens is the group's, theirs the micro-batch's."""
    chosen = vepo_mask(row, response_mask, config.temperature, weight)  # (B, T)
    given = config, logps, old_logps, advantages
    loss, metrics = weighted_loss(*given, chosen, 1.0)
    bonus = aggregate(entropy, response_mask, config.aggregation)  # scalar
    loss = loss - 0.001 * bonus
    return loss, {**metrics, "loss": loss.item(), "entropy": bonus.item()}


def push_loss(config, logps, advantages, response_mask, progress=None, weight=10.0, **rest):
    """The control of the gated term at gamma 10: weight log pi instead of gamma k3, for every token
    of a response with A > 0. Reads no second view. Metrics are papo_loss's, without the push."""
    given = dict(advantages=advantages, response_mask=response_mask, **rest)
    loss, metrics = papo_loss(replace(config, gamma=0.0), logps, **given)
    right = (advantages[:, None] > 0) * logps  # (B, T)
    return loss - weight * aggregate(right, response_mask, config.aggregation), metrics


# The objectives of the study's arms that have their own.
OBJECTIVES = {
    "vppo": vppo_loss,
    "pgpo": pgpo_loss,
    "pgpo-dev": partial(pgpo_loss, dev=True),
    "pgpo-black": pgpo_loss,
    "vgpo": vgpo_loss,
    "dvrp": dvrp_loss,
    "vepo": vepo_loss,
    "control-push": push_loss,
    "dapo-push": push_loss,
}
