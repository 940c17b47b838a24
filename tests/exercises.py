"""The graders of walkthrough.ipynb. `check(name, answer)` says what was given and what was expected.

A check is a function whose docstring says what must hold; it raises Wrong with the first that does
not."""

import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import tensor

folders = [str(folder) for folder in Path(__file__).resolve().parents[:2]]
sys.path[:0] = [folder for folder in folders if folder not in sys.path]

from papo import PAPOConfig, papo_loss


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Wrong(Exception):
    """What an answer gets wrong, in words for the student."""


def require(holds, words):
    if not holds:
        raise Wrong(words)


def show(x):
    """A number, or up to eight of them, with four digits."""
    x = torch.as_tensor(x, dtype=torch.float64)
    return f"{x.item():.4g}" if x.dim() == 0 else "[" + ", ".join(map(show, x)) + "]"


def expect(what, given, expected, rtol=1e-4, atol=1e-6):
    """Same shape, same numbers; else Wrong, with both. nan is never expected."""
    try:
        given = torch.as_tensor(given).detach().double()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"{what}: you gave {given!r}, expected numbers") from None
    expected = torch.as_tensor(expected).detach().double()
    words = f"you gave shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    require(given.shape == expected.shape, f"{what}: {words}")
    wrong = ~torch.isclose(given, expected, rtol=rtol, atol=atol)
    if wrong.any():
        if given.numel() == 1:
            given, expected = given.squeeze(), expected.squeeze()
        if given.numel() > 8:  # the first wrong one
            place = tuple(wrong.nonzero()[0].tolist())
            what, given, expected = f"{what}, at {place}", given[place], expected[place]
        raise Wrong(f"{what}: you gave {show(given)}, expected {show(expected)}")


# --- 0. A prediction ------------------------------------------------------------------------------


def prediction_holds(answer):
    """Advantages of a group sum to 0 and have standard deviation 1"""
    choices, given = (("right", "wrong"), ("grows", "shrinks")), answer()
    valid = given in [(first, second) for first in choices[0] for second in choices[1]]
    require(valid, f"you gave {given!r}, expected one word of each: {choices}")
    words = "you gave 'wrong', expected 'right': advantages sum to 0, and 3 balance 5"
    require(given[0] == "right", f"further from 0: {words}")
    words = "you gave 'grows', expected 'shrinks': being right is then less of a surprise"
    require(given[1] == "shrinks", f"a fourth right one: {words}")


# --- 1 to 4. Functions that papo.py has: values by plain arithmetic -------------------------------


def standardised(rewards):
    """One group's advantages with Python floats."""
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (spread + 1e-6) for r in rewards]


def advantages_have_their_value(advantages):
    """Each reward minus the mean, over the unbiased standard deviation (G - 1) plus eps"""
    groups = [1.0] + [0.1] * 7, [0.9, 0.1, 1.0, 0.0], [1.0, 0.0], [3.0, -2.0, 10.0, 4.0, 4.0]
    for rewards in groups:
        expect(f"rewards {rewards}", advantages(tensor(rewards)), standardised(rewards))
    tiny = [0.0, 1e-6, 2e-6]
    what = f"rewards {tiny}, where eps counts"
    expect(what, advantages(tensor(tiny)), standardised(tiny), rtol=1e-2)


def advantages_per_group(advantages):
    """Several groups at once, (n, G) -> (n, G), each on its own"""
    rewards = [[1.0, 0.0, 0.5], [10.0, 30.0, 20.0]]
    expect(f"rewards {rewards}", advantages(tensor(rewards)), list(map(standardised, rewards)))


def equal_groups_teach_nothing(advantages):
    """A group of equal rewards is exactly 0: no rounding noise divided by a spread of nothing"""
    for reward in (0.0, 0.1, 0.3, 0.9, 1.0):
        for size in (2, 5, 7, 8):
            given = torch.as_tensor(advantages(torch.full((size,), reward)))
            words = f"{size} rewards of {reward}: you gave {show(given)}, expected exactly 0"
            require(given.shape == (size,) and (given == 0).all(), words)


def loss_by_hand(ratio, A, low, high, dual):
    """The clipped loss of one token with Python floats."""
    objective = min(ratio * A, min(max(ratio, 1 - low), 1 + high) * A)
    return -(max(objective, dual * A) if A < 0 else objective)


