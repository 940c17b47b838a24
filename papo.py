"""PAPO, Perception-Aware Policy Optimization: the whole algorithm in one file, the paper first.

[1] Wang et al., "Perception-Aware Policy Optimization for Multimodal Reasoning", arXiv 2507.06448.
[2] The authors' released code, github.com/MikeWangWZHL/PAPO.
[3] Shao et al., "DeepSeekMath", arXiv 2402.03300 (GRPO).   [4] Yu et al., "DAPO", arXiv 2503.14476.
[5] Schulman, "Approximating KL Divergence", joschu.net/blog/kl-approx.html, 2020.
[6] Wang et al., "Qwen2-VL", arXiv 2409.12191 (M-RoPE).

For a question with an image, sample a group of G responses and reward each. GRPO [3] makes the
better ones likelier. PAPO adds one idea: score the SAME responses once more with most of the image
blacked out, and reward the policy for changing its mind. A policy that answers alike without the
picture did not look at it. What is maximised (paper Eq. 2), per response token:

      min(r A, clip(r, 1-eps_l, 1+eps_h) A)     clipped policy term, r = pi_theta / pi_old
    - beta  KL[pi || pi_ref]                    reference KL
    + gamma KL[pi || pi_mask]                   perception KL
    - eta1  H[pi]  -  eta2 H[pi_mask]           double entropy

pi_old sampled the response, pi_ref is the policy before training, pi_mask is pi_theta looking at
the masked image; KL and H are of the next token's distribution. The perception KL can be hacked, as
[1] calls it: at a large gamma the policy raises it by writing what has nothing to do with the
question. The double entropy keeps both distributions peaked, which slows that, up to a point.

THE WAY OF THE DATA
    question, image, answer -> encode_prompt -> sample_groups -> compute_reward -> group_advantages
                            -> mask_patches  -> mask_prompt   -> group_logps x 1..4 -> papo_loss
    A trainer's step: one batch of responses, from which several updates are made.
        groups, redraws = roll_out(model, processor, config, rows, generator)  # to mask_prompt
        score_constants(model, reference, config, groups)  # old and reference logps
        for part in split_batch(config, groups):
            papo_step(model, optimizer, config, part)  # logps, masked logps, loss, update

THE SECTIONS
    1 masking   2 advantages   3 terms of the loss   4 objective: up to here it is all of PAPO
    5 reward    6 sampling     7 scoring             8 one step:  what every such method needs
    A recipe and presets       B Qwen-VL's prompt and positions

GLOSSARY (shapes: B responses, G group, T longest response, P prompt length, L row length,
V vocabulary, H hidden width; N: all response tokens of a group, one after the other)
    code name           symbol            shape    meaning
    logps               log pi_theta(o)   (B, T)   log-probability of each sampled token, now
    old_logps           log pi_old(o)     (B, T)   under the policy that sampled it, constant
    ref_logps           log pi_ref(o)     (B, T)   under the frozen starting policy, constant
    masked_logps        log pi_mask(o)    (B, T)   under pi_theta looking at the masked image
    entropy             H[pi_theta]       (B, T)   of the next token; masked_entropy: H[pi_mask]
    response_mask       1 where t < |o|   (B, T)   1 on response tokens, end token too; 0 on padding
    rewards             R                 (G,)     one number per response, here in [0, 1]
    advantages          A                 (B,)     reward standardised within its group
    clip_low, clip_high eps_l, eps_h      float    r is clipped to 1-eps_l .. 1+eps_h; clip_dual: c
    gamma, beta         gamma, beta       float    weight of the perception KL, of the reference KL
    eta1, eta2          eta_1, eta_2      float    weights of the two entropies
    mask_ratio          p                 float    probability that a patch is blacked out
    group_size          G                 int      responses per question

WORDS
    VLM         a language model that sees: a vision tower turns each patch (14 x 14 pixels) into a
                vector, 2 x 2 of these are merged into one visual token, and the language model
                reads the visual tokens where the prompt says <|image_pad|>
    processor   a VLM's tokenizer, chat template and preparation of images in one
    GRPO, DAPO  policy gradient with the group's mean reward as baseline [3]; the same with one
                average over all tokens, a clip wider above, and only groups of mixed results [4]
    on-policy   the responses come from the very policy that is differentiated, so r = 1. So it is
                in a batch's first update; in the later ones r moves, and the clip acts
    nat         unit of log-probabilities with the natural logarithm; 1 nat = a factor of 2.7

WHAT CARRIES GRADIENT, by masked_grad (by default "entropy" if eta2 > 0, else "detached")
    masked_grad   KL through pi   KL through pi_mask      H[pi]   H[pi_mask]
    "detached"    yes             no                      yes     no: a constant, as in [2]
    "entropy"     yes             no                      yes     yes
    "full"        yes             yes, as Eq. 2 implies   yes     yes
    KL is the perception KL. Policy term and reference KL carry it through pi; pi_old and pi_ref
    never do. Rewards and advantages are plain numbers.

docs/differences.md lists all differences to the paper and to the released code, with the reasons.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from qwen_vl_utils.vision_process import smart_resize, to_rgb
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.image_utils import load_image

from grader import answers_match


# ---- 1. Random patch masking: I -> I_mask   ([1] App. G.1) ---------------------------------------
def mask_patches(image, ratio=0.6, patch_size=14, generator=None):
    """Black out each patch_size x patch_size cell of a grid, independently, with probability ratio.
    Of the ratios [1] finds 0.6 to 0.8 best; wholly black images make training collapse sooner. A
    group's responses share one mask, drawn afresh in each roll_out.

    image: PIL, not changed; after fit_image its cells are the vision tower's patches; in other
    sizes cells at the right and lower edge are cut. Returns a new RGB image of the same size.
    Raises ValueError for a ratio outside [0, 1] or a patch smaller than a pixel."""
    if not 0 <= ratio <= 1:
        raise ValueError(f"mask ratio must lie in [0, 1], got {ratio}")
    if patch_size < 1:
        raise ValueError(f"patch_size must be at least 1, got {patch_size}")
    columns, rows = math.ceil(image.width / patch_size), math.ceil(image.height / patch_size)
    black = torch.rand(rows, columns, generator=generator) < ratio  # (rows, columns) bool
    # The stencil: one pixel per cell, 255 where black goes, enlarged to whole cells.
    stencil = Image.fromarray(black.byte().mul(255).numpy())
    stencil = stencil.resize((columns * patch_size, rows * patch_size), Image.NEAREST)
    masked = image.convert("RGB")  # a copy, also of an RGB image
    masked.paste((0, 0, 0), mask=stencil.crop((0, 0, *image.size)))
    return masked


# ---- 2. Group advantages: R_1 .. R_G -> A_1 .. A_G   ([1] section 2, after [3]) ------------------
def group_advantages(rewards, eps=1e-6):
    """A_i = (R_i - mean(R)) / (std(R) + eps) over the group, the last dimension.

    rewards (..., G) -> (..., G), mean 0. The standard deviation is the unbiased one (G - 1), as in
    [2]. Equal rewards get exactly 0, since rounding over a tiny deviation gives noise (seven
    rewards of 0.3 would get 0.03 each): such a group teaches the policy term nothing, and a gated
    KL neither; the other terms go on. ValueError for a group of fewer than 2. One right answer
    among eight, in the right format (0.1) all:

    >>> group_advantages([1.0] + [0.1] * 7)
    tensor([ 2.4749, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536, -0.3536])
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float32)  # (..., G)
    if rewards.dim() == 0 or rewards.shape[-1] < 2:
        raise ValueError(f"rewards need a group dimension G >= 2, got {tuple(rewards.shape)}")
    spread = rewards.std(-1, keepdim=True)  # (..., 1)
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / (spread + eps)  # (..., G)
    equal = (rewards == rewards[..., :1]).all(-1, keepdim=True)  # (..., 1)
    return advantages.masked_fill(equal, 0.0)  # (..., G)


