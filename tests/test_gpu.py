"""What only a GPU can show: `python -m pytest -m gpu`, three minutes. The same numbers as the
stock way in fp32 and in bf16, a queue that seldom waits, and runs that go on exactly."""

import copy
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, random_responses, shift_logits, two_prompts
from test_sampling import EOS, VISION
from test_train import load_weights, make_folder, write_dots
from torch.utils._python_dispatch import TorchDispatchMode

import papo
import train_small as ts
from study import bench

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
missing = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU: torch.cuda.is_available() is False")
on_gpu = lambda test: pytest.mark.gpu(missing(test))


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    """fp32 means fp32: cuDNN would round an image's patches to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def lent(vlm):
    """A copy on the device, one of three architectures, and its processor."""
    return copy.deepcopy(vlm[0]).to(DEVICE), vlm[1]


@pytest.fixture
def one_lent(one_vlm):
    return copy.deepcopy(one_vlm[0]).to(DEVICE), one_vlm[1]


# --- scoring --------------------------------------------------------------------------------------


@torch.no_grad()
def all_logps(model, processor, layout):
    """Log-probabilities of responses to two prompts, one after the other."""
    found = []
    for prompt in two_prompts(processor):
        logps = layout(model, prompt, random_responses(processor, [9, 1, 14]))
        found += [row[:n].cpu() for row, n in zip(logps, [9, 1, 14])]
    return torch.cat(found)  # (48,)


row = lambda *given: papo.group_logps(*given)[0]


@on_gpu
def test_a_group_row_is_the_padded_rows_in_fp32(lent):
    expected = all_logps(*lent, bench.padded_logps)
    torch.testing.assert_close(all_logps(*lent, row), expected, atol=1e-4, rtol=0)


@on_gpu
def test_bf16_errs_by_its_rounding_only(lent):
    """Against fp32 with the same weights. What bf16's rounding does is derived by rounding at
    random: in fp32 each module's result is moved by up to half a bf16 digit, many times. Beside the
    modules' there are as many roundings within them (sums, products, the softmax), which together
    make it sqrt 2 times as large; the bound is twice that."""
    model, processor = lent
    model.bfloat16()
    found = all_logps(model, processor, row)
    model.float()  # the rounded weights
    expected, half = all_logps(model, processor, row), torch.finfo(torch.bfloat16).eps / 2
    generator = torch.Generator(DEVICE).manual_seed(0)

    def rounded(module, inputs, result):
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            noise = torch.rand(result.shape, device=DEVICE, generator=generator)
            return result * (1 + half * (2 * noise - 1))

    hooks = [m.register_forward_hook(rounded) for m in model.modules() if not list(m.children())]
    moved = torch.stack(
        [all_logps(model, processor, row) - expected for _ in range(16)]
    )  # (16, 48)
    for hook in hooks:
        hook.remove()
    rms = lambda x: x.square().mean().sqrt().item()
    assert 0 < rms(found - expected) < 2 * 2**0.5 * rms(moved) < 0.5


# --- sampling -------------------------------------------------------------------------------------


@on_gpu
def test_greedy_is_generate(lent):
    model, processor = lent
    for prompt in two_prompts(processor):
        inputs = {name: x.to(DEVICE) for name, x in prompt.items()}
        settings = dict(do_sample=False, max_new_tokens=24, suppress_tokens=VISION)
        expected = model.generate(**inputs, **settings)[0, prompt["input_ids"].shape[1] :].tolist()
        [[response]] = papo.sample_groups(model, processor, [prompt], 1, 24, temperature=0)
        assert response.tolist() == expected


def drawn(model, processor, seed, tokens, **options):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    given = model, processor, two_prompts(processor), 8, tokens
    return papo.sample_groups(*given, generator=generator, **options)


@on_gpu
def test_samples_and_scores_agree(lent, monkeypatch):
    """What each token was drawn with, and what group_logps finds for it."""
    model, processor = lent
    seen, sample_token = [], papo.sample_token

    def spy(logits, *given):
        token = sample_token(logits, *given)  # (B,)
        picked = logits.log_softmax(-1).gather(-1, token[:, None])  # (B, 1)
        seen.append(picked.cpu())
        return token

    monkeypatch.setattr(papo, "sample_token", spy)
    monkeypatch.setitem(papo.LOOK_EVERY, DEVICE.type, 16)  # until then no row is dropped
    # Vision tokens, never drawn but part of the scored softmax, are made impossible for both.
    shift_logits(model, {**dict.fromkeys(VISION, -1e4), EOS: 3.0})
    groups, prompts = drawn(model, processor, 0, 16), two_prompts(processor)
    picked = torch.cat(seen, 1)  # (16, 16)
    for i, (prompt, responses) in enumerate(zip(prompts, groups)):
        with torch.no_grad():
            logps, mask = papo.group_logps(model, prompt, responses)  # (8, T) each
        found = picked[8 * i : 8 * i + 8, : logps.shape[1]] * mask.cpu()
        torch.testing.assert_close(found, logps.cpu(), atol=1e-4, rtol=0)


@on_gpu
def test_a_seed_decides_a_rollout(one_lent):
    texts = lambda seed: [[o.tolist() for o in group] for group in drawn(*one_lent, seed, 20)]
    state = torch.cuda.get_rng_state() if HAS_GPU else None
    assert texts(0) == texts(0) != texts(1)
    assert state is None or torch.equal(torch.cuda.get_rng_state(), state)


def test_responses_are_cut_where_they_end_though_their_rows_go_on(one_vlm, monkeypatch):
    """On any device: looking every 16 tokens, each response is what its row drew up to its first
    end token, rows are dropped at a look only, and sampling stops at the first one after the
    last."""
    model, processor = one_vlm
    seen, sample_token = [], papo.sample_token
    monkeypatch.setitem(papo.LOOK_EVERY, "cpu", 16)
    monkeypatch.setattr(papo, "sample_token", lambda *a: seen.append(sample_token(*a)) or seen[-1])
    shift_logits(model, {EOS: 3.0})
    given = model, processor, two_prompts(processor), 8, 200
    groups = papo.sample_groups(*given, generator=torch.Generator().manual_seed(0))
    responses, going = [o.tolist() for group in groups for o in group], list(range(16))
    for t, tokens in enumerate(seen):
        if len(tokens) < len(going):  # only ended ones were dropped
            going = [i for i in going if len(responses[i]) > t]
            assert t % 16 == 0
        for i, token in zip(going, tokens.tolist(), strict=True):
            assert t >= len(responses[i]) or responses[i][t] == token
    lengths = list(map(len, responses))
    assert all(EOS not in o[:-1] and o[-1] == EOS for o in responses) and min(lengths) < 16
    assert len(seen) == -(-max(lengths) // 16) * 16 > 16 and len(going) < 16


class CountWaits(TorchDispatchMode):
    """Operations that hand numbers from the device to Python, which makes it wait."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        names = "aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"
        self.count += str(operation) in names
        return operation(*args, **(kwargs or {}))


