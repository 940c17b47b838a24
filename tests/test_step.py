"""One step: rollouts, constants, update. Gradients are those of one big batch scored as usual."""

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import picture, random_responses, seeded, shift_logits, stock_score, two_prompts
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

import papo
from papo import PAPOConfig, papo_loss, papo_step, roll_out, score_constants, split_batch

inf = float("inf")
WEIGHTS = dict(gamma=0.5, beta=0.3, eta1=0.2, eta2=0.4, temperature=0.8)


def pad(rows):
    return pad_sequence(list(rows), batch_first=True)


class Recorder:
    """Stands for an optimizer and keeps the gradient that it is asked to step with."""

    def __init__(self, model):
        self.model, self.grads = model, None

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)

    def step(self):
        named = self.model.named_parameters()
        self.grads = {name: p.grad.clone() for name, p in named if p.grad is not None}


def recorded_step(model, config, groups, **options):
    """-> metrics, gradients"""
    optimizer = Recorder(model)
    return papo_step(model, optimizer, config, groups, **options), optimizer.grads


def make_groups(model, processor, constants=True):
    """Two groups of 3 and 2 responses, all of different lengths, with masked prompts and made-up
    pi_old and pi_ref."""
    torch.manual_seed(0)
    groups = []
    for k, (prompt, lengths) in enumerate(zip(two_prompts(processor), ([5, 2, 7], [1, 4]))):
        responses, pixels = random_responses(processor, lengths, seed=k), prompt["pixel_values"]
        black = torch.where(torch.rand(len(pixels), 1) < 0.6, -1.8, pixels)
        group = papo.Group({}, prompt, responses, [], [], torch.randn(len(lengths)))
        group.masked_prompt = {**prompt, "pixel_values": black}
        group.scores = [{"reward": float(i == 1)} for i in range(len(lengths))]
        if constants:
            own = stock_logps(model, group)  # (G, T)
            group.old_logps = own + 0.2 * torch.randn(own.shape)  # (G, T)
            group.ref_logps = own + 0.5 * torch.randn(own.shape)  # (G, T)
        groups.append(group)
    return groups


@torch.no_grad()
def stock_logps(model, group):
    return pad(stock_score(model, group.prompt, o, 0.8)[0] for o in group.responses)  # (G, T)


def whole_batch(model, config, groups):
    """papo_loss once over all responses as one padded batch, scored by stock forwards. -> loss,
    metrics"""
    own, masked, old, ref = [], [], [], []
    for group in groups:
        for i, o in enumerate(group.responses):
            own.append(stock_score(model, group.prompt, o, config.temperature))
            masked.append(stock_score(model, group.masked_prompt, o, config.temperature))
            old.append(group.old_logps[i, : len(o)])
            ref.append(group.ref_logps[i, : len(o)])
    (logps, entropy), (masked_logps, masked_entropy) = (map(pad, zip(*x)) for x in (own, masked))
    advantages, mask = torch.cat([g.advantages for g in groups]), pad(map(torch.ones_like, old))
    if config.entropy_estimate == "sampled":
        entropy = masked_entropy = None
    entropies = dict(entropy=entropy, masked_entropy=masked_entropy)
    return papo_loss(config, logps, pad(old), advantages, mask, masked_logps, pad(ref), **entropies)