# ---- 3. The terms of the loss, each (B, T) -> (B, T), and their average --------------------------
def policy_ratio(logps, old_logps):
    """r = pi_theta / pi_old of each token, (B, T), (B, T) -> (B, T). The log-ratio is clamped to
    +-20, as in [2]."""
    return (logps - old_logps).clamp(-20, 20).exp()  # (B, T)


def clipped_policy_loss(logps, old_logps, advantages, clip_low, clip_high, clip_dual):
    """- min(r A, clip(r, 1 - eps_l, 1 + eps_h) A), and for A < 0 at most c |A|.   ([1] Eq. 2, [2])

    logps, old_logps (B, T), advantages (B,) -> (B, T), to minimise. Where the clip acts there is no
    gradient: a good response's token is pushed until it is 1 + eps_h times as likely, a bad one's
    until it is 1 - eps_l times as likely. Beyond r = c a bad token has no gradient either, so that
    it cannot dominate. A good token at r = 1.4 (earns 1.3 A, not 1.4 A), a bad one at r = 0.5
    (costs 0.8 |A|, not 0.5 |A|), and a bad one at r = 7 (3 |A|, not 7 |A|):

    >>> clipped_policy_loss(torch.tensor([[1.4], [0.5], [7.0]]).log(), torch.zeros(3, 1),
    ...                     torch.tensor([2.0, -1.0, -1.0]), 0.2, 0.3, clip_dual=3.0)
    tensor([[-2.6000],
            [ 0.8000],
            [ 3.0000]])
    """
    check_shapes(logps=logps, old_logps=old_logps, advantages=advantages)
    advantages = advantages[:, None]  # (B, 1)
    ratio = policy_ratio(logps, old_logps)  # (B, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)  # (B, T)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)  # (B, T)
    return torch.where(advantages < 0, loss.minimum(-clip_dual * advantages), loss)  # (B, T)


def kl_k3(logps, other_logps):
    """k3 = x - log x - 1 with x = pi_other / pi: never negative, and but for its cap an unbiased
    estimate of KL[pi || pi_other] from tokens of pi.   ([2], after [5]; [1] inverts x: biased)

    (B, T), (B, T) -> (B, T) in [0, 10]. d k3 / d log pi = 1 - x; 0 where the cap of 10 acts, at
    x > 13.6 or x < e^-11. Sampling undifferentiated, E[grad log pi] = 0, so k3's expected gradient
    is -E[x grad log pi], which is that of KL[pi_other || pi], the other direction: maximising k3,
    as papo_loss does for the perception KL, moves pi away from where the other policy has mass. A
    token that the other policy likes half as much, and one it likes as much:

    >>> kl_k3(torch.zeros(1, 2), torch.tensor([[0.5, 1.0]]).log())
    tensor([[0.1931, 0.0000]])
    """
    check_shapes(logps=logps, other_logps=other_logps)
    log_x = (other_logps - logps).clamp(-20, 20)  # (B, T)
    return (log_x.expm1() - log_x).clamp(max=10)  # (B, T) exp() - 1 would round a small log_x away


def perception_gate(logps, masked_logps, advantages):
    """Where gated=True pays the perception KL: A > 0 and pi > pi_mask.   (Ours; not in [1] or [2])

    logps, masked_logps (B, T), advantages (B,) -> (B, T) bool. k3's derivative, 1 - pi_mask / pi,
    pushes tokens both ways, in right and wrong responses alike. What passes the gate pushes only
    upwards, and only tokens of responses above their group's mean: this term's gradient through pi
    never opposes an advantage, whatever gamma is. The gate trusts the reward: where a guess is
    often right, it also pays responses that misread the image and were lucky."""
    check_shapes(logps=logps, masked_logps=masked_logps, advantages=advantages)
    return (advantages[:, None] > 0) & (logps > masked_logps)  # (B, T)


def aggregate(per_token, response_mask, mode):
    """Average over response tokens. (B, T), (B, T) -> scalar.

    "sequence": 1/B sum_i 1/|o_i| sum_t, each response counts alike ([1] Eq. 2).
    "token":    1/(sum_i |o_i|) sum_i sum_t, each token counts alike ([1] Eq. 3).
    The same if all are equally long. A response of 2 tokens at 1.0 and one of 10 tokens at 0.0:

    >>> per_token = torch.tensor([[1.0] * 2 + [9.9] * 8, [0.0] * 10])  # 9.9: padding, no effect
    >>> response_mask = torch.tensor([[1.0] * 2 + [0.0] * 8, [1.0] * 10])
    >>> [aggregate(per_token, response_mask, mode) for mode in ("sequence", "token")]
    [tensor(0.5000), tensor(0.1667)]
    """
    check_shapes(per_token=per_token, response_mask=response_mask)
    counts = response_mask.bool().sum(1)  # (B,)
    # Padding is filled with 0, not multiplied by it: 0 x nan is nan.
    sums = per_token.masked_fill(~response_mask.bool(), 0).sum(1)  # (B,)
    if mode == "sequence":
        return (sums / counts.clamp(min=1)).mean()
    if mode == "token":
        return sums.sum() / counts.sum().clamp(min=1)
    raise ValueError(f"aggregation must be sequence or token, got {mode!r}")


