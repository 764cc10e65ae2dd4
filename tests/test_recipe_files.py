"""Recipes as files: read from and written to, and damaged or hostile ones, which change nothing."""

import copy
import json
import os

import pytest
import torch
from small_models import without_bias
from torch import nn

import normzoo
from normzoo.centering import ZeroMean, with_zero_mean
from normzoo.recipes import recipe_of


def make():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(9, 8),
            "conv": nn.Conv1d(8, 8, 3, groups=2),
            "batch": nn.BatchNorm1d(8),
            "act": nn.ReLU(),
            "norm": nn.LayerNorm(8),
            "twin": nn.LayerNorm(8),
            "linear": nn.Linear(8, 9, bias=False),
            "encoder": nn.TransformerEncoderLayer(8, 2, 8, batch_first=True),
        }
    )


def converted():
    model = make()
    model["linear"].weight = model["embedding"].weight
    model["embedding"].__class__ = with_zero_mean(nn.Embedding, -1)
    nn.utils.parametrize.register_parametrization(model["conv"], "weight", ZeroMean(0))
    model["batch"] = normzoo.freeze_batch_norm(model["batch"])
    model["act"] = nn.Identity()
    model["norm"] = normzoo.RMSNorm(8, eps=1e-3)
    model["twin"] = model["norm"]
    model["encoder"] = normzoo.convert(model["encoder"], "rms_norm")
    return model


RECIPE = recipe_of(converted())


def changed(*path, to=None, drop=False):
    """The recipe with another value at `path`."""
    recipe = copy.deepcopy(RECIPE)
    place = recipe
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return recipe


def layer(name):
    return next(i for i, each in enumerate(RECIPE["layers"]) if name in each["names"])


NORM, FROZEN = ("layers", layer("norm")), ("layers", layer("batch"))
WEIGHT = ("tensors", "norm.weight")
HUGE = {"shape": [10**9, 10**6], "dtype": "float32"}
DEEP: list = []
for _ in range(50):
    DEEP = [DEEP]

