"""Makes, proves, documents and publishes 4-bit checkpoints of causal language models."""

__version__ = "0.1.0"
