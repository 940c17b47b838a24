"""One step: rollouts, constants, update. The accumulated gradient is that of one big batch scored the stock way."""

import copy
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import picture, random_responses, shift_logits, stock_score, two_prompts
from torch.nn.utils.rnn import pad_sequence

import papo
from papo import Group, PAPOConfig, papo_loss, papo_step, roll_out, score_constants, split_batch, split_group

WEIGHTS = dict(gamma=0.5, beta=0.3, eta1=0.2, eta2=0.4, temperature=0.8)


class Recorder:
    """Stands for an optimizer and keeps the gradient that it is asked to step with."""

    def __init__(self, model):
        self.model, self.grads = model, None

    def zero_grad(self, set_to_none=True):
        self.model.zero_grad(set_to_none)

    def step(self):
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def make_groups(model, processor, constants=True):
    """Two groups of 3 and 2 responses, all of different lengths, with masked prompts and made-up pi_old and pi_ref."""
    torch.manual_seed(0)
    groups = []
    for k, (prompt, lengths) in enumerate(zip(two_prompts(processor), ([5, 2, 7], [1, 4]))):
        responses = random_responses(processor, lengths, seed=k)
        pixels = prompt["pixel_values"]
        masked = {**prompt, "pixel_values": torch.where(torch.rand(len(pixels), 1) < 0.6, -1.8, pixels)}
        group = Group({}, prompt, responses, [], [], torch.randn(len(lengths)), masked_prompt=masked)
        if constants:
            with torch.no_grad():
                own = pad_sequence(
                    [stock_score(model, prompt, o, 0.8)[0] for o in responses], batch_first=True
                )
            group.old_logps, group.ref_logps = (
                own + 0.2 * torch.randn(own.shape),
                own + 0.5 * torch.randn(own.shape),
            )
        groups.append(group)
    return groups


def whole_batch(model, config, groups):
    """papo_loss once over all responses as one padded batch, scored by stock forwards. -> loss, metrics"""
    pad = lambda rows: pad_sequence(list(rows), batch_first=True)
    pairs = [(group, o) for group in groups for o in group.responses]
    score = lambda name: zip(
        *(stock_score(model, getattr(group, name), o, config.temperature) for group, o in pairs)
    )
    logps, entropy = map(pad, score("prompt"))
    masked_logps, masked_entropy = map(pad, score("masked_prompt"))
    mask = pad(torch.ones(len(o)) for _, o in pairs)
    constant = lambda name: pad(
        row[: len(o)] for group in groups for row, o in zip(getattr(group, name), group.responses)
    )
    old, ref = constant("old_logps"), constant("ref_logps")
    exact = config.entropy_estimate == "exact"
    return papo_loss(
        config,
        logps,
        old,
        torch.cat([group.advantages for group in groups]),
        mask,
        masked_logps,
        ref,
        entropy if exact else None,
        masked_entropy if exact else None,
    )


@pytest.mark.parametrize("aggregation", ["sequence", "token"])
@pytest.mark.parametrize(
    "masked_grad, entropy_estimate",
    [("detached", "exact"), ("entropy", "exact"), ("entropy", "sampled"), ("full", "exact")],
)
def test_gradient_is_that_of_one_big_batch(one_vlm, masked_grad, entropy_estimate, aggregation):
    """Eq. 2 / Eq. 3 over the whole batch, however it is split: by groups, or down to single responses. Metrics likewise."""
    model, processor = one_vlm
    groups = make_groups(model, processor)
    config = PAPOConfig(
        **WEIGHTS,
        masked_grad=masked_grad,
        entropy_estimate=entropy_estimate,
        aggregation=aggregation,
        max_grad_norm=float("inf"),
    )
    loss, expected = whole_batch(model, config, groups)
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    for tokens in (8192, groups[0].prompt["input_ids"].shape[1] + 8, 1):
        config.tokens_per_forward = tokens
        optimizer = Recorder(model)
        metrics = papo_step(model, optimizer, config, groups)
        assert optimizer.grads.keys() == grads.keys()
        for name in grads:
            torch.testing.assert_close(
                optimizer.grads[name], grads[name], rtol=1e-4, atol=1e-5 * norm, msg=name
            )
        assert metrics == pytest.approx({**expected, "grad_norm": norm, "skipped": 0.0}, rel=1e-4, abs=1e-6)
        assert model.training and all(p.grad is None for p in model.parameters())


