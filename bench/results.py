"""The results of a run: records with every sample, stored as JSON, and what is derived from them."""

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

SCHEMA = 2  # 1: "gate" for "tolerance", and "contestant" for "provider"

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
    method: dict[str, str]  # of timing, by provider
    seconds: dict[str, list[float]]  # per call, one value per sample
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
        """Median of `other` over that of bnkernels: above 1 bnkernels is faster. None if either did not run."""
        if other not in self.seconds or OURS not in self.seconds:
            return None
        return self.spread(other).median / self.spread(OURS).median

    def bandwidth(self, name: str) -> float:
        """Floor bytes per second: the DRAM bandwidth of a kernel that moves nothing twice."""
        return self.floor_bytes / self.spread(name).median

    def copy_bandwidth(self) -> float | None:
        """Bytes/s, read plus written, of a copy of the same tensor in the same rounds."""
        if COPY not in self.seconds:
            return None
        return 2 * self.tensor_bytes / self.spread(COPY).median

    def label(self) -> str:
        return f"{self.batch}x{self.shape} {self.layout} {self.dtype}, {self.direction}, {self.mode}"


@dataclass(frozen=True)
class ToleranceRecord:
    """One provider's results against the reference: the largest |error| / bound, and its quantity."""

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
    failed: list[str] = field(default_factory=list)  # cases without a time, with the reason
    tolerance: list[ToleranceRecord] = field(default_factory=list)
    device_copy: list[float] = field(default_factory=list)  # bytes/s; GPU only
    records: list[Record] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """One record per line: the file stays small, and a diff of two runs is readable.

        Replaces the file atomically: a run killed while saving leaves the previous file.
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
        if data.get("schema") == 1:
            data["tolerance"] = [{"provider": row.pop("contestant"), **row} for row in data.pop("gate")]
        elif data.get("schema") != SCHEMA:
            raise ValueError(f"{path}: expected schema 1 or {SCHEMA}, got {data.get('schema')}")
        return cls(
            machine=data["machine"],
            settings=data["settings"],
            notes=data["notes"],
            failed=data.get("failed", []),  # absent before 2026-11-24, when a run ended at its first failure
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
        """The providers that ran, bnkernels first, without the copy."""
        present = {name for record in self.records for name in record.seconds}
        return [name for name in (OURS, EAGER) if name in present] + sorted(present - {OURS, EAGER, COPY})

    def groups(self) -> Iterator[tuple[Key, list[Record]]]:
        """Records by (mode, direction, dtype, layout): grouped by mode, otherwise in the order of measurement."""
        groups: dict[Key, list[Record]] = {}
        for record in self.records:
            groups.setdefault(record.key, []).append(record)
        modes = list(dict.fromkeys(mode for mode, *_ in groups))
        yield from sorted(groups.items(), key=lambda group: modes.index(group[0][0]))

    def reference_bandwidth(self, record: Record) -> float | None:
        """Bytes/s of the reference copy: on a GPU the device copy of the run, on a CPU a copy of the same tensor."""
        return Spread.of(self.device_copy).median if self.device_copy else record.copy_bandwidth()


@dataclass(frozen=True)
class Comparison:
    """bnkernels against another provider over several shapes: ratios of medians, above 1 where bnkernels is faster."""

    geomean: float
    least: float
    least_record: Record
    network: float  # ratio of the sums over the network's layers
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
