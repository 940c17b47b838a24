"""PAPO, Perception-Aware Policy Optimization: the whole algorithm in one file, in the order of its data flow.

[1] Wang et al., "Perception-Aware Policy Optimization for Multimodal Reasoning", arXiv 2507.06448, ICLR 2026.
[2] The authors' released code, github.com/MikeWangWZHL/PAPO.
[3] Shao et al., "DeepSeekMath", arXiv 2402.03300 (GRPO).     [4] Yu et al., "DAPO", arXiv 2503.14476.
[5] Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html, 2020.
[6] Wang et al., "Qwen2-VL", arXiv 2409.12191 (M-RoPE).

For a question with an image, sample a group of G responses and reward each. GRPO [3] makes the better ones
likelier. PAPO adds one idea: score the SAME responses once more with most of the image blacked out, and
reward the policy for changing its mind. A policy that answers alike without the picture did not look at it.
What is maximised (paper Eq. 2), per response token:

      min(r A, clip(r, 1-eps_l, 1+eps_h) A)     clipped policy term
    - beta  KL[pi || pi_ref]                    reference KL
    + gamma KL[pi || pi_mask]                   perception KL
    - eta1  H[pi]  -  eta2 H[pi_mask]           double entropy

r = pi_theta / pi_old, where pi_old sampled the response; A is the response's advantage; pi_ref is the policy
before training; pi_mask is pi_theta looking at the masked image. KL and H are of the next token's
distribution. The perception KL can be hacked, as [1] calls it: at a large gamma the policy raises it with
unrelated tokens and forgets the answer. The double entropy keeps both distributions sure, which works against
that, up to a point.

THE WAY OF THE DATA, which is the order of the sections below
    question, image, answer -> encode_prompt -> sample_groups -> compute_reward -> group_advantages
                            -> mask_patches  -> mask_prompt   -> group_logps x 1..4 -> papo_loss -> papo_step
    roll_out goes as far as mask_prompt. score_constants runs group_logps for the old and the reference
    policy, where they are needed. papo_step runs it for the trained policy and its masked view, calls
    papo_loss, and updates.

GLOSSARY (shapes: B responses, G group, T longest response, P prompt length, L row length, V vocabulary,
H hidden width; N: all response tokens of a group, one after the other)
    code name           symbol            shape    meaning
    logps               log pi_theta(o)   (B, T)   log-probability of each sampled token, trained policy
    old_logps           log pi_old(o)     (B, T)   the same under the policy that sampled it, constant
    ref_logps           log pi_ref(o)     (B, T)   the same under the frozen starting policy, constant
    masked_logps        log pi_mask(o)    (B, T)   the same under pi_theta looking at the masked image
    entropy             H[pi_theta]       (B, T)   of the next-token distribution; masked_entropy: H[pi_mask]
    response_mask       1 where t < |o|   (B, T)   1 on response tokens, the end token included; 0 on padding
    rewards             R                 (G,)     one number per response, here in [0, 1]
    advantages          A                 (B,)     reward standardised within its group, for all its tokens
    clip_low, clip_high eps_l, eps_h      float    how far r = pi_theta / pi_old may pay; clip_dual: c
    gamma, beta         gamma, beta       float    weight of the perception KL, of the reference KL
    eta1, eta2          eta_1, eta_2      float    weights of the two entropies
    mask_ratio          p                 float    probability that a patch is blacked out
    group_size          G                 int      responses per question

WORDS
    VLM           a language model that sees: a vision tower turns each patch of the image (14 x 14 pixels)
                  into a vector, 2 x 2 of these are merged into one visual token, and the language model reads
                  the visual tokens where the prompt says <|image_pad|>
    processor     a VLM's tokenizer, chat template and preparation of images in one
    GRPO          policy gradient whose baseline is the mean reward of the question's own group [3]
    DAPO          GRPO with one average over all tokens, a higher upper clip, and no group that is all right
                  or all wrong [4]
    on-policy     the responses come from the very policy that is being differentiated, so r = 1: a batch's
                  first update
    nat           unit of log-probabilities with the natural logarithm; 1 nat = a factor of 2.7
    k1, k2, k3    Schulman's estimators of KL[pi || other] from samples of pi, with x = other/pi: -log x,
                  (log x)^2 / 2, x - log x - 1 [5]
    prefill       the one pass over the prompt; its keys and values are kept in the KV cache, so that every
                  further token costs one position, not a whole row
    M-RoPE        Qwen-VL's rotary positions: three numbers a token (time, height, width), so that a visual
                  token knows its row and column; for text all three are the same [6]
    LoRA          training small matrices beside frozen weights, an adapter that can be switched off

WHAT CARRIES GRADIENT (masked_grad, see papo_loss)
    masked_grad   KL through pi   KL through pi_mask         H[pi]   H[pi_mask]
    "detached"    yes             no                         yes     no: a constant, as in the released code
    "entropy"     yes             no                         yes     yes
    "full"        yes             yes, as Eq. 2 implies      yes     yes
    KL is the perception KL. pi_old and pi_ref never carry any. Rewards and advantages are plain numbers.

WHERE THIS DIFFERS FROM THE PAPER [1] AND THE RELEASED CODE [2], AND WHY
     1. The k3 estimator uses x = other/pi, as [2] and [5]. The one printed in [1], with pi/other, is biased
        for samples of pi.
     2. The perception KL is part of the scalar that is back-propagated; in the Qwen3 branch of [2] it is not.
     3. H[pi_mask] can be trained ("entropy", "full"); in [2] it is scored without gradient, so eta2 changes
        nothing.
     4. Entropies are exact sums over the vocabulary. [2] uses -log pi of the sampled tokens (here
        entropy=None): on-policy, its expected gradient is zero for every token given its prefix. Only the
        average with 1/|o| leaves a pull towards shorter responses, since a token's weight depends on the
        tokens after it. The tokens are drawn from pi, so -log pi_mask of them estimates no entropy but the
        cross-entropy of pi and pi_mask: lowering it pulls the two together, against gamma. [1] prints log pi
        without the minus.
     5. The perception KL treats pi_mask as a constant, as [2]. "full" lets gradient through it, as Eq. 2 of
        [1] implies, and is easier to hack: the network can raise the KL by answering nonsense to masked
        images.
     6. aggregation="sequence" (mean of per-response means) is Eq. 2 and GRPO; "token" is Eq. 3 and DAPO, and
        what [2] uses.
     7. Masking happens on the image as the vision tower sees it, so a patch is wholly black or untouched. [2]
        masks before the processor resizes, which smears black into neighbours, and uses 14 px even where the
        patches have 16.
     8. Log-ratios are clamped to +-20 and k3 to 10 as in [2]; [1] has no clamps. Beyond them the gradient is
        0.
     9. The reward is 0.9 accuracy + 0.1 format as in [2]; [1] says exact match. The accuracy check accepts
        more spellings of the same answer.
    10. The policy loss has the dual clip of [2] (for A < 0 at most c times |A|), which [1] leaves out.
    11. Vision tokens are never sampled: in a response they would be taken for image positions. Scoring leaves
        them in the distribution.
    12. A whole group is scored as one row (see group_row): the same numbers, for a fraction of the cost
        wherever the prompt is longer than the responses (and dearer where it is much shorter).
    13. gated=True is ours, in neither: it pays the perception KL only where it does not push against the
        reward (see perception_gate). Off by default.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize, to_rgb
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicLayer
from transformers.image_utils import load_image

# ------------------------------------------------------------------------------------------------------------
# 1. The recipe
# ------------------------------------------------------------------------------------------------------------


def option(default, help):
    """A dataclass field that is also a command-line flag with this help text."""
    return field(default=default, metadata={"help": help})


class Settled(str):
    """Marks a masked_grad that nobody gave, so that a config made from this one, as by
    dataclasses.replace(config, eta2=...), chooses again."""


@dataclass
class PAPOConfig:
    """Every number of the recipe. The defaults are the published PAPO-G 3B model's (Table 6 of [1] and its
    scripts), but for top_p, which is 0.99 there and in the presets. masked_grad, where it is not given, is
    "entropy" if eta2 > 0, else "detached".

    Raises ValueError, naming the field, for a value outside its range."""

    gamma: float = option(
        0.02, "weight of the implicit perception KL (paper: gamma); 0 is plain GRPO; typical 0.005 to 0.02"
    )
    beta: float = option(
        0.01, "weight of the KL to the starting policy (paper: beta); 0 needs no reference; typical 0 to 0.04"
    )
    eta1: float = option(
        0.0, "weight of the entropy of the policy, minimised (paper: eta_1); typical 0 to 0.05"
    )
    eta2: float = option(
        0.0, "weight of the entropy of the masked policy, minimised (paper: eta_2); typical 0 to 0.05"
    )
    clip_low: float = option(
        0.2, "a ratio below 1 - clip_low earns nothing more (paper: epsilon_l); typical 0.2"
    )
    clip_high: float = option(
        0.3, "a ratio above 1 + clip_high earns nothing more (paper: epsilon_h); typical 0.2 to 0.3"
    )
    clip_dual: float = option(
        3.0, "for A < 0 the loss is at most clip_dual |A| (released code: c); above 1, inf turns it off"
    )
    aggregation: Literal["sequence", "token"] = option(
        "sequence",
        "over tokens: sequence = mean of per-response means (Eq. 2), token = one mean over all (Eq. 3)",
    )
    gated: bool = option(
        False,
        "ours: pay the perception KL only in responses of positive advantage, for tokens that the image "
        "makes likelier; typical gamma with it 1 to 10",
    )
    masked_grad: Literal["detached", "entropy", "full"] = option(
        None,
        "which terms send gradient through the masked pass: detached = none, entropy = H[pi_mask], full = "
        "also the perception KL; default: entropy if eta2 > 0, else detached",
    )
    entropy_estimate: Literal["exact", "sampled"] = option(
        "exact", "exact = sum over the vocabulary, sampled = -log pi of the sampled tokens (released code)"
    )
    mask_ratio: float = option(
        0.6, "probability of blacking out an image patch (paper: p); typical 0.6 to 0.8"
    )
    patch_size: int = option(
        14, "side of a masked patch in pixels (paper: s); the trainer takes the model's own"
    )
    group_size: int = option(5, "responses sampled per question (paper: G); at least 2; typical 5 to 16")
    temperature: float = option(1.0, "sampling temperature, also used when scoring; typical 1.0")
    top_p: float = option(
        1.0, "nucleus sampling: keep the likeliest tokens up to this mass; published runs: 0.99"
    )
    format_weight: float = option(
        0.1, "share of the reward that is for format, the rest is for accuracy (released code: 0.1)"
    )
    dynamic_sampling: bool = option(False, "redraw groups that are all right or all wrong (DAPO, PAPO-D)")
    max_redraws: int = option(
        20, "with dynamic sampling, rounds of redrawing before training on what there is (paper: 20)"
    )
    max_new_tokens: int = option(2048, "longest response, in tokens (published: 2048)")
    prompts_per_batch: int = option(384, "questions per rollout batch (published: 384)")
    prompts_per_sample: int = option(16, "questions sampled at a time; lower it to save memory")
    updates_per_batch: int = option(
        3, "optimizer updates a rollout batch is split into (published: 384 / 128 = 3)"
    )
    tokens_per_forward: int = option(
        8192, "largest row (prompt + responses) of one forward pass; lower it to save memory"
    )
    learning_rate: float = option(1e-6, "AdamW learning rate; published 1e-6 for full fine-tuning")
    weight_decay: float = option(0.01, "AdamW weight decay (published: 0.01)")
    max_grad_norm: float = option(1.0, "gradients longer than this are scaled down to it (published: 1.0)")

    def __post_init__(self):
        if self.masked_grad is None or isinstance(self.masked_grad, Settled):
            self.masked_grad = Settled("entropy" if self.eta2 > 0 else "detached")
        ranges = {  # name: (smallest, largest); written as "not low <= x", so that nan fails, too
            **dict.fromkeys(("gamma", "beta", "eta1", "eta2", "clip_high", "weight_decay"), (0, 1e3)),
            **dict.fromkeys(("clip_low", "mask_ratio", "format_weight"), (0, 1)),
            "clip_dual": (1, math.inf),
            "temperature": (1e-3, 1e3),
            "top_p": (1e-6, 1),
            "learning_rate": (0, 1),
            "max_grad_norm": (1e-9, math.inf),
            "group_size": (2, 1e6),
            "max_redraws": (0, 1e6),
            "prompts_per_batch": (self.updates_per_batch, 1e6),
            "patch_size": (1, 1e9),
            "max_new_tokens": (1, 1e9),
            "prompts_per_sample": (1, 1e9),
            "updates_per_batch": (1, 1e9),
            "tokens_per_forward": (1, 1e9),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {getattr(self, name)}")
        for name, allowed in (
            ("aggregation", ("sequence", "token")),
            ("masked_grad", ("detached", "entropy", "full")),
            ("entropy_estimate", ("exact", "sampled")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")

    @classmethod
    def preset(cls, name: str, **changes) -> "PAPOConfig":
        """A published recipe (Table 6 and 8 of [1]), with `changes` on top. Raises ValueError for an unknown
        name."""
        dapo = dict(beta=0.0, clip_high=0.28, aggregation="token", dynamic_sampling=True)
        presets = {
            "papo-g-3b": dict(gamma=0.02),
            "papo-g-7b": dict(gamma=0.02, eta1=0.05, eta2=0.05),
            "papo-g-qwen3-2b": dict(gamma=0.01, patch_size=16),
            "papo-g-no-ref": dict(gamma=0.01, beta=0.0, eta1=0.03, eta2=0.03),
            "papo-d-3b": dict(gamma=0.01, eta1=0.03, eta2=0.03, **dapo),
            "papo-d-7b": dict(gamma=0.01, eta1=0.03, eta2=0.03, **dapo),
            "grpo": dict(gamma=0.0),
            "dapo": dict(gamma=0.0, **dapo),
        }
        if name not in presets:
            raise ValueError(f"unknown preset {name!r}, choose from {', '.join(presets)}")
        return cls(**{"top_p": 0.99, **presets[name], **changes})


def check_shapes(**named):
    """name=(tensor, "B T"): every tensor has those dimensions, and a letter means one size throughout.
    ValueError if not."""
    sizes = {}  # letter -> (size, name of the tensor it was first seen on)
    for name, (tensor, letters) in named.items():
        letters = letters.split()
        if tensor.dim() != len(letters):
            raise ValueError(f"{name} must have shape ({', '.join(letters)}), got {tuple(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape):
            first, owner = sizes.setdefault(letter, (size, name))
            if size != first:
                raise ValueError(f"{name} has {letter} = {size}, but {owner} has {letter} = {first}")


# ------------------------------------------------------------------------------------------------------------
# 2. The prompt: question + image -> tensors
# ------------------------------------------------------------------------------------------------------------

Prompt = dict  # what a Qwen-VL processor returns for one question: input_ids (1, P), pixel_values, ...
PROMPT_SUFFIX = " First think inside <think> </think>, then put the final answer inside \\boxed{}."


def fit_image(processor, image):
    """Resize an image to what the vision tower will see: nearly its shape, both sides multiples of patch x
    merge, an area within the processor's bounds. A second call changes nothing.

    image: PIL, or a path, URL or data URL. Returns a new RGB image.
    Raises ValueError for an image more than 200 times longer than wide."""
    image = to_rgb(load_image(image) if isinstance(image, str) else image)
    settings = processor.image_processor
    unit = settings.patch_size * settings.merge_size
    bounds = settings.size["shortest_edge"], settings.size["longest_edge"]
    # smart_resize is the processor's own rule. It is applied until it changes nothing. Where no size fits
    # between the bounds, two sizes lead to one another, one too small and one too large: then the smaller.
    sizes = [(image.height, image.width)]
    while True:
        following = tuple(max(unit, side) for side in smart_resize(*sizes[-1], unit, *bounds))  # no side of 0
        if following in sizes:
            break
        sizes.append(following)
    height, width = min(sizes[sizes.index(following) :])
    return image.resize((width, height))


def chat_messages(question: str) -> list[dict]:
    """The question as the one user message of a chat; the image where it says `<image>`, or else first.

    Raises ValueError if the question names several images or holds a special token such as <|im_end|>."""
    if question.count("<image>") > 1:
        raise ValueError(f"a question may hold one <image>, this one has {question.count('<image>')}")
    if found := re.search(r"<\|\w+\|>", question):
        raise ValueError(f"the question contains the special token {found.group()}")
    before, _, after = question.rpartition("<image>")  # without <image>: before is empty
    content = [{"type": "image"}, {"type": "text", "text": after + PROMPT_SUFFIX}]
    if before:
        content.insert(0, {"type": "text", "text": before})
    return [{"role": "user", "content": content}]


def encode_prompt(processor, question: str, image) -> Prompt:
    """One question about one image as the model reads it, ending where the assistant's answer begins.

    Returns a mapping: input_ids (1, P), pixel_values (patches, channels x time x patch^2),
    image_grid_thw (1, 3), ... Raises ValueError as chat_messages and fit_image do."""
    text = processor.apply_chat_template(chat_messages(question), tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=[fit_image(processor, image)], do_resize=False, return_tensors="pt")


def vision_token_ids(model) -> list[int]:
    """Ids that stand for images in a Qwen-VL's input. Raises ValueError for a model without image tokens."""
    if getattr(model.config, "image_token_id", None) is None:
        raise ValueError(f"{type(model).__name__} has no image token: PAPO needs a Qwen2-VL or a later one")
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return [getattr(model.config, name) for name in names]


