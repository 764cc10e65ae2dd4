"""normzoo.convert: what it replaces, what it keeps, what it refuses."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

import normzoo

# Importing torch's compiler, and scripting, warn about TorchScript.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

CONVERTIBLE = [entry for entry in normzoo.ZOO if entry.torch_class]
IDS = [entry.name for entry in CONVERTIBLE]


class Own(nn.LayerNorm):
    """A subclass that computes something else."""

    def forward(self, input):
        return super().forward(input) + 1


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, x):
        return 2 * x


class Net(nn.Module):
    """Norms of both kinds, trained a little so that no parameter has its first value."""

    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-3)
        self.rms = nn.RMSNorm(width)
        self.last = nn.Linear(width, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_()

    def forward(self, x):
        return self.last(self.rms(self.norm(self.first(x)).relu()))


def types(model):
    return [type(module) for module in model.modules()]


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("entry", CONVERTIBLE, ids=IDS)
@pytest.mark.parametrize("by_class", [False, True], ids=["name", "class"])
def test_outputs_and_gradients_stay(entry, by_class):
    model = nn.Sequential(nn.Linear(16, 16), entry.torch_class(*entry.arguments))
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.normal_()
    before = copy.deepcopy(model)
    assert normzoo.convert(model, entry.cls if by_class else entry.name) is model
    assert type(model[1]) is entry.cls
    x = entry.sample()
    y, wanted = model(x), before(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-6)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm((2, 4), eps=1e-2),
        nn.LayerNorm(8, bias=False),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.RMSNorm(8),
        nn.RMSNorm(8, eps=1e-2),
        nn.RMSNorm(8, elementwise_affine=False),
    ],
    ids=str,
)
def test_options_stay(norm):
    to = "layer_norm" if isinstance(norm, nn.LayerNorm) else "rms_norm"
    new = normzoo.convert(norm, to)
    assert new is not norm and type(new).__module__.startswith("normzoo")
    assert new.eps == norm.eps and new.normalized_shape == norm.normalized_shape
    assert new.elementwise_affine == norm.elementwise_affine
    assert new.state_dict().keys() == norm.state_dict().keys()
    x = torch.randn(3, *norm.normalized_shape)
    torch.testing.assert_close(new(x), norm(x), rtol=0, atol=1e-6)


def test_rms_eps_none_stays_none():
    assert normzoo.convert(nn.RMSNorm(4), "rms_norm").eps is None


def test_parameters_and_flags_stay():
    model = Net().to(torch.bfloat16)
    model.norm.weight.requires_grad_(False)
    model.norm.eval()
    model.norm.remark = "mine"
    model.norm.register_buffer("seen", torch.zeros(1), persistent=False)
    before, keys = dict(model.named_parameters()), model.state_dict().keys()
    buffer = model.norm.seen
    normzoo.convert(model, "layer_norm")
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert model.state_dict().keys() == keys
    assert not model.norm.weight.requires_grad and model.norm.weight.dtype == torch.bfloat16
    assert not model.norm.training and model.rms.training and model.training
    assert model.norm.remark == "mine" and model.norm.seen is buffer


def test_random_state_and_order_stay():
    model = Net()
    names = [name for name, _ in model.named_modules()]
    state = torch.get_rng_state()
    normzoo.convert(model, "layer_norm")
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, _ in model.named_modules()] == names


def test_only_the_named_class():
    model = Net()
    normzoo.convert(model, "rms_norm")
    assert type(model.norm) is nn.LayerNorm and type(model.rms) is normzoo.RMSNorm


def test_subclasses_stay():
    model = nn.ModuleList([nn.LayerNorm(4), Own(4)])
    own = model[1]
    normzoo.convert(model, "layer_norm")
    assert type(model[0]) is normzoo.LayerNorm and model[1] is own


def test_aliases_stay_shared():
    shared = nn.LayerNorm(4)
    model = nn.ModuleDict({"a": nn.ModuleList([shared, shared]), "b": nn.Sequential(shared)})
    normzoo.convert(model, "layer_norm")
    new = model["a"][0]
    assert type(new) is normzoo.LayerNorm
    assert model["a"][1] is new and model["b"][0] is new


def test_shared_parents_stay_shared():
    block = nn.Sequential(nn.LayerNorm(4))
    model = nn.ModuleList([block, block])
    normzoo.convert(model, "layer_norm")
    assert model[0] is block and model[1] is block and type(block[0]) is normzoo.LayerNorm


def test_tied_parameters_stay_tied():
    model = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
    model[1].weight = model[0].weight
    normzoo.convert(model, "layer_norm")
    assert model[0] is not model[1] and model[0].weight is model[1].weight
    assert model[0].bias is not model[1].bias


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    normzoo.convert(model, "layer_norm")
    assert model.norm.weight.is_meta
    model.to_empty(device="cpu")
    assert type(model.norm) is normzoo.LayerNorm and model.norm.weight.device.type == "cpu"


def test_optimizer_goes_on():
    model = Net()
    other = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, other)]
    x = torch.randn(16, 8)
    for step in range(4):
        if step == 2:
            normzoo.convert(model, "layer_norm")
        for each, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    assert type(model.norm) is normzoo.LayerNorm
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder_layer(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first).eval()
    with torch.no_grad():
        for norm in (layer.norm1, layer.norm2):
            norm.weight.normal_()
            norm.bias.normal_()
    other = copy.deepcopy(layer)
    normzoo.convert(layer, "layer_norm")
    assert type(layer.norm1) is type(layer.norm2) is normzoo.LayerNorm
    x = torch.randn(3, 5, 16)
    with torch.no_grad():  # torch's fused code, which reads the norms' tensors
        assert torch.equal(layer(x), other(x))
    torch.testing.assert_close(layer(x), other(x), rtol=0, atol=1e-6)


def parametrized(model):
    parametrize.register_parametrization(model.norm, "weight", Doubled())


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda m: m.norm.register_forward_hook(print), r"'norm' has hooks \(_forward_hooks\)"),
        (lambda m: m.norm.register_forward_pre_hook(print), r"'norm' has hooks \(_forward_pre_hooks\)"),
        (lambda m: m.norm.register_full_backward_hook(print), r"'norm' has hooks \(_backward_hooks\)"),
        (lambda m: m.norm.register_full_backward_pre_hook(print), r"hooks \(_backward_pre_hooks\)"),
        (lambda m: m.norm.register_state_dict_post_hook(lambda *_: None), r"hooks \(_state_dict_hooks\)"),
        (parametrized, r"'norm' is parametrized"),
        (lambda m: setattr(m.norm, "forward", print), r"'norm' has a forward of its own"),
        (lambda m: m.norm.compile(), r"'norm' has a forward of its own"),
        (lambda m: setattr(m.norm, "eps", 0.0), r"'norm' cannot become a layer_norm: .*eps is 0.0"),
        (lambda m: setattr(m, "last", torch.compile(m.last)), r"'last' is wrapped \(OptimizedModule\)"),
    ],
)
def test_refusals_leave_the_model_as_it_was(spoil, words):
    model = nn.ModuleList([nn.LayerNorm(4)])
    model.extend([net := Net(), nn.LayerNorm(4)])
    spoil(net)
    before = list(model.modules())
    with pytest.raises(ValueError, match=words.replace("'norm'", "'1.norm'").replace("'last'", "'1.last'")):
        normzoo.convert(model, "layer_norm")
    after = list(model.modules())
    assert len(before) == len(after) and all(a is b for a, b in zip(before, after, strict=True))


def test_hooks_elsewhere_are_no_obstacle():
    model = Net()
    model.first.register_forward_hook(lambda *_: None)
    model.rms.register_forward_hook(lambda *_: None)
    normzoo.convert(model, "layer_norm")
    assert type(model.norm) is normzoo.LayerNorm


def test_compiled_model_refused():
    with pytest.raises(
        ValueError, match=r"the model itself is wrapped \(OptimizedModule\).*then call torch.co"
    ):
        normzoo.convert(torch.compile(Net()), "layer_norm")


def test_script_module_refused():
    scripted = torch.jit.script(nn.Sequential(nn.LayerNorm(4)))
    with pytest.raises(ValueError, match=r"wrapped \(ScriptModule\).*script or trace it"):
        normzoo.convert(scripted, "layer_norm")


def test_ddp_refused(one_process):
    wrapped = nn.parallel.DistributedDataParallel(Net())
    with pytest.raises(ValueError, match=r"wrapped \(DistributedDataParallel\).*convert the module inside"):
        normzoo.convert(wrapped, "layer_norm")
    normzoo.convert(wrapped.module, "layer_norm")


def test_fsdp_refused(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"wrapped \(FSDPModule\).*then call fully_shard"):
        normzoo.convert(model, "layer_norm")
    assert type(model.norm) is nn.LayerNorm


def test_nothing_to_convert():
    model = nn.Sequential(nn.BatchNorm1d(4), Own(4), Own(4), nn.Linear(4, 4))
    seen = r"seen: 2 \S*test_conversion\.Own, 1 torch\.nn\.\S*\.BatchNorm1d$"
    with pytest.raises(ValueError, match=r"torch\.nn\.LayerNorm and no subclass.*" + seen):
        normzoo.convert(model, "layer_norm")
    with pytest.raises(ValueError, match="norm classes seen: none"):
        normzoo.convert(nn.Linear(4, 4), "rms_norm")


def test_second_conversion_says_so():
    model = normzoo.convert(Net(), "layer_norm")
    with pytest.raises(ValueError, match=r"1 normzoo\.layers\.layer\.LayerNorm"):
        normzoo.convert(model, "layer_norm")


def test_bad_targets():
    model = Net()
    with pytest.raises(
        ValueError, match=r"convert: there is no layer called 'layernorm'; use one of layer_norm"
    ):
        normzoo.convert(model, "layernorm")
    with pytest.raises(ValueError, match=r"crms_norm has no counterpart in torch.*use one of layer_norm"):
        normzoo.convert(model, "crms_norm")
    with pytest.raises(ValueError, match=r"BatchNorm1d is not a layer of normzoo"):
        normzoo.convert(model, nn.BatchNorm1d)
    with pytest.raises(TypeError, match=r"to is a LayerNorm; it must be the name or the class"):
        normzoo.convert(model, normzoo.LayerNorm(4))
    with pytest.raises(TypeError, match=r"model is a list; it must be a torch\.nn\.Module"):
        normzoo.convert([model], "layer_norm")
    assert normzoo.LayerNorm not in types(model)
