"""The typed, strict configuration: everything that changes a result, from YAML files, their bases and overrides."""

from mdistill.config.files import for_pair, inline_section, load, retire, sources
from mdistill.config.schema import (
    Config,
    MemberConfig,
    RunConfig,
    SolverConfig,
    TeacherConfig,
    cell_identity,
    differences,
    results_only,
    without_defaults,
)

__all__ = [
    "Config",
    "MemberConfig",
    "RunConfig",
    "SolverConfig",
    "TeacherConfig",
    "cell_identity",
    "differences",
    "for_pair",
    "inline_section",
    "load",
    "results_only",
    "retire",
    "sources",
    "without_defaults",
]
