"""Formats plans as text."""

from __future__ import annotations

from .devices import Device
from .passes import PASSES, PassPlan, TilePartition

_PATHS = {"persistent": "persistent kernel", "two_pass": "two-pass path"}
_LAYOUTS = {"channels_first": "channels-first", "channels_last": "channels-last", "packed": "packed"}
_GROUPS = {
    "cluster": "each group a cluster that exchanges partials through distributed shared memory",
    "grid": "exchanging partials through global memory",
}
_REASONS = {
    "forced": "requested by BNKERNELS_PLAN=two_pass",
    "no_cooperation": "a channel tile needs several blocks, and the device does not support cooperative launches",
    "does_not_fit": "too little of a channel tile fits in shared memory",
}


def amount(bytes_: float) -> str:
    """Bytes in decimal units, like bandwidths: 822.1 MB."""
    power = min(4, (len(f"{bytes_:.0f}") - 1) // 3)
    return f"{bytes_ / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def memory(bytes_: int) -> str:
    """Bytes of shared memory in binary units: 112 KiB."""
    kib = bytes_ / 1024
    return f"{kib:.4g} KiB" if kib < 1024 else f"{kib / 1024:.1f} MiB"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def device_line(device: Device) -> str:
    limits = device.limits
    speed = "memory bandwidth unknown"
    if device.bandwidth is not None:
        speed = f"{device.bandwidth / 1e12:.3g} TB/s ({device.bandwidth_source})"
    return (
        f"{device.name} ({device.title}): {count(limits.multiprocessors, 'multiprocessor')}, "
        f"{memory(limits.shared_per_block)} of shared memory per block, {speed}"
    )


def _partition_text(partition: TilePartition) -> str:
    units = "16-byte vectors" if partition.layout == "channels_first" else "rows"
    return (
        f"{_LAYOUTS[partition.layout]}: {count(partition.channel_tiles, 'channel tile')} of "
        f"{count(partition.tile_channels, 'channel')}, each in {count(partition.splits, 'split')} of up to "
        f"{partition.split_size:,} {units}"
    )


def _why(plan: PassPlan) -> str:
    if plan.persistent is not None and plan.predicted == plan.floor:
        return "each channel tile is read once, cached in shared memory, and normalised from there"
    if plan.persistent is not None:
        return "a part of each channel tile is cached in shared memory; the rest is reloaded, in reverse order"
    if plan.name == "forward_eval":
        return "inference needs no reduction: one pass reads x once"
    if plan.name == "backward_eval":
        return "grad_x does not depend on the sums; grad_y is read once for the sums and once for grad_x"
    return _REASONS[str(plan.reason)]


def _lines(plan: PassPlan) -> list[tuple[str, str]]:
    lines = [("why", _why(plan)), ("partition", _partition_text(plan.partition))]
    persistent = plan.persistent
    if persistent is None:
        launch = plan.two_pass
        lines.append(("blocks", f"{launch.grid:,} of {launch.block} threads"))
    else:
        alone = persistent.group_size == 1
        groups = f"{persistent.grid:,} of {persistent.block} threads, one CTA per channel tile"
        if not alone:
            groups = (
                f"{persistent.grid:,} of {persistent.block} threads: {count(persistent.groups, 'group')} "
                f"of {persistent.group_size:,} CTAs per channel tile, {_GROUPS[persistent.group]}"
            )
        lines.append(("blocks", f"{groups}; {count(persistent.rounds, 'round')}"))
        lines.append(
            (
                "on chip",
                f"{memory(persistent.shared_bytes)} per block, {memory(plan.on_chip)} in total; "
                f"{plan.cached_fraction:.0%} of what is read is cached for its second use",
            )
        )
    floor, whole = plan.whole_floor.total, plan.whole.total
    lines.append(("DRAM", f"floor {amount(floor)}, predicted {amount(whole)}: {plan.ratio:.2f} x the floor"))
    if plan.masked:
        lines.append(("ReLU", f"torch's threshold_backward, 1 launch, {amount(plan.more.total)} of the DRAM traffic"))
    if plan.exchanged.total:
        lines.append(("exchange", f"{amount(plan.exchanged.total)} of partials between CTAs, not included in DRAM"))
    if plan.bandwidth is None:
        lines.append(("time", "unknown, because the memory bandwidth is unknown"))
    else:
        speed = f"{plan.bandwidth / 1e12:.3g} TB/s"
        lines.append(("time", f"at least {duration(plan.seconds)} at {speed}: a bandwidth bound, not a measurement"))
    return lines


def pass_text(plan: PassPlan) -> str:
    launches = "1 launch" if plan.launches == 1 else f"{plan.launches} launches"
    title = f"{PASSES[plan.name]}: {_PATHS[plan.path]}, {launches}"
    return "\n".join([title, *(f"  {name:<11}{text}" for name, text in _lines(plan))])
