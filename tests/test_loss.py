"""The terms of the loss and the objective (paper Eq. 2 and 3), against hand-computed numbers, scalar loops in float64,
finite differences, and the enumeration of a small categorical distribution."""

import doctest
import itertools
import json
import math
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import papo
from papo import PAPOConfig, aggregate, clipped_policy_loss, group_advantages, kl_k3, papo_loss

inf, nan = math.inf, math.nan


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# --- clipped_policy_loss -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [  # eps_l .2, eps_h .3, c 3; slope: d loss / d log pi
        (1.0, 2.0, -2.0, -2.0),
        (1.2, 2.0, -2.4, -2.4),  # inside: -r A
        (1.4, 2.0, -2.6, 0.0),
        (9.0, 2.0, -2.6, 0.0),  # A > 0, above 1 + eps_h: earns no more
        (0.5, 2.0, -1.0, -1.0),  # A > 0, below 1 - eps_l: not clipped, min() takes the worse
        (0.9, -2.0, 1.8, 1.8),  # inside
        (0.7, -2.0, 1.6, 0.0),
        (0.1, -2.0, 1.6, 0.0),  # A < 0, below 1 - eps_l: no more to gain
        (1.4, -2.0, 2.8, 2.8),
        (2.9, -2.0, 5.8, 5.8),  # A < 0, above 1 + eps_h: not clipped
        (3.1, -2.0, 6.0, 0.0),
        (50.0, -2.0, 6.0, 0.0),  # A < 0, above c: dual clip
        (3.1, 2.0, -2.6, 0.0),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, slope):
    """Eq. 2, first term: both signs of A, inside and outside both clips and the dual clip, value and gradient."""
    old = f64([-1.5])
    logps = (old + math.log(ratio)).requires_grad_()
    value = clipped_policy_loss(logps, old, f64(advantage), 0.2, 0.3, 3.0)
    value.sum().backward()
    close(value, f64([loss]))
    close(logps.grad, f64([slope]))


def test_policy_log_ratio_is_clamped_to_20():
    """Released code: the log-ratio lies in +-20, so exp never overflows."""
    value = clipped_policy_loss(f64([25.0, 19.0]), f64([0.0, 0.0]), f64(-1.0), 0.2, 0.3, inf)
    close(value, f64([math.exp(20), math.exp(19)]), 1e-12)
    value = clipped_policy_loss(f64([-25.0, -19.0]), f64([0.0, 0.0]), f64(1.0), 0.2, 0.3, inf)
    close(value, f64([-math.exp(-20), -math.exp(-19)]), 1e-12)


# --- kl_k3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_x", [-25.0, -20.0, -9.0, -1.0, -1e-3, 0.0, 0.5, 2.0, 2.5, 2.7, 25.0])
def test_k3_value_clamps_and_gradient(log_x):
    """x - log x - 1 with x = pi_other / pi, log x in +-20, at most 10; gradient 1 - x in log pi, x - 1 in log pi_other,
    and zero beyond either clamp."""
    logps, other = f64([-1.0]).requires_grad_(), f64([-1.0 + log_x]).requires_grad_()
    value = kl_k3(logps, other)
    value.sum().backward()
    clamped = max(-20.0, min(20.0, log_x))
    free = math.exp(clamped) - clamped - 1
    x = math.exp(log_x)
    slope = 1 - x if free <= 10 and abs(log_x) <= 20 else 0.0
    close(value, f64([min(free, 10.0)]), 1e-9)
    close(logps.grad, f64([slope]), 1e-9)
    close(other.grad, f64([-slope]), 1e-9)
    assert value >= 0


def test_k3_of_close_policies_survives_fp32():
    """Near x = 1, where training starts, k3 is about (log x)^2 / 2; exp(log x) - 1 would drown it in rounding."""
    log_x = torch.tensor([[1e-4, -1e-3, 1e-2]])
    torch.testing.assert_close(
        kl_k3(torch.full((1, 3), 0.0), log_x), (log_x.double().expm1() - log_x).float(), rtol=2e-3, atol=0
    )


