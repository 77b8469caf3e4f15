"""Who holds what, who waits, and what is the matter."""
