"""The looks that `doctor` takes: at the machine, and at the operators of a tiny step."""
