"""Processes: who each one is, how they are started, and what they exchange."""