def test_several_architectures_and_checkpointing(vlm):
    """The same with the layers' activations recomputed in backward, for each architecture."""
    model, processor = vlm
    groups, config = make_groups(model, processor), PAPOConfig(**WEIGHTS, max_grad_norm=float("inf"))
    whole_batch(model, config, groups)[0].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = Recorder(model)
    papo_step(model, optimizer, config, groups)
    for name in grads:
        torch.testing.assert_close(optimizer.grads[name], grads[name], rtol=1e-4, atol=1e-5 * norm, msg=name)


@pytest.mark.parametrize("masked_grad", ["detached", "entropy", "full"])
def test_the_masked_pass_keeps_a_graph_only_if_needed(one_vlm, monkeypatch, masked_grad):
    """ "detached" scores the masked image under no_grad: it pays neither the memory nor the time of a backward pass."""
    model, processor = one_vlm
    groups, seen = make_groups(model, processor), []

    def spy(model, prompt, *args, **options):
        result = papo_group_logps(model, prompt, *args, **options)
        seen.append((prompt is groups[0].masked_prompt, result[0].requires_grad, result[2].requires_grad))
        return result

    papo_group_logps = papo.group_logps
    monkeypatch.setattr(papo, "group_logps", spy)
    papo_step(model, Recorder(model), PAPOConfig(**WEIGHTS, masked_grad=masked_grad), groups[:1])
    graph = masked_grad != "detached"
    assert seen == [(False, True, True), (True, graph, graph)]


@pytest.mark.parametrize("eta2", [0.0, 0.4])
def test_a_gated_run_scores_what_is_paid(one_vlm, monkeypatch, eta2):
    """The gradient is that of every response scored under the mask; but without eta2 only those of positive advantage are."""
    model, processor = one_vlm
    groups = make_groups(model, processor)
    config = PAPOConfig(**WEIGHTS | dict(eta2=eta2), gated=True, max_grad_norm=float("inf"))
    for group, advantages in zip(groups, ([-1.0, 0.4, 0.6], [0.0, 0.0])):
        group.advantages = torch.tensor(advantages)
    masked, group_logps = [], papo.group_logps

    def counting(model, prompt, responses, *rest, **options):
        masked.extend([len(o) for o in responses if any(prompt is group.masked_prompt for group in groups)])
        return group_logps(model, prompt, responses, *rest, **options)

    monkeypatch.setattr(papo, "group_logps", counting)
    optimizer = Recorder(model)
    metrics = papo_step(model, optimizer, config, groups)
    assert masked == ([2, 7] if not eta2 else [5, 2, 7, 1, 4])
    assert metrics["kl_prcp"] > 0 and ("masked_entropy" in metrics) == bool(eta2)  # only what was measured
    whole_batch(model, config, groups)[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.stack([g.norm() for g in grads.values()]).norm().item()
    for name in grads:
        torch.testing.assert_close(optimizer.grads[name], grads[name], rtol=1e-4, atol=1e-5 * norm, msg=name)


def test_leftover_gradients_do_not_count(one_vlm):
    """Gradients from before the step are dropped, not added."""
    model, processor = one_vlm
    groups, config, results = make_groups(model, processor), PAPOConfig(**WEIGHTS), []
    for leftover in (0.0, 7.0):
        for p in model.parameters():
            p.grad = torch.full_like(p, leftover)
        results.append(papo_step(model, Recorder(model), config, groups))
    assert results[0] == results[1]


def test_the_optimizer_gets_the_clipped_gradient(one_vlm):
    """A gradient longer than max_grad_norm is scaled down to it; grad_norm is its length before."""
    model, processor = one_vlm
    groups, free, clipped = make_groups(model, processor), Recorder(model), Recorder(model)
    metrics = papo_step(model, free, PAPOConfig(**WEIGHTS, max_grad_norm=float("inf")), groups)
    assert (
        papo_step(model, clipped, PAPOConfig(**WEIGHTS, max_grad_norm=0.01), groups)["grad_norm"]
        == metrics["grad_norm"]
        > 0.1
    )
    for name in free.grads:
        torch.testing.assert_close(
            clipped.grads[name], free.grads[name] * 0.01 / metrics["grad_norm"], rtol=1e-3, atol=1e-9
        )


def test_a_step_moves_the_weights_and_lowers_the_loss(one_vlm):
    """The sign of it all: a small plain gradient step lowers the loss it was computed from, by about lr |g|^2."""
    model, processor = one_vlm
    groups, config = (
        make_groups(model, processor),
        PAPOConfig(**WEIGHTS, masked_grad="full", max_grad_norm=float("inf")),
    )
    metrics = papo_step(model, torch.optim.SGD(model.parameters(), lr=1e-5), config, groups)
    with torch.no_grad():
        drop = metrics["loss"] - whole_batch(model.eval(), config, groups)[1]["loss"]
    assert drop == pytest.approx(1e-5 * metrics["grad_norm"] ** 2, rel=0.3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_skipped(one_vlm, bad):
    """Weights and optimizer state stay as they are, bit for bit; the next step is a usual one."""
    model, processor = one_vlm
    groups, config = make_groups(model, processor), PAPOConfig(**WEIGHTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert papo_step(model, optimizer, config, groups)["skipped"] == 0
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    advantages, groups[0].advantages = groups[0].advantages, groups[0].advantages * bad
    assert papo_step(model, optimizer, config, groups)["skipped"] == 1
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y))
        for key in state["state"]
        for x, y in zip(state["state"][key].values(), optimizer.state_dict()["state"][key].values())
    )
    groups[0].advantages = advantages
    assert papo_step(model, optimizer, config, groups)["skipped"] == 0
    assert any(not torch.equal(w, weights[name]) for name, w in model.state_dict().items())


