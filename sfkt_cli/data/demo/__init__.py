"""The rendered data set of simple solids."""
