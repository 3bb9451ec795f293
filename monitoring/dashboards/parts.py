"""Panels and variables that the dashboards share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models.common import (
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

TAG = "driftkeel"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
JOB = 'job="$job"'  # one site at a time, as two may have cameras of the same name
RATE = "[$__rate_interval]"
GREEN, YELLOW, ORANGE, RED, BLUE, GREY = "green", "#EAB839", "orange", "red", "blue", "#888888"
ADAPTED, SOURCE_MODEL = "blue", "#8B5A2B"  # as in the demo's picture: blue adapted, brown source
Query = tuple[str, str]  # PromQL, legend
Steps = Sequence[tuple[float | None, str]]  # least value and colour; None for the first
CALM: Steps = ((None, BLUE),)
NONE_IS_GOOD: Steps = ((None, GREEN), (1, RED))
ACCURACY: Steps = ((None, RED), (0.6, ORANGE), (0.75, YELLOW), (0.85, GREEN))


# In seconds, as in the alert: the more frames come, the more are held on purpose.
LAG_IS = (
    "How far the slowest worker is behind, in seconds of its present work. Red: more than a minute. Up to "
    "batch.max_hold_ms (10 s by default) is normal: predicted frames that are held for their camera's next update."
)
LAG_STEPS: Steps = ((None, GREEN), (30, YELLOW), (60, RED))


def lag_seconds(chosen: str) -> str:
    """PromQL of the largest lag among the workers that the labels choose."""
    predicted = f"sum by (instance) (rate(driftkeel_predictions_total{{{chosen}}}{RATE}))"
    return f"max(sum by (instance) (driftkeel_consumer_lag_records{{{chosen}}}) / clamp_min({predicted}, 0.01))"


def ages(metric: str, chosen: str) -> str:
    """PromQL of the age of a worker's timestamp, by that worker's clock."""
    return f"driftkeel_clock_timestamp_seconds{{{chosen}}} - driftkeel_{metric}_timestamp_seconds{{{chosen}}}"


def stream_age(metric: str, chosen: str, by: str = "") -> str:
    """The same for the newest of a stream's timestamps; `chosen` are labels of streams and workers."""
    when = f"driftkeel_stream_{metric}_timestamp_seconds{{{chosen}}}"
    return f"-max{by} ({when} - ignoring (stream) group_left () driftkeel_clock_timestamp_seconds{{{JOB}}})"


def board(title: str, uid: str, description: str) -> dashboard.Dashboard:
    """An empty dashboard of one site, with the variables datasource and job, and links to its sisters."""
    sisters = (
        dashboard.DashboardLink("Driftkeel")
        .type(DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(True)
        .keep_time(True)
        .tooltip("The other dashboards, with the same variables and time")
    )
    return (
        dashboard.Dashboard(f"Driftkeel / {title}")
        .uid(f"driftkeel-{uid}")
        .description(description)
        .tags([TAG])
        .time("now-1h", "now")
        .refresh("10s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(sisters)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(variable("job", "Site", "label_values(driftkeel_build_info, job)"))
    )


def filled(board: dashboard.Dashboard, *parts: Any) -> dashboard.Dashboard:
    """The board with these panels and rows."""
    for part in parts:
        (board.with_row if isinstance(part, dashboard.Row) else board.with_panel)(part)
    return board


def variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.NATURAL_ASC)
    )


def annotation(name: str, expr: str, color: str) -> dashboard.AnnotationQuery:
    return dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expr)