def test_an_objective_of_ones_own(one_vlm):
    """papo_step hands it everything by name, rewards included: one that only counts right answers has the gradient of
    papo_loss with the others' advantages at zero; and the group's constants arrive as they are."""
    model, processor = one_vlm
    groups, config = make_groups(model, processor), PAPOConfig(**WEIGHTS, max_grad_norm=float("inf"))
    for group in groups:
        group.scores = [{"reward": float(i == 1)} for i in range(len(group.responses))]
    seen = []

    def only_right(config, advantages, rewards, **rest):
        seen.append(rest)
        return papo_loss(config, advantages=advantages * (rewards > 0.5), **rest)

    optimizers = Recorder(model), Recorder(model)
    papo_step(model, optimizers[0], config, groups, objective=only_right)
    for group in groups:
        group.advantages = group.advantages * torch.tensor([score["reward"] for score in group.scores])
    papo_step(model, optimizers[1], config, groups)
    for name, gradient in optimizers[0].grads.items():
        assert torch.equal(gradient, optimizers[1].grads[name])
    assert torch.equal(seen[0]["ref_logps"], groups[0].ref_logps)
    assert seen[0].keys() == {
        *("logps", "old_logps", "ref_logps", "masked_logps"),
        *("response_mask", "entropy", "masked_entropy"),
    }


def test_an_objective_of_ones_own_sees_all_of_a_gated_run(one_vlm):
    """Whatever it does with the advantages: every response is scored under the mask. What nobody scored is None."""
    model, processor = one_vlm
    groups, seen = make_groups(model, processor), []
    for group in groups:
        group.advantages = torch.linspace(-1, 1, len(group.responses))

    def mine(config, masked_logps, masked_entropy, **rest):
        seen.append(masked_logps)
        return papo_loss(config, masked_logps=masked_logps, masked_entropy=masked_entropy, **rest)

    config = PAPOConfig(**WEIGHTS | dict(eta2=0.0), gated=True)
    papo_step(model, Recorder(model), config, groups, objective=mine)
    for given, group in zip(seen, groups):
        wanted, _ = papo.group_logps(model, group.masked_prompt, group.responses, config.temperature)
        torch.testing.assert_close(given, wanted)
    for group in groups:
        group.masked_prompt = None
    papo_step(model, Recorder(model), PAPOConfig(gamma=0.0, beta=0.0), groups, objective=mine)
    assert seen[-1] is None


