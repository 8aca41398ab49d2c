"""torch's own BatchNorm inputs: every sample of ModuleInfo and OpInfo, used as in torch's tests.

Values are compared with a float64 reference, within tolerance (bnkernels.testing). In float64 and float32 they are
also compared with torch. In 16 bits torch rounds intermediate results (its y is off by several ulps where it is small,
and its saved statistics are 16-bit), so a comparison would measure torch's rounding. The number of inputs that ran is
printed at the end of the run.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TORCH_INPUTS
from hardware import LARGE
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bnkernels as bnk
from bnkernels import _ops as ops
from bnkernels import testing

pytest.importorskip("expecttest", reason="torch.testing._internal imports expecttest, which is not installed")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, ModuleInput, module_db
from torch.testing._internal.common_utils import freeze_rng_state, noncontiguous_like
from torch.testing._internal.opinfo.core import OpInfo, SampleInput

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: bnk.BatchNorm1d,
    nn.BatchNorm2d: bnk.BatchNorm2d,
    nn.BatchNorm3d: bnk.BatchNorm3d,
}
LAZY: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    nn.BatchNorm1d: (nn.LazyBatchNorm1d, bnk.LazyBatchNorm1d),
    nn.BatchNorm2d: (nn.LazyBatchNorm2d, bnk.LazyBatchNorm2d),
    nn.BatchNorm3d: (nn.LazyBatchNorm3d, bnk.LazyBatchNorm3d),
}
MODULES: list[ModuleInfo] = [info for info in module_db if info.module_cls in OURS]
OPS: list[OpInfo] = [
    info
    for info in op_db
    if info.name
    in ("nn.functional.batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")
]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPARE_WITH_TORCH = {torch.float64: True, torch.float32: True, torch.float16: False, torch.bfloat16: False}
Count = Callable[[str, int], None]


def test_torch_has_these_inputs() -> None:
    """If torch renames or moves them, the tests below would pass without inputs."""
    assert {info.module_cls for info in MODULES} == set(OURS)
    assert {info.name for info in OPS} >= {"nn.functional.batch_norm", "native_batch_norm"}


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    return lambda what, number: record_property(TORCH_INPUTS, (what, number))


def module_id(info: ModuleInfo) -> str:
    return info.module_cls.__name__


def op_id(info: OpInfo) -> str:
    return f"{info.name}{'-' if info.variant_test_name else ''}{info.variant_test_name}"


modules = pytest.mark.parametrize("info", MODULES, ids=module_id)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def module_inputs(info: ModuleInfo, device: str, dtype: torch.dtype, training: bool) -> list[ModuleInput]:
    return list(info.module_inputs_func(info, device=device, dtype=dtype, requires_grad=True, training=training))


def build(cls: type[nn.Module], sample: ModuleInput, device: str, dtype: torch.dtype, training: bool) -> nn.Module:
    args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
    module = cls(*args, **kwargs, device=device, dtype=dtype)
    return module.train(training)


def pair(
    info: ModuleInfo, sample: ModuleInput, device: str, dtype: torch.dtype, training: bool
) -> tuple[nn.Module, nn.Module]:
    """torch's module and this package's, with equal nontrivial parameters and statistics."""
    torch_module = build(info.module_cls, sample, device, dtype, training)
    with torch.no_grad():
        for tensor in [*torch_module.parameters(), *torch_module.buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    ours = build(OURS[info.module_cls], sample, device, dtype, training)
    ours.load_state_dict(torch_module.state_dict())
    return torch_module, ours


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def check_module(torch_module: nn.Module, ours: nn.Module, x: Tensor) -> None:
    """Forward and backward of both: within tolerance, close to torch's, and the same buffers afterwards."""
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    torch_module.zero_grad()
    ours.zero_grad()
    x_native, x_ours = leaf(x), leaf(x)
    y_native, y_ours = torch_module(x_native), ours(x_ours)
    grad = torch.randn_like(y_native)
    y_native.backward(grad)
    y_ours.backward(grad)
    named = dict(ours.named_parameters())
    if x.numel() > 0:
        inputs = testing.Inputs(
            x=x,
            grad=grad,
            weight=named.get("weight"),
            bias=named.get("bias"),
            running_mean=before.get("running_mean"),
            running_var=before.get("running_var"),
            num_batches_tracked=before.get("num_batches_tracked"),
            training=ours.training or "running_mean" not in before,
            momentum=ours.momentum,
            eps=ours.eps,
        )
        outputs = testing.Outputs(
            y=y_ours,
            dx=x_ours.grad,
            dweight=named["weight"].grad if "weight" in named else None,
            dbias=named["bias"].grad if "bias" in named else None,
            **dict(ours.named_buffers()),
        )
        testing.assert_within(testing.judge_call(inputs, outputs), f"{ours} on {tuple(x.shape)}")
    check_same(
        [y_ours, x_ours.grad, *(p.grad for p in ours.parameters()), *ours.buffers()],
        [y_native, x_native.grad, *(p.grad for p in torch_module.parameters()), *torch_module.buffers()],
        values=COMPARE_WITH_TORCH[x.dtype] or x.numel() == 0,
    )


