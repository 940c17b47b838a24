"""Train a Qwen vision-language model with PAPO on one machine: `python train_small.py`.

Without --model and --dataset it trains the embedded world of toy.py: a tiny Qwen2.5-VL that adds
handwritten digits, on a CPU, offline, in minutes. With them, any Qwen2-VL, Qwen2.5-VL or Qwen3-VL
on any data set of images, questions and answers. papo.py is the algorithm, program/ the rest.
"""

import copy
import json
import math
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Literal

import datasets
import optimi
import peft
import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

import papo
import toy
from papo import PAPOConfig, compute_reward, option
from program import SAMPLES, TOY_SIZES, Parser, UserError, memory, report, runs
from program.data import DataConfig, RowStream, load_rows, say_skipped
from program.model import load_model, weights_id

# ---- 1. Flags ------------------------------------------------------------------------------------

# What makes an algorithm, without the sizes of the published runs: these fields of that preset.
ALGORITHMS = {"grpo": "grpo", "dapo": "dapo", "papo-g": "papo-g-3b", "papo-d": "papo-d-3b"}
ALGORITHM_FIELDS = "gamma beta eta1 eta2 clip_high aggregation dynamic_sampling".split()
# What suits the embedded world; --preset brings the published sizes back.
TOY = TOY_SIZES | dict(steps=40, prompts_per_sample=48, gradient_checkpointing=False)
# --gpu-memory: what fits with a 3B model and prompts of 1,536 tokens, 1,280 of them the image's.
ADAPTER = dict(precision="bf16", freeze_vision=True)
GPU_SIZES = {
    24: ADAPTER | dict(lora=16, prompts_per_sample=4, max_new_tokens=1024, tokens_per_forward=4096),
    48: ADAPTER | dict(lora=64, prompts_per_sample=12, max_new_tokens=2048),
    80: dict(precision="bf16-kahan", prompts_per_sample=16, max_new_tokens=2048),
}


@dataclass
class RunConfig(DataConfig):
    """What to train, on what, and where to write it. Raises ValueError for what cannot work."""

    _argument_group_name = "run"
    algorithm: Literal["grpo", "dapo", "papo-g", "papo-d"] = option("papo-g", "what is optimised")
    preset: str = option(None, "every value of a published recipe, such as papo-g-7b or papo-d-3b")
    model: str = option(None, "hub name or folder of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL")
    gpu_memory: Literal[24, 48, 80] = option(None, "settings for a GPU of so many GiB")
    steps: int = option(None, "rollout batches to train on; without: two epochs, as published")
    seed: int = option(0, "decides the warm start, the questions, the samples and the masks")
    out: str = option(None, "folder of the run; without: runs/ALGORITHM-gammaGAMMA-seedSEED")
    resume: bool = option(False, "go on with the run in --out exactly from its checkpoint")
    eval_only: bool = option(False, "do not train: answer all questions, with the image and masked")
    eval_every: int = option(10, "steps between evaluations, 8 answers to each held-out question")
    save_every: int = option(10, "steps between checkpoints; the last step always writes one")
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = option("none", "also log to it")
    task: Literal["sum", "largest"] = option("sum", "embedded world: what is asked")
    digits: int = option(4, "embedded world: handwritten digits per image, 1 to 9")
    precision: Literal["fp32", "bf16", "bf16-kahan"] = option("fp32", "of the weights")
    lora: int = option(None, "train an adapter of this rank, at ten times the learning rate")
    merge: bool = option(False, "with --lora: checkpoints are whole models, in fp32")
    freeze_vision: bool = option(False, "keep the vision tower; it then sees each image once")
    gradient_checkpointing: bool = option(True, "recompute activations: less memory, more time")

    def __post_init__(self):
        super().__post_init__()
        toy_flags = self.task != "sum" or self.digits != 4
        plain_bf16 = self.precision == "bf16" and not self.lora and not self.eval_only
        for wrong, reason in (
            (not 0 <= self.seed < 2**32, f"seed must lie in [0, 2^32), got {self.seed}"),
            (self.digits > 9, f"digits must lie in [1, 9], got {self.digits}"),
            (self.eval_only and self.resume, "--eval-only trains nothing to --resume"),
            (self.dataset and not self.model, "--dataset needs --model"),
            (self.dataset and toy_flags, "--task and --digits are of the embedded world"),
            (self.merge and not self.lora, "--merge needs --lora"),
            (self.lora and not self.model and not self.merge, "--lora needs --model, or --merge"),
            (not self.model and self.precision != "fp32", "--precision, --gpu-memory need --model"),
            (plain_bf16, "AdamW on bf16 loses most updates: --lora, or --precision bf16-kahan"),
        ):
            if wrong:
                raise ValueError(reason)


