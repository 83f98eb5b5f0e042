"""The folder that a run leaves behind: built beside its final name, sealed with hashes, moved into place."""

from quantize.package.demand import demanded, without_paths
from quantize.package.reading import Package, finished, open_package, require_unchanged
from quantize.package.sealing import copy_carried, reseal_card, seal, write_card, write_evidence
from quantize.package.staging import (
    BUILDING,
    REFUSED,
    UNFINISHED,
    move_into_place,
    refused_folder,
    require_replaceable,
    staging_folder,
)

__all__ = [
    "BUILDING",
    "REFUSED",
    "UNFINISHED",
    "Package",
    "copy_carried",
    "demanded",
    "finished",
    "move_into_place",
    "open_package",
    "refused_folder",
    "require_replaceable",
    "require_unchanged",
    "reseal_card",
    "seal",
    "staging_folder",
    "without_paths",
    "write_card",
    "write_evidence",
]
