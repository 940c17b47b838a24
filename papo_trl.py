"""PAPO on more than one GPU: papo.py's objective inside TRL's trainer, `torchrun papo_trl.py --gamma 0.02`.

    1. PAPO             PAPOTrainer: papo.py's prompt, masked image, reward, advantages and loss
    2. TRL's plumbing   what PAPOConfig says in TRL's words; what TRL cannot do is refused
    3. the program      flags named as in train_small.py, and any flag of TRL's GRPOConfig; model, data, main

TRL brings the rest: processes, sharding, sampling (its own or vLLM's), the reference policy, optimizer, logs,
checkpoints. Without --model and --dataset it trains the embedded world:
`torchrun --nproc_per_node 2 papo_trl.py`.
"""

import io
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import mean

import datasets
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

import papo
import toy
from papo import PAPOConfig, option

# ------------------------------------------------------------------------------------------------------------
# 1. PAPO
# ------------------------------------------------------------------------------------------------------------


class PAPOTrainer(GRPOTrainer):
    """GRPOTrainer with PAPO's objective. B: responses in one forward pass of one process; P, T: their longest
    prompt and response.

    config: PAPOConfig, kept as self.papo. model: loaded from a hub name or folder, where TRL finds the
    reference policy again. kwargs: the others of GRPOTrainer; train_dataset has columns images (one, as
    fit_image leaves it), problem, answer, row (its number). Raises ValueError as check_settings does."""

    # ---- PAPO, in the order of a step ----

    def _generate_and_score_completions(self, inputs):
        """Sample with PAPO's prompts; add its advantages and the pixels of each response's masked image."""
        prompts = [{**row, "prompt": papo.chat_messages(row["problem"])} for row in inputs]
        batch = super()._generate_and_score_completions(prompts)
        if self.model.training:  # evaluation wants the rewards only
            advantages = papo.group_advantages(self.rewards.view(-1, self.papo.group_size)).flatten()
            start = self.accelerator.process_index * len(inputs)
            batch["advantages"] = advantages[start : start + len(inputs)]  # (responses of this process,)
            if self.papo.gamma or self.papo.eta2:
                groups = {row["row"]: row for row in inputs}
                masked = {number: self.masked_pixels(row) for number, row in groups.items()}
                # A list with an entry for each response: TRL shuffles and splits it as it does the others.
                batch["masked_pixels"] = [masked[row["row"]] for row in inputs]
        return batch

    def masked_pixels(self, row):
        """(patches, channels x time x patch^2). Seeded by step and row: a group's mask is one everywhere."""
        seed = random.Random(f"{self.args.seed} {self.state.global_step} {row['row']}").getrandbits(63)
        generator = torch.Generator().manual_seed(seed)
        masked = papo.mask_patches(row["images"][0], self.papo.mask_ratio, self.papo.patch_size, generator)
        pixels = papo.mask_prompt(self.processing_class, {}, masked)["pixel_values"]
        return pixels.to(self.accelerator.device)

    def reward(self, completion_ids, answer, log_metric, **_):
        """TRL's reward function: compute_reward of each response, read as papo.sample_and_grade reads it."""
        question = papo.chat_messages("")
        chat = self.processing_class.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        # Thinking models' chat templates open the <think> themselves; the format rule wants to see it.
        opening = "<think>" if chat.rstrip().endswith("<think>") else ""
        texts = [opening + self._tokenizer.decode(ids, skip_special_tokens=True) for ids in completion_ids]
        scores = [papo.compute_reward(*pair, self.papo.format_weight) for pair in zip(texts, answer)]
        for name in ("accuracy", "format"):
            log_metric(name, mean(score[name] for score in scores))
        return [score["reward"] for score in scores]

    def _compute_loss(self, model, inputs):
        """papo_loss of B responses, weighted so that an update's gradient is that of one mean over it all."""
        config = self.papo
        logps, entropy = self.score(model, inputs, inputs["pixel_values"], config.eta1)  # (B, T) each
        masked_logps, masked_entropy = None, None
        if "masked_pixels" in inputs:
            with torch.set_grad_enabled(config.mask_gradient != "detached"):
                pixels = torch.cat(inputs["masked_pixels"])  # (B x patches, channels x time x patch^2)
                masked_logps, masked_entropy = self.score(model, inputs, pixels, config.eta2)  # (B, T) each
        old_logps = inputs.get("old_per_token_logps", logps.detach())  # left out where pi_old is pi_theta
        ref_logps = inputs.get("ref_per_token_logps")  # (B, T)
        advantages, response_mask = inputs["advantages"], inputs["completion_mask"]  # (B,), (B, T)
        if "importance_sampling_ratio" in inputs:  # vLLM's, one factor a response, for its policy term
            advantages = advantages * inputs["importance_sampling_ratio"][:, 0]  # (B,)
        scores = masked_logps, ref_logps, entropy, masked_entropy
        loss, metrics = papo.papo_loss(config, logps, old_logps, advantages, response_mask, *scores)
        del metrics["loss"]  # TRL logs its own
        means = self.accelerator.reduce(torch.tensor(list(metrics.values()), device=loss.device), "mean")
        for name, value in zip(metrics, means.tolist()):
            self._metrics["train"][name].append(value)
        return loss * self.share(response_mask)

    # ---- TRL's plumbing ----

    def __init__(self, model, config, args, processing_class, **kwargs):
        check_settings(config, args)
        self.papo = replace(config, patch_size=processing_class.image_processor.patch_size)
        never = papo.vision_token_ids(model)  # in a response they would be taken for image positions
        ban = {"logit_bias": dict.fromkeys(never, -100.0)} if args.use_vllm else {"suppress_tokens": never}
        args.generation_kwargs = {**(args.generation_kwargs or {}), **ban}
        super().__init__(model, self.reward, args, processing_class=processing_class, **kwargs)

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)  # (responses of all processes, 1)
        return self.rewards

    def score(self, model, inputs, pixels, weight):
        """Log-probs of the responses (B, T) and their exact entropies (B, T), None if the sampled ones are
        wanted. weight: the entropy's in the loss."""
        logps, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),  # (B, P + T)
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),  # (B, P + T)
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            pixel_values=pixels,
            **{name: inputs[name] for name in ("image_grid_thw", "num_images", "mm_token_type_ids")},
        )
        if self.papo.entropy_estimate == "sampled":
            return logps, None
        if weight and logps.requires_grad and not entropy.requires_grad:
            raise RuntimeError("this TRL's entropies carry no gradient: eta1 and eta2 need trl 1.16")
        return logps, entropy

    def share(self, response_mask):
        """What this mean counts in the update's: TRL adds up micro-batches and averages over processes."""
        accumulation = self.args.gradient_accumulation_steps
        if self.papo.aggregation == "sequence":
            return 1 / accumulation
        start = self._step % self.args.steps_per_generation // accumulation * accumulation
        update = self._buffered_inputs[start : start + accumulation]
        tokens = self.accelerator.reduce(sum(part["completion_mask"].sum() for part in update))
        return response_mask.sum() * self.accelerator.num_processes / tokens

    def prediction_step(self, model, inputs, *args, **kwargs):
        self._prepare_inputs(inputs)  # samples, and logs the rewards; there is no loss to evaluate
        return None, None, None


