"""TRL's DPO with the paper's settings, tokens from `grath.chat`, and a reference that is exactly the one asked for.

Round i + 1 starts from model M_i, an adapter on the pretrained base M_0, and gives M_{i+1}. The reference is M_i itself
(`rolling`) or M_0 (`fixed`); the policy starts from M_i in both. One copy of the base's weights serves policy and
reference.
"""

from functools import partial, wraps

import torch
from accelerate import PartialState
from accelerate.utils import tqdm
from datasets import Dataset
from peft import LoraConfig
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from grath.chat import answer_ids
from grath.cli import LORA_ALPHA, LORA_DROPOUT, LORA_R, UserError
from grath.models import split_adapter
from grath.shared_prefix import unsupported

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


class GrathDPOTrainer(DPOTrainer):
    """`DPOTrainer` that takes tokenised pairs as they are and knows which model is the reference.

    TRL gives a `PeftModel` that comes in a frozen copy of its adapter, `ref`, and if log-probabilities are computed
    beforehand it does so inside the constructor, after hashing all weights for a cache on disk. For a fixed reference
    that copy must go first. So here they are computed behind the constructor, without a cache. On a quantised base TRL
    rounds the policy's adapter to bf16, but not the copy, and a checkpoint is read back in float32: here the adapter
    stays in float32, as it came.

    Args:
        reference: "rolling" or "fixed".
    """

    def __init__(self, *args, reference, **kwargs):
        self.reference, config, model = reference, kwargs["args"], kwargs["model"]
        incoming = dict(model.named_parameters()) if hasattr(model, "peft_config") else {}
        incoming = {name: weight.data for name, weight in incoming.items() if weight.requires_grad}
        beforehand, config.precompute_ref_log_probs = config.precompute_ref_log_probs, False
        try:
            super().__init__(*args, **kwargs)
        finally:
            config.precompute_ref_log_probs = beforehand
        # A resumed training reads its adapter to this process's device, not to the first GPU.
        self.model.load_adapter = partial(self.model.load_adapter, torch_device=str(self.accelerator.device))
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                weight.data = incoming.get(name, weight.data).to(weight.device, torch.float32)
        self._compute_less()
        if reference == "fixed":
            self.drop_ref_adapter()
        if beforehand:
            batch_size = config.precompute_ref_batch_size or config.per_device_train_batch_size
            self.train_dataset = self._precompute_ref_logps(self.train_dataset, "train", batch_size)
            self.precompute_ref_logps = True
            self.drop_ref_adapter()

    def drop_ref_adapter(self):
        if "ref" in self.model.peft_config:
            self.model.delete_adapter("ref")

    def _compute_less(self):
        """Compute a pair's shared prompt once and, on a CPU, the answers' log-probabilities and nothing else.

        There, TRL 1.16 projects every position, the prompt's and the padding included, and takes three statistics of
        each for its log. The loss is the same.
        """
        base = self.model.get_base_model()
        if not unsupported(base, self.args.max_length or 0) and base.config._attn_implementation == "sdpa":
            base.base_model.forward = _share_prompts(base.base_model.forward)
        config = base.config.get_text_config()
        changed = any(getattr(config, name, None) for name in CHANGES_LOGITS)
        self.scores_answers_only = self.accelerator.device.type == "cpu" and not self.use_weighting and not changed
        if self.scores_answers_only:
            base.forward = _score_answers(base, base.forward)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes
        self.sampler = LengthGrouped(_lengths(train_dataset or self.train_dataset), batch, self.args.seed)
        return self.sampler

    def _run_epoch(self, *args, epoch, **kwargs):
        # Where several processes go on in the middle of an epoch, accelerate's loader does not tell the sampler.
        if hasattr(self, "sampler"):
            self.sampler.set_epoch(epoch)
        return super()._run_epoch(*args, epoch=epoch, **kwargs)

    def log(self, logs, start_time=None):
        if self.scores_answers_only:
            for metrics in self._metrics.values():
                for name in NOT_COMPUTED:
                    metrics.pop(name, None)
        super().log(logs, start_time)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if "prompt_ids" in dataset.column_names:
            return dataset
        tokenised = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        tokenised, self.counts = keep_trainable(tokenised, args.max_length)
        return tokenised

    def _precompute_ref_logps(self, dataset, name, batch_size):
        self.model.eval()
        for layer in self.model.modules():
            # In evaluation mode on a CPU, bitsandbytes packs 4-bit weights in a form that passes on no gradients.
            if type(layer).__name__ == "Linear4bit":
                layer.training = True
        # Rows of like length stand together, so that padding is small.
        order = sorted(range(len(dataset)), key=_lengths(dataset).__getitem__)
        loader = DataLoader(dataset.select(order), batch_size, collate_fn=self.data_collator)
        chosen, rejected = [0.0] * len(dataset), [0.0] * len(dataset)
        done = 0
        for batch in tqdm(self.accelerator.prepare(loader), desc=f"Reference log-probabilities ({name})"):
            sides = self.accelerator.gather_for_metrics(self.compute_ref_log_probs(self.model, batch))
            for i, *log_probs in zip(order[done:], *(side.tolist() for side in sides), strict=False):
                chosen[i], rejected[i] = log_probs
                done += 1
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)


