"""The parts of a run that several verbs use, or that a long one is made of.

They are the session with its model and ranks, progress, logs, signals, measures, checks of outputs and stores, and
traces.
"""
