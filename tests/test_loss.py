"""Advantages, terms, objective (paper Eq. 2 and 3) and recipe, against numbers worked by hand,
numpy in float64, finite differences, and the enumeration of a small categorical."""

import doctest
import inspect
import itertools
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import seeded

import papo
from papo import PAPOConfig, aggregate, clipped_policy_loss, group_advantages, kl_k3, papo_loss

inf, nan = math.inf, math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_group_advantages_by_hand_and_numpy():
    """A = (R - mean) / (std + eps), std unbiased, each group on its own, any batch dimensions."""
    close(group_advantages([1, 0, 0, 0]), torch.tensor([1.5, -0.5, -0.5, -0.5]), 1e-5)
    half = torch.tensor([0.5, -0.5]) / (1 + math.sqrt(0.5))
    close(group_advantages([1.0, 0.0], eps=1.0), half, 1e-6)
    rewards = np.random.default_rng(0).random((2, 3, 7))
    centred, std = rewards - rewards.mean(-1, keepdims=True), rewards.std(-1, ddof=1, keepdims=True)
    result = group_advantages(torch.tensor(rewards))
    np.testing.assert_allclose(result.numpy(), centred / (std + 1e-6), atol=1e-5)
    assert result.shape == (2, 3, 7) and result.dtype == torch.float32
    for alone in (1.0, [1.0], [[1.0], [0.0]]):
        with pytest.raises(ValueError, match="G >= 2"):
            group_advantages(alone)


def test_a_group_of_equal_rewards_is_exactly_zero():
    """No rounding of the mean blown up by a tiny deviation (0.1 and 0.9 are not floats)."""
    values = (0.0, 0.1, 0.9, 1.0, 1 / 3, -7.3, 1e-9, 1e9)
    for G, value in itertools.product(range(2, 40), values):
        other = value + 1 + abs(value)
        both = group_advantages([[value] * G, [value] * (G - 1) + [other]])
        assert (both[0] == 0).all() and (both[1] != 0).all(), (G, value)


@pytest.mark.parametrize(
    "ratio, A, loss, slope",
    [  # eps_l .2, eps_h .3, c 3; slope: d loss / d log pi
        (1.2, 2.0, -2.4, -2.4),  # inside: -r A
        (1.4, 2.0, -2.6, 0.0),  # A > 0, above 1 + eps_h: earns no more
        (3.1, 2.0, -2.6, 0.0),  # the dual clip is for A < 0
        (0.5, 2.0, -1.0, -1.0),  # A > 0, below 1 - eps_l: not clipped, min() takes the worse
        (0.9, -2.0, 1.8, 1.8),  # inside
        (0.7, -2.0, 1.6, 0.0),  # A < 0, below 1 - eps_l: no more to gain
        (1.4, -2.0, 2.8, 2.8),  # A < 0, above 1 + eps_h: not clipped
        (2.9, -2.0, 5.8, 5.8),
        (3.1, -2.0, 6.0, 0.0),  # A < 0, above c: dual clip
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, A, loss, slope):
    """Eq. 2, first term: both signs of A, inside and outside all clips, value and gradient."""
    old = f64([-1.5])
    logps = (old + math.log(ratio)).requires_grad_()
    value = clipped_policy_loss(logps, old, f64(A), 0.2, 0.3, 3.0)
    close(value, f64([loss]))
    close(torch.autograd.grad(value.sum(), logps)[0], f64([slope]))


@pytest.mark.parametrize("sign", [1, -1])
def test_policy_log_ratio_is_clamped_to_20(sign):
    """Released code: the log-ratio lies in +-20, so exp never overflows."""
    logps, A = sign * f64([25.0, 19.0]), f64(-sign)
    value = clipped_policy_loss(logps, f64([0.0, 0.0]), A, 0.2, 0.3, inf)
    close(value, sign * f64([math.exp(sign * 20), math.exp(sign * 19)]), 1e-12)


@pytest.mark.parametrize("log_x", [-25.0, -20.0, -9.0, -1.0, -1e-3, 0.0, 0.5, 2.0, 2.5, 2.7, 25.0])
def test_k3_value_clamps_and_gradient(log_x):
    """x - log x - 1 with x = pi_other / pi, log x in +-20, at most 10; gradient 1 - x in log pi, x
    - 1 in log pi_other, and zero beyond either clamp."""
    logps, other = f64([-1.0]).requires_grad_(), f64([-1.0 + log_x]).requires_grad_()
    value = kl_k3(logps, other)
    value.sum().backward()
    clamped = max(-20.0, min(20.0, log_x))
    free = math.exp(clamped) - clamped - 1
    slope = 1 - math.exp(log_x) if free <= 10 and abs(log_x) <= 20 else 0.0
    close(value, f64([min(free, 10.0)]), 1e-9)
    close(logps.grad, f64([slope]), 1e-9)
    close(other.grad, f64([-slope]), 1e-9)
    assert value >= 0


def test_k3_of_close_policies_survives_fp32():
    """Near x = 1, where training starts, exp(log x) - 1 would drown what is left."""
    log_x = torch.tensor([[1e-4, -1e-3, 1e-2]])
    expected = (log_x.double().expm1() - log_x).float()
    torch.testing.assert_close(kl_k3(torch.zeros(1, 3), log_x), expected, rtol=2e-3, atol=0)


# --- what the estimators estimate: all outcomes of a categorical, weighted by their probability --

THETA, PHI = f64(0.3, -1.2, 1.1, 0.4, -0.2), f64(-2.5, 0.9, -1.4, 0.8, 1.1)  # logits: pi, pi_mask
LOG_PI, LOG_MASK = THETA.log_softmax(0), PHI.log_softmax(0)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def entropy_of(log_p):
    return -(log_p.exp() * log_p).sum()


def gradient(function):
    """Of a function of log pi, in the logits of pi."""
    logits = THETA.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]