def mask_prompt(processor, prompt, masked_image) -> Prompt:
    """The prompt with a masked image in place of its own, of the same size: the same ids, other pixels."""
    masked = processor.image_processor(images=[masked_image], do_resize=False, return_tensors="pt")
    kept = {name: x for name, x in prompt.items() if name != "features"}  # those are of the whole image
    return {**kept, "pixel_values": masked["pixel_values"]}


def encode_image(model, prompt) -> Prompt:
    """With a frozen vision tower: the prompt with the image's features in place of its pixels, computed once
    for all later passes. They wait in host memory, and only what the language model reads is kept."""
    with torch.no_grad():
        features = model.model.get_image_features(**image_inputs([prompt], model.device), return_dict=True)
    kept = {"pooler_output": [x.cpu() for x in features.pooler_output]}  # a list of one (visual tokens, H)
    if getattr(features, "deepstack_features", None):  # Qwen3-VL: features of some inner layers too
        kept["deepstack_features"] = [[x.cpu() for x in layer] for layer in features.deepstack_features]
    without_pixels = {name: x for name, x in prompt.items() if name != "pixel_values"}
    return {**without_pixels, "features": type(features)(**kept)}


def image_inputs(prompts: list[Prompt], device) -> dict:
    """The model's image arguments for several prompts: their patches, or features from encode_image, one
    after the other."""
    grids = torch.cat([prompt["image_grid_thw"] for prompt in prompts]).to(device)  # (n, 3)
    if "features" not in prompts[0]:
        pixels = torch.cat([prompt["pixel_values"] for prompt in prompts])  # (patches, values of one)
        return {"image_grid_thw": grids, "pixel_values": pixels.to(device)}
    features = [prompt["features"] for prompt in prompts]
    joined = type(features[0])(pooler_output=[x.to(device) for f in features for x in f.pooler_output])
    if getattr(features[0], "deepstack_features", None):
        layers = zip(*(f.deepstack_features for f in features))  # of each inner layer, the images' features
        joined.deepstack_features = [[x.to(device) for image in layer for x in image] for layer in layers]
    return {"image_grid_thw": grids, "mm_encoder_outputs": {"image": joined}}


