"""A network of one layer that learns online; as a program, one batch of it on each of several processes."""

import sys

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn


class Online(nn.Module):
    """Membranes v <- v / 2 + W x are the logits of a step; the graph is cut between two steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3, bias=False).double()
        self.steps = []

    def forward(self, images, *, step):
        before = self.v.detach() / 2 if step else 0.0
        self.steps.append(step)
        self.v = before + self.linear(images.flatten(1))
        return self.v


def batch(images=6):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 1, 2, 2, generator=generator, dtype=torch.float64)
    return pixels, torch.randint(0, 3, (images,), generator=generator)


def cross_entropy(logits, labels):
    return {"total": F.cross_entropy(logits, labels)}


def main(folder):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from distill.backward import each_step

    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(Online())
    exchanges = []

    def counted(state, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(state, bucket)

    model.register_comm_hook(None, counted)
    images, labels = batch(8)
    rank, count = accelerator.process_index, accelerator.num_processes
    with accelerator.accumulate(model):
        each_step(cross_entropy, 3)(accelerator, model, images[rank::count], labels[rank::count], 0)
    gradient = accelerator.unwrap_model(model).linear.weight.grad
    torch.save((gradient, len(exchanges)), f"{folder}/{rank}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1])
