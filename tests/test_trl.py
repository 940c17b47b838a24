"""papo_trl.py: papo.py's objective under TRL's trainer is papo.py's objective, on one process and
on two.

As a script (`torchrun --nproc_per_node 2 tests/test_trl.py FOLDER`) it is one process of a test's
training run."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, gradients, lines_of, picture, random_responses, shift_logits
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("trl", reason="needs requirements-trl.txt", exc_type=ImportError)

import datasets
from trl import GRPOConfig, GRPOTrainer

import papo
import papo_trl
from papo import PAPOConfig, encode_prompt, fit_image, group_logps, papo_loss
from papo_trl import PAPOTrainer, trl_settings

ROOT = Path(__file__).parent.parent
# 12 responses an update, not clipped; plain SGD, so that an update is the gradient.
SIZES = dict(group_size=4, prompts_per_batch=3, updates_per_batch=1, max_new_tokens=6)
SIZES |= dict(max_grad_norm=1e9)
LEARNING_RATE = 0.5


def pictures(i):
    return [picture(i, 60 + 20 * i, 90)] + [picture(9, 90, 70)] * (i == 1)


def make_rows(processor):
    """Six questions about images of several shapes, as papo_trl.fit_rows leaves them; the second
    one is about two."""
    fit = lambda i: [fit_image(processor, image) for image in pictures(i)]
    problem = lambda i: "Is <image> more than <image>?" if i == 1 else QUESTIONS[i % 2]
    rows = [dict(images=fit(i), problem=problem(i), answer=str(i), row=i) for i in range(6)]
    text, images = datasets.Value("string"), datasets.List(datasets.Image())
    columns = dict(images=images, problem=text, answer=text, row=datasets.Value("int64"))
    return datasets.Dataset.from_list(rows, features=datasets.Features(columns))


class FixedSamples(PAPOTrainer):
    """Responses and rewards that depend on a response's number in the whole batch only, not on the
    number of processes."""

    def _generate_single_turn(self, prompt_ids, *args):
        start = self.accelerator.process_index * len(prompt_ids)
        draw = lambda n: random_responses(self.processing_class, [2 + n % 5], seed=n)[0].tolist()
        return [draw(n) for n in range(start, start + len(prompt_ids))], None

    def reward(self, completion_ids, **_):
        return [len(ids) % 3 / 20 for ids in completion_ids]  # small: TRL's 1e-4 shows


def make_trainer(folder, config, kind=FixedSamples, per_device=None, processes=1, **settings):
    """A trainer on the model saved in folder; by default all of an update in one pass."""
    share = config.prompts_per_batch * config.group_size // processes // config.updates_per_batch
    per_device = per_device or share
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True)
    plain |= dict(max_steps=1, lr_scheduler_type="constant", save_strategy="no")
    plain |= dict(per_device_train_batch_size=per_device, ddp_find_unused_parameters=False)
    plain |= trl_settings(config, per_device, processes)
    args = GRPOConfig(output_dir=str(Path(folder) / "run"), **plain | settings)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    rows = dict(train_dataset=make_rows(processor), optimizers=(sgd, None))
    trainer = kind(model, config, args, processor, **rows)
    trainer.model.train()
    return trainer


UPDATES = {
    "detached": dict(gamma=0.5, aggregation="sequence"),
    "full": dict(gamma=0.5, eta1=0.3, eta2=0.4, masked_grad="full", aggregation="token"),
}


def train_once(folder, name, per_device, processes=1):
    """One update. Returns the change of the weights, and this process's masked pixels by row."""
    config = PAPOConfig(**SIZES, **UPDATES[name])
    trainer = make_trainer(folder, config, per_device=per_device, processes=processes)
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    generate, seen = trainer._generate_and_score_completions, {}

    def spy(inputs):
        batch = generate(inputs)
        for row, pixels in zip(inputs, batch["masked_pixels"]):
            seen.setdefault(row["row"], []).append(pixels)
        return batch

    trainer._generate_and_score_completions = spy
    trainer.train()
    return {name: w - before[name] for name, w in trainer.model.state_dict().items()}, seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    after = {name: train_once(sys.argv[1], name, per_device=3, processes=2) for name in UPDATES}
    torch.save(after, Path(sys.argv[1]) / f"rank{torch.distributed.get_rank()}.pt")
    sys.exit()


