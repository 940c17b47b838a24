"""The embedded world: what the questions promise, how errors are named, and what the warm start leaves behind."""

import os
import random

import numpy as np
import pytest
import torch
from datasets import List
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import toy
from papo import encode_prompt, sample_groups

SHORT = toy.WarmStart(
    short_stages=((1, 2),), clean_steps=1, guess_steps=1, batch_size=4
)  # seconds, learns nothing


@pytest.fixture(scope="session")
def processor():
    return toy.toy_processor()


def cache_file(folder):
    files = list(folder.iterdir())
    assert len(files) == 1, files  # no half-written draft is left either
    return files[0]


def same_weights(a, b):
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# --- questions -------------------------------------------------------------------------------------------------------


def test_splits_share_no_handwritten_digit():
    pools = {split: toy._digit_pool(split) for split in toy.SPLITS}
    assert sum(len(labels) for _, labels in pools.values()) == 1797  # and together they use every digit once
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
        stated = sum(character.isdigit() for character in row["problem"])
        assert (
            stated
            in {"high": [0], "medium": [digits // 2, (digits + 1) // 2], "low": [digits]}[row["dependency"]]
        )
        if stated:  # each in its place
            places = row["problem"].split(" are ")[1].split(". ")[0].split(" ")
            assert all(place in ("_", str(digit)) for place, digit in zip(places, row["digits"], strict=True))


@pytest.mark.parametrize("digits", [0, 10, -1, 2.0, "4", True])
def test_digits_outside_one_to_nine_are_refused(digits, tmp_path):
    with pytest.raises(ValueError, match="from 1 to 9"):
        toy.toy_dataset("train", 1, digits=digits)
    with pytest.raises(ValueError, match="from 1 to 9"):
        toy.warm_start(digits=digits, cache_dir=tmp_path)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="warm, train, validation, test"):
        toy.toy_dataset("tests", 1)


# --- errors ----------------------------------------------------------------------------------------------------------

ROW = {"digits": [3, 0, 9, 4], "answer": "16", "task": "sum"}


@pytest.mark.parametrize(
    "kind, response",
    [
        (None, "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. </think> \\boxed{16}"),
        (
            None,
            "<think> I see 3 0 8 5. 3 + 0 = 3, 3 + 8 = 11, 11 + 5 = 16. </think> \\boxed{16}",
        ),  # right by luck
        (None, "no idea \\boxed{16}"),
        ("perception", "<think> I see 3 0 9 5. 3 + 0 = 3, 3 + 9 = 12, 12 + 5 = 17. </think> \\boxed{17}"),
        ("perception", "<think> I see 3 0 9. 3 + 0 = 3, 3 + 9 = 12. </think> \\boxed{12}"),  # overlooks one
        (
            "perception",
            "<think> I see 3 0 9 5. 3 + 0 = 4, 7 + 9 = 1, 1 + 5 = 6. </think> \\boxed{7}",
        ),  # the first cause wins
        ("reasoning", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 8 = 11, 11 + 4 = 15. </think> \\boxed{15}"),
        ("reasoning", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12. </think> \\boxed{12}"),  # leaves one out
        (
            "reasoning",
            "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 13 + 4 = 17. </think> \\boxed{17}",
        ),  # carries a wrong sum on
        ("calculation", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 13, 13 + 4 = 17. </think> \\boxed{17}"),
        ("inconsistency", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. </think> \\boxed{61}"),
        ("unreadable", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. </think>"),  # no box
        ("unreadable", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + = 12. </think> \\boxed{12}"),
        ("unreadable", ""),
    ],
)
def test_error_type(kind, response):
    assert toy.error_type(response, ROW) == kind


def test_error_type_of_one_digit():
    row = {"digits": [7], "answer": "7", "task": "sum"}
    assert toy.error_type(toy._trace([7], "sum"), row) is None
    assert toy.error_type(toy._trace([1], "sum"), row) == "perception"
    assert toy.error_type("<think> I see 7. </think> \\boxed{1}", row) == "inconsistency"


@pytest.mark.parametrize(
    "kind, response",
    [
        (None, "<think> I see 3 0 9 4. max(3, 0) = 3, max(3, 9) = 9, max(9, 4) = 9. </think> \\boxed{9}"),
        (
            None,
            "<think> I see 9 9 1 1. max(9, 9) = 9, max(9, 1) = 9, max(9, 1) = 9. </think> \\boxed{9}",
        ),  # luck
        (
            "perception",
            "<think> I see 3 0 7 4. max(3, 0) = 3, max(3, 7) = 7, max(7, 4) = 7. </think> \\boxed{7}",
        ),
        ("reasoning", "<think> I see 3 0 9 4. max(3, 0) = 3, max(3, 4) = 4. </think> \\boxed{4}"),
        (
            "calculation",
            "<think> I see 3 0 9 4. max(3, 0) = 3, max(3, 9) = 3, max(3, 4) = 4. </think> \\boxed{4}",
        ),
        (
            "inconsistency",
            "<think> I see 3 0 9 4. max(3, 0) = 3, max(3, 9) = 9, max(9, 4) = 9. </think> \\boxed{4}",
        ),
        ("unreadable", "<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. </think> \\boxed{16}"),
    ],
)
def test_error_type_of_the_largest(kind, response):
    assert toy.error_type(response, {"digits": [3, 0, 9, 4], "answer": "9", "task": "largest"}) == kind


@pytest.mark.parametrize("task, answer", [("sum", sum), ("largest", max)])
def test_a_true_trace_of_every_row_is_right_and_perceived(task, answer):
    for row in toy.toy_dataset("test", 30, digits=5, task=task):
        trace = toy._trace(row["digits"], task)
        assert row["answer"] == str(answer(row["digits"]))
        assert toy.error_type(trace, row) is None and toy.perceived(trace, row)


def test_the_tasks_ask_about_the_same_pictures():
    for one, other in zip(toy.toy_dataset("train", 9), toy.toy_dataset("train", 9, task="largest")):
        assert one["images"][0].tobytes() == other["images"][0].tobytes() and one["digits"] == other["digits"]
        assert one["problem"] != other["problem"]


def test_an_unknown_task_is_refused(tmp_path):
    for call in (
        lambda: toy.toy_dataset("train", 1, task="product"),
        lambda: toy.warm_start(task="", cache_dir=tmp_path),
    ):
        with pytest.raises(ValueError, match="task is one of sum, largest"):
            call()


# --- processor and model ---------------------------------------------------------------------------------------------


def test_digits_are_single_tokens_and_text_survives(processor):
    tokenizer = processor.tokenizer
    for text in (
        "12 + 304 = 316",
        toy._trace([3, 0, 9, 4], "sum"),
        "Schöne neue \\frac{1}{2} Welt \U0001f600\n",
    ):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        pieces = [tokenizer.decode([token]) for token in ids]
        assert [p for p in pieces if any(c.isdigit() for c in p)] == [c for c in text if c.isdigit()]


def test_processor_and_model_survive_saving(processor, tmp_path):
    model = toy.toy_model(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reloaded = (
        AutoProcessor.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path),
    )
    assert type(loaded) is type(processor) and type(reloaded) is type(model) and same_weights(model, reloaded)
    assert loaded.tokenizer.eos_token == "<|im_end|>" and loaded.tokenizer.pad_token == "<|endoftext|>"
    assert reloaded.generation_config.eos_token_id == loaded.tokenizer.eos_token_id
    for row in toy.toy_dataset("test", 3):
        before, after = (
            encode_prompt(each, row["problem"], row["images"][0]) for each in (processor, loaded)
        )
        assert before.keys() == after.keys() and all(
            torch.equal(before[name], after[name]) for name in before
        )


def test_model_is_drawn_from_its_seed_alone(processor):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one = toy.toy_model(processor, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert same_weights(one, toy.toy_model(processor, seed=1)) and not same_weights(
        one, toy.toy_model(processor, seed=2)
    )
    assert 500_000 < sum(weight.numel() for weight in one.parameters()) < 700_000
    assert {weight.dtype for weight in one.parameters()} == {torch.float32}


# --- warm start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 4, 9])
def test_training_sees_the_very_prompt_that_rl_sees(processor, digits):
    rows = toy.toy_dataset("validation", 6, digits=digits)
    texts = toy._prompt_texts(processor, rows["problem"], digits)
    picks = np.arange(6 * digits).reshape(6, digits)
    pool = np.concatenate(
        [np.asarray(row["images"][0])[:, :, 0].reshape(28, digits, 28).swapaxes(0, 1) for row in rows]
    )
    images = toy._images(pool, picks, 0, np.random.default_rng(0))
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].chunk(6)
    for row, text, patches in zip(rows, texts, pixels, strict=True):
        prompt = encode_prompt(processor, row["problem"], row["images"][0])
        assert processor.tokenizer(text)["input_ids"] == prompt["input_ids"][0].tolist()
        assert torch.equal(patches, prompt["pixel_values"])


def test_only_the_response_is_learned_and_its_end_too(processor):
    pool, labels = toy._digit_pool("warm")
    inputs, targets = toy._make_batch(processor, pool, labels, 4, 0.0, SHORT, np.random.default_rng(0))
    for ids, wanted in zip(inputs["input_ids"], targets, strict=True):
        response = wanted[wanted != -100]
        assert toy._patterns("sum")[0].fullmatch(processor.tokenizer.decode(response[:-1]))
        assert response[-1] == processor.tokenizer.eos_token_id
        assert (ids == processor.image_token_id).sum() == 4
        assert torch.equal(ids[wanted != -100], response)


@pytest.mark.parametrize("digits", [1, 4])
def test_one_rows_positions_and_no_mask_are_what_the_model_would_take(processor, digits, monkeypatch):
    """A step of warm start against the stock forward with a padding mask and token types: the same hidden states where
    the loss is taken."""
    model, compared = toy.toy_model(processor), []

    def both(**inputs):
        ids = inputs["input_ids"]
        short = forward(**inputs)
        stock = forward(
            input_ids=ids,
            attention_mask=(ids != processor.tokenizer.pad_token_id).long(),
            mm_token_type_ids=(ids == processor.image_token_id).int(),
            pixel_values=inputs["pixel_values"],
            image_grid_thw=inputs["image_grid_thw"],
        )
        real = ids != processor.tokenizer.pad_token_id
        assert not real.all()  # some rows are padded
        torch.testing.assert_close(
            short.last_hidden_state[real], stock.last_hidden_state[real], atol=1e-5, rtol=1e-5
        )
        compared.append(len(ids))
        return short

    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", both)
    toy._supervise(
        model,
        processor,
        digits,
        0,
        toy.WarmStart(short_stages=(), clean_steps=2, guess_steps=1, batch_size=8),
    )
    assert compared == [8] * 3


def test_phase_two_invents_the_unstated_digits_only(processor):
    pool, labels = toy._digit_pool("warm")
    recipe, rng = toy.WarmStart(batch_size=200, dependency=(0.0, 0.5, 0.5)), np.random.default_rng(0)
    inputs, targets = toy._make_batch(processor, pool, labels, 4, 1.0, recipe, rng)
    for ids, wanted in zip(inputs["input_ids"], targets):
        text = processor.tokenizer.decode(ids[wanted == -100])
        places = text.split("The digits are ")[1].split(".")[0].split(" ")
        said = (
            toy._patterns("sum")[0]
            .fullmatch(processor.tokenizer.decode(wanted[wanted != -100][:-1]))[1]
            .split(" ")
        )
        assert all(place in ("_", digit) for place, digit in zip(places, said, strict=True))


def test_warm_start_repeats_by_seed_and_leaves_the_callers_random_state(tmp_path):
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    one, _ = toy.warm_start(seed=1, cache_dir=tmp_path / "a", recipe=SHORT)
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]
    two, _ = toy.warm_start(seed=1, cache_dir=tmp_path / "b", recipe=SHORT)
    other, _ = toy.warm_start(seed=2, cache_dir=tmp_path / "a", recipe=SHORT)
    assert same_weights(one, two) and not same_weights(one, other)
    assert not one.training and one.model.rope_deltas is None


def test_the_cache_is_used(tmp_path, monkeypatch):
    one, _ = toy.warm_start(cache_dir=tmp_path, recipe=SHORT)
    monkeypatch.setattr(toy, "_supervise", lambda *a: pytest.fail("trains although the cache is good"))
    assert same_weights(one, toy.warm_start(cache_dir=tmp_path, recipe=SHORT)[0])


def test_environment_names_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPO_CACHE", str(tmp_path / "here"))
    toy.warm_start(digits=1, recipe=SHORT)
    cache_file(tmp_path / "here")


def truncate(path, tensors, key):
    path.write_bytes(path.read_bytes()[:-1000])


def garbage(path, tensors, key):
    path.write_bytes(os.urandom(5000))


def empty(path, tensors, key):
    path.write_bytes(b"")


def foreign_key(path, tensors, key):
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path, metadata={"key": "f" * 64}
    )


def no_key(path, tensors, key):
    save_file({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, path)


def wrong_shape(path, tensors, key):
    name = next(name for name in tensors if tensors[name].dim() == 2)
    save_file(tensors | {name: tensors[name].T.contiguous()[:-1]}, path, metadata={"key": key})


def wrong_dtype(path, tensors, key):
    save_file({name: tensor.half() for name, tensor in tensors.items()}, path, metadata={"key": key})


def missing_tensor(path, tensors, key):
    save_file(dict(list(tensors.items())[1:]), path, metadata={"key": key})


def strange_tensor(path, tensors, key):
    save_file(tensors | {"stranger": torch.zeros(1)}, path, metadata={"key": key})


@pytest.fixture(scope="module")
def good_cache(tmp_path_factory):
    """A short warm start for one digit, and its cache file."""
    folder = tmp_path_factory.mktemp("cache")
    return toy.warm_start(digits=1, cache_dir=folder, recipe=SHORT)[0], cache_file(folder)


@pytest.mark.parametrize(
    "harm",
    [truncate, garbage, empty, foreign_key, no_key, wrong_shape, wrong_dtype, missing_tensor, strange_tensor],
    ids=lambda harm: harm.__name__,
)
def test_a_bad_cache_file_is_rebuilt(harm, good_cache, tmp_path, processor):
    good, source = good_cache
    path = tmp_path / source.name
    path.write_bytes(source.read_bytes())
    key = toy._cache_key(processor, toy.toy_model(processor), 1, 0, SHORT)
    harm(path, load_file(path), key)
    assert same_weights(good, toy.warm_start(digits=1, cache_dir=tmp_path, recipe=SHORT)[0])
    assert toy._load_cached(cache_file(tmp_path), key, toy.toy_model(processor))


def test_every_ingredient_changes_the_key(processor, monkeypatch):
    model = toy.toy_model(processor)
    keys = [
        toy._cache_key(processor, model, 4, 0, SHORT),
        toy._cache_key(processor, model, 3, 0, SHORT),
        toy._cache_key(processor, model, 4, 1, SHORT),
        toy._cache_key(processor, model, 4, 0, toy.WarmStart()),
    ]
    monkeypatch.setattr(toy, "PROMPT_SUFFIX", " Answer.")
    keys.append(toy._cache_key(processor, model, 4, 0, SHORT))
    monkeypatch.setattr(torch, "__version__", "0.0")
    keys.append(toy._cache_key(processor, model, 4, 0, SHORT))
    assert len(set(keys)) == len(keys)


@torch.no_grad()
def test_the_policy_adds_and_copies_but_guesses_what_it_should_see(warm_start):
    model, processor = warm_start
    rows, kinds = list(toy.toy_dataset("validation", 150)), []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for row in rows:
            prompt = encode_prompt(processor, row["problem"], row["images"][0])
            ids = model.generate(**prompt, do_sample=True, top_k=0, max_new_tokens=60)[
                0, prompt["input_ids"].shape[1] :
            ]
            kinds.append(toy.error_type(processor.tokenizer.decode(ids, skip_special_tokens=True), row))
    right = {
        d: np.mean([k is None for k, row in zip(kinds, rows) if row["dependency"] == d])
        for d in toy.DEPENDENCIES
    }
    wrong = [kind for kind in kinds if kind]
    assert right["high"] < 0.25 and right["low"] > 0.75, right
    assert wrong.count("perception") / len(wrong) > 0.75, wrong
    # But it can see: asked for its likeliest answer, it reads nearly every digit of a question that states none.
    high = [row for row in rows if row["dependency"] == "high"]
    prompts = [encode_prompt(processor, row["problem"], row["images"][0]) for row in high]
    greedy = sample_groups(model, processor, prompts, 1, 60, temperature=0)
    texts = [processor.tokenizer.decode(group[0], skip_special_tokens=True) for group in greedy]
    said = [[int(digit) for digit in toy._patterns("sum")[0].fullmatch(text)[1].split()] for text in texts]
    assert np.mean(np.array(said) == np.array([row["digits"] for row in high])) > 0.85
