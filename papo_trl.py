"""PAPO on more than one GPU: papo.py's objective in TRL's trainer, by `torchrun papo_trl.py`.

TRL brings processes, sharding, sampling (its own or vLLM's), the reference policy, optimizer, logs,
checkpoints. Flags are PAPOConfig's, RunFlags' and TRL's. `torchrun --nproc_per_node 2 papo_trl.py`
trains the embedded world on two processes.
"""

import os
import random
import sys
from dataclasses import dataclass, fields, replace
from statistics import mean

import datasets
import torch
from transformers import AutoModelForImageTextToText
from trl import GRPOConfig, GRPOTrainer

import papo
import toy
from papo import PAPOConfig, option
from program import TOY_SIZES, Parser
from program.data import DataConfig, open_dataset, read_row, say_skipped
from program.model import load_processor

# ---- 1. PAPO -------------------------------------------------------------------------------------


class PAPOTrainer(GRPOTrainer):
    """GRPOTrainer with PAPO's objective; config is kept as self.papo. B: responses in a pass of one
    process; P, T: their longest prompt and response. The model is from a folder or the hub, where
    TRL finds the reference. Data sets have columns images (fitted), problem, answer, row."""

    def _generate_and_score_completions(self, inputs):
        """Sample with PAPO's prompts; add its advantages and each response's masked pixels."""
        message = lambda row: papo.chat_messages(row["problem"], len(row["images"]))
        prompts = [{**row, "prompt": message(row)} for row in inputs]
        batch = super()._generate_and_score_completions(prompts)
        if self.model.training:  # evaluation wants the rewards only
            rewards = self.rewards.view(-1, self.papo.group_size)  # (questions, G)
            start = self.accelerator.process_index * len(inputs)
            own = slice(start, start + len(inputs))  # the responses of this process
            batch["advantages"] = papo.group_advantages(rewards).flatten()[own]  # (responses,)
            if self.papo.gamma or self.papo.eta2:
                groups = {row["row"]: row for row in inputs}
                masked = {number: self.masked_pixels(row) for number, row in groups.items()}
                # A list with an entry for each response, shuffled and split by TRL as others are.
                batch["masked_pixels"] = [masked[row["row"]] for row in inputs]
        return batch

    def masked_pixels(self, row):
        """(patches, channels x time x patch^2). Seeded by step and row: one mask for a group."""
        seed = random.Random(f"{self.args.seed} {self.state.global_step} {row['row']}")
        generator = torch.Generator().manual_seed(seed.getrandbits(63))
        settings = self.papo.mask_ratio, self.papo.patch_size, generator
        masked = [papo.mask_patches(image, *settings) for image in row["images"]]
        pixels = papo.mask_prompt(self.processing_class, {}, masked)["pixel_values"]
        return pixels.to(self.accelerator.device)

    def reward(self, completion_ids, answer, log_metric, **_):
        """TRL's reward function: compute_reward of each response, read as sample_and_grade does."""
        form = dict(tokenize=False, add_generation_prompt=True)
        chat = self.processing_class.apply_chat_template(papo.chat_messages(""), **form)
        # A thinking model's chat template opens the <think> itself; the format rule wants it.
        opening = "<think>" if chat.rstrip().endswith("<think>") else ""
        decode = lambda ids: opening + self._tokenizer.decode(ids, skip_special_tokens=True)
        pairs = zip(map(decode, completion_ids), answer)
        scores = [papo.compute_reward(*pair, self.papo.format_weight) for pair in pairs]
        for name in ("accuracy", "format"):
            log_metric(name, mean(score[name] for score in scores))
        return [score["reward"] for score in scores]

    def _compute_loss(self, model, inputs):
        """papo_loss of B responses, weighted so that an update is one mean over it all."""
        config = self.papo
        logps, entropy = self.score(model, inputs, inputs["pixel_values"], config.eta1)  # (B, T)
        masked_logps, masked_entropy = None, None
        if "masked_pixels" in inputs:
            pixels = torch.cat(inputs["masked_pixels"])  # (B x patches, channels x time x patch^2)
            with torch.set_grad_enabled(config.mask_gradient != "detached"):
                masked_logps, masked_entropy = self.score(model, inputs, pixels, config.eta2)
        old_logps = inputs.get("old_per_token_logps", logps.detach())  # (B, T); none on-policy
        ref_logps = inputs.get("ref_per_token_logps")  # (B, T)
        advantages, response_mask = inputs["advantages"], inputs["completion_mask"]  # (B,), (B, T)
        if "importance_sampling_ratio" in inputs:  # vLLM's, of a response, for its policy term
            advantages = advantages * inputs["importance_sampling_ratio"][:, 0]  # (B,)
        given = logps, old_logps, advantages, response_mask, masked_logps, ref_logps
        loss, metrics = papo.papo_loss(config, *given, entropy, masked_entropy)
        del metrics["loss"]  # TRL logs its own
        values = torch.tensor(list(metrics.values()), device=loss.device)  # (metrics,)
        for name, value in zip(metrics, self.accelerator.reduce(values, "mean").tolist()):
            self._metrics["train"][name].append(value)
        return loss * self.share(response_mask)

    def __init__(self, model, config, args, processing_class, **kwargs):
        check_settings(config, args)
        self.papo = replace(config, patch_size=processing_class.image_processor.patch_size)
        never = papo.vision_token_ids(model)  # would be taken for image positions
        vllm = {"logit_bias": dict.fromkeys(never, -100.0)}
        ban = vllm if args.use_vllm else {"suppress_tokens": never}
        args.generation_kwargs = {**(args.generation_kwargs or {}), **ban}
        super().__init__(model, self.reward, args, processing_class=processing_class, **kwargs)

    def _calculate_rewards(self, *args):
        self.rewards = super()._calculate_rewards(*args)  # (responses of all processes, 1)
        return self.rewards

    def score(self, model, inputs, pixels, weight):
        """Log-probs and exact entropies of responses, (B, T) each; None for sampled entropies.
        weight: the entropy's in the loss, which needs its gradient."""
        images = ("image_grid_thw", "num_images", "mm_token_type_ids")
        logps, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),  # (B, P + T)
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),  # (B, P + T)
            inputs["completion_ids"].shape[1],
            compute_entropy=True,
            pixel_values=pixels,
            **{name: inputs[name] for name in images},
        )
        if self.papo.entropy_estimate == "sampled":
            return logps, None
        if weight and logps.requires_grad and not entropy.requires_grad:
            raise RuntimeError("TRL's entropies carry no gradient: eta1 and eta2 need trl 1.16")
        return logps, entropy

    def share(self, response_mask):
        """A mean's weight in its update: TRL adds up micro-batches and averages over processes."""
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