# ------------------------------------------------------------------------------------------------------------
# 2. TRL's plumbing
# ------------------------------------------------------------------------------------------------------------

# What TRL's own loss or papo.py's own loop would read: without effect here, so refused.
NO_EFFECT = (
    "loss_type epsilon epsilon_high delta importance_sampling_level scale_rewards reward_weights "
    "multi_objective_aggregation use_adaptive_entropy entropy_coef top_entropy_quantile "
    "off_policy_mask_threshold use_bias_correction_kl max_redraws prompts_per_sample tokens_per_forward"
).split()


def trl_settings(config, per_device, processes):
    """PAPOConfig in GRPOConfig's words. per_device: TRL's --per_device_train_batch_size, which is B."""
    responses = config.prompts_per_batch * config.group_size
    accumulation, rest = divmod(responses, per_device * processes * config.updates_per_batch)
    if rest:
        raise ValueError(
            f"{responses} responses do not split into {config.updates_per_batch} updates on {processes} "
            f"processes in passes of {per_device}: set --per_device_train_batch_size"
        )
    same = ("temperature", "top_p", "beta", "learning_rate", "weight_decay", "max_grad_norm")
    return {name: getattr(config, name) for name in same} | dict(
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * config.updates_per_batch,
    )


def check_settings(config, args):
    """Raises ValueError for what TRL cannot do, settings without effect, and args that contradict config."""
    if config.dynamic_sampling:
        raise ValueError("TRL has no dynamic sampling: DAPO and PAPO-D train with train_small.py")
    if args.use_vllm and args.vllm_importance_sampling_mode.startswith("token"):
        raise ValueError(
            "token-wise vLLM corrections do not fit papo_loss, whose advantages are one a response"
        )
    for given in (config, args):
        for field in fields(given):
            if field.name in NO_EFFECT and getattr(given, field.name) != field.default:
                raise ValueError(f"--{field.name} has no effect on PAPO under TRL")
    for name, value in trl_settings(config, args.per_device_train_batch_size, args.world_size).items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name} is {value} by PAPO's flags, not {getattr(args, name)}")


