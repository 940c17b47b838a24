"""train_small.py: the program, on tiny model folders and local data sets of the published formats."""

import json
import os
import random
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from urllib.request import url2pathname

import datasets
import optimi
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, make_model, make_processor
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import papo
import toy
import train_small as ts

QUICK = (
    "--group-size 2 --prompts-per-batch 4 --updates-per-batch 2 --prompts-per-sample 4 --max-new-tokens 6 --eval-size 4 "
    "--eval-every 2 --learning-rate 1e-3 --min-pixels 4704 --max-pixels 15680"
).split()


def dots(count):
    """A drawn question: so many dots on grey."""
    image = Image.new("RGB", (84, 84), (90, 90, 90))
    for i in range(count):
        ImageDraw.Draw(image).ellipse(
            (5 + 26 * (i % 3), 5 + 26 * (i // 3), 25 + 26 * (i % 3), 25 + 26 * (i // 3)), (250, 200, 40)
        )
    return image


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    """64 drawn questions in the columns of the published data sets."""
    counts = [random.Random(i).randint(1, 9) for i in range(64)]
    rows = [
        {
            "images": [dots(n)],
            "problem": "<image>How many dots?" if n % 2 else "How many dots?",
            "answer": str(n),
        }
        for n in counts
    ]
    path = tmp_path_factory.mktemp("data") / "dots.parquet"
    features = datasets.Features(
        {
            "images": datasets.List(datasets.Image()),
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def folder(request, tmp_path_factory):
    """A model folder as a hub has it: weights, config, processor."""
    return make_folder(request.param, tmp_path_factory)


@pytest.fixture(scope="session")
def one_folder(tmp_path_factory):
    return make_folder("qwen2_5_vl", tmp_path_factory)


def make_folder(architecture, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / architecture
    processor = make_processor(architecture)
    make_model(architecture, processor).save_pretrained(path)
    processor.save_pretrained(path)
    return str(path)


@pytest.fixture
def trainers(monkeypatch):
    """The Trainers that the program makes, to look inside afterwards."""
    made = []
    monkeypatch.setattr(
        ts,
        "Trainer",
        type(
            "Spy",
            (ts.Trainer,),
            {"__init__": lambda self, *args: (super(type(self), self).__init__(*args), made.append(self))[0]},
        ),
    )
    return made


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# --- real models and data --------------------------------------------------------------------------------------------


def test_train_checkpoint_load_and_evaluate(folder, parquet, trainers, tmp_path, capsys):
    """The whole way for each architecture; the loaded checkpoint has the trained weights and says the same when greedy."""
    out = tmp_path / "run"
    ts.main(["--model", folder, "--dataset", parquet, "--steps", "2", "--out", str(out), *QUICK])
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "phases.json",
        "curves.png",
        "tokens.png",
        "samples.html",
        "checkpoint",
    }
    said, noise = capsys.readouterr()
    before, after = said.split("accuracy (avg@8)")
    words = [line.split()[0] for line in before.splitlines() if line.strip()]
    assert words == [*"model device data algorithm steps memory output held-out".split()]
    assert (
        f"{out}/" in before and "papo-g, gamma 0.02, beta 0.01" in before and "2 of 4 questions x 2" in before
    )
    paths = [url2pathname(word.removeprefix("file://")) for word in after.split() if word.startswith("file:")]
    assert len(paths) == 5 and all(os.path.isfile(path) for path in paths)
    bars = {line.split(":")[0] for line in noise.replace("\r", "\n").splitlines() if line.strip()}
    assert bars == {"checking held-out rows", "papo-g"}  # no library says anything
    lines = metrics(out)
    assert (
        [line["step"] for line in lines] == [0, 1, 2]
        and lines[1]["kl_prcp"] > 0
        and lines[2]["clip_high_fraction"] >= 0
    )

    trained = trainers[0].model.eval()
    loaded = AutoModelForImageTextToText.from_pretrained(out / "checkpoint")
    processor = AutoProcessor.from_pretrained(out / "checkpoint")
    before = AutoModelForImageTextToText.from_pretrained(folder)
    assert same(loaded, trained) and not same(loaded, before)
    prompt = papo.encode_prompt(processor, "How many dots?", dots(3))
    greedy = lambda model: papo.sample_groups(model, processor, [prompt], 1, 8, temperature=0)[0][0].tolist()
    assert greedy(loaded) == greedy(trained)

    card = (out / "checkpoint" / "README.md").read_text()
    assert card.startswith("---\n") and "PAPO-G" in card and "gamma: 0.02" in card
    assert str(tmp_path) not in card and folder not in card and parquet not in card
    ts.main(
        [
            "--eval-only",
            "--model",
            str(out / "checkpoint"),
            "--dataset",
            parquet,
            "--max-samples",
            "8",
            "--out",
            str(tmp_path / "eval"),
            *QUICK,
        ]
    )
    rows = [json.loads(line) for line in (tmp_path / "eval" / "eval.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and len(rows[0]["responses"]) == len(rows[0]["responses_masked"]) == ts.SAMPLES
    assert "gap" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["", "--lora 4 --precision bf16", "--precision bf16-kahan --freeze-vision"])
def test_a_resumed_run_is_the_same_run(flags, one_folder, parquet, tmp_path, trainers):
    """Four steps, and two steps resumed to four: the same metrics and weights to the bit."""
    arguments = ["--model", one_folder, "--dataset", parquet, *QUICK, *flags.split()]
    ts.main([*arguments, "--steps", "4", "--out", str(tmp_path / "whole")])
    ts.main([*arguments, "--steps", "2", "--out", str(tmp_path / "parts")])
    ts.main([*arguments, "--steps", "4", "--out", str(tmp_path / "parts"), "--resume"])
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")
    assert (
        same(trainers[0].model, trainers[2].model) and trainers[0].steps_done == trainers[2].steps_done == 4
    )


def test_a_gated_run_ends(one_folder, parquet, tmp_path):
    """Also where the responses of a question it shows are all right or all wrong: nothing is paid, but its mask is shown."""
    flags = ["--gated", "True", "--steps", "1", "--out", str(tmp_path / "run"), *QUICK]
    ts.main(["--model", one_folder, "--dataset", parquet, *flags])
    assert (tmp_path / "run" / "samples.html").exists()


def test_a_resumed_run_may_not_change_its_settings(one_folder, parquet, tmp_path, capsys):
    arguments = ["--model", one_folder, "--dataset", parquet, "--out", str(tmp_path / "r"), *QUICK]
    ts.main([*arguments, "--steps", "1"])
    with pytest.raises(SystemExit):
        ts.main([*arguments, "--steps", "2", "--gamma", "0.5", "--resume"])
    assert "gamma 0.02 -> 0.5" in capsys.readouterr().err


def test_lora_reference_is_the_model_without_its_adapter(one_folder, parquet, tmp_path, trainers):
    ts.main(
        [
            "--model",
            one_folder,
            "--dataset",
            parquet,
            "--steps",
            "2",
            "--lora",
            "4",
            "--out",
            str(tmp_path / "a"),
            *QUICK,
        ]
    )
    trainer, base = trainers[0], AutoModelForImageTextToText.from_pretrained(one_folder)
    prompt = papo.encode_prompt(trainer.processor, "How many dots?", dots(2))
    score = lambda model: papo.group_logps(model, prompt, [torch.tensor([60, 61, 62])])[0]
    with torch.no_grad(), trainer.reference() as reference:
        assert torch.allclose(score(reference), score(base), atol=1e-5)
    with torch.no_grad():
        adapted = score(trainer.model.eval())
        assert not torch.allclose(adapted, score(base), atol=1e-5)
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "a" / "checkpoint"
        )  # the adapter on its base
        assert torch.allclose(score(loaded), adapted, atol=1e-5)
    ts.main(
        [
            "--model",
            one_folder,
            "--dataset",
            parquet,
            "--steps",
            "2",
            "--lora",
            "4",
            "--merge",
            "--out",
            str(tmp_path / "b"),
            *QUICK,
        ]
    )
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "b" / "checkpoint")
    again, _ = ts.load_model(
        ts.RunConfig(model=str(tmp_path / "a" / "checkpoint"))
    )  # to train on: with the adapter merged
    with torch.no_grad():
        assert torch.allclose(score(again), adapted, atol=1e-4)
    assert not (tmp_path / "b" / "checkpoint" / "adapter_config.json").exists()
    with torch.no_grad():
        assert torch.allclose(score(merged), adapted, atol=1e-4)


def lora_run(folder, parquet, out, *flags):
    """Two steps of a LoRA run; its checkpoint."""
    ts.main(["--model", folder, "--dataset", parquet, "--steps", "2", "--out", str(out), *QUICK, *flags])
    return str(out / "checkpoint")


def test_an_adapter_on_an_adapter_is_refused_or_merged(one_folder, parquet, tmp_path, trainers, capsys):
    """Alone it would lack the first one; with --merge what is written is the model that was trained."""
    first = lora_run(one_folder, parquet, tmp_path / "a", "--lora", "4")
    with pytest.raises(SystemExit):
        lora_run(first, parquet, tmp_path / "b", "--lora", "4")
    assert "add --merge" in capsys.readouterr().err.strip().splitlines()[-1] and not (tmp_path / "b").exists()
    second = lora_run(first, parquet, tmp_path / "c", "--lora", "4", "--merge")
    trained, processor = trainers[-1].model.eval(), trainers[-1].processor
    prompt = papo.encode_prompt(processor, "How many dots?", dots(2))
    score = lambda model: papo.group_logps(model, prompt, [torch.tensor([60, 61, 62])])[0]
    with torch.no_grad():
        written = score(AutoModelForImageTextToText.from_pretrained(second))
        only_first = score(ts.load_model(ts.RunConfig(model=first))[0])
        assert torch.allclose(written, score(trained), atol=1e-4)
        assert not torch.allclose(written, only_first, atol=1e-4)


def test_training_on_an_adapter_needs_fp32(one_folder, parquet, tmp_path, capsys):
    """Merged into bf16 weights most of what it learned would be rounded away; as it was trained it can be evaluated."""
    first = lora_run(
        one_folder, parquet, tmp_path / "a", *"--lora 4 --precision bf16 --learning_rate 1e-5".split()
    )
    for flags in ("--lora 4 --merge --precision bf16", "--precision bf16-kahan", "--gpu-memory 24 --merge"):
        with pytest.raises(SystemExit):
            lora_run(first, parquet, tmp_path / "b", *flags.split())
        assert "add --precision fp32" in capsys.readouterr().err.strip().splitlines()[-1]
    ts.load_model(ts.RunConfig(model=first, precision="bf16", eval_only=True))


def test_merging_makes_no_second_model_on_the_device(one_folder, parquet, tmp_path, monkeypatch):
    """A parameter that deepcopy copies is copied where it lies: on a GPU, beside the original."""
    save = ts.Trainer.save

    def watched(*args):
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.Parameter,
                "__deepcopy__",
                lambda *_: pytest.fail("copied where it lies"),
                raising=True,
            )
            save(*args)

    monkeypatch.setattr(ts.Trainer, "save", watched)
    lora_run(one_folder, parquet, tmp_path / "a", "--lora", "4", "--merge")


def test_a_checkpoint_of_a_gpu_goes_on_without_one(one_folder, parquet, tmp_path, monkeypatch):
    arguments = ["--model", one_folder, "--dataset", parquet, "--out", str(tmp_path / "r"), *QUICK]
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        ts.main([*arguments, "--steps", "1"])
    ts.main([*arguments, "--steps", "2", "--resume"])


def test_all_weights_are_trained_on_from_an_adapter(one_folder, parquet, tmp_path, trainers):
    """peft leaves the base frozen when it merges; the merged weights are what the run starts from."""
    first = lora_run(one_folder, parquet, tmp_path / "a", "--lora", "4")
    start, _ = ts.load_model(ts.RunConfig(model=first))
    second = lora_run(first, parquet, tmp_path / "b")
    assert all(p.requires_grad for p in trainers[-1].model.parameters())
    assert not same(AutoModelForImageTextToText.from_pretrained(second), start)


def test_merging_keeps_what_was_trained_on_bf16_weights(one_folder, parquet, tmp_path, trainers):
    """Small updates, as lr 1e-6 makes them: the merged checkpoint differs from its base by all of them, bf16 keeps a part."""
    flags = "--lora 4 --merge --precision bf16 --learning-rate 1e-5".split()
    merged = AutoModelForImageTextToText.from_pretrained(
        lora_run(one_folder, parquet, tmp_path / "a", *flags)
    )
    weights, kept, rounded = dict(merged.named_parameters()), [], []
    for name, module in trainers[0].model.named_modules():
        if hasattr(module, "get_delta_weight"):
            base = module.base_layer.weight.detach()  # bf16
            delta = module.get_delta_weight("default").detach().float()
            kept.append((weights[f"{name}.weight"] - base.float() - delta).norm() / delta.norm())
            rounded.append(((base + delta).bfloat16().float() - base.float() - delta).norm() / delta.norm())
    assert len(kept) == 14 and merged.dtype == torch.float32
    assert max(kept) < 0.01 and min(rounded) > 0.5


def test_an_adapter_is_evaluated_as_it_was_trained(one_folder, parquet, tmp_path, trainers):
    """Beside its bf16 base, not merged into it: the same scores to the bit."""
    flags = "--lora 4 --precision bf16 --learning-rate 1e-4".split()
    adapter = lora_run(one_folder, parquet, tmp_path / "a", *flags)
    loaded, processor = ts.load_model(ts.RunConfig(model=adapter, precision="bf16", eval_only=True))
    trained, prompt = trainers[0].model.eval(), papo.encode_prompt(processor, "How many dots?", dots(2))
    score = lambda model: papo.group_logps(model, prompt, [torch.tensor([60, 61, 62])])[0]
    with torch.no_grad():
        assert torch.equal(score(loaded), score(trained))
    ts.main(
        [
            "--eval-only",
            "--model",
            adapter,
            "--dataset",
            parquet,
            "--max-samples",
            "2",
            "--out",
            str(tmp_path / "e"),
            *QUICK,
        ]
    )


def test_lora_has_a_learning_rate_of_its_own():
    """Ten times full fine-tuning's, unless one is given."""
    rate = lambda *flags: ts.parse_args(list(flags))[0].learning_rate
    assert rate("--model", "x") == 1e-6 and rate("--model", "x", "--lora", "8") == 1e-5
    assert rate("--lora", "8", "--merge") == 1e-3 == 10 * ts.TOY_SIZES["learning_rate"]
    assert (
        rate("--model", "x", "--gpu-memory", "24") == 1e-5
        and rate("--model", "x", "--gpu-memory", "80") == 1e-6
    )
    assert rate("--model", "x", "--lora", "8", "--learning-rate", "3e-6") == 3e-6
    assert rate("--model", "x", "--lora", "8", "--preset", "papo-g-3b") == 1e-5
    line = ts.recipe_of(*ts.parse_args(["--model", "x", "--lora", "8", "--preset", "papo-g-3b"]))
    assert "learning_rate 1e-06 -> 1e-05" in line


def test_a_preset_is_of_an_algorithm():
    """Every preset names the one whose recipe it is: the run, its table and its card say so."""
    for preset, algorithm in [
        ("papo-d-7b", "papo-d"),
        ("papo-g-no-ref", "papo-g"),
        ("grpo", "grpo"),
        ("dapo", "dapo"),
    ]:
        assert ts.parse_args(["--preset", preset])[1].algorithm == algorithm
        assert ts.parse_args(["--preset", preset, "--algorithm", algorithm])[1].algorithm == algorithm


def test_the_same_seed_gives_the_same_metrics(one_folder, parquet, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ts.main(
            [
                "--model",
                one_folder,
                "--dataset",
                parquet,
                "--steps",
                "2",
                "--seed",
                str(seed),
                "--out",
                str(tmp_path / name),
                *QUICK,
            ]
        )
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") != metrics(tmp_path / "c")


def test_data_set_formats_and_skipped_rows(one_folder, parquet, tmp_path, capsys):
    """parquet, jsonl with image paths, a folder and a saved data set give the same rows; unusable ones are counted by reason."""
    dots(3).save(tmp_path / "three.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "three.png").read_bytes()[:60])
    rows = [
        {"pic": "three.png", "q": "How many?", "a": 3},
        {"pic": ["three.png"], "q": "How <image> many?", "a": "3"},
        {"pic": "broken.png", "q": "?", "a": "1"},
        {"pic": [], "q": "?", "a": "1"},
        {"pic": "three.png", "q": "?", "a": " "},
        {"pic": ["three.png", "three.png"], "q": "?", "a": "1"},
        {"pic": "three.png", "q": "long " * 200, "a": "1"},
        {"pic": "three.png", "q": "", "a": "1"},
    ]
    for row in rows:
        row["pic"] = row["pic"] if isinstance(row["pic"], list) else [row["pic"]]
        row["a"] = str(row["a"])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = ts.RunConfig(
        model=one_folder,
        dataset=str(file),
        image_column="pic",
        problem_column="q",
        answer_column="a",
        max_prompt_tokens=150,
        min_pixels=4704,
        max_pixels=15680,
    )
    _, processor = ts.load_model(run)
    train, held_out = ts.load_rows(run, processor)
    assert len(train) == len(held_out) == 1
    assert train[0]["answer"] == held_out[0]["answer"] == "3" and train[0]["images"][0].size == (84, 84)
    said = capsys.readouterr().out
    for reason in (
        "unreadable image",
        "no image",
        "empty answer",
        "more than one image",
        "prompt longer than 150 tokens",
        "problem is no text",
    ):
        assert f"skipped 1 rows: {reason}" in said

    whole = datasets.load_dataset("parquet", data_files=parquet, split="train")
    whole.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    whole.to_parquet(tmp_path / "folder" / "train.parquet")
    answers = []
    for name in (parquet, str(tmp_path / "saved"), str(tmp_path / "folder")):
        run = ts.RunConfig(model=one_folder, dataset=name, max_samples=5)
        train, held_out = ts.load_rows(run, processor)
        assert len(held_out) == 1
        answers.append([rows[i]["answer"] for rows in (train, held_out) for i in range(len(rows))])
    assert answers[0] == answers[1] == answers[2] == whole["answer"][:5]
    with pytest.raises(ValueError, match="empty answer"):  # a missing number, as pandas writes it
        ts.read_row({"i": dots(1), "q": "?", "a": float("nan")}, ("i", "q", "a"), tmp_path)


@pytest.fixture
def files(tmp_path):
    """A jsonl of 40 rows, each with an image file of its own; the answer is the row's number. Every third image is damaged."""
    rows = []
    for i in range(40):
        path = tmp_path / f"{i}.png"
        dots(i % 9 + 1).save(path)
        if i % 3 == 0:
            path.write_bytes(path.read_bytes()[:60])
        rows.append({"images": path.name, "problem": "How many?", "answer": str(i)})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def open_rows(folder, file, **flags):
    run = ts.RunConfig(model=folder, dataset=str(file), min_pixels=4704, max_pixels=15680, **flags)
    return ts.load_rows(run, AutoProcessor.from_pretrained(folder))


def test_a_row_is_checked_when_it_is_drawn(one_folder, files, monkeypatch, capsys):
    """Before training only as many rows are encoded as are held out. The draws are the same from any place on, unusable rows are
    skipped and counted once however often they come."""
    encoded = []
    encode = ts.encode_prompt
    monkeypatch.setattr(ts, "encode_prompt", lambda *a: (encoded.append(a[1].count("?")), encode(*a))[1])
    rows, held_out = open_rows(one_folder, files, eval_size=6)
    assert len(encoded) == 6
    assert [int(held_out[i]["answer"]) for i in range(6)] == [31, 32, 34, 35, 37, 38]
    stream = ts.RowStream(rows, seed=0)
    places, answers = [0], []
    for _ in range(60):  # three epochs
        answers.append(int(next(stream)["answer"]))
        places.append(stream.count)
    usable = {i for i in range(31) if i % 3}
    for epoch in range(3):
        assert set(answers[20 * epoch : 20 * epoch + 20]) == usable
    assert answers[:20] != answers[20:40] != answers[40:]
    for behind in (1, 7, 20, 33):
        again = ts.RowStream(open_rows(one_folder, files, eval_size=6)[0], seed=0)
        again.count = places[behind]
        assert [int(next(again)["answer"]) for _ in range(9)] == answers[behind : behind + 9]
    capsys.readouterr()
    rows.say_skipped()
    assert capsys.readouterr().out.strip() == "skipped 11 rows: unreadable image"


def test_which_rows_are_held_out_does_not_depend_on_drawing(one_folder, files):
    _, before = open_rows(one_folder, files, eval_size=4)
    rows, held_out = open_rows(one_folder, files, eval_size=4)
    stream = ts.RowStream(rows, seed=3)
    drawn = {next(stream)["answer"] for _ in range(50)}
    assert held_out.indices == before.indices == [34, 35, 37, 38] and not drawn & {"34", "35", "37", "38"}


def test_an_image_that_goes_missing_during_a_run_is_skipped(one_folder, files, tmp_path, capsys):
    rows, _ = open_rows(one_folder, files, eval_size=4)
    stream = ts.RowStream(rows, seed=0)
    next(stream)
    for i in range(0, 34, 2):
        (tmp_path / f"{i}.png").unlink()
    epoch = [int(next(stream)["answer"]) for _ in range(30)]
    assert set(epoch[-11:]) <= {i for i in range(34) if i % 3 and i % 2}
    for i in range(34):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    with pytest.raises(
        ts.UserError, match="none of the 34 rows to train on is usable: {'unreadable image': 34}"
    ):
        next(stream)
    assert capsys.readouterr().out.count("skipping row") == 2  # one held out, one to train on


def test_images_of_a_server_are_asked_for_once(one_folder, tmp_path, capsys):
    """Each address answers its first request only, every third one with an error; an address may also be nonsense. The masked
    image is made from what was fetched, reduced to what the vision tower sees."""
    import http.server
    import io
    import threading

    big, asked = io.BytesIO(), []
    dots(5).resize((840, 840)).save(big, "PNG")

    class Once(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            again, bad = self.path in asked, int(self.path[1:]) % 3 == 0
            asked.append(self.path)
            self.send_response(404 if again or bad else 200)
            self.end_headers()
            self.wfile.write(b"gone" if again or bad else big.getvalue())

        log_message = lambda self, *_: None

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Once)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    dots(3).save(tmp_path / "three.png")
    urls = [f"http://127.0.0.1:{server.server_port}/{i}" for i in range(30)]
    urls += [f"s3://bucket/{i}.png" for i in range(4)] + [
        "data:image/png;base64,????",
        "three.png",
        "three.png",
    ]
    rows = [{"images": url, "problem": "How many?", "answer": "5"} for url in urls]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [*QUICK, "--eval_size", "2", "--steps", "3", "--out", str(tmp_path / "run")]
    ts.main(["--model", one_folder, "--dataset", str(file), *flags])
    said = capsys.readouterr().out
    assert len(asked) == len(set(asked)) > 12 and said.count("skipping row") == 1
    skipped = int(re.search(r"skipped (\d+) rows: unreadable image", said)[1])
    assert skipped > 3 and metrics(tmp_path / "run")[3]["kl_prcp"] > 0
    server.shutdown()
    rows, _ = open_rows(one_folder, file, eval_size=2)
    rows.dataset = [{"images": dots(5).resize((840, 840)), "problem": "How many?", "answer": "5"}]
    assert rows[0]["images"][0].size == (112, 112)


@pytest.mark.parametrize("ending", ["avif", "dds"])
def test_a_damaged_image_of_any_codec_is_skipped(ending, one_folder, tmp_path):
    """Some of Pillow's decoders raise a RuntimeError."""
    path = tmp_path / f"0.{ending}"
    dots(5).convert("RGBA").save(path)
    whole = bytearray(path.read_bytes())
    if ending == "dds":
        whole[80:88] = bytes(8)  # a pixel format that there is not
    else:
        whole[-200:] = bytes(200)
    path.write_bytes(whole)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"images": path.name, "problem": "?", "answer": "5"}) + "\n" for _ in range(4))
    )
    with pytest.raises(ts.UserError, match="unreadable image"):
        open_rows(one_folder, tmp_path / "rows.jsonl")


