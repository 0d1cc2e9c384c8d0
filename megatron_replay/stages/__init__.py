"""One file per verb: `run(config) -> ...`. No argument parsing here, no maths."""
