"""The embedded world: what questions promise, how errors are named, what the warm start leaves."""

import inspect
import os
import random

import numpy as np
import pytest
import torch
from conftest import same_weights
from datasets import List
from safetensors.torch import load_file, save
from transformers import AutoModelForImageTextToText, AutoProcessor

import papo
import toy

SHORT = toy.WarmStart(short_stages=((1, 2),), clean_steps=1, guess_steps=1, batch_size=4)


@pytest.fixture(scope="session")
def processor():
    return toy.toy_processor()


def cache_file(folder):
    [file] = folder.iterdir()  # no half-written draft is left either
    return file


def test_splits_share_no_handwritten_digit():
    pools = {split: toy._digit_pool(split) for split in toy.SPLITS}
    assert sum(len(labels) for _, labels in pools.values()) == 1797  # together they use each once
    for split, (_, labels) in pools.items():
        shares = np.bincount(labels, minlength=10) / len(labels)
        assert shares.min() > 0.08 and shares.max() < 0.12, (split, shares)
    seen = [{image.tobytes() for image in images} for images, _ in pools.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_dataset_has_the_columns_of_the_real_ones_and_repeats_by_seed():
    rows = toy.toy_dataset("train", 30, seed=3)
    assert isinstance(rows.features["images"], List)
    again, other = toy.toy_dataset("train", 30, seed=3), toy.toy_dataset("train", 30, seed=4)
    for a, b in zip(rows, again, strict=True):
        assert a["images"][0].tobytes() == b["images"][0].tobytes()
        assert {k: a[k] for k in a if k != "images"} == {k: b[k] for k in b if k != "images"}
    assert rows["digits"] != other["digits"]
    assert rows["dependency"] == ["high", "medium", "low"] * 10


@pytest.mark.parametrize("digits", [1, 2, 4, 5, 9])
def test_text_states_what_the_dependency_says(digits):
    for row in toy.toy_dataset("validation", 60, digits=digits):
        image = row["images"][0]
        assert image.size == (28 * digits, 28) and image.mode == "RGB"
        assert row["answer"] == str(sum(row["digits"])) and row["problem"].count("<image>") == 1
        stated, half = sum(map(str.isdigit, row["problem"])), [digits // 2, (digits + 1) // 2]
        assert stated in {"high": [0], "medium": half, "low": [digits]}[row["dependency"]]
        if stated:  # each in its place
            places = row["problem"].split(" are ")[1].split(". ")[0].split(" ")
            assert all(x in ("_", str(y)) for x, y in zip(places, row["digits"], strict=True))


WRONG = [({"digits": digits}, "from 1 to 9") for digits in (0, 10, -1, 2.0, "4", True)]
WRONG += [({"task": task}, "task is one of sum, largest") for task in ("product", "")]


@pytest.mark.parametrize("given, message", WRONG)
def test_what_cannot_be_asked_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy.toy_dataset("train", 1, **given)
    with pytest.raises(ValueError, match=message):
        toy.warm_start(cache_dir=tmp_path, **given)
    with pytest.raises(ValueError, match="warm, train, validation, test"):
        toy.toy_dataset("tests", 1)


# kind: what is seen, worked out and boxed of a picture of 3 0 9 4; | stands for "</think> \\boxed".
SUMS = """
right          3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. | 16
right          3 0 8 5. 3 + 0 = 3, 3 + 8 = 11, 11 + 5 = 16. | 16 by luck
perception     3 0 9 5. 3 + 0 = 3, 3 + 9 = 12, 12 + 5 = 17. | 17
perception     3 0 9. 3 + 0 = 3, 3 + 9 = 12. | 12 overlooks one
perception     3 0 9 5. 3 + 0 = 4, 7 + 9 = 1, 1 + 5 = 6. | 7 the first cause wins
reasoning      3 0 9 4. 3 + 0 = 3, 3 + 8 = 11, 11 + 4 = 15. | 15
reasoning      3 0 9 4. 3 + 0 = 3, 3 + 9 = 12. | 12 leaves one out
reasoning      3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 13 + 4 = 17. | 17 carries a wrong sum on
calculation    3 0 9 4. 3 + 0 = 3, 3 + 9 = 13, 13 + 4 = 17. | 17
inconsistency  3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. | 61
unreadable     3 0 9 4. 3 + 0 = 3, 3 + = 12. | 12
"""
LARGEST = """
right          3 0 9 4. max(3, 0) = 3, max(3, 9) = 9, max(9, 4) = 9. | 9
right          9 9 1 1. max(9, 9) = 9, max(9, 1) = 9, max(9, 1) = 9. | 9 by luck
perception     3 0 7 4. max(3, 0) = 3, max(3, 7) = 7, max(7, 4) = 7. | 7
reasoning      3 0 9 4. max(3, 0) = 3, max(3, 4) = 4. | 4
calculation    3 0 9 4. max(3, 0) = 3, max(3, 9) = 3, max(3, 4) = 4. | 4
inconsistency  3 0 9 4. max(3, 0) = 3, max(3, 9) = 9, max(9, 4) = 9. | 4
unreadable     3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. | 16
"""


@pytest.mark.parametrize("task, answer, table", [("sum", "16", SUMS), ("largest", "9", LARGEST)])
def test_error_type(task, answer, table):
    row = {"digits": [3, 0, 9, 4], "answer": answer, "task": task}
    for line in table.strip().splitlines():
        kind, said = line.split(maxsplit=1)
        trace, box = said.split(" | ")
        response = f"<think> I see {trace} </think> \\boxed{{{box.split()[0]}}}"
        assert toy.error_type(response, row) == (None if kind == "right" else kind), line
        if kind != "right":
            assert toy.error_type(response.split("\\boxed")[0], row) == "unreadable"  # no box
    assert toy.error_type("", row) == "unreadable"
    assert toy.error_type(f"no idea \\boxed{{{answer}}}", row) is None
    one = {"digits": [7], "answer": "7", "task": task}
    assert toy.error_type(toy._trace([7], task), one) is None
    assert toy.error_type(toy._trace([1], task), one) == "perception"
    assert toy.error_type("<think> I see 7. </think> \\boxed{1}", one) == "inconsistency"


def test_both_tasks_ask_about_the_same_pictures_and_a_true_trace_is_right():
    pairs = (toy.toy_dataset("test", 30, digits=5, task=task) for task in ("sum", "largest"))
    for one, other in zip(*pairs, strict=True):
        assert one["images"][0].tobytes() == other["images"][0].tobytes()
        assert one["digits"] == other["digits"] and one["problem"] != other["problem"]
        for row, answer in ((one, sum), (other, max)):
            trace = toy._trace(row["digits"], row["task"])
            assert row["answer"] == str(answer(row["digits"]))
            assert toy.error_type(trace, row) is None and toy.perceived(trace, row)


def test_digits_are_single_tokens_and_text_survives(processor):
    tokenizer = processor.tokenizer
    odd = "Schöne neue \\frac{1}{2} Welt \U0001f600\n"
    for text in ("12 + 304 = 316", toy._trace([3, 0, 9, 4], "sum"), odd):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([token]) for token in ids]
        alone = [piece for piece in pieces if any(map(str.isdigit, piece))]
        assert alone == [character for character in text if character.isdigit()]


def test_processor_and_model_survive_saving(processor, tmp_path):
    for part in (model := toy.toy_model(processor), processor):
        part.save_pretrained(tmp_path)
    assert 500_000 < sum(weight.numel() for weight in model.parameters()) < 700_000
    loaded = AutoProcessor.from_pretrained(tmp_path)
    reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(loaded) is type(processor) and type(reloaded) is type(model)
    assert same_weights(model, reloaded) and reloaded.dtype == torch.float32
    ends = loaded.tokenizer.eos_token, loaded.tokenizer.pad_token
    assert ends == ("<|im_end|>", "<|endoftext|>")
    assert reloaded.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    for row in toy.toy_dataset("test", 3):
        encode = lambda processor: papo.encode_prompt(processor, row["problem"], row["images"])
        before, after = encode(processor), encode(loaded)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("digits", [1, 4, 9])
def test_training_sees_the_very_prompt_that_rl_sees(processor, digits):
    rows = toy.toy_dataset("validation", 6, digits=digits)
    texts = toy._prompt_texts(processor, rows["problem"], digits)
    picks = np.arange(6 * digits).reshape(6, digits)
    pictures = [np.asarray(row["images"][0])[:, :, 0] for row in rows]
    pool = np.concatenate([x.reshape(28, digits, 28).swapaxes(0, 1) for x in pictures])
    images = toy._images(pool, picks, 0, np.random.default_rng(0))
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].chunk(6)
    for row, text, patches in zip(rows, texts, pixels, strict=True):
        prompt = papo.encode_prompt(processor, row["problem"], row["images"][0])
        assert processor.tokenizer(text)["input_ids"] == prompt["input_ids"][0].tolist()
        assert torch.equal(patches, prompt["pixel_values"])


