"""What happened in a streamed model so far, in numbers. A frozen value; ``print`` it for a table."""

from __future__ import annotations

from dataclasses import dataclass

from odewei.scheduler.budget import format_nbytes

__all__ = ["Report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Sums since the model was built. Bytes are bytes, times seconds.

    - ``passes``: calls of the model that ended; ``accesses``: units entered, of which ``hits`` found theirs resident.
    - ``stalls``: accesses and look-ups that waited, ``stall_seconds`` in all: the *exposed* reading.
    - ``compute_seconds``: inside the model and not stalled. With several threads at once, summed over them.
    - ``read_seconds``: at least one read was running; what of it was not stalled is the *hidden* reading.
    - ``peak_bytes``: the most weight memory there ever was, in flight and free slabs included, against
      ``budget_bytes``.
    - ``overdrafts``: units that a forward needed when nothing could leave, so that the budget was exceeded, by
      ``worst_overdraft_bytes`` at most. ``escapes``: units whose memory somebody held on to after they had left.
    - ``own_bytes``: weights that are the user's own by now (``weight.data = ...``): they stay in memory, and count.
    - ``missing``: names that the checkpoint lacks, or has in another shape, so that they were initialised;
      ``unexpected``: entries of it that the model has no use for.
    - ``rows_looked_up``: rows that look-ups in embedding tables asked for, of which ``rows_read`` were read; the others
      were kept in ``row_cache_bytes`` of the budget.
    - ``budget_bytes``, ``peak_bytes``, ``overdrafts`` and ``escapes`` are those of the whole budget, also where several
      models share it; everything else is this model's own.
    - ``buffer_bytes``: buffers, which are loaded once and are not part of the budget.
    - ``device``: where the model computes. On an accelerator the budget, accesses, hits, stalls and evictions are those
      of its memory, and there are the ``host_*`` ones of (pinned) host memory; ``bytes_copied`` went to it in
      ``copy_seconds`` of its time, for which what computes waited ``device_wait_seconds``; ``compute_seconds`` are of
      its time too. ``device_note`` says in words what the device cannot do. On the CPU all of these are 0.
    """

    weight_bytes: int
    units: int
    budget_bytes: int
    buffer_bytes: int
    resident_bytes: int
    peak_bytes: int
    passes: int
    accesses: int
    hits: int
    mispredictions: int
    evictions: int
    bytes_read: int
    read_seconds: float
    compute_seconds: float
    stalls: int
    stall_seconds: float
    overdrafts: int
    worst_overdraft_bytes: int
    escapes: int
    prefetch_depth: int | None
    direct_io: bool
    rows_looked_up: int
    rows_read: int
    row_cache_bytes: int
    own_bytes: int = 0
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    device: str = "cpu"
    device_note: str = ""
    bytes_copied: int = 0
    copy_seconds: float = 0.0
    device_wait_seconds: float = 0.0
    host_budget_bytes: int = 0
    host_resident_bytes: int = 0
    host_peak_bytes: int = 0
    host_hits: int = 0
    host_accesses: int = 0

    @property
    def bandwidth(self) -> float:
        """Bytes a second while at least one read was running; 0 before the first read."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0

    @property
    def hidden_seconds(self) -> float:
        """Reading that cost the forward passes nothing."""
        return max(0.0, self.read_seconds - self.stall_seconds)

    @property
    def floor_seconds(self) -> float:
        """``max(compute, missed bytes / measured bandwidth)``, of the link to a device too: no scheduler could have
        been faster with these reads and copies.
        """
        return max(self.compute_seconds, self.read_seconds, self.copy_seconds)

    @property
    def ratio_to_floor(self) -> float:
        """Time inside the model over the floor; reading before and between passes makes it smaller than 1."""
        waited = self.stall_seconds if self.device == "cpu" else self.device_wait_seconds
        return (self.compute_seconds + waited) / self.floor_seconds if self.floor_seconds else 0.0

    def __str__(self) -> str:
        depth = "auto" if self.prefetch_depth is None else str(self.prefetch_depth)
        rows = [
            ("weights", f"{format_nbytes(self.weight_bytes)} in {self.units} units"),
            ("budget", f"{format_nbytes(self.budget_bytes)}, prefetch depth {depth}"),
            ("peak", f"{format_nbytes(self.peak_bytes)}, resident now {format_nbytes(self.resident_bytes)}"),
            ("buffers", format_nbytes(self.buffer_bytes)),
            ("passes", f"{self.passes}"),
            (
                "read",
                f"{format_nbytes(self.bytes_read)} in {self.read_seconds:.2f} s, {self.bandwidth / 1e9:.2f} GB/s, "
                + ("direct" if self.direct_io else "buffered"),
            ),
            ("hits", f"{self.hits} of {self.accesses} accesses, {self.mispredictions} mispredicted"),
            ("computing", f"{self.compute_seconds:.2f} s"),
            (
                "reading",
                f"{self.hidden_seconds:.2f} s hidden, {self.stall_seconds:.2f} s exposed in {self.stalls} stalls",
            ),
            ("floor", f"{self.floor_seconds:.2f} s, reached to a factor of {self.ratio_to_floor:.2f}"),
        ]
        if self.device != "cpu":
            rows[0:0] = [("device", self.device + (f" ({self.device_note})" if self.device_note else ""))]
            rows += [
                (
                    "copied",
                    f"{format_nbytes(self.bytes_copied)} in {self.copy_seconds:.2f} s, for which the device waited "
                    f"{self.device_wait_seconds:.2f} s",
                ),
                (
                    "host memory",
                    f"{format_nbytes(self.host_budget_bytes)}, peak {format_nbytes(self.host_peak_bytes)}, resident "
                    f"now {format_nbytes(self.host_resident_bytes)}, {self.host_hits} hits of {self.host_accesses}",
                ),
            ]
        if self.rows_looked_up:
            kept = format_nbytes(self.row_cache_bytes)
            rows.append(
                ("rows", f"{self.rows_looked_up} looked up in tables, {self.rows_read} read, {kept} for hot ones")
            )
        if self.overdrafts:
            rows.append(
                ("over budget", f"{self.overdrafts} times, by {format_nbytes(self.worst_overdraft_bytes)} at most")
            )
        if self.own_bytes:
            rows.append(("replaced", f"{format_nbytes(self.own_bytes)} of weights, which stay in memory"))
        if self.missing:
            rows.append(("missing", f"{len(self.missing)} names, initialised: {self.missing[0]}, ..."))
        if self.unexpected:
            rows.append(("unexpected", f"{len(self.unexpected)} entries, not read: {self.unexpected[0]}, ..."))
        if self.escapes:
            rows.append(("escaped", f"{self.escapes} units were still held by somebody when they left"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