def check_same(got: list[Tensor | None], expected: list[Tensor | None], values: bool) -> None:
    """Equal presence, shapes, dtypes and strides, and optionally values."""
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        assert (one is None) == (other is None)
        if one is None or other is None:
            continue
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        if values:
            torch.testing.assert_close(one, other)


@modules
@dtypes
@trainings
def test_module(info: ModuleInfo, dtype: torch.dtype, training: bool, device: str, count: Count) -> None:
    samples = module_inputs(info, device, dtype, training)
    count("ModuleInfo: values, gradients, buffers", len(samples))
    for sample in samples:
        torch_module, ours = pair(info, sample, device, dtype, training)
        for _ in range(2):  # the second call starts from updated statistics
            check_module(torch_module, ours, sample.forward_input.args[0])


@modules
@trainings
def test_lazy_module(info: ModuleInfo, training: bool, device: str, count: Count) -> None:
    """ModuleInfo has no lazy BatchNorm: these are the inputs of the eager classes, without num_features."""
    samples = module_inputs(info, device, torch.float32, training)
    count("ModuleInfo: lazy modules", len(samples))
    for sample in samples:
        torch_class, cls = LAZY[info.module_cls]
        args, kwargs = sample.constructor_input.args[1:], sample.constructor_input.kwargs
        torch_module, ours = (lazy(*args, **kwargs, device=device).train(training) for lazy in (torch_class, cls))
        assert repr(ours) == repr(torch_module)
        check_module_first_call(torch_module, ours, sample.forward_input.args[0])
        assert type(ours) is OURS[info.module_cls]
        check_module(torch_module, ours, sample.forward_input.args[0])


