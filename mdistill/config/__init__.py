"""The typed, strict configuration: everything that changes a result, from YAML files, their bases and overrides."""

from mdistill.config.files import for_pair, inline_section, load, source_of, sources
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
    "source_of",
    "sources",
    "without_defaults",
]