def expected_gradient(loss_of_token):
    """E over o ~ pi of d loss(o) / d logits: the token is drawn, then its loss differentiated."""
    return gradient(lambda log_pi: (LOG_PI.exp() * loss_of_token(log_pi)).sum())


def k3(log_pi, log_other):
    return kl_k3(log_pi[None], log_other[None])[0]


def test_k3_is_unbiased_and_the_printed_one_is_not():
    """With x = pi_mask / pi the mean over pi is KL[pi || pi_mask]; with 1/x it is far from it."""
    true = kl(LOG_PI, LOG_MASK)
    close((LOG_PI.exp() * k3(LOG_PI, LOG_MASK)).sum(), true)
    assert abs((LOG_PI.exp() * k3(LOG_MASK, LOG_PI)).sum() - true) > 0.5 * true


def test_expected_gradients_at_fixed_samples():
    """k1: zero. k2: KL[pi || pi_mask]'s. k3: that of the other direction, KL[pi_mask || pi]."""
    close(expected_gradient(lambda log_pi: log_pi - LOG_MASK), f64(0, 0, 0, 0, 0))
    forward = gradient(lambda log_pi: kl(log_pi, LOG_MASK))
    close(expected_gradient(lambda log_pi: (log_pi - LOG_MASK) ** 2 / 2), forward)
    moves = expected_gradient(lambda log_pi: k3(log_pi, LOG_MASK))
    close(moves, gradient(lambda log_pi: kl(LOG_MASK, log_pi)))
    assert (moves - forward).abs().max() > 0.1


def loss_of_each_token(log_pi, masked=None, entropy=None, **weights):
    """papo_loss of each outcome as a batch of one response of one token, (V,), without
    advantage."""
    config, outcomes = PAPOConfig(gamma=0, beta=0, **weights), []
    for k, logp in enumerate(log_pi):
        logp, masked_logp = logp.view(1, 1), None if masked is None else masked[k].view(1, 1)
        given = dict(masked_logps=masked_logp, entropy=entropy)
        outcomes.append(papo_loss(config, logp, logp.detach(), f64(0.0), f64([1.0]), **given)[0])
    return torch.stack(outcomes)


