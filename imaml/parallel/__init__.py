"""Division of the tasks of a meta-step among devices and processes, and detection of lost processes."""