# ---- 4. The objective ----------------------------------------------------------------------------
def papo_loss(
    config, logps, old_logps, advantages, response_mask, masked_logps=None, ref_logps=None,
    entropy=None, masked_entropy=None, rewards=None, row=None,
):  # fmt: skip
    """The PAPO loss, minus J of [1] Eq. 2 (Eq. 3 for PAPO-D):

        policy + beta KL[pi || pi_ref] - gamma KL[pi || pi_mask] + eta1 H[pi] + eta2 H[pi_mask]

    The B responses are a group's, or some of it; papo_step adds the groups up. advantages, rewards
    (B,); all others (B, T). entropy, masked_entropy: exact ones from group_logps; None takes -log
    pi of the sampled tokens, as [2]. rewards and row (see Row) are not read here, but an objective
    of your own may. Returns the scalar to minimise and a dict of floats, each averaged like the
    loss; without ref_logps or masked_logps their terms have no entry. kl_prcp is before gamma, in a
    gated run what passes the gate; the clip fractions count tokens beyond a bound, whatever the
    sign of A. A term whose weight is 0 adds nothing at all: with gamma, eta1 and eta2 at 0 this is
    GRPO to the bit. ValueError if shapes disagree or a term with a weight lacks its input."""
    check_shapes(
        logps=logps, old_logps=old_logps, advantages=advantages, response_mask=response_mask,
        masked_logps=masked_logps, ref_logps=ref_logps, entropy=entropy,
        masked_entropy=masked_entropy,
    )  # fmt: skip
    if masked_logps is None and (config.gamma or config.eta2):
        raise ValueError("gamma or eta2 is not 0: papo_loss needs masked_logps")
    if ref_logps is None and config.beta:
        raise ValueError("beta is not 0: papo_loss needs ref_logps")
    mean = lambda per_token: aggregate(per_token, response_mask, config.aggregation)  # -> scalar

    clips = config.clip_low, config.clip_high, config.clip_dual
    policy = clipped_policy_loss(logps, old_logps.detach(), advantages, *clips)  # (B, T)
    # Every term: its name, its weight in the loss, its mean over tokens.
    terms = [("policy_loss", 1.0, mean(policy))]
    if ref_logps is not None:
        terms.append(("kl_ref", config.beta, mean(kl_k3(logps, ref_logps.detach()))))
    terms.append(("entropy", config.eta1, mean(-logps if entropy is None else entropy)))
    if masked_logps is not None:
        masked_entropy = -masked_logps if masked_entropy is None else masked_entropy  # (B, T)
        if config.mask_gradient == "detached":  # masked_grad, or its default
            masked_entropy = masked_entropy.detach()  # (B, T)
        kl_target = masked_logps if config.mask_gradient == "full" else masked_logps.detach()
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


# ---- 5. The rule-based reward: R_i ---------------------------------------------------------------
def extract_boxed(text: str) -> str | None:
    r"""Inside of the last balanced \boxed{...} in `text`, or None. \{ and \} are no braces.

    >>> print(extract_boxed(r"\boxed{1}? No: \boxed{\frac{1}{2}}. Or is it \boxed{3"))
    \frac{1}{2}
    """
    opened, (start, end) = [], (0, 0)  # one pass: a million unclosed boxes cost no more than text
    for token in re.finditer(r"\\[{}]|(\\boxed\{|\{)|(\})", text):
        if token[1]:
            opened.append(token.end() if token[1] != "{" else 0)  # 0: a brace that opens no box
        elif token[2] and opened:  # of the closed boxes the one that opens last
            start, end = max((start, end), (opened.pop(), token.start()))
    return text[start:end] if start else None


def follows_format(response: str) -> bool:
    r"""Whether `response` is <think>...</think>...\boxed{...}..., spaces around < > / allowed, as
    [2]. Each landmark is sought in turn, one pass: the regex of [2] can backtrack for hours."""
    match = re.match(r"\s*<\s*think\s*>", response)
    for landmark in (r"<\s*/\s*think\s*>", r"\\boxed\{", r"\}"):
        match = match and re.compile(landmark).search(response, match.end())
    return match is not None


def compute_reward(response: str, answer: str, format_weight: float = 0.1) -> dict[str, float]:
    r"""Reward of a response, as [2]: (1 - format_weight) * accuracy + format_weight * format.

    accuracy is 1.0 if the last \boxed{...} of the response means the same as `answer`, format is
    1.0 if the response follows the format, else 0.0. Unevaluated arithmetic counts as its value, as
    in math-verify. Any strings will do, hostile ones included. A reward of your own (roll_out's
    `reward`) is called alike and returns at least "reward" and "accuracy"."""
    boxed = extract_boxed(response)
    accuracy = float(boxed is not None and answers_match(boxed, answer))
    format_score = float(follows_format(response))
    reward = (1 - format_weight) * accuracy + format_weight * format_score
    return {"reward": reward, "accuracy": accuracy, "format": format_score}


# ---- 6. Sampling: o_1 .. o_G ~ pi_old(. | q, I) --------------------------------------------------

LOOK_EVERY = {"cpu": 1, "cuda": 16}  # tokens between checks for ended responses: each stalls a GPU


