"""TRL's DPO trainer with a rolling or fixed reference model.

Iteration i starts from model M_i, an adapter on the pretrained base M_0, and produces M_{i+1}. The reference is M_i
(`rolling`) or M_0 (`fixed`); the policy starts from M_i in both cases. Policy and reference share one copy of the base
model's weights.
"""

import re
from functools import partial
from math import ceil

import torch
from accelerate.utils import gather_object, send_to_device
from peft import LoraConfig
from trl import DPOTrainer

from grath.common.defaults import LORA_ALPHA, LORA_DROPOUT, LORA_LAYERS, LORA_R
from grath.common.errors import UserError, first_line
from grath.common.progress import progress_bar
from grath.dpo.dataset import filter_pairs, pair_lengths, training_order
from grath.dpo.packing import project_completions_only, share_prompts
from grath.generation.attention import unsupported_reason
from grath.modeling.chat import render
from grath.modeling.devices import halve_if_out_of_memory, print_once, this_device
from grath.modeling.loading import check_tokenizer, check_tokens, context_window


class GrathDPOTrainer(DPOTrainer):
    """`DPOTrainer` that accepts tokenized pairs and an explicit choice of the reference model.

    TRL adds a frozen copy `ref` of the adapter to an incoming `PeftModel`, and evaluates the reference inside its
    constructor. A fixed reference requires that `ref` be deleted first, so this class evaluates it later. TRL also
    rounds the policy's adapter to bf16 on a quantized base, but not `ref`; this class keeps it in float32. Its training
    set contains the pairs of all steps in their order, as one epoch.

    Args:
        reference: "rolling" or "fixed".

    Attributes:
        counts: dict from `filter_pairs`.
        pairs: the pairs that the steps reach, with their reference log-probabilities.
        steps_per_epoch: float.
    """

    def __init__(self, *args, reference, **kwargs):
        config, incoming = kwargs["args"], kwargs["model"].named_parameters()
        incoming = {name: weight.data for name, weight in incoming if weight.requires_grad}
        self.embeddings = kwargs["model"].get_input_embeddings().weight.shape[0]
        self.window = context_window(kwargs["model"].config)
        if config.disable_dropout:
            disable_functional_dropout(kwargs["model"])
        precompute, config.precompute_ref_log_probs = config.precompute_ref_log_probs, False
        super().__init__(*args, **kwargs)
        config.precompute_ref_log_probs = precompute
        # A resumed training must load its adapter to this process's device; PEFT would choose the first GPU.
        self.model.load_adapter = partial(self.model.load_adapter, torch_device=this_device())
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weight.data = incoming.get(name, weight.data).to(weight.device, torch.float32)
        self._patch_forward()
        self.check_optimizer()
        if reference == "fixed":
            self.drop_ref_adapter()
        self.order_pairs()
        if config.probes_memory and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            self.probe_memory()

    def check_optimizer(self):
        """Raise `UserError` if the optimizer or its schedule refuses its options, which `train` would find too late."""
        try:
            self.create_optimizer_and_scheduler(max(1, self.args.max_steps))
        except (ImportError, TypeError, ValueError) as error:
            raise UserError(f"the optimizer or its schedule refuses its options: {first_line(error)}") from error
        self.optimizer = self.lr_scheduler = None  # `train` creates them again

    def drop_ref_adapter(self):
        """Delete the frozen copy `ref` of the adapter, if there is one."""
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _patch_forward(self):
        base = self.model.get_base_model()
        longest = self.args.max_length or self.window or 10**9
        if unsupported_reason(base, longest) or base.config._attn_implementation != "sdpa":
            return
        base.base_model.forward = share_prompts(base.base_model.forward)
        if self.accelerator.device.type == "cpu" and not self.args.use_weighting:
            base.forward = project_completions_only(base, base.forward)

    def _prepare_dataset(self, dataset, processing_class, args, name):
        if "prompt_ids" not in dataset.column_names:
            texts = isinstance(dataset[0]["chosen"], str)
            for row in dataset:
                for side in ("chosen", "rejected"):
                    if isinstance(row[side], list):
                        render(processing_class, (row.get("prompt") or []) + row[side], processing_class.chat_template)
            dataset = super()._prepare_dataset(dataset, processing_class, args, name)
            sequences = [row[f"{part}_ids"] for row in dataset for part in ("prompt", "chosen", "rejected")]
            check_tokens(processing_class, sequences, self.embeddings)
            if texts:
                check_tokenizer(processing_class)
        limits = [limit for limit in (args.max_length, self.window) if limit]
        dataset, self.counts = filter_pairs(dataset, min(limits, default=None))
        return dataset

    def order_pairs(self):
        """Put the pairs of all steps into their order; add the reference's log-probabilities, once for each pair."""
        args, pairs = self.args, self.train_dataset
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        self.steps_per_epoch = len(pairs) / batch
        if args.max_steps <= 0:
            args.max_steps = ceil(args.num_train_epochs * self.steps_per_epoch)
        seed = args.seed if args.data_seed is None else args.data_seed
        order = training_order(pair_lengths(pairs), args.max_steps * batch, batch, args.train_sampling_strategy, seed)
        used, places = torch.tensor(order).unique(return_inverse=True)
        self.pairs = pairs.select(used.tolist())
        if args.precompute_ref_log_probs:
            self.pairs = self.add_reference_log_probs(self.pairs)
            self.precompute_ref_logps = True
            self.drop_ref_adapter()
        self.train_dataset = self.pairs.select(places.tolist())
        args.train_sampling_strategy = "sequential"

    def add_reference_log_probs(self, pairs):
        """Return pairs with the columns `ref_chosen_logps` and `ref_rejected_logps`; the processes share the work."""
        for layer in self.model.modules():
            # In evaluation mode on a CPU, bitsandbytes packs 4-bit weights into a form without gradients.
            layer.training = type(layer).__name__ == "Linear4bit"
        # Batch pairs of similar length, to keep padding small.
        left = sorted(range(len(pairs)), key=pair_lengths(pairs).__getitem__)
        left, found = left[self.accelerator.process_index :: self.accelerator.num_processes], []

        def compute(batch):
            while left:
                rows = left[:batch]
                sides = self.compute_ref_log_probs(self.model, self._collate(pairs, rows))
                found.extend(zip(rows, *(side.tolist() for side in sides), strict=True))
                progress.update(len(rows))
                del left[:batch]

        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        options = {"desc": "Reference log-probabilities", "unit": " pairs", "shown": self.is_world_process_zero()}
        with progress_bar(total=len(left), **options) as progress:
            halve_if_out_of_memory(compute, size)
        _, chosen, rejected = zip(*sorted(gather_object(found)), strict=True)
        return pairs.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def probe_memory(self):
        """Find how many of the longest pairs fit into a forward and backward pass; fill the step by accumulation."""
        args = self.args
        own = args.per_device_train_batch_size * args.gradient_accumulation_steps
        lengths = [sum(len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")) for pair in self.pairs]
        longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        longest = (longest * own)[:own]  # a step repeats pairs if there are fewer

        def attempt(batch):
            given = self._collate(self.pairs, longest[:batch])
            ids, mask = given["input_ids"], given["attention_mask"]
            labels = ids.masked_fill(given["completion_mask"] == 0, -100)
            with self.accelerator.autocast():
                output = self.model(
                    input_ids=ids, attention_mask=mask, labels=labels, use_cache=False, fused_lm_head=True
                )
            output.log_probs.sum().backward()
            return batch

        self.model.train()
        device = self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batch = min(gather_object([halve_if_out_of_memory(attempt, own)]))
        self.model.zero_grad()
        self._train_batch_size = args.per_device_train_batch_size = batch
        args.gradient_accumulation_steps = own // batch
        print_once(f"{batch} pairs per forward pass, as many as fit in memory, and {own // batch} passes per step")

    def _collate(self, pairs, rows):
        return send_to_device(self.data_collator([pairs[row] for row in rows]), self.accelerator.device)


def disable_functional_dropout(model):
    """Set every probability of dropout and every noise to 0 that a model keeps as a number; TRL only sets modules."""
    for holder in (model.config, *model.modules()):
        for name, value in vars(holder).items():
            if isinstance(value, float) and re.search("drop|jitter", name):
                setattr(holder, name, 0.0)


def lora_config(r=LORA_R, alpha=LORA_ALPHA, dropout=LORA_DROPOUT):
    """Return PEFT's `LoraConfig` with the paper's values: on the q, k and v projections, without biases."""
    return LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=[*LORA_LAYERS], task_type="CAUSAL_LM")