@pytest.mark.parametrize(
    "vlm, masked_grad, entropy_estimate, aggregation, gated",
    [
        ("qwen2_5_vl", "detached", "exact", "sequence", False),
        ("qwen2_5_vl", "detached", "exact", "sequence", True),
        ("qwen2_5_vl", "detached", "sampled", "token", False),
        ("qwen2_vl", "entropy", "exact", "token", False),
        ("qwen2_5_vl", "entropy", "sampled", "sequence", True),
        ("qwen3_vl", "full", "exact", "token", False),
        ("qwen2_5_vl", "full", "sampled", "sequence", False),
    ],
    indirect=["vlm"],
)
def test_gradient_is_that_of_one_big_batch(vlm, masked_grad, entropy_estimate, aggregation, gated):
    """Eq. 2 / Eq. 3 over the whole batch, however it is split: by groups, or down to single
    responses, with activations kept or recomputed; gradients from before do not count. Metrics
    likewise. A gradient longer than max_grad_norm is scaled down to it; grad_norm is its length
    before."""
    model, processor = vlm
    groups = make_groups(model, processor)
    modes = dict(masked_grad=masked_grad, entropy_estimate=entropy_estimate, gated=gated)
    config = PAPOConfig(**WEIGHTS, **modes, aggregation=aggregation, max_grad_norm=inf)
    loss, expected = whole_batch(model, config, groups)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    assert norm > 0.1
    expected |= {"grad_norm": norm, "skipped": 0.0}
    row = groups[0].prompt["input_ids"].shape[1] + 8
    for tokens, longest, scale in ((8192, inf, 1), (row, inf, 1), (1, norm / 100, 0.01)):
        config.tokens_per_forward, config.max_grad_norm = tokens, longest
        metrics, found = recorded_step(model, config, groups)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            close = dict(rtol=1e-4, atol=1e-5 * norm * scale, msg=name)
            torch.testing.assert_close(found[name], grad * scale, **close)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert model.training and all(p.grad is None for p in model.parameters())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for p in model.parameters():
            p.grad = torch.full_like(p, 7.0)


@pytest.mark.parametrize("masked_grad", [None, "detached", "entropy", "full"])
def test_the_masked_pass_keeps_a_graph_only_if_needed(one_vlm, monkeypatch, masked_grad):
    """ "detached" scores the masked image under no_grad: it pays neither the memory nor the time of
    a backward pass."""
    model, processor = one_vlm
    groups, seen, group_logps = make_groups(model, processor), [], papo.group_logps

    def spy(model, prompt, *args, **options):
        result = group_logps(model, prompt, *args, **options)
        seen.append((prompt is groups[0].masked_prompt, *(result[i].requires_grad for i in (0, 2))))
        return result

    monkeypatch.setattr(papo, "group_logps", spy)
    recorded_step(model, PAPOConfig(**WEIGHTS, masked_grad=masked_grad), groups[:1])
    graph = masked_grad != "detached"  # not given, it follows eta2
    assert seen == [(False, True, True), (True, graph, graph)]


