"""The Grafana dashboards, as code; `python -m monitoring.dashboards` writes their JSON to deploy/grafana/dashboards."""
