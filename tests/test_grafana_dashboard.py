"""deploy/grafana-dashboard.json, checked without a Grafana: its model, and that every metric it
asks for is one that the trials publish. Each check is shown to fail on a broken dashboard."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tuner.gauges import COUNTERS, GAUGES, LABELS, PREFIX

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "deploy" / "grafana-dashboard.json").read_text(encoding="utf-8")

# Under these names a real Ray exports them: tests/tuner/test_distributed.py scrapes it.
EXPORTED = {f"ray_{PREFIX}{name}" for name in GAUGES} | {
    f"ray_{PREFIX}{name}_total" for name in COUNTERS
}
COLUMNS = 24  # of Grafana's grid
REQUIRED = {
    "title": str,
    "uid": str,
    "schemaVersion": int,
    "version": int,
    "time": dict,
    "templating": dict,
    "annotations": dict,
    "panels": list,
}
REQUIRED_OF_PANEL = {
    "id": int,
    "type": str,
    "title": str,
    "gridPos": dict,
    "datasource": dict,
    "targets": list,
    "fieldConfig": dict,
    "options": dict,
}
QUANTITIES = {
    "objective", "nmse_pred", "nmse_blend", "f1", "gospa", "scenes_per_second", "grad_norm",
    "skipped_steps_total", "solver_fallbacks_total", "gpu_memory_bytes", "epoch",
}  # fmt: skip

Dashboard = dict[str, Any]


class DashboardError(AssertionError):
    """What is wrong with a dashboard."""


def check_fields(dashboard: Dashboard) -> None:
    """What Grafana's model requires is there and of its type."""
    parts = [("the dashboard", dashboard, REQUIRED)]
    parts += [(p.get("title", "a panel"), p, REQUIRED_OF_PANEL) for p in dashboard["panels"]]
    for where, part, required in parts:
        for name, kind in required.items():
            if not isinstance(part.get(name), kind):
                raise DashboardError(f"{where}: {name} must be a {kind.__name__}")
    if dashboard.get("id") is not None:
        raise DashboardError("an id of another Grafana would keep it from being imported")
    if len(dashboard["uid"]) > 40:
        raise DashboardError("uid: Grafana takes 40 characters")


def check_ids(dashboard: Dashboard) -> None:
    """Panels, and the queries of each, can be told apart."""
    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) < len(ids):
        raise DashboardError(f"panel ids are not unique: {sorted(ids)}")
    for panel in dashboard["panels"]:
        letters = [target["refId"] for target in panel["targets"]]
        if not letters or len(set(letters)) < len(letters):
            raise DashboardError(f"{panel['title']}: refIds must be there and unique: {letters}")


