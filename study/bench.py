"""Ratios of time and memory, side by side in one run: `python -m study.bench` prints what
docs/reliability.md quotes, in minutes on 2 CPU cores; with --trl one table more. `--gpu` measures
one batch of a 3B model on a GPU instead: seconds, MFU and memory (section 6).

How to read them. Every number is a ratio of two ways to do the same work in this process: one call
of each in turn, and the median of the pairs' ratios, with the smallest and the largest in brackets.
Time is processor time of one thread on a CPU, device time (events) on a GPU; so a busy machine
moves a ratio little, and another machine less than it moves a second. A ratio of times below 1 says
that the way named first is faster. Seconds, where given, are one call's of this machine and no more
than a note.

The works: "embedded world" and "448 x 448" are toy.py's untrained model, with 4 and with 256 visual
tokens; "3B in miniature" has Qwen2.5-VL-3B's proportions with 2 layers in each tower (on a CPU
widths and vocabulary an eighth of it), 256 visual tokens. Responses never end early, so that both
ways always do the same work.

Shapes: G responses a group, P prompt tokens, |o| tokens of a response, L row length, V vocabulary.
"""

import argparse
import copy
import gc
import itertools
import json
import math
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from statistics import median

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PrinterCallback, TrainerCallback

import papo
import toy
from program import SAMPLES
from program.memory import estimate_memory, peak_memory
from train_small import RunConfig, Trainer, parse_args

# --- 1. Measuring ---------------------------------------------------------------------------------

PAIRS, BUDGET = 5, 6.0  # pairs for a ratio; at least 3, no more once they took so many seconds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
device_name = lambda: torch.cuda.get_device_name() if DEVICE.type == "cuda" else "one CPU thread"


def start_clock():
    """A function that stops the clock and returns its seconds: the device's, or the process's."""
    if DEVICE.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()

        def stop():
            end.record()
            torch.cuda.synchronize()
            return start.elapsed_time(end) / 1000

        return stop
    start = time.process_time()
    return lambda: time.process_time() - start


def alternate(*works):
    """Call the works in turn. Returns their seconds, a list of rounds without the first one."""
    rounds, begin = [], time.process_time()
    for i in range(PAIRS + 1):
        seconds = []
        for work in works:
            stop = start_clock()
            work()
            seconds.append(stop())
        rounds += [seconds] * (i > 0)
        if len(rounds) >= 3 and time.process_time() - begin > BUDGET:
            break
    return rounds


def compare(rounds):
    """The first work's time over the last one's, median (smallest to largest); and the former."""
    ratios, ours = [each[0] / each[-1] for each in rounds], [each[0] for each in rounds]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return spread, f"{median(ours):.2f} s"