def sample_token(logits, temperature=1.0, top_p=1.0, generator=None):
    """Draw one token per row. logits (B, V) -> (B,). temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1)  # (B,)
    probs = (logits.float() / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        ranked, order = probs.sort(-1, descending=True)  # (B, V), (B, V)
        outside = ranked.cumsum(-1) - ranked >= top_p  # (B, V) enough mass lies before this token
        kept = ranked.masked_fill(outside, 0)  # (B, V)
        probs = torch.zeros_like(probs).scatter(-1, order, kept)  # (B, V) sum <= 1
    # The token is where a uniform number in [0, 1) falls among the summed probabilities: one number
    # a row, where torch.multinomial draws V. In float64, since fp32 sums over 150,000 tokens would
    # blur the unlikely ones. A token of probability 0 is never met.
    summed = probs.cumsum(-1, dtype=torch.float64)  # (B, V)
    uniform = dict(dtype=torch.float64, device=probs.device, generator=generator)
    place = torch.rand(len(probs), 1, **uniform)  # (B, 1)
    return torch.searchsorted(summed, place * summed[:, -1:], right=True)[:, 0]  # (B,)


def attention_bias(visible, dtype):
    """A boolean mask as numbers of the same shape to add to the attention scores: 0 where
    `visible`, else the smallest there is. (Eager attention would add the booleans, as 0 and 1.)"""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


class RoomyLayer(DynamicLayer):
    """One layer of a KV cache that writes a new token in place; transformers' layer copies all
    that is there. filled: the layer after the prefill of n prompts. A prompt's keys and values are
    copied for each of its G responses: rows 0 to G - 1 continue the first prompt."""

    def __init__(self, filled, group_size):
        super().__init__()
        self.is_initialized = True
        self.length = filled.get_seq_length()  # tokens written; behind them is unwritten room
        self.keys = filled.keys.repeat_interleave(group_size, 0)  # (B, heads, P, d), d: head width
        self.values = filled.values.repeat_interleave(group_size, 0)  # (B, heads, P, d)

    def update(self, key_states, value_states, *args, **kwargs):
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:  # room for 64 more tokens, so that copying is rare
            grow = lambda x: torch.cat([x, x.new_empty(*x.shape[:2], 64, x.shape[3])], 2)
            self.keys, self.values = grow(self.keys), grow(self.values)  # (B, heads, L, d) each
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]  # P + t tokens each

    def get_seq_length(self):
        return self.length


def end_tokens(model, processor) -> list[int]:
    """Ids that end a response: the tokenizer's, and those of the model's generation_config that are
    special tokens; others would end it midway. Qwen2.5-VL lists <|im_end|> and <|endoftext|>."""
    listed = model.generation_config.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    special = processor.tokenizer.all_special_ids
    return [processor.tokenizer.eos_token_id] + [token for token in listed if token in special]


def prefill(model, prompts):
    """Run n prompts once. Returns the KV cache, the last logits (n, V), positions (3, n, P), and
    `seen` (n, P): 0 on the padding, on the left, so that all prompts end where responses begin."""
    pad = dict(batch_first=True, padding_side="left")
    ids = [prompt["input_ids"][0] for prompt in prompts]  # n x (P,)
    seen = pad_sequence([torch.ones_like(row) for row in ids], **pad).to(model.device)  # (n, P)
    input_ids = pad_sequence(ids, **pad).to(model.device)  # (n, P) no one sees the padding
    images = image_inputs(prompts, model.device)
    positions = rope_positions(model, input_ids, images, seen)  # (3, n, P)
    # Passed by position: transformers 5.24 renamed the cache's keyword, past_key_values, to cache.
    inputs = input_ids, seen, positions, (cache := DynamicCache(config=model.config))
    logits = model(*inputs, use_cache=True, logits_to_keep=1, **images).logits[:, -1]  # (n, V)
    return cache, logits, positions, seen


@torch.no_grad()
def sample_groups(
    model, processor, prompts, group_size, max_new_tokens, temperature=1.0, top_p=1.0,
    generator=None,
):  # fmt: skip
    """Sample group_size responses for each prompt: one prefill for all prompts, then one token a
    time for all responses.

    Nothing but the end tokens is taken from the model's generation_config, whose temperature and
    penalties would make a group's responses alike. Vision tokens are never drawn: in a response
    they would ask for an image. generator: on the model's device. Returns per prompt a list of
    group_size LongTensors (<= max_new_tokens,), cut after the first end token; one cut at
    max_new_tokens has none, and is trained as it stands."""
    if not prompts:
        raise ValueError("no prompts to sample from")
    device, training = model.device, model.training
    model.eval()  # under train() a gradient-checkpointed layer would drop its KV cache
    cache, logits, positions, seen = prefill(model, prompts)

    # From here on B = n * G rows, fewer as responses end.
    cache.layers = [RoomyLayer(layer, group_size) for layer in cache.layers]
    logits = logits.repeat_interleave(group_size, 0)  # (B, V)
    position = positions.amax(dim=(0, 2)).repeat_interleave(group_size)  # (B,) of the prompt's last
    seen = F.pad(seen, (0, max_new_tokens), value=1)  # (n, L), L = P + max_new_tokens
    seen = seen.repeat_interleave(group_size, 0)  # (B, L)
    bias = attention_bias(seen[:, None, None].bool(), model.dtype)  # (B, 1, 1, L)
    rows = torch.arange(len(bias), device=device)  # (B,) which responses these are
    tokens = torch.full((len(bias), max_new_tokens), -1, device=device)  # (n * G, max), -1: none
    ends = torch.tensor(end_tokens(model, processor), device=device)  # (end tokens,)
    never = torch.tensor(vision_token_ids(model), device=device)  # (4,)
    done = torch.zeros_like(rows, dtype=torch.bool)  # (B,)
    for t in range(max_new_tokens):
        logits[:, never] = -math.inf
        token = sample_token(logits, temperature, top_p, generator)  # (B,)
        tokens[rows, t] = token.where(~done, -1)
        done |= torch.isin(token, ends)
        looking = (t + 1) % LOOK_EVERY.get(device.type, 16) == 0
        if t + 1 == max_new_tokens or looking and done.all():
            break
        # Drop the ended rows, but only once they are a quarter: dropping copies the cache.
        if looking and done.sum() >= len(done) / 4:
            going = (~done).nonzero()[:, 0]  # (B',)
            state = rows, token, position, bias, done
            rows, token, position, bias, done = (x[going] for x in state)
            cache.batch_select_indices(going)
        position = position + 1  # (B,)
        place = position[None, :, None].expand(3, -1, -1)  # (3, B, 1) text: all three alike
        so_far = bias[..., : positions.shape[2] + t + 1]  # (B, 1, 1, P + t + 1)
        logits = model(token[:, None], so_far, place, cache, use_cache=True).logits[:, -1]  # (B, V)
    model.train(training)
    responses = [row[row >= 0] for row in tokens.cpu()]  # n * G x (|o|,)
    return [responses[i : i + group_size] for i in range(0, len(responses), group_size)]


# ---- 7. Scoring: log pi(o_t | q, I, o_<t), a group in one row ------------------------------------

HEAD_CHUNK = 256  # positions whose logits exist at a time: 256 x 151,936 fp32 numbers are 156 MB


def token_logps(hidden, targets, head, temperature=1.0, with_entropy=False):
    """log pi(target), and with_entropy the entropy, at each position, never holding all logits.

    hidden (N, H), targets (N,) -> logps (N,), entropy (N,) or None, fp32. Each chunk's logits are
    computed again in backward: a plain loop would keep them all alive for autograd, 2.4 GB per copy
    for 4,000 tokens of a 151,936-word vocabulary."""

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

    So each response is scored as if it stood alone after the prompt, but the image is encoded once,
    the prompt runs once, and there is no padding. For P = 3, |o_1| = 2, |o_2| = 1 (# is seen, . is
    not; a1 and b0 are last tokens and predict nothing):

        query     p0 p1 p2 a0 a1 b0     position    predicts
        p0         #  .  .  .  .  .        0
        p1         #  #  .  .  .  .        1
        p2         #  #  #  .  .  .        2        a0, and b0
        a0         #  #  #  #  .  .        3        a1
        a1         #  #  #  #  #  .        4
        b0         #  #  #  .  .  #        3

    An image's tokens share positions (see rope_positions), so that behind an image responses start
    below P. The prompt's last position predicts every first token: from o_2 on the left neighbour
    is another response's end. Returns the model's inputs and the index of the position that
    predicts each response token: (N,), here [2, 3, 2]."""
    device = model.device
    P, lengths = prompt["input_ids"].shape[1], [len(o) for o in responses]
    row = torch.cat([prompt["input_ids"][0], *responses])[None].to(device)  # (1, L)
    images = image_inputs([prompt], device)
    # Who owns each token of the row: 0 the prompt, i response o_i.
    owner = torch.repeat_interleave(torch.tensor([P, *lengths])).to(device)  # (L,)
    visible = (owner[:, None] == owner) | (owner == 0)  # (L, L) query x key: own key, or prompt
    if prompt.get("blind"):  # for objectives of your own: a view without the image
        visible &= row[0] != model.config.image_token_id  # (L, L)
    visible = visible.tril()[None, None]  # (1, 1, L, L) and nothing further right in the row
    place = torch.cat([torch.arange(n) for n in lengths]).to(device)  # (N,) in its response, from 0
    positions = rope_positions(model, row[:, :P], images)  # (3, 1, P)
    after = positions.max() + 1 + place  # (N,)
    positions = torch.cat([positions, after.expand(3, 1, -1)], dim=2)  # (3, 1, L) alike
    left = torch.arange(P - 1, row.shape[1] - 1, device=device)  # (N,) left neighbours, N = L - P
    predictor = left.where(place > 0, P - 1)  # (N,)
    bias = attention_bias(visible, model.dtype)  # (1, 1, L, L)
    inputs = dict(input_ids=row, attention_mask=bias, position_ids=positions, use_cache=False)
    return {**inputs, **images}, predictor