def recipe_for(given):
    """{flag: value} where none is given: --gpu-memory beats --preset or --algorithm, which beat the
    dataclasses. A run that goes on is what it was."""
    if given.resume and given.out and (recorded := runs.read_record(given.out)["settings"]):
        own = vars(given).keys() - {"resume", "out"}
        return {name: value for name, value in recorded.items() if name in own}
    recipe = asdict(PAPOConfig.preset(given.preset or ALGORITHMS[given.algorithm]))
    if given.preset:
        recipe["algorithm"] = next(a for a in ALGORITHMS if given.preset.startswith(a))
    else:
        recipe = {name: recipe[name] for name in ALGORITHM_FIELDS}
        recipe |= {} if given.model else TOY
    recipe |= GPU_SIZES.get(given.gpu_memory, {})
    if given.lora or "lora" in recipe:
        full = recipe.get("learning_rate", PAPOConfig.learning_rate)
        # Ten times, as "LoRA Without Regret", 2025; rounded, 1e-05 is not 9.99e-06.
        recipe["learning_rate"] = round(10 * full, 12)
    return recipe


def parse_args(argv=None) -> tuple[PAPOConfig, RunConfig]:
    """The settings. Raises UserError for what cannot work."""
    about = dict(usage="python train_small.py [FLAGS]", description=__doc__.split(":")[0])
    about |= dict(epilog=f"Defaults of the embedded world: {TOY}.", allow_abbrev=False)
    parser = Parser([PAPOConfig, RunConfig], **about)
    try:
        parser.set_defaults(**recipe_for(parser.parse_args(argv)))
        config, run = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        raise UserError(error) from None
    if run.preset and not run.preset.startswith(run.algorithm):
        raise UserError(f"--preset {run.preset} is not --algorithm {run.algorithm}: leave one out")
    if run.algorithm in ("grpo", "dapo") and (config.gamma or config.eta1 or config.eta2):
        raise UserError(f"{run.algorithm} with gamma, eta1, eta2 is --algorithm papo-g or papo-d")
    name = f"{run.preset or run.algorithm}-gamma{config.gamma:g}-seed{run.seed}"
    run.out = run.out or f"runs/{'eval' if run.eval_only else name}"
    return config, run


# ---- 2. Model ------------------------------------------------------------------------------------


def load(run):
    """Model (in host memory), processor, rows to train on, held-out rows."""
    if run.model:
        model, processor = load_model(run)
    else:
        # Tensors this small gain little from a second core, and lose a lot where it is busy.
        torch.set_num_threads(1)
        model, processor = toy.warm_start(run.digits, run.seed, task=run.task)
    if run.dataset:
        return model, processor, *load_rows(run, processor, training=not run.eval_only)
    for task in toy.TASKS.keys() - {run.task}:  # each has a vocabulary of its own
        if processor.tokenizer.get_vocab() == toy.toy_processor(task).tokenizer.get_vocab():
            raise UserError(f"--model {run.model} answers --task {task}, not --task {run.task}")
    rows = toy.toy_dataset("train", 2048, run.digits, run.seed, run.task)
    held_out = toy.toy_dataset("test", run.eval_size, run.digits, 0, run.task)  # for every seed
    return model, processor, rows, held_out


best_device = lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- 3. Evaluation: avg@8 ------------------------------------------------------------------------


def evaluate(model, processor, config, rows, seed=0, masked=False, reward=compute_reward):
    """Answer every question SAMPLES times at temperature 1, masked: with random masks on the
    images, the same in every call. Returns the Groups, in the order of rows, without images and
    prompts."""
    config = replace(config, group_size=SAMPLES, temperature=1.0, top_p=1.0)
    sampling = torch.Generator(model.device).manual_seed(seed)
    masking = torch.Generator().manual_seed(seed)
    mask = lambda image: papo.mask_patches(image, config.mask_ratio, config.patch_size, masking)
    groups = []
    for start in range(0, len(rows), config.prompts_per_sample):
        share = []
        for i in range(start, min(start + config.prompts_per_sample, len(rows))):
            row = dict(rows[i])
            images, prompt = row.pop("images"), row.pop("prompt", None)  # of rows that were checked
            if masked:
                images = [mask(papo.fit_image(processor, image)) for image in images]
            if masked or prompt is None:
                prompt = papo.encode_prompt(processor, row["problem"], images)
            share.append(row | {"prompt": prompt})
        answered = papo.sample_and_grade(model, processor, config, share, sampling, reward)
        groups += [replace(group, prompt=None) for group in answered]
    return groups