def print_table(title, header, rows):
    """One Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:  # a generator: each row is printed as soon as it is measured
        print(f"| {' | '.join(map(str, row))} |", flush=True)


# --- 2. The works ---------------------------------------------------------------------------------


@dataclass
class Work:
    """A model, its processor and the size of its images in pixels."""

    name: str
    model: torch.nn.Module
    processor: object
    size: tuple  # (width, height)

    def rows(self, count) -> list[dict]:
        """So many rows of a data set: noise for an image, and a question as long as a real one."""
        shape = (count, *self.size[::-1], 3)
        noise = np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)
        question = "<image>What is the sum of the digits?"
        return [{"images": [Image.fromarray(x)], "problem": question, "answer": "7"} for x in noise]

    def prompts(self, count) -> list:
        encode = lambda row: papo.encode_prompt(self.processor, row["problem"], row["images"])
        return list(map(encode, self.rows(count)))


def qwen_3b(processor, shrink=1, layers=(36, 32), dtype=torch.float32):
    """Qwen2.5-VL-3B at random weights on the device; widths and vocabulary divided by `shrink`, so
    many layers in the language model and in the vision tower."""
    model, (depth, vision_depth) = toy.toy_model(processor), layers
    config = model.config.to_dict()
    text = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008)
    text |= dict(num_attention_heads=16, num_key_value_heads=2)
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048)
    shrunk = lambda sizes: {name: max(1, size // shrink) for name, size in sizes.items()}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = shrunk(text) | dict(num_hidden_layers=depth, layer_types=None)
    text |= dict(initializer_range=0.02, rope_parameters=rope)
    whole = list(range(min(7, vision_depth - 1), vision_depth, 8))  # layers without windows
    vision = shrunk(vision) | dict(depth=vision_depth, fullatt_block_indexes=whole)
    config["text_config"] |= text
    config["vision_config"] |= vision | dict(initializer_range=0.02)
    with torch.random.fork_rng(devices=[]), torch.device(DEVICE):
        torch.manual_seed(0)
        model = type(model)._from_config(type(model.config)(**config), dtype=dtype)
    model.generation_config = GenerationConfig()  # it would list another end token
    return model.eval()


def make_works() -> list[Work]:
    """The three works. Their end token is never sampled, so that every response has full length."""
    small, large = toy.toy_processor(), toy.toy_processor()
    large.image_processor.size["longest_edge"] = 448 * 448
    for processor in (small, large):
        processor.tokenizer.eos_token = "<|video_pad|>"
    large_3b = qwen_3b(large, 1 if DEVICE.type == "cuda" else 8, layers=(2, 2))
    works = [
        Work("embedded world", toy.toy_model(small).to(DEVICE), small, (4 * toy.SIDE, toy.SIDE)),
        Work("448 x 448", toy.toy_model(large).to(DEVICE), large, (448, 448)),
        Work("3B in miniature", large_3b, large, (448, 448)),
    ]
    for work in works:
        work.model.generation_config = GenerationConfig()  # it would list another end token
    return works


# --- 3. A group as one row, against one padded row per response -----------------------------------


def padded_logps(model, prompt, responses):
    """What group_logps computes, the usual way: one padded row per response. -> list of G (|o|,)"""
    P, G = prompt["input_ids"].shape[1], len(responses)
    rows = [torch.cat([prompt["input_ids"][0], o]) for o in responses]  # G x (P + |o|,)
    ids = pad_sequence(rows, batch_first=True, padding_value=0).to(model.device)  # (G, L)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)  # (G, L)
    hidden = model.model(
        input_ids=ids,
        attention_mask=mask.to(model.device),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=prompt["pixel_values"].repeat(G, 1).to(model.device),
        image_grid_thw=prompt["image_grid_thw"].repeat(G, 1).to(model.device),
        use_cache=False,
    ).last_hidden_state  # (G, L, H)
    lengths = [len(o) for o in responses]
    hidden = torch.cat([row[P - 1 : P - 1 + n] for row, n in zip(hidden, lengths)])  # (N, H)
    targets, head = torch.cat(responses).to(model.device), model.get_output_embeddings()  # (N,)
    logps, _ = papo.token_logps(hidden, targets, head)  # (N,)
    return logps.split(lengths)


def visible_scores(P, lengths) -> int:
    """Pairs of a token and one it may attend to, itself included, in a group's row."""
    return P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in lengths)


