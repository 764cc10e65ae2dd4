"""What looks harmless to a conversion of weights, or to a change of the optimizer, and is not."""

import copy

import torch
from torch import nn

import normzoo


def test_momentum_of_torchs_sgd_goes_on():
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.randn(3, 2).to(dtype))
        options = {"lr": 0.1, "momentum": 0.9}
        old = torch.optim.SGD([p], **options)
        for _ in range(3):
            p.grad = torch.randn_like(p)
            old.step()
        other = nn.Parameter(p.detach().clone())
        state = copy.deepcopy(old.state_dict())
        new = normzoo.SGDP([other], **options, delta=0)
        new.load_state_dict(state)
        buffer = old.state[p]["momentum_buffer"]
        assert set(new.state[other]) == {"momentum"} and "momentum_buffer" in state["state"][0], dtype
        assert torch.equal(new.state[other]["momentum"], buffer.float()), dtype
        if dtype == torch.float32:  # torch's class rounds its momentum to bfloat16
            other.grad = p.grad = torch.randn_like(p)
            for each in (old, new):
                each.step()
            torch.testing.assert_close(other, p)
        none = torch.optim.SGD([p], lr=0.1)
        none.step()
        new.load_state_dict(none.state_dict())  # without momentum its state is None
        assert not new.state[other]
        new.step()
