"""Plan, run, measure, compare: the same fields on both sides, and a record of every run."""
