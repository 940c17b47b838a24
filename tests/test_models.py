"""program/model.py: what people call a model folder is loaded whole, or refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_processor, picture, random_responses
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoProcessor

import papo
import train_small as ts
from program import UserError
from program.model import load_model, load_processor

QUICK = (
    "--group-size 2 --prompts-per-batch 2 --updates-per-batch 2 --max-new-tokens 4 --eval-size 1"
)
QUICK = f"{QUICK} --min-pixels 4704 --max-pixels 15680 --steps 1".split()


@pytest.fixture
def folder(tmp_path):
    """A model folder of one's own, to be damaged."""
    processor = make_processor("qwen2_5_vl")
    for part in (make_model("qwen2_5_vl", processor), processor):
        part.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def rows(tmp_path):
    picture(1).save(tmp_path / "a.png")
    lines = [dict(images=["a.png"], problem="What?", answer="3")] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(tmp_path / "rows.jsonl")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def load(folder, **flags):
    return load_model(ts.RunConfig(model=str(folder), **flags))


def scores(model, processor):
    responses = random_responses(processor, [3, 5])
    prompt = papo.encode_prompt(processor, "What?", picture(1))
    with torch.no_grad():
        return papo.group_logps(model.eval(), prompt, responses)[0]


def lora_run(folder, rows, out):
    """An adapter as a run leaves it, but far from zero."""
    ts.main(["--model", str(folder), "--dataset", rows, "--lora", "4", "--out", str(out), *QUICK])
    file = out / "checkpoint" / "adapter_model.safetensors"
    weights = load_file(file)
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(w.shape, generator=generator) / 4 for name, w in weights.items()}
    save_file(drawn, file, metadata={"format": "pt"})
    return out / "checkpoint", file, drawn


def test_an_adapter_of_other_names_is_loaded_or_refused(folder, rows, tmp_path):
    """Renamed as older versions named its layers it gives the very same scores; a key that fits
    nowhere, or one that is missing, is named."""
    adapter, file, weights = lora_run(folder, rows, tmp_path / "run")
    base, now = scores(*load(folder)), scores(*load(adapter, eval_only=True))
    assert (base - now).abs().max() > 0.1
    assert (scores(*load(adapter)) - now).abs().max() < 1e-4  # merged
    for old in (
        "model.layers.",
        "layers.",
        "language_model.layers.",
        "language_model.model.layers.",
    ):
        names = {key: key.replace("model.language_model.layers.", old) for key in weights}
        assert all(key != names[key] for key in names)
        save_file({names[key]: w for key, w in weights.items()}, file, metadata={"format": "pt"})
        assert torch.equal(scores(*load(adapter, eval_only=True)), now), old
    first, *others = weights
    for broken in ({"base_model.model.other.lora_A.weight": weights[first]}, {}):
        save_file({key: weights[key] for key in others} | broken, file, metadata={"format": "pt"})
        with pytest.raises(
            UserError, match="[12] of its weights do not fit its base, such as base_model"
        ):
            load(adapter, eval_only=True)


def test_an_adapter_finds_its_base_again(folder, rows, tmp_path, monkeypatch):
    """From any folder; and it is told from another base in its place."""
    monkeypatch.chdir(tmp_path)
    adapter, *_ = lora_run("model", "rows.jsonl", Path("run"))
    wanted = scores(*load(adapter, eval_only=True))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapter = Path("..") / adapter
    assert torch.equal(scores(*load(adapter, eval_only=True)), wanted)
    assert torch.equal(
        scores(*load(adapter, eval_only=True, precision="bf16")).isfinite(), wanted.isfinite()
    )
    processor = make_processor("qwen2_5_vl")
    other = make_model("qwen2_5_vl", processor)
    other.model.language_model.norm.weight.data[0] += 0.1
    other.save_pretrained(folder)
    with pytest.raises(
        UserError, match=f"adapts other weights than those of {re.escape(str(folder))}"
    ):
        load(adapter, eval_only=True)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"adapts {re.escape(str(folder))}, which is not there"):
        load(adapter, eval_only=True)


