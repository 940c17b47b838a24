"""Masking and Qwen-VL's prompt: a patch of the vision tower is wholly black or untouched."""

import pytest
import torch
from conftest import QUESTIONS, picture, seeded
from exercises import EXERCISES, cells

import papo
from papo import encode_prompt, fit_image, mask_patches, mask_prompt


@pytest.mark.parametrize("grade", EXERCISES["mask"])
def test_masks_are_what_the_walkthrough_asks_for(grade):
    """App. G.1: cells black or untouched, each with its probability, independent, by the
    generator."""
    grade(mask_patches)


def test_defaults_and_nonsense():
    image, drawn = picture(0, 140, 70), mask_patches(picture(0, 140, 70), 0.6, 14, seeded(1))
    assert mask_patches(image, generator=seeded(1)).tobytes() == drawn.tobytes()
    assert mask_patches(image).tobytes() != mask_patches(image).tobytes()
    for ratio, size, name in (1.5, 14, "ratio"), (-0.1, 14, "ratio"), (0.5, 0, "patch_size"):
        with pytest.raises(ValueError, match=name):
            mask_patches(image, ratio, size)
    with pytest.raises(ValueError, match="ratio"):
        mask_patches(image, float("nan"))


SIZES = ((90, 60), (300, 200), (20, 20), (31, 150), (224, 224), (500, 40), (97, 101), (640, 480))


@pytest.mark.parametrize("low, high", [(6, 20), (20, 20), (19, 20), (1, 1), (7, 8)])
def test_fit_image_is_what_the_processor_sees(vlm, low, high):
    """Sides are multiples of patch x merge, the area is within the bounds, and fitting again, or
    the processor's own resize, changes nothing; also where bounds are so near that one step of the
    rule undoes the last (min_pixels = max_pixels). Every row of pixel_values, one patch, is then
    black as its cell is, or untouched: mask_prompt keeps the grid."""
    _, processor = vlm
    settings = processor.image_processor
    patch, unit = settings.patch_size, (2 * settings.patch_size) ** 2
    settings.size = {"shortest_edge": low * unit, "longest_edge": high * unit}
    black = -torch.tensor(settings.image_mean) / torch.tensor(settings.image_std)
    black = black.repeat_interleave(2 * patch * patch)  # one patch of pixel_values
    for size in SIZES:
        fitted = fit_image(processor, picture(0, *size))
        assert fitted.width % (2 * patch) == fitted.height % (2 * patch) == 0
        assert fitted.mode == "RGB"
        area = fitted.width * fitted.height
        assert area <= high * unit and (low * unit <= area or low >= high - 1)  # or none between
        again = fit_image(processor, fitted)
        assert again.size == fitted.size and again.tobytes() == fitted.tobytes()
        prompt = encode_prompt(processor, "?", picture(0, *size))
        grid = [[1, fitted.height // patch, fitted.width // patch]]
        assert prompt["image_grid_thw"].tolist() == grid
        masked = mask_patches(fitted, 0.6, patch, seeded())
        original = prompt["pixel_values"]
        values = mask_prompt(processor, prompt, masked)["pixel_values"]
        assert values.shape == original.shape == (grid[0][1] * grid[0][2], len(black))
        is_black = (values - black).abs().amax(1) < 1e-3
        assert (is_black ^ (values == original).all(1)).all()
        assert is_black.sum() == cells(fitted, masked, patch).sum()


def test_masking_before_the_resize_leaves_patches_that_are_neither(vlm):
    """Which is what the released code does: only few patches stay black or untouched."""
    _, processor = vlm
    patch = processor.image_processor.patch_size
    image = picture(4, 7 * patch + 5, 5 * patch - 3)
    masked = mask_patches(image, 0.6, patch, seeded())
    original, values = (encode_prompt(processor, "?", i)["pixel_values"] for i in (image, masked))
    black = values.amax(1) < -1.4  # in all channels
    assert (black | (values - original).abs().amax(1).lt(1e-3)).float().mean() < 0.5


def test_a_masked_prompt_is_the_prompt_of_the_masked_image(vlm):
    """pi_mask is asked the same question, identical ids and grid: mask_prompt does not tokenise
    again, and gives what encode_prompt would; features of the plain image do not stay."""
    _, processor = vlm
    fitted = fit_image(processor, picture(3))
    masked = mask_patches(fitted, 0.6, processor.image_processor.patch_size, seeded())
    prompt, expected = (encode_prompt(processor, QUESTIONS[1], image) for image in (fitted, masked))
    given = mask_prompt(processor, {**prompt, "features": "of the plain image"}, masked)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    same = {name for name in prompt if torch.equal(prompt[name], given[name])}
    assert same == prompt.keys() - {"pixel_values"}


@pytest.mark.parametrize("question", ["Look <image> now.", "<image>What?", "What?", "What?<image>"])
def test_placement_of_the_image(vlm, question):
    """<image> says where it stands; without, it comes first. The prompt ends where the answer
    begins."""
    _, processor = vlm
    prompt = encode_prompt(processor, question, picture(0))
    n = int(prompt["image_grid_thw"].prod()) // 4
    question = question if "<image>" in question else "<image>" + question
    user = question.replace("<image>", f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>")
    text = f"<|im_start|>user\n{user}{papo.PROMPT_SUFFIX}<|im_end|>\n<|im_start|>assistant\n"
    assert processor.tokenizer.decode(prompt["input_ids"][0]) == text
    assert prompt["input_ids"].shape[0] == 1 and n >= 6


def test_what_cannot_be_encoded(one_vlm):
    """Several images, a special token that the processor would take for one, a thread of an image,
    a model that sees nothing."""
    _, processor = one_vlm
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_end|>")
    bad = {f"What is {token}?": "contains the special token" for token in tokens}
    for question, words in ({"<image> or <image>?": "marks 2 images and brings 1"} | bad).items():
        with pytest.raises(ValueError, match=words):
            encode_prompt(processor, question, picture(0))
    with pytest.raises(ValueError, match="ratio"):
        fit_image(processor, picture(0, 500, 2))
    model = type("Model", (), {"config": None})()
    with pytest.raises(ValueError, match="Model has no image token"):
        papo.vision_token_ids(model)
