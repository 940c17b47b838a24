"""Ratios of time and memory, side by side in one run: `python bench.py` prints the README's tables, in
minutes on 2 CPU cores; with --trl one more.

How to read them. Every number is a ratio of two ways to do the same work in this process: one call of each in
turn, and the median of the pairs' ratios, with the smallest and the largest in brackets. Time is processor
time of one thread on a CPU, device time (events) on a GPU; so a busy machine moves a ratio little, and
another machine less than it moves a second. A ratio of times below 1 says that the way named first is faster.
Seconds, where given, are one call's of this machine and no more than a note.

The works: "embedded world" and "448 x 448" are toy.py's untrained model, with 4 and with 256 visual tokens;
"3B in miniature" has Qwen2.5-VL-3B's proportions with 2 layers in each tower (on a CPU widths and vocabulary
an eighth of it), 256 visual tokens. Responses never end early, so that both ways always do the same work.

Shapes: G responses a group, P prompt tokens, |o| tokens of a response, L row length, V vocabulary.
"""

import argparse
import copy
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from statistics import median

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PrinterCallback,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    TrainerCallback,
)

import toy
from papo import (
    PAPOConfig,
    encode_prompt,
    group_logps,
    papo_step,
    roll_out,
    sample_groups,
    score_constants,
    split_batch,
    token_logps,
    vision_token_ids,
)
from train_small import RunConfig, Trainer, parse_args, peak_rss

# ------------------------------------------------------------------------------------------------------------
# 1. Measuring
# ------------------------------------------------------------------------------------------------------------

PAIRS, BUDGET = 5, 6.0  # pairs for a ratio; at least 3, no more once they took so many seconds
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def start_clock():
    """A function that stops the clock and returns its seconds: the device's on a GPU, else the process's."""
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


def seconds(work) -> float:
    """Time of one call."""
    stop = start_clock()
    work()
    return stop()


def alternate(*works):
    """Call the works in turn, the first round unmeasured. Each returns its seconds, or a tuple of the seconds
    of its parts. Returns what they returned, a list of rounds."""
    rounds, start = [], time.process_time()
    for i in range(PAIRS + 1):
        results = [work() for work in works]
        if i:
            rounds.append(results)
        if len(rounds) >= 3 and time.process_time() - start > BUDGET:
            break
    return rounds


def spread(values, form=".2f") -> str:
    """Median (smallest to largest)."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def print_table(title, header, rows):
    """One Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:  # a generator: each row is printed as soon as it is measured
        print(f"| {' | '.join(map(str, row))} |", flush=True)


# ------------------------------------------------------------------------------------------------------------
# 2. The works
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """A model, its processor and the size of its images in pixels."""

    name: str
    model: torch.nn.Module
    processor: object
    size: tuple  # (width, height)

    def rows(self, count, seed=0) -> list[dict]:
        """So many rows of a data set: noise for an image, and a question whose length is that of a real
        one."""
        noise = np.random.default_rng(seed).integers(256, size=(count, *self.size[::-1], 3), dtype=np.uint8)
        question = "<image>What is the sum of the digits?"
        return [{"images": [Image.fromarray(x)], "problem": question, "answer": "7"} for x in noise]

    def prompts(self, count) -> list:
        return [encode_prompt(self.processor, row["problem"], row["images"][0]) for row in self.rows(count)]


def miniature_3b(processor, shrink, layers=2):
    """Qwen2.5-VL-3B's proportions with few layers, its widths and vocabulary divided by `shrink`; random
    weights."""
    config = toy.toy_model(processor).config.to_dict()
    text = dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_attention_heads=16)
    vision = dict(hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048)
    text, vision = ({name: size // shrink for name, size in each.items()} for each in (text, vision))
    text |= dict(num_hidden_layers=layers, num_key_value_heads=1, layer_types=None, initializer_range=0.02)
    text |= dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]})
    vision |= dict(depth=layers, fullatt_block_indexes=[layers - 1], initializer_range=0.02)
    config["text_config"] |= text
    config["vision_config"] |= vision
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


def make_works() -> list[Work]:
    """The three works. Their end-of-sequence token is one that is never sampled, so that every response has
    full length."""
    small, large = toy.toy_processor(), toy.toy_processor()
    large.image_processor.size["longest_edge"] = 448 * 448
    for processor in (small, large):
        processor.tokenizer.eos_token = "<|video_pad|>"
    large_3b = miniature_3b(large, 1 if DEVICE.type == "cuda" else 8)
    works = [
        Work("embedded world", toy.toy_model(small).to(DEVICE), small, (4 * toy.SIDE, toy.SIDE)),
        Work("448 x 448", toy.toy_model(large).to(DEVICE), large, (448, 448)),
        Work("3B in miniature", large_3b.to(DEVICE), large, (448, 448)),
    ]
    for work in works:
        work.model.generation_config = GenerationConfig()  # it would list another end token
    return works


