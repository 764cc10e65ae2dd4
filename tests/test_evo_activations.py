"""Which modules are activations, and which of them go with a norm that becomes an EvoNorm."""

import pytest
import torch
from small_models import stirred
from torch import nn

import normzoo
from normzoo.conversion.following import is_activation


@pytest.mark.parametrize(
    "module, is_one",
    [
        *((cls(), True) for cls in (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Tanh, nn.LeakyReLU)),
        *((made, False) for made in (nn.Identity(), nn.Dropout(), nn.PReLU(), nn.Softmax(1), nn.RReLU())),
        *((made, False) for made in (nn.Flatten(), nn.AvgPool2d(1), nn.GLU(1))),
        (nn.Sequential(nn.ReLU()), False),
        (nn.InstanceNorm2d(6), False),
    ],
    ids=str,
)
def test_activations(module, is_one):
    state = torch.get_rng_state()
    assert is_activation(module) == is_one
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "activation, why",
    [
        *((made, "is bounded above, unlike") for made in (nn.Sigmoid(), nn.Hardsigmoid(), nn.Tanh())),
        *((made, "is bounded above, unlike") for made in (nn.Softsign(), nn.LogSigmoid(), nn.Hardtanh())),
        *((made, "is unlike the ReLU that") for made in (nn.Hardshrink(), nn.Tanhshrink(), nn.Softshrink())),
        *((cls(), "") for cls in (nn.ReLU, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.Hardswish, nn.Mish)),
        *((cls(), "") for cls in (nn.LeakyReLU, nn.Softplus, nn.CELU, nn.ReLU6)),
    ],
    ids=str,
)
def test_an_activation_that_evo_norm_does_not_stand_for_stays(activation, why):
    model = stirred(nn.Sequential(nn.BatchNorm2d(8), activation))
    if not why:
        assert type(normzoo.convert(model, "evo_norm_b0")[1]) is nn.Identity
        return
    words = rf"could go \(an? {type(activation).__name__}, which {why} .* follows it in Sequential\)"
    with pytest.raises(ValueError, match=words):
        normzoo.convert(model, "evo_norm_b0")
    model = normzoo.convert(model, "evo_norm_b0", apply_act=True)
    assert type(model[0]) is normzoo.EvoNormB0 and model[1] is activation
