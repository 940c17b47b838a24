"""sample_groups: the loop samples from the policy that group_logps scores, and from nothing
else."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import SPECIAL_TOKENS, seeded, shift_logits, two_prompts
from torch.nn.utils.rnn import pad_sequence

import papo
from papo import group_logps, sample_groups, sample_token

ID = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
VISION = [ID[f"<|{name}|>"] for name in ("vision_start", "vision_end", "image_pad", "video_pad")]
EOS, OTHER_END = ID["<|im_end|>"], ID["<|endoftext|>"]
ORDINARY = 145  # a token that these models like


def sample(model, processor, *sizes, seed=0, prompts=None, **options):
    prompts = two_prompts(processor) if prompts is None else prompts
    return sample_groups(model, processor, prompts, *sizes, generator=seeded(seed), **options)


def flat(groups):
    return [o.tolist() for group in groups for o in group]


def greedy_by_generate(model, processor, prompts, n, **options):
    """model.generate on the left-padded batch: the n new tokens of each prompt."""
    rows, pad = [p["input_ids"][0] for p in prompts], processor.tokenizer.pad_token_id
    pad_left = lambda rows, value: pad_sequence(rows, True, value, padding_side="left")
    ids, images = pad_left(rows, pad), ("pixel_values", "image_grid_thw")
    seen = pad_left([torch.ones_like(row) for row in rows], 0)
    options |= dict(do_sample=False, max_new_tokens=n, suppress_tokens=VISION)
    options |= {name: torch.cat([p[name] for p in prompts]) for name in images}
    types = (ids == processor.image_token_id).int()
    out = model.generate(input_ids=ids, attention_mask=seen, mm_token_type_ids=types, **options)
    return out[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("end_bias", [0.0, 3.0])  # 3: some rows end early
def test_greedy_equals_generate(vlm, end_bias):
    """temperature 0, a left-padded batch of prompts and images of different sizes: token for token
    model.generate, and nothing depends on the batch, or on who runs the vision tower."""
    model, processor = vlm
    prompts = two_prompts(processor)
    shift_logits(model, {EOS: end_bias})
    expected = greedy_by_generate(model, processor, prompts, 24)
    groups = sample(model, processor, 2, 24, temperature=0)
    alone = [sample(model, processor, 2, 24, prompts=[p], temperature=0)[0] for p in prompts]
    encoded = [papo.encode_image(model, prompt) for prompt in prompts]  # as of a frozen tower
    by_features = sample(model, processor, 2, 24, prompts=encoded, temperature=0)
    assert [len(group) for group in groups] == [2, 2]
    assert flat(groups) == flat(alone) == flat(by_features)
    for group, row in zip(groups, expected):
        for response in group:
            assert response.dtype == torch.long and response.dim() == 1
            assert response.tolist() == row[: len(response)]
            assert len(response) == 24 or response[-1] == EOS
    if end_bias:
        assert len(groups[0][0]) != len(groups[1][0])
    else:
        assert len(set(groups[0][0].tolist())) > 3  # not one token repeated: positions matter


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logits_are_the_scored_policy(vlm, temperature, monkeypatch):
    """The distribution each token is drawn from gives it the log-prob that group_logps finds, to
    1e-4; what has ended costs nothing: its rows leave the batch as soon as they are a quarter of
    it."""
    model, processor = vlm
    prompts, seen = two_prompts(processor), []

    def spy(logits, *args):
        seen.append((logits.clone(), sample_token(logits, *args)))
        return seen[-1][1]

    monkeypatch.setattr(papo, "sample_token", spy)
    # Vision tokens, never drawn but part of the scored softmax, are made impossible for both.
    # The bias towards the end, which the small Qwen3 likes least, ends all at different times.
    bias = 7.5 if model.config.model_type == "qwen3_vl" else 5.0
    shift_logits(model, {**dict.fromkeys(VISION, -1e4), EOS: bias})
    groups = sample(model, processor, 6, 16, temperature=temperature)
    with torch.no_grad():
        scored = [group_logps(model, *pair, temperature)[0] for pair in zip(prompts, groups)]
    rows, responses = [row for logps in scored for row in logps], flat(groups)
    going = list(range(12))  # the responses that the rows of a step belong to
    for t, (logits, drawn) in enumerate(seen):
        alive = [i for i in going if len(responses[i]) > t]
        if len(logits) < len(going):  # ended ones were dropped, and no others
            going = alive
        assert len(logits) == len(going) < len(alive) / 0.75 + 1
        picked = (logits / temperature).log_softmax(-1)[range(len(drawn)), drawn]
        for row, i in enumerate(going):
            if i in alive:  # else ended, and not dropped yet
                assert drawn[row] == responses[i][t]
                assert picked[row].item() == pytest.approx(rows[i][t].item(), abs=1e-4)
    assert len(going) < 6 and len(set(map(len, responses))) > 3


def test_generation_config_changes_nothing(vlm):
    """Qwen2.5-VL ships temperature 1e-6 and a repetition penalty: inherited, they make a group's
    responses alike."""
    model, processor = vlm
    draw = lambda: [flat(sample(model, processor, 3, 8, temperature=t)) for t in (1.0, 0)]
    expected = draw()
    shipped = dict(do_sample=True, temperature=1e-6, top_k=1, top_p=0.01, eos_token_id=300)
    shipped |= dict(repetition_penalty=5.0, no_repeat_ngram_size=1, max_new_tokens=1)
    shipped |= dict(suppress_tokens=list(range(100, 300)))
    model.generation_config = transformers.GenerationConfig(**shipped)
    assert draw() == expected and len(set(map(tuple, expected[0]))) > 3


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_vision_tokens_are_never_sampled(vlm, temperature):
    """Even if the model wants nothing else: in a response they would be taken for image
    positions."""
    model, processor = vlm
    shift_logits(model, dict.fromkeys(VISION, 100.0))
    groups = sample(model, processor, 4, 8, temperature=temperature)
    assert not set(sum(flat(groups), [])) & set(VISION)
    group_logps(model, two_prompts(processor)[0], groups[0])  # and so all can be scored


def test_same_seed_same_responses(one_vlm):
    """The generator alone decides; torch's global one is neither read nor moved."""
    draw = lambda seed: flat(sample(*one_vlm, 3, 8, seed=seed))
    torch.manual_seed(0)
    state, first = torch.get_rng_state(), draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert draw(0) == first != draw(5)


