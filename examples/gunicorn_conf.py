"""gunicorn's settings for the Flask example.  Either of

gunicorn -c gunicorn_conf.py "flask_app:create_app()"
gunicorn -c gunicorn_conf.py --preload "flask_app:create_app()"

Nothing is said of forking: a worker forgets by itself what its parent has connected.
"""

workers = 2
threads = 16  # per worker: up to max_size of them have a connection, the others wait for one
