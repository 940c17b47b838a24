"""The tests' small world: tiny random Qwen-VL models of three generations, each with a real
transformers processor and toy.py's tokenizer, runs of train_small.py on one of them, and the stock
way to score a response, against which papo.py is held."""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets
import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from PIL import Image

import papo
import toy
from toy import SPECIAL_TOKENS

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "big" in item.keywords and "big" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="only with -m big"))


def pytest_collection_finish(session):
    """Make the embedded world's warm start while the first tests run, if it is not in the cache.
    One process of the tests begins; whoever needs it meanwhile waits at the lock."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if first and any("warm_start" in getattr(item, "fixturenames", ()) for item in session.items):
        code = "import conftest; conftest.cached_warm_start()"
        quiet = dict(cwd=ROOT / "tests", stderr=subprocess.DEVNULL)
        subprocess.Popen([sys.executable, "-c", code], **quiet)


def cached_warm_start():
    folder = Path(os.environ.get("PAPO_CACHE") or Path.home() / ".cache" / "papo-toy")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "tests.lock"):
        return toy.warm_start()


@pytest.fixture(scope="session")
def warm_start():
    """(model, processor) of the embedded world, from the cache."""
    return cached_warm_start()


QUESTIONS = ["<image>What is shown here?", "Look at this: <image> How many dots do you see in it?"]
ARCHITECTURES = {  # name: model, processor, video processor, patch size
    "qwen2_vl": ("Qwen2VL", "Qwen2VL", "Qwen2VL", 14),
    "qwen2_5_vl": ("Qwen2_5_VL", "Qwen2_5_VL", "Qwen2VL", 14),
    "qwen3_vl": ("Qwen3VL", "Qwen3VL", "Qwen3VL", 16),
}


def make_processor(architecture):
    _, processor, video, patch = ARCHITECTURES[architecture]
    unit = (2 * patch) ** 2  # pixels of one merged token
    size = {"shortest_edge": 6 * unit, "longest_edge": 20 * unit}
    images = transformers.Qwen2VLImageProcessor(patch_size=patch, merge_size=2, size=size)
    videos = getattr(transformers, f"{video}VideoProcessor")(patch_size=patch, merge_size=2)
    build = getattr(transformers, f"{processor}Processor")
    return build(images, toy.toy_processor().tokenizer, videos, chat_template=toy.CHAT_TEMPLATE)


def make_model(architecture, processor, vision_sizes=(), **text_sizes):
    """fp32, weights of standard deviation 0.2: outputs far from uniform, and the picture matters
    (see test_scoring)."""
    name, _, _, patch = ARCHITECTURES[architecture]
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    tied = architecture == "qwen2_5_vl"
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=tied)
    text |= dict(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    text |= text_sizes
    width = text["hidden_size"]
    vision = dict(depth=2, num_heads=2, spatial_merge_size=2, temporal_patch_size=2)
    vision["patch_size"] = patch
    if architecture == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=width, mlp_ratio=2)
    else:
        vision |= dict(hidden_size=32, intermediate_size=64, out_hidden_size=width)
    head = width // text["num_attention_heads"]
    if architecture == "qwen2_5_vl":
        vision |= dict(window_size=56, fullatt_block_indexes=[1])
    if architecture == "qwen3_vl":
        vision |= dict(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
        text["head_dim"] = head = 16
    axis = head // 6  # rotary pairs for height, as many for width; the rest is for time
    sections = [head // 2 - 2 * axis, axis, axis]
    text["rope_parameters"] = dict(rope_type="default", rope_theta=100.0, mrope_section=sections)
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config={**vision, **dict(vision_sizes)},
        tie_word_embeddings=tied,
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        shift = 0.2 * torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and parameter.min() == 1  # its weight stays around 1
        parameter.data = parameter.data + shift if norm else shift
    model.get_output_embeddings().weight.data *= 2
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.generation_config = transformers.GenerationConfig(**ends)
    return model.eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(seed, width=90, height=60, mode="RGB"):
    """Coloured noise without a single black pixel."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(30, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@functools.cache
def built(architecture):
    processor = make_processor(architecture)
    return make_model(architecture, processor), processor


def lend(architecture):
    """(model, processor), built once, put back in order after each test."""
    model, processor = built(architecture)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    settings = model.generation_config, processor.image_processor.size, processor.chat_template
    yield model, processor
    model.generation_config, processor.image_processor.size, processor.chat_template = settings
    processor.tokenizer.pad_token = "<|endoftext|>"
    model.get_output_embeddings()._forward_hooks.clear()
    model.load_state_dict(weights)
    model.gradient_checkpointing_disable()
    model.set_attn_implementation("sdpa")
    model.model.rope_deltas = None
    model.requires_grad_(True)
    model.zero_grad()
    model.eval()