def summarise(groups):
    """Means: accuracy, pass@8, and in the embedded world by vision dependency and error type."""
    right = [[score["accuracy"] for score in group.scores] for group in groups]
    summary = {"accuracy": mean(map(mean, right)), f"pass@{SAMPLES}": mean(map(max, right))}
    for level in ("low", "medium", "high"):
        some = [mean(r) for r, g in zip(right, groups) if g.row.get("dependency") == level]
        if some:
            summary[f"accuracy_{level}"] = mean(some)
    if "digits" in groups[0].row:
        errors = Counter(toy.error_type(text, g.row) for g in groups for text in g.texts)
        for kind in toy.ERROR_TYPES:
            summary[f"error_{kind}"] = errors[kind] / (len(groups) * SAMPLES)
    return summary


def grounding(seen, masked):
    """Share of the right answers that the picture decides: right with it, wrong with it masked,
    over all right ones, a question's answers with and without mask being drawn independently."""
    right = lambda groups: [mean(score["accuracy"] for score in g.scores) for g in groups]
    pairs = list(zip(right(seen), right(masked)))
    return sum(p * (1 - q) for p, q in pairs) / max(sum(p for p, _ in pairs), 1e-9)


# ---- 4. Training loop ----------------------------------------------------------------------------


def averages(dicts):
    """Each entry's mean over the dicts that have it."""
    names = dict.fromkeys(chain(*dicts))
    return {name: mean(d[name] for d in dicts if name in d) for name in names}


