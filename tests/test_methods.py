"""study/methods.py: each objective on a batch of 3 x 4 in plain numbers, token by token, beside the
same sum with one rule broken; and what each of them asks of a real model."""

import math
from functools import partial
from statistics import mean
from types import SimpleNamespace

import pytest
import torch
from conftest import random_responses, two_prompts

import papo
from papo import PAPOConfig, Row, group_logps, papo_loss
from study import methods

LENGTHS, ADVANTAGES = [4, 3, 2], [1.2, -0.9, 0.3]
MASK = torch.tensor([[float(t < n) for t in range(4)] for n in LENGTHS])
CONFIG = PAPOConfig.preset("dapo", clip_dual=1.4)
PI, VIEW, NOISE = ([[-x / 10 for x in row] for row in rows] for rows in (
    [[3, 12, 7, 20], [9, 2, 15], [11, 4]],
    [[8, 30, 7, 21], [40, 5, 16], [12, 25]],
    [[4, 16, 9, 19], [8, 3, 28], [30, 6]],
))  # fmt: skip
RATIO = [[1.0, 1.5, 0.7, 1.1], [0.6, 1.6, 1.2], [1.4, 0.9]]  # on both sides of both clips
OLD = [[p - math.log(r) for p, r in zip(*rows)] for rows in zip(PI, RATIO)]
k3 = lambda p, other: math.exp(other - p) - (other - p) - 1
scaled = lambda xs: [(x - min(xs)) / (max(xs) - min(xs) or 1) for x in xs]  # minmax


def batch(rows, padding=0.0):
    fill = lambda row: row + [padding] * (4 - len(row))
    return torch.tensor([fill(row) for row in rows], dtype=torch.float64)


def L(i, t, factor=1.0):
    """The clipped policy loss of a token whose advantage is multiplied."""
    r, A = RATIO[i][t], ADVANTAGES[i] * factor
    loss = -min(r * A, min(max(r, 0.8), 1.28) * A)
    return min(loss, -1.4 * A) if A < 0 else loss


tokens = [(i, t) for i, n in enumerate(LENGTHS) for t in range(n)]
over_all = lambda weights: sum(weights[i][t] * L(i, t) for i, t in tokens) / 9
best = lambda xs, count: sorted(range(len(xs)), key=lambda t: -xs[t])[:count]


def check(loss, hand, *broken, **more):
    """The loss is the sum by hand, whatever stands on the padding, and is not one with a broken
    rule."""
    more = {"row": None, **more}
    for padding in (0.0, 5.0):
        given = dict(logps=batch(PI, padding), old_logps=batch(OLD, -padding))
        given |= dict(advantages=torch.tensor(ADVANTAGES, dtype=torch.float64), response_mask=MASK)
        if "masked_logps" not in more:
            given["masked_logps"] = batch(VIEW, 2 * padding)
        found, metrics = loss(CONFIG, **given, **more)
        assert [found.item(), metrics["loss"]] == pytest.approx([hand] * 2, rel=1e-6)
    assert all(abs(other - hand) > 1e-3 for other in broken)


def test_vppo():
    def hand(share=0.4, floor=0.9, bonus=0.06):
        owed = [[k3(*pair) for pair in zip(*rows)] for rows in zip(PI, VIEW)]
        means = list(map(mean, owed))
        above = [m - min(means) for m in means]
        total = -bonus * sum(map(sum, PI))
        for i, n in enumerate(LENGTHS):
            factor = floor + (1 - floor) * above[i] / mean(above)
            total += sum(L(i, t, factor) for t in best(owed[i], math.ceil(share * n)))
        return total / 9

    check(methods.vppo_loss, hand(), hand(share=1), hand(floor=1), hand(bonus=-0.06))
    check(partial(methods.vppo_loss, weight=0.6), hand(share=0.6), hand())