@pytest.fixture(params=ARCHITECTURES)
def vlm(request):
    yield from lend(request.param)


@pytest.fixture
def one_vlm():
    """Of one architecture, Qwen2.5-VL: for what does not depend on it."""
    yield from lend("qwen2_5_vl")


# ---- runs of train_small.py ----

# A run of a second; what stands behind these flags wins over them.
QUICK = (
    "--group-size 2 --prompts-per-batch 4 --updates-per-batch 2 --max-new-tokens 6 --eval-size 4 "
    "--eval-every 2 --steps 2 --learning-rate 1e-3 --min-pixels 4704 --max-pixels 15680"
).split()


def make_folder(architecture, tmp_path_factory):
    """A model folder as a hub has it: weights, config, processor."""
    path = tmp_path_factory.mktemp("model") / architecture
    for part in built(architecture):
        part.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def one_folder(tmp_path_factory):
    return make_folder("qwen2_5_vl", tmp_path_factory)


@pytest.fixture
def folder(one_folder, tmp_path):
    """A copy of it that a test may change."""
    return Path(shutil.copytree(one_folder, tmp_path / "model"))


def write_dots(path, counts):
    """Questions about pictures in the columns of the published data sets."""
    ask = lambda n: "<image>How many dots?" if n % 2 else "How many dots?"
    rows = [{"images": [picture(n, 84, 84)], "problem": ask(n), "answer": str(n)} for n in counts]
    text, images = datasets.Value("string"), datasets.List(datasets.Image())
    features = datasets.Features(images=images, problem=text, answer=text)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


@pytest.fixture(scope="session")
def parquet(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dots.parquet"
    return write_dots(path, np.random.default_rng(0).integers(1, 10, 64).tolist())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(out):
    return lines_of(out / "metrics.jsonl")


@pytest.fixture
def train(one_folder, parquet, tmp_path, monkeypatch):
    """A function that runs train_small.py with these flags behind QUICK and returns the run's
    folder. Without curves, half of the time of a run this small."""
    import train_small
    from program import report

    monkeypatch.setattr(report, "plot_curves", lambda *_: None)

    def run(name="run", flags="", model=one_folder, dataset=parquet):
        out = tmp_path / name
        start = ["--model", str(model), "--dataset", str(dataset), *QUICK, "--out", str(out)]
        train_small.main([*start, *flags.split()])
        return out

    return run


@pytest.fixture
def refused(capsys):
    """A function from flags to the one line that train_small.py ends with."""
    import train_small

    def line_of(argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train_small.main(argv)
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("train_small.py: error:")
        return line

    return line_of


# ---- prompts, responses, and stock scores ----


def two_prompts(processor):
    """Of different lengths, with images of 2 x 3 and 4 x 3 merged tokens: M-RoPE's axes differ."""
    unit = 2 * processor.image_processor.patch_size
    images = picture(1, 3 * unit, 2 * unit), picture(2, 3 * unit + 5, 4 * unit - 3)
    return [papo.encode_prompt(processor, *pair) for pair in zip(QUESTIONS, images)]


def random_responses(processor, lengths, seed=0):
    """Responses of random ordinary tokens, each with the end-of-sequence token at its end."""
    generator, V = torch.Generator().manual_seed(seed), len(processor.tokenizer)
    end = torch.tensor([processor.tokenizer.eos_token_id])
    draw = lambda n: torch.randint(len(SPECIAL_TOKENS), V, (n,), generator=generator)
    return [torch.cat([draw(n - 1), end]) for n in lengths]


def same_weights(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def shift_logits(model, shifts):
    """Add shifts {token id: number} to all logits from now on. Returns the hook's handle."""

    def hook(module, inputs, logits):
        moved = logits.clone()
        for token, shift in shifts.items():
            moved[..., token] += shift
        return moved

    return model.get_output_embeddings().register_forward_hook(hook)


def stock_logits(model, prompt, response):
    """A response after its prompt through the model's own forward: (|o|, V), row t predicts token
    t."""
    ids = torch.cat([prompt["input_ids"], response[None]], dim=1)
    is_image = (ids == model.config.image_token_id).int()
    images = {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}
    seen = torch.ones_like(ids)
    out = model(input_ids=ids, attention_mask=seen, mm_token_type_ids=is_image, **images)
    return out.logits[0, prompt["input_ids"].shape[1] - 1 : -1]


def stock_score(model, prompt, response, temperature=1.0):
    """-> log-probs (|o|,), entropies (|o|,)"""
    logits = stock_logits(model, prompt, response) / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(response), distribution.entropy()


def gradients(model, scalar):
    """{name: gradient} of the parameters that have one."""
    model.zero_grad()
    scalar.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
