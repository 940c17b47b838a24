"""The architecture of Qwen2.5-VL-3B at random weights: does one whole step fit, and how long does
it take? `pytest -m big -s`"""

import time

import pytest
import torch
from conftest import SPECIAL_TOKENS, make_processor, picture
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import papo
import train_small as ts

TEXT = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36)
TEXT |= dict(num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=128000)
TEXT |= dict(rms_norm_eps=1e-6, tie_word_embeddings=True)
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
VISION |= dict(out_hidden_size=2048, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
VISION |= dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
TEXT["rope_parameters"] = ROPE


def published_3b(processor, dtype=torch.bfloat16):
    """Qwen2.5-VL-3B's published sizes, weights drawn at random."""
    ids = dict(zip(SPECIAL_TOKENS, processor.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    names = dict(image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    names |= dict(vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    tokens = {name: ids[token] for name, token in names.items()}
    sizes = dict(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    torch.manual_seed(0)
    make = Qwen2_5_VLForConditionalGeneration._from_config
    return make(Qwen2_5_VLConfig(**sizes, **tokens), dtype=dtype, attn_implementation="sdpa")


@pytest.mark.big
def test_one_step_of_a_3b_with_lora_fits_in_20_gib():
    """Sample 16 tokens for G = 4, reward, reference and masked pass, update: every phase of
    Trainer.step, on the CPU."""
    torch.set_num_threads(2)
    processor, start = make_processor("qwen2_5_vl"), time.perf_counter()
    model = published_3b(processor)
    assert 3.7e9 < sum(p.numel() for p in model.parameters()) < 3.8e9
    print(f"\nmodel made in {time.perf_counter() - start:.0f} s")
    sizes = dict(group_size=4, prompts_per_batch=1, updates_per_batch=1, max_new_tokens=16)
    config = papo.PAPOConfig(**sizes, learning_rate=1e-3)
    run = ts.RunConfig(model="3b", lora=16, precision="bf16")
    rows = [{"images": [picture(0, 140, 112)], "problem": "What is shown here?", "answer": "7"}]
    trainer = ts.Trainer(model, processor, config, run, rows)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    metrics = trainer.step()
    for phase, seconds in trainer.seconds.items():
        print(f"{phase}: {seconds:.0f} s, peak {trainer.memory[phase]:.1f} GiB")
    print(metrics)
    assert metrics["skipped"] == 0 and metrics["response_tokens"] == 16
    assert metrics["grad_norm"] > 0 and metrics["kl_prcp"] > 0
    assert any(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad
    )
    assert max(trainer.memory.values()) < 20