# --- what the estimators estimate: all five outcomes of a categorical, each weighted with its probability -----------------

THETA, PHI = f64(0.3, -1.2, 1.1, 0.4, -0.2), f64(-2.5, 0.9, -1.4, 0.8, 1.1)  # logits of pi and of pi_mask
LOG_PI, LOG_MASK = THETA.log_softmax(0), PHI.log_softmax(0)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def expected_gradient(loss_of_token, logits=THETA):
    """E over o ~ pi of d loss(o) / d logits: the token is drawn first, then its loss is differentiated."""
    logits = logits.clone().requires_grad_()
    weights = THETA.softmax(0)  # constant: sampling is not differentiated
    return torch.autograd.grad((weights * loss_of_token(logits.log_softmax(0))).sum(), logits)[0]


def gradient(function, logits=THETA):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]


def k3(log_pi, log_other):
    return kl_k3(log_pi[None], log_other[None])[0]


def test_k3_is_unbiased_and_the_printed_one_is_not():
    """With x = pi_mask / pi the mean over pi is KL[pi || pi_mask]; with pi / pi_mask it is far from it."""
    true = kl(LOG_PI, LOG_MASK)
    close((LOG_PI.exp() * k3(LOG_PI, LOG_MASK)).sum(), true)
    printed = (LOG_PI.exp() * k3(LOG_MASK, LOG_PI)).sum()
    assert abs(printed - true) > 0.5 * true


def test_expected_gradients_at_fixed_samples():
    """k1: zero. k2: that of KL[pi || pi_mask]. k3: that of the other direction, KL[pi_mask || pi]."""
    close(expected_gradient(lambda log_pi: log_pi - LOG_MASK), torch.zeros(5, dtype=torch.float64))
    close(
        expected_gradient(lambda log_pi: (log_pi - LOG_MASK) ** 2 / 2),
        gradient(lambda log_pi: kl(log_pi, LOG_MASK)),
    )
    moves = expected_gradient(lambda log_pi: k3(log_pi, LOG_MASK))
    close(moves, gradient(lambda log_pi: kl(LOG_MASK, log_pi)))
    assert (moves - gradient(lambda log_pi: kl(log_pi, LOG_MASK))).abs().max() > 0.1


def test_kl_is_cross_entropy_minus_entropy():
    """KL[pi || pi_mask] = CE(pi, pi_mask) - H[pi], and the sampled "H[pi_mask]" of papo_loss, -log pi_mask of tokens of pi,
    has that cross-entropy as its mean, not H[pi_mask]."""
    entropy = lambda log_p: -(log_p.exp() * log_p).sum()
    config, one = PAPOConfig(gamma=0, beta=0, eta2=1.0), f64([1.0])
    cross = sum(
        p * papo_loss(config, l.view(1, 1), l.view(1, 1), f64(0.0), one, m.view(1, 1))[0]
        for p, l, m in zip(LOG_PI.exp(), LOG_PI, LOG_MASK)
    )
    close(kl(LOG_PI, LOG_MASK), cross - entropy(LOG_PI))
    assert abs(cross - entropy(LOG_MASK)) > 0.5


def test_sampled_entropy_has_no_expected_gradient_and_the_exact_one_has():
    """E[grad log pi(o)] = 0 on-policy: the released entropy term pushes nowhere on average at the first update."""
    config = PAPOConfig(gamma=0, beta=0, eta1=1.0)

    def term(exact):
        def losses(log_pi):
            H = -(log_pi.exp() * log_pi).sum().view(1, 1) if exact else None
            return torch.stack(
                [
                    papo_loss(config, l.view(1, 1), l.detach().view(1, 1), f64(0.0), f64([1.0]), entropy=H)[0]
                    for l in log_pi
                ]
            )

        return expected_gradient(losses)

    close(term(exact=False), torch.zeros(5, dtype=torch.float64))
    close(term(exact=True), gradient(lambda log_pi: -(log_pi.exp() * log_pi).sum()))
    assert term(exact=True).abs().max() > 0.1


