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
    before = nn.Linear(16, 16) if entry.family == "rows" else nn.Conv2d(16, 16, 1)
    model = nn.Sequential(before, entry.torch_class(*entry.arguments))
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
    model.norm.register_parameter("spare", nn.Parameter(torch.zeros(1)))
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


def test_the_same_layers_by_default():
    model = Net()
    x = torch.randn(3, 8)
    before = model(x)
    normzoo.convert(model)
    assert type(model.norm) is normzoo.LayerNorm and type(model.rms) is normzoo.RMSNorm
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_another_layer_where_asked(caplog):
    model = Net()
    weight, bias = model.norm.weight, model.norm.bias
    normzoo.convert(model, "rms_norm")
    assert type(model.norm) is type(model.rms) is normzoo.RMSNorm
    assert model.norm.weight is weight and model.norm.bias is bias and model.norm.eps == 1e-3
    assert "1 of 2 converted norms compute another function (approximate" in caplog.text


def test_nothing_to_say_after_an_exact_conversion(caplog):
    normzoo.convert(Net())
    assert not caplog.records


def test_subclasses_stay(caplog):
    model = nn.ModuleList([nn.LayerNorm(4), Own(4)])
    own = model[1]
    normzoo.convert(model, "layer_norm")
    assert type(model[0]) is normzoo.LayerNorm and model[1] is own
    assert "1 norm left as they are:\n  1: it agrees with no norm known here" in caplog.text


def test_a_subclass_that_inherits_the_forward_is_its_base():
    class Marked(nn.LayerNorm):
        pass

    assert type(normzoo.convert(Marked(4), "layer_norm")) is normzoo.LayerNorm


def test_a_copy_leaves_the_model():
    model = Net()
    other = normzoo.convert(model, inplace=False)
    assert type(model.norm) is nn.LayerNorm and type(other.norm) is normzoo.LayerNorm
    assert other.norm.weight is not model.norm.weight
    with pytest.raises(ValueError, match="optimizer holds the parameters of model, and inplace=False"):
        normzoo.convert(model, inplace=False, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


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
            normzoo.convert(model, "layer_norm", include="norm")
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


def parametrized(norm):
    parametrize.register_parametrization(norm, "weight", Doubled())


def state_hook(norm):
    norm.register_load_state_dict_pre_hook(lambda *_: None)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (parametrized, "it is parametrized.*remove_parametrizations, convert, then parametrize again"),
        (nn.utils.weight_norm, "its weight is computed, not stored"),
        (state_hook, "it has a load_state_dict hook tied to the module; remove it"),
        (lambda norm: setattr(norm, "forward", print), "its forward was replaced on the instance"),
        (lambda norm: setattr(norm, "eps", 0.0), "eps is 0.0; it must be a positive"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_what_would_be_lost_stays(spoil, words):
    net = Net()
    model = nn.ModuleList([nn.LayerNorm(8), net])
    spoil(net.norm)
    old = net.norm
    with pytest.raises(ValueError, match=f"1.norm: .*{words}"):
        normzoo.convert(model, strict=True)
    assert type(model[0]) is nn.LayerNorm
    normzoo.convert(model)
    assert type(model[0]) is normzoo.LayerNorm and net.norm is old and type(net.rms) is normzoo.RMSNorm


def test_hooks_come_along():
    calls = []
    model = Net()
    norm = model.norm
    handles = [
        norm.register_forward_pre_hook(lambda module, args: calls.append(("pre", type(module)))),
        norm.register_forward_hook(lambda module, args, kwargs, y: y + 1, with_kwargs=True, always_call=True),
        norm.register_full_backward_hook(lambda module, *_: calls.append(("backward", type(module)))),
        norm.register_state_dict_post_hook(lambda module, *_: calls.append(("state", type(module)))),
    ]
    assert "has backward_hooks, forward_hooks" in str(normzoo.inspect(model))
    x = torch.randn(3, 8)
    wanted = model(x)
    calls.clear()
    normzoo.convert(model)
    y = model(x)
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)
    y.sum().backward()
    model.state_dict()
    assert calls == [(kind, normzoo.LayerNorm) for kind in ("pre", "backward", "state")]
    for handle in handles:
        handle.remove()
    assert not torch.allclose(model(x), wanted)
    assert len(calls) == 3


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


@pytest.mark.parametrize("part", ["", "first", "norm"])
def test_model_compiled_in_place_refused(part):
    model = Net()
    model.get_submodule(part).compile()
    with pytest.raises(
        ValueError, match=rf"{part or 'the model itself'}'? is compiled .*convert the model first"
    ):
        normzoo.convert(model)


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
    with pytest.raises(
        ValueError,
        match=r"(?s)norm classes seen: 2 \S*test_conversion\.Own, 1 torch\.nn\.\S*\.BatchNorm1d\n"
        r"  0: no rule takes a batch norm to layer_norm, only to batch_norm, [\w, ]* and unified_norm\n"
        r"  1, 2: it agrees with no norm known here",
    ):
        normzoo.convert(model, "layer_norm")
    with pytest.raises(ValueError, match="norm classes seen: none"):
        normzoo.convert(nn.Linear(4, 4), "rms_norm")


def test_second_conversion_says_so():
    model = normzoo.convert(Net())
    with pytest.raises(
        ValueError, match=r"(?s)1 normzoo\.layers\.layer\.LayerNorm.*it is normzoo's layer_norm"
    ):
        normzoo.convert(model)


def test_bad_targets():
    model = Net()
    with pytest.raises(
        ValueError,
        match=r"^convert: there is no layer called 'layer-norm'; there are layer_norm, .*, or 'same'; did",
    ):
        normzoo.convert(model, "layer-norm")
    with pytest.raises(
        ValueError,
        match=r"crms_norm takes rows without their last entry.* with the norm: call normzoo\.to_pre_crms_norm",
    ):
        normzoo.convert(model, "crms_norm")
    with pytest.raises(ValueError, match=r"BatchNorm1d is not a layer of normzoo; .*a function of a site"):
        normzoo.convert(model, nn.BatchNorm1d)
    with pytest.raises(TypeError, match=r"to is a LayerNorm; it must be the name or the class"):
        normzoo.convert(model, normzoo.LayerNorm(4))
    with pytest.raises(TypeError, match=r"model is a list; it must be a torch\.nn\.Module"):
        normzoo.convert([model], "layer_norm")
    with pytest.raises(TypeError, match=r"RMSNorm takes no 'epsilon'; it takes normalized_shape, eps, .*cast"):
        normzoo.convert(model, "rms_norm", epsilon=1e-3)
    assert normzoo.LayerNorm not in types(model) and normzoo.RMSNorm not in types(model)