def test_evaluation_only_skips_and_counts(one_folder, files, tmp_path, capsys):
    small = "--min-pixels 4704 --max-pixels 15680 --max-new-tokens 2 --max-samples 5".split()
    out = tmp_path / "eval"
    ts.main(["--eval-only", "--model", one_folder, "--dataset", str(files), "--out", str(out), *small])
    lines = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == ["1", "2", "4"]
    assert "skipped 2 rows: unreadable image" in capsys.readouterr().out


def test_a_sliding_window_is_refused(one_folder, tmp_path, capsys):
    model = AutoModelForImageTextToText.from_pretrained(one_folder)
    model.config.text_config.layer_types = ["full_attention", "sliding_attention"]
    model.config.text_config.sliding_window = 8
    model.config.text_config.use_sliding_window = True
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(one_folder).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        ts.main(["--model", str(tmp_path / "model")])
    assert "uses sliding-window attention" in capsys.readouterr().err


# --- precision -------------------------------------------------------------------------------------------------------


def test_kahan_follows_fp32_where_plain_bf16_stands_still():
    """200 AdamW steps at lr 1e-6 on weights around 0.02 with noisy gradients: a bf16 weight moves by 1e-4 or not at all, what
    Kahan's sum remembers beside it makes up the rest."""

    def train(dtype, **kahan):
        generator = torch.Generator().manual_seed(0)
        weight = torch.nn.Parameter(torch.linspace(0.015, 0.03, 256).to(dtype))
        start = weight.detach().float().clone()
        make = optimi.AdamW if kahan else torch.optim.AdamW
        optimizer = make([weight], lr=1e-6, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, **kahan)
        for _ in range(200):
            weight.grad = ((0.5 + torch.randn(256, generator=generator)) * 1e-3).to(dtype)
            optimizer.step()
        remembered = optimizer.state[weight]["kahan_comp"].float() if kahan else 0
        return weight.detach().float() + remembered - start

    exact, plain, kahan = train(torch.float32), train(torch.bfloat16), train(torch.bfloat16, kahan_sum=True)
    assert exact.abs().mean() > 5e-5 and not plain.any()
    assert (kahan - exact).norm() < 0.03 * exact.norm()


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_preset_sets_the_published_values_and_reports_deviations():
    config, run = ts.parse_args(["--preset", "papo-d-7b", "--group-size", "4"])
    assert (config.gamma, config.eta1, config.learning_rate, config.group_size) == (0.01, 0.03, 1e-6, 4)
    assert config.dynamic_sampling and config.masked_grad == "entropy"
    line = ts.recipe_of(config, run)
    assert line.startswith("papo-d, gamma 0.01, beta 0, eta1 0.03, eta2 0.03") and "group_size 5 -> 4" in line
    assert ts.recipe_of(*ts.parse_args(["--preset", "papo-g-3b"])).endswith("preset papo-g-3b as published")
    config, run = ts.parse_args(["--algorithm", "papo-d", "--gamma", "0.1"])
    assert (
        config.gamma == 0.1
        and config.aggregation == "token"
        and config.group_size == ts.TOY_SIZES["group_size"]
    )
    assert ts.default_out(config, run) == "runs/papo-d-gamma0.1-seed0" and not run.gradient_checkpointing
    config, run = ts.parse_args(["--model", "x", "--gpu-memory", "24", "--lora", "8"])
    assert (run.lora, run.precision, config.group_size) == (8, "bf16", 5) and run.gradient_checkpointing