def test_mask_ratio_zero_makes_the_perception_kl_exactly_zero(one_vlm):
    """Nothing is hidden: both passes see the same pixels, so the KL is 0 to the bit and its gradient too."""
    model, processor = one_vlm
    config = PAPOConfig(
        gamma=0.5,
        beta=0.0,
        mask_ratio=0.0,
        group_size=2,
        max_new_tokens=4,
        prompts_per_batch=3,
        updates_per_batch=1,
    )
    groups, _ = roll_out(model, processor, config, iter(ROWS), torch.Generator().manual_seed(0))
    for group in groups:
        group.advantages = torch.zeros(2)
    metrics = papo_step(model, Recorder(model), config, groups)
    assert metrics["kl_prcp"] == 0.0 and metrics["grad_norm"] == 0.0


def test_no_groups(one_vlm):
    with pytest.raises(ValueError, match="at least one group"):
        papo_step(one_vlm[0], None, PAPOConfig(), [])


def test_the_first_update_has_ratio_one(one_vlm):
    """Without old_logps pi_old is pi_theta: the ratio is exactly 1 and constant, yet the policy gradient flows."""
    model, processor = one_vlm
    groups, seen = make_groups(model, processor, constants=False), []

    def spy(config, logps, old_logps, **rest):
        seen.append((logps, old_logps))
        return papo_loss(config, logps, old_logps, **rest)

    metrics = papo_step(model, Recorder(model), PAPOConfig(gamma=0, beta=0), groups, objective=spy)
    assert len(seen) == 2 and all(
        torch.equal(logps, old) and logps.requires_grad and not old.requires_grad for logps, old in seen
    )
    mean_advantage = torch.cat([group.advantages for group in groups]).mean().item()
    assert metrics["policy_loss"] == pytest.approx(-mean_advantage, rel=1e-5) and metrics["grad_norm"] > 0.01
    assert metrics["clip_high_fraction"] == metrics["clip_low_fraction"] == 0


def test_score_constants(one_vlm):
    """pi_old is stored for all but the first update's groups, pi_ref only with beta, both as the stock forward has them and
    without gradient; micro-batches or not."""
    model, processor = one_vlm
    other = copy.deepcopy(model)
    other.get_output_embeddings().weight.data *= 0.5
    entered = []

    @contextmanager
    def reference():
        entered.append(1)
        yield other
        entered.append(-1)

    def stock(model, group):
        with torch.no_grad():
            return pad_sequence(
                [stock_score(model, group.prompt, o, 0.8)[0] for o in group.responses], batch_first=True
            )

    for tokens in (8192, 1):
        config = PAPOConfig(beta=0.1, temperature=0.8, updates_per_batch=2, tokens_per_forward=tokens)
        groups = make_groups(model, processor, constants=False) + make_groups(
            model, processor, constants=False
        )
        model.train()
        score_constants(model, reference, config, groups)
        assert not model.training and groups[0].old_logps is None and groups[1].old_logps is None
        for group in groups:
            torch.testing.assert_close(group.ref_logps, stock(other, group), rtol=1e-4, atol=1e-4)
            assert not group.ref_logps.requires_grad
        for group in groups[2:]:
            torch.testing.assert_close(group.old_logps, stock(model, group), rtol=1e-4, atol=1e-4)
            assert not group.old_logps.requires_grad
    assert entered == [1, -1] * 2
    groups = make_groups(model, processor, constants=False)
    score_constants(model, None, PAPOConfig(beta=0, updates_per_batch=1), groups)
    assert all(group.ref_logps is None and group.old_logps is None for group in groups)


# --- splitting ---------------------------------------------------------------------------------------------------------


