"""torch's own module test cases (ModuleInfo), pointed at the drop-in classes.

A case is one of torch's module inputs in one dtype and mode. Every aspect runs all cases it applies to, against
torch's class with the same state.
"""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tolerance import assert_as_good
from torch import Tensor, nn
from torch.func import functional_call

import normzoo

OURS = {
    "LayerNorm": normzoo.LayerNorm,
    "RMSNorm": normzoo.RMSNorm,
    "BatchNorm1d": normzoo.BatchNorm1d,
    "BatchNorm2d": normzoo.BatchNorm2d,
    "BatchNorm3d": normzoo.BatchNorm3d,
    "GroupNorm": normzoo.GroupNorm,
    "InstanceNorm1d": normzoo.InstanceNorm1d,
    "InstanceNorm2d": normzoo.InstanceNorm2d,
    "InstanceNorm3d": normzoo.InstanceNorm3d,
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@functools.cache
def torch_cases():
    """torch.testing._internal.common_modules, without what importing it does to the process."""
    pytest.importorskip("expecttest")
    with pytest.MonkeyPatch.context() as kept, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hypothesis is missing
        kept.setattr(sys, "path", list(sys.path))
        # Else torch.backends would refuse to have its flags set from here on.
        kept.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
        for scripted in (torch._C.ScriptFunction, torch._C.ScriptMethod):
            kept.setattr(scripted, "__call__", vars(scripted)["__call__"])
        from torch.testing._internal import common_modules
    return common_modules


@dataclass(repr=False)
class Case:
    info: Any
    input: Any
    dtype: torch.dtype
    training: bool
    error: Any = None

    def __repr__(self) -> str:
        mode = "training" if self.training else "eval"
        return f"{self.info.name} {self.input.desc or 'default'} {self.dtype} {mode}"

    @property
    def x(self) -> Tensor:
        given = self.input.forward_input
        (x,) = (*given.args, *given.kwargs.values())
        return x.detach()

    def make(self, cls: type[nn.Module], **factory) -> Any:
        given = self.input.constructor_input
        return cls(*given.args, **given.kwargs, **{"dtype": self.dtype, **factory}).train(self.training)

    def ours(self, **factory) -> Any:
        return self.make(OURS[self.info.module_cls.__name__], **factory)

    def torchs(self, **factory) -> Any:
        return self.make(self.info.module_cls, **factory)

    def pair(self) -> tuple[Any, Any]:
        """Our module and torch's, in the same state, which is not that of a new module."""
        ours, torchs = self.ours(), self.torchs()
        with torch.no_grad():
            for t in (*torchs.parameters(), *torchs.buffers()):
                t.uniform_(0.5, 1.5) if t.is_floating_point() else t.add_(3)
        assert ours.load_state_dict(torchs.state_dict(), strict=True) == torchs.load_state_dict(
            ours.state_dict()
        )
        return ours, torchs


@functools.cache
def info(name: str) -> Any:
    (found,) = (i for i in torch_cases().module_db if i.module_cls is getattr(nn, name))
    return found


def modes(name: str) -> tuple[bool, ...]:
    return (True, False) if info(name).train_and_eval_differ else (True,)  # as torch's own tests


def arguments(dtype: torch.dtype, training: bool) -> dict[str, Any]:
    return {"device": "cpu", "dtype": dtype, "requires_grad": False, "training": training}


def cases(name: str, dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(0)
    given = info(name)
    return [
        Case(given, i, dtype, training)
        for training in modes(name)
        for i in given.module_inputs_func(given, **arguments(dtype, training))
    ]


def error_cases(name: str, dtype: torch.dtype) -> list[Case]:
    given = info(name)
    if given.module_error_inputs_func is None:
        return []
    return [
        Case(given, error.module_error_input, dtype, training, error)
        for training in modes(name)
        for error in given.module_error_inputs_func(given, **arguments(dtype, training))
    ]


ASPECTS: list[tuple] = []


def aspect(dtypes=DTYPES, applies=lambda case: True, cases=cases):
    """A check of one case made a test of every class and dtype, which counts."""

    def made(check: Callable[[Case], None]):
        ASPECTS.append((dtypes, applies, cases))

        @pytest.mark.parametrize("name", OURS)
        @pytest.mark.parametrize("dtype", dtypes, ids=lambda d: str(d).removeprefix("torch."))
        def test(name, dtype):
            for case in filter(applies, cases(name, dtype)):
                check(case)

        return test

    return made


def slope(t: Tensor) -> Tensor:
    """A gradient that is neither constant nor orthogonal to anything."""
    return torch.linspace(-1, 2, t.numel()).view(t.shape).to(t.dtype)


def results(module: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step; the module stays as it was."""
    module, x = copy.deepcopy(module), x.detach().requires_grad_()
    y = module(x)
    y.backward(slope(y) if dy is None else dy)
    found = {"output": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {k}": p.grad for k, p in module.named_parameters()}
    return found | dict(module.named_buffers())


def assert_alike(case: Case, ours: dict, torchs: dict, exact: dict) -> None:
    assert ours.keys() == torchs.keys() == exact.keys(), case
    for key, expected in torchs.items():
        what = f"{case}, {key}"
        if not expected.is_floating_point():
            assert torch.equal(ours[key], expected), what
        elif case.dtype is torch.float64:
            torch.testing.assert_close(
                ours[key], expected, rtol=1e-12, atol=1e-12, msg=lambda m, w=what: f"{w}: {m}"
            )
        else:
            assert_as_good(what, ours[key], expected, exact[key])


def exactly(torchs: nn.Module, x: Tensor, dy: Tensor | None = None) -> dict[str, Tensor]:
    """In float64, from what the others see after rounding."""
    return results(copy.deepcopy(torchs).double(), x.double(), (slope(x) if dy is None else dy).double())


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: Any) -> None:
    assert a.keys() == b.keys(), what
    for key in a:
        assert torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype, f"{what}, {key}"


@aspect()
def test_outputs_gradients_and_buffers(case):
    ours, torchs = case.pair()
    assert_alike(case, results(ours, case.x), results(torchs, case.x), exactly(torchs, case.x))


@aspect(applies=lambda case: case.input.reference_fn is not None)
def test_reference_function(case):
    ours, _ = case.pair()
    expected = case.input.reference_fn(copy.deepcopy(ours), case.x)
    bound = 1.6e-2 if case.dtype is torch.bfloat16 else 1e-5  # torch's; its reference is in float32
    torch.testing.assert_close(ours(case.x), expected, rtol=bound, atol=1e-5)


def leaves(case: Case):
    module, _ = case.pair()
    names = [k for k, _ in module.named_parameters()]

    def call(x, *values):
        return functional_call(module, dict(zip(names, values, strict=True)), x)

    return call, (case.x.requires_grad_(), *(p.detach().clone().requires_grad_() for p in module.parameters()))


@aspect((torch.float64,))
def test_gradcheck(case):
    # Every entry on its own where that does not take long.
    how = {"nondet_tol": case.info.gradcheck_nondet_tol, "fast_mode": case.x.numel() > 100}
    assert torch.autograd.gradcheck(*leaves(case), **how), case


@aspect((torch.float64,), lambda case: case.info.supports_gradgrad)
def test_gradgradcheck(case):
    how = {"nondet_tol": case.info.gradcheck_nondet_tol, "fast_mode": case.x.numel() > 20}
    assert torch.autograd.gradgradcheck(*leaves(case), **how), case


@aspect()
def test_copies(case):
    ours, _ = case.pair()
    expected = results(ours, case.x)
    for copied in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours) and copied.training is case.training
        assert repr(copied) == repr(ours)
        same(results(copied, case.x), expected, case)


@aspect((torch.float32,))
def test_repr(case):
    ours, torchs = case.pair()
    # RMSNorm shows its own arguments after torch's.
    assert repr(ours).startswith(repr(torchs)[:-1]), case
    assert repr(ours) == repr(torchs) or type(ours) is normzoo.RMSNorm, case


@aspect()
def test_factory_arguments(case):
    for device in ("cpu", "meta"):
        made, expected = (
            {
                k: (t.shape, t.dtype, t.device, type(t), t.requires_grad)
                for k, t in m.state_dict(keep_vars=True).items()
            }
            for m in (case.ours(device=device), case.torchs(device=device))
        )
        assert list(made.items()) == list(expected.items()), case
    assert all(p.dtype is torch.get_default_dtype() for p in case.ours(dtype=None).parameters())


def strided(t: Tensor) -> list[Tensor]:
    """t in other places of memory: every other one, the axes reversed, not at the start."""
    every_other = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])[..., ::2].copy_(t)
    axes = tuple(reversed(range(t.dim())))
    shifted = torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)
    return [every_other, t.permute(axes).contiguous().permute(axes), shifted]


@aspect()
def test_strided(case):
    ours, torchs = case.pair()
    dy = slope(case.x)
    one = torch.ones((), dtype=case.dtype).expand(case.x.shape)  # what sum().backward() sends
    for x, there in ((case.x, one), *((x, dy) for x in strided(case.x)), *((case.x, g) for g in strided(dy))):
        # torch gets the same strides: its own error in bfloat16 depends on them.
        assert_alike(case, results(ours, x, there), results(torchs, x, there), exactly(torchs, x, there))


@aspect(applies=lambda case: case.x.dim() in FORMATS)
def test_memory_format(case):
    """Values do not depend on it, and y has that of x."""
    ours, torchs = case.pair()
    plain, exact = results(torchs, case.x), exactly(torchs, case.x)
    kinds = torch.contiguous_format, FORMATS[case.x.dim()]
    for of_module, of_x in itertools.product(kinds, kinds):
        found = results(copy.deepcopy(ours).to(memory_format=of_module), case.x.contiguous(memory_format=of_x))
        assert_alike(case, found, plain, exact)
        # On a CPU LayerNorm is torch's operator, whose rows come out in order. An image that is no batch has
        # its channels first, where channels_last does not move them.
        if not isinstance(ours, nn.LayerNorm) and "no_batch_dim" not in case.input.desc:
            assert found["output"].is_contiguous(memory_format=of_x), f"{case}, {of_x}"


@aspect()
def test_to_empty_and_reset(case):
    ours = case.ours(device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for t in (*ours.parameters(), *ours.buffers()):
            t.fill_(7)  # whatever was in the memory
    ours.reset_parameters()
    same(ours.state_dict(), case.torchs().state_dict(), case)
    same(results(ours, case.x), results(case.ours(), case.x), case)


@aspect()
def test_state_dict_both_ways(case):
    ours, torchs = case.pair()
    same(ours.state_dict(), torchs.state_dict(), case)
    assert ours.state_dict()._metadata == torchs.state_dict()._metadata, case
    ours(case.x)
    fresh = case.torchs()
    fresh.load_state_dict(ours.state_dict(), strict=True)
    same(fresh.state_dict(), ours.state_dict(), case)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**ours.state_dict(), "more": torch.zeros(1)}, strict=True)
    for key in ours.state_dict():
        if key != "num_batches_tracked":  # may be missing, see below
            with pytest.raises(RuntimeError, match="Missing key"):
                ours.load_state_dict({k: t for k, t in ours.state_dict().items() if k != key}, strict=True)


@aspect(applies=lambda case: "num_batches_tracked" in case.torchs().state_dict())
def test_state_dict_of_version_1(case):
    """Written before there was num_batches_tracked, by torch 0.4."""
    ours, torchs = case.pair()
    old = torchs.state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    for target in (ours, case.ours(), case.ours(device="meta").to_empty(device="cpu")):
        expected = case.torchs()
        expected.num_batches_tracked.copy_(target.num_batches_tracked)
        expected.load_state_dict(old, strict=True)
        target.load_state_dict(old, strict=True)
        same(target.state_dict(), expected.state_dict(), case)


@aspect(cases=error_cases)
def test_error_inputs(case):
    # Ours may refuse when the module is made, where torch waits for the call, and says which layer it is.
    with pytest.raises(case.error.error_type, match=f"^{case.info.module_cls.__name__}: "):
        case.ours()(case.x)


def test_number_of_cases(capsys):
    each = [
        sum(1 for name in OURS for dtype in dtypes for case in found(name, dtype) if applies(case))
        for dtypes, applies, found in ASPECTS
    ]
    with capsys.disabled():
        print(f"\n{sum(each)} cases of torch's ModuleInfo in {len(each)} aspects of {len(OURS)} classes")
    assert min(each) > 0 and sum(each) > 2500


def test_import_leaves_the_process_alone():
    torch_cases()
    assert not torch.backends.flags_frozen()
    assert (
        torch._C.ScriptMethod.__call__ is not sys.modules["torch.testing._internal.common_utils"].prof_meth_call
    )
    assert torch.get_default_dtype() is torch.float32
    assert not torch.are_deterministic_algorithms_enabled()