BROKEN = [
    # version
    (changed("version", to=2), "of version 2, and this release reads version 1"),
    (changed("version", to=True), "of version True"),
    (changed("version", to="1"), "of version '1'"),
    (changed("version", drop=True), "it must be an object with a version"),
    # the form of every field
    *((changed(key, drop=True), f"recipe lacks {key}") for key in RECIPE if key != "version"),
    *((changed(key, to=7), f"recipe.{key} is 7; it must be") for key in RECIPE if key != "version"),
    (changed("extra", to=1), "recipe holds 'extra', which is unknown"),
    *(
        (changed(*NORM, key, to=7), rf"layers\[\d\].{key} is 7; it must be")
        for key in ("names", "layer", "arguments")
    ),
    *(
        (changed(*NORM, key, to="yes"), rf"layers\[\d\].{key} is 'yes'")
        for key in ("children", "resting", "how")
    ),
    *(
        (changed(*NORM, "names", to=to), r"names.* must (hold a name|be text)")
        for to in ([], [3], [None], [["a"]])
    ),
    (changed(*NORM, "names", to=["norm", "norm"]), "holds 'norm' twice"),
    (changed(*NORM, "names", to=["norm", "batch"]), "layers holds 'batch' twice"),
    (changed(*NORM, to=DEEP), r"layers\[\d\] is a list; it must be an object"),
    (changed(*NORM, "arguments", "normalized_shape", to=DEEP), "normalized_shape is .*it must be"),
    (
        changed(*FROZEN, "frozen_from", to={"sources": {"weight": 3}}),
        r"sources\['weight'\] is 3; it must be text",
    ),
    (changed(*FROZEN, "frozen_from", "layer", to="BatchNorm1d"), "lacks arguments"),
    (changed("centered_outputs", 0, "dim", to=1.5), "dim is 1.5; it must be an int"),
    (changed("parametrizations", 0, "chain", to=[]), "no parametrization of this library"),
    (changed(*WEIGHT, "shape", to=[-1]), "it must hold ints that are not negative"),
    (changed(*WEIGHT, "shape", to=[True]), "it must hold ints"),
    (changed(*WEIGHT, "shape", to=[1] * 99), "which no tensor can have"),
    (changed(*WEIGHT, "shape", to=[10**9] * 9), "which no tensor can have"),
    (changed(*WEIGHT, "dtype", to="save"), "dtype is 'save', which is no dtype of torch"),
    (changed("ties", 0, to=["conv.bias"]), r"ties\[0\] must hold several"),
    (changed("ties", 0, to=["conv.bias", "conv.bias2"]), "which tensors does not"),
    (changed("ties", 0, to=["conv.bias", "encoder.linear1.weight"]), "of one shape, dtype and kind"),
    (changed("ties", to=[RECIPE["ties"][0]] * 2), "ties holds .* twice"),
    (changed("identities", to=["act", "act"]), "identities holds 'act' twice"),
    # layers and arguments that are not known
    *(
        (changed(*NORM, "layer", to=name), "there is no .*; there are LayerNorm, RMSNorm")
        for name in ("os.system", "__import__", "torch.nn.Linear", "../x", "Linear", "rms_norm", "", "ZeroMean")
    ),
    (changed("parametrizations", 0, "chain", 0, "layer", to="eval"), "there is no 'eval'; there are ZeroMean"),
    (changed("plain", to={"Sequential": ["norm"]}), "plain holds 'Sequential'; it may hold Conv1d"),
    *(
        (changed(*NORM, "arguments", name, to=1), f"RMSNorm has no argument '{name}'")
        for name in ("self", "device", "dtype", "process_group", "__class__", "forward")
    ),
    *(
        (changed(*NORM, "arguments", name, to=to), f"'norm': RMSNorm: {name} is")
        for name, wrong in {
            "eps": ("x", [1], True, {}),
            "normalized_shape": ("8", None, {"a": 1}, [8.0], [True]),
            "bias": (None, 1, "True"),
            "cast": (1, None, ["gemma"]),
        }.items()
        for to in wrong
    ),
    (changed(*NORM, "arguments", "normalized_shape", to=[-3]), "a RMSNorm cannot be made of .*-3"),
    (changed(*NORM, "arguments", "normalized_shape", to=[10**30]), "a RMSNorm cannot be made of"),
    (changed(*NORM, "arguments", "cast", to="eval"), "a RMSNorm cannot be made of .*'eval'"),
    (changed(*NORM, "arguments", to={}), "a RMSNorm cannot be made of"),
    (
        changed(*NORM, "how", to={"over_channels": True, "then": ["forward"], "any_rank": False}),
        "none of its childr",
    ),
    (changed(*NORM, "children", to=["__class__"]), "it has a child __class__ of the norm"),
    (changed(*NORM, "layer", to="Folded"), "Folded has no argument"),
    # what does not fit
    *(
        (changed(*NORM, "names", to=["twin", name]), "the model has no module '")
        for name in (
            "gone",
            "norm.weight",
            "__class__",
            "norm.__init__",
            "forward",
            "../norm",
            "norm.",
            ".",
            "norm/x",
        )
    ),
    (
        changed("centered_outputs", 0, "names", to=["nowhere"]),
        "has no module 'nowhere', which is a module whose output",
    ),
    (changed("identities", to=["_modules"]), "has no module '_modules', which is an Identity in the recipe"),
    (changed("slow", to=["norm"]), "'norm' is a RMSNorm, and an encoder of torch in the recipe"),
    (
        changed("parametrizations", 0, "tensor", to="__class__"),
        "'conv' has no '__class__', which is parametrized",
    ),
    (changed("parametrizations", 0, "chain", 0, "arguments", "dim", to=9), "ZeroMean does not fit its weight"),
    (
        changed("parametrizations", 0, "chain", to=[None, *RECIPE["parametrizations"][0]["chain"]]),
        "not of normzoo",
    ),
    (
        changed(*FROZEN, "frozen_from", to={"sources": {"weight": "gamma"}}),
        "had a gamma, and a BatchNorm1d has none",
    ),
    (changed(*WEIGHT, "shape", to=[9]), "ties|its weight has shape"),
    (
        changed("tensors", "norm.weight2", to=HUGE | {"shape": [2]}),
        "parameter 'norm.weight2' of shape .* none of that",
    ),
    (changed("tensors", "encoder.linear1.bias", drop=True), "the model has a parameter 'encoder.linear1.bias'"),
    (changed("tensors", "encoder.linear1.bias", to=HUGE), r"would add 1000000000000\d+ entries to a model of"),
    (changed("tensors", "encoder.linear1.bias", "shape", to=[5]), "which no conversion makes of it"),
    (changed("tensors", "encoder.linear1.bias", "shape", to=[1, 8]), "and in the model its shape is"),
    (changed("tensors", "encoder.linear1.bias", "dtype", to="int8"), "and in the model it is of torch.float32"),
    (
        changed("tensors", "encoder.linear1.bias", "buffer", to=True),
        "a buffer 'encoder.linear1.bias' .* none of that",
    ),
    (
        changed("tensors", "encoder.self_attn.in_proj_bias", "shape", to=[9]),
        r"and in the model its shape is \(\d+,\), which no conversion makes of it",
    ),
    (
        changed("tensors", "conv.bias", "shape", to=[7]),
        r"conv.bias' of shape \(7,\).*which no conversion makes",
    ),
    (
        changed("tensors", "conv.parametrizations.weight.original", "shape", to=[8, 4, 5]),
        "which no conversion makes",
    ),
    (
        changed("tensors", "conv.parametrizations.weight.original", "shape", to=[9, 4, 3]),
        "which no conversion makes",
    ),
    (changed("ties", to=[]), "the ties differ: the model has .*norm.weight.*, and the recipe does not"),
    (changed("layers", to=[]), "the recipe has|the model has"),
]


