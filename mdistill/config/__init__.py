"""The typed, strict configuration: everything that changes a result, from YAML files, their bases and overrides."""

from mdistill.config.files import Inline, changes, for_pair, inline_section, load, sources
from mdistill.config.schema import (
    Config,
    MemberConfig,
    RunConfig,
    SolverConfig,
    TeacherConfig,
    cell_identity,
    without_defaults,
)
from mdistill.settings import differences, results_only

__all__ = [
    "Config",
    "Inline",
    "MemberConfig",
    "RunConfig",
    "SolverConfig",
    "TeacherConfig",
    "cell_identity",
    "changes",
    "differences",
    "for_pair",
    "inline_section",
    "load",
    "results_only",
    "sources",
    "without_defaults",
]
