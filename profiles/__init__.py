"""Measured latency profiles, as JSON files beside this one. None is shipped yet."""