def test_broken_recipes_change_nothing(tmp_path):
    model = make()
    state = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    shown, classes = repr(model), {name: type(m) for name, m in model.named_modules()}
    path = tmp_path / "recipe.json"
    for recipe, words in BROKEN:
        case = f"{words}: {str(recipe)[:60]}"
        try:
            path.write_text(json.dumps(recipe))
            with pytest.raises(ValueError, match=f"apply_recipe: .*(?:{words or 'it must be an object'})"):
                normzoo.apply_recipe(model, path)
        except BaseException as error:
            raise AssertionError(case) from error
        now = model.state_dict(keep_vars=True)
        assert repr(model) == shown and now.keys() == state.keys(), case
        assert all(now[name] is t and torch.equal(t, value) for name, (t, value) in state.items()), case
        assert classes == {name: type(m) for name, m in model.named_modules()}, case
    normzoo.apply_recipe(model, RECIPE)
    assert recipe_of(model) == RECIPE


def test_random_damage_is_told_or_harmless():
    """Values of a recipe exchanged at random: a ValueError and nothing changed, or a model that fits."""
    chance = torch.Generator().manual_seed(0)
    text, shown = json.dumps(RECIPE), repr(make())
    for i in range(60):
        at = int(torch.randint(len(text), (), generator=chance))
        bad = text[:at] + '0"[]{},:-e'[i % 10] + text[at + 1 :]
        model = make()
        try:
            recipe = json.loads(bad)
        except ValueError:
            continue
        try:
            normzoo.apply_recipe(model, recipe)
        except ValueError as error:
            assert str(error).startswith("apply_recipe: ") and repr(model) == shown, bad[at - 20 : at + 20]


def test_text_that_is_no_recipe(tmp_path):
    path = tmp_path / "recipe.json"
    for text, words in {
        b"": "it is no JSON, and so no recipe",
        b"\xff\xfe\x00": "it is no text",
        b"[" * 200000: "nested too deeply",
        b'{"version": 1, "version": 1}': "'version' is there twice",
        b'{"version": NaN}': "it holds NaN, which is no number of JSON",
        b"1" * 5000: "",
        b"\x80\x04cos\nsystem\n": "it is no",
    }.items():
        path.write_bytes(text)
        with pytest.raises(ValueError, match=f"apply_recipe: '.*recipe.json': .*{words}"):
            normzoo.apply_recipe(make(), path)
    path.write_text(json.dumps(RECIPE).replace("0.001", "1e999"))
    with pytest.raises(ValueError, match="apply_recipe: 'norm': RMSNorm: eps is inf; it must be float"):
        normzoo.apply_recipe(make(), path)
    with pytest.raises(FileNotFoundError):
        normzoo.apply_recipe(make(), tmp_path / "none.json")
    with path.open("wb") as file:
        file.truncate(100_000_001)
    with pytest.raises(ValueError, match="it has 100000001 bytes, and a recipe at most 100000000"):
        normzoo.apply_recipe(make(), path)