def clip_has_its_value(clipped_loss):
    """Minus the smaller of r A and clip(r) A, and for A < 0 at most c |A|"""
    for low, high, dual in ((0.2, 0.3, 3.0), (0.1, 0.5, 2.0), (0.2, 0.2, math.inf)):
        for A in (2.0, 1.0, -0.5, -1.0):
            for ratio in (0.3, 0.75, 0.95, 1.0, 1.1, 1.4, 2.5, 7.0):
                inputs = tensor([[math.log(ratio)]]), torch.zeros(1, 1), tensor([A])
                given = clipped_loss(*inputs, low, high, dual)
                what = f"ratio {ratio}, A {A:g}, eps_l {low}, eps_h {high}, c {dual:g}"
                expect(what, given, [[loss_by_hand(ratio, A, low, high, dual)]])


def clip_takes_a_batch(clipped_loss):
    """(B, T) log-probs and (B,) advantages give (B, T): one advantage for all tokens of a
    response"""
    logps = tensor([[-1.0, -2.0, -0.5], [-0.3, -1.5, -3.0]])
    old_logps = tensor([[-1.2, -1.0, -0.5], [-1.3, -1.5, -2.0]])
    given = clipped_loss(logps, old_logps, tensor([1.5, -1.0]), 0.2, 0.3, 3.0)
    ratios = (logps - old_logps).exp().tolist()
    hand = [[loss_by_hand(r, A, 0.2, 0.3, 3.0) for r in row] for A, row in zip((1.5, -1), ratios)]
    expect("two responses", given, hand)


def cells(before, after, size):
    """A boolean grid: which cells went black. Wrong where one is neither black nor untouched."""
    before, after = np.asarray(before.convert("RGB")), np.asarray(after)
    ys, xs = (np.arange(0, side, size) for side in before.shape[:2])
    count = lambda pixels: np.add.reduceat(np.add.reduceat(pixels.astype(int), ys, 0), xs, 1)
    black, changed = (after == 0).all(-1), (after != before).any(-1)
    share = count(black) / count(np.ones_like(black))
    for y, x in np.argwhere((share < 1) & (count(changed) > 0))[:1]:
        words = f"you blacked out {share[y, x]:.0%} of it, expected all or nothing"
        raise Wrong(f"the cell at pixel ({x * size}, {y * size}): {words}")
    return share == 1


