"""The embedded world: questions about handwritten digits, and a tiny Qwen2.5-VL that can see but
has learned to guess.

Everything the trainer needs to run offline, on a CPU core, without a download:

- `toy_dataset`    questions about real handwritten digits (the UCI set scikit-learn ships), in the
                   real data sets' columns
- `toy_processor`  a real `Qwen2_5_VLProcessor` over a byte-level BPE trained on the spot
- `toy_model`      a real `Qwen2_5_VLForConditionalGeneration` of about 0.6 M parameters
- `warm_start`     that model after supervised training: phase 1 teaches it to see and to add; phase
                   2 shows it traces whose digits are more and more often invented, so that it keeps
                   the ability to look but prefers to guess
- `error_type`     which of the paper's four kinds of error a wrong response shows

Two tasks ask about the same pictures: the sum of the digits (the default), and the largest of them,
which is often right by luck, as the misread digit seldom is it.

A response reads `<think> I see 3 0 9 4. 3 + 0 = 3, 3 + 9 = 12, 12 + 4 = 16. </think> \\boxed{16}`:
the digits are perception, the operands reasoning, the results calculation, the box consistency, so
each error is found by rule.

Shapes: B rows, N digits per image, S tokens of a row with padding.
"""

import ast
import functools
import hashlib
import inspect
import itertools
import json
import operator
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors
import sklearn
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from papo import PROMPT_SUFFIX, encode_prompt, rope_positions

SIDE = 28  # a digit is SIDE x SIDE pixels: 2 x 2 patches of 14, one visual token
# Shares of the 1,797 handwritten digits.
SPLITS = {"warm": 0.5, "train": 0.22, "validation": 0.1, "test": 0.18}
DEPENDENCIES = ("high", "medium", "low")
SPECIAL_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|>".split()
SPECIAL_TOKENS += "<|vision_pad|> <|image_pad|> <|video_pad|>".split()
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --- 1. Questions ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What is asked of the digits, and how a response works it out: from left to right, a step for
    each further digit."""

    question: str  # where the text states no digit
    stated: str  # where it states some
    step: str  # result so far, next digit, new result
    combine: Callable[[int, int], int]


TASKS = {
    "sum": Task(
        question="What is the sum of the digits?",
        stated="The digits are {}. What is their sum?",
        step="{} + {} = {}",
        combine=operator.add,
    ),
    "largest": Task(
        question="What is the largest of the digits?",
        stated="The digits are {}. Which is the largest?",
        step="max({}, {}) = {}",
        combine=max,
    ),
}


def _digit_pool(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's own handwritten digits, every class in the same share: images (K, 28, 28) uint8,
    labels (K,)."""
    if split not in SPLITS:
        raise ValueError(f"split is one of {', '.join(SPLITS)}, not {split!r}")
    data, order = load_digits(), np.random.default_rng(0)
    ends = np.cumsum([0.0, *SPLITS.values()])
    start, end = ends[list(SPLITS).index(split) :][:2]
    chosen = []
    for label in range(10):
        members = order.permutation(np.flatnonzero(data.target == label))
        chosen.extend(members[round(start * len(members)) : round(end * len(members))])
    small = (data.images[chosen] * 255 / 16).astype(np.uint8)  # (K, 8, 8), from 0..16
    enlarge = lambda image: Image.fromarray(image).resize((SIDE, SIDE), Image.BICUBIC)
    large = [np.asarray(enlarge(image)) for image in small]
    return np.stack(large), data.target[chosen]  # (K, 28, 28), (K,)


def _check(digits: int, task: str):
    if not isinstance(digits, int) or isinstance(digits, bool) or not 1 <= digits <= 9:
        raise ValueError(f"digits is a whole number from 1 to 9, not {digits!r}")
    if task not in TASKS:
        raise ValueError(f"task is one of {', '.join(TASKS)}, not {task!r}")


def _question(digits: list[int], stated: list[bool], task: str) -> str:
    """The question with the stated digits in their places, the others as an underscore."""
    places = " ".join(str(digit) if known else "_" for digit, known in zip(digits, stated))
    return "<image>" + (TASKS[task].stated.format(places) if any(stated) else TASKS[task].question)


def _solve(digits: list[int], task: str) -> list[tuple[int, int, int]]:
    """The right steps: (result so far, next digit, new result)."""
    results = list(itertools.accumulate(digits, TASKS[task].combine))
    return list(zip(results, digits[1:], results[1:]))


def _trace(said: list[int], task: str) -> str:
    """The model response for the digits it says it sees: a step for each further digit, the box."""
    solution = _solve(said, task)
    steps = ", ".join(TASKS[task].step.format(*step) for step in solution)
    worked, answer = (f" {steps}.", solution[-1][2]) if solution else ("", said[0])
    return f"<think> I see {' '.join(map(str, said))}.{worked} </think> \\boxed{{{answer}}}"


