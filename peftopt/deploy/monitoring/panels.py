"""Panels of a Grafana dashboard as data, and their JSON. Pure.

grafana-foundation-sdk would write the same JSON; every install would carry it for this one file, which needs two kinds
of panels and some twenty fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftopt.records import JsonValue

SCHEMA = 39
"""Of Grafana 11; later ones migrate it."""
SOURCE: JsonValue = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, ACROSS = 8, 8, 24


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of each of its series; a `limit` is drawn as a dashed line."""

    expr: str
    legend: str
    limit: bool = False


@dataclass(frozen=True)
class Panel:
    """Series over time, or a `table` of what is now. `unit` by Grafana's names; `most`: the top of the axis."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    about: str = ""
    table: bool = False
    stacked: bool = False
    most: float | None = None


@dataclass(frozen=True)
class Row:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Note:
    """A mark on every panel at the times when `expr` has series."""

    name: str
    expr: str
    text: str
    color: str


def laid_out(rows: Sequence[Row]) -> list[JsonValue]:
    """The panels at their places, three across."""
    found: list[JsonValue] = []
    y = 0
    for row in rows:
        place: JsonValue = {"x": 0, "y": y, "w": ACROSS, "h": 1}
        found.append(
            {
                "id": len(found) + 1,
                "type": "row",
                "title": row.title,
                "collapsed": False,
                "panels": [],
                "gridPos": place,
            }
        )
        y += 1
        for i, panel in enumerate(row.panels):
            column, line = i % (ACROSS // WIDTH), i // (ACROSS // WIDTH)
            place = {"x": column * WIDTH, "y": y + line * HEIGHT, "w": WIDTH, "h": HEIGHT}
            found.append(_json(panel, len(found) + 1, place))
        y += HEIGHT * -(-len(row.panels) // (ACROSS // WIDTH))
    return found


def _json(panel: Panel, number: int, place: JsonValue) -> JsonValue:
    targets: list[JsonValue] = [
        {
            "refId": chr(ord("A") + i),
            "datasource": SOURCE,
            "expr": query.expr,
            "legendFormat": query.legend,
            "range": not panel.table,
            "instant": panel.table,
            **({"format": "table"} if panel.table else {}),
        }
        for i, query in enumerate(panel.queries)
    ]
    shared: dict[str, JsonValue] = {
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": targets,
    }
    if panel.table:
        hidden: JsonValue = {"id": "organize", "options": {"excludeByName": {"Time": True, "Value": True}}}
        return {
            **shared,
            "type": "table",
            "transformations": [hidden],
            "fieldConfig": {"defaults": {}, "overrides": []},
        }
    limits = [query.legend for query in panel.queries if query.limit]
    custom: JsonValue = {
        "lineWidth": 1,
        "fillOpacity": 20 if panel.stacked else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
    }
    bounds: dict[str, JsonValue] = {"min": 0, **({} if panel.most is None else {"max": panel.most})}
    return {
        **shared,
        "type": "timeseries",
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **bounds, "custom": custom},
            "overrides": [_dashed(name) for name in limits],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _dashed(name: str) -> JsonValue:
    return {
        "matcher": {"id": "byName", "options": name},
        "properties": [
            {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [10, 10]}},
            {"id": "custom.lineWidth", "value": 2},
            {"id": "custom.stacking", "value": {"mode": "none", "group": "limits"}},
            {"id": "custom.fillOpacity", "value": 0},
            {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}},
        ],
    }


def marks(notes: Sequence[Note]) -> JsonValue:
    """Marks, each of which a reader can switch off."""
    return {
        "list": [
            {
                "name": note.name,
                "datasource": SOURCE,
                "enable": True,
                "expr": note.expr,
                "titleFormat": note.text,
                "step": "60s",
                "iconColor": note.color,
            }
            for note in notes
        ]
    }


def variables(label: str, metric: str) -> JsonValue:
    """What a reader chooses: Prometheus, and whom users asked."""
    values = f"label_values({metric}, {label})"
    every: JsonValue = {"selected": True, "text": ["All"], "value": ["$__all"]}
    return {
        "list": [
            {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1},
            {
                "name": label,
                "type": "query",
                "datasource": SOURCE,
                "definition": values,
                "query": {"query": values, "refId": "variable"},
                "refresh": 2,
                "multi": True,
                "includeAll": True,
                "allValue": ".*",
                "current": every,
                "sort": 1,
            },
        ]
    }