ALL_FIELDS = [field for cls in (papo.PAPOConfig, ts.RunConfig) for field in fields(cls)]


@pytest.fixture
def help_text(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        ts.main(["--help"])
    return capsys.readouterr().out


def test_help_shows_every_flag_once_in_its_group(help_text):
    """As it reads in a terminal of 80 columns: six groups of flags, each spelled with dashes."""
    grouped = [name for names in ts.GROUPS.values() for name in names.split()]
    assert sorted(grouped) == sorted(["help", *(field.name for field in ALL_FIELDS)])
    usage, _, *parts = help_text.split("\n\n")
    titles = "start here, algorithm, sampling and batches, data, model and memory, run".split(", ")
    assert len(usage.splitlines()) == 3 and [part.split(":")[0] for part in parts] == titles
    assert max(map(len, help_text.splitlines())) <= 80
    for title, part in zip(titles, parts):
        shown = re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", part, re.M)
        assert sorted(shown) == sorted(ts.GROUPS[title].replace("_", "-").split())
    assert not re.search(r"--\w+_|\bNone\b", help_text)


def test_help_shows_the_defaults_that_hold(help_text):
    """What it says is what an empty command line gives, one with a --model, and one with each --algorithm."""
    commands = {"embedded world": [], "default": ["--model", "x"]}
    commands |= {name: ["--model", "x", "--algorithm", name] for name in ts.ALGORITHMS}
    given = {
        who: {k: v for c in ts.parse_args(argv) for k, v in vars(c).items()} for who, argv in commands.items()
    }
    shown = {}
    for block in re.split(r"\n  (?=--)", help_text)[1:]:
        text = " ".join(block.split("\n\n")[0].split())
        name = text.split()[0].strip("-").replace("-", "_")
        shown[name] = text[text.index("(default: ") + 10 :].removesuffix(")").split("; ")
    for field in ALL_FIELDS:
        default, *others = shown[field.name]
        said = dict(part.rsplit(" ", 1) for part in others)
        for who in commands:
            claim, value = said.get(who, default), given[who][field.name]
            if field.name not in ("model", "algorithm") and (field.default is not None or who in said):
                assert claim == str(value) or float(claim) == value, (field.name, who)
    assert shown["steps"] == ["two epochs, as published", "embedded world 40"]
    assert shown["gamma"] == ["0.02", "grpo 0", "dapo 0", "papo-d 0.01"]
    assert shown["group_size"] == ["5", "embedded world 8"] and shown["lora"] == ["none"]


def test_both_spellings_of_a_flag_are_read_and_errors_name_the_one_with_dashes(capsys):
    for flag in ("--group-size", "--group_size"):
        assert ts.parse_args([flag, "3"])[0].group_size == 3
        with pytest.raises(ts.UserError, match="argument --group-size: invalid int"):
            ts.parse_args([flag, "many"])
    for flags in (
        "--no-gradient-checkpointing",
        "--no_gradient_checkpointing",
        "--gradient-checkpointing False",
    ):
        assert not ts.parse_args(["--model", "x", *flags.split()])[1].gradient_checkpointing
    code = "".join(Path(path).read_text() for path in (ts.__file__, papo.__file__))
    assert not re.findall(r"--[a-z]+_\w+", code)


def test_without_a_network_a_hub_name_is_answered_at_once(one_folder, tmp_path):
    """Of a model and of a data set; what is in the hub's cache is still found. The hub here is a port nobody listens on."""
    cached = tmp_path / "home" / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    (cached / "snapshots" / ("0" * 40)).symlink_to(one_folder)
    code = """
import time, huggingface_hub, datasets, train_small as ts
def ask(look, name):
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = False
    start = time.perf_counter()
    try:
        look(name)
        print("found", end=" ")
    except ts.UserError as error:
        assert "is there a network?" in str(error)
    print(time.perf_counter() - start)
ask(lambda name: ts.load_model(ts.RunConfig(model=name)), "nobody/nothing")
ask(lambda name: ts.open_dataset(name, "train"), "nobody/nothing")
ask(lambda name: ts.load_model(ts.RunConfig(model=name)), "some/model")
"""
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(ts.__file__).parent,
        env={**os.environ, **home},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    model, dataset, known = run.stdout.splitlines()
    assert float(model) < 6 and float(dataset) < 6 and known.startswith("found ")


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--gama 1", "unrecognized arguments: --gama"),
        ("--preset papo-x", "unknown preset"),
        ("--gamma -1", "gamma must lie in"),
        ("--gamma much", "invalid float"),
        ("--gamma nan", "gamma must lie in"),
        ("--mask-ratio 1.5", "mask_ratio must lie in"),
        ("--group-size 1", "group_size must lie in"),
        ("--digits 0", "digits must lie in"),
        ("--steps 0", "steps must be at least 1"),
        ("--algorithm ppo", "invalid choice"),
        ("--dataset x.parquet", "--dataset needs --model"),
        ("--merge", "--merge needs --lora"),
        ("--model {folder} --precision bf16", "lose most updates"),
        ("--precision bf16-kahan", "need --model: the embedded world"),
        ("--gpu-memory 80", "--gpu-memory which sets it, need --model"),
        ("--preset papo-d-3b --algorithm grpo", "--preset papo-d-3b is not --algorithm grpo"),
        ("--preset papo-d-3b --algorithm papo-g", "--preset papo-d-3b is not --algorithm papo-g"),
        ("--resume --eval-only", "give one of them"),
        ("--report-to excel", "invalid choice"),
        ("--model {nan}", "has NaN or infinite weights in 1 tensors"),
        ("--out {parquet}/run", "Not a directory"),
        *(
            (f"--{name}=", f"--{name} is empty")
            for name in "preset out model dataset split image-column".split()
        ),
        ("--resume", "there is no"),
        ("--model ./nowhere", "no such folder"),
        ("--model nobody/nothing", "embedded world runs offline"),
        ("--model {folder} --dataset ./none.parquet", "no such file"),
        (
            "--model {folder} --dataset {parquet} --image-column pics",
            "no column pics; it has images, problem, answer",
        ),
        ("--model {folder} --dataset {parquet} --max-prompt-tokens 3", "0 usable rows"),
        ("--seed -1", "seed must lie in"),
        ("--model {folder} --dataset {parquet} --split test", "has no splits"),
        ("--algorithm grpo --gamma 0.1", "it is --algorithm papo-g"),
        ("--preset grpo --gamma 3", "it is --algorithm papo-g"),
        ("--lora 4", "--lora needs --model"),
        ("--split test", "--split needs --dataset"),
        ("--min-pixels 500", "--min-pixels needs --dataset"),
        ("--model {folder} --dataset {parquet} --task largest", "--task is of the embedded world"),
        ("--model {largest}", "answers --task largest, not --task sum"),
        ("--model {run}", "is a run; its model is"),
        ("--out {parquet}", "is a file"),
        ("--model {other}", "is a gpt2; supported are qwen2_vl"),
        ("--model {empty}", "cannot be loaded"),
        ("--model {cut}", "cannot be loaded"),
        ("--model {lacking}", "lacks 1 weights"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    flags, says, one_folder, parquet, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "warm_start", lambda *_, **__: pytest.fail("the warm start began"))
    import pathlib
    import shutil

    import safetensors.torch

    for name in ("cut", "empty", "lacking", "nan"):
        shutil.copytree(one_folder, tmp_path / "models" / name)
    weights = tmp_path / "models" / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "models" / "empty" / "model.safetensors").unlink()
    weights = tmp_path / "models" / "lacking" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors.pop(max(tensors))
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    weights = tmp_path / "models" / "nan" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    tensors[max(tensors)].view(-1)[-1] = float("nan")
    safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    processor = toy.toy_processor("largest")
    for part in (toy.toy_model(processor), processor):
        part.save_pretrained(tmp_path / "models" / "largest")
    (tmp_path / "models" / "other").mkdir()
    (tmp_path / "models" / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "models" / "run" / "checkpoint").mkdir(parents=True)
    names = {name: str(path) for name, path in ((p.name, p) for p in (tmp_path / "models").iterdir())}
    with pytest.raises(SystemExit) as stop:
        ts.main(flags.format(folder=one_folder, parquet=parquet, **names).split())
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and says in message and message.startswith("train_small.py: error:")
    assert [p.name for p in pathlib.Path(tmp_path).iterdir()] == ["models"]


