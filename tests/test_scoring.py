"""group_logps: a group scored as one row equals each response scored alone by stock code."""

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, random_responses, seeded, stock_score, two_prompts
from torch.nn.utils.rnn import pad_sequence

import papo
from papo import group_logps, token_logps


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def close_gradients(given, expected):
    assert len(given) > 10 and given.keys() == expected.keys()
    for name, x in expected.items():
        close(given[name], x, 1e-4 * max(1.0, x.abs().max().item()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths, temperature", [([5, 1, 9, 3], 1.0), ([4], 0.7)])
def test_group_row_equals_one_stock_forward_per_response(vlm, lengths, temperature, checkpointing):
    """Log-probs, entropies and the gradients of all parameters, also with the layers recomputed in
    backward. EOS, here also the padding token, counts as a response token, or stopping would never
    be learned; padding does not. The prompt runs once, and so does its image."""
    model, processor = vlm
    processor.tokenizer.pad_token = processor.tokenizer.eos_token
    prompt, responses = two_prompts(processor)[1], random_responses(processor, lengths)
    scores = [stock_score(model, prompt, o, temperature) for o in responses]
    naive = [pad_sequence(rows, batch_first=True) for rows in zip(*scores)]  # log-probs, entropies
    weights = torch.rand(2, len(lengths), max(lengths), generator=seeded(1))
    expected = gradients(model, (weights * torch.stack(naive)).sum())

    if checkpointing:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    tokens, images = [], []  # that the layers and the vision tower run over
    inner = model.model.language_model.layers[0].mlp  # runs again if its layer is recomputed
    hook = inner.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].shape[:2]))
    other = model.model.visual.register_forward_pre_hook(lambda *_: images.append(1))
    logps, mask, entropy = group_logps(model, prompt, responses, temperature, with_entropy=True)
    result = gradients(model, (weights[0] * logps + weights[1] * mask * entropy).sum())
    hook.remove(), other.remove()
    row = (1, prompt["input_ids"].shape[1] + sum(lengths))  # one row, without padding, for all
    assert tokens == [row] * (2 if checkpointing else 1) and images == [1]
    assert mask.tolist() == [[float(t < n) for t in range(max(lengths))] for n in lengths]
    close(logps, naive[0])  # 0 on padding
    close(mask * entropy, naive[1])
    assert logps.dtype == entropy.dtype == torch.float32
    close_gradients(result, expected)


def test_the_picture_matters(vlm):
    """These models do look: a black image moves the log-probs by nats, which are far from
    uniform."""
    model, processor = vlm
    prompt, responses = two_prompts(processor)[1], random_responses(processor, [6, 6])
    black = {**prompt, "pixel_values": torch.full_like(prompt["pixel_values"], -1.8)}
    with torch.no_grad():
        logps, mask, entropy = group_logps(model, prompt, responses, with_entropy=True)
        assert (logps - group_logps(model, black, responses)[0]).abs().mean() > 0.3
    assert entropy.max() < 0.8 * torch.tensor(float(len(processor.tokenizer))).log()


@torch.no_grad()
def test_responses_do_not_see_each_other(vlm):
    """Changing one leaves the others' log-probs; permuting the responses permutes the rows."""
    model, processor = vlm
    prompt, responses = two_prompts(processor)[0], random_responses(processor, [4, 6, 2])
    other, order = random_responses(processor, [6], seed=9)[0], [2, 0, 1]
    score = lambda *responses: group_logps(model, prompt, responses)[0]
    logps, changed = score(*responses), score(responses[0], other, responses[2])
    close(changed[[0, 2]], logps[[0, 2]])
    assert (changed[1] - logps[1]).abs().max() > 0.1
    close(score(*(responses[i] for i in order)), logps[order])


def test_what_cannot_be_scored(one_vlm):
    """A vision token would be taken for an image position; no response has nothing to score."""
    model, processor = one_vlm
    id_of, prompt = processor.tokenizer.convert_tokens_to_ids, two_prompts(processor)[0]
    names = "image_pad video_pad vision_start vision_end".split()
    bad = [("vision token", [torch.tensor([9, id_of(f"<|{name}|>"), 10])]) for name in names]
    bad += [("at least one", []), ("at least one", [torch.tensor([9]), torch.tensor([]).long()])]
    for words, responses in bad:
        with pytest.raises(ValueError, match=words):
            group_logps(model, prompt, responses)


