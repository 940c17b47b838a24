"""train_small.py: the program, on tiny model folders and local data sets of the published
formats."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from urllib.request import url2pathname

import optimi
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, QUICK, lines_of, make_folder, metrics, same_weights, write_dots
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import papo
import toy
import train_small as ts
from program import memory, report


@pytest.fixture
def trainers(monkeypatch):
    """The Trainers that the program makes, to look inside afterwards."""
    made = []

    class Spy(ts.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(ts, "Trainer", Spy)
    return made


GREY = Image.new("RGB", (84, 84), "grey")


def scorer(processor):
    """A function from a model to the log-probs of three tokens about an image, (1, 3)."""
    prompt = papo.encode_prompt(processor, "How many dots?", GREY)
    response = [torch.tensor([60, 61, 62])]
    return torch.no_grad()(lambda model: papo.group_logps(model.eval(), prompt, response)[0])


load_weights = AutoModelForImageTextToText.from_pretrained


# ---- real models and data ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_train_checkpoint_load_and_evaluate(
    architecture, tmp_path_factory, trainers, tmp_path, capsys
):
    """The whole way for each architecture; the loaded checkpoint has the trained weights and says
    the same when greedy."""
    folder, out = make_folder(architecture, tmp_path_factory), tmp_path / "run"
    parquet = write_dots(tmp_path / "dots.parquet", [n % 9 + 1 for n in range(64)])
    argv = ["--model", folder, "--dataset", parquet, *QUICK]
    capsys.readouterr()
    ts.main([*argv, "--out", str(out)])
    left = "config.json metrics.jsonl curves.png samples.html checkpoint"
    assert {path.name for path in out.iterdir()} == set(left.split())
    said, noise = capsys.readouterr()
    before, after = said.split("accuracy (avg@8)")
    words = [line.split()[0] for line in before.splitlines() if line.strip()]
    assert words == "model device data output algorithm steps memory held-out".split()
    for text in (f"{out}/", "papo-g, gamma 0.02, beta 0.01", "2 of 4 questions x 2"):
        assert text in before
    links = [word.removeprefix("file://") for word in after.split() if word.startswith("file:")]
    assert len(links) == 4 and all(os.path.isfile(url2pathname(link)) for link in links)
    bars = {line.split(":")[0] for line in noise.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"checking held-out rows", "papo-g"}  # no library says anything
    lines = metrics(out)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[1]["kl_prcp"] > 0 and lines[2]["clip_high_fraction"] >= 0

    trained, loaded = trainers[0].model.eval(), load_weights(out / "checkpoint")
    processor = AutoProcessor.from_pretrained(out / "checkpoint")
    assert same_weights(loaded, trained) and not same_weights(loaded, load_weights(folder))
    prompt = papo.encode_prompt(processor, "How many dots?", GREY)
    greedy = lambda model: papo.sample_groups(model, processor, [prompt], 1, 8, temperature=0)
    assert greedy(loaded)[0][0].tolist() == greedy(trained)[0][0].tolist()

    card = (out / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\n") and "PAPO-G" in card and "gamma: 0.02" in card
    assert not any(path in card for path in (str(tmp_path), folder, parquet))
    argv[1] = str(out / "checkpoint")
    ts.main(["--eval-only", *argv, "--max-samples", "8", "--out", str(tmp_path / "eval")])
    rows = lines_of(tmp_path / "eval" / "eval.jsonl")
    assert len(rows) == 8 and "gap" in capsys.readouterr().out
    assert len(rows[0]["responses"]) == len(rows[0]["responses_masked"]) == ts.SAMPLES


@pytest.mark.parametrize(
    "flags", ["--gated True", "--lora 4 --precision bf16", "--precision bf16-kahan --freeze-vision"]
)
def test_a_resumed_run_is_the_same_run(flags, train, trainers):
    """Four steps, and two steps resumed to four: the same metrics and weights to the bit. A gated
    run ends also where a question it shows is paid nothing."""
    whole = train("whole", f"{flags} --steps 4")
    parts = train("parts", flags)
    train("parts", f"{flags} --steps 4 --resume")
    assert metrics(whole) == metrics(parts) and trainers[2].steps_done == 4
    assert same_weights(trainers[0].model, trainers[2].model)


def test_the_seed_decides_the_metrics(train):
    a, b, c = (metrics(train(name, f"--seed {seed}")) for name, seed in zip("abc", (3, 3, 4)))
    assert a == b != c


def test_a_reward_of_ones_own(train, monkeypatch):
    """Trained on, evaluated and shown; its entries become metrics by their name."""
    init = ts.Trainer.__init__

    def initialise(self, *args):
        init(self, *args)
        self.reward = lambda text, answer, weight: dict(reward=len(text), accuracy=1.0, length=7.0)

    monkeypatch.setattr(ts.Trainer, "__init__", initialise)
    out = train("run")
    first, *steps = metrics(out)
    assert first["eval_accuracy"] == first["eval_accuracy_masked"] == 1
    for line in steps:
        assert line["length"] == 7 and line["reward"] > 1 and "format" not in line
    assert "length 7.00" in (out / "samples.html").read_text()


def test_lora_reference_is_the_model_without_its_adapter(train, one_folder, trainers):
    """And the checkpoint is the adapter on its base, or with --merge one model."""
    a, b = train("a", "--lora 4"), train("b", "--lora 4 --merge")
    trainer, base = trainers[0], load_weights(one_folder)
    score = scorer(trainer.processor)
    with trainer.reference() as reference:
        assert torch.allclose(score(reference), score(base), atol=1e-5)
    adapted = score(trainer.model)
    assert not torch.allclose(adapted, score(base), atol=1e-5)
    assert torch.allclose(score(load_weights(a / "checkpoint")), adapted, atol=1e-5)
    again, _ = ts.load_model(ts.RunConfig(model=str(a / "checkpoint")))  # to train on: merged
    assert torch.allclose(score(again), adapted, atol=1e-4)
    assert not (b / "checkpoint" / "adapter_config.json").exists()
    assert torch.allclose(score(load_weights(b / "checkpoint")), adapted, atol=1e-4)


def test_an_adapter_on_an_adapter_is_refused_or_merged(train, trainers, tmp_path, capsys):
    """Alone it would lack the first one; with --merge what is written is the model that was
    trained. Without --lora all weights are trained on: peft leaves the base frozen when it
    merges."""
    first = str(train("a", "--lora 4") / "checkpoint")
    with pytest.raises(SystemExit):
        train("b", "--lora 4", first)
    assert "add --merge" in capsys.readouterr().err and not (tmp_path / "b").exists()
    second = train("c", "--lora 4 --merge", first)
    score, start = scorer(trainers[-1].processor), ts.load_model(ts.RunConfig(model=first))[0]
    written = score(load_weights(second / "checkpoint"))
    assert torch.allclose(written, score(trainers[-1].model), atol=1e-4)
    assert not torch.allclose(written, score(start), atol=1e-4)
    third = train("d", "", first)
    assert all(p.requires_grad for p in trainers[-1].model.parameters())
    assert not same_weights(load_weights(third / "checkpoint"), start)


def test_a_bf16_adapter_is_evaluated_as_it_was_trained(train, trainers, capsys):
    """Beside its base, not merged into it: the same scores to the bit. To train on it needs fp32,
    for merged into bf16 weights most of what it learned would be rounded away."""
    adapter = str(train("a", "--lora 4 --precision bf16 --learning-rate 1e-4") / "checkpoint")
    run = ts.RunConfig(model=adapter, precision="bf16", eval_only=True)
    score = scorer(trainers[0].processor)
    assert torch.equal(score(ts.load_model(run)[0]), score(trainers[0].model))
    merge = "--lora 4 --merge --precision bf16"
    for flags in (merge, "--precision bf16-kahan", "--gpu-memory 24 --merge"):
        with pytest.raises(SystemExit):
            train("b", flags, adapter)
        assert "add --precision fp32" in capsys.readouterr().err


def test_merging_keeps_what_was_trained_on_bf16_weights(train, trainers, monkeypatch):
    """Small updates, as lr 1e-6 makes them: the merged checkpoint differs from its base by all of
    them, bf16 keeps a part. No parameter is copied where it lies: the GPU has no room for a second
    model."""
    save, copied = ts.Trainer.save, lambda *_: pytest.fail("copied where it lies")

    def watched(*args):
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Parameter, "__deepcopy__", copied)
            save(*args)

    monkeypatch.setattr(ts.Trainer, "save", watched)
    out = train("a", "--lora 4 --merge --precision bf16 --learning-rate 1e-5")
    merged, kept, rounded = load_weights(out / "checkpoint"), [], []
    weights = dict(merged.named_parameters())
    for name, module in trainers[0].model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight.detach()  # bf16
            delta = module.get_delta_weight("default").detach().float()
            lost = lambda weight: (weight.float() - base.float() - delta).norm() / delta.norm()
            kept.append(lost(weights[f"{name}.weight"]))
            rounded.append(lost((base + delta).bfloat16()))
    assert len(kept) == 14 and merged.dtype == torch.float32
    assert max(kept) < 0.01 and min(rounded) > 0.5


def test_a_checkpoint_of_a_gpu_goes_on_without_one(train, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        train("r", "--steps 1")
    train("r", "--resume")


# ---- precision ----


def test_kahan_follows_fp32_where_plain_bf16_stands_still():
    """200 AdamW steps at lr 1e-6 on weights around 0.02 with noisy gradients: a bf16 weight moves
    by 1e-4 or not at all, what Kahan's sum remembers beside it makes up the rest."""

    def train(dtype, **kahan):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.linspace(0.015, 0.03, 256).to(dtype))
        start = weight.detach().float().clone()
        make = optimi.AdamW if kahan else torch.optim.AdamW
        settings = dict(lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        optimizer = make([weight], **settings, **kahan)
        for _ in range(200):
            noise = 0.5 + torch.randn(256, generator=generator)
            weight.grad = (noise * 1e-3).to(dtype)
            optimizer.step()
        remembered = optimizer.state[weight]["kahan_comp"].float() if kahan else 0
        return weight.detach().float() + remembered - start

    exact, plain = train(torch.float32), train(torch.bfloat16)
    kahan = train(torch.bfloat16, kahan_sum=True)
    assert exact.abs().mean() > 5e-5 and not plain.any()
    assert (kahan - exact).norm() < 0.03 * exact.norm()


# ---- the command line ----


D_7B = dict(gamma=0.01, eta1=0.03, group_size=4, dynamic_sampling=True, mask_gradient="entropy")
D_7B |= dict(top_p=0.99, learning_rate=1e-6, gradient_checkpointing=True, algorithm="papo-d")
TOY_D = dict(gamma=0.1, aggregation="token", group_size=8, gradient_checkpointing=False)


@pytest.mark.parametrize(
    "flags, settings",
    [
        ("--preset papo-d-7b --group-size 4", D_7B),
        ("--algorithm papo-d --gamma 0.1", TOY_D | dict(out="runs/papo-d-gamma0.1-seed0")),
        ("--model x --gpu-memory 24 --lora 8", dict(lora=8, precision="bf16", group_size=5)),
        ("--preset papo-g-no-ref --algorithm papo-g", dict(algorithm="papo-g", beta=0)),
        ("--preset papo-g-no-ref", dict(algorithm="papo-g")),
        ("--preset grpo", dict(algorithm="grpo")),
        ("--preset dapo", dict(algorithm="dapo")),
        # An adapter's learning rate is ten times full fine-tuning's, unless one is given.
        ("--model x", dict(learning_rate=1e-6)),
        ("--model x --lora 8", dict(learning_rate=1e-5)),
        ("--model x --lora 8 --learning-rate 3e-6", dict(learning_rate=3e-6)),
        ("--model x --lora 8 --preset papo-g-3b", dict(learning_rate=1e-5)),
        ("--model x --gpu-memory 24", dict(learning_rate=1e-5)),
        ("--model x --gpu-memory 80", dict(learning_rate=1e-6)),
        ("--lora 8 --merge", dict(learning_rate=1e-3)),
    ],
)
def test_what_flags_set(flags, settings):
    """A preset, its published values; an algorithm, the embedded world's sizes without --model."""
    config, run = ts.parse_args(flags.split())
    found = {name: getattr(config, name, None) for name in settings}
    found |= {name: getattr(run, name) for name in settings if hasattr(run, name)}
    assert found == settings


def test_the_recipe_is_said_with_its_deviations():
    said = lambda flags: report.recipe_of(*ts.parse_args(flags.split()))
    changed = said("--preset papo-d-7b --group-size 4")
    assert changed.startswith("papo-d, gamma 0.01, beta 0, eta1 0.03, eta2 0.03")
    assert "group_size 5 -> 4" in changed
    assert said("--preset papo-g-3b").endswith("preset papo-g-3b as published")
    assert "learning_rate 1e-06 -> 1e-05" in said("--model x --lora 8 --preset papo-g-3b")


def test_help_shows_every_flag_once_and_both_spellings_are_read(capsys):
    with pytest.raises(SystemExit):
        ts.main(["--help"])
    shown = re.findall(r"^  --(\w+)", capsys.readouterr().out, re.M)
    names = [field.name for cls in (papo.PAPOConfig, ts.RunConfig) for field in fields(cls)]
    assert sorted(shown) == sorted([*names, "no_gradient_checkpointing"])
    for flag in ("--group-size", "--group_size"):
        assert ts.parse_args([flag, "3"])[0].group_size == 3
    for flags in ("--no-gradient-checkpointing", "--gradient_checkpointing False"):
        assert not ts.parse_args(["--model", "x", *flags.split()])[1].gradient_checkpointing


def test_without_a_network_a_hub_name_is_answered_at_once(one_folder, tmp_path):
    """Of a model and of a data set; what is in the hub's cache is still found. The hub here is a
    port nobody listens on."""
    cached = tmp_path / "home" / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(one_folder)
    code = """
import time, huggingface_hub, datasets, train_small as ts
from program.data import open_dataset
def ask(look, **name):
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    start, run = time.perf_counter(), ts.RunConfig(**name)
    try:
        look(run)
        print("found", end=" ")
    except ts.UserError as error:
        assert "is there a network?" in str(error)
    print(time.perf_counter() - start)
ask(ts.load_model, model="nobody/nothing")
ask(open_dataset, model="x", dataset="nobody/nothing")
ask(ts.load_model, model="some/model")
"""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    env = {**os.environ, **home, "HF_HUB_OFFLINE": "0"}
    how = dict(cwd=os.path.dirname(ts.__file__), stdout=subprocess.PIPE, text=True, check=True)
    run = subprocess.run([sys.executable, "-c", code], env=env, **how)
    model, dataset, known = run.stdout.splitlines()
    assert float(model) < 6 and float(dataset) < 6 and known.startswith("found ")


TEMPLATES = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "cut_off": "{% for m in messages %}{{ m['content']",
    "adds_text": "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
    "plain_text": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
}


