"""Python imports this file by its name at every start: fp32 products are as exact as GRATH_TEST_MATMUL says."""

import os

import torch

torch.set_float32_matmul_precision(os.environ["GRATH_TEST_MATMUL"])