def test_kl_is_cross_entropy_minus_entropy():
    """KL[pi || pi_mask] = CE(pi, pi_mask) - H[pi]; the sampled "H[pi_mask]" of papo_loss, -log
    pi_mask of tokens of pi, has that cross-entropy as its mean, not H[pi_mask]."""
    cross = (LOG_PI.exp() * loss_of_each_token(LOG_PI, LOG_MASK, eta2=1.0)).sum()
    close(kl(LOG_PI, LOG_MASK), cross - entropy_of(LOG_PI))
    assert abs(cross - entropy_of(LOG_MASK)) > 0.5


def test_sampled_entropy_has_no_expected_gradient_and_the_exact_one_has():
    """E[grad log pi(o)] = 0 on-policy: the released entropy term pushes nowhere on average."""
    term = lambda log_pi, H=None: loss_of_each_token(log_pi, entropy=H, eta1=1.0)
    close(expected_gradient(term), f64(0, 0, 0, 0, 0))
    exact = expected_gradient(lambda log_pi: term(log_pi, entropy_of(log_pi).view(1, 1)))
    close(exact, gradient(entropy_of))
    assert exact.abs().max() > 0.1


B, T, LENGTHS = 4, 5, [5, 1, 3, 2]
MASK = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()  # (B, T)


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_aggregate_against_numpy_and_padding_is_inert(mode):
    """Eq. 2 (mean of per-response means) and Eq. 3 (one mean); nan or inf on padding is nothing."""
    values = torch.randn(B, T, generator=seeded(), dtype=torch.float64)
    rows = [values[i, :n].numpy() for i, n in enumerate(LENGTHS)]
    whole = np.mean([row.mean() for row in rows]), np.concatenate(rows).mean()
    slopes = [1 / (n * B) for n in LENGTHS], [1 / sum(LENGTHS)] * B
    for padding in (0.0, nan, inf, -inf):
        x = values.masked_fill(MASK == 0, padding).requires_grad_()
        result = aggregate(x, MASK, mode)
        result.backward()
        close(result, f64(whole[mode == "token"])[0])
        close(x.grad, MASK * f64(*slopes[mode == "token"])[:, None])
    assert aggregate(values, torch.zeros(B, T), mode) == 0  # and not nan
    with pytest.raises(ValueError, match="sequence or token"):
        aggregate(values, MASK, "mean")


# --- papo_loss ----------------------------------------------------------------------------------

WEIGHTS = dict(gamma=0.7, beta=0.3, eta1=0.2, eta2=0.4, clip_low=0.2, clip_high=0.3)
MODES = ("detached", "entropy", "full"), ("sequence", "token"), (True, False)
NAMES = "masked_grad, aggregation, exact"
SWITCHES = pytest.mark.parametrize(NAMES, list(itertools.product(*MODES)))


