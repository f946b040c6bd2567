"""Files that are written whole or not at all, and named arrays with a checksum in them."""