# ------------------------------------------------------------------------------------------------------------
# 3. A group as one row, against one padded row per response
# ------------------------------------------------------------------------------------------------------------


def padded_logps(model, prompt, responses):
    """What group_logps computes, the usual way: one row per response, padded on the right. -> list of G
    (|o|,)"""
    P, G = prompt["input_ids"].shape[1], len(responses)
    rows = [torch.cat([prompt["input_ids"][0], o]) for o in responses]  # G x (P + |o|,)
    ids = pad_sequence(rows, batch_first=True, padding_value=0).to(model.device)  # (G, L)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(model.device)  # (G, L)
    hidden = model.model(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=prompt["pixel_values"].repeat(G, 1).to(model.device),
        image_grid_thw=prompt["image_grid_thw"].repeat(G, 1).to(model.device),
        use_cache=False,
    ).last_hidden_state  # (G, L, H)
    lengths = [len(o) for o in responses]
    hidden = torch.cat([row[P - 1 : P - 1 + n] for row, n in zip(hidden, lengths)])  # (N, H)
    logps, _ = token_logps(hidden, torch.cat(responses).to(model.device), model.get_output_embeddings())
    return logps.split(lengths)


def visible_scores(P, lengths) -> int:
    """Pairs of a token and one it may attend to (itself included) in a group's row: what attention has to
    compute."""
    return P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in lengths)


