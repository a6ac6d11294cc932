"""One module a stage: open the inputs, build, fit, write."""
