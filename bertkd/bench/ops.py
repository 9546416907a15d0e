"""All ops of the benchmark by name."""

from __future__ import annotations

from bertkd.bench import ops_attention, ops_networks, ops_rows
from bertkd.bench.spec import Spec

SPECS: dict[str, Spec] = {
    **ops_attention.SPECS,
    **ops_rows.SPECS,
    **ops_networks.SPECS,
}
