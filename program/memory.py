"""Memory: an estimate before anything is moved to a GPU, measured peaks, and what to do when it ran out.

The estimate is computed from shapes alone, so the model (before an adapter is added) may be on the meta
device. Not in it: what the allocator wastes, and torch's own half GiB on a GPU.
"""

import re
import sys
from contextlib import contextmanager

import psutil
import torch

from papo import HEAD_CHUNK, encode_prompt
from program import SAMPLES, UserError

ADAPTED = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # the layers that --lora adapts


def layer_bytes(tokens, hidden, attention, mlp, width):
    """What one transformer layer keeps for backward: inputs of norms and matrices, q, k, v at all heads,
    the MLP's products."""
    return tokens * (8 * hidden + 6 * attention + 4 * mlp) * width


def head_size(text):
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def activation_bytes(text, vision, config, run, L, patches, width):
    """What backward needs of one row of L tokens: all layers' insides, or with gradient checkpointing their
    inputs and one layer's inside; twice where the masked pass trains, too; and each pass's mask."""
    frozen, layers = run.freeze_vision or run.lora, text.num_hidden_layers
    attention = text.num_attention_heads * head_size(text)
    one = layer_bytes(L, text.hidden_size, attention, text.intermediate_size, width)
    size = getattr(vision, "embed_dim", vision.hidden_size)
    mlp = getattr(vision, "intermediate_size", None) or int(size * vision.mlp_ratio)
    seen = layer_bytes(patches, size, size, mlp, width)
    kept, extra = one * layers + (not frozen) * seen * vision.depth, 0
    if run.gradient_checkpointing:
        kept = L * text.hidden_size * layers * width
        kept += (not frozen) * patches * size * vision.depth * width
        extra = max(one, seen)
    graphs = 1 + (config.gamma > 0 and config.mask_gradient != "detached")
    return graphs * (kept + 2 * L * L * width) + extra


def trained_bytes(model, run, width):
    """The trained weights: the adapter's in fp32, or all but a frozen vision tower's."""
    if run.lora:
        shapes = [
            m.weight.shape for name, m in model.named_modules() if re.fullmatch(ADAPTED, name)
        ]
        return 4 * run.lora * sum(map(sum, shapes))
    trained = lambda name: not run.freeze_vision or ".visual." not in name
    return width * sum(p.numel() for name, p in model.named_parameters() if trained(name))


def estimate_memory(model, config, run, prompt_tokens, image_tokens) -> dict[str, float]:
    """GiB that a run takes on its device, by part, and the peak: what stays plus the phase that takes most.
    A batch's images, as patches, or as features of a frozen tower, wait in host memory: a part, but not in
    the peak."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    width, H, V = next(model.parameters()).element_size(), text.hidden_size, text.vocab_size
    row = prompt_tokens + config.max_new_tokens
    weights, trained = sum(p.nbytes for p in model.parameters()), trained_bytes(model, run, width)
    patches = image_tokens * vision.spatial_merge_size**2
    L = max(config.tokens_per_forward, row)
    responses = config.prompts_per_sample * max(config.group_size, SAMPLES)
    pixels = 3 * vision.temporal_patch_size * vision.patch_size**2 * 4  # bytes of a patch, fp32
    features = H * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))) * width  # of a token
    image = image_tokens * features if run.freeze_vision or run.lora else patches * pixels
    kahan = run.precision == "bf16-kahan" and not run.lora
    keys = (
        2 * text.num_key_value_heads * head_size(text) * width
    )  # and values, of a token in a layer
    sizes = {
        "weights": weights + trained * bool(run.lora),
        "gradients": trained,
        "optimizer": trained * (3 if kahan else 2),
        "reference": weights * (config.beta > 0 and not run.lora),
        "features": config.prompts_per_batch * (1 + (config.gamma > 0 or config.eta2 > 0)) * image,
        "activations": activation_bytes(text, vision, config, run, L, patches, width),
        # As fp32: logits, log_probs, exp, the product, and a gradient.
        "logits": HEAD_CHUNK * V * 4 * 5,
        "kv_cache": responses * row * text.num_hidden_layers * keys,
    }
    phases = (
        sizes["kv_cache"] + responses * V * 4 * 3,  # sampling: logits, probs, and the model's own
        sizes["gradients"] + sizes["activations"] + sizes["logits"],
        2 * sizes["gradients"],  # the optimizer's step works on all tensors at once, with one copy
    )
    sizes["peak"] = sizes["weights"] + sizes["optimizer"] + sizes["reference"] + max(phases)
    return {name: size / 2**30 for name, size in sizes.items()}


def longest_prompt(model, processor, run, row):
    """Tokens of the longest prompt to expect, and those of them that are the image's: the largest image
    with 256 tokens of text, or without --dataset the row's."""
    if not run.dataset:
        ids = encode_prompt(processor, row["problem"], row["images"][0])["input_ids"]  # (1, P)
        return ids.shape[1], int((ids == model.config.image_token_id).sum())
    vision = model.config.vision_config
    image = run.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    return min(run.max_prompt_tokens, image + 256), image


def memory_text(sizes, device):
    """The estimate beside what there is: the GPU's memory, or else the machine's."""
    where, there = "machine", psutil.virtual_memory().total
    if device.type == "cuda":
        where, there = "GPU", torch.cuda.get_device_properties(device).total_memory
    parts = {name: size for name, size in sizes.items() if name != "peak" and size >= 0.05}
    text = f"estimated {sizes['peak']:.1f} GiB of the {where}'s {there / 2**30:.0f}"
    said = ", ".join(f"{name} {size:.1f}" for name, size in parts.items())
    return text + (f" ({said})".replace("features", "features in host memory") if parts else "")


@contextmanager
def explain_out_of_memory(config, phase, training=True):
    """Turn an allocator's error into the phase it happened in, the sizes, and the flags that help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; on a CPU only the text tells
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sizes = "group_size max_new_tokens prompts_per_sample tokens_per_forward".split()
        lower = "lower --tokens-per-forward or --max-pixels, or "
        if phase in ("sample", "evaluate"):
            lower = "lower --prompts-per-sample, --max-new-tokens or --max-pixels, or "
        help = "--lora 16 --precision bf16, --freeze-vision, --gpu-memory; the last checkpoint is whole"
        raise UserError(
            f"out of memory in phase {phase} with "
            f"{', '.join(f'{name} {getattr(config, name)}' for name in sizes)}; "
            f"{lower * (phase != 'load')}use {help if training else '--precision bf16'}"
        ) from error


def peak_rss():
    """The process's largest memory so far, in GiB."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
