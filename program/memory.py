"""Memory: an estimate before anything is on a GPU, measured peaks, and what to do when it ran out.

The estimate is computed from shapes alone, so the model (before an adapter is added) may be on the
meta device. Not in it: what the allocator wastes, and torch's own half GiB on a GPU.
"""

import re
import sys
from contextlib import contextmanager

import psutil
import torch

from papo import HEAD_CHUNK
from program import SAMPLES, UserError

ADAPTED = r".*language_model.*(q|k|v|o|gate|up|down)_proj"  # the layers that --lora adapts


def layer_bytes(tokens, hidden, attention, mlp, width):
    """Kept for backward in a layer: inputs of norms and matrices, q, k, v, the MLP's products."""
    return tokens * (8 * hidden + 6 * attention + 4 * mlp) * width


def activation_bytes(model, config, run, L, patches, head, width):
    """Kept for backward of L tokens: all layers, or under gradient checkpointing their inputs, and
    once one layer's inside; the attention mask and its copy; twice where the masked pass trains."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    frozen, layers = run.freeze_vision or run.lora, text.num_hidden_layers
    attention = text.num_attention_heads * head
    one = layer_bytes(L, text.hidden_size, attention, text.intermediate_size, width)
    size = getattr(vision, "embed_dim", vision.hidden_size)
    mlp = getattr(vision, "intermediate_size", None) or int(size * vision.mlp_ratio)
    seen = layer_bytes(patches, size, size, mlp, width)
    kept, inside = one * layers + (not frozen) * seen * vision.depth, 0
    if run.gradient_checkpointing:
        kept = L * text.hidden_size * layers * width
        kept += (not frozen) * patches * size * vision.depth * width
        inside = max(one, seen)
    graphs = 1 + (config.gamma + config.eta2 > 0 and config.mask_gradient != "detached")
    return graphs * (kept + 2 * L * L * width) + inside


def estimate_memory(model, config, run, images=1) -> dict[str, float]:
    """GiB that a run on --dataset takes, by part, and the peak: what stays and the largest phase.
    The longest prompt is so many of the largest images with 256 tokens of text. A batch's images,
    as patches or as features of a frozen tower, wait in the host's memory: not in the peak."""
    text, vision = model.config.get_text_config(), model.config.vision_config
    width, H, V = next(model.parameters()).element_size(), text.hidden_size, text.vocab_size
    head = getattr(text, "head_dim", None) or H // text.num_attention_heads
    largest = run.max_pixels // (vision.patch_size * vision.spatial_merge_size) ** 2
    image = min(run.max_prompt_tokens, images * largest)  # tokens
    row = min(run.max_prompt_tokens, image + 256) + config.max_new_tokens
    L, patches = max(config.tokens_per_forward, row), image * vision.spatial_merge_size**2
    responses = config.prompts_per_sample * max(config.group_size, SAMPLES)
    weights = trained = sum(p.nbytes for p in model.parameters())
    if run.freeze_vision:
        trained -= sum(p.nbytes for name, p in model.named_parameters() if ".visual." in name)
    if run.lora:  # in fp32
        adapted = [m for name, m in model.named_modules() if re.fullmatch(ADAPTED, name)]
        trained = 4 * run.lora * sum(sum(m.weight.shape) for m in adapted)
    waiting = patches * 3 * vision.temporal_patch_size * vision.patch_size**2 * 4  # pixels in fp32
    if run.freeze_vision or run.lora:
        waiting = image * H * (1 + len(getattr(vision, "deepstack_visual_indexes", ()))) * width
    states = 3 if run.precision == "bf16-kahan" and not run.lora else 2
    cached = text.num_hidden_layers * 2 * text.num_key_value_heads * head * width  # of a token
    sizes = {
        "weights": weights + trained * bool(run.lora),
        "gradients": trained,
        "optimizer": trained * states,
        "reference": weights * (config.beta > 0 and not run.lora),
        "activations": activation_bytes(model, config, run, L, patches, head, width),
        "logits": HEAD_CHUNK * V * 4 * 5,  # fp32: logits, log_probs, exp, product, gradient
        "kv_cache": responses * row * cached,
        "host": config.prompts_per_batch * (1 + (config.gamma > 0 or config.eta2 > 0)) * waiting,
    }
    phases = (
        sizes["kv_cache"] + responses * V * 4 * 3,  # sampling: logits, probs, and the model's own
        sizes["gradients"] + sizes["activations"] + sizes["logits"],
        2 * sizes["gradients"],  # the optimizer's step works on all tensors at once, with one copy
    )
    sizes["peak"] = sizes["weights"] + sizes["optimizer"] + sizes["reference"] + max(phases)
    return {name: size / 2**30 for name, size in sizes.items()}


def memory_text(sizes, device):
    """The estimate beside what there is: the GPU's memory, or else the machine's."""
    where, there = "machine", psutil.virtual_memory().total
    if device.type == "cuda":
        where, there = "GPU", torch.cuda.get_device_properties(device).total_memory
    parts = [f"{name} {size:.1f}" for name, size in sizes.items() if name != "peak"]
    peak = f"estimated {sizes['peak']:.1f} GiB of the {where}'s {there / 2**30:.0f}"
    return f"{peak} ({', '.join(parts)})"


@contextmanager
def explain_out_of_memory(config, phase):
    """Turn an allocator's error into the phase it happened in, the sizes, and flags that help."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU; on a CPU only the text tells
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        first = "prompts_per_sample" if phase in ("sample", "evaluate") else "tokens_per_forward"
        names = (first, "max_new_tokens", "group_size")
        lower = ", ".join(f"--{n.replace('_', '-')} {getattr(config, n)}" for n in names)
        help = f"lower {lower} or --max-pixels, or use --precision bf16, --lora, --gpu-memory"
        raise UserError(f"out of memory in phase {phase}: {help}") from error


def peak_memory(device):
    """The largest memory so far, in GiB: the GPU's, or else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
