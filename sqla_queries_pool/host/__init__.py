"""One budget for all processes of this user on this host: leases, letters, and who gives what to whom."""
