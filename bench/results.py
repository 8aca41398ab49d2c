"""What a run gives: records with every sample, kept as JSON, and what is derived from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .cases import Case
from .files import replace_text
from .providers import COPY, EAGER, OURS
from .stats import Spread, geometric_mean

SCHEMA = 1

Key = tuple[str, str, str, str]  # mode, direction, dtype, layout


@dataclass(frozen=True)
class Record:
    """All samples of one case in one direction and one mode ("cpu", or a mode of cuda.py), by provider."""

    mode: str
    direction: str
    dtype: str
    layout: str
    batch: int
    shape: str
    count: int  # layers of the network with this shape
    tensor_bytes: int
    floor_bytes: int
    method: dict[str, str]  # how each provider's time was taken
    seconds: dict[str, list[float]]  # a call, one value a sample
    epilogue: str = ""  # of cases.EPILOGUES; the same in all records of a run

    @classmethod
    def of(
        cls, case: Case, direction: str, mode: str, method: dict[str, str], seconds: dict[str, list[float]]
    ) -> Record:
        return cls(
            mode=mode,
            direction=direction,
            dtype=case.dtype,
            layout=case.layout,
            batch=case.batch,
            shape=case.shape.name,
            count=case.shape.count,
            tensor_bytes=case.tensor_bytes,
            floor_bytes=case.floor_bytes(direction),
            method=method,
            seconds={name: [float(f"{sample:.5g}") for sample in samples] for name, samples in seconds.items()},
            epilogue=case.epilogue,
        )

    @property
    def key(self) -> Key:
        return (self.mode, self.direction, self.dtype, self.layout)

    def spread(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratio(self, other: str) -> float | None:
        """other's median over ours: above 1, ours is faster. None where one of the two did not run."""
        if other not in self.seconds or OURS not in self.seconds:
            return None
        return self.spread(other).median / self.spread(OURS).median

    def bandwidth(self, name: str) -> float:
        """The floor's bytes over the time: what a perfect kernel would show as its DRAM bandwidth."""
        return self.floor_bytes / self.spread(name).median

    def copy_bandwidth(self) -> float | None:
        """Bytes/s, read plus written, of the copy of the same tensor in the same rounds."""
        if COPY not in self.seconds:
            return None
        return 2 * self.tensor_bytes / self.spread(COPY).median

    def label(self) -> str:
        return f"{self.batch}x{self.shape} {self.layout} {self.dtype}, {self.direction}, {self.mode}"


@dataclass(frozen=True)
class ToleranceRecord:
    """One provider's results held against the reference: the worst |error| over its bound, and where."""

    provider: str
    case: str
    direction: str
    worst: float
    where: str

    @property
    def passed(self) -> bool:
        return self.worst <= 1.0  # false for NaN


@dataclass
class Run:
    """A whole run of the harness."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # cases without a time, and why
    tolerance: list[ToleranceRecord] = field(default_factory=list)
    device_copy: list[float] = field(default_factory=list)  # bytes/s; GPU only
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """One record a line, so that the file stays small and a diff of two runs is readable.

        The file is replaced in one step: a run that ends while it saves leaves what it saved before.
        """
        head = {
            "schema": SCHEMA,
            "machine": self.machine,
            "settings": self.settings,
            "notes": self.notes,
            "failed": self.failed,
            "device_copy_bytes_per_s": self.device_copy,
        }
        lines = [json.dumps(head, indent=1)[:-2]]
        for name, rows in (("tolerance", self.tolerance), ("records", self.records)):
            body = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
            lines.append(f',\n "{name}": [\n{body}\n ]')
        replace_text(path, "".join(lines) + "\n}\n")

    @classmethod
    def load(cls, path: Path) -> Run:
        data = json.loads(path.read_text())
        if data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: schema {data.get('schema')}, this harness reads {SCHEMA}")
        return cls(
            machine=data["machine"],
            settings=data["settings"],
            notes=data["notes"],
            failed=data.get("failed", []),  # runs before 2026-11-24 ended at the first one
            tolerance=[ToleranceRecord(**row) for row in data["tolerance"]],
            device_copy=data["device_copy_bytes_per_s"],
            records=[Record(**row) for row in data["records"]],
        )

    @property
    def on_gpu(self) -> bool:
        return "gpu" in self.machine

    @property
    def epilogue(self) -> str:
        return next((record.epilogue for record in self.records), "")

    def providers(self) -> list[str]:
        """The names that occur, ours first, the copy last."""
        present = {name for record in self.records for name in record.seconds}
        return [name for name in (OURS, EAGER) if name in present] + sorted(present - {OURS, EAGER, COPY})

    def groups(self) -> Iterator[tuple[Key, list[Record]]]:
        """Records by (mode, direction, dtype, layout): mode by mode, else in the order in which they were measured."""
        groups: dict[Key, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.key, []).append(record)
        modes = list(dict.fromkeys(mode for mode, *_ in groups))
        yield from sorted(groups.items(), key=lambda group: modes.index(group[0][0]))

    def reference_bandwidth(self, record: Record) -> float | None:
        """Bytes/s to quote achieved ones against: on a GPU the run's 1 GiB copy, on a CPU the same tensor's copy."""
        return Spread.of(self.device_copy).median if self.device_copy else record.copy_bandwidth()


@dataclass(frozen=True)
class Comparison:
    """Ours against another over several shapes: ratios of medians, above 1 where ours is faster."""

    geomean: float
    least: float
    least_record: Record
    network: float  # sum over the network's layers of their time over the sum of ours
    cases: int

    @classmethod
    def of(cls, records: Iterable[Record], other: str) -> Comparison | None:
        rated = [(ratio, record) for record in records if (ratio := record.ratio(other)) is not None]
        if not rated:
            return None
        least, least_record = min(rated, key=lambda pair: pair[0])
        native = sum(record.count * record.spread(other).median for _, record in rated)
        ours = sum(record.count * record.spread(OURS).median for _, record in rated)
        return cls(geometric_mean(ratio for ratio, _ in rated), least, least_record, native / ours, len(rated))