# ------------------------------------------------------------------------------------------------------------
# 3. The program
# ------------------------------------------------------------------------------------------------------------

TOY_SIZES = dict(
    group_size=8, prompts_per_batch=16, updates_per_batch=2, max_new_tokens=64, learning_rate=1e-4
)


@dataclass
class RunFlags:
    """Flags of train_small.py that neither PAPOConfig nor GRPOConfig has."""

    preset: str = option(
        None, "a published recipe: papo-g-3b, papo-g-7b, papo-g-qwen3-2b, papo-g-no-ref, grpo"
    )
    model: str = option(None, "hub name or folder of a Qwen-VL; default: the embedded world's")
    dataset: str = option(None, "hub name, folder, .parquet or .jsonl; default: the embedded world's")
    split: str = option("train", "its last --eval_size questions, at most a quarter, are held out")
    image_column: str = option("images", "column with the image, or a list of one")
    problem_column: str = option("problem", "column with the question, which may say <image>")
    answer_column: str = option("answer", "column with the answer")
    min_pixels: int = option(200704, "smaller images of --dataset are enlarged to this area")
    max_pixels: int = option(1003520, "larger images of --dataset are reduced to this area")
    max_prompt_tokens: int = option(4096, "rows of --dataset with a longer prompt are skipped")
    digits: int = option(4, "embedded world: handwritten digits per image, 1 to 9")
    steps: int = option(None, "rollout batches; default 40 in the embedded world, else --num_train_epochs 2")
    eval_size: int = option(96, "held-out questions, each answered group_size times")
    eval_every: int = option(10, "steps between evaluations")
    save_every: int = option(10, "steps between checkpoints")
    out: str = option("runs/papo_trl", "folder of the run")


class Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(message)  # argparse would print the whole usage first


def parse_args(argv=None):
    """PAPO's flags first, TRL's from what is left: both know a --learning_rate. -> config, run, args"""
    parser = Parser([PAPOConfig, RunFlags], description=__doc__.split("\n")[0], allow_abbrev=False)
    first, _ = parser.parse_known_args(argv)
    if first.preset:
        recipe = vars(PAPOConfig.preset(first.preset))
        parser.set_defaults(**recipe | dict(masked_grad=None))  # it follows eta2, which a flag may change
    elif not first.model:
        parser.set_defaults(**TOY_SIZES)
    config, run, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if run.dataset and not run.model:
        raise ValueError("--dataset needs --model: the embedded world's model knows only its own questions")
    steps = run.steps or (None if run.dataset else 40)
    updates = config.updates_per_batch  # a step is a rollout batch, TRL counts updates
    parser = Parser(GRPOConfig, allow_abbrev=False)
    parser.set_defaults(
        output_dir=run.out,
        seed=0,
        per_device_train_batch_size=8 if run.model else 32,
        per_device_eval_batch_size=4 * config.group_size,
        gradient_checkpointing=bool(run.model),
        use_cpu=not torch.cuda.is_available(),  # else accelerate takes several processes for one
        bf16=torch.cuda.is_available(),  # the passes; weights are fp32
        lr_scheduler_type="constant",
        ddp_find_unused_parameters=False,
        num_train_epochs=2,
        max_steps=steps * updates if steps else -1,
        logging_steps=1,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=run.eval_every * updates,
        save_steps=run.save_every * updates,
    )
    per_device = parser.parse_args(rest).per_device_train_batch_size
    parser.set_defaults(**trl_settings(config, per_device, int(os.environ.get("WORLD_SIZE", 1))))
    [args] = parser.parse_args_into_dataclasses(rest)
    return config, run, args


def load_model(run, args):
    """Model and processor. The embedded world's go through a folder, where TRL finds the reference policy."""
    if not run.model:
        torch.set_num_threads(1)  # tensors this small lose by a second core
        run.model = f"{run.out}/start"
        if args.process_index == 0:
            for part in toy.warm_start(digits=run.digits, seed=args.seed):
                part.save_pretrained(run.model)
    processor = AutoProcessor.from_pretrained(run.model)
    if run.dataset:
        processor.image_processor.size = {"shortest_edge": run.min_pixels, "longest_edge": run.max_pixels}
    return AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32), processor