def random_inputs(seed=0, exact=True):
    """Log-probs spread so widely that every clip and clamp is met; names as papo_loss's."""
    g = seeded(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    logps = draw(B, T) - 2
    spread = dict(old_logps=0.5, masked_logps=1.5, ref_logps=0.5)
    inputs = {name: logps + scale * draw(B, T) for name, scale in spread.items()}
    inputs |= dict(logps=logps, advantages=draw(B), response_mask=MASK)
    exact = ("entropy", "masked_entropy") if exact else ()
    return inputs | {name: draw(B, T).exp() for name in exact}


def by_numpy(config, logps, advantages, entropy=None, masked_entropy=None, sampled=None, **inputs):
    """Eq. 2 or 3 in numpy, response by response, so that there is no padding: {metric: number}.
    sampled: the log pi_mask of the sampled entropy, where it is not that of the KL."""
    k3 = lambda log_x: np.minimum(np.expm1(log_x := np.clip(log_x, -20, 20)) - log_x, 10)
    high, low, dual = 1 + config.clip_high, 1 - config.clip_low, config.clip_dual
    entropy = -logps if entropy is None else entropy
    sampled = inputs["masked_logps"] if sampled is None else sampled
    masked_entropy = -sampled if masked_entropy is None else masked_entropy
    parts = {}  # metric: its tokens of each response
    for i, n in enumerate(LENGTHS):
        cut = lambda x: np.asarray(x[i, :n])
        own, masked, A = cut(logps), cut(inputs["masked_logps"]), float(advantages[i])
        r = np.exp(own - cut(inputs["old_logps"]))
        paid = np.minimum(r * A, np.clip(r, low, high) * A)
        row = dict(policy_loss=-(np.maximum(paid, dual * A) if A < 0 else paid))
        row["kl_ref"] = k3(cut(inputs["ref_logps"]) - own)
        row["kl_prcp"] = k3(masked - own) * (not config.gated or (A > 0) * (own > masked))
        row |= dict(entropy=cut(entropy), masked_entropy=cut(masked_entropy))
        row |= dict(clip_high_fraction=r > high, clip_low_fraction=r < low)
        for name, tokens in row.items():
            parts.setdefault(name, []).append(tokens)
    by_token = config.aggregation == "token"
    mean = lambda parts: np.mean(np.concatenate(parts) if by_token else [np.mean(p) for p in parts])
    out = {name: mean(responses) for name, responses in parts.items()}
    out["loss"] = out["policy_loss"] + config.beta * out["kl_ref"] - config.gamma * out["kl_prcp"]
    out["loss"] += config.eta1 * out["entropy"] + config.eta2 * out["masked_entropy"]
    return out


@SWITCHES
@pytest.mark.parametrize("gated", [False, True])
def test_papo_loss_against_numpy(masked_grad, aggregation, exact, gated):
    """Value and every metric are those of Eq. 2 / Eq. 3."""
    modes = dict(masked_grad=masked_grad, aggregation=aggregation, gated=gated)
    config = PAPOConfig(**WEIGHTS, **modes)
    for seed in range(5):
        inputs = random_inputs(seed, exact)
        loss, metrics = papo_loss(config, **inputs)
        expected = by_numpy(config, **inputs)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            slack = 1e-7 if "fraction" in name else 0  # they are counted in fp32
            assert metrics[name] == pytest.approx(value, rel=1e-9, abs=slack), name
        assert loss.item() == metrics["loss"] and loss.shape == ()
        assert 0 < metrics["clip_high_fraction"] < 1 or seed  # the inputs do meet the clips


@SWITCHES
@pytest.mark.parametrize("only", ["policy", "beta", "gamma", "gated", "eta1", "eta2", "all"])
def test_gradients_against_finite_differences(masked_grad, aggregation, exact, only):
    """Each term alone, and all together: along random directions, the gradient of every input is
    the finite difference of by_numpy, where a detached input is a constant. This is the table WHAT
    CARRIES GRADIENT of papo.py."""
    one = "gamma" if only == "gated" else only
    weights = {k: w * (one in (k, "all") or "clip" in k) for k, w in WEIGHTS.items()}
    modes = dict(masked_grad=masked_grad, aggregation=aggregation, gated=only == "gated")
    config, inputs = PAPOConfig(**weights, **modes), random_inputs(3, exact)
    if only not in ("policy", "gated", "all"):
        inputs["advantages"] = torch.zeros(B, dtype=torch.float64)
    leaves = {name: x.clone().requires_grad_(name != "response_mask") for name, x in inputs.items()}
    papo_loss(config, **leaves)[0].backward()
    grads = {k: torch.zeros_like(x) if x.grad is None else x.grad for k, x in leaves.items()}
    base = {**inputs, "sampled": inputs["masked_logps"]}
    through = {"detached": [], "entropy": ["sampled"], "full": ["sampled", "masked_logps"]}
    moved = {"logps": ["logps"], "masked_logps": through[masked_grad]}
    if exact:
        moved |= {"entropy": ["entropy"]}
        moved |= {"masked_entropy": ["masked_entropy"] * (masked_grad != "detached")}
    g = seeded(1)
    for name, names in moved.items():
        for _ in range(4):
            step = 1e-6 * torch.randn(B, T, generator=g, dtype=torch.float64)
            up, down = ({**base, **{k: base[k] + s * step for k in names}} for s in (1, -1))
            change = by_numpy(config, **up)["loss"] - by_numpy(config, **down)["loss"]
            close((grads[name] * step).sum() / 1e-6, f64(change / 2e-6)[0], 1e-7)
    for constant in {"old_logps", "ref_logps", "response_mask"} | moved.keys():
        assert constant in moved and moved[constant] or not grads[constant].any(), constant
    if only in ("gamma", "gated"):
        assert grads["logps"].any() and grads["masked_logps"].any() == (masked_grad == "full")
    if only == "eta2":
        trained = grads["masked_entropy" if exact else "masked_logps"].any()
        assert trained == (masked_grad != "detached")


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_gamma_zero_is_grpo_to_the_bit(aggregation):
    """Loss and gradient have the bits of policy + beta KL, whatever the masked log-probs, even
    nan."""
    config = PAPOConfig(gamma=0.0, beta=0.04, aggregation=aggregation)
    inputs = {name: x.float() for name, x in random_inputs(exact=False).items()}
    logps, masked = inputs["logps"].requires_grad_(), inputs.pop("masked_logps")
    policy = clipped_policy_loss(logps, inputs["old_logps"], inputs["advantages"], 0.2, 0.3, 3.0)
    grpo = aggregate(policy, MASK, aggregation)
    grpo = grpo + 0.04 * aggregate(kl_k3(logps, inputs["ref_logps"]), MASK, aggregation)
    for masked_logps in (None, masked, torch.full((B, T), nan)):
        loss, metrics = papo_loss(config, **inputs, masked_logps=masked_logps)
        slopes = [torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (loss, grpo)]
        assert torch.equal(loss, grpo) and torch.equal(*slopes)
        assert ("kl_prcp" in metrics) == (masked_logps is not None) and metrics.get("kl_prcp") != 0


@SWITCHES
@pytest.mark.parametrize("padding", [nan, inf, -inf, 1e30])
def test_padding_is_inert_in_every_term(masked_grad, aggregation, exact, padding):
    """What stands after a response's end changes no metric and no gradient, and gets none."""
    config = PAPOConfig(**WEIGHTS, masked_grad=masked_grad, aggregation=aggregation)

    def run(fill):
        inputs = random_inputs(1, exact)
        for name in inputs.keys() - {"advantages", "response_mask"}:
            inputs[name] = inputs[name].masked_fill(MASK == 0, fill).requires_grad_()
        loss, metrics = papo_loss(config, **inputs)
        loss.backward()
        return metrics, {name: x.grad for name, x in inputs.items() if x.grad is not None}

    (metrics, grads), (metrics0, grads0) = run(padding), run(0.0)
    assert metrics == metrics0 and grads.keys() == grads0.keys()
    for name in grads:
        assert torch.equal(grads[name], grads0[name]) and not grads[name][MASK == 0].any(), name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "name, needs", [("masked_logps", "gamma"), ("masked_logps", "eta2"), ("ref_logps", "beta")]
)
def test_missing_inputs_are_refused_only_when_needed(name, needs, gated):
    """A term with a weight needs its input; one without does not, and has no metric."""
    inputs, config = random_inputs(), PAPOConfig(gamma=0, beta=0, gated=gated)
    for missing in ("masked_logps", "masked_entropy", "ref_logps"):
        del inputs[missing]
    with pytest.raises(ValueError, match=f"needs {name}"):
        papo_loss(replace(config, **{needs: 0.1}), **inputs)
    metrics = papo_loss(config, **inputs)[1]
    measured = {"loss", "policy_loss", "entropy", "clip_high_fraction", "clip_low_fraction"}
    assert metrics.keys() == measured and all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("name", sorted(random_inputs().keys() - {"logps"}))
