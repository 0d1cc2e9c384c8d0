"""Processes: their ranks and groups, their start, and their exchanges."""