class Row(NamedTuple):
    """A pass of group_logps, from which an objective of your own can read states, or score another
    view of the prompt: group_logps(row.model, {**row.prompt, "blind": True}, row.responses)."""

    model: object
    prompt: dict
    responses: list  # G LongTensors (<= T,)
    hidden: torch.Tensor  # (L, H) last layer
    predictor: torch.Tensor  # (N,) see group_row


def group_logps(model, prompt, responses, temperature=1.0, with_entropy=False, with_row=False):
    """log pi(o_t | q, I, o_<t) of every token of G responses to one prompt, in one forward pass.

    responses: G LongTensors (<= T,). Returns logps (G, T) fp32, 0 on padding; response_mask (G, T)
    float; with_entropy the entropy (G, T), in nats; with_row the Row. Gradient flows if enabled. Of
    sampling's settings the temperature counts here, top_p does not, as in [2].
    ValueError for no or an empty response, a vision token in one, attention without masks."""
    if not len(responses) or any(len(o) == 0 for o in responses):
        raise ValueError("group_logps needs at least one response, each of at least one token")
    targets = torch.cat(list(responses)).to(model.device)  # (N,) all response tokens
    if torch.isin(targets, torch.tensor(vision_token_ids(model), device=model.device)).any():
        raise ValueError("a response contains a vision token, which stands for a part of an image")
    if (attention := model.config._attn_implementation) not in ("sdpa", "eager"):
        raise ValueError(f"a group row needs attention sdpa or eager, the model uses {attention}")
    inputs, predictor = group_row(model, prompt, responses)
    row = Row(model, prompt, responses, model.model(**inputs).last_hidden_state[0], predictor)
    hidden, head = row.hidden[predictor], model.get_output_embeddings()  # (N, H)
    logps, entropy = token_logps(hidden, targets, head, temperature, with_entropy)  # (N,), (N,)
    pad = lambda x: pad_sequence(x.split([len(o) for o in responses]), True)  # (N,) -> (G, T)
    scored = [pad(x) for x in (logps, torch.ones_like(logps), entropy) if x is not None]  # (G, T)
    return (*scored, row) if with_row else tuple(scored)


# ---- 8. One step: rollouts, constants, update ----------------------------------------------------


@dataclass
class Group:
    """One question's rollout: all that the update needs, and what a person wants to look at."""

    row: dict  # the data set's: images, problem, answer
    prompt: dict  # as encode_prompt returns it
    responses: list  # G LongTensors (<= T,)
    texts: list  # G strings
    scores: list  # G dicts of compute_reward
    advantages: torch.Tensor  # (G,)
    masked_images: list = None
    masked_prompt: dict = None  # None if nothing in the loss needs it
    old_logps: torch.Tensor = None  # (G, T); None in the first update, where pi_old is pi_theta
    ref_logps: torch.Tensor = None  # (G, T); None if beta is 0

    @property
    def mixed(self) -> bool:
        """Some responses right, some wrong: only then does accuracy tell them apart."""
        return 0 < sum(score["accuracy"] for score in self.scores) < len(self.scores)


def sample_and_grade(model, processor, config, rows, generator, reward=compute_reward):
    """Encode, sample, reward, standardise: a Group per row, not yet masked. generator: on the
    model's device. A row's `prompt`, where it is already encoded, is taken out of it."""
    encode = lambda row: encode_prompt(processor, row["problem"], row["images"])
    encoded = [row.pop("prompt", None) or encode(row) for row in rows]
    prompts = [encode_image_if_frozen(model, prompt) for prompt in encoded]
    settings = config.group_size, config.max_new_tokens, config.temperature, config.top_p
    sampled = sample_groups(model, processor, prompts, *settings, generator)
    groups = []
    for row, prompt, responses in zip(rows, prompts, sampled):
        # Thinking models' chat templates open the <think> themselves; the format rule wants it.
        end_of_prompt = processor.tokenizer.decode(prompt["input_ids"][0, -4:]).rstrip()
        opening = "<think>" if end_of_prompt.endswith("<think>") else ""
        decode = lambda o: opening + processor.tokenizer.decode(o, skip_special_tokens=True)
        texts = [decode(o) for o in responses]
        scores = [reward(text, row["answer"], config.format_weight) for text in texts]
        advantages = group_advantages([score["reward"] for score in scores])  # (G,)
        groups.append(Group(row, prompt, responses, texts, scores, advantages))
    return groups


