"""What in this folder is no page of the site, and has no doctests."""

collect_ignore = ["_build", "conf.py", "extensions", "generated"]
