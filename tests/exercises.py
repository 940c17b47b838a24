"""The graders of walkthrough.ipynb. `check(name, function)` says in words what the function gets wrong.

Where the function is one of papo.py's own, it is put in papo's place and the project's tests of that section run against it.
Where papo.py has no such function, the tests are below: each takes the function and its docstring says what must hold."""

import importlib
import inspect
import itertools
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [
    str(folder)
    for folder in (Path(__file__).parent, Path(__file__).parent.parent)
    if str(folder) not in sys.path
]

import papo
from papo import PAPOConfig, papo_loss

# ---------------------------------------------------------------------------------------------------------------------
# Tests of functions that papo.py does not have
# ---------------------------------------------------------------------------------------------------------------------


def close(result, expected, message=None):
    torch.testing.assert_close(
        result,
        torch.as_tensor(expected, dtype=result.dtype),
        rtol=1e-4,
        atol=1e-4,
        msg=message and (lambda text: f"{message}\n{text}"),
    )


def grey(value=128, width=70, height=56):
    return Image.new("RGB", (width, height), (value,) * 3)


def noise_keeps_the_shape(noise_image):
    """The result is a new RGB image of the same size, and the given image stays as it was"""
    image = grey().convert("L")
    before = image.tobytes()
    noisy = noise_image(image, 0.3, torch.Generator().manual_seed(0))
    assert (noisy.size, noisy.mode) == (image.size, "RGB"), f"got size {noisy.size} and mode {noisy.mode}"
    assert image.tobytes() == before, "the given image was changed"


def noise_has_its_strength(noise_image):
    """On mid-grey the noise has mean 0 and standard deviation sigma * 255"""
    for sigma in (0.0, 0.05, 0.15):
        change = np.asarray(noise_image(grey(), sigma, torch.Generator().manual_seed(1))).astype(float) - 128
        assert abs(change.mean()) < 1 + 3 * sigma, (
            f"sigma {sigma}: the mean of the noise is {change.mean():.1f}"
        )
        assert abs(change.std() - 255 * sigma) < 1, (
            f"sigma {sigma}: standard deviation {change.std():.1f}, not {255 * sigma:.1f}"
        )


def noise_does_not_wrap(noise_image):
    """Values stay within 0 and 255: a white pixel cannot turn black by running over"""
    for value in (0, 255):
        change = np.abs(
            np.asarray(noise_image(grey(value), 0.1, torch.Generator().manual_seed(2))).astype(float) - value
        )
        assert change.max() < 200, (
            f"a pixel of value {value} moved by {change.max():.0f}, with sigma * 255 = 25.5"
        )
        assert change.max() > 10, f"pixels of value {value} got no noise"


def noise_is_independent(noise_image):
    """Each pixel and each colour channel gets noise of its own, drawn from the generator"""
    draw = lambda seed: (
        np.asarray(noise_image(grey(), 0.1, torch.Generator().manual_seed(seed))).astype(float) - 128
    )
    noise = draw(3)
    for axis, what in enumerate(("rows", "columns", "channels")):
        assert noise.std(axis=axis).mean() > 10, f"the noise repeats along the {what}"
    assert (draw(3) == noise).all(), "the same generator seed gave two different images"
    assert (draw(4) != noise).any(), "two generator seeds gave the same image"


def distributions(seed=0, B=3, T=4, V=7):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: (2 * torch.randn(B, T, V, generator=generator, dtype=torch.float64)).log_softmax(
        -1
    )  # (B, T, V)
    return draw(), draw()


def kl_has_its_value(exact_kl):
    """At each position the value is the sum over the vocabulary of pi (log pi - log pi_mask), shape (B, T)"""
    log_pi, log_mask = distributions()
    Categorical = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(Categorical(logits=log_pi), Categorical(logits=log_mask))
    result = exact_kl(log_pi, log_mask)
    assert result.shape == expected.shape, f"shape {tuple(result.shape)}, not {tuple(expected.shape)}"
    close(result, expected)


def kl_descends_itself(exact_kl):
    """Its gradient in log pi is that of KL[pi || pi_mask] itself, which k3's is not"""
    log_pi, log_mask = distributions(1)
    logits = log_pi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_kl(logits.log_softmax(-1), log_mask).sum(), logits)
    pi, gap = log_pi.exp(), log_pi - log_mask
    close(gradient, pi * (gap - (pi * gap).sum(-1, keepdim=True)))


def kl_holds_the_mask_constant(exact_kl):
    """No gradient reaches pi_mask: it is a constant, as with masked_grad="detached\""""
    log_pi, log_mask = (x.requires_grad_() for x in distributions(2))
    exact_kl(log_pi, log_mask).sum().backward()
    assert log_pi.grad is not None and log_mask.grad is None or not log_mask.grad.any(), (
        "pi_mask got a gradient"
    )


