"""gunicorn's settings for the Flask example.  Either of

gunicorn -c gunicorn_conf.py "flask_app:create_app()"
gunicorn -c gunicorn_conf.py --preload "flask_app:create_app()"
"""

from typing import Any

workers = 2
threads = 16  # per worker: up to max_size of them have a connection, the others wait for one


def post_fork(server: Any, worker: Any) -> None:
    """In each worker, before its first request: the sockets that it has inherited are its parent's."""
    app = worker.app.callable
    if app is None:  # not preloaded: the worker makes its own application, with its own engines, later
        return
    with app.app_context():
        for engine in app.extensions["sqlalchemy"].engines.values():
            engine.dispose(close=False)
