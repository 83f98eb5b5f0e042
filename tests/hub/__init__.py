"""A Hugging Face Hub on loopback: real HTTP for the unmodified client, with faults on demand."""

from .faults import Fault
from .loopback import READ_TOKEN, WRITE_TOKEN, LoopbackHub

__all__ = ["READ_TOKEN", "WRITE_TOKEN", "Fault", "LoopbackHub"]