def load_rows(run, args, processor):
    """PAPOTrainer's rows, to train on and held out: those of train_small.py."""
    if not run.dataset:
        both = [
            toy.toy_dataset(split, size, run.digits, seed)
            for split, size, seed in (("train", 2048, args.seed), ("test", run.eval_size, 0))
        ]
        return [rows.add_column("row", range(len(rows))) for rows in both]
    path = Path(run.dataset)
    builder = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}.get(path.suffix)
    saved = (path / "state.json").exists()
    if (builder or saved) and run.split != "train":
        raise ValueError(f"--split {run.split}: {run.dataset} has no splits")
    if builder:
        rows = datasets.load_dataset(builder, data_files=run.dataset, split="train")
    elif saved:
        rows = datasets.load_from_disk(run.dataset)
    else:
        rows = datasets.load_dataset(run.dataset, split=run.split)
    rows = fit_rows(rows, path if path.is_dir() else path.parent, run, processor)
    if len(rows) < 2:
        raise ValueError(f"--dataset {run.dataset}: {len(rows)} usable rows, at least 2 are needed")
    end = len(rows) - max(1, min(run.eval_size, len(rows) // 4))
    return rows.select(range(end)), rows.select(range(end, len(rows)))


# What Pillow raises for a damaged or huge file.
UNREADABLE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)


def read_row(row, folder, run, processor):
    """A row in PAPOTrainer's columns. Raises ValueError with the reason, or UNREADABLE, if it is unusable."""
    images, problem, answer = row[run.image_column], row[run.problem_column], row[run.answer_column]
    images = [image for image in (images if isinstance(images, list) else [images]) if image is not None]
    if len(images) != 1:
        raise ValueError("more than one image" if images else "no image")
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError("problem is no text")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError("answer is no text or number")
    [image] = images
    if isinstance(image, dict):  # undecoded: {bytes, path}
        image = Image.open(io.BytesIO(image["bytes"])) if image.get("bytes") else image.get("path")
    if isinstance(image, str) and "://" not in image and not image.startswith("data:"):
        image = Image.open(folder / image)
    if not isinstance(image, str | Image.Image):
        raise ValueError("unreadable image")
    image = papo.fit_image(processor, image)
    prompt = papo.encode_prompt(processor, problem, image)
    if prompt["input_ids"].shape[1] > run.max_prompt_tokens:
        raise ValueError(f"prompt longer than {run.max_prompt_tokens} tokens")
    return dict(images=[image], problem=problem, answer=str(answer).strip())


def fit_rows(rows, folder, run, processor):
    """Images fitted once, for TRL reads a row G times and more; unusable rows are left out and counted."""
    if missing := {run.image_column, run.problem_column, run.answer_column} - set(rows.column_names):
        raise ValueError(f"--dataset {run.dataset} has no column {', '.join(missing)}; see --image-column")

    def fit(row, number):
        try:
            return dict(read_row(row, folder, run, processor), row=number, why="")
        except ValueError as error:
            why = str(error)
        except UNREADABLE:
            why = "unreadable image"
        return dict(images=[], problem="", answer="", row=number, why=why)

    text, number, images = datasets.Value("string"), datasets.Value("int64"), datasets.List(datasets.Image())
    features = datasets.Features(images=images, problem=text, answer=text, row=number, why=text)
    rows = rows.map(fit, with_indices=True, remove_columns=rows.column_names, features=features)
    reasons = rows["why"][:]
    for why, count in Counter(filter(None, reasons)).items():
        print(f"skipped {count} rows: {why}")
    return rows.select([i for i, why in enumerate(reasons) if not why])


def main(argv=None):
    """The command. Exit code 2 and one line for what the user can mend."""
    try:
        config, run, args = parse_args(argv)
        check_settings(config, args)
        with args.main_process_first():  # the others find what it has written
            model, processor = load_model(run, args)
            rows, held_out = load_rows(run, args, processor)
        trainer = PAPOTrainer(model, config, args, processor, train_dataset=rows, eval_dataset=held_out)
    except (ValueError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        print(f"papo_trl.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(f"{run.out}/checkpoint")


if __name__ == "__main__":
    main()