def test_shape_errors_name_tensor_and_dimension(name):
    """No silent broadcasting: (B, 1) against (B, T) would be a wrong loss without an error."""
    inputs, x = random_inputs(), random_inputs()[name]
    cases = [(x[:-1], f"{name} has B = {B - 1}, but logps has B = {B}")]
    cases += [(x[..., :1], f"{name} has T = 1, but logps has T = {T}")] * (x.dim() == 2)
    cases += [(x[..., None], rf"{name} must have shape \(B.*\), got \(4, .*1\)")]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=words):
            papo_loss(PAPOConfig(), **{**inputs, name: wrong})


TERMS = {
    "clip": lambda a, b: clipped_policy_loss(a, b, a[:, 0], 0.2, 0.3, 3.0),
    "advantages": lambda a, b: clipped_policy_loss(a, a, a[:1, 0], 0.2, 0.3, 3.0),
    "k3": kl_k3,
    "gate": lambda a, b: papo.perception_gate(a, b, a[:, 0]),
    "aggregate": lambda a, b: aggregate(a, b, "token"),
}


@pytest.mark.parametrize("term", TERMS)
def test_the_terms_check_their_own_shapes(term):
    with pytest.raises(ValueError, match="has [BT] = 1, but .* has [BT] = [23]"):
        TERMS[term](torch.zeros(2, 3), torch.zeros(2, 1))