def test_only_the_response_is_learned_and_phase_two_invents_the_unstated_digits_only(processor):
    recipe, decode = toy.WarmStart(batch_size=200), processor.tokenizer.decode
    pool, rng = toy._digit_pool("warm"), np.random.default_rng(0)
    inputs, targets = toy._make_batch(processor, *pool, 4, 1.0, recipe, rng)
    for ids, wanted in zip(inputs["input_ids"], targets, strict=True):
        response, prompt = wanted[wanted != -100], decode(ids[wanted == -100])
        assert torch.equal(ids[wanted != -100], response)
        assert response[-1] == processor.tokenizer.eos_token_id
        assert (ids == processor.image_token_id).sum() == 4
        said = toy._patterns("sum")[0].fullmatch(decode(response[:-1]))[1].split(" ")
        if " are " in prompt:
            places = prompt.split("The digits are ")[1].split(".")[0].split(" ")
            assert all(place in ("_", digit) for place, digit in zip(places, said, strict=True))


@pytest.mark.parametrize("digits", [1, 4])
def test_one_rows_positions_without_a_mask_suffice(processor, digits, monkeypatch):
    """A step of warm start against the stock forward with a padding mask and token types: the same
    hidden states where the loss is taken."""
    model, compared = toy.toy_model(processor), []

    def both(**inputs):
        ids = inputs["input_ids"]
        real = ids != processor.tokenizer.pad_token_id
        assert not real.all()  # some rows are padded
        short, types = forward(**inputs), (ids == processor.image_token_id).int()
        inputs |= dict(attention_mask=real.long(), mm_token_type_ids=types, position_ids=None)
        ours, theirs = (out.last_hidden_state[real] for out in (short, forward(**inputs)))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        compared.append(len(ids))
        return short

    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", both)
    toy._supervise(model, processor, digits, 0, toy.WarmStart((), 2, guess_steps=1, batch_size=8))
    assert compared == [8] * 3