# --- aggregate ---------------------------------------------------------------------------------------------------------


def ragged(lengths, T):
    return torch.stack([(torch.arange(T) < n).double() for n in lengths])  # (B, T)


@pytest.mark.parametrize("mode", ["sequence", "token"])
def test_aggregate_against_loops_and_padding_is_inert(mode):
    """Eq. 2 (mean of per-response means) and Eq. 3 (one mean over tokens); nan or inf on padding changes nothing."""
    lengths = [4, 1, 6, 2]
    values, mask = (
        torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        ragged(lengths, 6),
    )
    rows = [[values[i, t].item() for t in range(n)] for i, n in enumerate(lengths)]
    if mode == "sequence":
        expected = sum(sum(row) / len(row) for row in rows) / len(rows)
        slopes = [1 / (len(row) * len(rows)) for row in rows]
    else:
        expected, slopes = sum(map(sum, rows)) / sum(lengths), [1 / sum(lengths)] * 4
    for padding in (0.0, nan, inf, -inf):
        x = values.masked_fill(mask == 0, padding).requires_grad_()
        result = aggregate(x, mask, mode)
        result.backward()
        close(result, f64(expected)[0])
        close(x.grad, mask * f64(*slopes)[:, None])
    assert aggregate(values, torch.zeros(4, 6), mode) == 0  # and not nan


def test_aggregate_refuses_other_modes():
    with pytest.raises(ValueError, match="sequence or token"):
        aggregate(torch.ones(1, 1), torch.ones(1, 1), "mean")


# --- group_advantages --------------------------------------------------------------------------------------------------


def test_group_advantages_by_hand_and_numpy():
    """A = (R - mean) / (std + eps), the standard deviation unbiased, each group on its own, any batch dimensions."""
    torch.testing.assert_close(
        group_advantages([1, 0, 0, 0]), torch.tensor([1.5, -0.5, -0.5, -0.5]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        group_advantages([1.0, 0.0], eps=1.0), torch.tensor([0.5, -0.5]) / (1 + math.sqrt(0.5))
    )
    rewards = np.random.default_rng(0).random((2, 3, 7))
    expected = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, ddof=1, keepdims=True) + 1e-6)
    result = group_advantages(torch.tensor(rewards))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    assert result.shape == (2, 3, 7) and result.dtype == torch.float32


def test_a_group_of_equal_rewards_is_exactly_zero():
    """Rounding of the mean must not be blown up by a tiny standard deviation (0.1 and 0.9 are not floats)."""
    for G, value in itertools.product(range(2, 40), (0.0, 0.1, 0.9, 1.0, 1 / 3, -7.3, 1e-9, 1e9)):
        both = group_advantages(torch.tensor([[value] * G, [value] * (G - 1) + [value + 1 + abs(value)]]))
        assert (both[0] == 0).all() and (both[1] != 0).all(), (G, value)


@pytest.mark.parametrize("rewards", [1.0, [1.0], [[1.0], [0.0]]])
def test_a_group_needs_two(rewards):
    with pytest.raises(ValueError, match="G >= 2"):
        group_advantages(rewards)


# --- papo_loss ---------------------------------------------------------------------------------------------------------

B, T, LENGTHS = 4, 5, [5, 1, 3, 2]
MASK = ragged(LENGTHS, T)
WEIGHTS = dict(gamma=0.7, beta=0.3, eta1=0.2, eta2=0.4, clip_low=0.2, clip_high=0.3)
SWITCHES = list(itertools.product(("detached", "entropy", "full"), ("sequence", "token"), (True, False)))