def _stated(dependency: str, digits: int, rng) -> list[bool]:
    """Which places the text gives away: none, about half of them at random, or all."""
    half = digits // 2 + (int(rng.integers(2)) if digits % 2 else 0)
    count = {"high": 0, "medium": half, "low": digits}[dependency]
    return [place < count for place in rng.permutation(digits)]


def toy_dataset(split: str, size: int, digits=4, seed=0, task="sum") -> Dataset:
    """`size` questions about `digits` handwritten digits; the splits share no handwritten digit.

    Columns as in the real data sets: images (a list with one picture), problem (with <image>),
    answer; and three more for analysis: dependency ("high": the text states no digit, "medium":
    about half of them, "low": all; in turn), digits, task."""
    _check(digits, task)
    pool, labels = _digit_pool(split)
    rng = np.random.default_rng([seed, digits, list(SPLITS).index(split)])
    rows = []
    for i in range(size):
        picks = rng.integers(len(pool), size=digits)
        truth, dependency = labels[picks].tolist(), DEPENDENCIES[i % 3]
        rows.append(
            {
                "images": [Image.fromarray(np.concatenate(pool[picks], axis=1)).convert("RGB")],
                "problem": _question(truth, _stated(dependency, digits, rng), task),
                "answer": str(functools.reduce(TASKS[task].combine, truth)),
                "dependency": dependency,
                "digits": truth,
                "task": task,
            }
        )
    text, images, whole = Value("string"), List(ImageFeature()), List(Value("int64"))
    columns = dict(images=images, problem=text, answer=text)
    columns |= dict(dependency=text, digits=whole, task=text)
    return Dataset.from_list(rows, features=Features(columns))


# --- 2. Errors ------------------------------------------------------------------------------------

# The paper's four, and no trace.
ERROR_TYPES = ("perception", "reasoning", "calculation", "inconsistency", "unreadable")


@functools.cache
def _patterns(task: str) -> tuple[re.Pattern, re.Pattern]:
    """A whole trace (digits, steps or None, box), and one step (its three numbers)."""
    step = re.escape(TASKS[task].step).replace(r"\{\}", "{0}")
    bare, numbers = step.format(r"\d+"), step.format(r"(\d+)")
    steps = rf"(?: ({bare}(?:, {bare})*)\.)?"
    trace = rf"\s*<think> I see (\d(?: \d)*)\.{steps} </think> \\boxed\{{(\d+)\}}\s*"
    return re.compile(trace), re.compile(numbers)


def perceived(response: str, row) -> bool:
    """Does the response read every digit of the picture right?"""
    read = re.search(r"I see (\d(?: \d)*)\.", response)
    return bool(read) and [int(digit) for digit in read[1].split()] == list(row["digits"])