def test_weights_that_fit_nowhere_are_refused(folder):
    """But for those that old versions left behind."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, fits in (
        ("model.rotary_emb.inv_freq", True),
        ("model.language_model.norm.weight_scale_inv", False),
    ):
        save_file({**weights, name: torch.ones(2)}, file, metadata={"format": "pt"})
        if fits:
            load(folder)
        else:
            with pytest.raises(UserError, match=f"1 weights that fit nowhere, such as {name}"):
                load(folder)


def test_dropout_is_off_in_the_update_too(folder, rows, tmp_path, capsys):
    """With nothing masked and nothing trained the policy is its reference and its masked self."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.3
    edit(folder / "config.json", **config)
    flags = ["--dataset", rows, "--out", str(tmp_path / "run"), *QUICK, "--mask-ratio", "0"]
    ts.main(["--model", str(folder), *flags])
    assert "attention_dropout 0.3 of the model is switched off" in capsys.readouterr().out
    [_, line] = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["kl_ref"] < 1e-4 and line["kl_prcp"] < 1e-4


TEMPLATES = {
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{% for m in messages %}{{ m['content']": "chat template cannot be used",
    "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}": "chat template cannot be used",
    "{% for m in messages %}{{ m['content'] }}{% endfor %}": "chat template cannot be used",
    "": "chat template",
}


@pytest.mark.parametrize(
    "template, reason",
    TEMPLATES.items(),
    ids=["raises", "cut off", "adds text", "plain text", "none"],
)
def test_a_chat_template_of_no_use_is_one_line(template, reason, folder, rows, capsys):
    """Before a row is decoded."""
    (folder / "chat_template.jinja").write_text(template) if template else (
        folder / "chat_template.jinja"
    ).unlink()
    with pytest.raises(SystemExit, match="2"):
        ts.main(["--model", str(folder), "--dataset", rows, "--out", str(folder / "run")])
    said, error = capsys.readouterr()
    assert (
        error.startswith("train_small.py: error: ") and reason in error and error.count("\n") == 1
    )
    assert not (folder / "run").exists() and "held-out" not in said


def test_a_tokenizer_that_does_not_fit_is_refused(folder):
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.add_tokens(["<more>", "<tokens>"])
    processor.save_pretrained(folder)
    with pytest.raises(UserError, match=r"its tokenizer has (\d+) tokens, its embedding \d+"):
        load(folder)
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(UserError, match="its tokenizer has no end token"):
        load(folder)


def test_tags_that_are_tokens_are_written_as_text(folder, capsys):
    """And read both ways: what is sampled in pieces, as a token, and what the format rule sees
    agree. Nothing else is encoded in another way; it stays so in a checkpoint. A template that
    opens <think> shows a model trained on the token: it is left alone."""
    plain = AutoProcessor.from_pretrained(folder)
    tokenizer, text = plain.tokenizer, r"<think> 1 + 1 </think> \boxed{2}<|im_end|>"
    wanted = tokenizer.encode(text)
    tags = [AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")]
    tokenizer.add_tokens(tags)
    as_tokens = tokenizer.encode(text)
    plain.save_pretrained(folder)
    opens = folder.with_name("thinking")
    plain.chat_template = plain.chat_template.replace("assistant\n", "assistant\n<think>\n")
    plain.save_pretrained(opens)
    assert as_tokens[0] == tokenizer.convert_tokens_to_ids("<think>") and as_tokens != wanted
    assert load_processor(opens).tokenizer.encode(text) == as_tokens
    assert "plain text" not in capsys.readouterr().out
    processor = load_processor(folder)
    assert "<think> is an untrained token" in capsys.readouterr().out
    processor.save_pretrained(folder.with_name("checkpoint"))
    for tokenizer in (
        processor.tokenizer,
        AutoProcessor.from_pretrained(folder.with_name("checkpoint")).tokenizer,
    ):
        assert tokenizer.encode(text) == wanted
        for ids in (wanted, as_tokens):
            said = tokenizer.decode(ids, skip_special_tokens=True)
            assert said == text.removesuffix("<|im_end|>") and papo.follows_format(said)
    prompt = papo.encode_prompt(processor, "What?", picture(1))["input_ids"]
    assert not set(as_tokens[:1]) & set(prompt[0].tolist())


def test_output_that_cannot_be_shown_is_replaced(folder, rows, tmp_path):
    """Under an ASCII standard output a path in other letters is no traceback."""
    out, environment = (
        tmp_path / "größe",
        {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    command = [
        sys.executable,
        "train_small.py",
        "--eval-only",
        "--model",
        str(folder),
        "--dataset",
        rows,
    ]
    command += ["--out", str(out), *QUICK[6:-2]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "gr??e" in done.stdout and (out / "eval.jsonl").exists(), (
        done.stderr
    )