def random_inputs(seed=0, exact=True):
    """Log-probs spread so widely that every clip and clamp is met; names as papo_loss's arguments."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda scale=1.0: scale * torch.randn(B, T, generator=g, dtype=torch.float64)
    logps = draw() - 2
    inputs = dict(
        logps=logps,
        old_logps=logps + draw(0.5),
        advantages=torch.randn(B, generator=g, dtype=torch.float64),
        response_mask=MASK,
        masked_logps=logps + draw(1.5),
        ref_logps=logps + draw(0.5),
    )
    return inputs | (dict(entropy=draw().exp(), masked_entropy=draw().exp()) if exact else {})


def loop_loss(
    config,
    logps,
    old_logps,
    advantages,
    response_mask,
    masked_logps,
    ref_logps,
    entropy=None,
    masked_entropy=None,
    masked_logps_in_entropy=None,
):
    """Eq. 2 or 3 one token at a time, in Python floats. masked_logps_in_entropy: the log pi_mask of the sampled entropy."""
    per_response, counts = {}, []

    def k3_of(other, own):
        log_x = min(20.0, max(-20.0, other - own))
        return min(10.0, math.exp(log_x) - log_x - 1)

    for i in range(len(advantages)):
        A, n = float(advantages[i]), int(response_mask[i].sum())
        counts.append(n)
        for t in range(n):
            own, masked = float(logps[i, t]), float(masked_logps[i, t])
            r = math.exp(own - float(old_logps[i, t]))
            surrogate = min(r * A, min(max(r, 1 - config.clip_low), 1 + config.clip_high) * A)
            if A < 0:
                surrogate = max(surrogate, config.clip_dual * A)
            in_entropy = masked if masked_logps_in_entropy is None else float(masked_logps_in_entropy[i, t])
            for name, value in dict(
                policy_loss=-surrogate,
                kl_ref=k3_of(float(ref_logps[i, t]), own),
                kl_prcp=k3_of(masked, own),
                entropy=-own if entropy is None else float(entropy[i, t]),
                masked_entropy=-in_entropy if masked_entropy is None else float(masked_entropy[i, t]),
                clip_high_fraction=float(r > 1 + config.clip_high),
                clip_low_fraction=float(r < 1 - config.clip_low),
            ).items():
                per_response.setdefault(name, [0.0] * len(advantages))[i] += value
    if config.aggregation == "sequence":
        out = {
            name: sum(s / n for s, n in zip(sums, counts)) / len(counts)
            for name, sums in per_response.items()
        }
    else:
        out = {name: sum(sums) / sum(counts) for name, sums in per_response.items()}
    out["loss"] = (
        out["policy_loss"]
        + config.beta * out["kl_ref"]
        - config.gamma * out["kl_prcp"]
        + config.eta1 * out["entropy"]
        + config.eta2 * out["masked_entropy"]
    )
    return out


@pytest.mark.parametrize("masked_grad, aggregation, exact", SWITCHES)
def test_papo_loss_against_scalar_loops(masked_grad, aggregation, exact):
    """Value and every metric equal a token-by-token implementation of Eq. 2 / Eq. 3."""
    config = PAPOConfig(**WEIGHTS, masked_grad=masked_grad, aggregation=aggregation)
    for seed in range(5):
        inputs = random_inputs(seed, exact)
        loss, metrics = papo_loss(config, **inputs)
        expected = loop_loss(config, **inputs)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-7 if "fraction" in name else 0), (
                name
            )
        assert loss.item() == metrics["loss"] and loss.shape == ()
        assert 0 < metrics["clip_high_fraction"] < 1 or seed  # the inputs do meet the clips


@pytest.mark.parametrize("masked_grad, aggregation, exact", SWITCHES)
@pytest.mark.parametrize("only", ["policy", "beta", "gamma", "eta1", "eta2", "all"])
def test_gradients_against_finite_differences(masked_grad, aggregation, exact, only):
    """Each term alone, and all together: the gradient of every input is the finite difference of the scalar loops, where a
    detached input is a constant. This is the table WHAT CARRIES GRADIENT of papo.py."""
    weights = {name: w if only in (name, "all") or "clip" in name else 0.0 for name, w in WEIGHTS.items()}
    config = PAPOConfig(**weights, masked_grad=masked_grad, aggregation=aggregation)
    inputs = random_inputs(3, exact)
    if only not in ("policy", "all"):
        inputs["advantages"] = torch.zeros(B, dtype=torch.float64)
    leaves = {name: x.clone().requires_grad_(name != "response_mask") for name, x in inputs.items()}
    papo_loss(config, **leaves)[0].backward()
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}

    def difference(*names):
        out = torch.zeros(B, T, dtype=torch.float64)
        for i, t in itertools.product(range(B), range(T)):
            step, up, down = torch.zeros(B, T, dtype=torch.float64), dict(base), dict(base)
            step[i, t] = 1e-6
            for name in names:
                up[name], down[name] = base[name] + step, base[name] - step
            out[i, t] = (loop_loss(config, **up)["loss"] - loop_loss(config, **down)["loss"]) / 2e-6
        return out

    base = {**inputs, "masked_logps_in_entropy": inputs["masked_logps"]}
    through = {
        "detached": (),
        "entropy": ("masked_logps_in_entropy",),
        "full": ("masked_logps_in_entropy", "masked_logps"),
    }[masked_grad]
    close(grads["logps"], difference("logps"), 1e-7)
    close(grads["masked_logps"], difference(*through), 1e-7)
    if exact:
        close(grads["entropy"], difference("entropy"), 1e-7)
        close(grads["masked_entropy"], difference(*["masked_entropy"] * (masked_grad != "detached")), 1e-7)
    for constant in ("old_logps", "ref_logps", "response_mask"):
        assert not grads[constant].any(), constant
    if only == "gamma":
        assert grads["logps"].any() and grads["masked_logps"].any() == (masked_grad == "full")
    if only == "eta2":
        assert grads["masked_entropy" if exact else "masked_logps"].any() == (masked_grad != "detached")


@pytest.mark.parametrize(
    "name, metric, sign",
    [("gamma", "kl_prcp", -1), ("beta", "kl_ref", 1), ("eta1", "entropy", 1), ("eta2", "masked_entropy", 1)],
)
def test_each_weight_scales_its_own_term(name, metric, sign):
    """d loss / d weight is the term's metric: minus for gamma (this KL grows), plus for the others (these shrink)."""
    low, high = (PAPOConfig(**{**WEIGHTS, name: WEIGHTS[name] + d}) for d in (-0.1, 0.1))
    inputs = random_inputs()
    (a, _), (b, metrics) = papo_loss(low, **inputs), papo_loss(high, **inputs)
    assert ((b - a) / 0.2).item() == pytest.approx(sign * metrics[metric], rel=1e-9)


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_gamma_zero_is_grpo_to_the_bit(aggregation):
    """gamma = 0: loss and gradient have the bits of policy + beta KL, with or without masked log-probs, even nan ones."""
    config = PAPOConfig(gamma=0.0, beta=0.04, aggregation=aggregation)
    inputs = {name: x.float() for name, x in random_inputs(exact=False).items()}
    results = []
    for masked in (None, inputs["masked_logps"], torch.full((B, T), nan)):
        logps = inputs["logps"].clone().requires_grad_()
        loss, metrics = papo_loss(config, **{**inputs, "logps": logps, "masked_logps": masked})
        loss.backward()
        results.append((loss.detach(), logps.grad))
        assert ("kl_prcp" in metrics) == (masked is not None) and metrics.get("kl_prcp") != 0
    logps = inputs["logps"].clone().requires_grad_()
    policy = clipped_policy_loss(logps, inputs["old_logps"], inputs["advantages"], 0.2, 0.3, 3.0)
    grpo = aggregate(policy, MASK, aggregation) + 0.04 * aggregate(
        kl_k3(logps, inputs["ref_logps"]), MASK, aggregation
    )
    grpo.backward()
    for loss, grad in results:
        assert torch.equal(loss, grpo.detach()) and torch.equal(grad, logps.grad)


