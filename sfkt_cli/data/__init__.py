"""Stores, images and readers: from an archive to batches."""