def check_grid(dashboard: Dashboard) -> None:
    """Panels lie within the grid and not on one another."""
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        if min(place["x"], place["y"]) < 0 or min(place["w"], place["h"]) < 1:
            raise DashboardError(f"{panel['title']}: has no place in the grid: {place}")
        if place["x"] + place["w"] > COLUMNS:
            raise DashboardError(f"{panel['title']}: wider than the grid's {COLUMNS} columns")
    for one, other in combinations(dashboard["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        apart = any(a[o] + a[s] <= b[o] or b[o] + b[s] <= a[o] for o, s in ("xw", "yh"))
        if not apart:
            raise DashboardError(f"{one['title']} overlaps {other['title']}")


def queries(dashboard: Dashboard) -> list[str]:
    """Every expression, those of the variables too."""
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return panels + [v["query"]["query"] for v in variables if v["type"] == "query"]


def check_metrics(dashboard: Dashboard) -> None:
    """Only what is published is asked for, by labels that exist; parentheses are closed."""
    for query in queries(dashboard):
        names = set(re.findall(r"\bray_\w+", query))
        if not names or not names <= EXPORTED:
            raise DashboardError(f"{query}: no trial publishes {sorted(names - EXPORTED)}")
        matched = set(re.findall(r"(\w+)\s*=~?\s*\"", query))
        grouped = re.findall(r"\bby \(([^)]*)\)", query)
        labels = matched | {label.strip() for group in grouped for label in group.split(",")}
        if not labels <= set(LABELS):
            raise DashboardError(f"{query}: metrics have no labels {sorted(labels - set(LABELS))}")
        if any(query.count(a) != query.count(b) for a, b in ("()", "{}", "[]")):
            raise DashboardError(f"{query}: brackets are not closed")


def check_variables(dashboard: Dashboard) -> None:
    """Data source, study and trial are chosen at the top, and every panel heeds them."""
    names = [variable["name"] for variable in dashboard["templating"]["list"]]
    if names != ["datasource", *LABELS]:
        raise DashboardError(f"variables are {names}; expected datasource, study and trial")
    for panel in dashboard["panels"]:
        for part in [panel, *panel["targets"]]:
            if part["datasource"] != {"type": "prometheus", "uid": "${datasource}"}:
                raise DashboardError(f"{panel['title']}: reads another data source")
        for target in panel["targets"]:
            selectors = re.findall(r"ray_\w+(\{[^}]*\})?", target["expr"])
            wanted = {f'{label}=~"${label}"' for label in LABELS}
            if any(set(s.strip("{}").split(", ")) != wanted for s in selectors):
                raise DashboardError(f"{panel['title']}: {target['expr']} ignores a variable")


def check_coverage(dashboard: Dashboard) -> None:
    """Every published metric is drawn."""
    drawn = set(re.findall(r"\bray_\w+", " ".join(queries(dashboard))))
    if drawn != EXPORTED:
        raise DashboardError(f"not drawn: {sorted(EXPORTED - drawn)}")


CHECKS = (check_fields, check_ids, check_grid, check_metrics, check_variables, check_coverage)


def check(dashboard: Dashboard) -> None:
    for one in CHECKS:
        one(dashboard)


@pytest.fixture
def dashboard() -> Dashboard:
    loaded: Dashboard = json.loads(TEXT)
    return loaded


def test_the_dashboard_passes_every_check(dashboard: Dashboard) -> None:
    check(dashboard)


def test_the_dashboard_draws_what_an_engineer_asks_for(dashboard: Dashboard) -> None:
    assert {name.removeprefix("ray_ristune_") for name in EXPORTED} == QUANTITIES
    titles = {panel["title"]: panel for panel in dashboard["panels"]}
    assert titles["Running trials"]["type"] == "stat"
    assert "count(" in titles["Running trials"]["targets"][0]["expr"]


def metric_with_a_typo(d: Dashboard) -> None:
    target = d["panels"][4]["targets"][0]
    target["expr"] = target["expr"].replace("objective", "objektive")


def counter_without_its_ending(d: Dashboard) -> None:
    for panel in d["panels"]:
        for target in panel["targets"]:
            target["expr"] = target["expr"].replace("skipped_steps_total", "skipped_steps")


def label_that_does_not_exist(d: Dashboard) -> None:
    target = d["panels"][4]["targets"][0]
    target["expr"] = target["expr"].replace("(study, trial)", "(study, trail)")


def bracket_left_open(d: Dashboard) -> None:
    d["panels"][4]["targets"][0]["expr"] += "("


def panel_copied(d: Dashboard) -> None:
    d["panels"].append(copy.deepcopy(d["panels"][0]))


def query_copied(d: Dashboard) -> None:
    d["panels"][0]["targets"] *= 2


def panel_on_another(d: Dashboard) -> None:
    d["panels"][5]["gridPos"]["x"] -= 1


def panel_over_the_edge(d: Dashboard) -> None:
    d["panels"][5]["gridPos"]["w"] += 1


def panel_without_a_type(d: Dashboard) -> None:
    del d["panels"][3]["type"]


def dashboard_without_a_schema(d: Dashboard) -> None:
    del d["schemaVersion"]


def dashboard_of_another_grafana(d: Dashboard) -> None:
    d["id"] = 12


def data_source_written_in(d: Dashboard) -> None:
    d["panels"][2]["targets"][0]["datasource"] = {"type": "prometheus", "uid": "P1809"}


def variable_forgotten(d: Dashboard) -> None:
    d["templating"]["list"].pop()


def panel_of_all_studies(d: Dashboard) -> None:
    target = d["panels"][4]["targets"][0]
    target["expr"] = target["expr"].replace('study=~"$study", ', "")


def metric_not_drawn(d: Dashboard) -> None:
    d["panels"] = [panel for panel in d["panels"] if panel["title"] != "GOSPA"]


BROKEN: list[tuple[Callable[[Dashboard], None], str]] = [
    (metric_with_a_typo, "objektive"),
    (counter_without_its_ending, "skipped_steps"),
    (label_that_does_not_exist, "trail"),
    (bracket_left_open, "not closed"),
    (panel_copied, "not unique"),
    (query_copied, "refIds"),
    (panel_on_another, "overlaps"),
    (panel_over_the_edge, "wider"),
    (panel_without_a_type, "type must be a str"),
    (dashboard_without_a_schema, "schemaVersion"),
    (dashboard_of_another_grafana, "another Grafana"),
    (data_source_written_in, "another data source"),
    (variable_forgotten, "expected datasource"),
    (panel_of_all_studies, "ignores a variable"),
    (metric_not_drawn, "ray_ristune_gospa"),
]


@pytest.mark.parametrize(("damage", "names"), BROKEN, ids=[d.__name__ for d, _ in BROKEN])
def test_a_broken_dashboard_is_caught(
    dashboard: Dashboard, damage: Callable[[Dashboard], None], names: str
) -> None:
    damage(dashboard)
    with pytest.raises(DashboardError, match=re.escape(names)):
        check(dashboard)
