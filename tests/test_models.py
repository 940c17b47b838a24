"""program/model.py: what people call a model folder is loaded whole. What cannot be used is refused
in one line: test_train.py."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_processor, metrics, picture, random_responses, seeded
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoProcessor

import papo
import train_small as ts
from program import UserError
from program.model import load_model, load_processor


def load(folder, **flags):
    return load_model(ts.RunConfig(model=str(folder), **flags))


def scores(model, processor):
    responses = random_responses(processor, [3, 5])
    prompt = papo.encode_prompt(processor, "What?", picture(1))
    with torch.no_grad():
        return papo.group_logps(model.eval(), prompt, responses)[0]


def save_weights(file, weights):
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def adapter(train, folder):
    """An adapter on `folder` as a run leaves it, but far from zero: its folder."""
    adapter = train("run", "--lora 4 --steps 1 --eval-size 1", folder) / "checkpoint"
    weights, generator = load_file(adapter / "adapter_model.safetensors"), seeded()
    draw = lambda w: torch.randn(w.shape, generator=generator) / 4
    save_weights(adapter / "adapter_model.safetensors", {k: draw(w) for k, w in weights.items()})
    return adapter


def test_an_adapter_of_other_names_is_loaded_or_refused(adapter, folder):
    """Renamed as older versions named its layers it gives the very same scores; a key that fits
    nowhere, or one that is missing, is named."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    base, now = scores(*load(folder)), scores(*load(adapter, eval_only=True))
    assert (base - now).abs().max() > 0.1
    assert (scores(*load(adapter)) - now).abs().max() < 1e-4  # merged
    for old in ("model.", "", "language_model.", "language_model.model."):
        names = {
            key: key.replace("model.language_model.layers.", f"{old}layers.") for key in weights
        }
        assert all(key != names[key] for key in names)
        save_weights(file, {names[key]: w for key, w in weights.items()})
        assert torch.equal(scores(*load(adapter, eval_only=True)), now), old
    first, *others = weights
    for broken in ({"base_model.model.other.lora_A.weight": weights[first]}, {}):
        save_weights(file, {key: weights[key] for key in others} | broken)
        words = "[12] of its weights do not fit its base, such as base_model"
        with pytest.raises(UserError, match=words):
            load(adapter, eval_only=True)


def test_an_adapter_finds_its_base_again(train, folder, tmp_path, monkeypatch):
    """From any folder; and it is told from another base in its place."""
    monkeypatch.chdir(tmp_path)
    train("run", "--lora 4 --steps 1 --eval-size 1", "model")  # a relative path
    wanted = scores(*load("run/checkpoint", eval_only=True))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    adapter = Path("..") / "run" / "checkpoint"
    assert torch.equal(scores(*load(adapter, eval_only=True)), wanted)
    assert scores(*load(adapter, eval_only=True, precision="bf16")).isfinite().all()
    other = make_model("qwen2_5_vl", make_processor("qwen2_5_vl"))
    other.model.language_model.norm.weight.data[0] += 0.1
    other.save_pretrained(folder)
    here = re.escape(str(folder))
    with pytest.raises(UserError, match=f"adapts other weights than those of {here}"):
        load(adapter, eval_only=True)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"adapts {here}, which is not there"):
        load(adapter, eval_only=True)


def test_what_old_versions_left_behind_is_no_strange_weight(folder):
    file = folder / "model.safetensors"
    save_weights(file, load_file(file) | {"model.rotary_emb.inv_freq": torch.ones(2)})
    load(folder)


def test_dropout_is_off_in_the_update_too(train, folder, capsys):
    """With nothing masked and nothing trained the policy is its reference and its masked self."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["attention_dropout"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    [_, line] = metrics(train("run", "--steps 1 --learning-rate 1e-6 --mask-ratio 0", folder))
    assert "attention_dropout 0.3 of the model is switched off" in capsys.readouterr().out
    assert line["kl_ref"] < 1e-4 and line["kl_prcp"] < 1e-4


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
    opens, checkpoint = folder.with_name("thinking"), folder.with_name("checkpoint")
    plain.chat_template = plain.chat_template.replace("assistant\n", "assistant\n<think>\n")
    plain.save_pretrained(opens)
    assert as_tokens[0] == tokenizer.convert_tokens_to_ids("<think>") and as_tokens != wanted
    assert load_processor(opens).tokenizer.encode(text) == as_tokens
    assert "plain text" not in capsys.readouterr().out
    processor = load_processor(folder)
    assert "<think> is an untrained token" in capsys.readouterr().out
    processor.save_pretrained(checkpoint)
    for tokenizer in (processor.tokenizer, AutoProcessor.from_pretrained(checkpoint).tokenizer):
        assert tokenizer.encode(text) == wanted
        for ids in (wanted, as_tokens):
            said = tokenizer.decode(ids, skip_special_tokens=True)
            assert said == text.removesuffix("<|im_end|>") and papo.follows_format(said)
    prompt = papo.encode_prompt(processor, "What?", picture(1))["input_ids"]
    assert not set(as_tokens[:1]) & set(prompt[0].tolist())


def test_output_that_cannot_be_shown_is_replaced(train, monkeypatch):
    """Under an ASCII standard output a path in other letters is no traceback."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    out = train("größe", "--eval-only --max-samples 1")
    sys.stdout.flush()
    assert b"gr??e" in shown.getvalue() and (out / "eval.jsonl").exists()
