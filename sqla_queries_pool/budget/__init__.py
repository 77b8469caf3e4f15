"""Who has which slot of a database's budget, and who gets one next: pure decisions."""
