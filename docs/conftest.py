"""Exclude files that are not pages of the site from the doctests."""

collect_ignore = ["_build", "conf.py", "extensions", "generated"]
