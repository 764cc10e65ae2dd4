"""One of two ranks of tests/test_user_norm.py: ``python user_norm_rank.py FOLDER RANK``."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from user_norm import MixedNorm


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    given = torch.load(folder / "in.pt")
    layer = MixedNorm(given["x"].shape[1]).double()
    layer.load_state_dict(given["layer"])
    part = slice(0, 2) if rank == 0 else slice(2, None)
    x = given["x"][part].requires_grad_()
    y = layer(x)
    grads = torch.autograd.grad(y, (x, *layer.parameters()), given["dy"][part])
    torch.save([y.detach(), *grads], folder / f"out{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # threads of the collectives may still end, and abort a process that is torn down under them


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
