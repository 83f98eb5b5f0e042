"""The folder that a run leaves behind: built beside its final name, sealed with hashes, moved into place."""

from quantize.package.demand import demanded, without_paths
from quantize.package.reading import Package, finished, open_package, require_unchanged, undocumented
from quantize.package.sealing import copy_carried, reseal_card, seal, seal_undocumented, write_card, write_evidence
from quantize.package.staging import (
    BUILDING,
    REFUSED,
    UNDOCUMENTED,
    UNFINISHED,
    finished_parts,
    keep_undocumented,
    move_into_place,
    refused_folder,
    require_replaceable,
    staging_folder,
    undocumented_folder,
)

__all__ = [
    "BUILDING",
    "REFUSED",
    "UNDOCUMENTED",
    "UNFINISHED",
    "Package",
    "copy_carried",
    "demanded",
    "finished",
    "finished_parts",
    "keep_undocumented",
    "move_into_place",
    "open_package",
    "refused_folder",
    "require_replaceable",
    "require_unchanged",
    "reseal_card",
    "seal",
    "seal_undocumented",
    "staging_folder",
    "undocumented",
    "undocumented_folder",
    "without_paths",
    "write_card",
    "write_evidence",
]