def test_split_group_covers_once_in_order_within_budget():
    """Runs of responses, each with the prompt within tokens_per_forward, or a single response; none could take in the next."""
    prompt = {"input_ids": torch.zeros(1, 10)}
    for seed, budget in itertools.product(range(20), (1, 12, 15, 20, 30, 1000)):
        lengths = torch.randint(1, 9, (1 + seed % 7,), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [
            lengths[part]
            for part in split_group(
                PAPOConfig(tokens_per_forward=budget), prompt, [torch.zeros(n) for n in lengths]
            )
        ]
        assert sum(parts, []) == lengths and all(parts)
        assert all(10 + sum(part) <= budget or len(part) == 1 for part in parts)
        assert all(10 + sum(part) + following[0] > budget for part, following in zip(parts, parts[1:]))


def test_split_batch_covers_once_in_order():
    """updates_per_batch parts of nearly equal size, fewer only if there are fewer groups, never an empty one."""
    for n, updates in itertools.product(range(8), range(1, 6)):
        parts = split_batch(PAPOConfig(updates_per_batch=updates), list(range(n)))
        assert sum(parts, []) == list(range(n)) and len(parts) == min(n, updates) and all(parts)
        assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1


# --- rollouts ----------------------------------------------------------------------------------------------------------


def fake_grader(monkeypatch, is_mixed, calls):
    """sample_and_grade without a model: the group of row n is mixed if is_mixed(n), else all right or all wrong."""

    def fake(model, processor, config, rows, generator):
        calls.append(len(rows))
        accuracies = [[1.0, 0.0] if is_mixed(row) else [float(row % 2)] * 2 for row in rows]
        return [
            Group(row, None, [], [], [{"accuracy": a} for a in pair], None)
            for row, pair in zip(rows, accuracies)
        ]

    monkeypatch.setattr(papo, "sample_and_grade", fake)
    return SimpleNamespace(device="cpu")


def test_mixed():
    """Accuracy decides, not reward: groups that differ only in format teach nothing about answers."""
    mixed = lambda *accuracies: (
        Group(
            None, None, [], [], [{"accuracy": a, "reward": i} for i, a in enumerate(accuracies)], None
        ).mixed
    )
    assert (
        mixed(1.0, 0.0, 0.0)
        and mixed(0.0, 1.0, 1.0)
        and not mixed(0.0, 0.0, 0.0)
        and not mixed(1.0, 1.0, 1.0)
    )


def test_dynamic_sampling_redraws_and_stops(monkeypatch):
    """DAPO: only mixed groups are kept and the missing ones redrawn; after max_redraws the batch stays short."""
    options = dict(
        gamma=0.0, dynamic_sampling=True, prompts_per_batch=6, prompts_per_sample=4, updates_per_batch=1
    )

    def draw(model, **changes):
        return roll_out(
            model,
            None,
            PAPOConfig(**{**options, **changes}),
            itertools.count(),
            torch.Generator().manual_seed(0),
        )

    calls = []
    groups, redraws = draw(fake_grader(monkeypatch, lambda n: n % 3 == 0, calls))
    assert [group.row for group in groups] == [0, 3, 6, 9, 12, 15] and all(group.mixed for group in groups)
    assert calls[:2] == [4, 2] and sum(calls) == 16 and redraws == 5  # only the missing ones

    calls.clear()  # one group in a hundred is mixed: short batch after 20 redraws of at most 6 groups
    groups, redraws = draw(fake_grader(monkeypatch, lambda n: n % 100 == 50, calls))
    assert [group.row for group in groups] == [50] and redraws == 20
    calls.clear()
    assert (
        draw(fake_grader(monkeypatch, lambda n: False, calls), max_redraws=2) == ([], 2) and sum(calls) == 18
    )
    calls.clear()
    assert draw(fake_grader(monkeypatch, lambda n: True, calls))[1] == 0 and sum(calls) == 6
    calls.clear()  # without dynamic sampling every group is kept
    groups, redraws = draw(fake_grader(monkeypatch, lambda n: False, calls), dynamic_sampling=False)
    assert [group.row for group in groups] == list(range(6)) and redraws == 0 and calls == [4, 2]


ROWS = [
    {"images": [picture(k, 84, 56)], "problem": f"<image>What is shown here? {k}", "answer": "7"}
    for k in range(3)
]


def test_sample_and_grade(one_vlm, monkeypatch):
    """Texts are the decoded responses without special tokens, the reward sees them and the row's answer, and the advantages
    are those of the rewards."""
    model, processor = one_vlm
    calls = []

    def grade(text, answer, format_weight):
        calls.append((text, answer, format_weight))
        return {"reward": len(calls) % 3 / 2, "accuracy": 0.0, "format": 0.0}

    monkeypatch.setattr(papo, "compute_reward", grade)
    config = PAPOConfig(group_size=3, max_new_tokens=6, format_weight=0.3, temperature=0.9, top_p=0.8)
    hook = shift_logits(model, {processor.tokenizer.eos_token_id: 5.0})
    groups = papo.sample_and_grade(model, processor, config, ROWS[:2], torch.Generator().manual_seed(0))
    assert [group.row is row for group, row in zip(groups, ROWS)] == [True, True]
    prompts = [group.prompt for group in groups]
    expected = papo.sample_groups(model, processor, prompts, 3, 6, 0.9, 0.8, torch.Generator().manual_seed(0))
    hook.remove()
    assert any(o[-1] == processor.tokenizer.eos_token_id for group in groups for o in group.responses)
    texts = [text for group in groups for text in group.texts]
    assert [(text, "7", 0.3) for text in texts] == calls and len(texts) == 6
    for group, responses, row in zip(groups, expected, ROWS):
        assert all(torch.equal(a, b) for a, b in zip(group.responses, responses, strict=True))
        assert group.texts == [processor.tokenizer.decode(o, skip_special_tokens=True) for o in responses]
        assert torch.equal(group.advantages, papo.group_advantages([s["reward"] for s in group.scores]))
        assert torch.equal(
            group.prompt["input_ids"],
            papo.encode_prompt(processor, row["problem"], row["images"][0])["input_ids"],
        )
        assert group.masked_prompt is group.old_logps is group.ref_logps is None


def test_thinking_templates_open_the_tag_themselves(one_vlm, monkeypatch):
    """A thinking model's prompt ends with <think>: the response continues it, and the text that is graded shows it."""
    model, processor = one_vlm
    template = processor.chat_template
    monkeypatch.setattr(
        processor, "chat_template", template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    )
    config = PAPOConfig(group_size=2, max_new_tokens=4)
    draw = lambda: papo.sample_and_grade(
        model, processor, config, ROWS[:1], torch.Generator().manual_seed(0)
    )[0]
    group = draw()
    assert group.texts == [
        "<think>" + processor.tokenizer.decode(o, skip_special_tokens=True) for o in group.responses
    ]
    monkeypatch.setattr(processor, "chat_template", template)
    assert not any(text.startswith("<think>") for text in draw().texts)


def test_masking_does_not_move_the_sampling(one_vlm):
    """gamma = 0 and gamma > 0 sample the same responses from the same seed, also in the next rollout; masks are drawn only if
    the loss needs them, fresh each time, from the same seed again the same."""
    model, processor = one_vlm

    def run(**options):
        config = PAPOConfig(
            group_size=2,
            max_new_tokens=5,
            prompts_per_batch=3,
            prompts_per_sample=2,
            mask_ratio=0.5,
            **options,
        )
        generator = torch.Generator().manual_seed(5)
        return [
            group
            for _ in range(2)
            for group in roll_out(model, processor, config, itertools.cycle(ROWS), generator)[0]
        ]

    plain, masked, again, eta = run(gamma=0.0), run(gamma=0.1), run(gamma=0.1), run(gamma=0.0, eta2=0.1)
    responses = lambda groups: [o.tolist() for group in groups for o in group.responses]
    assert responses(plain) == responses(masked) == responses(eta) and responses(plain[:3]) != responses(
        plain[3:]
    )
    assert all(group.masked_prompt is None and group.masked_image is None for group in plain)
    pixels = lambda groups: [group.masked_image.tobytes() for group in groups]
    assert pixels(masked) == pixels(again) == pixels(eta) and len(set(pixels(masked))) == 6


def test_masked_prompts_are_aligned(vlm):
    """The masked prompt holds the unmasked one's patches, or black ones, mask_ratio of them, at the config's patch size."""
    model, processor = vlm
    patch = processor.image_processor.patch_size
    config = PAPOConfig(group_size=2, max_new_tokens=2, prompts_per_batch=3, patch_size=patch)
    groups, _ = roll_out(model, processor, config, iter(ROWS), torch.Generator().manual_seed(0))
    for group in groups:
        assert torch.equal(group.masked_prompt["input_ids"], group.prompt["input_ids"])
        same = (group.masked_prompt["pixel_values"] == group.prompt["pixel_values"]).all(1)
        black = group.masked_prompt["pixel_values"].amax(1) < -1.4  # black in all channels and nothing else
        assert (same ^ black).all() and 0 < black.sum() < len(black)
    config.mask_ratio = 1.0
    groups, _ = roll_out(model, processor, config, iter(ROWS), torch.Generator().manual_seed(0))
    assert all((group.masked_prompt["pixel_values"] < -1.4).all() for group in groups)


def test_a_frozen_vision_tower_runs_once_per_picture(one_vlm):
    """With nothing to train in the tower, image and masked image are encoded once each in the rollout and never again; the
    metrics are those of a tower that runs in every pass."""
    model, processor = one_vlm
    config = PAPOConfig(
        gamma=0.1,
        beta=0.0,
        eta2=0.1,
        group_size=2,
        max_new_tokens=4,
        prompts_per_batch=3,
        updates_per_batch=1,
    )
    calls, metrics = [], []
    hook = model.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    for trainable in (False, True):
        model.model.visual.requires_grad_(False)
        next(model.model.visual.parameters()).requires_grad_(trainable)  # a single trained weight is enough
        groups, _ = roll_out(model, processor, config, iter(ROWS), torch.Generator().manual_seed(0))
        assert len(calls) == (
            1 if trainable else 2 * len(ROWS)
        )  # trainable: one sampling pass for all three prompts
        assert all(
            ("features" in prompt) != trainable
            for group in groups
            for prompt in (group.prompt, group.masked_prompt)
        )
        metrics.append(papo_step(model, Recorder(model), config, groups))
        assert len(calls) == (1 + 2 * len(ROWS) if trainable else 2 * len(ROWS))
        calls.clear()
    hook.remove()
    assert all(
        metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-5)
        for name in metrics[0]
        if name != "grad_norm"
    )
    assert metrics[0]["grad_norm"] < metrics[1]["grad_norm"]


