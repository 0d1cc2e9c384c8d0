"""What `doctor` looks at: the machine, and the operators of a tiny step."""