def sampled_batch(trainer):
    """(inputs, batch): the first three questions, four responses each, in the order of the rows,
    and pi_old and pi_ref somewhat off."""
    rows = [trainer.train_dataset[i] for i in range(3) for _ in range(trainer.papo.group_size)]
    batch = trainer._generate_and_score_completions(rows)
    trainer._buffered_inputs = [batch]
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        logps, _ = trainer.score(trainer.model, batch, batch["pixel_values"], 0)
    for name in ("old", "ref"):
        noise = torch.randn(logps.shape, generator=generator)
        batch[f"{name}_per_token_logps"] = logps + 0.3 * noise
    return rows, batch


def responses_of(batch):
    """The batch's responses without padding: LongTensors (<= T,)"""
    lengths = batch["completion_mask"].sum(1).tolist()
    return [ids[:n] for ids, n in zip(batch["completion_ids"], lengths)]


def assert_same(a, b, tolerance):
    """Two dicts of tensors, to a tolerance relative to the largest number in all of them."""
    assert a.keys() == b.keys()
    scale = max(x.abs().max() for x in b.values())
    assert scale > 0
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def papo_reference(trainer, rows, batch):
    """The loss as papo.py itself computes it from the same responses: a group a row, its own
    scoring, its own average."""
    config, G, T = trainer.papo, trainer.papo.group_size, batch["completion_ids"].shape[1]
    columns = {name: [] for name in ("logps", "entropy", "masked_logps", "masked_entropy")}
    for start in range(0, len(rows), G):
        row = rows[start]
        prompt = encode_prompt(trainer.processing_class, row["problem"], row["images"])
        masked = {**prompt, "pixel_values": batch["masked_pixels"][start]}
        responses = responses_of(batch)[start : start + G]
        for prefix, view in (("", prompt), ("masked_", masked)):
            score = group_logps(trainer.model, view, responses, config.temperature, True)
            for name, x in ((f"{prefix}logps", score[0]), (f"{prefix}entropy", score[2])):
                columns[name].append(torch.nn.functional.pad(x, (0, T - x.shape[1])))
    scored = {name: torch.cat(parts) for name, parts in columns.items()}
    if config.entropy_estimate == "sampled":
        scored |= dict(entropy=None, masked_entropy=None)
    rewards = torch.tensor(trainer.reward(responses_of(batch)))
    advantages = papo.group_advantages(rewards.view(-1, G)).flatten()
    constants = batch["old_per_token_logps"], advantages, batch["completion_mask"]
    scored["ref_logps"] = batch["ref_per_token_logps"]
    return papo_loss(config, scored.pop("logps"), *constants, **scored)[0]


@pytest.mark.parametrize("estimate", ["exact", "sampled"])
@pytest.mark.parametrize("masked_grad", ["detached", "entropy", "full"])
@pytest.mark.parametrize("aggregation", ["sequence", "token"])
def test_loss_and_gradient_are_papos(folder, aggregation, masked_grad, estimate):
    """Two ways to the same numbers: TRL scores padded rows one by one, papo.py a group in one
    row."""
    weights = dict(gamma=0.5, beta=0.2, eta1=0.3, eta2=0.4, temperature=0.8)
    modes = dict(aggregation=aggregation, masked_grad=masked_grad, entropy_estimate=estimate)
    config = PAPOConfig(**weights, **modes, **SIZES)
    trainer = make_trainer(folder, config)
    rows, batch = sampled_batch(trainer)
    loss = trainer._compute_loss(trainer.model, batch)
    expected = papo_reference(trainer, rows, batch)
    assert abs(loss - expected) < 1e-5 * abs(expected)
    assert_same(gradients(trainer.model, loss), gradients(trainer.model, expected), 3e-5)


@pytest.mark.parametrize("aggregation, loss_type", [("sequence", "grpo"), ("token", "dapo")])
def test_without_papos_terms_it_is_trls_own_loss(folder, aggregation, loss_type):
    modes = dict(clip_dual=float("inf"), aggregation=aggregation)
    config = PAPOConfig(gamma=0.0, beta=0.2, **modes, **SIZES)
    trainer = make_trainer(folder, config)
    trainer.args.use_bias_correction_kl = False
    _, batch = sampled_batch(trainer)
    assert "masked_pixels" not in batch
    generator = torch.Generator().manual_seed(0)
    batch["importance_sampling_ratio"] = torch.rand(12, 1, generator=generator)  # as vLLM's
    loss = trainer._compute_loss(trainer.model, batch)
    trainer.use_vllm = True
    trainer.loss_type, trainer.epsilon_low = loss_type, config.clip_low
    trainer.epsilon_high = config.clip_high
    trainer.current_gradient_accumulation_steps = 1
    expected = GRPOTrainer._compute_loss(trainer, trainer.model, batch)
    assert abs(loss - expected) < 1e-6
    assert_same(gradients(trainer.model, loss), gradients(trainer.model, expected), 1e-5)


