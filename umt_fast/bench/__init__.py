"""Timed training steps, each beside the plain implementation it is meant to beat."""