class LengthGrouped(Sampler):
    """Pairs of like length stand in one optimiser step, the steps in random order: the same in every start of an epoch.

    Args:
        lengths: tokens of each pair.
        batch: pairs an optimiser step, over all processes.
        seed: with the epoch, all that the order depends on. (transformers' sampler draws from the global state, which
            a training that goes on in the middle of an epoch cannot draw again.)
    """

    def __init__(self, lengths, batch, seed):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        whole = len(order) // self.batch
        steps = [order[at * self.batch : (at + 1) * self.batch] for at in torch.randperm(whole, generator=generator)]
        return iter([*(pair for step in steps for pair in step), *order[whole * self.batch :]])


def _lengths(dataset):
    """Tokens of each pair: the prompt and the longer answer."""
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in dataset]


def _share_prompts(forward):
    """Wrap a backbone's `forward` so that what the two sequences of a pair begin with is computed once.

    A batch holds B chosen sequences and behind them B rejected ones, (2B, L), padded at the right. Each pair becomes
    one row: the chosen sequence, then those tokens of the rejected one that stand behind the common beginning, at
    their own positions and blind to the chosen sequence's own tokens.
    """

    @wraps(forward)
    def shared(input_ids, attention_mask, **kwargs):
        device = input_ids.device
        chosen, rejected = input_ids.chunk(2)
        chosen_end, rejected_end = (mask.sum(1, keepdim=True) for mask in attention_mask.chunk(2))
        at = torch.arange(input_ids.shape[1], device=device)
        same = (chosen == rejected) & (at < torch.minimum(chosen_end, rejected_end))
        common = same.cumprod(1).sum(1, keepdim=True)

        column = torch.arange(int((chosen_end + rejected_end - common).max()), device=device)
        second = column >= chosen_end  # (B, W): a token of the rejected sequence
        position = torch.where(second, column - chosen_end + common, column).clamp(max=len(at) - 1)
        packed = torch.where(second, rejected.gather(1, position), chosen.gather(1, position))
        chosen_only = (column >= common) & ~second
        visible = (column <= column[:, None]) & ~(second[:, :, None] & chosen_only[:, None])
        output = forward(input_ids=packed, attention_mask=visible[:, None], position_ids=position, **kwargs)

        theirs = torch.where(at < common, at, at - common + chosen_end).clamp(max=len(column) - 1)
        columns = torch.stack((at.clamp(max=len(column) - 1).expand_as(theirs), theirs))  # (2, B, L)
        rows = torch.arange(len(chosen), device=device)[:, None]
        output.last_hidden_state = output.last_hidden_state[rows, columns].flatten(0, 1)
        return output

    return shared


def _score_answers(base, fused_forward):
    """Wrap the `forward` of TRL's fused head so that it projects the answers only, and takes no statistics of them."""

    @wraps(fused_forward)
    def forward(*args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return fused_forward(*args, labels=labels, **kwargs)
        hidden = base.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return _answer_scores(hidden, labels[:, 1:], base.get_output_embeddings())

    return forward


def _answer_scores(hidden, labels, lm_head):
    """Log-probabilities of the labelled tokens, (B, L), 0 where the label is -100: hidden (B, L, d), labels (B, L)."""
    answers = labels != -100
    scores = -cross_entropy(lm_head(hidden[answers]).float(), labels[answers], reduction="none")
    log_probs = scores.new_zeros(labels.shape).masked_scatter(answers, scores)
    nothing = torch.zeros_like(log_probs)
    return FusedCausalLMOutput(
        loss=-scores.mean(), log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )


def lora_config(r=LORA_R, alpha=LORA_ALPHA, dropout=LORA_DROPOUT):
    """PEFT's `LoraConfig` with the paper's values: on the projections of q, k and v, without biases."""
    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=["q_proj", "k_proj", "v_proj"],
        bias="none",
        task_type="CAUSAL_LM",
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

    Returns:
        (dataset, counts): the rows left, and how many were "read", "identical", "too_long" and "kept".

    Raises:
        UserError: no row is left.
    """
    differing = dataset.filter(lambda row: row["chosen_ids"] != row["rejected_ids"])
    lengths = _lengths(differing)
    fitting = differing.select([i for i, length in enumerate(lengths) if max_length is None or length <= max_length])
    counts = {
        "read": len(dataset),
        "identical": len(dataset) - len(differing),
        "too_long": len(differing) - len(fitting),
        "kept": len(fitting),
    }
    print_once(
        f"{counts['read']} pairs, {counts['identical']} with identical answers and {counts['too_long']} over "
        f"{max_length} tokens dropped"
    )
    if not counts["kept"]:
        raise UserError("no pair is left to train on: every one has identical answers or is too long")
    return fitting, counts


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