def test_warm_start_repeats_by_seed_is_cached_and_leaves_random_states(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "a"))
    states = lambda: [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()]
    before = states()
    one, _ = toy.warm_start(seed=1, recipe=SHORT)
    assert states() == before and not one.training and one.model.rope_deltas is None
    torch.manual_seed(8)  # which decides nothing
    assert not same_weights(*(toy.toy_model(toy.toy_processor(), seed) for seed in (1, 2)))
    two, _ = toy.warm_start(seed=1, cache_dir=tmp_path / "b", recipe=SHORT)
    other, _ = toy.warm_start(seed=2, cache_dir=tmp_path / "b", recipe=SHORT)
    assert same_weights(one, two) and not same_weights(one, other)
    cache_file(tmp_path / "a")
    monkeypatch.setattr(toy, "tqdm", lambda *_, **__: pytest.fail("trains despite a good cache"))
    assert same_weights(one, toy.warm_start(seed=1, recipe=SHORT)[0])


def test_a_bad_cache_file_is_rebuilt(tmp_path, processor):
    good, _ = toy.warm_start(digits=1, cache_dir=tmp_path, recipe=SHORT)
    path = cache_file(tmp_path)
    whole, tensors = path.read_bytes(), load_file(path)
    key = toy._cache_key(processor, toy.toy_model(processor), 1, 0, SHORT)
    zeros = {name: torch.zeros_like(x) for name, x in tensors.items()}
    first = next(name for name in tensors if tensors[name].dim() == 2)
    keyed = lambda tensors: save(tensors, {"key": key})
    harms = {
        "truncated": whole[:-1000],
        "garbage": os.urandom(5000),
        "empty": b"",
        "foreign key": save(zeros, {"key": "f" * 64}),
        "no key": save(zeros),
        "wrong shape": keyed(tensors | {first: tensors[first].T.contiguous()[:-1]}),
        "wrong dtype": keyed({name: x.half() for name, x in tensors.items()}),
        "missing tensor": keyed(dict(list(tensors.items())[1:])),
        "strange tensor": keyed(tensors | {"stranger": torch.zeros(1)}),
    }
    for name, data in harms.items():
        path.write_bytes(data)
        rebuilt, _ = toy.warm_start(digits=1, cache_dir=tmp_path, recipe=SHORT)
        assert same_weights(good, rebuilt), name
        assert toy._load_cached(cache_file(tmp_path), key, toy.toy_model(processor)), name