def noisy(width=145, height=75):
    pixels = np.random.default_rng(0).integers(30, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw_masks(mask, ratio):
    """The grids of 200 masks of one noisy image, from one generator: (200, 6, 11), which is at the
    edges of less than 14 pixels."""
    image, generator = noisy(), seeded(0)
    return np.array([cells(image, mask(image, ratio, 14, generator), 14) for _ in range(200)])


def new_image(image, change):
    """change(image), which has to be a new RGB image of the same size."""
    before, given = image.tobytes(), change(image)
    what = f"{image.mode} image of {image.width} x {image.height}"
    words = f"you gave {given.mode} of {given.width} x {given.height}, expected RGB as large"
    require((given.size, given.mode) == (image.size, "RGB"), f"{what}: {words}")
    require(image.tobytes() == before, f"{what}: the given image was changed")
    return given


def masks_make_a_new_image(mask):
    """A new RGB image of the same size, whatever the mode of the given one, which stays as it
    was"""
    for size, patch in ((75, 50), 14), ((5, 9), 14), ((31, 1), 7):
        for mode in ("RGB", "L", "RGBA", "P"):
            image = noisy(*size).convert(mode)
            cells(image, new_image(image, lambda i: mask(i, 0.5, patch, seeded(0))), patch)


def masks_have_their_ratio(mask):
    """Each cell is black with probability `ratio`, those cut by the edge too: 1 blacks out
    everything"""
    for ratio in (0.0, 0.3, 0.6, 1.0):
        shares = draw_masks(mask, ratio).mean(0)  # of each cell over 200 masks
        found = {f"cell {(y, x)} of (6, 11)": shares[y, x] for y in (0, 2, 5) for x in (0, 4, 10)}
        for what, share in (found | {"all cells": shares.mean()}).items():
            flips = 200 * (shares.size if what == "all cells" else 1)
            near = abs(share - ratio) <= 4 * math.sqrt(ratio * (1 - ratio) / flips)
            words = f"ratio {ratio}, {what}: you blacked out {share:.1%} in 200 masks"
            require(near, f"{words}, expected about {ratio:.0%}")


def masks_are_coin_flips(mask):
    """Cells are independent: how many go black varies from mask to mask as for coin flips"""
    for ratio in (0.3, 0.6):
        counts = draw_masks(mask, ratio).sum((1, 2))  # of 66 cells
        spread, expected = counts.std(), math.sqrt(66 * ratio * (1 - ratio))
        words = f"66 cells, ratio {ratio}: the number you blacked out varies by {spread:.2f}"
        near = 0.8 * expected <= spread <= 1.2 * expected
        require(near, f"{words}, expected about {expected:.2f}")


def masks_come_from_the_generator(mask):
    """The same generator seed gives the same mask, another another; torch's own generator is not
    used"""
    draw = lambda seed: mask(grey(), 0.5, 14, seeded(seed)).tobytes()
    state = torch.get_rng_state()
    require(draw(1) == draw(1), "generator seed 1 twice: you gave two masks, expected the same")
    require(draw(1) != draw(2), "generator seeds 1 and 2: you gave the same mask, expected two")
    words = "you drew from torch's global generator, expected the given"
    require(torch.equal(torch.get_rng_state(), state), words)


def k3_has_its_value(k3):
    """x - log x - 1 with x = pi_other / pi, in [0, 10]"""
    for log_x in (-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0):
        given = k3(tensor([[-1.0]]), tensor([[-1.0 + log_x]]))
        expect(f"log pi -1, log pi_other {-1 + log_x:g}", given, [[math.expm1(log_x) - log_x]])


def k3_is_clamped(k3):
    """The log-ratio is clamped to +-20 and the value to 10"""
    for log_x, value in ((3.0, 10.0), (50.0, 10.0), (-8.0, math.expm1(-8.0) + 8), (-50.0, 10.0)):
        given = k3(tensor([[-1.0]]), tensor([[-1.0 + log_x]]))
        expect(f"log x = {log_x:g}", given, [[value]])


def k3_sees_small_differences(k3):
    """Nearly equal policies: in fp32 exp(x) - 1 drowns a small x in rounding, torch.expm1 does
    not"""
    for log_x in (1e-3, -1e-3, 1e-4, -3e-4):
        given = k3(torch.zeros(1, 1), tensor([[log_x]]))
        expected = [[log_x**2 / 2 + log_x**3 / 6]]
        expect(f"log x = {log_x:g}, in fp32", given, expected, rtol=0.02, atol=0)


def k3_has_its_gradient(k3):
    """Its derivative in log pi is 1 - x"""
    for log_x in (-2.0, -0.5, 0.7, 1.5):
        logps = torch.zeros(1, 1, requires_grad=True)
        (given,) = torch.autograd.grad(k3(logps, tensor([[log_x]])).sum(), logps)
        expect(f"log x = {log_x:g}, derivative in log pi", given, [[1 - math.exp(log_x)]])


# --- 5 to 9. Functions that papo.py does not have -------------------------------------------------


def grey(value=128):
    return Image.new("RGB", (70, 56), (value,) * 3)


def noise_of(noise_image, value, sigma, seed):
    """What noise_image adds to an image of one grey value."""
    return np.asarray(noise_image(grey(value), sigma, seeded(seed))).astype(float) - value


def noise_keeps_the_shape(noise_image):
    """The result is a new RGB image of the same size, and the given image stays as it was"""
    new_image(grey().convert("L"), lambda image: noise_image(image, 0.3, seeded(0)))


def noise_has_its_strength(noise_image):
    """On mid-grey the noise has mean 0 and standard deviation sigma * 255"""
    for sigma in (0.0, 0.05, 0.15):
        change = noise_of(noise_image, 128, sigma, 1)
        mean, spread, what = change.mean(), change.std(), f"sigma {sigma}: your noise has a"
        require(abs(mean) < 1 + 3 * sigma, f"{what} mean of {mean:.1f}, expected about 0")
        words = f"{what} standard deviation of {spread:.1f}, expected {255 * sigma:.1f}"
        require(abs(spread - 255 * sigma) < 1, words)


def noise_does_not_wrap(noise_image):
    """Values stay within 0 and 255: a white pixel cannot turn black by running over"""
    for value in (0, 255):
        most = np.abs(noise_of(noise_image, value, 0.1, 2)).max()
        words = f"pixels of {value}, sigma * 255 = 25.5: your largest change is {most:.0f}"
        require(10 < most < 200, f"{words}, expected between 10 and 200")


def noise_is_independent(noise_image):
    """Each pixel and each colour channel gets noise of its own, drawn from the generator"""
    noise, again, other = (noise_of(noise_image, 128, 0.1, seed) for seed in (3, 3, 4))
    for axis, what in enumerate(("rows", "columns", "channels")):
        spread = noise.std(axis=axis).mean()
        words = f"your noise repeats along the {what}: it varies by {spread:.1f} there"
        require(spread > 10, f"{words}, expected about 25.5")
    require((again == noise).all(), "seed 3 twice: you gave two images, expected the same")
    require((other != noise).any(), "seeds 3 and 4: you gave the same image, expected two")


def distributions(seed=0, B=1, T=2, V=4):
    logits = 2 * torch.randn(2, B, T, V, generator=seeded(seed), dtype=torch.float64)
    return tuple(logits.log_softmax(-1))  # (B, T, V), (B, T, V)


def kl_has_its_value(exact_kl):
    """Each position's value is the sum over the vocabulary of pi (log pi - log pi_mask), (B, T)"""
    log_pi, log_mask = distributions()
    both = [torch.distributions.Categorical(logits=logits) for logits in (log_pi, log_mask)]
    expected = torch.distributions.kl_divergence(*both)
    what = f"pi {show(log_pi.exp())}, pi_mask {show(log_mask.exp())}"
    expect(what, exact_kl(log_pi, log_mask), expected)


def kl_descends_itself(exact_kl):
    """Its gradient in log pi is that of KL[pi || pi_mask] itself, which k3's is not"""
    log_pi, log_mask = distributions(1)
    logits = log_pi.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_kl(logits.log_softmax(-1), log_mask).sum(), logits)
    pi, gap = log_pi.exp(), log_pi - log_mask
    expect("gradient in the logits of pi", gradient, pi * (gap - (pi * gap).sum(-1, keepdim=True)))


