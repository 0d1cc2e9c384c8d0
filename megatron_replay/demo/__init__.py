"""The demo's parts: the task it makes, the model it fetches, the report and picture it ends with."""