@pytest.mark.parametrize("masked_grad, aggregation, exact", SWITCHES)
@pytest.mark.parametrize("padding", [nan, inf, -inf, 1e30])
def test_padding_is_inert_in_every_term(masked_grad, aggregation, exact, padding):
    """What stands after the end of a response changes no value, no metric and no gradient, and gets none."""
    config = PAPOConfig(**WEIGHTS, masked_grad=masked_grad, aggregation=aggregation)

    def run(fill):
        inputs = {
            name: x
            if name in ("advantages", "response_mask")
            else x.masked_fill(MASK == 0, fill).requires_grad_()
            for name, x in random_inputs(1, exact).items()
        }
        loss, metrics = papo_loss(config, **inputs)
        loss.backward()
        return metrics, {name: x.grad for name, x in inputs.items() if x.grad is not None}

    (metrics, grads), (metrics0, grads0) = run(padding), run(0.0)
    assert metrics == metrics0 and grads.keys() == grads0.keys()
    for name in grads:
        assert torch.equal(grads[name], grads0[name]) and not grads[name][MASK == 0].any(), name


def test_missing_inputs_are_refused_only_when_needed():
    """A term with a weight needs its input; one without does not, and what was not measured is no metric."""
    inputs = random_inputs()
    without = lambda *names: {k: v for k, v in inputs.items() if k not in names}
    for weights in (dict(gamma=0.1), dict(gamma=0, eta2=0.1)):
        with pytest.raises(ValueError, match="masked_logps"):
            papo_loss(PAPOConfig(**weights), **without("masked_logps"))
    with pytest.raises(ValueError, match="ref_logps"):
        papo_loss(PAPOConfig(gamma=0, beta=0.1), **without("ref_logps"))
    _, metrics = papo_loss(
        PAPOConfig(gamma=0, beta=0), **without("ref_logps", "masked_logps", "masked_entropy")
    )
    assert metrics.keys() == {"loss", "policy_loss", "entropy", "clip_high_fraction", "clip_low_fraction"}
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize(
    "name",
    ["old_logps", "response_mask", "masked_logps", "ref_logps", "entropy", "masked_entropy", "advantages"],
)
def test_shape_errors_name_tensor_and_dimension(name):
    """No silent broadcasting: (B, 1) against (B, T) would be a wrong loss without an error."""
    inputs, config = random_inputs(), PAPOConfig()
    wrong = inputs[name][:-1]
    with pytest.raises(ValueError, match=rf"{name} has B = {B - 1}, but logps has B = {B}"):
        papo_loss(config, **{**inputs, name: wrong})
    if name == "advantages":
        with pytest.raises(ValueError, match=r"advantages must have shape \(B\), got \(4, 1\)"):
            papo_loss(config, **{**inputs, name: inputs[name][:, None]})
    else:
        with pytest.raises(ValueError, match=rf"{name} has T = 1, but logps has T = {T}"):
            papo_loss(config, **{**inputs, name: inputs[name][:, :1]})