@pytest.fixture(scope="module")
def models(one_folder, tmp_path_factory):
    """{name: folder} of models that cannot be used, and of one that can."""
    root = tmp_path_factory.mktemp("models")
    copy = lambda name: Path(shutil.copytree(one_folder, root / name))
    for name, template in TEMPLATES.items():
        (copy(name) / "chat_template.jinja").write_text(template)
    (copy("no_template") / "chat_template.jinja").unlink()
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (copy("empty") / "model.safetensors").unlink()
    tensors = load_file(Path(one_folder) / "model.safetensors")
    last = max(tensors)
    for name, changed in {
        "nan": tensors | {last: tensors[last] * float("nan")},
        "strange": tensors | {"model.language_model.norm.weight_scale_inv": torch.ones(2)},
        "lacking": {key: weight for key, weight in tensors.items() if key != last},
    }.items():
        save_file(changed, copy(name) / "model.safetensors", metadata={"format": "pt"})
    processor = AutoProcessor.from_pretrained(one_folder)
    processor.tokenizer.add_tokens(["<more>", "<tokens>"])
    processor.save_pretrained(copy("more_tokens"))
    sliding = dict(use_sliding_window=True, sliding_window=8)
    sliding |= dict(layer_types=["full_attention", "sliding_attention"])
    for name, file, change in (
        ("sliding", "config.json", lambda config: config["text_config"].update(sliding)),
        ("other", "config.json", lambda config: config.update(model_type="gpt2")),
        ("endless", "tokenizer_config.json", lambda config: config.update(eos_token=None)),
    ):
        path = copy(name) / file
        change(config := json.loads(path.read_text()))
        path.write_text(json.dumps(config))
    processor = toy.toy_processor("largest")
    for part in (toy.toy_model(processor), processor):
        part.save_pretrained(root / "largest")
    (root / "run" / "checkpoint").mkdir(parents=True)
    return {"folder": one_folder, **{path.name: str(path) for path in root.iterdir()}}


