"""The model class for lm-evaluation-harness that computes every context once."""

import sys

from grath.common.errors import UserError

MODEL_NAME = "hf-shared"


def register_shared_context_model():
    """Register the model class `hf-shared` with the harness, and return it."""
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    from grath.evaluation.loglikelihood import truncate_window, window_loglikelihoods

    @register_model(MODEL_NAME)
    class SharedContextLM(HFLM):
        """`HFLM` that computes equal requests, equal contexts and shared prefixes of contexts once."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.world_size == 1 and hasattr(self, "accelerator"):
                # Without a GPU `HFLM` scores every request in every process.
                self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

        def _create_model(self, pretrained, peft=None, **options):
            super()._create_model(pretrained, **options)
            if peft:
                from peft import PeftModel

                # Without a device, PEFT opens a context on the first GPU in every process.
                self._model = PeftModel.from_pretrained(self._model, peft, torch_device=str(self.device))

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            from tqdm import tqdm

            windows = [truncate_window(context, answer, self.max_length) for _, context, answer in requests]
            reason = self._cannot_share(max((len(c) + len(a) for c, a in windows), default=0))
            if not all(context and answer for context, answer in windows):
                reason = "an answer is empty or longer than the model's window"
            if reason or not requests:
                if reason and self.rank == 0 and not disable_tqdm:
                    print(f"{MODEL_NAME} uses the method of hf: {reason}", file=sys.stderr)
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            batch_size = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 16)
            bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring requests")
            results = [None] * len(requests)
            with bar:
                for places, result in window_loglikelihoods(self.model, windows, batch_size):
                    for place in places:
                        results[place] = result
                        if requests[place][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[place][0], result)
                    bar.update(len(places))
            return results

        def _cannot_share(self, length):
            from grath.generation.attention import unsupported_reason

            if self.backend != "causal":
                return "the model is not decoder-only"
            if self.softmax_dtype or self.mixed_precision_dtype:
                return "softmax_dtype or mixed_precision_dtype is set"
            if len(set((getattr(self.model, "hf_device_map", None) or {"": 0}).values())) > 1:
                return "the model is spread over several devices"
            if any(config.is_prompt_learning for config in getattr(self.model, "peft_config", {}).values()):
                return "the adapter adds virtual tokens"
            return unsupported_reason(self.model, length)

    return SharedContextLM


def patch_fewshot_sampling():
    """Patch the harness so that the few-shot examples of a question do not depend on the number of processes.

    The harness draws examples in each process for its own questions only. With the patch, every process draws for all
    questions in order and then keeps its own.
    """
    from lm_eval.api.task import Task

    build = Task.build_all_requests

    def build_own(task, *args, rank=0, world_size=1, **kwargs):
        build(task, *args, **kwargs)
        task._instances = [request for request in task._instances if request.doc_id % world_size == rank]
        if not task._instances:
            raise UserError(f"there are fewer questions than processes ({world_size}): lower NUM_PROCESSES")

    Task.build_all_requests = build_own
