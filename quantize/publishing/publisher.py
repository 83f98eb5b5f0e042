"""Who publishes: from options or the environment, otherwise from a config file, and never made up."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantize import documents
from quantize.errors import ConfigError
from quantize.folders import expanded
from quantize.records import Publisher

CONFIG = "QUANTIZE_CONFIG"
ADDRESS = re.compile(r"(?:https?://(?![^/\s]*@)|mailto:)[^\s()<>]+")


def chosen(name: str | None, links: Iterable[str]) -> Publisher | None:
    """The publisher named by `name` and `links` (each LABEL=URL), or by the config file; None where neither does.

    Raises ConfigError.
    """
    if name is not None or links:
        if not name:
            raise ConfigError("links of a publisher without its name: give --publisher as well")
        return _checked(name, dict(_pair(link) for link in links), "--publisher-link")
    path = config_path()
    if not path.is_file():
        return None
    content, _ = documents.read_toml(path, path, ConfigError)
    publisher = content.get("publisher")
    if publisher is None:
        return None
    if not isinstance(publisher, dict) or not isinstance(publisher.get("links", {}), dict):
        raise ConfigError(f"{path}: [publisher] needs a name, and [publisher.links] maps labels to addresses")
    return _checked(publisher.get("name"), publisher.get("links", {}), str(path))


def config_path() -> Path:
    """The file that QUANTIZE_CONFIG names, or quantize/config.toml where this system keeps settings."""
    if os.environ.get(CONFIG):
        return Path(os.environ[CONFIG])
    return expanded(os.environ.get("XDG_CONFIG_HOME") or "~/.config") / "quantize" / "config.toml"


def _pair(link: str) -> tuple[str, str]:
    label, mark, address = link.partition("=")
    if not mark:
        raise ConfigError(f"--publisher-link {link!r}: write it as LABEL=URL")
    return label.strip(), address.strip()


def _checked(name: Any, links: dict[str, Any], where: str) -> Publisher:
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ConfigError(f"{where}: a publisher's name is one line of text")
    for label, address in links.items():
        if not label or not ADDRESS.fullmatch(str(address)):
            raise ConfigError(f"{where}: {label}={address} is no address that begins with https://, http:// or mailto:")
    return Publisher(name.strip(), dict(links))
