"""Atomic file writes, folder locks, and named arrays stored with a checksum."""