class Trainer:
    """All that changes during a run. Your own objective and reward may take papo.py's place."""

    def __init__(self, model, processor, config, run, rows):
        self.model, self.processor, self.config, self.run = model, processor, config, run
        self.objective, self.reward = papo.papo_loss, compute_reward
        self.rows, self.steps_done = RowStream(rows, run.seed), 0
        self.data = getattr(rows, "fingerprint", str)()  # "" of the embedded world
        self.generator = torch.Generator().manual_seed(run.seed)
        self.seconds, self.memory, self.adapter = Counter(), {}, None
        if run.freeze_vision:
            model.model.visual.requires_grad_(False)
        self.base = weights_id(model) if run.lora else None
        if run.lora:  # layers are replaced inside the model, so papo.py sees the same model as ever
            kind = dict(r=run.lora, lora_alpha=2 * run.lora, target_modules=memory.ADAPTED)
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                self.adapter = peft.get_peft_model(model, peft.LoraConfig(**kind))
        copied = config.beta and not run.lora
        frozen = copy.deepcopy(model).requires_grad_(False) if copied else None
        self.reference = self.without_adapter if run.lora else lambda: nullcontext(frozen)
        if run.gradient_checkpointing:
            old = model.gradient_checkpointing_enable  # its name before transformers 5.24
            getattr(model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        kahan = run.precision == "bf16-kahan" and not run.lora  # an adapter's weights are fp32
        kind = partial(optimi.AdamW, kahan_sum=True) if kahan else torch.optim.AdamW
        settings = dict(lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8)
        self.optimizer = kind(trained, weight_decay=config.weight_decay, **settings)

    @contextmanager
    def without_adapter(self):
        """The reference policy under LoRA: the same model with its adapter off, no second copy."""
        with self.adapter.disable_adapter():
            yield self.model

    @contextmanager
    def phase(self, name):
        """Time a phase, note the peak memory so far, and explain it where it ran out."""
        start = time.perf_counter()
        with memory.explain_out_of_memory(self.config, name):
            yield
        self.seconds[name] += time.perf_counter() - start
        self.memory[name] = memory.peak_memory(self.model.device)

    def step(self) -> dict:
        """Roll out one batch and train on it. Returns the metrics of papo_step, averaged over the
        updates, and the rollout's. What was not measured, or is not finite, is left out."""
        model, config, source = self.model, self.config, (self.rows, self.generator, self.reward)
        with self.phase("sample"):
            groups, redraws = papo.roll_out(model, self.processor, config, *source)
        with self.phase("score"):
            papo.score_constants(model, self.reference, config, groups)
        with self.phase("update"):
            updates = [
                papo.papo_step(model, self.optimizer, config, update, self.objective)
                for update in papo.split_batch(config, groups)
            ]
        self.steps_done += 1
        responses = [o for group in groups for o in group.responses]  # LongTensors (<= T,)
        ends, longest = papo.end_tokens(model, self.processor), config.max_new_tokens
        cut = [len(o) == longest and o[-1].item() not in ends for o in responses]
        metrics = {
            "step": self.steps_done,
            **averages([score for group in groups for score in group.scores]),
            **averages(updates),
            "groups": len(groups),
            "mixed": sum(group.mixed for group in groups),
            "redraws": redraws,
            "response_tokens": mean(map(len, responses)) if groups else 0.0,
            "cut_fraction": mean(cut) if groups else math.nan,
        }
        return {name: value for name, value in metrics.items() if math.isfinite(value)}

    def evaluation(self, rows):
        """Held-out accuracy, also with the image masked, as entries of metrics.jsonl."""
        look = lambda m: evaluate(self.model, self.processor, self.config, rows, 0, m, self.reward)
        with self.phase("evaluate"):
            seen, masked = look(False), look(True)
        found = {**summarise(seen), "accuracy_masked": summarise(masked)["accuracy"]}
        found["grounding"] = grounding(seen, masked)
        return {f"eval_{name}": value for name, value in found.items()}

    def save(self, folder, history):
        """A checkpoint: weights, processor, model card, trainer state, settings, metrics so far."""
        # An adapter's own weights are small, and not rounded by a merge.
        adapter = peft.get_peft_model_state_dict(self.adapter) if self.adapter else None
        model, run = self.adapter or self.model, self.run
        if run.merge:  # in fp32: what is added to a bf16 weight is mostly rounded away
            weights = {  # deepcopy's memo: in host memory, as a GPU may have no room for two models
                id(p): torch.nn.Parameter(p.detach().to("cpu", torch.float32, copy=True))
                for p in self.adapter.parameters()
            }
            model = copy.deepcopy(self.adapter, weights).to("cpu").merge_and_unload()
        record = {"settings": runs.settings_of(self.config, run), "history": history}
        texts = {"README.md": report.model_card(self.config, run, history)}
        texts["run.json"] = json.dumps(record, allow_nan=False)
        if self.adapter and not run.merge:  # to be told if what is loaded is another base
            texts["base.json"] = json.dumps({"weights": self.base})
        state = {"step": self.steps_done, "rows": self.rows.count, "data": self.data}
        state |= {"adapter": adapter, "generator": self.generator.get_state()}
        state["optimizer"] = self.optimizer.state_dict()
        runs.save_checkpoint(folder, [model, self.processor], texts, state)

    def load(self, folder):
        """Go on from a checkpoint of the same run, bit for bit."""
        try:
            state = torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
            if self.adapter:
                peft.set_peft_model_state_dict(self.adapter, state["adapter"])
            else:
                saved = AutoModelForImageTextToText.from_pretrained(folder, dtype=self.model.dtype)
                self.model.load_state_dict(saved.state_dict())
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # missing, cut off, or of another model
            raise UserError(f"--resume: {folder} cannot be loaded: {error!r}") from None
        if (before := state["data"]) != self.data:
            raise UserError(f"--resume: {folder} is of {before}, --dataset has now {self.data}")
        self.generator.set_state(state["generator"])
        self.steps_done, self.rows.count = state["step"], state["rows"]


def train_steps(trainer, held_out, history, log):
    """Train to run.steps, or to the end of the step that a signal falls into."""
    run, done = trainer.run, trainer.steps_done
    bar = tqdm(range(done + 1, run.steps + 1), run.algorithm, run.steps, initial=done, unit="step")
    with runs.note_signals() as caught:
        for step in bar:
            metrics = trainer.step()  # roll out, score the constants, update
            due = lambda every: step % every == 0 or step == run.steps
            if due(run.eval_every):
                metrics |= trainer.evaluation(held_out)
            history.append(metrics)
            runs.append_line(Path(run.out) / "metrics.jsonl", metrics)
            log(metrics)
            bar.set_postfix({k: metrics[k] for k in ("reward", "kl_prcp") if k in metrics})
            stopping = bool(caught)  # read once: a later signal is for the next step
            if due(run.save_every) or stopping:
                trainer.save(Path(run.out) / "checkpoint", history)
            if stopping and step < run.steps:
                raise KeyboardInterrupt(caught[0])


# ---- 5. The program ------------------------------------------------------------------------------


def train(config, run):
    """The whole run: load, evaluate, train with evaluations in between, leave all in run.out."""
    out, settings = Path(run.out), runs.settings_of(config, run)
    history = runs.find_run(out, settings) if run.resume else []
    with nullcontext() if run.resume else runs.claimed_folder(out):
        log = runs.open_tracker(run.report_to, out, settings, len(history))
        model, processor, rows, held_out = load(run)
        config = replace(config, patch_size=processor.image_processor.patch_size)
        run.steps = run.steps or math.ceil(2 * len(rows) / config.prompts_per_batch)  # two epochs
        examples = [held_out[i] for i in range(min(3, len(held_out)))]
        questions = f"{len(rows):,} questions to train on, {len(held_out)} held out"
        plan = report.describe(model, config, run, questions, best_device())
        if run.dataset:  # said before anything is on the GPU: it may be too much
            images = max(len(row["images"]) for row in examples)
            sizes = memory.estimate_memory(model, config, run, images)
            plan["memory"] = memory.memory_text(sizes, best_device())
        report.print_block(plan)
        with memory.explain_out_of_memory(config, "load"):
            trainer = Trainer(model.to(best_device()), processor, config, run, rows)
    look = lambda: report.look_closely(model, processor, config, examples, trainer.reward)
    with trainer.phase("evaluate"):
        before = look()
    if (out / "checkpoint").exists():
        trainer.load(out / "checkpoint")
    else:
        history = [{"step": 0, **trainer.evaluation(held_out)}]
        log(history[0])
    settings = {
        **runs.settings_of(config, run),
        "versions": report.versions(),
        "on": plan["device"],
    }
    runs.write_whole(out / "config.json", json.dumps(settings, indent=2, allow_nan=False) + "\n")
    runs.write_whole(out / "metrics.jsonl", runs.as_lines(history))
    train_steps(trainer, held_out, history, log)
    say_skipped(getattr(rows, "skipped", {}).values())
    report.leave_behind(out, plan, history, before, look(), trainer.seconds, trainer.memory)


def evaluate_only(config, run):
    """avg@8 and pass@8 with the image and with it masked, question by question in eval.jsonl."""
    with runs.claimed_folder(run.out, ("eval.jsonl",)) as out:
        model, processor, _, rows = load(run)
        config = replace(config, patch_size=processor.image_processor.patch_size)
        questions = f"{len(rows)} questions, answered {SAMPLES} times with the image and masked"
        report.print_block(report.describe(model, config, run, questions, best_device()))
        with memory.explain_out_of_memory(config, "evaluate"):
            given = model.to(best_device()), processor, config, rows
            seen, masked = evaluate(*given), evaluate(*given, masked=True)
    runs.write_whole(out / "eval.jsonl", runs.as_lines(report.answer_lines(seen, masked)))
    columns = {"image": summarise(seen), "masked": summarise(masked)}
    columns["gap"] = {k: v - columns["masked"][k] for k, v in columns["image"].items()}
    report.print_table(f"{len(rows)} questions, % of responses", columns)
    print(f"{report.MEASURES['grounding']:36}{100 * grounding(seen, masked):8.1f}")
    print(f"\n{(out / 'eval.jsonl').resolve().as_uri()}")


def main(argv=None):
    """The command. Exit code 2 and one line for what the user can mend, 128 + N for signal N."""
    # A library's progress bars and its plans for later versions are not the user's business.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if hasattr(sys.stdout, "reconfigure"):  # a letter that a terminal cannot show is no error
        sys.stdout.reconfigure(errors="replace")
    run = None
    try:
        config, run = parse_args(argv)
        (evaluate_only if run.eval_only else train)(config, run)
    except UserError as error:
        print(f"train_small.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:  # with the number of a signal after which all was saved
        print("\nstopped", file=sys.stderr)
        if run and (Path(run.out) / "config.json").exists():
            print(f"go on: python train_small.py --resume --out {run.out!r}", file=sys.stderr)
        sys.exit(128 + (stop.args or [signal.SIGINT])[0])


if __name__ == "__main__":
    main()