def launch(script, *arguments):
    """Run a script in two CPU processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", script]
    command += map(str, arguments)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_processes_and_accumulation_change_nothing(folder):
    """An update of 12 responses of three questions, in one pass; in three; in two processes, with a
    group in both. A mask of its own for each process, or a mean of means, would show."""
    launch("tests/test_trl.py", folder)
    ranks = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
    for name in UPDATES:
        whole, masks = train_once(folder, name, per_device=12)
        (first, masks_0), (second, masks_1) = (rank[name] for rank in ranks)
        for change in (train_once(folder, name, per_device=4)[0], first, second):
            assert_same(change, whole, 2e-5)
        # Six responses a process: the second group lies in both.
        assert len(masks_0.keys() & masks_1.keys()) == 1
        for row, copies in masks.items():
            spread = masks_0.get(row, []) + masks_1.get(row, [])
            assert len(copies) == len(spread) == 4
            assert all(torch.equal(pixels, copies[0]) for pixels in copies + spread)


def test_token_average_is_exact_at_several_updates(folder):
    """TRL shuffles a batch over its updates, which then differ in tokens: each micro-batch's share
    is that in its own update."""
    config = PAPOConfig(aggregation="token", **SIZES | dict(updates_per_batch=2))
    trainer = make_trainer(folder, config, per_device=3)
    rows = [trainer.train_dataset[i] for i in range(3) for _ in range(4)]
    trainer._prepare_inputs(rows)
    counts = [part["completion_mask"].sum().item() for part in trainer._buffered_inputs]
    assert len(counts) == 4 and sum(counts[:2]) != sum(counts[2:])
    for trainer._step in range(4):
        first = trainer._step // 2 * 2
        expected = counts[trainer._step] / sum(counts[first : first + 2])
        share = trainer.share(trainer._buffered_inputs[trainer._step]["completion_mask"])
        assert abs(share - expected) < 1e-6


def test_prompts_and_pixels_are_encode_prompts(vlm, tmp_path, monkeypatch):
    """On three architectures; the masked pixels too."""
    for part in vlm:
        part.save_pretrained(tmp_path)
    mask_patches, masked_images, patch_sizes = papo.mask_patches, [], set()

    def spy(image, ratio, patch_size, generator):
        masked_images.append(mask_patches(image, ratio, patch_size, generator))
        patch_sizes.add(patch_size)
        return masked_images[-1]

    monkeypatch.setattr(papo, "mask_patches", spy)
    trainer = make_trainer(tmp_path, PAPOConfig(**SIZES))
    rows, batch = sampled_batch(trainer)
    assert len(masked_images) == 4  # one mask an image, shared by its group
    size = trainer.processing_class.image_processor.patch_size  # 14, and Qwen3-VL's 16
    assert patch_sizes == {size}
    masks = [masked_images[:1], masked_images[1:3], masked_images[3:]]
    counts = [len(row["images"]) for row in rows]
    patches = batch["image_grid_thw"].prod(1).split(counts)
    pixels = batch["pixel_values"].split([int(n.sum()) for n in patches])
    for i, row in enumerate(rows):
        originals = pictures(row["row"])  # not fitted yet
        prompt = encode_prompt(trainer.processing_class, row["problem"], originals)
        ids = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        assert torch.equal(ids, prompt["input_ids"][0])
        assert torch.equal(pixels[i], prompt["pixel_values"])
        masked = encode_prompt(trainer.processing_class, row["problem"], masks[i // 4])
        assert torch.equal(batch["masked_pixels"][i], masked["pixel_values"])
        assert not torch.equal(masked["pixel_values"], prompt["pixel_values"])


def test_each_step_has_a_mask_of_its_own(folder):
    trainer = make_trainer(folder, PAPOConfig(**SIZES))
    first = trainer.masked_pixels(trainer.train_dataset[0])
    trainer.state.global_step = 1
    assert not torch.equal(first, trainer.masked_pixels(trainer.train_dataset[0]))


def test_no_vision_token_is_sampled(folder):
    """Even where the model likes them best; with TRL's own list, which holds one of the four, it
    would."""
    trainer = make_trainer(folder, PAPOConfig(**SIZES), kind=PAPOTrainer)
    never = papo.vision_token_ids(trainer.model)
    with torch.no_grad():
        hook = shift_logits(trainer.model, dict.fromkeys(never, 100.0))
        prompts = [[{**m} for m in papo.chat_messages(QUESTIONS[0])] for _ in range(4)]
        for prompt in prompts:
            prompt[0]["content"][0]["image"] = trainer.train_dataset[0]["images"][0]
        responses, _ = trainer._generate_single_turn(*trainer._tokenize_prompts(prompts), 4)
        hook.remove()
    assert sum(map(len, responses)) > 4
    assert not {token for response in responses for token in response} & set(never)


def test_reward_is_compute_rewards(folder):
    trainer, logged = make_trainer(folder, PAPOConfig(**SIZES), kind=PAPOTrainer), {}
    texts = ["<think> 1 </think> \\boxed{7}", "\\boxed{7}", "7"]
    tokenizer = trainer._tokenizer
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    rewards = trainer.reward(ids, ["7"] * 3, logged.__setitem__, prompts=None)
    expected = [papo.compute_reward(text, "7")["reward"] for text in texts]
    assert rewards == expected == [1.0, 0.9, 0.0]
    assert logged == {"accuracy": 2 / 3, "format": 1 / 3}


# ---- what TRL cannot do is refused ----


@pytest.mark.parametrize(
    "argv, reason",
    [
        (["--preset", "papo-d-3b"], "dynamic sampling"),
        (["--dynamic-sampling"], "dynamic sampling"),
        (["--use_vllm", "--vllm_importance_sampling_mode", "token_mask"], "token-wise vLLM"),
        (["--loss_type", "grpo"], "loss_type has no effect"),
        (["--tokens_per_forward", "5"], "tokens_per_forward has no effect"),
        (["--num_generations", "4"], "--num_generations is 8 by PAPO's flags, not 4"),
        (["--per_device_train_batch_size", "7"], "--per_device_train_batch_size"),
        (["--gamma", "-1"], "gamma must lie in"),
        (["--nonsense", "1"], "--nonsense"),
        (["--dataset", "x.jsonl"], "--dataset needs --model"),
        (["--use_bias_correction_kl", "False"], "use_bias_correction_kl has no effect"),
    ],
)
def test_one_line_and_exit_code_2(argv, reason, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        papo_trl.main([*argv, "--use_cpu", "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len([line for line in error if "error" in line]) == 1
    assert reason in error[-1]


@pytest.mark.parametrize("name", ["eta1", "eta2"])
def test_an_entropy_without_gradient_is_refused(folder, name):
    """Versions of TRL before 1.16 compute entropies under no_grad: a weight on them would do
    nothing, silently."""
    trainer = make_trainer(folder, PAPOConfig(**{name: 0.1}, **SIZES))
    _, batch = sampled_batch(trainer)
    trainer._compute_loss(trainer.model, batch)
    score = trainer._get_per_token_logps_and_entropies

    def older(*args, **kwargs):
        logps, entropy, loss = score(*args, **kwargs)
        return logps, entropy.detach(), loss

    trainer._get_per_token_logps_and_entropies = older
    with pytest.raises(RuntimeError, match="carry no gradient"):
        trainer._compute_loss(trainer.model, batch)


def test_flags():
    """PAPO's names where both have one, dashes or underscores, and TRL's for the rest."""
    from train_small import RunConfig

    flags = "--use_cpu --learning-rate 3e-4 --gamma 0.3 --steps 5 --warmup_steps 7"
    flags += " --per_device_train_batch_size 16"
    config, run, args = papo_trl.parse_args(flags.split())
    assert (config.gamma, config.learning_rate, args.learning_rate) == (0.3, 3e-4, 3e-4)
    assert args.warmup_steps == 7 and args.max_steps == 10
    assert (args.gradient_accumulation_steps, args.steps_per_generation) == (4, 8)
    assert args.seed == RunConfig().seed  # one warm start for both programs
    flags = "--preset papo-g-7b --model m --dataset d --use_cpu"
    config, _, args = papo_trl.parse_args(flags.split())
    assert (config.eta2, config.mask_gradient) == (0.05, "entropy")
    assert (args.num_generations, args.top_p) == (5, 0.99)


def test_rows_are_fitted_and_unusable_ones_left_out(folder, capsys):
    """Those of train_small.py's reading, whose own tests know more; the others keep their
    numbers."""
    picture(0).save(folder / "a.png")
    row = dict(images=["a.png"], problem="<image>What?", answer="3")
    rows = [row, row | dict(images=["missing.png"]), row | dict(problem=" "), row, row]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = f"--model {folder} --dataset {path} --min-pixels 784 --use_cpu --prompts_per_batch 24"
    _, run, args = papo_trl.parse_args([*argv.split(), "--eval_size", "1"])
    _, processor = papo_trl.load_model(run, args)
    rows, held_out = papo_trl.load_rows(run, args, processor)
    assert rows["row"][:] == [0, 3] and held_out["row"][:] == [4] and rows[0]["answer"] == "3"
    assert rows[0]["images"][0].size == fit_image(processor, picture(0)).size
    said = capsys.readouterr().out
    for reason in ("unreadable image", "problem is no text"):
        assert f"skipped 1 rows: {reason}\n" in said
    path.write_text(json.dumps(row))
    with pytest.raises(SystemExit):
        papo_trl.main([*argv.split(), "--out", str(folder / "run")])
    assert "1 usable rows, at least 2 are needed" in capsys.readouterr().err


# ---- the command ----


def test_two_processes_train_and_train_small_evaluates(warm_start, tmp_path, capsys):
    """The README's command, shorter: its checkpoint loads, and train_small.py --eval-only finds the
    accuracy TRL logged."""
    import train_small

    flags = "--steps 1 --prompts-per-batch 4 --updates_per_batch 1 --per_device_train_batch_size 16"
    flags += " --eval_size 24"
    launch("papo_trl.py", *flags.split(), "--out", tmp_path, "--learning_rate", "1e-6")
    log = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
    assert any(line.get("kl_prcp", 0) > 0 for line in log)
    accuracy = [line["eval_accuracy"] for line in log if "eval_accuracy" in line][-1]
    for name in ("checkpoint", "checkpoint-1"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / name)
    argv = f"--eval-only --model {tmp_path / 'checkpoint'} --eval_size 24 --out {tmp_path / 'e'}"
    train_small.main(argv.split())
    lines = lines_of(tmp_path / "e" / "eval.jsonl")
    again = sum(line["accuracy"] for line in lines) / len(lines)
    assert len(lines) == 24
    # 192 samples each of the same policy: four deviations of the difference.
    assert abs(accuracy - again) < 0.1


@pytest.mark.big
def test_training_is_train_smalls():
    """Three seeds of the embedded world end within the spread of train_small.py's eight, and
    study/trl.png shows both. `pytest -m big -k train_smalls`; runs/trl-seedN are not repeated."""
    from matplotlib import pyplot as plt

    plt.switch_backend("Agg")
    measured = lambda lines: [line for line in lines if "eval_accuracy" in line]
    accuracy = lambda lines, per: [(x["step"] / per, x["eval_accuracy"]) for x in measured(lines)]
    kept = sorted((ROOT / "study" / "runs").glob("papo-g-seed*.jsonl.gz"))
    small = [accuracy(map(json.loads, gzip.open(path, "rt")), 1) for path in kept]
    trl = []
    for seed in range(3):
        out = ROOT / "runs" / f"trl-seed{seed}"
        if not (out / "checkpoint-80").exists():
            launch("papo_trl.py", "--seed", seed, "--out", out)
        state = json.loads((out / "checkpoint-80" / "trainer_state.json").read_text())
        trl.append(accuracy(state["log_history"], 2))
    figure, axis = plt.subplots(figsize=(5, 3.5), layout="tight")
    for curves, color, name in ((small, "0.7", "train_small.py"), (trl, "C0", "papo_trl.py")):
        for i, curve in enumerate(curves):
            label = "" if i else f"{name}, {len(curves)} seeds"
            axis.plot(*zip(*curve), color=color, label=label)
    axis.set(xlabel="step", ylabel="held-out accuracy")
    axis.legend()
    figure.savefig(ROOT / "study" / "trl.png", dpi=120)
    ends = [[curve[-1][1] for curve in curves] for curves in (small, trl)]
    assert all(min(ends[0]) <= end <= max(ends[0]) for end in ends[1]), ends