@pytest.mark.parametrize("bad", [float("nan"), inf])
def test_a_gradient_that_is_not_finite_is_skipped(one_vlm, bad):
    """Weights and optimizer state stay as they are, bit for bit; the next step is a usual one."""
    model, processor = one_vlm
    groups, config = make_groups(model, processor), PAPOConfig(**WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = lambda: papo_step(model, optimizer, config, groups)["skipped"]
    states = lambda: [x for state in optimizer.state.values() for x in state.values()]
    bits = lambda: copy.deepcopy([*model.state_dict().values(), *states()])
    assert step() == 0
    before, advantages = bits(), groups[0].advantages
    groups[0].advantages = advantages * bad
    assert step() == 1 and len(before) > 40
    assert all(torch.equal(a, b) for a, b in zip(before, bits(), strict=True))
    groups[0].advantages = advantages
    assert step() == 0 and any(not torch.equal(a, b) for a, b in zip(before, bits()))


def test_an_objective_of_ones_own(one_vlm):
    """papo_step hands it everything by name, rewards included: one that only counts right answers
    has the gradient of papo_loss with the others' advantages at zero. What nobody scored is
    None."""
    model, processor = one_vlm
    config = PAPOConfig(**WEIGHTS, tokens_per_forward=1)  # one response a pass
    groups, seen = make_groups(model, processor), []

    def only_right(config, advantages, rewards, **rest):
        seen.append(rest)
        return papo_loss(config, advantages=advantages * (rewards > 0.5), **rest)

    _, grads = recorded_step(model, config, groups, objective=only_right)
    for group in groups:
        rewards = torch.tensor([score["reward"] for score in group.scores])
        group.advantages = group.advantages * rewards
    _, expected = recorded_step(model, config, groups)
    assert all(torch.equal(grads[name], expected[name]) for name in expected)
    logps = {"logps", "old_logps", "ref_logps", "masked_logps"}
    assert seen[0].keys() == logps | {"response_mask", "entropy", "masked_entropy", "row"}
    given = lambda name: torch.equal(seen[1][name], getattr(groups[0], name)[1:2, :2])
    assert given("old_logps") and given("ref_logps")
    for group in groups:
        group.masked_prompt = group.ref_logps = group.old_logps = None
    config = PAPOConfig(gamma=0, beta=0, entropy_estimate="sampled")
    recorded_step(model, config, groups, objective=only_right)
    missing = {name for name, x in seen[-1].items() if x is None}
    assert missing == {"ref_logps", "masked_logps", "entropy", "masked_entropy"}
    now, old = seen[-1]["logps"], seen[-1]["old_logps"]  # on-policy: ratio 1, and a constant
    assert torch.equal(now, old) and now.requires_grad and not old.requires_grad


def test_score_constants(one_vlm):
    """pi_old is stored for all but the first update's groups, pi_ref only with beta, both as the
    stock forward has them and without gradient; micro-batches or not."""
    model, processor = one_vlm
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.data *= 0.5
    make = lambda: make_groups(model, processor, constants=False)
    for tokens in (8192, 1):
        sizes = dict(updates_per_batch=2, tokens_per_forward=tokens)
        config, groups = PAPOConfig(beta=0.1, temperature=0.8, **sizes), make() + make()
        model.train()
        score_constants(model, lambda: nullcontext(other), config, groups)
        assert not model.training and groups[0].old_logps is None and groups[1].old_logps is None
        found = [(group.ref_logps, stock_logps(other, group)) for group in groups]
        found += [(group.old_logps, stock_logps(model, group)) for group in groups[2:]]
        for logps, expected in found:
            torch.testing.assert_close(logps, expected, rtol=1e-4, atol=1e-4)
            assert not logps.requires_grad
    groups = make()
    score_constants(model, None, PAPOConfig(beta=0, updates_per_batch=1), groups)
    assert all(group.ref_logps is None and group.old_logps is None for group in groups)


# --- splitting ----------------------------------------------------------------------------------


def test_split_group_covers_once_in_order_within_budget(one_vlm):
    """Runs of responses, each with the prompt within tokens_per_forward, or a single response; none
    could take in the next."""
    model, prompt = one_vlm[0], {"input_ids": torch.zeros(1, 10)}
    for seed, budget in itertools.product(range(20), (1, 12, 15, 20, 30, 1000)):
        lengths = torch.randint(1, 9, (1 + seed % 7,), generator=seeded(seed)).tolist()
        config, responses = PAPOConfig(tokens_per_forward=budget), list(map(torch.zeros, lengths))
        parts = [lengths[part] for part in papo.split_group(config, prompt, responses, model)]
        assert sum(parts, []) == lengths and all(parts)
        assert all(10 + sum(part) <= budget or len(part) == 1 for part in parts)
        assert all(10 + sum(part) + after[0] > budget for part, after in zip(parts, parts[1:]))


@pytest.mark.parametrize("n", [20, 33, 70, 400])
def test_split_group_takes_the_cheapest_run(one_vlm, n):
    """By the multiplications counted in rows of two lengths: of all numbers of responses of n
    tokens in a row, the cheapest a response, with 500 tokens for a row's launches. A row with an
    image to encode holds more."""
    model, P, G = one_vlm[0], 400, 60
    model.set_attn_implementation("eager")  # whose products the counter sees

    def count(L):
        row = torch.zeros(1, L, model.config.text_config.hidden_size)  # (1, L, H)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.model.language_model(inputs_embeds=row)
        return counter.get_total_flops()

    b = (count(200) - 2 * count(100)) / 20_000
    a = count(100) / 100 - 100 * b
    cost = lambda m: (a * (P + m * n + 500) + b * (P + m * n) ** 2) / m
    prompt, responses = {"input_ids": torch.zeros(1, P)}, [torch.zeros(n)] * G
    runs = lambda given: papo.split_group(PAPOConfig(), given, responses, model)
    assert runs(prompt)[0] == slice(0, min(range(1, G + 1), key=cost))
    pixels = torch.zeros(2000, 1176)  # (patches, values)
    assert len(runs(prompt | {"pixel_values": pixels})) < len(runs(prompt))


def test_split_batch_covers_once_in_order():
    """updates_per_batch parts of nearly equal size, fewer only if there are fewer groups, none
    empty."""
    for n, updates in itertools.product(range(8), range(1, 6)):
        parts = split_batch(PAPOConfig(updates_per_batch=updates), list(range(n)))
        assert sum(parts, []) == list(range(n)) and len(parts) == min(n, updates) and all(parts)
        assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ValueError, match="at least one group"):
        papo_step(None, None, PAPOConfig(), [])


