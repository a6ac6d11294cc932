"""Methods by seeds: plan, run, tables."""
