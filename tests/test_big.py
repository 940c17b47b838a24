"""The architecture of Qwen2.5-VL-3B at random weights: does one whole step fit, and how long does
it take? `pytest -m big -s`"""

import time

import pytest
import torch
from conftest import picture

import papo
import toy
import train_small as ts
from study.bench import qwen_3b


@pytest.mark.big
def test_one_step_of_a_3b_with_lora_fits_in_20_gib():
    """Sample 16 tokens for G = 4, reward, reference and masked pass, update: every phase of
    Trainer.step, on the CPU."""
    torch.set_num_threads(2)
    processor, start = toy.toy_processor(), time.perf_counter()
    model = qwen_3b(processor, dtype=torch.bfloat16)
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
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], weight) for name, weight in before.items())
    assert max(trainer.memory.values()) < 20