def rope_positions(model, input_ids, images, attention_mask=None):
    """M-RoPE positions (3, B, P) of prompts: one row each for time, height and width, so that a visual token
    is as near to the one below it as to the one on its right. Two tokens of text, an image of 2 x 3 visual
    tokens, two of text:

        time      0  1  2  2  2  2  2  2  5  6
        height    0  1  2  2  2  3  3  3  5  6
        width     0  1  2  3  4  2  3  4  5  6

    The positions are always passed to the model. A model that is given none falls back to plain text
    positions, in which an image is one long line, or to those it remembers from an earlier call."""
    is_image = (input_ids == model.config.image_token_id).int()  # (B, P) 1 on image positions
    positions, _ = model.model.get_rope_index(
        input_ids,
        mm_token_type_ids=is_image,
        attention_mask=attention_mask,
        image_grid_thw=images["image_grid_thw"],
    )
    return positions


# ------------------------------------------------------------------------------------------------------------
# 3. Random patch masking: I -> I_mask   ([1] App. G.1)
# ------------------------------------------------------------------------------------------------------------


def mask_patches(image, ratio=0.6, patch_size=14, generator=None):
    """Black out each cell of a patch_size x patch_size grid with probability `ratio`, independently. Of the
    ratios [1] finds 0.6 to 0.8 best; wholly black images make the training collapse sooner.

    image: PIL, not changed; best after fit_image, so that cells are the vision tower's patches. A cell cut by
    the right or lower edge counts as a cell. Returns a new RGB image of the same size. Raises ValueError for
    a ratio outside [0, 1]."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio must lie in [0, 1], got {ratio}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    columns, rows = math.ceil(image.width / patch_size), math.ceil(image.height / patch_size)
    black = torch.rand(rows, columns, generator=generator) < ratio  # (rows, columns) bool
    # One pixel per cell, 255 where black goes, is blown up to whole cells.
    stencil = Image.fromarray(black.byte().mul(255).numpy())
    stencil = stencil.resize((columns * patch_size, rows * patch_size), Image.NEAREST)
    masked = image.convert("RGB")  # a copy, also of an RGB image
    masked.paste((0, 0, 0), mask=stencil.crop((0, 0, *image.size)))
    return masked


# ------------------------------------------------------------------------------------------------------------
# 4. Sampling: o_1 .. o_G ~ pi_old(. | q, I)
# ------------------------------------------------------------------------------------------------------------


def sample_token(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw one token per row. logits (B, V) -> (B,). temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probs = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)  # (B, V), (B, V)
        outside = ranked.cumsum(-1) - ranked >= top_p  # (B, V) the mass before this token is enough already
        kept = ranked.masked_fill(outside, 0)  # (B, V)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)  # (B, V) in the vocabulary's order, sum <= 1
    # The token is where a uniform number in [0, 1) falls among the summed probabilities: one number a row,
    # where torch.multinomial draws V. In float64, since fp32 sums over 150,000 tokens would blur the unlikely
    # ones. A token of probability 0 is never met.
    summed = probs.cumsum(-1, dtype=torch.float64)  # (B, V)
    place = torch.rand(len(probs), 1, dtype=torch.float64, device=probs.device, generator=generator)  # (B, 1)
    return torch.searchsorted(summed, place * summed[:, -1:], right=True)[:, 0]  # (B,)


def attention_bias(visible, dtype):
    """A boolean mask as numbers of the same shape to add to the attention scores: 0 where `visible`, else the
    smallest there is. (Eager attention would add the boolean mask itself, as 0 and 1.)"""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class RoomyLayer(DynamicLayer):
    """One layer of a KV cache that writes a new token in place; transformers' own copies all that is there to
    append one.

    filled: the layer after the prefill of n prompts. A prompt's keys and values, computed once, are
    copied for each of its G responses: rows 0 to G - 1 continue the first prompt."""

    def __init__(self, filled, group_size):
        super().__init__()
        self.is_initialized = True
        self.length = filled.get_seq_length()  # tokens written; the room behind them is not initialised
        self.keys = filled.keys.repeat_interleave(group_size, 0)  # (n, heads, P, d) -> (B, heads, P, d)
        self.values = filled.values.repeat_interleave(group_size, 0)  # the same; d: width of a head

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:  # room for the next 64 tokens, so that copying is rare
            grow = lambda x: torch.cat([x, x.new_empty(*x.shape[:2], 64, x.shape[3])], 2)  # (B, heads, L, d)
            self.keys, self.values = grow(self.keys), grow(self.values)
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]  # (B, heads, P + t, d) each

    def get_seq_length(self):
        return self.length


def end_tokens(model, processor) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation_config that are special
    tokens, for an ordinary one would end them midway. Qwen2.5-VL lists <|im_end|> and <|endoftext|>."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    special = processor.tokenizer.all_special_ids
    return [processor.tokenizer.eos_token_id] + [token for token in listed if token in special]


@torch.no_grad()
def sample_groups(
    model, processor, prompts, group_size, max_new_tokens, temperature=1.0, top_p=1.0, generator=None
):
    """Sample group_size responses for each prompt: one prefill for all prompts, then one token a time for all
    responses.

    Nothing but the end tokens is taken from the model's generation_config, whose temperature and penalties
    would make a group's responses alike. Vision tokens are never drawn. generator: on the model's device.
    Returns per prompt a list of group_size LongTensors (<= max_new_tokens,), cut after the first end token.
    One that is cut at max_new_tokens has none, and is rewarded and trained as it stands. top_p < 1 changes
    what is drawn, not what group_logps scores: the scored distribution is the whole one."""
    if not prompts:
        raise ValueError("no prompts to sample from")
    device, training = model.device, model.training
    model.eval()  # under train() a gradient-checkpointed layer would drop its KV cache
    # Padding goes on the left, so that every prompt ends where its responses begin.
    pad_left = lambda rows, value: pad_sequence(rows, True, value, padding_side="left").to(device)  # (n, P)
    ids = [prompt["input_ids"][0] for prompt in prompts]  # n x (P,)
    input_ids = pad_left(ids, processor.tokenizer.pad_token_id or 0)  # (n, P) whichever: nothing sees it
    seen = pad_left([torch.ones_like(row) for row in ids], 0)  # (n, P) 1 = not padding
    images = image_inputs(prompts, device)
    positions = rope_positions(model, input_ids, images, seen)  # (3, n, P)
    out = model(
        input_ids=input_ids,
        attention_mask=seen,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
        **images,
    )

    # From here on B = n * G rows, fewer as responses end.
    cache = out.past_key_values
    cache.layers = [RoomyLayer(layer, group_size) for layer in cache.layers]
    logits = out.logits[:, -1].repeat_interleave(group_size, 0)  # (B, V)
    position = positions.amax(dim=(0, 2)).repeat_interleave(group_size)  # (B,) of the last prompt token
    seen = seen.repeat_interleave(group_size, 0)  # (B, P)
    seen = F.pad(seen, (0, max_new_tokens), value=1)  # (B, P + max_new_tokens)
    bias = attention_bias(seen[:, None, None].bool(), model.dtype)  # (B, 1, 1, P + max_new_tokens)
    rows = torch.arange(len(bias), device=device)  # (B,) whose responses these are
    tokens = torch.full((len(bias), max_new_tokens), -1, device=device)  # (n * G, max_new_tokens), -1: none
    ends = torch.tensor(end_tokens(model, processor), device=device)  # (end tokens,)
    never = torch.tensor(vision_token_ids(model), device=device)  # (4,)
    done = torch.zeros_like(rows, dtype=torch.bool)  # (B,)
    for t in range(max_new_tokens):
        logits[:, never] = -math.inf
        token = sample_token(logits, temperature, top_p, generator)  # (B,)
        tokens[rows, t] = token.where(~done, -1)
        done |= torch.isin(token, ends)
        if done.all() or t + 1 == max_new_tokens:
            break
        # Drop the ended rows, but only once they are a quarter: dropping copies the cache.
        if done.sum() >= len(done) / 4:
            going = (~done).nonzero()[:, 0]  # (B',)
            rows, token, position, bias, done = (x[going] for x in (rows, token, position, bias, done))
            cache.batch_select_indices(going)
        position = position + 1  # (B,)
        logits = model(
            input_ids=token[:, None],  # (B, 1)
            attention_mask=bias[..., : input_ids.shape[1] + t + 1],
            position_ids=position[None, :, None].expand(3, -1, -1),  # (3, B, 1)
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]  # (B, V)
    model.train(training)
    responses = [row[row >= 0] for row in tokens.cpu()]  # n * G x (|o|,)
    return [responses[i : i + group_size] for i in range(0, len(responses), group_size)]


# ------------------------------------------------------------------------------------------------------------
# 5. The rule-based reward: R_i
# ------------------------------------------------------------------------------------------------------------

GRADE_TIMEOUT = 3.0  # seconds math-verify gets for one answer, about a hundred times what it needs
MAX_ANSWER_CHARS = 1000  # a longer answer is right only if it is the very same string: bounds all work here

# On a first reading, go on at compute_reward: all before it decides whether two spellings are one answer.
# The way of an answer: compute_reward -> answers_match -> same_answer, which asks
#     tidy              both answers in one spelling
#     same_by_rule      numbers, units, letters: exact and in microseconds; where it does not know
#     same_by_rule      once more, for each piece between commas and the like; where it does not know
#     same_by_algebra   math-verify, in a child process
# tidy's tables; each arrow shows what tidy makes of it in the end. One spelling for characters (those of full
# width lie 0xFEE0 above ASCII): （１，２） -> (,1,2,); −3 -> -3; x² -> x^2; 2½ -> 2\frac{1}{2}; 9∘ -> 9°
# ×5 -> \times 5
CHARACTERS = {0xFEE0 + code: chr(code) for code in range(0x21, 0x7F)}
CHARACTERS |= str.maketrans(dict(zip("−–—。、∘º∶", "---.,°°:")) | {"²": "^2", "³": "^3", "℃": "°C"})
CHARACTERS |= str.maketrans({"π": r"\pi ", "×": r"\times ", "½": " 1/2", "¼": " 1/4", "¾": " 3/4"})
# ... for words, each group by its first: x\le 3 -> x≤3; 1 \lt x -> 1<x; 3 \gt x -> 3>x; A\bigcup B -> A∪B
# \tfrac12 -> \frac12; x=1且y=2 -> x=1,y=2; 5厘米 -> 5cm; 20 ml -> 20 mL; 30 degrees -> 30°
WORDS = r"""≤ \leqslant \leq \le; ≥ \geqslant \geq \ge; < \lt; > \gt; ≠ \neq \ne; ≈ \approx; ∞ \infty;
→ \rightarrow \to; ∪ \cup \bigcup; ∩ \cap; ∈ \in; ∠ \angle; △ \triangle; ∥ \parallel; ⊥ \perp;
∅ \emptyset \varnothing; ± \pm; Ω \Omega; ∨ or 或; , and 和 且; \frac \dfrac \tfrac; cm centimeters 厘米;
mm millimeters 毫米; mL ml; km kilometers 千米; m meters 米; in inches; ft feet; h hours 小时; min minutes 分钟;
s seconds 秒; kg 千克; g grams 克; % percent; ° \circ degrees degree \degree 度"""
WORDS = {word: group.split()[0] for group in WORDS.split(";") for word in group.split()}
WORD = r"\\?[a-zA-Z]+|小时|分钟|[厘毫千]?[米克]|[或和且秒度]"
TIDY_RULES = [  # ... and for patterns, in this order
    (r"\{,\}|,\\!", ","),  # 1{,}000 -> 1,000; 1,\!000 -> 1,000
    (r"√(\d+|\w)", r"\\sqrt{\1}"),  # 2√13 -> 2\sqrt{13}
    (r"\\(?:text|math)[a-z]*\{([^{}]*)\}", r" \1 "),  # \textbf{C} -> C; 5\mathrm{km} -> 5 km
    # \left.x\right| -> .x|; \(5\) -> 5; $5$ -> 5; \$5 -> 5; 5~cm -> 5 cm
    (r"\\(?:left|right|quad|displaystyle)(?![a-zA-Z])|(?<!\\)\\[()\[\],;:! ]|\\?\$|~|\s", " "),
    # 9 square m -> 9 m^2; 9立方m -> 9m^3
    (r"(?:(square|平方)|cubic|立方) ?([^\W\d_]+)", lambda m: f"{m[2]}^{3 - bool(m[1])}"),
    (WORD, lambda m: WORDS.get(m[0], m[0])),  # 2 hours -> 2 h
    # The answer is C -> C; Option C -> C; 答案：C -> C
    (r"(?i)^ *(?:the )?(?:answer|option|choice|答案|选项?)(?![a-z])(?: ?is|是|为)?[: ]*(?=.)", ""),
    (r"(?<=[A-J①-⑩])[, ]+(?=[A-J①-⑩])", ""),  # A, C and D -> ACD; ① ③ -> ①③
    (r" +", " "),  # one stays, for 4 2 is not 42: 4  2 -> 4 2; 4,  200 -> 4, 200
    (r" ?([^\w\s,.]) ?", r"\1"),  # x + 1 = 3 -> x+1=3
    (r"\^\{?°\}?", "°"),  # 30^{\circ} -> 30°; 30^\circ -> 30°
    (r"([\^_])\{(\w)\}", r"\1\2"),  # x^{2} -> x^2; a_{n} -> a_n
    (r"(\d) (\d+)/(\d+)", r"\1\\frac{\2}{\3}"),  # 1 1/2 -> 1\frac{1}{2}
    # P(1,2) -> (,1,2,); \pi \approx 3.14 -> \pi; +\infty -> ∞; 5\% -> 5%
    (r"^[A-Z](?=\(.*,.*\)$)|(?<=.)≈[\d.]+$|\+(?=∞)|\\(?=%)", ""),
    # Order does not count in sets and among alternatives: \{2,1\} -> \{,1,2,\}; x=2 or x=1 -> x=1,x=2
    (
        r"(?<=^\\\{)[^()<>≤≥≠]*(?=\\\}$)|^(?!.*[<>≤≥≠]).*∨.*$",
        lambda m: ",".join(sorted(re.split(" ?[,∨] ?", m[0]))),
    ),
    # ... but "or" of inequalities is not "and": x>3 or x<1 -> x<1∨x>3
    (r"^.*∨.*$", lambda m: "∨".join(sorted(m[0].split("∨")))),
    # Brackets become pieces of their own between commas: [1,2) -> [,1,2,)
    (r"(\\\{|[(\[])([^()\[\],]*,[^()\[\]]*?)(\\\}|[)\]])", r"\1,\2,\3"),
]
# The patterns: what each fits and does not, with two spaces between the examples.
# NUMBER fits 5  -1,000.5  .5  1e3  2/4  50%  12 cm^2  9 km/h  5x; not 5,00  4 2  x5  2\pi
DECIMAL = r"[+-]?(?=\.?\d)(?:\d{1,3}(?:,\d{3})+|\d*)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?"
NUMBER = re.compile(rf"({DECIMAL})(?:/({DECIMAL}))? ?((?:(?:[^\W\d_]|[%°])+(?:[ /][a-zA-Z]+)*(?:\^?[23])?)?)")
# A measure or what is counted: may be left out. UNIT fits m^2  km/h  °C  apples  元; not x  trillion  fifths
MEASURE = r"°[CF]?|[cdkm]?m|in|ft|mi|yd|k?g|h|s|min|m?L|[NVAWJΩ]"
COUNTED = r"(?![a-z]*illion|thousand|hundred|dozen|hal[fv]|third|[efnst][a-z]*ths|cubed|cents)[a-z]{4,}"
COUNTED += r"|(?![万亿千百十成折多倍])[一-鿿]{1,2}"
UNIT = re.compile(rf"(?:{MEASURE}|{COUNTED})(?:/(?:{MEASURE}))?(?:\^?[23])?")
# A letter of a multiple choice, and its text. CHOICE fits B  (B)  B),  B.  B: 12 cm; not (B) or (C)  AB  B 12
CHOICE = re.compile(r"\(?([A-J])(?!.*\b[A-J]\b)(?:[.,:)]+(.*))?")
# What an equation is about. NAME fits x_1=  P(A)=  ∠ABC=; not x+1=  5=
NAME = re.compile(r"(?!\d)[\w∠△ '\\{}()]+=")
# What math-verify can read. EXPRESSION fits 2\sqrt{3}  (x+1)^2  y=3!  two words; not \times3  1,2  两个
EXPRESSION = re.compile(r"(?![*/^!]|\\times|\\cdot)(?:\\[a-zA-Z\\]|[\w .+\-*/^(){}|!&=°±∞])+", re.A)
# The child's program: a fresh interpreter, which without torch is ready in a second. It answers each
# [seconds, pairs] twice, when it begins and when it knows. The watchdog is a thread in C: it ends the child
# in the middle of 9^{9^{9}}, and also when the parent is gone.
GRADING_PROCESS = r"""
import faulthandler, json, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's
replies, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no reply
from math_verify import parse, verify
if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))  # 2 GiB of memory
read = lambda text: parse(rf"\boxed{{{text}}}", parsing_timeout=None)
for line in sys.stdin:
    seconds, pairs = json.loads(line)
    faulthandler.dump_traceback_later(seconds, exit=True, file=open(os.devnull, "w"))
    print("begun", file=replies, flush=True)
    # decimals equal to 12 digits are the same
    same = all(verify(read(expected), read(given), 12, timeout_seconds=None) for given, expected in pairs)
    faulthandler.cancel_dump_traceback_later()
    print(same, file=replies, flush=True)
