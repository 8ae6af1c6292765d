"""Training of Unmasked Teacher video foundation models."""

__version__ = "0.1.0"