@pytest.mark.parametrize("dev", [False, True])
def test_pgpo(dev):
    def hand(dev=dev, boost=2, log=math.log1p):
        weights = []
        for n, *rows in zip(LENGTHS, PI, VIEW):
            index = scaled([log(k3(*pair)) for pair in zip(*rows)])
            tau = sorted(index)[math.floor(0.4 * n)] if dev else 0.4
            above = lambda x, tau=tau: 1 + boost * (x - tau) / (1 - tau or 1)
            w = [x / tau if x < tau else above(x) for x in index]
            total = sum(w)
            weights.append([max(x, 0.1) for x in w] if dev else [x * n / total for x in w])
        return over_all(weights)

    loss = partial(methods.pgpo_loss, dev=dev)
    check(loss, hand(), hand(dev=not dev), hand(boost=0), hand(log=float))
    check(partial(loss, weight=6.0), hand(boost=6), hand())


def test_pgpo_where_no_token_depends_on_the_image():
    """All weights 1: DAPO."""
    alike = dict(
        logps=batch(PI),
        old_logps=batch(OLD),
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64),
    )
    alike |= dict(response_mask=MASK, masked_logps=batch(PI), row=None)
    assert methods.pgpo_loss(CONFIG, **alike)[0].item() == pytest.approx(over_all([[1] * 4] * 3))