def kl_holds_the_mask_constant(exact_kl):
    """No gradient reaches pi_mask: it is a constant, as with masked_grad="detached\""""
    log_pi, log_mask = (x.requires_grad_() for x in distributions(2))
    exact_kl(log_pi, log_mask).sum().backward()
    if log_mask.grad is not None:
        expect("gradient in log pi_mask", log_mask.grad, torch.zeros_like(log_mask))


# log pi - log pi_mask of two responses
GAPS = tensor([[2.0, -2.0, 0.1, 0.0], [0.4, 0.0, 0.6, 0.2]])


def token_tensors():
    """entropy, logps, masked_logps, each (2, 4), with the gaps above."""
    masked_logps = tensor([[-3.0, -0.2, -1.0, -0.5], [-2.0, -0.1, -1.5, -0.7]])
    entropy = tensor([[1.1, 1.2, 1.3, 1.4], [1.5, 1.6, 1.7, 1.8]])
    return entropy, masked_logps + GAPS, masked_logps


def tokens_are_chosen(vision_entropy):
    """H stays where log pi - log pi_mask exceeds the threshold, and is 0 elsewhere, below 0 too"""
    entropy, logps, masked_logps = token_tensors()
    for threshold in (0.5, 0.3):
        what = f"threshold {threshold}, gaps {show(GAPS)}, entropies {show(entropy)}"
        given = vision_entropy(entropy, logps, masked_logps, threshold)
        expect(what, given, entropy * (GAPS > threshold))


def only_entropy_gets_gradient(vision_entropy):
    """In papo_loss with eta1 = 1 the gradient reaches the chosen entropies, nothing through the
    choice"""
    entropy, logps, masked_logps = (x.clone().requires_grad_() for x in token_tensors())
    bonus = vision_entropy(entropy, logps, masked_logps, 0.5)
    zeros, ones = torch.zeros(2, 4), torch.ones(2, 4)
    config = PAPOConfig(gamma=0, beta=0, eta1=1.0)
    papo_loss(config, zeros, zeros, torch.zeros(2), ones, entropy=bonus)[0].backward()
    expected = {"entropy": (GAPS > 0.5) / 8, "logps": zeros, "masked_logps": zeros}
    for (name, slope), x in zip(expected.items(), (entropy, logps, masked_logps)):
        expect(f"gradient in {name}", zeros if x.grad is None else x.grad, slope)


def padding_stays_out(vision_entropy):
    """Where log-probs are equal, as on padding, nothing is chosen, even if the entropy there is
    nan"""
    inputs = tensor([[1.0, math.nan]]), tensor([[-0.1, 0.0]]), tensor([[-3.0, 0.0]])
    given = vision_entropy(*inputs, 0.5)
    expect("gaps [2.9, 0], entropies [1, nan]", given, [[1.0, 0.0]])


