"""Networks for small images (32x32), one family per file; a new file registers itself by being here.

Parameter names, their order and their shapes are those of the published CIFAR-100 networks, so that released weights
load. Differs from the published code: the pooling before the classifier is always global (the same at 32x32), so that
other image sizes work.
"""

from mdistill.registry import import_submodules

import_submodules(__name__, __path__)