def test_the_terms_check_their_own_shapes():
    a, b = torch.zeros(2, 3), torch.zeros(2, 1)
    for call in (
        lambda: clipped_policy_loss(a, b, torch.zeros(2), 0.2, 0.3, 3.0),
        lambda: kl_k3(a, b),
        lambda: aggregate(a, b, "token"),
    ):
        with pytest.raises(ValueError, match="has T = 1, but .* has T = 3"):
            call()
    with pytest.raises(ValueError, match="advantages has B = 3, but logps has B = 2"):
        clipped_policy_loss(a, a, torch.zeros(3), 0.2, 0.3, 3.0)


# --- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        ("gamma", -0.1),
        ("gamma", nan),
        ("gamma", inf),
        ("beta", -1),
        ("beta", nan),
        ("eta1", -1),
        ("eta2", -1),
        ("eta2", nan),
        ("clip_low", 1.5),
        ("clip_low", -0.1),
        ("clip_high", -0.1),
        ("clip_dual", 0.5),
        ("mask_ratio", 1.5),
        ("mask_ratio", -0.1),
        ("mask_ratio", nan),
        ("patch_size", 0),
        ("group_size", 1),
        ("temperature", 0),
        ("temperature", nan),
        ("top_p", 0),
        ("top_p", 1.1),
        ("format_weight", 1.1),
        ("format_weight", -0.1),
        ("max_redraws", -1),
        ("max_new_tokens", 0),
        ("prompts_per_batch", 0),
        ("prompts_per_batch", 2),
        ("prompts_per_sample", 0),
        ("updates_per_batch", 0),
        ("tokens_per_forward", 0),
        ("learning_rate", -1),
        ("learning_rate", nan),
        ("weight_decay", -1),
        ("max_grad_norm", 0),
        ("aggregation", "mean"),
        ("masked_grad", "none"),
        ("entropy_estimate", "mean"),
    ],
)
def test_config_refuses_nonsense_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        PAPOConfig(**{field: value})


