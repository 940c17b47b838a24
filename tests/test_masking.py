"""mask_patches, fit_image and encode_prompt: a patch of the vision tower is wholly black or untouched."""

import numpy as np
import pytest
import torch
from conftest import QUESTIONS, picture

import papo
from papo import encode_prompt, fit_image, mask_patches, mask_prompt


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(before, after, size):
    """Walk the grid: a list of rows of booleans, True where a cell is black. Fails if a cell is neither black nor untouched."""
    before, after = np.asarray(before.convert("RGB")), np.asarray(after)
    grid = []
    for y in range(0, before.shape[0], size):
        grid.append([])
        for x in range(0, before.shape[1], size):
            old, new = before[y : y + size, x : x + size], after[y : y + size, x : x + size]
            black = not new.any()
            assert black or (old == new).all(), (x, y)
            grid[-1].append(black)
    return grid


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize(
    "width, height, size", [(70, 42, 14), (75, 50, 14), (64, 32, 16), (5, 9, 14), (31, 1, 7)]
)
def test_cells_are_black_or_untouched(mode, width, height, size):
    """App. G.1, for all kinds of images; a cell cut by the edge is a cell. Same size, mode RGB, a new image."""
    image = picture(0, width, height, mode)
    copy = image.copy()
    drawn = []
    for seed in range(12):
        masked = mask_patches(image, 0.5, size, generator(seed))
        assert masked.size == (width, height) and masked.mode == "RGB"
        drawn.append(cells(image, masked, size))
        assert np.asarray(drawn[-1]).shape == (-(-height // size), -(-width // size))
    assert image.mode == copy.mode and image.tobytes() == copy.tobytes()
    assert (np.mean(drawn, axis=0) > 0).all() and (
        np.mean(drawn, axis=0) < 1
    ).all()  # each cell now black, now not


def test_ratio_is_the_probability_of_black():
    """Each cell independently with probability p: mean, and spread over images, as for coin flips."""
    image = picture(0, 140, 70)
    for ratio in (0.0, 0.3, 0.6, 1.0):
        g = generator(1)
        share = np.array([np.mean(cells(image, mask_patches(image, ratio, 14, g), 14)) for _ in range(300)])
        deviation = (ratio * (1 - ratio) / 50) ** 0.5  # of the share of 50 cells
        assert abs(share.mean() - ratio) <= 4 * deviation / 300**0.5
        assert 0.8 * deviation <= share.std() <= 1.2 * deviation
    default = np.mean([np.mean(cells(image, mask_patches(image, generator=g), 14)) for _ in range(100)])
    assert abs(default - 0.6) < 0.03


def test_the_generator_decides():
    """Same seed, same mask; the next draw of one generator is another; torch's global generator is not used."""
    image, g = picture(0, 140, 70), generator(3)
    first, second = mask_patches(image, 0.5, 14, g), mask_patches(image, 0.5, 14, g)
    state = torch.get_rng_state()
    assert mask_patches(image, 0.5, 14, generator(3)).tobytes() == first.tobytes() != second.tobytes()
    assert torch.equal(torch.get_rng_state(), state)
    assert mask_patches(image, 0.5, 14).tobytes() != mask_patches(image, 0.5, 14).tobytes()


@pytest.mark.parametrize(
    "ratio, size, name",
    [(1.5, 14, "ratio"), (-0.1, 14, "ratio"), (float("nan"), 14, "ratio"), (0.5, 0, "patch_size")],
)
def test_nonsense_is_refused(ratio, size, name):
    with pytest.raises(ValueError, match=name):
        mask_patches(picture(0), ratio, size)


@pytest.mark.parametrize("width, height", [(90, 60), (300, 200), (20, 20), (31, 150), (224, 224)])
def test_fit_image_is_what_the_processor_sees(vlm, width, height):
    """Multiples of patch x merge, within the processor's area, and again: no change, neither by a second call nor by the
    processor's own resize."""
    _, processor = vlm
    patch, size = processor.image_processor.patch_size, processor.image_processor.size
    fitted = fit_image(processor, picture(0, width, height))
    assert fitted.width % (2 * patch) == fitted.height % (2 * patch) == 0 and fitted.mode == "RGB"
    assert size["shortest_edge"] <= fitted.width * fitted.height <= size["longest_edge"]
    again = fit_image(processor, fitted)
    assert again.size == fitted.size and again.tobytes() == fitted.tobytes()
    grid = encode_prompt(processor, "?", picture(0, width, height))["image_grid_thw"].tolist()
    assert grid == [[1, fitted.height // patch, fitted.width // patch]]


def test_each_patch_of_the_vision_tower_is_black_or_untouched(vlm):
    """After the processor, each row of pixel_values is one patch: all black or equal to the unmasked one, and as many are
    black as cells were. Masking before the resize (the released code) leaves patches that are neither."""
    _, processor = vlm
    patch = processor.image_processor.patch_size
    image = picture(4, 7 * patch + 5, 5 * patch - 3)
    fitted = fit_image(processor, image)
    masked = mask_patches(fitted, 0.6, patch, generator())
    mean, std = (
        torch.tensor(x)[:, None]
        for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    black = (-mean / std).expand(3, 2 * patch * patch).reshape(-1)

    def kinds(image):
        original, values = (encode_prompt(processor, "?", i)["pixel_values"] for i in (fitted, image))
        assert (
            values.shape
            == original.shape
            == (fitted.width * fitted.height // patch**2, 3 * 2 * patch * patch)
        )
        is_black, is_same = ((values - x).abs().amax(1) < 1e-3 for x in (black, original))
        return int(is_black.sum()), int(is_same.sum())

    count, patches = int(np.sum(cells(fitted, masked, patch))), fitted.width * fitted.height // patch**2
    assert kinds(masked) == (count, patches - count) and 0 < count < patches
    assert sum(kinds(mask_patches(image, 0.6, patch, generator()))) < patches


def test_a_mask_changes_only_pixels(vlm):
    """pi_mask is asked the same question: identical ids, grid, positions."""
    _, processor = vlm
    image = fit_image(processor, picture(0))
    a, b = (
        encode_prompt(processor, QUESTIONS[1], i)
        for i in (image, mask_patches(image, 0.6, processor.image_processor.patch_size))
    )
    assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(
        a["image_grid_thw"], b["image_grid_thw"]
    )
    assert not torch.equal(a["pixel_values"], b["pixel_values"])


@pytest.mark.parametrize(
    "question, before, after",
    [
        ("Look <image> now.", "Look ", " now."),
        ("<image>What?", "", "What?"),
        ("What?", "", "What?"),
        ("What?<image>", "What?", ""),
    ],
)
def test_placement_of_the_image(vlm, question, before, after):
    """<image> says where the image stands; without it the image comes first. The prompt ends where the answer begins."""
    _, processor = vlm
    prompt = encode_prompt(processor, question, picture(0))
    n = int(prompt["image_grid_thw"].prod()) // 4
    assert prompt["input_ids"].shape[0] == 1 and n >= 6
    assert processor.tokenizer.decode(prompt["input_ids"][0]) == (
        f"<|im_start|>user\n{before}<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>{after}{papo.PROMPT_SUFFIX}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_questions_that_cannot_be_encoded(one_vlm):
    """Several images, or a special token that the processor would take for an image."""
    _, processor = one_vlm
    with pytest.raises(ValueError, match="one <image>, this one has 2"):
        encode_prompt(processor, "<image> or <image>?", picture(0))
    for name in ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"):
        with pytest.raises(ValueError, match="contains the special token"):
            encode_prompt(processor, f"What is {name}?", picture(0))
    with pytest.raises(ValueError, match="ratio"):
        fit_image(processor, picture(0, 500, 2))


def test_models_without_images_are_refused():
    class Model:
        config = type("Config", (), {})()

    with pytest.raises(ValueError, match="Model has no image token"):
        papo.vision_token_ids(Model())


@pytest.mark.parametrize("low, high", [(20, 20), (19, 20), (6, 20), (1, 1), (7, 8)])
def test_fit_image_settles_whatever_the_bounds(vlm, low, high):
    """Bounds so near to each other that one step of the rule undoes the last (min_pixels = max_pixels among them): fitting
    again changes no pixel, and the masked image keeps the grid, its masks aligned."""
    _, processor = vlm
    patch, size = processor.image_processor.patch_size, processor.image_processor.size
    unit = (2 * patch) ** 2
    processor.image_processor.size = {"shortest_edge": low * unit, "longest_edge": high * unit}
    try:
        for width, height in ((90, 60), (300, 200), (31, 150), (224, 224), (500, 40), (97, 101), (640, 480)):
            fitted = fit_image(processor, picture(0, width, height))
            assert fitted.width % (2 * patch) == fitted.height % (2 * patch) == 0
            again = fit_image(processor, fitted)
            assert again.size == fitted.size and again.tobytes() == fitted.tobytes()
            prompt = encode_prompt(processor, "?", picture(0, width, height))
            assert prompt["image_grid_thw"].tolist() == [[1, fitted.height // patch, fitted.width // patch]]
            masked = mask_patches(fitted, 0.6, patch, generator())
            values, original = mask_prompt(processor, prompt, masked)["pixel_values"], prompt["pixel_values"]
            assert values.shape == original.shape
            untouched = int((values == original).all(1).sum())
            assert untouched == len(original) - int(np.sum(cells(fitted, masked, patch)))
    finally:
        processor.image_processor.size = size


def test_a_masked_prompt_is_the_prompt_of_the_masked_image(vlm):
    """mask_prompt does not tokenise again, and gives what encode_prompt would; features of the plain image do not stay."""
    _, processor = vlm
    fitted = fit_image(processor, picture(3))
    masked = mask_patches(fitted, 0.6, processor.image_processor.patch_size, generator())
    expected = encode_prompt(processor, QUESTIONS[1], masked)
    prompt = encode_prompt(processor, QUESTIONS[1], fitted)
    given = mask_prompt(processor, {**prompt, "features": "of the plain image"}, masked)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert not torch.equal(prompt["pixel_values"], expected["pixel_values"])