def test_responses_end_with_their_first_end_token(one_vlm):
    """Cut after the first EOS, EOS included; without one, max_new_tokens long. Padding with EOS
    changes nothing."""
    model, processor = one_vlm
    shift_logits(model, {EOS: 5.0})
    responses = flat(sample(model, processor, 16, 12, seed=3))
    for o in responses:
        assert EOS not in o[:-1] and (o[-1] == EOS or len(o) == 12)
    lengths = set(map(len, responses))
    assert len(lengths) > 4 and {1, 12} <= lengths and any(o[-1] != EOS for o in responses)
    assert set(map(len, flat(sample(model, processor, 16, 1, seed=3)))) == {1}
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    assert flat(sample(model, processor, 16, 12, seed=3)) == responses


@pytest.mark.parametrize("listed", [OTHER_END, [EOS, OTHER_END], [ORDINARY, OTHER_END]])
def test_a_second_end_token_ends_a_response(one_vlm, listed):
    """Qwen2.5-VL's generation_config lists <|im_end|> and <|endoftext|>: both stop, as in
    model.generate; an ordinary token that is listed does not."""
    model, processor = one_vlm
    model.generation_config = transformers.GenerationConfig(eos_token_id=listed)
    shift_logits(model, {EOS: 4.0, OTHER_END: 4.0})
    ends, prompts = {EOS, OTHER_END}, two_prompts(processor)[:1]
    greedy = sample(model, processor, 2, 12, prompts=prompts, temperature=0)[0][0]
    options = dict(eos_token_id=[EOS, OTHER_END])
    assert [greedy.tolist()] == greedy_by_generate(model, processor, prompts, 12, **options)
    responses = flat(sample(model, processor, 16, 12, seed=3))
    assert {o[-1] for o in responses if len(o) < 12} == ends
    inner = {token for o in responses for token in o[:-1]}
    assert ORDINARY in inner and not ends & inner


