"""A Qwen-VL from a folder or the hub, or the one line that says why it cannot be trained here."""

import hashlib
import json
import re
from pathlib import Path

import peft
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from papo import chat_messages, encode_prompt
from program import UserError, ask_hub, cannot_load

# What an adapter's layers are called now; once (before transformers 4.52, or from another class)
# they were model.layers or layers, and visual.
RENAMED = {
    r"^(model\.)?(language_model\.)?(model\.)?layers\.": "model.language_model.layers.",
    r"^(model\.)?visual\.": "model.visual.",
}
LEFTOVERS = re.compile(r"rotary_emb\.inv_freq$")  # in old files, and computed anew
TAGS = ("<think>", "</think>")


def check_model(run, config, adapter):
    """Raises UserError for a model that would not be trained or evaluated as it should be."""
    layers, reason = getattr(config.get_text_config(), "layer_types", None) or (), None
    if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        reason = f"is a {config.model_type}, no Qwen2-VL, Qwen2.5-VL or Qwen3-VL"
    elif "sliding_attention" in layers:  # under which sampling and scoring differ
        reason = "uses sliding-window attention: set use_sliding_window to false in its config.json"
    elif adapter and run.lora and not run.merge:  # which could not be loaded without the first one
        reason = "is a LoRA adapter; for a second one on top of it add --merge"
    elif adapter and not run.eval_only and run.precision != "fp32":
        reason = "is a LoRA adapter; bf16 would round it away when merged: add --precision fp32"
    if reason:
        raise UserError(f"--model {run.model} {reason}")


def switch_dropout_off(config):
    """Sampling and scoring have no dropout: in the update alone it would look like a policy that
    has moved."""
    for part in (config, config.get_text_config(), config.vision_config):
        for key, value in list(vars(part).items()):
            if "dropout" in key and isinstance(value, float) and value:
                print(f"{key} {value} of the model is switched off, as in sampling and scoring")
                setattr(part, key, 0.0)


def load_processor(name, edges=None):
    """The processor of a model, with bounds of an image's area where they are given, and with its
    tags as text. Raises UserError if it cannot put a question about an image."""
    processor, form = AutoProcessor.from_pretrained(name), dict(add_generation_prompt=True)
    try:
        chat = processor.apply_chat_template(chat_messages("?"), tokenize=False, **form)
        prompt = encode_prompt(processor, "?", Image.new("RGB", (56, 56)))
        places = prompt["image_grid_thw"].prod() / processor.image_processor.merge_size**2
        if (prompt["input_ids"] == processor.image_token_id).sum() != places:
            raise ValueError("it does not place the image")
    except Exception as error:  # a template is a program and may fail in any way
        raise UserError(f"--model {name}: its chat template cannot be used: {error}") from None
    if processor.tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer has no end token (eos_token)")
    if not chat.rstrip().endswith(TAGS[0]):
        write_tags_as_text(processor.tokenizer)
    if edges:
        processor.image_processor.size = edges
    return processor


def write_tags_as_text(tokenizer):
    """Where <think> is one token but the chat template does not open it, as in Qwen3-VL Instruct,
    it is untrained: the tags are to be encoded in pieces. That token still decodes."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    tags = {t["content"]: t["id"] for t in state["added_tokens"] if t["content"] in TAGS}
    if tags:
        print("<think> is an untrained token of this model: its tags are written as plain text")
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in tags]
        state["model"]["vocab"] |= tags  # no merge leads there
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def weights_id(model):
    """Tells one base of an adapter from another: shapes and a few values, as bf16 has them."""
    few = lambda p: p.detach().flatten()[:4].to("cpu", torch.bfloat16).tolist()
    text = sorted(f"{tuple(p.shape)} {few(p)}" for p in model.parameters())
    return hashlib.sha256("".join(text).encode()).hexdigest()


def load_adapter(run, model, settings):
    """The model with a LoRA adapter: for evaluation beside its base, as trained; else merged.
    Raises UserError if not all of it fits."""
    known = Path(run.model) / "base.json"
    if known.exists() and json.loads(known.read_text())["weights"] != weights_id(model):
        reason = f"adapts other weights than those of {model.name_or_path}"
        raise UserError(f"--model {run.model} {reason}")
    settings.inference_mode = True
    model = peft.PeftModel(model, settings)
    found = model.load_adapter(run.model, "default", key_mapping=RENAMED)
    if lost := [*found.missing_keys, *found.unexpected_keys]:
        reason = f"{len(lost)} of its weights do not fit its base, such as {min(lost)}"
        raise UserError(f"--model {run.model}: {reason}")
    return model.base_model.model if run.eval_only else model.merge_and_unload()


def load_model(run):
    """Model and processor of --model, with the flags' image sizes where a data set is given."""
    path, name = Path(run.model), f"--model {run.model}"
    if (path.is_absolute() or run.model.startswith(".")) and not path.is_dir():
        raise UserError(f"{name}: no such folder")
    if (path / "checkpoint").is_dir():
        raise UserError(f"{name} is a run; its model is {path / 'checkpoint'}")
    dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
    how = dict(dtype=dtype, attn_implementation="sdpa", output_loading_info=True)
    try:
        base, adapter = run.model, None
        if (path / "adapter_config.json").exists():
            adapter = peft.PeftConfig.from_pretrained(run.model)
            base = adapter.base_model_name_or_path
            if Path(base).is_absolute() and not Path(base).exists():
                raise UserError(f"{name} adapts {base}, which is not there (adapter_config.json)")
        base = str(Path(base).resolve()) if Path(base).exists() else base  # adapters remember it
        ask_hub(base)
        config = AutoConfig.from_pretrained(base)
        check_model(run, config, adapter)
        processor = load_processor(run.model, run.edges)
        switch_dropout_off(config)
        model, info = AutoModelForImageTextToText.from_pretrained(base, config=config, **how)
        if adapter:
            model = load_adapter(run, model, adapter).requires_grad_(True)  # peft froze the base
    except UserError:
        raise
    except Exception as error:  # a missing file, a cut-off one, no network
        raise cannot_load("--model", base, error) from None
    if missing := info["missing_keys"]:
        raise UserError(f"{name} lacks {len(missing)} weights, such as {min(missing)}")
    if strange := [key for key in info["unexpected_keys"] if not LEFTOVERS.search(key)]:
        reason = f"{len(strange)} weights that fit nowhere, such as {min(strange)}"
        raise UserError(f"{name} has {reason}: is its config.json whole?")
    if broken := [n for n, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise UserError(f"{name} has NaN or infinite weights in {len(broken)} tensors: {broken[0]}")
    tokens, room = len(processor.tokenizer), len(model.get_input_embeddings().weight)
    if tokens > room:
        raise UserError(f"{name}: its tokenizer has {tokens} tokens, its embedding {room}")
    return model, processor