# ---- 2. TRL's plumbing ---------------------------------------------------------------------------

# What TRL's own loss or papo.py's own loop would read: without effect here, so refused.
NO_EFFECT = (
    "loss_type epsilon epsilon_high delta importance_sampling_level scale_rewards reward_weights "
    "multi_objective_aggregation use_adaptive_entropy entropy_coef top_entropy_quantile "
    "off_policy_mask_threshold use_bias_correction_kl max_redraws prompts_per_sample "
    "tokens_per_forward"
).split()


def trl_settings(config, per_device, processes):
    """PAPOConfig in GRPOConfig's words. per_device: TRL's --per_device_train_batch_size, B."""
    responses = config.prompts_per_batch * config.group_size
    accumulation, rest = divmod(responses, per_device * processes * config.updates_per_batch)
    if rest:
        parts = f"{config.updates_per_batch} updates, {processes} processes, passes of {per_device}"
        reason = f"{responses} responses do not split into {parts}"
        raise ValueError(f"{reason}: set --per_device_train_batch_size")
    same = ("temperature", "top_p", "beta", "learning_rate", "weight_decay", "max_grad_norm")
    return {name: getattr(config, name) for name in same} | dict(
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation * config.updates_per_batch,
    )


def check_settings(config, args):
    """Raises ValueError for what TRL cannot do, what has no effect, and args against config."""
    if config.dynamic_sampling:
        raise ValueError("TRL has no dynamic sampling: DAPO and PAPO-D train with train_small.py")
    if args.use_vllm and args.vllm_importance_sampling_mode.startswith("token"):
        raise ValueError("token-wise vLLM corrections: papo_loss has one advantage a response")
    for given in (config, args):
        for field in fields(given):
            if field.name in NO_EFFECT and getattr(given, field.name) != field.default:
                raise ValueError(f"--{field.name} has no effect on PAPO under TRL")
    expected = trl_settings(config, args.per_device_train_batch_size, args.world_size)
    for name, value in expected.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name} is {value} by PAPO's flags, not {getattr(args, name)}")


