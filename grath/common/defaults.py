"""The default values of the paper's code, once: settings, flags and DPO's configuration read them."""

from grath.common.errors import UserError

# Stage 1.
DATA_NAME, SUBDATA_NAME, SPLIT = "allenai/ai2_arc", "ARC-Challenge", "train"
DEMOS = "truthfulqa"
MAX_NEW_TOKENS = 100
# Stage 3.
PAIRS_PER_STEP = 16
BETA = 0.1
LEARNING_RATE = 5e-4
WARMUP_STEPS = 100
MAX_STEPS = 1000
SAVE_STEPS = 100
MAX_LENGTH = 1024
LORA_R, LORA_ALPHA, LORA_DROPOUT = 8, 16, 0.05
LORA_LAYERS = ("q_proj", "k_proj", "v_proj")
# Stage 4.
TASKS = "arc_challenge hellaswag mmlu truthfulqa_mc1 truthfulqa_mc2"
# Seconds to wait for an inference server.
SERVER_TIMEOUT = 600

# Options of DPO that may change between two starts of one training. The model, the tokenizer and the pairs are compared
# by their hashes. Of batch size, accumulation and processes, only the effective batch is compared.
UNCOMPARED = {
    "output_dir", "model_name_or_path", "tokenizer_name", "dataset_path", "overwrite_output_dir", "run_name",
    "resume_from_checkpoint", "gradient_accumulation_steps", "per_device_train_batch_size", "log_level", "disable_tqdm",
    "logging_dir", "logging_steps", "logging_first_step", "report_to", "project", "trackio_space_id", "save_steps",
    "save_total_limit", "dataloader_num_workers", "precompute_ref_batch_size", "per_device_eval_batch_size",
}  # fmt: skip


def check_trackers(names):
    """Raise `UserError` if transformers cannot report to one of the trackers (str or list of str) on this machine."""
    names = {names} if isinstance(names, str) else set(names or ())
    if names <= {"none", "all"}:
        return
    from transformers.integrations import get_available_reporting_integrations

    if missing := sorted(names - {"none", "all", *get_available_reporting_integrations()}):
        raise UserError(f"report_to: there is no tracker {missing[0]}, or its package is not installed")