"""
GRADING_LOCK = threading.Lock()


def extract_boxed(text: str) -> str | None:
    r"""Inside of the last balanced \boxed{...} in `text`, or None. \{ and \} are characters, not braces.

    >>> print(extract_boxed(r"\boxed{1}? No: \boxed{\frac{1}{2}}. Or is it \boxed{3"))
    \frac{1}{2}
    """
    opened, (start, end) = [], (0, 0)  # one pass: a million unclosed boxes take no longer than plain text
    for token in re.finditer(r"\\[{}]|(\\boxed\{|\{)|(\})", text):
        if token[1]:  # \boxed{ or {
            opened.append(token)
        elif token[2] and opened:  # }
            opener = opened.pop()
            if opener[1] != "{":  # of the closed boxes the one that opens last
                start, end = max((start, end), (opener.end(), token.start()))
    return text[start:end] if start else None


def follows_format(response: str) -> bool:
    r"""Whether `response` is <think>...</think>...\boxed{...}..., spaces around < > / allowed, as released.
    Finding the first of each landmark in turn takes one pass; the released regex can backtrack for hours."""
    match = re.match(r"\s*<\s*think\s*>", response)
    for landmark in (r"<\s*/\s*think\s*>", r"\\boxed\{", r"\}"):
        match = match and re.compile(landmark).search(response, match.end())
    return match is not None


def tidy(answer: str) -> str:
    r"""`answer` in one spelling: without \boxed, $, \text, spacing commands and a full stop at the end."""
    text = (extract_boxed(answer) or answer).translate(CHARACTERS)
    for pattern, replacement in TIDY_RULES:
        text = re.sub(pattern, replacement, text)
    return text.strip().rstrip(". ")


def parse_number(text: str) -> tuple[Fraction, str] | None:
    r"""(exact value, unit or "") of a tidied answer that is one number; else None.

    >>> parse_number("1,000.5"), parse_number(r"-\frac{2}{4}"), parse_number("12 cm^2"), parse_number("1/0")
    ((Fraction(2001, 2), ''), (Fraction(-1, 2), ''), (Fraction(12, 1), 'cm2'), None)
    """
    match = NUMBER.fullmatch(re.sub(r"^([+-]?)\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1\2/\3", text))
    if match:
        value, divisor = (Fraction((part or "1").replace(",", "")) for part in match.group(1, 2))
        return (value / divisor, match[3].replace("^", "")) if divisor else None


def same_by_rule(given: str, expected: str) -> bool | None:
    r"""The verdict of the cheap exact rules on two tidied answers; None if they leave it open.

    given        expected     verdict
    Yes          yes          True
    NO           No           True
    A circle     a circle     True
    R            r            None
    5 MW         5 mW         False
    B. 12 cm     B            True
    B. 12 cm     B. 15 cm     False
    12 cm        B            False
    4 2          42           False
    CBA          ABC          False
    1/2          0.50         True
    1/3          0.333        False
    50%          50           True
    50%          0.5          True
    0.5%         0.5          False
    12 cm        12           True
    12 cm        12 m         False
    5x           5            None
    2xy          2yx          None
    2\sqrt{3}    \sqrt{12}    None
    """
    # Case counts in symbols, not in words, which are capitalised or in capitals throughout.
    words = re.compile(r"(?<![\\\w])(?:[A-Z](?:[a-z]+|[A-Z]+)\b|A(?= [a-z]{3}))")
    fold = lambda text: words.sub(lambda m: m[0].lower(), text)
    if not given or fold(given) == fold(expected):
        return given != ""
    choices = [CHOICE.fullmatch(text.upper() if len(text) == 1 else text) for text in (given, expected)]
    if any(choices):
        letters, texts = zip(*(choice.groups() if choice else (None, None) for choice in choices))
        return letters[0] == letters[1] and (not all(texts) or same_by_rule(*texts) is True)
    # math-verify reads "4 2" as 4 + 2, and CBA as a product, hence as ABC.
    if re.search(r"\d \d|^[a-zA-Z ]{2,}∨[a-zA-Z ]{2,}$", f"{given}∨{expected}"):
        return False
    numbers = parse_number(given), parse_number(expected)
    if not all(numbers):
        return None
    (value, unit), (other, other_unit) = sorted(numbers, key=lambda number: number[1])  # no unit sorts first
    if not unit and other_unit == "%":
        return value == other / 100 or value == other and abs(value) > 1  # 0.5 is not 0.5%
    if unit == other_unit or not unit and UNIT.fullmatch(other_unit):
        return value == other
    return False if unit and sorted(unit) != sorted(other_unit) else None  # the same letters: variables?


def symbols(text: str) -> set[str] | None:
    r"""The variables, signs and = of one mathematical expression; None if `text` is anything else.

    >>> sorted(symbols(r"2\sqrt{3}x=\alpha"))
    ['=', '\\alpha', 'x']
    """
    if EXPRESSION.fullmatch(text):
        text = re.sub(r"\\(?:frac|sqrt|pi|sin|cos|tan|log|ln|times|cdot)(?![a-zA-Z])", " ", text)
        return set(re.findall(r"\\[a-zA-Z]+|[a-zA-Z=!°±∞]", text))


@functools.lru_cache(maxsize=1)
def grading_process(owner: int) -> subprocess.Popen:
    """The child that may hang or die on a hostile answer, started once. owner: this process's id, so that a
    fork starts its own."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return subprocess.Popen([sys.executable, "-c", GRADING_PROCESS], **pipes)