ROWS = [dict(images=[picture(k, 84, 56)], problem=f"What is {k}?", answer="7") for k in range(3)]
SMALL = dict(group_size=2, max_new_tokens=4, prompts_per_batch=3, updates_per_batch=1)


@pytest.mark.parametrize(
    "is_mixed, options, kept, redraws, drawn",
    [
        (lambda n: n % 3 == 0, {}, [0, 3, 6, 9, 12, 15], 5, 16),  # only the missing are redrawn
        (lambda n: n % 100 == 50, {}, [50], 20, None),  # the batch stays short
        (lambda n: False, dict(max_redraws=2), [], 2, 18),
        (lambda n: True, {}, list(range(6)), 0, 6),
        (lambda n: False, dict(dynamic_sampling=False), list(range(6)), 0, 6),
    ],
)
def test_dynamic_sampling_redraws_and_stops(monkeypatch, is_mixed, options, kept, redraws, drawn):
    """DAPO: only groups of mixed accuracy (not reward: format teaches nothing about answers) are
    kept and the missing ones redrawn; after max_redraws the batch stays short. Without dynamic
    sampling every group is kept."""
    calls = []

    def fake(model, processor, config, rows, generator, reward):
        calls.append(len(rows))
        right = lambda n: [0, 0, 1] if is_mixed(n) else [n % 2] * 3
        scores = lambda n: [{"accuracy": a, "reward": i} for i, a in enumerate(right(n))]
        return [papo.Group(row, None, [], [], scores(row), None) for row in rows]

    monkeypatch.setattr(papo, "sample_and_grade", fake)
    sizes = dict(prompts_per_batch=6, prompts_per_sample=4, updates_per_batch=1)
    config = PAPOConfig(**{"gamma": 0.0, "dynamic_sampling": True, **sizes, **options})
    rows = itertools.count()
    groups, found = roll_out(SimpleNamespace(device="cpu"), None, config, rows, seeded())
    assert [group.row for group in groups] == kept and found == redraws
    assert sum(calls) == next(rows) == (drawn or next(rows) - 1) and calls[:2] == [4, 2]


def test_sample_and_grade(one_vlm, monkeypatch):
    """Texts are the decoded responses without special tokens, the reward sees them and the row's
    answer, and the advantages are those of the rewards."""
    model, processor = one_vlm
    calls = []

    def grade(text, answer, format_weight):
        calls.append((text, answer, format_weight))
        return {"reward": len(calls) % 3 / 2, "accuracy": 0.0}

    options = dict(format_weight=0.3, temperature=0.9, top_p=0.8)
    config = PAPOConfig(group_size=3, max_new_tokens=6, **options)
    shift_logits(model, {processor.tokenizer.eos_token_id: 5.0})
    groups = papo.sample_and_grade(model, processor, config, ROWS[:2], seeded(), grade)
    prompts = [group.prompt for group in groups]
    expected = papo.sample_groups(model, processor, prompts, 3, 6, 0.9, 0.8, seeded())
    assert calls == [(text, "7", 0.3) for group in groups for text in group.texts]
    assert [len(group.texts) for group in groups] == [3, 3]
    assert any(o[-1] == processor.tokenizer.eos_token_id for o in groups[0].responses)
    for group, responses, row in zip(groups, expected, ROWS):
        assert all(torch.equal(a, b) for a, b in zip(group.responses, responses, strict=True))
        decode = lambda o: processor.tokenizer.decode(o, skip_special_tokens=True)
        assert group.row is row and group.texts == list(map(decode, responses))
        rewards = [score["reward"] for score in group.scores]
        assert torch.equal(group.advantages, papo.group_advantages(rewards))
        prompt = papo.encode_prompt(processor, row["problem"], row["images"][0])
        assert torch.equal(group.prompt["input_ids"], prompt["input_ids"])
        assert group.masked_prompt is group.old_logps is group.ref_logps is None


