"""Who holds the connections, which checkouts wait, and why a checkout got none."""