def roll_out(model, processor, config, rows, generator, reward=compute_reward):
    """Fill a rollout batch with groups. rows: an iterator over data set rows that does not run dry.
    generator: on the CPU. reward: see compute_reward.

    With dynamic_sampling (DAPO) only mixed groups are kept, and the missing ones drawn from new
    rows, at most max_redraws times; then the batch stays short. Returns groups, and how often."""
    # Two generators of their own, so that masking does not change what is sampled.
    seeds = torch.randint(2**62, (2,), generator=generator).tolist()
    sampling = torch.Generator(model.device).manual_seed(seeds[0])
    masking = torch.Generator().manual_seed(seeds[1])
    rounds = 1 + (config.max_redraws if config.dynamic_sampling else 0)
    groups = []
    for redraws in range(rounds):  # noqa: B007  how many it took is returned
        missing, drawn = config.prompts_per_batch - len(groups), []
        while len(drawn) < missing:
            count = min(config.prompts_per_sample, missing - len(drawn))
            share = [next(rows) for _ in range(count)]
            drawn += sample_and_grade(model, processor, config, share, sampling, reward)
        groups += [group for group in drawn if group.mixed or not config.dynamic_sampling]
        if len(groups) == config.prompts_per_batch:
            break
    if config.gamma or config.eta2:
        mask = lambda image: mask_patches(image, config.mask_ratio, config.patch_size, masking)
        for group in groups:  # one fresh mask per image and rollout, shared by the group
            images = [fit_image(processor, image) for image in group.row["images"]]
            group.masked_images = [mask(image) for image in images]
            masked = mask_prompt(processor, group.prompt, group.masked_images)
            group.masked_prompt = encode_image_if_frozen(model, masked)
    return groups, redraws


