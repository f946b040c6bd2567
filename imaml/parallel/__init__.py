"""Devices and processes that divide the tasks of a meta-step among them."""
