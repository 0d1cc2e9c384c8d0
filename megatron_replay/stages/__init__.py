"""The verbs of the command line, one file each: `run(config, ...)`. No argument parsing here, no maths."""