def test_running_out_of_memory_names_the_phase_and_the_flags(
    one_folder, parquet, tmp_path, capsys, monkeypatch
):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ts, "papo_step", exhausted)
    with pytest.raises(SystemExit):
        ts.main(
            [
                "--model",
                one_folder,
                "--dataset",
                parquet,
                "--steps",
                "1",
                "--out",
                str(tmp_path / "r"),
                *QUICK,
            ]
        )
    said, message = capsys.readouterr()
    assert re.search(r"memory +estimated \d+\.\d GiB of the (GPU|machine)'s \d+", said)
    assert "phase update" in message and "--tokens-per-forward" in message and "max_new_tokens 6" in message


def test_a_model_too_large_for_the_gpu_is_explained_beside_the_estimate(
    one_folder, parquet, tmp_path, capsys, monkeypatch
):
    """The estimate stands there before anything is moved to the GPU, and the folder is free again."""

    def exhausted(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"total_memory": 24 * 2**30})
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.nn.Module, "to", exhausted)
    monkeypatch.setattr(transformers.PreTrainedModel, "to", exhausted)
    arguments = ["--model", one_folder, "--dataset", parquet, "--out", str(tmp_path / "r"), *QUICK]
    for flags, says in ((["--steps", "1"], "phase load"), (["--eval_only"], "phase evaluate")):
        with pytest.raises(SystemExit) as stop:
            ts.main([*arguments, *flags])
        said, message = capsys.readouterr()
        assert stop.value.code == 2 and says in message.splitlines()[-1] and not (tmp_path / "r").exists()
        assert ("GiB of the GPU's 24" in said) == (says == "phase load")