def test_vgpo():
    """Image states of mean (1, 0), tokens' states at angles: a cosine is that of the angle."""
    angles = [[0.3, 1.4, 1.0, 0.6], [1.1, 0.2, 0.8], [0.5, 1.3]]
    states = [[5.0, 1], [1, 1], [1, -1], [-3, 2]]  # <|vision_start|>, image, image, text
    states += [[k * math.cos(a), k * math.sin(a)] for row in angles for k, a in enumerate(row, 1)]
    model = SimpleNamespace(config=SimpleNamespace(image_token_id=9))
    responses = [torch.zeros(n) for n in LENGTHS]
    row = Row(
        model, {"input_ids": torch.tensor([[8, 9, 9, 1]])}, responses, torch.tensor(states), 0
    )

    def hand(boost=0.3, half=2, low=0.9):
        c = [math.cos(a) for row in angles for a in row]
        focus = []
        for n, row in zip(LENGTHS, angles):
            w = [(math.cos(a) - min(c)) / (max(c) - min(c)) for a in row]
            late = list(range(n // half, n))
            gate = [late[k] for k in best([w[t] for t in late], max(1, int(0.2 * len(late))))]
            w = [x * (1 + boost * (t in gate) * t / (n - 1)) for t, x in enumerate(w)]
            focus.append(scaled(w))
        share = scaled(list(map(sum, focus)))
        clamp = lambda x, low: min(max(x, low), 2)
        psi = [[clamp(1 + v - mean(row), 0.1) for v in row] for row in focus]
        alpha = [clamp(1 + p - mean(share), low) for p in share]
        return over_all([[a * x for x in row] for a, row in zip(alpha, psi)])

    check(methods.vgpo_loss, hand(), hand(boost=0), hand(half=5), hand(low=0), row=row)
    check(partial(methods.vgpo_loss, weight=3.0), hand(boost=3), hand(), row=row)


def test_dvrp(monkeypatch):
    def hand(mask=-0.01, noise=0.01):
        both = zip(PI, VIEW, NOISE)
        kls = [(k3(p, v), k3(p, n)) for rows in both for p, v, n in zip(*rows)]
        return over_all([[1] * 4] * 3) + sum(mask * v + noise * n for v, n in kls) / 9

    steps, row = [], SimpleNamespace(model=0, prompt=0, responses=0)
    monkeypatch.setattr(methods, "group_logps", lambda *_: (batch(NOISE),))
    monkeypatch.setattr(methods, "diffused", lambda prompt, t: steps.append(t))
    for progress in (0, 0.5, 1):
        loss = partial(methods.dvrp_loss, progress=progress)
        check(loss, hand(), hand(noise=0), hand(mask=0.01, noise=-0.01), row=row)
    assert steps[::2] == [496, 250, 3]
    check(partial(loss, weight=0.3), hand(-0.3, 0.3), hand(), row=row)


def test_diffusion_noise(one_vlm, monkeypatch):
    """From the model's own pixels and back: no step in a row changes more than the formula says."""
    prompt = two_prompts(one_vlm[1])[0]
    times = methods.diffused(prompt, 400)["pixel_values"].view(-1, 3, 2, 196)
    assert torch.equal(times[:, :, 0], times[:, :, 1])
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    kept = math.prod(
        1 - (4.99e-3 / (1 + math.exp(6 - 12 * i / 999)) + 1e-5) for i in range(401)
    )  # 400 of 0 .. 999, and the first
    noisy = methods.diffused(prompt, 400)["pixel_values"]
    x, y = (v.view(len(v), 3, -1)[:, 1] for v in (prompt["pixel_values"], noisy))  # green
    level = lambda v: 0.26130258 * v + 0.4578275
    expected = (math.sqrt(kept) * level(x) + math.sqrt(1 - kept) * 0.5).clamp(0, 1)
    torch.testing.assert_close(level(y), expected, rtol=0, atol=1e-5)
    assert (x - y).abs().mean() > 0.1


def test_vepo(monkeypatch):
    """The states are the logits of a vocabulary of three."""
    config, entropies = PAPOConfig.preset("dapo", clip_dual=1.4), batch(VIEW).abs()
    logits = [
        torch.randn(9, 3, generator=torch.Generator().manual_seed(k)).double() for k in (1, 2)
    ]
    model = SimpleNamespace(get_output_embeddings=lambda: torch.nn.Identity())
    prompt = {"pixel_values": torch.zeros(2, 2)}
    rows = [Row(model, prompt, [torch.zeros(n) for n in LENGTHS], x, range(9)) for x in logits]
    monkeypatch.setattr(methods, "group_logps", lambda *_, with_row: (rows[1],))
    monkeypatch.setattr(methods, "HEAD_CHUNK", 4)

    def hand(share=0.2, alpha=0.7, gap=abs, bonus=0.001):
        flat = []
        for p, q in zip(*(x.softmax(1).tolist() for x in logits)):
            H = lambda p: -sum(x * math.log(x) for x in p)
            flat.append((H([(a + b) / 2 for a, b in zip(p, q)]) - (H(p) + H(q)) / 2, H(p), H(q)))
        chosen, total = [], 0
        for i, n in enumerate(LENGTHS):
            own, flat = flat[:n], flat[n:]
            j, h, e = map(scaled, zip(*((d, p, gap(q - p)) for d, p, q in own)))
            score = [
                (1 - (1 - a) ** alpha * (1 - c) ** (1 - alpha)) * b for a, b, c in zip(j, h, e)
            ]
            chosen += [(i, t) for t in best(score, math.ceil(share * n))]
        total = sum(sum(row[:n]) for row, n in zip(entropies.tolist(), LENGTHS)) / 9
        return mean(L(i, t) for i, t in chosen) - bonus * total

    given = dict(entropy=entropies, row=rows[0])
    wrong = hand(share=0.5), hand(alpha=0), hand(gap=float), hand(bonus=-1)
    loss = lambda _, **given: methods.vepo_loss(config, **given)
    check(loss, hand(), *wrong[:1], *wrong[3:], **given)
    check(partial(loss, weight=0.5), hand(share=0.5), hand(), **given)
    assert len({round(x, 9) for x in (hand(), *wrong)}) > 3


def test_the_push_asks_nothing_of_the_image():
    """GRPO's loss minus weight times the mean log pi of the responses with A > 0, padding aside."""
    given = dict(old_logps=batch(OLD), advantages=torch.tensor(ADVANTAGES, dtype=torch.float64))
    given |= dict(logps=batch(PI), response_mask=MASK)
    grpo, _ = papo_loss(PAPOConfig(gamma=0.0, beta=0.0), **given)
    for other, weight in ((VIEW, 10.0), (PI, 3.0)):
        wanted = grpo.item() - weight * (mean(PI[0]) + mean(PI[2])) / 3
        given |= dict(masked_logps=batch(other), weight=weight)
        loss, _ = methods.push_loss(PAPOConfig(gamma=1.0, beta=0.0), progress=0.5, **given)
        assert loss.item() == pytest.approx(wanted, rel=1e-9)


@torch.no_grad()
def test_a_blind_view_is_stock_attention_without_the_image(vlm):
    """The model's own 2-D mask with 0 on the image's tokens, each response alone; so no pixel
    moves a log-prob, and with the picture in sight all do."""
    model, processor = vlm
    prompt, responses = two_prompts(processor)[1], random_responses(processor, [5, 3])
    blind = {**prompt, "blind": True}
    logps, mask = group_logps(model, blind, responses)
    for i, response in enumerate(responses):
        ids = torch.cat([prompt["input_ids"], response[None]], 1)
        is_image = (ids == model.config.image_token_id).int()
        images = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
        whole = dict(mm_token_type_ids=is_image, image_grid_thw=images["image_grid_thw"])
        positions = model.model.get_rope_index(ids, **whole)[0]
        seen = dict(attention_mask=1 - is_image, position_ids=positions)
        out = model(input_ids=ids, mm_token_type_ids=is_image, **seen, **images)
        alone = out.logits[0, prompt["input_ids"].shape[1] - 1 : -1].log_softmax(-1)
        alone = alone.gather(1, response[:, None])[:, 0]  # (|o|,)
        torch.testing.assert_close(logps[i, : len(response)], alone, rtol=2e-5, atol=2e-5)
    other = {**blind, "pixel_values": -prompt["pixel_values"]}
    assert torch.equal(group_logps(model, other, responses)[0], logps)
    assert (group_logps(model, prompt, responses)[0] - logps)[mask > 0].abs().min() > 1e-5


@torch.no_grad()
def test_a_rows_states_are_those_after_each_token(one_vlm):
    """A response's states lie behind the prompt's, in order: as they are where it stands alone."""
    model, processor = one_vlm
    prompt, responses = two_prompts(processor)[0], random_responses(processor, [4, 2])
    logps, _, row = group_logps(model, prompt, responses, with_row=True)
    P = prompt["input_ids"].shape[1]
    for response, states in zip(responses, row.hidden[P:].split([4, 2])):
        alone = group_logps(model, prompt, [response], with_row=True)[-1].hidden
        torch.testing.assert_close(states, alone[P:], rtol=1e-4, atol=1e-4)
    head = model.get_output_embeddings()(row.hidden[row.predictor]).log_softmax(-1)
    found = head.gather(1, torch.cat(responses)[:, None])[:, 0]
    torch.testing.assert_close(found, torch.cat([logps[0], logps[1, :2]]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", methods.OBJECTIVES)
def test_every_objective_trains_a_real_model(one_vlm, name):
    """Finite, through the scored responses alone, at no padding; the views carry no gradient: with
    all advantages at 0 and no weight on log pi, nothing moves but what has a term of its own."""
    model, processor = one_vlm
    prompt, responses = two_prompts(processor)[0], random_responses(processor, [6, 3, 5])
    scores = [{"reward": 0.0}] * 3
    group = papo.Group({}, prompt, responses, [], scores, torch.tensor([1.0, -1.0, 0.5]))
    masked = {**prompt, "pixel_values": torch.full_like(prompt["pixel_values"], -1.8)}
    group.masked_prompt = None if name in ("pgpo", "pgpo-dev", "vgpo", "vepo") else masked
    passes, run = [], model.model.forward

    def forward(**inputs):
        passes.append(torch.is_grad_enabled())
        return run(**inputs)

    model.model.forward = forward
    objective = lambda *args, **given: methods.OBJECTIVES[name](*args, progress=0.2, **given)
    try:
        loss, metrics, _ = papo.group_loss(model, CONFIG, group, objective=objective)
    finally:
        del model.model.forward
    loss.backward()
    extra = {"vgpo": 0, "dvrp": 2}.get(name, 1)
    assert passes == [True] + [False] * extra
    assert all(math.isfinite(x) for x in (loss.item(), *metrics.values()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