def token_tensors():
    generator = torch.Generator().manual_seed(0)
    logps, masked_logps = -torch.rand(2, 4, generator=generator), -torch.rand(2, 4, generator=generator)
    masked_logps[0, 0], masked_logps[0, 1], masked_logps[1, 2] = (
        logps[0, 0] - 2.0,
        logps[0, 1] + 2.0,
        logps[1, 2] - 0.6,
    )
    masked_logps[1, 0] = logps[1, 0] - 0.4
    entropy = 1 + torch.rand(2, 4, generator=generator)
    return (
        entropy,
        logps,
        masked_logps,
        torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0]]),
    )  # the last: where the image is worth > 1/2


def tokens_are_chosen(vision_entropy):
    """H stays where log pi - log pi_mask exceeds the threshold, and is 0 elsewhere, also where the image makes the token LESS likely"""
    entropy, logps, masked_logps, chosen = token_tensors()
    logps = logps.clone()
    logps[0, 2:], logps[1, 1], logps[1, 3] = masked_logps[0, 2:], masked_logps[1, 1], masked_logps[1, 3]
    close(vision_entropy(entropy, logps, masked_logps, 0.5), entropy * chosen)
    close(
        vision_entropy(entropy, logps, masked_logps, 0.3),
        entropy * (chosen + torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]])),
        "with a threshold of 0.3 one more token is to be chosen",
    )


def only_entropy_gets_gradient(vision_entropy):
    """In papo_loss with eta1 = 1 the gradient reaches the entropy of chosen tokens, and nothing through the choice itself"""
    entropy, logps, masked_logps, _ = (x.clone().requires_grad_() for x in token_tensors())
    with torch.no_grad():
        chosen = (logps - masked_logps > 0.5).float()
    bonus = vision_entropy(entropy, logps, masked_logps, 0.5)
    zeros, ones = torch.zeros(2, 4), torch.ones(2, 4)
    papo_loss(PAPOConfig(gamma=0, beta=0, eta1=1.0), zeros, zeros, torch.zeros(2), ones, entropy=bonus)[
        0
    ].backward()
    assert entropy.grad is not None, "the entropy got no gradient"
    close(entropy.grad, chosen / 8, "gradient in the entropy")
    for name, x in (("logps", logps), ("masked_logps", masked_logps)):
        assert x.grad is None or not x.grad.any(), f"{name} got a gradient"


def padding_stays_out(vision_entropy):
    """Where both log-probs are equal, as on padding, nothing is chosen, even if the entropy there is nan"""
    entropy = torch.tensor([[1.0, float("nan")]])
    close(
        vision_entropy(entropy, torch.tensor([[-0.1, 0.0]]), torch.tensor([[-3.0, 0.0]]), 0.5), [[1.0, 0.0]]
    )


def baseline_leaves_one_out(leave_one_out):
    """A_i is R_i minus the mean of the OTHER rewards: [1, 0, 0, 0] gives [1, -1/3, -1/3, -1/3]"""
    close(leave_one_out(torch.tensor([1.0, 0, 0, 0])), [1, -1 / 3, -1 / 3, -1 / 3])
    close(leave_one_out(torch.tensor([3.0, 1.0])), [2.0, -2.0])


def baseline_keeps_the_scale(leave_one_out):
    """Nothing divides by the standard deviation: rewards ten times as large give advantages ten times as large"""
    rewards = torch.tensor([0.9, 0.1, 1.0, 0.0, 0.1])
    close(leave_one_out(10 * rewards), 10 * leave_one_out(rewards))


def baseline_per_group(leave_one_out):
    """Several groups at once, (n, G) -> (n, G), each on its own; a group of equal rewards gives 0"""
    rewards = torch.tensor([[1.0, 0, 0], [0.1, 0.1, 0.1], [0, 1, 1]])
    close(leave_one_out(rewards), [[1, -0.5, -0.5], [0, 0, 0], [-1, 0.5, 0.5]])


def weights_are_weights(kl_weights):
    """One finite weight of 0 or more per token, (B, T), not all of them 0"""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        logps, masked_logps = (
            -3 * torch.rand(2, 5, generator=generator),
            -3 * torch.rand(2, 5, generator=generator),
        )
        weights = torch.as_tensor(kl_weights(logps, masked_logps, torch.rand(2, 5, generator=generator)))
        assert weights.shape == (2, 5), f"shape {tuple(weights.shape)}, not (2, 5)"
        assert weights.isfinite().all() and (weights >= 0).all(), "a weight is negative or not finite"
        assert weights.float().sum() > 0, "all weights are 0: the term is switched off"


def weights_are_constant(kl_weights):
    """The choice of tokens is not differentiated: else the policy is paid for shifting weight instead of for looking"""
    inputs = [
        (-3 * torch.rand(2, 5, generator=torch.Generator().manual_seed(seed))).requires_grad_()
        for seed in range(3)
    ]
    weights = torch.as_tensor(kl_weights(*inputs))
    assert not weights.requires_grad, "the weights carry gradient; use .detach()"


# ---------------------------------------------------------------------------------------------------------------------
# What is graded by what
# ---------------------------------------------------------------------------------------------------------------------

