"""Drop-in classes under other libraries' names: change the import line, keep the rest."""

from pyseg.compat import monai as monai
from pyseg.compat import pydensecrf as pydensecrf
from pyseg.compat import smp as smp

__all__ = ["monai", "pydensecrf", "smp"]
