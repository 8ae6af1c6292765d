"""Timed training steps, each beside the plain road it is meant to beat."""
