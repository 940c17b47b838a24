"""program/memory.py: the estimate of a run's peak against measured sizes."""

import pytest
import torch
from conftest import make_model, make_processor, picture, random_responses

import papo
import toy
import train_small as ts
from program import SAMPLES
from program.memory import estimate_memory, layer_bytes
from study import bench

ROWS = [{"images": [picture(i, 84, 56)], "problem": "What?", "answer": "7"} for i in range(6)]
CONFIG = papo.PAPOConfig(group_size=2, max_new_tokens=3, prompts_per_sample=4)


def test_evaluation_keeps_no_pixels(one_vlm):
    for group in ts.evaluate(*one_vlm, CONFIG, ROWS):
        assert group.prompt is None and not {"images", "prompt"} & set(group.row)
    assert all(set(row) == {"images", "problem", "answer"} for row in ROWS)


UNTIED = dict(tie_word_embeddings=False)
SIZES_7B = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, layer_types=None)
SIZES_7B |= dict(num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4) | UNTIED


@pytest.fixture
def estimate(monkeypatch):
    """A function from "3b" or "7b" and flags to the estimate for that Qwen2.5-VL, which is on the
    meta device: it takes no memory."""
    monkeypatch.setattr(bench, "DEVICE", torch.device("meta"))

    def estimate(size, flags):
        config, run = ts.parse_args(f"--model x --dataset y {flags}".split())
        model = bench.qwen_3b(toy.toy_processor())
        if size == "7b":
            sizes = model.config.to_dict() | UNTIED
            sizes["text_config"] |= SIZES_7B
            sizes["vision_config"]["out_hidden_size"] = SIZES_7B["hidden_size"]
            with torch.device("meta"):
                model = type(model)(type(model.config)(**sizes))
        dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
        return estimate_memory(model.to(dtype), config, run)

    return estimate


def test_weights_of_published_models(estimate):
    """3,754,622,976 and 8,292,166,656 parameters, counted from the configurations."""
    assert round(estimate("3b", "")["weights"] * 2**30) == 4 * 3_754_622_976
    assert round(estimate("7b", "--precision bf16-kahan")["gradients"] * 2**30) == 2 * 8_292_166_656


@pytest.mark.parametrize("gib", [24, 48, 80])
def test_settings_for_a_gpu_fit_it(gib, estimate):
    assert 0.4 * gib < estimate("3b", f"--gpu-memory {gib}")["peak"] < 0.9 * gib


def test_the_7b_example_fits_48_gib(estimate):
    assert estimate("7b", "--preset papo-g-7b")["peak"] > 150
    assert estimate("7b", "--preset papo-g-7b --gpu-memory 48")["peak"] < 0.9 * 48


TINY = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4)
# The longest prompt is 50 tokens, 20 of them the image's.
FLAGS = "--min-pixels 4704 --max-pixels 15680 --max-prompt-tokens 50 --group-size 3 "
FLAGS += "--max-new-tokens 40 --tokens-per-forward 64 --freeze-vision"


def built(flags):
    config, run = ts.parse_args(f"--model x --dataset y {FLAGS} {flags}".split())
    processor = make_processor("qwen2_5_vl")
    model = make_model("qwen2_5_vl", processor, **TINY)
    dtype = torch.float32 if run.precision == "fp32" else torch.bfloat16
    return model.to(dtype), processor, config, run


@pytest.mark.parametrize("flags", ["", "--precision bf16-kahan", "--precision bf16 --lora 4"])
def test_optimizer_gradients_and_reference_are_what_is_allocated(flags):
    model, processor, config, run = built(flags)
    sizes = estimate_memory(model, config, run)
    trainer = ts.Trainer(model, processor, config, run, ROWS)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    states = [t for p in trained for t in trainer.optimizer.state[p].values() if torch.is_tensor(t)]
    with trainer.reference() as reference:
        copied = [] if reference is model else reference.parameters()
    allocated = {
        "weights": model.parameters(),
        "gradients": [p.grad for p in trained],
        "optimizer": [t for t in states if t.dim()],
        "reference": copied,
    }
    for name, tensors in allocated.items():
        size = sum(tensor.nbytes for tensor in tensors)
        assert sizes[name] * 2**30 == pytest.approx(size, rel=1e-9), name


@pytest.mark.parametrize("frozen", [True, False])
def test_what_waits_in_host_memory_is_counted(frozen):
    """A batch's images, plain and masked: features of a frozen vision tower, else their patches."""
    model, processor, config, run = built(f"--freeze-vision {frozen}")
    prompt = papo.encode_prompt(processor, "What?", picture(0, 140, 112))
    assert int((prompt["input_ids"] == model.config.image_token_id).sum()) == 20
    kept = prompt["pixel_values"].nbytes
    if frozen:
        kept = papo.encode_image(model, prompt)["features"].pooler_output[0].nbytes
    size = estimate_memory(model, config, run)["host"] * 2**30
    assert size == pytest.approx(config.prompts_per_batch * 2 * kept, rel=1e-9)


def test_the_cache_of_sampling_is_what_is_allocated():
    model, _, config, run = built("--prompts_per_sample 2")
    ids = torch.randint(100, 200, (2 * SAMPLES, 50 + 40))  # prompts x samples rows of P + T
    cache = model.model.language_model(input_ids=ids, use_cache=True).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert estimate_memory(model, config, run)["kv_cache"] * 2**30 == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_saves(checkpointing):
    """Distinct storages that a forward pass of one long row saves, without the weights: at most the
    estimate, at least 85 %. With checkpointing the forward pass saves the layers' inputs; one
    layer's inside comes on top in backward."""
    flags = f"--gradient-checkpointing {checkpointing} --max-new-tokens 300 --tokens-per-forward 1"
    model, processor, config, run = built(flags)
    model.model.visual.requires_grad_(False)
    prompt = papo.encode_image(model, papo.encode_prompt(processor, "?", picture(0, 84, 56)))
    P, response = prompt["input_ids"].shape[1], random_responses(processor, [300])
    run.max_prompt_tokens = P
    if checkpointing:
        reentrant = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
    model.train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    inputs, _ = papo.group_row(model, prompt, response)
    pack(inputs["attention_mask"])  # a checkpointed layer holds it, too, but not by way of autograd
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.model(**inputs).last_hidden_state
    kept = (t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
    expected = estimate_memory(model, config, run)["activations"] * 2**30
    # The vision tower is frozen, so one layer's inside is the larger of the two.
    inside = [layer_bytes(P + 300, 128, 128, 512, 4), layer_bytes(80, 32, 32, 64, 4)]
    expected -= max(inside) if checkpointing else 0
    assert hidden.requires_grad and 0.85 < sum(kept) / expected < 1.0


def test_a_masked_pass_that_trains_keeps_a_second_graph(estimate):
    size = lambda flags: estimate("3b", f"--gpu-memory 48 {flags}")["activations"]
    one, two = size("--gamma 0.1"), size("--gamma 0.1 --masked-grad full")
    assert two > 1.1 * one and size("--gamma 0 --masked-grad full") == one
    assert size("--gamma 0 --eta2 0.01") == two  # papo_loss needs it for H[pi_mask] alone
