"""Making existing models faster: `pyseg.accelerate`, `pyseg.report`, `pyseg.restore`."""

from pyseg._accelerate.accelerate import accelerate, report, restore
from pyseg._accelerate.report import Report, Row

__all__ = ["Report", "Row", "accelerate", "report", "restore"]
