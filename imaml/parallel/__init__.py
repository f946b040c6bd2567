"""Devices and processes that share out a run's tasks."""