def test_perception_gate_by_hand():
    """Open where A > 0 and pi > pi_mask: not where the picture speaks against the token or changes
    nothing, not in a worse response, not among equal rewards."""
    pi, pi_mask = f64([0.8, 0.2, 0.5]).log(), f64([0.2, 0.8, 0.5]).log()
    for A, row in ((1.5, [True, False, False]), (-0.5, [False] * 3), (0.0, [False] * 3)):
        assert papo.perception_gate(pi, pi_mask, f64(A)).tolist() == [row]


@pytest.mark.parametrize("gamma", [0.3, 3.0, 1000.0])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_gated_kl_pushes_no_token_against_its_advantage(gamma, aggregation):
    """At ratio 1 a token's push is A + gamma max(0, 1 - pi_mask/pi) where A > 0, else A alone;
    without the gate some turn."""
    inputs = random_inputs(3)
    logps, A = inputs["old_logps"], inputs["advantages"][:, None]  # (B, T), (B, 1)

    def push(**settings):
        inputs["logps"] = logps.clone().requires_grad_()
        config = PAPOConfig(beta=0.0, aggregation=aggregation, **settings)
        papo_loss(config, **inputs)[0].backward()
        return -inputs["logps"].grad  # (B, T)

    each = MASK.sum(1, keepdim=True) * B if aggregation == "sequence" else MASK.sum()
    paid = gamma * (1 - (inputs["masked_logps"] - logps).exp()).clamp(min=0) * (A > 0)  # (B, T)
    close(push(gamma=gamma, gated=True), (A + paid) * MASK / each, 1e-9)
    assert (push(gamma=1000.0) * A < 0).any()


# --- the recipe ---------------------------------------------------------------------------------

NONSENSE = dict(
    gamma=(-0.1, nan, inf), beta=(-1, nan), eta1=(-1,), eta2=(-1, nan), clip_low=(1.5, -0.1),
    clip_high=(-0.1,), clip_dual=(0.5,), mask_ratio=(1.5, -0.1, nan), patch_size=(0,),
    group_size=(1,), temperature=(0, nan), top_p=(0, 1.1), format_weight=(1.1, -0.1),
    max_redraws=(-1,), max_new_tokens=(0,), prompts_per_batch=(0, 2), prompts_per_sample=(0,),
    updates_per_batch=(0,), tokens_per_forward=(0,), learning_rate=(-1, nan), weight_decay=(-1,),
    max_grad_norm=(0,), aggregation=("mean",), masked_grad=("none",), entropy_estimate=("mean",),
)  # fmt: skip