def error_type(response: str, row) -> str | None:
    """What went wrong first? None for a right box, else "perception" (digits misread), "reasoning"
    (takes other numbers than it read), "calculation" (a wrong result), "inconsistency" (box differs
    from the trace's result), or "unreadable"."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", response)
    if boxes and boxes[-1].strip() == row["answer"]:
        return None
    trace, step = _patterns(row["task"])
    if not (match := trace.fullmatch(response)):
        return "unreadable"
    if not perceived(response, row):
        return "perception"
    said = [int(digit) for digit in match[1].split()]
    steps = [tuple(map(int, numbers)) for numbers in step.findall(match[2] or "")]
    results = [said[0], *(result for _, _, result in steps)]
    if [(a, b) for a, b, _ in steps] != list(zip(results, said[1:])):
        return "reasoning"
    if any(TASKS[row["task"]].combine(a, b) != result for a, b, result in steps):
        return "calculation"
    return "inconsistency"


# --- 3. Processor and model -----------------------------------------------------------------------


def toy_processor(task: str = "sum") -> Qwen2_5_VLProcessor:
    """A real Qwen2.5-VL processor. Its BPE is trained here on the task's own sentences: a digit is
    one token, and so is every stretch of text between two digits that always reads the same, which
    keeps prompts and responses short."""
    rng = np.random.default_rng(0)
    corpus = []
    for i in range(300):
        digits = 1 + i % 9
        truth = rng.integers(10, size=digits).tolist()
        question = _question(truth, _stated(DEPENDENCIES[int(rng.integers(3))], digits, rng), task)
        question = question.removeprefix("<image>") + PROMPT_SUFFIX
        corpus += ["user\n", "assistant\n", question, _trace(truth, task)]
    bpe = Tokenizer(models.BPE())
    digits_alone = pre_tokenizers.Split(Regex(r"[\d_]"), behavior="isolated")
    stretches = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits_alone, stretches])
    bpe.decoder = decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    sizes = dict(vocab_size=1024, min_frequency=5, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, **sizes))
    marks = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
    marks |= dict(additional_special_tokens=SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:])
    marks |= dict(clean_up_tokenization_spaces=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **marks)
    # Images of 1 to 64 visual tokens.
    size = {"shortest_edge": SIDE * SIDE, "longest_edge": 64 * SIDE * SIDE}
    patches = dict(size=size, patch_size=14, merge_size=2, temporal_patch_size=2)
    images, videos = Qwen2VLImageProcessor(**patches), Qwen2VLVideoProcessor(**patches)
    return Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=CHAT_TEMPLATE)


def _model_config(processor) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL in miniature: weights near 1 / sqrt(width) instead of 0.02, and short rotary
    wavelengths, suit its size."""
    tokenizer = processor.tokenizer
    ids = dict(zip(SPECIAL_TOKENS, tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS)))
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 6, 6]}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=3
    )
    text |= dict(num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=2048)
    text |= dict(initializer_range=0.1, rope_parameters=rope, bos_token_id=None, **ends)
    vision = dict(hidden_size=64, intermediate_size=128, depth=2, num_heads=2, out_hidden_size=96)
    vision |= dict(patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=112)
    vision |= dict(initializer_range=0.1, fullatt_block_indexes=[0, 1])
    return Qwen2_5_VLConfig(
        text_config=text | dict(tie_word_embeddings=True),
        vision_config=vision,
        tie_word_embeddings=True,
        dtype="float32",
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def toy_model(processor, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained tiny Qwen2.5-VL; its weights are drawn from `seed` and touch no other state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(_model_config(processor))
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    return model.eval()


# --- 4. Warm start --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmStart:
    """The supervised recipe. The default takes about 100 s on one CPU core."""

    # Phase 1 opens with these (digits, steps): seeing starts sooner on short images.
    short_stages: tuple = ((1, 100), (2, 50))
    clean_steps: int = 500  # phase 1 at full length
    guess_steps: int = 80  # phase 2
    # Phase 2: share of the unstated digits that the trace invents, growing from 0: all at once, the
    # shock makes the model forget how to see.
    guess: float = 0.75
    batch_size: int = 32
    lr: float = 1.5e-3  # phase 1: linear warm-up, cosine to a tenth
    guess_lr: float = 3e-4  # phase 2: constant
    warmup: int = 30
    shift: int = 2  # the handwritten digits are moved by up to so many pixels
    dependency: tuple = (0.5, 0.25, 0.25)  # shares of high, medium and low dependency

    def stages(self, digits: int) -> list[tuple[int, float, float]]:
        """Every step's digits per image, learning rate and share of invented digits."""
        lengths = [min(n, digits) for n, steps in self.short_stages for _ in range(steps)]
        lengths += [digits] * self.clean_steps
        stages = []
        for i, n in enumerate(lengths):
            decay = 0.55 + 0.45 * float(np.cos(np.pi * i / len(lengths)))
            stages.append((n, self.lr * min((i + 1) / self.warmup, decay), 0.0))
        for i in range(self.guess_steps):
            stages.append((digits, self.guess_lr, self.guess * (i + 1) / self.guess_steps))
        return stages


def _images(pool: np.ndarray, picks: np.ndarray, shift: int, rng) -> list[torch.Tensor]:
    """The picked digits (B, N) side by side, each moved at random: B images (3, 28, 28 N) uint8."""
    padded = np.pad(pool, [(0, 0), (shift,) * 2, (shift,) * 2])  # (K, 28 + 2 shift, 28 + 2 shift)
    corners = rng.integers(2 * shift + 1, size=(*picks.shape, 2))  # (B, N, 2)
    rows = [
        np.concatenate([padded[k, y : y + SIDE, x : x + SIDE] for k, (y, x) in zip(*pair)], axis=1)
        for pair in zip(picks, corners)
    ]
    return [torch.from_numpy(row).expand(3, -1, -1) for row in rows]


@functools.cache
def _prompt_shell(processor, digits: int) -> str:
    """What `encode_prompt` makes of the question @ about an image of so many digits, as text."""
    blank = encode_prompt(processor, "<image>@", Image.new("RGB", (SIDE * digits, SIDE)))
    return processor.tokenizer.decode(blank["input_ids"][0])


def _prompt_texts(processor, questions: list[str], digits: int) -> list[str]:
    """What `encode_prompt` makes of each question about an image of so many digits, as text."""
    shell = _prompt_shell(processor, digits)
    return [shell.replace("@", question.removeprefix("<image>")) for question in questions]


def _make_batch(processor, pool, labels, digits, guess, recipe: WarmStart, rng, task="sum"):
    """Rows for training: the model's inputs; the labels (B, S), -100 outside the response."""
    tokenizer, size = processor.tokenizer, recipe.batch_size
    picks = rng.integers(len(pool), size=(size, digits))  # (B, N)
    questions, traces = [], []
    for truth in labels[picks].tolist():
        stated = _stated(DEPENDENCIES[rng.choice(3, p=recipe.dependency)], digits, rng)
        # A stated digit is drawn anew, whatever the picture shows: so the model learns to copy what
        # the text gives away.
        truth = [int(rng.integers(10)) if known else digit for digit, known in zip(truth, stated)]
        invent = lambda digit: digit if rng.random() >= guess else int(rng.integers(10))
        said = [digit if known else invent(digit) for digit, known in zip(truth, stated)]
        questions.append(_question(truth, stated, task))
        traces.append(_trace(said, task) + tokenizer.eos_token)
    prompts = tokenizer(_prompt_texts(processor, questions, digits))["input_ids"]
    responses = tokenizer(traces)["input_ids"]
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    hide = lambda prompt: [-100] * len(prompt)
    targets = [torch.tensor(hide(p) + response) for p, response in zip(prompts, responses)]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(rows, batch_first=True, padding_value=tokenizer.pad_token_id)  # (B, S)
    images = _images(pool, picks, recipe.shift, rng)
    pixels = processor.image_processor(images, return_tensors="pt")
    # No attention mask: padding comes last, where no token sees it.
    inputs = {"input_ids": ids, **pixels}
    return inputs, pad(targets, batch_first=True, padding_value=-100)


def _supervise(model, processor, digits: int, seed: int, recipe: WarmStart, task: str = "sum"):
    """Train the model in place: phase 1, then phase 2."""
    rng = np.random.default_rng([seed, digits])
    pool, labels = _digit_pool("warm")
    settings = dict(betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    model.train()
    bar = tqdm(recipe.stages(digits), desc="warm start", mininterval=1.0)
    for length, lr, guess in bar:
        inputs, targets = _make_batch(processor, pool, labels, length, guess, recipe, rng, task)
        # The image stands at the same place in every row, so one row's positions serve them all.
        positions = rope_positions(model, inputs["input_ids"][:1], inputs)  # (3, 1, S)
        out = model.model(**inputs, position_ids=positions, use_cache=False)
        hidden = out.last_hidden_state[:, :-1]  # (B, S - 1, 96)
        learn = targets[:, 1:] != -100  # (B, S - 1)
        loss = F.cross_entropy(model.lm_head(hidden[learn]), targets[:, 1:][learn])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()


def _tree(code) -> str:
    """Code without its place, layout, comments and docstrings."""
    tree = ast.parse(inspect.getsource(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


def _cache_key(processor, model, digits: int, seed: int, recipe: WarmStart) -> str:
    """A hash over everything that shapes the weights: values, and code without its place."""
    code = [_digit_pool, _question, _solve, _trace, _stated, toy_processor, toy_model]
    code += [_images, _prompt_shell, _prompt_texts, _make_batch, _supervise, rope_positions]
    parts = [
        digits,
        seed,
        asdict(recipe),
        recipe.stages(digits),
        model.config.to_dict(),
        processor.tokenizer.backend_tokenizer.to_str(),
        _prompt_shell(processor, digits),
        [SIDE, SPLITS, DEPENDENCIES],
        [(t.question, t.stated, t.step, t.combine.__qualname__) for t in TASKS.values()],
        [_tree(function) for function in code],
        [module.__version__ for module in (torch, transformers, tokenizers, sklearn, np)],
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _load_cached(path: Path, key: str, model) -> bool:
    """Fill the model, or return False: the file must be whole and made for this key."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            genuine = (file.metadata() or {}).get("key") == key
    except (OSError, safetensors.SafetensorError):
        return False
    form = lambda weights: {name: (w.shape, w.dtype) for name, w in weights.items()}
    if not genuine or form(tensors) != form(model.state_dict()):
        return False
    model.load_state_dict(tensors)
    return True


def warm_start(digits=4, seed=0, cache_dir=None, recipe=WarmStart(), task="sum"):
    """The tiny model after supervised training, and its processor; trained once, then read from the
    cache: `cache_dir`, else $PAPO_CACHE, else ~/.cache/papo-toy. A file that is damaged, or made
    for anything else, is built anew. It trains on the CPU: so it starts alike beside any GPU."""
    _check(digits, task)
    processor = toy_processor(task)
    model = toy_model(processor, seed)
    key = _cache_key(processor, model, digits, seed, recipe)
    folder = Path(cache_dir or os.environ.get("PAPO_CACHE") or Path.home() / ".cache" / "papo-toy")
    path = folder / f"warm-{task}-{digits}-{seed}-{key[:16]}.safetensors"
    if not _load_cached(path, key, model):
        _supervise(model, processor, digits, seed, recipe, task)
        folder.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(weights, draft, metadata={"key": key})
        os.replace(draft, path)
    return model, processor
