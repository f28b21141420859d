"""The figures of a report: from the records of a run and its decision to pictures with their words. Pure."""

from __future__ import annotations

from peftopt.decision.evidence import Evidence
from peftopt.records import Decision
from peftopt.report import table
from peftopt.report.plots import blocks, frontier, lengths, load_curves, positions, quantiles, ratios
from peftopt.report.plots.picture import Figure

__all__ = ["Figure", "figures"]


def figures(decision: Decision, evidence: Evidence) -> list[Figure]:
    """The figures for which something was measured, those that decide first. Others are left out, not drawn empty."""
    workloads = table.workloads(decision)
    drawn = [
        frontier.figure(decision, evidence),
        *(ratios.figure(decision, evidence, workload) for workload in workloads),
        load_curves.figure(decision, evidence),
        *(quantiles.figure(decision, evidence, workload) for workload in workloads),
        *(blocks.figure(decision, evidence, workload) for workload in workloads),
        lengths.figure(decision, evidence),
        positions.figure(decision, evidence),
    ]
    found = [figure for figure in drawn if figure]
    return sorted(found, key=lambda figure: figure.secondary)