# ---- 3. The program ------------------------------------------------------------------------------


@dataclass
class RunFlags(DataConfig):
    """Flags of train_small.py that neither PAPOConfig nor GRPOConfig has."""

    preset: str = option(None, "a published recipe: papo-g-3b, papo-g-7b, papo-g-no-ref, grpo")
    model: str = option(None, "hub name or folder of a Qwen-VL; without: the embedded world's")
    digits: int = option(4, "embedded world: handwritten digits per image, 1 to 9")
    steps: int = option(None, "rollout batches; by default 40, on a data set num_train_epochs, 2")
    eval_every: int = option(10, "steps between evaluations, group_size answers to each question")
    save_every: int = option(10, "steps between checkpoints")
    out: str = option("runs/papo_trl", "folder of the run")


def parse_args(argv=None):
    """PAPO's flags first, TRL's from the rest: both know a --learning_rate. -> config, run, args"""
    parser = Parser([PAPOConfig, RunFlags], description=__doc__.split("\n")[0], allow_abbrev=False)
    first, _ = parser.parse_known_args(argv)
    if first.preset:
        parser.set_defaults(**vars(PAPOConfig.preset(first.preset)))
    elif not first.model:
        parser.set_defaults(**TOY_SIZES)
    config, run, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if run.dataset and not run.model:
        raise ValueError("--dataset needs --model")
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
    """Model and processor; the embedded world's in a folder, where TRL finds the reference."""
    if not run.model:
        torch.set_num_threads(1)  # tensors this small lose by a second core
        run.model = f"{run.out}/start"
        if args.process_index == 0:
            for part in toy.warm_start(digits=run.digits, seed=args.seed):
                part.save_pretrained(run.model)
    processor = load_processor(run.model, run.edges)
    return AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32), processor


def load_rows(run, args, processor):
    """PAPOTrainer's rows, to train on and held out: those of train_small.py."""
    if not run.dataset:
        train = toy.toy_dataset("train", 2048, run.digits, args.seed)
        held_out = toy.toy_dataset("test", run.eval_size, run.digits, 0)
        return [rows.add_column("row", range(len(rows))) for rows in (train, held_out)]
    rows = fit_rows(open_dataset(run), run, processor)
    if len(rows) < 2:
        raise ValueError(f"--dataset {run.dataset}: {len(rows)} usable rows, at least 2 are needed")
    end = len(rows) - max(1, min(run.eval_size, len(rows) // 4))
    return rows.select(range(end)), rows.select(range(end, len(rows)))


def fit_rows(dataset, run, processor):
    """Images fitted once, for TRL reads a row G times and more; unusable rows are left out."""

    def fit(_, number):
        try:
            row = read_row(dataset, number, run, processor)
            del row["prompt"]
            return row | dict(row=number, why="")
        except ValueError as error:
            return dict(images=[], problem="", answer="", row=number, why=str(error))

    text, images = datasets.Value("string"), datasets.List(datasets.Image())
    columns = dict(images=images, problem=text, answer=text, row=datasets.Value("int64"), why=text)
    how = dict(remove_columns=dataset.column_names, features=datasets.Features(columns))
    rows = dataset.map(fit, with_indices=True, **how)
    reasons = rows["why"][:]
    say_skipped(filter(None, reasons))
    return rows.select([i for i, why in enumerate(reasons) if not why])


def main(argv=None):
    """The command. Exit code 2 and one line for what the user can mend."""
    try:
        config, run, args = parse_args(argv)
        check_settings(config, args)
        with args.main_process_first():  # the others find what it has written
            model, processor = load_model(run, args)
            rows, held_out = load_rows(run, args, processor)
        rows = dict(train_dataset=rows, eval_dataset=held_out)
        trainer = PAPOTrainer(model, config, args, processor, **rows)
    except (ValueError, OSError, ImportError) as error:
        print(f"papo_trl.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(f"{run.out}/checkpoint")


if __name__ == "__main__":
    main()