def test_sampling_stops_when_all_have_ended(one_vlm, monkeypatch):
    """Row i of four ends at step i + 1: four steps, not one and not fifty. One prefill for the two
    prompts, then rows only for what goes on."""
    model, processor = one_vlm
    sizes = []
    fake = lambda logits, *_: torch.where(torch.arange(len(logits)) == 0, EOS, 9)  # the first ends
    monkeypatch.setattr(papo, "sample_token", fake)
    hook = model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    groups = sample(model, processor, 2, 50)
    hook.remove()
    assert [len(o) for o in flat(groups)] == [1, 2, 3, 4] and sizes == [2, 3, 2, 1]
    with pytest.raises(ValueError, match="no prompts"):
        sample(model, processor, 2, 8, prompts=[])


def test_training_mode_and_checkpointing(vlm):
    """Under train() there may be dropout, and no KV cache in a gradient-checkpointed layer:
    sampling happens in eval() and then restores the mode."""
    model, processor = vlm
    drop = lambda head, inputs, logits: F.dropout(logits, 0.9, training=head.training)
    model.get_output_embeddings().register_forward_hook(drop)
    expected = flat(sample(model, processor, 2, 8))
    assert not model.training
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert flat(sample(model, processor, 2, 8)) == expected
    assert model.training and model.model.training


@pytest.mark.parametrize(
    "temperature, top_p",
    [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.9), (1.0, 0.6), (2.0, 0.75), (1.0, 0.01)],
)
def test_sample_token_frequencies(temperature, top_p):
    """30,000 draws: each frequency within 4.5 standard deviations of softmax(logits / T), truncated
    to the likeliest tokens that together reach top_p."""
    logits, n = torch.tensor([0.3, 2.0, -1.0, 1.1, -torch.inf, 0.9]), 30_000
    expected, mass = (logits / temperature).softmax(0), 0.0
    for i in sorted(range(6), key=lambda i: -expected[i]):
        mass, expected[i] = mass + expected[i].item(), expected[i] if mass < top_p else 0.0
    expected /= expected.sum()
    tokens = sample_token(logits.expand(n, -1), temperature, top_p, seeded())
    found = torch.bincount(tokens, minlength=6) / n
    assert tokens.shape == (n,) and not found[expected == 0].any()
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4.5 * deviation + 1e-6).all(), (found, expected)


def test_sample_token_rows_are_independent():
    """Each row its own distribution, in the caller's order of tokens; temperature 0: the
    likeliest."""
    logits = torch.full((4, 9), -30.0)
    logits[torch.arange(4), torch.tensor([7, 0, 3, 8])] = 30.0
    for options in (dict(), dict(top_p=0.5), dict(temperature=0)):
        assert sample_token(logits, **options).tolist() == [7, 0, 3, 8]


def test_the_edges_of_the_mass(monkeypatch):
    """Half the mass is on one token: at top_p = 0.5 that token alone is the smallest set that has
    it, as in transformers. A random number of exactly 0 draws no token of probability 0."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(2000, 3)
    assert not sample_token(logits, 1.0, 0.5, seeded()).any()
    rand = lambda *shape, generator, **kind: torch.zeros(*shape, **kind)
    monkeypatch.setattr(torch, "rand", rand)
    assert sample_token(torch.tensor([[-torch.inf, 0.0, 0.0]])).tolist() == [1]
