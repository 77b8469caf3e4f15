"""SQLAlchemy's side: the pool class, its records, and one checkout."""
