"""convert() and revert(): replace the BatchNorm modules of a model, in place, by this package's, and undo it.

Conversion assigns __class__. The object stays the same, and so do its parameters, buffers, hooks and flags, and all
references to it (optimizers, EMA copies, a wrapper around the model).
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

# _BatchNorm is also the base of SyncBatchNorm and of torch's classes for quantization-aware training.
from torch.nn.modules.batchnorm import _BatchNorm

from . import modules, sync
from .fx import unfuse

logger = logging.getLogger("bnkernels")

_Model = TypeVar("_Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: modules.BatchNorm1d,
    nn.BatchNorm2d: modules.BatchNorm2d,
    nn.BatchNorm3d: modules.BatchNorm3d,
    nn.LazyBatchNorm1d: modules.LazyBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazyBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazyBatchNorm3d,
    nn.SyncBatchNorm: sync.SyncBatchNorm,
}
_TORCH_CLASSES = {ours: torch_class for torch_class, ours in OURS.items()}


@dataclass(frozen=True)
class Change:
    """A module whose class was changed. name is its path in the model, "" for the model itself."""

    name: str
    before: type[nn.Module]
    after: type[nn.Module]


@dataclass(frozen=True)
class Skip:
    """A BatchNorm that was not changed, and the reason."""

    name: str
    module: type[nn.Module]
    reason: str


@dataclass
class ConversionReport:
    """The outcome of convert() or revert() for each BatchNorm of a model, in the order of named_modules().

    BatchNorms that already belonged to the target package are in neither list. str() gives a table.
    """

    changed: list[Change] = field(default_factory=list)
    skipped: list[Skip] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            (change.name or "(model)", f"{_qualified(change.before)} -> {_qualified(change.after)}")
            for change in self.changed
        ]
        rows += [(skip.name or "(model)", f"{_qualified(skip.module)} skipped: {skip.reason}") for skip in self.skipped]
        width = max((len(name) for name, _ in rows), default=0)
        lines = [f"  {name:<{width}}  {text}" for name, text in rows]
        return "\n".join([f"{len(self.changed)} BatchNorms changed, {len(self.skipped)} skipped", *lines])


def convert(
    model: _Model,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    report: ConversionReport | None = None,
) -> _Model:
    """Converts every torch.nn.BatchNorm1d/2d/3d, lazy form of these and SyncBatchNorm to bnkernels' class, in place.

    Matches exact types only. Subclasses of torch's classes, including parametrized modules, may compute something else
    and are skipped, and so are modules whose forward was replaced on the instance.
    Parameters, buffers, hooks, flags and the state_dict do not change. revert() undoes the conversion.

    Tools that support torch.nn's classes only need a reverted model, or revert(copy.deepcopy(model)) to keep this one:
    torch.jit.script, torch.ao.quantization, torchao's pt2e, and the folding of convolutions by torch.fx.
    docs/compatibility.md lists them.

    Args:
        model: any module, including a BatchNorm.
        filter_fn: called with each module that could be converted and its name in the model. If it returns False, the
            module is skipped.
        report: optional; the outcomes are appended to it. The logger "bnkernels" gets a summary at INFO and each module
            at DEBUG.

    Returns:
        model.

    Raises:
        TypeError: model is not a torch.nn.Module.

    Warns:
        UserWarning: no BatchNorm was converted, and the model has none of this package.
    """
    return _change(model, OURS, filter_fn, report, "converted")


def revert(
    model: _Model,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    report: ConversionReport | None = None,
) -> _Model:
    """Converts every bnkernels BatchNorm of a model to its torch.nn class, in place: undoes convert() and fuse().

    Matches exact types only. Arguments, return value and TypeError as for convert().
    """
    _change(model, _TORCH_CLASSES, filter_fn, report, "reverted")
    return unfuse(model)


def _change(
    model: _Model,
    classes: Mapping[type[nn.Module], type[nn.Module]],
    filter_fn: Callable[[nn.Module, str], bool] | None,
    report: ConversionReport | None,
    verb: str,
) -> _Model:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    from_ours = classes is _TORCH_CLASSES
    done = ConversionReport()
    for name, module in model.named_modules():  # yields shared modules once
        if not isinstance(module, _BatchNorm) or isinstance(module, modules.ForwardMixin) is not from_ours:
            continue
        before: type[nn.Module] = type(module)
        after = classes.get(before)
        reason = reason_to_leave(module, classes)
        if not reason and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn"
        if after is None or reason:
            done.skipped.append(Skip(name, before, reason))
            logger.debug("%s: %s skipped: %s", name, _qualified(before), reason)
            continue
        module.__class__ = after  # type: ignore[assignment]
        if isinstance(module, sync.SyncBatchNorm):
            module.qualified_name = name
        elif from_ours:
            module.__dict__.pop("qualified_name", None)
        done.changed.append(Change(name, before, after))
        logger.debug("%s: %s -> %s", name, _qualified(before), _qualified(after))
    _log(done, verb, type(model).__name__)
    if not from_ours and not done.changed:
        _warn_of_no_change(model, done.skipped)
    if report is not None:
        report.changed += done.changed
        report.skipped += done.skipped
    return model


def reason_to_leave(module: nn.Module, classes: Mapping[type[nn.Module], type[nn.Module]] = OURS) -> str:
    """The reason why convert(), or revert() for its mapping of classes, skips a BatchNorm; "" if it does not."""
    if type(module) not in classes:
        return "a subclass, which may override forward"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    return ""


def _warn_of_no_change(model: nn.Module, skipped: list[Skip]) -> None:
    """Warns that convert() changed nothing, with the reasons, unless the model has layers of this package."""
    if any(isinstance(module, modules.ForwardMixin) for module in model.modules()):
        return
    reasons = Counter(f"{_qualified(skip.module)}: {skip.reason}" for skip in skipped)
    why = "; ".join(f"{count} x {reason}" for reason, count in reasons.items()) or "the model has none"
    warnings.warn(f"convert() changed no BatchNorm of {type(model).__name__}: {why}", stacklevel=4)


def _log(report: ConversionReport, verb: str, model: str) -> None:
    logger.info("%s %d BatchNorm modules of %s", verb, len(report.changed), model)
    reasons: dict[tuple[str, str], int] = {}
    for skip in report.skipped:
        key = (_qualified(skip.module), skip.reason)
        reasons[key] = reasons.get(key, 0) + 1
    for (module, reason), count in reasons.items():
        logger.info("skipped %d %s: %s", count, module, reason)


def _qualified(cls: type[nn.Module]) -> str:
    """nn.BatchNorm2d, bnkernels.BatchNorm2d, or the qualified name of any other class."""
    if cls in OURS:
        return f"nn.{cls.__name__}"
    if cls in _TORCH_CLASSES:
        return f"bnkernels.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