two = torch.zeros(2, 3)
EXERCISES = {  # name: (what papo.py calls it, or None; tests; a call that shows whether it is solved)
    "advantages": (
        "group_advantages",
        [
            "test_loss.test_group_advantages_by_hand_and_numpy",
            "test_loss.test_a_group_of_equal_rewards_is_exactly_zero",
        ],
        lambda f: f([1.0, 0.0]),
    ),
    "clip": (
        "clipped_policy_loss",
        ["test_loss.test_clipped_policy_loss_by_hand", "test_loss.test_policy_log_ratio_is_clamped_to_20"],
        lambda f: f(two, two, torch.ones(2), 0.2, 0.3, 3.0),
    ),
    "mask": (
        "mask_patches",
        [
            "test_masking.test_cells_are_black_or_untouched",
            "test_masking.test_ratio_is_the_probability_of_black",
            "test_masking.test_the_generator_decides",
        ],
        lambda f: f(grey(), 0.6, 14, torch.Generator()),
    ),
    "k3": (
        "kl_k3",
        [
            "test_loss.test_k3_value_clamps_and_gradient",
            "test_loss.test_k3_is_unbiased_and_the_printed_one_is_not",
            "test_loss.test_expected_gradients_at_fixed_samples",
        ],
        lambda f: f(two, two),
    ),
    "noise": (
        None,
        [noise_keeps_the_shape, noise_has_its_strength, noise_does_not_wrap, noise_is_independent],
        lambda f: f(grey(), 0.1, torch.Generator()),
    ),
    "exact KL": (
        None,
        [kl_has_its_value, kl_descends_itself, kl_holds_the_mask_constant],
        lambda f: f(*distributions()),
    ),
    "vision entropy": (
        None,
        [tokens_are_chosen, only_entropy_gets_gradient, padding_stays_out],
        lambda f: f(*token_tensors()[:3], 0.5),
    ),
    "leave one out": (
        None,
        [baseline_leaves_one_out, baseline_keeps_the_scale, baseline_per_group],
        lambda f: f(torch.tensor([1.0, 0.0])),
    ),
    "KL weights": (None, [weights_are_weights, weights_are_constant], lambda f: f(two, two, two)),
}


@contextmanager
def swapped(name, function, *modules):
    """`function` in the place of papo's `name`, in every given module that has it; put back afterwards."""
    kept = [(module, getattr(module, name)) for module in modules if hasattr(module, name)]
    for module, _ in kept:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, original in kept:
            setattr(module, name, original)


def cases(test):
    """The keyword arguments of every case of a parametrized pytest test."""
    tables = []
    for mark in getattr(test, "pytestmark", []):
        names = [name.strip() for name in mark.args[0].split(",")]
        tables.append([dict(zip(names, values if len(names) > 1 else [values])) for values in mark.args[1]])
    return [
        {name: value for part in parts for name, value in part.items()}
        for parts in itertools.product(*tables)
    ]


def what_failed(test, case, error):
    """One sentence on what should hold, then the case and the reason."""
    promise = " ".join(inspect.getdoc(test).split()).rstrip(".:")
    reason = " ".join(str(error).split())[:200]
    if (
        isinstance(error, AssertionError) and len(reason) < 15
    ):  # a bare assert: its own line says what does not hold
        line = next(
            f.line
            for f in reversed(traceback.extract_tb(error.__traceback__))
            if f.filename == inspect.getfile(test)
        )
        reason = (
            f"this does not hold: {line.removeprefix('assert ').split('  #')[0]}{reason and ' at ' + reason}"
        )
    elif not isinstance(error, AssertionError):
        reason = f"{type(error).__name__}: {reason}"
    where = ", ".join(f"{name} = {value}" for name, value in case.items())
    return f"{promise}.\n      {where + ': ' if where else ''}{reason}"


def check(name, function):
    """Grade a solution of exercise `name` and print the verdict. True: solved, False: wrong, None: not solved yet."""
    replaces, tests, probe = EXERCISES[name]
    try:
        result = probe(function)
        if result is None or result is ...:
            raise NotImplementedError
    except NotImplementedError:
        print(f"{name}: not solved yet.")
        return None
    except Exception:  # it is solved, if wrongly: the tests below say how
        pass
    failures, count = [], 0
    for test in tests:
        module = sys.modules[__name__]
        if isinstance(test, str):
            module, test = importlib.import_module(test.split(".")[0]), test.split(".")[1]
            test = getattr(module, test)
        for case in cases(test):
            count += 1
            try:
                if replaces is None:
                    test(function)
                else:
                    with swapped(replaces, function, papo, module):
                        test(**case)
            except Exception as error:
                failures.append((test, what_failed(test, case, error)))
    if not failures:
        print(f"{name}: right. All {count} checks pass.")
        return True
    print(f"{name}: {len(failures)} of {count} checks fail.")
    shown = []
    for test, text in failures:
        if shown.count(test) < 2:  # two cases of one test are enough
            print(f"  - {text}")
        shown.append(test)
    return False
