"""What the source's card says about its license: its name, whether it forbids a copy, which file has its text."""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Mapping
from typing import Any

from model_card.escape import plain
from model_card.source_card import SourceCard

OTHER = "other"
DETAILS = ("license_name", "license_link")
LINK = re.compile(r"https?://|[^:]+$")
WORDS = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
HUB_LICENSES = frozenset(WORDS.split())
"""The words that the Hub takes (its own list, in huggingface_hub issue 4218); another one is named beside `other`."""
FORBIDDING = re.compile(r"(?<![a-z0-9])nd(?![a-z0-9])|no[-_ ]?deriv", re.IGNORECASE)
FORBIDDING_IN_TEXT = re.compile(r"(?:by|nc)[-_ ]nd(?![a-z0-9])|no[-_ ]?deriv", re.IGNORECASE)
OWN_FILE = re.compile(r"https?://[^/]+/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve|raw)/[^/]+/(?P<path>[^?#]+)")


def stated(source: Mapping[str, Any]) -> tuple[str, ...]:
    """The licenses that metadata name, each once."""
    named = source.get("license")
    values = named if isinstance(named, list) else [named]
    words = (plain(value) for value in values if isinstance(value, str))
    return tuple(dict.fromkeys(word for word in words if word))


def fields(source: Mapping[str, Any]) -> dict[str, str]:
    """The license as the Hub takes it: one of its words, and names and a link where that word is `other`."""
    named = stated(source)
    words = [word for word in (re.sub(r"[\s_]+", "-", name.lower()) for name in named) if word in HUB_LICENSES]
    license_word = words[0] if len(named) == len(words) == 1 else OTHER
    name, link = (plain(value) if isinstance(value := source.get(key), str) else "" for key in DETAILS)
    if not name and license_word == OTHER and named != (OTHER,):
        name = ", ".join(named)
    found = {"license": license_word, "license_name": name, "license_link": link if LINK.match(link) else ""}
    return {key: value for key, value in found.items() if value}


def forbids_derivatives(card: SourceCard) -> str | None:
    """The source's license where it forbids changed copies, such as cc-by-nc-nd-4.0; unreadable metadata count too."""
    details = (card.metadata.get(key) for key in DETAILS)
    named = [*stated(card.metadata), *(value for value in details if isinstance(value, str))]
    forbidding = [name for name in named if FORBIDDING.search(name)]
    lines = re.split(r"[\r\n]+", card.unread)
    unread = [plain(line.rpartition(":")[2]) for line in lines if FORBIDDING_IN_TEXT.search(line)]
    return next(iter([*forbidding, *unread]), None)


def linked_file(card: SourceCard, repo_id: str | None) -> str | None:
    """The path of the license's text in the source itself, where `license_link` names one."""
    link = card.metadata.get("license_link")
    if not isinstance(link, str):
        return None
    own = OWN_FILE.fullmatch(link.partition("#")[0].partition("?")[0])
    if own and repo_id and own["repo"].lower() == repo_id.lower():
        link = own["path"]
    elif re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
        return None
    path = urllib.parse.unquote(link.partition("#")[0].partition("?")[0]).strip().removeprefix("./").lstrip("/")
    hidden = any(part.startswith(".") or not part for part in path.split("/"))
    return None if hidden or "\\" in path else path