def test_every_ingredient_changes_the_key(processor, monkeypatch):
    model, keys = toy.toy_model(processor), []
    add = lambda *given: keys.append(toy._cache_key(processor, model, *given))
    for given in ((4, 0, SHORT), (3, 0, SHORT), (4, 1, SHORT), (4, 0, toy.WarmStart())):
        add(*given)
    changes = [(toy, "SPLITS", toy.SPLITS | {"warm": 0.4}), (papo, "PROMPT_SUFFIX", " Answer.")]
    changes += [(torch, "__version__", "0.0"), (model.config.text_config, "rms_norm_eps", 0.1)]
    for change in changes:
        monkeypatch.setattr(*change)
        toy._prompt_shell.cache_clear()
        add(4, 0, SHORT)
    toy._prompt_shell.cache_clear()
    keys.append(toy._cache_key(toy.toy_processor("largest"), model, 4, 0, SHORT))
    assert len(set(keys)) == len(keys)


def test_the_key_follows_the_code_not_its_looks(processor, monkeypatch):
    """Comments, empty lines and docstrings may change; a statement more makes another key."""
    model, source = toy.toy_model(processor), inspect.getsource

    def key(change, name=None):
        text = lambda code: change(source(code)) if name in (None, code.__name__) else source(code)
        monkeypatch.setattr(inspect, "getsource", text)
        return toy._cache_key(processor, model, 4, 0, SHORT)

    same = key(lambda text: text)
    assert (
        key(lambda text: text.replace('"""', '"""Other words. ', 1) + "\n    # A remark\n") == same
    )
    for name in ("_digit_pool", "_trace", "_images", "_make_batch", "_supervise", "toy_model"):
        assert key(lambda text: text + "    pass\n", name) != same, name


def test_the_policy_adds_and_copies_but_guesses_what_it_should_see(warm_start):
    model, processor = warm_start
    rows = list(toy.toy_dataset("validation", 150))  # of high, medium and low dependency in turn

    def write(rows, temperature):
        prompts = [papo.encode_prompt(processor, row["problem"], row["images"][0]) for row in rows]
        given = dict(temperature=temperature, generator=torch.Generator().manual_seed(0))
        groups = papo.sample_groups(model, processor, prompts, 1, 60, **given)
        return [processor.tokenizer.decode(o, skip_special_tokens=True) for [o] in groups]

    kinds = [toy.error_type(text, row) for text, row in zip(write(rows, 1.0), rows)]
    right = {kind: kinds[i::3].count(None) / 50 for i, kind in enumerate(toy.DEPENDENCIES)}
    wrong = [kind for kind in kinds if kind]
    assert right["high"] < 0.25 and right["low"] > 0.75, right
    assert wrong.count("perception") / len(wrong) > 0.75, wrong
    # But it can see: its likeliest answer reads nearly every digit of a question that states none.
    traces = map(toy._patterns("sum")[0].fullmatch, write(rows[::3], 0.0))
    said = np.array([trace[1].split() for trace in traces]).astype(int)  # (50, N)
    assert np.mean(said == np.array([row["digits"] for row in rows[::3]])) > 0.85
