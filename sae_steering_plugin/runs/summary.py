"""What a completed evaluation leaves for readers: one table, one summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .parts import Collected, write_whole
from .plan import Plan, plan_key
from .protocols import Rows
from .runner import Report


def write_summary(
    plan: Plan, report: Report, collected: Collected, tables: Mapping[str, Rows], out: str | Path
) -> list[Path]:
    """Write `table.parquet` (the collected rows) and `summary.json` into the run's folder.

    The summary holds the plan's key, the table's digest, the versions that wrote its parts, what
    the last run did, and the protocol's tables; numbers that are not finite are null.
    """
    import pyarrow.parquet as pq

    from .canonical import finite

    folder = Path(out)
    content = {
        "plan": plan_key(plan),
        "digest": collected.digest,
        "rows": len(collected),
        "versions": [dict(one) for one in collected.versions],
        "run": report.to_dict(),
        "tables": {title: [dict(row) for row in rows] for title, rows in tables.items()},
    }
    text = json.dumps(finite(content), indent=2, ensure_ascii=False) + "\n"
    table, summary = folder / "table.parquet", folder / "summary.json"
    write_whole(table, lambda path: pq.write_table(collected.table, path))
    write_whole(summary, lambda path: path.write_text(text, encoding="utf-8"))
    return [table, summary]
