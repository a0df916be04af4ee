"""TRL's DPO with the paper's settings, tokens from `grath.chat`, and a reference that is exactly the one asked for.

Round i starts from model M_i, an adapter on the pretrained base M_0, and gives M_{i+1}. The reference is M_i itself
(`rolling`) or M_0 (`fixed`); the policy starts from M_i in both.
"""

import json
import os
import shutil
from functools import wraps
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from datasets import Dataset
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from grath.chat import answer_ids
from grath.cli import UserError, write_whole
from grath.models import split_adapter

LORA_TARGETS = ["q_proj", "k_proj", "v_proj"]
NOT_COMPUTED = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
# Settings by which some families change the logits behind their head, or add to the loss.
CHANGES_LOGITS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "router_aux_loss_coef",
)
RECORD = "training.json"
ADAPTER = "adapter_model.safetensors"


class GrathDPOTrainer(DPOTrainer):
    """`DPOTrainer` that takes tokenised pairs as they are and knows which model is the reference.

    TRL gives a `PeftModel` that comes in a frozen copy of its adapter, `ref`, and evaluates it inside the constructor
    if log-probabilities are computed beforehand. For a fixed reference that copy must go before that happens. TRL also
    caches them on disk, under a name that is the same for both references; here they are computed for every training.

    Args:
        reference: "rolling" or "fixed".
    """

    def __init__(self, *args, reference, **kwargs):
        self.reference = reference
        super().__init__(*args, **kwargs)
        self._score_answers_only()
        if self.reference == "fixed" or self.precompute_ref_logps:
            self._drop_ref_adapter()

    def _drop_ref_adapter(self):
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _score_answers_only(self):
        """Let TRL's fused head compute the answers' log-probabilities and nothing else on a CPU.

        There, TRL 1.16 projects every position, the prompt's and the padding included, and takes three statistics of
        each for its log. The loss is the same.
        """
        base = self.model.get_base_model()
        if self.accelerator.device.type != "cpu" or self.use_weighting or hasattr(base, "scores_answers_only"):
            return
        config = base.config.get_text_config()
        if any(getattr(config, name, None) for name in CHANGES_LOGITS):
            return
        fused_forward, base.scores_answers_only = base.forward, True

        @wraps(fused_forward)
        def forward(*args, fused_lm_head=False, labels=None, **kwargs):
            if not fused_lm_head:
                return fused_forward(*args, labels=labels, **kwargs)
            hidden = base.base_model(*args, **kwargs).last_hidden_state[:, :-1]
            return _answer_scores(hidden, labels[:, 1:], base.get_output_embeddings())

        base.forward = forward

    def log(self, logs, start_time=None):
        if hasattr(self.model.get_base_model(), "scores_answers_only"):
            for metrics in self._metrics.values():
                for name in NOT_COMPUTED:
                    metrics.pop(name, None)
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "prompt_ids" in dataset.column_names:
            return dataset
        tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        return keep_trainable(tokenised, args.max_length)

    def _precompute_ref_logps(self, dataset, name, batch_size):
        if self.reference == "fixed":
            self._drop_ref_adapter()
        self._score_answers_only()
        self.model.eval()
        # Rows of like length stand together, so that padding is small.
        lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]
        order = sorted(range(len(dataset)), key=lengths.__getitem__)
        loader = DataLoader(dataset.select(order), batch_size, collate_fn=self.data_collator)
        chosen, rejected = [0.0] * len(dataset), [0.0] * len(dataset)
        done = 0
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"Reference log-probabilities ({name})"):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
            for i, *log_probs in zip(order[done:], *(side.tolist() for side in sides), strict=False):
                chosen[i], rejected[i] = log_probs
                done += 1
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


def _answer_scores(hidden, labels, lm_head):
    """Log-probabilities of the labelled tokens, (B, L), 0 where the label is -100: hidden (B, L, d), labels (B, L)."""
    answers = labels != -100
    scores = -cross_entropy(lm_head(hidden[answers]).float(), labels[answers], reduction="none")
    log_probs = scores.new_zeros(labels.shape).masked_scatter(answers, scores)
    nothing = torch.zeros_like(log_probs)
    return FusedCausalLMOutput(
        loss=-scores.mean(), log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def tokenise(rows, tokenizer, template):
    """Pairs as TRL's tokenised preference rows: the bare question between the chat tags, then either answer.

    Args:
        rows: list of dicts with `question`, `correct`, `incorrect`.

    Returns:
        `Dataset` with `prompt_ids`, `chosen_ids`, `rejected_ids` (lists of int).
    """
    tokenised = []
    for row in rows:
        turn = [{"role": "user", "content": row["question"]}]
        sides = [answer_ids(tokenizer, turn, row[side], template) for side in ("correct", "incorrect")]
        prompt = min((prompt for prompt, _ in sides), key=len)
        chosen, rejected = ([*own, *ids][len(prompt) :] for own, ids in sides)
        tokenised.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return Dataset.from_list(tokenised)


def keep_trainable(dataset, max_length):
    """Drop the rows that carry no gradient or do not fit, and say how many.

    Raises:
        UserError: no row is left.
    """
    differing = dataset.filter(lambda row: row["chosen_ids"] != row["rejected_ids"])
    fitting = differing
    if max_length is not None:
        fitting = differing.filter(
            lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) <= max_length
        )
    identical, long = len(dataset) - len(differing), len(differing) - len(fitting)
    print_once(f"{len(dataset)} pairs, {identical} with identical answers and {long} over {max_length} tokens dropped")
    if not len(fitting):
        raise UserError("no pair is left to train on: every one has identical answers or is too long")
    return fitting


def print_once(text):
    """Print from the first process only."""
    PartialState().print(text)


def describe_reference(name, reference):
    """In words, the policy's start and the reference of a round that starts from `name`."""
    base, adapter = split_adapter(name)
    start = f"the adapter {adapter} on {base}" if adapter else base
    return {
        "reference": reference,
        "policy_starts_from": start,
        "reference_model": start if reference == "rolling" else base,
        "base_model": base,
    }


def check_output(output_dir, overwrite, source):
    """Raise `UserError` if a training from the model `source` would destroy something in `output_dir`."""
    folder = Path(output_dir)
    if folder.resolve() == Path(source).resolve():
        raise UserError(f"--output_dir {folder} is the model that the training starts from: choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{folder} is not empty: pass --overwrite_output_dir or choose another --output_dir")


def clear_output(output_dir):
    """Remove an earlier training's adapter, record and checkpoints."""
    folder = Path(output_dir)
    for name in (ADAPTER, "adapter_config.json", RECORD):
        (folder / name).unlink(missing_ok=True)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)


def save_adapter(trainer, record):
    """Save the adapter and `record` (a dict) in the trainer's output folder; the weights appear last, and whole."""
    folder = Path(trainer.args.output_dir)
    partial = folder / ".partial"
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    trainer.save_model(str(partial))
    if trainer.accelerator.is_main_process:
        write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")
        for name in ("adapter_config.json", ADAPTER):
            os.replace(partial / name, folder / name)
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()