@torch.no_grad()
def test_positions_depend_on_nothing_but_the_prompt(vlm):
    """Neither token types missing from the prompt nor rope_deltas left by an earlier generate call
    change a number."""
    model, processor = vlm
    (first, second), responses = two_prompts(processor), random_responses(processor, [4, 7])
    expected = pad_sequence([stock_score(model, second, o)[0] for o in responses], batch_first=True)
    model.generate(**first, max_new_tokens=2, do_sample=False)
    assert model.model.rope_deltas is not None
    close(group_logps(model, second, responses)[0], expected)
    model.model.rope_deltas = torch.tensor([[1000]])
    bare = {name: second[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}
    close(group_logps(model, bare, responses)[0], expected)


def test_the_positions_in_the_docstring_are_the_models(vlm):
    """rope_positions' picture: two tokens of text (the second starts the image), 2 x 3 visual
    tokens, two of text."""
    model, _ = vlm
    c = model.config
    image = [c.vision_start_token_id] + 6 * [c.image_token_id] + [c.vision_end_token_id]
    images = {"image_grid_thw": torch.tensor([[1, 4, 6]])}  # in patches
    lines = papo.rope_positions.__doc__.splitlines()
    drawn = [[int(x) for x in line.split()[1:]] for line in lines if line.count("  ") > 8]
    found = papo.rope_positions(model, torch.tensor([[100, *image, 101]]), images)
    assert len(drawn) == 3 and found[:, 0].tolist() == drawn


def test_features_of_a_frozen_vision_tower(vlm):
    """Scoring with what encode_image keeps gives the same log-probs and the same gradients of all
    but the tower. Kept is what the language model reads and no more, in host memory: no pixels, not
    the tower's last hidden state."""
    model, processor = vlm
    prompt, responses = two_prompts(processor)[1], random_responses(processor, [4, 7])
    model.model.visual.requires_grad_(False)
    encoded = papo.encode_image(model, prompt)
    logps, expected = (group_logps(model, view, responses)[0] for view in (encoded, prompt))
    close(logps, expected)
    close_gradients(*(gradients(model, x.sum()) for x in (logps, expected)))

    features = encoded["features"]
    assert encoded.keys() == prompt.keys() - {"pixel_values"} | {"features"}
    assert features.get("last_hidden_state") is None and "features" not in prompt
    layers = features.get("deepstack_features") or []
    kept = [*features.pooler_output, *(x for layer in layers for x in layer)]
    shape = int(prompt["image_grid_thw"].prod()) // 4, model.config.text_config.hidden_size
    assert all(x.shape == shape and x.device.type == "cpu" for x in kept)
    assert len(kept) == 1 + (2 if model.config.model_type == "qwen3_vl" else 0)


def test_attention_kinds(vlm, monkeypatch):
    """The row's mask means the same to eager attention; kinds that take no such mask are refused,
    not run without it."""
    model, processor = vlm
    prompt, responses = two_prompts(processor)[0], random_responses(processor, [3, 5])
    with torch.no_grad():
        expected = group_logps(model, prompt, responses)[0]
        model.set_attn_implementation("eager")
        close(group_logps(model, prompt, responses)[0], expected)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="flash_attention_2"):
        group_logps(model, prompt, responses)


def head_inputs(N=23, H=8, V=50):
    g, head = seeded(), torch.nn.Linear(H, V, bias=False)
    head.weight.data = torch.randn(V, H, generator=g)
    hidden = torch.randn(N, H, generator=g).requires_grad_()
    return hidden, torch.randint(V, (N,), generator=g), head


@pytest.mark.parametrize("chunk, temperature", [(4, 1.0), (23, 0.6), (1, 2.0), (100, 1.0)])
def test_chunked_head_equals_the_naive_one(chunk, temperature, monkeypatch):
    """Values and gradients of log-probs and exact entropy, whether or not the chunks divide N."""
    monkeypatch.setattr(papo, "HEAD_CHUNK", chunk)
    hidden, targets, head = head_inputs()
    log_probs = F.log_softmax(head(hidden) / temperature, dim=-1)
    naive = log_probs[torch.arange(23), targets], -(log_probs.exp() * log_probs).sum(1)
    result = token_logps(hidden, targets, head, temperature, with_entropy=True)
    weights = torch.arange(46.0).view(2, 23) / 46
    slopes = lambda x: torch.autograd.grad((torch.stack(x) * weights).sum(), (hidden, head.weight))
    for a, b in zip([*result, *slopes(result)], [*naive, *slopes(naive)], strict=True):
        close(a, b)


def test_the_head_never_holds_all_logits(monkeypatch):
    """Forward keeps no tensor with V columns for backward, and no call of the head, in forward or
    in backward, sees more than a chunk; a plain loop over chunks would keep all N x V numbers.
    Without with_entropy no probability of the whole vocabulary is formed; the log-probs are the
    same bits."""
    monkeypatch.setattr(papo, "HEAD_CHUNK", 4)
    hidden, targets, head = head_inputs()
    kept, rows, exponentials, exp = [], [], [], torch.Tensor.exp
    hook = head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        logps, entropy = token_logps(hidden, targets, head, with_entropy=True)
    (logps.sum() + entropy.sum()).backward()
    hook.remove()
    assert all(50 not in shape for shape in kept), kept
    assert rows == [4, 4, 4, 4, 4, 3] + rows[6:] and len(rows) == 12 and max(rows) == 4
    monkeypatch.setattr(torch.Tensor, "exp", lambda x: exponentials.append(x.shape) or exp(x))
    again, entropy = token_logps(hidden, targets, head)
    assert torch.equal(logps, again) and entropy is None and not exponentials


def test_bf16_scores_are_fp32():
    """The softmax runs in fp32 also over a bf16 head."""
    hidden, targets, head = head_inputs()
    logps, entropy = token_logps(hidden.bfloat16(), targets, head.bfloat16(), with_entropy=True)
    assert logps.dtype == entropy.dtype == torch.float32
    naive = F.log_softmax(head(hidden.bfloat16()).float(), -1)
    close(logps, naive[torch.arange(23), targets], 1e-6)