def baseline_leaves_one_out(leave_one_out):
    """A_i is R_i minus the mean of the OTHER rewards"""
    for rewards, expected in (([1.0, 0, 0, 0], [1] + [-1 / 3] * 3), ([3.0, 1], [2, -2])):
        expect(f"rewards {rewards}", leave_one_out(tensor(rewards)), expected)


def baseline_keeps_the_scale(leave_one_out):
    """Nothing divides by the standard deviation: ten times the rewards give ten times the
    advantages"""
    expect("rewards [10, 0, 0]", leave_one_out(tensor([10.0, 0, 0])), [10, -5, -5])


def baseline_per_group(leave_one_out):
    """Several groups at once, (n, G) -> (n, G), each on its own; a group of equal rewards gives
    0"""
    rewards = [[1.0, 0, 0], [0.1, 0.1, 0.1], [0, 1, 1]]
    expected = [[1, -0.5, -0.5], [0, 0, 0], [-1, 0.5, 0.5]]
    expect(f"rewards {rewards}", leave_one_out(tensor(rewards)), expected)


def weights_are_weights(kl_weights):
    """One finite weight of 0 or more per token, (B, T); over all kinds of tokens not all of them
    0"""
    generator = seeded(0)
    masked_logps = -0.5 - 5 * torch.rand(20, 6, generator=generator)  # (B, T)
    gaps = (5 * torch.randn(20, 6, generator=generator)).clamp(max=-masked_logps - 0.01)  # (B, T)
    gaps[:, -1] = 0  # a token that owes nothing to the image
    entropy = 3 * torch.rand(20, 6, generator=generator)
    weights = torch.as_tensor(kl_weights(masked_logps + gaps, masked_logps, entropy)).float()
    words = f"you gave shape {tuple(weights.shape)}, expected (20, 6)"
    require(weights.shape == (20, 6), f"20 responses of 6 tokens: {words}")
    words = "you gave a weight that is not finite, expected a number for every token"
    require(weights.isfinite().all(), words)
    words = f"your smallest weight is {weights.min().item():.4g}, expected 0 or more"
    require((weights >= 0).all(), words)
    words = "you gave 0 for all of 120 different tokens: that switches the term off"
    require(weights.any(), words)


# --- What is graded by what -----------------------------------------------------------------------


EXERCISES = {
    "prediction": [prediction_holds],
    "advantages": [advantages_have_their_value, advantages_per_group, equal_groups_teach_nothing],
    "clip": [clip_has_its_value, clip_takes_a_batch],
    "mask": [masks_make_a_new_image, masks_have_their_ratio, masks_are_coin_flips,
             masks_come_from_the_generator],
    "k3": [k3_has_its_value, k3_is_clamped, k3_sees_small_differences, k3_has_its_gradient],
    "noise": [noise_keeps_the_shape, noise_has_its_strength, noise_does_not_wrap,
              noise_is_independent],
    "exact KL": [kl_has_its_value, kl_descends_itself, kl_holds_the_mask_constant],
    "vision entropy": [tokens_are_chosen, only_entropy_gets_gradient, padding_stays_out],
    "leave one out": [baseline_leaves_one_out, baseline_keeps_the_scale, baseline_per_group],
    "KL weights": [weights_are_weights],
}  # fmt: skip


class NotSolved(Exception):
    """The student's function returns nothing yet."""


def check(name, answer):
    """Grade an answer to exercise `name`, print the verdict. True: solved, False: wrong, None: not
    yet."""

    def solved(*inputs, **settings):
        given = answer(*inputs, **settings) if callable(answer) else answer
        if given is None or given is ... or isinstance(given, tuple) and ... in given:
            raise NotSolved
        return given

    failures = []
    for test in EXERCISES[name]:
        try:
            test(solved)
        except (NotSolved, NotImplementedError):
            print(f"{name}: not solved yet.")
            return None
        except Wrong as wrong:
            failures.append((test, str(wrong)))
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            failures.append((test, f"your function stops with {type(error).__name__}: {reason}"))
    if not failures:
        print(f"{name}: right.")
        return True
    print(f"{name}: {len(failures)} of {len(EXERCISES[name])} checks fail.")
    for test, words in failures:
        print(f"  - {' '.join(test.__doc__.split())}.\n      {words}")
    return False