def check_module_first_call(torch_module: nn.Module, ours: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(ours(x), torch_module(x))
    torch.testing.assert_close(ours.state_dict(), torch_module.state_dict())


@modules
@dtypes
@trainings
def test_module_noncontiguous(info: ModuleInfo, dtype: torch.dtype, training: bool, device: str, count: Count) -> None:
    samples = module_inputs(info, device, dtype, training)
    count("ModuleInfo: non-contiguous inputs and gradients", len(samples))
    for sample in samples:
        x = sample.forward_input.args[0]
        _, ours = pair(info, sample, device, dtype, training)
        again = build(OURS[info.module_cls], sample, device, dtype, training)
        again.load_state_dict(ours.state_dict())
        dense, scattered = leaf(x), noncontiguous_like(x).detach().requires_grad_()
        y, y_scattered = ours(dense), again(scattered)
        grad = torch.randn_like(y)
        y.backward(grad)
        y_scattered.backward(noncontiguous_like(grad).detach())
        assert torch.equal(y, y_scattered)
        assert dense.grad is not None and scattered.grad is not None
        assert torch.equal(dense.grad, scattered.grad)
        for parameter, other in zip(ours.parameters(), again.parameters()):
            assert parameter.grad is not None and other.grad is not None
            assert torch.equal(parameter.grad, other.grad)


@modules
@trainings
def test_module_memory_format(info: ModuleInfo, training: bool, device: str, count: Count) -> None:
    """Output and grad_input have the input's memory format, whatever the gradient's is."""
    formats = {4: [torch.contiguous_format, torch.channels_last], 5: [torch.contiguous_format, torch.channels_last_3d]}
    ran = 0
    for sample in module_inputs(info, device, torch.float32, training):
        x = sample.forward_input.args[0]
        for x_format in formats.get(x.dim(), [torch.contiguous_format]):
            for grad_format in formats.get(x.dim(), [torch.contiguous_format]):
                _, ours = pair(info, sample, device, torch.float32, training)
                x_in = leaf(x.detach().contiguous(memory_format=x_format))
                y = ours(x_in)
                # autograd.grad() instead of backward(): .grad is given the strides of x.
                (dx,) = torch.autograd.grad(y, x_in, torch.randn_like(y).contiguous(memory_format=grad_format))
                if x.numel() > 0:  # strides of empty tensors have no meaning
                    assert y.is_contiguous(memory_format=x_format) and y.stride() == x_in.stride()
                    assert dx.is_contiguous(memory_format=x_format) and dx.stride() == x_in.stride()
                ran += 1
    count("ModuleInfo: memory formats, pairs of input's and gradient's", ran)


@LARGE
@pytest.mark.parametrize(
    "info",
    [pytest.param(i, marks=pytest.mark.slow if i.module_cls is not nn.BatchNorm1d else ()) for i in MODULES],
    ids=module_id,
)
@trainings
def test_module_gradients(info: ModuleInfo, training: bool, device: str, count: Count) -> None:
    """Against finite differences: reverse and forward mode, both twice, and batched."""
    samples = module_inputs(info, device, torch.float64, training)
    count("ModuleInfo: gradcheck and gradgradcheck, reverse and forward mode", len(samples))
    for sample in samples:
        _, ours = pair(info, sample, device, torch.float64, training)
        names = [name for name, _ in ours.named_parameters()]

        def call(x: Tensor, *parameters: Tensor, ours: nn.Module = ours, names: list[str] = names) -> Tensor:
            with freeze_rng_state():
                return torch.func.functional_call(ours, dict(zip(names, parameters)), (x,))

        arguments = (leaf(sample.forward_input.args[0]), *(leaf(parameter) for parameter in ours.parameters()))
        assert gradcheck(call, arguments, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(call, arguments, check_fwd_over_rev=True, check_batched_grad=True)


@modules
def test_module_modes_differ(info: ModuleInfo, device: str, count: Count) -> None:
    assert info.train_and_eval_differ
    samples = module_inputs(info, device, torch.float32, True)
    count("ModuleInfo: train and eval differ", len(samples))
    for sample in samples:
        _, ours = pair(info, sample, device, torch.float32, True)
        x = sample.forward_input.args[0]
        differ = not torch.equal(ours(x), ours.eval()(x))
        assert differ == (ours.track_running_stats and x.numel() > 0)


@modules
def test_module_errors(info: ModuleInfo, device: str, count: Count) -> None:
    inputs = info.module_error_inputs_func(info, device=device, dtype=torch.float32, requires_grad=False, training=True)
    for error in inputs:
        sample = error.module_error_input
        args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
        if error.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                OURS[info.module_cls](*args, **kwargs, device=device)
        else:
            ours = OURS[info.module_cls](*args, **kwargs, device=device)
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(*sample.forward_input.args, **sample.forward_input.kwargs)
    assert inputs
    count("ModuleInfo: error inputs", len(inputs))


@modules
def test_module_repr_pickle_dtype(info: ModuleInfo, device: str, count: Count) -> None:
    """repr, pickle, factory arguments, and dtype conversions match torch's."""
    samples = module_inputs(info, device, torch.float32, True)
    count("ModuleInfo: repr, pickle, dtype moves", len(samples))
    for sample in samples:
        torch_module, ours = pair(info, sample, device, torch.float32, True)
        assert repr(ours) == repr(torch_module)
        copy = pickle.loads(pickle.dumps(ours))
        assert type(copy) is type(ours) and repr(copy) == repr(ours)
        torch.testing.assert_close(copy.state_dict(), torch_module.state_dict(), rtol=0, atol=0)
        double = ours.double()
        assert all(t.dtype == torch.float64 for t in [*double.parameters()])
        assert [(n, b.dtype) for n, b in double.named_buffers()] == [
            (n, b.dtype) for n, b in torch_module.double().named_buffers()
        ]


# OpInfo


def as_batch_norm(info: OpInfo, sample: SampleInput) -> tuple[Tensor, dict[str, Any]]:
    """A sample's input, and its other arguments by the names of F.batch_norm."""
    if info.name == "nn.functional.batch_norm":
        names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        defaults: dict[str, Any] = {"training": False, "momentum": 0.1, "eps": 1e-5}
    elif info.name == "_batch_norm_with_update":
        names = ("weight", "bias", "running_mean", "running_var", "momentum", "eps")
        defaults = {"training": True}
    elif len(sample.args) == 5:  # _native_batch_norm_legit.no_stats
        names = ("weight", "bias", "training", "momentum", "eps")
        defaults = {"running_mean": None, "running_var": None}
    else:
        names = ("weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
        defaults = {}
    return sample.input, defaults | dict(zip(names, sample.args)) | sample.kwargs


def op_samples(info: OpInfo, device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for sample in info.sample_inputs(device, dtype, requires_grad=True):
        yield as_batch_norm(info, sample)


def cloned(arguments: dict[str, Any]) -> dict[str, Any]:
    """Copies with their own tensors; parameters become leaves."""
    return {
        name: value
        if not isinstance(value, Tensor)
        else leaf(value)
        if name in ("weight", "bias")
        else value.detach().clone()
        for name, value in arguments.items()
    }


operators = pytest.mark.parametrize("info", OPS, ids=op_id)


def skip_unless_supported(info: OpInfo, dtype: torch.dtype, device: str) -> None:
    if dtype not in info.supported_dtypes(torch.device(device).type):
        pytest.skip(f"torch has no {dtype} samples of {op_id(info)} for {device}")


@operators
@dtypes
def test_op(info: OpInfo, dtype: torch.dtype, device: str, count: Count) -> None:
    """Against torch's op (y, and statistics if it returns them), and within tolerance."""
    skip_unless_supported(info, dtype, device)
    samples = list(op_samples(info, device, dtype))
    count(f"OpInfo {op_id(info)}: values, gradients, statistics", len(samples))
    for x, arguments in samples:
        ours, torch_module = cloned(arguments), cloned(arguments)
        x_ours, x_native = leaf(x), leaf(x)
        y = bnk.batch_norm(x_ours, **ours)
        expected = torch.nn.functional.batch_norm(x_native, **torch_module)
        grad = torch.randn_like(expected)
        y.backward(grad)
        expected.backward(grad)
        parameters = [name for name in ("weight", "bias") if ours[name] is not None]
        if x.numel() > 0:
            inputs = testing.Inputs(x=x, grad=grad, num_batches_tracked=None, **arguments)
            outputs = testing.Outputs(
                y=y,
                dx=x_ours.grad,
                running_mean=ours["running_mean"],
                running_var=ours["running_var"],
                **{f"d{name}": ours[name].grad for name in parameters},
                **saved_statistics(x, arguments),
            )
            testing.assert_within(testing.judge_call(inputs, outputs), f"{op_id(info)} {tuple(x.shape)} {arguments}")
        check_same(
            [y, x_ours.grad, ours["running_mean"], ours["running_var"], *(ours[name].grad for name in parameters)],
            [expected, x_native.grad, *(torch_module[name] for name in ("running_mean", "running_var"))]
            + [torch_module[name].grad for name in parameters],
            values=COMPARE_WITH_TORCH[dtype] or x.numel() == 0,
        )


def saved_statistics(x: Tensor, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The mean and invstd that the ops save in training; torch's torch_module op returns its own."""
    if not arguments["training"]:
        return {}
    weight, bias, eps = (arguments[name] for name in ("weight", "bias", "eps"))
    _, mean, invstd, _ = ops.forward_train(x, weight, bias, None, None, None, 0.0, eps)
    if COMPARE_WITH_TORCH[x.dtype]:
        torch.testing.assert_close(
            (mean, invstd), torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[1:]
        )
    return {"mean": mean, "invstd": invstd}


@LARGE
@operators
def test_op_gradients(info: OpInfo, device: str, count: Count) -> None:
    """Against finite differences: reverse and forward mode, both twice, and batched."""
    skip_unless_supported(info, torch.float64, device)
    samples = list(op_samples(info, device, torch.float64))
    count(f"OpInfo {op_id(info)}: gradcheck and gradgradcheck, reverse and forward mode", len(samples))
    for x, arguments in samples:
        differentiable = [x, *(arguments[n] for n in ("weight", "bias") if arguments[n] is not None)]
        names = [n for n in ("weight", "bias") if arguments[n] is not None]

        def call(
            x: Tensor, *tensors: Tensor, arguments: dict[str, Any] = arguments, names: list[str] = names
        ) -> Tensor:
            return bnk.batch_norm(x, **(cloned(arguments) | dict(zip(names, tensors))))

        assert gradcheck(call, differentiable, check_forward_ad=True, check_batched_grad=info.check_batched_grad)
        assert gradcheck(call, differentiable, check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(
            call, differentiable, check_fwd_over_rev=True, check_batched_grad=info.check_batched_gradgrad
        )


@operators
@dtypes
def test_op_noncontiguous(info: OpInfo, dtype: torch.dtype, device: str, count: Count) -> None:
    skip_unless_supported(info, dtype, device)
    samples = list(info.sample_inputs(device, dtype, requires_grad=True))
    count(f"OpInfo {op_id(info)}: non-contiguous arguments", len(samples))
    for sample in samples:
        x, arguments = as_batch_norm(info, sample)
        scattered, scattered_arguments = as_batch_norm(info, sample.noncontiguous())
        y = bnk.batch_norm(x, **cloned(arguments))
        y_scattered = bnk.batch_norm(scattered, **scattered_arguments)
        assert torch.equal(y, y_scattered)
        grad = torch.randn_like(y)
        take = partial(torch.autograd.grad, allow_unused=True)
        (dx,), (dx_scattered,) = take(y, [x], grad), take(y_scattered, [scattered], noncontiguous_like(grad).detach())
        assert torch.equal(dx, dx_scattered)


@operators
def test_op_errors(info: OpInfo, device: str, count: Count) -> None:
    if info.error_inputs_func is None:
        pytest.skip(f"torch has no error inputs for {op_id(info)}")
    errors = list(info.error_inputs(torch.device(device)))
    for error in errors:
        x, arguments = as_batch_norm(info, error.sample_input)
        with pytest.raises(error.error_type, match=error.error_regex):
            bnk.batch_norm(x, **arguments)
    count(f"OpInfo {op_id(info)}: error inputs", len(errors))