def test_thinking_templates_open_the_tag_themselves(one_vlm):
    """A thinking model's prompt ends with <think>: the response continues it, and the text that is
    graded shows it."""
    processor, config = one_vlm[1], PAPOConfig(gamma=0, **SMALL)
    roll = lambda: roll_out(*one_vlm, config, iter(ROWS), seeded())[0]
    texts = lambda: [text for group in roll() for text in group.texts]
    assert not any("<think>" in text for text in texts())
    opened = processor.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    processor.chat_template = opened
    assert all(text.startswith("<think>") and text.count("<think>") == 1 for text in texts())


def test_masking_does_not_move_the_sampling(one_vlm):
    """gamma = 0 and gamma > 0 sample the same responses from the same seed, also in the next
    rollout; masks are drawn only if the loss needs them, fresh each time, from the same seed the
    same."""

    def run(**options):
        config = PAPOConfig(**SMALL, prompts_per_sample=2, mask_ratio=0.5, **options)
        generator, rows = seeded(5), itertools.cycle(ROWS)
        return [g for _ in range(2) for g in roll_out(*one_vlm, config, rows, generator)[0]]

    plain, masked, again, eta = (run(gamma=g, eta2=e) for g, e in ((0, 0), (1, 0), (1, 0), (0, 1)))
    responses = lambda groups: [o.tolist() for group in groups for o in group.responses]
    assert responses(plain) == responses(masked) == responses(eta)
    assert responses(plain[:3]) != responses(plain[3:])
    assert all(group.masked_prompt is None and group.masked_images is None for group in plain)
    pixels = lambda groups: [group.masked_images[0].tobytes() for group in groups]
    assert pixels(masked) == pixels(again) == pixels(eta) and len(set(pixels(masked))) == 6


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_masked_prompts_are_aligned(vlm, ratio):
    """The masked prompt holds the unmasked one's patches, or black ones, mask_ratio of them, at the
    config's patch size; in a gated run, too, every group has one. With ratio 0 nothing is hidden:
    the perception KL is 0 to the bit, its gradient too."""
    model, processor = vlm
    sizes = dict(patch_size=processor.image_processor.patch_size, mask_ratio=ratio)
    config = PAPOConfig(**SMALL, **sizes, gamma=0.5, beta=0, gated=True)
    groups, _ = roll_out(*vlm, config, iter(ROWS), seeded())
    for group in groups:
        group.advantages = torch.zeros(2)
        assert torch.equal(group.masked_prompt["input_ids"], group.prompt["input_ids"])
        values = group.masked_prompt["pixel_values"]
        same = (values == group.prompt["pixel_values"]).all(1)
        black = values.amax(1) < -1.4  # in all channels and nothing else
        share = black.float().mean()
        assert (same ^ black).all() and (0 < share < 1 or share == ratio)
    config.gated = False
    metrics, _ = recorded_step(model, config, groups)
    zero = metrics["kl_prcp"] == 0, metrics["grad_norm"] == 0
    assert zero == ((True, True) if ratio == 0 else (False, False))


def test_a_frozen_vision_tower_runs_once_per_picture(one_vlm):
    """With nothing to train in the tower, image and masked image are encoded once each in the
    rollout and never again; the metrics are those of a tower that runs in every pass."""
    model, _ = one_vlm
    config = PAPOConfig(gamma=0.1, beta=0.0, eta2=0.1, **SMALL)
    calls, metrics = [], []
    hook = model.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    # Trainable, which a single weight is enough for, it runs once to sample for all three prompts.
    for trainable, rollout, whole in ((False, 6, 6), (True, 1, 7)):
        model.model.visual.requires_grad_(False)
        next(model.model.visual.parameters()).requires_grad_(trainable)
        groups, _ = roll_out(*one_vlm, config, iter(ROWS), seeded())
        assert len(calls) == rollout
        prompts = [prompt for group in groups for prompt in (group.prompt, group.masked_prompt)]
        assert all(("features" in prompt) != trainable for prompt in prompts)
        metrics.append(recorded_step(model, config, groups)[0])
        assert len(calls) == whole
        calls.clear()
    hook.remove()
    frozen, trained = (m.pop("grad_norm") for m in metrics)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5) and frozen < trained
