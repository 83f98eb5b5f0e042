"""The original model: fetched at a pinned commit, refused early where it cannot be quantized."""

from quantize.source.card import card_text, read_card
from quantize.source.checkout import fetch, fetch_checkpoint, is_local, name_of, refetch, watched
from quantize.source.selection import carried_files, choose_files
from quantize.source.support import check_config, needs_remote_code

__all__ = [
    "card_text",
    "carried_files",
    "check_config",
    "choose_files",
    "fetch",
    "fetch_checkpoint",
    "is_local",
    "name_of",
    "needs_remote_code",
    "read_card",
    "refetch",
    "watched",
]