def same_by_algebra(pairs: list[tuple[str, str]]) -> bool:
    """math-verify's verdict: whether each pair is equal. Raises TimeoutError if the child is killed."""
    for _ in range(2):  # again where the child was dead before it began, as by the out-of-memory killer
        with GRADING_LOCK:
            child = grading_process(os.getpid())
            with contextlib.suppress(OSError):
                print(json.dumps([GRADE_TIMEOUT, pairs]), file=child.stdin, flush=True)
            begun, verdict = child.stdout.readline(), child.stdout.readline()
            if verdict:
                return verdict == "True\n"
            grading_process.cache_clear()
            grading_process(os.getpid())  # its successor imports while the model works
        if begun:
            raise TimeoutError
    raise RuntimeError(f"the grading process does not start; try: {sys.executable} -c 'import math_verify'")


@functools.lru_cache(maxsize=2**12)
def same_answer(given: str, expected: str) -> bool:
    """answers_match, remembered; a TimeoutError is not, for the machine may have been busy.

    What the rules leave open is compared piece by piece: (0.5, x+x) is (1/2, 2x)."""
    given, expected = tidy(given), tidy(expected)
    if (same := same_by_rule(given, expected)) is not None:
        return same
    pieces = [re.split("([,;∨<>≤≥≠≈→∈∪∩∥⊥])", text) for text in (given, expected)]
    questions = []  # for math-verify
    for pair in zip(*pieces):
        names = [NAME.match(text) for text in pair]
        if "=" not in pair[0] or "=" not in pair[1] or all(names) and names[0][0] == names[1][0]:
            # x=5 is 5, but y=5 is not x=5
            pair = [text[name.end() if name else 0 :].strip() for text, name in zip(pair, names)]
        same = pair[0] == pair[1] or same_by_rule(*pair)
        if same:
            continue
        # math-verify is asked only about expressions in the same symbols: prose has others. One of the two
        # may leave out a unit behind a digit, a bracket or \pi: 2\sqrt{3} cm is 2\sqrt{3}.
        bare = [re.sub(rf"(?<=[\d)}}i]) ?(?:{UNIT.pattern})$", "", text) for text in pair]
        candidates = [pair, (bare[0], pair[1]), (pair[0], bare[1])]
        alike = [c for c in candidates if symbols(c[0]) == symbols(c[1]) is not None]
        if same is False or not alike:
            return False
        questions.append(alike[0])
    return len(pieces[0]) == len(pieces[1]) and (not questions or same_by_algebra(questions))


def answers_match(given: str, expected: str) -> bool:
    """Whether two answers mean the same. Any strings will do; takes about GRADE_TIMEOUT at worst. Raises
    RuntimeError if no process with math-verify can be started: a silent "wrong" would be worse."""
    if max(len(given), len(expected)) > MAX_ANSWER_CHARS:
        return given.strip() == expected.strip() != ""
    try:
        return same_answer(given, expected)
    except TimeoutError:  # not shown to be right
        return False


