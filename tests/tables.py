"""Small tables: configurations, table files, and a user's module with a data set and a network for them.

configs = tables.write_configs(tmp_path, RECIPE)                   # a folder "small" with a pair, vanilla and kd
table = tables.write_own(tmp_path, METHODS, epochs=3)              # a table that needs no configuration
mdistill table run <table> --checkpoint-root <tmp_path>            # trains it, where tmp_path is on sys.path
"""

from pathlib import Path

import torch
from torch import nn

MODULE = '''
import numpy as np
from torch import nn

from mdistill.data import DATASETS, InMemoryDataset
from mdistill.models import MODELS


@DATASETS.register("noise")
def noise(root, download):
    """60 images of four classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(60) % 4
    return InMemoryDataset((pixels, labels), (pixels[:8], labels[:8]), num_classes=4, mean=(0.5,) * 3, std=(0.25,) * 3)


@MODELS.register("little")
def little(num_classes, *, width: int = 4):
    first = nn.Conv2d(3, width, 3, stride=8, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(16 * width, num_classes))
'''
STEPS = 4  # of an epoch of a table that ``write_own`` wrote


def write_own(folder: Path, methods: str, *, epochs: int, module: str = "little_parts", code: str = "") -> Path:
    """Write a table of one pair, of the networks and images of a user's module, with weights for its teacher.

    Args:
        methods: the rest of the table file, from its key ``methods:`` on.
        code: what the module does beside.

    Returns:
        ``<folder>/table.yaml``; ``teacher.pt`` and the module lie beside it.
    """
    (folder / f"{module}.py").write_text(MODULE + code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Conv2d(3, 4, 3, stride=8, bias=False)
        teacher = nn.Sequential(first, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4))
    torch.save({"model": teacher.state_dict()}, folder / "teacher.pt")
    table = folder / "table.yaml"
    table.write_text(f"""
title: a table of one's own
dataset: quickstart
imports: [{module}]
pairs:
  - name: little_little
    teacher: {{name: little, checkpoint: teacher.pt}}
    student: {{name: little}}
    data: {{name: noise, batch_size: 16}}
    solver: {{epochs: {epochs}, milestones: []}}
{methods.strip()}
""")
    return table


def write_configs(folder: Path, recipe: str, *, teacher: str = "", distiller: str = "") -> Path:
    """Write ``<folder>/configs/small``: the pair wide_narrow of tiny networks, the student alone, and kd.

    Args:
        recipe: the sections data and solver.
        teacher: settings of the teacher beside its network and its checkpoint, ``teacher.pt``.
        distiller: settings of kd beside those that it has to have.

    Returns:
        ``<folder>/configs``.
    """
    files = {
        "_recipe.yaml": recipe,
        "_pairs/wide_narrow.yaml": "base: ../_recipe.yaml\n"
        f"teacher: {{name: tiny_net, width: 32, checkpoint: teacher.pt, {teacher}}}\nstudent: {{name: tiny_net}}\n",
        "kd/_method.yaml": f"distiller: {{name: kd, ce_weight: 0.1, kd_weight: 0.9, temperature: 4.0, {distiller}}}\n",
        "vanilla/_method.yaml": "base: ../_recipe.yaml\ndistiller: {name: vanilla, ce_weight: 1.0}\n",
        "vanilla/tiny_net.yaml": "base: _method.yaml\nstudent: {name: tiny_net}\n",
    }
    for name, text in files.items():
        path = folder / "configs" / "small" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "configs"