def test_limits_themselves_are_allowed():
    PAPOConfig(
        gamma=0,
        beta=0,
        clip_low=0,
        clip_high=0,
        clip_dual=inf,
        mask_ratio=1,
        group_size=2,
        top_p=1,
        max_redraws=0,
        prompts_per_batch=3,
        updates_per_batch=3,
        max_grad_norm=inf,
        format_weight=0,
        learning_rate=0,
    )


def test_masked_grad_follows_eta2_unless_given():
    """eta2 > 0 with the released code's constant H[pi_mask] would train nothing, so the default then changes."""
    assert PAPOConfig().masked_grad == "detached"
    assert PAPOConfig(eta2=0.01).masked_grad == "entropy"
    assert PAPOConfig(eta2=0.01, masked_grad="detached").masked_grad == "detached"
    assert PAPOConfig(masked_grad="full").masked_grad == "full"


def test_masked_grad_follows_eta2_through_replace():
    """Not given, it is settled anew with every eta2; given, it stays, also when it is what eta2 would have chosen."""
    assert replace(PAPOConfig(), eta2=0.1).masked_grad == "entropy"
    assert replace(replace(PAPOConfig(eta2=0.1), gamma=1.0), eta2=0.0).masked_grad == "detached"
    assert replace(PAPOConfig(masked_grad="detached"), eta2=0.1).masked_grad == "detached"
    assert replace(PAPOConfig(masked_grad="entropy", eta2=0.1), eta2=0.0).masked_grad == "entropy"
    assert json.loads(json.dumps(asdict(PAPOConfig())))["masked_grad"] == "detached"


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


@pytest.mark.parametrize("name", TABLE_6)
def test_presets_are_table_6(name):
    c = PAPOConfig.preset(name)
    assert (
        c.gamma,
        c.eta1,
        c.eta2,
        c.beta,
        c.clip_low,
        c.clip_high,
        c.aggregation,
        c.dynamic_sampling,
        c.patch_size,
    ) == TABLE_6[name]
    shared = dict(
        mask_ratio=0.6,
        group_size=5,
        temperature=1.0,
        top_p=0.99,
        prompts_per_batch=384,
        updates_per_batch=3,
        learning_rate=1e-6,
        weight_decay=0.01,
        max_grad_norm=1.0,
        clip_dual=3.0,
        max_new_tokens=2048,
        format_weight=0.1,
        max_redraws=20,
    )
    assert {field: getattr(c, field) for field in shared} == shared
    assert c.masked_grad == ("entropy" if c.eta2 else "detached")


def test_preset_changes_and_unknown_names():
    changed = PAPOConfig.preset("papo-d-3b", gamma=0.5, group_size=8, top_p=0.5)
    assert (changed.gamma, changed.group_size, changed.top_p, changed.beta) == (0.5, 8, 0.5, 0.0)
    with pytest.raises(ValueError, match="unknown preset 'ppo', choose from .*papo-g-3b"):
        PAPOConfig.preset("ppo")
    with pytest.raises(ValueError, match="gamma"):
        PAPOConfig.preset("grpo", gamma=-1)


# --- the header --------------------------------------------------------------------------------------------------------


