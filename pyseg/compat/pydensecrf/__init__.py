"""pydensecrf on pyseg's kernels: change the import lines, keep the script.

import pyseg.compat.pydensecrf.densecrf as dcrf  # instead of pydensecrf.densecrf
from pyseg.compat.pydensecrf.utils import unary_from_softmax
"""

from pyseg.compat.pydensecrf import densecrf as densecrf
from pyseg.compat.pydensecrf import utils as utils

__all__ = ["densecrf", "utils"]