def thresholds(steps: Steps) -> dashboard.ThresholdsConfig:
    levels = [Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(levels)


def number(
    title: str,
    description: str,
    expr: str,
    unit: str = "short",
    steps: Steps = CALM,
    names: Mapping[float, tuple[str, str]] | None = None,
    width: int = 4,
) -> stat.Panel:
    """One number, the newest; `names` gives values a text and a colour."""
    panel = _placed(stat.Panel(), title, description, [(expr, "")], width, 4)
    panel.unit(unit).thresholds(thresholds(steps))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.mappings([_value_map(names)]) if names else panel


def lines(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    *,
    width: int = 12,
    stacked: bool = False,
    log_scale: bool = False,
    limits: Steps = (),
    least: float | None = 0.0,
    most: float | None = None,
) -> timeseries.Panel:
    """Curves over time. `limits` are drawn as dashed lines; `least` and `most` bound the axis where given."""
    panel = (
        _placed(timeseries.Panel(), title, description, queries, width, 8)
        .unit(unit)
        .line_width(1)
        .fill_opacity(30 if stacked else 5)
        .show_points(VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if least is not None and not log_scale:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if log_scale:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if limits:
        panel.thresholds(thresholds(limits))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    return panel


def colored(panel: timeseries.Panel, colors: Mapping[str, str]) -> timeseries.Panel:
    """The panel with fixed colours by legend."""
    for legend, color in colors.items():
        panel.override_by_name(legend, [DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color})])
    return panel


def band(panel: timeseries.Panel, low: str, high: str) -> timeseries.Panel:
    """The area between two curves filled, and the curves themselves without a line."""
    hidden = [
        DynamicConfigValue("custom.lineWidth", 0),
        DynamicConfigValue("color", {"mode": "fixed", "fixedColor": BLUE}),
    ]
    fill = [DynamicConfigValue("custom.fillBelowTo", low), DynamicConfigValue("custom.fillOpacity", 20)]
    panel.override_by_name(low, [*hidden, DynamicConfigValue("custom.fillOpacity", 0)])
    return panel.override_by_name(high, [*hidden, *fill])


def states(
    title: str,
    description: str,
    queries: Sequence[Query],
    names: Mapping[str, Mapping[float, tuple[str, str]]],
) -> statetimeline.Panel:
    """Numbers that stand for states, as coloured spans; `names` by legend."""
    panel = _placed(statetimeline.Panel(), title, description, queries, 24, 7)
    panel.show_value(VisibilityMode.AUTO).merge_values(True).row_height(0.85)
    panel.unit("short").thresholds(thresholds(((None, GREY),)))
    for legend, of_legend in names.items():
        mapping = [{"type": "value", "options": _options(of_legend)}]
        panel.override_by_name(legend, [DynamicConfigValue("mappings", mapping)])
    return panel


def buckets(title: str, description: str, expr: str, unit: str, exemplars: bool = False) -> heatmap.Panel:
    """A histogram over time; `expr` is summed by le."""
    query = _target(expr, "{{le}}", 0).format(PromQueryFormat.HEATMAP)
    if exemplars:
        query.exemplar(True)
    panel = _placed(heatmap.Panel(), title, description, [], 12, 8).with_target(query)
    panel.calculate(False).y_axis(heatmap.YAxisConfig().unit(unit))
    return panel.unit("short").thresholds(thresholds(CALM))


def rows_by(
    label: str,
    title: str,
    description: str,
    columns: Sequence[tuple[str, str, str, Steps]],
    link: str,
) -> table.Panel:
    """A table with a row per value of `label`; columns are (name, PromQL that keeps that label alone, unit, steps)."""
    panel = _placed(table.Panel(), title, description, [], 24, 10)
    panel.unit("short").thresholds(thresholds(CALM))
    names = {label: label.capitalize()}
    for i, (name, expr, unit, steps) in enumerate(columns):
        panel.with_target(_target(expr, name, i).format(PromQueryFormat.TABLE).instant())
        names[f"Value #{_ref(i)}"] = name
        look: dict[str, Any] = {"unit": unit}
        if len(steps) > 1:
            look["custom.cellOptions"] = {"type": "color-background", "mode": "gradient"}
            levels = [{"value": value, "color": color} for value, color in steps]
            look["thresholds"] = {"mode": "absolute", "steps": levels}
        panel.override_by_name(name, [DynamicConfigValue(key, value) for key, value in look.items()])
    to = [{"title": f"Look at this {label}", "url": link}]
    panel.override_by_name(label.capitalize(), [DynamicConfigValue("links", to)])
    panel.with_transformation(DataTransformerConfig("joinByField", options={"byField": label, "mode": "outer"}))
    hidden = {"Time": True, **{f"Time {i + 1}": True for i in range(len(columns))}}
    return panel.with_transformation(
        DataTransformerConfig("organize", options={"excludeByName": hidden, "renameByName": names, "indexByName": {}})
    )


def _ref(index: int) -> str:
    return chr(ord("A") + index)


def _placed(panel: Any, title: str, description: str, queries: Sequence[Query], width: int, height: int) -> Any:
    """The panel with what all kinds of panels have."""
    panel.title(title).description(description).datasource(SOURCE).span(width).height(height)
    return panel.targets([_target(expr, legend, i) for i, (expr, legend) in enumerate(queries)])


def _target(expr: str, legend: str, index: int) -> prometheus.Dataquery:
    return prometheus.Dataquery().datasource(SOURCE).expr(expr).legend_format(legend).ref_id(_ref(index)).range()


def _value_map(names: Mapping[float, tuple[str, str]]) -> ValueMap:
    return ValueMap(
        options={f"{v:g}": ValueMappingResult(text=text, color=color) for v, (text, color) in names.items()}
    )


def _options(names: Mapping[float, tuple[str, str]]) -> dict[str, Any]:
    return {f"{v:g}": {"text": text, "color": color, "index": i} for i, (v, (text, color)) in enumerate(names.items())}
