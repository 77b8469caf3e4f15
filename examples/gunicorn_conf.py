"""gunicorn's settings for the Flask example.  Either of

gunicorn -c gunicorn_conf.py "flask_app:create_app()"
gunicorn -c gunicorn_conf.py --preload "flask_app:create_app()"

Nothing is said of forking: a worker forgets by itself what its parent has connected.
"""

workers = 2
threads = 16  # per worker: up to max_size of them have a connection, the others wait for one


def worker_exit(server, worker):
    """After the last request of a worker: let its connections end in peace, and say who has one yet."""
    from sqla_queries_pool import PoolManager  # here: the arbiter needs no pool

    for stopped in PoolManager.drain(5):
        worker.log.info("%s", stopped)
