"""sample_groups: the loop samples from the policy that group_logps scores, and from nothing else."""

import pytest
import torch
import transformers
from conftest import SPECIAL_TOKENS, shift_logits, two_prompts

import papo
from papo import group_logps, sample_groups, sample_token

VISION = [
    SPECIAL_TOKENS.index(name)
    for name in ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
]
EOS = SPECIAL_TOKENS.index("<|im_end|>")


def same(a, b):
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def left_padded(processor, prompts):
    """The batch for model.generate, built with loops."""
    width = max(p["input_ids"].shape[1] for p in prompts)
    rows, seen = [], []
    for p in prompts:
        ids = p["input_ids"][0].tolist()
        rows.append([processor.tokenizer.pad_token_id] * (width - len(ids)) + ids)
        seen.append([0] * (width - len(ids)) + [1] * len(ids))
    ids = torch.tensor(rows)
    return dict(
        input_ids=ids,
        attention_mask=torch.tensor(seen),
        pixel_values=torch.cat([p["pixel_values"] for p in prompts]),
        image_grid_thw=torch.cat([p["image_grid_thw"] for p in prompts]),
        mm_token_type_ids=(ids == processor.image_token_id).int(),
    )


@pytest.mark.parametrize("end_bias", [0.0, 4.0])  # 4: some rows end early
def test_greedy_equals_generate(vlm, end_bias):
    """temperature 0, a left-padded batch of prompts and images of different sizes: token for token model.generate."""
    model, processor = vlm
    prompts = two_prompts(processor)
    hook = shift_logits(model, {EOS: end_bias})
    batch = left_padded(processor, prompts)
    expected = model.generate(**batch, do_sample=False, max_new_tokens=24, suppress_tokens=VISION)[
        :, batch["input_ids"].shape[1] :
    ]
    groups = sample_groups(model, processor, prompts, 2, 24, temperature=0)
    alone = [sample_groups(model, processor, [prompt], 2, 24, temperature=0)[0] for prompt in prompts]
    hook.remove()
    assert len(groups) == 2 and all(len(group) == 2 for group in groups)
    for group, row in zip(groups, expected):
        for response in group:
            assert response.dtype == torch.long and response.dim() == 1
            assert response.tolist() == row[: len(response)].tolist()
            assert len(response) == 24 or response[-1] == EOS
    assert same(groups, alone)  # nothing depends on the batch
    if end_bias:
        assert len(groups[0][0]) != len(groups[1][0])
    else:
        assert len(set(groups[0][0].tolist())) > 3  # no row that only repeats itself: positions matter


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logits_are_the_scored_policy(vlm, temperature, monkeypatch):
    """The distribution each token is drawn from gives it the log-prob that group_logps finds, to 1e-4."""
    model, processor = vlm
    prompts, seen = two_prompts(processor), []

    def spy(logits, *args):
        seen.append((logits.clone(), sample_token(logits, *args)))
        return seen[-1][1]

    monkeypatch.setattr(papo, "sample_token", spy)
    # Vision tokens, never drawn but part of the scored softmax, are made impossible for both; the end is made likely.
    hook = shift_logits(model, {**dict.fromkeys(VISION, -1e4), EOS: 6.0})
    groups = sample_groups(
        model, processor, prompts, 3, 10, temperature, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        rows = [
            row for p, group in zip(prompts, groups) for row in group_logps(model, p, group, temperature)[0]
        ]
    hook.remove()
    responses = [o for group in groups for o in group]
    assert len({len(o) for o in responses}) > 1
    going = list(range(len(responses)))  # the responses that the rows of a step belong to
    for t, (logits, drawn) in enumerate(seen):
        if len(logits) < len(going):  # ended ones were dropped, and no others
            going = [i for i in going if len(responses[i]) > t]
        assert len(logits) == len(going)
        for row, i in enumerate(going):
            if t >= len(responses[i]):
                continue  # ended, and not dropped yet
            token = responses[i][t]
            assert drawn[row] == token
            assert (logits[row] / temperature).log_softmax(-1)[token].item() == pytest.approx(
                rows[i][t].item(), abs=1e-4
            )


def test_generation_config_changes_nothing(vlm):
    """Qwen2.5-VL ships temperature 1e-6 and a repetition penalty: inherited, they make a group's responses alike."""
    model, processor = vlm
    prompts = two_prompts(processor)
    draw = lambda **options: sample_groups(
        model, processor, prompts, 3, 8, generator=torch.Generator().manual_seed(1), **options
    )
    expected = draw(), draw(temperature=0)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=5.0,
        top_k=1,
        top_p=0.01,
        max_new_tokens=1,
        eos_token_id=300,
        no_repeat_ngram_size=1,
        suppress_tokens=list(range(100, 300)),
    )
    assert same(draw(), expected[0]) and same(draw(temperature=0), expected[1])
    assert len({tuple(o.tolist()) for o in expected[0][0]}) == 3


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vision_tokens_are_never_sampled(vlm, temperature):
    """Even if the model wants nothing else: in a response they would be taken for image positions."""
    model, processor = vlm
    hook = shift_logits(model, dict.fromkeys(VISION, 100.0))
    groups = sample_groups(
        model,
        processor,
        two_prompts(processor),
        4,
        8,
        temperature,
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    assert not torch.isin(torch.cat([o for group in groups for o in group]), torch.tensor(VISION)).any()
    group_logps(model, two_prompts(processor)[0], groups[0])  # and so all can be scored


def test_same_seed_same_responses(one_vlm):
    """The generator alone decides; torch's global one is neither read nor moved."""
    model, processor = one_vlm
    draw = lambda seed: sample_groups(
        model, processor, two_prompts(processor), 3, 8, generator=torch.Generator().manual_seed(seed)
    )
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert same(draw(0), first) and not same(draw(5), first)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_responses_end_with_their_first_end_token(one_vlm, pad_is_eos):
    """Cut after the first EOS, EOS included; without one, max_new_tokens long. Padding with EOS changes nothing."""
    model, processor = one_vlm
    hook = shift_logits(model, {EOS: 5.0})
    draw = lambda n: sample_groups(
        model, processor, two_prompts(processor), 16, n, generator=torch.Generator().manual_seed(3)
    )
    expected = draw(12)
    if pad_is_eos:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    groups, single = draw(12), draw(1)
    processor.tokenizer.pad_token = "<|endoftext|>"
    hook.remove()
    assert same(groups, expected)
    responses = [o.tolist() for group in groups for o in group]
    for o in responses:
        assert 1 <= len(o) <= 12 and EOS not in o[:-1] and (o[-1] == EOS or len(o) == 12)
    lengths = {len(o) for o in responses}
    assert len(lengths) > 4 and any(o[-1] != EOS for o in responses) and 1 in lengths
    assert all(len(o) == 1 for group in single for o in group)


def test_sampling_stops_when_all_have_ended(one_vlm, monkeypatch):
    """Row i of four ends at step i + 1: four steps, not one and not fifty."""
    model, processor = one_vlm
    calls = []

    def fake(logits, *_):
        calls.append(1)
        return torch.where(torch.arange(len(logits)) == 0, EOS, 9)  # the first of those that go on

    monkeypatch.setattr(papo, "sample_token", fake)
    groups = sample_groups(model, processor, two_prompts(processor), 2, 50)
    assert [[len(o) for o in group] for group in groups] == [[1, 2], [3, 4]] and len(calls) == 4


def test_sampling_with_image_features(vlm):
    """Prompts that carry a frozen tower's features (encode_image), several in a batch: the same responses."""
    model, processor = vlm
    prompts = two_prompts(processor)
    encoded = [papo.encode_image(model, prompt) for prompt in prompts]
    for temperature in (0, 1.0):
        draw = lambda prompts: sample_groups(
            model, processor, prompts, 2, 8, temperature, generator=torch.Generator().manual_seed(0)
        )
        a, b = draw(prompts), draw(encoded)
        assert same(a, b)


def test_training_mode_and_checkpointing(vlm):
    """Under train() a gradient-checkpointed layer drops its KV cache: sampling happens in eval() and then restores the mode."""
    model, processor = vlm
    draw = lambda: sample_groups(
        model, processor, two_prompts(processor), 2, 8, generator=torch.Generator().manual_seed(0)
    )
    expected = draw()
    assert not model.training
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert same(draw(), expected) and model.training and model.model.training


@pytest.mark.parametrize(
    "listed", [SPECIAL_TOKENS.index("<|endoftext|>"), [EOS, SPECIAL_TOKENS.index("<|endoftext|>")]]
)
def test_a_second_end_token_ends_a_response(one_vlm, listed):
    """Qwen2.5-VL's generation_config lists <|im_end|> and <|endoftext|>: both stop, as in model.generate."""
    model, processor = one_vlm
    other, prompts = SPECIAL_TOKENS.index("<|endoftext|>"), two_prompts(processor)
    model.generation_config = transformers.GenerationConfig(eos_token_id=listed)
    hook = shift_logits(model, {EOS: 4.0, other: 4.0})
    groups = sample_groups(model, processor, prompts, 16, 12, generator=torch.Generator().manual_seed(3))
    greedy = sample_groups(model, processor, prompts[:1], 2, 12, temperature=0)[0][0]
    batch = left_padded(processor, prompts[:1])
    expected = model.generate(
        **batch, do_sample=False, max_new_tokens=12, suppress_tokens=VISION, eos_token_id=[EOS, other]
    )
    hook.remove()
    assert greedy.tolist() == expected[0, batch["input_ids"].shape[1] :].tolist()
    responses = [o.tolist() for group in groups for o in group]
    last = {o[-1] for o in responses if len(o) < 12}
    assert last == {EOS, other} and all(not {EOS, other} & set(o[:-1]) for o in responses)


def test_ended_rows_leave_the_batch(one_vlm, monkeypatch):
    """What has ended costs nothing: rows of the forward passes shrink as responses end, to those that still go on."""
    model, processor = one_vlm
    sizes = []

    def count(module, args, kwargs):
        sizes.append(len(kwargs["input_ids"]))

    hooks = [shift_logits(model, {EOS: 5.0}), model.register_forward_pre_hook(count, with_kwargs=True)]
    groups = sample_groups(
        model, processor, two_prompts(processor), 16, 30, generator=torch.Generator().manual_seed(3)
    )
    for hook in hooks:
        hook.remove()
    lengths = [len(o) for group in groups for o in group]
    assert sizes[0] == 2  # the prefill
    for t, size in enumerate(sizes[1:], start=1):
        going = sum(length > t for length in lengths)
        assert going <= size < going / 0.75 + 1
    assert sizes[-1] < 8


def test_no_prompts(one_vlm):
    with pytest.raises(ValueError, match="no prompts"):
        sample_groups(*one_vlm, [], 2, 8)


# --- one token ---------------------------------------------------------------------------------------------------------


def truncated(logits, temperature, top_p):
    """The likeliest tokens until their mass reaches top_p, rescaled; with loops."""
    probs = [float(x) for x in (logits / temperature).double().softmax(0)]
    kept, mass = [0.0] * len(probs), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        if mass < top_p:
            kept[i] = probs[i]
            mass += probs[i]
    return torch.tensor([p / mass for p in kept])


@pytest.mark.parametrize(
    "temperature, top_p",
    [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.0, 0.6), (2.0, 0.75), (1.0, 0.01)],
)
def test_sample_token_frequencies(temperature, top_p):
    """30,000 draws: each frequency within 4.5 standard deviations of softmax(logits / T), truncated to top-p."""
    logits, n = torch.tensor([0.3, 2.0, -1.0, 1.1, -torch.inf, 0.9]), 30_000
    tokens = sample_token(logits.expand(n, -1), temperature, top_p, torch.Generator().manual_seed(0))
    expected = truncated(logits, temperature, top_p)
    found = torch.bincount(tokens, minlength=6) / n
    assert tokens.shape == (n,) and not found[expected == 0].any()
    assert ((found - expected).abs() <= 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-6).all(), (
        found,
        expected,
    )


def test_sample_token_rows_are_independent():
    """Each row its own distribution, in the caller's order of tokens; temperature 0 takes the likeliest."""
    logits = torch.full((4, 9), -30.0)
    logits[torch.arange(4), torch.tensor([7, 0, 3, 8])] = 30.0
    for options in (dict(), dict(top_p=0.5), dict(temperature=0)):
        assert sample_token(logits, **options).tolist() == [7, 0, 3, 8]


def test_top_p_keeps_the_smallest_set_that_has_the_mass():
    """Half the mass is on one token: at top_p = 0.5 that token alone is the smallest set, as in transformers."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2000, 3)
    assert not papo.sample_token(logits, 1.0, 0.5, torch.Generator().manual_seed(0)).any()