def test_evaluation_only_explains_running_out_of_memory(one_folder, parquet, tmp_path, capsys, monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ts, "sample_and_grade", exhausted)
    flags = ["--eval-only", "--model", one_folder, "--dataset", parquet, "--max-samples", "2"]
    with pytest.raises(SystemExit) as stop:
        ts.main([*flags, "--out", str(tmp_path / "r")])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "phase evaluate" in message and "lower --prompts-per-sample" in message
    assert "checkpoint" not in message and not (tmp_path / "r").exists()


# --- the embedded world ----------------------------------------------------------------------------------------------


def test_a_short_run_improves_the_policy(warm_start):
    """20 steps with a large gamma on the warm start: held-out accuracy rises by more than its noise."""
    config = papo.PAPOConfig(
        gamma=0.05, **{name: value for name, value in ts.TOY_SIZES.items() if hasattr(papo.PAPOConfig, name)}
    )
    run = ts.RunConfig(gradient_checkpointing=False, eval_size=60)
    model, processor, rows, held_out = ts.load(run)  # its own copy, from the cache
    trainer = ts.Trainer(model, processor, config, run, rows)
    before = ts.summarise(ts.evaluate(model, processor, config, held_out))
    for _ in range(20):
        trainer.step()
    after = ts.summarise(ts.evaluate(model, processor, config, held_out))
    assert after["accuracy"] > before["accuracy"] + 0.05
    assert after["error_perception"] < before["error_perception"] - 0.05


def test_the_readme_is_about_this_code():
    """Every line it tells to change is in papo.py, every test it names exists, both commands are complete."""
    from pathlib import Path

    root = Path(__file__).parent.parent
    readme, code = (root / "README.md").read_text(), (root / "papo.py").read_text()
    table = readme.split("| to change |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(table) >= 8
    for line in table:
        assert line.split("| `")[-1].removesuffix("` |") in code, line
    tests = "".join(path.read_text() for path in (root / "tests").glob("*.py"))
    for name in set(re.findall(r"`(test_\w+)`", readme)):
        assert f"def {name}(" in tests, name
    for command in ("python train_small.py --gamma 0.02", "python -m pytest"):
        assert f"    pip install -r requirements.txt && {command}\n" in readme