def header(about, length=None):
    text = json.dumps(about).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def test_the_header_of_a_safetensors_file(tmp_path):
    path, recipe = tmp_path / "weights.safetensors", json.dumps(RECIPE)
    path.write_bytes(header({"__metadata__": {"format": "pt", "normzoo.recipe": recipe}}) + bytes(64))
    assert recipe_of(normzoo.apply_recipe(make(), str(path))) == RECIPE
    none = "there is no recipe in its metadata, under 'normzoo.recipe'"
    for content, words in {
        b"": "it is no safetensors file",
        bytes(7): "it is no safetensors file",
        header({}, 2**60): "its header would be longer than it can be",
        header({}, 3): "its header would be longer",
        header([]): none,
        header({"__metadata__": 3}): none,
        header({"__metadata__": {"format": "pt"}}): none,
        header({"__metadata__": {"normzoo.recipe": RECIPE}}): none,
        header({"__metadata__": {"normzoo.recipe": "[" * 200000}}): "nested too deeply",
        header({"__metadata__": {"normzoo.recipe": "{}"}}): "it must be an object with a version",
        (4).to_bytes(8, "little") + b"\xff\xff\xff\xff": "it is no text",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"apply_recipe: '.*weights.safetensors': .*{words}"):
            normzoo.apply_recipe(make(), path)
    with pytest.raises(
        ValueError, match=r"save_recipe: path is .*weights.safetensors', and a recipe is JSON; for"
    ):
        normzoo.save_recipe(make(), path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.json"
    normzoo.save_recipe(make(), path)
    first = path.read_text()
    assert (
        json.loads(first) == recipe_of(make())
        and '\n "norm.weight": {"shape": [8], "dtype": "float32"},' in first
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError, match="no space"):
            normzoo.save_recipe(converted(), path)
    assert path.read_text() == first and list(tmp_path.iterdir()) == [path]
    normzoo.save_recipe(converted(), path)  # as other functions that save, it takes the place of what is there
    assert json.loads(path.read_text()) == RECIPE


def test_arguments_of_other_kinds():
    with pytest.raises(TypeError, match=r"save_recipe: model is a dict; it must be a torch.nn.Module"):
        normzoo.save_recipe({}, "x")
    with pytest.raises(TypeError, match="apply_recipe: model is an int"):
        normzoo.apply_recipe(3, RECIPE)
    with pytest.raises(TypeError, match="apply_recipe: recipe is an int; it must be a path, or a dict"):
        normzoo.apply_recipe(make(), 3)
    wrapped = type("DistributedDataParallel", (nn.Sequential,), {"__module__": "torch.nn.parallel"})(make())
    for call in (lambda: normzoo.apply_recipe(wrapped, RECIPE), lambda: recipe_of(wrapped)):
        with pytest.raises(ValueError, match=r"_recipe|recipe_of: the model itself is wrapped"):
            call()


def test_what_a_recipe_cannot_hold(caplog):
    group = object()
    model = nn.Sequential(normzoo.BatchNorm1d(4, sync=True), normzoo.LayerNorm(4))
    model[0].process_group = group
    assert "process_group" not in recipe_of(model)["layers"][0]["arguments"]
    assert "1 layers share statistics in a process group of their own" in caplog.text
    model[1].normalized_shape = (3,)
    with pytest.raises(
        ValueError, match=r"recipe_of: '1' cannot be made again: .* with weight of shape \(3,\), not"
    ):
        recipe_of(model)
    model[1] = normzoo.RMSNorm(4)
    model[1].eps = torch.ones(())
    with pytest.raises(
        ValueError, match=r"'1' cannot be made again: eps of its RMSNorm is tensor.*no place in a"
    ):
        recipe_of(model)
    with pytest.raises(ValueError, match="save_recipe: weight has no shape yet; run the model once"):
        normzoo.save_recipe(nn.LazyLinear(3), "never")
    counted = recipe_of(normzoo.BatchNorm1d(4, nonfinite="skip"))["tensors"]  # in no checkpoint
    assert "batches_skipped" not in counted and "running_var" in counted
    without = nn.Sequential(without_bias(normzoo.LayerNorm(4)))
    again = normzoo.apply_recipe(nn.Sequential(nn.LayerNorm(4)), recipe_of(without))
    assert again[0].bias is None
