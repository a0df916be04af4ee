"""Precisions of the weights, and what `auto` means on this machine."""

from grath.common.errors import UserError
from grath.modeling.devices import check_devices

PRECISIONS = ("auto", "fp32", "fp16", "bf16", "int8", "nf4", "fp4")
# Stage: (precision on a CUDA GPU, precision on a CPU). The paper generates in 8 bits and trains in 4 bits.
AUTO = {"pairs": ("int8", "bf16"), "dpo": ("fp4", "bf16"), "scores": ("fp16", "fp32")}
# Instead of a precision, where inference servers score: they choose it.
SERVER = "server"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_precision(precision, stage):
    """Replace `auto` by the precision of a stage (in `AUTO`) on this machine; return other precisions unchanged.

    Raises:
        UserError: an 8-bit or 4-bit precision needs bitsandbytes, which is not installed; or `check_devices` fails.
    """
    import torch

    check_devices()
    if precision == "auto":
        precision = AUTO[stage][0 if torch.cuda.is_available() else 1]
    if precision not in DTYPES:
        from transformers.utils import is_bitsandbytes_available

        if not is_bitsandbytes_available():
            raise UserError(f"--precision {precision} needs the package bitsandbytes: pip install bitsandbytes")
    return precision


def compute_dtype():
    """Return the 16-bit dtype to compute in: bfloat16, or float16 on a GPU without bfloat16 units."""
    import torch

    bf16 = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16
