"""Evaluation of frozen towers by probes. Importing this package makes `eval probe` known."""

from umt_fast.probing.evaluation import Probe, ProbeOptions

__all__ = ["Probe", "ProbeOptions"]