def compute_reward(response: str, answer: str, format_weight: float = 0.1) -> dict[str, float]:
    r"""Reward of one response, as released: (1 - format_weight) * accuracy + format_weight * format.

    accuracy is 1.0 if the last \boxed{...} of the response matches `answer`, format is 1.0 if the response
    follows the format, else 0.0. With format_weight in [0, 1] the reward lies in [0, 1]. Any strings will do,
    hostile ones included."""
    boxed = extract_boxed(response)
    accuracy = float(boxed is not None and answers_match(boxed, answer))
    format_score = float(follows_format(response))
    reward = (1 - format_weight) * accuracy + format_weight * format_score
    return {"reward": reward, "accuracy": accuracy, "format": format_score}


# ------------------------------------------------------------------------------------------------------------
# 6. Group advantages
# ------------------------------------------------------------------------------------------------------------


def group_advantages(rewards, eps=1e-6):
    """A_i = (R_i - mean(R)) / (std(R) + eps) over the group, the last dimension.

    rewards (..., G) -> (..., G), mean 0. The standard deviation is the unbiased one (G - 1), as in the
    released code. A group of equal rewards adds nothing to the policy term: exactly 0, where rounding over a
    tiny deviation would give noise (seven rewards of 0.3 would get 0.03 each). Raises ValueError for a group
    of fewer than 2. One right answer among eight:

    >>> group_advantages([1.0] + [0.1] * 7)
    tensor([ 2.4749, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536])
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)  # (..., G)
    if rewards.dim() == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"rewards need a group dimension G >= 2, got shape {tuple(rewards.shape)}")
    spread = rewards.std(-1, keepdim=True)  # (..., 1)
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (spread + eps)  # (..., G)
    return advantages.masked_fill((rewards == rewards[..., :1]).all(-1, keepdim=True), 0.0)  # (..., G)


# ------------------------------------------------------------------------------------------------------------
# 7. Scoring: log pi(o_t | q, I, o_<t), a group in one row
# ------------------------------------------------------------------------------------------------------------

HEAD_CHUNK = 256  # response positions whose logits exist at a time: 256 x 151,936 fp32 numbers are 156 MB


def token_logps(hidden, targets, head, temperature=1.0, with_entropy=False):
    """log pi(target), and with_entropy the entropy, at each position, without ever holding all logits.

    hidden (N, H), targets (N,) -> logps (N,), entropy (N,) or None, fp32. Each chunk's logits are computed
    again in backward: a plain loop would keep them all alive for autograd, 2.4 GB per copy for 4,000 tokens
    of a 151,936-word vocabulary."""

    def chunk_logps(hidden, targets):
        logits = head(hidden).float() / temperature  # (N, V), here N: positions of the chunk
        log_total = logits.logsumexp(-1)  # (N,)
        logps = logits.gather(-1, targets[:, None])[:, 0] - log_total  # (N,)
        if not with_entropy:
            return (logps,)
        log_probs = logits - log_total[:, None]  # (N, V)
        return logps, -(log_probs.exp() * log_probs).sum(-1)  # (N,), (N,)

    chunks = zip(hidden.split(HEAD_CHUNK), targets.split(HEAD_CHUNK))
    parts = [checkpoint(chunk_logps, *chunk, use_reentrant=False) for chunk in chunks]
    logps = torch.cat([part[0] for part in parts])  # (N,)
    return logps, torch.cat([part[1] for part in parts]) if with_entropy else None  # (N,), (N,)


def group_row(model, prompt, responses):
    """Lay a prompt and its G responses out as ONE row [prompt | o_1 | ... | o_G] of L tokens.

        mask      a token sees the prompt and the earlier tokens of its own response, nothing else
        position  every response starts anew right after the prompt's largest position

    So each response is scored as if it stood alone after the prompt, but the image is encoded once, the
    prompt runs once, and there is no padding. For P = 3, |o_1| = 2, |o_2| = 1 (# is seen, . is not; a1 and b0
    are last tokens and predict nothing):

        query     p0 p1 p2 a0 a1 b0     position    predicts
        p0         #  .  .  .  .  .        0
        p1         #  #  .  .  .  .        1
        p2         #  #  #  .  .  .        2        a0, and b0
        a0         #  #  #  #  .  .        3        a1
        a1         #  #  #  #  #  .        4
        b0         #  #  #  .  .  #        3

    An image in the prompt has fewer positions than tokens, so that with one the responses start below P. A
    first token is predicted by the prompt's last position: its left neighbour in the row belongs to another
    response, or is the prompt's last position itself. Returns the model's inputs and, for each response
    token, the index of the position that predicts it: (N,), here [2, 3, 2]."""
    device = model.device
    P, lengths = prompt["input_ids"].shape[1], [len(o) for o in responses]
    row = torch.cat([prompt["input_ids"][0], *responses])[None].to(device)  # (1, L)
    images = image_inputs([prompt], device)
    owner = torch.repeat_interleave(torch.tensor([P, *lengths]))  # (L,) 0: the prompt, i: response o_i
    owner = owner.to(device)
    visible = (owner[:, None] == owner) | (owner == 0)  # (L, L) query x key: own response, or prompt
    visible = visible.tril()[None, None]  # (1, 1, L, L) and nothing further right in the row
    place = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,) in its own response, from 0
    positions = rope_positions(model, row[:, :P], images)  # (3, 1, P)
    after = positions.max() + 1 + place  # (N,)
    positions = torch.cat([positions, after.expand(3, 1, -1)], dim=2)  # (3, 1, L) text: all three alike
    left = torch.arange(P - 1, row.shape[1] - 1, device=device)  # (N,) left neighbours in the row
    predictor = left.where(place > 0, P - 1)  # (N,)
    bias = attention_bias(visible, model.dtype)  # (1, 1, L, L)
    inputs = dict(input_ids=row, attention_mask=bias, position_ids=positions, use_cache=False, **images)
    return inputs, predictor


def group_logps(model, prompt, responses, temperature=1.0, with_entropy=False):
    """log pi(o_t | q, I, o_<t) of every token of G responses to one prompt, in one forward pass.

    prompt: from encode_prompt (with the masked image it gives pi_mask). responses: G LongTensors (<= T,).
    Returns logps (G, T) fp32, 0 on padding; response_mask (G, T) float; and with_entropy the entropy (G, T),
    in nats. Gradient flows if enabled. Raises ValueError for no or an empty response, one that holds a vision
    token, or a model whose attention takes no mask of our own."""
    if not len(responses) or any(len(o) == 0 for o in responses):
        raise ValueError("group_logps needs at least one response, each of at least one token")
    targets = torch.cat(list(responses)).to(model.device)  # (N,) all response tokens
    if torch.isin(targets, torch.tensor(vision_token_ids(model), device=model.device)).any():
        raise ValueError("a response contains a vision token: it would be taken for an image position")
    if model.config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"a group row needs attention sdpa or eager, the model uses {model.config._attn_implementation}"
        )
    inputs, predictor = group_row(model, prompt, responses)
    hidden = model.model(**inputs).last_hidden_state[0, predictor]  # (N, H)
    head = model.get_output_embeddings()
    logps, entropy = token_logps(hidden, targets, head, temperature, with_entropy)  # (N,), (N,) or None
    lengths = [len(o) for o in responses]
    pad = lambda flat: pad_sequence(flat.split(lengths), batch_first=True)  # (N,) -> (G, T)
    scored = pad(logps), pad(torch.ones_like(logps))  # (G, T), (G, T)
    return (*scored, pad(entropy)) if with_entropy else scored


# ------------------------------------------------------------------------------------------------------------
# 8. The terms of the loss, each (B, T) -> (B, T)
# ------------------------------------------------------------------------------------------------------------


def policy_ratio(logps, old_logps):
    """r = pi_theta / pi_old of each token, (B, T), (B, T) -> (B, T); the log-ratio clamped to +-20 as in
    [2]."""
    return (logps - old_logps).clamp(-20, 20).exp()  # (B, T)


def clipped_policy_loss(logps, old_logps, advantages, clip_low, clip_high, clip_dual):
    """- min(r A, clip(r, 1 - eps_l, 1 + eps_h) A), and for A < 0 at most c |A|.    ([1] Eq. 2, [2])

    logps, old_logps (B, T), advantages (B,) -> (B, T), to minimise. Where the clip acts there is no gradient:
    a good response's token is pushed until it is 1 + eps_h times as likely, a bad one's until it is 1 - eps_l
    times as likely. The bound of c keeps a bad token that has become far likelier from dominating, by leaving
    it alone. A good token at r = 1.4 (earns 1.3 A, not 1.4 A), a bad one at r = 0.5 (costs 0.8 |A|, not 0.5),
    and a bad one at r = 7 (3 |A|, not 7):

    >>> clipped_policy_loss(torch.tensor([[1.4], [0.5], [7.0]]).log(), torch.zeros(3, 1),
    ...                     torch.tensor([2.0, -1.0, -1.0]), clip_low=0.2, clip_high=0.3, clip_dual=3.0)
    tensor([[-2.6000],
            [ 0.8000],
            [ 3.0000]])
    """
    check_shapes(logps=(logps, "B T"), old_logps=(old_logps, "B T"), advantages=(advantages, "B"))
    advantages = advantages[:, None]  # (B, 1)
    ratio = policy_ratio(logps, old_logps)  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)  # (B, T)
    return torch.where(advantages < 0, loss.minimum(-clip_dual * advantages), loss)  # (B, T)


def kl_k3(logps, other_logps):
    """k3 = x - log x - 1 with x = pi_other / pi: an unbiased, never negative estimate of KL[pi || pi_other]
    from tokens drawn from pi.    ([2], after [5]; [1] prints 1/x, which is biased)

    (B, T), (B, T) -> (B, T) in [0, 10]. d k3 / d log pi = 1 - x, at most 1; 0 where the clamp acts, from
    x = 13.6 on. Below it, in expectation over tokens of pi, given their prefix, this is the gradient of
    KL[pi_other || pi], the other direction: maximising k3, as papo_loss does for the perception KL, moves pi
    away from where the other policy has mass. A token that the other policy likes half as much, and one it
    likes as much:

    >>> kl_k3(torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]).log())
    tensor([[0.1931, 0.0000]])
    """
    check_shapes(logps=(logps, "B T"), other_logps=(other_logps, "B T"))
    log_x = (other_logps - logps).clamp(-20, 20)  # (B, T)
    return (log_x.expm1() - log_x).clamp(max=10)  # (B, T) exp() - 1 would drown a small log_x in rounding


def perception_gate(logps, masked_logps, advantages):
    """Where the perception KL of a gated run is paid: A > 0 and pi > pi_mask.  (Ours; not in [1] or [2].)

    logps, masked_logps (B, T), advantages (B,) -> (B, T) bool. k3's derivative, 1 - pi_mask/pi, pushes tokens
    both ways, in right and wrong responses alike. What passes the gate pushes only upwards, by less than
    gamma, and only tokens of responses above their group's mean: through pi, no sampled token is pushed
    against its advantage, whatever gamma is, and equal rewards pay nothing. (masked_grad="full" lowers
    pi_mask of the same tokens, too.) The gate trusts the reward: where a guess is often right, it also pays
    responses that misread the image and were lucky, and a large gamma can still do harm."""
    check_shapes(logps=(logps, "B T"), masked_logps=(masked_logps, "B T"), advantages=(advantages, "B"))
    return (advantages[:, None] > 0) & (logps > masked_logps)  # (B, T)


def aggregate(per_token, response_mask, mode):
    """Average over response tokens. (B, T), (B, T) -> scalar.

    "sequence": 1/B sum_i 1/|o_i| sum_t, each response counts alike ([1] Eq. 2).
    "token":    1/(sum_i |o_i|) sum_i sum_t, each token counts alike ([1] Eq. 3).
    A response of 2 tokens at 1.0 and one of 10 tokens at 0.0:

    >>> per_token = torch.tensor([[1.0] * 2 + [9.9] * 8, [0.0] * 10])  # 9.9: padding, counts nowhere
    >>> response_mask = torch.tensor([[1.0] * 2 + [0.0] * 8, [1.0] * 10])
    >>> aggregate(per_token, response_mask, "sequence"), aggregate(per_token, response_mask, "token")
    (tensor(0.5000), tensor(0.1667))
    """
    check_shapes(per_token=(per_token, "B T"), response_mask=(response_mask, "B T"))
    counts = response_mask.bool().sum(1)  # (B,)
    # Padding is filled with 0, not multiplied by it: 0 x nan is nan.
    sums = per_token.masked_fill(~response_mask.bool(), 0).sum(1)  # (B,)
    if mode == "sequence":
        return (sums / counts.clamp(min=1)).mean()
    if mode == "token":
        return sums.sum() / counts.sum().clamp(min=1)
    raise ValueError(f"aggregation must be sequence or token, got {mode!r}")


# ------------------------------------------------------------------------------------------------------------
# 9. The objective
# ------------------------------------------------------------------------------------------------------------


def papo_loss(
    config,
    logps,
    old_logps,
    advantages,
    response_mask,
    masked_logps=None,
    ref_logps=None,
    entropy=None,
    masked_entropy=None,
    rewards=None,
):
    """The PAPO loss, minus J of [1] Eq. 2 (Eq. 3 for PAPO-D):

        policy + beta KL[pi || pi_ref] - gamma KL[pi || pi_mask] + eta1 H[pi] + eta2 H[pi_mask]

    logps, old_logps, response_mask, masked_logps, ref_logps, entropy, masked_entropy (B, T); advantages (B,).
    entropy, masked_entropy: exact ones from group_logps; None takes -log pi of the sampled tokens, as the
    released code. rewards (B,): not read here; papo_step hands them to every objective, so that one of your
    own may. Returns the scalar to minimise and a dict of floats, each averaged like the loss; what was not
    given is not measured and has no entry. kl_prcp is what is paid, in a gated run what passes the gate; the
    clip fractions count tokens beyond a bound, whatever the sign of A. A term whose weight is 0 adds nothing
    at all, so gamma = 0 is GRPO to the bit. Gradient reaches masked_logps and masked_entropy only as
    config.masked_grad says (table in the header). Raises ValueError if shapes disagree or a term with a
    weight lacks its input."""
    given = dict(
        logps=logps,
        old_logps=old_logps,
        response_mask=response_mask,
        masked_logps=masked_logps,
        ref_logps=ref_logps,
        entropy=entropy,
        masked_entropy=masked_entropy,
    )
    check_shapes(
        **{name: (x, "B T") for name, x in given.items() if x is not None}, advantages=(advantages, "B")
    )
    # Does the perception KL pay any response?
    pays = config.gamma and (not config.gated or (advantages > 0).any())
    if masked_logps is None and (pays or config.eta2):
        raise ValueError("gamma or eta2 is not 0: papo_loss needs masked_logps")
    if ref_logps is None and config.beta:
        raise ValueError("beta is not 0: papo_loss needs ref_logps")
    mean = lambda per_token: aggregate(per_token, response_mask, config.aggregation)  # (B, T) -> scalar

    clips = config.clip_low, config.clip_high, config.clip_dual
    policy = clipped_policy_loss(logps, old_logps.detach(), advantages, *clips)  # (B, T)
    # Every term: its name, its weight in the loss, its mean over tokens.
    terms = [("policy_loss", 1.0, mean(policy))]
    if ref_logps is not None:
        terms.append(("kl_ref", config.beta, mean(kl_k3(logps, ref_logps.detach()))))
    terms.append(("entropy", config.eta1, mean(-logps if entropy is None else entropy)))
    if masked_logps is not None:
        masked_entropy = -masked_logps if masked_entropy is None else masked_entropy  # (B, T)
        if config.masked_grad == "detached":
            masked_entropy = masked_entropy.detach()  # (B, T)
        kl_target = masked_logps if config.masked_grad == "full" else masked_logps.detach()  # (B, T)
        kl = kl_k3(logps, kl_target)  # (B, T)
        if config.gated:
            kl = kl * perception_gate(logps, masked_logps, advantages)  # (B, T)
        terms.append(("kl_prcp", -config.gamma, mean(kl)))  # minus: this KL is to grow
        terms.append(("masked_entropy", config.eta2, mean(masked_entropy)))

    loss = sum(weight * term for _, weight, term in terms if weight)
    ratio = policy_ratio(logps, old_logps).detach()  # (B, T)
    metrics = {
        "loss": loss.item(),
        **{name: term.item() for name, _, term in terms},
        "clip_high_fraction": mean((ratio > 1 + config.clip_high).float()).item(),
        "clip_low_fraction": mean((ratio < 1 - config.clip_low).float()).item(),
    }
    return loss, metrics


# ------------------------------------------------------------------------------------------------------------
# 10. One step: rollouts, constants, update
# ------------------------------------------------------------------------------------------------------------
# A trainer's whole step:
#     groups, redraws = roll_out(model, processor, config, rows, generator)
#     score_constants(model, reference, config, groups)
#     metrics = [papo_step(model, optimizer, config, update) for update in split_batch(config, groups)]


@dataclass
class Group:
    """One question's rollout: all that the update needs, and what a person wants to look at."""

    row: dict  # the data set's: images, problem, answer
    prompt: Prompt
    responses: list  # G LongTensors (<= T,)
    texts: list  # G strings
    scores: list  # G dicts of compute_reward
    advantages: torch.Tensor  # (G,)
    masked_image: Image.Image = None
    masked_prompt: Prompt = None  # None if nothing in the loss needs it
    old_logps: torch.Tensor = None  # (G, T); None in the first update, where pi_old is pi_theta
    ref_logps: torch.Tensor = None  # (G, T); None if beta is 0

    @property
    def mixed(self) -> bool:
        """Some responses right, some wrong: only then does accuracy tell them apart."""
        return 0 < sum(score["accuracy"] for score in self.scores) < len(self.scores)