def waits(work) -> int:
    """How often the work waits for the device."""
    if not HAS_GPU:
        with CountWaits() as mode:
            work()
        return mode.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@on_gpu
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling_waits_twice_in_16_tokens(lent, monkeypatch, top_p):
    """Two looks more in 64 tokens than in 32: have all ended, has a quarter?"""
    model, processor = lent
    monkeypatch.setitem(papo.LOOK_EVERY, "cpu", 16)
    shift_logits(model, {EOS: -1e4})  # none ends
    count = lambda tokens: waits(lambda: drawn(model, processor, 0, tokens, top_p=top_p))
    count(4)
    assert 0 < count(64) - count(32) <= 4


# --- runs -----------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
import papo, train_small
calls, papo_step = [], papo.papo_step
def step(*given):
    calls.append(1)
    if len(calls) == {kill}:
        os.kill(os.getpid(), signal.SIGKILL)
    return papo_step(*given)
papo.papo_step = step
train_small.main({argv!r})
"""


@on_gpu
@pytest.mark.parametrize("kind", ["--precision=bf16-kahan", "--precision=bf16 --lora=4"])
def test_a_killed_run_goes_on_exactly(kind, tmp_path, tmp_path_factory):
    """SIGKILL in the second of three steps: the run that goes on from the first step's checkpoint
    ends with the metrics and the weights of one that nothing disturbed."""
    data = write_dots(tmp_path / "d.parquet", [n % 9 + 1 for n in range(16)])
    sizes = (
        "--group-size=2 --prompts-per-batch=2 --updates-per-batch=2 --max-new-tokens=20 --steps=3 "
        "--eval-size=2 --eval-every=2 --save-every=1 --learning-rate=1e-3 --min-pixels=4704 "
        "--max-pixels=15680 "
    )
    argv = ["--model", make_folder("qwen2_5_vl", tmp_path_factory), "--dataset", data]
    argv += (sizes + kind).split()

    def run(name, kill=0, *more):
        code = PROGRAM.format(
            root=str(ROOT), kill=kill, argv=[*argv, "--out", str(tmp_path / name), *more]
        )
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        assert done.returncode == (-signal.SIGKILL if kill else 0), done.stderr.decode()[-3000:]
        return tmp_path / name

    whole = run("whole")
    run("killed", 4)
    killed = run("killed", 0, "--resume")
    lines = (whole / "metrics.jsonl").read_text()
    assert (killed / "metrics.jsonl").read_text() == lines and lines.count("\n") == 4
    pairs = [load_weights(folder / "checkpoint").state_dict() for folder in (whole, killed)]
    assert all(torch.equal(pairs[0][name], pairs[1][name]) for name in pairs[0] | pairs[1])


@on_gpu
def test_the_embedded_world_learns(warm_start, tmp_path):
    """The main job: of 40 steps from the warm start the last 5 are right more often."""
    config, run = ts.parse_args(["--gamma=0.02"])
    model, processor = warm_start
    rows = ts.toy.toy_dataset("train", 2048)
    trainer = ts.Trainer(copy.deepcopy(model).to(DEVICE), processor, config, run, rows)
    accuracy = [trainer.step()["accuracy"] for _ in range(40)]
    assert sum(accuracy[-5:]) / 5 > sum(accuracy[:5]) / 5 + 0.2