def split_batch(config, groups) -> list[list[Group]]:
    """A rollout batch as updates_per_batch updates of nearly equal size, no more than groups."""
    n, count = len(groups), min(config.updates_per_batch, len(groups))
    return [groups[n * i // count : n * (i + 1) // count] for i in range(count)]


def split_group(config, prompt, responses, model) -> list[slice]:
    """Cut a group's responses into runs; each becomes a row with the prompt, of tokens_per_forward
    at most. A response too long for that is a run of its own.

    A row costs L^2 attention scores, mostly between responses that do not see each other. Prompt,
    image and an overhead worth 500 tokens (measured on a CPU) it pays once, however many responses
    share it. It is closed where one more would raise the cost per response: in the embedded world,
    behind a prompt of 13 tokens, after 3 responses of 160 tokens, or 18 of 30 tokens."""
    P, layers = prompt["input_ids"].shape[1], model.model.language_model.layers
    weights = lambda part: sum(p.numel() for p in part.parameters())
    image = weights(model.model.visual) * len(prompt.get("pixel_values", ()))
    score = 2 * len(layers) * layers[0].self_attn.o_proj.in_features  # q times k, score times v
    one_more_row = P**2 + (weights(layers) * (P + 500) + image) / score
    starts, used = [0], 0
    for i, n in enumerate(map(len, responses)):
        too_long = P + used + n > config.tokens_per_forward
        if i > starts[-1] and (too_long or used * (used + n) > one_more_row):
            starts.append(i)
            used = 0
        used += n
    return [slice(start, end) for start, end in zip(starts, starts[1:] + [len(responses)])]


@torch.no_grad()
def score_constants(model, reference, config, groups):
    """Store what the updates hold constant in the groups: log pi_ref if beta > 0, and log pi_old
    for all but the first update's groups (there pi_old is pi_theta and the ratio exactly 1). As
    in [2] sampling's own numbers are not used: they round differently and include top_p.
    reference() gives a context manager around the reference model: nullcontext(frozen_copy), or one
    that switches a LoRA adapter off."""

    def score(model, group):
        parts = split_group(config, group.prompt, group.responses, model)
        inputs = [(model, group.prompt, group.responses[part]) for part in parts]
        rows = [row for x in inputs for row in group_logps(*x, config.temperature)[0]]
        return pad_sequence(rows, batch_first=True)  # (G, T)

    model.eval()
    for group in [group for update in split_batch(config, groups)[1:] for group in update]:
        group.old_logps = score(model, group)
    if config.beta:
        with reference() as reference_model:
            for group in groups:
                group.ref_logps = score(reference_model, group)


def papo_step(model, optimizer, config, groups, objective=papo_loss):
    """One optimizer update on some groups. Returns papo_loss's metrics, grad_norm, skipped (0, 1).

    objective: called and returning as papo_loss does, all by keyword but the config, on the
    responses of one pass (a group or a part of it); what was not scored is None. For one of your
    own see README, "Change it"; it returns a mean over responses or tokens, as papo_loss.

    Each group (or each part, see split_group) is one forward pass, one more with the masked image,
    and one backward pass; gradients add up. A part's mean is weighted by its share of the update's
    responses, so loss and gradient do not depend on the split: of 10 responses split as 5, 3 and 2,
    the means count 5/10, 3/10 and 2/10 ("token": by their tokens). An update whose gradient is not
    finite is skipped: one bad batch must not destroy the weights."""
    if not groups:
        raise ValueError("papo_step needs at least one group")
    model.train()  # for gradient checkpointing; train_small.py switches dropout off
    optimizer.zero_grad(set_to_none=True)
    responses = [o for group in groups for o in group.responses]  # LongTensors (<= T,)
    total = len(responses) if config.aggregation == "sequence" else sum(map(len, responses))
    metrics = {}
    for group in groups:
        for part in split_group(config, group.prompt, group.responses, model):
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
    """The objective over some of a group's responses. Returns the scalar with its graph, metrics,
    and how many responses or tokens it averages. G and T are those of the part."""
    responses, exact = group.responses[part], config.entropy_estimate == "exact"
    given = responses, config.temperature, exact
    score = lambda prompt, with_row: group_logps(model, prompt, *given, with_row)
    logps, response_mask, *entropy, row = score(group.prompt, True)  # (G, T), (G, T)[, (G, T)], Row
    masked_logps, masked_entropy = None, []
    if group.masked_prompt is not None:
        with torch.set_grad_enabled(config.mask_gradient != "detached"):
            masked_logps, _, *masked_entropy = score(group.masked_prompt, False)  # (G, T)
    T, device = logps.shape[1], logps.device
    of_part = lambda constant: None if constant is None else constant[part, :T]  # (G, T)
    rewards = [scores["reward"] for scores in group.scores[part]]
    loss, metrics = objective(
        config,
        logps=logps,
        old_logps=logps.detach() if group.old_logps is None else of_part(group.old_logps),
        ref_logps=of_part(group.ref_logps),
        masked_logps=masked_logps,
        advantages=group.advantages[part].to(device),  # (G,)
        rewards=torch.tensor(rewards, device=device),  # (G,)
        response_mask=response_mask,
        entropy=entropy[0] if exact else None,
        masked_entropy=masked_entropy[0] if masked_entropy else None,
        row=row,
    )
    count = len(responses) if config.aggregation == "sequence" else int(response_mask.sum())
    return loss, metrics, count


# ---- Appendix A. The recipe and its presets ([1] Table 6) ----------------------------------------
def option(default, help):
    """A dataclass field that is also a command-line flag with this help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class PAPOConfig:
    """Every number of the recipe, by default the published PAPO-G 3B model's, but for top_p, which
    is 0.99 there and in the presets. ValueError, naming the field, for what is out of range."""

    gamma: float = option(0.02, "weight of the perception KL; 0 is GRPO; typical 0.005 to 0.02")
    beta: float = option(0.01, "weight of the KL to the starting policy; typical 0 to 0.04")
    eta1: float = option(0.0, "weight of the policy's entropy, minimised; typical 0 to 0.05")
    eta2: float = option(0.0, "weight of the masked policy's entropy, minimised; typical 0 to 0.05")
    clip_low: float = option(0.2, "a ratio below 1 - clip_low earns no more (paper: epsilon_l)")
    clip_high: float = option(0.3, "a ratio above 1 + clip_high earns no more; typical 0.2 to 0.3")
    clip_dual: float = option(3.0, "for A < 0 the loss is at most clip_dual |A|; inf turns it off")
    aggregation: Literal["sequence", "token"] = option(
        "sequence", "over tokens: mean of per-response means (Eq. 2), or one mean over all (Eq. 3)"
    )
    gated: bool = option(
        False,
        "ours: pay the perception KL only in responses of positive advantage, for tokens that the "
        "image makes likelier; bears ten times the ungated gamma and more",
    )
    masked_grad: Literal["detached", "entropy", "full"] = option(
        None,
        "terms with gradient through the masked pass: detached = none, entropy = H[pi_mask], full "
        "= also the perception KL; default: entropy if eta2 > 0, else detached",
    )
    entropy_estimate: Literal["exact", "sampled"] = option(
        "exact", "exact = over the vocabulary, sampled = -log pi of the tokens (released code)"
    )
    mask_ratio: float = option(0.6, "probability of blacking out a patch; typical 0.6 to 0.8")
    patch_size: int = option(14, "side of a masked patch in pixels; the trainer takes the model's")
    group_size: int = option(5, "responses sampled per question (paper: G); typical 5 to 16")
    temperature: float = option(1.0, "sampling temperature, also used when scoring; typical 1.0")
    top_p: float = option(1.0, "nucleus sampling: the likeliest tokens up to this mass")
    format_weight: float = option(0.1, "share of the reward that is for format, not for accuracy")
    dynamic_sampling: bool = option(False, "replace groups all right or all wrong (DAPO, PAPO-D)")
    max_redraws: int = option(20, "with dynamic sampling, redraws before training on what there is")
    max_new_tokens: int = option(2048, "longest response, in tokens")
    prompts_per_batch: int = option(384, "questions per rollout batch")
    prompts_per_sample: int = option(16, "questions sampled at a time; lower saves memory")
    updates_per_batch: int = option(3, "optimizer updates a rollout batch is split into")
    tokens_per_forward: int = option(8192, "largest row of a forward pass; lower saves memory")
    learning_rate: float = option(1e-6, "AdamW learning rate, for full fine-tuning")
    weight_decay: float = option(0.01, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "gradients longer than this are scaled down to it")

    def __post_init__(self):
        for low, high, names in (
            (0, 1e3, "gamma beta eta1 eta2 clip_high weight_decay"),
            (0, 1, "clip_low mask_ratio format_weight learning_rate"),
            (1e-6, 1, "top_p"),
            (1e-3, 1e3, "temperature"),
            (1e-9, math.inf, "max_grad_norm"),
            (1, math.inf, "clip_dual"),
            (1, 1e9, "patch_size max_new_tokens prompts_per_sample updates_per_batch"),
            (1, 1e9, "tokens_per_forward"),
            (2, 1e9, "group_size"),
            (0, 1e9, "max_redraws"),
            (self.updates_per_batch, 1e9, "prompts_per_batch"),
        ):
            for name in names.split():
                if not low <= (x := getattr(self, name)) <= high:  # so written, nan fails, too
                    raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {x}")
        for name in ("aggregation", "masked_grad", "entropy_estimate"):
            allowed, x = get_args(PAPOConfig.__annotations__[name]), getattr(self, name)
            if x not in allowed and x != getattr(PAPOConfig, name):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {x!r}")

    @property
    def mask_gradient(self) -> str:
        """masked_grad, or what it is where it is not given."""
        return self.masked_grad or ("entropy" if self.eta2 > 0 else "detached")

    @classmethod
    def preset(cls, name: str, **changes) -> "PAPOConfig":
        """A published recipe (Table 6 and 8 of [1]) with `changes` on top."""
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


def check_shapes(**tensors):
    """ValueError unless advantages are (B,), all others (B, T), like the first, or None."""
    first, *_ = tensors
    for name, tensor in tensors.items():
        letters = "B" if name == "advantages" else "BT"
        if tensor is None:
            continue
        if tensor.dim() != len(letters):
            shape = ", ".join(letters)
            raise ValueError(f"{name} must have shape ({shape}), got {tuple(tensor.shape)}")
        for d, size, wanted in zip(letters, tensor.shape, tensors[first].shape):
            if size != wanted:
                raise ValueError(f"{name} has {d} = {size}, but {first} has {d} = {wanted}")


# ---- Appendix B. Qwen-VL's prompt and positions: question + images -> tensors --------------------

PROMPT_SUFFIX = " First think inside <think> </think>, then put the final answer inside \\boxed{}."
Prompt = dict  # a processor's tensors for one question: input_ids (1, P), pixel_values, ...


def fit_image(processor, image):
    """Resize an image to what the vision tower will see: nearly its shape, both sides multiples of
    patch x merge, an area within the processor's bounds if one fits. A second call changes nothing.
    image: PIL, path or (data) URL. Returns a new RGB image. ValueError for an aspect above 200."""
    image = to_rgb(load_image(image) if isinstance(image, str) else image)
    settings = processor.image_processor
    unit = settings.patch_size * settings.merge_size
    bounds = settings.size["shortest_edge"], settings.size["longest_edge"]
    # smart_resize, the processor's own rule, is applied until it changes nothing. Where no size
    # fits the bounds it alternates between one too small and one too large: the smaller is taken.
    size, sizes = (image.height, image.width), []
    while size not in sizes:
        sizes.append(size)
        size = tuple(max(unit, side) for side in smart_resize(*size, unit, *bounds))
    height, width = min(sizes[sizes.index(size) :])
    return image.resize((width, height))


def chat_messages(question: str, images: int = 1) -> list[dict]:
    """The question as the one user message of a chat; its images where it says `<image>`, or else
    first. Raises ValueError if it marks another number of images, or holds a special token."""
    if found := re.search(r"<\|\w+\|>", question):
        raise ValueError(f"the question contains the special token {found.group()}")
    if "<image>" not in question:
        question = "<image>" * images + question
    if (marks := question.count("<image>")) != images:
        raise ValueError(f"the question marks {marks} images and brings {images}")
    content = []
    for i, text in enumerate((question + PROMPT_SUFFIX).split("<image>")):
        content += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
    return [{"role": "user", "content": content}]


def encode_prompt(processor, question: str, image) -> Prompt:
    """One question about one image, or a list of them, as the model reads it, ending where the
    assistant's answer begins. Returns a mapping: input_ids (1, P), pixel_values (patches, channels
    x time x patch^2), image_grid_thw (images, 3), ... ValueError as chat_messages and fit_image."""
    images = image if isinstance(image, (list, tuple)) else [image]
    images = [fit_image(processor, image) for image in images]
    chat = chat_messages(question, len(images))
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], images=images, do_resize=False, return_tensors="pt")


def vision_token_ids(model) -> list[int]:
    """Ids that stand for images in a Qwen-VL's input. Raises ValueError for a model without any."""
    if getattr(model.config, "image_token_id", None) is None:
        name = type(model).__name__
        raise ValueError(f"{name} has no image token: PAPO needs a Qwen2-VL or a later one")
    names = "image_token_id video_token_id vision_start_token_id vision_end_token_id"
    return [getattr(model.config, name) for name in names.split()]


def mask_prompt(processor, prompt, masked_images) -> Prompt:
    """The prompt with masked images in place of its own, of the same sizes: only pixels change."""
    masked = processor.image_processor(images=masked_images, do_resize=False, return_tensors="pt")
    kept = {name: x for name, x in prompt.items() if name != "features"}  # of the whole images
    return {**kept, "pixel_values": masked["pixel_values"]}


def encode_image(model, prompt) -> Prompt:
    """The prompt with its images' features in place of their pixels, computed once for all later
    passes. They wait in host memory, and only what the language model reads is kept."""
    with torch.no_grad():
        inputs = image_inputs([prompt], model.device)
        features = model.model.get_image_features(**inputs, return_dict=True)
    kept = {"pooler_output": [x.cpu() for x in features.pooler_output]}  # images x (visual, H)
    if layers := getattr(features, "deepstack_features", None):  # Qwen3-VL: of inner layers, too
        kept["deepstack_features"] = [[x.cpu() for x in layer] for layer in layers]
    without_pixels = {name: x for name, x in prompt.items() if name != "pixel_values"}
    return {**without_pixels, "features": type(features)(**kept)}


def encode_image_if_frozen(model, prompt) -> Prompt:
    """encode_image where training cannot change the features; else the prompt as it is."""
    trained = any(p.requires_grad for p in model.model.visual.parameters())
    return prompt if trained else encode_image(model, prompt)


def image_inputs(prompts: list[Prompt], device) -> dict:
    """The model's image arguments for several prompts: their patches, or features from
    encode_image, one after the other."""
    grids = torch.cat([prompt["image_grid_thw"] for prompt in prompts]).to(device)  # (images, 3)
    if "features" not in prompts[0]:
        pixels = torch.cat([prompt["pixel_values"] for prompt in prompts])  # (patches, values)
        return {"image_grid_thw": grids, "pixel_values": pixels.to(device)}
    features = [prompt["features"] for prompt in prompts]
    pooled = [x.to(device) for f in features for x in f.pooler_output]  # images x (visual, H)
    joined = type(features[0])(pooler_output=pooled)
    if getattr(features[0], "deepstack_features", None):
        layers = zip(*(f.deepstack_features for f in features))  # each layer's, prompt by prompt
        joined.deepstack_features = [[x.to(device) for f in layer for x in f] for layer in layers]
    return {"image_grid_thw": grids, "mm_encoder_outputs": {"image": joined}}


def rope_positions(model, input_ids, images, attention_mask=None):
    """M-RoPE positions (3, B, P) of prompts [6]: one row each for time, height and width, so that a
    visual token is as near to the one below it as to the one on its right. Two tokens of text, an
    image of 2 x 3 visual tokens, two of text:

        time      0  1  2  2  2  2  2  2  5  6
        height    0  1  2  2  2  3  3  3  5  6
        width     0  1  2  3  4  2  3  4  5  6

    They are always passed to the model, which otherwise falls back to plain text positions, in
    which an image is one long line, or to those it remembers from an earlier call."""
    is_image = (input_ids == model.config.image_token_id).int()  # (B, P) 1 on image positions
    grids = images["image_grid_thw"]  # (images, 3)
    sizes = dict(mm_token_type_ids=is_image, image_grid_thw=grids, attention_mask=attention_mask)
    return model.model.get_rope_index(input_ids, **sizes)[0]  # (3, B, P)
