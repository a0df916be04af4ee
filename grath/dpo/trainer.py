"""TRL's DPO trainer with a rolling or fixed reference model.

Iteration i starts from model M_i, an adapter on the pretrained base M_0, and produces M_{i+1}. The reference is M_i
(`rolling`) or M_0 (`fixed`); the policy starts from M_i in both cases. Policy and reference share one copy of the base
model's weights.
"""

from functools import partial
from math import nan

import torch
from accelerate.utils import tqdm
from peft import LoraConfig
from torch.utils.data import DataLoader
from trl import DPOTrainer

from grath.common.errors import UserError
from grath.dpo.dataset import filter_pairs, pair_lengths
from grath.dpo.defaults import LORA_ALPHA, LORA_DROPOUT
from grath.dpo.packing import project_completions_only, share_prompts
from grath.dpo.sampler import LengthGroupedSampler
from grath.generation.attention import unsupported_reason
from grath.modeling.loading import resolve_base_and_adapter
from grath.modeling.memory import LORA_R

UNCOMPUTED_METRICS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
# Settings of some model families that change the logits after the head, or add to the loss.
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "router_aux_loss_coef",
)


class GrathDPOTrainer(DPOTrainer):
    """`DPOTrainer` that accepts tokenized pairs and an explicit choice of the reference model.

    TRL adds a frozen copy `ref` of the adapter to an incoming `PeftModel`. With `precompute_ref_log_probs` it evaluates
    the reference inside the constructor, after hashing all weights for a cache on disk. A fixed reference requires that
    `ref` is deleted first, so this class evaluates the reference after TRL's constructor, without a cache. On a
    quantized base TRL rounds the policy's adapter to bf16, but not `ref`, and loads checkpoints in float32; this class
    keeps the adapter in float32.

    Args:
        reference: "rolling" or "fixed".
    """

    def __init__(self, *args, reference, **kwargs):
        self.reference, config, model = reference, kwargs["args"], kwargs["model"]
        incoming = dict(model.named_parameters()) if hasattr(model, "peft_config") else {}
        incoming = {name: weight.data for name, weight in incoming.items() if weight.requires_grad}
        precompute, config.precompute_ref_log_probs = config.precompute_ref_log_probs, False
        try:
            super().__init__(*args, **kwargs)
        finally:
            config.precompute_ref_log_probs = precompute
        # A resumed training must load its adapter to this process's device; PEFT would choose the first GPU.
        self.model.load_adapter = partial(self.model.load_adapter, torch_device=str(self.accelerator.device))
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weight.data = incoming.get(name, weight.data).to(weight.device, torch.float32)
        self._patch_forward()
        if reference == "fixed":
            self.drop_ref_adapter()
        if precompute:
            batch_size = config.precompute_ref_batch_size or config.per_device_train_batch_size
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", batch_size)
            self.precompute_ref_logps = True
            self.drop_ref_adapter()

    def drop_ref_adapter(self):
        """Delete the frozen copy `ref` of the adapter, if there is one."""
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _patch_forward(self):
        """Make the model compute the shared prompt of a pair once and, on a CPU, project only the completions.

        On a CPU, TRL 1.16 projects every position, including prompt and padding, and computes three statistics of each
        for its log. The loss is the same.
        """
        base = self.model.get_base_model()
        if not unsupported_reason(base, self.args.max_length or 0) and base.config._attn_implementation == "sdpa":
            base.base_model.forward = share_prompts(base.base_model.forward)
        config = base.config.get_text_config()
        changed = any(getattr(config, name, None) for name in LOGIT_SETTINGS)
        self.projects_completions_only = (
            self.accelerator.device.type == "cpu" and not self.use_weighting and not changed
        )
        if self.projects_completions_only:
            base.forward = project_completions_only(base, base.forward)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = LengthGroupedSampler(pair_lengths(train_dataset or self.train_dataset), batch, seed)
        return self.sampler

    def _run_epoch(self, *args, epoch, **kwargs):
        # When several processes resume in the middle of an epoch, accelerate's loader does not set the sampler's epoch.
        if hasattr(self, "sampler"):
            self.sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def get_batch_samples(self, *args):
        samples, items = super().get_batch_samples(*args)
        self.rows_in_step = sum(len(batch["input_ids"]) for batch in samples) / max(1, len(samples))
        return samples, items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training or return_outputs:
            return loss
        # Every pair of a step weighs the same. `Trainer` averages over forward passes, and the last may be smaller.
        return loss * (len(inputs["input_ids"]) / self.rows_in_step)

    def log(self, logs, start_time=None):
        if self.projects_completions_only:
            for metrics in self._metrics.values():
                for name in UNCOMPUTED_METRICS:
                    metrics.pop(name, None)
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "prompt_ids" in dataset.column_names:
            return dataset
        tokenized = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        tokenized, self.counts = filter_pairs(tokenized, args.max_length)
        return tokenized

    def _precompute_ref_logps(self, dataset, name, batch_size):
        self.model.eval()
        for layer in self.model.modules():
            # In evaluation mode on a CPU, bitsandbytes packs 4-bit weights into a form without gradients.
            if type(layer).__name__ == "Linear4bit":
                layer.training = True
        order = list(range(len(dataset)))
        if self.args.train_sampling_strategy == "group_by_length" and self.args.max_steps > 0:
            sampler = self._get_train_sampler(dataset)
            order = sorted(list(sampler)[: self.args.max_steps * sampler.batch])  # the others are not trained on
        # Batch pairs of similar length, to keep padding small.
        order.sort(key=pair_lengths(dataset).__getitem__)
        loader = DataLoader(dataset.select(order), batch_size, collate_fn=self.data_collator)
        chosen, rejected = [nan] * len(dataset), [nan] * len(dataset)
        done = 0
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"Reference log-probabilities ({name})"):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
            for i, *log_probs in zip(order[done:], *(side.tolist() for side in sides), strict=False):
                chosen[i], rejected[i] = log_probs
                done += 1
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def lora_config(r=LORA_R, alpha=LORA_ALPHA, dropout=LORA_DROPOUT):
    """Return PEFT's `LoraConfig` with the paper's values: on the q, k and v projections, without biases."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )


def check_incoming_adapter(model, lora):
    """Raise `UserError` if a `PeftModel` has another rank, alpha or dropout than `lora` (`LoraConfig`)."""
    incoming = model.peft_config["default"]
    for name in ("r", "lora_alpha", "lora_dropout"):
        theirs, ours = getattr(incoming, name), getattr(lora, name)
        if theirs != ours:
            raise UserError(f"the incoming adapter has {name} {theirs}, not {ours}")


def describe_reference(name, reference):
    """Describe the policy's start and the reference model of an iteration that starts from the model `name`.

    Returns:
        dict of str: `reference`, `policy_starts_from`, `reference_model`, `base_model`.
    """
    base, adapter = resolve_base_and_adapter(name)
    start = f"the adapter {adapter} on {base}" if adapter else base
    return {
        "reference": reference,
        "policy_starts_from": start,
        "reference_model": start if reference == "rolling" else base,
        "base_model": base,
    }