def prepare(model, prompt) -> Prompt:
    """The prompt as it is kept: with the image's features if training cannot change them, else its pixels."""
    frozen = not any(p.requires_grad for p in model.model.visual.parameters())
    return encode_image(model, prompt) if frozen else prompt


def sample_and_grade(model, processor, config, rows, generator) -> list[Group]:
    """Encode, sample, reward, standardise: a Group per row, not yet masked. generator: on the model's device.

    A row may bring its `prompt`, encoded when it was checked. It is taken out of the row, so that its pixels
    go once nothing else needs them."""
    encode = lambda row: row.pop("prompt", None) or encode_prompt(processor, row["problem"], row["images"][0])
    prompts = [prepare(model, encode(row)) for row in rows]
    sizes = config.group_size, config.max_new_tokens
    sampled = sample_groups(model, processor, prompts, *sizes, config.temperature, config.top_p, generator)
    groups = []
    for row, prompt, responses in zip(rows, prompts, sampled):
        # Thinking models' chat templates open the <think> themselves; the format rule wants to see it.
        end_of_prompt = processor.tokenizer.decode(prompt["input_ids"][0, -4:]).rstrip()
        opening = "<think>" if end_of_prompt.endswith("<think>") else ""
        texts = [opening + processor.tokenizer.decode(o, skip_special_tokens=True) for o in responses]
        scores = [compute_reward(text, row["answer"], config.format_weight) for text in texts]
        advantages = group_advantages([score["reward"] for score in scores])  # (G,)
        groups.append(Group(row, prompt, responses, texts, scores, advantages))
    return groups


