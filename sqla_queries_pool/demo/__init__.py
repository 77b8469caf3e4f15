"""``python -m sqla_queries_pool demo``: what QueriesPool does, measured beside QueuePool."""
