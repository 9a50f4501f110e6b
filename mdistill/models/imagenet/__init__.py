"""Networks for photographs (224x224), one family per file; a new file registers itself by being here.

Parameter names, their order and their shapes are the published ones. ResNets for ImageNet are torchvision's
(``torchvision/resnet34``).
"""

from mdistill.registry import import_submodules

import_submodules(__name__, __path__)