EMPTY = "preset out model dataset split image-column".split()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--gama 1", "unrecognized arguments: --gama"),
        ("--preset papo-x", "unknown preset"),
        ("--gamma -1", "gamma must lie in"),
        ("--gamma much", "invalid float"),
        ("--digits 0", "digits must be at least 1"),
        ("--digits 10", "digits must lie in"),
        ("--steps 0", "steps must be at least 1"),
        ("--algorithm ppo", "invalid choice"),
        ("--dataset x.parquet", "--dataset needs --model"),
        ("--merge", "--merge needs --lora"),
        ("--model {folder} --precision bf16", "loses most updates"),
        ("--precision bf16-kahan", "--precision, --gpu-memory need --model"),
        ("--gpu-memory 80", "--precision, --gpu-memory need --model"),
        ("--preset papo-d-3b --algorithm papo-g", "--preset papo-d-3b is not --algorithm papo-g"),
        ("--resume --eval-only", "--eval-only trains nothing"),
        ("--report-to excel", "invalid choice"),
        ("--model {nan}", "has NaN or infinite weights in 1 tensors"),
        ("--model {sliding}", "uses sliding-window attention"),
        ("--out {parquet}/run", "Not a directory"),
        ("--out {parquet}", "File exists"),
        ("--resume", "there is no run in runs/papo-g-gamma0.02-seed0"),
        ("--model ./nowhere", "no such folder"),
        ("--model nobody/nothing", "embedded world runs offline"),
        ("--model {folder} --dataset ./none.parquet", "no such file"),
        ("--model {folder} --dataset {parquet} --image-column x", "no column x; it has images"),
        ("--model {folder} --dataset {parquet} --max-prompt-tokens 3", "0 usable rows"),
        ("--model {folder} --dataset {parquet} --split test", "has no splits"),
        ("--model {folder} --dataset {parquet} --max-pixels 9", "max_pixels 9 is below"),
        ("--model {folder} --dataset {parquet} --task largest", "--task and --digits are of the"),
        ("--seed -1", "seed must lie in"),
        ("--algorithm grpo --gamma 0.1", "is --algorithm papo-g"),
        ("--preset grpo --gamma 3", "is --algorithm papo-g"),
        ("--lora 4", "--lora needs --model"),
        ("--split test", "--split needs --dataset"),
        ("--min-pixels 500", "--min-pixels needs --dataset"),
        ("--model {largest}", "answers --task largest, not --task sum"),
        ("--model {run}", "is a run; its model is"),
        ("--model {other}", "is a gpt2, no Qwen2-VL"),
        ("--model {empty}", "cannot be loaded"),
        ("--model {cut}", "cannot be loaded"),
        ("--model {lacking}", "lacks 1 weights"),
        ("--model {strange}", "1 weights that fit nowhere, such as model.language_model.norm.we"),
        ("--model {more_tokens}", "tokens, its embedding 3"),
        ("--model {endless}", "its tokenizer has no end token"),
        ("--model {raises}", "chat template cannot be used: roles must alternate"),
        ("--model {cut_off}", "chat template cannot be used"),
        ("--model {adds_text}", "chat template cannot be used"),
        ("--model {plain_text}", "chat template cannot be used"),
        ("--model {no_template}", "chat template"),
        *[(f"--{name}=", f"--{name} is empty") for name in EMPTY],
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags, says, models, parquet, refused, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "warm_start", lambda *_, **__: pytest.fail("the warm start began"))
    assert says in refused(flags.format(parquet=parquet, **models).split())
    assert not list(tmp_path.iterdir())