def group_rows(works, lengths=(40, 160), groups=(4, 8, 16)):
    """Score and update, each with both layouts; responses of |o| / 2 to |o| tokens."""
    generator = torch.Generator().manual_seed(0)
    for work in works:
        model, prompt, forbidden = work.model, work.prompts(1)[0], len(toy.SPECIAL_TOKENS)
        vocabulary = len(work.processor.tokenizer)
        for T in lengths:
            for G in groups:
                # On a CPU the largest case would take a minute and say nothing that the others do not.
                if (
                    DEVICE.type == "cpu"
                    and model.num_parameters() * G * (prompt["input_ids"].shape[1] + T) > 5e10
                ):
                    continue
                responses = [
                    torch.randint(forbidden, vocabulary, (T - T // 2 * i // (G - 1),), generator=generator)
                    for i in range(G)
                ]

                def both(layout, responses=responses):
                    """Seconds of a pass without gradient, and of one with its backward pass."""
                    with torch.no_grad():
                        score = seconds(lambda: layout(model, prompt, responses))
                    update = seconds(
                        lambda: sum(x.sum() for x in layout(model, prompt, responses)).backward()
                    )
                    model.zero_grad()
                    return score, update

                row = lambda *given: group_logps(*given)[:1]  # without the response mask
                rounds = alternate(lambda: both(row), lambda: both(padded_logps))
                ratios = [[a[i] / b[i] for a, b in rounds] for i in (0, 1)]
                P, sizes = prompt["input_ids"].shape[1], [len(o) for o in responses]
                seen, L = visible_scores(P, sizes), P + sum(sizes)
                note = f"{median(a[1] for a, _ in rounds):.2f} s"
                yield work.name, P, T, G, *map(spread, ratios), f"{L * L / seen:.1f}", note


def mask_waste(P=1000, G=8, T=1000):
    """The attention scores that a dense mask makes a layer compute, as multiples of the visible ones, for
    both layouts."""
    seen = visible_scores(P, [T] * G)
    alone = G * visible_scores(P, [T])
    yield "one row", f"{(P + G * T) ** 2:,}", f"{seen:,}", f"{(P + G * T) ** 2 / seen:.1f}"
    yield f"{G} padded rows", f"{G * (P + T) ** 2:,}", f"{alone:,}", f"{G * (P + T) ** 2 / alone:.1f}"


# ------------------------------------------------------------------------------------------------------------
# 4. A training step: PAPO against GRPO, and its phases
# ------------------------------------------------------------------------------------------------------------


def sizes_of(questions, tokens, G=8):
    """Settings of PAPOConfig for a step of one update."""
    return dict(group_size=G, prompts_per_batch=questions, updates_per_batch=1, max_new_tokens=tokens)


def make_step(work, gamma, questions, tokens):
    """A function that does one whole step (one update) and returns the seconds of its three phases."""
    config = PAPOConfig(gamma=gamma, learning_rate=1e-6, **sizes_of(questions, tokens))
    return phases(work.model, work.processor, config, work.rows(questions))


def phases(model, processor, config, rows):
    """A function that does one whole step, on a copy of the model, and returns the seconds of its three
    phases."""
    run = RunConfig(gradient_checkpointing=False)
    trainer = Trainer(copy.deepcopy(model), processor, config, run, rows)

    def step():
        groups, model = [], trainer.model
        sample = lambda: groups.extend(roll_out(model, processor, config, trainer.rows, trainer.generator)[0])
        return (
            seconds(sample),
            seconds(lambda: score_constants(model, trainer.reference, config, groups)),
            seconds(
                lambda: [
                    papo_step(model, trainer.optimizer, config, update)
                    for update in split_batch(config, groups)
                ]
            ),
        )

    return step


def training_steps(works, questions=(16, 4, 2), tokens=40):
    """gamma 0.02 against gamma 0, beta 0.01: the whole step and its update alone; then how PAPO's step
    divides."""
    for work, n in zip(works, questions):
        rounds = alternate(*(make_step(work, gamma, n, tokens) for gamma in (0.02, 0.0)))
        whole = [sum(papo) / sum(grpo) for papo, grpo in rounds]
        update = [papo[2] / grpo[2] for papo, grpo in rounds]
        shares = [f"{median(papo[i] / sum(papo) for papo, _ in rounds):.0%}" for i in range(3)]
        note = f"{median(sum(papo) for papo, _ in rounds):.2f} s"
        yield work.name, f"{n} x 8 x {tokens}", spread(whole), spread(update), *shares, note


def gated_steps(model, processor, *sizes):
    """The first steps of train_small.py on the digits: in a gated run the rewards decide what is scored with
    the masked image, so they have to be real ones."""
    rows, terms = toy.toy_dataset("train", 256), ("PAPO, gamma 0.3", "gated, gamma 10")
    flags = ["--gamma=0.3"], ["--gamma=10", "--gated=True"], ["--gamma=0"]
    steps = [phases(model, processor, parse_args([*given, *sizes])[0], rows) for given in flags]
    rounds = [[sum(phase) for phase in step] for step in alternate(*steps)]
    for i, name in enumerate(terms):
        ratios = [times[i] / times[-1] for times in rounds]
        yield name, spread(ratios), f"{median(times[i] for times in rounds):.2f} s"


def warm_start():
    """The model and processor that train_small.py starts from; a minute or two where they are not cached."""
    model, processor = toy.warm_start()
    return model.to(DEVICE), processor


def trl_trainer(work, questions, tokens, folder):
    """papo_trl's trainer, with the settings of its program, for the same step in a run of PAIRS + 1."""
    import papo_trl  # needs trl

    flags = dict(sizes_of(questions, tokens), learning_rate=1e-6, steps=PAIRS + 1, out=folder)
    flags |= dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")
    flags |= dict(eval_on_start=False, per_device_train_batch_size=min(32, 8 * questions))
    flags |= dict(bf16=False, disable_tqdm=True)  # fp32, as train_small
    config, _, args = papo_trl.parse_args([f"--{name}={value}" for name, value in flags.items()])
    work.model.save_pretrained(folder)  # where TRL finds the reference policy
    rows = [row | {"row": i} for i, row in enumerate(work.rows(questions))] * (PAIRS + 1)
    trainer = papo_trl.PAPOTrainer(
        type(work.model).from_pretrained(folder),
        config,
        args,
        work.processor,
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_steps(works, questions=(16, 4), tokens=40):
    """A step of train_small against one of papo_trl, gamma 0.02, beta 0.01."""
    for work, n in zip(works, questions):
        small, rounds = make_step(work, 0.02, n, tokens), []

        class InTurn(TrainerCallback):
            """A step of train_small's after each of TRL's, the first round unmeasured."""

            def on_train_begin(self, *_, **__):
                self.stop = start_clock()

            def on_step_end(self, *_, **__):
                theirs, ours = self.stop(), sum(small())
                rounds.append((ours, theirs))
                self.stop = start_clock()

        with tempfile.TemporaryDirectory() as folder:
            trainer = trl_trainer(work, n, tokens, folder)
            trainer.add_callback(InTurn())
            trainer.train()
        notes = [f"{median(times):.2f} s" for times in zip(*rounds[1:])]
        yield work.name, f"{n} x 8 x {tokens}", spread([ours / theirs for ours, theirs in rounds[1:]]), *notes


# ------------------------------------------------------------------------------------------------------------
# 5. Sampling against generate; memory of the log-probabilities
# ------------------------------------------------------------------------------------------------------------


def generate(model, processor, prompts, G, tokens):
    """What sample_groups samples, by transformers' own loop. prompts of one length. -> (n G, tokens)"""
    inputs = {name: torch.cat([prompt[name] for prompt in prompts]).to(model.device) for name in prompts[0]}
    settings = GenerationConfig(
        do_sample=True,
        top_k=0,
        num_return_sequences=G,
        max_new_tokens=tokens,
        suppress_tokens=vision_token_ids(model),
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    with torch.no_grad():
        out = model.generate(**inputs, generation_config=settings)  # (n G, P + tokens)
    return out[:, inputs["input_ids"].shape[1] :]


def sampling(works, questions=(16, 4, 4), tokens=40, G=8):
    """Tokens per second of sample_groups over those of generate, temperature 1."""
    for work, n in zip(works, questions):
        prompts, model, processor = work.prompts(n), work.model, work.processor
        rounds = alternate(
            lambda: seconds(lambda: sample_groups(model, processor, prompts, G, tokens)),
            lambda: seconds(lambda: generate(model, processor, prompts, G, tokens)),
        )
        ratios = [theirs / ours for ours, theirs in rounds]
        rate = n * G * tokens / median(ours for ours, _ in rounds)
        yield work.name, f"{n} x {G} x {tokens}", spread(ratios), f"{rate:,.0f} tokens/s"


def all_logits(hidden, targets, head):
    """What token_logps computes, the usual way: every logit at once."""
    log_probs = head(hidden).float().log_softmax(-1)  # (N, V)
    return log_probs.gather(-1, targets[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def head_peak(way, tokens=1024, H=256, V=151936) -> float:
    """Peak memory in GiB that one call of `way`, with its backward pass, adds to the head itself; in a
    process of its own."""
    head = torch.nn.Linear(H, V, bias=False, device=DEVICE).requires_grad_(False)
    hidden = torch.randn(tokens, H, device=DEVICE, requires_grad=True)
    targets = torch.randint(V, (tokens,), device=DEVICE)
    peak = lambda: torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else peak_rss()
    # On Linux a process inherits its parent's peak; only what lies above it can be seen.
    ballast = torch.ones(int(peak() * 2**28)) if DEVICE.type == "cpu" else None  # noqa: F841
    before = peak()
    way(hidden, targets, head)[0].sum().backward()
    return peak() - before


def head_memory():
    """token_logps against all logits at once, with the published vocabulary."""
    fresh = dict(max_workers=1, mp_context=get_context("spawn"), max_tasks_per_child=1)
    with ProcessPoolExecutor(**fresh) as processes:  # what a process has once used, it may keep
        ours, theirs = processes.map(head_peak, (partial(token_logps, with_entropy=True), all_logits))
    yield "1,024", "151,936", f"{ours / theirs:.2f}", f"{ours:.2f} of {theirs:.2f} GiB"


TABLES = (  # title, columns, the generator of rows
    (
        "A group as one row: time over that of a padded row per response, responses of |o| / 2 to |o| tokens",
        "work, P, &#124;o&#124;, G, score, update, scores computed / visible, one row's update",
        group_rows,
    ),
    (
        "A step of PAPO (gamma 0.02) over one of GRPO, beta 0.01, one update; and how PAPO's step divides",
        "work, questions x G x tokens, whole step, update, sample, score, update's share, PAPO's step",
        training_steps,
    ),
    (
        "The digits, from the warm start: a step over one of GRPO, beta 0.01, two updates",
        "perception term, whole step, its step",
        lambda works: gated_steps(*warm_start()),
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
    (
        "By count: what a dense mask makes attention compute, P = 1,000, G = 8, |o| = 1,000",
        "layout, scores computed, visible, ratio",
        lambda works: mask_waste(),
    ),
)


TRL_TABLE = (
    "A step of train_small over one of papo_trl (gamma 0.02), beta 0.01, one update",
    "work, questions x G x tokens, ratio, train_small, papo_trl",
    trl_steps,
)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ratios of time and memory, side by side in one run.")
    parser.add_argument("--trl", action="store_true", help="add train_small.py against papo_trl.py")
    if (trl := parser.parse_args(argv).trl) and not find_spec("trl"):
        parser.exit(2, "bench.py: error: --trl needs trl: pip install -r requirements-trl.txt\n")
    torch.set_num_threads(1)
    works = make_works()
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "one CPU thread"
    print(
        f"Measured on {where}, torch {torch.__version__}: median (smallest to largest), up to {PAIRS} pairs."
    )
    for title, columns, rows in TABLES + (TRL_TABLE,) * trl:
        print_table(title, columns.split(", "), rows(works))


if __name__ == "__main__":
    main()