@pytest.mark.parametrize("name, value", [(name, x) for name, xs in NONSENSE.items() for x in xs])
def test_config_refuses_nonsense_by_name(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        PAPOConfig(**{name: value})


def test_limits_themselves_are_allowed():
    names = "gamma beta clip_low clip_high max_redraws format_weight learning_rate weight_decay"
    zero = dict.fromkeys(names.split(), 0)
    one = dict(mask_ratio=1, top_p=1, group_size=2, prompts_per_batch=3, updates_per_batch=3)
    PAPOConfig(**zero, **one, clip_dual=inf, max_grad_norm=inf)


@pytest.mark.parametrize("given", [None, "detached", "entropy", "full"])
def test_what_the_masked_pass_trains_follows_eta2_unless_given(given):
    """eta2 > 0 with the released code's constant H[pi_mask] would train nothing; so where
    masked_grad is not given, mask_gradient follows eta2, also through replace, and a config is
    plain JSON."""
    config = PAPOConfig(masked_grad=given)
    for eta2, chosen in ((0.0, "detached"), (0.1, "entropy"), (0.0, "detached")):
        config = replace(config, eta2=eta2)
        assert config.masked_grad == given and config.mask_gradient == (given or chosen)
        assert PAPOConfig(**json.loads(json.dumps(asdict(config)))) == config


TABLE_6 = {  # gamma, eta1, eta2, beta, eps_l, eps_h, aggregation, dynamic sampling, patch
    "papo-g-3b": (0.02, 0, 0, 0.01, 0.2, 0.3, "sequence", False, 14),
    "papo-g-7b": (0.02, 0.05, 0.05, 0.01, 0.2, 0.3, "sequence", False, 14),
    "papo-g-qwen3-2b": (0.01, 0, 0, 0.01, 0.2, 0.3, "sequence", False, 16),
    "papo-g-no-ref": (0.01, 0.03, 0.03, 0, 0.2, 0.3, "sequence", False, 14),
    "papo-d-3b": (0.01, 0.03, 0.03, 0, 0.2, 0.28, "token", True, 14),
    "papo-d-7b": (0.01, 0.03, 0.03, 0, 0.2, 0.28, "token", True, 14),
    "grpo": (0, 0, 0, 0.01, 0.2, 0.3, "sequence", False, 14),
    "dapo": (0, 0, 0, 0, 0.2, 0.28, "token", True, 14),
}
SHARED = dict(
    mask_ratio=0.6, group_size=5, temperature=1.0, top_p=0.99, prompts_per_batch=384,
    updates_per_batch=3, learning_rate=1e-6, weight_decay=0.01, max_grad_norm=1.0, clip_dual=3.0,
    max_new_tokens=2048, format_weight=0.1, max_redraws=20,
)  # fmt: skip


@pytest.mark.parametrize("name", TABLE_6)
def test_presets_are_table_6(name):
    c = PAPOConfig.preset(name)
    weights = c.gamma, c.eta1, c.eta2, c.beta, c.clip_low, c.clip_high
    assert (*weights, c.aggregation, c.dynamic_sampling, c.patch_size) == TABLE_6[name]
    assert asdict(c) == asdict(c) | SHARED
    assert c.mask_gradient == ("entropy" if c.eta2 else "detached")


def test_preset_changes_and_unknown_names():
    changed = PAPOConfig.preset("papo-d-3b", gamma=0.5, top_p=0.5)
    assert (changed.gamma, changed.top_p, changed.beta) == (0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match="unknown preset 'ppo', choose from"):
        PAPOConfig.preset("ppo")
    with pytest.raises(ValueError, match="gamma"):
        PAPOConfig.preset("grpo", gamma=-1)


def test_glossary_names_exist():
    """Each code name of the header's glossary is a config field, a parameter or a field of papo.py;
    each name in the way of the data is a function; each mode of the gradient table is accepted."""
    section = lambda title: papo.__doc__.split(title)[1].split("\n\n")[0]
    functions = [f for f in vars(papo).values() if inspect.isfunction(f) and f.__module__ == "papo"]
    known = {name for f in functions for name in f.__code__.co_varnames}
    known |= PAPOConfig.__dataclass_fields__.keys() | papo.Group.__dataclass_fields__.keys()
    table = section("code name ")  # its first line is the rest of the head
    column = table.index("symbol") + len("    code name ")
    names = {x for line in table.splitlines()[1:] for x in re.findall(r"\w+", line[:column])}
    names |= set(re.findall(r"(\w+): (?:H\[pi_mask\]|c\b)", papo.__doc__))
    wanted = {"logps", "masked_logps", "masked_entropy", "clip_dual", "gamma", "eta2"}
    assert wanted <= names <= known and len(names) >= 16
    way = re.findall(r"[a-z]+_[a-z_]+", section("THE WAY OF THE DATA"))
    assert len(way) >= 7 and all(callable(getattr(papo, name)) for name in way)
    modes = re.findall(r'^    "(\w+)"', section("WHAT CARRIES GRADIENT"), re.M)
    assert {PAPOConfig(masked_grad=mode).mask_gradient for mode in modes} == set(MODES[0])


def test_the_worked_numbers_in_docstrings_are_true():
    """Each >>> of papo.py prints what stands below it."""
    result = doctest.testmod(papo)
    assert result.failed == 0 and result.attempted >= 7
