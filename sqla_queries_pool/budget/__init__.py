"""The pure core: who has which slot of one database's budget, and who waits.  No lock, thread or clock."""