def group_rows(works, lengths=(40, 160), groups=(4, 8, 16)):
    """An update with both layouts, ours in as many rows as papo_step makes of it; responses of
    |o| / 2 to |o| tokens."""
    generator = torch.Generator().manual_seed(0)
    for work, T, G in itertools.product(works, lengths, groups):
        model, prompt = work.model, work.prompts(1)[0]
        P, V = prompt["input_ids"].shape[1], len(work.processor.tokenizer)
        if DEVICE.type == "cpu" and model.num_parameters() * G * (P + T) > 5e10:
            continue  # would take a minute and say nothing that the others do not
        sizes = [T - T // 2 * i // (G - 1) for i in range(G)]
        first = len(toy.SPECIAL_TOKENS)
        draw = lambda n: torch.randint(first, V, (n,), generator=generator)  # (|o|,)
        responses = list(map(draw, sizes))
        parts = papo.split_group(papo.PAPOConfig(), prompt, responses, model)

        def update(layout, model=model, prompt=prompt, responses=responses):
            sum(x.sum() for x in layout(model, prompt, responses)).backward()
            model.zero_grad()

        def rows(model, prompt, responses, parts=parts):
            return [papo.group_logps(model, prompt, responses[part])[0] for part in parts]

        ratio, note = compare(alternate(lambda: update(rows), lambda: update(padded_logps)))
        computed = sum((P + sum(sizes[part])) ** 2 for part in parts)
        seen = sum(visible_scores(P, sizes[part]) for part in parts)
        yield work.name, P, T, G, len(parts), ratio, f"{computed / seen:.1f}", note


# --- 4. A training step: PAPO against GRPO, and against TRL ---------------------------------------


def sizes_of(questions, tokens):
    """Settings of PAPOConfig for a step of one update."""
    sizes = dict(group_size=8, prompts_per_batch=questions, max_new_tokens=tokens)
    return sizes | dict(updates_per_batch=1, learning_rate=1e-6)


def stepper(model, processor, config, rows):
    """train_small's step, on a copy of the model."""
    run = RunConfig(gradient_checkpointing=False)
    return Trainer(copy.deepcopy(model), processor, config, run, rows).step


def training_steps(works, questions=(16, 4, 2), tokens=40):
    """gamma 0.02 against gamma 0, beta 0.01."""
    for work, n in zip(works, questions):
        configs = (papo.PAPOConfig(gamma=gamma, **sizes_of(n, tokens)) for gamma in (0.02, 0.0))
        steps = [stepper(work.model, work.processor, config, work.rows(n)) for config in configs]
        yield work.name, f"{n} x 8 x {tokens}", *compare(alternate(*steps))


def gated_steps(model, processor, *sizes):
    """The first steps of train_small.py on the digits: in a gated run the rewards decide what is
    paid, so they have to be real ones."""
    rows = toy.toy_dataset("train", 256)
    flags = ["--gamma=0.3"], ["--gamma=10", "--gated=True"], ["--gamma=0"]
    configs = [parse_args([*given, *sizes])[0] for given in flags]
    model = model.to(DEVICE)
    rounds = alternate(*(stepper(model, processor, config, rows) for config in configs))
    for i, name in enumerate(("PAPO, gamma 0.3", "gated, gamma 10")):
        yield name, *compare([seconds[i:] for seconds in rounds])


def trl_trainer(work, questions, tokens, folder):
    """papo_trl's trainer, with its program's settings, for the same step in a run of PAIRS + 1."""
    import papo_trl  # needs trl

    flags = dict(sizes_of(questions, tokens), steps=PAIRS + 1, out=folder)
    flags |= dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
    flags |= dict(eval_on_start=False, per_device_train_batch_size=min(32, 8 * questions))
    flags |= dict(bf16=False, disable_tqdm=True)  # fp32, as train_small
    config, _, args = papo_trl.parse_args([f"--{name}={value}" for name, value in flags.items()])
    work.model.save_pretrained(folder)  # where TRL finds the reference policy
    rows = [row | {"row": i} for i, row in enumerate(work.rows(questions))] * (PAIRS + 1)
    given = type(work.model).from_pretrained(folder), config, args, work.processor
    trainer = papo_trl.PAPOTrainer(*given, train_dataset=datasets.Dataset.from_list(rows))
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_steps(works, questions=(16, 4), tokens=40):
    """A step of train_small against one of papo_trl, gamma 0.02, beta 0.01."""
    for work, n in zip(works, questions):
        config, rounds = papo.PAPOConfig(gamma=0.02, **sizes_of(n, tokens)), []
        ours = stepper(work.model, work.processor, config, work.rows(n))

        class InTurn(TrainerCallback):
            """A step of train_small's after each of TRL's, the first round unmeasured."""

            def on_train_begin(self, *_, **__):
                self.stop = start_clock()

            def on_step_end(self, *_, **__):
                theirs, stop = self.stop(), start_clock()
                ours()
                rounds.append((stop(), theirs))
                self.stop = start_clock()

        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(work, n, tokens, folder)
            trainer.add_callback(InTurn())
            trainer.train()
        theirs = f"{median(seconds for _, seconds in rounds[1:]):.2f} s"
        yield work.name, f"{n} x 8 x {tokens}", *compare(rounds[1:]), theirs


# --- 5. Sampling against generate; memory of the log-probabilities --------------------------------


def generate(model, processor, prompts, G, tokens):
    """What sample_groups samples, by transformers' loop; prompts of one length. -> (n G, |o|)"""
    stack = lambda name: torch.cat([prompt[name] for prompt in prompts]).to(model.device)
    inputs = {name: stack(name) for name in prompts[0]}
    settings = dict(do_sample=True, top_k=0, num_return_sequences=G, max_new_tokens=tokens)
    settings |= dict(suppress_tokens=papo.vision_token_ids(model))
    settings = GenerationConfig(**settings, pad_token_id=processor.tokenizer.pad_token_id)
    with torch.no_grad():
        out = model.generate(**inputs, generation_config=settings)  # (n G, P + tokens)
    return out[:, inputs["input_ids"].shape[1] :]


def sampling(works, questions=(16, 4, 4), tokens=40, G=8):
    """Tokens per second of sample_groups over those of generate, temperature 1."""
    for work, n in zip(works, questions):
        given = work.model, work.processor, work.prompts(n), G, tokens
        rounds = alternate(lambda: generate(*given), lambda: papo.sample_groups(*given))
        rate = n * G * tokens / median(ours for _, ours in rounds)
        yield work.name, f"{n} x {G} x {tokens}", compare(rounds)[0], f"{rate:,.0f} tokens/s"


def all_logits(hidden, targets, head):
    """What token_logps computes, the usual way: every logit at once."""
    log_probs = head(hidden).float().log_softmax(-1)  # (N, V)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def head_peak(way, tokens=1024, H=256, V=151936) -> float:
    """GiB that a call of `way` and its backward pass add to the head, in a process of their own."""
    head = torch.nn.Linear(H, V, bias=False, device=DEVICE).requires_grad_(False)
    hidden = torch.randn(tokens, H, device=DEVICE, requires_grad=True)
    targets = torch.randint(V, (tokens,), device=DEVICE)
    on_gpu = DEVICE.type == "cuda"
    peak = lambda: peak_memory(DEVICE)
    # On Linux a process inherits its parent's peak; only what lies above it can be seen.
    ballast = None if on_gpu else torch.ones(int(peak() * 2**28))  # noqa: F841
    before = peak()
    way(hidden, targets, head)[0].sum().backward()
    return peak() - before


def head_memory():
    """token_logps against all logits at once, with the published vocabulary."""
    fresh = dict(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    ways = partial(papo.token_logps, with_entropy=True), all_logits
    with ProcessPoolExecutor(**fresh) as processes:  # what a process has once used, it may keep
        ours, theirs = processes.map(head_peak, ways)
    yield "1,024", "151,936", f"{ours / theirs:.2f}", f"{ours:.2f} of {theirs:.2f} GiB"


# --- 6. One batch of a 3B model on a GPU ----------------------------------------------------------

SIZES = {  # qwen_3b's shrink and layers, image's sides, tokens of a response, most questions
    "3b": (1, (36, 32), (896, 1120), 512, 16),  # 1,280 visual tokens
    "tiny": (16, (2, 2), (112, 168), 8, 3),  # the same in seconds on a CPU
}
# Dense bf16 TFLOP/s of cards, by a part of their names.
PEAKS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "RTX 3090": 71}
GPU_COLUMNS = "setting, method, phase, seconds, tokens/s, MFU %, peak GiB, estimate, responses/s"
GPU_COLUMNS = [*GPU_COLUMNS.split(", "), "over GRPO"]


def matrices(part, trained=False) -> int:
    """Numbers in a part's matrices: multiplications that a token costs in them."""
    each = part.parameters()
    return sum(p.numel() for p in each if p.dim() > 1 and (p.requires_grad or not trained))


def text_flops(model, tokens, scores, predictions):
    """The language model's FLOPs (forward, backward) over so many tokens, pairs of a token and one
    it attends to, and tokens that the head predicts. Backward, a matrix costs once for its input's
    gradient and, where it is trained, once for its own; the scores cost twice."""
    layers, head = model.model.language_model.layers, model.get_output_embeddings()
    attention = 4 * scores * len(layers) * layers[0].self_attn.o_proj.in_features  # q k, weight v
    cost = lambda *kind: tokens * matrices(layers, *kind) + predictions * matrices(head, *kind)
    return 2 * cost() + attention, 2 * (cost() + cost(True)) + 2 * attention


def vision_flops(model, grid):
    """The vision tower's FLOPs for an image of (time, height, width) patches: forward, backward
    where it is trained, and what gradient checkpointing computes again."""
    tower, (_, height, width) = model.model.visual, grid
    config, patches = tower.config, height * width
    side = config.window_size // config.patch_size
    squares = lambda n: sum(min(side, n - i) ** 2 for i in range(0, n, side))
    whole = len(config.fullatt_block_indexes)
    scores = whole * patches**2 + (config.depth - whole) * squares(height) * squares(width)
    blocks = 2 * patches * matrices(tower.blocks) + 4 * config.hidden_size * scores
    merger = 2 * patches // config.spatial_merge_size**2 * matrices(tower.merger)
    embed = 2 * patches * matrices(tower.patch_embed)  # pixels need no gradient
    return embed + blocks + merger, embed + 2 * (blocks + merger), blocks


def phase_flops(model, config, P, grid) -> dict:
    """FLOPs that the method needs in each phase: scores that are masked and activations that are
    computed again do not count. eta2 = 0: the masked pass has no backward."""
    n, G, T = config.prompts_per_batch, config.group_size, config.max_new_tokens
    looks = 1 + (config.gamma > 0)
    seen, seen_back, _ = vision_flops(model, grid)
    trained = matrices(model.model.visual, True) > 0  # else an image is encoded once, in sampling
    prefill, _ = text_flops(model, P, visible_scores(P, []), 1)
    decode, _ = text_flops(model, G * (T - 1), G * sum(range(P + 1, P + T)), G * (T - 1))
    row, row_back = text_flops(model, P + G * T, visible_scores(P, [T] * G), G * T)
    row += trained * seen
    constants = n * (config.beta > 0) + n - len(papo.split_batch(config, range(n))[0])
    sample = n * (prefill + decode + seen * (1 if trained else looks))
    score, update = constants * row, n * (looks * row + row_back + trained * seen_back)
    return dict(sample=sample, score=score, update=update, step=sample + score + update)


def gpu_run(memory, size):
    """A Trainer with --gpu-memory's settings, rows with prompts of P tokens, P, the image's grid of
    patches, and the estimated peak in GiB."""
    shrink, layers, image, tokens, most = SIZES[size]
    processor = toy.toy_processor()
    processor.tokenizer.eos_token = "<|video_pad|>"  # never sampled
    processor.image_processor.size["longest_edge"] = image[0] * image[1]
    config, run = parse_args(f"--model=x --dataset=y --gpu-memory={memory}".split())
    run.max_pixels, n = image[0] * image[1], min(most, config.prompts_per_sample)
    model = qwen_3b(processor, shrink, layers, torch.bfloat16)
    rows = Work(size, model, processor, image).rows(n)
    for row in rows:
        prompt = papo.encode_prompt(processor, row["problem"], row["images"][0])
        ids, grid = prompt["input_ids"], prompt["image_grid_thw"][0].tolist()  # (1, P)
        P = int((ids == model.config.image_token_id).sum()) + 256  # tokens of text
        ids = torch.cat([ids[:, :1].expand(1, P - ids.shape[1]), ids], 1)  # (1, P)
        row["prompt"] = {**prompt, "input_ids": ids}
    sizes = dict(max_new_tokens=tokens, prompts_per_batch=n, prompts_per_sample=n)
    config = replace(config, tokens_per_forward=P + config.group_size * tokens, **sizes)
    asked = n * config.group_size / SAMPLES  # the estimate counts an evaluation's answers
    estimate = estimate_memory(model, replace(config, prompts_per_sample=asked), run)["peak"]
    return Trainer(model, processor, config, run, rows), rows, P, grid, estimate


def sample_phase(trainer, config, rows):
    """Roll out a batch. -> groups"""
    source = map(dict, rows), trainer.generator  # copies: prompts are taken out
    return papo.roll_out(trainer.model, trainer.processor, config, *source)[0]


def score_phase(trainer, config, groups):
    """Score what the updates hold constant. -> the same groups"""
    papo.score_constants(trainer.model, trainer.reference, config, groups)
    return groups


def update_phase(trainer, config, groups):
    """All updates of a batch."""
    for update in papo.split_batch(config, groups):
        papo.papo_step(trainer.model, trainer.optimizer, config, update)


def one_batch(trainer, config, rows, deadline):
    """Yields each phase's name, seconds and peak GiB. Raises TimeoutError past the deadline."""
    cuda, given = DEVICE.type == "cuda" and torch.cuda, rows
    for name, phase in dict(sample=sample_phase, score=score_phase, update=update_phase).items():
        if time.monotonic() > deadline:
            raise TimeoutError
        cuda and cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        given = phase(trainer, config, given)
        cuda and cuda.synchronize()
        yield name, time.perf_counter() - start, peak_memory(DEVICE)


def setting_rows(memory, size, deadline):
    """A row of GPU_COLUMNS for each phase of a GRPO and of a PAPO batch, and for the whole step."""
    trainer, rows, P, grid, estimate = gpu_run(memory, size)
    speed = next((peak for name, peak in PEAKS.items() if name in device_name()), math.inf)
    short, steps = replace(trainer.config, max_new_tokens=4), []
    list(one_batch(trainer, short, rows, deadline))  # not measured: kernels are chosen
    for method, gamma in (("GRPO", 0.0), ("PAPO", 0.02)):
        config, done = replace(trainer.config, gamma=gamma), []
        flops, B = phase_flops(trainer.model, config, P, grid), len(rows) * config.group_size
        batch = one_batch(trainer, config, rows, deadline)
        for phase, seconds, peak in itertools.chain(batch, [("step", 0, 0)]):
            more = "", "", ""
            if phase == "step":
                seconds, peak = sum(s for s, _ in done), max(peak for _, peak in done)
                steps.append(seconds)
                more = f"{estimate:.1f}", f"{B / seconds:.2f}", f"{seconds / steps[0]:.2f}"
            done.append((seconds, peak))
            rate, mfu = B * config.max_new_tokens / seconds, flops[phase] / seconds / speed / 1e10
            numbers = f"{seconds:.2f}", f"{rate:,.0f}", f"{mfu:.1f}" if mfu else "", f"{peak:.1f}"
            yield memory, method, phase, *numbers, *more


def gpu_rows(size, minutes, path):
    """The rows of all settings, the largest first, each also a line of JSON as soon as it is
    measured. What does not fit, or comes too late, says so."""
    deadline = time.monotonic() + 60 * minutes

    def noted(row):
        line = dict(zip(GPU_COLUMNS, row), size=size, torch=torch.__version__, on=device_name())
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        return row

    for memory in (80, 48, 24):
        try:
            yield from map(noted, setting_rows(memory, size, deadline))
        except (torch.OutOfMemoryError, TimeoutError) as error:
            what = "out of time" if isinstance(error, TimeoutError) else "out of memory"
            yield noted((memory, what, *[""] * (len(GPU_COLUMNS) - 2)))
        gc.collect()  # the model goes before the next one comes
        torch.cuda.empty_cache()  # does nothing without a GPU


TABLES = (  # title, columns, the generator of rows
    (
        "An update of a group in few rows: time over that of a padded row per response",
        "work, P, &#124;o&#124;, G, rows, ratio, scores computed / visible, the rows' update",
        group_rows,
    ),
    (
        "A step of PAPO (gamma 0.02) over one of GRPO, beta 0.01, one update",
        "work, questions x G x tokens, ratio, PAPO's step",
        training_steps,
    ),
    (
        "The digits, from the warm start: a step over one of GRPO, beta 0.01, two updates",
        "perception term, ratio, its step",
        lambda works: gated_steps(*toy.warm_start()),
    ),
    (
        "Sampling: tokens per second of sample_groups over those of model.generate",
        "work, questions x G x tokens, ratio, sample_groups",
        sampling,
    ),
    (
        "Peak memory of token_logps over that of all logits at once, with backward",
        "tokens, V, ratio, GiB",
        lambda works: head_memory(),
    ),
)
TRL_TABLE = (
    "A step of train_small over one of papo_trl (gamma 0.02), beta 0.01, one update",
    "work, questions x G x tokens, ratio, train_small, papo_trl",
    trl_steps,
)


def main(argv=None):
    """The command: all tables, or with --gpu one."""
    parser = argparse.ArgumentParser(description="Ratios of time and memory, side by side.")
    parser.add_argument("--trl", action="store_true", help="add train_small.py against papo_trl.py")
    parser.add_argument("--gpu", action="store_true", help="instead one batch of a 3B model")
    parser.add_argument("--size", choices=SIZES, default="3b", help="of --gpu's model")
    parser.add_argument("--minutes", type=float, default=10, help="--gpu begins nothing later")
    parser.add_argument("--json", default="gpu.jsonl", help="where --gpu appends its rows")
    given = parser.parse_args(argv)
    refuse = lambda reason: parser.exit(2, f"study.bench: error: {reason}\n")
    if given.trl and not find_spec("trl"):
        refuse("--trl needs trl: pip install -r requirements-trl.txt")
    if given.gpu and given.size == "3b" and DEVICE.type != "cuda":
        refuse("--gpu finds no GPU; --size tiny tries it on a CPU")
    torch.set_num_threads(1)
    if given.gpu:
        title = f"One batch, {given.size}, on {device_name()}, torch {torch.__version__}"
        return print_table(title, GPU_COLUMNS, gpu_rows(given.size, given.minutes, given.json))
    works = make_works()
    print(f"On {device_name()}, torch {torch.__version__}: median (smallest to largest).")
    for title, columns, rows in TABLES + (TRL_TABLE,) * given.trl:
        print_table(title, columns.split(", "), rows(works))


if __name__ == "__main__":
    main()
