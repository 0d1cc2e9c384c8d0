"""What the verbs share: a session with its model and ranks, progress, logs, signals, measures."""