def test_glossary_names_exist():
    """Each code name of the header's glossary is a config field, a parameter or a field of papo.py; each name in the way of
    the data is a function; each masked_grad of the gradient table is accepted."""
    header = papo.__doc__
    parameters = {
        name
        for f in vars(papo).values()
        if callable(f) and hasattr(f, "__code__") and f.__module__ == "papo"
        for name in f.__code__.co_varnames
    }
    known = parameters | set(PAPOConfig.__dataclass_fields__) | set(papo.Group.__dataclass_fields__)
    lines = header.split("GLOSSARY")[1].split("\n\n")[0].splitlines()[1:]
    while "symbol" not in lines[0]:  # the shapes' letters come first
        lines.pop(0)
    column = lines[0].index("symbol")
    names = [name for line in lines[1:] for name in re.findall(r"\w+", line[:column])]
    names += re.findall(r"(\w+): (?:H\[pi_mask\]|c\b)", header)
    assert {"logps", "masked_logps", "masked_entropy", "clip_dual", "gamma", "eta2"} <= set(names) and len(
        names
    ) >= 16
    assert not set(names) - known
    way = header.split("THE WAY OF THE DATA")[1].split("\n\n")[0]
    functions = re.findall(r"[a-z]+_[a-z_]+", way)
    assert len(functions) >= 7 and all(callable(getattr(papo, name)) for name in functions)
    for mode in re.findall(r'^    "(\w+)"', header.split("WHAT CARRIES GRADIENT")[1].split("\n\n")[0], re.M):
        PAPOConfig(masked_grad=mode)


# --- gated -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pi, pi_mask, advantage, paid",
    [
        (0.8, 0.2, 1.5, True),
        (0.2, 0.8, 1.5, False),  # the picture speaks against the token
        (0.8, 0.2, -0.5, False),  # a worse response
        (0.8, 0.2, 0.0, False),  # equal rewards
        (0.5, 0.5, 1.0, False),
    ],
)
def test_perception_gate_by_hand(pi, pi_mask, advantage, paid):
    """Open where A > 0 and pi > pi_mask, and nowhere else."""
    gate = papo.perception_gate(f64([pi]).log(), f64([pi_mask]).log(), f64(advantage))
    assert gate.tolist() == [[paid]]


@pytest.mark.parametrize("gamma", [0.3, 3.0, 1000.0])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_a_gated_kl_pushes_no_token_against_its_advantage(gamma, aggregation):
    """At ratio 1 a token's push is A + gamma max(0, 1 - pi_mask/pi) where A > 0, else A alone; without the gate some turn."""
    inputs = random_inputs(3, exact=True)
    counts = MASK.sum(1)
    share = {"sequence": 1 / (counts * B)[:, None], "token": 1 / counts.sum()}[aggregation] * MASK

    def push(**settings):
        inputs["logps"] = inputs["old_logps"].clone().requires_grad_()
        config = PAPOConfig(beta=0.0, aggregation=aggregation, **settings)
        papo_loss(config, **inputs)[0].backward()
        return -inputs["logps"].grad

    pushes = push(gamma=gamma, gated=True)
    for i, t in itertools.product(range(B), range(T)):
        A, own, masked = (inputs[name][i].tolist() for name in ("advantages", "logps", "masked_logps"))
        pay = gamma * max(0.0, 1 - math.exp(masked[t] - own[t])) if A > 0 else 0.0
        assert pushes[i, t].item() == pytest.approx((A + pay) * share.expand(B, T)[i, t].item(), rel=1e-9)
    assert ((push(gamma=1000.0) * inputs["advantages"][:, None] * MASK) < 0).any()


def test_a_gated_kl_needs_no_masked_pass_where_nothing_is_paid():
    """Without a positive advantage the loss is GRPO's, and no masked log-prob is asked for."""
    inputs = random_inputs(3, exact=True)
    del inputs["masked_logps"], inputs["masked_entropy"]
    config = PAPOConfig(gamma=3.0, gated=True)
    with pytest.raises(ValueError, match="needs masked_logps"):
        papo_loss(config, **inputs)
    inputs["advantages"] = -inputs["advantages"].abs()
    close(papo_loss(config, **inputs)[0], papo_loss(PAPOConfig(gamma=0.0), **inputs)[0], 0)


def test_the_worked_numbers_in_docstrings_are_true():
    """Each >>> of papo.py prints what stands below it."""
    result = doctest.testmod(papo)
    assert result.failed == 0 and result.attempted >= 7