def roll_out(model, processor, config, rows, generator):
    """Fill a rollout batch with groups. rows: an iterator over data set rows that does not run dry.
    generator: on the CPU.

    With dynamic_sampling (DAPO, PAPO-D) only mixed groups are kept and the missing ones redrawn, at most
    max_redraws times; then the batch stays short. Returns the groups and the number of redraws."""
    # Two generators of their own, so that masking moves no sample.
    seeds = torch.randint(2**62, (2,), generator=generator).tolist()
    sampling = torch.Generator(model.device).manual_seed(seeds[0])
    masking = torch.Generator().manual_seed(seeds[1])
    rounds = 1 + (config.max_redraws if config.dynamic_sampling else 0)
    groups = []
    for redraws in range(rounds):  # noqa: B007  how many it took is returned
        missing, drawn = config.prompts_per_batch - len(groups), []
        while len(drawn) < missing:
            share = [next(rows) for _ in range(min(config.prompts_per_sample, missing - len(drawn)))]
            drawn += sample_and_grade(model, processor, config, share, sampling)
        groups += [group for group in drawn if group.mixed or not config.dynamic_sampling]
        if len(groups) == config.prompts_per_batch:
            break
    if config.gamma or config.eta2:
        for group in groups:  # one fresh mask per question and step, shared by its group
            if config.gated and not config.eta2 and not group.advantages.any():
                continue  # equal rewards: nothing is paid
            image = fit_image(processor, group.row["images"][0])
            group.masked_image = mask_patches(image, config.mask_ratio, config.patch_size, masking)
            group.masked_prompt = prepare(model, mask_prompt(processor, group.prompt, group.masked_image))
    return groups, redraws


def split_group(config, prompt, responses) -> list[slice]:
    """Cut a group's responses into runs, each of which fits into a row of tokens_per_forward together with
    the prompt. A response too long for that is a run of its own.

    A prompt of 10 tokens and responses of 5, 4, 3 and 9, in rows of at most 20:

    >>> prompt, responses = {"input_ids": torch.zeros(1, 10)}, [torch.zeros(n) for n in (5, 4, 3, 9)]
    >>> split_group(PAPOConfig(tokens_per_forward=20), prompt, responses)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    budget = config.tokens_per_forward - prompt["input_ids"].shape[1]
    starts, used = [0], 0
    for i, response in enumerate(responses):
        if i > starts[-1] and used + len(response) > budget:
            starts.append(i)
            used = 0
        used += len(response)
    return [slice(start, end) for start, end in zip(starts, starts[1:] + [len(responses)])]


@torch.no_grad()
def score_constants(model, reference, config, groups):
    """Store what the updates hold constant in the groups: log pi_ref if beta > 0, and log pi_old for all but
    the first update's groups (there pi_old is pi_theta and the ratio exactly 1).

    reference: called without arguments it gives a context manager around the reference model, for example
    `lambda: nullcontext(frozen_copy)`, or one that switches a LoRA adapter off."""

    def score(model, group):
        parts = [group.responses[part] for part in split_group(config, group.prompt, group.responses)]
        scored = [group_logps(model, group.prompt, part, config.temperature)[0] for part in parts]
        rows = [row for logps in scored for row in logps]  # G x (<= T,)
        return pad_sequence(rows, batch_first=True)  # (G, T)

    model.eval()
    for group in [group for update in split_batch(config, groups)[1:] for group in update]:
        group.old_logps = score(model, group)
    if config.beta:
        with reference() as reference_model:
            for group in groups:
                group.ref_logps = score(reference_model, group)


def split_batch(config, groups) -> list[list[Group]]:
    """A rollout batch as updates_per_batch updates of nearly equal size; fewer if there are fewer groups."""
    count = min(config.updates_per_batch, len(groups))
    return [groups[len(groups) * i // count : len(groups) * (i + 1) // count] for i in range(count)]


def papo_step(model, optimizer, config, groups, objective=papo_loss):
    """One optimizer update on some groups of a rollout batch. Returns metrics: those of papo_loss, grad_norm,
    skipped (0 or 1).

    objective: called as papo_loss is, all by keyword but the config, on the responses of one pass (a group or
    a part of it); what was not scored is None. Returns what papo_loss returns. Your own may change what
    papo_loss gets, for example pay right responses only:

        lambda config, advantages, rewards, **rest: papo_loss(
            config, advantages=advantages * (rewards > 0.5), **rest)

    Each group (or each part, see split_group) is one forward pass, one more with the masked image if the loss
    needs it, and one backward pass; gradients add up. A part's mean is weighted by its share of the batch's
    average, so loss and gradient do not depend on the split: of 10 responses split as 5, 3 and 2, the means
    count 5/10, 3/10 and 2/10 ("token": by their tokens). After model.gradient_checkpointing_enable() the
    layers' activations are recomputed in backward instead of kept. An update whose gradient is not finite is
    skipped: one bad batch must not destroy the weights."""
    if not groups:
        raise ValueError("papo_step needs at least one group")
    model.train()
    optimizer.zero_grad(set_to_none=True)
    total = {
        "sequence": sum(len(group.responses) for group in groups),
        "token": sum(len(o) for group in groups for o in group.responses),
    }[config.aggregation]
    metrics = {}
    for group in groups:
        for part in split_group(config, group.prompt, group.responses):
            loss, part_metrics, count = group_loss(model, config, group, part, objective)
            (loss * count / total).backward()
            for name, value in part_metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value * count / total
    parameters = [p for p in model.parameters() if p.grad is not None]
    metrics["grad_norm"] = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
    metrics["skipped"] = float(not math.isfinite(metrics["grad_norm"]))
    if not metrics["skipped"]:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return metrics


def group_loss(model, config, group, part=slice(None), objective=papo_loss):
    """The objective over some of a group's responses. Returns the scalar with its graph, the metrics, and how
    many items of the aggregation (responses or tokens) it averages."""
    responses, exact = group.responses[part], config.entropy_estimate == "exact"
    scores = group_logps(model, group.prompt, responses, config.temperature, with_entropy=exact)
    logps, response_mask = scores[:2]  # (G, T), (G, T); here G and T are those of the part
    T, advantages = logps.shape[1], group.advantages[part].to(logps.device)  # (G,)
    given = dict(
        logps=logps,
        old_logps=logps.detach() if group.old_logps is None else group.old_logps[part, :T],  # (G, T)
        ref_logps=None if group.ref_logps is None else group.ref_logps[part, :T],  # (G, T)
        advantages=advantages,
        rewards=torch.tensor([score["reward"] for score in group.scores[part]], device=logps.device),  # (G,)
        response_mask=response_mask,
        entropy=scores[2] if exact else None,  # (G, T)
        masked_logps=None,
        masked_entropy=None,
    )
    # papo_loss's gated KL reads paid responses only; H[pi_mask], and an objective of your own, may read all.
    partly = config.gated and not config.eta2 and objective is papo_loss
    paid = advantages > 0 if partly else torch.ones_like(advantages, dtype=torch.bool)  # (G,)
    if group.masked_prompt is not None and paid.any():
        given |= masked_scores(model, config, group.masked_prompt, responses, paid, T)
    loss, metrics = objective(config, **given)
    if partly:
        metrics.pop("masked_entropy", None)  # known of the paid responses alone
    count = len(responses) if config.aggregation == "sequence" else int(response_mask.sum())
    return loss, metrics, count


def masked_scores(model, config, masked_prompt, responses, paid, T):
    """masked_logps and masked_entropy, (G, T) each, of the responses that `paid` (G,) chooses; T: the longest
    of all. The others get 0, which papo_loss never reads: their advantage closes the gate."""
    chosen = [o for o, wanted in zip(responses, paid) if wanted]
    exact = config.entropy_estimate == "exact"
    with torch.set_grad_enabled(config.masked_grad != "detached"):
        masked_logps, _, *entropy = group_logps(model, masked_prompt, chosen, config.temperature, exact)

    def spread(x):  # (chosen, <= T) -> (G, T)
        whole = x.new_zeros(len(responses), T)  # (G, T)
        whole[paid] = F.pad(x, (0, T - x.shape[1]))  # (chosen, T)
        return whole

    return dict(masked_logps=spread(masked_logps), masked_entropy=spread(entropy[0]) if exact else None)
