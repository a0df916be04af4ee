"""The order of the pairs in training."""

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGroupedSampler(Sampler):
    """Put pairs of similar length into each optimizer step, and the steps in random order.

    The order depends only on the seed and the epoch, so a training that resumes in the middle of an epoch gets the
    same one. The sampler of transformers draws from the global random state instead.

    Args:
        lengths: tokens of each pair.
        batch: pairs per optimizer step, over all processes.
        seed: int.
    """

    def __init__(self, lengths, batch, seed):
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, 0

    def set_epoch(self, epoch):
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self):
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        full = len(order) // self.batch
        steps = [order[at * self.batch : (at + 1) * self.batch] for at in torch.randperm(full, generator=generator)]
        return iter([*(pair for step in steps for pair in step), *order[full * self.batch :]])