# ---- out of memory ----


def exhausted(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "where, flags, says",
    [
        ("papo_step", "", ("phase update", "--tokens-per-forward", "--max-new-tokens 6")),
        (
            "sample_and_grade",
            "--eval-only --prompts-per-sample 4",
            ("phase evaluate", "--prompts-per-sample 4"),
        ),
    ],
)
def test_running_out_of_memory_names_the_phase_and_the_flags(
    where, flags, says, train, capsys, monkeypatch
):
    monkeypatch.setattr(papo, where, exhausted)
    with pytest.raises(SystemExit) as stop:
        train("r", flags)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and all(text in message for text in says)


def test_a_model_too_large_for_the_gpu_is_explained_beside_the_estimate(
    train, tmp_path, capsys, monkeypatch
):
    """The estimate stands there before anything is moved to the GPU, and the folder is free
    again."""
    gpu = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.nn.Module, "to", exhausted)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", exhausted)
    for flags, says in (("", "phase load"), ("--eval-only", "phase evaluate")):
        with pytest.raises(SystemExit) as stop:
            train("r", flags)
        said, message = capsys.readouterr()
        assert stop.value.code == 2 and says in message.splitlines()[-1]
        assert not (tmp_path / "r").exists()
        assert ("GiB of the GPU's 24" in said) == (says == "phase load")


def test_peak_memory_is_known_where_unix_modules_are_missing(monkeypatch):
    """On Windows it is psutil's."""
    cpu = torch.device("cpu")
    assert 0.1 < memory.peak_memory(cpu) < 100
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=2**31))
    monkeypatch.setattr(memory.psutil, "Process", lambda: process)
    assert memory.peak_memory(cpu) == 2


# ---- the embedded world ----


def test_a_short_run_improves_the_policy(warm_start):
    """16 steps with a large gamma on the warm start: held-out accuracy rises by more than its
    noise."""
    config, run = ts.parse_args("--gamma 0.05 --eval-size 60".split())
    model, processor, rows, held_out = ts.load(run)  # its own copy, from the cache
    trainer = ts.Trainer(model, processor, config, run, rows)
    before = ts.summarise(ts.evaluate(model, processor, config, held_out))
    for _ in range(16):
        trainer.step()
    after = ts.summarise(ts.evaluate(model, processor, config, held_out))
    assert after["accuracy"] > before["accuracy"] + 0.05
    assert after["error_perception"] < before["error_perception"] - 0.05
