"""Every setting, where a value came from, and the folders of a run."""
