"""The demo's task, model, report and picture."""
