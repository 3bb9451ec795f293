"""Write the dashboards' JSON: python -m monitoring.dashboards"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.dashboards import business, fleet, stream, worker

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana" / "dashboards"
BOARDS = {"fleet": fleet, "stream": stream, "workers": worker, "business": business}


def files() -> dict[str, str]:
    """Content by file name."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    content = {}
    for name, module in BOARDS.items():
        board = module.build().build()
        for number, panel in enumerate(board.panels or (), 1):
            panel.id_val = number
        content[f"{name}.json"] = encoder.encode(board) + "\n"
    return content


if __name__ == "__main__":
    for name, content in files().items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        sys.stdout.write(f"{FOLDER / name}\n")