def test_a_whole_step_from_rollout_to_update(one_vlm):
    """All of it in the order of a trainer: roll out, score the constants, two updates; only the second has a ratio to clip."""
    model, processor = one_vlm
    config = PAPOConfig(
        gamma=0.1,
        beta=0.1,
        eta1=0.01,
        eta2=0.01,
        group_size=3,
        max_new_tokens=5,
        prompts_per_batch=3,
        updates_per_batch=2,
        prompts_per_sample=3,
    )
    groups, redraws = roll_out(model, processor, config, iter(ROWS), torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for group in groups:
        group.advantages = torch.randn(3, generator=generator)
    frozen = copy.deepcopy(model)
    score_constants(model, lambda: _given(frozen), config, groups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    first, second = (papo_step(model, optimizer, config, update) for update in split_batch(config, groups))
    assert redraws == 0 and first["kl_ref"] == pytest.approx(0, abs=1e-6) and second["kl_ref"] > 1e-3
    assert (
        first["clip_high_fraction"]
        == first["clip_low_fraction"]
        == 0
        < second["clip_high_fraction"] + second["clip_low_fraction"]
    )
    assert first["kl_prcp"] > 0.01 and first["skipped"] == second["skipped"] == 0


@contextmanager
def _given(model):
    yield model
