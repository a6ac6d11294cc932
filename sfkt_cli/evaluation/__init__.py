"""What evaluate measures and shows: models, predictions, bounds, report."""
